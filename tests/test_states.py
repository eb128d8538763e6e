"""States: whole or not there, to the bit, by any number of processes, beside steps that go on."""

import errno
import json
import os
import resource
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, random_model, write_model
from safetensors.torch import load_file
from test_train import arguments, finished, same_result, shell

from engine import announce, cost, exits, fit, folder, plan, run, states
from engine.folder import Folder
from engine.parallel import World
from model import TRAINED

SHAPES = {"a": (5, 3), "b": (8, 2), "c": (2,), "d": (1, 7)}  # rows that no number of ranks divides


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "small", seed=5, max_position_embeddings=128
    )


@pytest.fixture(scope="module")
def whole(small, text_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished(arguments(small, text_dir, out))
    return out


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Files of several chunks, whose ends fall into tensors."""
    monkeypatch.setattr(states, "CHUNK", 104)


def trained(seed: int = 0) -> tuple[dict, torch.optim.Optimizer]:
    """Weights after three updates, and Adam."""
    torch.manual_seed(seed)
    weights = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    adam = torch.optim.AdamW(weights.values(), lr=0.1)
    for _ in range(3):
        for p in weights.values():
            p.grad = torch.randn_like(p)
        adam.step()
    return weights, adam


def held(weights, adam) -> list[torch.Tensor]:
    """Copies of all that a state must hold."""
    moments = [adam.state[p][k] for p in weights.values() for k in (*states.MOMENTS, "step")]
    return [t.detach().clone() for t in (*weights.values(), *moments)]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def save(out: Folder, weights, adam, total: int, world: World, overlap: bool = True) -> None:
    saver = states.Saver(out, world, {}, states.Progress(), overlap)
    saver.start(states.slices(weights, adam, world), states.Progress(step=3, total=total))
    saver.finish()


def again(state: Path, weights, adam, step: int = 3) -> list[torch.Tensor]:
    for p in weights.values():
        p.data.zero_()
    states.load(state, weights, adam, step)
    return held(weights, adam)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_state_reads_back_to_the_bit_and_is_a_safetensors_file(tmp_path, overlap):
    weights, adam = trained()
    before = held(weights, adam)
    with Folder(tmp_path / "out", "train.py") as out:
        save(out, weights, adam, 1, World("cpu"), overlap)
    state = states.latest(tmp_path / "out" / "state")
    file = load_file(state / "rank0.safetensors")
    assert set(file) == {
        f"{k}{n}" for n in SHAPES for k in ("", *(f"{m}." for m in states.MOMENTS))
    }
    assert torch.equal(file["exp_avg.b"], adam.state[weights["b"]]["exp_avg"])
    assert len(states.load_info(state)["files"]["rank0.safetensors"]) > 3, "several checksums"
    assert equal(before, again(state, *trained(seed=1)))


def test_with_and_without_overlap_the_same_bytes(tmp_path):
    weights, adam = trained()
    with Folder(tmp_path, "train.py") as out:
        for total, overlap in enumerate((True, False)):
            save(out, weights, adam, total, World("cpu"), overlap)
    one, two = sorted((tmp_path / "state").glob("*/rank0.safetensors"))
    assert one.read_bytes() == two.read_bytes()


def test_what_changes_after_the_copy_is_not_in_the_state(tmp_path, monkeypatch):
    """As a next step does while a slow disk is at work."""
    weights, adam = trained()
    before, pwrite = held(weights, adam), os.pwrite
    slow = lambda *a: time.sleep(0.01) or pwrite(*a)  # noqa: E731
    monkeypatch.setattr(states.os, "pwrite", slow)
    with Folder(tmp_path, "train.py") as out:
        saver = states.Saver(out, World("cpu"), {}, states.Progress(), overlap=True)
        saver.reserve(weights)
        saver.start(states.slices(weights, adam, saver.world), states.Progress(step=3, total=3))
        assert (
            saver.writing() and not saver.finish(0.0) and states.latest(tmp_path / "state") is None
        )
        for p in weights.values():
            p.data.fill_(7.0)
            adam.state[p]["exp_avg"].fill_(7.0)
        assert saver.finish() and not saver.writing()
    assert equal(before, again(states.latest(tmp_path / "state"), weights, adam))


def test_the_copy_takes_the_memory_that_the_plan_says(tmp_path):
    student = random_model()
    weights = {n: p for n, p in student.named_parameters() if n.split(".")[-2] in TRAINED}
    said = 12 * cost.trained_parameters(student.config, None)
    with Folder(tmp_path, "train.py") as out:
        saver = states.Saver(out, World("cpu"), {}, states.Progress(), overlap=True)
        saver.reserve(weights)
        reserved = len(saver.room)
        adam = torch.optim.AdamW(weights.values())
        for p in weights.values():
            p.requires_grad_(True).grad = torch.ones_like(p)
        adam.step()
        saver.start(states.slices(weights, adam, saver.world), states.Progress())
        saver.finish()
    header = 200 * 3 * len(weights)
    assert said < reserved <= said + header and len(saver.room) == reserved, "room is made once"


def test_without_room_on_the_host_steps_wait():
    c, cpu = random_model().config, torch.device("cpu")
    fits = [fit.Fit(1, False, {"all": 1000}), fit.Fit(1, False, {"all": 3000})]
    m = fit.Machine(c, torch.float32, cpu, None, False, 1, free=10_000, host=0)
    assert plan.spare_on_host(m, fits) == int(fit.ROOM * 10_000) - 3000
    gpu = fit.Machine(c, torch.float32, torch.device("cuda", 0), None, False, 1, free=0, host=5000)
    tiled = [*fits, fit.Fit(1, False, {}, fit.Tiles(on_gpu=0, host=4000))]
    assert plan.spare_on_host(gpu, tiled) == 1000
    assert (
        "while steps wait, as the host has no room for a copy of 2 KiB"
        in announce.describe_saving(2048, False)
    )
    assert "from a copy of 2 KiB in the host's memory" in announce.describe_saving(2048, True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    weights, _ = trained()
    weights |= {"e": torch.nn.Parameter(torch.ones(0, 3))}  # as a shard may be
    states.refuse_non_finite(weights, World("cpu"))
    weights["c"].data[1] = bad
    with pytest.raises(ValueError, match="made c NaN or infinite"):
        states.refuse_non_finite(weights, World("cpu"))


# ---- any number of processes


def together(size: int, f) -> None:
    """f(world) in so many processes, forked from this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            given = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
            os.environ |= {k: str(v) for k, v in (given | {"MASTER_PORT": port}).items()}
            f(World("cpu"))
            code = 0
        finally:
            os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size


def resave(place: Path, sharded: bool):
    """For `together`: reads the newest state and writes the next."""

    def run(world: World) -> None:
        weights, adam = trained(seed=1)
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.tensor import Shard, distribute_tensor

            mesh = init_device_mesh("cpu", (world.size,))
            cut = {n: distribute_tensor(p.detach(), mesh, [Shard(0)]) for n, p in weights.items()}
            weights = {n: torch.nn.Parameter(p) for n, p in cut.items()}
            adam = torch.optim.AdamW(weights.values())
        with Folder(place, "train.py", active=world.main) as out:
            newest = world.on_main(states.latest, place / "state")
            states.load(newest, weights, adam, 3)
            save(out, weights, adam, states.load_info(newest)["total"] + 1, world)
            dist.barrier()

    return run


def test_one_two_four_and_back_to_one_process_to_the_bit(tmp_path):
    """Copies and shards, whose rows are cut at other places."""
    weights, adam = trained()
    before = held(weights, adam)
    with Folder(tmp_path, "train.py") as out:
        save(out, weights, adam, 1, World("cpu"))
    for total, (size, sharded) in enumerate([(2, False), (4, True), (4, False), (2, True)], 2):
        together(size, resave(tmp_path, sharded))
        newest = states.latest(tmp_path / "state")
        info = states.load_info(newest)
        assert info["total"] == total and len(info["files"]) == size
        assert equal(before, again(newest, *trained(seed=1)))
    assert len(list((tmp_path / "state").iterdir())) == states.KEEP


def test_a_disk_that_is_full_for_one_process_ends_all_with_its_sentence(tmp_path):
    def run(world: World) -> None:
        weights, adam = trained()
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with (
            Folder(tmp_path, "train.py", active=world.main) as out,
            pytest.raises(ValueError, match=r"cannot write to .* MiB free"),
        ):
            save(out, weights, adam, 1, world)
        dist.barrier()

    together(2, run)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_state_is_written_once_more_where_room_is_made(tmp_path, size, overlap):
    """As it was when it began, whatever steps have done since."""
    name = "_write" if overlap else "_write_at_once"
    real, before = getattr(states.Saver, name), held(*trained())

    def run(world: World) -> None:
        weights, adam = trained()
        failing = [world.rank == world.size - 1]

        def full(self, file, parts):
            if failing and failing.pop():
                file.write_bytes(b"half")
                raise ValueError("full")
            return real(self, file, parts)

        setattr(states.Saver, name, full)  # of this process alone
        with Folder(tmp_path, "train.py", active=world.main) as out:
            made = lambda: asked.append(0) or len(asked) == 1  # noqa: E731
            saver, asked = states.Saver(out, world, {}, states.Progress(), overlap, made), []
            saver.start(states.slices(weights, adam, world), states.Progress(step=3, total=1))
            for p in weights.values() if overlap else ():
                p.data.zero_()
            assert saver.finish() and len(asked) == world.main
            failing += [True]
            saver.start(states.slices(weights, adam, world), states.Progress(step=4, total=2))
            with pytest.raises(ValueError, match="full"):
                saver.finish()
            if size > 1:
                dist.barrier()

    together(size, run)
    assert equal(before, again(states.latest(tmp_path / "state"), *trained(seed=1)))


# ---- runs


def script(path: Path, *lines: str) -> Path:
    """train.py with a writer that is not as fast, or as able, as it should be."""
    head = ["import errno, os, sys, time", f"sys.path.insert(0, {str(ROOT)!r})"]
    head += ["import train", "from engine import exits, peers, resume, run, states"]
    head += ["written, write = [], states.Saver._write"]
    path.write_text("\n".join([*head, *lines, "exits.run(train.main, 'train.py')\n"]))
    return path


PATIENCE = "peers.AFTER = 30  # this machine may be slow\nexits.GRACE"
SLOW = """
def slow(*a):
    written.append(0)
    if len(written) > 2:
        print("slow", flush=True)
        time.sleep({})
    return write(*a)
states.Saver._write = slow
"""


# The same where the host has no room for a copy, so that steps wait
AT_ONCE = """
from engine import plan
plan.spare_on_host, write = lambda *a: -1, states.Saver._write_at_once
"""


def slowly(overlap: bool, seconds: float) -> str:
    slow = SLOW.format(seconds)
    return slow if overlap else AT_ONCE + slow.replace("Saver._write ", "Saver._write_at_once ")


def until(run, said: str) -> None:
    while said not in run.stdout.readline():
        assert run.poll() is None, run.communicate()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_stop_that_leaves_no_time_counts_the_state_before(
    whole, small, text_dir, tmp_path, overlap
):
    """torchrun's patience ends while the third state is being written."""
    out = tmp_path / "out"
    slow = slowly(overlap, 600)
    slow = script(tmp_path / "train.py", slow, f"{PATIENCE} = 2.0", "run._QUIET = 0.2")
    args = [*arguments(small, text_dir, out), "--save-minutes", "0"]
    run = shell(args, script=slow, env={"TORCHELASTIC_RUN_ID": "x"})
    until(run, "slow")
    time.sleep(0.5)
    began = time.time()
    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == exits.STOPPED and time.time() - began < 20, errors
    last = said.strip().splitlines()[-1]
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert last == (
        f"stopped after step {done} of stage1, too late to write its state: "
        f"the one after step 2 of stage1 counts, {done - 2} steps are lost; --resume goes on"
    ) or (done == 3 and "1 step is lost" in last), last
    assert states.load_info(states.latest(out / "state"))["total"] == 2
    assert overlap or done == 3, "steps wait"
    resumed = shell([*arguments(small, text_dir, out), "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_stop_with_time_waits_for_a_slow_disk_and_says_so(
    whole, small, text_dir, tmp_path, overlap
):
    out = tmp_path / "out"
    slow = script(tmp_path / "train.py", slowly(overlap, 1.5), "run._QUIET = 0.2")
    run = shell([*arguments(small, text_dir, out), "--save-minutes", "0"], script=slow)
    until(run, "slow")
    run.send_signal(signal.SIGINT)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == exits.STOPPED, errors
    assert "writing the state after step 3 of stage1; if it is not whole: the one after" in said
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert said.strip().splitlines()[-1] == f"stopped after step {done} of stage1; --resume goes on"
    assert states.load_info(states.latest(out / "state"))["total"] == done
    resumed = shell([*arguments(small, text_dir, out), "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


def test_a_stop_before_any_state_is_whole_says_start_again(small, text_dir, tmp_path):
    slow = SLOW.format(600).replace("> 2", "> 0")
    slow = script(tmp_path / "train.py", slow, f"{PATIENCE} = 1.0", "run._QUIET = 0.2")
    args = [*arguments(small, text_dir, tmp_path / "out"), "--save-minutes", "0"]
    run = shell(args, script=slow, env={"TORCHELASTIC_RUN_ID": "x"})
    until(run, "slow")
    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == exits.STOPPED, errors
    assert said.strip().endswith("lost; start again") and "--resume goes on" not in said


def test_a_writer_that_fails_ends_the_run_at_the_next_step(small, text_dir, tmp_path):
    out = tmp_path / "out"
    full = """
def fail(*a):
    if len(written) == 2:
        raise OSError(errno.ENOSPC, "full")
    return pwrite(*a)
def count(*a):
    written.append(0)
    return write(*a)
pwrite, os.pwrite, states.Saver._write = os.pwrite, fail, count
"""
    args = [*arguments(small, text_dir, out), "--save-minutes", "0"]
    run = shell(args, script=script(tmp_path / "train.py", full))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and errors.count("\n") == 1, errors
    assert "cannot write to" in errors and "no space left" in errors and "--resume" in errors
    assert states.load_info(states.latest(out / "state"))["total"] == 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2, "no step was made in vain"
    assert not (out / ".linear-ard.work").exists()


def test_a_stage_that_could_not_be_measured_is_measured_by_the_resumed_run(
    whole, small, text_dir, tmp_path
):
    """Its weights were being written, but are no state without the table's column."""
    out = tmp_path / "out"
    fail = """
from evals.held_out import HeldOut
def fail(*a):
    written.append(0)
    if len(written) == 3:
        raise ValueError("measuring failed")
    return measure(*a)
measure, HeldOut.measure = HeldOut.measure, fail
"""
    args = [*arguments(small, text_dir, out), "--save-minutes", "0"]
    run = shell(args, script=script(tmp_path / "train.py", fail))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "measuring failed" in errors
    assert states.load_info(states.latest(out / "state"))["stage"] == 0
    resumed = shell([*arguments(small, text_dir, out), "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)
    one, two = (json.loads((p / "report.json").read_text())["rows"] for p in (whole, out))
    assert one == two


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "ValueError"])
def test_what_ends_stage_2_at_once_waits_for_the_state_before_it(
    whole, small, text_dir, tmp_path, error
):
    """It is written while stage 2 begins; where memory runs out, the sentence promises it."""
    out = tmp_path / "out"
    fail = (
        SLOW.format(1).replace("> 2", "> 0")
        + f"""
import torch
from engine.step import Step
def fail(self, stage, *a):
    if stage.objective == "next token":
        raise {error}("CUDA out of memory")
    return backward(self, stage, *a)
backward, Step.backward = Step.backward, fail
"""
    )
    args = arguments(small, text_dir, out)
    run = shell(args, script=script(tmp_path / "train.py", fail))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2, errors
    assert error == "ValueError" or errors.endswith(f"{states.GOES_ON}\n"), errors
    assert states.latest(out / "state").name == "step-00000006-measured"
    resumed = shell([*args, "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


BESIDE = """
def beside(*a):
    written.append(0)
    while len(written) == 2 and not {}:  # the state after the last stage
        time.sleep(0.01)
    {}
    return write(*a)
states.Saver._write = beside
"""


def test_the_last_state_is_written_beside_the_export(whole, small, text_dir, tmp_path):
    """Here not before the student is there; the run ends when both are."""
    out = tmp_path / "out"
    late = BESIDE.format(f"os.path.exists({str(out / 'student')!r})", "")
    run = shell(arguments(small, text_dir, out), script=script(tmp_path / "train.py", late))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert states.latest(out / "state").name == "step-00000009-measured"
    same_result(whole, out)


def test_an_export_that_fails_waits_for_the_state_beside_it(whole, small, text_dir, tmp_path):
    out = tmp_path / "out"
    fail = """
from engine import export
failed = []
def fail(*a, **k):
    failed.append(0)
    raise ValueError("the export failed")
export.checkpoint.write_pretrained = fail
"""
    args, late = arguments(small, text_dir, out), BESIDE.format("failed", "time.sleep(1)")
    run = shell(args, script=script(tmp_path / "train.py", fail, late))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "the export failed" in errors, errors
    assert states.latest(out / "state").name == "step-00000009-measured"
    resumed = shell([*args, "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


def test_a_last_state_that_cannot_be_written_is_said_and_student_and_report_are_there(
    whole, small, text_dir, tmp_path
):
    out = tmp_path / "out"
    full = "if len(written) > 1: raise ValueError('cannot write the state')"
    args = arguments(small, text_dir, out)
    run = shell(args, script=script(tmp_path / "train.py", BESIDE.format("True", full)))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and errors.endswith("cannot write the state\n"), errors
    assert f"{out / 'student'} is whole, and the state after its last step not: " in errors
    assert states.latest(out / "state").name == "step-00000006-measured"
    assert (out / "report.json").is_file()
    same_result(whole, out)
    resumed = shell([*args, "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


def test_where_neither_the_only_state_nor_the_export_could_be_written_none_is_promised(
    small, text_dir, tmp_path
):
    out = tmp_path / "out"
    full = """
def full(*a):
    raise OSError(errno.ENOSPC, "full")
states.files.write_at = full
"""
    args = [*arguments(small, text_dir, out), "--stage", "1"]
    run = shell(args, script=script(tmp_path / "train.py", full))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "cannot write to" in errors, errors
    assert errors.endswith(" MiB free)\n") and not (out / "state").exists()


@pytest.mark.parametrize("until_when", ["measured", "the models are written"])
def test_a_state_that_is_written_has_its_name_before_the_export_is_read_back(
    whole, small, text_dir, tmp_path, until_when
):
    """So that a kill in the export costs no step."""
    out = tmp_path / "out"
    wait = """
from engine import export
checkpoint, measure, shards = export.checkpoint, run.Run.measure, export.checkpoint._write_shards
def slow(*a):
    time.sleep(1)
    return a[0](*a[1:])
def late(*a):
    time.sleep(1)
    return write(*a)
def wait(*a, **k):
    print("exporting", flush=True)
    time.sleep(600)
"""
    wait += {
        "measured": "run.Run.measure = lambda *a: slow(measure, *a)\n"
        "checkpoint.write_pretrained = wait\n",
        "the models are written": "states.Saver._write = late\n"
        "checkpoint._write_shards = lambda *a: slow(slow, shards, *a)\n"
        "checkpoint._check_written = wait\n",
    }[until_when]
    killed = shell(arguments(small, text_dir, out), script=script(tmp_path / "train.py", wait))
    until(killed, "exporting")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert states.latest(out / "state").name == "step-00000009-measured"
    resumed = shell([*arguments(small, text_dir, out), "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


def test_curves_that_cannot_be_drawn_cost_no_state(whole, small, text_dir, tmp_path):
    """As where the state that is being written fills the disk."""
    out = tmp_path / "out"
    fail = """
from engine import watch
def fail(*a):
    if written:
        raise OSError(errno.ENOSPC, "full")
    return draw(*a)
def count(*a):
    written.append(0)
    time.sleep(0.5)
    return write(*a)
draw, watch.curves.picture, states.Saver._write = watch.curves.picture, fail, count
"""
    run = shell(arguments(small, text_dir, out), script=script(tmp_path / "train.py", fail))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "cannot write to" in errors, errors
    assert states.latest(out / "state").name == "step-00000006-measured"
    resumed = shell([*arguments(small, text_dir, out), "--resume"])
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same_result(whole, out)


def test_a_damaged_state_does_not_count_as_one_of_the_two_that_stay(tmp_path, capsys):
    """It is later than those that the run writes that went on from the one before it."""
    weights, adam = trained()
    with Folder(tmp_path, "train.py") as out:
        for total in (1, 9):
            save(out, weights, adam, total, World("cpu"))
        with (tmp_path / "state" / "step-00000009" / "rank0.safetensors").open("r+b") as f:
            f.write(b"damage")
        assert states.latest(tmp_path / "state").name == "step-00000001"
        assert "rank0.safetensors is not as it was written" in capsys.readouterr().out
        for total in (2, 3):
            save(out, weights, adam, total, World("cpu"))
    there = [state.name for state in states.found(tmp_path / "state")]
    assert there == ["step-00000003", "step-00000002"]


def test_at_no_moment_is_there_no_state(tmp_path, monkeypatch):
    """The state of a stage's last step, and the one between stages, which has as many steps."""
    weights, adam = trained()
    there, rename = [], Path.rename

    def look(*a):
        rename(*a)
        there.append(states.latest(tmp_path / "state") is not None)

    with Folder(tmp_path, "train.py") as out:
        save(out, weights, adam, 5, World("cpu"))
        monkeypatch.setattr(Path, "rename", look)
        saver = states.Saver(out, World("cpu"), {}, states.Progress(), True)
        saver.start(states.slices(weights, None, saver.world), states.Progress(1, 0, 5))
        saver.finish()
    assert there and all(there)
    assert states.load_info(states.latest(tmp_path / "state"))["stage"] == 1


def test_a_clock_that_is_set_back_keeps_no_state_from_being_written(small, text_dir, tmp_path):
    back = "past = iter(range(10**9, 0, -3600))\ntime.time = lambda: float(next(past))"
    args = [*arguments(small, text_dir, tmp_path / "out"), "--save-minutes", "0"]
    run = shell(args, script=script(tmp_path / "train.py", back))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    names = [state.name for state in states.found(tmp_path / "out" / "state")]
    assert names == ["step-00000009-measured", "step-00000009"], "one of the last step too"
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_folder_that_only_has_the_same_name_is_refused(tmp_path):
    """As on another machine's own disk, where an earlier run left its lock."""
    seen = run.Run(SimpleNamespace(args=SimpleNamespace(out=tmp_path)), World("cpu"))
    for left in (None, "process 7 on there\n"):
        if left:
            (tmp_path / folder.LOCK).write_text(left)
        with pytest.raises(ValueError, match=r"process 0 does not see .* all machines share"):
            seen._refuse_apart("process 7 on here\n")
    (tmp_path / folder.LOCK).write_text("process 7 on here\n")
    seen._refuse_apart("process 7 on here\n")


def test_a_state_of_another_version_is_named(tmp_path, capsys):
    weights, adam = trained()
    with Folder(tmp_path, "train.py") as out:
        save(out, weights, adam, 1, World("cpu"))
    file = tmp_path / "state" / "step-00000001" / "state.json"
    info = json.loads(file.read_text())
    del info["files"]
    file.write_text(json.dumps(info))
    assert states.latest(tmp_path / "state") is None
    assert "state.json has no files, as this version" in capsys.readouterr().out


def test_errors_of_a_thread_are_raised_where_its_result_is_asked_for():
    def fail():
        raise OSError(errno.EIO, "bad")

    with pytest.raises(OSError, match="bad"):
        states.Job(fail).result()
    assert states.Job(lambda a, b: a + b, 1, 2).result() == 3
