"""Tokenizers of every kind, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vtprune_train.data.chat import LLAMA_3_SYSTEM, VICUNA_SYSTEM

MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    VICUNA_SYSTEM,
    LLAMA_3_SYSTEM,
    "What is this? A red cat. And that? Two dogs, I think. USER: ASSISTANT: [INST] [/INST] user assistant system Q: A:",
    "the left one is red, the right one 12345 is blue.\n\nYes.\nNo  \n",
] * 3
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SPACE = "\u2581"


def fast(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**NAMED, **settings})


def with_marks(tokenizer: PreTrainedTokenizerBase, **image: Any) -> PreTrainedTokenizerBase:
    """With an image token that has these flags, and the marks of the templates."""
    tokens = [AddedToken("<image>", special=True, normalized=False, **image), *MARKS]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def byte_level(
    pattern: str | None = None, prefix: bool = False, normalizer: Any = None, adds_bos: bool = False, **image: Any
) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte]) if split else byte
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(NAMED.values())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return with_marks(fast(backend), **image)


@cache
def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE with SentencePiece's spaces and bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(NAMED.values()), show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = dict(model["vocab"])
    for piece in (SPACE, SPACE * 2, *(f"<0x{byte:02X}>" for byte in range(256))):
        vocab.setdefault(piece, len(vocab))
    return vocab, [*(tuple(pair) for pair in model["merges"]), (SPACE, SPACE)]


def sentencepiece(
    scheme: str | None, normalizer: Any = None, split: bool = False, adds_bos: bool = False, **image: Any
) -> PreTrainedTokenizerBase:
    vocab, merges = _pieces()
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if scheme is not None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=split)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return with_marks(fast(backend), **image)


def unigram() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(NAMED.values()), unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return with_marks(fast(backend))


def llama(**settings: Any) -> PreTrainedTokenizerBase:
    """The class that transformers opens Llama's and Vicuna's with."""
    vocab, merges = _pieces()
    return with_marks(LlamaTokenizer(vocab=dict(vocab), merges=list(merges), **settings))


LEGACY_FILE = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "gpt2": byte_level,
    "gpt2-prefix": lambda: byte_level(prefix=True),
    "llama3": lambda: byte_level(LLAMA_3),
    "llama3-adds-bos": lambda: byte_level(LLAMA_3, adds_bos=True),
    "qwen": lambda: byte_level(LLAMA_3, normalizer=normalizers.NFC()),
    "gpt2-image-lstrip": lambda: byte_level(lstrip=True),
    "gpt2-image-rstrip": lambda: byte_level(rstrip=True),
    "llama-new": llama,
    "llama-legacy": lambda: llama(legacy=True),
    "llama-no-prefix": lambda: llama(add_prefix_space=False),
    "llama-adds-bos": lambda: llama(add_bos_token=True),
    "legacy-file": lambda: sentencepiece(None, LEGACY_FILE),
    "legacy-file-adds-bos": lambda: sentencepiece(None, LEGACY_FILE, adds_bos=True),
    "always": lambda: sentencepiece("always"),
    "first": lambda: sentencepiece("first"),
    "first-split": lambda: sentencepiece("first", split=True),
    "never": lambda: sentencepiece("never"),
    "first-image-lstrip": lambda: sentencepiece("first", lstrip=True),
    "always-image-rstrip": lambda: sentencepiece("always", rstrip=True),
    "unigram": unigram,
}
