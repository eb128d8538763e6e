"""The model card: the README.md of an exported directory, so that whoever finds it knows what it is
and how to run it.

What.  Front matter that the Hub reads (the base model, its licence, what the model is for), the
recipe (what was stretched, by how much, in which stages), the scores that the run measured, and the
exact commands for transformers, vLLM, SGLang, llama.cpp, mlx-lm, lm-evaluation-harness and an
upload. Which client reads which kind of positions is docs/clients.md's; the card repeats what is of
its own kind.

How.  Everything comes in as plain values. Names of folders and arguments are escaped: a teacher in
a folder called "<script>" or with a line "---" in its name changes neither page nor front matter.

Limits.  vLLM takes max_position_embeddings, which the Hub's convention sets to the extended length,
for the length before linear scaling, and multiplies it by the factor: --max-model-len says what is
right. Positions of kind "dynamic" run right in transformers and mlx-lm alone: vLLM's table of
positions ends at the native length and llama.cpp's converter drops the scaling, so that the card
leaves both out.

Source.  The Hub's model card metadata; the commands of the programs named.
"""

import html
import json
import re
from pathlib import Path

from hub.files import file_of


def model_card(
    name: str,
    *,
    before: str,
    after: str,
    kind: str,
    length: int,
    stages: list[dict],
    scores: str,
    arguments: dict,
    base_model: str | None = None,
    licence: dict[str, str] | None = None,
) -> str:
    """Markdown.

    name: of the teacher; before, after: its positions and the student's, in words; kind and length
    (tokens): of the student's positions; stages: those that were run, each a cost.Stage's fields;
    scores: a table in Markdown, or ""; arguments: of the run; base_model: the teacher's id on the
    Hub; licence: its front matter, from `licence_of`.
    """
    title = f"{_plain(name)}, extended to {length:,} tokens"
    count = f"{len(stages)} stage{'s' if len(stages) > 1 else ''}"
    objectives = "; ".join(f"{s['name']}: {_does(s)}" for s in stages)
    frozen = "everything but the trained projections is the original's, bit for bit"
    terms = "The original's licence applies."
    if licence:
        licence_name = licence.get("license_name", licence["license"])
        terms = f"The original's licence applies: {_plain(licence_name)}."
    given = {k: v for k, v in arguments.items() if v not in (None, [], "")}
    recipe = ", ".join(
        f"{k} {_plain(str(v))}" for k, v in given.items() if k not in ("teacher", "data")
    )
    rows = [
        f"| {s['name']} | {s['objective']} | {s['steps']} x {s['batch']} x {s['T']:,} = "
        f"{_count(s['steps'] * s['batch'] * s['T'])} tokens | {s['lr']:g} |"
        for s in stages
    ]
    keys = {"model_name": f"{name}-{length}"} | (licence or {})
    keys |= {"base_model": base_model} if base_model else {}
    parts = [
        _front_matter("transformers", keys, "long-context, rope-scaling"),
        f"# {title}",
        f"Positions: {before} -> {after}.",
        f"Trained in {count} ({objectives}); {frozen}. {terms}",
        "| stage | objective | steps x blocks x tokens | learning rate |\n|---|---|---|---|\n"
        + "\n".join(rows),
        f"Arguments: {recipe}. The last two are digests of what the teacher's directory and the "
        "text held.",
    ]
    if scores:
        parts.append(f"Measured at the end of the run:\n\n{scores.strip()}")
    return "\n\n".join([*parts, _commands(length, kind)])


def _does(stage: dict) -> str:
    """What a stage of engine/plan.py does, for one who does not know the program."""
    if stage["objective"] == "next token":
        share = stage["teacher_share"]
        theirs = f", {share:.0%} of the target being the original's distribution" if share else ""
        return f"predict the next token in long blocks{theirs}"
    names = [f"{r.upper()}/{r.upper()}" for r in "qkv" if r in stage["relations"]]
    what = [f"{_joined(names)} relation{'s' if len(names) > 1 else ''}"] if names else []
    what += ["next-token distribution"] if stage["logits"] else []
    return f"reproduce the original's {' and '.join(what)} (LinearARD, arXiv 2604.00004)"


def _joined(names: list[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def adapter_card(name: str, positions: dict, base_model: str | None = None) -> str:
    """The README of a LoRA adapter: what PEFT cannot restore, the positions, as keys to set."""
    keys = {"base_model": base_model} if base_model else {}
    return _front_matter("peft", keys, "lora, long-context, rope-scaling") + (
        f"\n# A LoRA adapter for {_plain(name)}, in PEFT's format\n\n"
        "It was trained under stretched positions: set these keys in the base model's config.json\n"
        f"before loading it.\n\n```json\n{json.dumps(positions, indent=1)}\n```\n"
        + _adapter_in_vllm(positions)
    )


def _adapter_in_vllm(positions: dict) -> str:
    """The command that gives vLLM the positions, without which it is silently another model."""
    table = positions.get("rope_parameters", {})
    if not table or table["rope_type"] == "dynamic":  # which vLLM reads otherwise
        return ""
    length = positions["max_position_embeddings"]
    given = {"rope_parameters": table, "max_position_embeddings": length}
    return (
        "\nvLLM takes them on the command line; without them its answers are wrong, silently:\n\n"
        f"```bash\nvllm serve BASE --enable-lora --lora-modules long=DIRECTORY "
        f"--max-model-len {length} \\\n    --hf-overrides '{json.dumps(given)}'\n```\n"
    )


def licence_of(path: Path) -> dict[str, str]:
    """license, license_name and license_link from the front matter of a directory's README.md.

    {} where there is no card, or none with a licence.
    """
    file = file_of(path, "README.md")
    readme = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", readme, re.DOTALL)
    found = {}
    for line in front[1].splitlines() if front else ():
        key, colon, value = line.partition(":")
        value = value.strip().strip("\"'")
        if key in ("license", "license_name", "license_link") and colon and value:
            found[key] = value
    return found if "license" in found else {}


def _front_matter(library: str, keys: dict[str, str], tags: str) -> str:
    """YAML in which what others wrote stands as JSON strings, which YAML takes literally."""
    given = [f"{k}: {_quoted(v)}" for k, v in keys.items()]
    fixed = [f"library_name: {library}", "pipeline_tag: text-generation"]
    return "\n".join(["---", *fixed, *given, f"tags: [{tags}]", "---"])


def _quoted(text: str) -> str:
    """A string that YAML takes literally, and that is no HTML to who reads the page without it."""
    return json.dumps(text).replace("<", "\\u003c")


def _plain(text: str) -> str:
    """One line that Markdown and HTML show as it is."""
    flat = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", flat)


def _count(tokens: int) -> str:
    """950, 41.0k, 2.10M, 1.25B"""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return str(tokens)


# Clients that were seen to read a kind of positions wrongly; docs/clients.md
_UNREAD = {
    "linear": "Not in TGI and ONNX Runtime GenAI, which ignore linear scaling without a word.",
    "yarn": "Not in ONNX Runtime GenAI and by Ollama's own converter, which drop yarn without a "
    "word (give Ollama the GGUF file); CTranslate2 refuses it.",
    "llama3": "Not in CTranslate2, which computes llama3 scaling wrong.",
    "dynamic": "Dynamic positions are computed from the length at hand, which transformers and "
    "mlx-lm do right:\nvLLM's table of positions ends at the native length, and llama.cpp's "
    "converter and ExLlamaV2 drop\nthe scaling silently.",
}


_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")"""


def _commands(length: int, kind: str) -> str:
    both = "transformers (4.57 and 5; config.json holds both of their dialects)"
    parts = ["## Use", _block(both, _TRANSFORMERS, "python")]
    if kind == "dynamic":
        parts.append(_UNREAD[kind])
    else:
        why = " (the length must be given: under linear scaling it would be multiplied once more)"
        vllm = "vLLM" + why * (kind == "linear")
        parts.append(_block(vllm, f"vllm serve DIRECTORY --max-model-len {length}"))
        if kind == "linear":
            serve = "python -m sglang.launch_server --model-path DIRECTORY"
            command = f"{serve} --context-length {length}"
            parts.append(_block("SGLang, for the same reason", command))
        convert = "python convert_hf_to_gguf.py DIRECTORY --outfile model.gguf"
        parts.append(_block("llama.cpp", f"{convert}\nllama-cli -m model.gguf -c {length}"))
    parts.append(_block("mlx-lm", 'mlx_lm.generate --model DIRECTORY --prompt "..."'))
    if kind in _UNREAD and kind != "dynamic":
        parts.append(_UNREAD[kind])
    harness = (
        f"lm_eval --model hf --model_args pretrained=DIRECTORY,max_length={length} \\\n"
        "    --tasks lambada_openai,piqa,arc_easy,openbookqa"
    )
    parts += [
        _block("lm-evaluation-harness", harness),
        "Which program reads which kind of positions, and how that was found: docs/clients.md of "
        "LinearARD,\nthe program that made this directory.",
        _block("To the Hub", "hf upload YOUR-NAME/MODEL DIRECTORY"),
    ]
    return "\n\n".join(parts) + "\n"


def _block(title: str, code: str, language: str = "bash") -> str:
    return f"{title}:\n\n```{language}\n{code}\n```"
