"""Templates: labels and query rows are exact by construction."""

from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from vtprune_train.data.chat import LLAMA_3_SYSTEM, TEMPLATES, VICUNA_SYSTEM, ChatEncoder, Turn, get_template
from vtprune_train.data.load.collate import lay_out
from vtprune_train.models.io.tokenizer import train_tokenizer

SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    VICUNA_SYSTEM,
    LLAMA_3_SYSTEM,
    "What is this? A red cat. And that? Two dogs, I think. USER: ASSISTANT: [INST] [/INST]",
]
TURNS = [
    Turn("user", "<image>\nWhat is this?"),
    Turn("assistant", "A red cat."),
    Turn("user", "And that?<image>"),
    Turn("assistant", "Two dogs, I think."),
]


def byte_level():
    tokenizer = train_tokenizer(CORPUS * 3, vocab_size=700)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *SPECIAL]})
    return tokenizer


def metaspace():
    """A tokenizer that writes a word boundary before every text, like Llama-2's and Vicuna's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = sorted({c for text in CORPUS for c in text} | {"\n", "\u2581"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([t.replace(" ", " \u2581") for t in CORPUS * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def encode(name, turns=TURNS, tokenizer=None, **kwargs):
    tokenizer = tokenizer or byte_level()
    encoder = ChatEncoder(tokenizer, get_template(name), tokenizer.convert_tokens_to_ids("<image>"), **kwargs)
    return tokenizer, encoder.encode(turns)


EXPECTED = {
    "plain": "<s><image>A red cat.\n<image>Two dogs, I think.\n",
    "vicuna_v1": f"<s>{VICUNA_SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A red cat.</s>"
    "USER: And that?<image> ASSISTANT: Two dogs, I think.</s>",
    "llama_3": f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3_SYSTEM}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA red cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd that?<image><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nTwo dogs, I think.<|eot_id|>",
    "mistral": "<s>[INST] <image>\nWhat is this? [/INST] A red cat.</s>"
    "[INST] And that?<image> [/INST] Two dogs, I think.</s>",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
    "<|im_start|>assistant\nA red cat.<|im_end|>\n<|im_start|>user\nAnd that?<image><|im_end|>\n"
    "<|im_start|>assistant\nTwo dogs, I think.<|im_end|>",
}
ENDS = {"plain": "\n", "vicuna_v1": "</s>", "llama_3": "<|eot_id|>", "mistral": "</s>", "qwen": "<|im_end|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_labels_and_query_rows(name):
    tokenizer, chat = encode(name)
    assert tokenizer.decode(chat.input_ids) == EXPECTED[name]
    answers = [a + ENDS[name] for a in ("A red cat.", "Two dogs, I think.")]
    edges = [*chat.answer_starts, len(chat.input_ids)]
    for start, end, answer in zip(edges[:-1], edges[1:], answers, strict=True):
        own = chat.labels[start:end]
        assert tokenizer.decode(own[own >= 0]).strip(" ") == answer.strip(" ")
        assert chat.labels[start - 1] == -100, "the query row itself is not supervised"
    assert (chat.labels >= 0).sum() == sum((chat.labels[s:e] >= 0).sum() for s, e in pairwise(edges))
    assert (chat.labels[chat.labels >= 0] == chat.input_ids[chat.labels >= 0]).all()
    assert chat.input_ids[list(chat.image_offsets)].tolist() == [tokenizer.convert_tokens_to_ids("<image>")] * 2


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral"])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_tokens_are_those_of_the_whole_text(name, make):
    """Piecewise tokens equal the tokens of text up to the answer plus the whole text's answer, for both kinds."""
    tokenizer = make()
    turns = [Turn("user", "What is this?"), Turn("assistant", "A red cat.")]
    _, chat = encode(name, turns, tokenizer)
    text = EXPECTED[name].split("</s>")[0].replace("<image>\n", "").removeprefix("<s>") + "</s>"
    whole = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    assert chat.input_ids.tolist() == whole


def test_system_prompt_of_the_conversation_replaces_the_default():
    tokenizer, chat = encode("vicuna_v1", [Turn("system", "Be brief."), *TURNS[:2]])
    assert tokenizer.decode(chat.input_ids).startswith("<s>Be brief. USER: ")


def test_image_first():
    turns = [Turn("user", "What is this?\n<image>"), Turn("assistant", "A cat.")]
    tokenizer, chat = encode("vicuna_v1", turns, image_position="first")
    assert "USER: <image>\nWhat is this? ASSISTANT:" in tokenizer.decode(chat.input_ids)
    several = [Turn("user", "<image> or <image>?"), Turn("assistant", "A cat.")]
    tokenizer, chat = encode("vicuna_v1", several, image_position="first")
    assert "USER: <image> or <image>? ASSISTANT:" in tokenizer.decode(chat.input_ids)


def test_custom_template():
    spec = {"user": "Q: {text}", "assistant": " A:", "answer": " {text}{eos}", "separator": "\n"}
    tokenizer, chat = encode(spec)
    assert tokenizer.decode(chat.input_ids) == (
        "<s>Q: <image>\nWhat is this? A: A red cat.</s>\nQ: And that?<image> A: Two dogs, I think.</s>"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vicuna", r"data.template='vicuna' is unknown; known: plain, vicuna_v1"),
        ({"user": "{text}", "assistant": ""}, r"data.template.answer is missing"),
        ({"user": "hm", "assistant": "", "answer": "{text}"}, r"data.template.user='hm' must contain \{text\}"),
        ({"user": "{text}", "assistant": "", "answer": "{text}", "sys": ""}, r"data.template.sys is unknown"),
        ({"user": "{text}", "assistant": "", "answer": 5}, r"data.template.answer=5 must be text"),
        (
            {"user": "{text}", "assistant": "", "answer": "{text}", "bos": "no"},
            r"data.template.bos='no' must be true or",
        ),
        ({"user": "{text}", "assistant": "", "answer": "{text}", "system": "S"}, r"data.template.system='S' must"),
        (
            {"user": "{text}", "assistant": "{text}:", "answer": "{text}"},
            r"data.template.assistant='\{text\}:' contains",
        ),
        ({"user": "<image>{text}", "assistant": "", "answer": "{text}"}, r"user=.* contains <image>; images"),
    ],
)
def test_wrong_templates(spec, message):
    with pytest.raises(ValueError, match=message):
        get_template(spec)


def test_the_end_of_sequence_is_written_wherever_a_template_names_it():
    spec = {"user": "Q: {text}{eos}", "assistant": " A:", "answer": " {text}", "separator": "{eos}\n"}
    tokenizer, chat = encode(spec, [*TURNS[:3], Turn("assistant", "{eos}")])
    assert tokenizer.decode(chat.input_ids) == (
        "<s>Q: <image>\nWhat is this?</s> A: A red cat.</s>\nQ: And that?<image></s> A: {eos}"
    )
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"template custom writes \{eos\}, but the tokenizer has no eos_token"):
        encode(spec, tokenizer=tokenizer)


def test_nothing_supervised_is_an_error():
    with pytest.raises(ValueError, match="no token is supervised"):
        encode("vicuna_v1", TURNS[:1])


def test_layout_expands_images():
    tokenizer, chat = encode("vicuna_v1")
    segment, ids = lay_out(chat, [7, 12])
    assert segment.length == len(chat.input_ids) - 2 + 7 + 12 == len(ids)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for span in segment.spans:
        assert (ids[span.start : span.end] == image).all()
    assert sum(span.length for span in segment.spans) == (ids == image).sum() == 19
    assert ids[list(segment.supervised_offsets)].tolist() == chat.labels[chat.labels >= 0].tolist()
    first_answers = [chat.input_ids[start] for start in chat.answer_starts]
    assert [ids[query + 1] for query in segment.query_offsets] == first_answers


def test_plain_is_ranked_by_the_last_visual_token():
    _, chat = encode("plain", TURNS[:2])
    segment, _ = lay_out(chat, [9])
    assert segment.query_offsets == (segment.spans[0].end - 1,)


def test_each_placeholder_gets_its_own_text():
    """Videos are written in the order of the placeholders, one token for each run; ids equal those of the written
    text."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    encoder = ChatEncoder(tokenizer, get_template("qwen"), image, image_position="first", video_token_id=video)
    turns = [Turn("user", "<video> then <image>?"), Turn("assistant", "it rains")]
    visuals = ["<1.0 s><video><2.0 s><video>", "(<image>)"]
    chat = encoder.encode(turns, visuals)
    written = [Turn("user", "<1.0 s><video><2.0 s><video> then (<image>)?"), turns[1]]
    text = "".join(piece for piece, _ in encoder.template.pieces(written))
    assert chat.input_ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert [int(chat.input_ids[offset]) for offset in chat.image_offsets] == [video, video, image]
    counted = encoder.count([turns, turns, turns], visuals=[visuals, visuals[:1], [*visuals, "<image>"]])
    assert counted[0] == (len(chat.input_ids) - 3, int((chat.labels >= 0).sum()))
    assert "3 image(s) and videos, but 2 placeholders" in str(counted[2])
