"""What DeepSpeed would write is collected, and its engine is as it was, whatever goes wrong."""

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from vtprune_train.files import pickles
from vtprune_train.training.engine.state import collect_files


class Writer:
    def save(self, state_dict, path):
        raise AssertionError("written by DeepSpeed")


class Engine:
    """Saves two files as DeepSpeed's engine does."""

    def __init__(self, error=None):
        self.checkpoint_engine, self.error = Writer(), error

    def _copy_recovery_script(self, save_path):
        raise AssertionError("a script is written")

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        assert (save_latest, exclude_frozen_parameters) == (False, True)
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"name": name}, path=f"{folder}/{tag}/{name}")
        self._copy_recovery_script(folder)
        if self.error is not None:
            raise self.error


def test_what_would_be_written_is_copied_and_collected():
    engine = Engine()
    files = collect_files(engine, Path("checkpoint"), "deepspeed", lambda state: {**state, "copied": True}, True)
    assert files == [
        (Path("checkpoint/deepspeed/model.pt"), {"name": "model.pt", "copied": True}),
        (Path("checkpoint/deepspeed/optimizer.pt"), {"name": "optimizer.pt", "copied": True}),
    ]
    assert list(vars(engine)) == ["checkpoint_engine", "error"] and not vars(engine.checkpoint_engine)


def test_an_error_leaves_nothing_replaced():
    engine = Engine(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        collect_files(engine, Path("checkpoint"), "deepspeed", dict, True)
    assert list(vars(engine)) == ["checkpoint_engine", "error"] and not vars(engine.checkpoint_engine)


class Stubborn(Engine):
    def __delattr__(self, name):
        super().__delattr__(name)
        raise RuntimeError(f"{name} stays")


def test_an_error_while_one_is_put_back_leaves_the_other_one_put_back():
    engine = Stubborn()
    with pytest.raises(RuntimeError, match="_copy_recovery_script stays"):
        collect_files(engine, Path("checkpoint"), "deepspeed", dict, True)
    assert not vars(engine.checkpoint_engine)


def test_a_stage_is_written_as_in_every_python(tmp_path, monkeypatch):
    """Python 3.11.2 would write a call of getattr, which is refused where the file is read."""
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda stage, protocol: (getattr, (ZeroStageEnum, stage.name)))
    torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "file.pt")
    assert pickles.read(tmp_path / "file.pt") == {"zero_stage": 2}
