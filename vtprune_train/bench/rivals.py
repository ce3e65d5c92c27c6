"""The participants of a comparison: every method at every budget, or the reason why it cannot take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtprune_train.evaluation.answering import Loaded
from vtprune_train.models.io.method_parameters import check_trained, saved_learner
from vtprune_train.models.patch import prune, unprune
from vtprune_train.pruning import CONFIG_KEY, NONE, PruningMethod, method_class
from vtprune_train.pruning.base import method_name

DENSE = "dense"


@dataclass(frozen=True)
class Rival:
    """A method at a budget; the dense model has neither."""

    name: str
    budget: float | None = None
    method: PruningMethod | None = None

    @property
    def title(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"


@dataclass(frozen=True)
class Absent:
    """A method that cannot take part at a budget, and the reason."""

    name: str
    budget: float
    reason: str


def rivals_of(
    names: Sequence[str], budgets: Sequence[float], loaded: Loaded, attention: str
) -> tuple[list[Rival], list[Absent]]:
    """The dense model, and every method at every budget, with default settings otherwise.

    Args:
        names: names or paths for :func:`~vtprune_train.pruning.method_class`; the dense model, ``none``, is always
            included.
        budgets: mean shares of the visual tokens that enter a layer; see
            :meth:`~vtprune_train.pruning.base.PruningMethod.input_share`.
        loaded: the model, not pruned.
        attention: the attention backend.

    Returns:
        The participants, and the methods that cannot take part.

    Raises:
        ValueError: a name is unknown.
    """
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    rivals, absent = [Rival(DENSE)], []
    for name in names:
        if name == NONE:
            continue  # the dense model
        cls = method_class(name)
        for budget in budgets:
            try:
                method = _with_saved_settings(cls, loaded).for_budget(budget, num_layers)
                _check(method, loaded, attention)
            except ValueError as error:
                absent.append(Absent(name, budget, str(error)))
            else:
                rivals.append(Rival(name, budget, method))
    return rivals, absent


def _with_saved_settings(cls: type[PruningMethod], loaded: Loaded) -> PruningMethod:
    """A method with default settings, or with the saved settings if the model has the method's trained parameters."""
    config = loaded.model.config
    if (getattr(config, CONFIG_KEY, None) or {}).get("method") != method_name(cls):
        return cls()
    return saved_learner(config) or cls()


def _check(method: PruningMethod, loaded: Loaded, attention: str) -> None:
    """Raise ``ValueError`` if a method cannot run on the model, or needs trained parameters that the model lacks."""
    check_trained(loaded.model, method)
    prune(loaded.model, method, attention=attention)
    unprune(loaded.model)
