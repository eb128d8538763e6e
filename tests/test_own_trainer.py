"""The loss outside this repository: as a wheel of its own, and in a trainer of transformers models."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, random_model

from engine import step
from hub import checkpoint
from model import Llama

HEADING = "## The loss in your own trainer"
README = (ROOT / "README.md").read_text()
DEFINITIONS, LOOP = re.findall(r"```python\n(.*?)```", README.split(HEADING)[1], re.S)[:2]
IDS = torch.randint(0, 4096, (2, 60), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama3": {"rope_theta": 500000.0, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


@pytest.fixture(scope="module")
def snippet() -> dict:
    """What the README's first block defines."""
    names: dict = {}
    exec(compile(DEFINITIONS, "README.md", "exec"), names)
    return names


def pair(folder, config: dict, kind: str):
    """Teacher and stretched student, each as (ours, transformers' reading of the same files)."""
    teacher = random_model(**config)
    models = []
    for seed, name in enumerate(("student", "teacher")):
        model = random_model(seed=seed, **config)  # other weights too, so that V/V differs
        if name == "student":
            model = Llama(teacher.config.extended(kind, 4))
            model.load_state_dict(random_model(seed=1, **config).state_dict())
        checkpoint.save_pretrained(model, folder / name)
        ours = Llama.from_pretrained(folder / name, dtype=torch.float64)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float64, attn_implementation="keep_qkv"
        )
        models.append((ours, theirs))
    return models


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_ours(family, kind, snippet, tmp_path):
    (ours, theirs), (our_teacher, their_teacher) = pair(tmp_path, FAMILIES[family], kind)
    ours.requires_grad_()
    with torch.no_grad():
        their_teacher(IDS, use_cache=False)
    theirs(IDS, use_cache=False)
    loss = snippet["relation_loss"](their_teacher, theirs)
    loss.backward()
    expected, *_ = step.relation_loss(our_teacher, ours, IDS, torch.float64)
    expected.backward()
    assert loss.item() > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    weights = dict(ours.named_parameters())
    compared = 0
    for name, p in theirs.named_parameters():
        ours_grad = weights[name].grad
        if re.search(r"[qkv]_proj|embed_tokens", name):
            assert (p.grad - ours_grad).norm() <= 1e-7 * ours_grad.norm(), name
            compared += 1
    assert compared >= 7  # embeddings, and q, k and v of two layers


def test_the_plain_loop_lowers_the_loss(snippet, tmp_path):
    (_, student), (_, teacher) = pair(tmp_path, FAMILIES["llama3"], "linear")
    trained = [p for name, p in student.named_parameters() if re.search("[qkv]_proj", name)]
    names = snippet | {
        "torch": torch,
        "student": student,
        "teacher": teacher,
        "optimiser": torch.optim.AdamW(trained, lr=1e-2),
        "batches": [IDS] * 5,
    }
    exec(LOOP, names)
    after = snippet["relation_loss"](teacher, student).item()  # of the last text read
    names["batches"] = [IDS]
    exec(LOOP, names)
    assert snippet["relation_loss"](teacher, student).item() < after
    student.load_state_dict(
        pair(tmp_path / "again", FAMILIES["llama3"], "linear")[0][1].state_dict()
    )
    student(IDS, use_cache=False)
    assert after < 0.9 * snippet["relation_loss"](teacher, student).item()


def test_a_trainers_loss_adds_both(snippet, tmp_path):
    """In a Trainer, beside the next-token loss."""
    (_, student), (_, teacher) = pair(tmp_path, FAMILIES["qwen2"], "yarn")

    class RelationTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            with torch.no_grad():
                teacher(inputs["input_ids"], inputs.get("attention_mask"), use_cache=False)
            outputs = model(**inputs, use_cache=False)
            loss = outputs.loss + snippet["relation_loss"](teacher, model)
            return (loss, outputs) if return_outputs else loss

    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    compute_loss = RelationTrainer.compute_loss  # unbound: a Trainer needs accelerate
    loss, outputs = compute_loss(None, student, inputs, return_outputs=True)
    relations = snippet["relation_loss"](teacher, student)
    torch.testing.assert_close(loss, outputs.loss + relations)


def test_padding_on_the_right_counts_for_nothing(snippet, tmp_path):
    """Rows and gradient of a padded batch are those of the text alone."""
    (_, student), (_, teacher) = pair(tmp_path, FAMILIES["mistral"], "linear")
    lengths, padded = torch.tensor([60, 41]), IDS.clone()
    padded[1, 41:] = 0
    mask = (torch.arange(60) < lengths[:, None]).long()

    def loss_of(ids, mask, lengths):
        with torch.no_grad():
            teacher(ids, mask, use_cache=False)
        student(ids, mask, use_cache=False)
        return snippet["relation_loss"](teacher, student, lengths)

    whole = loss_of(IDS[:1], None, None) * 60 + loss_of(IDS[1:, :41], None, None) * 41
    torch.testing.assert_close(loss_of(padded, mask, lengths) * 120, whole, rtol=1e-7, atol=0)


def test_the_wheel_holds_the_loss_alone(tmp_path):
    """Built from a copy of the whole tree, installed elsewhere, imported from an empty folder."""
    source, target, empty = (tmp_path / n for n in ("source", "target", "empty"))
    for folder in (target, empty):
        folder.mkdir()
    # A copy, as setuptools writes into the folder that it builds from
    left_out = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__", "teacher")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    built = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(built, cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "one wheel for every Python that is named"
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    modules = {p.name for p in target.iterdir() if p.name.endswith(".py")}
    kernels = {p.name for p in ROOT.glob("kernel_*.py")}
    assert modules == {"relation_kl.py"} | kernels
    folders = {p.name for p in target.iterdir() if p.is_dir()} - {"__pycache__"}
    assert all(name.endswith(".dist-info") for name in folders), folders
    script = (
        "import torch, relation_kl, kernel_triton\n"
        "x = torch.randn(1, 2, 9, 16, requires_grad=True)\n"
        "relation_kl.relation_kl(x, torch.randn(1, 2, 9, 16)).sum().backward()\n"
        "print(relation_kl.__file__, bool(x.grad.isfinite().all()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=empty,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [str(target / "relation_kl.py"), "True"]
