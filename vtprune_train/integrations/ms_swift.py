"""Packed and pruned models in ms-swift, as an external plug-in.

::

    VTPRUNE=pack swift sft --external_plugins $(python -m vtprune_train.integrations.ms_swift) --model ...

``python -m`` prints the path of this file. :mod:`vtprune_train.integrations.variable` lists the values of ``VTPRUNE``.

The plug-in replaces two functions of ms-swift: ``ModelLoader.load``, to pack or prune each model that generates, and
``Template.pre_forward_hook``, which for some families (Qwen2-VL, Qwen2.5-VL) replaces a batch's token ids and pixels by
embeddings. A packed model needs the ids to find the images, and computes the embeddings itself.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from vtprune_train import is_pruned
from vtprune_train.integrations.variable import apply

# Numbered by the model itself. ms-swift's own numbering is the same for padded batches.
POSITIONS = ("position_ids", "text_position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def install() -> None:
    from swift.model.register import ModelLoader
    from swift.template import Template

    ModelLoader.load = _loading(ModelLoader.load)
    Template.pre_forward_hook = _keeping_ids(Template.pre_forward_hook)


def _loading(load: Any) -> Any:
    @functools.wraps(load)
    def load_and_apply(self: Any) -> Any:
        model, processor = load(self)
        generates = self.model_info.task_type == "causal_lm"  # not a reward model, for example
        if model is not None and generates and not self.return_dummy_model:
            apply(model)
        return model, processor

    return load_and_apply


def _keeping_ids(pre_forward_hook: Any) -> Any:
    @functools.wraps(pre_forward_hook)
    def hook(self: Any, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not is_pruned(model):
            return pre_forward_hook(self, model, args, kwargs)
        if self.padding_free or self.packing:
            raise ValueError(
                "vtprune_train packs the samples of a batch itself and does not take rows that ms-swift has joined; "
                "set --packing false --padding_free false, and a larger --per_device_train_batch_size"
            )
        accepted = inspect.signature(self.get_base_model(model).forward).parameters
        return args, {key: value for key, value in kwargs.items() if key in accepted and key not in POSITIONS}

    return hook


if __name__ == "__main__":
    print(__file__)
else:
    install()
