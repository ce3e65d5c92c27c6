"""Loads or trains the tokenizer of a model, with the image token, and ensures that saving it preserves its ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vtprune_train.config.model import ModelConfig
from vtprune_train.core.stream import IMAGE
from vtprune_train.models.families.base import Family, Loop
from vtprune_train.models.io.build import family_of_config, first_line, load_model_config, resolve_checkpoint

Texts = Callable[[], Iterable[str]]
PROBES = ("A cat.", " A cat", "\nWhat?  Two\n\ncats", "1234 é 你好", "it's   x ")


def load_tokenizer(
    config: ModelConfig, texts: Texts, folder: Path, *, offline: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the family's image token as one token (``<image>`` is added if it is missing).

    Args:
        config: the ``model`` section of the settings.
        texts: returns texts to train a tokenizer on, for a model from sizes without a tokenizer.
        folder: folder of a tokenizer that was trained earlier.
        offline: do not access the hub (dry runs).

    Raises:
        ValueError: there is no config or no tokenizer, or they do not fit each other.
    """
    model_config = load_model_config(config, offline=offline)
    source = config.tokenizer or (resolve_checkpoint(config.path) if config.path else config.language_model)
    if source is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
        except (OSError, ValueError) as error:
            way_out = "correct" if config.tokenizer else "set"
            raise ValueError(
                f"no readable tokenizer in {source} ({first_line(error)}); {way_out} model.tokenizer"
            ) from error
    elif folder.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    else:
        assert config.config is not None
        _, loop = family_of_config(model_config)
        vocab_size = int(config.config.get("text_config", {})["vocab_size"])
        tokenizer = train_tokenizer(texts(), vocab_size, loop.visual_tokens)
    _ensure_image_token(tokenizer, *family_of_config(model_config), str(source))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return lasting(tokenizer, model_config)


def _ensure_image_token(tokenizer: PreTrainedTokenizerBase, family: Family, loop: Loop, source: str) -> None:
    if loop.image_token in tokenizer.get_vocab():
        return
    if loop.image_token != IMAGE:
        raise ValueError(
            f"the tokenizer in {source} has no {loop.image_token}, the image token of a {family.model_type}; set "
            "model.tokenizer to that of the checkpoint"
        )
    add_image_token(tokenizer)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add ``<image>`` as a token, if it is missing."""
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, visual_tokens: Sequence[str] = (IMAGE,)
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` tokens; each of ``visual_tokens`` is one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", *visual_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(visual_tokens),
    )


def lasting(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, or an equivalent one that has the same ids after it is saved with ``config`` and loaded again.

    Some classes of transformers rebuild the tokenizer from vocabulary and merges and do not save all of their settings
    (``LlamaTokenizer`` does not save ``legacy``).

    Raises:
        ValueError: the ids differ after saving and loading, also as a fast tokenizer.
    """
    expected = _probe(tokenizer, tokenizer)
    if _probe(_reopened(tokenizer, config), tokenizer) == expected:
        return tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        fast = _as_fast(tokenizer)
        if _probe(_reopened(fast, config), tokenizer) == expected:
            return fast
    raise ValueError(
        f"the tokenizer ({type(tokenizer).__name__}) gives other ids after it is saved and loaded again, so the model "
        "would be prompted with ids that it was not trained on; save it as a PreTrainedTokenizerFast and set "
        "model.tokenizer to that folder"
    )


def _probe(tokenizer: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of test texts, also with special tokens of ``original`` between them."""
    special = [token for token in (original.bos_token, original.eos_token, *original.all_special_tokens[-2:]) if token]
    texts = [*PROBES, *(token.join(("", *PROBES, "")) for token in special)]
    return [tokenizer.encode(text, add_special_tokens=added) for text in texts for added in (False, True)]


def _reopened(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # The class that AutoTokenizer chooses depends on the model in the folder.
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": config.model_type}))
        return AutoTokenizer.from_pretrained(folder)


def _as_fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer as a ``PreTrainedTokenizerFast``, which loads ``tokenizer.json`` without changes."""
    skipped = ("vocab", "merges", "backend", "tokenizer_object", "tokenizer_file", "vocab_file", "merges_file")
    settings: dict[str, Any] = {key: value for key, value in tokenizer.init_kwargs.items() if key not in skipped}
    named = tokenizer.special_tokens_map
    others = [token for token in tokenizer.all_special_tokens if token not in named.values()]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{**settings, **named, "additional_special_tokens": others}
    )
    fast.chat_template, fast.padding_side = tokenizer.chat_template, tokenizer.padding_side
    return fast
