"""A name on the Hub is a teacher: against a server on the loopback address that speaks its dialect."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from conftest import ROOT
from forked import Forked

from hub.download import model_name, repository_of, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNWANTED = {
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"code",
    "consolidated.safetensors": b"the same again",
    "onnx/model.safetensors": b"and again",
}


class Hub(BaseHTTPRequestHandler):
    """org/tiny with the files of `files`; org/gated; nothing else."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if "/org/gated" in path:
            return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        if "/org/tiny" not in path:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no")
        if path.startswith("/api/models/org/tiny/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": f"{i:040x}"}
                for i, (n, b) in enumerate(self.files.items())
            ]
            return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        if path.startswith("/api/models/org/tiny"):
            revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            names = [{"rfilename": n} for n in self.files]
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": names}).encode()
            return self.answer(200, body, Content_Type="application/json")
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if name not in self.files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        tag = f'"{list(self.files).index(name):040x}"'
        return self.answer(200, self.files[name], ETag=tag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server(tiny_dir):
    Hub.files = {f.name: f.read_bytes() for f in tiny_dir.iterdir()} | UNWANTED
    Hub.files["README.md"] = b"---\nlicense: apache-2.0\n---\n# tiny\n"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http:{'//'}127.0.0.1:{server.server_port}"
    server.shutdown()


def run(code: str, home, endpoint: str, **more: str) -> str:
    """What `code` prints, in a process of its own: huggingface_hub reads its variables once."""
    script = home / "script.py"
    begin = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    script.write_text(begin + "assert 'huggingface_hub' not in sys.modules\n" + code)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    no_proxy = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment = keep | no_proxy | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | more
    done = Forked(script, [], environment, cwd=ROOT)
    said, errors = done.communicate()
    assert done.returncode == 0, errors[-2000:]
    return said.strip()


LOAD = """
from hub.download import resolve, repository_of, model_name
from model import Llama
path = resolve({name!r})
Llama.from_pretrained(path)
print(sorted(f.name for f in path.rglob("*")), repository_of(path), model_name(path))
"""
SAY = """
from hub.download import resolve
try:
    print("found", resolve({name!r}))
except ValueError as e:
    print(e)
"""


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_a_name_on_the_hub_is_downloaded_loads_and_comes_from_the_cache_later(
    name, server, tmp_path, tiny_dir
):
    said = run(LOAD.format(name=name), tmp_path, server)
    wanted = sorted([*(f.name for f in tiny_dir.iterdir()), "README.md"])
    assert said == f"{wanted} org/tiny tiny"
    Hub.asked.clear()
    assert run(LOAD.format(name=name), tmp_path, server) == said
    assert not [path for path in Hub.asked if "/resolve/" in path]
    assert run(LOAD.format(name=name), tmp_path, server, HF_HUB_OFFLINE="1") == said


@pytest.mark.parametrize(
    "name, said",
    [
        ("org/none", "the Hub has no model org/none that it shows to you"),
        ("org/gated", "hf auth login && hf download org/gated"),
        ("org/tiny@v9", "org/tiny has no revision 'v9' on the Hub"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(name, said, server, tmp_path):
    answer = run(SAY.format(name=name), tmp_path, server)
    assert said in answer and "\n" not in answer


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_offline_is_one_sentence_with_the_command(offline, tmp_path):
    nobody = f"http:{'//'}127.0.0.1:9"
    answer = run(SAY.format(name="org/tiny@v1"), tmp_path, nobody, **offline)
    assert "hf download org/tiny --revision v1, and give the folder" in answer
    assert "\n" not in answer


@pytest.mark.parametrize("name", ["./org/tiny", "/tmp/none", "gpt2", "a/b/c", "org/tiny@", "~/x"])
def test_what_is_no_name_on_the_hub_is_a_folder(name):
    assert str(resolve(name)) == name.removeprefix("./")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = resolve("org/tiny")
    assert path.is_dir() and repository_of(path) is None and model_name(path) == "tiny"
