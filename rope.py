"""Rotary positions: the angle that each pair of features turns by, and how it is stretched.

What.  RoPE turns feature pair k of a query or key at position p by the angle p w_k, so that a dot
product of two rotated vectors depends on their distance alone. The frequencies fall geometrically,
from one radian per token to a turn in tens of thousands of tokens:

    w_k = theta^(-2k/D)          k = 0 .. D/2-1

Beyond the length M0 that a model was trained at, the slow pairs reach angles it never saw, and it
breaks. Every way out changes the frequencies (s = `factor`, n = the length at hand):

    default    w_k
    linear     w_k / s                         position interpolation: all angles as in training
    ntk        theta' = theta s^(D/(D-2))      slowest pair / s, fastest / 1: a plain, larger theta
    dynamic    theta' = theta (s n/M0 - (s-1))^(D/(D-2))   ntk that grows with n, from n = M0 on
    yarn       pairs that turn more than 32 times in M0 keep w_k, those that turn less than once
               get w_k / s, a ramp between; and cos and sin are multiplied by 0.1 ln s + 1, the
               attention factor, so that attention over more tokens stays as sharp
    llama3     the same idea with its own ramp, on the wavelength 2 pi / w_k
    longrope   w_k / e_k, with one searched table e for lengths up to M0 and one beyond; and an
               attention factor, too

Why interpolation blurs near positions.  Two tokens d apart differ by the angle d w_k in pair k, so
the fast pairs tell neighbours apart. Interpolation slows all pairs: the fastest now turns 1/s
radian per token, and tokens less than s apart differ by less than one radian in every pair. A share
ln s / ln theta of the pairs turned faster than that before: 15 of 64 at s = 8, theta = 10^4,
D = 128. No pair turns that fast any more: distance d looks as d/s did, and training never showed an
eighth of a token. In one number: a vector whose pairs all have the same length differs from itself
d tokens on by 1 - mean_k cos(d w_k), which falls 61-fold at d = 1:
        pytest tests/test_rope.py::test_interpolation_blurs_near_positions

Why yarn's ramp does not.  A pair that turns many times within M0 has shown every angle in training:
a longer distance shows no new one, so it need not be slowed. Only a pair whose wavelength exceeds
M0 would reach angles it never saw. Yarn leaves the first sort alone (pairs 0 to 20 at M0 = 4096,
bit for bit, the 15 above among them), slows the last by s, and blends between. The number above
stays at 99.9 % of the teacher's:
        pytest tests/test_rope.py::test_yarn_keeps_the_pairs_that_tell_neighbours_apart

What moving pairs wins back, under linear alone.  Before training slot j of every head turns at
w_j / s, and which of the teacher's pairs it starts with may be chosen: rows k and k + D/2 of each
head of q and k, weight and bias, become rows j and j + D/2. Without positions that is exact: q . k
is a sum over pairs, in any order, and so are the Q/Q and K/K relations. `pairs_by_slot` gives each
pair the slot that turns most nearly as yarn would have the pair turn. The fast ones, which yarn
leaves alone, go down by

    shift = (D/2) ln s / ln theta              5 of 32 slots at s = 8, theta = 10^6, D = 64

and where that is whole they add to a score what they added in the teacher, to rounding:
        pytest tests/test_model.py::test_a_moved_pair_adds_to_a_score_what_it_did_in_the_teacher
The slow ones, which yarn slows by s, stay, and those between go between. The `shift` fastest find
no slot that fast. They told neighbours apart; now they fill the slots that no pair came to. So the
student starts nearer to yarn's, with linear's positions. On Qwen2.5-Coder-0.5B (1.0M + 3.1M tokens)
it ended 1.7 % higher on short tasks, 0.01 nats higher at 256K, and retrieved less. Twice the tokens
of stage 1 won as much and cost nothing of the long context: hence a flag, --move-pairs, for when
training must be short. With all pairs that complete a turn within M0 moved by one shift it lost
0.12 nats at 256K: they reach angles that never came together in training (LOG.md, 2026-11-28).

How it is applied.  Angles in float32; cos and sin, times the attention factor, are then cast to the
activations' dtype. Pair k is (x_k, x_{k+D/2}), Hugging Face's half-split layout:
x' = x cos + rotate_half(x) sin.

Limits.  A scaled teacher is scaled further only by its own kind (linear, yarn, llama3: the factors
multiply, M0 stays). Anything else, such as linear over llama3, no config.json can say: refused. How
config.json says the rest is told in hub/rope_json.py.

Source.  RoFormer arXiv 2104.09864; position interpolation 2306.15595; YaRN 2309.00071; LongRoPE
2402.13753; the formulas and defaults are those of transformers' modeling_rope_utils, to float32.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # what a config.json may say
STUDENT_KINDS = ("linear", "ntk", "dynamic", "yarn", "llama3")  # what --rope offers
NEED_M0 = ("yarn", "llama3", "longrope")
MULTIPLY = ("linear", "yarn", "llama3")  # scaled by their own kind, the factors multiply
# The optional numbers of each kind, with transformers' defaults (None: derived)
TUNING = {
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
    """One model's rotary positions. Lengths in tokens; `max_position` is what the model claims."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    max_position: int = 2048
    original: int | None = None  # M0
    head_dim: int = 128  # D: the network's own, which ntk, yarn and longrope depend on
    tuning: tuple[tuple[str, object], ...] = ()  # the kind's optional numbers that the file gave

    def scaled(self, kind: str, factor: float) -> "RopeConfig":
        """The same model's positions stretched by `factor` (> 1) with `kind`, a STUDENT_KIND.

        Raises ValueError where that is impossible or no config.json can say it.
        """
        return _scaled(self, kind, factor)

    @property
    def length(self) -> int:
        """The tokens that the model can be used at.

        Where M0 is kept, max_position may be the length before scaling, or neither: Qwen3's
        documented yarn has M0 32,768, factor 4 and max_position 40,960. Under dynamic it is M0.
        """
        if self.kind == "yarn" or (self.kind in NEED_M0 and self.max_position == self.original):
            return round(self.original * self.factor)
        if self.kind == "dynamic":
            return round(self.max_position * self.factor)
        return self.max_position

    def __str__(self) -> str:
        """In words, for plans and cards: "linear RoPE, factor 8, theta 10000, 4,096 tokens"."""
        factor = "" if self.kind == "default" else f", factor {self.factor:g}"
        return f"{self.kind} RoPE{factor}, theta {self.theta:g}, {self.length:,} tokens"

    @property
    def full_tuning(self) -> dict:
        """The optional numbers of the kind: the file's, else the defaults."""
        return TUNING.get(self.kind, {}) | dict(self.tuning)


def frequencies(
    rope: RopeConfig, head_dim: int, seq_len: int | None = None
) -> tuple[Tensor, float]:
    """(w [head_dim/2] float32 on the CPU, attention factor) for sequences of `seq_len` tokens.

    head_dim: of the vectors that are turned. In a model it is rope.head_dim; a RopeConfig made by
    hand may have left that at its default. Only dynamic and longrope depend on seq_len; None means
    no longer than the model's own length.
    """
    D, s, tuning = head_dim, rope.factor, rope.full_tuning
    exponents = torch.arange(0, D, 2, dtype=torch.int64).float() / D  # 2k / D
    w = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":  # position interpolation: token p turns as p / s did in training
        return w / s, 1.0
    if rope.kind == "dynamic":
        longest = max(seq_len or 0, rope.max_position)
        theta = rope.theta * (s * longest / rope.max_position - (s - 1)) ** (D / (D - 2))
        return 1.0 / (theta**exponents), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, w, D, tuning)
    if rope.kind == "llama3":
        return _llama3(rope, w, tuning), 1.0
    if rope.kind == "longrope":
        table = tuning["long_factor" if (seq_len or 0) > rope.original else "short_factor"]
        stretched = torch.tensor(table, dtype=torch.float32) * rope.theta**exponents
        derived = 1.0 if s <= 1 else math.sqrt(1 + math.log(s) / math.log(rope.original))
        return 1.0 / stretched, tuning["attention_factor"] or derived
    return w, 1.0


def pairs_by_slot(teacher: RopeConfig, student: RopeConfig) -> list[int]:
    """Which of the teacher's pairs each of the student's starts with, D/2 numbers; see above.

    Both geometric with one ratio, as linear's are.
    """
    D, theta, s = teacher.head_dim, teacher.theta, student.factor / teacher.factor
    M0 = round(teacher.length / teacher.factor)  # of a teacher stretched before: its angles' own
    yarn = RopeConfig("yarn", theta, s, original=M0, head_dim=D)
    wanted = frequencies(yarn, D)[0].double() / teacher.factor
    first = frequencies(student, D)[0][0].double()
    slots = (first / wanted).log() * D / (2 * math.log(theta))
    slots = (slots - 1e-4).round().int().tolist()  # of neighbours half-way between, each the lower
    pair_of = {slot: pair for pair, slot in enumerate(slots) if slot >= 0}
    lost = [pair for pair, slot in enumerate(slots) if slot < 0]
    free = [slot for slot in range(D // 2) if slot not in pair_of]
    assert len(free) == len(lost), "no two pairs have one slot"
    pair_of |= dict(zip(free, lost, strict=True))
    return [pair_of[slot] for slot in range(D // 2)]


def rotation(
    rope: RopeConfig, head_dim: int, positions: Tensor, seq_len: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [*positions.shape, head_dim] in `dtype` for integer positions.

    seq_len: the longest position plus 1.
    """
    return turns(*frequencies(rope, head_dim, seq_len), positions, dtype)


def turns(
    w: Tensor, attention_factor: float, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [*positions.shape, D] in `dtype` for integer positions; w [D/2]."""
    angles = positions[..., None].float() * w.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D] turned; cos and sin are [T, D], or [B, 1, T, D] where rows have their own."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _yarn(rope: RopeConfig, w: Tensor, D: int, tuning: dict) -> tuple[Tensor, float]:
    def pair_turning(turns: float) -> float:
        """The index, not rounded, whose wavelength fits `turns` times into M0."""
        return D * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    def derived(m: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0

    low, high = pair_turning(tuning["beta_fast"]), pair_turning(tuning["beta_slow"])
    if tuning["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(D // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    attention = tuning["attention_factor"]
    if attention is None and tuning["mscale"] and tuning["mscale_all_dim"]:
        attention = derived(tuning["mscale"]) / derived(tuning["mscale_all_dim"])
    w = w / rope.factor * ramp + w * (1 - ramp)
    return w, derived(1.0) if attention is None else attention


def _llama3(rope: RopeConfig, w: Tensor, tuning: dict) -> Tensor:
    low, high = tuning["low_freq_factor"], tuning["high_freq_factor"]
    wavelength = 2 * math.pi / w
    t = (rope.original / wavelength - low) / (high - low)
    between = (1 - t) * w / rope.factor + t * w
    out = torch.where(wavelength > rope.original / low, w / rope.factor, between)
    return torch.where(wavelength < rope.original / high, w, out)


# ---- stretching: which positions can follow from which


def _scaled(rope: RopeConfig, kind: str, factor: float) -> RopeConfig:
    if kind not in STUDENT_KINDS:
        raise ValueError(f"--rope {kind!r} is not one of {', '.join(STUDENT_KINDS)}")
    if not (isinstance(factor, int | float) and math.isfinite(factor) and factor > 1):
        raise ValueError(f"the scale is {factor!r}; it must be a number above 1, such as 8")
    longer = round(rope.length * factor) if factor < 2**31 else 2**31
    if longer >= 2**31:
        raise ValueError(
            f"the scale is {factor:g}: {rope.length:,} tokens times that is beyond 2^31, the "
            "most that programs number; lower --scale"
        )
    if rope.kind == kind and kind in MULTIPLY:
        tuning = _tuning_to_scale(rope)
        return replace(rope, factor=rope.factor * factor, max_position=longer, tuning=tuning)
    if rope.kind != "default":
        remedy = "use a teacher with plain RoPE"
        if rope.kind in MULTIPLY:
            remedy = f"use --rope {rope.kind}"
        raise ValueError(
            f"the teacher's RoPE is already scaled ({rope.kind}, factor {rope.factor:g}): "
            f"{kind} on top of it has no representation in config.json; {remedy}"
        )
    if kind in ("ntk", "dynamic") and rope.head_dim < 4:
        raise ValueError(f"head_dim is {rope.head_dim}; --rope {kind} needs 4 or more")
    if kind == "ntk":
        theta = rope.theta * factor ** (rope.head_dim / (rope.head_dim - 2))
        return replace(rope, theta=theta, max_position=longer)
    factor = float(factor)
    if kind == "dynamic":  # its config.json keeps M0 in max_position_embeddings
        return replace(rope, kind=kind, factor=factor)
    original = rope.max_position if kind in NEED_M0 else None
    return replace(rope, kind=kind, factor=factor, max_position=longer, original=original)


def _tuning_to_scale(rope: RopeConfig) -> tuple[tuple[str, object], ...]:
    """The tuning for a larger factor: a stored attention_factor equal to the derived one is
    dropped, so that it is derived anew; any other is refused.
    """
    given = rope.full_tuning.get("attention_factor")
    derived = frequencies(replace(rope, tuning=()), rope.head_dim)[1]
    if given is not None and abs(given - derived) > 1e-3:
        raise ValueError(
            f"the teacher's yarn has an attention_factor of its own, {given}: no rule says how "
            "it grows; use a teacher with plain RoPE"
        )
    return tuple((k, v) for k, v in rope.tuning if k != "attention_factor")
