"""Training. Stable for extensions: :class:`Callback`, and :class:`Trainer`, the part of the trainer for callbacks."""

from vtprune_train.training.loop.callback import Callback, Trainer

__all__ = ["Callback", "Trainer"]
