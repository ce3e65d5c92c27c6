"""CDPruner with CLIP's text tower: relevance against loops, the question of a sample, tiles, and what it refuses.

Recorded cases of the published code are in test_golden.
"""

import json

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, SiglipConfig, SiglipModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from tests.support.clip import POSITIONS, save_clip
from tests.support.families import family_inputs, family_model, tokenizer
from tests.support.family_runs import RECORDS, TEXT_ONLY, Setup, padded_inputs, save_checkpoint
from tests.support.helpers import tiny_tokenizer
from vtprune_train import prune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.calls import state_of
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning import method_from_settings, saved_settings
from vtprune_train.pruning.candidates import Candidates, EncoderSignals
from vtprune_train.pruning.methods.cdpruner import LEAST, CDPruner, relevance_by_clip
from vtprune_train.pruning.ops.clip_text import clip_similarity
from vtprune_train.pruning.ops.diversity import determinantal

HIDDEN = 24
QUESTIONS = ["what is the long red thing behind the dog on the left", "", "two ?"]
TEXTS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["no picture"]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip"), HIDDEN))


@pytest.fixture
def model(tmp_path):
    """Loaded from a folder, with its tokenizer."""
    save_checkpoint("llava_next", tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")  # that of family_inputs
    loaded = type(family_model("llava_next")).from_pretrained(tmp_path / "model")
    return loaded.eval()


def segments():
    """Two images of two tiles and a newline, one image of one tile, and one without a question."""
    spans = (ImageSpan(1, 13, tile_tokens=(8, 4)), ImageSpan(15, 13, tile_tokens=(4, 8)))
    layouts = [SegmentLayout(40, spans, (39,), question=QUESTIONS[0])]
    return layouts + [SegmentLayout(20, (ImageSpan(1, 9, tile_tokens=(9,)),), (19,), question=q) for q in QUESTIONS[1:]]


def scene(method):
    generator = torch.Generator().manual_seed(2)
    sizes = [8, 4, 1, 4, 8, 1, 9, 9]
    tile = torch.tensor([0, 1, -1, 2, 3, -1, 4, 5]).repeat_interleave(torch.tensor(sizes))
    features = torch.randn(len(tile), HIDDEN, generator=generator) * (tile >= 0)[:, None]
    hidden = torch.randn(len(tile), 32, generator=generator)
    signals = EncoderSignals(torch.zeros(0, len(tile)), torch.zeros(len(tile), 0), tile, features)
    boundary = method.plan(segments(), 4).boundaries[0]
    return Candidates(boundary, hidden, hidden, hidden[:0], encoder=signals)


def slow_scores(folder, features, question):
    """By transformers' own models, one patch and one row of text at a time."""
    model, words = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = words(question).input_ids
    ids += [0] * (-len(ids) % POSITIONS)
    scores = []
    with torch.no_grad():
        rows = torch.tensor(ids).view(-1, POSITIONS)
        texts = [model.text_projection(model.text_model(input_ids=row[None]).pooler_output)[0] for row in rows]
        for feature in features:
            image = model.visual_projection(model.vision_model.post_layernorm(feature))
            cosines = [torch.cosine_similarity(image, text, dim=0) for text in texts]
            scores.append(-sum(map(float, cosines)) / len(cosines))
    return scores


def test_relevance(clip):
    """Scaled over all images of a sample; the long question fills several rows of text."""
    candidates = scene(CDPruner(keep=0.4, text_tower=clip))
    similarity = clip_similarity(clip, CPU)
    assert len(similarity.rows(QUESTIONS[0])) > 1
    features, patch = candidates.encoder.features, candidates.encoder.tile >= 0
    with torch.no_grad():
        found = relevance_by_clip(similarity, features, patch, candidates.boundary).split([26, 13 - 4, 9])
    for first, question, values in ((0, QUESTIONS[0], found[0]), (35, QUESTIONS[2], found[2])):
        own = features[first : first + len(values)]
        patches = [i for i in range(len(values)) if patch[first + i]]
        scores = dict(zip(patches, slow_scores(clip, own[patches], question), strict=True))
        low, high = min(scores.values()), max(scores.values())
        for place, value in enumerate(values.tolist()):
            expected = (scores[place] - low + LEAST) / (high - low) if place in scores else LEAST
            assert value == pytest.approx(expected, abs=1e-5)
    assert (found[1] == 1).all(), "no question: diversity alone"


def test_every_tile_keeps_its_share(clip):
    method = CDPruner(keep=0.5, text_tower=clip)
    candidates = scene(method)
    chosen = method.choose(candidates).chosen
    assert chosen.tolist() == sorted(chosen.tolist())
    tiles = candidates.encoder.tile
    assert torch.bincount(tiles[chosen]).tolist() == [4, 2, 2, 4, 4, 4], "and no newline"
    assert [span.after for span in candidates.boundary.spans] == [6, 6, 4, 4]
    with torch.no_grad():
        weights = relevance_by_clip(
            clip_similarity(clip, CPU), candidates.encoder.features, tiles >= 0, candidates.boundary
        )
    for tile in range(6):
        own = (tiles == tile).nonzero().flatten()
        expected = own[determinantal(candidates.hidden[own], weights[own], [len(own)], [floor_of(0.5, len(own))])]
        assert torch.equal(chosen[tiles[chosen] == tile], expected)


def noted_questions(monkeypatch):
    questions = []
    real = CDPruner.choose

    def choose(method, candidates):
        questions.append([segment.question for segment in candidates.boundary.segments])
        return real(method, candidates)

    monkeypatch.setattr(CDPruner, "choose", choose)
    return questions


def labels_of(input_ids):
    """The tokens after "assistant :", up to the end of the answer."""
    role, end = tokenizer().convert_tokens_to_ids(["assistant", "</s>"])
    labels = torch.full_like(input_ids, -100)
    for ids, row in zip(input_ids.tolist(), labels, strict=True):
        for start in (place + 2 for place, token in enumerate(ids) if token == role):
            stop = ids.index(end, start) + 1
            row[start:stop] = torch.tensor(ids[start:stop])
    return labels


def test_packed_and_padded_rows_read_the_question(clip, tmp_path, monkeypatch):
    """The collator with its tokenizer, and a padded call with the one in the model's folder."""
    setup, method = Setup("llava", tmp_path), CDPruner(keep=0.4, text_tower=clip)
    parts = setup.parts()
    model = prune(parts.model, method).eval()
    collate = setup.collator(parts, method)
    questions = noted_questions(monkeypatch)
    inputs = padded_inputs(setup, model)
    labels = labels_of(inputs["input_ids"])
    with torch.no_grad():
        model(collate(range(len(RECORDS))))
        model(**inputs, labels=labels)
        model(collate([TEXT_ONLY]))
    packed, padded, text_only = questions
    assert packed == padded and text_only == []
    assert packed[0] == "what is shown here ? assistant :" and packed[2] == "red ? assistant :"


def test_generate_and_single_rows(model, clip):
    prune(model, CDPruner(keep=0.4, text_tower=clip))
    model.generation_config.pad_token_id = 3
    batched = kept_tokens(model, family_inputs("llava_next", TEXTS))
    for text, row in zip(TEXTS, batched, strict=True):
        alone = kept_tokens(model, family_inputs("llava_next", [text]))[0]
        assert [[kept.tolist() for kept in image] for image in row] == [[k.tolist() for k in image] for image in alone]
    other = kept_tokens(model, family_inputs("llava_next", [[0, "left dog ? assistant :"]]))
    assert other[0][0][0].tolist() != batched[0][0][0].tolist(), "the question decides"
    inputs = family_inputs("llava_next", TEXTS)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row, text in enumerate(TEXTS):
            one = family_inputs("llava_next", [text])
            alone = model.generate(**one, max_new_tokens=4, do_sample=False)[:, one["input_ids"].shape[1] :]
            assert torch.equal(tokens[row : row + 1], alone)


def test_training_saves_its_name_alone(model, clip, tmp_path):
    prune(model, CDPruner(keep=0.4, text_tower=clip)).train()
    set_trainable(model, {"projector": 1.0, "language_model": 1.0, "pruning": 1.0})
    names = set(model.state_dict())
    inputs = family_inputs("llava_next", TEXTS[:2])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model(**inputs, labels=labels).loss.backward()
    assert set(model.state_dict()) == names
    assert not any(p.requires_grad or p.grad is not None for p in clip_similarity(clip, CPU).text_model.parameters())
    model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pruning"]["text_tower"] == clip
    again = prune(type(model).from_pretrained(tmp_path / "saved")).eval()
    first, second = (kept_tokens(m, inputs)[0][0][0].tolist() for m in (model.eval(), again))
    assert first == second


def test_it_is_loaded_whole_while_zero_3_shards(clip):
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    loaded = clip_similarity.__wrapped__(clip, CPU)
    assert loaded.text_model.final_layer_norm.weight.shape == (16,)
    assert config.is_zero3(), "and the config is still there"
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    assert is_deepspeed_zero3_enabled()


def test_what_is_refused(model, clip, tmp_path):
    inputs = family_inputs("llava_next", TEXTS[:1])
    prune(model, CDPruner(text_tower=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"text_tower='.*nothing' cannot be loaded: .*; set it to the folder or the"):
        model(**inputs)
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipConfig(text_config={**sizes, "vocab_size": 64}, vision_config={**sizes, "image_size": 28})
    SiglipModel(siglip).save_pretrained(tmp_path / "siglip")
    with pytest.raises(ValueError, match="cannot be loaded: it is a siglip model, not a CLIP model"):
        clip_similarity(str(tmp_path / "siglip"), CPU)
    wide = str(save_clip(tmp_path / "wide", 32))
    with pytest.raises(ValueError, match="its vision tower has 32 channels, but the features of this model have 24"):
        clip_similarity(wide, CPU).patches(torch.zeros(2, 24))
    unknown = prune(family_model("llava_next"), CDPruner(text_tower=clip))
    with pytest.raises(ValueError, match="cdpruner reads the question, but the model was not loaded from a folder"):
        unknown(**inputs)
    with pytest.raises(ValueError, match="cdpruner needs the vision tower's output, which is not available for"):
        prune(family_model("qwen2_vl"), CDPruner(text_tower=clip))


def test_a_model_without_a_tokenizer(clip, tmp_path):
    family_model("llava_next").save_pretrained(tmp_path)
    model = prune(type(family_model("llava_next")).from_pretrained(tmp_path), CDPruner(text_tower=clip))
    with pytest.raises(ValueError, match=r"has no tokenizer \(.*\); save the tokenizer with the model"):
        model(**family_inputs("llava_next", TEXTS[:1]))


def test_the_training_loop_hands_over_its_tokenizer(clip, monkeypatch):
    """A model that training makes from a config has no folder, and draws its evaluation images all the same."""
    model = prune(family_model("llava_next"), CDPruner(text_tower=clip)).eval()
    state_of(model).tokenizer = tiny_tokenizer()
    questions = noted_questions(monkeypatch)
    with torch.no_grad():
        model(**family_inputs("llava_next", TEXTS))
    assert questions == [["what is shown here ? assistant :", "two ? assistant :"]]


def test_checkpoints_saved_before_have_no_text_tower(clip):
    config = type("Config", (), {"pruning": {"method": "cdpruner", "keep": 0.25, "positions": "keep"}})()
    method = method_from_settings(saved_settings(config))
    assert method.text_tower is None and not method.needs.from_tower and not method.needs.question
    published = CDPruner(keep=0.25, text_tower=clip)
    assert method_from_settings(published.settings()) == published
    boundary = published.plan(segments(), 8).boundaries[0]
    assert published.selector_flops(32, boundary) > 0
