"""How a step uses the memory that is free: what is kept, what is computed again, what waits on the
host.

What.  The first of these that fits:

    keep             all that the backward needs, as many blocks at a time as fill 8192 tokens
    fewer blocks     at a time, down to FEWEST_TOKENS
    recompute        the first layers again in their backward, which keep their inputs alone: as few
                     as fit, with as many blocks at a time as that allows
    tiles            of tokens, a block at a time (engine/tiles.py): inputs of the last layers and
                     their attention outputs on the GPU, of those before in the host's memory, as
                     many outputs as there is room for; the others are computed again. Where all
                     have room on the GPU, q, k and v of as many layers too

Where both of the last two fit, the one whose work takes less time (`_work`): tiles keep attention's
outputs, so that they win where blocks are long. Blocks below FEWEST_TOKENS stay out of tiles. With
more processes than blocks a block is cut over several (engine/sequence.py), and always done in
tiles.

With --shard, layers are gathered once a step where all of them fit beside what was chosen, under
the bound up to which nothing is computed again; else whenever they are at work.

Where nothing fits, one sentence says what would: the longest block, as it is and with the frozen
weights in 4 bits, or how many GPUs.

Limits.  A forecast (engine/cost.py), within 8 % of the allocator's peak where it was measured.
KEEP and ROOM leave what it loses between its blocks.

Source.  The measured steps and peaks: LOG.md.
"""

import dataclasses
import os
from dataclasses import dataclass

import torch

from engine import cost
from engine.cost import Stage, at_a_time
from engine.sequence import blocks_per_process, processes_per_block, refuse_heads
from engine.tiles import Tiles
from model import LlamaConfig
from precision import attention_dtype

# Fewer tokens at a time might not fill a GPU. At 7B, 4096 at a time and nothing computed twice took
# 2.3 s per step, where 8192 and all layers twice took 3.6 (bench step, H100).
FEWEST_TOKENS = 4096
KEEP = 0.85  # of free memory, up to which nothing is computed again
ROOM = 0.92  # up to which a step is begun at all
HOST = 0.85  # of the host's
# The same work takes so many times as long in tiles: 1.14 at 16,384 and 65,536 tokens of a 7B, and
# some 1.07 since kernel_glue.py (H100)
TILED = 1.1


@dataclass(frozen=True)
class Fit:
    """How a stage's step uses the memory that is free."""

    micro: int  # blocks at a time
    recomputed: int  # layers, the first ones, that are computed again in the backward
    need: dict[str, int]  # bytes by part, at the peak
    tiles: Tiles | None = None
    P: int = 1  # processes that share a block
    gathered: bool = False  # --shard gathers each layer once a step, and all are held to its end

    def describe(self, layers: int) -> str:
        """One line: what is kept, and where."""
        blocks = f"{self.micro} block{'s' * (self.micro > 1)} at a time"
        if self.P > 1:
            blocks = f"each block over {self.P} processes, {blocks}"
        once = ", layers gathered once a step" if self.gathered else ""
        if not self.tiles:
            if not self.recomputed:
                return f"{blocks}, nothing twice{once}"
            some = f"{self.recomputed} of {layers} layers"
            which = "every layer" if self.recomputed == layers else some
            return f"{blocks}, {which} again in its backward{once}"
        outputs, on_gpu, qkv = self.tiles.outputs, self.tiles.on_gpu, self.tiles.qkv
        where = "all inputs on the device"
        if on_gpu < layers:
            gib = self.tiles.host / 2**30
            where = f"inputs of {layers - on_gpu} of {layers} layers on the host ({gib:.3g} GiB)"
        kept = f", q, k and v kept in {qkv}" if qkv else ""
        return (
            f"{blocks}, in tiles of {self.tiles.tokens:,} tokens, {where}; attention again in "
            f"{layers - outputs} of {layers} layers{kept}{once}"
        )


@dataclass(frozen=True)
class Machine:
    """What a process of a run has, and what it runs."""

    c: LlamaConfig
    dtype: torch.dtype
    device: torch.device
    rank: int | None  # of adapters
    shard: bool
    processes: int
    free: int  # bytes of the device's memory
    host: int  # bytes of the host's that this process may take; 0 where the device is the host
    fused: bool = False  # norms and gates keep what kernel_glue.py's do
    bits: int | None = None  # of the frozen weights, where they are packed (engine/quant.py)

    def shards(self) -> int:
        """Over how many processes the models are cut."""
        return self.processes if self.shard else 1


def host_share(device: torch.device) -> int:
    """Bytes of the host's memory that one of this machine's processes may take for a device's."""
    if device.type != "cuda":
        return 0
    return int(HOST * cost.free_host_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def settle(m: Machine, stage: Stage, micro: int | None) -> Fit:
    """The first of the module's ways that fits. micro: --micro.

    Raises ValueError, with what would fit, where none does.
    """
    P = processes_per_block(stage.batch, m.processes)
    if P > 1:
        refuse_heads(m.c, P)
    found = _first(m, stage, micro)
    if found is None:
        raise ValueError(refusal(m, stage, micro))
    return _gathered_once(m, stage, micro, found) if m.shards() > 1 else found


def _gathered_once(m: Machine, stage: Stage, micro: int | None, found: Fit) -> Fit:
    """The same way with each layer gathered once a step, where there is room for all of them."""
    need = _need(m, stage, micro, found.micro, found.recomputed, found.tiles, gathered=True)
    fits = _total(need) <= KEEP * m.free
    return dataclasses.replace(found, need=need, gathered=True) if fits else found


def _first(m: Machine, stage: Stage, micro: int | None) -> Fit | None:
    if processes_per_block(stage.batch, m.processes) > 1:
        return _tiled(m, stage, micro)
    most = at_a_time(stage, micro, stage.batch // m.processes)
    counts = [most]
    while not micro and counts[-1] // 2 * stage.T >= FEWEST_TOKENS:
        counts.append(counts[-1] // 2)
    for blocks in counts:
        if _total(need := _need(m, stage, micro, blocks, 0)) <= KEEP * m.free:
            return Fit(blocks, 0, need)
    ways = []
    for blocks in [most] if micro else range(most, 0, -1):
        if not ways or blocks * stage.T >= FEWEST_TOKENS:
            ways += _recomputing(m, stage, micro, blocks)
    tiled = _tiled(m, stage, micro)
    if tiled and (not ways or tiled.micro * stage.T >= FEWEST_TOKENS):
        ways.append(tiled)
    return min(ways, key=lambda fit: _work(m, stage, fit), default=None)


def _work(m: Machine, stage: Stage, fit: Fit) -> float:
    """Floating-point operations of a step with what is done again, those in tiles as TILED."""
    work = sum(cost.flops(m.c, stage, m.rank).values())
    work += cost.flops_again(m.c, stage, fit.recomputed, fit.tiles)
    return work * TILED if fit.tiles else work


def _recomputing(m: Machine, stage: Stage, micro: int | None, blocks: int) -> list[Fit]:
    """The way with the fewest layers computed again, if so many blocks fit with all of them."""
    L = m.c.n_layer
    for recomputed in range(1, L + 1):
        need, most = _need(m, stage, micro, blocks, recomputed), KEEP if recomputed < L else ROOM
        if _total(need) <= most * m.free:
            return [Fit(blocks, recomputed, need)]
    return []


def _in_turn(
    m: Machine, stage: Stage, micro: int | None, blocks: int
) -> list[tuple[Stage, int, int, int]]:
    """What a step does one after the other, as Run.micro_batches has it: the stage, `blocks` at a
    time, and its auxiliary, as --micro says.

    Each: (it, blocks of this process, how many of them at a time, processes that share one).
    """
    found = []
    for part in (stage, stage.auxiliary):
        if part:
            own = blocks_per_process(part.batch, m.processes)
            few = at_a_time(part, blocks if part is stage else micro, own)
            found.append((part, own, few, processes_per_block(part.batch, m.processes)))
    return found


def _need(
    m: Machine,
    stage: Stage,
    micro: int | None,
    blocks: int,
    recomputed: int,
    tiles: Tiles | None = None,
    gathered: bool = False,
) -> dict[str, int]:
    """Bytes by part, of a stage and its auxiliary the larger ones."""
    needs = []
    for part, own, few, P in _in_turn(m, stage, micro, blocks):
        parts = cost.memory(
            m.c,
            part,
            m.dtype,
            few,
            recomputed,
            rank=m.rank,
            shards=m.shards(),
            processes=m.processes,
            attention=attention_dtype(m.dtype, m.device),
            per_rank=own if part is stage else None,  # the auxiliary's begin with all gradients
            tiles=tiles,
            P=P,
            fused=m.fused,
            gpu=m.device.type == "cuda",
            bits=m.bits,
            gathered=gathered,
        )
        needs.append(parts | {"a step's ids": 8 * own * (part.T + 1)})
    return max(needs, key=_total)


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _host(m: Machine, stage: Stage, micro: int | None, blocks: int, tiles: Tiles) -> int:
    """Bytes on the host, of a stage and its auxiliary the larger ones."""
    turns = _in_turn(m, stage, micro, blocks)
    return max(cost.host_bytes(m.c, part, m.dtype, few, tiles, P) for part, _, few, P in turns)


def _tiled(m: Machine, stage: Stage, micro: int | None) -> Fit | None:
    """With as many of attention's outputs kept as there is room for, here or on the host."""
    L, P = m.c.n_layer, processes_per_block(stage.batch, m.processes)
    blocks = at_a_time(stage, micro or 1, blocks_per_process(stage.batch, m.processes))

    def fit(on_gpu: int, outputs: int, qkv: int = 0) -> Fit:
        tiles = Tiles(on_gpu=on_gpu, outputs=outputs, qkv=qkv)
        need = _need(m, stage, micro, blocks, 0, tiles)
        host = _host(m, stage, micro, blocks, tiles)
        return Fit(blocks, 0, need, dataclasses.replace(tiles, host=host), P)

    for outputs in range(L, -1, -1):
        for on_gpu in range(L, -1, -1):
            tried = fit(on_gpu, outputs)
            if tried.tiles.host > m.host:
                break  # fewer on the GPU are more on the host
            if _total(tried.need) <= ROOM * m.free:
                all_there = on_gpu == outputs == L
                more = (fit(on_gpu, outputs, qkv) for qkv in range(L if all_there else 0, 0, -1))
                return next((f for f in more if _total(f.need) <= ROOM * m.free), tried)
    return None


def refusal(m: Machine, stage: Stage, micro: int | None) -> str:
    """One sentence: what the least that a step can do with needs, what is free, what would fit."""
    least = Tiles(on_gpu=0 if m.host else m.c.n_layer)
    need = _total(_need(m, stage, micro, micro or 1, 0, least)) / ROOM
    said = f"{stage.name} needs about {need / 2**30:.1f} GiB and {m.free / 2**30:.1f} GiB are free"
    if host := _host(m, stage, micro, micro or 1, least):
        said += f", and on the host {host / 2**30:.1f} GiB of {m.host / 2**30:.1f}"
    n, longest, more = stage.name[-1], _longest(m, stage, micro), _more_gpus(m, stage, micro)
    ways = [f"lower --length{n} (now {stage.T}{f' to {longest}' if longest else ''})"]
    if blocks_per_process(stage.batch, m.processes) > 1 or (micro or 1) > 1:
        ways.append(f"--batch{n} (now {stage.batch}) or --micro")
    if not m.rank:
        ways.append("train adapters with --lora-rank")
    packed = dataclasses.replace(m, rank=m.rank or 64, bits=4, shard=False)
    if not m.bits and (most := _longest(packed, stage, micro)) > longest:
        flags = "--bits 4" if m.rank else "--lora-rank and --bits 4"
        flags += " in place of --shard" if m.shard else ""  # the two exclude each other
        ways.append(f"hold the frozen weights in 4 bits with {flags} (up to {most} tokens)")
    if more:
        shard = "" if m.bits else " and --shard"
        ways.append(f"start {more} processes with torchrun{shard} on as many GPUs")
    elif not m.bits and not m.shard:
        ways.append("spread the model over several GPUs with torchrun and --shard")
    return f"{said}; {', '.join(ways)}, or use a larger machine"


def _longest(m: Machine, stage: Stage, micro: int | None) -> int:
    """The most tokens, in multiples of 1024, that a block can have here, or the stage's own; 0 if
    not even those.
    """
    if _first(m, stage, micro):
        return stage.T
    fits, fails = 0, -(-stage.T // 1024)
    while fails - fits > 1:
        T = (fits + fails) // 2
        auxiliary = stage.auxiliary and dataclasses.replace(
            stage.auxiliary, T=min(stage.auxiliary.T, 1024 * T)
        )
        tried = dataclasses.replace(stage, T=1024 * T, auxiliary=auxiliary)
        fits, fails = (T, fails) if _first(m, tried, micro) else (fits, T)
    return 1024 * fits


def _more_gpus(m: Machine, stage: Stage, micro: int | None) -> int | None:
    """How many processes, each with a device and a host's share like this one's, would do."""
    P = processes_per_block(stage.batch, m.processes)
    for times in (2, 4, 8, 16, 32, 64):
        shared = P * times
        try:
            refuse_heads(m.c, shared)
        except ValueError:
            continue
        larger = dataclasses.replace(m, processes=stage.batch * shared, shard=not m.bits)
        if _first(larger, stage, micro):
            return larger.processes
    return None
