"""config.json of the LLaMA's families: read into the numbers of a network, and written again.

What.  One file layout serves several families, whose networks differ by a few switches:

    model_type   q, k, v biases     norms on q, k     sliding window
    llama        attention_bias     no                none
    mistral      no                 no                sliding_window
    qwen2        always             no                sliding_window if use_sliding_window
    qwen3        attention_bias     yes               sliding_window if use_sliding_window

A key that is absent has a default of its family's, as in transformers: Mistral's window is 4,096.
`read` refuses, by name and value, what changes the mathematics otherwise and what transformers 5
would refuse. JSON is loose where Python must not be: true is not 1, "32" is not 32, null is not the
same as absent, and a vocabulary of 10^12 is a typing error that would be allocated.

Limits.  Positions, and the head dimension that they depend on, are rope_json.py's. A window over
some layers only is refused.

Source.  transformers 4.57 and 5: configuration_llama, _mistral, _qwen2, _qwen3.
"""

import json

from hub.rope_json import LENGTHS

FAMILIES = {  # model_type: the class that transformers has for it
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers": 28}
_DEFAULTS = {  # what an absent key means
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
# Keys that change the mathematics, with the only values that we compute
_ONLY = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1.0),
    "no_rope_layers": (None, []),
}
# Keys of which any value but null, {} too, says that the weights are quantised; the last: MLX's
_QUANTISED = ("quantization_config", "compression_config", "quantization")
# Keys that change nothing here, with examples of what transformers 5 takes. It refuses another JSON
# type or name, so that an export with one would load nowhere
_EXAMPLES = (
    (("use_cache", "output_hidden_states", "return_dict", "is_encoder_decoder"), (True, False)),
    (("attention_dropout",), (0.0, 0)),
    (("chunk_size_feed_forward",), (0,)),
    (("pretraining_tp", "bos_token_id", "pad_token_id"), (2, None)),
    (("eos_token_id",), (2, [2], None)),
    (("architectures",), (["LlamaForCausalLM"], None)),
    (("id2label",), ({"0": "a label"},)),
    (("label2id",), ({"a label": 0},)),
    (("auto_map",), ({},)),
    (("dtype", "torch_dtype"), ("float16", "bfloat16", "float32", "float64", None)),
    (("attn_implementation", "_attn_implementation"), ("eager", "sdpa", "flash_attention_2", None)),
)
# Keys of a source that an export does not keep: written anew, no longer true, or code by reference
_STALE = (
    "original_max_position_embeddings",
    *LENGTHS,
    "max_length",  # of generated texts: it caps what transformers 4 writes
    "task_specific_params",  # which its pipelines prefer, and may hold the same
    "layer_types",
    "dtype",
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "_name_or_path",
    "transformers_version",
)


def fill(config: dict) -> dict:
    """The config with its family's defaults where it has none; ValueError for an unknown family."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type {family!r} is not supported; the known ones are {known}")
    return _DEFAULTS[family] | config


def read(config: dict) -> dict:
    """The network's numbers by the names of model.LlamaConfig's fields, without its `rope`.

    config: filled. Raises ValueError naming the key, the value and what is supported.
    """
    family = config["model_type"]
    for key in _QUANTISED:
        if config.get(key) is not None:
            raise ValueError(
                f"{key} is {str(config[key])[:80]}: the checkpoint is quantised, and what is "
                "trained and exported here are full weights; give the original model"
            )
    if other := config.get("transformers_weights"):
        raise ValueError(
            f"config.json has transformers_weights = {str(other)[:80]!r}, weights of another name; "
            "remove the key, and call the weights model.safetensors"
        )
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"{key} is {config[key]!r}, which changes the mathematics in a way this model lacks"
            )
    for keys, examples in _EXAMPLES:
        for key in keys:
            _check_like(config, key, examples)
    _fraction(config, "initializer_range", 0.02)
    _size(config, "num_labels", 2)
    pad, size = config.get("pad_token_id"), _size(config, "vocab_size")
    if pad is not None and not -size <= pad < size:
        raise ValueError(f"config.json has pad_token_id = {pad}; vocab_size is {size}")
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = config["num_key_value_heads"]
    if kv_heads is not None or family == "mistral":
        kv_heads = _size(config, "num_key_value_heads")
    if heads % (kv_heads or heads):
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if family == "llama" and width % heads:
        raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    if family in ("qwen2", "qwen3"):
        _size(config, "head_dim", 1)  # null is not taken here, where the others derive it
    bias = family in ("llama", "qwen3") and _flag(config, "attention_bias")
    n_layer = _size(config, "num_hidden_layers", most=1000)
    return {
        "vocab_size": size,
        "width": width,
        "mlp_width": _size(config, "intermediate_size"),
        "n_layer": n_layer,
        "n_head": heads,
        "n_kv_head": kv_heads or heads,
        "norm_eps": _fraction(config, "rms_norm_eps", 1e-6),
        "tied": _flag(config, "tie_word_embeddings"),
        "qkv_bias": bias or family == "qwen2",
        "out_bias": bias,
        "mlp_bias": family == "llama" and _flag(config, "mlp_bias"),
        "qk_norm": family == "qwen3",
        "window": _window(config, family, n_layer),
        "family": family,
        "source": tuple(config.items()),
    }


def write(c) -> dict:
    """config.json of `c`, a LlamaConfig, without its positions: its source, brought up to date."""
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
    else:  # written even where it is null: an absent key means 4096 to transformers
        out["sliding_window"] = c.window
    if c.family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = c.window is not None
    return out


def _window(config: dict, family: str, n_layer: int) -> int | None:
    """The window of all layers, or None; refused where it is that of some."""
    names = config.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if names is not None and not (
        isinstance(names, list) and len(names) == n_layer and all(n in kinds for n in names)
    ):
        raise ValueError(
            f"config.json has layer_types = {str(names)[:80]}; it must name one of "
            f"{', '.join(kinds)} for each of the {n_layer} layers"
        )
    if family == "llama":
        windowed = 0
    elif family == "mistral":
        windowed = n_layer
    else:
        first = config["max_window_layers"]
        if not _integer(first) or first < 0:
            raise ValueError(f"max_window_layers is {first!r}; it must be an integer, 0 or more")
        on = _flag(config, "use_sliding_window") and config.get("sliding_window", 4096) is not None
        windowed = max(0, n_layer - first) if on else 0
    value = config.get("sliding_window", 4096)
    if value is not None:
        value = _size(config, "sliding_window", 4096)
    if windowed not in (0, n_layer) or (names and names != [kinds[windowed > 0]] * n_layer):
        raise ValueError(
            "the sliding window is that of some layers only (max_window_layers, layer_types), "
            "which this model lacks"
        )
    return value if windowed else None


def _check_like(config: dict, key: str, examples: tuple) -> None:
    """A string must be one of the examples, any other value like one of them."""
    value = config.get(key, examples[0])
    unknown = isinstance(value, str) and value not in examples
    if unknown or not any(_alike(value, example) for example in examples):
        like = " or ".join(map(json.dumps, examples))
        raise ValueError(
            f"config.json has {key} = {value!r}; it must be {like} or the like, or be left out"
        )


def _alike(value, example) -> bool:
    """Whether two values have one JSON type, and all elements that of the example's first."""
    if isinstance(example, dict):
        return isinstance(value, dict) and _alike([*value.values()], [*example.values()])
    if isinstance(example, list):
        return isinstance(value, list) and all(_alike(v, e) for v in value for e in example[:1])
    return type(value) is type(example)


def _integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(config: dict, key: str) -> bool:
    """True or false; absent: false."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json has {key} = {value!r}; it must be true or false")
    return value


def _size(config: dict, key: str, default: int | None = None, most: int = 10_000_000) -> int:
    """An integer from 1 to `most`; absent: the default, and refused where there is none."""
    value = config.get(key, default)
    if not _integer(value) or not 0 < value <= most:
        raise ValueError(
            f"config.json has {key} = {value!r}; it must be an integer from 1 to {most}"
        )
    return value


def _fraction(config: dict, key: str, default: float) -> float:
    """A float from 0 up to 1, such as an epsilon; absent: the default."""
    value = config.get(key, default)
    if not isinstance(value, float) or not 0 <= value < 1:
        raise ValueError(
            f"config.json has {key} = {value!r}; it must be a number from 0 up to 1, such as 1e-5"
        )
    return value
