"""Kernels compiled beside loading (engine/compile_ahead.py): nothing of the run depends on it, and
on a GPU nothing is left to compile.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_model

import train
from engine import flags, models, parallel
from engine.compile_ahead import compile_ahead, make_models, take_steps
from engine.plan import make_plan
from engine.step import Step
from engine.tiles import Tiles

ROOT = Path(__file__).parents[1]
SIZES = ["--scale", "4", "--length1", "64", "--length2", "128", "--batch1", "2", "--batch2", "2"]
SIZES += ["--tokens1", "1024", "--tokens2", "1024", "--eval-blocks", "0"]


def plan_of(teacher: Path, text: Path, out: Path, *more: str):
    given = ["--teacher", str(teacher), "--data", str(text), "--out", str(out), *SIZES, *more]
    args = flags.parse(given, "", train.PRESETS)
    return make_plan(args, parallel.World(args.device), train.defaults)


@pytest.mark.parametrize(
    "model, more, fit",
    [
        ({}, (), {}),
        ({}, (), {"recomputed": 1, "gathered": True}),
        ({"num_key_value_heads": 1, "attention_bias": True}, ("--lora-rank", "2"), {}),
        ({"tie_word_embeddings": True}, (), {"tiles": Tiles(tokens=32, on_gpu=1, host=1 << 20)}),
    ],
    ids=["plain", "recomputed", "adapters", "tiles"],
)
def test_a_step_of_each_stage_is_taken_and_leaves_nothing(
    model, more, fit, tmp_path, text_dir, monkeypatch
):
    """The same objectives, blocks at a time and way of computing; random numbers are not drawn."""
    teacher = write_model(tmp_path / "teacher", num_hidden_layers=3, **model)
    plan = plan_of(teacher, text_dir, tmp_path / "out", *more)
    plan = replace(plan, fits=[replace(f, **fit) for f in plan.fits])
    taken, backward = [], Step.backward

    def watched(self, stage, ids, positions, share, last):
        values = backward(self, stage, ids, positions, share, last)
        taken.append((stage.objective, *ids.shape, self.recomputed, bool(self.tiles)))
        assert all(v.isfinite().all() for v in values)
        assert all(w.grad is not None for w in self.weights)
        return values

    monkeypatch.setattr(Step, "backward", watched)
    drawn = torch.get_rng_state()
    assert compile_ahead(plan) is None  # on a CPU
    take_steps(plan, *make_models(plan))
    assert torch.equal(drawn, torch.get_rng_state())
    how = fit.get("recomputed", 0), "tiles" in fit
    assert taken == [("relation", 2, 65, *how), ("next token", 2, 65 if how[1] else 129, *how)]


def test_adapters_begin_with_the_seeds_numbers_whatever_a_thread_draws(tmp_path, text_dir):
    """torch's own generator is for all threads one, and recomputing sets it back."""
    teacher = write_model(tmp_path / "teacher")
    plan = plan_of(teacher, text_dir, tmp_path / "out", "--lora-rank", "2", "--seed", "3")
    drawn = torch.get_rng_state()
    _, student, _ = models.make_models(plan, parallel.World(plan.device))
    assert torch.equal(drawn, torch.get_rng_state())
    torch.manual_seed(3)
    for name, p in student.named_parameters():
        if name.endswith("lora_A"):
            expected = torch.nn.init.kaiming_uniform_(torch.empty_like(p), a=5**0.5)
            assert torch.equal(p, expected), name


SEEN = """
import json, sys
sys.path[:0] = ["{root}", "{root}/tests"]
import torch, triton
import train
from engine.compile_ahead import compile_ahead
from engine.models import make_models
from engine.parallel import World
from engine.step import Step
from test_compile_ahead import plan_of

seen = []
triton.knobs.runtime.jit_post_compile_hook = lambda fn, **more: seen.append(fn.name) and None
plan = plan_of(*sys.argv[1:])
compile_ahead(plan).result()
n = len(seen)
world = World(plan.device)
teacher, student, _ = make_models(plan, world)
for stage in plan.stages:
    step = Step(teacher, student, train.PLAIN, **plan.how(stage))
    step.zero()
    ids = torch.zeros(plan.fit(stage).micro, stage.T + 1, dtype=torch.long, device=plan.device)
    step.backward(stage, ids, None, 1.0, last=True)
    step.close()
print(json.dumps([n, seen]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_is_left_to_compile(tmp_path, text_dir):
    shape = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    teacher = write_model(tmp_path / "teacher", head_dim=128, **shape)
    script = SEEN.format(root=ROOT)
    command = [sys.executable, "-c", script, *map(str, (teacher, text_dir, tmp_path / "out"))]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    n, seen = json.loads(run.stdout.splitlines()[-1])
    assert 0 < n == len(seen), seen[n:]


def test_making_a_model_without_memory_does_not_import_torchs_compiler(tiny_dir):
    script = (
        "import sys; from pathlib import Path; from model import Llama\n"
        "Llama.from_pretrained(Path(sys.argv[1])); print('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tiny_dir)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    "code",
    [
        "import kernel_glue, kernel_hopper, kernel_triton",
        "from engine import machine; machine.fix_order()\n"
        "assert __import__('torch').are_deterministic_algorithms_enabled()",
    ],
    ids=["the kernels", "--deterministic"],
)
def test_what_comes_before_the_first_step_does_not_import_torchs_compiler(code):
    seen = "import sys; print({'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    command = [sys.executable, "-c", f"{code}\n{seen}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "set()"
