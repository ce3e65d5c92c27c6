"""A checkpoint of any ranks and ZeRO stage on any others: the same numbers and samples, nearly the same losses."""

import json

import pytest

from tests.support.runner import ROOT, WARM, Runs

pytestmark = pytest.mark.slow

DEAL = ROOT / "tests" / "faults" / "deal.py"
STAGES = "deepspeed=configs/deepspeed/zero{}.json"


def deal(runs, ranks, *arguments, stages="0123", train=None, expect=0):
    log = runs.folder / "deal.log"
    env = {**runs.environment(), "DEAL_STAGES": stages, "DEAL_TRAIN": json.dumps(train or {})}
    with log.open("w+b") as said:
        process = WARM.start(
            [str(DEAL), *map(str, arguments)],
            ranks=ranks, cwd=ROOT, env=env, out=said.fileno(), err=said.fileno(),
        )  # fmt: skip
        assert process.wait(timeout=280) == expect, log.read_text()[-4000:]
    return log.read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("elastic"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_to_every_stage(runs, dtype):
    """Written on two ranks at ZeRO 0 to 3, loaded on one and on two at each: master weights, moments, steps, frozen
    parameters and buffers equal to the last bit; from DeepSpeed's files and from the portable form."""
    folder = runs.folder / dtype
    folder.mkdir()
    deal(runs, 2, "write", folder, dtype)
    deal(runs, 1, "read", folder, dtype, "deepspeed")
    deal(runs, 2, "read", folder, dtype, "portable" if dtype == "float32" else "deepspeed")


def test_one_rank_to_two(runs):
    """ZeRO-3 on one rank has one file, and yet no whole parameter in it."""
    folder = runs.folder / "one"
    folder.mkdir()
    deal(runs, 1, "write", folder, "float32", stages="3")
    deal(runs, 2, "read", folder, "float32", "deepspeed", stages="3")


LION = """
import torch

class Lion(torch.optim.Optimizer):
    # Counts steps in a Python number, and sums rates in a tensor without dimensions.

    def __init__(self, params, lr, weight_decay=0.0, beta=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"seen": 0, "average": torch.zeros_like(p), "rates": torch.zeros(())}
                state["seen"] += 1
                state["rates"] += group["lr"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["average"].lerp(p.grad, 1 - group["beta"]).sign(), alpha=group["lr"])
                state["average"].lerp_(p.grad, 0.01)
"""
OPTIMIZERS = {
    "sgd": {"optimizer": "torch.optim:SGD", "optimizer_args": {"momentum": 0.9}},
    "plain_sgd": {"optimizer": "torch.optim:SGD"},
    "muon": {"optimizer": "muon"},
    "lion": {"optimizer": "FOLDER/lion_of_a_test.py:Lion"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_at_every_stage(runs, name):
    """One state, none, other states in each group, and a class outside the package; nothing knows their names."""
    folder = runs.folder / name
    folder.mkdir()
    (folder / "lion_of_a_test.py").write_text(LION)
    train = {**OPTIMIZERS[name], "optimizer": OPTIMIZERS[name]["optimizer"].replace("FOLDER", str(folder))}
    deal(runs, 2, "write", folder, "float32", train=train)
    deal(runs, 1, "read", folder, "float32", "portable", train=train)
    deal(runs, 2, "read", folder, "float32", "deepspeed", train=train)


def test_states_of_other_shapes_stay_whole(runs):
    """Adafactor's, a row and a column for a matrix: carried over where every rank keeps whole parameters, and refused
    where ZeRO divides them."""
    folder = runs.folder / "adafactor"
    folder.mkdir()
    train = {"optimizer": "torch.optim:Adafactor"}
    deal(runs, 2, "write", folder, "float32", stages="0", train=train)
    deal(runs, 1, "read", folder, "float32", "deepspeed", stages="0", train=train)
    deal(runs, 1, "read", folder, "float32", "portable", stages="0", train=train)
    said = deal(runs, 1, "move", folder, "float32", "deepspeed", stages="02", train=train, expect=1)
    assert "the optimizer state row_var of first.weight does not have one value per element" in said


@pytest.fixture(scope="module")
def whole(runs):
    runs.run("whole", "data.eval=[]", "data.workers=0", STAGES.format(2))
    return runs.metrics("whole")


def legs(runs, name, *each):
    """One run in several starts, each of them up to a step (in the middle of an epoch of four steps)."""
    for stop, ranks, *settings in each:
        runs.run(name, "data.eval=[]", "data.workers=0", *settings, f"run.stop_after={stop}", ranks=ranks)
    return runs.metrics(name)


def assert_same_course(metrics, expected):
    assert [m["step"] for m in metrics] == [m["step"] for m in expected]
    assert [m["data_digest"] for m in metrics] == [m["data_digest"] for m in expected]
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3), ours["step"]


def test_one_to_two_to_one_ranks_and_another_plan(runs, whole):
    zero2 = STAGES.format(2)
    course = legs(runs, "ranks", (2, 1, zero2), (5, 2, zero2, "data.max_tokens=300"), (8, 1, zero2))
    assert_same_course(course, whole)
    assert max(m["micro_steps"] for m in course[2:5]) > 1


def test_zero_2_to_3_in_the_middle_of_an_epoch(runs, whole):
    assert_same_course(legs(runs, "stages", (3, 2, STAGES.format(2)), (8, 2, STAGES.format(3))), whole)


def test_another_dtype_on_the_same_ranks(runs, whole):
    course = legs(runs, "dtype", (3, 1, STAGES.format(2)), (8, 1, STAGES.format(2), "model.dtype=bfloat16"))
    assert [m["data_digest"] for m in course] == [m["data_digest"] for m in whole]
    assert [m["loss"] for m in course] == pytest.approx([m["loss"] for m in whole], rel=0.05)
