"""Run by one rank: half-precision logits of every family as training starts it, against ``from_pretrained``.

Writes to the path given, for each family and origin and each ZeRO stage and dtype, whether they are equal at all
positions of a long prompt, which buffers differ, and the dtypes of parameters.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.support.families import FAMILIES, family_inputs, family_model, tokenizer
from tests.support.helpers import PINPOINTS
from vtprune_train import prune
from vtprune_train.config.model import ModelConfig, PeftConfig
from vtprune_train.models.families import family_of
from vtprune_train.models.families.base import Lacks
from vtprune_train.models.io.build import build_model
from vtprune_train.models.io.peft import adapt
from vtprune_train.models.io.tokenizer import load_tokenizer
from vtprune_train.training.engine.start import start_distributed, start_engine
from vtprune_train.training.optimizer import OptimizerSpec

LONG = [["what", "is", "shown", 0, *["a", "red", "cat", "on", "the", "left"] * 200]]
ADAMW = OptimizerSpec("adamw", torch.optim.AdamW)
STAGES = {"bfloat16": (0, 1, 2, 3), "float32": (0, 1, 2, 3)}  # DeepSpeed's CPU accelerator has no float16


def settings_of(dtype, stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage},
    }


def origins(name, checkpoint, folder):
    """The ways in which this family's model comes to training, as ``model`` sections."""
    yield "path", {"path": str(checkpoint)}
    yield "path with LoRA", {"path": str(checkpoint), "peft": {"kind": "lora", "r": 4}}
    if name not in ("llava", "llava_next"):
        return
    model = family_model(name)
    model.model.language_model.config.architectures = ["LlamaForCausalLM"]
    pinpoints = {"image_grid_pinpoints": PINPOINTS if name == "llava_next" else None}
    config = model.config.to_dict()
    drop = ("architectures", "dtype", "transformers_version")
    yield "config", {"config": {k: v for k, v in config.items() if k not in drop}, "tokenizer": str(checkpoint)}
    language = save_language_model(model, folder / "language")
    model.model.vision_tower.save_pretrained(folder / "tower")
    tokenizer().save_pretrained(language)
    parts = {"language_model": str(language), "vision_tower": str(folder / "tower"), "projector": str(checkpoint)}
    yield "parts", {**parts, **pinpoints}


def save_language_model(model, folder):
    from transformers import LlamaForCausalLM

    language = LlamaForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(folder)
    return folder


def started(settings, reference, folder):
    """The model inside DeepSpeed's engine."""
    if isinstance(family_of(reference).loop, Lacks):  # not trained by the loop: as a library's user opens it
        model = type(reference).from_pretrained(settings["path"], dtype=torch.bfloat16)
    else:
        config = ModelConfig(**{key: value for key, value in settings.items() if key != "peft"})
        model = build_model(config, load_tokenizer(config, list, folder / "none"))
        if "config" in settings:
            model.load_state_dict(reference.state_dict())
    if "peft" in settings:
        adapt(model, PeftConfig(**settings["peft"]))
    return inside_engine(model, "bfloat16", 2)


def inside_engine(model, dtype, stage):
    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    return start_engine(model.eval(), groups, ADAMW, settings_of(dtype, stage)).module


def compared(reference, model, inputs):
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        expected, logits = (m(**inputs).logits for m in (reference, model))
    return {
        "positions": logits.shape[1],
        "dtype": str(logits.dtype),
        "parameters": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "largest_difference": float((logits.float() - expected.float()).abs().max()),
        "buffers": [
            n for n, b in reference.named_buffers() if buffers[n].dtype != b.dtype or not torch.equal(b, buffers[n])
        ],
    }


def main(out):
    start_distributed(60)
    found = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            family_model(name).save_pretrained(folder / "checkpoint")
            tokenizer().save_pretrained(folder / "checkpoint")
            reference = type(family_model(name)).from_pretrained(folder / "checkpoint", dtype=torch.bfloat16).eval()
            inputs = family_inputs(name, LONG)
            for origin, settings in origins(name, folder / "checkpoint", folder):
                found[f"{name} from {origin}"] = compared(reference, started(settings, reference, folder), inputs)
            for dtype, stages in STAGES.items():
                for stage in stages if name in ("llava_next", "qwen2_5_vl") or dtype == "bfloat16" else ():
                    opened = [
                        type(reference).from_pretrained(folder / "checkpoint", dtype=getattr(torch, dtype)).eval()
                        for _ in range(2)
                    ]
                    model = inside_engine(prune(opened[1], None), dtype, stage)
                    found[f"{name} in {dtype}, ZeRO-{stage}"] = compared(prune(opened[0], None), model, inputs)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
