"""Training. The stable part for extensions: :class:`Callback`, and :class:`Trainer`, what callbacks may use."""

from vtprune_train.training.loop.callback import Callback, Trainer

__all__ = ["Callback", "Trainer"]
