"""The report: what was lost and what came back, as a table, as JSON to compute with, as a picture.

Columns are models (teacher, untrained, after stage 1, after stage 2), rows are figures. The row
that sums it up is the share of the lost loss recovered, at the native length (retention.py).

report.json, all keys (SCHEMA counts changes that break a reader):

    schema      2
    columns     [model]: the table's columns, in its order
    rows        {figure: {model: value or null}}
    figures     [{model, figure, value, error, items, version, seed, dtype}]: `rows` and `facts`,
                flat: pandas.DataFrame(json.load(open("report.json"))["figures"])
    recovered   {model: share of the lost loss at 1x}; empty where none was measurably lost
    about       {command, seed, dtype, torch, python, device, threads, seconds}
    facts       {figure: {version, items, seed, dtype, command, stderr: {model: error}, ...}}
    retention   {figure: {items, seed, resamples, kept, recovered}}, retention.py says of what
    seconds     {part of a training run: seconds}, "all" among them (engine/timing.py)
    missing     [what was asked for and left out, and why]
    positions   {positions: [tokens], model: [loss in nats]}                       of --positions
    passkey     {lengths, depths, model: [depth][length] share found}              of --passkey
    layers      {before, after: [layer][relation][head] KL in nats, ...}           of --layers

`error` is the standard error of the mean over items. Losses and KL are in nats, shares and
accuracies between 0 and 1, lengths in tokens. A number that is not finite is null.

Limits.  `error` says how far other items would move a figure, not another training run.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evals import pictures
from evals.retention import LOSS, TEACHER, UNTRAINED, recovered

SCHEMA = 2


@dataclass
class Scores:
    """What an evaluation collects: figures by column and row, and what each is a figure of."""

    columns: dict[str, dict[str, float]]
    dtype: torch.dtype = torch.float32
    command: str = ""
    out: Any = None  # what has write(name, data), or None
    predictions: bool = False  # also write every item's scores
    facts: dict[str, dict] = field(default_factory=dict)
    retention: dict[str, dict] = field(default_factory=dict)  # of retention.py
    more: dict = field(default_factory=dict)  # further keys of report.json
    notes: list[str] = field(default_factory=list)  # paragraphs below the table

    def add(
        self, column: str, row: str, value=None, *, values=None, error=None, items=None, **facts
    ) -> None:
        """One figure, which is also printed on standard error.

        values: of each item, or of each token of each block, which give the error, the items and,
        where it is not given, the value; facts: version, seed and so on.
        """
        if values is not None:
            mean, error = mean_and_error(row, values)
            value, items = mean if value is None else value, values.size
        self.columns[column][row] = float(value)
        print(f"{column}: {row} {_figure(row, value)}", file=sys.stderr, flush=True)
        dtype = str(self.dtype).removeprefix("torch.")
        fixed = {"items": items, "dtype": dtype, "command": self.command, "stderr": {}}
        about = self.facts.setdefault(row, facts | fixed)
        about["stderr"][column] = None if error is None else float(error)

    def write_items(self, name: str, rows: Iterable[dict]) -> None:
        if self.out and self.predictions:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            self.out.write(f"predictions/{name}.jsonl", "".join(lines))

    def draw(self, name: str, picture: Callable[..., bytes], *values) -> None:
        if self.out:
            self.out.write(f"{name}.png", picture(*values))

    def flat(self) -> list[dict]:
        """The figures as rows of one table, every value a number, a text or None."""
        out = []
        for column, figures in self.columns.items():
            for row, value in figures.items():
                about = self.facts.get(row, {})
                error = about.get("stderr", {}).get(column)
                each = {"model": column, "figure": row, "value": value, "error": error}
                keys = ("items", "version", "seed", "dtype")
                out.append(each | {key: about.get(key) for key in keys})
        return out


def mean_and_error(row: str, x: np.ndarray) -> tuple[float, float | None]:
    """(figure, its standard error) of x [items] or [items, tokens]; one item has no error.

    error(mean) = sample deviation / sqrt(items)
    error(perplexity) = perplexity * error(mean), by its slope; x are log-probabilities
    """
    mean, n = float(x.mean()), len(x)
    error = float(x.reshape(n, -1).mean(1).std(ddof=1) / n**0.5) if n > 1 else None
    if "perplexity" in row:
        mean = float(np.exp(min(-mean, 700.0)))
        error = error and mean * error
    return mean, error


def table(columns: dict[str, dict[str, float]], shares: dict[str, float]) -> str:
    """A Markdown table that is also aligned for a terminal."""
    names = list(columns)
    rows = [["", *names]]
    for key in _rows(columns):
        rows.append([key, *(_figure(key, columns[c].get(key)) for c in names)])
    if shares:
        won = [f"{100 * shares[c]:.1f} %" if c in shares else "" for c in names]
        rows.append(["lost loss recovered", *won])
    return _aligned(rows)


def retention_table(retention: dict[str, dict]) -> str:
    """What `retention` found of the student, in Markdown."""
    rows = [["", "items", "kept of the teacher [95 %]", "recovered [95 %]"]]
    for row, found in retention.items():
        (share,), (won,) = found["kept"].values(), found["recovered"].values()
        won = _interval(won, "none lost, or within noise")
        rows.append([row, str(found["items"]), _interval(share, "-"), won])
    notes = []
    if any("perplexity" in row for row in retention):
        notes.append("A perplexity's share kept is the teacher's perplexity over the student's.")
    if any(row[2] == "-" for row in rows):
        notes.append("-: the teacher's own score is within noise of 0.")
    return "\n\n".join([_aligned(rows), *([" ".join(notes)] if notes else [])])


def nothing_lost(columns: dict[str, dict[str, float]]) -> str | None:
    """Why no share of the lost loss is given, where none is."""
    teacher, untrained = (columns.get(name, {}).get(LOSS) for name in (TEACHER, UNTRAINED))
    if teacher is None or untrained is None or recovered(columns):
        return None
    return (
        f"Nothing was measurably lost at 1x (teacher {teacher:.3f}, untrained {untrained:.3f} "
        "nats), so no share of it can have been recovered."
    )


def _rows(columns: dict[str, dict[str, float]]) -> list[str]:
    """The rows of all columns, in the order in which they first stand."""
    return list(dict.fromkeys(row for figures in columns.values() for row in figures))


def _interval(found: dict | None, otherwise: str) -> str:
    if not found:
        return otherwise
    # + 0.0: what rounds to zero has no sign
    value, low, high = (round(100 * found[key], 1) + 0.0 for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def is_share(key: str) -> bool:
    """Is this row's figure a share of 1, to be shown in percent?"""
    return any(word in key for word in ("accuracy", "recall", "passkey at", "RULER"))


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    if is_share(key):
        return f"{100 * value:.1f} %"
    if "tokens" in key:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def write(out, columns: dict[str, dict[str, float]], about: dict, more: dict | None = None) -> str:
    """Writes report.json, .md and .png by out.write(name, data); returns the table.

    more: further keys of the JSON.
    """
    return render(Scores(columns, out=out, more=more or {}), about)


def render(scores: Scores, about: dict) -> str:
    """The Markdown of a whole evaluation; also written, with JSON and picture, to scores.out."""
    columns, shares = scores.columns, recovered(scores.columns)
    parts = [table(columns, shares)] if any(columns.values()) else []
    parts += [why] if (why := nothing_lost(columns)) else []
    parts += [retention_table(scores.retention)] if scores.retention else []
    text = "\n\n".join([*parts, *scores.notes])
    if scores.out:
        rows = {row: {name: columns[name].get(row) for name in columns} for row in _rows(columns)}
        body = {"schema": SCHEMA, "columns": list(columns), "rows": rows, "figures": scores.flat()}
        body |= {"recovered": shares, "about": about}
        body |= {"facts": scores.facts} if scores.facts else {}
        body |= {"retention": scores.retention} if scores.retention else {}
        scores.out.write("report.json", _json(body | scores.more))
        scores.out.write("report.md", text + "\n")
        losses = [row for row in rows if row.startswith("loss")]
        percent = [row for row in rows if is_share(row)]
        scores.draw("report", pictures.bars, columns, losses, percent, shares, scores.retention)
    return text


def _json(body: dict) -> str:
    def finite(x):  # JSON has no word for NaN and infinity
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(body), indent=1, allow_nan=False) + "\n"
