"""What is promised of a user's files:

nothing foreign is touched, refused means unchanged, resume finds what is best.
"""

import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_model
from safetensors.torch import load_file, save_file
from test_train import SMALL_DISK, refused, same_result, shell

import train
from engine import cost, data, exits, folder, states
from hub import checkpoint, files
from hub.tokenizer import load_tokenizer

SIZES = [
    "--tokens1",
    "1024",
    "--tokens2",
    "768",
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
    "0",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


def arguments(teacher: Path, text: Path, out: Path, *more: str) -> list[str]:
    places = ["--teacher", str(teacher), "--data", str(text), "--out", str(out)]
    return [*places, *SIZES, "--device", "cpu", "--peak-tflops", "0.05", *more]


@pytest.fixture(scope="module")
def finished(teacher, text_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run = shell(arguments(teacher, text_dir, out))
    assert run.communicate() and run.returncode == 0
    return out


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below, by content."""
    found = sorted(path.rglob("*")) if path.exists() else []
    found = [p for p in found if not {folder.LOCK, folder.WORK} & set(p.relative_to(path).parts)]
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in found}


# ---- whose folder it is


def test_a_teacher_inside_out_is_refused_and_survives(teacher, text_dir, tmp_path):
    for name in ("student", "adapter", "deeper/still"):
        shutil.copytree(teacher, tmp_path / "w" / name)
        before = tree(tmp_path / "w")
        said = refused(arguments(tmp_path / "w" / name, text_dir, tmp_path / "w"))
        assert "holds --teacher" in said and tree(tmp_path / "w") == before


def test_a_finished_run_whose_student_is_the_next_teacher_is_refused(finished, text_dir):
    before = tree(finished)
    assert "holds --teacher" in refused(arguments(finished / "student", text_dir, finished))
    assert tree(finished) == before


@pytest.mark.parametrize(
    "name",
    ["student/thesis/ch1.tex", "metrics.jsonl", "curves.png", "state/step-1/mine", "state/.step-x"],
)
def test_files_of_the_users_are_never_touched(teacher, text_dir, tmp_path, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    for more in ([], ["--resume"]):
        said = refused(arguments(teacher, text_dir, out, *more))
        assert name in said and "did not write" in said
    assert tree(out)[name] == b"mine"


@pytest.mark.parametrize(
    "name", ["notes.txt", "student/notes.txt", "state/step-00000001/notes.txt", "state/step-zzz"]
)
def test_a_file_added_to_a_finished_run_stops_what_would_replace_it(
    finished, teacher, text_dir, tmp_path, name
):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("mine")
    said = refused(arguments(teacher, text_dir, copy, "--resume"))
    assert name in said and (copy / name).read_text() == "mine"


def test_a_link_in_out_is_not_followed(teacher, text_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "student").symlink_to(tmp_path / "elsewhere")
    assert "student" in refused(arguments(teacher, text_dir, tmp_path / "out"))
    assert not tree(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", [".lock", ".work/mine"])
def test_a_users_hidden_files_are_not_ours(teacher, text_dir, tmp_path, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    assert f"holds {name}, which" in refused(arguments(teacher, text_dir, out))
    assert tree(out)[name] == b"mine"


@pytest.mark.parametrize("name", folder.OURS)
def test_a_link_under_a_name_of_ours_is_not_followed(teacher, text_dir, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    assert f"holds {name}, which" in refused(arguments(teacher, text_dir, tmp_path / "out"))
    assert not tree(tmp_path / "elsewhere")


def test_two_runs_in_one_folder(teacher, text_dir, tmp_path):
    out = tmp_path / "out"
    with folder.Folder(out, "train.py"):
        said = refused(arguments(teacher, text_dir, out))
        assert f"in use by process {os.getpid()}" in said
        (out / folder.MARK).write_text('{"program": "train.py", "files": []}')
        assert "in use by" in refused(arguments(teacher, text_dir, out, "--resume"))
    with folder.Folder(out, "train.py"):
        pass  # the lock was let go


def test_the_lock_goes_with_the_process(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    script += "from engine import folder\n"
    script += f"f = folder.Folder(Path({str(tmp_path / 'out')!r}), 'train.py').__enter__()\n"
    script += "print('held', flush=True)\n"
    run = subprocess.Popen(
        [sys.executable, "-c", script + "import time; time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert run.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {run.pid}"):
        folder.Folder(tmp_path / "out", "train.py").__enter__()
    (tmp_path / "out" / "state").write_text("what it wrote since its list was read")
    with pytest.raises(ValueError, match=f"in use by process {run.pid}"):
        folder.check(tmp_path / "out", "--out", "train.py", resume=True, apart={})
    (tmp_path / "out" / "state").unlink()
    run.kill()
    run.wait()
    with folder.Folder(tmp_path / "out", "train.py"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named_and_nothing_stays(tmp_path, monkeypatch, code):
    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder.fcntl, "flock", none)
    said = "without locks .* local disk" if code != errno.EIO else "cannot write to .*/a/b"
    with pytest.raises(ValueError, match=said):
        folder.Folder(tmp_path / "a" / "b", "train.py").__enter__()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / folder.LOCK).touch()  # left by a killed run
    (tmp_path / "mine").touch()
    if code != errno.EIO:
        for ask in (
            lambda: folder.check(tmp_path, "--out", "train.py", resume=None, apart={}),
            lambda: folder.Folder(tmp_path, "train.py").__enter__(),
        ):
            with pytest.raises(ValueError, match=r"without locks .* local disk"):
                ask()
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.LOCK, "mine"]


def test_a_run_that_came_and_went_meanwhile_is_not_replaced(
    teacher, text_dir, tmp_path, monkeypatch
):
    """Between the first look at --out and its lock, another run may have begun and ended."""

    def meanwhile(device) -> int:
        with folder.Folder(tmp_path / "out", "train.py") as out:
            out.write("run.json", "the other's")
        return 1 << 34

    monkeypatch.setattr(cost, "free_memory", meanwhile)
    assert "holds another run" in refused(arguments(teacher, text_dir, tmp_path / "out"))
    assert tree(tmp_path / "out")["run.json"] == b"the other's"


def test_what_is_at_work_is_not_cleared(tmp_path):
    """make demo takes an earlier result away: not from under a run."""
    with folder.Folder(tmp_path / "out", "train.py") as out:
        out.write("run.json", "{}")
        before = tree(tmp_path)
        with pytest.raises(ValueError, match="in use by"):
            folder.clear(tmp_path / "out")
        assert tree(tmp_path) == before
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds mine\.txt"):
        folder.clear(tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    folder.clear(tmp_path / "out")
    assert tree(tmp_path) == {}


def test_what_was_measured_is_reported_also_where_the_export_fails(
    teacher, text_dir, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(checkpoint, "write_pretrained", full)
    more = ("--stage", "1", "--tokens1", "512", "--eval-blocks", "1")
    with pytest.raises(OSError, match="No space left"):
        train.main(arguments(teacher, text_dir, tmp_path / "out", *more))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["columns"] == ["teacher", "untrained", "stage1"] and report["seconds"]["all"] > 0
    assert (tmp_path / "out" / "report.png").exists() and (tmp_path / "out" / "report.md").exists()


def test_a_dry_run_on_a_used_folder_prints_the_plan(finished, teacher, text_dir, capsys):
    before = tree(finished)
    train.main(arguments(teacher, text_dir, finished, "--dry-run"))
    assert "stage2" in capsys.readouterr().out and tree(finished) == before


# ---- refused means unchanged


@pytest.mark.parametrize(
    "more, said",
    [
        (["--impl", "triton"], "--impl triton"),
        (["--lookups", "0.5"], "cannot hold"),
        (["--logit-weight", "inf"], "--logit-weight"),
        (["--lora-alpha", "8"], "--lora-rank"),
        (["--relations", "none", "--logit-weight", "0"], "no loss"),
        (["--lora-rank", "4", "--lora-alpha", "nan"], "--lora-alpha"),
        (["--lora-rank", "33"], "--lora-rank is 33"),
        (["--save-minutes", "nan"], "--save-minutes"),
        (["--seed", "18446744073709551615"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--scale", "1e300"], "--scale"),
        (["--tokens1", "9" * 400], "--tokens1"),
        (["--device", "meta"], "--device meta"),
        (["--out", ""], "--out"),
        (["--teacher", ""], "--teacher"),
        (["--data", ""], "--data"),
        (["--device", "hpu"], "--device hpu"),
        (["--scale", "1001"], "up to 1000"),
        (["--batch1", str(1 << 47)], f"--batch1 (now {1 << 47})"),
        (["--length2", "900000"], "longer than all the text"),
    ],
)
def test_what_is_refused_leaves_no_trace(teacher, text_dir, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused([*arguments(teacher, text_dir, tmp_path / "deep" / "out"), *more])
    assert tree(tmp_path) == {}


def test_a_rate_of_next_to_nothing_is_a_long_time(teacher, text_dir, tmp_path, capsys):
    places = arguments(teacher, text_dir, tmp_path / "out")
    train.main([*places, "--peak-tflops", "1e-320", "--dry-run"])
    assert "TFLOP/s about 277777777777h46m" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_said_in_print(teacher, text_dir, tmp_path):
    """The run was over when its last line, which names the text, could not be printed."""
    text = shutil.copytree(text_dir, tmp_path / os.fsdecode(b"caf\xe9"))
    strict = "import sys\nsys.stdout.reconfigure(encoding='utf-8', errors='strict')"
    run = shell(arguments(teacher, text, tmp_path / "out"), first=strict)
    said, errors = run.communicate()
    assert run.returncode == 0, errors
    assert r"caf\udce9" in said.splitlines()[-1]


def test_weights_that_are_not_finite_leave_no_trace(teacher, text_dir, tmp_path):
    bad = Path(shutil.copytree(teacher, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    assert "norm.weight holds NaN" in refused(arguments(bad, text_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_before_any_text_is_read(
    teacher, text_dir, tmp_path, monkeypatch
):
    bad = Path(shutil.copytree(teacher, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, bad / "model.safetensors")
    monkeypatch.setattr(data, "load_corpus", lambda *a, **k: pytest.fail("text was read"))
    assert "missing: model.norm.weight" in refused(arguments(bad, text_dir, tmp_path / "out"))


@pytest.mark.parametrize("name", ["chat_template.jinja", "README.md", "config.json"])
def test_a_file_that_leads_out_is_refused_before_any_text_is_read(
    teacher, text_dir, tmp_path, monkeypatch, name
):
    """An export would copy what it leads to."""
    bad = Path(shutil.copytree(teacher, tmp_path / "bad"))
    if (bad / name).exists():
        (bad / name).rename(tmp_path / name)
    else:
        (tmp_path / name).write_text("a secret")
    (bad / name).symlink_to(tmp_path / name)
    monkeypatch.setattr(data, "load_corpus", lambda *a, **k: pytest.fail("text was read"))
    assert "is a link to" in refused(arguments(bad, text_dir, tmp_path / "out"))


def test_a_full_disk_before_any_state_promises_no_resume(teacher, text_dir, tmp_path):
    run = shell(arguments(teacher, text_dir, tmp_path / "out"), first=SMALL_DISK.format(8000))
    _, errors = run.communicate()
    assert run.returncode == 2 and "cannot write to" in errors and "--resume" not in errors


@pytest.mark.parametrize("place", ["in --out", "new", "there"])
def test_a_disk_that_is_full_while_text_is_kept_is_left_as_it_was(
    teacher, text_dir, tmp_path, place
):
    more = [] if place == "in --out" else ["--cache", str(tmp_path / "deep" / "cache")]
    if place == "there":
        (tmp_path / "deep" / "cache").mkdir(parents=True)
    before = tree(tmp_path)
    run = shell(
        [*arguments(teacher, text_dir, tmp_path / "out"), *more], first=SMALL_DISK.format(8000)
    )
    _, errors = run.communicate()
    assert run.returncode == 2 and "cache: " in errors and errors.count("\n") == 1
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_write_that_fails_anywhere_names_the_folder(tmp_path):
    with (
        pytest.raises(ValueError, match=f"cannot write to {tmp_path / 'out'}: no space left"),
        folder.Folder(tmp_path / "out", "train.py"),
    ):
        raise OSError(errno.ENOSPC, "as a log's print says it, without a name")
    assert tree(tmp_path) == {}


def test_a_file_that_fails_in_a_folder_named_from_here_is_of_that_folder(tmp_path, monkeypatch):
    """tempfile names its files from the root, some since Python 3.12; a user names --out from here."""
    monkeypatch.chdir(tmp_path)
    full = (errno.ENOSPC, "full")
    for name in (str(tmp_path / "out" / "x"), "out/x", None):
        with (
            pytest.raises(ValueError, match="cannot write to out: no space left"),
            files.disk_sentences(Path("out")),
        ):
            raise OSError(*full, name)
    with pytest.raises(OSError, match="full"), files.disk_sentences(Path("out")):
        raise OSError(*full, str(tmp_path / "elsewhere"))


# Root, as whom tests may run, meets permissions as anybody does: without CAP_DAC_OVERRIDE and
# CAP_DAC_READ_SEARCH, bits 1 and 2 of what is effective and of what is permitted (capset(2))
WITHOUT_ROOTS_RIGHTS = """
import ctypes
system, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
assert system.capget(header, rights) == 0
rights[0], rights[1] = rights[0] & ~6, rights[1] & ~6
assert system.capset(header, rights) == 0
"""


@pytest.mark.parametrize(
    "closed, mode, said",
    [
        ("text/sub", 0o444, "cannot use {}/x.txt: permission denied"),
        ("text/sub", 0o000, "cannot read {}: permission denied"),
        ("text/part00.txt", 0o000, "cannot read {}: permission denied"),
        ("teacher/README.md", 0o000, "cannot read {}: permission denied"),
        ("teacher/chat_template.jinja", 0o000, "cannot read {}: permission denied"),
        ("teacher/notes.txt", 0o000, "cannot read {}: permission denied"),
        ("teacher", 0o111, "cannot use {}: permission denied"),
        ("out", 0o000, "cannot use {}/.linear-ard.json: permission denied"),
    ],
)
def test_what_may_not_be_read_is_named_before_anything_is_written(
    teacher, text_dir, tmp_path, closed, mode, said
):
    shutil.copytree(teacher, tmp_path / "teacher")
    shutil.copytree(text_dir, tmp_path / "text")
    (tmp_path / "text" / "sub").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("text/sub/x.txt", "teacher/README.md", "teacher/notes.txt"):
        (tmp_path / name).write_text("words")
    (tmp_path / "teacher" / "chat_template.jinja").write_text("words")
    before = tree(tmp_path)
    (tmp_path / closed).chmod(mode)
    run = shell(
        arguments(tmp_path / "teacher", tmp_path / "text", tmp_path / "out"),
        first=WITHOUT_ROOTS_RIGHTS,
    )
    _, errors = run.communicate()
    (tmp_path / closed).chmod(0o755)
    assert errors == f"train.py: {said.format(tmp_path / closed)}\n" and run.returncode == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.3, 1.5, 2.5, 3.2])
def test_a_stop_at_any_moment_is_one_line(teacher, text_dir, tmp_path, number, seconds):
    out = tmp_path / "out"
    args = [*arguments(teacher, text_dir, out), "--tokens1", "10000000"]
    # The tests themselves may run under nohup
    default = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731
    run = shell(args, new=True, cwd=tmp_path, preexec_fn=default)
    time.sleep(seconds)
    run.send_signal(number)
    said, errors = run.communicate(timeout=60)
    if run.returncode == -number and seconds < 1:
        return  # before the first line of ours
    assert run.returncode == exits.STOPPED, errors
    assert "Traceback" not in errors and errors.count("\n") <= 1
    assert (states.latest(out / "state") is not None) == ("--resume goes on" in said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_the_demo_lets_the_run_at_work_end_its_step(tmp_path, number):
    """As if it took a while to save; a stop reaches it once, whichever way the demo was stopped."""
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, time\nheard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "pathlib.Path('ready').touch()\nwhile not heard: time.sleep(0.01)\n"
        "time.sleep(0.5)\npathlib.Path('saved').write_text(str(len(heard)))\nraise SystemExit(3)\n"
    )
    script = f"import pathlib, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'demo')!r}]\n"
    script += "import demo\ndemo.ROOT = pathlib.Path()\ndemo.exits.run(demo.main, 'demo.py')\n"
    run = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert errors == b"demo.py: stopped; start again\n" and run.returncode == exits.STOPPED
    assert (tmp_path / "saved").read_text() == "1"


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_nohup_keeps_a_run_going_when_the_connection_is_lost(before):
    lines = ["import os, signal, sys", f"sys.path.insert(0, {str(ROOT)!r})"]
    lines += ["from engine import exits", "from engine.resume import StopRequest"]
    lines += ["lost = lambda: os.kill(os.getpid(), signal.SIGHUP)", "def main():"]
    lines += ["    stop = StopRequest(); lost(); heard = bool(stop); stop.close()"]
    lines += ["    print(heard, flush=True); lost()", "exits.run(main, 'train.py')"]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, before),
        capture_output=True,
        text=True,
        check=False,
    )
    ignored = before == signal.SIG_IGN
    assert run.stdout == f"{not ignored}\n"
    assert run.returncode == (0 if ignored else exits.STOPPED), run.stderr


def test_a_stop_that_python_wraps_is_still_a_stop():
    """Until 3.12 what is raised in __set_name__, as when a module is imported, is wrapped."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom engine import exits\n"
    script += "class Asked:\n    def __set_name__(*_): raise KeyboardInterrupt\n"
    script += "def main():\n    class Module: special_tokens = Asked()\n"
    run = subprocess.run(
        [sys.executable, "-c", script + "exits.run(main, 'train.py')"], capture_output=True
    )
    assert run.returncode == exits.STOPPED and run.stderr.count(b"\n") == 1


@pytest.mark.parametrize("while_importing", [True, False])
@pytest.mark.parametrize(
    "error", ["MemoryError", "ImportError('x.so: failed to map segment from shared object')"]
)
def test_memory_that_runs_out_anywhere_is_one_sentence(tmp_path, error, while_importing):
    """Python's own MemoryError has no words, and torch's libraries may find no room."""
    script = tmp_path / "train.py"  # the name by which exits knows its programs
    script.write_text(
        f"from engine import exits\ndef main(): raise {error}\n"
        + ("main()" if while_importing else "exits.run(main, 'train.py')")
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("train.py: memory ran out (")
    assert run.stderr.count("\n") == 1


def test_what_the_system_refuses_is_a_sentence():
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom engine import exits\n"
    script += "exits.run(lambda: open('/nonexistent/x'), 'train.py')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stderr == "train.py: cannot use /nonexistent/x: no such file or directory\n"
    assert run.returncode == 2


def test_a_file_that_memory_has_no_room_to_map(teacher):
    """safetensors' own sentence, in a process that may take no more memory."""
    child = os.fork()
    if not child:
        code = 1
        try:
            file = ROOT / "demo" / "teacher" / "model.safetensors"
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            room = pages * resource.getpagesize() + file.stat().st_size * 3 // 2  # it maps it twice
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            load_file(file)
        except (MemoryError, RuntimeError) as e:
            code = 0 if exits.ran_out(e) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- resume finds the best state there is


def stopped(teacher, text_dir, out: Path) -> None:
    """A run killed after its fourth step, with the states after the third and fourth."""
    run = shell([*arguments(teacher, text_dir, out), "--save-minutes", "0"])
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 4):
        time.sleep(0.005)
        assert run.poll() is None, run.communicate()
    run.kill()
    run.communicate()


@pytest.fixture(scope="module")
def half(teacher, text_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "half"
    stopped(teacher, text_dir, out)
    return out


def newest(out: Path) -> Path:
    return sorted((out / "state").glob("step-*"))[-1]


def damage(state: Path, kind: str) -> None:
    weights = state / "rank0.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif kind == "flipped":
        raw = bytearray(weights.read_bytes())
        raw[-100] ^= 1
        weights.write_bytes(raw)
    elif kind == "empty json":
        (state / "state.json").write_text("{}")
    elif kind == "no json":
        (state / "state.json").unlink()
    elif kind in ("step", "total", "columns"):  # still JSON, still of the right types
        info = json.loads((state / "state.json").read_text())
        info[kind] = {"teacher": {"loss": 0.0}} if kind == "columns" else info[kind] + 1
        (state / "state.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    "kind", ["cut", "flipped", "empty json", "no json", "step", "total", "columns"]
)
def test_a_damaged_newest_state_is_named_and_the_one_before_taken(
    half, finished, teacher, text_dir, tmp_path, kind
):
    out = Path(shutil.copytree(half, tmp_path / "out"))
    damage(newest(out), kind)
    run = shell(arguments(teacher, text_dir, out, "--resume"))
    said, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "is damaged" in said and newest(half).name in said and "model directory" not in said
    same_result(finished, out)


def test_with_no_whole_state_left_nothing_is_begun_anew(half, teacher, text_dir, tmp_path):
    out = Path(shutil.copytree(half, tmp_path / "out"))
    for state in (out / "state").glob("step-*"):
        damage(state, "cut")
    before = tree(out)
    assert "no state in" in refused(arguments(teacher, text_dir, out, "--resume"))
    assert tree(out) == before


def test_a_changed_text_or_teacher_is_named(half, teacher, text_dir, tmp_path):
    text = Path(shutil.copytree(text_dir, tmp_path / "text"))
    file = next(text.iterdir())
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("a", "b", 1))
    os.utime(file, ns=times)
    copy = Path(shutil.copytree(half, tmp_path / "one"))
    before = tree(copy)
    assert "text was" in refused(arguments(teacher, text, copy, "--resume"))
    assert tree(copy) == before, "nor is the changed text kept"

    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "teacher's files was" in refused(arguments(other, text_dir, copy, "--resume"))


def test_a_teacher_and_a_text_that_were_moved_are_the_same(
    half, finished, teacher, text_dir, tmp_path
):
    text = shutil.copytree(text_dir, tmp_path / "text")
    moved = shutil.copytree(teacher, tmp_path / "teacher")
    (moved / "index.json").symlink_to("nowhere")  # nor do links and folders beside the files count
    (moved / "old.json").mkdir()
    out = Path(shutil.copytree(half, tmp_path / "out"))
    run = shell(arguments(moved, text, out, "--resume"))
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    same_result(finished, out)


def test_a_mistyped_out_is_refused(teacher, text_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        assert "leave --resume out" in refused(
            arguments(teacher, text_dir, tmp_path / name, "--resume")
        )
    assert tree(tmp_path) == {"empty": None}


def test_a_run_without_a_table_can_be_resumed(teacher, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words and then some more " * 300)
    out = tmp_path / "out"
    run = shell([*arguments(teacher, text, out), "--eval-blocks", "8", "--length2", "64"])
    said, errors = run.communicate()
    assert run.returncode == 0 and "no table" in said, errors
    again = shell(
        [*arguments(teacher, text, out, "--resume"), "--eval-blocks", "8", "--length2", "64"]
    )
    assert again.communicate() and again.returncode == 0


def test_out_below_data_is_not_read_as_text(teacher, text_dir, tmp_path):
    text = Path(shutil.copytree(text_dir, tmp_path / "text"))
    first = shell(arguments(teacher, text, text / "out"))
    assert first.communicate() and first.returncode == 0
    before = json.loads((text / "out" / "run.json").read_text())["arguments"]["text"]
    again = shell(arguments(teacher, text, text / "out", "--resume"))
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert json.loads((text / "out" / "run.json").read_text())["arguments"]["text"] == before


def test_weights_that_the_update_broke_are_not_saved(teacher, text_dir, tmp_path):
    out = tmp_path / "out"
    run = shell([*arguments(teacher, text_dir, out), "--lr2", "1e308", "--tokens2", "256"])
    _, errors = run.communicate()
    assert run.returncode == 2 and errors.count("\n") == 1
    assert "another --out, with a lower learning rate" in errors, "this --out keeps its rate"
    for state in (out / "state").glob("step-*"):
        assert all(torch.isfinite(t).all() for t in load_file(state / "rank0.safetensors").values())


@pytest.mark.parametrize(
    "more, said",
    [
        (["--logit-weight", "1e308"], "no weight has changed yet"),
        (["--lr1", "1e30"], "another --out, with a lower --lr1"),
    ],
)
def test_numbers_that_are_not_finite_say_what_would_help(teacher, text_dir, tmp_path, more, said):
    assert said in refused([*arguments(teacher, text_dir, tmp_path / "out"), *more])


# ---- the token cache


def test_a_cache_below_the_text_is_no_text(teacher, text_dir, tmp_path):
    text, tokenizer = shutil.copytree(text_dir, tmp_path / "text"), load_tokenizer(teacher)
    first = data.load_corpus([text], tokenizer, text / "cache", quiet=True)
    again = data.load_corpus([text], tokenizer, text / "cache", quiet=True)
    assert first.digest == again.digest
    with pytest.raises(ValueError, match="is a folder of --data"):
        data.load_corpus([text], tokenizer, text, quiet=True)


def test_equal_names_sizes_and_times_do_not_make_texts_equal(teacher, tmp_path):
    streams = []
    for name, word in (("one", "apple "), ("two", "grape ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(word * 500)
        os.utime(tmp_path / name / "a.txt", ns=(10**18, 10**18))
        corpus = data.load_corpus(
            [tmp_path / name], load_tokenizer(teacher), tmp_path / "cache", quiet=True
        )
        streams.append(np.asarray(corpus.train))
    assert not np.array_equal(*streams)


def test_memory_that_a_tensor_leaves_is_kept_for_the_next():
    """In a process of its own, as it holds for the rest of it; of 64 MiB each page is a fault."""
    if platform.libc_ver() < ("glibc", "2.36"):
        pytest.skip("an older glibc, or another C library, keeps less or what it likes")
    code = """if True:
        import resource
        import torch
        from engine.machine import keep_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(8):
                torch.zeros(2**24).add_(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults(), print(faults()), keep_memory(), faults(), print(faults())
        """
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    before, after = map(int, found.stdout.split())
    assert after < 100 < before


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.npy", b""),
        ("train.npy", b"PK\x03\x04" + b"\0" * 50),
        ("train.npy", b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118),
        ("held_out.npy", b"\x93NUMPY"),
        ("sums.json", b"{"),
        ("sums.json", b"[" * 100_000),
        ("train.npy", None),
    ],
)
def test_an_incomplete_cache_is_made_again(teacher, text_dir, tmp_path, name, content):
    tokenizer = load_tokenizer(teacher)
    first = data.load_corpus([text_dir], tokenizer, tmp_path, quiet=True)
    whole = np.asarray(first.train).copy()
    file = next(tmp_path.glob(f"*/{name}"))
    flipped = file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])
    file.write_bytes(flipped if content is None else content)
    again = data.load_corpus([text_dir], tokenizer, tmp_path, quiet=True)
    assert np.array_equal(again.train, whole)


# ---- text that cannot be read


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.jsonl", b'{"text": "\\ud83d"}\n', "half of a surrogate pair"),
        ("x.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
        ("x.npy", b"PK\x03\x04" + b"\0" * 50, "not a plain numpy array"),
        ("x.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': " + b" " * 107, "not a plain numpy array"),
        (
            "x.npy",
            b"\x93NUMPY\x01\x00\x76\x00"
            + b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,)}" % 10**22
            + b" " * 40
            + b"\n",
            "not a plain numpy array",
        ),
        ("x.parquet", b"PAR1", "parquet"),
    ],
)
def test_text_that_cannot_be_read_is_one_sentence(teacher, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        data.load_corpus([tmp_path / name], load_tokenizer(teacher), tmp_path / "cache", quiet=True)
    assert said.lower() in str(e.value).lower() and name in str(e.value)


def test_upper_case_and_gzip_suffixes_and_pipes(teacher, tmp_path):
    import gzip

    (tmp_path / "A.TXT").write_text("one two three " * 50)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four five six " * 50))
    names = [name for name, _ in data.documents(data.find_files([tmp_path]))]
    assert names == ["A.TXT", "b.txt.gz"]
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="pipe"):
        data.find_files([tmp_path / "pipe.txt"])
