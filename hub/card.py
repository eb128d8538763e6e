"""The model card: the README.md of an exported directory, so that whoever finds it knows what it is and how to run it.

It states the recipe (what was stretched, by how much, with which stages), the scores that the run measured and the
exact commands for transformers, vLLM, llama.cpp and lm-evaluation-harness.

vLLM takes max_position_embeddings, which the hub's convention sets to the extended length, for the length before
linear scaling, and multiplies it by the factor: --max-model-len says what is right.
"""

from model import LlamaConfig


def model_card(
    teacher: LlamaConfig, student: LlamaConfig, name: str, plan: list, scores: str, recipe: dict
) -> str:
    """Markdown. name: of the teacher; plan: its stages (plan.py); scores: a table; recipe: arguments that mattered."""
    old, new = teacher.rope, student.rope
    stages = "\n".join(
        f"| {s.name} | {s.objective} | {s.steps} x {s.batch} x {s.T:,} = {s.tokens / 1e6:.2f}M tokens | {s.lr:g} |"
        for s in plan
    )
    changed = f"{old.kind} RoPE, theta {old.theta:g}, {old.length:,} tokens"
    changed += (
        f" -> {new.kind} RoPE, factor {new.factor:g}, theta {new.theta:g}, {new.length:,} tokens"
    )
    arguments = ", ".join(
        f"{k} {v}"
        for k, v in recipe.items()
        if v not in (None, [], "") and k not in ("teacher", "data")
    )
    text = f"""---
library_name: transformers
tags: [long-context, rope-scaling]
---
# {name}, extended to {new.length:,} tokens

{changed}.

Trained to reproduce the original's Q/Q, K/K and V/V relations (stage 1, LinearARD, arXiv 2604.00004) and to predict the
next token at the long length (stage 2); everything but the trained projections is the original's, bit for bit. The
original's licence applies.

| stage | objective | steps x blocks x tokens | learning rate |
|---|---|---|---|
{stages}

Arguments: {arguments}.
"""
    if scores:
        text += f"\nMeasured at the end of the run:\n\n{scores}\n"
    return text + _commands(new.length)


def _commands(length: int) -> str:
    return f"""
## Use

transformers (4.57 and 5; config.json holds both of their dialects):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

vLLM (the length must be said: under linear scaling vLLM would multiply it once more):

```bash
vllm serve DIRECTORY --max-model-len {length}
```

llama.cpp:

```bash
python convert_hf_to_gguf.py DIRECTORY --outfile model.gguf
llama-cli -m model.gguf -c {length}
```

lm-evaluation-harness:

```bash
lm_eval --model hf --model_args pretrained=DIRECTORY,max_length={length} --tasks lambada_openai,piqa,arc_easy
```
"""
