"""Prompts that are answered: passkey and RULER, from the prompt to the figure.

How it is computed.  ruler.py makes the prompts with the model's own tokenizer, so that they fill
the length; generate.py continues them greedily; ruler_tasks.py scores the answers. A prompt is read
with the family's BOS, which RULER's count of tokens leaves out.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evals import ruler, ruler_tasks
from evals.generate import generate
from evals.next_token import batch_tokens
from evals.report import Scores
from hub.tokenizer import Tokenizer
from model import Llama

REACHED = 0.2  # the share of passkeys that makes a length count


@dataclass(frozen=True)
class Prompts:
    """What every model is asked: `samples` prompts of each (length, task) of `able`."""

    tokenizer: Tokenizer
    able: list[tuple[int, str]]
    samples: int
    seed: int
    folder: Path | None = None  # of RULER's data

    def make(self, task: str, length: int, samples: int | None = None) -> list[ruler.Sample]:
        def count(text: str) -> int:
            return len(self.tokenizer.encode(text))

        return ruler.generate(
            task, length, samples or self.samples, count, seed=self.seed, data_dir=self.folder
        )

    def ask(
        self, models: dict[str, Llama], samples: list[ruler.Sample]
    ) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Of each model its name, its answers, and their scores [samples] from 0 to 1."""
        for name, model in models.items():
            found = answers(model, self.tokenizer, samples)
            marks = ruler_tasks.marks(samples[0].task, found, [s.outputs for s in samples])
            yield name, found, np.asarray(marks)


def feasible(
    tokenizer: Tokenizer,
    names: list[str],
    lengths: list[int],
    samples: int,
    seed: int,
    folder: Path | None,
) -> tuple[Prompts, list[str]]:
    """(the prompts that can be made, why the others cannot), from one sample each.

    Asked before any model reads anything, so that a damaged file or a wrong name costs no GPU time.
    Raises ValueError where no prompt can be made.
    """
    prompts = Prompts(tokenizer, [], samples, seed, folder)
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
        rows = max(1, max(8192, batch_tokens(model.device)) // len(prompts[order[0]]))
        batch, order = order[:rows], order[rows:]
        new, asked = max(samples[i].max_new_tokens for i in batch), [prompts[i] for i in batch]
        wrote = generate(model, asked, new, tokenizer.stop_ids, tokenizer.size)
        for i, ids in zip(batch, wrote, strict=True):
            out[i] = tokenizer.decode(ids)
        bar.update(len(batch))
    bar.close()
    return out


def passkey_scores(scores: Scores, models: dict[str, Llama], prompts: Prompts) -> dict:
    """Adds "passkey at L", for every (L, "passkey") that can be made, and the tokens reached.

    Returns the map, {"lengths": [tokens], "depths": [0 .. 1], column: [depth][length] share found}.
    """
    lengths = [length for length, task in prompts.able if task == "passkey"]
    depths = np.linspace(0, 1, min(prompts.samples, 32)).tolist()
    grid: dict[str, list] = {"lengths": lengths, "depths": depths}
    grid |= {name: [[] for _ in depths] for name in models}
    reached, about = dict.fromkeys(models, 0), {"seed": prompts.seed, "depths": len(depths)}
    for length in lengths:
        made = prompts.make("passkey", length)
        about["version"] = made[0].variant
        for name, _, right in prompts.ask(models, made):
            scores.add(name, f"passkey at {length}", float(right.mean()), values=right, **about)
            for d in range(len(depths)):
                grid[name][d].append(float(right[d :: len(depths)].mean()))
            if right.mean() >= REACHED:
                reached[name] = max(reached[name], length)
    for name in models:
        items = prompts.samples * len(lengths)
        scores.add(name, "passkey, tokens reached", reached[name], items=items, **about)
    return grid


def ruler_scores(
    scores: Scores,
    models: dict[str, Llama],
    prompts: Prompts,
    write: Callable[[str, str], None] | None = None,
) -> None:
    """Adds "RULER task at L" of every (L, task) that can be made, passkeys apart, and their mean at
    every L.

    write(name, text): takes a file of the answers.
    """
    versions: dict[int, dict[str, str]] = {}
    for length, task in prompts.able:
        if task == "passkey":
            continue
        made = prompts.make(task, length)
        version = versions.setdefault(length, {})[task] = made[0].variant
        for name, found, right in prompts.ask(models, made):
            value = ruler_tasks.score(task, found, [s.outputs for s in made]) / 100
            about = {"values": right, "version": version, "seed": prompts.seed}
            scores.add(name, f"RULER {task} at {length}", value, **about)
            if write:
                write(f"predictions/{name}.{task}.{length}.jsonl", _items(found, made, right))
    for length, done in versions.items():
        whole = set(done) == set(ruler_tasks.RULER_TASKS)
        kind = "13" if whole else "1 task" if len(done) == 1 else f"{len(done)} tasks"
        row, items = f"RULER mean of {kind} at {length}", prompts.samples * len(done)
        about = {"version": "; ".join(f"{task}: {variant}" for task, variant in done.items())}
        for name in models:
            each = [scores.columns[name][f"RULER {task} at {length}"] for task in done]
            scores.add(name, row, float(np.mean(each)), items=items, seed=prompts.seed, **about)


def variants(scores: Scores) -> list[str]:
    """One sentence per RULER task: the version that must be known to read its figure."""
    found = {}
    for row, facts in scores.facts.items():
        if row.startswith("RULER") and not row.startswith("RULER mean"):
            found[row.split(" at ")[0]] = facts["version"]
    return [f"{row}: {version}." for row, version in found.items()]


def _items(found: list[str], samples: list[ruler.Sample], right: np.ndarray) -> str:
    """A JSON line per sample: the references, the answer, and what it scored."""
    lines = []
    for s, answer, r in zip(samples, found, right.tolist(), strict=True):
        row = {"index": s.index, "outputs": s.outputs, "prediction": answer}
        row |= {"score": r, "tokens": s.length}
        lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines) + "\n"
