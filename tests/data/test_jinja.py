"""Templates of training as Jinja: the same text, piece by piece."""

import dataclasses
import re

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.chat import TEMPLATES, Template, Turn, _image_first
from vtprune_train.data.jinja import chat_template
from vtprune_train.data.turns import VISUAL

SPLIT = re.compile(f"({VISUAL.pattern})")

TURNS = [
    Turn("system", "Be brief."), Turn("user", "what <image>\n is {{ this }}?"), Turn("assistant", "a {% cat"),
    Turn("user", " <image><image> and? "), Turn("assistant", "dog"), Turn("user", "so"), Turn("assistant", "so."),
]  # fmt: skip
ODD = Template("Q: {text}\n", " A:", " {text} END%}\n", separator="\n\n", default_system="hé \"x\" 'y' {{ z }} \\n")


def rendered(template, turns, **variables):
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return render_jinja_template([messages], chat_template=template, eos_token="</s>", **variables)[0][0]


@pytest.mark.parametrize("template", [*TEMPLATES.values(), ODD], ids=lambda template: template.name)
@pytest.mark.parametrize("image_first", [False, True])
def test_the_same_text_as_the_pieces(template, image_first):
    filled = dataclasses.replace(template, answer=template.answer.replace("{eos}", "</s>"))
    source = chat_template(template, image_first=image_first)
    for turns in (TURNS, TURNS[1:], TURNS[:3], TURNS[1:3]):
        ordered = [_image_first(turn) for turn in turns] if image_first else turns
        expected = "".join(text for text, _ in filled.pieces(ordered))
        for bos in (None, "<s>"):
            begin = bos if bos and template.bos else ""
            assert rendered(source, turns, bos_token=bos) == begin + expected
        prompt = rendered(source, turns[:-1], add_generation_prompt=True)
        assert expected == prompt + filled.answer.replace("{text}", turns[-1].text)


def test_parts_are_text_with_images_in_it():
    source = chat_template(TEMPLATES["vicuna_v1"])
    parts = [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]
    assert rendered(source, [Turn("user", parts)]) == rendered(source, [Turn("user", "<image>\nwhat?")])


VIDEO_TURNS = [
    Turn("user", "is <video>\n in <image> there?"), Turn("assistant", "a <cat>"),
    Turn("user", " and <video> so ?"), Turn("assistant", "dog"),
    Turn("user", "<video>\n<video>"), Turn("assistant", "x"),
]  # fmt: skip
QWEN = {IMAGE: "<|vs|><|img|><|ve|>", VIDEO: "<|vs|><|vid|><|ve|>"}
LLAVA = {IMAGE: IMAGE, VIDEO: VIDEO}


@pytest.mark.parametrize("template", [*TEMPLATES.values(), ODD], ids=lambda template: template.name)
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("texts", [QWEN, LLAVA], ids=["qwen", "llava"])
def test_videos_are_written_as_in_training(template, image_first, texts):
    """From the token of the family in a text, and from parts."""
    filled = dataclasses.replace(template, answer=template.answer.replace("{eos}", "</s>"))
    tokens = {IMAGE: "<|img|>", VIDEO: "<|vid|>"} if texts is QWEN else LLAVA
    source = chat_template(
        template, image_first=image_first, placeholder=texts[IMAGE].replace("<|img|>", IMAGE), token=tokens[IMAGE],
        video=(texts[VIDEO], tokens[VIDEO]),
    )  # fmt: skip

    def filled_in(text, forms):
        return VISUAL.sub(lambda match: forms[match.group()], text)

    ordered = [_image_first(turn, VISUAL) for turn in VIDEO_TURNS] if image_first else VIDEO_TURNS
    expected = "".join(filled_in(text, texts) for text, _ in filled.pieces(ordered, VISUAL))
    for forms in (tokens, texts):
        assert rendered(source, [Turn(turn.role, filled_in(turn.text, forms)) for turn in VIDEO_TURNS]) == expected
    kinds = {IMAGE: {"type": "image"}, VIDEO: {"type": "video"}}
    parts = [
        Turn(turn.role, [kinds.get(part, {"type": "text", "text": part}) for part in SPLIT.split(turn.text) if part])
        for turn in VIDEO_TURNS
    ]
    assert rendered(source, parts) == expected


def test_spaces_around_videos_are_those_of_training():
    """``data.tokenization: llava``: a space before each text between images and videos."""
    template = Template("Q: {text}\n", "A:", " {text}</s>")
    source = chat_template(template, spaces_unless=["</s>"], video=(VIDEO, VIDEO))
    text = rendered(source, [Turn("user", "<video>is <image>in<video>\n"), Turn("assistant", "yes")])
    assert text == " Q: <video> is <image> in<video> \n\nA: yes</s>"
