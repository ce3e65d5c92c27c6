"""Several requests at once on one pruned model, a thread each, as servers call it: each gives what it gives alone."""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from tests.support.families import FAMILIES, family_inputs, family_model
from vtprune_train import PyramidDrop, dense, is_pruned, prune
from vtprune_train.models.copies import Source
from vtprune_train.models.forward.compile import compile_layers
from vtprune_train.pruning import METHODS, NONE, method_class

pytestmark = pytest.mark.slow

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep")
PROMPTS = [
    [["user :", 0, "what is shown here ? assistant :"]],
    [["a red", 1, "and", 2, "two ? assistant :"], ["user :", 3, "left ? yes assistant :"]],
    [["what is a dog ? assistant :"]],
    [["user :", 1, "is the cat on the left ? assistant :"]],
]
ROUNDS = 3


@pytest.fixture(autouse=True)
def frequent_switches():
    """Threads take turns often, so that what they share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def generated(model, inputs):
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=3)


def scored(model, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return model(**inputs, labels=labels).loss


def requests(name):
    """Functions of the model: prompts to answer and answers to score, in turn."""
    batches = [family_inputs(name, prompts) for prompts in PROMPTS]
    return [lambda m, i=i: generated(m, i) for i in batches] + [lambda m, i=i: scored(m, i) for i in batches[:2]]


def at_once(model, functions):
    """What each function of the model gives while all others run too."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        with torch.no_grad():
            return [function(model) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(functions)) as pool:
        return [result for results in pool.map(run, functions) for result in results]


def check_at_once(model, functions):
    with torch.no_grad():
        alone = [function(model) for function in functions]
    together = at_once(model, functions)
    expected = [result for result in alone for _ in range(ROUNDS)]
    assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


@pytest.mark.parametrize("name", [*METHODS, NONE])
def test_every_method(name):
    torch.manual_seed(3)  # of parameters that the method adds
    method = None if name == NONE else method_class(name)()
    check_at_once(prune(family_model("llava_next"), method), requests("llava_next"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    check_at_once(prune(family_model(name), HALF), requests(name))


def follow_up(model, inputs, generates, between):
    """A second turn on the cache of the first."""
    cache = DynamicCache()
    more = torch.tensor([[14, 15, 16]]).expand(len(inputs["input_ids"]), -1)
    if not generates:
        model(**inputs, past_key_values=cache)
        between()
        return model(input_ids=more, past_key_values=cache).logits
    said = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=3)
    between()
    ids = torch.cat([said, more], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 3}
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)


@pytest.mark.parametrize("generates", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_requests_between_the_turns_of_another(name, generates):
    """Of other numbers of rows, whose positions transformers keeps on Qwen's modules."""
    model = prune(family_model(name), HALF)
    batches = [family_inputs(name, prompts) for prompts in (PROMPTS[1] + PROMPTS[2], *PROMPTS)]
    with torch.no_grad():
        for inputs in batches[1:3]:
            alone = follow_up(model, inputs, generates, lambda: None)
            for other in batches:
                for request in (generated, scored):
                    assert torch.equal(follow_up(model, inputs, generates, lambda: request(model, other)), alone)  # noqa: B023


def test_a_compiled_tower_that_is_read():
    """A request that reads the tower runs it without compilation, in its own thread alone."""
    model = prune(family_model("llava_next"), method_class("visionzip")())
    check_at_once(compile_layers(model, backend="eager"), requests("llava_next"))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_dense_is_of_its_own_thread(name):
    model = prune(family_model(name), HALF)

    def densely(function):
        def run(model):
            with dense(model):
                assert not is_pruned(model)
                return function(model)

        return run

    functions = requests(name)
    # transformers keeps rope_deltas of a generation on Qwen's modules, so two dense ones at once are not its own
    own = functions[:3] if name == "llava_next" else functions[4:]
    check_at_once(model, [*functions[:3], *map(densely, own)])
    assert is_pruned(model)


def test_dense_is_of_its_own_task():
    """What a task starts in a thread belongs to it."""
    model = prune(family_model("llava_next"), HALF)

    async def densely(entered, checked):
        with dense(model):
            entered.set()
            await checked.wait()
            return is_pruned(model), await asyncio.to_thread(is_pruned, model)

    async def main():
        entered, checked = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(densely(entered, checked))
        await entered.wait()
        elsewhere = is_pruned(model)
        checked.set()
        return elsewhere, await task

    assert asyncio.run(main()) == (True, (False, False))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
@pytest.mark.parametrize("in_dense", [False, True], ids=["pruned", "dense"])
def test_recomputed_layers_are_those_of_their_forward(name, in_dense):
    """The backward pass runs where and when it likes: in another thread (as on a GPU), within ``dense`` or outside."""

    def gradients(checkpointing, in_dense, backward_in_dense):
        model = prune(family_model(name), HALF).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if in_dense:
            with dense(model):
                loss = scored(model, family_inputs(name, PROMPTS[1]))
        else:
            loss = scored(model, family_inputs(name, PROMPTS[1]))
        if backward_in_dense:
            with dense(model):
                loss.backward()
        else:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(False, in_dense, False)
    for backward_in_dense in (False, True):
        found = gradients(True, in_dense, backward_in_dense)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_models_are_opened_while_others_are_pruned():
    """``from_pretrained`` looks through the paths of pruned models, to which ``prune`` adds."""
    sources = []

    def prune_many():
        sources.extend(Source(f"model {number}", lambda model: model) for number in range(2000))

    def open_many():
        assert all(Source.of("another") is None for _ in range(2000))

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(work) for work in (prune_many, open_many, open_many)]:
            done.result()
