"""Records that are too large: passed over by every reader without being kept, named, and nothing else is shifted."""

import difflib
import io
import json
import os
import random
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.support.data import build, index_of, say, write_tar
from tests.support.helpers import tiny_tokenizer
from vtprune_train.config.errors import ConfigError, nearest_name
from vtprune_train.config.paths import find_file
from vtprune_train.config.settings import Config
from vtprune_train.data import records as record_module
from vtprune_train.data.chat import ChatEncoder, Turn, get_template
from vtprune_train.data.index import Source
from vtprune_train.data.measure import Measure, Measured, measure_piece
from vtprune_train.data.records import TURN_BYTES, normalize, read_records
from vtprune_train.data.sources import arrow_rows, base, find_files, json_files, open_reader, tables
from vtprune_train.data.sources.base import Bounds, TooLarge
from vtprune_train.data.tokens import SectionTokenizer
from vtprune_train.files.checksums import read_sealed

BOUND = 50_000
HUGE = "a cat " * 50_000
KINDS = ["a.jsonl", "a.json", "a.parquet", "disk", "a.tar", "captions.tar"]


def records_with(text, count=9, where=(3, 8)):
    return [
        {"id": f"r{i}", "conversations": say(f"what is {i} ?", text if i in where else "a dog " * (i + 1))}
        for i in range(count)
    ]


def write(folder, kind, records):
    path = folder / kind
    if kind == "a.jsonl":
        path.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    elif kind == "a.json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "a.parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=5)
    elif kind == "disk":
        Dataset.from_list(records).save_to_disk(str(path))
    elif kind == "a.tar":
        write_tar(path, [(f"{r['id']}.json", json.dumps(r).encode()) for r in records])
    else:
        write_tar(path, [(f"{r['id']}.txt", r["conversations"][1]["value"].encode()) for r in records])
    return path


def places_and_records(path, bound=BOUND):
    reader = open_reader(path, bound)
    return reader, [found for piece in reader.pieces() for found in reader.scan(piece)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_passes_over_what_is_too_large(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(json_files, "BLOCK", 4096)
    whole = places_and_records(write(tmp_path, kind, records_with("short")))[1]
    reader, found = places_and_records(write(tmp_path, kind, records_with(HUGE)))
    assert len(found) == 9
    for number, (place, record) in enumerate(found):
        again = reader.read(place)
        assert record == again
        if number in (3, 8):
            assert isinstance(record, TooLarge) and f"more than data.max_record_bytes={BOUND}" in record
            assert any(int(word) >= len(HUGE) for word in record.split() if word.isdecimal()), "it names its bytes"
        else:
            assert record == whole[number][1]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.parquet", "disk", "a.tar", "captions.tar"])
def test_passing_over_takes_no_memory(tmp_path, kind):
    """Not even as much as the record has bytes, in Python's and numpy's own memory; Arrow's is another process's."""
    path = write(tmp_path, kind, records_with("a cat " * 2_000_000, where=(3,)))
    tracemalloc.start()
    found = places_and_records(path, 1 << 20)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found[3][1], TooLarge) and len(found) == 9
    limit = (30 if kind == "a.json" else 8) << 20  # of a JSON list four blocks are parsed before it is passed over
    assert peak < limit, peak


def test_a_large_page_of_parquet_is_read_by_another_process(tmp_path, monkeypatch):
    """Rows and errors are the same; a row group of many values that are all within the bound is read here again."""
    monkeypatch.setattr(arrow_rows, "LARGEST_PAGE", 100_000)
    path = write(tmp_path, "a.parquet", records_with(HUGE, where=(3,)))
    monkeypatch.setattr(tables, "has_large_page", lambda *_: False)
    here = places_and_records(path)[1]
    monkeypatch.undo()
    monkeypatch.setattr(arrow_rows, "LARGEST_PAGE", 100_000)
    file = pq.ParquetFile(path)
    assert [arrow_rows.has_large_page(path, file, group, ["id", "conversations"]) for group in (0, 1)] == [True, False]
    reader, apart = places_and_records(path)
    assert apart == here and isinstance(apart[3][1], TooLarge)
    assert reader._apart == {0: True, 1: False}
    fresh = open_reader(path, BOUND)
    assert [fresh.read(place) for place, _ in reversed(apart)] == [record for _, record in reversed(here)]
    reader, found = places_and_records(path, 1 << 20)
    assert len(found[3][1]["conversations"][1]["value"]) == len(HUGE) and not reader._apart[0]
    content = bytearray(path.read_bytes())
    at = content.index(b"what is 0")
    content[at - 40 : at + 40] = b"\xff" * 80
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet is broken in row group 0 \(.*"):
        places_and_records(path)


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "zstd"}]
)
def test_sizes_of_pages(tmp_path, options):
    sizes = [10, 70_000, 30, 200_000]
    columns = {"messages": [["x" * n] for n in sizes], "id": [str(n) for n in sizes]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", write_batch_size=1, data_page_size=1, **options)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    for bound, expected in ((100_000, True), (400_000, False)):
        arrow_rows.LARGEST_PAGE, before = bound, arrow_rows.LARGEST_PAGE
        try:
            assert arrow_rows.has_large_page(tmp_path / "a.parquet", file, 0, ["messages"]) == expected
            assert not arrow_rows.has_large_page(tmp_path / "a.parquet", file, 0, ["id"])
        finally:
            arrow_rows.LARGEST_PAGE = before


def test_bytes_of_rows():
    lists = [[{"a": "xy", "b": b"\0" * 9}, {"a": None, "b": b""}], None, [], [{"a": "é", "b": None}]]
    expected = [11 + 2 * arrow_rows.ELEMENT_BYTES, 0, 0, 2 + arrow_rows.ELEMENT_BYTES]
    array = pa.array(lists, pa.list_(pa.struct([("a", pa.string()), ("b", pa.binary())])))
    assert arrow_rows.row_bytes(array).tolist() == expected
    assert arrow_rows.row_bytes(array.slice(1, 3)).tolist() == expected[1:]
    assert arrow_rows.row_bytes(pa.array(["abc", None, "abc", "d"]).dictionary_encode()).tolist() == [3, 0, 3, 1]
    assert arrow_rows.row_bytes(pa.array(["abc", None], pa.string_view())).tolist() == [3, 0]
    assert arrow_rows.row_bytes(pa.array([[("k", "vw")], None], pa.map_(pa.string(), pa.string()))).tolist() == [
        3 + arrow_rows.ELEMENT_BYTES, 0
    ]  # fmt: skip


def test_the_end_of_a_json_value_is_found_whatever_it_holds():
    rng = random.Random(0)

    def value(depth=0):
        kind = rng.randrange(5) if depth < 5 else 0
        if kind < 3:
            return "".join(rng.choice('a"\\{}[],:é😀 \n') for _ in range(rng.randrange(12)))
        if kind == 3:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        return {value(9): value(depth + 1) for _ in range(rng.randrange(4))}

    for _ in range(2000):
        written = json.dumps(value(), ensure_ascii=rng.random() < 0.5).encode()
        content = written + rng.choice([b",1", b"]", b' , "x"', b"}"])
        end, block, at = json_files._End(), rng.randint(1, 9), 0
        while not (size := end.within(content[at : at + block])):
            at += block
        assert at + size == len(written), content


def test_one_line_without_an_end_and_one_that_is_blank(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n' + b" " * 300_000 + b"\n" + b"x" * 300_000)
    _, found = places_and_records(tmp_path / "a.jsonl")
    assert [record for _, record in found] == [{"id": 1}, found[1][1]] and "it has 300000 bytes" in found[1][1]
    record = json.dumps({"id": "x", "text": "y" * (BOUND - 23)})
    for line, is_large in ((record, False), (record + " ", True)):
        assert len(record) == BOUND
        for end in ("\n", "\r\n", ""):
            (tmp_path / "a.jsonl").write_bytes((line + end).encode())
            [(place, found)] = places_and_records(tmp_path / "a.jsonl")[1]
            assert isinstance(found, TooLarge) == is_large and place == (0, len(line + end))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_takes_more_memory_than_bytes(tmp_path, monkeypatch, name):
    """Millions of tiny values, deep nesting and endless numbers: each is a bad record, the next is read."""
    monkeypatch.setattr(base, "MOST_VALUES", 6000)
    monkeypatch.setattr(json_files, "MOST_VALUES", 6000)
    good = json.dumps({"id": "good", "conversations": say("what", "a cat")})
    bad = ["[" * 5000 + "]" * 5000, "[" + "{}," * 8000 + "{}]", '{"n": ' + "1" * 5000 + "}"]
    deep = json.dumps({"conversations": say("what", "a"), "x": 0}).replace("0", "[" * 700 + "]" * 700)
    lines = [bad[0], good, bad[1], good, bad[2], good, deep, good]
    text = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    (tmp_path / name).write_text(text)
    found = list(read_records(tmp_path / name))
    assert [record.id for record in found][1::2] == ["good"] * 4 and not any(record.error for record in found[1::2])
    errors = [record.error for record in found][::2]
    assert "nested too deeply" in errors[0] and "it has 16002 values" in errors[1]
    assert "digits" in errors[2] and "nested too deeply" in errors[3]


def test_tars_of_hostile_sizes(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("a.json", json.dumps({"conversations": say("q", "a")}).encode()), ("b.mp4", b"x" * 9)]
    )
    good = (tmp_path / "a.tar").read_bytes()
    reader, found = places_and_records(tmp_path / "a.tar")
    assert [reader.read(place) for place, _ in found] == [record for _, record in found] and len(found) == 2
    huge = bytearray(good[:512])
    huge[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")  # bytes of the member
    huge[148:156] = b"%06o\0 " % (sum(huge[:148]) + 8 * 32 + sum(huge[156:512]))
    (tmp_path / "b.tar").write_bytes(huge + good[512:])
    with pytest.raises(ValueError, match=r"b.tar is truncated within a.json"):
        places_and_records(tmp_path / "b.tar")
    huge[156:157] = b"L"  # a long name
    huge[148:156] = b"%06o\0 " % (sum(huge[:148]) + 8 * 32 + sum(huge[156:512]))
    (tmp_path / "c.tar").write_bytes(good[:1024] + huge + good[512:])
    with pytest.raises(ValueError, match=r"c.tar is broken at byte 1024 \(a header of 1152921504606846976 bytes\)"):
        places_and_records(tmp_path / "c.tar")
    (tmp_path / "d.tar").write_bytes(good[:1024] + b"garbage!" * 64 + good[1024:])
    with pytest.raises(ValueError, match=r"d.tar is broken at byte 1024 \(there is no member header\)"):
        places_and_records(tmp_path / "d.tar")


def test_text_is_bounded_before_it_is_tokenized(tmp_path, caplog):
    """``too_long`` decides about it, with the record's id, its bytes and the setting; rows are not shifted."""
    path = write(tmp_path, "a.jsonl", [*records_with(HUGE), {"conversations": say("é" * 30_000, "a")}])
    bounds = Bounds(text=BOUND)
    message = r"3 record\(s\) are too large.*data.too_long=skip.*a.jsonl: r3: its text has 30\d+ bytes in 2 turns"
    with pytest.raises(ValueError, match=message + f", more than data.max_text_bytes={BOUND}"):
        build([Source(path, tmp_path)], tmp_path, bounds=bounds)
    index, _ = build([Source(path, tmp_path)], tmp_path, bounds=bounds, too_long="skip")
    assert len(index) == 7 and index.selections[0].manifest["too_large"] == 3 and index.bad == 0
    assert [index.sample_id(i) for i in (2, 3, 6)] == ["0:2:r2", "0:4:r4", "0:7:r7"]
    assert index.record(3).turns[1].text == "a dog " * 5
    assert "3 record(s) are too large and are skipped" in caplog.text and "a-9: its text has 60" in caplog.text
    short = [{"conversations": say("q", "a" * 100)}, {"conversations": say("q", "a" * 2000)}]
    index, _ = index_of(tmp_path, short)
    assert len(index) == 2


def test_what_a_template_and_turns_add_is_bounded_too():
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    turns = [Turn("user", "x" * 900), Turn("assistant", "y")]
    fine, large = encoder.count([[turns[0], turns[1]], turns * 40], 2000)
    assert isinstance(fine, tuple) and isinstance(large.args[0], TooLarge) and "its formatted text has" in str(large)
    many = normalize({"conversations": say("q", "a") * 3000}, "x")
    assert isinstance(many.error, TooLarge) and f"({TURN_BYTES} are counted for each turn)" in many.error


def test_many_turns_are_tokenized_in_linear_time():
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    lines = []
    for turns in (250, 2000):
        executed = 0

        def count(frame, event, argument):
            nonlocal executed
            executed += event == "line"
            return count

        sys.settrace(count)
        try:
            assert isinstance(encoder.count([[Turn("user", "a"), Turn("assistant", "b")] * turns], 1 << 30)[0], tuple)
        finally:
            sys.settrace(None)
        lines.append(executed)
    assert lines[1] < 9 * lines[0], lines  # 8 where time is linear, 64 where it is quadratic


def test_what_is_kept_of_texts_is_bounded(tmp_path):
    tokens = SectionTokenizer(tiny_tokenizer())
    tokens("a cat " * 1000)
    tokens("a dog")
    assert list(tokens._known) == ["a dog"]
    long_id = normalize({"id": "x" * 5000, "conversations": say("q", "a")}, "file-3")
    assert long_id.id == "file-3" and "its id has 5000 characters, more than 4096" in long_id.error
    field = normalize({"x" * 5000: 1, "conversations": say("q", "a")}, "file-3")
    assert "the name of one of its fields has 5000 characters" in field.error and len(field.error) < 300


def test_long_conversations_are_measured_a_few_at_a_time(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", records_with("a cat " * 60_000, count=20, where=range(3, 9)))
    calls = []
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    monkeypatch.setattr(encoder, "count", lambda chats, *_: calls.append(len(chats)) or [(1, 1)] * len(chats))
    measure = Measure(encoder, None, tmp_path, record_module.NO_PROMPT)
    monkeypatch.setattr(Measure, "_measure_images", lambda *_: Measured())
    reader = open_reader(path)
    measure_piece(measure, reader, next(reader.pieces()), tmp_path / "piece.npz", "piece")
    assert sum(calls) == 20 and max(calls) < 15 and len(calls) > 2
    assert len(np.load(io.BytesIO(read_sealed(tmp_path / "piece.npz", "piece")))["text"]) == 20


def test_a_prompt_of_the_settings_is_bounded(tmp_path):
    source = {"path": "a.json", "prompt": {"prefix": "x" * 3000}}
    with pytest.raises(ValueError, match=r"train.0.prompt.prefix has 3000 characters.*data.max_text_bytes=2000"):
        Config.model_validate({"data": {"train": [source], "max_text_bytes": 2000}})


def test_a_folder_of_many_images_is_listed_at_once(tmp_path, monkeypatch):
    """Neither the nearest name nor the kind of what is in it asks the system or difflib about each of 20,000 files."""
    for number in range(20_000):
        (tmp_path / f"picture_{number:06d}.jpg").touch()
    (tmp_path / "train.jsonl").write_text('{"conversations": []}\n')
    asked, compared = [], []
    stat, close = os.stat, difflib.get_close_matches
    monkeypatch.setattr(os, "stat", lambda path, **named: asked.append(path) or stat(path, **named))
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda word, names, **n: compared.extend(names) or close(word, names, **n)
    )
    assert find_files(tmp_path) == [tmp_path / "train.jsonl"]
    assert nearest_name("picture_000001.jpeg", os.listdir(tmp_path), 0.5).startswith("picture_000001")  # noqa: PTH208
    assert nearest_name("tran.jsonl", os.listdir(tmp_path), 0.5) == "train.jsonl"  # noqa: PTH208
    with pytest.raises(ConfigError, match=r"picture.yaml does not exist"):
        find_file(str(tmp_path / "picture.yaml"), "--config")
    assert len(asked) < 100 and len(compared) < 2000


@pytest.mark.parametrize("digits", [5_000, 5 * base.BLOCK, 3 * base.BLOCK - 1, 9 << 20])
@pytest.mark.parametrize("behind", [',{"id": "b"}]', "]", "\n]"])
def test_a_long_number_in_a_list_takes_no_neighbour_with_it(tmp_path, digits, behind):
    """Not even where the list, or a piece of it, ends with it."""
    (tmp_path / "a.json").write_text(f'[{{"id": "a"}},{"1" * digits}{behind}')
    reader = open_reader(tmp_path / "a.json")
    first, number, *rest = (record for piece in reader.pieces() for _, record in reader.scan(piece))
    assert first == {"id": "a"} and rest == ([{"id": "b"}] if "b" in behind else [])
    assert "it cannot be read" in number or "more than data.max_record_bytes" in number
    (tmp_path / "cut.json").write_text(f'[{{"id": "a"}},{"1" * digits}')
    with pytest.raises(ValueError, match="the list is not closed"):
        list(open_reader(tmp_path / "cut.json").pieces())


def test_a_long_word_in_a_list_is_no_json(tmp_path):
    (tmp_path / "a.json").write_text(f'[{{"id": "a"}},{"a" * 5 * base.BLOCK},{{"id": "b"}}]')
    with pytest.raises(ValueError, match=r"a\.json: not JSON \(Expecting value"):
        list(open_reader(tmp_path / "a.json").pieces())
