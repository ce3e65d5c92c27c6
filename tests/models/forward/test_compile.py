"""Compiled layers: the numbers of eager ones, and nothing compiled again for other batches."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.families import family_inputs, family_model
from tests.support.helpers import tiny_model
from tests.support.packed import random_batch, random_segment
from tests.support.runner import TINY, Runs
from vtprune_train import PyramidDrop, prune
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.core.plan import plan_pass
from vtprune_train.models.forward.compile import _EAGER, compile_layers, is_compiled, uncompile_layers
from vtprune_train.models.forward.kernels import compile_model, compile_refusal
from vtprune_train.pruning import method_from_settings

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
METHODS = {
    "none": None,
    "next_layer": PyramidDrop(layers=(2, 4), keep=(0.5, 0.2)),
    "this_layer": PyramidDrop(layers=(2, 4), keep=(0.5, 0.2), rank_with="this_layer"),
    "sparsevlm": method_from_settings({"method": "sparsevlm"}),
    "plphp": method_from_settings({"method": "plphp"}),
    "victor": method_from_settings({"method": "victor"}),
    "vtc_cls": method_from_settings({"method": "vtc_cls", "layers": 2}),
    "tome": method_from_settings({"method": "tome"}),
    "vistog": method_from_settings({"method": "vistog"}),
}


def batches(model, method):
    """Of one to four samples, without an image and with several."""
    num_layers = len(model.model.language_model.layers)
    for seed, shapes in enumerate(
        [[(1, 1), (2, 2), (0, 1)], [(1, 2)], [(2, 1), (1, 1), (1, 3), (3, 1)], [(0, 1), (1, 1)]]
    ):
        rng = np.random.default_rng(seed)
        segments = [random_segment(rng, images, turns) for images, turns in shapes]
        yield dataclasses.replace(random_batch(model, segments, seed), plan=plan_pass(segments, num_layers, method))


def step(model, batch):
    model.zero_grad(set_to_none=True)
    output = model(batch)
    output.loss_sum.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    return output, norms


@pytest.mark.parametrize(
    ("name", "checkpointed"), [(name, 0) for name in METHODS] + [("next_layer", 2), ("this_layer", 6), ("plphp", 6)]
)
def test_compiled_once_and_equal(name, checkpointed):
    torch._dynamo.reset()
    method = METHODS[name]
    model = prune(tiny_model(), method).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.language_model.layers[checkpointed:]:
            layer.gradient_checkpointing = False
    eager = [step(model, batch) for batch in batches(model, method)]
    backend = CompileCounterWithBackend("eager")
    compile_layers(model, backend=backend)
    graphs = []
    for batch, (expected, norms) in zip(batches(model, method), eager, strict=True):
        output, compiled_norms = step(model, batch)
        graphs.append(backend.frame_count)
        torch.testing.assert_close(output.loss_sum, expected.loss_sum)
        assert all(torch.equal(a, b) for a, b in zip(output.kept, expected.kept, strict=True))
        torch.testing.assert_close(compiled_norms, norms, rtol=1e-3, atol=1e-4)
    if name == "next_layer" and not checkpointed:
        single_tile(model, method, backend, graphs[0])
    decoder = 2  # before and after the attention, at the least
    assert graphs[0] >= decoder + (name != "vtc_cls"), "nothing was compiled"
    assert graphs[1:] == [graphs[0]] * 3, "compiled again for another batch"


def single_tile(model, method, backend, graphs):
    """A size of 1 is a case of its own: the tower compiles once more, and no further."""
    found = []
    for batch in list(batches(model, method))[1:3]:
        one = dataclasses.replace(
            batch, pixel_values=batch.pixel_values[:1], visual_index=batch.visual_index.clamp(max=16)
        )
        step(model, one)
        found.append(backend.frame_count)
    assert graphs < found[0] <= graphs + 3 and found[1] == found[0]


@pytest.mark.parametrize("name", ["visionzip", "fopru", "vtc_cls"])
def test_a_tower_that_is_read_twice_over_runs_eagerly(name):
    """LLaVA-OneVision's features are made inside a call that reads the tower, by one that does too."""
    torch._dynamo.reset()
    method = method_from_settings({"method": name, **({"layers": 2} if name == "vtc_cls" else {})})
    model = prune(family_model("llava_onevision"), method).train()
    inputs = family_inputs("llava_onevision", [["what", "is", 0, "shown"], ["a", 1]])
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        compile_layers(model, backend=CompileCounterWithBackend("eager"))
        for _ in range(2):
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)
    assert not _EAGER.layers


def test_layers_of_a_peft_model():
    model = prune(tiny_model(), None)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["vision_tower"]))
    compile_layers(adapted, backend="eager")
    tower = adapted.get_base_model().model.vision_tower
    assert all(is_compiled(layer) for layer in adapted.get_base_model().model.language_model.layers)
    assert all(is_compiled(layer) for layer in tower.modules_to_save["default"].encoder.layers)
    copied = copy.deepcopy(adapted)
    assert is_compiled(copied.get_base_model().model.language_model.layers[0])
    uncompile_layers(adapted)
    assert not any(is_compiled(module) for module in adapted.modules())


def test_generation_compiles_nothing():
    torch._dynamo.reset()
    model = prune(family_model("llava_next"), PyramidDrop(layers=(2, 4), keep=(0.5, 0.2)))
    inputs = family_inputs("llava_next", [["what", "is", 0, "shown"], ["a", 1]])
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    backend = CompileCounterWithBackend("eager")
    compile_layers(model, tower=False, backend=backend)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    assert backend.frame_count == 0


@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl"]
)
def test_every_family_has_layers_to_compile(family):
    torch._dynamo.reset()
    model = prune(family_model(family), PyramidDrop(layers=(2, 4), keep=(0.5, 0.2)))
    inputs = family_inputs(family, [["what", "is", 0, "shown"], ["a", 1]])
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    classes = [type(module) for module in model.modules()]
    backend = CompileCounterWithBackend("eager")
    compile_layers(model, backend=backend)
    depths = {"Qwen2VL": 2, "Qwen2_5_VL": 2, "Qwen3VL": 2, "Qwen3_5": 2}.get(
        type(model).__name__.partition("For")[0], 3
    )
    decoder = model.config.text_config.num_hidden_layers
    assert sum(is_compiled(module) for module in model.modules()) == decoder + depths
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    assert backend.frame_count >= 3
    with pytest.raises(ValueError, match="already compiled"):
        compile_layers(model)
    assert [type(module) for module in uncompile_layers(model).modules()] == classes


def config_with(**changes):
    values = {**TINY, **{key: {**TINY.get(key, {}), **value} for key, value in changes.items()}}
    return Config(**values)


@pytest.mark.parametrize(
    ("changes", "stage", "reason"),
    [
        ({}, 3, "ZeRO-3 gathers parameters inside the layers"),
        ({"model": {"liger": True}}, 2, "model.liger=true replaces"),
        ({"model": {"peft": {"kind": "qlora"}, "train": {"lora": 1e-3}}}, 2, "4-bit weights are unpacked"),
    ],
)
def test_what_is_not_compiled(changes, stage, reason):
    always = config_with(**changes, train={"compile": "always"})
    with pytest.raises(ConfigError, match=f"train.compile=always: {reason}"):
        compile_model(always, tiny_model(), CPU, stage)
    for word in ("auto", "never"):
        model = tiny_model()
        assert not compile_model(config_with(**changes, train={"compile": word}), model, CPU, stage)
        assert not any(is_compiled(module) for module in model.modules())


@pytest.mark.parametrize(
    ("triton", "compilers", "reason"),
    [(True, {"gcc"}, None), (False, {"gcc"}, "Triton is not installed"), (True, set(), "Triton needs a C compiler")],
)
def test_auto_on_a_gpu_needs_what_writes_the_kernels(monkeypatch, triton, compilers, reason):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr("shutil.which", lambda name: name if name in compilers else None)
    found = compile_refusal(config_with(), torch.device("cuda"), 2)
    assert found is None if reason is None else found.startswith(reason)


def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path):
    runs = Runs(tmp_path)
    losses, compiled = {}, {}
    for word in ("never", "always"):
        kernels = tmp_path / f"kernels_{word}"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(kernels)}
        runs.run(word, "run.stop_after=2", "data.eval=[]", f"train.compile={word}", env=environment)
        losses[word] = [row["loss"] for row in runs.metrics(word)]
        compiled[word] = len(list(kernels.rglob("*.so")))
    assert losses["always"] == pytest.approx(losses["never"], rel=1e-4)
    assert compiled["always"] > 2 and not compiled["never"]
    assert yaml.safe_load((tmp_path / "runs" / "always" / "config.yaml").read_text())["train"]["compile"] == "always"
