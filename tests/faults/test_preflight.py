"""A rank without the memory for the worst micro-batch."""

import json
from pathlib import Path

import pytest

from tests.support.runner import Runs

pytestmark = pytest.mark.slow


def test_out_of_memory_on_one_rank_ends_the_job_with_advice(tmp_path):
    """The other rank waits for it in a collective of ZeRO-3."""
    runs = Runs(tmp_path)
    settings = ("train.preflight=always", "data.eval=[]", "data.workers=0", "deepspeed=configs/deepspeed/zero3.json")
    launch = {"script": Path(__file__).parent / "poison.py", "env": {"FAULTS": json.dumps({"no_memory": True})}}
    done = runs.run("full", *settings, expect=1, ranks=2, timeout=100, **launch)
    assert "out of memory before the first step on rank 1" in done.stderr
    assert "lower data.max_tokens=600" in done.stderr and "Tried to allocate 7.00 GiB" in done.stderr
    assert not runs.metrics("full")
