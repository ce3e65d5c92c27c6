"""A reader in a file outside the package: its records are indexed, trained on and evaluated."""

from __future__ import annotations

import csv
import math
import textwrap

import pytest

from tests.support.runner import Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train.data.records import read_records
from vtprune_train.data.sources import find_files, open_reader, reader_identity
from vtprune_train.data.sources.base import Place
from vtprune_train.evaluation.questions import read_questions

READERS = '''
import csv

from vtprune_train.data.sources.base import Malformed, Piece, Place, Reader, too_many_bytes


class Pairs(Reader):
    """A question and an answer in each line of a CSV file; a place is the bytes of a line."""

    def pieces(self):
        yield Piece(0, self.path.stat().st_size)

    def scan(self, piece):
        with self.path.open("rb") as file:
            file.seek(piece.start)
            while file.tell() < piece.stop:
                at, line = file.tell(), file.readline(self.max_bytes + 1)
                if len(line) > self.max_bytes:
                    yield Place(at, len(line)), too_many_bytes(len(line), self.max_bytes)
                else:
                    yield Place(at, len(line)), self.record(line)

    def read(self, place):
        with self.path.open("rb") as file:
            file.seek(place.at)
            return self.record(file.read(place.size))

    def record(self, line):
        row = next(csv.reader([line.decode()]))
        if len(row) != 4:
            return Malformed(f"{len(row)} columns instead of 4")
        name, image, question, answer = row
        question = f"<image>\\n{question}" if image else question
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": turns, **({"image": image} if image else {})}


import numpy as np


class NumPy(Pairs):
    """Places and fields are NumPy numbers; a field is NaN."""

    def scan(self, piece):
        for (at, size), record in super().scan(piece):
            yield (np.int64(at), np.int64(size)), record

    def record(self, line):
        return {**super().record(line), "score": np.float32(2), "rank": np.int64(1), "parts": [float("nan"), 1.0]}


class Arrays(Pairs):
    def record(self, line):
        return {**super().record(line), "boxes": np.zeros(4)}


class Crashes(Pairs):
    def record(self, line):
        return {"id": line["name"]}


class Differs(Pairs):
    def read(self, place):
        return {**super().read(place), "id": "another"}


class NoReader:
    pass
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("readers"))
    (made.folder / "user_readers.py").write_text(textwrap.dedent(READERS))
    with (made.folder / "data" / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        for number in range(12):
            image = f"train-{number // 5 * 5}-0.png" if number % 2 else ""
            rows.writerow([f"pair{number}", image, f"how bright, is {number}?", f"about {number}"])
    return made


def path_of(runs, name):
    return f"{runs.folder / 'user_readers.py'}:{name}"


def entry(runs, name="Pairs", path="pairs.csv"):
    return f"data.train=[{{path: {path}, images: images, reader: '{path_of(runs, name)}'}}]"


def test_its_records_are_conversations(runs):
    records = list(read_records(runs.folder / "data" / "pairs.csv", reader=path_of(runs, "Pairs")))
    assert [record.id for record in records] == [f"pair{number}" for number in range(12)]
    assert records[1].images == ("train-0-0.png",) and records[0].images == ()
    assert records[3].turns[0].text == "<image>\nhow bright, is 3?"


def test_files_of_any_kind_and_all_files_of_a_folder(runs, tmp_path):
    for name in ("b.csv", "a.tsv", ".hidden"):
        (tmp_path / name).write_text("x,,how?,so\n")
    assert [file.name for file in find_files(tmp_path, path_of(runs, "Pairs"))] == ["a.tsv", "b.csv"]
    assert [file.name for file in find_files(tmp_path / "*.csv", path_of(runs, "Pairs"))] == ["b.csv"]
    with pytest.raises(ValueError, match="unknown file type"):
        find_files(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        find_files(tmp_path / "empty", path_of(runs, "Pairs"))


def test_another_version_of_a_reader_has_another_identity(runs, tmp_path):
    (tmp_path / "versioned.py").write_text(READERS)
    path = f"{tmp_path / 'versioned.py'}:Pairs"
    before = reader_identity(path)
    (tmp_path / "versioned.py").write_text(READERS + "\n# changed\n")
    assert before[0] == path and reader_identity(path) != before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Crashes", "TypeError: byte indices must be integers"),
        ("Arrays", r"field 'boxes' is a ndarray, but a record is plain data"),
        ("Differs", r"read\(Place\(at=\d+, size=\d+\)\) returns"),
    ],
)
def test_a_broken_reader_is_named(runs, name, reason):
    file = runs.folder / "data" / "pairs.csv"
    reader = open_reader(file, reader=path_of(runs, name))
    with pytest.raises(ValueError, match=rf"pairs.csv: reader \S+:{name} failed \({reason}"):
        list(reader.scan(next(reader.pieces())))
    with pytest.raises(FileNotFoundError):
        next(open_reader(runs.folder / "missing.csv", reader=path_of(runs, name)).pieces())


def test_eval_reads_by_it(runs):
    data, images = runs.folder / "data" / "pairs.csv", runs.folder / "data" / "images"
    questions, malformed = read_questions(data, images, reader=path_of(runs, "Pairs"))
    assert len(questions) == 12 and not malformed and questions[2].reference == "about 2"


@pytest.mark.slow
def test_training_on_it_resumes_bit_for_bit(runs):
    settings = (entry(runs), "data.workers=1", "train.epochs=2", "deepspeed=configs/deepspeed/zero0.json")
    runs.run("whole", *settings)
    runs.run("halves", *settings, "run.stop_after=2")
    runs.run("halves", *settings, ranks=1)
    assert len(runs.metrics("whole")) == 4
    assert_same_metrics(runs.metrics("whole"), runs.metrics("halves"))
    assert_equal_checkpoints(runs.checkpoint("whole"), runs.checkpoint("halves"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("NoReader",), ["data.train.0.reader=", "user_readers.py:NoReader", "must be a subclass of Reader"]),
        (("Pair",), ["data.train.0.reader=", "does not define Pair", "did you mean Pairs?"]),
        (("Crashes",), ["pairs.csv: reader", "user_readers.py:Crashes failed (TypeError"]),
        (("Pairs", "no.csv"), ["data.train.0.path: ", "no.csv does not exist"]),
    ],
)
def test_a_run_is_refused_with_the_reason(runs, settings, words):
    said = runs.run("refused", entry(runs, *settings), "data.workers=0", expect=2).stderr
    for word in words:
        assert word in said, said


def test_places_and_fields_may_be_numbers_of_numpy(runs):
    """And fields NaN, which does not equal itself."""
    reader = open_reader(runs.folder / "data" / "pairs.csv", reader=path_of(runs, "NumPy"))
    place, record = next(reader.scan(next(reader.pieces())))
    assert isinstance(place, Place) and type(place.at) is type(place.size) is int
    assert math.isnan(record["parts"][0]) and reader.read(place)["score"] == 2
