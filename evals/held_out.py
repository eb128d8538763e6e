"""Held-out text and look-ups: the figures that open every table.

Held-out text.  Long blocks, s times the native length, are read twice: whole (loss at s x) and cut
into native blocks (loss at 1x), so that both figures are of the same words. Where s is not a whole
number, the last native block begins earlier and counts only words that the one before it did not
read. Loss is the mean over tokens, in nats; perplexity is its exponential; next-token accuracy, at
1x, is the share of tokens that the model holds for the likeliest.

Recall.  Look-up documents (engine/lookups.py) of 1, 2, 4 and 8 times the native length, up to s,
set values in their first eighth and ask for them in their last, eight questions each. Right means
that the likeliest token is the value.

How much.  eval.py reads eight long blocks and eight documents of each length. A training run's own
table reads as many of both, up to eight, as cost 4 % of its steps, and where one of each costs
more, one block alone (engine/plan.py): its blocks need not be eval.py's, its documents are the
first of eval.py's.

Limits.  Held-out text runs on across document borders. A standard error is over blocks or
questions: how far other text would move a figure, not how far another training run would. Of eight
questions it is up to 18 points.
"""

import sys

import numpy as np
import torch

from engine.data import Corpus
from engine.lookups import DOCUMENTS, LENGTHS, Lookups
from evals.next_token import block_scores
from evals.report import Scores, mean_and_error
from evals.subject import Subject
from hub.tokenizer import Tokenizer
from model import Llama


class HeldOut:
    """The text and the look-ups, read by every model alike.

    n_blocks: how many long blocks are read: 0, with the reason printed, where the text is too
    short. documents: how many look-up documents of each length, from 0 to DOCUMENTS.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        native: int,
        scale: float,
        n_blocks: int,
        seed: int = 0,
        documents: int = DOCUMENTS,
    ):
        self.native, self.scale, self.seed = native, scale, seed
        self.documents, self.lookups = documents, None
        self.length, self.n_blocks = round(native * scale), 0
        if not n_blocks:
            return
        if self.length >= len(corpus.held_out):
            print(f"no table: the held-out text has {len(corpus.held_out):,} tokens, a block "
                  f"{self.length:,}; add --data")  # fmt: skip
            return
        self.blocks = corpus.held_out_blocks(self.length, n_blocks)  # [n_blocks, length + 1]
        self.n_blocks = len(self.blocks)
        if documents:
            self.lookups = make_lookups(tokenizer, corpus, native, self.length)

    def measure(self, model: Llama, P: int = 1) -> dict[str, float]:
        """One column of the table: {row: figure}. P processes share each block, and all ask."""
        return {row: mean_and_error(row, x)[0] for row, x in self.values(model, P).items()}

    def values(self, model: Llama, P: int = 1) -> dict[str, np.ndarray]:
        """{row: [n_blocks, tokens] or [questions]}; of a perplexity, log-probabilities."""
        near, right = self.native_scores(model, P)
        far, _ = block_scores(model, self.blocks, P=P)
        rows = {"loss at 1x": near, "perplexity at 1x": -near}
        rows |= {f"loss at {self.scale:g}x": far, f"perplexity at {self.scale:g}x": -far}
        rows["next-token accuracy"] = right
        for times in LENGTHS if self.lookups else ():
            if times <= self.scale:
                T = times * self.native
                answers = recall(model, self.lookups, T, self.seed, P, self.documents)
                rows[f"recall at {times}x"] = answers
        return rows

    def native_scores(self, model: Llama, P: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(loss, right) of every token, each [n_blocks, length], read in blocks of native length"""
        full, rest = divmod(self.length, self.native)
        cut = [self.blocks[:, i * self.native :][:, : self.native + 1] for i in range(full)]
        losses, right = block_scores(model, torch.cat(cut), P=P)  # [full * n_blocks, native]
        parts = [np.split(losses, full), np.split(right, full)]
        if rest:  # of the last block, only what no other has read
            last = self.blocks[:, self.length - self.native :]
            at = torch.arange(self.native - rest, self.native).expand(len(last), rest)
            for each, more in zip(parts, block_scores(model, last, at, P), strict=True):
                each.append(more)
        return np.concatenate(parts[0], 1), np.concatenate(parts[1], 1)


def headline(subject: Subject, scores: Scores) -> None:
    """The figures of held-out text and look-ups, of every model."""
    s = subject
    text = HeldOut(s.corpus, s.tokenizer, s.native, s.scale, s.n_blocks, s.seed)
    of_text = {"version": f"held-out text of {s.corpus.name}", "seed": None}
    of_text |= {"blocks": text.n_blocks, "tokens each": text.length}
    of_lookups = {"version": "look-ups, far", "seed": s.seed}
    for name, model in s.models.items():
        for row, values in text.values(model).items():
            about = of_lookups if row.startswith("recall") else of_text
            scores.add(name, row, values=values, **about)


def recall(
    model: Llama, lookups: Lookups, T: int, seed: int, P: int = 1, n: int = DOCUMENTS
) -> np.ndarray:
    """[questions] of n look-up documents of T tokens: 1 where answered right, else 0."""
    rng = np.random.default_rng([seed, T])
    made = [lookups.document(rng, T, "far") for _ in range(n)]
    ids, at = (torch.from_numpy(np.stack(each)) for each in zip(*made, strict=True))
    _, right = block_scores(model, ids, at, P)  # of [n, T + 1] and [n, 8]
    return right.flatten()


def make_lookups(tokenizer: Tokenizer, corpus: Corpus, native: int, longest: int) -> Lookups | None:
    """None, with the reason printed, where words, filler or room in `native` tokens are too few."""
    enough = len(corpus.held_out) > longest + 1
    try:
        lookups = Lookups(tokenizer, corpus.held_out if enough else corpus.train)
        for T in (native, longest):
            lookups.document(np.random.default_rng(0), T, "far")
        return lookups
    except ValueError as e:
        print(f"recall is left out: {e}", file=sys.stderr)
        return None
