"""Tokenizers that keep their ids when they are saved and opened again."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PROBES = ("A cat.", " A cat", "\nWhat?  Two\n\ncats", "1234 é 你好", "it's   x ")


def lasting(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, or one with the same ids that keeps them when it is saved beside ``config`` and opened again.

    Some classes of transformers build their tokenizer again from vocabulary and merges and do not save every setting
    that they were made with (``LlamaTokenizer`` forgets ``legacy``).

    Raises:
        ValueError: it is opened with other ids in any case.
    """
    expected = _probe(tokenizer, tokenizer)
    if _probe(_reopened(tokenizer, config), tokenizer) == expected:
        return tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        kept = _as_file(tokenizer)
        if _probe(_reopened(kept, config), tokenizer) == expected:
            return kept
    raise ValueError(
        f"the tokenizer ({type(tokenizer).__name__}) gives other ids after it was saved and opened again, so the model "
        "would be prompted with ids that it was not trained on; save it as a PreTrainedTokenizerFast and set "
        "model.tokenizer to that folder"
    )


def _probe(tokenizer: PreTrainedTokenizerBase, marks_of: PreTrainedTokenizerBase) -> list[list[int]]:
    marks = [token for token in (marks_of.bos_token, marks_of.eos_token, *marks_of.all_special_tokens[-2:]) if token]
    texts = [*PROBES, *(mark.join(("", *PROBES, "")) for mark in marks)]
    return [tokenizer.encode(text, add_special_tokens=added) for text in texts for added in (False, True)]


def _reopened(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # The class that opens it depends on the model beside it.
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": config.model_type}))
        return AutoTokenizer.from_pretrained(folder)


def _as_file(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer in the class that opens ``tokenizer.json`` as it is."""
    left_out = ("vocab", "merges", "backend", "tokenizer_object", "tokenizer_file", "vocab_file", "merges_file")
    settings: dict[str, Any] = {key: value for key, value in tokenizer.init_kwargs.items() if key not in left_out}
    named = tokenizer.special_tokens_map
    others = [token for token in tokenizer.all_special_tokens if token not in named.values()]
    kept = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{**settings, **named, "additional_special_tokens": others}
    )
    kept.chat_template, kept.padding_side = tokenizer.chat_template, tokenizer.padding_side
    return kept
