"""The section ``run``."""

from __future__ import annotations

from pydantic import Field

from vtprune_train.config.section import Section


class RunConfig(Section):
    """Name, folder and seed of the run."""

    name: str = Field("run", min_length=1, description="Name of the run's folder under `run.output_dir`.")
    output_dir: str = Field("runs", description="Folder that contains the folders of all runs.")
    seed: int = Field(42, ge=0, description="Seed of the data order, new weights and random choices of a method.")
    stop_after: int | None = Field(
        None,
        ge=1,
        description="Stop after this global step and save a checkpoint; null runs to the end. The learning-rate "
        "schedule still spans all steps, so the next start continues as if the run had not stopped.",
    )
