"""The end of a run: what it leaves to be used and read.

adapter/ with --lora-rank, student/, the table on the terminal and as report.json, .md and .png, a
line on where the time went, and the command that measures the student.

student/ is a Hugging Face directory. Its frozen tensors are there already where the head start got
so far (head_start.py); the rest is written, and all of it read back, before it takes its name.

The state after the last stage is written meanwhile, or before, where the head start gave way for
want of room; the run ends when both are there.

Limits.  Where the export fails, as on a full disk, the report is written all the same: what was
measured stays.
"""

import dataclasses
import shlex

from engine import lora, parallel
from engine.head_start import how
from engine.run import Run
from hub import checkpoint, download, files
from hub.card import licence_of, model_card
from model import TRAINED, Llama


def export(run: Run, student: Llama, report) -> None:
    """All of it, by the first process; report: evals/report.py, which stands above this file."""
    if run.args.shard:
        parallel.unshard(student, run.world)
    with run.times("export"):
        run.world.on_main(_export, run, student, report)


def _export(run: Run, student: Llama, report) -> None:
    plan, args, columns = run.plan, run.args, run.at.columns
    with files.disk_sentences(args.out, run.promise):
        text = report.render(report.Scores(columns), run.about) if columns else ""
        try:
            run.head_start.stop()
            if run.head_start.work is None:  # it gave way: there may be no room for both
                run.saved_all()
            _write_models(run, student, text)
            _save(run)
        finally:  # what was measured stays, even where the export fails
            if columns:
                report.write(run.out, columns, run.about, {"seconds": run.times.rows()})
    at = args.out / "student"
    print(f"\n{text}\n" if text else "")
    print(f"time: {run.times}")
    if plan.tokenizer.note:
        print(f"note: {plan.tokenizer.note}")
    print(f"exported to {at} ({plan.longer.rope.length:,} tokens of context); next:")
    text = ["--data", *args.data] if args.data else []
    text += ["--text-field", args.text_field] if args.text_field else []
    command = ["python", "eval.py", "--model", at, "--against", args.teacher, *text]
    print(f"  {shlex.join(map(str, command))}")


def _save(run: Run) -> None:
    """The state that was written beside the models is whole, or a sentence says what is."""
    try:
        run.saved_all()
    except ValueError as e:
        student = run.args.out / "student"
        said = f"{student} is whole, and the state after its last step not: {e}"
        raise ValueError(said) from None


def _write_models(run: Run, student: Llama, scores: str) -> None:
    """The adapter, and the student with its card."""
    plan, args, out = run.plan, run.args, run.out
    if args.lora_rank:
        with out.directory("adapter") as work:
            lora.write_adapter(student, work, str(args.teacher), TRAINED)
    card = model_card(
        download.model_name(args.teacher),
        before=str(plan.native.rope),
        after=str(plan.longer.rope),
        kind=plan.longer.rope.kind,
        length=plan.longer.rope.length,
        stages=[dataclasses.asdict(stage) for stage in plan.stages],
        scores=scores,
        arguments=run.about["arguments"],
        base_model=download.repository_of(args.teacher),
        licence=licence_of(args.teacher),
    )
    original = Llama.from_pretrained(args.teacher) if args.bits else None
    work, written = run.head_start.take()
    checkpoint.write_pretrained(
        lora.merge(student, original),
        work,
        tokenizer_from=args.teacher,
        card=card,
        written=written,
        then=run.name_written,
        **how(args.teacher),
    )
    out.publish(work, "student")
