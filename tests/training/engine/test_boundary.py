"""``training/engine`` alone knows DeepSpeed, and imports nothing that is built on it."""

import ast
from pathlib import Path

import pytest

from tests.support.runner import ROOT
from vtprune_train.training.engine import private
from vtprune_train.training.engine.engine import Engine

PACKAGE = ROOT / "vtprune_train"
ENGINE = PACKAGE / "training" / "engine"
OTHERS = [path for path in sorted(PACKAGE.rglob("*.py")) if ENGINE not in path.parents]
SHARED = {"enabled", "optimizer", "dynamic", "save", "unflatten"}  # names that other things have as well
TABLES = [private.ENGINE, *private.OPTIMIZERS.values(), *private.PARAMETERS.values()]
PRIVATE = {path.rpartition(".")[2] for table in TABLES for path in table} - SHARED | {"_deepspeed"}
OF_AN_ENGINE = {*dir(Engine), "module", "device", "zero_stage", "dtype"}
BY_NAME = ("import_module", "__import__")
# ``prune`` works under other trainers too, whose ZeRO-3 models gather the parameters of each submodule.
ALLOWED = {("vtprune_train/models/forward/sharding.py", "ds_id")}
READING = ("getattr", "hasattr", "setattr", "delattr")
BUILT_ON_IT = ("checkpoint", "faults", "loop", "memory", "process")


def modules_imported(tree):
    """(line, module) of every import, also inside functions and by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in BY_NAME:
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def names_read(tree):
    """(line, name) of every attribute, also by ``getattr``, ``hasattr`` and ``setattr``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in READING:
            yield from ((node.lineno, a.value) for a in node.args[1:2] if isinstance(a, ast.Constant))


def read_of_an_engine(tree):
    """(line, name) of every attribute of ``engine`` or of something's ``engine``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", "")) == "engine":
            yield node.lineno, node.attr


def faults(path, tree):
    for line, module in modules_imported(tree):
        if module.partition(".")[0] == "deepspeed":
            yield f"{path}:{line} imports {module}"
    for line, name in names_read(tree):
        if name in PRIVATE and (str(path), name) not in ALLOWED:
            yield f"{path}:{line} reads {name}"
    for line, name in read_of_an_engine(tree):
        if name.startswith("_") or name not in OF_AN_ENGINE:
            yield f"{path}:{line} reads {name} of an engine"


def test_nothing_else_knows_deepspeed():
    assert len(OTHERS) > 150
    found = [fault for path in OTHERS for fault in faults(path.relative_to(ROOT), ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    from deepspeed.ops.adam import DeepSpeedCPUAdam",
        "import importlib\nimportlib.import_module('deepspeed.zero')",
        "def f(parameter):\n    return getattr(parameter, 'ds_tensor', None)",
        "def f(trainer):\n    return trainer.engine.optimizer",
        "def f(engine):\n    return engine.global_steps",
        "def f(engine):\n    return engine._deepspeed",
    ],
)
def test_what_knows_deepspeed_is_noticed(code):
    assert list(faults(Path("some.py"), ast.parse(code)))


def test_the_engine_is_built_on_nothing_of_training():
    for path in sorted(ENGINE.glob("*.py")):
        for line, module in modules_imported(ast.parse(path.read_text())):
            inside = module.startswith("vtprune_train.training.")
            above = module.removeprefix("vtprune_train.training.").partition(".")[0]
            assert not (inside and above in BUILT_ON_IT), f"{path}:{line} imports {module}"


def test_no_file_is_read_as_a_pickle_that_may_run_code():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert isinstance(node.value, ast.Constant) and node.value.value is True, f"{path}:{node.lineno}"
