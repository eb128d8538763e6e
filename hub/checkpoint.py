"""Bytes on disk: Hugging Face directories in and out, strictly, atomically, and with nothing ever
executed.

What.  A checkpoint is a directory: config.json, one model.safetensors or several shards with an
index, and the tokenizer's files. A safetensors file (shards.py) can be mapped into memory and holds
no code.

Reading.  The headers alone are read first and compared with the shapes that config.json implies, so
that a wrong checkpoint is refused in milliseconds and before any allocation. Then each tensor is
mapped, checked to be finite and put in its place. What is distrusted: shard names and links that
leave the directory, index and shards that disagree, JSON that is huge or deep, and names that stand
twice. That lengths, byte ranges, shapes and types fit each other, safetensors checks. A directory
that can be read as two models is refused, lest this program train one and a client serve the other:
a whole file and shards that differ from it, a head of its own where config.json says it is the
embedding, an adapter beside the weights.

Writing.  Into a temporary neighbour, synced, then renamed: a kill at any moment leaves the old
state or the new. A few threads write tensors to their places in all shards, so that the host's
memory holds a few tensors at a time; a shard that is whole is synced while the next is written.
Tensors may be there before the rest is known (engine/head_start.py). Before `save_pretrained`
reports success it reads its own output back, whoever wrote it, compares every byte, and the
logits under the configuration read back with those under the one in memory. The tokenizer's files
and the licence are the source's, byte for byte, but for the lengths at which programs cut texts,
and references to code.

Limits.  safetensors only. A pytorch_model.bin or Meta's consolidated.*.pth is a pickle, which can
run code: refused, with the remedy named.

Source.  The safetensors format description; the layout of transformers 4.57 and 5.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hub import files
from hub.shards import DTYPES, INDEX, SHARD_BYTES, SINGLE, Shards, bytes_of

_THREADS = 4  # that read or write tensors: one is slower than a disk, and than the way to a GPU
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of more of them
NOTICES = tuple(
    name + end
    for name in ("LICENSE", "LICENCE", "COPYING", "NOTICE", "Notice", "USE_POLICY")
    for end in ("", ".md", ".txt")
)
# Keys by which a tokenizer's or a generation's settings state a length
_LENGTHS = ("model_max_length", "max_len", "max_length", "max_cache_len")
# Parts of tensors' names, and dtypes, of quantised weights: GPTQ and AWQ, bitsandbytes,
# compressed-tensors, fp8, MLX
_PACKED = {"qweight", "qzeros", "g_idx", "absmax", "quant_map", "quant_state", "SCB", "scales"}
_PACKED |= {"biases", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape"}
_PACKED_DTYPES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "U32", "F4")
_WRAPPERS = {  # prefixes of tensors' names: who adds them
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
}


def read_config(path: Path) -> dict:
    """config.json of a model's directory, with the length that its tokenizer states.

    Raises ValueError that says what `path` is instead, and what to give.
    """
    if path.is_file():
        whole = f"{path} is a file; give a Hugging Face directory: config.json, weights, tokenizer"
        if path.suffix == ".gguf":
            whole = f"{path} is llama.cpp's format; give the Hugging Face directory it was made of"
        if path.name.endswith((".safetensors", ".json")):
            whole += f", such as {path.absolute().parent}"
        raise ValueError(whole)
    file = files.file_of(path, "config.json")
    if files.file_of(path, "adapter_config.json").is_file():
        raise ValueError(_adapter(path, file.is_file()))
    if not file.is_file() and path.is_dir():
        inside = [p.parent.name for p in path.glob("*/config.json")]
        if inside:  # checkpoint-1000 is after checkpoint-500
            last = max(inside, key=lambda n: (len(n), n) if n.startswith("checkpoint-") else (0, n))
            raise ValueError(
                f"{path} holds no config.json, but {_some(sorted(inside))} in it "
                f"do{'es' * (len(inside) == 1)}: give {path / last}"
            )
    config = files.read_json(file)
    stated = files.json_of(path, "tokenizer_config.json").get("model_max_length")
    if type(stated) is int and stated < 2**31:  # decides what a linear teacher's length is
        config.setdefault("model_max_length", stated)
    return config


def _adapter(path: Path, whole: bool) -> str:
    base = files.json_of(path, "adapter_config.json").get("base_model_name_or_path")
    if whole:
        return (
            f"{path} holds a model and an adapter (adapter_config.json, of {base}), of which "
            "transformers would load the adapter; move one of them elsewhere"
        )
    merged = path.absolute().parent / "student"
    if (merged / "config.json").is_file():
        return f"{path} is an adapter, not a model; it is merged in {merged}: give that"
    return (
        f"{path} is an adapter of {base}, not a model; merge it first, with peft: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload()"
        '.save_pretrained("merged"), and copy the tokenizer there'
    )


@contextlib.contextmanager
def open_safetensors(file: Path):
    """The file, mapped, its header checked by safetensors: sizes, byte ranges, types.

    Raises ValueError in one sentence that names the file, for an error while it is open as well.
    """
    files.refuse_pointer(file)
    try:
        with files.reading(file), safe_open(file, framework="pt", device="cpu") as f:
            yield f
    except SafetensorError as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{file} is truncated or not safetensors: {reason}") from None


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (dtype, shape)} of one safetensors file.

    Raises ValueError naming the file and what is wrong in it.
    """
    with open_safetensors(path) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - no mapping
        out = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    with path.open("rb") as f:  # of two equal names safetensors takes the last: refused
        length = int.from_bytes(f.read(8), "little")
        files.parse_json(f.read(length), f"the header of {path}")
    return out


def find_tensors(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """{tensor name: (file, dtype, shape)} of a model directory, sharded or not, from headers alone.

    Raises ValueError where files, index and headers do not agree.
    """
    index, single = files.file_of(path, INDEX), files.file_of(path, SINGLE)
    if not index.is_file():
        if not single.is_file():
            raise ValueError(_no_weights(path))
        return {name: (single, *held) for name, held in read_header(single).items()}
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    found = {}
    for name in sorted(set(weight_map.values())):
        file = _shard(path, name)
        for tensor, held in read_header(file).items():
            if weight_map.get(tensor) != name:  # so that none stands in two shards
                raise ValueError(
                    f"tensor {tensor!r} is in {name}, but the index says {weight_map.get(tensor)!r}"
                )
            found[tensor] = (file, *held)
    if absent := sorted(set(weight_map) - set(found)):
        raise ValueError(f"the index names {_some(absent)}, which the shards do not hold")
    return found


def _shard(path: Path, name: str) -> Path:
    """The shard's file, refused if it is not this directory's own."""
    if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
        raise ValueError(
            f"the index names the shard {name!r}; shards must be .safetensors files in {path}"
        )
    if not (file := files.file_of(path, name)).is_file():
        raise ValueError(f"{path / name} is missing; download the directory again")
    return file


_INSTEAD = {  # files that others keep weights in: what to do about them
    "pytorch_model*.bin": "has only pytorch_model.bin, a pickle, which can run code and is never "
    "opened; download the model's safetensors, or convert it once with transformers' "
    "save_pretrained",
    "*.gguf": "has weights in llama.cpp's format (.gguf) only; give the directory of safetensors "
    "they were made of",
    "consolidated*": "is in Meta's own format; use the repository's Hugging Face version (its name "
    "ends in -hf)",
}


def _no_weights(path: Path) -> str:
    for pattern, remedy in _INSTEAD.items():
        if any(path.glob(pattern)):
            return f"{path} {remedy}"
    return f"{path} holds no {SINGLE} and no {INDEX}"


def check_fits(model: nn.Module, path: Path) -> dict[str, Path]:
    """{parameter: its file}, from headers alone, unless the directory may hold a second model.

    Raises ValueError naming every tensor that is missing, left over, or of another shape or dtype.
    """
    found = find_tensors(path)
    _refuse_second_model(path, found)
    # A tied head appears once
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _refuse_other_formats(path, found, wanted)
    if model.config.tied and "lm_head.weight" in found:  # some writers store the tied copy too
        _refuse_own_head(path, found)
        del found["lm_head.weight"]
    # Old LLaMA files hold these buffers
    found = {k: v for k, v in found.items() if not k.endswith("rotary_emb.inv_freq")}
    wrong = [
        f"{n} is {list(found[n][2])}, not {list(s)}"
        for n, s in wanted.items()
        if n in found and found[n][2] != s
    ]
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    dtypes = {n: found[n][1] for n in wanted if n in found}
    wrong += [f"{n} has dtype {dtype}" for n, dtype in dtypes.items() if dtype not in DTYPES]
    faults = {"missing": missing, "not in the model": extra, "of another shape or dtype": wrong}
    if missing == ["lm_head.weight"] and not extra and not wrong:
        raise ValueError(
            f"the weights in {path} have no lm_head.weight; if the head is the embedding, set "
            '"tie_word_embeddings": true in config.json'
        )
    if wrong := [f"{what}: {_some(names)}" for what, names in faults.items() if names]:
        raise ValueError(f"the weights in {path} do not fit its config.json; {'; '.join(wrong)}")
    return {name: found[name][0] for name in wanted}


def _refuse_second_model(path: Path, found: dict) -> None:
    """A whole file beside an index of others: transformers reads the file, we read the shards."""
    single = files.file_of(path, SINGLE)
    shards = {file for file, _, _ in found.values()}
    if not single.is_file() or shards == {single}:
        return
    held = read_header(single)
    same = held == {name: (dtype, shape) for name, (_, dtype, shape) in found.items()}
    if not same or not all(_equal((single, name), (found[name][0], name)) for name in held):
        raise ValueError(
            f"{path} holds two models: {SINGLE}, and the shards that "
            f"{INDEX} names; move the one that is not meant elsewhere"
        )


def _refuse_own_head(path: Path, found: dict) -> None:
    """A tied config.json beside a head that is not the embedding: transformers 5 uses the head."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if embedding not in found:
        return  # missing, which is said later
    if found[head][2] == found[embedding][2] and _equal(
        (found[head][0], head), (found[embedding][0], embedding)
    ):
        return
    raise ValueError(
        f"config.json in {path} has tie_word_embeddings = true, but {head} differs from "
        f'{embedding}: set "tie_word_embeddings": false, or remove {head} from the weights'
    )


def _equal(first: tuple[Path, str], second: tuple[Path, str]) -> bool:
    """Whether two tensors, each (file, name), hold the same numbers; they are mapped, not read."""
    with open_safetensors(first[0]) as f, open_safetensors(second[0]) as g:
        return torch.equal(f.get_tensor(first[1]), g.get_tensor(second[1]))


def _refuse_other_formats(path: Path, found: dict, wanted: dict) -> None:
    """Weights that are quantised, or named by a wrapper, in a sentence of their own."""
    packed = [n for n in found if n not in wanted and _PACKED & set(n.split("."))]
    packed += [n for n in found if found[n][1] in _PACKED_DTYPES]
    if packed:
        raise ValueError(
            f"the weights in {path} are quantised ({_some(sorted(packed), 2)}), and what is "
            "trained and exported here are full weights: give the original model"
        )
    for name in found:
        prefixes = [prefix for prefix in _WRAPPERS if prefix in name]
        bare = name
        for prefix in prefixes:
            bare = bare.replace(prefix, "")
        if name not in wanted and bare in wanted:
            authors = " and ".join(_WRAPPERS[prefix] for prefix in prefixes)
            raise ValueError(
                f"the names of the tensors in {path} hold {' and '.join(map(repr, prefixes))}, as "
                f"in {name}, which {authors} adds; save the model inside it again"
            )


def load_weights(model: nn.Module, path: Path, *, dtype: torch.dtype | None, device: str) -> None:
    """Fills a model built on `meta`; dtype None keeps each tensor's own.

    Raises ValueError as check_fits does, and for a file that cannot be read.
    """
    stored = read_tensors(path, list(check_fits(model, path)))
    # A thread of its own begins with another GPU than this one's
    device = torch.empty(0, device=device).device

    def load(name: str) -> Tensor:
        tensor = stored[name].to(device)
        low, high = torch.aminmax(tensor)  # NaN goes through both; no copy is made
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(
                f"tensor {name} holds NaN or infinity; the file is damaged, or training diverged"
            )
        return tensor.to(dtype or tensor.dtype)

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, value in zip(stored, pool.map(load, stored), strict=True):
            set_parameter(model, name, value)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts `value`, any shape, in the place of parameter `name`, and of a head that is tied to it.

    A parameter is taken as it is, shared and not copied; a plain tensor becomes one without grad.
    """
    if not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)
    if name == "model.embed_tokens.weight" and model.config.tied:
        model.lm_head.weight = value


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_pretrained(model, path: str | Path, **how) -> None:
    """Writes a Hugging Face directory that appears whole or not at all; `how`: see
    write_pretrained.
    """
    with files.atomic_directory(Path(path)) as work:
        write_pretrained(model, work, **how)


def laid_out(
    model, *, dtype: torch.dtype | None, frozen_from: Path | None, trained: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({tensor of an export: the same without numbers}, {frozen ones: the bytes of `frozen_from`,
    mapped}); the arguments are write_pretrained's. The model itself may be without numbers.
    """
    held, stored = dict(model.named_parameters()), {}
    if frozen_from:
        stored = read_tensors(frozen_from, [n for n in held if n.split(".")[-2] not in trained])
    kinds = {n: stored[n].dtype if n in stored else dtype or p.dtype for n, p in held.items()}
    like = {n: torch.empty_like(p, dtype=kinds[n], device="meta") for n, p in held.items()}
    return like, stored


def write_pretrained(
    model,
    work: Path,
    *,
    tokenizer_from: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
    frozen_from: Path | None = None,
    trained: tuple[str, ...] = (),
    written: Set[str] = frozenset(),
    then: Callable[[], None] = lambda: None,
) -> None:
    """Fills the folder `work`, calls `then`, reads it back and compares logits before it returns.

    dtype None keeps each tensor's own; tokenizer_from: a directory whose tokenizer files are copied
    byte for byte. frozen_from: a directory whose own bytes replace every tensor but those of the
    modules named in `trained`, as a model that computes in bfloat16 may hold a rounded copy of
    them. written: frozen tensors that are in `work` already, in the files of the same Shards.
    Raises RuntimeError if what is on disk is not what is meant, or does not give the same logits.
    """
    held = {name: p.detach() for name, p in model.named_parameters()}
    like, stored = laid_out(model, dtype=dtype, frozen_from=frozen_from, trained=trained)

    def meant(name: str) -> Tensor:
        """The tensor as it is to be written, mapped or on the model's device."""
        return stored[name] if name in stored else held[name].to(like[name].dtype)

    config = model.config.to_hf()
    config.pop("dtype", None)
    kind = str(like["model.embed_tokens.weight"].dtype)
    config["torch_dtype"] = kind.removeprefix("torch.")  # every transformers reads this key
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer_from:
        _copy_tokenizer(Path(tokenizer_from), work, model.config.rope.length)
    if card:
        (work / "README.md").write_text(card, encoding="utf-8")
    with Shards(work, like, shard_bytes) as shards, ThreadPoolExecutor() as syncing:
        synced = _write_shards(shards, meant, syncing, written)
        then()
        # While the last ones are synced
        _check_written(model, work, meant, stored.keys(), frozen_from)
        for shard in synced:
            shard.result()


def copied_files(source: Path) -> dict[str, Path]:
    """{name in an export: the file of `source`}: tokenizer, chat templates, licence.

    Raises ValueError where a link leads out of the directory.
    """
    more = sorted(p.name for p in (source / TEMPLATES).glob("*.jinja"))
    found = {name: files.file_of(source, name) for name in (*TOKENIZER_FILES, *NOTICES)}
    found |= {f"{TEMPLATES}/{name}": files.file_of(source, name, inside=TEMPLATES) for name in more}
    return {name: file for name, file in found.items() if file.is_file()}


def _copy_tokenizer(source: Path, work: Path, length: int) -> None:
    for name, file in copied_files(source).items():
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, work / name)
    changes = {"tokenizer_config.json": _lengthened, "generation_config.json": _lengthened}
    for name, change in (changes | {"tokenizer.json": _uncut}).items():
        if (file := work / name).is_file():
            file.write_bytes(change(file.read_bytes(), length))


def _lengthened(data: bytes, length: int) -> bytes:
    """Settings in which every length that is stated is `length` tokens, and without auto_map, which
    names code."""

    def number(m: re.Match) -> bytes:
        return m[1] + str(length).encode() if float(m[2]) < 1e18 else m[0]

    old = files.parse_json(data, "settings")
    new = {k: v for k, v in _raised(old, length).items() if k != "auto_map"}
    stated = rb'("(?:' + "|".join(_LENGTHS).encode() + rb')"\s*:\s*)([-+.\deE]+)'
    return _rewritten(data, old, new, re.sub(stated, number, data))


def _raised(value, length: int):
    """`value` with the lengths in it, at any depth; 10^18 or more means that there is none."""
    if isinstance(value, list):
        return [_raised(v, length) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        k: length if k in _LENGTHS and type(v) in (int, float) and v < 1e18 else _raised(v, length)
        for k, v in value.items()
    }


def _uncut(data: bytes, length: int) -> bytes:
    """A tokenizer.json that does not cut texts, as some do that were saved while cutting."""
    old = files.parse_json(data, "tokenizer.json")
    new = old | {"truncation": None} if old.get("truncation") else old
    short = re.sub(rb'"truncation"\s*:\s*\{[^{}]*\}', b'"truncation": null', data, count=1)
    return _rewritten(data, old, new, short)


def _rewritten(data: bytes, old: dict, new: dict, edited: bytes) -> bytes:
    """The bytes of `new`: as few as can be differ from `data`, which holds `old`."""
    if new == old:
        return data
    if files.parse_json(edited, "settings") == new:
        return edited
    return json.dumps(new, indent=2, ensure_ascii=False).encode() + b"\n"


def _write_shards(
    shards: Shards,
    tensor_of: Callable[[str], Tensor],
    syncing: ThreadPoolExecutor,
    written: Set[str] = frozenset(),
) -> list[Future]:
    """All weights but those that are `written`, and their index; returns what syncs each file."""

    def write(name: str) -> None:
        tensor, like = tensor_of(name).cpu(), shards.like[name]
        assert tensor.dtype == like.dtype and tensor.shape == like.shape
        shards.write(name, bytes_of(tensor))

    def sync(file: str, begun: list[Future]) -> None:
        wait(begun)
        shards.sync(file)

    all_begun, synced = [], []
    with ThreadPoolExecutor(_THREADS) as writing:
        for file, names in shards.names.items():
            begun = [writing.submit(write, name) for name in names if name not in written]
            all_begun += begun
            synced.append(syncing.submit(sync, file, begun))
        for each in all_begun:
            each.result()
    if shards.index:
        (shards.work / INDEX).write_text(json.dumps(shards.index, indent=2) + "\n")
    return synced


def _check_written(
    model, work: Path, meant: Callable[[str], Tensor], frozen: Set[str], frozen_from: Path | None
) -> None:
    """The directory must load, hold exactly the bytes that are `meant`, and give these weights'
    logits under the configuration of the model in memory.

    Of a frozen tensor the model must hold a copy, rounded or not: else `frozen_from` is another
    model's by now, or something was trained unsaid.
    """
    written = type(model).from_pretrained(work, device=str(model.device))
    with torch.device("meta"):
        expected = type(model)(model.config)
    held, found = dict(model.named_parameters()), dict(written.named_parameters())

    def check(name: str) -> None:
        own, p = held[name].detach(), found[name].detach()
        if own.dtype == p.dtype and _same_bits(p, own.to(p.device)):
            return  # as the model holds it; the teacher's file need not be read again
        same = meant(name).to(p.device)
        if name in frozen and not _same_bits(same.to(own.dtype), own.to(p.device)):
            raise RuntimeError(
                f"{name} is not what {frozen_from} holds, and not said to be trained"
            )
        if not (p.dtype == same.dtype and _same_bits(p, same)):
            raise RuntimeError(
                f"the export in {work} does not hold {name} as it was written; the disk may fail"
            )

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, _ in zip(found, pool.map(check, found), strict=True):
            set_parameter(expected, name, found[name])
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        a, b = expected.eval()(ids).float(), written(ids).float()
    largest = a.nan_to_num(0, 0, 0).abs().max().item()  # finite, for weights near float's largest
    if not torch.allclose(a, b, rtol=1e-5, atol=1e-6 * largest, equal_nan=True):
        raise RuntimeError(
            f"the export in {work} gives other logits than the model: {(a - b).abs().max()}"
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Of two tensors of one shape and dtype; eight bytes at a time where they lie so, which takes a
    fifth of the time.
    """
    a, b = (x.contiguous().view(-1) for x in (a, b))
    at = [x.storage_offset() * x.itemsize for x in (a, b)]
    wide = torch.int64 if not any(n % 8 for n in (a.nbytes, *at)) else torch.uint8
    return torch.equal(a.view(wide), b.view(wide))


def read_tensors(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Tensors of a directory as they are stored."""
    found, out = find_tensors(path), {}
    for file in sorted({found[n][0] for n in names}):
        with open_safetensors(file) as f:
            out |= {n: f.get_tensor(n) for n in names if found[n][0] == file}
    return out


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype of the embedding on disk, which an export keeps."""
    return DTYPES[find_tensors(path)["model.embed_tokens.weight"][1]]
