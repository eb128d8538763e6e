"""The figures of the method, drawn by one command from what the code computes.

    python demo/figures.py [--run out/demo]        what `make figures` runs, after `make demo`

What.  Each figure in demo/figures/ stands beside the JSON it was drawn from:

    rope         what stretching does to each rotary pair: the angle it turns by per token, linear
                 and yarn beside the teacher's, and how far apart near tokens look
    relations    the map R of one head's Q/Q relation on a few lines: teacher, untrained, restored
    positions    loss by position over eight native lengths, before and after
    tiles        which tiles the kernels visit, and whose statistics they use there

How.  rope and tiles need nothing; relations and positions read the teacher and the two students of
a demo run. The head shown is the one that interpolation moved most.

Limits.  A sentence, a head and four blocks: pictures to read with, not measurements to quote.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine import data, exits  # noqa: E402
from evals.longtext import loss_by_position  # noqa: E402
from hub.tokenizer import load_tokenizer  # noqa: E402
from model import Llama, make_student  # noqa: E402
from rope import frequencies  # noqa: E402

HERE = ROOT / "demo" / "figures"
TEACHER = ROOT / "demo" / "teacher"
COLOURS = {"teacher": "0.3", "linear": "#c44e52", "yarn": "#4c72b0"}
SENTENCE = "def read_json(path):\n    with open(path) as file:\n        return json.load(file)\n"


def canvas(width: float, height: float, columns: int):
    """A figure and its row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def keep(name: str, figure, values: dict) -> None:
    """NAME.png and NAME.json."""
    HERE.mkdir(exist_ok=True)
    figure.savefig(HERE / f"{name}.png", dpi=110)
    (HERE / f"{name}.json").write_text(json.dumps(values) + "\n")
    print(f"drawn: {HERE / name}.png", flush=True)


def tidy(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set(xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)


def rope(teacher: Llama) -> None:
    """Angle per token of each pair; and 1 - mean cos(distance * angle)."""
    native = teacher.config.rope
    kinds = {"teacher": native} | {k: native.scaled(k, 8.0) for k in ("linear", "yarn")}
    D = teacher.config.head_dim
    angles = {name: frequencies(r, D)[0].double() for name, r in kinds.items()}
    distances = torch.arange(1, 33).double()
    turned = {n: (1 - (distances[:, None] * w).cos().mean(-1)).tolist() for n, w in angles.items()}
    figure, (left, right) = canvas(10, 4, 2)
    for name, w in angles.items():
        left.plot(range(D // 2), w, color=COLOURS[name], lw=2, label=name)
        right.plot(distances, turned[name], color=COLOURS[name], lw=2, label=name)
    left.set_yscale("log")
    tidy(left, "how fast each rotary pair turns", "pair", "radians per token (log axis)")
    tidy(
        right, "how far apart near tokens look", "distance in tokens", "1 - mean cosine over pairs"
    )
    left.legend(frameon=False)
    keep(
        "rope",
        figure,
        {"radians per token": {n: w.tolist() for n, w in angles.items()}, "apart": turned},
    )


@torch.no_grad()
def relations(models: dict[str, Llama]) -> None:
    """R of the query head that interpolation moves most, on SENTENCE."""
    ids = torch.tensor([load_tokenizer(TEACHER).encode(SENTENCE)])
    T = ids.shape[1]
    unseen = torch.ones(T, T).triu(1).bool()
    maps = {}
    for name, model in models.items():
        queries = torch.cat([q[0] for _, (q, _, _) in model.walk(ids)]).double()  # [L H, T, D]
        scores = queries @ queries.mT * model.score_scale(T)
        maps[name] = scores.masked_fill(unseen, -math.inf).softmax(-1)
    kl = {n: (maps["teacher"] * (maps["teacher"].clamp_min(1e-30) / m.clamp_min(1e-30)).log())
          .sum((-1, -2)) / T for n, m in maps.items()}  # fmt: skip
    head = int(kl["linear untrained"].argmax())
    figure, axes = canvas(3.3 * len(maps), 3.7, len(maps))
    for axis, (name, found) in zip(axes, maps.items(), strict=True):
        axis.imshow(found[head].sqrt(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        apart = f"\nKL from the teacher {kl[name][head]:.3f} nats per row"
        said = "" if name == "teacher" else apart
        axis.set_title(name + said, fontsize=9)
        axis.set(xlabel="token looked at", ylabel="token")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    H = models["teacher"].config.n_head
    rows = {n: [[round(v, 4) for v in r] for r in m[head].tolist()] for n, m in maps.items()}
    keep("relations", figure, {"layer": head // H, "head": head % H, "R": rows})


def positions(models: dict[str, Llama], run: Path) -> None:
    """Loss by position, a running mean over 128 tokens."""
    corpus = data.load_corpus([], load_tokenizer(TEACHER), run / "cache", quiet=True)
    native = models["teacher"].config.rope.length
    blocks = corpus.held_out_blocks(8 * native, 4)
    figure, (axis,) = canvas(9, 4, 1)
    curves = {}
    for name, model in models.items():
        losses = loss_by_position(model, blocks, model.dtype)
        curves[name] = np.convolve(losses, np.ones(128) / 128, "valid")[::32].round(4).tolist()
        style = ":" if "untrained" in name else "-"
        at = (np.arange(len(curves[name])) * 32 + 64) / native
        axis.plot(at, curves[name], style, color=COLOURS[name.split()[0]], lw=1.8, label=name)
    axis.axvline(1, color="0.7", lw=1)
    tidy(
        axis,
        "loss by position",
        f"position, in native lengths of {native} tokens",
        "nats per token",
    )
    axis.legend(frameon=False, fontsize=8, ncols=2)
    keep("positions", figure, curves)


def tiles() -> None:
    """The forward's and the backward's walk, 8 x 8 tiles."""
    n = 8
    forward = [[2 if j == i else 1 if j < i else 0 for j in range(n)] for i in range(n)]
    backward = [[2 if j == i else 1 if j < i else 3 for j in range(n)] for i in range(n)]
    names = {
        0: "not visited",
        1: "row i's statistics",
        2: "the diagonal: masked",
        3: "column j's statistics",
    }
    figure, axes = canvas(8.5, 4.2, 2)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ["0.95", "#4c72b0", "#dd8452", "#55a868"]
    titles = ("forward: columns up to the diagonal", "backward: all columns, dL/dx written once")
    for axis, walk, title in zip(axes, (forward, backward), titles, strict=True):
        axis.imshow(walk, cmap=ListedColormap(colours), vmin=0, vmax=3)
        axis.set_xticks(np.arange(n + 1) - 0.5, [])
        axis.set_yticks(np.arange(n + 1) - 0.5, [])
        axis.grid(color="white", lw=2)
        axis.tick_params(length=0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set(xlabel="columns j, BS at a time", ylabel="rows i, BT per program")
    patches = [Patch(color=colours[k], label=label) for k, label in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    keep("tiles", figure, {"forward": forward, "backward": backward, "meaning": names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("out/demo"), help="a `make demo` run")
    run = parser.parse_args().run
    if not (run / "yarn" / "student").is_dir():
        raise ValueError(f"--run {run} holds no demo run; run `make demo` first")
    teacher = Llama.from_pretrained(TEACHER, dtype=torch.float32)
    models = {"teacher": teacher}
    for kind in ("linear", "yarn"):
        trained = Llama.from_pretrained(run / kind / "student", dtype=torch.float32)
        models[f"{kind} untrained"] = make_student(teacher, trained.config, trained=())
        models[f"{kind} restored"] = trained
    rope(teacher)
    tiles()
    relations({k: v for k, v in models.items() if "yarn" not in k})
    positions(models, run)


if __name__ == "__main__":
    exits.run(main, "figures.py")
