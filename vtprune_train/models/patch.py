"""The public functions ``pack(model)``, ``prune(model, method)``, ``unprune(model)`` and ``dense(model)``.

Pruning replaces methods of an unmodified Hugging Face model: ``forward`` of the model, its base, decoder, head and (for
families with native resolution) vision tower; ``generate``, ``prepare_inputs_for_generation`` and
``get_image_features``, which are only observed; and ``pack_image_features``. Parameters, names and classes are
unchanged, so checkpoints, optimizers, DeepSpeed and PEFT work as usual. Methods with learned parameters add them at
``<decoder>.pruning``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers.loss.loss_utils import ForCausalLMLoss

from vtprune_train.models import HFModule
from vtprune_train.models.copies import Source, follow
from vtprune_train.models.families import family_of
from vtprune_train.models.families.base import Lacks
from vtprune_train.models.forward import generate, images, linear_attention, modules, tower_attention, tower_tokens
from vtprune_train.models.forward.attention import OWNED, attention_name, dense_implementation, unavailable_because
from vtprune_train.models.forward.backend import decoder_backend, tower_backend
from vtprune_train.models.forward.calls import STATE, RankBy, State, is_pruned, state_of, unwrapped
from vtprune_train.models.forward.encoder import check_tower
from vtprune_train.models.forward.head import supervised_loss
from vtprune_train.models.forward.linear_attention import MIXER
from vtprune_train.models.forward.reference import reference_for
from vtprune_train.models.forward.rotary import full_frequencies
from vtprune_train.models.forward.sharding import check_layers, restore_forward
from vtprune_train.models.io.method_parameters import attach, check_trained, detach, modules_to_save
from vtprune_train.models.io.provenance import published_names
from vtprune_train.pruning import CONFIG_KEY, NONE, SAVED, method_from_settings, saved_settings, trust_saved
from vtprune_train.pruning.attending import check_attending, fitted
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.contract import check_method
from vtprune_train.pruning.describe import schedule
from vtprune_train.pruning.learned import learns
from vtprune_train.pruning.setting_types import setting_types

log = logging.getLogger(__name__)

_REPLACED = "_vtprune_replaced"
Model = TypeVar("Model", bound=nn.Module)


def prune(
    model: Model,
    method: PruningMethod | str | Mapping[str, Any] | Sequence[Any] | None = SAVED,
    *,
    attention: str = "auto",
    rank_by: str | nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Make ``model`` drop visual tokens in its forward pass, for training, evaluation and generation. It also computes
    no padding, as after :func:`pack`::

        prune(model, PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125)))
        model(**processor(images=images, text=texts, return_tensors="pt", padding=True), labels=labels).loss.backward()

    Inputs and the shapes of outputs stay the same; positions of dropped tokens repeat the nearest kept position to
    their left. For families that the project trains, ``model(batch)`` also accepts a
    :class:`~vtprune_train.core.stream.PackedBatch`. The settings are stored in ``model.config.pruning``, so
    ``save_pretrained`` saves them.

    Args:
        model: a model of one of :data:`vtprune_train.models.families.FAMILIES`, or a PEFT model around one; changed in
            place.
        method: for example ``PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125))``; or, as in YAML, a name
            (``"fastv"``, with its defaults), a mapping ``{"method": "fastv", "keep": 0.5}`` or a list of these;
            ``None`` or ``"none"`` packs without dropping; ``"saved"`` (default) uses the method that the checkpoint was
            saved with.
        attention: ``auto`` (selected for the model's device and dtype, and again if a trainer moves or casts the
            model), a backend of :mod:`vtprune_train.models.forward.attention`, or the path of a function (see
            :func:`vtprune_train.models.forward.attention.user_function`).
        rank_by: the model whose weights select the kept tokens. ``None``: this model. ``"reference"``: the reference
            model that TRL loads or, with PEFT, this model without its adapters. A model: that one, pruned by the same
            method. The other model runs up to its last drop point before each pass with images. Not saved with the
            model, and a deep copy ranks by itself.
        trust_remote_code: with ``"saved"``: allow importing a method outside the package that ``config.pruning`` names.

    Returns:
        ``model``.

    Raises:
        ValueError: the model class is unsupported, the model is already pruned, the method is unknown, no method is
            saved in the checkpoint, the method does not fit the number of layers, or it cannot be used with
            ``rank_by``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{model!r} is not a model; load it with from_pretrained, and pass the result")
    inner = unwrapped(model)
    family = family_of(inner)
    if STATE in inner.__dict__:
        method_before = state_of(inner).method
        done = "packed" if method_before is None else f"pruned ({method_before})"
        raise ValueError(f"this model is already {done}; call unprune(model) first")
    if trust_remote_code and method == SAVED:
        trust_saved(inner.config)
    method = resolve_method(inner, method)
    text_model = inner.get_submodule(family.decoder)
    attention_before = dense_implementation(text_model.config._attn_implementation)
    check_layers(text_model, attention_before, method.name if method is not None and learns(method) else None)
    full_frequencies(text_model, look=True)
    if method is not None:
        if (moved := fitted(method, text_model.config)) is not method:
            method = moved
            log.info("drop points moved to layers that attend: %s", schedule(method, len(text_model.layers)))
        check_method(method, len(text_model.layers))
        check_attending(method, text_model.config)
        check_tower(inner.get_submodule(family.base).config, family, method)
        family.warn_without_videos(method, len(text_model.layers))
        if family.three_part_positions is not None:
            method = _keeping_positions(method, family.title)
        if family.three_part_positions is not None and method.needs.multi_turn == "keep_dense":
            raise ValueError(
                f"{family.title}: multi_turn='keep_dense' is not supported because its positions are not kept between "
                "turns; use multi_turn='drop'"
            )
    reference = None if rank_by is None else reference_for(inner, family, rank_by, method)
    if method is not None:
        attach(inner, method)
        if inner is not model and learns(method):
            log.warning(
                "%s has learned parameters, which PEFT's save_pretrained does not save: prune first, then "
                "get_peft_model(model, LoraConfig(modules_to_save=%s, ...))", method.name, modules_to_save(inner),
            )  # fmt: skip
    weight = inner.get_output_embeddings().weight
    state = State(
        family=family,
        method=method,
        backend=backend_for(inner, attention),
        image_token=inner.config.image_token_id,
        video_token=None if isinstance(family.videos, Lacks) else inner.config.video_token_id,
        attention=attention_before,
        pruning=inner.config.__dict__.get(CONFIG_KEY),
        rank_by=reference,
        chosen_for=(weight.device.type, weight.dtype) if attention == "auto" else None,
    )
    if family.tower is not None:
        state.tower_backend = tower_backend(inner.get_submodule(family.tower), state.backend)
    if path := getattr(inner.config, "_name_or_path", None):
        state.source = Source(
            path, functools.partial(_prune_copy, method=method, attention=attention, rank_by=state.rank_by)
        )
        follow(next(cls for cls in type(inner).__mro__ if cls.__name__ == family.model_class))
    _install(inner, state)
    return model


def pack(model: Model, *, attention: str = "auto") -> Model:
    """Make ``model``'s decoder compute no padding: the rows of a batch are joined into one packed sequence, with
    variable-length attention. No visual token is dropped.

    Loss, gradients, the logits of real tokens and ``generate`` are those of the original model, up to rounding. Inputs,
    outputs, parameter names and checkpoints stay the same. :func:`unprune` undoes it. To drop visual tokens as well,
    call :func:`prune` instead, which also packs.

    Args:
        model: a model of one of :data:`vtprune_train.models.families.FAMILIES`, or a PEFT model around one; changed in
            place.
        attention: see :func:`prune`.

    Returns:
        ``model``.

    Raises:
        ValueError: the model class is unsupported, or the model is already packed or pruned.
    """
    return prune(model, None, attention=attention)


def _prune_copy(model: HFModule, method: PruningMethod | None, attention: str, rank_by: RankBy | None) -> HFModule:
    """Apply a pruned model's method to a model loaded from its path, which becomes its reference (``rank_by``)."""
    if method is not None:
        try:
            check_trained(model, method)
        except ValueError as error:
            raise ValueError(
                f"{model.config._name_or_path} was opened as a copy of a model pruned by {method.name}, but does not "
                "hold its learned parameters. Save the pruned model with save_pretrained, open it from that folder "
                "and prune it before you pass it to the trainer; or pass a ref_model to the trainer"
            ) from error
    weight = model.get_output_embeddings().weight
    available = attention != "auto" and unavailable_because(attention, weight.device, weight.dtype) is None
    prune(model, method, attention=attention if available else "auto")
    if rank_by is not None:
        rank_by.loaded(model)
    return model


def backend_for(model: HFModule, requested: str = "auto") -> str:
    """Return the attention backend that :func:`prune` uses for the model's device, dtype and head size.

    Raises:
        ValueError: ``requested`` is unknown or cannot run here.
    """
    inner = unwrapped(model)
    weight = inner.get_output_embeddings().weight
    return decoder_backend(inner.get_submodule(family_of(inner).decoder), requested, weight.device, weight.dtype)


def _keeping_positions(method: PruningMethod, title: str) -> PruningMethod:
    """Return ``method`` with ``positions='keep'`` for M-RoPE families, whose positions are never renumbered."""
    if all(part.needs.positions == "keep" for part in method.parts):
        return method
    log.warning("%s: positions have three parts, so tokens keep their positions (positions=keep)", title)
    if "positions" in setting_types(type(method)):
        changes: dict[str, Any] = {"positions": "keep"}
        return dataclasses.replace(method, **changes)
    return method


def resolve_method(model: HFModule, method: Any) -> PruningMethod | None:
    """Resolve the argument ``method`` of :func:`prune`.

    Raises:
        ValueError: an unknown method, not a method, or ``"saved"`` without saved settings.
    """
    if method is None or isinstance(method, PruningMethod):
        return method
    if isinstance(method, str):
        return saved_method(model) if method == SAVED else method_from_settings({"method": method})
    if isinstance(method, Mapping):
        if not isinstance(method.get("method"), str | list | tuple):
            raise ValueError(f"method={dict(method)!r} has no key 'method'; for example {{'method': 'fastv'}}")
        if method["method"] == NONE and len(method) > 1:
            raise ValueError(f"method={dict(method)!r}: none takes no settings; remove them")
        return method_from_settings(method)
    if isinstance(method, list | tuple):
        return method_from_settings({"method": list(method)})
    if inspect.isclass(method) and issubclass(method, PruningMethod):
        raise ValueError(
            f"method={method.__name__} is a class; pass an instance: {method.__name__}(), or with settings"
        )
    raise ValueError(
        f"method={method!r} is not a pruning method; use for example PyramidDrop(keep=(0.5, 0.25)) or its name"
    )


def saved_method(model: HFModule) -> PruningMethod | None:
    """The method in a model's ``config.pruning``.

    Raises:
        ValueError: the config has no pruning settings, or the method is unknown.
    """
    settings = saved_settings(unwrapped(model).config)
    if settings is None:
        raise ValueError(
            "config.json of this model has no pruning settings; pass a method: prune(model, PyramidDrop(keep=(0.5, "
            "0.25, 0.125)))"
        )
    return method_from_settings(settings)


def unprune(model: Model) -> Model:
    """Undo :func:`prune`: restore methods, attention and config, and remove the method's learned parameters.

    Wrappers that a Trainer added in the meantime stay in place and now call the dense model.

    Raises:
        ValueError: the model is not pruned.
    """
    inner = _pruned(model)
    state = state_of(inner)
    inner.get_submodule(state.family.decoder).config._attn_implementation = state.attention
    detach(inner)
    for module in inner.modules():  # find modules by their attributes: PEFT may have moved or copied them
        module.__dict__.pop(STATE, None)
        module.__dict__.pop(OWNED, None)
        tower_attention.restore_config(module)
        restore_forward(module)
        for attribute, original in module.__dict__.pop(_REPLACED, {}).items():
            if _is_ours(module.__dict__.get(attribute)):
                del module.__dict__[attribute]
                if original is not None:
                    setattr(module, attribute, original)
    if inner.__dict__.get("_loss_function") is supervised_loss:
        del inner.__dict__["_loss_function"]
    for key in [key for key, hook in inner._forward_pre_hooks.items() if hook is modules.open_call]:
        inner._forward_pre_hooks.pop(key)
        inner._forward_pre_hooks_with_kwargs.pop(key)
    for key in [key for key, hook in inner._forward_hooks.items() if hook is modules.close_call]:
        inner._forward_hooks.pop(key)
        inner._forward_hooks_always_called.pop(key)
    if state.source is not None:
        _set_path(inner, state.source.original)
    if state.pruning is not None:
        setattr(inner.config, CONFIG_KEY, state.pruning)
    elif CONFIG_KEY in inner.config.__dict__:
        delattr(inner.config, CONFIG_KEY)
    return model


def _pruned(model: HFModule) -> HFModule:
    """Return the unwrapped model; raise if it is not pruned."""
    inner = unwrapped(model)
    if not is_pruned(inner):
        raise ValueError(f"this {type(inner).__name__} is not pruned; call prune(model, method) first")
    return inner


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """Context manager that temporarily disables pruning in the current thread (or asyncio task); other threads are not
    affected.

    Learned parameters of the method stay in the state dict; :func:`unprune` removes them.

    Raises:
        ValueError: the model is not pruned.
    """
    with state_of(_pruned(model)).densely():
        yield model


def method_of(model: HFModule) -> PruningMethod | None:
    """Return a pruned model's method; ``None`` if it packs without dropping."""
    return state_of(unwrapped(model)).method


def _install(model: HFModule, state: State) -> None:
    family = state.family
    replacements: list[tuple[str, str, Callable[..., Any]]] = [
        ("", "forward", modules.forward),
        ("", "generate", generate.generate),
        ("", "prepare_inputs_for_generation", generate.prepare_inputs),
        ("", "generate_batch", generate.refuse_continuous_batching),
        ("", "init_continuous_batching", generate.refuse_continuous_batching),
        ("", "_replicate_for_data_parallel", modules.refuse_data_parallel),
        ("", "train", _train),
        ("", "load_state_dict", _load_state_dict),
        ("", "extra_repr", _extra_repr),
        (family.base, "forward", modules.forward_base),
        (family.base, "get_image_features", images.get_image_features),
        (family.decoder, "forward", modules.forward_decoder),
    ]
    if not isinstance(family.videos, Lacks):
        replacements.append((family.base, "get_video_features", images.get_video_features))
    if hasattr(model, "_expand_multimodal_outputs"):
        replacements.append(("", "_expand_multimodal_outputs", images.expand_outputs))
    if family.three_part_positions is not None:
        replacements.append(("", "_prepare_position_ids_for_generation", generate.prepare_position_ids))
    if hasattr(model.get_submodule(family.base), "pack_image_features"):
        replacements.append((family.base, "pack_image_features", images.pack_image_features))
    if family.tower is not None:
        for name, tower in tower_attention.towers(model.get_submodule(family.tower)).items():
            full_frequencies(tower, look=True)
            replacements.append((f"{family.tower}.{name}".rstrip("."), "forward", tower_attention.forward))
            tower_attention.replace_config(tower, state.tower_backend)
    if state.method is not None and state.method.needs.tower is not None:
        for name in tower_attention.towers(model.get_submodule(f"{family.base}.vision_tower")):
            place = f"{family.base}.vision_tower.{name}".rstrip(".")
            replacements += [
                (place, "forward", tower_tokens.forward_tower),
                (f"{place}.embeddings", "interpolate_pos_encoding", tower_tokens.interpolated_positions),
                (f"{place}.encoder", "forward", tower_tokens.forward_encoder),
            ]
        replacements.append((f"{family.base}.multi_modal_projector", "forward", tower_tokens.forward_projector))
    for index, layer in enumerate(model.get_submodule(family.decoder).layers):
        if MIXER in layer._modules:
            replacements.append((f"{family.decoder}.layers.{index}.{MIXER}", "forward", linear_attention.forward))
    if isinstance(model.get_submodule("lm_head"), nn.Linear):
        replacements.append(("lm_head", "forward", modules.forward_head))
    for name, attribute, function in replacements:
        module = model.get_submodule(name)
        module.__dict__[STATE] = state
        module.__dict__.setdefault(_REPLACED, {})[attribute] = _replace(module, attribute, function)
    if model.loss_function is ForCausalLMLoss:  # not one of the user's
        model.loss_function = supervised_loss
    model.register_forward_pre_hook(modules.open_call, prepend=True, with_kwargs=True)
    model.register_forward_hook(modules.close_call, always_call=True)
    text_model = model.get_submodule(family.decoder)
    text_model.config._attn_implementation = attention_name(state.backend, state.attention)
    for module in text_model.layers.modules():
        if "q_proj" in module._modules:
            module.__dict__[OWNED] = True
    for layer in text_model.layers:
        if MIXER in layer._modules:
            layer._modules[MIXER].__dict__[OWNED] = True
    if state.source is not None:
        _set_path(model, state.source.name)
    if state.method is not None:
        setattr(model.config, CONFIG_KEY, state.method.settings())
    elif CONFIG_KEY in model.config.__dict__:
        delattr(model.config, CONFIG_KEY)


def _set_path(model: HFModule, path: str) -> None:
    model.config._name_or_path = model.name_or_path = path


def _replace(module: nn.Module, attribute: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Make ``module.attribute(...)`` call ``function(module, original, state, ...)``; returns the previous instance
    attribute, or ``None`` if the class's method was used.

    Signatures are kept: Trainers read them (which inputs a model takes, whether it takes ``num_items_in_batch``), and
    so does ``generate``. State and class methods are looked up through ``self`` so that a deep copy uses its own. After
    unprune, references to the replaced method call the original.
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
    """Run ``run`` outside any torch.compile graph, because rows are laid out on the host and lengths change with every
    call.

    Raises:
        ValueError: the call is being traced or exported, which would bake the lengths in.
    """
    if STATE in self.__dict__ and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
        raise ValueError(
            "a pruned model cannot be traced or exported (torch.jit.trace, torch.export, ONNX): rows are laid out on "
            "the host, and their lengths change with every call; export inside `with vtprune_train.dense(model):`"
        )
    if (state := self.__dict__.get(STATE)) is not None and OWNED not in self.__dict__:
        state.warn_once(
            "torch.compile around a whole pruned model has no effect, because rows are laid out on the host; compile "
            "the layers: vtprune_train.models.forward.compile.compile_layers(model)"
        )
    return run(self, *args, **kwargs)


def _is_ours(method: Any) -> bool:
    return getattr(getattr(method, "__func__", None), "_of_vtprune", False) is True


def _train(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Keep our ``forward`` outermost. TRL trainers install a ``forward`` on the instance that hides the labels from the
    decoder, so it is re-wrapped here: trainers call ``train()`` before stepping and ``eval()`` (which also ends up
    here) before evaluating."""
    if not _is_ours(self.__dict__.get("forward")):
        self.__dict__[_REPLACED]["forward"] = _replace(self, "forward", modules.forward)
    return original(*args, **kwargs)


def _extra_repr(self: HFModule, original: Callable[..., str], state: State) -> str:
    """Make the first line of ``print(model)`` describe how the model is pruned."""
    depth = len(self.get_submodule(state.family.decoder).layers)
    pruned = "packed, nothing is dropped" if state.method is None else f"pruned by {schedule(state.method, depth)}"
    return "\n".join(filter(None, (pruned, original())))


def _load_state_dict(
    self: HFModule, original: Callable[..., Any], state: State, state_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    """Also accept the parameter names of published checkpoints (written by ``save_pretrained``): transformers' Trainer
    resumes from such files without renaming keys and would otherwise silently continue with the initial weights."""
    keys = self.state_dict().keys()
    if state_dict.keys() - keys:  # some names are identical in both, e.g. Qwen2-VL's lm_head.weight
        names = {published: name for name, published in published_names(self).items()}
        state_dict = {key if key in keys else names.get(key, key): t for key, t in state_dict.items()}
    return original(state_dict, *args, **kwargs)
