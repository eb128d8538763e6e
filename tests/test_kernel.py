"""The Triton kernels without a GPU: their arithmetic under Triton's interpreter, their machine code
from the compiler.

The interpreter has to be chosen before Triton is imported, and compiling needs it off. So this file
runs twice: by pytest as usual, where it compiles, and by its own test_under_the_interpreter in a
second process, where the tests marked `interpreted` run. To see those alone:  TRITON_INTERPRET=1
python -m pytest tests/test_kernel.py To see registers, spills and shared memory of every tile:
python -m pytest tests/test_kernel.py -k compiles -rP

The rule for an error: no more than twice the error of the same formulas in plain PyTorch in the
same dtype, both against the float64 definition, plus what rounding the scores to float32 may cost
(`agree`).
"""

import functools
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import kernel_host  # noqa: E402
import kernel_triton  # noqa: E402
from kernel_triton import Tile, relation_kl_triton, tile, unsupported  # noqa: E402
from relation_kl import relation_kl  # noqa: E402

interpreted = pytest.mark.skipif(
    not kernel_triton.INTERPRETED, reason="runs in test_under_the_interpreter"
)
compiled = pytest.mark.skipif(kernel_triton.INTERPRETED, reason="the interpreter compiles nothing")
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def visible(T, causal, lengths, device):
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)[None, :]
    seen = ((j <= i) if causal else (j == j))[None, None]
    if lengths is not None:
        n = lengths.to(device)[:, None, None, None]
        seen = seen & (i < n) & (j < n)
    return seen


def eager(x, y, scale, teacher_scale, causal, lengths):
    """The loss as one writes it in PyTorch, every step in the dtype of the input."""
    seen = visible(x.shape[2], causal, lengths, x.device)
    hidden = torch.finfo(x.dtype).min
    log_p = (x @ x.mT * scale).masked_fill(~seen, hidden).log_softmax(-1)
    log_r = (y @ y.mT * teacher_scale).masked_fill(~seen, hidden).log_softmax(-1)
    return (log_r.exp() * (log_r - log_p)).masked_fill(~seen, 0).sum(-1)


def both(f, x, y, w):
    """Loss and gradient of f(x, y) with upstream gradient w."""
    x = x.detach().requires_grad_()
    kl = f(x, y)
    return kl.detach(), torch.autograd.grad(kl, x, w.to(kl.dtype))[0]


def agree(
    x, y, w, *, scale=None, teacher_scale=None, causal=True, lengths=None, impl="dense", kernel=None
):
    """Asserts the file's rule for loss and gradient, `impl` in float64 being right; returns the
    kernel's.
    """
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    teacher_scale = scale if teacher_scale is None else teacher_scale
    arguments = (scale, teacher_scale, causal, lengths)
    kl, dx = both(lambda x, y: (kernel or relation_kl_triton)(x, y, *arguments), x, y, w)
    plain = both(lambda x, y: eager(x, y, *arguments), x, y, w)
    true = both(
        lambda x, y: relation_kl(
            x,
            y,
            scale=scale,
            teacher_scale=teacher_scale,
            causal=causal,
            lengths=lengths,
            impl=impl,
        ),
        x.double(),
        y.double(),
        w,
    )
    assert kl.dtype == torch.float32 and dx.dtype == x.dtype and dx.shape == x.shape
    # A score S, rounded to float32, is off by |S| 2^-24, and so are its row's lse and the exponent
    # of P: 3 roundings of S and 3 of U reach the loss, and P, R of relative error that size reach
    # the gradient, times a w x, twice (3).
    top = max(
        abs(s) * z.double().square().sum(-1).max().item()
        for s, z in ((scale, x), (teacher_scale, y))
    )
    score = 6 * 2**-24 * (top + 1)
    floors = (score, 2 * score * abs(scale) * w.abs().max().item() * x.double().abs().max().item())
    for name, ours, theirs, right, floor in zip(
        ("loss", "gradient"), (kl, dx), plain, true, floors, strict=True
    ):
        error, allowed = ((z.double() - right).abs().max().item() for z in (ours, theirs))
        assert error <= 2 * allowed + floor, (
            f"{name}: error {error:.2e}, eager's {allowed:.2e}, floor {floor:.2e}"
        )
    return kl, dx


def inputs(B, H, T, D, dtype, layout="BHTD", device="cpu"):
    """Student, teacher and upstream gradient.

    BTHD: as a projection gives it; qkv: a slice of a fused projection.
    """
    g = torch.Generator().manual_seed(0)
    shape = {"BHTD": (B, H, T, D), "BTHD": (B, T, H, D), "qkv": (B, T, 3, H, D)}[layout]
    x, y = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
    if layout == "qkv":
        x, y = x[:, :, 1], y[:, :, 1]
    if layout != "BHTD":
        x, y = x.transpose(1, 2), y.transpose(1, 2)
    return x, y, torch.randn(B, H, T, generator=g).to(device)


# ---- under the interpreter


@compiled
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds NaN: an output that the kernel forgets to write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


SMALL = Tile(
    32, 16, 4, 1
)  # several tiles in a short sequence: all three ranges of columns, and ragged ones
WIDE = Tile(16, 32, 4, 1)  # the diagonal crosses a tile of more columns than rows


@interpreted
@pytest.mark.parametrize(
    "dtype, shape, causal, lengths, layout, override",
    [
        pytest.param(fp32, (1, 1, 1, 16), True, None, "BHTD", None, id="one-token"),
        pytest.param(fp32, (1, 2, 15, 16), False, None, "BHTD", None, id="T15-full"),
        pytest.param(fp32, (2, 1, 63, 64), True, None, "BHTD", None, id="T63-shipped-tile"),
        pytest.param(
            fp32, (2, 2, 100, 80), True, [37, 100], "BTHD", SMALL, id="T100-D80-lengths-BTHD"
        ),
        pytest.param(
            fp32, (2, 2, 100, 80), False, [33, 64], "BTHD", SMALL, id="T100-D80-full-lengths"
        ),
        pytest.param(fp32, (1, 1, 100, 16), True, None, "BHTD", WIDE, id="wide-tile"),
        pytest.param(fp32, (1, 1, 100, 16), False, [90], "BHTD", WIDE, id="wide-tile-full-lengths"),
        pytest.param(fp16, (1, 1, 257, 64), True, None, "BHTD", None, id="fp16-T257-shipped-tile"),
        pytest.param(
            fp16, (1, 1, 257, 128), False, None, "BHTD", None, id="fp16-T257-full-shipped-tile"
        ),
        pytest.param(
            fp16, (3, 1, 63, 80), True, [0, 1, 63], "qkv", SMALL, id="fp16-D80-empty-row-qkv"
        ),
        pytest.param(bf16, (1, 1, 257, 128), True, None, "BHTD", None, id="bf16-T257-shipped-tile"),
        pytest.param(
            bf16, (2, 2, 100, 64), False, [0, 99], "BTHD", SMALL, id="bf16-full-empty-row"
        ),
        pytest.param(bf16, (2, 3, 63, 17), True, [63, 16], "BHTD", SMALL, id="bf16-D17"),
    ],
)
def test_agrees_with_the_definition(
    dtype, shape, causal, lengths, layout, override, poison, monkeypatch
):
    if override:
        monkeypatch.setattr(kernel_triton, "tile", lambda *_: override)
    x, y, w = inputs(*shape, dtype, layout)
    lengths = None if lengths is None else torch.tensor(lengths)
    kl, dx = agree(x, y, w, causal=causal, lengths=lengths)
    again, dx_again = agree(x, y, w, causal=causal, lengths=lengths)
    assert torch.equal(kl, again) and torch.equal(dx, dx_again)  # bit for bit
    if lengths is not None:
        past = torch.arange(shape[2]) >= lengths[:, None, None]
        assert (kl.masked_select(past) == 0).all() and (
            dx.masked_select(past[..., None]) == 0
        ).all()
    if layout == "BTHD":
        assert (
            dx.stride() == x.stride()
        )  # written where the transpose's own backward reads it without a copy


@interpreted
def test_teacher_scale_and_negative_scale(poison, monkeypatch):
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, y, w = inputs(1, 2, 50, 32, fp32)
    agree(x, y, w, scale=0.1, teacher_scale=0.3)
    agree(x, y, w, scale=-0.05, teacher_scale=0.2, causal=False)


@interpreted
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_huge_norms(dtype, poison, monkeypatch):
    """Norms of 100: scores of 10^4 a.

    Two near twins make rows with two large scores, so the softmax is no mere 1.
    """
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, y, w = inputs(1, 1, 64, 64, fp32)
    x, y = (100 * z / z.norm(dim=-1, keepdim=True) for z in (x, y))
    x[:, :, 1::2] = x[:, :, ::2] + 0.001 * x[:, :, 1::2]
    kl, dx = agree(x.to(dtype), y.to(dtype), w)
    assert kl.isfinite().all() and dx.isfinite().all()


@interpreted
@pytest.mark.parametrize("causal", [True, False])
def test_student_equal_to_teacher_costs_exactly_nothing(causal, poison, monkeypatch):
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, _, w = inputs(1, 2, 70, 48, fp16)
    kl, dx = both(lambda x, y: relation_kl_triton(x, y, 0.2, 0.2, causal, None), x, x.clone(), w)
    assert (kl == 0).all() and (dx == 0).all()


@interpreted
def test_padding_is_never_read(poison, monkeypatch):
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, y, w = inputs(2, 1, 70, 32, fp32)
    lengths = torch.tensor([20, 45])
    clean = both(lambda x, y: relation_kl_triton(x, y, 0.2, 0.2, True, lengths), x, y, w)
    for z in (x, y, w):
        for b, n in enumerate(lengths):
            z[b, :, n:] = float("nan")
    dirty = both(lambda x, y: relation_kl_triton(x, y, 0.2, 0.2, True, lengths), x, y, w)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@interpreted
def test_a_mean_over_many_rows_does_not_underflow_float16(monkeypatch):
    """Upstream gradients of 2^-12 times the usual: only dL/dx itself, in float16, may lose bits to
    it, G must not.
    """
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, y, w = inputs(1, 1, 40, 16, fp16)
    x = 30 * x
    usual, tiny, none = (
        both(lambda x, y: relation_kl_triton(x, y, 0.01, 0.2, True, None), x, y, w * factor)[
            1
        ].float()
        for factor in (1, 2**-12, 0)
    )
    assert (
        (tiny * 2**12 - usual).abs() <= 2**-12 + 2**-10 * usual.abs()
    ).all() and usual.abs().max() > 1
    assert (none == 0).all()


@interpreted
@pytest.mark.parametrize("T, head, token", [(40, 2**30 + 16, 16), (330, 16, 2**23 - 8)])
def test_offsets_past_2_to_the_31(T, head, token, monkeypatch):
    """Three heads 2^30 elements apart; 330 tokens 2^23 apart. Each stride fits 32 bits, and no
    offset does at the end.

    The gaps are never touched, so cost no memory.
    """
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: Tile(64, 64, 4, 1))
    packed, y, w = inputs(1, 3, T, 16, fp16)
    x = torch.empty(2 * head + (T - 1) * token + 16, dtype=fp16).as_strided(
        (1, 3, T, 16), (0, head, token, 1)
    )
    x.copy_(packed)
    far = relation_kl_triton(x, y, 0.25, 0.25, True, None)
    assert torch.equal(far, relation_kl_triton(packed, y, 0.25, 0.25, True, None))
    _, s_lse, t_lse = kernel_triton._forward(packed, y, 0.25, 0.25, True, None)
    far, near = (
        kernel_triton._backward(w, s_lse, t_lse, z, y, 0.25, 0.25, True, None) for z in (x, packed)
    )
    assert torch.equal(far, near)


@interpreted
def test_a_layout_with_strided_features_is_copied(monkeypatch):
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, y, w = inputs(1, 2, 20, 32, fp32)
    agree(x.mT.contiguous().mT, y.mT.contiguous().mT, w)


@interpreted
def test_heads_in_groups(monkeypatch):
    """Which program takes which head changes nothing, a last group of fewer heads included."""
    monkeypatch.setattr(kernel_triton, "tile", lambda *_: SMALL)
    x, y, w = inputs(1, 5, 40, 16, fp32)
    usual = both(lambda x, y: relation_kl_triton(x, y, 0.2, 0.2, True, None), x, y, w)
    monkeypatch.setattr(kernel_triton, "GROUP_BYTES", 2 * (2 * 40 * 16 * 4))
    grouped = both(lambda x, y: relation_kl_triton(x, y, 0.2, 0.2, True, None), x, y, w)
    assert all(torch.equal(a, b) for a, b in zip(usual, grouped, strict=True))


@interpreted
def test_the_operators_keep_torch_librarys_rules():
    x, y, w = inputs(2, 1, 10, 16, fp32)
    lengths = torch.tensor([10, 4])
    torch.library.opcheck(kernel_triton._forward, (x.requires_grad_(), y, 0.2, 0.3, True, lengths))
    _, s_lse, t_lse = kernel_triton._forward(x.detach(), y, 0.2, 0.3, True, None)
    torch.library.opcheck(
        kernel_triton._backward, (w, s_lse, t_lse, x.detach(), y, 0.2, 0.3, True, None)
    )


def test_a_function_is_marked_constant_as_torchs_compiler_marks_it():
    ours, theirs = (lambda: 0), (lambda: 0)
    assert vars(kernel_host.constant(ours)) == vars(torch.compiler.assume_constant_result(theirs))


def keep_losses(ctx, op, *arguments, **options):
    """A user's policy for selective checkpointing: what the losses' operators return is kept."""
    policy = torch.utils.checkpoint.CheckpointPolicy
    is_loss = getattr(op, "namespace", "") == "linear_ard" and "backward" not in str(op)
    return policy.MUST_SAVE if is_loss else policy.PREFER_RECOMPUTE


@interpreted
def test_under_compile_checkpoint_and_autocast():
    x, y, w = inputs(1, 2, 20, 16, fp32)

    def loss(x, y):
        return relation_kl(2 * x, y, impl="triton")

    def checkpointed(x, y):
        return torch.utils.checkpoint.checkpoint(loss, x, y, use_reentrant=False)

    kl, dx = both(loss, x, y, w)

    def loss_kept(x, y):
        contexts = functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts, keep_losses
        )
        return torch.utils.checkpoint.checkpoint(
            loss, x, y, use_reentrant=False, context_fn=contexts
        )

    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), checkpointed, loss_kept):
        assert all(torch.equal(a, b) for a, b in zip(both(f, x, y, w), (kl, dx), strict=True))
    with torch.autocast("cpu", dtype=bf16):
        assert all(torch.equal(a, b) for a, b in zip(both(loss, x, y, w), (kl, dx), strict=True))


@interpreted
def test_eager_calls_bypass_the_operator_and_watched_ones_do_not(monkeypatch):
    """The operator costs Python three times what an autograd.Function does; torch.compile and
    policies need it.
    """
    x, y, w = inputs(1, 2, 20, 16, fp32)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    with Watch():
        watched = both(lambda x, y: relation_kl(x, y, impl="triton"), x, y, w)
    assert {"linear_ard.relation_kl.default", "linear_ard.relation_kl_backward.default"} <= set(
        seen
    )
    monkeypatch.setattr(kernel_triton.LOSS, "operator", None)
    eager = both(lambda x, y: relation_kl(x, y, impl="triton"), x, y, w)
    assert all(torch.equal(a, b) for a, b in zip(watched, eager, strict=True))


@interpreted
def test_a_policy_keeps_the_loss_in_a_checkpoint(monkeypatch):
    """Its forward runs once, and not again in the backward."""
    x, y, w = inputs(1, 2, 20, 16, fp32)
    calls = []
    kernel = kernel_triton._forward_kernel
    monkeypatch.setattr(kernel_triton, "_forward_kernel", Recorded(kernel, calls))
    contexts = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts, keep_losses
    )
    for options, runs in (({}, 2), ({"context_fn": contexts}, 1)):
        calls.clear()
        both(
            lambda x, y, o=options: torch.utils.checkpoint.checkpoint(
                lambda x, y: relation_kl(2 * x, y, impl="triton"), x, y, use_reentrant=False, **o
            ),
            x, y, w,
        )  # fmt: skip
        assert len(calls) == runs


@interpreted
def test_a_list_keeps_the_loss_in_a_checkpoint(monkeypatch):
    """As a policy does, to the same bits, and without a look at every operator; what the caller
    does to the rows is no part of what is kept.
    """
    x, y, w = inputs(1, 2, 20, 16, fp32)
    calls = []
    kernel = kernel_triton._forward_kernel
    monkeypatch.setattr(kernel_triton, "_forward_kernel", Recorded(kernel, calls))

    def loss(x, y, kept=None):
        return relation_kl(2 * x, y, impl="triton", kept=kept).mul_(3.0).square()

    plain = both(loss, x, y, w)
    calls.clear()
    kept = both(
        lambda x, y: torch.utils.checkpoint.checkpoint(loss, x, y, [], use_reentrant=False), x, y, w
    )
    assert len(calls) == 1 and all(map(torch.equal, plain, kept))


class Recorded:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        self.calls.append(grid)
        return self.kernel[grid]


@interpreted
def test_only_first_derivatives_and_only_the_loss_is_differentiable():
    x, y, _ = inputs(1, 1, 8, 16, fp32)
    kl, s_lse, t_lse = kernel_triton._forward(x.requires_grad_(), y, 0.2, 0.2, True, None)
    assert kl.requires_grad and not s_lse.requires_grad and not t_lse.requires_grad


# ---- what it refuses


@pytest.mark.parametrize(
    "x, words",
    [
        (
            torch.zeros(1, 1, 4, 32, dtype=torch.float64),
            "float16, bfloat16 or float32, not torch.float64",
        ),
        (torch.zeros(1, 1, 4, 8), "D from 16 to 256, not 8"),
        (torch.zeros(1, 1, 4, 257), "D from 16 to 256, not 257"),
    ],
)
def test_refuses_in_a_sentence(x, words):
    with pytest.raises(ValueError, match=words):
        relation_kl_triton(x, x, 1.0, 1.0, True, None)


@compiled
def test_refuses_the_cpu():
    with pytest.raises(ValueError, match="needs a GPU, and the tensors are on cpu"):
        relation_kl_triton(torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 4, 32), 1.0, 1.0, True, None)


@compiled
def test_shapes_without_a_gpu():
    """The fake implementations, which torch.compile and FakeTensorMode call, on a device that need
    not exist.
    """
    x = torch.empty(2, 7, 3, 64, device="meta", dtype=bf16).transpose(1, 2).requires_grad_()
    kl, s_lse, t_lse = kernel_triton._forward(x, x.detach(), 0.1, 0.1, True, None)
    assert all(z.shape == (2, 3, 7) and z.dtype == fp32 for z in (kl, s_lse, t_lse))
    (dx,) = torch.autograd.grad(kl.sum(), x)
    assert dx.shape == x.shape and dx.dtype == bf16 and dx.stride() == x.stride()


# ---- the tile of each chip, compiled ahead of time

# Compute capability to bytes of shared memory a block may use (CUDA C programming guide, "Technical
# Specifications")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {bf16: "bf16", fp16: "fp16", fp32: "fp32"}
# Bytes of stack a thread may spill to: what the compiler bundled with Triton 3.7.1 reports for the
# worst shipped tile
SPILLED = 96


def test_tiles_fall_back_in_order():
    h100, a100, small = ((9, 0), SHARED[90]), ((8, 0), SHARED[80]), ((8, 9), SHARED[89])
    assert (
        tile("forward", 128, bf16, *h100)
        == tile("forward", 80, fp16, (10, 0), SHARED[100])
        == Tile(128, 128, 8, 2)
    )
    assert tile("backward", 128, bf16, *h100) == Tile(128, 64, 8, 3)
    assert (
        tile("forward", 128, bf16, *a100)
        == tile("forward", 128, bf16, (9, 0), SHARED[80])
        == Tile(128, 64, 8, 2)
    )
    assert tile("backward", 128, bf16, *small) == tile("backward", 128, bf16, (12, 0), SHARED[89])
    assert tile("backward", 128, bf16, *small) != tile("backward", 128, bf16, *a100)
    for direction in ("forward", "backward"):
        assert tile(direction, 129, bf16, *h100) == tile(direction, 256, bf16, *h100)
        assert tile(direction, 128, fp32, *h100) == tile(direction, 128, fp32, *small)
    with pytest.raises(ValueError, match="no tile for compute capability"):
        tile("forward", 128, bf16, (7, 5), 64 * 1024)
    assert unsupported(torch.zeros(1, 1, 4, 8)) is not None


def compile_kernel(direction, D, dtype, causal, chip):
    """Compiles one shipped choice for sm_{chip} as a launch would: 16-byte aligned pointers and
    strides, no lengths.
    """
    kernel = getattr(kernel_triton, f"_{direction}_kernel")
    x = torch.empty(1, 1, 1, D, dtype=dtype)
    constants = kernel_triton._constants(direction, x, x, dtype, causal)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants["lengths"] = None
    if direction == "forward":
        constants |= {"S_NEGATIVE": False, "T_NEGATIVE": False}
    elif dtype != fp16:
        constants["w_max"] = None
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "y", "dx"):
            signature[name] = f"*{TYPES[dtype]}"
        elif name in ("kl", "s_lse", "t_lse", "w", "w_max"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
    aligned = [
        i for i, (name, type) in enumerate(signature.items()) if type[0] == "*" or "stride" in name
    ]
    source = triton.compiler.ASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    target = triton.backends.compiler.GPUTarget("cuda", chip, 32)
    return triton.compile(source, target=target, options=options)


def program(name, *arguments):
    """What one of the tools that Triton brings says."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    ran = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


def resources(cubin, path):
    """Registers and bytes of stack of a thread."""
    path.write_bytes(cubin)
    said = program("cuobjdump", "--dump-resource-usage", path)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def loops(cubin, path):
    """The machine code's innermost loops that hold tensor-core instructions: each one's instructions'
    names, in order.
    """
    path.write_bytes(cubin)
    names, labels, spans = [], {}, []
    for line in program("nvdisasm", "-c", path).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(\S+)(.*);", line):
            names.append(code[1])
            back = re.search(r"`\((\.L_x_\d+)\)", code[2]) if code[1].startswith("BRA") else None
            if back and back[1] in labels:
                spans.append(range(labels[back[1]], len(names)))
    inner = [
        s
        for s in spans
        if not any(o.start >= s.start and o.stop <= s.stop and o != s for o in spans)
    ]
    found = (
        [names[i].split(".")[0] if "DEPBAR" not in names[i] else names[i] for i in s] for s in inner
    )
    return [loop for loop in found if "HGMMA" in loop]


def assert_runs_at_full_rate(kernel, waits, folder):
    """No serialised tensor-core instructions (ptxas C75xx), no spills in a loop, at most `waits`
    waits a tile.
    """
    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    said = program(
        "ptxas", "-v", "-arch=sm_90a", folder / "kernel.ptx", "-o", folder / "again.cubin"
    )
    assert "C75" not in said, said
    found = loops(kernel.asm["cubin"], folder / "kernel.cubin")
    assert found
    for loop in map(Counter, found):
        assert not loop["LDL"] and not loop["STL"], f"spills in a loop: {loop}"
        assert loop["WARPGROUP.DEPBAR.LE"] <= waits, (
            f"{loop['WARPGROUP.DEPBAR.LE']} waits in a loop: {loop}"
        )
    return found


CHOICES = [
    (D, dtype, True, chip)
    for chip in (80, 90, 100)
    for dtype in (bf16, fp32)
    for D in (64, 128, 256)
]
CHOICES += [
    (128, bf16, True, 89),
    (256, bf16, True, 89),
    (80, fp16, True, 90),
    (128, fp16, True, 90),
]
CHOICES += [(D, bf16, False, 90) for D in (64, 128, 256)]


@compiled
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "D, dtype, causal, chip",
    [
        pytest.param(*c, id=f"sm{c[3]}-{TYPES[c[1]]}-D{c[0]}-{'causal' if c[2] else 'full'}")
        for c in CHOICES
    ],
)
def test_every_shipped_tile_compiles(direction, D, dtype, causal, chip, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_triton, "chip", lambda device: (divmod(chip, 10), SHARED[chip]))
    kernel = compile_kernel(direction, D, dtype, causal, chip)
    registers, stack = resources(kernel.asm["cubin"], tmp_path / "kernel.cubin")
    choice = tile(direction, D, dtype, divmod(chip, 10), SHARED[chip])
    print(
        f"sm_{chip} {TYPES[dtype]} D {D:3} {direction:8} {'causal' if causal else 'full  '} {tuple(choice)!s:16} "
        f"{registers:3} registers, {stack:3} bytes spilled, {kernel.metadata.shared / 1024:5.1f} KiB shared"
    )
    assert kernel.metadata.shared <= SHARED[chip]
    assert stack <= SPILLED
    if chip == 90 and dtype in (bf16, fp16):
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert_runs_at_full_rate(kernel, 2, tmp_path)  # for S and U together, and for dL/dx
    if chip == 100 and dtype == bf16:
        assert "tcgen05.mma" in kernel.asm["ptx"]


# ---- the host


class Nowhere:
    """A driver of Triton's for an H200 that is not there: launches are written down, not made."""

    def __init__(self):
        self.calls, self.utils = [], self
        # grid, stream, code, what hooks are told (a new object each time), hooks, the arguments
        self.launcher_cls = lambda *_: lambda *call: self.calls.append(call[:6] + call[7:])

    get_current_target = lambda _: triton.backends.compiler.GPUTarget("cuda", 90, 32)  # noqa: E731
    get_current_device = lambda _: 99  # noqa: E731 - no real device's compiled kernels are touched
    get_current_stream = lambda _, device: 7  # noqa: E731
    get_device_properties = lambda _, device: {"max_shared_mem": SHARED[90]}  # noqa: E731

    def load_binary(self, name, code, shared, device):
        return 1, code, 64, 0, 1024  # as the "function": the machine code itself


@pytest.fixture
def nowhere(monkeypatch):
    driver = Nowhere()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(kernel_host, "_compiled", {})
    monkeypatch.setattr(kernel_triton, "unsupported", lambda x: None)
    return driver


@compiled
def test_a_kept_kernel_is_launched_as_triton_would(nowhere):
    """Same machine code, same arguments, whatever was launched before: strides, pointers, types,
    lengths, masks and signs choose the code, numbers do not.
    """
    x, y, w = inputs(2, 3, 40, 16, bf16)
    byte = torch.zeros(2, 3, 40, 17, dtype=bf16)  # rows of 34 bytes
    off = torch.zeros(2 * 3 * 40 * 16 + 1, dtype=bf16)[1:].view(2, 3, 40, 16)  # 2 bytes off
    short = torch.tensor([7, 40])
    cases = [(z, y, 0.2, 0.3, True, None) for z in (x, byte[..., :16], off, x.transpose(0, 1))]
    cases += [(x, y, -0.2, 0.3, True, None), (x, y, 0.2, 0.3, False, None)]
    cases += [(x, y, 0.2, 0.3, True, n) for n in (short, short.int())]
    cases += [(x.half(), y.half(), 0.2, 0.3, True, None), (x, y, 0.1, 0.3, True, None)]

    def launches(case):
        nowhere.calls.clear()
        x, y = case[:2]
        kernel_triton.forward(x, y.view(x.shape), *case[2:])
        kernel_triton.backward(w.view(x.shape[:3]), w, w, x, y.view(x.shape), *case[2:])
        return [
            [a.dtype if isinstance(a, torch.Tensor) else a for a in call] for call in nowhere.calls
        ]

    kept = [launches(case) for _ in range(2) for case in cases][len(cases) :]
    # `off` is never kept, another scale shares; the backward looks at no sign
    assert len(kernel_host._compiled) == (len(cases) - 2) + (len(cases) - 3)
    for case, ours in zip(cases, kept, strict=True):
        kernel_host._compiled.clear()
        assert ours == launches(case) and len(ours) == 2


@compiled
def test_the_hosts_time(nowhere, monkeypatch):
    """Forward + backward, beside an autograd.Function that makes and saves as many tensors and does
    nothing with them; -rP prints both. The rule: at most twice as long, Triton's own part excluded.
    """
    x, y, w = inputs(1, 1, 16, 64, bf16)
    x.requires_grad_()

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y, torch.empty_like(w), torch.empty_like(w))
            return torch.empty_like(w)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, w):
            x, *_ = ctx.saved_tensors
            return torch.empty_like(x), None

    launch, least = kernel_triton._launch, {}
    ways = {"launches to nowhere": (launch, lambda x, y: relation_kl(x, y, impl="triton"))}
    ways |= {"no launches": (lambda *_: None, ways["launches to nowhere"][1])}
    ways |= {"a bare autograd.Function": (launch, Bare.apply)}
    for _ in range(200):  # in turns, as another process may slow down some
        for name, (way, f) in ways.items():
            monkeypatch.setattr(kernel_triton, "_launch", way)
            torch.autograd.grad(f(x, y), x, w)
            began = time.thread_time()
            for _ in range(10):
                torch.autograd.grad(f(x, y), x, w)
            least[name] = min(least.get(name, 1.0), (time.thread_time() - began) / 10)
    print("host, us: " + ", ".join(f"{name} {1e6 * t:.0f}" for name, t in least.items()))
    assert least["no launches"] <= 2 * least["a bare autograd.Function"]
