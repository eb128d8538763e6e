"""Rotary positions: which angle each pair of features turns by at each position, and how that is stretched.

What.  RoPE turns feature pair k of a query or key at position p by the angle p w_k, so that a dot product of two
rotated vectors depends on their distance alone. The frequencies fall geometrically, from one radian a token to a
turn in tens of thousands:

    w_k = theta^(-2k/D)          k = 0 .. D/2-1

Beyond the length M a model was trained at, the slow pairs reach angles it never saw, and it breaks. Every way out
changes the frequencies (s = `factor`, L = the length at hand, M0 = the length before scaling):

    default    w_k
    linear     w_k / s                         position interpolation: every angle back inside the trained range
    ntk        theta' = theta s^(D/(D-2))      the slowest pair is divided by s, the fastest by 1; it is a plain theta
    dynamic    theta' = theta (s L/M - (s-1))^(D/(D-2))      ntk that grows with L; the default up to L = M
    yarn       pairs that turn often keep w_k, those that turn less than once in M0 get w_k / s, a ramp between;
               and cos and sin are multiplied by 0.1 ln s + 1, so that attention over more tokens stays as sharp
    llama3     the same idea with its own ramp, on the wavelength 2 pi / w_k
    longrope   w_k / e_k, with one searched table e for lengths up to M0 and one beyond

How it is applied.  Angles in float32; cos and sin, times the attention factor, are then cast to the activations'
dtype. Pair k is (x_k, x_{k+D/2}), Hugging Face's half-split layout:  x' = x cos + rotate_half(x) sin.

On disk.  transformers 4 writes `rope_theta` + `rope_scaling`, transformers 5 one dict `rope_parameters`. `from_hf`
reads either or both (`rope_scaling` wins, as in transformers 5), `to_hf` writes both.

Limits.  A scaled teacher is scaled further only by its own kind (linear, yarn, llama3: the factors multiply, M0
stays). Anything else, such as linear over llama3, has no representation on disk and is refused.

Source.  RoFormer arXiv 2104.09864; position interpolation 2306.15595; YaRN 2309.00071; LongRoPE 2402.13753; the
formulas and defaults are those of transformers' modeling_rope_utils, to float32.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # what a config.json may say
STUDENT_KINDS = ("linear", "ntk", "dynamic", "yarn", "llama3")  # what --rope offers
_ORIGINAL = ("yarn", "llama3", "longrope")  # the kinds whose formula needs M0
_MULTIPLY = (
    "linear",
    "yarn",
    "llama3",
)  # scaling one of these by its own kind multiplies the factors
_TUNING = {  # the optional numbers of each kind, with transformers' defaults (None: derived)
    "yarn": {
        "attention_factor": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"attention_factor": None, "short_factor": None, "long_factor": None},
}


@dataclass(frozen=True)
class RopeConfig:
    """One model's rotary positions. Lengths in tokens; `max_position` is the length that the model claims."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    max_position: int = 2048
    original: int | None = None  # M0
    head_dim: int = 128
    tuning: tuple[tuple[str, object], ...] = ()  # the kind's optional numbers that the file gave

    @staticmethod
    def from_hf(config: dict) -> "RopeConfig":
        """Reads either dialect of a config.json. Raises ValueError naming the key and value that it cannot use."""
        scaling, parameters = _table(config, "rope_scaling"), _table(config, "rope_parameters")
        table = scaling or parameters
        kind = table.get("rope_type", table.get("type", "default"))
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(
                f"rope_type {kind!r} is not supported; the known ones are {', '.join(KINDS)}"
            )
        theta = table.get(
            "rope_theta", config.get("rope_theta", parameters.get("rope_theta", 10000.0))
        )
        theta = _positive("rope_theta", 10000.0 if theta is None else theta)
        max_position = int(
            _positive("max_position_embeddings", config.get("max_position_embeddings", 2048))
        )
        heads, width = config.get("num_attention_heads") or 1, config.get("hidden_size") or 128
        head_dim = config.get("head_dim") or width // heads
        original = None
        if kind in _ORIGINAL:
            # transformers 5: the top level overrides the nested key for these kinds
            original = config.get(
                "original_max_position_embeddings", table.get("original_max_position_embeddings")
            )
            original = int(_positive("original_max_position_embeddings", original or max_position))
        factor = table.get("factor")
        if factor is None and kind in ("yarn", "longrope"):
            factor = max_position / original
        factor = _positive("factor", 1.0 if kind == "default" else factor)
        known = _TUNING.get(kind, {})
        tuning = tuple((k, _number(k, table[k])) for k in known if table.get(k) is not None)
        return RopeConfig(kind, theta, factor, max_position, original, head_dim, tuning)._checked()

    def to_hf(self) -> dict:
        """The keys of config.json in both dialects; unambiguous in transformers 4 and 5, vLLM and llama.cpp."""
        out = {"max_position_embeddings": self.max_position, "rope_theta": self.theta}
        if self.kind == "default":
            parameters = {"rope_type": "default", "rope_theta": self.theta}
            return {**out, "rope_scaling": None, "rope_parameters": parameters}
        # vLLM wants a float factor; llama.cpp reads M0 of llama3 from the top level
        table = {"rope_type": self.kind, "factor": float(self.factor)}
        if self.original is not None:
            table["original_max_position_embeddings"] = out["original_max_position_embeddings"] = (
                self.original
            )
        table |= {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in self._filled().items()
            if v is not None
        }
        out["rope_scaling"] = {"type": self.kind, **table}
        out["rope_parameters"] = {**table, "rope_theta": self.theta}
        return out

    def scaled(self, kind: str, factor: float) -> "RopeConfig":
        """The same model's positions stretched by `factor` (> 1) with `kind`, one of STUDENT_KINDS."""
        if kind not in STUDENT_KINDS:
            raise ValueError(f"--rope {kind!r} is not one of {', '.join(STUDENT_KINDS)}")
        if not (isinstance(factor, int | float) and math.isfinite(factor) and factor > 1):
            raise ValueError(f"the scale is {factor!r}; it must be a number above 1, such as 8")
        longer = round(self.max_position * factor)
        if self.kind == kind and kind in _MULTIPLY:
            given = self._filled().get(
                "attention_factor"
            )  # keep it derived: it grows with the factor
            derived = frequencies(replace(self, tuning=()), self.head_dim)[1]
            if given is not None and abs(given - derived) > 1e-3:
                raise ValueError(f"the teacher's yarn has an attention_factor of its own, {given}: no rule says how it "
                                 "grows; use a teacher with plain RoPE")  # fmt: skip
            tuning = tuple((k, v) for k, v in self.tuning if k != "attention_factor")
            return replace(self, factor=self.factor * factor, max_position=longer, tuning=tuning)
        if self.kind != "default":
            remedy = (
                f"use --rope {self.kind}"
                if self.kind in _MULTIPLY
                else "use a teacher with plain RoPE"
            )
            raise ValueError(
                f"the teacher's RoPE is already scaled ({self.kind}, factor {self.factor:g}): {kind} on top of it "
                f"has no representation in config.json; {remedy}"
            )
        if kind == "ntk":
            theta = self.theta * factor ** (self.head_dim / (self.head_dim - 2))
            return replace(self, theta=theta, max_position=longer)
        if kind == "dynamic":  # its formula has M, the length before scaling, in max_position
            return replace(self, kind=kind, factor=float(factor))
        original = self.max_position if kind in _ORIGINAL else None
        return replace(
            self, kind=kind, factor=float(factor), max_position=longer, original=original
        )

    @property
    def length(self) -> int:
        """The tokens that the model can be used at: dynamic's file keeps the length before scaling."""
        return (
            round(self.max_position * self.factor) if self.kind == "dynamic" else self.max_position
        )

    def _filled(self) -> dict:
        return _TUNING.get(self.kind, {}) | dict(self.tuning)

    def _checked(self) -> "RopeConfig":
        if self.kind != "default" and self.factor < 1:
            raise ValueError(f"the rope factor is {self.factor}; it must be at least 1")
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            table = self._filled()[name]
            if not isinstance(table, tuple) or len(table) != self.head_dim // 2:
                raise ValueError(
                    f"longrope needs {name} with head_dim / 2 = {self.head_dim // 2} numbers"
                )
        return self


def frequencies(
    rope: RopeConfig, head_dim: int, seq_len: int | None = None
) -> tuple[Tensor, float]:
    """(w [head_dim/2] float32 on the CPU, attention factor). seq_len matters to dynamic and longrope alone."""
    d, s, tuning = head_dim, rope.factor, rope._filled()
    pairs = torch.arange(0, d, 2, dtype=torch.int64).float() / d
    w = 1.0 / (rope.theta**pairs)
    if rope.kind == "linear":
        return w / s, 1.0
    if rope.kind == "dynamic":
        longest = max(seq_len or 0, rope.max_position)
        theta = rope.theta * (s * longest / rope.max_position - (s - 1)) ** (d / (d - 2))
        return 1.0 / (theta**pairs), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, w, d, tuning)
    if rope.kind == "llama3":
        return _llama3(rope, w, tuning), 1.0
    if rope.kind == "longrope":
        table = tuning["long_factor" if (seq_len or 0) > rope.original else "short_factor"]
        given = tuning["attention_factor"]
        derived = 1.0 if s <= 1 else math.sqrt(1 + math.log(s) / math.log(rope.original))
        return 1.0 / (
            torch.tensor(table, dtype=torch.float32) * rope.theta**pairs
        ), given or derived
    return w, 1.0


def _yarn(rope: RopeConfig, w: Tensor, d: int, tuning: dict) -> tuple[Tensor, float]:
    def pair_turning(
        turns: float,
    ) -> float:  # the index whose wavelength fits `turns` times into M0
        return d * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    def temperature(scale: float, m: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    low, high = pair_turning(tuning["beta_fast"]), pair_turning(tuning["beta_slow"])
    if tuning["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    s, factor = rope.factor, tuning["attention_factor"]
    if factor is None and tuning["mscale"] and tuning["mscale_all_dim"]:
        factor = temperature(s, tuning["mscale"]) / temperature(s, tuning["mscale_all_dim"])
    return w / s * ramp + w * (1 - ramp), temperature(s, 1.0) if factor is None else factor


def _llama3(rope: RopeConfig, w: Tensor, tuning: dict) -> Tensor:
    low, high = tuning["low_freq_factor"], tuning["high_freq_factor"]
    wavelength = 2 * math.pi / w
    t = (rope.original / wavelength - low) / (high - low)
    between = (1 - t) * w / rope.factor + t * w
    out = torch.where(wavelength > rope.original / low, w / rope.factor, between)
    return torch.where(wavelength < rope.original / high, w, out)


def rotation(rope: RopeConfig, head_dim: int, positions: Tensor, seq_len: int, dtype: torch.dtype):
    """cos and sin [*positions.shape, head_dim] in `dtype` for integer positions. seq_len: the longest one plus 1."""
    w, factor = frequencies(rope, head_dim, seq_len)
    angles = positions[..., None].float() * w.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D] turned; cos and sin are [T, D], or [B, 1, T, D] for rows at positions of their own."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _table(config: dict, key: str) -> dict:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}; it must be an object or null")
    return value


def _positive(name: str, value) -> float:
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 < value < 1e12
    )
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def _number(name: str, value):
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return tuple(_positive(name, v) for v in value)
    return _positive(name, value)
