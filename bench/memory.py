"""How the peak memory of the relation KL grows with T, for each implementation.

    python -m bench memory [--authors PATH] [--lengths 1024 ...]

What.  Forward and backward at batch 1: H 32, D 128 in bfloat16 on a GPU; H 2, D 64 in float32 on a
CPU, dense and tiled only. Every row goes to OUT/memory.jsonl with the device, the versions and the
commit, and OUT/memory.png draws them. The picture in demo/figures/ is drawn by the same function
from the rows kept beside it (demo/figures.py).

How it is read.  Both axes are logarithmic, so that a power of T is a straight line: memory that
doubles with T is linear in it, memory that quadruples is quadratic. Each line says by how much its
last doubling of T multiplied it.

Limits.  What is counted is what kernel.py says: beyond what the inputs hold, and on a CPU by whole
pages of a fresh process. An implementation is tried no further once it does not fit or a call takes
longer than PATIENCE.
"""

import json
import time
from pathlib import Path

import torch

from bench import kernel

GPU_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
CPU_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PATIENCE = 10.0  # seconds
COLOURS = {
    "dense": "#c44e52",
    "tiled": "#4c72b0",
    "triton": "#55a868",
    "hopper": "#8172b3",
    "authors": "#8c8c8c",
}


def bench_memory(arguments) -> None:
    """Peak extra memory against T: JSON lines and a picture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fixed = kernel.conditions(device)
    table = kernel.implementations(device, arguments.authors)
    if device == "cuda":
        kernels = {name: table[name] for name in ("hopper", "triton", "authors") if name in table}
        table = {"dense": kernel.ours("dense"), "tiled": kernel.ours("tiled")} | kernels
    H, D = (32, 128) if device == "cuda" else (2, 64)
    records = []
    with kernel.open_lines(arguments.out, "memory.jsonl") as file:
        for name, f in table.items():
            if name not in (arguments.only or table):
                continue
            for T in arguments.lengths or (GPU_LENGTHS if device == "cuda" else CPU_LENGTHS):
                peak, seconds = _point(name, f, (H, T, D), device)
                record = {"impl": name, "H": H, "T": T, "D": D, "peak_bytes": peak}
                records.append(record | {"seconds": seconds, **fixed})
                print(json.dumps(records[-1]), file=file, flush=True)
                said = "does not fit" if peak is None else f"{peak / 2**20:10.1f} MiB"
                print(f"{name:8} T {T:7} {said}", flush=True)
                if peak is None or seconds > PATIENCE:
                    break
    draw(records, arguments.out / "memory.png")
    print(f"drawn: {arguments.out / 'memory.png'}")


def _point(name: str, f, shape: tuple[int, int, int], device: str) -> tuple[int | None, float]:
    """(peak bytes, None where they do not fit; seconds)."""
    if device == "cpu":
        return kernel.peak_in_fresh_process(name, shape)
    try:
        x, y = kernel.inputs(*shape, device)
        start = time.perf_counter()
        return kernel.peak_bytes(f, x, y), time.perf_counter() - start
    except torch.OutOfMemoryError:
        return None, 0.0


def draw(records: list[dict], path: Path) -> None:
    """A panel for each device and shape in memory.jsonl's rows, a line for each implementation.

    Both axes are logarithmic; a peak that cannot be told from 0 is left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = list(dict.fromkeys((r["device"], r["H"], r["D"]) for r in records))
    figure = Figure(figsize=(1 + 5 * len(panels), 5.2), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        here = [r for r in records if (r["device"], r["H"], r["D"]) == panel]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for name in dict.fromkeys(r["impl"] for r in here):
            rows = [r for r in here if r["impl"] == name]
            seen = [(r["T"], r["peak_bytes"]) for r in rows if r["peak_bytes"]]
            if not seen:
                continue
            label = name
            if len(seen) > 1 and seen[-1][0] == 2 * seen[-2][0]:
                label += f": x{seen[-1][1] / seen[-2][1]:.1f} per doubling"
            if rows[-1]["peak_bytes"] is None:
                label += f", {_tokens(rows[-1]['T'])} does not fit"
            style = "o--" if name == "triton" else "o-"  # it lies on hopper's line
            axis.plot(*zip(*seen, strict=True), style, lw=2, color=COLOURS[name], label=label)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda T, _: _tokens(T)))
        axis.yaxis.set_major_locator(LogLocator(base=4, numticks=20))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda b, _: _size(b)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("tokens T (both axes are logarithmic)", fontsize=12)
        device, H, D = panel
        about = "peak memory of forward + backward, beyond the inputs"
        axis.set_title(f"{about}\n{H} heads of {D}, {device}", loc="left", fontsize=11)
        axis.tick_params(labelsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=11, loc="upper center", bbox_to_anchor=(0.45, -0.16))
    figure.savefig(path, dpi=110)


def _tokens(T: float) -> str:
    return f"{T / 1024:g}K" if T >= 1024 else f"{T:g}"


def _size(b: float) -> str:
    return f"{b / 2**30:g} GiB" if b >= 2**30 else f"{b / 2**20:g} MiB"
