"""What a family is stands in ``vtprune_train/models/families`` and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "vtprune_train"
FAMILIES = PACKAGE / "models" / "families"
# Families of vision-language models, their towers and language models, in names of classes and as model types.
NAMES = re.compile(r"llava|qwen|internvl|clip_?vision|clipimage|siglip|mistral|gemma|mllama|^llama$", re.IGNORECASE)
CHECKS = ("isinstance", "issubclass", "hasattr")
SETTINGS = ("tokenization",)  # whose values have such names too


def asks(node: ast.AST) -> bool:
    """Whether this is ``config.model_type``."""
    return getattr(node, "attr", None) == "model_type"


def names_one(node: ast.AST) -> bool:
    """Whether a string in ``node`` names a family, a tower or a language model."""
    strings = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return any(isinstance(text, str) and NAMES.search(text) for text in strings)


def checks_in(source: str) -> list[int]:
    """Lines that ask which family, tower or language model something is of, or import one's class."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            found = any(NAMES.search(name) for name in (node.module or "", *(alias.name for alias in node.names)))
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            is_setting = any(getattr(side, "id", None) in SETTINGS for side in sides)
            found = any(map(asks, sides)) or (any(map(names_one, sides)) and not is_setting)
        elif isinstance(node, ast.Subscript):
            found = asks(node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = asks(node.func.value) or (node.func.attr == "get" and any(map(names_one, node.args)))
            found = found or (node.func.attr in ("startswith", "endswith") and any(map(names_one, node.args)))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in CHECKS:
            kinds = ast.unparse(node.args[1])
            found = bool(NAMES.search(kinds)) or kinds in ("'depth'", "'num_grid_per_side'")
        elif isinstance(node, ast.Dict):
            found = any(names_one(key) and re.fullmatch(r"'[a-z0-9_]+'", ast.unparse(key)) for key in node.keys if key)
        else:
            continue
        lines += [node.lineno] * found
    return lines


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from transformers import LlavaNextConfig", True),
        ("from transformers.models.qwen2_vl.modeling_qwen2_vl import anything", True),
        ("if config.model_type == x: pass", True),
        ("if x in (config.model_type,) or vision.model_type not in TABLE: pass", True),
        ("TABLE[config.model_type]", True),
        ("config.model_type.startswith('a')", True),
        ("if kind == 'clip_vision_model': pass", True),
        ("isinstance(model, modeling.LlavaForConditionalGeneration)", True),
        ("hasattr(vision, 'depth')", True),
        ("TABLE = {'llava_next': 1}", True),
        ("if config['model_type'] == 'llama': pass", True),
        ("f'it holds a {config.model_type}'", False),
        ("family_of_type(config.model_type)", False),
        ("from transformers import AutoConfig", False),
        ("CONFIG_MAPPING[model_type]()", False),
        ("if tokenization == 'llava': pass", False),
        ("'llava is mentioned in a message'", False),
    ],
)
def test_what_counts_as_a_check(line, found):
    assert bool(checks_in(line)) == found


def test_no_check_of_a_family_stands_elsewhere():
    places = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {path.read_text().splitlines()[line - 1].strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if FAMILIES not in path.parents
        for line in checks_in(path.read_text())
    ]
    assert not places, "move what these lines know of a family to models/families:\n" + "\n".join(places)


def test_families_import_nothing_above_them():
    allowed = ("vtprune_train.core", "vtprune_train.models.families", "vtprune_train.models import HFModule")
    for path in FAMILIES.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from vtprune_train"):
                assert line.removeprefix("from ").startswith(allowed), f"{path.name}: {line}"
