"""The plan: what a run will do, how much memory it needs, and whether that is there, all before anything is loaded.

Stages are data: a name, an objective, a block length T, blocks a step, steps and a peak learning rate. `stages` fills
in what the user left out; `memory` adds up what each part will take; `refuse_if_too_large` compares that with the
machine and names the flag that helps.

The learning rates.  Adam moves every weight by about its rate a step whatever the gradient's size, and the wider a
layer, the more such moves add up in its output. Two points fix a power law in the width C: 2e-3 was best at C = 576
(135M parameters, stage 1) and the paper uses 2e-5 at C = 4096, hence lr = 2e-3 (576 / C)^2.3. Stage 2 takes a sixth
of it, as was best at C = 576. Between and beyond the two points this is a guess: try a few.

Memory.  What autograd keeps of a layer is listed tensor by tensor in `layer_bytes` and tested against the bytes that
torch's saved-tensor hooks count; weights, gradients and Adam's moments are arithmetic; the logits of a chunk and the
buffers of one relation live for a moment only. A tenth is added for what the allocator loses.

Work.  `flops` counts the products of matrices and nothing else, a multiplication and an addition as two. A linear layer
of n weights costs 2 n a token forward, 2 n for the gradient of its input, 2 n for that of its weights where they
learn; causal attention 4 D H T^2 / 2 a block and layer forward and twice that backward; a relation 12 D T^2 / 2 a head,
forward and backward (relation_kl.py). What activation checkpointing computes again is not counted, nor is the gradient
for the first layer's input, which nobody needs. MFU is this count over seconds over the rate of a large matrix product.

Limits.  Memory is that of one process. The sliding window of a teacher saves work that is counted here.
"""

import math
from dataclasses import dataclass, replace

import torch

from model import TRAINED, LlamaConfig

HEAD_CHUNK = 4096  # tokens whose logits exist at once, see model.next_token_loss


@dataclass(frozen=True)
class Stage:
    name: str  # "stage1" or "stage2"
    objective: str  # "relation": distill.py; "next token": cross-entropy
    T: int
    batch: int  # blocks a step, over all processes
    steps: int
    lr: float
    logits: bool = False  # stage 1: the next-token distributions are compared too, distill.py

    @property
    def tokens(self) -> int:
        return self.T * self.batch * self.steps


def stages(args, config: LlamaConfig, length: int) -> list[Stage]:
    """The stages that --stage asks for: stage 1 at the native length, stage 2 at the extended `length`."""
    lr = 2e-3 * (576 / config.width) ** 2.3
    first = _stage(
        "stage1",
        "relation",
        args.length1 or config.rope.length,
        args.batch1,
        args.tokens1,
        args.lr1 or lr,
    )
    first = replace(first, logits=args.logit_weight > 0)
    second = _stage(
        "stage2",
        "next token",
        args.length2 or length,
        args.batch2,
        args.tokens2,
        args.lr2 or lr / 6,
    )
    return {"1": [first], "2": [second], "both": [first, second]}[args.stage]


def _stage(name: str, objective: str, T: int, batch: int | None, tokens: int, lr: float) -> Stage:
    batch = batch or max(1, 16384 // T)
    return Stage(name, objective, T, batch, max(1, round(tokens / (T * batch))), float(f"{lr:.2g}"))


def parameters(c: LlamaConfig) -> tuple[int, int]:
    """(all, those of q_proj, k_proj and v_proj) of a network of this shape."""
    qkv = c.width * c.head_dim * (c.n_head + 2 * c.n_kv_head) + c.qkv_bias * c.head_dim * (
        c.n_head + 2 * c.n_kv_head
    )
    rest = (
        c.n_head * c.head_dim * c.width
        + 3 * c.width * c.mlp_width
        + 2 * c.width
        + c.qk_norm * 2 * c.head_dim
    )
    heads = c.vocab_size * c.width * (1 if c.tied else 2) + c.width
    biases = c.out_bias * c.width + c.mlp_bias * (2 * c.mlp_width + c.width)
    return c.n_layer * (qkv + rest + biases) + heads, c.n_layer * qkv


def trained_parameters(c: LlamaConfig, rank: int | None) -> int:
    """How many numbers learn: the q, k and v projections, or adapters of `rank` beside them."""
    if not rank:
        return parameters(c)[1]
    return c.n_layer * rank * (3 * c.width + c.head_dim * (c.n_head + 2 * c.n_kv_head))


def layer_bytes(c: LlamaConfig, b: int, full: bool, rank: int | None, last: bool = False) -> int:
    """Bytes a token that autograd keeps of one student layer computed in `b` bytes; `last`: ends at q, k and v.

    full: q, k and v learn whole, so that their input is kept; rank: of their adapters.
    """
    heads, C, M = c.n_head + 2 * c.n_kv_head, c.width, c.mlp_width
    projections = 4 * C + 4  # RMSNorm: its input in float32 and one factor
    projections += b * C * bool(full or rank)  # its output, the input of q, k and v
    projections += b * heads * c.head_dim  # q, k, v as attention and the relations take them
    projections += 3 * b * (rank or 0)  # between the two adapter matrices
    if c.qk_norm:  # again an input in float32, and a factor
        projections += (c.n_head + c.n_kv_head) * (4 * c.head_dim + 4)
    if last:
        return projections
    attention = b * c.n_head * c.head_dim + 4 * c.n_head  # its output and log-sum-exps
    return (
        projections + attention + 4 * C + 4 + 3 * b * M
    )  # the second norm; gate, silu(gate) and up


def activation_bytes(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    micro: int,
    checkpointing: bool,
    rank: int | None = None,
) -> dict[str, int]:
    """Bytes that `micro` blocks keep for the backward: of layers, and beside them relations or logits."""
    b, tokens = torch.finfo(dtype).bits // 8, micro * stage.T
    heads, stage1 = c.n_head + 2 * c.n_kv_head, stage.objective == "relation"
    one, cut = layer_bytes(c, b, not rank, rank), stage1 and not stage.logits
    if (
        checkpointing
    ):  # a layer's inputs, of both models in stage 1, and one layer while it is computed again
        kept = c.n_layer * b * c.width * (2 if stage1 else 1) + one
    else:
        kept = (c.n_layer - cut) * one + cut * layer_bytes(c, b, not rank, rank, last=True)
        kept -= (
            4 * c.width if b == 4 or not rank else 0
        )  # the embeddings, frozen, need no norm's backward
    kept += (
        0 if cut else b * c.width + 4 * c.width + 4 + 8
    )  # the last norm's input and output, the targets
    beside = {}
    if stage1:  # the teacher's q, k and v; they are the only ones kept beside the student's
        beside["relations"] = tokens * heads * c.head_dim * b * (1 if checkpointing else c.n_layer)
    if not cut:  # logits as the head gives them, in float32, their log-softmax and its gradient; the teacher's
        beside["logits"] = (
            min(HEAD_CHUNK, tokens) * c.vocab_size * ((0 if b == 4 else b) + 12 + 8 * stage1)
        )
    if b == 2:  # autograd keeps the bfloat16 copies of float32 weights
        kept_casts = (
            (1 if checkpointing else c.n_layer) * b * trained_parameters(c, rank) // c.n_layer
        )
    return {"activations": kept * tokens + (kept_casts if b == 2 else 0)} | beside


def memory(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    micro: int,
    checkpointing: bool,
    rank: int | None = None,
    shards: int = 1,
) -> dict[str, int]:
    """Bytes by part for one process working on `micro` blocks at a time; `shards`: over how many --shard cuts."""
    b = torch.finfo(dtype).bits // 8
    everything, qkv = parameters(c)
    ends = c.vocab_size * c.width * (1 if c.tied else 2) + c.width
    trained = trained_parameters(c, rank)
    parts = {
        "frozen and shared weights": ends * b + (everything - qkv - ends) * b // shards,
        "teacher's q, k, v": qkv * b // shards,
        "trained weights, gradients, Adam": trained * 16 // shards,
    }
    if shards > 1:  # the layer at work and the next one, gathered, and the gradients of one
        parts["gathered layers"] = (
            2 * (everything - ends + trained) * b + 4 * trained
        ) // c.n_layer
    parts |= activation_bytes(c, stage, dtype, micro, checkpointing, rank)
    # One relation's student in float32 and its gradient, and what it hands on: the largest is Q/Q
    parts["at work"] = micro * stage.T * (4 * 3 * c.n_head * c.head_dim + 2 * b * c.mlp_width)
    return parts | {"allocator, a tenth": sum(parts.values()) // 10}


def needs_checkpointing(need: dict[str, int], free: int) -> bool:
    """Recompute activations only where the machine has no room to keep them."""
    return sum(need.values()) > 0.8 * free


def settle(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    micro: int | None,
    rank,
    shards: int,
    own: int,
    free: int,
):
    """(blocks at a time, checkpointing, memory by part) of a process that does `own` blocks of each step."""
    micro = min(micro or max(1, 8192 // stage.T), own)
    checkpointing = needs_checkpointing(memory(c, stage, dtype, micro, False, rank, shards), free)
    return micro, checkpointing, memory(c, stage, dtype, micro, checkpointing, rank, shards)


def flops(c: LlamaConfig, stage: Stage, rank: int | None = None) -> dict[str, float]:
    """Floating-point operations of one step, over all processes, by part (the module's docstring has the rule)."""
    L, heads = c.n_layer, c.n_head + 2 * c.n_kv_head
    qkv = 2 * c.width * c.head_dim * heads  # forward, a token and layer
    rest = 2 * c.n_head * c.head_dim * c.width + 6 * c.width * c.mlp_width
    attention = 2 * c.head_dim * c.n_head * stage.T
    adapters = 2 * trained_parameters(c, rank) / L if rank else 0
    learning = 2 * adapters if rank else qkv
    stage1 = stage.objective == "relation"
    cut = stage1 and not stage.logits  # the last layer ends at its q, k and v, and there is no head
    layers, head = L - cut, 0 if cut else 2 * c.width * c.vocab_size
    forward = L * qkv + layers * (rest + attention) + head
    parts = {"teacher forward": forward} if stage1 else {}
    parts["student forward"] = forward + L * adapters
    if stage1:
        parts["relation"] = L * 6 * c.head_dim * stage.T * heads
    parts["backward"] = L * learning + (L - 1) * qkv + layers * (rest + 2 * attention) + head
    return {k: v * stage.T * stage.batch for k, v in parts.items()}


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))


def refuse_if_too_large(parts: dict[str, int], free: int, stage: Stage) -> None:
    need = sum(parts.values())
    if need > free:
        raise ValueError(
            f"{stage.name} needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; {remedy(stage)}"
        )


class OutOfMemory(ValueError):
    """The device's memory ran out during a step, on one process or more."""

    def __init__(self, stage: Stage, device: torch.device):
        super().__init__(
            f"{stage.name} ran out of memory on {device}: {remedy(stage)}. The last saved state is kept"
        )


def remedy(stage: Stage) -> str:
    """The flags that help where memory is short."""
    n = stage.name[-1]
    return (
        f"lower --length{n} (now {stage.T}) or --micro, train adapters with --lora-rank, spread the model over several "
        "GPUs with torchrun and --shard, or use a larger machine"
    )


def describe(
    c: LlamaConfig, student: LlamaConfig, plan: list[Stage], parts: list[dict[str, int]], rank=None
) -> str:
    """What is printed before the run: the positions old and new, the parameters, the stages and their memory."""
    everything, _ = parameters(c)
    lines = [f"{'':12}{'kind':>10}{'factor':>9}{'theta':>12}{'length':>10}"]
    for name, config in (("teacher", c), ("student", student)):
        r = config.rope
        lines.append(f"{name:12}{r.kind:>10}{r.factor:>9g}{r.theta:>12g}{r.length:>10,}")
    lines.append(
        f"parameters  {everything:,} in all, {trained_parameters(c, rank):,} trained ({', '.join(TRAINED)})"
    )
    if c.window:
        lines.append(
            f"the teacher attends over a sliding window of {c.window:,}; the student over its whole length"
        )
    for stage, part in zip(plan, parts, strict=True):
        lines.append(
            f"{stage.name}      {stage.objective}, {stage.steps} steps of {stage.batch} x {stage.T:,} tokens "
            f"({stage.tokens / 1e6:.2f}M), learning rate {stage.lr:g}, about {sum(part.values()) / 2**30:.1f} GiB:"
        )
        lines.append("            " + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in part.items()))
    return "\n".join(lines)


def describe_time(
    c: LlamaConfig, plan: list[Stage], rank: int | None, rate: float, size: int, given: bool
) -> str:
    """The work of each stage, and its time at half of `rate` flop/s on each of `size` devices."""
    lines = []
    for stage in plan:
        work = {k: v * stage.steps for k, v in flops(c, stage, rank).items()}
        seconds = sum(work.values()) / (0.5 * rate * size)
        shares = ", ".join(f"{k} {v / sum(work.values()):.0%}" for k, v in work.items())
        lines.append(
            f"{stage.name}      {sum(work.values()):.3g} flop ({shares}); at half of the "
            f"{'given' if given else 'measured'} {size} x {rate / 1e12:.3g} TFLOP/s about {clock(seconds)}"
        )
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """12s, 3m20s, 5h07m."""
    s = round(seconds)
    return (
        f"{s}s"
        if s < 60
        else f"{s // 60}m{s % 60:02d}s"
        if s < 3600
        else f"{s // 3600}h{s % 3600 // 60:02d}m"
    )


def learning_rate(stage: Stage, step: int) -> float:
    """Up over the first twentieth, never from 0, then down in a straight line to a fiftieth."""
    warm = math.ceil(stage.steps / 20)
    return stage.lr * min(
        (step + 1) / (warm + 1), max(0.02, (stage.steps - step) / max(1, stage.steps - warm))
    )
