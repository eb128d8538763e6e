"""What is written and what is there are the same: imports, docstrings, commands, flags, links, figures.

The pages are README.md, CONTRIBUTING.md, docs/ and a README.md in runs/, demo/ and bench/.
"""

import ast
import json
import os
import re
import statistics
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from forked import Forked

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(p for p in ROOT.glob("*/README.md") if not p.parent.name.startswith("."))
BOOK = ("rope", "model", "relation_kl", "kernel_triton", "train", "eval")
FOLDERS = ("hub", "engine", "evals", "bench")
MODULES = sorted(
    p for p in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
)
MODULES = [p for p in MODULES if p.name != "__init__.py"]
# Imports go down only: a room may import those of a lower rank, and its own
RANK = {"rope": 0, "precision": 0, "kernel_host": 0, "hub": 1}
RANK |= {"kernel_cpu": 1, "kernel_glue": 1, "kernel_triton": 1, "kernel_hopper": 2}
RANK |= {"relation_kl": 3, "model": 3, "engine": 4, "evals": 5, "eval": 6, "train": 6, "bench": 7}


def tracked() -> list[str]:
    """Files of the repository, those not yet committed included."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode:
        pytest.skip("this is no clone that git would read")
    return run.stdout.splitlines()


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
    """And what stands beside it: kernels for one kind of machine, and the choice of a dtype."""
    beside = {"kernel_host", "kernel_cpu", "kernel_glue", "kernel_hopper", "precision"}
    assert {p.stem for p in ROOT.glob("*.py")} - beside == set(BOOK)


def test_imports_go_down_only():
    for path in MODULES:
        assert room(path) in RANK, f"{path.name} has no rank"
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


def arrows() -> set[tuple[str, str]]:
    """Who imports whom, room by room, without what follows from two other arrows."""
    direct: dict[str, set[str]] = {room(p): set() for p in MODULES}
    for path in MODULES:
        direct[room(path)] |= {name[0] for name in imported(path)} - {room(path)}

    def below(name: str) -> set[str]:
        return direct[name].union(*(below(other) for other in direct[name]))

    return {
        (upper, lower)
        for upper, lowers in direct.items()
        for lower in lowers
        if not any(lower in below(other) for other in lowers - {lower})
    }


def test_the_picture_of_the_house_is_its_imports():
    page = (ROOT / "docs" / "house.md").read_text()
    drawn = re.findall(r"^    (\w+) --> (\w+)$", page, re.M)
    order = sorted(arrows(), key=lambda a: (-RANK[a[0]], a[0], -RANK[a[1]], a[1]))
    lines = "\n".join(f"    {upper} --> {lower}" for upper, lower in order)
    assert drawn == order, f"the diagram of docs/house.md should be\n{lines}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_one_concept_opened_by_a_docstring(path):
    lesson = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(lesson.splitlines()) >= 5, "a docstring that teaches"


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
    tree = README.split("## Reading order")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)\.py`", tree)
    assert [n for n in named if n in BOOK] == list(BOOK)
    missing = {p.stem for p in ROOT.glob("*.py")} - set(named)
    assert not missing, f"no row for {missing}"
    assert set(re.findall(r"^\| `(\w+)/`", tree, re.M)) >= set(FOLDERS)


def test_the_readme_begins_with_a_curve_and_the_bare_command():
    top = "\n".join(README.splitlines()[:25])
    assert "](demo/figures/positions.png)" in top and "make demo" in top and "make test" in top
    assert "\npython train.py --teacher DIR --scale 8\n" in top
    assert re.search(r"^python eval\.py --model \S+ --against DIR$", top, re.M)


def test_the_readmes_method_is_train_pys():
    text = (ROOT / "train.py").read_text()
    functions = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    method = ast.get_source_segment(text, functions["relation_loss"])
    assert f"```python\n{method}\n```" in README


# ---- what the pages name


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Of torchrun, vLLM and SGLang
OTHERS_FLAGS = {"--nproc_per_node", "--max-model-len", "--hf-overrides", "--context-length"}


def headings(page: Path) -> set[str]:
    """Of a page, as the anchors of its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            place, _, anchor = target.partition("#")
            to = page.parent / place if place else page
            assert to.exists(), target
            assert not anchor or anchor in headings(to), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_flag_and_target_that_a_page_names_exists(page):
    text, tree = page.read_text(), tracked()
    for name in re.findall(r"[\w./-]*\w\.(?:py|sh)\b", text):
        assert any(f"/{path}".endswith(f"/{name.removeprefix('../')}") for path in tree), name
    for name in re.findall(r"`((?:hub|engine|evals|bench|tests|demo|runs|docs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    source = "".join(p.read_text() for p in ROOT.rglob("*.py") if named(p) in tree)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - OTHERS_FLAGS:
        assert f'"{flag}"' in source, flag
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|\$ |^)make ([\w-]+)", text, re.M)) <= targets


def test_every_name_that_contributing_gives_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    source = "".join(p.read_text() for p in ROOT.rglob("*.py") if named(p) in tracked())
    for name in re.findall(r"`(_?[A-Za-z]\w*)`", text):
        assert re.search(rf"\b{name}\b", source), name


EVERYTHING = "\n".join(page.read_text() for page in PAGES)
COMMANDS = sorted(set(re.findall(r"python ((?:[\w./]+\.py)|(?:-m bench \w+))", EVERYTHING)))


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_of_the_pages_exists_with_the_flags_it_shows(script, tmp_path):
    shown = set()
    for line in EVERYTHING.replace("\\\n", " ").splitlines():
        for rest in line.split(f"python {script}")[1:]:
            shown |= set(re.findall(r"(?<!\w)(--[a-z][\w-]*)", rest.split("#")[0].split("`")[0]))
    assert script.startswith("-m") or (ROOT / script).is_file()
    if shown:
        file, args = ROOT / script, []
        if script.startswith("-m"):
            file, (_, module, *args) = tmp_path / "module.py", script.split()
            code = "import runpy, sys; sys.path[0] = sys.argv.pop(1)\n"
            file.write_text(
                f"{code}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
            )
            args = [str(ROOT), *args]
        run = Forked(file, [*args, "--help"], dict(os.environ), cwd=ROOT)
        said, errors = run.communicate()
        assert run.returncode == 0 and not [f for f in shown if f not in said], (shown, errors)


# ---- the figures


RUNS = json.loads((ROOT / "runs" / "smollm2-135m.json").read_text())["rows"]
SCORES = {
    "LAMBADA": "lambada_openai, accuracy",
    "mean of 4": "average accuracy",
    "BoolQ": "boolq, accuracy",
    "ppl 8K": "sliding perplexity at 8192",
    "ppl 64K": "sliding perplexity at 65536",
}


# How the pages call rows that the JSON names otherwise: linear's default has changed
NAMES = {
    "linear, both stages": "2097152",
    "yarn, both stages": "yarn",
    "linear --tokens1 1048576 --tokens2 3145728": "linear",
}


def seed_of(label: str) -> tuple[str, int | None]:
    """A row's label without its ", seed N", and N."""
    row, _, seed = label.replace("`", "").partition(", seed ")
    return row, int(seed) if seed else None


def run_of(label: str) -> dict:
    """The run of a label; without a seed: of seed 0."""
    row, seed = seed_of(label)
    (run,) = (r for r in RUNS if (r["row"], r["seed"]) == (row, seed or 0) and "retention" in r)
    return run


def measured(label: str, score: str) -> list[float]:
    """Of every run of a row on GPUs, or of one seed, in their order; accuracies in percent."""
    found = []
    label, seed = seed_of(label)
    for run in (r for r in RUNS if "seconds" not in r and seed in (None, r["seed"])):
        figures, kind = run["figures"], run["arguments"]["rope"]
        if label == "teacher":
            column = figures.get("teacher")
        elif label.endswith(", untrained"):
            of = kind if run["arguments"]["scale"] == 8 else run["row"]
            column = figures.get("untrained") if label == f"{of}, untrained" else None
        else:
            column = figures.get("student", figures.get("model")) if run["row"] == label else None
        if column and SCORES[score] in column:
            found.append(column[SCORES[score]] * (100 if "accuracy" in SCORES[score] else 1))
    assert found, f"no run of {label}"
    return found


def shown(value: float) -> str:
    if value >= 1000:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def median(label: str, score: str) -> str:
    return shown(statistics.median_low(measured(label, score)))


@pytest.mark.parametrize("page, rows", [("README.md", 5), ("runs/README.md", 56)])
def test_the_tables_are_what_the_runs_measured(page, rows):
    """A cell is all runs' figures, or their median."""
    columns, checked = [], 0
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        if "ppl 64K" in cells:
            columns = cells
        elif not line.startswith("|"):
            columns = []
        elif columns and not cells[0].startswith("---"):
            label = NAMES.get(cells[0], cells[0])
            for score, cell in zip(columns, cells, strict=True):
                if score in SCORES:
                    each = [shown(v) for v in measured(label, score)]
                    assert cell in (", ".join(each), median(label, score)), (label, score)
            checked += 1
    assert checked == rows


def test_what_is_kept_of_teacher_and_control_is_what_the_runs_measured():
    checked, average = 0, "average accuracy of five"
    text = (ROOT / "runs" / "README.md").read_text().split("## Qwen2.5")[0]
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if not re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", cells[-2] if len(cells) == 8 else ""):
            continue
        run = run_of(cells[0])
        of_teacher = run["retention"][average]["kept"]
        of_control = run["retention against the control"].get(average)
        for kept, cell in zip((of_teacher, of_control), cells[-2:], strict=True):
            value, low, high = (
                (100 * kept["student"][k] for k in ("value", "low", "high")) if kept else (0, 0, 0)
            )
            assert cell == (f"{value:.1f} [{low:.1f}, {high:.1f}]" if kept else ""), cells
            checked += 1
    assert checked == 52


def test_what_students_lack_of_a_control_is_what_the_runs_measured():
    checked, columns = 0, ("lambada_openai", "arc_easy", "boolq")
    text = (ROOT / "runs" / "README.md").read_text().split("## Qwen2.5")[0]
    for line in text.splitlines():
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if not (cells and cells[0].startswith("`control")):
            continue
        against, *cells = cells
        run = run_of(label)
        control = against.strip("`").replace("control-yarn", "control").removesuffix(", 2M+2M")
        assert ("yarn" in against) == ("yarn" in label)
        less = run[f"less the {control}"]
        pairs = [*(less["by task"][task] for task in columns), (less["points"], less["error"])]
        kept = run[f"retention against the {control}"]["average accuracy of five"]["student"]
        assert cells == [*(f"{points:+.1f} ({e:.1f})" for points, e in pairs), interval(kept)]
        assert run_of(f"{against}, seed {run['seed']}")["seed"] == run["seed"]
        checked += 1
    assert checked == 8


def test_students_and_controls_take_nothing_of_stage_2_from_the_teacher():
    for run in (r for r in RUNS if "seconds" not in r):
        share = 0.5 if run["row"].endswith("--teacher-share 0.5") else 0
        assert run["arguments"].get("stage2 teacher share", 0) == share, run["row"]


def test_the_losses_by_position_are_what_the_runs_measured():
    columns, checked = [], 0
    for line in (ROOT / "runs" / "README.md").read_text().splitlines():
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if "to 256K" in cells:
            columns = ["0-1x", "1-2x", "2-4x", "4-8x", "8-16x", "16-32x"]
        elif columns and line.startswith("| `"):
            name = label.split("`")[1]
            run = run_of(name.removesuffix(", untrained"))
            figures = run["figures"]
            losses = figures["untrained" if name.endswith("untrained") else "student"]
            if label.endswith((", two blocks", ", one block")):
                losses = run["losses to its end"]
            known = [losses.get(f"loss in {column}") for column in columns]
            assert cells == ["" if x is None else f"{x:.2f}" for x in known], label
            checked += 1
        elif not line.startswith("|"):
            columns = []
    assert checked == 16


def test_what_is_said_of_more_text_before_a_block_is_what_the_runs_measured():
    """The blocks of 64K are the second and the last quarter of the text that is read to its end."""
    text = " ".join((ROOT / "runs" / "README.md").read_text().split())
    for scale, said in (
        (16, "yarn's is {:.2f} for {:.2f}, linear's {:.2f} for {:.2f}. What is more than 64K away"),
        (32, "yarn's loss on them is {:.2f} for {:.2f}, linear's {:.2f} for {:.2f}."),
    ):
        figures = []
        for kind in ("yarn", "linear"):
            alone, whole = run_of(f"{kind}, scale {scale}")["loss by position"]
            curve = whole["model"]  # at scale 16 the mean over two blocks
            again = curve[32:] if scale == 16 else curve[16:32] + curve[48:]
            figures += [statistics.mean(again), statistics.mean(alone["student"])]
        assert said.format(*figures) in text


QWEN = json.loads((ROOT / "runs" / "qwen25-0.5b.json").read_text())["rows"]
FIVE = "average accuracy of five"
QWEN_SCORES = SCORES | {
    "ppl 32K": "perplexity in windows of 32768",
    "ppl 256K": "perplexity in windows of 262144",
    "0 to 32K": "loss in 0-1x",
    "32K to 64K": "loss in 1-2x",
    "64K to 128K": "loss in 2-4x",
    "128K to 256K": "loss in 4-8x",
    "windows of 32K": "loss in windows of 32768",
    "windows of 256K": "loss in windows of 262144",
}


def qwen_section() -> str:
    return (ROOT / "runs" / "README.md").read_text().split("## Qwen2.5")[1].split("\n## ")[0]


def qwen_rows(column: str):
    """Of the section's tables that have the column: [{column: cell}], the first cell as ""."""
    columns = []
    for line in qwen_section().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = ["", *cells[1:]]
        elif column in columns and not cells[0].startswith("---"):
            yield dict(zip(columns, cells, strict=True))


def qwen_run(cells: dict[str, str]) -> tuple[dict, str]:
    """A row's run, and which of its models."""
    label, _, which = cells[""].replace("`", "").partition(", ")
    if label == "teacher" or which == "untrained":  # of the first run that measured it
        model, kind = which or "teacher", "linear" if label == "teacher" else label
        found = [run for run in QWEN if run["row"].split()[0] == kind and model in run["figures"]]
        return found[0], model
    rates = [(f, cells.get(f"`{f}`")) for f in ("--lr1", "--lr2")]  # of the earlier defaults
    row = label + "".join(f" {flag} {rate}" for flag, rate in rates if rate)
    seed = int(which.split(",")[0][5:]) if which.startswith("seed") else 0
    again = which[which.index("trained") :] if "trained" in which else ""
    found = [
        run
        for run in QWEN
        if run["row"] == row and run["seed"] == seed and run.get("again", "") == again
    ]
    assert len(found) == 1, cells
    return found[0], "student"


def interval(kept: dict[str, float]) -> str:
    value, low, high = (f"{100 * kept[k]:.1f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


@pytest.mark.parametrize("column, rows", [("ppl 256K", 40), ("BoolQ", 56), ("windows of 256K", 28)])
def test_qwens_tables_are_what_its_runs_measured(column, rows):
    found = list(qwen_rows(column))
    for cells in found:
        run, model = qwen_run(cells)
        figures = run["figures"][model]
        for name, cell in cells.items():
            value = figures.get(QWEN_SCORES.get(name))
            if name in QWEN_SCORES and value is None:
                assert not cell and "ppl" in name, cells
            elif name in QWEN_SCORES and "loss" in QWEN_SCORES[name]:
                assert cell == f"{value:.2f}", cells
            elif name in QWEN_SCORES:
                assert cell == shown(value * (100 if "accuracy" in QWEN_SCORES[name] else 1)), cells
        if model == "student":  # the commands that train it have the table's rates
            rates = [run["arguments"].get(f"stage{n} lr") for n in (1, 2)]
            assert rates == [
                float(cells.get(f"`--lr{n}`") or rates[n - 1] or 0) or None for n in (1, 2)
            ]
    assert len(found) == rows


def test_what_qwen_kept_is_what_its_runs_measured():
    teacher = qwen_run({"": "teacher"})[0]["figures"]["teacher"][FIVE]
    for cells in qwen_rows("ppl 256K"):
        run, model = qwen_run(cells)
        own = {"student": run["retention"][FIVE].get("kept"), "teacher": None}
        own["untrained"] = run.get("retention of the untrained", {}).get(FIVE)
        control = run.get("retention against the control") if model == "student" else None
        expected = [
            interval(kept["student"]) if kept else ""
            for kept in (own[model], control and control[FIVE])
        ]
        assert [cells["% kept of the teacher"], cells["% kept of the control"]] == expected
    for cells in qwen_rows("BoolQ"):
        if "ppl 256K" not in cells:
            run, _ = qwen_run(cells)
            share = 100 * run["figures"]["student"][FIVE] / teacher
            assert cells["% kept of the teacher"] == f"{share:.1f}"


def qwens_ruler(label: str, name: str) -> dict[str, float]:
    """The figures of the one of a row's trainings that has this one."""
    row, _, seed = label.replace("`", "").partition(", seed ")
    found = [
        figures
        for run in QWEN
        for figures in run["figures"].values()
        if run["row"] == row and run["seed"] == int(seed or 0) and name in figures
    ]
    assert len(found) <= 1, (label, name)
    return found[0] if found else {}


def test_qwens_ruler_is_what_its_runs_measured():
    means = list(qwen_rows("at 128K"))
    found = [
        (column.rsplit(", ", 1)[0], cells[""], column.rsplit(", ", 1)[1], cell)
        for cells in qwen_rows("teacher, 128K")
        for column, cell in list(cells.items())[1:]
    ]
    found += [
        (cells[""], "mean of the 11", length.removeprefix("at "), cell)
        for cells in means
        for length, cell in list(cells.items())[1:]
    ]
    for row, task, length, cell in found:
        task = task.replace("mean of the 11", "mean of 11 tasks")
        name = f"RULER {task} at {1024 * int(length[:-1])}"
        figures = qwens_ruler(row, name)
        error = (
            f" ± {100 * figures[f'{name}, standard error']:.1f}"
            if "mean" in name and figures
            else ""
        )
        assert cell == (f"{100 * figures[name]:.1f}{error}" if figures else ""), (row, name)
    assert (len(found), len(means)) == (12 * 14 + 8 * 4, 8)


def test_what_is_said_of_qwens_aims_is_what_its_runs_measured():
    text = " ".join(qwen_section().split())
    of = lambda row: qwen_run({"": row})[0]  # noqa: E731
    kept = lambda run: run["retention"][FIVE]["kept"]["student"]  # noqa: E731
    seeds = {
        row: [of(f"{row}{seed}") for seed in ("", ", seed 1", ", seed 2")]
        for row in ("yarn", "linear", "linear 1M+3M")
    }
    yarn, linear, before = seeds["yarn"][0], seeds["linear"][0], seeds["linear 1M+3M"][0]
    longer = of("yarn --tokens2 2097152 --length2 65536 --native-blocks 4")
    for run in (linear, yarn, longer):
        assert interval(kept(run)) in text
    each = {row: [f"{100 * kept(run)['value']:.1f}" for run in runs] for row, runs in seeds.items()}
    assert "yarn keeps {}, {} and {} % of the short tasks".format(*each["yarn"]) in text
    assert "linear {}, {} and {} %, nearly".format(*each["linear"]) in text
    splits = (*each["linear"], *each["linear 1M+3M"])
    assert "keep {}, {} and {} % instead of {}, {} and {}".format(*splits) in text
    gain = kept(of("linear 1M+3M --move-pairs"))["value"] - kept(before)["value"]
    assert f"gave short tasks {100 * gain:.1f} %" in text
    alone = [f"{100 * kept(of(row))['value']:.1f}" for row in ("relations", "pretrain")]
    assert (
        "alone ends at {} %; stage 2 alone, with the tokens of both, at {}.".format(*alone) in text
    )
    less = [
        run["mean of five less the control's"] for row in ("yarn", "linear") for run in seeds[row]
    ]
    points = [-d["points"] for d in less]
    errors = [d["error"] for d in less]
    assert "yarn {:.2f}, {:.2f} and {:.2f} (standard".format(*points[:3]) in text
    assert "linear {:.2f}, {:.2f} and {:.2f} (".format(*points[3:]) in text
    assert "(standard error {:.2f}, {:.2f}, {:.2f})".format(*errors[:3]) in text
    assert "({:.2f}, {:.2f}, {:.2f}) | yarn met; linear by two".format(*errors[3:]) in text
    within = [point <= error for point, error in zip(points, errors, strict=True)]
    assert within == [True] * 5 + [False]
    windows = "loss in windows of 262144"
    at = lambda run: run["figures"]["student"][windows]  # noqa: E731
    losses = [
        at(of(f"yarn{seed}")) for seed in ("", *(f", seed {n}, trained again" for n in (1, 2)))
    ]
    said = "yarn {:.2f}, {:.2f} and {:.2f}; linear {:.2f}, three".format(*losses, at(linear))
    assert said in text
    assert all(f"{at(run):.2f}" == f"{at(linear):.2f}" for run in seeds["linear"])
    assert f"% and {at(longer):.2f} nats at 256K" in text
    teacher = of("teacher")["figures"]["teacher"]
    native = teacher["loss in windows of 32768"]
    assert f"the teacher's at 32K, {native:.2f}" in text and max(*losses, at(linear)) <= native
    moved = of("linear --move-pairs")
    assert f"costs {at(moved) - at(linear):.2f} nats at 256K" in text
    assert f"they cost {at(of('linear 1M+3M moved by a shift')) - at(before):.2f} nats" in text
    assert f"at 256K {teacher[windows] - at(linear):.2f} below the teacher's own" in text
    costs = -yarn["mean of five less the untrained's"]["points"]
    assert f"{costs:.1f} points below untrained yarn" in text
    lack = [
        -run["mean of five less the teacher's"]["by task"]["lambada_openai"][0]
        for run in seeds["linear"]
    ]
    assert "LAMBADA lacks {:.1f}, {:.1f} and {:.1f} points".format(*lack) in text
    (old,) = (r for r in QWEN if r["row"] == "yarn --lr1 2.2e-4 --lr2 1.1e-4" and "again" not in r)
    bins = [
        next(p[column] for p in run["loss by position"] if p["window"] == 262144)
        for run, column in ((yarn, "student"), (old, "teacher"))
    ]
    assert len(bins[0]) == 64 and all(a < b for a, b in zip(*bins, strict=True))
    ruler = next(run["figures"]["teacher"] for run in QWEN if run["row"] == "teacher")
    mean = "RULER mean of 11 tasks at {}"
    gained = "Training gives it {} points at 128K and none at 32K: untrained it has {} and {}."
    apart = {}
    for row, other, length in [
        *((row, "teacher", 1024 * n) for row in ("yarn", "linear") for n in (4, 32, 64, 128)),
        ("yarn", "untrained-yarn", 131072),
    ]:
        name = mean.format(length)
        both = [qwens_ruler(r, name) for r in (row, other)]
        points = 100 * abs(both[0][name] - both[1][name])
        error = 100 * sum(m[f"{name}, standard error"] ** 2 for m in both) ** 0.5
        apart[row, other, length] = f"{points:.1f} ± {error:.1f}"
        assert apart[row, other, length] in text
    plain = [
        f"{100 * qwens_ruler('untrained-yarn', mean.format(n))[mean.format(n)]:.1f}"
        for n in (131072, 32768)
    ]
    assert gained.format(apart["yarn", "untrained-yarn", 131072], *plain) in text
    far = qwens_ruler("yarn", mean.format(131072))[mean.format(131072)]
    assert f"{far / ruler[mean.format(32768)]:.2f} of it" in text
    left = [
        f"{100 * qwens_ruler('linear', mean.format(1024 * n))[mean.format(1024 * n)]:.1f}"
        for n in (4, 32, 64, 128)
    ]
    assert (
        "But of RULER {} are left at 4K, {} at 32K, {} at 64K and {} at 128K".format(*left) in text
    )
    near = "RULER mean of 11 tasks at 4096"
    lost = qwens_ruler("linear", near)[near] - moved["figures"]["student"][near]
    assert f"{100 * lost:.1f} points of RULER at 4K" in text


def test_the_readme_says_what_the_papers_loss_alone_gives():
    """Beside the sum of both and the KL alone, at equal tokens."""
    text = " ".join(README.split())
    (relations, p1), (both, p2), (kl, p3) = (
        (median(row, "LAMBADA"), median(row, "ppl 64K")) for row in ("relations", "2097152", "kl")
    )
    assert f"LAMBADA {relations} and perplexity {p1} at 64K" in text
    assert f"the sum at {both} and {p2}, the KL alone at {kl} and {p3}" in text


def test_the_rows_of_a_cpu_are_what_it_measured():
    text = (ROOT / "runs" / "README.md").read_text()
    for run in (r for r in RUNS if "seconds" in r):
        (line,) = [
            x for x in text.splitlines() if x.startswith(f"| `{run['row']}` | {run_tokens(run):,}")
        ]
        for score in ("lambada_openai, accuracy", "average accuracy"):
            before, after = (100 * run["figures"][c][score] for c in ("untrained", "student"))
            kept = run["retention"][score]["kept"]["student"]  # to four digits
            assert f"| {before:.1f} to {after:.1f} |" in line
            said = re.findall(r"\| ([\d.]+) to ([\d.]+) % \|", line)
            assert any(
                abs(float(low) - 100 * kept["low"]) < 0.051
                and abs(float(high) - 100 * kept["high"]) < 0.051
                for low, high in said
            )
        assert f"{run['seconds'] / 60:.0f} minutes" in line and run["commit"] in line


def run_tokens(run: dict) -> int:
    """Tokens of stage 1."""
    a = run["arguments"]
    return a["stage1 T"] * a["stage1 batch"] * a["stage1 steps"]


def test_the_demos_table_is_its_last_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    import demo

    models = json.loads((ROOT / "demo" / "figures" / "demo.json").read_text())["models"]
    monkeypatch.setattr(demo, "columns", lambda out: models)
    table = demo.side_by_side(Path())
    assert table in (ROOT / "demo" / "README.md").read_text(), f"demo/README.md needs\n{table}"


def test_every_figure_stands_beside_the_numbers_it_is_drawn_from():
    for picture in (ROOT / "demo" / "figures").glob("*.png"):
        assert picture.with_suffix(".json").exists() or picture.with_suffix(".jsonl").exists()


def test_the_retention_figure_has_every_row_of_the_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    import figures

    kept = json.loads((figures.HERE / "retention.json").read_text())
    assert kept == figures.retention_values(), "run `make figures`"
    kept = json.loads((figures.HERE / "qwen25.json").read_text())
    assert kept == figures.qwen_values(), "run `make figures`"


def test_every_page_names_the_pythons_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.split(" :: ")[-1] for c in project["classifiers"] if "Python :: 3." in c]
    assert project["requires-python"] == f">={named[0]}"
    for page in ("README.md", "CONTRIBUTING.md", "Makefile"):
        found = re.findall(
            r"Python (3\.\d+ to 3\.\d+|3\.\d+\+|3\.\d+ or later)", (ROOT / page).read_text()
        )
        assert set(found) == {f"{named[0]} to {named[-1]}"}, page


def test_the_project_speaks_of_itself_alone():
    listed = tracked()
    for name in listed:
        if (
            name.endswith((".py", ".md", ".toml", ".txt", ".sh", ".json", ".jsonl", "Makefile"))
            and name != "tests/test_docs.py"
        ):
            text = (ROOT / name).read_text()
            assert not re.search(
                r"/work\b|/root/|/\.library|http://(?!www|127|localhost|e[)])", text
            ), name


def test_nothing_large_is_committed():
    listed = tracked()
    assert sum((ROOT / n).stat().st_size for n in listed if (ROOT / n).exists()) < 20_000_000
    pictures = [n for n in listed if n.endswith(".png")]
    assert all((ROOT / n).stat().st_size < 200_000 for n in pictures if (ROOT / n).exists())
