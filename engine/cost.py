"""What a step costs: bytes kept, floating-point operations done, and what the machine has of both.

Memory.  What autograd keeps of a layer is listed tensor by tensor in `layer_bytes` and tested
against the bytes that torch's saved-tensor hooks count; weights, gradients and Adam's moments are
arithmetic; the logits of a chunk and the buffers of one relation live for a moment only. What is
foretold is the allocator's peak; engine/fit.py leaves room for what it loses between its blocks.

Work.  `flops` counts the products of matrices and nothing else, a multiplication and an addition as
two. A linear layer of n weights costs 2 n per token forward, 2 n for the gradient of its input, 2 n
for that of its weights where they learn; causal attention 4 D H T^2 / 2 per block and layer forward
and twice that backward; a relation 12 D T^2 / 2 per head, forward and backward (relation_kl.py).
What activation checkpointing computes again is not counted, nor is the gradient for the first
layer's input, which nobody needs. MFU is this count over seconds over the rate of a large matrix
product.

Limits.  Memory is that of one process. The sliding window of a teacher saves work that is counted
here.

Source.  Counting rules as in PaLM (arXiv 2204.02311), appendix B; a relation's six products:
relation_kl.py.
"""

import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.parallel import Reducer
from engine.quant import BYTES as PACKED_BYTES
from engine.sequence import repeats
from engine.tiles import Tiles, calls_of_attention
from kernel_cpu import numbers_kept
from model import LlamaConfig
from relation_kl import workspace_bytes

PRODUCT = {"cuda": 8192, "cpu": 1024}  # n of the n^3 product that a machine's rate is taken from
# Where a container's limit and its use stand, by the two versions of Linux's cgroups
CGROUP = Path("/sys/fs/cgroup")
CGROUPS = (
    (CGROUP / "memory.max", CGROUP / "memory.current"),
    (CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.usage_in_bytes"),
)
_FILES = ("inactive_file", "active_file")  # read from disk, and given up when memory is asked for
HEAD_CHUNK = 4096  # tokens whose logits exist at once, see model.next_token_loss


@dataclass(frozen=True)
class Stage:
    name: str  # "stage1" or "stage2"
    objective: str  # "relation": as the teacher relates tokens; "next token": cross-entropy
    T: int
    batch: int  # blocks per step, over all processes
    steps: int
    lr: float
    logits: bool = False  # "relation": the next-token distributions are compared too
    relations: str = "qkv"  # "relation": those that count
    teacher_share: float = 0.0  # "next token": of the target that is the teacher's distribution
    skips: int = 0  # places in which blocks are cut, and their parts moved on, in every other step
    auxiliary: "Stage | None" = None  # blocks of the other objective in the same steps

    @property
    def tokens(self) -> int:
        return self.T * self.batch * self.steps


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


def trained_tensors(c: LlamaConfig, rank: int | None) -> list[int]:
    """Numbers in each tensor of a layer that learns: weights and biases of the q, k and v
    projections, or the two matrices of each one's adapter of `rank`.
    """
    out = [c.head_dim * heads for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
    if rank:
        return 3 * [rank * c.width] + [rank * n for n in out]
    return [c.width * n for n in out] + c.qkv_bias * out


def trained_parameters(c: LlamaConfig, rank: int | None) -> int:
    """How many numbers learn, in all layers."""
    return c.n_layer * sum(trained_tensors(c, rank))


def layer_bytes(
    c: LlamaConfig,
    b: int,
    full: bool,
    rank: int | None,
    wide: bool = False,
    last: bool = False,
    fused: bool = False,
) -> int:
    """Bytes per token that autograd keeps of one student layer computed in `b` bytes per number.

    full: q, k and v learn whole, so that their input is kept; rank: of their adapters. wide:
    attention computes in float32 where the layer does not, on copies; last: ends at q, k and v;
    fused: norms and gate are kernel_glue.py's.
    """
    heads, C, M = c.n_head + 2 * c.n_kv_head, c.width, c.mlp_width
    norm = b if fused else 4  # RMSNorm keeps its input as it is; else in float32, and one factor
    projections = norm * C + 4
    projections += b * C * bool(full or rank)  # its output, the input of q, k and v
    projections += b * heads * c.head_dim  # q, k, v as attention and the relations take them
    projections += 3 * b * (rank or 0)  # between the two adapter matrices
    if c.qk_norm:
        projections += (c.n_head + c.n_kv_head) * (norm * c.head_dim + 4)
    if last:
        return projections
    attention = (4 if wide else b) * c.n_head * c.head_dim + 4 * c.n_head  # output, log-sum-exps
    attention += 4 * heads * c.head_dim * wide  # its own q, k and v
    mlp = norm * C + 4 + (2 if fused else 3) * b * M  # its norm; gate, silu(gate) and up
    return projections + attention + mlp


def activation_bytes(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    micro: int,
    recomputed: int,
    rank: int | None = None,
    attention: torch.dtype | None = None,
    fused: bool = False,
    gpu: bool = False,
) -> dict[str, int]:
    """Bytes that `micro` blocks keep for the backward, by part: layers; relations, logits; and one
    of the first `recomputed` layers while it is computed again.

    dtype: of the activations; attention: what it computes in, `dtype` if None; fused: see
    layer_bytes; gpu: the relation loss keeps what the GPU's kernels do.
    """
    b, tokens = torch.finfo(dtype).bits // 8, micro * stage.T
    wide = attention is not None and attention != dtype
    heads, stage1 = c.n_head + 2 * c.n_kv_head, stage.objective == "relation"
    one, cut = layer_bytes(c, b, not rank, rank, wide, fused=fused), stage1 and not stage.logits
    if wide and not stage1:  # only the relations keep q, k and v as the layer made them
        one -= b * heads * c.head_dim
    whole, norm = c.n_layer - recomputed, b if fused else 4
    kept = recomputed * b * c.width * (2 if stage1 else 1)  # the inputs, of both models in stage 1
    kept += whole * one
    if cut and whole:
        kept -= one - layer_bytes(c, b, not rank, rank, wide, last=True, fused=fused)
    if not recomputed and (b == 4 or not rank):
        kept -= norm * c.width  # the embeddings, frozen, need no norm's backward
    if not cut:
        kept += b * c.width + norm * c.width + 4 + 8  # the last norm's in- and output, the targets
    beside = {}
    if stage1:  # the teacher's q, k and v, the only ones kept beside the student's
        beside["relations"] = tokens * heads * c.head_dim * b * (whole or 1)
        # and the loss's numbers per head: four a row, or five; and the tiled loss's G
        each = 4 * stage.T if gpu else numbers_kept(stage.T)
        beside["relations"] += micro * heads * 4 * (whole * each + recomputed * 5 * stage.T)
    if not cut:
        beside["logits"] = min(HEAD_CHUNK, tokens) * c.vocab_size * logit_bytes(stage, b)
    if stage.teacher_share:
        beside["teacher's h"] = tokens * c.width * b
    # autograd keeps the bfloat16 copies of float32 weights
    copies = b * trained_parameters(c, rank) // c.n_layer if b == 2 else 0
    beside["activations"] = kept * tokens + whole * copies
    if recomputed:
        beside["a layer again"] = one * tokens + copies
    return beside


def logit_bytes(stage: Stage, b: int) -> int:
    """Bytes per logit at the head's peak: as the head gives it, in b bytes; in float32, its
    log-softmax and its gradient. The teacher adds two numbers in a KL, and one where it has a share
    of the target.
    """
    teacher = 8 if stage.objective == "relation" else 4 if stage.teacher_share else 0
    return (0 if b == 4 else b) + 12 + teacher


def memory(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    micro: int,
    recomputed: int,
    *,
    rank: int | None = None,
    shards: int = 1,
    processes: int = 1,
    attention: torch.dtype | None = None,
    per_rank: int | None = None,
    tiles: Tiles | None = None,
    P: int = 1,
    fused: bool = False,
    gpu: bool = False,
    bits: int | None = None,
    gathered: bool = False,
) -> dict[str, int]:
    """Bytes by part for one process working on `micro` of its `per_rank` blocks at a time, the
    first `recomputed` layers computed again in the backward. The stage's `auxiliary` is left out.

    shards: over how many --shard cuts; processes: how many sum their gradients where it cuts
    nothing; attention: what it computes in, `dtype` if None; tiles: how a long block is done, of
    which P processes do a share each; fused, gpu: see activation_bytes; bits: of frozen matrices,
    if they are packed (engine/quant.py); gathered: what is cut is gathered once a step
    (engine/parallel.py). The peak is where the parts are largest together.
    """
    b, trained = dtype.itemsize, trained_parameters(c, rank)
    parts = weight_bytes(c, b, rank, shards, bits, gathered)
    copied = bucket_bytes(c, rank) if processes > 1 and shards == 1 else 0
    if copied:
        parts["gradients in buckets"] = copied
    # These come as what layers keep goes: buckets and, of one micro-batch, all gradients
    come = copied + (4 * trained // shards if micro == per_rank else 0)
    if tiles:
        kept = tiled_bytes(c, stage, dtype, micro, rank, tiles, P)
        goes = sum(kept[k] for k in ("layers' inputs", "attention's outputs", "q, k and v"))
        parts["trained weights, gradients, Adam"] -= min(come, goes)
        return parts | kept
    kept = activation_bytes(c, stage, dtype, micro, recomputed, rank, attention, fused, gpu)
    if shards > 1 and b == 2:  # its copies are what is gathered
        copies = b * trained // c.n_layer
        kept["activations"] -= (c.n_layer - recomputed) * copies
        if recomputed:
            kept["a layer again"] -= copies
    # A relation's student in float32 and its gradient, and what it hands on: Q/Q is the largest
    work = micro * stage.T * (4 * 3 * c.n_head * c.head_dim + 2 * b * c.mlp_width)
    if not recomputed:
        return parts | kept | {"at work": work}
    inputs = recomputed * b * c.width * micro * stage.T
    inputs *= 2 if stage.objective == "relation" else 1
    layers, again = kept.pop("activations"), kept.pop("a layer again")
    most = max(
        layers + max(work, kept.pop("logits", 0)),  # where the backward begins,
        inputs + again + work + come * (c.n_layer - recomputed) // c.n_layer,
        again + work + come,  # comes to the layers computed again, and ends
    )
    return parts | kept | {"layers": most - come}


def weight_bytes(
    c: LlamaConfig,
    b: int,
    rank: int | None,
    shards: int,
    bits: int | None,
    gathered: bool = False,
) -> dict[str, int]:
    """Bytes by part of both models' weights in `b` bytes per number, and of what is there for those
    that learn; shards, bits, gathered: see memory.
    """
    everything, qkv = parameters(c)
    ends = c.vocab_size * c.width * (1 if c.tied else 2) + c.width
    trained = trained_parameters(c, rank)
    held = PACKED_BYTES if bits else b  # of a number in the layers
    parts = {
        "frozen and shared weights": ends * b + int((everything - qkv - ends) * held) // shards,
        "teacher's q, k, v": int(qkv * held) // shards,
        "trained weights, gradients, Adam": trained * 16 // shards,
    }
    if bits:
        parts["a matrix unpacked"] = c.width * max(c.mlp_width, c.n_head * c.head_dim) * b
    if shards > 1:  # the layer at work, or all, and one that comes; the gradients of one
        layers = c.n_layer + 1 if gathered else 2
        parts["gathered layers"] = (
            layers * (everything - ends + trained) * b + 4 * trained
        ) // c.n_layer
    return parts


def bucket_bytes(c: LlamaConfig, rank: int | None) -> int:
    """Bytes of the gradients that are copied before they are summed over processes: the small ones
    (engine/parallel.py). The copies are there until a step's backward has ended.
    """
    small = [n for n in trained_tensors(c, rank) if 4 * n < Reducer.BUCKET]
    return 4 * c.n_layer * sum(small)


def tiled_bytes(
    c: LlamaConfig,
    stage: Stage,
    dtype: torch.dtype,
    micro: int,
    rank: int | None,
    tiles: Tiles,
    P: int = 1,
) -> dict[str, int]:
    """Bytes that a pass in tiles (engine/tiles.py) holds on the GPU at its peak, by part."""
    b, T, related = dtype.itemsize, -(-stage.T // P), stage.objective == "relation"
    tokens, C, models = micro * T, c.width, 2 if related else 1
    both = related or stage.teacher_share > 0  # models turn q and k
    heads = c.n_kv_head * repeats(c.n_kv_head, P)
    q = c.n_head * c.head_dim * b  # bytes per token of q, o, do
    qkv = q + 2 * heads * c.head_dim * b
    # the last layer's are counted as those of a layer at work
    inputs, outputs = max(0, tiles.on_gpu - 1), max(0, min(tiles.on_gpu, tiles.outputs) - 1)
    on_gpu = {
        "layers' inputs": inputs * models * C * b * tokens,
        "attention's outputs": outputs * output_bytes(c, b) * tokens,
        "q, k and v": max(0, tiles.qkv - 1) * qkv * tokens,
        "positions": 2 * (1 + both) * T * c.head_dim * b,
    }
    if stage.teacher_share:
        on_gpu["teacher's h"] = tokens * C * b
    if related:
        on_gpu["relations"] = c.n_layer * tokens * (c.n_head + 2 * heads) * 4 * 5
    # one layer at work: h and dh, q, k and v; then the larger of two
    held = (models + 1) * C * b + qkv
    calls = calls_of_attention(micro, c.n_head // P, heads // P, stage.T)
    # o, do, log-sum-exps; in stage 1 the relations' gradients
    attention = (2 * q + 4 * c.n_head + related * qkv) * tokens
    # of some heads the gradients and the kernel's own sums in float32
    some = (qkv + 5 * q) * tokens // calls
    tile = min(tiles.tokens, tokens) * (7 * c.mlp_width * b + 12 * C + 6 * C * b)
    tile += (8 + b) * trained_parameters(c, rank) // c.n_layer  # one layer's gradients, in sums
    # Some heads' backward begins when the last tile of do is done: the larger counts. With several
    # processes the exchanges hold copies too; both and 3 q are what was not exceeded
    attention += max(some, tile) if P == 1 else some + tile + 3 * q * tokens
    relations = 0
    if related:
        relations = 2 * qkv * tokens + tile
        relations += workspace_bytes(micro, c.n_head // P, stage.T, c.head_dim)
    layer = held * tokens + max(attention, relations)
    # The head comes after all layers: a chunk's logits and norm; h and its gradient, in chunks and
    # whole; what the last layer kept
    chunk = c.vocab_size * logit_bytes(stage, b) + 12 * C
    head = min(HEAD_CHUNK, tokens) * chunk + tokens * (models + 2) * C * b
    head += tokens * (models * C * b + output_bytes(c, b) + bool(tiles.qkv) * qkv)
    return on_gpu | {"a layer at work": max(layer, head)}


def output_bytes(c: LlamaConfig, b: int) -> int:
    """Bytes per token of attention's output and log-sum-exps in one layer."""
    return c.n_head * (c.head_dim * b + 4)


def host_bytes(
    c: LlamaConfig, stage: Stage, dtype: torch.dtype, micro: int, tiles: Tiles, P: int = 1
) -> int:
    """Bytes of the host's memory in which a pass in tiles keeps what the GPU has no room for."""
    b, tokens = dtype.itemsize, micro * -(-stage.T // P)
    inputs = (c.n_layer - tiles.on_gpu) * c.width * b * (1 + (stage.objective == "relation"))
    outputs = max(0, tiles.outputs - tiles.on_gpu) * output_bytes(c, b)
    return (inputs + outputs) * tokens


def at_a_time(stage: Stage, micro: int | None, own: int) -> int:
    """How many of its `own` blocks of a step a process works on at once: as many as fill 8192
    tokens.
    """
    return min(micro or max(1, 8192 // stage.T), own)


def flops(c: LlamaConfig, stage: Stage, rank: int | None = None) -> dict[str, float]:
    """Floating-point operations of one step, over all processes, by part (the module's docstring
    has the rule).
    """
    L, heads = c.n_layer, c.n_head + 2 * c.n_kv_head
    qkv, rest, attention = _forward_of_a_layer(c, stage.T)
    adapters = 2 * trained_parameters(c, rank) / L if rank else 0
    learning = 2 * adapters if rank else qkv
    stage1 = stage.objective == "relation"
    cut = stage1 and not stage.logits  # the last layer ends at its q, k and v, and there is no head
    layers, head = L - cut, 0 if cut else 2 * c.width * c.vocab_size
    forward = L * qkv + layers * (rest + attention) + head
    parts = {"teacher forward": forward} if stage1 or stage.teacher_share else {}
    parts["student forward"] = forward + L * adapters
    if stage1:
        parts["relation"] = L * 6 * c.head_dim * stage.T * heads
    parts["backward"] = L * learning + (L - 1) * qkv + layers * (rest + 2 * attention) + head
    parts = {k: v * stage.T * stage.batch for k, v in parts.items()}
    if stage.auxiliary:
        parts["relation blocks"] = sum(flops(c, stage.auxiliary, rank).values())
    return parts


def flops_again(c: LlamaConfig, stage: Stage, recomputed: int, tiles: Tiles | None) -> float:
    """Floating-point operations of one step that are done again in its backward, over all
    processes: with tiles (engine/tiles.py), or of the first `recomputed` layers.
    """
    qkv, rest, attention = _forward_of_a_layer(c, stage.T)
    models = 2 if stage.objective == "relation" else 1
    again = recomputed * models * (qkv + rest + attention)
    if tiles:  # the student's q, k, v twice, or once where they are kept; the teacher's once
        again = c.n_layer * (rest + (models + 1) * qkv) - tiles.qkv * qkv
        again += (c.n_layer - tiles.outputs) * attention
    again *= stage.T * stage.batch
    if stage.auxiliary:
        again += flops_again(c, stage.auxiliary, recomputed, tiles)
    return again


def _forward_of_a_layer(c: LlamaConfig, T: int) -> tuple[int, int, int]:
    """Floating-point operations per token of q, k and v; of all else; of attention over T."""
    qkv = 2 * c.width * c.head_dim * (c.n_head + 2 * c.n_kv_head)
    rest = 2 * c.n_head * c.head_dim * c.width + 6 * c.width * c.mlp_width
    return qkv, rest, 2 * c.head_dim * c.n_head * T


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        most = int(torch.cuda.get_per_process_memory_fraction(torch.device(device).index) * total)
        return min(free, most - torch.cuda.memory_reserved(device))
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes of the host's memory that are free, within the limit of a container."""
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    for limit, used in CGROUPS:
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
            lines = (used.parent / "memory.stat").read_text().splitlines()
            files = sum(int(n) for k, n in map(str.split, lines) if k in _FILES)
            free = min(free, max(0, int(most) - int(used.read_text()) + files))
    return free


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """flop/s of one large matrix product: the best of five."""
    n = PRODUCT[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        c = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    assert c.shape == (n, n)
    return 2 * n**3 / min(times[1:])


def peak_memory(device: torch.device) -> float:
    """GiB: what the GPU's allocator held at most, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def clock(seconds: float) -> str:
    """12s, 3m20s, 5h07m."""
    s = round(min(seconds, 1e15))
    return (
        f"{s}s"
        if s < 60
        else f"{s // 60}m{s % 60:02d}s"
        if s < 3600
        else f"{s // 3600}h{s % 3600 // 60:02d}m"
    )
