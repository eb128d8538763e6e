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
from dataclasses import replace
from pathlib import Path

import torch

from engine import data, folder
from engine.machine import keep_memory, versions
from evals import flags, held_out, layers, likelihood, longtext, prompts, report, tasks
from evals.generate import stream
from evals.report import Scores
from evals.retention import TEACHER, UNTRAINED
from evals.ruler_tasks import RULER_TASKS
from evals.subject import Subject
from hub import checkpoint, files
from hub.tokenizer import load_tokenizer
from model import Llama, LlamaConfig, make_student
from precision import choose_dtype


def asked(args: argparse.Namespace) -> list[Callable[[Subject, Scores], None]]:
    """The measurements of an evaluation, in the table's order."""
    wanted = {
        held_out.headline: not args.no_text,
        likelihood.short_tasks: args.tasks,
        longtext.sliding_window: args.ppl,
        longtext.loss_by_position: args.positions,
        prompts.passkey: args.passkey,
        prompts.ruler_means: args.ruler is not None,
        layers.relation_kl_by_layer: args.layers,
    }
    return [measure for measure, is_wanted in wanted.items() if is_wanted]


def main(argv: list[str] | None = None) -> None:
    """One evaluation, or a text continued. argv: None takes those of the process.

    Raises ValueError for what cannot be measured.
    """
    args = flags.parse(argv, __doc__)  # nothing changes args after this line
    began, device = time.time(), torch.device(args.device)
    if device.type == "cpu":
        keep_memory()
    if args.prompt is not None:
        return continue_text(args)
    dtype, _ = choose_dtype(device, args.dtype)
    if args.out:
        check_out(args)
    student, teacher = configs(args.model, args.against)
    subject, missing = prepare(args, student, teacher)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(folder.Folder(args.out, "eval.py")) if args.out else None
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subject.corpus = held_out_text(args, subject, cache)
        subject.models = load_models(args, student, dtype)
        columns = {name: {} for name in subject.models}
        scores = Scores(columns, dtype, args.command, out, args.predictions)
        scores.more["missing"] = missing
        for measure in asked(args):
            measure(subject, scores)
        about = {"command": args.command, "seconds": round(time.time() - began, 1)}
        about |= versions(device) | {"seed": args.seed, "dtype": str(dtype)[6:]}
        print(report.render(scores, about))
        print(json.dumps(about))


def prepare(
    args: argparse.Namespace, student: LlamaConfig, teacher: LlamaConfig | None
) -> tuple[Subject, list[str]]:
    """(the subject without text and models, what was asked for and is left out, and why).

    Raises ValueError for whatever can be refused without them.
    """
    native = args.native or (teacher or student).rope.length
    longest = max(student.rope.length, teacher.rope.length if teacher else 0)
    scale = args.scale or max(1.0, longest / native)
    subject = Subject(load_tokenizer(args.model), native, scale, args.blocks, args.seed)
    powers = (native << k for k in range(32))
    lengths = subject.lengths = args.lengths or [n for n in powers if n <= subject.long]
    if args.ppl and min(lengths) < longtext.STRIDE:
        raise ValueError(
            f"--ppl needs windows of at least its stride, {longtext.STRIDE} tokens, and --lengths "
            f"begins at {min(lengths)}; name longer ones"
        )
    found, missing = tasks.find(args.tasks, args.task_dir, args.limit)
    subject.tasks = [(task, likelihood.encode(subject.tokenizer, task.pairs)) for task in found]
    names = list(RULER_TASKS) if args.ruler == [] else args.ruler or []
    names = [*names, "passkey"] if args.passkey else names
    given = args.samples, args.ruler_seed, args.ruler_data
    subject.prompts, unable = prompts.feasible(subject.tokenizer, names, lengths, *given)
    missing += unable
    if args.documents:
        given = args.documents, subject.tokenizer, max(lengths), args.blocks
        subject.documents = longtext.documents(*given)
        subject.documents_name = ", ".join(map(str, args.documents))
    if missing:
        print("left out:\n  " + "\n  ".join(missing), file=sys.stderr)
    return subject, missing


def held_out_text(args: argparse.Namespace, subject: Subject, cache: Path) -> data.Corpus | None:
    """The text, where a measurement reads it."""
    longest = 0
    if args.positions or (args.ppl and not args.documents):
        longest = max(subject.lengths)
    if args.layers or not args.no_text:
        longest = max(longest, subject.long)
    if not longest:
        return None

    def enough(corpus: data.Corpus) -> None:
        corpus.held_out_blocks(longest, 1)

    with files.disk_sentences(cache):
        given = {"without": args.out, "check": enough, "field": args.text_field}
        corpus = data.load_corpus(args.data, subject.tokenizer, cache, **given)
    for note in corpus.notes:
        print(note)
    return corpus


def load_models(
    args: argparse.Namespace, student: LlamaConfig, dtype: torch.dtype
) -> dict[str, Llama]:
    """The columns: the model alone, or teacher, untrained student and student."""
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    if not args.against:
        return {"model": model}
    teacher = Llama.from_pretrained(args.against, dtype=dtype, device=args.device)
    untrained = make_student(teacher, student, trained=())
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
    """config.json, which the weights must fit: by their headers, in milliseconds."""
    config = LlamaConfig.from_hf(checkpoint.read_config(path))
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
        print(f"the prompt's {len(ids)} tokens and {args.new_tokens} new ones exceed the context "
              f"of {config.rope.length}: what comes after that may be nonsense",
              file=sys.stderr)  # fmt: skip
    dtype, _ = choose_dtype(device, args.dtype)
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    began, n = time.time(), 0
    for text, n in stream(model, tokenizer, ids, args.new_tokens):  # noqa: B007
        print(text, end="", flush=True)
    rate = n / (time.time() - began)
    print(f"\n[{len(ids)} tokens in, {n} out, {rate:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    exits.run(main, "eval.py")
