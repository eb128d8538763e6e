"""Text to token ids and back, with the model's own vocabulary, whichever of three formats it comes in.

    tokenizer.json                       Hugging Face's fast format: the `tokenizers` library
    tokenizer.model or .tiktoken         lines of "base64 rank" (LLaMA-3's original, our demo's): the `tiktoken` library
    tokenizer.model, a binary            sentencepiece (LLaMA-1/2, Mistral): the `sentencepiece` package if installed

The first that is there is used, a rank file before tokenizer.json where both are (it is the faster). A family that
starts texts with a beginning-of-sequence token gets it from `encode(..., bos=True)`; one that does not, gets none: the
rule is read from the tokenizer's files, never guessed from the family's name.

Limits.  Special tokens inside a text are read as ordinary characters, so that no document can inject one. tiktoken's
time grows with the square of a run without spaces, so runs are cut at 25 000 characters, as in LLaMA-3's own code.

Source.  The formats of tokenizers 0.23, tiktoken 0.14; LLaMA-3's limits.
"""

import base64
import binascii
import hashlib
import json
import re
from pathlib import Path

from hub import checkpoint

# LLaMA-3's split of text into words, used when tokenizer_config.json gives no `pat_str` of its own
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LONG_RUN = re.compile(r"\S{25000}|\s{25000}")


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; bos_id (None: the family uses none), eos_id, size, digest."""

    def __init__(
        self,
        encode,
        decode,
        batch,
        size: int,
        bos_id: int | None,
        eos_id: int,
        digest: str,
        kind: str,
    ):
        self._encode, self.decode, self._batch = encode, decode, batch
        self.size, self.bos_id, self.eos_id, self.digest, self.kind = (
            size,
            bos_id,
            eos_id,
            digest,
            kind,
        )

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [self.bos_id] * (bos and self.bos_id is not None) + self._encode(text)

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Each text as a whole document: the family's BOS, the ids, the end token. In parallel where possible."""
        first = [] if self.bos_id is None else [self.bos_id]
        return [[*first, *ids, self.eos_id] for ids in self._batch(texts)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises ValueError naming what is missing and the remedy."""
    path = Path(path)
    config = checkpoint.read_json(path / "config.json")
    extra = path / "tokenizer_config.json"
    settings = checkpoint.read_json(extra) if extra.is_file() else {}
    for name in ("tokenizer.tiktoken", "tokenizer.model"):
        file = path / name
        if file.is_file() and (ranks := _ranks(file)) is not None:
            return _tiktoken(file, ranks, config, settings)
    if (path / "tokenizer.json").is_file():
        return _fast(path / "tokenizer.json", config, settings)
    if (path / "tokenizer.model").is_file():
        return _sentencepiece(path / "tokenizer.model", config, settings)
    raise ValueError(
        f"{path} has no tokenizer.json, tokenizer.model or tokenizer.tiktoken; copy the model's own there"
    )


def _ends(config: dict, settings: dict, file: Path) -> int:
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    size = config.get("vocab_size")
    if type(eos) is not int or eos < 0 or (type(size) is int and eos >= size):
        raise ValueError(
            f"config.json beside {file} has eos_token_id {eos!r}; documents are joined with that token"
        )
    return eos


def _fast(file: Path, config: dict, settings: dict) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    data = file.read_bytes()
    checkpoint.read_json(file)  # a damaged file is refused by name
    try:
        tok = Fast.from_buffer(data)
    except ValueError as e:
        raise ValueError(
            f"{file} is not a tokenizer that the tokenizers library reads: {e}"
        ) from None
    tok.no_truncation()
    tok.no_padding()
    tok.encode_special_tokens = True  # specials inside a text are ordinary characters
    bare, whole = tok.encode("a", add_special_tokens=False).ids, tok.encode("a").ids
    bos = whole[0] if whole[: len(bare)] != bare else None
    if settings.get("add_bos_token") is False:
        bos = None
    elif settings.get("add_bos_token") and bos is None and type(config.get("bos_token_id")) is int:
        bos = config["bos_token_id"]
    return Tokenizer(
        encode=lambda text: tok.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tok.decode(ids, skip_special_tokens=False),
        batch=lambda texts: [e.ids for e in tok.encode_batch_fast(texts, add_special_tokens=False)],
        size=tok.get_vocab_size(),
        bos_id=bos,
        eos_id=_ends(config, settings, file),
        digest=hashlib.sha256(data).hexdigest(),
        kind="tokenizers",
    )


def _ranks(file: Path) -> dict[bytes, int] | None:
    """The rank lines of a tiktoken file, or None if it is not one (a sentencepiece binary)."""
    ranks = {}
    for line in file.read_bytes().splitlines():
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            return None
        try:
            ranks[base64.b64decode(parts[0], validate=True)] = int(parts[1])
        except binascii.Error:
            return None
    if len(set(ranks.values())) != len(ranks) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(
            f"{file} repeats a rank or lacks one of the 256 single bytes; it is damaged"
        )
    return ranks


def _tiktoken(file: Path, ranks: dict[bytes, int], config: dict, settings: dict) -> Tokenizer:
    import tiktoken

    special = {}
    try:
        for i, entry in settings.get("added_tokens_decoder", {}).items():
            special[entry["content"]] = int(i)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(
            f"tokenizer_config.json beside {file} has a malformed added_tokens_decoder"
        ) from None
    words = settings.get("pat_str", LLAMA3_WORDS)
    digest = hashlib.sha256(
        file.read_bytes() + words.encode() + json.dumps(special).encode()
    ).hexdigest()
    enc = tiktoken.Encoding(digest, pat_str=words, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str) -> list[int]:
        out, start = [], 0
        for run in _LONG_RUN.finditer(text):
            out += enc.encode_ordinary(text[start : run.end()])
            start = run.end()
        return out + enc.encode_ordinary(text[start:])

    bos, beside = config.get("bos_token_id"), file.with_name("tokenizer.json")
    if (
        settings.get("add_bos_token") is None and beside.is_file()
    ):  # its post-processor says what the family does
        bos = _fast(beside, config, settings).bos_id
    elif settings.get("add_bos_token") is False:
        bos = None
    return Tokenizer(
        encode=encode,
        decode=enc.decode,
        batch=lambda texts: [encode(t) for t in texts],
        size=max(enc.max_token_value, *ranks.values()) + 1,
        bos_id=bos,
        eos_id=_ends(config, settings, file),
        digest=digest,
        kind="tiktoken",
    )


def _sentencepiece(file: Path, config: dict, settings: dict) -> Tokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{file} is a sentencepiece model; put the tokenizer.json of its Hugging Face version beside it, "
            "or pip install sentencepiece"
        ) from None
    try:
        sp = SentencePieceProcessor(model_file=str(file))
    except RuntimeError as e:
        raise ValueError(
            f"{file} is neither a tiktoken rank file nor a sentencepiece model: {e}"
        ) from None
    return Tokenizer(
        encode=lambda text: sp.encode(text),
        decode=lambda ids: sp.decode(ids),
        batch=lambda texts: sp.encode(texts),
        size=sp.vocab_size(),
        bos_id=sp.bos_id() if settings.get("add_bos_token", True) and sp.bos_id() >= 0 else None,
        eos_id=_ends(config, settings, file),
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        kind="sentencepiece",
    )
