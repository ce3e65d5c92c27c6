"""The vision tower's attention, read while it runs: against the tower's own maps, packed against padded, refusals."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationMixin,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.support.families import TEXT, VISION, family_inputs, family_model, images_repeated
from tests.support.family_runs import RECORDS, TEXT_ONLY, Setup, padded_inputs
from tests.support.helpers import tiny_model
from vtprune_train import dense, prune
from vtprune_train.core.stream import Drop
from vtprune_train.models.families.llava_onevision import OneVision
from vtprune_train.models.forward import encoder
from vtprune_train.models.forward.encoder import layers_read
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop
from vtprune_train.pruning.methods.uniform import Uniform
from vtprune_train.pruning.needs import Needs

TEXTS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["no picture"]]
SEEN = []


class Spy(PruningMethod):
    """Keeps half, and remembers what it was shown."""

    encoder_layers: tuple[int, ...] = (-1, 0)
    encoder_rows: str = "class"
    encoder_features: bool = False

    name = "spy"

    @property
    def needs(self):
        return Needs(
            encoder_layers=self.encoder_layers, encoder_rows=self.encoder_rows, encoder_features=self.encoder_features
        )

    def drops(self, num_layers):
        return (Drop(0, 0.5),)

    def score(self, candidates):
        SEEN.append(candidates.encoder)
        return torch.nan_to_num(candidates.encoder.attention.sum(dim=0))


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


def slow_signals(model, inputs, layers, rows="class"):
    """Attention and keys by patch [tiles, patches] from the tower's own eager attention."""
    base = model.model
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5:
        pixels = torch.cat([own[own.abs().sum(dim=(1, 2, 3)) > 0] for own in pixels])
    tower = base.vision_tower
    keys = []
    handle = tower.encoder.layers[layers[-1]].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    with torch.no_grad():
        maps = tower(pixels, output_attentions=True).attentions
    tower.config._attn_implementation = before
    handle.remove()
    if tower.config.model_type == "clip_vision_model":
        means = [maps[layer].mean(dim=1) for layer in layers]
        return [m[:, 0, 1:] if rows == "class" else m.mean(dim=1)[:, 1:] for m in means], keys[0][:, 1:]
    return [maps[layer].mean(dim=1).mean(dim=1) for layer in layers], keys[0]


@pytest.mark.parametrize("rows", ["class", "all"])
@pytest.mark.parametrize("name", ["llava_next", "llava", "llava_onevision"])
def test_signals_are_the_towers_own(name, rows):
    """Each token's attention and key are those of one patch of its tile; in every tile each patch is met in order."""
    model = prune(family_model(name), Spy(encoder_rows=rows))
    inputs = family_inputs(name, TEXTS)
    with torch.no_grad():
        model(**inputs)
    (signals,) = SEEN
    depth = model.config.vision_config.num_hidden_layers
    with dense(model):
        last = depth - 1 if name == "llava_onevision" else depth - 2
        attention, keys = slow_signals(model, inputs, [last, 0], rows)
    assert signals.tile.max() < len(keys)
    for token in range(len(signals.tile)):
        tile = int(signals.tile[token])
        if tile < 0:
            assert signals.attention[:, token].isnan().all() and not signals.keys[token].any()
            continue
        # keys are of the last layer named
        patch = int((keys[tile] - signals.keys[token]).abs().sum(dim=-1).argmin())
        torch.testing.assert_close(signals.keys[token], keys[tile, patch])
        for layer in range(2):
            torch.testing.assert_close(signals.attention[layer, token], attention[layer][tile, patch])


@pytest.mark.parametrize("layers", [(), (-1,)])
@pytest.mark.parametrize("name", ["llava_next", "llava", "llava_onevision"])
def test_features_are_what_the_projector_reads(name, layers):
    """The projector, applied to a token's signals, gives the token; attention alone asks for no features."""
    model = prune(family_model(name), Spy(encoder_layers=layers, encoder_features=True))
    inputs = family_inputs(name, TEXTS)
    with torch.no_grad():
        model(**inputs)
        (signals,) = SEEN
        expected = torch.cat(
            list(
                model.model.get_image_features(
                    **{key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
                ).pooler_output
            )
        ).flatten(0, -2)
        projected = model.model.multi_modal_projector(signals.features)
    patches = signals.tile >= 0
    assert signals.attention.shape == (len(layers), len(expected)) and patches.sum() > 20
    assert signals.keys.shape == (len(expected), signals.features.shape[1] if layers else 0)
    assert not signals.features[~patches].any() and not signals.features.requires_grad
    # LLaVA-OneVision shrinks the grid of large images, whose tokens are mixtures
    same = (projected - expected).abs().amax(dim=1) < 1e-5
    assert same[patches].float().mean() > (0.3 if name == "llava_onevision" else 0.999)
    SEEN.clear()
    with torch.no_grad():
        prune(family_model(name), Spy())(**inputs)
    assert SEEN[0].features is None


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_features_of_the_same_patch(name):
    """Tokens whose signals are of one patch have the features that the projector makes of it: the mapping is the
    family's own. Shrunk grids are left out, whose tokens are mixtures."""
    model = family_model(name)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
        model.model.multi_modal_projector.linear_2.bias.zero_()
    marks = {}

    def mark(module, args, output):  # every patch's feature is its number, counted over the tiles
        count = output.shape[0] * output.shape[1]
        marks["patches"] = output.shape[1]
        return torch.arange(1.0, count + 1).view(*output.shape[:2], 1).expand(output.shape)

    model.model.multi_modal_projector.register_forward_hook(mark)
    with torch.no_grad():
        model.model.image_newline.zero_()
    shown = {}
    real = encoder.Reading.signals

    def spy(self, index):
        shown["index"] = index
        return real(self, index)

    prune(model, Spy())
    inputs = family_inputs(name, [[1, "what ?"], [2, "what ?"], [0, "and", 2, "two ?"]])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(encoder.Reading, "signals", spy)
        arguments = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        features = torch.cat(list(model.model.get_image_features(**arguments).pooler_output))[:, 0]
    index = shown["index"]
    whole = (features == features.round()) & (index >= 0)
    assert torch.equal(features[whole], index[whole] + 1.0)
    assert torch.equal(features[index < 0], torch.zeros(int((index < 0).sum())))
    assert whole.sum() > 100


def test_a_shrunk_grid_shows_the_patches_at_its_middles():
    layout = OneVision.of(family_model("llava_onevision").config)
    layout = OneVision(layout.anyres, 2)  # 84 x 84 pixels: 12 x 12 patches, of which 5 x 5 features are left
    ((shown, tiles),) = layout.patches([(84, 84)])
    rows, columns = layout._grid((84, 84))
    assert (rows, columns) == (5, 5) and tiles == 10 and len(shown) == 16 + 5 * 6
    middles = [int((i + 0.5) * 12 / 5) for i in range(5)]
    for i, row in enumerate(middles):
        for j, column in enumerate(middles):
            tile = 1 + (row // 4) * 3 + column // 4
            assert shown[16 + i * 6 + j] == tile * 16 + (row % 4) * 4 + column % 4
        assert shown[16 + i * 6 + 5] == -1


@pytest.mark.parametrize("name", ["llava_next", "llava", "llava_onevision"])
def test_packed_rows_see_what_padded_rows_do(name, tmp_path):
    """The loop's collator and the family's own processor, on samples of several pictures and of none."""
    setup = Setup(name, tmp_path)
    parts = setup.parts()
    spy = Spy(encoder_features=True)
    model = prune(parts.model, spy).eval()
    collate = setup.collator(parts, spy)
    with torch.no_grad():
        model(collate(range(len(RECORDS))))
        model(**padded_inputs(setup, model))
        model(collate([TEXT_ONLY]))
    packed, padded, text_only = SEEN
    assert packed.attention.shape == (2, len(packed.tile)) and len(text_only.tile) == 0
    torch.testing.assert_close(packed.attention, padded.attention, equal_nan=True)
    torch.testing.assert_close(packed.keys, padded.keys)
    torch.testing.assert_close(packed.features, padded.features)
    assert torch.equal(packed.tile, padded.tile)


def test_training_reads_without_gradients_and_leaves_no_hooks():
    """Also with activation checkpointing of a trained tower: gradients are those of a method that reads nothing."""

    class Half(PruningMethod):
        name = "half"

        def drops(self, num_layers):
            return (Drop(0, 1.0),)

        def score(self, candidates):
            return torch.zeros(len(candidates.hidden))

    class Reads(Half):
        @property
        def needs(self):
            return Needs(encoder_layers=(-1,), encoder_features=True)

    gradients = []
    for method in (Half(), Reads()):
        model = tiny_model()
        model.model.vision_tower.gradient_checkpointing_enable({"use_reentrant": False})
        prune(model, method).train()
        inputs = family_inputs("llava_next", TEXTS[:2])
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        model(**inputs, labels=labels).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        hooks = [
            len(module._forward_hooks) for module in model.model.vision_tower.modules() if hasattr(module, "weight")
        ]
        assert not any(hooks) and not model.model.multi_modal_projector._forward_pre_hooks
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert any("vision_tower" in key for key in gradients[0])


def test_generate_asks_for_features_first():
    """``generate`` makes them before it calls ``forward``. Several answers to one prompt share them or, before
    transformers 5.18, get copies."""
    model = prune(family_model("llava_next"), Spy(encoder_features=True))
    inputs = family_inputs("llava_next", TEXTS)
    expected = kept_tokens(model, inputs)
    first = SEEN[0]
    SEEN.clear()
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(SEEN[0].attention, first.attention, equal_nan=True)
    torch.testing.assert_close(SEEN[0].features, first.features)
    assert len(expected[1]) == 2
    SEEN.clear()
    inputs = family_inputs("llava_next", TEXTS[:2])
    with torch.no_grad(), images_repeated(model):
        model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        images = [len(image) for image in model.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output]  # fmt: skip
        one, two = first.attention.split([images[0], sum(images[1:])], dim=1)
        rows = [one, two] if hasattr(GenerationMixin, "_expand_multimodal_outputs") else [one, one, two, two]
        torch.testing.assert_close(SEEN[0].attention, torch.cat(rows, dim=1), equal_nan=True)
        assert len(SEEN[0].features) == sum(row.shape[1] for row in rows)


def test_layers():
    config = tiny_model().config  # 3 layers, features from hidden_states[-2]: the second layer's output
    assert layers_read(config, (-1, -2, 0, 2)) == [1, 0, 0, 2]
    assert layers_read(config, (-9, -8, -1)) == [1], "as many as there are"
    with pytest.raises(ValueError, match="has no layer 3: it has 3"):
        layers_read(config, (3,))
    with pytest.raises(ValueError, match="are not among the vision tower"):
        layers_read(config, (-3,))
    config.vision_feature_layer = [-1, 1]
    assert layers_read(config, (-1,)) == [2]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_families_whose_tower_is_not_read(name):
    with pytest.raises(
        ValueError,
        match=r"spy needs .* not available for .*: it cannot be read .*; use a method that does not need it.*divprune",
    ):
        prune(family_model(name), Spy())
    with pytest.raises(ValueError, match="spy needs the vision tower's output, which is not available for"):
        prune(family_model(name), Spy(encoder_layers=(), encoder_features=True))


def test_later_turns_in_full_are_refused():
    method = Combined((Spy(), PyramidDrop(layers=(2,), keep=(0.5,), multi_turn="keep_dense")))
    with pytest.raises(ValueError, match="multi_turn='keep_dense' cannot be combined"):
        prune(family_model("llava_next"), method)


def test_features_from_elsewhere_are_refused():
    model = prune(family_model("llava_next"), Spy())
    inputs = family_inputs("llava_next", TEXTS[:1])
    with dense(model):
        features = model.model.get_image_features(
            pixel_values=inputs.pop("pixel_values"), image_sizes=inputs.pop("image_sizes")
        )
    with pytest.raises(ValueError, match="pass pixel_values"):
        model(**inputs, mm_encoder_outputs={"image": features})


def test_generate_knows_where_tokens_lie(monkeypatch):
    """Rasters travel with the features as signals do, for methods that read no tower."""
    told = []
    real = Uniform.choose

    def choose(self, candidates):
        told.append([span.grids for span in candidates.boundary.spans])
        return real(self, candidates)

    monkeypatch.setattr(Uniform, "choose", choose)
    model = prune(family_model("llava_next"), Uniform())
    inputs = family_inputs("llava_next", TEXTS)
    with torch.no_grad():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert told[0] == told[1] and all(len(grids) == 2 for grids in told[0])


@pytest.mark.parametrize(("tower", "strategy", "tokens"), [("clip", "full", 17), ("siglip", "full", 16)])
def test_other_towers_in_llava(tower, strategy, tokens):
    """A class token that stays among the visual tokens is no patch; a tower without one has none to cut off."""
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**VISION)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=4, vision_feature_select_strategy=strategy
    )
    model = prune(LlavaForConditionalGeneration(config).float().eval(), Spy())
    ids = torch.tensor([[1, *[4] * tokens, 7, 8], [1, *[4] * tokens, 9, 7]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}
    with torch.no_grad():
        model(**inputs)
    (signals,) = SEEN
    expected, keys = (torch.stack(part) if isinstance(part, list) else part for part in slow(model, inputs))
    patches = signals.tile >= 0
    assert (~patches).nonzero().squeeze(1).tolist() == ([0, 17] if tower == "clip" else [])
    torch.testing.assert_close(signals.attention[:, patches], expected.flatten(1))
    torch.testing.assert_close(signals.keys[patches], keys.flatten(0, 1))


def slow(model, inputs):
    with dense(model):
        return slow_signals(model, inputs, [1, 0])
