"""One prefill for equal prompts of a batch in ``generate``, for example the rollouts of GRPO.

The vision tower and the prefill run on the first row of every distinct prompt; the cache and the logits are then
repeated for the other rows. Rows are equal if their tokens, attention mask and images are.

Shape suffixes: B rows that the caller passes, D distinct prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from vtprune_train.core.stream import to_device
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Family

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
ROWS = ("inputs", "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
GROUPS = "batch_num_images"  # the numbers of consecutive images that belong together
IMAGES = ("pixel_values", "image_sizes", "image_grid_thw", GROUPS)
# Arguments that start from other states, or that run another loop.
UNSHARED = ("past_key_values", "mm_encoder_outputs", "assistant_model", "custom_generate")


@dataclass(frozen=True)
class SharedPrefill:
    """Which rows are prefilled, and which rows repeat them.

    Args:
        first: [D] int64, the first row of each distinct prompt, ascending.
        prompt: [B] int64, the index into ``first`` of each row's prompt.
        sequences: number of sequences (or beams) that ``generate`` makes of each row.
    """

    first: Tensor
    prompt: Tensor
    sequences: int

    def select(self, inputs: dict[str, Any], sequences: int = 1) -> dict[str, Any]:
        """``inputs`` with the rows of the distinct prompts only, of tensors that hold ``sequences`` rows for each of
        the caller's."""
        first = self.first * sequences
        selected = {key: inputs[key].index_select(0, first) for key in ROWS if inputs.get(key) is not None}
        if (positions := inputs.get("position_ids")) is not None:  # [B, L], or [3 or 4, B, L]
            selected["position_ids"] = positions.index_select(positions.ndim - 2, first)
        return {**inputs, **selected}

    def repeats(self) -> Tensor:
        """[B * sequences] int64, the index into ``first`` of each row of ``generate``."""
        return self.prompt.repeat_interleave(self.sequences)


def share_prefill(
    model: HFModule, family: Family, image_token: int, config: GenerationConfig, inputs: dict[str, Any]
) -> SharedPrefill | None:
    """Find equal prompts in the arguments of ``generate``, and leave only the images of the first row of each in
    ``inputs``; ``None`` (and unchanged ``inputs``) if all rows differ or cannot be compared."""
    prompt = inputs.get("input_ids") if inputs.get("inputs") is None else inputs["inputs"]
    sequences = max(config.num_beams or 1, config.num_return_sequences or 1)
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or len(prompt) * sequences == 1:
        return None
    if inputs.get("use_cache") is False or not config.use_cache or config.get_generation_mode() not in MODES:
        return None
    # Images have to be encoded before generate repeats the rows.
    encodes = getattr(model, "_supports_mm_encoder_outputs", None)
    if encodes is None or not encodes() or not _comparable(inputs, len(prompt)):
        return None
    text = torch.cat([inputs[key].long() for key in ROWS if inputs.get(key) is not None], dim=1).cpu()  # read at once
    keys = [row.numpy().tobytes() for row in text]
    if len(set(keys)) < len(keys):
        images = _images_of_rows(family, text[:, : prompt.shape[1]] == image_token, inputs)
        if images is None:
            return None
        first, row_prompt = _distinct(keys, images)
    else:
        first = row_prompt = list(range(len(keys)))
        images = None
    if len(first) == len(keys) * sequences:
        return None
    if images is not None:
        inputs.update({key: torch.cat([images[row][key] for row in first]) for key in images[0]})
    shared = to_device((torch.tensor(first), torch.tensor(row_prompt)), prompt.device)
    return SharedPrefill(shared[0], shared[1], sequences)


def _comparable(inputs: dict[str, Any], rows: int) -> bool:
    """Whether all tensors are known to hold rows or images."""
    given = {key: value for key, value in inputs.items() if value is not None}
    if any(key in given for key in UNSHARED):
        return False
    known = {key for key, value in given.items() if key in (*ROWS, *IMAGES) and isinstance(value, Tensor)}
    if any(key not in known and (key in IMAGES or isinstance(value, Tensor)) for key, value in given.items()):
        return False
    return all(given[key].ndim == 2 and len(given[key]) == rows for key in known & set(ROWS))


def _images_of_rows(family: Family, visual: Tensor, inputs: dict[str, Any]) -> list[dict[str, Tensor]] | None:
    """The image inputs of each row (``visual`` [B, L] bool, on the host); ``None`` if it is not certain which images
    belong to which row, as for images of LLaVA that follow each other without text between them."""
    images = {key: inputs[key] for key in IMAGES if inputs.get(key) is not None}
    if "pixel_values" not in images:
        return None if images or visual.any() else [{} for _ in visual]
    runs = (visual & ~visual.roll(1, dims=1).index_fill(1, torch.tensor([0]), False)).sum(dim=1)
    tokens, entries = visual.sum(dim=1), len(images["pixel_values"])
    if family.run_is_one_image:  # entries are tiles, which all have the same number of tokens
        per_tile = int(tokens.sum()) // max(entries, 1)
        if not per_tile or (tokens % per_tile).any():
            return None
        counts = (tokens // per_tile).tolist()
    else:
        counts = runs.tolist()
    lengths = [1] * sum(counts)
    if "image_grid_thw" in images:  # entries are patches
        lengths = images["image_grid_thw"].prod(dim=-1).tolist()
    groups = images[GROUPS].tolist() if GROUPS in images else [1] * sum(counts)
    per_image = [images[key] for key in ("image_sizes", "image_grid_thw") if key in images]
    if sum(lengths) != entries or sum(groups) != sum(counts):
        return None
    if any(len(values) != sum(counts) for values in (lengths, *per_image)):
        return None
    ends, starts, group_ends = ([0, *accumulate(sizes)] for sizes in (counts, lengths, groups))
    if not set(ends) <= set(group_ends):
        return None
    places: dict[str, Any] = {"pixel_values": starts, GROUPS: {end: group_ends.index(end) for end in ends}}
    return [
        {key: value[_slice(places.get(key), begin, end)] for key, value in images.items()}
        for begin, end in pairwise(ends)
    ]


def _slice(places: Sequence[int] | dict[int, int] | None, begin: int, end: int) -> slice:
    return slice(begin, end) if places is None else slice(places[begin], places[end])


def _distinct(text: Sequence[bytes], images: Sequence[dict[str, Tensor]]) -> tuple[list[int], list[int]]:
    """The first row of each distinct prompt, and the index into these of each row's prompt."""
    sums = [0.0] * len(text)  # so that only images that are probably equal are compared
    if "pixel_values" in images[0]:
        sums = torch.stack([row["pixel_values"].sum(dtype=torch.float64) for row in images]).tolist()
    first: list[int] = []
    prompts: list[int] = []
    alike: dict[tuple[bytes, float], list[int]] = {}
    for row, key in enumerate(zip(text, sums, strict=True)):
        same = alike.setdefault(key, [])
        known = next((prompt for prompt in same if _equal(images[first[prompt]], images[row])), None)
        if known is None:
            known = len(first)
            first.append(row)
            same.append(known)
        prompts.append(known)
    return first, prompts


def _equal(images: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, others[key]) for key, value in images.items())


def repeat_rows(output: Any, rows: Tensor) -> Any:
    """Repeat the logits and the cache of a prefill's ``output`` for the ``rows`` [n] int64."""
    output.logits = output.logits.index_select(0, rows)
    output.past_key_values.batch_select_indices(rows)
    return output
