"""Stopping and going on: a stop asked for by a signal, and what a resumed run must share with the
one before.

When.  A step ends with its line in metrics.jsonl. Every --save-minutes, on a stop, and when a stage
is done, a state (states.py) is copied and written while the run goes on; a stage's is whole only
with what was measured after it, and the last stage's, where writing it takes longer than that, only
when the export is written, or read back at the latest. --resume cuts the log back to the step of
the state that it takes. So a kill costs the steps since the last state that was whole, and what was
measured since.

Why that is enough.  The k-th block of a run is a function of (seed, k) (data.py) and the noise of a
step is one of its number, so weights, moments and the step's number are the whole state: a resumed
run has the losses and weights of one that was never interrupted, on the same hardware and library
versions, with as much memory free (which decides how many blocks are read at a time). To the bit on
a CPU, and on a GPU under --deterministic; on a GPU without it up to the rounding of the sums that
torch's attention orders anew in each run.

What it depends on.  The arguments that decide the result, and the contents of the teacher's files
and of the text, by their digests. A resumed run must have the same; what changed is named. The
teacher's digest is taken while the teacher is loaded and the text tokenised.

Signals.  Ctrl-C, SIGTERM or SIGHUP (a lost connection; not under nohup) asks for a stop, and a line
says so: the measurements at hand and the next step are finished, the state is saved, the exit code
is 3. After the last step the run ends as if nobody had asked, with code 0. A second signal kills at
once; under torchrun, which passes on to its processes the Ctrl-C that they already had, only if it
comes a second or more after the first. torchrun kills what is not done 30 seconds after a stop: a
state that is not whole after GRACE is given up, the one before counts, and a line says how many
steps that costs. What else takes longer, as a measurement may, peers.py ends with a sentence.

Limits.  Digests are of bytes: a teacher saved anew with the same weights counts as changed. --impl
and --micro may change, and then the rounding does.
"""

import argparse
import hashlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine import exits, states
from engine.folder import Folder
from engine.states import Progress
from hub import files

_UNSAVED = ("stage2 native T",)  # by versions that did not save it; what else they did not was off
_PLACES = ("teacher", "data")  # may be other ones: what lies there is compared by its contents
TEACHERS_FILES = "teacher's files"


class StopRequest:
    """True once SIGINT, SIGTERM or SIGHUP came; the next one then has its usual effect, at once."""

    def __init__(self):
        self.asked = 0.0
        self._before = {n: signal.signal(n, self._ask) for n in exits.SIGNALS}

    def _ask(self, number, frame) -> None:
        if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.asked < 1:
            return
        if self.asked or "TORCHELASTIC_RUN_ID" not in os.environ:
            for n in self._before:
                signal.signal(n, signal.SIG_DFL)  # not KeyboardInterrupt, which waits for torch
        if self.asked:
            os.kill(os.getpid(), number)
        elif os.environ.get("RANK", "0") == "0":  # not print, which a signal may have interrupted
            before = b"\n" if os.isatty(2) else b""  # a terminal may show a bar
            os.write(2, before + b"stopping after this step or measurement; once more: at once\n")
        self.asked = time.monotonic()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.asked > 0


def matters(args: argparse.Namespace, stages: list, blocks: int | None) -> dict:
    """What decides the result, but for the contents of files: a resumed run must have the same.

    blocks: that the table reads, and look-ups with them; None: one, without.
    """
    keys = ("scale", "rope", "stage", "seed", "lora_rank", "lora_alpha", "lora_dropout", "bits")
    keys += ("logit_weight", "authors_heads", "lookups", "move_pairs", "eval_blocks", "dtype")
    out = {k: blocks if k == "eval_blocks" else getattr(args, k) for k in keys}
    out["relations"] = stages[0].relations
    for s in stages:
        plan = {"T": s.T, "batch": s.batch, "steps": s.steps, "lr": s.lr, "skips": s.skips}
        if s.objective != "relation":
            plan["native blocks"] = s.auxiliary.batch // s.batch if s.auxiliary else 0
            plan["native T"] = s.auxiliary.T if s.auxiliary else 0
            plan["native skips"] = s.auxiliary.skips if s.auxiliary else 0
            plan["teacher share"] = s.teacher_share
        out |= {f"{s.name} {k}": v for k, v in plan.items()}
    paths = {"teacher": str(args.teacher.resolve()), "data": [str(p.resolve()) for p in args.data]}
    return out | paths


def digest(path: Path) -> str:
    """Of the contents of a model directory's config, tokenizer and safetensors, by name."""
    kinds = (".safetensors", ".json", ".model", ".tiktoken", ".txt")
    found = [f for f in sorted(path.iterdir()) if f.name.endswith(kinds) and f.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock: a core for each shard
        digests = list(pool.map(files.digest, found))
    lines = (f"{file.name} {value}\n" for file, value in zip(found, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def find(args: argparse.Namespace, depends: dict, stages: list) -> Progress:
    """Where a run begins: with --resume at the newest good state of --out, and says so; else at 0.

    Raises ValueError where every state is damaged, and as same_run does.
    """
    if not args.resume:
        return Progress()
    out = args.out
    state = states.latest(out / "state")
    if state is None:
        if states.found(out / "state"):
            raise ValueError(f"no state in {out}/state is whole; start anew with another --out")
        print("--resume: no state was saved, so it begins at the beginning", flush=True)
        return Progress()
    info = states.load_info(state)
    same_run(info["depends"], depends)
    at = Progress(info["stage"], info["step"], info["total"], info["columns"], state)
    print(f"--resume: going on {at.where(stages)}, from {state}", flush=True)
    return at


def same_run(saved: dict, now: dict) -> None:
    """Raises ValueError naming what has changed since the state was saved, of what matters."""
    known = [k for k in now if k in saved or (now[k] and k not in _UNSAVED)]
    known = [k for k in known if k not in _PLACES]
    changed = [k for k in known if saved.get(k) != now[k]]
    if changed:
        changes = "; ".join(f"{_flag(k)} was {saved.get(k)!r} and is {now[k]!r}" for k in changed)
        tokens = ", ".join(_tokens(saved, k[:6]) for k in changed if "steps" in k and k in saved)
        tokens = f" ({tokens})" if tokens else ""
        raise ValueError(
            f"--resume: {changes}; give the old values{tokens}, or start anew with another --out"
        )


def _tokens(saved: dict, stage: str) -> str:
    """The flag that makes the steps of a stage those that were saved."""
    n = saved[f"{stage} steps"] * saved[f"{stage} batch"] * saved[f"{stage} T"]
    return f"--tokens{stage[-1]} {n}"


def _flag(key: str) -> str:
    """What the command line calls a thing that a run depends on."""
    stage, _, what = key.partition(" ")
    if what in ("native T", "native skips"):
        return "--length1" if what == "native T" else "--skips1"
    if stage in ("stage1", "stage2"):
        name = {"T": "length", "steps": "tokens"}.get(what, what).replace(" ", "-")
        flag = f"--{name}" + ("" if "-" in name else stage[-1])
        return f"the steps of {stage} ({flag})" if what == "steps" else flag
    if key == "authors_heads":
        return "--preset authors"
    return key if key in (TEACHERS_FILES, "text") else "--" + key.replace("_", "-")


def same_contents(at: Progress, depends: dict) -> None:
    """Raises ValueError where text or teacher are not those that made the state."""
    if at.state:
        same_run(states.load_info(at.state)["depends"], depends)


def cut_log(out: Folder, total: int) -> None:
    """Drops what an interrupted run logged after the state that is resumed."""
    file = out.path / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    known = [line for line in lines if (n := _number(line)) is not None and n < total]
    out.write("metrics.jsonl", "".join(f"{line}\n" for line in known))


def _number(line: str) -> int | None:
    try:
        return json.loads(line)["total"]
    except (ValueError, KeyError, TypeError):
        return None  # the line that the kill cut short


def reseed(seed: int, total: int, block: int) -> None:
    """The noise of a step (LoRA's dropout) depends on its number and its first block, on no
    process.
    """
    torch.manual_seed(hash((seed, total, block)) % (1 << 63))
