"""The loss of relation_kl.py for one chip, NVIDIA's Hopper: products and exponentials at the same
time, and a backward over the triangle that gives the same bits every run.

Why.  kernel_triton.py takes turns: the tensor cores multiply, then the ordinary cores take
exponentials. Both need about the same time here (two products and two exponentials a pair of
tokens), so each idles half of it. Plain Triton waits for a product where it is written, and cannot
say otherwise. Gluon, Triton's lower language, says who does what. A group is four warps:

    forward    one warp    asks the copy engine for the next tiles of columns, STAGES tiles ahead
               4 groups    of 64 rows each, every one by itself: wait for a tile, start its two products, take
                           exponentials, free the tile
    backward   one warp    fetches, as above
               2 groups    of 64 rows (3 at D = 64): S, U, then G, and the rows' half of dL/dx
               1 group     the columns' half of dL/dx
               3 warps     have the copy engine add that half to memory

While one group takes exponentials another one's products run; no group waits for another. More
groups hide more and leave each fewer registers.

How they meet.  The copy engine (TMA) brings a tile without any thread's help and then flips a
barrier in shared memory. `ready` flips when a tile's bytes are there, `free` when all groups are
done with it; slot k % STAGES is used again and again, and the parity of k // STAGES says which time
is meant. A group that needs fewer columns than the others (its rows end earlier) still waits for
each tile and frees it: freeing a tile that has not come yet would count for the one before. A
product reads shared memory on its own too: the group waits for it before it frees the tile.

Forward: pivots that stay.  (1) asks for exponentials relative to a pivot, for S and for U. A running
maximum, as in kernel_triton.py, costs a maximum over the tile, an exchange among the four threads
of a row and a rescaling of three sums for every tile: 480 instructions a warp and tile at D = 128,
where some 350 do without; and with fewer numbers to keep, exponentials of S begin under U. Any
number near the row's largest score will do as a pivot. It is taken with a running maximum from the
tiles where large scores are (those across the program's diagonal: the nearest tokens; and tile 0:
the first token, which many models look at from everywhere), and stays. Each thread then adds up its
own columns, and a row's four threads meet once, at the end.

That is exact while no score lies far above the pivot; float32 holds 2^127. Where a row's sum passes
FAR = 2^40 (28 nats above all tokens named), the whole program takes its tiles a second time, with a
running maximum: the groups tell each other in b_far. Such rows cost time, not accuracy.

Backward: two thirds of the work.  Causal G is zero above the diagonal, so (3) over one row of the
square, sum_j (G_ij + G_ji) x_j, recomputes every pair twice: once as G_ij, once as G_ji. Over the
triangle each pair is computed once and used twice:

    square      S, U, (G + G') x           3 products over T^2 pairs       = 6 over the triangle
    triangle    S, U, G x, G' x            4 products over T^2 / 2 pairs   = 4

A program owns 64 WORKERS rows i of a head and visits the tiles of 64 columns j <= i. Rows are owned,
not columns, because then lse and w belong to rows that stay: they are read once, into registers.
G x_j adds to the program's own rows and stays in registers to the end. G' x_i adds to the columns'
rows, to which every program below adds too: it must travel.

How a partial sum travels.  The groups leave G of a tile in shared memory (`full`); the column group
multiplies it, turned, with the program's own x_i and leaves a float32 [64, D] in shared memory
(`staged`); an adding warp has the copy engine add that to a float32 buffer in memory, `sums`
(cp.reduce.async.bulk.tensor: one instruction, no thread loads or adds anything). `gone` and
`emptied` flip when G and the partial sum have been read and their places are free again.

Same bits.  Float addition in another order gives other bits, so the additions to a tile are put in
one order: its programs from the last rows upwards, which is the order in which they begin. A
counter per tile, `turns`, says how many have added. The first stores instead of adding: no
zeros are written before. The last is the tile's own program: it reads the sum back, adds its own
rows from registers and writes dL/dx: no pass follows.

An addition is told to the next program once it is in memory, which takes longer than a tile: hence
three adding warps that take the tiles in turns. The order costs 5 % of the backward at 32 x 4096 x
128 and nothing that can be seen at 32 x 32768 x 128 (LOG.md).

It cannot hang.  A program waits only for ones that began before it, whatever their numbers are: its
work is told by a ticket (_ticket), which one atomic addition gives it when it begins.

`sums` has twice the size of x, but few heads are in flight (_heads): what is added stays in the
second-level cache. A head begins when the one before is half done, so that the short programs of
the one's first rows run among the long ones of the other's last rows.

Limits.  Compute capability 9.0, bfloat16, causal, no `lengths`, D 64 or 128, positive scales, first
derivatives. Layout: [B, H, T, D] contiguous, or a transpose of [B, T, H, D]; any other is copied to
the first. Memory: workspace_bytes.

Sources.  kernel_triton.py; overlap by warpgroups: FlashAttention-3 (arXiv 2407.08608); additions in
a fixed order behind a counter: FlashAttention's deterministic backward. tests/test_hopper.py runs
this source on a CPU with copies, additions and products as late as they may be, and with programs
side by side; tests/test_gpu.py runs it for real.
"""

import functools
import math

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernel_host import GROUP_BYTES, INTERPRETED, LOG2E, Loss, constant, launch, row_numbers

LN2 = gl.constexpr(math.log(2))
# Product of an unseen pair: exp2 gives 0, and differences stay finite
NOTHING = gl.constexpr(-1e30)
FAR = gl.constexpr(2.0**40)  # a row's sum relative to its pivot: then the pivot is no good
BS = gl.constexpr(64)  # rows of a group, and columns of a tile
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6's name
SLOTS = gl.constexpr(2)  # tiles whose G is in shared memory
ADDERS = gl.constexpr(3)
# D -> groups, tiles ahead, registers of a thread (backward: of the rows' and of the columns'
# groups). What other choices took: LOG.md.
FORWARD = {64: (4, 4, (112,)), 128: (4, 3, (112,))}
BACKWARD = {64: (3, 4, (128, 72)), 128: (2, 3, (192, 104))}
# x, y and `sums` of the heads that begin together fill at most this much of the second-level cache
# (50 MB), one head aside. D -> bytes: what was fastest from 4096 to 32768 tokens (LOG.md).
IN_FLIGHT_BYTES = {64: 36 * 2**20, 128: 18 * 2**20}
# See short
SHORT = {64: 512, 128: 256}  # D -> tokens
MULTIPROCESSORS = 132  # an H100's and an H200's, as servers have them


@gluon.jit
def _place(T, H, HEADS, BT: gl.constexpr, D: gl.constexpr, BTHD: gl.constexpr):
    """Which head this program owns, its first row, and where the head begins in the descriptors'
    [rows, columns].

    Within a group of HEADS heads the last rows come first: forward they see the most columns.
    """
    NT = gl.cdiv(T, BT)
    i_group = gl.program_id(0) // (HEADS * NT)
    i_rest = gl.program_id(0) % (HEADS * NT)
    heads = gl.minimum(HEADS, gl.num_programs(0) // NT - i_group * HEADS)
    i_bh = i_group * HEADS + i_rest % heads
    i_0 = (NT - 1 - i_rest // heads) * BT
    return i_bh, i_0, i_bh // H * T if BTHD else i_bh * T, i_bh % H * D if BTHD else 0


@gluon.jit
def _fetch_rows(
    x, y, row, column, i_0, b_xi, b_yi, ready, WORKERS: gl.constexpr, STAGES: gl.constexpr
):
    """The fetching warp begins: the groups' own rows."""
    mbarrier.expect(ready.index(STAGES), 2 * WORKERS * x.block_type.nbytes)
    for g in gl.static_range(WORKERS):
        tma.async_copy_global_to_shared(
            x, [row + i_0 + g * BS, column], ready.index(STAGES), b_xi.index(g)
        )
        tma.async_copy_global_to_shared(
            y, [row + i_0 + g * BS, column], ready.index(STAGES), b_yi.index(g)
        )


@gluon.jit
def _fetch_tile(x, y, row, column, n, k, b_xj, b_yj, ready, free, STAGES: gl.constexpr):
    """Tile k of columns, the n-th to come, as soon as its slot is free."""
    slot = n % STAGES
    mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(slot), 2 * x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [row + k * BS, column], ready.index(slot), b_xj.index(slot))
    tma.async_copy_global_to_shared(y, [row + k * BS, column], ready.index(slot), b_yj.index(slot))


@gluon.jit
def _products(b_xi, b_yi, b_xj, b_yj, ready, n, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Waits for the n-th tile and starts x x' and y y' of its columns: S and U but for their scales.

    b_xi, b_yi: in shared memory or in registers.
    """
    slot = n % STAGES
    mbarrier.wait(ready.index(slot), (n // STAGES) & 1)
    zero = gl.zeros([BS, BS], gl.float32, LAYOUT)
    # [BS, D] @ [D, BS]
    b_s = warpgroup_mma(b_xi, b_xj.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    b_u = warpgroup_mma(b_yi, b_yj.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    return b_s, b_u


@gluon.jit
def _release(free, n, STAGES: gl.constexpr):
    """This group is done with the n-th tile: all of its warps, hence the barrier."""
    barrier()
    mbarrier.arrive(free.index(n % STAGES), count=1)


@gluon.jit
def _skip(ready, free, start, stop, STAGES: gl.constexpr):
    """Frees tiles that only other groups need, each when it has come."""
    for n in range(start, stop):
        mbarrier.wait(ready.index(n % STAGES), (n // STAGES) & 1)
        _release(free, n, STAGES)


# ---- forward


@gluon.jit
def _fold(
    s, u, s_max, t_max, s_sum, t_sum, b_kl, s_scale, t_scale, o_i, free, n, k,
    LAYOUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Takes tile k, whose products are under way, into the five numbers of a row, and frees it."""
    b_s, b_u = warpgroup_mma_wait(0, deps=(s, u))
    _release(free, n, STAGES)
    o_j = k * BS + gl.arange(0, BS, layout=gl.SliceLayout(0, LAYOUT))
    m_ij = o_j[None, :] <= o_i[:, None]
    b_s = gl.where(m_ij, b_s, NOTHING)
    b_u = gl.where(m_ij, b_u, NOTHING)
    s_new = gl.maximum(s_max, gl.max(b_s, 1) * s_scale)
    t_new = gl.maximum(t_max, gl.max(b_u, 1) * t_scale)
    b_s = b_s * s_scale - s_new[:, None]
    b_u = b_u * t_scale - t_new[:, None]
    s_moved = s_new - s_max
    t_moved = t_new - t_max
    b_r = gl.exp2(b_u)
    shrink = gl.exp2(-t_moved)
    # The sum in (1), of unnormalised R. Its old terms were relative to the old pivots:
    # kernel_triton.py
    b_kl = shrink * (b_kl + t_sum * (s_moved - t_moved)) + gl.sum(b_r * (b_u - b_s), 1)
    t_sum = shrink * t_sum + gl.sum(b_r, 1)
    s_sum = gl.exp2(-s_moved) * s_sum + gl.sum(gl.exp2(b_s), 1)
    return s_new, t_new, s_sum, t_sum, b_kl


@gluon.jit
def _online(
    g: gl.constexpr, start, stop, near, s_scale, t_scale, o_i, b_xi, b_yi, b_xj, b_yj, ready, free,
    WORKERS: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The five numbers of group g's rows, with pivots that move: from the tiles across the
    program's diagonal, near .. near + g, then tiles 0, 1, ... They come as start .. stop.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    s_max = gl.full([BS], NOTHING, gl.float32, ROW)
    t_max = gl.full([BS], NOTHING, gl.float32, ROW)
    s_sum = gl.zeros([BS], gl.float32, ROW)
    t_sum = gl.zeros([BS], gl.float32, ROW)
    b_kl = gl.zeros([BS], gl.float32, ROW)
    for n in range(start, start + g + 1):
        s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, n, STAGES, LAYOUT)
        s_max, t_max, s_sum, t_sum, b_kl = _fold(
            s, u, s_max, t_max, s_sum, t_sum, b_kl, s_scale, t_scale, o_i, free, n, n - start + near,
            LAYOUT, STAGES,
        )  # fmt: skip
    _skip(ready, free, start + g + 1, start + WORKERS, STAGES)
    for n in range(start + WORKERS, stop):
        s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, n, STAGES, LAYOUT)
        s_max, t_max, s_sum, t_sum, b_kl = _fold(
            s, u, s_max, t_max, s_sum, t_sum, b_kl, s_scale, t_scale, o_i, free, n, n - start - WORKERS,
            LAYOUT, STAGES,
        )  # fmt: skip
    return s_max, t_max, s_sum, t_sum, b_kl


@gluon.jit
def _store_rows(kl, s_lse, t_lse, o_i, T, s_max, t_max, s_sum, t_sum, b_kl):
    """(1) and both lse from the five numbers."""
    s_log = gl.log2(s_sum)
    t_log = gl.log2(t_sum)
    gl.store(kl + o_i, (b_kl / t_sum + s_log - t_log) * LN2, mask=o_i < T)
    gl.store(s_lse + o_i, s_max + s_log, mask=o_i < T)
    gl.store(t_lse + o_i, t_max + t_log, mask=o_i < T)


@gluon.jit
def _by_thread(b):
    """[BS, 4]: the sum over what each of a row's four threads holds of b [BS, BS]."""
    return gl.sum(gl.sum(b.reshape([BS, BS // 8, 4, 2]), 1), 2)


@gluon.jit
def _of_one(b, LAYOUT: gl.constexpr):
    """[BS, 4]: a row's number [BS], as the share of the thread that holds column 0."""
    o_j = gl.arange(0, BS, layout=gl.SliceLayout(0, LAYOUT))
    return _by_thread(gl.where(o_j[None, :] == 0, b[:, None], 0.0))


@gluon.jit
def _any_far(b_far, decided, WORKERS: gl.constexpr, LAYOUT: gl.constexpr):
    """Whether a row of any group is far above its pivot, when all have said."""
    mbarrier.wait(decided, 0)
    far = gl.max(b_far.index(0).load(LAYOUT), 0)
    for g in gl.static_range(1, WORKERS):
        far = gl.maximum(far, gl.max(b_far.index(g).load(LAYOUT), 0))
    return far


@gluon.jit
def _rows_forward(
    g: gl.constexpr, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided,
    WORKERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Group g: KL (1) in nats, lse(S) and lse(U) in base 2 of its 64 rows."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    near = i_0 // BS
    o_i = i_0 + g * BS + gl.arange(0, BS, layout=ROW)
    b_xi = b_xi.index(g)
    b_yi = b_yi.index(g)
    mbarrier.wait(ready.index(STAGES), 0)
    # Tiles start .. stop with pivots that move: those across the diagonal and tile 0. stop .. last
    # with pivots that stay.
    start = 0
    stop = gl.minimum(WORKERS + 1, end)
    last = end
    while start < last:
        s_max, t_max, s_sum, t_sum, b_kl = _online(
            g, start, stop, near, s_scale, t_scale, o_i, b_xi, b_yi, b_xj, b_yj, ready, free, WORKERS, STAGES, LAYOUT
        )  # fmt: skip
        s_part = _of_one(s_sum, LAYOUT)
        t_part = _of_one(t_sum, LAYOUT)
        kl_part = _of_one(b_kl, LAYOUT)
        for n in range(stop, last):
            s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, n, STAGES, LAYOUT)
            b_s = warpgroup_mma_wait(1, deps=(s,)) * s_scale - s_max[:, None]
            s_part += _by_thread(gl.exp2(b_s))  # U may still be under way
            b_u = warpgroup_mma_wait(0, deps=(u,))
            _release(free, n, STAGES)
            b_u = b_u * t_scale - t_max[:, None]
            b_r = gl.exp2(b_u)
            t_part += _by_thread(b_r)
            kl_part += _by_thread(b_r * (b_u - b_s))
        s_sum = gl.convert_layout(gl.sum(s_part, 1), ROW)
        t_sum = gl.convert_layout(gl.sum(t_part, 1), ROW)
        b_kl = gl.convert_layout(gl.sum(kl_part, 1), ROW)
        _store_rows(kl, s_lse, t_lse, o_i, T, s_max, t_max, s_sum, t_sum, b_kl)
        # A second time, all with pivots that move? One loop, not two: with a second one's registers
        # to keep, ptxas put the exponentials of S behind U.
        more = 0
        if start == 0:
            # also where a number is not finite
            good = (s_sum < FAR) & (t_sum < FAR) & (gl.abs(b_kl) < FAR)
            b_far.index(g).store(gl.where(good | (o_i >= T), 0, 1))
            barrier()
            mbarrier.arrive(decided, count=1)
            if _any_far(b_far, decided, WORKERS, ROW) > 0:
                more = end
        start = last
        last += more
        stop = last


@gluon.jit
def _fetch_forward(
    x, y, row, column, i_0, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided,
    WORKERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: own rows, the tiles across the diagonal, those left of it; all again where
    _any_far says so.
    """
    _fetch_rows(x, y, row, column, i_0, b_xi, b_yi, ready, WORKERS, STAGES)
    near = i_0 // BS
    for n in range(0, end):
        _fetch_tile(x, y, row, column, n, (near + n) % end, b_xj, b_yj, ready, free, STAGES)
    if _any_far(b_far, decided, WORKERS, gl.BlockedLayout([2], [32], [1], [0])) > 0:
        for n in range(end, 2 * end):
            _fetch_tile(x, y, row, column, n, (near + n) % end, b_xj, b_yj, ready, free, STAGES)


@gluon.jit(do_not_specialize=["T", "H", "HEADS"])
def _forward_kernel(
    x, y, kl, s_lse, t_lse, s_scale, t_scale, T, H, HEADS,
    D: gl.constexpr, BTHD: gl.constexpr, WORKERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """64 WORKERS rows of one head, forward.

    x, y: descriptors [64, D]; kl, s_lse, t_lse: [B, H, T] float32.
    """
    i_bh, i_0, row, column = _place(T, H, HEADS, BS * WORKERS, D, BTHD)
    kl += i_bh.to(gl.int64) * T
    s_lse += i_bh.to(gl.int64) * T
    t_lse += i_bh.to(gl.int64) * T
    b_xi = gl.allocate_shared_memory(x.dtype, [WORKERS, BS, D], x.layout)
    b_yi = gl.allocate_shared_memory(y.dtype, [WORKERS, BS, D], y.layout)
    b_xj = gl.allocate_shared_memory(x.dtype, [STAGES, BS, D], x.layout)
    b_yj = gl.allocate_shared_memory(y.dtype, [STAGES, BS, D], y.layout)
    b_far = gl.allocate_shared_memory(
        gl.int32, [WORKERS, BS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    decided = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(ready.index(k), count=1)
        mbarrier.init(free.index(k), count=WORKERS)
    mbarrier.init(ready.index(STAGES), count=1)
    mbarrier.init(decided, count=WORKERS)
    barrier()
    end = i_0 // BS + WORKERS
    # Arguments stand in full: a tuple under a name would make ordinary values of its constants.
    gl.warp_specialize(
        [
            (_rows_forward, (0, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided, WORKERS, STAGES)),
            (_rows_forward, (1, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided, WORKERS, STAGES)),
            (_rows_forward, (2, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided, WORKERS, STAGES)),
            (_rows_forward, (3, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided, WORKERS, STAGES)),
            (_fetch_forward, (x, y, row, column, i_0, end, b_xi, b_yi, b_xj, b_yj, b_far, ready, free, decided, WORKERS, STAGES)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 24],
    )  # fmt: skip


# ---- backward: memory that programs share


@builtin
def _reduce_add(sums, at, b_part, _semantic=None):
    """sums[at ...] += b_part of shared memory, by the copy engine. Gluon's language has no word for
    it, its builder has (Triton 3.6 and 3.7).
    """
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, sums.handle, at, b_part.handle)


@gluon.jit
def _written():
    """Waits until what this warp had the copy engine store or add is in memory. (tma.store_wait:
    only until it has been read from shared memory.)
    """
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r,r", [gl.program_id(0)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_acquire(p):
    """The counter at p, and all that was in memory before it was set."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [p], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _await(p, count):
    """Waits until the counter at p is `count`."""
    seen = _load_acquire(p)
    while seen < count:
        seen = _load_acquire(p)


@gluon.jit
def _fence_global():
    """What this warp has the copy engine do from here on comes after what _await saw.

    Of global memory alone: a fence of all memory waits for the whole chip (MEMBAR.ALL.GPU), in
    every program and for every tile.
    """
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, 0;", "=r,r", [gl.program_id(0)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _ticket(turns, BH, HEADS, NB):
    """This program's head, and how many programs of that head began before it.

    Programs begin in an order that only the hardware knows; turns[0] counts them. HEADS heads at a
    time, in turns; the next ones begin when the first EARLY of each one's NB programs have, and
    from then on old and new heads take turns:

        first EARLY of group 0 | EARLY of group 1, among them the rest of 0 | ... | the rest of the last group
    """
    early = (NB + 1) // 2
    i = gl.atomic_add(turns, 1, sem="relaxed") + (NB - early) * HEADS
    group = i // (NB * HEADS)  # which begins here
    n = i % (NB * HEADS) // HEADS
    head = i % HEADS
    two = (group > 0) & (group < BH // HEADS)
    old = gl.where(two, n % 2, gl.where(group > 0, 1, 0))
    n = gl.where(two, n // 2, gl.where(group > 0, n, n - (NB - early)))
    return (group - old) * HEADS + head, n + old * early


# ---- backward: who does what


@gluon.jit
def _gradient(
    s, u, s_lse_i, t_lse_i, w_i, s_scale, t_scale, o_i, k, LAYOUT: gl.constexpr, MASK: gl.constexpr
):
    """G (2) of tile k, whose products are under way: float32 [BS, BS]."""
    # U may still be under way
    b_p = gl.exp2(warpgroup_mma_wait(1, deps=(s,)) * s_scale - s_lse_i)
    b_g = w_i * (b_p - gl.exp2(warpgroup_mma_wait(0, deps=(u,)) * t_scale - t_lse_i))
    if MASK:
        o_j = k * BS + gl.arange(0, BS, layout=gl.SliceLayout(0, LAYOUT))
        b_g = gl.where(o_j[None, :] <= o_i[:, None], b_g, 0.0)
    return b_g


@gluon.jit
def _tile(
    g: gl.constexpr, k, b_dx, b_xi, b_yi, b_xj, b_yj, b_gs, s_lse_i, t_lse_i, w_i, s_scale, t_scale, o_i,
    ready, free, full, gone,
    WORKERS: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr, DX_LAYOUT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Tile k: G to the column group, dL/dx_i += G x_j (3), and the tile is free."""
    s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, k, STAGES, LAYOUT)
    b_g = _gradient(s, u, s_lse_i, t_lse_i, w_i, s_scale, t_scale, o_i, k, LAYOUT, MASK)
    b_g = b_g.to(b_xj.dtype)
    slot = k % SLOTS
    mbarrier.wait(gone.index(slot), ((k // SLOTS) & 1) ^ 1)
    b_gs.index(slot * WORKERS + g).store(b_g)
    fence_async_shared()
    barrier()
    mbarrier.arrive(full.index(slot * WORKERS + g), count=1)
    # from registers: [BS, BS] @ [BS, D]
    b_a = gl.convert_layout(b_g, gl.DotOperandLayout(0, DX_LAYOUT, 2))
    dx = warpgroup_mma(b_a, b_xj.index(k % STAGES), b_dx, is_async=True)
    b_dx = warpgroup_mma_wait(0, deps=(dx,))
    _release(free, k, STAGES)
    return b_dx


@gluon.jit
def _rows_backward(
    g: gl.constexpr, s_lse, t_lse, w, p_sums, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end,
    b_xi, b_yi, b_xj, b_yj, b_gs, ready, free, full, gone, done,
    D: gl.constexpr, WORKERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Group g: G of its 64 rows, tile by tile, and their dL/dx (3)."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    DX_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    diagonal = i_0 // BS + g
    o_i = diagonal * BS + gl.arange(0, BS, layout=gl.SliceLayout(1, LAYOUT))
    # rows past T: "sees nothing"
    s_lse_i = gl.load(s_lse + o_i, mask=o_i < T, other=float("inf"))[:, None]
    t_lse_i = gl.load(t_lse + o_i, mask=o_i < T, other=float("inf"))[:, None]
    w_i = gl.load(w + o_i, mask=o_i < T, other=0.0)[:, None]
    b_xi = b_xi.index(g)
    b_yi = b_yi.index(g)
    b_dx = gl.zeros([BS, D], gl.float32, DX_LAYOUT)
    mbarrier.wait(ready.index(STAGES), 0)
    if WORKERS == 2:  # room in registers: products then read less of shared memory
        b_yi = b_yi.load(gl.DotOperandLayout(0, LAYOUT, 2))
    for k in range(0, diagonal):
        b_dx = _tile(
            g, k, b_dx, b_xi, b_yi, b_xj, b_yj, b_gs, s_lse_i, t_lse_i, w_i, s_scale, t_scale, o_i,
            ready, free, full, gone, WORKERS, STAGES, LAYOUT, DX_LAYOUT, False,
        )  # fmt: skip
    b_dx = _tile(
        g, diagonal, b_dx, b_xi, b_yi, b_xj, b_yj, b_gs, s_lse_i, t_lse_i, w_i, s_scale, t_scale, o_i,
        ready, free, full, gone, WORKERS, STAGES, LAYOUT, DX_LAYOUT, True,
    )  # fmt: skip
    _skip(ready, free, diagonal + 1, end, STAGES)
    o_row = diagonal * BS + gl.arange(0, BS, layout=gl.SliceLayout(1, DX_LAYOUT))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, DX_LAYOUT))
    mbarrier.wait(done, 0)  # all programs' additions to these rows are in memory
    p = p_sums + o_row.to(gl.int64)[:, None] * D + _spread(o_d)[None, :]
    # .cg: from the second-level cache, where the copy engine adds
    b_dx += gl.load(p, cache_modifier=".cg")
    p = dx + o_row.to(gl.int64)[:, None] * d_stride_n + o_d[None, :]
    gl.store(p, (b_dx * x_scale).to(dx.dtype.element_ty), mask=(o_row < T)[:, None])


@gluon.jit
def _spread(o_d):
    """Where feature o_d of a row of `sums` lies: 32 at a time, the eight that a thread holds of
    them side by side.

    A thread then stores 16 bytes at once, and no two of a quarter warp meet in one bank.
    """
    return o_d // 32 * 32 + o_d // 2 % 4 * 8 + o_d // 16 % 2 * 4 + o_d // 8 % 2 * 2 + o_d % 2


@gluon.jit
def _column(
    d: gl.constexpr, k, zero, b_xi, b_gs, b_stage, full, gone, staged, emptied,
    D: gl.constexpr, WORKERS: gl.constexpr,
):  # fmt: skip
    """G' x_i of tile k, which groups d and on see, float32 to b_stage."""
    slot = k % SLOTS
    part = zero
    for g in gl.static_range(d, WORKERS):
        mbarrier.wait(full.index(slot * WORKERS + g), (k // SLOTS) & 1)
        # [BS, BS] @ [BS, D]
        b_a = b_gs.index(slot * WORKERS + g).permute((1, 0))
        part = warpgroup_mma(b_a, b_xi.index(g), part, use_acc=g > d, is_async=True)
    b_part = warpgroup_mma_wait(0, deps=(part,))
    _release(gone, k, SLOTS)
    # as _spread says
    b_part = b_part.reshape([BS, D // 32, 2, 2, 4, 2]).permute((0, 1, 4, 2, 3, 5)).reshape([BS, D])
    mbarrier.wait(emptied, (k & 1) ^ 1)
    b_stage.store(b_part)
    fence_async_shared()
    barrier()
    mbarrier.arrive(staged.index(k % ADDERS), count=1)


@gluon.jit
def _columns(
    i_0, b_xi, b_gs, b_stage, full, gone, staged, emptied, D: gl.constexpr, WORKERS: gl.constexpr
):
    """The column group: what the program's rows add to dL/dx of each tile of columns."""
    DX_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    zero = gl.zeros([BS, D], gl.float32, DX_LAYOUT)
    whole = i_0 // BS
    for k in range(0, whole):
        _column(0, k, zero, b_xi, b_gs, b_stage, full, gone, staged, emptied, D, WORKERS)
    for d in gl.static_range(WORKERS):
        _column(d, whole + d, zero, b_xi, b_gs, b_stage, full, gone, staged, emptied, D, WORKERS)


@gluon.jit
def _add(
    a: gl.constexpr, sums, turns, row, turn, end, b_stage, staged, emptied, done
):  # fmt: skip
    """Adding warp a: every ADDERS-th tile, from b_stage to `sums` when it is this program's turn.

    While one waits until its addition is in memory and may be told, the others add.
    """
    for k in range(a, end, ADDERS):
        _await(turns + k, turn)
        mbarrier.wait(staged.index(a), (k // ADDERS) & 1)
        _fence_global()
        if turn == 0:
            tma.async_copy_shared_to_global(sums, [row + k * BS, 0], b_stage)
        else:
            _reduce_add(sums, [row + k * BS, 0], b_stage)
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(emptied, count=1)
        _written()
        barrier()
        gl.atomic_xchg(turns + k, turn + 1, sem="release", scope="gpu")
    barrier()
    mbarrier.arrive(done, count=1)


@gluon.jit
def _fetch_backward(
    x, y, row, column, i_0, end, b_xi, b_yi, b_xj, b_yj, ready, free, WORKERS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The fetching warp: own rows, then the tiles from the left."""
    _fetch_rows(x, y, row, column, i_0, b_xi, b_yi, ready, WORKERS, STAGES)
    for k in range(0, end):
        _fetch_tile(x, y, row, column, k, k, b_xj, b_yj, ready, free, STAGES)


@gluon.jit(do_not_specialize=["T", "H", "BH", "HEADS"])
def _backward_kernel(
    x, y, sums, p_sums, turns, s_lse, t_lse, w, dx, s_scale, t_scale, x_scale, d_stride_b, d_stride_h, d_stride_n,
    T, H, BH, HEADS,
    D: gl.constexpr, BTHD: gl.constexpr, WORKERS: gl.constexpr, STAGES: gl.constexpr,
    ROW_REGISTERS: gl.constexpr, COLUMN_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """64 WORKERS rows of one head against all columns they see.

    x, y: descriptors [64, D]; sums: descriptor [64, D] of float32 [B H tiles 64, D], which begins
    at p_sums; turns: int32 [1 + B H tiles], zeros, the programs that have begun and the additions
    to each tile; s_lse, t_lse, w: [B, H, T]; dx: [B, H, T, D].
    """
    NB = gl.cdiv(T, BS * WORKERS)
    i_bh, turn = _ticket(turns, BH, HEADS, NB)
    i_0 = (NB - 1 - turn) * BS * WORKERS
    end = i_0 // BS + WORKERS
    # Where the head begins in x and y, and its first tile in `sums`
    row, column = i_bh // H * T if BTHD else i_bh * T, i_bh % H * D if BTHD else 0
    tile = i_bh * NB * WORKERS
    s_lse += i_bh.to(gl.int64) * T
    t_lse += i_bh.to(gl.int64) * T
    w += i_bh.to(gl.int64) * T
    turns += 1 + tile
    p_sums += tile.to(gl.int64) * BS * D
    dx += (i_bh // H).to(gl.int64) * d_stride_b + (i_bh % H).to(gl.int64) * d_stride_h
    b_xi = gl.allocate_shared_memory(x.dtype, [WORKERS, BS, D], x.layout)
    b_yi = gl.allocate_shared_memory(y.dtype, [WORKERS, BS, D], y.layout)
    b_xj = gl.allocate_shared_memory(x.dtype, [STAGES, BS, D], x.layout)
    b_yj = gl.allocate_shared_memory(y.dtype, [STAGES, BS, D], y.layout)
    G_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    b_gs = gl.allocate_shared_memory(x.dtype, [SLOTS * WORKERS, BS, BS], G_LAYOUT)
    b_stage = gl.allocate_shared_memory(gl.float32, [BS, D], sums.layout)
    # Barriers, each with how many arrive before it flips: a tile has come | all groups are done with
    # it | a group's G is there | it has been read | a partial sum is there | it has been read | all
    # additions of this program are in memory
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS * WORKERS, 1], mbarrier.MBarrierLayout())
    gone = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    staged = gl.allocate_shared_memory(gl.int64, [ADDERS, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(ready.index(k), count=1)
        mbarrier.init(free.index(k), count=WORKERS)
    mbarrier.init(ready.index(STAGES), count=1)
    for k in gl.static_range(SLOTS * WORKERS):
        mbarrier.init(full.index(k), count=1)
    for k in gl.static_range(SLOTS):
        mbarrier.init(gone.index(k), count=1)
    for k in gl.static_range(ADDERS):
        mbarrier.init(staged.index(k), count=1)
    mbarrier.init(emptied, count=1)
    mbarrier.init(done, count=ADDERS)
    barrier()
    if WORKERS == 2:
        gl.warp_specialize(
            [
                (_rows_backward, (0, s_lse, t_lse, w, p_sums, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end,
                                  b_xi, b_yi, b_xj, b_yj, b_gs, ready, free, full, gone, done, D, WORKERS, STAGES)),
                (_rows_backward, (1, s_lse, t_lse, w, p_sums, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end,
                                  b_xi, b_yi, b_xj, b_yj, b_gs, ready, free, full, gone, done, D, WORKERS, STAGES)),
                (_columns, (i_0, b_xi, b_gs, b_stage, full, gone, staged, emptied, D, WORKERS)),
                (_add, (0, sums, turns, tile * BS, turn, end, b_stage, staged, emptied, done)),
                (_add, (1, sums, turns, tile * BS, turn, end, b_stage, staged, emptied, done)),
                (_add, (2, sums, turns, tile * BS, turn, end, b_stage, staged, emptied, done)),
                (_fetch_backward, (x, y, row, column, i_0, end, b_xi, b_yi, b_xj, b_yj, ready, free, WORKERS, STAGES)),
            ],
            [4, 4, 1, 1, 1, 1],
            [ROW_REGISTERS, COLUMN_REGISTERS, 24, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_rows_backward, (0, s_lse, t_lse, w, p_sums, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end,
                                  b_xi, b_yi, b_xj, b_yj, b_gs, ready, free, full, gone, done, D, WORKERS, STAGES)),
                (_rows_backward, (1, s_lse, t_lse, w, p_sums, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end,
                                  b_xi, b_yi, b_xj, b_yj, b_gs, ready, free, full, gone, done, D, WORKERS, STAGES)),
                (_rows_backward, (2, s_lse, t_lse, w, p_sums, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end,
                                  b_xi, b_yi, b_xj, b_yj, b_gs, ready, free, full, gone, done, D, WORKERS, STAGES)),
                (_columns, (i_0, b_xi, b_gs, b_stage, full, gone, staged, emptied, D, WORKERS)),
                (_add, (0, sums, turns, tile * BS, turn, end, b_stage, staged, emptied, done)),
                (_add, (1, sums, turns, tile * BS, turn, end, b_stage, staged, emptied, done)),
                (_add, (2, sums, turns, tile * BS, turn, end, b_stage, staged, emptied, done)),
                (_fetch_backward, (x, y, row, column, i_0, end, b_xi, b_yi, b_xj, b_yj, ready, free, WORKERS, STAGES)),
            ],
            [4, 4, 4, 1, 1, 1, 1],
            [ROW_REGISTERS, ROW_REGISTERS, COLUMN_REGISTERS, 24, 24, 24, 24],
        )  # fmt: skip


# ---- the host


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


@constant
def _chip_reason(device: torch.device) -> str | None:
    if device.type != "cuda" or INTERPRETED or not _is_hopper(device):
        return f"the Hopper kernel needs compute capability 9.0, and the tensors are on {device}"
    return None


def unsupported(
    x: Tensor, causal: bool, lengths: Tensor | None, scales: tuple[float, float]
) -> str | None:
    """Why a loss of x [B, H, T, D] cannot go to the kernel, in a sentence; None if it can."""
    if reason := _chip_reason(x.device):
        return reason
    if x.dtype != torch.bfloat16 or x.shape[-1] not in (64, 128):
        return f"the Hopper kernel takes bfloat16 and D 64 or 128, not {x.dtype} and {x.shape[-1]}"
    if not causal or lengths is not None:
        return "the Hopper kernel is causal and takes no lengths"
    if min(scales) <= 0:
        return f"the Hopper kernel takes positive scales, not {min(scales)}"
    return None


def short(x: Tensor) -> bool:
    """Whether kernel_triton.py is faster for x [B, H, T, D]: at up to SHORT[D] tokens, or where
    the backward has fewer programs than there are multiprocessors.

    A program here owns 256 rows forward and 128 or 192 backward, of kernel_triton.py 64 or 128: few
    rows leave multiprocessors idle, and beginning takes as long as a few tiles. Of 102 shapes timed as
    CUDA graphs (1 to 288 heads of 128 to 8192 tokens) this picks the slower kernel at 3, by 4 to 5 %.
    But 100 of them have powers of two of tokens. Between, the last program's rows are partly empty:
    there the pick may be slower by 16 % (D 64) or 27 % (D 128), as LOG.md computes and nobody timed.
    """
    B, H, T, D = x.shape
    programs = B * H * -(-T // (BS.value * BACKWARD[D][0]))
    return SHORT[D] >= T or programs < MULTIPROCESSORS


def _matrix(x: Tensor) -> tuple[tuple, tuple, bool] | None:
    """Shape and strides of x as rows and columns for the copy engine, and whether its heads are side
    by side; None where it is no matrix.
    """
    B, H, T, D = x.shape
    b, h, n, d = x.stride()
    if d != 1 or n % 8 or x.data_ptr() % 16:
        return None
    if (h == T * n or H == 1) and (b == H * T * n or B == 1) and n >= D:
        return (B * H * T, D), (n, 1), False
    if (h == D or H == 1) and (b == T * n or B == 1) and n >= H * D:
        return (B * T, H * D), (n, 1), True
    return None


@functools.cache
def _layout(D: int, dtype=gl.bfloat16) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([BS.value, D], dtype)


def _described(x: Tensor, shape: tuple, strides: tuple, layout, D: int) -> TensorDescriptor:
    """A matrix in x's memory for the copy engine, which moves [64, D] of it.

    TensorDescriptor's own __init__ checks what _matrix has, in as much time as a launch takes.
    """
    described = object.__new__(TensorDescriptor)
    described.__dict__.update(
        base=x, shape=shape, strides=strides, block_shape=[BS.value, D], layout=layout
    )
    return described


def _launch(
    kernel,
    table: dict,
    x: Tensor,
    y: Tensor,
    matrix: tuple,
    sums: tuple,
    pointers: tuple,
    scales: tuple,
    strides: tuple,
    heads: int,
) -> None:
    """One program for the rows of the groups of each head.

    x, y, matrix: as _laid_out leaves them; sums: its descriptor, or nothing; strides: dx's, or
    nothing.
    """
    B, H, T, D = x.shape
    groups, stages, registers = table[D]
    shape, x_strides, bthd = matrix
    # y's strides differ where a copy of it had to be made
    y_shape, y_strides, _ = matrix if y.stride() == x.stride() else _matrix(y)
    layout = _layout(D)
    described = (
        _described(x, shape, x_strides, layout, D),
        _described(y, y_shape, y_strides, layout, D),
    )
    sizes = (T, H, B * H, heads) if sums else (T, H, heads)
    constants = (D, bthd, groups, stages, *registers, 4)
    arguments = (*described, *sums, *pointers, *scales, *strides, *sizes, *constants)
    grid = -(-T // (BS.value * groups)) * B * H, 1, 1
    launch(kernel, x.device, grid, arguments, pointers, (D, bthd, strides))


@functools.cache
def _heads(BH: int, T: int, D: int) -> int:
    """How many heads begin together in the backward: a divisor of BH, and no more than
    IN_FLIGHT_BYTES of x, y (2 bytes) and `sums` (4).
    """
    most = max(1, min(BH, IN_FLIGHT_BYTES[D] // (8 * T * D)))
    return next(n for n in range(most, 0, -1) if BH % n == 0)


def _rows_of_sums(B: int, H: int, T: int, D: int) -> int:
    """Rows of `sums`: those of x, each head's up to whole programs."""
    rows = BS.value * BACKWARD[D][0]
    return B * H * -(-T // rows) * rows


def workspace_bytes(B: int, H: int, T: int, D: int) -> int:
    """Bytes that the backward of x [B, H, T, D] holds for its own time beyond dL/dx: `sums`, `turns`."""
    rows = _rows_of_sums(B, H, T, D)
    return 4 * rows * D + 4 * (1 + rows // BS.value)


def _laid_out(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """Both in one layout that the copy engine can read: as they are, where they can stay. And x's
    _matrix.
    """
    matrix = _matrix(x)
    if matrix is None:
        x = x.clone(memory_format=torch.contiguous_format)
        matrix = _matrix(x)
    if y.stride() != x.stride() or y.data_ptr() % 16:
        y = torch.empty_like(x).copy_(y)
    return x, y, matrix


def forward(x, y, s_scale, t_scale, causal, lengths):
    """KL in nats, lse(S) and lse(U) in base 2: three [B, H, T] float32.

    Nothing here waits for the GPU.
    """
    numbers = row_numbers(x)
    x, y, matrix = _laid_out(x, y)
    B, H, T, D = x.shape
    scales = s_scale * LOG2E, t_scale * LOG2E
    heads = max(1, min(B * H, GROUP_BYTES // (4 * T * D)))
    _launch(_forward_kernel, FORWARD, x, y, matrix, (), numbers, scales, (), heads)
    return numbers


def backward(w, s_lse, t_lse, x, y, s_scale, t_scale, causal, lengths):
    """dL/dx [B, H, T, D], in x's own layout where x is dense. Nothing here waits for the GPU, and
    calls share nothing: any streams, any devices, any CUDA graph.
    """
    dx = torch.empty_like(x)
    x, y, matrix = _laid_out(x, y)
    B, H, T, D = x.shape
    rows = _rows_of_sums(B, H, T, D)
    sums = x.new_empty((rows, D), dtype=torch.float32)
    turns = x.new_zeros(1 + rows // BS.value, dtype=torch.int32)
    described = (_described(sums, (rows, D), (D, 1), _layout(D, gl.float32), D),)
    pointers = sums, turns, s_lse, t_lse, w.contiguous(), dx
    scales = s_scale * LOG2E, t_scale * LOG2E, float(s_scale)
    heads = _heads(B * H, T, D)
    _launch(_backward_kernel, BACKWARD, x, y, matrix, described, pointers, scales, dx.stride()[:3], heads)  # fmt: skip
    return dx


LOSS = Loss("relation_kl_hopper", forward, backward)


def relation_kl_hopper(
    student: Tensor,
    teacher: Tensor,
    scale: float,
    teacher_scale: float,
    causal: bool,
    lengths: Tensor | None,
    kept: list | None = None,
) -> Tensor:
    """KL(teacher || student) of every row, [B, H, T] float32, from relation_kl.relation_kl's
    arguments after its checks. Raises ValueError where `unsupported` says why.
    """
    if reason := unsupported(student, causal, lengths, (scale, teacher_scale)):
        raise ValueError(reason)
    return LOSS(student, teacher, scale, teacher_scale, causal, lengths, kept)
