"""How fast a training step is, and where its time goes: a named shape, random weights, the two
stages.

    python -m bench step --model llama2-7b                     both stages, at 4096 and 32768 tokens
    python -m bench step --model demo --length 256 --stage 1    a CPU can do this one
    python -m bench step --lora-rank 64 --stage 2 --length2 262144 --repeat 1    one long block
    torchrun --nproc_per_node 4 -m bench step --batch 1 ...     a block over four GPUs; or --shard

What.  The model is built on the device with random weights, so nothing is downloaded; speed does
not depend on what the weights are. A step is train.py's (engine/step.py): forward and backward of
one micro-batch after the other, the norm and clipping of the gradient, Adam. Memory settles by
itself what is kept, computed again or moved to the host, as in train.py (engine/fit.py), from what
is free or, with --memory, from so many GiB, to which the allocator is then held.

How it is timed.  Wall clock around a synchronised call, the median of --repeat after two to warm
up, of at most WARM tokens of each block. A step in tiles that takes long says each TOLD seconds how
many layers it has done; --limit stops it between two layers, so many seconds after the command
began: the row then has the seconds of each layer and what a whole step would come to. The parts (in
tiles or on several processes: the optimiser and the rest):

    teacher, student     each model's layers alone, at the step's shapes
    relation             the three losses of one layer forward and backward, times L
    optimiser            norm, clipping and Adam
    backward             the rest of the step, so that the five add up to it; with checkpointing,
                         what is computed again is in it, both models' forward and the relations'
                         included
    as a CUDA graph      the step with forward and backward recorded (engine/graph.py); a GPU figure
    waiting              inside the others: the share of a step in which the GPU ran no kernel, from
                         the sum of kernel times in one profiled step; a GPU figure

MFU is cost.flops (teacher, student, relations and backward; recomputation not counted) over the
step's time and the rate of one large matrix product in the same run; of several processes, over the
rate of as many. Tokens per second are those of all. Memory is that of the process that has most:
peak of torch's allocator; on a CPU, and for the host, the resident set, which has what is pinned in
it. The plan's own estimate stands beside each.

Limits.  Parts that are timed alone do not overlap as they might inside a step. No text is read and
no state written. A GPU is told some layers ahead of what it does, but under --limit.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

from engine import cost, fit, lora, parallel, plan, quant, tiles
from engine.step import Step
from hub import files
from hub.checkpoint import set_parameter
from model import (
    TRAINED,
    Llama,
    LlamaConfig,
    choose_glue,
    make_student,
)
from precision import choose_dtype
from relation_kl import relation_kl


def _shape(V, C, M, L, H, Hkv, length, theta=10000.0, tied=False) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": C,
        "intermediate_size": M,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": Hkv,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
    }


WARM = 16384
TOLD = 20  # seconds between two lines about a step at work
BEGAN = time.perf_counter()
SHAPES = {
    "llama2-7b": _shape(32000, 4096, 11008, 32, 32, 32, 4096),
    "llama3-8b": _shape(128256, 4096, 14336, 32, 32, 8, 8192, 500000.0),
    "llama3-1b": _shape(128256, 2048, 8192, 16, 32, 8, 8192, 500000.0, True),
    "smollm2-135m": _shape(49152, 576, 1536, 30, 9, 3, 8192, 100000.0, True),
    "demo": None,  # read from demo/teacher
}


def add_flags(parser) -> None:
    """The flags of `python -m bench step`."""
    parser.add_argument("--model", choices=list(SHAPES), default="llama2-7b")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both")
    parser.add_argument(
        "--length", type=int, metavar="T", help="tokens per block of stage 1 [the shape's own]"
    )
    parser.add_argument(
        "--length2", type=int, metavar="T", help="tokens per block of stage 2 [8 times that]"
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="blocks per step [as many as fill 16384 tokens]"
    )
    parser.add_argument(
        "--micro", type=int, metavar="B", help="blocks at a time [as many as fill 8192 tokens]"
    )
    parser.add_argument(
        "--lora-rank", type=int, metavar="R", help="adapters instead of full projections"
    )
    parser.add_argument(
        "--relations-alone", action="store_true", help="stage 1 without the next-token KL"
    )
    parser.add_argument(
        "--bits", type=int, choices=(4,), help="with --lora-rank: frozen weights in 4 bits"
    )
    parser.add_argument(
        "--shard", action="store_true", help="under torchrun: cut the models over the GPUs"
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="as if the device had no more [what is free]"
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="stop between two layers after so long"
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed steps [5]")


def config_of(name: str) -> LlamaConfig:
    file = Path(__file__).resolve().parents[1] / "demo" / "teacher" / "config.json"
    return LlamaConfig.from_hf(SHAPES[name] or files.read_json(file))


def random_model(config: LlamaConfig, device: torch.device, dtype, bits: int | None = None):
    """A frozen Llama of this shape with random weights. bits: it will be packed, and waits on the
    CPU, its layers being one and the same.
    """
    with torch.device("meta"):
        model = Llama(config)
    place = torch.device("cpu") if bits else device
    generator, made = torch.Generator(place).manual_seed(0), {}
    for name, p in list(model.named_parameters()):
        kind = name.split(".")[-2]
        if kind not in made or not bits:
            made[kind] = torch.ones(p.shape, device=place, dtype=dtype)
            if p.dim() == 2:
                made[kind].normal_(std=0.02, generator=generator)
        set_parameter(model, name, made[kind])
    return model.eval()


def random_models(
    config: LlamaConfig, rank: int | None, device: torch.device, dtype, bits: int | None = None
) -> tuple[Llama, Llama]:
    """(teacher, student) of this shape with random weights, the student ready to train."""
    teacher = random_model(config, device, dtype, bits)
    student = make_student(teacher, config.extended("linear", 8), () if rank else TRAINED)
    if bits:
        quant.pack(teacher, student, device)
    if rank:
        lora.adapt(student, TRAINED, rank, 2.0 * rank, 0.0)
    return teacher, student


def hold(gib: float | None, device: torch.device) -> None:
    """Holds a GPU's allocator to so many GiB, if any."""
    if gib and device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)


class Timed:
    """One stage of one shape, ready to be called."""

    def __init__(self, arguments, config: LlamaConfig, stage: cost.Stage, world: parallel.World):
        self.stage, self.world, self.device = stage, world, world.device
        self.rank, self.bits = arguments.lora_rank, arguments.bits
        self.dtype, _ = choose_dtype(self.device)
        free = int(world.min(cost.free_memory(self.device)))
        if arguments.memory:
            free = min(free, int(arguments.memory * 2**30))
        host = int(world.min(fit.host_share(self.device)))
        machine = fit.Machine(
            config,
            self.dtype,
            self.device,
            rank=self.rank,
            shard=arguments.shard,
            processes=world.size,
            free=free,
            host=host,
            fused=choose_glue(self.device, self.dtype)[0] is not None,
            bits=self.bits,
        )
        self.fit = fit.settle(machine, stage, arguments.micro)
        self.long = self.fit.tiles is not None
        models = random_models(config, self.rank, self.device, self.dtype, self.bits)
        self.teacher, self.student = models
        self.units = parallel.shard(*models, world, self.dtype) if arguments.shard else None
        P = self.fit.P
        generator = torch.Generator().manual_seed(world.rank // P)  # those who share one read alike
        shape = stage.batch * P // world.size, stage.T + 1
        self.ids = torch.randint(0, config.vocab_size, shape, generator=generator).to(self.device)
        began = time.perf_counter()
        self.step = self.make_step(graphs=False)
        self.pinning = time.perf_counter() - began
        fused = self.device.type == "cuda" and not arguments.shard
        self.adam = torch.optim.AdamW(self.step.weights, lr=1e-6, fused=fused)

    def make_step(self, graphs: bool) -> Step:
        how = {"recomputed": self.fit.recomputed, "tiles": self.fit.tiles, "graphs": graphs}
        how |= {"dtype": self.dtype, "kl_weight": float(self.stage.logits)}
        how |= {"gathered": self.fit.gathered}
        return Step(self.teacher, self.student, {}, world=self.world, units=self.units, **how)

    def __call__(self, longest: int | None = None) -> None:
        """One step, of blocks of at most `longest` tokens."""
        self.step.zero()
        pieces = self.ids[:, : longest and longest + 1].split(self.fit.micro)
        for i, piece in enumerate(pieces):
            last = i + 1 == len(pieces)
            self.step.backward(self.stage, piece, None, len(piece) / len(self.ids), last)
        self.update()

    def update(self) -> None:
        self.step.clip(self.step.finish())
        self.adam.step()

    def forward(self, model: Llama) -> None:
        """The layers of one model over all micro-batches."""
        for piece in self.ids.split(self.fit.micro):
            for _ in model.walk(piece[:, :-1], self.dtype):
                pass

    def student_forward(self) -> None:
        with torch.set_grad_enabled(not self.fit.recomputed):
            self.forward(self.student)

    @torch.no_grad()
    def teacher_forward(self) -> None:
        self.forward(self.teacher)

    def one_layers_relations(self) -> None:
        """Forward and backward of one layer's three relations, on random q, k and v."""
        c = self.teacher.config
        for piece in self.ids.split(self.fit.micro):
            for heads in (c.n_head, c.n_kv_head, c.n_kv_head):
                shape = (len(piece), heads, self.stage.T, c.head_dim)
                x, y = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
                relation_kl(x.requires_grad_(), y).mean().backward()


class TooLong(Exception):
    """--limit is over."""


class Layers:
    """Around a step in tiles: how far it is and, with a limit, the seconds of each layer."""

    def __init__(self, timed: Timed, limit: float | None):
        self.world, self.limit, self.each = timed.world, limit, {"forward": [], "backward": []}
        self.layers = timed.teacher.config.n_layer * -(-len(timed.ids) // timed.fit.micro)
        self.plain = {}

    def __enter__(self) -> "Layers":
        self.began = self.last = self.told = time.perf_counter()
        for name in self.each:
            self.plain[name] = getattr(tiles.Layer, name)
            setattr(tiles.Layer, name, self._counted(name))
        return self

    def __exit__(self, *error) -> None:
        for name, function in self.plain.items():
            setattr(tiles.Layer, name, function)

    def _counted(self, name: str):
        def run(layer, *args):
            out = self.plain[name](layer, *args)
            self._done(name)
            return out

        return run

    def _done(self, name: str) -> None:
        if self.limit and self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        now = time.perf_counter()
        self.each[name].append(now - self.last)
        self.last = now
        if self.world.main and now - self.told > TOLD:
            done = ", ".join(f"{len(each)} layers {name}" for name, each in self.each.items())
            print(f"        {now - self.began:.0f} s: {done}", file=sys.stderr, flush=True)
            self.told = now
        if self.limit and self.world.min(self.limit - (now - BEGAN)) < 0:  # for all, or for none
            raise TooLong

    def whole(self) -> float | None:
        """Seconds of all layers of a step, at the mean of those that were done; None without."""
        if not all(self.each.values()):
            return None
        return self.layers * sum(sum(each) / len(each) for each in self.each.values())


def seconds(f, timed: Timed, repeat: int, warm: int = 2) -> float:
    """Seconds that a call takes: the median of `repeat`, after `warm` others."""
    taken, device = [], timed.device
    for _ in range(warm):
        f()
    for _ in range(repeat):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timed.world.min(0.0)  # all begin together
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(-timed.world.min(began - time.perf_counter()))  # of the slowest
    return sorted(taken)[len(taken) // 2]


def waiting(timed: Timed, whole: float) -> float | None:
    """The share of `whole` seconds in which no kernel ran; None on a CPU."""
    if timed.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed()
        torch.cuda.synchronize(timed.device)
    busy = sum(e.self_device_time_total for e in profile.key_averages()) / 1e6
    return max(0.0, 1 - busy / whole)


def measure(timed: Timed, repeat: int, peak: float, limit: float | None = None) -> dict:
    """The row of one stage. peak: of the product rate of one device, in flop/s."""
    layers = Layers(timed, limit)
    whole = whole_step(timed, layers, repeat)
    row = what_is_timed(timed) | {"whole": whole is not None}
    row["seconds"] = layers.whole() if whole is None else whole
    if limit and timed.long:
        row["layers"] = {k: [round(s, 3) for s in each] for k, each in layers.each.items()}
    row |= rates(timed, row["seconds"], peak) | memory(timed) | {"parts": {}, "waiting": None}
    if whole is None:
        return row
    alone = not timed.long and timed.world.size == 1
    if alone:
        row["parts"] = forwards(timed, repeat)
        row["waiting"] = waiting(timed, whole)
    row["parts"]["optimiser"] = seconds(timed.update, timed, repeat)
    rest = "backward" if alone else "forward and backward"
    row["parts"][rest] = whole - sum(row["parts"].values())
    return row if timed.long else row | as_a_graph(timed, repeat, peak)


def whole_step(timed: Timed, layers: Layers, repeat: int) -> float | None:
    """Seconds of a step; None where --limit stopped it."""
    for _ in range(2):
        timed(WARM)
    if timed.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(timed.device)
    try:
        with layers:
            return seconds(timed, timed, repeat, warm=0)
    except TooLong:
        print(f"        stopped by --limit after {layers.last - layers.began:.0f} s")
        return None


def what_is_timed(timed: Timed) -> dict:
    """The step, and how it uses the memory."""
    stage, settled = timed.stage, timed.fit
    return {
        "stage": stage.name,
        "T": stage.T,
        "batch": stage.batch,
        "micro": settled.micro,
        "lora_rank": timed.rank,
        "bits": timed.bits,
        "processes": timed.world.size,
        "shard": timed.units is not None,
        "per_block": settled.P,
        "recomputed": settled.recomputed,
        "memory": settled.describe(timed.teacher.config.n_layer),
    }


def rates(timed: Timed, taken: float | None, peak: float) -> dict:
    """Tokens and floating-point operations per second of a step that took so long."""
    found = {}
    if taken:
        rate = sum(cost.flops(timed.teacher.config, timed.stage, timed.rank).values()) / taken
        found["tokens_per_second"] = timed.stage.tokens / taken
        found |= {"tflops": rate / 1e12, "mfu": rate / (peak * timed.world.size)}
    return found | {"peak_tflops": peak / 1e12}


def memory(timed: Timed) -> dict:
    """GiB held at the peak so far, by the process that has most, and what was planned."""

    def most(device: torch.device) -> float:
        return -timed.world.min(-cost.peak_memory(device))

    return {
        "gib": most(timed.device),
        "planned_gib": sum(timed.fit.need.values()) / 2**30,
        "host_gib": most(torch.device("cpu")),
        "planned_host_gib": timed.fit.tiles.host / 2**30 if timed.fit.tiles else 0.0,
        "pinning_seconds": timed.pinning,
    }


def forwards(timed: Timed, repeat: int) -> dict:
    """Seconds of what a step's forward is made of, each part alone."""
    parts, related = {}, timed.stage.objective == "relation"
    if related:
        parts["teacher forward"] = seconds(timed.teacher_forward, timed, repeat)
    parts["student forward"] = seconds(timed.student_forward, timed, repeat)
    if related:
        one = seconds(timed.one_layers_relations, timed, repeat)
        parts["relation"] = timed.teacher.config.n_layer * one
    return parts


def as_a_graph(timed: Timed, repeat: int, peak: float) -> dict:
    """The step recorded as a CUDA graph: its seconds and MFU; {} where it is not recorded."""
    timed.step.close()
    timed.step = timed.make_step(graphs=True)
    if not timed.step.recorded:
        return {}
    timed()  # records
    taken = seconds(timed, timed, repeat)
    return {"graph_seconds": taken, "graph_mfu": rates(timed, taken, peak)["mfu"]}


def stages(arguments, config: LlamaConfig) -> list[cost.Stage]:
    """The stages that --stage asks for, one step each."""
    first = arguments.length or config.rope.length
    out = []
    for n, objective, T in (
        (1, "relation", first),
        (2, "next token", arguments.length2 or 8 * first),
    ):
        if arguments.stage in (str(n), "both"):
            out.append(
                cost.Stage(
                    f"stage{n}",
                    objective,
                    T,
                    arguments.batch or max(1, 16384 // T),
                    1,
                    1e-6,
                    n == 1 and not arguments.relations_alone,
                )
            )
    return out


def bench_step(arguments, fixed: dict, log) -> None:
    """Prints and logs a row for each stage."""
    for flag in ("length", "length2", "batch", "micro", "lora_rank", "repeat", "memory", "limit"):
        value = getattr(arguments, flag)
        if value is not None and not value >= (0.001 if flag in ("memory", "limit") else 1):
            raise SystemExit(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    if arguments.bits and (arguments.shard or not arguments.lora_rank):
        raise SystemExit("--bits 4 goes with --lora-rank, and not with --shard")
    try:
        world = parallel.World("cuda" if torch.cuda.is_available() else "cpu")
        _bench_step(arguments, fixed, log, world)
    except ValueError as e:  # on all alike
        raise SystemExit(str(e) if os.environ.get("RANK", "0") == "0" else 1) from None
    world.exit(0)


def _bench_step(arguments, fixed: dict, log, world: parallel.World) -> None:
    device, config = world.device, config_of(arguments.model)
    if arguments.shard and world.size == 1:
        raise ValueError("--shard cuts the models over several processes: start it with torchrun")
    if arguments.bits:
        quant.check(device)
    hold(arguments.memory, device)
    peak = world.on_main(cost.peak_flops, device, choose_dtype(device)[0])
    print(", ".join(f"{k} {v}" for k, v in fixed.items()))
    print(
        f"{arguments.model}: {cost.parameters(config)[0]:,} parameters; one product: "
        f"{peak / 1e12:.3g} TFLOP/s"
    )
    for stage in stages(arguments, config):
        gc.collect()  # a recorded step refers to itself: what it held is free only then
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            timed = Timed(arguments, config, stage, world)
            row = measure(timed, arguments.repeat, peak, arguments.limit)
        except torch.OutOfMemoryError:
            raise plan.out_of_memory(stage, device) from None
        timed = None
        about = {"model": arguments.model, "memory_limit_gib": arguments.memory}
        print(json.dumps({**about, **row, **fixed}), file=log, flush=True)
        print(_said(row), flush=True)
        if not row["whole"]:
            return


def _said(r: dict) -> str:
    what = f"{r['stage']}  {r['batch']} x {r['T']:,} tokens, {r['memory']}: "
    if r["processes"] > 1:
        cut = "models cut over" if r["shard"] else "over"
        what += f"{cut} {r['processes']} processes, "
    if r["seconds"]:
        done = "" if r["whole"] else " (from the layers that were done)"
        in_all = " in all" if r["processes"] > 1 else ""
        what += (
            f"{r['seconds']:.3f} s{done}, {r['tokens_per_second']:,.0f} tokens/s{in_all}, "
            f"{r['tflops']:.3g} TFLOP/s, MFU {r['mfu']:.1%}, "
        )
    what += f"{r['gib']:.2f} GiB (planned {r['planned_gib']:.2f})"
    if r["planned_host_gib"]:
        what += f", on the host {r['host_gib']:.1f} GiB (planned {r['planned_host_gib']:.1f})"
    lines = [what]
    lines += [
        f"        {name:16}{s:10.4f} s {s / r['seconds']:7.1%}" for name, s in r["parts"].items()
    ]
    if r["waiting"] is not None:
        lines.append(
            f"        {'waiting, inside':16}{r['waiting'] * r['seconds']:10.4f} s "
            f"{r['waiting']:7.1%}"
        )
    if "graph_seconds" in r:
        s = r["graph_seconds"]
        lines.append(
            f"        {'as a CUDA graph':16}{s:10.4f} s {s / r['seconds']:7.1%}  MFU "
            f"{r['graph_mfu']:.1%}"
        )
    return "\n".join(lines)
