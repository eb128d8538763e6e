"""The pictures of an evaluation, each as the bytes of a PNG.

One function per picture: `bars` (the headline figures and what was kept of each task), `passkey`
(keys found, by depth and length), `positions` (loss by position) and `layers` (relation KL by
layer, relation and head). A column has one colour in all of them. A bar of length zero still has
its number at its end, so "0 %" and "not measured" look different.

Limits.  Made to be read at full width of a page; the figures themselves are in report.json.
"""

import math

import numpy as np

from engine.curves import canvas, png
from relation_kl import RELATIONS

DPI = 130
# teacher, untrained, then students
COLOURS = ["#4c72b0", "#c44e52", "#dd8452", "#55a868", "#8172b3"]


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def bars(
    columns: dict[str, dict[str, float]],
    losses: list[str],
    percent: list[str],
    shares: dict[str, float],
    retention: dict[str, dict],
) -> bytes:
    """Losses, below them figures in percent; to their right, where there is any, tasks' retention.

    columns: {model: {row: figure}}; losses, percent: rows in nats, and between 0 and 1;
    shares: {model: lost loss recovered}; retention: of retention.py.
    """
    panels = [("loss (nats per token)", losses, 1.0), ("right (%)", percent, 100.0)]
    panels = [panel for panel in panels if panel[1]] or panels[:1]
    drawn = {row: found for row, found in retention.items() if any(found["kept"].values())}
    heights = [max(1, len(rows)) for _, rows, _ in panels]  # a row is as thick in all panels
    tall = sum(heights) * (0.16 * len(columns) + 0.14) + 0.6 * len(panels) + 0.6
    figure = canvas(13 if drawn else 7.5, max(tall, 3.5))
    grid = figure.add_gridspec(len(panels), 2 if drawn else 1, height_ratios=heights)
    for i, (title, rows, times) in enumerate(panels):
        axis = figure.add_subplot(grid[i, 0])
        _bars(axis, columns, rows, times)
        _rows(axis, title, rows)
    if drawn:
        axis = figure.add_subplot(grid[:, 1])
        _retention(axis, drawn)
        _rows(axis, "kept of the teacher (%), 95 % interval", list(drawn))
    labels = [f"{n} ({100 * shares[n]:.0f} % recovered)" if n in shares else n for n in columns]
    handles = figure.axes[0].containers
    figure.legend(handles, labels, fontsize=9, frameon=False, loc="outside upper left", ncols=5)
    return png(figure, DPI)


def _rows(axis, title: str, rows: list[str]) -> None:
    """Names the rows, the first one at the top."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _bars(axis, columns: dict[str, dict[str, float]], names: list[str], times: float) -> None:
    """A group of horizontal bars per row, a bar per model, its figure written at its end."""
    thick = 0.8 / len(columns)
    for i, (column, figures) in enumerate(columns.items()):
        y = [n + (i - (len(columns) - 1) / 2) * thick for n in range(len(names))]
        values = [times * figures.get(name, math.nan) for name in names]
        values = [v if math.isfinite(v) else math.nan for v in values]
        drawn = axis.barh(y, values, 0.92 * thick, label=column, color=colour(i))
        labels = ["" if math.isnan(v) else f"{v:.1f}" if times > 1 else f"{v:.3f}" for v in values]
        axis.bar_label(drawn, labels, padding=2, fontsize=min(7, 60 * thick / len(columns) + 4))
    axis.margins(x=0.12)
    if times > 1:
        axis.set_xlim(0, 112)


def _retention(axis, drawn: dict[str, dict]) -> None:
    """The student's share of the teacher in each row, with its interval."""
    for y, found in enumerate(drawn.values()):
        (share,) = found["kept"].values()
        low, value, high = (100 * share[key] for key in ("low", "value", "high"))
        axis.plot([low, high], [y, y], color=COLOURS[2], lw=2)
        axis.plot(value, y, "o", color=COLOURS[2], ms=5)
    axis.axvline(100, color="0.6", lw=1)


def positions(curve: dict[str, list], native: int) -> bytes:
    """Loss by position. curve: {"positions": [tokens], model: [loss in nats]}."""
    figure = canvas(8, 4)
    axis = figure.subplots()
    x = np.asarray(curve["positions"]) / native
    for i, name in enumerate(name for name in curve if name != "positions"):
        axis.plot(x, curve[name], label=name, color=colour(i))
    axis.set_xlim(0, None)
    if axis.get_xlim()[1] > 1:
        axis.axvline(1, color="0.6", lw=1, ls=":")
        axis.text(1, axis.get_ylim()[1], " native length", va="top", fontsize=8, color="0.4")
    axis.set_xlabel(f"position, in native lengths of {native:,} tokens")
    axis.set_ylabel("loss (nats per token)")
    axis.set_title("Does more context help? Loss by position", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return png(figure, DPI)


def passkey(grid: dict[str, list]) -> bytes:
    """A heat map per model: depth down, length to the right, blue where the key was found.

    grid: {"lengths": [tokens], "depths": [0 .. 1], model: [depth][length] share found}.
    """
    names = [name for name in grid if name not in ("lengths", "depths")]
    depths, step = grid["depths"], max(1, len(grid["depths"]) // 8)
    figure = canvas(1.5 + 3.2 * len(names), 4)
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=True):
        image = axis.imshow(grid[name], vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
        labels = [f"{length:,}" for length in grid["lengths"]]
        axis.set_xticks(range(len(labels)), labels, fontsize=8, rotation=45)
        axis.set_title(name, fontsize=10)
    at = range(0, len(depths), step)
    axes[0].set_yticks(at, [f"{100 * depths[i]:.0f} %" for i in at], fontsize=8)
    axes[0].set_ylabel("depth of the key")
    figure.supxlabel("length of the prompt (tokens)", fontsize=9)
    figure.colorbar(image, ax=list(axes), label="share of keys found")
    return png(figure, DPI)


def layers(found: dict[str, np.ndarray]) -> bytes:
    """Heat maps on one logarithmic scale: a row per model, a column per relation.

    found: {"before" or "after": [layer, relation, head] KL in nats}, NaN where there is no head.
    """
    from matplotlib.colors import LogNorm

    real = [x[np.isfinite(x) & (x > 0)] for x in found.values()]
    everything = np.concatenate(real) if any(x.size for x in real) else np.ones(1)
    top = float(everything.max())
    norm = LogNorm(vmin=max(float(everything.min()), top * 1e-6) * 0.999, vmax=top * 1.001)
    deep = len(next(iter(found.values())))
    figure = canvas(10, len(found) * min(8.0, 1.6 + 0.16 * max(deep, 6)) + 0.6)
    axes = figure.subplots(len(found), 3, squeeze=False)
    for i, (name, x) in enumerate(found.items()):
        for r, relation in enumerate(RELATIONS):
            heads, axis = x[:, r, np.isfinite(x[0, r])], axes[i, r]
            clipped = np.clip(heads, norm.vmin, None)
            image = axis.imshow(clipped, norm=norm, cmap="magma", aspect="auto")
            axis.set_title(f"{relation} {name}: mean {np.nanmean(heads):.4f} nats", fontsize=9)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.tick_params(labelsize=8)
        axes[i, 0].set_ylabel("layer", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("head", fontsize=9)
    figure.colorbar(image, ax=axes, label="relation KL (nats per row)")
    return png(figure, DPI)
