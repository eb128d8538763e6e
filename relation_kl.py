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

How it is computed.  S and U are [T, T]: 4 GiB per head at T = 32 768 in float32. So:

    dense    the definition, with autograd: memory T^2. All others are tested against it in float64.
    tiled    strips of BT whole rows, up to the diagonal. The forward keeps KL alone; the backward
             makes each strip again, forms G (2) and adds both halves of (3). CPU and any GPU.
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

import math

import torch
import torch.utils.checkpoint
from torch import Tensor

# Rows of a strip. With 32, 64, 96 and 128 rows forward + backward take 216, 180, 176 and 176 ms at
# 9 x 2048 x 64, and 5.7, 4.9, 5.4 and 5.2 ms at 3 x 512 x 64: float32, one core of an Intel Xeon
# (AVX-512, 2 MiB of L2), torch 2.13.
BT = 64
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
    i sees j <= i, else all. lengths: [B] integers in 0..T, the tokens before padding. impl: "auto",
    "dense", "tiled", "triton" or "hopper". kept: for activation checkpointing, an empty list. The
    call leaves its numbers per row there; the same call, made again in the backward, takes them
    from it. ("dense" computes them again.) float32 products use tf32 only where torch's own switch
    allows it. Returns [B, H, T], float32 (float64 for float64 input), differentiable in `student`.
    Raises ValueError for anything else, naming the value. Source: arXiv 2604.00004, section 3.
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
    """Equations (1) to (3), strip by strip; scores are in bits: exp2 is what a machine computes."""

    @staticmethod
    def forward(ctx, x, y, scale, teacher_scale, causal, lengths, kept):
        B, H, T, D = x.shape
        ctx.save_for_backward(x, y, lengths)
        ctx.arguments = (scale, teacher_scale, causal)
        if kept:  # the backward makes its strips itself, and needs nothing of the forward's
            return kept[0].clone()
        kl = torch.empty(B * H, T, dtype=_wide(x), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for heads, rows, _, s, u, e in _strips(x, y, scale, teacher_scale, causal, lengths):
                sum_s = torch.exp2(s, out=e).sum(-1, keepdim=True)
                sum_u = _exp2(u, e).sum(-1, keepdim=True)
                # log R - log P inside the sum: outside it, large numbers would cancel
                terms = u.sub_(s).add_((sum_s / sum_u).log2()).mul_(e)
                kl[heads, rows] = terms.sum(-1) / sum_u[..., 0]
        kl = kl.mul_(math.log(2)).view(B, H, T)
        if kept is not None:
            kept.append(kl.clone())  # a copy: the caller may change the other in place
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        x, y, lengths = ctx.saved_tensors
        scale, teacher_scale, causal = ctx.arguments
        dx = torch.zeros(x.shape, dtype=_wide(x), device=x.device).flatten(0, 1)
        aw = scale * w.to(dx.dtype).flatten(0, 1)[..., None]  # [BH, T, 1]
        with torch.autocast(x.device.type, enabled=False):
            for heads, rows, z, s, u, _ in _strips(x, y, scale, teacher_scale, causal, lengths):
                _exp2(s, s), _exp2(u, u)
                sum_s, sum_u = s.sum(-1, keepdim=True), u.sum(-1, keepdim=True)
                # (2), but for a factor per row, which is cheaper on D numbers than on n
                g = s.addcmul_(u, sum_s / sum_u, value=-1)
                factor = aw[heads, rows] / sum_s
                n = s.shape[-1]
                dx[heads, :n].baddbmm_(g.mT, factor * z[:, rows])  # column i of G
                dx[heads, rows].addcmul_(factor, g @ z[:, :n])  # row i of G
        return dx.view(x.shape).to(x.dtype), *[None] * 6


def _strips(
    x: Tensor, y: Tensor, scale: float, teacher_scale: float, causal: bool, lengths: Tensor | None
):
    """Yields (heads, rows, z, s, u, e) for strips of BT rows, as many heads at once as CELLS holds.

    heads, rows: slices of B*H and of T. z [h, T, D]: the student's vectors, wide, padding zeroed.
    s, u: scores [h, <=BT, n] in bits less the row's largest, n the columns up to the diagonal (T
    if not causal). e: room for one more such strip. The next strip overwrites s, u and e.
    """
    B, H, T, D = x.shape
    wide, device = _wide(x), x.device
    x, y = x.reshape(B * H, T, D), y.reshape(B * H, T, D)
    in_bits = torch.tensor([scale, teacher_scale], dtype=wide, device=device) * math.log2(math.e)
    h = min(B * H, max(1, CELLS.get(device.type, MANY_CELLS) // (BT * T)))
    buffer = torch.empty(3 * h * min(BT, T) * T, dtype=wide, device=device)
    above = torch.full((BT, BT), HIDDEN, dtype=wide, device=device).triu_(1)
    if lengths is not None:
        padding = torch.arange(T, device=device) >= lengths.to(device)[:, None]
        padding = padding.repeat_interleave(H, 0)  # [BH, T]
    for first in range(0, B * H, h):
        heads = slice(first, min(first + h, B * H))
        xy = torch.stack((x[heads], y[heads])).to(wide)  # [2, h, T, D]
        if lengths is not None:
            # A padded row then has S = U = 0 everywhere: KL and G are exactly 0, without a mask
            xy.masked_fill_(padding[heads, :, None], 0.0)
        left = (xy * in_bits[:, None, None, None]).flatten(0, 1)
        right = xy.flatten(0, 1).mT.contiguous()  # stored as [D, T]: the product is a fifth faster
        for start in range(0, T, BT):
            rows = slice(start, min(start + BT, T))
            n, b = rows.stop if causal else T, rows.stop - start
            s, u, e = buffer[: 3 * len(xy[0]) * b * n].view(3, -1, b, n)
            both = buffer[: len(left) * b * n].view(len(left), b, n)  # s and u
            torch.bmm(left[:, rows], right[..., :n], out=both)
            if causal:  # only the last columns cross the diagonal
                both[..., start:] += above[:b, :b]
            elif lengths is not None:
                both.view(2, -1, b, n).add_(HIDDEN * padding[heads, None].to(wide))
            both -= both.amax(-1, keepdim=True)
            yield heads, rows, xy[0], s, u, e


def _exp2(scores: Tensor, out: Tensor) -> Tensor:
    """2^scores into `out`; terms below 2^FLOOR of the row's largest become 0, which no sum notices.

    Left in, they would be subnormal numbers, with which many CPUs compute 100 times more slowly;
    6 % of the V/V pairs of the demo's last layer are. (torch.exp is as slow where it underflows.)
    """
    return torch.threshold(scores, FLOOR, HIDDEN, out=out).exp2_()
