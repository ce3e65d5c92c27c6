"""Training. The stable interface: :func:`train` a run that :func:`load_config` describes, and :class:`Callback` with
:class:`Trainer`, what callbacks may use."""

from typing import TYPE_CHECKING, Any

from vtprune_train.training.loop.callback import Callback, Trainer

if TYPE_CHECKING:
    from vtprune_train.config.load import load_config
    from vtprune_train.training.process import train

__all__ = ["Callback", "Trainer", "load_config", "train"]


def __getattr__(name: str) -> Any:
    # On first use: importing DeepSpeed takes seconds.
    if name == "train":
        from vtprune_train.training.process import train

        return train
    if name == "load_config":
        from vtprune_train.config.load import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
