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
from dataclasses import dataclass, field

import numpy as np
import torch

from evals import pictures
from evals.retention import AVERAGED, TEACHER, UNTRAINED, recovered

__all__ = ["Scores", "averages", "recovered", "render", "summary", "table", "write"]
SCHEMA = 2


@dataclass
class Scores:
    """What an evaluation collects: figures by column and row, and what each is a figure of."""

    columns: dict[str, dict[str, float]]
    dtype: torch.dtype = torch.float32
    command: str = ""
    facts: dict[str, dict] = field(default_factory=dict)
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # row, column: [items]
    aloud: bool = False  # say each figure on standard error as it is added

    def add(
        self, column: str, row: str, value: float, *, error=None, values=None, items=None, **facts
    ) -> None:
        """One figure. values: the items' own, whose mean it is; facts: version, seed and so on."""
        self.columns[column][row] = float(value)
        if self.aloud:
            print(f"{column}: {row} {_figure(row, value)}", file=sys.stderr, flush=True)
        if values is not None:
            self.values.setdefault(row, {})[column] = values
            items = len(values)
            if error is None and items > 1:
                error = float(np.std(values, ddof=1) / items**0.5)
        dtype = str(self.dtype).removeprefix("torch.")
        fixed = {"items": items, "dtype": dtype, "command": self.command, "stderr": {}}
        about = self.facts.setdefault(row, facts | fixed)
        about["stderr"][column] = None if error is None else float(error)

    def flat(self) -> list[dict]:
        """The figures as rows of one table, every value a number, a text or None."""
        out = []
        for column, figures in self.columns.items():
            for row, value in figures.items():
                about = self.facts.get(row, {})
                known = {key: about.get(key) for key in ("items", "version", "seed", "dtype")}
                error = about.get("stderr", {}).get(column)
                out.append(
                    {"model": column, "figure": row, "value": value, "error": error, **known}
                )
        return out


def summary(values: dict[str, np.ndarray]) -> dict[str, tuple[float, float | None]]:
    """{row: (figure, its standard error)} of per-item values; one item has no error.

    error(mean) = sample deviation / sqrt(items)
    error(perplexity) = perplexity * error(mean), by its slope
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
    """{"average accuracy": ..., "average accuracy normed": ...}, of two or more tasks each."""
    out = {}
    for kind in AVERAGED:
        found = [value for row, value in column.items() if row.endswith(f", {kind}")]
        if len(found) > 1:
            out[f"average {kind}"] = sum(found) / len(found)
    return out


# ---------------------------------------------------------------- text


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


def retention_table(kept: dict[str, dict]) -> str:
    """What `retention` found, in Markdown."""
    names = list(next(iter(kept.values()))["kept"])
    rows = [["", "items"]]
    for name in names:
        head = f"{name}: " if len(names) > 1 else ""
        rows[0] += [f"{head}kept of the teacher [95 %]", f"{head}recovered [95 %]"]
    for row, found in kept.items():
        rows.append([row, str(found["items"])])
        for name in names:
            rows[-1] += [
                _interval(found["kept"][name], "-"),
                _interval(found["recovered"].get(name), "none lost, or within noise"),
            ]
    said = []
    if any("perplexity" in row for row in kept):
        said.append("A perplexity's share kept is the teacher's perplexity over the student's.")
    if any(cell == "-" for row in rows[1:] for cell in row):
        said.append("-: the teacher's own score is within noise of 0.")
    return "\n\n".join([_aligned(rows), *([" ".join(said)] if said else [])])


def nothing_lost(columns: dict[str, dict[str, float]], row: str = "loss at 1x") -> str | None:
    """Why no share of the lost loss is given, where none is."""
    if not {TEACHER, UNTRAINED} <= set(columns) or row not in columns[TEACHER]:
        return None
    if recovered(columns, row):
        return None
    top, bottom = columns[TEACHER][row], columns[UNTRAINED][row]
    return (
        f"Nothing was measurably lost at 1x (teacher {top:.3f}, untrained {bottom:.3f} nats), so "
        "no share of it can have been recovered."
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


# ---------------------------------------------------------------- files


def write(
    out,
    columns: dict[str, dict[str, float]],
    shares: dict[str, float],
    about: dict,
    more: dict | None = None,
) -> str:
    """Writes report.json, .md and .png by out.write(name, data); returns the table.

    more: further keys of the JSON.
    """
    return render(out, Scores(columns), shares, about, more=more)


def render(
    out,
    scores: Scores,
    shares: dict[str, float],
    about: dict,
    *,
    kept: dict | None = None,
    more: dict | None = None,
    notes: list[str] | tuple = (),
) -> str:
    """The Markdown of a whole evaluation; also written, with JSON and picture, where `out` is one.

    out: None, or what has write(name, data); kept: what `retention` found; more: further keys of
    the JSON; notes: paragraphs below the table.
    """
    columns = scores.columns
    parts = [table(columns, shares)] if any(columns.values()) else []
    parts += [why] if (why := nothing_lost(columns)) else []
    parts += [retention_table(kept)] if kept else []
    text = "\n\n".join([*parts, *notes])
    if out:
        body = _body(scores, shares, about, kept) | (more or {})
        out.write("report.json", _json(body))
        out.write("report.md", text + "\n")
        rows = _rows(columns)
        losses = [row for row in rows if row.startswith("loss")]
        percent = [row for row in rows if is_share(row)]
        out.write("report.png", pictures.bars(columns, losses, percent, shares, kept or {}))
    return text


def _body(scores: Scores, shares: dict[str, float], about: dict, kept: dict | None) -> dict:
    columns = scores.columns
    rows = {row: {name: columns[name].get(row) for name in columns} for row in _rows(columns)}
    body = {"schema": SCHEMA, "columns": list(columns), "rows": rows, "figures": scores.flat()}
    body |= {"recovered": shares, "about": about}
    body |= {"facts": scores.facts} if scores.facts else {}
    return body | ({"retention": kept} if kept else {})


def _json(body: dict) -> str:
    def finite(x):  # JSON has no word for NaN and infinity
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(body), indent=1, allow_nan=False) + "\n"
