"""A family in a file outside the package: pruned, trained by the loop, exported, asked."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from tests.support.families import BATCH, family_inputs
from tests.support.family_runs import FamilyRuns
from tests.support.helpers import PATCH, TILE
from tests.support.runner import BIN
from vtprune_train import PyramidDrop, VisionZip, prune, register_family
from vtprune_train.core.user_code import load
from vtprune_train.models.families import FAMILIES, KNOWN_CONFIGS, llava
from vtprune_train.models.io.build import load_any_config

FAMILY_FILE = """
from dataclasses import replace

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vtprune_train.models.families import llava


class PalmConfig(LlavaConfig):
    model_type = "palm_llava"


class PalmForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = PalmConfig


AutoConfig.register("palm_llava", PalmConfig)
AutoModelForImageTextToText.register(PalmConfig, PalmForConditionalGeneration)
AutoProcessor.register(PalmConfig, LlavaProcessor)

FAMILY = replace(
    llava.FAMILY,
    title="Palm",
    model_type="palm_llava",
    model_class="PalmForConditionalGeneration",
    known={"palm/palm-7b": PalmConfig},
)
"""
VIP_FILE = """
from dataclasses import replace

import numpy as np

from vtprune_train.models.families import llava
from vtprune_train.models.families.base import Lacks


def patches(config, inputs):
    vision = config.vision_config
    return [(np.arange((vision.image_size // vision.patch_size) ** 2), 1)] * len(inputs["pixel_values"])


FAMILY = replace(
    llava.FAMILY,
    title="VipLLaVA",
    model_type="vipllava",
    model_class="VipLlavaForConditionalGeneration",
    known={},
    patches=patches,
    loop=Lacks("its projector reads several layers"),
)
"""
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 120}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("family")
    (made / "palm_family.py").write_text(FAMILY_FILE)
    (made / "vip_family.py").write_text(VIP_FILE)
    return made


@pytest.fixture(autouse=True)
def registry():
    """As it was before."""
    families, configs = list(FAMILIES), dict(KNOWN_CONFIGS)
    yield
    FAMILIES[:] = families
    KNOWN_CONFIGS.clear()
    KNOWN_CONFIGS.update(configs)


def tiny(config_class, **sizes):
    vision = CLIPVisionConfig(**VISION, image_size=TILE, patch_size=PATCH)
    text = LlamaConfig(**TEXT, pad_token_id=3)
    return config_class(
        text_config=text, vision_config=vision, image_token_id=4, image_seq_length=(TILE // PATCH) ** 2, **sizes
    )


def palm(folder):
    torch.manual_seed(0)
    config_class = load(f"{folder / 'palm_family.py'}:PalmConfig", "family")
    return AutoModelForImageTextToText.from_config(tiny(config_class)).float().eval()


def test_it_is_pruned(folder):
    inputs = family_inputs("llava", BATCH)
    path = f"{folder / 'palm_family.py'}:FAMILY"
    model = palm(folder)
    assert prune(model, None).config.model_type == "palm_llava", "its base class is LLaVA's, whose family would fit too"
    dense = palm(folder)(**inputs).logits
    family = register_family(path)
    assert register_family(path) is family and FAMILIES.count(family) == 1
    assert "palm/palm-7b" in KNOWN_CONFIGS
    model = palm(folder)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(prune(model, None)(**inputs).logits[real], dense[real], atol=1e-4)
    model = prune(palm(folder), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    assert not torch.allclose(model(**inputs).logits[real], dense[real], atol=1e-4)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_what_is_no_family_is_refused(folder):
    (folder / "wrong_family.py").write_text("FAMILY = 'llava'\n")
    with pytest.raises(ValueError, match=r"--family='\S+wrong_family.py:FAMILY' is not a Family"):
        register_family(f"{folder / 'wrong_family.py'}:FAMILY", "--family")
    with pytest.raises(ValueError, match="is already used by LLaVA"):
        register_family(llava.FAMILY)
    for taken in ("llava-hf/llava-1.5-7b-hf", "lmsys/vicuna-7b-v1.5"):
        before = dict(KNOWN_CONFIGS)
        with pytest.raises(ValueError, match=f"known of Other names {taken}, a checkpoint with another config"):
            register_family(
                replace(llava.FAMILY, title="Other", model_type="o", model_class="O", known={taken: LlavaConfig})
            )
        assert before == KNOWN_CONFIGS and all(family.title != "Other" for family in FAMILIES)


@pytest.mark.parametrize("method", [PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)), VisionZip(keep=0.25)])
def test_image_features_in_one_tensor(folder, method):
    """VipLLaVA's come stacked; samples one by one give what they give together."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    register_family(f"{folder / 'vip_family.py'}:FAMILY")
    torch.manual_seed(0)
    config = tiny(VipLlavaConfig)
    config.vision_feature_layer = config.vision_feature_layers = [-2, 1, -4]
    config.projector_hidden_act = "gelu"
    model = prune(VipLlavaForConditionalGeneration(config).float().eval(), method)
    texts = [text for text in BATCH if any(isinstance(part, int) for part in text)]
    together = model(**family_inputs("llava", texts)).logits
    for text, logits in zip(texts, together, strict=True):
        alone = model(**family_inputs("llava", [text])).logits[0]
        assert torch.allclose(logits[-1], alone[-1], atol=1e-4)
    assert model.generate(**family_inputs("llava", texts), max_new_tokens=2).shape[0] == len(texts)


@pytest.mark.slow
def test_the_loop_trains_and_exports_it(folder, tmp_path):
    path = f"{folder / 'palm_family.py'}:FAMILY"
    runs = FamilyRuns(tmp_path, "llava")
    palm(folder).save_pretrained(runs.model)
    said = runs.train("unnamed", expect=2).stderr
    assert "'palm_llava' is unknown to transformers" in said and "model.family" in said
    dry = runs.train("dry", f"model.family={path}", "--dry_run").stdout
    assert "6 layers of width 32" in dry
    runs.train("named", f"model.family={path}", "data.workers=1")
    assert len(runs.metrics("named")) == 4
    hf = runs.checkpoint("named") / "hf"
    assert json.loads((hf / "config.json").read_text())["model_type"] == "palm_llava"
    command = [
        "eval",
        "--model",
        str(runs.directory("named")),
        "--data",
        str(tmp_path / "data" / "eval.json"),
        "--images",
        str(tmp_path / "data" / "images"),
        "--limit",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    refused = subprocess.run([BIN / "vtprune", *command], capture_output=True, text=True, env=runs.environment())
    assert refused.returncode == 2 and "--family: path/to/file.py:FAMILY" in refused.stderr
    asked = subprocess.run(
        [BIN / "vtprune", *command, "--family", path], capture_output=True, text=True, env=runs.environment()
    )
    assert asked.returncode == 0, asked.stderr
    assert "pruned" in asked.stdout


def test_its_type_is_named_where_nobody_registered_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_llava"}))
    with pytest.raises(ValueError, match=r"model_type 'nobody_llava' is unknown to transformers; .*--family"):
        load_any_config(str(tmp_path), "--model=here", offline=False)
