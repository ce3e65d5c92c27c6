"""What the contract offers, through the model: drops at layer 0, adaptive counts, merging, tokens that return or are
added, combinations. Small methods made for the purpose; each in packed and padded passes, cached and not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import SPECIAL, family_inputs, family_model, images_repeated
from vtprune_train import Needs, PruningMethod, PyramidDrop, prune
from vtprune_train.core.plan import counts_per_stage
from vtprune_train.core.stream import Drop
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.candidates import Selection
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.ops.selection import top_k_per_span

BATCH = [
    [0, "what is shown here ? assistant :"],
    ["a red", 1, "and", 2, "two ? assistant :"],
    ["what is a dog ? assistant :"],
    [3, 0, "left ? yes"],
]


def norms(candidates):
    """Scores that follow from each token alone."""
    return candidates.hidden.detach().float().norm(dim=-1)


class Early(PruningMethod):
    """Drops before the decoder."""

    keep: float = 0.5
    positions: str = "keep"
    layer: int = 0
    name = "early"

    @property
    def needs(self):
        return Needs(positions=self.positions)

    def drops(self, num_layers):
        return (Drop(self.layer, self.keep),)

    def score(self, candidates):
        return norms(candidates)


class Adaptive(PruningMethod):
    """Keeps what exceeds its span's mean attention, and afterwards a half of the original tokens at most."""

    layers: tuple[int, int] = (2, 4)
    rank_with: str = "next_layer"
    positions: str = "renumber"
    name = "adaptive"

    @property
    def needs(self):
        return Needs(rank_with=self.rank_with, positions=self.positions)

    def drops(self, num_layers):
        first, second = self.layers
        return (Drop(first, 0.6, adaptive=True), Drop(second, 0.3))

    def choose(self, candidates):
        boundary = candidates.boundary
        with torch.no_grad():
            scores = mean_query_attention(candidates.ranking, boundary)
            if not boundary.drop.adaptive:
                return Selection(top_k_per_span(scores, boundary.span_of_visual, boundary.take))
            num_spans = len(boundary.spans)
            sums = torch.zeros(num_spans).index_add(0, boundary.span_of_visual, scores)
            sizes = torch.bincount(boundary.span_of_visual, minlength=num_spans)
            over = scores > (sums / sizes.clamp(min=1))[boundary.span_of_visual]
            counts = torch.bincount(boundary.span_of_visual[over], minlength=num_spans)
            return Selection(torch.nonzero(over).squeeze(1), counts=counts)


class Merging(PruningMethod):
    """The last kept token of each span becomes the mean of all that were dropped, and stands first."""

    positions: str = "keep"
    name = "merging"

    @property
    def needs(self):
        return Needs(positions=self.positions)

    def drops(self, num_layers):
        return (Drop(3, 0.4),)

    def choose(self, candidates):
        chosen, at, values, offset = [], [], [], 0
        start = 0
        for span in candidates.boundary.spans:
            own = torch.arange(start, start + span.before)
            kept = own[: span.after].flip(0)
            chosen.append(kept)
            if span.after:
                at.append(offset)
                values.append(candidates.hidden[own[span.after - 1 :]].mean(dim=0))
            start, offset = start + span.before, offset + span.after
        empty = candidates.hidden[:0]
        return Selection(
            torch.cat([torch.zeros(0, dtype=torch.int64), *chosen]),
            torch.tensor(at, dtype=torch.int64),
            torch.stack(values) if values else empty,
        )


class Detour(PruningMethod):
    """Nothing visual before layer 2; all enter; a half skips layer 4; nothing is left from layer 5 on."""

    leave: bool = True
    name = "detour"

    def drops(self, num_layers):
        drops = [Drop(0, 0.0), Drop(2, 1.0, returns=True), Drop(4, 0.5), Drop(5, 1.0, returns=True)]
        return (*drops, Drop(5, 0.0)) if self.leave else tuple(drops)

    def choose(self, candidates):
        if not candidates.boundary.drop.returns:
            return super().choose(candidates)
        everything = torch.arange(len(candidates.boundary.span_of_visual))
        assert candidates.hidden.shape == candidates.before.shape
        return Selection(everything)

    def score(self, candidates):
        return norms(candidates)


class AddTwo(Drop):
    def kept(self, length, before):
        return before + 2


class Adding(PruningMethod):
    """Two tokens stand behind each image; from layer 3 on only they do."""

    name = "adding"

    def drops(self, num_layers):
        return (AddTwo(0, 1.0, adds=True), replace(LastTwo(3, 0.0)))

    def choose(self, candidates):
        spans, chosen, at, start, offset = candidates.boundary.spans, [], [], 0, 0
        for span in spans:
            own = torch.arange(start, start + span.before)
            if candidates.boundary.drop.adds:
                chosen.append(torch.cat([own, own[-1:], own[-1:]]))
                at += [offset + span.before, offset + span.before + 1]
            else:
                chosen.append(own[-2:])
            start, offset = start + span.before, offset + span.after
        chosen = torch.cat([torch.zeros(0, dtype=torch.int64), *chosen])
        if not at:
            return Selection(chosen)
        learned = torch.linspace(-1, 1, 2 * candidates.hidden.shape[1]).view(2, -1).to(candidates.hidden.dtype)
        return Selection(chosen, torch.tensor(at), learned.repeat(len(spans), 1))


class LastTwo(Drop):
    def kept(self, length, before):
        return 2


METHODS = {
    "early_keep": Early(),
    "early_renumber": Early(positions="renumber"),
    "adaptive": Adaptive(),
    "adaptive_keep": Adaptive(positions="keep", rank_with="this_layer"),
    "merging": Merging(),
    "merging_renumber": Merging(positions="renumber"),
    "detour": Detour(),
    "detour_stay": Detour(leave=False),
    "adding": Adding(),
    "combined": Combined((Early(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))),
    "combined_renumber": Combined((Early(positions="renumber"), Adaptive(positions="keep"))),
}


def generated(model, inputs, steps=6, **more):
    settings_ = {"max_new_tokens": steps, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL)))}
    with torch.no_grad():
        return model.generate(**inputs, **settings_, **more)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_cached_batched_and_single(family, name):
    """A batch is its single runs, and decoding on the cache is running the whole row again for every token."""
    model = family_model(family)
    plain = generated(model, family_inputs(family, BATCH[:1]))
    prune(model, METHODS[name])
    singles = torch.cat([generated(model, family_inputs(family, [text])) for text in BATCH])
    for side in ("left", "right"):
        assert torch.equal(generated(model, family_inputs(family, BATCH, side)), singles), side
    for row, text in enumerate(BATCH):
        again = generated(model, family_inputs(family, [text]), use_cache=False)
        assert torch.equal(again[0], singles[row]), row
    assert not torch.equal(plain[0], singles[0]), "the method changed nothing"


@pytest.mark.parametrize("name", METHODS)
def test_beams_reorder_every_layer(name):
    model = prune(family_model("llava_next"), METHODS[name])
    inputs = family_inputs("llava_next", BATCH)
    with images_repeated(model):
        with_cache = generated(model, inputs, num_beams=3)
        assert torch.equal(with_cache, generated(model, inputs, num_beams=3, use_cache=False))


@pytest.mark.parametrize("name", METHODS)
def test_gradients_flow_and_recomputation_changes_nothing(name):
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = prune(family_model("llava_next"), METHODS[name]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = family_inputs("llava_next", BATCH)
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    assert torch.equal(losses[0], losses[1])
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_a_token_that_returns_has_the_state_it_had():
    """All enter late, nothing is dropped: text has been through the first layers alone, pictures through none."""

    class Late(PruningMethod):
        name = "late"

        def drops(self, num_layers):
            return (Drop(0, 0.0), Drop(2, 1.0, returns=True))

        def choose(self, candidates):
            taken = len(candidates.boundary.take) if not candidates.boundary.drop.returns else None
            if taken is None:
                seen["back"] = candidates.hidden
                return Selection(torch.arange(len(candidates.hidden)))
            seen["aside"] = candidates.hidden
            return Selection(torch.zeros(0, dtype=torch.int64))

    seen = {}
    model = prune(family_model("llava_next"), Late())
    kept = kept_tokens(model, family_inputs("llava_next", BATCH[:2]))
    assert torch.equal(seen["aside"], seen["back"])
    for row in kept:
        for none, everything in row:
            assert len(none) == 0
            assert everything.tolist() == list(range(len(everything)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=6), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_budgets_multiply(lengths, ratios):
    """Each method of a combination counts from what it finds."""
    drops = [Drop(layer, ratio, owner=layer) for layer, ratio in enumerate(ratios)]
    counts = counts_per_stage(drops, lengths)
    for index, length in enumerate(lengths):
        now = length
        for stage, ratio in enumerate(ratios):
            now = int(now * ratio)
            assert counts[stage + 1][index] == now


def test_combinations_that_cannot_be():
    with pytest.raises(ValueError, match="at least two"):
        Combined((Early(),))
    with pytest.raises(ValueError, match="early drops tokens before layer 3, but detour has tokens set aside"):
        Combined((Detour(), Early(layer=3))).drops(6)
    with pytest.raises(ValueError, match="cannot be nested"):
        Combined((Early(), Combined((Early(), Early()))))


def test_an_init_would_be_lost_and_is_refused():
    with pytest.raises(TypeError, match=r"Mine defines __init__, which would be replaced; .* in __post_init__"):

        class Mine(PruningMethod):
            keep: float = 0.5

            def __init__(self, keep):
                self.keep = keep
