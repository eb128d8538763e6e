"""How fast a training step is, and where its time goes: a named shape, random weights, the two
stages.

    python -m bench step --model llama2-7b                     both stages, at 4096 and 32768 tokens
    python -m bench step --model demo --length 256 --stage 1    a CPU can do this one

What.  The model is built on the device with random weights, so nothing is downloaded; speed does
not depend on what the weights are. A step is train.py's (engine/step.py): forward and backward of
one micro-batch after the other, the norm and clipping of the gradient, Adam. Memory settles by
itself what is kept, computed again or moved to the host, as in train.py (engine/fit.py).

How it is timed.  Wall clock around a synchronised call, the median of --repeat after two to warm
up, of at most WARM tokens of each block. The parts (in tiles: the optimiser and the rest):

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
step's time and the rate of one large matrix product in the same run. Memory: peak of torch's
allocator; on a CPU the process's resident set. The plan's own estimate stands beside it.

Limits.  Parts that are timed alone do not overlap as they might inside a step. No text is read and
no state written.
"""

import gc
import json
import time
from pathlib import Path

import torch

from engine import cost, fit, lora, plan
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
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed steps [5]")


def config_of(name: str) -> LlamaConfig:
    file = Path(__file__).resolve().parents[1] / "demo" / "teacher" / "config.json"
    return LlamaConfig.from_hf(SHAPES[name] or files.read_json(file))


def random_models(
    config: LlamaConfig, rank: int | None, device: torch.device, dtype
) -> tuple[Llama, Llama]:
    """(teacher, student) of this shape with random weights, the student ready to train."""
    with torch.device("meta"):
        teacher = Llama(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in list(teacher.named_parameters()):
        w = torch.ones(p.shape, device=device, dtype=dtype)
        if p.dim() == 2:
            w.normal_(std=0.02, generator=generator)
        set_parameter(teacher, name, w)
    student = make_student(teacher.eval(), config.extended("linear", 8), () if rank else TRAINED)
    if rank:
        lora.adapt(student, TRAINED, rank, 2.0 * rank, 0.0)
    return teacher, student


class Timed:
    """One stage of one shape, ready to be called."""

    def __init__(self, arguments, config: LlamaConfig, stage: cost.Stage, device: torch.device):
        self.stage, self.device, self.rank = stage, device, arguments.lora_rank
        self.dtype, _ = choose_dtype(device)
        free, host = cost.free_memory(device), fit.host_share(device)
        fused = choose_glue(device, self.dtype)[0] is not None
        machine = fit.Machine(config, self.dtype, device, self.rank, False, 1, free, host, fused)
        self.fit = fit.settle(machine, stage, arguments.micro)
        self.teacher, self.student = random_models(config, self.rank, device, self.dtype)
        self.ids = torch.randint(0, config.vocab_size, (stage.batch, stage.T + 1), device=device)
        self.step = self.make_step(graphs=False)
        self.adam = torch.optim.AdamW(self.step.weights, lr=1e-6, fused=device.type == "cuda")

    def make_step(self, graphs: bool) -> Step:
        how = {"recomputed": self.fit.recomputed, "tiles": self.fit.tiles, "graphs": graphs}
        how |= {"dtype": self.dtype, "kl_weight": float(self.stage.logits)}
        return Step(self.teacher, self.student, {}, **how)

    def __call__(self, longest: int | None = None) -> None:
        """One step, of blocks of at most `longest` tokens."""
        self.step.zero()
        for piece in self.ids[:, : longest and longest + 1].split(self.fit.micro):
            self.step.backward(self.stage, piece, len(piece) / len(self.ids), False)
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


def seconds(f, device: torch.device, repeat: int, warm=None) -> float:
    """Seconds that a call takes: the median of `repeat`, after two of `warm`."""
    taken = []
    for _ in range(2):
        (warm or f)()
    for _ in range(repeat):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
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


def measure(timed: Timed, repeat: int, peak: float) -> dict:
    """The row of one stage."""
    device, c, stage = timed.device, timed.teacher.config, timed.stage
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole = seconds(timed, device, repeat, lambda: timed(WARM))
    gib, tiles = cost.peak_memory(device), timed.fit.tiles
    parts = {}
    if stage.objective == "relation" and not tiles:
        parts["teacher forward"] = seconds(timed.teacher_forward, device, repeat)
    if not tiles:
        parts["student forward"] = seconds(timed.student_forward, device, repeat)
    if stage.objective == "relation" and not tiles:
        parts["relation"] = c.n_layer * seconds(timed.one_layers_relations, device, repeat)
    parts["optimiser"] = seconds(timed.update, device, repeat)
    parts["forward and backward" if tiles else "backward"] = whole - sum(parts.values())
    work = sum(cost.flops(c, stage, timed.rank).values())
    row = {
        "stage": stage.name,
        "T": stage.T,
        "batch": stage.batch,
        "micro": timed.fit.micro,
        "lora_rank": timed.rank,
    }
    row |= {
        "recomputed": timed.fit.recomputed,
        "memory": timed.fit.describe(c.n_layer),
        "seconds": whole,
        "tokens_per_second": stage.tokens / whole,
    }
    row |= {"tflops": work / whole / 1e12, "mfu": work / whole / peak, "peak_tflops": peak / 1e12}
    busy = None if tiles else waiting(timed, whole)
    row |= {"parts": parts, "waiting": busy, "gib": gib}
    row["planned_gib"] = sum(timed.fit.need.values()) / 2**30
    row["host_gib"] = tiles.host / 2**30 if tiles else 0.0
    timed.step = timed.make_step(graphs=True)
    if timed.step.recorded:
        timed()  # records
        row["graph_seconds"] = seconds(timed, device, repeat)
        row["graph_mfu"] = work / row["graph_seconds"] / peak
    return row


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
    for flag in ("length", "length2", "batch", "micro", "lora_rank", "repeat"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise SystemExit(
                f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; it must be at least 1"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(arguments.model)
    peak = cost.peak_flops(device, choose_dtype(device)[0])
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
            row = measure(Timed(arguments, config, stage, device), arguments.repeat, peak)
        except torch.OutOfMemoryError:
            raise SystemExit(str(plan.out_of_memory(stage, device))) from None
        except ValueError as e:
            raise SystemExit(str(e)) from None
        print(json.dumps({"model": arguments.model, **row, **fixed}), file=log, flush=True)
        print(_said(row), flush=True)


def _said(r: dict) -> str:
    lines = [
        f"{r['stage']}  {r['batch']} x {r['T']:,} tokens, {r['memory']}: {r['seconds']:.3f} s, "
        f"{r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['tflops']:.3g} TFLOP/s, MFU {r['mfu']:.1%}, {r['gib']:.2f} GiB (planned "
        f"{r['planned_gib']:.2f})"
    ]
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
