"""The card says what the directory is, gives commands that are right for it, and escapes names."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT, random_model

from engine.cost import Stage
from hub import rope_json
from hub.card import adapter_card, licence_of, model_card

STAGES = [
    asdict(Stage("stage1", "relation", T=64, batch=4, steps=10, lr=0.002)),
    asdict(Stage("stage2", "next token", T=512, batch=1, steps=5, lr=0.0005)),
]


def card(name: str = "tiny", kind: str = "linear", **changes) -> str:
    teacher = random_model().config.rope
    student = teacher.scaled(kind, 8)
    given = {
        "before": str(teacher),
        "after": str(student),
        "kind": student.kind,
        "length": student.length,
        "stages": STAGES,
        "scores": "| a | table |",
        "arguments": {"scale": 8.0, "rope": kind, "lr1": None},
    }
    return model_card(name, **given | changes)


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_card_states_recipe_scores_and_commands():
    text = card()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for said in (
        "tiny, extended to 512 tokens",
        "linear RoPE, factor 8",
        "10 x 4 x 64",
        "| a | table |",
        "2.56k tokens",
        "hf upload",
    ):
        assert said in text
    assert "--max-model-len 512" in text and "max_length=512" in text and "-c 512" in text
    assert "scale 8.0, rope linear" in text and "lr1" not in text


@pytest.mark.parametrize(
    "which, said, unsaid", [(0, "relations", "predict"), (1, "predict", "Q/Q")]
)
def test_the_card_claims_the_stages_that_were_run_and_no_other(which, said, unsaid):
    text = card(stages=[STAGES[which]])
    assert f"Trained in 1 stage (stage{which + 1}: " in text
    assert said in text and unsaid not in text and f"stage{2 - which}" not in text


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "reproduce the original's Q/Q, K/K and V/V relations (LinearARD"),
        (
            {"relations": "qv", "logits": True},
            "the original's Q/Q and V/V relations and next-token distribution (LinearARD",
        ),
        ({"relations": "k"}, "the original's K/K relation (LinearARD"),
        (
            {"relations": "none", "logits": True},
            "the original's next-token distribution (LinearARD",
        ),
    ],
)
def test_the_card_names_what_stage_1_compared(changes, said):
    assert said in card(stages=[STAGES[0] | changes])


def test_the_card_names_the_teachers_share():
    assert "distribution" not in card(stages=[STAGES[1]])
    text = card(stages=[STAGES[1] | {"teacher_share": 0.25}])
    assert "25% of the target being the original's distribution" in text


def test_the_front_matter_names_base_model_licence_and_task():
    licence = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    found = front_matter(card(base_model="meta-llama/Meta-Llama-3-8B", licence=licence))
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": "tiny-512",
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "tags": ["long-context", "rope-scaling"],
        **licence,
    }
    assert "base_model" not in front_matter(card()) and "license" not in front_matter(card())


@pytest.mark.parametrize(
    "name",
    ["a\n---\nlicense: mit", "<script>alert(1)</script>", "x](http://e) `y` | z", 'quo"te: #'],
)
def test_a_hostile_name_changes_neither_the_page_nor_the_front_matter(name):
    text = card(name)
    found = front_matter(text)
    assert found["model_name"] == f"{name}-512" and "license" not in found
    body = text.split("\n---\n", 1)[1]
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1
    assert "<script" not in text, "nor where front matter is taken for text"
    assert "\n---" not in body
    assert not re.search(r"(?<!\\)\]\(http", body), "a link that the name opened"
    assert "<script" not in adapter_card(name, {}, base_model=name)


def test_dynamic_positions_are_served_by_two_clients_and_the_card_says_so():
    text = card(kind="dynamic")
    assert "vllm serve" not in text and "convert_hf_to_gguf" not in text
    assert "transformers and mlx-lm do right" in text and "lm_eval" in text and "mlx_lm." in text


@pytest.mark.parametrize(
    "kind, said, unsaid",
    [
        ("linear", "--context-length 512|TGI and ONNX", "CTranslate2"),
        ("yarn", "Ollama the GGUF file|CTranslate2 refuses", "--context-length"),
        ("llama3", "CTranslate2, which computes", "TGI"),
        ("ntk", "vllm serve DIRECTORY --max-model-len 512|mlx_lm.generate", "Not in "),
    ],
)
def test_the_card_names_the_clients_that_read_its_kind_otherwise(kind, said, unsaid):
    text = " ".join(card(kind=kind).split())
    assert all(words in text for words in said.split("|")) and unsaid not in text


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3", "dynamic"])
def test_commands_stand_as_they_are_typed(kind):
    for block in re.findall(r"```bash\n(.*?)\n```", card(kind=kind), re.DOTALL):
        for line in block.replace("\\\n    ", "").splitlines():
            assert "  " not in line and not line.endswith(" ")


@pytest.mark.parametrize(
    "readme, found",
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# x", {"license": "apache-2.0"}),
        ('---\nlicense: "mit"\n---', {"license": "mit"}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense:\n---\n", {}),
        ("---\nlicense_name: x\n---\n", {}),
        ("", {}),
    ],
)
def test_the_licence_is_read_from_the_teachers_card(readme, found, tmp_path):
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(readme)
    assert licence_of(tmp_path) == found


def test_the_adapters_readme_says_which_positions_to_set():
    rope = random_model().config.rope.scaled("linear", 8)
    text = adapter_card("tiny", rope_json.write(rope), base_model="org/tiny")
    assert front_matter(text)["base_model"] == "org/tiny" and '"factor": 8.0' in text
    assert front_matter(text)["library_name"] == "peft"
    (given,) = re.findall(r"--hf-overrides '(.*)'", text)
    keys = json.loads(given)
    assert keys["rope_parameters"]["factor"] == 8.0 and keys["max_position_embeddings"] == 512
    assert "--max-model-len 512" in text and "--enable-lora" in text
    dynamic = random_model().config.rope.scaled("dynamic", 8)
    assert "vllm" not in adapter_card("tiny", rope_json.write(dynamic))


def test_a_card_is_utf8_whatever_the_locale(tmp_path, tiny_dir):
    """Python writes in the locale's encoding where none is named."""
    script = """
import locale, sys
from hub.card import licence_of
from hub.checkpoint import save_pretrained
from model import Llama
from pathlib import Path
assert locale.getpreferredencoding() != "UTF-8"
save_pretrained(Llama.from_pretrained(sys.argv[1]), "out", card="---\\nlicense: caf\\xe9\\n---\\n")
print(ascii(licence_of(Path("out"))))
"""
    ascii_only = {
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", script, str(tiny_dir)],
        cwd=tmp_path,
        env=os.environ | ascii_only,
        capture_output=True,
        text=True,
    )
    assert run.stdout == "{'license': 'caf\\xe9'}\n", run.stderr
    assert (tmp_path / "out" / "README.md").read_bytes() == "---\nlicense: café\n---\n".encode()
