"""The loss outside this repository: as a wheel of its own, and in a trainer of transformers models."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, random_model
from forked import Forked

from engine import step
from examples import own_trainer
from hub import checkpoint
from model import Llama

PAGE = (ROOT / "docs" / "own_trainer.md").read_text()
TRAINER, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.S)
IDS = torch.randint(0, 4096, (2, 60), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama3": {"rope_theta": 500000.0, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


@pytest.fixture(scope="module")
def snippet() -> dict:
    """What the page's blocks take from the example."""
    return {name: getattr(own_trainer, name) for name in ("relation_loss", "train_projections")}


def widen_norms(model) -> None:
    """Norms in float64, as ours are there; transformers' are in float32 whatever the model is."""

    def norm(module, x):
        return module.weight * (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        )

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)


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
        widen_norms(theirs)
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

    def loss_now() -> float:
        with torch.no_grad():
            teacher(IDS, use_cache=False), student(IDS, use_cache=False)
            return snippet["relation_loss"](teacher, student).item()

    exec(LOOP, names)
    after = loss_now()
    names["batches"] = [IDS]
    exec(LOOP, names)
    assert loss_now() < after
    student.load_state_dict(
        pair(tmp_path / "again", FAMILIES["llama3"], "linear")[0][1].state_dict()
    )
    assert after < 0.9 * loss_now()


def test_the_pages_trainer_trains(tmp_path):
    checkpoint.save_pretrained(random_model(tie_word_embeddings=False), tmp_path / "model")
    names = {
        "AutoConfig": transformers.AutoConfig,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "DIR": tmp_path / "model",
        "rope": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        "RelationTrainer": own_trainer.RelationTrainer,
        "train_projections": own_trainer.train_projections,
        "args": arguments(tmp_path / "out"),
        "rows": dataset(),
    }
    exec(TRAINER, names)
    assert names["student"].config.rope_parameters["factor"] == 4.0
    assert names["trainer"].state.log_history[-1]["train_loss"] > 0.01


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
    with torch.no_grad():
        teacher(IDS, use_cache=False)
    student(IDS, use_cache=False)
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
    torch.testing.assert_close(loss_of(padded, mask, lengths) * 101, whole, rtol=1e-7, atol=0)


# ---- examples/own_trainer.py: each way of training against one plain batch

ROWS = torch.randint(0, 4096, (4, 40), generator=torch.Generator().manual_seed(1))
LLAMA = {"rope_theta": 500000.0, "tie_word_embeddings": False}
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a teacher and of a stretched student with other weights."""
    folder = tmp_path_factory.mktemp("own")
    pair(folder, LLAMA, "yarn")
    return folder


def load(models, adapter: bool = False):
    """(student with what it trains, teacher), float32, as examples/own_trainer.py uses them."""
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(models / n, dtype=torch.float32)
        for n in ("student", "teacher")
    )
    if adapter:
        import peft

        torch.manual_seed(3)
        student = peft.get_peft_model(student, peft.LoraConfig(**ADAPTER))
        for name, p in student.named_parameters():
            if "lora_B" in name:  # zeros at the start, which would leave A without a gradient
                torch.nn.init.normal_(p, std=0.1)
    else:
        own_trainer.train_projections(student)
    return student, teacher


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def plain_gradient(models, rows=ROWS, adapter=False, bf16=False, lengths=None):
    """One batch, no Trainer."""
    student, teacher = load(models, adapter)
    for model in (student.get_base_model() if adapter else student, teacher):
        model.set_attn_implementation(own_trainer.NAME)
    mask = None
    if lengths is not None:
        mask = (torch.arange(rows.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        teacher(rows, attention_mask=mask, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        student(rows, attention_mask=mask, use_cache=False)
    loss = own_trainer.relation_loss(teacher, student, lengths)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.requires_grad}


def step_of(trainer, lr: float):
    """(loss, gradient) of a Trainer's only step, of plain SGD."""
    before = trained(trainer.model)
    said = trainer.train()
    after = trained(trainer.model)
    return said.training_loss, {n: (before[n] - after[n]) / lr for n in before}


def arguments(folder, **more) -> transformers.TrainingArguments:
    given = {"max_steps": 1, "optim": "sgd", "learning_rate": 10.0, "lr_scheduler_type": "constant"}
    given |= {"max_grad_norm": 0.0, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    given |= {"per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
    return transformers.TrainingArguments(str(folder), **given | more)


def dataset(rows=ROWS) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in rows]


def same(found, expected, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, grad in expected[1].items():
        assert grad.norm() > 0, name
        assert (found[1][name] - grad).norm() <= tolerance * grad.norm(), name


WAYS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "bf16": {"bf16": True},
}
WAYS["all"] = WAYS["checkpointing"] | {
    "bf16": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("adapter", [False, True], ids=["projections", "peft"])
@pytest.mark.parametrize("way", WAYS)
def test_a_trainers_step_is_one_plain_batch(models, tmp_path, way, adapter):
    bf16 = WAYS[way].get("bf16", False)
    expected = plain_gradient(models, adapter=adapter, bf16=bf16)
    student, teacher = load(models, adapter)
    trainer = own_trainer.RelationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, **WAYS[way]),
        train_dataset=dataset(),
    )
    same(step_of(trainer, 10.0), expected, 3e-2 if bf16 else 2e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["projections", "peft"])
def test_checkpointing_that_loses_the_gradients_is_refused(models, tmp_path, adapter):
    student, teacher = load(models, adapter)
    kind = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    trainer = own_trainer.RelationTrainer(
        model=student, teacher=teacher, args=arguments(tmp_path, **kind), train_dataset=dataset()
    )
    with pytest.raises(ValueError, match=r"no gradient.*use_reentrant.*False"):
        trainer.train()


def test_padding_and_the_next_token(models, tmp_path):
    """Rows of padding count for nothing; the model's own loss comes on top."""
    lengths = torch.tensor([40, 13, 40, 25])
    mask = (torch.arange(40) < lengths[:, None]).long()
    expected = plain_gradient(models, lengths=lengths)
    rows = [
        {"input_ids": r, "attention_mask": m, "labels": r.where(m.bool(), -100)}
        for r, m in zip(ROWS, mask, strict=True)
    ]
    student, teacher = load(models)
    given = {"model": student, "teacher": teacher, "train_dataset": rows, "eval_dataset": rows}
    trainer = own_trainer.RelationTrainer(args=arguments(tmp_path), **given)
    same(step_of(trainer, 10.0), expected, 2e-5)
    batch = transformers.default_data_collator(rows)
    relations = trainer.compute_loss(trainer.model, batch)
    trainer.next_token = 0.5
    both, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(both, relations + 0.5 * outputs.loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(both.item(), rel=1e-5)
    batch["attention_mask"] = mask.flip(1)
    with pytest.raises(ValueError, match="padded on the left"):
        trainer.compute_loss(trainer.model, batch)


SCRIPT = """
import os, sys
import torch
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_own_trainer as t
for what in sys.argv[5:]:
    student, teacher = t.load(Path(sys.argv[3]), what == "peft")
    if what == "everything":
        student.requires_grad_()
    args = t.arguments(sys.argv[4], per_device_train_batch_size=2)
    trainer = t.own_trainer.RelationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=t.dataset()
    )
    loss, grads = t.step_of(trainer, 10.0)
    if args.process_index == 0:
        torch.save((loss, grads), Path(sys.argv[4]) / f"{what}.pt")
torch.distributed.barrier()  # then without the interpreter's end, in which gloo's thread may abort
os._exit(0)
"""
TRAINED = ("projections", "peft", "everything")


@pytest.fixture(scope="module")
def of_two_processes(models, tmp_path_factory) -> Path:
    """The loss and the gradients of a step of each of TRAINED, under torchrun."""
    place = tmp_path_factory.mktemp("steps")
    (place / "script.py").write_text(SCRIPT)
    launch = ["--standalone", "--nproc_per_node", "2", place / "script.py"]
    places = [ROOT, ROOT / "tests", models, place, *TRAINED]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agent = ROOT / "tests" / "forked_torchrun.py"
    done = Forked(agent, [*map(str, launch + places)], environment)
    _, errors = done.communicate()
    assert done.returncode == 0, errors[-2000:]
    return place


@pytest.mark.parametrize("what", TRAINED)
def test_two_processes_are_one_plain_batch(models, of_two_processes, what):
    loss, grads = torch.load(of_two_processes / f"{what}.pt")
    expected = plain_gradient(models, adapter=what == "peft")
    if what == "everything":  # what no relation sees gets zeros, and no process waits for it
        grads = {name: grads[name] for name in expected[1]}
    same((loss, grads), expected, 2e-5)


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
    kernels = {p.name for p in ROOT.glob("kernel_*.py")} - {"kernel_glue.py"}  # the model's
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
