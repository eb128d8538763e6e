"""Tasks: requests as the harness makes them, scores as transformers gives them, errors by line.

REQUESTS holds what the harness (0.4.13, its own yaml files) makes of the rows; it was compared by
running both.
"""

import gzip
import json
import math
import os
import re
import statistics

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Fast

from evals import likelihood, report, tasks
from hub.tokenizer import load_tokenizer
from model import Llama

LABELS = {"text": ["in the sea", "on land"], "label": ["A", "B"]}
ROWS = {
    "lambada_openai": {"text": 'He said: "go home" and they\n\nwent  home'},
    "piqa": {"goal": "open a jar ", "sol1": "turn the lid", "sol2": "hit it.", "label": 1},
    "arc_easy": {"id": "1", "question": "Where do fish live?", "choices": LABELS, "answerKey": "B"},
    "arc_challenge": {
        "id": "1",
        "question": "Where?",
        "choices": {"text": ["here", "there"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "hellaswag": {
        "ind": 4,
        "activity_label": "Baking",
        "ctx_a": "A man [substep] stands. [title] He",
        "ctx_b": "the Oven",
        "endings": ["opens it [step] now.", " sits  down."],
        "label": "1",
    },
    "copa": {
        "premise": "It rained. ",
        "choice1": "The street got wet.",
        "choice2": "I slept.",
        "question": "effect",
        "idx": 0,
        "label": 0,
    },
    "commonsense_qa": {
        "id": "1",
        "question": " Where is a fish? ",
        "question_concept": "fish",
        "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "car", "bag", "sun"]},
        "answerKey": "A",
    },
    "wsc": {
        "text": "Mark told Pete ( a friend ) many lies , which he didn 't believe .",
        "span1_index": 0,
        "span1_text": "Mark",
        "span2_index": 11,
        "span2_text": "he",
        "idx": 0,
        "label": 0,
    },
    "wsc273": {
        "text": "The cup broke.  Her mother fixed it because her hands were steady.",
        "pronoun": "her",
        "pronoun_loc": 43,
        "quote": "her hands",
        "options": ["The cup", "The mother"],
        "label": 1,
        "source": "x",
    },
    "winogrande": {
        "sentence": "Ann thanked Eva because _ had helped.",
        "option1": "Ann",
        "option2": "Eva",
        "answer": "2",
    },
    "openbookqa": {"id": "7", "question_stem": "Fish live", "choices": LABELS, "answerKey": "A"},
    "boolq": {"question": "is it wet", "passage": "Water is wet.", "idx": 0, "label": 1},
    "social_iqa": {
        "context": "Ann ran.",
        "question": "Why?",
        "answerA": "to win",
        "answerB": "to lose",
        "answerC": "no",
        "label": "3",
    },
    "mathqa": {
        "Problem": "what is 1 + 1 ?",
        "options": "a ) 2 , 000 , b ) 3 , c ) rs . 4 , d ) 1 / 2 , e ) none of these",
        "correct": "c",
    },
}
REQUESTS = {
    "lambada_openai": ([('He said: "go home" and they\n\nwent ', " home")], 0),
    "piqa": (
        [
            ("Question: open a jar \nAnswer:", " turn the lid"),
            ("Question: open a jar \nAnswer:", " hit it."),
        ],
        1,
    ),
    "arc_easy": (
        [
            ("Question: Where do fish live?\nAnswer:", " in the sea"),
            ("Question: Where do fish live?\nAnswer:", " on land"),
        ],
        1,
    ),
    "arc_challenge": (
        [("Question: Where?\nAnswer:", " here"), ("Question: Where?\nAnswer:", " there")],
        1,
    ),
    "hellaswag": (
        [
            ("Baking: A man stands.. He The oven", " opens it now."),
            ("Baking: A man stands.. He The oven", " sits down."),
        ],
        1,
    ),
    "winogrande": (
        [
            ("Ann thanked Eva because Ann", " had helped."),
            ("Ann thanked Eva because Eva", " had helped."),
        ],
        1,
    ),
    "copa": (
        [
            ("It rained therefore", "  the street got wet."),
            ("It rained therefore", "  i slept."),
        ],
        0,
    ),
    "commonsense_qa": (
        [
            (
                "Question: Where is a fish?\nA. sea\nB. sky\nC. car\nD. bag\nE. sun\nAnswer:",
                f" {letter}",
            )
            for letter in "ABCDE"
        ],
        0,
    ),
    "wsc": (
        [
            (
                "Passage: Mark told Pete (a friend) many lies, which *he* didn't believe.\n"
                'Question: In the passage above, does the pronoun "*he*" refer to "*Mark*"?\nAnswer:',
                answer,
            )
            for answer in (" no", " yes")
        ],
        0,
    ),
    "wsc273": (
        [
            (f"The cup broke. Her mother fixed it because {name}'s", "  hands were steady.")
            for name in ("the cup", "the mother")
        ],
        1,
    ),
    "openbookqa": ([("Fish live", " in the sea"), ("Fish live", " on land")], 0),
    "boolq": (
        [
            ("Water is wet.\nQuestion: is it wet?\nAnswer:", " no"),
            ("Water is wet.\nQuestion: is it wet?\nAnswer:", " yes"),
        ],
        1,
    ),
    "social_iqa": (
        [
            ("Q: Ann ran. Why?\nA:", " to win"),
            ("Q: Ann ran. Why?\nA:", " to lose"),
            ("Q: Ann ran. Why?\nA:", " no"),
        ],
        2,
    ),
    "mathqa": (
        [
            ("Question: what is 1 + 1 ?\nAnswer:", f" {o}")
            for o in ("2", "3", "rs . 4", "1 / 2", "none of these")
        ],
        2,
    ),
}


def write(file, rows):
    opened = gzip.open(file, "wt") if file.suffix == ".gz" else file.open("w")
    with opened as f:
        f.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ROWS)
def test_requests_equal_the_harness(tmp_path, name):
    task = tasks.load(write(tmp_path / f"{name}.jsonl.gz", [ROWS[name]]))
    assert (list(task.items[0].requests), task.items[0].gold) == REQUESTS[name]
    assert (
        task.name == name
        and task.version.startswith("lm-eval ")
        and task.metrics == tasks.DATASETS[name].metrics
    )


def mmlu_row(i, subject="high_school_physics"):
    return {
        "question": f" q{i}?\n",
        "subject": subject,
        "choices": [f"w{i}", "x", "y", "z"],
        "answer": i % 4,
    }


def test_mmlu_shows_its_first_five_dev_rows_in_order(tmp_path):
    write(tmp_path / "mmlu_dev.jsonl", [mmlu_row(9, "law"), *(mmlu_row(i) for i in range(6))])
    task = tasks.load(write(tmp_path / "mmlu.jsonl", [mmlu_row(7)]))
    head = (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
    )
    shots = "".join(
        f"q{i}?\nA. w{i}\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[i % 4]}\n\n" for i in range(5)
    )
    context = head + shots + "q7?\nA. w7\nB. x\nC. y\nD. z\nAnswer:"
    assert task.items[0].requests == tuple((context, f" {letter}") for letter in "ABCD")
    assert task.items[0].gold == 3 and task.metrics == ("accuracy",)


def test_plain_layouts_and_names(tmp_path):
    rows = [
        {"query": "Question: Why?\n", "choices": ["a", "bc"], "gold": 1},
        {"query": "It", "choices": ["a"], "gold": 0},
    ]
    one, two = tasks.load(write(tmp_path / "openbook_qa.jsonl", rows)).items
    assert one.requests == (("Question: Why?\nAnswer:", " a"), ("Question: Why?\nAnswer:", " bc"))
    assert one.characters == (1, 2) and two.requests == (("It", " a"),)
    task = tasks.load(
        write(tmp_path / "mine.jsonl", [{"context": "a b ", "continuation": "\n\nc"}])
    )
    assert task.items[0].requests == (("a b ", " \n\nc"),) and task.metrics == (
        "accuracy",
        "perplexity",
    )
    assert task.version.startswith("own task")


# Scores


def items(n=24):
    rng, words = (
        np.random.default_rng(0),
        ["the", "def", "return", "self", "import", "of", "and", "12", "(x)", "é"],
    )

    def some(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    rows = [
        {"query": some(1, 40), "choices": [some(1, 6) for _ in range(3)], "gold": 0}
        for _ in range(n)
    ]
    rows += [
        {"query": some(90, 120) + "\n ", "choices": ["a", "b"], "gold": 1}
    ]  # longer than the model
    return [
        *rows,
        {"query": "", "choices": ["the def", "self"], "gold": 1},
    ]  # nothing before the choice


@pytest.fixture(params=[False, True], ids=["no BOS", "BOS"])
def folder(model_copy, request):
    if request.param:
        (model_copy / "tokenizer.tiktoken").unlink()
        file = model_copy / "tokenizer.json"
        bos = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
        shape = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|end|>": {"id": "<|end|>", "ids": [4095], "tokens": ["<|end|>"]}}
        template = {
            "type": "TemplateProcessing",
            "single": shape,
            "pair": shape,
            "special_tokens": special,
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": template}))
        (model_copy / "tokenizer_config.json").write_text("{}")
    return model_copy


def one_at_a_time(model, encode, context, continuation):
    """The harness' rule at its plainest, with transformers' model and the tokenizers library."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if context:
        whole, n = encode(context + continuation).ids, len(encode(context).ids)
    else:
        whole, n = [4095, *encode(continuation, add_special_tokens=False).ids], 1
    goal = torch.tensor(whole[n:])
    with torch.no_grad():
        logits = model(torch.tensor([whole[-65:][:-1]])).logits[0].log_softmax(-1)[-len(goal) :]
    return logits.gather(1, goal[:, None]).sum().item(), bool((logits.argmax(-1) == goal).all())


def test_scores_equal_transformers_one_at_a_time(folder, tmp_path):
    task = tasks.load(write(tmp_path / "mine.jsonl", items()))
    model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encode = Fast.from_file(str(folder / "tokenizer.json")).encode
    requests = likelihood.encode(tokenizer, task.pairs)
    result = likelihood.score(model, requests, task)
    for item, logps, greedy, chosen in zip(
        task.items, result.logps, result.greedy, result.predictions, strict=True
    ):
        expected = [one_at_a_time(theirs, encode, *request) for request in item.requests]
        assert logps == pytest.approx([s for s, _ in expected], abs=1e-3)
        assert greedy.tolist() == [g for _, g in expected]
        assert chosen == int(np.argmax([s for s, _ in expected]))
    characters = [[len(c) - 1 for _, c in item.requests] for item in task.items]
    normed = [
        int(np.argmax(s / np.asarray(n))) for s, n in zip(result.logps, characters, strict=True)
    ]
    gold = [item.gold for item in task.items]
    assert result.values["mine, accuracy"].tolist() == (result.predictions == gold).tolist()
    assert result.values["mine, accuracy normed"].tolist() == (np.asarray(normed) == gold).tolist()


def test_a_greedy_last_word_is_right(tiny_dir, tmp_path):
    model, tokenizer = Llama.from_pretrained(tiny_dir), load_tokenizer(tiny_dir)
    rows = []
    for i in range(200):  # contexts whose most likely next token reads as a word
        ids = tokenizer.encode(f"def f{i}(x):")
        word = tokenizer.decode([model(torch.tensor([ids]))[0, -1].argmax().item()])
        if (
            word.startswith(" ")
            and word.strip().isalpha()
            and tokenizer.encode(f"def f{i}(x):{word}")[:-1] == ids
        ):
            rows += [
                {"context": f"def f{i}(x):", "continuation": word[1:]},
                {"context": f"def f{i}(x):", "continuation": "zq"},
            ]
        if len(rows) >= 6:
            break
    assert rows
    task = tasks.load(write(tmp_path / "lambada.jsonl", rows))
    requests = likelihood.encode(tokenizer, task.pairs)
    result = likelihood.score(model, requests, task)
    assert result.values["lambada_openai, accuracy"].tolist() == [1.0, 0.0] * (len(rows) // 2)
    found = {row: report.mean_and_error(row, x) for row, x in result.values.items()}
    logps = [float(s[0]) for s in result.logps]
    perplexity, error = found["lambada_openai, perplexity"]
    assert perplexity == pytest.approx(math.exp(-statistics.mean(logps)))
    assert error == pytest.approx(perplexity * statistics.stdev(logps) / len(logps) ** 0.5)
    right, error = found["lambada_openai, accuracy"]
    assert (right, error) == (
        0.5,
        pytest.approx(statistics.stdev([1.0, 0.0] * (len(rows) // 2)) / len(rows) ** 0.5),
    )


def test_batches_do_not_change_the_scores_and_equal_inputs_are_read_once(tiny_dir, monkeypatch):
    model, tokenizer = Llama.from_pretrained(tiny_dir), load_tokenizer(tiny_dir)
    pairs = [("The answer is one of", f" {letter}") for letter in "ABCD"] + [
        ("if", " x"),
        ("if not self", ".value = 3"),
    ]
    requests = likelihood.encode(tokenizer, pairs)
    alone = [likelihood.likelihoods(model, [one])[0] for one in requests]
    rows = []
    hidden = Llama.hidden
    monkeypatch.setattr(
        Llama, "hidden", lambda self, ids, *a: rows.append(len(ids)) or hidden(self, ids, *a)
    )
    for tokens in (1, 16, 4096):
        rows.clear()
        together = likelihood.likelihoods(model, requests, tokens)
        assert [s for s, _ in together] == pytest.approx([s for s, _ in alone], abs=1e-4)
        assert sum(rows) == 3


# Errors


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("piqa", "{'goal': 1}", r"line 2: not a task row, it is no JSON"),
        ("piqa", "[1]", r"line 2: not a task row, it is no JSON object"),
        ("piqa", {"goal": "a", "sol1": "b", "label": 0}, r"line 2: not a task row \(PIQA\), it lacks 'sol2'"),
        ("piqa", ROWS["piqa"] | {"goal": 3}, r"line 2: not a task row \(PIQA\): goal is 3, not text"),
        ("piqa", ROWS["piqa"] | {"label": -1}, r"line 2: .*label is -1, not an answer; take the split that has"),
        ("piqa", ROWS["piqa"] | {"label": 2}, r"line 2: .*the answer is number 2 of 2 choices"),
        ("piqa", ROWS["piqa"] | {"goal": "a \ud83d"}, r"line 2: .*goal holds half a character"),
        ("piqa", '{"goal": ' + "9" * 5000 + "}", r"line 2: not a task row, Exceeds the limit"),
        ("piqa", "[" * 100_000, r"line 2: not a task row, it is nested too deeply"),
        ("copa", ROWS["copa"] | {"question": "why"}, r"line 2: .*neither 'cause' nor 'effect'"),
        ("commonsense_qa", ROWS["commonsense_qa"] | {"answerKey": "F"}, r"line 2: not a task row"),
        ("wsc273", ROWS["wsc273"] | {"label": 2}, r"line 2: .*number 2 of 2 contexts"),
        ("hellaswag", ROWS["hellaswag"] | {"label": ""}, r"line 2: .*label is '', not an answer"),
        ("arc_easy", ROWS["arc_easy"] | {"answerKey": "E"}, r"line 2: .*answerKey is 'E', not one of \['A', 'B'\]"),
        ("arc_easy", ROWS["arc_easy"] | {"choices": {"text": ["a"]}}, r"line 2: .*it lacks 'label'"),
        ("winogrande", ROWS["winogrande"] | {"sentence": "no blank"}, r"line 2: .*has no _ for the name"),
        ("winogrande", ROWS["winogrande"] | {"answer": "3"}, r"line 2: .*answer is '3', not 1 or 2"),
        ("mathqa", ROWS["mathqa"] | {"correct": "z"}, r"line 2: not a task row \(MathQA\)"),
        ("social_iqa", ROWS["social_iqa"] | {"label": "4"}, r"line 2: .*number 3 of 3 choices"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_by_line(tmp_path, name, row, sentence):
    with pytest.raises(ValueError, match=sentence):
        tasks.load(write(tmp_path / f"{name}.jsonl", [ROWS[name], row]))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist; a task is"):
        tasks.load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"holds no items"):
        tasks.load(write(tmp_path / "empty.jsonl", []))
    said = (
        r"line 1: not a task row, its keys 'a', 'b' are those of no layout in .*formats\.py.*gold"
    )
    with pytest.raises(ValueError, match=said):
        tasks.load(write(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}]))
    whole = write(tmp_path / "piqa.jsonl.gz", [ROWS["piqa"]] * 50).read_bytes()
    (tmp_path / "piqa.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"piqa\.jsonl\.gz is damaged"):
        tasks.load(tmp_path / "piqa.jsonl.gz")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bytes\.jsonl is not UTF-8"):
        tasks.load(tmp_path / "bytes.jsonl")
    with pytest.raises(
        ValueError, match=r"needs its five examples in .*mmlu_dev\.jsonl .*split='dev'"
    ):
        tasks.load(write(tmp_path / "mmlu.jsonl", [mmlu_row(0)]))
    write(tmp_path / "mmlu_dev.jsonl", [mmlu_row(i) for i in range(4)])
    with pytest.raises(
        ValueError, match=r"line 1: .*the dev file has 4 rows of subject 'high_school_physics'; 5"
    ):
        tasks.load(tmp_path / "mmlu.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    file = tmp_path / "piqa.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS["piqa"]).encode())
    assert (
        tasks.load(file).items
        == tasks.load(write(tmp_path / "piqa.jsonl.gz", [ROWS["piqa"]])).items
    )


def test_limit_reads_no_further(tmp_path):
    file = write(tmp_path / "piqa.jsonl", [ROWS["piqa"], ROWS["piqa"], "broken"])
    assert len(tasks.load(file, 2).items) == 2


def test_missing_sets_are_listed_with_file_and_source(tmp_path):
    write(tmp_path / "piqa.jsonl.gz", [ROWS["piqa"]])
    write(tmp_path / "siqa.jsonl", [ROWS["social_iqa"]])
    for words, folder in ((["all"], tmp_path), ([str(tmp_path)], None)):
        found, lacking = tasks.find(words, folder, None)
        assert [task.name for task in found] == ["piqa", "social_iqa"]
        names, places, command = re.fullmatch(
            r"(.*): expected as (.*) \(or \.gz\); made, after pip install datasets, by  (.*)",
            *lacking,
        ).groups()
        left = [name for name in tasks.DATASETS if name not in ("piqa", "social_iqa")]
        assert names.split(", ") == left
        assert places.split() == [str(tmp_path / f"{name}.jsonl") for name in left]
        assert command.count(".to_json(") == len(left) + 1  # MMLU's examples
        assert "load_dataset('aps/super_glue', 'boolq'" in command and "piqa" not in command
        assert "split='dev').to_json('mmlu_dev.jsonl')" in command
    found, lacking = tasks.find(["piqa", str(tmp_path / "siqa.jsonl")], tmp_path, None)
    assert len(found) == 2 and not lacking
    wrong = "--tasks piq is neither a file, a folder, 'all', nor one of lambada_openai"
    with pytest.raises(ValueError, match=wrong):
        tasks.find(["piq"], tmp_path, None)


def test_a_bad_file_among_all_is_left_out_and_one_that_is_named_is_refused(tmp_path):
    write(tmp_path / "piqa.jsonl", [ROWS["piqa"]])
    write(tmp_path / "boolq.jsonl", [{"passage": "a"}])
    write(tmp_path / "hellaswag.jsonl", ["[" * 100_000])
    for words, folder in ((["all"], tmp_path), ([str(tmp_path)], None)):
        found, lacking = tasks.find(words, folder, None)
        assert [task.name for task in found] == ["piqa"]
        assert any("boolq.jsonl, line 1: not a task row, its keys" in line for line in lacking)
        assert any("line 1: not a task row, it is nested too deeply" in line for line in lacking)
    for named in ("boolq", str(tmp_path / "boolq.jsonl")):
        with pytest.raises(ValueError, match=r"boolq\.jsonl, line 1: not a task row, its keys"):
            tasks.find(["piqa", named], tmp_path, None)


def test_a_score_is_labelled_by_its_layout_not_by_its_file(tmp_path):
    plain = {"query": "Is it?", "choices": ["no", "yes"], "gold": 1}
    task = tasks.load(write(tmp_path / "boolq.jsonl", [plain]))
    assert task.name == "boolq" and task.metrics == ("accuracy",)
    assert task.version == "own task, query/choices/gold, not lm-eval's prompts"
    assert tasks.load(write(tmp_path / "mine.jsonl", [ROWS["boolq"]])).version.startswith(
        "own task"
    )
    mine = tasks.load(write(tmp_path / "mine.jsonl", [{"text": "a b c"}]))
    assert mine.version == "own task, LAMBADA, not lm-eval's prompts"
    assert [said[:22] for said in tasks.notes([task, mine])] == [
        "boolq: own task, query",
        "mine: own task, LAMBAD",
    ]
    assert tasks.load(write(tmp_path / "boolq.jsonl", [ROWS["boolq"]])).version == "lm-eval 2.0"
    asked = {"context_options": ["Ann ran; Ann", "Ann ran; Eva"], "continuation": "won", "gold": 0}
    task = tasks.load(write(tmp_path / "winogrande.jsonl", [asked]))
    assert task.items[0].requests == (("Ann ran; Ann", " won"), ("Ann ran; Eva", " won"))
    assert task.metrics == ("accuracy",) and task.version.startswith("own task, context_options")


def test_a_tasks_name_can_be_written_whatever_its_files_is(tmp_path):
    """report.md, which has it, could not be."""
    file = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    file.write_text(json.dumps({"query": "a", "choices": [" b", " c"], "gold": 0}) + "\n")
    assert tasks.load(file).name == "caf\ufffd"
