"""Half precision: training computes the positions that ``from_pretrained`` does."""

import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES
from runner import ROOT
from torch import nn

from vtprune_train.config import ConfigError
from vtprune_train.training.engine import start_engine


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "half_precision.py"), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_from_pretrained(measured, family):
    cases = {name: found for name, found in measured.items() if name.partition(" ")[0] == family}
    assert len(cases) == (3 if family in ("llava", "llava_next") else 1), cases
    for name, found in cases.items():
        assert found["positions"] > 1000 and found["dtype"] == "torch.bfloat16", (name, found)
        assert found["buffers"] == [], (name, found)
        assert found["largest_difference"] == 0.0, (name, found)


def test_an_engine_that_casts_buffers_is_refused(monkeypatch):
    model = nn.Linear(2, 2)
    model.register_buffer("inv_freq", torch.ones(2), persistent=False)

    class Engine:
        module = model

    def initialize(**_):
        model.inv_freq = model.inv_freq.bfloat16()
        return Engine, None, None, None

    monkeypatch.setattr("deepspeed.initialize", initialize)
    with pytest.raises(ConfigError, match=r"cast the buffer inv_freq from torch.float32 to torch.bfloat16"):
        start_engine(model, torch.optim.SGD(model.parameters(), lr=1.0), {})
