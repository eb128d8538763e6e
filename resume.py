"""Stopping and going on: training state that survives Ctrl-C, a kill at any moment, and a full disk.

What.  state/step-N/ holds state.safetensors (the trained weights and Adam's two moments, by name) and state.json (the
stage, the step, the figures so far, the arguments that matter). It is written beside its name, synced and renamed, so a
name that exists is complete; the last two are kept.

Why that is enough.  The k-th block of a run is a function of (seed, k) (data.py) and the noise of a step of its
number alone, so weights, moments and the step's number are the whole state: a resumed run has the losses and weights
of one that was never interrupted, to the bit, on the same hardware and library versions.

Signals.  Ctrl-C or SIGTERM asks for a stop: the step is finished, the state saved, the exit code is 3. A second one
kills at once.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint

STOPPED = 3  # exit code of a run that was asked to stop and saved its state
_KEEP = 2


class StopRequest:
    """True once SIGINT or SIGTERM came; the next one then has its usual effect."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.asked


def save(folder: Path, weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, info: dict) -> None:
    """Writes folder/step-<info["total"]>; raises OSError (a full disk, say) with everything older intact."""
    tensors = {}
    for name, p in weights.items():
        tensors[name] = p.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            if p in optimiser.state:
                tensors[f"{key}.{name}"] = optimiser.state[p][key]
    with checkpoint.atomic_directory(folder / f"step-{info['total']:08d}") as work:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, work / "state.safetensors")
        (work / "state.json").write_text(json.dumps(info) + "\n")
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete state, or None."""
    complete = sorted(folder.glob("step-*"))
    return complete[-1] if complete else None


def load_info(state: Path) -> dict:
    return checkpoint.read_json(state / "state.json")


def load(state: Path, weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer | None, step: int) -> None:
    """Puts weights and, unless None, Adam's moments back; `step` is how many updates the optimiser has made."""
    tensors = load_file(state / "state.safetensors")
    for name, p in weights.items():
        if name not in tensors or tensors[name].shape != p.shape:
            raise ValueError(f"{state} holds no {name} of shape {list(p.shape)}; it is another run's")
        p.data.copy_(tensors[name])
        if optimiser is not None and step:
            moments = {k: tensors[f"{k}.{name}"].to(p.device, p.dtype) for k in ("exp_avg", "exp_avg_sq")}
            optimiser.state[p] = {"step": torch.tensor(float(step)), **moments}


def same_run(saved: dict, now: dict) -> None:
    """Refuses to continue with a changed argument that matters, by name."""
    changed = [k for k in now if saved.get(k) != now[k]]
    if changed:
        said = "; ".join(f"{k} was {saved.get(k)!r} and is {now[k]!r}" for k in changed)
        raise ValueError(f"--resume: {said}; give the old values, or start anew with another --out")


def cut_log(file: Path, total: int) -> None:
    """Drops what an interrupted run logged after the state that is resumed."""
    if file.is_file():
        rows = [line for line in file.read_text().splitlines() if _number(line) is not None and _number(line) < total]
        checkpoint.write_atomic(file, "".join(f"{r}\n" for r in rows))


def _number(line: str) -> int | None:
    try:
        return json.loads(line)["total"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None  # the line that the kill cut short


def reseed(seed: int, total: int, rank: int) -> None:
    """The noise of a step (LoRA's dropout) depends on its number and the process alone."""
    torch.manual_seed(hash((seed, total, rank)) % (1 << 63))


def disk_sentence(e: OSError, folder: Path) -> str:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 2**20
    return f"cannot write to {folder}: {os.strerror(e.errno or 0)} ({free:.0f} MiB free); earlier states are intact"
