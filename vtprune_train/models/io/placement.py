"""Placement of parameters while a model is built: kept whole in memory, or partitioned across ranks one by one.

The functions of this package build a model the same way in both cases. They call :meth:`Placement.place` for a
parameter as soon as it has its values, and access parameters that may be partitioned only inside
:meth:`Placement.whole`. :class:`vtprune_train.training.engine.sharded.Sharded` is the placement that partitions
parameters.
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
    """Keeps every parameter whole. Subclasses that partition parameters set ``sharded``."""

    sharded = False

    def place(self, parameter: nn.Parameter) -> None:
        """Place a parameter that has its values. All ranks call this for the same parameters in the same order; the
        values of rank 0 are used."""

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which the parameters are whole; partitioned ones are gathered to the CPU. Every rank enters it,
        and changes that all ranks make are kept."""
        return nullcontext()

    def libraries_gather(self) -> AbstractContextManager[None]:
        """A context in which libraries that can gather partitioned parameters do so."""
        return nullcontext()


WHOLE = Placement()


def placement_of(model: HFModule) -> Placement:
    """The placement that a model was built with."""
    return model.__dict__.get(PLACEMENT, WHOLE)


def place_all(model: HFModule, placement: Placement) -> None:
    """Place the parameters that are not placed yet, and store the placement on the model."""
    model.__dict__[PLACEMENT] = placement
    for parameter in model.parameters():
        placement.place(parameter)


def note_shapes(model: nn.Module) -> None:
    """Store the shapes of parameters before they are partitioned."""
    for parameter in model.parameters():
        setattr(parameter, SHAPE, whole_shape(parameter))


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The full shape of a parameter, partitioned or not."""
    return getattr(parameter, SHAPE, parameter.shape)
