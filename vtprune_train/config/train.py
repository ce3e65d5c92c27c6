"""The section ``train``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from vtprune_train.config.errors import did_you_mean
from vtprune_train.config.section import Section
from vtprune_train.core.user_code import is_path

OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


class TrainConfig(Section):
    """The training loop: batch size, optimizer, checkpoints, evaluation, guards."""

    global_batch_size: int = Field(128, ge=1, description="Samples in an optimizer step, over all ranks together.")
    epochs: int = Field(1, ge=1, description="Passes over the training data.")
    max_steps: int | None = Field(
        None, ge=1, description="Number of optimizer steps; null trains for `train.epochs` epochs."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="Share of the steps over which the learning rate warms up, rounded up."
    )
    schedule: str = Field(
        "cosine",
        description="Learning-rate schedule: `cosine`, `linear`, `constant`, `wsd`, or the path of a function. "
        "`wsd` is warmup-stable-decay; a function has the form `(update, total_updates, warmup_updates) -> factor`.",
    )
    decay_ratio: float = Field(
        0.1, ge=0, le=1, description="Share of all steps in which `wsd` decays the learning rate."
    )
    min_rate: float = Field(
        0.0, ge=0, le=1, description="Learning rate at the end of the decay, as a share of the peak."
    )
    optimizer: str = Field(
        "adamw", description="`adamw`, `adamw_8bit`, `muon`, or the path of a `torch.optim.Optimizer`."
    )
    optimizer_args: dict[str, Any] = Field({}, description="Further arguments of the optimizer's class.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay, not applied to biases and norms.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Betas of AdamW.")
    clip: float = Field(
        0.0, ge=0, description="Maximum gradient norm; larger gradients are scaled down. 0: no clipping."
    )
    activation_checkpointing: Literal["all", "first_stage", "none"] | int = Field(
        "all",
        description="Decoder layers whose activations are recomputed in the backward pass. `first_stage` recomputes "
        "the layers that see the most tokens; a number N recomputes N layers, those with the most tokens first.",
    )
    save_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(3, ge=1, description="Number of newest checkpoints to keep; older ones are deleted.")
    export: Literal["every", "last", "never"] = Field(
        "every",
        description="Checkpoints that also contain a Hugging Face export. `vtprune export` makes one later from any "
        "checkpoint.",
    )
    eval_every: int | None = Field(
        None, ge=1, description="Steps between evaluations on `data.eval`; null evaluates at the end only."
    )
    eval_shuffled: bool = Field(
        False,
        description="Also evaluate with images exchanged between samples. The difference shows how much the answers "
        "depend on the images.",
    )
    eval_show: int = Field(
        0, ge=0, description="Images per evaluation to draw with their kept tokens, for the trackers; 0 draws none."
    )
    trackers: list[str] = Field(
        ["tensorboard"],
        description="Trackers that receive all metrics: tensorboard, wandb, or another one that Accelerate supports.",
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="When a loss or gradient is NaN or infinite: stop the run, or skip the step. Either way the model "
        "does not change and a report names the samples.",
    )
    max_skipped: int = Field(20, ge=0, description="Maximum number of steps to skip in a run; one more stops it.")
    max_skipped_in_a_row: int = Field(
        3, ge=0, description="Maximum number of steps to skip in a row; one more stops it."
    )
    spike_threshold: float | None = Field(
        10.0, gt=0, description="Warn about a loss this many standard deviations above the recent median; null: never."
    )
    spike_window: int = Field(100, ge=20, description="Number of recent steps that a loss is compared with.")
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether torch.compile compiles decoder and tower layers. `auto` does so on GPUs."
    )
    deterministic: bool = Field(False, description="Use only deterministic kernels on GPUs; slower.")
    preflight: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Run the largest possible micro-batch before the first step, to check that it fits into "
        "memory. `auto` does so on GPUs.",
    )
    save_in_background: bool = Field(
        True, description="Write checkpoints in a thread, from a copy in host memory, while training continues."
    )
    resume: Literal["auto", "strict", "never"] = Field(
        "auto",
        description="Whether to continue from this run's checkpoints. `auto` takes the newest complete one; `strict` "
        "refuses to start if the newest is damaged.",
    )
    init_from: str | None = Field(
        None,
        description="Run or checkpoint whose weights (and pruning settings) start a new run. An adapter in it is "
        "trained further.",
    )
    watchdog_timeout: float | None = Field(
        600, ge=1, description="Seconds without progress after which the job ends and names the hung rank; null: never."
    )
    collective_timeout: float = Field(
        1800, ge=1, description="Seconds after which a collective fails and a save counts as hung."
    )
    max_restarts: int = Field(
        0, ge=0, description="Maximum number of restarts after a failure; only under `vtprune launch`."
    )

    @field_validator("optimizer", "schedule")
    @classmethod
    def _known_name(cls, value: str, info: ValidationInfo) -> str:
        names = OPTIMIZERS if info.field_name == "optimizer" else SCHEDULES
        if value not in names and not is_path(value):
            raise ValueError(
                f"unknown {info.field_name} {value!r}{did_you_mean(value, names)}; or give a path: package.module:Name "
                "or path/to/file.py:Name"
            )
        return value

    @field_validator(
        "activation_checkpointing",
        mode="plain",
        json_schema_input_type=Literal["all", "first_stage", "none"] | Annotated[int, Field(ge=1)],
    )
    @classmethod
    def _known_level(cls, value: Any) -> str | int:
        if isinstance(value, bool):  # the values of older versions
            return "all" if value else "none"
        if value in ("all", "first_stage", "none") or (isinstance(value, int) and value >= 1):
            return value  # type: ignore[no-any-return]
        raise ValueError(f"{value!r} is not all, first_stage, none or a number of decoder layers (at least 1)")

    @model_validator(mode="after")
    def _timeouts_and_restarts(self) -> TrainConfig:
        if self.watchdog_timeout is not None and self.collective_timeout <= self.watchdog_timeout:
            raise ValueError(
                f"collective_timeout={self.collective_timeout:g} must be longer than watchdog_timeout="
                f"{self.watchdog_timeout:g}, or a collective fails before the hung rank is named; raise it"
            )
        if self.max_restarts and self.resume == "never":
            raise ValueError(f"max_restarts={self.max_restarts} needs resume=auto: a restart resumes from a checkpoint")
        return self
