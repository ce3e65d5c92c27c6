"""Texts to token ids exactly as the tokenizer gives them for the whole text, but section by section and remembered.

Tokenizers cut a text at their added tokens (``<image>``, ``</s>``, ``<|im_end|>``) and tokenize every section between
two of them by itself. So each section can be tokenized once and looked up again: system prompts and headers are the
same in most conversations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

KNOWN_SECTIONS = 4096  # sections whose ids are remembered


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
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
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
        self._anchor = next(iter(self._cuts), "")
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
        wanted = (key for sections, places in cut for key in _wanted(sections, places, self._key))
        ids_of = self._tokenized(dict.fromkeys(wanted))
        return [self._joined(sections, places, ids_of) for sections, places in cut]

    def _sections(self, text: str, places: Sequence[int]) -> Iterator[Section]:
        """Cut ``text`` at added tokens, except at one that a place lies inside of: the text before it has no such
        token."""
        done = 0
        for match in self._pattern.finditer(text):
            start, end = match.span()
            token = self._cuts.get(match.group())
            if token is None or any(start < place < end for place in places):
                continue
            if start > done:
                yield Section(text[done:start], done, None)
            yield Section(match.group(), start, token)
            done = end
        if done < len(text):
            yield Section(text[done:], done, None)

    def _key(self, section: Section, length: int) -> str:
        """What is given to the tokenizer for a section's first ``length`` characters. An added token stands before it
        unless it begins the text, where some tokenizers write a word boundary and nowhere else."""
        return (self._anchor if section.start else "") + section.text[:length]

    def _tokenized(self, keys: Iterable[str]) -> Callable[[Section, int], list[int]]:
        new = [key for key in keys if key not in self._known]
        ids = dict(zip(new, self._encode(new), strict=True))

        def ids_of(section: Section, length: int) -> list[int]:
            key = self._key(section, length)
            found = ids[key] if key in ids else self._known[key]
            return found[1:] if section.start else found

        for key in new[: max(0, KNOWN_SECTIONS - len(self._known))]:
            self._known[key] = ids[key]
        return ids_of

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._backend.no_truncation()
        self._backend.no_padding()
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _joined(
        self, sections: Sequence[Section], places: Sequence[int], ids_of: Callable[[Section, int], list[int]]
    ) -> tuple[list[int], list[Edge]]:
        ids: list[int] = []
        edges: list[Edge] = []
        for section in sections:
            own = ids_of(section, len(section.text)) if section.token is None else [section.token]
            while len(edges) < len(places) and places[len(edges)] < section.end:
                before = ids_of(section, length) if (length := places[len(edges)] - section.start) else []
                shared = _shared(own, before)
                edges.append(Edge(len(ids) + shared, shared == len(before)))
            ids += own
        edges += [Edge(len(ids), True)] * (len(places) - len(edges))
        return ids, edges


def _wanted(sections: Iterable[Section], places: Sequence[int], key: Callable[[Section, int], str]) -> Iterator[str]:
    """What is to be tokenized: the sections, and what of them stands before a place inside."""
    for section in sections:
        if section.token is None:
            yield key(section, len(section.text))
            yield from (key(section, place - section.start) for place in places if section.start < place < section.end)


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """Ids that both begin with."""
    if one[: len(two)] == two:
        return len(two)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
