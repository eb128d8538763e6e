"""A layer over a long block: tiles of tokens, attention's output kept, inputs on the host.

What.  All of a layer but attention is per token. Here a layer keeps its input alone, in the host's
memory where the GPU has no room, and does everything else over tiles of tokens, forward and
backward:

    forward     q, k, v    tile by tile from norm and projections
                o          attention over the whole block, one call; o and its log-sum-exps are kept
                h'         tile by tile: h + o's projection, then + MLP
    backward    q, k, v    again, tile by tile
                do, dh     a tile of h' is made again and its gradient taken, at once
                dq, dk, dv attention's backward over the whole block, from q, k, v, o, log-sum-exps
                dh, dW     a tile of q, k, v is made again and its gradient taken, at once

so that a layer at work holds q, k, v, o, their gradients, h, dh and one tile. In stage 1 teacher
and student go side by side, and the relations, with their kept numbers per row, add to dq, dk, dv.

What it costs.  In attention forwards, of which a backward is 2.5: 1 + 2.5 where o is kept, and one
more where it is not. A projection is made three times, everything else twice.

How.  One autograd.Function per layer, which is given the weights that learn, so that hooks,
reducers and FSDP see a gradient per weight once. Over tiles it is summed in float32. Attention's
own graph is kept without q, k and v: saved-tensor hooks leave their places open (`_Attention`).
With a block over several processes (engine/sequence.py) tokens are exchanged for heads around
attention and relations.

Limits.  What learns must stand before attention (q, k, v). A gradient is written over the one that
came in. Adapters' dropout draws noise per tile.

Source.  Tiles of tokens and inputs on the host: ALST, arXiv 2506.13996, and Unsloth.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from engine.offload import Held, Store, dense
from engine.parallel import gathered
from engine.sequence import Whole
from model import Llama, attention_dtype, widened

TOKENS = 8192  # of a tile


@dataclass(frozen=True)
class Tiles:
    """How long blocks are done. Of the last layers' needs some stay on the GPU."""

    tokens: int = TOKENS  # in a tile, of all blocks at a time
    on_gpu: int = 0  # layers whose input, and attention's output if kept, stay on the GPU
    outputs: int = 0  # layers whose attention output is kept, and not computed again


@dataclass
class Pass:
    """One forward through a model's layers, and its backward."""

    tiles: Tiles
    store: Store
    cut: Whole
    turns: tuple  # (student's, teacher's) cos and sin [T/P, D]; the teacher's is None in stage 2
    relate: Callable | None = None  # (student's x, teacher's y, which of q, k, v, kept) -> KL []
    noise: int | None = None  # the seed of the adapters' dropout; None where there is none

    def spans(self, B: int, T: int) -> list[slice]:
        """Tiles of T tokens of B blocks, of one length but for rounding."""
        n = -(-T // max(1, self.tiles.tokens // B))
        return [slice(i * T // n, (i + 1) * T // n) for i in range(n)]


def walk(
    work: Pass,
    h: Tensor,
    student: Llama,
    teacher: Llama | None = None,
    relations_alone: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """h [B, T/P, C] of the embeddings -> (student's h before the last norm, teacher's, relations
    [L, 3]). relations_alone: no loss depends on more, so the last layer ends at its q, k and v.
    """
    work.store.used = 0
    layers, h_teacher, table, below = student.model.layers, h, [], None
    for l, own in enumerate(layers):
        theirs = None if teacher is None else teacher.model.layers[l]
        below = Layer(work, l, len(layers), own, theirs, below)
        alone = relations_alone and l + 1 == len(layers)
        h, h_teacher, parts = gathered(own, below, h, h_teacher, alone)
        table.append(parts)
    if teacher is None:
        return h, None, None
    return h, h_teacher, torch.stack(table)


class Layer:
    """One layer of the student, in stage 1 beside the teacher's, within a pass."""

    def __init__(self, work: Pass, l: int, layers: int, student, teacher=None, below=None):
        self.work, self.l, self.student, self.teacher = work, l, student, teacher
        self.below = below  # the layer whose backward comes next
        self.host = l < layers - work.tiles.on_gpu
        self.keeps_output = l >= layers - work.tiles.outputs
        self.held: list[Held] = []  # whatever the store has of this layer

    def __call__(self, h: Tensor, h_teacher: Tensor | None = None, relations_alone: bool = False):
        """`forward` with a gradient. relations_alone: it ends there. h [B, T/P, C] of each."""
        weights = [p for p in self.student.parameters() if p.requires_grad]
        self.keep = torch.is_grad_enabled() and (h.requires_grad or bool(weights))
        self.relations_alone = relations_alone
        return _Function.apply(self, h, h_teacher, *weights)

    def forward(self, h: Tensor, h_teacher: Tensor | None):
        """h [B, T/P, C] of each -> (student's h after the layer, teacher's, mean KLs [3])."""
        if self.keep:
            self.h = self._put(h)
        heads = [self.work.cut.heads(x) for x in self._project(self.student, h, 0)]
        parts = after_teacher = None
        if self.teacher is not None:
            if self.keep:
                self.h_teacher = self._put(h_teacher)
            theirs = [self.work.cut.heads(x) for x in self._project(self.teacher, h_teacher, 1)]
            self.kept = [[] for _ in heads]
            parts = [
                self._relate(*pair, r) for r, pair in enumerate(zip(heads, theirs, strict=True))
            ]
            parts = torch.stack(parts)
            if self.relations_alone:
                return None, None, parts
            out = self.teacher.self_attn.attend(*theirs)
            del theirs
            after_teacher = self._finish(self.teacher, h_teacher, self._tokens(out))
            del out
        if self.keep and self.keeps_output:
            self.attention = _Attention(self.student.self_attn, heads, self._put)
            out = self.attention.output
            self.attention.output = None
        else:
            out = self.student.self_attn.attend(*heads)
        del heads
        return self._finish(self.student, h, self._tokens(out)), after_teacher, parts

    def _project(self, layer: nn.Module, h: Tensor, which: int) -> list[Tensor]:
        """q, k and v [B, heads, T/P, D] of all tokens, laid out as one call would."""
        B, T, _ = h.shape
        cos, sin = self.work.turns[which]
        whole: list[Tensor] = []
        for i, span in enumerate(self.work.spans(B, T)):
            with self._noise(i):
                tile = h[:, span]
                three = layer.self_attn.qkv(layer.input_layernorm(tile), (cos[span], sin[span]))
            if not whole:
                whole = [x.new_empty(B, T, x.shape[1], x.shape[3]).transpose(1, 2) for x in three]
            for all_tokens, x in zip(whole, three, strict=True):
                all_tokens[:, :, span] = x.detach()
        return whole

    @contextmanager
    def _noise(self, i: int):
        """Tile i's draw of dropout, the same each time; adapters draw where gradients are on."""
        if self.work.noise is None:
            yield
            return
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.work.noise + (self.work.cut.rank << 44) + (self.l << 20) + i)
            yield

    def _finish(self, layer: nn.Module, h: Tensor, out: Tensor) -> Tensor:
        """h [B, T/P, C] and attention's out [B, H, T/P, D] -> h after the layer."""
        after = torch.empty_like(h)
        for span in self.work.spans(*h.shape[:2]):
            after[:, span] = _finished(layer, h[:, span], out[:, :, span])
        return after

    def _relate(self, x: Tensor, y: Tensor, r: int) -> Tensor:
        return self.work.relate(x, y, r, self.kept[r])

    def _tokens(self, out: Tensor) -> Tensor:
        return self.work.cut.tokens(out, self.student.self_attn.c.n_head)

    def _put(self, x: Tensor) -> Held:
        self.held.append(self.work.store.put(x, self.host))
        return self.held[-1]

    def backward(self, dh: Tensor | None, d_parts: Tensor | None, needs_dh: bool):
        """Gradients of the layer's input [B, T/P, C], in the place of dh, and of its weights."""
        store, cut, c = self.work.store, self.work.cut, self.student.self_attn.c
        h = store.get(self.h)
        heads = [cut.heads(x) for x in self._project(self.student, h, 0)]
        d_heads: list[Tensor | None] = [None, None, None]
        if self.relations_alone:
            dh = torch.zeros_like(h)
        else:
            dh = dh.contiguous()
            if not self.keeps_output:
                self.attention = _Attention(self.student.self_attn, heads, Held)
            d_out = self._finish_backward(h, dh, self._tokens(self.attention.recall(store)))
            d_heads = self.attention.backward(heads, cut.heads(d_out))
            del d_out
            self.attention = None
        if self.teacher is not None:
            h_teacher = store.get(self.h_teacher)
            theirs = [cut.heads(x) for x in self._project(self.teacher, h_teacher, 1)]
            for r in range(3):
                with torch.enable_grad():
                    x = heads[r].detach().requires_grad_()
                    kl = self._relate(x, theirs[r], r)
                (dx,) = torch.autograd.grad(kl, x, d_parts[r])
                d_heads[r] = dx if d_heads[r] is None else d_heads[r].add_(dx)
                theirs[r] = heads[r] = None
                del x, kl, dx
        del heads
        if self.below is not None:
            for held in self.below.held:
                store.fetch(held)
        counts = (c.n_head, c.n_kv_head, c.n_kv_head)
        d_heads = [cut.tokens(d, n) for d, n in zip(d_heads, counts, strict=True)]
        return dh, self._project_backward(h, dh, d_heads, needs_dh)

    def _finish_backward(self, h: Tensor, dh: Tensor, out: Tensor) -> Tensor:
        """d_out [B, H, T/P, D]; dh becomes the gradient of h, but for its way through q, k, v."""
        d_out = torch.empty_like(out)
        for span in self.work.spans(*h.shape[:2]):
            with torch.enable_grad():
                x, o = (t.detach().requires_grad_() for t in (h[:, span], out[:, :, span]))
                after = _finished(self.student, x, o)
            dh[:, span], d_out[:, :, span] = torch.autograd.grad(after, (x, o), dh[:, span])
        return d_out

    def _project_backward(self, h: Tensor, dh: Tensor, d_three: list[Tensor], needs_dh: bool):
        """Adds to dh what came through q, k and v; the gradients of the weights, summed wide."""
        weights = [p for p in self.student.parameters() if p.requires_grad]
        sums: list[Tensor] = []
        cos, sin = self.work.turns[0]
        for i, span in enumerate(self.work.spans(*h.shape[:2])):
            with torch.enable_grad(), self._noise(i):
                x = h[:, span].detach().requires_grad_(needs_dh)
                normed = self.student.input_layernorm(x)
                three = self.student.self_attn.qkv(normed, (cos[span], sin[span]))
            inputs = [x, *weights] if needs_dh else weights
            grads = list(torch.autograd.grad(three, inputs, [d[:, :, span] for d in d_three]))
            if needs_dh:
                dh[:, span] += grads.pop(0)
            if sums:
                for total, g in zip(sums, grads, strict=True):
                    total += g
            else:
                sums = [widened(g) for g in grads]
        return [total.to(w.dtype) for total, w in zip(sums, weights, strict=True)]


def _finished(layer: nn.Module, h: Tensor, out: Tensor) -> Tensor:
    """A tile of h after the layer, from h before it and attention's output."""
    return layer.add_mlp(h + layer.self_attn.project(out))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer: Layer, h, h_teacher, *weights):
        ctx.layer = layer
        after, after_teacher, parts = layer.forward(h, h_teacher)
        if after_teacher is not None:
            ctx.mark_non_differentiable(after_teacher)
        return after, after_teacher, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, _, d_parts):
        dh, d_weights = ctx.layer.backward(dh, d_parts, ctx.needs_input_grad[1])
        return None, dh if ctx.needs_input_grad[1] else None, None, *d_weights


class _Enter(torch.autograd.Function):
    """q, k and v enter attention's graph without being held by it, as leaves would be."""

    @staticmethod
    def forward(ctx, handle, q, k, v):
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, None


class _Attention:
    """One call of attention and its graph, in which the places of q, k and v are open.

    What it saves beside them (its output, log-sum-exps, seeds) goes to `put`.
    """

    SMALL = 2**16  # bytes that need no thought

    def __init__(self, attention: nn.Module, heads: list[Tensor], put):
        self.dtype = attention_dtype(heads[0].dtype, heads[0].device)
        heads = [x.to(self.dtype) for x in heads]
        addresses = [x.untyped_storage().data_ptr() for x in heads]
        self.inputs: list[Tensor] = []  # q, k, v while the backward runs
        self.got: dict[int, Tensor] = {}  # what the store gave back, meanwhile
        known: dict[tuple, Held] = {}

        def kept(x: Tensor) -> Held:
            """One place for each part of memory, however many views of it are saved."""
            key = x.untyped_storage().data_ptr(), x.storage_offset(), x.numel()
            if key not in known:
                known[key] = put(x.detach())
            return known[key]

        def pack(x: Tensor):
            address = x.untyped_storage().data_ptr()
            if address in addresses:
                return addresses.index(address), x.shape, x.stride(), x.storage_offset()
            if x.nbytes < self.SMALL or not dense(x):
                return x
            return kept(x), x.shape, x.stride()

        def unpack(saved):
            if isinstance(saved, Tensor):
                return saved
            where, *layout = saved
            if isinstance(where, int):
                return self.inputs[where].as_strided(*layout)
            return self._fetched(where).as_strided(*layout)

        handle = torch.empty(0, device=heads[0].device, requires_grad=True)
        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            entered = _Enter.apply(handle, *heads)
            out = attention.attend(*entered)
        self.edges, self.end = [get_gradient_edge(x) for x in entered], get_gradient_edge(out)
        # Most kernels save their output, which is then in its place already
        self.output, self.layout = out.detach(), (out.shape, out.stride())
        self.saved_output = kept(self.output)

    def recall(self, store: Store) -> Tensor:
        """The output [B, H, T, D] again."""
        self.store = store
        return self._fetched(self.saved_output).as_strided(*self.layout)

    def backward(self, heads: list[Tensor], d_out: Tensor) -> list[Tensor]:
        """dq, dk, dv of q, k, v [B, H, T, D] as they were, after `recall`."""
        self.inputs = [x.to(self.dtype) for x in heads]
        grads = torch.autograd.grad([self.end], self.edges, [d_out.to(self.dtype)])
        self.inputs, self.got = [], {}
        return [g.to(x.dtype) for g, x in zip(grads, heads, strict=True)]

    def _fetched(self, held: Held) -> Tensor:
        if id(held) not in self.got:
            self.got[id(held)] = self.store.get(held)
        return self.got[id(held)]
