"""The report: what was lost, what came back, as a table to read, JSON to compute with and a picture to look at.

Columns are models (teacher, untrained, after stage 1, after stage 2), rows are figures. The row that sums it up is the
share of the lost loss recovered, at the native length:

    recovered = (untrained - student) / (untrained - teacher)          1: as good as the teacher; above 1: better
"""

import json
import math
from pathlib import Path

import checkpoint

TEACHER, UNTRAINED = "teacher", "untrained"


def recovered(columns: dict[str, dict[str, float]], row: str) -> dict[str, float]:
    """{column: share} for every column but the two that define the scale."""
    top, bottom = columns[TEACHER][row], columns[UNTRAINED][row]
    rest = [c for c in columns if c not in (TEACHER, UNTRAINED)]
    return {c: (bottom - columns[c][row]) / (bottom - top) if bottom != top else math.nan for c in rest}


def table(columns: dict[str, dict[str, float]], shares: dict[str, float]) -> str:
    """A Markdown table that is also aligned for a terminal."""
    names = list(columns)
    rows = [["", *names]]
    for key in next(iter(columns.values())):
        rows.append([key, *(_figure(key, columns[c].get(key)) for c in names)])
    if shares:
        rows.append(["lost loss recovered", *(f"{100 * shares[c]:.1f} %" if c in shares else "" for c in names)])
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        + " |"
        for r in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if "accuracy" in key or "recall" in key:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def write(out: Path, columns: dict[str, dict[str, float]], shares: dict[str, float], about: dict) -> str:
    """Writes report.json, report.md and report.png into `out`; returns the table."""
    text = table(columns, shares)
    rows = {key: {c: columns[c].get(key) for c in columns} for key in next(iter(columns.values()))}
    body = {"columns": list(columns), "rows": rows, "recovered": shares, "about": about}
    checkpoint.write_atomic(out / "report.json", json.dumps(body, indent=1) + "\n")
    checkpoint.write_atomic(out / "report.md", text + "\n")
    _draw(out / "report.png", columns, shares)
    return text


def _draw(file: Path, columns: dict[str, dict[str, float]], shares: dict[str, float]) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    colours = ["#4c72b0", "#c44e52", "#dd8452", "#55a868", "#8172b3"]
    keys = next(iter(columns.values()))
    groups = [("loss (nats a token, held-out text)", [k for k in keys if k.startswith("loss")], 1.0)]
    groups.append(("right (%)", [k for k in keys if "accuracy" in k or "recall" in k], 100.0))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=[max(1, len(g[1])) for g in groups])
    for axis, (title, names, times) in zip(axes, groups, strict=True):
        for i, (column, figures) in enumerate(columns.items()):
            x = [n + (i - (len(columns) - 1) / 2) * 0.8 / len(columns) for n in range(len(names))]
            label = column + (f" ({100 * shares[column]:.0f} % recovered)" if column in shares else "")
            axis.bar(x, [times * figures[k] for k in names], 0.8 / len(columns), label=label, color=colours[i % 5])
        axis.set_xticks(range(len(names)), [k.replace(", ", "\n").replace(" at ", "\nat ") for k in names], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=len(columns))
    figure.savefig(file, dpi=130)
