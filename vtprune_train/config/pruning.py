"""The section ``pruning``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vtprune_train.config.section import Section
from vtprune_train.core.rounding import ceil_of

Share = Annotated[float, Field(gt=0, le=1)]


class WarmupConfig(Section):
    """Trains the first steps on more tokens. Set exactly one of `steps` and `ratio`."""

    steps: int | None = Field(None, ge=1, description="Length in steps.")
    ratio: float | None = Field(None, gt=0, le=1, description="Length as a share of all steps, rounded up.")
    kind: Literal["dense", "linear", "cosine"] = Field(
        "linear",
        description="Keep ratios during warmup. `dense` keeps all tokens; `linear` and `cosine` go from `start` to the "
        "method's keep ratios.",
    )
    start: float = Field(
        1.0, gt=0, le=1, description="Keep ratio at the first step, for `linear` and `cosine`; not below the method's."
    )

    @model_validator(mode="after")
    def _one_length(self) -> WarmupConfig:
        if (self.steps is None) == (self.ratio is None):
            number = "neither" if self.steps is None else "both"
            raise ValueError(f"set exactly one of steps=N and ratio=R (a share of all steps); {number} is set")
        return self


class CurriculumConfig(Section):
    """Keep ratios that decrease over the whole run, as in EPIC: each step draws one from a range that moves from
    `start` to `end`. For methods with one setting `keep`. The method's own `keep` is used after training."""

    start: tuple[Share, Share] = Field((0.9, 0.9), description="Lowest and highest keep ratio at the first step.")
    end: tuple[Share, Share] = Field((0.26, 0.74), description="Lowest and highest keep ratio after the last step.")
    teacher: tuple[float, float] = Field(
        (0.1, 0.3),
        description="How much more than the model its teacher keeps, at the first step and at most. Needs "
        "`consistency_weight`.",
    )
    teacher_growth: float = Field(0.5, ge=0, description="By how much that difference grows over the whole run.")
    layer: int | None = Field(
        None,
        ge=0,
        description="Setting `layer` of the method at the first step; it moves to its configured value. null: it does "
        "not move.",
    )

    @model_validator(mode="after")
    def _ascending(self) -> CurriculumConfig:
        for name in ("start", "end", "teacher"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name}={[low, high]} must be two numbers in ascending order, from 0 to 1")
        return self


DEFAULT_METHOD = "pyramiddrop"
# Keys that concern training alone and are not settings of the method.
TRAINING_ONLY = (
    "warmup", "full_token_share", "budgets", "curriculum", "consistency_weight", "consistency_temperature"
)  # fmt: skip


class PruningConfig(Section):
    """The pruning method with its settings. Every key other than those below is a setting of the method; settings left
    out take the method's defaults."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    method: str | list[Any] = Field(
        DEFAULT_METHOD,
        description="Pruning method: a name, none (dense), file.py:Class, package.module:Class, or a list to combine. "
        "`vtprune methods` lists the names and the settings of each.",
    )
    warmup: WarmupConfig | None = Field(
        None, description="Start training with more tokens, for example {ratio: 0.1, kind: linear}; null: no warmup."
    )
    full_token_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps that run on all tokens, so that the model stays accurate without dropping. No "
        "effect while the decoder is frozen.",
    )
    budgets: tuple[Share, Share] | None = Field(
        None,
        description="Train one model for all budgets in this range, for example [0.1, 1.0]: each step draws its own, "
        "log-uniformly. A budget is the mean share of visual tokens that enter a layer. null: the method as it is.",
    )
    curriculum: CurriculumConfig | None = Field(
        None, description="Keep fewer tokens as training advances, for example {}, which has EPIC's values; null: off."
    )
    consistency_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of KL(teacher output || model output) in the loss. The teacher is the model itself: with "
        "all tokens dropped as configured, in the steps on all tokens; with more tokens, if `budgets` or `curriculum` "
        "is set.",
    )
    consistency_temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Softmax temperature of both outputs in that KL divergence."
    )

    @field_validator("method", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError(
                f"{value!r} is not the name of a method or a list of names; `vtprune methods --names` lists them, "
                "none is the dense model"
            )
        return value

    @model_validator(mode="after")
    def _builds(self) -> PruningConfig:
        from vtprune_train.pruning import UnknownSettingError

        try:
            method = self.build()
        except UnknownSettingError as error:
            raise UnknownSettingError(error.key, error.method, error.known, ("method", *TRAINING_ONLY)) from None
        if method is None and (training := [key for key in TRAINING_ONLY[:5] if getattr(self, key)]):
            raise ValueError(
                f"{training[0]} is set, but method is none, so no step drops tokens; set it to null or choose a method"
            )
        varied = [key for key in ("warmup", "budgets", "curriculum") if getattr(self, key) is not None]
        if len(varied) > 1:
            raise ValueError(f"{' and '.join(varied)} each set the keep ratios of a step; choose one of them")
        if self.budgets is not None and not 0 < self.budgets[0] < self.budgets[1]:
            raise ValueError(f"budgets={list(self.budgets)} must be two different shares in ascending order")
        if self.consistency_weight and not (self.full_token_share or self.budgets or self.curriculum):
            raise ValueError(
                f"consistency_weight={self.consistency_weight:g} has no effect: no step has a teacher; set "
                "full_token_share too (for example 0.1), or budgets or curriculum"
            )
        if method is not None:
            self._check_warmup(method)
            resolved = method.settings()
            self.__dict__["method"] = resolved.pop("method")  # an assignment would count as set by the user
            assert self.__pydantic_extra__ is not None
            self.__pydantic_extra__.update(resolved)
        return self

    def _check_warmup(self, method: Any) -> None:
        if self.warmup is None or self.warmup.kind == "dense":
            return
        method.eased(self.warmup.start, 0.0)
        ratios = method.ratios
        if self.warmup.start < max(ratios):
            keep = list(ratios) if len(ratios) > 1 else ratios[0]
            raise ValueError(
                f"warmup.start={self.warmup.start:g} is below keep={keep}; a warm-up begins with more tokens"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The method and its settings as plain data, without the keys that concern training alone."""
        return {"method": self.method, **(self.__pydantic_extra__ or {})}

    def build(self) -> Any:
        """The method, or ``None`` for ``none``."""
        from vtprune_train.pruning import method_from_settings

        return method_from_settings(self.settings)

    def fit(self, text_config: Any) -> None:
        """In a decoder with linear attention layers (Qwen3.5), move default drop points to layers with attention."""
        from vtprune_train.pruning.attending import fitted

        if (method := self.build()) is not None and (moved := fitted(method, text_config)) is not method:
            settings = moved.settings()
            self.__dict__["method"] = settings.pop("method")
            assert self.__pydantic_extra__ is not None
            self.__pydantic_extra__.update(settings)

    def phases(self, total_steps: int, seed: int, num_layers: int | None = None) -> Any:
        """The :class:`~vtprune_train.pruning.phases.Phases` of a run of ``total_steps`` steps that trains the decoder;
        :meth:`Config.phases` is for any run."""
        from vtprune_train.pruning.phases import Budgets, Curriculum, FullTokens, Phases, Warmup

        warmup = None
        if self.warmup is not None:
            steps = self.warmup.steps or ceil_of(self.warmup.ratio or 0.0, total_steps)
            warmup = Warmup(steps, self.warmup.kind, self.warmup.start)
        loss = self.consistency_weight, self.consistency_temperature
        varied: Budgets | Curriculum | None = None
        if self.budgets is not None:
            assert num_layers is not None, "budgets refer to the layers of a decoder"
            varied = Budgets(*self.budgets, num_layers, *loss)
        elif (course := self.curriculum) is not None:
            assert num_layers is not None, "drop points are layers of a decoder"
            varied = Curriculum(
                course.start, course.end, total_steps, num_layers, course.teacher, course.teacher_growth, course.layer,
                *loss,
            )  # fmt: skip
        return Phases(self.build(), seed, warmup, FullTokens(self.full_token_share, *loss), varied)

    def identity(self) -> dict[str, Any]:
        """The settings that must not change on resume. Keys that concern training alone are included only if they are
        used, so that checkpoints from before they existed can be resumed. Checkpoints of dense runs record
        PyramidDrop's settings, as they always did."""
        values = self.model_dump()
        defaults = PruningConfig().model_dump()
        used = {key: v for key, v in values.items() if key not in TRAINING_ONLY or v != defaults[key]}
        if self.method != "none":
            return used
        return {**{key: v for key, v in defaults.items() if key not in TRAINING_ONLY}, **used}
