"""Prompts that are answered: passkey and RULER, from the prompt to the figure.

How it is computed.  ruler.py makes the prompts with the model's own tokenizer, so that they fill
the length; generate.py continues them greedily; ruler_tasks.py scores what was said. A prompt is
read with the family's BOS, which RULER's count of tokens leaves out.

Passkey.  The share of five-digit keys found, by depth and by length. tokens reached: the largest
length with at least 20 % found, as in the PI paper (32 depths, 10 trials per depth: 320 samples per
length).

RULER.  A figure per task and length, and their mean per length; beside each stands which RULER it
is, or that it is not RULER's and why.

Limits.  Figures from fewer samples than the originals' (RULER 500, PI 320 per length) carry a
standard error to match.

Source.  RULER 2404.06654; PI 2306.15595; Landmark attention 2305.16300.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evals import ruler, ruler_tasks
from evals.generate import generate
from evals.next_token import batch_tokens
from evals.report import Scores
from hub.tokenizer import Tokenizer
from model import Llama

REACHED = 0.2  # the share of passkeys that makes a length count


def make(
    task: str, length: int, samples: int, tokenizer: Tokenizer, seed: int, folder: Path | None
) -> list[ruler.Sample]:
    """ruler.generate, with lengths counted by `tokenizer`."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    return ruler.generate(task, length, samples, count, seed=seed, data_dir=folder)


def feasible(
    tokenizer: Tokenizer, names: list[str], lengths: list[int], seed: int, folder: Path | None
) -> tuple[list[tuple[int, str]], list[str]]:
    """([(length, task)] of which prompts can be made, why the others cannot), from one sample each.

    Asked before any model reads anything, so that a damaged file or a wrong name costs no GPU time.
    Raises ValueError where no prompt can be made.
    """
    able, lacking = [], [why for name in names if (why := ruler.missing(name, folder))]
    for length, task in itertools.product(lengths, names):
        if ruler.missing(task, folder):
            continue
        try:
            make(task, length, 1, tokenizer, seed, folder)
            able.append((length, task))
        except ruler.TooShort as e:
            lacking.append(str(e))
    if names and not able:
        raise ValueError(f"none of {', '.join(names)} can be made: {'; '.join(lacking)}")
    return able, lacking


def answers(
    model: Llama, tokenizer: Tokenizer, samples: list[ruler.Sample], dtype: torch.dtype
) -> list[str]:
    """What the model says to each sample, greedily, the samples in batches of like length."""
    prompts = [tokenizer.encode(s.prompt + s.answer_prefix, bos=True) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: -len(prompts[i]))
    said = [""] * len(samples)
    bar = tqdm(total=len(samples), unit=" prompts", leave=False, disable=None)
    while order:
        # More than are read at a time elsewhere: every new token is read by itself
        rows = max(1, max(8192, batch_tokens(model.device)) // len(prompts[order[0]]))
        now, order = order[:rows], order[rows:]
        new, asked = max(samples[i].max_new_tokens for i in now), [prompts[i] for i in now]
        wrote = generate(model, asked, new, dtype, tokenizer.stop_ids, tokenizer.size)
        for i, ids in zip(now, wrote, strict=True):
            said[i] = tokenizer.decode(ids)
        bar.update(len(now))
    bar.close()
    return said


def marks(task: str, said: list[str], samples: list[ruler.Sample]) -> np.ndarray:
    """[samples]: each one's own score, 0 .. 1; their mean is the task's."""
    each = zip(said, samples, strict=True)
    return np.asarray([ruler_tasks.score(task, [a], [s.outputs]) / 100 for a, s in each])


def passkey_scores(
    scores: Scores,
    models: dict[str, Llama],
    tokenizer: Tokenizer,
    able: list[tuple[int, str]],
    samples: int,
    seed: int,
) -> dict:
    """Adds "passkey at L", for every (L, "passkey") of `able`, and the tokens reached.

    Returns the map, {"lengths": [tokens], "depths": [0 .. 1], column: [depth][length] share found}.
    """
    lengths = [length for length, task in able if task == "passkey"]
    depths = np.linspace(0, 1, min(samples, 32)).tolist()
    grid: dict[str, list] = {"lengths": lengths, "depths": depths}
    grid |= {name: [[] for _ in depths] for name in models}
    reached, about = dict.fromkeys(models, 0), {"seed": seed, "depths": len(depths)}
    for length in lengths:
        made = make("passkey", length, samples, tokenizer, seed, None)
        about["version"] = made[0].variant
        for name, model in models.items():
            right = marks("passkey", answers(model, tokenizer, made, scores.dtype), made)
            scores.add(name, f"passkey at {length}", float(right.mean()), values=right, **about)
            for d in range(len(depths)):
                grid[name][d].append(float(right[d :: len(depths)].mean()))
            if right.mean() >= REACHED:
                reached[name] = max(reached[name], length)
    for name in models:
        items = samples * len(lengths)
        scores.add(name, "passkey, tokens reached", reached[name], items=items, **about)
    return grid


def ruler_scores(
    scores: Scores,
    models: dict[str, Llama],
    tokenizer: Tokenizer,
    able: list[tuple[int, str]],
    samples: int,
    seed: int,
    folder: Path | None,
    keep: Callable[[str, str], None] | None = None,
) -> None:
    """Adds "RULER task at L" of every (L, task) of `able` but passkeys, and their mean at every L.

    folder: RULER's data; keep(name, text): takes a file of the answers.
    """
    versions: dict[int, dict[str, str]] = {}
    for length, task in able:
        if task == "passkey":
            continue
        made = make(task, length, samples, tokenizer, seed, folder)
        row, version = f"RULER {task} at {length}", made[0].variant
        versions.setdefault(length, {})[task] = version
        for name, model in models.items():
            said = answers(model, tokenizer, made, scores.dtype)
            value = ruler_tasks.score(task, said, [s.outputs for s in made]) / 100
            right = marks(task, said, made)
            scores.add(name, row, value, values=right, version=version, seed=seed)
            if keep:
                keep(f"predictions/{name}.{task}.{length}.jsonl", _items(said, made, right))
    for length, done in versions.items():
        whole = set(done) == set(ruler_tasks.RULER_TASKS)
        kind = "13" if whole else "1 task" if len(done) == 1 else f"{len(done)} tasks"
        row, items = f"RULER mean of {kind} at {length}", samples * len(done)
        version = "; ".join(f"{task}: {variant}" for task, variant in done.items())
        for name in models:
            each = [scores.columns[name][f"RULER {task} at {length}"] for task in done]
            scores.add(name, row, float(np.mean(each)), items=items, version=version, seed=seed)


def variants(scores: Scores) -> list[str]:
    """One sentence per RULER task: the version that must be known to read its figure."""
    found = {}
    for row, facts in scores.facts.items():
        if row.startswith("RULER") and not row.startswith("RULER mean"):
            found[row.split(" at ")[0]] = facts["version"]
    return [f"{row}: {version}." for row, version in found.items()]


def _items(said: list[str], samples: list[ruler.Sample], right: np.ndarray) -> str:
    """A JSON line per sample: what was expected, what was said, and what it scored."""
    lines = []
    for s, answer, r in zip(samples, said, right.tolist(), strict=True):
        row = {"index": s.index, "outputs": s.outputs, "prediction": answer}
        row |= {"score": r, "tokens": s.length}
        lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines) + "\n"
