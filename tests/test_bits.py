"""The same bits twice and after --resume: what a CPU always gives, and a GPU under --deterministic."""

import json
import signal
import time

import pytest
import torch
from conftest import write_model
from safetensors.torch import load_file
from test_train import losses, shell

SIZES = ["--tokens1", "8192", "--tokens2", "8192", "--batch1", "2", "--batch2", "2", "--scale", "4"]
SIZES += ["--length1", "512", "--length2", "1024", "--eval-blocks", "0"]


def arguments(teacher, text_dir, out, *more) -> list[str]:
    places = ["--teacher", str(teacher), "--data", str(text_dir), "--out", str(out)]
    return [*places, *SIZES, "--cache", str(out.parent / "cache"), *more]


def test_the_plan_says_whether_bits_repeat(tmp_path, text_dir):
    teacher = write_model(tmp_path / "teacher", max_position_embeddings=512)
    run = shell(arguments(teacher, text_dir, tmp_path / "out", "--device", "cpu", "--dry-run"))
    assert "bits: the same every run, as always on a CPU" in run.communicate()[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("length2", ["1024", "512"], ids=["text alone", "the teacher's share"])
def test_a_gpu_repeats_its_bits_and_goes_on_to_them(tmp_path, text_dir, length2):
    """Grouped heads of 64 numbers, whose plain attention differs from run to run."""
    teacher = write_model(
        tmp_path / "teacher",
        max_position_embeddings=512,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    more = ["--deterministic", "--length2", length2]
    outs = [tmp_path / name for name in ("one", "two", "stopped")]
    for out in outs[:2]:
        run = shell(arguments(teacher, text_dir, out, *more))
        said, errors = run.communicate()
        assert run.returncode == 0, errors
        assert "fixed order" in said
    stopped = shell(arguments(teacher, text_dir, outs[2], *more))
    log = outs[2] / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.01)
        assert stopped.poll() is None, stopped.communicate()
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate()
    run = shell(arguments(teacher, text_dir, outs[2], *more, "--resume"))
    assert run.communicate() and run.returncode == 0
    first = load_file(outs[0] / "student" / "model.safetensors")
    for other in outs[1:]:
        assert losses(other) == losses(outs[0])
        again = load_file(other / "student" / "model.safetensors")
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert json.loads((outs[0] / "run.json").read_text())["versions"]["device"]
