"""The loss of relation_kl.py for one chip, NVIDIA's Hopper: products and exponentials at the same
time.

Why.  kernel_triton.py takes turns: the tensor cores multiply, then the ordinary cores take
exponentials. Both need about the same time here (two products and two exponentials a pair of
tokens), so each idles half of it. Plain Triton waits for a product where it is written, and cannot
say otherwise. Gluon, Triton's lower language, says who does what:

    one warp            asks the copy engine for the next tiles of columns, STAGES tiles ahead, and does nothing else
    WORKERS groups      of four warps, 64 rows each, every one by itself: wait for a tile, start its two products,
                        take exponentials, free the tile

While one group takes exponentials another one's products run; no group waits for another. Backward,
a group's own exponentials of S begin while the tensor cores are still at U (forward that took
longer). More groups hide more and leave each fewer registers: 4 forward, 3 backward (whose dL/dx
stays in registers). At D = 64 the backward has room for its own rows of x and y there too, which
halves what its products read of shared memory (12 % of its time; at D = 128 they would spill).

How they meet.  The copy engine (TMA) brings a tile without any thread's help and then flips a
barrier in shared memory. `ready` flips when a tile's bytes are there, `free` when all groups are
done with it; slot k % STAGES is used again and again, and the parity of k // STAGES says which time
is meant. A group that needs fewer columns than the others (its rows end earlier) still waits for
each tile and frees it: freeing a tile that has not come yet would count for the one before. A
product reads shared memory on its own too: the group waits for it before it frees the tile.

Forward.  (1) as in kernel_triton.py: two running maxima and sums. Here the maximum is of the raw
products, and scale and maximum enter in one multiply-add.

Backward.  (2) and (3) over all columns: G_ij left of the diagonal (row i sees column j), G_ji right
of it (row j sees column i, with the statistics of the columns, which the first warp brings), both
across it. Left of the diagonal all of a row shares one weight w_i, which is therefore applied once,
to the sum. Each group keeps its rows' dL/dx in registers and writes it once, so the same inputs
give the same bits. A walk over the triangle would need 6 half-products instead of 8, but must add
to rows of other programs: as it was tried here (LOG.md), the additions cost more than the products
saved.

Limits.  Compute capability 9.0, bfloat16, causal, no `lengths`, D 64 or 128, positive scales, first
derivatives. Layout: [B, H, T, D] contiguous, or a transpose of [B, T, H, D]; any other is copied to
the first.

Sources.  kernel_triton.py; overlap by warpgroups: FlashAttention-3 (arXiv 2407.08608).
tests/test_hopper.py runs this source on a CPU with copies and products as late as they may be;
tests/test_gpu.py runs it for real.
"""

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernel_triton import GROUP_BYTES, INTERPRETED, LOG2E, Loss, on, row_numbers

LN2 = gl.constexpr(math.log(2))
# Product of an unseen pair: exp2 gives 0, and differences stay finite
NOTHING = gl.constexpr(-1e30)
BS = gl.constexpr(64)  # rows of a group, and columns of a tile
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6's name
# D -> groups, tiles ahead, registers of a thread. What other choices took: LOG.md.
FORWARD = {64: (4, 4, 112), 128: (4, 3, 112)}
BACKWARD = {64: (3, 4, 160), 128: (3, 3, 160)}


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
def _fetch(
    x, y, s_lse, t_lse, w, row, column, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_stats, ready, free,
    WORKERS: gl.constexpr, STAGES: gl.constexpr, STATS: gl.constexpr,
):  # fmt: skip
    """The first warp: the groups' own rows, then tile after tile as slots come free.

    STATS: and the columns' numbers.
    """
    mbarrier.expect(ready.index(STAGES), 2 * WORKERS * x.block_type.nbytes)
    for g in gl.static_range(WORKERS):
        tma.async_copy_global_to_shared(
            x, [row + i_0 + g * BS, column], ready.index(STAGES), b_xi.index(g)
        )
        tma.async_copy_global_to_shared(
            y, [row + i_0 + g * BS, column], ready.index(STAGES), b_yi.index(g)
        )
    for k in range(0, end):
        slot = k % STAGES
        mbarrier.wait(free.index(slot), ((k // STAGES) & 1) ^ 1)
        if STATS:
            if k >= i_0 // BS:  # past T: "sees nothing"
                o_j = k * BS + gl.arange(0, BS, layout=gl.BlockedLayout([2], [32], [1], [0]))
                b_stats.index(3 * slot).store(
                    gl.load(s_lse + o_j, mask=o_j < T, other=float("inf"))
                )
                b_stats.index(3 * slot + 1).store(
                    gl.load(t_lse + o_j, mask=o_j < T, other=float("inf"))
                )
                b_stats.index(3 * slot + 2).store(gl.load(w + o_j, mask=o_j < T, other=0.0))
                barrier()
        mbarrier.expect(ready.index(slot), 2 * x.block_type.nbytes)
        tma.async_copy_global_to_shared(
            x, [row + k * BS, column], ready.index(slot), b_xj.index(slot)
        )
        tma.async_copy_global_to_shared(
            y, [row + k * BS, column], ready.index(slot), b_yj.index(slot)
        )


@gluon.jit
def _products(b_xi, b_yi, b_xj, b_yj, ready, k, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Waits for tile k and starts x x' and y y' of its columns: S and U but for their scales."""
    slot = k % STAGES
    mbarrier.wait(ready.index(slot), (k // STAGES) & 1)
    zero = gl.zeros([BS, BS], gl.float32, LAYOUT)
    # [BS, D] @ [D, BS]
    b_s = warpgroup_mma(b_xi, b_xj.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    b_u = warpgroup_mma(b_yi, b_yj.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    return b_s, b_u


@gluon.jit
def _release(free, k, STAGES: gl.constexpr):
    """This group is done with tile k: all of its warps, hence the barrier."""
    barrier()
    mbarrier.arrive(free.index(k % STAGES), count=1)


@gluon.jit
def _fold(
    s, u, s_max, t_max, s_sum, t_sum, b_kl, s_scale, t_scale, o_i, free, k,
    LAYOUT: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Takes tile k, whose products are under way, into the five numbers of a row, and frees it."""
    b_s, b_u = warpgroup_mma_wait(0, deps=(s, u))
    _release(free, k, STAGES)
    if MASK:
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
def _rows_forward(
    g: gl.constexpr, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, ready, free,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Group g: KL (1) in nats, lse(S) and lse(U) in base 2 of its 64 rows."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    diagonal = i_0 // BS + g
    o_i = diagonal * BS + gl.arange(0, BS, layout=ROW)
    b_xi = b_xi.index(g)
    b_yi = b_yi.index(g)
    # the five numbers of a row
    s_max = gl.full([BS], NOTHING, gl.float32, ROW)
    t_max = gl.full([BS], NOTHING, gl.float32, ROW)
    s_sum = gl.zeros([BS], gl.float32, ROW)
    t_sum = gl.zeros([BS], gl.float32, ROW)
    b_kl = gl.zeros([BS], gl.float32, ROW)
    mbarrier.wait(ready.index(STAGES), 0)
    for k in range(0, diagonal):
        s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, k, STAGES, LAYOUT)
        s_max, t_max, s_sum, t_sum, b_kl = _fold(
            s, u, s_max, t_max, s_sum, t_sum, b_kl, s_scale, t_scale, o_i, free, k, LAYOUT, STAGES, False
        )  # fmt: skip
    s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, diagonal, STAGES, LAYOUT)
    s_max, t_max, s_sum, t_sum, b_kl = _fold(
        s, u, s_max, t_max, s_sum, t_sum, b_kl, s_scale, t_scale, o_i, free, diagonal, LAYOUT, STAGES, True
    )  # fmt: skip
    for k in range(diagonal + 1, end):  # tiles that only other groups need
        mbarrier.wait(ready.index(k % STAGES), (k // STAGES) & 1)
        _release(free, k, STAGES)
    s_log = gl.log2(s_sum)
    t_log = gl.log2(t_sum)
    gl.store(kl + o_i, (b_kl / t_sum + s_log - t_log) * LN2, mask=o_i < T)
    gl.store(s_lse + o_i, s_max + s_log, mask=o_i < T)
    gl.store(t_lse + o_i, t_max + t_log, mask=o_i < T)


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
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(ready.index(k), count=1)
        mbarrier.init(free.index(k), count=WORKERS)
    mbarrier.init(ready.index(STAGES), count=1)
    barrier()
    end = i_0 // BS + WORKERS
    # Arguments stand in full: a tuple under a name would make ordinary values of its constants.
    gl.warp_specialize(
        [
            (_rows_forward, (0, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, ready, free, STAGES)),
            (_rows_forward, (1, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, ready, free, STAGES)),
            (_rows_forward, (2, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, ready, free, STAGES)),
            (_rows_forward, (3, kl, s_lse, t_lse, s_scale, t_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj, ready, free, STAGES)),
            (_fetch, (x, y, s_lse, t_lse, kl, row, column, i_0, T, end, b_xi, b_yi, b_xj, b_yj, ready, ready, free,
                      WORKERS, STAGES, False)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _apply(b_g, b_xj, b_dx, free, k, STAGES: gl.constexpr, OWN: gl.constexpr):
    """dL/dx += G x of tile k (3), and frees the tile. G goes from registers to the tensor cores."""
    b_a = gl.convert_layout(b_g.to(b_xj.dtype), gl.DotOperandLayout(0, OWN, 2))
    # [BS, BS] @ [BS, D]
    dx = warpgroup_mma(b_a, b_xj.index(k % STAGES), b_dx, is_async=True)
    b_dx = warpgroup_mma_wait(0, deps=(dx,))
    _release(free, k, STAGES)
    return b_dx


@gluon.jit
def _column(b_stats, k, n: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Number n of tile k's columns, [1, BS]: 0 lse(S), 1 lse(U), 2 w."""
    return b_stats.index(3 * (k % STAGES) + n).load(gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _rows_backward(
    g: gl.constexpr, s_lse, t_lse, w, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end, b_xi, b_yi, b_xj, b_yj,
    b_stats, ready, free, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Group g: dL/dx (3) of its 64 rows, from all columns."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    OWN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    diagonal = i_0 // BS + g
    o_i = diagonal * BS + gl.arange(0, BS, layout=gl.SliceLayout(1, LAYOUT))
    o_own = diagonal * BS + gl.arange(0, BS, layout=gl.SliceLayout(1, OWN))
    # rows past T: "sees nothing"
    s_lse_i = gl.load(s_lse + o_i, mask=o_i < T, other=float("inf"))[:, None]
    t_lse_i = gl.load(t_lse + o_i, mask=o_i < T, other=float("inf"))[:, None]
    w_own = gl.load(w + o_own, mask=o_own < T, other=0.0)
    b_xi = b_xi.index(g)
    b_yi = b_yi.index(g)
    b_dx = gl.zeros([BS, D], gl.float32, OWN)
    mbarrier.wait(ready.index(STAGES), 0)
    if D == 64:  # room in registers: the products then read shared memory for columns alone
        b_xi = b_xi.load(gl.DotOperandLayout(0, LAYOUT, 2))
        b_yi = b_yi.load(gl.DotOperandLayout(0, LAYOUT, 2))
    for k in range(0, gl.minimum(diagonal, end)):  # row i sees column j: G_ij but for w_i
        s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, k, STAGES, LAYOUT)
        b_p = gl.exp2(
            warpgroup_mma_wait(1, deps=(s,)) * s_scale - s_lse_i
        )  # U may still be under way
        b_g = b_p - gl.exp2(warpgroup_mma_wait(0, deps=(u,)) * t_scale - t_lse_i)
        b_dx = _apply(b_g, b_xj, b_dx, free, k, STAGES, OWN)
    b_dx *= w_own[:, None]
    if diagonal < end:  # both, each under its mask
        s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, diagonal, STAGES, LAYOUT)
        b_s, b_u = warpgroup_mma_wait(0, deps=(s, u))
        w_i = gl.load(w + o_i, mask=o_i < T, other=0.0)[:, None]
        o_j = diagonal * BS + gl.arange(0, BS, layout=gl.SliceLayout(0, LAYOUT))
        s_lse_j = _column(b_stats, diagonal, 0, STAGES, LAYOUT)
        t_lse_j = _column(b_stats, diagonal, 1, STAGES, LAYOUT)
        w_j = _column(b_stats, diagonal, 2, STAGES, LAYOUT)
        b_g = w_i * (gl.exp2(b_s * s_scale - s_lse_i) - gl.exp2(b_u * t_scale - t_lse_i))
        b_g = gl.where(o_j[None, :] <= o_i[:, None], b_g, 0.0)
        b_h = w_j * (gl.exp2(b_s * s_scale - s_lse_j) - gl.exp2(b_u * t_scale - t_lse_j))
        b_g += gl.where(o_i[:, None] <= o_j[None, :], b_h, 0.0)
        b_dx = _apply(b_g, b_xj, b_dx, free, diagonal, STAGES, OWN)
    for k in range(diagonal + 1, end):  # row j sees column i: G_ji
        s, u = _products(b_xi, b_yi, b_xj, b_yj, ready, k, STAGES, LAYOUT)
        b_s = warpgroup_mma_wait(1, deps=(s,))
        b_p = gl.exp2(b_s * s_scale - _column(b_stats, k, 0, STAGES, LAYOUT))
        b_u = warpgroup_mma_wait(0, deps=(u,))
        b_r = gl.exp2(b_u * t_scale - _column(b_stats, k, 1, STAGES, LAYOUT))
        b_g = _column(b_stats, k, 2, STAGES, LAYOUT) * (b_p - b_r)
        b_dx = _apply(b_g, b_xj, b_dx, free, k, STAGES, OWN)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, OWN))
    p = dx + o_own.to(gl.int64)[:, None] * d_stride_n + o_d[None, :]
    gl.store(p, (b_dx * x_scale).to(dx.dtype.element_ty), mask=(o_own < T)[:, None])


@gluon.jit(do_not_specialize=["T", "H", "HEADS"])
def _backward_kernel(
    x, y, s_lse, t_lse, w, dx, s_scale, t_scale, x_scale, d_stride_b, d_stride_h, d_stride_n, T, H, HEADS,
    D: gl.constexpr, BTHD: gl.constexpr, WORKERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """64 WORKERS rows of one head's dL/dx.

    x, y: descriptors [64, D]; s_lse, t_lse, w: [B, H, T]; dx: [B, H, T, D].
    """
    i_bh, i_0, row, column = _place(T, H, HEADS, BS * WORKERS, D, BTHD)
    s_lse += i_bh.to(gl.int64) * T
    t_lse += i_bh.to(gl.int64) * T
    w += i_bh.to(gl.int64) * T
    dx += (i_bh // H).to(gl.int64) * d_stride_b + (i_bh % H).to(gl.int64) * d_stride_h
    b_xi = gl.allocate_shared_memory(x.dtype, [WORKERS, BS, D], x.layout)
    b_yi = gl.allocate_shared_memory(y.dtype, [WORKERS, BS, D], y.layout)
    b_xj = gl.allocate_shared_memory(x.dtype, [STAGES, BS, D], x.layout)
    b_yj = gl.allocate_shared_memory(y.dtype, [STAGES, BS, D], y.layout)
    b_stats = gl.allocate_shared_memory(
        gl.float32, [3 * STAGES, BS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(ready.index(k), count=1)
        mbarrier.init(free.index(k), count=WORKERS)
    mbarrier.init(ready.index(STAGES), count=1)
    barrier()
    end = gl.cdiv(T, BS)
    gl.warp_specialize(
        [
            (_rows_backward, (0, s_lse, t_lse, w, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end, b_xi, b_yi,
                              b_xj, b_yj, b_stats, ready, free, D, STAGES)),
            (_rows_backward, (1, s_lse, t_lse, w, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end, b_xi, b_yi,
                              b_xj, b_yj, b_stats, ready, free, D, STAGES)),
            (_rows_backward, (2, s_lse, t_lse, w, dx, d_stride_n, s_scale, t_scale, x_scale, i_0, T, end, b_xi, b_yi,
                              b_xj, b_yj, b_stats, ready, free, D, STAGES)),
            (_fetch, (x, y, s_lse, t_lse, w, row, column, i_0, T, end, b_xi, b_yi, b_xj, b_yj, b_stats, ready, free,
                      WORKERS, STAGES, True)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )  # fmt: skip


# ---- the host


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


@torch.compiler.assume_constant_result
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


def _matrix(x: Tensor) -> tuple[Tensor, bool] | None:
    """x as rows and columns for the copy engine, and whether its heads are side by side; None where
    it is no matrix.
    """
    B, H, T, D = x.shape
    b, h, n, d = x.stride()
    if d != 1 or n % 8 or x.data_ptr() % 16:
        return None
    if (h == T * n or H == 1) and (b == H * T * n or B == 1) and n >= D:
        return x.as_strided((B * H * T, D), (n, 1)), False
    if (h == D or H == 1) and (b == T * n or B == 1) and n >= H * D:
        return x.as_strided((B * T, H * D), (n, 1)), True
    return None


@functools.cache
def _layout(D: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([BS.value, D], gl.bfloat16)


_compiled: dict = {}  # as in kernel_triton.py


def _launch(kernel, table: dict, x: Tensor, y: Tensor, pointers: tuple, numbers: tuple) -> None:
    """One program for the rows of WORKERS groups of each head.

    x, y: of one layout, a matrix for the copy engine. Triton's look at every argument is done once
    for each combination of what it looks at: kernel_triton.py.
    """
    B, H, T, D = x.shape
    workers, stages, registers = table[D]
    (mx, bthd), (my, _) = _matrix(x), _matrix(y)
    block, layout = [BS.value, D], _layout(D)
    grid = -(-T // (BS.value * workers)) * B * H, 1, 1
    arguments = (
        TensorDescriptor(mx, mx.shape, mx.stride(), block, layout),
        TensorDescriptor(my, my.shape, my.stride(), block, layout),
        *pointers, *numbers, T, H, max(1, min(B * H, GROUP_BYTES // (4 * T * D))),
        D, bthd, workers, stages, registers, 4,
    )  # fmt: skip
    strides = tuple(n for n in numbers if isinstance(n, int))
    key = kernel is _forward_kernel, x.device, D, bthd, strides
    with on(x.device):
        if any(p.data_ptr() % 16 for p in pointers):
            kernel[grid](*arguments)
        elif key in _compiled:
            _compiled[key][grid](*arguments)
        else:
            _compiled[key] = kernel[grid](*arguments)


def _laid_out(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one layout that the copy engine can read: as they are, where they can stay."""
    if _matrix(x) is None:
        x = x.contiguous()
    if y.stride() != x.stride() or _matrix(y) is None:
        y = torch.empty_like(x).copy_(y)
    return x, y


def forward(x, y, s_scale, t_scale, causal, lengths):
    """KL in nats, lse(S) and lse(U) in base 2: three [B, H, T] float32.

    Nothing here waits for the GPU.
    """
    numbers = row_numbers(x)
    x, y = _laid_out(x, y)
    _launch(_forward_kernel, FORWARD, x, y, numbers, (s_scale * LOG2E, t_scale * LOG2E))
    return numbers


def backward(w, s_lse, t_lse, x, y, s_scale, t_scale, causal, lengths):
    """dL/dx [B, H, T, D], in x's own layout where x is dense."""
    dx = torch.empty_like(x)
    x, y = _laid_out(x, y)
    pointers = s_lse, t_lse, w.contiguous(), dx
    scales = s_scale * LOG2E, t_scale * LOG2E, float(s_scale)
    _launch(_backward_kernel, BACKWARD, x, y, pointers, scales + dx.stride()[:3])
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
