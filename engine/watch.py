"""Watching a run: a line a step, JSON lines, curves as a picture, and an end in one sentence when numbers go bad.

What.  Every step leaves one JSON line in metrics.jsonl, which is the source of everything else:

    total, stage, step; loss, grad_norm (before clipping), lr; seconds, tokens_per_second, tflops, mfu; gib; eta_seconds
    stage 1 also: relations {Q/Q, K/K, V/V: mean KL over layers}, layers [sum of the three in each layer]

A terminal shows a bar, anything else about twenty plain lines a stage. curves.png, drawn at each saved state but at
most once a minute, holds the loss by relation, stage 2's loss, and stage 1's loss by layer, so that one sees which
layers hold out. --tensorboard writes the same figures for TensorBoard where that package is installed.

Speed.  tflops is plan.flops over the seconds of the step, for all processes together, recomputation not counted; mfu
is that over the number of devices times `peak`, the rate of one large matrix product, measured at the start (bfloat16
8192^3 on a GPU, float32 1024^3 on a CPU) or given by --peak-tflops. The ETA takes the work that is left, in all stages,
at the median speed of the last 20 steps; measuring and exporting come on top.

Limits.  A step's seconds include waiting for the text and for other processes; saving a state is not in them.
"""

import importlib.util
import json
import math
import platform
import resource
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine import plan as planning
from hub import files
from relation_kl import RELATIONS


def peak_flops(device: torch.device) -> float:
    """flop/s of one large matrix product: the best of five."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        c = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    assert c.shape == (n, n)
    return 2 * n**3 / min(times[1:])


def peak_memory(device: torch.device) -> float:
    """GiB: what the GPU's allocator held at most, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard needs the package: pip install tensorboard, or leave the flag out"
        )


class Watch:
    """The log of one run, of which rank 0 alone has one that speaks."""

    def __init__(
        self,
        out: Path,
        plan: list,
        config,
        rank: int | None,
        peak: float,
        size: int,
        tensorboard: bool,
    ):
        self.file = out / "metrics.jsonl"
        self.log = self.file.open("a")
        self.plan, self.peak, self.size = plan, peak, size
        self.writer = None
        if tensorboard:
            self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
                out / "tensorboard"
            )
        self.work = [sum(planning.flops(config, stage, rank).values()) for stage in plan]
        self.recent: list[float] = []  # flop/s of the last steps
        self.bar, self.drawn = None, time.time()

    def begin(self, number: int, first: int) -> None:
        stage = self.plan[number]
        self.number, self.recent = number, []
        self.bar = tqdm(
            initial=first, total=stage.steps, desc=stage.name, unit=" steps", disable=None
        )

    def step(
        self,
        total: int,
        step: int,
        loss: float,
        norm: float,
        lr: float,
        seconds: float,
        gib: float,
        parts,
    ) -> None:
        """Logs and shows one step; parts [L, 3] or None."""
        stage, rate = self.plan[self.number], self.work[self.number] / seconds
        self.recent = [*self.recent[-19:], rate]
        left = (stage.steps - step - 1) * self.work[self.number]
        left += sum(
            w * s.steps
            for w, s in zip(self.work[self.number + 1 :], self.plan[self.number + 1 :], strict=True)
        )
        row = {
            "total": total,
            "stage": stage.name,
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
        }
        row |= {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(stage.T * stage.batch / seconds),
        }
        row |= {"tflops": rate / 1e12, "mfu": rate / (self.peak * self.size), "gib": gib}
        row["eta_seconds"] = round(left / sorted(self.recent)[len(self.recent) // 2], 1)
        if parts is not None:
            row["relations"] = dict(zip(RELATIONS, parts.mean(0).tolist(), strict=True))
            row["layers"] = parts.sum(-1).tolist()
        print(json.dumps(row), file=self.log, flush=True)
        self._say(row, stage)
        if self.writer:
            figures = {k: row[k] for k in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu")}
            for name, value in (figures | row.get("relations", {})).items():
                self.writer.add_scalar(f"{stage.name}/{name}", value, step)

    def _say(self, row: dict, stage) -> None:
        text = f"loss {row['loss']:.4f}"
        if "relations" in row:
            text += " (" + ", ".join(f"{k} {v:.3g}" for k, v in row["relations"].items()) + ")"
        text += f", norm {row['grad_norm']:.2f}, lr {row['lr']:.2g}, {row['tokens_per_second']:,} tokens/s, "
        text += f"{row['tflops']:.3g} TFLOP/s, MFU {row['mfu']:.0%}, {row['gib']:.1f} GiB, "
        text += f"ETA {planning.clock(row['eta_seconds'])}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        last = row["step"] + 1 == stage.steps
        if self.bar.disable and (last or row["step"] % max(1, stage.steps // 20) == 0):
            print(f"{stage.name} step {row['step'] + 1}/{stage.steps}: {text}", flush=True)

    def end(self) -> None:
        """The stage is over."""
        self.bar.close()
        self.curves()

    def curves(self, patience: float = 0.0) -> None:
        """Draws curves.png anew, unless it was drawn within the last `patience` seconds."""
        if self.writer:
            self.writer.flush()
        if time.time() - self.drawn >= patience and self.file.stat().st_size:
            draw(self.file, self.file.with_name("curves.png"))
            self.drawn = time.time()

    def close(self) -> None:
        self.log.close()
        if self.writer:
            self.writer.close()


def draw(log: Path, picture: Path) -> None:
    """metrics.jsonl as a picture: what there is of loss by relation, by layer, and of the next token."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first, second = ([r for r in rows if ("layers" in r) is kind] for kind in (True, False))
    figure = Figure(figsize=(5 * (2 * bool(first) + bool(second)), 4), layout="constrained")
    axes = list(figure.subplots(1, 2 * bool(first) + bool(second), squeeze=False)[0])
    if first:
        first = first[:: math.ceil(len(first) / 500)]
        steps = [r["step"] for r in first]
        axis = axes.pop(0)
        for name in RELATIONS:
            axis.plot(steps, [r["relations"][name] for r in first], label=name)
        axis.set(yscale="log", xlabel="step", title="stage 1: KL by relation (nats)")
        axis.legend(frameon=False)
        axis = axes.pop(0)
        layers = torch.tensor([r["layers"] for r in first]).T.clamp_min(1e-12)  # [L, steps]
        image = axis.imshow(
            layers.numpy(),
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            norm=LogNorm(),
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(layers) - 0.5),
        )
        axis.set(xlabel="step", ylabel="layer", title="stage 1: KL by layer (nats)")
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis)
    if second:
        second = second[:: math.ceil(len(second) / 500)]
        axes[0].plot([r["step"] for r in second], [r["loss"] for r in second])
        axes[0].set(xlabel="step", title="stage 2: next-token loss (nats)")
    work = picture.with_name(f".{picture.name}")
    figure.savefig(work, dpi=110, format="png")
    files.write_atomic(picture, work.read_bytes())
    work.unlink()


@torch.no_grad()
def refuse_non_finite(
    world, stage, step: int, loss: float, norm: float, parts, weights, student, ids: Tensor
) -> None:
    """Raises ValueError, on all ranks, naming step, layer and blocks where loss or gradient is NaN or infinite.

    loss, norm and parts [L, 3] or None are the means over all ranks; ids [B, T + 1] this rank's blocks.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    where = ""
    if parts is not None and not torch.isfinite(parts).all():
        where = f", layer {int((~torch.isfinite(parts)).any(1).nonzero()[0])}"
    elif not math.isfinite(loss):
        layer = int(world.least(_first_bad_layer(student, ids)))
        where = f", layer {layer}" if layer < student.config.n_layer else ", after the last layer"
    else:  # a backward runs from the last layer down: the last bad gradient was the first to go bad
        names = list(weights)
        bad = [
            i for i, p in enumerate(weights.values()) if p.grad is not None and not _finite(p.grad)
        ]
        last = -int(world.least(-max(bad, default=-1)))
        where = f", in the gradient of {names[last]}" if last >= 0 else ""
    first = step * stage.batch
    raise ValueError(
        f"{stage.name}, step {step}{where}: loss {loss}, gradient norm {norm}, on blocks {first}.."
        f"{first + stage.batch - 1} of the run's order; lower --lr{stage.name[-1]}. The last saved state is kept"
    )


def _finite(gradient: Tensor) -> bool:
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(torch.isfinite(own).all())


def _first_bad_layer(student, ids: Tensor) -> int:
    """Runs the student once more: the first layer whose output is not finite, or their number. Goes through all, as
    other ranks may have to."""
    h = student.embed(ids[:, :-1], torch.bfloat16 if ids.is_cuda else torch.float32)
    turn = student.cos_sin(h.shape[1], h)
    found = student.config.n_layer
    for l, layer in enumerate(student.model.layers):
        h, _ = layer(h, turn)
        if found > l and not torch.isfinite(h).all():
            found = l
    return found
