"""Frequencies against golden values and transformers' own functions; both dialects of config.json."""

import math

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hub import rope_json
from rope import RopeConfig, frequencies, pairs_by_slot, rotate, rotation

INDEX = [0, 1, 16, 20, 24, 32, 40, 45, 48, 63]
LONG = [1.0 + 0.25 * i for i in range(64)]
BASE_HEAD = {"head_dim": 128, "num_attention_heads": 1}
_M0 = "original_max_position_embeddings"
# (config keys, seq_len, values at INDEX, sum over 64, attention factor), from transformers 4.57.6
# and 5.23.0 fmt: off
GOLDEN = {
    "default": (
        {},
        None,
        [
            1,
            0.865964353,
            0.100000001,
            0.0562341288,
            0.0316227786,
            0.00999999978,
            0.00316227786,
            0.00153992651,
            0.00100000005,
            0.000115478193,
        ],
        7.4599542,
        1,
    ),
    "linear": (
        {"rope_type": "linear", "factor": 8.0},
        None,
        [
            0.125,
            0.108245544,
            0.0125000002,
            0.0070292661,
            0.00395284733,
            0.00124999997,
            0.000395284733,
            0.000192490814,
            0.000125000006,
            1.44347741e-05,
        ],
        0.932494275,
        1,
    ),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 8.0},
        32768,
        [
            1,
            0.812136412,
            0.0358148813,
            0.0155804297,
            0.0067779026,
            0.00128270581,
            0.000242749782,
            8.57637351e-05,
            4.59399562e-05,
            2.02593333e-06,
        ],
        5.32300192,
        1,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
        None,
        [
            1,
            0.865964353,
            0.100000001,
            0.0562341288,
            0.0273658652,
            0.00596153876,
            0.00103382161,
            0.000244315306,
            0.000125000006,
            1.44347741e-05,
        ],
        7.3715494,
        1.20794415,
    ),
    "yarn, not truncated": (
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        None,
        [
            1,
            0.865964353,
            0.100000001,
            0.0562341288,
            0.0281120818,
            0.00598313287,
            0.000972857641,
            0.000193994769,
            0.000125000006,
            1.44347741e-05,
        ],
        7.37727735,
        1.20794415,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        None,
        [
            1,
            0.814617217,
            0.0376060307,
            0.0165604409,
            0.00729266508,
            0.000524846022,
            3.42810235e-05,
            1.22976389e-05,
            6.64786967e-06,
            3.06892588e-07,
        ],
        5.38605826,
        1,
    ),
}
# fmt: on
BASE = {
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "head_dim": 128,
    "num_attention_heads": 1,
}


def keys(name: str) -> dict:
    base = dict(BASE, rope_theta=5e5, max_position_embeddings=65536) if name == "llama3" else BASE
    return dict(base, rope_scaling=GOLDEN[name][0] or None)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    _, seq_len, values, total, factor = GOLDEN[name]
    w, attention = frequencies(rope_json.read(keys(name)), 128, seq_len)
    torch.testing.assert_close(w[INDEX], torch.tensor(values), rtol=2e-6, atol=0)
    assert w.double().sum().item() == pytest.approx(total, rel=1e-6) and attention == pytest.approx(
        factor, rel=1e-6
    )


TABLES = {name: dict(keys(name)["rope_scaling"] or {"rope_type": "default"}) for name in GOLDEN} | {
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 0.7,
                     "mscale_all_dim": 1.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 1024,
                 "short_factor": [1.0] * 64, "long_factor": LONG},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dialect", ["v4", "v5"])
@pytest.mark.parametrize("seq_len", [512, 30000])
def test_equal_to_transformers(name, dialect, seq_len):
    table = TABLES[name]
    theirs = TheirConfig(hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=4096,
                         rope_parameters={**table, "rope_theta": 10000.0})  # fmt: skip
    config = {"max_position_embeddings": 4096, "head_dim": 128, "num_attention_heads": 2}
    if dialect == "v4":
        config |= {"rope_theta": 10000.0, "rope_scaling": table}
    else:
        config |= {"rope_parameters": {**table, "rope_theta": 10000.0}}
    ours, attention = frequencies(rope_json.read(config), 128, seq_len)
    if name == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        expected, factor = LlamaRotaryEmbedding(theirs).inv_freq, 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[table["rope_type"]](theirs, "cpu", seq_len=seq_len)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert attention == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_a_round_trip_through_either_dialect_alone_changes_nothing(name):
    rope = rope_json.read(dict(BASE, rope_scaling=TABLES[name]))
    written = rope_json.write(rope) | {"head_dim": 128, "num_attention_heads": 1}
    without_v5 = {k: v for k, v in written.items() if k != "rope_parameters"}
    without_v4 = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}
    for config in (written, without_v5, without_v4):
        again = rope_json.read(config)
        for seq_len in (100, 9000):
            assert torch.equal(
                frequencies(again, 128, seq_len)[0], frequencies(rope, 128, seq_len)[0]
            )
        assert again.length == rope.length


def test_the_linear_file_is_the_one_that_every_reader_understands():
    written = rope_json.write(RopeConfig(max_position=4096).scaled("linear", 8))
    assert written == {
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    }


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_table_names_its_kind_once_as_every_client_reads_it(kind):
    """ExLlamaV2 refuses both names; Ollama reads `rope_type` for llama3 and `type` elsewhere."""
    written = rope_json.write(RopeConfig(max_position=4096).scaled(kind, 8))
    name, other = ("rope_type", "type") if kind == "llama3" else ("type", "rope_type")
    assert written["rope_scaling"][name] == kind and other not in written["rope_scaling"]
    assert written["rope_parameters"]["rope_type"] == kind
    assert "rope_theta" not in written["rope_scaling"]  # of which transformers 4.57 warns


@pytest.mark.parametrize(
    "table, stated, length",
    [
        ({"type": "yarn", _M0: 32768}, 40960, 131072),  # Qwen3's page
        ({"type": "yarn", _M0: 32768}, 32768, 131072),  # Qwen2.5's
        ({"type": "yarn", _M0: 32768}, 131072, 131072),
        ({"type": "yarn"}, 4096, 16384),  # M0 is then max_position_embeddings
        ({"type": "llama3", _M0: 8192}, 8192, 32768),
        ({"type": "llama3", _M0: 8192}, 131072, 131072),  # LLaMA 3.1: more than M0 x factor
        ({"type": "longrope", _M0: 4096}, 4096, 16384),
        ({"type": "longrope", _M0: 4096}, 131072, 131072),
        ({"type": "dynamic"}, 4096, 16384),
        ({"type": "linear"}, 16384, 16384),
        ({"type": "linear", _M0: 4096}, 4096, 16384),
        ({"type": "linear", _M0: 4096}, 16384, 16384),
    ],
)
def test_the_length_of_a_scaled_teacher(table, stated, length):
    tables = {"short_factor": [1.0] * 64, "long_factor": LONG}
    ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    table = table | {"factor": 4.0} | {"longrope": tables, "llama3": ramp}.get(table["type"], {})
    config = BASE | {"max_position_embeddings": stated, "rope_scaling": table}
    rope = rope_json.read(config)
    assert rope.length == length
    assert bool(rope_json.doubt(config)) is (table["type"] == "linear" and _M0 not in table)
    if table["type"] in ("linear", "yarn", "llama3"):
        longer = rope.scaled(table["type"], 2)
        assert longer.length == rope_json.read(rope_json.write(longer) | BASE_HEAD).length
        assert longer.length == 2 * length and longer.factor == 8


@pytest.mark.parametrize("key", rope_json.LENGTHS)
def test_another_length_decides_what_a_linear_teacher_means(key):
    """vicuna-7b-v1.5-16k keeps 4,096 and says 16,384 elsewhere; others store the product."""
    table = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    for stated, other, length in ((4096, 16384, 16384), (16384, 16384, 16384)):
        config = BASE | table | {"max_position_embeddings": stated, key: other}
        assert rope_json.read(config).length == length and not rope_json.doubt(config)
    for other in (2048, "16384", None, True):
        config = BASE | table | {key: other}
        assert rope_json.read(config).length == 4096
        assert '"max_sequence_length": 16384 to its config.json' in rope_json.doubt(config)


@pytest.mark.parametrize(
    "table, said",
    [
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0}}, "full_attention, which default"),
        ({"rope_type": "linear", "factor": 4.0, "beta_fast": 32.0}, "beta_fast, which linear"),
        ({"rope_type": "yarn", "factor": 4.0, "long_factor": [1.0]}, "long_factor, which yarn"),
        ({"rope_type": "dynamic", "factor": 4.0, "alpha": 1000.0}, "alpha, which dynamic"),
        ({"rope_type": "llama3", "factor": 4.0, "mscale": 1.0}, "mscale, which llama3"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"factor": 4.0}, "factor, which default"),
        ({"kind": "linear", "factor": 4.0}, "kind, factor, which default"),
        ({"type": "linear", "rope_type": "yarn", "factor": 4.0}, "type 'linear' and rope_type"),
    ],
)
def test_a_key_of_a_table_that_its_kind_does_not_read_is_refused(table, said):
    for dialect in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=said) as e:
            rope_json.read(BASE | {dialect: table})
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_keys_of_a_table_that_change_nothing_are_taken():
    yarn = {"type": "yarn", "factor": 16.0, _M0: 4096, "finetuned": True, "mscale": None}
    assert rope_json.read(BASE | {"rope_scaling": yarn}).length == 65536  # YaRN's own files
    plain = {"rope_type": "default", "rope_theta": 5e5, "factor": 1.0, _M0: 4096}
    assert rope_json.read(BASE | {"rope_parameters": plain}).theta == 5e5


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn", "llama3"])
def test_scaled_multiplies_the_length_and_slows_the_slowest_pair(kind):
    rope = RopeConfig(max_position=4096, head_dim=128)
    longer = rope.scaled(kind, 8)
    assert longer.length == 32768
    w, s = frequencies(rope, 128)[0], frequencies(longer, 128, 32768)[0]
    assert s[-1] <= w[-1] / 7.9 and (kind == "linear" or s[0] == w[0])


def apart(w, d: float) -> float:
    """1 - mean_k cos(d w_k): how a vector of equal pairs differs from itself d tokens on."""
    return float(1 - (d * w.double()).cos().mean())


def test_interpolation_blurs_near_positions():
    """rope.py's docstring: the fast pairs are gone, so that tokens closer than s look alike."""
    rope, s = RopeConfig(max_position=4096, head_dim=128), 8
    w, slowed = frequencies(rope, 128)[0], frequencies(rope.scaled("linear", s), 128)[0]
    assert w[0] == 1 and slowed[0] == 1 / s and slowed.max() == slowed[0]  # radians per token
    faster = int((w > 1 / s).sum())
    assert faster == math.ceil(64 * math.log(s) / math.log(rope.theta)) == 15
    # below a distance of s tokens no pair has turned by one radian, where before 15 could
    assert (slowed * (s - 1)).max() < 1 and ((w * (s - 1)) > 1).sum() == 14
    for d in (1, 2, 4, 64):
        assert apart(slowed, d) == pytest.approx(apart(w, d / s), rel=1e-6)
    assert apart(w, 1) / apart(slowed, 1) == pytest.approx(61, abs=0.5)


def test_yarn_keeps_the_pairs_that_tell_neighbours_apart():
    """rope.py's docstring: what turns often in M0 stays, what turns less than once is slowed."""
    rope, s = RopeConfig(max_position=4096, head_dim=128), 8
    w, ramped = frequencies(rope, 128)[0], frequencies(rope.scaled("yarn", s), 128)[0]
    turns = 4096 * w / (2 * math.pi)  # within the native length
    assert torch.equal(ramped[turns > 33], w[turns > 33]) and ramped[w > 1 / s].equal(w[w > 1 / s])
    torch.testing.assert_close(ramped[turns < 0.9], w[turns < 0.9] / s, rtol=1e-6, atol=0)
    assert int((ramped == w).sum()) == 21
    assert apart(ramped, 1) / apart(w, 1) > 0.999


def test_ntk_is_a_plain_theta():
    longer = RopeConfig(max_position=4096, head_dim=128).scaled("ntk", 8)
    assert longer.kind == "default" and rope_json.write(longer)["rope_scaling"] is None
    assert longer.theta == pytest.approx(10000.0 * 8 ** (128 / 126))
    assert frequencies(longer, 128)[0][-1].item() == pytest.approx(
        10000.0 ** (-126 / 128) / 8, rel=1e-5
    )


def test_a_scaled_teacher_is_scaled_by_its_own_kind_or_refused():
    llama31 = rope_json.read(keys("llama3"))
    assert llama31.scaled("llama3", 4).factor == 32 and llama31.scaled("llama3", 4).original == 8192
    with pytest.raises(ValueError, match=r"already scaled.*llama3.*--rope llama3"):
        llama31.scaled("linear", 8)
    with pytest.raises(ValueError, match="plain RoPE"):
        rope_json.read(keys("dynamic")).scaled("linear", 8)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "'8'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5"),
        ({"rope_scaling": [1]}, "object"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "long_factor": [1.0]}},
            "short_factor",
        ),
    ],
)
def test_refusals_name_the_key(config, said):
    with pytest.raises(ValueError, match=said):
        rope_json.read(config)


@pytest.mark.parametrize("scale", [0, 1, -2, float("nan"), float("inf"), "8"])
def test_a_scale_that_is_not_above_one_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        RopeConfig().scaled("linear", scale)


def test_rotation_depends_on_distance_alone():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=g)
    turn = [t.double() for t in rotation(RopeConfig(), 16, torch.arange(100), 100, torch.float32)]

    def score(i, j):
        return (rotate(q, turn[0][i], turn[1][i]) * rotate(k, turn[0][j], turn[1][j])).sum().item()

    assert score(17, 5) == pytest.approx(score(90, 78), abs=1e-4)


def test_yarn_on_yarn_derives_its_attention_factor_anew_or_refuses():
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    derived = rope_json.read(
        dict(BASE, rope_scaling=table | {"attention_factor": 0.1 * math.log(4) + 1})
    )
    longer = derived.scaled("yarn", 8)
    assert longer.factor == 32 and frequencies(longer, 128)[1] == pytest.approx(
        0.1 * math.log(32) + 1
    )
    with pytest.raises(ValueError, match="attention_factor of its own"):
        rope_json.read(dict(BASE, rope_scaling=table | {"attention_factor": 2.0})).scaled("yarn", 8)


@pytest.mark.parametrize("theta", [64.0, 1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [2, 4, 10, 64, 96, 126, 128])
def test_moved_pairs_are_a_permutation_and_turn_as_under_yarn(head_dim, theta):
    """Each in the slot nearest to what yarn makes of it, unless all slots are slower than that."""
    n = head_dim // 2
    native = RopeConfig(theta=theta, max_position=2048, head_dim=head_dim)
    step = 2 * math.log(theta) / head_dim  # between the logarithms of neighbours
    for before in (1.0, 4.0):
        teacher = native if before == 1 else native.scaled("linear", before)
        for scale in (1.05, 2, 3, 4, 8, 16.5, 32, 64, 1000):
            student = teacher.scaled("linear", scale)
            stretched = frequencies(student, head_dim)[0].double().log()
            wanted = frequencies(native.scaled("yarn", scale), head_dim)[0].double().log()
            wanted -= math.log(before)
            pairs = pairs_by_slot(teacher, student)
            assert sorted(pairs) == list(range(n))
            for slot, pair in enumerate(pairs):
                if wanted[pair] > stretched[0] + 0.5 * step - 1e-3:
                    continue  # faster than every slot
                assert (wanted[pair] - stretched[slot]).abs() <= 0.5 * step + 1e-3
            slow = frequencies(native, head_dim)[0] * 2048 < 2 * math.pi * 0.5
            assert all(pairs[k] == k for k in range(n) if slow[k] and k > 1), "they hardly turn"


def test_the_fastest_pairs_move_by_one_shift_and_the_slowest_stay():
    """theta = 10^6, D = 64, 32,768 tokens, scale 8: yarn leaves 0 to 11 alone and slows from 20 on."""
    teacher = RopeConfig(theta=1e6, max_position=32768, head_dim=64)
    pairs = pairs_by_slot(teacher, teacher.scaled("linear", 8))
    shift = round(32 * math.log(8) / math.log(1e6))
    assert shift == 5 and pairs[:7] == list(range(5, 12)) and pairs[20:] == list(range(20, 32))
    assert pairs[7:20] == [12, 0, 13, 14, 15, 1, 16, 17, 2, 18, 3, 19, 4]
