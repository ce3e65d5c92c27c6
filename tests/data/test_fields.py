"""Fields of records: honoured, refused by name, or said not to be read. Never dropped without a word."""

import base64
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.support.data import build, image_bytes, say, write_tar
from vtprune_train.data.chat import Turn
from vtprune_train.data.index import Source
from vtprune_train.data.records import Video, normalize, read_records
from vtprune_train.evaluation.questions import read_questions

TALK = {"conversations": say("what happens ?", "it rains")}
MESSAGES = [{"role": "user", "content": "what happens ?"}, {"role": "assistant", "content": "it rains"}]


def with_turn(number, **fields):
    return {"messages": [{**turn, **(fields if i == number else {})} for i, turn in enumerate(MESSAGES)]}


def with_content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, MESSAGES[1]]}


REFUSED = [
    ({"video": "clip.mp4"}, "1 video(s) but 0 <video> in the text"),
    ({"videos": ["clip.mp4", "b.mp4"]}, "2 video(s) but 0 <video> in the text"),
    ({"video_path": "clip.mp4"}, "'video_path' ('clip.mp4') holds a video, but only fields named 'video' or 'videos'"),
    ({"conversations": say("<video> what ?", "it"), "video": ["1.jpg", "2.jpg"]}, "write the frames of one video as"),
    ({"videoUrl": "http://x/clip"}, "'videoUrl'"),
    ({"frames": ["1.jpg", "2.jpg"]}, "'frames'"),
    ({"audio": {"bytes": b"RIFF", "path": None}}, "'audio'"),
    ({"audios": ["a.wav"]}, "'audios'"),
    ({"speech": "a.wav"}, "'speech'"),
    ({"point_cloud": "a.npy"}, "'point_cloud'"),
    ({"tools": [{"name": "search"}]}, "'tools'"),
    ({"tools": '[{"name": "search"}]'}, "'tools'"),
    ({"functions": [{"name": "search"}]}, "'functions'"),
    ({"chosen": MESSAGES, "rejected": MESSAGES}, "'chosen'"),
    ({"rejected_response": "it snows"}, "'rejected_response'"),
    ({"label": False}, "'label'"),
    ({"kto_tag": False}, "'kto_tag'"),
    ({"history": [["a", "b"]]}, "'history'"),
    ({"documents": ["a text"]}, "'documents'"),
    ({"weight": 0.5}, "'weight' (0.5) holds a weight"),
    ({"sample_weight": 0}, "'sample_weight'"),
    ({"loss": False}, "'loss'"),
    ({"loss_mask": [0, 1]}, "'loss_mask'"),
    ({"mask": [1, 0]}, "'mask'"),
    ({"train_on_inputs": True}, "'train_on_inputs'"),
    ({"image_path": "a.png"}, "'image_path'"),
    ({"image_1": "a.png"}, "'image_1'"),
    ({"img": "a.png"}, "'img'"),
    ({"left_image": "a.png"}, "'left_image'"),
    ({"attachments": ["a.pdf"]}, "'attachments'"),
    ({"train_last_turn_only": True}, "'train_last_turn_only'"),
    ({"num_repeats": 2}, "'num_repeats'"),
    ({"frames_dir": "a"}, "'frames_dir'"),
    ({"wav_path": "a"}, "'wav_path'"),
    ({"scene": "a/b.MP4"}, "'scene' ('a/b.MP4') names a video or audio file"),
    ({"system": ["be brief"]}, "'system' is ['be brief']"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "'chat_template_kwargs'"),
    ({"image": "a.png", "images": ["b.png"]}, "'images' and 'image' are both present and differ"),
    ({"messages": MESSAGES[:1]}, "'conversations' and 'messages' are both present and differ"),
]
REFUSED_TURNS = [
    (with_turn(1, loss=False), "its field 'loss' (False) holds a flag that selects what is trained on"),
    (with_turn(1, train=0), "'train'"),
    (with_turn(1, weight=0), "'weight'"),
    (with_turn(1, loss_mask=0), "'loss_mask'"),
    (with_turn(1, mask=True), "'mask'"),
    (with_turn(1, learn=False), "'learn'"),
    (with_turn(1, calculate_loss=0), "'calculate_loss'"),
    (with_turn(1, is_trained=False), "'is_trained'"),
    (with_turn(1, for_training=False), "'for_training' (False) holds what seems to be a flag"),
    (with_turn(1, include_in_loss=0), "'include_in_loss'"),
    (with_turn(1, exclude_from_loss=True), "'exclude_from_loss'"),
    (with_turn(1, unmask=False), "'unmask'"),
    (with_turn(1, is_masked=True), "'is_masked'"),
    (with_turn(1, skip=1), "'skip'"),
    (with_turn(1, ignoreTurn=True), "'ignoreTurn'"),
    (with_turn(1, excluded=True), "'excluded'"),
    (with_turn(1, backprop=False), "'backprop'"),
    (with_turn(1, _loss=False), "'_loss'"),
    (with_content({"type": "image", "image": {"path": "a.png", "video": "a.mp4"}}), "'video' ('a.mp4') holds a video"),
    (with_turn(1, train_detail=[{"begin_offset": 0, "train": False}]), "'train_detail'"),
    (with_turn(0, use_for_loss=True), "'use_for_loss'"),
    (with_content({"type": "speech", "text": "hi"}), "{type: image, image: ...} or {type: video, video: ...} (turn 1)"),
    (with_turn(0, loss=True), "ignore` if it can be ignored (turn 1)"),
    (with_turn(1, tool_calls=[{"function": {"name": "f"}}]), "'tool_calls'"),
    (with_turn(1, function_call={"name": "f", "arguments": "{}"}), "'function_call'"),
    (with_turn(1, reasoning_content="it must"), "'reasoning_content'"),
    (with_turn(0, images=["a.png"]), "'images'"),
    (with_turn(0, image="a.png"), "'image'"),
    (with_turn(0, video="a.mp4"), "'video'"),
    (with_turn(1, **{"from": "human", "value": "x"}), "'from' and 'role' are both present and differ"),
    ({"messages": [*MESSAGES[:1], {"role": "tool", "content": "5"}]}, "unknown role 'tool'"),
    ({"messages": [*MESSAGES[:1], {"role": "observation", "content": "5"}]}, "unknown role 'observation'"),
    ({"messages": [{"role": "developer", "content": "5"}, *MESSAGES]}, "unknown role 'developer'"),
    (with_content({"type": "video_url", "video_url": {"url": "http://x/a.mp4"}}), "'http://x/a.mp4' is not a local"),
    (with_content({"type": "video", "video": "a.mp4", "start": 3, "end": 2}), "ends at 2.0 s, before its start at 3.0"),
    (with_content({"type": "video", "video": "a.mp4", "end": "2"}), "end='2' of a video is not a number of at least 0"),
    (with_content({"type": "video", "video": "a.mp4", "start": 3, "video_start": 2}), "also start=3; remove"),
    (with_content({"type": "video", "video": {"path": "a.mp4", "end": 3}, "end": 2}), "end=3 and end=2; remove one"),
    (with_content({"type": "video", "video": {"path": "a.mp4", "url": "b.mp4"}}), "has path and url; write"),
    (with_content({"type": "video", "video": "a.mp4", "fps": 1}), "fps=1 of video 'a.mp4': `fps` is the rate of"),
    (with_content({"type": "video", "video": "a.mp4", "nframes": 8}), "nframes=8; set data.video.num_frames"),
    (with_content({"type": "video", "video": {"path": "a.mp4", "max_pixels": 9}}), "=9; set data.video.max_pixels"),
    (with_content({"type": "video", "index": 1}, {"type": "video", "index": 2}), "[1, 2], but there are 0 videos"),
    ({**with_content({"type": "video"}, {"type": "video"}), "videos": ["a.mp4", "b.mp4"], "start": 1}, "one of its 2"),
    ({**with_content({"type": "video", "video": "a.mp4", "start": 2}), "start": 1}, "the record has start=1"),
    ({**with_content({"type": "video", "video": "a.mp4"}), "start_time": "00:03"}, "start_time='00:03' of a video"),
    (with_content({"type": "video", "video": "a.mp4"}, {"type": "video"}), "only 1 of their parts contain a video"),
    ({**with_content({"type": "video", "video": "a.mp4"}), "videos": ["b.mp4"]}, "in the parts of its turns differ"),
    (with_content({"type": "input_audio", "input_audio": {"data": "UklG"}}), "'input_audio'"),
    (with_content({"type": "text", "text": "hi", "video": "a.mp4"}), "'video'"),
    (with_content({"type": "image_url", "image_url": {"url": "https://x/a.png"}}), "'https://x/a.png' is not a local"),
    (with_content({"type": "image", "image": "a.png"}, {"type": "image"}), "only 1 of their parts contain an image"),
    ({**with_content({"type": "image", "image": "a.png"}), "images": ["b.png"]}, "in the parts of its turns differ"),
    ({**with_content({"type": "image", "index": 1}), "images": ["a.png"]}, "have the image indices [1]"),
    ({"conversations": say("<video>\nwhat ?", "it rains")}, "its text contains <video>"),
    ({"conversations": say("listen: <audio>", "it rains")}, "<audio>"),
    ({"conversations": say("where is <ref-object>?", "<bbox>"), "objects": {"bbox": [[0, 0, 9, 9]]}}, "<ref-object>"),
    ({"conversations": say("<Image>\nwhat ?", "it rains")}, "<Image>, but the record has no 'image'"),
    ({"conversations": say("<image_1> what ?", "it rains")}, "<image_1>"),
    ({"conversations": say("<img>a.png</img> what ?", "it rains")}, "<img>"),
    ({"conversations": say("<video_1> what ?", "it rains")}, "<video_1>"),
    ({"conversations": say("<|video_pad|> what ?", "it rains")}, "<|video_pad|>"),
    ({"conversations": {"from": ["human", "gpt"], "value": ["what"]}}, "whose values are not lists of equal length"),
    ({"conversations": json.dumps(say("what", "it"))}, "'conversations' is a str, not a list of turns"),
    ({**with_turn(0), "system": "a", "system_prompt": "b"}, "two different system prompts"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_field_that_changes_what_is_trained_is_refused(fields, error):
    assert not normalize(TALK, "x").error
    assert error in normalize({"id": "r", **TALK, **fields}, "x").error


@pytest.mark.parametrize(("record", "error"), REFUSED_TURNS, ids=lambda value: str(value)[:40])
def test_a_turn_that_changes_what_is_trained_is_refused(record, error):
    assert error in normalize(record, "x").error


@pytest.mark.parametrize(
    "fields",
    [
        {"video": None, "videos": [], "audio": "", "tools": None, "objects": {"bbox": [], "ref": None}, "loss": None},
        {"weight": 1, "loss": True, "loss_mask": [1, 1], "label": "rain", "mask": 0},
        {"id": 3, "source": "x", "width": 3, "height": 4, "metadata": {"video": "y"}, "score": 0.1, "language": "en"},
        {
            "for_training": True,
            "exclude_from_loss": False,
            "train_split": "a",
            "train_last_turn_only": False,
            "skip": 0,
        },
        {"video_id": "abc", "dataset": "y", "__index_level_0__": 4, "num_frames": 8, "num_images": 0, "image_size": 3},
    ],
)
def test_fields_that_change_nothing_stay_allowed(fields):
    read = normalize({**TALK, **fields}, "x")
    assert not read.error and not read.unread and read.turns == normalize(TALK, "x").turns


def test_places_in_the_image_that_no_placeholder_asks_for_are_not_read():
    places = {"bbox": [[0, 0, 10, 10]], "objects": {"ref": ["cat"], "bbox": [[0, 0, 9, 9]]}, "mask_path": "a.png"}
    places["object_masks"] = places["object_mask"] = [{"size": [9, 9], "counts": "x"}]
    read = normalize({**TALK, **places}, "x")
    assert not read.error and read.unread == set(places)


def test_times_and_order_of_videos():
    """Times in the value of a video, in its part of a message, or in the record; the order of indices."""
    asked = {"conversations": say("<video> what ?", "it rains")}
    for record in (
        {**asked, "video": {"path": "a.mp4", "start": 2, "end": 9.5}},
        {**asked, "video": "a.mp4", "start": 2, "end": 9.5},
        {**asked, "videos": ["a.mp4"], "start_time": 2.0, "video_end": 9.5, "fps": None},
        with_content({"type": "video", "video": "a.mp4", "start": 2, "video_end": 9.5}),
    ):
        conversation = normalize(record, "x")
        assert not conversation.error and conversation.videos == (Video("a.mp4", 2.0, 9.5),), record
    assert normalize({**asked, "video": "frames", "fps": 4}, "x").videos == (Video("frames", fps=4.0),)
    file = with_content({"type": "video", "video": "a.mp4", "fps": 1, "start": 3})
    assert normalize(file, "x", ["fps"]).videos == (Video("a.mp4", 3.0),)
    two = with_content({"type": "video", "index": 1}, {"type": "video", "index": 0})
    conversation = normalize({**two, "videos": ["a.mp4", "b.mp4"]}, "x")
    assert [video.file for video in conversation.videos] == ["b.mp4", "a.mp4"]


def test_a_number_is_no_video():
    read = normalize({**TALK, "clip": 0.31, "frame": 12, "points": 3}, "x")
    assert not read.error and read.unread == {"clip", "frame", "points"}
    assert "video is True; use a path" in normalize({**TALK, "video": True}, "x").error


def test_tags_of_html_are_no_placeholders():
    code = "<video src='a.mp4'></video><picture><source srcset='a.png'></picture> <video>x</video>"
    assert not normalize({"conversations": say(f"mend {code}", "it rains")}, "x").error
    assert "<picture>" in normalize({"conversations": say("<picture>\nwhat ?", "it rains")}, "x").error


def test_flags_of_turns_that_say_what_is_done_anyway():
    for number, fields in ((1, {"loss": True}), (1, {"weight": 1.0}), (0, {"loss": 0}), (0, {"weight": 0})):
        assert not normalize(with_turn(number, **fields), "x").error, fields
    nothing = dict.fromkeys(("tool_calls", "function_call", "loss", "images", "audio", "name"))
    assert normalize(with_turn(1, **nothing), "x") == normalize(with_turn(1), "x")


def test_other_fields_are_read_on_and_named():
    assert normalize({**TALK, "context": "a text", "instruction": ""}, "x").unread == {"context"}
    assert normalize(with_turn(0, name="tom"), "x").unread == {"name"}
    assert normalize(with_turn(1, eos=False), "x").unread == {"eos"}  # false says something, unlike an empty value
    assert normalize({**TALK, "train_loss": 0.3, "url": "a.mp4"}, "x").unread == {"train_loss"}
    assert normalize({**TALK, "image": "a.png", "image_url": "http://x"}, "x").error, "no <image>"
    seen = {"image": "a.png", "image_path": "x/a.png", "conversations": say("<image> what ?", "it rains")}
    assert normalize(seen, "x").unread == {"image_path"}, "where the image came from"


def test_system_prompts():
    for name in ("system", "system_prompt", "system_message"):
        assert normalize({**TALK, name: "Be brief."}, "x").turns[0] == Turn("system", "Be brief.")
    both = {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}
    assert len(normalize({**both, "system": "Be brief."}, "x").turns) == 3
    assert "two different system prompts" in normalize({**both, "system": "Be long."}, "x").error


def test_images_of_content_parts(tmp_path):
    picture = image_bytes(tmp_path, 1)
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    text = {"type": "text", "text": "what ?"}
    for part, image in [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png", "text": None}, "a.png"),
        ({"type": "image", "image": {"bytes": picture, "path": "a.png"}}, picture),
        ({"type": "image_url", "image_url": {"url": url}}, picture),
        ({"type": "image_url", "image_url": "file:///x/a.png"}, "/x/a.png"),
    ]:
        read = normalize(with_content(part, text), "x")
        assert read.images == (image,) and read.turns[0].text == "<image>what ?" and not read.unread, part
    low = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    assert normalize(with_content(low, text), "x").unread == {"detail"}
    cut = {"image": [{"path": "a.png", "crop": [0, 0, 9, 9]}], "conversations": say("<image> what ?", "it rains")}
    assert normalize(cut, "x").unread == {"crop"}
    numbered = {**with_content({"type": "image", "index": 1}, {"type": "image", "index": 0}), "images": ["a", "b"]}
    assert normalize(numbered, "x").images == ("b", "a")
    assert "is not base64" in normalize({**TALK, "image": "data:image/png;base64,*"}, "x").error


def test_html_is_no_mark_and_ignore_lets_through():
    html = {"conversations": say("why does <video src=x> fail? <video></video>", "close <audio>")}
    assert not normalize(html, "x").error
    video = {**TALK, "video": "a.mp4"}
    assert normalize(video, "x").error and not normalize(video, "x", ["video"]).error
    marked = {"conversations": say("what is <video> in HTML ?", "a tag")}
    assert normalize(marked, "x").error and not normalize(marked, "x", ["<video>"]).error
    flagged = with_turn(1, weight=0)
    assert normalize(flagged, "x").error and not normalize(flagged, "x", ["weight"]).error


RECORDS = [
    {"id": "fine", "video": None, "context": "a text", **TALK},
    {"id": "moving", "video": "clip.mp4", "context": None, **TALK},
]


def write_every_kind(folder):
    (folder / "a.json").write_text(json.dumps(RECORDS))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet")
    Dataset.from_list(RECORDS).save_to_disk(str(folder / "disk"))
    write_tar(folder / "a.tar", [(f"{record['id']}.json", json.dumps(record).encode()) for record in RECORDS])
    return ["a.json", "a.jsonl", "a.parquet", "disk", "a.tar"]


def test_every_kind_of_file_tells_of_a_field_that_is_refused_and_of_one_that_is_not_read(tmp_path, caplog):
    for name in write_every_kind(tmp_path):
        source = Source(tmp_path / name, tmp_path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            index, _ = build([source], tmp_path, max_bad=1)
        assert len(index) == index.bad == 1 and index.record(0).id == "fine", name
        assert "left out: moving: 1 video(s) but 0 <video> in the text" in caplog.text, name
        assert f"{name}: fields that are not read: 'context'" in caplog.text, name
        with pytest.raises(ValueError, match=r"1 records cannot be used, more than data.max_bad=0.*<video>"):
            build([source], tmp_path)
        ignoring, _ = build([Source(tmp_path / name, tmp_path, ignore=("video",))], tmp_path)
        assert [ignoring.record(i).id for i in range(2)] == ["fine", "moving"], name
        questions, malformed = read_questions(tmp_path / name, tmp_path)
        assert [question.sample for question in questions] == ["fine"] and malformed[0][0] == "moving", name
        assert len(read_questions(tmp_path / name, tmp_path, ignore=["video"])[0]) == 2, name


def test_questions_whose_images_are_all_elsewhere(tmp_path):
    records = [{"id": "r", "image": "a.png", "conversations": say("<image> what ?", "a cat")}, {"id": "t", **TALK}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"--images .*: none of the 1 images that .*a.json names exists"):
        read_questions(tmp_path / "a.json", tmp_path)
    image_bytes(tmp_path, 1)
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "a.png")
    assert len(read_questions(tmp_path / "a.json", tmp_path / "images")[0]) == 2


def test_members_of_a_tar_that_are_no_images(tmp_path):
    talk = json.dumps(TALK).encode()
    members = [
        ("k1.json", talk), ("k1.mp4", b"x"),  # a video that no text refers to
        ("k2.json", talk), ("k2.wav", b"x"),
        ("k3.txt", b"it rains"), ("k3.srt", b"x"), ("k3.flac", b"x"),
        ("k4.txt", b"it rains"), ("k4.json", b'{"video": "clip.mp4", "width": 3}'),
        ("k5.json", talk), ("k5.cls", b"3"), ("k5.txt", b"a caption"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    records = list(read_records(tmp_path / "a.tar"))
    for record, name in zip(records, ("1 video(s)", "'.wav'", "'.flac'", "<video>"), strict=False):
        assert name in record.error, record
    assert not records[4].error and records[4].unread == {".cls", ".txt"}


def test_a_source_that_is_partly_or_wholly_unusable_stops_the_run(tmp_path):
    """The share is each source's own; one record may always be left out."""
    for name, bad in (("good", 1), ("poor", 2), ("none", 10)):
        records = [{"id": f"{name}{i}", **TALK, **({"video": "x"} if i < bad else {})} for i in range(10)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    good, poor, none = (Source(tmp_path / f"{name}.json", tmp_path) for name in ("good", "poor", "none"))
    assert len(build([good], tmp_path, max_bad=100, max_bad_share=0.05)[0]) == 9
    with pytest.raises(ValueError, match=r"poor.json .*2 of its 10 records cannot be used, more than data.max_bad_sha"):
        build([good, poor], tmp_path, max_bad=100, max_bad_share=0.05)
    assert len(build([good, poor], tmp_path, max_bad=100, max_bad_share=0.2)[0]) == 17
    with pytest.raises(ValueError, match=r"none.json .*none of its 10 records can be used.*none0: 1 video"):
        build([good, none], tmp_path, max_bad=100, max_bad_share=1)
