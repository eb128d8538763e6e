"""Processes that begin with everything imported: what a test needs of `python train.py`, without the three
seconds that every new process spends on importing torch.

How.  `Forked(script, args)` asks a server, one for each process that runs tests, which is started at the first
call and has imported other people's modules and none of ours. The server forks; the new process runs the script as
`python script` would, with its own arguments, environment and folder, and ends as any interpreter does. A second
fork stays between the two, waits and tells the exit code. Forked has what tests use of subprocess.Popen.

Under `torchrun` (forked_torchrun.py) the server's process is torchrun's own agent, and its ranks are forks of it.

Pictures are not drawn: that would be most of what is left of so short a run. Zeros are written in their place.

Limits.  All share one hash seed, and nothing that happens during an import can be seen. Tests of that, and one
whole run, start real processes (`shell(..., new=True)`).
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

HEAVY = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run"]
HEAVY += ["torch.distributed.tensor", "torch.utils._triton", "torch.utils.checkpoint"]
HEAVY += ["matplotlib.figure", "matplotlib.backends.backend_agg", "numpy", "safetensors.torch"]
HEAVY += ["tiktoken", "tokenizers", "tqdm"]


class Forked:
    """A running script, as subprocess.Popen(..., stdout=PIPE, stderr=PIPE, text=True) is one."""

    def __init__(self, script: Path, args: list[str], env: dict[str, str], cwd=".", first=""):
        """first: Python that the process runs before the script."""
        ends = [os.pipe() for _ in range(3)]
        request = {"script": str(script), "args": args, "env": env, "first": first}
        request["cwd"] = os.path.abspath(cwd)
        socket.send_fds(server(), [json.dumps(request).encode()], [write for _, write in ends])
        for _, write in ends:
            os.close(write)
        self.stdout, self.stderr, self._status = (open(read) for read, _ in ends)
        self.pid, self.returncode = int(self._status.readline()), None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        said, end = {}, time.monotonic() + (timeout or 1e6)

        def read(stream) -> None:
            said[stream] = stream.read()

        readers = [threading.Thread(target=read, args=[s]) for s in (self.stdout, self.stderr)]
        for thread in readers:
            thread.daemon = True
            thread.start()
        for thread in readers:
            thread.join(max(0.0, end - time.monotonic()))
        self.wait(max(0.0, end - time.monotonic()))
        return said[self.stdout], said[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def server() -> socket.socket:
    """The connection to this process's server."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # as the processes' own will be; nothing is written to it
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def reap(*_) -> None:
    """Lets those go that have told an exit code."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def serve(asked: socket.socket) -> dict:
    """Returns in each new process, with what it is to run."""
    signal.signal(signal.SIGCHLD, reap)
    while True:
        request, ends, *_ = socket.recv_fds(asked, 1 << 20, 3)
        if not request:
            os._exit(0)
        if not os.fork():
            break
        for end in ends:
            os.close(end)
    asked.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, error, status = ends
    if child := os.fork():
        os.close(out), os.close(error)
        with contextlib.suppress(BrokenPipeError):  # the test has ended without it
            os.write(status, b"%d\n" % child)
            os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    os.dup2(out, 1), os.dup2(error, 2)
    for end in ends:
        os.close(end)
    return json.loads(request)


def begin(request: dict) -> types.CodeType:
    """Makes this process what `python script args` is before its first line."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    script = request["script"]
    sys.argv = [script, *request["args"]]
    sys.path[0] = os.path.dirname(script)
    exec(request["first"], {})
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = script, __builtins__
    return compile(Path(script).read_bytes(), script, "exec")


class Rank:
    """What torchrun starts, instead of subprocess.Popen: a fork, with a process group of its own."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_):
        python, unbuffered, script, *rest = args
        self.pid, self.returncode = os.fork(), None
        if self.pid:
            return
        code = 1
        try:
            os.setpgid(0, 0)
            os.closerange(3, 4096)  # torchrun's sockets
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):  # torchrun's handlers
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout.reconfigure(write_through=True)
            first = begin({"script": script, "args": rest, "env": env, "cwd": ".", "first": ""})
            exec(first, vars(sys.modules["__main__"]))
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.01)
        return self.returncode


if __name__ == "__main__":
    for name in HEAVY:
        __import__(name)
    sys.modules["matplotlib.figure"].Figure.savefig = lambda _, file, **__: file.write(
        bytes(100_000)
    )
    code = begin(serve(socket.socket(fileno=int(sys.argv[1]))))
    exec(code, vars(sys.modules["__main__"]))
