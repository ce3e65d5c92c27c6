"""Activation checkpointing: which layers are recomputed, and that it changes nothing but memory."""

import numpy as np
import pytest
import torch

from tests.support.packed import loss_and_grads, pruned, random_batch, random_segment
from tests.support.runner import Runs
from vtprune_train import PyramidDrop
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import dump_config, load_config
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.forward.recompute import checkpoint_activations, recomputed_layers, typical_stages
from vtprune_train.pruning import method_from_settings

PYRAMID = (2000, 1000, 500), (2, 2, 2)


@pytest.mark.parametrize(
    ("level", "stages", "expected"),
    [
        ("none", PYRAMID, []),
        ("all", PYRAMID, [0, 1, 2, 3, 4, 5]),
        ("first_stage", PYRAMID, [0, 1]),
        (1, PYRAMID, [0]),
        (3, PYRAMID, [0, 1, 2]),
        (6, PYRAMID, [0, 1, 2, 3, 4, 5]),
        ("first_stage", ((900,), (4,)), [0, 1, 2, 3]),
        (3, ((900,), (4,)), [0, 1, 2]),
        ("first_stage", ((2000, 700), (0, 4)), [0, 1, 2, 3]),  # one share before the decoder
        (2, ((2000, 700), (0, 4)), [0, 1]),
        ("first_stage", ((2000, 100, 2000, 50), (0, 2, 2, 1)), [2, 3]),  # late in
        (3, ((2000, 100, 2000, 50), (0, 2, 2, 1)), [0, 2, 3]),
        ("first_stage", ((2000, 100, 2000), (2, 1, 2)), [0, 1, 3, 4]),  # all come back
        (3, ((2000, 100, 2000), (2, 1, 2)), [0, 1, 3]),
    ],
)
def test_layers_that_see_most_tokens_come_first(level, stages, expected):
    assert recomputed_layers(level, *stages) == expected


def test_more_layers_than_there_are():
    with pytest.raises(ConfigError, match="=7: the decoder has 6 layers; use all"):
        recomputed_layers(7, *PYRAMID)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pyramiddrop", range(8)),
        ("hidrop", [8, 9]),
        ("lvlm_csp", range(12, 20)),
        ("videollm_mod", [*range(0, 31, 2), 31]),  # every layer but those that most tokens skip
        ("visionzip", range(32)),
        ("fastv", range(2)),
        ("none", range(32)),
    ],
)
def test_the_stage_with_most_tokens_of_published_schedules(name, expected):
    layout = AnyRes(pinpoints=((336, 672), (672, 672)), tile_size=336, patch_size=14)
    method = method_from_settings({"method": name})
    stages = typical_stages(layout, method.drops(32) if method else (), 32)
    assert recomputed_layers("first_stage", *stages) == list(expected)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [("true", "all"), ("false", "none"), ("all", "all"), ("none", "none"), ("first_stage", "first_stage"), ("3", 3)],
)
def test_settings_of_old_yaml_files_and_new(given, resolved):
    config = load_config("quickstart.yaml", [f"train.activation_checkpointing={given}"])
    assert config.train.activation_checkpointing == resolved
    assert f"activation_checkpointing: {resolved}\n" in dump_config(config)


@pytest.mark.parametrize("given", ["some", "0", "-1", "2.5", "[1]", "null"])
def test_unknown_levels_are_refused(given):
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing: .* is not all, first_stage, none"):
        load_config("quickstart.yaml", [f"train.activation_checkpointing={given}"])


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
@pytest.mark.parametrize("level", ["all", "first_stage", 4, "none"])
def test_exactly_those_layers_run_twice_and_nothing_changes(level, rank_with):
    segments = [random_segment(np.random.default_rng(i), 2, 2) for i in range(3)]
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), rank_with=rank_with)
    model = pruned(method)
    batch = random_batch(model, segments)
    batch.plan = method.plan(segments, 6)
    plain = loss_and_grads(model, batch)
    layers = recomputed_layers(level, *PYRAMID)
    if level != "none":
        checkpoint_activations(model, layers)
    calls = [0] * 6
    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    tower = []
    model.model.vision_tower.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: tower.append(1))
    recomputed = loss_and_grads(model, batch)
    assert calls == [2 if index in layers else 1 for index in range(6)]
    assert len(tower) == (1 if level == "none" else 2)
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1].keys() == recomputed[1].keys()
    assert all(torch.equal(grad, recomputed[1][name]) for name, grad in plain[1].items())


def test_a_part_of_the_layers_under_zero_3(tmp_path):
    """Partitioned weights are gathered again for the layers that run again, and for those alone."""
    runs = Runs(tmp_path, num_train=8)
    settings = ("deepspeed=configs/deepspeed/zero3.json", "data.eval=[]", "train.max_steps=2")
    for level in ("none", "2"):
        runs.run(f"level_{level}", *settings, f"train.activation_checkpointing={level}")
        metrics = runs.metrics(f"level_{level}")
        assert [m["loss"] for m in metrics] == [m["loss"] for m in runs.metrics("level_none")]
        assert [m["grad_norm"] for m in metrics] == [m["grad_norm"] for m in runs.metrics("level_none")]
