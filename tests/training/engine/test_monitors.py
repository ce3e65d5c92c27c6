"""DeepSpeed's monitors: whichever of them the JSON switches on, and none."""

from types import SimpleNamespace

import pytest

from tests.support.runner import Runs
from vtprune_train.training.engine.monitors import Monitors

SCALARS = [("train/loss", 1.5, 3)]


class Board:
    def __init__(self, enabled=True):
        self.enabled, self.summary_writer, self.written = enabled, object(), []

    def write_events(self, events):
        self.written += events


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("monitors"), num_train=6)


def test_a_run_without_tensorboard_goes_on_and_other_monitors_have_its_scalars(runs):
    csv = f"{{enabled: true, output_path: {runs.folder}, job_name: csv}}"
    json = f"deepspeed={{zero_optimization: {{stage: 1}}, tensorboard: {{enabled: false}}, csv_monitor: {csv}}}"
    settings = (json, "train.eval_show=2", "train.eval_every=1", "train.epochs=1", "data.workers=0", "run.stop_after=1")
    runs.run("csv", *settings)
    assert not (runs.directory("csv") / "tensorboard").exists()
    written = {path.name for path in (runs.folder / "csv").iterdir()}
    assert {"train_loss.csv", "eval_loss.csv"} <= written, written
    runs.run("csv", *settings[:-1], "run.stop_after=null")  # and resumes


def test_a_run_without_any_monitor(runs):
    json = "deepspeed={zero_optimization: {stage: 1}, tensorboard: {enabled: false}}"
    runs.run("none", json, "train.eval_show=2", "train.epochs=1", "data.workers=0")
    assert len(runs.metrics("none")) == 1 and not (runs.directory("none") / "tensorboard").exists()


@pytest.mark.parametrize("board", [None, Board(enabled=False)])
def test_no_writer_where_tensorboard_is_off_or_failed(board):
    monitors = Monitors(SimpleNamespace(tb_monitor=board, enabled=True))
    assert monitors.tensorboard is None
    monitors.write_tensorboard(SCALARS)
    assert board is None or not board.written


def test_tensorboard_alone_is_written():
    board = Board()
    monitors = Monitors(SimpleNamespace(tb_monitor=board, enabled=True))
    assert monitors.tensorboard is board.summary_writer
    monitors.write_tensorboard(SCALARS)
    assert board.written == SCALARS


@pytest.mark.parametrize("rank, enabled", [(1, True), (0, False)])
def test_nothing_is_written_by_other_ranks_or_without_monitors(monkeypatch, rank, enabled):
    monkeypatch.setattr("vtprune_train.training.distributed.rank", lambda: rank)

    def write_events(events):
        raise AssertionError(events)

    monitors = Monitors(SimpleNamespace(tb_monitor=None, enabled=enabled, write_events=write_events))
    assert not monitors.enabled
    monitors.write(SCALARS)
