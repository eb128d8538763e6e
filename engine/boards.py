"""A run's figures on a board that others draw: TensorBoard, Weights & Biases, or both.

What.  One writer, `write(stage, step, figures)` with figures by name, and `close`. Each board is a
package that is asked for where its flag is given, and never otherwise (flags.require): TensorBoard
writes its files into the result's folder; Weights & Biases follows its own settings, so that
WANDB_MODE=offline keeps all in the folder and nothing leaves the machine.

How it is computed.  Names are "stage/figure". TensorBoard counts the steps of a stage, which are
drawn apart; Weights & Biases those of the run, as its steps must grow. A resumed run goes on under
the name that the folder gives it.

Limits.  A board is a copy: metrics.jsonl stays the source of every figure. What a board cannot do,
such as reach its server, it says itself, and the run goes on.
"""

import importlib
from pathlib import Path


class Boards:
    """The boards that a run asked for; none is well too."""

    def __init__(
        self, folder: Path, tensorboard: bool = False, project: str | None = None, about=None
    ):
        """folder: the result's; project: of Weights & Biases; about: what the run's page shows.

        Raises ValueError with what Weights & Biases says against it.
        """
        self.board = self.run = None
        if tensorboard:
            module = importlib.import_module("torch.utils.tensorboard")
            self.board = module.SummaryWriter(folder / "tensorboard")
        if project:
            given = {"project": project, "name": folder.name, "dir": str(folder), "config": about}
            identity = "".join(c if c.isalnum() else "-" for c in str(folder.resolve()))[-64:]
            wandb = importlib.import_module("wandb")
            try:
                self.run = wandb.init(**given, id=identity, resume="allow")
            except wandb.Error as e:
                raise ValueError(
                    f"Weights & Biases: {' '.join(str(e).split())[:300]}; `wandb login`, set "
                    "WANDB_MODE=offline, or leave --wandb out"
                ) from None

    def write(self, stage: str, step: int, total: int, figures: dict[str, float]) -> None:
        """Figures of step `step` of a stage, which is step `total` of the run, both from 0."""
        named = {f"{stage}/{name}": value for name, value in figures.items()}
        if self.board:
            for name, value in named.items():
                self.board.add_scalar(name, value, step)
        if self.run:
            self.run.log(named, step=total)

    def flush(self) -> None:
        """What was written is on disk, as far as a board knows such a moment."""
        if self.board:
            self.board.flush()

    def close(self) -> None:
        """The last figure was written."""
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()
