"""A seeded fuzzer: damaged checkpoints, text, states, folders and flags, each refused in a sentence or right.

    python tests/fuzz.py --cases 20000 --seed 1        what tests/test_fuzz.py does with 1,200 cases

What.  Each case damages one thing in a fresh copy and asks the part of the program that meets it
first: the plan (config.json, headers, tokenizer, flags), the corpus (rows, chats), the newest state,
the folder, the environment of a launcher; or adds to it: a length, a second model, a key of a rope
table.
The oracle: a ValueError of one sentence and a tree that is unchanged, byte for byte; or success. A
checkpoint that is taken must give the logits that transformers gives, checked for one case in 25.

How.  Everything runs in this process, on a model of 2 layers and width 32, as all refusals come
before anything heavy. Case n of seed s is the same on every machine.

Limits.  It finds what its mutators can say; a mutator for each kind of file, not for each format.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import write_model  # noqa: E402

import rope  # noqa: E402
import train  # noqa: E402
from engine import announce, data, fit, flags, folder, parallel, plan, states  # noqa: E402
from hub import checkpoint, rope_json  # noqa: E402
from hub.chats import Chats  # noqa: E402
from hub.tokenizer import load_tokenizer  # noqa: E402
from model import Llama, LlamaConfig, make_student  # noqa: E402

HOSTILE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    1e308,
    -1e308,
    10**30,
    "",
    "x",
    "8",
    [],
    [1, "a"],
    {},
    {"a": 1},
]
CHATS = ("messages", "conversations")
JINJA = ["{{", "}}", "{%", "%}", "{% if x %}", "{% endfor %}", "'", "|", "tojson", "1/0", "\n", "{{ raise_exception('no') }}",
         "{{ messages }}", "{{ x.y.z }}", "{% set a = 1 %}", "-", " ", "{{ bos_token }}", "{{ [] * 3 }}"]  # fmt: skip
SETTINGS = {
    "tokenizer_class": ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer"],
    "add_bos_token": [True, False, None],
    "add_eos_token": [False, None],
    "chat_template": ["x", None],
}  # fmt: skip
STATED = ["model_max_length", "max_len", "max_length", "max_cache_len"]
FLAGS = ["tokens1", "length2", "batch1", "lr1", "lr2", "logit-weight", "native-blocks", "lookups", "skips1", "skips2", "lora-rank",
         "lora-alpha", "lora-dropout", "micro", "seed", "eval-blocks", "save-minutes", "peak-tflops", "scale"]  # fmt: skip
WORDS = [
    "nan",
    "inf",
    "-inf",
    "0",
    "-1",
    "1e400",
    "9" * 400,
    "",
    " ",
    "0x10",
    "1e-320",
    "true",
    "٣",
    "1_000",
    "8",
    "2",
]


class Wrong(AssertionError):
    """The program broke its promise."""


def damage_bytes(rng: random.Random, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif kind == 1:
        for _ in range(rng.randrange(1, 9)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 2:
        raw += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    elif kind == 3:
        start = rng.randrange(len(raw))
        del raw[start : start + rng.randrange(1, 400)]
    else:
        raw = bytearray(rng.randbytes(rng.randrange(200)))
    file.write_bytes(raw)


def damage_json(rng: random.Random, file: Path) -> None:
    value = json.loads(file.read_text())
    place = value
    for _ in range(rng.randrange(3)):
        inner = [
            v
            for v in (place.values() if isinstance(place, dict) else place)
            if isinstance(v, dict | list) and v
        ]
        place = rng.choice(inner) if inner else place
    if isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(HOSTILE)
    elif place:
        place[rng.randrange(len(place))] = rng.choice(HOSTILE)
    file.write_text(json.dumps(value))


def checkpoint_case(rng: random.Random, work: Path, base: Path) -> None:
    """A damaged model directory, read as a run's plan reads it; what is taken must load and compute."""
    path = Path(shutil.copytree(base / "teacher", work / "teacher"))
    file = path / rng.choice(["config.json"] * 4 + ["tokenizer.json", "tokenizer_config.json", "model.safetensors"] * 2
                             + ["tokenizer.tiktoken"])  # fmt: skip
    (damage_json if file.suffix == ".json" and rng.random() < 0.7 else damage_bytes)(rng, file)
    args = flags.parse(["--teacher", str(path), "--device", "cpu"], "", train.PRESETS)
    config = LlamaConfig.from_hf(json.loads((path / "config.json").read_text()))
    student = config.extended(plan.rope_kind(config), 2)
    load_tokenizer(path)
    number = plan.numbers(args, config, student, train.defaults)
    plan.check(args, config, student, plan.make_stages(args, config, number), 1)
    ids = torch.arange(7)[None] % config.vocab_size
    ours = Llama.from_pretrained(path, dtype=torch.float32)(ids)
    if rng.random() < 0.04:
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(ids).logits
        if not torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.std().item()):
            raise Wrong("other logits than transformers'")


def length_case(rng: random.Random, work: Path, base: Path) -> None:
    """Lengths wherever a file may state one: an export states its own, or none."""
    path = Path(shutil.copytree(base / "teacher", work / "model"))
    places = {"config.json": [*rope_json.LENGTHS, "max_length"]}
    places |= dict.fromkeys(("generation_config.json", "tokenizer_config.json"), STATED)
    values = [64, 64, 32, 128, 64.0, 10**30, *HOSTILE]
    for name, keys in places.items():
        file = path / name
        given = json.loads(file.read_text()) if file.is_file() else {}
        for key in rng.sample(keys, rng.randrange(len(keys) + 1)):
            given[key] = rng.choice(values)
            if name != "config.json" and rng.random() < 0.3:
                given["inner"] = {key: rng.choice(values)}
        file.write_text(json.dumps(given, indent=rng.choice([None, 2])))
    if rng.random() < 0.1:
        given = json.loads((path / "config.json").read_text())
        given["max_position_embeddings"] = rng.choice(HOSTILE)
        (path / "config.json").write_text(json.dumps(given))
    model = Llama.from_pretrained(path)
    kind = rng.choice(["linear", "ntk", "yarn", "llama3", "dynamic"])
    student = make_student(model, model.config.extended(kind, 2))
    checkpoint.save_pretrained(student, work / "x", tokenizer_from=path)
    length = student.config.rope.length
    for name, keys in places.items():
        written = json.loads((work / "x" / name).read_text())
        for given in (written, written.get("inner", {})):
            found = {k: given[k] for k in keys if k in given}
            wrong = {
                k: v
                for k, v in found.items()
                if type(v) in (int, float) and v not in (length, 1e30)
            }
            if wrong and not all(v >= 1e18 for v in wrong.values()):
                raise Wrong(f"{name} of an export states {wrong}")
            if found and name == "config.json":
                raise Wrong(f"config.json of an export has {found}")
    again = Llama.from_pretrained(work / "x")
    if again.config.rope.length != 2 * model.config.rope.length:
        raise Wrong(f"the export is {again.config.rope.length} tokens long")


def two_models_case(rng: random.Random, work: Path, base: Path) -> None:
    """A second model in the folder, or a part of one: refused, or what transformers reads."""
    path = Path(shutil.copytree(base / "teacher", work / "model"))
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    tensors, config = load_file(single), json.loads((path / "config.json").read_text())
    for _ in range(rng.randrange(1, 4)):
        kind = rng.choice(["shards", "head", "adapter", "loose", "bin", "key", "tied", "unlink"])
        other = {k: v + rng.choice([0, 0, 1e-3]) for k, v in tensors.items()}
        if kind == "shards":
            names = sorted(other)
            names = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
            for file in set(names.values()):
                part = {n: other[n] for n in names if names[n] == file}
                save_file(part, path / file, metadata={"format": "pt"})
            index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
        elif kind == "head":
            head = other["model.embed_tokens.weight"].clone()
            save_file(tensors | {"lm_head.weight": head}, single, metadata={"format": "pt"})
        elif kind == "adapter":
            given = {
                "base_model_name_or_path": rng.choice(["org/base", None, 3]),
                "peft_type": "LORA",
            }
            (path / "adapter_config.json").write_text(json.dumps(given))
        elif kind == "loose":
            file = path / "model-00001-of-00003.safetensors"
            save_file(other, file, metadata={"format": "pt"})
        elif kind == "bin":
            (path / rng.choice(["pytorch_model.bin", "consolidated.00.pth", "x.gguf"])).write_bytes(
                b"x"
            )
        elif kind == "key":
            config["transformers_weights"] = rng.choice(
                ["model-00001-of-00003.safetensors", "x", None]
            )
        elif kind == "tied":
            config["tie_word_embeddings"] = rng.random() < 0.5
        elif index.is_file():
            single.unlink(missing_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(7)[None]
    ours = Llama.from_pretrained(path, dtype=torch.float32)(ids)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
    if not torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.std().item()):
        raise Wrong("other logits than transformers'")


def rope_case(rng: random.Random, work: Path, base: Path) -> None:
    """A rope table with keys of any kind: refused, or the frequencies of transformers."""
    keys = {"factor": [2.0, 4.0, 1.0, 8], rope_json._M0: [16, 32, 64], "rope_theta": [5e5]}
    keys |= {"beta_fast": [32.0], "mscale": [1.0], "truncate": [False], "attention_factor": [1.1]}
    keys |= {
        "low_freq_factor": [1.0],
        "high_freq_factor": [4.0],
        "full_attention": [{"factor": 4.0}],
    }
    keys |= {
        "short_factor": [[1.0] * 4],
        "long_factor": [[2.0] * 4],
        "alpha": [1.0],
        "finetuned": [True],
    }
    needed = {"yarn": 1, "llama3": 4, "longrope": 4, "linear": 1, "dynamic": 1, "default": 0}
    kind = rng.choice(sorted(needed))
    table = {rng.choice(["type", "rope_type"]): kind}
    wanted = ["factor", rope_json._M0, *rope.TUNING.get(kind, {})] if kind != "default" else []
    for key in [k for k in wanted if k in keys and rng.random() < 0.9]:
        table[key] = rng.choice(keys[key])
    if rng.random() < 0.5:
        key = rng.choice(sorted([*keys, "rope_type", "type"]))
        table[key] = rng.choice([*keys.get(key, [*needed]), *HOSTILE])
    config = json.loads((base / "teacher" / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("rope_")}
    config[rng.choice(["rope_scaling", "rope_parameters"])] = table
    if rng.random() < 0.3:
        config[rng.choice(rope_json.LENGTHS)] = rng.choice([64, 128, 256, *HOSTILE])
    ours = LlamaConfig.from_hf(config).rope
    rope_json.doubt(config)
    written = rope_json.read(LlamaConfig.from_hf(config).to_hf())
    if written.length != ours.length:
        raise Wrong(f"{ours} is written as {written}")
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    family = config.pop("model_type")
    theirs = transformers.AutoConfig.for_model(family, **config)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        return
    expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=200)
    w, attention = rope.frequencies(ours, ours.head_dim, 200)
    if not torch.allclose(w, expected, rtol=1e-5, atol=0) or abs(attention - factor) > 1e-5:
        raise Wrong(f"other frequencies than transformers': {table}")


def data_case(rng: random.Random, work: Path, base: Path) -> None:
    """Damaged text."""
    text = work / "text"
    text.mkdir()
    name = rng.choice(["a.txt", "b.jsonl", "c.jsonl.gz", "d.npy", "e.md", "f.txt.gz", "g.csv"])
    shutil.copy(base / "text" / name, text / name)
    for _ in range(rng.randrange(1, 3)):
        if (text / name).stat().st_size:
            damage_bytes(rng, text / name)
    tokenizer = load_tokenizer(base / "teacher")
    corpus = data.load_corpus([text], tokenizer, work.parent / "cache", quiet=True)
    if len(corpus.train) and not 0 <= int(corpus.train.max()) < tokenizer.size:
        raise Wrong("ids outside the vocabulary")


def rows_case(rng: random.Random, work: Path, base: Path) -> None:
    """Rows with hostile values, of a text, a chat or neither, in any of the three kinds of file."""
    text = work / "text"
    text.mkdir()
    long = "plain words of a text " * 9
    turns = [{"role": "user", "content": long}, {"role": "assistant", "content": "yes"}]
    shared = [{"from": "human", "value": long}, {"from": "gpt", "value": "yes"}]
    rows = []
    for _ in range(rng.randrange(1, 30)):
        row = {"text": long, "messages": turns, "conversations": shared, "tools": [{"a": 1}]}
        row = {k: json.loads(json.dumps(v)) for k, v in row.items() if rng.random() < 0.6}
        for _ in range(rng.randrange(3)):
            row[rng.choice(["text", "messages", "body", "tools"])] = rng.choice([*HOSTILE, long])
        chat = row.get(rng.choice(CHATS))
        if isinstance(chat, list) and chat and rng.random() < 0.3:
            chat[rng.randrange(len(chat))] = rng.choice([*HOSTILE, {"role": "tool"}, {"from": 7}])
        rows.append(row)
    kind = rng.choice(["jsonl", "csv", "jsonl.gz"])
    if kind == "csv":
        lines = [",".join(rng.choice(["text", "body", "id", "messages"]) for _ in range(2))]
        lines += [f"{rng.choice(WORDS)},{rng.choice([long, *WORDS])}" for _ in rows]
        raw = "\n".join(lines).encode()
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    raw = rng.choice([b"", b"\xef\xbb\xbf"]) + raw
    (text / f"x.{kind}").write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    tokenizer = load_tokenizer(base / "chats")
    field = rng.choice([None, None, "text", "messages", "body"])
    cache = work.parent / "cache"
    corpus, again = (
        data.load_corpus([text], tokenizer, cache, quiet=True, field=field) for _ in range(2)
    )
    if corpus.notes != again.notes or int(corpus.train.max()) >= tokenizer.size:
        raise Wrong("the cache says something else than the text, or ids outside the vocabulary")


def template_case(rng: random.Random, work: Path, base: Path) -> None:
    """A damaged chat template: refused in a sentence, or what transformers would write."""
    path = Path(shutil.copytree(base / "chats", work / "chats"))
    source = (path / "chat_template.jinja").read_text()
    for _ in range(rng.randrange(1, 4)):
        at, piece = rng.randrange(len(source)), rng.choice(JINJA)
        source = source[:at] + piece + source[at + rng.randrange(4) :]
    (path / "chat_template.jinja").write_text(source)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ours = Chats(load_tokenizer(path)).text(messages)
    if rng.random() < 0.2:
        import transformers

        theirs = transformers.AutoTokenizer.from_pretrained(path)
        if theirs.apply_chat_template(messages, tokenize=False) != ours:
            raise Wrong("another text than transformers'")


def tokenizer_case(rng: random.Random, work: Path, base: Path) -> None:
    """A tokenizer's settings, class by class: BOS is that of transformers 5.

    On a text that every class splits alike: some of version 5 have a rule of their own.
    """
    path = work / "model"
    path.mkdir()
    whole = json.loads((base / "teacher" / "tokenizer.json").read_text())
    if rng.random() < 0.5:
        begin = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
        single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        known = {"<|end|>": {"id": "<|end|>", "ids": [4095], "tokens": ["<|end|>"]}}
        kind = {"type": "TemplateProcessing", "single": single, "pair": pair}
        whole["post_processor"] = kind | {"special_tokens": known}
    (path / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    for key, values in SETTINGS.items():
        if rng.random() < 0.7:
            settings[key] = rng.choice(values)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = rng.choice([4095, [4095], [4095, 7], [], None, [4095, "x"], -1, 4096])
    config = {"model_type": "llama", "vocab_size": 4096, "eos_token_id": ends}
    (path / "config.json").write_text(
        json.dumps(config | {"bos_token_id": rng.choice([4095, None])})
    )
    if rng.random() < 0.3:
        given = {"eos_token_id": rng.choice(HOSTILE)}
        (path / "generation_config.json").write_text(json.dumps(given))
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_id not in tokenizer.stop_ids:
        raise Wrong("the end token does not stop")
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(path)("a b")["input_ids"]
    if tokenizer.encode("a b", bos=True) != theirs:
        raise Wrong("other ids than transformers'")


def environment_case(rng: random.Random, work: Path, base: Path) -> None:
    """What a launcher, or its remains, may leave in the environment: one process, or a sentence."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [None, None, "0", "1", "2", "localhost", *WORDS]
    given = {name: rng.choice(values) for name in names}
    if str(given["WORLD_SIZE"]).isdecimal() and int(given["WORLD_SIZE"]) > 1:
        given["RANK"] = rng.choice([None, "", "x", "99999999"])  # whole ones would wait for others
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        os.environ.update({k: v for k, v in given.items() if v is not None})
        world = parallel.World("cpu")
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({k: v for k, v in before.items() if v is not None})
    if not world.main or (world.rank, world.size) != (0, 1):
        raise Wrong(f"{given} made process {world.rank} of {world.size}")


def cache_case(rng: random.Random, work: Path, base: Path) -> None:
    """A damaged cache of tokenised text is made again."""
    cache = Path(shutil.copytree(base / "tokens", work / "tokens"))
    damage_bytes(rng, rng.choice([p for p in sorted(cache.rglob("*")) if p.is_file()]))
    tokenizer = load_tokenizer(base / "teacher")
    whole, corpus = (
        data.load_corpus([base / "text" / "a.txt"], tokenizer, place, quiet=True)
        for place in (base / "tokens", cache)
    )
    if corpus.train.tolist() != whole.train.tolist():
        raise Wrong("other ids than those of the text")


def state_case(rng: random.Random, work: Path, base: Path) -> None:
    """A damaged newest state: the one before it is found, or none, and nothing else happens."""
    out = Path(shutil.copytree(base / "states", work / "states"))
    damage_bytes(
        rng, out / "state" / "step-00000002" / rng.choice(["state.json", "rank0.safetensors"])
    )
    found = states.latest(out / "state")
    if found is None:
        raise Wrong("the whole state before it was not found")
    whole = base / "states" / "state" / found.name
    weights = [(p / "rank0.safetensors").read_bytes() for p in (found, whole)]
    if weights[0] != weights[1] or states.load_info(found) != states.load_info(whole):
        raise Wrong(f"{found.name} was taken although it is not as it was written")


def folder_case(rng: random.Random, work: Path, base: Path) -> None:
    """Something foreign in --out, or a damaged mark: refused."""
    out = Path(shutil.copytree(base / "states", work / "out"))
    if rng.random() < 0.5:
        name = rng.choice(["x", "student/x", "state/step-00000002/x", "state/.y", "a/b/c"])
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
        folder.check(out, "--out", "train.py", resume=True, apart={})
        raise Wrong(f"{name} was overlooked")
    damage_json(rng, out / folder.MARK)
    folder.check(out, "--out", "train.py", resume=True, apart={})


def flag_case(rng: random.Random, work: Path, base: Path) -> None:
    """Flags with hostile values, as far as the plan."""
    argv = ["--teacher", str(base / "teacher"), "--device", "cpu", "--out", str(work / "out")]
    for _ in range(rng.randrange(1, 3)):
        argv += [f"--{rng.choice(FLAGS)}", rng.choice(WORDS)]
    args = flags.parse(argv, "", train.PRESETS)
    config = LlamaConfig.from_hf(json.loads((args.teacher / "config.json").read_text()))
    student = config.extended(args.rope or plan.rope_kind(config), args.scale)
    stages = plan.make_stages(args, config, plan.numbers(args, config, student, train.defaults))
    plan.check(args, config, student, stages, 1)
    cpu, rank = torch.device("cpu"), args.lora_rank
    machine = fit.Machine(config, torch.float32, cpu, rank, False, 1, free=1 << 34, host=0)
    for stage in stages:
        need = fit.settle(machine, stage, args.micro).need
        announce.describe(config, student, [stage], [need], rank)


KINDS = {
    "checkpoint": checkpoint_case,
    "length": length_case,
    "two models": two_models_case,
    "rope": rope_case,
    "data": data_case,
    "rows": rows_case,
    "template": template_case,
    "tokenizer": tokenizer_case,
    "environment": environment_case,
    "cache": cache_case,
    "state": state_case,
    "folder": folder_case,
    "flag": flag_case,
}


def prepare(base: Path) -> None:
    """The whole things that cases damage."""
    import numpy as np

    write_model(base / "teacher")
    chats = Path(shutil.copytree(base / "teacher", base / "chats"))
    source = "{% for m in messages %}{{ m.role + ': ' + m['content'] | trim }}{% endfor %}{{ eos_token }}"
    (chats / "chat_template.jinja").write_text(source)
    text = base / "text"
    text.mkdir()
    words = "a few plain words, and then some more of them\n" * 60
    lines = "".join(json.dumps({"text": words[: 40 * i]}) + "\n" for i in range(1, 9))
    table = 'id,text\n1,"a few, plain words"\n' + "2,more\n" * 40
    for name, content in (("a.txt", words), ("e.md", words), ("b.jsonl", lines), ("g.csv", table)):
        (text / name).write_text(content)
    (text / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (text / "f.txt.gz").write_bytes(gzip.compress(words.encode(), mtime=0))
    np.save(text / "d.npy", np.arange(3000) % 4000)
    data.load_corpus(
        [text / "a.txt"], load_tokenizer(base / "teacher"), base / "tokens", quiet=True
    )
    weights = {"w": torch.nn.Parameter(torch.randn(8, 8))}
    world = parallel.World("cpu")
    with folder.Folder(base / "states", "train.py") as out:
        saver = states.Saver(out, world, {"seed": 0}, states.Progress(), overlap=True)
        for step in (1, 2):
            adam = torch.optim.AdamW(weights.values())
            weights["w"].grad = torch.randn(8, 8)
            adam.step()
            at = states.Progress(total=step, step=step)
            saver.start(states.slices(weights, adam, world), at)
            saver.finish()


def tree(path: Path) -> dict:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def run(cases: int, seed: int, only: str | None = None) -> dict[str, list[int]]:
    """{kind: [refused, taken]}, of all kinds or one. Raises Wrong naming the case that broke a
    promise."""
    counts = {kind: [0, 0] for kind in KINDS if only in (None, kind)}
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        prepare(base)
        for n in range(cases):
            rng = random.Random(seed * 1_000_003 + n)
            kind = rng.choice(sorted(counts))
            work = base / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            before = tree(base / "states") | tree(base / "text")
            try:
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    KINDS[kind](rng, work, base)
                counts[kind][1] += 1
            except ValueError as e:
                if not str(e).strip() or "\n" in str(e).strip() or len(str(e)) > 1500:
                    raise Wrong(f"case {n} of seed {seed} ({kind}): not one sentence: {e!r}") from e
                counts[kind][0] += 1
            except Wrong as e:
                raise Wrong(f"case {n} of seed {seed} ({kind}): {e}") from e
            except Exception as e:  # whatever else it is, a user would have seen a traceback
                raise Wrong(f"case {n} of seed {seed} ({kind}): {type(e).__name__}: {e}") from e
            if tree(base / "states") | tree(base / "text") != before:
                raise Wrong(f"case {n} of seed {seed} ({kind}): files changed")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS))
    options = parser.parse_args()
    for kind, (refused, taken) in run(options.cases, options.seed, options.kind).items():
        print(f"{kind:12}{refused:7} refused in a sentence {taken:7} taken")
