"""The index on disk: damaged in any way it is measured again, and no sample is trained on that is not what it says."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.faults.changed import edit, zero_body
from tests.support.data import build, collator, index_of, say, write_image
from tests.support.runner import Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train.data import building, table
from vtprune_train.data.index import SampleIndex, Source
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.plan.planner import Planner
from vtprune_train.data.sources.base import BOUNDS, Bounds
from vtprune_train.files import checksums

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "changed.py"
SHORT = ("data.eval=[]", "train.epochs=1")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def zero_end(path):
    """Its size stays, and whatever stands in its header."""
    content = path.read_bytes()
    path.write_bytes(content[:-24] + bytes(len(content[-24:])))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def flip_first(path):
    flip(path, 0)


def flip_last(path):
    flip(path, 1)


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object))
    path.with_suffix(".npy").replace(path)


def folder(path):
    path.unlink()
    (path / "in it").mkdir(parents=True)


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("gone")


def pipe(path):
    """Reading it would never end."""
    path.unlink()
    os.mkfifo(path)


DAMAGES = [truncate, zero, flip, flip_first, flip_last, empty, pickled, folder, link_to_nothing, pipe]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight files, their whole table, and a build of it that was cut off before the pieces were joined."""
    root = tmp_path_factory.mktemp("shards")
    (root / "data").mkdir()
    for shard in range(8):
        lines = [json.dumps({"id": f"{shard}-{i}", "conversations": say(f"what {i}", "a cat")}) for i in range(30)]
        (root / "data" / f"{shard}.jsonl").write_text("\n".join(lines))
    source = Source(root / "data" / "*.jsonl", Path())
    whole = build([source], root / "whole")[0].selections[0].table.folder

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(building, "_assemble", killed)
        build([source], root / "cut")
    [pieces] = (root / "cut").glob("cache/*.building")
    assert len(list(pieces.glob("*.npz"))) == 8
    return source, whole, root / "cut"


@pytest.fixture
def cut_off(shards, tmp_path):
    source, whole, cut = shards
    shutil.copytree(cut, tmp_path / "cut")
    return source, whole, tmp_path / "cut"


def assert_equal_tables(made, whole):
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    assert names == sorted(path.name for path in made.iterdir() if path.is_file())
    for name in names:
        assert (made / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_named_and_measured_again(cut_off, caplog, damage):
    source, whole, root = cut_off
    [pieces] = root.glob("cache/*.building")
    damage(pieces / "0000002.npz")
    shutil.copy(pieces / "0000005.npz", pieces / "0000006.npz")
    times = {path.name: path.lstat().st_mtime_ns for path in pieces.glob("*.npz")}
    measured = []
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patched:
        real = building.measure_piece
        patched.setattr(building, "measure_piece", lambda *given: measured.append(given[3].name) or real(*given))
        made = build([source], root)[0].selections[0].table.folder
    assert_equal_tables(made, whole)
    again = ["0000006.npz"] if damage is link_to_nothing else ["0000002.npz", "0000006.npz"]
    for name in again:
        assert f"{name}, a piece of the index, cannot be used" in caplog.text
    assert measured == ["0000002.npz", "0000006.npz"] and len(times) == 8
    assert "continuing with 6 finished piece(s)" in caplog.text
    assert not list(root.glob("cache/*building")), "nothing is left of the build"


@pytest.mark.timeout(120)
def test_a_worker_killed_while_it_starts_blocks_nothing(shards, tmp_path):
    """Also with more to hand over than a pipe holds: its parent must not wait for it to read on."""
    source, *_ = shards
    killed = []

    def kill():
        while not killed:
            for line in Path("/proc/self/task").glob("*/children"):
                for pid in map(int, line.read_text().split()):
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match=r"was killed, perhaps because memory ran out; start again"):
        build([replace(source, ignore=("x" * 300_000,))], tmp_path, workers=2)
    assert killed


def a_file_in_place_of_the_folder(pieces):
    shutil.rmtree(pieces)
    pieces.write_text("")


def of_other_files(pieces):
    pieces.rename(pieces.with_name(pieces.name.replace(".building", "0.building")))


def a_table_cut_off(pieces):
    (pieces / "table" / "text.npy").mkdir(parents=True)
    (pieces / "files.json").write_bytes(b"\xff\0")
    (pieces / "0000001.npz.77.tmp").write_text("half")


def a_file_called_table(pieces):
    (pieces / "table").write_text("")
    (pieces / "id_hash.npy").write_text("")


@pytest.mark.parametrize("leave", [a_file_in_place_of_the_folder, of_other_files, a_table_cut_off, a_file_called_table])
def test_what_a_build_left_never_blocks_the_next(cut_off, leave):
    source, whole, root = cut_off
    [pieces] = root.glob("cache/*.building")
    leave(pieces)
    assert_equal_tables(build([source], root)[0].selections[0].table.folder, whole)
    assert not list(root.glob("cache/*building*"))


def test_leftovers_of_a_kill_after_the_table_was_finished_are_removed(shards, tmp_path):
    source, *_ = shards
    made = build([source], tmp_path)[0].selections[0].table.folder
    left = made.with_name(f"{made.name}.00000000.building")
    left.mkdir()
    (left / "0000000.npz").write_text("half")
    build([source], tmp_path)
    assert not left.exists()


CHANGED = [zero, zero_end, truncate, flip, flip_last, empty, folder, link_to_nothing, pipe]


@pytest.mark.parametrize("damage", CHANGED)
@pytest.mark.parametrize("name", ["text.npy", "manifest.json", "errors.jsonl"])
def test_a_damaged_table_is_named_and_made_again(tmp_path, caplog, damage, name):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)] + [{"id": "bad"}]
    before = index_of(tmp_path, records, max_bad=1)[0].selections[0].table.folder
    shutil.copytree(before, tmp_path / "whole")
    damage(before / name)
    caplog.clear()
    after = index_of(tmp_path, None, max_bad=1)[0]
    assert f"the index in {before} is damaged ({name}" in caplog.text and "indexing again" in caplog.text
    assert_equal_tables(after.selections[0].table.folder, tmp_path / "whole")
    assert len(after) == 5


@pytest.mark.parametrize("damage", CHANGED)
@pytest.mark.parametrize("name", ["rows.bin", "manifest.json", "bad.bin"])
def test_a_damaged_selection_is_named_and_made_again(tmp_path, caplog, damage, name):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(40)] + [{"id": "bad"}]
    first = index_of(tmp_path, records, max_bad=1)[0]
    before, identity, rows = first.selections[0].folder, first.identity(), first.selections[0].rows.tolist()
    damage(before / name)
    caplog.clear()
    again = index_of(tmp_path, None, max_bad=1)[0]
    assert f"the selection in {before} is damaged ({name}" in caplog.text
    assert again.identity() == identity and again.selections[0].rows.tolist() == rows


def test_another_number_in_a_manifest_is_seen(tmp_path, caplog):
    first = index_of(tmp_path, [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)])[0]
    for folder_of, key in ((first.selections[0].folder, "samples"), (first.selections[0].table.folder, "records")):
        content = (folder_of / "manifest.json").read_text()
        assert f'"{key}": 5' in content
        (folder_of / "manifest.json").write_text(content.replace(f'"{key}": 5', f'"{key}": 4'))
        assert len(index_of(tmp_path, None)[0]) == 5
    assert caplog.text.count("is damaged (manifest.json: its content does not match its checksum)") == 2


def test_a_table_that_is_a_file_is_made_again(tmp_path):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)]
    made = index_of(tmp_path, records)[0].selections[0]
    shutil.rmtree(made.table.folder)
    made.table.folder.write_text("")
    made = index_of(tmp_path, None)[0].selections[0]
    shutil.rmtree(made.folder)
    made.folder.write_text("")
    assert len(index_of(tmp_path, None)[0]) == 5


def test_a_whole_selection_of_another_table_is_made_again(tmp_path, caplog):
    """Its rows would be others, or none; its files fit its manifest."""
    made = {}
    for name, num in (("few", 5), ("many", 40)):
        (tmp_path / name).mkdir()
        records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(num)]
        made[name] = index_of(tmp_path / name, records)[0].selections[0].folder
    shutil.rmtree(made["few"])
    shutil.copytree(made["many"], made["few"])
    caplog.clear()
    assert len(index_of(tmp_path / "few", None)[0]) == 5
    assert f"the selection in {made['few']} is damaged (it belongs to another index); selecting again" in caplog.text


def test_a_whole_table_of_other_settings_is_made_again(tmp_path, caplog):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)]
    made = index_of(tmp_path, records)[0].selections[0].table.folder
    other = index_of(tmp_path, None, bounds=Bounds(record=10_000, text=1_000))[0].selections[0].table.folder
    shutil.rmtree(made)
    shutil.copytree(other, made)
    caplog.clear()
    again = index_of(tmp_path, None)[0].selections[0].table
    assert f"the index in {made} was built with other settings; indexing again" in caplog.text
    assert again.manifest["made_with"]["bounds"] == list(BOUNDS)


@pytest.mark.parametrize("name", ["distrusted.txt", "../index.lock"])
@pytest.mark.parametrize("leave", [Path.mkdir, lambda path: path.symlink_to("gone")])
def test_a_name_that_is_taken_blocks_no_start(tmp_path, name, leave):
    made = index_of(tmp_path, [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)])[0]
    path = made.selections[0].table.folder / name
    path.unlink(missing_ok=True)
    leave(path)
    assert len(index_of(tmp_path, None)[0]) == 5
    assert not path.is_dir() and not path.is_symlink()


def test_a_kill_while_mended_images_are_entered(tmp_path, caplog, monkeypatch):
    """Pictures that can be read by now are entered; a kill in the middle of that is seen."""
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)]
    records.append({"id": "p", "image": "a.png", "conversations": say("<image> what", "a cat")})
    assert len(index_of(tmp_path, records, max_bad=1)[0]) == 5
    write_image(tmp_path / "images" / "a.png")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(table, "replace_synced", killed)
        index_of(tmp_path, None, max_bad=1)
    again = index_of(tmp_path, None, max_bad=1)[0]
    assert len(again) == 6 and again.lengths([5]).span_tokens[0] > 0


def test_what_was_only_touched_is_not_indexed_again(tmp_path, caplog):
    """Moved, copied with its time or made readable by others: its records are compared, once."""
    records = [{"conversations": say(f"what {i}", "a cat")} for i in range(700)]
    index_of(tmp_path, records)
    (tmp_path / "train.json").chmod(0o600)
    with caplog.at_level(logging.INFO):
        again = index_of(tmp_path, None)[0]
    assert "comparing its records" in caplog.text and "indexing again" not in caplog.text and len(again) == 700
    caplog.clear()
    with caplog.at_level(logging.INFO):
        index_of(tmp_path, None)
    assert not caplog.text


@pytest.mark.parametrize("number", [0, 699])
def test_an_edit_under_the_old_time_is_seen(tmp_path, caplog, number):
    records = [{"id": f"r{i}", "conversations": say(f"what {i:04d}", "a cat")} for i in range(700)]
    index, _ = index_of(tmp_path, records)
    edit(tmp_path / "train.json", b"what %04d" % number, b"that %04d" % number)
    with pytest.raises(
        RuntimeError, match=rf"train.json: record r{number} differs from what was indexed.*; start again"
    ):
        index.record(number)
    again, _ = index_of(tmp_path, None)
    assert f"record r{number} differs from what was indexed" in caplog.text and "indexing again" in caplog.text
    assert again.identity() != index.identity() and "that" in again.record(number).turns[0].text
    edit(tmp_path / "train.json", b"that %04d" % number, b"what %04d" % number)
    assert index_of(tmp_path, None)[0].identity() == index.identity()
    assert "train.json has changed since it was indexed, although its size and time are the same" in caplog.text


def test_an_edit_that_breaks_the_record_is_named(tmp_path):
    index, _ = index_of(tmp_path, [{"id": f"r{i}", "conversations": say(f"what {i}", "a cat")} for i in range(5)])
    edit(tmp_path / "train.json", b'what 3"', b"what 3 ")
    with pytest.raises(RuntimeError, match=r"data file .*train.json.*start again"):
        index.record(3)


@pytest.mark.parametrize(
    ("column", "said"),
    [("text", "text tokens"), ("supervised", "supervised tokens"), ("tokens", "visual tokens"),
     ("span_starts", "images and videos")],
)  # fmt: skip
def test_a_sample_of_another_length_than_indexed_is_named(tmp_path, caplog, monkeypatch, column, said):
    """Columns damaged under a running process, should the file system not tell of it."""
    monkeypatch.setattr(checksums.Watch, "changed", lambda self: "")
    write_image(tmp_path / "images" / "a.png")
    record = {"id": "r", "image": "a.png", "conversations": say("<image> what", "a cat")}
    index, encoder = index_of(tmp_path, [record, {**record, "id": "s"}])
    zero_body(index.selections[0].table.folder / f"{column}.npy")
    with pytest.raises(RuntimeError, match=rf"sample 0:1:s has \d+ {said}, but 0 in the index; start again"):
        collator(index, encoder).load(1, 1)
    again, encoder = index_of(tmp_path, None)
    assert "indexing again" in caplog.text
    collator(again, encoder).load(1, 1)


@pytest.mark.parametrize("damage", [zero_end, truncate, flip])
@pytest.mark.parametrize("name", ["rows.bin", "tokens.npy", "tiles.npy", "ids.npy", "at.npy", "span_starts.npy"])
def test_a_file_changed_in_place_is_noticed(tmp_path, caplog, monkeypatch, name, damage):
    """Also where neither lengths nor contents would tell; by the process that plans and by those that decode."""
    monkeypatch.setattr(SampleIndex, "PAUSE", 0)
    write_image(tmp_path / "images" / "a.png")
    record = {"image": "a.png", "conversations": say("<image> what", "a cat")}
    index = index_of(tmp_path, [{"id": f"r{number}", **record} for number in range(9)])[0]
    before = index.lengths(range(9)).tokens.tolist()
    selection = index.selections[0]
    folder = selection.folder if name == "rows.bin" else selection.table.folder
    state = (folder / name).stat()
    damage(folder / name)
    os.utime(folder / name, ns=(state.st_atime_ns, state.st_mtime_ns))
    for use in (index.lengths, index.locate, pickle.loads(pickle.dumps(index)).locate):
        with pytest.raises(RuntimeError, match=rf"{folder / name} was changed while it was in use; start again to"):
            use(np.array([3]) if use == index.lengths else 3)
    again = index_of(tmp_path, None)[0]
    assert ("selecting again" if name == "rows.bin" else "indexing again") in caplog.text
    assert again.lengths(range(9)).tokens.tolist() == before


def test_a_file_that_is_replaced_or_only_touched_is_no_change(tmp_path, monkeypatch):
    """Another start that indexes again, enters pictures or selects again writes new files."""
    monkeypatch.setattr(SampleIndex, "PAUSE", 0)
    index = index_of(tmp_path, [{"id": f"r{number}", "conversations": say("what", "a cat")} for number in range(9)])[0]
    selection = index.selections[0]
    (selection.folder / "rows.bin").chmod(0o600)
    os.link(selection.table.folder / "text.npy", tmp_path / "link")
    assert index.locate(3) == (0, 3) and index.lengths([3]).text[0] > 0
    shutil.copytree(selection.table.folder, tmp_path / "other")
    shutil.rmtree(selection.table.folder)
    assert index.locate(3) == (0, 3) and index.lengths([3]).text[0] > 0
    (tmp_path / "other").rename(selection.table.folder)
    zero(selection.table.folder / "text.npy")
    assert index.locate(3) == (0, 3) and index.lengths([3]).text[0] > 0


def test_lengths_that_never_fitted_are_measured_again(tmp_path, caplog):
    """Checksums fit, lengths do not (another version of the tokenizer's library): the next start indexes again."""
    index, encoder = index_of(tmp_path, [{"id": "r", "conversations": say("what", "a cat")}])
    made = index.selections[0].table.folder
    zero_body(made / "text.npy")
    manifest = checksums.read_manifest(made)
    checksums.seal(made, manifest, {**manifest["sums"], "text.npy": checksums.checksum(made / "text.npy")})
    index, encoder = index_of(tmp_path, None)
    with pytest.raises(RuntimeError, match=r"sample 0:0:r has \d+ text tokens, but 0 in the index"):
        collator(index, encoder)([0])
    index, encoder = index_of(tmp_path, None)
    assert "text tokens, but 0 in the index; indexing again" in caplog.text
    collator(index, encoder)([0])


def test_a_reason_that_a_full_disk_left_empty_counts(tmp_path, caplog):
    index, _ = index_of(tmp_path, [{"id": "r", "conversations": say("what", "a cat")}])
    (index.selections[0].table.folder / "distrusted.txt").touch()
    index_of(tmp_path, None)
    assert "does not fit its data; indexing again" in caplog.text


def test_no_micro_batch_is_beyond_its_limit(tmp_path):
    index, encoder = index_of(tmp_path, [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(4)])
    collate = collator(index, encoder)
    short = Planner(
        index.order(), lambda _, samples: (np.ones(len(samples), dtype=np.int64), np.ones(len(samples))),
        longest=1, global_batch_size=4, max_tokens=4, world_size=1,
    )  # fmt: skip
    loader = StepLoader(collate, short, first_step=0, end_step=1, rank=0, workers=0, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match=r"exceeds data.max_tokens"):
        loader.decode(next(iter(loader._tasks(short.plan(0)))))


@pytest.mark.parametrize(("build_of", "name"), [("nothing", "0000000.npz"), ("pieces", "at.npy")])
def test_a_full_disk_names_the_file(cut_off, tmp_path, build_of, name):
    """In a process that may write no file of more than 1000 bytes."""
    source, _, root = cut_off
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            build([source], root if build_of == "pieces" else tmp_path)
        except OSError as error:
            sender.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 0 and receiver.poll()
    said = receiver.recv()
    assert said.startswith(f"[Errno {errno.EFBIG}] File too large: ") and name in said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("index"))
    made.run("whole", *SHORT)
    return made


def table_of(runs):
    [manifest] = runs.folder.glob("cache/index-*/manifest.json")
    return manifest.parent


def test_a_run_on_a_damaged_table_indexes_again(runs):
    for name in ("text.npy", "tokens.npy"):
        zero_body(table_of(runs) / name)
    done = runs.run("zeroed", *SHORT, ranks=2)
    assert f"the index in {table_of(runs)} is damaged (text.npy is truncated or changed); indexing again" in done.stderr
    assert done.stderr.count("indexing again") == 1
    digests = [[step["data_digest"] for step in runs.metrics(name)] for name in ("zeroed", "whole")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["text.npy", "rows.bin"])
def test_a_table_zeroed_under_a_run_stops_it(runs, name):
    """The next start indexes or selects again and goes on to the same bits."""
    settings = (*SHORT, "train.save_every=1")
    runs.run(name, *settings, "run.stop_after=1")
    done = runs.run(name, *settings, expect=1, script=SCRIPT, env={"CHANGED": name})
    assert f"{name} was changed while it was in use; start again to" in done.stderr
    assert [line["step"] for line in runs.metrics(name)] == [1]
    done = runs.run(name, *settings)
    assert f"is damaged ({name}" in done.stderr
    assert_same_metrics(runs.metrics(name), runs.metrics("whole"))
    assert_equal_checkpoints(runs.checkpoint(name), runs.checkpoint("whole"))


def test_data_edited_under_a_run_stops_it(runs):
    """No run goes on with other data, whatever the times of its files say; put back, it ends with the same bits."""
    data = runs.folder / "data" / "train.json"
    settings = (*SHORT, "train.save_every=1")
    runs.run("edited", *settings, "run.stop_after=1")
    done = runs.run("edited", *settings, expect=1, script=SCRIPT, env={"CHANGED": "train.json"})
    assert "differs from what was indexed; start again" in done.stderr
    assert "train.json: record train" in done.stderr and b"how bright" not in data.read_bytes()
    done = runs.run("edited", *settings, expect=2)
    assert "differs from what was indexed" in done.stderr and "indexing again" in done.stderr
    assert "number and hash of the samples: checkpoint" in done.stderr
    edit(data, b"HOW bright", b"how bright")
    done = runs.run("edited", *settings)
    assert "train.json has changed since it was indexed, although its size and time are the same" in done.stderr
    assert_same_metrics(runs.metrics("edited"), runs.metrics("whole"))
    assert_equal_checkpoints(runs.checkpoint("edited"), runs.checkpoint("whole"))


def test_an_image_of_another_size_is_measured_at_the_next_start(runs, tmp_path):
    shutil.copytree(runs.folder / "data", tmp_path / "data")
    picture = tmp_path / "data" / "images" / "train-0-0.png"
    settings = (*SHORT, f"data.root={tmp_path / 'data'}", "data.workers=0")
    runs.run("resized", *settings, "run.stop_after=1")
    state, size = picture.stat(), Image.open(picture).size
    Image.new("RGB", (size[0] * 3, size[1])).save(picture)
    os.utime(picture, ns=(state.st_atime_ns, state.st_mtime_ns))
    said = f"image {picture}: it is {size[1]} x {3 * size[0]}, but was {size[::-1]} when the data was indexed; "
    shutil.rmtree(runs.directory("resized"))
    done = runs.run("resized", *settings, expect=3)
    assert f"{said}start again to rebuild the index" in done.stderr
    done = runs.run("resized", *settings)
    assert f"{said}indexing again" in done.stderr and not runs.metrics("resized")[-1].get("unreadable")


def zero_without_manifest(path):
    """As in the folder of an older version."""
    zero(path)
    (path.parent / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [zero, folder, zero_without_manifest])
def test_a_damaged_tokenizer_of_a_run_is_trained_again(runs, damage):
    """Also one whose checkpoints go on with it."""
    name = f"tokenizer_{damage.__name__}"
    runs.run(name, *SHORT, "run.stop_after=2")
    kept = runs.directory(name) / "tokenizer"
    damage(kept / "tokenizer.json")
    (kept.parent / "tokenizer.tmp").mkdir()
    (kept.parent / "tokenizer.lock").unlink(missing_ok=True)
    (kept.parent / "tokenizer.lock").mkdir()
    done = runs.run(name, *SHORT)
    what = "manifest.json is missing" if damage is zero_without_manifest else "tokenizer.json"
    assert f"the tokenizer in {kept} is damaged ({what}" in done.stderr
    assert_equal_checkpoints(runs.checkpoint(name), runs.checkpoint("whole"))
