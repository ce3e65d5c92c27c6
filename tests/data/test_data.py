"""Reading, indexing and collating."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.data import CONFIG, collator, index_of, say, write_image
from tests.support.helpers import tiny_tokenizer
from vtprune_train import PyramidDrop
from vtprune_train.data.chat import ChatEncoder, Turn, get_template
from vtprune_train.data.images import image_size, load_image
from vtprune_train.data.index import Source, build_index
from vtprune_train.data.records import Conversation, normalize, read_records
from vtprune_train.data.synthetic import write_dataset
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.training.loop.evaluate import exchange_images

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ([], "the record is a list"),
        ({"id": 1}, "no 'conversations'"),
        ({"conversations": say("<image> what", "a cat")}, r"0 image\(s\) but 1 <image>"),
        ({"image": "a.png", "conversations": say("what", "a cat")}, r"1 image\(s\) but 0 <image>"),
        ({"conversations": say("what")}, "no token is supervised: .* no answer to train on"),
        ({"conversations": say("what", "a cat", "and")}, "ends with a user turn"),
        ({"conversations": say("what", "a", "b", "c")[1:]}, "must alternate"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "the text of a human turn is 3"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"unknown role \['human'\]"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "a part of a message is 'hi'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of a message is"),
        ({"image": 3, "conversations": say("<image>", "a")}, "image is 3"),
        ({"image": "a.png", "conversations": say("what", "<image>")}, "outside a user turn"),
        ({"conversations": say("hi \ud83d", "a")}, r"unpaired surrogate \('\\ud83d'\)"),
        ({"messages": [{"role": "user", "content": [{"url": "A" * 9999}]}]}, r"^a part .{290,300}\.\.\. \(\d{5} char"),
    ],
)
def test_malformed_records_keep_their_place_with_an_error(record, error):
    assert re.search(error, normalize(record, "file-0").error)


def test_the_forms_of_a_record():
    llava = normalize({"id": 7, "image": "a.png", "conversations": say("<image>\nhi", "yo")}, "x")
    turns = (Turn("user", "<image>\nhi"), Turn("assistant", "yo"))
    assert llava == Conversation("7", turns, ("a.png",))
    text_only = normalize({"system": "Be brief.", "image": None, "conversations": say("hi", "yo")}, "x")
    assert [turn.role for turn in text_only.turns] == ["system", "user", "assistant"] and not text_only.images
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "yo"},
        ],
        "images": ["a.png"],
    }
    assert [turn.text for turn in normalize(parts, "x").turns] == ["<image>hi", "yo"]


def test_an_id_with_half_of_a_character_can_be_written(tmp_path):
    records = [{"id": "x\ud83d", "conversations": say("hi", "yo")}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert index_of(tmp_path, None, "a.json")[0].sample_id(0) == "0:0:x?"


def test_json_and_jsonl_read_alike_and_a_changed_file_is_read_again(tmp_path, caplog):
    records = [{"id": str(i), "conversations": say(f"q {i}", f"a {i}")} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    one, two = (list(read_records(tmp_path / name)) for name in ("a.json", "a.jsonl"))
    assert one == two and len(one) == 3
    assert len(index_of(tmp_path, None, "a.json")[0]) == 3
    (tmp_path / "a.json").write_text(json.dumps(records[:2]))
    with caplog.at_level(logging.WARNING):
        assert len(index_of(tmp_path, None, "a.json")[0]) == 2
    assert "a.json has changed since it was indexed; indexing again" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "does not exist; check data.root"),
        ("a.csv", "x", "unknown file type '.csv'"),
        ("a.json", "{", "a.json: not JSON"),
        ("a.jsonl", '{"id": 1}\n{', "a.jsonl, line 2: not JSON"),
        ("b.json", '{"id": 1}', "contains a dict, not a list"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / name))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of a checkout")
def test_real_data(tmp_path):
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    nlvr, chat = SHARED / "nlvr", SHARED / "chat_format"
    sources = [
        Source(nlvr / "multi_image.json", nlvr / "images", "first:20"),
        Source(nlvr / "text_only.json", nlvr / "images", "random:20"),
        Source(chat / "mllm_demo.json", chat),
    ]
    index = build_index(
        sources,
        encoder,
        AnyRes.of(CONFIG),
        max_length=4096,
        too_long="error",
        max_bad=0,
        seed=0,
        workers=1,
        cache_dir=tmp_path,
    )
    assert len(index) == 46
    counts = np.bincount(index.lengths(np.arange(46)).span_sample, minlength=46)
    assert (counts[:20] >= 2).all() and (counts[20:40] == 0).all() and (counts[40:] >= 1).all()
    batch = collator(index, encoder, PyramidDrop())([0, 25, 41])
    assert not batch.unreadable and batch.plan.stages[0].num_tokens == index.lengths([0, 25, 41]).tokens.sum()


def test_sizes_from_headers_and_rotation(tmp_path):
    write_image(tmp_path / "a.png", (30, 50))
    assert image_size(tmp_path / "a.png") == (30, 50)
    image = Image.open(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert image_size(tmp_path / "rotated.jpg") == (50, 30)
    assert load_image(tmp_path / "rotated.jpg", (50, 30)).size == (30, 50)
    with pytest.raises(ValueError, match=r"30 x 50, but was .31, 50. when the data was indexed"):
        load_image(tmp_path / "a.png", (31, 50))


def test_bad_records_are_bounded_and_named(tmp_path, caplog):
    write_image(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "empty.png").touch()
    records = [
        {"id": "fine", "image": "good.png", "conversations": say("<image> what", "a cat")},
        {"id": "gone", "image": "none.png", "conversations": say("<image> what", "a cat")},
        {"id": "empty", "image": "empty.png", "conversations": say("<image> what", "a cat")},
    ]
    with caplog.at_level(logging.WARNING):
        index, _ = index_of(tmp_path, records, max_bad=2)
    assert len(index) == 1 and index.bad == 2
    assert "gone: image" in caplog.text and "none.png" in caplog.text and "empty: image" in caplog.text
    with pytest.raises(ValueError, match=r"2 records cannot be used, more than data.max_bad=1.*gone"):
        index_of(tmp_path, records, max_bad=1)


def test_a_mended_image_is_seen_again(tmp_path):
    records = [{"id": "a", "image": "a.png", "conversations": say("<image> what", "a cat")}]
    with pytest.raises(ValueError, match=r"a: image .*a.png"):
        index_of(tmp_path, records)
    write_image(tmp_path / "images" / "a.png")
    assert len(index_of(tmp_path, None)[0]) == 1


def test_too_long_samples(tmp_path, caplog):
    records = [{"id": f"r{i}", "conversations": say("what " * (10 + 100 * i), "a cat")} for i in range(3)]
    with pytest.raises(ValueError, match=r"2 sample\(s\) are longer than data.max_length=80.*r1 \(\d+\), r2"):
        index_of(tmp_path, records, max_length=80)
    index, _ = index_of(tmp_path, records, max_length=80, too_long="skip")
    assert len(index) == 1 and index.selections[0].manifest["too_long"] == 2


def test_take(tmp_path, caplog):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")} for i in range(30)]
    assert index_of(tmp_path, records, take="first:4")[0].selections[0].rows.tolist() == [0, 1, 2, 3]
    random_rows = index_of(tmp_path, records, take="random:7")[0].selections[0].rows.tolist()
    assert len(set(random_rows)) == 7 and random_rows == sorted(random_rows) != list(range(7))
    assert index_of(tmp_path, records, take="random:7")[0].selections[0].rows.tolist() == random_rows
    assert "asks for more" not in caplog.text
    assert index_of(tmp_path, records, take="first:100")[0].selections[0].rows.tolist() == list(range(30))
    assert "train.json: take=first:100 exceeds its 30 record(s); all of them are taken" in caplog.text


def test_the_index_tells_what_the_batch_holds(tmp_path):
    write_dataset(tmp_path, num_train=12, num_eval=1, seed=0)
    index, encoder = index_of(tmp_path, None, workers=2)
    collate = collator(index, encoder, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    lengths = index.lengths(range(len(index)))
    for sample in range(len(index)):
        batch = collate([sample])
        assert batch.plan.stages[0].num_tokens == lengths.tokens[sample] == len(batch.input_ids)
        assert len(batch.targets) == lengths.supervised[sample]
        assert len(batch.pixel_values) == lengths.tiles[sample]
        assert int(batch.visual_index.max()) == len(batch.pixel_values) * 16, "the newline stands behind all features"
    packed = collate(range(len(index)))
    assert packed.plan.stages[0].num_tokens == lengths.tokens.sum() == index.total_tokens
    assert packed.costs["tokens_stage_2"] == packed.plan.stages[2].num_tokens < packed.costs["tokens_stage_0"]
    assert packed.costs["flops"] < packed.costs["flops_dense"]
    assert packed.answer_of_target.unique().tolist() == list(range(packed.num_answers))


def test_a_truncated_image_is_left_out_and_named(tmp_path):
    write_image(tmp_path / "images" / "good.png")
    write_image(tmp_path / "images" / "cut.png", seed=1)
    records = [
        {"id": name, "image": f"{name}.png", "conversations": say("<image> what", "a cat")} for name in ("good", "cut")
    ]
    index, encoder = index_of(tmp_path, records)
    cut = tmp_path / "images" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    batch = collator(index, encoder)([0, 1])
    assert [sample.split(":")[-1] for sample in batch.sample_ids] == ["good"]
    assert batch.unreadable[0][0] == "0:1:cut" and "cut.png" in batch.unreadable[0][1]
    nothing = collator(index, encoder)([1])
    assert len(nothing.targets) == 0 and len(nothing.input_ids) == 1 and len(nothing.pixel_values) == 1


def test_exchanged_images_are_never_ones_own(tmp_path):
    write_dataset(tmp_path, num_train=9, num_eval=1, seed=0)
    index, encoder = index_of(tmp_path, None)
    partners = exchange_images(collator(index, encoder))
    assert sorted(partners) == list(range(9))
    assert all(a != b for a, b in enumerate(partners))


def test_samples_without_an_answer(tmp_path, caplog):
    records = [{"id": f"r{i}", "conversations": say("what", "a cat")[: 1 + i % 2]} for i in range(4)]
    with pytest.raises(ValueError, match=r"2 sample\(s\) have no supervised token.*unsupervised=skip. First: r0, r2"):
        index_of(tmp_path, records)
    with caplog.at_level(logging.WARNING):
        index, _ = index_of(tmp_path, records, unsupervised="skip")
    assert [index.locate(sample)[1] for sample in range(len(index))] == [1, 3] and index.bad == 0
    assert "2 sample(s) without a supervised token are skipped" in caplog.text
