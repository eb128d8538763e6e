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
family's name.

Refused when it is loaded, in a sentence: a vocabulary with holes or one that is cut short (a rank
file must end where the special tokens begin, and agree with a tokenizer.json beside it), an id
outside the model's vocabulary, a splitting rule that does not work, text that cannot be encoded.

Limits.  Special tokens inside a text are read as ordinary characters, so that no document can
inject one. Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD. An id that
the vocabulary lacks, as models with padded embeddings can generate, decodes to nothing. tiktoken's
time grows with the square of a run without spaces, so runs are cut at 25 000 characters, as in
LLaMA-3's own code.

Source.  The formats of tokenizers 0.23, tiktoken 0.14; LLaMA-3's limits.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from hub import files

# LLaMA-3's split of text into words, used when tokenizer_config.json gives no `pat_str` of its own
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONG_RUN = re.compile(r"\S{25000}|\s{25000}")
_PROBE = "The quick brown fox's\n\n\tdef f(x):\n    return x + 12345  # na"
_PROBE += "\u00efve \u2603 \u6771\u4eac\r\n"


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text.

    size: the largest id plus 1; bos_id (None: the family uses none); eos_id, which ends a document,
    and stop_ids, any of which ends a generated text; digest: of the files that decide what a text
    becomes; kind: the library.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        batch: Callable[[list[str]], list[list[int]]],
        known: set[int],
        bos_id: int | None,
        eos_id: int,
        digest: str,
        kind: str,
    ):
        self._encode, self._decode, self._batch, self._known = encode, decode, batch, known
        self.size, self.bos_id, self.eos_id = max(known) + 1, bos_id, eos_id
        self.digest, self.kind, self.stop_ids = digest, kind, frozenset({eos_id})

    def encode(self, text: str, bos: bool = False) -> list[int]:
        first = [self.bos_id] if bos and self.bos_id is not None else []
        with _in_a_sentence("the tokenizer cannot encode a text"):
            return first + self._encode(_whole(text))

    def decode(self, ids: list[int]) -> str:
        return self._decode([i for i in ids if i in self._known])

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Each text as a whole document: the family's BOS, the ids, the end token. In parallel
        where possible."""
        first = [] if self.bos_id is None else [self.bos_id]
        with _in_a_sentence("the tokenizer cannot encode a text"):
            return [[*first, *ids, self.eos_id] for ids in self._batch([_whole(t) for t in texts])]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises ValueError naming what is wrong and the remedy."""
    path = Path(path)
    config = files.read_json(files.own(path, "config.json"))
    extra = files.own(path, "tokenizer_config.json")
    settings = files.read_json(extra) if extra.is_file() else {}
    if settings.get("add_bos_token") not in (None, True, False):
        raise ValueError(f"{extra} has add_bos_token {settings['add_bos_token']!r}; true or false")
    fast = files.own(path, "tokenizer.json")
    for name in ("tokenizer.tiktoken", "tokenizer.model"):
        file = files.own(path, name)
        if file.is_file() and (ranks := _ranks(file)) is not None:
            beside = _read_fast(fast) if fast.is_file() else None
            return _probed(_tiktoken(file, ranks, beside, config, settings), file, config)
    if fast.is_file():
        return _probed(_fast(fast, config, settings), fast, config)
    file = files.own(path, "tokenizer.model")
    if file.is_file():
        return _probed(_sentencepiece(file, config, settings), file, config)
    raise ValueError(
        f"{path} has no tokenizer.json, tokenizer.model or tokenizer.tiktoken; copy the model's "
        "own "
        "there"
    )


def _probed(tokenizer: Tokenizer, file: Path, config: dict) -> Tokenizer:
    """Refuses what would end in a traceback or in nonsense later."""
    size = config.get("vocab_size")
    for name, value in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        if not _is_id(value, size) and not (name == "bos_token_id" and value is None):
            raise ValueError(
                f"config.json beside {file} has {name} {value!r}; it must be an id below its "
                f"vocab_size, {size}"
            )
    if type(size) is int and tokenizer.size > size:
        raise ValueError(
            f"{file} has {tokenizer.size} ids, the vocab_size of config.json beside it is {size}: "
            "they are not one model's"
        )
    if isinstance(config["eos_token_id"], list):
        tokenizer.stop_ids = frozenset(config["eos_token_id"])
    with _in_a_sentence(f"{file} cannot be used"):
        ids = tokenizer.encode(_PROBE)
        if not ids or not tokenizer.decode(ids):
            raise ValueError("it makes nothing of a plain text")
    return tokenizer


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


def _eos(config: dict) -> int:
    """Documents are joined with the end token; the first where the family has several."""
    eos = config.get("eos_token_id")
    return eos[0] if isinstance(eos, list) and eos else eos


def _read_fast(file: Path):
    """The `tokenizers` object of a tokenizer.json, without truncation, padding and specials."""
    from tokenizers import Tokenizer as Fast

    model = files.read_json(file).get("model")  # a damaged file is refused by name
    bpe = isinstance(model, dict) and model.get("type") == "BPE"
    if bpe and (prefix := model.get("continuing_subword_prefix")):  # the library may abort over one
        raise ValueError(f"{file} has continuing_subword_prefix {prefix!r}; null is supported")
    with _in_a_sentence(f"{file} is not a tokenizer that the tokenizers library reads"):
        fast = Fast.from_buffer(file.read_bytes())
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True  # specials inside a text are ordinary characters
        return fast


def _bos_of_fast(fast, config: dict, settings: dict) -> int | None:
    """What its post-processor puts first, unless tokenizer_config.json says otherwise."""
    bare, whole = fast.encode("a", add_special_tokens=False).ids, fast.encode("a").ids
    bos = whole[0] if whole[: len(bare)] != bare else None
    if settings.get("add_bos_token") is False:
        return None
    if settings.get("add_bos_token") and bos is None:
        return config.get("bos_token_id")
    return bos


def _fast(file: Path, config: dict, settings: dict) -> Tokenizer:
    fast = _read_fast(file)
    with _in_a_sentence(f"{file} cannot be used"):
        bos, known = _bos_of_fast(fast, config, settings), set(fast.get_vocab().values())
        if not known:
            raise ValueError("its vocabulary is empty")
    return Tokenizer(
        encode=lambda text: fast.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: fast.decode(ids, skip_special_tokens=False),
        batch=lambda texts: [
            e.ids for e in fast.encode_batch_fast(texts, add_special_tokens=False)
        ],
        known=known,
        bos_id=bos,
        eos_id=_eos(config),
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        kind="tokenizers",
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


def _tiktoken(file: Path, ranks: dict, beside, config: dict, settings: dict) -> Tokenizer:
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

    def encode(text: str) -> list[int]:
        out, start = [], 0
        for run in _LONG_RUN.finditer(text):
            out += enc.encode_ordinary(text[start : run.end()])
            start = run.end()
        return out + enc.encode_ordinary(text[start:])

    bos = config.get("bos_token_id")
    if beside is not None:
        _agree(file, encode, beside)
        if settings.get("add_bos_token") is None:  # its post-processor says what the family does
            bos = _bos_of_fast(beside, config, settings)
    if settings.get("add_bos_token") is False:
        bos = None
    return Tokenizer(
        encode=encode,
        decode=enc.decode,
        batch=lambda texts: [encode(t) for t in texts],
        known={*ranks.values(), *special.values()},
        bos_id=bos,
        eos_id=_eos(config),
        digest=digest.hexdigest(),
        kind="tiktoken",
    )


def _agree(file: Path, encode, beside) -> None:
    """Two files in one directory must be one vocabulary."""
    with _in_a_sentence(f"{file} and the tokenizer.json beside it"):
        if encode(_PROBE) != beside.encode(_PROBE, add_special_tokens=False).ids:
            raise ValueError("they give a text other ids; remove the one that is not the model's")


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
    return Tokenizer(
        encode=lambda text: sp.encode(text),
        decode=lambda ids: sp.decode(ids),
        batch=lambda texts: sp.encode(texts),
        known=set(range(sp.vocab_size())),
        bos_id=sp.bos_id() if settings.get("add_bos_token", True) and sp.bos_id() >= 0 else None,
        eos_id=_eos(config),
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        kind="sentencepiece",
    )
