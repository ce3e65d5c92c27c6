"""What a family of models tells the rest of the project about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtprune_train.core.flops import TowerGeometry, WindowedTowerGeometry
from vtprune_train.core.stream import IMAGE
from vtprune_train.models import HFModule
from vtprune_train.models.families.layout import CLASS_TOKENS, Grids, ImageLayout, Shown


def one_image_each(features: Sequence[Any]) -> list[int]:
    """Tokens of each image, where ``get_image_features`` returns one tensor [tokens, C] an image."""
    return [len(feature) for feature in features]


def no_grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    """For a family whose tokens' places are not known here."""
    return []


def counted_by_the_image_processor(config: Any) -> dict[str, Any]:
    """For a family whose processor has no settings of its own."""
    return {}


def counted_by_patches(config: Any) -> dict[str, Any]:
    """Settings of the processors of LLaVA-1.5 and LLaVA-NeXT."""
    vision = config.vision_config
    settings = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if vision.model_type in CLASS_TOKENS:
        settings["num_additional_image_tokens"] = CLASS_TOKENS[vision.model_type]
    return settings


def merged_grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    """Of Qwen's models: one raster an image, of tokens that are patches merged."""
    merge = config.vision_config.spatial_merge_size
    return [((rows // merge, columns // merge),) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def rope_index(base: HFModule, inputs: dict[str, Any]) -> Tensor:
    """[3, B, L] positions of Qwen's models, from ``input_ids``, ``image_grid_thw`` and the mask of these tokens."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return base.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == base.config.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=None if mask is None else mask[:, mask.shape[1] - ids.shape[1] :],
    )[0]


@dataclass(frozen=True)
class Loop:
    """How the project's own loop trains a family.

    Args:
        model_type: of its config.
        layout: ``(config, image_processor) -> ImageLayout``.
        tower: ``config ->`` sizes of tower and projector, to count FLOPs.
        image_processor: ``config ->`` transformers' PIL image processor, where a checkpoint brings none.
        image_processors: class names of the image processors that make what ``layout`` expects, without ``Pil``;
            ``None`` for any.
        vision: how names of the tower's parameters begin.
        projector: how names of the projector's parameters begin (also within ``vision``).
        image_token: the image token in the vocabulary.
        placeholder: what stands in a prompt where an image does; ``<image>`` in it is the image token.
        needs_checkpoint: the model cannot be made from parts or from sizes in the YAML.
    """

    model_type: str
    layout: Callable[[Any, Any], ImageLayout]
    tower: Callable[[Any], TowerGeometry | WindowedTowerGeometry]
    image_processor: Callable[[Any], Any]
    image_processors: tuple[str, ...] | None
    vision: str = "model.vision_tower."
    projector: tuple[str, ...] = ("model.multi_modal_projector.", "model.image_newline")
    image_token: str = IMAGE
    placeholder: str = IMAGE
    needs_checkpoint: bool = False


@dataclass(frozen=True)
class Family:
    """An adapter: where the decoder is, what a visual token is, what must be gathered along with it.

    Args:
        title: the family's name, for messages and tables.
        model_class: the transformers class, by name.
        text_types: ``model_type`` of the language models whose layers fit.
        base: the submodule that embeds, sees and splices; has ``get_image_features`` and ``language_model``.
        tower: the submodule of a vision tower that splits attention by the images' grids (``grid_thw``); ``None`` where
            it runs over tiles of one size.
        image_lengths: tokens of each entry of ``get_image_features(...).pooler_output``, in placeholder order.
        grids: ``(config, inputs of get_image_features) ->`` the rasters of each of these entries; none where unknown.
        patches: ``(config, inputs of get_image_features) ->`` which patches of the tower each of these entries shows;
            ``None`` where the tower's attention cannot be read.
        run_is_one_image: all entries that fill one unbroken run of image tokens are one image (its tiles).
        three_part_positions: ``(base, inputs) -> [3, B, L]``, positions (time, height, width) that count each row from
            0 and stay with their tokens; ``None`` where positions count tokens.
        refused: keywords of ``forward`` that a pruned model does not take, with the reason.
        counting: ``config ->`` settings of the processor that tokens of an image are counted by.
        loop: how the project's own loop trains it; ``None`` where it does not.
    """

    title: str
    model_class: str
    text_types: tuple[str, ...]
    base: str = "model"
    tower: str | None = None
    image_lengths: Callable[[Sequence[Any]], list[int]] = one_image_each
    grids: Callable[[Any, Mapping[str, Any]], list[Grids]] = no_grids
    patches: Callable[[Any, Mapping[str, Any]], list[Shown]] | None = None
    run_is_one_image: bool = False
    three_part_positions: Callable[[HFModule, dict[str, Any]], Tensor] | None = None
    refused: tuple[tuple[str, str], ...] = ()
    counting: Callable[[Any], dict[str, Any]] = counted_by_the_image_processor
    loop: Loop | None = None

    @property
    def decoder(self) -> str:
        return f"{self.base}.language_model"

    def check(self, model: HFModule) -> None:
        """Refuse decoders whose layers need more than the packed stream carries.

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


LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
VIDEO = "videos are not dropped yet; pass their frames as images"
