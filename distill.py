"""Stage 1: teacher and student in lock-step, one layer at a time, compared by their relations.

What.  The teacher reads the block with its native RoPE, the student with the stretched one. In every layer, the loss
of relation_kl.py compares the q, k and v of the two, head by head:

    L = mean over layers of (KL_Q/Q + KL_K/K + KL_V/V),   each the mean over its own rows and heads

Only what `make_student` copies learns (the q, k and v projections); every other tensor of the student IS the
teacher's.

How it is computed.  Both models advance together, so that q, k and v of one layer of each are all that is alive at
a time. With `checkpointing`, a layer keeps its two inputs [B, T, C] and is recomputed in the backward, teacher
included. The last layer ends at its q, k and v: what would come after takes no part in the loss.

What the relations do not see.  Q/Q and K/K stay the same when all queries, or all keys, of a head are turned by one
rotation; their product Q K, which attention uses, does not. So a student can match every relation and still attend
elsewhere. Starting from the teacher's weights and training gently keeps the two together; `logit_weight` adds, times
itself, the KL of the next-token distributions, which does see it (the authors' code has such a term too).

YaRN multiplies cos and sin, and with them q and k, by a temperature f. The comparison divides the scores by f^2, so
that the student is not taught to undo it.

Limits.  The authors divide the K/K and V/V losses by the number of query heads even where keys are shared
(`authors_heads`): with grouped queries that weighs these two relations Hkv / H times ours.

Source.  LinearARD, arXiv 2604.00004.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from model import Llama, LlamaConfig, by_chunks
from relation_kl import relation_kl
from rope import frequencies

TRAINED = ("q_proj", "k_proj", "v_proj")
RELATIONS = ("Q/Q", "K/K", "V/V")


def make_student(teacher: Llama, config: LlamaConfig, trained: tuple[str, ...] = TRAINED) -> Llama:
    """A Llama of `config` that shares the teacher's tensors, but for float32 copies, requiring grad, of `trained`."""
    with torch.device("meta"):
        student = Llama(config)
    for name, p in teacher.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.rpartition(".")[2] in trained:
            p = nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=True)
        setattr(student.get_submodule(owner), leaf, p)
    if config.tied:
        student.lm_head.weight = student.model.embed_tokens.weight
    return student.eval()


def trainable(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def relation_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    checkpointing: bool = False,
    authors_heads: bool = False,
    logit_weight: float = 0.0,
    units: list | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, its parts [L, 3] without grad) for ids [B, T]: mean KL in nats of Q/Q, K/K and V/V in every layer.

    units: with --shard, what gathers layer l of both models while a function runs (parallel.py).
    """
    B, T = ids.shape
    with torch.no_grad():
        h_teacher = teacher.embed(ids, dtype)
    h_student = student.embed(ids, dtype)
    turns = teacher.turn(T, h_teacher), student.turn(T, h_student)
    scales = tuple(_scale(m.config, T) for m in (teacher, student))
    weight = teacher.config.n_kv_head / teacher.config.n_head if authors_heads else 1.0

    def step(l: int, h_teacher: Tensor, h_student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer of both: (teacher's h, student's h, mean KL [3])."""
        last = l + 1 == teacher.config.n_layer and not logit_weight
        with torch.no_grad():
            h_teacher, theirs = _layer(teacher.model.layers[l], h_teacher, turns[0], last)
        h_student, ours = _layer(student.model.layers[l], h_student, turns[1], last)
        parts = []
        for r, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            a_teacher, a = scales if r < 2 else (x.shape[-1] ** -0.5,) * 2
            parts.append(relation_kl(x, y, scale=a, teacher_scale=a_teacher, impl=impl).mean())
        return h_teacher, h_student, torch.stack(parts)

    all_parts = []
    for l in range(teacher.config.n_layer):
        run = step
        if checkpointing and torch.is_grad_enabled():
            run = functools.partial(recompute, step, use_reentrant=False)
        if units:
            run = functools.partial(units[l], run)
        h_teacher, h_student, parts = run(l, h_teacher, h_student)
        all_parts.append(parts)
    table = torch.stack(all_parts)  # [L, 3]
    weights = torch.tensor([1.0, weight, weight], device=table.device, dtype=table.dtype)
    loss = (table * weights).sum(-1).mean()
    if logit_weight:
        loss = loss + logit_weight * logit_kl(teacher, student, h_teacher, h_student)
    return loss, table.detach()


def logit_kl(teacher: Llama, student: Llama, h_teacher: Tensor, h_student: Tensor, chunk: int = 4096) -> Tensor:
    """Mean KL(teacher || student) in nats of the next-token distributions, h [B, T, C] being before the last norm.

    At most [chunk, V] logits of each exist at once.
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = teacher.lm_head(teacher.model.norm(y)).float().log_softmax(-1)
        log_p = student.lm_head(student.model.norm(x)).float().log_softmax(-1)
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)  # [<= chunk]

    return by_chunks(part, chunk, h_student.flatten(0, 1), h_teacher.flatten(0, 1)).mean()


def _layer(layer: nn.Module, h: Tensor, turn: tuple[Tensor, Tensor], last: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    if last:
        return h, layer.self_attn.qkv(layer.input_layernorm(h), turn)
    return type(layer).forward(layer, h, turn)  # not layer(...): a sharded layer's unit is already gathered


def _scale(config: LlamaConfig, T: int) -> float:
    """a of the Q/Q and K/K relations: D^-1/2, over the square of YaRN's temperature."""
    _, temperature = frequencies(config.rope, config.head_dim, T)
    return config.head_dim**-0.5 / temperature**2
