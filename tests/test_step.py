"""The fast path of a step equals the plain losses, in loss and in every gradient."""

import contextlib
import functools
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, random_model
from forked import Forked
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from engine import cost, lora, offload, parallel, sequence, step
from engine import tiles as tiles_file
from engine.skips import positions
from engine.tiles import Tiles, hidden
from model import TRAINED, make_student, trainable
from relation_kl import relation_kl

T, VOCAB = 50, 512
IDS = torch.randint(0, VOCAB, (2, T + 1), generator=torch.Generator().manual_seed(0))
AT = positions(0, 1, T, 160, 4)  # 4 skips


def plain_relation_loss(teacher, student, ids, dtype, kl_weight=1.0, positions=None):
    """Stage 1's loss as on a blackboard."""
    T, table = ids.shape[1], []
    qk, v = (student.score_scale(T), teacher.score_scale(T)), (teacher.config.head_dim**-0.5,) * 2
    ours = student.walk(ids, dtype, positions=positions)
    both = zip(teacher.walk(ids, dtype), ours, strict=True)
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


def plain_next_token_loss(teacher, student, ids, dtype, share=0.0, positions=None):
    """Stage 2's: the cross-entropy of a target that is the next token and, by share, the teacher's
    distribution, less what no student can go below.
    """
    logits, theirs = (
        m.lm_head(m.hidden(ids[:, :-1], dtype, positions=at)).float()
        for m, at in ((student, positions), (teacher, None))
    )
    r, log_p = theirs.detach().softmax(-1), logits.log_softmax(-1)
    text = -log_p.gather(-1, ids[:, 1:, None]).mean()
    kl = (r * (r.log() - log_p)).sum(-1).mean()
    return ((1 - share) * text + share * kl,)


SHARE = 0.3
PLAIN = {
    "relation": plain_relation_loss,
    "next token": plain_next_token_loss,
    "next token and teacher": plain_next_token_loss,
}


def stage_of(objective: str, T: int = T, batch: int = 2) -> cost.Stage:
    """One step of the stage that PLAIN calls so."""
    relation, share = objective == "relation", SHARE * objective.endswith("teacher")
    objective = "relation" if relation else "next token"
    return cost.Stage("stage", objective, T, batch, 1, 1e-3, relation, teacher_share=share)


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


def values_and_gradients(
    made: step.Step, objective: str, pieces: int = 1, at: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The mean of the values, and the gradient of each weight, of IDS in that many pieces."""
    made.zero()
    stage, device = stage_of(objective), made.student.device
    at = None if at is None else at.to(device)
    values = [
        made.backward(stage, ids.to(device), at, 1 / pieces, i + 1 == pieces)
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
@pytest.mark.parametrize("at", [None, AT], ids=["", "skips"])
def test_fast_equals_plain(at, objective, kind, rank, dtype, monkeypatch):
    teacher, student = models(kind, rank, dtype)
    on_paper = {k: functools.partial(loss, positions=at) for k, loss in PLAIN.items()}
    plain = step.Step(teacher, student, on_paper, dtype=dtype)
    expected = values_and_gradients(plain, objective)
    assert all(g.norm() > 0 for g in expected[-len(plain.weights) :])
    for chunk, recomputed, pieces in ((4096, 0, 1), (4096, 2, 2), (13, 1, 2)):
        monkeypatch.setattr(step, "HEAD_CHUNK", chunk)
        fast = step.Step(teacher, student, {}, dtype=dtype, recomputed=recomputed)
        equal(values_and_gradients(fast, objective, pieces, at), expected, dtype)


@pytest.mark.parametrize("objective", PLAIN)
def test_the_plain_loss_runs_where_it_is_enough_and_only_there(objective, monkeypatch):
    teacher, student = models("linear", None, torch.float32)
    runs = []

    def spied(*args):
        runs.append(0)
        return PLAIN[objective](*args)

    plain = {stage_of(objective).objective: spied}
    enough = [{}, {"kl_weight": 0.5}]
    more = [{"recomputed": 1}]
    if objective == "relation":
        more += [{"relations": "qk"}, {"authors_heads": True}, {"impl": "tiled"}, {"kl_weight": 0}]
    for options, ran in [(o, 1) for o in enough] + [(o, 0) for o in more]:
        runs.clear()
        made = step.Step(teacher, student, plain, dtype=torch.float32, **options)
        made.backward(stage_of(objective), IDS, None, 1.0, True)
        assert len(runs) == ran, options
    monkeypatch.setattr(step, "HEAD_CHUNK", 2 * T - 1)
    runs.clear()
    made = step.Step(teacher, student, plain, dtype=torch.float32)
    made.backward(stage_of(objective), IDS, None, 1.0, True)
    assert not runs, "more tokens than logits may exist at once"


def test_a_gradient_is_clipped_by_the_norm_that_finish_returns():
    teacher, student = models("linear", None, torch.float32)
    made = step.Step(teacher, student, PLAIN, dtype=torch.float32)
    made.zero()
    made.backward(stage_of("next token"), IDS, None, 1.0, True)
    norm = made.finish()
    made.clip(norm, float(norm) / 4)
    assert float(made.finish()) == pytest.approx(float(norm) / 4, rel=1e-4)
    made.zero()
    assert all(w.grad is None or not w.grad.any() for w in made.weights)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("kind, kl_weight", [("linear", 1.0), ("yarn", 0.0)])
@pytest.mark.parametrize("objective", PLAIN)
@pytest.mark.parametrize("at", [None, AT], ids=["", "skips"])
def test_tiles_give_the_loss_and_the_gradient_of_the_whole(
    at, objective, kind, kl_weight, rank, monkeypatch
):
    """In float64, to rounding: ragged tiles, a host's stack with ragged chunks, with and without
    attention's output kept, with q, k and v kept.
    """
    monkeypatch.setattr(offload, "CHUNK", 3000)
    monkeypatch.setattr(tiles_file, "ROWS", 200)  # two calls of attention
    teacher, student = models(kind, rank, torch.float64)
    how = {"dtype": torch.float64, "kl_weight": kl_weight}
    expected = values_and_gradients(step.Step(teacher, student, {}, **how), objective, 1, at)
    for sizes in ((14, 0, 3), (100, 1, 2), (7, 3, 0), (14, 3, 3, 2)):
        tiles = Tiles(*sizes)
        made = step.Step(teacher, student, {}, tiles=tiles, **how)
        found = values_and_gradients(made, objective, 1, at)
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() <= 1e-12 * y.norm().clamp(min=1e-3)


CASES = {  # objective, kind of positions, adapters, blocks, T, sharded, tiles; skips, with yarn
    "stage 2": ("next token", "linear", None, 1, T, False, None),
    "stage 1": ("relation", "yarn", None, 1, T, False, None),
    "adapters in tiles": ("next token", "yarn", 4, 1, 49, False, Tiles(7, 1, 2)),
    "q, k, v kept": ("relation", "yarn", None, 1, 49, False, Tiles(7, 3, 3, 2)),
    "two blocks": ("relation", "linear", 4, 2, T, False, Tiles(20, 0, 0)),
    "sharded": ("relation", "linear", None, 1, 47, True, Tiles(20, 1, 3)),
    "sharded adapters": ("next token", "linear", 4, 2, T, True, Tiles(20, 0, 3)),
    "the teacher's share": ("next token and teacher", "yarn", None, 1, 49, False, Tiles(7, 1, 2)),
    "... sharded": ("next token and teacher", "linear", None, 1, T, True, None),
}


def share_of(case: tuple, world) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """What one process has of a step, made whole: values, gradients, norm; h after the last norm."""
    objective, kind, adapters, blocks, T, sharded, tiles = case
    teacher, student = models(kind, adapters, torch.float64)
    units = parallel.shard(teacher, student, world, torch.float64) if sharded else None
    how = {"dtype": torch.float64, "world": world, "units": units, "tiles": tiles}
    made = step.Step(teacher, student, {}, **how)
    stage = stage_of(objective, T, blocks)
    P = sequence.processes_per_block(blocks, world.size)
    mine = IDS[:blocks, : T + 1].chunk(world.size // P)[world.rank // P]
    made.zero()
    at = AT[:T] if kind == "yarn" else None
    values = [v.clone() for v in made.backward(stage, mine, at, 1.0, True)]
    norm = made.finish()
    gradients = [parallel.whole(w.grad) for w in made.weights]
    made.close()
    for value in values if world.size > 1 else ():
        dist.all_reduce(value)
    h = hidden(student, mine[:, :-1], P) if P > 1 else None
    return [v / world.size for v in values] + gradients + [norm], h


BLOCKS = torch.randint(0, VOCAB, (4, T + 1), generator=torch.Generator().manual_seed(2))
STEPS = {  # a step's micro-batches: objective, blocks a step, rows; adapters, what memory asks for
    "two": ((("relation", 4, (0, 1)), ("relation", 4, (2, 3))), None, {}),
    "one": ((("relation", 2, (3, 0)),), None, {}),
    "recomputed": ((("relation", 4, (0, 1)), ("relation", 4, (2, 3))), None, {"recomputed": 2}),
    "native blocks beside": (
        (("next token", 2, (0, 1)), ("relation", 4, (2, 3)), ("relation", 4, (0, 2))), 4, {}
    ),
    "... recomputed": (
        (("next token", 4, (0, 1)), ("next token", 4, (2, 3)), ("relation", 2, (0, 2))),
        None,
        {"recomputed": 2},
    ),
    "the teacher's share": (
        (("next token and teacher", 4, (0, 1)), ("next token and teacher", 4, (2, 3))),
        None,
        {"recomputed": 1},
    ),
    "a block over both": (
        (("next token", 1, (0,)), ("relation", 2, (1, 2))), None, {"tiles": Tiles(20, 1, 2)}
    ),
}  # fmt: skip


def two_steps(case: tuple, world, gathered: bool = False) -> tuple[list[torch.Tensor], list[int]]:
    """(Of two steps, one after the other's weights: gradients, norm, h measured after it; gathers
    of each step, and of each time that is measured).
    """
    micro_batches, adapters, how = case
    teacher, student = models("yarn", adapters, torch.float64)
    units = None
    if world.size > 1:
        units = parallel.shard(teacher, student, world, torch.float64)
        how = how | {"units": units, "gathered": gathered}
    how = how | {"dtype": torch.float64, "world": world}
    made, found, gathers = step.Step(teacher, student, {}, **how), [], []
    sgd = torch.optim.SGD(made.weights, lr=0.1)
    for _ in range(2):
        with gathers_of_fsdp() as counted:
            made.zero()
            for i, (objective, blocks, rows) in enumerate(micro_batches):
                stage = stage_of(objective, T, blocks)
                P = sequence.processes_per_block(blocks, world.size)
                mine = BLOCKS[list(rows)].chunk(world.size // P)[world.rank // P]
                last = i + 1 == len(micro_batches)
                made.backward(stage, mine, None, 1 / len(micro_batches), last)
            found += [made.finish(), *(parallel.whole(w.grad) for w in made.weights)]
            sgd.step()
        gathers.append(len(counted))
        with gathers_of_fsdp() as counted, torch.no_grad():
            found.append(student.hidden(BLOCKS[:1, :-1]))
        gathers.append(len(counted))
    made.close()
    return found, gathers


@contextlib.contextmanager
def gathers_of_fsdp():
    """A list that grows by an entry with each."""
    real, counted = _fsdp_param_group.foreach_all_gather, []

    def gather(*args):
        counted.append(0)
        return real(*args)

    _fsdp_param_group.foreach_all_gather = gather
    yield counted
    _fsdp_param_group.foreach_all_gather = real


def _steps(rank: int, size: int, folder: str) -> None:
    with _met(rank, size, folder) as world:
        found = {name: two_steps(case, world, gathered=True) for name, case in STEPS.items()}
        found["as before"] = two_steps(STEPS["two"], world)
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")


def test_layers_gathered_once_a_step_give_the_gradients_of_one_process(tmp_path):
    """Each unit is gathered once a step; the next step and what is measured see its new weights."""
    in_processes("_steps", 2, tmp_path)
    found, layers, alone = torch.load(tmp_path / "found.pt"), 3, SimpleNamespace(size=1, rank=0)
    for name, case in (STEPS | {"as before": STEPS["two"]}).items():
        figures, gathers = found[name]
        expected, none = two_steps((*case[:2], {}), alone)
        for x, y in zip(figures, expected, strict=True):
            assert (x - y).norm() <= 1e-12 * y.norm().clamp(min=1e-3), name
        half = len(expected) // 2
        assert (expected[half - 1] - expected[-1]).norm() > 1e-3, "a step is seen by the next"
        times = 2 * len(case[0]) if name == "as before" else 1
        first, measured, second, again = gathers
        assert not any(none) and measured == again == layers, name
        # FSDP takes every forward for part of the step, that of the teacher alone and what was
        # measured too, and may prefetch a layer of it in vain
        vain = int(name == "the teacher's share")
        assert 0 <= first - times * layers <= vain and second - first in (0, 1), name


@contextlib.contextmanager
def _met(rank: int, size: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=size)
    yield SimpleNamespace(size=size, rank=rank, device=torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


def _process(rank: int, size: int, folder: str) -> None:
    with _met(rank, size, folder) as world:
        found = {name: share_of(case, world) for name, case in CASES.items()}
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")


def in_processes(function: str, size: int, tmp_path) -> None:
    """Runs a function of this file in so many processes: f(rank, size, folder)."""
    script, places = tmp_path / "script.py", [str(ROOT), str(ROOT / "tests")]
    script.write_text(
        f"import os, sys\nsys.path[:0] = {places}\nimport test_step\n"
        f"test_step.{function}(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])\n"
        "os._exit(0)  # without the interpreter's end, in which gloo's thread may abort\n"
    )
    args = [str(size), str(tmp_path)]
    ranks = [Forked(script, [str(rank), *args], dict(os.environ)) for rank in range(size)]
    for each in ranks:
        _, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors


def test_a_long_block_is_measured_in_tiles(monkeypatch):
    _, student = models("yarn", 4, torch.float64)
    whole = student.hidden(IDS[:, :T])
    monkeypatch.setattr(tiles_file, "TOKENS", 14)
    assert (hidden(student, IDS[:, :T]) - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("size", [2, 4])
def test_a_block_over_several_processes_is_that_of_one(size, tmp_path):
    """In float64 under gloo: one loss, one gradient, one norm, to 1e-12; T ragged; two key/value
    heads over four processes; sharded or not.
    """
    in_processes("_process", size, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    for name, (objective, kind, adapters, blocks, T, _, _) in CASES.items():
        alone = SimpleNamespace(size=1, rank=0)
        whole = objective, kind, adapters, blocks, T, False, None
        expected, _ = share_of(whole, alone)
        figures, h = found[name]
        for x, y in zip(figures, expected, strict=True):
            assert (x - y).norm() <= 1e-12 * y.norm().clamp(min=1e-3), name
        if h is not None:
            _, student = models(kind, adapters, torch.float64)
            whole = student.hidden(IDS[: len(h), :T])
            assert (h - whole).norm() <= 1e-12 * whole.norm(), name


@pytest.mark.parametrize(
    "heads, key_heads, P, said",
    [
        (32, 8, 16, None),
        (9, 3, 3, None),
        (9, 3, 2, "9 heads"),
        (12, 3, 2, None),
        (6, 6, 4, "6 head"),
    ],
)
def test_heads_that_cannot_be_dealt_out_are_refused_by_name(heads, key_heads, P, said):
    c = SimpleNamespace(n_head=heads, n_kv_head=key_heads)
    if said is None:
        return sequence.refuse_heads(c, P)
    with pytest.raises(ValueError, match=said):
        sequence.refuse_heads(c, P)


def test_blocks_and_processes_must_go_into_each_other():
    assert [sequence.processes_per_block(b, 4) for b in (8, 4, 2, 1)] == [1, 1, 2, 4]
    with pytest.raises(ValueError, match="batch is 3 and there are 4 processes"):
        sequence.processes_per_block(3, 4)


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("skips", [0, 4])
@pytest.mark.parametrize("objective", PLAIN)
def test_a_recorded_step_follows_its_ids_and_positions(objective, skips):
    both = []
    for graphs in (True, False):
        pair = (m.cuda() for m in models("yarn", None, torch.float32))  # the same numbers in each
        both.append(step.Step(*pair, {}, dtype=torch.float32, graphs=graphs))
    assert [made.recorded for made in both] == [True, False]
    for n in range(4):
        ids = torch.randint(0, VOCAB, IDS.shape, generator=torch.Generator().manual_seed(n)).cuda()
        at = positions(0, n, T, 160, skips)
        at = None if at is None else at.cuda()
        found = []
        for made in both:
            made.zero()
            values = made.backward(stage_of(objective), ids, at, 1.0, True)
            gradients = [w.grad for w in made.weights]
            found.append([t.clone() for t in (*values, *gradients)])
        equal(*found, torch.float32)
    for made in both:
        made.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("objective", PLAIN)
def test_tiles_in_bfloat16_are_as_exact_as_the_whole(objective, device):
    """Against float64: the error of the loss and of all gradients, at most twice the untiled's."""

    def run(dtype, tiles):
        teacher, student = models("yarn", None, torch.float32)
        teacher, student = teacher.to(device), student.to(device)
        teacher = teacher.to(torch.bfloat16).to(dtype)  # the same numbers in each
        masters = trainable(student)
        student = make_student(teacher, student.config)
        for name, w in trainable(student).items():
            w.data = masters[name].data.to(torch.float64 if dtype == torch.float64 else w.dtype)
        made = step.Step(teacher, student, {}, dtype=dtype, tiles=tiles)
        values = values_and_gradients(made, objective)
        return torch.cat([v.double().flatten() for v in values])

    exact = run(torch.float64, None)
    whole, tiled = run(torch.bfloat16, None), run(torch.bfloat16, Tiles(14, 1, 2))
    assert (tiled - exact).norm() <= 2 * (whole - exact).norm()
    if device == "cpu":
        assert torch.equal(tiled, run(torch.bfloat16, Tiles(14, 1, 2))), "the same bits twice"
        again, kept = (run(torch.bfloat16, Tiles(14, 3, 3, n)) for n in (0, 2))
        assert torch.equal(again, kept), "q, k and v made again or kept"


def test_the_noise_of_adapters_is_the_same_in_forward_and_backward():
    """In tiles, dropout and all: the gradient is that of the loss, by finite differences."""
    teacher, student = models("linear", 4, torch.float64)
    for layer in student.model.layers:
        for name in TRAINED:
            getattr(layer.self_attn, name).dropout = 0.3
    made = step.Step(teacher, student, {}, dtype=torch.float64, dropout=0.3, tiles=Tiles(14, 0, 1))
    stage, w = stage_of("next token"), made.weights[0]
    direction = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))

    def loss(shift: float) -> float:
        torch.manual_seed(5)
        w.data += shift * direction
        with torch.no_grad():
            (value,) = made.losses(stage, IDS)
        w.data -= shift * direction
        return value.item()

    torch.manual_seed(5)
    made.zero()
    (value,) = made.backward(stage, IDS, None, 1.0, True)
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert value.item() == loss(0.0)
    assert (w.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)
