"""What was kept and what was gained: one model, or a student against its teacher.

    python eval.py --model out/demo/student --against demo/teacher
    python eval.py --model DIR --tasks piqa.jsonl.gz arc_easy --task-dir DATA --limit 200
    python eval.py --model DIR --against DIR --ruler --lengths 4096 32768 --ruler-data DATA --samples 100 --out DIR
    python eval.py --model DIR --against DIR --passkey --ppl --positions --layers --out DIR

Held-out text.  Long blocks of s times the native length are read twice: whole (loss at s x) and cut into native
blocks (loss at 1 x), so that both figures are of the same words. Loss is the mean over tokens, in nats; perplexity its
exponential; accuracy the share of tokens that are the most likely one.

Recall.  Look-up documents (recall.py) of 1, 2, 4 and 8 times the native length, values set in the first eighth and
asked for in the last; right means that the most likely token is the value.

Tasks.  LAMBADA and multiple choice by the rules of lm-evaluation-harness: tasks.py.

Long text.  Sliding-window perplexity, loss by position, passkey and RULER: longtext.py, ruler.py.

Layers.  Where the relations of teacher and student differ: diagnose.py.

Given --against, a third column is made: the teacher's weights under the student's positions, "untrained". With it, the
share of the lost loss recovered, and each task's retention with its confidence interval (report.py).

What comes out.  The table on standard output; with --out report.json, report.md and report.png, and, as asked for,
passkey.png, positions.png and layers.png. `facts` in the JSON says of every figure which version of the task it is of,
how many items, the seed, the dtype, the standard error and the command. Same arguments, same machine: same figures.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine import data, flags
from engine.lookups import PAIRS, Lookups
from evals import layers as diagnose
from evals import longtext, report, ruler, tasks
from hub.tokenizer import Tokenizer, load_tokenizer
from model import Llama, compute_dtype, make_student, next_token_loss

DOCUMENTS = 8  # look-up documents a length, with 8 questions each


@torch.no_grad()
def text_loss(
    model: Llama, blocks: Tensor, dtype: torch.dtype, tokens: int = 8192
) -> tuple[float, float]:
    """(mean loss in nats, share of tokens predicted right) of blocks [n, T + 1], `tokens` at a time."""
    device = model.device
    rows = max(1, tokens // (blocks.shape[1] - 1))
    losses, right = [], []
    for part in blocks.split(rows):
        h = model.hidden(part[:, :-1].to(device), dtype)
        targets = part[:, 1:].to(device)
        losses.append(next_token_loss(model, h, targets, reduction="none").flatten())
        for x, y in zip(h.flatten(0, 1).split(4096), targets.flatten().split(4096), strict=True):
            right.append(model.lm_head(x).argmax(-1) == y)
    return torch.cat(losses).mean().item(), torch.cat(right).float().mean().item()


@torch.no_grad()
def recall(model: Llama, lookups: Lookups, T: int, dtype: torch.dtype, seed: int = 0) -> float:
    """The share of questions answered right in DOCUMENTS look-up documents of T tokens."""
    device = model.device
    rng, right = np.random.default_rng([seed, T]), []
    for _ in range(DOCUMENTS):
        ids, where = lookups.document(rng, T, "far")
        h = model.hidden(torch.from_numpy(ids[None, :-1]).to(device), dtype)
        best = model.lm_head(h[0, torch.from_numpy(where).to(device)]).argmax(-1).cpu().numpy()
        right.extend(best == ids[where + 1])
    return float(np.mean(right))


def measure(
    model: Llama,
    corpus: data.Corpus,
    lookups: Lookups | None,
    native: int,
    scale: float,
    blocks: int,
    seed: int = 0,
) -> dict:
    """One column of the table. `native` tokens is 1 x; `blocks` long blocks of scale x native tokens are read."""
    dtype = compute_dtype(model.device)
    long = round(native * scale)
    whole = corpus.held_out_blocks(long, blocks)
    short = torch.stack(
        [b[i : i + native + 1] for b in whole for i in range(0, long - native + 1, native)]
    )
    near, accuracy = text_loss(model, short, dtype)
    far, _ = text_loss(model, whole, dtype)
    out = {"loss at 1x": near, "perplexity at 1x": float(np.exp(min(near, 50)))}
    out |= {f"loss at {scale:g}x": far, f"perplexity at {scale:g}x": float(np.exp(min(far, 50)))}
    out["next-token accuracy"] = accuracy
    for times in (1, 2, 4, 8) if lookups else ():
        if times <= scale:
            out[f"recall at {times}x"] = recall(model, lookups, times * native, dtype, seed)
    return out


def make_lookups(
    tokenizer: Tokenizer, corpus: data.Corpus, native: int, longest: int
) -> Lookups | None:
    """None, with the reason said, where words, filler text or room in `native` tokens are too few."""
    try:
        lookups = Lookups(
            tokenizer, corpus.held_out if len(corpus.held_out) > longest + 1 else corpus.train
        )
        for T in (native, longest):
            lookups.document(np.random.default_rng(0), T, "far")
        return lookups
    except ValueError as e:
        print(f"recall is left out: {e}", file=sys.stderr)
        return None


class HeldOut:
    """The held-out text that a run is measured on, cut once; `blocks` is 0 where there is too little of it."""

    def __init__(self, corpus, tokenizer, native: int, scale: float, blocks: int):
        self.corpus, self.native, self.scale, self.blocks = corpus, native, scale, blocks
        long = round(native * scale)
        if blocks and long >= len(corpus.held_out):
            print(
                f"no table: the held-out text has {len(corpus.held_out):,} tokens, a block {long:,}; add --data"
            )
            self.blocks = 0
        self.lookups = make_lookups(tokenizer, corpus, native, long) if self.blocks else None

    def measure(self, model: Llama) -> dict[str, float]:
        """One column of the table."""
        return measure(model, self.corpus, self.lookups, self.native, self.scale, self.blocks)


def versions(device: torch.device) -> dict:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


def columns_of(args, device: torch.device) -> dict[str, Llama]:
    """The models to score, by column name."""
    kind = compute_dtype(device)
    student = Llama.from_pretrained(args.model, dtype=kind, device=str(device))
    if args.against is None:
        return {"model": student}
    teacher = Llama.from_pretrained(args.against, dtype=kind, device=str(device))
    rest = {
        "rope": student.config.rope,
        "window": student.config.window,
        "source": student.config.source,
    }
    if replace(teacher.config, **rest) != student.config:
        raise ValueError(
            f"--against {args.against} is another network than --model {args.model}: not its teacher"
        )
    untrained = make_student(teacher, student.config, trained=())
    return {report.TEACHER: teacher, report.UNTRAINED: untrained, "student": student}


def text_scores(
    scores: report.Scores, models: dict[str, Llama], corpus: data.Corpus, args, tokenizer: Tokenizer
):
    """The rows of `measure`, with what they are figures of."""
    long = round(args.native * args.scale)
    lookups = make_lookups(tokenizer, corpus, args.native, long)
    read = len(corpus.held_out_blocks(long, args.blocks))
    about = {
        "version": f"held-out text of {corpus.name}",
        "blocks": read,
        "tokens each": long,
        "seed": None,
    }
    for name, model in models.items():
        for row, value in measure(
            model, corpus, lookups, args.native, args.scale, args.blocks, args.seed
        ).items():
            if "recall" in row:
                scores.add(
                    name,
                    row,
                    value,
                    items=DOCUMENTS * PAIRS,
                    version="look-ups, far",
                    seed=args.seed,
                )
            else:
                scores.add(name, row, value, items=read * long, **about)


def find_tasks(words: list[str], folder: Path | None) -> tuple[list[Path], list[str]]:
    """(files, what is missing) of what was asked for: files, folders, names in tasks.DATASETS, or "all" of those."""
    files, lacking = [], []
    for word in words:
        path = Path(word)
        if path.is_file():
            files.append(path)
            continue
        if word not in tasks.DATASETS and word != "all" and not path.is_dir():
            known = f"neither a file, a folder, 'all', nor one of {', '.join(tasks.DATASETS)}"
            raise ValueError(f"--tasks {word} is {known}; a task is a .jsonl or .jsonl.gz file")
        place = path if path.is_dir() and word not in tasks.DATASETS else folder or Path(".")
        for name in [word] if word in tasks.DATASETS else tasks.DATASETS:
            here = [
                place / f"{n}{end}"
                for n in (name, *tasks.DATASETS[name].names)
                for end in (".jsonl", ".jsonl.gz")
            ]
            files += [file for file in here if file.is_file()][:1]
            if not any(file.is_file() for file in here):
                lacking.append(
                    f"{name}: expected as {here[0]} (or .gz); made by  {tasks.fetch(name)}"
                )
    return list(dict.fromkeys(files)), lacking


def task_scores(
    scores: report.Scores,
    models: dict[str, Llama],
    items: list[tasks.Task],
    args,
    tokenizer: Tokenizer,
):
    """Every task's figures, and their averages over tasks."""
    for task in items:
        for name, model in models.items():
            result = tasks.score(model, tokenizer, task, scores.dtype)
            for row, (value, error) in report.summary(result.values).items():
                values = result.values[row]
                scores.add(
                    name, row, value, error=error, values=values, version=task.version, seed=None
                )
            if args.out and args.predictions:
                _keep(args.out / "predictions" / f"{name}.{task.name}.jsonl", task, result)
    about = {"version": "mean over tasks", "items": sum(len(t.items) for t in items), "seed": None}
    for name in models:
        for row, value in report.averages(scores.columns[name]).items():
            scores.add(name, row, value, **about)


def _keep(file: Path, task: tasks.Task, result: tasks.Result) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    each = zip(task.items, result.predictions.tolist(), result.logps, strict=True)
    rows = [
        {"gold": item.gold, "prediction": p, "logps": logps.tolist()} for item, p, logps in each
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def long_scores(
    scores: report.Scores,
    models: dict[str, Llama],
    corpus: data.Corpus | None,
    able: list[tuple[int, str]],
    args,
    tokenizer: Tokenizer,
) -> dict:
    """Long-text rows, as asked for; returns the maps and curves, and draws them. able: of --ruler and --passkey."""
    more, longest = {}, max(args.lengths)
    if args.ppl:
        if args.documents:
            texts = longtext.documents(args.documents, tokenizer, longest, args.blocks)
            where = f"documents of {', '.join(map(str, args.documents))}"
        else:
            texts = list(corpus.held_out_blocks(longest, args.blocks).numpy())
            where = f"held-out text of {corpus.name}"
        version = f"sliding window (PI), {where}"
        longtext.sliding_scores(
            scores, models, tokenizer, texts, args.lengths, version=version, seed=None
        )
    if args.positions:
        blocks = corpus.held_out_blocks(longest, args.blocks)
        about = {"version": f"loss by position, held-out text of {corpus.name}", "seed": None}
        more["positions"] = longtext.position_scores(scores, models, blocks, args.native, **about)
        if args.out:
            longtext.draw_positions(args.out / "positions.png", more["positions"], args.native)
    if lengths := [length for length, task in able if task == "passkey"]:
        more["passkey"] = longtext.passkey_scores(
            scores, models, tokenizer, lengths, args.samples, args.ruler_seed
        )
        if args.out:
            longtext.draw_passkey(args.out / "passkey.png", more["passkey"])
    kept = args.out / "predictions" if args.out and args.predictions else None
    able = [(length, task) for length, task in able if task != "passkey"]
    longtext.ruler_scores(
        scores, models, tokenizer, able, args.samples, args.ruler_seed, args.ruler_data, kept
    )
    return more


def layer_scores(models: dict[str, Llama], corpus: data.Corpus, args) -> tuple[dict, str]:
    """(what goes into the JSON, the table) of --layers; layers.png is drawn."""
    long = round(args.native * args.scale)
    blocks = corpus.held_out_blocks(long, args.blocks)[:, :-1]
    teacher, before, after = models[report.TEACHER], models[report.UNTRAINED], models["student"]
    dtype = compute_dtype(torch.device(args.device))
    found = {
        name: diagnose.divergence(teacher, m, blocks, dtype)
        for name, m in (("before", before), ("after", after))
    }
    if args.out:
        diagnose.draw(args.out / "layers.png", found)
    lists = {
        name: [[[h for h in r if h == h] for r in layer] for layer in x.tolist()]
        for name, x in found.items()
    }
    about = {
        "tokens": long,
        "blocks": len(blocks),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": None,
    }
    about |= {"version": f"relation KL, held-out text of {corpus.name}", "command": args.command}
    return lists | about, diagnose.table(found)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, began = torch.device(args.device), time.time()
    check(args)

    # ---------------------------------------------------------------- everything that can be wrong, before any work
    files, lacking = find_tasks(args.tasks, args.task_dir)
    if lacking and not files:
        raise ValueError("none of the --tasks is there:\n  " + "\n  ".join(lacking))
    items = [tasks.load(file, args.limit) for file in files]
    models, tokenizer = columns_of(args, device), load_tokenizer(args.model)
    set_lengths(args, models)
    wanted = (args.ruler or list(ruler.RULER_TASKS)) if args.ruler is not None else []
    wanted += ["passkey"] * args.passkey
    able, unable = longtext.feasible(
        tokenizer, wanted, args.lengths, args.ruler_seed, args.ruler_data
    )
    corpus = None
    longest = [max(args.lengths)] * (args.positions or (args.ppl and not args.documents))
    longest += [round(args.native * args.scale)] * (not args.no_text or args.layers)
    if longest:
        corpus = data.load_corpus(args.data, tokenizer, args.cache)
        corpus.held_out_blocks(max(longest), 1)
    if lacking or unable:
        print("left out:\n  " + "\n  ".join(lacking + unable), file=sys.stderr)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- the figures
    scores = report.Scores({name: {} for name in models}, compute_dtype(device), args.command)
    if not args.no_text:
        text_scores(scores, models, corpus, args, tokenizer)
    task_scores(scores, models, items, args, tokenizer)
    more = long_scores(scores, models, corpus, able, args, tokenizer) | {
        "missing": lacking + unable
    }
    notes = _variants(scores)
    if args.layers:
        more["layers"], layers = layer_scores(models, corpus, args)
        notes.append(
            f"Relation KL in nats, mean over heads (worst head), {more['layers']['tokens']} tokens:\n\n{layers}"
        )

    # ---------------------------------------------------------------- the report
    against = len(models) == 3
    shares = report.recovered(scores.columns, "loss at 1x") if against and not args.no_text else {}
    # of tasks alone: beyond its length the teacher is no measure of what there was to keep
    judged = {
        row: x for row, x in scores.values.items() if not row.startswith(("RULER", "passkey"))
    }
    kept = report.retention(judged, args.seed) if against and judged else {}
    about = {"command": args.command, "seconds": round(time.time() - began, 1), **versions(device)}
    about |= {"seed": args.seed, "dtype": str(scores.dtype).removeprefix("torch.")}
    print(report.render(args.out, scores, shares, about, kept=kept, more=more, notes=notes))
    print(json.dumps(about))


def set_lengths(args, models: dict[str, Llama]) -> None:
    """The defaults of --native, --scale and --lengths, from the models."""
    args.native = args.native or next(iter(models.values())).config.rope.length
    args.scale = args.scale or max(m.config.rope.length for m in models.values()) / args.native
    doubled = (args.native * 2**k for k in range(64))
    args.lengths = sorted(
        set(args.lengths or [n for n in doubled if n <= max(1, args.scale) * args.native])
    )
    if args.ppl and args.lengths[0] < longtext.STRIDE:
        raise ValueError(
            f"--ppl needs windows of at least its stride, {longtext.STRIDE} tokens, and --lengths begins at "
            f"{args.lengths[0]}; name longer ones"
        )


def _variants(scores: report.Scores) -> list[str]:
    """One sentence a version that must be known to read a RULER figure."""
    found = {
        row.split(" at ")[0]: f["version"]
        for row, f in scores.facts.items()
        if row.startswith("RULER")
    }
    return [
        f"{row}: {version}." for row, version in found.items() if not row.startswith("RULER mean")
    ]


def check(args) -> None:
    """Wrong combinations, before any work."""
    if args.layers and args.against is None:
        raise ValueError(
            "--layers compares a student with its teacher; name the teacher with --against"
        )
    for name in args.ruler or ():
        if name not in ruler.TASKS or name == "passkey":
            raise ValueError(
                f"--ruler {name} is not one of {', '.join(t for t in ruler.TASKS if t != 'passkey')}"
            )
    for name, least in (("samples", 1), ("blocks", 1), ("limit", 1), ("native", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if args.scale is not None and not 1 <= args.scale < float("inf"):
        raise ValueError(f"--scale is {args.scale}; it must be at least 1")
    flags.check_device(args.device)
    if args.lengths and min(args.lengths) < 1:
        raise ValueError(
            f"--lengths {min(args.lengths)} is no number of tokens; it must be at least 1"
        )
    if (
        args.no_text
        and not (args.tasks or args.ppl or args.positions or args.passkey or args.layers)
        and (args.ruler is None)
    ):
        raise ValueError(
            "--no-text leaves nothing to do; ask for --tasks, --ruler, --passkey, --ppl or --layers"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", type=Path, required=True, help="the directory to score")
    p.add_argument(
        "--against", type=Path, help="its teacher: adds the columns teacher and untrained"
    )
    p.add_argument("--out", type=Path, help="folder for report.json, report.md and the pictures")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0, help="of look-ups and confidence intervals")
    p.add_argument(
        "--predictions", action="store_true", help="also write every item's scores, under --out"
    )
    g = p.add_argument_group("held-out text")
    g.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="text (default: the standard library's sources)",
    )
    g.add_argument("--no-text", action="store_true", help="leave the held-out text out")
    g.add_argument(
        "--native", type=int, help="tokens that count as 1x (default: the teacher's length)"
    )
    g.add_argument(
        "--scale",
        type=float,
        help="the longest blocks, in native lengths (default: the student's length)",
    )
    g.add_argument("--blocks", type=int, default=8, help="long blocks or documents to read")
    g.add_argument(
        "--cache", type=Path, default=Path("out/cache"), help="folder for tokenised text"
    )
    g = p.add_argument_group("short text")
    g.add_argument(
        "--tasks", nargs="+", default=[], help="task files, folders of them, names, or all"
    )
    g.add_argument("--task-dir", type=Path, help="the folder in which named tasks lie")
    g.add_argument("--limit", type=int, help="at most this many items a task")
    g = p.add_argument_group("long text")
    g.add_argument(
        "--lengths", type=int, nargs="+", help="tokens (default: 1, 2, 4, ... native lengths)"
    )
    g.add_argument("--ppl", action="store_true", help="sliding-window perplexity at each length")
    g.add_argument(
        "--documents",
        type=Path,
        nargs="+",
        default=[],
        help="long texts for --ppl (default: held-out text)",
    )
    g.add_argument("--positions", action="store_true", help="loss as a function of position")
    g.add_argument("--passkey", action="store_true", help="passkey by depth and length")
    g.add_argument("--ruler", nargs="*", metavar="TASK", help="RULER, or some of its tasks")
    g.add_argument(
        "--ruler-data", type=Path, help="folder with RULER's word lists, essays and QA sets"
    )
    g.add_argument(
        "--ruler-seed", type=int, default=42, help="of RULER's and passkey's prompts (RULER: 42)"
    )
    g.add_argument(
        "--samples",
        type=int,
        default=32,
        help="prompts a task and length (RULER: 500, PI's passkey: 320)",
    )
    g = p.add_argument_group("diagnosis")
    g.add_argument("--layers", action="store_true", help="relation KL by layer, relation and head")
    args = p.parse_args(argv)
    args.command = shlex.join(["python", "eval.py", *(sys.argv[1:] if argv is None else argv)])
    return args


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        sys.exit(2)
