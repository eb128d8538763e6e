"""curves.png: a run's losses as a picture, from metrics.jsonl alone.

What.  Stage 1: the KL of each relation and of the next token, on a logarithmic axis; its loss by
layer, so that one sees which layers hold out. Stage 2: the next-token loss, and the relation loss
of the auxiliary native blocks.

How.  The raw line is faint; the strong one is a running mean over a fortieth of the steps, or over
eight. Steps that read look-up documents are drawn apart, dashed: their losses are of another size.
Steps are counted from 1, as on the terminal.

Limits.  At most 1000 points per line are drawn; the mean is over all.
"""

import io
import json
from pathlib import Path

import numpy as np

from relation_kl import RELATIONS

POINTS = 1000


def canvas(wide: float, tall: float):
    """An empty figure of so many inches, without pyplot: no global state and no display."""
    from matplotlib.figure import Figure  # here: a run that draws nothing needs no matplotlib

    return Figure(figsize=(wide, tall), layout="constrained")


def png(figure, dpi: int) -> bytes:
    """The figure as a file's bytes."""
    out = io.BytesIO()
    figure.savefig(out, dpi=dpi, format="png")
    return out.getvalue()


def picture(log: Path) -> bytes:
    """metrics.jsonl as PNG bytes."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first = [r for r in rows if r["stage"] == "stage1"]
    second = [r for r in rows if r["stage"] == "stage2"]
    panels = 2 * bool(first) + bool(second)
    figure = canvas(5.2 * panels, 4)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if first:
        _relations(axes[0], first)
        _layers(figure, axes[1], first)
    if second:
        _next_token(axes[-1], second)
    return png(figure, 120)


def _line(axis, rows: list[dict], value, label: str, colour: str, apart: bool = True) -> None:
    """One figure; apart: of the steps that read text alone, and dashed of those with look-ups."""
    text = [r for r in rows if not (apart and r.get("lookups"))]
    lookups = [r for r in rows if apart and r.get("lookups")]
    for chosen, style in ((text, "-"), (lookups, "--")):
        if not chosen:
            continue
        steps = np.asarray([r["step"] + 1 for r in chosen])
        values = np.asarray([value(r) for r in chosen], dtype=float)
        width = max(1, min(len(values) // 4, 8), len(values) // 40)
        padded = np.pad(values, (width - 1, 0), mode="edge")
        mean = np.convolve(padded, np.ones(width) / width, "valid")
        every = max(1, len(values) // POINTS)
        axis.plot(steps[::every], values[::every], style, color=colour, alpha=0.25, lw=0.8)
        named = {"label": label} if chosen is text or not text else {}
        axis.plot(steps[::every], mean[::every], style, color=colour, lw=1.8, **named)


def _finish(axis, title: str, unit: str) -> None:
    axis.set(xlabel="step", ylabel=unit)
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(alpha=0.25, which="both")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    if any(line.get_linestyle() == "--" for line in axis.lines):
        axis.plot([], [], "--", color="0.4", label="with look-up documents")
    axis.legend(frameon=False, fontsize=9)


def _relations(axis, rows: list[dict]) -> None:
    for i, name in enumerate(RELATIONS):
        _line(axis, rows, lambda r, name=name: r["relations"][name], name, f"C{i}")
    if any(r["next_token_kl"] for r in rows):
        _line(axis, rows, lambda r: r["next_token_kl"], "next token", "C3")
    axis.set_yscale("log")
    _finish(axis, "stage 1: KL from the teacher", "nats (log axis)")


def _layers(figure, axis, rows: list[dict]) -> None:
    from matplotlib.colors import LogNorm

    every = max(1, len(rows) // 500)
    steps = [r["step"] + 1 for r in rows[::every]]
    layers = np.clip(np.asarray([r["layers"] for r in rows[::every]]).T, 1e-12, None)  # [L, steps]
    extent = (steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(layers) - 0.5)
    image = axis.imshow(
        layers,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        norm=LogNorm(),
        extent=extent,
    )
    axis.set(xlabel="step", ylabel="layer")
    axis.set_title("stage 1: relation KL by layer", loc="left", fontsize=10)
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis).ax.set_title("nats, log", fontsize=9)


def _next_token(axis, rows: list[dict]) -> None:
    _line(axis, rows, lambda r: r["loss"], "next token, long blocks", "C0")
    if "relation_loss" in rows[0]:
        label = "as the teacher, native blocks"
        _line(axis, rows, lambda r: r["relation_loss"], label, "C1", apart=False)
    _finish(axis, "stage 2", "nats per token")
