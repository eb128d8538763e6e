"""The report: what was lost, what came back, as a table to read, JSON to compute with and a picture to look at.

Columns are models (teacher, untrained, after stage 1, after stage 2), rows are figures. The row that sums it up is the
share of the lost loss recovered, at the native length:

    recovered = (untrained - student) / (untrained - teacher)          1: as good as the teacher; above 1: better

Retention.  Of every task, and of their average, with m the mean over items of what is right (of a perplexity, m is the
mean log-probability of the answer):

    kept      = m_student / m_teacher            of a perplexity: teacher's / student's
    recovered = (m_student - m_untrained) / (m_teacher - m_untrained)

each with the interval that holds 95 % of 1000 bootstrap resamples. One resample draws items, and takes all models'
results on them: the models read the same items, so most of the luck in the draw cancels in the ratio. Where the 95 %
interval of m_teacher - m_untrained holds 0, nothing was measurably lost, and no recovered share is given.

How it is computed.  Items that every model gets alike are interchangeable, so a resample is one multinomial draw over
the distinct patterns of results (at most 2^models for accuracies). The averages draw each task on its own. Every row's
draws depend on the seed and the row's name alone.

Limits.  The interval is of the items, not of training runs; percentiles are rough below some 30 items.

Source.  Efron's percentile bootstrap (1979), paired over items.
"""

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hub import files

TEACHER, UNTRAINED = "teacher", "untrained"
RESAMPLES = 1000
COLOURS = ["#4c72b0", "#c44e52", "#dd8452", "#55a868", "#8172b3"]


@dataclass
class Scores:
    """What an evaluation collects: figures by column and row, what each is a figure of, and the items behind it."""

    columns: dict[str, dict[str, float]]
    dtype: torch.dtype = torch.float32
    command: str = ""
    facts: dict[str, dict] = field(default_factory=dict)
    values: dict[str, dict[str, np.ndarray]] = field(
        default_factory=dict
    )  # row -> column -> per item

    def add(
        self, column: str, row: str, value: float, *, error=None, values=None, items=None, **facts
    ) -> None:
        """One figure. values: the items' own, whose mean it is; facts: version, seed and what else it depends on."""
        self.columns[column][row] = float(value)
        if values is not None:
            self.values.setdefault(row, {})[column] = values
            items = len(values)
            error = (
                float(np.std(values, ddof=1) / items**0.5) if error is None and items > 1 else error
            )
        kept = {
            "items": items,
            "dtype": str(self.dtype).removeprefix("torch."),
            "command": self.command,
            "stderr": {},
        }
        about = self.facts.setdefault(row, facts | kept)
        about["stderr"][column] = None if error is None else float(error)


def recovered(columns: dict[str, dict[str, float]], row: str) -> dict[str, float]:
    """{column: share} for every column but the two that define the scale."""
    top, bottom = columns[TEACHER][row], columns[UNTRAINED][row]
    if bottom == top:
        return {}  # nothing was lost
    rest = [c for c in columns if c not in (TEACHER, UNTRAINED)]
    return {c: (bottom - columns[c][row]) / (bottom - top) for c in rest}


def retention(values: dict[str, dict[str, np.ndarray]], seed: int = 0) -> dict[str, dict]:
    """{row: {"items", "seed", "resamples", "kept", "recovered"}} of {row: {column: per-item results}}.

    kept and recovered: {column: {"value", "low", "high"} or None} for every column but teacher and untrained.
    Rows that end in "accuracy" or "accuracy normed" also give an average over tasks, where there are two or more.
    """
    means, items = {}, {}
    for row, columns in values.items():
        means[row] = _resampled(np.stack(list(columns.values()), axis=1), seed, row)
        items[row] = len(next(iter(columns.values())))
    for kind in ("accuracy", "accuracy normed"):
        rows = [row for row in values if row.endswith(f", {kind}")]
        if len(rows) > 1:
            means[f"average {kind}"] = np.mean([means[row] for row in rows], axis=0)
            items[f"average {kind}"] = sum(items[row] for row in rows)
    names = list(next(iter(values.values())))
    about = {"seed": seed, "resamples": RESAMPLES}
    return {
        row: {"items": items[row], **about, **_shares(m, names, row)} for row, m in means.items()
    }


def _resampled(results: np.ndarray, seed: int, row: str) -> np.ndarray:
    """Means [1 + RESAMPLES, columns] of results [items, columns]: first of the items themselves, then resampled."""
    patterns, counts = np.unique(results, axis=0, return_counts=True)
    rng = np.random.default_rng([seed, zlib.crc32(row.encode())])
    drawn = rng.multinomial(len(results), counts / len(results), size=RESAMPLES)
    return np.concatenate([counts[None], drawn]) @ patterns / len(results)


def _shares(means: np.ndarray, names: list[str], row: str) -> dict[str, dict]:
    """means [1 + RESAMPLES, columns] -> kept and recovered of one row."""
    teacher = means[:, names.index(TEACHER)]
    untrained = means[:, names.index(UNTRAINED)] if UNTRAINED in names else None
    out: dict[str, dict] = {"kept": {}, "recovered": {}}
    for i, name in enumerate(names):
        if name in (TEACHER, UNTRAINED):
            continue
        student = means[:, i]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            kept = np.exp(student - teacher) if row.endswith("perplexity") else student / teacher
            share = None if untrained is None else (student - untrained) / (teacher - untrained)
        out["kept"][name] = _interval(kept)
        if untrained is not None:
            low, high = np.percentile((teacher - untrained)[1:], [2.5, 97.5])
            out["recovered"][name] = None if low <= 0 <= high else _interval(share)
    return out


def _interval(x: np.ndarray) -> dict[str, float] | None:
    """The figure x[0] and the middle 95 % of x[1:]; None where the denominator is too often 0 for an interval."""
    drawn = np.where(np.isnan(x[1:]), np.inf, x[1:])  # 0 / 0: as good as no bound
    low = np.percentile(
        drawn, 2.5, method="lower"
    )  # real draws: between a number and infinity nothing lies
    high = np.percentile(drawn, 97.5, method="higher")
    if not np.isfinite([x[0], low, high]).all():
        return None
    return {"value": float(x[0]), "low": float(low), "high": float(high)}


def summary(values: dict[str, np.ndarray]) -> dict[str, tuple[float, float | None]]:
    """{row: (figure, its standard error)} of per-item values, as tasks.score gives them; one item has no error.

    stderr(mean) = sample deviation / sqrt(items)        stderr(perplexity) = perplexity * stderr(mean), by its slope
    """
    out = {}
    for row, x in values.items():
        mean = float(x.mean())
        error = float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else None
        if row.endswith("perplexity"):
            mean = float(np.exp(min(-mean, 700.0)))
            error = error if error is None else mean * error
        out[row] = (mean, error)
    return out


def averages(column: dict[str, float]) -> dict[str, float]:
    """{"average accuracy": ..., "average accuracy normed": ...} of one column, where two or more tasks have them."""
    out = {}
    for kind in ("accuracy", "accuracy normed"):
        found = [value for row, value in column.items() if row.endswith(f", {kind}")]
        if len(found) > 1:
            out[f"average {kind}"] = sum(found) / len(found)
    return out


def table(columns: dict[str, dict[str, float]], shares: dict[str, float]) -> str:
    """A Markdown table that is also aligned for a terminal."""
    names = list(columns)
    rows = [["", *names]]
    for key in next(iter(columns.values())):
        rows.append([key, *(_figure(key, columns[c].get(key)) for c in names)])
    if shares:
        rows.append(
            [
                "lost loss recovered",
                *(f"{100 * shares[c]:.1f} %" if c in shares else "" for c in names),
            ]
        )
    return _aligned(rows)


def retention_table(kept: dict[str, dict]) -> str:
    """What `retention` found, in Markdown."""
    names = list(next(iter(kept.values()))["kept"])
    many = len(names) > 1
    rows = [["", "items"]]
    for name in names:
        rows[0] += [
            f"{name}: " * many + "kept of the teacher [95 %]",
            f"{name}: " * many + "recovered [95 %]",
        ]
    for row, found in kept.items():
        rows.append([row, str(found["items"])])
        for name in names:
            rows[-1] += [
                _percent(found["kept"][name], "-"),
                _percent(found["recovered"].get(name), "within noise"),
            ]
    return _aligned(rows)


def _percent(found: dict | None, otherwise: str) -> str:
    return (
        f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
        if found
        else otherwise
    )


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        + " |"
        for r in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _share(key: str) -> bool:
    """Is this row's figure a share of 1, to be shown in percent?"""
    return any(word in key for word in ("accuracy", "recall", "passkey at", "RULER"))


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if _share(key):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def write(
    out: Path, columns: dict[str, dict[str, float]], shares: dict[str, float], about: dict
) -> str:
    """Writes report.json, report.md and report.png into `out`; returns the table."""
    return render(out, Scores(columns), shares, about)


def render(
    out: Path | None,
    scores: Scores,
    shares: dict[str, float],
    about: dict,
    *,
    kept=None,
    more=None,
    notes=(),
) -> str:
    """The Markdown of a whole evaluation; also written, with JSON and picture, into `out` if there is one.

    kept: what `retention` found; more: further keys of the JSON; notes: paragraphs below the table.
    """
    columns = scores.columns
    text = table(columns, shares) if any(columns.values()) else ""
    text += "\n\n" + retention_table(kept) if kept else ""
    text = (text + "".join(f"\n\n{note}" for note in notes)).strip()
    if out:
        rows = {
            key: {c: columns[c].get(key) for c in columns} for key in next(iter(columns.values()))
        }
        body = {"columns": list(columns), "rows": rows, "recovered": shares, "about": about}
        body |= {"facts": scores.facts} if scores.facts else {}
        body |= {"retention": kept} if kept else {}
        files.write_atomic(out / "report.json", json.dumps(body | (more or {}), indent=1) + "\n")
        files.write_atomic(out / "report.md", text + "\n")
        _draw(out / "report.png", columns, shares, kept or {})
    return text


def _draw(
    file: Path,
    columns: dict[str, dict[str, float]],
    shares: dict[str, float],
    kept: dict[str, dict],
) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    keys = next(iter(columns.values()))
    groups = [
        ("loss (nats a token, held-out text)", [k for k in keys if k.startswith("loss")], 1.0)
    ]
    groups.append(("right (%)", [k for k in keys if _share(k)], 100.0))
    groups = [g for g in groups if g[1]] or groups[:1]
    drawn = {row: found for row, found in kept.items() if any(found["kept"].values())}
    widths = [max(3, len(g[1])) for g in groups] + [6] * bool(drawn)
    crowded = any(len(g[1]) > 6 for g in groups)
    tall = max(6.0 if crowded else 4.2, 1.2 + 0.3 * len(drawn))
    figure = Figure(figsize=(max(11.0, min(40.0, 0.9 * sum(widths))), tall), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis, (title, names, times) in zip(axes, groups, strict=False):
        for i, (column, figures) in enumerate(columns.items()):
            x = [n + (i - (len(columns) - 1) / 2) * 0.8 / len(columns) for n in range(len(names))]
            label = column + (
                f" ({100 * shares[column]:.0f} % recovered)" if column in shares else ""
            )
            heights = [times * figures.get(k, math.nan) for k in names]
            axis.bar(x, heights, 0.8 / len(columns), label=label, color=COLOURS[i % 5])
        labels = [k.replace(", ", "\n").replace(" at ", "\nat ") for k in names]
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_xticks(range(len(names)), names if crowded else labels, fontsize=8, **turned)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    if drawn:
        _draw_kept(axes[-1], drawn)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        loc="outside upper left",
        ncols=5,
    )
    figure.savefig(file, dpi=130)


def _draw_kept(axis, drawn: dict[str, dict]) -> None:
    """Each row's share of the teacher with its interval."""
    for y, found in enumerate(drawn.values()):
        for i, one in enumerate(found["kept"].values()):
            if one:
                axis.plot(
                    [100 * one["low"], 100 * one["high"]], [y, y], color=COLOURS[(i + 2) % 5], lw=2
                )
                axis.plot(100 * one["value"], y, "o", color=COLOURS[(i + 2) % 5], ms=5)
    axis.axvline(100, color="0.6", lw=1)
    axis.set_yticks(range(len(drawn)), list(drawn), fontsize=8)
    axis.invert_yaxis()
    axis.set_title("kept of the teacher (%), 95 % interval", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
