"""What an evaluation measures, and on what.

A measurement is a function of (subject, scores): it reads the subject's models on its text, tasks
or prompts, and adds its figures to the scores (report.py), with the paragraphs, pictures and keys
of report.json that are its alone. All models of a subject read the same.
"""

from dataclasses import dataclass, field

import numpy as np

from engine.data import Corpus
from evals.ruler import Prompts
from evals.tasks import Task
from hub.tokenizer import Tokenizer
from model import Llama


@dataclass
class Subject:
    """Complete before the first measurement, and unchanged after."""

    tokenizer: Tokenizer
    native: int = 1  # tokens that count as 1x
    scale: float = 1.0  # of the longest blocks, in native lengths
    n_blocks: int = 1  # of held-out text
    seed: int = 0  # of look-ups and confidence intervals
    lengths: list[int] = field(default_factory=list)  # of the long-text figures
    tasks: list[tuple[Task, list]] = field(default_factory=list)  # each with its requests, encoded
    documents: list[np.ndarray] = field(default_factory=list)  # each [tokens + 1]
    documents_name: str = ""
    prompts: Prompts | None = None
    corpus: Corpus | None = None
    models: dict[str, Llama] = field(default_factory=dict)  # by column

    @property
    def long(self) -> int:
        return round(self.native * self.scale)
