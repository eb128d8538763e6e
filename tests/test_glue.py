"""The kernels between products, against float64, under Triton's interpreter and on a GPU.

Runs twice, as tests/test_kernel.py does: by pytest as usual and, for the tests marked
`interpreted`, by its own test_under_the_interpreter in a process of its own.

The rule for an error: no more than twice that of model.py's and rope.py's own lines in the same
dtype, both against those lines in float64, plus a unit in the last place.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from test_kernel import compiled, nowhere  # noqa: F401

import kernel_glue
import kernel_host
import kernel_triton
import model as llama
from kernel_host import INTERPRETED
from rope import rotate

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_under_the_interpreter")
no_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = (
    pytest.param("cpu", marks=interpreted),
    pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu]),
)
everywhere = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
EPS = 1e-5


@pytest.mark.skipif(INTERPRETED, reason="starts itself")
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["--noconftest", "-p", "no:cacheprovider", "--tb=short", "-x"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


def eager_norm(x, w):
    norm = llama.RMSNorm(len(w), EPS)
    norm.weight.data = w
    wide = llama.widened(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return w.to(x.dtype) * wide.to(x.dtype)


def eager_gate(a, b):
    return F.silu(a) * b


def results(f, learning, fixed, dy):
    """f(*learning, *fixed) and the gradients of `learning`, for the gradient dy of the result."""
    leaves = [x.detach().requires_grad_() for x in learning]
    y = f(*leaves, *fixed)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def agree(kernel, eager, learning, fixed=()):
    """The rule above, for the result and every gradient; and the same bits twice."""
    shape, device = learning[0].shape, learning[0].device
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(
        device, learning[0].dtype
    )
    found, again = (results(kernel, learning, fixed, dy) for _ in range(2))
    plain = results(eager, learning, fixed, dy)
    wide = [[x.double() for x in some] for some in (learning, fixed)]
    right = results(eager, *wide, dy.double())
    for y, twice, low, exact in zip(found, again, plain, right, strict=True):
        assert torch.equal(y, twice)
        assert y.dtype == low.dtype and y.shape == low.shape
        errors = [(x.double() - exact).norm().item() for x in (y, low)]
        last = torch.finfo(y.dtype).eps * exact.norm().item()
        assert errors[0] <= 2 * errors[1] + 0.5 * last, errors
        assert torch.isfinite(y).all()


@everywhere
@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 5, 100), (7, 4, 3, 16), (3, 4096), (1, 2, 5000)])
def test_a_norm(device, dtype, shape):
    torch.manual_seed(0)
    x, w = 3 * torch.randn(shape), torch.randn(shape[-1])
    x[(0,) * (len(shape) - 1)] = 0  # a row of zeros
    agree(
        lambda x, w: kernel_glue.rms_norm(x, w, EPS),
        eager_norm,
        [x.to(device, dtype)],
        [w.to(device)],
    )


@everywhere
@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 48), (1, 5, 1001), (4097,)])
def test_a_gate(device, dtype, shape):
    torch.manual_seed(0)
    a, b = 8 * torch.randn(shape), torch.randn(shape)
    a.view(-1)[:4] = torch.tensor([-200.0, 200.0, 0.0, -90.0])
    agree(kernel_glue.swiglu, eager_gate, [a.to(device, dtype), b.to(device, dtype)])


@everywhere
@dtypes
@pytest.mark.parametrize(
    "B, H, T, D, rows", [(2, 3, 5, 64, False), (1, 1, 7, 128, False), (2, 4, 33, 6, True)]
)
@pytest.mark.parametrize("layout", ["tokens first", "heads first", "strided"])
def test_a_rotation(device, dtype, B, H, T, D, rows, layout):
    """rows: each block has positions of its own. cos and sin differ between the halves here."""
    torch.manual_seed(0)
    if layout == "tokens first":
        x = torch.randn(B, T, H, D).transpose(1, 2)
    elif layout == "heads first":
        x = torch.randn(B, H, T, D)
    else:
        x = torch.randn(B, H, T, 2 * D)[..., ::2]
    cos, sin = torch.randn(2, *((B, 1) if rows else ()), T, D)
    cos_sin = [t.to(device, dtype) for t in (cos, sin)]
    agree(kernel_glue.rotate, rotate, [x.to(device, dtype)], cos_sin)
    y = kernel_glue.rotate(x.to(device, dtype), *cos_sin)
    assert y.transpose(1, 2).is_contiguous()


@everywhere
def test_views_of_a_larger_tensor(device):
    """As a tile of tokens is: rows lie apart."""
    torch.manual_seed(0)
    whole, w = torch.randn(2, 9, 32).to(device), torch.randn(32).to(device)
    agree(lambda x, w: kernel_glue.rms_norm(x, w, EPS), eager_norm, [whole[:, 2:5]], [w])
    agree(kernel_glue.swiglu, eager_gate, [whole[:, 2:5], whole[:, 4:7]])


@everywhere
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3"}, {"model_type": "qwen2"}])
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_a_model_and_its_gradients(device, changes, recomputed, monkeypatch):
    """All layers in float32: the last h and every gradient that learns, by the rule above."""
    from conftest import random_model

    teacher = random_model(**changes).to(device)
    config = teacher.config.extended("yarn", 4)
    ids = torch.randint(0, 4096, (2, 21), generator=torch.Generator().manual_seed(1)).to(device)

    def run(kernels, dtype=torch.float32):
        monkeypatch.setattr(llama, "glue", lambda x: kernels)
        student = llama.make_student(teacher, config)
        student = student.to(dtype) if dtype == torch.float64 else student
        h = student.hidden(ids, dtype, recomputed)
        llama.next_token_loss(student, h, ids).backward()
        return [h.detach(), *(p.grad for p in llama.trainable(student).values())]

    found, plain = run(kernel_glue), run(None)
    for fast, slow, right in zip(found, plain, run(None, torch.float64), strict=True):
        errors = [(x.double() - right).norm() for x in (fast, slow)]
        assert errors[0] <= 2 * errors[1], errors


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("which", ["norm", "gate", "rotation"])
def test_more_numbers_than_31_bits_count(which):
    """524,288 tokens of an MLP's width: the last rows are as those alone, forward and backward."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    tokens, width = 2**19, 11008 if which != "rotation" else 8192
    x = torch.empty(tokens, width, device="cuda", dtype=torch.bfloat16).normal_()
    last = x[-8:].clone()
    if which == "norm":
        w = torch.ones(width, device="cuda")
        y, dx = kernel_glue.norm_forward(x, w, EPS), kernel_glue.norm_backward(x, w, EPS, x)
        assert torch.equal(y[-8:], kernel_glue.norm_forward(last, w, EPS))
        assert torch.equal(dx[-8:], kernel_glue.norm_backward(last, w, EPS, last))
        torch.testing.assert_close(y[-8:], eager_norm(last, w))
    elif which == "gate":
        y, right = kernel_glue.gate_forward(x, x)[-8:], kernel_glue.gate_forward(last, last)
        assert torch.equal(y, right)
        da, db = kernel_glue.gate_backward(x, x, x)
        right = kernel_glue.gate_backward(last, last, last)
        assert torch.equal(da[-8:], right[0]) and torch.equal(db[-8:], right[1])
    else:
        cos = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
        heads = x.view(1, tokens, 64, 128).transpose(1, 2)
        y = kernel_glue.rotation(heads, cos, cos, False)[:, :, -8:]
        last = cos[-8:]
        assert torch.equal(y, kernel_glue.rotation(heads[:, :, -8:], last, last, False))


def test_a_cpu_and_float64_run_the_definitions():
    assert llama.choose_glue(torch.device("cpu"), torch.float32)[0] is None
    assert kernel_host.refusal(torch.device("cuda"), torch.float64)


def test_the_loss_and_these_kernels_refuse_the_same_gpus(monkeypatch):
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    x = SimpleNamespace(device=gpu, dtype=dtype, shape=(1, 1, 4, 64))
    for capability, shared, words in ((7, 5), 2**16, "8.0 and 99 KiB"), ((8, 6), 99 * 2**10, None):
        monkeypatch.setattr(kernel_host, "chip", lambda device: (capability, shared))  # noqa: B023
        kernels, reason = llama.choose_glue.__wrapped__(gpu, dtype)
        if words:
            assert kernels is None and words in reason == kernel_triton.unsupported(x)
        else:
            assert kernels is kernel_glue and kernel_triton.unsupported(x) is None


@compiled
def test_a_kept_kernel_is_launched_as_triton_would(nowhere):  # noqa: F811
    """Same machine code, same arguments, whatever was launched before: dtypes, widths, strides and
    pointers choose the code.
    """
    low = torch.bfloat16
    off = torch.zeros(6 * 48 + 1, dtype=low)[1:].view(6, 48)  # begins at 2 bytes
    inputs = [torch.zeros(6, 48, dtype=low), off, torch.zeros(6, 50, dtype=low)]
    inputs += [torch.zeros(16, 48, dtype=low), torch.zeros(1, 48), torch.zeros(7, 48)]
    wide = torch.zeros(2, 4, 8, 64, dtype=low)
    heads = [wide, wide.transpose(1, 2), wide[:, :, :, :32], wide[:, :, :5], wide[:, :3], wide[:1]]

    def launches(x):
        nowhere.calls.clear()
        if x.dim() == 2:
            for dtype in (x.dtype, torch.float32):
                kernel_glue.norm_forward(x, torch.ones(x.shape[1], dtype=dtype), EPS)
            kernel_glue.norm_backward(x, torch.ones(x.shape[1]), EPS, x)
            kernel_glue.gate_forward(x, x)
            kernel_glue.gate_backward(x, x, x)
        else:
            for shape in (x.shape[2:], (len(x), 1, *x.shape[2:])):
                cos = torch.ones(shape, dtype=x.dtype)
                kernel_glue.rotation(x, cos, cos, False), kernel_glue.rotation(x, cos, cos, True)
        return [
            [a.dtype if isinstance(a, torch.Tensor) else a for a in call] for call in nowhere.calls
        ]

    kept = [launches(x) for _ in range(2) for x in inputs + heads][len(inputs + heads) :]
    # five launches of each matrix, but for `off`, whose pointers are looked at every time; in
    # float32 both weights are one case; four of all heads
    assert len(kernel_host._compiled) == 5 * 3 + 4 * 2 + 4 * 6
    for x, ours in zip(inputs + heads, kept, strict=True):
        kernel_host._compiled.clear()
        assert ours == launches(x) and len(ours) in (4, 5)


@interpreted
def test_a_norm_that_learns_runs_the_definition(monkeypatch):
    monkeypatch.setattr(llama, "glue", lambda x: kernel_glue)
    norm = llama.RMSNorm(8, EPS)
    norm(torch.randn(3, 8)).sum().backward()
    assert norm.weight.grad is not None


KERNELS = {
    "_norm_forward_kernel": 4096,
    "_norm_backward_kernel": 4096,
    "_gate_forward_kernel": 2048,
    "_gate_backward_kernel": 2048,
    "_rotation_kernel": 128,
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_to_wide_reads(name, chip):
    """bfloat16 at 7B's widths: 16 bytes in each of a thread's reads and writes."""
    triton = pytest.importorskip("triton")
    kernel, width = getattr(kernel_glue, name), KERNELS[name]
    tile = kernel_glue._tile(width // (2 if "rotation" in name else 1))
    options = {"num_warps": tile.pop("num_warps") if "gate" not in name else 4}
    constants = {"BC": width // (2 if "rotation" in name else 1)}
    if "gate" not in name:
        constants["BT"] = tile["BT"]
    if "rotation" in name:
        constants |= {"BACKWARD": False}
    signature = {}
    for argument in kernel.arg_names:
        kind = "*bf16" if argument.startswith("p_") else "fp32" if argument == "eps" else "i32"
        signature[argument] = "constexpr" if argument in constants else kind
    even = [i for i, kind in enumerate(signature.values()) if kind in ("*bf16", "i32")]
    source = triton.compiler.ASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in even}
    )
    target = triton.backends.compiler.GPUTarget("cuda", chip, 32)
    ptx = triton.compile(source, target=target, options=options).asm["ptx"]
    narrow = re.findall(r"(?:ld|st)\.global\S*\.b16\b", ptx)
    assert "v4.b32" in ptx and not narrow, narrow
