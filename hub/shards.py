"""The files of a model's weights: where each tensor lies is known before its numbers are.

What.  A safetensors file is an 8-byte little-endian length, that many bytes of JSON that give each
tensor a dtype, a shape and a byte range, then the bytes. So names, dtypes and shapes alone say
which file holds a tensor, and from which byte on:

    with Shards(work, like, shard_bytes) as shards:     every file, with its head
        shards.write(name, data)                        in any order, threads side by side

Whoever lays out the same tensors again finds them at the same bytes, and may add those that were
not there: what is frozen is written while the rest still learns (engine/head_start.py).

The bytes are those that the safetensors package would write.

Limits.  A file has its head before its numbers: whether they are there, only reading it back says.

Source.  The safetensors format description; the names of shards are huggingface_hub's.
"""

import contextlib
import json
import os
import struct
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards  # which comes with tokenizers
from torch import Tensor

from hub import files

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
SHARD_BYTES = 5_000_000_000
# In the order in which a file holds them: numbers of more bytes first, so that all are aligned
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def header(tensors: dict[str, Tensor], **metadata: str) -> bytes:
    """The head of a safetensors file that holds these tensors, in this order."""
    entries, at = {"__metadata__": metadata} if metadata else {}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        entries[name] = {
            "dtype": names[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, any shape, on the CPU."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class Shards:
    """The weights' files in the folder `work`, each up to shard_bytes long, open between `with` and
    its end.

    like: every tensor without its numbers.
    """

    def __init__(self, work: Path, like: dict[str, Tensor], shard_bytes: int = SHARD_BYTES):
        split = split_torch_state_dict_into_shards(like, max_shard_size=shard_bytes)
        order = list(DTYPES.values())
        self.work, self.like = work, like
        self.nbytes = sum(t.nbytes for t in like.values())
        self.names: dict[str, list[str]] = {}  # of each file, as they lie
        self.heads: dict[str, bytes] = {}
        self.places: dict[str, tuple[str, int]] = {}  # of a tensor: its file and first byte
        for file, names in split.filename_to_tensors.items():
            names = sorted(names, key=lambda n: (order.index(like[n].dtype), n))
            self.names[file] = names
            self.heads[file] = header({name: like[name] for name in names}, format="pt")
            at = len(self.heads[file])
            for name in names:
                self.places[name] = file, at
                at += like[name].nbytes
        self.index = None
        if split.is_sharded:
            self.index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}

    def __enter__(self) -> "Shards":
        with contextlib.ExitStack() as opened:
            self.opened = {}
            for file, head in self.heads.items():
                # Not "xb": another may have begun
                fd = os.open(self.work / file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                self.opened[file] = opened.enter_context(open(fd, "r+b", buffering=0))
                files.write_at(fd, memoryview(head), 0)
            self._close = opened.pop_all().close
        return self

    def __exit__(self, *error) -> None:
        self._close()

    def write(self, name: str, data: memoryview, at: int = 0) -> None:
        """Writes `data`, bytes of a tensor from its byte `at` on, to their place."""
        file, begin = self.places[name]
        files.write_at(self.opened[file].fileno(), data, begin + at)

    def sync(self, file: str) -> None:
        """What was written to a file is on disk."""
        os.fsync(self.opened[file].fileno())
