"""What a run says of its template before it starts: one sample as the model gets it, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from vtprune_train.config.data import DataConfig
from vtprune_train.config.settings import Config
from vtprune_train.data.chat import ChatEncoder, Template, get_template
from vtprune_train.data.images import UNREADABLE, image_size
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.records import Conversation, Prompt, read_records
from vtprune_train.data.sources import is_here
from vtprune_train.data.sources.base import Bounds
from vtprune_train.data.templates import build_encoder, misfits, saved_chat_template, shown_sample
from vtprune_train.models.families.base import Loop
from vtprune_train.models.families.layout import ImageLayout
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.io.tokenizer import load_tokenizer

LOOKED_AT = 100  # records of the first file, for one that can be shown


def template_of(data: DataConfig) -> Template:
    """The template with the run's own system prompt."""
    template = get_template(data.template)
    return template if data.system is None else replace(template, default_system=data.system)


def template_misfits(config: Config, encoder: ChatEncoder, *, offline: bool = False) -> list[str]:
    """See :func:`vtprune_train.data.templates.misfits`; nothing for a tokenizer that was trained for the run.
    ``offline``: ask no hub (dry runs)."""
    key = next((key for key in ("path", "tokenizer", "language_model") if getattr(config.model, key) is not None), None)
    if key is None:
        return list(misfits(encoder, None, "this run"))
    name = getattr(config.model, key)
    saved = saved_chat_template(encoder.tokenizer, resolve_checkpoint(name), offline=offline)
    return list(misfits(encoder, saved, f"model.{key}={name}"))


def first_sample(collate: Collator) -> str:
    """The first sample of the training data, for the log."""
    record = collate.index.record(0)
    return _described(collate.encoder, collate.layout, record, collate.index.picture_sizes(0), "sample")


def sample_lines(config: Config, loop: Loop, layout: ImageLayout) -> list[str]:
    """The same before anything is built, and what does not fit; where data and tokenizer are on this machine. A
    ``ValueError`` if template and tokenizer do not go together."""
    found = next(_readable(config), None)
    if found is None:
        return ["sample        not shown: no record with readable pictures is here"]
    record, sizes = found
    template = template_of(config.data)
    texts = [text for text, _ in template.pieces(record.turns)]
    try:
        tokenizer = load_tokenizer(config.model, lambda: texts, config.run_dir / "tokenizer", offline=True)
    except ValueError as error:
        return [f"sample        not shown: {error}"]
    encoder = build_encoder(template, tokenizer, loop, config.data.image_position, config.data.tokenization)
    lines = [f"WARNING       {line}" for line in template_misfits(config, encoder, offline=True)]
    return [*lines, _described(encoder, layout, record, sizes, "sample       ")]


def _readable(config: Config) -> Iterator[tuple[Conversation, list[Any]]]:
    """Records at the beginning of the training data, with the sizes of their pictures."""
    for source in config.sources("train"):
        if not is_here(Path(source.path)):
            continue
        prompt = Prompt(**source.prompt.model_dump())
        bounds = Bounds(config.data.max_record_bytes, config.data.max_text_bytes)
        for record in islice(read_records(Path(source.path), source.ignore, bounds), LOOKED_AT):
            if record.error:
                continue
            try:
                pictures = record.pictures(Path(source.images))
                sizes = [image_size(picture, max_pixels=config.data.max_image_pixels) for picture in pictures]
            except UNREADABLE:
                continue
            yield prompt.apply(record), sizes


def _described(encoder: ChatEncoder, layout: ImageLayout, record: Conversation, sizes: list[Any], title: str) -> str:
    chat = encoder.encode(record.turns)
    image_tokens = layout.tokens(sizes) if sizes else []
    tokens = len(chat.input_ids) - len(image_tokens) + sum(image_tokens)
    supervised = int((chat.labels >= 0).sum())
    shown = shown_sample(encoder, chat, image_tokens)
    return f"{title} {record.id}: {tokens} tokens, {supervised} of them supervised, between [[ and ]]:\n{shown}"
