"""Conversations to tokens: templates as pieces, labels and query rows exact by construction.

A template turns a conversation into ``(text, supervised)`` pieces. Each piece is tokenized by itself, so which tokens
are supervised, and which token predicts the first one of every answer (the query row), is never guessed from labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from vtprune_train.stream import IGNORE, IMAGE

KNOWN_TEXTS = 4096  # texts whose tokens are remembered
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` is system, user or assistant; ``text`` holds ``<image>`` where an image stands."""

    role: str
    text: str


@dataclass(frozen=True)
class Template:
    """How a conversation is written out.

    Args:
        user: text around a user message, ``{text}`` in its place.
        assistant: what stands before an answer, not supervised. Its last token is the query row.
        answer: text around an answer, all of it supervised; ``{eos}`` is the tokenizer's end-of-sequence token.
        name: shown in errors.
        system: text around the system prompt; left out where there is no prompt.
        separator: between an answer and the next user message; not supervised.
        default_system: the prompt of conversations that bring none.
        bos: begin with the tokenizer's beginning-of-sequence token, if it has one.
        images_only: keep only the images of user messages (projector alignment).
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

    def pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
        """``(text, supervised)``, alternating: what leads to an answer, the answer."""
        turns = list(turns)
        prompt = turns.pop(0).text if turns and turns[0].role == "system" else self.default_system
        context = self.system.replace("{text}", prompt) if prompt else ""
        for turn in turns:
            if turn.role == "user":
                text = IMAGE * turn.text.count(IMAGE) if self.images_only else turn.text
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
    """A template by name, or a custom one from the fields of :class:`Template`.

    Raises:
        ValueError: unknown name or field, naming what is known.
    """
    if isinstance(spec, str):
        if spec not in TEMPLATES:
            raise ValueError(f"data.template={spec!r} is unknown; known: {', '.join(TEMPLATES)}, or give its fields")
        return TEMPLATES[spec]
    fields = {field.name: field for field in dataclasses.fields(Template)}
    if unknown := sorted(set(spec) - set(fields)):
        raise ValueError(f"data.template.{unknown[0]} is unknown; a template has: {', '.join(fields)}")
    if missing := sorted({"user", "assistant", "answer"} - set(spec)):
        raise ValueError(f"data.template.{missing[0]} is missing; a custom template needs user, assistant and answer")
    for key in ("user", "answer"):
        if "{text}" not in spec[key]:
            raise ValueError(f"data.template.{key}={spec[key]!r} must hold {{text}}, where the message stands")
    return Template(**spec)


@dataclass(frozen=True)
class EncodedChat:
    """A conversation in tokens, one token per image.

    ``input_ids`` and ``labels`` [L] int64 (-100 where not supervised); ``image_offsets``, where the images' single
    tokens stand; ``answer_starts``, the first token of every answer: the row before each is a query row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_offsets: tuple[int, ...]
    answer_starts: tuple[int, ...]


class ChatEncoder:
    """Tokenizes conversations by a template.

    Args:
        tokenizer: has the image token as one special token.
        template: see :class:`Template`.
        image_token_id: the id written at each image.
        image_position: ``as_written``, or ``first``: a message's image goes to its front, as LLaVA's own data code
            does for messages with one image.
        placeholder: what the family writes around the image token, ``<image>`` in its place.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        image_token_id: int,
        image_position: Literal["as_written", "first"] = "as_written",
        placeholder: str = IMAGE,
    ):
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image_position = image_position
        self.placeholder = placeholder
        if "{eos}" in template.answer and tokenizer.eos_token is None:
            raise ValueError(f"template {template.name} ends answers with {{eos}}, but the tokenizer has no eos_token")
        answer = template.answer.replace("{eos}", tokenizer.eos_token or "")
        self.template = dataclasses.replace(template, answer=answer)
        self._known: dict[str, list[int]] = {}  # headers, short questions and answers come again and again
        self._counts: dict[str, int] = {}  # of the same, where only lengths are asked for
        self._prepends_space = tokenizer.tokenize("a")[:1] not in (["a"], [])

    def encode(self, turns: Sequence[Turn]) -> EncodedChat:
        """Tokenize one conversation.

        Raises:
            ValueError: nothing is supervised.
        """
        ids: list[int] = self._begin()
        supervised: list[bool] = [False] * len(ids)
        images: list[int] = []
        answers: list[int] = []
        for parts, is_answer in self._pieces(turns):
            if is_answer:
                answers.append(len(ids))
            for part_index, part in enumerate(parts):
                if part_index:
                    images.append(len(ids))
                    ids.append(self.image_token_id)
                    supervised.append(False)
                tokens = self._tokenize(part)
                ids += tokens
                supervised += [is_answer] * len(tokens)
        input_ids = np.array(ids, dtype=np.int64)
        flags = np.array(supervised, dtype=bool)
        _check_supervision(int(flags.sum()), bool(flags[:1].all()))
        labels = np.where(flags, input_ids, IGNORE)
        return EncodedChat(input_ids, labels, tuple(images), tuple(answers))

    def count(self, conversations: Sequence[Sequence[Turn]]) -> list[tuple[int, int] | ValueError]:
        """Tokens without the images' and supervised tokens of each conversation, as :meth:`encode` would make them;
        the error of one that it refuses. All texts are tokenized in one call, which is several times faster."""
        pieces = [list(self._pieces(turns)) for turns in conversations]
        texts = {part for conversation in pieces for parts, _ in conversation for part in parts if part}
        new = [text for text in texts if text not in self._counts]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        lengths = [len(encoded) for encoded in backend.encode_batch_fast(new, add_special_tokens=False)]
        counts = {**self._counts, **dict(zip(new, lengths, strict=True)), "": 0}
        for text in new[: max(0, KNOWN_TEXTS - len(self._counts))]:
            self._counts[text] = counts[text]
        return [self._counted(conversation, counts) for conversation in pieces]

    def _counted(
        self, pieces: Sequence[tuple[Sequence[str], bool]], counts: Mapping[str, int]
    ) -> tuple[int, int] | ValueError:
        total, supervised, images, first = len(self._begin()), 0, 0, False
        for parts, is_answer in pieces:
            length = sum(counts[part] for part in parts)
            first |= is_answer and bool(length) and not total + images
            total += length
            images += len(parts) - 1
            supervised += length if is_answer else 0
        try:
            _check_supervision(supervised, first)
        except ValueError as error:
            return error
        return total, supervised

    def _begin(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if self.template.bos and bos is not None else []

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[list[str], bool]]:
        """The texts between the images of each piece of the conversation, and whether it is supervised."""
        if self.image_position == "first":
            turns = [_image_first(turn) for turn in turns]
        for text, is_answer in self.template.pieces(turns):
            parts = text.replace(IMAGE, self.placeholder).split(IMAGE)
            if is_answer and self._prepends_space:
                # The tokenizer writes a word boundary before every text it is given: the space is in that, so that
                # the answer gets the tokens it would have in the whole text.
                parts = [part.removeprefix(" ") for part in parts]
            yield parts, is_answer

    def _tokenize(self, text: str) -> list[int]:
        if not text:
            return []
        tokens = self._known.get(text)
        if tokens is None:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            if len(self._known) < KNOWN_TEXTS:
                self._known[text] = tokens
        return tokens

    def fingerprint(self) -> str:
        """What a change of would change the tokens; used to cache lengths."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        images = f"{self.image_token_id}|{self.placeholder}|{self.image_position}"
        return f"{self.template}|{images}|{self.tokenizer.bos_token}|{backend}"


def _check_supervision(supervised: int, first_is_answer: bool) -> None:
    if not supervised:
        raise ValueError("no token is supervised: the conversation has no answer")
    if first_is_answer:
        raise ValueError("its first token is an answer's, so nothing stands before it to predict it from")


def _image_first(turn: Turn) -> Turn:
    if turn.role != "user" or turn.text.count(IMAGE) != 1:
        return turn
    return Turn(turn.role, f"{IMAGE}\n{turn.text.replace(IMAGE, '').strip()}")
