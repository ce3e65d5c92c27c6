"""Measures records: their numbers of tokens, supervised tokens, visual tokens and tiles."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.data.auto_template import AutoTemplate
from vtprune_train.data.chat import UNSUPERVISED, ChatEncoder
from vtprune_train.data.images import MAX_PIXELS, UNREADABLE
from vtprune_train.data.records import Conversation, Prompt, normalize
from vtprune_train.data.sources import reader_identity
from vtprune_train.data.sources.base import BOUNDS, Bounds, Piece, Place, Reader, TooLarge
from vtprune_train.data.visuals import NO_VIDEOS
from vtprune_train.files.checksums import write_sealed
from vtprune_train.models.families.layout import Clip, ImageLayout, Visual

BATCH = 512  # conversations tokenized in one call
BATCH_BYTES = BOUNDS.text  # text in such a batch; tokenizing takes more than a hundred times as much memory
BATCH_IMAGE_BYTES = BOUNDS.record  # bytes of embedded images in such a batch
FINE, BAD, NO_IMAGE, SILENT, LARGE = 0, 1, 2, 3, 4
"""Values of ``state``: ``NO_IMAGE``, an image cannot be read (perhaps temporarily); ``SILENT``, the record has no
answer to train on; ``LARGE``, it is too large; ``BAD``, anything else that makes it unusable."""

RECORD_COLUMNS: dict[str, Any] = {
    "at": np.int64,
    "size": np.int64,
    "text": np.int32,
    "supervised": np.int32,
    "state": np.uint8,
    "content": np.uint64,
    "num_spans": np.int32,
    "id_size": np.int32,
    "id_hash": np.uint64,
}
SPAN_COLUMNS = ("height", "width", "tokens", "tiles", "frames")


@dataclass
class Measured:
    """Measurements of one conversation; ``spans`` has the values of ``SPAN_COLUMNS`` of each image and video (frames:
    steps in time, 0 for an image), and ``texts`` the text that the family writes for it."""

    text: int = 0
    supervised: int = 0
    state: int = FINE
    spans: list[tuple[int, ...]] = field(default_factory=list)
    error: str = ""
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Measure:
    """Measures the conversations of one source.

    Args:
        encoder: tokenizes conversations.
        layout: counts visual tokens.
        images: folder of the images.
        prompt: text that the source adds to its conversations.
        ignore: fields and markers that are accepted in its records.
        max_image_pixels: larger images are not read.
        bounds: larger records are not read, longer texts are not tokenized.
        reader: path of the reader of the data files; empty for the package's readers.
        videos: folder of the videos; ``None`` if records with videos are unusable.
    """

    encoder: ChatEncoder
    layout: ImageLayout
    images: Path
    prompt: Prompt
    ignore: tuple[str, ...] = ()
    max_image_pixels: int = MAX_PIXELS
    bounds: Bounds = BOUNDS
    reader: str = ""
    videos: Path | None = None

    @property
    def chat(self) -> bool:
        """See :func:`~vtprune_train.data.records.normalize`."""
        return isinstance(self.encoder.template, AutoTemplate)

    def fingerprint(self) -> dict[str, Any]:
        """Settings that affect the lengths."""
        encoder = hashlib.sha256(self.encoder.fingerprint().encode()).hexdigest()[:16]
        return {
            "template": self.encoder.template.name,
            "encoder": encoder,
            "layout": str(self.layout),
            "images": str(self.images.resolve()),
            "prompt": str(self.prompt),
            "ignore": list(self.ignore),
            "max_image_pixels": self.max_image_pixels,
            "bounds": list(self.bounds),
            **({"chat": True} if self.chat else {}),
            **({"reader": reader_identity(self.reader)} if self.reader else {}),
            **({} if self.videos is None else {"videos": str(self.videos.resolve())}),
        }

    def __call__(self, conversations: Sequence[Conversation]) -> list[Measured]:
        """Measure conversations; the ``error`` of a result says why a conversation cannot be used."""
        results = [self._measure_images(conversation) for conversation in conversations]
        usable = [number for number, result in enumerate(results) if result.state == FINE]
        counts = self.encoder.count(
            [self.prompt.apply(conversations[number]).turns for number in usable],
            self.bounds.text,
            [results[number].texts for number in usable],
        )
        for number, count in zip(usable, counts, strict=True):
            if isinstance(count, ValueError):
                results[number] = _refused(count.args[0])
            else:
                results[number].text, results[number].supervised = count
        return results

    def _measure_images(self, conversation: Conversation) -> Measured:
        if conversation.error:
            return _refused(conversation.error)
        if conversation.videos and self.videos is None:
            return _refused(NO_VIDEOS)
        visuals: list[Visual] = []
        files = conversation.files(self.images, self.videos or self.images)
        for file in files:
            try:
                visuals.append(file.visual(self.layout, self.max_image_pixels))
            except UNREADABLE as error:
                # Reserve rows for its images and videos, to be filled in once they can be read.
                blank = [(0,) * len(SPAN_COLUMNS)] * len(files)
                return Measured(state=NO_IMAGE, spans=blank, error=f"{file.kind} {error}")
            except ValueError as error:
                return Measured(state=BAD, error=str(error))
        try:
            every = self.layout.visual_tokens(visuals)
        except ValueError as error:
            return Measured(state=BAD, error=str(error))
        sizes = [visual.size if isinstance(visual, Clip) else visual for visual in visuals]
        spans: list[tuple[int, ...]] = [
            (*size, of.total, of.tiles, of.frames) for size, of in zip(sizes, every, strict=True)
        ]
        return Measured(spans=spans, texts=self.layout.texts(visuals, self.encoder.placeholder))


def _refused(error: str) -> Measured:
    state = LARGE if isinstance(error, TooLarge) else SILENT if error == UNSUPERVISED else BAD
    return Measured(state=state, error=error)


def measure_piece(measure: Measure, reader: Reader, piece: Piece, target: Path, identity: str) -> None:
    """Measure a piece of a file and write its columns to ``target``, a sealed ``.npz``, atomically."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*RECORD_COLUMNS, *SPAN_COLUMNS, "ids")}
    errors: list[str] = []
    unread: Counter[str] = Counter()
    done = 0
    settings = measure.ignore, measure.bounds.text
    read = ((place, normalize(record, "", *settings, chat=measure.chat)) for place, record in reader.scan(piece))
    for batch in _batches(read):
        conversations = [conversation for _, conversation in batch]
        measured = measure(conversations)
        for name, values in _columns([place for place, _ in batch], conversations, measured).items():
            columns[name].append(values)
        errors += [
            json.dumps({"row": done + number, "error": result.error, "state": result.state})
            for number, result in enumerate(measured)
            if result.state != FINE
        ]
        for conversation in conversations:
            unread.update(conversation.unread)
        done += len(batch)
    unread.update(dict.fromkeys(reader.unread, done))
    dtypes = {**RECORD_COLUMNS, **dict.fromkeys(SPAN_COLUMNS, np.int32), "ids": np.uint8}
    joined = {name: np.concatenate([np.zeros(0, dtypes[name]), *parts]) for name, parts in columns.items()}
    joined["errors"] = np.frombuffer("\n".join(errors).encode(), dtype=np.uint8)
    joined["unread"] = np.frombuffer(json.dumps(unread).encode(), dtype=np.uint8)
    content = io.BytesIO()
    np.savez(content, **joined)  # type: ignore[arg-type]  # it takes arrays by name
    write_sealed(target, content.getvalue(), identity)


def _batches(read: Iterator[tuple[Place, Conversation]]) -> Iterator[list[tuple[Place, Conversation]]]:
    """Batches of up to ``BATCH`` conversations, fewer if they are long or have embedded images."""
    batch: list[tuple[Place, Conversation]] = []
    text = images = 0
    for place, conversation in read:
        more = sum(len(turn.text) for turn in conversation.turns)
        files = (*conversation.images, *(video.file for video in conversation.videos))
        encoded = sum(len(file) for file in files if isinstance(file, bytes))
        if batch and (len(batch) == BATCH or text + more > BATCH_BYTES or images + encoded > BATCH_IMAGE_BYTES):
            yield batch
            batch, text, images = [], 0, 0
        batch.append((place, conversation))
        text, images = text + more, images + encoded
    if batch:
        yield batch


def _columns(
    places: Sequence[Place], conversations: Sequence[Conversation], measured: Sequence[Measured]
) -> dict[str, np.ndarray]:
    ids = [conversation.id.encode() for conversation in conversations]
    spans = np.array([span for result in measured for span in result.spans], dtype=np.int32).reshape(
        -1, len(SPAN_COLUMNS)
    )
    values: dict[str, Any] = {
        "at": [place.at for place in places],
        "size": [place.size for place in places],
        "text": [result.text for result in measured],
        "supervised": [result.supervised for result in measured],
        "state": [result.state for result in measured],
        "content": [content_hash(conversation) for conversation in conversations],
        "num_spans": [len(result.spans) for result in measured],
        "id_size": [len(name) for name in ids],
        "id_hash": [_hash(name) if name else 0 for name in ids],
    }
    columns = {name: np.array(values[name], dtype=dtype) for name, dtype in RECORD_COLUMNS.items()}
    columns["ids"] = np.frombuffer(b"".join(ids), dtype=np.uint8)
    return {**columns, **dict(zip(SPAN_COLUMNS, spans.T, strict=True))}


def content_hash(conversation: Conversation) -> int:
    """Hash of a record's id, turns, error, and the names of its images and videos (or the sizes of embedded ones)."""
    texts = [part for turn in conversation.turns for part in (turn.role, turn.text, *filter(None, [turn.fields]))]
    names = [image if isinstance(image, str) else str(len(image)) for image in conversation.images]
    for video in conversation.videos:
        file = str(len(video.file)) if isinstance(video.file, bytes) else str(video.file)
        names.append(f"{file} {video.start} {video.end} {video.fps}")
    return _hash("\0".join([conversation.id, *texts, *names, conversation.error]).encode(errors="surrogatepass"))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
