"""Texts to token ids exactly as the tokenizer gives them for the whole text, but section by section and remembered.

Tokenizers cut a text at their added tokens (``<image>``, ``</s>``, ``<|im_end|>``) and tokenize every section between
two of them by itself. So each section can be tokenized once and looked up again: system prompts and headers are the
same in most conversations.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

KNOWN_SECTIONS = 4096  # sections whose ids are remembered
LONGEST_KNOWN = 2048  # characters of such a section; system prompts and headers are shorter
CUTTABLE = ("", *(f'{{"type":"{form}"}}' for form in ("NFC", "NFD", "NFKC", "NFKD")))  # normalizers
WORDS = "".join(f"{left} {right}" for left in "aA1.:])?\"'>é你" for right in "aA1.:[(\"'<é你")


@dataclass(frozen=True)
class Edge:
    """Where a place in a text lies among the text's tokens.

    ``index`` is how many leading ids the whole text shares with the text up to the place, tokenized by itself;
    ``exact`` says whether these are all ids of the latter, so that no token reaches over the place.
    """

    index: int
    exact: bool


@dataclass(frozen=True)
class Section:
    """A part of a text from character ``start``: an added token with the id ``token``, or the text between two."""

    text: str
    start: int
    token: int | None

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class SectionTokenizer:
    """Ids of whole texts, as ``tokenizer(text, add_special_tokens=False)`` gives them.

    Args:
        tokenizer: of any kind; one that is not backed by the `tokenizers` library gets whole texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added = {} if self._backend is None else tokenizer.added_tokens_decoder
        # Those that take the spaces beside them, or depend on what stands there, stay within their section.
        self._cuts = {
            token.content: number
            for number, token in added.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        # Where several tokens begin at one place the longest is taken, as the tokenizer does.
        verbatim = sorted((token.content for token in added.values() if not token.normalized), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, verbatim)) or r"(?!)")
        marks_beginning = self._backend is not None and '"prepend_scheme":"first"' in part_of(
            self._backend.pre_tokenizer
        )
        self._anchor = next(iter(self._cuts), "") if marks_beginning else ""
        plain = len(self._cuts) == len(added) and not any(character.isspace() for character in "".join(self._cuts))
        self._cuts_words = self._backend is not None and plain and _cuts_words(self._backend)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.locate([(text, ())])[0][0]

    def locate(self, texts: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[list[int], list[Edge]]]:
        """The ids of texts, and where places in them lie among these.

        Args:
            texts: each with its places, in characters from its beginning, ascending.
        """
        cut = [(list(self._sections(text, places)), places) for text, places in texts]
        ids = self._tokenized(key for sections, places in cut for key in self._keys(sections, places))
        return [self._joined(sections, places, ids) for sections, places in cut]

    def _sections(self, text: str, places: Sequence[int]) -> Iterator[Section]:
        """Cut ``text`` at added tokens, except at one that a place lies inside of: the text before it has no such
        token. Where words are tokenized by themselves, also at places between a word and a space."""
        done = 0
        for match in self._pattern.finditer(text):
            start, end = match.span()
            token = self._cuts.get(match.group())
            if token is None or _inside(places, start, end):
                continue
            yield from self._words(text, done, start, places)
            yield Section(match.group(), start, token)
            done = end
        yield from self._words(text, done, len(text), places)

    def _words(self, text: str, start: int, end: int, places: Sequence[int]) -> Iterator[Section]:
        for place in _inside(places, start, end) if self._cuts_words else ():
            if start < place and text[place] == " " and not text[place - 1].isspace():
                yield Section(text[start:place], start, None)
                start = place
        if start < end:
            yield Section(text[start:end], start, None)

    def _keys(self, sections: Iterable[Section], places: Sequence[int]) -> Iterator[str]:
        """What is to be tokenized: the sections, and what of them stands before a place inside."""
        for section in sections:
            if section.token is None:
                yield self._key(section, len(section.text))
                for place in _inside(places, section.start, section.end):
                    yield self._key(section, place - section.start)

    def _key(self, section: Section, length: int) -> str:
        """What is given to the tokenizer for a section's first ``length`` characters. For a tokenizer that writes a
        word boundary at the beginning of a text and nowhere else, an added token stands before other sections."""
        return self._anchor + section.text[:length] if section.start else section.text[:length]

    def _tokenized(self, keys: Iterable[str]) -> Mapping[str, list[int]]:
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        found = dict(zip(new, self._encode(new), strict=True))
        short = [key for key in new if len(key) <= LONGEST_KNOWN]
        for key in short[: max(0, KNOWN_SECTIONS - len(self._known))]:
            self._known[key] = found[key]
        return ChainMap(found, self._known)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._backend.no_truncation()
        self._backend.no_padding()
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _ids(self, section: Section, length: int, ids: Mapping[str, list[int]]) -> list[int]:
        found = ids[self._key(section, length)]
        return found[1:] if section.start and self._anchor else found

    def _joined(
        self, sections: Sequence[Section], places: Sequence[int], known: Mapping[str, list[int]]
    ) -> tuple[list[int], list[Edge]]:
        ids: list[int] = []
        edges: list[Edge] = []
        for section in sections:
            own = [section.token] if section.token is not None else self._ids(section, len(section.text), known)
            while len(edges) < len(places) and places[len(edges)] < section.end:
                length = places[len(edges)] - section.start
                before = self._ids(section, length, known) if length else []
                shared = _shared(own, before)
                edges.append(Edge(len(ids) + shared, shared == len(before)))
            ids += own
        edges += [Edge(len(ids), True)] * (len(places) - len(edges))
        return ids, edges


def _inside(places: Sequence[int], start: int, end: int) -> Sequence[int]:
    """The places between ``start`` and ``end``, both excluded; they ascend."""
    return places[bisect_right(places, start) : bisect_left(places, end)]


def part_of(part: Any) -> str:
    """The settings of a part of a `tokenizers` tokenizer, as in ``tokenizer.json`` without spaces; empty for none."""
    return "" if part is None else part.__getstate__().decode()


def _cuts_words(backend: Any) -> bool:
    """Whether a tokenizer cuts before every space that follows something else, so that it gives a text's two sides the
    same ids as the whole."""
    if backend.pre_tokenizer is None or part_of(backend.normalizer) not in CUTTABLE:
        return False
    starts = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(WORDS)}
    return all(place in starts for place, character in enumerate(WORDS) if character == " ")


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """Ids that both begin with."""
    if one[: len(two)] == two:
        return len(two)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
