"""NaN on one of two ranks: nothing changes, all ranks do the same, and the report says where it was."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.runner import ROOT, WARM, Runs, assert_equal_checkpoints
from vtprune_train.config.train import TrainConfig
from vtprune_train.training.checkpoint.folder import TrainerState
from vtprune_train.training.faults.diagnosis import Watch, first_fault, non_finite_parameters, statistics, write_report
from vtprune_train.training.faults.non_finite import TrainingError, _count

pytestmark = pytest.mark.slow

INJECT = Path(__file__).parent / "poison.py"
SETTINGS = ("data.eval=[]", "data.workers=0", "train.max_steps=6", "train.save_every=2", "data.max_tokens=400")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def faults(**wanted):
    return {"script": INJECT, "env": {"FAULTS": json.dumps(wanted)}, "ranks": 2}


def test_a_gradient_is_thrown_away_at_every_stage(tmp_path):
    """ZeRO 0 to 3, host memory, half precision, two micro-steps: as if the step had never been."""
    out = tmp_path / "results.json"
    with (tmp_path / "log").open("w") as log:
        script = [str(Path(__file__).parent / "thrown_away.py"), str(out)]
        environment = Runs(tmp_path / "runs", num_train=1).environment()
        process = WARM.start(script, ranks=2, cwd=ROOT, env=environment, out=log.fileno(), err=log.fileno())
        assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-4000:]
    for results in json.loads(out.read_text()):
        assert len(results) == 10
        for name, result in results.items():
            assert result["noticed"], f"{name}: the norm of rank 1's NaN is finite"
            assert result["equal"], f"{name}: the step left something behind"
            assert result["norms"] == result["expected"], name
            for ours, deepspeeds in result["norms"]:
                assert ours == pytest.approx(deepspeeds, rel=1e-5), name


def test_stop_and_resume(runs):
    """A picture of rank 1 with a NaN: both stop before the update, and going on is as if nothing had been. The look at
    memory before the first step leaves no trace either."""
    settings = (*SETTINGS, "deepspeed=configs/deepspeed/zero2.json")
    done = runs.run("stopped", *settings, "train.preflight=always", expect=1, **faults(nan_pixels=3))
    report_path = runs.directory("stopped") / "non_finite" / "step_00000004.json"
    for words in ("step 4: the loss is nan; no parameter was updated", "on rank 1 in micro-batch 0", str(report_path)):
        assert words in done.stderr, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "train.on_non_finite=skip" in done.stderr and "preflight: worst micro-batches" in done.stderr
    assert [m["step"] for m in runs.metrics("stopped")] == [1, 2, 3]
    assert runs.checkpoint("stopped").name == "step_00000002"

    healthy, faulty = json.loads(report_path.read_text())["ranks"]
    assert healthy["rank"] == 0 and not any(micro["tensors"] for micro in healthy["micro_batches"])
    micro_batch = faulty["micro_batches"][0]
    assert micro_batch["tensors"][0] | {"min": 0, "max": 0, "mean": 0} == {
        "kind": "input", "name": "pixel_values", "shape": micro_batch["tensors"][0]["shape"], "dtype": "float32",
        "nan": 1, "inf": 0, "min": 0, "max": 0, "mean": 0,
    }  # fmt: skip
    assert {tensor["kind"] for tensor in micro_batch["tensors"]} == {"input", "activation", "loss", "gradient"}
    assert all(sample.startswith("0:") for sample in micro_batch["sample_ids"]) and not faulty["parameters"]
    assert faulty["losses"][0] == "nan" and all(isinstance(loss, float) for loss in healthy["losses"])

    runs.run("stopped", *settings, "train.preflight=always", ranks=2)
    runs.run("healthy", *settings, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint("healthy"))
    for name in ("loss", "grad_norm", "learning_rates", "data_digest", "token_accuracy"):
        assert [m[name] for m in runs.metrics("stopped")] == [m[name] for m in runs.metrics("healthy")], name


def test_skip(runs):
    """A gradient of rank 1 with a NaN under ZeRO-3, and a step in which nobody has anything to learn: the rest is as if
    these steps had never been, learning rates included."""
    settings = (*SETTINGS, "deepspeed=configs/deepspeed/zero3.json")
    skipping = ("train.on_non_finite=skip", "data.unsupervised=skip", "train.preflight=always")
    done = runs.run("skipped", *settings, *skipping, **faults(nan_gradient=3, nothing_to_learn=1))
    assert "skipping step 4 (2 skipped so far): the gradient's norm is nan" in done.stderr
    assert "gradient model.language_model.norm.weight with 32 NaN" in done.stderr
    metrics = runs.metrics("skipped")
    assert [m["skipped"] for m in metrics] == [None, "unsupervised", None, "non_finite", None, None]
    assert metrics[1]["loss"] is None and metrics[3]["loss"] > 0 and metrics[3]["grad_norm"] is None
    state = json.loads((runs.checkpoint("skipped") / "trainer.json").read_text())
    assert (state["step"], state["skipped"], state["skipped_in_a_row"]) == (6, 2, 0)

    runs.run("left_out", *settings, "run.stop_after=4", **faults(leave_out=[1, 3]))
    expected = runs.metrics("left_out")
    taken = [m for m in metrics if m["skipped"] is None]
    for name in ("loss", "grad_norm", "learning_rates", "data_digest"):
        assert [m[name] for m in taken] == [m[name] for m in expected], name
    ours, theirs = runs.checkpoint("skipped"), runs.checkpoint("left_out")
    assert_equal_checkpoints(ours, theirs)


def test_skipped_steps_are_bounded():
    config = SimpleNamespace(train=TrainConfig(max_skipped=4, max_skipped_in_a_row=2))
    trainer = SimpleNamespace(state=TrainerState(), config=config)
    for _ in range(2):
        assert _count(trainer, "non_finite", "why", 7) == "non_finite"
    with pytest.raises(TrainingError, match=r"step 8: why\n3 steps were skipped, more than .*_in_a_row=2"):
        _count(trainer, "non_finite", "why", 8)
    trainer.state = TrainerState(skipped=4)
    with pytest.raises(TrainingError, match=r"5 steps were skipped, more than train.max_skipped=4"):
        _count(trainer, "unsupervised", "why", 9)


def test_statistics_leave_out_what_is_not_finite():
    tensor = torch.tensor([[1.0, float("nan"), -3.0], [float("inf"), -float("inf"), 5.0]])
    assert statistics(tensor) == {
        "shape": [2, 3], "dtype": "float32", "nan": 1, "inf": 2, "min": -3.0, "max": 5.0, "mean": 1.0
    }  # fmt: skip
    assert "min" not in statistics(torch.full((2,), float("nan")))


def test_a_fault_that_does_not_come_again_and_broken_parameters_are_told_apart(tmp_path):
    model = torch.nn.Linear(2, 2)
    with Watch(model) as watch:
        pass
    assert not model._forward_hooks and not model._forward_pre_hooks
    report = {"rank": 0, "parameters": non_finite_parameters(model), "micro_batches": watch.micro_batches}
    assert "did not recur" in first_fault([report])
    with torch.no_grad():
        model.bias[1] = float("inf")
    report["parameters"] = non_finite_parameters(model)
    assert "parameter bias is already non-finite" in first_fault([report])
    path = tmp_path / "a" / "b.json"
    assert write_report(path, {"x": [float("nan"), (1.0, float("-inf"))]}) == f"report: {path}"
    assert "b.json/c.json (" in write_report(path / "c.json", {}), "what is wrong with the step is said all the same"
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": ["nan", [1.0, "-inf"]]}
