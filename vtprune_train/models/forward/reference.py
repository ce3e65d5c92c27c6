"""Drop the visual tokens that a reference model drops, instead of ranking them with the model's own weights.

For ``prune(policy, method, rank_by=...)``: before a forward pass with images, the reference runs up to its last drop
point, without gradients, and the policy then drops the same tokens. With PEFT, the reference is the policy itself
with its adapters disabled.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Family
from vtprune_train.models.forward.calls import STATE, Call, RankBy, State, unwrapped
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Selection
from vtprune_train.pruning.learned import learns

REFERENCE = "reference"
TRL_ADAPTER = "ref"  # a copy of a loaded adapter, which TRL uses as the reference
PIXELS = ("pixel_values", "pixel_values_videos")
# Arguments of the policy's pass that the reference, which has no cache, does not get.
OWN = ("past_key_values", "use_cache", "inputs_embeds", "mm_encoder_outputs", "cache_position")


def reference_for(model: HFModule, family: Family, rank_by: Any, method: PruningMethod | None) -> RankBy:
    """Resolve the argument ``rank_by`` of :func:`vtprune_train.prune`.

    Raises:
        ValueError: it is neither ``"reference"`` nor another model of the same family pruned by ``method``, or the
            choices of ``method`` cannot be taken from another model.
    """
    if method is None:
        raise ValueError(f"rank_by={_name(rank_by)}: without a method nothing is dropped; leave rank_by out")
    num_layers = model.config.get_text_config().num_hidden_layers
    if why := _not_from_another(method, num_layers):
        raise ValueError(f"rank_by={_name(rank_by)}: {method.name} {why}; leave rank_by out, or use another method")
    if isinstance(rank_by, str) and rank_by == REFERENCE:
        return RankBy(None)
    if not isinstance(rank_by, nn.Module):
        raise ValueError(f"rank_by={rank_by!r} is neither {REFERENCE!r} nor a model")
    other = unwrapped(rank_by)
    if other is model:
        raise ValueError("rank_by is the model itself; leave it out")
    theirs = _state_of(other, method).family
    if theirs.title != family.title:
        raise ValueError(f"rank_by is a {theirs.title}, but the model a {family.title}; use a model of the same family")
    return RankBy(other)


def _not_from_another(method: PruningMethod, num_layers: int) -> str:
    """Why the choices of a method cannot be taken from another model; empty if they can."""
    if learns(method):
        return "trains parameters that select tokens"
    if method.needs.tower is not None and not method.needs.tower.fixed:
        return "merges tokens inside the vision tower, where each model merges others"
    return "drops keys in each layer, not tokens" if method.key_layers(num_layers) else ""


def _name(rank_by: Any) -> str:
    return repr(rank_by) if isinstance(rank_by, str) else type(rank_by).__name__


def selections(state: State, base: HFModule, call: Call, inputs: Mapping[str, Any]) -> tuple[Selection, ...] | None:
    """What the reference chooses at each drop point; ``None`` if the model ranks by itself in this pass.

    Args:
        state: the state of the policy.
        base: the base of the policy.
        call: the pass of the policy, whose labels or prompt select the query rows.
        inputs: arguments of that pass.

    Raises:
        ValueError: no reference is known, it is pruned by another method, or the images cannot be passed to it.
    """
    if state.rank_by is None or call.selects:
        return None
    has_pixels, encoded = any(inputs.get(key) is not None for key in PIXELS), inputs.get("mm_encoder_outputs")
    if (has_pixels or encoded) and (ready := state.running.selections) is not None:
        state.running.selections = None
        return ready
    if not has_pixels:
        if encoded:
            raise ValueError(
                "rank_by: generate encoded the images before this pass, so the reference cannot see them. Generate "
                "with a cache (use_cache=True; with gradient checkpointing, call model.eval() first), and if several "
                "sequences or beams of a prompt cannot share a prefill (for example with videos), with one sequence"
            )
        return None
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "rank_by: images in a later turn on a cache are not supported, as the reference has no cache of the "
            "earlier turns; pass the whole conversation in one call"
        )
    accepted = inspect.signature(type(base).forward).parameters
    passed = {key: value for key, value in inputs.items() if key in accepted and key not in OWN and value is not None}
    reference, method = state.rank_by.model(), state.method
    assert method is not None, "rank_by is rejected without a method"
    if reference is not None:
        theirs = _state_of(reference, method)
        with _evaluating(reference), theirs.selecting(call, state.running.prompt_width) as selects:
            reference(**passed, use_cache=False, logits_to_keep=1)
        return _replayable(selects, method)
    with _reference_adapter(base) as is_policy:
        if not is_policy:
            return None
        with _evaluating(base), state.selecting(call, state.running.prompt_width) as selects:
            base(**passed, use_cache=False)
        return _replayable(selects, method)


@contextmanager
def _evaluating(model: HFModule) -> Iterator[None]:
    """Without gradients, dropout and activation checkpointing."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _replayable(call: Call, method: PruningMethod) -> tuple[Selection, ...] | None:
    """Raises ValueError if the method merges hidden states of the reference, which are not the policy's."""
    if any(selection.at is not None for selection in call.selections or ()):
        raise ValueError(
            f"rank_by: {method.name} merges tokens, which is not supported; use a method that only drops them"
        )
    return call.selections


def _state_of(reference: HFModule, method: PruningMethod | None) -> State:
    """Raises ValueError if the reference is not pruned by ``method``."""
    state: State | None = reference.__dict__.get(STATE)
    if state is None or state.is_dense:
        raise ValueError(f"rank_by: the reference is not pruned; call prune(reference, {method!r}) first")
    if state.method != method:
        raise ValueError(f"rank_by: the reference is pruned by {state.method!r}, but the model by {method!r}")
    return state


@contextmanager
def _reference_adapter(base: HFModule) -> Iterator[bool]:
    """Turn the policy into its reference, as TRL does: with the adapter that TRL added for it, or without adapters.
    Yields whether it was the policy before.

    Raises:
        ValueError: there are no adapters, and so no reference.
    """
    layers = _adapter_layers(base)
    if not layers:
        raise ValueError(
            f"rank_by={REFERENCE!r}, but there is no reference model: create the trainer before the first forward pass "
            "(TRL loads a reference for DPO and KTO, and for GRPO and RLOO with beta above 0), or pass your own model: "
            "prune(policy, method, rank_by=ref_model)"
        )
    first, active = layers[0], layers[0].active_adapters
    if first.disable_adapters or list(active) == [TRL_ADAPTER]:
        yield False
        return
    from peft.tuners.tuners_utils import set_adapter

    trains = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    by_copy = any(TRL_ADAPTER in getattr(first, name) for name in first.adapter_layer_names)
    try:
        if by_copy:
            set_adapter(base, TRL_ADAPTER, inference_mode=True)
        else:
            _enable(layers, False)
        yield True
    finally:
        if by_copy:
            set_adapter(base, active)
        else:
            _enable(layers, True)
        for parameter, before in trains:
            parameter.requires_grad_(before)


def _adapter_layers(base: HFModule) -> list[Any]:
    """The layers of PEFT in ``base``, those with an adapter before copies of whole modules."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = list(base.modules())
    return [
        module for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper) for module in modules if isinstance(module, kind)
    ]


def _enable(layers: Sequence[Any], enabled: bool) -> None:
    for layer in layers:
        layer.enable_adapters(enabled)
