"""Adapters: exact merge, PEFT reads them. Generation: the cache changes nothing."""

import io
import json

import peft
import pytest
import torch
import transformers
from conftest import random_model, write_model

import eval as evaluation
from engine import lora, step
from evals import generate, prompts, ruler
from hub import checkpoint
from hub.tokenizer import load_tokenizer
from model import TRAINED, Llama, make_student, trainable

IDS = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))


def adapted(dropout: float = 0.0, **changes):
    teacher = random_model(**changes)
    student = make_student(teacher, teacher.config.extended("linear", 8), trained=())
    return teacher, lora.adapt(student, TRAINED, 4, 8.0, dropout)


def train_a_little(student) -> None:
    g = torch.Generator().manual_seed(3)
    for p in trainable(student).values():
        p.data += 0.1 * torch.randn(p.shape, generator=g)


def test_fresh_adapters_change_nothing_and_alone_learn():
    teacher, student = adapted()
    plain = make_student(teacher, student.config, trained=())
    with torch.no_grad():
        assert torch.equal(student(IDS), plain(IDS))
    assert all("lora_" in name for name in trainable(student)) and len(trainable(student)) == 12
    loss, _, _ = step.relation_loss(teacher, student, IDS, torch.float32)
    loss.backward()
    assert any(p.grad.abs().max() > 0 for p in trainable(student).values())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merging_gives_the_same_logits(family):
    _, student = adapted(model_type=family)
    train_a_little(student)
    with torch.no_grad():
        a, b = student(IDS), lora.merge(student)(IDS)
    assert (a - b).abs().max() < 1e-4 * a.std()


def test_dropout_acts_in_training_alone():
    _, student = adapted(dropout=0.5)
    train_a_little(student)
    with torch.no_grad():
        assert torch.equal(student(IDS), student(IDS))
    assert not torch.equal(student(IDS), student(IDS))


def test_peft_loads_the_adapter_onto_the_scaled_base_with_the_same_logits(tmp_path):
    teacher, student = adapted()
    train_a_little(student)
    checkpoint.save_pretrained(teacher, tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    lora.write_adapter(student, tmp_path / "adapter", str(tmp_path / "base"), TRAINED)
    readme = (tmp_path / "adapter" / "README.md").read_text()
    keys = json.loads(readme.split("```json\n")[1].split("```")[0])
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | keys
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (student(IDS) - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("rank", [-1, 33])
def test_a_rank_that_cannot_be_is_refused(rank):
    student = make_student(random_model(), random_model().config, trained=())
    with pytest.raises(ValueError, match=f"--lora-rank is {rank}"):
        lora.adapt(student, TRAINED, rank, 8.0, 0.0)


KINDS = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
    "window": {"model_type": "mistral", "sliding_window": 12},
    "qwen3": {"model_type": "qwen3"},
}


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("name", KINDS)
def test_cache_and_no_cache_give_the_same_tokens(name, chunk, monkeypatch):
    """A prompt read whole, or some tokens at a time."""
    monkeypatch.setattr(generate, "CHUNK", chunk)
    model = random_model(**KINDS[name])
    prompts = [IDS[0, :7].tolist(), IDS[1].tolist(), IDS[0, :1].tolist()]
    batched = generate.generate(model, prompts, 16)
    for prompt, got in zip(prompts, batched, strict=True):
        ids = list(prompt)
        for _ in range(16):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert got == ids[len(prompt) :]


@pytest.mark.parametrize("name", [*KINDS, "dynamic"])
def test_a_prompt_in_chunks_is_the_prompt_read_whole(name, monkeypatch):
    """In float64, to rounding: what follows, and all that is cached."""
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    model = random_model(**(KINDS | {"dynamic": dynamic | {"max_position_embeddings": 16}})[name])
    model, lengths, found = model.double(), torch.tensor([40, 9]), []
    for chunk in (4096, 1, 7, 8):
        monkeypatch.setattr(generate, "CHUNK", chunk)
        caches = [generate.LayerCache(model, lengths, 40, 44) for _ in model.model.layers]
        with torch.no_grad():
            h = generate.prefill(model, IDS, lengths, caches)
        found.append(
            torch.cat([x.flatten() for x in (h, *(y for c in caches for y in (c.k, c.v)))])
        )
    whole = model.hidden(IDS)
    assert (model.model.norm(h)[0] - whole[0, 39]).norm() <= 1e-12 * whole[0, 39].norm()
    assert (model.model.norm(h)[1] - whole[1, 8]).norm() <= 1e-12 * whole[1, 8].norm()
    for x in found[1:]:
        assert (x - found[0]).norm() <= 1e-12 * found[0].norm()


def test_generation_stops_at_the_end_token():
    model = random_model()
    free = generate.generate(model, [IDS[0].tolist()], 8)[0]
    cut = generate.generate(model, [IDS[0].tolist()], 8, stop=frozenset({free[3]}))[0]
    assert cut == free[: free.index(free[3])]


@pytest.mark.parametrize("first", [0, 1])
def test_any_of_a_models_end_tokens_stops_it(tmp_path, capsys, first):
    """LLaMA 3 Instruct has [128001, 128009]: only the first once ended a text."""
    path = write_model(tmp_path / "model", seed=1)
    asked = "--model", path, "--prompt", "def main(", "--new-tokens", "12", "--dtype", "float32"
    free, _ = say(capsys, *asked)
    tokenizer, model = load_tokenizer(path), Llama.from_pretrained(path)
    ids = tokenizer.encode("def main(", bos=True)
    wrote = generate.generate(model, [ids], 12)[0]
    ends = [wrote[4], 4095] if first == 0 else [4095, wrote[4]]
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": ends}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(path)
    assert tokenizer.stop_ids == set(ends)
    before = wrote[: wrote.index(wrote[4])]
    cut = generate.generate(model, [ids], 12, tokenizer.stop_ids)[0]
    assert cut == before
    sample = ruler.Sample("vt", 0, "def main(", "", ["x"], 12, 0, None, "")
    assert prompts.answers(model, tokenizer, [sample]) == [tokenizer.decode(before)]
    cut, _ = say(capsys, *asked)
    assert free.startswith(cut.rstrip("\n")) and len(cut) < len(free)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        generate.generate(random_model(), [[]], 4)


def say(capsys, *arguments) -> tuple[str, str]:
    evaluation.main([*map(str, arguments), "--device", "cpu"])
    said = capsys.readouterr()
    return said.out, said.err


def test_a_prompt_is_continued_as_a_stream_of_text(tiny_dir, capsys):
    tokenizer, model = load_tokenizer(tiny_dir), Llama.from_pretrained(tiny_dir)
    asked = (
        "--model",
        tiny_dir,
        "--prompt",
        "def main(",
        "--new-tokens",
        "40",
        "--dtype",
        "float32",
    )
    out, err = say(capsys, *asked)
    ids = tokenizer.encode("def main(", bos=True)
    wrote = generate.generate(model, [ids], 40, tokenizer.stop_ids, tokenizer.size)[0]
    assert out.strip("\n") == tokenizer.decode(wrote).rstrip("\ufffd").strip("\n")
    assert "tokens/s" in err and "exceed" not in err


def test_a_prompt_comes_from_standard_input_and_beyond_the_context_warns(
    tiny_dir, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("import os"))
    _, err = say(capsys, "--model", tiny_dir, "--prompt", "-", "--new-tokens", "70")
    assert "tokens and 70 new ones exceed the context of 64" in err


def test_more_new_tokens_than_memory_holds_are_refused(tiny_dir):
    asked = f"--model {tiny_dir} --prompt a --device cpu --new-tokens"
    with pytest.raises(ValueError, match="--new-tokens: -5 is not a whole number from 1 up"):
        evaluation.main([*asked.split(), "-5"])
    with pytest.raises(ValueError, match=r"need a cache of [\d.]+ GiB and [\d.]+ are free"):
        evaluation.main([*asked.split(), "1000000000000"])


def test_ids_without_a_token_are_never_chosen():
    """Embeddings are often padded beyond the tokenizer's ids, which no text can be made of."""
    model, prompt = random_model(), IDS[0].tolist()
    free = generate.generate(model, [prompt], 12)[0]
    below = sorted(free)[6]
    kept = generate.generate(model, [prompt], 12, vocabulary=below)[0]
    assert max(free) >= below > max(kept)


def test_a_vocabulary_larger_than_the_tokenizers_is_no_error(tmp_path, capsys):
    """Ids beyond the tokenizer's once ended in "KeyError: Invalid token for decoding"."""
    path = write_model(tmp_path / "padded", seed=1, vocab_size=9000, tie_word_embeddings=True)
    model, tokenizer = Llama.from_pretrained(path), load_tokenizer(path)
    ids = tokenizer.encode("import os")
    assert max(generate.generate(model, [ids], 40)[0]) >= tokenizer.size
    out, _ = say(capsys, "--model", path, "--prompt", "import os", "--new-tokens", "40")
    assert out.strip()
    _, err = say(
        capsys, "--model", path, "--no-text", "--passkey", "--lengths", "512", "--samples", "2"
    )
    assert "Traceback" not in err


def test_dynamic_positions_are_those_of_the_length_at_hand_as_in_transformers(tmp_path):
    scaled = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    path = write_model(tmp_path / "dynamic", max_position_embeddings=16, **scaled)
    model = Llama.from_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for prompt in (IDS[0, :7], IDS[1, :30]):  # grows past the native length; begins beyond it
        asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(prompt[None], **asked)[0, len(prompt) :].tolist()
        other = [prompt.tolist(), IDS[0, :11].tolist()]
        assert generate.generate(model, other, 24)[0] == expected
        assert generate.generate(model, other, 9)[0] == expected[:9]
