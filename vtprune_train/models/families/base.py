"""What a family of models tells the rest of the project about itself. A new family is one file that fills in
:class:`Family`, and its line in ``__init__.py``; start from ``qwen2_vl.py``.

A part that a family does not have is a :class:`Lacks`, whose sentence ends in the error of the command that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedConfig

from vtprune_train.core.flops import PatchTowerGeometry, TowerGeometry
from vtprune_train.core.stream import IMAGE
from vtprune_train.models import HFModule
from vtprune_train.models.families.layout import Grids, ImageGeometry, ImageLayout, Shown, Size
from vtprune_train.models.families.places import Places
from vtprune_train.models.families.towers import SavedByTower

Part = TypeVar("Part")

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # language models
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
VIDEO = "videos are not dropped yet; pass their frames as images"


@dataclass(frozen=True)
class Lacks:
    """In place of a part that a family does not have: the reason, for errors."""

    why: str


def required(part: Part | Lacks, what: str) -> Part:
    """``part``, if the family has it.

    Raises:
        ValueError: it does not; ``what`` cannot be done, and why.
    """
    if isinstance(part, Lacks):
        raise ValueError(f"{what}: {part.why}")
    return part


@dataclass(frozen=True)
class Loop:
    """How the project's own loop trains a family.

    Args:
        layout: ``(config, image_processor) -> ImageLayout``.
        image_processor: ``config ->`` transformers' PIL image processor, where a checkpoint brings none.
        image_processors: class names of the image processors that make what ``layout`` expects, without ``Pil``;
            ``None`` for any.
        saved: ``config ->`` what autograd keeps of the tower, to predict memory.
        vision: how names of the tower's parameters begin.
        projector: how names of the projector's parameters begin (also within ``vision``).
        untrained: ``(config, name) ->`` whether no gradient reaches this parameter of the tower; by default all train.
        image_token: the image token in the vocabulary.
        placeholder: what stands in a prompt where an image does; ``<image>`` in it is the image token.
        needs_checkpoint: the model cannot be made from parts or from sizes in the YAML.
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
    needs_checkpoint: bool = False


@dataclass(frozen=True)
class Family:
    """An adapter: where the decoder is, what a visual token is, what must be gathered along with it.

    Args:
        title: the family's name, for messages and tables.
        model_type: of its config.
        model_class: the transformers class, by name.
        text_types: ``model_type`` of the language models whose layers fit.
        base: the submodule that embeds, sees and splices; has ``get_image_features`` and ``language_model``.
        tower: the submodule of a vision tower that splits attention by the images' grids (``grid_thw``); ``None`` where
            it runs over tiles of one size.
        image_lengths: tokens of each entry of ``get_image_features(...).pooler_output``, in placeholder order.
        grids: ``(config, inputs of get_image_features) ->`` the rasters of each of these entries; none where unknown.
        patches: ``(config, inputs of get_image_features) ->`` which patches of the tower each of these entries shows;
            for methods that read the tower's attention.
        run_is_one_image: all entries that fill one unbroken run of image tokens are one image (its tiles).
        three_part_positions: ``(base, inputs) -> [3, B, L]``, positions (time, height, width) that count each row from
            0 and stay with their tokens; ``None`` where positions count tokens.
        refused: keywords of ``forward`` that a pruned model does not take, with the reason.
        counting: ``config ->`` settings of the processor that tokens of an image are counted by; by default the image
            processor counts alone.
        geometry: ``(config, image_processor) ->`` tokens, tiles and places of images of any size, for ``vtprune show``
            and ``estimate``; left out where ``loop`` has a layout, which gives them too.
        samples: ``(inputs, sizes) ->`` the sizes of all images, one list for each sample; by default an image is laid
            out in the same way whatever stands beside it.
        flops: ``config ->`` sizes of tower and projector, to count their work.
        known: sizes of published checkpoints by hub id, for dry runs without network.
        not_original: why ``vtprune convert`` does not write it in the format of the original LLaVA code; ``None`` where
            it does (``llava_original_config.py``).
        loop: how the project's own loop trains it.
    """

    title: str
    model_type: str
    model_class: str
    text_types: tuple[str, ...]
    base: str = "model"
    tower: str | None = None
    image_lengths: Callable[[Sequence[Any]], list[int]] = lambda images: [len(tokens) for tokens in images]
    grids: Callable[[Any, Mapping[str, Any]], list[Grids]] = lambda config, inputs: []
    patches: Callable[[Any, Mapping[str, Any]], list[Shown]] | Lacks = Lacks("it is not read there")
    run_is_one_image: bool = False
    three_part_positions: Callable[[HFModule, dict[str, Any]], Tensor] | None = None
    refused: tuple[tuple[str, str], ...] = ()
    counting: Callable[[Any], dict[str, Any]] = lambda config: {}
    geometry: Callable[[Any, Any], ImageGeometry] | Lacks = Lacks("where its visual tokens lie is not known here")
    samples: Callable[[Mapping[str, Any], Sequence[Size]], list[list[Size]]] = lambda inputs, sizes: [
        [s] for s in sizes
    ]
    flops: Callable[[Any], TowerGeometry | PatchTowerGeometry] | Lacks = Lacks("its tower's sizes are not known here")
    known: Mapping[str, Callable[[], PreTrainedConfig]] = field(default_factory=dict)
    not_original: str | None = "the original format is LLaVA's and LLaVA-NeXT's"
    loop: Loop | Lacks = Lacks("the training loop has no layout of its images")

    @property
    def decoder(self) -> str:
        return f"{self.base}.language_model"

    def images(self, config: Any, image_processor: Any, what: str) -> ImageGeometry:
        """The geometry of this model's images.

        Raises:
            ValueError: the family has none, or does not fit this config; ``what`` says what for.
        """
        geometry = required(self.geometry, what) if isinstance(self.loop, Lacks) else self.loop.layout
        return geometry(config, image_processor)

    def places(
        self, config: Any, image_processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
    ) -> list[Places]:
        """Where the visual tokens of images lie that ``image_processor`` made ``inputs`` of.

        Raises:
            ValueError: that is not known for this family.
        """
        geometry = self.images(config, image_processor, f"cannot show the visual tokens of {self.title}")
        samples = self.samples(inputs, sizes)
        return [places for own in samples for places in geometry.places(own, image_processor)]

    def check(self, model: HFModule) -> None:
        """Refuse decoders whose layers need more than the packed batch carries.

        Raises:
            ValueError: naming the family, the model type and what is supported.
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
                "use default, linear, llama3 or yarn"
            )


def sliding_window(attention: Any) -> int | None:
    """Keys that a query of this attention layer sees, its own included; ``None`` for all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    config = attention.config
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def normalizes_queries_and_keys(config: Any) -> bool:
    """Whether each head's queries and keys go through a norm of their own."""
    return config.model_type.startswith("qwen3")
