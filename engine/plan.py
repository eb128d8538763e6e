"""The plan: what a run will do and need, and every reason to refuse it, before anything is loaded.

    make_plan(args, world, defaults) -> Plan        made and checked; engine/announce.py says it

Stages are data (cost.Stage): a name, an objective, a block length T, blocks per step, steps and a
peak learning rate. `numbers` fills in what the user left out from train.py's `defaults`;
engine/fit.py decides how a step uses the memory that is free; `check` refuses what cannot work,
with the flag that helps.

Limits.  A plan knows shapes and the size of weights, not text: whether the text is long enough
shows when it has been read.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine import cost, data, folder, quant
from engine.cost import Stage, at_a_time, flops, trained_parameters
from engine.exits import OutOfMemory
from engine.fit import ROOM, Fit, Machine, host_share, settle
from engine.lookups import DOCUMENTS, LENGTHS
from engine.machine import fix_order, keep_memory
from engine.parallel import World
from engine.sequence import blocks_per_process
from hub import checkpoint, files
from hub.tokenizer import Tokenizer, load_tokenizer
from model import TRAINED, Llama, LlamaConfig, choose_glue
from precision import choose_dtype
from relation_kl import choose
from rope import MULTIPLY, pairs_by_slot

SHARE = 1 / 25  # of the steps' work, for the table


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before text and weights are read."""

    args: argparse.Namespace
    native: LlamaConfig
    longer: LlamaConfig  # the student's
    tokenizer: Tokenizer
    stages: list[Stage]
    fits: list[Fit]  # of each stage
    device: torch.device
    dtype: torch.dtype  # of activations
    chosen: dict[str, tuple[str, str]]  # among implementations: of what, (which, why)
    peak: float  # flop/s of one device
    processes: int
    copy: int  # bytes of one process's part of a state
    overlap: bool  # a state is written while steps go on
    blocks: int  # long ones that the table reads
    documents: int  # look-up documents of each length that it reads
    share: float  # what that costs, of the steps' work
    pairs: list[int] | None  # of the teacher, that the student's slots start with; None: their own

    @property
    def fused(self) -> bool:
        """Is Adam one kernel? Not over shards, nor on a CPU."""
        return self.device.type == "cuda" and not self.args.shard

    def fit(self, stage: Stage) -> Fit:
        """How a step of this stage uses the memory."""
        return self.fits[self.stages.index(stage)]

    def how(self, stage: Stage) -> dict:
        """What engine/step.py is told beside the models."""
        args, fit = self.args, self.fit(stage)
        long = replace(stage, auxiliary=None)
        work = sum(flops(self.native, long, args.lora_rank).values()) * fit.micro / stage.batch
        return {
            "dtype": self.dtype,
            "kl_weight": args.logit_weight,
            "relations": stage.relations,
            "authors_heads": args.authors_heads,
            "impl": args.impl,
            "dropout": args.lora_dropout,
            "recomputed": fit.recomputed,
            "tiles": fit.tiles,
            "gathered": fit.gathered,
            "seconds": work / self.peak / self.native.n_layer,
        }


def make_plan(args: argparse.Namespace, world: World, defaults: Callable) -> Plan:
    """The plan of these arguments. defaults: train.py's. Nothing is written.

    Raises ValueError for all that can be refused without text and weights.
    """
    if args.deterministic:
        fix_order()
    device, (dtype, why_dtype) = world.device, choose_dtype(world.device, args.dtype)
    if device.type == "cpu":
        keep_memory()
    native = LlamaConfig.from_hf(checkpoint.read_config(args.teacher))
    longer = native.extended(args.rope or rope_kind(native), args.scale)
    tokenizer = load_tokenizer(args.teacher)
    stages = make_stages(args, native, numbers(args, native, longer, defaults))
    check(args, native, longer, stages, world.size)
    if args.bits:
        quant.check(device)
    if args.resume or not args.dry_run:
        world.on_main(check_folder, args)
    free = int(world.min(cost.free_memory(device)))
    peak = (args.peak_tflops or 0) * 1e12 or world.on_main(cost.peak_flops, device, dtype)
    host = int(world.min(host_share(device)))
    kernels, why_glue = choose_glue(device, dtype)
    machine = Machine(
        native,
        dtype,
        device,
        rank=args.lora_rank,
        shard=args.shard,
        processes=world.size,
        free=free,
        host=host,
        fused=bool(kernels),
        bits=args.bits,
    )
    asked = 1 if args.lora_dropout else args.micro  # each block has its own noise
    fits = [settle(machine, stage, asked) for stage in stages]
    shape = relation_shape(args, stages[0], fits[0], world.size)
    chosen = {
        "compute": (str(dtype)[6:], why_dtype),
        "between products": (
            "kernel_glue.py's kernels" if kernels else "PyTorch's operators",
            why_glue,
        ),
        "relation loss": relation_impl(args, native, *shape, dtype, device),
    }
    copy = 12 * trained_parameters(native, args.lora_rank) // world.size  # with Adam's moments
    blocks, documents, share = table_size(args, native, stages)
    return Plan(
        args,
        native,
        longer,
        tokenizer,
        stages,
        fits,
        device,
        dtype,
        chosen,
        peak,
        processes=world.size,
        copy=copy,
        overlap=copy <= spare_on_host(machine, fits),
        blocks=blocks,
        documents=documents,
        share=share,
        pairs=pairs_by_slot(native.rope, longer.rope) if args.move_pairs else None,
    )


def table_size(
    args: argparse.Namespace, c: LlamaConfig, stages: list[Stage]
) -> tuple[int, int, float]:
    """(long blocks that the table reads, look-up documents of each length; what they cost, as a
    share of the steps' work).

    Where --eval-blocks is left out: as many of both, up to DOCUMENTS, as cost SHARE. Where one of
    each costs more: one block, and no documents, whose eight questions would say little.
    """

    def forward(T: int) -> float:
        return flops(c, Stage("", "next token", T, batch=1, steps=1, lr=0.0))["student forward"]

    native, scale, columns = c.rope.length, args.scale, 2 + len(stages)
    block = columns * (forward(round(scale * native)) + scale * forward(native))
    documents = columns * sum(forward(times * native) for times in LENGTHS if times <= scale)
    steps = sum(sum(flops(c, s, args.lora_rank).values()) * s.steps for s in stages)
    n = args.eval_blocks
    if n is None:
        n = min(DOCUMENTS, int(SHARE * steps / (block + documents)))
    blocks = 1 if args.eval_blocks is None and not n else n
    n = min(n, DOCUMENTS)
    return blocks, n, (blocks * block + n * documents) / steps


def spare_on_host(m: Machine, fits: list[Fit]) -> int:
    """Bytes of the host's memory that no step of this process will need."""
    if m.device.type == "cuda":
        return m.host - max(fit.tiles.host if fit.tiles else 0 for fit in fits)
    return int(ROOM * m.free) - max(sum(fit.need.values()) for fit in fits)


def check_folder(args: argparse.Namespace) -> None:
    """Raises ValueError where --out is not this run's to write in."""
    apart = {"--teacher": args.teacher} | {f"--data {p}": p for p in args.data}
    folder.check(args.out, "--out", "train.py", resume=args.resume, apart=apart)


def rope_kind(config: LlamaConfig) -> str:
    """What --rope left out means: the teacher's own kind if that can be stretched, else linear."""
    return config.rope.kind if config.rope.kind in MULTIPLY else "linear"


def weight_size(config: LlamaConfig, path: Path, layers: int = 8) -> float:
    """The median root mean square of the matrices that learn, of about so many layers.

    Raises ValueError where the weights in `path` do not fit the config.
    """
    with torch.device("meta"):
        checkpoint.check_fits(Llama(config), path)  # headers alone: milliseconds
    some = range(0, config.n_layer, math.ceil(config.n_layer / layers))
    names = [f"model.layers.{n}.self_attn.{part}.weight" for n in some for part in TRAINED]
    found = checkpoint.read_tensors(path, names).values()
    return statistics.median(w.float().square().mean().sqrt().item() for w in found)


def numbers(
    args: argparse.Namespace, config: LlamaConfig, student: LlamaConfig, defaults: Callable
) -> dict:
    """train.py's `defaults`, where no flag says otherwise.

    Raises ValueError where the teacher's weights do not fit its config.
    """
    size = weight_size(config, args.teacher)
    number = defaults(config, student, size, args.device.startswith("cuda"))
    return number | {k: v for k, v in vars(args).items() if k in number and v is not None}


def make_stages(args: argparse.Namespace, config: LlamaConfig, number: dict) -> list[Stage]:
    """The stages that --stage asks for: stage 1 on short blocks, stage 2 on long ones.

    Stage 2 may have an `auxiliary`: for each long block, --native-blocks of stage 1's kind at its
    length, so that what stage 1 won is not lost again. number: of `numbers`.
    """

    def stage(n: int, objective: str, logits: bool = False) -> Stage:
        T = number[f"length{n}"]
        batch = getattr(args, f"batch{n}") or max(1, number[f"step{n}"] // T)
        steps = max(1, round(number[f"tokens{n}"] / (T * batch)))
        lr = float(f"{number[f'lr{n}']:.2g}")
        more = {"relations": number["relations"], "skips": getattr(args, f"skips{n}")}
        return Stage(f"stage{n}", objective, T, batch, steps, lr, logits, **more)

    first, second = stage(1, "relation", args.logit_weight > 0), stage(2, "next token")
    if args.teacher_share is not None or config.rope.length >= second.T:
        second = replace(second, teacher_share=number["teacher_share"])
    if args.native_blocks:
        auxiliary = replace(
            first,
            name="stage2",
            T=min(first.T, second.T),
            batch=args.native_blocks * second.batch,
            steps=second.steps,
            lr=second.lr,
        )
        second = replace(second, auxiliary=auxiliary)
    return {"1": [first], "2": [second], "both": [first, second]}[args.stage]


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
        if s.batch % processes and processes % s.batch:
            raise ValueError(
                f"--batch{s.name[-1]} is {s.batch} and there are {processes} processes; "
                "it must be a multiple of that"
            )
        if s.teacher_share and config.rope.length < s.T:
            raise ValueError(
                f"--teacher-share is {s.teacher_share:g}, but the teacher reads no more than "
                f"{config.rope.length:,} tokens: lower --length2 (now {s.T:,}) to that, or give "
                "--teacher-share 0"
            )
    parts = [s for stage in stages for s in (stage, stage.auxiliary) if s]
    distils = [s for s in parts if s.objective == "relation"]
    if student.rope.kind == "dynamic" and any(config.rope.length >= s.T for s in distils):
        raise ValueError(
            "--rope dynamic changes nothing up to the native length: "
            "there is nothing to distil; use --stage 2 --native-blocks 0"
        )
    for s in parts:
        if s.skips and student.rope.kind == "dynamic":
            raise ValueError(
                "the frequencies of --rope dynamic depend on a block's length, so its parts cannot "
                f"be moved on: leave --skips{1 if s in distils else 2} out"
            )
    if args.move_pairs and student.rope.kind != "linear":
        raise ValueError(
            "--move-pairs is for --rope linear, which slows all pairs alike, and here it is "
            f"{student.rope.kind}: leave it out, or give --rope linear"
        )
    if args.move_pairs and config.qk_norm:
        raise ValueError(
            "--move-pairs would have to move the weights of q_norm and k_norm, too, which stay the "
            "teacher's: leave it out"
        )
    if args.lora_rank and args.lora_rank > config.width:
        raise ValueError(
            f"--lora-rank is {args.lora_rank}; "
            f"it must be from 1 to the model's width, {config.width}"
        )
    if args.data:
        data.find_files(args.data, [args.cache, args.out])  # they exist and are of kinds read
    # An export reads them, at the end; links that lead out are refused
    exported = checkpoint.copied_files(args.teacher)
    exported["README.md"] = files.file_of(args.teacher, "README.md")
    for name, file in exported.items():
        with files.reading(file):
            if file.is_file():
                files.read_json(file) if name.endswith(".json") else file.open("rb").close()


def check_text(corpus, stages: list[Stage], lookups) -> None:
    """Every refusal that needs the text. lookups: None, or what makes look-up documents."""
    for stage in stages:
        for s in (stage, stage.auxiliary):
            if s:
                corpus.blocks(s.T)
                if lookups:
                    lookups.check(s.T)


def relation_shape(
    args: argparse.Namespace, stage: Stage, fit: Fit, processes: int
) -> tuple[int, int]:
    """(blocks at a time, tokens of each) of the relation loss in this stage or its auxiliary, as
    Run.micro_batches has them.
    """
    asked = fit.micro
    if stage.auxiliary:
        stage, asked = stage.auxiliary, args.micro
    own = blocks_per_process(stage.batch, processes)
    return at_a_time(stage, 1 if args.lora_dropout else asked, own), stage.T


def relation_impl(
    args: argparse.Namespace, config: LlamaConfig, B: int, T: int, dtype, device
) -> tuple[str, str]:
    """(the implementation of the relation loss of q over B blocks of T tokens, why).

    Raises ValueError where --impl names one that cannot run here.
    """
    one = torch.empty(1, 1, 1, config.head_dim, dtype=dtype, device=device)
    q = one.expand(B, config.n_head, T, -1)
    if args.impl == "auto":
        return choose(q)
    if args.impl == "triton":
        import kernel_triton

        if reason := kernel_triton.unsupported(q):
            raise ValueError(f"--impl triton: {reason}; leave it at auto")
    if args.impl == "hopper":
        import kernel_hopper

        if reason := kernel_hopper.unsupported(q, True, None, (1.0, 1.0)):
            raise ValueError(f"--impl hopper: {reason}; leave it at auto")
    return args.impl, "--impl says so"


def remedy(stage: Stage) -> str:
    """The flags that help where memory is short."""
    n = stage.name[-1]
    return (
        f"lower --length{n} (now {stage.T}), --batch{n} (now {stage.batch}) or --micro, train "
        "adapters with --lora-rank, and --bits 4 beside them (not with --shard), spread the model "
        "over several GPUs with torchrun and --shard, or use a larger machine"
    )


def out_of_memory(stage: Stage, device: torch.device, promise: str = "") -> OutOfMemory:
    return OutOfMemory(f"{stage.name} ran out of memory on {device}: {remedy(stage)}{promise}")
