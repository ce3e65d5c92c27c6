"""Cases of the published PyramidDrop decoder: kept tokens, hidden states, loss, gradients, greedy tokens, caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from golden_checks.common import Case, CaseError, Entries, Outcome, Part, compare
from vtprune_train import PyramidDrop
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.attention import PREFIX
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.models.forward.padded import decode, prefill

TOLERANCE = 1e-5


def build_model(case: Case) -> LlamaForCausalLM:
    entries, weights = case.entries, case.tensors.below("weights.")
    config = LlamaConfig(
        hidden_size=entries["hidden_size"],
        num_attention_heads=entries["num_heads"],
        num_key_value_heads=entries.get("num_key_value_heads", entries["num_heads"]),
        num_hidden_layers=entries["num_layers"],
        intermediate_size=entries["intermediate_size"],
        vocab_size=entries["vocab_size"],
        rms_norm_eps=entries["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": entries["rope_theta"]},
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    config._attn_implementation = PREFIX + "varlen_sdpa"
    model = LlamaForCausalLM(config)
    incompatible = model.load_state_dict(weights, strict=False)
    missing = [key for key in incompatible.missing_keys if "inv_freq" not in key and key != "lm_head.weight"]
    unexpected = [key for key in incompatible.unexpected_keys if "inv_freq" not in key]
    if missing or unexpected:
        raise CaseError(f"weights do not fit the configuration: {missing=} {unexpected=}")
    return model.float().train(entries["train"])


def segment_of(case: Case) -> tuple[SegmentLayout, list[int]]:
    """The layout of the sample, and its supervised tokens."""
    entries, labels = case.entries, case.tensors["labels"].tolist() if case.entries["train"] else []
    supervised = [i for i, label in enumerate(labels) if label != -100 and i]
    segment = SegmentLayout(
        length=len(case.tensors["inputs_embeds"]),
        spans=(ImageSpan(entries["visual_start"], entries["visual_tokens"]),),
        query_offsets=tuple(entries["query_rows"]),
        supervised_offsets=tuple(supervised),
    )
    return segment, supervised


def run_case(case: Case) -> Outcome:
    """Run a recorded case with the project's plan, decoder loop and method."""
    entries, tensors = case.entries, case.tensors
    model, train = build_model(case), entries["train"]
    method = PyramidDrop(layers=tuple(entries["layer_list"]), keep=tuple(entries["ratios"]))
    embeds = tensors["inputs_embeds"].float().requires_grad_(train)
    segment, supervised = segment_of(case)
    plan = method.plan([segment], entries["num_layers"])
    if train:
        output = run_layers(model.model, embeds, plan, method)
        hidden = model.model.norm(output.last_hidden_state)
    else:
        with torch.no_grad():
            hidden, output, cache = prefill(model.model, method, embeds, [segment])
    rows, parts = torch.arange(len(embeds)), []
    if len(output.kept) != len(entries["kept_after_stage"]):
        raise CaseError(f"kept_after_stage has {len(entries['kept_after_stage'])} drops, layer_list {len(output.kept)}")
    for index, (kept, expected) in enumerate(zip(output.kept, entries["kept_after_stage"], strict=True)):
        rows = rows[kept]
        parts.append(compare(f"kept after drop {index + 1}", rows, expected))
    parts.append(compare("hidden", hidden, tensors["last_hidden_state"], TOLERANCE))
    if train:
        logits = model.lm_head(hidden.index_select(0, plan.predict_rows))
        loss = F.cross_entropy(logits, tensors["labels"][supervised])
        loss.backward()
        parts.append(compare("loss", loss, entries["loss"], TOLERANCE))
        parts.append(compare("gradient", embeds.grad, tensors["grad_inputs_embeds"], TOLERANCE))
    elif "greedy_tokens" in entries:
        states, *found = decode_greedily(model, method, hidden[-1], cache, entries)
        parts += [*found, compare("greedy_hidden", states, tensors["greedy_hidden"], TOLERANCE)]
    return Outcome(case.name, tuple(parts))


@torch.no_grad()
def decode_greedily(
    model: LlamaForCausalLM, method: PyramidDrop, last_hidden_C: torch.Tensor, cache: DynamicCache, entries: Entries
) -> tuple[torch.Tensor, Part, Part]:
    """Decode the recorded number of tokens. Returns their [tokens, C] hidden states, and the comparisons of tokens and
    cache lengths."""
    states, tokens = [last_hidden_C], []
    for _ in entries["greedy_tokens"]:
        tokens.append(int(model.lm_head(states[-1]).argmax()))
        states.append(decode(model.model, method, model.model.embed_tokens(torch.tensor([[tokens[-1]]])), cache)[0, 0])
    lengths = [cache.get_seq_length(layer) for layer in range(len(model.model.layers))]
    return (
        torch.stack(states[:-1]),
        compare("greedy_tokens", tokens, entries["greedy_tokens"]),
        compare("cache_lengths", lengths, entries["cache_lengths"]),
    )
