"""Formats conversations with the chat template of a checkpoint (``data.template: auto``) and locates their answers.

The text is that of ``processor.apply_chat_template``. If the template marks generated text (``{% generation %}``), the
answers are the marked text. Otherwise an answer starts where the prompt of its earlier turns ends, and ends with the
token that ends its turn. Both are found by formatting parts of the conversation and checked against the whole text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.template_fields import (
    LEFT,
    PROBE,
    RENDER_ERRORS,
    RIGHT,
    Message,
    messages_of,
    reasoning_name,
    reasoning_of,
    spoken_text,
    text_content,
    written_messages,
)
from vtprune_train.data.turns import IMAGE_MARK, REASONING, TOOLS, VISUAL, Turn, join_prefixes

AUTO = "auto"
MOST_ANSWERS = 256  # formatting a conversation takes time quadratic in its answers
NO_PREFIXES: Mapping[int, str] = {}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class AutoTemplate:
    """A checkpoint's chat template.

    Args:
        source: its Jinja source.
        tokenizer: gives the template its special tokens.
        checkpoint: the folder or hub id of the checkpoint, for messages.
        image_token: the token that the template writes for an image, possibly with text around it.
        video_token: the token that the template writes for a video; ``<video>`` if empty.

    Raises:
        ValueError: the template writes the current date, or does not write messages or images.
    """

    name = AUTO

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerBase, checkpoint: str, image_token: str, video_token: str = ""
    ):
        self.source, self.tokenizer, self.checkpoint = source, tokenizer, checkpoint
        self.tokens = {IMAGE: image_token, VIDEO: video_token or VIDEO}
        self.is_marked = _GENERATION.search(source) is not None
        if "strftime_now" in source:
            raise ValueError(f"{self} writes the current date, so a sample's tokens would change; {_OTHERWISE}")
        self.content: Literal["text", "parts"] = "parts"
        self._refusal = ""
        kind = content_kind(self._probe, image_token)
        if kind is None:
            raise ValueError(f"{self} outputs no {image_token} for an image{self._refusal}; {_OTHERWISE}")
        self.content = kind
        self._around = {IMAGE: self._text_around(IMAGE)}

    def __str__(self) -> str:
        return f"the chat template of {self.checkpoint}"

    def __repr__(self) -> str:
        """Part of the key of cached lengths."""
        return f"AutoTemplate({self.source!r}, {self.content}, {self.tokens})"

    @cached_property
    def bos(self) -> bool:
        """Whether texts start with the tokenizer's beginning-of-sequence token."""
        token = self.tokenizer.bos_token
        return bool(token) and self._text(messages_of([PROBE], self.content), None, False).startswith(token)

    @cached_property
    def ending(self) -> str:
        """The text that ends an answer, without the whitespace after it."""
        text = self._text(messages_of(["a", PROBE], self.content), None, False)
        if text.count(PROBE) != 1:
            raise ValueError(f"{self} does not write the text of an assistant turn once; {_OTHERWISE}")
        return text.partition(PROBE)[2].rstrip()

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether a prompt opens the reasoning of its answer."""
        return self._text(messages_of(["a"], self.content), None, True).rstrip().endswith("<think>")

    @cached_property
    def supervises_ending(self) -> bool:
        """Whether the last answer's labels contain its ending."""
        text, spans = self.locate(messages_of(["a", PROBE], self.content), None)
        return bool(self.ending and spans) and text[slice(*spans[-1])].endswith(self.ending)

    def format(
        self, turns: Sequence[Turn], mark: re.Pattern[str], visuals: Sequence[str]
    ) -> tuple[str, list[int], list[str]]:
        """Format a conversation.

        Args:
            turns: the conversation.
            mark: matches the placeholders in it.
            visuals: the text that the family writes for each of them.

        Returns:
            The text, the offsets ``[start, end, start, end, ...]`` of its answers, and ``visuals``.

        Raises:
            ValueError: the template rejects the conversation, changes the text of a prompt, leaves out or moves an
                image, or the answers cannot be located exactly.
        """
        spoken, prefixes = join_prefixes([turn for turn in turns if turn.role != TOOLS])
        tools = next((json.loads(turn.text) for turn in turns if turn.role == TOOLS), None)
        messages = [message_of(turn, self.content, mark, self.tokens) for turn in spoken]
        messages = written_messages(self._plain_text, messages, tools, lambda: self._reasoning_name, str(self))
        text, spans = self.locate(messages, tools, prefixes)
        for number, turn in enumerate(spoken):
            if turn.role != "assistant" and any(part.strip() not in text for part in mark.split(turn.text)):
                raise ValueError(f"{self} leaves out or changes the text of {_turn(number)}; {_OTHERWISE}")
        self._check_answers(spoken, text, spans, prefixes)
        kinds = [kind for turn in spoken if turn.role != "assistant" for kind in mark.findall(turn.text)]
        return self._filled(text, [offset for span in spans for offset in span], kinds, visuals)

    def locate(
        self, messages: Sequence[Message], tools: list[Any] | None, prefixes: Mapping[int, str] = NO_PREFIXES
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the offsets of its answers, without their ``prefixes``; raises like
        :meth:`format`."""
        if self.is_marked:
            text, marked = self._render(messages, tools, False, mask=True)
            spans = _merge_spans(marked, text, self)
            for number, prefix in prefixes.items():
                start = self._start(messages, tools, number, text, prefix)
                spans = [(max(a, start) if a < start <= b else a, b) for a, b in spans]
            return text, spans
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(answers) > MOST_ANSWERS:
            raise ValueError(f"it has {len(answers)} answers, more than {MOST_ANSWERS}; split it into several records")
        text = self._text(messages, tools, False)
        spans = []
        for number in answers:
            prefix = prefixes.get(number, "")
            start = self._start(messages, tools, number, text, prefix)
            end = self._end(messages, tools, number, text, start, prefix)
            if start > end or (spans and start < spans[-1][1]):
                raise ValueError(f"{self} does not write {_turn(number)} after the turns before it; {_OTHERWISE}")
            spans.append((start, end))
        return text, spans

    def _start(self, messages: Sequence[Message], tools: list[Any] | None, number: int, text: str, prefix: str) -> int:
        """Where an answer starts after its prefix: the end of its prompt, which must be the beginning of ``text``."""
        if prefix:
            begun = {**messages[number], "content": text_content(prefix, self.content)}
            prompt = self._render([*messages[:number], begun], tools, False, continues=True)[0]
        else:
            prompt = self._text(messages[:number], tools, True)
        if not text.startswith(prompt):
            shared = _shared(prompt, text)
            raise ValueError(
                f"{self} writes {_turn(number)} after another text than the prompt it gives for it (prompt: "
                f"...{prompt[max(0, shared - 20) : shared + 20]!r}, conversation: "
                f"...{text[max(0, shared - 20) : shared + 20]!r}), so the answer cannot be trained on exactly; end "
                "the record with this turn, or use a named template"
            )
        return len(prompt)

    def _end(
        self, messages: Sequence[Message], tools: list[Any] | None, number: int, text: str, start: int, prefix: str
    ) -> int:
        """Where an answer ends. Usually ``text`` begins with the conversation up to the answer. This is not so if the
        template omits the reasoning of earlier answers or ends the last answer differently; then the text after the
        answer is located by formatting the conversation with a probe instead of the answer."""
        up_to = self._text(messages[: number + 1], tools, False).rstrip()
        if text.startswith(up_to):
            return max(start, len(up_to))
        probe = {**messages[number], "content": text_content(prefix + PROBE, self.content)}
        for name in REASONING:
            probe.pop(name, None)
        whole = self._text([*messages[:number], probe, *messages[number + 1 :]], tools, False)
        alone = self._text([*messages[:number], probe], tools, False)
        after, ending = whole.partition(PROBE)[2], alone.partition(PROBE)[2]
        before = whole.partition(PROBE)[0]
        if whole.count(PROBE) != 1 or not text.endswith(after) or before[:start] != text[:start]:
            raise ValueError(
                f"{self} changes other parts of the conversation with the text of {_turn(number)}, so the end of this "
                f"answer cannot be located; {_OTHERWISE}"
            )
        return len(text) - len(after) + self._shared_ending(ending, after)

    def _shared_ending(self, ending: str, after: str) -> int:
        """Length of the common beginning of two texts, in whole added tokens and without trailing whitespace."""
        shared = _shared(ending, after)
        if self._added is not None:
            for text in (ending, after):
                inside = [match.start() for match in self._added.finditer(text) if match.start() < shared < match.end()]
                shared = min([shared, *inside])
        return len(after[:shared].rstrip())

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _filled(
        self, text: str, offsets: list[int], kinds: Sequence[str], visuals: Sequence[str]
    ) -> tuple[str, list[int], list[str]]:
        """Replace the tokens of images and videos by ``visuals``. Like the family's processor, only replace the token,
        unless ``visuals`` repeat the text that the template writes around it."""
        token_of = {kind: self.tokens[kind] for kind in (IMAGE, *kinds)}
        pattern = re.compile("|".join(map(re.escape, sorted(token_of.values(), key=len, reverse=True))))
        matches = list(pattern.finditer(text))
        expected = [token_of[kind] for kind in kinds]
        tokens = [match.group() for match in matches]
        if len(tokens) != len(expected):
            raise ValueError(
                f"it has {kinds.count(IMAGE)} image(s) and {kinds.count(VIDEO)} video(s), but {self} writes their "
                f"tokens {len(tokens)} times" + ("; the text may contain them" if len(tokens) > len(expected) else "")
            )
        if tokens != expected:
            raise ValueError(f"{self} writes images before videos; write them in this order in the record")
        pieces: list[str] = []
        edges: list[int] = []
        shifts, done = [0], 0
        for match, kind, visual in zip(matches, kinds, visuals, strict=True):
            before, after = self._num_repeated(kind, visual)
            start, end = match.start() - before, match.end() + after
            if text[start : match.start()] != visual[:before] or not visual.endswith(text[match.end() : end]):
                raise ValueError(f"{self} writes different texts around its images; {_OTHERWISE}")
            pieces += [text[done:start], visual]
            edges.append(end)
            shifts.append(shifts[-1] + len(visual) - (end - start))
            done = end
        # No answer contains an image, so each offset is before or after a whole visual.
        moved = [offset + shifts[bisect_right(edges, offset)] for offset in offsets]
        return "".join([*pieces, text[done:]]), moved, list(visuals)

    def _num_repeated(self, kind: str, visual: str) -> Span:
        """Number of characters before and after the token that the template writes and ``visual`` repeats."""
        if kind not in self._around:
            self._around[kind] = self._text_around(kind)
        before, after = self._around[kind]
        tokens = [re.escape(token) for token in self.tokens.values()]
        runs = list(re.finditer("|".join(tokens), visual))
        head, tail = (visual[: runs[0].start()], visual[runs[-1].end() :]) if runs else (visual, visual)
        left = next(n for n in range(min(len(head), len(before)), -1, -1) if before.endswith(head[:n]))
        right = next(n for n in range(min(len(tail), len(after)), -1, -1) if after.startswith(tail[len(tail) - n :]))
        one_side = bool(head) and bool(tail) and not (left and right)  # Qwen3-VL: markers around each frame
        return (0, 0) if one_side else (left, right)

    def _text_around(self, kind: str) -> tuple[str, str]:
        """The text that the template writes directly before and after the token of an image or a video."""
        turn = Turn("user", f"{LEFT}{kind}{RIGHT}")
        message = message_of(turn, self.content, VISUAL if kind == VIDEO else IMAGE_MARK, self.tokens)
        before, token, after = self._text([message], None, False).partition(self.tokens[kind])
        if not token:
            raise ValueError(f"{self} outputs no {self.tokens[kind]} for {kind}; {_OTHERWISE}")
        return before.rpartition(LEFT)[2], after.partition(RIGHT)[0]

    def _check_answers(
        self, turns: Sequence[Turn], text: str, spans: Sequence[Span], prefixes: Mapping[int, str]
    ) -> None:
        """Refuse answers whose text the template leaves out. It may leave out the reasoning of earlier ones."""
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        for place, number in enumerate(answers):
            turn = turns[number]
            written = text if self.is_marked else text[slice(*spans[place])]
            rest = turn.text.removeprefix(prefixes.get(number, ""))
            if spoken_text(rest) not in written:
                raise ValueError(f"{self} leaves out or changes the text of {_turn(number)}; {_OTHERWISE}")
            fields = json.loads(turn.fields) if turn.fields else {}
            if number == len(turns) - 1 and reasoning_of(rest, fields) not in written:
                raise ValueError(f"{self} leaves out or changes the reasoning of {_turn(number)}; {_OTHERWISE}")

    def _probe(self, content: Any) -> str | None:
        """The text of one user message; ``None`` if the template does not accept this form of content."""
        try:
            return self._text([{"role": "user", "content": content}], None, True)
        except ValueError as error:
            self._refusal = f" ({error})"
            return None

    @cached_property
    def _reasoning_name(self) -> str:
        return reasoning_name(self._plain_text, self.content)

    def _plain_text(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        return self._text(messages, tools, False)

    def _text(self, messages: Sequence[Message], tools: list[Any] | None, prompts: bool) -> str:
        return self._render(messages, tools, prompts)[0]

    def _render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        prompts: bool,
        mask: bool = False,
        continues: bool = False,
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=mask,
                add_generation_prompt=prompts,
                continue_final_message=continues,
                **self.tokenizer.special_tokens_map,
            )
        except RENDER_ERRORS as error:
            raise ValueError(f"{self} refuses it: {error or type(error).__name__}") from error
        return texts[0], spans[0] if mask else []


_OTHERWISE = "use one of the named templates of `data.template`, or write a custom one"


def content_kind(probe: Any, token: str) -> Literal["text", "parts"] | None:
    """The form of message content that a chat template accepts: ``parts``, or ``text`` that contains the image token.

    Templates of vision-language processors accept parts. Those of language models accept only text. Those of this
    project accept both.

    Args:
        probe: ``content -> text`` of one user message with this content; ``None`` if the template does not accept it.
        token: the image token.
    """
    as_text = probe(f"{token}\na question")
    as_parts = probe([{"type": "image"}, {"type": "text", "text": "\na question"}])
    text_works = as_text is not None and as_text.count(token) == 1
    if as_parts is not None and as_parts.count(token) == 1 and not (text_works and as_text == as_parts):
        return "parts"
    return "text" if text_works else None


def message_of(turn: Turn, kind: str, mark: re.Pattern[str], tokens: dict[str, str]) -> Message:
    """A turn as a message of ``apply_chat_template``, with content of this kind. Line breaks around images are left
    out of parts, because templates write their own."""
    if turn.role == "assistant" or not mark.search(turn.text):
        content = text_content(turn.text, kind)
    elif kind == "text":
        content = mark.sub(lambda match: tokens[match.group()], turn.text)
    else:
        content = list(_parts(turn.text, mark))
    return {"role": turn.role, "content": content, **(json.loads(turn.fields) if turn.fields else {})}


def _parts(text: str, mark: re.Pattern[str]) -> Iterator[dict[str, str]]:
    done, marks = 0, list(mark.finditer(text))
    for number, match in enumerate([*marks, None]):
        part = text[done : match.start() if match else len(text)]
        if number:
            part = re.sub(r"^\s*\n\s*", "", part)
        if match:
            part = re.sub(r"\s*\n\s*$", "", part)
            done = match.end()
        if part:
            yield {"type": "text", "text": part}
        if match:
            yield {"type": "image" if match.group() == IMAGE else "video"}


def _merge_spans(marked: Sequence[Span], text: str, template: AutoTemplate) -> list[Span]:
    """The spans that a template marks, adjacent ones joined, without trailing whitespace and empty ones."""
    spans: list[Span] = []
    for start, end in marked:
        if start < (spans[-1][1] if spans else 0) or end > len(text):
            raise ValueError(
                f"{template} has {{% generation %}} inside another block, so its marks have wrong offsets; {_OTHERWISE}"
            )
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    stripped = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    return [(start, end) for start, end in stripped if start < end]


def _shared(one: str, two: str) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _turn(number: int) -> str:
    return f"turn {number + 1}"
