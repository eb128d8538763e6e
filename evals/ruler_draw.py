"""How a RULER question is drawn: haystack, needles, answers, and the search for the right size.

What.  A recipe of every kind of task (RECIPES; fwe, which has no haystack, is `coded_words`): given
a number of haystack units (lines, essay words, listed words, documents) it draws a prompt and its
answers.

How it is computed.  As NVIDIA's scripts do, from a Random(seed) and a RandomState(seed) that are
drawn from in the same order. A binary search over fresh draws finds the most units with

    tokens(prompt + answer_prefix) + max_new_tokens <= length                                  (1)

then each sample is drawn anew and, where it breaks (1), again with `step` fewer units. (fwe: words
are added, and on overflow taken away, a 32nd of the length at a time.)

Limits.  A draw that must not change is any: the golden digests of tests/test_ruler.py hold each.

Source.  github.com/NVIDIA/RULER at c3f5e3b, scripts/data/synthetic; the passkey test:
ruler_tasks.py.
"""

import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from evals.ruler_data import Pairs, english_of, essays_of, hotpotqa, squad, words_of
from evals.ruler_tasks import NEEDLE, NOISE, Task

DEPTHS = [
    round(float(depth)) for depth in np.linspace(0, 100, num=40)
]  # percent of an essay's sentences
TRIES = 500  # draws of a sample at the smallest haystack until one fits: RULER draws for ever
HOPELESS = 50  # of them while all are over by an eighth

# A drawn question: prompt, answer prefix, references, depth.
Drawn = tuple[str, str, list[str], float | None]


@dataclass
class World:
    """What every recipe draws from: private random states, and notes about the data."""

    length: int
    samples: int
    count: Callable[[str], int]
    seed: int
    folder: Path | None
    notes: list[str] = field(default_factory=list)
    rng: random.Random = field(init=False)
    np_rng: np.random.RandomState = field(init=False)

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.np_rng = np.random.RandomState(self.seed)

    def shuffled(self, items: list) -> list:
        # RULER shuffles every list with the first seed anew
        random.Random(self.seed).shuffle(items)
        return items

    @property
    def short(self) -> bool:
        return self.length < 4096


@dataclass(frozen=True)
class Recipe:
    make: Callable[[int, int | None], Drawn]  # (haystack units, sample index or None while sizing)
    step: int  # fewest units tried, and units taken away on overflow
    probe: int  # units of the draw that estimates tokens per unit
    extra: int = 0  # tokens that a sample has and a draw while sizing has not
    slack: int = 3  # the search's upper end, in estimates


class TooLittle(Exception):
    """Carries the least length that works."""


def sized(recipe: Recipe, count: Callable, length: int, samples: int, budget: int) -> list[tuple]:
    """[(tokens, prompt, prefix, references, depth)] of every sample.

    The haystack's size is searched for; then each sample is drawn, with fewer units on overflow.
    """
    size = _largest(recipe, count, length, budget)
    made = []
    for index in range(samples):
        units, totals = size, []
        while len(totals) < (TRIES if min(totals, default=0) < length * 9 / 8 else HOPELESS):
            drawn = recipe.make(units, index)
            total = count(drawn[0] + drawn[1]) + budget
            if total <= length:
                break
            if units > recipe.step:
                units -= recipe.step
            else:
                totals.append(total)
        else:
            raise TooLittle(max(totals))
        made.append((total, *drawn))
    return made


def _largest(recipe: Recipe, count: Callable, length: int, budget: int) -> int:
    """The most units that fit, by binary search; the fewest where none do."""

    def tokens(units: int) -> int:
        prompt, prefix, *_ = recipe.make(units, None)
        return count(prompt + prefix)

    per_unit = tokens(recipe.probe) / recipe.probe
    # As RULER rounds
    estimate = int(length // per_unit) * 2 if recipe.slack == 2 else int(length / per_unit * 3)
    low, high, best = recipe.step, max(estimate, recipe.step * 2), recipe.step
    while low <= high:
        middle = (low + high) // 2
        if tokens(middle) + recipe.extra + budget <= length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


# The recipes, one a kind


def _niah(row: Task, world: World) -> Recipe:
    rng, words = world.rng, ()
    if "words" in (row.key, row.value):
        nouns, adjectives = words_of(world.folder, world.notes, "nounlist.txt", "adjectivelist.txt")
        words = Pairs(adjectives, nouns)
    draw = {
        "words": lambda: rng.choice(words),
        "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    essay = essays_of(world.folder, world.notes) if row.haystack == "essay" else None
    one = row.queries * row.values == 1
    template, prefix = (_singular(t) if one else t for t in (row.template, row.answer_prefix))
    kind = row.value[:-1] if one else row.value

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=row.value, key=key, value=value)

    def make(units: int, index: int | None) -> Drawn:
        keys, values, needles = [], [], []
        for _ in range(row.keys):
            keys.append(draw[row.key]())
            values.append([draw[row.value]() for _ in range(row.values)])
            needles += [needle(keys[-1], value) for value in values[-1]]
        world.shuffled(needles)
        if essay:
            context = _at_depths(essay(units), needles, rng)
        else:
            units = max(units, len(needles))
            lines = [NOISE] * units
            if row.haystack == "needle":
                lines = [needle(draw[row.key](), draw[row.value]()) for _ in range(units)]
            spots = sorted(rng.sample(range(units), len(needles)), reverse=True)
            for spot, line in zip(spots, needles, strict=True):
                lines.insert(spot, line)
            context = "\n".join(lines)
        asked = rng.sample(range(row.keys), row.queries)
        outputs = [value for i in asked for value in values[i]]
        *first, last = (keys[i] for i in asked)
        query = f"{', '.join(first)}, and {last}" if first else last
        prompt = template.format(type_needle_v=kind, context=context, query=query)
        return (
            prompt,
            prefix.format(type_needle_v=kind, query=query),
            outputs,
            prompt.find(outputs[0]) / len(prompt),
        )

    step = 500 if essay else 5 if world.short else 25
    return Recipe(make, step, probe=step)


def _singular(template: str) -> str:
    for plural, single in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, single)
    return template


def _at_depths(sentences: list[str], needles: list[str], rng: random.Random) -> str:
    depths = rng.sample(DEPTHS, len(needles))
    cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts = []
    for i, (start, end) in enumerate(pairwise(cuts)):
        parts += [" ".join(sentences[start:end]), *needles[i : i + 1]]
    return " ".join(parts)


def _vt(row: Task, world: World, hops: int = 4) -> Recipe:
    rng = world.rng

    def letters(k: int) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=k))

    def number() -> str:
        return str(world.np_rng.randint(10000, 99999))

    def ask(units: int, k: int) -> Drawn:
        names = [letters(k) for _ in range(hops + 1)]
        while len(set(names)) <= hops:
            names = [letters(k) for _ in range(hops + 1)]
        value = number() if k == 5 else "12345"
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
        lines = [NOISE] * max(units, len(chain))
        for i, spot in enumerate(sorted(rng.sample(range(len(lines)), len(chain)))):
            lines.insert(spot + i, chain[i])
        prompt = row.template.format(context="\n".join(lines).replace(". \n", ".\n"), query=value)
        return prompt, row.answer_prefix.format(query=value, num_v=len(names)), names, None

    worked = Recipe(lambda units, index: ask(units, 3), step=5, probe=5)
    try:
        _, prompt, prefix, names, _ = sized(worked, world.count, length=500, samples=1, budget=0)[0]
    except (
        TooLittle
    ):  # five noise lines are over 500 tokens with this tokenizer: RULER never returns; take them
        prompt, prefix, names, _ = ask(5, 3)
    example = f"{prompt}{prefix} {' '.join(names)}\n"

    def make(units: int, index: int | None) -> Drawn:
        prompt, prefix, outputs, depth = ask(units, 5)
        if index is None:
            return prompt, prefix, outputs, depth
        shown = example
        for name in names:
            shown = shown.replace(name, letters(len(name)))
        return shown.replace("12345", number()) + "\n" + prompt, prefix, outputs, depth

    step = 5 if world.short else 10
    return Recipe(make, step, probe=step, extra=world.count(example))


def _cwe(row: Task, world: World, common: int = 10) -> Recipe:
    lists = words_of(world.folder, world.notes, "nounlist.txt", "adjectivelist.txt", "verblist.txt")
    words = world.shuffled(sorted({word for one in lists for word in one}))
    english = cache(lambda: english_of(world.folder, world.notes, lists, world.length))
    # (words, times a common one is listed, times another): of the worked example, of the question
    shown, asked = ((20, 3, 1), (6, 1)) if world.short else ((40, 10, 3), (30, 3))

    def listed(units: int, often: int, seldom: int) -> tuple[str, list[str]]:
        pool = words if units <= len(words) else english()
        if units > len(pool):
            raise ValueError(
                f"length {world.length}: cwe has {len(pool)} different words and needs {units}"
            )
        drawn = world.rng.sample(pool, units)
        context = world.shuffled(drawn[:common] * often + drawn[common:] * seldom)
        return _numbered(context), drawn[:common]

    def make(units: int, index: int | None) -> Drawn:
        context, answer = listed(*shown)
        example = row.template.format(context=context) + row.answer_prefix + " " + _numbered(answer)
        context, answer = listed(units, *asked)
        return (
            example + "\n" + row.template.format(context=context),
            row.answer_prefix,
            answer,
            None,
        )

    return Recipe(make, step=10, probe=4096, slack=2)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def coded_words(row: Task, world: World) -> list[tuple]:
    """[(tokens, prompt, prefix, references, depth)]"""
    made = _coded(row, world, world.length, world.samples)
    if made is None:
        raise TooLittle(
            next(
                n for n in itertools.count(world.length + 1) if _coded(row, world, n, world.samples)
            )
        )
    return made


def _coded(row: Task, world: World, length: int, samples: int) -> list[tuple] | None:
    """None where `length` is too short for the third answer to occur."""
    rng, room = random.Random(world.seed), length - row.max_new_tokens
    ranks, step = max(0, room // 50), room // 32
    if ranks < 4:
        return None
    share = np.arange(1, ranks + 1) ** -2.0

    def vocabulary() -> list[str]:
        words = set()
        while len(words) < ranks:
            words.add("".join(rng.choices(string.ascii_lowercase, k=6)))
        return ["...", *world.shuffled(sorted(words))[1:]]  # the most frequent word is noise

    def prompt(words: list[str], total: int) -> str:
        counts = (total * share / (math.pi**2 / 6)).astype(int)  # zeta(2) normalises k^-2
        coded = world.shuffled(
            [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        )
        return row.template.format(context=" ".join(coded))

    def tokens(words: list[str], total: int) -> int:
        return world.count(prompt(words, total) + row.answer_prefix)

    words, total, made = vocabulary(), room // 6, []
    while tokens(words, total) < room:
        total += step
    for _ in range(samples):
        words, kept = vocabulary(), total - step
        while (size := tokens(words, kept)) > room and kept >= 27:
            kept -= step
        # 27 / 4^2 / zeta(2) > 1: the fewest words among which rank 4, the third answer, occurs
        if kept < 27:
            return None
        made.append(
            (size + row.max_new_tokens, prompt(words, kept), row.answer_prefix, words[1:4], None)
        )
    return made


def _qa(row: Task, world: World) -> Recipe:
    path = world.folder / row.haystack
    questions, documents = (squad if row.haystack == "squad.json" else hotpotqa)(path)
    if world.samples > len(questions):
        raise ValueError(
            f"samples {world.samples}: {path} has {len(questions)} questions that can be answered"
        )

    def make(units: int, index: int | None) -> Drawn:
        query, outputs, own, related = questions[index or 0]
        units = max(units, len(own))
        if units >= len(documents):
            chosen = (documents * (units // len(documents) + 1))[:units]
        elif units - len(own) > len(related):
            taken = {*own, *related}
            others = [i for i in range(len(documents)) if i not in taken]
            chosen = [
                documents[i]
                for i in own + related + world.rng.sample(others, units - len(own) - len(related))
            ]
        else:
            chosen = [documents[i] for i in own + world.rng.sample(related, units - len(own))]
        world.shuffled(chosen)
        context = "\n\n".join(f"Document {i + 1}:\n{document}" for i, document in enumerate(chosen))
        return row.template.format(context=context, query=query), row.answer_prefix, outputs, None

    return Recipe(make, step=10, probe=10)


def _passkey(row: Task, world: World) -> Recipe:
    depths = np.linspace(0, 1, min(world.samples, 32)).tolist()
    sentences = re.findall(r"\S[^.]*\.", NOISE)

    def noise(n: int) -> str:
        return " ".join((sentences * (n // len(sentences) + 1))[:n])

    def make(units: int, index: int | None) -> Drawn:
        depth, key = depths[(index or 0) % len(depths)], world.rng.randint(1, 50000)
        before = round(units * depth)
        prompt = row.template.format(before=noise(before), key=key, after=noise(units - before))
        return prompt, row.answer_prefix, [str(key)], depth

    return Recipe(make, step=1, probe=100)


RECIPES = {"niah": _niah, "vt": _vt, "cwe": _cwe, "qa": _qa, "passkey": _passkey}
