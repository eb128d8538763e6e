"""The plan: what a run will do, how much memory it needs, and whether that is there, all before anything is loaded.

Stages are data: a name, an objective, a block length T, blocks a step, steps and a peak learning rate. `stages` fills
in what the user left out; `memory` adds up what each part will take; `refuse_if_too_large` compares that with the
machine and names the flag that helps.

The learning rates.  Adam moves every weight by about its rate a step whatever the gradient's size, and the wider a
layer, the more such moves add up in its output. Two points fix a power law in the width C: 2e-3 was best at C = 576
(135M parameters, stage 1) and the paper uses 2e-5 at C = 4096, hence lr = 2e-3 (576 / C)^2.3. Stage 2 takes a sixth
of it, as was best at C = 576. Between and beyond the two points this is a guess: try a few.

Limits.  Memory is counted for one process and adds a tenth for what the allocator loses; time is not predicted on a
machine that has not yet run a step.
"""

import math
from dataclasses import dataclass

import torch

from distill import TRAINED
from model import LlamaConfig

HEAD_CHUNK = 4096  # tokens whose logits exist at once, see model.next_token_loss


@dataclass(frozen=True)
class Stage:
    name: str  # "stage1" or "stage2"
    objective: str  # "relation": distil.py; "next token": cross-entropy
    T: int
    batch: int  # blocks a step, over all processes
    steps: int
    lr: float

    @property
    def tokens(self) -> int:
        return self.T * self.batch * self.steps


def stages(args, config: LlamaConfig, length: int) -> list[Stage]:
    """The stages that --stage asks for: stage 1 at the native length, stage 2 at the extended `length`."""
    lr = 2e-3 * (576 / config.width) ** 2.3
    first = _stage("stage1", "relation", args.length1 or config.rope.length, args.batch1, args.tokens1, args.lr1 or lr)
    second = _stage("stage2", "next token", args.length2 or length, args.batch2, args.tokens2, args.lr2 or lr / 6)
    return {"1": [first], "2": [second], "both": [first, second]}[args.stage]


def _stage(name: str, objective: str, T: int, batch: int | None, tokens: int, lr: float) -> Stage:
    batch = batch or max(1, 16384 // T)
    return Stage(name, objective, T, batch, max(1, round(tokens / (T * batch))), float(f"{lr:.2g}"))


def parameters(c: LlamaConfig) -> tuple[int, int]:
    """(all, those of q_proj, k_proj and v_proj) of a network of this shape."""
    qkv = c.width * c.head_dim * (c.n_head + 2 * c.n_kv_head) + c.qkv_bias * c.head_dim * (c.n_head + 2 * c.n_kv_head)
    rest = c.n_head * c.head_dim * c.width + 3 * c.width * c.mlp_width + 2 * c.width + c.qk_norm * 2 * c.head_dim
    heads = c.vocab_size * c.width * (1 if c.tied else 2) + c.width
    biases = c.out_bias * c.width + c.mlp_bias * (2 * c.mlp_width + c.width)
    return c.n_layer * (qkv + rest + biases) + heads, c.n_layer * qkv


def trained_parameters(c: LlamaConfig, rank: int | None) -> int:
    """How many numbers learn: the q, k and v projections, or adapters of `rank` beside them."""
    if not rank:
        return parameters(c)[1]
    return c.n_layer * rank * (3 * c.width + c.head_dim * (c.n_head + 2 * c.n_kv_head))


def memory(
    c: LlamaConfig, stage: Stage, dtype: torch.dtype, micro: int, checkpointing: bool, trained: int
) -> dict[str, int]:
    """Bytes by part for one process working on `micro` blocks at a time with `trained` float32 parameters."""
    b = 2 if dtype != torch.float32 else 4
    tokens = micro * stage.T
    everything, qkv = parameters(c)
    heads = c.n_head + 2 * c.n_kv_head
    # What autograd keeps of one layer, a token: h and both norms (float32 inside and in the compute dtype), q, k, v
    # before and after the turn, attention's output and statistics, the MLP's gate, silu, up and product.
    layer = tokens * (
        4 * 2 * 2 * c.width + b * (6 * c.width + 4 * heads * c.head_dim + c.n_head * c.head_dim + 4 * c.mlp_width)
    )
    both = 2 if stage.objective == "relation" else 1
    kept = tokens * c.width * b * both * c.n_layer + layer if checkpointing else layer * c.n_layer
    logits = min(HEAD_CHUNK, tokens) * c.vocab_size * (b + 4 + 4)
    relation = (
        2 * tokens * heads * c.head_dim * b * (2 if checkpointing else c.n_layer)
    )  # teacher's and student's q, k, v
    parts = {
        "frozen and shared weights": (everything - qkv) * b,
        "teacher's q, k, v": qkv * b,
        "trained weights, gradients, Adam": trained * 16,
        "activations": kept,
        "relations" if both == 2 else "logits": relation if both == 2 else logits,
    }
    return parts | {"allocator, a tenth": sum(parts.values()) // 10}


def needs_checkpointing(c: LlamaConfig, stage: Stage, dtype: torch.dtype, micro: int, trained: int, free: int) -> bool:
    """Recompute activations only where the machine has no room to keep them."""
    return sum(memory(c, stage, dtype, micro, False, trained).values()) > 0.8 * free


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))


def refuse_if_too_large(parts: dict[str, int], free: int, stage: Stage) -> None:
    need = sum(parts.values())
    if need > free:
        flag = "--length1" if stage.name == "stage1" else "--length2"
        raise ValueError(
            f"{stage.name} needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            f"lower {flag} (now {stage.T}), train adapters with --lora-rank, or use a larger machine"
        )


def describe(c: LlamaConfig, student: LlamaConfig, plan: list[Stage], parts: list[dict[str, int]], trained: int) -> str:
    """What is printed before the run: the positions old and new, the parameters, the stages and their memory."""
    everything, _ = parameters(c)
    lines = [f"{'':12}{'kind':>10}{'factor':>9}{'theta':>12}{'length':>10}"]
    for name, config in (("teacher", c), ("student", student)):
        r = config.rope
        lines.append(f"{name:12}{r.kind:>10}{r.factor:>9g}{r.theta:>12g}{r.length:>10,}")
    lines.append(f"parameters  {everything:,} in all, {trained:,} trained ({', '.join(TRAINED)})")
    if c.window:
        lines.append(f"the teacher attends over a sliding window of {c.window:,}; the student over its whole length")
    for stage, part in zip(plan, parts, strict=True):
        lines.append(
            f"{stage.name}      {stage.objective}, {stage.steps} steps of {stage.batch} x {stage.T:,} tokens "
            f"({stage.tokens / 1e6:.2f}M), learning rate {stage.lr:g}, about {sum(part.values()) / 2**30:.1f} GiB:"
        )
        lines.append("            " + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in part.items()))
    return "\n".join(lines)


def learning_rate(stage: Stage, step: int) -> float:
    """Up over the first twentieth, never from 0, then down in a straight line to a fiftieth."""
    warm = math.ceil(stage.steps / 20)
    return stage.lr * min((step + 1) / (warm + 1), max(0.02, (stage.steps - step) / max(1, stage.steps - warm)))
