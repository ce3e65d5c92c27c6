"""The shipped recipes: what they resolve to, and their comments."""

from pathlib import Path

import pytest
import yaml

from vtprune_train.config.load import dump_config, load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
RESOLVED = yaml.safe_load((ROOT / "tests/fixtures/recipes/version_0_1_0.yaml").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_to_the_settings_of_version_0_1_0(path):
    """Settings added since then have their defaults."""
    config = load_config(str(path))
    now, then = yaml.safe_load(dump_config(config)), dict(RESOLVED[path.name])
    assert config.deepspeed == then.pop("deepspeed_file")
    assert now.keys() == then.keys() and now["deepspeed"] == then["deepspeed"]
    for section in ("run", "model", "data", "pruning", "train"):
        assert {key: now[section].get(key, "missing") for key in then[section]} == then[section]
