"""Teacher and student of a run, as its plan says.

The student's tensors are the teacher's, but for what learns: float32 copies of q, k and v, or
adapters beside them (lora.py). With --move-pairs q and k begin with their rotary pairs in other
places (rope.py). With --bits 4 the layers' matrices are packed, once for both (quant.py); with
--shard both are cut over the processes (parallel.py), and until then they wait in the host's
memory.

Limits.  With --shard one process's host memory must hold a whole teacher and what learns.
"""

import torch

from engine import lora, parallel, quant
from engine.parallel import Unit, World
from engine.plan import Plan
from hub import checkpoint
from model import TRAINED, Llama, make_student, move_pairs, trainable


def make_models(plan: Plan, world: World) -> tuple[Llama, Llama, list[Unit] | None]:
    """(teacher, student, what --shard gathers at a time or None)."""
    args = plan.args
    place = "cpu" if args.shard or args.bits else str(plan.device)
    teacher = Llama.from_pretrained(args.teacher, dtype=plan.dtype, device=place)
    student = make_student(teacher, plan.longer, trained=() if args.lora_rank else TRAINED)
    if args.bits:
        quant.pack(teacher, student, plan.device)
    if args.lora_rank:
        # Not torch's own, which a thread that computes layers again sets back (compile_ahead.py)
        noise = torch.Generator(student.device).manual_seed(args.seed)
        lora.adapt(student, TRAINED, args.lora_rank, args.lora_alpha, args.lora_dropout, noise)
    else:  # the copies start from the stored numbers, not from their rounding to plan.dtype
        stored = checkpoint.read_tensors(args.teacher, list(trainable(student)))
        for name, value in stored.items():
            if value.dtype != plan.dtype:
                held = student.get_parameter(name).data
                held.copy_(value.to(held.device))
    if plan.pairs:
        move_pairs(student, plan.pairs)
    units = parallel.shard(teacher, student, world, plan.dtype) if args.shard else None
    return teacher, student, units
