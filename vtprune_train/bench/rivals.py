"""Who takes part in a comparison of methods: each at each budget, or the reason why not."""

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
    """A method at a budget; ``DENSE`` has neither."""

    name: str
    budget: float | None = None
    method: PruningMethod | None = None

    @property
    def title(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"


@dataclass(frozen=True)
class Absent:
    """A method that cannot take part at a budget, and why."""

    name: str
    budget: float
    reason: str


def rivals_of(
    names: Sequence[str], budgets: Sequence[float], loaded: Loaded, attention: str
) -> tuple[list[Rival], list[Absent]]:
    """The dense model, and every method at every budget with its defaults otherwise.

    Args:
        names: known to :func:`~vtprune_train.pruning.method_class`; ``none`` is the dense model, always there.
        budgets: mean shares of the visual tokens that enter a layer; see
            :meth:`~vtprune_train.pruning.base.PruningMethod.input_share`.
        loaded: not pruned.
        attention: the backend.

    Raises:
        ValueError: an unknown name.
    """
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    found, absent = [Rival(DENSE)], []
    for name in names:
        if name == NONE:
            continue  # the dense model
        kind = method_class(name)
        for budget in budgets:
            try:
                method = _starting(kind, loaded).for_budget(budget, num_layers)
                _check(method, loaded, attention)
            except ValueError as error:
                absent.append(Absent(name, budget, str(error)))
            else:
                found.append(Rival(name, budget, method))
    return found, absent


def _starting(kind: type[PruningMethod], loaded: Loaded) -> PruningMethod:
    """A method before it is fitted to a budget: its defaults; where the model brings its parameters, the settings that
    they were trained with."""
    config = loaded.model.config
    if (getattr(config, CONFIG_KEY, None) or {}).get("method") != method_name(kind):
        return kind()
    return saved_learner(config) or kind()


def _check(method: PruningMethod, loaded: Loaded, attention: str) -> None:
    """Refuse a method that cannot run on the model, or learns parameters that the model does not have."""
    check_trained(loaded.model, method)
    prune(loaded.model, method, attention=attention)
    unprune(loaded.model)
