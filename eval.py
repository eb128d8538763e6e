"""What was kept and what was gained: one model, or a student against its teacher.

    python eval.py --model out/demo/yarn/student --against demo/teacher
    python eval.py --model DIR --tasks piqa.jsonl.gz arc_easy --task-dir DATA --limit 200
    python eval.py --model DIR --against DIR --ruler --lengths 4096 32768 --ruler-data DATA
    python eval.py --model DIR --against DIR --passkey --ppl --positions --layers --out NEW
    python eval.py --model DIR --prompt "Once upon a time"

Held-out text.  Loss, perplexity and next-token accuracy at 1x and s x, and recall of look-ups:
evals/held_out.py.

Tasks.  LAMBADA and multiple choice by the rules of lm-evaluation-harness: evals/likelihood.py.

Long text.  Sliding-window perplexity and loss by position: evals/longtext.py. Passkey and RULER:
evals/prompts.py.

Layers.  Where the relations of teacher and student differ: evals/layers.py.

With --against two columns are added: "teacher", and "untrained" (the teacher's weights under the
student's positions). The table then also says which share of the lost loss was recovered, and each
task's retention with its confidence interval (evals/retention.py).

What comes out.  Each figure on standard error when it is known, then the table on standard output.
With --out, report.json (evals/report.py lists its keys), report.md and report.png, and what was
asked for of passkey.png, positions.png and layers.png. Same arguments, same machine: same figures.

Exit codes: 0 done; 2 refused or cannot go on, and one sentence says why; 3 stopped by Ctrl-C,
SIGTERM or SIGHUP.

Limits.  A standard error says how far other words, items or questions would move a figure, not how
far another training run would.

Source.  LinearARD arXiv 2604.00004 for what is compared; each file of evals/ names its own.
"""

from engine import exits  # first: from here on, a Ctrl-C ends in one line  # isort: skip

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from engine import data, folder
from engine.machine import versions
from evals import flags, layers, likelihood, longtext, pictures, prompts, report, tasks
from evals.generate import stream
from evals.held_out import HeldOut
from evals.report import Scores
from evals.retention import TEACHER, UNTRAINED, retention
from evals.ruler_tasks import RULER_TASKS
from hub import checkpoint, files
from hub.tokenizer import Tokenizer, load_tokenizer
from model import Llama, LlamaConfig, make_student
from precision import choose_dtype


@dataclass
class Subject:
    """What is measured, and on what. Complete before the first measurement."""

    args: argparse.Namespace
    student: LlamaConfig
    native: int  # tokens that count as 1x
    scale: float  # of the longest blocks, in native lengths
    lengths: list[int]  # of the long-text figures
    tokenizer: Tokenizer
    tasks: list[tasks.Task]
    requests: list[list[likelihood.Request]]  # of each task
    prompts: prompts.Prompts
    documents: list[np.ndarray]  # each [tokens + 1]
    missing: list[str]  # what was asked for and is left out, and why
    corpus: data.Corpus | None = None
    models: dict[str, Llama] = field(default_factory=dict)  # by column

    @property
    def long(self) -> int:
        return round(self.native * self.scale)

    @property
    def held_out(self) -> str:
        return f"held-out text of {self.corpus.name}"


# ---------------------------------------------------------------- the measurements


def held_out_text(subject: Subject, scores: Scores) -> None:
    s, args = subject, subject.args
    held_out = HeldOut(s.corpus, s.tokenizer, s.native, s.scale, args.blocks, args.seed)
    for name, model in s.models.items():
        for row, (value, error, items) in held_out.figures(model).items():
            scores.add(name, row, value, error=error, items=items, **held_out.about(row))


def short_tasks(subject: Subject, scores: Scores) -> None:
    s = subject
    likelihood.task_scores(scores, s.models, s.tasks, s.requests, predictions(s, scores))
    scores.notes += tasks.notes(s.tasks)
    # Of tasks alone: beyond its own length the teacher's score does not say what could be kept
    if TEACHER in s.models:
        scores.kept = retention(scores.values, s.args.seed)


def sliding_window(subject: Subject, scores: Scores) -> None:
    s, texts = subject, subject.documents
    source = ", ".join(map(str, s.args.documents or ()))
    if not texts:
        texts = list(s.corpus.held_out_blocks(max(s.lengths), s.args.blocks).numpy())
        source = s.held_out
    about = {"version": f"sliding window (PI), {source}", "seed": None}
    longtext.sliding_scores(scores, s.models, s.tokenizer, texts, s.lengths, **about)


def loss_by_position(subject: Subject, scores: Scores) -> None:
    s = subject
    blocks = s.corpus.held_out_blocks(max(s.lengths), s.args.blocks)
    about = {"version": f"loss by position, {s.held_out}", "seed": None}
    curve = longtext.position_scores(scores, s.models, blocks, s.native, **about)
    scores.more["positions"] = curve
    if scores.out:
        scores.out.write("positions.png", pictures.positions(curve, s.native))


def passkey(subject: Subject, scores: Scores) -> None:
    found = scores.more["passkey"] = prompts.passkey_scores(scores, subject.models, subject.prompts)
    if scores.out:
        scores.out.write("passkey.png", pictures.passkey(found))


def ruler(subject: Subject, scores: Scores) -> None:
    s = subject
    prompts.ruler_scores(scores, s.models, s.prompts, predictions(s, scores))
    scores.notes += prompts.variants(scores)


def relation_kl_by_layer(subject: Subject, scores: Scores) -> None:
    s = subject
    blocks = s.corpus.held_out_blocks(s.long, s.args.blocks)[:, :-1]
    kl = layers.compare(s.models, blocks)
    about = {"tokens": s.long, "blocks": len(blocks), "version": f"relation KL, {s.held_out}"}
    scores.more["layers"] = layers.as_lists(kl) | about
    scores.notes.append(f"{layers.HEAD}, {s.long} tokens:\n\n{layers.table(kl)}")
    if scores.out:
        scores.out.write("layers.png", pictures.layers(kl))


def predictions(subject: Subject, scores: Scores) -> Callable[[str, str], None] | None:
    """What takes a file of every item's scores, where that was asked for."""
    return scores.out.write if scores.out and subject.args.predictions else None


def asked(args: argparse.Namespace) -> list[Callable[[Subject, Scores], None]]:
    """The measurements of an evaluation, in the table's order."""
    wanted = {
        held_out_text: not args.no_text,
        short_tasks: args.tasks,
        sliding_window: args.ppl,
        loss_by_position: args.positions,
        passkey: args.passkey,
        ruler: args.ruler is not None,
        relation_kl_by_layer: args.layers,
    }
    return [measure for measure, is_asked in wanted.items() if is_asked]


# ---------------------------------------------------------------- the program


def main(argv: list[str] | None = None) -> None:
    """One evaluation, or a text continued. argv: the command line's (None: the process's own).

    Raises ValueError for what cannot be measured.
    """
    args = flags.parse(argv, __doc__)  # nothing changes args after this line
    if args.prompt is not None:
        return continue_text(args)
    began, device = time.time(), torch.device(args.device)
    dtype, _ = choose_dtype(device, args.dtype)
    if args.out:
        check_out(args)
    subject = prepare(args)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(folder.Folder(args.out, "eval.py")) if args.out else None
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subject.corpus = held_out_corpus(subject, cache)
        subject.models = load_models(subject, dtype)
        scores = Scores({name: {} for name in subject.models}, dtype, args.command, out)
        scores.more["missing"] = subject.missing
        for measure in asked(args):
            measure(subject, scores)
        about = {"command": args.command, "seconds": round(time.time() - began, 1)}
        about |= versions(device) | {"seed": args.seed, "dtype": str(dtype)[6:]}
        print(report.render(scores, about))
        print(json.dumps(about))


def prepare(args: argparse.Namespace) -> Subject:
    """Whatever can be refused without text and weights is refused here."""
    student, teacher = configs(args.model, args.against)
    native = args.native or (teacher or student).rope.length
    longest = max(student.rope.length, teacher.rope.length if teacher else 0)
    scale = args.scale or max(1.0, longest / native)
    long = round(native * scale)
    lengths = args.lengths or [native << k for k in range(32) if native << k <= long]
    if args.ppl and min(lengths) < longtext.STRIDE:
        raise ValueError(flags.too_short(lengths))
    found, lacking = tasks.find(args.tasks, args.task_dir, args.limit)
    tokenizer = load_tokenizer(args.model)
    requests = [likelihood.encode(tokenizer, task.pairs) for task in found]
    names = list(RULER_TASKS) if args.ruler == [] else args.ruler or []
    names = [*names, "passkey"] if args.passkey else names
    able, unable = prompts.feasible(
        tokenizer, names, lengths, args.samples, args.ruler_seed, args.ruler_data
    )
    texts = args.documents or []
    if texts:
        texts = longtext.documents(texts, tokenizer, max(lengths), args.blocks)
    missing = lacking + unable
    if missing:
        print("left out:\n  " + "\n  ".join(missing), file=sys.stderr)
    return Subject(
        args, student, native, scale, lengths, tokenizer, found, requests, able, texts, missing
    )


def held_out_corpus(subject: Subject, cache: Path) -> data.Corpus | None:
    """The text, where a measurement reads it."""
    args, longest = subject.args, 0
    if args.positions or (args.ppl and not subject.documents):
        longest = max(subject.lengths)
    if args.layers or not args.no_text:
        longest = max(longest, subject.long)
    if not longest:
        return None

    def enough(corpus: data.Corpus) -> None:
        corpus.held_out_blocks(longest, 1)

    with files.disk_sentences(cache):
        return data.load_corpus(args.data, subject.tokenizer, cache, without=args.out, check=enough)


def load_models(subject: Subject, dtype: torch.dtype) -> dict[str, Llama]:
    """The columns: the model alone, or teacher, untrained student and student."""
    args = subject.args
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    if not args.against:
        return {"model": model}
    teacher = Llama.from_pretrained(args.against, dtype=dtype, device=args.device)
    untrained = make_student(teacher, subject.student, trained=())
    return {TEACHER: teacher, UNTRAINED: untrained, "student": model}


def check_out(args) -> None:
    """Refuses an --out that is not this program's to write in."""
    apart = [("--model", args.model), *(("--data", path) for path in args.data)]
    apart += [("--against", args.against)] if args.against else []
    for flag, path in apart:
        folder.check(args.out, "--out", "eval.py", resume=None, apart={flag: path})


def configs(model: Path, against: Path | None) -> tuple[LlamaConfig, LlamaConfig | None]:
    """Both config.json; ValueError where they are not one network under two kinds of position."""
    student = config_of(model)
    if against is None:
        return student, None
    teacher = config_of(against)
    positions = {"rope": student.rope, "window": student.window, "source": student.source}
    if replace(teacher, **positions) != student:
        raise ValueError(
            f"--against {against} is another network than --model {model}: not its teacher"
        )
    return student, teacher


def config_of(path: Path) -> LlamaConfig:
    """config.json, which the weights beside it must fit: by their headers, in milliseconds."""
    config = LlamaConfig.from_hf(files.read_json(files.own(path, "config.json")))
    with torch.device("meta"):
        checkpoint.check_fits(Llama(config), path)
    return config


def continue_text(args) -> None:
    """Continues a text greedily, as it comes."""
    device = torch.device(args.device)
    config, _ = configs(args.model, None)
    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(sys.stdin.read() if args.prompt == "-" else args.prompt, bos=True)
    if len(ids) + args.new_tokens > config.rope.length:
        beyond = f"{args.new_tokens} new ones exceed the context of {config.rope.length}"
        said = f"the prompt's {len(ids)} tokens and {beyond}: what comes after that may be nonsense"
        print(said, file=sys.stderr)
    dtype, _ = choose_dtype(device, args.dtype)
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    began, n = time.time(), 0
    for text, n in stream(model, tokenizer, ids, args.new_tokens):  # noqa: B007
        print(text, end="", flush=True)
    rate = n / (time.time() - began)
    print(f"\n[{len(ids)} tokens in, {n} out, {rate:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    exits.run(main, "eval.py")
