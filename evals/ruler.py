"""RULER: 13 synthetic tasks that ask how far a context window really reaches, and the passkey test.

What.  Every sample hides something in a haystack and asks for it; the haystack grows until prompt and answer fill the
length that is tested, counted by the model's own tokenizer. A task is one row of TASKS:

    niah_*   needles ("One of the special magic numbers for KEY is: VALUE.") in noise, in essays, among other needles
    vt       variable tracking: a chain X = 12345, Y = X, ... in noise, after one worked example
    cwe fwe  the most common words of a numbered list; the most frequent coded words of a zeta-distributed text
    qa_1 2   a SQuAD or HotpotQA question whose paragraph stands among other paragraphs
    passkey  "The pass key is 31415" in noise; sample i at depth i mod 32 of 32 even ones (or as many as samples)

How it is computed.  As NVIDIA's scripts do: a Random(42), drawn from in the same order, so that the same word lists,
essays and QA sets give the same prompts byte for byte. A binary search over fresh draws finds the most haystack units
(lines, essay words, listed words, documents) with

    tokens(prompt + answer_prefix) + max_new_tokens <= length                                           (1)

then each sample is drawn anew and, where it breaks (1), again with `step` fewer units. (fwe: words are added, and on
overflow taken away, a 32nd of the length at a time.) `tokenizer_len` counts what the model is fed. RULER counts
without BOS: count one more if your model is given one and has no position beyond `length`.

    score = 100 mean over samples of the share of references that the prediction contains               niah vt cwe fwe
    score = 100 mean over samples of [it contains any reference]                                        qa
    score = 100 mean over samples of [its first number is the key]                                      passkey

letter case ignored, control characters read as newlines, rounded to two decimals. RULER's own figure is the mean of
the 13 scores, each of 500 samples at seed 42.

Data.  vt, fwe and niah_multikey_3 need none. The rest reads `data_dir`, under the names in ruler_data.FILES, which says
where each comes from. Without these files the word tasks use a short list of their own and the essay tasks noise, and
`Sample.variant` says "not RULER's"; qa_1 and qa_2 cannot be made (`missing` says what to get).

Two known variants of RULER; `Sample.variant` names the one used.
    vt   until 4a216f4 (2025-05-13) the answer prefix said "assgined"; figures published before, and lm-eval's, have
         the typo. Task `vt` has today's spelling, task `vt_typo` the old one.
    qa   lm-eval's string_match_part gives the fraction of a sample's references that were found, not "any": lower.

Limits.  Prompts for base models only (no chat templates). Where RULER tries for ever, at a length too short, and where
the third answer of fwe would not occur, a ValueError names the least length that works. An essay haystack whose last
word has two sentence ends ("?!") can differ from RULER's by one space; one longer than all essays together ends a
sentence at the seam.

Source.  RULER, arXiv 2404.06654, github.com/NVIDIA/RULER at c3f5e3b (its templates: Apache-2.0). Passkey: Landmark
attention, arXiv 2305.16300, as in PI, arXiv 2306.15595 (a length is reached at 20 % success); keys and scoring of YaRN.
"""

import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from evals.ruler_data import (
    FILES,
    Pairs,
    english_of,
    essays_of,
    folder_of,
    hotpotqa,
    squad,
    words_of,
)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DEPTHS = [
    round(float(depth)) for depth in np.linspace(0, 100, num=40)
]  # percent of an essay's sentences
TRIES = 500  # draws of a sample at the smallest haystack until one fits: RULER draws for ever
HOPELESS = 50  # of them while all are over by an eighth


@dataclass(frozen=True)
class Task:
    kind: str  # which function below draws it
    max_new_tokens: int
    template: str
    answer_prefix: str
    metric: str = "all"  # "all", "any" or "number": the three scores above
    version: str = "RULER c3f5e3b"
    haystack: str = "noise"  # niah: "noise", "essay" or "needle"; qa: the data set
    key: str = "words"  # what a needle's key and value are: "words", "numbers" or "uuids"
    value: str = "numbers"
    keys: int = 1  # keys hidden, values per key, keys asked for
    values: int = 1
    queries: int = 1


NIAH = Task(
    "niah",
    128,
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
VT = Task(
    "vt",
    30,
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: ",
    version="RULER c3f5e3b, 'assigned' (since 4a216f4)",
)
QA = Task(
    "qa",
    32,
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
    metric="any",
    version="RULER c3f5e3b, any reference (lm-eval: fraction)",
)
TASKS = {
    "niah_single_1": NIAH,
    "niah_single_2": replace(NIAH, haystack="essay"),
    "niah_single_3": replace(NIAH, haystack="essay", value="uuids"),
    "niah_multikey_1": replace(NIAH, haystack="essay", keys=4),
    "niah_multikey_2": replace(NIAH, haystack="needle"),
    "niah_multikey_3": replace(NIAH, haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": replace(NIAH, haystack="essay", values=4),
    "niah_multiquery": replace(NIAH, haystack="essay", keys=4, queries=4),
    "vt": VT,
    "cwe": Task(
        "cwe",
        120,
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": Task(
        "fwe",
        50,
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa_1": replace(QA, haystack="squad.json"),
    "qa_2": replace(QA, haystack="hotpotqa.json"),
}
RULER_TASKS = tuple(TASKS)  # the 13 whose mean is RULER's score
TASKS["vt_typo"] = replace(
    VT,
    answer_prefix=VT.answer_prefix.replace("assigned", "assgined"),
    version="RULER c3f5e3b, 'assgined' (until 4a216f4)",
)
TASKS["passkey"] = Task(
    "passkey",
    10,
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n{before}\nThe pass key is {key}. Remember it. {key} is the pass "
    "key.\n{after}\nWhat is the pass key?",
    " The pass key is",
    metric="number",
    version="passkey (Landmark, PI), key 1..50000",
)


@dataclass(frozen=True)
class Sample:
    """One question. The model is fed prompt + answer_prefix and may write max_new_tokens."""

    task: str
    index: int
    prompt: str
    answer_prefix: str
    outputs: list[str]  # the references
    max_new_tokens: int
    length: int  # tokens of prompt + answer_prefix, plus max_new_tokens
    depth: (
        float | None
    )  # niah: characters before the first reference / characters of the prompt; passkey: as asked
    variant: str  # which RULER this is, or that it is not RULER's and why


def generate(
    task: str,
    length: int,
    samples: int,
    tokenizer_len: Callable[[str], int],
    *,
    seed: int = 42,
    data_dir: str | Path | None = None,
) -> list[Sample]:
    """`samples` samples of `task` that fill `length` tokens, the same ones every time.

    tokenizer_len: text -> number of tokens. data_dir: a folder with any of FILES.
    Raises ValueError for a task, length or data row that cannot be used, FileNotFoundError for a file that is needed.
    """
    row = _row(task)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if tokenizer_len(NOISE) < 1:
        raise ValueError(f"tokenizer_len counts {tokenizer_len(NOISE)} tokens in {NOISE!r}")
    if why := missing(task, data_dir):
        raise FileNotFoundError(why)
    world = _World(length, samples, tokenizer_len, seed, folder_of(data_dir))
    try:
        if row.kind == "fwe":
            made = _fwe(row, world)
        else:
            recipe = RECIPES[row.kind](row, world)
            made = _sized(recipe, world.count, length, samples, row.max_new_tokens)
    except _TooShort as short:
        raise TooShort(
            f"length {length} cannot hold {task}: with this tokenizer the least that works is {short}"
        ) from None
    variant = f"not RULER's: {', '.join(world.notes)}" if world.notes else row.version
    return [
        Sample(task, index, prompt, prefix, outputs, row.max_new_tokens, tokens, depth, variant)
        for index, (tokens, prompt, prefix, outputs, depth) in enumerate(made)
    ]


def missing(task: str, data_dir: str | Path | None = None) -> str | None:
    """Why `task` cannot be made: the file it lacks and where to get it. None if it can."""
    row, folder = _row(task), folder_of(data_dir)
    if row.kind != "qa" or (folder and (folder / row.haystack).is_file()):
        return None
    place = f"data_dir {folder}" if folder else "a data_dir"
    return f"{task} needs {row.haystack} in {place}: get it from {FILES[row.haystack]}"


def score(task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0..100 by the task's rule (module docstring). references: each sample's `outputs`."""
    metric = _row(task).metric
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{task}: {len(predictions)} predictions for {len(references)} samples; one each is needed"
        )
    if not all(references):
        raise ValueError(
            f"{task}: sample {[bool(r) for r in references].index(False)} has no references"
        )
    total = 0.0
    for prediction, wanted in zip(predictions, references, strict=True):
        said = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
        if metric == "number":
            found = [re.findall(r"\d+", said)[:1] == list(wanted)]
        else:
            found = [reference.lower() in said for reference in wanted]
        total += any(found) if metric == "any" else sum(found) / len(found)
    return round(total / len(predictions) * 100, 2)


def _row(task: str) -> Task:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[task]


# A drawn question: prompt, answer prefix, references, depth.
Drawn = tuple[str, str, list[str], float | None]


@dataclass
class _World:
    """What every recipe draws from: private random states, and what has been said about the data."""

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
        random.Random(self.seed).shuffle(
            items
        )  # RULER shuffles every list with the first seed anew
        return items

    @property
    def short(self) -> bool:
        return self.length < 4096


@dataclass(frozen=True)
class _Recipe:
    make: Callable[[int, int | None], Drawn]  # (haystack units, sample index or None while sizing)
    step: int  # fewest units tried, and units taken away on overflow
    probe: int  # units of the draw that estimates tokens per unit
    extra: int = 0  # tokens that a sample has and a draw while sizing has not
    slack: int = 3  # the search's upper end, in estimates


class _TooShort(Exception):
    """Carries the least length that works."""


class TooShort(ValueError):
    """No prompt of the task fits the length that was asked for."""


def _sized(recipe: _Recipe, count: Callable, length: int, samples: int, budget: int) -> list[tuple]:
    """[(tokens, prompt, prefix, references, depth)]: search for the haystack size, then draw, shrunk on overflow."""
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
            raise _TooShort(max(totals))
        made.append((total, *drawn))
    return made


def _largest(recipe: _Recipe, count: Callable, length: int, budget: int) -> int:
    """The most units that fit by binary search; the fewest where none do. Draws in RULER's order."""

    def tokens(units: int) -> int:
        prompt, prefix, *_ = recipe.make(units, None)
        return count(prompt + prefix)

    per_unit = tokens(recipe.probe) / recipe.probe
    estimate = (
        int(length // per_unit) * 2 if recipe.slack == 2 else int(length / per_unit * 3)
    )  # as RULER rounds
    low, high, best = recipe.step, max(estimate, recipe.step * 2), recipe.step
    while low <= high:
        middle = (low + high) // 2
        if tokens(middle) + recipe.extra + budget <= length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


# The recipes, one a kind


def _niah(row: Task, world: _World) -> _Recipe:
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
        query = (
            ", ".join(keys[i] for i in asked[:-1]) + ", and " * (len(asked) > 1) + keys[asked[-1]]
        )
        prompt = template.format(type_needle_v=kind, context=context, query=query)
        return (
            prompt,
            prefix.format(type_needle_v=kind, query=query),
            outputs,
            prompt.find(outputs[0]) / len(prompt),
        )

    step = 500 if essay else 5 if world.short else 25
    return _Recipe(make, step, probe=step)


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


def _vt(row: Task, world: _World, hops: int = 4) -> _Recipe:
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

    worked = _Recipe(lambda units, index: ask(units, 3), step=5, probe=5)
    try:
        _, prompt, prefix, names, _ = _sized(worked, world.count, length=500, samples=1, budget=0)[
            0
        ]
    except (
        _TooShort
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
    return _Recipe(make, step, probe=step, extra=world.count(example))


def _cwe(row: Task, world: _World, common: int = 10) -> _Recipe:
    lists = words_of(world.folder, world.notes, "nounlist.txt", "adjectivelist.txt", "verblist.txt")
    words = world.shuffled(sorted({word for one in lists for word in one}))
    english = cache(lambda: english_of(world.folder, world.notes, lists, world.length))
    # (listed words, times a common word is listed, times another): of the worked example, of the question
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

    return _Recipe(make, step=10, probe=4096, slack=2)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _fwe(row: Task, world: _World) -> list[tuple]:
    """[(tokens, prompt, prefix, references, depth)]"""
    made = _coded(row, world, world.length, world.samples)
    if made is None:
        raise _TooShort(
            next(
                n for n in itertools.count(world.length + 1) if _coded(row, world, n, world.samples)
            )
        )
    return made


def _coded(row: Task, world: _World, length: int, samples: int) -> list[tuple] | None:
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
        if (
            kept < 27
        ):  # 27 / 4^2 / zeta(2) > 1: the fewest words among which rank 4, the third answer, occurs
            return None
        made.append(
            (size + row.max_new_tokens, prompt(words, kept), row.answer_prefix, words[1:4], None)
        )
    return made


def _qa(row: Task, world: _World) -> _Recipe:
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

    return _Recipe(make, step=10, probe=10)


def _passkey(row: Task, world: _World) -> _Recipe:
    depths = np.linspace(0, 1, min(world.samples, 32)).tolist()
    sentences = re.findall(r"\S[^.]*\.", NOISE)

    def noise(n: int) -> str:
        return " ".join((sentences * (n // len(sentences) + 1))[:n])

    def make(units: int, index: int | None) -> Drawn:
        depth, key = depths[(index or 0) % len(depths)], world.rng.randint(1, 50000)
        before = round(units * depth)
        prompt = row.template.format(before=noise(before), key=key, after=noise(units - before))
        return prompt, row.answer_prefix, [str(key)], depth

    return _Recipe(make, step=1, probe=100)


RECIPES = {"niah": _niah, "vt": _vt, "cwe": _cwe, "qa": _qa, "passkey": _passkey}
