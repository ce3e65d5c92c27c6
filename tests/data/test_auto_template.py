"""``data.template: auto``: the ids are those of the processor's chat template, and labels are exact."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from tests.support import chat_templates
from tests.support.families import _WithoutVideo
from tests.support.family_runs import FamilyRuns
from tests.support.runner import BIN
from tests.support.tokenizers_made import TOKENIZERS
from vtprune_train.config.inherit import read_settings
from vtprune_train.core.stream import IMAGE
from vtprune_train.data.auto_template import AutoTemplate, message_of
from vtprune_train.data.chat import TEMPLATES, ChatEncoder, Turn, get_template
from vtprune_train.data.jinja import written_by
from vtprune_train.data.records import normalize
from vtprune_train.data.templates import misfits, open_auto_template
from vtprune_train.data.turns import IMAGE_MARK, REASONING, TOOLS, VISUAL
from vtprune_train.evaluation.answering import answers, load, prompt_text, write_prompt
from vtprune_train.evaluation.questions import read_questions
from vtprune_train.models.families import trained_family
from vtprune_train.models.io.processors import _without_torchvision

ROOT = Path(__file__).parents[2]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
INTERN = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
WRAPPED = f"<|vision_start|>{IMAGE}<|vision_end|>"
PINPOINTS = [[28, 28], [28, 56], [56, 28]]


class Family(NamedTuple):
    """A family's published chat template, a tokenizer of its kind, and what its processor writes for an image."""

    source: str
    tokenizer: str = "qwen"
    image_token: str = "<|image_pad|>"
    placeholder: str = WRAPPED
    added: tuple[str, ...] = tuple(QWEN)


FAMILIES = {
    "qwen2_vl": Family(chat_templates.QWEN2_5_VL),
    "qwen2_5_vl": Family(chat_templates.QWEN2_5_VL),
    "qwen3_vl": Family(chat_templates.QWEN3_VL),
    "llava": Family(chat_templates.LLAVA, "llama-new", IMAGE, IMAGE, ()),
    "llava_next": Family(chat_templates.LLAVA_NEXT, "llama-adds-bos", IMAGE, IMAGE, ()),
    "llava_onevision": Family(chat_templates.LLAVA_ONEVISION, "qwen", IMAGE, IMAGE, ("<video>",)),
    "internvl": Family(chat_templates.INTERNVL, "qwen", "<IMG_CONTEXT>", f"<img>{IMAGE}</img>", tuple(INTERN)),
}
TURNS = [
    Turn("system", "Look closely."),
    Turn("user", f"{IMAGE}\nWhat is this?"),
    Turn("assistant", "A red cat."),
    Turn("user", f"And that? {IMAGE}"),
    Turn("assistant", "Two dogs, I think."),
]
ENDINGS = {"llava": "", "llava_next": "<\\s>"}  # the published ones
BODIES = ["A red cat.", "Two dogs, I think."]


def tokenizer_of(family: Family) -> Any:
    tokenizer = TOKENIZERS[family.tokenizer]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.added)}, replace_extra_special_tokens=False)
    return tokenizer


def encoder_of(family: Family, tokenizer: Any = None) -> ChatEncoder:
    tokenizer = tokenizer or tokenizer_of(family)
    template = AutoTemplate(family.source, tokenizer, "here", family.image_token)
    image = tokenizer.convert_tokens_to_ids(family.image_token)
    return ChatEncoder(tokenizer, template, image, placeholder=family.placeholder)


def qwen_encoder(source: str) -> ChatEncoder:
    return encoder_of(Family(source))


def supervised(encoder: ChatEncoder, turns: list[Turn]) -> list[str]:
    """The supervised text of each answer. Its first token is predicted by the query row."""
    chat = encoder.encode(turns)
    starts = [*chat.answer_starts, len(chat.labels)]
    assert (chat.labels[: starts[0]] == -100).all()
    answers = [chat.labels[a:b][chat.labels[a:b] >= 0] for a, b in pairwise(starts)]
    for start, ids in zip(starts, answers, strict=False):
        assert chat.labels[start : start + len(ids)].tolist() == ids.tolist(), "one contiguous run from the query row"
    assert encoder.count([turns]) == [(len(chat.input_ids) - len(chat.image_offsets), sum(map(len, answers)))]
    return [encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip(" ") for ids in answers]


def processor_of(name: str, tokenizer: Any) -> Any:
    """The family's processor, for small tiles."""
    tile = {"height": 28, "width": 28}
    if name == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=tile)
        settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(image_processor=images, tokenizer=tokenizer, **settings)
    if name == "llava_next":
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=tile, image_grid_pinpoints=PINPOINTS)
        settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaNextProcessor(image_processor=images, tokenizer=tokenizer, **settings)
    if name == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=tile, image_grid_pinpoints=PINPOINTS)
        settings = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "video_processor": None}
        return _WithoutVideo(
            image_processor=images, tokenizer=tokenizer, vision_aspect_ratio="anyres_max_4", **settings
        )
    if name == "internvl":
        names = dict(zip(("start_image_token", "end_image_token", "context_image_token"), INTERN, strict=False))
        for key, token in names.items():
            setattr(tokenizer, key, token)
            setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.video_token = "<video>"
        images = GotOcr2ImageProcessorPil(size=tile, crop_to_patches=True, max_patches=4)
        return _without_torchvision(InternVLProcessor)(image_processor=images, tokenizer=tokenizer, image_seq_length=4)
    kind = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[name]
    size = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size)
    return _without_torchvision(kind)(image_processor=images, tokenizer=tokenizer)


def processor_ids(name: str, encoder: ChatEncoder, turns: list[Turn]) -> list[int]:
    """What ``processor.apply_chat_template`` gives, with each image's run of tokens as one."""
    processor = processor_of(name, encoder.tokenizer)
    picture = Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8))
    messages = [message_of(turn, encoder.template.content, IMAGE_MARK, {}) for turn in turns]
    for message in messages:
        for part in message["content"]:
            part.update({"image": picture} if part["type"] == "image" else {})
    made = processor.apply_chat_template(messages, chat_template=encoder.template.source, tokenize=True)
    return without_repeats(made[0] if isinstance(made[0], list) else made, encoder.image_token_id)


def without_repeats(ids: list[int], image: int) -> list[int]:
    """``ids`` with one image token for each run of them."""
    return [token for place, token in enumerate(ids) if token != image or place == 0 or ids[place - 1] != image]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_processor(name):
    encoder = encoder_of(FAMILIES[name])
    chat = encoder.encode(TURNS)
    assert chat.input_ids.tolist() == processor_ids(name, encoder, TURNS)
    assert [int(chat.input_ids[offset]) for offset in chat.image_offsets] == [encoder.image_token_id] * 2
    assert encoder.template.ending == ENDINGS.get(name, "<|im_end|>")
    ending = "" if encoder.template.is_marked else encoder.template.ending  # the marks leave it out
    assert supervised(encoder, TURNS) == [body + ending for body in BODIES]
    for start, number in zip(chat.answer_starts, (2, 4), strict=True):
        prompt = processor_prompt(encoder, TURNS[:number])
        assert chat.input_ids[:start].tolist() == prompt, "generation starts from the query row"


def processor_prompt(encoder: ChatEncoder, turns: list[Turn]) -> list[int]:
    """The ids of a prompt as the processor tokenizes it, before it repeats image tokens."""
    tokens = {IMAGE: encoder.image_token}
    messages = [message_of(turn, encoder.template.content, IMAGE_MARK, tokens) for turn in turns]
    text = encoder.tokenizer.apply_chat_template(
        messages, chat_template=encoder.template.source, add_generation_prompt=True, tokenize=False
    )
    if encoder.placeholder not in text:
        text = text.replace(encoder.image_token, encoder.placeholder)
    return encoder.tokenizer.encode(text)


def test_labels_are_the_generation_mask_of_transformers():
    encoder = encoder_of(FAMILIES["llava_onevision"])
    turns = [Turn("user", "What is this?"), *TURNS[2:3], Turn("user", "And that?"), *TURNS[4:]]
    messages = [message_of(turn, "parts", IMAGE_MARK, {}) for turn in turns]
    settings = {"return_dict": True, "return_assistant_tokens_mask": True, "add_generation_prompt": False}
    made = encoder.tokenizer.apply_chat_template(messages, chat_template=encoder.template.source, **settings)
    chat = encoder.encode(turns)
    assert chat.input_ids.tolist() == made["input_ids"]
    assert (chat.labels >= 0).astype(int).tolist() == made["assistant_masks"]


def thinking(text: str, reasoning: str) -> Turn:
    return Turn("assistant", text, json.dumps({"reasoning_content": reasoning}))


def test_reasoning_is_supervised_where_the_template_writes_it():
    encoder = qwen_encoder(chat_templates.QWEN3)
    one = [Turn("user", "Two dogs?"), thinking("No.", "I see a cat.")]
    assert supervised(encoder, one) == ["<think>\nI see a cat.\n</think>\n\nNo.<|im_end|>"]
    in_text = [one[0], Turn("assistant", "<think>\nI see a cat.\n</think>\n\nNo.")]
    assert supervised(encoder, in_text) == supervised(encoder, one)
    two = [*one, Turn("user", "And that?"), thinking("Yes.", "It is red.")]
    later = "<think>\nIt is red.\n</think>\n\nYes.<|im_end|>"
    assert supervised(encoder, two) == ["No.<|im_end|>", later], "the template omits reasoning before a question"
    text = encoder.tokenizer.decode(encoder.encode(two).input_ids)
    assert text.count("<think>") == 1 and "I see a cat" not in text


def test_a_prompt_that_opens_the_reasoning_is_not_supervised():
    encoder = qwen_encoder(chat_templates.QWEN3_VL_THINKING)
    one = [Turn("user", "Two dogs?"), thinking("No.", "I see a cat.")]
    assert supervised(encoder, one) == ["I see a cat.\n</think>\n\nNo.<|im_end|>"]
    with pytest.raises(ValueError, match="writes turn 2 after another text than the prompt it gives for it"):
        encoder.encode([*one, Turn("user", "And that?"), thinking("Yes.", "It is red.")])


def test_qwen3_5_takes_plain_conversations_by_the_template_of_its_recipe():
    """Each answer follows the checkpoint's prompt without thinking, and exports write the same."""
    settings, _, _ = read_settings(ROOT / "configs" / "qwen3_5_pdrop.yaml")
    tokenizer = tokenizer_of(FAMILIES["qwen3_vl"]._replace(added=(*QWEN, "<think>", "</think>")))
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    encoder = ChatEncoder(tokenizer, get_template(settings["data"]["template"]), image, placeholder=WRAPPED)
    assert supervised(encoder, TURNS) == [body + "<|im_end|>" for body in BODIES]
    source = written_by(encoder, trained_family("qwen3_5", "x")[1])
    messages = [message_of(turn, "text", IMAGE_MARK, {IMAGE: "<|image_pad|>"}) for turn in TURNS]
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    chat = encoder.encode(TURNS)
    processor = processor_of("qwen3_vl", tokenizer)
    made = processor(images=[Image.new("RGB", (60, 40))] * 2, text=write(messages, chat_template=source))
    [ids] = made["input_ids"]
    assert chat.input_ids.tolist() == without_repeats(ids, image), "those of exports"
    for start, number in zip(chat.answer_starts, (2, 4), strict=True):
        prompt = write(messages[:number], chat_template=source, add_generation_prompt=True)
        assert chat.input_ids[:start].tolist() == tokenizer.encode(prompt)
    messages[1]["content"] = [{"type": "image"}, {"type": "text", "text": "\nWhat is this?"}]
    published = partial(write, chat_template=chat_templates.QWEN3_5, enable_thinking=False)
    one = encoder.encode(TURNS[:3])
    prompt = published(messages[:2], add_generation_prompt=True)
    assert one.input_ids[: one.answer_starts[0]].tolist() == tokenizer.encode(prompt)
    assert tokenizer.decode(one.input_ids) + "\n" == published(messages[:3])


def test_qwen3_5_takes_reasoning_and_tools_by_its_chat_template():
    encoder = qwen_encoder(chat_templates.QWEN3_5)
    assert supervised(encoder, REASONED) == ["I see a cat.\n</think>\n\nNo.<|im_end|>"]
    called, answered = supervised(encoder, [*CALLED, Turn("tool", "A cat."), thinking("No.", "It is a cat.")])
    call = "<tool_call>\n<function=zoom>\n<parameter=left>\n1\n</parameter>\n</function>\n</tool_call>"
    assert called == f"\n</think>\n\nLet me see.\n\n{call}\n{call}<|im_end|>"
    assert answered == "It is a cat.\n</think>\n\nNo.<|im_end|>"
    with pytest.raises(ValueError, match="writes turn 3 after another text than the prompt"):
        encoder.encode(TURNS)
    [warning] = misfits(encoder, None, "model.path=here")
    assert "writes <think> in prompts, so it fits records with one question and reasoning" in warning


TOOL = {"type": "function", "function": {"name": "zoom", "description": "Zoom in", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"left": 1}}}
WITH_TOOLS = {
    "tools": [TOOL],
    "images": ["a.png"],
    "messages": [
        {"role": "system", "content": "Look closely."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is left?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Too small."},
        {"role": "tool", "content": "A red cat.", "tool_call_id": "1"},
        {"role": "assistant", "content": "The cat."},
    ],
}


def test_tools_calls_and_results():
    read = normalize(WITH_TOOLS, "x", chat=True)
    assert not read.error and not read.unread
    assert [turn.role for turn in read.turns] == [TOOLS, "system", "user", "assistant", "tool", "assistant"]
    encoder = qwen_encoder(chat_templates.QWEN3)
    call = '<tool_call>\n{"name": "zoom", "arguments": {"left": 1}}\n</tool_call><|im_end|>'
    asked, answered = supervised(encoder, list(read.turns))
    assert asked == f"<think>\nToo small.\n</think>\n\n{call}"
    assert answered == "<think>\n\n</think>\n\nThe cat.<|im_end|>"
    messages = [{**message} for message in WITH_TOOLS["messages"]]
    messages[2]["content"] = ""
    settings = {"chat_template": encoder.template.source, "tools": [TOOL], "tokenize": False}
    text = encoder.tokenizer.apply_chat_template(messages, **settings)
    assert encoder.encode(read.turns).input_ids.tolist() == encoder.tokenizer.encode(text)
    as_text = {**WITH_TOOLS, "tools": json.dumps([TOOL])}
    assert normalize(as_text, "x", chat=True) == read
    with pytest.raises(ValueError, match="it has reasoning_content, which the chat template of here does not"):
        qwen_encoder(chat_templates.QWEN2_5_VL).encode(read.turns)


REASONED = [Turn("user", "Two dogs?"), thinking("No.", "I see a cat.")]
CALLED = [Turn("user", "Two dogs?"), Turn("assistant", "Let me see.", json.dumps({"tool_calls": [CALL, CALL]}))]
LISTED = [Turn(TOOLS, json.dumps([TOOL])), Turn("user", "Two dogs?"), Turn("assistant", "No.")]
THOUGHT = Turn("assistant", "<think>Hm.</think>No.")
PROSE = (
    "{# tools, tool_calls, reasoning_content #}{{- 'You have no tools: make no tool_calls, no reasoning.' -}}"
    + chat_templates.QWEN2_5_VL
)
ONE_CALL = chat_templates.QWEN3.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")


@pytest.mark.parametrize(
    "source, turns, what",
    [
        (PROSE, REASONED, "it has reasoning_content, which the chat template of here does not write"),
        (PROSE, CALLED, "it has a call in tool_calls of turn 2, which the chat template of here does not write"),
        (PROSE, LISTED, "it has tools, which the chat template of here does not write"),
        (ONE_CALL, CALLED, "it has a call in tool_calls of turn 2"),
    ],
    ids=["reasoning", "calls", "tools", "second call"],
)
def test_fields_that_a_template_does_not_write_are_refused(source, turns, what):
    """Also if their names are in its prose; in prompts of `vtprune eval` too."""
    with pytest.raises(ValueError, match=what):
        qwen_encoder(source).encode(turns)
    encoder = qwen_encoder(chat_templates.QWEN3)
    encoder.template.source = source
    with pytest.raises(ValueError, match=what.replace("the chat template of here", "the model's chat template")):
        write_prompt(FakeProcessor(encoder), "parts", 0, [*turns, Turn("user", "And now?")])


def test_reasoning_has_the_name_that_the_template_reads(monkeypatch):
    """Some versions of transformers copy it to the other names."""
    module = "transformers.utils.chat_template_utils"
    monkeypatch.setattr(f"{module}._alias_reasoning_fields", lambda chat: chat, raising=False)
    for name in REASONING:
        encoder = qwen_encoder(chat_templates.QWEN3.replace("message.reasoning_content", f"message.{name}"))
        assert supervised(encoder, REASONED) == ["<think>\nI see a cat.\n</think>\n\nNo.<|im_end|>"]
        called = [
            REASONED[0],
            replace(CALLED[1], fields=json.dumps({"tool_calls": [CALL], "reasoning_content": "Hm."})),
        ]
        prompt = write_prompt(FakeProcessor(encoder), "parts", 0, [*called, Turn("tool", "A cat.")])
        assert "<think>\nHm.\n</think>" in prompt


@pytest.mark.parametrize(
    "answer, turns, what",
    [
        ("{%- if not message.tool_calls -%}{{- content -}}{%- endif -%}", CALLED, "the text"),
        ("{{- content[:3] -}}", CALLED, "the text"),
        ("{{- content.split('</think>')[-1] -}}", [REASONED[0], THOUGHT], "the reasoning"),
        ("{{- (message.reasoning_content or '')[:3] ~ content -}}", REASONED, "the reasoning"),
    ],
    ids=["calls only", "shortened", "no reasoning", "shortened reasoning"],
)
def test_an_answer_that_a_template_leaves_out_is_refused(answer, turns, what):
    with pytest.raises(ValueError, match=f"leaves out or changes {what} of turn 2"):
        qwen_encoder(chat_templates.qwen3_with(answer)).encode(turns)


def test_a_prompt_that_the_template_does_not_accept_is_an_error_of_the_record():
    """A template may go through the items of arguments, which are text in some records."""
    source = chat_templates.QWEN3.replace("function.arguments if function.arguments is string else", "")
    encoder = qwen_encoder(source.replace("function.arguments | tojson", "function.arguments | items | list | tojson"))
    call = {"function": {"name": "zoom", "arguments": '{"left": 1}'}}
    turns = [CALLED[0], Turn("assistant", "", json.dumps({"tool_calls": [call]})), Turn("tool", "A cat.")]
    with pytest.raises(ValueError, match="refuses it"):
        encoder.encode([*turns, Turn("assistant", "No.")])
    with pytest.raises(ValueError, match="the model's chat template rejects this conversation"):
        write_prompt(FakeProcessor(encoder), "parts", 0, turns)


def test_answers_that_call_tools_are_not_compared_in_an_evaluation(tmp_path):
    """Their text, often empty, is not what the model generates."""
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", **WITH_TOOLS}]))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    [question], left_out = read_questions(tmp_path / "a.json", tmp_path, chat=True)
    assert question.reference == "The cat." and len(question.turns) == 5
    assert left_out == [("x", "turn(s) 3 call tools; only answers in text are compared")]


def test_records_are_refused_without_auto_and_say_what_takes_them():
    for record, field in (
        (WITH_TOOLS, "tool_calls"),
        ({"messages": [*WITH_TOOLS["messages"][1:2], {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    ):
        error = normalize(record, "x").error
        assert field in error and "`data.template: auto` formats it" in error
    said = [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]
    assert "`data.template: auto` takes other orders" in normalize({"messages": said}, "x").error
    assert not normalize({"messages": said}, "x", chat=True).error
    assert "ends with a user turn" in normalize({"messages": [*said, said[0]]}, "x", chat=True).error
    wrong = {"messages": [said[0], {**said[1], "tool_calls": "zoom(1)"}]}
    assert "'tool_calls' is text, but not JSON" in normalize(wrong, "x", chat=True).error
    assert (
        "outside an assistant turn"
        in normalize({"messages": [{**said[0], "tool_calls": [CALL]}, said[1]]}, "x", chat=True).error
    )


def test_ids_and_labels_are_those_of_the_named_template_that_writes_the_same_text():
    auto = qwen_encoder(chat_templates.QWEN2_5_VL)
    named = ChatEncoder(auto.tokenizer, TEMPLATES["qwen"], auto.image_token_id, placeholder=WRAPPED)
    rng = random.Random(0)
    words = ["cat", " red", "12345", "  ", "Yes.", "<|im_end|>", "é", "?"]
    for _ in range(50):
        texts = ["".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(2 * rng.randint(1, 4))]
        turns = [
            Turn("assistant", text) if number % 2 else Turn("user", f"a{text}{IMAGE * rng.randint(0, 2)}")
            for number, text in enumerate(texts)
        ]
        turns = [Turn("system", "Be brief.")] * rng.randint(0, 1) + turns
        one, two = auto.encode(turns), named.encode(turns)
        assert one.input_ids[:-1].tolist() == two.input_ids.tolist(), "without the line break at the end"
        assert one.labels[:-1].tolist() == two.labels.tolist() and one.labels[-1] == -100
        assert (one.image_offsets, one.answer_starts) == (two.image_offsets, two.answer_starts)


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_3", "mistral", "qwen"])
def test_exports_of_named_templates_give_their_ids_and_labels(name):
    tokenizer = TOKENIZERS["llama-new" if name in ("vicuna_v1", "mistral") else "llama3"]()
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    named = ChatEncoder(tokenizer, TEMPLATES[name], image)
    auto = ChatEncoder(tokenizer, AutoTemplate(written_by(named), tokenizer, "here", IMAGE), image)
    one, two = auto.encode(TURNS), named.encode(TURNS)
    assert one.input_ids.tolist() == two.input_ids.tolist() and one.labels.tolist() == two.labels.tolist()
    assert (one.image_offsets, one.answer_starts) == (two.image_offsets, two.answer_starts)


def test_several_answers_in_a_row_and_odd_spaces():
    encoder = qwen_encoder(chat_templates.QWEN2_5_VL)
    turns = [Turn("user", "What?"), Turn("assistant", " A red cat.\n"), Turn("assistant", "<|im_start|>?")]
    assert supervised(encoder, turns) == ["A red cat.\n<|im_end|>", "<|im_start|>?<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "llava_next"])
def test_the_prefix_of_an_answer_is_not_supervised(name):
    """It is part of the prompt, as with ``continue_final_message``."""
    encoder = encoder_of(FAMILIES[name])
    said = [("user", "What?"), ("assistant", "A red"), ("assistant", " cat."), ("user", "And?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": text} for role, text in said]
    messages[1]["prefix"] = True
    read = normalize({"messages": messages}, "x", chat=True)
    ending = "" if encoder.template.is_marked else encoder.template.ending
    assert supervised(encoder, list(read.turns)) == ["cat." + ending, "Yes." + ending]
    whole = [read.turns[0], Turn("assistant", "A red cat."), *read.turns[3:]]
    chat = encoder.encode(read.turns)
    assert chat.input_ids.tolist() == encoder.encode(whole).input_ids.tolist()
    prompt = write_prompt(FakeProcessor(encoder), "parts", 0, read.turns[:2])
    assert encoder.tokenizer.encode(prompt) == chat.input_ids[: chat.answer_starts[0]].tolist()
    assert (
        "is not followed by the assistant turn that continues it"
        in normalize({"messages": messages[:2]}, "x", chat=True).error
    )


def test_a_prefix_has_no_other_fields():
    """They would be left out, or come before the prefix and be part of the prompt."""
    first, last = ({"role": "assistant", "content": text} for text in ("A red", " cat."))
    asked = {"role": "user", "content": "What?"}
    for fields in ({"reasoning_content": "I see."}, {"tool_calls": [CALL]}):
        error = normalize({"messages": [asked, {**first, "prefix": True, **fields}, last]}, "x", chat=True).error
        assert f"it has 'prefix' and {next(iter(fields))!r}: " in error and "(turn 2)" in error
    late = normalize({"messages": [asked, {**first, "prefix": True}, {**last, "thinking": "I see."}]}, "x", chat=True)
    with pytest.raises(ValueError, match="turn 2 continues the prefix 'A red' and has reasoning_content"):
        qwen_encoder(chat_templates.QWEN3).encode(late.turns)
    calls = normalize({"messages": [asked, {**first, "prefix": True}, {**last, "tool_calls": [CALL]}]}, "x", chat=True)
    [answer] = supervised(qwen_encoder(chat_templates.QWEN3), list(calls.turns))
    assert answer.startswith("cat.\n<tool_call>")


def test_a_field_that_is_not_json_is_named():
    for record, names in (
        ({"tools": [{"name": b"zoom"}]}, "a value in 'tools' cannot be written as JSON"),
        ({"tool_calls": [{"name": b"zoom"}]}, "a value in 'tool_calls' cannot be written as JSON"),
    ):
        answer = {"role": "assistant", "content": "x", "tool_calls": record.pop("tool_calls", None)}
        assert (
            names in normalize({**record, "messages": [{"role": "user", "content": "x"}, answer]}, "x", chat=True).error
        )


class FakeProcessor:
    """A processor with the template and tokenizer of an encoder."""

    def __init__(self, encoder: ChatEncoder):
        self.apply_chat_template = partial(
            encoder.tokenizer.apply_chat_template, chat_template=encoder.template.source, tokenize=False
        )


BARE = "{%- for message in messages -%}{{- message.role ~ ': ' ~ message.content ~ '\\n' -}}{%- endfor -%}"
PROMPTS = "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
QUOTED = "{{- messages[-1].content ~ '\\n' -}}"
REFUSED = [
    ("{%- set messages = messages | reverse | list -%}" + BARE + PROMPTS, "writes turn 3 after another text than"),
    (BARE + PROMPTS + QUOTED, "outputs no <image> for an image"),
    (BARE + "{{- messages | length -}}" + PROMPTS, "writes turn 3 after another text than the prompt"),
    (BARE.replace("message.content", "message.content[:3]") + PROMPTS, "outputs no <image> for an image"),
    ("{%- for message in messages -%}" + PROMPTS, "for an image .the chat template of here refuses it: "),
    ("{{- strftime_now('%d') -}}" + BARE + PROMPTS, "writes the current date"),
    ("{%- set all -%}{%- for m in messages -%}{{- m.role -}}{% generation %}{{- m.content -}}{% endgeneration %}"
     "{%- endfor -%}{%- endset -%}{{- all -}}", "generation %} inside another block"),
    (BARE.replace("{{-", "{%- if message.role == 'system' -%}{{- raise_exception('no system') -}}{%- endif -%}{{-")
     + PROMPTS, "the chat template of here refuses it: no system"),
    (BARE.replace("message.content", "(message.content if message.role != 'system' else '')") + PROMPTS,
     "leaves out or changes the text of turn 1"),
]  # fmt: skip


@pytest.mark.parametrize("source, reason", REFUSED)
def test_templates_that_cannot_be_masked_exactly_are_refused(source, reason):
    family = Family(source, image_token=IMAGE, placeholder=IMAGE, added=())
    with pytest.raises(ValueError, match=reason):
        encoder_of(family).encode(TURNS)


def test_what_a_template_adds_after_the_last_answer_is_left_out():
    """It ends the last answer differently from the others."""
    source = BARE.replace("~ '\\n' -}}", "~ '<|im_end|>' -}}") + "{{- '' if add_generation_prompt else eos_token -}}"
    encoder = encoder_of(Family(source + PROMPTS, image_token=IMAGE, placeholder=IMAGE, added=()))
    assert supervised(encoder, TURNS) == ["A red cat.<|im_end|>", "Two dogs, I think.<|im_end|></s>"]


@pytest.mark.parametrize(
    "name, warning",
    [
        ("qwen2_5_vl", ""),
        ("llava", "ends answers with no token, so training does not teach the model to stop"),
        ("llava_onevision", "marks answers without '<|im_end|>', so training does not teach the model to stop"),
    ],
)
def test_a_template_that_does_not_teach_to_stop_is_warned_of(name, warning):
    lines = list(misfits(encoder_of(FAMILIES[name]), None, "model.path=here"))
    assert len(lines) == bool(warning) and warning in "".join(lines)


def test_the_template_of_the_processor_is_used(tmp_path):
    """Older checkpoints have a second template, of the language model alone, with the tokenizer."""
    tokenizer = tokenizer_of(FAMILIES["qwen2_5_vl"])
    loop = trained_family("qwen2_5_vl", "x")[1]
    with pytest.raises(ValueError, match=f"data.template=auto: {tmp_path} has no chat template; save the checkpoint's"):
        open_auto_template(tokenizer, loop, str(tmp_path))
    tokenizer.chat_template = BARE
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": chat_templates.QWEN2_5_VL}))
    template = open_auto_template(tokenizer, loop, str(tmp_path))
    assert template.source == chat_templates.QWEN2_5_VL
    (tmp_path / "chat_template.json").unlink()
    tokenizer.chat_template = chat_templates.QWEN3_VL
    other = open_auto_template(tokenizer, loop, str(tmp_path))
    assert other.source == chat_templates.QWEN3_VL
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    prints = {ChatEncoder(tokenizer, one, image).fingerprint() for one in (template, other)}
    assert len(prints) == 2, "another template rebuilds the index"


def test_videos_are_written_in_place_of_the_token_of_the_template():
    """As a processor does: Qwen3-VL's keeps the template's markers around all frames."""
    tokenizer = tokenizer_of(FAMILIES["qwen3_vl"])
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    template = AutoTemplate(chat_templates.QWEN3_VL, tokenizer, "here", "<|image_pad|>", "<|video_pad|>")
    encoder = ChatEncoder(tokenizer, template, image, placeholder=WRAPPED, video_token_id=video)
    turns = [Turn("user", f"<video>\nor {IMAGE}?"), *TURNS[2:3]]
    frames = "".join(f"<{second}.0 seconds><|vision_start|><|video_pad|><|vision_end|>" for second in (1, 2))
    chat = encoder.encode(turns, [frames, WRAPPED])
    text = tokenizer.decode(chat.input_ids)
    around = f"<|vision_start|>{frames}<|vision_end|>or <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>"
    assert around in text and tokenizer.encode(text) == chat.input_ids.tolist()
    assert [int(chat.input_ids[place]) for place in chat.image_offsets] == [video, video, image]
    messages = [message_of(turn, "parts", VISUAL, {}) for turn in turns]
    written = tokenizer.apply_chat_template(messages, chat_template=chat_templates.QWEN3_VL, tokenize=False)
    processor = processor_of("qwen3_vl", tokenizer)
    [expected], _ = processor.get_text_with_replacements([written], ["<|image_pad|>"], [frames])
    assert chat.input_ids.tolist() == tokenizer.encode(expected)
    whole = encoder.encode(turns, [f"<|vision_start|>{frames}<|vision_end|>", WRAPPED])
    assert whole.input_ids.tolist() == chat.input_ids.tolist(), "markers are not written twice"
    one = Family(chat_templates.LLAVA_ONEVISION, "qwen", IMAGE, IMAGE, ("<video>",))
    with pytest.raises(ValueError, match="writes images before videos"):
        encoder_of(one).encode(turns, ["<video>", IMAGE])


@pytest.mark.slow
def test_a_run_trains_exports_and_answers_with_the_checkpoints_template(tmp_path):
    runs = FamilyRuns(tmp_path, "qwen2_5_vl")
    tokenizer = AutoTokenizer.from_pretrained(runs.model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, replace_extra_special_tokens=False
    )
    records = json.loads((tmp_path / "data" / "train.json").read_text())
    with_tools = {**WITH_TOOLS, "images": [records[0]["image"]]}
    for split, kept in (("train", [with_tools, *records]), ("eval", [with_tools])):
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(kept))
    settings = ("data.template=auto", "data.system=null", "train.max_steps=2")
    refused = runs.train("none", *settings, expect=2).stderr
    assert f"data.template=auto: {runs.model} has no chat template" in refused
    tokenizer.chat_template = chat_templates.QWEN3
    tokenizer.save_pretrained(runs.model)
    dry = runs.train("dry", *settings, "--dry_run").stdout
    assert "<|im_end|>]]" in dry and "WARNING" not in dry
    runs.train("auto", *settings, "run.stop_after=1")
    runs.train("auto", *settings)
    assert [m["step"] for m in runs.metrics("auto")] == [1, 2]
    folder = runs.checkpoint("auto") / "hf"
    assert (folder / "chat_template.jinja").read_text() == chat_templates.QWEN3
    names = {"--model": runs.directory("auto"), "--data": tmp_path / "data" / "eval.json", "--out": tmp_path / "out"}
    options = [str(part) for pair in names.items() for part in pair]
    images = ["--images", str(tmp_path / "data" / "images"), "--max_new_tokens", "2"]
    asked = subprocess.run(
        [BIN / "vtprune", "eval", *options, *images], capture_output=True, text=True, env=runs.environment()
    )
    assert asked.returncode == 0 and "1 answers" in asked.stdout, asked.stderr
    assert "1 sample(s) left out, wholly or in part" in asked.stdout
    loaded = load(str(runs.directory("auto")), device="cpu")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.model.generation_config.eos_token_id
    prompt = prompt_text(loaded, 1, f"{IMAGE}\nwhat is here ?")
    record = [Turn("user", f"{IMAGE}\nwhat is here ?"), Turn("assistant", "a cat")]
    encoder = encoder_of(Family(chat_templates.QWEN3), loaded.processor.tokenizer)
    chat = encoder.encode(record)
    assert loaded.processor.tokenizer.encode(prompt) == chat.input_ids[: chat.answer_starts[0]].tolist()
    assert len(answers(loaded, [([Image.new("RGB", (40, 60))], "what is here ?")], max_new_tokens=2)) == 1
