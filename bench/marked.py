"""How often kernel_hopper.py's forward goes over its tiles twice, on a model's own relations.

    python -m bench marked --model DIR --text FILE [--lengths 512 8192 ...]

What.  The kernel takes a row's pivot from tile 0 and from the tiles across its program's diagonal;
where a row's sum relative to it passes FAR, the program computes all of its rows again. This counts
such rows and programs by the same rule in PyTorch, for a teacher and for its untrained students of
8 times the length, over all layers, heads and relations. It needs no Hopper GPU.

Limits.  One model's relation counts by itself: the kernel marks a row for the student's sum or the
teacher's.
"""

import json

import torch

from bench.kernel import conditions, open_lines
from hub.tokenizer import load_tokenizer
from kernel_hopper import BS, FAR, FORWARD, LOG2E
from model import Llama, make_student


def twice(x: torch.Tensor, scale: float) -> tuple[int, int, int]:
    """Rows and programs of x [H, T, D] that would be computed again, and the number of programs."""
    rows, programs, tile, size = 0, 0, BS.value, BS.value * FORWARD[x.shape[2]][0]
    starts = range(0, x.shape[1], size)
    for i in starts:
        # [H, size, i + size], base 2
        S = scale * LOG2E * (x[:, i : i + size].float() @ x[:, : i + size].float().mT)
        S += torch.full_like(S[0], float("-inf")).triu(i + 1)
        pivot = torch.cat((S[..., :tile], S[..., i:]), -1).amax(-1, keepdim=True)
        far = (S - pivot).exp2().sum(-1) > FAR.value
        rows, programs = rows + int(far.sum()), programs + int(far.any(1).sum())
    return rows, programs, len(starts) * len(x)


@torch.no_grad()
def bench_marked(arguments) -> None:
    """A line for each length and model: printed, and as JSON in --out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Llama.from_pretrained(arguments.model, dtype=torch.bfloat16, device=device)
    ids = load_tokenizer(arguments.model).encode(arguments.text.read_text())
    config, fixed = teacher.config, conditions(device)
    if config.head_dim not in FORWARD:
        raise SystemExit(
            f"--model {arguments.model}: the kernel takes D 64 or 128, not {config.head_dim}"
        )
    models = {"teacher": teacher}
    models |= {k: make_student(teacher, config.extended(k, 8), ()) for k in ("linear", "yarn")}
    with open_lines(arguments.out, "marked.jsonl") as file:
        for T in (T for T in arguments.lengths if len(ids) >= T):
            for name, model in models.items():
                counts = torch.zeros(3, dtype=torch.int64)
                for _, (q, k, v) in model.walk(torch.tensor([ids[:T]], device=device)):
                    counts += torch.tensor(twice(q[0], model.score_scale(T)))
                    counts += torch.tensor(twice(k[0], model.score_scale(T)))
                    counts += torch.tensor(twice(v[0], config.head_dim**-0.5))
                names = ("marked", "redone", "programs")
                row = {"model": name, "T": T, **dict(zip(names, counts.tolist(), strict=True))}
                print(json.dumps(row), flush=True)
                print(json.dumps(row | fixed), file=file, flush=True)
