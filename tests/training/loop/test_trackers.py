"""Trackers, through accelerate's classes: TensorBoard, and Weights & Biases offline with the real package."""

import json
import math
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runner import Runs
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.training.loop.callbacks.tracking import train_numbers
from vtprune_train.training.loop.trackers import Trackers, check_trackers
from vtprune_train.viz.evaluation_images import EvaluationImages

SETTINGS = ("data.workers=0", "deepspeed=configs/deepspeed/zero0.json", "train.eval_every=2", "train.max_steps=4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("trackers"))


def config(folder, *trackers):
    return Config(model={"path": "nowhere"}, run={"output_dir": str(folder)}, train={"trackers": [*trackers]})


def numbers_of(lines, part):
    """Every number of lines, by tag: what a tracker must hold at each step."""
    found = {}
    for line in lines:
        for key, value in line.items():
            if type(value) in (int, float) and key != "step" and (part, key) != ("eval", "seconds"):
                found.setdefault(f"{part}/{key}", {})[line["step"]] = value
    return found


@pytest.mark.slow
def test_tensorboard_holds_every_number(runs):
    runs.run("board", *SETTINGS)
    folder = runs.directory("board")
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    expected = numbers_of(runs.metrics("board"), "train") | numbers_of(lines, "eval")
    assert {"train/visual_tokens", "train/flops", "train/peak_memory_bytes", "eval/exact_match"} <= expected.keys()
    for tag, by_step in expected.items():
        shown = {event.step: event.value for event in board.Scalars(tag)}
        assert shown == pytest.approx(by_step, rel=1e-6), tag
    assert {"learning_rate/projector", "train/keep_1", "train/keep_3"} <= set(board.Tags()["scalars"])


@pytest.mark.slow
def test_a_run_without_trackers(runs):
    done = runs.run("none", *SETTINGS, "train.trackers=[]", "train.eval_show=2")
    assert "train.eval_show has no effect: train.trackers is empty" in done.stderr
    assert len(runs.metrics("none")) == 4 and not (runs.directory("none") / "tensorboard").exists()


def test_nothing_is_drawn_without_trackers():
    config = SimpleNamespace(train=SimpleNamespace(eval_show=2, trackers=[]))
    collate = SimpleNamespace(method="used by a drawing")
    EvaluationImages().on_evaluate(SimpleNamespace(config=config, eval_collate=collate), {})


def records(path):
    """The records of a W&B transaction log, which has LevelDB's format: blocks of 32 KiB, after a header of 7 bytes
    pieces of a record, each with a checksum (4 bytes), a length (2) and its kind (full, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, piece = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        piece += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(piece)
            piece = b""


def history(folder):
    """Values of each step, ids and settings of the runs in W&B's offline logs, oldest first."""
    rows, ids, settings = {}, [], []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
                settings.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.setdefault(row["_step"], {}).update(row)
    return rows, ids, settings


@pytest.mark.slow
def test_weights_and_biases_offline_continues_its_run(runs):
    """The real package, without a network: numbers, images, settings, and the same run after a resume."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    settings = (*SETTINGS, "train.trackers=[tensorboard, wandb]", "train.eval_show=1")
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "seen"}
    runs.run("wb", *settings, "run.stop_after=2", env=env)
    runs.run("wb", *settings, env=env)
    rows, ids, configs = history(runs.directory("wb"))
    assert len(ids) >= 2 and len(set(ids)) == 1, "both processes wrote to one run"
    assert configs[0]["run"]["seed"] == 3
    metrics = runs.metrics("wb")
    assert sorted(rows) == [1, 2, 3, 4]
    for line in metrics:
        for tag, value in train_numbers(line).items():
            assert rows[line["step"]][tag] == pytest.approx(value), tag
    assert all("eval/loss" in rows[step] for step in (2, 4))
    images = list(runs.directory("wb").glob("wandb/offline-run-*/files/media/images/kept_tokens/*.png"))
    assert len(images) == 2
    assert (runs.directory("wb") / "tensorboard").is_dir()


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("no folder")
    trackers = Trackers(config(tmp_path, "tensorboard"))
    trackers.start()
    assert f"could not write to {tmp_path}/run/tensorboard (FileExistsError" in caplog.text
    caplog.clear()
    trackers.log({"train/loss": 1.0}, 1)
    trackers.finish()
    assert not caplog.text


def test_a_tracker_that_fails_later_leaves_the_others(tmp_path, caplog):
    trackers = Trackers(config(tmp_path, "tensorboard"))
    trackers.start()

    class Broken:
        def log(self, values, step):
            raise OSError("no network")

    trackers._running["wandb"] = Broken()
    trackers.log({"train/loss": 1.5}, 1)
    assert "could not write to wandb (OSError: no network); training continues without it" in caplog.text
    trackers.log({"train/loss": math.nan}, 2)
    trackers.finish()
    assert caplog.text.count("no network") == 1
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]


def test_other_ranks_start_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("vtprune_train.training.distributed.rank", lambda: 1)
    trackers = Trackers(config(tmp_path, "tensorboard"))
    trackers.start()
    trackers.log({"train/loss": 1.0}, 1)
    assert not (tmp_path / "run").exists()


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    check_trackers(config("runs", "tensorboard"))
    with pytest.raises(ConfigError, match="unknown tracker 'wadb'; did you mean wandb"):
        check_trackers(config("runs", "wadb"))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ConfigError, match="trackers: wandb is not installed; pip install wandb"):
        check_trackers(config("runs", "wandb"))


@pytest.mark.parametrize("key", ["tensorboard", "wandb", "comet", "csv_monitor"])
def test_monitors_of_a_deepspeed_json_are_refused_with_the_setting_to_use(key):
    from vtprune_train.training.engine.settings import engine_config

    settings = Config(model={"path": "nowhere"}, deepspeed={"zero_optimization": {"stage": 2}, key: {"enabled": True}})
    with pytest.raises(ConfigError, match=f"deepspeed.{key} is set by train.trackers"):
        engine_config(settings)
