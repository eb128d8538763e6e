"""config.json of the LLaMA's families: read into the numbers of a network, and written again.

What.  One file layout serves several families, whose networks differ by a few switches:

    model_type   q, k, v biases     norms on q, k     sliding window
    llama        attention_bias     no                none
    mistral      no                 no                sliding_window
    qwen2        always             no                sliding_window if use_sliding_window
    qwen3        attention_bias     yes               sliding_window if use_sliding_window

`read` refuses, by name and value, everything else that changes the mathematics. JSON is loose where
Python must not be: true is not 1, "32" is not 32, null means that a key is absent, and a vocabulary
of 10^12 is a typing error that would be allocated.

Limits.  Positions, and the head dimension that they depend on, are rope.py's to read and write.

Source.  transformers 4.57 and 5: configuration_llama, _mistral, _qwen2, _qwen3.
"""

FAMILIES = {  # model_type: the class that transformers has for it
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ONLY = {  # keys that change the mathematics, with the only values that we compute
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, 1.0),
    "no_rope_layers": (),
    "quantization_config": (),
}
# keys of a source that an export does not keep: written anew with the positions, or no longer true
_STALE = ("original_max_position_embeddings", "layer_types")


def read(config: dict) -> dict:
    """The network's numbers by the names of model.LlamaConfig's fields, without its `rope`.

    Raises ValueError naming the key, the value and what is supported.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type {family!r} is not supported; the known ones are {known}")
    for key, allowed in _ONLY.items():
        if config.get(key) not in (None, [], {}, *allowed):
            raise ValueError(
                f"{key} is {config[key]!r}, which changes the mathematics in a way this model lacks"
            )
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    bias = _flag(config, "attention_bias")
    return {
        "vocab_size": _size(config, "vocab_size"),
        "width": _size(config, "hidden_size"),
        "mlp_width": _size(config, "intermediate_size"),
        "n_layer": _size(config, "num_hidden_layers", most=1000),
        "n_head": heads,
        "n_kv_head": kv_heads,
        "norm_eps": _fraction(config, "rms_norm_eps", 1e-6),
        "tied": _flag(config, "tie_word_embeddings"),
        "qkv_bias": bias or family == "qwen2",
        "out_bias": bias and family != "qwen2",
        "mlp_bias": _flag(config, "mlp_bias"),
        "qk_norm": family == "qwen3",
        "window": _window(config, family),
        "family": family,
        "source": tuple(config.items()),
    }


def write(c) -> dict:
    """config.json of a network `c`, a LlamaConfig, without its positions: its source, brought up to
    date."""
    out = {k: v for k, v in c.source if k not in _STALE} | {
        "architectures": [FAMILIES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
    }
    if c.family == "llama":
        out |= {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
    else:  # said even where it is null: an absent key means 4096 to transformers' Mistral
        out["sliding_window"] = c.window
    return out


def _window(config: dict, family: str) -> int | None:
    windowed = family == "mistral" or _flag(config, "use_sliding_window")
    if not windowed or not config.get("sliding_window"):
        return None
    if family != "mistral" and config.get("max_window_layers") != 0:
        raise ValueError(
            "use_sliding_window is true for some layers only (max_window_layers), which this model "
            "lacks"
        )
    return _size(config, "sliding_window")


def _flag(config: dict, key: str) -> bool:
    """True or false; absent or null: false."""
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        raise ValueError(f"config.json has {key} = {value!r}; it must be true or false")
    return bool(value)


def _size(config: dict, key: str, default: int | None = None, most: int = 10_000_000) -> int:
    """An integer from 1 to `most`; absent or null: the default, and refused where there is none."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(
            f"config.json has {key} = {value!r}; it must be an integer from 1 to {most}"
        )
    return value


def _fraction(config: dict, key: str, default: float) -> float:
    """A number from 0 up to 1, such as an epsilon; absent: the default."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(
            f"config.json has {key} = {value!r}; it must be a number from 0 up to 1, such as 1e-5"
        )
    return float(value)
