"""A model's name on the Hub in the place of a folder: `--teacher
HuggingFaceTB/SmolLM2-135M-Instruct`.

What.  A name that is no folder here, but has the form OWNER/MODEL or OWNER/MODEL@REVISION, is
downloaded through `huggingface_hub`, which comes with tokenizers: into its cache, with its progress
bars, its login and its HF_* variables. What is there already is not downloaded again. Of the
repository only what this program reads is taken: config.json, safetensors, the tokenizer's files
and the card with the licence; no pickles, no code, no second copy in another format.

Limits.  Models of one part ("gpt2") are not taken for names of the Hub. Under torchrun all
processes ask, and the cache's locks let one download.

Source.  huggingface_hub's snapshot_download; the layout of its cache.
"""

import re
from pathlib import Path

from hub.checkpoint import NOTICES, TEMPLATES, TOKENIZER_FILES

_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_FILES = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    *TOKENIZER_FILES,
    *NOTICES,
    f"{TEMPLATES}/*.jinja",
)


def resolve(name: str | Path) -> Path:
    """The directory that --teacher or --model names: a folder here, or one downloaded from the Hub.

    Raises ValueError in one sentence where the Hub has no such model or cannot be reached.
    """
    asked = _ID.fullmatch(str(name))
    if Path(name).exists() or not asked:
        return Path(name)
    from huggingface_hub import errors, snapshot_download

    repository, revision = asked["repository"], asked["revision"]
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(_FILES),
            ignore_patterns=["model-*/*"],
        )
    except errors.GatedRepoError:
        reason = f"{repository} is gated: accept its terms on its page, then: hf auth login && "
        raise ValueError(f"{reason}{command}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no folder here, and the Hub has no model {repository} that it shows to "
            "you; if it is private: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repository} has no revision {revision!r} on the Hub") from None
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError) as e:
        reason = type(e.__cause__ or e).__name__
        raise ValueError(
            f"{name} is no folder here, and it cannot be downloaded ({reason}); where there is a "
            f"network: {command}, and give the folder that this prints"
        ) from None
    return Path(found)


def repository_of(path: Path) -> str | None:
    """OWNER/MODEL of a directory in the Hub's cache, models--OWNER--MODEL/snapshots/REVISION."""
    folder = path.absolute()
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return None
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def model_name(path: Path) -> str:
    """What to call the model in `path`: its name on the Hub without the owner, or its folder's."""
    repository = repository_of(path)
    return repository.split("/")[1] if repository else path.resolve().name
