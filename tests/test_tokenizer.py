"""A tokenizer that would end in a traceback or in other ids is refused when it is loaded."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from conftest import TEACHER

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


def test_code_references_do_not_survive_and_a_nested_length_does():
    old = {
        "auto_map": {"AutoTokenizer": "x.py"},
        "model_max_length": 8,
        "in": {"model_max_length": 8},
    }
    written = checkpoint._lengthened(json.dumps(old).encode(), 32)
    assert json.loads(written) == {"model_max_length": 32, "in": {"model_max_length": 8}}


def test_code_references_of_a_generation_config_do_not_survive(tmp_path):
    path = directory(tmp_path / "from", "tokenizer.json")
    (path / "generation_config.json").write_text('{"auto_map": {"x": "y.py"}, "top_k": 5}')
    (tmp_path / "to").mkdir()
    checkpoint._copy_tokenizer(path, tmp_path / "to", 32)
    assert json.loads((tmp_path / "to" / "generation_config.json").read_text()) == {"top_k": 5}
