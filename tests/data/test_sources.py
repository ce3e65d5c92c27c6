"""Data files of every kind, mixtures, and the index on disk."""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, Image, Value

from tests.support.data import build, collator, image_bytes, index_of, say, write_tar
from tests.support.helpers import tiny_tokenizer
from tests.support.runner import Runs, assert_equal_checkpoints
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config, without_effect
from vtprune_train.data.chat import ChatEncoder, Turn, get_template
from vtprune_train.data.index import Source
from vtprune_train.data.records import Conversation, Prompt, read_records
from vtprune_train.data.sources import arrow_rows, find_files, json_files, open_reader, tables
from vtprune_train.training import distributed

pytestmark = pytest.mark.slow


def records_of(folder, count=6):
    """Records with 0, 1 and 2 pictures by turns, as paths; the pictures are written."""
    records = []
    for number in range(count):
        names = [f"{10 * number + i}.png" for i in range(number % 3)]
        for i in range(number % 3):
            image_bytes(folder, 10 * number + i, (20 + 7 * number, 50))
        question = "<image>\n" * len(names) + "what is shown here ?"
        records.append(
            {"id": f"r{number}", "images": names, "conversations": say(question, "a red cat " * number + ".")}
        )
    return records


def in_bytes(folder, record):
    images = [{"bytes": (folder / "images" / name).read_bytes(), "path": name} for name in record["images"]]
    return {**record, "images": images}


def write_kinds(folder):
    """The same records in every kind of file."""
    records = records_of(folder)
    with_bytes = [in_bytes(folder, record) for record in records]
    (folder / "a.json").write_text(json.dumps(records, indent=1))
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(with_bytes), folder / "a.parquet", row_group_size=2)
    raw = [{**record, "images": [image["bytes"] for image in record["images"]]} for record in with_bytes]
    pq.write_table(pa.Table.from_pylist(raw), folder / "raw.parquet")
    Dataset.from_list(with_bytes).save_to_disk(str(folder / "disk"))
    members = []
    for record in with_bytes:
        described = {key: value for key, value in record.items() if key != "images"}
        members.append((f"x/{record['id']}.json", json.dumps(described).encode()))
        members += [(f"x/{record['id']}.{i}.png", image["bytes"]) for i, image in enumerate(record["images"])]
    write_tar(folder / "a.tar", members)
    for number, part in enumerate((records[:2], records[2:3], records[3:])):
        (folder / "shards").mkdir(exist_ok=True)
        (folder / "shards" / f"{number}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return records


def test_the_same_records_in_every_kind_of_file(tmp_path):
    write_kinds(tmp_path)
    names = ["a.json", "a.jsonl", "a.parquet", "raw.parquet", "disk", "a.tar", "shards/*.jsonl", "shards"]
    batches, lengths = [], []
    for name in names:
        index, encoder = build([Source(tmp_path / name, tmp_path / "images")], tmp_path)
        assert [index.sample_id(i).split(":")[2] for i in range(6)] == [f"r{i}" for i in range(6)], name
        lengths.append(index.lengths(range(6)).tokens.tolist())
        batches.append(collator(index, encoder)(range(6)))
        assert not batches[-1].unreadable, name
        assert index.order().samples(0, 0, 6).tolist() != list(range(6))
    for name, batch, length in zip(names, batches, lengths, strict=True):
        assert length == lengths[0], name
        assert batch.input_ids.equal(batches[0].input_ids) and batch.pixel_values.equal(batches[0].pixel_values), name


def test_an_image_feature_of_datasets(tmp_path):
    image_bytes(tmp_path, 1)
    features = Features({"image": Image(), "conversations": [{"from": Value("string"), "value": Value("string")}]})
    rows = [{"image": str(tmp_path / "images/1.png"), "conversations": say("<image> what", "a cat")}]
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "disk"))
    index, encoder = build([Source(tmp_path / "disk", tmp_path)], tmp_path)
    loaded = collator(index, encoder).load(0, 0)
    assert loaded.images.sizes == [(40, 60)]
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows)).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"contains several datasets \(test, train\); name one of them"):
        find_files(tmp_path / "both")


def test_members_of_a_tar(tmp_path):
    image = image_bytes(tmp_path, 1)
    named = {"image": "folder/b.png", "conversations": say("<image> what", "a cat")}
    both = {"images": ["k3.b.png", "k3.a.png"], "conversations": say("<image> what <image>", "a cat")}
    other = image_bytes(tmp_path, 2, (33, 44))
    members = [
        ("k1.jpg", image), ("k1.txt", b"a red cat\n"), ("k1.json", b'{"width": 3}'),
        ("k2.json", json.dumps(named).encode()), ("k2.png", image),
        ("k3.a.png", image), ("k3.b.png", other), ("k3.json", json.dumps(both).encode()),
        ("k4.json", json.dumps({**named, "image": ["one.png", "two.png"]}).encode()), ("k4.png", image),
        ("k5.json", b"{"), ("a/" + "long" * 40 + ".txt", b"no picture"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    records = list(read_records(tmp_path / "a.tar"))
    assert records[0] == Conversation("k1", (Turn("user", "<image>\n"), Turn("assistant", "a red cat")), (image,))
    assert records[1].id == "k2" and records[1].images == (image,), "one picture under another name"
    assert records[2].images == (other, image), "in the order in which the record names them"
    assert "2 image(s) but 1 <image>" in records[3].error and "k5.json is not JSON" in records[4].error
    assert records[5].turns[1].text == "no picture" and len(records) == 6
    reader = open_reader(tmp_path / "a.tar")
    places = [place for piece in reader.pieces() for place, _ in reader.scan(piece)]
    assert [reader.read(place)["id"] for place in reversed(places) if place != places[4]] == [
        records[i].id for i in (5, 3, 2, 1, 0)
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar.gz", b"x", "a.tar.gz is compressed, so its records cannot be read one by one; unpack it"),
        ("a.tar", b"\x1f\x8b garbage", "a.tar is not a plain tar"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not parquet, or is truncated"),
        ("a.json", b'[{"id": 1}, {"id": 2}', "a.json: not JSON .the list is not closed"),
        ("a.json", b'[{"id": 1} {"id": 2}]', "a.json: not JSON .',' or ']' expected, at byte 11"),
        ("a.json", b'[{"id": 1}] x', "unexpected content after the list"),
        ("a.json", b"", "a.json: not JSON"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.json", b"[" * 99999, "a.json: not JSON .maximum recursion depth"),
        ("a.jsonl", b'{"id": "\xff"}', "line 1: not JSON"),
        ("a.jsonl", b"[" * 99999, "a-0: its values are nested too deeply to be read"),
        ("a.jsonl", b"", "a.jsonl contains no record"),
        ("a.json", b"[]", "a.json contains no record"),
        ("*.parquet", None, r"no data file matches .*\*.parquet; check data.root"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build([Source(tmp_path / name, tmp_path)], tmp_path)


def test_broken_tables_are_named(tmp_path):
    records = [{"id": "1", "conversations": say("hi", "yo")}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:64] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet is broken in row group 0"):
        list(read_records(tmp_path / "a.parquet"))
    Dataset.from_list(records).save_to_disk(str(tmp_path / "disk"))
    next((tmp_path / "disk").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="disk cannot be read as a dataset"):
        list(read_records(tmp_path / "disk"))


def test_a_parquet_file_with_a_damaged_footer_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"id": "1", "conversations": say("hi", "yo")}]), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer + 40 : footer + 60] = b"\xff" * 20
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet is not parquet, or is truncated or damaged \(.*hrift"):
        build([Source(tmp_path / "a.parquet", tmp_path)], tmp_path)


@pytest.mark.parametrize("bound", [10**6, 2500])
def test_of_a_large_row_group_a_part_is_held(tmp_path, monkeypatch, bound):
    """Whatever the order of the reads; rows of more than the bound are passed over."""
    monkeypatch.setattr(arrow_rows, "BATCH", 4)
    monkeypatch.setattr(tables, "LARGEST_HELD", 9000)
    records = [{"id": f"{i}", "conversations": say("hi", f"{i} yo" * (900 if i % 7 == 3 else 200))} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    reader = tables.Parquet(tmp_path / "a.parquet", bound)
    scanned = dict(reader.scan(next(reader.pieces())))
    assert len(scanned) == 60 and len({isinstance(record, dict) for record in scanned.values()}) == 1 + (bound < 10**6)
    for place in sorted(scanned, key=lambda place: hash(place)):
        assert reader.read(place) == scanned[place] and len(reader._held.table) < 30


@pytest.mark.parametrize("damage", ["offset", "utf-8"])
def test_a_dataset_that_is_damaged_in_place_is_named(tmp_path, damage):
    """Arrow maps the file unchecked: an offset may lead anywhere."""
    Dataset.from_list([{"id": name, "conversations": say("hi", "yo")} for name in ("aaa", "bbb")]).save_to_disk(
        str(tmp_path / "disk")
    )
    [arrow] = (tmp_path / "disk").glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    if damage == "utf-8":
        content[content.index(b"aaabbb")] = 0xFF
    else:
        offsets = content.index(struct.pack("<3i", 0, 3, 6))
        content[offsets + 4 : offsets + 8] = struct.pack("<i", 1 << 30)
    index = build([Source(tmp_path / "disk", tmp_path)], tmp_path)[0]
    state = arrow.stat()
    arrow.write_bytes(content)
    os.utime(arrow, ns=(state.st_atime_ns, state.st_mtime_ns))
    for use in (lambda: index.record(0), lambda: build([Source(tmp_path / "disk", tmp_path)], tmp_path)):
        with pytest.raises((RuntimeError, ValueError), match=r"data folder .*/disk is broken in rows 0 to [01] \("):
            use()


def test_columns_and_folders_that_cannot_be_read(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"question": "a", "answer": "b"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'conversations' or 'messages'; it has question, answer"):
        build([Source(tmp_path / "a.parquet", tmp_path)], tmp_path)
    (tmp_path / "mixed").mkdir()
    with pytest.raises(ValueError, match=r"mixed contains no data file; use .json"):
        find_files(tmp_path / "mixed")
    (tmp_path / "mixed" / "a.json").touch()
    (tmp_path / "mixed" / "a.tar").touch()
    with pytest.raises(ValueError, match=r"several file types \(.json, .tar\); select one by a glob"):
        find_files(tmp_path / "mixed")


def test_a_json_list_is_read_in_blocks(tmp_path, monkeypatch):
    """Blocks of every small size cut texts, numbers and characters of several bytes in two."""
    records = [{"id": i, "text": 'ä€😀\\" [,]}' * (i % 4), "n": [12345, -1.5e3]} for i in range(20)] + [17, "x", None]
    (tmp_path / "a.json").write_text("\n" + json.dumps(records, ensure_ascii=False), encoding="utf-8-sig")
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_files, "BLOCK", block)
        monkeypatch.setattr(json_files, "PIECE_BYTES", 100)
        reader = open_reader(tmp_path / "a.json")
        pieces = list(reader.pieces())
        found = [item for piece in pieces for item in reader.scan(piece)]
        assert len(pieces) > 3 and [record for _, record in found] == records
        assert [reader.read(place) for place, _ in reversed(found)] == records[::-1]


def test_prompts(tmp_path):
    turns = (
        Turn("user", "<image>\n<image> what ?"),
        Turn("assistant", "cat"),
        Turn("user", "b"),
        Turn("assistant", "c"),
    )
    prompt = Prompt(system="Be brief.", prefix="Look: ", suffix="\nOne word.")
    applied = prompt.apply(Conversation("x", turns)).turns
    assert applied[:2] == (Turn("system", "Be brief."), Turn("user", "<image>\n<image> Look: what ?\nOne word."))
    assert applied[2:] == turns[1:]
    own = Conversation("x", (Turn("system", "Mine."), *turns))
    assert prompt.apply(own).turns[0] == Turn("system", "Mine.")
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": say("what is shown", "a cat")}) + "\n")
    index, encoder = build(
        [
            Source(tmp_path / "a.jsonl", tmp_path, name="plain"),
            Source(tmp_path / "a.jsonl", tmp_path, prompt=Prompt(suffix=" here ?"), name="asks"),
            Source(tmp_path / "a.jsonl", tmp_path, prompt=Prompt(system="")),
        ],
        tmp_path,
    )
    text = index.lengths([0, 1, 2]).text
    assert text[1] == text[0] + 2 and text[2] < text[0], "two words more; no system prompt"
    assert [index.sample_id(i) for i in range(3)] == ["plain:0:a-0", "asks:0:a-0", "2:0:a-0"]
    batch = collator(index, encoder)([0, 1, 2])
    assert len(batch.input_ids) == text.sum()


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "qwen", "llama_3", "plain"])
def test_counting_is_encoding(template):
    tokenizer = tiny_tokenizer()
    encoder = ChatEncoder(tokenizer, get_template(template), 4)
    conversations = [
        [
            Turn("user", "<image>\nwhat is shown ?"),
            Turn("assistant", "a cat"),
            Turn("user", "x"),
            Turn("assistant", ""),
        ],
        [Turn("system", "yes"), Turn("user", "a <image> b <image>"), Turn("assistant", "dog " * 9)],
    ]
    for turns, counted in zip(conversations, encoder.count(conversations), strict=True):
        encoded = encoder.encode(turns)
        expected = (len(encoded.input_ids) - len(encoded.image_offsets), int((encoded.labels >= 0).sum()))
        assert counted == expected
    silent = ChatEncoder(tokenizer, get_template({"user": "{text}", "assistant": "", "answer": "{text}"}), 4)
    refused = silent.count([[Turn("user", "a"), Turn("assistant", "")]])[0]
    assert isinstance(refused, ValueError) and "no token is supervised" in str(refused)


def test_duplicated_ids_are_said_and_both_are_used(tmp_path, caplog):
    records = [{"id": "same", "conversations": say("what", "a")}, {"id": "same", "conversations": say("what", "b")}]
    with caplog.at_level(logging.WARNING):
        index, _ = index_of(tmp_path, records)
    assert "1 record(s) have the id of an earlier record (first: same)" in caplog.text
    assert [index.sample_id(i) for i in range(2)] == ["0:0:same", "0:1:same"]


def test_identity_follows_the_samples(tmp_path):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)]
    first = index_of(tmp_path, records)[0].identity()
    assert index_of(tmp_path, records)[0].identity() == first
    assert index_of(tmp_path, records, take="first:4")[0].identity() != first
    records[3]["conversations"][1]["value"] = "a dog"
    assert index_of(tmp_path, records)[0].identity() != first


def test_ranks_with_other_samples_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [("one", "8:aa"), ("two", "7:bb")])
    with pytest.raises(ValueError, match=r"data.train differ between ranks: 8:aa on rank 0 \(one\), 7:bb on rank 1"):
        distributed.check_same("8:aa", "the samples of data.train")


def test_a_file_that_changes_in_use_stops_the_run(tmp_path):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)]
    index, _ = index_of(tmp_path, records)
    (tmp_path / "train.json").write_text(json.dumps(records[::-1]) + " ")
    with pytest.raises(RuntimeError, match=r"train.json changed while it was in use; start again"):
        index.record(3)


@pytest.mark.parametrize("name", ["text.npy", "manifest.json", "span_starts.npy"])
def test_a_damaged_index_is_made_again(tmp_path, caplog, name):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(5)]
    index, _ = index_of(tmp_path, records)
    path = index.selections[0].table.folder / name
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        again, _ = index_of(tmp_path, None)
    assert f"is damaged ({name}" in caplog.text and again.identity() == index.identity()
    rows = again.selections[0].folder / "rows.bin"
    rows.write_bytes(rows.read_bytes()[:-8])
    assert index_of(tmp_path, None)[0].selections[0].rows.tolist() == list(range(5))


BUILDER = """
import sys
from pathlib import Path
if __name__ == "__main__":  # the workers import this file too
    sys.path.insert(0, {tests!r})
    from tests.support.data import Source, build
    build([Source(Path(sys.argv[1]), Path("."))], Path(sys.argv[2]), workers=2)
"""


def test_a_killed_build_goes_on(tmp_path, caplog):
    """SIGKILL to a building process with two workers: they end too, its finished pieces are used, and the index is the
    one of a build that was left alone."""
    (tmp_path / "shards").mkdir()
    for shard in range(10):
        lines = [json.dumps({"id": f"{shard}-{i}", "conversations": say(f"what {i}", "a cat")}) for i in range(2000)]
        (tmp_path / "shards" / f"{shard:02d}.jsonl").write_text("\n".join(lines))
    script = tmp_path / "builder.py"
    script.write_text(BUILDER.format(tests=str(Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pattern = str(tmp_path / "shards" / "*.jsonl")
    process = subprocess.Popen([sys.executable, str(script), pattern, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 200
    while len(done := sorted(tmp_path.glob("cache/*.building/*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in done}
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    found = sorted(tmp_path.glob("cache/*.building/*.npz"))
    assert 2 <= len(found) < 10
    assert all(path.stat().st_mtime_ns == changed for path, changed in written.items())
    found[0].write_bytes(found[0].read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        resumed, _ = build([Source(Path(pattern), Path())], tmp_path)
    assert f"continuing with {len(found) - 1} finished piece(s)" in caplog.text
    assert f"{found[0]}, a piece of the index, cannot be used" in caplog.text
    whole, _ = build([Source(Path(pattern), Path())], tmp_path / "other")
    assert len(resumed) == 20_000 and resumed.identity() == whole.identity()
    folders = [index.selections[0].table.folder for index in (resumed, whole)]
    for path in folders[0].glob("*.npy"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
    assert resumed.sample_id(16_001).endswith(":8-1")


def is_running(pid):
    """Not ended, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write_config(folder, train):
    (folder / "run.yaml").write_text(
        yaml.safe_dump({"model": {"path": "x"}, "data": {"root": "/data", "train": train}})
    )
    return str(folder / "run.yaml")


def test_mixtures_in_files(tmp_path):
    (tmp_path / "mixtures").mkdir()
    inner = {"root": ".", "sources": [{"path": "b.parquet"}, {"path": "/else/c.tar", "images": "pics"}]}
    (tmp_path / "mixtures" / "inner.yaml").write_text(yaml.safe_dump(inner))
    outer = [{"path": "a.json", "weight": 0.5, "name": "chat"}, {"include": "inner.yaml"}]
    (tmp_path / "mixtures" / "outer.yaml").write_text(yaml.safe_dump(outer))
    config = load_config(write_config(tmp_path, "mixtures/outer.yaml"), ["data.train.1.weight=2"])
    assert [source.path for source in config.sources("train")] == [
        "/data/a.json", str(tmp_path / "mixtures" / "b.parquet"), "/else/c.tar"
    ]  # fmt: skip
    assert [source.weight for source in config.sources("train")] == [0.5, 2.0, 1.0]
    assert config.sources("train")[2].images == str(tmp_path / "mixtures" / "pics")
    beside = load_config(write_config(tmp_path, [{"path": "z.json"}, {"include": "mixtures/outer.yaml"}]))
    assert len(beside.data.train) == 4


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([{"path": "a", "weights": 2}], ["x.yaml, entry 0: weights: unknown key; did you mean", "weight?"]),
        ([{"path": "a"}, {"path": "b", "weight": -1}], ["x.yaml, entry 1: weight", "greater than 0"]),
        ([{"weight": 1}], ["x.yaml, entry 0: path", "required"]),
        ([{"path": "a", "prompt": {"prefix": "<image>"}}], ["prompt.prefix", "a prompt has no image"]),
        ([{"include": "x.yaml"}], ["x.yaml includes itself"]),
        ([{"include": "gone.yaml"}], ["gone.yaml does not exist"]),
        ([{"include": "x.yaml", "weight": 2}], ["an entry with include cannot have other keys", "weight"]),
        ({"files": []}, ["x.yaml is not a mixture"]),
        ([{"path": "a", "name": "n"}, {"path": "b", "name": "n"}], ["data.train", "two entries have the name 'n'"]),
        (["a.json"], ["x.yaml, entry 0"]),
        ("a.jsonl", ["a.jsonl is a data file, not a mixture"]),
        ("broken.yaml", ["broken.yaml is not YAML"]),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said(tmp_path, mixture, words):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(mixture))
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "broken.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError) as raised:
        load_config(write_config(tmp_path, mixture if isinstance(mixture, str) else "x.yaml"))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_mixture_settings_without_effect(tmp_path):
    config = load_config(
        write_config(tmp_path, [{"path": "a", "prompt": {"suffix": "x"}}]),
        ["data.template=plain", "data.eval=[{path: b, weight: 2}]"],
    )
    lines = "\n".join(without_effect(config))
    assert "data.eval.0.weight has no effect" in lines and "data.train.0.prompt" in lines


def write_mixture(folder):
    """Text in JSONL, pictures as bytes in parquet, and a tar of captioned pictures: a half, one and twice an epoch."""
    data = folder / "data"
    text = [{"id": f"t{i}", "conversations": say(f"how bright is number {i}?", "about 3")} for i in range(8)]
    (data / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in text))
    rows = []
    for number in range(6):
        image = (data / "images" / f"train-{5 * (number % 2)}-0.png").read_bytes()
        turns = say("<image>\nhow bright?", f"about {number}")
        rows.append({"id": f"p{number}", "image": image, "conversations": turns})
    pq.write_table(pa.Table.from_pylist(rows), data / "pictures.parquet", row_group_size=4)
    members = [[(f"c{i}.png", rows[0]["image"]), (f"c{i}.txt", b"grey")] for i in range(3)]
    write_tar(data / "captions-0.tar", [member for pair in members for member in pair])
    mixture = [
        {"path": "text.jsonl", "weight": 0.5, "name": "text", "prompt": {"suffix": " Answer with one word."}},
        {"path": "pictures.parquet", "name": "pictures"},
        {"path": "captions-*.tar", "weight": 2, "name": "captions", "prompt": {"prefix": "how bright?"}},
    ]
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))


def test_training_on_a_mixture_resumes_to_the_last_bit(tmp_path):
    """4 + 6 + 6 samples an epoch, six a step; stopped in the middle of the first epoch."""
    runs = Runs(tmp_path)
    write_mixture(tmp_path)
    settings = ("data.train=mixture.yaml", "data.eval=[]")
    runs.run("whole", *settings)
    runs.run("parts", *settings, "run.stop_after=2")
    runs.run("parts", *settings)
    whole, parts = runs.metrics("whole"), runs.metrics("parts")
    assert [step["samples"] for step in whole] == [6, 6, 4, 6, 6, 4]
    assert [step["data_digest"] for step in whole] == [step["data_digest"] for step in parts]
    assert_equal_checkpoints(runs.checkpoint("whole"), runs.checkpoint("parts"))
    changed = runs.run("parts", *settings, "data.train.0.weight=1", expect=2)
    assert "data.train.0.weight: checkpoint" in changed.stderr
    shard = tmp_path / "data" / "text.jsonl"
    shard.write_text(shard.read_text().replace("about 3", "about 4"))
    changed = runs.run("parts", *settings, expect=2)
    assert "text.jsonl has changed since it was indexed; indexing again" in changed.stdout + changed.stderr
    assert "number and hash of the samples: checkpoint" in changed.stderr
