"""Template report before a run: one sample as the model sees it, and mismatches between template and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vtprune_train.config.data import DataConfig
from vtprune_train.config.settings import Config
from vtprune_train.data.auto_template import AUTO, AutoTemplate
from vtprune_train.data.chat import ChatEncoder, Template, get_template
from vtprune_train.data.images import UNREADABLE
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.records import Conversation, Prompt, read_records
from vtprune_train.data.sources import is_here
from vtprune_train.data.sources.base import Bounds
from vtprune_train.data.templates import (
    build_encoder,
    describe_sample,
    misfits,
    open_auto_template,
    saved_chat_template,
)
from vtprune_train.data.turns import Turn
from vtprune_train.models.families.base import Loop
from vtprune_train.models.families.layout import ImageLayout, Visual
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.io.tokenizer import load_tokenizer
from vtprune_train.training.loop.layout import has_videos

NO_CHECKPOINT = f"data.template={AUTO}: model.config names no checkpoint with a chat template; use a named template"
LOOKED_AT = 100  # number of records to try until one can be shown


def template_of(data: DataConfig) -> Template | None:
    """The template with the run's system prompt; ``None`` for the checkpoint's chat template."""
    if data.template == AUTO:
        return None
    template = get_template(data.template)
    return template if data.system is None else replace(template, default_system=data.system)


def open_encoder(
    config: Config, tokenizer: PreTrainedTokenizerBase, loop: Loop, *, offline: bool = False
) -> ChatEncoder:
    """The run's encoder. ``offline``: do not access the hub (dry runs).

    Raises:
        ValueError: template and tokenizer are incompatible, or the checkpoint has no usable chat template.
    """
    template: Template | AutoTemplate | None = template_of(config.data)
    if template is None:
        name = config.model.path or config.model.tokenizer or config.model.language_model
        if name is None:
            raise ValueError(NO_CHECKPOINT)
        place = resolve_checkpoint(name)
        template = open_auto_template(tokenizer, loop, place, offline=offline, videos=has_videos(config))
    position, tokenization = config.data.image_position, config.data.tokenization
    return build_encoder(template, tokenizer, loop, position, tokenization, videos=has_videos(config))


def training_texts(template: Template | None, turns: Sequence[Turn]) -> Iterator[str]:
    """The texts of a conversation, for tokenizer training."""
    if template is None:
        raise ValueError(NO_CHECKPOINT)
    return (text for text, _ in template.pieces(turns))


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
    try:
        visuals = collate.index.visuals(0, files, collate.layout, collate.max_image_pixels)
    except UNREADABLE as error:
        return f"sample {record.id} is not shown: {error}"
    return _described(collate.encoder, collate.layout, record, visuals, "sample")


def sample_lines(config: Config, loop: Loop, layout: ImageLayout) -> list[str]:
    """Like first_sample, plus template mismatches, but before anything is built; requires data and tokenizer to be
    available locally. Raises ``ValueError`` if template and tokenizer are incompatible or no record can be used."""
    readable = _readable(config, layout)
    first = next(readable, None)
    if first is None:
        return ["sample        not shown: no record with readable images and videos found"]
    template, turns = template_of(config.data), first[0].turns
    try:
        folder = config.run_dir / "tokenizer"
        tokenizer = load_tokenizer(config.model, lambda: training_texts(template, turns), folder, offline=True)
    except ValueError as error:
        return [f"sample        not shown: {error}"]
    encoder = open_encoder(config, tokenizer, loop, offline=True)
    lines = [f"WARNING       {line}" for line in template_misfits(config, encoder, offline=True)]
    reasons = []
    for record, sizes in chain([first], readable):
        try:
            shown = _described(encoder, layout, record, sizes, "sample       ")
        except ValueError as error:
            reasons.append(f"{record.id}: {error}")
        else:
            refused = f"WARNING       {len(reasons)} record(s) cannot be used, first: {reasons[0]}" if reasons else ""
            return [*lines, *filter(None, [refused]), shown]
    if not config.data.max_bad >= len(reasons) >= LOOKED_AT:  # otherwise later records may be usable
        raise ValueError(f"none of the first {len(reasons)} record(s) can be used. First: {reasons[0]}")
    return [*lines, f"sample        not shown: none of {len(reasons)} records can be used, first: {reasons[0]}"]


def _readable(config: Config, layout: ImageLayout) -> Iterator[tuple[Conversation, list[Visual]]]:
    """First records of the training data with readable images and videos, and their sizes."""
    for source in config.sources("train"):
        if not is_here(Path(source.path)):
            continue
        prompt = Prompt(**source.prompt.model_dump())
        bounds = Bounds(config.data.max_record_bytes, config.data.max_text_bytes)
        chat = config.data.template == AUTO
        records = read_records(Path(source.path), source.ignore, bounds, source.reader or "", chat=chat)
        for record in islice(records, LOOKED_AT):
            if record.error or (record.videos and source.videos is None):
                continue
            try:
                files = record.files(Path(source.images), Path(source.videos or source.images))
                visuals = [file.visual(layout, config.data.max_image_pixels) for file in files]
            except ValueError:  # also of videos that cannot be sampled; indexing reports them
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
