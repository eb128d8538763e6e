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
from torch import Tensor
from tqdm import tqdm

from engine import data
from evals.next_token import batch_tokens, block_scores
from evals.report import Scores
from hub.tokenizer import Tokenizer
from model import Llama

STRIDE = 256
BINS = 64  # of the curve of loss by position

# ---------------------------------------------------------------- sliding-window perplexity


def documents(paths: list[Path], tokenizer: Tokenizer, length: int, most: int) -> list[np.ndarray]:
    """The first length + 1 ids of up to `most` documents that have them, each [length + 1] int64.

    Raises ValueError where none has.
    """
    try:
        found = data.find_files(paths)
    except ValueError as e:
        raise ValueError(str(e).replace("--data ", "--documents ")) from None
    out, longest = [], 0
    for _, text in data.documents(found):
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


def sliding_loss(
    model: Llama, texts: list[np.ndarray], width: int, stride: int = STRIDE
) -> list[np.ndarray]:
    """The loss in nats of all tokens but each document's first, with a window of `width` tokens.

    texts: ids, each [tokens + 1]. Returns float64 [tokens] for each. Raises ValueError for a stride
    that is not within the window.
    """
    if not 0 < stride <= width:
        raise ValueError(
            f"a window of {width} tokens is shorter than the stride {stride}; use longer --lengths"
        )
    # Windows of one shape go through together
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for d, ids in enumerate(texts):
        for begin, end, first in windows(len(ids) - 1, width, stride):
            shapes.setdefault((end - begin, end - first), []).append((d, begin))
    losses = [np.zeros(len(ids) - 1) for ids in texts]
    bar = tqdm(total=sum(map(len, shapes.values())), unit=" windows", leave=False, disable=None)
    for (T, scored), places in shapes.items():
        rows = max(1, batch_tokens(model.device) // T)
        for batch in (places[i : i + rows] for i in range(0, len(places), rows)):
            blocks = np.stack([texts[d][begin : begin + T + 1] for d, begin in batch])
            at = torch.arange(T - scored, T).expand(len(batch), scored)
            found, _ = block_scores(model, torch.from_numpy(blocks), at)
            for (d, begin), row in zip(batch, found, strict=True):
                losses[d][begin + T - scored : begin + T] = row
            bar.update(len(batch))
    bar.close()
    return losses


def sliding_scores(
    scores: Scores,
    models: dict[str, Llama],
    tokenizer: Tokenizer,
    texts: list[np.ndarray],
    lengths: list[int],
    **facts,
) -> None:
    """Adds "sliding perplexity at w" of texts, each [tokens + 1] ids, for every w of `lengths`."""
    size = sum(len(tokenizer.decode(ids[1:].tolist()).encode()) for ids in texts)
    about = {"documents": len(texts), "tokens each": len(texts[0]) - 1, "stride": STRIDE}
    about |= facts | {"weighting": "by token"}
    for width in lengths:
        row, bits = f"sliding perplexity at {width}", {}
        for name, model in models.items():
            losses = sliding_loss(model, texts, width)
            each, every = np.asarray([loss.mean() for loss in losses]), np.concatenate(losses)
            value = math.exp(min(every.mean(), 700.0))
            error = value * each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else None
            bits[name] = float(every.sum() / math.log(2) / size)
            more = about | {"bits per byte": bits}
            scores.add(name, row, value, error=error, items=len(every), **more)


# ---------------------------------------------------------------- loss by position


def position_scores(
    scores: Scores, models: dict[str, Llama], blocks: Tensor, native: int, **facts
) -> dict:
    """Adds "loss in a-bx" by octaves of the native length.

    Returns the curve, {"positions": [tokens], column: [mean loss of one of BINS bins]}.
    """
    T = blocks.shape[1] - 1
    cuts = [0, *itertools.takewhile(lambda p: p < T, (native * 2**k for k in range(64))), T]
    edges = np.linspace(0, T, min(BINS, T) + 1).astype(int)
    curve: dict[str, list] = {"positions": ((edges[:-1] + edges[1:]) / 2).tolist()}
    for name, model in models.items():
        losses = block_scores(model, blocks)[0].mean(0)  # [T]
        curve[name] = [float(losses[a:b].mean()) for a, b in itertools.pairwise(edges)]
        for a, b in itertools.pairwise(cuts):
            row, items = f"loss in {a / native:g}-{b / native:g}x", (b - a) * len(blocks)
            value = float(losses[a:b].mean())
            scores.add(name, row, value, items=items, blocks=len(blocks), **facts)
    return curve
