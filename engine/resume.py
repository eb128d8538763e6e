"""Stopping and going on: training state that survives Ctrl-C, a kill at any moment, damage and a
full disk.

What.  state/step-N/ holds state.safetensors (the trained weights and, within a stage, Adam's two
moments, by name)
and state.json (the stage, the step, the figures so far, what the run depends on, and a checksum).
It is written apart, synced and renamed (folder.py), so a name that exists was complete; the last
two are kept. A state that does not read back as it was written is named and passed over for the one
before it.

When.  A step ends with its line in metrics.jsonl. Every --save-minutes, on a stop, and when a stage
is done and measured, the state is written, synced and renamed; only then are older ones removed.
--resume cuts the log back to the step of the state that it takes. So a kill costs the steps since
the last save, and a measurement that was not over.

Why that is enough.  The k-th block of a run is a function of (seed, k) (data.py) and the noise of a
step is one of its number, so weights, moments and the step's number are the whole state: a resumed
run has the losses and weights of one that was never interrupted, on the same hardware and library
versions, with as much memory free (which decides how many blocks are read at a time). To the bit on
a CPU, and on a GPU under --deterministic; on a GPU without it up to the rounding of the sums that
torch's attention orders anew in each run.

What it depends on.  The arguments that decide the result, and the contents of the teacher's files
and of the text, by their digests. A resumed run must have the same; what changed is named.

Processes.  A state holds whole tensors, whatever number of processes wrote it: any other number
reads it.

Signals.  Ctrl-C, SIGTERM or SIGHUP (a lost connection) asks for a stop, and a line says so: the
measurements at hand and the next step are finished, the state is saved, the exit code is 3. After
the last step the run ends as if nobody had asked, with code 0. A second signal kills at once; under
torchrun, which passes on to its processes the Ctrl-C that they already had, only if it comes a
second or more after the first. torchrun kills what is not done 30 seconds after a Ctrl-C: then the
state before counts.

Limits.  Digests are of bytes: a teacher saved anew with the same weights counts as changed. --impl
and --micro may change, and then the rounding does.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import parallel
from engine.folder import Folder
from hub import files

_KEEP = 2
_PLACES = ("teacher", "data")  # may be other ones: what lies there is compared by its contents
TEACHERS_FILES = "teacher's files"
_NAME = re.compile(r"step-(\d{8})")


class StopRequest:
    """True once SIGINT, SIGTERM or SIGHUP came; the next one then has its usual effect, at once."""

    def __init__(self):
        self.asked = 0.0
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {n: signal.signal(n, self._ask) for n in signals}

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


@dataclass
class Progress:
    """How far a run is: the step to do next, and the columns of the table that are there."""

    stage: int = 0  # its number in the plan
    step: int = 0  # of that stage
    total: int = 0  # steps done, over all stages
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    state: Path | None = None  # where weights and moments are to be read from


def gather(
    weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer | None, keep: bool = True
) -> dict[str, Tensor]:
    """Weights and, of an optimiser, its moments, whole and on the CPU. All ranks must call it where
    they are sharded; one may keep them.

    Raises ValueError naming a weight that is not finite: such a state could never go on.
    """
    tensors = {}
    for name, p in weights.items():
        if not torch.isfinite(parallel.local(p)).all():
            raise ValueError(
                f"the update made {name} NaN or infinite; start anew, in another --out, with a "
                "lower learning rate"
            )
        moments = optimiser.state.get(p, {}) if optimiser else {}
        held = {"": p} | {f"{k}.": moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
        for key, t in held.items():
            full = parallel.whole(t)
            if keep:
                tensors[key + name] = full.cpu().contiguous()
    return tensors


def write(out: Folder, tensors: dict[str, Tensor], at: Progress, depends: dict) -> None:
    """state/step-<at.total>, whole or not at all; then the states before the last two go."""
    info = {"total": at.total, "stage": at.stage, "step": at.step, "columns": at.columns}
    with out.directory(f"state/step-{at.total:08d}") as work:
        save_file(tensors, work / "state.safetensors")
        info |= {"checksum": _checksum(work / "state.safetensors"), "depends": depends}
        info["own checksum"] = _info_checksum(info)
        (work / "state.json").write_text(json.dumps(info) + "\n")
    at.state = out.path / f"state/step-{at.total:08d}"
    for old in _states(out.path / "state")[_KEEP:]:
        out.remove(f"state/{old.name}")


def _info_checksum(info: dict) -> int:
    """Of all that state.json says but this number itself."""
    facts = {k: v for k, v in info.items() if k != "own checksum"}
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as f:
        while piece := f.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def _states(folder: Path) -> list[Path]:
    """What is named like a state, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name)), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest state that reads back as it was written, or None; a damaged one is named on the
    way.
    """
    for state in _states(folder):
        try:
            info = load_info(state)
            if _checksum(state / "state.safetensors") != info["checksum"]:
                raise ValueError("state.safetensors is not as it was written")
            return state
        except (ValueError, KeyError, TypeError, OSError) as e:
            print(f"{state} is damaged ({e}); looking for the one before it", flush=True)
    return None


def load_info(state: Path) -> dict:
    """state.json, with the keys of Progress and `depends`.

    Raises ValueError where it is not as it was written.
    """
    info = files.read_json(state / "state.json")
    kinds = {"total": int, "stage": int, "step": int, "columns": dict, "depends": dict}
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind):
            raise ValueError(f"state.json has no {key}")
    if info.get("own checksum") != _info_checksum(info):
        raise ValueError("state.json is not as it was written")
    return info


def load(state: Path, weights: dict[str, nn.Parameter], optimiser, step: int) -> None:
    """Puts weights and, unless None, Adam's moments back; `step`: how many updates Adam had made.

    Raises ValueError for a file that cannot be read and for weights of another shape.
    """
    try:
        tensors = load_file(state / "state.safetensors")
    except SafetensorError as e:
        raise ValueError(f"{state}/state.safetensors cannot be read: {e}") from None
    for name, p in weights.items():
        if name not in tensors or tensors[name].shape != p.shape:
            raise ValueError(
                f"{state} holds no {name} of shape {list(p.shape)}; it is another run's"
            )
        p.data.copy_(parallel.local_part(tensors[name], p))
        if optimiser is not None and step:
            moments = {
                k: parallel.local_part(tensors[f"{k}.{name}"], p) for k in ("exp_avg", "exp_avg_sq")
            }
            # Each kind of Adam counts its steps elsewhere
            place = p.device if optimiser.defaults["fused"] else "cpu"
            optimiser.state[p] = {"step": torch.tensor(float(step), device=place), **moments}


def matters(args: argparse.Namespace, stages: list) -> dict:
    """What decides the result, but for the text: a resumed run must have the same."""
    keys = ("scale", "rope", "stage", "seed", "lora_rank", "lora_alpha", "lora_dropout", "bits")
    keys += ("logit_weight", "relations", "authors_heads", "lookups", "eval_blocks", "dtype")
    out = {k: getattr(args, k) for k in keys}
    for s in stages:
        plan = {"T": s.T, "batch": s.batch, "steps": s.steps, "lr": s.lr}
        if s.objective != "relation":
            plan["native blocks"] = s.auxiliary.batch // s.batch if s.auxiliary else 0
        out |= {f"{s.name} {k}": v for k, v in plan.items()}
    paths = {"teacher": str(args.teacher.resolve()), "data": [str(p.resolve()) for p in args.data]}
    return out | paths | {TEACHERS_FILES: digest(args.teacher)}


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
    state = latest(out / "state")
    if state is None:
        if _states(out / "state"):
            raise ValueError(f"no state in {out}/state is whole; start anew with another --out")
        print("--resume: no state was saved, so it begins at the beginning", flush=True)
        return Progress()
    info = load_info(state)
    same_run(info["depends"], depends)
    at = Progress(info["stage"], info["step"], info["total"], info["columns"], state)
    done = f"after step {at.step} of {stages[at.stage].name}" if at.step else "between stages"
    print(f"--resume: going on {done}, from {state}", flush=True)
    return at


def same_run(saved: dict, now: dict) -> None:
    """Raises ValueError naming what has changed since the state was saved, of what matters."""
    changed = [k for k in now if k not in _PLACES and saved.get(k) != now[k]]
    if changed:
        changes = "; ".join(f"{_flag(k)} was {saved.get(k)!r} and is {now[k]!r}" for k in changed)
        raise ValueError(
            f"--resume: {changes}; give the old values, or start anew with another --out"
        )


def _flag(key: str) -> str:
    """What the command line calls a thing that a run depends on."""
    stage, _, what = key.partition(" ")
    if stage in ("stage1", "stage2"):
        name = {"T": "length", "steps": "tokens", "native blocks": "native-blocks"}.get(what, what)
        flag = f"--{name}" + ("" if "blocks" in name else stage[-1])
        return f"the steps of {stage} ({flag})" if what == "steps" else flag
    if key == "authors_heads":
        return "--preset authors"
    return key if key in (TEACHERS_FILES, "text") else "--" + key.replace("_", "-")


def same_text(at: Progress, text: str) -> None:
    """Raises ValueError where the text, by its digest, is not the one that made the state."""
    if at.state:
        same_run(load_info(at.state)["depends"], {"text": text})


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
