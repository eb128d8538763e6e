"""Fifty SIGKILLs at random moments, also while text is tokenised, states are written and the result exported.

Each attempt is forked from this process, in which everything is imported: a run takes a second, so that kills fall into
all of it. A run that gets through is compared, bit for bit, with one that was never killed.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import write_model
from test_train import same_result

import train
from engine import curves, folder, states
from evals import pictures

KILLS = 50
SIZES = [
    "--tokens1",
    "1024",
    "--tokens2",
    "512",
    "--batch1",
    "2",
    "--batch2",
    "1",
    "--lr1",
    "0.01",
    "--lr2",
    "0.003",
    "--scale",
    "4",
    "--eval-blocks",
    "1",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


def fork(teacher: Path, text: Path, out: Path) -> int:
    """The process number of a run in `out`, begun or resumed, with a state after every step."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(out.parent / f"{out.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        # Drawing takes three quarters of a run this short; a picture is written like any other file
        curves.picture = pictures.bars = lambda *_: bytes(100_000)
        argv = ["--teacher", str(teacher), "--data", str(text), "--out", str(out), *SIZES]
        argv += [
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--save-minutes",
            "0",
            "--peak-tflops",
            "1",
        ]
        train.main([*argv, "--resume"] if (out / folder.MARK).exists() else argv)
        code = 0
    finally:
        os._exit(code)


def finished(child: int, seconds: float) -> int | None:
    """Its exit code if it ended within `seconds`, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def test_fifty_kills(teacher, text_dir, tmp_path):
    began = time.monotonic()
    child = fork(teacher, text_dir, tmp_path / "whole")
    assert finished(child, 120) == 0, (tmp_path / "whole.log").read_text()
    whole, rng, kills, runs = time.monotonic() - began, random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"run{runs}"
        child = fork(teacher, text_dir, out)
        # several kills a run on average: a resumed run has less left to do
        code = finished(child, rng.random() * 0.6 * whole)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            named = states.found(out / "state")
            assert states.latest(out / "state") == (named[0] if named else None), (
                "whole or not there"
            )
        else:
            assert code == 0, out.with_name(f"{out.name}.log").read_text()
            same_result(tmp_path / "whole", out)
            runs += 1
    assert finished(fork(teacher, text_dir, out), 120) == 0, "the last one can be resumed too"
    same_result(tmp_path / "whole", out)
