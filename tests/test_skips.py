"""Positions that skip: what is drawn, and what the student sees of it."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

import train
from engine import flags, resume
from engine.cost import Stage
from engine.data import seed_of
from engine.run import Run
from engine.skips import positions
from model import make_student


@pytest.mark.parametrize("T, L, skips", [(512, 4096, 4), (2, 3, 4), (50, 51, 1), (7, 4096, 60)])
def test_parts_stand_in_their_order_within_the_context(T, L, skips):
    gaps, last, others = 0, 0, 0
    for step in range(1, 400, 2):
        at = positions(3, step, T, L, skips)
        assert torch.equal(at, positions(3, step, T, L, skips)), "of seed and step alone"
        assert at.shape == (T,) and at.dtype == torch.int64
        assert at[0] >= 0 and at[-1] < L and (at.diff() >= 1).all()
        gaps = max(gaps, int((at.diff() > 1).sum()))
        others += not torch.equal(at, positions(4, step, T, L, skips))
        last = max(last, int(at[-1]))
    assert gaps == min(skips, T - 1, L - T), "some blocks skip in every place"
    assert L - 1 - last <= L / 20, "some stand at the context's end"
    assert others, "of the seed"
    for step in range(0, 20, 2):
        assert torch.equal(positions(3, step, T, L, skips), torch.arange(T))


def test_nothing_skips_where_nothing_can():
    assert positions(0, 1, 512, 4096, 0) is None
    assert positions(0, 1, 4096, 4096, 4) is None


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
def test_a_block_that_skips_is_a_long_one_with_the_tokens_between_left_out(kind):
    """Tokens see each other as in the whole context, where attention is held to those of the
    block.
    """
    teacher = random_model(num_hidden_layers=1).double()
    student = make_student(teacher, teacher.config.extended(kind, 4), ())
    T, L = 12, 48
    at = positions(0, 3, T, L, 3)
    assert (at.diff() > 1).any()
    ids = torch.randint(0, 64, (2, L), generator=torch.Generator().manual_seed(0))
    h = student.embed(ids, torch.float64)
    layer = student.model.layers[0].self_attn
    q, k, _ = layer.qkv(h, student.cos_sin(L, h))
    few = h[:, at]
    p, r, _ = layer.qkv(few, student.cos_sin(T, few, at))
    assert torch.allclose(p, q[:, :, at], rtol=0, atol=1e-12)
    assert torch.allclose(r, k[:, :, at], rtol=0, atol=1e-12)


def test_reading_on_is_the_same_with_and_without_positions():
    teacher = random_model(num_hidden_layers=2)
    student = make_student(teacher, teacher.config.extended("yarn", 8), ())
    ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    whole = student.hidden(ids)
    assert torch.equal(whole, student.hidden(ids, positions=torch.arange(30)))
    moved = student.hidden(ids, positions=torch.arange(30) + 17)
    assert (moved - whole).norm() < 1e-4 * whole.norm(), "only distances count"
    skipping = positions(0, 1, 30, student.config.rope.length, 4)
    assert (student.hidden(ids, positions=skipping) - whole).norm() > 1e-3 * whole.norm()


def test_the_processes_and_micro_batches_of_a_step_skip_alike():
    """By the stage's own number; blocks of the other kind beside them by theirs."""
    native = Stage("stage2", "relation", 8, 8, 4, 1.0, skips=1)
    stage = Stage("stage2", "next token", 16, 4, 4, 1.0, skips=3, auxiliary=native)
    long = SimpleNamespace(rope=SimpleNamespace(length=64))
    for processes, micro in ((1, 4), (2, 1)):
        for rank in range(processes):
            run = object.__new__(Run)
            run.args = argparse.Namespace(micro=micro, lora_dropout=0.0, seed=5, lookups=0.0)
            run.world, run.lookups = SimpleNamespace(size=processes, rank=rank), None
            fit = lambda stage, micro=micro: SimpleNamespace(micro=micro)  # noqa: E731
            run.plan = SimpleNamespace(device=torch.device("cpu"), fit=fit, longer=long)
            run.at = SimpleNamespace(stage=1, total=0)
            run.corpus = SimpleNamespace(batch=lambda s, first, n, T: torch.zeros(n, T + 1).long())
            for n in range(4):
                for part, ids, at, *_ in run.micro_batches(stage, n):
                    T, skips, auxiliary = part.T, part.skips, part is native
                    expected = positions(seed_of(5, 1, auxiliary), n, T, 64, skips)
                    assert torch.equal(at, expected) and len(at) == ids.shape[1] - 1
                    assert torch.equal(at, torch.arange(T)) == (n % 2 == 0)


def test_the_plan_says_which_blocks_skip(capsys):
    """Of stage 2 alone, too, whose native blocks are of stage 1's kind."""
    for more, said in [
        (["--skips1", "7", "--skips2", "99999"], ["in 8 parts", "in 1,024 parts"]),
        (["--stage", "2", "--native-blocks", "2", "--skips1", "7"], ["in 5 parts", "in 8 parts"]),
        (["--scale", "1.5", "--skips2", "2"], ["no skips, as these blocks are at least as long"]),
        (["--skips2", "0"], []),
    ]:
        train.main(["--rope", "linear", "--dry-run", "--device", "cpu", *more])
        lines = [x for x in capsys.readouterr().out.splitlines() if "parts" in x or "skips" in x]
        assert len(lines) == len(said) and all(s in x for s, x in zip(said, lines, strict=True))


def test_dynamic_is_refused_in_native_blocks_too():
    args = ["--rope", "dynamic", "--stage", "2", "--native-blocks", "1", "--length1", "1024"]
    for n, more in ((1, ["--length2", "2048"]), (2, ["--length2", "2048", "--skips1", "0"])):
        with pytest.raises(ValueError, match=f"leave --skips{n} out"):
            train.main([*args, f"--skips{n}", "4", *more, "--dry-run", "--device", "cpu"])


def test_a_state_knows_how_its_native_blocks_skipped():
    def depends(skips: int, T: int) -> dict:
        native = Stage("stage2", "relation", T, 2, 4, 1.0, skips=skips)
        stages = [Stage("stage2", "next token", 512, 1, 4, 1.0, auxiliary=native)]
        return resume.matters(flags.parse([], "", train.PRESETS), stages, None)

    resume.same_run(depends(3, 128), depends(3, 128))
    with pytest.raises(ValueError, match="--skips1 was 0 and is 3"):
        resume.same_run(depends(0, 128), depends(3, 128))
    with pytest.raises(ValueError, match="--length1 was 64 and is 128"):
        resume.same_run(depends(0, 64), depends(0, 128))
    before = {k: v for k, v in depends(0, 128).items() if "native" not in k or "blocks" in k}
    resume.same_run(before, depends(0, 128))  # of a version that saved neither
