"""The synthetic tasks on which methods are compared: their recipes and data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vtprune_train.config.load import load_config
from vtprune_train.data import synthetic, synthetic_text
from vtprune_train.evaluation.questions import Question, read_questions

NUM_TRAIN, NUM_EVAL, SEED = 6000, 500, 7


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: as in ``--tasks``.
        recipe: file in ``configs/``; its ``data.root`` is where the data set is written.
        writer: writes the data set.
    """

    name: str
    recipe: str
    writer: Callable[..., None]

    @property
    def root(self) -> Path:
        """The folder of the data set."""
        return Path(load_config(self.recipe).data.root)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the recipe's model."""
        config = load_config(self.recipe).model.config
        assert config is not None
        return int(config["text_config"]["num_hidden_layers"])

    def write(self) -> None:
        """Write the data set, unless it exists."""
        self.writer(self.root, num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=SEED)

    def questions(self, limit: int) -> list[Question]:
        """The questions of ``limit`` held-out images."""
        return read_questions(self.root / "eval.json", self.root / "images", limit)[0]


TASKS = {
    task.name: task
    for task in (
        Task("shapes", "quickstart.yaml", synthetic.write_dataset),
        Task("text", "quickstart_text.yaml", synthetic_text.write_dataset),
    )
}


def tasks_of(names: str) -> list[Task]:
    """Tasks by their names, separated by commas.

    Raises:
        ValueError: there is no such task.
    """
    if unknown := [name for name in names.split(",") if name not in TASKS]:
        raise ValueError(f"--tasks: {unknown[0]!r} is not a task; choose from {', '.join(TASKS)}")
    return [TASKS[name] for name in names.split(",")]
