"""Real runs over data with one text that would not fit into memory, in every kind of file."""

import io
import json
import re
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.support.runner import ROOT, Runs

pytestmark = pytest.mark.slow

MB = 1_000_000
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, file=sys.stderr)
sys.exit(code)
"""
KINDS = ("big.jsonl", "big.json", "big.parquet", "big", "big.tar", "captions.tar")
SETTINGS = (
    f"data.train=[{', '.join(f'{{path: {name}, images: images}}' for name in KINDS)}]",
    "data.eval=[]",
    "deepspeed=configs/deepspeed/zero0.json",
    "train.epochs=1",
)


def write(folder, name, megabytes):
    """Three records, of which the one in the middle is large."""
    path, text = folder / name, "a cat, " * (megabytes * MB // 7)
    answers = ["about 1", text, "about 2"]
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": answer}]}
        for i, answer in enumerate(answers)
    ]
    if name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, records)))
    elif name.endswith(".json"):
        path.write_text(json.dumps(records))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    elif name.endswith(".tar"):
        with tarfile.open(path, "w") as tar:
            for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
                is_caption = name.startswith("captions")
                content = (answer if is_caption else json.dumps(record)).encode()
                info = tarfile.TarInfo(f"{number}.{'txt' if is_caption else 'json'}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        Dataset.from_list(records).save_to_disk(str(path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("large"), num_train=5)
    for name in KINDS:
        write(made.folder / "data", name, 200 if name in ("big.jsonl", "big.parquet") else 40)
    return made


def test_a_text_of_200_mb_is_skipped_in_less_than_a_gigabyte(runs):
    """All processes: the run itself, those that measure and decode, and the one that reads a large page of parquet."""
    arguments = runs.arguments("skipped", *SETTINGS, "data.too_long=skip")
    command = [sys.executable, "-c", PEAK, sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=runs.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(re.search(r"PEAK (\d+)", done.stderr)[1]) < 1000
    assert f"{len(KINDS)} record(s) are too large and are skipped (data.too_long=skip)" in done.stderr
    metrics = runs.metrics("skipped")
    assert sum(m["samples"] for m in metrics) == 2 * len(KINDS) and not sum(m["unreadable"] for m in metrics)


def test_it_is_refused_by_name_where_nothing_may_be_left_out(runs):
    done = runs.run("refused", *SETTINGS, "data.too_long=error", expect=2)
    for name in KINDS[:5]:
        assert re.search(
            rf"data/{name}: big-1: it has \d+ bytes .*more than data.max_record_bytes=33554432", done.stderr
        )
    assert "set data.too_long=skip to leave them out" in done.stderr
    whole = done.stderr + runs.run("dry", *SETTINGS, "data.too_long=error", "--dry_run", expect=2).stderr
    assert "data.train.0: 1 of the first 3 records of " in whole and "are too large" in whole
