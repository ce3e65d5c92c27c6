"""The definition of a model family. A new family is one file that creates a :class:`Family`, and its line in
``__init__.py``; start from ``qwen2_vl.py``.

A part that a family does not have is a :class:`Lacks` with the reason, which appears in the error of the command that
needs the part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from transformers import PreTrainedConfig

from vtprune_train.core.flops import PatchTowerGeometry, TowerGeometry
from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.models import HFModule
from vtprune_train.models.families.layout import Grids, ImageGeometry, ImageLayout, Size, TokenPatches
from vtprune_train.models.families.places import Places
from vtprune_train.models.families.towers import SavedByTower
from vtprune_train.models.families.videos import VideoSettings

if TYPE_CHECKING:
    from vtprune_train.pruning.base import PruningMethod

log = logging.getLogger(__name__)

Part = TypeVar("Part")

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # language models
LENGTH_DEPENDENT_ROPE = ("longrope",)
NO_BALANCE = (
    "the training loop does not add the load-balancing loss of the experts, and cannot predict their memory; train it "
    "with transformers' Trainer"
)
NO_VIDEO = "it has no video tokens; pass the frames of a video as images"


@dataclass(frozen=True)
class Lacks:
    """Replaces a part that a family does not have; ``why`` is the reason, for errors."""

    why: str


def required(part: Part | Lacks, what: str) -> Part:
    """Return ``part`` if the family has it.

    Raises:
        ValueError: the family lacks it; ``what`` is the start of the message.
    """
    if isinstance(part, Lacks):
        raise ValueError(f"{what}: {part.why}")
    return part


@dataclass(frozen=True)
class Loop:
    """What the project's training loop needs from a family.

    Args:
        layout: ``(config, image_processor) -> ImageLayout``.
        image_processor: ``config -> image processor`` (transformers' PIL class), for checkpoints without one.
        image_processors: names of the image processor classes that ``layout`` supports, without ``Pil``; ``None`` for
            all.
        saved: ``config -> SavedByTower``, to predict memory.
        vision: prefix of the names of the tower's parameters.
        projector: prefixes of the names of the projector's parameters (may lie within ``vision``).
        untrained: ``(config, name) -> bool``, whether a parameter of the tower gets no gradient; by default, none.
        image_token: the image token in the vocabulary.
        placeholder: text of an image in a prompt; ``<image>`` in it is the image token.
        videos: how videos are sampled and prepared by default; the layout then takes videos.
        video_token: the video token in the vocabulary; empty if frames have the image token.
        template_image, template_video: text of an image and of a video in a chat template, in which ``<image>`` and
            ``<video>`` stand for the tokens that the family's processor expands. ``None``: the ``placeholder``.
        needs_checkpoint: the model cannot be built from parts or from sizes in the YAML.
    """

    layout: Callable[[Any, Any], ImageLayout]
    image_processor: Callable[[Any], Any]
    image_processors: tuple[str, ...] | None
    saved: Callable[[Any], SavedByTower]
    vision: str = "model.vision_tower."
    projector: tuple[str, ...] = ("model.multi_modal_projector.", "model.image_newline")
    untrained: Callable[[Any, str], bool] = lambda config, name: False
    image_token: str = IMAGE
    placeholder: str = IMAGE
    videos: VideoSettings | Lacks = Lacks(NO_VIDEO)
    video_token: str = VIDEO
    template_image: str | None = None
    template_video: str = VIDEO
    needs_checkpoint: bool = False

    @property
    def visual_tokens(self) -> tuple[str, ...]:
        """The image token, and the video token if the family has one."""
        has_video_token = not isinstance(self.videos, Lacks) and self.video_token
        return (self.image_token, self.video_token) if has_video_token else (self.image_token,)


@dataclass(frozen=True)
class Family:
    """A model family: where its decoder is, how its visual tokens are laid out, and what is gathered along with them.

    Args:
        title: name of the family in messages and tables.
        model_type: ``model_type`` of its config.
        model_class: name of the transformers class.
        text_types: ``model_type`` of the supported language models.
        base: the submodule with ``get_image_features`` and ``language_model``, which merges text and image features.
        tower: name of the vision tower's submodule, if the tower splits attention by image grids (``grid_thw``);
            ``None`` for towers that take tiles of one size.
        image_lengths: number of tokens of each entry of ``get_image_features(...).pooler_output``, in placeholder
            order.
        grids: ``(config, inputs of get_image_features) ->`` the grids of each of these entries; empty if unknown.
        videos: ``(config, inputs of get_video_features) ->`` the grids and the number of steps in time of each entry of
            ``get_video_features(...).pooler_output``; grids are empty if unknown.
        patches: ``(config, inputs of get_image_features) ->`` the tower patches of each of these entries, for methods
            that read the tower's attention.
        run_is_one_image: all entries in a contiguous run of image tokens are tiles of one image.
        three_part_positions: ``(base, inputs) -> [3, B, L]`` positions (time, height, width), which start at 0 in each
            row and stay with their tokens; ``None`` if positions are token indices.
        refused: keywords of ``forward`` that a pruned model does not support, with the reason.
        counting: ``config ->`` settings of the processor that determine the number of visual tokens, if the image
            processor alone does not.
        image_settings: settings of the image processor that the family's processor overrides in every call.
        geometry: ``(config, image_processor) -> ImageGeometry``, for ``vtprune show`` and ``estimate``; not needed if
            ``loop`` has a layout.
        samples: ``(inputs, sizes) ->`` the sizes of all images, one list per sample; needed if the layout of an image
            depends on the other images of its sample.
        flops: ``config ->`` sizes of tower and projector, to count FLOPs.
        known: configs of published checkpoints by hub id, for dry runs without network.
        not_original: why ``vtprune convert`` cannot write the format of the original LLaVA code; ``None`` if it can
            (``llava_original_config.py``).
        loop: what the project's training loop needs.
    """

    title: str
    model_type: str
    model_class: str
    text_types: tuple[str, ...]
    base: str = "model"
    tower: str | None = None
    image_lengths: Callable[[Sequence[Any]], list[int]] = lambda images: [len(tokens) for tokens in images]
    grids: Callable[[Any, Mapping[str, Any]], list[Grids]] = lambda config, inputs: []
    patches: Callable[[Any, Mapping[str, Any]], list[TokenPatches]] | Lacks = Lacks("it cannot be read for this family")
    videos: Callable[[Any, Mapping[str, Any]], list[tuple[Grids, int]]] | Lacks = Lacks(NO_VIDEO)
    run_is_one_image: bool = False
    three_part_positions: Callable[[HFModule, dict[str, Any]], Tensor] | None = None
    refused: tuple[tuple[str, str], ...] = ()
    counting: Callable[[Any], dict[str, Any]] = lambda config: {}
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    geometry: Callable[[Any, Any], ImageGeometry] | Lacks = Lacks("the positions of its visual tokens are unknown")
    samples: Callable[[Mapping[str, Any], Sequence[Size]], list[list[Size]]] = lambda inputs, sizes: [
        [s] for s in sizes
    ]
    flops: Callable[[Any], TowerGeometry | PatchTowerGeometry] | Lacks = Lacks("the sizes of its tower are unknown")
    known: Mapping[str, Callable[[], PreTrainedConfig]] = field(default_factory=dict)
    not_original: str | None = "the original format supports only LLaVA and LLaVA-NeXT"
    loop: Loop | Lacks = Lacks("the training loop does not support its image layout")

    @property
    def decoder(self) -> str:
        return f"{self.base}.language_model"

    def images(self, config: Any, image_processor: Any, what: str) -> ImageGeometry:
        """The geometry of the model's images; ``what`` is the start of the error message.

        Raises:
            ValueError: the family has no geometry, or it does not fit this config.
        """
        geometry = required(self.geometry, what) if isinstance(self.loop, Lacks) else self.loop.layout
        return geometry(config, image_processor)

    def places(
        self, config: Any, image_processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
    ) -> list[Places]:
        """Positions of the visual tokens in each image. ``inputs`` are the outputs of ``image_processor`` for images of
        these ``sizes``.

        Raises:
            ValueError: the family has no geometry.
        """
        geometry = self.images(config, image_processor, f"cannot show the visual tokens of {self.title}")
        samples = self.samples(inputs, sizes)
        return [places for sample in samples for places in geometry.places(sample, image_processor)]

    def check(self, model: HFModule) -> None:
        """Check that packed batches support the model's decoder.

        Raises:
            ValueError: they do not; the message names the family, the model type and what is supported.
        """
        config = model.get_submodule(self.decoder).config
        model_type, rope_type = config.model_type, (config.rope_parameters or {}).get("rope_type", "default")
        if model_type not in self.text_types:
            raise ValueError(
                f"{self.title}: language model type {model_type!r} is not supported; supported: "
                f"{', '.join(self.text_types)}"
            )
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"{self.title}: rope_type {rope_type!r} depends on the longest sample of a batch and is not supported; "
                "use default, linear, llama3, yarn or dynamic"
            )

    def warn_without_videos(self, method: PruningMethod, num_layers: int) -> None:
        """Log a warning if the family has no video tokens and a part of ``method`` drops nothing else."""
        if not isinstance(self.videos, Lacks):
            return
        for part in method.parts:
            drops = part.drops(num_layers)
            if drops and all(drop.compares_frames for drop in drops):
                log.warning(
                    "%s drops only tokens of videos, but %s has no video tokens (frames are images), so it drops "
                    "nothing; use a method for images, for example pyramiddrop", part.name, self.title,
                )  # fmt: skip


def sliding_window(attention: Any) -> int | None:
    """Number of keys that each query of an attention layer sees, including its own; ``None`` for all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    config = attention.config
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def normalizes_queries_and_keys(config: Any) -> bool:
    """Whether the queries and keys of each head are normalized."""
    return config.model_type.startswith("qwen3")
