"""Exports in other clients (docs/clients.md): what llama.cpp's converter writes for each kind of
positions, and its greedy text; mlx-lm's logits; what ExLlamaV2 reads in config.json.

`make test-clients` fetches llama.cpp with llama-cpp-python and builds it, once, and the others as
wheels; without them these tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEACHER, random_model

from hub import checkpoint
from model import make_student

CLIENTS = Path(sys.prefix) / "clients"
SOURCE = CLIENTS / "llama.cpp" / "vendor" / "llama.cpp"
# A vocabulary that the converter knows; it tells others apart by what they make of one text
VOCABULARY = Path(sys.prefix) / "vocabularies" / "mistral_common" / "data" / "tokenizer.model.v1"
OTHERS = CLIENTS / "others"
needs_others = pytest.mark.skipif(
    not OTHERS.is_dir(), reason="mlx-lm and ExLlamaV2 are not there; `make test-clients` gets them"
)
needs_llama_cpp = pytest.mark.skipif(
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


MLX = """
import sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_lm.utils import load_model
ids = mx.array(np.load(sys.argv[1]))
for path in sys.argv[2:]:
    model, _ = load_model(Path(path))
    np.save(f"{path}.npy", np.array(model(ids).astype(mx.float32)))
"""
EXLLAMA = """
import importlib.util, json, sys, types
# Its package compiles CUDA code when it is imported: a bare one of its name, and of its extension
package = types.ModuleType("exllamav2")
package.__path__ = importlib.util.find_spec("exllamav2").submodule_search_locations
extension = types.ModuleType("exllamav2.ext")
extension.__getattr__ = lambda name: None
sys.modules |= {"exllamav2": package, "exllamav2.ext": extension}
from exllamav2.config import ExLlamaV2Config
rows = []
for path in sys.argv[1:]:
    config = ExLlamaV2Config()
    config.model_dir = path
    config.prepare()
    rows.append({k: v for k, v in vars(config).items() if isinstance(v, str | int | float)})
print(json.dumps(rows))
"""
# What ExLlamaV2 must read: its own names, and its default where a kind has none
EXLLAMA_READS = {
    "linear": {"max_seq_len": 512, "scale_pos_emb": 8.0, "rotary_embedding_base": 1e4},
    "ntk": {"max_seq_len": 512, "scale_pos_emb": 1.0, "rotary_embedding_base": 16e4},
    "yarn": {
        "max_seq_len": 512,
        "alt_rope_method": "yarn",
        "yarn_rope_factor": 8.0,
        "yarn_rope_original_max_position_embeddings": 64,
    },
    "llama3": {
        "max_seq_len": 512,
        "alt_rope_method": "llama3",
        "l3_rope_factor": 8.0,
        "l3_rope_low_freq_factor": 1.0,
        "l3_rope_high_freq_factor": 4.0,
        "l3_rope_original_max_position_embeddings": 64,
    },
    "dynamic": {"max_seq_len": 64, "scale_pos_emb": 1.0},  # dropped, as the card says
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{kind: (student, its directory)}, with the lengths that other programs would prefer."""
    root, out = tmp_path_factory.mktemp("exports"), {}
    stated = {"max_sequence_length": 64, "model_max_length": 64}
    for kind in (*SAYS, "dynamic"):
        teacher = random_model(**stated)
        student = make_student(teacher, teacher.config.extended(kind, 8))
        checkpoint.save_pretrained(student, root / kind, tokenizer_from=TEACHER)
        out[kind] = student, root / kind
    return out


@needs_others
def test_mlx_gives_our_logits(exports, tmp_path):
    ids = torch.randint(0, 4000, (1, 300), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    run("-c", MLX, tmp_path / "ids.npy", *(path for _, path in exports.values()))
    for student, path in exports.values():
        with torch.no_grad():
            ours, theirs = student(ids), torch.from_numpy(np.load(f"{path}.npy"))
        for part in (slice(0, 64), slice(64, None)):
            assert (ours[:, part] - theirs[:, part]).abs().max() <= 2e-4 * ours.std(), path.name


@needs_others
def test_exllama_reads_the_right_scaling(exports):
    rows = json.loads(run("-c", EXLLAMA, *(path for _, path in exports.values())))
    for kind, read in zip(exports, rows, strict=True):
        wanted = EXLLAMA_READS[kind]
        assert {k: read.get(k) for k in wanted} == pytest.approx(wanted), kind


def run(*command) -> str:
    paths = [CLIENTS / "site", SOURCE / "gguf-py", OTHERS]
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


@needs_llama_cpp
@pytest.mark.parametrize("kind", SAYS)
def test_the_converter_says_the_right_scaling(kind, converted):
    assert metadata(converted[kind][1]) == SAYS[kind] | {
        "context_length": 512,
        "dimension_count": 8,
    }


@needs_llama_cpp
def test_the_converter_drops_dynamic_scaling_as_plan_and_card_say(converted):
    found = metadata(converted["dynamic"][1])
    assert found == {"freq_base": 1e4, "context_length": 64, "dimension_count": 8}


@needs_llama_cpp
@pytest.mark.parametrize("kind", SAYS)
def test_greedy_text_is_ours(kind, converted):
    """150 tokens, so that most of them lie beyond the native window of 64."""
    student, file = converted[kind]
    ids, new = list(PROMPT), 150
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(student(torch.tensor([ids]))[0, -1].argmax()))
    assert json.loads(run("-c", WRITE, file, json.dumps(PROMPT), new)) == ids[len(PROMPT) :]
