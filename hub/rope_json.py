"""Positions in config.json: two dialects read into a RopeConfig, and written again.

What.  One table says how a model's rotary positions are stretched (rope.py):

    transformers 4    "rope_theta": 10000.0,
                      "rope_scaling": {"type": "linear", "factor": 8.0}
    transformers 5    "rope_parameters": {"rope_type": "linear", "factor": 8.0,
                                          "rope_theta": 10000.0}

`read` takes either or both (`rope_scaling` wins, as in transformers 5), `write` gives both. Kind
"ntk" is a plain, larger rope_theta on disk. max_position_embeddings is the length that the model
claims after scaling; where the kind is dynamic, and in Qwen2.5's documented yarn, it is the length
before.

How.  Each value is taken as its key means it, or refused by name: true is no number, "8" is not 8,
and a theta or a table that gives no finite frequencies is no position at all.

Limits.  partial_rotary_factor other than 1 is refused. Table and top level may both give M0
(original_max_position_embeddings): the top level wins.

Source.  modeling_rope_utils of transformers 4.57 and 5; what vLLM and llama.cpp's converter read.
"""

import math

import torch

from rope import KINDS, NEED_M0, TUNING, RopeConfig, frequencies

_M0 = "original_max_position_embeddings"


def read(config: dict) -> RopeConfig:
    """The positions of either dialect of config.json.

    Raises ValueError naming the key and value it refuses. The head dimension, on which some kinds
    depend, is read here alone: a key of its own, or width / heads.
    """
    table = _table(config, "rope_scaling") or _table(config, "rope_parameters")
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"rope_type {kind!r} is not supported; the known ones are {known}")
    if table.get("partial_rotary_factor", 1.0) != 1:
        raise ValueError(
            f"partial_rotary_factor is {table['partial_rotary_factor']!r}, which changes the "
            "mathematics in a way this model lacks"
        )
    # The table's own theta, then the top level's; never that of the other dialect's table
    theta = _number("rope_theta", table.get("rope_theta", config.get("rope_theta", 10000.0)))
    longest = _whole("max_position_embeddings", config.get("max_position_embeddings", 2048))
    original = None
    if kind in NEED_M0:
        # transformers 5: the top level overrides the nested key for these kinds
        original = _whole(_M0, config.get(_M0, table.get(_M0, longest)))
    factor = table.get("factor")
    if factor is None and (kind == "longrope" or (kind == "yarn" and "factor" in table)):
        factor = longest / original
    factor = _number("factor", 1.0 if kind == "default" else factor)
    for key in ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ():
        _number(key, table.get(key))
    known = TUNING.get(kind, {})
    tuning = tuple((k, _tuned(k, table[k])) for k in known if table.get(k) is not None)
    rope = RopeConfig(kind, theta, factor, longest, original, _head_dim(config), tuning)
    _check(rope)
    return rope


def write(rope: RopeConfig) -> dict:
    """The keys of config.json, both dialects; unambiguous to transformers, vLLM, llama.cpp."""
    out = {"max_position_embeddings": rope.max_position, "rope_theta": rope.theta}
    if rope.kind == "default":
        parameters = {"rope_type": "default", "rope_theta": rope.theta}
        return {**out, "rope_scaling": None, "rope_parameters": parameters}
    table = {"rope_type": rope.kind, "factor": float(rope.factor)}  # vLLM refuses an integer
    if rope.original is not None:  # llama.cpp reads that of llama3 from the top level
        table[_M0] = out[_M0] = rope.original
    for key, value in rope.full_tuning.items():
        if value is not None:
            table[key] = list(value) if isinstance(value, tuple) else value
    out["rope_scaling"] = {"type": rope.kind, **table}
    out["rope_parameters"] = {**table, "rope_theta": rope.theta}
    return out


def _check(rope: RopeConfig) -> None:
    """Raises ValueError for values that are right one by one and no positions together."""
    tuning = rope.full_tuning
    if rope.kind != "default" and rope.factor < 1:
        raise ValueError(f"the rope factor is {rope.factor}; it must be at least 1")
    if rope.theta <= 1:
        raise ValueError(f"rope_theta is {rope.theta}; it must be above 1")
    if rope.kind == "llama3" and tuning["low_freq_factor"] >= tuning["high_freq_factor"]:
        low, high = tuning["low_freq_factor"], tuning["high_freq_factor"]
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    if rope.kind == "longrope" and rope.original < 2:
        raise ValueError(f"{_M0} is 1; longrope needs 2 or more")
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        table, pairs = tuning[name], rope.head_dim // 2
        if not isinstance(table, tuple) or len(table) != pairs:
            raise ValueError(f"longrope needs {name} with head_dim / 2 = {pairs} numbers")
    if rope.kind == "dynamic" and rope.head_dim < 4:
        raise ValueError(f"head_dim is {rope.head_dim}; dynamic positions need 4 or more")
    w, _ = frequencies(rope, rope.head_dim, rope.length)
    if not (torch.isfinite(w).all() and (w > 0).all()):
        raise ValueError(f"the positions of config.json ({rope}) have no finite frequencies")


def _table(config: dict, key: str) -> dict:
    value = config.get(key)
    if not (value is None or isinstance(value, dict)):
        raise ValueError(f"{key} is {value!r}; it must be an object or null")
    return value or {}


def _number(name: str, value) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 < value < 1e12):
        raise ValueError(f"{name} is {value!r}; it must be a number above 0 and below 1e12")
    return float(value)


def _whole(name: str, value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"{name} is {value!r}; it must be an integer from 1 up to 2^31")
    return value


def _tuned(name: str, value):
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"truncate is {value!r}; it must be true or false")
        return value
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}; it must be a list of numbers")
        return tuple(_number(name, v) for v in value)
    return _number(name, value)


def _head_dim(config: dict) -> int:
    dim = config.get("head_dim")
    if dim is None:
        width = _whole("hidden_size", config.get("hidden_size", 128))
        dim = max(width // _whole("num_attention_heads", config.get("num_attention_heads", 1)), 1)
    dim = _whole("head_dim", dim)
    if dim % 2:
        raise ValueError(f"head_dim is {dim}; rotary positions need an even one")
    return dim
