"""Repeated passages: some of a block's tokens say again what stood earlier in it, so that looking
far back pays.

    ... A ......... B ............ A ..... C ... B ...

Why.  Ordinary text, cut into blocks, rarely needs what is more than a few thousand tokens away:
its loss falls while a model still cannot find a sentence in a long context. A passage that comes
again, word for word, can be predicted by whoever finds the first, at whatever distance that is.

How.  Passages of 16 to 512 tokens (no more than an eighth of the block), short ones as likely as
long ones on a logarithmic scale, are copied from anywhere before to anywhere after, until `share`
of the block are copies. A function of the run's seed and the block's number.

Limits.  A copy overwrites ordinary text, and begins and ends within sentences. This is copying:
that it teaches to find a needle is measured in runs/README.md.
"""

import math

import numpy as np
from torch import Tensor

SHORTEST, LONGEST = 16, 512


def repeat(batch: Tensor, seed: int, first: int, share: float) -> Tensor:
    """The blocks first .. of a run [n, T + 1], in place: `share` of each repeats what was before.

    Blocks of less than 8 * 16 tokens are left as they are.
    """
    n, length = batch.shape
    for row in range(n if share else 0):
        for at, start, m in passages(np.random.default_rng([seed, first + row, 1]), length, share):
            batch[row, start : start + m] = batch[row, at : at + m].clone()
    return batch


def passages(rng: np.random.Generator, length: int, share: float) -> list[tuple[int, int, int]]:
    """[(from, to, tokens)] of a block of `length` tokens, to be copied in this order.

    No copy overlaps what it repeats, and no later one overwrites that.
    """
    longest, lengths = min(LONGEST, length // 8), []
    while longest >= SHORTEST and sum(lengths) < share * length:
        lengths.append(round(math.exp(rng.uniform(math.log(SHORTEST), math.log(longest)))))
    to = sorted((int(rng.integers(m, length - m + 1)), m) for m in lengths)
    return [(int(rng.integers(0, start - m + 1)), start, m) for start, m in to]
