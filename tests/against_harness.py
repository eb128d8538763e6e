"""Compares our task scores with lm-evaluation-harness itself, item by item, on local files.

    pip install lm_eval==0.4.13               in an environment of its own, with our requirements
    python tests/against_harness.py --model demo/teacher --task-dir FOLDER --limit 200

FOLDER holds NAME.jsonl for some of the names below, with the rows that the data set has on the hub.
Both sides score the same model in float32 on the CPU; an item agrees when prompts, prediction, acc
and acc_norm are all equal. Not collected by pytest: the harness is no requirement of the project.
mmlu, whose shots come from a second file, is left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evals import likelihood, tasks
from hub.tokenizer import load_tokenizer
from model import Llama

YAML = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "wsc": "super_glue/wsc/default.yaml",
    "wsc273": "wsc273/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
}


def harness_task(name: str, file: Path, limit: int | None):
    """The harness's own task, with its data replaced by a local file."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(str(Path(lm_eval.__file__).parent / "tasks" / YAML[name]))
    split = config.get("test_split") or config["validation_split"]
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) != split:
            config.pop(key, None)
    config.pop("tag", None)
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}},
    }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task


def compare(
    name: str, file: Path, limit: int | None, model: Llama, tokenizer, harness
) -> tuple[int, int, float]:
    """(items that agree, items, largest difference of a log-probability)."""
    task, groups = harness_task(name, file, limit), {}
    for request in task.instances:
        groups.setdefault(request.doc_id, []).append(request)
    groups = [sorted(groups[k], key=lambda r: r.idx) for k in sorted(groups)]
    mine = tasks.load(file, limit)
    got = likelihood.score(model, likelihood.encode(tokenizer, mine.pairs), mine)
    answers = iter(harness.loglikelihood([r for g in groups for r in g], disable_tqdm=True))
    agree, worst = 0, 0.0
    for i, (group, item) in enumerate(zip(groups, mine.items, strict=True)):
        theirs = [next(answers) for _ in group]
        worst = max([worst, *(abs(a - b) for (a, _), b in zip(theirs, got.logps[i], strict=True))])
        metrics = task.process_results(group[0].doc, theirs)
        same = [tuple(r.args) for r in group] == list(item.requests)
        for ours, key in ((f"{name}, accuracy", "acc"), (f"{name}, accuracy normed", "acc_norm")):
            same &= ours not in got.values or got.values[ours][i] == metrics[key]
        if len(theirs) > 1:
            same &= got.predictions[i] == int(np.argmax([a for a, _ in theirs]))
        agree += same
    return agree, len(groups), worst


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--task-dir", type=Path, required=True)
    p.add_argument("--limit", type=int)
    args = p.parse_args()
    import lm_eval  # here: --help is for those who have not installed it yet
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = (
        Llama.from_pretrained(args.model, dtype=torch.float32),
        load_tokenizer(args.model),
    )
    harness = HFLM(
        pretrained=str(args.model), device="cpu", dtype="float32", batch_size=8, backend="causal"
    )
    agree = items = 0
    for name in YAML:
        if (file := args.task_dir / f"{name}.jsonl").is_file():
            a, n, worst = compare(name, file, args.limit, model, tokenizer, harness)
            agree, items = agree + a, items + n
            print(f"{name:16} {a} of {n} agree, log-probabilities within {worst:.1e}", flush=True)
    print(f"{agree} of {items} agree; lm_eval {lm_eval.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
