"""Links in a model's or a data directory: refused where they lead out, to nothing or in a circle,
on every Python alike.
"""

import re

import pytest
from conftest import TEACHER, tiny_config

from engine import data
from hub import card, checkpoint, files
from hub.tokenizer import load_tokenizer
from model import Llama, LlamaConfig

NOWHERE = "is a link that leads nowhere; copy the file there"
OUTSIDE = "is a link to .*, outside the model's directory; copy the file there"
LINKS = {"itself": NOWHERE, "a circle of two": NOWHERE, "nothing": NOWHERE, "out": OUTSIDE}


def plant(link, leads: str, elsewhere) -> None:
    """The link `link`, in place of what is there."""
    link.unlink(missing_ok=True)
    if leads == "itself":
        link.symlink_to(link.name)
    elif leads == "a circle of two":
        second = link.with_name("second")
        second.symlink_to(link.name)
        link.symlink_to(second.name)
    elif leads == "nothing":
        link.symlink_to("absent")
    else:
        target = elsewhere / f"target-{link.name}"
        target.write_text("{}")
        link.symlink_to(target)


def read_everything(path, work) -> None:
    """Reads a model's directory in each way that the programs do."""
    Llama.from_pretrained(path)
    load_tokenizer(path)
    model = Llama(LlamaConfig.from_hf(tiny_config()))
    checkpoint.save_pretrained(model, work / "exported", tokenizer_from=path)


@pytest.mark.parametrize("leads", LINKS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        *checkpoint.TOKENIZER_FILES,
    ],
)
def test_a_models_file_that_is_such_a_link_is_refused(model_copy, tmp_path, name, leads):
    plant(model_copy / name, leads, tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{model_copy / name} ") + LINKS[leads]):
        read_everything(model_copy, tmp_path)


@pytest.mark.parametrize("leads", LINKS)
def test_a_card_that_is_such_a_link_is_refused(model_copy, tmp_path, leads):
    plant(model_copy / "README.md", leads, tmp_path)
    with pytest.raises(ValueError, match=LINKS[leads]):
        card.licence_of(model_copy)


def test_links_inside_the_directory_and_into_the_hubs_blobs_are_its_own(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "inner.json").symlink_to("config.json")
    assert files.file_of(snapshot, "config.json") == blobs / "hash"
    assert files.file_of(snapshot, "inner.json") == blobs / "hash"
    assert not files.file_of(snapshot, "absent.json").exists()
    (blobs / "hash").unlink()
    with pytest.raises(ValueError, match=NOWHERE):
        files.file_of(snapshot, "config.json")


@pytest.mark.parametrize("leads", [leads for leads in LINKS if leads != "out"])
@pytest.mark.parametrize("name", ["a.txt", "b.jsonl.gz", "c.npy", "d.csv"])
def test_a_text_that_is_such_a_link_is_refused(tmp_path, name, leads):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "more.txt").write_text("some words")
    plant(tmp_path / "text" / name, leads, tmp_path)
    for given in (tmp_path / "text", tmp_path / "text" / name):
        with pytest.raises(ValueError, match=NOWHERE):
            data.load_corpus([given], load_tokenizer(TEACHER), tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache").exists()


def test_a_text_may_be_a_link_to_a_file_elsewhere(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "real.txt").write_text("some words")
    (tmp_path / "text" / "a.txt").symlink_to(tmp_path / "real.txt")
    assert list(data.documents(data.find_files([tmp_path / "text"]))) == [("a.txt", "some words")]
