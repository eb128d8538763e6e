"""The loss: how far the student's relations between tokens are from the teacher's, exactly, in
memory linear in T.

What.  A layer's queries (or keys, or values) relate every token to every other one. For one head,
with x_i the student's vector of token i, y_i the teacher's, and scales a and b (a = D^-1/2, b = a
unless told otherwise):

    S_ij = a x_i.x_j      P_ij = exp(S_ij - lse_i(S))      lse_i(S) = log sum_j exp(S_ij)
    U_ij = b y_i.y_j      R_ij = exp(U_ij - lse_i(U))

over the columns j that row i may see: j <= i if causal, j < length with `lengths`. The loss of row
i is KL(teacher || student), in nats:

    KL_i = sum_j R_ij (log R_ij - log P_ij) = sum_j R_ij (U_ij - S_ij) - lse_i(U) + lse_i(S)     (1)

Its gradient.  Only S and lse(S) depend on the student. A log-sum-exp has the softmax as its
derivative, d lse_i(S) / dS_ij = P_ij, and the sum over R gives -R_ij. With w_i the upstream
gradient of row i:

    G_ij := dL/dS_ij = w_i (P_ij - R_ij)                                                         (2)
        pytest tests/test_relation_kl.py::test_the_gradient_in_the_scores_is_P_minus_R

S_ij = a x_i.x_j holds x twice: x_i stands in row i of S as the one who looks, and in column i as
the one looked at. Token i collects both:

    dL/dx_i = a sum_j (G_ij + G_ji) x_j                                                          (3)
        pytest tests/test_relation_kl.py::test_a_token_collects_its_row_and_its_column

One visit of each pair is enough for (1).  Pieces of a row arrive one after another; for S and for U
keep the largest score so far (the pivot) and the sum of exponentials relative to it, and for (1)
the sum of exp(U - pivot) (U - S). A larger score arriving rescales the old sums by
exp(old pivot - new pivot). At the end all three terms of (1) are there:
        pytest tests/test_relation_kl.py::test_one_pass_gives_both_log_sum_exps_and_the_kl

What it does not see.  S depends on x_i.x_j alone, so one rotation of all queries, or of all keys,
changes no relation. But attention reads q_i.k_j, which changes when the two turn differently: all
three relations can be perfect and the model wrong. What sees it is the KL of the next-token
distributions, the last term of stage 1's loss (train.py):
        pytest tests/test_relation_kl.py::test_relations_do_not_see_a_rotation_that_attention_does

How it is computed.  S and U are [T, T]: 4 GiB each per head at T = 32 768 in float32. So:

    dense    the definition, with autograd: memory T^2. All others are tested against it in float64.
    tiled    strips of BT whole rows, up to the diagonal. The forward keeps two numbers per row of
             each softmax; the backward makes each strip again, forms G (2) and adds both halves of
             (3). (Where all is one strip, P - R is kept instead.) CPU and any GPU.
    triton   the same two passes as fused GPU kernels (kernel_triton.py). A tile there holds part of
             a row, so the first pass keeps lse(S) and lse(U) and the second rebuilds P and R.
    hopper   those two passes for one chip (kernel_hopper.py): products and exponentials at once.

What it costs.  The triangle has T^2 / 2 pairs, and a product over it 2 D T^2 / 2 flops per head. It
takes two forward (S, U) and four backward (S and U again, G x, G^T x): 12 D T^2 / 2. The kernels'
backward walks the whole square with three products, which makes 2 + 6 = 8 instead of 6.

Limits.  The teacher takes no gradient. First derivatives only. Padded rows give 0.

Source.  LinearARD, arXiv 2604.00004, section 3; strips of scores that are made twice:
FlashAttention, arXiv 2205.14135; the one-pass softmax: arXiv 1805.02867.
"""

import itertools
import math

import torch
import torch.utils.checkpoint
from torch import Tensor

# Rows of a strip. With 64, 96, 128, 192 and 256 rows forward + backward take 43, 39, 37, 38 and 44
# ms at 1 x 2048 x 64, and 28, 30, 30, 32 and 32 ms at 9 x 512 x 64: float32, one core of an AMD
# EPYC (Zen 3: AVX2, 512 KiB of L2), torch 2.13.
BT = 128
CELLS = {"cpu": 2**17}  # scores in a strip, over all its heads: about what a core's cache holds
MANY_CELLS = 2**24  # elsewhere: enough to fill a GPU; 64 MiB in float32
HIDDEN = -1e30  # the score of an unseen pair: exp2 gives 0, and differences stay finite
FLOOR = -100.0  # 2^-100 of a row's largest term counts as 0: see _exp2
RELATIONS = ("Q/Q", "K/K", "V/V")
IMPLEMENTATIONS = ("auto", "dense", "tiled", "triton", "hopper")


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    scale: float | None = None,
    teacher_scale: float | None = None,
    causal: bool = True,
    lengths: Tensor | None = None,
    impl: str = "auto",
    kept: list | None = None,
) -> Tensor:
    """KL(teacher || student) of every row of the self-relation softmax, equation (1), in nats.

    student, teacher: [B, H, T, D], one floating dtype and device; the teacher must not require
    grad. scale: a in the formulas, D**-0.5 if None; teacher_scale: b, `scale` if None. causal: row
    i sees j <= i, else all. lengths: [B] integers in 0..T, the tokens before padding (the range is
    not checked, which would wait for a GPU). impl: "auto", "dense", "tiled", "triton" or "hopper".
    kept: for activation checkpointing, an empty list. The call leaves its numbers per row there;
    the same call, made again in the backward, takes them from it. ("dense" computes them again.)
    float32 products use tf32 only where torch's own switch allows it. Returns [B, H, T], float32
    (float64 for float64 input), differentiable in `student`. Raises ValueError for anything else,
    naming the value. Source: arXiv 2604.00004, section 3.
    """
    _check(student, teacher, lengths, impl)
    scale = student.shape[-1] ** -0.5 if scale is None else float(scale)
    teacher_scale = scale if teacher_scale is None else float(teacher_scale)
    if not (0 < abs(scale) < math.inf and 0 < abs(teacher_scale) < math.inf):
        raise ValueError(f"scale is {scale} and teacher_scale {teacher_scale}: finite, and not 0")
    if impl == "auto":
        impl, _ = choose(student, causal, lengths, (scale, teacher_scale))
    if impl == "dense":
        return _dense(student, teacher, scale, teacher_scale, causal, lengths)
    if impl == "tiled":
        return _Tiled.apply(student, teacher, scale, teacher_scale, causal, lengths, kept)
    try:  # only here, so that machines without Triton can use the other two
        if impl == "hopper":
            from kernel_hopper import relation_kl_hopper as kernel
        else:
            from kernel_triton import relation_kl_triton as kernel
    except ImportError as e:
        raise ValueError(
            f'impl="{impl}" needs the triton package ({e}); install it, or use impl="tiled"'
        ) from None
    return kernel(student, teacher, scale, teacher_scale, causal, lengths, kept)


def choose(
    x: Tensor,
    causal: bool = True,
    lengths: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[str, str]:
    """What "auto" means for a loss of tensors like x [B, H, T, D], and why; decided here alone.

    Returns (implementation, reason): "tiled", "triton" or "hopper", and a phrase after "because".
    """
    if not x.is_cuda:
        return "tiled", f"the tensors are on {x.device.type}: the Triton kernel needs a GPU"
    try:
        import kernel_hopper
        import kernel_triton
    except ImportError as e:
        return "tiled", f"Triton cannot be imported ({e})"
    if reason := kernel_triton.unsupported(x):
        return "tiled", reason
    if reason := kernel_hopper.unsupported(x, causal, lengths, scales):
        return "triton", f"a GPU, and {x.dtype} with D = {x.shape[-1]} is supported; {reason}"
    return "hopper", "this chip has kernels of its own, which are faster (README.md)"


def keep_losses(ctx, op, *arguments, **options):
    """A policy for selective checkpointing: a loss's KL, lse(S) and lse(U) are kept.

    checkpoint(f, *args, use_reentrant=False, context_fn=lambda:
    create_selective_checkpoint_contexts(keep_losses)), both of torch.utils.checkpoint: the backward
    then does not run the GPU kernels' forward a second time. torch then looks at every operator in
    f: `kept` costs nothing of the kind.
    """
    policy = torch.utils.checkpoint.CheckpointPolicy
    is_loss = getattr(op, "namespace", "") == "linear_ard" and "backward" not in str(op)
    return policy.MUST_SAVE if is_loss else policy.PREFER_RECOMPUTE


def _check(student: Tensor, teacher: Tensor, lengths: Tensor | None, impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if student.dim() != 4 or 0 in student.shape:
        raise ValueError(f"student must be a non-empty [B, H, T, D]; got {list(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher {list(teacher.shape)} and student {list(student.shape)} must have one shape"
        )
    if not student.is_floating_point() or teacher.dtype != student.dtype:
        raise ValueError(
            f"student is {student.dtype}, teacher {teacher.dtype}: both must have one floating "
            "dtype"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"student is on {student.device}, teacher on {teacher.device}: put both on one device"
        )
    if teacher.requires_grad:
        raise ValueError(
            "the teacher requires grad, and this loss gives it none: pass teacher.detach()"
        )
    whole = lengths is None or not (lengths.is_floating_point() or lengths.dtype == torch.bool)
    if lengths is not None and (lengths.shape != student.shape[:1] or not whole):
        got = f"{list(lengths.shape)} {lengths.dtype}"
        raise ValueError(f"lengths must be [{student.shape[0]}] integers; got {got}")


def _wide(x: Tensor) -> torch.dtype:
    """What scores and sums are held in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dense(
    x: Tensor, y: Tensor, scale: float, teacher_scale: float, causal: bool, lengths: Tensor | None
) -> Tensor:
    """The definition, as on a blackboard: [B, H, T, T] matrices and plain autograd."""
    T = x.shape[2]
    i, j = torch.arange(T, device=x.device)[:, None], torch.arange(T, device=x.device)
    seen = (j <= i) if causal else torch.ones(T, T, dtype=torch.bool, device=x.device)
    if lengths is not None:
        n = lengths.to(x.device)[:, None, None, None]
        seen = seen & (i < n) & (j < n)  # [B, 1, T, T]
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(_wide(x)), y.to(_wide(x))
        # A row that sees nothing gets finite scores, so that no NaN arises; its terms are dropped.
        hidden = torch.where(seen.any(-1, keepdim=True), float("-inf"), 0.0).to(x.dtype)
        log_p = torch.where(seen, scale * (x @ x.mT), hidden).log_softmax(-1)
        log_r = torch.where(seen, teacher_scale * (y @ y.mT), hidden).log_softmax(-1)
        terms = log_r.exp() * (log_r - log_p)  # NaN where unseen (-inf + inf): dropped
        return torch.where(seen, terms, 0.0).sum(-1)


class _Tiled(torch.autograd.Function):
    """Equations (1) to (3), strip by strip; scores are in bits: exp2 is what a machine computes.

    Products are written into tensors that are there: autocast leaves those as they are.
    """

    @staticmethod
    def forward(ctx, x, y, scale, teacher_scale, causal, lengths, kept):
        ctx.arguments = (scale, teacher_scale, causal)
        numbers = kept or _numbers(x, y, *ctx.arguments, lengths, short=kept is None)
        ctx.save_for_backward(x, y, lengths, *numbers[1:])
        if kept is None:
            return numbers[0]
        kept[:] = numbers
        return kept[0].clone()  # the caller may change it in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        x, y, lengths, pivots, sums, g = ctx.saved_tensors
        shape, dtype = x.shape, x.dtype
        x, y, padding = _operands(x, y, lengths)
        # G (2) is g times a factor per row, which is cheaper on D numbers than on n
        factor = (ctx.arguments[0] * w).to(x.dtype).reshape(-1, shape[2], 1) / sums[0]
        dx = torch.zeros_like(x)

        def collect(heads, rows, g):
            x_i, f, n = x[heads, rows], factor[heads, rows], g.shape[-1]
            dx[heads, :n].baddbmm_(g.mT, f * x_i)  # column i of G
            row = torch.bmm(g, x[heads, :n], out=torch.empty_like(x_i))
            dx[heads, rows].addcmul_(f, row)  # row i of G

        if g is not None:
            collect(slice(None), slice(None), g)
        else:
            ratio = sums[0] / sums[1]
            for heads, rows, both, s, u, _ in _strips(x, y, padding, *ctx.arguments):
                both.sub_(pivots[:, heads, rows])
                _exp2(s, s), _exp2(u, u)
                collect(heads, rows, s.addcmul_(u, ratio[heads, rows], value=-1))
        return dx.view(shape).to(dtype), *[None] * 6


def _numbers(x, y, scale, teacher_scale, causal, lengths, short) -> tuple:
    """KL [B, H, T], and what the backward needs: pivots and sums of exponentials [2, BH, T, 1], of
    S and of U; g [BH, T, T] = P - R times the sums of S, if `short` and T <= BT, else None.
    """
    B, H, T, _ = x.shape
    x, y, padding = _operands(x, y, lengths)
    kl, pivots, sums = (x.new_empty(k, B * H, T, 1) for k in (1, 2, 2))
    g = x.new_empty(B * H, T, T) if short and T <= BT else None
    for heads, rows, both, s, u, room in _strips(x, y, padding, scale, teacher_scale, causal):
        both.sub_(torch.amax(both, -1, keepdim=True, out=pivots[:, heads, rows]))
        terms = torch.sub(u, s, out=room)
        _exp2(s, s), _exp2(u, u)  # not as one: an element's last bit depends on its place
        torch.sum(both, -1, keepdim=True, out=sums[:, heads, rows])
        torch.sum(terms.mul_(u), -1, keepdim=True, out=kl[0, heads, rows])
        if g is not None:
            torch.addcmul(s, u, sums[0, heads] / sums[1, heads], value=-1, out=g[heads])
    sum_s, sum_u = sums.unbind()
    # (1) for scores relative to their pivots: from the raw ones' lse large numbers would cancel
    kl = kl.div_(sum_u).add_((sum_s / sum_u).log2_()).mul_(math.log(2))
    return kl.view(B, H, T), pivots, sums, g


def _operands(x: Tensor, y: Tensor, lengths: Tensor | None):
    """x and y [BH, T, D], wide, padding zeroed; where padding is [BH, T], or None."""
    B, H, T, D = x.shape
    x, y = x.reshape(B * H, T, D).to(_wide(x)), y.reshape(B * H, T, D).to(_wide(y))
    if lengths is None:
        return x, y, None
    padding = torch.arange(T, device=x.device) >= lengths.to(x.device)[:, None]
    padding = padding.repeat_interleave(H, 0)
    # A padded row then has S = U = 0 everywhere: KL and G are exactly 0, without a mask
    return *(z.masked_fill(padding[..., None], 0.0) for z in (x, y)), padding


def _strips(x, y, padding, scale: float, teacher_scale: float, causal: bool):
    """Yields (heads, rows, both, s, u, room) for strips of BT rows, as many heads as CELLS holds.

    heads, rows: slices of B*H and of T. both: s and u, scores [h, <=BT, n] in bits, n the columns
    up to the diagonal (T if not causal). room: for one more. The next strip overwrites them all.
    """
    BH, T, _ = x.shape
    h = min(BH, max(1, CELLS.get(x.device.type, MANY_CELLS) // (BT * T)))
    buffer = x.new_empty(3 * h * min(BT, T) * T)
    above = x.new_full((min(BT, T), min(BT, T)), HIDDEN).triu_(1)
    for first, start in itertools.product(range(0, BH, h), range(0, T, BT)):
        heads, rows = slice(first, first + h), slice(start, start + BT)
        x_i, y_i = x[heads, rows], y[heads, rows]
        b, n = x_i.shape[1], min(start + BT, T) if causal else T
        three = buffer[: 3 * len(x_i) * b * n].view(3, -1, b, n)
        both, (s, u, room) = three[:2], three.unbind()
        torch.bmm(x_i * (scale * math.log2(math.e)), x[heads, :n].mT, out=s)
        torch.bmm(y_i * (teacher_scale * math.log2(math.e)), y[heads, :n].mT, out=u)
        if causal:  # only the last columns cross the diagonal
            both[..., start:].add_(above[:b, :b])
        elif padding is not None:
            both.add_(HIDDEN * padding[heads, None].to(x.dtype))
        yield heads, rows, both, s, u, room


def _exp2(scores: Tensor, out: Tensor) -> Tensor:
    """2^scores into `out`; terms below 2^FLOOR of the row's largest become 0, which no sum notices.

    Left in, they would be subnormal numbers, with which many CPUs compute 100 times more slowly;
    6 % of the V/V pairs of the demo's last layer are. (torch.exp is as slow where it underflows.)
    """
    return torch.threshold(scores, FLOOR, HIDDEN, out=out).exp2_()
