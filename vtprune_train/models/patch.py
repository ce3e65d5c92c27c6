"""The front door: ``prune(model, method)``, ``unprune(model)`` and ``dense(model)``.

Pruning swaps a few methods of an unmodified Hugging Face model: ``forward`` of the model, its base, decoder, head and
(where it takes images of any size) vision tower, ``generate``, ``prepare_inputs_for_generation`` and
``get_image_features`` (which are only listened to) and ``pack_image_features``. Parameters, names and classes stay what
they were, so checkpoints, optimizers, DeepSpeed and PEFT see the model they know. A method that learns adds its own
parameters at ``<decoder>.pruning``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.core_model_loading import revert_weight_conversion

from vtprune_train.core.stream import IGNORE, PackedBatch, StreamPlan, to_device
from vtprune_train.models import HFModule
from vtprune_train.models.copies import Source, follow
from vtprune_train.models.families import family_of, required
from vtprune_train.models.families.layout import Grids
from vtprune_train.models.forward import packed
from vtprune_train.models.forward.attention import (
    OWNED,
    attention_name,
    choose_backend,
    dense_implementation,
    unavailable_because,
)
from vtprune_train.models.forward.calls import STATE, Call, State, state_of
from vtprune_train.models.forward.encoder import (
    SEEN,
    check_tower,
    joined,
    patch_index,
    patches_per_tile,
    per_image,
    reading,
)
from vtprune_train.models.forward.head import chunked_consistency, chunked_cross_entropy
from vtprune_train.models.forward.padded import checkpoints_layers, forward_text
from vtprune_train.models.forward.rotary import full_frequencies
from vtprune_train.models.forward.sharding import check_attention_function, check_layers, restore_forward
from vtprune_train.models.forward.tower_attention import complete_inputs, replace_config, restore_config, towers
from vtprune_train.models.io.method_parameters import attach, check_trained, detach, modules_to_save
from vtprune_train.pruning import CONFIG_KEY, NONE, SAVED, method_from_settings, saved_settings, trust_saved
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals
from vtprune_train.pruning.contract import check_method
from vtprune_train.pruning.learned import learns

log = logging.getLogger(__name__)

_REPLACED = "_vtprune_replaced"
SIZES = ("image_grid_thw", "image_sizes", "batch_num_images")  # inputs of get_image_features that its code loops over


def prune(
    model: HFModule,
    method: PruningMethod | str | Mapping[str, Any] | Sequence[Any] | None = SAVED,
    *,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> HFModule:
    """Let ``model`` drop visual tokens inside its forward pass, in training, evaluation and generation.

    Afterwards ``model(**processor(...))`` and ``model.generate(**processor(...))`` take what they always took
    (:func:`vtprune_train.models.forward.padded.forward_text` says what dropped rows hold), and, for the families that
    the project trains, ``model(batch)`` takes a :class:`~vtprune_train.core.stream.PackedBatch`. The settings stand in
    ``model.config.pruning``, so ``save_pretrained`` keeps them.

    Args:
        model: a model of one of :data:`vtprune_train.models.families.FAMILIES`, or a PEFT model around one; changed in
            place.
        method: for example ``PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125))``; or, as in YAML, a name
            (``"fastv"``, with its defaults), a mapping ``{"method": "fastv", "keep": 0.5}`` or a list of these;
            ``None`` and ``"none"`` pack without dropping; ``"saved"`` (the default) is what the checkpoint was saved
            with.
        attention: ``auto`` (the best for the model's device and dtype, so move it first) or a backend of
            :mod:`vtprune_train.models.forward.attention`.
        trust_remote_code: with ``"saved"``: run the code of a method outside of the package that ``config.pruning``
            names and that was not imported yet.

    Returns:
        ``model``.

    Raises:
        ValueError: the class is not supported, the model is pruned already, the method is unknown, nothing was saved,
            or the method does not fit its depth.
    """
    inner = _unwrapped(model)
    family = family_of(inner)
    if STATE in inner.__dict__:
        raise ValueError(f"this model is pruned already ({state_of(inner).method}); call unprune(model) first")
    if trust_remote_code and method == SAVED:
        trust_saved(inner.config)
    method = resolve_method(inner, method)
    text_model = inner.get_submodule(family.decoder)
    attention_before = dense_implementation(text_model.config._attn_implementation)
    check_layers(text_model, attention_before, method.name if method is not None and learns(method) else None)
    full_frequencies(text_model, look=True)
    if method is not None:
        check_method(method, len(text_model.layers))
        check_tower(inner.get_submodule(family.base).config, family, method)
        if family.three_part_positions is not None:
            method = _keeping_positions(method, family.title)
        if family.three_part_positions is not None and method.multi_turn == "keep_dense":
            raise ValueError(
                f"{family.title}: multi_turn='keep_dense' is not offered, as its positions are not kept between turns; "
                "use multi_turn='drop'"
            )
    if method is not None:
        attach(inner, method)
        if inner is not model and learns(method):
            log.warning(
                "%s has parameters of its own, which PEFT's save_pretrained leaves out: prune first, then "
                "get_peft_model(model, LoraConfig(modules_to_save=%s, ...))", method.name, modules_to_save(inner),
            )  # fmt: skip
    state = State(
        family=family,
        method=method,
        backend=backend_for(inner, attention),
        image_token=inner.config.image_token_id,
        attention=attention_before,
        pruning=inner.config.__dict__.get(CONFIG_KEY),
    )
    if family.tower is not None:
        state.tower_backend = _tower_backend(inner.get_submodule(family.tower), state.backend)
    if path := getattr(inner.config, "_name_or_path", None):
        state.source = Source(path, functools.partial(_prune_copy, method=method, backend=state.backend))
        follow(next(cls for cls in type(inner).__mro__ if cls.__name__ == family.model_class))
    _install(inner, state)
    return model


def _prune_copy(model: HFModule, method: PruningMethod | None, backend: str) -> HFModule:
    """Prune a model that was opened by a pruned model's path as that one is."""
    if method is not None:
        try:
            check_trained(model, method)
        except ValueError as error:
            raise ValueError(
                f"{model.config._name_or_path} was opened as the copy of a model pruned by {method.name}, but does not "
                "hold its learned parameters. Save the pruned model with save_pretrained, open it from that folder and "
                "prune it there before you give it to the trainer; or give the trainer a ref_model"
            ) from error
    weight = model.get_output_embeddings().weight
    available = unavailable_because(backend, weight.device, weight.dtype) is None
    return prune(model, method, attention=backend if available else "auto")


def _tower_backend(module: nn.Module, backend: str) -> str:
    """The decoder's ``backend`` for the tower at ``module``, or the best one for the tower's dtype and head size where
    it does not take them."""
    tower = next(iter(towers(module).values()))
    sizes = tower.device, tower.dtype, next(m.head_dim for m in tower.modules() if hasattr(m, "head_dim"))
    return choose_backend("auto", *sizes) if unavailable_because(backend, *sizes) else backend


def backend_for(model: HFModule, requested: str = "auto") -> str:
    """The attention backend for a model's device, dtype and head size: what :func:`prune` takes.

    Raises:
        ValueError: ``requested`` is unknown or cannot run here.
    """
    inner = _unwrapped(model)
    weight = inner.get_output_embeddings().weight
    first_layer = inner.get_submodule(family_of(inner).decoder).layers[0]
    return choose_backend(requested, weight.device, weight.dtype, first_layer.self_attn.head_dim)


def _keeping_positions(method: PruningMethod, title: str) -> PruningMethod:
    """``method`` for a family whose positions have three parts, which the decoder loop never counts anew."""
    if all(part.positions == "keep" for part in method.parts):
        return method
    log.warning("%s: positions have three parts and stay with their tokens (positions=keep)", title)
    if "positions" in (field.name for field in dataclasses.fields(method)):  # type: ignore[arg-type]
        return replace(method, positions="keep")  # type: ignore[type-var]
    return method


def resolve_method(model: HFModule, method: Any) -> PruningMethod | None:
    """The method that :func:`prune` is asked for.

    Raises:
        ValueError: it is unknown or no method, or ``"saved"`` and nothing was saved.
    """
    if method is None or isinstance(method, PruningMethod):
        return method
    if isinstance(method, str):
        return saved_method(model) if method == SAVED else method_from_settings({"method": method})
    if isinstance(method, Mapping):
        if not isinstance(method.get("method"), str | list | tuple):
            raise ValueError(f"method={dict(method)!r} names no method; write for example {{'method': 'fastv'}}")
        if method["method"] == NONE and len(method) > 1:
            raise ValueError(f"method={dict(method)!r} has settings, but none drops nothing; leave them out")
        return method_from_settings(method)
    if isinstance(method, list | tuple):
        return method_from_settings({"method": list(method)})
    if inspect.isclass(method) and issubclass(method, PruningMethod):
        raise ValueError(
            f"method={method.__name__} is a class; make one of it: {method.__name__}(), or with settings of its own"
        )
    raise ValueError(
        f"method={method!r} is not a pruning method; use for example PyramidDrop(keep=(0.5, 0.25)) or its name"
    )


def saved_method(model: HFModule) -> PruningMethod | None:
    """The method in a model's ``config.pruning``.

    Raises:
        ValueError: there is none, or it is not known here.
    """
    settings = saved_settings(_unwrapped(model).config)
    if settings is None:
        raise ValueError(
            "config.json of this model holds no pruning settings, so name the method: "
            "prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))"
        )
    return method_from_settings(settings)


def unprune(model: HFModule) -> HFModule:
    """Undo :func:`prune`: methods, attention and config are what they were before, and parameters that the method
    brought are gone.

    What a Trainer put around a method in the meantime stays, and runs the dense model from now on.

    Raises:
        ValueError: the model is not pruned.
    """
    inner = _unwrapped(model)
    if not is_pruned(inner):
        raise ValueError(f"this {type(inner).__name__} is not pruned, so there is nothing to undo")
    state = state_of(inner)
    inner.get_submodule(state.family.decoder).config._attn_implementation = state.attention
    detach(inner)
    for module in inner.modules():  # by what they carry: PEFT may have moved some of them, or copied the tower
        module.__dict__.pop(STATE, None)
        module.__dict__.pop(OWNED, None)
        restore_config(module)
        restore_forward(module)
        for attribute, original in module.__dict__.pop(_REPLACED, {}).items():
            if _is_ours(module.__dict__.get(attribute)):
                del module.__dict__[attribute]
                if original is not None:
                    setattr(module, attribute, original)
    for key in [key for key, hook in inner._forward_pre_hooks.items() if hook is _open_call]:
        inner._forward_pre_hooks.pop(key)
        inner._forward_pre_hooks_with_kwargs.pop(key)
    for key in [key for key, hook in inner._forward_hooks.items() if hook is _close_call]:
        inner._forward_hooks.pop(key)
        inner._forward_hooks_always_called.pop(key)
    if state.source is not None:
        _set_path(inner, state.source.original)
    if state.pruning is not None:
        setattr(inner.config, CONFIG_KEY, state.pruning)
    elif CONFIG_KEY in inner.config.__dict__:
        delattr(inner.config, CONFIG_KEY)
    return model


@contextmanager
def dense(model: HFModule) -> Iterator[HFModule]:
    """Within ``with dense(model):`` a pruned model runs as the dense one it was, in this thread (or asyncio task)
    alone: requests of others are pruned meanwhile. Afterwards it is pruned as before.

    Parameters that a method learns stay in the model's state; :func:`unprune` takes them out.

    Raises:
        ValueError: the model is not pruned.
    """
    inner = _unwrapped(model)
    if not is_pruned(inner):
        raise ValueError(f"this {type(inner).__name__} is not pruned, so there is nothing to undo")
    with state_of(inner).densely():
        yield model


def is_pruned(model: HFModule) -> bool:
    """Whether :func:`prune` changed this model, and neither :func:`unprune` nor :func:`dense` undoes it here."""
    inner = _unwrapped(model)
    return STATE in inner.__dict__ and not state_of(inner).is_dense


def method_of(model: HFModule) -> PruningMethod | None:
    """The method that a pruned model drops by; ``None`` if it packs without dropping."""
    return state_of(_unwrapped(model)).method


def _unwrapped(model: HFModule) -> HFModule:
    """The Hugging Face model inside a PEFT model or ``torch.compile``; any other model as it is."""
    model = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _install(model: HFModule, state: State) -> None:
    family = state.family
    replacements: list[tuple[str, str, Callable[..., Any]]] = [
        ("", "forward", _forward),
        ("", "generate", _generate),
        ("", "prepare_inputs_for_generation", _prepare_step),
        ("", "generate_batch", _refuse_continuous_batching),
        ("", "init_continuous_batching", _refuse_continuous_batching),
        ("", "_replicate_for_data_parallel", _refuse_data_parallel),
        ("", "train", _train),
        ("", "load_state_dict", _load_state_dict),
        (family.base, "forward", _forward_base),
        (family.base, "get_image_features", _listen_to_image_features),
        (family.decoder, "forward", _forward_decoder),
    ]
    if family.three_part_positions is not None:
        replacements.append(("", "_prepare_position_ids_for_generation", _prepare_positions))
    if hasattr(model.get_submodule(family.base), "pack_image_features"):
        replacements.append((family.base, "pack_image_features", _pack_image_features))
    if family.tower is not None:
        for name, tower in towers(model.get_submodule(family.tower)).items():
            full_frequencies(tower, look=True)
            replacements.append((f"{family.tower}.{name}".rstrip("."), "forward", _forward_tower))
            replace_config(tower, state.tower_backend)
    if isinstance(model.get_submodule("lm_head"), nn.Linear):
        replacements.append(("lm_head", "forward", _forward_head))
    for name, attribute, function in replacements:
        module = model.get_submodule(name)
        module.__dict__[STATE] = state
        module.__dict__.setdefault(_REPLACED, {})[attribute] = _replace(module, attribute, function)
    model.register_forward_pre_hook(_open_call, prepend=True, with_kwargs=True)
    model.register_forward_hook(_close_call, always_call=True)
    text_model = model.get_submodule(family.decoder)
    text_model.config._attn_implementation = attention_name(state.backend, state.attention)
    for module in text_model.layers.modules():
        if "q_proj" in module._modules:
            module.__dict__[OWNED] = True
    if state.source is not None:
        _set_path(model, state.source.name)
    if state.method is not None:
        setattr(model.config, CONFIG_KEY, state.method.settings())
    elif CONFIG_KEY in model.config.__dict__:
        delattr(model.config, CONFIG_KEY)


def _set_path(model: HFModule, path: str) -> None:
    model.config._name_or_path = model.name_or_path = path


def _replace(module: nn.Module, attribute: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Make ``module.attribute(...)`` call ``function(module, original, state, ...)``; returns what stood on the
    instance before, or ``None`` where the class's own method did.

    Signatures are kept: Trainers read them (which inputs a model takes, whether it takes ``num_items_in_batch``), and
    so does ``generate``. State and class methods are looked up through ``self``, so that a deep copy calls its own; a
    model that is not pruned any more runs the original, for whoever still holds the method.
    """
    original = module.__dict__.get(attribute)
    signature = original or getattr(type(module), attribute)

    def run(self: HFModule, *args: Any, **kwargs: Any) -> Any:
        bound = original or getattr(type(self), attribute).__get__(self)
        state = self.__dict__.get(STATE)
        if state is None or state.is_dense:
            return bound(*args, **kwargs)
        return function(self, bound, state, *args, **kwargs)

    @functools.wraps(getattr(signature, "__func__", signature))
    def method(self: HFModule, *args: Any, **kwargs: Any) -> Any:
        outside = is_compiling() or torch.jit.is_tracing()
        return _uncompiled(run, self, *args, **kwargs) if outside else run(self, *args, **kwargs)

    method._of_vtprune = True  # type: ignore[attr-defined]
    setattr(module, attribute, MethodType(method, module))
    return original


@torch.compiler.disable
def _uncompiled(run: Callable[..., Any], self: HFModule, *args: Any, **kwargs: Any) -> Any:
    """``run`` outside the graph of a ``torch.compile`` around the whole model, or any part of it that was replaced:
    rows are laid out on the host, and lengths change with every call.

    Raises:
        ValueError: the call is being traced or exported, which would freeze them.
    """
    if STATE in self.__dict__ and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
        raise ValueError(
            "a pruned model cannot be traced or exported (torch.jit.trace, torch.export, ONNX): its rows are laid out "
            "on the host, and their lengths change with every call; export inside `with vtprune_train.dense(model):`"
        )
    if (state := self.__dict__.get(STATE)) is not None:
        state.warn_once(
            "torch.compile around a whole pruned model leaves its forward uncompiled, since the rows are laid out on "
            "the host first; compile the layers: vtprune_train.models.forward.compile.compile_layers(model)"
        )
    return run(self, *args, **kwargs)


def _is_ours(method: Any) -> bool:
    return getattr(getattr(method, "__func__", None), "_of_vtprune", False) is True


def _train(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Stay outermost: TRL's trainers put a ``forward`` of their own on the instance that keeps the labels from the
    decoder; every Trainer calls ``train()`` before it steps, and ``eval()`` (which comes here too) before it scores."""
    if not _is_ours(self.__dict__.get("forward")):
        self.__dict__[_REPLACED]["forward"] = _replace(self, "forward", _forward)
    return original(*args, **kwargs)


@torch.compiler.disable
def _open_call(model: HFModule, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Before whatever stands as the model's ``forward``: the decoder has to know the labels, even where a Trainer
    computes the loss from the base model's output (TRL, also for a reference model that is never trained)."""
    state = state_of(model)
    if state.is_dense:
        return
    if state.running.call is None and not args and isinstance(inputs.get("input_ids"), Tensor):
        state.running.open(inputs["input_ids"], _supervised(inputs))


@torch.compiler.disable
def _close_call(model: HFModule, args: tuple[Any, ...], output: Any) -> None:
    state = state_of(model)
    if not state.is_dense:
        state.running.call = None


def _load_state_dict(
    self: HFModule, original: Callable[..., Any], state: State, state_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    """Also under the names of the published checkpoints, which ``save_pretrained`` writes: transformers' Trainer
    resumes from such a file without renaming, and would go on with the weights the model was made with."""
    own = self.state_dict()
    if state_dict.keys() - own.keys():  # some names are the same in both, as Qwen2-VL's lm_head.weight
        name_of = {id(tensor): name for name, tensor in own.items()}
        saved = revert_weight_conversion(self, own)
        if all(id(tensor) in name_of for tensor in saved.values()):
            names = {published: name_of[id(tensor)] for published, tensor in saved.items()}
            state_dict = {key if key in own else names.get(key, key): t for key, t in state_dict.items()}
    return original(state_dict, *args, **kwargs)


def _forward(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the whole model: a :class:`PackedBatch`, or the padded inputs of a Hugging Face processor."""
    if args and isinstance(args[0], PackedBatch):
        return packed.forward(self, state, args[0])
    inputs = _by_name(original, args, inputs)
    _check_inputs(state, inputs)
    input_ids, labels = inputs["input_ids"], _supervised(inputs)
    if labels is not None:
        _mask_visual(inputs, input_ids == state.image_token)
    elif self.training and torch.is_grad_enabled() and state.method is not None:
        state.warn_once(
            "a training forward without labels: the last token of each row ranks the visual tokens, which in "
            "generation the end of the prompt does (label smoothing and compute_loss_func keep labels from the model)"
        )
    with state.calling(input_ids, labels):
        return original(**inputs)


def _supervised(inputs: dict[str, Any]) -> Tensor | None:
    """[B, L] int64: the token that each column of ``input_ids`` is supervised as, or -100; ``None`` without labels.

    ``labels`` may be as short as the logits that ``logits_to_keep`` keeps; without them ``shift_labels`` (of sequence
    parallelism) say it.

    Raises:
        ValueError: ``labels`` fit neither.
    """
    input_ids, labels, shifted = inputs["input_ids"], inputs.get("labels"), inputs.get("shift_labels")
    if labels is None:
        return None if shifted is None else F.pad(shifted, (1, 0), value=IGNORE)[:, :-1]
    if labels.shape == input_ids.shape:
        return labels
    kept = inputs.get("logits_to_keep", 0)
    columns = torch.arange(input_ids.shape[1])[_columns_kept(kept)]
    if labels.shape != (len(input_ids), len(columns)):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit input_ids of {tuple(input_ids.shape)} with "
            f"logits_to_keep={kept}; give a label for each token, -100 where none is supervised"
        )
    everywhere = labels.new_full(input_ids.shape, IGNORE)
    return everywhere.index_copy(1, columns.to(labels.device), labels)


def _columns_kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.cpu()


def _mask_visual(inputs: dict[str, Any], visual: Tensor) -> None:
    """Leave image tokens ([B, L] bool) out of the loss: rows of dropped tokens predict nothing."""
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if labels is not None:
        kept = slice(None) if labels.shape == visual.shape else _columns_kept(inputs["logits_to_keep"])
        inputs["labels"] = labels.masked_fill(visual[:, kept].to(labels.device), IGNORE)
    if shifted is not None:
        inputs["shift_labels"] = shifted.masked_fill(F.pad(visual, (0, 1))[:, 1:].to(shifted.device), IGNORE)


def _by_name(original: Callable[..., Any], args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
    """All inputs as keywords."""
    if not args:
        return inputs
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **inputs}


def _check_inputs(state: State, inputs: dict[str, Any]) -> None:
    if inputs.get("input_ids") is None:
        raise ValueError(
            "a pruned model needs input_ids and takes no inputs_embeds, which do not say where the images are; pass "
            "input_ids and pixel_values alone, or call the model inside `with vtprune_train.dense(model):`"
        )
    if inputs["input_ids"].ndim != 2:
        raise ValueError(f"input_ids of shape {tuple(inputs['input_ids'].shape)} are not [rows, length]; add the rows")
    for key, reason in state.family.refused:
        if inputs.get(key) is not None:
            raise ValueError(f"a pruned {state.family.title} does not take {key}: {reason}")


def _forward_base(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the base: a :class:`PackedBatch`, or padded inputs, which the family's own code embeds and splices."""
    if args and isinstance(args[0], PackedBatch):
        return packed.forward_base(self, state, args[0])
    inputs = _by_name(original, args, inputs)
    _check_inputs(state, inputs)
    with state.calling(inputs["input_ids"]) as call:
        assert call is not None
        given = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if given is not None:
            _tell(call, state, given.pooler_output)
        if state.family.three_part_positions is not None and inputs.get("position_ids") is None:
            cache = inputs.get("past_key_values")
            if inputs.get("image_grid_thw") is not None:
                inputs["position_ids"] = call.positions = state.family.three_part_positions(self, inputs)
            elif given is None and isinstance(cache, Cache) and cache.get_seq_length():
                # Not looked at: a staged cache knows its positions. Transformers would add what the last request on any
                # cache left on the module.
                inputs["position_ids"] = inputs["input_ids"].new_zeros(3, *inputs["input_ids"].shape)
        return original(**inputs)


@dataclass(frozen=True)
class _Seen:
    """What an image's features cannot say of themselves; carried on the tensor, as ``generate`` asks for the features
    first and hands them to ``forward`` later."""

    grids: Grids
    encoder: EncoderSignals | None


def _listen_to_image_features(
    self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any
) -> Any:
    """The family's own features; an open call learns how many tokens each image has, where they lie and what the
    vision tower thought of them."""
    inputs = _by_name(original, args, kwargs)
    # Where sizes are on the device, one read of each serves all that follows.
    inputs |= {key: _on_host(inputs[key]) for key in SIZES if inputs.get(key) is not None}
    as_tuple = inputs.get("return_dict") is False
    with reading(self, state.method) as read:
        features = original(**{**inputs, "return_dict": True})
    images = features.pooler_output
    lengths = state.family.image_lengths(images)
    encoders: list[EncoderSignals | None] = [None] * len(lengths)
    if read is not None:
        shown = required(state.family.patches, state.family.title)(self.config, inputs)
        if [len(own) for own, _ in shown] != lengths:
            raise ValueError(
                f"images of {lengths} visual tokens, where {[len(own) for own, _ in shown]} were expected from the "
                "config: the vision tower's attention cannot be told to tokens; leave vision_feature_select_strategy "
                "and vision_aspect_ratio to the config"
            )
        index = to_device(patch_index(shown, patches_per_tile(self.config)), images[0].device)
        encoders = list(per_image(read.signals(index), lengths))
    grids = _grids(self, state, inputs, lengths) or [()] * len(lengths)
    if len(images) == len(lengths):
        for image, own, encoder in zip(images, grids, encoders, strict=True):
            setattr(image, SEEN, _Seen(own, encoder))
    if state.running.call is not None:
        _tell(state.running.call, state, images)
    return features.to_tuple() if as_tuple else features


def _on_host(sizes: Tensor | Sequence[Any]) -> Tensor:
    """Sizes as a processor may give them: a tensor or array, or a list of tuples, arrays or tensors."""
    if isinstance(sizes, Tensor):
        return sizes.cpu()
    return torch.stack([torch.as_tensor(size).cpu() for size in sizes]) if len(sizes) else torch.zeros(0, 2)


class _TensorsOnHost(TorchFunctionMode):
    """``torch.tensor(...)`` inside makes its tensor on the host, whatever device it is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return func(*args, **kwargs)


def _pack_image_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """The family's own packing. The lengths that it returns beside the features, which ``get_image_features`` does not
    use, stay on the host: copying them to the device would wait for all that it has to do."""
    with _TensorsOnHost():
        return original(*args, **kwargs)


def _forward_tower(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    full_frequencies(self)
    return original(**complete_inputs(self, _by_name(original, args, inputs)))


def _tell(call: Call, state: State, images: Sequence[Tensor]) -> None:
    """Note in an open call what is known of its images."""
    call.image_lengths = state.family.image_lengths(images)
    seen: list[_Seen] = [image.__dict__[SEEN] for image in images if SEEN in image.__dict__]
    if len(seen) < len(call.image_lengths):
        if state.method is not None and state.method.encoder_layers:
            raise ValueError(
                f"{state.method.name} reads the vision tower's attention, but the image features were not made by this "
                "model's get_image_features as it is; pass pixel_values"
            )
        return
    call.image_grids = [own.grids for own in seen]
    encoders = [own.encoder for own in seen if own.encoder is not None]
    call.encoder = joined(encoders) if encoders else None


def _grids(self: HFModule, state: State, inputs: dict[str, Any], lengths: list[int]) -> list[Grids]:
    """The rasters of each image; none where the family has no layout for the model's settings."""
    try:
        grids = state.family.grids(self.config, inputs)
    except ValueError:
        return []
    if len(grids) != len(lengths):
        return []
    fits = [sum(rows * columns for rows, columns in own) == length for own, length in zip(grids, lengths, strict=True)]
    return [own if fit else () for own, fit in zip(grids, fits, strict=True)]


def _forward_decoder(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    check_attention_function(state.attention)
    full_frequencies(self)
    if len(args) > 1 and isinstance(args[1], StreamPlan):
        return packed.forward_text(self, state, *args)
    inputs = _by_name(original, args, inputs)
    input_ids = inputs.pop("input_ids", None)
    if inputs.get("inputs_embeds") is None:
        inputs["inputs_embeds"] = self.embed_tokens(input_ids)
    return forward_text(self, state, **inputs)


def _forward_head(self: nn.Linear, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Logits, or with targets the chunked cross-entropy (and with a teacher the divergence from it); inside the
    module's own call, where ZeRO-3 has its weight gathered."""
    if len(args) == 2:
        hidden, targets = args
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets)
    if len(args) == 3:
        hidden, targets, teaching = args
        return chunked_consistency(hidden, self.weight, self.bias, targets, teaching)
    return original(*args, **kwargs)


def _generate(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """``generate``, after refusing what a staged cache cannot do; without a cache every step ranks by the prompt."""
    inputs = _by_name(original, args, kwargs)
    config = self._prepare_generation_config(**{"generation_config": None, **inputs})[0]  # the model's own filled in
    _check_generation(self, config, inputs)
    if checkpoints_layers(self.get_submodule(state.family.decoder)):
        inputs["use_cache"] = _without_cache(state, config, inputs)
    prompt = inputs.get("input_ids") if inputs.get("inputs") is None else inputs["inputs"]
    if max(config.num_beams or 1, config.num_return_sequences or 1) > 1:
        _check_repeated_images(self, prompt, inputs.get("pixel_values"))
    given = [tensor.shape[1] for tensor in (prompt, inputs.get("attention_mask")) if tensor is not None]
    previous = state.running.prompt_width, state.running.is_step
    state.running.prompt_width, state.running.is_step = max(given, default=None), None
    try:
        return original(**inputs)
    finally:
        state.running.prompt_width, state.running.is_step = previous


def _prepare_step(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """``generate`` does this before each of its own forward passes; only those are about its prompt."""
    state.running.is_step = True
    return original(*args, **kwargs)


def _prepare_positions(
    self: HFModule, original: Callable[..., Any], state: State, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
) -> Any:
    """Positions of three parts; in a later turn those of text, which are not looked at: transformers would add what the
    last request on any cache left on the module."""
    cache, types = model_kwargs.get("past_key_values"), model_kwargs.get("mm_token_type_ids")
    cached = 0 if cache is None else cache.get_seq_length()
    if not cached:
        return original(inputs_tensor, model_kwargs)
    has_images = model_kwargs.get("image_grid_thw") is not None if types is None else types[:, cached:].any()
    if has_images:
        return original(inputs_tensor, model_kwargs)
    return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)[None]


def _check_generation(model: HFModule, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    """Refuse settings of ``generate`` that a staged cache cannot honour, wherever they are set."""
    if config.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={config.prefill_chunk_size}: a pruned model ranks visual tokens by the end of the "
            "prompt and cannot read it in chunks; leave prefill_chunk_size unset"
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r}: a pruned model keeps another length in every "
            "layer, which only the dynamic cache does; leave cache_implementation unset"
        )
    assistant, negative = inputs.get("assistant_model"), inputs.get("negative_prompt_ids")
    if assistant is not None and is_pruned(assistant):
        raise ValueError("assistant_model is pruned: it is shown the prompt without its images; unprune it")
    if negative is not None and (negative == model.config.image_token_id).any():
        raise ValueError(
            "negative_prompt_ids hold image tokens, but generate passes no image with them; leave the image tokens "
            "out of the negative prompt"
        )


def _without_cache(state: State, config: GenerationConfig, inputs: dict[str, Any]) -> bool:
    """``use_cache`` for a model in training mode whose layers are recomputed, which leave a cache empty."""
    needs_cache = [key for key in ("past_key_values", "assistant_model") if inputs.get(key) is not None]
    needs_cache += ["prompt_lookup_num_tokens"] if config.prompt_lookup_num_tokens is not None else []
    if needs_cache:
        raise ValueError(
            f"{needs_cache[0]} needs a cache, which layers with gradient checkpointing do not fill in training mode; "
            "call model.eval() or model.gradient_checkpointing_disable() before generate"
        )
    state.warn_once(
        "generate in training mode with gradient checkpointing runs without a cache, every step the whole row: call "
        "model.eval() or model.gradient_checkpointing_disable() first"
    )
    return False


def _refuse_continuous_batching(
    self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any
) -> Any:
    raise ValueError(
        f"{original.__name__}: continuous batching packs requests into a paged cache, but a pruned model keeps another "
        "length in every layer; pad the prompts to one batch and call generate, or use unprune(model)"
    )


def _refuse_data_parallel(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "torch.nn.DataParallel copies a pruned model without what it is pruned by; run one process a device: torchrun, "
        "deepspeed or accelerate launch (transformers' Trainer takes DataParallel where one process sees several GPUs)"
    )


def _check_repeated_images(model: HFModule, prompt: Tensor | None, pixel_values: Tensor | None) -> None:
    """Refuse rows of several images (or tiles) that transformers before 5.18 mixes up: for each beam it repeats every
    image on its own, not a row's images together."""
    if hasattr(GenerationMixin, "_expand_multimodal_outputs") or prompt is None or pixel_values is None:
        return
    if type(model)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation:
        return  # Qwen2-VL and those after it do it themselves
    rows = int((prompt == model.config.image_token_id).any(dim=1).sum())
    if len(pixel_values) != rows:
        raise ValueError(
            f"num_beams or num_return_sequences above 1 with {len(pixel_values)} images or tiles in {rows} rows: "
            "transformers before 5.18 mixes the images of a row up; install transformers>=5.18, or give each row one"
        )
