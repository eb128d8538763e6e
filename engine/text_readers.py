"""One file of text, its documents: a file, a row, a chat or a stream of ids each.

    .txt .md .py                 one document: the whole file
    .jsonl .csv .parquet         one a row: a field of text, or of messages
    .npy                         one: a stream of ids that are tokens already

All but the last two may be packed as .gz or .zst. A byte order mark is dropped. pyarrow (.parquet)
and zstandard (.zst) are asked for where a file needs them.

Which field.  The one that was named (--text-field); else `text`; else `messages` or `conversations`
where it holds a list; else the one field that is long text (100 characters a row or more, in the
first rows) where it is the only one, and that is said. Where nothing decides, the file is refused
with the names of its fields. A list is a chat, {"role", "content"} or ShareGPT's {"from", "value"},
and is written by the model's own chat template (hub/chats.py), with the row's `tools`.

Left out, counted and said: rows whose field is null or blank, chats that the template refuses.
Refused: a row without the field or with something else in it.
"""

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from engine import token_cache
from hub import files
from hub.chats import ChatRefused

WHOLE, ROWS = (".txt", ".md", ".py"), (".jsonl", ".csv", ".parquet")
KINDS = ".txt, .md, .py, .jsonl, .csv (each also .gz or .zst), .parquet, .npy"  # in words
CHATS = ("messages", "conversations")
_LONG = 100  # characters a row, at least, of a field that is taken for the text
_FIRST_ROWS = 20  # that decide which field it is

Row = tuple[int, str, dict]  # its number, where it stands in words, its fields
Chat = Callable[[list, object], np.ndarray]  # (messages, tools) -> ids


def kind_of(name: str) -> str | None:
    """The ending that says how a file is read, without .gz or .zst; None: it is not."""
    name = name.lower()
    bare = name.removesuffix(".gz").removesuffix(".zst")
    for kind in (*WHOLE, *ROWS, ".npy"):
        if bare.endswith(kind) and (bare == name or kind not in (".parquet", ".npy")):
            return kind
    return None


class Notes:
    """What was left out, by reason, with the first of each; and which fields were found."""

    def __init__(self):
        self.reasons: dict[str, list] = {}  # reason: [how many, the first]
        self.found: dict[str, str] = {}  # a field, the first file that has it

    def leave_out(self, reason: str, first: str) -> None:
        self.reasons.setdefault(reason, [0, first])[0] += 1

    def lines(self) -> list[str]:
        """One sentence each."""
        fields = (f"the field `{f}`, the only long one ({file})" for f, file in self.found.items())
        left_out = (f"left out {n:,} {why} (first: {a})" for why, (n, a) in self.reasons.items())
        return [f"text: {note}" for note in (*fields, *left_out)]


def documents(
    found: list[tuple[str, Path]],
    field: str | None = None,
    chat: Chat | None = None,
    notes: Notes | None = None,
) -> Iterator[tuple[str, str | np.ndarray]]:
    """(name, text) of every document, or (name, ids [tokens], any integers) of a stream or a chat.

    found: (name, file). field: of the rows, None: to be found. chat: what makes ids of a chat,
    None: chats are refused.
    Raises ValueError naming a file (and row) that is damaged, not UTF-8 or malformed.
    """
    notes = notes or Notes()
    for name, file in found:
        kind = kind_of(file.name)
        try:
            if kind == ".npy":
                yield name, _ids(file)
            elif kind in WHOLE:
                with files.open_text(file) as f:
                    yield name, f.read()
            else:
                yield from _of_rows(name, file, field, chat, notes)
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert or leave it out"
            ) from None
        except files.DAMAGED as e:
            raise ValueError(f"{file} is damaged: {e}") from None


def _ids(file: Path) -> np.ndarray:
    ids = token_cache.load_ids(file)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{file} must be one row of integer ids; it is {ids.dtype} {list(ids.shape)}"
        )
    return ids


# ---- rows: each reader takes the columns that are needed, None: all, of the first few rows


def _lines(file: Path, columns: list[str] | None) -> Iterator[Row]:
    for number, row in files.json_lines(file):
        yield number, f"line {number}", row


def _cells(file: Path, columns: list[str] | None) -> Iterator[Row]:
    """The rows of a table whose first line names its columns."""
    csv.field_size_limit(1 << 30)  # characters: the module's own limit, 2^17, is shorter than books
    with files.open_text(file, newline="") as f:
        rows = csv.DictReader(f, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                there = {k: v for k, v in row.items() if k is not None and v is not None}
                yield number, f"line {rows.line_num}", there
        except csv.Error as e:
            raise ValueError(f"{file}, after line {rows.line_num}: {e}") from None


def _table(file: Path, columns: list[str] | None) -> Iterator[Row]:
    """The rows of a Parquet file, with pyarrow, a few hundred at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{file} needs the package pyarrow: pip install pyarrow, or save it as .jsonl"
        ) from None
    files.refuse_pointer(file)
    try:
        table = parquet.ParquetFile(file)
        needed = columns and [c for c in columns if c in table.schema_arrow.names]
        batches = table.iter_batches(256 if columns else _FIRST_ROWS, columns=needed)
        for number, row in enumerate((row for b in batches for row in b.to_pylist()), 1):
            yield number, f"row {number}", row
    except pyarrow.ArrowException as e:
        raise ValueError(f"{file} is not readable Parquet: {' '.join(str(e).split())}") from None


_READERS = {".jsonl": _lines, ".csv": _cells, ".parquet": _table}


def _field(file: Path, rows: list[Row], given: str | None, notes: Notes) -> str:
    """The field that holds the text, by the rule above."""
    _, where, first = rows[0]
    if given is None and "text" in first:
        return "text"
    if given is None:
        for name in CHATS:
            if any(isinstance(row.get(name), list) for _, _, row in rows):
                return name
        long = [name for name in first if _is_long([row.get(name) for _, _, row in rows])]
        if len(long) == 1:
            notes.found.setdefault(long[0], str(file))
            return long[0]
    if given in first:
        return given
    what = "string field" if kind_of(file.name) == ".jsonl" else "column"
    there = ", ".join(map(str, list(first)[:12])) or "none"
    raise ValueError(
        f"{file}, {where}: no {what} `{given or 'text'}`; it has {there[:300]}: name "
        f"{'one of them' if given else 'the text'} with --text-field"
    )


def _is_long(values: list) -> bool:
    there = [v for v in values if v is not None]
    texts = bool(there) and all(isinstance(v, str) for v in there)
    return texts and sum(map(len, there)) >= _LONG * len(there)


def _of_rows(
    name: str, file: Path, field: str | None, chat: Chat | None, notes: Notes
) -> Iterator[tuple[str, str | np.ndarray]]:
    kind = kind_of(file.name)
    first = list(islice(_READERS[kind](file, None), _FIRST_ROWS))
    if not first:
        return
    field = _field(file, first, field, notes)
    what = "string field" if kind == ".jsonl" else "column"
    for number, where, row in _READERS[kind](file, [field, "tools"]):
        value = row.get(field, 0)  # 0: the row has no such field
        if value is None or (isinstance(value, str) and not value.strip()):
            notes.leave_out("rows without text", f"{file}, {where}")
        elif isinstance(value, str):
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise ValueError(
                    f"{file}, {where}: half of a surrogate pair (half an emoji); mend the line"
                )
            yield f"{name}:{number}", value
        elif not isinstance(value, list):
            raise ValueError(f"{file}, {where}: no {what} `{field}`")
        elif chat is None:
            raise ValueError(f"{file} holds chats (`{field}`); plain text is asked for here")
        else:
            try:
                ids = chat(value, row.get("tools"))
            except ChatRefused as e:
                notes.leave_out("chats that the template refuses", f"{file}, {where}: {e}")
                continue
            except ValueError as e:
                raise ValueError(f"{file}, {where}: {e}") from None
            yield f"{name}:{number}", ids
