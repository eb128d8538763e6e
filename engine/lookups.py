"""Look-up documents: a value is set early and asked for later, so that recall over a distance can
be measured.

    ...ordinary text...
    # remember harbour engine          the key `harbour` has the value `engine`
    ...ordinary text...
    # recall harbour                   the next token should be ` engine`

How it is built.  In tokens, over any tokenizer: keys and values are single tokens that read as a
space and a short lower-case word, the rest is ordinary text given as ids. `spread` says how far a
value is from its question: "anywhere" (for training) or "far" (for measuring: set in the first
eighth, asked for in the last).

Mixed into training text, look-up documents teach recall over the length of a block; the demo does
that.

Limits.  This is recall of what stands in the text, not reasoning; ruler.py has the harder tasks.
"""

import re

import numpy as np
import torch
from torch import Tensor

from hub.tokenizer import Tokenizer

PAIRS = 8
# Of the documents that recall is measured on: native lengths, and how many of each at most
LENGTHS, DOCUMENTS = (1, 2, 4, 8), 8
_WORD = re.compile(r" [a-z]{4,9}")


def chosen(seed: int, number: int, share: float) -> np.random.Generator | None:
    """What a run's block of this number is drawn with, if it is one of the share of documents."""
    rng = np.random.default_rng([seed, number])
    return rng if rng.random() < share else None


class Lookups:
    """Makes look-up documents for one tokenizer out of one stream of filler ids."""

    def __init__(self, tokenizer: Tokenizer, filler: np.ndarray):
        # Decoded after another token, as sentencepiece drops the space that a text begins with
        before = tokenizer.encode("a")[-1:]
        cut = len(tokenizer.decode(before))
        words = [
            i
            for i in range(tokenizer.size)
            if _WORD.fullmatch(tokenizer.decode([*before, i])[cut:])
        ]
        if len(words) < 64:
            raise ValueError(
                f"the vocabulary has only {len(words)} tokens that are words; recall needs 64"
            )
        picks = np.linspace(0, len(words) - 1, min(512, len(words))).astype(int)
        self.words = np.asarray(words, dtype=np.int64)[picks]
        self.set, self.ask = tokenizer.encode("\n# remember"), tokenizer.encode("\n# recall")
        self.filler = filler

    def check(self, T: int) -> None:
        """Raises ValueError where a training document of T tokens has no room for its lines."""
        line = max(len(self.set), len(self.ask)) + 2
        if (T + 1) // line < 4 * PAIRS:
            raise ValueError(
                f"a look-up document of {T} tokens cannot hold {4 * PAIRS} lines of {line} tokens; "
                "use longer blocks or leave --lookups out"
            )
        if len(self.filler) <= T + 1:
            raise ValueError(f"a look-up document of {T} tokens needs a longer text; add --data")

    def document(
        self, rng: np.random.Generator, T: int, spread: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [T + 1], where [n]): the token at where + 1 is the value that the token at `where`
        asks for.
        """
        set_at, ask_at = self._places(rng, T, spread)
        words = rng.choice(self.words, size=(2, PAIRS), replace=False)
        start = int(rng.integers(0, len(self.filler) - T - 1))
        ids = np.asarray(self.filler[start : start + T + 1], dtype=np.int64).copy()
        where = []
        for first, pair in set_at:
            ids[first : first + len(self.set) + 2] = [*self.set, *words[:, pair]]
        for first, pair in ask_at:
            ids[first : first + len(self.ask) + 2] = [*self.ask, *words[:, pair]]
            where.append(first + len(self.ask))
        return ids, np.asarray(where)

    def mix(self, batch: Tensor, seed: int, first: int, share: float) -> Tensor:
        """The blocks first .. of a run [n, T + 1], about `share` of them replaced: a function of
        seed and number.
        """
        for row in range(len(batch)):
            if rng := chosen(seed, first + row, share):
                batch[row] = torch.from_numpy(self.document(rng, batch.shape[1] - 1, "anywhere")[0])
        return batch

    def _places(self, rng: np.random.Generator, T: int, spread: str) -> tuple[list, list]:
        """Where each line begins: disjoint slots of one line's length, every question after its
        value.
        """
        line = max(len(self.set), len(self.ask)) + 2
        slots = (T + 1) // line
        if slots < 2 * PAIRS:
            raise ValueError(
                f"a look-up document of {T} tokens cannot hold {2 * PAIRS} lines of {line} tokens"
            )
        asks = PAIRS if spread == "far" else 3 * PAIRS
        if spread == "far":  # at T = 512 the lines themselves fill an eighth
            near = max(PAIRS, slots // 8)
            early = rng.choice(near, PAIRS, replace=False)
            late = slots - 1 - rng.choice(near, PAIRS, replace=False)
            pairs = rng.permutation(PAIRS)
        else:
            taken = rng.choice(slots, PAIRS + asks, replace=False)
            early, late = np.sort(taken[:PAIRS]), taken[PAIRS:]
            pairs = rng.integers(0, PAIRS, asks)
        set_at = [(int(s) * line, p) for p, s in enumerate(early)]
        ask_at = [(int(s) * line, int(p)) for s, p in zip(late, pairs, strict=True) if s > early[p]]
        return set_at, sorted(ask_at)
