"""A checkpoint's files: their hashes are computed while they are written."""

import hashlib
from pathlib import Path

import pytest
import torch

from vtprune_train.files.checksums import HashedFile
from vtprune_train.training.checkpoint.writing import write_file

STATE = {"weight": torch.arange(5000.0), "half": torch.ones(7, dtype=torch.bfloat16), "step": 3}


def test_the_entry_is_that_of_what_is_on_disk(tmp_path):
    entry = write_file(tmp_path / "state.pt", STATE)
    content = (tmp_path / "state.pt").read_bytes()
    assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["step"] == 3 and all(torch.equal(loaded[name], STATE[name]) for name in ("weight", "half"))


def test_a_full_disk_is_said_by_its_own_error_and_not_by_that_of_torch():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_file(Path("/dev/full"), STATE)


@pytest.mark.parametrize("content", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), torch.arange(5).numpy()])
def test_anything_with_a_buffer_is_written_and_counted(tmp_path, content):
    with HashedFile(tmp_path / "file") as file:
        assert file.write(content) == len(content)
    written = (tmp_path / "file").read_bytes()
    assert written == bytes(content) if not hasattr(content, "tobytes") else written == content.tobytes()
    assert file.size == len(written) and file.sha256.hexdigest() == hashlib.sha256(written).hexdigest()
