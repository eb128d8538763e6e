"""RULER: 13 synthetic tasks that ask how far a context window really reaches, and the passkey test.

What.  Every sample hides something in a haystack and asks for it; the haystack grows until prompt
and answer fill the length that is tested, counted by the model's own tokenizer:

    niah_*   needles ("One of the special magic numbers for KEY is: VALUE.") in noise, in essays,
             among other needles
    vt       variable tracking: a chain X = 12345, Y = X, ... in noise, after one worked example
    cwe fwe  the most common words of a numbered list; of a zeta-distributed text of coded words
    qa_1 2   a SQuAD or HotpotQA question whose paragraph stands among other paragraphs
    passkey  "The pass key is 31415" in noise, at up to 32 even depths in turn

How it is computed.  Templates and scores are ruler_tasks.py, the draws ruler_draw.py, words, essays
and questions ruler_data.py, which says where each file comes from; vt, fwe and niah_multikey_3 need
none. The same inputs give NVIDIA's prompts byte for byte; where word lists or essays are absent,
`Sample.variant` says "not RULER's", and why.

    tokens(prompt + answer_prefix) + max_new_tokens <= length

RULER counts without BOS: count one more if your model is given one and has no position beyond
`length`.

Limits.  Prompts for base models only (no chat templates). Where RULER tries for ever, at a length
too short, and where the third answer of fwe would not occur, a ValueError names the least length
that works. An essay haystack whose last word has two sentence ends ("?!") can differ from RULER's
by one space; one longer than all essays together ends a sentence at the seam.

Source.  RULER, arXiv 2404.06654, github.com/NVIDIA/RULER at c3f5e3b.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evals.ruler_data import FILES, folder_of
from evals.ruler_draw import RECIPES, Setup, TooLittle, coded_words, sized
from evals.ruler_tasks import NOISE, named
from hub.tokenizer import Tokenizer


class TooShort(ValueError):
    """No prompt of the task fits the length that was asked for."""


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
    # niah: characters before the first reference / characters of the prompt; passkey: as asked
    depth: float | None
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

    tokenizer_len: text -> number of tokens. data_dir: a folder with any of FILES. Raises ValueError
    for a task, length or data row that cannot be used, FileNotFoundError for a file that is needed.
    """
    row = named(task)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if tokenizer_len(NOISE) < 1:
        raise ValueError(f"tokenizer_len counts {tokenizer_len(NOISE)} tokens in {NOISE!r}")
    if why := missing(task, data_dir):
        raise FileNotFoundError(why)
    setup = Setup(length, samples, tokenizer_len, seed, folder_of(data_dir))
    try:
        if row.kind == "fwe":
            made = coded_words(row, setup)
        else:
            recipe = RECIPES[row.kind](row, setup)
            made = sized(recipe, setup.count, length, samples, row.max_new_tokens)
    except TooLittle as short:
        least = f"with this tokenizer the least that works is {short}"
        raise TooShort(f"length {length} cannot hold {task}: {least}") from None
    variant = f"not RULER's: {', '.join(setup.notes)}" if setup.notes else row.version
    return [
        Sample(task, index, prompt, prefix, outputs, row.max_new_tokens, tokens, depth, variant)
        for index, (tokens, prompt, prefix, outputs, depth) in enumerate(made)
    ]


@dataclass(frozen=True)
class Prompts:
    """What every model is asked: `samples` prompts of each (length, task) of `able`."""

    tokenizer: Tokenizer
    able: list[tuple[int, str]]
    samples: int
    seed: int
    folder: Path | None = None  # of RULER's data

    def make(self, task: str, length: int, samples: int | None = None) -> list[Sample]:
        def count(text: str) -> int:
            return len(self.tokenizer.encode(text))

        samples = samples or self.samples
        return generate(task, length, samples, count, seed=self.seed, data_dir=self.folder)


def missing(task: str, data_dir: str | Path | None = None) -> str | None:
    """Why `task` cannot be made: the file it lacks and where to get it. None if it can."""
    row, folder = named(task), folder_of(data_dir)
    if row.kind != "qa" or (folder and (folder / row.haystack).is_file()):
        return None
    place = f"data_dir {folder}" if folder else "a data_dir"
    return f"{task} needs {row.haystack} in {place}: get it from {FILES[row.haystack]}"
