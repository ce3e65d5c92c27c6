"""Methods together, drawn at random: in batches and alone, cached and not, over several turns, in training."""

import random
from itertools import permutations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.support.families import SPECIAL, family_inputs, family_model, images_repeated
from tests.support.helpers import tiny_model
from tests.support.key_choice import TURNS
from tests.support.phases import make_parts  # noqa: F401
from vtprune_train import PyramidDrop, prune
from vtprune_train.models.patch import method_of
from vtprune_train.pruning import METHODS, method_class
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.divprune import DivPrune
from vtprune_train.pruning.methods.fastv import FastV
from vtprune_train.pruning.methods.feather import Feather
from vtprune_train.pruning.methods.fopru import FoPru
from vtprune_train.pruning.methods.hidrop import HiDrop
from vtprune_train.pruning.methods.lvlm_csp import LVLMCSP
from vtprune_train.pruning.methods.plphp import PLPHP
from vtprune_train.pruning.methods.pool import Pool
from vtprune_train.pruning.methods.sparsevlm import SparseVLM
from vtprune_train.pruning.methods.uniform import Uniform
from vtprune_train.pruning.methods.victor import Victor
from vtprune_train.pruning.methods.videollm_mod import VideoLLMMoD
from vtprune_train.pruning.methods.visionzip import VisionZip
from vtprune_train.pruning.methods.voco import VoCo
from vtprune_train.pruning.phases import FullTokens, Phases, Warmup

pytestmark = pytest.mark.slow

ADAPTIVE = ("prumerge", "prunevid", "text_interaction")  # count on the device by default
LAYERS = 6  # of the families' tiny decoders
TOWER = {name for name in METHODS if method_class(name)().needs.from_tower}  # not read for these families
BATCH = [
    [0, "what is shown here ? assistant :"],
    ["a red", 1, "and", 2, "two ? assistant :"],
    ["what is a dog ? assistant :"],
]
NAMED = [
    (VisionZip(), PyramidDrop(), PLPHP()),
    (SparseVLM(count="mass", mass=0.7), PLPHP()),
    (VisionZip(), VideoLLMMoD(keep=0.4)),
    (Victor(registers=3, layers=1), FastV(layer=2)),
    (LVLMCSP(layers=(1, 4)), PyramidDrop(layers=(2, 3), keep=(0.5, 0.3))),
    (HiDrop(enter=1), FastV(layer=3, rank_with="next_layer")),
    (DivPrune(keep=0.02), Feather()),
    (DivPrune(keep=0.3), VoCo(tokens=2)),
]


def drawn(count, seed, without=frozenset()):
    """``count`` combinations of methods with their defaults that are not refused."""
    names = [name for name in METHODS if name not in without]
    every = [*permutations(names, 2), *permutations(names, 3)]
    found = []
    for chosen in random.Random(seed).sample(every, len(every)):
        try:
            combined = Combined(tuple(method_class(name)() for name in chosen))
            combined.drops(LAYERS)
        except ValueError as error:
            assert "drops" in str(error) or "cannot be combined" in str(error), "only what cannot be is refused"
            continue
        found.append(combined)
        if len(found) == count:
            break
    return found


CASES = [
    *(("llava_next", Combined(methods)) for methods in NAMED),
    *(("llava_next", combined) for combined in drawn(10, seed=1)),
    *(("qwen3_vl", combined) for combined in drawn(8, seed=2, without=TOWER)),
    *(("qwen2_5_vl", combined) for combined in drawn(3, seed=3, without=TOWER)),
]
IDS = [f"{family}-{'+'.join(part.name for part in combined.parts)}" for family, combined in CASES]


def pruned(family, method):
    torch.manual_seed(0)  # of parameters that the method adds
    return prune(family_model(family).double(), method).eval()


def generated(model, inputs, **more):
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL)))}
    with torch.no_grad():
        return model.generate(**inputs, **settings, **more)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(("family", "method"), CASES, ids=IDS)
def test_batches_single_rows_beams_and_no_cache(family, method):
    model = pruned(family, method)
    singles = torch.cat([generated(model, family_inputs(family, [text])) for text in BATCH])
    for side in ("left", "right"):
        assert torch.equal(generated(model, family_inputs(family, BATCH, side)), singles), side
    inputs = family_inputs(family, BATCH)
    assert torch.equal(generated(model, inputs, use_cache=False), singles)
    with images_repeated(model):
        beams = generated(model, inputs, num_beams=2)
        assert torch.equal(generated(model, inputs, num_beams=2, use_cache=False), beams)


def conversation(model, family, turns):
    """[B, V] logits after the last turn, all on one cache; each turn brings rows new images."""
    cache, masks = DynamicCache(), []
    with torch.no_grad():
        for texts in turns:
            inputs = family_inputs(family, texts)
            masks.append(inputs.pop("attention_mask"))
            made = model(**inputs, attention_mask=torch.cat(masks, dim=1), past_key_values=cache, use_cache=True)
    return made.logits[:, -1]


@pytest.mark.parametrize(("family", "method"), CASES, ids=IDS)
def test_turns_on_one_cache(family, method):
    model = pruned(family, method)
    batched = conversation(model, family, TURNS)
    for row in range(2):
        single = conversation(model, family, [[texts[row]] for texts in TURNS])
        assert torch.allclose(batched[row], single[0], atol=1e-6), row


def trained(model, inputs):
    """The loss summed over rows' supervised tokens, after a backward pass."""
    model.zero_grad()
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    logits = model(**inputs, labels=labels).logits[:, -3:-1]
    loss = -logits.log_softmax(-1).gather(-1, labels[:, -2:, None]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if "visual" not in name}


@pytest.mark.parametrize(("family", "method"), CASES, ids=IDS)
def test_training(family, method):
    """A batch's loss is its rows'; recomputing activations changes nothing; what is learned has gradients."""
    model = pruned(family, method).train()
    inputs = family_inputs(family, BATCH)
    loss, gradients = trained(model, inputs)
    alone = sum(trained(model, family_inputs(family, [text]))[0] for text in BATCH)
    assert torch.allclose(loss, alone, atol=1e-6)
    learned = [gradient for name, gradient in gradients.items() if ".pruning." in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in learned)
    model.gradient_checkpointing_enable()
    again, recomputed = trained(model, inputs)
    assert torch.equal(loss, again)
    for name, gradient in recomputed.items():
        assert (gradient is None) == (gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[name]), name


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            (VoCo(), PyramidDrop()),
            "pyramiddrop drops tokens before layer 2, where it would also drop the learned tokens of voco",
        ),
        ((Victor(layers=3), FastV()), "fastv drops tokens before layer 1, .* of victor.*, or after layer 3"),
        (
            (VoCo(), VideoLLMMoD()),
            "videollm_mod drops tokens before layer 1, where it would also drop the learned tokens of voco",
        ),
        ((PyramidDrop(layers=(2,), keep=(0.5,)), FastV(layer=2)), "fastv ranks with .* list fastv before it"),
    ],
)
def test_what_would_lose_tokens_or_find_no_ranking_is_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        prune(family_model("llava_next"), Combined(methods))


def test_a_combination_asks_for_what_its_methods_ask():
    """Whose parts act elsewhere: the one that reads the tower, the one that chooses keys."""
    first, keys = DivPrune(keep=0.5), PLPHP(multi_turn="keep_dense")
    both = Combined((first, keys))
    assert both.input_share(8) == pytest.approx(first.input_share(8) * keys.input_share(8))
    assert (both.needs.multi_turn, Combined((first, PLPHP())).needs.multi_turn) == ("keep_dense", "drop")
    assert (both.needs.hidden_after, Combined((first, VoCo())).needs.hidden_after) == ("query", "span")
    assert (both.needs.encoder_rows, Combined((FoPru(), keys)).needs.encoder_rows) == ("class", "all")


def test_what_is_listed_in_the_order_that_works_is_not():
    assert Combined((FastV(layer=2), PyramidDrop(layers=(2,), keep=(0.5,)))).drops(LAYERS)
    assert Combined((Victor(layers=5), VideoLLMMoD(layers=(1, 3)))).drops(LAYERS), "what skips a layer comes back"


def added_between(method, layer):
    """[T, C] what joins the stream between two layers of Qwen3-VL: the visual features of ``deepstack``."""
    model, seen = family_model("qwen3_vl"), {}
    if method is not None:
        prune(model, method)
    layers = model.model.language_model.layers
    layers[layer].register_forward_hook(lambda module, args, output: seen.update(left=output.detach()))
    layers[layer + 1].register_forward_pre_hook(lambda module, args: seen.update(entered=args[0].detach()))
    with torch.no_grad():
        model(**family_inputs("qwen3_vl", BATCH[:1]))
    return (seen["entered"] - seen["left"])[0]


def test_visual_features_find_tokens_that_were_away_and_pass_over_learned_ones():
    dense = added_between(None, 1)
    assert torch.allclose(added_between(LVLMCSP(layers=(1, 4)), 1), dense, atol=1e-4)
    dense, registers = added_between(None, 0), added_between(Victor(registers=2, layers=3), 0)
    visual = dense.abs().sum(dim=1) > 1e-3
    last = int(visual.nonzero()[-1])
    assert registers[last + 1 : last + 3].abs().amax() < 1e-3
    assert torch.allclose(torch.cat([registers[: last + 1], registers[last + 3 :]]), dense, atol=1e-4)


@pytest.mark.parametrize(
    "method", [PLPHP(untouched=0), SparseVLM(layers=(1, 2, 3), count="mass", mass=0.3, recycle="none")]
)
@pytest.mark.parametrize("combined", [False, True])
def test_a_warm_up_eases_what_is_counted_on_the_device(parts, method, combined):
    """The first step keeps everything; later ones do what the method does at the settings of that step."""

    def loss(step, warmup=None):
        model = prune(tiny_model(), Combined((DivPrune(keep=1.0), method)) if combined else method)
        collate = parts.collator(Phases(method_of(model), warmup=warmup))
        with torch.no_grad():
            return model(collate.pack(parts.loaded, step=step)).loss_sum

    dense = loss(0, Warmup(4, "dense"))
    eased = [loss(step, Warmup(4, "linear")) for step in range(5)]
    assert torch.allclose(eased[0], dense)
    assert torch.equal(eased[4], loss(0))
    assert len({value.item() for value in eased}) == 5


@pytest.mark.parametrize("first", [Pool(keep=0.3), Uniform(keep=0.3), Feather()], ids=lambda m: m.name)
def test_told_again_in_full_is_said_at_once(first):
    """A later turn knows where the tokens of earlier images lie."""
    model = pruned("llava_next", Combined((first, PLPHP(multi_turn="keep_dense"))))
    logits = conversation(model, "llava_next", TURNS)
    for row in range(2):
        together = conversation(model, "llava_next", [[[part for texts in TURNS for part in texts[row]]]])
        assert torch.allclose(logits[row], together[0], atol=1e-8), row


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
        assert not any(name in func.name() for name in waits), func.name()
        return func(*args, **(kwargs or {}))


class _NoLists(TorchFunctionMode):
    """Fails on lists that become tensors on the device: such a copy waits for all that the device has to do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor) or "device" not in (kwargs or {}), args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ADAPTIVE])
def test_training_never_waits_for_the_device(parts, name):
    """Without adaptive counts, which some methods have by default."""
    part = method_class(name)()
    model = prune(tiny_model(), part).train()
    batch = parts.collator(Phases(part)).pack(parts.loaded, step=0)
    assert not any(boundary.drop.adaptive for boundary in batch.plan.boundaries)
    with _NoWaiting(), _NoLists():
        model(batch).loss_sum.backward()


PACKED = [Combined(methods) for methods in NAMED] + drawn(6, seed=4)


@pytest.mark.parametrize("method", PACKED, ids=lambda m: "+".join(part.name for part in m.parts))
def test_packed_steps_and_their_teachers(parts, method):
    """A packed batch's loss is its samples', pruned and on all tokens with the pruned pass as teacher; and a sample
    without pictures has a gradient for everything that is trained."""
    torch.manual_seed(0)
    model = prune(tiny_model().double(), method).train()
    for full in (FullTokens(), FullTokens(share=1.0, weight=0.5)):
        collate = parts.collator(Phases(method, full=full))
        together = model(collate.pack(parts.loaded, step=0)).loss_sum
        alone = [model(collate.pack([sample], step=0)).loss_sum for sample in parts.loaded]
        assert torch.allclose(together, torch.stack(alone).sum(), rtol=1e-5)
        for batch in (parts.loaded, parts.loaded[1:2]):
            model.zero_grad()
            model(collate.pack(batch, step=0)).loss_sum.backward()
            missing = [name for name, p in model.named_parameters() if p.grad is None]
            assert all("vision_tower" in name for name in missing), missing
