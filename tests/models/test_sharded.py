"""``models/sharding.py``: a sharded model is the unsharded one, or is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.families import family_inputs, family_model
from tests.support.runner import ROOT, WARM, Runs
from vtprune_train import PyramidDrop, prune
from vtprune_train.models.forward import sharding
from vtprune_train.pruning import METHODS

pytestmark = pytest.mark.slow

# The next layer ranks (in hidrop with gradients), this layer, keys of the cache, learned modules.
KINDS = ("pyramiddrop", "hidrop", "this_layer", "plphp", "victor", "downsample", "vistog")


def sharded(folder, kind, *names):
    """Run ``sharded.py`` on two ranks; what it says of each method."""
    runs = Runs(folder)
    log = folder / "sharded.log"
    env = {**runs.environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "SHARDED_FOLDER": str(folder / "model")}
    with log.open("w+b") as said:
        process = WARM.start(
            [str(ROOT / "tests" / "support" / "sharded.py"), kind, *names],
            ranks=2, cwd=ROOT, env=env, out=said.fileno(), err=said.fileno(),
        )  # fmt: skip
        assert process.wait(timeout=500) == 0, log.read_text()[-4000:]
    lines = [line.split(": ", 1) for line in log.read_text().splitlines() if line.startswith(f"{kind} ")]
    assert [place.split()[1] for place, _ in lines] == list(names)
    return [said for _, said in lines]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_every_method_under_fsdp(tmp_path, kind):
    """Loss, gradients and generated tokens, with and without recomputed layers."""
    names = [*METHODS, "this_layer", "combined"]
    assert sharded(tmp_path, kind, *names) == ["equal"] * len(names)


@pytest.mark.parametrize("kind", ["fsdp2_of_blocks", "zero3"])
def test_each_kind_of_method_under_other_shardings(tmp_path, kind):
    """FSDP units smaller and larger than a layer; ZeRO-3 as a user of the library sets it up."""
    assert sharded(tmp_path, kind, *KINDS) == ["equal"] * len(KINDS)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_other_families_under_fsdp(tmp_path, kind):
    """Query and key norms, towers that take images of any size, deepstack, tied heads, recurrent states."""
    names = [f"{family}/pyramiddrop" for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl")]
    assert sharded(tmp_path, kind, *names) == ["equal"] * len(names)


def test_a_model_that_is_sharded_before_it_is_pruned(tmp_path):
    names = ("pyramiddrop", "hidrop", "plphp")
    assert sharded(tmp_path, "fsdp2_first", *names) == ["equal"] * len(names)
    for said in sharded(tmp_path / "learned", "learned_after_fsdp", "victor", "videollm_mod"):
        assert "already sharded (FSDP)" in said and "prune first" in said


def test_layers_that_are_zero_3_leaf_modules(tmp_path):
    names = ("pyramiddrop", "plphp", "victor")
    assert sharded(tmp_path, "zero3_leaf", *names) == ["equal"] * len(names)
    assert "differentiable=False" in sharded(tmp_path / "hidrop", "gradients_through_a_leaf", "hidrop")[0]


@pytest.mark.parametrize("kind", ["tensor_parallel", "automatic_tensor_parallel"])
def test_heads_split_over_ranks(tmp_path, kind):
    """Each rank would choose by its own heads: refused where the decoder's attention is read, equal elsewhere."""
    readers = ("pyramiddrop", "sparsevlm", "plphp")
    for name, said in zip(readers, sharded(tmp_path, kind, *readers), strict=True):
        assert said.startswith(name) and "2 of 4 attention heads" in said and "FSDP" in said
    others = ("prumerge", "divprune", "cdpruner", "uniform", "random", "pool")
    assert sharded(tmp_path / "others", kind, *others) == ["equal"] * len(others)


def test_parameters_are_not_added_to_heads_split_over_ranks(tmp_path):
    assert "already sharded (tensor parallelism)" in sharded(tmp_path, "tensor_parallel", "victor")[0]


def test_pipeline_parallelism_is_refused():
    model = family_model("llava_next")
    model.model.language_model.layers[3] = nn.Identity()
    with pytest.raises(ValueError, match=r"decoder layer 3 is a Identity.*pipeline parallelism"):
        prune(model, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))


def test_layers_on_several_devices_are_refused():
    parameters = [SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1)]
    layers = nn.ModuleList()
    layers.parameters = lambda: iter(parameters)
    with pytest.raises(ValueError, match=r"cuda:0 and cuda:1.*device_map="):
        sharding.check_layers(SimpleNamespace(layers=layers), "sdpa", None)


def test_sequence_parallelism_is_refused():
    """Ulysses replaces transformers' attention function, which a pruned model would not call."""

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def ulysses(*args, **kwargs):
        return original(*args, **kwargs)

    ulysses.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    model = prune(family_model("llava_next"), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    inputs = family_inputs("llava_next", [["user :", 0, "what ? assistant"]])
    ALL_ATTENTION_FUNCTIONS["sdpa"] = ulysses
    try:
        with pytest.raises(ValueError, match=r"'sdpa'.*Ulysses.*sequence_parallel_size=1"):
            model(**inputs)
        with pytest.raises(ValueError, match="Ulysses"):
            prune(family_model("llava_next"), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


def test_layers_that_return_part_of_the_tokens_are_refused():
    model = prune(family_model("llava_next"), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    layer = model.model.language_model.layers[1]
    layer.register_forward_hook(lambda module, args, output: output[:, :7])
    with pytest.raises(ValueError, match=r"decoder layer 1 returned 7 tokens.*sequence"):
        model(**family_inputs("llava_next", [["user :", 0, "what ? assistant"]]))
