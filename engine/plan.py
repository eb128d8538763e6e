"""The plan: what a run will do and need, and every reason to refuse it, before anything is loaded.

Stages are data (cost.Stage): a name, an objective, a block length T, blocks per step, steps and a
peak learning rate. `make_stages` fills in what the user left out; `settle` decides how a step uses
the memory that is free; `check` refuses what cannot work, with the flag that helps.

Defaults.  From runs at two widths (LOG.md), C = 320 and C = 576, and the paper's at C = 4096.

    Rate      Adam moves every weight by about its rate per step, whatever the gradient's size, and
              the wider a layer, the more such moves add up in its output. Two points, 2e-3 at
              C = 576 and 2e-5 at C = 4096, fix a power law: lr = 2e-3 (576 / C)^2.3, never above
              2e-3, which was best at C = 320 too. Stage 2 takes a quarter of it, whatever --lr1 is.
    Kinds     All but linear leave the fast pairs alone and lose less before training: they take 0.3
              of that rate, half of that in stage 2, and a sixth to a half of the tokens (TOKENS).
    Stage 1   wants many small steps on short blocks: 1024 tokens per step in blocks of 512 beat
              2048 per step at equal tokens. Above C = 1024: 8192 per step in blocks of 2048.
    Stage 2   wants steps more than length: blocks of 16K gave a lower loss at 64K than blocks of
              64K at equal tokens. A native length beyond 16K is kept; the extended one is the most.
    CPU       its tokens are meant for about an hour at 135M parameters, by estimate; yarn's 65,536
              of stage 1 took 169 s on eight Xeon cores with AMX (bfloat16).

Limits.  A plan knows shapes, not text: whether the text is long enough shows when it has been read.
For widths far from these two the defaults are guesses: try a few rates.

Source.  The measured points: LOG.md; the paper: LinearARD, arXiv 2604.00004.
"""

import argparse
import math
from dataclasses import replace

import torch

from engine import data
from engine.cost import Stage, at_a_time, clock, flops, memory, parameters, trained_parameters
from engine.exits import OutOfMemory
from hub import checkpoint, files
from model import TRAINED, Llama, LlamaConfig
from precision import attention_dtype
from relation_kl import choose
from rope import MULTIPLY

TOP_RATE = 2e-3  # the best rate measured; the power law's 0.3 at C = 64 blows a model up
GENTLE = 0.3  # of it for kinds that keep the fast pairs as they are
# Tokens of stage 1 and stage 2, by device and by whether the positions are linear
TOKENS = {
    ("cuda", True): (1_048_576, 3_145_728),
    ("cuda", False): (262_144, 524_288),
    ("cpu", True): (262_144, 131_072),
    ("cpu", False): (65_536, 65_536),
}

# Fewer tokens at a time might not fill a GPU. At 7B, 4096 at a time and nothing computed twice took
# 2.3 s per step, where 8192 and all layers twice took 3.6 (bench step, H100).
FEWEST_TOKENS = 4096


def rope_kind(config: LlamaConfig) -> str:
    """What --rope left out means: the teacher's own kind if that can be stretched, else linear."""
    return config.rope.kind if config.rope.kind in MULTIPLY else "linear"


def make_stages(args: argparse.Namespace, config: LlamaConfig, student: LlamaConfig) -> list[Stage]:
    """The stages that --stage asks for: stage 1 on short blocks, stage 2 on long ones.

    Stage 2 may have `beside`: for each long block, --native-blocks of stage 1's kind at its length,
    so that what stage 1 won is not lost again.
    """
    linear, native = student.rope.kind == "linear", config.rope.length
    lr = min(TOP_RATE, TOP_RATE * (576 / config.width) ** 2.3) * (1.0 if linear else GENTLE)
    small = config.width <= 1024
    T1 = args.length1 or min(native, 512 if small else 2048)
    T2 = args.length2 or min(student.rope.length, max(16384, native))
    batch1 = args.batch1 or max(1, (1024 if small else 8192) // T1)
    batch2 = args.batch2 or max(1, 16384 // T2)
    tokens = TOKENS["cuda" if args.device.startswith("cuda") else "cpu", linear]
    tokens1, tokens2 = args.tokens1 or tokens[0], args.tokens2 or tokens[1]
    logits = args.logit_weight > 0
    first = _stage("stage1", "relation", T1, batch1, tokens1, args.lr1 or lr, logits)
    second = _stage(
        "stage2", "next token", T2, batch2, tokens2, args.lr2 or lr / (4 if linear else 2)
    )
    if args.native_blocks:
        beside = replace(first, name="stage2", batch=args.native_blocks * batch2, lr=second.lr)
        second = replace(second, beside=replace(beside, T=min(T1, T2), steps=second.steps))
    return {"1": [first], "2": [second], "both": [first, second]}[args.stage]


def _stage(
    name: str, objective: str, T: int, batch: int, tokens: int, lr: float, logits=False
) -> Stage:
    steps = max(1, round(tokens / (T * batch)))
    return Stage(name, objective, T, batch, steps, float(f"{lr:.2g}"), logits)


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step, 0 the first: up over a twentieth of them, then straight down.

    It begins above 0 and ends at a fiftieth of the stage's.
    """
    warm = math.ceil(stage.steps / 20)
    down = (stage.steps - step) / max(1, stage.steps - warm)
    return stage.lr * min((step + 1) / (warm + 1), max(0.02, down))


# ---- what can be refused


def check(
    args: argparse.Namespace,
    config: LlamaConfig,
    student: LlamaConfig,
    stages: list[Stage],
    processes: int,
) -> None:
    """Every refusal that needs no text and no weights. Raises ValueError."""
    if args.shard and processes == 1:
        command = "torchrun --nproc_per_node N train.py ..."
        raise ValueError(f"--shard cuts the models over several processes: {command}")
    for s in stages:
        if s.batch % processes:
            raise ValueError(
                f"--batch{s.name[-1]} is {s.batch} and there are {processes} processes; "
                "it must be a multiple of that"
            )
    distils = [s for s in stages for s in (s, s.beside) if s and s.objective == "relation"]
    if student.rope.kind == "dynamic" and any(config.rope.length >= s.T for s in distils):
        raise ValueError(
            "--rope dynamic changes nothing up to the native length: "
            "there is nothing to distil; use --stage 2 --native-blocks 0"
        )
    if args.lora_rank and args.lora_rank > config.width:
        raise ValueError(
            f"--lora-rank is {args.lora_rank}; "
            f"it must be from 1 to the model's width, {config.width}"
        )
    if args.data:
        data.find_files(args.data, [args.cache, args.out])  # they exist and are of kinds read
    with torch.device("meta"):
        checkpoint.check_fits(Llama(config), args.teacher)  # headers alone: milliseconds
    for name in (*checkpoint.TOKENIZER_FILES, "README.md"):  # an export reads them, at the end
        file = files.own(args.teacher, name)  # links that lead out are refused
        with files.reading(file):
            if file.is_file():
                files.read_json(file) if name.endswith(".json") else file.open("rb").close()


def check_text(corpus, stages: list[Stage], lookups) -> None:
    """Every refusal that needs the text. lookups: None, or what makes look-up documents."""
    for stage in stages:
        for s in (stage, stage.beside):
            if s:
                corpus.blocks(s.T)
                if lookups:
                    lookups.check(s.T)


def relation_impl(args: argparse.Namespace, config: LlamaConfig, dtype, device) -> tuple[str, str]:
    """(the implementation of the relation loss, why).

    Raises ValueError where --impl names one that cannot run here.
    """
    head = torch.empty(1, 1, 1, config.head_dim, dtype=dtype, device=device)
    if args.impl == "auto":
        return choose(head)
    if args.impl == "triton":
        import kernel_triton

        if reason := kernel_triton.unsupported(head):
            raise ValueError(f"--impl triton: {reason}; leave it at auto")
    if args.impl == "hopper":
        import kernel_hopper

        if reason := kernel_hopper.unsupported(head, True, None, (1.0, 1.0)):
            raise ValueError(f"--impl hopper: {reason}; leave it at auto")
    return args.impl, "--impl says so"


def needs_checkpointing(need: dict[str, int], free: int) -> bool:
    """Recompute activations only where the machine has no room to keep them."""
    return sum(need.values()) > 0.9 * free


def settle(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    device: torch.device,
    micro: int | None,
    rank: int | None,
    shards: int,
    own: int,
    free: int,
) -> tuple[int, bool, dict[str, int]]:
    """How a process that does `own` blocks of each step uses its `free` bytes of memory.

    Fewer blocks at a time come before computing layers twice, down to FEWEST_TOKENS. Returns
    (blocks at a time, checkpointing, bytes by part).
    """

    ids = max(s.batch // stage.batch * (s.T + 1) for s in (stage, stage.beside) if s)

    def parts(few: int, checkpointing: bool) -> dict[str, int]:
        attention = attention_dtype(dtype, device)
        held = memory(c, stage, dtype, few, checkpointing, rank, shards, attention)
        return held | {"a step's ids": 8 * own * ids}

    most = few = at_a_time(stage, micro, own)
    while not micro and needs_checkpointing(parts(few, False), free):
        few = few // 2
        if few * stage.T < FEWEST_TOKENS:
            return most, True, parts(most, True)
    checkpointing = needs_checkpointing(parts(few, False), free)
    return few, checkpointing, parts(few, checkpointing)


def refuse_if_too_large(parts: dict[str, int], free: int, stage: Stage) -> None:
    """Raises ValueError where the bytes of a stage's `parts` come to more than `free`."""
    need = sum(parts.values())
    if need > free:
        gib = f"about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        raise ValueError(f"{stage.name} needs {gib}; {remedy(stage)}")


def remedy(stage: Stage) -> str:
    """The flags that help where memory is short."""
    n = stage.name[-1]
    return (
        f"lower --length{n} (now {stage.T}), --batch{n} (now {stage.batch}) or --micro, train "
        "adapters with --lora-rank, spread the model over several GPUs with torchrun and --shard, "
        "or use a larger machine"
    )


def out_of_memory(stage: Stage, device: torch.device, kept: str = "") -> OutOfMemory:
    return OutOfMemory(f"{stage.name} ran out of memory on {device}: {remedy(stage)}{kept}")


# ---- what is printed


def describe(
    c: LlamaConfig, student: LlamaConfig, stages: list[Stage], needs: list[dict], rank=None
) -> str:
    """What is printed before the run: positions old and new, parameters, stages, their memory."""
    everything, _ = parameters(c)
    lines = [f"{'':12}{'kind':>10}{'factor':>9}{'theta':>12}{'length':>10}"]
    for name, config in (("teacher", c), ("student", student)):
        r = config.rope
        lines.append(f"{name:12}{r.kind:>10}{r.factor:>9g}{r.theta:>12g}{r.length:>10,}")
    if student.rope.kind == "linear":
        lines.append(
            "positions   linear is the paper's kind; "
            "--rope yarn loses far less before training (README)"
        )
    if student.rope.kind == "dynamic":
        lines.append(
            "positions   dynamic is served by transformers alone: "
            "vLLM and llama.cpp read it otherwise"
        )
    trained = trained_parameters(c, rank)
    lines.append(f"parameters  {everything:,} in all, {trained:,} trained ({', '.join(TRAINED)})")
    if c.window:
        lines.append(
            f"the teacher attends over a sliding window of {c.window:,}; "
            "the student over its whole length"
        )
    for stage, need in zip(stages, needs, strict=True):
        lines.append(
            f"{stage.name}      {stage.objective}, "
            f"{stage.steps:,} steps of {stage.batch} x {stage.T:,} tokens ({stage.tokens:,}), "
            f"learning rate {stage.lr:g}, about {size(sum(need.values()))}:"
        )
        if b := stage.beside:
            lines.append(
                f"            and in each step {b.batch} x {b.T:,} tokens of stage 1's kind"
            )
        lines.append("            " + ", ".join(f"{k} {size(v)}" for k, v in need.items() if v))
    return "\n".join(lines)


def describe_loss(args: argparse.Namespace, stages: list[Stage]) -> str:
    """The terms of stage 1's loss, with their weights, and the look-up documents among the text."""
    terms = [f"{r.upper()}/{r.upper()}" for r in "qkv" if r in args.relations]
    weight = "" if args.logit_weight == 1 else f"{args.logit_weight:g} x "
    terms += [f"{weight}next-token KL"] if args.logit_weight else []
    if not any(s and s.objective == "relation" for stage in stages for s in (stage, stage.beside)):
        terms = ["next token"]
    lookups = f"; {args.lookups:.0%} of the blocks are look-up documents" if args.lookups else ""
    return f"loss        {' + '.join(terms)}{lookups}"


def describe_text(corpus, stages: list[Stage]) -> str:
    """How much text there is, and how often training reads it."""
    read = sum(s.T * s.batch * s.steps for stage in stages for s in (stage, stage.beside) if s)
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
