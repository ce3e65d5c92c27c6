#!/usr/bin/env python
"""Check the project's decoder and PyramidDrop against recorded outputs of the published code.

    python scripts/check_golden.py DIR

Every pair NAME.json + NAME.safetensors in DIR is one case and one line of output. Exits 0 only if all cases have equal
kept indices, hidden states, loss and gradients within 1e-5 (float32), and, where a case was decoded, equal greedy
tokens and equal lengths of every layer's cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vtprune_train import PyramidDrop
from vtprune_train.models.attention import PREFIX
from vtprune_train.models.decoder import run_layers
from vtprune_train.models.padded import decode, prefill
from vtprune_train.stream import ImageSpan, SegmentLayout

TOLERANCE = 1e-5


@dataclass
class Outcome:
    """``differences`` are the largest absolute ones by name; ``wrong`` says what is not equal that must be."""

    name: str
    wrong: list[str]
    differences: dict[str, float]

    @property
    def passed(self) -> bool:
        return not self.wrong and all(value <= TOLERANCE for value in self.differences.values())

    def __str__(self) -> str:
        kept = "; ".join(self.wrong) or "kept equal"
        values = "  ".join(f"{key} {value:.1e}" for key, value in self.differences.items())
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name}: {kept}  {values}"


def build_model(case: dict, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=case["hidden_size"],
        num_attention_heads=case["num_heads"],
        num_key_value_heads=case.get("num_key_value_heads", case["num_heads"]),
        num_hidden_layers=case["num_layers"],
        intermediate_size=case["intermediate_size"],
        vocab_size=case["vocab_size"],
        rms_norm_eps=case["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    config._attn_implementation = PREFIX + "varlen_sdpa"
    model = LlamaForCausalLM(config)
    incompatible = model.load_state_dict(weights, strict=False)
    missing = [key for key in incompatible.missing_keys if "inv_freq" not in key and key != "lm_head.weight"]
    unexpected = [key for key in incompatible.unexpected_keys if "inv_freq" not in key]
    if missing or unexpected:
        raise ValueError(f"{case['name']}: weights do not fit the configuration: {missing=} {unexpected=}")
    return model.float().train(case["train"])


def run_case(folder: Path, name: str) -> Outcome:
    """Run one recorded case through the project's own plan, decoder loop and method."""
    case = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    model = build_model(case, {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    method = PyramidDrop(layers=tuple(case["layer_list"]), keep=tuple(case["ratios"]))
    embeds = tensors["inputs_embeds"].float().requires_grad_(case["train"])
    labels = tensors.get("labels")
    supervised = [] if labels is None else [i for i, label in enumerate(labels.tolist()) if label != -100 and i]
    segment = SegmentLayout(
        length=len(embeds),
        spans=(ImageSpan(case["visual_start"], case["visual_tokens"]),),
        query_offsets=tuple(case["query_rows"]),
        supervised_offsets=tuple(supervised),
    )
    plan = method.plan([segment], case["num_layers"])
    cache = None
    with torch.set_grad_enabled(case["train"]):
        if case["train"]:
            output = run_layers(model.model, embeds, plan, method)
            hidden = model.model.norm(output.last_hidden_state)
        else:
            hidden, output, cache = prefill(model.model, method, embeds, [segment])
    differences = {"hidden": _largest_difference(hidden, tensors["last_hidden_state"])}
    if case["train"]:
        logits = model.lm_head(hidden.index_select(0, plan.predict_rows))
        loss = F.cross_entropy(logits, tensors["labels"][supervised])
        loss.backward()
        assert embeds.grad is not None
        differences["loss"] = abs(loss.item() - case["loss"])
        differences["gradient"] = _largest_difference(embeds.grad, tensors["grad_inputs_embeds"])
    rows, wrong_stages = torch.arange(len(embeds)), []
    for index, (kept, expected) in enumerate(zip(output.kept, case["kept_after_stage"], strict=True)):
        rows = rows[kept]
        if rows.tolist() != expected:
            wrong_stages.append(index + 1)
    wrong = [f"kept differ after drop {wrong_stages}"] if wrong_stages else []
    if cache is not None and "greedy_tokens" in case:
        states = decode_greedily(model, method, hidden[-1], cache, case, wrong)
        if "greedy_hidden" in tensors:
            differences["greedy_hidden"] = _largest_difference(states, tensors["greedy_hidden"])
    return Outcome(name, wrong, differences)


@torch.no_grad()
def decode_greedily(
    model: LlamaForCausalLM,
    method: PyramidDrop,
    last_hidden_C: torch.Tensor,
    cache: DynamicCache,
    case: dict,
    wrong: list[str],
) -> torch.Tensor:
    """Decode as many tokens as were recorded, feeding each; [tokens, C] hidden states they came from. Adds to
    ``wrong``."""
    states, tokens = [last_hidden_C], []
    for _ in case["greedy_tokens"]:
        tokens.append(int(model.lm_head(states[-1]).argmax()))
        states.append(decode(model.model, method, model.model.embed_tokens(torch.tensor([[tokens[-1]]])), cache)[0, 0])
    lengths = [cache.get_seq_length(layer) for layer in range(len(model.model.layers))]
    if tokens != case["greedy_tokens"]:
        wrong.append(f"greedy tokens {tokens} instead of {case['greedy_tokens']}")
    if lengths != case["cache_lengths"]:
        wrong.append(f"cache lengths {lengths} instead of {case['cache_lengths']}")
    return torch.stack(states[:-1])


def _largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return (ours - theirs).abs().max().item()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds NAME.json and NAME.safetensors pairs")
    folder = parser.parse_args(argv).folder
    names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
    if not names:
        print(f"{folder} holds no golden cases (NAME.json + NAME.safetensors)", file=sys.stderr)
        return 2
    outcomes = [run_case(folder, name) for name in names]
    for outcome in outcomes:
        print(outcome)
    print(f"{sum(o.passed for o in outcomes)} of {len(outcomes)} cases agree")
    return 0 if all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
