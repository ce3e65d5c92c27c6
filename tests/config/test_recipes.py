"""The shipped recipes: what they resolve to, and their comments."""

from pathlib import Path

import pytest
import yaml

from vtprune_train.config.load import dump_config, load_config
from write_settings import commented

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
RESOLVED = yaml.safe_load((ROOT / "tests/fixtures/recipes/version_0_1_0.yaml").read_text())


def without_new_keys(now, then):
    """``now`` without the keys that ``then`` does not have."""
    if isinstance(then, dict):
        return {key: without_new_keys(now[key], then[key]) for key in then}
    if isinstance(then, list) and len(now) == len(then):
        return [without_new_keys(*pair) for pair in zip(now, then, strict=True)]
    return now


@pytest.mark.parametrize("path", [path for path in RECIPES if path.name in RESOLVED], ids=lambda path: path.stem)
def test_a_recipe_resolves_to_the_settings_of_version_0_1_0(path):
    """Settings added since then have their defaults."""
    config = load_config(str(path))
    now, then = yaml.safe_load(dump_config(config)), dict(RESOLVED[path.name])
    assert config.deepspeed == then.pop("deepspeed_file")
    assert without_new_keys(now, then) == then


QWEN3_5 = {
    "system": "<|im_start|>system\n{text}<|im_end|>\n",
    "user": "<|im_start|>user\n{text}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "answer": "{text}<|im_end|>",
    "separator": "\n",
    "bos": False,
}
DIFFERENCES = {
    "qwen3_vl_pdrop": {
        "model": {"path": "Qwen/Qwen3-VL-8B-Instruct", "max_pixels": 1310720},
        "data": {"template": "auto"},
        "pruning": {"layers": [9, 18, 27]},
    },
    "internvl_pdrop": {
        "model": {"path": "OpenGVLab/InternVL3_5-8B-HF", "max_pixels": None},
        "data": {"template": "auto"},
        "pruning": {"layers": [9, 18, 27], "positions": "renumber"},
    },
    "qwen3_5_pdrop": {
        "model": {"path": "Qwen/Qwen3.5-9B", "max_pixels": 1310720},
        "data": {"template": QWEN3_5},
        "pruning": {"layers": [7, 15, 23]},
    },
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_newer_recipe_differs_from_its_base_in_what_it_sets(name):
    base, now = (yaml.safe_load(dump_config(load_config(str(ROOT / "configs" / f"{recipe}.yaml"))))
                 for recipe in ("qwen2_5_vl_pdrop", name))  # fmt: skip
    for section, keys in {"run": {"name": name}, **DIFFERENCES[name]}.items():
        base[section] |= keys
    assert now == base


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_comment_of_a_setting_is_its_description(path):
    """Except where it begins with ``here:``; `make settings` rewrites the others."""
    assert path.read_text() == commented(path)


def test_comments_are_rewritten_except_those_of_the_recipe_alone(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "# A recipe.\n"
        "run: {name: x}\n"
        "model:\n"
        "  config:\n"
        "    text_config: {vocab_size: 9}  # by hand: a key of transformers\n"
        "train:  # wrong\n"
        "  clip: 1.0  # wrong\n"
        "  epochs: 2                 # here: two are enough\n"
        "pruning:\n"
        "  method: fastv\n"
        "  keep: 0.5\n"
        "data: {eval: [],\n"
        "       train: []}\n"
    )
    lines = commented(recipe).splitlines()
    assert lines[4] == "    text_config: {vocab_size: 9}  # by hand: a key of transformers"
    assert lines[6] == "  clip: 1.0                   # Maximum gradient norm; larger gradients are scaled down"
    assert lines[7] == "  epochs: 2                   # here: two are enough"
    assert lines[10] == "  keep: 0.5                   # 1 - R of the paper, in (0, 1]"
    assert yaml.safe_load("\n".join(lines)) == yaml.safe_load(recipe.read_text())
