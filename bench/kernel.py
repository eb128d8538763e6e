"""Speed and memory of the relation KL, side by side with what one would use instead.

    python -m bench kernel [--authors PATH] [--shapes 32x4096x128 ...]   times and memory, a table
    python -m bench kernel --deterministic --only "flash attention"      what a fixed order costs

PATH is a clone of gracefulning/LinearARD, the method's authors' own code: it is imported from
there, nothing is copied. Every row also goes to out/kernel.jsonl with the device, the versions and
the commit. On a GPU the tensors are bfloat16 and the shapes those of LLaMA layers; without one,
float32 and small, dense and tiled only.

How it measures.  Time: each call between two CUDA events, or by the wall clock on a CPU; two calls
to warm up; the second-level cache is overwritten before each call; median and 20 and 80 %
quantiles. What Python does before a launch is inside: at short T it shows, and the rows "graph"
(forward and backward replayed as one CUDA graph) say what share. TFLOP/s: 12 D H T^2 / 2 flops for
forward and backward, a third of it for the forward, whatever an implementation really does
(relation_kl.py: 6 products over a triangle). Attention is another computation, here for scale only:
x attends to y, three gradients; by its own count, 14 D H T^2 / 2, of which two sevenths forward,
and its bits vary from run to run. Share: of the rate of one large
product in the same run, 8192^3 in bfloat16 on a GPU, 1024^3 in float32 on a CPU (OMP_NUM_THREADS=1
where other processes share the machine). Memory: peak of torch's allocator above what the inputs
hold; on a CPU, growth of a fresh process's resident peak (ru_maxrss), since torch counts no CPU
memory, with a malloc that gives freed blocks back at once. That is coarse: what fits into pages
that the process already had shows as 0.
"""

import concurrent.futures
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import kernel_hopper
from engine import cost
from engine.machine import commit, fix_order
from relation_kl import choose, relation_kl

# H, T, D at batch 1; t (as in 32x4096x128t): transposed, as the model passes them. The first three
# are LLaMA's and SmolLM2's at length; the last two are short: they show the cost of a launch.
GPU_SHAPES = ("32x32768x128", "32x4096x128", "9x8192x64", "9x2048x64", "32x512x128")
CPU_SHAPES = ("12x64x64", "3x128x64", "3x512x64", "9x2048x64")


# ---- the implementations: each takes (x, y) and gives a tensor to differentiate


def eager(x: Tensor, y: Tensor) -> Tensor:
    """The loss of x and y [B, H, T, D] as one writes it in PyTorch: [B, H, T] in their dtype."""
    T, D = x.shape[-2:]
    unseen = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    log_p = (x @ x.mT * D**-0.5).masked_fill(unseen, float("-inf")).log_softmax(-1)
    log_r = (y @ y.mT * D**-0.5).masked_fill(unseen, float("-inf")).log_softmax(-1)
    return (log_r.exp() * (log_r - log_p)).masked_fill(unseen, 0).sum(-1)


def ours(impl: str):
    return lambda x, y: relation_kl(x, y, impl=impl)


def attention(backend: str):
    """torch's own attention of x to y. Its backward computes three gradients, asked for or not."""

    def run(x, y):
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(x, y, y, is_causal=True)

    return run


def authors(path: Path):
    """The authors' kernels, imported from a clone.

    They give the sum over rows; it takes x as query and as key.
    """
    if not (path / "kernels/attention_KL/integration.py").is_file():
        raise SystemExit(
            f"--authors {path} holds no kernels/attention_KL/integration.py: give a clone of "
            "LinearARD"
        )
    sys.path.insert(0, str(path))
    kernel = importlib.import_module("kernels.attention_KL.integration").attn_kl_align
    return lambda x, y: kernel(x, x, y, y, None, True, x.shape[-1] ** -0.5, x.shape[-1] ** -0.5)


def implementations(device: str, authors_path: Path | None) -> dict:
    """Name to function. On a CPU says why the rest is left out."""
    if device == "cpu":
        print(
            f"Left out: triton ({choose(torch.zeros(1, 1, 1, 64))[1]}), attention and the authors' "
            "(GPU only)."
        )
        return {"dense": ours("dense"), "tiled": ours("tiled")}
    # a compiled backward gives its buffers away after one call, unless told that there will be more
    torch._functorch.config.donated_buffer = False
    probe = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=device)
    chip = kernel_hopper.unsupported(probe, True, None, (1.0, 1.0)) is None
    table = {"hopper": ours("hopper")} if chip else {}
    table |= {
        "triton": ours("triton"),
        "eager": eager,
        "eager, compiled": torch.compile(eager, dynamic=False),
    }
    table |= {
        "flash attention": attention("FLASH_ATTENTION"),
        "cuDNN attention": attention("CUDNN_ATTENTION"),
    }
    return table | ({"authors": authors(authors_path)} if authors_path else {})


# ---- measuring


def inputs(H: int, T: int, D: int, device: str, layout: str = "") -> tuple[Tensor, Tensor]:
    """x and y [1, H, T, D]; layout "t": transposes of [1, T, H, D], as a model's q, k and v are."""
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (1, T, H, D) if layout else (1, H, T, D)
    x, y = (torch.randn(size, generator=g, device=device).to(dtype) for _ in range(2))
    x, y = (x.transpose(1, 2), y.transpose(1, 2)) if layout else (x, y)
    return x.requires_grad_(), y


def milliseconds(f, device: str, seconds: float = 1.0) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of f's time over about `seconds`, between 5 and 200 calls."""
    cold = torch.empty(256 * 2**20 if device == "cuda" else 1, dtype=torch.int8, device=device)
    for _ in range(2):
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        once = time.perf_counter() - start
    taken = []
    for _ in range(max(5, min(200, int(seconds / once)))):
        cold.zero_()
        if device == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            f()
            after.record()
            after.synchronize()
            taken.append(before.elapsed_time(after))
        else:
            start = time.perf_counter()
            f()
            taken.append(1e3 * (time.perf_counter() - start))
    return tuple(torch.tensor(taken).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist())


def both(f, x: Tensor, y: Tensor) -> Tensor:
    """Forward and backward: a gradient in x, [B, H, T, D] as x and y are.

    Rows weigh what they are, which takes no time to make.
    """
    out = f(x, y)
    return torch.autograd.grad(out, x, out.detach())[0]


def graphed(f, x: Tensor, y: Tensor):
    """Forward and backward of x and y [B, H, T, D] as one CUDA graph: the call that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(f, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both(f, x, y)
    return graph.replay


def peak_bytes(f, x: Tensor, y: Tensor) -> int:
    """Bytes that forward and backward of x and y [B, H, T, D] hold beyond what is held before.

    On a CPU only in a fresh process.
    """
    if x.is_cuda:
        gc.collect()  # what a call before left in cycles is held by nobody
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        both(f, x, y)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both(f, x, y)
    unit = 1 if platform.system() == "Darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * unit


def _cpu_peak(impl: str, shape: tuple[int, int, int]) -> tuple[int, float]:
    small = inputs(1, 64, shape[2], "cpu")
    both(ours(impl), *small)  # what the first call loads is no part of the answer
    x, y = inputs(*shape, "cpu")
    start = time.perf_counter()
    return peak_bytes(ours(impl), x, y), time.perf_counter() - start


def peak_in_fresh_process(impl: str, shape: tuple[int, int, int]) -> tuple[int, float]:
    """Bytes and seconds.

    A process's resident peak never falls, so every CPU figure takes a process of its own. glibc
    keeps freed blocks below its threshold: at 1024 tokens the dense peak would read twice as high.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_cpu_peak, impl, shape).result()


def conditions(device: str) -> dict:
    """What a figure means nothing without."""
    versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "triton": versions.get("triton"),
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit(),
    }


def matmul_rate(device: str) -> tuple[float, str]:
    """flop/s of one large product, and what it was: the most that a loss made of products can
    reach.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n, rate = cost.PRODUCT[device], cost.peak_flops(torch.device(device), dtype)
    return rate, f"{n}^3 {str(dtype).removeprefix('torch.')} product: {rate / 1e12:.3g} TFLOP/s"


# ---- subcommands


def row(name: str, mode: str, f, shape: tuple[int, int, int], device: str) -> dict:
    """{"ms", "ms_20", "ms_80", "tflops"} of one mode at shape (H, T, D)."""
    H, T, D, *_ = shape
    backward = 5 if "attention" in name else 4
    products = {"forward": 2, "backward": backward, "both": 2 + backward}[mode]
    median, low, high = milliseconds(f, device)
    flops = products * 2 * D * H * T**2 / 2
    return {"ms": median, "ms_20": low, "ms_80": high, "tflops": flops / median / 1e9}


def rows(name: str, f, shape: tuple[int, int, int], device: str):
    """One implementation's rows at one shape; {"does_not_fit": True} where memory ends."""
    try:
        H, T, D, layout = shape
        x, y = inputs(H, T, D, device, layout)
        peak = (
            peak_bytes(f, x, y) if device == "cuda" else peak_in_fresh_process(name, shape[:3])[0]
        )
        out = f(x, y)
        ones = torch.ones_like(out)
        modes = {
            "forward": lambda: f(x, y),
            "backward": lambda: torch.autograd.grad(out, x, ones, retain_graph=True),
            "both": lambda: both(f, x, y),
        }
        for mode, call in modes.items():
            timed = {"mode": mode, **row(name, mode, call, shape, device), "peak_bytes": peak}
            yield timed
        if device == "cuda" and name != "authors":
            graph = {
                "mode": "graph",
                # a new leaf: x's own gradient node belongs to another stream by now
                **row(name, "both", graphed(f, x.detach().requires_grad_(), y), shape, device),
                "peak_bytes": peak,
            }
            yield graph | {"launches": 1 - graph["ms"] / timed["ms"]}
    except torch.OutOfMemoryError:
        yield {"mode": "both", "does_not_fit": True}


def bench_kernel(arguments) -> None:
    """Times, TFLOP/s and peak memory at a list of shapes: a table, and JSON lines in --out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.deterministic:
        fix_order()
    fixed = conditions(device) | {"deterministic": arguments.deterministic}
    table = implementations(device, arguments.authors)
    rate, product = matmul_rate(device)
    print(", ".join(f"{k} {v}" for k, v in fixed.items()))
    print(product)
    print(
        f"{'H, T, D':16}{'':18}{'':9}{'ms':>10}{'20 %':>10}{'80 %':>10}"
        f"{'TFLOP/s':>9}{'share':>7}{'peak MiB':>10}"
    )
    with open_lines(arguments.out, "kernel.jsonl") as file:
        for text in arguments.shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES):
            shape = (*(int(n) for n in text.rstrip("t").split("x")), "t" * text.endswith("t"))
            for name in (n for n in table if n in (arguments.only or table)):
                f = table[name]
                for r in rows(name, f, shape, device):
                    r["share"] = r["tflops"] * 1e12 / rate if "tflops" in r else None
                    print(
                        json.dumps({"shape": shape, "impl": name, **r, **fixed}),
                        file=file,
                        flush=True,
                    )
                    print(
                        f"{text:16}{name:18}{r['mode']:9}{_cells(r)}",
                        flush=True,
                    )


def _cells(r: dict) -> str:
    if "does_not_fit" in r:
        return "  does not fit"
    share = f"{r['share']:7.1%}" if r["share"] else f"{'':7}"
    times = "".join(f"{r[k]:10.3f}" for k in ("ms", "ms_20", "ms_80"))
    launches = f"  launches: {r['launches']:.0%} of both" if "launches" in r else ""
    return f"{times}{r['tflops']:9.3g}{share}{r['peak_bytes'] / 2**20:10.1f}{launches}"


def open_lines(out: Path, name: str):
    out.mkdir(parents=True, exist_ok=True)
    return open(out / name, "w")
