"""Started on two ranks: a pruned model whose parameters are sharded equals the unsharded one, method by method.

sharded.py KIND METHOD...    compares loss, gradients, kept tokens and generated tokens; each rank has another batch

KIND is one of SHARDED or SPLIT. A METHOD is a name of the registry, or one of OTHERS; FAMILY/METHOD is for another
family than LLaVA-NeXT.
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlavaNextForConditionalGeneration

from tests.support.families import family_inputs, family_model
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.models.patch import method_of
from vtprune_train.pruning import method_class
from vtprune_train.pruning.combined import Combined

OTHERS = {
    "this_layer": lambda: PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), rank_with="this_layer"),
    "combined": lambda: Combined((method_class("divprune")(), method_class("pyramiddrop")())),
}
BATCHES = [
    [["user :", 0, "what is shown here ? assistant : yes ."], ["a red", 1, "and", 2, "two ? assistant : no ."]],
    [["user :", 3, "left ? assistant : a cat ."], ["user :", 1, "what is a dog ? assistant : a red cat ."]],
]
ANSWER = 3  # supervised tokens at the end of each row


def batch_of(number, name=""):
    inputs = family_inputs(family_of(name), BATCHES[number])
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    return {**inputs, "labels": labels}


def family_of(name):
    return name.split("/")[0] if "/" in name else "llava_next"


def built(name, checkpointing):
    method = name.split("/")[-1]
    model = prune(
        family_model(family_of(name)), OTHERS[method]() if method in OTHERS else method_class(method)()
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def layers_of(model):
    return model.model.language_model.layers


def tower_layers_of(model):
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    return max((module for module in tower.modules() if isinstance(module, torch.nn.ModuleList)), key=len)


def mesh():
    return init_device_mesh("cpu", (2,))


def fsdp2(model):
    for layer in (*layers_of(model), *tower_layers_of(model)):
        fully_shard(layer, mesh=mesh())
    if model.lm_head.weight is not model.model.language_model.embed_tokens.weight:
        fully_shard([model.model.language_model.norm, model.lm_head], mesh=mesh())
    return fully_shard(model, mesh=mesh())


def fsdp2_first(model):
    """Sharded before it is pruned, as transformers opens a model with ``DistributedConfig(fsdp_size=2)``."""
    method = method_of(model)
    return prune(fsdp2(unprune(model)), method)


def fsdp2_of_blocks(model):
    """Attention and MLP apart, pairs of layers in one group, and a decoder of its own."""
    for layer in layers_of(model)[:4]:
        fully_shard(layer.self_attn, mesh=mesh())
        fully_shard(layer.mlp, mesh=mesh())
        fully_shard(layer, mesh=mesh())
    fully_shard(list(layers_of(model)[4:6]), mesh=mesh())
    return fully_shard(model, mesh=mesh())


def fsdp1(model):
    policy = ModuleWrapPolicy({type(layers_of(model)[0]), type(tower_layers_of(model)[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def zero3(model, leaf=False):
    import deepspeed

    if leaf:
        deepspeed.utils.set_z3_leaf_modules(model, [type(layers_of(model)[0])])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def zero3_leaf(model):
    return zero3(model, leaf=True)


SHARDED = {f.__name__: f for f in (fsdp2, fsdp2_first, fsdp2_of_blocks, fsdp1, zero3, zero3_leaf)}


def gradients(kind, wrapped, model):
    """Whole gradients by parameter name."""
    if kind.startswith("zero3"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            named = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in wrapped.named_parameters()}
            return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
    return {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}


def expected_of(name, checkpointing):
    """Without sharding: losses and generated tokens of both batches, and the mean of their gradients."""
    torch.manual_seed(3)  # of parameters that a method adds
    model = built(name, checkpointing)
    losses = [model(**batch_of(number, name)).loss for number in range(2)]
    (sum(losses) / 2).backward()
    return losses, {key: p.grad for key, p in model.named_parameters()}, [generated(model, n, name) for n in range(2)]


def generated(model, number, name):
    model.eval()
    inputs = {key: value for key, value in batch_of(number, name).items() if key != "labels"}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def check(kind, name, checkpointing):
    losses, grads, tokens = expected_of(name, checkpointing)
    torch.manual_seed(3)
    model = built(name, checkpointing)
    wrapped = SHARDED[kind](model)
    rank = dist.get_rank()
    place = f"{kind} {name} checkpointing={checkpointing}"
    for _ in range(2):
        loss = wrapped(**batch_of(rank, name)).loss
        assert torch.allclose(loss, losses[rank], rtol=1e-6, atol=1e-6), f"{place}: loss {loss} for {losses[rank]}"
    wrapped.backward(loss) if kind.startswith("zero3") else loss.backward()
    largest = max(float(grad.abs().max()) for grad in grads.values() if grad is not None)
    for key, grad in gradients(kind, wrapped, model).items():
        if grads[key] is None:
            assert grad is None or not grad.any(), f"{place}: {key}"
            continue
        difference = float((grad - grads[key]).abs().max())
        assert difference < 1e-5 * largest, f"{place}: gradient of {key} differs by {difference} of {largest}"
    if kind.startswith("fsdp2"):
        register_fsdp_forward_method(model, "generate")  # images are encoded outside forward, dense models too
        assert torch.equal(generated(model, rank, name), tokens[rank]), f"{place}: other tokens"
        unprune(model)
        assert not any("_vtprune" in key for module in model.modules() for key in module.__dict__)


def tensor_parallel(name, folder):
    """Opened by transformers with its plan; equal where no attention is read, else refused."""
    if dist.get_rank() == 0:
        family_model("llava_next").save_pretrained(folder)
    dist.barrier()
    plain, split = (family_model_of(folder, **plan) for plan in ({}, {"tp_plan": "auto"}))
    inputs = {key: value for key, value in batch_of(0).items() if key != "labels"}
    with torch.no_grad():
        for model in (plain, split):
            prune(model, method_class(name)())
        assert torch.allclose(split(**inputs).logits, plain(**inputs).logits, atol=1e-3)


def automatic_tensor_parallel(name, folder):
    """DeepSpeed's AutoTP splits the heads after ``prune``."""
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": 2}}
    model = prune(family_model("llava_next"), method_class(name)())
    with torch.no_grad():
        expected = model(**batch_of(0)).loss
        engine = deepspeed.initialize(model=model, config=settings, dist_init_required=False)[0]
        assert torch.allclose(engine(**batch_of(0)).loss, expected, atol=1e-4)


def family_model_of(folder, **plan):
    return LlavaNextForConditionalGeneration.from_pretrained(folder, **plan).eval()


def learned_after_fsdp(name, folder):
    model = family_model("llava_next")
    fsdp2(model)
    prune(model, method_class(name)())


def gradients_through_a_leaf(name, folder):
    zero3_leaf(built(name, checkpointing=False))(**batch_of(0))


SPLIT = {
    function.__name__: function
    for function in (tensor_parallel, automatic_tensor_parallel, learned_after_fsdp, gradients_through_a_leaf)
}


def refused(kind, name, folder):
    """What is said, or that it is equal."""
    try:
        SPLIT[kind](name, folder)
    except ValueError as error:
        return str(error)
    return "equal"


def main(kind, *names):
    dist.init_process_group("gloo")
    for name in names:
        if kind in SPLIT:
            said = refused(kind, name, os.environ["SHARDED_FOLDER"])
        else:
            for checkpointing in (False, True):
                check(kind, name, checkpointing)
            said = "equal"
        if dist.get_rank() == 0:
            print(f"{kind} {name}: {said}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
