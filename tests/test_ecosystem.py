"""Our directories in other programs and theirs in ours: transformers 4.57 and 5, and real
vocabularies.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TEACHER, random_model, tiny_config

from hub import checkpoint
from hub.tokenizer import load_tokenizer
from model import Llama, make_student, trainable

# Made by `make test` in this Python's environment: transformers 4.57.6 beside the installed 5.x
V4 = Path(sys.prefix) / "transformers4"
VOCABULARIES = Path(sys.prefix) / "vocabularies"
needs_v4 = pytest.mark.skipif(
    not V4.is_dir(), reason="transformers 4.57 is not there; `make test` installs it"
)
needs_vocabularies = pytest.mark.skipif(
    not VOCABULARIES.is_dir(), reason="`make test` installs the vocabularies"
)
IDS = torch.randint(
    0, 4000, (1, 300), generator=torch.Generator().manual_seed(0)
)  # the native window is 64
STUDENTS = {
    "llama linear": ({}, "linear"),
    "llama ntk": ({}, "ntk"),
    "llama yarn": ({}, "yarn"),
    "llama llama3": ({}, "llama3"),
    "llama dynamic": ({}, "dynamic"),
    "llama 3.1 scaled on": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 32}}, "llama3"),
    "mistral with a window": ({"model_type": "mistral", "sliding_window": 48}, "linear"),
    "qwen2": ({"model_type": "qwen2", "tie_word_embeddings": False}, "linear"),
    "qwen3": ({"model_type": "qwen3"}, "yarn"),
}  # fmt: skip
THEIRS = """
import sys, numpy as np, torch, transformers, warnings
out, ids = sys.argv[1], torch.from_numpy(np.load(sys.argv[2]))
logits = {}
for path in sys.argv[3:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").float().eval()
    with torch.no_grad():
        logits[path] = model(ids).logits.numpy()
np.savez(out, version=transformers.__version__, **logits)
"""


def run_v4(script: str, *args) -> None:
    environment = dict(os.environ, PYTHONPATH=str(V4), OMP_NUM_THREADS="1")
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """{name: (directory, our logits)} of stretched students with changed q, k and v."""
    out = {}
    for name, (changes, kind) in STUDENTS.items():
        teacher = random_model(**changes)
        student = make_student(teacher, teacher.config.extended(kind, 8))
        for p in trainable(student).values():
            p.data *= 1.1
        path = tmp_path_factory.mktemp("exports") / name.replace(" ", "-")
        checkpoint.save_pretrained(student, path, tokenizer_from=TEACHER)
        with torch.no_grad():
            out[name] = path, student(IDS)
    return out


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """float32 rounding, inside (up to 64) and beyond the native window alike."""
    for part in (slice(0, 64), slice(64, None)):
        assert (ours[:, part] - theirs[:, part]).abs().max() <= 2e-4 * theirs.std()


@pytest.mark.parametrize("name", STUDENTS)
def test_transformers_5_gives_our_logits(name, exports):
    path, ours = exports[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    )
    assert theirs.config.max_position_embeddings == (64 if "dynamic" in name else 512)
    with torch.no_grad():
        close(ours, theirs.eval()(IDS).logits)


@needs_v4
def test_transformers_4_gives_our_logits(exports, tmp_path):
    np.save(tmp_path / "ids.npy", IDS.numpy())
    run_v4(
        THEIRS,
        tmp_path / "logits.npz",
        tmp_path / "ids.npy",
        *(path for path, _ in exports.values()),
    )
    theirs = np.load(tmp_path / "logits.npz")
    assert str(theirs["version"]).startswith("4.57")
    for path, ours in exports.values():
        close(ours, torch.from_numpy(theirs[str(path)]))


WRITE = """
import sys, json, torch, transformers
for line in open(sys.argv[1]):
    path, config = json.loads(line)
    torch.manual_seed(0)
    family = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    transformers.AutoModelForCausalLM.from_config(family).save_pretrained(path, max_shard_size="300KB")
"""


@needs_v4
def test_sharded_directories_written_by_transformers_4_load(tmp_path):
    rows = []
    for n, changes in enumerate(
        ({}, {"model_type": "qwen2"}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    ):
        rows.append((str(tmp_path / str(n)), tiny_config(**changes)))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_v4(WRITE, tmp_path / "rows.jsonl")
    for path, _ in rows:
        assert "rope_parameters" not in json.loads((Path(path) / "config.json").read_text())
        assert (Path(path) / "model.safetensors.index.json").exists()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            close(Llama.from_pretrained(path)(IDS), theirs(IDS).logits)


def test_the_exported_tokenizer_is_byte_for_byte_and_loads_in_transformers(exports):
    path, _ = exports["llama linear"]
    for name in ("tokenizer.json", "tokenizer.tiktoken", "tokenizer_config.json"):
        assert (path / name).read_bytes() == (TEACHER / name).read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = "def main():\n    return 12345  # naïve"
    assert theirs(text)["input_ids"] == load_tokenizer(TEACHER).encode(text)


# -------------------------------------------------------------------------------- real
# vocabularies, from PyPI packages
TEXT = (
    "Hello, world! naïve ☃ 12345 and 678\n\n\tdef f(x):\n    return x  \r\n  I'm  here… 東京"
    + "z" * 1000
)


def vocabulary(tmp_path: Path, source: Path, name: str, **settings) -> Path:
    (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@needs_vocabularies
def test_llama3s_rank_file(tmp_path):
    path = vocabulary(
        tmp_path, VOCABULARIES / "llama_models" / "llama3" / "tokenizer.model", "tokenizer.model"
    )
    (path / "config.json").write_text(json.dumps({"eos_token_id": 128001, "bos_token_id": 128000}))
    tok = load_tokenizer(path)
    assert tok.kind == "tiktoken" and tok.size == 128000 and tok.bos_id == 128000
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert tok.encode("Hello, world!") == [9906, 11, 1917, 0] and tok.encode("a", bos=True) == [
        128000,
        64,
    ]


@needs_vocabularies
def test_qwens_rank_file(tmp_path):
    tok = load_tokenizer(vocabulary(tmp_path, VOCABULARIES / "dashscope" / "resources" / "qwen.tiktoken",
                                    "tokenizer.tiktoken", add_bos_token=False))  # fmt: skip
    assert tok.bos_id is None and tok.size == 151643 and tok.decode(tok.encode(TEXT)) == TEXT


@needs_vocabularies
@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_sentencepiece_models_equal_the_library(tmp_path, name):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = VOCABULARIES / "mistral_common" / "data" / name
    tok = load_tokenizer(vocabulary(tmp_path, source, "tokenizer.model"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source))
    assert tok.kind == "sentencepiece" and tok.bos_id == theirs.bos_id() == 1
    assert tok.encode(TEXT) == theirs.encode(TEXT) and tok.size == theirs.vocab_size()


@needs_vocabularies
def test_sentencepiece_without_the_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    path = vocabulary(
        tmp_path, VOCABULARIES / "mistral_common" / "data" / "tokenizer.model.v1", "tokenizer.model"
    )
    with pytest.raises(ValueError, match=r"pip install sentencepiece"):
        load_tokenizer(path)


def test_bos_follows_the_tokenizers_files(tmp_path):
    from tokenizers import Tokenizer, processors

    fast = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    plain = vocabulary(tmp_path, TEACHER / "tokenizer.json", "tokenizer.json")
    assert load_tokenizer(plain).bos_id is None
    fast.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 4095)]
    )
    fast.save(str(plain / "tokenizer.json"))
    assert load_tokenizer(plain).encode("a", bos=True)[0] == 4095
    assert load_tokenizer(plain).encode_documents(["a"])[0][0] == 4095


@pytest.mark.parametrize("adds", [None, True, False])
@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", None]
)
def test_beside_a_tokenizer_json_the_post_processor_alone_says_bos(tmp_path, name, adds):
    """As in transformers 5, whatever the class: `add_bos_token` is for what has no such file."""
    from tokenizers import Tokenizer, processors

    fast = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    settings = {"tokenizer_class": name, "add_bos_token": adds, "bos_token": "<|end|>"}
    settings = {k: v for k, v in settings.items() if v is not None} | {"eos_token": "<|end|>"}
    for begins in (False, True):
        if begins:
            fast.post_processor = processors.TemplateProcessing(
                single="<|end|> $A", special_tokens=[("<|end|>", 4095)]
            )
        path = tmp_path / str(begins)
        path.mkdir()
        fast.save(str(path / "tokenizer.json"))
        config = {"model_type": "llama", "vocab_size": 4096, "eos_token_id": 4095}
        (path / "config.json").write_text(json.dumps(config | {"bos_token_id": 4095}))
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
        assert ours.encode("a b", bos=True) == theirs("a b")["input_ids"]
        assert (ours.bos_id == 4095) is begins


def test_a_rank_file_takes_its_bos_from_the_tokenizer_json_beside_it(tmp_path):
    """The hub's tokenizer_config.json of LLaMA-3 has no add_bos_token; its tokenizer.json's
    post-processor adds one.
    """
    from tokenizers import Tokenizer, processors

    path = vocabulary(tmp_path, TEACHER / "tokenizer.tiktoken", "tokenizer.model", x=1)
    (path / "config.json").write_text(json.dumps({"eos_token_id": 4095, "bos_token_id": 4095}))
    assert load_tokenizer(path).bos_id == 4095
    fast = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    fast.save(str(path / "tokenizer.json"))
    assert load_tokenizer(path).bos_id is None
    fast.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 4095)]
    )
    fast.save(str(path / "tokenizer.json"))
    assert load_tokenizer(path).bos_id == 4095
