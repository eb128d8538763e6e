"""One process and two give the same run:

losses, weights and states to rounding, under gloo on the CPU.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, moved_tensors, write_model
from forked import Forked
from safetensors.torch import load_file

from engine import exits, parallel, states

STEPS1, STEPS2 = 5, 3
ADAPTERS = ("--lora-rank", "4", "--lora-dropout", "0.3", "--micro", "1", "--logit-weight", "0.5")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "small", seed=1, num_hidden_layers=3, hidden_size=48
    )


def start(
    processes: int,
    small: Path,
    text_dir: Path,
    out: Path,
    *more: str,
    script=ROOT / "train.py",
    new: bool = False,
):
    """train.py in so many processes; new: of interpreters that have imported nothing."""
    torchrun = ["--standalone", "--nproc_per_node", str(processes)]
    sizes = [
        "--tokens1",
        str(STEPS1 * 4 * 64),
        "--tokens2",
        str(STEPS2 * 2 * 128),
        "--batch1",
        "4",
        "--batch2",
        "2",
    ]
    sizes += ["--lr1", "0.01", "--lr2", "0.003", "--scale", "2", "--eval-blocks", "1"]
    sizes += ["--dtype", "float32"]  # the bounds below are float32's
    places = [
        "--teacher",
        str(small),
        "--data",
        str(text_dir),
        "--out",
        str(out),
        "--cache",
        str(out.parent / "cache"),
    ]
    args = [*places, *sizes, "--device", "cpu", *more]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if new:
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, str(script), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    if processes == 1:
        return Forked(script, args, environment)
    agent = ROOT / "tests" / "forked_torchrun.py"
    return Forked(agent, [*torchrun, str(script), *args], environment)


def finish(run: subprocess.Popen) -> str:
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return said


@pytest.fixture(scope="module")
def one(small, text_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    finish(start(1, small, text_dir, out, *ADAPTERS))
    return out


@pytest.fixture(scope="module")
def full(small, text_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "full"
    finish(start(1, small, text_dir, out))
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_to_rounding(a: Path, b: Path) -> None:
    """Sums of two halves round otherwise than one sum. Losses keep that near float32's last bits. A
    weight whose gradient nearly cancels may differ more, as Adam divides by the gradient's size: so
    weights are held to 2e-4 of the way that training moved them, in norm, tensor by tensor; frozen
    ones to no difference at all. Why 2e-4: a step moves a weight by lr m / sqrt(v), and rounding
    moves m and v by about 2^-22 of the largest term in them; where the terms cancel to a
    thousandth, that is 2e-4 of a step. The worst seen in any run was 8.7e-5.
    """
    assert [(r["stage"], r["step"], r["lr"]) for r in rows(a)] == [
        (r["stage"], r["step"], r["lr"]) for r in rows(b)
    ]
    for x, y in zip(rows(a), rows(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5) and x["grad_norm"] == pytest.approx(
            y["grad_norm"], rel=1e-4
        )
        assert x.get("layers", []) == pytest.approx(y.get("layers", []), rel=1e-4)
    one, two = (load_file(p / "student" / "model.safetensors") for p in (a, b))
    assert one.keys() == two.keys()
    begun = load_file(
        Path(json.loads((a / "run.json").read_text())["arguments"]["teacher"]) / "model.safetensors"
    )
    for name, w in one.items():
        moved, apart = (w - begun[name]).norm(), (w - two[name]).norm()
        assert apart <= 2e-4 * moved, f"{name}: {apart} apart after moving {moved}"
    reports = [json.loads((p / "report.json").read_text())["rows"]["loss at 1x"] for p in (a, b)]
    assert reports[0] == pytest.approx(reports[1], rel=1e-5)


def test_two_processes_give_the_result_of_one(full, small, text_dir, tmp_path):
    said = finish(start(2, small, text_dir, tmp_path / "two", new=True))
    same_to_rounding(full, tmp_path / "two")
    assert said.count("exported to") == 1 and said.count("parameters") == 1, "rank 0 alone speaks"
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in full.iterdir()
    )


def test_the_noise_of_dropout_does_not_depend_on_the_processes(one, small, text_dir, tmp_path):
    finish(start(2, small, text_dir, tmp_path / "two", *ADAPTERS))
    same_to_rounding(one, tmp_path / "two")


def test_sharded_gives_the_result_of_one(full, small, text_dir, tmp_path):
    finish(start(2, small, text_dir, tmp_path / "two", "--shard"))
    same_to_rounding(full, tmp_path / "two")


def test_sharded_starts_with_moved_pairs(small, text_dir, tmp_path):
    """Steps too small to change a bit: the export is the teacher with its pairs moved."""
    still = (
        "--move-pairs",
        "--scale",
        "8",
        "--lr1",
        "1e-30",
        "--lr2",
        "1e-30",
        "--eval-blocks",
        "0",
    )
    finish(start(2, small, text_dir, tmp_path / "two", "--shard", *still))
    ours = load_file(tmp_path / "two" / "student" / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in moved_tensors(small).items())


def test_sharded_adapters(one, small, text_dir, tmp_path):
    finish(start(2, small, text_dir, tmp_path / "two", "--shard", *ADAPTERS))
    same_to_rounding(one, tmp_path / "two")
    a, b = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (one, tmp_path / "two"))
    assert a.keys() == b.keys()


REDUCE = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from engine import parallel

world = parallel.World("cpu")
for inside in (True, False):
    for bucket in (1, 100, 2**26):
        parallel.Reducer.BUCKET = bucket
        weights = [torch.nn.Parameter(torch.ones(n, 2)) for n in (3, 40, 7, 9)]
        reducer = parallel.Reducer(weights, world, inside)
        for last in (False, True):
            reducer.last = last and inside
            terms = [(i + 1) * (world.rank + 1) * w.sum() for i, w in enumerate(weights)]
            (sum(terms) * reducer.share).backward()
        reducer.finish()
        for i, w in enumerate(weights):  # two micro-batches, ranks 1 and 2 on average
            assert w.grad.shape == w.shape and (w.grad == 2 * (i + 1) * 1.5).all(), (i, w.grad)
        reducer.close()
print("all right")
world.exit(0)
"""


def test_gradients_are_averaged_in_buckets_of_any_size(tmp_path):
    """While the backward makes them and after it; each by itself, a few or all together."""
    script = tmp_path / "reduce.py"
    script.write_text(REDUCE)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    ran = subprocess.run(
        [*launch, str(script), str(ROOT)],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0 and ran.stdout == "all right\n", ran.stderr[-3000:]


@pytest.mark.parametrize("first, then", [((2, "--shard"), (1,)), ((1,), (2, "--shard"))])
def test_resuming_with_another_world(full, small, text_dir, tmp_path, first, then):
    """SIGTERM to torchrun, which passes it on; then the other number of processes goes on from the
    state.
    """
    out = tmp_path / "out"
    run = start(first[0], small, text_dir, out, *first[1:])
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
        assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == (exits.STOPPED if first[0] == 1 else 1), errors
    state = states.latest(out / "state")
    assert state and 0 < states.load_info(state)["total"] < STEPS1 + STEPS2, "stopped half-way"
    finish(start(then[0], small, text_dir, out, "--resume", *then[1:]))
    same_to_rounding(full, out)


def test_sharded_with_recomputation(full, small, text_dir, tmp_path):
    """As if memory were short, so that every layer is computed again in the backward."""
    script = tmp_path / "short.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom engine import fit\nfit.KEEP = 0\n"
        "import train\ntrain.main()\n"
    )
    finish(start(2, small, text_dir, tmp_path / "two", "--shard", script=script))
    same_to_rounding(full, tmp_path / "two")


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["whole", "sharded"])
def test_a_block_over_two_processes_gives_the_result_of_one(full, small, text_dir, tmp_path, more):
    """Four processes: a block for each in stage 1, half a block in stage 2."""
    said = finish(start(4, small, text_dir, tmp_path / "four", *more))
    same_to_rounding(full, tmp_path / "four")
    assert "each block over 2 processes" in said


def test_a_run_interrupted_on_four_processes_goes_on_with_fewer(full, small, text_dir, tmp_path):
    """In the middle of stage 2, whose blocks two processes share; with two and with one."""
    out = tmp_path / "out"
    run = start(4, small, text_dir, out)
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > STEPS1):
        time.sleep(0.01)
        assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    assert states.load_info(states.latest(out / "state"))["total"] > STEPS1
    shutil.copytree(out, tmp_path / "copy")
    for processes, folder in ((1, out), (2, tmp_path / "copy")):
        finish(start(processes, small, text_dir, folder, "--resume"))
        same_to_rounding(full, folder)


def lose_one(run, out) -> str:
    """Kills the third process in stage 2. All others end within a minute, with one sentence; a
    state of stage 2 stays. Returns what was said on standard error.
    """
    total = lambda state: int(state.name.split("-")[1])  # noqa: E731
    while not any(total(state) > STEPS1 for state in states.found(out / "state")):
        time.sleep(0.01)
        assert run.poll() is None, run.communicate()
    listed = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    began = time.time()
    os.kill(int(listed.split()[2]), signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and time.time() - began < 60
    said = [line for line in errors.splitlines() if line.startswith("train.py:")]
    assert len(said) == 1 and "another process" in said[0] and "--resume" in said[0], errors
    assert states.load_info(states.latest(out / "state"))["total"] > STEPS1
    return errors


def test_a_lost_process_ends_all_others_with_one_sentence(small, text_dir, tmp_path):
    """Killed in stage 2, whose blocks two processes share; the states stay."""
    out = tmp_path / "out"
    run = start(4, small, text_dir, out, "--tokens2", "200000", "--save-minutes", "0")
    errors = lose_one(run, out)
    assert "[rank" not in errors


STUCK = """
import ctypes, signal, sys
sys.path.insert(0, ROOT)
from engine import exits, run
exits.GRACE = 2.0
lost = run.lost

def waits(error):  # gloo saw that a process is gone; NCCL's kernels go on
    if lost(error):
        signal.pthread_sigmask(signal.SIG_BLOCK, exits.SIGNALS)
        while True:
            ctypes.CDLL(None).pause()  # no Python runs in this thread any more
    return False

run.lost = waits
import train
exits.run(train.main, "train.py")
"""


def test_a_lost_process_ends_those_that_wait_for_their_gpu(small, text_dir, tmp_path):
    """As NCCL would have them wait, in the middle of an all-to-all: one sentence, the state kept."""
    out, script = tmp_path / "out", tmp_path / "train.py"
    script.write_text(STUCK.replace("ROOT", repr(str(ROOT))))
    long = ["--tokens2", "200000", "--save-minutes", "0"]
    run = start(4, small, text_dir, out, *long, script=script)
    lose_one(run, out)


ELSEWHERE = """
import ctypes, os, pathlib, signal, sys, time
sys.path.insert(0, ROOT)
import torch.distributed as dist
from engine import exits, run
import train
exits.GRACE = 1.0
first = pathlib.Path(__file__).with_name("first")
join = dist.init_process_group

def lose(f, *a, **k):  # the second process; the first waits for it in f
    if os.environ["RANK"] == "0":
        first.touch()
        f(*a, **k)
    while not first.exists():
        time.sleep(0.01)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)

def gpu(*a):  # no Python runs in this thread any more
    signal.pthread_sigmask(signal.SIG_BLOCK, exits.SIGNALS)
    while True:
        ctypes.CDLL(None).pause()

def store(*a):  # as NCCL does for its first exchange; no other thread can ask the store
    dist.distributed_c10d._get_default_store().get("never")

def exchange(*a):
    dist.barrier()

PLACE = lambda *a, **k: lose(WAITS, *a, **k)
exits.run(train.main, "train.py")
"""
NONE_YET = "; no state was saved yet, so start again"


@pytest.mark.parametrize(
    "place, waits, kept",
    [
        ("dist.init_process_group", "join", f"; {exits.IF_SAVED}"),
        ("run.Run.measure", "gpu", NONE_YET),
        ("run.Run.measure", "exchange", NONE_YET),
        ("run.Run.end_stage", "store", states.GOES_ON),
        ("run.Run.end_stage", "exchange", states.GOES_ON),
        ("train.export", "gpu", states.GOES_ON),
    ],
)
def test_a_process_lost_outside_steps_ends_the_others_and_says_what_is_kept(
    small, text_dir, tmp_path, place, waits, kept
):
    """While they meet, before the first step, between stages and after the last."""
    script, out = tmp_path / "train.py", tmp_path / "out"
    code = ELSEWHERE.replace("ROOT", repr(str(ROOT)))
    script.write_text(code.replace("PLACE", place).replace("WAITS", waits))
    run = start(2, small, text_dir, out, "--save-minutes", "0", script=script)
    _, errors = run.communicate(timeout=120)
    said = [line for line in errors.splitlines() if line.startswith("train.py:")]
    assert run.returncode == 1 and len(said) == 1, errors
    assert said[0].startswith("train.py: another process of this run has ended"), said
    assert said[0].endswith(kept), said
    assert bool(states.found(out / "state")) == (kept == states.GOES_ON)


HEARS = """
import ctypes, os, signal, sys
sys.path.insert(0, ROOT)
from engine import exits, parallel
for number in exits.SIGNALS:
    signal.signal(number, lambda *_: None)
world = parallel.World("cpu")
assert world.peers.left() == exits.GRACE
signal.pthread_sigmask(signal.SIG_BLOCK, exits.SIGNALS)  # so that another thread gets it
os.kill(os.getpid(), signal.SIGTERM)
ctypes.CDLL(None).sleep(2)  # as in a backward: no handler runs
assert exits.GRACE - 10 < world.peers.left() < exits.GRACE - 1.9, world.peers.left()
"""


def test_torchruns_patience_counts_from_the_signal_and_not_from_the_handler(tmp_path):
    command = [sys.executable, "-c", HEARS.replace("ROOT", repr(str(ROOT)))]
    given = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    ran = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_two_processes_refuse_is_one_sentence(small, text_dir, tmp_path):
    run = start(2, small, text_dir, tmp_path / "out", "--batch1", "3", new=True)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and not (tmp_path / "out").exists()
    said = [line for line in errors.splitlines() if line.startswith("train.py:")]
    sentence = "train.py: --batch1 is 3 and there are 2 processes; it must be a multiple of that"
    assert said == [sentence]
    assert "[rank" not in errors, "no rank but the first says anything"
    # the last lines of torchrun's own report, which nobody can keep it from printing
    assert "NO_OTHER_FAILURES" in errors and sentence in errors.splitlines()[-2]


@pytest.mark.parametrize("when", ["at work", "while modules are imported"])
def test_of_all_stopped_processes_the_first_speaks(tmp_path, when):
    """torchrun ends a slow rank with SIGTERM when another has refused: that is no news."""
    stop = "os.kill(os.getpid(), signal.SIGTERM), signal.pause()"
    if when == "at work":
        stop = f"exits.run(lambda: ({stop}), 'train.py')"
    script = tmp_path / "train.py"  # the name by which exits knows its programs
    script.write_text(f"import os, signal\nfrom engine import exits\n{stop}\n")
    left = {"RANK": "1"}  # by something else, as there is no WORLD_SIZE: one process, which speaks
    first, second = ({"RANK": rank, "WORLD_SIZE": "2"} for rank in "01")
    ends = ((first, exits.STOPPED, 1), (second, 0, 0), (left, exits.STOPPED, 1))
    for given, code, lines in ends:
        env = os.environ | given | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
        assert ended.returncode == code and ended.stderr.count("\n") == lines, ended.stderr


def test_shard_alone_is_refused(small, text_dir, tmp_path):
    run = start(1, small, text_dir, tmp_path / "out", "--shard")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2 and "torchrun" in errors and errors.count("\n") == 1


def test_a_wrong_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK is 'first'"):
        parallel.World("cpu")


@pytest.mark.parametrize(
    "given, said",
    [
        ({"RANK": "1"}, "RANK is 1 of 1 processes"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of 2 processes"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 of 0 processes"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "no port"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "PORT is 'x'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9999"),
        ({"RANK": ""}, "RANK is ''"),
    ],
)
def test_half_of_a_torchrun_is_refused(monkeypatch, given, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said) as e:
        parallel.World("cpu")
    assert str(e.value).endswith("start several processes with torchrun, or unset it")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "3"},
        {"MASTER_ADDR": "nowhere"},
        {"MASTER_ADDR": "nowhere", "MASTER_PORT": "29500", "LOCAL_RANK": "1"},
    ],
)
def test_what_names_no_other_process_leaves_one(monkeypatch, given):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    world = parallel.World("cpu")
    assert world.main and (world.rank, world.size) == (0, 1)


def test_a_meeting_place_that_is_taken_is_a_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        for name, value in (given | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="2 processes cannot meet at localhost"):
            parallel.World("cpu")
