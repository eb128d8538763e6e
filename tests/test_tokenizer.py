"""A tokenizer that would end in a traceback or in other ids is refused when it is loaded."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TEACHER

from hub import checkpoint
from hub.tokenizer import load_tokenizer

RANKS = (TEACHER / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)


def directory(path: Path, *names: str, **config) -> Path:
    """The demo's tokenizer files of these names, and a config.json."""
    path.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(TEACHER / name, path / name)
    given = {"vocab_size": 4096, "eos_token_id": 4095, "bos_token_id": None} | config
    (path / "config.json").write_text(json.dumps(given))
    return path


def settings(path: Path, **changes) -> None:
    old = json.loads((TEACHER / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(old | changes))


@pytest.mark.parametrize("with_settings", [True, False])
@pytest.mark.parametrize("lines", [1, 100, 3000])
def test_a_rank_file_cut_at_a_line_is_refused(tmp_path, lines, with_settings):
    path = directory(tmp_path, *["tokenizer_config.json"] * with_settings)
    (path / "tokenizer.tiktoken").write_bytes(b"".join(RANKS[:-lines]))
    with pytest.raises(ValueError, match=f"{4095 - lines} ranks, but the first special token has"):
        load_tokenizer(path)


def test_a_rank_file_with_a_hole_is_refused(tmp_path):
    path = directory(tmp_path, "tokenizer_config.json")
    (path / "tokenizer.tiktoken").write_bytes(b"".join(RANKS[:2000] + RANKS[2001:]))
    with pytest.raises(ValueError, match=r"ranks that are not 0 \.\. 4093"):
        load_tokenizer(path)


def test_two_vocabularies_in_one_directory_are_refused(tmp_path):
    path = directory(tmp_path, "tokenizer.tiktoken", "tokenizer.json")
    settings(path, pat_str=r"\S+|\s+")
    with pytest.raises(ValueError, match="they give a text other ids"):
        load_tokenizer(path)


def test_both_files_of_a_model_in_the_hubs_cache_are_found(tmp_path):
    """Its files are links to blobs, from which no other file of the model can be named."""
    names = ("tokenizer.tiktoken", "tokenizer.json", "tokenizer_config.json")
    plain = directory(tmp_path / "plain", *names)
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(plain.iterdir()):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    for path in (plain, snapshot):
        tokenizer = load_tokenizer(path)
        assert tokenizer.kind == "tiktoken"
        assert tokenizer.encode_chat("one two") == tokenizer.encode("one two")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken"])
@pytest.mark.parametrize("bos", [-1, 4096, 99999999, 2**40])
def test_a_bos_outside_the_vocabulary_is_refused(tmp_path, bos, name):
    path = directory(tmp_path, name, bos_token_id=bos)
    settings(path, add_bos_token=True)
    with pytest.raises(ValueError, match="bos_token_id"):
        load_tokenizer(path)


def test_an_id_hole_in_a_tokenizer_json_counts_to_the_largest_id(tmp_path):
    path = directory(tmp_path, "tokenizer.json", vocab_size=50_001)
    data = json.loads((path / "tokenizer.json").read_text())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"][last] = 50_000
    (path / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(path).size == 50_001
    with pytest.raises(
        ValueError, match=r"has 50001 ids, the vocab_size of config\.json beside it"
    ):
        load_tokenizer(directory(tmp_path, vocab_size=50_000))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken"])
def test_ids_that_the_model_lacks_are_refused(tmp_path, name):
    """Every program that reads text would end in "index out of range"."""
    path = directory(tmp_path, name, "tokenizer_config.json", vocab_size=1000, eos_token_id=5)
    with pytest.raises(ValueError, match=r"has 409. ids, .* is 1000: they are not one"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"},
    ],
    ids=["words", "pieces", "nothing"],
)
def test_a_vocabulary_that_cannot_hold_a_text_is_refused(tmp_path, model):
    path = directory(tmp_path)
    data = json.loads((TEACHER / "tokenizer.json").read_text())
    data |= {"model": model, "added_tokens": [], "post_processor": None}
    (path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pat_str": None}, "pat_str None"),
        ({"pat_str": ""}, "pat_str ''"),
        ({"pat_str": "("}, "cannot be used"),
        ({"pat_str": "(?=a)"}, "cannot be used|other ids|nothing"),
        ({"pat_str": 7}, "pat_str 7"),
        ({"added_tokens_decoder": {"-3": {"content": "x"}}}, "first special token has the id -3"),
        ({"added_tokens_decoder": {"7": {"content": "x"}}}, "first special token has the id 7"),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, "malformed added_tokens_decoder"),
        ({"added_tokens_decoder": [1]}, "malformed added_tokens_decoder"),
        ({"add_bos_token": "x"}, "add_bos_token 'x'"),
    ],
)
def test_settings_that_do_not_work_are_refused(tmp_path, changes, said):
    path = directory(tmp_path, "tokenizer.tiktoken")
    settings(path, **changes)
    with pytest.raises(ValueError, match=said) as e:
        load_tokenizer(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("words", ["^", " *"])
def test_a_rule_that_makes_rust_panic_says_one_sentence(tmp_path, capfd, words):
    """Its hook would print a backtrace before Python hears of it."""
    path = directory(tmp_path, "tokenizer.tiktoken")
    settings(path, pat_str=words)
    with pytest.raises(ValueError, match="cannot be used"):
        load_tokenizer(path)
    assert capfd.readouterr().err == ""


def test_a_prefix_over_which_the_library_aborts_is_refused(tmp_path):
    """The process would end in the middle of a word, with no sentence at all."""
    path = directory(tmp_path, "tokenizer.json")
    whole = json.loads((path / "tokenizer.json").read_text())
    whole["model"]["continuing_subword_prefix"] = "x"
    (path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="continuing_subword_prefix 'x'"):
        load_tokenizer(path)


def test_a_rank_file_with_a_damaged_line_is_not_passed_over(tmp_path):
    path = directory(tmp_path, "tokenizer.tiktoken", "tokenizer.json")
    (path / "tokenizer.tiktoken").write_bytes(b"".join(RANKS[:-1]) + RANKS[-1].replace(b" ", b" x"))
    with pytest.raises(ValueError, match="lines that are no ranks"):
        load_tokenizer(path)


def test_a_rank_beyond_32_bits_is_refused(tmp_path):
    path = directory(tmp_path, "tokenizer_config.json")
    token = base64.b64encode(b"never").decode()
    for digits in (10, 5000):
        line = f"{token} 9{'0' * digits}\n"
        (path / "tokenizer.tiktoken").write_bytes(b"".join(RANKS) + line.encode())
        with pytest.raises(ValueError):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken"])
def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path, name):
    tokenizer = load_tokenizer(directory(tmp_path, name))
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"
    (ids,) = tokenizer.encode_documents(["a\ud83d b"])
    assert ids[:-1] == tokenizer.encode("a\ufffd b") and ids[-1] == 4095


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken"])
def test_ids_that_the_vocabulary_lacks_decode_to_nothing(tmp_path, name):
    """A model with padded embeddings can generate them."""
    tokenizer = load_tokenizer(directory(tmp_path, name, vocab_size=5000))
    ids = tokenizer.encode("def f")
    assert tokenizer.decode([4999, *ids, 4500]) == "def f"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.tiktoken"])
def test_a_tokenizer_file_that_is_a_link_out_of_the_directory_is_refused(tmp_path, name):
    path = directory(tmp_path / "model", "tokenizer.json")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(TEACHER / name)
    with pytest.raises(ValueError, match=r"a link to .*, outside the model's directory"):
        load_tokenizer(path)
    (path / name).unlink()
    (path / name).symlink_to(path / name)
    with pytest.raises(ValueError, match=r"leads nowhere|no tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "old, new",
    [
        (b'{"a": 1,\n "model_max_length":  8192 , "b": "\\u00e9"}', b"32"),
        (b'{"model_max_length": 8192.0}', b"32"),
        (b'{"model_max_length": 1000000000000000019884624838656}', None),
        (b'{"eos_token": "x"}', None),
        (b'{"model_max_length": null}', None),
    ],
)
def test_only_the_length_of_tokenizer_config_changes(old, new):
    written = checkpoint._lengthened(old, 32)
    if new is None:
        assert written == old
    else:
        for number in (b"8192.0", b"8192"):
            old = old.replace(number, new)
        assert written == old


def test_code_references_do_not_survive_nor_does_a_length_at_any_depth():
    """As transformers reads some that are nested: cache_config's max_cache_len is one."""
    old = {
        "auto_map": {"AutoTokenizer": "x.py"},
        "model_max_length": 8,
        "in": {"model_max_length": 8},
    }
    written = checkpoint._lengthened(json.dumps(old).encode(), 32)
    assert json.loads(written) == {"model_max_length": 32, "in": {"model_max_length": 32}}


def test_code_references_of_a_generation_config_do_not_survive(tmp_path):
    path = directory(tmp_path / "from", "tokenizer.json")
    (path / "generation_config.json").write_text('{"auto_map": {"x": "y.py"}, "top_k": 5}')
    (tmp_path / "to").mkdir()
    checkpoint._copy_tokenizer(path, tmp_path / "to", 32)
    assert json.loads((tmp_path / "to" / "generation_config.json").read_text()) == {"top_k": 5}


# ---- special tokens beyond the embeddings, several end tokens, prefixes, pieces, pointers


def added(path: Path, content: str, special: bool, at: int = 4096) -> Path:
    """One more added token in tokenizer.json."""
    whole = json.loads((TEACHER / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole["added_tokens"].append({"id": at, "content": content, "special": special, **flags})
    (path / "tokenizer.json").write_text(json.dumps(whole))
    return path


def test_a_special_token_beyond_the_embeddings_is_taken_and_said(tmp_path):
    """As meta's LLaMA-2 with <pad>: no text can produce it."""
    path = added(directory(tmp_path), "<pad>", special=True)
    tokenizer = load_tokenizer(path)
    assert tokenizer.size == 4096 and tokenizer.decode([4096]) == ""
    assert max(tokenizer.encode("a <pad> b")) < 4096
    assert "1 special token from id 4096 on" in tokenizer.note and "4096:" in tokenizer.note
    assert load_tokenizer(directory(tmp_path / "plain", "tokenizer.json")).note == ""


def test_a_token_of_text_beyond_the_embeddings_is_refused(tmp_path):
    path = added(directory(tmp_path), "<pad>", special=False)
    with pytest.raises(ValueError, match=r"has 4097 ids, .* 4096: they are not one model's"):
        load_tokenizer(path)


def test_special_tokens_of_a_rank_file_beyond_the_embeddings_are_taken(tmp_path):
    path = directory(tmp_path, "tokenizer.tiktoken")
    more = {"4095": {"content": "<|end|>"}, "4096": {"content": "<a>"}, "4097": {"content": "<b>"}}
    settings(path, added_tokens_decoder=more)
    tokenizer = load_tokenizer(path)
    assert tokenizer.size == 4096 and "2 special tokens from id 4096 on" in tokenizer.note


@pytest.mark.parametrize(
    "of_config, of_generation, stops",
    [
        (4095, None, {4095}),
        ([4095, 7], None, {4095, 7}),
        (4095, [7, 9], {4095, 7, 9}),
        ([7], 4095, {4095, 7}),
        (4095, "absent", {4095}),
    ],
)
def test_every_end_token_stops(tmp_path, of_config, of_generation, stops):
    path = directory(tmp_path, "tokenizer.json", eos_token_id=of_config)
    if of_generation != "absent":
        given = {"eos_token_id": of_generation}
        (path / "generation_config.json").write_text(json.dumps(given))
    tokenizer = load_tokenizer(path)
    first = of_config[0] if isinstance(of_config, list) else of_config
    assert tokenizer.stop_ids == frozenset(stops) and tokenizer.eos_id == first
    assert tokenizer.encode_documents(["a"])[0][-1] == first


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_none_are_refused(tmp_path, where):
    path = directory(tmp_path, "tokenizer.json")
    old = json.loads((path / "config.json").read_text()) if where == "config.json" else {}
    (path / where).write_text(json.dumps(old | {"eos_token_id": [4095, "x"]}))
    with pytest.raises(ValueError, match=r"eos_token_id \[4095, 'x'\]"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path, name):
    path = directory(tmp_path)
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of git-lfs.*git lfs pull"):
        load_tokenizer(path)


VOCABULARIES = ROOT / ".venv" / "vocabularies"
MISTRAL = VOCABULARIES / "mistral_common" / "data" / "tokenizer.model.v1"
needs_vocabularies = pytest.mark.skipif(
    not VOCABULARIES.is_dir(), reason="`make test` installs the vocabularies"
)


@needs_vocabularies
def test_sentencepiece_without_a_prefix_space(tmp_path):
    """transformers 4.57 and 5.23 give 28708 (a bare "a") for it, 264 ("a" after a space) else."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = directory(tmp_path, vocab_size=32000, eos_token_id=2)
    shutil.copyfile(MISTRAL, path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL))
    digests = set()
    for given in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}):
        (path / "tokenizer_config.json").write_text(json.dumps(given))
        tokenizer, bare = load_tokenizer(path), given.get("add_prefix_space") is False
        assert tokenizer.encode("a b  c") == [28708 if bare else 264, 287, 28705, 277]
        assert tokenizer.encode("\na") == ([13, 28708] if bare else theirs.encode("\na"))
        assert tokenizer.decode(tokenizer.encode("a b  c")) == "a b  c"
        digests.add(tokenizer.digest)
    assert len(digests) == 2, "another text, another cache"
    (path / "tokenizer_config.json").write_text('{"add_prefix_space": "no"}')
    with pytest.raises(ValueError, match="add_prefix_space 'no'; true or false"):
        load_tokenizer(path)


def real(tmp_path: Path, name: str) -> Path:
    """A real tokenizer's directory."""
    if name.startswith("demo"):
        return directory(tmp_path, f"tokenizer.{name.split()[1]}")
    source, target, ids = {
        "llama3": ("llama_models/llama3/tokenizer.model", "tokenizer.model", 128000),
        "qwen": ("dashscope/resources/qwen.tiktoken", "tokenizer.tiktoken", 151643),
        "mistral": ("mistral_common/data/tokenizer.model.v1", "tokenizer.model", 2),
    }[name.split()[0]]
    path = directory(tmp_path, vocab_size=200_000, eos_token_id=ids)
    if not VOCABULARIES.is_dir():
        pytest.skip("`make test` installs the vocabularies")
    shutil.copyfile(VOCABULARIES / source, path / target)
    if name == "mistral bare":
        (path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    return path


TEXTS = {
    "code": (ROOT / "model.py").read_text(),
    "prose": (ROOT / "LOG.md").read_text() * 2,
    "blank": "a \n\n b\t\n  c   d\n\n\n" * 900 + "end  \n",
    "digits": "12345678901234567890 3.14159 " * 500 + "\n1234\n5678" * 300,
    "east": "東京は日本の首都です。\n人口は多い。 " * 400,
    "no cut": "東京は日本の首都です。" * 600,
    "signs": "naïve ☃\u0301 'tis I'm don't;\n\r\n x\u00a0y \u3000z\n" * 300,
    "long runs": ("x" * 26_000 + " " + "y-" * 13_000 + "\n" + " " * 26_000 + "z\n") * 2,
}


@pytest.mark.parametrize(
    "name", ["demo json", "demo tiktoken", "llama3", "qwen", "mistral", "mistral bare"]
)
def test_pieces_have_the_ids_of_the_whole(tmp_path, name):
    tokenizer = load_tokenizer(real(tmp_path, name))
    for kind, text in TEXTS.items():
        whole = tokenizer.encode_documents([text])[0]
        for size in (300, 4001):
            pieces = list(tokenizer.encode_long(text, size))
            assert [i for ids in pieces for i in ids] == whole, f"{kind}, {size}"
            if kind not in ("no cut", "long runs", "blank"):
                assert len(pieces) > len(text) // size // 2, f"{kind} is cut"


@pytest.mark.parametrize("eos", [[], {}, {"a": 1}, [[4095]], True, 4095.0])
def test_an_end_token_of_another_shape_is_refused(tmp_path, eos):
    with pytest.raises(ValueError, match="eos_token_id"):
        load_tokenizer(directory(tmp_path, "tokenizer.json", eos_token_id=eos))
