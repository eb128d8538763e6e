"""The LLaMA, in the nanoGPT manner: one file, one forward, Hugging Face's parameter names, and taps for Q, K and V.

What.  A decoder-only transformer. Each of L blocks adds attention and then a gated MLP to the residual stream:

    h <- h + Attention(RMSNorm(h))          h <- h + W_down (silu(W_gate n) * W_up n),   n = RMSNorm(h)

With H query heads and Hkv key/value heads (grouped-query attention: H / Hkv queries share a key), queries and keys
are turned by their positions (rope.py), and attention is torch's scaled_dot_product_attention. `Block.forward`
returns q, k and v beside h: they are what stage 1 compares (relation_kl.py).

The alphabet.  B batch, T tokens, H heads, Hkv key/value heads, D head dimension, C model width, L layers, V vocabulary.

Precision.  Weights keep the dtype they are given; a Linear casts its weight to the dtype of the activations, so that
float32 master weights train under bf16 compute with no autocast. RMSNorm works in float32, casts to the
activations' dtype and then multiplies by its weight, in that order: so does every LLaMA in the ecosystem.

Families.  llama (1, 2, 3, 3.1, 3.2, TinyLlama, SmolLM), mistral, qwen2 (biases on q, k, v) and qwen3 (q and k norms
before RoPE) differ by four switches in LlamaConfig. Everything else that changes the mathematics is refused by name.

Limits.  No dropout, no MoE. A sliding window (Mistral v0.1) costs a [T, T] mask once T exceeds the window.

Source.  LLaMA arXiv 2302.13971; GQA 2305.13245; layout after nanoGPT; conventions of transformers' modeling_llama.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from hub import checkpoint, files
from rope import RopeConfig, frequencies, rotate, rotation

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
FAMILIES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TRAINED = ("q_proj", "k_proj", "v_proj")  # what learns, in both stages
# Keys that change the mathematics, with the only values that we compute
_FIXED = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, 1.0),
    "no_rope_layers": (),
    "quantization_config": (),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of the network. `source` is the config.json it came from, kept so that an export loses nothing."""

    vocab_size: int
    width: int  # C
    mlp_width: int
    n_layer: int  # L
    n_head: int  # H
    n_kv_head: int  # Hkv
    head_dim: int  # D
    rope: RopeConfig
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    family: str = "llama"
    source: tuple[tuple[str, object], ...] = ()

    @staticmethod
    def from_hf(config: dict) -> "LlamaConfig":
        """Reads config.json. Raises ValueError naming the key, the value and what is supported."""
        family = config.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(
                f"model_type {family!r} is not supported; the known ones are {', '.join(FAMILIES)}"
            )
        for key, allowed in _FIXED.items():
            if config.get(key) not in (None, [], {}, *allowed):
                raise ValueError(
                    f"{key} is {config[key]!r}, which changes the mathematics in a way this model lacks"
                )
        width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", heads)
        head_dim = _size(config, "head_dim", max(width // heads, 1))
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary positions need an even one")
        bias = _flag(config, "attention_bias")
        windowed = family == "mistral" or _flag(config, "use_sliding_window")
        window = config.get("sliding_window") if windowed else None
        if window and family != "mistral" and config.get("max_window_layers") != 0:
            raise ValueError(
                "use_sliding_window is true for some layers only (max_window_layers), which this model lacks"
            )
        return LlamaConfig(
            vocab_size=_size(config, "vocab_size"),
            width=width,
            mlp_width=_size(config, "intermediate_size"),
            n_layer=_size(config, "num_hidden_layers", most=1000),
            n_head=heads,
            n_kv_head=kv_heads,
            head_dim=head_dim,
            rope=replace(RopeConfig.from_hf(config), head_dim=head_dim),
            norm_eps=_epsilon(config),
            tied=_flag(config, "tie_word_embeddings"),
            qkv_bias=bias or family == "qwen2",
            out_bias=bias and family != "qwen2",
            mlp_bias=_flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            window=_size(config, "sliding_window") if window else None,
            family=family,
            source=tuple(config.items()),
        )

    def to_hf(self) -> dict:
        """A config.json for this network: what it came from, with the rope and the window as they are now."""
        out = dict(self.source) | {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv_head,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
        }
        out.pop("original_max_position_embeddings", None)
        out.pop("layer_types", None)
        if self.family == "llama":
            out |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        if self.family in (
            "mistral",
            "qwen2",
            "qwen3",
        ):  # an absent key means 4096 to transformers 5's Mistral
            out["sliding_window"] = self.window
        return out | self.rope.to_hf()

    def extended(self, kind: str, factor: float) -> "LlamaConfig":
        """The student's: positions stretched, and no sliding window, which would hide the longer context."""
        return replace(self, rope=self.rope.scaled(kind, factor), window=None)


def _flag(config: dict, key: str) -> bool:
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        raise ValueError(f"config.json has {key} = {value!r}; it must be true or false")
    return bool(value)


def _epsilon(config: dict) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(
            f"config.json has rms_norm_eps = {value!r}; it must be a number from 0 up to 1, such as 1e-5"
        )
    return float(value)


def _size(config: dict, key: str, default: int | None = None, most: int = 10_000_000) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(
            f"config.json has {key} = {value!r}; it must be an integer from 1 to {most}"
        )
    return value


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input, whatever dtype its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
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
            self.q_norm, self.k_norm = (
                RMSNorm(c.head_dim, c.norm_eps),
                RMSNorm(c.head_dim, c.norm_eps),
            )

    def qkv(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k and v [B, Hkv, T, D]; q and k normed (qwen3) and turned."""
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.c.n_head, self.c.head_dim)
        k = self.k_proj(x).view(B, T, self.c.n_kv_head, self.c.head_dim)
        v = self.v_proj(x).view(B, T, self.c.n_kv_head, self.c.head_dim)
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q.transpose(1, 2), *turn), rotate(k.transpose(1, 2), *turn), v.transpose(1, 2)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cache=None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, C] -> (output [B, T, C], (q, k, v))."""
        B, T, C = x.shape
        q, k, v = self.qkv(x, turn)
        keys, values, seen = (k, v, None) if cache is None else cache.extend(k, v)
        if seen is None and self.c.window and self.c.window < T:
            i = torch.arange(T, device=x.device)
            seen = (i[:, None] >= i) & (i[:, None] - i < self.c.window)
        grouped = self.c.n_head != self.c.n_kv_head
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped
        )  # [B, H, T, D]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), (q, k, v)


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps)

    def forward(
        self, h: Tensor, turn: tuple[Tensor, Tensor], cache=None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h [B, T, C] -> (h after this layer, (q, k, v) inside it)."""
        out, qkv = self.self_attn(self.input_layernorm(h), turn, cache)
        h = h + out
        return h + self.mlp(self.post_attention_layernorm(h)), qkv


class Backbone(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.width, c.norm_eps)


class Llama(nn.Module):
    """The whole network. `model(ids)` gives logits; `hidden` stops before the head, whose output is the big one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] integers -> logits [B, T, V] in the compute dtype."""
        return self.lm_head(self.hidden(ids))

    def embed(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.model.embed_tokens.weight
        return F.embedding(ids, weight).to(dtype or weight.dtype)

    def turn(self, T: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of positions 0 .. T-1."""
        positions = torch.arange(T, device=like.device)
        return rotation(self.config.rope, self.config.head_dim, positions, T, like.dtype)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def score_scale(self, T: int) -> float:
        """a of the Q/Q and K/K relations over T tokens: D^-1/2, over the square of YaRN's temperature."""
        _, temperature = frequencies(self.config.rope, self.config.head_dim, T)
        return self.config.head_dim**-0.5 / temperature**2

    def hidden(
        self, ids: Tensor, dtype: torch.dtype | None = None, checkpointing: bool = False
    ) -> Tensor:
        """[B, T, C] after the last norm. `checkpointing` keeps one [B, T, C] a layer and recomputes the rest."""
        B, T = ids.shape
        h = self.embed(ids, dtype)
        turn = self.turn(T, h)
        for layer in self.model.layers:
            h, _ = (
                recompute(layer, h, turn, use_reentrant=False) if checkpointing else layer(h, turn)
            )
        return self.model.norm(h)

    @staticmethod
    def from_pretrained(
        path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> "Llama":
        """Reads a Hugging Face directory: built without memory, then filled tensor by tensor from the mapped files.

        dtype None keeps each tensor's own. Raises ValueError, before any allocation, naming every tensor that is
        missing, left over or of another shape than config.json says; and for weights that are not finite.
        """
        config = LlamaConfig.from_hf(files.read_json(Path(path) / "config.json"))
        with torch.device("meta"):
            model = Llama(config)
        checkpoint.load_weights(model, Path(path), dtype=dtype, device=device)
        return model.requires_grad_(False).eval()


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


def choose_dtype(device: torch.device, name: str = "auto") -> tuple[torch.dtype, str]:
    """(the dtype to compute in, why)."""
    if name != "auto":
        return getattr(torch, name), "--dtype says so"
    if device.type == "cuda":
        return torch.bfloat16, "a GPU multiplies it fastest"
    return torch.float32, "the device is a CPU"


def compute_dtype(device: torch.device) -> torch.dtype:
    return choose_dtype(device)[0]


def by_chunks(part, chunk: int, *tensors: Tensor) -> Tensor:
    """part(*slices of `chunk` rows), concatenated. More than one chunk: each is recomputed in the backward."""
    pieces = list(zip(*(t.split(chunk) for t in tensors), strict=True))
    if (
        len(pieces) == 1 or not torch.is_grad_enabled()
    ):  # nothing to save: one chunk is alive at a time anyway
        return torch.cat([part(*piece) for piece in pieces])
    return torch.cat([recompute(part, *piece, use_reentrant=False) for piece in pieces])


def next_token_loss(
    model: Llama, h: Tensor, targets: Tensor, chunk: int = 4096, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats of h [B, T, C] against targets [B, T], with at most [chunk, V] logits alive at once.

    reduction: "mean", or "none" for [B, T].
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(x).float(), y, reduction="none")

    losses = by_chunks(part, chunk, h.flatten(0, 1), targets.flatten())
    return losses.mean() if reduction == "mean" else losses.view(targets.shape)
