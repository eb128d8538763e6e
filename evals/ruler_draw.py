"""How a RULER question is drawn: haystack, needles, answers, and the search for the right size.

How it is computed.  As NVIDIA's scripts do, from a Random(seed) and a RandomState(seed) that are
drawn from in the same order. A recipe draws a prompt and its answers around a number of haystack
units (lines, essay words, listed words, documents). A binary search over fresh draws finds the most
units that fit the length; then each sample is drawn anew and, where it does not fit, again with
`step` fewer units. fwe has no haystack: words are added, and on overflow taken away, a 32nd of the
length at a time.

Limits.  No draw may change: the golden digests of tests/test_ruler.py hold each.

Source.  github.com/NVIDIA/RULER at c3f5e3b, scripts/data/synthetic.
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

PERCENT = [round(float(p)) for p in np.linspace(0, 100, num=40)]  # depths, in an essay's sentences
TRIES = 500  # draws of a sample at the smallest haystack until one fits: RULER draws for ever
HOPELESS = 50  # of them while all are over by an eighth

# A drawn question: prompt, answer prefix, references, depth.
Drawn = tuple[str, str, list[str], float | None]


@dataclass
class Setup:
    """What every recipe draws from: private random states, and notes about the data."""

    length: int
    samples: int
    count: Callable[[str], int]
    seed: int
    folder: Path | None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.np_rng = np.random.RandomState(self.seed)
        self.short = self.length < 4096

    def shuffled(self, items: list) -> list:
        random.Random(self.seed).shuffle(items)  # RULER begins with the seed anew for each list
        return items


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


def _niah(row: Task, setup: Setup) -> Recipe:
    rng, words = setup.rng, ()
    if "words" in (row.key, row.value):
        nouns, adjectives = words_of(setup.folder, setup.notes, "nounlist.txt", "adjectivelist.txt")
        words = Pairs(adjectives, nouns)
    draw = {
        "words": lambda: rng.choice(words),
        "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    essay = essays_of(setup.folder, setup.notes) if row.haystack == "essay" else None
    one = row.queries * row.values == 1
    template, prefix = (_singular(t) if one else t for t in (row.template, row.answer_prefix))
    kind = row.value[:-1] if one else row.value

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=row.value, key=key, value=value)

    def hidden(units: int, needles: list[str]) -> str:
        if essay:
            return _at_depths(essay(units), needles, rng)
        units = max(units, len(needles))
        lines = [NOISE] * units
        if row.haystack == "needle":
            lines = [needle(draw[row.key](), draw[row.value]()) for _ in range(units)]
        spots = sorted(rng.sample(range(units), len(needles)), reverse=True)
        for spot, line in zip(spots, needles, strict=True):
            lines.insert(spot, line)
        return "\n".join(lines)

    def make(units: int, index: int | None) -> Drawn:
        keys, values, needles = [], [], []
        for _ in range(row.keys):
            keys.append(draw[row.key]())
            values.append([draw[row.value]() for _ in range(row.values)])
            needles += [needle(keys[-1], value) for value in values[-1]]
        context = hidden(units, setup.shuffled(needles))
        asked = rng.sample(range(row.keys), row.queries)
        outputs = [value for i in asked for value in values[i]]
        *first, last = (keys[i] for i in asked)
        query = f"{', '.join(first)}, and {last}" if first else last
        prompt = template.format(type_needle_v=kind, context=context, query=query)
        answer_prefix = prefix.format(type_needle_v=kind, query=query)
        return prompt, answer_prefix, outputs, prompt.find(outputs[0]) / len(prompt)

    step = 500 if essay else 5 if setup.short else 25
    return Recipe(make, step, probe=step)


def _singular(template: str) -> str:
    for plural, single in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, single)
    return template


def _at_depths(sentences: list[str], needles: list[str], rng: random.Random) -> str:
    depths = rng.sample(PERCENT, len(needles))
    cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts = []
    for i, (start, end) in enumerate(pairwise(cuts)):
        parts += [" ".join(sentences[start:end]), *needles[i : i + 1]]
    return " ".join(parts)


def _vt(row: Task, setup: Setup, hops: int = 4) -> Recipe:
    rng = setup.rng

    def letters(k: int) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=k))

    def number() -> str:
        return str(setup.np_rng.randint(10000, 99999))

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
        _, prompt, prefix, names, _ = sized(worked, setup.count, length=500, samples=1, budget=0)[0]
    except TooLittle:  # with this tokenizer RULER never returns: five lines are over 500 tokens
        prompt, prefix, names, _ = ask(5, 3)
    example = f"{prompt}{prefix} {' '.join(names)}\n"

    def make(units: int, index: int | None) -> Drawn:
        prompt, prefix, outputs, depth = ask(units, 5)
        if index is not None:
            shown = example
            for name in names:
                shown = shown.replace(name, letters(len(name)))
            prompt = shown.replace("12345", number()) + "\n" + prompt
        return prompt, prefix, outputs, depth

    step = 5 if setup.short else 10
    return Recipe(make, step, probe=step, extra=setup.count(example))


def _cwe(row: Task, setup: Setup, common: int = 10) -> Recipe:
    lists = words_of(setup.folder, setup.notes, "nounlist.txt", "adjectivelist.txt", "verblist.txt")
    words = setup.shuffled(sorted({word for one in lists for word in one}))
    english = cache(lambda: english_of(setup.folder, setup.notes, lists, setup.length))
    # (words, times a common one is listed, times another): of the worked example, of the question
    shown, asked = ((20, 3, 1), (6, 1)) if setup.short else ((40, 10, 3), (30, 3))

    def numbered(words: list[str]) -> str:
        return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))

    def ask(units: int, often: int, seldom: int) -> tuple[str, list[str]]:
        pool = words if units <= len(words) else english()
        if units > len(pool):
            raise ValueError(
                f"length {setup.length}: cwe has {len(pool)} different words and needs {units}"
            )
        drawn = setup.rng.sample(pool, units)
        listed = setup.shuffled(drawn[:common] * often + drawn[common:] * seldom)
        return row.template.format(context=numbered(listed)), drawn[:common]

    def make(units: int, index: int | None) -> Drawn:
        example, shown_answer = ask(*shown)
        question, answer = ask(units, *asked)
        example += f"{row.answer_prefix} {numbered(shown_answer)}\n"
        return example + question, row.answer_prefix, answer, None

    return Recipe(make, step=10, probe=4096, slack=2)


def _qa(row: Task, setup: Setup) -> Recipe:
    path = setup.folder / row.haystack
    questions, documents = (squad if row.haystack == "squad.json" else hotpotqa)(path)
    if setup.samples > len(questions):
        raise ValueError(
            f"samples {setup.samples}: {path} has {len(questions)} questions that can be answered"
        )

    def make(units: int, index: int | None) -> Drawn:
        query, outputs, answering, related = questions[index or 0]
        more = max(0, units - len(answering))
        if len(answering) + more >= len(documents):
            units = len(answering) + more
            chosen = (documents * (units // len(documents) + 1))[:units]
        elif more > len(related):
            taken = {*answering, *related}
            others = [text for text in documents if text not in taken]
            chosen = answering + related + setup.rng.sample(others, more - len(related))
        else:
            chosen = answering + setup.rng.sample(related, more)
        listed = (f"Document {i + 1}:\n{text}" for i, text in enumerate(setup.shuffled(chosen)))
        prompt = row.template.format(context="\n\n".join(listed), query=query)
        return prompt, row.answer_prefix, outputs, None

    return Recipe(make, step=10, probe=10)


def _passkey(row: Task, setup: Setup) -> Recipe:
    depths = np.linspace(0, 1, min(setup.samples, 32)).tolist()
    sentences = re.findall(r"\S[^.]*\.", NOISE)

    def noise(n: int) -> str:
        return " ".join((sentences * (n // len(sentences) + 1))[:n])

    def make(units: int, index: int | None) -> Drawn:
        depth, key = depths[(index or 0) % len(depths)], setup.rng.randint(1, 50000)
        before = round(units * depth)
        prompt = row.template.format(before=noise(before), key=key, after=noise(units - before))
        return prompt, row.answer_prefix, [str(key)], depth

    return Recipe(make, step=1, probe=100)


RECIPES = {"niah": _niah, "vt": _vt, "cwe": _cwe, "qa": _qa, "passkey": _passkey}


def coded_words(row: Task, setup: Setup) -> list[tuple]:
    """[(tokens, prompt, prefix, references, depth)]"""
    lengths = itertools.count(setup.length)
    least, made = next((n, made) for n in lengths if (made := _coded(row, setup, n)))
    if least > setup.length:
        raise TooLittle(least)
    return made


def _coded(row: Task, setup: Setup, length: int) -> list[tuple] | None:
    """None where `length` is too short for the third answer to occur."""
    rng, room = random.Random(setup.seed), length - row.max_new_tokens
    ranks, step = max(0, room // 50), room // 32
    if ranks < 4:
        return None
    share = np.arange(1, ranks + 1) ** -2.0

    def vocabulary() -> list[str]:
        words = set()
        while len(words) < ranks:
            words.add("".join(rng.choices(string.ascii_lowercase, k=6)))
        return ["...", *setup.shuffled(sorted(words))[1:]]  # the most frequent word is noise

    def prompt(words: list[str], total: int) -> str:
        counts = (total * share / (math.pi**2 / 6)).astype(int)  # zeta(2) normalises k^-2
        coded = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        return row.template.format(context=" ".join(setup.shuffled(coded)))

    def tokens(words: list[str], total: int) -> int:
        return setup.count(prompt(words, total) + row.answer_prefix)

    words, total, made = vocabulary(), room // 6, []
    while tokens(words, total) < room:
        total += step
    for _ in range(setup.samples):
        words, n = vocabulary(), total - step
        while (size := tokens(words, n)) > room and n >= 27:
            n -= step
        # 27 / 4^2 / zeta(2) > 1: the fewest words among which rank 4, the third answer, occurs
        if n < 27:
            return None
        size += row.max_new_tokens
        made.append((size, prompt(words, n), row.answer_prefix, words[1:4], None))
    return made
