"""The CUDA allocator's setting in training processes."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from vtprune_train.training import process

pytestmark = pytest.mark.slow


@pytest.fixture
def environment():
    with mock.patch.dict(os.environ):
        for name in process.ALLOCATOR_VARIABLES:
            os.environ.pop(name, None)
        yield os.environ


def test_segments_grow_and_the_log_says_so(environment, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level("INFO", logger=process.__name__):
        process.set_allocator()
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA allocator: PYTORCH_ALLOC_CONF=expandable_segments:True (set the variable yourself to override)"
    ]


@pytest.mark.parametrize("name", process.ALLOCATOR_VARIABLES)
def test_what_the_user_set_stays(environment, name, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment[name] = "max_split_size_mb:512"
    before = dict(environment)
    with caplog.at_level("INFO", logger=process.__name__):
        process.set_allocator()
    assert dict(environment) == before
    assert f"CUDA allocator: {name}=max_split_size_mb:512" in caplog.text


READ = """
import torch
from vtprune_train.training import process
process.set_allocator()
if torch.version.cuda:
    print(torch._C._cuda_memorySnapshot(None)["allocator_settings"]["expandable_segments"])
else:
    print(torch._C._accelerator_getAllocatorSettings() == process.GROWING_SEGMENTS)
"""


def test_pytorch_reads_it_although_it_was_imported_before(environment):
    ran = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.stdout.strip() == "True", ran.stderr
