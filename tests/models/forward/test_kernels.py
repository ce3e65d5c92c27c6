"""The kernels that a run asks for: Liger's, FP8, deterministic."""

import dataclasses
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.support.families import family_model
from tests.support.helpers import tiny_model
from tests.support.packed import random_batch, random_segment
from tests.support.runner import ROOT, TINY, Runs, assert_equal_checkpoints
from vtprune_train import PyramidDrop, prune
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.core.plan import plan_pass
from vtprune_train.models.forward import kernels
from vtprune_train.training.engine.settings import engine_config

CPU = torch.device("cpu")


# Where `make ecosystem` puts torchao: among the other packages, every process that imports PEFT would import it, and it
# logs that it finds no GPU.
TORCHAO = Path(sys.prefix) / "torchao"


@pytest.fixture
def torchao(monkeypatch):
    monkeypatch.syspath_prepend(str(TORCHAO))
    pytest.importorskip("torchao", reason="needs torchao: make ecosystem")


def half_batch(model, method, images):
    """A bfloat16 batch of samples with so many images."""
    segments = [random_segment(np.random.default_rng(seed), number, 2) for seed, number in enumerate(images)]
    batch = random_batch(model, segments)
    return dataclasses.replace(batch, plan=plan_pass(segments, 6, method), pixel_values=batch.pixel_values.bfloat16())


@pytest.mark.usefixtures("torchao")
def test_fp8_changes_products_and_nothing_else():
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.2))
    models = [tiny_model().bfloat16().train() for _ in range(2)]
    for model in models:
        model.model.language_model.rotary_emb.float()
    kernels.use_fp8(models[1].model.language_model, CPU)
    assert [name for name, _ in models[0].named_parameters()] == [name for name, _ in models[1].named_parameters()]
    swapped = [name for name, m in models[1].named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(swapped) == 6 * 7 and all(name.startswith("model.language_model.layers.") for name in swapped)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    losses, norms = [], []
    for model in models:
        prune(model, method)
        losses.append(float(model(half_batch(model, method, [0])).loss_sum.detach()))  # no image, so no rows that rank
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    losses.clear()
    for model in models:
        loss = model(half_batch(model, method, [1, 1, 1])).loss_sum
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(model.model.language_model.layers[0].mlp.up_proj.weight.grad.float().norm()))
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.1)
    assert norms[1] != norms[0] and norms[1] == pytest.approx(norms[0], rel=0.3)


@pytest.mark.usefixtures("torchao")
def test_fp8_leaves_sizes_that_its_products_cannot_take():
    model = tiny_model(head_dim=6)  # queries of 24 and keys of 12
    kernels.use_fp8(model.model.language_model, CPU)
    attention = model.model.language_model.layers[0].self_attn
    assert type(attention.q_proj) is torch.nn.Linear
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Float8Linear"


def test_fp8_needs_a_gpu_that_has_it(monkeypatch, torchao):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"capability 8.9 or higher, but A100 has 8.0; set model.fp8=false"):
        kernels.use_fp8(tiny_model().model.language_model, torch.device("cuda"))


def test_missing_packages_are_named(monkeypatch):
    for name in ("torchao.float8", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    text_model = tiny_model().model.language_model
    with pytest.raises(ConfigError, match=r"model.fp8=true needs torchao.*requirements-gpu.txt"):
        kernels.use_fp8(text_model, CPU)
    with pytest.raises(ConfigError, match=r"model.liger=true needs liger-kernel.*requirements-gpu.txt"):
        kernels.use_liger(text_model)


def test_liger_is_refused_where_it_would_do_nothing(monkeypatch):
    """Its own function logs and returns."""
    applied = []
    transformers = types.ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = lambda model, **keywords: applied.append((model, keywords))
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (types.ModuleType("liger_kernel"), transformers, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    llama = tiny_model().model.language_model
    kernels.use_liger(llama)
    assert applied == [(llama, {"fused_linear_cross_entropy": False})]
    with pytest.raises(ConfigError, match="no kernels for model type 'qwen2_5_vl_text'"):
        kernels.use_liger(family_model("qwen2_5_vl").model.language_model)


@pytest.fixture
def deterministic_afterwards():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_deterministic_kernels_are_asked_for_by_a_setting(monkeypatch, deterministic_afterwards):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    kernels.be_deterministic(Config(**TINY))
    assert not torch.are_deterministic_algorithms_enabled()
    kernels.be_deterministic(Config(**{**TINY, "train": {**TINY["train"], "deterministic": True}}))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
def test_a_run_with_deterministic_fp8(tmp_path):
    """Stopped and resumed, it ends with the same bits."""
    runs = Runs(tmp_path)
    settings = ("data.eval=[]", "model.fp8=true", "model.dtype=bfloat16", "train.deterministic=true")
    process = {"launcher": "python", "env": {"PYTHONPATH": f"{ROOT}:{TORCHAO}"}}
    runs.run("whole", *settings, "run.stop_after=3", **process)
    losses = [row["loss"] for row in runs.metrics("whole")]
    assert losses[-1] < losses[0]
    runs.run("halves", *settings, "run.stop_after=2", **process)
    runs.run("halves", *settings, "run.stop_after=3", **process)
    assert [row["loss"] for row in runs.metrics("halves")] == losses
    assert_equal_checkpoints(runs.checkpoint("whole"), runs.checkpoint("halves"))


def engine(json, **changes):
    values = {**TINY, **{key: {**TINY.get(key, {}), **value} for key, value in changes.items()}, "deepspeed": json}
    return engine_config(Config(**values))


FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("zero", "clip", "dtype", "computed"),
    [
        ({"stage": 2}, 0.0, "bfloat16", False),
        ({"stage": 1}, 0.0, "float32", False),
        ({"stage": 2, "compute_grad_norm": True}, 0.0, "bfloat16", True),  # as the JSON says
        ({"stage": 2}, 1.0, "bfloat16", True),
        ({"stage": 2}, 0.0, "float16", True),
        ({"stage": 3}, 0.0, "bfloat16", True),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 0.0, "bfloat16", True),
    ],
)
def test_deepspeed_computes_a_norm_only_where_it_uses_it(zero, clip, dtype, computed):
    made = engine({"zero_optimization": zero}, train={"clip": clip}, model={"dtype": dtype})
    assert made["zero_optimization"].get("compute_grad_norm", True) is computed
    assert DeepSpeedZeroConfig(**made["zero_optimization"]).compute_grad_norm is computed
    with_fp32 = engine({"zero_optimization": zero, **FP32}, train={"clip": clip}, model={"dtype": dtype})
    assert with_fp32["zero_optimization"].get("compute_grad_norm", True) is (computed or zero["stage"] == 1)


def test_fp8_is_refused_under_zero_3():
    with pytest.raises(ConfigError, match=r"model.fp8=true saves whole weights.*use zero2.json"):
        engine({"zero_optimization": {"stage": 3}}, model={"fp8": True})
