"""What each step drops: warm-up, full-token steps, and the model's own pruned output as a teacher."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.helpers import tiny_model
from tests.support.phases import LAYERS, METHOD, SIZES, make_parts  # noqa: F401
from tests.support.runner import Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train import PyramidDrop, prune
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config, without_effect
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.core.flops import selector_flops
from vtprune_train.data.index import Lengths
from vtprune_train.data.plan.planner import StepCosts
from vtprune_train.models.forward.head import Teaching, chunked_loss
from vtprune_train.models.forward.recompute import checkpoint_activations
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.methods.fastv import FastV
from vtprune_train.pruning.methods.random_tokens import Random
from vtprune_train.pruning.phases import Budgets, Curriculum, FullTokens, Phase, Phases, Warmup
from vtprune_train.training.dry_run import describe
from vtprune_train.training.loop.settings import merge_pruning

# ------------------------------------------------------------------------------------------------ which phase


def test_keep_ratios_go_from_the_start_to_the_method():
    phases = Phases(METHOD, warmup=Warmup(4, "linear"))
    assert phases.keep(0, LAYERS) == [1, 1, 1]
    assert phases.keep(1, LAYERS) == pytest.approx([0.875, 0.825, 0.775])
    assert phases.keep(2, LAYERS) == pytest.approx([0.75, 0.65, 0.55])
    assert phases.of(4) == phases.of(1000) == Phase(METHOD)
    cosine = Phases(METHOD, warmup=Warmup(4, "cosine", start=0.8))
    assert cosine.keep(0, LAYERS) == pytest.approx([0.8, 0.8, 0.8])
    assert cosine.keep(1, LAYERS)[0] == pytest.approx(0.8 - 0.3 * (1 - np.cos(np.pi / 4)) / 2)
    assert cosine.keep(2, LAYERS) == pytest.approx([0.65, 0.55, 0.45])
    for step in range(4):
        keep = phases.keep(step, LAYERS)
        assert keep == sorted(keep, reverse=True)


def test_dense_at_first_then_the_method():
    phases = Phases(METHOD, warmup=Warmup(3, "dense"), full=FullTokens(share=1.0, weight=1.0))
    assert [phases.of(step) for step in range(3)] == [Phase(None)] * 3, "nothing to be consistent with yet"
    assert phases.of(3).full_tokens and phases.of(3).teacher.method == METHOD
    assert phases.keep(0, LAYERS) == phases.keep(3, LAYERS) == [1, 1, 1]


def test_full_token_steps_are_drawn_by_seed_and_step_alone():
    def drawn(seed, share):
        phases = Phases(METHOD, seed, full=FullTokens(share))
        return [phases.of(step).full_tokens for step in range(600)]

    assert drawn(7, 0.1) == drawn(7, 0.1) != drawn(8, 0.1)
    assert 40 < sum(drawn(7, 0.1)) < 80
    assert all(drawn(7, 1.0)) and not any(drawn(7, 0.0))
    assert all(more or not less for less, more in zip(drawn(7, 0.1), drawn(7, 0.3), strict=True)), "one draw a step"


def test_state_tells_where_the_schedule_stands():
    phases = Phases(METHOD, warmup=Warmup(4), full=FullTokens(0.1, 0.5))
    state = phases.state(2, LAYERS)
    assert json.loads(json.dumps(state)) == state
    assert state["steps_done"] == 2 and state["warmup"] == {"kind": "linear", "start": 1.0, "steps": 4, "done": False}
    assert phases.state(4, LAYERS)["warmup"]["done"] and state["full_token_share"] == 0.1
    assert Phases(METHOD).state(2, LAYERS) == {} == Phases(None, warmup=Warmup(4)).state(2, LAYERS)


# ------------------------------------------------------------------------------------------------ budgets


def test_each_step_draws_its_budget_and_a_larger_one_teaches_it():
    phases = Phases(METHOD, 7, varied=Budgets(0.2, 1.0, 32, weight=0.5, temperature=2.0))
    drawn = []
    for step in range(400):
        phase = phases.of(step)
        share, more = phase.method.input_share(32), phase.teacher.method
        assert share == pytest.approx(phases.varied.drawn(7, step), abs=1e-4)
        assert more is None or more.input_share(32) >= share - 1e-9
        assert (phase.teacher.weight, phase.teacher.temperature, phase.full_tokens) == (0.5, 2.0, False)
        drawn.append(share)
    assert 0.2 <= min(drawn) < 0.22 and 0.95 < max(drawn) <= 1.0
    below = np.mean([share < np.sqrt(0.2) for share in drawn])
    assert 0.42 < below < 0.58, "log-uniform: half of the draws are below the geometric mean"
    again, other = Phases(METHOD, 7, varied=phases.varied), Phases(METHOD, 8, varied=phases.varied)
    assert [again.of(step) for step in (5, 399, 0)] == [phases.of(step) for step in (5, 399, 0)] != other.of(5)
    assert phases.densest(0, 400) == int(np.argmax(drawn))


def test_budgets_go_with_steps_on_all_tokens():
    phases = Phases(METHOD, 7, full=FullTokens(0.2, 0.5), varied=Budgets(0.2, 0.9, 32, weight=0.5))
    full = [step for step in range(300) if phases.of(step).full_tokens]
    assert 30 < len(full) < 90 and phases.densest(0, 300) == full[0]
    assert all(phases.of(step) == Phase(None, None, True) for step in full), "nothing keeps more than all tokens"


def test_budgets_without_a_teacher_and_combinations():
    method = method_from_settings({"method": [{"method": "divprune", "keep": 0.6}, "pyramiddrop"]})
    phases = Phases(method, 7, varied=Budgets(0.1, 0.5, 32))
    for step in range(20):
        assert phases.of(step).teacher is None
        assert phases.of(step).method.input_share(32) == pytest.approx(phases.varied.drawn(7, step), abs=1e-3)


def test_the_range_of_budgets_is_what_the_method_reaches():
    assert Phases(METHOD, varied=Budgets(0.1, 1.0, 32)).varied.low == 0.1
    narrowed = Phases(METHOD, varied=Budgets(0.1, 1.0, LAYERS)).varied
    assert 1 / LAYERS <= narrowed.low < 1 / LAYERS + 0.002 and narrowed.high == 1.0
    METHOD.for_budget(narrowed.low, LAYERS)
    with pytest.raises(ValueError, match=r"budget 0\.15 is out of range for pyramiddrop on 6 layers"):
        Phases(METHOD, varied=Budgets(0.1, 0.15, LAYERS))
    below = Phases(method_from_settings({"method": "text_interaction"}), varied=Budgets(0.1, 1.0, 32))
    assert 0.5 < below.varied.high < 0.54, "half of the remaining tokens go before the third layer"
    assert all(below.of(step).method is not None for step in range(50))
    with pytest.raises(ValueError, match="the learned parameters of quecc fit one budget only"):
        Phases(method_from_settings({"method": "quecc"}), varied=Budgets(0.1, 1.0, 32))


# ------------------------------------------------------------------------------------------------ curricula


def epic_by_its_code(progress, draw):
    """Shares of tokens that EPIC's code removes (ZichenWen1/EPIC @ b2ed9cd): the model's and its teacher's."""
    low, high = 0.1 + 0.8 * progress * 0.2, min(0.1 + 0.8 * progress * 0.8, 1.0)
    removed = low + (high - low) * draw
    return removed, max(removed - min(0.1 + 0.5 * progress, 0.3), 0.0)


@pytest.mark.parametrize("total", [10, 5198])
def test_the_curriculum_is_epics(total):
    """The draw is uniform in the published range, and the teacher keeps as much more as published."""
    curriculum = PruningConfig(method="random", curriculum={}).phases(total, 0, 32).varied
    for step in range(0, total, max(1, total // 50)):
        progress = step / total
        low, high = curriculum.keep_range(progress)
        assert low == pytest.approx(1 - epic_by_its_code(progress, 1)[0])
        assert high == pytest.approx(1 - epic_by_its_code(progress, 0)[0])
        phase = Phases(Random(), 3, varied=replace(curriculum, weight=1.0)).of(step)
        keep = phase.method.keep
        assert low - 1e-9 <= keep <= high + 1e-9
        _, taught = epic_by_its_code(progress, (high - keep) / (high - low) if high > low else 0.0)
        more = 1.0 if phase.teacher.method is None else phase.teacher.method.keep
        assert more == pytest.approx(1 - taught)


def test_the_drop_point_moves_to_the_methods_own():
    phases = Phases(FastV(layer=2), varied=Curriculum((0.9, 0.9), (0.3, 0.7), 100, 32, layer=20, weight=1.0))
    layers = [phases.of(step).method.layer for step in range(100)]
    assert layers[0] == 20 and layers[50] == 11 and layers[99] == 2 and layers == sorted(layers, reverse=True)
    for step in (0, 30, 60):
        teacher = phases.of(step).teacher.method
        assert teacher is None or teacher.layer == phases.of(step).method.layer
    default = Phases(FastV(), varied=Curriculum((0.9, 0.9), (0.3, 0.7), 100, 32, layer=20))
    assert default.of(100).method.drops(32) == FastV(keep=default.of(100).method.keep).drops(32)


def test_a_curriculum_of_a_method_that_only_removes_keys():
    method = method_from_settings({"method": "plphp", "delta": 0.05})
    phases = Phases(method, varied=Curriculum((0.9, 0.9), (0.3, 0.7), 100, 32))
    assert phases.of(0).method.keep == 0.9


@pytest.mark.parametrize(
    ("method", "layer", "words"),
    [
        (METHOD, None, "moves the setting keep, one number, which pyramiddrop does not have"),
        (method_from_settings({"method": "divprune"}), 4, "divprune has no setting layer to move"),
        (method_from_settings({"method": "visionzip"}), 4, "visionzip has no setting layer that moves its only drop"),
        (method_from_settings({"method": "text_interaction", "keep": 0.4}), 8, "text_interaction has no setting layer"),
        (method_from_settings({"method": "plphp"}), None, "pruning.curriculum: delta=0.3"),
        (method_from_settings({"method": "vistog"}), None, "pruning.curriculum: the learned parameters of vistog"),
        (FastV(), 40, "pruning.curriculum: layer=40 does not fit"),
    ],
)
def test_methods_without_what_a_curriculum_moves(method, layer, words):
    with pytest.raises(ValueError, match=words):
        Phases(method, varied=Curriculum((0.9, 0.9), (0.3, 0.7), 100, 32, layer=layer))


# ------------------------------------------------------------------------------------------------ batches and costs


def same_batch(one, two):
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.pixel_values, two.pixel_values)
    assert one.plan.stages[0].segment_lengths == two.plan.stages[0].segment_lengths
    assert len(one.plan.stages) == len(two.plan.stages) and len(one.plan.boundaries) == len(two.plan.boundaries)
    assert torch.equal(one.plan.predict_rows, two.plan.predict_rows) and torch.equal(one.targets, two.targets)
    for a, b in zip(one.plan.boundaries, two.plan.boundaries, strict=True):
        assert torch.equal(a.take, b.take)


@pytest.mark.parametrize(
    "phases", [Phases(METHOD, full=FullTokens(share=1.0)), Phases(METHOD, warmup=Warmup(10, "dense"))]
)
def test_steps_on_all_tokens_are_those_of_a_dense_run(parts, phases):
    batch, dense = parts.collator(phases).pack(parts.loaded, step=3), parts.collator(None, None).pack(parts.loaded)
    same_batch(batch, dense)
    assert batch.teacher is None
    assert batch.costs["flops"] == dense.costs["flops"] == batch.costs["flops_dense"]
    assert {batch.costs[f"tokens_stage_{i}"] for i in range(4)} == {dense.costs["tokens_stage_0"]}


def test_a_step_of_the_warm_up_is_that_of_its_own_schedule(parts):
    batch = parts.collator(Phases(METHOD, warmup=Warmup(4))).pack(parts.loaded, step=2)
    own = PyramidDrop(layers=(2, 3, 5), keep=(0.75, 0.65, 0.55))
    expected = parts.collator(None, own).pack(parts.loaded)
    same_batch(batch, expected)
    assert batch.costs == expected.costs
    same_batch(parts.collator(Phases(METHOD, warmup=Warmup(4))).pack(parts.loaded), parts.collator().pack(parts.loaded))


@pytest.mark.parametrize(
    "phases",
    [
        Phases(METHOD),
        Phases(None),
        Phases(METHOD, warmup=Warmup(6)),
        Phases(METHOD, warmup=Warmup(6, "dense")),
        Phases(METHOD, full=FullTokens(1.0, 0.5)),
        Phases(METHOD, varied=Budgets(0.3, 0.9, LAYERS, weight=1.0)),
        Phases(METHOD, 2, varied=Budgets(0.3, 1.0, LAYERS)),
    ],
)
def test_the_planner_counts_what_the_batches_do(parts, phases):
    """Tokens and FLOPs of each sample by itself, but for the ranking."""
    collate = parts.collator(phases, phases.method)

    def lengths(samples):
        chats, sizes = [parts.loaded[s].chat for s in samples], [SIZES[s] for s in samples]
        tokens, tiles = ([count(of) for of in sizes] for count in (parts.layout.tokens, parts.layout.tiles))
        return Lengths(
            text=np.array([len(chat.input_ids) - len(chat.image_offsets) for chat in chats]),
            supervised=np.array([(chat.labels >= 0).sum() for chat in chats]),
            span_tokens=np.array([n for of in tokens for n in of], dtype=int),
            span_tiles=np.array([n for of in tiles for n in of], dtype=int),
            span_frames=np.zeros(sum(len(of) for of in tokens), dtype=int),
            span_sample=np.repeat(np.arange(len(samples)), [len(t) for t in tokens]),
        )

    index = SimpleNamespace(lengths=lengths)
    samples = np.array([2, 0, 3, 1])
    before, costs = StepCosts(index, parts.cost, phases)(3, samples)
    for number, sample in enumerate(samples):
        batch = collate.pack([parts.loaded[sample]], step=3)
        assert before[number] == len(batch.input_ids)
        plans = [batch.plan, *([batch.teacher.plan] if batch.teacher else [])]
        ranking = sum(selector_flops(collate.cost.decoder, plan, collate.method) for plan in plans)
        assert costs[number] + ranking == pytest.approx(batch.costs["flops"], rel=1e-12)


# ------------------------------------------------------------------------------------------------ the loss


def divergence(full, taught, temperature):
    """T^2 * KL(teacher || model), summed, by PyTorch's own function."""
    full, taught = (full / temperature).log_softmax(-1), (taught / temperature).softmax(-1)
    return temperature**2 * F.kl_div(full, taught, reduction="sum")


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_chunked_divergence_is_pytorchs_own(chunk, with_bias):
    torch.manual_seed(0)
    hidden, taught = torch.randn(9, 8, dtype=torch.float64, requires_grad=True), torch.randn(9, 8, dtype=torch.float64)
    weight = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(17, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 17, (9,))
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    loss, correct, row_loss, divergence_sum = chunked_loss(
        hidden, weight, bias, targets, Teaching(taught, 0.7, 2.0), chunk
    )
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    kl = divergence(logits, F.linear(taught, weight, bias).detach(), 2.0)
    assert (
        abs(row_loss.sum() - expected) < 1e-4
        and abs(divergence_sum - kl) < 1e-4
        and abs(loss - expected - 0.7 * kl) < 1e-4
    )
    assert torch.equal(correct, logits.argmax(-1) == targets)
    ours, theirs = torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * (expected + 0.7 * kl), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-5


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_consistency_step_are_those_of_two_passes(parts, rank_with, recompute):
    """The teacher gives a target and gets no gradient; tower and projector are trained by the full pass."""
    method = PyramidDrop(layers=(2, 3, 5), keep=(0.5, 0.3, 0.1), rank_with=rank_with)
    model = tiny_model(num_layers=LAYERS)
    if recompute:
        checkpoint_activations(model)
    prune(model, method).train()
    phases = Phases(method, full=FullTokens(1.0, 0.7, 2.0))
    batch = parts.collator(phases, method).pack(parts.loaded, step=0)
    output = model(batch)
    output.loss_sum.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    hidden, *_ = model.model(parts.collator(None, None).pack(parts.loaded))
    with torch.no_grad():
        taught, *_ = model.model(parts.collator(None, method).pack(parts.loaded))
    assert not torch.allclose(hidden, taught, atol=1e-3), "dropping changes something here"
    logits = F.linear(hidden, model.lm_head.weight)
    entropy = F.cross_entropy(logits, batch.targets, reduction="sum")
    kl = divergence(logits, F.linear(taught, model.lm_head.weight).detach(), 2.0)
    (entropy + 0.7 * kl).backward()
    assert abs(output.row_loss.sum() - entropy) < 1e-4 * entropy and abs(output.consistency - kl) < 1e-4 * (1 + kl)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp(min=1), name


def test_without_images_full_and_pruned_agree(parts):
    """Also a rank that has nothing at all takes part."""
    model = prune(tiny_model(num_layers=LAYERS), METHOD).train()
    collate = parts.collator(Phases(METHOD, full=FullTokens(1.0, 1.0)))
    output = model(collate.pack([parts.loaded[1]], step=0))
    assert output.consistency.abs() < 1e-5 and (output.loss_sum - output.row_loss.sum()).abs() < 1e-5
    output = model(collate.pack([], step=0))
    output.loss_sum.backward()
    assert output.loss_sum == 0 and model.lm_head.weight.grad is not None


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pruning.full_token_share=1.5", ["pruning.full_token_share", "less than or equal to 1", "1.5"]),
        ("pruning.full_token_share=-0.1", ["pruning.full_token_share", "greater than or equal to 0"]),
        ("pruning.consistency_weight=0.5", ["pruning.consistency_weight=0.5", "set full_token_share", "budgets"]),
        ("pruning.consistency_temperature=0", ["pruning.consistency_temperature", "greater than 0"]),
        ("pruning.warmup={kind: linear}", ["pruning.warmup", "steps=N and ratio=R", "neither is set"]),
        ("pruning.warmup={steps: 5, ratio: 0.1}", ["pruning.warmup", "both is set"]),
        ("pruning.warmup={steps: 0}", ["pruning.warmup.steps", "greater than or equal to 1"]),
        ("pruning.warmup={steps: 5, kind: slow}", ["pruning.warmup.kind", "'slow'"]),
        ("pruning.warmup={step: 5}", ["pruning.warmup.step", "did you mean pruning.warmup.steps?"]),
        ("pruning.warmup={steps: 5, start: 0.2}", ["pruning", "warmup.start=0.2 is below keep"]),
        ("pruning={method: none, full_token_share: 0.1}", ["full_token_share is set", "method is none"]),
        ("pruning={method: none, warmup: {steps: 3}}", ["warmup is set", "method is none"]),
        ("pruning={method: none, budgets: [0.1, 1.0]}", ["budgets is set", "method is none"]),
        ("pruning.budgets=[0.5, 0.1]", ["budgets=[0.5, 0.1]", "ascending order"]),
        ("pruning.budgets=[0.5, 1.5]", ["pruning.budgets", "less than or equal to 1"]),
        ("pruning.budgets=[0.05, 0.1]", ["budget 0.1 is out of range for pyramiddrop on 8 layers"]),
        ("pruning={budgets: [0.2, 1.0], warmup: {steps: 3}}", ["warmup and budgets each set the keep ratios"]),
        ("pruning={method: fastv, curriculum: {end: [0.7, 0.2]}}", ["end=[0.7, 0.2]", "ascending order"]),
        ("pruning.curriculum={}", ["one number, which pyramiddrop does not have"]),
    ],
)
def test_wrong_settings_are_named(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart.yaml", [override])
    for word in words:
        assert word in str(caught.value)


def test_settings_become_phases():
    config = PruningConfig(warmup={"ratio": 0.03, "kind": "cosine"}, full_token_share=0.1, consistency_weight=1.0)
    phases = config.phases(total_steps=1001, seed=5)
    assert phases.warmup == Warmup(31, "cosine", 1.0) and phases.full == FullTokens(0.1, 1.0, 1.0) and phases.seed == 5
    assert not PruningConfig().phases(10, 0).vary
    assert "warmup" not in PruningConfig().identity() and "warmup" in config.identity()
    saved = {"method": "pyramiddrop", "layers": [2, 4], "keep": [0.6, 0.3]}
    assert merge_pruning(config, saved).phases(1001, 5).full.share == 0.1


def test_settings_without_effect_are_named():
    given = ["pruning.warmup={steps: 4, kind: dense, start: 0.9}", "pruning.consistency_temperature=2"]
    lines = "\n".join(without_effect(load_config("quickstart.yaml", given)))
    assert "pruning.warmup.start has no effect" in lines and "pruning.consistency_temperature has no effect" in lines
    lines = without_effect(load_config("quickstart.yaml", ["pruning.warmup={steps: 4}", "pruning.full_token_share=1"]))
    assert "pruning.warmup has no effect" in "\n".join(lines)


@pytest.mark.parametrize(
    ("trained", "share"),
    [
        ("{projector: 1.0e-3}", 0.0),
        ("{projector: 1.0e-3, vision_tower: 1.0e-5}", 0.0),
        ("{projector: 1.0e-3, language_model: 1.0e-5}", 0.25),
    ],
)
def test_every_step_of_projector_alignment_drops(trained, share):
    """As in DualSpeed's code, whose steps on full tokens need a decoder that is trained."""
    asked = [f"model.train={trained}", "pruning.full_token_share=0.25", "pruning.consistency_weight=1"]
    config = load_config("llava_next_pretrain.yaml", asked)
    phases = config.phases(400)
    full = [step for step in range(400) if phases.of(step).full_tokens]
    assert (len(full) > 50) == bool(share) and phases.full.share == config.full_token_share == share
    assert all(phases.of(step).method is not None for step in set(range(400)) - set(full))
    said = [line for line in without_effect(config) if line.startswith("pruning.full_token_share has no effect")]
    assert len(said) == (share == 0)
    assert ("0.25 of the steps on full tokens" in describe(config)) == bool(share)


def test_the_dry_run_checks_the_tower_at_the_smallest_budget():
    tome = "pruning={method: tome, keep: 0.8, layers: [11], budgets: [0.1, 1.0]}"
    with pytest.raises(ConfigError, match="tokens"):
        describe(load_config("llava_next_pdrop.yaml", [tome, "model.projector=null"]))
    describe(load_config("llava_next_pdrop.yaml", [tome.replace("0.1,", "0.6,"), "model.projector=null"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pruning.budgets=[0.1, 1.0]"], "0.1 to 1 at each step (no teacher)"),
        (["pruning.budgets=[0.1, 1.0]", "pruning.consistency_weight=1"], "0.1 to 1 at each step (KL weight 1"),
        (["pruning={method: fastv, curriculum: {layer: 16}}"], "to 0.26 to 0.74, and the drop point from layer 16"),
    ],
)
def test_the_dry_run_counts_drawn_budgets(overrides, words):
    report = describe(load_config("llava_next_pdrop.yaml", [*overrides, "model.projector=null"]))
    line = next(line for line in report.splitlines() if line.startswith("mean step at"))
    assert words in line
    ratio = float(line.split()[6])
    assert {0: 0.3, 1: 0.5, 2: 0.5}[0 if "no teacher" in words and "budget" in line else 1] < ratio < 0.9


def test_the_dry_run_counts_all_phases():
    asked = ["pruning.warmup={ratio: 0.1, kind: dense}", "pruning.full_token_share=0.1", "pruning.consistency_weight=1"]
    report = describe(load_config("llava_next_pdrop.yaml", asked))
    plain = describe(load_config("llava_next_pdrop.yaml"))
    assert (
        "of dense FLOPs, with 0.1 of the steps on full tokens" in report
        and "warm-up (dense, 0.1 of all steps): 1.000" in report
    )
    assert "mean step" not in plain

    def kept(text):
        return float(next(line for line in text.splitlines() if "activations, by stage" in line).split()[3])

    assert kept(report) > 1.5 * kept(plain), "memory must hold a full-token step"


# ------------------------------------------------------------------------------------------------ real runs

PHASES = (
    "pruning.warmup={steps: 3, kind: dense}",
    "pruning.full_token_share=0.5",
    "pruning.consistency_weight=0.5",
    "train.save_every=1000",
    "data.eval=[]",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("phases"))
    runs.run("whole", *PHASES, "deepspeed=configs/deepspeed/zero0.json")
    return runs


@pytest.mark.slow
def test_a_run_of_projector_alignment_drops_at_every_step(tmp_path):
    runs = Runs(tmp_path)
    asked = ["pruning.full_token_share=0.5", "pruning.consistency_weight=1", "data.eval=[]", "train.max_steps=6"]
    done = runs.run("alignment", *asked, "model.train={projector: 1.0e-3}", "data.template=plain")
    assert "pruning.full_token_share has no effect: the decoder is frozen" in done.stdout + done.stderr
    for line in runs.metrics("alignment"):
        assert not line.get("full_tokens") and line["visual_tokens_entering"] < line["visual_tokens"]


@pytest.mark.slow
def test_dense_steps_of_a_warm_up_are_a_dense_run_and_a_resume_is_exact(runs):
    zero0 = "deepspeed=configs/deepspeed/zero0.json"
    runs.run("dense", "pruning={method: none}", "data.eval=[]", "run.stop_after=3", zero0)
    runs.run("stopped", *PHASES, "run.stop_after=3", zero0)
    dense, warm = runs.metrics("dense"), runs.metrics("stopped")
    for key in ("loss", "grad_norm", "data_digest", "flops", "token_accuracy", "micro_steps"):
        assert [m[key] for m in warm] == [m[key] for m in dense], key
    assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint("dense"))
    saved = json.loads((runs.checkpoint("stopped") / "trainer.json").read_text())["pruning"]
    assert saved["warmup"]["done"] and saved["steps_done"] == 3 and saved["full_token_share"] == 0.5
    exported = json.loads((runs.checkpoint("stopped") / "hf" / "config.json").read_text())
    assert exported["pruning_training"] == saved and exported["pruning"]["keep"] == [0.5, 0.25, 0.125]

    runs.run("stopped", *PHASES, zero0)
    assert_same_metrics(runs.metrics("stopped"), runs.metrics("whole"))
    assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint("whole"))
    done = runs.run("stopped", *PHASES, "pruning.full_token_share=0.4", zero0, expect=2)
    assert "full_token_share" in done.stderr and "train.init_from" in done.stderr


def test_metrics_follow_the_phase_of_the_step(runs):
    metrics = runs.metrics("whole")
    assert [m["keep"] for m in metrics[:3]] == [[1, 1, 1]] * 3 and not any(m["full_tokens"] for m in metrics[:3])
    later = metrics[3:]
    assert {m["full_tokens"] for m in later} == {True, False}
    for m in later:
        assert ("consistency_loss" in m) == m["full_tokens"]
        assert m["keep"] == ([1, 1, 1] if m["full_tokens"] else [0.5, 0.25, 0.125])
        if m["full_tokens"]:
            assert m["tokens_stage_3"] == m["tokens_stage_0"] and m["flops"] > m["flops_dense"], "the teacher's pass"
            assert m["consistency_loss"] > 0
        else:
            assert m["tokens_stage_3"] < m["tokens_stage_0"] and m["flops"] < m["flops_dense"]


BUDGETS = ("pruning.budgets=[0.3, 1.0]", "pruning.consistency_weight=0.5", "train.save_every=1000", "data.eval=[]")


@pytest.mark.slow
def test_a_run_of_all_budgets_resumes_exactly_and_two_ranks_draw_the_same(tmp_path):
    runs = Runs(tmp_path)
    zero0 = "deepspeed=configs/deepspeed/zero0.json"
    runs.run("whole", *BUDGETS, zero0)
    runs.run("stopped", *BUDGETS, "run.stop_after=3", zero0)
    done = runs.run("stopped", *BUDGETS, zero0)
    assert "a budget of 0.3 to 1 at each step (KL weight 0.5 to a pass that keeps more)" in done.stdout + done.stderr
    whole = runs.metrics("whole")
    assert_same_metrics(runs.metrics("stopped"), whole)
    assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint("whole"))
    assert len({tuple(m["keep"]) for m in whole}) == len(whole) and all(m["consistency_loss"] > 0 for m in whole)
    saved = json.loads((runs.checkpoint("whole") / "hf" / "config.json").read_text())["pruning_training"]["varied"]
    assert (saved["low"], saved["high"], saved["weight"]) == (0.3, 1.0, 0.5)
    refused = runs.run("stopped", *BUDGETS, "pruning.budgets=[0.4, 1.0]", zero0, expect=2)
    assert "pruning.budgets" in refused.stderr and "train.init_from" in refused.stderr

    runs.run("two", *BUDGETS, "deepspeed=configs/deepspeed/zero3.json", ranks=2)
    for a, b in zip(whole, runs.metrics("two"), strict=True):
        assert (a["keep"], a["data_digest"], a["visual_tokens"]) == (b["keep"], b["data_digest"], b["visual_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["consistency_loss"] == pytest.approx(b["consistency_loss"], rel=2e-3, abs=1e-6)


@pytest.mark.slow
def test_dualspeed_and_epic_run(tmp_path):
    """DualSpeed's learned prefix gets no gradient in steps on all tokens, but exists in every one."""
    runs = Runs(tmp_path)
    common = ["train.save_every=1000", "data.eval=[]"]
    dual = "{method: [{method: divprune, keep: 0.3}, {method: prefix, tokens: 2}], full_token_share: 0.4, "
    for stage in (0, 3):
        runs.run(f"dual{stage}", f"pruning={dual}consistency_weight: 1}}", *common,
                 f"deepspeed=configs/deepspeed/zero{stage}.json")  # fmt: skip
    for a, b in zip(runs.metrics("dual0"), runs.metrics("dual3"), strict=True):
        assert a["full_tokens"] == b["full_tokens"] and a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    runs.run("epic", "pruning={method: fastv, curriculum: {layer: 3}, consistency_weight: 1}", *common)
    kept = [m["keep"][0] for m in runs.metrics("epic")]
    assert kept[0] == 0.9 and min(kept) >= 0.26 and len(set(kept)) == len(kept)


@pytest.mark.slow
def test_two_ranks_of_zero_3_take_the_same_steps(runs):
    runs.run("two", *PHASES, "deepspeed=configs/deepspeed/zero3.json", ranks=2)
    one, two = runs.metrics("whole"), runs.metrics("two")
    for key in ("data_digest", "keep", "full_tokens", "supervised_tokens", "visual_tokens"):
        assert [m[key] for m in one] == [m[key] for m in two], key
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "consistency_loss", "flops_dense"):
            assert a.get(key) == pytest.approx(b.get(key), rel=2e-4, abs=1e-6), (a["step"], key)
