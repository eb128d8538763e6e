"""Evaluation: intervals against a plain bootstrap, long text by its definition, the run twice."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model, write_model
from safetensors.torch import load_file, save_file

import eval as evaluation
from engine import data, folder, step
from engine.lookups import Lookups
from evals import held_out, longtext, pictures, prompts, report
from evals import layers as diagnose
from evals.held_out import HeldOut
from evals.next_token import block_scores
from evals.report import mean_and_error
from evals.retention import retention
from evals.ruler import Prompts
from evals.subject import Subject
from hub import checkpoint
from hub.tokenizer import load_tokenizer
from model import Llama, make_student, next_token_loss

# Retention


def results(n=200, seed=0):
    rng = np.random.default_rng(seed)
    luck = rng.random(n)  # the same for all models: the items are paired
    return {
        name: (luck < p).astype(float)
        for name, p in (("teacher", 0.8), ("untrained", 0.4), ("student", 0.7))
    }


def plain_bootstrap(columns, statistic, resamples=1000):
    rng, n = np.random.default_rng(1), len(columns["teacher"])
    out = []
    for _ in range(resamples):
        pick = rng.integers(0, n, n)
        out.append(statistic({name: x[pick].mean() for name, x in columns.items()}))
    return np.percentile(out, [2.5, 97.5])


def test_retention_equals_a_plain_paired_bootstrap():
    columns = results()
    found = retention({"piqa, accuracy": columns}, seed=3)["piqa, accuracy"]
    m = {name: x.mean() for name, x in columns.items()}
    kept, share = found["kept"]["student"], found["recovered"]["student"]
    assert kept["value"] == pytest.approx(m["student"] / m["teacher"])
    assert share["value"] == pytest.approx(
        (m["student"] - m["untrained"]) / (m["teacher"] - m["untrained"])
    )
    expected = plain_bootstrap(columns, lambda m: m["student"] / m["teacher"])
    assert [kept["low"], kept["high"]] == pytest.approx(expected, abs=0.01)
    expected = plain_bootstrap(
        columns, lambda m: (m["student"] - m["untrained"]) / (m["teacher"] - m["untrained"])
    )
    assert [share["low"], share["high"]] == pytest.approx(expected, abs=0.02)
    assert found["items"] == 200 and found["seed"] == 3 and found["resamples"] == 1000
    assert retention({"piqa, accuracy": columns}, seed=3)["piqa, accuracy"] == found
    assert retention({"piqa, accuracy": columns}, seed=4)["piqa, accuracy"] != found


def test_a_task_does_not_move_another_ones_interval():
    one, two = results(), results(300, 5)
    alone = retention({"a, accuracy": one})["a, accuracy"]
    both = retention({"b, accuracy": two, "a, accuracy": one})
    assert both["a, accuracy"] == alone and both["average accuracy"]["items"] == 500
    average = both["average accuracy"]["kept"]["student"]
    means = {name: (one[name].mean() + two[name].mean()) / 2 for name in one}
    assert average["value"] == pytest.approx(means["student"] / means["teacher"])
    assert (
        average["high"] - average["low"]
        < alone["kept"]["student"]["high"] - alone["kept"]["student"]["low"]
    )


def test_noise_is_not_read_as_a_result():
    rng = np.random.default_rng(0)
    columns = {
        name: (rng.random(100) < 0.5).astype(float) for name in ("teacher", "untrained", "student")
    }
    assert retention({"a, accuracy": columns})["a, accuracy"]["recovered"] == {"student": None}
    same = results() | {"student": results()["teacher"]}
    assert retention({"a, accuracy": same})["a, accuracy"]["kept"]["student"] == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
    }
    nothing = {name: np.zeros(9) for name in columns}
    assert retention({"a, accuracy": nothing})["a, accuracy"]["kept"] == {"student": None}
    said = report.retention_table(retention({"a, accuracy": nothing}))
    assert said.endswith("\n\n-: the teacher's own score is within noise of 0.")
    seldom = {
        name: np.asarray([1.0] * 4 + [0.0] * 36) for name in columns
    }  # a few draws get none: still a ratio
    assert retention({"a, accuracy": seldom})["a, accuracy"]["kept"]["student"]["high"] == 1.0
    assert "within noise" in report.retention_table(retention({"a, accuracy": columns}))


def test_nothing_is_recovered_where_the_untrained_student_beats_the_teacher():
    """ "-0.0 % [-0.0, -0.0]" was printed of a task that position interpolation had made better."""
    better = results() | {"untrained": results()["teacher"], "teacher": results()["untrained"]}
    found = retention({"a, accuracy": better})
    assert found["a, accuracy"]["recovered"] == {"student": None}
    assert "none lost" in report.retention_table(found)
    unsigned = {"value": -1e-9, "low": -1e-9, "high": 0.0}
    found["a, accuracy"]["recovered"]["student"] = unsigned
    assert "| 0.0 % [0.0, 0.0] |" in report.retention_table(found)


def test_retention_of_a_perplexity():
    logps = {"teacher": np.asarray([-1.0, -2.0, -3.0]), "untrained": np.asarray([-5.0, -6.0, -9.0])}
    logps["student"] = np.asarray([-2.0, -3.0, -4.0])
    found = retention({"l, perplexity": logps})["l, perplexity"]
    assert found["kept"]["student"]["value"] == pytest.approx(math.exp(2) / math.exp(3))
    assert found["recovered"]["student"]["value"] == pytest.approx((-3 + 20 / 3) / (-2 + 20 / 3))


class Into:
    """What writes files: a folder of engine/folder.py, without its mark."""

    def __init__(self, path):
        self.path = path

    def write(self, name, data):
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def test_write_keeps_its_keys(tmp_path):
    columns = {
        "teacher": {"loss at 1x": 2.0},
        "untrained": {"loss at 1x": 4.0},
        "stage1": {"loss at 1x": 2.5},
    }
    shares = report.recovered(columns)
    text = report.write(Into(tmp_path), columns, {"command": "x"})
    body = json.loads((tmp_path / "report.json").read_text())
    keys = ["schema", "columns", "rows", "figures", "recovered", "about"]
    assert list(body) == keys and body["recovered"] == {"stage1": 0.75}
    assert (
        text == report.table(columns, shares)
        and (tmp_path / "report.md").read_text() == text + "\n"
    )
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_share_of_a_loss_that_was_not_lost_is_not_given(tmp_path):
    """A student worse than both made "190.9 %" where the untrained one beat the teacher."""
    columns = {
        "teacher": {"loss at 1x": 3.0},
        "untrained": {"loss at 1x": 2.9},
        "student": {"loss at 1x": 3.1},
    }
    assert report.recovered(columns) == {}
    text = report.write(Into(tmp_path), columns, {})
    assert "Nothing was measurably lost at 1x (teacher 3.000, untrained 2.900 nats)" in text
    columns["untrained"]["loss at 1x"] = 3.005
    assert report.recovered(columns) == {}
    columns["untrained"]["loss at 1x"] = 4.0
    assert report.recovered(columns) == {"student": pytest.approx(0.9)}
    columns["untrained"]["loss at 1x"] = float("nan")
    assert report.recovered(columns) == {}


def test_the_json_is_flat_for_pandas_and_strict_for_others(tmp_path):
    scores = report.Scores({"teacher": {}, "student": {}}, command="x", out=Into(tmp_path))
    scores.add(
        "teacher", "loss at 1x", 2.0, error=0.1, items=9, version="text", seed=None, blocks=3
    )
    scores.add("student", "loss at 1x", float("inf"), items=9, version="text", seed=None, blocks=3)
    text = report.render(scores, {})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    body = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    known = {
        "figure": "loss at 1x",
        "items": 9,
        "version": "text",
        "seed": None,
        "dtype": "float32",
    }
    assert body["schema"] == report.SCHEMA and body["figures"] == [
        {"model": "teacher", "value": 2.0, "error": 0.1, **known},
        {"model": "student", "value": None, "error": None, **known},
    ]
    for row in body["figures"]:
        assert all(value is None or isinstance(value, int | float | str) for value in row.values())
    assert "not finite" in text
    for key in body:  # the docstring lists every key
        assert f"\n    {key}  " in report.__doc__, key


def test_an_empty_bar_still_has_its_number():
    """0 % and "not measured" look different: a figure at the end of every bar, and none beside."""
    from matplotlib.figure import Figure

    axis, columns = Figure().subplots(), {"a": {"x": 0.0, "y": 0.5}, "b": {"y": 0.25}}
    pictures._bars(axis, columns, ["x", "y"], 100.0)
    assert [text.get_text() for text in axis.texts] == ["0.0", "50.0", "", "25.0"]


# The headline


def test_one_x_reads_every_word_once_at_scales_that_are_no_whole_number(
    tiny_dir, text_dir, tmp_path
):
    """At 1.5 x, "1x" once read 64 of every 96 tokens."""
    tokenizer, model = load_tokenizer(tiny_dir), Llama.from_pretrained(tiny_dir)
    corpus = data.load_corpus([text_dir], tokenizer, tmp_path, quiet=True)
    text = HeldOut(corpus, tokenizer, 64, 1.5, 3)
    blocks = corpus.held_out_blocks(96, 3)
    found = {row: (*mean_and_error(row, x), x.size) for row, x in text.values(model).items()}
    losses = []
    for block in blocks:
        first, last = block[None, :65], block[None, 32:]  # the second is whole; 32 of it are new
        for ids, new in ((first, 64), (last, 32)):
            h = model.hidden(ids[:, :-1])[:, -new:]
            losses.append(next_token_loss(model, h, ids[:, -new:], reduction="none").flatten())
    assert found["loss at 1x"][0] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert found["loss at 1x"][2] == found["loss at 1.5x"][2] == 3 * 96
    by_block = torch.cat(losses).view(3, 96).mean(1).double().numpy()
    error = np.std(by_block, ddof=1) / 3**0.5
    assert found["loss at 1x"][1] == pytest.approx(error, rel=1e-3)


def test_held_out_figures_are_the_mean_loss_and_the_greedy_share(tiny_dir, text_dir, tmp_path):
    tokenizer, model = load_tokenizer(tiny_dir), Llama.from_pretrained(tiny_dir)
    corpus = data.load_corpus([text_dir], tokenizer, tmp_path, quiet=True)
    found = HeldOut(corpus, tokenizer, 64, 2.0, 2).measure(model)
    blocks = corpus.held_out_blocks(128, 2)
    whole = next_token_loss(model, model.hidden(blocks[:, :-1]), blocks[:, 1:])
    assert found["loss at 2x"] == pytest.approx(whole.item(), abs=1e-5)
    cut = torch.cat([blocks[:, :65], blocks[:, 64:]])
    logits = model(cut[:, :-1])
    assert found["loss at 1x"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), cut[:, 1:].flatten()).item(),
        abs=1e-5,
    )
    right = (logits.argmax(-1) == cut[:, 1:]).double().mean()
    assert found["next-token accuracy"] == pytest.approx(right.item())


# Long text


def test_every_prediction_is_scored_once_with_enough_before_it():
    for n, width, stride in (
        (1000, 512, 256),
        (512, 512, 256),
        (100, 512, 256),
        (1025, 256, 256),
        (777, 300, 7),
    ):
        seen = []
        for begin, end, first in longtext.windows(n, width, stride):
            assert end - begin <= width and (first == 0 or first - begin >= width - stride)
            seen += range(first, end)
        assert seen == list(range(n))


def test_sliding_loss_is_the_definition():
    model, rng = random_model(), np.random.default_rng(0)
    texts = [rng.integers(0, 4095, n) for n in (50, 45)]
    for ids in texts:
        losses = longtext.sliding_loss(model, ids, 16, stride=6)
        for p in range(len(ids) - 1):  # prediction p is of token p + 1
            window = 0 if p < 16 else 6 * math.ceil((p - 15) / 6)
            h = model.hidden(torch.from_numpy(ids[None, window : p + 1]))[:, -1:]
            expected = next_token_loss(model, h, torch.tensor([[ids[p + 1]]]))
            assert losses[p] == pytest.approx(expected.item(), abs=1e-3)
    with pytest.raises(ValueError, match="a window of 128 tokens is shorter than the stride 256"):
        longtext.sliding_loss(model, texts[0], 128)


def test_documents_are_whole_and_long_enough(tiny_dir, tmp_path):
    tokenizer = load_tokenizer(tiny_dir)
    (tmp_path / "long.txt").write_text("import os\n" * 50)
    (tmp_path / "short.txt").write_text("import os\n")
    (ids,) = longtext.documents([tmp_path], tokenizer, 40, 8)
    assert ids.tolist() == tokenizer.encode("import os\n" * 50)[:41]
    with pytest.raises(
        ValueError, match=r"no document has more than 4000 tokens, the longest has \d+; shorten"
    ):
        longtext.documents([tmp_path], tokenizer, 4000, 8)


def test_loss_by_position_and_its_octaves():
    model = random_model()
    ids = np.random.default_rng(0).integers(0, 4095, 3 * 64 + 1)
    corpus = data.Corpus(ids[:0], ids, "noise")
    blocks = corpus.held_out_blocks(64, 3)
    losses = block_scores(model, blocks)[0].mean(0)
    expected = next_token_loss(
        model, model.hidden(blocks[:, :-1]), blocks[:, 1:], reduction="none"
    ).mean(0)
    assert losses == pytest.approx(expected.numpy(), abs=1e-4)
    scores = report.Scores({"model": {}})
    given = {"native": 16, "lengths": [64], "n_blocks": 3, "corpus": corpus}
    longtext.loss_by_position(Subject(None, models={"model": model}, **given), scores)
    curve = scores.more["positions"]
    assert list(scores.columns["model"]) == ["loss in 0-1x", "loss in 1-2x", "loss in 2-4x"]
    assert scores.columns["model"]["loss in 2-4x"] == pytest.approx(losses[32:].mean())
    assert len(curve["positions"]) == len(curve["model"]) == 64


@pytest.fixture
def oracle(monkeypatch, tiny_dir):
    """A generator that reads the passkey off its prompt, unless it stands in the first tenth."""
    tokenizer = load_tokenizer(tiny_dir)

    def generate(model, asked, new, stop, vocabulary):
        out = []
        for ids in asked:
            text = tokenizer.decode(ids)
            at = text.index("The pass key is ")
            key = text[at + 16 :].split(".")[0]
            out.append(tokenizer.encode(f" {key}." if at > len(text) / 10 else " no"))
        return out

    monkeypatch.setattr(prompts, "generate", generate)
    return tokenizer


def test_passkey_map(oracle, tmp_path):
    scores = report.Scores({"model": {}})
    able = [(1024, "passkey"), (1024, "vt"), (2048, "passkey")]
    asked = Prompts(oracle, able, 20, 42)
    prompts.passkey(Subject(oracle, prompts=asked, models={"model": random_model()}), scores)
    grid = scores.more["passkey"]
    assert (
        grid["lengths"] == [1024, 2048]
        and len(grid["depths"]) == 20
        and np.shape(grid["model"]) == (20, 2)
    )
    assert grid["model"][0] == [0.0, 0.0] and grid["model"][19] == [1.0, 1.0]
    assert scores.columns["model"]["passkey at 2048"] == pytest.approx(
        np.mean(np.asarray(grid["model"])[:, 1])
    )
    assert scores.columns["model"]["passkey, tokens reached"] == 2048
    assert (
        scores.facts["passkey at 1024"]["items"] == 20
        and scores.facts["passkey at 1024"]["stderr"]["model"] > 0
    )
    assert pictures.passkey(grid).startswith(b"\x89PNG")


def test_ruler_names_its_variants_and_what_is_missing(tiny_dir, monkeypatch, tmp_path):
    tokenizer, asked = load_tokenizer(tiny_dir), []

    def answers(model, tokenizer, samples):
        asked.append((samples[0].task, len(samples)))
        return [" ".join(s.outputs[:1]) for s in samples]

    monkeypatch.setattr(prompts, "answers", answers)
    scores = report.Scores({"model": {}}, out=Into(tmp_path), predictions=True)
    names = ["vt", "vt_typo", "niah_single_1", "qa_1"]
    made, lacking = prompts.feasible(tokenizer, names, [512, 1024], 2, 42, None)
    assert made.able == [
        (512, "niah_single_1"),
        (1024, "vt"),
        (1024, "vt_typo"),
        (1024, "niah_single_1"),
    ]
    prompts.ruler_means(Subject(tokenizer, prompts=made, models={"model": None}), scores)
    assert any("qa_1 needs squad.json" in why for why in lacking)
    assert any("length 512 cannot hold vt:" in why for why in lacking)
    column = scores.columns["model"]
    assert (
        column["RULER vt at 1024"] == pytest.approx(0.2)
        and column["RULER niah_single_1 at 512"] == 1.0
    )
    assert column["RULER mean of 3 tasks at 1024"] == pytest.approx((0.2 + 0.2 + 1) / 3)
    assert "'assgined'" in scores.facts["RULER vt_typo at 1024"]["version"]
    assert scores.facts["RULER niah_single_1 at 1024"]["version"] == "not RULER's: own words"
    assert asked == [("niah_single_1", 2), ("vt", 2), ("vt_typo", 2), ("niah_single_1", 2)]
    kept = [
        json.loads(line)
        for line in (tmp_path / "predictions" / "model.vt.1024.jsonl").read_text().splitlines()
    ]
    assert [row["score"] for row in kept] == [0.2, 0.2]
    with pytest.raises(ValueError, match=r"none of qa_1 can be made: qa_1 needs squad\.json"):
        prompts.feasible(tokenizer, ["qa_1"], [512], 2, 42, None)


# Diagnosis


def test_divergence_is_the_training_loss_head_by_head(tmp_path):
    teacher = random_model()
    student = make_student(teacher, teacher.config.extended("yarn", 4.0), trained=())
    ids = torch.randint(0, 4095, (2, 96), generator=torch.Generator().manual_seed(0))
    found = diagnose.divergence(teacher, student, ids)
    assert (
        found.shape == (2, 3, 4)
        and np.isnan(found[:, 1:, 2:]).all()
        and np.isfinite(found[:, 0]).all()
    )
    _, parts, _ = step.relation_loss(teacher, student, ids, torch.float32)
    assert np.nanmean(found, axis=-1) == pytest.approx(parts.numpy(), rel=1e-4)
    assert np.nanmax(diagnose.divergence(teacher, teacher, ids)) == pytest.approx(0, abs=1e-6)
    both = {"before": found, "after": found / 2}
    assert pictures.layers(both).startswith(b"\x89PNG")
    assert len(diagnose.table(both).splitlines()) == 2 + 2 + 1


# The whole run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher of 128 tokens and a student of 512."""
    folder = tmp_path_factory.mktemp("pair")
    # Of a seed whose untrained student is worse than the teacher: then a share can be recovered
    teacher = write_model(folder / "teacher", seed=5, max_position_embeddings=128)
    model = Llama.from_pretrained(teacher)
    student = make_student(model, model.config.extended("linear", 4.0), trained=())
    checkpoint.save_pretrained(student, folder / "student", tokenizer_from=teacher)
    rows = [
        {"query": f"def f{i}(x):", "choices": ["return x", "pass", "yield"], "gold": i % 3}
        for i in range(12)
    ]
    (folder / "openbookqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"context": f"def f{i}(x): return", "continuation": "x"} for i in range(6)]
    (folder / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(pair: Path, text_dir: Path, out: Path, *more: str) -> dict:
    given = f"--model {pair / 'student'} --against {pair / 'teacher'} --data {text_dir} "
    given += f"--cache {pair / 'cache'} --device cpu --blocks 2 --dtype float32 --out {out}"
    evaluation.main([*given.split(), *more])
    return json.loads((out / "report.json").read_text())


def test_same_seed_same_report_and_every_figure_says_what_it_is(pair, text_dir, tmp_path, capsys):
    wanted = (
        f"--tasks openbookqa lambada_openai boolq --task-dir {pair} --lengths 512 --ppl "
        "--positions --passkey --layers --ruler niah_single_1 --samples 2"
    ).split()
    bodies, tables = [], []
    for _ in range(2):
        bodies.append(run(pair, text_dir, tmp_path / "one", *wanted, "--predictions"))
        tables.append((tmp_path / "one" / "report.md").read_text())
        bodies[-1]["about"].pop("seconds")
    assert bodies[0] == bodies[1] and tables[0] == tables[1]
    body = bodies[0]
    assert body["columns"] == ["teacher", "untrained", "student"] and set(body["recovered"]) == {
        "student"
    }
    expected = {
        "loss at 1x",
        "loss at 4x",
        "recall at 4x",
        "openbookqa, accuracy",
        "openbookqa, accuracy normed",
    }
    expected |= {
        "lambada_openai, perplexity",
        "sliding perplexity at 512",
        "loss in 2-4x",
        "passkey at 512",
    }
    expected |= {"RULER niah_single_1 at 512", "average accuracy"}
    assert expected <= set(body["rows"])
    for row in body["rows"]:
        facts = body["facts"][row]
        assert (
            facts["version"]
            and facts["items"] > 0
            and "seed" in facts
            and facts["dtype"] == "float32"
        ), row
        assert facts["command"].startswith("python eval.py --model ") and set(
            facts["stderr"]
        ) == set(body["columns"]), row
    assert body["retention"]["average accuracy"]["items"] == 18
    assert np.shape(body["layers"]["after"][0][0]) == (4,) and np.shape(
        body["layers"]["before"][1][2]
    ) == (2,)
    assert len(body["missing"]) == 1 and body["missing"][0].startswith("boolq: expected as")
    for name in ("report.png", "passkey.png", "positions.png", "layers.png"):
        assert (tmp_path / "one" / name).read_bytes().startswith(b"\x89PNG")
    items = (tmp_path / "one" / "predictions" / "student.openbookqa.jsonl").read_text().splitlines()
    assert len(items) == 12 and set(json.loads(items[0])) == {"gold", "prediction", "logps"}
    said = capsys.readouterr()
    for line in (f"{name}: {row}" for name in body["columns"] for row in body["rows"]):
        told = re.findall(rf"^{re.escape(line)} [\d.,]+( %)?$", said.err, re.MULTILINE)
        assert len(told) == 2, f"{line} once per run"
    assert (
        "boolq: expected as" in said.err
        and "kept of the teacher" in said.out
        and "not RULER's" in said.out
    )


def test_one_model_alone(pair, tmp_path):
    evaluation.main(
        f"--model {pair / 'student'} --no-text --tasks {pair / 'openbookqa.jsonl'} --limit 4 "
        f"--device cpu --out {tmp_path}".split()
    )
    body = json.loads((tmp_path / "report.json").read_text())
    assert body["columns"] == ["model"] and body["recovered"] == {} and "retention" not in body
    assert body["facts"]["openbookqa, accuracy"]["items"] == 4


def test_a_window_shorter_than_the_stride_is_refused_at_once(pair):
    with pytest.raises(
        ValueError, match="stride, 256 tokens, and --lengths begins at 128; name longer ones"
    ):
        evaluation.main(f"--model {pair / 'student'} --ppl --lengths 512 128 --device cpu".split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "--layers",
            "--layers compares a student with its teacher; name the teacher with --against",
        ),
        ("--ruler passkey", r"--ruler passkey is not one of niah_single_1, "),
        ("--samples 0", "argument --samples: 0 is not a whole number from 1 up"),
        ("--lengths 0", "argument --lengths: 0 is not a whole number from 1 up"),
        ("--blocks 0", "argument --blocks: 0 is not a whole number from 1 up"),
        ("--scale 0.5", "--scale is 0.5; it must be from 1 to a million"),
        ("--scale 1e308", r"--scale is 1e\+308; it must be from 1 to a million"),
        ("--scale nan", "argument --scale: nan is not a number above 0"),
        (
            "--native 2147483648 --scale 2",
            "--native 2147483648 is too long to be read in one block",
        ),
        ("--ruler-seed 4294967296 --passkey", "4294967296 is not a whole number from 0 up to 2"),
        ("--seed -1", "argument --seed: -1 is not a whole number from 0 up"),
        ("--device meta", "--device meta: this program computes on cpu or cuda"),
        ("--ruler vt --ruler-data no/where", "--ruler-data no/where is not a folder"),
        ("--tasks all --task-dir no/where", "--task-dir no/where is not a folder"),
        ("--passkey --lengths 512 281474976710655", "--lengths goes up to 16,777,216"),
        ("--passkey --samples 281474976710655", "--samples goes up to 100,000"),
        ("--limit 3", "--limit changes nothing by itself: add --tasks"),
        ("--samples 3", "--samples changes nothing by itself: add --ruler or --passkey"),
        ("--predictions", "--predictions changes nothing by itself: add --out"),
        ("--new-tokens 3", "--new-tokens is of a text that is continued: add --prompt"),
        ("--prompt x --ruler", "--prompt continues a text and measures nothing: leave --ruler out"),
        ("--prompt x --scale 8", "--prompt continues a text and measures nothing: leave --scale"),
        ("--no-text", "--no-text leaves nothing to do; ask for --tasks"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        evaluation.main(["--model", str(tmp_path), *arguments.split()])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("boolq", r"none of the --tasks can be used: boolq: expected as boolq\.jsonl \(or \.gz\)"),
        ("nowhere", "--tasks nowhere is neither a file, a folder, 'all'"),
    ],
)  # fmt: skip
def test_tasks_that_are_not_there_are_refused_before_a_weight_is_read(pair, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        model = str(pair / "student")
        evaluation.main(["--model", model, "--no-text", "--tasks", arguments, "--device", "cpu"])


@pytest.mark.parametrize("more", ["", "--prompt x --new-tokens 500"])
def test_weights_that_do_not_fit_are_refused_before_any_text_is_read(
    model_copy, monkeypatch, capsys, more
):
    tensors = load_file(model_copy / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, model_copy / "model.safetensors")
    monkeypatch.setattr(data, "load_corpus", lambda *a, **k: pytest.fail("text was read"))
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        evaluation.main(["--model", str(model_copy), "--device", "cpu", *more.split()])
    assert capsys.readouterr().err == "", "nor is a warning given of what will not be"


def test_recall_is_the_likeliest_token_at_each_question(text_dir, tmp_path):
    """The demo's teacher, which answers most: read in batches as it is read one by one."""
    teacher = ROOT / "demo" / "teacher"
    model, tokenizer = Llama.from_pretrained(teacher, dtype=torch.float32), load_tokenizer(teacher)
    corpus = data.load_corpus([text_dir], tokenizer, tmp_path, quiet=True)
    lookups = Lookups(tokenizer, corpus.train)
    found, rng, expected = (
        held_out.recall(model, lookups, 512, 3),
        np.random.default_rng([3, 512]),
        [],
    )
    for _ in range(held_out.DOCUMENTS):
        ids, where = lookups.document(rng, 512, "far")
        with torch.no_grad():
            best = model(torch.from_numpy(ids[None, :-1]))[0].argmax(-1).numpy()
        expected += (best[where] == ids[where + 1]).tolist()
    assert found.tolist() == expected and sum(expected) > len(expected) / 2


# What is promised of a user's files


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def test_a_folder_that_is_not_the_evaluations_is_refused_unchanged(pair, tmp_path):
    """It once overwrote a foreign report.md."""
    asked = f"--model {pair / 'student'} --no-text --tasks {pair / 'lambada.jsonl'} --device cpu"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "report.md").write_text("a year's work")
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"--out .*own holds report\.md, which this program did not"
    ):
        evaluation.main([*asked.split(), "--out", str(tmp_path / "own")])
    assert tree(tmp_path) == before
    out = tmp_path / "new"
    for _ in range(2):  # what it wrote itself, it may replace
        evaluation.main([*asked.split(), "--out", str(out), "--predictions"])
    assert json.loads((out / folder.MARK).read_text())["program"] == "eval.py"
    (out / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"new holds notes\.txt, which this program did not write"):
        evaluation.main([*asked.split(), "--out", str(out)])
    assert tree(tmp_path) == before
    with pytest.raises(ValueError, match=r"holds --model .*student; name a folder apart"):
        evaluation.main([*asked.split(), "--out", str(pair)])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "--native 100000000",
            r"the held-out text has \d+ tokens, less than one block of 100000000",
        ),
        ("--scale 1000000", r"the held-out text has \d+ tokens, less than one block of"),
        ("--positions --lengths 5000000", "less than one block of 5000000; add --data"),
        ("--ppl --lengths 512 --documents no/where", "--documents no/where does not exist"),
        ("--ppl --lengths 512 128", "--ppl needs windows of at least its stride, 256 tokens"),
    ],
)
def test_what_the_text_cannot_give_is_refused_and_nothing_is_written(
    pair, text_dir, tmp_path, more, sentence
):
    given = f"--model {pair / 'student'} --data {text_dir} --device cpu --out {tmp_path / 'new'}"
    with pytest.raises(ValueError, match=sentence):
        evaluation.main([*given.split(), *more.split()])
    assert tree(tmp_path) == {}


def test_without_a_cache_nothing_stays_behind(pair, text_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation.main(f"--model {pair / 'student'} --data {text_dir} --device cpu --blocks 1".split())
    assert tree(tmp_path) == {}


def test_ctrl_c_is_one_line_and_code_3(pair, text_dir, tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(pair / "student")]
    command += ["--data", str(text_dir), "--device", "cpu", "--out", str(tmp_path / "new")]
    command += ["--passkey", "--samples", "2000", "--lengths", "512"]  # long enough to be stopped
    for seconds in (0.6, 2.5):  # while torch is imported; later
        run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(seconds)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate()
        if run.returncode == 0:
            continue  # it was faster
        figure = re.compile(r"model: .+ [\d.,]+( %)?")  # what was known before the stop
        lines = [line for line in said.splitlines() if "it/s" not in line and line.strip()]
        lines = [line for line in lines if not figure.fullmatch(line)]
        assert run.returncode == 3 and len(lines) == 1 and lines[0].startswith("eval.py: stopped")
        assert "Traceback" not in said and tree(tmp_path) == {}
        assert "--resume" not in said, "which is train.py's"
