"""The text of a sample's instruction, for methods that compare it with images (:attr:`Needs.question`). Host only."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np

from vtprune_train.core.plan import instruction_rows
from vtprune_train.core.stream import SegmentLayout


def with_question(segment: SegmentLayout, ids: np.ndarray, tokenizer: Any) -> SegmentLayout:
    """Add the text between the last image and the next answer to the layout of a sample.

    Args:
        segment: the layout of the sample.
        ids: [length] int64, its token ids.
        tokenizer: the model's tokenizer.
    """
    if not segment.spans:
        return segment
    text = tokenizer.decode(ids[instruction_rows(segment)].tolist(), skip_special_tokens=True)
    return dataclasses.replace(segment, question=text.strip())


@cache
def tokenizer_at(path: str | None, reader: str) -> Any:
    """The tokenizer that was saved with a model.

    Args:
        path: where the model was loaded from; ``None`` if it was not loaded from anywhere.
        reader: the method that reads the question, for the message.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    fix = "save the tokenizer with the model (tokenizer.save_pretrained), and load the model from that folder"
    if path is None:
        raise ValueError(f"{reader} reads the question, but the model was not loaded from a folder or the Hub; {fix}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{reader} reads the question, but {path} has no tokenizer ({reason}); {fix}") from error
