"""A head start changes when an export is written, and not its bytes; it gives way to all else."""

import errno
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import TEACHER, write_model
from safetensors.torch import load_file, save_file
from test_states import script, until
from test_train import SMALL_DISK, arguments, finished, same_result, shell

from engine import exits, folder, head_start, states
from engine.head_start import HeadStart, how
from hub import checkpoint, shards
from model import TRAINED, Llama, make_student


@pytest.fixture(params=[10**9, 200_000], ids=["one file", "shards"])
def teacher(request, tmp_path, monkeypatch) -> Path:
    split = shards.split_torch_state_dict_into_shards
    few = lambda like, **_: split(like, max_shard_size=request.param)  # noqa: E731
    monkeypatch.setattr(shards, "split_torch_state_dict_into_shards", few)
    monkeypatch.setattr(head_start, "PIECE", 1000)  # tensors of several pieces
    return write_model(tmp_path / "teacher", tie_word_embeddings=False, attention_bias=True)


@pytest.fixture
def student(teacher) -> Llama:
    """Trained, and computing in bfloat16 what is stored in float32."""
    rounded = Llama.from_pretrained(teacher, dtype=torch.bfloat16)
    student = make_student(rounded, rounded.config.extended("yarn", 8))
    for p in student.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    return student


@pytest.fixture
def out(tmp_path) -> folder.Folder:
    with folder.Folder(tmp_path / "out", "train.py") as out:
        yield out


def finish(out, student, teacher, ahead) -> Path:
    work, written = ahead.take()
    more = {"tokenizer_from": TEACHER, "card": "a card", **how(teacher)}
    checkpoint.write_pretrained(student, work, written=written, **more)
    out.publish(work, "student")
    return out.path / "student"


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("pieces", [1, 7, 700, None])
def test_what_is_written_early_has_the_bytes_of_what_is_written_late(
    out, student, teacher, monkeypatch, pieces
):
    """Stopped after so many pieces, or never."""
    early, write, calls = HeadStart(out), shards.Shards.write, []

    def counted(self, *a):
        calls.append(0)
        if len(calls) == pieces:
            early.asked.set()
        write(self, *a)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", counted)
        early.begin(teacher, student.config)
        early.job.result()
    late = contents(finish(out, student, teacher, HeadStart(out)))
    frozen = {n for n, p in student.named_parameters() if n.split(".")[-2] not in TRAINED}
    assert early.written == frozen if pieces is None else early.written < frozen
    assert contents(finish(out, student, teacher, early)) == late


def test_nothing_but_what_is_trained_is_written_at_the_end(out, student, teacher, monkeypatch):
    early, write, names = HeadStart(out), shards.Shards.write, []
    early.begin(teacher, student.config)
    early.job.result()
    note = lambda self, name, *a: names.append(name) or write(self, name, *a)  # noqa: E731
    monkeypatch.setattr(shards.Shards, "write", note)
    finish(out, student, teacher, early)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == set(names)
    assert len(names) == len(set(names))


def test_what_the_model_holds_as_it_is_stored_is_not_read_from_the_teacher_again(
    out, teacher, monkeypatch
):
    exact = Llama.from_pretrained(teacher)
    student = make_student(exact, exact.config.extended("yarn", 8))
    early, laid_out, read = HeadStart(out), checkpoint.laid_out, []
    early.begin(teacher, student.config)
    early.job.result()

    class Seen(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    def seen(*a, **k):
        like, stored = laid_out(*a, **k)
        kinds = {name: t.dtype for name, t in stored.items()}
        assert all(like[name].dtype == kind for name, kind in kinds.items())
        return like, Seen(stored)

    monkeypatch.setattr(checkpoint, "laid_out", seen)
    path = finish(out, student, teacher, early)
    assert not read
    found = dict(Llama.from_pretrained(path).named_parameters())
    assert all(torch.equal(p, found[n]) for n, p in student.named_parameters())


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "by another file"])
@pytest.mark.parametrize("of", ["the first", "the altered"])
def test_a_teacher_that_changes_after_it_was_written_is_caught(out, student, teacher, replaced, of):
    early = HeadStart(out)
    early.begin(teacher, student.config)
    early.job.result()
    name = "model.layers.1.mlp.up_proj.weight"
    file = checkpoint.find_tensors(teacher)[name][0]
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors[name][3, 5] += 1
    new = file.with_name("new")
    save_file(tensors, new, metadata={"format": "pt"})
    if replaced:
        new.replace(file)
    else:
        file.write_bytes(new.read_bytes())
        new.unlink()
    if of == "the altered":  # as with --bits 4, where what is exported is read at the end
        student = make_student(Llama.from_pretrained(teacher), student.config)
    said = f"{name} is not what" if of == "the first" else f"does not hold {name}"
    with pytest.raises(RuntimeError, match=said):
        finish(out, student, teacher, early)
    assert not (out.path / "student").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_leaves_all_to_the_end(out, student, teacher, monkeypatch, code):
    late = contents(finish(out, student, teacher, HeadStart(out)))
    pwrite, calls = os.pwrite, []

    def full(*a):
        calls.append(0)
        if len(calls) > 9:
            raise OSError(code, os.strerror(code))
        return pwrite(*a)

    early = HeadStart(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        early.begin(teacher, student.config)
        early.job.result()
    assert not early.written and list(out.work().iterdir()) == [], "its bytes are free again"
    assert contents(finish(out, student, teacher, early)) == late


def test_a_disk_with_less_room_than_an_export_takes_is_left_to_others(
    out, student, teacher, monkeypatch
):
    usage = namedtuple("usage", "free")
    export = sum(f.stat().st_size for f in teacher.glob("*.safetensors"))
    free, early = iter(range(2 * export, 0, -(export // 10))), HeadStart(out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(next(free)))
        early.begin(teacher, student.config)
        early.job.result()
    assert not early.written and list(out.work().iterdir()) == []
    finish(out, student, teacher, early)


def test_giving_up_frees_the_disk_and_says_whether_it_had_begun(out, student, teacher):
    early = HeadStart(out)
    assert not early.give_up()
    early = HeadStart(out)
    early.begin(teacher, student.config)
    assert early.give_up() and list(out.work().iterdir()) == []
    assert not early.give_up(), "there is nothing more to give"
    finish(out, student, teacher, early)


# ---- runs


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models") / "small"
    return write_model(place, seed=5, max_position_embeddings=128)


@pytest.fixture(scope="module")
def whole(small, text_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished(arguments(small, text_dir, out))
    return out


SLOW = """
from engine import head_start
from hub import shards
head_start.PIECE, real = 10_000, shards.Shards.write
def slow(self, name, data, at=0):
    if sys._getframe(1).f_code.co_name == "_write_all":
        print("ahead", flush=True)
        {}
    real(self, name, data, at)
shards.Shards.write = slow
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_does_not_wait_for_it_and_leaves_nothing_of_it(
    whole,
    small,
    text_dir,
    tmp_path,
    number,
):
    out = tmp_path / "out"
    slow = script(tmp_path / "train.py", SLOW.format("time.sleep(0.5)"))  # of 160 pieces
    run = shell(arguments(small, text_dir, out), script=slow)
    until(run, "ahead")
    began = time.monotonic()
    run.send_signal(number)
    said, errors = run.communicate(timeout=60)
    # The last step may be over; then a run ends as if nobody had asked
    assert run.returncode in (exits.STOPPED, 0) and time.monotonic() - began < 20, errors
    assert not (out / folder.WORK).exists()
    if run.returncode:
        assert "stopped after step" in said and not (out / "student").exists()
        resumed = shell([*arguments(small, text_dir, out), "--resume"])
        _, errors = resumed.communicate()
        assert resumed.returncode == 0, errors
    same_result(whole, out)


FULL = """raise OSError(errno.ENOSPC, "full")"""


def test_a_disk_that_is_full_for_it_alone_is_not_said(whole, small, text_dir, tmp_path):
    out = tmp_path / "out"
    run = shell(
        arguments(small, text_dir, out), script=script(tmp_path / "x.py", SLOW.format(FULL))
    )
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and "ahead" in said and "cannot write" not in errors + said
    same_result(whole, out)


def test_a_disk_that_stays_full_is_said_at_the_end(small, text_dir, tmp_path):
    out = tmp_path / "out"
    full = SLOW.format(FULL) + "def slow(*a):\n    raise OSError(errno.ENOSPC, 'full')\n"
    full += "shards.Shards.write = slow\n"
    run = shell(arguments(small, text_dir, out), script=script(tmp_path / "x.py", full))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and errors.count("\n") == 1, errors
    assert "cannot write to" in errors and errors.endswith(f"MiB free){states.GOES_ON}\n")
    assert states.latest(out / "state").name == "step-00000009-measured"
    resumed = shell([*arguments(small, text_dir, out), "--resume"])
    assert resumed.communicate() and resumed.returncode == 0


def test_a_disk_that_is_full_while_the_tokenizer_is_copied_is_said(small, text_dir, tmp_path):
    """The first large file of an export that is not there already."""
    limit, out = 100_000, tmp_path / "out"
    assert (small / "tokenizer.json").stat().st_size > limit
    run = shell(arguments(small, text_dir, out), first=SMALL_DISK.format(limit))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and errors.count("\n") == 1, errors
    assert f"cannot write to {out}: " in errors and errors.endswith(f"{states.GOES_ON}\n")


def test_a_state_that_finds_no_room_takes_that_of_the_head_start(
    whole,
    small,
    text_dir,
    tmp_path,
):
    """As under a quota, of which the disk says nothing."""
    out = tmp_path / "out"
    full = """
import glob
def full(self, *a):
    if glob.glob(f"{self.out.path}/.linear-ard.work/*/model.safetensors"):
        print("full", flush=True)
        raise ValueError("full")
    return write(self, *a)
states.Saver._write = full
"""
    args = [*arguments(small, text_dir, out), "--save-minutes", "0"]
    run = shell(args, script=script(tmp_path / "train.py", full))
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and said.count("full") == 1, (said, errors)
    same_result(whole, out)


def test_where_it_gave_way_the_last_state_is_whole_before_the_export(
    whole, small, text_dir, tmp_path
):
    """The disk may not hold both and the state that the last one replaces."""
    out = tmp_path / "out"
    look = f"""
from engine import export
def look(*a, **k):
    print("there:", sorted(os.listdir({str(out / "state")!r})), flush=True)
    return write_pretrained(*a, **k)
write_pretrained = export.checkpoint.write_pretrained
export.checkpoint.write_pretrained = look
def late(*a):
    time.sleep(1)
    return write(*a)
states.Saver._write = late
"""
    run = shell(
        arguments(small, text_dir, out),
        script=script(tmp_path / "train.py", SLOW.format(FULL), look),
    )
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and "'step-00000009-measured']" in said, (said, errors)
    same_result(whole, out)


def test_a_run_with_no_step_left_exports(whole, small, text_dir, tmp_path):
    out = tmp_path / "out"
    run = shell([*arguments(small, text_dir, out), "--save-minutes", "0"])
    assert run.communicate() and run.returncode == 0
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "state" / "step-00000009-measured")
    run = shell([*arguments(small, text_dir, out), "--resume"])
    said, errors = run.communicate()
    assert run.returncode == 0 and "going on after step 3 of stage2" in said, errors
    same_result(whole, out)
