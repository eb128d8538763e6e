"""Small real inputs: a random LLaMA on disk with the demo's tokenizer, and a folder of text."""

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import default_text
from hub import checkpoint
from model import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "demo" / "teacher"
if not os.access(Path.home(), os.W_OK):  # where Triton keeps what it compiles
    os.environ.setdefault("TRITON_HOME", f"{tempfile.gettempdir()}/triton-{os.getuid()}")


def pytest_terminal_summary(terminalreporter) -> None:
    """What was skipped and why, above the last line, which has the counts and the time."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(each.longrepr[2].removeprefix("Skipped: ") for each in skipped)
    for reason, times in reasons.most_common():
        terminalreporter.write_line(f"{times} skipped: {reason}")


def tiny_config(**changes) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 4095,
    } | changes


def random_model(seed: int = 0, **changes) -> Llama:
    """A model whose outputs depend on every weight: norms away from 1, biases away from 0."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig.from_hf(tiny_config(**changes)))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.data.normal_(std=2.0 / p.shape[1] ** 0.5 if "embed" not in name else 1.0)
        else:
            p.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.requires_grad_(False).eval()


def write_model(path: Path, seed: int = 0, **changes) -> Path:
    model = random_model(seed, **changes)
    checkpoint.save_pretrained(model, path, tokenizer_from=TEACHER)
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": 4095}
    (path / "config.json").write_text(json.dumps(config))
    return path


def moved_tensors(teacher: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, q's and k's rotary pairs 0 and 1 of each head in each other's place, as
    --move-pairs has them at head_dim 8, theta 10^4, 64 or 128 tokens and scale 8.
    """
    tensors = load_file(teacher / "model.safetensors")
    for name, value in tensors.items():
        if name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = value.unflatten(0, (-1, 8))
            tensors[name] = heads[:, [1, 0, 2, 3, 5, 4, 6, 7]].flatten(0, 1)
    return tensors


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model_copy(tiny_dir, tmp_path) -> Path:
    """A directory that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory) -> Path:
    """About 60 small documents of real words."""
    folder = tmp_path_factory.mktemp("text")
    source = dict(default_text.find_files())["sympy/core/function.py"].read_text()[:60_000]
    size = len(source) // 60
    for i in range(60):
        (folder / f"part{i:02d}.txt").write_text(source[i * size : (i + 1) * size])
    return folder
