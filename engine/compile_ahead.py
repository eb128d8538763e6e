"""Kernels compiled while the teacher is loaded, the text tokenised and the table begun.

What.  Triton compiles a kernel when it is first called. On a machine that never ran this program a
7B run's first step waited 9 s for that (LOG.md, 2026-11-28). All that comes before it leaves a
core and the GPU to spare, so a thread compiles beside it.

How.  By one micro-batch of each stage, of its own shapes, through two layers of zeros: every kernel
is asked for as a step will ask for it, through the same code. Nothing of it is kept but what was
compiled. Zeros take no random numbers, and no bits of the run depend on it: layers that are
computed again set torch's own generator back, but until the first step nothing else draws from it
(adapters begin by one of their own, models.py).

Limits.  On a GPU alone; on a CPU nothing is compiled. In tiles two of them stand for all. What
several processes do together is left out, and so is the head, which has no kernel of ours.
"""

from dataclasses import replace

import torch

from engine.plan import Plan
from engine.states import Job
from engine.step import Step
from engine.tiles import Tiles
from model import Llama, make_student, trainable

LAYERS = 2  # one is computed again in the backward where a plan has both sorts


def compile_ahead(plan: Plan) -> Job | None:
    """Begins to compile what the steps of this plan will call; None where nothing is compiled."""
    if plan.device.type != "cuda":
        return None
    return Job(take_steps, plan, *make_models(plan))


def make_models(plan: Plan) -> tuple[Llama, Llama]:
    """Teacher and student of zeros. Not in the thread: while a thread makes a model on the meta
    device, torch holds that for the device of all.
    """
    small = {"n_layer": LAYERS, "vocab_size": 8}
    with torch.device("meta"):
        teacher = Llama(replace(plan.native, **small))
    teacher = teacher.to(plan.dtype).to_empty(device=plan.device)
    for p in teacher.parameters():
        p.data.zero_()
    teacher.requires_grad_(False).eval()
    return teacher, make_student(teacher, replace(plan.longer, **small))


def take_steps(plan: Plan, teacher: Llama, student: Llama) -> None:
    """One micro-batch of each stage."""
    for stage in plan.stages:
        how, fit = plan.how(stage), plan.fit(stage)
        T = stage.T // fit.P
        how["recomputed"] = _of_two(fit.recomputed, plan.native.n_layer)
        how |= {"gathered": False, "dropout": 0.0}  # no other process is asked, no noise drawn
        if fit.tiles:
            kept = [_of_two(n, plan.native.n_layer) for n in (fit.tiles.outputs, fit.tiles.qkv)]
            how["tiles"] = Tiles(fit.tiles.tokens, LAYERS, *kept, host=0)
            T = min(T, 2 * fit.tiles.tokens)
        step = Step(teacher, student, {}, **how, graphs=False)
        ids = torch.zeros(fit.micro, T + 1, dtype=torch.long, device=plan.device)
        step.zero()
        step.backward(replace(stage, T=T, auxiliary=None), ids, None, 1.0, last=True)
        step.close()
    # Its first use imports torch's compiler, 2 s
    torch.optim.AdamW(trainable(student).values(), fused=plan.fused)
    for model in (teacher, student):
        model.to_empty(device="meta")
    torch.cuda.empty_cache()  # the memory goes back, whole


def _of_two(n: int, layers: int) -> int:
    """n of `layers` as a number of LAYERS: none, all, or one where it is some."""
    return LAYERS if n >= layers else min(n, 1)
