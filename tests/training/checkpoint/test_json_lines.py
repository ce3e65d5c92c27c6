"""The files that a run writes line by line: restored from a checkpoint's copy, whole on a full disk."""

import contextlib
import errno
import gzip
import json
import os
import random
import resource
import stat

import pytest
import torch
from safetensors.torch import save_file

from vtprune_train.files.disk import naming, replace_synced, sync, write_synced
from vtprune_train.training.checkpoint import writing
from vtprune_train.training.checkpoint.json_lines import JsonLines, ranges


def line(step):
    return {"step": step, "loss": 1 / (step + 1), "name": f"\u00fc {step}"}


def written(folder, steps, **options):
    """A file with a line for each of the steps, and a checkpoint that holds a copy of it."""
    file = JsonLines(folder / "metrics.jsonl", **options)
    file.rewind(0)
    for step in steps:
        file.append(line(step))
    checkpoint = folder / f"step_{max(steps):08d}"
    (checkpoint / "logs").mkdir(parents=True)
    (checkpoint / "logs" / "metrics.jsonl.gz").write_bytes(file.copy())
    return file, checkpoint


@contextlib.contextmanager
def small_disk(size):
    """No file can grow beyond ``size`` bytes: the kernel writes what fits, then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def keep(*numbers):
    return lambda lines: b"".join(lines[number - 1] for number in numbers)


DAMAGE = {
    "the end is missing": (keep(1, 2, 3), "lines of step 4 to 5"),
    "a line is cut": (lambda lines: b"".join(lines)[:-20], "lines of step 5"),
    "a tail of zeros": (lambda lines: b"".join(lines[:3]) + bytes(500), "lines of step 4 to 5"),
    "zeros in the middle": (lambda lines: lines[0] + bytes(len(lines[1])) + b"".join(lines[2:]), "step 2 to 3"),
    "garbage": (lambda lines: b"".join([*lines[:2], b"\xff\xfe{]\n", *lines[2:]]), "removed 1 unreadable line(s)"),
    "no object": (lambda lines: b"".join([lines[0], b'7\n{"step": "x"}\n', *lines[1:]]), "2 unreadable line(s)"),
    "brackets without an end": (lambda lines: b"".join([*lines, b"[" * 100_000]), "the first is line 6"),
    "steps that no step has": (
        lambda lines: b"".join([b'{"step": 0}\n{"step": -1}\n', *lines]),
        "2 unreadable line(s)",
    ),
    "a line is missing": (keep(1, 2, 4, 5), "lines of step 3"),
    "another number": (lambda lines: b"".join(lines).replace(b"0.25", b"0.35"), "lines of step 3"),
    "another order": (keep(5, 1, 2, 4, 3), "sorted, with"),
    "twice": (keep(1, 2, 3, 3, 4, 5, 1), "sorted, with one line per step"),
    "empty": (keep(), "lines of step 1 to 5"),
}


@pytest.mark.parametrize("later", [0, 2], ids=["to the checkpoint", "further"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_restored(tmp_path, caplog, kind, later):
    """Whatever became of the file, and whether the run went on after the checkpoint or not."""
    file, checkpoint = written(tmp_path, range(1, 6), every_step=True)
    whole = file.path.read_bytes()
    damage, said = DAMAGE[kind]
    file.path.write_bytes(damage(whole.splitlines(True)) + b"".join(b'{"step": %d}\n' % (6 + n) for n in range(later)))
    again = JsonLines(file.path, every_step=True)
    again.rewind(5, checkpoint)
    assert file.path.read_bytes() == whole and said in caplog.text and str(file.path) in caplog.text
    again.append(line(6))
    assert [record["step"] for record in again.read()] == [1, 2, 3, 4, 5, 6]
    assert gzip.decompress(again.copy()) == file.path.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_that_is_whole_is_cut_without_a_warning(tmp_path, caplog):
    file, checkpoint = written(tmp_path, range(1, 6), every_step=True)
    whole = file.path.read_bytes()
    file.append(line(6))
    file.rewind(5, checkpoint)
    assert file.path.read_bytes() == whole and not caplog.records
    file.path.unlink()
    file.rewind(3, checkpoint)
    assert file.path.read_bytes() == b"".join(whole.splitlines(True)[:3]), "no more than the step that is resumed"


def test_without_a_copy_the_gap_is_named_and_lines_after_it_are_kept(tmp_path, caplog):
    file, _ = written(tmp_path, range(1, 10), every_step=True)
    lines = file.path.read_bytes().splitlines(True)
    file.path.write_bytes(b"".join([lines[0], b"\0\0\0\n", lines[2], *lines[5:]]))
    older = tmp_path / "step_00000008"
    older.mkdir()
    file.rewind(8, older)
    assert [record["step"] for record in file.read()] == [1, 3, 6, 7, 8]
    assert "removed 1 unreadable line(s), the first is line 2" in caplog.text
    assert "lost because step_00000008 has no copy of them: lines of step 2, 4 to 5" in caplog.text


def test_a_line_of_the_checkpoints_step_that_came_after_it_is_kept(tmp_path, caplog):
    """The evaluation at the end of training comes after the last checkpoint."""
    file, checkpoint = written(tmp_path, [2, 4])
    file.append(line(5), sync=True)
    file.rewind(5, checkpoint)
    assert [record["step"] for record in file.read()] == [2, 4, 5] and not caplog.records


@pytest.mark.parametrize("steps", [[], [2, 4]], ids=["an empty copy", "a copy"])
def test_lines_that_the_checkpoint_would_hold_are_removed(tmp_path, caplog, steps):
    """They are another run's, or their step is damaged. Lines of the checkpoint's own step may have come after it."""
    checkpoint = tmp_path / "step_00000005"
    (checkpoint / "logs").mkdir(parents=True)
    content = b"".join(json.dumps(line(step)).encode() + b"\n" for step in steps)
    (checkpoint / "logs" / "eval.jsonl.gz").write_bytes(gzip.compress(content))
    file = JsonLines(tmp_path / "eval.jsonl")
    file.path.write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2, 3, 4, 5, 6)))
    file.rewind(5, checkpoint)
    assert [record["step"] for record in file.read()] == [*steps, 5]
    foreign = ranges({1, 2, 3, 4} - set(steps))
    assert f"removed because step_00000005 does not have them: lines of step {foreign}" in caplog.text


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_leaves_whole_lines(tmp_path, room):
    file, _ = written(tmp_path, range(1, 4))
    before = file.path.read_bytes()
    with small_disk(len(before) + room), pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'") as error:
        file.append(line(4))
    assert error.value.__notes__ == ["Free disk space and start again; finished work is kept"]
    assert file.path.read_bytes() == before
    file.append(line(4))
    assert [record["step"] for record in file.read()] == [1, 2, 3, 4]


def test_a_file_that_is_removed_or_cut_while_it_is_written_comes_back(tmp_path, caplog):
    file, _ = written(tmp_path, range(1, 4))
    for step, act in ((4, os.unlink), (5, lambda path: os.truncate(path, 10))):
        act(file.path)
        file.append(line(step))
        assert caplog.text.count("writing it again") == step - 3
    assert [record["step"] for record in file.read()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/nowhere/file"), lambda path: path.mkdir()])
@pytest.mark.parametrize("later", [False, True])
def test_what_is_no_file_does_not_block_a_run(tmp_path, caplog, make, later):
    """A link that leads nowhere, before a run's first line."""
    file = JsonLines(tmp_path / "eval.jsonl")
    if not later:
        make(file.path)
    file.rewind(0)
    if later:
        make(file.path)
    file.append(line(1))
    assert file.read() == [line(1)] and str(file.path) in caplog.text


def test_a_copy_is_small(tmp_path):
    """And taking it does not read the file."""
    rng = random.Random(0)
    path = tmp_path / "metrics.jsonl"
    record = {f"number_{n}": rng.random() for n in range(20)}
    content = b"".join(json.dumps({**record, "step": step}).encode() + b"\n" for step in range(1, 5001))
    path.write_bytes(content)
    file = JsonLines(path, every_step=True)
    file.rewind(5000)
    path.write_bytes(b"")
    assert gzip.decompress(file.copy()) == content and len(file.copy()) < len(content) / 2


def test_ranges():
    assert ranges([3, 1, 2, 5]) == "1 to 3, 5"
    assert ranges(range(0, 30, 2)) == "0, 2, 4, 6, 8, 10, 12, 14 and 7 more"


WRITERS = {
    "write_synced": lambda path: write_synced(path, "x" * 100),
    "replace_synced": lambda path: replace_synced(path, "x" * 100),
    "a shard": lambda path: writing.write_file(path, {"weight": torch.ones(1000)}),
    "safetensors": lambda path: save_file({"weight": torch.ones(1000)}, path),
    "a rank's part": lambda path: writing._mark_written(path.parent, 0, {"a": {"size": 1, "sha256": "0" * 64}}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_an_error_of_the_disk_names_the_file(tmp_path, kind):
    path = tmp_path / "file"
    with small_disk(50), pytest.raises(OSError) as error, naming(path):
        WRITERS[kind](path)
    assert error.value.errno == 27 and str(tmp_path) in error.value.filename and "File too large" in str(error.value)
    assert not path.exists() or kind != "replace_synced"


def test_naming_leaves_other_errors_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), naming(tmp_path / "another"):
        (tmp_path / "gone").read_text()
    with pytest.raises(ValueError, match="no number"), naming(tmp_path):
        raise ValueError("no number")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or path.name == "refused":
            raise OSError(number, os.strerror(number))
        real(descriptor)

    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:  # a device that fails is another matter
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
            replace_synced(path, "x")
        return
    replace_synced(path, "x")
    assert path.read_text() == "x"
    path = path.rename(tmp_path / "refused")
    with pytest.raises(OSError, match="refused"):  # a file that is not synced is an error everywhere
        sync(path)
