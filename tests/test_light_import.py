"""``prune`` works with PyTorch, transformers (and what that requires), numpy, safetensors and pydantic alone."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ABSENT = [
    "PIL", "accelerate", "av", "bitsandbytes", "datasets", "deepspeed", "matplotlib", "pandas", "peft", "pyarrow",
    "scipy", "sklearn", "tensorboard", "torchcodec", "torchvision", "trl", "wandb",
]  # fmt: skip

SCRIPT = """
import sys
from importlib.machinery import PathFinder


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in sys.argv[1:] else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
config = LlavaNextConfig(
    text_config=LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes),
    vision_config=CLIPVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **sizes),
    image_token_index=63,
    image_grid_pinpoints=[[28, 56], [56, 28]],
)
model = LlavaNextForConditionalGeneration(config).eval()
imported = set(sys.modules)

from vtprune_train import FastV, kept_tokens, prune

prune(model, FastV(layer=2, keep=0.5))
input_ids = torch.tensor([[1, *[63] * 10, 5, 6]])
inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
inputs |= {"pixel_values": torch.randn(1, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
model(**inputs).logits.sum().backward()
tokens = model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False)
print(tokens.shape[1], len(kept_tokens(model, inputs)[0][0][0]))
print(*sorted({name.split(".")[0] for name in set(sys.modules) - imported} - sys.stdlib_module_names))
"""


def test_prune_and_generate_without_the_other_packages():
    command = [sys.executable, "-c", SCRIPT, *ABSENT]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lengths, imported = found.stdout.splitlines()[-2:]
    assert lengths == "16 5"
    allowed = {"annotated_types", "numpy", "pydantic", "pydantic_core", "safetensors", "torch", "transformers"}
    allowed |= {"_zoneinfo", "typing_extensions", "typing_inspection", "vtprune_train"}
    assert set(imported.split()) <= allowed
