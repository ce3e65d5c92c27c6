"""Cosine similarity of image patches and questions by a CLIP model, which is loaded once per process, frozen, and
belongs to no other model: it is neither trained, sharded nor saved.

Shape suffixes: V patches, M input size of the projector, S rows of text, P positions of a row, E size of CLIP's
embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.stream import to_device


class ClipSimilarity:
    """CLIP's text tower and the projections of both towers.

    Args:
        clip: a ``CLIPModel``; its vision tower is not kept, except the norm before the projection.
        tokenizer: its tokenizer.
        name: for messages.
    """

    def __init__(self, clip: Any, tokenizer: Any, name: str):
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.norm, self.visual_projection = clip.vision_model.post_layernorm, clip.visual_projection
        self.tokenizer, self.name = tokenizer, name
        self.positions: int = clip.config.text_config.max_position_embeddings

    def rows(self, question: str) -> np.ndarray:
        """[S, P] int64 token ids of a question, in as many rows as it fills, the last one padded with 0."""
        ids = np.asarray(self.tokenizer(question).input_ids, dtype=np.int64)
        return np.pad(ids, (0, -len(ids) % self.positions)).reshape(-1, self.positions)

    def texts(self, questions: Sequence[str], device: torch.device) -> list[Tensor]:
        """[S, E] unit embeddings of the rows of each question."""
        rows = [self.rows(question) for question in questions]
        if not rows:
            return []
        ids_SP = to_device(np.concatenate(rows), device)
        # Rows are padded at the end, and attention is causal, so the token that is read does not see the padding.
        embeddings = self.text_projection(self.text_model(input_ids=ids_SP).pooler_output)
        return list(normalize(embeddings, dim=-1).split([len(of_question) for of_question in rows]))

    def patches(self, features_VM: Tensor) -> Tensor:
        """[V, E] unit embeddings of patches, from the features of the vision tower.

        Raises:
            ValueError: the features do not come from the vision tower of this CLIP model.
        """
        width = self.norm.weight.shape[0]
        if features_VM.shape[-1] != width:
            raise ValueError(
                f"text_tower={self.name!r}: its vision tower has {width} channels, but the features of this model have "
                f"{features_VM.shape[-1]}; use the CLIP model that the vision tower was taken from"
            )
        return normalize(self.visual_projection(self.norm(features_VM.float())), dim=-1)


@cache
def clip_similarity(name: str, device: torch.device) -> ClipSimilarity:
    """Load a CLIP model in float32 from a folder or from the Hub.

    Raises:
        ValueError: there is no CLIP model, or it cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel
    from transformers.integrations import deepspeed

    # While a DeepSpeed config for ZeRO-3 exists, from_pretrained shards what it loads.
    sharding, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise ValueError(f"it is a {kind} model, not a CLIP model with both towers")
        clip = CLIPModel.from_pretrained(name, dtype=torch.float32)
        return ClipSimilarity(clip.requires_grad_(False).eval().to(device), AutoTokenizer.from_pretrained(name), name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"text_tower={name!r} cannot be loaded: {reason}; set it to the folder or the name on the Hub of the CLIP "
            "model that the vision tower was taken from, such as openai/clip-vit-large-patch14-336"
        ) from error
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding
