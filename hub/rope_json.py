"""Positions in config.json: two dialects read into a RopeConfig, and written again.

What.  One table says how a model's rotary positions are stretched (rope.py):

    transformers 4    "rope_theta": 10000.0,
                      "rope_scaling": {"type": "linear", "factor": 8.0}
    transformers 5    "rope_parameters": {"rope_type": "linear", "factor": 8.0,
                                          "rope_theta": 10000.0}

`read` takes either or both (`rope_scaling` wins, as in transformers 5), `write` gives both, and of
the two names of the kind in rope_scaling the one that every client reads: ExLlamaV2 refuses a table
with both. Kind "ntk" is a plain, larger rope_theta on disk.

How long.  max_position_embeddings is the length after scaling in most files, and before it in some.
A kind that keeps M0 tells them apart: yarn is M0 x factor long, whatever the other key says, and so
are llama3 and longrope where it is M0. Under dynamic it is the length before. Linear has no M0: the
other lengths that files state decide (LENGTHS), and where none does it is the length after scaling,
as on the Hub; `doubt` then says so.

How.  Each value is taken as its key means it, or refused by name: true is no number, "8" is not 8,
a key that the kind has no use for is not passed over, and a theta or a table that gives no finite
frequencies is no position at all.

Limits.  partial_rotary_factor other than 1 is refused, and one table for each kind of layer. Table
and top level may both give M0 (original_max_position_embeddings): the top level wins.

Source.  modeling_rope_utils of transformers 4.57 and 5; what vLLM and llama.cpp's converter read.
"""

import math

import torch

from rope import KINDS, NEED_M0, TUNING, RopeConfig, frequencies

_M0 = "original_max_position_embeddings"
# What programs take for the length beside max_position_embeddings: vLLM the smallest of them
LENGTHS = (
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "seq_length",
    "seq_len",
    "n_positions",
    "n_ctx",
    "max_target_positions",
    "model_max_length",
    "tokenizer_model_max_length",
)
# Keys that stand in tables of any kind, and are read or change nothing (`finetuned`: YaRN's own)
_ANYWHERE = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned", _M0)


def read(config: dict) -> RopeConfig:
    """The positions of either dialect of config.json.

    Raises ValueError naming the key and value it refuses. The head dimension, on which some kinds
    depend, is read here alone: a key of its own, or width / heads.
    """
    table = _chosen(config)
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"rope_type {kind!r} is not supported; the known ones are {known}")
    if table.get("type") not in (None, kind):
        raise ValueError(
            f"the rope table has type {table['type']!r} and rope_type {kind!r}; remove one"
        )
    _refuse_unread(table, kind)
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
    if kind == "linear" and _whether_before(config) is True:
        longest = round(longest * factor)
    rope = RopeConfig(kind, theta, factor, longest, original, _head_dim(config), tuning)
    _check(rope)
    return rope


def doubt(config: dict) -> str:
    """What was taken for the length where no key of a linear teacher's config.json decides it, and
    how to say otherwise; "" where there is no doubt. config: one that `read` took.
    """
    table = _chosen(config)
    linear = table.get("rope_type", table.get("type")) == "linear"
    if not linear or _whether_before(config) is not None:
        return ""
    length, factor = config.get("max_position_embeddings", 2048), table["factor"]
    return (
        f"max_position_embeddings {length} is taken for the teacher's length after its linear "
        f'factor {factor:g}; if it is the one before, add "max_sequence_length": '
        f"{round(length * factor)} to its config.json"
    )


def write(rope: RopeConfig) -> dict:
    """The keys of config.json, both dialects; unambiguous to transformers, vLLM, llama.cpp."""
    out = {"max_position_embeddings": rope.max_position, "rope_theta": rope.theta}
    if rope.kind == "default":
        parameters = {"rope_type": "default", "rope_theta": rope.theta}
        return {**out, "rope_scaling": None, "rope_parameters": parameters}
    table = {"factor": float(rope.factor)}  # vLLM refuses an integer
    if rope.original is not None:  # llama.cpp reads that of llama3 from the top level
        table[_M0] = out[_M0] = rope.original
    for key, value in rope.full_tuning.items():
        if value is not None:
            table[key] = list(value) if isinstance(value, tuple) else value
    # Ollama reads the one for llama3 and the other elsewhere
    name = "rope_type" if rope.kind == "llama3" else "type"
    out["rope_scaling"] = {name: rope.kind, **table}
    out["rope_parameters"] = {"rope_type": rope.kind, **table, "rope_theta": rope.theta}
    return out


def _chosen(config: dict) -> dict:
    return _table(config, "rope_scaling") or _table(config, "rope_parameters")


def _refuse_unread(table: dict, kind: str) -> None:
    """Raises ValueError for keys that this kind has no use for: the file means something else."""
    known = {*_ANYWHERE, *TUNING.get(kind, {})} | ({"factor"} if kind != "default" else set())
    unread = {k: v for k, v in table.items() if k not in known and v is not None}
    if kind == "default" and unread.get("factor") == 1:
        del unread["factor"]
    if unread:
        raise ValueError(
            f"the rope table of config.json has {', '.join(unread)}, which {kind} positions do not "
            f"read ({str(unread)[:80]}); give the rope_type that does, or remove what is not meant"
        )


def _whether_before(config: dict) -> bool | None:
    """Is max_position_embeddings of a linear table the length before scaling? None: nothing says.

    By M0, where a file gives it all the same, or by any of LENGTHS that is one of the two.
    """
    table, stated = _chosen(config), config.get("max_position_embeddings", 2048)
    factor, original = table["factor"], config.get(_M0, table.get(_M0))
    lengths = [config.get(key) for key in LENGTHS]
    if factor == 1:
        return False
    if original == stated or round(stated * factor) in lengths:
        return True
    if original == round(stated / factor) or stated in lengths:
        return False
    return None


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
