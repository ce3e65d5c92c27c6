"""Where parameters go while a model is built: kept whole in memory, or cut among ranks one by one.

The functions of this package build a model the same way in both cases. They call :meth:`Placement.place` for a
parameter as soon as it has its values, and touch one that may be cut only inside :meth:`Placement.whole`. The placement
that cuts is :class:`vtprune_train.training.engine.sharded.Sharded`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vtprune_train.models import HFModule

PLACEMENT = "_vtprune_placement"  # on a model
SHAPE = "whole_shape"  # on a parameter


class Placement:
    """Keeps every parameter whole; ``sharded`` says whether it does not."""

    sharded = False

    def place(self, parameter: nn.Parameter) -> None:
        """Take over a parameter that has its values. All ranks call this for the same parameters in the same order;
        rank 0's values count."""

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it the parameters are whole, on the CPU where they are cut otherwise; every rank calls this, and
        changes that all ranks make are kept."""
        return nullcontext()

    def libraries_gather(self) -> AbstractContextManager[None]:
        """Within it a library that gathers the parameters it reads knows that it must."""
        return nullcontext()


WHOLE = Placement()


def placement_of(model: HFModule) -> Placement:
    """The placement that a model was built with."""
    return model.__dict__.get(PLACEMENT, WHOLE)


def place_all(model: HFModule, placement: Placement) -> None:
    """Place what is not placed yet, and remember the placement on the model."""
    model.__dict__[PLACEMENT] = placement
    for parameter in model.parameters():
        placement.place(parameter)


def note_shapes(model: nn.Module) -> None:
    """Remember the shapes of parameters that are about to be cut."""
    for parameter in model.parameters():
        setattr(parameter, SHAPE, whole_shape(parameter))


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, cut or not."""
    return getattr(parameter, SHAPE, parameter.shape)
