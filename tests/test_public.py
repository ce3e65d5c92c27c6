"""The public names: what ``vtprune_train`` offers, and what type checkers, ``dir`` and ``help`` know of it."""

import ast
import dataclasses
import inspect
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vtprune_train
from tests.support.runner import ROOT
from vtprune_train import Candidates, Drop, Needs, Selection
from vtprune_train.models.families.base import Family, Loop
from vtprune_train.pruning import METHODS, method_class
from vtprune_train.pruning.base import PruningMethod

SCRIPTS = Path(__file__).parent / "fixtures" / "typing"


def typed_names():
    """The names that type checkers see, with the modules that they are imported from."""
    tree = ast.parse(Path(vtprune_train.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    return {alias.name: statement.module for statement in block.body for alias in statement.names}


def test_every_name_is_typed_listed_and_there():
    typed = typed_names()
    assert list(typed) != [] and sorted(typed) == sorted(vtprune_train.__all__)
    assert sorted(dir(vtprune_train)) == sorted([*vtprune_train.__all__, "__version__"])
    for name, module in typed.items():
        value = getattr(vtprune_train, name)
        assert value is getattr(sys.modules[module], name)
        assert name == "Share" or value.__doc__
    assert {cls.__name__ for cls in map(method_class, METHODS)} <= typed.keys()
    with pytest.raises(AttributeError, match="no attribute 'FestV'"):
        vtprune_train.FestV  # noqa: B018


def test_help_shows_what_there_is():
    text = pydoc.plain(pydoc.render_doc(vtprune_train))
    assert "prune(model, PyramidDrop(" in text and "def __getattr__" not in text
    assert all(re.search(rf"\b{name}\b", text) for name in vtprune_train.__all__)
    assert "Before decoder layer ``layer`` each image keeps" in text


def test_the_reference_lists_every_name():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function|data):: (\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted([*vtprune_train.__all__, "Callback", "Trainer"])


@pytest.mark.parametrize("cls", [Family, Loop, Needs, Candidates, Selection, Drop], ids=lambda cls: cls.__name__)
def test_every_field_has_its_entry_in_the_docstring(cls):
    _, _, entries = re.split(r"^(Args|Attributes):$", inspect.getdoc(cls), maxsplit=1, flags=re.MULTILINE)
    names = [name for line in re.findall(r"^    (\w[\w, ]*):", entries, re.MULTILINE) for name in line.split(", ")]
    assert {field.name for field in dataclasses.fields(cls)} <= set(names)


def test_a_name_alone_does_not_import_pytorch():
    code = "import sys, vtprune_train; dir(vtprune_train); assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_class_of_a_method_is_frozen_and_equal_by_value():
    for cls in map(method_class, METHODS):
        assert issubclass(cls, PruningMethod) and cls() == cls() and hash(cls()) == hash(cls())


def lines_with_errors(output):
    return {
        (Path(name).name, int(line))
        for name, line in re.findall(r"([\w/.-]+\.py):(\d+)(?::\d+)?:? (?:- )?error", output)
    }


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_accept_right_code_and_refuse_wrong(checker, tmp_path):
    command = {
        "mypy": ["mypy", "--config-file", "mypy.ini", "--python-executable", sys.executable],
        "pyright": ["pyright", "--pythonpath", sys.executable],
    }[checker]
    if shutil.which(checker) is None:
        pytest.skip(f"{checker} is not installed")
    for script in SCRIPTS.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT}\n")
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"]}}')
    found = subprocess.run(
        [*command, "right.py", "wrong.py"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    wrong = (SCRIPTS / "wrong.py").read_text().splitlines()
    expected = {("wrong.py", number) for number, line in enumerate(wrong, start=1) if line.endswith("# wrong")}
    assert lines_with_errors(found.stdout) == expected, found.stdout + found.stderr
