"""What was kept and what was gained: one model, or a student against its teacher.

    python eval.py --model out/demo/student --against demo/teacher
    python eval.py --model DIR --tasks lambada_openai.jsonl.gz piqa.jsonl.gz --limit 200

Held-out text.  Long blocks of s times the native length are read twice: whole (loss at s x) and cut into native
blocks (loss at 1 x), so that both figures are of the same words. Loss is the mean over tokens, in nats; perplexity its
exponential; accuracy the share of tokens that are the most likely one.

Recall.  Look-up documents (recall.py) of 1, 2, 4 and 8 times the native length, values set in the first eighth and
asked for in the last; right means that the most likely token is the value.

Tasks.  LAMBADA and multiple choice by the rules of lm-evaluation-harness: tasks.py.

Given --against, a third column is made: the teacher's weights under the student's positions, "untrained". With it, the
share of the lost loss recovered (report.py).
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import report
import tasks
from distill import make_student
from model import Llama, next_token_loss
from recall import Lookups
from tokenizer import Tokenizer, load_tokenizer

DOCUMENTS = 8  # look-up documents a length, with 8 questions each


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def text_loss(model: Llama, blocks: Tensor, dtype: torch.dtype, tokens: int = 8192) -> tuple[float, float]:
    """(mean loss in nats, share of tokens predicted right) of blocks [n, T + 1], `tokens` at a time."""
    device = model.model.embed_tokens.weight.device
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
    device = model.model.embed_tokens.weight.device
    rng, right = np.random.default_rng([seed, T]), []
    for _ in range(DOCUMENTS):
        ids, where = lookups.document(rng, T, "far")
        h = model.hidden(torch.from_numpy(ids[None, :-1]).to(device), dtype)
        best = model.lm_head(h[0, torch.from_numpy(where).to(device)]).argmax(-1).cpu().numpy()
        right.extend(best == ids[where + 1])
    return float(np.mean(right))


def measure(model: Llama, corpus: data.Corpus, lookups: Lookups | None, native: int, scale: float, blocks: int) -> dict:
    """One column of the table. `native` tokens is 1 x; `blocks` long blocks of scale x native tokens are read."""
    dtype = compute_dtype(model.model.embed_tokens.weight.device)
    long = round(native * scale)
    whole = corpus.held_out_blocks(long, blocks)
    short = torch.stack([b[i : i + native + 1] for b in whole for i in range(0, long - native + 1, native)])
    near, accuracy = text_loss(model, short, dtype)
    far, _ = text_loss(model, whole, dtype)
    out = {"loss at 1x": near, "perplexity at 1x": float(np.exp(min(near, 50)))}
    out |= {f"loss at {scale:g}x": far, f"perplexity at {scale:g}x": float(np.exp(min(far, 50)))}
    out["next-token accuracy"] = accuracy
    for times in (1, 2, 4, 8) if lookups else ():
        if times <= scale:
            out[f"recall at {times}x"] = recall(model, lookups, times * native, dtype)
    return out


def make_lookups(tokenizer: Tokenizer, corpus: data.Corpus, native: int, longest: int) -> Lookups | None:
    """None, with the reason said, where words, filler text or room in `native` tokens are too few."""
    try:
        lookups = Lookups(tokenizer, corpus.held_out if len(corpus.held_out) > longest + 1 else corpus.train)
        for T in (native, longest):
            lookups.document(np.random.default_rng(0), T, "far")
        return lookups
    except ValueError as e:
        print(f"recall is left out: {e}", file=sys.stderr)
        return None


def versions(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
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
    if teacher.config.width != student.config.width or teacher.config.n_layer != student.config.n_layer:
        raise ValueError(f"--against {args.against} has another shape than --model {args.model}: not its teacher")
    untrained = make_student(teacher, student.config, trained=())
    return {report.TEACHER: teacher, report.UNTRAINED: untrained, "student": student}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    began = time.time()
    models = columns_of(args, device)
    tokenizer = load_tokenizer(args.model)
    items = {file.name.split(".")[0]: tasks.load(file, args.limit) for file in args.tasks}
    first = next(iter(models.values())).config.rope
    native = args.native or first.length
    scale = args.scale or max(m.config.rope.length for m in models.values()) / native
    columns: dict[str, dict[str, float]] = {name: {} for name in models}
    if not args.no_text:
        corpus = data.load_corpus(args.data, tokenizer, args.cache)
        lookups = make_lookups(tokenizer, corpus, native, round(native * scale))
        for name, model in models.items():
            columns[name] |= measure(model, corpus, lookups, native, scale, args.blocks)
    for task, examples in items.items():
        for name, model in models.items():
            columns[name] |= tasks.score(model, tokenizer, task, examples, compute_dtype(device))
    shares = report.recovered(columns, "loss at 1x") if len(models) == 3 and not args.no_text else {}
    about = {"command": " ".join(sys.argv), "seconds": round(time.time() - began, 1), **versions(device)}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        print(report.write(args.out, columns, shares, about))
    else:
        print(report.table(columns, shares))
    print(json.dumps(about))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="the directory to score")
    p.add_argument("--against", type=Path, help="its teacher: adds the columns teacher and untrained")
    p.add_argument("--tasks", type=Path, nargs="+", default=[], help="task files, .jsonl or .jsonl.gz")
    p.add_argument("--limit", type=int, help="at most this many items a task")
    p.add_argument("--data", type=Path, nargs="+", default=[], help="text (default: the standard library's sources)")
    p.add_argument("--no-text", action="store_true", help="tasks only")
    p.add_argument("--native", type=int, help="tokens that count as 1x (default: the teacher's length)")
    p.add_argument("--scale", type=float, help="the longest blocks, in native lengths (default: the student's length)")
    p.add_argument("--blocks", type=int, default=8, help="long held-out blocks to read")
    p.add_argument("--out", type=Path, help="folder for report.json, report.md and report.png")
    p.add_argument("--cache", type=Path, default=Path("out/cache"), help="folder for tokenised text")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        print(f"eval.py: {e}", file=sys.stderr)
        sys.exit(2)
