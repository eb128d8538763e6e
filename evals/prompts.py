"""Prompts that are answered: passkey and RULER, from the prompt to the figure.

How it is computed.  ruler.py makes the prompts with the model's own tokenizer, so that they fill
the length; generate.py continues them greedily; ruler_tasks.py scores the answers. A prompt is read
with the family's BOS, which RULER's count of tokens leaves out.

Passkey.  The share of five-digit keys found, by depth and by length. tokens reached: the largest
length with at least 20 % found, as in the PI paper (32 depths, 10 trials per depth: 320 samples per
length).

RULER.  A figure per task and length, and their mean per length; each says which RULER it is, or
that it is not RULER's and why.

Limits.  Figures from fewer samples than the originals' (RULER 500, PI 320 per length) carry a
standard error to match.

Source.  RULER 2404.06654; PI 2306.15595; Landmark attention 2305.16300.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evals import pictures, ruler, ruler_tasks
from evals.generate import generate
from evals.next_token import batch_tokens
from evals.report import Scores
from evals.subject import Subject
from hub.tokenizer import Tokenizer
from model import Llama

REACHED = 0.2  # the share of passkeys that makes a length count


def feasible(
    tokenizer: Tokenizer,
    names: list[str],
    lengths: list[int],
    samples: int,
    seed: int,
    folder: Path | None,
) -> tuple[ruler.Prompts, list[str]]:
    """(the prompts that can be made, why the others cannot), from one sample each.

    Asked before any model reads anything, so that a damaged file or a wrong name costs no GPU time.
    Raises ValueError where no prompt can be made.
    """
    prompts = ruler.Prompts(tokenizer, [], samples, seed, folder)
    lacking = [why for name in names if (why := ruler.missing(name, folder))]
    there = [name for name in names if not ruler.missing(name, folder)]
    for length, task in itertools.product(lengths, there):
        try:
            prompts.make(task, length, 1)
            prompts.able.append((length, task))
        except ruler.TooShort as e:
            lacking.append(str(e))
    if names and not prompts.able:
        raise ValueError(f"none of {', '.join(names)} can be made: {'; '.join(lacking)}")
    return prompts, lacking


def answers(model: Llama, tokenizer: Tokenizer, samples: list[ruler.Sample]) -> list[str]:
    """What the model answers to each sample, greedily, the samples in batches of like length."""
    prompts = [tokenizer.encode(s.prompt + s.answer_prefix, bos=True) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: -len(prompts[i]))
    out = [""] * len(samples)
    bar = tqdm(total=len(samples), unit=" prompts", leave=False, disable=None)
    while order:
        # More than are read at a time elsewhere: every new token is read by itself
        rows = max(1, max(8192, batch_tokens(model)) // len(prompts[order[0]]))
        batch, order = order[:rows], order[rows:]
        new, asked = max(samples[i].max_new_tokens for i in batch), [prompts[i] for i in batch]
        wrote = generate(model, asked, new, tokenizer.stop_ids, tokenizer.size)
        for i, ids in zip(batch, wrote, strict=True):
            out[i] = tokenizer.decode(ids)
        bar.update(len(batch))
    bar.close()
    return out


def _ask(
    subject: Subject, samples: list[ruler.Sample]
) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Of each model its name, its answers, and their scores [samples] from 0 to 1."""
    for name, model in subject.models.items():
        found = answers(model, subject.tokenizer, samples)
        marks = ruler_tasks.marks(samples[0].task, found, [s.outputs for s in samples])
        yield name, found, np.asarray(marks)


def passkey(subject: Subject, scores: Scores) -> None:
    """Adds "passkey at L", for every (L, "passkey") that can be made, the tokens reached, and the
    map: {"lengths": [tokens], "depths": [0 .. 1], column: [depth][length] share found}.
    """
    prompts, models = subject.prompts, subject.models
    lengths = [length for length, task in prompts.able if task == "passkey"]
    depths = np.linspace(0, 1, min(prompts.samples, 32)).tolist()
    grid: dict[str, list] = {"lengths": lengths, "depths": depths}
    grid |= {name: [[] for _ in depths] for name in models}
    reached, about = dict.fromkeys(models, 0), {"seed": prompts.seed, "depths": len(depths)}
    for length in lengths:
        made = prompts.make("passkey", length)
        about["version"] = made[0].variant
        for name, _, right in _ask(subject, made):
            scores.add(name, f"passkey at {length}", values=right, **about)
            for d in range(len(depths)):
                grid[name][d].append(float(right[d :: len(depths)].mean()))
            if right.mean() >= REACHED:
                reached[name] = max(reached[name], length)
    for name in models:
        items = prompts.samples * len(lengths)
        scores.add(name, "passkey, tokens reached", reached[name], items=items, **about)
    scores.more["passkey"] = grid
    scores.draw("passkey", pictures.passkey, grid)


def ruler_means(subject: Subject, scores: Scores) -> None:
    """Adds "RULER task at L" of every (L, task) that can be made, passkeys apart, their mean at
    every L, and one sentence per task: the version that must be known to read its figure.
    """
    prompts, columns = subject.prompts, scores.columns
    versions: dict[int, dict[str, str]] = {}
    for length, task in prompts.able:
        if task == "passkey":
            continue
        made = prompts.make(task, length)
        version = versions.setdefault(length, {})[task] = made[0].variant
        for name, found, right in _ask(subject, made):
            value = ruler_tasks.score(task, found, [s.outputs for s in made]) / 100
            about = {"values": right, "version": version, "seed": prompts.seed}
            scores.add(name, f"RULER {task} at {length}", value, **about)
            items = zip(made, found, right.tolist(), strict=True)
            rows = (
                {"index": s.index, "outputs": s.outputs, "prediction": answer}
                | {"score": mark, "tokens": s.length}
                for s, answer, mark in items
            )
            scores.write_items(f"{name}.{task}.{length}", rows)
    for length, done in versions.items():
        whole = set(done) == set(ruler_tasks.RULER_TASKS)
        kind = "13" if whole else "1 task" if len(done) == 1 else f"{len(done)} tasks"
        about = {"version": "; ".join(f"{task}: {variant}" for task, variant in done.items())}
        about |= {"items": prompts.samples * len(done), "seed": prompts.seed}
        for name in subject.models:
            each = [columns[name][f"RULER {task} at {length}"] for task in done]
            scores.add(name, f"RULER mean of {kind} at {length}", np.mean(each), **about)
    variants = {task: version for done in versions.values() for task, version in done.items()}
    scores.notes += [f"RULER {task}: {version}." for task, version in variants.items()]
