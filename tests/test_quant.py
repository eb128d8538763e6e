"""Frozen weights in 4 bits: the same mathematics as with the unpacked matrices, which are held once."""

import importlib.util
import json

import pytest
import torch
from conftest import random_model, write_model
from safetensors.torch import load_file
from test_plan import Live
from test_step import PLAIN, on_a_gpu, stage_of, values_and_gradients

import train
from bench import step as bench_step
from engine import cost, fit, flags, lora, quant, resume, states, step
from engine.tiles import Tiles
from model import TRAINED, Linear, Llama, make_student, trainable

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
WAYS = ({}, {"recomputed": 9}, {"tiles": Tiles(14, 1, 1)})
FLAGS = ["--lora-rank", "4", "--bits", "4"]


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")


def packed_pair(dtype: torch.dtype, device: torch.device = CPU, **shape):
    """Teacher, and student with adapters away from where they start; layers in 4 bits."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512} | shape
    teacher = random_model(attention_bias=True, **shape).to(dtype)
    student = make_student(teacher, teacher.config.extended("yarn", 8), trained=())
    quant.pack(teacher, student, device)
    lora.adapt(student, TRAINED, 4, 8.0, 0.0)
    torch.manual_seed(1)
    for p in trainable(student).values():
        p.data = p.data.to(torch.promote_types(dtype, torch.float32))
        p.data += 0.05 * torch.randn(p.shape, dtype=p.dtype).to(device)
    return teacher, student


def unpacked(model: Llama) -> Llama:
    """The same, each packed matrix as a plain Linear's weight."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, quant.Packed):
                bias = child.bias
                plain = Linear(child.in_features, child.out_features, bias=bias is not None)
                dtype = torch.float32 if bias is None else bias.dtype
                weight = child.matrix(model.dtype if bias is None else dtype)
                plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), bias
                setattr(module, name, plain)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (50, 33)], ids=["whole blocks", "a block cut short"])
def test_a_product_is_that_of_the_librarys_own_matrix(bnb, shape, dtype):
    """In float64, of what bitsandbytes itself unpacks; of bfloat16 the error is a product's own."""
    torch.manual_seed(0)
    linear = Linear(shape[1], shape[0]).to(dtype)
    packed = quant.Packed(linear, CPU)
    source = linear.weight.detach() if dtype != torch.float64 else linear.weight.detach().float()
    matrix = bnb.dequantize_4bit(*bnb.quantize_4bit(source, blocksize=64, quant_type="nf4"))
    assert packed.packed.nbytes == -(-linear.weight.numel() // 2)
    x = torch.randn(3, 7, shape[1]).to(dtype).requires_grad_()
    dy = torch.randn(3, 7, shape[0]).to(dtype)
    exact = x.double() @ matrix.double().T + linear.bias.double()
    eager = torch.nn.functional.linear(x.detach(), matrix.to(dtype), linear.bias)
    y = packed(x)
    y.backward(dy)
    d_exact, d_eager = dy.double() @ matrix.double(), dy @ matrix.to(dtype)
    least = 1e-12 if dtype == torch.float64 else 1e-6
    for found, low, right in ((y, eager, exact), (x.grad, d_eager, d_exact)):
        assert found.dtype == dtype
        error = 2 * (low.double() - right).norm() + least * right.norm()
        assert (found.double() - right).norm() <= error


def test_the_gradient_of_a_product_is_right(bnb):
    packed = quant.Packed(Linear(33, 12), CPU)
    x = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    packed.bias = None
    assert torch.autograd.gradcheck(packed, x)


def test_both_models_hold_one_copy_in_4_bits(bnb):
    teacher, student = packed_pair(torch.float32)
    for theirs, ours in zip(teacher.model.layers, student.model.layers, strict=True):
        assert ours.mlp.down_proj is theirs.mlp.down_proj
        assert ours.self_attn.q_proj.frozen is theirs.self_attn.q_proj
        assert ours.input_layernorm.weight is theirs.input_layernorm.weight
    assert student.lm_head.weight is teacher.model.embed_tokens.weight
    named = dict(student.named_parameters())
    assert not any(
        p.dim() == 2 and "lora_" not in name for name, p in named.items() if "layers" in name
    )
    assert quant.is_packed(student) and not quant.is_packed(random_model())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", PLAIN)
def test_loss_and_gradients_are_those_of_the_unpacked_models(bnb, objective, dtype):
    """To the bit, plain and computed again in the backward; in tiles to rounding, as a product of
    some rows of a block may add in another order where autograd looks on.
    """
    for how in WAYS[:2] if dtype == torch.bfloat16 else WAYS:
        found, expected = (
            values_and_gradients(step.Step(*models, PLAIN, dtype=dtype, **how), objective)
            for models in (packed_pair(dtype), map(unpacked, packed_pair(dtype)))
        )
        for x, y in zip(found, expected, strict=True):
            bound = 0 if "tiles" not in how else 1e-12 if dtype == torch.float64 else 1e-5
            assert (x - y).norm() <= bound * y.norm(), how


@pytest.mark.parametrize("stage", PLAIN)
def test_the_plan_counts_the_bytes_of_packed_weights(bnb, stage):
    teacher, _ = packed_pair(torch.bfloat16)
    held = {id(x): x.nbytes for x in (*teacher.parameters(), *teacher.buffers())}
    held |= {
        id(m): m.format.absmax.nbytes for m in teacher.modules() if isinstance(m, quant.Packed)
    }
    tiny = stage_of(stage)
    parts = cost.memory(teacher.config, tiny, torch.bfloat16, 1, 1, rank=4, bits=4)
    said = parts["frozen and shared weights"] + parts["teacher's q, k, v"]
    assert said == pytest.approx(sum(held.values()), rel=0.02)
    assert parts["a matrix unpacked"] == 64 * 96 * 2


@pytest.mark.parametrize("outputs", [0, 2])
def test_a_pass_in_tiles_unpacks_one_matrix_at_a_time(bnb, outputs):
    """Beside what the same pass takes over plain weights; and nothing stays after it."""

    def peak(models) -> tuple[int, int]:
        teacher, student = models
        made = step.Step(*models, {}, dtype=torch.float32, tiles=Tiles(64, 2, outputs))
        stage, ids = cost.Stage("s", "next token", 512, 1, 1, 1.0), torch.zeros(1, 513).long()
        packed = [m.format for m in teacher.modules() if isinstance(m, quant.Packed)]
        known = [*teacher.parameters(), *teacher.buffers(), *student.parameters(), ids]
        with Live([*known, *(x for f in packed for x in (f.absmax, f.code))]) as live:
            made.backward(stage, ids, None, 1.0, True)
        return live.peak, live.now

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    plain, stays = peak([unpacked(m) for m in packed_pair(torch.float32, **sizes)])
    found, after = peak(packed_pair(torch.float32, **sizes))
    assert plain < found <= plain + 256 * 1024 * 4 and after == stays


def test_small_cards_are_planned_for():
    """LLaMA-2 7B from 4K to 32K with adapters: 22 GiB as it is, 14 with --bits 4; and what a
    refusal says of that.
    """
    c, device = bench_step.config_of("llama2-7b"), torch.device("cuda")

    def machine(gib: float, bits: int | None) -> fit.Machine:
        free, host = int(gib * 2**30), 100 * 2**30
        return fit.Machine(c, torch.bfloat16, device, 64, False, 1, free, host, bits=bits)

    first = cost.Stage("stage1", "relation", 4096, 4, 1, 1e-3, True)
    second = cost.Stage("stage2", "next token", 32768, 1, 1, 1e-3)
    for gib, bits in ((22, None), (14, 4)):
        for stage in (first, second):
            settled = fit.settle(machine(gib, bits), stage, None)
            assert sum(settled.need.values()) <= gib * 2**30
    with pytest.raises(ValueError, match=r"in 4 bits with --bits 4 \(up to 32768 tokens\)"):
        fit.settle(machine(14, None), second, None)
    with pytest.raises(ValueError, match="lower --length2") as e:
        fit.settle(machine(6, 4), second, None)
    assert "--bits" not in str(e.value) and "--shard" not in str(e.value)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("objective", PLAIN)
def test_in_bfloat16_packed_weights_are_as_exact_as_the_same_unpacked(bnb, objective, device):
    """Against float64: the error of the loss and of all gradients, at most twice theirs."""
    device = torch.device(device)

    def run(models, dtype, how):
        made = step.Step(*models, {}, dtype=dtype, graphs=False, **how)
        return torch.cat([v.double().flatten() for v in values_and_gradients(made, objective)])

    wide = [unpacked(m).double() for m in packed_pair(torch.bfloat16, device)]
    exact = run(wide, torch.float64, {})
    for how in WAYS:
        plain = run(map(unpacked, packed_pair(torch.bfloat16, device)), torch.bfloat16, how)
        found = run(packed_pair(torch.bfloat16, device), torch.bfloat16, how)
        assert (found - exact).norm() <= 2 * (plain - exact).norm(), how


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "small", num_hidden_layers=3)


def command(small, text_dir, out, *more) -> list[str]:
    given = {"--teacher": small, "--data": text_dir, "--out": out, "--cache": out.parent / "cache"}
    given |= {"--tokens1": 3 * 4 * 64, "--tokens2": 2 * 128, "--batch1": 4, "--batch2": 2}
    given |= {"--lr1": 0.01, "--lr2": 0.003, "--scale": 2, "--eval-blocks": 1, "--device": "cpu"}
    return [*(str(x) for pair in given.items() for x in pair), "--dtype", "float32", *more]


def test_a_run_in_4_bits_and_its_export_from_the_original_files(
    bnb, small, text_dir, tmp_path, capsys
):
    """Interrupted and resumed; every frozen tensor is the teacher's, and q, k, v the stored ones
    plus the adapters' product.
    """
    train.main(command(small, text_dir, tmp_path / "whole", *FLAGS))
    said = capsys.readouterr().out
    assert "in 4 bits" in said and "a matrix unpacked" in said
    resumed = command(small, text_dir, tmp_path / "cut", *FLAGS, "--save-minutes", "0")
    stopped, stop = resume.StopRequest.__bool__, SystemExit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.StopRequest, "__bool__", lambda self: True)
        with pytest.raises(stop):
            train.main(resumed)
    assert resume.StopRequest.__bool__ is stopped
    (file,) = states.latest(tmp_path / "cut" / "state").glob("*.safetensors")
    state = load_file(file)
    assert all("lora_" in name for name in state)
    train.main([*resumed, "--resume"])
    original, adapter = load_file(small / "model.safetensors"), {}
    for out in ("whole", "cut"):
        held = load_file(tmp_path / out / "student" / "model.safetensors")
        adapter[out] = load_file(tmp_path / out / "adapter" / "adapter_model.safetensors")
        assert held.keys() == original.keys()
        for name, w in original.items():
            if name.split(".")[-2] in TRAINED:
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                a, b = (adapter[out][f"{stem}.lora_{x}.weight"].double() for x in "AB")
                w = w.double() + 2 * (b @ a)
                assert (held[name].double() - w).norm() <= 1e-6 * w.norm()
            else:
                assert torch.equal(held[name], w), name
    assert all(torch.equal(adapter["whole"][n], adapter["cut"][n]) for n in adapter["whole"])
    rows = json.loads((tmp_path / "whole" / "report.json").read_text())["rows"]
    assert rows["loss at 1x"].keys() >= {"teacher", "untrained", "stage1", "stage2"}


def test_adapters_are_added_to_the_stored_numbers(bnb):
    """Not to what 4 bits, or a narrower compute dtype, made of them."""
    _, student = packed_pair(torch.bfloat16)
    original = random_model(
        vocab_size=512, hidden_size=64, intermediate_size=96, attention_bias=True
    )
    merged = lora.merge(student, original)
    assert merged.config == student.config
    for name, p in merged.named_parameters():
        module = student.get_submodule(name.rpartition(".")[0])
        w = original.get_parameter(name)
        if isinstance(module, lora.LoraLinear) and name.endswith("weight"):
            w = w + module.product()
        assert torch.equal(p, w), name


@pytest.mark.parametrize(
    "given, said",
    [
        (["--bits", "4"], "add --lora-rank"),
        ([*FLAGS, "--shard"], "give one of the two"),
        (["--lora-rank", "4", "--bits", "8"], "invalid choice"),
    ],
)
def test_what_cannot_be_packed_is_refused(given, said):
    with pytest.raises(ValueError, match=said) as e:
        flags.parse(given, "", train.PRESETS)
    assert "\n" not in str(e.value)


def test_a_missing_library_is_one_line_before_anything_is_read(monkeypatch, tmp_path):
    find = importlib.util.find_spec

    def without(name, *more):
        return None if name == "bitsandbytes" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ValueError, match=r"^--bits 4 needs the package: pip install bitsandbytes"):
        train.main([*FLAGS, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_library_that_does_not_work_here_is_one_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image\nand much more")

    monkeypatch.setattr(quant, "Packed", broken)
    with pytest.raises(ValueError, match=r"does not work on cpu \(no kernel image\); install") as e:
        quant.check(CPU)
    assert "\n" not in str(e.value)


def test_a_working_library_is_found_to_work(bnb):
    before = torch.get_rng_state()
    quant.check(CPU)
    assert torch.equal(torch.get_rng_state(), before)
