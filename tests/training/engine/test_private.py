"""The names of DeepSpeed that its documentation does not promise: all there, all listed, and missed by name."""

import ast
import json
import subprocess
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from packaging.requirements import Requirement

from tests.support.runner import ROOT
from vtprune_train.config.errors import ConfigError
from vtprune_train.training.engine import private

ENGINE = ROOT / "vtprune_train" / "training" / "engine"
KINDS = {
    "zero0 float32": None,
    "zero0 bfloat16": "FP16_UnfusedOptimizer",
    "zero1 float32": "DeepSpeedZeroOptimizer",
    "zero1 bfloat16": "DeepSpeedZeroOptimizer",
    "zero1 bfloat16, sums in float32": "BF16_Optimizer",
    "zero2 float32": "DeepSpeedZeroOptimizer",
    "zero2 bfloat16": "DeepSpeedZeroOptimizer",
    "zero2 offload": "DeepSpeedZeroOptimizer",
    "zero3 float32": "DeepSpeedZeroOptimizer_Stage3",
    "zero3 bfloat16": "DeepSpeedZeroOptimizer_Stage3",
    "zero3 offload": "DeepSpeedZeroOptimizer_Stage3",
}
# What DeepSpeed's documentation promises of its engine, and PyTorch's of an optimizer.
DOCUMENTED = {
    "module", "device", "optimizer", "train", "backward", "step", "was_step_applied", "save_checkpoint",
    "load_checkpoint", "zero_optimization_stage", "bfloat16_enabled", "fp16_enabled", "loss_scale",
    "set_gradient_accumulation_boundary", "param_groups", "state", "zero_grad",
}  # fmt: skip
# What stands for DeepSpeed's engine, its optimizer, the one inside, its loss scaler and a parameter.
VARIABLES = {"engine", "optimizer", "inner", "scaler", "deepspeed", "_deepspeed", "parameter"}
# Of names in VARIABLES that stand for something else: modules, and this package's own classes.
ADMITTED = {"zero", "comm", "accelerator", "__version__"}
OF_PARAMETERS = {
    "grad", "requires_grad", "shape", "numel", "data", "view_as", "device", "is_meta", "is_floating_point",
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines") / "found.json"
    script = ROOT / "tests" / "support" / "every_engine.py"
    command = [sys.executable, str(script), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", KINDS)
def test_every_name_is_there_at_every_stage(started, case):
    assert started[case] == {"kind": KINDS[case], "error": ""}, f"DeepSpeed {deepspeed.__version__}, {case}"


def test_the_release_is_one_of_those_pinned():
    assert Requirement(private.PINNED).specifier.contains(deepspeed.__version__)


def made(kind, without=None):
    """Something with every name that is read of an engine whose optimizer is of ``kind``, but for one."""

    def fill(thing, names):
        for path in names:
            *outer, last = path.split(".")
            owner = thing
            for name in outer:
                owner.__dict__.setdefault(name, SimpleNamespace())
                owner = getattr(owner, name)
            if path != without:
                setattr(owner, last, True)
        return thing

    optimizer = fill(type(kind, (), {})(), [*private.OPTIMIZERS[kind], *private.OFFLOADED.get(kind, ())])
    if hasattr(optimizer, "loss_scaler"):
        fill(optimizer.loss_scaler, private.DYNAMIC)
    parameter = fill(SimpleNamespace(requires_grad=True), private.PARAMETERS.get(kind, ()))
    module = SimpleNamespace(parameters=lambda: [parameter])
    return fill(SimpleNamespace(optimizer=optimizer, module=module), private.ENGINE)


READ = [
    (kind, name)
    for kind, names in private.OPTIMIZERS.items()
    for name in (*private.ENGINE, *names, *private.OFFLOADED.get(kind, ()), *private.PARAMETERS.get(kind, ()))
    if not name.endswith(("cpu_offload", "offload_optimizer"))  # whether the names of OFFLOADED are read
]
READ += [("DeepSpeedZeroOptimizer", name) for name in private.DYNAMIC]


@pytest.mark.parametrize("kind, name", READ)
def test_a_release_without_a_name_is_refused_by_it(kind, name):
    private.check(made(kind))
    said = rf"DeepSpeed {deepspeed.__version__} has no \w+\.{name}, which training needs; install deepspeed>"
    with pytest.raises(ConfigError, match=said):
        private.check(made(kind, without=name))


def test_a_release_without_a_class_is_refused_by_it(monkeypatch):
    private.check_release()
    monkeypatch.delattr("deepspeed.runtime.zero.stage_1_and_2.INITIAL_MICRO_STEP_ID")
    with pytest.raises(ConfigError, match=r"has no deepspeed.*INITIAL_MICRO_STEP_ID, which training needs"):
        private.check_release()


def test_an_optimizer_of_another_class_is_refused():
    engine = made("BF16_Optimizer")
    engine.optimizer = type("NextOptimizer", (), {})()
    with pytest.raises(ConfigError, match=r"has no optimizer that training supports \(it created a NextOptimizer\)"):
        private.check(engine)
    parameter = torch.nn.Parameter(torch.zeros(2))
    engine.optimizer = torch.optim.AdamW([parameter])
    private.check(engine)


def read_of_deepspeed(path):
    """(line, name) of each attribute that a file reads of what stands for a part of DeepSpeed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name = node.args[0], node.args[1]
            if not isinstance(name, ast.Constant):  # a loop over names, each of them listed
                continue
            name = name.value
        else:
            continue
        if getattr(owner, "id", getattr(owner, "attr", None)) in VARIABLES:
            yield node.lineno, name


def test_every_name_that_is_read_is_listed():
    tables = [private.ENGINE, private.DYNAMIC, *private.OPTIMIZERS.values(), *private.PARAMETERS.values()]
    names = {part for table in tables for path in table for part in path.split(".")}
    listed = names | {name for offloaded in private.OFFLOADED.values() for name in offloaded}
    found = 0
    for file in ("engine", "gradients", "layout", "reshard", "sharded", "state"):
        for line, name in read_of_deepspeed(ENGINE / f"{file}.py"):
            known = name in listed | DOCUMENTED | OF_PARAMETERS | ADMITTED
            assert known, f"{file}.py:{line} reads {name}, which private.py does not list"
            found += name in listed
    assert found > 30
    for name in sorted(names):
        text = "".join(path.read_text() for path in ENGINE.glob("*.py") if path.name != "private.py")
        assert name in text, f"private.py lists {name}, which nothing reads"
