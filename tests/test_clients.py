"""Exports in llama.cpp: what its converter writes for each kind of positions, and greedy text.

`make test-clients` fetches llama.cpp with llama-cpp-python and builds it, once; without it these
tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

from hub import checkpoint
from model import make_student

CLIENTS = Path(sys.prefix) / "clients"
SOURCE = CLIENTS / "llama.cpp" / "vendor" / "llama.cpp"
# A vocabulary that the converter knows; it tells others apart by what they make of one text
VOCABULARY = Path(sys.prefix) / "vocabularies" / "mistral_common" / "data" / "tokenizer.model.v1"
pytestmark = pytest.mark.skipif(
    not (SOURCE.is_dir() and VOCABULARY.is_file()),
    reason="llama.cpp is not there; `make test-clients` builds it",
)
PROMPT = [1, 4230, 29, 871, 12045, 302, 8]
# What llama.cpp must be told, and nothing else of rope: scaling type, factor, M0, base, frequencies
SAYS = {
    "linear": {"scaling.type": "linear", "scaling.factor": 8.0, "freq_base": 1e4},
    "ntk": {"freq_base": 16e4},  # theta s^(D/(D-2)) with D = 8: 10^4 8^(4/3)
    "yarn": {
        "scaling.type": "yarn",
        "scaling.factor": 8.0,
        "scaling.original_context_length": 64,
        "scaling.yarn_beta_fast": 32.0,
        "scaling.yarn_beta_slow": 1.0,
        "freq_base": 1e4,
    },
    "llama3": {"freq_base": 1e4, "rope_freqs.weight": True},
}
READ = """
import json, sys
import gguf
found = gguf.GGUFReader(sys.argv[1])
rows = {k: v.contents() for k, v in found.fields.items() if ".rope." in k or "context" in k}
print(json.dumps(rows | {t.name: True for t in found.tensors if t.name.startswith("rope")}))
"""
WRITE = """
import json, sys
from llama_cpp import Llama
wide = {"type_k": 0, "type_v": 0}  # float32 keys and values: its default, float16, breaks ties
model = Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, **wide)
out, ids = [], json.loads(sys.argv[2])
for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
    out.append(token)
    if len(out) == int(sys.argv[3]):
        break
print(json.dumps(out))
"""


def run(*command) -> str:
    paths = [CLIENTS / "site", SOURCE / "gguf-py"]
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{kind: (student, its GGUF file)}: exports, converted by llama.cpp's own program."""
    root, out = tmp_path_factory.mktemp("clients"), {}
    (root / "tokenizer").mkdir()
    shutil.copyfile(VOCABULARY, root / "tokenizer" / "tokenizer.model")
    for kind in (*SAYS, "dynamic"):
        teacher = random_model(vocab_size=32000, eos_token_id=2, bos_token_id=1)
        student = make_student(teacher, teacher.config.extended(kind, 8))
        checkpoint.save_pretrained(student, root / kind, tokenizer_from=root / "tokenizer")
        file = root / f"{kind}.gguf"
        run(SOURCE / "convert_hf_to_gguf.py", root / kind, "--outfile", file, "--outtype", "f32")
        out[kind] = student, file
    return out


def metadata(file: Path) -> dict:
    rows = json.loads(run("-c", READ, file))
    return {k.removeprefix("llama.").removeprefix("rope."): v for k, v in rows.items()}


@pytest.mark.parametrize("kind", SAYS)
def test_the_converter_says_the_right_scaling(kind, converted):
    assert metadata(converted[kind][1]) == SAYS[kind] | {
        "context_length": 512,
        "dimension_count": 8,
    }


def test_the_converter_drops_dynamic_scaling_as_plan_and_card_say(converted):
    found = metadata(converted["dynamic"][1])
    assert found == {"freq_base": 1e4, "context_length": 64, "dimension_count": 8}


@pytest.mark.parametrize("kind", SAYS)
def test_greedy_text_is_ours(kind, converted):
    """150 tokens, so that most of them lie beyond the native window of 64."""
    student, file = converted[kind]
    ids, new = list(PROMPT), 150
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(student(torch.tensor([ids]))[0, -1].argmax()))
    assert json.loads(run("-c", WRITE, file, json.dumps(PROMPT), new)) == ids[len(PROMPT) :]
