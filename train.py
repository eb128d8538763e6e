"""Extends a LLaMA's context: interpolate the positions, repair by self-distillation, then a short pre-training.

    python train.py --teacher DIR --scale 8          both stages, then an export that loads everywhere
    python train.py                                  the same on the teacher and text that are at hand offline
    torchrun --nproc_per_node 8 train.py ...         the same on eight GPUs, see parallel.py

It reads top to bottom: arguments, plan, models, stages, export. Stage 1 reproduces the frozen teacher's Q/Q, K/K and
V/V relations at the native length (py); stage 2 predicts the next token at the extended length. Both train the
q, k and v projections alone, in float32 copies under bf16 compute on a GPU, in float32 on a CPU.

--out DIR gets metrics.jsonl (a line a step) and curves.png, run.json (arguments, versions, seed), state/ (to --resume
from), report.json, .md and .png (what was lost and what came back) and student/, the Hugging Face directory to use.

Exit codes: 0 done; 2 refused or cannot go on, one sentence says why and nothing saved is lost; 3 stopped by Ctrl-C or
SIGTERM, state saved. torchrun has its own: 1 where a process's is not 0.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import eval as evaluation
from engine import data, lora, parallel, resume, watch
from engine import plan as planning
from engine.lookups import Lookups
from evals import report
from hub import checkpoint, files
from hub.card import model_card
from hub.tokenizer import load_tokenizer
from model import (
    TRAINED,
    Llama,
    LlamaConfig,
    by_chunks,
    check_device,
    compute_dtype,
    make_student,
    next_token_loss,
    trainable,
)
from relation_kl import IMPLEMENTATIONS, choose, relation_kl
from rope import STUDENT_KINDS

HERE = Path(__file__).resolve().parent
# Flags that stand for a whole recipe, applied before the defaults of the parser
# fmt: off
PRESETS = {
    # Many small steps, and text like the teacher's own: see LOG.md for what else was tried
    "demo": {"tokens1": 240_000, "tokens2": 180_000, "batch1": 1, "batch2": 1, "lr1": 2e-3, "lr2": 7e-4,
             "logit_weight": 1.0, "lookups": 0.25},
    # The paper's own: adapters, 144 steps of 4 x 4096 tokens
    "authors": {"lora_rank": 1024, "lora_alpha": 2048.0, "lora_dropout": 0.05, "lr1": 2e-5, "length1": 4096,
                "batch1": 4, "tokens1": 144 * 4 * 4096},
    "default": {"tokens1": 2_100_000, "tokens2": 2_100_000, "lora_dropout": 0.0, "logit_weight": 0.0, "lookups": 0.0},
}
# fmt: on


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_argument_group("what")
    what.add_argument(
        "--teacher", type=Path, help="Hugging Face directory of a LLaMA (default: the demo's)"
    )
    what.add_argument(
        "--scale", type=number, default=8.0, help="how many times the context, above 1 (default: 8)"
    )
    what.add_argument(
        "--rope", choices=STUDENT_KINDS, default="linear", help="how the positions are stretched"
    )
    what.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="text files or folders (default: Python's own)",
    )
    what.add_argument("--out", type=Path, help="folder for the result (default: out/NAME-xSCALE)")
    what.add_argument("--stage", choices=("1", "2", "both"), default="both")
    how = p.add_argument_group("how (defaults are printed with the plan)")
    for n, name in ((1, "stage 1"), (2, "stage 2")):
        how.add_argument(f"--tokens{n}", type=int, help=f"tokens that {name} reads")
        how.add_argument(f"--length{n}", type=int, help=f"tokens a block of {name}")
        how.add_argument(f"--batch{n}", type=int, help=f"blocks a step of {name}")
        how.add_argument(f"--lr{n}", type=float, help=f"peak learning rate of {name}")
    how.add_argument(
        "--logit-weight",
        type=float,
        help="of the next-token KL in stage 1 (default: 0; the demo: 1)",
    )
    how.add_argument(
        "--lookups",
        type=float,
        help="share of blocks that are look-up documents (0; the demo: 0.25)",
    )
    how.add_argument(
        "--lora-rank", type=int, help="train adapters of this rank instead of full projections"
    )
    how.add_argument(
        "--lora-alpha", type=float, help="their weight is alpha / rank (default: twice the rank)"
    )
    how.add_argument("--lora-dropout", type=float, help="on the adapters' input (default: 0)")
    how.add_argument(
        "--preset", choices=("authors",), help="authors: the paper's adapters and stage 1"
    )
    how.add_argument(
        "--micro", type=int, help="blocks at a time (default: as many as fill 8192 tokens)"
    )
    how.add_argument("--impl", choices=IMPLEMENTATIONS, default="auto", help="of the relation loss")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--eval-blocks", type=int, default=8, help="long held-out blocks for the table; 0: no table"
    )
    run = p.add_argument_group("running")
    run.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    run.add_argument(
        "--save-minutes", type=float, default=10, help="write the state at least this often"
    )
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    run.add_argument(
        "--shard", action="store_true", help="under torchrun: cut the models over the GPUs (FSDP2)"
    )
    run.add_argument(
        "--peak-tflops", type=float, help="what 100 %% MFU means (default: measured at the start)"
    )
    run.add_argument(
        "--tensorboard", action="store_true", help="also write figures for TensorBoard"
    )
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument(
        "--cache",
        type=Path,
        help="folder for tokenised text, to share between runs (default: in --out)",
    )
    p.error = one_sentence  # instead of argparse's page of usage
    args = p.parse_args(argv)
    for preset in (args.preset, None if args.teacher else "demo", "default"):
        for key, value in PRESETS.get(preset, {}).items():
            if getattr(args, key) is None:
                setattr(args, key, value)
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    args.out = args.out or Path("out") / (
        f"{args.teacher.name}-x{args.scale:g}" if args.teacher else "demo"
    )
    args.cache = args.cache or args.out / "cache"
    args.teacher = args.teacher or HERE / "demo" / "teacher"
    place = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise ValueError(f"--out {args.out}: {place} is a file; name a folder")
    check_device(args.device)
    if args.eval_blocks < 0 or not 0 <= (args.lora_dropout or 0) < 1:
        raise ValueError(
            f"--eval-blocks {args.eval_blocks} (0 or more), --lora-dropout {args.lora_dropout} (0 to 1)"
        )
    positive = [f"{key}{n}" for key in ("tokens", "length", "batch", "lr") for n in (1, 2)]
    for key in (*positive, "micro", "lora_rank", "peak_tflops"):
        if getattr(args, key) is not None and not 0 < getattr(args, key) < math.inf:
            raise ValueError(
                f"--{key.replace('_', '-')} is {getattr(args, key)}; it must be above 0"
            )
    if not (0 <= args.lookups <= 1 and args.logit_weight >= 0):
        raise ValueError(
            f"--lookups is {args.lookups} (0 to 1), --logit-weight is {args.logit_weight} (0 or above)"
        )
    if args.tensorboard:
        watch.require_tensorboard()
    return args


def one_sentence(message: str) -> None:
    raise ValueError(message)


def number(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 1):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 1, such as 8")
    return value


class Run:
    """One run's fixed parts and its progress: what the functions below share, and what a state holds."""

    def __init__(self, args, world: parallel.World):
        """The plan: everything that can be refused before anything heavy is loaded or anything written."""
        self.args, self.world, self.device = args, world, world.device
        self.dtype = compute_dtype(world.device)
        if args.shard and world.size == 1:
            raise ValueError(
                "--shard cuts the models over several processes: torchrun --nproc_per_node N train.py ..."
            )
        self.teacher_config = LlamaConfig.from_hf(files.read_json(args.teacher / "config.json"))
        self.student_config = self.teacher_config.extended(args.rope, args.scale)
        self.native, self.long = (
            self.teacher_config.rope.length,
            round(self.teacher_config.rope.length * args.scale),
        )
        self.plan = planning.stages(args, self.teacher_config, self.student_config.rope.length)
        self.own = [
            world.share(s.name, s.batch) for s in self.plan
        ]  # blocks of a step that are this rank's
        if args.rope == "dynamic" and any(
            s.objective == "relation" and self.native >= s.T for s in self.plan
        ):
            raise ValueError(
                "--rope dynamic changes nothing up to the native length: leave stage 1 out with --stage 2"
            )
        self.tokenizer = load_tokenizer(args.teacher)
        if self.tokenizer.size > self.teacher_config.vocab_size:
            sizes = f"{self.tokenizer.size} ids, config.json's vocab_size is {self.teacher_config.vocab_size}"
            raise ValueError(f"the tokenizer has {sizes}: they are not one model's")
        checkpoint.find_tensors(args.teacher)
        self.columns: dict[str, dict[str, float]] = {}
        self.total = 0  # steps over all stages

    def save(self, stage: int, step: int, optimiser) -> None:
        """All ranks gather, rank 0 writes; the state says to go on with `step` of `stage`."""
        info = {"total": self.total, "stage": stage, "step": step, "columns": self.columns}
        info["arguments"] = resume.matters(self.args)
        tensors = resume.gather(self.weights, optimiser, keep=self.world.main)
        self.world.on_main(self._write, tensors, info)
        self.saved = time.time()

    def _write(self, tensors: dict, info: dict) -> None:
        with files.disk_sentences(self.args.out / "state"):
            resume.write(self.args.out / "state", tensors, info)
            self.watch.curves(patience=60)

    def measure(self, name: str, model: Llama) -> None:
        """A column of the table. Sharded models need all ranks; else the others wait for rank 0."""
        if not self.args.eval_blocks or name in self.columns:
            return
        what = (
            model,
            self.corpus,
            self.lookups,
            self.native,
            self.args.scale,
            self.args.eval_blocks,
        )
        if self.args.shard:
            self.columns[name] = evaluation.measure(*what)
        else:
            self.columns[name] = self.world.on_main(evaluation.measure, *what)


def say_plan(run: Run) -> None:
    """Settles how each stage uses the memory that is free, prints it all, and refuses what cannot fit."""
    args, c, shards = run.args, run.teacher_config, run.world.size if run.args.shard else 1
    free = int(run.world.least(planning.free_memory(run.device)))
    run.peak = (
        args.peak_tflops * 1e12
        if args.peak_tflops
        else run.world.on_main(watch.peak_flops, run.device)
    )
    run.settled = [
        planning.settle(c, stage, run.dtype, args.micro, args.lora_rank, shards, own, free)
        for stage, own in zip(run.plan, run.own, strict=True)
    ]
    needs = [need for _, _, need in run.settled]
    print(planning.describe(c, run.student_config, run.plan, needs, args.lora_rank))
    head = torch.empty(1, 1, 1, c.head_dim, dtype=run.dtype, device=run.device)
    impl, reason = choose(head) if args.impl == "auto" else (args.impl, "--impl says so")
    print(f"relation loss: {impl}, because {reason}")
    rate = run.peak, run.world.size, bool(args.peak_tflops)
    print(planning.describe_time(c, run.plan, args.lora_rank, *rate), flush=True)
    for stage, need in zip(run.plan, needs, strict=True):
        planning.refuse_if_too_large(need, free, stage)


def load_text(run: Run) -> None:
    args, world = run.args, run.world
    with files.disk_sentences(args.cache):
        world.on_main(
            lambda: data.load_corpus(args.data, run.tokenizer, args.cache) and None
        )  # tokenises once for all
        run.corpus = data.load_corpus(args.data, run.tokenizer, args.cache, quiet=not world.main)
    for stage in run.plan:
        run.corpus.blocks(stage.T)
    if args.eval_blocks and run.long >= len(run.corpus.held_out):
        print(
            f"no table: the held-out text has {len(run.corpus.held_out):,} tokens, a block {run.long:,}; add --data"
        )
        args.eval_blocks = 0
    wanted = args.eval_blocks and (world.main or args.shard)
    run.mixer = Lookups(run.tokenizer, run.corpus.train) if args.lookups else None
    run.lookups = (
        evaluation.make_lookups(run.tokenizer, run.corpus, run.native, run.long) if wanted else None
    )


def load_models(run: Run) -> None:
    args = run.args
    place = "cpu" if args.shard else str(run.device)
    run.teacher = Llama.from_pretrained(args.teacher, dtype=run.dtype, device=place)
    trained = () if args.lora_rank else TRAINED
    run.student = make_student(run.teacher, run.student_config, trained=trained)
    if args.lora_rank:
        torch.manual_seed(args.seed)
        lora.adapt(run.student, TRAINED, args.lora_rank, args.lora_alpha, args.lora_dropout)
    else:  # the masters start from the stored numbers, not from their rounding to the compute dtype
        for name, value in checkpoint.read_tensors(
            args.teacher, list(trainable(run.student))
        ).items():
            run.student.get_parameter(name).data.copy_(value)
    run.units = (
        parallel.shard(run.teacher, run.student, run.world, run.dtype) if args.shard else None
    )
    run.weights = trainable(run.student)


def open_out(run: Run) -> None:
    """The first writing: the folder, run.json, and the log without what the state to resume from does not know."""
    args = run.args
    run.about = {
        "arguments": resume.matters(args),
        "versions": evaluation.versions(run.device) | {"processes": run.world.size},
        "text": run.corpus.name,
        "command": sys.argv,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_atomic(args.out / "run.json", json.dumps(run.about, indent=1) + "\n")
    resume.cut_log(args.out / "metrics.jsonl", run.total)
    shape = run.teacher_config, args.lora_rank
    run.watch = watch.Watch(args.out, run.plan, *shape, run.peak, run.world.size, args.tensorboard)


def relation_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    checkpointing: bool = False,
    authors_heads: bool = False,
    logit_weight: float = 0.0,
    units: list | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, its parts [L, 3] without grad) for ids [B, T]: mean KL in nats of Q/Q, K/K and V/V in every layer.

    units: with --shard, what gathers layer l of both models while a function runs (parallel.py).
    """
    B, T = ids.shape
    with torch.no_grad():
        h_teacher = teacher.embed(ids, dtype)
    h_student = student.embed(ids, dtype)
    turns = teacher.cos_sin(T, h_teacher), student.cos_sin(T, h_student)
    scales = teacher.score_scale(T), student.score_scale(T)
    weight = teacher.config.n_kv_head / teacher.config.n_head if authors_heads else 1.0

    def step(l: int, h_teacher: Tensor, h_student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer of both: (teacher's h, student's h, mean KL [3])."""
        last = l + 1 == teacher.config.n_layer and not logit_weight
        with torch.no_grad():
            h_teacher, theirs = _layer(teacher.model.layers[l], h_teacher, turns[0], last)
        h_student, ours = _layer(student.model.layers[l], h_student, turns[1], last)
        parts = []
        for r, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            a_teacher, a = scales if r < 2 else (x.shape[-1] ** -0.5,) * 2
            parts.append(relation_kl(x, y, scale=a, teacher_scale=a_teacher, impl=impl).mean())
        return h_teacher, h_student, torch.stack(parts)

    all_parts = []
    for l in range(teacher.config.n_layer):
        run = step
        if checkpointing and torch.is_grad_enabled():
            run = functools.partial(recompute, step, use_reentrant=False)
        if units:
            run = functools.partial(units[l], run)
        h_teacher, h_student, parts = run(l, h_teacher, h_student)
        all_parts.append(parts)
    table = torch.stack(all_parts)  # [L, 3]
    weights = torch.tensor([1.0, weight, weight], device=table.device, dtype=table.dtype)
    loss = (table * weights).sum(-1).mean()
    if logit_weight:
        loss = loss + logit_weight * logit_kl(teacher, student, h_teacher, h_student)
    return loss, table.detach()


def logit_kl(
    teacher: Llama, student: Llama, h_teacher: Tensor, h_student: Tensor, chunk: int = 4096
) -> Tensor:
    """Mean KL(teacher || student) in nats of the next-token distributions, h [B, T, C] being before the last norm.

    At most [chunk, V] logits of each exist at once.
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = teacher.lm_head(teacher.model.norm(y)).float().log_softmax(-1)
        log_p = student.lm_head(student.model.norm(x)).float().log_softmax(-1)
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)  # [<= chunk]

    return by_chunks(part, chunk, h_student.flatten(0, 1), h_teacher.flatten(0, 1)).mean()


def _layer(
    layer: nn.Module, h: Tensor, turn: tuple[Tensor, Tensor], last: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if last:
        return h, layer.self_attn.qkv(layer.input_layernorm(h), turn)
    return type(layer).forward(
        layer, h, turn
    )  # not layer(...): a sharded layer's unit is already gathered


def objective(run: Run, stage: planning.Stage, checkpointing: bool):
    """The stage's loss as a function of ids [B, T + 1] -> (loss, parts [L, 3] or None)."""
    fixed = {"impl": run.args.impl, "checkpointing": checkpointing, "units": run.units}

    def relation(ids: torch.Tensor):
        weight = run.args.logit_weight
        return relation_loss(
            run.teacher, run.student, ids[:, :-1], run.dtype, logit_weight=weight, **fixed
        )

    def next_token(ids: torch.Tensor):
        h = run.student.hidden(ids[:, :-1], run.dtype, checkpointing)
        return next_token_loss(run.student, h, ids[:, 1:]), None

    return {"relation": relation, "next token": next_token}[stage.objective]


def backward(
    run: Run, ids: torch.Tensor, first: int, micro: int, loss_of, reducer: parallel.Reducer
):
    """Gradients of the global batch from this rank's ids [B, T + 1], whose first block is number `first` of the stage.

    Returns means over all ranks' blocks, (loss, parts [L, 3] or None), and whether to stop and whether to save, on
    which all ranks must agree.
    """
    loss, parts, done = torch.zeros((), device=run.device), None, 0
    for piece in ids.split(micro):
        resume.reseed(run.args.seed, run.total, first + done)
        done += len(piece)
        reducer.last = done == len(ids)
        share = len(piece) / len(ids)
        value, table = loss_of(piece)
        (value * share).backward()
        loss += value.detach() * share
        if table is not None:
            parts = table * share + (0 if parts is None else parts)
    reducer.finish()
    late = run.world.main and time.time() - run.saved > 60 * run.args.save_minutes
    said = torch.tensor(
        [float(bool(run.stop)), float(late)], device=run.device, dtype=torch.float64
    )
    figures = [loss.view(1), *([] if parts is None else [parts.flatten()])]
    means = run.world.mean(torch.cat([said, *(f.double() for f in figures)])).cpu()
    shape = None if parts is None else means[3:].view(parts.shape)
    return float(means[2]), shape, bool(means[0]), bool(means[1])


def train_stage(run: Run, number: int, first: int) -> torch.optim.Optimizer:
    """Steps `first` .. of stage `number` of the plan: one line of metrics a step, the state every so often."""
    args, stage, own, world = run.args, run.plan[number], run.own[number], run.world
    micro, checkpointing, _ = run.settled[number]
    loss_of = objective(run, stage, checkpointing)
    optimiser = torch.optim.AdamW(
        run.weights.values(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    if first:
        resume.load(resume.latest(args.out / "state"), run.weights, optimiser, first)
    reducer = parallel.Reducer(run.weights.values(), world)
    if world.main:
        run.watch.begin(number, first)
    for step in range(first, stage.steps):
        began = time.time()
        start = step * stage.batch + world.rank * own
        seed = args.seed + 7919 * number
        ids = run.corpus.batch(seed, start, own, stage.T)
        ids = (run.mixer.mix(ids, seed, start, args.lookups) if run.mixer else ids).to(run.device)
        try:
            loss, parts, stop, late = backward(run, ids, start, micro, loss_of, reducer)
            norm = parallel.whole(
                torch.nn.utils.get_total_norm([p.grad for p in run.weights.values()])
            )
            watch.refuse_non_finite(
                world, stage, step, loss, float(norm), parts, run.weights, run.student, ids
            )
            torch.nn.utils.clip_grads_with_norm_(run.weights.values(), 1.0, norm)
            for group in optimiser.param_groups:
                group["lr"] = planning.learning_rate(stage, step)
            optimiser.step()
        except torch.OutOfMemoryError:
            raise planning.OutOfMemory(stage, run.device) from None
        optimiser.zero_grad(set_to_none=True)
        if world.main:
            rate, gib = optimiser.param_groups[0]["lr"], watch.peak_memory(run.device)
            run.watch.step(
                run.total, step, loss, float(norm), rate, time.time() - began, gib, parts
            )
        run.total += 1
        if stop or late:
            run.save(number, step + 1, optimiser)
        if stop:
            print(
                f"\nstopped after step {step + 1} of {stage.name}; the same command with --resume goes on from here"
            )
            world.leave(resume.STOPPED)
    reducer.close()
    if world.main:
        run.watch.end()
    return optimiser


def export(run: Run) -> None:
    """The table, the adapter, and the Hugging Face directory, which is read back before it counts."""
    args, columns = run.args, run.columns
    with files.disk_sentences(args.out):
        shares = report.recovered(columns, "loss at 1x") if args.eval_blocks else {}
        text = report.write(args.out, columns, shares, run.about) if args.eval_blocks else ""
        stored = checkpoint.stored_dtype(args.teacher)
        if args.lora_rank:
            lora.save_adapter(run.student, args.out / "adapter", str(args.teacher), TRAINED)
        student = lora.merge(run.student)
        old, new = run.teacher_config.rope, run.student_config.rope
        card = model_card(
            args.teacher.name,
            before=str(old),
            after=str(new),
            kind=new.kind,
            length=new.length,
            stages=[dataclasses.asdict(stage) for stage in run.plan],
            scores=text,
            arguments=resume.matters(args),
        )
        at = args.out / "student"
        keep = {"frozen_from": args.teacher, "trained": TRAINED}
        checkpoint.save_pretrained(
            student, at, tokenizer_from=args.teacher, dtype=stored, card=card, **keep
        )
    print(f"\n{text}\n\nexported to {at} ({run.long:,} tokens of context); next:")
    print(f"  python eval.py --model {at} --against {args.teacher}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    world = parallel.World(args.device)

    # ---------------------------------------------------------------- plan: nothing heavy yet, and nothing written
    run = Run(args, world)
    say_plan(run)
    state = world.on_main(resume.claim_out, args)
    if args.dry_run:
        return world.leave(0)

    # ---------------------------------------------------------------- text and models
    load_text(run)
    load_models(run)
    if state:
        run.columns, run.total = state["columns"], state["total"]
        resume.load(state["from"], run.weights, None, 0)
    run.stop, run.saved = resume.StopRequest(), time.time()
    with files.disk_sentences(args.out):
        world.on_main(open_out, run)

        # ------------------------------------------------------------ the stages
        if not state:
            run.measure(report.TEACHER, run.teacher)
            run.measure(report.UNTRAINED, run.student)
        for number in range(state["stage"] if state else 0, len(run.plan)):
            optimiser = train_stage(
                run, number, state["step"] if state and number == state["stage"] else 0
            )
            run.measure(run.plan[number].name, run.student)
            run.save(number + 1, 0, optimiser)

    # ---------------------------------------------------------------- export and report
    if args.shard:
        parallel.unshard(run.student, world)
    world.on_main(export, run)
    if world.main:
        run.watch.close()
    run.stop.close()
    world.leave(0)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        if os.environ.get("RANK", "0") == "0" or isinstance(
            e, planning.OutOfMemory
        ):  # which one rank may meet alone
            print(f"train.py: {e}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun ends all when one has ended: rank 0 speaks first
        os._exit(2)  # not sys.exit, which would wait for ranks that are still at work
