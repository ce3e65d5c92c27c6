"""What would wait for a GPU, or mix devices on one: every method and every family, on tensors that claim to be on CUDA.

Training on packed batches waits nowhere between the start of the forward pass and the end of the backward pass, but for
what is listed here with its reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

from tests.support import fake_varlen  # noqa: F401, attention that CUDA alone has
from tests.support.clip import save_clip
from tests.support.fake_cuda import DEVICE, READ, CudaTensor, FakeCuda
from tests.support.families import BATCH, FAMILIES, HALF, SPECIAL, family_inputs, family_model
from tests.support.family_runs import RECORDS, Setup
from tests.support.helpers import tiny_model
from tests.support.phases import make_parts  # noqa: F401
from vtprune_train import dense, prune
from vtprune_train.models.forward.recompute import checkpoint_activations
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning import METHODS, NONE, method_class, method_from_settings
from vtprune_train.pruning.methods import cdpruner
from vtprune_train.pruning.ops.clip_text import clip_similarity
from vtprune_train.pruning.phases import FullTokens, Phases
from vtprune_train.training.engine.gradients import squared_norm
from vtprune_train.training.loop.evaluate import evaluate

pytestmark = pytest.mark.slow

NAMES = [*METHODS, NONE]
ALL_PARTS = {"projector": 1.0, "language_model": 1.0, "pruning": 1.0, "vision_tower": 1.0}


def built(name):
    """The method by its name alone."""
    return None if name == NONE else method_class(name)()


def files(waits):
    """How often each file waits, and how: ``{(kind, file): times}``."""
    return Counter((event.kind, event.where.partition(":")[0]) for event in waits)


def trained(model, batch):
    """Loss and gradients of a step."""
    loss = model(batch).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_training(make, batch, forward=(), backward=(), tolerance=1e-4):
    """A step on the fake GPU has the loss and gradients of one on the CPU, and these waits, of the two passes.

    Args:
        make: the model in training mode, the same each time.
        batch: packed.
        forward: what :func:`files` says of the forward pass.
        backward: likewise.
        tolerance: relative, of loss and gradients.
    """
    loss, grads = trained(make(), batch)
    model = make()
    with FakeCuda() as cuda:
        there = cuda.put(model)(batch.pin_memory().to("cuda")).loss_sum
        assert files(cuda.waits) == Counter(dict(forward)), cuda.waits
        cuda.waits.clear()
        there.backward()
        assert files(cuda.waits) == Counter(dict(backward)), cuda.waits
    assert abs(there.elem - loss) <= tolerance * loss
    found = {name: p.grad.elem for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert (found[name] - grad).abs().max() <= 10 * tolerance * grad.abs().max().clamp(min=1), name


# ------------------------------------------------------------------------------------- every method, packed batches

# An adaptive drop counts on the device how many tokens stay, and every later shape depends on it: one read each.
PRUMERGE = {(READ, "vtprune_train/pruning/methods/prumerge.py"): 1}
MASS = {(READ, "vtprune_train/pruning/methods/sparsevlm.py"): 2}
# The singular values of each of four images, at two drops: cuSOLVER's answer is checked on the host.
RANK = {**MASS, (READ, "vtprune_train/pruning/ops/raters.py"): 8}
TEXT_INTERACTION = {(READ, "vtprune_train/pruning/methods/text_interaction.py"): 1}
ADAPTIVE = {"prumerge": PRUMERGE, "text_interaction": TEXT_INTERACTION}


def method_model(method, checkpointed=False, dtype=torch.float32, **settings):
    torch.manual_seed(3)  # of parameters that the method adds
    model = prune(tiny_model().to(dtype), method, **settings).train()
    set_trainable(model, ALL_PARTS)
    if checkpointed:
        checkpoint_activations(model)
    return model


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", NAMES)
def test_training_does_not_wait(parts, name, checkpointed):
    batch = parts.collator(Phases(built(name))).pack(parts.loaded, step=0)
    check_training(lambda: method_model(built(name), checkpointed), batch, forward=ADAPTIVE.get(name, ()))


VARIANTS = [
    ({"method": "pyramiddrop", "rank_with": "this_layer", "positions": "keep"}, {}),
    ({"method": "sparsevlm", "count": "rank"}, RANK),
    ({"method": "sparsevlm", "count": "mass"}, MASS),
    ({"method": "sparsevlm", "gravity": True, "recycle": "none"}, {}),
    ({"method": "prumerge", "spatial": 3.0}, PRUMERGE),
    ({"method": "prumerge", "keep": 0.25}, {}),
    ({"method": "text_interaction", "keep": 0.25}, {}),
    ({"method": "visionselector", "soft": True}, {}),
    ({"method": "prumerge", "spatial": 3.0, "variant": "published"}, PRUMERGE),
    ({"method": "prumerge", "keep": 0.25, "spatial": 1.0, "variant": "published"}, {}),
    ({"method": "visionzip", "variant": "published"}, {}),
    ({"method": "fopru", "strategy": "row"}, {}),
    ({"method": "hidrop", "differentiable": False}, {}),
]


@pytest.mark.parametrize(("settings", "forward"), VARIANTS, ids=lambda value: "-".join(map(str, dict(value).values())))
def test_other_settings_do_not_wait_either(parts, settings, forward):
    method = method_from_settings(settings)
    batch = parts.collator(Phases(method)).pack(parts.loaded, step=0)
    check_training(lambda: method_model(method), batch, forward)


def test_the_text_tower_does_not_wait(parts, tmp_path, monkeypatch):
    """The question is read on the host. ``from_pretrained`` uses the meta device, so CLIP is loaded before."""
    name = str(save_clip(tmp_path, 24))
    here, there = (clip_similarity.__wrapped__(name, torch.device("cpu")) for _ in range(2))
    with FakeCuda() as cuda:
        for module in (there.text_model, there.text_projection, there.norm, there.visual_projection):
            cuda.put(module)
    monkeypatch.setattr(cdpruner, "clip_similarity", lambda name, device: there if device.type == "cuda" else here)
    method = method_from_settings({"method": "cdpruner", "keep": 0.4, "text_tower": name})
    batch = parts.collator(Phases(method)).pack(parts.loaded, step=0)
    check_training(lambda: method_model(method), batch)


def test_a_step_on_all_tokens_with_a_teacher_does_not_wait(parts):
    method = built("pyramiddrop")
    batch = parts.collator(Phases(method, full=FullTokens(share=1.0, weight=1.0))).pack(parts.loaded, step=0)
    assert batch.teacher is not None
    check_training(lambda: method_model(method), batch)


@pytest.mark.parametrize("name", ["none", "pyramiddrop", "plphp"])
def test_the_variable_length_kernels_get_what_they_want(parts, name):
    """Lengths in int32 on the device and on the host, which agree; in half precision, as CUDA has it."""
    batch = parts.collator(Phases(built(name))).pack(parts.loaded, step=0)
    model = method_model(built(name), dtype=torch.bfloat16)
    with FakeCuda() as cuda:
        cuda.put(model).model.language_model.config._attn_implementation = "packed_varlen_torch"
        loss = model(batch.pin_memory().to("cuda")).loss_sum
        loss.backward()
    assert cuda.waits == []
    expected, grads = trained(method_model(built(name), dtype=torch.bfloat16), batch)
    assert abs(loss.elem - expected) < 0.02 * expected
    found = {key: p.grad.elem for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()


# ---------------------------------------------------------------------------------------- families, packed batches

# Waits in the forward and the backward pass.
TOWERS = {"llava": ({}, {}), "llava_onevision": ({}, {}), "qwen2_5_vl": ({}, {})}


@pytest.mark.parametrize("name", TOWERS)
def test_training_a_family_does_not_wait(name, tmp_path):
    setup = Setup(name, tmp_path)

    def model():
        made = setup.parts().model
        set_trainable(made, ALL_PARTS)
        return prune(made, HALF).train()

    batch = setup.collator(setup.parts(), HALF)(range(len(RECORDS)))
    check_training(model, batch, *TOWERS[name])


# ------------------------------------------------------------------------------------------------- padded batches

PADDED = (READ, "vtprune_train/models/forward/padded.py")  # the mask, token ids, labels
# To lay images out: their sizes, and how many of them are each sample's.
# transformers chooses CUDA kernels for experts by the device that the tensors report.
WITHOUT_EXPERTS = [name for name in FAMILIES if not name.endswith("_moe")]
SIZES = {
    name: {(READ, "vtprune_train/models/forward/images.py"): 2 if name == "llava_onevision" else 1}
    for name in (
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        *(name for name in FAMILIES if name.startswith("qwen")),
    )
}


def ours(waits):
    return Counter({place: n for place, n in files(waits).items() if place[1].startswith("vtprune_train/")})


def labelled(name, model):
    inputs = family_inputs(name, BATCH, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return {**inputs, "labels": labels.masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)}


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_a_padded_step_reads_its_inputs_once_and_copies_nothing(name):
    model = prune(family_model(name), HALF).train()
    inputs = labelled(name, model)
    expected = model(**inputs).loss.item()
    with FakeCuda() as cuda:
        cuda.put(model)
        loss = model(**cuda.put(inputs)).loss
        forward = list(cuda.waits)
        loss.backward()
        during_backward = cuda.waits[len(forward) :]
        cuda.waits.clear()
        with dense(model):
            model(**cuda.put(inputs))
    assert ours(forward) == Counter({PADDED: 3, **SIZES.get(name, {})})
    assert ours(during_backward) == Counter()
    assert len(forward) - ours(forward).total() <= len(cuda.waits), "transformers waits more often than when dense"
    assert abs(loss.elem - expected) < 1e-5 * expected


# Before anything runs, generate also looks for equal prompts (with transformers from 5.18 on).
SHARED = {(READ, "vtprune_train/models/forward/shared_prefill.py"): 1}
GENERATE = {PADDED: 2, **(SHARED if hasattr(GenerationMixin, "_expand_multimodal_outputs") else {})}


def generated(model, inputs):
    special = list(range(len(SPECIAL)))
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=special)


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_generation_reads_the_prompt_only_and_copies_nothing(name):
    """Decoding steps do not wait in this project's code; transformers asks after each whether all rows have ended."""
    model = prune(family_model(name), HALF)
    inputs = family_inputs(name, BATCH)
    expected = generated(model, inputs)
    with FakeCuda() as cuda:
        found = generated(cuda.put(model), cuda.put(inputs))
    assert torch.equal(found.elem, expected)
    assert ours(cuda.waits) == Counter({**GENERATE, **SIZES.get(name, {})})


@pytest.mark.parametrize("name", NAMES)
def test_every_method_generates_without_copies(name):
    torch.manual_seed(3)
    model = prune(family_model("llava_next"), built(name)).eval()
    inputs = family_inputs("llava_next", BATCH)
    expected = generated(model, inputs)
    with FakeCuda() as cuda:
        found = generated(cuda.put(model), cuda.put(inputs))
    assert torch.equal(found.elem, expected)
    reads = {**GENERATE, **SIZES["llava_next"], **dict(ADAPTIVE.get(name, {}))}
    if key_layers := 0 if name == NONE else len(built(name).key_layers(6)):
        reads[READ, "vtprune_train/models/forward/keys.py"] = (
            key_layers  # a cache is rectangular: how many keys are left
        )
    assert ours(cuda.waits) == Counter(reads)


MULTI_TURN = {
    # what the cache holds, once a call
    "pyramiddrop": {PADDED: 2, (READ, "vtprune_train/models/forward/staging.py"): 1},
    # the conversation, once to add this turn and once to lay it out again
    "keep_dense": {PADDED: 4},
}


@pytest.mark.parametrize(("name", "settings"), [("pyramiddrop", {}), ("keep_dense", {"multi_turn": "keep_dense"})])
def test_a_second_turn_reads_the_cache_once(name, settings):
    model = prune(family_model("llava_next"), replace(HALF, **settings))
    first = family_inputs("llava_next", [["user", 0, "what is shown ? assistant :"], ["is the dog red ?"]])
    second = family_inputs("llava_next", [["and", 1, "left ? assistant :"], ["and here", 2, "no ?"]])
    second["attention_mask"] = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)

    def turns(model, first, second):
        cache = DynamicCache()
        with torch.no_grad():
            model(**first, past_key_values=cache, use_cache=True)
            yield
            yield model(**second, past_key_values=cache, use_cache=True).logits

    *_, expected = turns(model, first, second)
    with FakeCuda() as cuda:
        steps = turns(cuda.put(model), cuda.put(first), cuda.put(second))
        next(steps)
        cuda.waits.clear()
        logits = next(steps)
    assert (logits.elem - expected).abs().max() < 1e-4
    assert ours(cuda.waits) == Counter({**MULTI_TURN[name], **SIZES["llava_next"]})


# --------------------------------------------------------------------------------------------- around the model


def test_evaluation_pins_its_batches_and_reads_one_result_each(tmp_path):
    setup = Setup("llava", tmp_path)
    parts = setup.parts()
    model, collate = prune(parts.model, HALF), setup.collator(parts, HALF)

    def run(device):
        return evaluate(model, collate, max_tokens=60, device=device, workers=0, mark=lambda _: None)

    expected, batches = run(torch.device("cpu")), []
    model.register_forward_hook(lambda *_: batches.append(1))
    with FakeCuda() as cuda:
        cuda.put(model)
        assert run(DEVICE) == pytest.approx(expected, rel=1e-4)
    assert len(batches) > 1
    assert files(cuda.waits) == Counter(
        {
            (READ, "vtprune_train/training/loop/evaluate.py"): len(batches),
            (READ, "vtprune_train/training/distributed.py"): 1,
        }
    )


@pytest.mark.parametrize("kept_in", ["averaged_gradients", "fp32_groups_gradients_flat", "parameters"])
def test_the_gradient_norm_does_not_wait(kept_in):
    pieces = [torch.arange(4.0), torch.ones(2, 3)]
    with FakeCuda() as cuda:
        held = [cuda.put(piece) for piece in pieces]
        optimizer = SimpleNamespace(**{kept_in: {0: held, 1: None} if kept_in == "averaged_gradients" else held})
        module = SimpleNamespace(parameters=lambda: [SimpleNamespace(grad=piece) for piece in held])
        engine = SimpleNamespace(optimizer=optimizer, module=module, device=DEVICE)
        found = squared_norm(engine, world_size=1)
    assert cuda.waits == [] and isinstance(found, CudaTensor)
    assert float(found.elem) == pytest.approx(14 + 6)
