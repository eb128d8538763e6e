"""Watching a run: a line per step, JSON lines, curves as a picture, and an end in one sentence when
numbers go bad.

What.  Every step leaves one JSON line in metrics.jsonl, which is the source of everything else:

    total, stage, step          total and step counted from 0, step within its stage
    loss, grad_norm, lr         the norm before clipping
    seconds, tokens_per_second, tflops, mfu, gib, eta_seconds
    relations, layers           with relation blocks: {Q/Q, K/K, V/V: mean KL over layers}, and
                                [the sum of the three in each layer]
    next_token_kl               with relation blocks, before its weight
    relation_loss               in stage 2, of the auxiliary native blocks
    lookups                     with --lookups, the share of the step's blocks (in stage 2: of the
                                long ones) that are look-up documents

gib is the peak so far: on a GPU of its memory; on a CPU of the whole process, with Python and
torch, which the plan leaves out. Stage 1's loss is mean(layers) + weight * next_token_kl, where all
three relations count; stage 2's is the next token's, by --teacher-share the KL from the teacher's
distribution instead. A terminal shows a bar, anything else about twenty plain lines per stage.
curves.png is drawn at each saved state but at most once a minute. --tensorboard and --wandb PROJECT
write the same figures to a board (boards.py).

Speed.  tflops is cost.flops over the seconds of the step, for all processes together, recomputation
not counted; mfu is that over the number of devices times `peak`, the rate of one large matrix
product, measured at the start in the dtype of the run (8192^3 on a GPU, 1024^3 on a CPU) or given
by --peak-tflops. The ETA takes the work that is left, in all stages, at the median speed of the
last 20 steps; measuring and exporting come on top.

Limits.  A step's seconds include waiting for the text and for other processes; the copy of a state
is not in them.
"""

import json
import math
import shutil
import time

import torch
from torch import Tensor
from tqdm import tqdm

from engine import cost, curves, data, parallel, resume
from engine.boards import Boards
from engine.folder import Folder
from engine.lookups import chosen
from engine.plan import Plan
from engine.states import Progress
from relation_kl import RELATIONS

SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "next_token_kl", "relation_loss")
SCHEMA = 2  # of metrics.jsonl, in run.json; raised when a key changes its meaning


class Figures:
    """One step's losses, summed on the device and read once: means over this process's blocks, then
    over all.
    """

    def __init__(self, layers: int, device: torch.device):
        # loss, relation loss, next-token KL, then the relations [L, 3]
        self.sums = torch.zeros(3 + 3 * layers, dtype=torch.float64, device=device)
        self.distils = self.predicts = False

    def add(self, part: cost.Stage, values: tuple[Tensor, ...], share: float) -> None:
        """Adds values, in nats, of weight `share`.

        values: (loss [],), or relation_loss's (loss [], relations [L, 3], next-token KL []).
        """
        if part.objective == "relation":
            self.distils = True
            loss, table, kl = values
            row = torch.cat([loss.view(1), kl.view(1), table.flatten()])
            self.sums[1:] += share * row.double()
        else:
            self.predicts = True
            self.sums[0] += share * values[0]

    def agree(self, world, *asked: bool) -> list[bool]:
        """Means over all processes; and of each thing asked, whether any process says so."""
        asked = torch.tensor(asked, device=self.sums.device, dtype=torch.float64)
        means = world.mean(torch.cat([asked, self.sums])).cpu()
        means, asked = means[len(asked) :], means[: len(asked)]
        next_token, relation, kl = means[:3].tolist()
        self.loss = next_token if self.predicts else relation
        self.relation_loss = relation if self.predicts and self.distils else None
        self.kl = kl if self.distils else None
        self.parts = means[3:].view(-1, 3) if self.distils else None
        return asked.bool().tolist()


class Watch:
    """The log of one run, on the first process."""

    def __init__(self, out: Folder, plan: Plan, processes: int, about: dict, at: Progress):
        """The first writing of a run: run.json, and the log without what the resumed state does not
        know.
        """
        out.write("run.json", json.dumps(about | {"schema": SCHEMA}, indent=1) + "\n")
        resume.cut_log(out, at.total)
        args, stages, config = plan.args, plan.stages, plan.native
        self.out, self.stages, self.peak, self.processes = out, stages, plan.peak, processes
        self.seed, self.share, self.weight = args.seed, args.lookups, args.logit_weight
        self.log = (out.path / "metrics.jsonl").open("a")
        out.add(*["tensorboard/"] * args.tensorboard, *["wandb/"] * bool(args.wandb))
        self.boards = Boards(out.path, args.tensorboard, args.wandb, about["arguments"])
        self.work = [sum(cost.flops(config, stage, args.lora_rank).values()) for stage in stages]
        self.recent: list[float] = []  # flop/s of the last steps
        self.bar, self.drawn = None, time.monotonic()

    def begin(self, number: int, first: int) -> None:
        """A stage starts, or goes on after `first` steps: its progress bar."""
        stage = self.stages[number]
        self.number, self.recent, self.losses = number, [], []
        self.bar = tqdm(
            desc=stage.name,
            total=stage.steps,
            initial=first,
            unit=" steps",
            disable=None,
            dynamic_ncols=True,
        )

    def step(
        self,
        total: int,
        step: int,
        figures: Figures,
        norm: float,
        lr: float,
        seconds: float,
        device,
    ) -> None:
        """Logs and shows one step."""
        stage, work = self.stages[self.number], self.work[self.number]
        self.recent = [*self.recent[-19:], work / seconds]
        later = zip(self.work[self.number + 1 :], self.stages[self.number + 1 :], strict=True)
        left = (stage.steps - step - 1) * work + sum(w * s.steps for w, s in later)
        tokens = sum(part.T * part.batch for part in (stage, stage.auxiliary) if part)
        row = {
            "total": total,
            "stage": stage.name,
            "step": step,
            "loss": figures.loss,
            "grad_norm": norm,
            "lr": lr,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds),
            "tflops": work / seconds / 1e12,
            "mfu": work / seconds / (self.peak * self.processes),
            "gib": cost.peak_memory(device),
            "eta_seconds": round(left / sorted(self.recent)[len(self.recent) // 2], 1),
        }
        if figures.parts is not None:
            row["relations"] = dict(zip(RELATIONS, figures.parts.mean(0).tolist(), strict=True))
            row["layers"] = figures.parts.sum(-1).tolist()
            row["next_token_kl"] = figures.kl
        if figures.relation_loss is not None:
            row["relation_loss"] = figures.relation_loss
        if self.share:
            seed, first = data.seed_of(self.seed, self.number), step * stage.batch
            documents = [bool(chosen(seed, first + i, self.share)) for i in range(stage.batch)]
            row["lookups"] = sum(documents) / stage.batch
        print(json.dumps(row), file=self.log, flush=True)
        self._show(row, stage)
        self._warn(row["loss"], stage)
        shown = {k: row[k] for k in SHOWN if k in row} | row.get("relations", {})
        self.boards.write(stage.name, step, row["total"], shown)

    def _show(self, row: dict, stage) -> None:
        """The bar, or a line; what does not fit the terminal is left out from the end."""
        shown = [f"loss {row['loss']:.4f}", f"ETA {cost.clock(row['eta_seconds'])}"]
        shown += [f"{row['tokens_per_second']:,} tokens/s", f"MFU {row['mfu']:.0%}"]
        shown += [f"{name} {value:.3g}" for name, value in row.get("relations", {}).items()]
        times = "" if self.weight == 1 else f"{self.weight:g} x "
        shown += [f"{times}KL {row['next_token_kl']:.3g}"] if row.get("next_token_kl") else []
        shown += [f"norm {row['grad_norm']:.2f}", f"lr {row['lr']:.2g}"]
        shown += [f"{row['tflops']:.3g} TFLOP/s", f"{row['gib']:.1f} GiB"]
        n = row["step"] + 1
        if self.bar.disable and (n == stage.steps or (n - 1) % max(1, stage.steps // 20) == 0):
            print(f"{stage.name} step {n}/{stage.steps}: {', '.join(shown)}", flush=True)
        room = shutil.get_terminal_size().columns - 60  # tqdm's own part
        while len(shown) > 2 and len(", ".join(shown)) > room:
            shown.pop()
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update()

    def _warn(self, loss: float, stage) -> None:
        """Once per stage, when the loss stands clearly above where it began."""
        self.losses.append(loss)
        if len(self.losses) != max(20, stage.steps // 5):
            return
        # Three at the start: a rate that is too high does harm at once
        began, now = self.losses[:3], self.losses[-10:]
        if sum(now) / len(now) > 1.2 * sum(began) / len(began):
            print(f"\nwarning: the loss of {stage.name} rose from {began[0]:.3f} to {now[-1]:.3f}; "
                  f"lower --lr{stage.name[-1]} (now {stage.lr:g})", flush=True)  # fmt: skip

    def end(self) -> None:
        """The stage is over."""
        self.bar.close()

    def draw(self, patience: float = 0.0) -> None:
        """Draws curves.png anew, unless it was drawn within the last `patience` seconds."""
        self.boards.flush()
        if time.monotonic() - self.drawn >= patience and self.log.tell():
            self.out.write("curves.png", curves.picture(self.out.path / "metrics.jsonl"))
            self.drawn = time.monotonic()

    def close(self) -> None:
        self.log.close()
        self.boards.close()


@torch.no_grad()
def refuse_non_finite(
    world, stage, step: int, figures: Figures, norm: float, weights, student, ids: Tensor, at
) -> None:
    """Raises ValueError, on all ranks, naming step, layer and blocks where loss or gradient is NaN
    or infinite.

    figures and norm are the means over all ranks; ids [B, T + 1] some of this rank's blocks.
    """
    losses = (figures.loss, figures.relation_loss or 0.0)
    if all(map(math.isfinite, (*losses, norm))):
        return
    where, parts = "", figures.parts
    if parts is not None and not torch.isfinite(parts).all():
        where = f", layer {int((~torch.isfinite(parts)).any(1).nonzero()[0])}"
    elif not all(map(math.isfinite, losses)):
        layer = int(world.min(_first_bad_layer(student, ids)))
        where = f", layer {layer}" if layer < student.config.n_layer else ", after the last layer"
    else:  # a backward runs from the last layer down: the last bad gradient was the first to go bad
        grads = [p.grad for p in weights.values()]
        finite = [g is None or bool(torch.isfinite(parallel.local(g)).all()) for g in grads]
        bad = [i for i, good in enumerate(finite) if not good]
        last = -int(world.min(-max(bad, default=-1)))
        where = f", in the gradient of {list(weights)[last]}" if last >= 0 else ""
    remedy = f"start anew, in another --out, with a lower --lr{stage.name[-1]}"
    if not at.total:
        remedy = "no weight has changed yet: the teacher's, or --logit-weight or --lora-alpha, is "
        remedy += "too large"
    first = step * stage.batch
    raise ValueError(
        f"{stage.name}, step {step}{where}: loss {figures.loss}, gradient norm {norm}, on blocks "
        f"{first}..{first + stage.batch - 1} of the run's order; {remedy}"
    )


def _first_bad_layer(student, ids: Tensor) -> int:
    """Runs the student once more: the first layer whose output is not finite, or their number.

    Goes through all layers, as other ranks may have to.
    """
    finite = [torch.isfinite(h).all() for h, _ in student.walk(ids[:, :-1])]
    return next((l for l, good in enumerate(finite) if not good), student.config.n_layer)
