"""The loss: dense against an independent float64 computation, tiled against dense, properties,
memory.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from kernel_cpu import _exp2
from relation_kl import choose, relation_kl


def inputs(B=2, H=2, T=15, D=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, D, dtype=torch.float64, generator=g).to(dtype) for _ in range(2)]


def upstream(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


def value_and_grad(x, y, **options):
    """Row losses and the gradient under a random, not constant, upstream gradient."""
    x = x.clone().requires_grad_()
    kl = relation_kl(x, y, **options)
    (grad,) = torch.autograd.grad(kl, x, upstream(kl.shape, kl.dtype))
    return kl.detach(), grad


# ---- the derivations of relation_kl.py's docstring, in numbers; each can be run alone


def test_the_gradient_in_the_scores_is_P_minus_R():
    """Equation (2): autograd's gradient of the definition in one row of scores, nothing derived."""
    S, U = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S.requires_grad_()
    P, R = S.softmax(-1), U.softmax(-1)
    (R * (R.log() - P.log())).sum().backward()
    torch.testing.assert_close(S.grad, (P - R).detach(), rtol=1e-12, atol=1e-14)


def test_a_token_collects_its_row_and_its_column():
    """Equation (3): x enters S = x x^T on both sides; a G that is not symmetric tells them apart."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, generator=g, requires_grad=True)
    G = torch.randn(5, 5, dtype=torch.float64, generator=g)
    (G * (x @ x.mT)).sum().backward()
    torch.testing.assert_close(x.grad, ((G + G.mT) @ x).detach(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(x.grad, 2 * G @ x), "the row alone, twice, is another gradient"


def test_one_pass_gives_both_log_sum_exps_and_the_kl():
    """Pieces of a row, each seen once; five numbers are kept. Equation (1) comes out."""
    S, U = 5 * torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pivot_s = pivot_u = torch.tensor(-torch.inf, dtype=torch.float64)
    sum_s = sum_u = weighted = torch.tensor(0.0, dtype=torch.float64)
    for s, u in zip(S.split(8), U.split(8), strict=True):
        new_s, new_u = torch.maximum(pivot_s, s.max()), torch.maximum(pivot_u, u.max())
        sum_s = sum_s * (pivot_s - new_s).exp() + (s - new_s).exp().sum()
        sum_u = sum_u * (pivot_u - new_u).exp() + (u - new_u).exp().sum()
        weighted = weighted * (pivot_u - new_u).exp() + ((u - new_u).exp() * (u - s)).sum()
        pivot_s, pivot_u = new_s, new_u
    lse_s, lse_u = pivot_s + sum_s.log(), pivot_u + sum_u.log()
    torch.testing.assert_close(lse_s, S.logsumexp(-1))
    torch.testing.assert_close(lse_u, U.logsumexp(-1))
    R = U.softmax(-1)
    kl = (R * (R.log() - S.log_softmax(-1))).sum()
    torch.testing.assert_close(weighted / sum_u - lse_u + lse_s, kl)


def test_relations_do_not_see_a_rotation_that_attention_does():
    """All keys turned alike: K/K is perfect, and every query's attention is another one."""
    q, k = inputs(T=20)
    turn = torch.linalg.qr(
        torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ).Q
    assert relation_kl(k @ turn, k).abs().max() < 1e-12
    before, after = ((q @ z.mT * 8**-0.5).softmax(-1) for z in (k, k @ turn))
    assert (before - after).abs().max() > 0.1


# ---- the implementations


def test_no_subnormal_number_is_left_to_compute_with():
    """Some CPUs take 100 times as long for each; a row 130 nats wide would be made of them."""
    bits = torch.linspace(-200, 0, 1001)
    e = _exp2(bits, torch.empty_like(bits))
    torch.testing.assert_close(e[bits > -100], bits[bits > -100].exp2())
    assert e[bits <= -100].eq(0).all()


def test_a_row_much_wider_than_exp_reaches_is_right():
    """Logits of +-150 in float32: exp underflows in most pairs, of the student, the teacher or
    both.
    """
    x, y = (4 * z for z in inputs(T=70, D=64, dtype=torch.float32))
    exact = value_and_grad(x.double(), y.double(), impl="dense")
    for ours, truth in zip(value_and_grad(x, y, impl="tiled"), exact, strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_whatever_stands_in_the_padding_changes_nothing(causal):
    x, y = inputs(T=70)
    options = {"lengths": torch.tensor([33, 0]), "causal": causal, "impl": "tiled"}
    clean = value_and_grad(x, y, **options)
    for z in (x, y):
        z[0, :, 33:] = torch.nan
        z[1] = torch.inf
    for ours, expected in zip(value_and_grad(x, y, **options), clean, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("cells", [1, 70 * 64 * 3, 2**24])
def test_how_many_heads_go_together_changes_nothing(monkeypatch, cells):
    monkeypatch.setitem(sys.modules["kernel_cpu"].CELLS, "cpu", cells)
    x, y = inputs(B=2, H=4, T=70)
    for ours, reference in zip(
        value_and_grad(x, y, impl="tiled"), value_and_grad(x, y, impl="dense"), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_dense_is_the_definition_written_as_loops():
    x, y = inputs(B=1, H=1, T=5, D=3)
    a = 3**-0.5
    kl = relation_kl(x, y, impl="dense")[0, 0]
    for i in range(5):
        s = [
            a * sum(x[0, 0, i, d].item() * x[0, 0, j, d].item() for d in range(3))
            for j in range(i + 1)
        ]
        u = [
            a * sum(y[0, 0, i, d].item() * y[0, 0, j, d].item() for d in range(3))
            for j in range(i + 1)
        ]
        p = [math.exp(v) / sum(map(math.exp, s)) for v in s]
        r = [math.exp(v) / sum(map(math.exp, u)) for v in u]
        assert kl[i].item() == pytest.approx(
            sum(b * math.log(b / c) for b, c in zip(r, p, strict=True)), abs=1e-12
        )


def test_dense_gradient_is_equation_3():
    x, y = inputs(T=9)
    kl, grad = value_and_grad(x, y, impl="dense")
    w = upstream(kl.shape)
    a, mask = 8**-0.5, torch.ones(9, 9).tril().bool()
    p, r = ((a * z @ z.mT).masked_fill(~mask, -torch.inf).softmax(-1) for z in (x, y))
    G = w[..., None] * (p - r)
    torch.testing.assert_close(grad, a * (G + G.mT) @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 15, 63, 100, 257])
@pytest.mark.parametrize("D", [8, 64, 80, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_strips_and_tiled_equal_dense(T, D, causal):
    x, y = inputs(T=T, D=D)
    for lengths in (None, torch.tensor([T, 0]), torch.tensor([max(1, T - 7), 1])):
        options = {"causal": causal, "lengths": lengths}
        expected = value_and_grad(x, y, impl="dense", **options)
        for impl in ("strips", "tiled"):
            for ours, reference in zip(
                value_and_grad(x, y, impl=impl, **options), expected, strict=True
            ):
                torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["logits of 8", "logits of 80"])
def test_tiled_error_is_at_most_twice_that_of_low_precision_eager(dtype, offset):
    x, y = ((z + offset).to(dtype) for z in inputs(T=200, D=64))
    exact = value_and_grad(x.double(), y.double(), impl="dense")
    ours = value_and_grad(x, y, impl="tiled")
    x.requires_grad_()
    mask = torch.ones(200, 200).tril().bool()
    log_p, log_r = ((z @ z.mT * 64**-0.5).masked_fill(~mask, -1e4).log_softmax(-1) for z in (x, y))
    eager = (log_r.exp() * (log_r - log_p)).sum(-1)
    eager = eager.detach(), torch.autograd.grad(eager, x, upstream(eager.shape, dtype))[0]
    for a, e, truth in zip(ours, eager, exact, strict=True):
        error, allowed = ((z.double() - truth).norm() / truth.norm() for z in (a, e))
        assert error <= 2 * allowed, f"{error} against eager's {allowed}"


def test_gradcheck_in_float64(T=69):
    x, y = inputs(B=1, H=2, T=T, D=4)
    x.requires_grad_()
    for causal, lengths in ((True, None), (False, None), (True, torch.tensor([T // 3 - 3]))):
        assert torch.autograd.gradcheck(
            lambda z, c=causal, n=lengths: relation_kl(z, y, causal=c, lengths=n, impl="tiled"), x
        )


@pytest.mark.parametrize("impl", ["dense", "strips", "tiled"])
class TestProperties:
    def test_never_negative(self, impl):
        x, y = inputs(T=70)
        assert relation_kl(x, y, impl=impl).min() >= -1e-15

    def test_zero_with_zero_gradient_when_student_is_teacher(self, impl):
        x, _ = inputs(T=70, dtype=torch.float32)
        kl, grad = value_and_grad(x, x.clone(), impl=impl)
        assert kl.abs().max() < 1e-5 and grad.abs().max() < 1e-6
        if impl == "tiled":  # both log-sum-exps come from the same numbers: exactly nothing
            assert kl.eq(0).all() and grad.eq(0).all()

    def test_unchanged_by_a_rotation_of_the_features(self, impl):
        x, y = inputs(T=40)
        turn = torch.linalg.qr(
            torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        ).Q
        torch.testing.assert_close(
            relation_kl(x @ turn, y, impl=impl), relation_kl(x, y, impl=impl)
        )

    def test_row_i_is_blind_to_later_rows(self, impl):
        x, y = inputs(T=70)
        changed = x.clone()
        changed[..., 41:, :] += 1
        before, after = relation_kl(x, y, impl=impl), relation_kl(changed, y, impl=impl)
        assert torch.equal(before[..., :41], after[..., :41]) and not torch.equal(
            before[..., 41:], after[..., 41:]
        )

    def test_padding_is_as_if_it_were_not_there(self, impl):
        x, y = inputs(B=1, T=50)
        x[..., 33:, :] = 1e3
        kl, grad = value_and_grad(x, y, lengths=torch.tensor([33]), impl=impl)
        short = relation_kl(x[..., :33, :], y[..., :33, :], impl=impl)
        torch.testing.assert_close(kl[..., :33], short)
        assert kl[..., 33:].eq(0).all() and grad[..., 33:, :].eq(0).all()

    def test_huge_logits_stay_exact(self, impl):
        x, y = (100 * z for z in inputs(T=40))
        kl, grad = value_and_grad(x, y, impl=impl)
        assert torch.isfinite(kl).all() and torch.isfinite(grad).all()

    def test_teacher_scale_scales_the_teacher_alone(self, impl):
        x, y = inputs(T=20)
        torch.testing.assert_close(
            relation_kl(x, y, scale=0.3, teacher_scale=0.6, impl=impl),
            relation_kl(x, y * 2**0.5, scale=0.3, impl=impl),
        )

    def test_same_bits_twice_and_for_strided_views(self, impl):
        x, y = inputs(T=70, dtype=torch.float32)
        view = x.transpose(1, 2).contiguous().transpose(1, 2)
        one, two, three = (value_and_grad(z, y, impl=impl) for z in (x, x, view))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert torch.equal(one[0], three[0])

    def test_autocast_does_not_lower_the_precision(self, impl):
        x, y = inputs(T=40, dtype=torch.float32)
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kl = relation_kl(x, y, impl=impl)
        expected, grad = value_and_grad(x.detach(), y, impl=impl)
        assert torch.equal(kl, expected)
        assert torch.equal(torch.autograd.grad(kl, x, upstream(kl.shape, kl.dtype))[0], grad)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_many_strips_keep_every_rule(rows, monkeypatch):
    """The lengths above are one or two strips as shipped."""
    monkeypatch.setattr(sys.modules["kernel_cpu"], "BT", rows)
    monkeypatch.setattr(sys.modules["relation_kl"], "BT", rows)
    test_gradcheck_in_float64(21 if rows == 1 else 69)
    test_a_row_much_wider_than_exp_reaches_is_right()
    test_tiled_error_is_at_most_twice_that_of_low_precision_eager(torch.float32, 3.0)
    test_tiled_error_is_at_most_twice_that_of_low_precision_eager(torch.bfloat16, 0.0)
    for causal in (True, False):
        test_strips_and_tiled_equal_dense(100, 8, causal)
        test_whatever_stands_in_the_padding_changes_nothing(causal)
    for name in dir(TestProperties):
        if name.startswith("test_"):
            for impl in ("strips", "tiled"):
                getattr(TestProperties(), name)(impl)


@pytest.mark.parametrize("T", [3, 7, 10, 127, 129, 300])
@pytest.mark.parametrize("D", [8, 17, 64])
def test_a_student_equal_to_its_teacher_costs_exactly_nothing_at_any_length(T, D):
    """S and U are equal bit for bit only if every step treats both alike, their places in memory
    included.
    """
    x = inputs(B=1, H=3, T=T, D=D, dtype=torch.float32)[0]
    assert all(z.eq(0).all() for z in value_and_grad(x, x.clone(), impl="tiled"))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("T", [15, 127, 128, 300])
def test_numbers_kept_for_a_checkpoint_change_no_bit(T, causal):
    """Short sequences keep P - R where nothing is checkpointed: another way to the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        x, y = inputs(H=12, T=T, D=64, dtype=dtype)
        options, kept = {"causal": causal, "lengths": torch.tensor([T - 7, T])}, []
        expected = value_and_grad(x, y, impl="tiled", **options)
        for _ in range(2):
            run = value_and_grad(x, y, impl="tiled", kept=kept, **options)
            assert all(map(torch.equal, expected, run))
            run[0].zero_()  # what a caller does to the rows is no part of what is kept


def test_auto_says_what_it_chose_and_why():
    x, y = inputs()
    implementation, reason = choose(x)
    assert implementation == "tiled" and "cpu" in reason
    assert torch.equal(relation_kl(x, y), relation_kl(x, y, impl="tiled"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"student": torch.zeros(2, 3, 4)}, "B, H, T, D"),
        ({"student": torch.zeros(1, 2, 0, 4)}, "non-empty"),
        ({"teacher": torch.zeros(2, 2, 15, 9)}, "one shape"),
        ({"teacher": torch.zeros(2, 2, 15, 8, dtype=torch.int64)}, "must be floating"),
        ({"student": torch.zeros(2, 2, 15, 8, dtype=torch.int64)}, "must be floating"),
        ({"teacher": torch.zeros(2, 2, 15, 8, requires_grad=True)}, "detach"),
        ({"lengths": torch.tensor([3])}, "lengths must be"),
        ({"lengths": torch.tensor([True, False])}, "lengths must be"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "lengths must be"),
        ({"impl": "magic"}, "'magic'"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"teacher_scale": float("nan")}, "teacher_scale nan"),
    ],
)
def test_refusals_name_the_value(change, said):
    arguments = {"student": torch.zeros(2, 2, 15, 8), "teacher": torch.zeros(2, 2, 15, 8)} | change
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(ValueError, match=said):
        relation_kl(student, teacher, **arguments)


MEASURE = """
import re, sys, torch
from pathlib import Path
from relation_kl import relation_kl
def peak():  # KiB; getrusage's would begin with the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
T = int(sys.argv[1])
x = torch.randn(1, 2, T, 64).requires_grad_()
y = torch.randn(1, 2, T, 64)
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = peak()
relation_kl(x, y, impl=sys.argv[2]).sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize("impl", ["strips", "tiled"])
def test_memory_grows_linearly(impl):
    """Peak extra memory at 4 x T is at most 4 x as much (dense: 16 x), in fresh processes whose
    allocator gives a large tensor's pages back when it dies.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def extra(T: int) -> int:
        out = subprocess.run(
            [sys.executable, "-c", MEASURE, str(T), impl],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(out.stdout)

    small, large = extra(2048), extra(8192)
    assert large <= 4 * small + 4 * 1024, f"{small} KiB at 2048, {large} KiB at 8192"
    assert large * 1024 < 8192 * 8192 * 4, "less than one dense float32 matrix of one head"


@pytest.mark.parametrize("impl", ["auto", "dense", "strips", "tiled"])
@pytest.mark.parametrize("theirs", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ours", [torch.float64, torch.float32, torch.bfloat16])
def test_a_teacher_of_another_dtype_is_cast_to_the_students(ours, theirs, impl):
    x, y = inputs(T=33, D=16)
    x, y = x.to(ours), y.to(theirs)
    cast = value_and_grad(x, y.to(ours), impl=impl)
    for a, b in zip(value_and_grad(x, y, impl=impl), cast, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_a_student_that_requires_no_grad_is_warned_of_once(recwarn):
    import warnings

    x, y = inputs(T=9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            relation_kl(x, y)
    (only,) = said
    assert only.filename == __file__ and "use_reentrant=False" in str(only.message)
    with torch.no_grad():
        relation_kl(x, y)
    relation_kl(x.requires_grad_(), y)
    assert not recwarn.list
