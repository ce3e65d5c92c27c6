"""Kernel selection for a run: torch.compile, Liger kernels, FP8 matmuls, deterministic kernels."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil

import torch
from torch import nn

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.models import HFModule
from vtprune_train.models.families import family_of
from vtprune_train.models.forward.compile import compile_layers

log = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # Ada Lovelace; Hopper is 9.0
FP8_MULTIPLE = 16  # cuBLAS FP8 matmuls need dimensions that are multiples of this


def be_deterministic(config: Config) -> None:
    """Enable bitwise-deterministic execution (``train.deterministic``); operations without a deterministic
    implementation raise.

    Call before CUDA is initialized, because cuBLAS reads its workspace setting at that point.
    """
    if not config.train.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers' flash path
    torch.use_deterministic_algorithms(True)
    # No result depends on uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def replace_kernels(config: Config, model: HFModule, device: torch.device) -> None:
    """Install Liger kernels and FP8 linear layers in the decoder according to ``model.liger`` and ``model.fp8``. Call
    before creating the optimizer.

    Raises:
        ConfigError: the package is missing, or does not support this model or device.
    """
    text_model = model.get_submodule(family_of(model).decoder)
    if config.model.liger:
        use_liger(text_model)
    if config.model.fp8:
        use_fp8(text_model, device)


def use_liger(text_model: HFModule) -> None:
    """Replace norm, rotary embedding and MLP of ``text_model`` with Liger kernels.

    Raises:
        ConfigError: liger-kernel is missing, or does not know this model type.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ConfigError(
            f"model.liger=true needs liger-kernel, but importing it failed ({error}); pip install -r "
            "requirements-gpu.txt, or set model.liger=false"
        ) from error
    model_type = text_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            f"model.liger=true: liger-kernel has no kernels for model type {model_type!r}; set model.liger=false"
        )
    # Liger's fused loss would overwrite our patched forward.
    _apply_liger_kernel_to_instance(text_model, fused_linear_cross_entropy=False)


def use_fp8(text_model: HFModule, device: torch.device) -> None:
    """Run the decoder's linear layers with float8 matmuls (torchao, per-tensor scaling); weights keep their dtype.
    Without CUDA, FP8 rounding is emulated: useful to measure accuracy, but not faster.

    Raises:
        ConfigError: torchao is missing or the GPU has no FP8.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"model.fp8=true needs torchao, but importing it failed ({error}); pip install -r requirements-gpu.txt, or "
            "set model.fp8=false"
        ) from error
    emulate = device.type != "cuda"
    if emulate:
        log.warning("model.fp8=true on %s: rounding to float8 is emulated; this is slower, not faster", device.type)
    elif (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise ConfigError(
            f"model.fp8=true needs a GPU of compute capability 8.9 or higher, but {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}; set model.fp8=false"
        )

    def fits(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or ".lora_" in name:  # adapter layers are small and stay in full precision
            return False
        return module.in_features % FP8_MULTIPLE == 0 and module.out_features % FP8_MULTIPLE == 0

    # The number of tokens is arbitrary, so matmuls that reduce over tokens (weight gradients) are padded.
    settings = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(text_model.layers, config=settings, module_filter_fn=fits)


def compile_refusal(config: Config, device: torch.device, zero_stage: int) -> str | None:
    """Return the reason why layers cannot be compiled in this run, or ``None``."""
    if zero_stage == 3:
        return "ZeRO-3 gathers parameters inside the layers"
    if config.model.peft is not None and config.model.peft.kind == "qlora":
        return "4-bit weights are unpacked inside the layers"
    if config.model.liger:
        return "model.liger=true replaces the modules that would be compiled"
    if config.train.compile == "always":
        return None
    if device.type != "cuda":
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton needs a C compiler, but none was found"
    return None


def compile_model(config: Config, model: HFModule, device: torch.device, zero_stage: int) -> bool:
    """Compile decoder and vision-tower layers according to ``train.compile``; return whether they were compiled.

    Raises:
        ConfigError: ``train.compile=always``, but other settings prevent compilation.
    """
    if config.train.compile == "never":
        return False
    if reason := compile_refusal(config, device, zero_stage):
        if config.train.compile == "always":
            raise ConfigError(f"train.compile=always: {reason}; set train.compile=auto, or change the other setting")
        log.info("layers run without torch.compile: %s", reason)
        return False
    compile_layers(model)
    log.info("decoder and tower layers are compiled; the first step takes longer")
    return True
