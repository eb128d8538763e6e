"""The whole run at a tiny size:

both stages, export, table; repeatable and resumable to the bit; bad input refused.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEACHER, moved_tensors, write_model
from forked import Forked
from matplotlib.figure import Figure
from safetensors.torch import load_file

import train
from engine import cost, curves, exits, models, parallel, plan, resume, states, watch
from engine.lookups import Lookups
from hub import files
from hub.tokenizer import load_tokenizer

STEPS1, STEPS2 = 6, 3
# A limit on the size of a file stands for a full disk
SMALL_DISK = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A teacher with room for look-up documents, so that the table has every row, and whose random
    weights lose by stretching, so that there is something to recover.
    """
    place = tmp_path_factory.mktemp("models") / "small"
    return write_model(place, seed=5, max_position_embeddings=128)


def arguments(small: Path, text_dir: Path, out: Path, *more: str) -> list[str]:
    sizes = [
        "--tokens1",
        str(STEPS1 * 4 * 128),
        "--tokens2",
        str(STEPS2 * 512),
        "--batch1",
        "4",
        "--batch2",
        "1",
    ]
    sizes += ["--lr1", "0.01", "--lr2", "0.003", "--scale", "4", "--eval-blocks", "1"]
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
    return [*places, *sizes, "--device", "cpu", *more]


def shell(args: list[str], new: bool = False, **more) -> subprocess.Popen | Forked:
    """`python train.py args`; new: in an interpreter that has imported nothing, and draws; first:
    what another one runs before.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", **more.pop("env", {}))
    script = more.pop("script", ROOT / "train.py")
    if not new:
        return Forked(script, args, environment, **more)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script), *args], env=environment, **pipes, **more)


def finished(args: list[str]) -> None:
    """A run to its end."""
    run = shell(args)
    _, errors = run.communicate()
    assert run.returncode == 0, errors


def stopped(args: list[str], out: Path) -> str:
    """What a run says that is stopped after its second step."""
    run, log = shell(args), out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate()
    assert run.returncode == exits.STOPPED, errors
    return said


@pytest.fixture(scope="module")
def whole(small, text_dir, tmp_path_factory) -> Path:
    """One uninterrupted run, as a user starts it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run = shell(arguments(small, text_dir, out), new=True)
    said, errors = run.communicate()
    assert run.returncode == 0, errors
    (out.parent / "said.txt").write_text(said)
    return out


def losses(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["total"], r["stage"], r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows]


def same_result(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    a, b = (load_file(p / "student" / "model.safetensors") for p in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_everything_it_promises(whole, small):
    rows = losses(whole)
    assert [r[0] for r in rows] == list(range(STEPS1 + STEPS2))
    assert all(r[5] > 0 for r in rows), "warm-up never starts at 0"
    report = json.loads((whole / "report.json").read_text())
    assert report["columns"] == ["teacher", "untrained", "stage1", "stage2"]
    assert set(report["recovered"]) == {"stage1", "stage2"}
    assert {
        "loss at 1x",
        "loss at 4x",
        "perplexity at 1x",
        "next-token accuracy",
        "recall at 4x",
    } <= set(report["rows"])
    figures = {c: report["rows"]["loss at 1x"][c] for c in report["columns"]}
    share = (figures["untrained"] - figures["stage2"]) / (figures["untrained"] - figures["teacher"])
    assert report["recovered"]["stage2"] == pytest.approx(share)
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((whole / "run.json").read_text())
    assert run["arguments"]["seed"] == 0 and run["versions"]["torch"] == torch.__version__
    said = (whole.parent / "said.txt").read_text()
    assert "lost loss recovered" in said and "python eval.py --model" in said and "linear" in said
    config = json.loads((whole / "student" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512 and config["rope_parameters"]["factor"] == 4.0
    assert (whole / "student" / "tokenizer.json").read_bytes() == (
        small / "tokenizer.json"
    ).read_bytes()
    trained = [k for k, v in load_file(whole / "student" / "model.safetensors").items()
               if not torch.equal(v, load_file(small / "model.safetensors")[k])]  # fmt: skip
    assert len(trained) == 6 and all(
        k.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for k in trained
    )


def test_transformers_loads_the_export_with_the_same_logits(whole):
    import transformers

    from model import Llama

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        whole / "student", dtype=torch.float32
    ).eval()
    ours = Llama.from_pretrained(whole / "student")
    ids = torch.randint(0, 4096, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-4 * expected.std()


def test_same_seed_same_bits(whole, small, text_dir, tmp_path):
    run = shell(arguments(small, text_dir, tmp_path / "again"))
    run.communicate()
    same_result(whole, tmp_path / "again")


def test_stop_and_resume_gives_the_same_bits(whole, small, text_dir, tmp_path):
    out = tmp_path / "stopped"
    said = stopped(arguments(small, text_dir, out), out)
    assert "--resume" in said and states.latest(out / "state")
    finished(arguments(small, text_dir, out, "--resume"))
    same_result(whole, out)


STILL = ("--move-pairs", "--lr1", "1e-30", "--lr2", "1e-30", "--eval-blocks", "0", "--scale", "8")


@pytest.mark.parametrize("biases", [False, True])
def test_a_stopped_and_resumed_run_moves_pairs_once(biases, text_dir, tmp_path):
    """Steps too small to change a bit: the export is the teacher with its pairs moved, so that
    moving them twice, or not, would show.
    """
    shape = {"max_position_embeddings": 128, "attention_bias": biases}
    small, out = write_model(tmp_path / "small", seed=5, **shape), tmp_path / "out"
    said = stopped(arguments(small, text_dir, out, *STILL), out)
    assert "pairs       2 of 4 slots start with another pair" in said
    finished(arguments(small, text_dir, out, "--resume", *STILL))
    ours, expected = load_file(out / "student" / "model.safetensors"), moved_tensors(small)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert json.loads((out / "run.json").read_text())["arguments"]["move_pairs"] is True
    said = refused(arguments(small, text_dir, out, "--resume", *STILL[1:]))
    assert "--move-pairs was True and is False" in said


def test_killed_at_random_moments_and_resumed(whole, small, text_dir, tmp_path):
    """SIGKILL at ten random moments, with the state written after every step, so that some hit the
    writing itself.
    """
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(10):
        begun = ["--resume"] if (out / ".linear-ard.json").exists() else []
        run = shell(arguments(small, text_dir, out, *begun, "--save-minutes", "0"))
        log, seen = out / "metrics.jsonl", rng.randrange(1, 4)
        start = log.read_text().count("\n") if log.exists() else 0
        while run.poll() is None and not (
            log.exists() and log.read_text().count("\n") >= start + seen
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        run.kill()
        run.communicate()
        for state in (out / "state").glob("step-*"):
            assert states.load_info(state)["total"] == int(state.name.split("-")[1])
            load_file(state / "rank0.safetensors")
        if run.returncode == 0:
            break
    last = shell(arguments(small, text_dir, out, "--resume", "--save-minutes", "0"))
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert len(list((out / "state").glob("step-*"))) == 2, "the last two states are kept"
    same_result(whole, out)


def refused(argv: list[str], capsys=None) -> str:
    with pytest.raises((ValueError, SystemExit)) as e:
        train.main(argv)
    if isinstance(e.value, SystemExit):
        assert e.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    return str(e.value)


@pytest.mark.parametrize("losses, warns", [((18, 31, 44, 54, 63), True), ((18, 16, 17), False)])
def test_a_loss_that_rises_is_said_also_where_the_first_steps_did_it(capsys, losses, warns):
    log, stage = object.__new__(watch.Watch), cost.Stage("stage1", "relation", 64, 1, 20, 0.5)
    log.losses = []
    for loss in (*losses, *losses[-1:] * (20 - len(losses))):
        log._warn(loss, stage)
    assert ("lower --lr1 (now 0.5)" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("scale", ["0", "1", "-3", "nan", "inf", "eight"])
def test_a_bad_scale_is_refused(small, text_dir, tmp_path, capsys, scale):
    out = tmp_path / "out"
    said = refused([*arguments(small, text_dir, out), "--scale", scale], capsys)
    assert scale in said and not out.exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--tokens1", "0"], "--tokens1: 0 is not"),
        (["--length1", "100000"], "longer than all the text"),
        (["--data", "/nonexistent"], "does not exist"),
        (["--teacher", "/nonexistent"], "config.json does not exist"),
        (["--length1", "40000000", "--micro", "1", "--batch1", "1"], "lower --length1"),
    ],
)
def test_bad_arguments_are_refused_with_nothing_written(small, text_dir, tmp_path, more, said):
    out = tmp_path / "out"
    assert said in refused([*arguments(small, text_dir, out), *more])
    assert not out.exists()


def test_the_command_ends_with_one_sentence_and_code_2(small, text_dir, tmp_path):
    run = shell(
        [*arguments(small, text_dir, tmp_path / "out"), "--teacher", str(tmp_path)], new=True
    )
    _, errors = run.communicate()
    assert run.returncode == 2 and "Traceback" not in errors
    assert errors.startswith("train.py: ") and errors.count("\n") == 1


def test_another_run_in_out_is_refused(whole, small, text_dir):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert "--resume" in refused(arguments(small, text_dir, whole))
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_resuming_with_another_argument_is_refused_by_name(whole, small, text_dir, tmp_path):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    said = refused([*arguments(small, text_dir, copy), "--resume", "--lr1", "0.02"])
    assert "--lr1 was 0.01 and is 0.02" in said
    said = refused([*arguments(small, text_dir, copy), "--resume", "--native-blocks", "2"])
    assert "--native-blocks was 0 and is 2" in said
    for flag in ("--skips1", "--skips2"):
        said = refused([*arguments(small, text_dir, copy), "--resume", flag, "3"])
        assert f"{flag} was 0 and is 3" in said
    said = refused([*arguments(small, text_dir, copy), "--resume", "--relations", "q"])
    assert "--relations was 'qkv' and is 'q'" in said
    state = states.latest(copy / "state") / "state.json"
    info = json.loads(state.read_text())
    info["depends"]["stage2 native blocks"] = 4  # and that they were dropped is named as well
    info["own checksum"] = states.info_checksum(info)
    state.write_text(json.dumps(info))
    said = refused([*arguments(small, text_dir, copy), "--resume"])
    assert "--native-blocks was 4 and is 0" in said
    info["depends"]["stage2 native blocks"] = 0
    info["own checksum"] = states.info_checksum(info)
    state.write_text(json.dumps(info))
    more = ["--tokens2", "5120", "--lookups", "0.5"]
    said = refused([*arguments(small, text_dir, copy), "--resume", "--dry-run", *more])
    assert "--lookups was 0.0 and is 0.5; the steps of stage2 (--tokens2) was 3 and is 10" in said
    assert f"; give the old values (--tokens2 {STEPS2 * 512}), or start anew" in said


def test_a_resumed_run_asks_the_table_for_the_same_look_ups(whole, small, text_dir):
    """Left out, --eval-blocks is here one block without look-ups; 1 is one with them."""
    args = arguments(small, text_dir, whole, "--resume", "--dry-run")
    at = args.index("--eval-blocks")
    said = refused(args[:at] + args[at + 2 :])
    assert "--eval-blocks was 1 and is None; give the old values, or" in said


def test_what_an_earlier_version_did_not_know_was_off():
    saved, off = {"scale": 4.0}, {"scale": 4.0, "move_pairs": False, "stage2 teacher share": 0.0}
    resume.same_run(saved, off)
    with pytest.raises(ValueError, match=r"--teacher-share was None and is 0\.5; give the old"):
        resume.same_run(saved, off | {"stage2 teacher share": 0.5})


def test_a_dry_run_says_where_a_resumed_run_would_go_on(whole, small, text_dir, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    train.main([*arguments(small, text_dir, whole), "--resume", "--dry-run"])
    assert "--resume: going on between stages, from" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_a_full_disk_is_one_sentence_and_loses_nothing(small, text_dir, tmp_path):
    """The log still fits, the next state does not."""
    out = tmp_path / "out"
    stopped = shell([*arguments(small, text_dir, out), "--save-minutes", "0"])
    while not (out / "state").exists() or states.latest(out / "state") is None:
        time.sleep(0.002)
        assert stopped.poll() is None
    stopped.kill()
    stopped.communicate()
    before = {p: p.read_bytes() for p in (out / "state").glob("step-*/*")}
    more = ("--save-minutes", "0", "--resume")
    run = shell([*arguments(small, text_dir, out), *more], first=SMALL_DISK.format(20_000))
    _, errors = run.communicate()
    assert run.returncode == 2 and errors.count("\n") == 1 and "Traceback" not in errors
    assert "cannot write to" in errors and "MiB free" in errors and "--resume" in errors
    assert {p: p.read_bytes() for p in (out / "state").glob("step-*/*")} == before


def test_a_second_ctrl_c_leaves_at_once(small, text_dir, tmp_path):
    """The first one is asked for while a state is being written, which a pause makes long."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom engine import "
        "states\nwrite = states.Saver._write\n"
        "def slow(*a):\n    print('writing', flush=True)\n    time.sleep(60)\n    return write(*a)\n"
        "states.Saver._write = slow\ntrain.main()\n"
    )
    run = shell(
        [*arguments(small, text_dir, tmp_path / "out"), "--save-minutes", "0"], script=script
    )
    while "writing" not in run.stdout.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None, "the first one waits for the state"
    began = time.time()
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == -signal.SIGINT and time.time() - began < 5


@pytest.fixture
def signals():
    """A run that ends by an exception, in this process, leaves its handlers."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def quick(small, text_dir, tmp_path, *more: str) -> list[str]:
    return [
        *arguments(small, text_dir, tmp_path / "out"),
        "--eval-blocks",
        "0",
        "--save-minutes",
        "0",
        *more,
    ]


def spy(monkeypatch) -> list:
    """The student of the run that follows."""
    made, students = models.make_student, []

    def make(*a, **k):
        students.append(made(*a, **k))
        return students[-1]

    monkeypatch.setattr(models, "make_student", make)
    return students


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_non_finite_loss_names_step_layer_and_blocks(
    small, text_dir, tmp_path, monkeypatch, signals, stage
):
    """Poisoned before the third step: the second layer's values overflow."""
    after = 2

    def poison(stage, step):
        if step + 1 == after:
            students[0].model.layers[1].self_attn.v_proj.weight.data.fill_(3e38)
        return 1e-4

    students = spy(monkeypatch)
    monkeypatch.setattr(train, "learning_rate", poison)
    said = refused(quick(small, text_dir, tmp_path, "--stage", stage))
    blocks = "8..11" if stage == "1" else "2..2"
    assert (
        f"stage{stage}, step 2, layer 1: loss" in said
        and f"on blocks {blocks}" in said
        and f"--lr{stage}" in said
    )
    assert [
        states.load_info(s)["total"] for s in sorted((tmp_path / "out" / "state").iterdir())
    ] == [1, 2]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2, (
        "the bad step is not logged"
    )


def test_a_non_finite_gradient_names_its_weight(small, text_dir, tmp_path, monkeypatch, signals):
    def bad(reducer):
        finish(reducer)
        steps.append(0)
        for l in (0, 1) if len(steps) == 2 else ():
            students[0].model.layers[l].self_attn.k_proj.weight.grad[0, 0] = float("nan")

    steps, finish, students = [], parallel.Reducer.finish, spy(monkeypatch)
    monkeypatch.setattr(parallel.Reducer, "finish", bad)
    said = refused(quick(small, text_dir, tmp_path))
    assert "stage1, step 1, in the gradient of model.layers.1.self_attn.k_proj.weight: loss" in said


@pytest.mark.parametrize("compiling", [False, True], ids=["in a step", "while compiling ahead"])
def test_out_of_memory_names_the_flags_that_help(
    small, text_dir, tmp_path, monkeypatch, signals, compiling
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    if compiling:
        monkeypatch.setattr("engine.run.compile_ahead", lambda plan: states.Job(full))
    else:
        monkeypatch.setitem(train.PLAIN, "relation", full)
    said = refused(quick(small, text_dir, tmp_path))
    assert said.startswith("stage1 ran out of memory on cpu") and "\n" not in said
    assert all(flag in said for flag in ("--length1", "--micro", "--lora-rank", "--shard"))


def test_watching(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for r in rows:
        assert r["tokens_per_second"] > 0 and r["tflops"] > 0 and r["gib"] > 0
        assert 0 < r["mfu"] < 2
    etas = [r["eta_seconds"] for r in rows]
    assert etas[-1] == 0 and etas[0] > 0
    assert all(
        len(r["layers"]) == 2 and set(r["relations"]) == {"Q/Q", "K/K", "V/V"}
        for r in rows[:STEPS1]
    )
    assert all(
        sum(r["layers"]) / 2 + r["next_token_kl"] == pytest.approx(r["loss"]) for r in rows[:STEPS1]
    )
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = (whole.parent / "said.txt").read_text()
    assert "MFU" in said and "ETA" in said and "K/K" in said and said.count("stage1 step") == STEPS1


def test_the_log_says_which_steps_read_look_up_documents(text_dir, tmp_path):
    roomy = write_model(tmp_path / "teacher", max_position_embeddings=256)
    train.main([*arguments(roomy, text_dir, tmp_path / "out"), "--lookups", "0.5"])
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    lookups = Lookups(load_tokenizer(roomy), np.arange(4000))
    for r in rows:
        stage, batch, T = ("1", 4, 256) if r["stage"] == "stage1" else ("2", 1, 1024)
        mine = lookups.mix(
            torch.full((batch, T + 1), -1), 7919 * (stage == "2"), r["step"] * batch, 0.5
        )
        assert r["lookups"] == (mine[:, 0] >= 0).double().mean().item()
    assert 0 < sum(r["lookups"] for r in rows) < len(rows)
    axis = Figure().subplots()
    curves._line(axis, rows, lambda r: r["loss"], "loss", "C0")
    drawn = {line.get_linestyle(): len(line.get_xdata()) for line in axis.lines}
    assert drawn["--"] == sum(r["lookups"] > 0 for r in rows) == len(rows) - drawn.get("-", 0)


def test_tensorboard_without_the_package_is_one_sentence(small, text_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused([*arguments(small, text_dir, tmp_path / "out"), "--tensorboard"])
    assert "pip install tensorboard" in said and not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(small, text_dir, tmp_path, capsys):
    train.main([*arguments(small, text_dir, tmp_path / "out"), "--dry-run"])
    train.main([*arguments(small, text_dir, tmp_path / "out"), "--dry-run", "--peak-tflops", "2"])
    said = capsys.readouterr().out
    assert "stage1" in said and "stage2" in said and "4,096 trained" in said and "MiB" in said
    assert "flop" in said and "measured 1 x" in said and "given 1 x 2 TFLOP/s" in said
    assert not (tmp_path / "out").exists()


def test_too_little_memory_says_how_much_and_which_flag(small, text_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "free_memory", lambda device: 1 << 20)
    said = refused(arguments(small, text_dir, tmp_path / "out"))
    assert "GiB are free" in said and "--length" in said and not (tmp_path / "out").exists()


def test_parameter_count_is_the_models():
    from model import Llama, LlamaConfig

    config = json.loads((TEACHER / "config.json").read_text())
    for change in (
        {},
        {"tie_word_embeddings": False},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
    ):
        c = LlamaConfig.from_hf(config | change)
        with torch.device("meta"):
            model = Llama(c)
        qkv = sum(
            p.numel()
            for n, p in model.named_parameters()
            if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        )
        assert cost.parameters(c) == (sum(p.numel() for p in model.parameters()), qkv)


def test_learning_rate_never_starts_or_ends_at_zero():
    for steps in (1, 2, 20, 1000):
        stage = cost.Stage("stage1", "relation", 8, 1, steps, 1.0)
        rates = [train.learning_rate(stage, s) for s in range(steps)]
        assert min(rates) > 0 and max(rates) <= 1


@pytest.mark.parametrize(
    "more, said",
    [
        (["--rope", "dynamic"], "--stage 2"),
        (["--device", "foo"], "--device foo"),
        (["--eval-blocks", "-1"], "--eval-blocks: -1"),
        (["--lora-dropout", "2"], "--lora-dropout: 2"),
        (["--lr1", "inf"], "--lr1: inf"),
    ],
)
def test_more_bad_arguments(small, text_dir, tmp_path, more, said):
    out = tmp_path / "out"
    assert said in refused([*arguments(small, text_dir, out), *more])
    assert not out.exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (
            ["--rope", "yarn"],
            "--move-pairs is for --rope linear, which slows all pairs alike, and here it is yarn",
        ),
        (["--lora-rank", "4"], "leave out --lora-rank or --move-pairs"),
        (["--preset", "authors"], "leave out --lora-rank or --move-pairs"),
        (["--teacher", "qwen3"], "q_norm and k_norm"),
    ],
)
def test_pairs_are_not_moved_where_that_would_not_be_exact(small, text_dir, tmp_path, more, said):
    if "qwen3" in more:
        more = ["--teacher", str(write_model(tmp_path / "qwen3", model_type="qwen3"))]
    out = tmp_path / "out"
    assert said in refused([*arguments(small, text_dir, out), *more, "--move-pairs"])
    assert not out.exists()


@pytest.mark.parametrize(
    "shape, more, moved",
    [
        ({"model_type": "qwen2"}, (), False),
        ({"model_type": "qwen2"}, ("--move-pairs",), True),
        ({}, (), False),
        ({}, ("--move-pairs",), True),
    ],
)
def test_the_plan_says_that_pairs_are_moved(shape, more, moved, text_dir, tmp_path, capsys):
    teacher = write_model(tmp_path / "teacher", max_position_embeddings=128, **shape)
    train.main(
        [*arguments(teacher, text_dir, tmp_path / "out"), "--scale", "8", "--dry-run", *more]
    )
    assert ("\npairs       2 of 4 slots start with " in capsys.readouterr().out) == moved


def test_an_out_that_is_a_file_or_lies_under_one_is_refused(small, text_dir, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert "is a file" in refused(
            [*arguments(small, text_dir, tmp_path / "out"), "--out", str(out)]
        )
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=str)
def test_frozen_tensors_keep_every_bit_when_the_run_computes_in_bfloat16(
    stored, text_dir, tmp_path, monkeypatch
):
    """The teacher in memory is rounded then; the export must not be, nor the masters' start."""
    from conftest import random_model

    from hub import checkpoint

    checkpoint.save_pretrained(
        random_model(max_position_embeddings=128).to(stored), tmp_path / "t", tokenizer_from=TEACHER
    )
    monkeypatch.setattr(plan, "choose_dtype", lambda *_: (torch.bfloat16, "so"))
    out = tmp_path / "out"
    train.main(
        [
            *arguments(tmp_path / "t", text_dir, out),
            "--eval-blocks",
            "0",
            "--lr1",
            "1e-12",
            "--lr2",
            "1e-12",
        ]
    )
    ours, theirs = (load_file(p / "model.safetensors") for p in (out / "student", tmp_path / "t"))
    for name, value in theirs.items():
        assert ours[name].dtype == stored and torch.equal(ours[name], value), name
    mode = (out / "student" / "model.safetensors").stat().st_mode
    assert mode & 0o044 == 0o044 & files.readable(), (
        "others may read the export, where the umask lets them"
    )
