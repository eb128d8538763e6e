"""Text to token ids and back, with the model's own vocabulary, whichever of three formats it comes
in.

    tokenizer.json                    Hugging Face's fast format: the `tokenizers` library
    tokenizer.model or .tiktoken      lines of "base64 rank" (LLaMA-3's original, our demo's): the
                                      `tiktoken` library
    tokenizer.model, a binary         sentencepiece (LLaMA-1/2, Mistral): the `sentencepiece`
                                      package if it is installed

The first that is there is used, a rank file before tokenizer.json where both are (it is faster). A
family that starts texts with a beginning-of-sequence token gets it from `encode(..., bos=True)`;
one that does not, gets none: the rule is read from the tokenizer's files, never guessed from the
family's name. Where there is a tokenizer.json its post-processor is the rule, and `add_bos_token`
is not read, as in transformers 5; else `add_bos_token` is.

Long texts are encoded in pieces, cut at a space or newline where the ids on both sides are seen to
be those of the whole, so that memory does not grow with a text.

Refused when it is loaded, in a sentence: a vocabulary with holes or one that is cut short (a rank
file must end where the special tokens begin, and agree with a tokenizer.json beside it), an id of
text outside the model's vocabulary, a splitting rule that does not work, text that cannot be
encoded. A special token beyond the vocabulary, such as a <pad> that was added without a row in the
embeddings, is taken, as no text produces it; `note` says so.

Limits.  Special tokens inside a text are read as ordinary characters ("<|end|>" is seven of them),
so that no document can inject one; only what a chat template wrote (encode_chat) is read with them.
Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD. An id that
the vocabulary lacks, as models with padded embeddings can generate, decodes to nothing. tiktoken's
time grows with the square of a run without spaces, so runs are cut at 25 000 characters, as in
LLaMA-3's own code.

Source.  The formats of tokenizers 0.23, tiktoken 0.14; LLaMA-3's limits.
"""

import base64
import binascii
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from hub import files

# LLaMA-3's split of text into words, used when tokenizer_config.json gives no `pat_str` of its own
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECE = 1 << 18  # characters of a long text that are encoded at a time
_CUT = re.compile(r"(?<=\S)[\n ](?=\S)")  # where a text may be cut: after this newline or before it
_AROUND = 256  # characters on each side of a cut that decide whether it is one
_LONG_RUN = re.compile(r"\S{25000}|\s{25000}")
_PROBE = "The quick brown fox's\n\n\tdef f(x):\n    return x + 12345  # na"
_PROBE += "\u00efve \u2603 \u6771\u4eac\r\n"


@dataclass(eq=False)
class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text. What is called raw is the library's own.

    size: the largest id plus 1. note: what an export with this tokenizer should say.
    """

    raw_encode: Callable[[str], list[int]]  # special tokens are ordinary characters
    raw_decode: Callable[[list[int]], str]
    raw_batch: Callable[[list[str]], list[list[int]]]
    known: set[int]  # every id
    bos_id: int | None  # None: the family uses none
    eos_id: int  # ends a document
    digest: str  # of the files that decide what a text becomes
    kind: str  # the library
    of_text: int  # the ids of texts are below it; special tokens may stand beyond
    raw_chat: Callable[[str], list[int]] | None = None  # reads special tokens; None: it cannot
    stop_ids: frozenset[int] = frozenset()  # any of them ends a generated text
    path: Path = Path()  # the model's directory
    note: str = ""

    def __post_init__(self):
        self.size = max(self.known) + 1

    def drop_from(self, size: int, file: Path) -> None:
        """Forgets the special tokens that a model of `size` embeddings has none for."""
        beyond = sorted(i for i in self.known if i >= size)
        self.known = {i for i in self.known if i < size}
        self.size = max(self.known) + 1
        self.note = (
            f"{file.name} names {len(beyond)} special token{'s' * (len(beyond) > 1)} from id "
            f"{beyond[0]} on, beyond the model's vocab_size {size}: no text produces them, and no "
            "embedding has them, so do not pad with one"
        )

    def encode(self, text: str, bos: bool = False) -> list[int]:
        first = [self.bos_id] if bos and self.bos_id is not None else []
        with _in_a_sentence("the tokenizer cannot encode a text"):
            return first + self.raw_encode(_whole(text))

    def encode_chat(self, text: str) -> list[int]:
        """The ids of what a chat template wrote: special tokens are read, and nothing is added.

        Raises ValueError where only a sentencepiece model is there, which cannot.
        """
        if self.raw_chat is None:
            raise ValueError(
                f"chats need the tokenizer.json of {self.path}; put the one of its Hugging Face "
                "version there"
            )
        with _in_a_sentence("the tokenizer cannot encode a chat"):
            return self.raw_chat(_whole(text))

    def decode(self, ids: list[int]) -> str:
        return self.raw_decode([i for i in ids if i in self.known])

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Each text as a whole document: the family's BOS, the ids, the end token. In parallel
        where possible."""
        first = [] if self.bos_id is None else [self.bos_id]
        with _in_a_sentence("the tokenizer cannot encode a text"):
            return [
                [*first, *ids, self.eos_id] for ids in self.raw_batch([_whole(t) for t in texts])
            ]

    def encode_long(self, text: str, size: int = PIECE) -> Iterator[list[int]]:
        """The ids of encode_documents([text])[0], a piece of about `size` characters at a time."""
        text, start = _whole(text), 0
        yield [] if self.bos_id is None else [self.bos_id]
        with _in_a_sentence("the tokenizer cannot encode a text"):
            while start < len(text):
                end = self._cut(text, start + size, size)
                lead = text[max(0, start - _AROUND) : start]  # read again, and its ids dropped
                before = self.raw_encode(lead) if lead else []
                ids = self.raw_encode(lead + text[start:end])
                assert ids[: len(before)] == before, "a cut is where the ids part"
                yield ids[len(before) :]
                start = end
        yield [self.eos_id]

    def _cut(self, text: str, start: int, size: int) -> int:
        """The first place from `start` on where a text can be cut; its end where there is none."""
        while start < len(text):
            for found in islice(_CUT.finditer(text, start), 64):
                cut = found.end() if found[0] == "\n" else found.start()
                begin = max(0, cut - _AROUND)
                left = self.raw_encode(text[begin:cut])
                around = self.raw_encode(text[begin : cut + _AROUND])
                if left and around[: len(left)] == left:
                    return cut
            start += size
        return len(text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises ValueError naming what is wrong and the remedy."""
    path = Path(path)
    config = files.read_json(files.file_of(path, "config.json"))
    settings = files.json_of(path, "tokenizer_config.json")
    for name in ("add_bos_token", "add_prefix_space"):
        if settings.get(name) not in (None, True, False):
            file = path / "tokenizer_config.json"
            raise ValueError(f"{file} has {name} {settings[name]!r}; true or false")
    tokenizer, file = _load(path, config, settings)
    _check(tokenizer, file, config, settings)
    tokenizer.path, tokenizer.stop_ids = path, _stops(path, config, tokenizer.eos_id)
    return tokenizer


def _load(path: Path, config: dict, settings: dict) -> tuple[Tokenizer, Path]:
    """By the first of the three formats that is there, and the file that it is in."""
    names = ("tokenizer.tiktoken", "tokenizer.model", "tokenizer.json")
    found = {name: file for name in names if (file := files.file_of(path, name)).is_file()}
    for file in found.values():
        files.refuse_pointer(file)
    fast = found.pop("tokenizer.json", None)
    for file in found.values():
        if (ranks := _ranks(file)) is not None:
            return _tiktoken(file, ranks, fast, config, settings), file
    if fast:
        return _fast(fast, config), fast
    for file in found.values():
        return _sentencepiece(file, config, settings), file
    raise ValueError(
        f"{path} has no tokenizer.json, tokenizer.model or tokenizer.tiktoken; copy the model's "
        "own there"
    )


def _check(tokenizer: Tokenizer, file: Path, config: dict, settings: dict) -> None:
    """Refuses what would end in a traceback or in nonsense later."""
    size = config.get("vocab_size")
    bos = tokenizer.bos_id
    if bos is None and settings.get("add_bos_token"):
        bos = config.get("bos_token_id")  # which transformers 4 may add
    for name, value in (("bos_token_id", bos), ("eos_token_id", tokenizer.eos_id)):
        if not _is_id(value, size) and not (name == "bos_token_id" and value is None):
            raise ValueError(
                f"config.json beside {file} has {name} {value!r}; it must be an id below its "
                f"vocab_size, {size}"
            )
    if type(size) is int and tokenizer.of_text > size:
        raise ValueError(
            f"{file} has {tokenizer.of_text} ids, the vocab_size of config.json beside it is "
            f"{size}: they are not one model's"
        )
    if type(size) is int and tokenizer.size > size:
        tokenizer.drop_from(size, file)
    with _in_a_sentence(f"{file} cannot be used"):
        ids = tokenizer.encode(_PROBE)
        if not ids or not tokenizer.decode(ids):
            raise ValueError("it makes nothing of a plain text")


def _is_id(value, size) -> bool:
    return type(value) is int and 0 <= value < (size if type(size) is int else 1 << 31)


def _whole(text: str) -> str:
    """The text, with U+FFFD for halves of surrogate pairs, which have no UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextlib.contextmanager
def _in_a_sentence(what: str):
    """Turns what the libraries raise into a ValueError of one sentence.

    tokenizers raises plain Exception, and Rust's panics are BaseExceptions of a class that cannot
    be imported.
    """
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise  # Ctrl-C
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(f"{what}: {reason}") from None


def _stops(path: Path, config: dict, eos: int) -> frozenset[int]:
    """The end tokens of config.json and generation_config.json, of which LLaMA 3's has several."""
    found = {eos}
    for given in (config, files.json_of(path, "generation_config.json")):
        ids = given.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(i is None or type(i) is int for i in ids):
            raise ValueError(
                f"{path} has eos_token_id {given['eos_token_id']!r} in config.json or "
                "generation_config.json; give an id or a list of ids"
            )
        found.update(ids)
    return frozenset(found - {None})


def _eos(config: dict) -> int:
    """Documents are joined with the end token; the first where the family has several."""
    eos = config.get("eos_token_id")
    return eos[0] if isinstance(eos, list) and eos else eos


def _read_fast(file: Path, specials: bool = False):
    """The `tokenizers` object of a tokenizer.json, without truncation and padding.

    specials: it reads special tokens inside a text; else they are ordinary characters.
    """
    from tokenizers import Tokenizer as Fast

    model = files.read_json(file).get("model")  # a damaged file is refused by name
    bpe = isinstance(model, dict) and model.get("type") == "BPE"
    if bpe and (prefix := model.get("continuing_subword_prefix")):  # the library may abort over one
        raise ValueError(f"{file} has continuing_subword_prefix {prefix!r}; null is supported")
    with _in_a_sentence(f"{file} is not a tokenizer that the tokenizers library reads"):
        fast = Fast.from_buffer(file.read_bytes())
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = not specials
        return fast


def _bos_of_fast(fast) -> int | None:
    """What its post-processor puts first."""
    bare, whole = fast.encode("a", add_special_tokens=False).ids, fast.encode("a").ids
    return whole[0] if whole[: len(bare)] != bare else None


def _chat_of_fast(file: Path) -> Callable[[str], list[int]]:
    """What encodes with special tokens; read from the file at its first call."""
    read = functools.cache(lambda: _read_fast(file, specials=True))
    return lambda text: read().encode(text, add_special_tokens=False).ids


def _fast(file: Path, config: dict) -> Tokenizer:
    fast = _read_fast(file)
    with _in_a_sentence(f"{file} cannot be used"):
        bos, known = _bos_of_fast(fast), set(fast.get_vocab().values())
        if not known:
            raise ValueError("its vocabulary is empty")
        special = {i for i, token in fast.get_added_tokens_decoder().items() if token.special}
    return Tokenizer(
        raw_encode=lambda text: fast.encode(text, add_special_tokens=False).ids,
        raw_decode=lambda ids: fast.decode(ids, skip_special_tokens=False),
        raw_batch=lambda ts: [e.ids for e in fast.encode_batch_fast(ts, add_special_tokens=False)],
        known=known,
        bos_id=bos,
        eos_id=_eos(config),
        digest=files.digest(file),
        kind="tokenizers",
        of_text=max(known - special, default=-1) + 1,
        raw_chat=_chat_of_fast(file),
    )


def _ranks(file: Path) -> dict[bytes, int] | None:
    """The rank lines of a tiktoken file, or None if it is not one (a sentencepiece binary)."""
    ranks = {}
    with files.reading(file):
        lines = file.read_bytes().splitlines()
    for line in lines:
        parts = line.split()
        try:
            word, rank = parts
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except (binascii.Error, ValueError):  # ValueError: not two parts, or not a number
            if file.suffix == ".tiktoken":
                raise ValueError(f"{file} has lines that are no ranks; it is damaged") from None
            return None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"{file} has ranks that are not 0 .. {len(lines) - 1}; it is damaged")
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"{file} lacks one of the 256 single bytes; it is damaged")
    return ranks


def _specials(file: Path, ranks: dict[bytes, int], config: dict, settings: dict) -> dict[str, int]:
    """The special tokens by text. Their ids must begin where the ranks end: else lines are missing.

    Where tokenizer_config.json lists none, BOS and EOS of config.json tell where that is.
    """
    special = {}
    try:
        for i, entry in (settings.get("added_tokens_decoder") or {}).items():
            special[str(entry["content"])] = int(i)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(
            f"tokenizer_config.json beside {file} has a malformed added_tokens_decoder"
        ) from None
    ids = list(special.values())
    if not special:
        eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
        ids = [i for i in (*(eos if isinstance(eos, list) else [eos]), bos) if type(i) is int]
        ids = [i for i in ids if i >= len(ranks)]
    if ids and min(ids) != len(ranks):
        raise ValueError(
            f"{file} has {len(ranks)} ranks, but the first special token has the id {min(ids)}; it "
            "is cut short, or tokenizer_config.json is another model's"
        )
    return special


def _tiktoken(
    file: Path, ranks: dict[bytes, int], fast: Path | None, config: dict, settings: dict
) -> Tokenizer:
    """fast: the tokenizer.json of the same directory, which must be the same vocabulary."""
    import regex  # of tiktoken's own needs
    import tiktoken

    special = _specials(file, ranks, config, settings)
    words = settings.get("pat_str", LLAMA3_WORDS)
    if not isinstance(words, str) or not words:
        raise ValueError(f"tokenizer_config.json beside {file} has pat_str {words!r}")
    digest = hashlib.sha256(file.read_bytes() + words.encode() + json.dumps(special).encode())
    with _in_a_sentence(f"{file} cannot be used"):
        if not all(m[0] for m in regex.finditer(words, _PROBE, timeout=5)):  # tiktoken would panic
            raise ValueError(f"pat_str {words!r} makes words of no characters")
        enc = tiktoken.Encoding(
            digest.hexdigest(), pat_str=words, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(text: str, run=enc.encode_ordinary) -> list[int]:
        ends = [0, *(m.end() for m in _LONG_RUN.finditer(text)), len(text)]
        return [i for a, b in pairwise(ends) for i in run(text[a:b])]

    if fast:
        other = _read_fast(fast)
        with _in_a_sentence(f"{file} and the tokenizer.json beside it"):
            if encode(_PROBE) != other.encode(_PROBE, add_special_tokens=False).ids:
                raise ValueError(
                    "they give a text other ids; remove the one that is not the model's"
                )
        bos, chat = _bos_of_fast(other), _chat_of_fast(fast)
    else:
        chat = functools.partial(encode, run=functools.partial(enc.encode, allowed_special="all"))
        bos = None if settings.get("add_bos_token") is False else config.get("bos_token_id")
    return Tokenizer(
        raw_encode=encode,
        raw_decode=enc.decode,
        raw_batch=lambda texts: [encode(t) for t in texts],
        known={*ranks.values(), *special.values()},
        bos_id=bos,
        eos_id=_eos(config),
        digest=digest.hexdigest(),
        kind="tiktoken",
        of_text=len(ranks),
        raw_chat=chat,
    )


def _sentencepiece(file: Path, config: dict, settings: dict) -> Tokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{file} is a sentencepiece model; put the tokenizer.json of its Hugging Face version "
            "beside it, or pip install sentencepiece"
        ) from None
    with _in_a_sentence(f"{file} is neither a tiktoken rank file nor a sentencepiece model"):
        sp = SentencePieceProcessor(model_file=str(file))
        if settings.get("add_prefix_space") is False:
            sp.override_normalizer_spec(add_dummy_prefix=False)
    return Tokenizer(
        raw_encode=sp.encode,
        raw_decode=sp.decode,
        raw_batch=sp.encode,  # of a list it gives a list
        known=set(range(sp.vocab_size())),
        of_text=sp.vocab_size(),
        bos_id=sp.bos_id() if settings.get("add_bos_token", True) and sp.bos_id() >= 0 else None,
        eos_id=_eos(config),
        digest=hashlib.sha256(
            file.read_bytes() + b"bare" * (settings.get("add_prefix_space") is False)
        ).hexdigest(),
        kind="sentencepiece",
    )
