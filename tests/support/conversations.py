"""Conversations of two turns."""

import torch
from transformers import DynamicCache

from tests.support.families import SPECIAL, family_inputs


def two_turns(model, name, firsts, seconds):
    """[B, 5] tokens of a second turn on the first one's cache, and every layer's cache length."""
    cache = DynamicCache()
    first = family_inputs(name, firsts)
    with torch.no_grad():
        one = model(**first, past_key_values=cache, use_cache=True)
        second = family_inputs(name, seconds)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        out = model(**{**second, "attention_mask": mask}, past_key_values=cache, use_cache=True)
        tokens = []
        for _ in range(5):
            logits = out.logits[:, -1]
            logits[:, : len(SPECIAL)] = -torch.inf
            tokens.append(logits.argmax(dim=-1))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(input_ids=tokens[-1][:, None], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert one.past_key_values is cache
    return torch.stack(tokens, dim=1), [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
