"""What stands between a layer's products, element by element, as one Triton kernel each.

What.  Norms, the MLP's gate and the rotation of q and k do a few operations per number. A GPU waits
for memory there: PyTorch reads and writes the whole tensor once per operator, some of them in
float32. Here each reads its inputs once and writes its results once, and what is between stays in
registers, in float32. model.py and rope.py have the definitions, which run wherever these kernels
do not.

    norm      y  = w * round(x r)                    r = (mean x^2 + eps)^-1/2, a row at a time
              dx = r (g - n mean(g n))               g = w dy, n = x r
    gate      y  = silu(a) b = a s b                 s = 1 / (1 + e^-a)
              da = dy b s (1 + a (1 - s)),  db = dy a s
    rotation  y1 = x1 c1 - x2 s1,  y2 = x2 c2 + x1 s2      x1, x2: the halves of a head's vector
              dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1     the transpose: the same kernel

What it saves.  Passes over memory, one of a bfloat16 tensor as the unit, and milliseconds of a call,
eager PyTorch -> kernel (LLaMA-2 7B at 16,384 tokens, H100, torch 2.11, commit 8df911b):

              a unit               forward                    backward
    norms     134 MB, 2 a layer    18 -> 2, 1.07 -> 0.14 ms   34 -> 3, 2.27 -> 0.24 ms
    rotation  134 MB, q and k      10 -> 2, 0.94 -> 0.17 ms   17 -> 2, 1.23 -> 0.23 ms
    gate      361 MB                5 -> 3, 0.61 -> 0.41 ms    9 -> 5, 1.13 -> 0.73 ms

In 32 layers, each computed twice, that is 249 + 162 + 25 = 436 ms; a step of stage 2 became 425 ms
shorter (2.14 -> 1.71 s). By passes alone, at 3.35 TB/s, it would be 268: eager's norms and rotation
reach but 1.4 to 2.3 TB/s. The kernels reach 1.2 (rotation backward) to 2.7 (gate). Memory is saved
too: no norm's input in float32 and no silu(a) is kept for the backward.

Names.  p_ pointers, o_ offsets, m_ a mask; BT rows of a program's tile, BC its columns. Offsets are
64 bits wide: 512K tokens of an MLP's 11,008 numbers are more than 2^31.

Limits.  First derivatives; the weight of a norm must be frozen. float16, bfloat16, float32 on a GPU
that kernel_triton.py takes. One program holds a norm's row whole: 11,008 numbers is the most that
was tried.

Source.  The transposes follow from the definitions; tests/test_glue.py holds all of it to float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_host import launch

TILE = 4096  # numbers in a program's tile


@triton.jit
def _norm_forward_kernel(p_x, p_w, p_y, rows, width, eps, BT: tl.constexpr, BC: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_col = tl.arange(0, BC)
    o = o_row[:, None] * width + o_col[None, :]  # [BT, BC]
    m = (o_row < rows)[:, None] & (o_col < width)[None, :]
    x = tl.load(p_x + o, m, 0.0).to(tl.float32)
    low = p_y.dtype.element_ty
    w = tl.load(p_w + o_col, o_col < width, 0.0).to(low).to(tl.float32)  # [BC]
    r = tl.rsqrt(tl.sum(x * x, 1) / width + eps)  # [BT]
    n = (x * r[:, None]).to(low).to(tl.float32)  # rounded first: so does every LLaMA
    tl.store(p_y + o, (n * w[None, :]).to(low), m)


@triton.jit
def _norm_backward_kernel(
    p_x, p_w, p_dy, p_dx, rows, width, eps, BT: tl.constexpr, BC: tl.constexpr
):
    o_row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_col = tl.arange(0, BC)
    o = o_row[:, None] * width + o_col[None, :]  # [BT, BC]
    m = (o_row < rows)[:, None] & (o_col < width)[None, :]
    x = tl.load(p_x + o, m, 0.0).to(tl.float32)
    dy = tl.load(p_dy + o, m, 0.0).to(tl.float32)
    w = tl.load(p_w + o_col, o_col < width, 0.0).to(p_x.dtype.element_ty).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]  # again: the row is here
    g, n = dy * w[None, :], x * r
    dx = r * (g - n * (tl.sum(g * n, 1) / width)[:, None])
    tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), m)


@triton.jit
def _gate_forward_kernel(p_a, p_b, p_y, numbers, BC: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    a = tl.load(p_a + o, o < numbers, 0.0).to(tl.float32)
    b = tl.load(p_b + o, o < numbers, 0.0).to(tl.float32)
    tl.store(p_y + o, (a * tl.sigmoid(a) * b).to(p_y.dtype.element_ty), o < numbers)


@triton.jit
def _gate_backward_kernel(p_a, p_b, p_dy, p_da, p_db, numbers, BC: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    a = tl.load(p_a + o, o < numbers, 0.0).to(tl.float32)
    b = tl.load(p_b + o, o < numbers, 0.0).to(tl.float32)
    dy = tl.load(p_dy + o, o < numbers, 0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(p_da + o, (dy * b * s * (1 + a * (1 - s))).to(p_da.dtype.element_ty), o < numbers)
    tl.store(p_db + o, (dy * a * s).to(p_db.dtype.element_ty), o < numbers)


@triton.jit
def _rotation_kernel(
    p_x,
    p_cos,
    p_sin,
    p_y,
    rows,
    H,
    T,
    half,
    x_b,
    x_h,
    x_t,
    cos_b,
    BACKWARD: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Rows are vectors [D] of B T H, heads fastest; x_b, x_h, x_t, cos_b: strides. y [B, T, H, D]."""
    o_row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_col = tl.arange(0, BC)
    m = (o_row < rows)[:, None] & (o_col < half)[None, :]  # [BT, BC]
    token, i_b = o_row // H % T, o_row // H // T
    o_x = (i_b * x_b + o_row % H * x_h + token * x_t)[:, None] + o_col[None, :]
    o_y = (o_row * 2 * half)[:, None] + o_col[None, :]
    o_cos = (i_b * cos_b + token * 2 * half)[:, None] + o_col[None, :]
    x1 = tl.load(p_x + o_x, m, 0.0).to(tl.float32)
    x2 = tl.load(p_x + o_x + half, m, 0.0).to(tl.float32)
    c1 = tl.load(p_cos + o_cos, m, 0.0).to(tl.float32)
    c2 = tl.load(p_cos + o_cos + half, m, 0.0).to(tl.float32)
    s1 = tl.load(p_sin + o_cos, m, 0.0).to(tl.float32)
    s2 = tl.load(p_sin + o_cos + half, m, 0.0).to(tl.float32)
    if BACKWARD:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    tl.store(p_y + o_y, y1.to(p_y.dtype.element_ty), m)
    tl.store(p_y + o_y + half, y2.to(p_y.dtype.element_ty), m)


# ---- launches


def _tile(width: int) -> dict:
    """Rows and columns of a tile over rows of `width` numbers, and its warps."""
    BC = triton.next_power_of_2(width)
    return {"BT": max(1, TILE // BC), "BC": BC, "num_warps": min(16, max(4, BC // 512))}


def _launch(kernel, programs: int, tensors: tuple, numbers: tuple, constants: dict) -> None:
    """kernel(*tensors, *numbers, *constants), but for num_warps, the last of `constants`.

    The compiler looks at numbers too: reads are wide where rows begin at multiples of 16.
    """
    *known, num_warps = constants.values()
    key = (*(t.dtype for t in tensors), *numbers, *constants.values())
    arguments, grid = (*tensors, *numbers, *known), (programs, 1, 1)
    launch(kernel, tensors[0].device, grid, arguments, tensors, key, num_warps=num_warps)


def _launch_norm(kernel, tensors: tuple, eps: float) -> None:
    width = tensors[0].shape[-1]
    rows, tile = tensors[0].numel() // width, _tile(width)
    _launch(kernel, triton.cdiv(rows, tile["BT"]), tensors, (rows, width, eps), tile)


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] contiguous, weight [width] -> as model.RMSNorm."""
    y = torch.empty_like(x)
    _launch_norm(_norm_forward_kernel, (x, weight, y), eps)
    return y


def norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor) -> Tensor:
    """x and dy [..., width] contiguous -> dL/dx."""
    dx = torch.empty_like(x)
    _launch_norm(_norm_backward_kernel, (x, weight, dy, dx), eps)
    return dx


def _launch_gate(kernel, *tensors: Tensor) -> None:
    numbers, tile = tensors[0].numel(), {"BC": TILE // 2, "num_warps": 4}
    _launch(kernel, triton.cdiv(numbers, tile["BC"]), tensors, (numbers,), tile)


def gate_forward(a: Tensor, b: Tensor) -> Tensor:
    """a and b [..., width] contiguous -> silu(a) b."""
    y = torch.empty_like(a)
    _launch_gate(_gate_forward_kernel, a, b, y)
    return y


def gate_backward(a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """a, b and dy [..., width] contiguous -> dL/da, dL/db."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    _launch_gate(_gate_backward_kernel, a, b, dy, da, db)
    return da, db


def rotation(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """x [B, H, T, D] turned, or turned back by the transpose; [B, T, H, D] in memory.

    cos and sin [T, D] or [B, 1, T, D], contiguous, in x's dtype.
    """
    B, H, T, D = x.shape
    shapes = x.shape, cos.shape, sin.shape
    assert cos.shape == sin.shape and cos.shape in ((T, D), (B, 1, T, D)), shapes
    if x.stride(-1) != 1:
        x = x.contiguous()
    y, tile = x.new_empty(B, T, H, D), _tile(D // 2)
    tile["BT"] = max(1, tile["BT"] // 2)  # two halves
    numbers = B * T * H, H, T, D // 2, *x.stride()[:3], T * D if cos.dim() == 4 else 0
    programs = triton.cdiv(B * T * H, tile["BT"])
    _launch(_rotation_kernel, programs, (x, cos, sin, y), numbers, {"BACKWARD": backward, **tile})
    return y.transpose(1, 2)


# ---- as differentiable functions


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        assert not weight.requires_grad, "the kernels have no gradient for a norm's weight"
        x = x.contiguous()
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return norm_forward(x, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return norm_backward(x, weight, ctx.eps, dy.contiguous()), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return gate_forward(a, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return gate_backward(*ctx.saved_tensors, dy.contiguous())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotation(x, cos, sin, backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return rotation(dy, *ctx.saved_tensors, backward=True), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """model.RMSNorm of x [..., width] by a weight [width] that does not learn."""
    return _Norm.apply(x, weight, eps)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, of [..., width] each."""
    return _Gate.apply(a, b)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.rotate of x [B, H, T, D]; cos and sin [T, D] or [B, 1, T, D], in x's dtype."""
    return _Rotation.apply(x, cos.contiguous(), sin.contiguous())
