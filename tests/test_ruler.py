"""RULER: prompts equal to NVIDIA's byte for byte, lengths filled, needles in place, errors.

The oracle is NVIDIA/RULER at c3f5e3b: its scripts were run unmodified on the files that `inputs`
writes, with the tokenizer `tokens`, nltk 3.10.4 (punkt_tab, english) and numpy 2.4; GOLDEN holds
the SHA-256 of what they wrote.
"""

import hashlib
import json
import random
import re

import numpy as np
import pytest

from evals import ruler, ruler_data, ruler_tasks


def tokens(text: str) -> int:
    return len(re.findall(r"\w{1,4}|[^\w\s]|\n", text))


def inputs(folder):
    """Small stand-ins, in the originals' formats, for word lists, essays and QA sets."""
    rng = random.Random(0)

    def word(low=3, high=9) -> str:
        return "".join(rng.choices("aeioulnrstkm", k=rng.randint(low, high)))

    def text(low, high) -> str:
        return " ".join(word() for _ in range(rng.randint(low, high)))

    def sentence() -> str:
        end = rng.choice([".", ".", ".", "?", "!", '."', ".)"])
        return ('"' if end == '."' else "(" if end == ".)" else "") + text(4, 18).capitalize() + end

    lists = {
        "adjectivelist.txt": [word() for _ in range(30)],
        "nounlist.txt": [word() for _ in range(50)],
    }
    lists["adjectivelist.txt"] += [
        lists["adjectivelist.txt"][3] + "-eyed",
        lists["adjectivelist.txt"][3],
    ]
    lists["verblist.txt"] = [word() for _ in range(20)]
    for name, words in lists.items():
        (folder / name).write_text("\n".join(words) + "\n")
    sentences = [sentence() for _ in range(400)]
    essays = "".join(s + rng.choice(["\n\n", " ", "  "]) for s in sentences)
    articles = []
    for _ in range(12):
        contexts = [text(15, 30) for _ in range(rng.randint(2, 14))]
        articles.append(
            {
                "paragraphs": [
                    {"context": c, "qas": [question(rng, c) for _ in "ab"]} for c in contexts
                ]
            }
        )
    titles = [
        [word().capitalize(), [text(8, 12) + ".", " " + text(8, 12) + "."]] for _ in range(60)
    ]
    hotpot = [
        {
            "question": f"Is {word()} é?",
            "answer": rng.choice(["yes", "Zoë"]),
            "context": rng.sample(titles, 10),
        }
        for _ in range(9)
    ]
    files = {
        "english_words.json": {str(i): f"{word()}{i}" for i in range(4200)},
        "PaulGrahamEssays.json": {"text": essays},
        ruler_data.SENTENCES: sentences,
        "squad.json": {"data": articles},
        "hotpotqa.json": hotpot,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def question(rng, context: str) -> dict:
    answers = [{"text": word} for word in context.split()[: rng.randint(1, 3)]]
    return {
        "question": f"What is {rng.random()}?",
        "is_impossible": rng.random() < 0.4,
        "answers": answers,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("ruler"))


def digest(rows) -> str:
    """rows: [[prompt, answer prefix, references, length]]"""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


# digests of three samples, written by the original scripts, at these (length, seed)
CASES = ((2048, 42), (4096, 42), (4096, 7))
ORIGINAL = (
    ("niah_single_1", "748959964918441c 8c918256038ea5f2 2cb4228e12153884"),
    ("niah_single_2", "20c9dc985e1978a1 2d430be7e4dfafda 6182d395a6deb4ae"),
    ("niah_single_3", "a575f80e1a646b47 e69315915ceb4302 49b05859509ea031"),
    ("niah_multikey_1", "7b8927544e7044a8 0deffab3bbbc3f7e c54dad74d314d4a8"),
    ("niah_multikey_2", "dce6c5b59367116e 833da3be78d7e1ff 153ec77a165928fe"),
    ("niah_multikey_3", "f85d5a7989e94647 9429a2b78cce0fd5 c75176da47ff5487"),
    ("niah_multivalue", "7c3abeeeac18a41d 0430a36b100a0f12 25bab7df9dd1aadf"),
    ("niah_multiquery", "6676607c7387372e bbb7a3eec768098e 0606fb0203ad2683"),
    ("vt", "322c423da272465e e8ccb6151331e6f2 c8ee28d54f2c6dec"),
    ("cwe", "e8b7fc503145ea5a 6e32fada4fcbd3f8 559b45d1a150faf1"),
    ("fwe", "f9fca0b3993e407b 37973622d2d9d194 efea88d8131ea6c5"),
    ("qa_1", "c3b56923b672cfcc 64d85b1676d5cb1b f307948d3c821cb9"),
    ("qa_2", "e930d291de2cfe00 e0a6909d17919e75 a3db9238a6a43137"),
)
GOLDEN = {
    (task, *case): expected
    for task, row in ORIGINAL
    for case, expected in zip(CASES, row.split(), strict=True)
}


@pytest.mark.parametrize(("task", "length", "seed"), GOLDEN, ids=lambda x: str(x))
def test_prompts_equal_nvidias(data, task, length, seed):
    samples = ruler.generate(task, length, 3, tokens, seed=seed, data_dir=data)
    rows = [[s.prompt, s.answer_prefix, s.outputs, s.length] for s in samples]
    assert digest(rows) == GOLDEN[task, length, seed]
    assert all(s.variant.startswith("RULER c3f5e3b") for s in samples)


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_length_is_filled(data, task, length):
    """Never over; under by one shrink (`step` units) and one unit at most.

    `unit` bounds the tokens of one.
    """
    kind = ruler_tasks.TASKS[task].kind
    essay = ruler_tasks.TASKS[task].haystack == "essay"
    unit = {"qa": 110, "fwe": 5, "cwe": 9 * (3 if length == 4096 else 1)}.get(
        kind, 3 if essay else 60
    )
    step = (
        500
        if essay
        else {"fwe": length // 32, "passkey": 1}.get(kind, 10 if kind in ("cwe", "qa") else 25)
    )
    for s in ruler.generate(task, length, 4, tokens, data_dir=data):
        assert s.length == tokens(s.prompt + s.answer_prefix) + s.max_new_tokens
        assert length - (step + 1) * unit <= s.length <= length


@pytest.mark.parametrize("task", [t for t in ruler_tasks.RULER_TASKS if not t.startswith("qa")])
def test_without_data_the_task_is_made_and_labelled(task):
    needs = {"niah_multikey_3", "vt", "fwe"}
    (sample,) = ruler.generate(task, 1024, 1, tokens)
    assert sample.variant.startswith("RULER c3f5e3b" if task in needs else "not RULER's: own words")
    assert ("noise haystack" in sample.variant) == (ruler_tasks.TASKS[task].haystack == "essay")
    assert 1024 - 200 <= sample.length <= 1024
    assert all(answer in sample.prompt for answer in sample.outputs)


def test_needles_lie_at_the_stated_depth(data):
    for task in (t for t in ruler_tasks.TASKS if t.startswith("niah")):
        for s in ruler.generate(task, 4096, 3, tokens, data_dir=data):
            assert all(f" is: {value}." in s.prompt for value in s.outputs)
            at = round(s.depth * len(s.prompt))
            assert s.prompt[at:].startswith(s.outputs[0])


def test_passkey_depths_are_a_grid():
    samples = ruler.generate("passkey", 1024, 64, tokens)
    assert [s.depth for s in samples] == pytest.approx([*np.linspace(0, 1, 32)] * 2)
    for s in samples:
        key = s.outputs[0]
        before, after = s.prompt.split(
            f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        )
        before = before.removeprefix(ruler_tasks.TASKS["passkey"].template.split("{before}")[0])
        after = after.removesuffix("\nWhat is the pass key?")
        assert s.depth == pytest.approx(
            len(before) / (len(before) + len(after)), abs=40 / len(before + after)
        )
        assert s.answer_prefix == " The pass key is"


def test_same_seed_same_prompts_and_global_state_is_left_alone(data):
    for task in ruler_tasks.TASKS:
        first = ruler.generate(task, 2048, 1, tokens, data_dir=data)
        random.seed(5)
        np.random.seed(5)
        state = random.getstate(), np.random.get_state()[1].tolist()
        assert first == ruler.generate(task, 2048, 1, tokens, data_dir=data)
        assert state == (random.getstate(), np.random.get_state()[1].tolist())
        assert first != ruler.generate(task, 2048, 1, tokens, data_dir=data, seed=43)


def test_vt_typo_differs_in_the_prefix_only_by_spelling():
    new, old = (ruler.generate(task, 2048, 2, tokens) for task in ("vt", "vt_typo"))
    for a, b in zip(new, old, strict=True):
        assert b.answer_prefix == a.answer_prefix.replace("assigned", "assgined") != a.answer_prefix
        assert "assigned" in a.variant and "assgined" in b.variant
        assert len(set(a.outputs)) == 5 and a.answer_prefix.count(" 5 variables") == 1


def test_vt_chain_leads_from_value_to_every_variable():
    for s in ruler.generate("vt", 2048, 3, tokens):
        value = re.search(r"assigned the value (\d+) in the text above\.$", s.prompt).group(1)
        text = s.prompt[s.prompt.rindex("Memorize and track") :]
        reached = re.findall(rf"VAR ([A-Z]+) = {value}\n", text)
        for _ in range(4):
            reached += re.findall(rf"VAR ([A-Z]+) = VAR {reached[-1]}\b", text)
        assert reached == s.outputs


def test_cwe_and_fwe_answers_are_the_most_frequent():
    for s in ruler.generate("cwe", 4096, 2, tokens):
        words = re.findall(
            r"\d+\. (\S+)",
            s.prompt[s.prompt.rindex("Below is a numbered") :].split("\nQuestion")[0],
        )
        assert {w for w in words if words.count(w) == 30} == set(s.outputs) and len(s.outputs) == 10
    for s in ruler.generate("fwe", 4096, 2, tokens):
        words = re.findall(
            r"\b[a-z]{6}\b", s.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
        )
        assert sorted(set(words), key=words.count)[-3:][::-1] == s.outputs


@pytest.mark.parametrize(
    ("task", "predictions", "references", "expected"),
    [
        ("cwe", ["alpha\x00BETA", " none "], [["Alpha", "beta", "gamma"], ["delta"]], 33.33),
        ("niah_single_1", ["it is 12345."], [["12345"]], 100.0),
        ("niah_multivalue", ["1111 3333"], [["1111", "2222", "3333", "4444"]], 50.0),
        ("qa_1", ["In PARIS, I think", "no"], [["Paris", "Lutetia"], ["yes", "Yes."]], 50.0),
        ("passkey", [" 31415. Remember 2", "is 3", "none"], [["31415"], ["31415"], ["3"]], 33.33),
    ],
)
def test_score(task, predictions, references, expected):
    assert ruler_tasks.score(task, predictions, references) == expected


def test_score_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="2 predictions for 1 samples"):
        ruler_tasks.score("vt", ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 predictions"):
        ruler_tasks.score("vt", [], [])
    with pytest.raises(ValueError, match="sample 1 has no references"):
        ruler_tasks.score("vt", ["a", "b"], [["a"], []])


def test_missing_names_file_and_source(tmp_path, data):
    for task, name, source in (
        ("qa_1", "squad.json", "SQuAD-explorer"),
        ("qa_2", "hotpotqa.json", "hotpot_dev"),
    ):
        assert name in ruler.missing(task) and source in ruler.missing(task)
        assert str(tmp_path) in ruler.missing(task, tmp_path)
        assert ruler.missing(task, data) is None
        with pytest.raises(FileNotFoundError, match=name):
            ruler.generate(task, 4096, 1, tokens)
    assert all(
        ruler.missing(task) is None for task in ruler_tasks.TASKS if not task.startswith("qa")
    )
    (tmp_path / "nounlist.txt").write_text("stone\n")
    with pytest.raises(
        FileNotFoundError, match=r"lacks adjectivelist\.txt: get it from .*wonderwords"
    ):
        ruler.generate("niah_single_1", 1024, 1, tokens, data_dir=tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ruler.generate("vt", 1024, 1, tokens, data_dir="nowhere")


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_a_length_too_short_names_the_least_that_works(data, task):
    with pytest.raises(
        ValueError, match=rf"length 60 cannot hold {task}: .* least that works is \d+"
    ) as caught:
        ruler.generate(task, 60, 1, tokens, data_dir=data)
    least = int(str(caught.value).split()[-1])
    (sample,) = ruler.generate(task, least, 1, tokens, data_dir=data)
    assert sample.length <= least < 1600


@pytest.mark.parametrize(
    ("name", "content", "task", "sentence"),
    [
        ("nounlist.txt", "stone\n\nriver\n", "niah_single_1", r"nounlist\.txt, line 2: a word is expected"),
        ("nounlist.txt", b"stone\n\xff\n", "niah_single_1", r"nounlist\.txt, byte 6: not UTF-8"),
        ("PaulGrahamEssays.json", '{"essay": "no"}', "niah_single_2", r"PaulGrahamEssays\.json: .*is expected"),
        (ruler_data.SENTENCES, '["Not in the essays."]', "niah_single_2", r"sentences\.json, sentence 1: not found"),
        ("english_words.json", "{\n1: 2}", "cwe", r"english_words\.json, line 2: not JSON"),
        ("english_words.json", "[1]", "cwe", r"english_words\.json: an object of number: word is expected"),
        ("squad.json", '{"data": [{"paragraphs": [{"context": "c", "qas": [{}]}]}]}', "qa_1",
         r"squad\.json, data\[0\]\.paragraphs\[0\]\.qas\[0\]: not a SQuAD row"),
        ("squad.json", '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "is_impossible": false, '
         '"answers": []}]}]}]}', "qa_1", r"qas\[0\]: no answers"),
        ("hotpotqa.json", '[{"question": "q", "answer": "a", "context": []}, {}]', "qa_2", r"row 2: not a HotpotQA"),
    ],
)  # fmt: skip
def test_malformed_data_is_named(tmp_path, name, content, task, sentence):
    inputs(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        ruler.generate(task, 4096, 1, tokens, data_dir=tmp_path)


def test_wrong_arguments_are_one_sentence(data):
    with pytest.raises(ValueError, match="unknown task 'niah'; the tasks are niah_single_1"):
        ruler.generate("niah", 4096, 1, tokens)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        ruler.generate("vt", 4096, 0, tokens)
    with pytest.raises(ValueError, match="tokenizer_len counts 0 tokens"):
        ruler.generate("vt", 4096, 1, lambda text: 0)
    with pytest.raises(ValueError, match=r"hotpotqa\.json has 9 questions"):
        ruler.generate("qa_2", 4096, 10, tokens, data_dir=data)


def test_essays_without_their_sentences_say_so(tmp_path):
    inputs(tmp_path)
    (tmp_path / ruler_data.SENTENCES).unlink()
    (sample,) = ruler.generate("niah_single_2", 4096, 1, tokens, data_dir=tmp_path)
    assert sample.variant == "not RULER's: own sentence split"


def test_essay_prefix_is_cut_at_the_word_and_repeats(data):
    words = re.sub(
        r"\s+", " ", json.loads((data / "PaulGrahamEssays.json").read_text())["text"]
    ).split(" ")
    first = ruler_data.essays_of(data, [])
    for n in (1, 2, 17, 500, len(words) - 1, len(words)):
        assert " ".join(first(n)) == " ".join(words[:n]).strip()
    assert (
        " ".join(first(len(words) + 20)).split()
        == (words + words[:20])[: len(words) - 1] + words[:20]
    )


def test_pairs_are_the_sorted_set():
    firsts, seconds = (
        ["blue", "blue-eyed", "blu", "b", "b-", "red", "red"],
        ["x", "eyed-x", "a", "x", "-z"],
    )
    pairs = ruler_data.Pairs(firsts, seconds)
    assert list(pairs) == sorted({f"{a}-{b}" for a in firsts for b in seconds})
