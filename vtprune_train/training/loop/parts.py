"""Build a run's tokenizer, model and processor, and its cost model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from vtprune_train.config.settings import Config
from vtprune_train.core.flops import DecoderGeometry, TrainingCost
from vtprune_train.data.chat import ChatEncoder
from vtprune_train.data.jinja import written_by
from vtprune_train.data.records import Prompt, read_records
from vtprune_train.data.sources.base import Bounds
from vtprune_train.data.templates import carry, stop_where_answers_end
from vtprune_train.files.checksums import MANIFEST, damage, seal_as_it_is
from vtprune_train.files.disk import locked, naming, publish, remove
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import required
from vtprune_train.models.families.layout import ImageLayout
from vtprune_train.models.io.build import family_of_config, first_line
from vtprune_train.models.io.peft import open_model
from vtprune_train.models.io.placement import WHOLE, Placement
from vtprune_train.models.io.processors import build_processor
from vtprune_train.models.io.tokenizer import load_tokenizer
from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.layout import build_layout, has_videos
from vtprune_train.training.loop.sample import open_encoder, template_misfits, template_of, training_texts

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """Model, processor, conversation encoder and image layout."""

    model: HFModule
    processor: Any
    encoder: ChatEncoder
    layout: ImageLayout


def build_parts(config: Config, placement: Placement = WHOLE) -> Parts:
    """Tokenizer, model and processor."""
    tokenizer = _tokenizer(config)
    model = open_model(config.model, tokenizer, placement)
    _, loop = family_of_config(model.config)
    encoder = open_encoder(config, tokenizer, loop)
    if ranks.rank() == 0:
        for line in template_misfits(config, encoder):
            log.warning("%s", line)
    video = config.data.video.model_dump() if has_videos(config) else None
    processor = build_processor(model.config, tokenizer, config.model.path, config.model.max_pixels, video)
    carry(processor, written_by(encoder, loop))
    stop_where_answers_end(model, tokenizer, encoder.template, warn=ranks.rank() == 0)
    layout = build_layout(config, loop, model.config, processor.image_processor, config.model.path)
    return Parts(model, processor, encoder, layout)


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The run's tokenizer. If it has to be trained, ranks of one machine take turns; a damaged one is retrained from
    the same data."""
    folder = config.run_dir / "tokenizer"

    def load() -> PreTrainedTokenizerBase:
        return load_tokenizer(config.model, lambda: all_training_texts(config), folder)

    if config.model.config is None:
        return load()
    with locked(config.run_dir / "tokenizer.lock"):
        if folder.exists() and (damaged := _tokenizer_damage(folder)):
            log.warning("the tokenizer in %s is damaged (%s); training it again", folder, damaged)
            remove(folder)
        tokenizer = load()
        if not folder.is_dir():
            temporary = folder.with_name("tokenizer.tmp")
            remove(temporary)
            with naming(temporary):
                tokenizer.save_pretrained(str(temporary))
            seal_as_it_is(temporary)
            publish(temporary, folder)
            tokenizer = load()  # so that every rank exports identical files, regardless of which rank trained it
    return tokenizer


def _tokenizer_damage(folder: Path) -> str:
    """Describe the damage of a run's tokenizer; empty if it is intact."""
    if (folder / MANIFEST).exists():
        return damage(folder)
    try:  # older versions wrote no manifest
        AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception
        return f"{MANIFEST} is missing, and it cannot be loaded: {first_line(error)}"
    return ""


def all_training_texts(config: Config) -> Iterator[str]:
    """Yield all training conversations formatted with the template, for tokenizer training."""
    template = template_of(config.data)
    for source in config.sources("train"):
        prompt = Prompt(**source.prompt.model_dump())
        bounds = Bounds(config.data.max_record_bytes, config.data.max_text_bytes)
        for record in read_records(Path(source.path), source.ignore, bounds, source.reader or ""):
            if not record.error:
                yield from training_texts(template, prompt.apply(record).turns)


def training_cost(config: Config, model_config: PreTrainedConfig) -> TrainingCost:
    """Build the FLOP model for this model and its trained parts."""
    decoder, peft = DecoderGeometry.of(model_config.text_config), config.model.peft
    return TrainingCost(
        decoder,
        required(family_of_config(model_config)[0].flops, "training")(model_config),
        trains_decoder="language_model" in config.model.train,
        trains_tower="vision_tower" in config.model.train,
        trains_projector="projector" in config.model.train,
        adapter=decoder.adapter_per_token(peft.r, peft.target_modules) if peft else 0.0,
    )
