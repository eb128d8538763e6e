"""The LLaMA in the nanoGPT manner: one file, one forward, Hugging Face's names, taps for q, k, v.

What.  A decoder-only transformer. Each of L blocks adds attention and then a gated MLP to the
residual stream:

    h <- h + Attention(n)                          n = RMSNorm(h)
    h <- h + W_down (silu(W_gate n) * W_up n)      n = RMSNorm(h), with other weights

With H query heads and Hkv key/value heads (grouped-query attention: H / Hkv queries share a key),
queries and keys are turned by their positions (rope.py), and attention is torch's
scaled_dot_product_attention. `Block.forward` returns q, k and v with h: they are what stage 1
compares (relation_kl.py). `Llama.walk` goes through the layers one by one, for whoever looks
inside.

The alphabet.  B batch, T tokens, H heads, Hkv key/value heads, D head dimension, C model width,
L layers, V vocabulary.

Precision.  Weights keep the dtype they are given; a Linear casts its weight to the dtype of the
activations, so that float32 master weights train under bfloat16 compute with no autocast. RMSNorm
works in float32, casts to the activations' dtype and then multiplies by its weight, in that order:
so does every LLaMA in the ecosystem. precision.py chooses the dtype of activations, unless told
one, and of attention.

The student.  `make_student` builds a second Llama around the teacher's own tensors: nothing is
copied but the weights that learn.

Families.  llama (1, 2, 3, 3.1, 3.2, TinyLlama, SmolLM), mistral, qwen2 (biases on q, k, v) and
qwen3 (q and k norms before RoPE) differ by a few switches in LlamaConfig, which hub/config.py
reads. Everything else that changes the mathematics is refused by name.

Limits.  No dropout, no MoE. A sliding window (Mistral v0.1) costs a [T, T] mask once T exceeds it.

Source.  LLaMA arXiv 2302.13971; GQA 2305.13245; layout after nanoGPT; conventions of transformers'
modeling_llama.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from hub import checkpoint, rope_json
from hub import config as config_json
from hub.checkpoint import set_parameter
from precision import attention_dtype
from rope import RopeConfig, frequencies, rotate, rotation, turns

TRAINED = ("q_proj", "k_proj", "v_proj")  # what learns, in both stages

# ------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of the network. `source`: the config.json it came from, so that exports keep it."""

    vocab_size: int  # V
    width: int  # C
    mlp_width: int
    n_layer: int  # L
    n_head: int  # H
    n_kv_head: int  # Hkv
    rope: RopeConfig  # positions, and D
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # how many tokens a query sees, itself included; None: all
    family: str = "llama"
    source: tuple[tuple[str, object], ...] = ()

    @property
    def head_dim(self) -> int:
        """D: how many numbers a head's vector has."""
        return self.rope.head_dim

    @staticmethod
    def from_hf(config: dict) -> "LlamaConfig":
        """Reads config.json. Raises ValueError naming the key, its value and what is supported."""
        filled = config_json.fill(config)
        return LlamaConfig(**config_json.read(filled), rope=rope_json.read(filled))

    def to_hf(self) -> dict:
        """A config.json for this network: its source, with rope and window as they are now."""
        return config_json.write(self) | rope_json.write(self.rope)

    def extended(self, kind: str, factor: float) -> "LlamaConfig":
        """The student's: positions stretched, and no window, which would hide the new context."""
        return replace(self, rope=self.rope.scaled(kind, factor), window=None)


# ------------------------------------------------------------------------------------- the network


def widened(x: Tensor) -> Tensor:
    """x, any shape, in float32; in float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


@functools.cache
def choose_glue(device: torch.device, dtype: torch.dtype) -> tuple[object, str]:
    """(kernel_glue.py where its kernels serve such activations, else None; why).

    Without it RMSNorm, the MLP's gate and rope.rotate run as they are written, which defines them.
    """
    if device.type != "cuda":
        return None, f"the tensors are on {device.type}"
    try:
        import kernel_glue
        from kernel_host import refusal
    except ImportError as e:
        return None, f"Triton cannot be imported ({e})"
    if reason := refusal(device, dtype):
        return None, reason
    return kernel_glue, "a GPU waits for memory between products"


def glue(x: Tensor):
    """kernel_glue.py or None: what tensors like x, any shape, go through between products."""
    return choose_glue(x.device, x.dtype)[0]


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input, whatever dtype its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs] in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and dtype."""
        if (kernels := glue(x)) and not self.weight.requires_grad:
            return kernels.rms_norm(x, self.weight, self.eps)
        wide = widened(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.c = c
        self.q_proj = Linear(c.width, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.width, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def qkv(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k and v [B, Hkv, T, D]; q and k normed (qwen3), turned."""
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.c.n_head, self.c.head_dim)
        k = self.k_proj(x).view(B, T, self.c.n_kv_head, self.c.head_dim)
        v = self.v_proj(x).view(B, T, self.c.n_kv_head, self.c.head_dim)
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        kernels = glue(q)
        turned = kernels.rotate if kernels else rotate
        q, k = (turned(x.transpose(1, 2), *cos_sin) for x in (q, k))
        return q, k, v.transpose(1, 2)

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], cache=None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x [B, T, C] -> (output [B, T, C], (q, k, v)). cache: earlier keys, evals/generate.py."""
        q, k, v = self.qkv(x, cos_sin)
        keys, all_values, seen = (k, v, None) if cache is None else cache.extend(k, v)
        return self.project(self.attend(q, keys, all_values, seen)), (q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """q [B, H, T, D], k and v [B, Hkv, S, D] -> [B, H, T, D], all heads or a share of them.

        seen: which keys a query sees, [T, S]; None: those up to its own, in the window, and all
        where there is one query.
        """
        T, dtype = q.shape[2], attention_dtype(q.dtype, q.device)
        if seen is None and self.c.window and self.c.window < T:
            i = torch.arange(T, device=q.device)
            seen = (i[:, None] >= i) & (i[:, None] - i < self.c.window)
        out = F.scaled_dot_product_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            attn_mask=seen,
            is_causal=seen is None and T > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.to(q.dtype)

    def project(self, out: Tensor) -> Tensor:
        """What all heads found, [B, H, T, D] -> [B, T, C]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        kernels = glue(gate)
        return self.down_proj(kernels.swiglu(gate, up) if kernels else F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps)

    def forward(
        self, h: Tensor, cos_sin: tuple[Tensor, Tensor], cache=None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """h [B, T, C] -> (h after this layer, (q, k, v) inside it)."""
        out, qkv = self.self_attn(self.input_layernorm(h), cos_sin, cache)
        return self.add_mlp(h + out), qkv

    def add_mlp(self, h: Tensor) -> Tensor:
        """h [B, T, C] with attention's output added -> h after this layer."""
        return h + self.mlp(self.post_attention_layernorm(h))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """On the meta device nothing: there torch would import its compiler for it, 2 s."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Backbone(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.width, c.norm_eps)


@functools.lru_cache(maxsize=8)  # teacher's and student's, at the lengths of a run
def _cos_sin(rope: RopeConfig, head_dim: int, T: int, device: torch.device, dtype: torch.dtype):
    return rotation(rope, head_dim, torch.arange(T, device=device), T, dtype)


@functools.lru_cache(maxsize=8)  # a CUDA graph cannot record the copy to the GPU
def _frequencies(rope: RopeConfig, head_dim: int, device: torch.device):
    w, attention_factor = frequencies(rope, head_dim, rope.length)
    return w.to(device), attention_factor


class Llama(nn.Module):
    """The whole network. `model(ids)` gives logits; `hidden` stops before the head, the big one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the embeddings' own, as trained projections may be kept wider."""
        return self.model.embed_tokens.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] integers -> logits [B, T, V] in the dtype of the embeddings."""
        return self.lm_head(self.hidden(ids))

    def embed(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """ids [B, T] -> h [B, T, C] in `dtype` (None: the model's), which all layers keep."""
        return F.embedding(ids, self.model.embed_tokens.weight).to(dtype or self.dtype)

    def cos_sin(
        self, T: int, like: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of positions 0 .. T-1, or of these [T], on the device and in the dtype
        of `like`.
        """
        rope, D = self.config.rope, self.config.head_dim
        if positions is not None:
            return turns(*_frequencies(rope, D, like.device), positions, like.dtype)
        return _cos_sin(rope, D, T, like.device, like.dtype)

    def walk(
        self,
        ids: Tensor,
        dtype: torch.dtype | None = None,
        recomputed: int = 0,
        positions: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """ids [B, T] -> layer by layer: h [B, T, C] after it, and the q, k and v inside it.

        Lazy: a layer runs when it is asked for, so that two models can advance in lock-step with
        one layer of each alive. recomputed: the first so many layers keep h alone for the backward
        and compute the rest again in it (activation checkpointing). positions: as for `cos_sin`.
        """
        h = self.embed(ids, dtype)
        cos_sin = self.cos_sin(ids.shape[1], h, positions)
        for l, layer in enumerate(self.model.layers):
            if l < recomputed:
                h, qkv = recompute(layer, h, cos_sin, use_reentrant=False)
            else:
                h, qkv = layer(h, cos_sin)
            yield h, qkv

    def after_layers(
        self,
        ids: Tensor,
        dtype: torch.dtype | None = None,
        recomputed: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> [B, T, C] before the last norm."""
        for h, _ in self.walk(ids, dtype, recomputed, positions):  # noqa: B007 - the last is wanted
            pass
        return h

    def hidden(
        self,
        ids: Tensor,
        dtype: torch.dtype | None = None,
        recomputed: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> [B, T, C] after the last norm."""
        return self.model.norm(self.after_layers(ids, dtype, recomputed, positions))

    def score_scale(self, T: int) -> float:
        """The scale of the Q/Q and K/K relations over T tokens: D^-1/2 / attention factor^2."""
        _, attention_factor = frequencies(self.config.rope, self.config.head_dim, T)
        return self.config.head_dim**-0.5 / attention_factor**2

    @staticmethod
    def from_pretrained(
        path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> "Llama":
        """A Hugging Face directory, built without memory and filled from its mapped files.

        dtype None keeps each tensor's own. Raises ValueError naming every tensor that is missing,
        left over or of another shape than config.json says, before any allocation; and for weights
        that are not finite.
        """
        config = LlamaConfig.from_hf(checkpoint.read_config(Path(path)))
        with torch.device("meta"):
            model = Llama(config)
        checkpoint.load_weights(model, Path(path), dtype=dtype, device=device)
        return model.requires_grad_(False).eval()


# -------------------------------------------------------------- the student, and what it learns


def make_student(teacher: Llama, config: LlamaConfig, trained: tuple[str, ...] = TRAINED) -> Llama:
    """A Llama of `config` that shares the teacher's tensors, but for float32 copies of `trained`.

    trained: names of projections; their copies, and nothing else, require grad.
    """
    with torch.device("meta"):
        student = Llama(config)
    for name, p in teacher.named_parameters():
        if name.split(".")[-2] in trained:
            p = nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=True)
        set_parameter(student, name, p)
    return student.eval()


@torch.no_grad()
def move_pairs(student: Llama, pairs: list[int]) -> None:
    """Slot j of every head of q and k gets the rows of pair pairs[j]; see rope.pairs_by_slot."""
    D = student.config.head_dim
    first = torch.tensor(pairs, device=student.model.layers[0].self_attn.q_proj.weight.device)
    rows = torch.cat((first, first + D // 2))
    for layer in student.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for p in projection.parameters():  # [heads D, C] and [heads D]
                p.copy_(p.unflatten(0, (-1, D))[:, rows].flatten(0, 1))


def trainable(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def by_chunks(function, chunk: int, *tensors: Tensor) -> Tensor:
    """function(slices of `chunk` rows of each tensor [rows, ...]), concatenated.

    With more than one chunk, each is recomputed in the backward, so that one is alive at a time.
    """
    pieces = list(zip(*(t.split(chunk) for t in tensors), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():  # nothing is saved for a backward
        return torch.cat([function(*piece) for piece in pieces])
    return torch.cat([recompute(function, *piece, use_reentrant=False) for piece in pieces])


def next_token_loss(
    model: Llama, h: Tensor, targets: Tensor, chunk: int = 4096, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats of h [B, T, C] against targets [B, T].

    At most [chunk, V] logits exist at once. reduction: "mean", or "none" for [B, T].
    """

    def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(widened(model.lm_head(x)), y, reduction="none")

    losses = by_chunks(cross_entropy, chunk, h.flatten(0, 1), targets.flatten())
    return losses.mean() if reduction == "mean" else losses.view(targets.shape)
