"""A run's figures on TensorBoard and Weights & Biases: what is written, by stubs of both packages."""

import importlib.util
import json
import sys
import types

import pytest
from conftest import write_model
from test_train import arguments, refused

import train
from engine import flags
from engine.boards import Boards


class Run:
    def __init__(self, **given):
        self.given, self.rows, self.finished = given, [], 0

    def log(self, figures, step):
        self.rows.append((step, figures))

    def finish(self):
        self.finished += 1


class Writer:
    def __init__(self, folder):
        self.folder, self.rows, self.ended = folder, [], []

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def flush(self):
        self.ended.append("flush")

    def close(self):
        self.ended.append("close")


@pytest.fixture
def stubs(monkeypatch):
    """(runs, writers) that the two packages were asked for."""
    runs, writers = [], []

    class Error(Exception):
        pass

    def init(**given):
        if given["project"] == "closed":
            raise Error("api_key not configured\n(no-tty)")
        runs.append(Run(**given))
        return runs[-1]

    wandb, board = types.ModuleType("wandb"), types.ModuleType("tensorboard")
    wandb.init, wandb.Error = init, Error
    board.SummaryWriter = lambda folder: writers.append(Writer(folder)) or writers[-1]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return runs, writers


def test_both_boards_get_the_same_figures(tmp_path, stubs):
    boards = Boards(tmp_path, tensorboard=True, project="mine", about={"scale": 8})
    boards.write("stage1", 3, 3, {"loss": 0.5, "Q/Q": 0.25})
    boards.write("stage2", 0, 7, {"loss": 2.0})
    boards.flush()
    boards.close()
    ((run,), (writer,)) = stubs
    assert run.rows == [(3, {"stage1/loss": 0.5, "stage1/Q/Q": 0.25}), (7, {"stage2/loss": 2.0})]
    assert writer.rows == [
        ("stage1/loss", 0.5, 3),
        ("stage1/Q/Q", 0.25, 3),
        ("stage2/loss", 2.0, 0),
    ]
    assert run.finished == 1 and writer.ended == ["flush", "close"]
    assert run.given["project"] == "mine" and run.given["config"] == {"scale": 8}
    assert run.given["dir"] == str(tmp_path) and writer.folder == tmp_path / "tensorboard"
    again = Boards(tmp_path, project="mine")
    assert again.run.given["id"] == run.given["id"] and run.given["resume"] == "allow"


def test_no_board_is_well_too(tmp_path, stubs):
    boards = Boards(tmp_path)
    boards.write("stage1", 0, 0, {"loss": 1.0})
    boards.flush()
    boards.close()
    assert stubs == ([], []) and list(tmp_path.iterdir()) == []


def test_a_run_writes_what_its_log_has(text_dir, tmp_path, stubs, monkeypatch):
    monkeypatch.setattr(flags, "require", lambda package, flag: None)
    teacher, out = write_model(tmp_path / "teacher"), tmp_path / "out"
    train.main([*arguments(teacher, text_dir, out), "--wandb", "mine", "--tensorboard"])
    ((run,), (writer,)) = stubs
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in run.rows] == [row["total"] for row in rows]
    for (_, figures), row in zip(run.rows, rows, strict=True):
        assert figures[f"{row['stage']}/loss"] == row["loss"]
        assert (f"{row['stage']}/Q/Q" in figures) == ("relations" in row)
    assert {(n, v) for n, v, _ in writer.rows} == {i for _, f in run.rows for i in f.items()}
    assert (
        run.given["config"]["scale"]
        == json.loads((out / "run.json").read_text())["arguments"]["scale"]
    )


@pytest.mark.parametrize(
    "given, said",
    [
        (["--wandb", "mine"], "--wandb needs the package: pip install wandb"),
        (["--wandb", " "], "--wandb is empty; name a project"),
    ],
)
def test_wandb_without_the_package_or_a_project(text_dir, tmp_path, monkeypatch, given, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    teacher = write_model(tmp_path / "teacher")
    assert said in refused([*arguments(teacher, text_dir, tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()


def test_what_wandb_says_against_it_is_one_sentence(tmp_path, stubs):
    with pytest.raises(
        ValueError, match=r"api_key not configured .no-tty.; `wandb login`, set"
    ) as e:
        Boards(tmp_path, project="closed")
    assert "\n" not in str(e.value)
