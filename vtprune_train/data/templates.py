"""The chat template that exports contain, and checks that a run's template fits its checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from vtprune_train.core.stream import IMAGE
from vtprune_train.data.auto_template import AUTO, AutoTemplate
from vtprune_train.data.chat import TEMPLATES, ChatEncoder, EncodedChat, Template
from vtprune_train.data.jinja import chat_template, written_by
from vtprune_train.data.template_fields import RENDER_ERRORS
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Loop, required
from vtprune_train.models.io.processors import processor_chat_template, read_settings

log = logging.getLogger(__name__)

MARK = re.compile(r"<\|?[^\s<>|{}]+\|?>")  # markers that are single tokens in the tokenizer that a template is for
QUESTION = "What is shown here?"
LONGEST_PROMPT = 300  # maximum characters of a prompt in a message
LONGEST_SAMPLE = 4000


def build_encoder(
    template: Template | AutoTemplate,
    tokenizer: PreTrainedTokenizerBase,
    loop: Loop,
    image_position: Literal["as_written", "first"],
    tokenization: Literal["processor", "llava"],
    videos: bool = False,
) -> ChatEncoder:
    """The encoder of conversations for these settings and this family; with ``videos``, they may have videos.

    Raises:
        ValueError: see :class:`~vtprune_train.data.chat.ChatEncoder`; or the tokenizer has no video token.
    """
    image_token_id = tokenizer.convert_tokens_to_ids(loop.image_token)
    video = None
    if videos:
        required(loop.videos, "the data has videos")
        if loop.video_token and loop.video_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no video token {loop.video_token}; use the model's original tokenizer")
        video = tokenizer.convert_tokens_to_ids(loop.video_token) if loop.video_token else None
    return ChatEncoder(tokenizer, template, image_token_id, image_position, loop.placeholder, tokenization, video)


def open_auto_template(
    tokenizer: PreTrainedTokenizerBase, loop: Loop, checkpoint: str, *, offline: bool = False, videos: bool = False
) -> AutoTemplate:
    """The chat template of a checkpoint of this family: that of its processor, or else of its tokenizer.

    Args:
        tokenizer: the checkpoint's tokenizer.
        loop: describes the family's tokens.
        checkpoint: the folder or hub id that it was opened from.
        offline: do not access the hub (dry runs).
        videos: the data has videos.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    source = processor_chat_template(checkpoint, offline=offline) or saved_chat_template(
        tokenizer, checkpoint, offline=offline
    )
    if source is None:
        raise ValueError(
            f"data.template={AUTO}: {checkpoint} has no chat template; save the checkpoint's chat_template.jinja "
            f"in this folder, or use a named template: {', '.join(TEMPLATES)}"
        )
    return AutoTemplate(source, tokenizer, checkpoint, loop.image_token, loop.video_token if videos else "")


def carry(processor: Any, source: str) -> None:
    """Set the chat template ``source`` on a processor and its tokenizer, which save it."""
    processor.chat_template = processor.tokenizer.chat_template = source


def stop_where_answers_end(
    model: HFModule, tokenizer: Any, template: Template | AutoTemplate, *, warn: bool = True
) -> None:
    """Make generation stop at the token that ends answers in ``template``, which may differ from the tokenizer's
    end-of-sequence token. ``warn`` if the end of an answer is not a single token."""
    if isinstance(template, AutoTemplate):
        ending = template.ending
    else:
        ending = template.answer.partition("{text}")[2].replace("{eos}", tokenizer.eos_token or "")
    answer = tokenizer.encode("a" + ending, add_special_tokens=False)
    tokens = answer[len(tokenizer.encode("a", add_special_tokens=False)) :]
    if len(tokens) != 1:
        if warn:
            log.warning("the template %s ends answers with %r, which is not a single token", template.name, ending)
        return
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    if tokens[0] not in known:
        model.generation_config.eos_token_id = [*known, tokens[0]]


def saved_chat_template(tokenizer: PreTrainedTokenizerBase, place: str | None, *, offline: bool = False) -> str | None:
    """The chat template saved with a checkpoint, or ``None``.

    Args:
        tokenizer: the checkpoint's tokenizer.
        place: the folder or hub id that it was opened from.
        offline: do not access the hub (dry runs).

    Raises:
        ValueError: a file is damaged.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if source is None:
        source = (read_settings(place, "chat_template.json", offline=offline) or {}).get("chat_template")
    return source


def misfits(encoder: ChatEncoder, saved: str | None, place: str) -> Iterator[str]:
    """Warnings about differences between a run's template and the checkpoint that it trains.

    Args:
        encoder: the run's encoder.
        saved: see :func:`saved_chat_template`.
        place: the setting that names the checkpoint, with its value.
    """
    template, tokenizer = encoder.template, encoder.tokenizer
    if isinstance(template, AutoTemplate):
        if not template.supervises_ending:
            yield (
                f"{template} {'marks answers without ' + repr(template.ending) if template.ending else 'ends answers'}"
                f"{'' if template.ending else ' with no token'}, so training does not teach the model to stop there"
            )
        if template.opens_reasoning:
            yield (
                f"{template} writes <think> in prompts, so it fits records with one question and reasoning in the "
                "answer. For other records write a custom template, as in configs/qwen3_5_pdrop.yaml"
            )
        return
    name = template.name
    parts = (template.system, template.user, template.assistant, template.answer, template.separator)
    broken = []
    for mark in dict.fromkeys(mark for part in parts for mark in MARK.findall(part)):
        ids = tokenizer.encode(f"a{mark}a", add_special_tokens=False)
        if tokenizer.convert_ids_to_tokens(ids).count(mark) != 1:
            broken.append(mark)
    if broken:
        yield (
            f"data.template={name} writes {', '.join(broken)}, which the tokenizer of {place} does not have as "
            "single tokens, so the model was not trained on them. Use the template that fits this checkpoint"
        )
    if saved is None:
        return
    expected = _prompts(tokenizer, saved, _contents(encoder.image_token))
    prompts = _prompts(tokenizer, written_by(encoder))
    if not expected or any(_same(tokenizer, one, two) for one in expected for two in prompts):
        return
    others = [other for other in TEMPLATES.values() if other.name != name and _writes(encoder, other, expected)]
    hint = f"; data.template={others[0].name} is" if others else ""
    yield (
        f"data.template={name} is not the chat template of {place}{hint}. It writes {_shortened(prompts[0])}, the "
        f"checkpoint's writes {_shortened(expected[0])}. Exports of this run contain the run's template"
    )


def _contents(image_token: str) -> list[Any]:
    """A question about an image, in each form of content that chat templates accept."""
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return [parts, f"{image_token}\n{QUESTION}", f"{image_token}{QUESTION}"]


def _prompts(tokenizer: PreTrainedTokenizerBase, source: str, contents: Sequence[Any] = ()) -> list[str]:
    """The prompts that a chat template renders from the ``contents`` that it accepts (default: text from
    :func:`_contents`)."""
    rendered = (_rendered(tokenizer, source, content) for content in contents or _contents(IMAGE)[1:])
    return [text for text in rendered if text]


def _writes(encoder: ChatEncoder, template: Template, texts: Sequence[str]) -> bool:
    """Whether ``template`` renders one of ``texts``."""
    if "{eos}" in template.answer and encoder.tokenizer.eos_token is None:
        return False
    image_first = encoder.image_position == "first"
    source = chat_template(
        template, image_first=image_first, placeholder=encoder.placeholder, token=encoder.image_token
    )
    prompts = _prompts(encoder.tokenizer, source)
    return any(_same(encoder.tokenizer, one, two) for one in texts for two in prompts)


def _rendered(tokenizer: PreTrainedTokenizerBase, source: str, content: Any) -> str | None:
    """A prompt of three turns by a chat template; ``None`` if it does not accept this form of content."""
    is_text = isinstance(content, str)

    def content_of(text: str) -> Any:
        return text if is_text else [{"type": "text", "text": text}]

    contents = [("user", content), ("assistant", content_of("A cat.")), ("user", content_of("And there?"))]
    messages = [{"role": role, "content": turn} for role, turn in contents]
    try:
        return tokenizer.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    except RENDER_ERRORS as error:
        log.debug("the chat template does not take %s: %s", type(content).__name__, error)
        return None


def _same(tokenizer: PreTrainedTokenizerBase, one: str, two: str) -> bool:
    """Whether two prompts are tokenized to the same ids."""
    bos = tokenizer.bos_token
    ids = [tokenizer.encode(t, add_special_tokens=not (bos and t.startswith(bos))) for t in (one, two)]
    return ids[0] == ids[1]


def _shortened(text: str) -> str:
    return repr(text if len(text) <= LONGEST_PROMPT else f"{text[:LONGEST_PROMPT]}...")


def describe_sample(encoder: ChatEncoder, chat: EncodedChat, image_tokens: Sequence[int]) -> str:
    """The text of a sample for a log: supervised parts between ``[[`` and ``]]``, an image (or run of a video) as its
    token and the number of its visual tokens."""
    ids, tokenizer = chat.input_ids.tolist(), encoder.tokenizer
    is_answer = chat.labels >= 0
    sizes = dict(zip(chat.image_offsets, image_tokens, strict=True))
    text, done = "", 0
    edges = [0, *(i for i in range(1, len(ids)) if i in sizes or i - 1 in sizes or is_answer[i] != is_answer[i - 1])]
    for start, end in zip(edges, [*edges[1:], len(ids)], strict=True):
        written = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        part, done = written[done:], len(written)
        if start in sizes:
            part = f"{tokenizer.convert_ids_to_tokens(ids[start])} x {sizes[start]}"
        text += f"[[{part}]]" if is_answer[start] else part
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]}... ({len(text)} characters)"
