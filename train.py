"""Extends a LLaMA's context: interpolate the positions, repair by self-distillation, then a short pre-training.

    python train.py --teacher DIR --scale 8          both stages, then an export that loads everywhere
    python train.py                                  the same on the teacher and text that are at hand offline

It reads top to bottom: arguments, plan, models, stages, export. Stage 1 reproduces the frozen teacher's Q/Q, K/K and
V/V relations at the native length (distill.py); stage 2 predicts the next token at the extended length. Both train the
q, k and v projections alone, in float32 copies under bf16 compute on a GPU, in float32 on a CPU.

--out DIR gets metrics.jsonl (a line a step), run.json (arguments, versions, seed), state/ (to --resume from),
report.json, .md and .png (what was lost and what came back) and student/, the Hugging Face directory to use.

Exit codes: 0 done; 2 wrong input, nothing was changed; 3 stopped by Ctrl-C or SIGTERM, state saved.
"""

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import distill
import eval as evaluation
import lora
import plan as planning
import report
import resume
from model import Llama, LlamaConfig, next_token_loss
from rope import STUDENT_KINDS
from tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
# Flags that stand for a whole recipe, applied before the defaults of the parser
PRESETS = {
    "demo": {"tokens1": 200_000, "tokens2": 180_000, "batch1": 4, "batch2": 1},
    "default": {"tokens1": 2_100_000, "tokens2": 2_100_000, "lora_dropout": 0.0},
    # The paper's own: adapters, 144 steps of 4 x 4096 tokens
    "authors": {
        "lora_rank": 1024,
        "lora_alpha": 2048.0,
        "lora_dropout": 0.05,
        "lr1": 2e-5,
        "length1": 4096,
        "batch1": 4,
        "tokens1": 144 * 4 * 4096,
    },
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what")
    what.add_argument("--teacher", type=Path, help="Hugging Face directory of a LLaMA (default: the demo's)")
    what.add_argument("--scale", type=number, default=8.0, help="how many times the context, above 1 (default: 8)")
    what.add_argument("--rope", choices=STUDENT_KINDS, default="linear", help="how the positions are stretched")
    what.add_argument("--data", type=Path, nargs="+", default=[], help="text files or folders (default: Python's own)")
    what.add_argument("--out", type=Path, help="folder for the result (default: out/NAME-xSCALE)")
    what.add_argument("--stage", choices=("1", "2", "both"), default="both")
    how = p.add_argument_group("how (defaults are printed with the plan)")
    for n, name in ((1, "stage 1"), (2, "stage 2")):
        how.add_argument(f"--tokens{n}", type=int, help=f"tokens that {name} reads")
        how.add_argument(f"--length{n}", type=int, help=f"tokens a block of {name}")
        how.add_argument(f"--batch{n}", type=int, help=f"blocks a step of {name}")
        how.add_argument(f"--lr{n}", type=float, help=f"peak learning rate of {name}")
    how.add_argument("--lora-rank", type=int, help="train adapters of this rank instead of full projections")
    how.add_argument("--lora-alpha", type=float, help="their weight is alpha / rank (default: twice the rank)")
    how.add_argument("--lora-dropout", type=float, help="on the adapters' input (default: 0)")
    how.add_argument("--preset", choices=("authors",), help="authors: the paper's adapters and stage 1")
    how.add_argument("--micro", type=int, help="blocks at a time (default: as many as fill 8192 tokens)")
    how.add_argument(
        "--impl", choices=("auto", "dense", "tiled", "triton"), default="auto", help="of the relation loss"
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--eval-blocks", type=int, default=8, help="long held-out blocks for the table; 0: no table")
    run = p.add_argument_group("running")
    run.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    run.add_argument("--save-minutes", type=float, default=10, help="write the state at least this often")
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--cache", type=Path, default=Path("out/cache"), help="folder for tokenised text")
    args = p.parse_args(argv)
    for preset in (args.preset, None if args.teacher else "demo", "default"):
        for key, value in PRESETS.get(preset, {}).items():
            if getattr(args, key) is None:
                setattr(args, key, value)
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    args.out = args.out or Path("out") / (f"{args.teacher.name}-x{args.scale:g}" if args.teacher else "demo")
    args.teacher = args.teacher or HERE / "demo" / "teacher"
    for key in ("tokens1", "tokens2", "length1", "length2", "batch1", "batch2", "lr1", "lr2", "micro", "lora_rank"):
        if getattr(args, key) is not None and not getattr(args, key) > 0:
            raise ValueError(f"--{key} is {getattr(args, key)}; it must be above 0")
    return args


def number(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 1):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 1, such as 8")
    return value


def matters(args: argparse.Namespace) -> dict:
    """The arguments that decide the result: a resumed run must have the same."""
    keys = ["scale", "rope", "stage", "seed", "lora_rank", "lora_alpha", "lora_dropout"]
    keys += [f"{key}{n}" for key in ("tokens", "length", "batch", "lr") for n in (1, 2)]
    paths = {"teacher": str(args.teacher.resolve()), "data": [str(p.resolve()) for p in args.data]}
    return {k: getattr(args, k) for k in keys} | paths


def claim_out(args: argparse.Namespace) -> dict | None:
    """Refuses an --out that holds another run; returns the state to resume from, if asked for and there."""
    found = resume.latest(args.out / "state")
    if args.resume and found:
        info = resume.load_info(found)
        resume.same_run(info["arguments"], matters(args))
        return info | {"from": found}
    if (args.out / "run.json").exists() and not args.resume:
        raise ValueError(f"--out {args.out} holds another run; add --resume to go on with it, or name another --out")
    return None


def objective(stage: planning.Stage, teacher: Llama, student: Llama, args, checkpointing: bool):
    """The stage's loss as a function of ids [B, T + 1] -> (loss, parts [L, 3] or None)."""
    dtype = evaluation.compute_dtype(torch.device(args.device))

    def relation(ids: torch.Tensor):
        return distill.relation_loss(teacher, student, ids[:, :-1], dtype, impl=args.impl, checkpointing=checkpointing)

    def next_token(ids: torch.Tensor):
        h = student.hidden(ids[:, :-1], dtype, checkpointing)
        return next_token_loss(student, h, ids[:, 1:]), None

    return {"relation": relation, "next token": next_token}[stage.objective]


def peak_memory(device: torch.device) -> float:
    """GiB: what the GPU's allocator held at most, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Run:
    """One run's fixed parts and its progress: what `train_stage` needs and what a state holds."""

    def __init__(self, args, corpus, teacher, student, plan):
        self.args, self.corpus, self.teacher, self.student, self.plan = args, corpus, teacher, student, plan
        self.weights = distill.trainable(student)
        self.device = torch.device(args.device)
        self.columns: dict[str, dict[str, float]] = {}
        self.total = 0  # steps over all stages
        self.saved = time.time()
        self.stop = resume.StopRequest()

    def save(self, stage: int, step: int, optimiser) -> None:
        info = {
            "total": self.total,
            "stage": stage,
            "step": step,
            "columns": self.columns,
            "arguments": matters(self.args),
        }
        try:
            resume.save(self.args.out / "state", self.weights, optimiser, info)
        except OSError as e:
            raise ValueError(resume.disk_sentence(e, self.args.out / "state")) from None
        self.saved = time.time()


def train_stage(run: Run, number: int, first: int, log) -> None:
    """Steps `first` .. of stage `number` of the plan: one line of metrics a step, the state every so often."""
    args, stage = run.args, run.plan[number]
    free = planning.free_memory(run.device)
    micro = min(args.micro or max(1, 8192 // stage.T), stage.batch)
    trained = sum(p.numel() for p in run.weights.values())
    dtype = evaluation.compute_dtype(run.device)
    checkpointing = planning.needs_checkpointing(run.teacher.config, stage, dtype, micro, trained, free)
    loss_of = objective(stage, run.teacher, run.student, args, checkpointing)
    optimiser = torch.optim.AdamW(run.weights.values(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if first:
        resume.load(resume.latest(args.out / "state"), run.weights, optimiser, first)
    bar = tqdm(
        range(first, stage.steps), desc=stage.name, initial=first, total=stage.steps, unit=" steps", disable=None
    )
    for step in bar:
        began = time.time()
        ids = run.corpus.batch(args.seed + 7919 * number, step * stage.batch, stage.batch, stage.T).to(run.device)
        resume.reseed(args.seed, run.total, 0)
        losses, parts = [], None
        for part in ids.split(micro):
            loss, table = loss_of(part)
            (loss * (len(part) / len(ids))).backward()
            losses.append(loss.detach() * (len(part) / len(ids)))
            if table is not None:
                parts = table * (len(part) / len(ids)) + (0 if parts is None else parts)
        norm = torch.nn.utils.clip_grad_norm_(run.weights.values(), 1.0)  # the norm before clipping
        refuse_non_finite(run, stage, step, sum(losses), norm, parts)
        for group in optimiser.param_groups:
            group["lr"] = planning.learning_rate(stage, step)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        row = {
            "total": run.total,
            "stage": stage.name,
            "step": step,
            "loss": float(sum(losses)),
            "grad_norm": float(norm),
        }
        row |= {"lr": optimiser.param_groups[0]["lr"], "seconds": round(time.time() - began, 4)}
        row |= {"tokens_per_second": round(ids[:, 1:].numel() / (time.time() - began)), "gib": peak_memory(run.device)}
        if parts is not None:
            row["relations"] = dict(zip(distill.RELATIONS, parts.mean(0).tolist(), strict=True))
            row["layers"] = parts.sum(-1).tolist()
        print(json.dumps(row), file=log, flush=True)
        say(bar, row, stage)
        run.total += 1
        if run.stop or time.time() - run.saved > 60 * args.save_minutes:
            run.save(number, step + 1, optimiser)
        if run.stop:
            bar.close()
            print(f"stopped after step {step + 1} of {stage.name}; the same command with --resume goes on from here")
            sys.exit(resume.STOPPED)
    bar.close()
    run.last = optimiser


def refuse_non_finite(run: Run, stage, step: int, loss, norm, parts) -> None:
    if torch.isfinite(norm) and math.isfinite(float(loss)):
        return
    layer = (
        ""
        if parts is None or torch.isfinite(parts).all()
        else f", layer {int((~torch.isfinite(parts)).any(1).nonzero()[0])}"
    )
    raise ValueError(
        f"{stage.name}, step {step}{layer}: loss {float(loss)}, gradient norm {float(norm)}, on blocks "
        f"{step * stage.batch}..{(step + 1) * stage.batch - 1}; lower --lr1 / --lr2. The last saved state is kept"
    )


def say(bar, row: dict, stage) -> None:
    """The bar's figures on a terminal; about twenty plain lines a stage where there is none."""
    text = f"loss {row['loss']:.4f}, norm {row['grad_norm']:.2f}, lr {row['lr']:.2g}"
    text += f", {row['tokens_per_second']:,} tokens/s, {row['gib']:.1f} GiB"
    bar.set_postfix_str(text)
    last = row["step"] + 1 == stage.steps
    if bar.disable and (last or row["step"] % max(1, stage.steps // 20) == 0):
        print(f"{stage.name} step {row['step'] + 1}/{stage.steps}: {text}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    dtype = evaluation.compute_dtype(device)

    # ---------------------------------------------------------------- plan: nothing heavy yet, and nothing written
    teacher_config = LlamaConfig.from_hf(checkpoint.read_json(args.teacher / "config.json"))
    student_config = teacher_config.extended(args.rope, args.scale)
    plan = planning.stages(args, teacher_config, student_config.rope.length)
    tokenizer = load_tokenizer(args.teacher)
    if tokenizer.size > teacher_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} ids, config.json's vocab_size is {teacher_config.vocab_size}"
        )
    checkpoint.find_tensors(args.teacher)
    trained = planning.trained_parameters(teacher_config, args.lora_rank)
    free, parts = planning.free_memory(device), []
    for stage in plan:
        micro = min(args.micro or max(1, 8192 // stage.T), stage.batch)
        need = planning.needs_checkpointing(teacher_config, stage, dtype, micro, trained, free)
        parts.append(planning.memory(teacher_config, stage, dtype, micro, need, trained))
    print(planning.describe(teacher_config, student_config, plan, parts, trained), flush=True)
    for stage, part in zip(plan, parts, strict=True):
        planning.refuse_if_too_large(part, free, stage)
    state = claim_out(args)
    if args.dry_run:
        return

    # ---------------------------------------------------------------- text and models
    corpus = data.load_corpus(args.data, tokenizer, args.cache)
    for stage in plan:
        corpus.blocks(stage.T)
    teacher = Llama.from_pretrained(args.teacher, dtype=dtype, device=args.device)
    student = distill.make_student(teacher, student_config, trained=() if args.lora_rank else distill.TRAINED)
    if args.lora_rank:
        torch.manual_seed(args.seed)
        lora.adapt(student, distill.TRAINED, args.lora_rank, args.lora_alpha, args.lora_dropout)
    native = teacher_config.rope.length
    if args.eval_blocks:
        corpus.held_out_blocks(round(native * args.scale), args.eval_blocks)
    lookups = (
        evaluation.make_lookups(tokenizer, corpus, native, round(native * args.scale)) if args.eval_blocks else None
    )
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "arguments": matters(args),
        "versions": evaluation.versions(device),
        "text": corpus.name,
        "command": sys.argv,
    }
    checkpoint.write_atomic(args.out / "run.json", json.dumps(about, indent=1) + "\n")
    run = Run(args, corpus, teacher, student, plan)

    def measure(name: str, model: Llama) -> None:
        if args.eval_blocks and name not in run.columns:
            run.columns[name] = evaluation.measure(model, corpus, lookups, native, args.scale, args.eval_blocks)

    # ---------------------------------------------------------------- the stages
    if state:
        run.columns, run.total = state["columns"], state["total"]
        resume.load(state["from"], run.weights, None, 0)
    resume.cut_log(args.out / "metrics.jsonl", run.total)
    if not state:
        measure(report.TEACHER, teacher)
        measure(report.UNTRAINED, student)
    with (args.out / "metrics.jsonl").open("a") as log:
        for number in range(state["stage"] if state else 0, len(plan)):
            train_stage(run, number, state["step"] if state and number == state["stage"] else 0, log)
            measure(plan[number].name, student)
            run.save(number + 1, 0, run.last)

    # ---------------------------------------------------------------- export and report
    shares = report.recovered(run.columns, "loss at 1x") if args.eval_blocks else {}
    text = report.write(args.out, run.columns, shares, about) if args.eval_blocks else ""
    stored = checkpoint.stored_dtype(args.teacher)
    if args.lora_rank:
        lora.save_adapter(student, args.out / "adapter", str(args.teacher), distill.TRAINED)
    checkpoint.save_pretrained(lora.merge(student), args.out / "student", tokenizer_from=args.teacher, dtype=stored)
    print(f"\n{text}\n\nexported to {args.out / 'student'} ({student_config.rope.length:,} tokens of context); next:")
    print(f"  python eval.py --model {args.out / 'student'} --against {args.teacher}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
