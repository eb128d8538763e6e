"""The fast path of a step equals the plain losses, in loss and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

from engine import cost, lora, step
from model import TRAINED, make_student, trainable
from relation_kl import relation_kl

T, VOCAB = 50, 512
IDS = torch.randint(0, VOCAB, (2, T + 1), generator=torch.Generator().manual_seed(0))


def plain_relation_loss(teacher, student, ids, dtype, kl_weight=1.0):
    """Stage 1's loss as on a blackboard."""
    T, table = ids.shape[1], []
    qk, v = (student.score_scale(T), teacher.score_scale(T)), (teacher.config.head_dim**-0.5,) * 2
    both = zip(teacher.walk(ids, dtype), student.walk(ids, dtype), strict=True)
    for (h_teacher, theirs), (h_student, ours) in both:  # noqa: B007 - the last ones are wanted
        three = zip(ours, theirs, (qk, qk, v), strict=True)
        rows = [relation_kl(x, y, scale=a, teacher_scale=b).mean() for x, y, (a, b) in three]
        table.append(torch.stack(rows))
    log_r, log_p = (
        model.lm_head(model.model.norm(h)).float().log_softmax(-1)
        for model, h in ((teacher, h_teacher), (student, h_student))
    )
    kl = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(-1).mean()
    table = torch.stack(table)
    return table.sum(1).mean() + kl_weight * kl, table.detach(), kl.detach()


def plain_next_token_loss(student, ids, dtype):
    logits = student.lm_head(student.hidden(ids[:, :-1], dtype)).float()
    return (F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()),)


PLAIN = {"relation": plain_relation_loss, "next token": plain_next_token_loss}


def stage_of(objective: str) -> cost.Stage:
    return cost.Stage("stage", objective, T, 2, 1, 1e-3, objective == "relation")


def models(kind: str, rank: int | None, dtype: torch.dtype, **shape):
    """Teacher and student, both away from where they start: adapters have a gradient then."""
    teacher = random_model(vocab_size=VOCAB, num_hidden_layers=3, **shape).to(dtype)
    student = make_student(teacher, teacher.config.extended(kind, 8), () if rank else TRAINED)
    if rank:
        lora.adapt(student, TRAINED, rank, 2.0 * rank, 0.0)
    torch.manual_seed(1)
    for p in trainable(student).values():
        p.data = p.data.to(dtype) + 0.05 * torch.randn(p.shape, dtype=dtype)
    return teacher, student


def values_and_gradients(made: step.Step, objective: str, pieces: int = 1) -> list[torch.Tensor]:
    """The mean of the values, and the gradient of each weight, of IDS in that many pieces."""
    made.zero()
    values = [
        made.backward(stage_of(objective), ids, 1 / pieces, i + 1 == pieces)
        for i, ids in enumerate(IDS.chunk(pieces))
    ]
    norm = made.finish()
    gradients = [w.grad.clone() for w in made.weights]
    assert norm == torch.nn.utils.get_total_norm(gradients)
    made.close()
    return [sum(v) / pieces for v in zip(*values, strict=True)] + gradients


def equal(a: list[torch.Tensor], b: list[torch.Tensor], dtype: torch.dtype) -> None:
    """To the rounding of the narrowest numbers in a loss: norms and logits are float32."""
    bound = 2e-5 if dtype == torch.float32 else 1e-6
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= bound * y.norm(), f"{(x - y).norm()} of {y.norm()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("objective", PLAIN)
def test_fast_equals_plain(objective, kind, rank, dtype, monkeypatch):
    teacher, student = models(kind, rank, dtype)
    plain = step.Step(teacher, student, PLAIN, dtype=dtype)
    expected = values_and_gradients(plain, objective)
    assert all(g.norm() > 0 for g in expected[-len(plain.weights) :])
    for chunk, checkpointing, pieces in ((4096, False, 1), (4096, True, 2), (13, False, 2)):
        monkeypatch.setattr(step, "HEAD_CHUNK", chunk)
        fast = step.Step(teacher, student, {}, dtype=dtype, checkpointing=checkpointing)
        equal(values_and_gradients(fast, objective, pieces), expected, dtype)


@pytest.mark.parametrize("objective", PLAIN)
def test_the_plain_loss_runs_where_it_is_enough_and_only_there(objective, monkeypatch):
    teacher, student = models("linear", None, torch.float32)
    runs = []

    def spied(*args):
        runs.append(0)
        return PLAIN[objective](*args)

    enough = [{}, {"kl_weight": 0.5}]
    more = [{"checkpointing": True}]
    if objective == "relation":
        more += [{"relations": "qk"}, {"authors_heads": True}, {"impl": "tiled"}, {"kl_weight": 0}]
    for options, ran in [(o, 1) for o in enough] + [(o, 0) for o in more]:
        runs.clear()
        made = step.Step(teacher, student, {objective: spied}, dtype=torch.float32, **options)
        made.backward(stage_of(objective), IDS, 1.0, True)
        assert len(runs) == ran, options
    monkeypatch.setattr(step, "HEAD_CHUNK", 2 * T - 1)
    runs.clear()
    made = step.Step(teacher, student, {objective: spied}, dtype=torch.float32)
    made.backward(stage_of(objective), IDS, 1.0, True)
    assert not runs, "more tokens than logits may exist at once"


def test_a_gradient_is_clipped_by_the_norm_that_finish_returns():
    teacher, student = models("linear", None, torch.float32)
    made = step.Step(teacher, student, PLAIN, dtype=torch.float32)
    made.zero()
    made.backward(stage_of("next token"), IDS, 1.0, True)
    norm = made.finish()
    made.clip(norm, float(norm) / 4)
    assert float(made.finish()) == pytest.approx(float(norm) / 4, rel=1e-4)
    made.zero()
    assert all(w.grad is None or not w.grad.any() for w in made.weights)
