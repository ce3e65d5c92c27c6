"""The questions of an evaluation: every assistant turn of a data file, with the reference conversation before it."""

from __future__ import annotations

import glob
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.chat import Turn
from vtprune_train.data.records import NO_PROMPT, Conversation, Prompt, read_records
from vtprune_train.data.turns import TOOLS
from vtprune_train.data.visuals import VisualFile


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        key: ``row:turn:id``, unique within the file.
        sample: the record's id.
        turns: the conversation up to the question, with the reference answers.
        images: the images in these turns, in order.
        reference: the reference answer.
        videos: the videos in these turns, in order.
    """

    key: str
    sample: str
    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...]
    reference: str
    videos: tuple[VisualFile, ...] = ()


def read_questions(
    data: Path,
    images: Path,
    limit: int | None = None,
    seed: int = 0,
    ignore: Collection[str] = (),
    prompt: Prompt = NO_PROMPT,
    reader: str = "",
    chat: bool = False,
    *,
    videos: Path | None = None,
) -> tuple[list[Question], list[tuple[str, str]]]:
    """The questions of a file in one of the formats of :mod:`vtprune_train.data.records`, and ``(id, reason)`` of
    records of which something is left out: malformed ones, and answers that call tools.

    Args:
        data: a data file of any kind that training supports.
        images: folder of its images.
        limit: number of records, drawn by ``seed``, in the order of the file; ``None`` for all.
        seed: seed of the draw.
        ignore: fields and markers that are accepted, see :func:`vtprune_train.data.records.normalize`.
        prompt: added to each conversation, see :func:`vtprune_train.evaluation.answering.recorded_prompt`.
        reader: path of a reader outside the package.
        chat: see :func:`vtprune_train.data.records.normalize`.
        videos: folder of its videos; ``None`` if records with videos are left out.

    Raises:
        ValueError: the file cannot be read, ``limit`` is below 1, there is no question, or no image is in ``images`` or
            no video in ``videos``.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit={limit}: must be at least 1; leave it out for all records")
    if not glob.has_magic(str(data)) and not data.exists():
        raise ValueError(f"--data {data} does not exist")
    selected = None
    if limit is not None:
        count = sum(1 for _ in read_records(data, ignore, reader=reader, chat=chat))
        selected = set(np.random.default_rng(seed).permutation(count)[:limit].tolist())
    questions: list[Question] = []
    left_out: list[tuple[str, str]] = []
    num_records = 0
    for number, row in enumerate(read_records(data, ignore, reader=reader, chat=chat)):
        if selected is not None and number not in selected:
            continue
        num_records += 1
        if row.error:
            left_out.append((row.id, row.error))
        elif row.videos and videos is None:
            left_out.append((row.id, "it has a video, but no folder of videos is given (`vtprune eval --videos DIR`)"))
        else:
            row = prompt.apply(row)
            questions += _questions_of(number, row, images, videos or images)
            if turns := _turns_with_calls(row):
                left_out.append((row.id, f"turn(s) {turns} call tools; only answers in text are compared"))
    if not questions:
        first = f"; the first is left out: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"data file {data} has no question in {num_records} record(s){first}")
    if any(isinstance(image, Path) for question in questions for image in question.images) and not images.is_dir():
        raise ValueError(f"--images {images} is not a folder; it must be the folder of the images that {data} names")
    files = {image for question in questions for image in question.images if isinstance(image, Path)}
    if files and not any(file.exists() for file in files):
        raise ValueError(
            f"--images {images}: none of the {len(files)} images that {data} names exists; the first: {min(files)}"
        )
    clips = {video.source for question in questions for video in question.videos if isinstance(video.source, Path)}
    if clips and not any(clip.exists() for clip in clips):
        raise ValueError(
            f"--videos {videos}: none of the {len(clips)} videos that {data} names exists; the first: {min(clips)}"
        )
    return questions, left_out


def _questions_of(number: int, row: Conversation, images: Path, videos: Path) -> list[Question]:
    files = row.image_files(images)
    clips = [file for file in row.files(images, videos) if file.is_video]
    questions = []
    for place, turn in enumerate(row.turns):
        if turn.role == "assistant" and not turn.is_prefix and not turn.calls_tools:
            before = row.turns[:place]
            num_images, num_videos = (
                sum(earlier.text.count(mark) for earlier in before if earlier.role in ("user", "tool"))
                for mark in (IMAGE, VIDEO)
            )
            key = f"{number}:{place}:{row.id}"
            questions.append(
                Question(key, row.id, before, tuple(files[:num_images]), turn.text, tuple(clips[:num_videos]))
            )
    return questions


def _turns_with_calls(row: Conversation) -> str:
    """The numbers of the turns that call tools."""
    spoken = [turn for turn in row.turns if turn.role != TOOLS]
    return ", ".join(str(number) for number, turn in enumerate(spoken, 1) if turn.calls_tools)


def as_answered(reference: str, tokenizer: Any) -> str:
    """A reference answer as it would be decoded, without special tokens (``<|box_start|>``)."""
    if not any(token in reference for token in tokenizer.all_special_tokens):
        return reference
    return tokenizer.decode(tokenizer.encode(reference, add_special_tokens=False), skip_special_tokens=True)


def normalized(answer: str) -> str:
    """An answer normalized for exact match: lower case, without surrounding spaces and a final period."""
    return answer.strip().lower().removesuffix(".").rstrip()
