"""The loss: how far apart two self-relation matrices are, row by row, exactly, in memory linear in T.

What.  A layer's queries (or keys, or values) relate every token to every other one. For one head, with x_i the
student's vector of token i, y_i the teacher's, and a scale a (D^-1/2 unless told otherwise):

    S_ij = a x_i.x_j        P_ij = exp(S_ij - lse_i(S))      over the columns j that row i may see
    U_ij = a y_i.y_j        Q_ij = exp(U_ij - lse_i(U))      causal: j <= i; with `lengths`: j < length

where lse_i(S) = log sum_j exp(S_ij). The loss of row i is KL(teacher || student), in nats:

    KL_i = sum_j Q_ij (log Q_ij - log P_ij)
         = sum_j Q_ij (U_ij - S_ij) - lse_i(U) + lse_i(S)                                               (1)

Its gradient.  Only S depends on the student, and sum_j Q_ij = 1, so with w_i the upstream gradient of row i

    G_ij := dL/dS_ij = w_i (P_ij - Q_ij)                                                                (2)

S_ij = a x_i.x_j holds x twice, as row i and as column j. Token i collects its row and its column of G:

    dL/dx_i = a sum_j (G_ij + G_ji) x_j                                                                 (3)

How it is computed.  S and U are [T, T]: 4 GiB a head at T = 32 768 in float32. Three implementations:

    dense    the definition, with autograd; memory T^2. Every other one is tested against it in float64.
    tiled    strips of BT whole rows. Pass 1 keeps the row's KL (1) alone; the backward makes each strip again, forms
             G (2) and adds both halves of (3). Memory O(BT T): linear. CPU and GPU.
    triton   the same two passes as fused GPU kernels, kernel_triton.py. A tile there holds part of a row, so pass 1
             also keeps lse(S) and lse(U), from which pass 2 rebuilds P and Q anywhere.
    hopper   those two passes for one chip, kernel_hopper.py: products and exponentials at the same time.

Limits.  The teacher takes no gradient. First derivatives only. Rows at or past `lengths` give 0 and take no gradient.

Source.  LinearARD, arXiv 2604.00004, section 3; the log-sum-exp split is the one of FlashAttention (arXiv 2205.14135).
"""

import torch
import torch.utils.checkpoint
from torch import Tensor

# Rows of a strip: few enough for one to stay in a CPU's caches. B 8, H 4, T 512, D 64, forward + backward, two Zen 5
# cores: 43 ms at 32, 106 at 64, 147 at 128 (torch 2.13).
BT = 32
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
) -> Tensor:
    """KL(teacher || student) of every row of the self-relation softmax (equation 1).

    student, teacher: [B, H, T, D], one dtype and device; the teacher must not require grad.
    scale: a in the formulas, D**-0.5 if None; teacher_scale: the teacher's own a, `scale` if None.
    lengths: [B] integers in 0..T, right padding; impl: "auto", "dense", "tiled", "triton" or "hopper". float32 products use
    tf32 only where torch's own switch allows it.
    Returns [B, H, T] nats per row, float32 (float64 for float64 input), differentiable in `student`.
    Raises ValueError for anything else, naming the value.
    """
    _check(student, teacher, lengths, impl)
    B, H, T, D = student.shape
    scale = D**-0.5 if scale is None else float(scale)
    teacher_scale = scale if teacher_scale is None else float(teacher_scale)
    if impl == "auto":
        impl, _ = choose(student, causal=causal, lengths=lengths, scales=(scale, teacher_scale))
    if impl == "dense":
        return _dense(student, teacher, scale, teacher_scale, causal, lengths)
    if impl == "tiled":
        return _Tiled.apply(student, teacher, scale, teacher_scale, causal, lengths)
    try:  # only here, so that machines without Triton can use the other two
        if impl == "hopper":
            from kernel_hopper import relation_kl_hopper as kernel
        else:
            from kernel_triton import relation_kl_triton as kernel
    except ImportError as e:
        raise ValueError(f'impl="{impl}" needs the triton package ({e}); install it, or use impl="tiled"') from None
    return kernel(student, teacher, scale, teacher_scale, causal, lengths)


def choose(
    x: Tensor, *, causal: bool = True, lengths: Tensor | None = None, scales: tuple[float, float] = (1.0, 1.0)
) -> tuple[str, str]:
    """What "auto" means for this loss, and why: the one place that decides. Returns (implementation, reason)."""
    if not x.is_cuda:
        return "tiled", f"the tensors are on {x.device.type}: the Triton kernel needs a GPU"
    try:
        import kernel_triton
    except ImportError as e:
        return "tiled", f"Triton cannot be imported ({e})"
    if reason := kernel_triton.unsupported(x):
        return "tiled", reason
    try:
        import kernel_hopper
    except ImportError as e:  # Gluon is an experimental part of Triton
        return "triton", f"Triton's Gluon cannot be imported ({e})"
    if reason := kernel_hopper.unsupported(x, causal, lengths, scales):
        return "triton", f"a GPU, and {x.dtype} with D = {x.shape[-1]} is supported; {reason}"
    return "hopper", "a Hopper GPU: a third faster than the plain Triton kernel, measured on an H200, same bits every run"


def keep_losses(ctx, op, *arguments, **options):
    """A policy for selective checkpointing: a loss's three numbers a row are kept, all else is computed again.

    checkpoint(f, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep_losses)), both
    from torch.utils.checkpoint: the backward then does not run the GPU kernels' forward a second time.
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
        raise ValueError(f"teacher {list(teacher.shape)} and student {list(student.shape)} must have one shape")
    if not student.is_floating_point() or teacher.dtype != student.dtype:
        raise ValueError(f"student is {student.dtype}, teacher {teacher.dtype}: both must have one floating dtype")
    if teacher.device != student.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}: put both on one device")
    if teacher.requires_grad:
        raise ValueError("the teacher requires grad, and this loss gives it none: pass teacher.detach()")
    whole = lengths is None or not (lengths.is_floating_point() or lengths.dtype == torch.bool)
    if lengths is not None and (lengths.shape != student.shape[:1] or not whole):
        raise ValueError(f"lengths must be [{student.shape[0]}] integers; got {list(lengths.shape)} {lengths.dtype}")


def _visible(rows: range, cols: int, T: int, causal: bool, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Which columns j < cols each row of `rows` may see: bool, broadcastable to [B, 1, len(rows), cols]."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(cols, device=device)[None, :]
    seen = (j <= i) if causal else torch.ones_like(j <= i)
    if lengths is None:
        return seen[None, None]
    n = lengths.to(device)[:, None, None, None]
    return seen & (i < n) & (j < n)


def _dense(x: Tensor, y: Tensor, scale: float, teacher_scale: float, causal: bool, lengths: Tensor | None) -> Tensor:
    """The definition, as one would write it on a blackboard. [B, H, T, T] matrices and plain autograd."""
    B, H, T, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(wide), y.to(wide)
        seen = _visible(range(T), T, T, causal, lengths, x.device)
        # A row that sees nothing gets finite scores, so that no NaN arises; its terms are dropped in the sum.
        hidden = torch.where(seen.any(-1, keepdim=True), float("-inf"), 0.0).to(wide)
        log_p = torch.where(seen, scale * (x @ x.mT), hidden).log_softmax(-1)
        log_q = torch.where(seen, teacher_scale * (y @ y.mT), hidden).log_softmax(-1)
        terms = log_q.exp() * (log_q - log_p)  # -inf minus -inf where unseen: dropped by the next line
        return torch.where(seen, terms, 0.0).sum(-1)


class _Tiled(torch.autograd.Function):
    """Equations (1) to (3), one strip of BT rows after another, each against the columns up to its diagonal."""

    @staticmethod
    def forward(ctx, x, y, scale, teacher_scale, causal, lengths):
        B, H, T, D = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        kl = torch.empty(B, H, T, dtype=wide, device=x.device)
        for rows, s, u, seen in _strips(x, y, scale, teacher_scale, causal, lengths):
            # (1) with the log-sum-exps inside the sum, as log Q - log P: outside, large numbers would cancel
            log_p, log_q = s.log_softmax(-1), u.log_softmax(-1)
            q = log_q.exp()
            terms = log_q.sub_(log_p).masked_fill_(~seen, 0.0).mul_(q)  # unseen: -inf + inf, dropped
            kl[..., rows.start : rows.stop] = terms.sum(-1)
        if lengths is not None:
            kl.masked_fill_(torch.arange(T, device=x.device) >= lengths.to(x.device)[:, None, None], 0.0)
        ctx.save_for_backward(x, y, lengths)
        ctx.arguments = (scale, teacher_scale, causal)
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        x, y, lengths = ctx.saved_tensors
        scale, teacher_scale, causal = ctx.arguments
        wide = w.dtype
        dx = torch.zeros(x.shape, dtype=wide, device=x.device)
        xw = x.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            for rows, s, u, seen in _strips(x, y, scale, teacher_scale, causal, lengths):
                r = slice(rows.start, rows.stop)
                n = s.shape[-1]
                g = s.softmax(-1).sub_(u.softmax(-1))
                if lengths is not None:  # the softmax of a row that sees nothing is NaN
                    g = torch.where(seen, g, 0.0)
                g.mul_((scale * w[..., r, None]).to(wide))  # [B, H, BT, n]: equation (2), times a
                dx[..., r, :] += g @ xw[..., :n, :]  # row i of G
                dx[..., :n, :] += g.mT @ xw[..., r, :]  # column i of G
        return dx.to(x.dtype), None, None, None, None, None


def _strips(x: Tensor, y: Tensor, scale: float, teacher_scale: float, causal: bool, lengths: Tensor | None):
    """Yields (rows, S strip, U strip, visible): scores [B, H, <=BT, n] with -inf where unseen, n the columns needed."""
    B, H, T, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(wide), y.to(wide)
        for start in range(0, T, BT):
            rows = range(start, min(start + BT, T))
            n = rows.stop if causal else T
            seen = _visible(rows, n, T, causal, lengths, x.device)
            r = slice(rows.start, rows.stop)
            s = (scale * x[..., r, :]) @ x[..., :n, :].mT
            u = (teacher_scale * y[..., r, :]) @ y[..., :n, :].mT
            yield rows, s.masked_fill_(~seen, float("-inf")), u.masked_fill_(~seen, float("-inf")), seen
