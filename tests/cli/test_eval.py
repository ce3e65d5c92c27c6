"""``vtprune eval``: counts, metrics, and results that survive a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

from tests.support.checkpoints import HALF, save_data, save_folder
from tests.support.families import FAMILIES, family_inputs, family_model, tokenizer
from vtprune_train import PyramidDrop, dense, prune
from vtprune_train.cli import main
from vtprune_train.data.chat import Turn
from vtprune_train.data.records import NO_PROMPT
from vtprune_train.evaluation.answering import Loaded, answers, load, recorded_prompt
from vtprune_train.evaluation.questions import normalized, read_questions
from vtprune_train.evaluation.results import Ledger
from vtprune_train.evaluation.timing import drop_layers, measured_answers
from vtprune_train.models.cache import cache_bytes
from vtprune_train.models.forward.padded import kept_tokens

pytestmark = pytest.mark.slow

TIMES = ("prefill_seconds", "decode_seconds")
TEN_RECORDS = 13  # answers: three of the ten have two turns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def options(folder, data, tmp_path):
    return [
        "eval", "--model", str(folder), "--data", str(data), "--images", str(data.parent / "images"),
        "--out", str(tmp_path / "out"), "--max_new_tokens", "6",
    ]  # fmt: skip


def lines_of(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def untimed(lines):
    """Lines by key, without what a clock says."""
    return {
        line["key"]: {
            name: {key: value for key, value in run.items() if key not in TIMES} for name, run in line["runs"].items()
        }
        for line in lines
    }


def results_of(out):
    return json.loads((out / "results.json").read_text())


def by_hand(folder, data):
    """Every question one by one through ``answers``."""
    loaded = load(str(folder))
    said = {}
    for number, record in enumerate(json.loads(data.read_text())):
        turns = [Turn("assistant" if t["from"] == "gpt" else "user", t["value"]) for t in record["conversations"]]
        for place in range(1, len(turns), 2):
            count = sum(turn.text.count("<image>") for turn in turns[:place])
            images = [Image.open(data.parent / "images" / name).convert("RGB") for name in record.get("image", [])]
            key = f"{number}:{place}:{record['id']}"
            said[key] = answers(loaded, [(images[:count], turns[:place])], max_new_tokens=6)[0]
    return said


def test_every_turn_is_asked_with_its_history(capsys, options, folder, data, tmp_path):
    assert main(options) == 0
    lines = lines_of(tmp_path / "out")
    assert {line["key"]: line["runs"]["pruned"]["answer"] for line in lines} == by_hand(folder, data)
    assert len(lines) == TEN_RECORDS and len({line["runs"]["pruned"]["answer"] for line in lines}) > 3
    results = results_of(tmp_path / "out")
    exact = [normalized(line["runs"]["pruned"]["answer"]) == normalized(line["reference"]) for line in lines]
    assert results["runs"]["pruned"]["exact_match"] == sum(exact) / TEN_RECORDS
    assert results["answers"] == TEN_RECORDS and results["left_out"] == [] and "ratios" not in results
    assert "13 answers" in capsys.readouterr().out


def test_questions_are_asked_with_the_prompt_that_the_run_adds_to_them(options, folder, data, tmp_path, caplog):
    step = tmp_path / "step"
    shutil.copytree(folder, step / "hf")
    entries = [{"path": data.name, "images": "images", "prompt": {"suffix": " here ?", "system": "yes"}}]
    trained = {"template": "vicuna_v1", "system": "", "image_position": "as_written", "root": str(data.parent)}
    (step / "config.yaml").write_text(yaml.safe_dump({"data": {**trained, "train": entries, "eval": []}}))
    options = [*options, "--model", str(step / "hf"), "--limit", "3"]
    assert main(options) == 0
    assert results_of(tmp_path / "out")["settings"]["prompt"] == {"system": "yes", "prefix": "", "suffix": " here ?"}
    shutil.copy(data, tmp_path / "copy.json")
    caplog.clear()
    assert main([*options, "--data", str(tmp_path / "copy.json"), "--out", str(tmp_path / "bare")]) == 0
    assert (
        "was trained with additional prompts (data.train.0: " in caplog.text and "so they are not used" in caplog.text
    )
    assert "prompt" not in results_of(tmp_path / "bare")["settings"]
    for line, bare in zip(lines_of(tmp_path / "out"), lines_of(tmp_path / "bare"), strict=True):
        assert line["runs"]["pruned"]["prompt_tokens"] == bare["runs"]["pruned"]["prompt_tokens"] + 3
    assert recorded_prompt(str(folder), data) == NO_PROMPT


def test_the_batch_size_changes_no_answer(options, tmp_path):
    for size in ("1", "5", "64"):
        assert main([*options, "--out", str(tmp_path / size), "--batch_size", size]) == 0
    one, five, all_at_once = (
        {key: (run["pruned"]["answer"], run["pruned"]["visual_tokens"]) for key, run in untimed(lines).items()}
        for lines in (lines_of(tmp_path / size) for size in ("1", "5", "64"))
    )
    assert one == five == all_at_once


def test_true_answers_that_are_longer_than_may_be_made_are_told_of(options, data, caplog):
    assert main([*options, "--limit", "2"]) == 0
    assert "true answers have more" not in caplog.text
    records = json.loads(data.read_text())[:2]
    records[0]["conversations"][1]["value"] = "a red cat on the left ."
    (data.parent / "long.json").write_text(json.dumps(records))
    assert main([*options, "--data", str(data.parent / "long.json"), "--out", str(data.parent / "long")]) == 0
    assert "1 of 3 reference answers have more than --max_new_tokens=6 tokens (up to 7)" in caplog.text


def test_special_tokens_in_true_answers_count_no_more_than_in_answers(options, data, tmp_path):
    """Answers are decoded without them."""
    assert main([*options, "--limit", "2"]) == 0
    said = {line["id"]: line["runs"]["pruned"]["answer"] for line in lines_of(tmp_path / "out")}
    records = [record for record in json.loads(data.read_text()) if record["id"] in said]
    for record in records:
        record["conversations"][-1]["value"] = f"<pad>{said[record['id']]}<unk>"
    (data.parent / "special.json").write_text(json.dumps(records))
    assert main([*options, "--data", str(data.parent / "special.json"), "--out", str(tmp_path / "special")]) == 0
    last = {line["id"]: line["runs"]["pruned"]["exact"] for line in lines_of(tmp_path / "special")}
    assert last == dict.fromkeys(said, True)


def test_a_question_that_the_chat_template_refuses_is_left_out(options, folder, data, tmp_path):
    shutil.copytree(folder, tmp_path / "strict")
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    (tmp_path / "strict" / "chat_template.jinja").write_text(template)
    records = json.loads(data.read_text())[:4]
    records[1]["system"] = "what is a dog ?"
    (data.parent / "system.json").write_text(json.dumps(records))
    options = [*options, "--model", str(tmp_path / "strict"), "--data", str(data.parent / "system.json")]
    assert main(options) == 0
    results = results_of(tmp_path / "out")
    assert results["answers"] == 3
    [[sample, reason]] = [[left["id"], left["reason"]] for left in results["left_out"]]
    assert sample == "sample1" and "the model's chat template rejects this conversation: no system here" in reason


def test_compare_dense(capsys, options, folder, tmp_path):
    assert main([*options, "--compare", "dense"]) == 0
    out = capsys.readouterr().out
    lines, results = lines_of(tmp_path / "out"), results_of(tmp_path / "out")
    assert len(lines) == TEN_RECORDS
    for line in lines:
        pruned, whole = line["runs"]["pruned"], line["runs"]["dense"]
        [before] = whole["visual_tokens"]
        assert pruned["visual_tokens"][0] == before and pruned["prompt_tokens"] == whole["prompt_tokens"]
        if line["key"].split(":")[0] in ("0", "3", "6", "9"):  # one picture: the floor is of all its tokens
            assert pruned["visual_tokens"] == [before, before // 2, before // 4]
    assert main([*options, "--method", "none", "--out", str(tmp_path / "dense")]) == 0
    alone = untimed(lines_of(tmp_path / "dense"))
    for key, runs in untimed(lines).items():
        assert runs["dense"]["answer"] == alone[key]["dense"]["answer"]
    assert any(line["runs"]["pruned"]["answer"] != line["runs"]["dense"]["answer"] for line in lines)
    runs = results["runs"]
    assert results["ratios"]["cache_bytes"] == runs["pruned"]["cache_bytes"] / runs["dense"]["cache_bytes"] < 1
    assert results["ratios"]["prefill_seconds"] > 0 < results["ratios"]["decode_seconds_per_token"]
    equal = sum(line["runs"]["pruned"]["answer"] == line["runs"]["dense"]["answer"] for line in lines)
    assert results["agreement"] == equal / TEN_RECORDS
    for text in ("visual tokens from layer 2", "visual tokens from layer 4", "prefill, ms per sample", "ratio"):
        assert text in out


@pytest.mark.parametrize("name", FAMILIES)
def test_measurements_of_all_families(name):
    """Answers are ``generate``'s, counts those of the tokens kept, bytes those of a cache without the answer."""
    texts = [["what is", 0, "shown here ?"], [1, "and", 2, "two ?"], ["a dog ?"]]
    inputs = family_inputs(name, texts)
    loaded = Loaded(prune(family_model(name), HALF), type("P", (), {"tokenizer": tokenizer()}), None)
    assert drop_layers(loaded) == [2, 4]
    measured = measured_answers(loaded, inputs, 5)
    tokens = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert [m.answer for m in measured] == [
        text.strip() for text in tokenizer().batch_decode(tokens, skip_special_tokens=True)
    ]
    kept = [[sum(map(len, stage)) for stage in zip(*row, strict=True)] for row in kept_tokens(loaded.model, inputs)]
    assert [m.visual_tokens[1:] for m in measured] == [row or [0, 0] for row in kept]
    with torch.no_grad():
        cache = loaded.model(**inputs, use_cache=True).past_key_values
    assert measured[0].cache_bytes * 3 == cache_bytes(cache)
    assert measured[0].decode_steps == 4
    with dense(loaded.model):
        whole = measured_answers(loaded, inputs, 5)
    image = loaded.model.config.image_token_id
    assert [m.visual_tokens for m in whole] == [[n] for n in (inputs["input_ids"] == image).sum(dim=1).tolist()]
    assert whole[0].cache_bytes > measured[0].cache_bytes


def command(options):
    return [sys.executable, "-m", "vtprune_train.cli", *options, "--batch_size", "1"]


def test_a_killed_run_goes_on(options, folder, tmp_path):
    """SIGKILL in the middle, a half-written line besides; the second start ends where an uninterrupted one does."""
    data = save_data(tmp_path / "more", records=90)
    options = [*options, "--data", str(data), "--images", str(data.parent / "images"), "--compare", "dense"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(options), env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (out / "samples.jsonl").exists() or (out / "samples.jsonl").read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    before = lines_of_cut(out)
    assert 20 <= len(before) < 120 and not (out / "results.json").exists()
    again = subprocess.run(command(options), env=os.environ, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    lines = lines_of(out)
    assert lines[: len(before)] == before, "finished samples were run again"
    assert main([*options, "--batch_size", "1", "--out", str(tmp_path / "whole")]) == 0
    whole = lines_of(tmp_path / "whole")
    assert untimed(lines) == untimed(whole) and [a["key"] for a in lines] == [b["key"] for b in whole]
    assert untimed_results(out) == untimed_results(tmp_path / "whole")


def lines_of_cut(out):
    whole = (out / "samples.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def untimed_results(out):
    results = results_of(out)
    del results["ratios"]["prefill_seconds"], results["ratios"]["decode_seconds_per_token"]
    for run in results["runs"].values():
        del run["prefill_seconds"], run["decode_seconds_per_token"]
    return results


def test_a_finished_evaluation_asks_nothing_again(options, tmp_path):
    assert main(options) == 0
    before = (tmp_path / "out" / "samples.jsonl").read_text(), results_of(tmp_path / "out")
    assert main(options) == 0
    assert ((tmp_path / "out" / "samples.jsonl").read_text(), results_of(tmp_path / "out")) == before


def test_other_settings_are_refused(capsys, options, tmp_path):
    assert main(options) == 0
    capsys.readouterr()
    assert main([*options, "--max_new_tokens", "7", "--keep", "0.5,0.1"]) == 2
    error = capsys.readouterr().err
    assert "max_new_tokens: 6 before, 7 now" in error and "'keep': [0.5, 0.1]" in error and "batch_size" not in error


def test_the_default_folder_is_one_for_each_setting(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = options.index("--out")
    options = options[:place] + options[place + 2 :]
    for more in ([], [], ["--limit", "2"]):
        assert main([*options, *more]) == 0
    assert len(list((tmp_path / "runs" / "eval").iterdir())) == 2


def test_limit_draws_by_seed(data):
    def drawn(limit, seed):
        return [question.key for question in read_questions(data, data.parent / "images", limit, seed)[0]]

    assert drawn(4, 0) == drawn(4, 0) != drawn(4, 1)
    assert len({key.split(":")[0] for key in drawn(4, 0)}) == 4
    assert drawn(10, 3) == drawn(None, 0)


def test_unreadable_and_malformed_samples_are_named(caplog, capsys, options, data, tmp_path):
    broken = save_data(tmp_path / "broken")
    (broken.parent / "images" / "0.png").unlink()
    (broken.parent / "images" / "1.png").write_text("no picture")
    records = json.loads(broken.read_text())
    records[2]["conversations"].pop()
    broken.write_text(json.dumps(records))
    options = [*options, "--data", str(broken), "--images", str(broken.parent / "images")]
    assert main(options) == 0
    left_out = {entry["id"]: entry["reason"] for entry in results_of(tmp_path / "out")["left_out"]}
    assert "no answer to train on" in left_out["sample2"] and "0.png cannot be read" in left_out["sample0"]
    assert "not an image that Pillow can read" in left_out["sample1"]
    assert f"{len(left_out)} sample(s) left out" in capsys.readouterr().out and "sample0" in caplog.text
    save_data(tmp_path / "whole")
    (tmp_path / "whole" / "images" / "0.png").rename(broken.parent / "images" / "0.png")
    before = lines_of(tmp_path / "out")
    assert main(options) == 0
    lines = lines_of(tmp_path / "out")
    assert lines[: len(before)] == before and len(lines) > len(before), "mended pictures are asked at the next start"


@pytest.mark.parametrize(
    ("options_more", "message"),
    [
        (["--data", "/nowhere.json"], "--data /nowhere.json does not exist"),
        (["--images", "/nowhere"], "--images /nowhere is not a folder"),
        (["--model", "/nowhere"], "no such folder here"),
        (["--method", "sparsity"], "method='sparsity' is unknown"),
        (["--layers", "2,8"], "layer 8 does not exist in a decoder of 6 layers"),
        (["--compare", "dense", "--method", "none"], "--compare dense: the model already runs dense"),
        (["--limit", "0"], "--limit=0"),
        (["--batch_size", "0"], "--batch_size=0 is below 1"),
        (["--out", __file__], "cannot be written to"),
    ],
)
def test_wrong_input_is_one_line(capsys, options, options_more, message):
    assert main([*options, *options_more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error[error.index("vtprune eval:") :].strip().splitlines()) == 2


def test_a_folder_in_use_is_refused(capsys, options, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(str(tmp_path / "out" / ".lock")):
        assert main(options) == 2
    assert "another process is writing to it" in capsys.readouterr().err


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    Ledger(tmp_path, {"a": 1}).append([{"key": "x"}])
    (tmp_path / "samples.jsonl").write_text('{"key": "x"}\n{"key"\n{"key": "y"}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl, line 2: not JSON"):
        Ledger(tmp_path, {"a": 1})


def test_normalized():
    assert normalized(" True. ") == normalized("true") == "true"
    assert normalized("two dogs") != normalized("two dog") and normalized("1.5") == "1.5"


def test_uniform_schedules_have_a_row_for_each_stage(options, tmp_path):
    """A method of three drops, two of which keep the same."""
    assert main([*options, "--method", "pyramiddrop", "--layers", "1,2,3", "--keep", "0.5,0.5,0.2"]) == 0
    lines = untimed(lines_of(tmp_path / "out"))
    before, *stages = lines["0:1:sample0"]["pruned"]["visual_tokens"]
    drops = PyramidDrop(layers=(1, 2, 3), keep=(0.5, 0.5, 0.2)).drops(6)
    assert stages == [drop.kept(before, before) for drop in drops]
