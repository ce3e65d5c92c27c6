"""What would wait for a GPU, or mix devices on one: every method and every family, on tensors that claim to be on CUDA.

Training on packed batches never waits between the start of the forward pass and the end of the backward pass, but for
what is listed here with its reason. ``OTHERS`` and ``TOWERS`` count waits in code of transformers.
"""

from __future__ import annotations

from collections import Counter

import fake_varlen  # noqa: F401, attention that CUDA alone has
import pytest
import torch
from fake_cuda import READ, FakeCuda
from families import FAMILIES, family_inputs, family_model
from helpers import tiny_model
from test_families import BATCH, HALF
from test_loop_families import RECORDS, Setup
from test_phases import parts  # noqa: F401

from vtprune_train import prune
from vtprune_train.models.build import set_trainable
from vtprune_train.pruning import METHODS, NONE, method_class, method_from_settings
from vtprune_train.pruning.phases import FullTokens, Phases
from vtprune_train.training.run import checkpoint_activations

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
    with FakeCuda() as cuda:
        model, pinned = cuda.put(make()), batch.pin_memory()
        moved = pinned.to("cuda")
        assert cuda.waits == [], "a pinned batch is copied without waiting"
        there = model(moved).loss_sum
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
PRUMERGE = {(READ, "vtprune_train/pruning/prumerge.py"): 1}
SPARSEVLM = {(READ, "vtprune_train/pruning/sparsevlm.py"): 3}
ADAPTIVE = {"prumerge": PRUMERGE}


def method_model(method, checkpointed=False, dtype=torch.float32, **settings):
    torch.manual_seed(3)  # of parameters that the method adds
    model = prune(tiny_model().to(dtype), method, **settings).train()
    set_trainable(model, ALL_PARTS)
    if checkpointed:
        checkpoint_activations(model)
    return model


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", NAMES)
def test_training_does_not_wait(parts, name, checkpointed):  # noqa: F811
    batch = parts.collator(Phases(built(name))).pack(parts.loaded, step=0)
    check_training(lambda: method_model(built(name), checkpointed), batch, forward=ADAPTIVE.get(name, ()))


VARIANTS = [
    ({"method": "pyramiddrop", "rank_with": "this_layer", "positions": "keep"}, {}),
    ({"method": "sparsevlm", "count": "rank"}, SPARSEVLM),
    ({"method": "sparsevlm", "count": "mass"}, SPARSEVLM),
    ({"method": "sparsevlm", "gravity": True, "recycle": "none"}, {}),
    ({"method": "prumerge", "spatial": 3.0}, PRUMERGE),
    ({"method": "prumerge", "keep": 0.25}, {}),
    ({"method": "fopru", "strategy": "row"}, {}),
    ({"method": "hidrop", "differentiable": False}, {}),
]


@pytest.mark.parametrize(("settings", "forward"), VARIANTS, ids=lambda value: "-".join(map(str, dict(value).values())))
def test_other_settings_do_not_wait_either(parts, settings, forward):  # noqa: F811
    method = method_from_settings(settings)
    batch = parts.collator(Phases(method)).pack(parts.loaded, step=0)
    check_training(lambda: method_model(method), batch, forward)


def test_a_step_on_all_tokens_with_a_teacher_does_not_wait(parts):  # noqa: F811
    method = built("pyramiddrop")
    batch = parts.collator(Phases(method, full=FullTokens(share=1.0, weight=1.0))).pack(parts.loaded, step=0)
    assert batch.teacher is not None
    check_training(lambda: method_model(method), batch)


@pytest.mark.parametrize("name", ["none", "pyramiddrop", "plphp"])
def test_the_variable_length_kernels_get_what_they_want(parts, name):  # noqa: F811
    """Lengths in int32 on the device and on the host, which agree; in half precision, as CUDA has it."""
    batch = parts.collator(Phases(built(name))).pack(parts.loaded, step=0)
    with FakeCuda() as cuda:
        model = cuda.put(method_model(built(name), dtype=torch.bfloat16, attention="varlen_sdpa"))
        model.model.language_model.config._attn_implementation = "packed_varlen_torch"
        loss = model(batch.pin_memory().to("cuda")).loss_sum
        loss.backward()
    assert cuda.waits == []
    expected, grads = trained(method_model(built(name), dtype=torch.bfloat16), batch)
    assert abs(loss.elem - expected) < 0.02 * expected
    found = {key: p.grad.elem for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()


# ---------------------------------------------------------------------------------------- families, packed batches

# Waits in transformers' own towers, (forward, backward): none is the aim.
TOWERS = {
    "llava": ({}, {}),
    "llava_onevision": ({}, {}),
    "qwen2_5_vl": ({}, {}),
}


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

# What a padded call reads on the host: masks, token ids, labels; and sizes of images, to lay them out.
SIZES = {
    "llava_next": {(READ, "vtprune_train/models/families/llava_next.py"): 1},
    "llava_onevision": {(READ, "vtprune_train/models/families/llava_onevision.py"): 2},
    **{name: {(READ, "vtprune_train/models/families/base.py"): 1} for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}


def ours(waits):
    return Counter({place: n for place, n in files(waits).items() if place[1].startswith("vtprune_train/")})


def labelled(name, model):
    inputs = family_inputs(name, BATCH, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return {**inputs, "labels": labels.masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_step_reads_its_inputs_once_and_copies_nothing(name):
    model = prune(family_model(name), HALF).train()
    inputs = labelled(name, model)
    expected = model(**inputs).loss.item()
    with FakeCuda() as cuda:
        cuda.put(model)
        loss = model(**cuda.put(inputs)).loss
        forward = list(cuda.waits)
        loss.backward()
    assert ours(forward) == Counter({(READ, "vtprune_train/models/padded.py"): 3, **SIZES.get(name, {})})
    assert ours(cuda.waits) == ours(forward), "the backward pass waits"
    assert abs(loss.elem - expected) < 1e-5 * expected
