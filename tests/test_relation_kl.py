"""The loss: dense against an independent float64 computation, tiled against dense, properties, memory."""

import math
import subprocess
import sys

import pytest
import torch

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
        q = [math.exp(v) / sum(map(math.exp, u)) for v in u]
        assert kl[i].item() == pytest.approx(
            sum(b * math.log(b / c) for b, c in zip(q, p, strict=True)), abs=1e-12
        )


def test_dense_gradient_is_equation_3():
    x, y = inputs(T=9)
    kl, grad = value_and_grad(x, y, impl="dense")
    w = upstream(kl.shape)
    a, mask = 8**-0.5, torch.ones(9, 9).tril().bool()
    p, q = ((a * z @ z.mT).masked_fill(~mask, -torch.inf).softmax(-1) for z in (x, y))
    G = w[..., None] * (p - q)
    torch.testing.assert_close(grad, a * (G + G.mT) @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 15, 63, 100, 257])
@pytest.mark.parametrize("D", [8, 64, 80, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_tiled_equals_dense(T, D, causal):
    x, y = inputs(T=T, D=D)
    for lengths in (None, torch.tensor([T, 0]), torch.tensor([max(1, T - 7), 1])):
        for ours, reference in zip(
            value_and_grad(x, y, causal=causal, lengths=lengths, impl="tiled"),
            value_and_grad(x, y, causal=causal, lengths=lengths, impl="dense"),
            strict=True,
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
    log_p, log_q = ((z @ z.mT * 64**-0.5).masked_fill(~mask, -1e4).log_softmax(-1) for z in (x, y))
    eager = (log_q.exp() * (log_q - log_p)).sum(-1)
    eager = eager.detach(), torch.autograd.grad(eager, x, upstream(eager.shape, dtype))[0]
    for a, e, r in zip(ours, eager, exact, strict=True):
        error, allowed = ((z.double() - r).norm() / r.norm() for z in (a, e))
        assert error <= 2 * allowed, f"{error} against eager's {allowed}"


def test_gradcheck_in_float64():
    x, y = inputs(B=1, H=2, T=37, D=4)  # two strips, the second one short
    x.requires_grad_()
    for causal, lengths in ((True, None), (False, None), (True, torch.tensor([20]))):
        assert torch.autograd.gradcheck(
            lambda z, c=causal, n=lengths: relation_kl(z, y, causal=c, lengths=n, impl="tiled"), x
        )


@pytest.mark.parametrize("impl", ["dense", "tiled"])
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
        ({"teacher": torch.zeros(2, 2, 15, 8, dtype=torch.bfloat16)}, "floating dtype"),
        ({"teacher": torch.zeros(2, 2, 15, 8, requires_grad=True)}, "detach"),
        ({"lengths": torch.tensor([3])}, "lengths must be"),
        ({"lengths": torch.tensor([True, False])}, "lengths must be"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "lengths must be"),
        ({"impl": "magic"}, "'magic'"),
    ],
)
def test_refusals_name_the_value(change, said):
    arguments = {"student": torch.zeros(2, 2, 15, 8), "teacher": torch.zeros(2, 2, 15, 8)} | change
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(ValueError, match=said):
        relation_kl(student, teacher, **arguments)


MEASURE = """
import resource, sys, torch
from relation_kl import relation_kl
torch.set_num_threads(1)
T = int(sys.argv[1])
x = torch.randn(1, 4, T, 64).requires_grad_()
y = torch.randn(1, 4, T, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
relation_kl(x, y, impl="tiled").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_tiled_memory_grows_linearly():
    """Peak extra memory at 4 x T is at most 4 x as much (dense: 16 x), in fresh processes."""

    def extra(T: int) -> int:
        out = subprocess.run(
            [sys.executable, "-c", MEASURE, str(T)], capture_output=True, text=True, check=True
        )
        return int(out.stdout)

    small, large = extra(2048), extra(8192)
    assert large <= 4 * small + 8 * 1024, f"{small} KiB at 2048, {large} KiB at 8192"
    assert large * 1024 < 8192 * 8192 * 4, "less than one dense float32 matrix of one head"
