"""Template report before a run: one sample as the model sees it, and mismatches between template and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vtprune_train.config.data import DataConfig
from vtprune_train.config.settings import Config
from vtprune_train.data.chat import ChatEncoder, Template, get_template
from vtprune_train.data.images import UNREADABLE
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.records import Conversation, Prompt, read_records
from vtprune_train.data.sources import is_here
from vtprune_train.data.sources.base import Bounds
from vtprune_train.data.templates import build_encoder, describe_sample, misfits, saved_chat_template
from vtprune_train.models.families.base import Loop
from vtprune_train.models.families.layout import ImageLayout, Visual
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.io.tokenizer import load_tokenizer
from vtprune_train.training.loop.layout import has_videos

LOOKED_AT = 100  # number of records to try until one can be shown


def template_of(data: DataConfig) -> Template:
    """The template with the run's system prompt."""
    template = get_template(data.template)
    return template if data.system is None else replace(template, default_system=data.system)


def template_misfits(config: Config, encoder: ChatEncoder, *, offline: bool = False) -> list[str]:
    """See :func:`vtprune_train.data.templates.misfits`; empty for a tokenizer trained for the run. ``offline``: do not
    access the hub (dry runs)."""
    key = next((key for key in ("path", "tokenizer", "language_model") if getattr(config.model, key) is not None), None)
    if key is None:
        return list(misfits(encoder, None, "this run"))
    name = getattr(config.model, key)
    saved = saved_chat_template(encoder.tokenizer, resolve_checkpoint(name), offline=offline)
    return list(misfits(encoder, saved, f"model.{key}={name}"))


def first_sample(collate: Collator) -> str:
    """The first sample of the training data, for the log."""
    record = collate.index.record(0)
    files = collate.index.files(0, record)
    visuals = collate.index.visuals(0, files, collate.layout, collate.max_image_pixels)
    return _described(collate.encoder, collate.layout, record, visuals, "sample")


def sample_lines(config: Config, loop: Loop, layout: ImageLayout) -> list[str]:
    """Like first_sample, plus template mismatches, but before anything is built; requires data and tokenizer to be
    available locally. Raises ``ValueError`` if template and tokenizer are incompatible."""
    readable = next(_readable(config, layout), None)
    if readable is None:
        return ["sample        not shown: no record with readable images found"]
    record, sizes = readable
    template = template_of(config.data)
    texts = [text for text, _ in template.pieces(record.turns)]
    try:
        tokenizer = load_tokenizer(config.model, lambda: texts, config.run_dir / "tokenizer", offline=True)
    except ValueError as error:
        return [f"sample        not shown: {error}"]
    encoder = build_encoder(
        template, tokenizer, loop, config.data.image_position, config.data.tokenization, videos=has_videos(config)
    )
    lines = [f"WARNING       {line}" for line in template_misfits(config, encoder, offline=True)]
    return [*lines, _described(encoder, layout, record, sizes, "sample       ")]


def _readable(config: Config, layout: ImageLayout) -> Iterator[tuple[Conversation, list[Visual]]]:
    """First records of the training data with readable images and videos, and their sizes."""
    for source in config.sources("train"):
        if not is_here(Path(source.path)):
            continue
        prompt = Prompt(**source.prompt.model_dump())
        bounds = Bounds(config.data.max_record_bytes, config.data.max_text_bytes)
        records = read_records(Path(source.path), source.ignore, bounds, source.reader or "")
        for record in islice(records, LOOKED_AT):
            if record.error or (record.videos and source.videos is None):
                continue
            try:
                files = record.files(Path(source.images), Path(source.videos or source.images))
                visuals = [file.visual(layout, config.data.max_image_pixels) for file in files]
            except UNREADABLE:
                continue
            yield prompt.apply(record), visuals


def _described(
    encoder: ChatEncoder, layout: ImageLayout, record: Conversation, visuals: list[Visual], title: str
) -> str:
    chat = encoder.encode(record.turns, layout.texts(visuals, encoder.placeholder))
    runs = [length for of in layout.visual_tokens(visuals) for length in of.runs]
    tokens = len(chat.input_ids) - len(runs) + sum(runs)
    supervised = int((chat.labels >= 0).sum())
    text = describe_sample(encoder, chat, runs)
    return f"{title} {record.id}: {tokens} tokens, {supervised} supervised (between [[ and ]]):\n{text}"
