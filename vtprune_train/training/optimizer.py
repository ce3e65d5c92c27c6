"""The optimizer in ``train.optimizer``: parameter groups, class and states.

No code assumes which states an optimizer keeps; :meth:`OptimizerSpec.states` finds out by running one step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune_train.config.errors import ConfigError, did_you_mean
from vtprune_train.config.train import TrainConfig
from vtprune_train.core import user_code
from vtprune_train.models.io.build import parts_of
from vtprune_train.models.io.placement import whole_shape
from vtprune_train.training.muon import Muon

# Arguments that are not allowed in train.optimizer_args, and the settings to use instead.
SET_ELSEWHERE = {
    "params": "model.train",
    "lr": "model.train",
    "weight_decay": "train.weight_decay",
    "betas": "train.betas",
}
SIDE = 256  # states are found with a matrix of SIDE x SIDE elements, or a vector of as many
# bitsandbytes' AdamW: two states of 8 bits, and for each of them a float32 scale for 256 elements.
EIGHT_BIT_STATES = (1.0, 1.0, 4 / 256, 4 / 256)


def parameter_groups(
    model: nn.Module, rates: dict[str, float], weight_decay: float, optimizer: str = "adamw"
) -> list[dict[str, Any]]:
    """Build groups ``{params, lr, weight_decay, part}``: for each trained part one with weight decay and one without
    (biases, norms, ``image_newline``). For ``muon`` the :func:`muon_matrices` have separate groups with ``muon: True``.
    """
    matrices = muon_matrices(model) if optimizer == "muon" else set()
    groups = []
    for part, parameters in parts_of(model).items():
        if part not in rates:
            continue
        trained = [parameter for _, parameter in parameters if parameter.requires_grad]
        group = {"lr": rates[part], "weight_decay": weight_decay, "part": part}
        decaying = [p for p in trained if len(whole_shape(p)) > 1]
        kinds: list[dict[str, Any]] = [
            {"params": [p for p in decaying if p in matrices], **group, "muon": True},
            {"params": [p for p in decaying if p not in matrices], **group},
            {"params": [p for p in trained if len(whole_shape(p)) <= 1], **group, "weight_decay": 0.0},
        ]
        groups += [kind for kind in kinds if kind["params"]]
    return groups


def muon_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The matrices that Muon orthogonalizes: those of the decoder and the vision tower, except embeddings and the
    head."""
    parts = parts_of(model)
    inside = {p for part in ("language_model", "vision_tower") for _, p in parts[part] if len(whole_shape(p)) == 2}
    outside = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return inside - outside - {model.get_output_embeddings().weight}  # type: ignore[operator]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer class and its arguments.

    Args:
        name: ``train.optimizer``.
        cls: the class.
        arguments: arguments of ``cls`` other than the parameter groups.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, train: TrainConfig) -> OptimizerSpec:
        """The optimizer of a run; for AdamW, PyTorch's fused implementation.

        Raises:
            ConfigError: the class cannot be imported, or does not take ``train.optimizer_args``.
        """
        name, kind = train.optimizer, _class_of(train.optimizer)
        known = inspect.signature(kind).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        set_elsewhere = (
            SET_ELSEWHERE if not user_code.is_path(name) else {k: v for k, v in SET_ELSEWHERE.items() if k != "betas"}
        )
        for key in train.optimizer_args:
            place = f"train.optimizer_args.{key}"
            if key in set_elsewhere:
                raise ConfigError(f"{place}: set {set_elsewhere[key]} instead")
            if key not in known and not takes_any:
                nearest = did_you_mean(key, [k for k in known if k not in set_elsewhere], ("train", "optimizer_args"))
                raise ConfigError(f"{place}: {name} does not take this argument{nearest}")
        arguments = dict(train.optimizer_args)
        if not user_code.is_path(name):
            arguments["betas"] = train.betas
        if kind is torch.optim.AdamW:
            arguments.setdefault("fused", True)
        return OptimizerSpec(name, kind, arguments)

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Create the optimizer for these parameter groups, which are copied.

        Raises:
            ConfigError: the class rejects its arguments, has no learning rate per group, or does not support weight
                decay although a group has it.
        """
        arguments = dict(self.arguments)
        rate = inspect.signature(self.cls).parameters.get("lr")
        if rate is not None and rate.default is rate.empty:
            arguments["lr"] = groups[0]["lr"]
        place = f"train.optimizer={self.name}"
        try:
            optimizer = self.cls([dict(group) for group in groups], **arguments)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"{place} cannot be built with train.optimizer_args={self.arguments}: {error}") from error
        if "lr" not in optimizer.defaults:
            raise ConfigError(f"{place} has no learning rate 'lr' per parameter group; use another optimizer")
        if "weight_decay" not in optimizer.defaults and any(group.get("weight_decay") for group in groups):
            raise ConfigError(f"{place} does not support weight decay; set train.weight_decay=0")
        return optimizer

    def states(self, group: Mapping[str, Any], ndim: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Run one step on a small parameter and return its states by name: tensors and numbers.

        Args:
            group: settings of the parameter group.
            ndim: 1 for vectors and for the flat tensors of ZeRO 1 to 3; otherwise the parameter is a matrix.
            device: of the parameter.
        """
        parameter = nn.Parameter(torch.zeros((SIDE, SIDE) if ndim > 1 else SIDE**2, device=device))
        parameter.grad = torch.ones_like(parameter)
        muon = bool(group.get("muon"))
        optimizer = self.build([{"params": [parameter], "lr": 1e-3, "weight_decay": 0.0, "muon": muon}])
        try:
            optimizer.step()
        except Exception as error:
            raise ConfigError(
                f"train.optimizer={self.name}: a step on a tensor of shape {list(parameter.shape)} failed, as it "
                f"would in training: {type(error).__name__}: {error}"
            ) from error
        return {name: value for name, value in optimizer.state[parameter].items() if value is not None}


def state_bytes(train: TrainConfig, group: Mapping[str, Any], ndim: int) -> tuple[float, ...]:
    """Bytes of each optimizer state per element of a parameter, without states of constant size. For ``group`` and
    ``ndim`` see :meth:`OptimizerSpec.states`."""
    if train.optimizer == "adamw_8bit":  # works without bitsandbytes installed
        return EIGHT_BIT_STATES
    return bytes_per_element(OptimizerSpec.of(train).states(group, ndim))


def bytes_per_element(states: Mapping[str, Any]) -> tuple[float, ...]:
    """Bytes of each of these :meth:`OptimizerSpec.states` per element of the parameter."""
    return tuple(value.nbytes / SIDE**2 for value in states.values() if isinstance(value, Tensor) and value.ndim)


def set_rates(groups: list[dict[str, Any]], rates: dict[str, float], factor: float) -> dict[str, float]:
    """Set the learning rate of every group; returns them by part."""
    current = {part: rate * factor for part, rate in rates.items()}
    for group in groups:
        group["lr"] = current[group["part"]]
    return current


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    if name == "muon":
        return Muon
    if name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"train.optimizer=adamw_8bit needs bitsandbytes, which cannot be imported here ({error}); "
                "pip install bitsandbytes, or use train.optimizer=adamw"
            ) from error
        return AdamW8bit  # type: ignore[no-any-return]
    try:
        return user_code.load_class(name, torch.optim.Optimizer, "train.optimizer")
    except ValueError as error:
        raise ConfigError(str(error)) from error
