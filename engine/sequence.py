"""A block cut along its tokens over the processes that share it.

What.  With more processes than blocks, P of them hold one block: process r its tokens
r T/P .. (r+1) T/P - 1. All but attention and relations is per token and needs nothing of the
others. Attention and relations are per head: an all-to-all gives process r the whole sequence for
its H/P heads, and another one gives every process all heads for its own tokens again:

    [B, H, T/P, D]  heads ->  [B, H/P, T, D]  attention, then  tokens ->  [B, H, T/P, D]

Each is the other's adjoint, so the backward runs the same two on gradients. Fewer key/value heads
than processes are repeated until each process has one that its queries share; their gradients are
added up.

The loss.  A process's loss is P times its share of the block's: the mean over all processes, which
is taken of losses and gradients anyway (engine/parallel.py), is then the block's. A mean over heads
is one over each process's heads, and needs no factor.

Limits.  H must be a multiple of P. A T that is not gives some processes one token more. The noise
of adapters' dropout is not that of one process.

Source.  DeepSpeed-Ulysses, arXiv 2309.14509.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from model import LlamaConfig


def processes_per_block(batch: int, processes: int) -> int:
    """How many processes share a block where a step has `batch` blocks.

    Raises ValueError where they cannot be dealt out evenly.
    """
    if batch % processes == 0:
        return 1
    if processes % batch == 0:
        return processes // batch
    raise ValueError(
        f"the batch is {batch} and there are {processes} processes; one must be a multiple of the "
        "other"
    )


def blocks_per_process(batch: int, processes: int) -> int:
    """How many of a step's blocks one process has, by itself or with those that share them."""
    return batch * processes_per_block(batch, processes) // processes


def refuse_heads(c: LlamaConfig, P: int) -> None:
    """Raises ValueError where the heads cannot be dealt out to P processes."""
    if c.n_head % P:
        raise ValueError(
            f"{P} processes share a block and the model has {c.n_head} heads; it must be a "
            "multiple of that: start fewer processes, or give each a block by a larger --batch"
        )
    if (c.n_head // c.n_kv_head) % repeats(c.n_kv_head, P):
        raise ValueError(
            f"{P} processes share a block and the model has {c.n_kv_head} key/value heads, which "
            f"cannot be repeated to go with {c.n_head} query heads; start fewer processes, or "
            "give each a block by a larger --batch"
        )


def repeats(n_kv_head: int, P: int) -> int:
    """How often each key/value head is repeated, so that P processes have as many items each."""
    return P // math.gcd(n_kv_head, P)


class Whole:
    """The block of one process: all tokens and all heads are here."""

    size, rank = 1, 0

    def span(self, T: int) -> tuple[int, int]:
        """The first of this process's tokens, and the one after its last."""
        return 0, T

    def heads(self, x: Tensor) -> Tensor:
        """x [B, H, T/P, D] of these tokens -> [B, H/P, T, D] of these heads."""
        return x

    def tokens(self, x: Tensor, heads: int) -> Tensor:
        """x [B, H/P, T, D] of these heads -> [B, heads, T/P, D] of these tokens; copies of a head
        are added.
        """
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x [B, T/P, C] of these tokens -> [B, T, C], on all."""
        return x


class Cut(Whole):
    """A block of T tokens over the processes of `group`."""

    def __init__(self, group: dist.ProcessGroup, T: int):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if self.size > T:
            raise ValueError(
                f"a block has {T} tokens and {self.size} processes share it; start fewer processes"
            )
        self.borders = [r * T // self.size for r in range(self.size + 1)]
        self.lengths = [b - a for a, b in zip(self.borders, self.borders[1:], strict=False)]

    def span(self, T: int) -> tuple[int, int]:
        """The first of this process's tokens, and the one after its last."""
        assert self.borders[-1] == T
        return self.borders[self.rank], self.borders[self.rank + 1]

    def heads(self, x: Tensor) -> Tensor:
        """x [B, H, T/P, D] of these tokens -> [B, H/P, T, D] of these heads."""
        x = x.repeat_interleave(repeats(x.shape[1], self.size), 1) if x.shape[1] % self.size else x
        B, H, t, D = x.shape
        sent = torch.cat([part.flatten() for part in x.transpose(1, 2).chunk(self.size, 2)])
        share = B * (H // self.size) * D
        got = sent.new_empty(share * self.borders[-1])
        sizes = [share * n for n in self.lengths]
        dist.all_to_all_single(got, sent, sizes, [share * t] * self.size, group=self.group)
        parts = [g.view(B, -1, H // self.size, D) for g in got.split(sizes)]
        return torch.cat(parts, 1).transpose(1, 2)

    def tokens(self, x: Tensor, heads: int) -> Tensor:
        """x [B, H/P, T, D] of these heads -> [B, heads, T/P, D] of these tokens; copies of a head
        are added.
        """
        B, h, T, D = x.shape
        sent = torch.cat([part.flatten() for part in x.transpose(1, 2).split(self.lengths, 1)])
        share, t = B * h * D, self.lengths[self.rank]
        got = sent.new_empty(share * t * self.size)
        sizes = [share * n for n in self.lengths]
        dist.all_to_all_single(got, sent, [share * t] * self.size, sizes, group=self.group)
        x = torch.cat([g.view(B, t, h, D) for g in got.split(share * t)], 2).transpose(1, 2)
        if x.shape[1] == heads:
            return x
        return x.unflatten(1, (heads, -1)).sum(2)

    def gather(self, x: Tensor) -> Tensor:
        """x [B, T/P, C] of these tokens -> [B, T, C], on all."""
        padded = x.new_zeros(x.shape[0], max(self.lengths), x.shape[2])
        padded[:, : x.shape[1]] = x
        got = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(got, padded, group=self.group)
        return torch.cat([g[:, :n] for g, n in zip(got, self.lengths, strict=True)], 1)


_groups: dict[int, dist.ProcessGroup] = {}


def cut(P: int, T: int) -> Whole:
    """How P neighbouring processes share a block of T tokens. All processes must ask, in one
    order.
    """
    if P == 1:
        return Whole()
    if P not in _groups:
        size = dist.get_world_size()
        made = [dist.new_group(range(first, first + P)) for first in range(0, size, P)]
        _groups[P] = made[dist.get_rank() // P]
    return Cut(_groups[P], T)
