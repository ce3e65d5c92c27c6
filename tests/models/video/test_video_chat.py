"""Videos over several turns on one cache, with beams and several answers, and in other packages' training."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Trainer, TrainingArguments

from tests.support.families import SPECIAL, family_model, images_repeated
from tests.support.video_inputs import is_qwen, video_inputs
from vtprune_train import PyramidDrop, prune

pytestmark = pytest.mark.slow

CHAT = ["qwen3_vl", "llava_onevision"]
PER = ["video", "frame"]
A, B, C, D = (2, 4, 6), (2, 2, 4), (2, 4, 4), (2, 2, 6)  # videos: steps, rows and columns of patches
TURNS = [
    [["user", A, "what is shown ? assistant :"], ["is the dog red ?"]],
    [["and", B, "left ? assistant :"], ["and here", C, "no ?"]],
    [["a red cat ?"], ["round", D, "yes assistant :"]],
]
BATCH = [[A, "what is shown here ? assistant :"], ["a red", B, "and", C, "two ? assistant :"], ["what is a dog ?"]]


def inputs_of(name, texts, side="left"):
    """The same pixels for a video in any batch."""
    inputs = video_inputs(name, texts, side)
    videos = [part for text in texts for part in text if isinstance(part, tuple)]
    if videos:
        pixels = inputs["pixel_values_videos"]
        sizes = [np.prod(grid) for grid in videos] if is_qwen(name) else [1] * len(videos)
        made = [
            torch.randn(size, *pixels.shape[1:], generator=torch.Generator().manual_seed(int(np.prod(grid))))
            for grid, size in zip(videos, sizes, strict=True)
        ]
        inputs["pixel_values_videos"] = torch.cat(made)
    return inputs


def half(**settings):
    return PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), **settings)


def pruned(name, method):
    return prune(family_model(name).double(), method).eval()


def generated(model, inputs, **more):
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL))), **more}
    with torch.no_grad():
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


def conversation(model, name, turns):
    """[B, V] logits after the last turn, all on one cache, and the lengths of the cache."""
    cache, masks = DynamicCache(), []
    with torch.no_grad():
        for texts in turns:
            inputs = inputs_of(name, texts)
            masks.append(inputs.pop("attention_mask"))
            made = model(**inputs, attention_mask=torch.cat(masks, dim=1), past_key_values=cache, use_cache=True)
    return made.logits[:, -1], [cache.get_seq_length(layer) for layer in (0, 5)]


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", CHAT)
def test_turns_on_one_cache(name, per):
    """Rows of a batch equal single rows, with new videos in later turns."""
    model = pruned(name, half(per=per))
    batched, lengths = conversation(model, name, TURNS)
    assert lengths[1] < lengths[0]
    for row in range(2):
        single, _ = conversation(model, name, [[texts[row]] for texts in TURNS])
        assert torch.allclose(batched[row], single[0], atol=1e-6), row


@pytest.mark.parametrize("name", CHAT)
def test_turns_without_dropping_are_those_of_transformers(name):
    first, second = [[texts[0]] for texts in TURNS[:2]]
    plain = family_model(name).double().eval()
    whole = inputs_of(name, [first[0] + second[0]])
    with torch.no_grad():
        expected = plain(**whole).logits[:, -1]
    found, _ = conversation(pruned(name, PyramidDrop(layers=(2, 4), keep=(1.0, 1.0))), name, [first, second])
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("per", PER)
def test_keep_dense_equals_a_first_call_with_all_that_was_said(per):
    name = "llava_onevision"
    model, first_call = pruned(name, half(per=per, multi_turn="keep_dense")), pruned(name, half(per=per))
    for row in range(2):
        turns = [[texts[row]] for texts in TURNS]
        found, _ = conversation(model, name, turns)
        whole = [[part for [text] in turns for part in text]]
        with torch.no_grad():
            expected = first_call(**inputs_of(name, whole)).logits[:, -1]
        assert torch.allclose(found, expected, atol=1e-6), row
        assert not torch.allclose(conversation(first_call, name, turns)[0], expected, atol=1e-3)


def test_keep_dense_is_refused_for_positions_in_three_parts():
    with pytest.raises(ValueError, match="Qwen3-VL: multi_turn='keep_dense' is not supported"):
        pruned("qwen3_vl", half(multi_turn="keep_dense"))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", CHAT)
def test_batches_beams_and_several_answers(name, per):
    model = pruned(name, half(per=per))
    singles = torch.cat([generated(model, inputs_of(name, [text])) for text in BATCH])
    inputs = inputs_of(name, BATCH)
    for side in ("left", "right"):
        assert torch.equal(generated(model, inputs_of(name, BATCH, side)), singles), side
    assert torch.equal(generated(model, inputs, use_cache=False), singles)
    with images_repeated(model) if name != "qwen3_vl" else nullcontext():
        answers = generated(model, inputs, num_beams=3, num_return_sequences=2)
        alone = [generated(model, inputs_of(name, [t]), num_beams=3, num_return_sequences=2) for t in BATCH]
    assert answers.shape[0] == 2 * len(BATCH)
    assert torch.equal(answers, torch.cat(alone))


# ------------------------------------------------------------------------------------------------- other packages


def labelled(name, between=False):
    """Labels of all words, but those before and between the frames of videos, unless ``between``."""
    inputs = inputs_of(name, BATCH, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels < len(SPECIAL), -100)
    for row, ids in zip(labels, inputs["input_ids"].tolist(), strict=True):
        visual = [offset for offset, token in enumerate(ids) if token < len(SPECIAL) and token not in (1, 2, 3)]
        row[: 0 if between else max(visual, default=-1) + 1] = -100
    return {**inputs, "labels": labels}


def trained(model, inputs, folder):
    """The loss of a step of transformers' Trainer, and the trained parameters after it."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, learning_rate=0.1, optim="sgd", report_to=[], use_cpu=True,
        gradient_checkpointing=True, remove_unused_columns=False, save_strategy="no", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{}], data_collator=lambda _: dict(inputs))
    loss = trainer.train().training_loss
    return loss, {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", CHAT)
def test_trainer_and_lora(name, lora, tmp_path):
    """A step with nothing dropped is that of the plain model; with dropping, the loss differs."""
    inputs, steps = labelled(name), {}
    for key, method in {"plain": None, "all": PyramidDrop(layers=(2, 4), keep=(1.0, 1.0)), "half": half()}.items():
        model = family_model(name)
        model = model if key == "plain" else prune(model, method)
        if lora:
            torch.manual_seed(0)
            target = r".*language_model.*(q_proj|v_proj)"
            model = get_peft_model(model, LoraConfig(r=4, target_modules=target, init_lora_weights=False))
        steps[key] = trained(model.train(), inputs, tmp_path / key)
    loss, plain = steps["plain"]
    assert np.isclose(steps["all"][0], loss, rtol=1e-5) and not np.isclose(steps["half"][0], loss, rtol=1e-3)
    for key, value in plain.items():
        scale = value.abs().max().clamp(min=1.0)
        assert (steps["all"][1][key] - value).abs().max() <= 1e-4 * scale, key
    moved = [not torch.equal(value, plain[key]) for key, value in steps["half"][1].items()]
    assert sum(moved) > len(moved) / 2


def test_labels_between_the_frames(tmp_path):
    """As of a collator that masks only visual tokens: fine unless a whole video's tokens are dropped together."""
    inputs, plain = labelled("qwen3_vl", between=True), family_model("qwen3_vl")
    expected = plain(**inputs).loss
    assert torch.isclose(prune(family_model("qwen3_vl"), None)(**inputs).loss, expected, rtol=1e-5)
    everything = PyramidDrop(layers=(2, 4), keep=(1.0, 1.0), per="frame")
    assert torch.isclose(prune(family_model("qwen3_vl"), everything)(**inputs).loss, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"text between the frames of a video .* set its labels to -100"):
        prune(family_model("qwen3_vl"), half())(**inputs)
