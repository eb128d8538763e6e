"""The loss of relation_kl.py as a CPU computes it fastest: strips of scores that stay in its cache.

What.  relation_kl.py derives the formulas; its numbers (1), (2) and (3) are used below. A strip is
BT whole rows of S and of U, for a few heads at once, up to the diagonal:

    for each strip:   S = a x_i x^T, U = b y_i y^T            two products
        forward       pivot and sum of every row; KL (1)
        backward      G (2); dx_j += G^T x_i, dx_i += G x     two products more, (3)

Rows are whole, so that a row's pivot and sums are known after one look, and nothing is rescaled.
The forward keeps them, four numbers a row; the backward recomputes the strip, unless T <= KEPT:
then the forward keeps G as well.

How it is fast.  Beside the products, time goes into moving numbers, so each one is moved little:

    cache        a strip has so many heads that it fills each core's cache and no more (CELLS)
    workspace    three matrices of one strip are allocated once; every step writes into one of them,
                 and the next strip overwrites them. New memory would cost a page fault per 4 KiB
    bits         the scale is multiplied by log2 e: exp2 is what a machine computes
    few masks    only a strip's last columns cross the diagonal: a triangle of HIDDEN is added there.
                 Padded rows of x and y are set to 0: then S = U, and KL and G are 0. Only where not
                 causal do real rows see padded columns, which get HIDDEN
    G            with e = exp2(S - pivot) and f = exp2(U - pivot), sums over a row,
                 G = w / sum(e) (e - f sum(e) / sum(f)). The factor in front is one per row, and is
                 applied to D numbers instead of to T
    kept G       where T <= KEPT, e - f sum(e) / sum(f) is kept for the backward
    subnormals   are not left to compute with: see _exp2

Why pivots and sums are kept, and not their lse, as the GPU kernels do: the pivot is exact, and what
is rounded is small. Student and teacher are treated alike in every step, so that a student equal to
its teacher costs exactly 0, with a gradient of exactly 0.

Limits.  Plain torch: it runs on any device, also on a GPU that lacks Triton, but is meant for a
CPU. First derivatives only.

Source.  LinearARD, arXiv 2604.00004; strips made twice: FlashAttention, arXiv 2205.14135. What each
measure brought stands in LOG.md, under the loss on a CPU.
"""

import itertools
import math

import torch
from torch import Tensor

# Rows of a strip. With 64, 96, 128, 192 and 256 rows forward + backward take 43, 39, 37, 38 and 44
# ms at 1 x 2048 x 64, and 28, 30, 30, 32 and 32 ms at 9 x 512 x 64: float32, one core of an AMD
# EPYC (Zen 3: AVX2, 512 KiB of L2), torch 2.13.
BT = 128
CELLS = {"cpu": 2**17}  # scores in a strip, over all its heads, for each thread: a core's cache
KEPT = 512  # up to this T the forward keeps G for the backward: at most KEPT numbers a row
MANY_CELLS = 2**24  # elsewhere: enough to fill a GPU; 64 MiB in float32
HIDDEN = -1e30  # the score of an unseen pair: exp2 gives 0, and differences stay finite
FLOOR = -100.0  # 2^-100 of a row's largest term counts as 0: see _exp2


def relation_kl_cpu(
    student: Tensor,
    teacher: Tensor,
    scale: float,
    teacher_scale: float,
    causal: bool,
    lengths: Tensor | None,
    kept: list | None = None,
) -> Tensor:
    """KL(teacher || student) of every row, [B, H, T], from relation_kl.relation_kl's arguments after
    its checks; float32, or float64 for float64 input.
    """
    return _Function.apply(student, teacher, scale, teacher_scale, causal, lengths, kept)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, teacher_scale, causal, lengths, kept):
        ctx.arguments = (scale, teacher_scale, causal)
        short = kept is None and x.device.type == "cpu" and ctx.needs_input_grad[0]
        numbers = kept or _forward(x, y, *ctx.arguments, lengths, short)
        ctx.save_for_backward(x, y, lengths, *numbers[1:])
        if kept is None:
            return numbers[0]
        kept[:] = numbers
        return kept[0].clone()  # the caller may change it in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        x, y, lengths, *numbers = ctx.saved_tensors
        return _backward(w, x, y, *ctx.arguments, lengths, *numbers), *[None] * 6


def _forward(x, y, scale, teacher_scale, causal, lengths, short) -> tuple:
    """KL [B, H, T], and what the backward needs: pivots and sums of exponentials [2, BH, T, 1], of
    S and of U; if `short` and T <= KEPT, of each strip g = G sum(e) / w, [h, <=BT, n].
    """
    B, H, T, _ = x.shape
    x, y, padding = _operands(x, y, lengths)
    kl, pivots, sums = (x.new_empty(k, B * H, T, 1) for k in (1, 2, 2))
    g = []
    for heads, rows, scores, spare in _strips(x, y, padding, scale, teacher_scale, causal):
        s, u = scores
        scores.sub_(torch.amax(scores, -1, keepdim=True, out=pivots[:, heads, rows]))
        terms = torch.sub(u, s, out=spare)
        _exp2(s, s), _exp2(u, u)  # not as one: an element's last bit depends on its place
        torch.sum(scores, -1, keepdim=True, out=sums[:, heads, rows])
        torch.sum(terms.mul_(u), -1, keepdim=True, out=kl[0, heads, rows])
        if short and T <= KEPT:
            ratio = sums[0, heads, rows] / sums[1, heads, rows]
            g.append(torch.addcmul(s, u, ratio, value=-1))
    sum_s, sum_u = sums.unbind()
    # (1) for scores relative to their pivots: from the raw ones' lse large numbers would cancel
    kl = kl.div_(sum_u).add_((sum_s / sum_u).log2_()).mul_(math.log(2))
    return kl.view(B, H, T), pivots, sums, *g


def _backward(w, x, y, scale, teacher_scale, causal, lengths, pivots, sums, *kept) -> Tensor:
    """dL/dx [B, H, T, D] from w = dL/dKL [B, H, T] and what `_forward` kept."""
    shape, dtype = x.shape, x.dtype
    x, y, padding = _operands(x, y, lengths)
    # G (2) is g times a factor per row, which is cheaper on D numbers than on n
    factor = (scale * w).to(x.dtype).reshape(-1, shape[2], 1) / sums[0]
    dx, weighted, ratio = torch.zeros_like(x), factor * x, sums[0] / sums[1]
    strips = _strips(x, y, padding, scale, teacher_scale, causal, scored=not kept)
    for k, (heads, rows, scores, _) in enumerate(strips):
        if kept:
            g = kept[k]
        else:
            s, u = scores.sub_(pivots[:, heads, rows])
            _exp2(s, s), _exp2(u, u)
            g = s.addcmul_(u, ratio[heads, rows], value=-1)
        n = g.shape[-1]
        dx[heads, :n].baddbmm_(g.mT, weighted[heads, rows])  # column i of G
        row = dx.new_empty(*g.shape[:2], shape[3])
        torch.bmm(g, x[heads, :n], out=row)
        dx[heads, rows].addcmul_(factor[heads, rows], row)  # row i of G
    return dx.view(shape).to(dtype)


def numbers_kept(T: int) -> int:
    """How many numbers per head the forward of a causal loss over T tokens keeps."""
    strips = range(0, T if T <= KEPT else 0, BT)
    return 4 * T + sum(min(BT, T - start) * min(start + BT, T) for start in strips)


def _operands(x: Tensor, y: Tensor, lengths: Tensor | None):
    """x and y [BH, T, D], float32 or float64, padding zeroed; where padding is [BH, T], or None."""
    B, H, T, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.reshape(B * H, T, D).to(wide), y.reshape(B * H, T, D).to(wide)
    if lengths is None:
        return x, y, None
    padding = torch.arange(T, device=x.device) >= lengths.to(x.device)[:, None]
    padding = padding.repeat_interleave(H, 0)
    return *(z.masked_fill(padding[..., None], 0.0) for z in (x, y)), padding


def _strips(x, y, padding, scale: float, teacher_scale: float, causal: bool, scored=True):
    """Yields (heads, rows, scores, spare) for strips of BT rows, as many heads as CELLS holds.

    heads, rows: slices of B*H and of T. scores: S and U in bits, [2, h, <=BT, n], n the columns up
    to the diagonal (T if not causal). spare: room for one more. The next strip overwrites them all.
    Both are None unless `scored`. Products are written into tensors that are there: autocast leaves
    those as they are.
    """
    BH, T, _ = x.shape
    cells = CELLS.get(x.device.type, MANY_CELLS) * torch.get_num_threads()
    h = min(BH, max(1, cells // (BT * T)))
    workspace = x.new_empty(3 * h * min(BT, T) * T)
    above = x.new_full((min(BT, T), min(BT, T)), HIDDEN).triu_(1)
    for first, start in itertools.product(range(0, BH, h), range(0, T, BT)):
        heads, rows = slice(first, first + h), slice(start, start + BT)
        if not scored:
            yield heads, rows, None, None
            continue
        x_i, y_i = x[heads, rows], y[heads, rows]
        b, n = x_i.shape[1], min(start + BT, T) if causal else T
        three = workspace[: 3 * len(x_i) * b * n].view(3, -1, b, n)
        scores, spare = three[:2], three[2]
        torch.bmm(x_i * (scale * math.log2(math.e)), x[heads, :n].mT, out=scores[0])
        torch.bmm(y_i * (teacher_scale * math.log2(math.e)), y[heads, :n].mT, out=scores[1])
        if causal:  # only the last columns cross the diagonal
            scores[..., start:].add_(above[:b, :b])
        elif padding is not None:
            scores.add_(HIDDEN * padding[heads, None].to(x.dtype))
        yield heads, rows, scores, spare


def _exp2(scores: Tensor, out: Tensor) -> Tensor:
    """2^scores into `out`; terms below 2^FLOOR of the row's largest become 0, which no sum notices.

    Left in, they would be subnormal numbers, with which many CPUs compute 100 times more slowly;
    6 % of the V/V pairs of the demo's last layer are. (torch.exp is as slow where it underflows.)
    """
    return torch.threshold(scores, FLOOR, HIDDEN, out=out).exp2_()
