"""Templates of training as Jinja: the same text, piece by piece."""

import dataclasses

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vtprune_train.data.chat import TEMPLATES, Template, Turn, _image_first
from vtprune_train.data.jinja import chat_template

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
