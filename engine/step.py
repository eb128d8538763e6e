"""A step's gradients, at speed and within memory: the fast path of the two plain losses.

What.  train.py holds stage 1's and stage 2's losses as one reads them. They run as they are
wherever nothing more is needed. This module gives the same losses and the same gradients where
something is:

    recompute        the first layers keep their inputs [B, T, C] alone; the rest is computed again
                     in the backward. Of a relation its numbers per row are kept (`kept` of
                     relation_kl), so that only its gradient is left to do
    chunks           at most HEAD_CHUNK tokens' logits exist at once, forward and backward
    the last layer   ends at its q, k and v where no loss depends on more
    tiles            a long block, a tile of tokens at a time, its layers' inputs in the host's
                     memory (engine/tiles.py), over one process or several (engine/sequence.py)
    units            with --shard, what gathers layer l of both models while it is at work, or once
                     a step (`gathered`)
    a CUDA graph     one launch per micro-batch instead of thousands (engine/graph.py)
    fused kernels    between products, from inside model.py (kernel_glue.py)
    skips            parts of a block stand at later positions, for the student (engine/skips.py)

How.  `Step.backward` adds share * the gradient of one micro-batch's loss; `Step.finish` averages
over processes and gives the norm, `Step.clip` clips by it. What the norm says is checked between
the two, by the caller.

Limits.  The teacher takes no gradient. Skips, weights of the relations, the authors' head count and
an `impl` of one's own are options of the fast path alone.

Source.  Equality with the plain losses, in loss and every gradient: tests/test_step.py.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from engine import graph, parallel
from engine.cost import HEAD_CHUNK, Stage
from engine.offload import Store
from engine.quant import is_packed
from engine.sequence import processes_per_block
from engine.tiles import Pass, Tiles, begin, walk
from model import Llama, by_chunks, trainable, widened
from model import next_token_loss as cross_entropy
from relation_kl import relation_kl

_USUAL = {"relations": "qkv", "authors_heads": False, "impl": "auto"}  # the plain loss's


class Step:
    """What a stage's steps do between the blocks' ids and the clipped gradient."""

    def __init__(
        self,
        teacher: Llama,
        student: Llama,
        plain: dict,
        *,
        dtype: torch.dtype,
        kl_weight: float = 1.0,
        relations: str = "qkv",
        authors_heads: bool = False,
        impl: str = "auto",
        dropout: float = 0.0,
        recomputed: int = 0,
        world: parallel.World | None = None,
        units: list | None = None,
        gathered: bool = False,
        graphs: bool = True,
        seconds: float = 0.0,
        tiles: Tiles | None = None,
    ):
        """plain: {"relation": f(teacher, student, ids [n, T], dtype, kl_weight) -> (loss, relations
        [L, 3], next-token KL), "next token": f(teacher, student, ids [n, T + 1], dtype,
        teacher's share) -> (loss,)}.
        gathered: units are gathered once a step; graphs: record CUDA graphs wherever that is
        possible and, by `seconds`, worth it (graph.wanted).
        """
        self.teacher, self.student, self.plain, self.dtype = teacher, student, plain, dtype
        self.kl_weight, self.recomputed, self.units = kl_weight, recomputed, units
        self.gathered = gathered
        self.options = {"relations": relations, "authors_heads": authors_heads, "impl": impl}
        self.weights = list(trainable(student).values())
        self.processes = world.size if world else 1
        self.tiles, self.noisy, self.store = tiles, dropout > 0, Store(student.device)
        self.store.reserve(tiles.host if tiles else 0)
        recomputes, packed = bool(recomputed) or tiles is not None, is_packed(student)
        reduced = sum(w.nbytes for w in self.weights) if self.processes > 1 else 0
        exchanged = reduced, bool(units)
        record, why = graph.wanted(student.device, *exchanged, recomputes, dropout, packed, seconds)
        self.recorded = record and graphs
        self.reducer = None
        if world:
            self.reducer = parallel.Reducer(self.weights, world, inside=not self.recorded)
        self.gradients = graph.Recorded(self.losses, self.weights, self.recorded)
        self.why = f"CUDA graph {'on' if record else 'off'}, because {why}"

    def losses(
        self, stage: Stage, ids: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The loss of ids [n, T + 1], and what else is logged: plain where that is enough.

        positions: where the first T stand for the student [T]; None: at 0 .. T-1.
        """
        relation, plain = stage.objective == "relation", self.plain.get(stage.objective)
        how = {"dtype": self.dtype, "positions": positions}
        how |= self.options if relation else {"share": stage.teacher_share}
        P = processes_per_block(stage.batch, self.processes)
        if self.tiles or P > 1:
            every = len(self.student.model.layers)
            tiles = self.tiles or Tiles(on_gpu=every, outputs=every)
            how |= {"tiles": tiles, "store": self.store, "P": P, "noisy": self.noisy}
            if not relation:
                return long_next_token_loss(self.teacher, self.student, ids, **how)
            return long_relation_loss(self.teacher, self.student, ids, self.kl_weight, **how)
        enough = not (self.recomputed or self.units or positions is not None)
        enough &= len(ids) * stage.T <= HEAD_CHUNK
        how["recomputed"] = self.recomputed
        if not relation:
            if plain and enough:
                return plain(self.teacher, self.student, ids, self.dtype, stage.teacher_share)
            return next_token_loss(self.teacher, self.student, ids, **how)
        ids, usual = ids[:, :-1], self.options == _USUAL
        if plain and enough and usual and self.kl_weight:
            return plain(self.teacher, self.student, ids, self.dtype, self.kl_weight)
        how |= {"logit_weight": self.kl_weight, "units": self.units}
        return relation_loss(self.teacher, self.student, ids, **how)

    def zero(self) -> None:
        """Gradients are 0 after this."""
        self.gradients.zero()

    def backward(
        self, stage: Stage, ids: Tensor, positions: Tensor | None, share: float, last: bool
    ) -> tuple[Tensor, ...]:
        """Adds share * the gradient of the loss of ids [n, T + 1]; the detached values of `losses`.

        last: this step's last micro-batch, in whose backward processes exchange gradients.
        """
        if self.reducer:
            self.reducer.last = last and self.reducer.inside
            share *= self.reducer.share
        alone = processes_per_block(stage.batch, self.processes) == 1
        with parallel.gathered_once(self.units if self.gathered else [], last):
            return self.gradients(stage, ids, positions, share, alone)

    def finish(self) -> Tensor:
        """Gradients, any shape, averaged over processes; the norm of all before clipping."""
        if self.reducer:
            self.reducer.finish()
        return parallel.whole(torch.nn.utils.get_total_norm([w.grad for w in self.weights]))

    def clip(self, norm: Tensor, longest: float = 1.0) -> None:
        """Shortens gradients, any shape, of this norm over all to `longest`, if they are longer."""
        if norm > longest:  # else they would all be read and written, to be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self.weights, longest, norm)

    def close(self) -> None:
        """Takes its hooks off the weights; drops recorded graphs and the host's memory."""
        self.gradients = self.store = None
        if self.reducer:
            self.reducer.close()


# ---- the losses


def relation_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    recomputed: int = 0,
    authors_heads: bool = False,
    logit_weight: float = 0.0,
    relations: str = "qkv",
    units: list | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, relations [L, 3], next-token KL) of both models over ids [B, T], in nats.

    positions: where the tokens stand for the student [T]. The last two of the result carry no
    gradient. Both models advance together, so that the q, k and v of only one layer of each are
    alive at a time.
    """
    B, T = ids.shape
    L = teacher.config.n_layer
    with torch.no_grad():
        h_teacher = teacher.embed(ids, dtype)
    h_student = student.embed(ids, dtype)
    turns = teacher.cos_sin(T, h_teacher), student.cos_sin(T, h_student, positions)
    relate = _mean_kl(teacher, student, T, impl)

    def advance(l: int, h_teacher: Tensor, h_student: Tensor, kept=(None, None, None)):
        """Layer l of both: (teacher's h, student's h, mean KL [3]). kept: see relation_kl."""
        last = l + 1 == L and not logit_weight
        with torch.no_grad():
            h_teacher, theirs = _layer(teacher.model.layers[l], h_teacher, turns[0], last)
        h_student, ours = _layer(student.model.layers[l], h_student, turns[1], last)
        parts = map(relate, ours, theirs, range(3), kept)
        return h_teacher, h_student, torch.stack(list(parts))

    table = []
    for l in range(L):
        run = advance
        if l < recomputed and torch.is_grad_enabled():
            run = functools.partial(advance, kept=([], [], []))
            run = functools.partial(recompute, run, use_reentrant=False)
        if units:
            run = functools.partial(units[l], run)
        h_teacher, h_student, parts = run(l, h_teacher, h_student)
        table.append(parts)
    table = torch.stack(table)  # [L, 3]
    loss = _weighted(table, teacher, relations, authors_heads)
    if not logit_weight:
        return loss, table.detach(), torch.zeros_like(loss.detach())
    kl = logit_kl(teacher, student, h_teacher, h_student, HEAD_CHUNK).mean()
    return loss + logit_weight * kl, table.detach(), kl.detach()


def _mean_kl(teacher: Llama, student: Llama, T: int, impl: str):
    """f(student's x, teacher's y [B, H, T, D], r, kept) -> mean KL of Q/Q, K/K or V/V by r.

    YaRN multiplies q and k by its attention factor. Left in, the student would learn to undo it.
    """
    qk, v = (student.score_scale(T), teacher.score_scale(T)), (student.config.head_dim**-0.5,) * 2

    def mean_kl(x: Tensor, y: Tensor, r: int, kept: list | None) -> Tensor:
        a, b = v if r == 2 else qk
        return relation_kl(x, y, scale=a, teacher_scale=b, impl=impl, kept=kept).mean()

    return mean_kl


def _weighted(table: Tensor, model: Llama, relations: str, authors_heads: bool) -> Tensor:
    """The loss of relations [L, 3]: a mean over layers of the weighted sum of the three."""
    shared = model.config.n_kv_head / model.config.n_head if authors_heads else 1.0
    weights = (float("q" in relations), shared * ("k" in relations), shared * ("v" in relations))
    return sum(w * table[:, r].mean() for r, w in enumerate(weights))


def _layer(layer: nn.Module, h: Tensor, turn: tuple[Tensor, Tensor], last: bool):
    if last:
        return h, layer.self_attn.qkv(layer.input_layernorm(h), turn)
    # Not layer(...): a sharded layer's unit is gathered already
    return type(layer).forward(layer, h, turn)


def logit_kl(
    teacher: Llama, student: Llama, h_teacher: Tensor, h_student: Tensor, chunk: int
) -> Tensor:
    """KL(teacher || student) of the next-token distributions, in nats, [B T].

    h_teacher, h_student: [B, T, C] before the last norm. At most [chunk, V] logits of each exist at
    once.
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            log_r = widened(teacher.lm_head(teacher.model.norm(y))).log_softmax(-1)
        log_p = widened(student.lm_head(student.model.norm(x))).log_softmax(-1)
        return F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(-1)  # [<= chunk]

    return by_chunks(part, chunk, h_student.flatten(0, 1), h_teacher.flatten(0, 1))


def next_token_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    dtype: torch.dtype,
    recomputed: int = 0,
    share: float = 0.0,
    positions: Tensor | None = None,
) -> tuple[Tensor]:
    """(loss,) in nats of ids [B, T + 1], a mean over B T tokens: 1 - share of the cross-entropy,
    share of the KL from the teacher's distribution. positions: as in `relation_loss`.
    """
    ids, targets = ids[:, :-1], ids[:, 1:]
    if not share:
        h = student.hidden(ids, dtype, recomputed, positions)
        return (cross_entropy(student, h, targets, HEAD_CHUNK),)
    with torch.no_grad():  # before the student keeps anything
        h_teacher = teacher.after_layers(ids, dtype)
    h = student.after_layers(ids, dtype, recomputed, positions)
    return (_shared_losses(teacher, student, h_teacher, h, targets, share).mean(),)


def _shared_losses(
    teacher: Llama, student: Llama, h_teacher: Tensor, h: Tensor, targets: Tensor, share: float
) -> Tensor:
    """(1 - share) * cross-entropy + share * KL(teacher || student), in nats, [B T].

    h [B, T, C] of each before the last norm, targets [B, T]. It is the cross-entropy of one target,
    the mixture of both, less share times the teacher's entropy: one log-softmax of each.
    """

    def part(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            log_r = widened(teacher.lm_head(teacher.model.norm(y))).log_softmax(-1)
            target = log_r.exp()
            entropy = torch.linalg.vecdot(target, log_r).neg_()
            del log_r
            target.mul_(share).scatter_add_(
                1, ids[:, None], target.new_full((len(ids), 1), 1 - share)
            )
        logits = widened(student.lm_head(student.model.norm(x)))
        return F.cross_entropy(logits, target, reduction="none") - share * entropy

    return by_chunks(part, HEAD_CHUNK, *(t.flatten(0, 1) for t in (h, h_teacher, targets)))


# ---- the same over tiles, and over the processes that share a block


def long_relation_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    logit_weight: float,
    *,
    dtype: torch.dtype,
    impl: str,
    authors_heads: bool,
    relations: str,
    tiles: Tiles,
    store: Store,
    P: int = 1,
    noisy: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relation_loss of ids [B, T + 1], of which P processes do a share each."""
    B, T = ids.shape[0], ids.shape[1] - 1
    work, h = _begin(student, ids, dtype, tiles, store, P, noisy, positions, teacher)
    work.relate = _mean_kl(teacher, student, T, impl)
    h_student, h_teacher, table = walk(work, h, student, teacher, not logit_weight)
    loss = _weighted(table, teacher, relations, authors_heads)
    if not logit_weight:
        return loss, table.detach(), torch.zeros_like(loss.detach())
    kl = logit_kl(teacher, student, h_teacher, h_student, HEAD_CHUNK).sum() * (P / (B * T))
    return loss + logit_weight * kl, table.detach(), kl.detach()


def long_next_token_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    *,
    dtype: torch.dtype,
    tiles: Tiles,
    store: Store,
    P: int = 1,
    noisy: bool = False,
    share: float = 0.0,
    positions: Tensor | None = None,
) -> tuple[Tensor]:
    """next_token_loss of ids [B, T + 1], of which P processes do a part each."""
    if share:
        with torch.no_grad():
            work, h = begin(ids[:, :-1], dtype, tiles, store, P, teacher)
            h_teacher, _, _ = walk(work, h, teacher)
    work, h = _begin(student, ids, dtype, tiles, store, P, noisy, positions)
    h, _, _ = walk(work, h, student)
    targets = _own(work, ids)[:, 1:]
    if share:
        losses = _shared_losses(teacher, student, h_teacher, h, targets, share)
    else:
        losses = _cross_entropies(student, h, targets)
    return (losses.sum() * (P / ids[:, 1:].numel()),)


def _begin(
    student, ids, dtype, tiles, store, P, noisy, positions, teacher=None
) -> tuple[Pass, Tensor]:
    """A pass over ids [B, T + 1], and h [B, T/P, C] of the embeddings of this process's tokens."""
    noise = int(torch.randint(2**40, ())) if noisy else None
    return begin(ids[:, :-1], dtype, tiles, store, P, student, teacher, noise, positions)


def _own(work: Pass, ids: Tensor) -> Tensor:
    """This process's tokens of ids [B, T + 1], and the one after them."""
    a, b = work.cut.span(ids.shape[1] - 1)
    return ids[:, a : b + 1]


def _cross_entropies(model: Llama, h: Tensor, targets: Tensor) -> Tensor:
    """Of h [B, T/P, C] before the last norm, in nats, [B T/P]."""

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(widened(model.lm_head(model.model.norm(x))), y, reduction="none")

    return by_chunks(part, HEAD_CHUNK, h.flatten(0, 1), targets.flatten())
