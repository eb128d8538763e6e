"""Text to blocks: sources, order, held-out text, tokenizers, look-up documents, and what bad input
gets.
"""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TEACHER

from engine import data, default_text
from engine.lookups import PAIRS, Lookups
from hub.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return load_tokenizer(tiny_dir)


def corpus_of(paths, tokenizer, tmp_path):
    return data.load_corpus(paths, tokenizer, tmp_path / "cache", quiet=True)


def test_every_kind_of_source_and_the_end_token(tokenizer, tmp_path):
    texts = {
        "a.txt": "one two",
        "b.md": "three",
        "c.py": "four()",
        "d.jsonl": "five",
        "e.jsonl.gz": "six",
        "g.csv": "seven",
    }
    for name, text in texts.items():
        row = json.dumps({"text": text}) + "\n"
        table = f'\ufeffid,text,more\r\n1,"{text}",x\r\n'  # as spreadsheets write it
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(row.encode()))
        else:
            plain = table if "csv" in name else text
            (tmp_path / name).write_text(row if "jsonl" in name else plain)
    np.save(tmp_path / "f.npy", np.array([7, 8, 9]))
    corpus = corpus_of([tmp_path], tokenizer, tmp_path)
    stream = np.concatenate([corpus.train, corpus.held_out]).tolist()
    for text in texts.values():
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        assert any(stream[i : i + len(ids)] == ids for i in range(len(stream))), text
    assert len(stream) == sum(len(tokenizer.encode(t)) + 1 for t in texts.values()) + 3


def test_the_order_is_a_function_of_seed_and_step(tokenizer, text_dir, tmp_path):
    corpus = corpus_of([text_dir], tokenizer, tmp_path)
    n = corpus.blocks(32)
    one = corpus.batch(0, 0, 2 * n, 32)
    assert torch.equal(one[5:9], corpus.batch(0, 5, 4, 32)), "any slice of a run is the same blocks"
    assert not torch.equal(one, corpus.batch(1, 0, 2 * n, 32))
    for epoch in (one[:n], one[n:]):
        assert len({tuple(row.tolist()) for row in epoch}) >= 0.95 * n, (
            "an epoch visits every block once"
        )
    assert not torch.equal(one[:n], one[n:]), "epochs differ"
    assert torch.equal(one[0, 1:], torch.from_numpy(np.asarray(one[0, 1:])))


def test_held_out_text_never_trains(tokenizer, text_dir, tmp_path):
    files = data.find_files([text_dir])
    kept = [(n, np.full(100, i)) for i, (n, _) in enumerate(files)]
    train, held = data.split(kept)
    assert len(held) and not set(train) & set(held) and len(train) + len(held) == 100 * len(kept)


def test_one_long_document_holds_out_its_end():
    train, held = data.split([("book.txt", np.arange(1000))])
    assert held.tolist() == list(range(950, 1000)) and len(train) == 950


def test_tokenised_once(tokenizer, text_dir, tmp_path, monkeypatch):
    first = corpus_of([text_dir], tokenizer, tmp_path)
    monkeypatch.setattr(data, "_tokenise", lambda *a: pytest.fail("the cache was not used"))
    again = corpus_of([text_dir], tokenizer, tmp_path)
    assert np.array_equal(first.train, again.train) and isinstance(again.train, np.memmap)


def test_the_default_is_pinned_sources_without_tests():
    names = [n for n, _ in data.find_files([])]
    assert "sympy/core/add.py" in names and len(names) > 300
    assert not any("site-packages" in n or "/tests/" in n for n in names)
    assert f"\nsympy=={default_text.VERSION} " in (ROOT / "requirements.txt").read_text()


def test_the_default_is_the_same_bytes_or_refused(tmp_path, monkeypatch):
    for name, file in default_text.find_files():
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    root = tmp_path / "sympy"
    tests = root / "core" / "tests"
    tests.mkdir()
    (tests / "test_add.py").write_text("not read")
    assert [n for n, _ in default_text.find_files(root)] == [
        n for n, _ in default_text.find_files()
    ]
    changed = root / "core" / "add.py"
    whole = changed.read_bytes()
    changed.write_bytes(whole + b"\n")
    with pytest.raises(ValueError, match=r"holds others; pip install sympy==.*, or give --data"):
        default_text.find_files(root)
    changed.write_bytes(whole)
    (root / "more.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="holds others"):
        default_text.find_files(root)
    (root / "more.py").rename(root / "core" / "add.py")
    with pytest.raises(ValueError, match="holds others"):
        default_text.find_files(root)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; pip install sympy==.*, or give --data"):
        data.find_files([])


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.txt", b"", "the text is empty"),
        ("x.txt", b"\xff\xfe\x00bad", "not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "line 2: not JSON"),
        ("x.jsonl", b'{"txt": "a"}\n', "line 1: no string field `text`"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "damaged"),
        ("x.pdf", b"x", "unknown kind of file"),
        ("x.csv", b"id,txt\n1,a\n", "line 2: no column `text`"),
        ("x.csv", b"id,text\n1\n", "line 2: no column `text`"),
        ("x.csv", b'id,text\n1,"a', "after line 1: unexpected end of data"),
        ("x.csv", b"text\n\xff\n", "not UTF-8"),
    ],
)
def test_bad_text_is_named(tokenizer, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as e:
        corpus_of([tmp_path / name], tokenizer, tmp_path)
    assert name.split(".")[0] in str(e.value)


def test_a_cell_of_a_csv_may_have_commas_quotes_lines_and_a_books_length(tmp_path):
    text = 'one, "two"\nthree ' * 20_000
    with (tmp_path / "x.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["text", "id"], [text, 1], ["four", 2]])
    found = list(data.documents([("x.csv", tmp_path / "x.csv")]))
    assert found == [("x.csv:1", text), ("x.csv:2", "four")]


def test_names_need_not_be_utf8(tokenizer, tmp_path):
    file = tmp_path / os.fsdecode(b"\xff.txt")
    file.write_text("one two three " * 9)
    whole = corpus_of([tmp_path], tokenizer, tmp_path)
    assert len(whole.train) + len(whole.held_out) == len(tokenizer.encode(file.read_text())) + 1


def test_missing_empty_and_foreign_sources_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        corpus_of([tmp_path / "nothing"], tokenizer, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text in"):
        corpus_of([tmp_path / "empty"], tokenizer, tmp_path)
    np.save(tmp_path / "x.npy", np.array([5, 5000]))
    with pytest.raises(ValueError, match="holds the id 5000"):
        corpus_of([tmp_path / "x.npy"], tokenizer, tmp_path)
    np.save(tmp_path / "y.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one row of integer ids"):
        corpus_of([tmp_path / "y.npy"], tokenizer, tmp_path)


def test_a_block_longer_than_the_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a few words only " * 20)
    corpus = corpus_of([tmp_path / "x.txt"], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="longer than all the text"):
        corpus.blocks(4096)
    with pytest.raises(ValueError, match="held-out text has"):
        corpus.held_out_blocks(4096, 1)


def test_lookups_ask_after_they_tell(tokenizer):
    filler = np.full(9000, 5, dtype=np.uint16)
    lookups = Lookups(tokenizer, filler)
    for T, spread in ((512, "far"), (4096, "far"), (512, "anywhere")):
        ids, where = lookups.document(np.random.default_rng(0), T, spread)
        assert len(ids) == T + 1 and len(where) >= PAIRS
        for w in where:
            key, value = ids[w], ids[w + 1]
            told = [i for i in range(w - 1) if ids[i] == key and ids[i + 1] == value]
            assert told, "the value stands beside its key before the question"
            assert spread != "far" or w - told[0] > 0.6 * T


def test_tiktoken_and_tokenizers_agree_on_the_demos_vocabulary():
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(TEACHER / "tokenizer.json"))
    ours = load_tokenizer(TEACHER)
    assert ours.kind == "tiktoken" and ours.size == 4096
    source = dict(default_text.find_files())["sympy/core/function.py"].read_text()
    text = source + " naïve ünïcode 12345 \t\r\n  ☃"
    assert ours.encode(text) == fast.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_long_runs_without_spaces_do_not_hang(tokenizer):
    began = time.monotonic()
    for text in ("a" * 300_000, " " * 300_000, "ab1!" * 75_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - began < 60


def test_special_tokens_in_a_text_are_ordinary_characters(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("a <|end|> b")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.model", "YQ== 0\n", "lacks one of the 256"),
        ("tokenizer.model", "\x0a\x0bsentencepiece", "sentencepiece"),
        ("vocab.txt", "a", "no tokenizer.json"),
    ],
)
def test_bad_tokenizers_are_named(tmp_path, name, content, said):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)


def test_mixed_lookups_are_a_function_of_seed_and_number(tokenizer):
    lookups = Lookups(tokenizer, np.full(9000, 5, dtype=np.uint16))
    plain = torch.full((40, 513), 7)
    mixed = lookups.mix(plain.clone(), 3, 0, 0.25)
    replaced = [(row != 7).any().item() for row in mixed]
    assert 3 <= sum(replaced) <= 20
    assert torch.equal(mixed[10:20], lookups.mix(plain[10:20].clone(), 3, 10, 0.25))
    assert torch.equal(plain, lookups.mix(plain.clone(), 3, 0, 0.0))
    assert not torch.equal(mixed, lookups.mix(plain.clone(), 4, 0, 0.25))


def test_another_end_token_is_another_cache(model_copy, text_dir, tmp_path):
    first = corpus_of([text_dir], load_tokenizer(model_copy), tmp_path)
    config = json.loads((model_copy / "config.json").read_text()) | {"eos_token_id": 7}
    (model_copy / "config.json").write_text(json.dumps(config))
    again = corpus_of([text_dir], load_tokenizer(model_copy), tmp_path)
    assert (first.train == 4095).sum() == (again.train == 7).sum() - (first.train == 7).sum() > 0


@pytest.mark.parametrize("eos", [None, -3, 4096, 10**6, "x"])
def test_an_end_token_outside_the_vocabulary_is_refused(model_copy, eos):
    config = json.loads((model_copy / "config.json").read_text()) | {"eos_token_id": eos}
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="eos_token_id"):
        load_tokenizer(model_copy)


def test_an_empty_npy_is_named(tokenizer, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.npy is not a plain numpy array"):
        corpus_of([tmp_path / "x.npy"], tokenizer, tmp_path)


# ---- which files, which rows, which field


def rows(*texts, key="text", **more) -> bytes:
    return "".join(json.dumps({key: text, **more}) + "\n" for text in texts).encode()


def test_what_a_folder_holds_beside_is_left_out_and_said(tokenizer, tmp_path):
    text = tmp_path / "text"
    for name in (".ipynb_checkpoints/a-checkpoint.txt", ".git/b.txt", "c.txt", "sub/d.md"):
        (text / name).parent.mkdir(parents=True, exist_ok=True)
        (text / name).write_text(f"words of {name} " * 20)
    for name in ("e.json", "f.pdf", ".g.txt", "sub/.h.md"):
        (text / name).write_text("[]")
    assert [n for n, _ in data.find_files([text])] == ["c.txt", "sub/d.md"]
    corpus = corpus_of([text], tokenizer, tmp_path)
    said = " ".join(corpus.notes)
    assert "left out 4 hidden files and folders" in said and ".git" in said
    assert "left out 2 files of kinds that are not read" in said and "e.json" in said
    assert corpus.notes == corpus_of([text], tokenizer, tmp_path).notes, "also from the cache"
    named = data.find_files([text / ".ipynb_checkpoints"])
    assert [n for n, _ in named] == ["a-checkpoint.txt"], "a folder that is named is read"


def test_equal_documents_fall_on_one_side(tokenizer, tmp_path):
    """Whatever their names; and nobody else moves for it."""
    plain = [(f"doc{i}.txt", np.full(50, i)) for i in range(100)]
    train, held = data.split(plain)
    copies = [(f"copy/of/doc{i}.txt", np.full(50, i)) for i in range(100)]
    for kept in (sorted(plain + copies), sorted(plain + copies, reverse=True)):
        seen, out = data.split(kept)
        assert not set(seen) & set(out) and len(seen) + len(out) == 100 * 100
    assert set(data.split(plain + copies)[1]) == set(held)
    few = [(f"{i}", np.arange(10) + i % 3) for i in range(9)]  # no name of these is held out
    train, held = data.split(few)
    assert len(train) + len(held) == 30, "where the end is held out, each document counts once"


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.md", "x.py", "x.jsonl", "x.csv"])
def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path, name):
    content = {"x.jsonl": '{"text": "some words"}\n', "x.csv": "text\nsome words\n"}
    raw = b"\xef\xbb\xbf" + content.get(name, "some words").encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    ((_, text),) = data.documents([(name, tmp_path / name)])
    assert text == "some words"


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
def test_null_rows_are_skipped_and_counted(tokenizer, tmp_path, name):
    values = ["one two three " * 9, None, "four five six " * 9, None]
    if name == "x.jsonl":
        (tmp_path / name).write_bytes(rows(*values))
    elif name == "x.csv":
        lines = "".join(f"{n},{text or ''}\r\n" for n, text in enumerate(values))
        (tmp_path / name).write_text("n,text\r\n" + lines)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"n": range(4), "text": values}), tmp_path / name)
    for _ in range(2):  # the second is of the cache
        corpus = corpus_of([tmp_path / name], tokenizer, tmp_path)
        (note,) = corpus.notes
        where = {"x.jsonl": "line 2", "x.csv": "line 3", "x.parquet": "row 2"}[name]
        assert "left out 2 rows without text" in note and note.endswith(f"{name}, {where})")
    whole = len(corpus.train) + len(corpus.held_out)
    assert whole == sum(len(tokenizer.encode(v)) + 1 for v in values if v)


def test_rows_that_are_all_null_say_so(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(rows(None, None))
    with pytest.raises(ValueError, match=r"the text is empty .* left out 2 rows without text"):
        corpus_of([tmp_path / "x.jsonl"], tokenizer, tmp_path)


def test_the_field_is_named_or_found(tokenizer, tmp_path):
    long = "several words of a longer text " * 5
    file = tmp_path / "x.jsonl"

    def read(content: bytes, field=None):
        file.write_bytes(content)
        notes = data.Notes()
        return [text for _, text in data.documents([("x", file)], field, None, notes)], notes

    found, notes = read(rows(long, key="content", id="7", url="short"))
    assert found == [long] and "`content`, the only long one" in notes.lines()[0]
    assert read(rows(long, key="body", text="short"))[0] == ["short"], "`text` before all others"
    assert read(rows(long, key="body", text="short"), "body")[0] == [long]
    for content, field, said in (
        (rows(long, key="a", b=long), None, "line 1: no string field `text`; it has a, b: name"),
        (rows("short", key="a"), None, "it has a: name the text with --text-field"),
        (rows(long, key="a", b=7), "c", "no string field `c`; it has a, b: name one of them"),
        (rows("x", key="text", b=7), "b", "line 1: no string field `b`"),
        (rows("x") + rows("y", key="txt"), None, "line 2: no string field `text`"),
        (b"{}\n", None, "it has none"),
    ):
        with pytest.raises(ValueError, match=said):
            read(content, field)
    (tmp_path / "t.csv").write_text(f"id,story\n1,{long}\n")
    assert [t for _, t in data.documents([("t", tmp_path / "t.csv")])] == [long]
    (tmp_path / "t.csv").write_text("id,story\n1,x\n")
    with pytest.raises(ValueError, match="line 2: no column `text`; it has id, story"):
        list(data.documents([("t", tmp_path / "t.csv")]))


def test_the_field_is_part_of_what_is_cached(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(rows("one " * 99, other="two " * 99))
    a, b = (
        data.load_corpus([tmp_path / "x.jsonl"], tokenizer, tmp_path / "c", quiet=True, field=field)
        for field in (None, "other")
    )
    assert a.digest != b.digest and not np.array_equal(a.train, b.train)


def test_columns_of_a_parquet_are_named_and_found(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    long, file = "several words of a longer text " * 5, tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"id": [*range(700)], "body": [long] * 700}), file)
    found = list(data.documents([("x", file)]))
    assert len(found) == 700 and found[-1] == ("x:700", long)
    with pytest.raises(ValueError, match="row 1: no column `c`; it has id, body"):
        list(data.documents([("x", file)], "c"))
    parquet.write_table(pyarrow.table({"a": [1]}), file)
    with pytest.raises(ValueError, match="row 1: no column `text`; it has a"):
        list(data.documents([("x", file)]))


def test_a_pointer_of_git_lfs_is_named(tokenizer, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for name in ("x.txt", "x.jsonl", "x.csv", "x.txt.gz", "x.parquet"):
        (tmp_path / name).write_text(pointer)
        if name == "x.parquet":
            pytest.importorskip("pyarrow")
        with pytest.raises(ValueError, match=f"{name} is a pointer of git-lfs"):
            corpus_of([tmp_path / name], tokenizer, tmp_path)


def test_zst_is_read_whole_or_refused(tokenizer, tmp_path):
    """Several frames in a row, as parallel packers write; cut anywhere it is damaged."""
    zstandard = pytest.importorskip("zstandard")
    packed = [zstandard.ZstdCompressor().compress(rows(t * 999)) for t in ("one ", "two ", "six ")]
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(b"".join(packed))
    assert [t for _, t in data.documents([("x", file)])] == [
        "one " * 999,
        "two " * 999,
        "six " * 999,
    ]
    for bad in (b"".join(packed)[:-3], packed[0] + packed[1][:20], packed[0] + b"more", b"none"):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            corpus_of([file], tokenizer, tmp_path)
    (tmp_path / "y.txt.zst").write_bytes(zstandard.ZstdCompressor().compress("süß".encode()))
    assert [t for _, t in data.documents([("y", tmp_path / "y.txt.zst")])] == ["süß"]


@pytest.mark.parametrize("name, package", [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(tokenizer, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name} needs the package {package}: pip install"):
        corpus_of([tmp_path / name], tokenizer, tmp_path)


def test_a_package_that_is_missing_is_all_that_is_said(tmp_path):
    """No "Exception ignored" of a reader that was never opened: Python 3.13 prints it, earlier ones
    under -X dev.
    """
    (tmp_path / "x.zst").write_bytes(b"x")
    code = "import pathlib, sys; sys.modules['zstandard'] = None; from hub import files\n"
    code += "try: files.open_text(pathlib.Path(sys.argv[1]))\nexcept ValueError as e: print(e)"
    command = [sys.executable, "-X", "dev", "-c", code, str(tmp_path / "x.zst")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "needs the package zstandard" in run.stdout and "ignored" not in run.stderr, run.stderr


def test_long_documents_are_tokenised_in_pieces_with_the_same_ids(tokenizer, tmp_path, monkeypatch):
    text = "".join(
        file.read_text() for name, file in data.find_files([]) if name.startswith("sympy/core/a")
    )
    (tmp_path / "x.txt").write_text(text)
    whole = corpus_of([tmp_path / "x.txt"], tokenizer, tmp_path)
    monkeypatch.setattr(data, "PIECE", 5000)
    monkeypatch.setattr(tokenizer.encode_long.__func__, "__defaults__", (5000,))
    longest = []
    plain = tokenizer.raw_encode
    monkeypatch.setattr(tokenizer, "raw_encode", lambda t: longest.append(len(t)) or plain(t))
    pieces = data.load_corpus([tmp_path / "x.txt"], tokenizer, tmp_path / "other", quiet=True)
    assert np.array_equal(whole.train, pieces.train)
    assert np.array_equal(whole.held_out, pieces.held_out)
    assert max(longest) < 8000 < len(text)


def test_documents_are_tokenised_by_characters_not_by_number(tokenizer, tmp_path, monkeypatch):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} words " * 100)
    batches, plain = [], tokenizer.raw_batch
    monkeypatch.setattr(data, "_CHARACTERS", 3000)
    monkeypatch.setattr(
        tokenizer, "raw_batch", lambda texts: batches.append(sum(map(len, texts))) or plain(texts)
    )
    corpus_of([tmp_path], tokenizer, tmp_path)
    assert len(batches) > 5 and max(batches) < 3000 + 1000
