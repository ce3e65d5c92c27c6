"""Converts conversations to tokens by a template: token ids, labels and query rows.

A template converts a conversation to ``(text, supervised)`` pieces. Their joined text is tokenized as a whole, so the
ids before an answer are those of the prompt in inference. The supervised tokens, and the row that predicts the first
token of each answer (the query row), are located by tokenizing the text before the answer.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from vtprune_train.core.stream import IGNORE, IMAGE, VIDEO
from vtprune_train.data.auto_template import AUTO, AutoTemplate
from vtprune_train.data.sources.base import BOUNDS, TooLarge, utf8_length
from vtprune_train.data.tokens import Edge, SectionTokenizer, part_of
from vtprune_train.data.turns import IMAGE_MARK, VISUAL, Turn

__all__ = ["TEMPLATES", "UNSUPERVISED", "ChatEncoder", "EncodedChat", "Template", "Turn", "get_template"]

UNSUPERVISED = "no token is supervised: the conversation has no answer to train on"
FLAGS, AROUND_TEXT, BETWEEN = ("bos", "images_only"), ("user", "system", "answer"), ("assistant", "separator")
TOKENIZED = "whole text"  # part of the fingerprint of cached lengths
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Template:
    """The text format of conversations.

    Args:
        user: format of a user message; ``{text}`` is the message.
        assistant: text before an answer, not supervised. Its last token is the query row. Trailing spaces are moved to
            the front of ``answer``, because most tokenizers join them with the answer's first word.
        answer: format of an answer, supervised. In all of these texts ``{eos}`` is the tokenizer's end-of-sequence
            token.
        name: name in messages.
        system: format of the system prompt; omitted without a system prompt.
        separator: text between an answer and the next user message, not supervised.
        default_system: system prompt of conversations without one.
        bos: start with the tokenizer's beginning-of-sequence token, if it has one.
        images_only: drop the text of user messages and keep only their images and videos (projector alignment).
    """

    user: str
    assistant: str
    answer: str
    name: str = "custom"
    system: str = "{text}"
    separator: str = ""
    default_system: str = ""
    bos: bool = True
    images_only: bool = False

    def __post_init__(self) -> None:
        kept = self.assistant.rstrip(" ")
        object.__setattr__(self, "answer", self.assistant[len(kept) :] + self.answer)
        object.__setattr__(self, "assistant", kept)

    def pieces(self, turns: Sequence[Turn], mark: re.Pattern[str] = IMAGE_MARK) -> Iterator[tuple[str, bool]]:
        """``(text, supervised)``, alternating between the text before an answer and the answer. ``mark`` matches
        placeholders, for ``images_only``."""
        turns = list(turns)
        prompt = turns.pop(0).text if turns and turns[0].role == "system" else self.default_system
        context = self.system.replace("{text}", prompt) if prompt else ""
        for turn in turns:
            if turn.role == "user":
                text = "".join(mark.findall(turn.text)) if self.images_only else turn.text
                context += self.user.replace("{text}", text) + self.assistant
            else:
                yield context, False
                yield self.answer.replace("{text}", turn.text), True
                context = self.separator


TEMPLATES = {
    template.name: template
    for template in (
        Template("{text}", "", "{text}\n", name="plain", images_only=True),
        Template(
            "USER: {text}",
            " ASSISTANT:",
            " {text}{eos}",
            name="vicuna_v1",
            system="{text} ",
            default_system=VICUNA_SYSTEM,
        ),
        Template(
            "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{text}<|eot_id|>",
            name="llama_3",
            system="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
            default_system=LLAMA_3_SYSTEM,
        ),
        Template("[INST] {text}", " [/INST]", " {text}{eos}", name="mistral", system="{text} "),
        Template(
            "<|im_start|>user\n{text}<|im_end|>\n",
            "<|im_start|>assistant\n",
            "{text}<|im_end|>",
            name="qwen",
            system="<|im_start|>system\n{text}<|im_end|>\n",
            separator="\n",
            default_system="You are a helpful assistant.",
            bos=False,
        ),
    )
}


def get_template(spec: str | Mapping[str, Any]) -> Template:
    """A template by its name, or a custom one from the fields of :class:`Template`.

    Raises:
        ValueError: a name or field is unknown, or a field is invalid.
    """
    if isinstance(spec, str):
        if spec not in TEMPLATES:
            known = ", ".join((*TEMPLATES, AUTO))
            raise ValueError(f"data.template={spec!r} is unknown; known: {known}; or write a custom template's fields")
        return TEMPLATES[spec]
    fields = {field.name: field for field in dataclasses.fields(Template)}
    if unknown := sorted(set(spec) - set(fields)):
        raise ValueError(f"data.template.{unknown[0]} is unknown; a template has: {', '.join(fields)}")
    if missing := sorted({"user", "assistant", "answer"} - set(spec)):
        raise ValueError(f"data.template.{missing[0]} is missing; a custom template needs user, assistant and answer")
    for key, value in spec.items():
        is_flag = key in FLAGS
        fits = isinstance(value, bool) if is_flag else isinstance(value, str)
        if not fits:
            raise ValueError(f"data.template.{key}={value!r} must be {'true or false' if is_flag else 'text'}")
        if not is_flag and IMAGE in value:
            raise ValueError(f"data.template.{key}={value!r} contains {IMAGE}; images belong in records")
        if key in AROUND_TEXT and "{text}" not in value:
            raise ValueError(f"data.template.{key}={value!r} must contain {{text}}, the place of the message")
        if key in BETWEEN and "{text}" in value:
            raise ValueError(f"data.template.{key}={value!r} contains {{text}}, but this text has no message")
    return Template(**spec)


@dataclass(frozen=True)
class EncodedChat:
    """A tokenized conversation with one token for each contiguous run of visual tokens (an image is one run).

    Args:
        input_ids: [L] int64.
        labels: [L] int64, -100 for tokens that are not supervised.
        image_offsets: offset of each run's token.
        answer_starts: offset of the first token of each answer; the row before it is a query row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_offsets: tuple[int, ...]
    answer_starts: tuple[int, ...]


def writes_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether LLaVA's original code gives the ids of a text with additional spaces.

    That code tokenizes the texts between images separately. SentencePiece tokenizers with ``legacy: false`` then insert
    a word boundary at the start of each text, which requires a space in the whole text. Other tokenizers insert one
    after every added token (``legacy: true``) or never (byte-level), so their ids are the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = part_of(backend and backend.pre_tokenizer)
    return kind.startswith('{"type":"Metaspace"') and '"prepend_scheme":"first"' in kind


class ChatEncoder:
    """Tokenizes conversations with a template.

    Args:
        tokenizer: has the image token as an added token.
        template: see :class:`Template`, or the checkpoint's chat template.
        image_token_id: id of the image token.
        image_position: ``as_written``, or ``first`` to move the image or video of a message with only one to its
            front, as LLaVA's original code does.
        placeholder: the text that the family writes for an image; ``<image>`` in it is the image token.
        tokenization: ``processor``, or ``llava`` for the ids of LLaVA's original code (see :func:`writes_spaces`).
        video_token_id: id of the token of videos; ``None`` for a family without one.

    Raises:
        ValueError: the tokenizer lacks a token that the template needs, splits the image token, or appends a token to
            every text, which would separate prompt and answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | AutoTemplate,
        image_token_id: int,
        image_position: Literal["as_written", "first"] = "as_written",
        placeholder: str = IMAGE,
        tokenization: Literal["processor", "llava"] = "processor",
        video_token_id: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(image_token_id)
        self.video_token: str = "" if video_token_id is None else tokenizer.convert_ids_to_tokens(video_token_id)
        self.visual_ids = (image_token_id,) if video_token_id is None else (image_token_id, video_token_id)
        self.image_position = image_position
        self.placeholder = placeholder.replace(IMAGE, self.image_token)
        self.bos = (template.bos and tokenizer.bos_token) or ""
        self.template = template if isinstance(template, AutoTemplate) else _with_eos(template, tokenizer)
        self.spaces = tokenization == "llava" and writes_spaces(tokenizer)
        self._tokens = SectionTokenizer(tokenizer)
        self._special = tuple(tokenizer.all_special_tokens)
        self._added = self._check_tokenizer()

    def _check_tokenizer(self) -> list[int]:
        """Check how the tokenizer handles the tokens of images and videos. Returns the ids that it adds before a text
        without a beginning-of-sequence token."""
        for visual_id in self.visual_ids:
            token = self.tokenizer.convert_ids_to_tokens(visual_id)
            two = self.tokenizer.encode(f"a{token}{token}\na", add_special_tokens=False)
            if two.count(visual_id) != 2:
                raise ValueError(
                    f"the tokenizer does not always tokenize {token} as one token (it gives "
                    f"{self.tokenizer.convert_ids_to_tokens(two)}); add it with special=True and normalized=False"
                )
        added = self.tokenizer.encode(self.image_token)
        place = added.index(self.image_token_id)
        if added[place + 1 :] and not self.bos:
            after = self.tokenizer.convert_ids_to_tokens(added[place + 1 :])
            raise ValueError(
                f"the tokenizer appends {after} to every text, including prompts; set add_eos_token to false in its "
                "tokenizer_config.json, or use a template that writes a beginning-of-sequence token"
            )
        return added[:place]

    def encode(self, turns: Sequence[Turn], visuals: Sequence[str] | None = None) -> EncodedChat:
        """Tokenize one conversation.

        Args:
            turns: the conversation.
            visuals: the text that the family writes for each ``<image>`` and ``<video>`` in order, with ``<image>`` or
                ``<video>`` (or the family's token) for each contiguous run of visual tokens. By default, the
                ``placeholder`` for each ``<image>``; ``<video>`` is then text.

        Raises:
            ValueError: no token is supervised, the text contains the token of images or videos, or ``visuals`` has
                another number of texts than ``turns`` has placeholders.
        """
        [chat] = self._tokenized([self._render(turns, visuals)])
        chat.check(self.visual_ids)
        input_ids = np.array(chat.ids, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for start, end in chat.answers:
            labels[start:end] = input_ids[start:end]
        runs = np.flatnonzero(np.isin(input_ids, self.visual_ids))
        return EncodedChat(input_ids, labels, tuple(runs.tolist()), tuple(start for start, _ in chat.answers))

    def count(
        self,
        conversations: Sequence[Sequence[Turn]],
        max_bytes: int = BOUNDS.text,
        visuals: Sequence[Sequence[str] | None] | None = None,
    ) -> list[tuple[int, int] | ValueError]:
        """Number of text tokens and of supervised tokens of each conversation, as in :meth:`encode`, or the error of a
        conversation that :meth:`encode` rejects. A conversation whose formatted text exceeds ``max_bytes`` is an error
        and is not tokenized. All others are tokenized in one call, which is several times faster. ``visuals`` has an
        entry for each conversation."""
        texts = [None] * len(conversations) if visuals is None else visuals
        rendered = [self._bounded(turns, of, max_bytes) for turns, of in zip(conversations, texts, strict=True)]
        tokenized = iter(self._tokenized([chat for chat in rendered if isinstance(chat, _Rendered)]))
        return [chat if isinstance(chat, ValueError) else self._counted(next(tokenized)) for chat in rendered]

    def _bounded(self, turns: Sequence[Turn], visuals: Sequence[str] | None, max_bytes: int) -> _Rendered | ValueError:
        """Format a conversation, or the reason why it cannot be used."""
        try:
            chat = self._render(turns, visuals)
        except ValueError as error:
            return error
        if (size := utf8_length(chat.text)) > max_bytes:
            reason = f"its formatted text has {size} bytes, more than data.max_text_bytes={max_bytes}"
            return ValueError(TooLarge(reason))
        return chat

    def _counted(self, chat: _Tokenized) -> tuple[int, int] | ValueError:
        try:
            chat.check(self.visual_ids)
        except ValueError as error:
            return error
        return len(chat.ids) - chat.num_runs, chat.num_supervised

    def _render(self, turns: Sequence[Turn], visuals: Sequence[str] | None = None) -> _Rendered:
        """Format a conversation."""
        mark, texts = self._visuals(turns, visuals)
        if isinstance(self.template, AutoTemplate):
            marks = sum(len(mark.findall(turn.text)) for turn in turns if turn.role != "assistant")
            text, places, written = self.template.format(turns, mark, list(islice(texts, marks)))
            return _Rendered(text, places, self._num_runs(written))
        if self.image_position == "first":
            turns = [_image_first(turn, mark) for turn in turns]
        text, places, written = self.bos, [], []

        def write(match: re.Match[str]) -> str:
            written.append(next(texts, match.group()))
            return written[-1]

        for piece, is_answer in self.template.pieces(turns, mark):
            piece = mark.sub(write, piece)
            if is_answer:
                places += [len(text), len(text) + len(piece)]
            text += piece
        chat = _Rendered(text, places, self._num_runs(written))
        return self._with_spaces(chat, written) if self.spaces else chat

    def _num_runs(self, visuals: Sequence[str]) -> int:
        tokens = [token for token in (self.image_token, self.video_token) if token]
        return sum(visual.count(token) for visual in visuals for token in tokens)

    def _visuals(self, turns: Sequence[Turn], visuals: Sequence[str] | None) -> tuple[re.Pattern[str], Iterator[str]]:
        """The pattern of the placeholders and the texts that replace them, in order. ``<video>`` is text in a
        conversation without videos."""
        if visuals is None:
            return IMAGE_MARK, repeat(self.placeholder)
        tokens = {IMAGE: self.image_token, VIDEO: self.video_token or VIDEO}
        counts = [sum(len(mark.findall(turn.text)) for turn in turns) for mark in (VISUAL, IMAGE_MARK)]
        if len(visuals) not in counts:
            raise ValueError(f"{len(visuals)} image(s) and videos, but {counts[0]} placeholders in the text")
        mark = VISUAL if len(visuals) == counts[0] else IMAGE_MARK
        return mark, iter([VISUAL.sub(lambda match: tokens[match.group()], visual) for visual in visuals])

    def _with_spaces(self, chat: _Rendered, visuals: Sequence[str]) -> _Rendered:
        """Insert a space before each text between images, including one that starts an answer."""
        text, at, starts = self.bos, len(self.bos), []
        longest_first = sorted(set(visuals), key=len, reverse=True)
        split = re.split(f"({'|'.join(map(re.escape, longest_first))})" if visuals else "(?!)", chat.text[at:])
        for number, part in enumerate(split):
            is_visual = number % 2 == 1
            if part and not is_visual and not part.startswith(self._special):
                starts.append(at)
                text += " "
            text += part
            at += len(part)
        places = [place + bisect_left(starts, place) for place in chat.places]
        return _Rendered(text, places, chat.num_runs)

    def _tokenized(self, rendered: Sequence[_Rendered]) -> list[_Tokenized]:
        located = self._tokens.locate([(chat.text, chat.places) for chat in rendered])
        return [self._placed(chat, ids, edges) for chat, (ids, edges) in zip(rendered, located, strict=True)]

    def _placed(self, chat: _Rendered, ids: list[int], edges: list[Edge]) -> _Tokenized:
        """Locate the tokens of each answer, from the first that differs from those of its prompt, tokenized alone."""
        text, places = chat.text, chat.places
        if edges and not edges[-2].exact and isinstance(self.template, Template):
            # In inference the last prompt is tokenized alone; earlier prompts are part of it.
            start = places[-2]
            [(prompt, before)] = self._tokens.locate([(text[:start], places[:-2])])
            ids = prompt + self._continued(text[start:])
            edges = [*before, Edge(len(prompt), True), Edge(len(ids), True)]
        added = [] if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token) else self._added
        answers, done = [], 0
        for number, (first, last) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
            begin = max(done, first.index)
            is_empty = places[2 * number] == places[2 * number + 1]
            done = begin if is_empty else max(begin, last.index + (not last.exact))
            answers.append((len(added) + begin, len(added) + done))
        return _Tokenized(added + ids, answers, chat.num_runs)

    def _continued(self, answer: str) -> list[int]:
        """Tokens of an answer that follows other text, without the word boundary that some tokenizers insert at the
        start of a text."""
        line = self._tokens("\n")
        [(ids, [edge])] = self._tokens.locate([("\n" + answer, [1])])
        return ids[len(line) :] if edge.exact else self._tokens(self.image_token + answer)[1:]

    def fingerprint(self) -> str:
        """Settings that affect the tokens, to identify cached lengths."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = str(sorted(self.tokenizer.get_vocab().items())) if backend is None else backend.to_str()
        images = f"{'|'.join(map(str, self.visual_ids))}|{self.placeholder}|{self.image_position}"
        return f"{TOKENIZED}|{self.template!r}|{images}|{self.spaces}|{self.bos}|{self._added}|{content}"


@dataclass(frozen=True)
class _Rendered:
    """A formatted conversation: its text, the character offsets ``[start, end, start, end, ...]`` of its answers, and
    its number of runs of visual tokens."""

    text: str
    places: list[int]
    num_runs: int


@dataclass(frozen=True)
class _Tokenized:
    """A conversation's ids, the tokens ``[start, end)`` of each answer, and its number of runs of visual tokens."""

    ids: list[int]
    answers: list[tuple[int, int]]
    num_runs: int

    @property
    def num_supervised(self) -> int:
        return sum(end - start for start, end in self.answers)

    def check(self, visual_ids: Sequence[int]) -> None:
        """Raise a ``ValueError`` if the conversation cannot be trained on."""
        if not self.num_supervised:
            raise ValueError(UNSUPERVISED)
        if next(start for start, end in self.answers if end > start) == 0:
            raise ValueError("its first token belongs to an answer, so no token precedes it to predict it")
        if (count := sum(map(self.ids.count, visual_ids))) != self.num_runs:
            tokens = "image token" if len(visual_ids) == 1 else "token of images or videos"
            raise ValueError(f"its text contains the {tokens} {count - self.num_runs} time(s) without an image")


def _with_eos(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with the tokenizer's end-of-sequence token for ``{eos}``."""
    texts = {name: getattr(template, name) for name in (*AROUND_TEXT, *BETWEEN)}
    if tokenizer.eos_token is None and any("{eos}" in text for text in texts.values()):
        raise ValueError(f"template {template.name} writes {{eos}}, but the tokenizer has no eos_token")
    eos = tokenizer.eos_token or ""
    return dataclasses.replace(template, **{name: text.replace("{eos}", eos) for name, text in texts.items()})


def _image_first(turn: Turn, mark: re.Pattern[str] = IMAGE_MARK) -> Turn:
    marks = mark.findall(turn.text)
    if turn.role != "user" or len(marks) != 1:
        return turn
    return Turn(turn.role, f"{marks[0]}\n{turn.text.replace(marks[0], '').strip()}")
