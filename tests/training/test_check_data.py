"""Data that is not there, or of which much cannot be used, ends a run before anything starts, in a dry run too."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.data import say, write_image
from tests.support.runner import TINY, Runs
from vtprune_train.cli import train_main


@pytest.fixture
def folder(tmp_path):
    """A run's settings beside 8 records with an image each, as JSON and as parquet."""
    write_image(tmp_path / "data" / "images" / "a.png")
    records = [
        {"id": f"r{i}", "image": "a.png", "topic_note": "x", "conversations": say("<image> what", "a cat")}
        for i in range(8)
    ]
    for name in ("train", "eval"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "data" / "train.parquet")
    settings = {**TINY, "data": {**TINY["data"], "root": str(tmp_path / "data"), "max_bad": 100}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def dry_run(folder, *overrides):
    return train_main(["--config", str(folder / "run.yaml"), "--dry_run", *overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train.0.images=image"], ["data.train.0.images: {}/data/image does not exist; did you mean", "images?"]),
        (["data.train.0.images=train.json"], ["data.train.0.images: {}/data/train.json is a file, not a folder"]),
        (["data.train.0.path=train.jsn"], ["data.train.0.path: {}/data/train.jsn does not exist", "train.json"]),
        (["data.eval.0.images=imgs/x"], ["data.eval.0.images: {}/data/imgs/x does not exist (there is no", "imgs)"]),
        (["data.eval.0.path='*.jsonl'"], ["data.eval.0.path: {}/data/*.jsonl does not exist"]),
        (["data.root=/nowhere"], ["data.train.0.path: /nowhere/train.json", "data.eval.0.images: /nowhere/images"]),
        (["data.train=[{path: train.parquet, images: imgs}]"], ["data.train.0.images: {}/data/imgs does not exist"]),
    ],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_named_with_its_key(folder, capsys, overrides, words):
    assert dry_run(folder, *overrides) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word.format(folder) in said, said
    assert "data.train=[] data.eval=[]" in said, "the way to a dry run without data"


def test_a_run_refuses_before_it_starts(folder):
    runs = Runs(folder / "runs", num_train=3)
    done = runs.run("gone", "data.train.0.images=imgs", expect=2)
    assert "data.train.0.images:" in done.stderr and "imgs does not exist" in done.stderr
    assert not list(folder.glob("runs/**/gone")), "nothing was made"


def test_a_dry_run_looks_at_the_first_records(folder, capsys):
    assert dry_run(folder) == 0
    said = capsys.readouterr().out
    assert f"data.train.0  {folder}/data/train.json: first 8 record(s) checked; ignored fields: " in said
    assert "'topic_note' (8)" in said and "data.eval.0" in said and "global_batch_size" not in said
    assert dry_run(folder, "train.global_batch_size=9") == 0
    assert "train.global_batch_size=9 is larger than the 8 record(s) of data.train" in capsys.readouterr().out
    (folder / "data" / "images" / "a.png").rename(folder / "data" / "images" / "b.png")
    assert dry_run(folder) == 2
    said = capsys.readouterr().err
    assert "data.train.0: 8 of the first 8 records" in said and "r0: image" in said and "a.png: No such file" in said
    records = json.loads((folder / "data" / "train.json").read_text())
    records[3]["image"] = "b.png"
    (folder / "data" / "eval.json").write_text(json.dumps(records))
    assert dry_run(folder, "data.train=[{path: eval.json, images: images}]", "data.max_bad_share=0.9") == 0
    assert "7 cannot be used (first: r0: image" in capsys.readouterr().out


def test_a_dry_run_shows_a_sample_of_records_with_ignored_fields(folder, capsys):
    records = json.loads((folder / "data" / "train.json").read_text())
    (folder / "data" / "train.json").write_text(json.dumps([{**record, "video": "a.mp4"} for record in records]))
    assert dry_run(folder, "data.train=[{path: train.json, images: images, ignore: [video]}]") == 0
    assert "sample        r0: " in capsys.readouterr().out


def test_a_recipe_of_the_package_is_looked_at_without_its_data(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert train_main(["--config", "quickstart.yaml", "--dry_run"]) == 0
    assert "NOT CHECKED: none of it is on this machine (data.root=runs/data/quickstart)" in capsys.readouterr().out
    assert train_main(["--config", "quickstart.yaml", "--dry_run", "data.root=nowhere"]) == 2
    assert "data.train.0.path: nowhere/train.json does not exist" in capsys.readouterr().err
    assert train_main(["--config", "quickstart.yaml", "--dry_run", "data.root=data", "data.train.0.images=x"]) == 2
    assert "data.train.0.images: data/x does not exist" in capsys.readouterr().err
    assert train_main(["--config", "run.yaml", "--dry_run", "data.train=[]", "data.eval=[]"]) == 0
    assert "data.train and data.eval are empty" in capsys.readouterr().out
