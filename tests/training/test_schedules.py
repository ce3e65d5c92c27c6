"""Learning-rate schedules: the numbers of earlier versions to the last bit, WSD, a minimum rate, functions by path."""

import math

import pytest

from tests.support.runner import Runs
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config, without_effect
from vtprune_train.config.train import TrainConfig
from vtprune_train.training.schedules import check_schedule, load_schedule


def factors(total, warmup, **train):
    schedule = load_schedule(TrainConfig(**train))
    return [schedule(update, total, warmup) for update in range(total + 1)]


def of_version_0_1(step, total_steps, warmup_steps, schedule):
    """As it stood there, word for word."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (8, 2), (97, 0), (1000, 31), (5, 5)])
def test_earlier_schedules_have_the_same_bits(schedule, total, warmup):
    earlier = [of_version_0_1(update, total, warmup, schedule) for update in range(total + 1)]
    assert factors(total, warmup, schedule=schedule) == earlier


def test_wsd_is_stable_until_its_decay():
    course = factors(20, 2, schedule="wsd", decay_ratio=0.2)
    assert course[:4] == [0.0, 0.5, 1.0, 1.0] and set(course[2:17]) == {1.0}
    assert course[16:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert factors(20, 2, schedule="wsd", decay_ratio=0.0)[-2:] == [1.0, 1.0]
    whole = factors(20, 2, schedule="wsd", decay_ratio=1.0)
    assert whole == factors(20, 2, schedule="linear"), "a decay that would begin in the warm-up begins after it"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_decay_ends_at_the_minimum_rate(schedule):
    course = factors(50, 5, schedule=schedule, min_rate=0.1)
    assert course[0] == 0.0 and max(course) == 1.0
    assert course[-1] == pytest.approx(0.1) and min(course[5:]) == course[-1]
    assert course[5:] == sorted(course[5:], reverse=True)


def test_settings_without_effect_are_named():
    settings = ("train.decay_ratio=0.3", "train.min_rate=0.1", "train.betas=[0.9, 0.95]")
    assert [line for line in without_effect(load_config("quickstart.yaml", settings)) if "decay_ratio" in line]
    settings += ("train.schedule=constant", "train.optimizer=torch.optim:SGD")
    lines = [line for line in without_effect(load_config("quickstart.yaml", settings)) if line.startswith("train.")]
    assert lines == [
        "train.decay_ratio has no effect: train.schedule is constant",
        "train.min_rate has no effect: train.schedule is constant",
        "train.betas has no effect: train.optimizer is torch.optim:SGD",
    ]


FUNCTIONS = """
def one_cycle(update, total_updates, warmup_updates):
    middle = total_updates / 2
    return 1 - abs(update - middle) / middle

def removes_its_file(update, total_updates, warmup_updates):
    import pathlib
    if total_updates != 100:  # not the check before training
        pathlib.Path(__file__).unlink(missing_ok=True)
    return 0.5

def negative(update, total_updates, warmup_updates):
    return 1 - update

def nothing(update, total_updates, warmup_updates):
    pass

constant = 1.0
"""


@pytest.mark.parametrize(
    "name, said",
    [
        ("missing", r"does not define missing"),
        ("constant", r"1.0 is not a function"),
        ("nothing", r"returned None for update 0 of 100; it must return a finite number of at least 0"),
    ],
)
def test_functions_that_cannot_be_used_are_refused_at_the_start(tmp_path, name, said):
    (tmp_path / f"schedule_{name}.py").write_text(FUNCTIONS)
    with pytest.raises(ConfigError, match=said):
        check_schedule(TrainConfig(schedule=f"{tmp_path}/schedule_{name}.py:{name}"))


@pytest.mark.slow
def test_a_run_with_a_schedule_of_ones_own(tmp_path):
    runs = Runs(tmp_path)
    (tmp_path / "schedules_of_a_run.py").write_text(FUNCTIONS)
    settings = ("data.eval=[]", "train.max_steps=4", "train.epochs=1")
    runs.run("own", *settings, f"train.schedule={tmp_path}/schedules_of_a_run.py:one_cycle")
    rates = [m["learning_rates"]["projector"] for m in runs.metrics("own")]
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2, 0.5e-2])
    (tmp_path / "schedules_removed.py").write_text(FUNCTIONS)
    runs.run("removed", *settings, f"train.schedule={tmp_path}/schedules_removed.py:removes_its_file")
    assert [m["learning_rates"]["projector"] for m in runs.metrics("removed")] == [0.5e-2] * 4
    assert not (tmp_path / "schedules_removed.py").exists()
    done = runs.run("bad", *settings, f"train.schedule={tmp_path}/schedules_of_a_run.py:negative", expect=2)
    assert "returned -1 for update 2 of 100" in done.stderr
