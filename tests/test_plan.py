"""The plan's memory against the bytes that autograd keeps, and its flops against those that torch
counts.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TEACHER, random_model, write_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
import train
from bench import prefill as bench_prefill
from bench import step as bench_step
from engine import announce, cost, data, fit, flags, graph, lora, offload, parallel, plan, step
from engine import tiles as tiles_file
from engine.run import Run
from engine.tiles import Tiles
from evals import held_out as held_out_file
from evals.held_out import HeldOut
from hub import checkpoint
from hub.tokenizer import load_tokenizer
from model import TRAINED, LlamaConfig, make_student, trainable

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


def loss_of(stage: cost.Stage, teacher, student, dtype: torch.dtype, recomputed: int):
    ids = torch.randint(0, 512, (2, stage.T + 1), generator=torch.Generator().manual_seed(0))
    if stage.objective == "relation":
        more = {"recomputed": recomputed, "logit_weight": float(stage.logits)}
        return step.relation_loss(teacher, student, ids[:, :-1], dtype, **more)[0]
    if stage.teacher_share:
        return step.next_token_loss(teacher, student, ids, dtype, recomputed, stage.teacher_share)[
            0
        ]
    h = student.hidden(ids[:, :-1], dtype, recomputed)
    return model_file.next_token_loss(student, h, ids[:, 1:])


KINDS = {
    "relation": ("stage1", "relation", False, 0),
    "relation and logits": ("stage1", "relation", True, 0),
    "next token": ("stage2", "next token", False, 0),
    "next token and teacher": ("stage2", "next token", False, 0.5),
}


def stage_of(kind: str) -> cost.Stage:
    name, objective, logits, share = KINDS[kind]
    return cost.Stage(name, objective, 64, 2, 1, 1e-3, logits, teacher_share=share)


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
        loss_of(stage, teacher, student, dtype, 0)
    parts = cost.activation_bytes(student.config, stage, dtype, 2, 0, rank, attention)
    said = parts["activations"] + parts.get("relations", 0)
    if (
        "logits" in parts
    ):  # a peak; of it, a single chunk's log-softmax is kept until the backward, and the teacher's
        said += 4 * 2 * stage.T * 512 * (2 if stage.logits or stage.teacher_share else 1)
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
    monkeypatch.setattr(
        step, "_shared_losses", lambda teacher, student, h_teacher, h, targets, share: h
    )
    loss_of(stage, teacher, student, torch.float32, student.config.n_layer)
    assert len(layers) == student.config.n_layer
    L = student.config.n_layer
    parts = cost.activation_bytes(student.config, stage, torch.float32, 2, L, rank)
    head = (
        2 * 64 * (8 * student.config.width + 12) if "logits" in parts else 0
    )  # the last norm's, outside the layers
    said = parts["activations"] + parts["a layer again"] + parts.get("relations", 0) - head
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
        loss_of(stage, teacher, student, torch.float32, 0).backward()
    parts = cost.flops(c, stage, rank)
    free = parts.pop("relation", 0)
    attention = 2 * c.head_dim * c.n_head * stage.T * stage.T * stage.batch
    forwards = {
        "relation": 4 * (c.n_layer - 1),
        "relation and logits": 4 * c.n_layer,
        "next token": 3 * c.n_layer,
        "next token and teacher": 4 * c.n_layer,
    }[kind]
    assert sum(parts.values()) - forwards * attention == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )
    assert free == (
        0
        if stage.objective == "next token"
        else c.n_layer * 12 * c.head_dim * stage.T**2 / 2 * stage.batch * (4 + 2 * 2)
    )


def test_sharding_divides_what_it_cuts():
    c = random_model().config
    whole, half = (
        cost.memory(c, stage_of("relation"), torch.float32, 1, 0, shards=n) for n in (1, 2)
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


def bench_row(tmp_path, processes: int, *more: str) -> tuple[dict, str]:
    """Of one stage of the demo's model, by the command; what it said."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = ["--model", "demo", "--lora-rank", "2", "--repeat", "1", "--out", str(tmp_path)]
    run = subprocess.run(
        [*launch, "-m", "bench", "step", *flags, *more],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (line,) = (tmp_path / "step.jsonl").read_text().splitlines()
    assert run.stdout.count("MFU") == 1, "rank 0 alone speaks"
    return json.loads(line), run.stdout


@pytest.mark.parametrize("cut", [False, True], ids=["a block over both", "sharded"])
def test_bench_step_over_two_processes(tmp_path, cut):
    shape = ["--shard", "--batch", "2", "--stage", "1", "--length", "32"]
    if not cut:
        shape = ["--batch", "1", "--stage", "2", "--length2", "96"]
    row, said = bench_row(tmp_path, 2, *shape)
    assert (row["processes"], row["shard"], row["per_block"]) == (2, cut, 1 if cut else 2)
    assert row["mfu"] == pytest.approx(row["tflops"] / (2 * row["peak_tflops"]))
    assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["T"] / row["seconds"])
    assert "tokens/s in all" in said and row["whole"] and 0 < row["gib"] <= row["host_gib"]


def test_bench_step_says_how_far_it_is_and_stops_at_its_limit(tmp_path, monkeypatch, capsys):
    """As if a step took minutes, and this were all the memory there is."""
    shape = bench_step._shape(512, 64, 160, 4, 4, 2, 64)
    monkeypatch.setitem(bench_step.SHAPES, "demo", shape)
    monkeypatch.setattr(bench_step, "TOLD", 0)
    parser, rows = argparse.ArgumentParser(), []
    bench_step.add_flags(parser)
    flags = ["--model", "demo", "--length2", "4096", "--batch", "1", "--stage", "2"]
    flags += ["--lora-rank", "2", "--repeat", "1", "--memory", "0.05"]
    for limit in ("1000000", "0.001"):
        arguments = parser.parse_args([*flags, "--limit", limit])
        with (tmp_path / "step.jsonl").open("w") as log:
            bench_step.bench_step(arguments, {}, log)
        rows += map(json.loads, (tmp_path / "step.jsonl").read_text().splitlines())
    (whole, cut), said = rows, capsys.readouterr()
    assert "in tiles" in whole["memory"] and whole["planned_gib"] <= 0.05
    assert (
        whole["whole"] and len(whole["layers"]["forward"]) == len(whole["layers"]["backward"]) == 4
    )
    assert not cut["whole"] and cut["seconds"] is None and len(cut["layers"]["forward"]) == 1
    assert "2 layers backward" in said.err and "stopped by --limit" in said.out


def test_bench_prefill_on_a_cpu(tmp_path, monkeypatch, capsys):
    shape = bench_step._shape(512, 64, 160, 2, 4, 2, 64)
    monkeypatch.setitem(bench_step.SHAPES, "demo", shape)
    parser = argparse.ArgumentParser()
    bench_prefill.add_flags(parser)
    with (tmp_path / "prefill.jsonl").open("w") as log:
        arguments = parser.parse_args(["--model", "demo", "--length", "300", "--new", "3"])
        bench_prefill.bench_prefill(arguments, {"device": "CPU"}, log)
    scores, prompt = map(json.loads, (tmp_path / "prefill.jsonl").read_text().splitlines())
    assert (scores["row"], prompt["row"]) == ("scores", "prompt")
    for row in (scores, prompt):
        assert row["T"] == 300 and row["tokens_per_second"] == pytest.approx(300 / row["seconds"])
        assert row["gib"] > row["weights_gib"] > 0
    assert prompt["new_seconds"] > 0 and prompt["cache_gib"] > 0
    assert "each new token" in capsys.readouterr().out


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
    number = train.defaults(config, config.extended(kind, 8), 0.02, gpu)
    steps = {n: number[f"tokens{n}"] / max(number[f"step{n}"], number[f"length{n}"]) for n in "12"}
    assert number["length1"] <= native and number["length2"] <= 8 * native
    assert steps["1"] >= announce.FEWEST_STEPS and steps["2"] >= (
        announce.FEWEST_STEPS if gpu else 4
    )


@pytest.mark.parametrize("kind, share", [("linear", 1.0), ("yarn", 0.3)])
def test_the_rate_follows_the_size_of_the_weights_that_learn(kind, share, tmp_path):
    """Twice the weights, twice the rate; other weights do not count; at most 2e-3."""
    model = random_model(num_hidden_layers=9)  # more than are read
    config, student = model.config, model.config.extended(kind, 8)
    learning = [
        p for n, p in model.named_parameters() if n.split(".")[-2] in TRAINED and p.dim() > 1
    ]
    rates = []
    for factor in (1.0, 2.0, 1e3):
        with torch.no_grad():
            for i, p in enumerate(learning):  # q, k, v by turns
                p.fill_(factor * 1e-3 * (1 + i % 3))
            model.model.layers[0].mlp.up_proj.weight.mul_(factor)
        path = tmp_path / str(factor)
        checkpoint.save_pretrained(model, path, tokenizer_from=TEACHER)
        size = plan.weight_size(config, path)
        assert size == pytest.approx(factor * 2e-3, rel=1e-3)  # the median
        rates.append(train.defaults(config, student, size, True)["lr1"])
    assert rates[0] == pytest.approx(share * 6 * 2e-3 / config.width, rel=1e-3)
    assert rates[1] == pytest.approx(2 * rates[0]) and rates[2] == share * 2e-3


@pytest.mark.parametrize("given", [[], ["--relations", "k"], ["--preset", "authors"]])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # keys without biases, and with
def test_relations_of_keys_with_biases_are_left_out_unless_asked_for(kind, given, tmp_path):
    path = write_model(tmp_path / kind, model_type=kind)
    args = flags.parse(["--teacher", str(path), "--device", "cpu", *given], "", train.PRESETS)
    config = LlamaConfig.from_hf(json.loads((path / "config.json").read_text()))
    number = plan.numbers(args, config, config.extended("yarn", 8), train.defaults)
    first, second = plan.make_stages(args, config, number)
    asked = {"--relations": "k", "--preset": "qkv"}[given[0]] if given else None
    assert first.relations == (asked or {"llama": "qkv", "qwen2": "qv"}[kind])
    said = announce.describe_loss(args, [first, second], config.qkv_bias)
    assert ("K/K" in said.split(";")[0]) == ("k" in first.relations)
    assert ("as the keys have biases" in said) == (first.relations == "qv")
    assert "K/K" not in announce.describe_loss(args, [second], config.qkv_bias), "stage 2 has none"
    args.relations = "qv"
    said = announce.describe_loss(
        args, [dataclasses.replace(first, relations="qv")], config.qkv_bias
    )
    assert "as the keys" not in said, "who asked knows why"


@pytest.mark.parametrize(
    "length, given, share",
    [
        (64, None, 0.5),
        (32, None, 0.5),
        (128, None, 0.0),
        (64, "0", 0.0),
        (64, "1", 1.0),
        (128, "0.3", None),
    ],
)
def test_the_teacher_has_a_share_of_the_target_where_it_can_read_the_block(
    length, given, share, tiny_dir
):
    """Its native length is 64. None: refused."""
    argv = ["--teacher", str(tiny_dir), "--device", "cpu", "--length2", str(length)]
    argv += ["--teacher-share", given] if given else []
    args = flags.parse(argv, "", train.PRESETS)
    config = LlamaConfig.from_hf(json.loads((tiny_dir / "config.json").read_text()))
    student = config.extended("yarn", 8)
    stages = plan.make_stages(args, config, plan.numbers(args, config, student, train.defaults))
    if share is None:
        with pytest.raises(ValueError, match=r"--teacher-share is 0\.3, but .* 64 tokens"):
            plan.check(args, config, student, stages, 1)
    else:
        plan.check(args, config, student, stages, 1)
        assert stages[1].teacher_share == share and stages[0].teacher_share == 0
        said = announce.describe(config, student, stages, [{}, {}])
        assert ("of the target is the teacher's" in said) == (share > 0)
        text = cost.flops(config, dataclasses.replace(stages[1], teacher_share=0.0))
        whole = cost.flops(config, stages[1])
        assert whole.pop("teacher forward", 0) == (text["student forward"] if share else 0)
        assert whole == text


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_context_longer_than_was_measured_is_warned_of(kind):
    config = random_model().config
    for factor, warned in ((2, False), (8, False), (9, True), (64, True)):
        text = announce.describe(config, config.extended(kind, factor), [], [])
        assert ("warning     beyond 8 times" in text) == warned
        assert (f"--length2 {8 * config.rope.length} (" in text) == (factor > 16)
    twice = config.extended(kind, 8)
    assert "warning" not in announce.describe(twice, twice.extended(kind, 8), [], [])


def test_the_relation_loss_that_is_named_is_that_of_the_blocks_that_have_one():
    """Stage 1's own, and of stage 2 the auxiliary ones."""
    first = cost.Stage("stage1", "relation", 512, 16, 1, 1e-3)
    second = cost.Stage("stage2", "next token", 4096, 2, 1, 1e-3, auxiliary=first)
    args = argparse.Namespace(micro=None, lora_dropout=0.0)
    settled = fit.Fit(micro=2, recomputed=0, need={})
    assert plan.relation_shape(args, first, settled, 1) == (2, 512)
    assert plan.relation_shape(args, second, settled, 1) == (16, 512)
    assert plan.relation_shape(args, second, settled, 2) == (8, 512)
    args = argparse.Namespace(micro=4, lora_dropout=0.0)
    assert plan.relation_shape(args, second, settled, 2) == (4, 512)


@pytest.mark.parametrize("scale", [1.5, 8.0])
@pytest.mark.parametrize("steps", [1, 100, 600, 10**6])
def test_the_table_reads_as_much_as_its_share_of_the_steps_pays_for(steps, scale):
    c, stages = random_model(max_position_embeddings=64).config, [stage_of("relation and logits")]
    stages = [dataclasses.replace(s, steps=steps) for s in (*stages, stage_of("next token"))]
    args = argparse.Namespace(scale=scale, lora_rank=None, eval_blocks=None)
    n, documents, share = plan.table_size(args, c, stages)
    assert n == max(documents, 1) <= 8 and (share <= plan.SHARE or not documents)
    args.eval_blocks = documents + 1
    *more, costs = plan.table_size(args, c, stages)
    assert more == [documents + 1, min(documents + 1, 8)]
    assert costs > share and (costs > plan.SHARE or n == 8)
    args.eval_blocks = 0
    assert plan.table_size(args, c, stages) == (0, 0, 0.0)
    assert (documents == 0) == (steps == 1) or (n == 8) == (steps == 10**6)


@pytest.mark.parametrize("documents", [0, 1])
def test_what_the_table_costs_is_counted_where_it_reads(documents, tmp_path, text_dir, monkeypatch):
    """Of each column: the long blocks, the same words cut, the look-up documents."""
    teacher = ROOT / "demo" / "teacher"
    tokenizer = load_tokenizer(teacher)
    corpus = data.load_corpus([text_dir], tokenizer, tmp_path, quiet=True)
    read = []

    def scores(model, blocks, at=None, P=1):
        n, T = len(blocks), blocks.shape[1] - 1
        read.append(cost.flops(model, cost.Stage("", "next token", T, n, 1, 0))["student forward"])
        zeros = np.zeros((n, T) if at is None else tuple(at.shape))
        return zeros, zeros

    monkeypatch.setattr(held_out_file, "block_scores", scores)
    c = random_model(max_position_embeddings=512).config
    rows = HeldOut(corpus, tokenizer, 512, 2.0, 1, documents=documents).measure(c)
    assert any(row.startswith("recall") for row in rows) == bool(documents)
    stage = stage_of("next token")
    args = argparse.Namespace(scale=2.0, lora_rank=None, eval_blocks=documents or None)
    *found, share = plan.table_size(args, c, [stage])
    assert found == [1, documents]
    work = sum(cost.flops(c, stage).values())
    assert share * work == pytest.approx(3 * sum(read))


def test_a_preset_says_how_much_its_table_reads_and_a_flag_wins():
    assert flags.parse(["--device", "cpu"], "", train.PRESETS).eval_blocks == 4
    given = ["--device", "cpu", "--eval-blocks", "3"]
    assert flags.parse(given, "", train.PRESETS).eval_blocks == 3
    given = ["--device", "cpu", "--teacher", str(ROOT / "demo" / "teacher")]
    assert flags.parse(given, "", train.PRESETS).eval_blocks is None
    assert "none" in announce.describe_table(0, 0, 64, 4, 0.0)
    assert "8 look-up documents" in announce.describe_table(20, 8, 64, 4, 0.3)
    assert "without look-ups" in announce.describe_table(1, 0, 64, 4, 0.3)


@pytest.mark.parametrize("micro, dropout", [(None, 0.0), (1, 0.0), (3, 0.0), (3, 0.1)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_plan_counts_as_many_blocks_as_a_run_has_at_a_time(
    processes, micro, dropout, monkeypatch
):
    """Of the stage and of its auxiliary. Four processes: each block of the stage is over two."""
    auxiliary = cost.Stage("stage2", "relation", 512, 16, 1, 1e-3)
    stage = cost.Stage("stage2", "next token", 2048, 2, 1, 1e-3, auxiliary=auxiliary)
    c, cpu, counted, held = random_model().config, torch.device("cpu"), {}, {}
    m = fit.Machine(c, f32, cpu, 4, False, processes, free=2**40, host=0)
    memory = cost.memory

    def noted(c, part, dtype, blocks, *recomputed, **more):
        counted[part.objective] = blocks, more["P"]
        return memory(c, part, dtype, blocks, *recomputed, **more)

    monkeypatch.setattr(cost, "memory", noted)
    settled = fit.settle(m, stage, 1 if dropout else micro)
    run = object.__new__(Run)
    run.args = argparse.Namespace(micro=micro, lora_dropout=dropout, seed=0, lookups=0.0)
    run.world = SimpleNamespace(size=processes, rank=processes - 1)
    run.plan = SimpleNamespace(device=cpu, fit=lambda stage: settled, longer=c)
    run.at, run.lookups = SimpleNamespace(stage=1, total=0), None
    run.corpus = SimpleNamespace(batch=lambda seed, first, n, T: torch.zeros(n, T + 1).long())
    for part, ids, *_ in run.micro_batches(stage, 0):
        largest, _ = held.get(part.objective, (0, 0))
        P = max(1, processes // part.batch)
        held[part.objective] = max(largest, len(ids)), P
    assert counted == held


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("bucket", [1, 4 * 32 * 20, 2**26], ids=["none", "the smaller", "all"])
def test_the_plan_counts_what_the_reducer_copies(bucket, rank, monkeypatch):
    monkeypatch.setattr(parallel.Reducer, "BUCKET", bucket)
    sent, done = [], SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(
        parallel.dist, "all_reduce", lambda numbers, async_op: sent.append(numbers) or done
    )
    teacher = random_model(attention_bias=True)
    student = make_student(teacher, teacher.config, () if rank else TRAINED)
    if rank:
        lora.adapt(student, TRAINED, rank, 8.0, 0.0)
    weights = list(trainable(student).values())
    reducer = parallel.Reducer(weights, SimpleNamespace(size=2))
    reducer.last = True
    sum(w.sum() for w in weights).backward()
    reducer.finish()
    reducer.close()
    grads = {w.grad.data_ptr() for w in weights}
    copied = sum(x.nbytes for x in sent if x.data_ptr() not in grads)
    c = teacher.config
    assert cost.trained_parameters(c, rank) == sum(w.numel() for w in weights)
    assert cost.bucket_bytes(c, rank) == copied and (copied > 0) == (bucket > 1)
    if bucket == 2**26:
        assert copied == sum(w.nbytes for w in weights)

    def need(processes: int, **how) -> int:
        how = {"rank": rank, "per_rank": 2, "processes": processes} | how
        recomputed = how.pop("recomputed", 0)
        return sum(cost.memory(c, stage_of("next token"), f32, 2, recomputed, **how).values())

    assert need(2) - need(1) == copied
    assert need(2, shards=2) == need(1, shards=2)  # FSDP sums its own
    for how in ({"recomputed": 1}, {"tiles": Tiles(64, 2, 2)}):  # they come as what is kept goes
        assert 0 <= need(2, **how) - need(1, **how) <= copied


def test_a_step_that_is_not_recorded_says_why():
    gpu = torch.device("cuda")
    assert graph.wanted(gpu, 0, False, False, 0.0)[0]
    recorded, why = graph.wanted(gpu, 0, False, False, 0.0, packed=True)
    assert not recorded and "bitsandbytes" in why


@pytest.mark.parametrize(
    "name, T, blocks, stage, recorded",
    [
        ("smollm2-135m", 512, 2, 1, True),
        ("smollm2-135m", 16384, 1, 2, True),
        ("llama2-7b", 4096, 4, 1, False),
        ("llama2-7b", 16384, 1, 2, False),
    ],
)
def test_a_step_is_recorded_where_launches_are_waited_for(name, T, blocks, stage, recorded):
    """At an H100's rate, as many blocks at a time as fill 8192 tokens."""
    c = bench_step.config_of(name)
    objective = {1: "relation", 2: "next token"}[stage]
    one = cost.Stage(f"stage{stage}", objective, T, blocks, 1, 1e-3, stage == 1)
    fits = [fit.Fit(cost.at_a_time(one, None, blocks), 0, {})]
    args = flags.parse(["--device", "cpu"], "", train.PRESETS)
    known = {"chosen": {}, "peak": 7.7e14, "processes": 1, "copy": 0, "overlap": True, "blocks": 0}
    known |= {"documents": 0, "share": 0.0, "pairs": None}
    made = plan.Plan(args, c, c, None, [one], fits, None, bf16, **known)
    seconds = made.how(one)["seconds"]
    assert graph.wanted(torch.device("cuda"), 0, False, False, 0.0, seconds=seconds)[0] == recorded


def test_a_stage_of_few_steps_is_warned_of():
    config = random_model().config
    student = config.extended("linear", 8)
    for steps, warns in ((announce.FEWEST_STEPS - 1, True), (announce.FEWEST_STEPS, False)):
        stage = cost.Stage("stage2", "next token", 64, 2, steps, 1e-3)
        text = announce.describe(config, student, [stage], [{}])
        assert (f"stage2 has {steps} steps" in text and "--tokens2" in text) == warns


class Live(TorchDispatchMode):
    """Bytes of the storages that live, and of those at the peak; `known` ones do not count."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, which):
        self.now -= self.sizes.pop(which)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "on_gpu, outputs, qkv", [(0, 4, 0), (4, 4, 0), (0, 0, 0), (2, 0, 0), (4, 4, 3)]
)
def test_a_pass_in_tiles_holds_what_the_plan_says(
    on_gpu, outputs, qkv, heads, rank, share, monkeypatch
):
    """All but what attention's kernel on a GPU holds for itself; and nothing stays after it."""
    monkeypatch.setattr(tiles_file, "ROWS", 2048)
    monkeypatch.setattr(offload, "CHUNK", 2**16)
    for module in (step, cost):
        monkeypatch.setattr(module, "HEAD_CHUNK", 64)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "head_dim": 16}
    SHAPES["tiled"] = sizes | {"num_key_value_heads": heads}
    teacher, student = pair("tiled", rank)
    T, tiles = 2048, Tiles(128, on_gpu, outputs, qkv)
    stage = cost.Stage("stage2", "next token", T, 1, 1, 1e-3, teacher_share=share)
    ids = torch.randint(0, 512, (1, T + 1))
    made = step.Step(teacher, student, {}, dtype=f32, tiles=tiles)
    c = student.config
    made.store.reserve(cost.host_bytes(c, stage, f32, 1, tiles))
    chunks = made.store.chunks[:]
    with Live([*chunks, *teacher.parameters(), *student.parameters(), ids]) as live:
        made.backward(stage, ids, None, 1.0, True)
    assert len(made.store.chunks) == len(chunks), "the host holds no more than was said"
    parts = cost.tiled_bytes(c, stage, f32, 1, rank, tiles)
    calls = tiles_file.calls_of_attention(1, c.n_head, c.n_kv_head, T)
    kernels = 5 * c.n_head * c.head_dim * 4 * T // calls
    assert sum(parts.values()) - kernels == pytest.approx(live.peak, rel=0.2)
    assert live.now <= parts["positions"] + sum(w.grad.nbytes for w in made.weights)


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("kind", ["relation and logits", "next token", "next token and teacher"])
@pytest.mark.parametrize("chunk", [96, 32])  # of 96 tokens
def test_the_head_holds_what_the_plan_says(kind, dtype, chunk, monkeypatch):
    teacher, student = pair("grouped", None)
    teacher.to(dtype)
    stage, V = stage_of(kind), teacher.config.vocab_size
    h = torch.randn(1, 96, teacher.config.width, dtype=dtype, requires_grad=True)
    y, targets = torch.randn_like(h).detach(), torch.randint(0, V, (1, 96))
    monkeypatch.setattr(step, "HEAD_CHUNK", chunk)
    with Live([*teacher.parameters(), *student.parameters(), h, y, targets]) as live:
        if stage.logits:
            losses = step.logit_kl(teacher, student, y, h, chunk)
        elif stage.teacher_share:
            losses = step._shared_losses(teacher, student, y, h, targets, stage.teacher_share)
        else:
            losses = step._cross_entropies(student, h, targets)
        losses.mean().backward()
    # Of bfloat16 the head's own logits may be gone before the peak
    foretold = [cost.logit_bytes(stage, b) * chunk * V for b in (4, dtype.itemsize)]
    small = 32 * h.numel()  # norms, and what comes back
    assert foretold[0] <= live.peak <= foretold[1] + small


# Measured on H100s, torch 2.11, in GiB (LOG.md): shape, stage, T, blocks at a time and in all,
# recomputed, shards
MEASURED = [
    (62.0, "llama2-7b", "relation", 4096, 1, 4, False, 1),
    (43.0, "llama2-7b", "relation", 4096, 2, 4, True, 1),
    (39.9, "llama2-7b", "next token", 16384, 1, 1, True, 1),
    (45.0, "llama2-7b", "next token", 32768, 1, 1, True, 1),
    (52.4, "llama2-7b", "relation", 2048, 4, 4, False, 4),
]


@pytest.mark.parametrize("gib, shape, objective, T, micro, blocks, again, shards", MEASURED)
def test_what_is_foretold_is_what_was_measured(
    gib, shape, objective, T, micro, blocks, again, shards
):
    c = bench_step.config_of(shape)
    stage = cost.Stage("stage", objective, T, blocks, 1, 1e-3, objective == "relation")
    parts = cost.memory(c, stage, bf16, micro, 32 * again, shards=shards, per_rank=blocks)
    assert sum(parts.values()) / 2**30 == pytest.approx(gib, rel=0.1)


# In tiles, LLaMA-2 7B, one block (bench/step.jsonl): GiB, T, layers on the GPU, outputs and
# q, k, v kept, processes, bits; with adapters of rank 64, but for the last
IN_TILES = [
    (11.05, 32_768, 9, 32, 0, 1, 4),
    (18.67, 32_768, 7, 32, 0, 1, None),
    (18.49, 81_920, 1, 32, 0, 1, None),
    (69.33, 131_072, 25, 32, 0, 1, None),
    (68.48, 262_144, 11, 25, 0, 1, None),
    (70.27, 350_000, 8, 32, 0, 1, None),
    (71.34, 131_072, 26, 32, 0, 1, None),
    (31.62, 131_072, 32, 32, 0, 4, None),
    (55.31, 131_072, 32, 32, 32, 4, None),
    (70.88, 524_288, 24, 32, 0, 4, None),
    (61.59, 262_144, 5, 32, 0, 1, "whole"),
]


@pytest.mark.parametrize("gib, T, on_gpu, outputs, qkv, P, bits", IN_TILES)
def test_what_is_foretold_of_tiles_is_no_less_than_was_measured(
    gib, T, on_gpu, outputs, qkv, P, bits
):
    c, tiles = bench_step.config_of("llama2-7b"), Tiles(4096, on_gpu, outputs, qkv)
    rank, bits = (None, None) if bits == "whole" else (64, bits)
    how = {"tiles": tiles, "P": P, "per_rank": 1, "fused": True, "gpu": True}
    parts = cost.memory(c, long_stage(T), bf16, 1, 0, rank=rank, bits=bits, **how)
    assert gib <= sum(parts.values()) / 2**30 <= 1.1 * gib


def machine(free: float, host: float, processes: int = 1, rank=64, shard=False) -> fit.Machine:
    """With so many GiB free. The device is never touched."""
    c, device = bench_step.config_of("llama2-7b"), torch.device("cuda")
    return fit.Machine(
        c, bf16, device, rank, shard, processes, int(free * 2**30), int(host * 2**30)
    )


def long_stage(T: int, batch: int = 1) -> cost.Stage:
    return cost.Stage("stage2", "next token", T, batch, 1, 1e-3)


def test_the_less_room_the_more_is_given_up():
    """Keep all, fewer blocks at a time, recompute, tiles with all on the GPU, then on the host."""
    stage = long_stage(2048, 8)
    kept = fit.settle(machine(400, 0), stage, None)
    assert (kept.micro, kept.recomputed, kept.tiles) == (4, 0, None)
    fewer = fit.settle(machine(50, 0), stage, None)
    assert (fewer.micro, fewer.recomputed, fewer.tiles) == (2, 0, None)
    again = fit.settle(machine(21, 0), stage, None)
    assert again.recomputed and not again.tiles
    short = fit.settle(machine(78, 100), long_stage(32768), None)
    assert 0 < short.recomputed < 32 and not short.tiles
    shared = fit.settle(machine(78, 100, 4), long_stage(131072), None)
    assert shared.tiles.qkv == 32
    long = fit.settle(machine(78, 100), long_stage(65536), None)
    assert long.tiles.on_gpu == long.tiles.outputs == 32 and long.tiles.host == 0
    assert 0 < long.tiles.qkv < 32 and f", q, k and v kept in {long.tiles.qkv}" in long.describe(32)
    fused = dataclasses.replace(machine(78, 100), fused=True)
    some = fit.settle(fused, long_stage(131072), None)  # in which all layers again would fit
    assert some.tiles.outputs == 32 > some.tiles.on_gpu and not some.recomputed
    longer = fit.settle(machine(78, 100), long_stage(262144), None)
    assert longer.tiles.outputs == 32 > longer.tiles.on_gpu > 0
    assert 0 < longer.tiles.host <= 100 * 2**30
    longest = fit.settle(machine(78, 100), long_stage(450_000), None)
    assert longest.tiles.outputs < 32
    for settled, free in ((kept, 400), (fewer, 50), (again, 21), (longer, 78), (longest, 78)):
        assert sum(settled.need.values()) <= free * 2**30
        assert settled.describe(32).count("\n") == 0


def test_layers_are_gathered_once_a_step_where_all_fit_beside_what_was_chosen():
    """It is counted, and takes nothing from blocks at a time or from what is kept."""
    stages = [cost.Stage("stage1", "relation", 4096, 16, 1, 1e-3, True), long_stage(16384, 4)]
    seen = set()
    for stage in (*stages, long_stage(131_072, 1)):
        for free in range(24, 160, 4):
            m = machine(free, 100, 4, None, shard=True)
            settled, plain = fit.settle(m, stage, None), fit._first(m, stage, None)
            seen.add(settled.gathered)
            assert (settled.micro, settled.recomputed, settled.tiles, settled.P) == (
                plain.micro, plain.recomputed, plain.tiles, plain.P
            )  # fmt: skip
            # every layer's matrices in bfloat16, the teacher's q, k and v and the student's
            c, trained = m.c, cost.trained_parameters(m.c, None)
            all_layers = 2 * (cost.parameters(c)[0] - 2 * c.vocab_size * c.width + trained)
            one = all_layers / 32
            more = sum(settled.need.values()) - sum(plain.need.values())
            room = fit.KEEP * m.free - sum(plain.need.values())
            assert settled.gathered == (room >= 31 * one - 1e6), (stage.name, free)
            assert more == pytest.approx(31 * one if settled.gathered else 0, rel=1e-3)
            said = settled.describe(32).removesuffix(", layers gathered once a step")
            assert said == plain.describe(32) and settled.gathered == (said != settled.describe(32))
    assert seen == {False, True}
    h100 = dataclasses.replace(machine(78, 100, 4, None, shard=True), fused=True)
    four = fit.settle(h100, stages[0], None)
    assert four.describe(32) == "2 blocks at a time, nothing twice, layers gathered once a step"
    assert not fit.settle(machine(400, 0, 4, None), stages[0], None).gathered


@pytest.mark.parametrize("objective", ["next token", "relation"])
@pytest.mark.parametrize("T", [4096, 16384, 65536, 131_072])
def test_of_recompute_and_tiles_the_one_with_less_work_is_taken(T, objective):
    """Counted layer by layer: what the backward does again, tiles' as much longer as measured."""
    c, models = bench_step.config_of("llama3-8b"), 1 if objective == "next token" else 2
    stage = cost.Stage("stage", objective, T, 1, 1, 1e-3, objective == "relation")
    qkv, o, mlp = 2 * 4096 * 48 * 128, 2 * 4096**2, 6 * 4096 * 14336
    attention = 2 * 4096 * T  # QK' and AV, half of each
    for recomputed, tiles in ((7, None), (0, Tiles(4096, 32, 32, 9)), (0, Tiles(4096, 5, 30))):
        again = recomputed * models * (qkv + o + mlp + attention)
        for l in range(32) if tiles else ():
            again += o + mlp + (models + (l >= tiles.qkv)) * qkv
            again += attention * (l >= tiles.outputs)
        assert cost.flops_again(c, stage, recomputed, tiles) == T * again
    m = dataclasses.replace(machine(78, 100), c=c, fused=True)
    settled = fit.settle(m, stage, None)
    for other in (*fit._recomputing(m, stage, None, 1), fit._tiled(m, stage, None)):
        assert fit._work(m, stage, settled) <= fit._work(m, stage, other)
    assert bool(settled.tiles) == (T > 32768) and bool(settled.recomputed) == (T == 16384)


@pytest.mark.parametrize("name, rank", [("llama3-1b", None), ("llama3-1b", 64), ("llama3-8b", 64)])
@pytest.mark.parametrize("T", [1024, 2048])
def test_a_short_block_goes_in_tiles_only_where_nothing_else_fits(name, rank, T):
    c = bench_step.config_of(name)
    stage = cost.Stage("stage1", "relation", T, 8192 // T, 1, 1e-3, True)
    ways = set()
    for free in np.arange(4, 80, 0.5):
        m = dataclasses.replace(machine(free, 100, 1, rank), c=c, fused=True)
        if settled := fit._first(m, stage, None):
            others = any(fit._recomputing(m, stage, None, n) for n in range(stage.batch, 0, -1))
            assert not (settled.tiles and others), (free, settled.describe(c.n_layer))
            ways.add("tiles" if settled.tiles else "again" if settled.recomputed else "whole")
    assert {"again", "whole"} <= ways


@pytest.mark.parametrize("free, host, T", [(22, 100, 81_920), (78.5, 102, 350_000)])
def test_the_lengths_that_others_reach_are_planned(free, host, T):
    assert fit.settle(machine(free, host), long_stage(T), None).tiles


def test_a_refusal_says_what_would_fit_and_that_does():
    m, T = machine(78, 100), 1_000_000
    with pytest.raises(ValueError) as e:
        fit.settle(m, long_stage(T), None)
    said = str(e.value)
    assert "\n" not in said and "78.0 GiB are free" in said and "on the host" in said
    longest = int(re.search(r"now 1000000 to (\d+)", said)[1])
    fit.settle(m, long_stage(longest), None)
    with pytest.raises(ValueError):
        fit.settle(m, long_stage(longest + 2048), None)
    more = int(re.search(r"start (\d+) processes", said)[1])
    fit.settle(machine(78, 100, more, shard=True), long_stage(T), None)
    with pytest.raises(ValueError, match="lower --length2"):
        fit.settle(machine(8, 100), long_stage(T), None)


def test_a_refusal_of_a_sharded_run_offers_what_goes_without_shard():
    """--bits 4 and --shard exclude each other, and --shard is there already."""
    m, stage = machine(8, 100, 2, shard=True), long_stage(1_000_000, 2)
    said = fit.refusal(m, stage, None)
    longest = int(re.search(r"with --bits 4 in place of --shard \(up to (\d+) tokens\)", said)[1])
    packed = dataclasses.replace(m, shard=False, bits=4)
    assert fit.settle(packed, long_stage(longest, 2), None).tiles
    with pytest.raises(ValueError):
        fit.settle(packed, long_stage(longest + 2048, 2), None)
    assert "in place of" not in fit.refusal(dataclasses.replace(m, shard=False), stage, None)
    assert "spread the model" not in fit.refusal(m, long_stage(10**9, 2), None)


def test_a_containers_limit_counts_and_what_it_read_from_disk_does_not(tmp_path, monkeypatch):
    files = {"memory.max": str(2**30), "memory.current": str(2**29)}
    for name, text in (files | {"memory.stat": f"anon 7\ninactive_file {2**28}\n"}).items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cost, "CGROUPS", [(tmp_path / "memory.max", tmp_path / "memory.current")])
    assert cost.free_host_memory() == 2**29 + 2**28
