"""The text that is read where --data names none: the sources of sympy, the same bytes everywhere.

What.  sympy (symbolic mathematics) is in pure Python and torch requires it, so it is there wherever
this program runs, and needs no network. Its wheel is one for all interpreters and platforms, and
requirements.txt pins its version: 781 files and 15.5 MB of ordinary Python, tests, benchmarks and
generated parsers left out.

How it is made sure.  DIGEST is the sha256 of one line "name NUL sha256 of its contents" for each
file, by name. Another version, or one file changed, added or missing, is refused: a figure that was
printed on this text can be compared with any other that was.

Limits.  Python and mathematics in English: for a model that is to read something else, give --data.
"""

import hashlib
import importlib.util
from pathlib import Path

from hub import files

VERSION = "1.14.0"
NAME = f"the sources of sympy {VERSION}"
DIGEST = "52c2e3c204abf3f89dc423349189bad764322b8e2a2dacb3a9f77641fb3b7503"
LEFT_OUT = {"tests", "benchmarks", "parsing"}


def find_files(root: Path | None = None) -> list[tuple[str, Path]]:
    """(name, file) of every source by name, such as sympy/core/add.py.

    root: the folder `sympy`, wherever it was unpacked; None: the one that this Python would import.
    Raises ValueError where it is missing or holds other bytes.
    """
    remedy = f"pip install sympy=={VERSION}, or give --data"
    if root is None:
        spec = importlib.util.find_spec("sympy")
        if not (spec and spec.submodule_search_locations):
            raise ValueError(f"without --data {NAME} are read, and it is not installed; {remedy}")
        root = Path(spec.submodule_search_locations[0])
    found = sorted(
        ("/".join(("sympy", *parts)), file)
        for file in root.rglob("*.py")
        if not LEFT_OUT.intersection(parts := file.relative_to(root).parts)
    )
    value = hashlib.sha256()
    for name, file in found:
        value.update(f"{name}\0{files.digest(file)}\n".encode())
    if value.hexdigest() != DIGEST:
        raise ValueError(f"without --data {NAME} are read, and {root} holds others; {remedy}")
    return found
