"""Tokenizes texts section by section with a cache; the ids are those of the whole text.

Tokenizers split a text at their added tokens (``<image>``, ``</s>``, ``<|im_end|>``) and tokenize each section between
them separately. The ids of a section can therefore be cached: system prompts and headers are the same in most
conversations.
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

KNOWN_SECTIONS = 4096  # sections in the cache
LONGEST_KNOWN = 2048  # characters of a cached section; system prompts and headers are shorter
CUTTABLE = ("", *(f'{{"type":"{form}"}}' for form in ("NFC", "NFD", "NFKC", "NFKD")))  # normalizers that allow splits
WORDS = "".join(f"{left} {right}" for left in "aA1.:])?\"'>é你" for right in "aA1.:[(\"'<é你")


@dataclass(frozen=True)
class Edge:
    """A position in a text, in tokens.

    Args:
        index: number of leading ids of the whole text that equal those of the text before the position, tokenized
            alone.
        exact: whether these are all ids of the text before the position, so that no token spans the position.
    """

    index: int
    exact: bool


@dataclass(frozen=True)
class Section:
    """A part of a text that starts at character ``start``: an added token with the id ``token``, or the text between
    two added tokens."""

    text: str
    start: int
    token: int | None

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class SectionTokenizer:
    """Returns the same ids as ``tokenizer(text, add_special_tokens=False)``, with a cache of sections.

    Args:
        tokenizer: any tokenizer; one that does not use the `tokenizers` library tokenizes whole texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added = {} if self._backend is None else tokenizer.added_tokens_decoder
        # Added tokens that absorb adjacent spaces or depend on adjacent text do not split a text.
        self._cuts = {
            token.content: number
            for number, token in added.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        # Where several tokens start at the same place, the longest one matches, as in the tokenizer.
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
        """The ids of texts, and an edge for each place in them.

        Args:
            texts: each text with its places, ascending character offsets.
        """
        cut = [(list(self._sections(text, places)), places) for text, places in texts]
        ids = self._tokenized(key for sections, places in cut for key in self._keys(sections, places))
        return [self._concatenated(sections, places, ids) for sections, places in cut]

    def _sections(self, text: str, places: Sequence[int]) -> Iterator[Section]:
        """Split ``text`` at added tokens, except those that contain a place (cut there, the text would lack the token).
        If the tokenizer splits at spaces, also split at places between a word and a space."""
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
        """The texts to tokenize: the sections, and the part of a section before each place in it."""
        for section in sections:
            if section.token is None:
                yield self._key(section, len(section.text))
                for place in _inside(places, section.start, section.end):
                    yield self._key(section, place - section.start)

    def _key(self, section: Section, length: int) -> str:
        """The text to tokenize for the first ``length`` characters of a section. For a tokenizer that inserts a word
        boundary only at the beginning of a text, sections that are not at the beginning start with an added token."""
        return self._anchor + section.text[:length] if section.start else section.text[:length]

    def _tokenized(self, keys: Iterable[str]) -> Mapping[str, list[int]]:
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        encoded = dict(zip(new, self._encode(new), strict=True))
        short = [key for key in new if len(key) <= LONGEST_KNOWN]
        for key in short[: max(0, KNOWN_SECTIONS - len(self._known))]:
            self._known[key] = encoded[key]
        return ChainMap(encoded, self._known)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._backend.no_truncation()
        self._backend.no_padding()
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _ids(self, section: Section, length: int, ids: Mapping[str, list[int]]) -> list[int]:
        section_ids = ids[self._key(section, length)]
        return section_ids[1:] if section.start and self._anchor else section_ids

    def _concatenated(
        self, sections: Sequence[Section], places: Sequence[int], known: Mapping[str, list[int]]
    ) -> tuple[list[int], list[Edge]]:
        ids: list[int] = []
        edges: list[Edge] = []
        for section in sections:
            whole = [section.token] if section.token is not None else self._ids(section, len(section.text), known)
            while len(edges) < len(places) and places[len(edges)] < section.end:
                length = places[len(edges)] - section.start
                before = self._ids(section, length, known) if length else []
                shared = _shared(whole, before)
                edges.append(Edge(len(ids) + shared, shared == len(before)))
            ids += whole
        edges += [Edge(len(ids), True)] * (len(places) - len(edges))
        return ids, edges


def _inside(places: Sequence[int], start: int, end: int) -> Sequence[int]:
    """The places strictly between ``start`` and ``end``; ``places`` ascend."""
    return places[bisect_right(places, start) : bisect_left(places, end)]


def part_of(part: Any) -> str:
    """The settings of a component of a `tokenizers` tokenizer, as in ``tokenizer.json`` without spaces; empty for
    ``None``."""
    return "" if part is None else part.__getstate__().decode()


def _cuts_words(backend: Any) -> bool:
    """Whether a tokenizer always splits before a space after another character, so that tokenizing the two sides of
    such a place separately gives the same ids."""
    if backend.pre_tokenizer is None or part_of(backend.normalizer) not in CUTTABLE:
        return False
    starts = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(WORDS)}
    return all(place in starts for place, character in enumerate(WORDS) if character == " ")


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the common prefix."""
    if one[: len(two)] == two:
        return len(two)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
