"""Positions that skip: a short block stands in the whole context.

    a block of T tokens, in 5 parts       |0 ........ T-1|
    where its tokens stand      |..|      |....|   |...|         |..|     |.|        of L positions

Why.  Between two tokens of a block of T there are fewer than T positions, and a student that reads
no others learns none of the longer distances, which are what was stretched for. Blocks of L tokens
have all of them and cost L / T times the attention. But a distance needs two tokens, not all that
could stand between: cut the block into parts, move each part some way on, and the same T tokens
stand at distances up to L.

How.  In every other step of a stage the blocks are cut in `skips` places, and the parts moved to
later positions, in their order and without overlap: places and moves drawn uniformly, from the
run's seed and the step's number. All blocks of a step share them. The teacher, where it reads with
the student, reads on at 0 .. T-1: what it says of a block does not change when parts of it move, so
the same loss asks the student to look past a gap as if it were not there. In the other steps
nothing skips, so that reading on is kept.

Limits.  To gain from more text before a token, a model must have read that much: blocks of the
native length teach to look far, longer ones also what is worth looking for. The frequencies of
dynamic depend on a block's length: it is refused.

Source.  Skips in training on the next token: PoSE, arXiv 2309.10400. Held to predictions without
them: RoPE-perturbed self-distillation, arXiv 2604.14339, which moves parts of long blocks in any
order. Relations under skips (stage 1) are ours; measured in LOG.md, 2026-11-28.
"""

import numpy as np
import torch
from torch import Tensor


def positions(seed: int, step: int, T: int, L: int, skips: int) -> Tensor | None:
    """Where the blocks of a step stand for the student: [T] int64, rising, from 0 up, below L.

    None where nothing can skip: no skips, or blocks as long as the context.
    """
    if not skips or T >= L:
        return None
    at = np.arange(T)
    if step % 2:
        rng = np.random.default_rng([seed, step, 2])
        n = min(skips, T - 1)
        cuts = np.sort(rng.choice(np.arange(1, T), n, replace=False))
        moves = np.sort(rng.integers(0, L - T + 1, n + 1))
        at += np.repeat(moves, np.diff([0, *cuts, T]))
    return torch.from_numpy(at)
