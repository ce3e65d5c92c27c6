"""What an evaluation asks: every assistant turn of a data file, with the true history before it."""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.core.stream import IMAGE
from vtprune_train.data.chat import Turn
from vtprune_train.data.records import NO_PROMPT, Prompt, read_records


@dataclass(frozen=True)
class Question:
    """One answer to give.

    Args:
        key: ``row:turn:id``, unique within the file.
        sample: the record's own id.
        turns: the conversation up to the question, true answers in between.
        images: the images in these turns, in order.
        reference: the true answer.
    """

    key: str
    sample: str
    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...]
    reference: str


def read_questions(
    data: Path,
    images: Path,
    limit: int | None = None,
    seed: int = 0,
    ignore: Collection[str] = (),
    prompt: Prompt = NO_PROMPT,
    reader: str = "",
) -> tuple[list[Question], list[tuple[str, str]]]:
    """The questions of a file in the forms of :mod:`vtprune_train.data.records`, and ``(id, reason)`` of malformed
    records.

    Args:
        data: a data file of any kind that training reads.
        images: the folder that its images are relative to.
        limit: records to take, drawn by ``seed``, in the file's order; all of them for ``None``.
        seed: of the draw.
        ignore: fields and marks that change nothing, see :func:`vtprune_train.data.records.normalize`.
        prompt: added to each conversation, see :func:`vtprune_train.evaluation.answering.recorded_prompt`.
        reader: path of a reader outside the package.

    Raises:
        ValueError: the file cannot be read, ``limit`` is below 1, there is nothing to ask, or none of the images is
            in ``images``.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit={limit}: take at least 1 record, or leave it out for all")
    if not glob.has_magic(str(data)) and not data.exists():
        raise ValueError(f"--data {data} does not exist")
    chosen = None
    if limit is not None:
        count = sum(1 for _ in read_records(data, ignore, reader=reader))
        chosen = set(np.random.default_rng(seed).permutation(count)[:limit].tolist())
    questions: list[Question] = []
    malformed: list[tuple[str, str]] = []
    asked = 0
    for number, row in enumerate(read_records(data, ignore, reader=reader)):
        if chosen is not None and number not in chosen:
            continue
        asked += 1
        if row.error:
            malformed.append((row.id, row.error))
        else:
            questions += _questions_of(number, row.id, prompt.apply(row).turns, row.image_files(images))
    if not questions:
        first = f"; the first is malformed: {malformed[0][1]}" if malformed else ""
        raise ValueError(f"data file {data} holds no question to ask among {asked} record(s){first}")
    if any(isinstance(image, Path) for question in questions for image in question.images) and not images.is_dir():
        raise ValueError(f"--images {images} is no folder; it holds the pictures that {data} names")
    files = {image for question in questions for image in question.images if isinstance(image, Path)}
    if files and not any(file.exists() for file in files):
        raise ValueError(
            f"--images {images}: none of the {len(files)} images that {data} names is there; the first: {min(files)}"
        )
    return questions, malformed


def _questions_of(number: int, sample: str, turns: Sequence[Turn], images: list[Path | bytes]) -> list[Question]:
    questions = []
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            before = tuple(turns[:place])
            seen = sum(earlier.text.count(IMAGE) for earlier in before if earlier.role == "user")
            key = f"{number}:{place}:{sample}"
            questions.append(Question(key, sample, before, tuple(images[:seen]), turn.text))
    return questions


def as_answered(reference: str, tokenizer: Any) -> str:
    """A true answer without special tokens (``<|box_start|>``), as answers are decoded."""
    if not any(token in reference for token in tokenizer.all_special_tokens):
        return reference
    return tokenizer.decode(tokenizer.encode(reference, add_special_tokens=False), skip_special_tokens=True)


def normalized(answer: str) -> str:
    """An answer as exact match compares it: without outer space, lower case, without one final full stop."""
    return answer.strip().lower().removesuffix(".").rstrip()
