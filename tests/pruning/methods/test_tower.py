"""Methods that change the vision tower's tokens: against towers written with loops, counts, costs, refusals."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from tests.support.families import family_inputs, family_model, images_repeated
from tests.support.family_runs import Setup
from tests.support.helpers import tiny_config, tiny_model
from tests.support.phases import make_parts  # noqa: F401
from tests.support.slow_tower import slow_tome, slow_vistog
from vtprune_train import Combined, Downsample, PyramidDrop, ToMe, VisionZip, VisToG, dense, kept_tokens, prune, unprune
from vtprune_train.bench.costs import Sample, Subject, estimate, images_of_sample
from vtprune_train.core.flops import TowerGeometry, TrainingCost
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.forward.calls import state_of
from vtprune_train.models.forward.encoder import reading
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning.methods.downsample import smaller_patches
from vtprune_train.pruning.methods.tome import Merging
from vtprune_train.pruning.phases import Budgets, FullTokens, Phases, Warmup
from vtprune_train.pruning.tower import one_per_group

METHODS = [ToMe(keep=0.5), ToMe(keep=0.6, layers=(-1,), proportional=False), Downsample(keep=0.5), VisToG(keep=0.4)]
EACH = pytest.mark.parametrize("method", METHODS, ids=repr)
TEXTS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["no picture"]]


def geometry(**changes):
    sizes = {"num_layers": 4, "hidden": 8, "intermediate": 16, "patches": 36, "patch_size": 7, "projector_in": 8}
    side = changes.get("grid", (6, 6))
    return TowerGeometry(
        **{**sizes, "projector_out": 8, "grid": side, "depth": 3, **changes, "patches": side[0] * side[1]}
    )


def features(model, pixels):
    """[P, n, M] features in front of the projector, and [P, N] the token that holds each patch."""
    base, state = model.model, state_of(model)
    with torch.no_grad(), reading(base, state, state.method) as change:
        states = base.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[change.tower.depth][:, change.tower.class_tokens :], change.groups


def test_merges_of_the_layers():
    assert Merging("tome", 0.5, None, True).remaining(geometry()) == (30, 24, 18)
    assert Merging("tome", 0.5, (0, 2), True).remaining(geometry()) == (27, 27, 18)
    assert Merging("tome", 0.4, (0, 2), True).remaining(geometry()) == (25, 25, 14)
    assert Merging("tome", 0.9, (-1,), True).remaining(geometry()) == (36, 36, 32)
    assert Merging("tome", 1.0, None, True).remaining(geometry()) == (36, 36, 36)


@pytest.mark.parametrize(
    ("layers", "keep", "words"),
    [
        ((0,), 0.4, "would merge 22 of 36 tokens in layer 0 .* at most half"),
        ((3,), 0.5, "tokens cannot be merged in layer 3 .* use 0 to 2"),
        ((-4,), 0.5, "tokens cannot be merged in layer -4"),
        ((1, 1), 0.5, "in ascending order"),
        ((), 0.5, "at least one layer"),
    ],
)
def test_merges_that_are_refused(layers, keep, words):
    with pytest.raises(ValueError, match=words):
        Merging("tome", keep, layers, True).remaining(geometry())


def test_the_smaller_grid():
    small = Downsample(keep=0.25).needs.tower
    assert small.image_grid(geometry()) == (3, 3)
    assert Downsample(keep=0.5).needs.tower.image_grid(geometry(grid=(24, 24))) == (16, 18)
    assert Downsample(keep=0.25).needs.tower.image_grid(geometry(grid=(27, 27))) == (13, 14)
    assert Downsample(keep=0.001).needs.tower.image_grid(geometry()) == (1, 1)
    assert smaller_patches((4, 2), (2, 2)).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_one_token_of_each_group_comes_first():
    group = torch.tensor([4, 4, -1, 7, 4, 7, 9, 4, -1])
    span = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1])  # the second image has a group of the same number
    scores = one_per_group(group, span)
    assert scores.floor().tolist() == [4, 0, 1, 3, 0, 0, 2, 2, 1]
    assert torch.equal(scores[7:], one_per_group(group[7:], span[7:])), "whatever precedes it in the batch"
    equal = one_per_group(torch.arange(1000), torch.zeros(1000, dtype=torch.int64))
    gaps = equal.argsort(descending=True)[:100].sort().values.diff()
    assert equal.unique().numel() == 1000 and gaps.min() >= 5 and gaps.max() <= 15, "equal groups are spread out"
    assert one_per_group(group[:0], span[:0]).tolist() == []


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
@pytest.mark.parametrize("proportional", [True, False])
def test_tome_against_loops(family, proportional):
    method = ToMe(keep=0.4, proportional=proportional)
    model = family_model(family).double().eval()
    tower, shape = model.model.vision_tower, tile_tower(model.config)
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    expected = [
        slow_tome(tower, one, method.needs.tower.remaining(shape), proportional, shape.class_tokens) for one in pixels
    ]
    merged, groups = features(prune(model, method), pixels)
    for tile, (slow, held) in enumerate(expected):
        assert torch.allclose(merged[tile], slow, atol=1e-6)
        assert [set(torch.nonzero(groups[tile] == token).flatten().tolist()) for token in range(len(slow))] == held


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_vistog_against_loops(family):
    model = prune(family_model(family).double().eval(), VisToG(keep=0.4))
    shape, module = tile_tower(model.config), model.model.language_model.pruning
    with torch.no_grad():
        module.tokens.weight.normal_()
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    merged, groups = features(model, pixels)
    assert merged.shape[1] == 6
    with dense(model):
        for tile, one in enumerate(pixels):
            slow, held = slow_vistog(model.model.vision_tower, one, module, shape.depth, shape.class_tokens)
            assert torch.allclose(merged[tile], slow, atol=1e-6)
            assert [set(torch.nonzero(groups[tile] == token).flatten().tolist()) for token in range(6)] == held


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_downsampled_tiles_are_those_of_transformers(family):
    model = family_model(family).eval()
    pixels = torch.randn(2, 3, 28, 28)
    small = interpolate(pixels, (14, 28), mode="bicubic", antialias=True)
    with torch.no_grad():
        states = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    shape = tile_tower(model.config)
    merged, groups = features(prune(model, Downsample(keep=0.5)), pixels)
    assert torch.allclose(merged, states[shape.depth][:, shape.class_tokens :], atol=1e-5)
    assert groups.tolist() == [smaller_patches((4, 4), (2, 4)).tolist()] * 2


@EACH
def test_whole_tiles_keep_one_token_of_each_group(method):
    """LLaVA-1.5, whose images have no newlines and no padding; VisToG's groups may be empty."""
    model = prune(family_model("llava").eval(), method)
    inputs = family_inputs("llava", TEXTS)
    _, groups = features(model, inputs["pixel_values"])
    count = len(groups[0]) * method.drops(6)[0].keep // 1
    for tile, kept in enumerate(kept[0] for row in kept_tokens(model, inputs) for kept in row):
        held = groups[tile][torch.as_tensor(kept)].tolist()
        assert len(kept) == count and set(held) == set(groups[tile].tolist())


@EACH
def test_dense_and_unpruned_towers_are_unchanged(method):
    model, inputs = family_model("llava_next").eval(), family_inputs("llava_next", TEXTS)
    with torch.no_grad():
        before = model(**inputs).logits
        pruned = prune(model, method)(**inputs).logits
        with dense(model):
            assert torch.equal(model(**inputs).logits, before)
        assert not torch.allclose(pruned, before)
        layer = model.model.vision_tower.encoder.layers[0]
        assert torch.equal(unprune(model)(**inputs).logits, before) and "forward" not in vars(layer)


@EACH
def test_gradients_with_recomputed_layers(method):
    """Activation checkpointing in the tower changes nothing."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = prune(family_model("llava_next").double(), method).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = family_inputs("llava_next", TEXTS)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name]) for name in grads[0])
    towers = [grad for name, grad in grads[0].items() if "vision_tower.encoder.layers.0." in name]
    assert towers and all(grad.any() for grad in towers if grad.shape[0] > 1)


@EACH
@pytest.mark.parametrize("trained", [{"vision_tower": 1.0, "projector": 1.0, "pruning": 1.0}, {"projector": 1.0}])
def test_packed_steps_are_padded_ones(parts, method, trained):
    torch.manual_seed(0)
    model = prune(tiny_model().double(), method).train()
    set_trainable(model, trained)
    batch = parts.collator(Phases(method)).pack(parts.loaded, step=0)
    loss = model(batch).loss_sum
    singly = [model(parts.collator(Phases(method)).pack([one], step=0)).loss_sum for one in parts.loaded]
    assert torch.allclose(loss, torch.stack(singly).sum(), rtol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_packed_steps_of_families_follow_the_step_s_method(tmp_path, name):
    """Dropping as padded rows do, all tokens as a dense run does, and a smaller budget with its own tower. OneVision
    computes features with the family's code, which reads the tower of a padded call itself."""
    setup = Setup(name, tmp_path)
    parts, method = setup.parts(), ToMe(keep=0.5)
    model = prune(parts.model.double(), method).train()
    samples = [0, 1, 2]

    def rows(phases):
        collate = setup.collator(parts, method)
        collate.phases = phases
        output = model(collate(samples, step=0))
        return output.row_loss.detach(), output

    def alone(one):
        """Of the model with this method alone."""
        prune(unprune(model), one)
        result, _ = rows(Phases(one))
        prune(unprune(model), method)
        return result

    whole, dropped = alone(None), rows(Phases(method))[0]
    assert not torch.allclose(whole, dropped, rtol=1e-3)
    full, output = rows(Phases(method, full=FullTokens(1.0, 1.0)))
    assert torch.allclose(full, whole) and output.consistency > 0
    varied = Phases(method, varied=Budgets(0.6, 0.7, 6, weight=1.0))
    phase = varied.of(0)
    smaller, output = rows(varied)
    assert torch.allclose(smaller, alone(phase.method)) and output.consistency >= 0


@EACH
def test_full_token_steps_have_the_dense_tower(parts, method):
    """And their teacher has the changed one."""
    torch.manual_seed(0)
    model = prune(tiny_model().double(), method).train()
    full = parts.collator(Phases(method, full=FullTokens(share=1.0, weight=1.0))).pack(parts.loaded, step=0)
    warm = parts.collator(Phases(method, warmup=Warmup(10, "dense"))).pack(parts.loaded, step=0)
    pruned = parts.collator(Phases(method)).pack(parts.loaded, step=0)
    with_teacher, without = model(full), model(warm)
    assert torch.equal(with_teacher.row_loss, without.row_loss) and with_teacher.consistency > 0
    with torch.no_grad():
        plain = prune(unprune(model), None)(parts.collator(Phases(None)).pack(parts.loaded, step=0))
    assert torch.allclose(plain.row_loss, without.row_loss)
    assert pruned.costs["flops"] < warm.costs["flops"]
    assert full.costs["flops"] > warm.costs["flops"], "the teacher runs too"


@EACH
def test_the_tower_s_flops_are_those_that_run(method):
    model = prune(tiny_model().eval(), method)
    model.model.vision_tower.config._attn_implementation = "eager"  # its products are counted
    shape = tile_tower(model.config).changed(method)
    pixels = torch.randn(2, 3, 28, 28)
    with FlopCounterMode(display=False) as counter:
        features(model, pixels)
    # averaging keys is not counted as a product; vectors of sizes are
    assert counter.get_total_flops() == pytest.approx(float(shape.tower(2)), rel=0.02)


@EACH
def test_estimates_and_steps_count_the_changed_tower(method):
    config = tiny_config()
    pictures = images_of_sample(config, [(56, 56)])
    result = estimate(Subject("tiny", config, method, "the test"), Sample(pictures, 20))
    shape = tile_tower(config)
    assert result.vision_dense == pytest.approx(shape.tower(5) + shape.projector(5))
    changed = shape.changed(method)
    assert result.vision == pytest.approx(changed.tower(5) + changed.projector(5))
    assert (result.vision < result.vision_dense) == (method.name != "vistog")
    assert result.prefill_whole.dense - result.prefill_decoder.dense == pytest.approx(result.vision_dense)
    assert result.prefill_whole.pruned - result.prefill_decoder.pruned == pytest.approx(result.vision)


def test_a_frozen_tower_costs_a_backward_pass_where_it_holds_learned_tokens():
    config = tiny_config()
    from vtprune_train.core.flops import DecoderGeometry

    cost = TrainingCost(DecoderGeometry.of(config.text_config), tile_tower(config), True, False)
    tiles, shape = np.array([1]), tile_tower(config)
    for method, passes in ((ToMe(), 1), (VisToG(), 2)):
        changed = shape.changed(method)
        projector = (3 if passes == 2 else 2) * changed.projector(1)
        assert cost.vision(tiles, None, method)[0] == pytest.approx(passes * changed.tower(1) + projector)


@pytest.mark.parametrize("method", [ToMe(), Downsample(), VisToG()], ids=repr)
def test_what_cannot_be(method):
    name = method.name
    for family, words in (("qwen2_5_vl", "Qwen2.5-VL; lower max_pixels"), ("internvl", "InternVL; use a method")):
        with pytest.raises(ValueError, match=f"{name}: changes the tokens of the vision tower.*not for {words}"):
            prune(family_model(family), method)
    with pytest.raises(ValueError, match=f"visionzip and {name} cannot be combined"):
        Combined((VisionZip(), method))
    with pytest.raises(ValueError, match=f"tome and {name} cannot be combined"):
        Combined((ToMe(), method))
    with pytest.raises(ValueError, match=f"no method may drop before it, but uniform drops.*list {name} first"):
        from vtprune_train import Uniform

        Combined((Uniform(), method)).drops(6)
    assert Combined((method, PyramidDrop())).drops(6)


def test_attention_without_bias_is_refused():
    model = family_model("llava")
    model.config.vision_config._attn_implementation = "flash_attention_2"
    for method in (ToMe(), VisToG()):
        with pytest.raises(ValueError, match="adds a bias to the vision tower's attention, which 'flash_attention_2'"):
            prune(model, method)
    prune(model, ToMe(proportional=False))


def test_videos_are_refused():
    model = prune(family_model("llava_onevision"), ToMe())
    with pytest.raises(
        ValueError, match="tome needs to change the vision tower's tokens, which is not available for videos"
    ):
        model.model.get_video_features(torch.zeros(1, 2, 3, 28, 28))


def test_beams_of_copied_images():
    model = prune(family_model("llava_next").double().eval(), Combined((ToMe(), PyramidDrop())))
    inputs = family_inputs("llava_next", TEXTS[:2])
    with torch.no_grad(), images_repeated(model):
        cached, recomputed = (
            model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, recomputed)


def test_vistog_is_saved_and_opened(tmp_path):
    torch.manual_seed(5)
    model = prune(tiny_model().eval(), VisToG(keep=0.5))
    with torch.no_grad():
        model.model.language_model.pruning.tokens.weight.normal_()
    model.save_pretrained(tmp_path)
    again = prune(type(model).from_pretrained(tmp_path).eval())
    inputs = family_inputs("llava_next", TEXTS)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
