"""The README and the tree say the same:

files, imports, line budgets, commands, flags and docstrings.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BOOK = ("rope", "model", "relation_kl", "kernel_triton", "train", "eval")
FOLDERS = ("hub", "engine", "evals", "bench")
MODULES = sorted(
    p for p in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
)
MODULES = [p for p in MODULES if p.name != "__init__.py"]
# Above the general budget of 60 lines: the two scripts' one flow of locals, a list of flags, and
# kernels
LONG = {"train.main", "eval.main", "flags.parser"}
# Imports go down only: a room may import those of a lower rank, and its own
RANK = {
    "rope": 0,
    "precision": 0,
    "kernel_host": 0,
    "kernel_cpu": 0,
    "kernel_triton": 1,
    "kernel_hopper": 1,
    "hub": 1,
}
RANK |= {"relation_kl": 2, "model": 2, "engine": 3, "evals": 4, "eval": 5, "train": 5, "bench": 6}


def room(path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def imported(path, everywhere: bool = True) -> set[tuple[str, ...]]:
    """What of ours a module imports, as ("engine", "data") or ("rope",); everywhere:

    also inside functions.
    """
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")) for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            first = tuple(node.module.split("."))
            names = {(*first, a.name) for a in node.names}
            found |= names if len(first) == 1 and first[0] in FOLDERS else {first}
    return {name[:2] for name in found if name[0] in RANK}


def test_the_top_level_is_the_book():
    assert {p.stem for p in ROOT.glob("*.py")} - {
        "kernel_hopper",
        "kernel_cpu",
        "kernel_host",
        "precision",
    } == set(BOOK)


def test_imports_go_down_only():
    for path in MODULES:
        for name in imported(path):
            up = RANK[name[0]] >= RANK[room(path)] and name[0] != room(path)
            assert not up, f"{path.relative_to(ROOT)} imports {'.'.join(name)}"


def test_there_is_no_circle():
    """Among modules, lazily imported ones included."""

    def key(path):
        return (path.stem,) if path.parent == ROOT else (path.parent.name, path.stem)

    edges = {key(p): imported(p) & {key(q) for q in MODULES} for p in MODULES}
    order: list[tuple] = []
    while len(order) < len(edges):
        ready = [n for n in edges if n not in order and edges[n] <= {*order, n}]
        assert ready, f"a circle among {sorted(set(edges) - set(order))}"
        order += ready


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_one_concept_opened_by_a_docstring(path):
    text = path.read_text()
    module = ast.parse(text)
    lesson = ast.get_docstring(module) or ""
    assert len(lesson.splitlines()) >= 5, "a docstring that teaches"
    kernels = path.name.startswith("kernel_")
    for node in ast.walk(module):
        if (
            isinstance(node, ast.FunctionDef)
            and not kernels
            and f"{path.stem}.{node.name}" not in LONG
        ):
            assert node.end_lineno - node.lineno < 62, f"{node.name} is longer than 60 lines"


@pytest.mark.parametrize("name", [*BOOK])
def test_the_books_docstrings_end_with_limits_and_a_source(name):
    lesson = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    assert "Limits." in lesson and ("Source." in lesson or "Sources." in lesson)


# The derivations that can be run: in which file each stands, and the test it points at
DERIVATIONS = {
    "rope": {
        "test_interpolation_blurs_near_positions",
        "test_yarn_keeps_the_pairs_that_tell_neighbours_apart",
    },
    "relation_kl": {
        "test_the_gradient_in_the_scores_is_P_minus_R",
        "test_a_token_collects_its_row_and_its_column",
        "test_one_pass_gives_both_log_sum_exps_and_the_kl",
        "test_relations_do_not_see_a_rotation_that_attention_does",
    },
    "train": {"test_the_next_token_kl_sees_the_turn_that_no_relation_sees"},
}


def test_every_derivation_points_at_a_test_that_exists():
    pointed: dict[str, list[str]] = {}
    for path in MODULES:
        text = path.read_text()
        found = re.findall(r"pytest (tests/\w+\.py)::(\w+)$", text, re.M)
        assert len(found) == text.count("::test_"), f"{path.name}: one on a line, with its file"
        for file, name in found:
            tests = ast.parse((ROOT / file).read_text()).body
            names = {node.name for node in tests if isinstance(node, ast.FunctionDef)}
            assert name in names, f"{path.name} points at {file}::{name}"
            pointed.setdefault(name, []).append(path.stem)
    for file, names in DERIVATIONS.items():
        assert all(pointed.get(name) == [file] for name in names), f"{file}: each stands once"


def test_the_readme_names_the_book_in_order_and_every_folder():
    tree = README.split("## The files")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)\.py`", tree, re.M)
    assert [n for n in named if n in BOOK] == list(BOOK)
    assert set(re.findall(r"^\| `(\w+)/`", tree, re.M)) >= set(FOLDERS)


def test_every_path_that_the_readme_names_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


COMMANDS = sorted(set(re.findall(r"python ((?:[\w./]+\.py)|(?:-m bench \w+))", README)))


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_of_the_readme_exists_with_the_flags_it_shows(script):
    shown = set()
    for line in README.replace("\\\n", " ").splitlines():
        for rest in line.split(f"python {script}")[1:]:
            shown |= set(re.findall(r"(?<!\w)(--[a-z][\w-]*)", rest.split("#")[0].split("`")[0]))
    assert script.startswith("-m") or (ROOT / script).is_file()
    if shown:
        run = subprocess.run(
            [sys.executable, *script.split(), "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert run.returncode == 0 and not [f for f in shown if f not in run.stdout], shown


def test_the_readme_is_one_sitting():
    assert len(README.splitlines()) < 250


def test_every_figure_stands_beside_the_numbers_it_is_drawn_from():
    for picture in (ROOT / "demo" / "figures").glob("*.png"):
        assert picture.with_suffix(".json").exists() or picture.with_suffix(".jsonl").exists()


def test_the_retention_figure_has_every_row_of_the_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    import figures

    kept = json.loads((figures.HERE / "retention.json").read_text())
    assert kept == figures.retention_values(), "run `make figures`"


def test_the_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([\w-]+)", README)) <= targets


def test_every_page_names_the_pythons_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.split(" :: ")[-1] for c in project["classifiers"] if "Python :: 3." in c]
    assert project["requires-python"] == f">={named[0]}"
    for page in ("README.md", "CONTRIBUTING.md", "Makefile"):
        found = re.findall(
            r"Python (3\.\d+ to 3\.\d+|3\.\d+\+|3\.\d+ or later)", (ROOT / page).read_text()
        )
        assert set(found) == {f"{named[0]} to {named[-1]}"}, page


def tracked() -> list[str]:
    """The names of the files that git has."""
    try:
        run = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode:
        pytest.skip("this is no clone that git would read")
    return run.stdout.split("\n")[:-1]


def test_the_project_speaks_of_itself_alone():
    listed = tracked()
    for name in listed:
        if (
            name.endswith((".py", ".md", ".toml", ".txt", ".sh", "Makefile"))
            and name != "tests/test_docs.py"
        ):
            text = (ROOT / name).read_text()
            assert not re.search(
                r"/work/|/root/|/\.library|http://(?!www|127|localhost|e[)])", text
            ), name


def test_nothing_large_is_committed():
    listed = tracked()
    assert sum((ROOT / n).stat().st_size for n in listed if (ROOT / n).exists()) < 20_000_000
    pictures = [n for n in listed if n.endswith(".png")]
    assert all((ROOT / n).stat().st_size < 200_000 for n in pictures if (ROOT / n).exists())
