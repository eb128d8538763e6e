"""What a plan says before anything is loaded: what will be done, what it needs, what was chosen and
why.

    print(announce(plan))

What.  A line or two for each decision, in the order in which a person checks them: positions,
parameters, stages with the memory of each, the loss, implementations, time, states, the table. What
deserves doubt begins with "warning".

Limits.  Memory and time are the plan's arithmetic (engine/cost.py): a step may take twice as long
where a GPU waits for its host.
"""

import argparse

import torch

from engine.cost import Stage, clock, flops, parameters, trained_parameters
from engine.plan import Plan
from hub import rope_json
from model import TRAINED, LlamaConfig

MEASURED = 8  # times the context, in runs/README.md, with linear, yarn and ntk
FEWEST_STEPS = 30  # below, the warm-up and the way down leave hardly a step at the full rate


def announce(plan: Plan) -> str:
    """All of it."""
    args, native, stages = plan.args, plan.native, plan.stages
    needs = [fit.need for fit in plan.fits]
    compute, between, relation = (
        f"{what}: {which}, because {why}" for what, (which, why) in plan.chosen.items()
    )
    lines = [describe(native, plan.longer, stages, needs, args.lora_rank)]
    lines += [describe_loss(args, stages, native.qkv_bias)]
    lines += [describe_pairs(plan.pairs)] if plan.pairs else []
    lines += [compute, between]
    if args.bits:
        lines.append(
            "weights: the layers' matrices in 4 bits, in teacher and student alike; figures are "
            "measured so, the export is made of the teacher's files"
        )
    lines += [f"bits: {describe_bits(plan.device, args.deterministic)}", relation]
    lines += [
        describe_time(native, stages, args.lora_rank, plan.peak, plan.processes, args.peak_tflops)
    ]
    for stage, fit in zip(stages, plan.fits, strict=True):
        lines.append(f"{stage.name}      {fit.describe(native.n_layer)}")
    length, columns = round(native.rope.length * args.scale), 2 + len(stages)
    lines += [describe_saving(plan.copy, plan.overlap)]
    lines += [describe_table(plan.blocks, plan.documents, length, columns, plan.share)]
    return "\n".join(lines)


def describe(
    c: LlamaConfig, student: LlamaConfig, stages: list[Stage], needs: list[dict], rank=None
) -> str:
    """What is printed before the run: positions old and new, parameters, stages, their memory."""
    everything, _ = parameters(c)
    lines = [f"{'':12}{'kind':>10}{'factor':>9}{'theta':>12}{'length':>10}"]
    for name, config in (("teacher", c), ("student", student)):
        r = config.rope
        lines.append(f"{name:12}{r.kind:>10}{r.factor:>9g}{r.theta:>12g}{r.length:>10,}")
    if doubt := rope_json.doubt(dict(c.source)):
        lines.append(f"length      {doubt}")
    if student.rope.kind == "linear":
        lines.append(
            "positions   linear is the paper's kind; "
            "--rope yarn loses far less before training (README)"
        )
    if student.rope.kind == "dynamic":
        lines.append(
            "positions   dynamic is served by transformers and mlx-lm alone: "
            "vLLM and llama.cpp read it otherwise"
        )
    times = student.rope.length / c.rope.length
    if times > MEASURED:
        blocks = MEASURED * c.rope.length
        of_32 = f"; of 32 yarn did, with stage 2 in long blocks: --length2 {blocks}"
        lines.append(
            f"warning     beyond {MEASURED} times the context little is measured: SmolLM2 held to "
            f"the end of 16 times{of_32 if times > 16 else ''} (runs/README.md)"
        )
    trained = trained_parameters(c, rank)
    lines.append(f"parameters  {everything:,} in all, {trained:,} trained ({', '.join(TRAINED)})")
    if c.window:
        lines.append(
            f"the teacher attends over a sliding window of {c.window:,}; "
            "the student over its whole length"
        )
    for stage, need in zip(stages, needs, strict=True):
        lines += describe_stage(stage, need, student.rope.length)
    return "\n".join(lines)


def describe_stage(stage: Stage, need: dict, length: int) -> list[str]:
    """Its steps, blocks and memory; length: of the student's context."""
    lines = [
        f"{stage.name}      {stage.objective}, "
        f"{stage.steps:,} steps of {stage.batch} x {stage.T:,} tokens ({stage.tokens:,}), "
        f"learning rate {stage.lr:g}, about {size(sum(need.values()))}:"
    ]
    if stage.teacher_share:
        lines.append(
            f"            {stage.teacher_share:.0%} of the target is the teacher's "
            "distribution, as it can read so long a block"
        )
    lines += describe_skips(stage, length)
    if stage.steps < FEWEST_STEPS:
        n = stage.name[-1]
        lines.append(
            f"warning     {stage.name} has {stage.steps} steps, and fewer than some "
            f"{FEWEST_STEPS} rarely suffice: raise --tokens{n}, or lower --length{n} (now "
            f"{stage.T:,}) or --batch{n} (now {stage.batch})"
        )
    if b := stage.auxiliary:
        lines.append(f"            and in each step {b.batch} x {b.T:,} tokens of stage 1's kind")
        lines += describe_skips(b, length)
    lines.append("            " + ", ".join(f"{k} {size(v)}" for k, v in need.items() if v))
    return lines


def describe_loss(args: argparse.Namespace, stages: list[Stage], biases: bool) -> str:
    """The terms of stage 1's loss, with their weights, and the look-up documents among the text.

    biases: the keys have some.
    """
    chosen = stages[0].relations
    terms = [f"{r.upper()}/{r.upper()}" for r in "qkv" if r in chosen]
    weight = "" if args.logit_weight == 1 else f"{args.logit_weight:g} x "
    terms += [f"{weight}next-token KL"] if args.logit_weight else []
    if not any(
        s and s.objective == "relation" for stage in stages for s in (stage, stage.auxiliary)
    ):
        terms = ["next token"]
    lookups = f"; {args.lookups:.0%} of the blocks are look-up documents" if args.lookups else ""
    preset = f" (--preset {args.preset})" if args.preset else ""
    by_rule = biases and chosen == "qv" and args.relations is None and terms != ["next token"]
    without = "; no K/K, as the keys have biases" if by_rule else ""
    return f"loss        {' + '.join(terms)}{without}{lookups}{preset}"


def describe_skips(s: Stage, length: int) -> list[str]:
    """A line on where the parts of its blocks stand, where it has skips."""
    if not s.skips:
        return []
    if length <= s.T:
        return ["            no skips, as these blocks are at least as long as the context"]
    parts = min(s.skips, s.T - 1) + 1
    return [f"            in every other step in {parts:,} parts, within {length:,} positions"]


def describe_pairs(pairs: list[int]) -> str:
    """How many slots start with another pair. pairs: of rope.pairs_by_slot."""
    moved = sum(pair != slot for slot, pair in enumerate(pairs))
    if not moved:
        return "pairs       not moved: of all slots its own turns most nearly as yarn would have it"
    return (
        f"pairs       {moved} of {len(pairs)} slots start with another pair, which turns so under "
        "yarn or has no slot of its own; untrained is measured so"
    )


def describe_bits(device: torch.device, deterministic: bool) -> str:
    """Whether a second run has the same bits, and why."""
    if device.type == "cpu":
        return "the same every run, as always on a CPU"
    if deterministic:
        return "the same every run, because --deterministic has attention add in a fixed order"
    return "not the same every run, as attention's backward adds in no order; --deterministic does"


def describe_saving(copy: int, overlap: bool) -> str:
    """How a state is written. copy: its bytes of one process."""
    if overlap:
        return f"saving      while steps go on, from a copy of {size(copy)} in the host's memory"
    return f"saving      while steps wait, as the host has no room for a copy of {size(copy)}"


def describe_table(blocks: int, documents: int, length: int, columns: int, share: float) -> str:
    """How much the table reads. length: of its long blocks; share: what it costs beside steps."""
    if not blocks:
        return "table       none, as --eval-blocks is 0"
    also = f"and {documents} look-up document{'s' * (documents > 1)} of each length"
    if not documents:
        also = "without look-ups, which would cost too much (--eval-blocks 1 for them)"
    return (
        f"table       {columns} columns, each of {blocks} x {length:,} tokens, whole and cut, "
        f"{also}: {share:.0%} of the steps' work"
    )


def describe_text(corpus, stages: list[Stage]) -> str:
    """How much text there is, and how often training reads it."""
    read = sum(s.T * s.batch * s.steps for stage in stages for s in (stage, stage.auxiliary) if s)
    return (
        f"text: {len(corpus.train):,} tokens, of which training reads {read:,} "
        f"({read / len(corpus.train):.2g} times the text); {len(corpus.held_out):,} held out"
    )


def size(b: float) -> str:
    """1.5 GiB, 23 MiB, 4 KiB."""
    for unit, n in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if b >= 2**n:
            return f"{b / 2**n:.3g} {unit}"
    return f"{b:.0f} B"


def describe_time(
    c: LlamaConfig, stages: list[Stage], rank, rate: float, processes: int, given: float | None
) -> str:
    """The work of each stage, and its time at half of `rate` flop/s on each process's device."""
    lines = []
    for stage in stages:
        work = {k: v * stage.steps for k, v in flops(c, stage, rank).items()}
        seconds = sum(work.values()) / (0.5 * rate * processes)
        shares = ", ".join(f"{k} {v / sum(work.values()):.0%}" for k, v in work.items())
        lines.append(
            f"{stage.name}      {sum(work.values()):.3g} flop ({shares}); at half of the "
            f"{'given' if given else 'measured'} {processes} x {rate / 1e12:.3g} TFLOP/s about "
            f"{clock(seconds)}"
        )
    return "\n".join(lines)
