"""Callbacks of a run: from outside the package, and those that the `callbacks` setting can name."""

import gc
import gzip
import json
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch

from tests.support.runner import ROOT, Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.training import Callback
from vtprune_train.training.loop.callbacks.build import build_callbacks, callbacks_of
from vtprune_train.training.loop.callbacks.garbage_collection import GarbageCollection
from vtprune_train.training.loop.callbacks.profiler import Profiler
from vtprune_train.training.loop.hooks import Hooks
from vtprune_train.training.loop.trackers import Trackers
from vtprune_train.training.loop.trainer import Trainer

OUTSIDE = Path(__file__).with_name("outside.py")
SETTINGS = ("data.workers=0", "deepspeed=configs/deepspeed/zero0.json", "train.save_every=3", "train.eval_every=4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("callbacks"))


def config(*callbacks):
    return Config(model={"path": "nowhere"}, callbacks=[*callbacks])


def recorder(folder, **arguments):
    entry = {"class": f"{OUTSIDE}:Recorder", "file": str(folder / "seen.json"), **arguments}
    return json.dumps(entry)


def seen(folder, rank=0):
    return json.loads((folder / f"seen.{rank}.json").read_text())


@pytest.mark.slow
def test_a_callback_from_outside_sees_every_hook_and_resumes(runs, tmp_path):
    """On both ranks; a run with it trains to the same bits as one without, though it was stopped in between."""
    given = f"callbacks=[{recorder(tmp_path)}, {OUTSIDE}:Skips]"
    settings = (*SETTINGS, "train.on_non_finite=skip", "train.max_steps=5")
    runs.run("seen", *settings, given, "run.stop_after=3", ranks=2)
    evaluate = "on_evaluate exact_match"
    first = ["on_start 0", "on_step 1", "on_skip non_finite 2", "on_step 2", "on_step 3", "on_save 3", "on_end False 3"]
    assert seen(tmp_path) == seen(tmp_path, 1) == first
    runs.run("seen", *settings, given.replace("Skips", "FailsOnError"), ranks=2)
    second = ["load_state_dict", "on_start 3", f"{evaluate} 4", "on_step 4", "on_step 5", "on_save 5", f"{evaluate} 5"]
    known = first[:5]  # the checkpoint's state was taken before on_save
    assert seen(tmp_path) == seen(tmp_path, 1) == [*known, *second, "on_end True 5"]
    runs.run("plain", *settings, f"callbacks=[{OUTSIDE}:Skips]", ranks=2)
    assert_same_metrics(runs.metrics("seen"), runs.metrics("plain"))
    assert_equal_checkpoints(runs.checkpoint("seen"), runs.checkpoint("plain"))


@pytest.mark.slow
def test_the_callback_of_the_documentation_runs(runs, tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    code = next(block.partition("```")[0] for block in page.split("```python\n")[1:] if "class Best" in block)
    (tmp_path / "best.py").write_text(code)
    entry = json.dumps({"class": f"{tmp_path / 'best.py'}:Best", "file": str(tmp_path / "best.json")})
    runs.run("documented", *SETTINGS, f"callbacks=[{entry}]", "train.max_steps=4")
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["step"] == 4
    state = json.loads((runs.checkpoint("documented") / "trainer.json").read_text())["callbacks"]
    assert state[f"{tmp_path / 'best.py'}:Best"] == best


@pytest.mark.slow
def test_an_exception_in_a_hook_names_callback_and_hook_and_reaches_on_error_of_all(runs, tmp_path):
    given = f"callbacks=[{OUTSIDE}:FailsOnError, {recorder(tmp_path, fail_in='on_step')}]"
    done = runs.run("fails", *SETTINGS, given, expect=1)
    assert "LookupError: nothing found in on_step" in done.stderr
    assert f"raised by callback {OUTSIDE}:Recorder in on_step" in done.stderr
    assert f"ERROR callback {OUTSIDE}:FailsOnError failed in on_error" in done.stderr
    assert seen(tmp_path) == ["on_start 0", "on_step 1", "on_error LookupError 1"]


@pytest.mark.slow
def test_the_profiler_writes_a_trace_of_every_rank(runs):
    runs.run("profiled", *SETTINGS, "callbacks=[{class: profiler, steps: [2, 3]}]", "train.max_steps=4", ranks=2)
    for rank in range(2):
        with gzip.open(runs.directory("profiled") / "profile" / f"steps_2_to_3_rank_{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert any("aten::" in str(name) for name in names)
        assert {name for name in names if str(name).startswith("ProfilerStep#")} == {"ProfilerStep#1", "ProfilerStep#2"}


def test_garbage_is_collected_at_fixed_steps(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(gc.isenabled()))
    callback = GarbageCollection(every=3)
    assert gc.isenabled()
    callback.on_start(None)
    assert not gc.isenabled() and len(collected) == 1
    for step in range(1, 8):
        callback.on_step(None, {"step": step})
        assert len(collected) == 1 + step // 3
    callback.on_end(None, True)
    assert gc.isenabled()
    callback.on_start(None)
    callback.on_error(None, ValueError())
    assert gc.isenabled()


def test_the_order_is_the_shipped_ones_then_the_users():
    given = [
        f"{OUTSIDE}:FailsOnError",
        "garbage_collection",
        f"{OUTSIDE}:Skips",
        {"class": "profiler", "steps": [1, 1]},
    ]
    settings = config(*given)
    more = Callback()
    made = build_callbacks(settings, Trackers(settings), callbacks_of(settings), [more])
    assert [type(callback).__name__ for callback in made] == [
        "Unreadable", "Metrics", "Evaluation", "Tracking", "Plot", "Spikes", "Progress", "Callback", "Profiler",
        "GarbageCollection", "FailsOnError", "Skips",
    ]  # fmt: skip


WRONG = [
    ("profilr", "callbacks.0: 'profilr' is not a callback; did you mean profiler?"),
    ({"steps": [1, 2]}, "callbacks.0={'steps': [1, 2]}: class is missing"),
    ({"class": "profiler", "steps": [5, 2]}, "callbacks.0: profiler cannot be created: steps=[5, 2] is not the first"),
    (
        {"class": "profiler"},
        "callbacks.0: profiler cannot be created: Profiler.__init__() missing 1 required positional argument: 'steps'",
    ),
    ({"class": "garbage_collection", "ever": 2}, "no argument 'ever'; did you mean every?"),
    ({"class": f"{OUTSIDE}:Skips", "x": 2}, "Skips has no argument 'x'; it takes none"),
    (f"{OUTSIDE}:Recrder", "outside.py does not define Recrder; did you mean Recorder?"),
    ("pathlib:Path", "callbacks.0='pathlib:Path' must be a subclass of Callback"),
    (f"{OUTSIDE}:WrongHook", "defines on_step_end, which is not a hook; did you mean on_step?"),
    ("nowhere.py:Mine", "callbacks.0='nowhere.py:Mine': file nowhere.py does not exist"),
]


@pytest.mark.parametrize("entry, message", WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_entry_is_refused_before_training(entry, message):
    with pytest.raises(ConfigError) as caught:
        callbacks_of(config(entry))
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_dry_run_looks_at_callbacks_and_trackers(runs):
    done = runs.run("dry", "--dry_run", "callbacks=[profilr]", expect=2)
    assert "callbacks.0: 'profilr' is not a callback" in done.stderr
    done = runs.run("dry", "--dry_run", "train.trackers=[tensorbord]", expect=2)
    assert "train.trackers: unknown tracker 'tensorbord'; did you mean tensorboard?" in done.stderr


class Stateful(Callback):
    name = "stateful"

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_states_of_callbacks_of_one_name_are_told_apart_and_unknown_ones_named(caplog):
    states = Hooks([Stateful({"a": 1}), Stateful({}), Stateful({"a": [2]})]).state_dict()
    assert states == {"stateful": {"a": 1}, "stateful (3)": {"a": [2]}}
    one, two, three = (Stateful({}) for _ in range(3))
    Hooks([one, two, three]).load_state_dict({**states, "other": {"b": 1}})
    assert (one.state, two.state, three.state) == ({"a": 1}, {}, {"a": [2]})
    assert "state of callback other, which this run does not have" in caplog.text


@pytest.mark.parametrize(
    "state, said",
    [
        ({"a": object()}, r"state of callback stateful, key 'a': <object .* is a object, which JSON cannot restore"),
        ({"a": [{"b": (1, 2)}]}, r"state of callback stateful, key 'a', key 'b': \(1, 2\) is a tuple"),
        ({"a": {1: 2}}, r"state of callback stateful, key 'a': the key 1 is not a string"),
    ],
)
def test_a_state_that_json_would_change_is_refused(state, said):
    with pytest.raises(TypeError, match=said) as caught:
        Hooks([Stateful(state)]).state_dict()
    assert caught.value.__notes__ == ["raised by callback stateful in state_dict"]


def test_a_state_keeps_its_numbers():
    state = {"a": [1, 2.5, None, True, "x"], "b": {"c": float("inf")}}
    assert Hooks([Stateful(state)]).state_dict() == {"stateful": state}


def named(*names):
    return [type("Named", (Stateful,), {"name": name})({}) for name in names]


@pytest.mark.parametrize(
    "before, now",
    [
        (["a.py:Best"], ["moved/a.py:Best"]),
        (["a.py:Best", "a.py:Best"], ["b.py:Best", "b.py:Best"]),
        (["a.py:Best", "b.py:Best"], ["b.py:Best", "c.py:Best"]),
        (["a.py:Best", "b.py:Best"], ["a.py:Best"]),
        (["a.py:Best"], ["a.py:Best", "b.py:Best"]),
    ],
)
def test_states_follow_a_class_whose_file_moved(before, now, caplog):
    saved = Hooks(named(*before))
    for number, callback in enumerate(saved._callbacks.values()):
        callback.state = {"number": number}
    callbacks = named(*now)
    Hooks(callbacks).load_state_dict(saved.state_dict())
    expected = {("b.py:Best", "c.py:Best"): [1, 0], ("a.py:Best", "b.py:Best"): [0, None]}
    restored = [callback.state.get("number") for callback in callbacks]
    assert restored == expected.get(tuple(now), [*range(len(now))])
    assert ("b.py:Best, which this run does not have" in caplog.text) == (now == ["a.py:Best"])


@pytest.mark.parametrize(
    "before, now",
    [
        (["a.py:Best", "a.py:Best"], ["a.py:Best"]),
        (["a.py:Best", "a.py:Best"], ["b.py:Best"]),
        (["a.py:Best"], ["b.py:Best", "c.py:Best"]),
        (["a.py:Best", "b.py:Best"], ["c.py:Best"]),
    ],
)
def test_states_that_fit_no_single_callback_are_refused(before, now):
    saved = Hooks(named(*before))
    for callback in saved._callbacks.values():
        callback.state = {"a": 1}
    with pytest.raises(ValueError, match=r"unclear which of them gets the state; list the same callbacks"):
        Hooks(named(*now)).check_states(saved.state_dict())


def test_a_hook_that_another_callback_calls_is_named_alone():
    class Inner(Callback):
        name = "inner"

        def on_evaluate(self, trainer, metrics):
            raise LookupError("no")

    class Outer(Callback):
        def on_step(self, trainer, metrics):
            trainer.call("on_evaluate", metrics)

    trainer = SimpleNamespace(_hooks=Hooks([Outer(), Inner()]))
    trainer.call = MethodType(Trainer.call, trainer)
    with pytest.raises(LookupError) as caught:
        trainer.call("on_step", {})
    assert caught.value.__notes__ == ["raised by callback inner in on_evaluate"]


def test_an_exception_with_notes_of_its_own_is_named():
    class Noted(Callback):
        name = "noted"

        def on_step(self, trainer, metrics):
            error = LookupError("no")
            error.add_note("look elsewhere")
            raise error

    with pytest.raises(LookupError) as caught:
        Hooks([Noted()]).call("on_step", None, {})
    assert caught.value.__notes__ == ["look elsewhere", "raised by callback noted in on_step"]


@pytest.mark.parametrize("stop, files", [(1, []), (2, ["steps_2_to_2_rank_0"]), (3, ["steps_2_to_3_rank_0"])])
def test_a_trace_is_named_by_the_steps_that_it_contains(tmp_path, stop, files):
    profiler = Profiler(steps=[2, 4])
    trainer = SimpleNamespace(config=SimpleNamespace(run_dir=tmp_path), state=SimpleNamespace(step=0))
    profiler.on_start(trainer)
    for step in range(1, stop + 1):
        torch.ones(2) + 1
        profiler.on_step(trainer, {"step": step})
    profiler.on_end(trainer, False)
    assert [file.name for file in tmp_path.glob("profile/*")] == [f"{name}.json.gz" for name in files]
