"""config.json against transformers 5: what it refuses we refuse, and what both take means the same."""

import copy
import logging

import pytest
import torch
import transformers
from conftest import tiny_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hub import rope_json
from hub.config import FAMILIES
from model import LlamaConfig
from rope import RopeConfig, frequencies

VALUES = [None, True, False, -1, 0, 1, 4, 4096, 10**5, 0.5, -0.5, 2.0, 1e308, float("nan"), "x", "",
          "float32", [], [1], ["a"], [4095, 4094], {}, {"a": 1}]  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TABLES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN
    | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1, "truncate": True}
    | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}
    | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "attention_factor": 1.1},
}
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
WINDOW_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
ABSENT = object()


def cases(family: str) -> dict[str, dict]:
    """{what was changed: config.json}: every key with every value and without it, tables as well."""
    base = tiny_config(model_type=family)
    known = transformers.AutoConfig.for_model(family).to_dict()
    out = {}

    def add(name: str, config: dict) -> None:
        out[name] = {k: v for k, v in config.items() if v is not ABSENT}

    for key in sorted({*known, *base, *ROPE_KEYS, *WINDOW_KEYS, "torch_dtype"} - {"model_type"}):
        for value in [*VALUES, ABSENT]:
            add(f"{key} = {value!r}", base | {key: value})
    for name, table in TABLES.items():
        for key in table:
            for value in [*VALUES, ABSENT]:
                changed = {k: v for k, v in (table | {key: value}).items() if v is not ABSENT}
                add(f"{name}: {key} = {value!r}", base | {"rope_scaling": changed})
        other = {"rope_type": "default", "rope_theta": 5e5}
        both = base | {"rope_scaling": table, "rope_parameters": other}
        add(f"{name}: another theta in the other dialect", both | {"rope_theta": ABSENT})
        for value in (16, 32, None):
            changed = base | {"rope_scaling": table, "original_max_position_embeddings": value}
            add(f"{name}: original {value} at the top", changed)
    for on in (True, False):
        for first in range(4):
            window = {"use_sliding_window": on, "max_window_layers": first, "sliding_window": 20}
            add(f"window {on} from layer {first}", base | window)
    for names in (["full"], ["full", "sliding"], ["full", "full"], ["sliding", "sliding"]):
        window = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 20}
        add(f"layers {names}", base | window | {"layer_types": [f"{n}_attention" for n in names]})
    return out


def theirs(config: dict):
    config = copy.deepcopy(config)
    family = config.pop("model_type")
    return transformers.AutoConfig.for_model(family, **config)


def same_meaning(ours: LlamaConfig, config) -> None:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = config.rope_parameters["rope_type"]
    for length in (16, 2000):
        if kind == "default":
            exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
            expected, factor = 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
        else:
            expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        w, attention = frequencies(ours.rope, ours.head_dim, length)
        torch.testing.assert_close(w, expected, rtol=1e-6, atol=0)
        assert attention == pytest.approx(factor, rel=1e-6)
    window = None if ours.family == "llama" else config.sliding_window
    if any(kind != "sliding_attention" for kind in getattr(config, "layer_types", None) or ()):
        window = None
    assert ours.window == window and ours.n_kv_head == config.num_key_value_heads
    assert ours.norm_eps == config.rms_norm_eps and ours.tied == config.tie_word_embeddings
    assert ours.rope.max_position == config.max_position_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_refuses_is_refused_and_what_both_take_means_the_same(family):
    """About 1,700 files per family; to refuse more than transformers does is allowed."""
    taken, refused, wrong = 0, 0, []
    logging.disable(logging.WARNING)
    for name, config in cases(family).items():
        try:
            ours = LlamaConfig.from_hf(copy.deepcopy(config))
        except ValueError as e:
            assert str(e) and "\n" not in str(e), name
            refused += 1
            continue
        taken += 1
        try:
            same_meaning(ours, theirs(config))
        except Exception as e:  # whatever transformers raises, an assertion included
            wrong.append(f"{name}: {type(e).__name__} {str(e)[:100]}")
    logging.disable(logging.NOTSET)
    assert not wrong, "\n".join(wrong)
    assert taken > 350 and refused > 900, "a comparison of nothing shows nothing"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"max_position_embeddings": 0.5}, "max_position_embeddings is 0.5; it must be an integer"),
        ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta is 1.0; it must be above 1"),
        ({"rope_scaling": YARN | {"beta_fast": [1]}}, r"beta_fast is \[1\]"),
        (
            {"rope_scaling": TABLES["llama3"] | {"low_freq_factor": [1]}},
            r"low_freq_factor is \[1\]",
        ),
        ({"rope_scaling": TABLES["llama3"] | {"low_freq_factor": 5.0}}, "must be below high_freq"),
        ({"head_dim": 2, "rope_scaling": TABLES["dynamic"]}, "head_dim is 2; dynamic"),
        ({"rope_scaling": TABLES["linear"] | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"use_cache": "x"}, "use_cache = 'x'; it must be true or false"),
        # what transformers refuses when it builds the model, which the comparison above does not
        ({"pad_token_id": 4096}, "pad_token_id = 4096; vocab_size is 4096"),
        ({"pad_token_id": -4097}, "pad_token_id = -4097"),
        ({"num_labels": 0.5}, "num_labels = 0.5"),
        ({"num_labels": 10**30}, "num_labels = 10000"),
        ({"auto_map": None}, "auto_map = None"),
        ({"attn_implementation": "x"}, "attn_implementation = 'x'"),
        ({"_attn_implementation": 1}, "_attn_implementation = 1"),
        ({"quantization_config": {}}, "quantization_config is {}"),
        ({"sliding_window": "8"}, "sliding_window = '8'"),
        ({"model_type": "qwen2", "head_dim": None}, "head_dim = None"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "some layers",
        ),
    ],
)
def test_a_value_that_ended_in_a_traceback_or_another_model_is_a_sentence(change, said):
    with pytest.raises(ValueError, match=said):
        LlamaConfig.from_hf(tiny_config(**change))


@pytest.mark.parametrize("kind", ["ntk", "dynamic"])
def test_a_scale_that_positions_cannot_have_is_refused(kind):
    with pytest.raises(ValueError, match="head_dim is 2"):
        RopeConfig(head_dim=2).scaled(kind, 8)
    with pytest.raises(ValueError, match=r"beyond 2\^31"):
        RopeConfig().scaled(kind, 1e300)


def test_a_key_that_is_absent_has_its_familys_default():
    bare = {k: v for k, v in tiny_config().items() if k not in ("head_dim", "num_key_value_heads")}
    assert LlamaConfig.from_hf(bare).window is None and LlamaConfig.from_hf(bare).n_kv_head == 4
    mistral = LlamaConfig.from_hf(tiny_config(model_type="mistral"))
    assert mistral.window == 4096
    with pytest.raises(ValueError, match="not a multiple of num_key_value_heads 8"):
        LlamaConfig.from_hf(bare | {"model_type": "mistral"})
    qwen3 = LlamaConfig.from_hf(bare | {"model_type": "qwen3", "num_key_value_heads": 2})
    assert qwen3.head_dim == 128
    assert (
        LlamaConfig.from_hf(tiny_config(use_sliding_window=True, sliding_window=9)).window is None
    )


def test_qwens_documented_yarn_keeps_the_old_length_and_claims_the_new_one():
    """Its page adds the table and leaves max_position_embeddings at the length before scaling."""
    table = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = rope_json.read({"max_position_embeddings": 32768, "rope_scaling": table})
    assert rope.length == 131072 and rope.max_position == 32768
    longer = rope.scaled("yarn", 2)
    assert longer.length == longer.max_position == 262144
    assert longer.factor == 8 and longer.original == 32768


def test_an_export_keeps_no_reference_to_code_nor_to_a_folder():
    source = tiny_config(auto_map={"AutoModel": "modeling.Evil"}, _name_or_path="home/secret")
    written = LlamaConfig.from_hf(source).to_hf()
    assert not {"auto_map", "_name_or_path"} & set(written)
