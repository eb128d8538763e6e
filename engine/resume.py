"""Stopping and going on: training state that survives Ctrl-C, a kill at any moment, and a full disk.

What.  state/step-N/ holds state.safetensors (the trained weights and Adam's two moments, by name) and state.json (the
stage, the step, the figures so far, the arguments that matter). It is written beside its name, synced and renamed, so a
name that exists is complete; the last two are kept.

Why that is enough.  The k-th block of a run is a function of (seed, k) (data.py) and the noise of a step of its
number alone, so weights, moments and the step's number are the whole state: a resumed run has the losses and weights
of one that was never interrupted, to the bit, on the same hardware and library versions.

Processes.  A state holds whole tensors, whatever number of processes wrote it: any other number reads it.

Signals.  Ctrl-C or SIGTERM asks for a stop: the step is finished, the state saved, the exit code is 3. A second one
kills at once; under torchrun, which passes on to its processes the Ctrl-C that they already had, only if it comes a
second or more after the first. torchrun kills what is not done 30 seconds after a Ctrl-C: then the state before counts.
"""

import argparse
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import parallel
from hub import files

STOPPED = 3  # exit code of a run that was asked to stop and saved its state
_KEEP = 2


class StopRequest:
    """True once SIGINT or SIGTERM came; the next one then has its usual effect, at once."""

    def __init__(self):
        self.asked = 0.0
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number, frame) -> None:
        if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.asked < 1:
            return
        if self.asked or "TORCHELASTIC_RUN_ID" not in os.environ:
            for n in self._before:
                signal.signal(
                    n, signal.SIG_DFL
                )  # not KeyboardInterrupt, which waits for torch to come back
        if self.asked:
            os.kill(os.getpid(), number)
        self.asked = time.monotonic()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.asked > 0


def save(
    folder: Path, weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, info: dict
) -> None:
    """Writes folder/step-<info["total"]>; what it raises (a full disk, say) leaves everything older intact."""
    write(folder, gather(weights, optimiser), info)


def gather(
    weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, keep: bool = True
) -> dict[str, Tensor]:
    """Weights and moments, whole and on the CPU. All ranks must call it where they are sharded; one may keep them."""
    tensors = {}
    for name, p in weights.items():
        moments = optimiser.state.get(p, {})
        held = {"": p} | {f"{k}.": moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
        for key, t in held.items():
            full = parallel.whole(t)
            if keep:
                tensors[key + name] = full.cpu().contiguous()
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], info: dict) -> None:
    with files.atomic_directory(folder / f"step-{info['total']:08d}") as work:
        save_file(tensors, work / "state.safetensors")
        (work / "state.json").write_text(json.dumps(info) + "\n")
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        old.rename(
            old.with_name(f".{old.name}.old")
        )  # a kill while it is removed must not leave half a state
    for rest in folder.glob(".step-*"):  # also what earlier kills left
        shutil.rmtree(rest)


def latest(folder: Path) -> Path | None:
    """The newest complete state, or None."""
    complete = sorted(folder.glob("step-*"))
    return complete[-1] if complete else None


def load_info(state: Path) -> dict:
    return files.read_json(state / "state.json")


def load(
    state: Path,
    weights: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer | None,
    step: int,
) -> None:
    """Puts weights and, unless None, Adam's moments back; `step` is how many updates the optimiser has made."""
    tensors = load_file(state / "state.safetensors")
    for name, p in weights.items():
        if name not in tensors or tensors[name].shape != p.shape:
            raise ValueError(
                f"{state} holds no {name} of shape {list(p.shape)}; it is another run's"
            )
        p.data.copy_(parallel.part(tensors[name], p))
        if optimiser is not None and step:
            moments = {
                k: parallel.part(tensors[f"{k}.{name}"], p) for k in ("exp_avg", "exp_avg_sq")
            }
            optimiser.state[p] = {"step": torch.tensor(float(step)), **moments}


def matters(args: argparse.Namespace) -> dict:
    """The arguments that decide the result: a resumed run must have the same."""
    keys = [
        "scale",
        "rope",
        "stage",
        "seed",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "logit_weight",
        "lookups",
    ]
    keys += ["eval_blocks"]
    keys += [f"{key}{n}" for key in ("tokens", "length", "batch", "lr") for n in (1, 2)]
    paths = {"teacher": str(args.teacher.resolve()), "data": [str(p.resolve()) for p in args.data]}
    return {k: getattr(args, k) for k in keys} | paths


def claim_out(args: argparse.Namespace) -> dict | None:
    """Refuses an --out that holds another run; returns the state to resume from, if asked for and there."""
    found = latest(args.out / "state")
    if args.resume and found:
        info = load_info(found)
        same_run(info["arguments"], matters(args))
        return info | {"from": found}
    if (args.out / "run.json").exists() and not args.resume:
        raise ValueError(
            f"--out {args.out} holds another run; add --resume to go on with it, or name another --out"
        )
    return None


def same_run(saved: dict, now: dict) -> None:
    """Refuses to continue with a changed argument that matters, by name."""
    changed = [k for k in now if saved.get(k) != now[k]]
    if changed:
        said = "; ".join(f"{k} was {saved.get(k)!r} and is {now[k]!r}" for k in changed)
        raise ValueError(f"--resume: {said}; give the old values, or start anew with another --out")


def cut_log(file: Path, total: int) -> None:
    """Drops what an interrupted run logged after the state that is resumed."""
    if file.is_file():
        rows = [
            line
            for line in file.read_text().splitlines()
            if _number(line) is not None and _number(line) < total
        ]
        files.write_atomic(file, "".join(f"{r}\n" for r in rows))


def _number(line: str) -> int | None:
    try:
        return json.loads(line)["total"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None  # the line that the kill cut short


def reseed(seed: int, total: int, block: int) -> None:
    """The noise of a step (LoRA's dropout) depends on its number and on the first block it is for, on no process."""
    torch.manual_seed(hash((seed, total, block)) % (1 << 63))
