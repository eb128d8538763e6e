"""The loss of relation_kl.py as two Triton kernels: exact, and linear in memory.

What.  relation_kl.py derives the formulas; its numbers (1), (2) and (3) are used below. In one line
each:

    KL_i    = sum_j R_ij (U_ij - S_ij) - lse_i(U) + lse_i(S)                                            (1)
    G_ij    = w_i (P_ij - R_ij),  P_ij = exp(S_ij - lse_i(S)),  R_ij = exp(U_ij - lse_i(U))             (2)
    dL/dx_i = a sum_j (G_ij + G_ji) x_j                                                                 (3)

with S_ij = a x_i.x_j of the student and U_ij = b y_i.y_j of the teacher.

Names.  s_ student, t_ teacher; _i rows, _j columns, _n tokens; b_ a block, o_ offsets, m_ a mask, p_
pointers. Of a program: i_b its batch, i_h its head, i_bh both in one, o_bh where that head begins
in [B, H, T], i_0 the first row. BD: D, up to a power of two. MASK: some of the block is not seen.
WIDE: offsets need 64 bits. HEADS: how many heads a group has (_place).

Forward.  One program owns BT rows and visits the columns up to its diagonal, BS at a time. It never
holds more than two [BT, BS] score tiles, which it folds into five numbers a row: pivot and sum of
exponentials, for S and for U, and the sum of (1) (an online softmax, done twice at once). It leaves
KL and both lse; the backward needs no more.

Backward.  S is symmetric, S_ij = S_ji, and so is U. One recomputed tile of row block i and column
block j therefore gives both halves of (3): G_ij with the statistics of row i, and G_ji, the element
on the other side of the diagonal, with the statistics of row j:

    columns left of the diagonal block     row i sees column j          G_ij   (row statistics)
    columns right of it                    row j sees column i          G_ji   (column statistics)
    the diagonal block; not causal: all    both, each under its mask    G_ij + G_ji

A program walks all columns, keeps its own dL/dx_i in registers and writes it once: no atomics, so
two runs give the same bits. The price is 3 products over T^2 pairs where a walk over the triangle
would need 4 over T^2 / 2: half again as many. kernel_hopper.py does the same with products and
exponentials at the same time, on the one chip it is for.

Numerics.  Products accumulate in float32. Exponentials are base 2: scores carry a factor log2(e).
Scores enter (1) relative to their rows' pivots, so that large logits cancel before they are summed.
The pivot starts at NOTHING, a finite number: -inf minus -inf never arises. A row that sees nothing
has lse = +inf: its P, R and G are 0.

Run.  `python kernel_triton.py` checks the kernels against the dense definition on the machine at
hand: on its GPU, or under Triton's interpreter without one. tests/test_kernel.py needs no GPU;
tests/test_gpu.py needs one.

Limits.  First derivatives, no teacher gradient. float16, bfloat16, float32; D from 16 to 256;
NVIDIA GPUs from compute capability 8.0. Other tensors are refused in a sentence. A D that is not a
power of two costs as much as the next one.

Sources.  LinearARD (arXiv 2604.00004); online softmax: arXiv 1805.02867; tiles: FlashAttention
(arXiv 2205.14135).
"""

import functools
import itertools
import math
import os
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's decorator reads it: set before the import

import triton
import triton.language as tl

from kernel_host import (
    GROUP_BYTES,
    INTERPRETED,
    LOG2E,
    SHARED_MEMORY,
    Loss,
    chip,
    launch,
    refusal,
    row_numbers,
)

LN2: tl.constexpr = tl.constexpr(math.log(2))
NOTHING: tl.constexpr = tl.constexpr(-1e30)  # an unseen pair's score: finite, and exp2 gives 0


class Tile(NamedTuple):
    """BT rows by BS columns, with the launch's warps and pipeline stages."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int


@triton.jit
def _place(T, H, HEADS, lengths, BT: tl.constexpr):
    """Which (batch, head) and first row this program owns, and how many tokens of that sequence are
    real.

    Within a group of HEADS heads the programs start with the last rows, which see the most
    columns: the last ones to start are the short ones, and the multiprocessors finish together.
    """
    NT = tl.cdiv(T, BT)
    i_group = tl.program_id(0) // (HEADS * NT)
    i_rest = tl.program_id(0) % (HEADS * NT)
    heads = tl.minimum(HEADS, tl.num_programs(0) // NT - i_group * HEADS)  # fewer in the last group
    i_bh = i_group * HEADS + i_rest % heads
    i_0 = (NT - 1 - i_rest // heads) * BT
    if lengths is None:
        n = T
    else:
        n = tl.minimum(tl.maximum(tl.load(lengths + i_bh // H).to(tl.int32), 0), T)
    # int64: an offset into B H T D elements may pass 2^31
    return (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_bh.to(tl.int64) * T, i_0, n


@triton.jit
def _load(p_x, o_n, o_d, stride_n, n, D: tl.constexpr, MASK: tl.constexpr):
    """Rows o_n of p_x: zeros from row n on (MASK) and from feature D on (D no power of two)."""
    # [len(o_n), BD]
    p = p_x + o_n[:, None] * stride_n + o_d[None, :]
    PAD: tl.constexpr = o_d.shape[0] != D
    if MASK and PAD:
        b = tl.load(p, mask=(o_n < n)[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASK:
        b = tl.load(p, mask=(o_n < n)[:, None], other=0.0)
    elif PAD:
        b = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def _start(i, stride_n, WIDE: tl.constexpr):
    """Offset of row i. In 64 bits only where it must be: 64-bit offsets in front of a loop's loads
    make the compiler wait after every single tensor-core instruction (ptxas says C7515).
    """
    return i * (tl.cast(stride_n, tl.int64) if WIDE else stride_n)


@triton.jit
def _products(
    c, x, y, b_xi, b_yi, s_stride_n, t_stride_n, n,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S and U of the program's rows against columns c .. c + BS, but for their scales, and those
    columns' x.
    """
    o_s = tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    # [BS, BD]
    b_xj = _load(x + _start(c, s_stride_n, WIDE), o_s, o_d, s_stride_n, n - c, D, MASK)
    b_yj = _load(y + _start(c, t_stride_n, WIDE), o_s, o_d, t_stride_n, n - c, D, MASK)
    # [BT, BD] @ [BD, BS] -> [BT, BS]
    b_s = tl.dot(b_xi, tl.trans(b_xj), input_precision=PRECISION)
    b_u = tl.dot(b_yi, tl.trans(b_yj), input_precision=PRECISION)
    return b_s, b_u, b_xj


@triton.jit(do_not_specialize=["T", "H", "HEADS"])
def _forward_kernel(
    x, y, kl, s_lse, t_lse, lengths, s_scale, t_scale,
    s_stride_b, s_stride_h, s_stride_n, t_stride_b, t_stride_h, t_stride_n, T, H, HEADS,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, S_NEGATIVE: tl.constexpr, T_NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Rows i_0 .. i_0 + BT of one head: KL (1) in nats, lse(S) and lse(U) in base 2.

    x, y: [B, H, T, D]; kl, s_lse, t_lse: [B, H, T] float32; lengths: [B] integers or None; scales:
    above 0, times log2(e).
    """
    i_b, i_h, o_bh, i_0, n = _place(T, H, HEADS, lengths, BT)
    x += i_b * s_stride_b + i_h * s_stride_h
    y += i_b * t_stride_b + i_h * t_stride_h
    o_n = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    o_i = i_0 + o_n
    # [BT, BD]
    b_xi = _load(x + _start(i_0, s_stride_n, True), o_n, o_d, s_stride_n, n - i_0, D, True)
    b_yi = _load(y + _start(i_0, t_stride_n, True), o_n, o_d, t_stride_n, n - i_0, D, True)
    # [BT], the five numbers of a row
    s_max = tl.full([BT], NOTHING, tl.float32)
    t_max = tl.full([BT], NOTHING, tl.float32)
    s_sum = tl.zeros([BT], tl.float32)
    t_sum = tl.zeros([BT], tl.float32)
    b_kl = tl.zeros([BT], tl.float32)
    # Columns [0, full) are seen by every row and need no mask; [full, end) by some. A tile of
    # padding sees none.
    end = tl.minimum(i_0 + BT, n) if CAUSAL else n
    end = tl.where(i_0 < n, end, 0)
    full = (tl.minimum(i_0, end) if CAUSAL else end) // BS * BS
    for MASK in tl.static_range(2):
        for c in range(full if MASK else 0, end if MASK else full, BS):
            # [BT, BS]
            b_s, b_u, _ = _products(
                c, x, y, b_xi, b_yi, s_stride_n, t_stride_n, n, D, BD, BS, MASK, WIDE, PRECISION
            )
            if S_NEGATIVE:
                b_s = -b_s
            if T_NEGATIVE:
                b_u = -b_u
            if MASK:
                o_j = c + tl.arange(0, BS)
                m_ij = (o_j < n)[None, :]
                if CAUSAL:
                    m_ij = m_ij & (o_j[None, :] <= o_i[:, None])
                b_s = tl.where(m_ij, b_s, NOTHING)
                b_u = tl.where(m_ij, b_u, NOTHING)
            s_new = tl.maximum(s_max, tl.max(b_s, 1) * s_scale)
            t_new = tl.maximum(t_max, tl.max(b_u, 1) * t_scale)
            # scale and pivot in one multiply-add
            b_s = b_s * s_scale - s_new[:, None]
            b_u = b_u * t_scale - t_new[:, None]
            # No product may stand here: fused with one of the subtractions, s_moved - t_moved would
            # miss 0 where S = U.
            s_moved = s_new - s_max
            t_moved = t_new - t_max
            b_r = tl.exp2(b_u)
            shrink = tl.exp2(-t_moved)
            # The sum in (1), of unnormalised R. Its old terms were relative to the old pivots: each
            # changes by one number, in total by that number times their weight t_sum. (At first 0
            # times a finite number.)
            b_kl = shrink * (b_kl + t_sum * (s_moved - t_moved)) + tl.sum(b_r * (b_u - b_s), 1)
            t_sum = shrink * t_sum + tl.sum(b_r, 1)
            s_sum = tl.exp2(-s_moved) * s_sum + tl.sum(tl.exp2(b_s), 1)
            s_max = s_new
            t_max = t_new
    # Equation (1): S and U stand minus their pivots; the two lse lack the same pivots, so they cancel.
    m_i = o_i < n
    s_log = tl.log2(tl.where(m_i, s_sum, 1.0))
    t_log = tl.log2(tl.where(m_i, t_sum, 1.0))
    b_kl = (b_kl / tl.where(m_i, t_sum, 1.0) + s_log - t_log) * LN2
    tl.store(kl + o_bh + o_i, tl.where(m_i, b_kl, 0.0), mask=o_i < T)
    tl.store(s_lse + o_bh + o_i, tl.where(m_i, s_max + s_log, float("inf")), mask=o_i < T)
    tl.store(t_lse + o_bh + o_i, tl.where(m_i, t_max + t_log, float("inf")), mask=o_i < T)


@triton.jit
def _row_number(p, o_n, n, other: tl.constexpr, MASK: tl.constexpr):
    """One number a row; `other` from row n on (MASK)."""
    return tl.load(p + o_n, mask=o_n < n, other=other) if MASK else tl.load(p + o_n)


@triton.jit(do_not_specialize=["T", "H", "HEADS"])
def _backward_kernel(
    x, y, s_lse, t_lse, w, w_max, dx, lengths, s_scale, t_scale, x_scale,
    s_stride_b, s_stride_h, s_stride_n, t_stride_b, t_stride_h, t_stride_n, d_stride_b, d_stride_h, d_stride_n,
    T, H, HEADS, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows i_0 .. i_0 + BT of one head's dL/dx (3), from all columns.

    x, y, dx: [B, H, T, D]; s_lse, t_lse (base 2), w: [B, H, T] float32; w_max: [] or None; lengths:
    [B] integers or None.
    """
    i_b, i_h, o_bh, i_0, n = _place(T, H, HEADS, lengths, BT)
    x += i_b * s_stride_b + i_h * s_stride_h
    y += i_b * t_stride_b + i_h * t_stride_h
    s_lse += o_bh
    t_lse += o_bh
    w += o_bh
    o_n = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    o_i = i_0 + o_n
    # [BT, BD]
    b_xi = _load(x + _start(i_0, s_stride_n, True), o_n, o_d, s_stride_n, n - i_0, D, True)
    b_yi = _load(y + _start(i_0, t_stride_n, True), o_n, o_d, t_stride_n, n - i_0, D, True)
    # [BT]; rows past n say "sees nothing"
    s_lse_i = _row_number(s_lse, o_i, n, float("inf"), True)
    t_lse_i = _row_number(t_lse, o_i, n, float("inf"), True)
    w_i = _row_number(w, o_i, n, 0.0, True)
    b_dx = tl.zeros([BT, BD], tl.float32)
    # Ranges of columns, those of odd number under masks. Causal: 0 left of the diagonal, 1 across
    # it, 2 right of it, 3 the last, ragged tile. Not causal: 0 whole tiles, 1 the ragged one.
    end = tl.where(i_0 < n, n, 0)
    left = (tl.minimum(i_0, end) if CAUSAL else end) // BS * BS
    right = tl.minimum(tl.cdiv(i_0 + BT, BS) * BS, end) if CAUSAL else end
    whole = tl.maximum(end // BS * BS, right)
    for PART in tl.static_range(4 if CAUSAL else 2):
        start = 0 if PART == 0 else (left if PART == 1 else (right if PART == 2 else whole))
        stop = left if PART == 0 else (right if PART == 1 else (whole if PART == 2 else end))
        for c in range(start, stop, BS):
            o_j = c + tl.arange(0, BS)
            # [BT, BS], the same products as in the forward
            b_s, b_u, b_xj = _products(
                c, x, y, b_xi, b_yi, s_stride_n, t_stride_n, n, D, BD, BS, PART % 2 == 1, WIDE, PRECISION
            )  # fmt: skip
            b_s *= s_scale
            b_u *= t_scale
            if PART < 2:  # G_ij, equation (2)
                b_g = w_i[:, None] * (
                    tl.exp2(b_s - s_lse_i[:, None]) - tl.exp2(b_u - t_lse_i[:, None])
                )
                if PART % 2 == 1:
                    m_ij = (o_j < n)[None, :]
                    if CAUSAL:
                        m_ij = m_ij & (o_j[None, :] <= o_i[:, None])
                    b_g = tl.where(m_ij, b_g, 0.0)
            if PART > 0 or not CAUSAL:  # G_ji; past n the statistics make it 0
                # [BS]
                s_lse_j = _row_number(s_lse, o_j, n, float("inf"), PART % 2 == 1)
                t_lse_j = _row_number(t_lse, o_j, n, float("inf"), PART % 2 == 1)
                w_j = _row_number(w, o_j, n, 0.0, PART % 2 == 1)
                # [BT, BS]
                b_h = w_j[None, :] * (
                    tl.exp2(b_s - s_lse_j[None, :]) - tl.exp2(b_u - t_lse_j[None, :])
                )
                if CAUSAL and PART == 1:
                    b_h = tl.where(o_i[:, None] <= o_j[None, :], b_h, 0.0)
                b_g = b_g + b_h if PART < 2 else b_h
            # [BT, BS] @ [BS, BD] -> [BT, BD], equation (3)
            b_dx = tl.dot(b_g.to(b_xj.dtype), b_xj, b_dx, input_precision=PRECISION)
    b_dx *= x_scale
    if w_max is not None:
        b_dx *= tl.load(w_max)
    b_dx = tl.where((o_i < n)[:, None], b_dx, 0.0).to(dx.dtype.element_ty)
    dx += i_b * d_stride_b + i_h * d_stride_h + _start(i_0, d_stride_n, True)
    tl.store(
        dx + o_n[:, None] * d_stride_n + o_d[None, :],
        b_dx,
        mask=(o_i < T)[:, None] & (o_d < D)[None, :],
    )


# Chips by what a block may use, in the order they are tried: name, compute capability majors, bytes
# of shared memory.
CHIPS = (
    ("h100", (9, 10), 232448),
    ("a100", (8, 9, 10, 11, 12), 166912),
    ("small", (8, 9, 10, 11, 12), SHARED_MEMORY),
)
# (largest D, tile). "Timed" was measured on an H200, torch 2.11, Triton 3.6, bf16, causal (LOG.md
# has what others took). The others were chosen by what the compiler reports (they fit, and spill
# nothing or a few bytes: tests/test_kernel.py prints it); no one has timed them.
# fmt: off
TILES = {
    ("h100", "forward"): ((64, Tile(64, 64, 4, 3)),       # timed
                          (128, Tile(128, 128, 8, 2)),    # timed
                          (256, Tile(128, 32, 8, 2))),
    ("h100", "backward"): ((64, Tile(64, 64, 4, 3)),      # timed
                           (128, Tile(128, 64, 8, 3)),    # timed
                           (256, Tile(128, 32, 8, 2))),
    ("a100", "forward"): ((128, Tile(128, 64, 8, 2)),     # 128 x 128 spills 88 bytes
                          (256, Tile(64, 64, 8, 2))),
    ("a100", "backward"): ((128, Tile(128, 64, 8, 3)), (256, Tile(64, 32, 8, 2))),
    ("small", "forward"): ((128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 4, 2))),
    ("small", "backward"): ((128, Tile(128, 32, 8, 2)), (256, Tile(64, 32, 8, 1))),
}
# fmt: on
# IEEE float32 products run on the ordinary cores, with whole rows of the operands in registers: few
# results a thread.
FLOAT_TILES = ((64, Tile(64, 32, 8, 2)), (128, Tile(32, 32, 16, 1)), (256, Tile(16, 16, 8, 1)))


@functools.cache
def tile(
    direction: str, D: int, dtype: torch.dtype, capability: tuple[int, int], shared: int
) -> Tile:
    """The tile for "forward" or "backward" on a chip of this compute capability with `shared` bytes
    for a block. Raises ValueError for a chip that has none.
    """
    chips = [name for name, majors, needed in CHIPS if capability[0] in majors and shared >= needed]
    if not chips:
        raise ValueError(
            f"no tile for compute capability {capability} with {shared} bytes of shared memory a block"
        )
    rows = FLOAT_TILES if dtype == torch.float32 else TILES[chips[0], direction]
    return next(tile for largest, tile in rows if largest >= D)


def unsupported(x: Tensor) -> str | None:
    """Why a loss of x [B, H, T, D] cannot go to the kernel, in a sentence; None if it can."""
    if not 16 <= x.shape[-1] <= 256:
        return f"the Triton kernel takes a head dimension D from 16 to 256, not {x.shape[-1]}"
    return refusal(x.device, x.dtype)


def _constants(direction: str, x: Tensor, y: Tensor, dtype: torch.dtype, causal: bool) -> dict:
    """What the compiler must know, in the kernels' order, and the launch's warps and stages.

    x, y: as the kernel gets them.
    """
    D = x.shape[-1]
    BT, BS, num_warps, num_stages = tile(direction, D, dtype, *chip(x.device))
    if direction == "backward" and not causal:
        # with 3, Triton 3.6 waits after every tensor-core instruction (C7515)
        num_stages = min(num_stages, 2)
    # torch's own switch
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D": D, "BD": 1 << (D - 1).bit_length(), "BT": BT, "BS": BS, "CAUSAL": causal,
        "WIDE": (x.shape[2] + BS) * max(x.stride(2), y.stride(2)) >= 2**31, "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def _launch(kernel, tensors: tuple, scales: tuple, strides: tuple, signs: tuple, constants: dict):
    """The kernel on all rows of x, the first of `tensors`."""
    x = tensors[0]
    B, H, T, D = x.shape
    *known, num_warps, num_stages = constants.values()
    heads = max(1, min(B * H, GROUP_BYTES // (2 * T * D * x.element_size())))
    arguments = (*tensors, *scales, *strides, T, H, heads, *known, *signs)
    dtypes = [t if t is None else t.dtype for t in tensors]
    key = (*strides, *known, *signs, num_warps, num_stages, *dtypes)
    there = tuple(t for t in tensors if t is not None)
    grid = -(-T // constants["BT"]) * B * H, 1, 1
    launch(
        kernel, x.device, grid, arguments, there, key, num_warps=num_warps, num_stages=num_stages
    )


def _widened(x: Tensor) -> Tensor:
    """Triton's interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584):
    float32 there.
    """
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def forward(x, y, s_scale, t_scale, causal, lengths):
    """KL in nats, lse(S) and lse(U) in base 2: three [B, H, T] float32.

    Nothing here waits for the GPU.
    """
    dtype, x, y, numbers = x.dtype, _widened(x), _widened(y), row_numbers(x)
    _launch(
        _forward_kernel, (x, y, *numbers, lengths), (abs(s_scale) * LOG2E, abs(t_scale) * LOG2E),
        x.stride()[:3] + y.stride()[:3], (s_scale < 0, t_scale < 0), _constants("forward", x, y, dtype, causal),
    )  # fmt: skip
    return numbers


def backward(w, s_lse, t_lse, x, y, s_scale, t_scale, causal, lengths):
    """dL/dx [B, H, T, D], in x's own layout where x is dense."""
    w_max = None
    if x.dtype == torch.float16:
        # A mean over many rows makes w ~ 1e-6, and G would underflow float16: the kernel gets w /
        # max |w|, and max |w|.
        w = torch.where(s_lse.isfinite(), w, 0.0)
        w_max = w.abs().amax()
        w = w / torch.where(w_max > 0, w_max, 1.0)
    dtype, x, y = x.dtype, _widened(x), _widened(y)
    dx = torch.empty_like(x)
    _launch(
        _backward_kernel, (x, y, s_lse, t_lse, w.contiguous(), w_max, dx, lengths),
        (s_scale * LOG2E, t_scale * LOG2E, float(s_scale)), x.stride()[:3] + y.stride()[:3] + dx.stride()[:3], (),
        _constants("backward", x, y, dtype, causal),
    )  # fmt: skip
    return dx if dx.dtype == dtype else dx.to(dtype)


LOSS = Loss("relation_kl", forward, backward)
_forward, _backward = LOSS.operator, LOSS.operator_backward


def relation_kl_triton(
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

    Any strides are read in place as long as D is contiguous; otherwise a contiguous copy is made.
    """
    if reason := unsupported(student):
        raise ValueError(reason)
    # A tile's own offsets are 32 bits wide: 256 rows of less than 2^23 elements.
    if student.stride(-1) != 1 or student.stride(-2) >= 2**23:
        student = student.contiguous()
    if teacher.stride(-1) != 1 or teacher.stride(-2) >= 2**23:
        teacher = teacher.contiguous()
    if lengths is not None:
        lengths = lengths.to(student.device, non_blocking=True).contiguous()
    return LOSS(student, teacher, scale, teacher_scale, causal, lengths, kept)


# ---- the check of `python kernel_triton.py`

# Relative error of the gradient that it allows. float32: scores of about 10, off by 2^-24 of
# themselves, grown by the cancellation in P - R: 3e-5 under the interpreter. The others round G
# once and dL/dx once: 2.5e-3 in bfloat16.
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def _definition(x: Tensor, y: Tensor, causal: bool, lengths: Tensor | None) -> Tensor:
    """The definition in float64, as on a blackboard."""
    T, a = x.shape[2], x.shape[3] ** -0.5
    seen = torch.ones(T, T, dtype=torch.bool, device=x.device)
    seen = (seen.tril() if causal else seen)[None, None]
    if lengths is not None:
        real = (torch.arange(T, device=x.device) < lengths[:, None])[:, None]
        seen = seen & real[..., None] & real[..., None, :]
    hidden = torch.where(seen.any(-1, keepdim=True), float("-inf"), 0.0).double()
    log_p, log_r = (torch.where(seen, a * z @ z.mT, hidden).log_softmax(-1) for z in (x, y))
    return torch.where(seen, log_r.exp() * (log_r - log_p), 0.0).sum(-1)


def _check(
    dtype: torch.dtype, shape: tuple[int, ...], causal: bool, padded: bool, device: str
) -> bool:
    """Prints the errors against the float64 definition and the time of one call; False if an error
    is too large.
    """
    B, H, T, D = shape
    lengths = torch.arange(B, device=device) * T // B if padded else None
    x, y = (torch.randn(shape, device=device).to(dtype).requires_grad_(k == 0) for k in range(2))
    w = torch.rand(B, H, T, device=device)
    for _ in range(2 if x.is_cuda else 1):  # on a GPU the first call compiles
        start = time.perf_counter()
        kl = relation_kl_triton(x, y, D**-0.5, D**-0.5, causal, lengths)
        (dx,) = torch.autograd.grad(kl, x, w)
        if x.is_cuda:
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - start)
    wide = x.detach().double().requires_grad_()
    true = _definition(wide, y.double(), causal, lengths)
    (true_dx,) = torch.autograd.grad(true, wide, w.double())
    loss = ((kl - true).abs().max() / true.abs().max().clamp(min=1)).item()
    gradient = ((dx - true_dx).norm() / true_dx.norm().clamp(min=1e-3)).item()
    ok = loss <= 1e-5 and gradient <= ALLOWED[dtype]  # False for NaN too
    case = f"{str(dtype)[6:]:9}{shape!s:18}{'causal' if causal else 'full':8}{'padded' if padded else '':8}"
    print(
        f"{case}{loss:10.1e}{gradient:10.1e}{ALLOWED[dtype]:10.1e}{ms:10.2f}{'' if ok else '  FAILED'}",
        flush=True,
    )
    return ok


if __name__ == "__main__":
    torch.manual_seed(0)
    print(
        f"Triton {triton.__version__} on {'its interpreter' if INTERPRETED else torch.cuda.get_device_name()}"
    )
    print(
        f"{'dtype':9}{'B, H, T, D':18}{'mask':16}{'loss err':>10}{'grad err':>10}{'allowed':>10}{'ms':>10}"
    )
    shapes = [(1, 1, 1, 16), (2, 2, 63, 80), (1, 2, 257, 64)]
    if not INTERPRETED:
        shapes += [(2, 3, 1000, 96), (1, 2, 2048, 128), (1, 1, 4096, 256)]
    cases = itertools.product(ALLOWED, shapes, (True, False), (False, True))
    good = [_check(*case, device="cpu" if INTERPRETED else "cuda") for case in cases]
    sys.exit(0 if all(good) else 1)
