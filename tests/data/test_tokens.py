"""Ids of training are those of prompting, for every kind of tokenizer, template and conversation."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer, LlavaNextConfig, LlavaOnevisionConfig

from tests.support.tokenizers_made import LEGACY_FILE, TOKENIZERS, byte_level, llama, sentencepiece
from vtprune_train.data.chat import TEMPLATES, ChatEncoder, Turn, get_template
from vtprune_train.data.jinja import written_by
from vtprune_train.data.tokens import SectionTokenizer
from vtprune_train.models.io.tokenizer import lasting

IMAGES = 3  # tokens of an image
CUSTOM = {
    "lines": {"user": "Q: {text}\n", "assistant": "A:", "answer": " {text}{eos}", "separator": "\n"},
    "space": {"user": "Q: {text}\n", "assistant": "A: ", "answer": "{text}{eos}", "bos": False},
    "header": {"user": "user\n{text}</s>", "assistant": "assistant\n", "answer": "{text}</s>", "system": "{text}\n\n"},
    "eos": {
        "user": "{text}{eos}",
        "assistant": "A:{eos}",
        "answer": " {text}",
        "system": "{text}{eos}",
        "separator": "{eos}",
    },
    "no end": {"user": "Q: {text}", "assistant": " A:", "answer": " {text}\n"},
}
SPECS = {**{name: name for name in TEMPLATES}, **CUSTOM}
CONVERSATIONS = [
    ["<image>\nWhat is this?", "A red cat."],
    ["What is<image>this?", "A red cat."],
    ["What is this? <image>", " Two dogs, I think."],
    ["What is this?", "No."],
    ["<image><image>\nWhat is this? <image> And that?", "12345\n\nYes."],
    ["<image>", "A red cat."],
    ["<image>\nWhat is this?", "A red cat.", "And that?", "Two dogs.", "the left one?", "é 你"],
    ["What is this?", "A red cat.", " And <image> that?", "Two dogs. ", "<image>the left one?<image>", "  red"],
]


def turns_of(texts):
    return [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


def encoder_of(tokenizer, spec, **settings):
    return ChatEncoder(tokenizer, get_template(spec), tokenizer.convert_tokens_to_ids("<image>"), **settings)


def expanded(ids, image):
    return [token for token in ids for _ in range(IMAGES if token == image else 1)]


def asked(tokenizer, source, turns):
    """What a processor makes of a prompt."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = tokenizer.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    text = text.replace("<image>", "<image>" * IMAGES)
    return tokenizer.encode(text, add_special_tokens=not text.startswith(tokenizer.bos_token))


def check(tokenizer, reopened, spec, **settings):
    encoder = encoder_of(tokenizer, spec, **settings)
    source = written_by(encoder)
    conversations = [turns_of(texts) for texts in CONVERSATIONS]
    if not encoder.bos and not encoder._added:
        conversations = [turns for turns in conversations if spec != "plain" or "<image>" in turns[0].text]
    for turns in conversations:
        chat = encoder.encode(turns)
        for number, start in enumerate(chat.answer_starts):
            trained = expanded(chat.input_ids[:start].tolist(), encoder.image_token_id)
            prompt = turns[: 2 * number + 1]
            assert trained == asked(tokenizer, source, prompt), (spec, prompt)
            assert trained == asked(reopened, source, prompt), (spec, prompt)
            assert chat.labels[start] >= 0 and (spec == "plain" or chat.labels[start - 1] == -100)
    counts = encoder.count(conversations)
    for turns, (total, supervised) in zip(conversations, counts, strict=True):
        chat = encoder.encode(turns)
        assert (total, supervised) == (len(chat.input_ids) - len(chat.image_offsets), (chat.labels >= 0).sum())


def opened(tokenizer, config, folder):
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": config.model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("config", [LlavaNextConfig, LlavaOnevisionConfig])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_has_the_ids_of_prompting(tmp_path, kind, config):
    tokenizer = lasting(TOKENIZERS[kind](), config())
    reopened = opened(tokenizer, config(), tmp_path)
    for spec in SPECS.values():
        for position in ("as_written", "first"):
            check(tokenizer, reopened, spec, image_position=position)
    for spec in ("plain", "vicuna_v1", "mistral"):
        check(tokenizer, reopened, spec, tokenization="llava")


def test_a_tokenizer_in_python_too():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "bos_token": "<s>"})
    for spec in ("plain", "vicuna_v1", "llama_3"):
        check(tokenizer, tokenizer, spec)
    assert len(encoder_of(tokenizer, "vicuna_v1").fingerprint()) > 300
    with pytest.raises(ValueError, match=r"appends \['</s>'\] to every text.*add_eos_token"):
        encoder_of(tokenizer, {**CUSTOM["lines"], "bos": False})


def test_sections_are_the_whole_text():
    """Also beside tokens that take spaces, overlap, depend on their neighbours or are looked for after normalizing."""
    rng = np.random.default_rng(0)
    marks = ["<s>", "</s>", "<image>", "<|a|>", "<|a|><", "<b>", "<c>", "WORD", "norm"]
    pieces = [*marks, " ", "  ", "\n", "A cat", "WORDS", " and", "é", "a", "12", "<|a|", ">", "."]
    for make in (byte_level, llama, lambda: sentencepiece(None, LEGACY_FILE), lambda: sentencepiece("always")):
        tokenizer = make()
        tokenizer.add_tokens(["<|a|>", "<|a|><"], special_tokens=True)
        tokenizer.add_tokens([AddedToken("<b>", lstrip=True, normalized=False), AddedToken("<c>", rstrip=True)])
        tokenizer.add_tokens([AddedToken("WORD", single_word=True, normalized=False), AddedToken("norm")])
        sections = SectionTokenizer(tokenizer)
        for _ in range(300):
            text = "".join(rng.choice(pieces, rng.integers(1, 12)))
            whole = tokenizer.encode(text, add_special_tokens=False)
            assert sections(text) == whole, text
            place = int(rng.integers(0, len(text) + 1))
            [(ids, [edge])] = sections.locate([(text, [place])])
            before = tokenizer.encode(text[:place], add_special_tokens=False)
            assert ids == whole and ids[: edge.index] == before[: edge.index], (text, place)
            assert edge.exact == (whole[: len(before)] == before), (text, place)
            assert edge.exact or whole[edge.index : edge.index + 1] != before[edge.index : edge.index + 1]


JOINED = {"user": "{text}", "assistant": "", "answer": "{text}", "separator": "\n", "bos": True}


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama-new", "legacy-file", "always", "unigram"])
def test_a_token_over_the_beginning_of_an_answer(kind):
    """Before the last answer stand the ids of its prompt; an earlier answer owns the token that it shares."""
    tokenizer = TOKENIZERS[kind]()
    encoder = encoder_of(tokenizer, JOINED)
    turns = turns_of(["What is th", "is? ", "A re", "d cat."])
    chat = encoder.encode(turns)
    source = written_by(encoder)
    assert chat.input_ids[: chat.answer_starts[-1]].tolist() == asked(tokenizer, source, turns[:3])
    assert tokenizer.decode(chat.input_ids).replace("<s> ", "<s>") == "<s>What is this? \nA red cat."
    first = asked(tokenizer, source, turns[:1])
    start = chat.answer_starts[0]
    assert chat.input_ids[:start].tolist() == first[:start] and chat.labels[start] == chat.input_ids[start]
    answer = chat.labels[chat.answer_starts[1] :]
    assert (answer >= 0).all() and tokenizer.decode(answer).strip() == "d cat."


def test_spaces_before_an_answer_are_trained_with_it():
    template = get_template(CUSTOM["space"])
    assert (template.assistant, template.answer) == ("A:", " {text}{eos}")
    tokenizer = TOKENIZERS["gpt2"]()
    chat = encoder_of(tokenizer, CUSTOM["space"]).encode(turns_of(["What?", "Yes."]))
    assert tokenizer.decode(chat.labels[chat.labels >= 0]) == " Yes.</s>"


def test_what_a_family_writes_around_images():
    """In training and in prompts; its image token in a text is no image."""
    tokenizer = TOKENIZERS["qwen"]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    encoder = ChatEncoder(tokenizer, TEMPLATES["qwen"], image, placeholder="<|vision_start|><image><|vision_end|>")
    source = written_by(encoder)
    chat = encoder.encode(turns_of(["<image> or <image>?", "The left one."]))
    expected = chat.input_ids[: chat.answer_starts[0]].tolist()
    assert [expected[offset - 1 : offset + 2] for offset in chat.image_offsets] == 2 * [
        tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    ]
    parts = [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "image"}, {"type": "text", "text": "?"}]
    written = "<|vision_start|><|image_pad|><|vision_end|> or <|image_pad|>?"
    for content in ("<image> or <image>?", "<|image_pad|> or <|image_pad|>?", written, parts):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
        assert tokenizer.encode(text, add_special_tokens=False) == expected
    bad = turns_of(["<image> is <|image_pad|>?", "No."])
    with pytest.raises(ValueError, match="contains the image token 1 time"):
        encoder.encode(bad)
    assert "contains the image token 1 time" in str(encoder.count([bad])[0])


def test_an_image_token_that_is_not_always_one_token_is_refused():
    with pytest.raises(ValueError, match=r"does not always tokenize <image> as one token.*normalized=False"):
        encoder_of(byte_level(single_word=True), "vicuna_v1")


def llava_ids(tokenizer, prompt):
    """``tokenizer_image_token`` of LLaVA's own code: the texts between images by themselves, BOS once."""
    chunks = [tokenizer(chunk, add_special_tokens=False).input_ids for chunk in prompt.split("<image>")]
    ids = [tokenizer.bos_token_id, *chunks[0]]
    for chunk in chunks[1:]:
        ids += [tokenizer.convert_tokens_to_ids("<image>"), *chunk]
    return ids


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama3", "llama-new", "llama-legacy", "first", "never", "legacy-file", "always"]
)
@pytest.mark.parametrize("spec", ["vicuna_v1", "plain"])
def test_llava_tokenization_has_the_ids_of_its_code(kind, spec):
    tokenizer = TOKENIZERS[kind]()
    differs = []
    for texts in (CONVERSATIONS[0], ["What is<image>this?", "A red cat.", "And?", "No."], CONVERSATIONS[6]):
        turns = turns_of(texts)
        ids = encoder_of(tokenizer, spec, tokenization="llava").encode(turns).input_ids.tolist()
        pieces = get_template(spec).pieces(turns)
        text = "".join(piece for piece, _ in pieces).replace("{eos}", "</s>")
        assert ids == llava_ids(tokenizer, text)
        differs.append(ids != encoder_of(tokenizer, spec).encode(turns).input_ids.tolist())
    assert any(differs) == (kind in ("llama-new", "first"))


@pytest.mark.parametrize("tokenization", ["processor", "llava"])
def test_tokenization_is_part_of_the_fingerprint(tokenization):
    one, other = (encoder_of(TOKENIZERS[kind](), "mistral", tokenization=tokenization) for kind in ("first", "always"))
    plain = encoder_of(TOKENIZERS["first"](), "mistral")
    assert one.fingerprint() != other.fingerprint()
    assert (one.fingerprint() == plain.fingerprint()) == (tokenization == "processor")
