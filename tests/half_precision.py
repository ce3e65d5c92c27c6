"""Run by one rank: bfloat16 logits of every family as training starts it, against ``from_pretrained``.

Writes to the path given, for each family and origin, whether they are equal at all positions of a long prompt, and
which buffers differ.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from families import FAMILIES, family_inputs, family_model, tokenizer
from helpers import PINPOINTS

from vtprune_train.config import ModelConfig
from vtprune_train.models.build import build_model, load_tokenizer
from vtprune_train.models.families import family_of
from vtprune_train.training.engine import start_distributed, start_engine

LONG = [["what", "is", "shown", 0, *["a", "red", "cat", "on", "the", "left"] * 200]]
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}


def origins(name, checkpoint, folder):
    """The ways in which this family's model comes to training, as ``model`` sections."""
    yield "path", {"path": str(checkpoint)}
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
    if family_of(reference).loop is None:  # not trained by the loop: as a library's user opens it
        model = type(reference).from_pretrained(settings["path"], dtype=torch.bfloat16)
    else:
        config = ModelConfig(**settings)
        model = build_model(config, load_tokenizer(config, list, folder / "none"))
        if "config" in settings:
            model.load_state_dict(reference.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return start_engine(model.eval(), optimizer, SETTINGS).module


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
                model = started(settings, reference, folder)
                buffers = dict(model.named_buffers())
                with torch.no_grad():
                    expected, logits = (m(**inputs).logits for m in (reference, model))
                found[f"{name} from {origin}"] = {
                    "positions": logits.shape[1],
                    "dtype": str(logits.dtype),
                    "largest_difference": float((logits.float() - expected.float()).abs().max()),
                    "buffers": [n for n, b in reference.named_buffers() if not torch.equal(b, buffers[n])],
                }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
