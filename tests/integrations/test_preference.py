"""TRL's DPO, KTO, GRPO and RLOO trainers learn a small task with a packed and with a pruned model.

They run where the packages of requirements-ecosystem.txt are installed (``make ecosystem``).
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import LlavaNextForConditionalGeneration, set_seed

from tests.support.helpers import tiny_model
from tests.support.trl_data import ANSWERS, chat_processor, dataset_of, draw_image
from vtprune_train import PyramidDrop, pack, prune
from vtprune_train.models.forward import padded
from vtprune_train.models.forward.padded import kept_tokens

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl", reason="TRL is not installed (make ecosystem)")

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
METHODS = {"packed": pack, "pruned": lambda model: prune(model, HALF)}
BY_REFERENCE = {"by_reference": lambda model: prune(model, HALF, rank_by="reference")}
UPPER_IDS_FROM = 32  # a rollout's reward is its share of the upper half of the 64 token ids
FIRST = LAST = 5


def trainer(kind, folder, how, lora=False, **settings):
    set_seed(0)
    tiny_model().save_pretrained(folder / "model")
    chat_processor().save_pretrained(folder / "model")
    change = {**METHODS, **BY_REFERENCE}.get(how) or (lambda model: prune(model, how))
    model = change(LlavaNextForConditionalGeneration.from_pretrained(folder / "model"))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]}

    def said(number):
        return [{"role": "assistant", "content": [{"type": "text", "text": ANSWERS[number]}]}]

    columns = {
        "DPO": lambda n: {"chosen": said(n % 2), "rejected": said(2 + n % 2)},
        "KTO": lambda n: {"completion": said(n % 4), "label": n % 4 < 2},
    }.get(kind, lambda n: {})
    rows = [{"images": [draw_image(n)], "prompt": [user], **columns(n)} for n in range(8)]
    specific = {"max_length": None, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    if kind in ("GRPO", "RLOO"):
        specific = {
            "per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 6, "learning_rate": 3e-3,
        }  # fmt: skip
    more = {}
    if lora:
        specific["learning_rate"] = 1e-2
        more["peft_config"] = LoraConfig(target_modules="all-linear", r=8, lora_alpha=32)
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = share_of_upper_ids
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "run"), lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, seed=0, **{**specific, **settings},
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=dataset_of(rows), processing_class=chat_processor(), **more
    )


def share_of_upper_ids(completion_ids, **_):
    return [float(np.mean(np.array(ids) >= UPPER_IDS_FROM)) for ids in completion_ids]


def learned(kind, folder, how, key, **settings):
    """What the trainer logs under ``key`` at every step; printed, for the numbers in docs/preference.md."""
    made = trainer(kind, folder, how, **settings)
    made.train()
    values = [entry[key] for entry in made.state.log_history if key in entry]
    print(f"{kind} {how}: {key} {np.mean(values[:FIRST]):.2f} -> {np.mean(values[-LAST:]):.2f}, {len(values)} steps")
    return values


@pytest.mark.parametrize("how", list(METHODS))
@pytest.mark.parametrize(("kind", "steps"), [("DPO", 16), ("KTO", 24)])
def test_the_margin_between_preferred_and_rejected_answers_grows(tmp_path, kind, steps, how):
    margins = learned(kind, tmp_path, how, "rewards/margins", max_steps=steps)
    assert len(margins) == steps
    assert margins[0] == pytest.approx(0.0, abs=1e-4)
    assert np.mean(margins[-LAST:]) > 2.0


@pytest.mark.parametrize("how", list(METHODS))
@pytest.mark.parametrize(("kind", "beta", "rise"), [("GRPO", 0.0, 0.3), ("RLOO", 0.01, 0.15)])
def test_the_reward_of_rollouts_rises(tmp_path, kind, beta, rise, how):
    rewards = learned(kind, tmp_path, how, "reward", max_steps=24, beta=beta)
    assert len(rewards) == 24
    assert np.mean(rewards[-LAST:]) > np.mean(rewards[:FIRST]) + rise


@pytest.mark.parametrize("how", [*METHODS, *BY_REFERENCE])
def test_scoring_gives_the_log_probabilities_of_the_rollout(tmp_path, how):
    """The first importance ratio of a step is therefore 1: both rank by the last token of the prompt."""
    made = trainer("GRPO", tmp_path, how, max_steps=3, beta=0.01)
    made.train()
    model, processor = made.model.eval(), chat_processor()
    processor.tokenizer.padding_side = "left"
    texts = ["user : <image> what is shown ? assistant :", "user : <image> yes ? assistant :"]
    inputs = processor(images=[draw_image(0), draw_image(1)], text=texts, return_tensors="pt", padding=True)
    rollout = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=True, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[model.config.image_token_id],
    )  # fmt: skip
    completion = rollout.sequences[:, inputs["input_ids"].shape[1] :]
    sampled = torch.stack(rollout.logits, dim=1).log_softmax(dim=-1).gather(2, completion[:, :, None])[:, :, 0]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(completion)], dim=1)
    images = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    scored, _, _ = made._get_per_token_logps_and_entropies(
        model, rollout.sequences, mask, completion.shape[1], num_images=[1, 1], **images
    )
    assert torch.allclose(scored, sampled, atol=1e-4)


def test_the_rollouts_of_a_prompt_share_its_prefill(tmp_path, monkeypatch):
    rows = []
    segments = padded._segments

    def spy(*args):
        made = segments(*args)
        rows.append(len(made))
        return made

    made = trainer("GRPO", tmp_path, "pruned", max_steps=1)
    monkeypatch.setattr(padded, "_segments", spy)
    made.train()
    assert rows == [2, 16], "16 rollouts of 2 prompts are prefilled as 2 rows, and scored as 16"


def kept_by(model, seeds):
    """The visual tokens that reach the last layers, ``{(row, token)}``."""
    inputs = chat_processor()(
        images=[draw_image(seed) for seed in seeds], text=["user : <image> what is shown ? assistant :"] * len(seeds),
        return_tensors="pt", padding=True,
    )  # fmt: skip
    kept = kept_tokens(model.eval(), inputs)
    return {(row, token) for row, images in enumerate(kept) for token in images[0][-1].tolist()}


def test_a_moved_policy_keeps_other_tokens_than_its_reference(tmp_path):
    """Each ranks with its own attention. Printed, for the numbers in docs/preference.md."""
    made = trainer("DPO", tmp_path, "pruned", max_steps=16)
    assert kept_by(made.model, range(8)) == kept_by(made.ref_model, range(8))
    made.train()
    policy, reference = kept_by(made.model, range(8)), kept_by(made.ref_model, range(8))
    print(f"{len(policy & reference) / len(reference):.2f} of {len(reference)} kept tokens are the reference's")
    assert policy != reference
    assert len(policy) == len(reference)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "key", "rise", "settings"),
    [("DPO", "rewards/margins", 1.0, {"max_steps": 16}), ("GRPO", "reward", 0.15, {"max_steps": 24, "beta": 0.01})],
)
def test_a_policy_ranked_by_its_reference_learns_and_keeps_the_references_tokens(
    tmp_path, kind, key, rise, settings, lora
):
    made = trainer(kind, tmp_path, "by_reference", lora=lora, **settings)
    made.train()
    values = [entry[key] for entry in made.state.log_history if key in entry]
    print(f"{kind} by_reference: {key} {np.mean(values[:FIRST]):.2f} -> {np.mean(values[-LAST:]):.2f}")
    assert np.mean(values[-LAST:]) > np.mean(values[:FIRST]) + rise
    policy = kept_by(made.model, range(8))
    with made.model.disable_adapter() if lora else nullcontext():
        assert policy == kept_by(made.model if lora else made.ref_model, range(8))


@pytest.mark.parametrize(
    "method",
    [
        "uniform",
        "random",
        "divprune",
        "prumerge",
        "visionzip",
        "vtc_cls",
        "fopru",
        "scope",
        "hiprune",
        "vispruner",
        "idpruner",
    ],
)
def test_methods_that_keep_the_references_tokens_while_only_the_decoder_is_trained(tmp_path, method):
    made = trainer("DPO", tmp_path, method, max_steps=4)
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    before = made.model.lm_head.weight.clone()
    made.train()
    assert not torch.equal(made.model.lm_head.weight, before)
    assert kept_by(made.model, range(8)) == kept_by(made.ref_model, range(8))
