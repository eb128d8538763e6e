"""Long text: how far the context really reaches, by the loss on text that nobody wrote for a test.

Sliding window.  The perplexity of long documents when every prediction may look back one window of
w tokens (PI paper, section 3.2). Windows begin every S = 256 tokens; the first one scores all its
tokens, each later one only those not scored yet, so that every token but a document's first is
scored once, with at least w - S tokens before it:

    perplexity(w) = exp(mean over all tokens of all documents of -log p(token | window before it))

A document is cut to the longest w of the run, so that every w reads the same words. bits per byte =
mean loss / ln 2 * tokens / bytes, which models with different vocabularies can be compared by.

Loss by position.  Blocks as long as the stretched context are read whole; the loss of position p is
the mean over blocks. It falls as long as more context helps, and jumps where positions are no
longer understood.

Limits.  Held-out blocks run over document borders; `documents` reads whole documents, each with its
BOS.

Source.  PI arXiv 2306.15595 (PG19's 100 test books; 128 Proof-pile documents of >= 32 768 tokens,
cut there).
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import data
from evals import pictures
from evals.next_token import block_scores
from evals.report import Scores
from evals.subject import Subject
from hub.tokenizer import Tokenizer
from model import Llama

STRIDE = 256
BINS = 64  # of the curve of loss by position


def documents(paths: list[Path], tokenizer: Tokenizer, length: int, most: int) -> list[np.ndarray]:
    """The first length + 1 ids of up to `most` documents that have them, each [length + 1] int64.

    Raises ValueError where none has.
    """
    out, longest = [], 0
    for _, text in data.documents(data.find_files(paths, flag="--documents")):
        ids = text if isinstance(text, np.ndarray) else tokenizer.encode(text, bos=True)
        longest = max(longest, len(ids))
        if len(ids) > length:
            out.append(np.asarray(ids[: length + 1], dtype=np.int64))
        if len(out) == most:
            break
    if not out:
        raise ValueError(
            f"no document has more than {length} tokens, the longest has {longest}; shorten "
            "--lengths"
        )
    return out


def windows(n: int, width: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) over n predictions: begin .. end-1 are read, first .. end-1 scored."""
    begin = first = 0
    while first < n:
        end = min(begin + width, n)
        yield begin, end, first
        begin, first = begin + stride, end


def sliding_loss(model: Llama, ids: np.ndarray, width: int, stride: int = STRIDE) -> np.ndarray:
    """The loss [tokens] in nats of all tokens but the first, of one document's ids [tokens + 1].

    Raises ValueError for a stride that is not within the window.
    """
    if not 0 < stride <= width:
        raise ValueError(
            f"a window of {width} tokens is shorter than the stride {stride}; use longer --lengths"
        )
    # Windows of one shape go through together
    shapes: dict[tuple[int, int], list[int]] = {}
    for begin, end, first in windows(len(ids) - 1, width, stride):
        shapes.setdefault((end - begin, end - first), []).append(begin)
    out = np.zeros(len(ids) - 1)
    for (T, scored), begins in shapes.items():
        blocks = np.stack([ids[begin : begin + T + 1] for begin in begins])
        at = torch.arange(T - scored, T).expand(len(begins), scored)
        losses, _ = block_scores(model, torch.from_numpy(blocks), at)
        for begin, row in zip(begins, losses, strict=True):
            out[begin + T - scored : begin + T] = row
    return out


def sliding_window(subject: Subject, scores: Scores) -> None:
    """Adds "sliding perplexity at w" of the documents, or of held-out text, for every length w."""
    texts, source, decode = subject.documents, subject.documents_name, subject.tokenizer.decode
    if not texts:
        texts = subject.corpus.held_out_blocks(max(subject.lengths), subject.n_blocks).numpy()
        source = f"held-out text of {subject.corpus.name}"
    about = {"version": f"sliding window (PI), {source}", "seed": None, "documents": len(texts)}
    about |= {"tokens each": len(texts[0]) - 1, "stride": STRIDE, "weighting": "by token"}
    size = sum(len(decode(ids[1:].tolist()).encode()) for ids in texts)
    for width in subject.lengths:
        row, bits = f"sliding perplexity at {width}", {}
        for name, model in subject.models.items():
            bar = tqdm(texts, unit=" documents", leave=False, disable=None)
            losses = np.stack([sliding_loss(model, ids, width) for ids in bar])  # all as long
            bits[name] = float(losses.sum() / math.log(2) / size)
            scores.add(name, row, values=-losses, **about, **{"bits per byte": bits})


def loss_by_position(subject: Subject, scores: Scores) -> None:
    """Adds "loss in a-bx" by octaves of the native length, and the curve: {"positions": [tokens],
    column: [mean loss of one of BINS bins]}.
    """
    blocks = subject.corpus.held_out_blocks(max(subject.lengths), subject.n_blocks)
    n, T, native = len(blocks), blocks.shape[1] - 1, subject.native
    cuts = [0, *itertools.takewhile(lambda p: p < T, (native * 2**k for k in range(64))), T]
    edges = np.linspace(0, T, min(BINS, T) + 1).astype(int)
    curve: dict[str, list] = {"positions": ((edges[:-1] + edges[1:]) / 2).tolist()}
    version = f"loss by position, held-out text of {subject.corpus.name}"
    for name, model in subject.models.items():
        losses = block_scores(model, blocks)[0].mean(0)  # [T]
        curve[name] = [float(losses[a:b].mean()) for a, b in itertools.pairwise(edges)]
        for a, b in itertools.pairwise(cuts):
            about = {"items": (b - a) * n, "blocks": n, "version": version, "seed": None}
            row = f"loss in {a / native:g}-{b / native:g}x"
            scores.add(name, row, losses[a:b].mean(), **about)
    scores.more["positions"] = curve
    scores.draw("positions", pictures.positions, curve, native)
