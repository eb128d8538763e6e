"""Directories in and out: round trips, every kind of damage, and a fuzz over a few hundred
mutations.
"""

import itertools
import json
import os
import random
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import random_model, write_model
from safetensors.torch import load_file, save_file

from hub import checkpoint, files, rope_json
from hub.checkpoint import set_parameter
from hub.shards import Shards
from hub.tokenizer import load_tokenizer
from model import TRAINED, Llama, LlamaConfig, make_student

IDS = torch.randint(0, 4096, (1, 20), generator=torch.Generator().manual_seed(0))


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    new = json.dumps(change(header)).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def rewrite(path: Path, change) -> None:
    """Saves the weights again after `change` edited the dict of tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_and_sharded_round_trips_keep_every_bit(tmp_path, dtype):
    model = random_model(tie_word_embeddings=False).to(dtype)
    for name, size in (("single", 10**9), ("sharded", 200_000)):
        checkpoint.save_pretrained(model, tmp_path / name, shard_bytes=size)
        again = Llama.from_pretrained(tmp_path / name)
        for (n, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype, n
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


def test_old_inv_freq_buffers_and_a_stored_tied_head_are_skipped(model_copy):
    expected = Llama.from_pretrained(model_copy)(IDS)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(model_copy, add)
    assert torch.equal(Llama.from_pretrained(model_copy)(IDS), expected)


def damage(name: str, path: Path) -> None:
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    index = path / "model.safetensors.index.json"
    norm = "model.norm.weight"
    match name:
        case "no config":
            (path / "config.json").unlink()
        case "config is a list":
            (path / "config.json").write_text("[]")
        case "config is deep":
            (path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        case "config repeats a key":
            (path / "config.json").write_text('{"model_type": "llama", "model_type": "qwen2"}')
        case "config is binary":
            (path / "config.json").write_bytes(b"\xff\xfe\x00")
        case "truncated":
            weights.write_bytes(data[: len(data) // 2])
        case "seven bytes":
            weights.write_bytes(data[:7])
        case "header longer than the file":
            weights.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
        case "missing":
            weights.unlink()
        case "renamed":
            weights.rename(path / "weights.safetensors")
        case "pickle only":
            weights.rename(path / "pytorch_model.bin")
        case "meta's format":
            weights.rename(path / "consolidated.00.pth")
        case "a tensor is missing":
            rewrite(path, lambda t: t.pop(norm))
        case "a tensor too many":
            rewrite(path, lambda t: t.update(surprise=torch.ones(1)))
        case "another shape":
            rewrite(path, lambda t: t.update({norm: torch.ones(31)}))
        case "integers":
            rewrite(path, lambda t: t.update({norm: torch.ones(32, dtype=torch.int64)}))
        case "NaN":
            rewrite(path, lambda t: t[norm].__setitem__(3, float("nan")))
        case "infinity":
            rewrite(path, lambda t: t[norm].__setitem__(3, float("-inf")))
        case "another vocabulary":
            edit_config(path, vocab_size=5000)
        case "absurd vocabulary":
            edit_config(path, vocab_size=10**12)
        case "overlap":
            edit_header(weights, lambda h: h | {norm: h[norm] | {"data_offsets": [0, 128]}})
        case "negative offsets":
            edit_header(weights, lambda h: h | {norm: h[norm] | {"data_offsets": [-128, 0]}})
        case "absurd shape":
            edit_header(weights, lambda h: h | {norm: h[norm] | {"shape": [10**12]}})
        case "dtype is a list":
            edit_header(weights, lambda h: h | {norm: h[norm] | {"dtype": []}})
        case "a tensor stands twice":  # safetensors takes the last, as their byte ranges are one
            length = struct.unpack("<Q", data[:8])[0]
            header = data[8 : 8 + length].decode()
            entry = json.dumps({norm: json.loads(header)[norm]})[1:-1]
            header = f"{header.rstrip()[:-1]},{entry}}}".encode()
            weights.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        case "metadata of numbers":
            edit_header(weights, lambda h: h | {"__metadata__": {"format": 1}})
        case "metadata is a list":
            edit_header(weights, lambda h: h | {"__metadata__": [1]})
        case "shard with a zero byte":
            index.write_text(json.dumps({"weight_map": {norm: "a\0.safetensors"}}))
        case "link to itself":
            index.write_text(json.dumps({"weight_map": {norm: "loop.safetensors"}}))
            (path / "loop.safetensors").symlink_to(path / "loop.safetensors")
        case "shard outside":
            index.write_text(json.dumps({"weight_map": {norm: "../other.safetensors"}}))
        case "absolute shard":
            index.write_text(json.dumps({"weight_map": {norm: "/etc/passwd"}}))
        case "link out":
            shutil.move(weights, path.parent / "elsewhere.safetensors")
            weights.symlink_to(path.parent / "elsewhere.safetensors")
        case "index disagrees":
            index.write_text(json.dumps({"weight_map": {norm: "model.safetensors"}}))
        case "index names what is not there":
            names = dict.fromkeys([*load_file(weights), "ghost"], "model.safetensors")
            index.write_text(json.dumps({"weight_map": names}))
        case "index without map":
            index.write_text("{}")
        case _:
            raise AssertionError(name)


DAMAGE = {
    "no config": "config.json does not exist",
    "config is a list": "must hold a JSON object",
    "config is deep": "nested too deeply",
    "config repeats a key": "stands twice",
    "config is binary": "not valid JSON",
    "truncated": "truncated",
    "seven bytes": "truncated or not safetensors",
    "header longer than the file": "truncated or not safetensors",
    "missing": "no model.safetensors",
    "renamed": "no model.safetensors",
    "pickle only": "pickle, which can run code",
    "meta's format": "Meta's own format",
    "a tensor is missing": "missing: model.norm.weight",
    "a tensor too many": "not in the model: surprise",
    "another shape": r"model.norm.weight is \[31\], not \[32\]",
    "integers": "model.norm.weight has dtype I64",
    "NaN": "model.norm.weight holds NaN",
    "infinity": "model.norm.weight holds NaN or infinity",
    "another vocabulary": r"embed_tokens.weight is \[4096, 32\], not \[5000, 32\]",
    "absurd vocabulary": "vocab_size = 1000000000000",
    "overlap": "model.safetensors is .*not safetensors: .*invalid.* offset",
    "negative offsets": "model.safetensors is .*not safetensors: .*-128",
    "absurd shape": "model.safetensors is .*not safetensors: .*invalid shape",
    "dtype is a list": "model.safetensors is .*not safetensors: .*expected string",
    "metadata of numbers": "model.safetensors is .*not safetensors: .*expected a string",
    "metadata is a list": "model.safetensors is .*not safetensors: .*expected a map",
    "a tensor stands twice": "header of .*model.safetensors is not valid JSON: a key stands twice",
    "shard with a zero byte": "must be .safetensors files",
    "link to itself": "leads nowhere|is missing",
    "shard outside": r"\.\./other",
    "absolute shard": "/etc/passwd",
    "link out": "link to .* outside",
    "index disagrees": "the index says None",
    "index names what is not there": "ghost",
    "index without map": "no weight_map",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_sentence(name, model_copy):
    damage(name, model_copy)
    with pytest.raises(ValueError, match=DAMAGE[name]) as e:
        Llama.from_pretrained(model_copy)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_links_inside_the_hubs_cache_are_followed(tiny_dir, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_dir.iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-{file.name}")
    assert torch.equal(Llama.from_pretrained(snapshot)(IDS), Llama.from_pretrained(tiny_dir)(IDS))


def mutate(path: Path, rng: random.Random) -> None:
    """One random change to one file: bits, lengths, or a value inside its JSON."""
    file = rng.choice(
        [f for f in sorted(path.iterdir()) if f.name in ("config.json", "model.safetensors")]
    )
    data = bytearray(file.read_bytes())
    kind = rng.choice(["bit", "cut", "grow", "zero", "value"])
    # half of the changes fall in the header, which is where the structure is
    where = rng.randrange(min(len(data), 3000) if rng.random() < 0.8 else len(data))
    if kind == "value" and file.name == "config.json":
        config = json.loads(bytes(data))
        config[rng.choice(sorted(config))] = rng.choice(
            [None, -1, 0, 1e308, "x", [], {}, True, 10**15, [1], 0.5]
        )
        data = bytearray(json.dumps(config).encode())
    elif kind == "cut":
        del data[where:]
    elif kind == "grow":
        data[where:where] = rng.randbytes(rng.randrange(1, 40))
    elif kind == "zero":
        data[where : where + 8] = bytes(8)
    else:
        data[where] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_fuzz_no_traceback_no_hang_and_no_wrong_model(tiny_dir, tmp_path):
    """A mutated directory is refused with a ValueError, or loads as what its config and bytes say."""
    rng, refused = random.Random(0), 0
    for n in range(400):
        path = Path(shutil.copytree(tiny_dir, tmp_path / str(n)))
        mutate(path, rng)
        began = time.monotonic()
        try:
            model = Llama.from_pretrained(path)
        except ValueError as e:
            assert str(e)
            refused += 1
        else:
            tensors = load_file(path / "model.safetensors")
            assert all(torch.equal(p, tensors[k]) for k, p in model.named_parameters())
            assert model.config == LlamaConfig.from_hf(
                json.loads((path / "config.json").read_text())
            )
        assert time.monotonic() - began < 5
        shutil.rmtree(path)
    assert 100 < refused < 400, "a fuzz that refuses nothing or everything shows nothing"


def test_a_damaged_tokenizer_is_refused_or_read(tiny_dir, tmp_path):
    """Bits flipped and pieces cut out anywhere in the file: a ValueError or a tokenizer, nothing
    else.
    """
    rng, refused = random.Random(1), 0
    (tmp_path / "config.json").write_text('{"eos_token_id": 4095}')
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        data = (tiny_dir / name).read_bytes()
        for _ in range(40):
            for file in tmp_path.glob("tokenizer*"):
                file.unlink()
            broken, where = bytearray(data), rng.randrange(len(data))
            if rng.random() < 0.5:
                broken[where] ^= 1 << rng.randrange(8)
            else:
                del broken[where : where + rng.randrange(1, 2000)]
            (tmp_path / name).write_bytes(broken)
            try:
                load_tokenizer(tmp_path).encode("def main(): return 1")
            except ValueError as e:
                assert str(e)
                refused += 1
    assert refused > 20


def test_a_failed_write_leaves_the_old_directory(tmp_path):
    target = write_model(tmp_path / "model", seed=1)
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    with pytest.raises(KeyboardInterrupt), files.atomic_directory(target) as work:
        (work / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_export_is_checked_by_reading_it_back(tmp_path, monkeypatch):
    real = checkpoint._write_shards

    def lossy(shards, tensor_of, *rest):
        def other(name):
            return tensor_of(name) + 0.1 if name == "model.norm.weight" else tensor_of(name)

        return real(shards, other, *rest)

    monkeypatch.setattr(checkpoint, "_write_shards", lossy)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        checkpoint.save_pretrained(random_model(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_an_export_is_the_file_that_the_safetensors_package_writes(tmp_path, shard_bytes):
    """Of every dtype, in odd sizes: where they lie is no multiple of eight bytes."""
    model = random_model(tie_word_embeddings=False)
    kinds = itertools.cycle([torch.bfloat16, torch.float64, torch.float16, torch.float32])
    for p, kind in zip(model.parameters(), kinds, strict=False):
        p.data = p.data.to(kind)
    odd = {"model.norm.weight": torch.randn(33), "a": torch.randn(7, 3).bfloat16()}
    like = dict(model.named_parameters()) | {k: torch.nn.Parameter(v) for k, v in odd.items()}
    like = {k: v.detach() for k, v in like.items()} | {"b": torch.empty(0), "c": torch.tensor(1.5)}
    with Shards(tmp_path, like, shard_bytes) as shards, ThreadPoolExecutor() as pool:
        for each in checkpoint._write_shards(shards, like.__getitem__, pool):
            each.result()
    written = sorted(tmp_path.glob("*.safetensors"))
    assert (len(written) > 1) == (shard_bytes < 10**9)
    for file in written:
        save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, like.pop(name))
    assert not like


def test_the_same_bits_are_told_apart_from_equal_numbers(tmp_path):
    x = torch.randn(4, 16)
    assert checkpoint._same_bits(x, x.clone()) and checkpoint._same_bits(x[0, 1:8], x[0, 1:8])
    for other in (x + 1e-6 * torch.eye(4, 16), x.index_fill(1, torch.tensor(15), 0.0)):
        assert not checkpoint._same_bits(x, other)
    assert not checkpoint._same_bits(torch.zeros(8), -torch.zeros(8))


def test_an_export_keeps_the_stored_bits_of_what_was_frozen_and_only_of_that(tmp_path):
    """Computed in bfloat16, stored in float32: frozen tensors are the teacher's own bits."""
    source = write_model(tmp_path / "teacher", tie_word_embeddings=False)
    rounded = Llama.from_pretrained(source, dtype=torch.bfloat16)
    student = make_student(rounded, rounded.config.extended("linear", 8))
    keep = {"frozen_from": source, "trained": TRAINED, "dtype": torch.float32}
    checkpoint.save_pretrained(student, tmp_path / "x", **keep)
    stored, written = (load_file(p / "model.safetensors") for p in (source, tmp_path / "x"))
    for name, p in student.named_parameters():
        assert torch.equal(written[name], p if p.requires_grad else stored[name])
    set_parameter(student, "model.norm.weight", torch.ones(32))
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight is not what"):
        checkpoint.save_pretrained(student, tmp_path / "y", **keep)


def test_an_export_whose_config_says_another_network_is_caught(tmp_path, monkeypatch):
    real = rope_json.write
    monkeypatch.setattr(rope_json, "write", lambda rope: real(rope) | {"rope_scaling": None, "rope_parameters": None})  # fmt: skip
    with pytest.raises(RuntimeError, match="other logits"):
        model = random_model(rope_scaling={"rope_type": "linear", "factor": 8.0})
        checkpoint.save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_chat_template_that_is_a_link_does_not_carry_a_secret_into_the_export(tmp_path):
    teacher = write_model(tmp_path / "teacher")
    (tmp_path / "secret").write_text("the password")
    (teacher / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is a link to .*secret, outside"):
        checkpoint.save_pretrained(random_model(), tmp_path / "x", tokenizer_from=teacher)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "teacher"]


def test_the_exported_length_is_the_new_one_and_transformers_cuts_there(tmp_path):
    teacher = write_model(tmp_path / "teacher")
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    student = make_student(random_model(), random_model().config.extended("linear", 8))
    checkpoint.save_pretrained(student, tmp_path / "x", tokenizer_from=teacher)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert len(theirs("a b " * 1000, truncation=True)["input_ids"]) == 512


@pytest.fixture(params=[0o022, 0o077])
def mask(request):
    """The umask of a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_planted_names_are_not_followed_and_nothing_is_left_over(tmp_path, mask):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    out = tmp_path / "out"
    out.mkdir()
    for name in (".run.json.writing", ".run.json", ".student.writing", ".student.old"):
        (out / name).symlink_to(victim)
    with files.replacing(out / "run.json") as f:
        f.write(b"new")
    real = tmp_path / "real"
    real.mkdir()
    (real / "keep").write_text("mine")
    (out / "student").symlink_to(real)
    with files.atomic_directory(out / "student") as work:
        (work / "file").write_text("new")
    assert victim.read_text() == "untouched" and (real / "keep").read_text() == "mine"
    assert (out / "run.json").read_text() == (out / "student" / "file").read_text() == "new"
    assert not (out / "student").is_symlink()
    assert (out / "student").stat().st_mode & 0o777 == 0o777 & ~mask
    assert len(list(out.iterdir())) == 6


def test_an_unreadable_file_is_a_sentence_that_says_so(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        files.read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"cannot read .*x: permission denied"), files.reading("x"):
        raise PermissionError(13, "Permission denied")


def test_weights_near_the_largest_float_are_exported(tmp_path):
    """Their logits are not finite: no reason to lose the export."""
    model = random_model()
    model.model.norm.weight.data[3] = 3e38
    checkpoint.save_pretrained(model, tmp_path / "x")
    assert Llama.from_pretrained(tmp_path / "x").model.norm.weight[3] == torch.tensor(3e38)


def test_the_weights_are_held_against_the_config_from_headers_alone(model_copy):
    config = LlamaConfig.from_hf(files.read_json(model_copy / "config.json"))
    with torch.device("meta"):
        model = Llama(config)
    assert set(checkpoint.check_fits(model, model_copy)) == {n for n, _ in model.named_parameters()}
    rewrite(model_copy, lambda t: t["model.norm.weight"].__setitem__(3, float("nan")))
    checkpoint.check_fits(model, model_copy)  # reads no tensor
    rewrite(model_copy, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        checkpoint.check_fits(model, model_copy)


# ---- what is no directory of full weights, and what is two models


def other(name: str, path: Path) -> Path:
    """Turns the model in `path` into something else; what a user would then give."""
    weights, norm = path / "model.safetensors", "model.norm.weight"
    q = "model.layers.0.self_attn.q_proj"
    match name:
        case "a gguf file":
            (path / "model.gguf").write_bytes(b"GGUF")
            return path / "model.gguf"
        case "a safetensors file":
            return weights
        case "gguf alone":
            weights.rename(path / "model.gguf")
        case "a trainer's folder":
            for step in (500, 1000):
                shutil.copytree(path, path.parent / "run" / f"checkpoint-{step}")
            return path.parent / "run"
        case "a run's folder":
            shutil.copytree(path, path.parent / "run" / "student")
            return path.parent / "run"
        case "git-lfs weights" | "git-lfs config" | "git-lfs index":
            files = {"weights": "model.safetensors", "config": "config.json"}
            files["index"] = "model.safetensors.index.json"
            pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
            (path / files[name.split()[1]]).write_text(pointer)
        case "an adapter" | "our own adapter":
            adapter = path.parent / "adapter"
            adapter.mkdir()
            (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
            save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
            if name == "our own adapter":
                path.rename(path.parent / "student")
            return adapter
        case "an adapter in the model":
            (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        case "compiled":
            rewrite(path, lambda t: [t.update({f"_orig_mod.{n}": t.pop(n)}) for n in [*t]])
        case "data parallel":
            rewrite(path, lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in [*t]])
        case "both":
            rewrite(path, lambda t: [t.update({f"module._orig_mod.{n}": t.pop(n)}) for n in [*t]])
        case "layers compiled":
            rename = "model.layers.0._orig_mod."
            rewrite(path, lambda t: [t.update({n.replace("model.layers.0.", rename): t.pop(n)}) for n in [*t]])  # fmt: skip
        case "gptq":
            packed = {"qweight": torch.ones(4, 32, dtype=torch.int32), "g_idx": torch.ones(32)}
            rewrite(path, lambda t: (t.pop(f"{q}.weight"), t.update({f"{q}.{k}": v for k, v in packed.items()})))  # fmt: skip
        case "bitsandbytes":
            more = {"absmax": torch.ones(8), "quant_state.bitsandbytes__nf4": torch.ones(8)}
            rewrite(path, lambda t: t.update({f"{q}.weight.{k}": v for k, v in more.items()}))
        case "fp8":
            rewrite(path, lambda t: t.update({f"{q}.weight": t[f"{q}.weight"].to(torch.float8_e4m3fn)}))  # fmt: skip
        case "compressed":
            rewrite(path, lambda t: t.update({f"{q}.weight_scale": torch.ones(1)}))
        case "mlx":
            rewrite(path, lambda t: t.update({f"{q}.scales": torch.ones(1), f"{q}.biases": torch.ones(1)}))  # fmt: skip
        case "config: awq":
            edit_config(path, quantization_config={"quant_method": "awq", "bits": 4})
        case "config: empty":
            edit_config(path, quantization_config={})
        case "config: mlx":
            edit_config(path, quantization={"group_size": 64, "bits": 4})
        case "config: older":
            edit_config(path, compression_config={"format": "int-quantized"})
        case "config: other weights":
            edit_config(path, transformers_weights="other.safetensors")
        case "a head of its own":
            rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))  # fmt: skip
        case "a head of another shape":
            rewrite(path, lambda t: t.update({"lm_head.weight": torch.ones(7, 32)}))
        case "no head":
            edit_config(path, tie_word_embeddings=False)
        case "whole file and other shards":
            shards(path)
            rewrite(path, lambda t: t[norm].add_(1))
        case "whole file of fewer tensors":
            shards(path)
            rewrite(path, lambda t: t.pop(norm))
        case _:
            raise AssertionError(name)
    return path


def shards(path: Path) -> None:
    """Adds shards and index of the same tensors beside the whole file."""
    model = Llama.from_pretrained(path)
    checkpoint.save_pretrained(model, path.parent / "sharded", shard_bytes=200_000)
    for file in (path.parent / "sharded").glob("model*"):
        shutil.copy(file, path)


OTHERS = {
    "a gguf file": "llama.cpp's format; give the Hugging Face directory",
    "a safetensors file": "is a file; give a Hugging Face directory.*such as .*model$",
    "gguf alone": "llama.cpp's format .*give the directory of safetensors",
    "a trainer's folder": "no config.json, but checkpoint-1000, checkpoint-500 in it do: give .*checkpoint-1000$",
    "a run's folder": "no config.json, but student in it does: give .*run/student$",
    "git-lfs weights": "model.safetensors is a pointer of git-lfs.*git lfs pull",
    "git-lfs config": "config.json is a pointer of git-lfs",
    "git-lfs index": "index.json is a pointer of git-lfs",
    "an adapter": r"adapter of org/base, not a model; merge it first, with peft.*merge_and_unload\(\)",
    "our own adapter": "an adapter, not a model; it is merged in .*student: give that",
    "an adapter in the model": "holds a model and an adapter .*org/base.*move one",
    "compiled": r"hold '_orig_mod\.'.*torch.compile adds",
    "data parallel": r"hold 'module\.'.*DistributedDataParallel",
    "both": r"hold '_orig_mod\.' and 'module\.'",
    "layers compiled": r"hold '_orig_mod\.'",
    "gptq": "quantised.*q_proj.g_idx, .*q_proj.qweight.*give the original model",
    "bitsandbytes": "quantised.*absmax",
    "fp8": r"quantised.*q_proj.weight\)",
    "compressed": "quantised.*weight_scale",
    "mlx": "quantised.*biases",
    "config: awq": "quantization_config is .*awq.* quantised",
    "config: empty": "quantization_config is {}: the checkpoint is quantised",
    "config: mlx": "quantization is .* quantised",
    "config: older": "compression_config is .* quantised",
    "config: other weights": "transformers_weights = 'other.safetensors'",
    "a head of its own": '"tie_word_embeddings": false, or remove lm_head.weight',
    "a head of another shape": '"tie_word_embeddings": false, or remove lm_head.weight',
    "no head": '"tie_word_embeddings": true in config.json',
    "whole file and other shards": "holds two models",
    "whole file of fewer tensors": "holds two models",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_or_two_is_refused_with_the_remedy(name, model_copy):
    given = other(name, model_copy)
    with pytest.raises(ValueError, match=OTHERS[name]) as e:
        Llama.from_pretrained(given)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_a_second_copy_of_the_same_model_is_taken(model_copy):
    """Shards and a whole file that are equal; Meta's or pickled weights beside safetensors; an
    index whose shard is the whole file; shards that no index names."""
    expected = Llama.from_pretrained(model_copy)(IDS)
    shards(model_copy)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (model_copy / name).write_bytes(b"x")
    assert torch.equal(Llama.from_pretrained(model_copy)(IDS), expected)
    index = model_copy / "model.safetensors.index.json"
    index.unlink()
    assert torch.equal(Llama.from_pretrained(model_copy)(IDS), expected)
    names = load_file(model_copy / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert torch.equal(Llama.from_pretrained(model_copy)(IDS), expected)


# ---- lengths


def lengths_of(value) -> set:
    """Every number under a key that speaks of a length."""
    if isinstance(value, list):
        return set().union(*map(lengths_of, value))
    if not isinstance(value, dict):
        return set()
    stated = ("max_length", "max_len", "model_max_length", "max_cache_len", "seq_len")
    found = {v for k, v in value.items() if k in (*stated, *rope_json.LENGTHS) and v is not None}
    return found.union(*map(lengths_of, value.values()))


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3", "dynamic"])
def test_every_length_that_a_file_states_is_the_new_one_or_gone(kind, tmp_path):
    teacher = write_model(tmp_path / "teacher")
    edit_config(teacher, max_length=64, task_specific_params={"text-generation": {"max_length": 50}},
                **dict.fromkeys(rope_json.LENGTHS, 64))  # fmt: skip
    settings = {"max_length": 64, "max_new_tokens": 30, "cache_config": {"max_cache_len": 64}}
    (teacher / "generation_config.json").write_text(json.dumps(settings))
    fast = json.loads((teacher / "tokenizer.json").read_text())
    fast["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst"}
    (teacher / "tokenizer.json").write_text(json.dumps(fast | {"truncation": fast["truncation"] | {"stride": 0}}))  # fmt: skip
    stated = {"model_max_length": 64, "max_len": 64.0, "max_length": 64, "auto_map": {"A": "b.C"}}
    settings = json.loads((teacher / "tokenizer_config.json").read_text()) | stated
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    model = Llama.from_pretrained(teacher)
    student = make_student(model, model.config.extended(kind, 8))
    checkpoint.save_pretrained(student, tmp_path / "x", tokenizer_from=teacher)
    for file in sorted((tmp_path / "x").glob("*.json")):
        assert lengths_of(json.loads(file.read_text())) <= {512}, file.name
    written = json.loads((tmp_path / "x" / "generation_config.json").read_text())
    assert written["max_length"] == 512 and written["max_new_tokens"] == 30
    assert json.loads((tmp_path / "x" / "tokenizer.json").read_text())["truncation"] is None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    long = torch.arange(100)[None]
    assert theirs.generate(long, do_sample=False, max_new_tokens=2).shape[1] > 100
    assert theirs.generate(long, do_sample=False, min_new_tokens=9).shape[1] > 108
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    pipe = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    assert pipe("a b " * 100, max_new_tokens=2)


def test_a_file_without_lengths_keeps_every_byte_and_one_without_a_limit_its_number(tmp_path):
    plain = b'{"do_sample":true,  "temperature": 0.6}'
    assert checkpoint._lengthened(plain, 512) == plain
    endless = b'{"model_max_length": 1000000000000000019884624838656, "max_length": 7}'
    assert checkpoint._lengthened(endless, 512) == endless.replace(b"7", b"512")
    assert checkpoint._lengthened(b'{"max_length": null}', 512) == b'{"max_length": null}'


def test_templates_and_licence_are_in_the_export(tmp_path):
    teacher, more = write_model(tmp_path / "teacher"), checkpoint.TEMPLATES
    copied = ["LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", f"{more}/rag.jinja"]
    (teacher / more).mkdir()
    for name in [*copied, "modeling_evil.py", "notes.txt", f"{more}/evil.py"]:
        (teacher / name).write_text(name)
    checkpoint.save_pretrained(random_model(), tmp_path / "x", tokenizer_from=teacher)
    for name in copied:
        assert (tmp_path / "x" / name).read_text() == name
    assert not [*(tmp_path / "x").rglob("*.py"), *(tmp_path / "x").glob("notes*")]
    (teacher / more / "out.jinja").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("the password")
    with pytest.raises(ValueError, match=r"out\.jinja is a link to .*secret, outside"):
        checkpoint.save_pretrained(random_model(), tmp_path / "y", tokenizer_from=teacher)


def test_a_linear_teachers_length_may_stand_with_its_tokenizer(model_copy):
    edit_config(model_copy, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=None)
    assert Llama.from_pretrained(model_copy).config.rope.length == 64
    settings = model_copy / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 256}))
    assert Llama.from_pretrained(model_copy).config.rope.length == 256
