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
    strips   BT whole rows at a time, up to the diagonal: memory T. The forward keeps nothing but x
             and y; the backward recomputes each strip and adds both halves of (3). As easy to read
             as this text, and up to three times as slow as the next one.
    tiled    strips as a CPU computes them fastest (kernel_cpu.py): in a few matrices that its cache
             holds. It keeps each row's pivots and sums, and up to T = 512 also G. Runs on any
             device.
    triton   the same two passes as fused GPU kernels (kernel_triton.py). A tile there holds part of
             a row, so the first pass keeps lse(S) and lse(U) and the second rebuilds P and R.
    hopper   those two passes for one chip (kernel_hopper.py): products and exponentials at once.
             Short sequences are faster in triton; `choose` decides.

What it costs.  The triangle has T^2 / 2 pairs, and a product over it 2 D T^2 / 2 flops per head. It
takes two forward (S, U) and four backward (S and U anew, G x, G^T x): 12 D T^2 / 2. The backward of
kernel_triton.py walks the whole square with three products, which makes 2 + 6 = 8 instead of 6.

Limits.  The teacher takes no gradient. First derivatives only. Padded rows give 0.

Source.  LinearARD, arXiv 2604.00004, section 3; strips of scores that are recomputed:
FlashAttention, arXiv 2205.14135; the one-pass softmax: arXiv 1805.02867.
"""

import math
import warnings

import torch
from torch import Tensor

from kernel_cpu import BT, relation_kl_cpu

RELATIONS = ("Q/Q", "K/K", "V/V")
IMPLEMENTATIONS = ("auto", "dense", "strips", "tiled", "triton", "hopper")
_NO_GRADIENT = (
    "the student of relation_kl requires no grad, so its loss trains nothing: use checkpointing "
    "with use_reentrant=False, train q, k or v, or measure under torch.no_grad()"
)


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

    student, teacher: [B, H, T, D], floating, on one device; a teacher of another dtype is cast to
    the student's, and must not require grad. Where gradients are on and the student requires none,
    a warning says so once. scale: a in the formulas, D**-0.5 if None; teacher_scale: b, `scale` if
    None. causal: row i sees j <= i, else all. lengths: [B] integers in 0..T, the tokens before
    padding (the range is not checked, which would wait for a GPU). impl: "auto" or one of the five
    above. kept: for activation checkpointing, an empty list. The call leaves its numbers per row
    there; the same call, repeated in the backward, takes them from it. ("dense" and "strips"
    compute again.) float32 products use tf32 only where torch's own switch allows it. Returns [B,
    H, T], float32 (float64 for float64 input), differentiable in `student`. Raises ValueError for
    anything else, naming the value. Source: arXiv 2604.00004, section 3.
    """
    _check(student, teacher, lengths, impl)
    teacher = teacher.to(student.dtype)
    if torch.is_grad_enabled() and not student.requires_grad:
        warnings.warn(_NO_GRADIENT, stacklevel=2)
    scale = student.shape[-1] ** -0.5 if scale is None else float(scale)
    teacher_scale = scale if teacher_scale is None else float(teacher_scale)
    if not (0 < abs(scale) < math.inf and 0 < abs(teacher_scale) < math.inf):
        raise ValueError(f"scale is {scale} and teacher_scale {teacher_scale}: finite, and not 0")
    if impl == "auto":
        impl, _ = choose(student, causal, lengths, (scale, teacher_scale))
    if impl in ("dense", "strips"):
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        plain = _dense if impl == "dense" else _Strips.apply
        x, y = student.to(wide).contiguous(), teacher.to(wide).contiguous()
        return plain(x, y, scale, teacher_scale, causal, lengths)
    if impl == "tiled":
        return relation_kl_cpu(student, teacher, scale, teacher_scale, causal, lengths, kept)
    try:  # only here, so that machines without Triton can use the others
        if impl == "hopper":
            from kernel_hopper import relation_kl_hopper as kernel
        else:
            from kernel_triton import relation_kl_triton as kernel
    except ImportError as e:
        raise ValueError(
            f'impl="{impl}" needs the triton package ({e}); install it, or use impl="tiled"'
        ) from None
    return kernel(student, teacher, scale, teacher_scale, causal, lengths, kept)


def _dense(x, y, scale, teacher_scale, causal, lengths) -> Tensor:
    """The definition as on a blackboard: [B, H, T, T] matrices and plain autograd."""
    return _kl(*_rows(x, y, 0, x.shape[2], scale, teacher_scale, causal, lengths))


def _rows(
    x: Tensor,
    y: Tensor,
    start: int,
    stop: int,
    scale: float,
    teacher_scale: float,
    causal: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log P and log R of rows start to stop - 1, [B, H, stop - start, n] with n the columns that
    they see; and which pairs are seen, [stop - start, n] or with B and 1 in front.
    """
    n = stop if causal else x.shape[2]
    i = torch.arange(start, stop, device=x.device)[:, None]
    j = torch.arange(n, device=x.device)
    seen = (j <= i) if causal else torch.ones_like(j + i, dtype=torch.bool)
    if lengths is not None:
        length = lengths.to(x.device)[:, None, None, None]
        seen = seen & (i < length) & (j < length)
    with torch.autocast(x.device.type, enabled=False):
        S = scale * (x[:, :, start:stop] @ x[:, :, :n].mT)
        U = teacher_scale * (y[:, :, start:stop] @ y[:, :, :n].mT)
    # Unseen pairs get -inf. A row of nothing else gets 0, so that no NaN arises, and P = R.
    hidden = torch.where(seen.any(-1, keepdim=True), float("-inf"), 0.0).to(x.dtype)
    S, U = torch.where(seen, S, hidden), torch.where(seen, U, hidden)
    return S.log_softmax(-1), U.log_softmax(-1), seen


def _kl(log_p: Tensor, log_r: Tensor, seen: Tensor) -> Tensor:
    """Equation (1), [..., rows, columns] -> [..., rows]."""
    terms = log_r.exp() * (log_r - log_p)  # NaN where unseen (-inf + inf): dropped
    return torch.where(seen, terms, 0.0).sum(-1)


class _Strips(torch.autograd.Function):
    """The definition for BT rows at a time, with the gradient by (2) and (3).

    Only x and y are kept. A strip is [B, H, BT, T], and is recomputed in the backward.
    """

    @staticmethod
    def forward(ctx, x, y, scale, teacher_scale, causal, lengths):
        ctx.save_for_backward(x, y, lengths)
        ctx.arguments = scale, teacher_scale, causal
        T, kl = x.shape[2], x.new_empty(x.shape[:3])
        for start in range(0, T, BT):
            stop = min(start + BT, T)
            kl[:, :, start:stop] = _kl(*_rows(x, y, start, stop, *ctx.arguments, lengths))
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):  # [B, H, T]
        x, y, lengths = ctx.saved_tensors
        T, dx = x.shape[2], torch.zeros_like(x)
        for start in range(0, T, BT):
            stop = min(start + BT, T)
            log_p, log_r, _ = _rows(x, y, start, stop, *ctx.arguments, lengths)
            G = w[:, :, start:stop, None] * (log_p.exp() - log_r.exp())  # (2)
            n = G.shape[-1]  # (3): token i collects its row of G, and its column
            with torch.autocast(x.device.type, enabled=False):
                dx[:, :, start:stop] += ctx.arguments[0] * (G @ x[:, :, :n])
                dx[:, :, :n] += ctx.arguments[0] * (G.mT @ x[:, :, start:stop])
        return dx, None, None, None, None, None


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
    if kernel_hopper.short(x):
        B, H, T, _ = x.shape
        return "triton", f"{B * H} heads of {T} tokens are few for this chip's own kernels"
    return "hopper", "this chip has kernels of its own, which are faster (README.md)"


def workspace_bytes(B: int, H: int, T: int, D: int) -> int:
    """Bytes that a GPU's backward of x [B, H, T, D] holds for its own time beyond dL/dx, at most:
    kernel_hopper.py's partial sums. 0 where there is no Triton, or no such kernel for D.
    """
    try:
        import kernel_hopper
    except ImportError:
        return 0
    return kernel_hopper.workspace_bytes(B, H, T, D) if D in kernel_hopper.BACKWARD else 0


def _check(student: Tensor, teacher: Tensor, lengths: Tensor | None, impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if student.dim() != 4 or 0 in student.shape:
        raise ValueError(f"student must be a non-empty [B, H, T, D]; got {list(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher {list(teacher.shape)} and student {list(student.shape)} must have one shape"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(
            f"student is {student.dtype}, teacher {teacher.dtype}: both must be floating"
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
