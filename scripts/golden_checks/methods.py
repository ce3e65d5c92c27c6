"""Cases of other methods' published code, format ``vtprune-golden-1``; by ``kind``:

- ``decoder``: a whole pass with tiny weights: kept tokens at each drop point, hidden states, some decoded tokens or
  gradients
- ``contract``: the selection of a method for given candidates
- ``tower``: the same, with signals read from a tiny CLIP tower
- ``consistency``: loss and gradients of a step on full tokens
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from golden_checks.common import Case, CaseError, Entries, Outcome, Part, Tensors, compare
from vtprune_train.core.stream import Boundary, ImageSpan, SegmentLayout
from vtprune_train.models.forward.attention import PREFIX
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.models.forward.encoder import Reading
from vtprune_train.models.forward.head import Teaching, chunked_loss
from vtprune_train.models.forward.padded import decode, prefill
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, EncoderSignals, Ranking, Selection

FORMAT = "vtprune-golden-1"
FEATURES = 1e-4  # tolerance of the tower's features
EXCUSED = ("kept", "values")  # what a documented deviation may touch
Passed = list[tuple[Candidates, Selection]]


def run_case(case: Case) -> Outcome:
    """Run the project on a case.

    Raises:
        CaseError: the kind is unknown, or an entry is missing.
    """
    kind = case.entries["kind"]
    if kind not in CHECKS:
        raise CaseError(f"kind {kind!r} is not one of {', '.join(CHECKS)}")
    _check_listed(case)
    parts = CHECKS[kind](case.entries, case.tensors)
    documented = "" if case.entries.get("undocumented") else case.entries.get("documented", "")
    return Outcome(case.name, tuple(parts), documented, EXCUSED)


def _check_listed(case: Case) -> None:
    """Raise an error if the case lists a tensor that it does not contain.

    Decoded states are not required without their input embeddings, and values are not required without a tolerance,
    because they could not be compared.
    """
    entries, tensors = case.entries, case.tensors
    inputs, expected = (
        [line.partition(":")[0].partition(" (")[0] for line in entries[key]] for key in ("inputs", "expected")
    )
    if "decode_embeds" not in {*inputs, *tensors}:
        expected = [name for name in expected if name != "expected.decode_hidden"]
    if "values" not in entries.get("tolerance", {}):
        expected = [name for name in expected if name != "expected.values"]
    for name in (*inputs, *expected):
        if name.endswith(".*"):
            tensors.below(name[:-1])
        else:
            tensors[f"{name[:-1]}0" if name.endswith("_i") else name]


def method_of(entries: Entries) -> PruningMethod:
    try:
        method = method_from_settings({"method": entries["method"], **entries["settings"]})
    except ValueError as error:
        raise CaseError(f"method and settings: {error}") from error
    if method is None:
        raise CaseError("method is none, which chooses nothing")
    return method


def layout_of(entries: Entries) -> SegmentLayout:
    own = entries["layout"]
    grids = tuple(tuple(grid) for grid in own.get("grids", ()))
    length = own["pre"] + own["visual"] + own["post"]
    query = tuple(own.get("query", (length - 1,)))
    span = ImageSpan(own["pre"], own["visual"], grids, frames=own.get("frames", 0))
    return SegmentLayout(length, (span,), query)


def llama(entries: Entries, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    own = entries["model"]
    config = LlamaConfig(
        hidden_size=own["hidden"], num_attention_heads=own["heads"], num_key_value_heads=own["kv"],
        num_hidden_layers=own["layers"], intermediate_size=own["inter"], vocab_size=16,
        rms_norm_eps=own["rms_norm_eps"], rope_parameters={"rope_type": "default", "rope_theta": own["rope_theta"]},
    )  # fmt: skip
    config._attn_implementation = PREFIX + "varlen_sdpa"
    model = LlamaForCausalLM(config)
    incompatible = model.model.load_state_dict(weights, strict=False)
    missing = [key for key in incompatible.missing_keys if key != "embed_tokens.weight"]
    if missing or incompatible.unexpected_keys:
        raise CaseError(f"weights do not fit the decoder: {missing=} unexpected={incompatible.unexpected_keys}")
    return model.float()


def noting(method: PruningMethod) -> Passed:
    """Collect the candidates and the selection at every drop point of ``method``, in order."""
    passed: Passed = []
    choose = method.choose

    def noted(candidates: Candidates) -> Selection:
        passed.append((candidates, choose(candidates)))
        return passed[-1][1]

    object.__setattr__(method, "choose", noted)  # of this method alone; the dataclass is frozen
    return passed


def check_decoder(entries: Entries, tensors: Tensors) -> list[Part]:
    method, own = method_of(entries), entries["model"]
    model = llama(entries, tensors.below("weights."))
    module = method.module(own["hidden"], own["layers"])
    if module is not None:
        module.load_state_dict(tensors.below("module."))
        model.model.pruning = module
    segment, train, tolerance = layout_of(entries), bool(entries.get("train")), entries["tolerance"]["hidden"]
    embeds = tensors["inputs_embeds"].float().requires_grad_(train)
    model.train(train)
    passed, decoded = noting(method), []
    with torch.set_grad_enabled(train):
        if "decode_embeds" in tensors:
            hidden, _, cache = prefill(model.model, method, embeds, [segment])
            decoded = [
                decode(model.model, method, t[None, None], cache)[0, 0] for t in tensors["decode_embeds"].float()
            ]
        else:
            output = run_layers(model.model, embeds, method.plan([segment], own["layers"]), method)
            hidden = model.model.norm(output.last_hidden_state)
    parts = _kept(entries, tensors, passed)
    parts.append(compare("hidden", hidden, tensors["expected.last_hidden_state"], tolerance))
    if train:
        (hidden * tensors["output_gradient"].float()).sum().backward()
        parts.append(compare("gradient", embeds.grad, tensors["expected.gradient"], tolerance))
        if module is not None:
            given = next(module.parameters()).grad
            parts.append(compare("module gradient", given, tensors["expected.module_gradient"], tolerance))
    if decoded:
        parts.append(compare("decoded", torch.stack(decoded), tensors["expected.decode_hidden"], tolerance))
    return parts


def _kept(entries: Entries, tensors: Tensors, passed: Passed) -> list[Part]:
    """Compare the raters, and the kept tokens at each drop point that ranks."""
    parts = []
    if "expected.raters" in tensors:
        rates = passed[0][0].memory["raters"][0]
        parts.append(compare("raters", rates.nonzero().flatten(), tensors["expected.raters"]))
    ranked = [
        selection for seen, selection in passed if seen.boundary.drop.ranked and not seen.boundary.drop.adds
    ]  # fmt: skip
    number = sum(key.startswith("expected.kept_") for key in tensors)
    if len(ranked) != number:
        parts.append(Part("boundaries", f"{len(ranked)} boundaries rank instead of {number}"))
    for index, selection in enumerate(ranked[:number]):
        stays = torch.ones(len(selection.chosen), dtype=torch.bool)
        if selection.at is not None and not entries.get("values_in_place"):
            stays[selection.at] = False
        parts.append(compare(f"kept_{index}", selection.chosen[stays], tensors[f"expected.kept_{index}"]))
    return parts


def boundary_of(method: PruningMethod, entries: Entries) -> Boundary:
    return method.plan([layout_of(entries)], entries.get("depth", 4)).boundaries[0]


@torch.no_grad()
def check_contract(entries: Entries, tensors: Tensors) -> list[Part]:
    signals, hidden = None, tensors["hidden"].float()
    if "tower_attention" in tensors:
        own_tile = torch.zeros(len(hidden), dtype=torch.int64)
        keys = tensors["tower_keys"].float() if "tower_keys" in tensors else hidden[:, :0]
        signals = EncoderSignals(tensors["tower_attention"].float(), keys, own_tile)
    return _choice(entries, tensors, method_of(entries), signals)


def _choice(entries: Entries, tensors: Tensors, method: PruningMethod, signals: EncoderSignals | None) -> list[Part]:
    """Compare the selection of a method. If the published code is known to continue differently, only the first
    ``compare_first`` entries must be equal."""
    hidden = tensors["hidden"].float()
    instruction = tensors["instruction"].float() if "instruction" in tensors else hidden[:0]
    ranking = None
    if "keys" in tensors:  # of the decoder, for methods that do not read queries
        keys = tensors["keys"].float()
        ranking = Ranking(keys.new_zeros(len(instruction), *keys.shape[1:]), keys, 1.0)
    candidates = Candidates(boundary_of(method, entries), hidden, hidden, instruction, ranking, signals)
    selection = method.choose(candidates)
    values = hidden[selection.chosen].clone()
    if selection.at is not None and selection.values is not None:
        values[selection.at] = selection.values
    tolerance = entries.get("tolerance", {}).get("values")
    first: int | None = entries.get("compare_first")
    if "expected.kept" not in entries["expected"]:  # code that merges every token returns no indices
        return [compare("values", values, tensors["expected.values"], tolerance)]
    kept = tensors["expected.kept"]
    if first is None:
        parts = [compare("kept", selection.chosen, kept)]
    else:
        parts = [compare(f"first {first} kept", selection.chosen[:first], kept[:first])]
        parts.append(compare(f"first {first} values", values[:first], tensors["expected.values"][:first], tolerance))
    if "expected.values" in tensors:
        parts.append(compare("values", values, tensors["expected.values"], tolerance))
    return parts


@torch.no_grad()
def check_tower(entries: Entries, tensors: Tensors) -> list[Part]:
    own, method = entries["tower"], method_of(entries)
    vision = CLIPVisionConfig(
        hidden_size=own["hidden"], num_attention_heads=own["heads"], num_hidden_layers=own["layers"],
        intermediate_size=own["inter"], image_size=own["side"] * own["patch"], patch_size=own["patch"],
    )  # fmt: skip
    tower = CLIPVisionModel(vision).eval()
    names = set(tower.state_dict())
    weights = {
        key if key in names else key.removeprefix("vision_model."): value
        for key, value in tensors.below("weights.").items()
    }
    incompatible = tower.load_state_dict(weights, strict=False)
    if missing := [key for key in incompatible.missing_keys if "position_ids" not in key]:
        raise CaseError(f"weights do not fit the tower: {missing=}")
    config = SimpleNamespace(vision_config=vision, vision_feature_layer=-2)
    needs = method.needs
    reading = Reading(config, needs.encoder_layers, needs.encoder_rows, needs.encoder_features)
    handles = reading.hook(getattr(tower, "vision_model", tower))
    pixels = tensors["pixel_values"].float()[None]
    features = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    if (
        needs.encoder_features
    ):  # the recorded ones: where tokens are divided by order, rounding changes every later step
        reading.features = tensors["hidden"].float()[None]
    for handle in handles:
        handle.remove()
    signals = reading.signals(torch.arange(entries["layout"]["visual"]))
    return [compare("features", features, tensors["hidden"], FEATURES), *_choice(entries, tensors, method, signals)]


def check_consistency(entries: Entries, tensors: Tensors) -> list[Part]:
    """Compare loss and gradients of a step on full tokens with a pruned teacher pass, as means over its rows."""
    hidden, head = (tensors[key].float().requires_grad_() for key in ("hidden", "head"))
    own, rows = entries["settings"], len(tensors["targets"])
    teaching = Teaching(tensors["teacher_hidden"].float(), own["consistency_weight"], own["consistency_temperature"])
    loss, _, _, divergence = chunked_loss(hidden, head, None, tensors["targets"], teaching)
    (loss / rows).backward()
    found: dict[str, Any] = {
        "loss": (loss / rows).reshape(1),
        "divergence": (divergence / rows).reshape(1),
        "grad_hidden": hidden.grad,
        "grad_head": head.grad,
    }
    tolerance = entries["tolerance"]["values"]
    return [compare(key, value, tensors[f"expected.{key}"], tolerance) for key, value in found.items()]


CHECKS: dict[str, Callable[[Entries, Tensors], list[Part]]] = {
    "decoder": check_decoder,
    "contract": check_contract,
    "tower": check_tower,
    "consistency": check_consistency,
}
