"""Retention: the share of the teacher's score that each short task kept, and of what was lost, task
or loss, the share recovered.

Tasks.  With m a model's mean over items of what is right (of a perplexity, m is the mean
log-probability of the answer):

    kept      = m_student / m_teacher            of a perplexity: teacher's / student's
    recovered = (m_student - m_untrained) / (m_teacher - m_untrained)

each with the interval that holds 95 % of 1000 bootstrap resamples. One resample draws items, and
takes all models' results on them: the models read the same items, so most of the luck in the draw
cancels in the ratio. Where the 95 % interval of m_teacher - m_untrained is not above 0, nothing was
measurably lost, and no recovered share is given.

Loss.  With m the held-out loss at 1x in nats, the share of the lost loss recovered is

    recovered = (m_untrained - m_student) / (m_untrained - m_teacher)

and not given where the untrained student lost less than LOST = 0.01 nats. Untrained is the run's
own, of the student's kind of positions. demo/demo.py, which shows two kinds in one table, divides
by what linear loses: (m_linear untrained - m_student) / (m_linear untrained - m_teacher).

How it is computed.  Items that every model gets alike are interchangeable, so a resample is one
multinomial draw over the distinct patterns of results (at most 2^models for accuracies). Averages
over tasks draw each task on its own. Every row's draws depend on the seed and the row's name alone.

Limits.  The interval is of the items, not of training runs; percentiles are rough below 30 items.

Source.  Efron's percentile bootstrap (1979), paired over items.
"""

import zlib

import numpy as np

TEACHER, UNTRAINED = "teacher", "untrained"
RESAMPLES = 1000
AVERAGED = ("accuracy", "accuracy normed")  # the figures that are also averaged over tasks
LOSS = "loss at 1x"
LOST = 0.01  # nats: less, of the untrained student, is within what other text gives


def recovered(columns: dict[str, dict[str, float]]) -> dict[str, float]:
    """{column: share of the lost loss won back}, for all columns but teacher and untrained.

    1: as good as the teacher. Empty where those two are not there, or less than LOST was lost.
    """
    top, bottom = (columns.get(name, {}).get(LOSS) for name in (TEACHER, UNTRAINED))
    if top is None or bottom is None or not bottom - top >= LOST:
        return {}
    rest = [name for name in columns if name not in (TEACHER, UNTRAINED)]
    return {name: (bottom - columns[name][LOSS]) / (bottom - top) for name in rest}


def retention(values: dict[str, dict[str, np.ndarray]], seed: int = 0) -> dict[str, dict]:
    """{row: {"items", "seed", "resamples", "kept", "recovered"}} of {row: {column: results}}.

    results: one number per item, paired over columns. kept and recovered: {column: {"value", "low",
    "high"} or None} for all columns but teacher and untrained. Rows named AVERAGED also give an
    average over tasks, where there are two or more.
    """
    means, items = {}, {}
    for row, columns in values.items():
        means[row] = _resampled(np.stack(list(columns.values()), axis=1), seed, row)
        items[row] = len(next(iter(columns.values())))
    for kind in AVERAGED:
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
    """Means [1 + RESAMPLES, columns] of results [items, columns]: of the items, then resampled."""
    patterns, counts = np.unique(results, axis=0, return_counts=True)
    rng = np.random.default_rng([seed, zlib.crc32(row.encode())])
    drawn = rng.multinomial(len(results), counts / len(results), size=RESAMPLES)
    return np.concatenate([counts[None], drawn]) @ patterns / len(results)


def _shares(means: np.ndarray, names: list[str], row: str) -> dict[str, dict]:
    """means [1 + RESAMPLES, columns] -> kept and recovered of one row."""
    teacher, untrained = (means[:, names.index(name)] for name in (TEACHER, UNTRAINED))
    lost = np.percentile((teacher - untrained)[1:], 2.5) > 0
    out: dict[str, dict] = {"kept": {}, "recovered": {}}
    for name, student in zip(names, means.T, strict=True):
        if name in (TEACHER, UNTRAINED):
            continue
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            kept = np.exp(student - teacher) if row.endswith("perplexity") else student / teacher
            share = (student - untrained) / (teacher - untrained)
        out["kept"][name] = _interval(kept)
        out["recovered"][name] = _interval(share) if lost else None
    return out


def _interval(x: np.ndarray) -> dict[str, float] | None:
    """x[0] and the middle 95 % of x[1:]; None where the denominator is too often 0 for that."""
    drawn = np.where(np.isnan(x[1:]), np.inf, x[1:])  # 0 / 0: as good as no bound
    # real draws: between a number and infinity nothing lies
    low = np.percentile(drawn, 2.5, method="lower")
    high = np.percentile(drawn, 97.5, method="higher")
    if not np.isfinite([x[0], low, high]).all():
        return None
    return {"value": float(x[0]), "low": float(low), "high": float(high)}
