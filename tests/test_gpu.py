"""The Triton kernels on a real GPU, by the rule and with the inputs of test_kernel.py: `make test-gpu`.

LINEARARD_AUTHORS=PATH (a clone of gracefulning/LinearARD) adds the comparison with the authors' kernels;
compute-sanitizer, where installed, the search for races and for reads out of bounds.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_kernel import agree, bf16, both, fp16, fp32, inputs

import kernel_hopper
import kernel_triton
from bench import kernel as bench
from relation_kl import choose, relation_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or kernel_triton.INTERPRETED, reason="needs a CUDA GPU"
    ),
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised memory holds NaN: an output that the kernel forgets to write shows."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("padded", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("D", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
def test_agrees_with_the_definition(dtype, D, causal, padded):
    for T in (1, 15, 127, 128, 129, 1000):
        x, y, w = inputs(3, 2, T, D, dtype, "BTHD", "cuda")
        lengths = torch.tensor([0, (T + 1) // 2, T], device="cuda") if padded else None
        first = agree(x, y, w, causal=causal, lengths=lengths)
        assert equal(first, agree(x, y, w, causal=causal, lengths=lengths))  # bit for bit
        assert first[1].stride() == x.stride()


@pytest.mark.parametrize(
    "H, T, D, dtype",
    [
        pytest.param(9, 4096, 64, bf16, id="9-query-heads"),
        pytest.param(3, 4096, 64, bf16, id="3-key-heads"),
        pytest.param(4, 4096, 128, fp16, id="fp16"),
        pytest.param(1, 32768, 128, bf16, id="32K"),
    ],
)
def test_long(H, T, D, dtype):
    x, y, w = inputs(1, H, T, D, dtype, device="cuda")
    first = agree(
        x, y, w, impl="tiled"
    )  # linear memory, tested against the definition in test_relation_kl.py
    assert equal(first, agree(x, y, w, impl="tiled"))


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
def test_huge_norms(dtype):
    x, y, w = inputs(1, 2, 500, 64, fp32, device="cuda")
    x, y = (100 * z / z.norm(dim=-1, keepdim=True) for z in (x, y))
    x[:, :, 1::2] = x[:, :, ::2] + 0.001 * x[:, :, 1::2]
    kl, dx = agree(x.to(dtype), y.to(dtype), w)
    assert kl.isfinite().all() and dx.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_student_equal_to_teacher_costs_exactly_nothing(causal):
    x, _, w = inputs(1, 2, 700, 128, bf16, device="cuda")
    kl, dx = both(lambda x, y: relation_kl(x, y, causal=causal, impl="triton"), x, x.clone(), w)
    assert (kl == 0).all() and (dx == 0).all()


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs compute capability 9.0",
)


@on_hopper
@pytest.mark.parametrize("layout", ["BHTD", "BTHD", "qkv"])
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_agrees_with_the_definition(D, layout):
    for B, H, T in ((1, 1, 1), (2, 3, 63), (1, 3, 192), (2, 2, 257), (3, 2, 1000), (1, 5, 2048)):
        x, y, w = inputs(B, H, T, D, bf16, layout, "cuda")
        first = agree(x, y, w, teacher_scale=0.2, kernel=kernel_hopper.relation_kl_hopper)
        assert equal(
            first, agree(x, y, w, teacher_scale=0.2, kernel=kernel_hopper.relation_kl_hopper)
        )  # bit for bit
        assert layout == "qkv" or first[1].stride() == x.stride()


@on_hopper
@pytest.mark.parametrize("H, T, D", [(9, 4096, 64), (4, 8192, 128), (1, 32768, 128)])
def test_hopper_long_and_repeatable(H, T, D):
    x, y, w = inputs(1, H, T, D, bf16, device="cuda")
    first = agree(x, y, w, impl="tiled", kernel=kernel_hopper.relation_kl_hopper)
    for _ in range(10):
        assert equal(first, both(lambda x, y: relation_kl(x, y, impl="hopper"), x, y, w))


@on_hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("loud", [0, 400])
def test_hopper_with_a_token_that_all_look_at(D, loud):
    """Scores far above a row's pivot (token 400), or in it (token 0): kernel_hopper.py, Forward."""
    x, y, w = inputs(2, 3, 1000, D, bf16, "BTHD", "cuda")
    x[:, :, loud] *= 40
    y[:, :, loud] *= 30
    first = agree(x, y, w, kernel=kernel_hopper.relation_kl_hopper)
    assert equal(first, agree(x, y, w, kernel=kernel_hopper.relation_kl_hopper))


@on_hopper
def test_hopper_a_thousand_launches_and_several_streams():
    """Programs meet at counters in memory: none hangs, none adds out of turn, whoever else runs."""
    torch.use_deterministic_algorithms(False)
    streams = [torch.cuda.Stream() for _ in range(3)]
    cases, differ = [], []
    for B, H, T, D in ((1, 1, 63, 64), (2, 3, 321, 128), (1, 9, 513, 64), (1, 4, 1000, 128)):
        x, y, w = inputs(B, H, T, D, bf16, device="cuda")
        arguments = (x, y, 0.1, 0.1, True, None)
        numbers = kernel_hopper.forward(*arguments)
        cases.append((w, *numbers[1:], *arguments))
    right = [kernel_hopper.backward(*case) for case in cases]
    torch.cuda.synchronize()
    for n in range(250):
        for case, dx in zip(cases, right, strict=True):
            with torch.cuda.stream(streams[n % 3]):
                differ.append((kernel_hopper.backward(*case) != dx).any())
    torch.cuda.synchronize()
    assert len(differ) == 1000 and not torch.stack(differ).any()


@on_hopper
def test_hopper_costs_nothing_where_student_is_teacher():
    x, _, w = inputs(1, 2, 700, 128, bf16, device="cuda")
    kl, dx = both(lambda x, y: relation_kl(x, y, impl="hopper"), x, x.clone(), w)
    assert (kl == 0).all() and (dx == 0).all()


def test_teacher_scale_layouts_and_padding():
    for layout in ("BHTD", "BTHD", "qkv"):
        x, y, w = inputs(2, 3, 300, 96, bf16, layout, "cuda")
        agree(x, y, w, scale=0.1, teacher_scale=0.3)
    lengths = torch.tensor([100, 250], device="cuda")
    clean = both(lambda x, y: relation_kl(x, y, lengths=lengths, impl="triton"), x, y, w)
    for z in (x, y, w):
        for b, n in enumerate(lengths.tolist()):
            z[b, :, n:] = float("nan")
    assert equal(
        clean, both(lambda x, y: relation_kl(x, y, lengths=lengths, impl="triton"), x, y, w)
    )


def test_offsets_past_2_to_the_31():
    """Heads 2^30 elements apart, which fits 32 bits: a fault or a wrong answer where their offset is as narrow."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    packed, y, w = inputs(1, 4, 300, 64, bf16, device="cuda")
    x = torch.zeros(3 * 2**30 + 300 * 64, dtype=bf16, device="cuda").as_strided(
        (1, 4, 300, 64), (0, 2**30, 64, 1)
    )
    x.copy_(packed)
    near = kernel_triton._forward(packed, y, 0.1, 0.1, True, None)
    assert equal(near, kernel_triton._forward(x, y, 0.1, 0.1, True, None))
    dx = (kernel_triton._backward(w, *near[1:], z, y, 0.1, 0.1, True, None) for z in (x, packed))
    assert torch.equal(*dx)


def test_tf32_when_asked():
    x, y, w = inputs(1, 1, 300, 64, fp32, device="cuda")
    exact = both(lambda x, y: relation_kl(x, y, impl="triton"), x, y, w)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # monkeypatch cannot put it back
    try:
        fast = both(lambda x, y: relation_kl(x, y, impl="triton"), x, y, w)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    error = (fast[1] - exact[1]).norm() / exact[1].norm()
    assert 0 < error < 1e-2


# ---- what surrounds it


FEW, MANY = (2, 2, 200), (2, 17, 700)  # B, H, T: the plain kernel's choice, and the chip's own's


def loss(x, y):
    return relation_kl(2 * x, y)  # "auto": also that the choice is the kernel


def test_auto_is_a_kernel():
    """The chip's own where there is one and the call suits it, else the plain one."""
    own = "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    x = torch.empty(*MANY, 64, device="cuda", dtype=bf16)
    assert choose(x)[0] == own
    assert choose(torch.empty(*FEW, 64, device="cuda", dtype=bf16))[0] == "triton"
    assert choose(x, causal=False)[0] == "triton"
    assert choose(x, lengths=torch.tensor([1, 2]))[0] == "triton"
    assert choose(x, scales=(1.0, -1.0))[0] == "triton"
    assert choose(x.half())[0] == "triton"
    assert choose(torch.empty(*MANY, 80, device="cuda", dtype=bf16))[0] == "triton"
    x, y, w = inputs(*MANY, 64, bf16, "BTHD", "cuda")
    for more in ({}, {"causal": False}, {"lengths": torch.tensor([200, 300], device="cuda")}):
        agree(x, y, w, kernel=lambda *a: relation_kl(a[0], a[1], scale=a[2], teacher_scale=a[3], causal=a[4], lengths=a[5]), **more)  # fmt: skip


@pytest.mark.parametrize("size", [FEW, MANY])
def test_under_compile_without_a_graph_break(size):
    x, y, w = inputs(*size, 64, bf16, "BTHD", "cuda")
    assert equal(both(torch.compile(loss, fullgraph=True), x, y, w), both(loss, x, y, w))


@pytest.mark.parametrize("size", [FEW, MANY])
def test_under_checkpoint(size):
    x, y, w = inputs(*size, 64, bf16, device="cuda")
    again = both(
        lambda x, y: torch.utils.checkpoint.checkpoint(loss, x, y, use_reentrant=False), x, y, w
    )
    assert equal(again, both(loss, x, y, w))


def test_under_autocast():
    x, y, w = inputs(2, 2, 200, 64, fp32, device="cuda")
    with torch.autocast("cuda", dtype=bf16):
        inside = both(loss, x, y, w)
    assert equal(inside, both(loss, x, y, w))


def test_in_a_cuda_graph():
    """Recorded once, replayed on other numbers: nothing waits for the GPU, nothing depends on a value."""
    torch.use_deterministic_algorithms(False)  # filling fresh memory is no part of what is recorded
    short = torch.tensor([150, 200], device="cuda")
    cases = [(bf16, short, FEW), (fp16, short, FEW), (bf16, None, FEW), (bf16, None, MANY)]
    for dtype, lengths, size in cases:
        x, y, w = inputs(*size, 64, dtype, device="cuda")
        x.requires_grad_()

        def step(x=x, y=y, w=w, lengths=lengths):
            kl = relation_kl(x, y, lengths=lengths)
            return kl.detach(), torch.autograd.grad(kl, x, w)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = step()
        with torch.no_grad():
            x.copy_(3 * x)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(recorded, step())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_host_sync(device):
    x, y, w = inputs(2, 2, 200, 64, fp16, device="cuda")
    lengths = torch.tensor([150, 200], device=device)
    call = lambda: both(lambda x, y: relation_kl(x, y, lengths=lengths, impl="triton"), x, y, w)  # noqa: E731
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_extra_memory_is_the_gradient_and_a_few_numbers_a_row():
    torch.use_deterministic_algorithms(False)
    H, T, D = 8, 8192, 128
    x, y, w = inputs(1, H, T, D, bf16, device="cuda")
    x.requires_grad_()
    peak = bench.peak_bytes(lambda x, y: relation_kl(x, y, impl="triton"), x, y)
    assert peak <= 2 * H * T * D + 6 * 4 * H * T + 2**20


@on_hopper
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_extra_memory_is_the_gradient_the_sums_and_a_few_numbers_a_row(D):
    torch.use_deterministic_algorithms(False)
    H, T = 8, 8192
    x, y, w = inputs(1, H, T, D, bf16, device="cuda")
    x.requires_grad_()
    peak = bench.peak_bytes(lambda x, y: relation_kl(x, y, impl="hopper"), x, y)
    own = kernel_hopper.workspace_bytes(1, H, T, D)
    assert own <= 1.03 * 4 * H * T * D
    assert peak <= 2 * H * T * D + own + 6 * 4 * H * T + 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "kernel",
    [
        kernel_triton.relation_kl_triton,
        pytest.param(kernel_hopper.relation_kl_hopper, marks=on_hopper),
    ],
)
def test_on_the_second_gpu(kernel):
    """While the first one is current: right, and with the first one's bits; also called in turns."""
    on = [[z.to(f"cuda:{n}") for z in inputs(1, 2, 700, 64, bf16)] for n in range(2)]
    first, second, again = (agree(*on[n], kernel=kernel) for n in (0, 1, 0))
    assert equal(first, again) and equal([z.cpu() for z in first], [z.cpu() for z in second])
    assert torch.cuda.current_device() == 0 and second[1].device.index == 1


# ---- other judges


@pytest.mark.skipif(
    "LINEARARD_AUTHORS" not in os.environ, reason="LINEARARD_AUTHORS names no clone"
)
def test_agrees_with_the_authors_kernels():
    """In value and gradient, causal and unpadded, where theirs is right. Theirs sums over rows."""
    theirs = bench.authors(Path(os.environ["LINEARARD_AUTHORS"]))
    torch.use_deterministic_algorithms(False)
    for T, D in ((128, 64), (1000, 128)):
        x, y, w = inputs(1, 4, T, D, bf16, device="cuda")
        ones = torch.ones_like(w)
        kl, dx = both(lambda x, y: relation_kl(x, y, impl="triton"), x, y, ones)
        total, their_dx = both(theirs, x, y, ones.new_ones(()))
        torch.testing.assert_close(total.float(), kl.sum(), rtol=1e-2, atol=0.0)
        assert (their_dx.float() - dx.float()).norm() <= 1e-2 * dx.float().norm()


SMALL_CASE = """
import torch
from relation_kl import relation_kl
for D, causal in ((64, True), (80, False)):
    x, y = (torch.randn(2, 2, 200, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([77, 200], device="cuda")
    relation_kl(x.requires_grad_(), y, causal=causal, lengths=lengths, impl="triton").sum().backward()
if HOPPER:
    for D in (64, 128):
        x, y = (torch.randn(1, 300, 2, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        relation_kl(x.requires_grad_(), y, impl="hopper").sum().backward()
torch.cuda.synchronize()
print("done")
"""


def sanitize(tool: str, hopper: bool, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *more]
    command += [sys.executable, "-c", f"HOPPER = {hopper}\n{SMALL_CASE}"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


needs_sanitizer = pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"
)


@needs_sanitizer
@pytest.mark.parametrize(
    "tool, hopper",
    [("memcheck", False), pytest.param("memcheck", True, marks=on_hopper), ("racecheck", False)],
)
def test_compute_sanitizer_finds_nothing(tool, hopper):
    ran = sanitize(tool, hopper)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


# Where data passes from warp to warp through a barrier in shared memory: the compiler's word that
# tells waiting warps which function to run (it has the kernel's own lines), whether rows are far
# above their pivots, G and the partial sums
HANDED_OVER = {"_forward_kernel", "_backward_kernel", "_fetch_forward", "_fetch_backward"}
HANDED_OVER |= {"_rows_forward", "_any_far", "_tile", "_column", "_add"}


@needs_sanitizer
@on_hopper
def test_racecheck_finds_nothing_but_what_barriers_hand_over():
    """One thread flips such a barrier after bar.warp.sync, for all that its warp wrote: an order
    that PTX's memory model gives and racecheck does not follow. It reports the like in kernels of
    NVIDIA's own that share work among warps, cuBLAS's product and cuDNN's attention (LOG.md).
    """
    ran = sanitize("racecheck", True, ("--racecheck-report", "all", "--print-limit", "10000"))
    functions = [
        f for f in ast.parse(Path(kernel_hopper.__file__).read_text()).body if hasattr(f, "args")
    ]
    for line in (line for line in ran.stdout.splitlines() if "Thread (" in line):
        place = re.search(r" in kernel_hopper\.py:(\d+)$", line.rstrip())
        assert place, line
        names = {f.name for f in functions if f.lineno <= int(place[1]) <= f.end_lineno}
        assert names and names <= HANDED_OVER, line
    assert "done" in ran.stdout
