"""The plan's memory against the bytes that autograd keeps, and its flops against those that torch
counts.
"""

import argparse
import json

import pytest
import torch
from conftest import random_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
import train
from bench import step as bench_step
from engine import cost, lora, plan, step
from model import TRAINED, make_student

SHAPES = {
    "grouped": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "head_dim": 16,
    },
    "wide": {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
    },
    "qwen3": {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 32},
}


def pair(shape: str, rank: int | None, dtype: torch.dtype = torch.float32):
    teacher = random_model(**SHAPES[shape], vocab_size=512, max_position_embeddings=64).to(dtype)
    student = make_student(teacher, teacher.config.extended("linear", 2), () if rank else TRAINED)
    return teacher, lora.adapt(student, TRAINED, rank, 2.0 * rank, 0.0) if rank else student


def loss_of(stage: cost.Stage, teacher, student, dtype: torch.dtype, checkpointing: bool):
    ids = torch.randint(0, 512, (2, stage.T + 1), generator=torch.Generator().manual_seed(0))
    if stage.objective == "relation":
        more = {"checkpointing": checkpointing, "logit_weight": float(stage.logits)}
        return step.relation_loss(teacher, student, ids[:, :-1], dtype, **more)[0]
    h = student.hidden(ids[:, :-1], dtype, checkpointing)
    return model_file.next_token_loss(student, h, ids[:, 1:])


KINDS = {
    "relation": ("stage1", "relation", False),
    "relation and logits": ("stage1", "relation", True),
}
KINDS |= {"next token": ("stage2", "next token", False)}


def stage_of(kind: str) -> cost.Stage:
    name, objective, logits = KINDS[kind]
    return cost.Stage(name, objective, 64, 2, 1, 1e-3, logits)


class Kept:
    """Bytes of distinct storages handed to it, but for those of `weights`."""

    def __init__(self, weights):
        self.known = {w.untyped_storage().data_ptr() for w in weights}
        self.held, self.bytes = [], 0

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.held.append(tensor)  # or its address could serve another tensor
            self.bytes += storage.nbytes()
        return tensor


f32, bf16 = torch.float32, torch.bfloat16
DTYPES = {"float32": (f32, f32), "bfloat16": (bf16, bf16), "wide attention": (bf16, f32)}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(shape, kind, rank, dtypes, monkeypatch):
    """Whatever this machine's CPU: attention in float32 is what those without AMX do."""
    dtype, attention = DTYPES[dtypes]
    monkeypatch.setattr(model_file, "attention_dtype", lambda *_: attention)
    teacher, student = pair(shape, rank, dtype)
    stage = stage_of(kind)
    kept = Kept([*teacher.parameters(), *student.parameters()])
    with saved_tensors_hooks(kept, lambda t: t):
        loss_of(stage, teacher, student, dtype, False)
    parts = cost.activation_bytes(student.config, stage, dtype, 2, False, rank, attention)
    said = parts["activations"] + parts.get("relations", 0)
    if (
        "logits" in parts
    ):  # a peak; of it, a single chunk's log-softmax is kept until the backward, and the teacher's
        said += 4 * 2 * stage.T * 512 * (2 if stage.logits else 1)
    assert said == pytest.approx(kept.bytes, rel=0.15)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpointing_keeps_the_layers_inputs_and_one_layer(shape, kind, rank, monkeypatch):
    """Kept: what each recomputed layer is called with, and its losses' numbers. At work: the largest layer, counted as it is
    computed again.
    """
    teacher, student = pair(shape, rank)
    stage = stage_of(kind)
    weights = [*teacher.parameters(), *student.parameters()]
    inputs, layers, recompute = Kept(weights), [], step.recompute

    def counted(f, *args, **more):
        for tensor in torch.utils._pytree.tree_leaves(args):
            if (
                isinstance(tensor, torch.Tensor) and tensor.dim() == 3
            ):  # h, not the positions that all layers share
                inputs(tensor)

        def again(*args):
            own = Kept(weights)
            layers.append(own)
            with saved_tensors_hooks(own, lambda t: t):
                return f(*args)

        again(*[a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args])
        for numbers in getattr(f, "keywords", {}).get("kept", ()):
            inputs.bytes += sum(tensor.nbytes for tensor in numbers if tensor is not None)
        return recompute(f, *args, **more)

    monkeypatch.setattr(step, "recompute", counted)
    monkeypatch.setattr(
        model_file,
        "recompute",
        lambda f, *a, **k: (counted if len(a) > 1 else recompute)(f, *a, **k),
    )
    monkeypatch.setattr(model_file, "next_token_loss", lambda student, h, targets: h.sum())
    monkeypatch.setattr(
        step, "logit_kl", lambda teacher, student, h_teacher, h_student, chunk: h_student.mean()
    )
    loss_of(stage, teacher, student, torch.float32, True)
    assert len(layers) == student.config.n_layer
    parts = cost.activation_bytes(student.config, stage, torch.float32, 2, True, rank)
    head = (
        2 * 64 * (8 * student.config.width + 12) if "logits" in parts else 0
    )  # the last norm's, outside the layers
    said = parts["activations"] + parts.get("relations", 0) - head
    assert said == pytest.approx(inputs.bytes + max(layer.bytes for layer in layers), rel=0.15)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_what_torch_counts(kind, rank, monkeypatch):
    """All but attention and relations, which torch counts by other rules: both are replaced by
    something free.
    """
    teacher, student = pair("grouped", rank)
    stage = stage_of(kind)
    c = student.config
    monkeypatch.setattr(
        model_file.F, "scaled_dot_product_attention", lambda q, k, v, **_: q + k.mean() + v.mean()
    )
    monkeypatch.setattr(step, "relation_kl", lambda x, y, **_: (x - y).square().sum(-1))
    monkeypatch.setattr(
        model_file, "recompute", lambda f, *a, **_: f(*a)
    )  # the head's, made again, is not counted
    with FlopCounterMode(display=False) as counter:
        loss_of(stage, teacher, student, torch.float32, False).backward()
    parts = cost.flops(c, stage, rank)
    free = parts.pop("relation", 0)
    attention = 2 * c.head_dim * c.n_head * stage.T * stage.T * stage.batch
    forwards = {
        "relation": 4 * (c.n_layer - 1),
        "relation and logits": 4 * c.n_layer,
        "next token": 3 * c.n_layer,
    }[kind]
    assert sum(parts.values()) - forwards * attention == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )
    assert free == (
        0
        if kind == "next token"
        else c.n_layer * 12 * c.head_dim * stage.T**2 / 2 * stage.batch * (4 + 2 * 2)
    )


def test_sharding_divides_what_it_cuts():
    c = random_model().config
    whole, half = (
        cost.memory(c, stage_of("relation"), torch.float32, 1, False, None, n) for n in (1, 2)
    )
    assert half["trained weights, gradients, Adam"] * 2 == whole["trained weights, gradients, Adam"]
    assert half["activations"] == whole["activations"] and half["gathered layers"] > 0


@pytest.mark.parametrize("seconds, said", [(12.4, "12s"), (200, "3m20s"), (18420, "5h07m")])
def test_clock(seconds, said):
    assert cost.clock(seconds) == said


@pytest.mark.parametrize("rank", [None, 4])
def test_bench_step_on_a_cpu(tmp_path, monkeypatch, rank, capsys):
    shape = bench_step._shape(512, 64, 160, 2, 4, 2, 64)
    monkeypatch.setitem(bench_step.SHAPES, "demo", shape)
    flags = ["--model", "demo", "--length", "32", "--batch", "2", "--micro", "1", "--repeat", "1"]
    parser = argparse.ArgumentParser()
    bench_step.add_flags(parser)
    with (tmp_path / "step.jsonl").open("w") as log:
        bench_step.bench_step(
            parser.parse_args([*flags, "--lora-rank", str(rank)] if rank else flags),
            {"device": "CPU"},
            log,
        )
    rows = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["T"], r["micro"]) for r in rows] == [
        ("stage1", 32, 1),
        ("stage2", 256, 1),
    ]
    for r in rows:
        assert r["mfu"] > 0 and sum(r["parts"].values()) == pytest.approx(r["seconds"])
        assert r["tokens_per_second"] == pytest.approx(r["batch"] * r["T"] / r["seconds"])
    assert "relation" in rows[0]["parts"] and "relation" not in rows[1]["parts"]
    assert "MFU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, millions", [("llama2-7b", 6738), ("llama3-8b", 8030), ("smollm2-135m", 135)]
)
def test_the_named_shapes_have_their_models_size(name, millions):
    assert round(cost.parameters(bench_step.config_of(name))[0] / 1e6) == pytest.approx(
        millions, abs=1
    )


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("native", [2048, 4096, 8192, 32768, 131072])
def test_the_defaults_make_sense_from_2k_to_128k(native, kind, gpu):
    """Enough steps on a GPU, and blocks that the student's context holds."""
    config = random_model(max_position_embeddings=native).config
    number = train.defaults(config, config.extended(kind, 8), gpu)
    steps = {n: number[f"tokens{n}"] / max(number[f"step{n}"], number[f"length{n}"]) for n in "12"}
    assert number["length1"] <= native and number["length2"] <= 8 * native
    assert steps["1"] >= plan.FEWEST_STEPS and steps["2"] >= (plan.FEWEST_STEPS if gpu else 4)


def test_a_stage_of_few_steps_is_warned_of():
    config = random_model().config
    student = config.extended("linear", 8)
    for steps, warns in ((plan.FEWEST_STEPS - 1, True), (plan.FEWEST_STEPS, False)):
        stage = cost.Stage("stage2", "next token", 64, 2, steps, 1e-3)
        text = plan.describe(config, student, [stage], [{}])
        assert (f"stage2 has {steps} steps" in text and "--tokens2" in text) == warns
