"""The packages that people already use, on a pruned model: transformers' Trainer, TRL, PEFT, accelerate, torch.compile.

They run where the packages of requirements-ecosystem.txt are installed (``make ecosystem``).
"""

import copy

import numpy as np
import pytest
import torch
from transformers import LlavaNextForConditionalGeneration, Trainer, TrainingArguments, set_seed

from tests.support.helpers import tiny_model
from tests.support.trl_data import ANSWERS, chat_processor, collate, dataset_of, draw_image, rows
from vtprune_train import PyramidDrop, batch_by_tokens, dense, is_pruned, pack, prune, unprune
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.models.patch import method_of

pytestmark = pytest.mark.slow

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
KEEP_ALL = PyramidDrop(layers=(2, 4), keep=(1.0, 1.0))
LORA_TARGETS = r".*language_model.*(q_proj|v_proj)"


class Losses(Trainer):
    """transformers' Trainer, unchanged but for keeping what it logs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def log(self, logs, *args, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []
        super().log(logs, *args, **kwargs)


def trainer(model, folder, **settings):
    settings = {"max_steps": 6, **settings}
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        gradient_checkpointing=True, save_steps=4, logging_steps=1, report_to=[], use_cpu=True, seed=0,
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    return Losses(model=model, args=arguments, train_dataset=rows(), data_collator=collate)


def fresh(method=HALF):
    set_seed(0)
    model = tiny_model()
    return model if method == "plain" else prune(model, method)


def test_transformers_trainer_with_nothing_dropped_is_the_plain_one(tmp_path):
    losses = []
    for name, method in (("plain", "plain"), ("packed", KEEP_ALL), ("dropped", HALF)):
        made = trainer(fresh(method), tmp_path / name, max_steps=4)
        made.train()
        losses.append(made.losses)
    assert np.allclose(losses[0], losses[1], atol=1e-3)  # AdamW divides by tiny gradients
    assert not np.allclose(losses[0], losses[2], atol=1e-2)


def test_transformers_trainer_with_torch_compile(tmp_path):
    eager, compiled = trainer(fresh(), tmp_path / "eager", max_steps=3), fresh()
    eager.train()
    made = trainer(compiled, tmp_path / "compiled", max_steps=3, torch_compile=True, torch_compile_backend="eager")
    made.train()
    assert np.allclose(made.losses, eager.losses, rtol=1e-4)


def test_transformers_trainer_resumes_exactly(tmp_path):
    """6 steps in one go, and 4 + 2 by a new process's model: same losses, same weights."""
    whole = trainer(fresh(), tmp_path / "whole")
    whole.train()
    set_seed(1)
    other = prune(tiny_model(seed=1), HALF)
    resumed = trainer(other, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.losses[-2:] == whole.losses[-2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    opened = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert not is_pruned(opened)
    assert method_of(prune(opened)) == HALF


def test_evaluation_by_the_trainer(tmp_path):
    made = trainer(fresh(), tmp_path, max_steps=1)
    made.eval_dataset = rows(6)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < before


def sft(model, folder, columns="prompt", peft_config=None, max_tokens=None, **settings):
    trl = pytest.importorskip("trl", reason="TRL is not installed (make ecosystem)")
    examples = []
    for seed in range(8):
        question, answer = "what is shown ?", ANSWERS[seed % 4]
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        if columns == "prompt":
            examples.append({"images": [draw_image(seed)], "prompt": [user], "completion": [said]})
        else:
            examples.append({"images": [draw_image(seed)], "messages": [user, said]})
    arguments = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, max_length=None, seed=0,
        **{"max_steps": 3, "learning_rate": 1e-3, **settings},
    )  # fmt: skip
    made = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset_of(examples),
        processing_class=chat_processor(),
        peft_config=peft_config,
    )
    if max_tokens is not None:
        batch_by_tokens(made, max_tokens)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def lora():
    peft = pytest.importorskip("peft", reason="PEFT is not installed (make ecosystem)")
    return peft.LoraConfig(r=4, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


def tuned(kind, folder, model, **settings):
    """What a trainer of TRL that needs a reference logs in two steps; the reference is left to it."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (make ecosystem)")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]}

    def said(number):
        return [{"role": "assistant", "content": [{"type": "text", "text": ANSWERS[number % 4]}]}]

    columns = {
        "DPO": lambda n: {"chosen": said(n), "rejected": said(n + 1)},
        "KTO": lambda n: {"completion": said(n), "label": bool(n % 2)},
    }.get(kind, lambda n: {})
    rows = [{"images": [draw_image(n)], "prompt": [user], **columns(n)} for n in range(8)]
    own = {"max_length": None, "per_device_train_batch_size": 2}
    given = {}
    if kind in ("GRPO", "RLOO"):
        own = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        given = {"reward_funcs": lambda completions, **_: [float(len(str(said)) % 3) for said in completions]}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=2, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, seed=0, **{**own, **settings},
    )  # fmt: skip
    made = getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=dataset_of(rows), processing_class=chat_processor(), **given
    )
    made.train()
    assert made.ref_model is None or is_pruned(made.accelerator.unwrap_model(made.ref_model)) == is_pruned(model)
    return made.state.log_history


def saved_model(folder):
    set_seed(0)
    tiny_model().save_pretrained(folder)
    chat_processor().save_pretrained(folder)
    return LlavaNextForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("method", ["plain", HALF], ids=["plain", "dropped"])
@pytest.mark.parametrize(
    ("kind", "expected", "settings"),
    [
        ("DPO", {"loss": np.log(2), "rewards/margins": 0.0}, {}),
        ("DPO", {"loss": np.log(2), "rewards/margins": 0.0}, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ("KTO", {"loss": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0}, {}),
        ("GRPO", {"kl": 0.0}, {}),
        ("RLOO", {"kl": 0.0}, {}),
    ],
    ids=["dpo", "dpo_sync", "kto", "grpo", "rloo"],
)
def test_the_reference_that_trl_makes_starts_equal_to_the_policy(tmp_path, kind, expected, settings, method):
    """And is another model from the second step on."""
    model = saved_model(tmp_path / "model")
    first, second, *_ = tuned(kind, tmp_path / "run", model if method == "plain" else prune(model, method), **settings)
    for key, value in expected.items():
        assert first[key] == pytest.approx(value, abs=1e-5), key
    assert any(abs(second[key] - value) > 1e-3 for key, value in expected.items())


def test_a_reference_by_deepcopy_is_pruned(tmp_path):
    """As TRL's online DPO and Nash-MD make theirs."""
    utils = pytest.importorskip("trl.experimental.utils", reason="TRL is not installed (make ecosystem)")
    policy = prune(saved_model(tmp_path).eval(), HALF)
    reference = utils.create_reference_model(policy)
    inputs = batch()
    assert is_pruned(reference) and torch.equal(reference(**inputs).logits, policy(**inputs).logits)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("settings", [{}, {"columns": "messages", "assistant_only_loss": True}], ids=["prompt", "chat"])
def test_trl_sft_trainer(tmp_path, settings, with_lora, monkeypatch):
    """TRL computes its own loss from the base model's output; with nothing dropped it is the plain model's."""
    config = {"peft_config": lora()} if with_lora else {}
    plain = sft(fresh("plain"), tmp_path / "plain", **settings, **config)
    packed = sft(fresh(KEEP_ALL), tmp_path / "packed", **settings, **config)
    assert np.allclose(plain, packed, atol=1e-3)
    queries = spy_on_queries(monkeypatch)
    dropped = sft(fresh(HALF), tmp_path / "dropped", **settings, **config)
    assert not np.allclose(plain, dropped, atol=1e-2)
    # The row before the answer's first token ranks, not the end of the row, which holds the answer.
    assert queries
    assert all(offset < length - 1 for offset, length in queries)


def spy_on_queries(monkeypatch):
    seen = []
    original = PyramidDrop.plan

    def plan(self, segments, num_layers):
        seen.extend((segment.query_offsets[0], segment.length) for segment in segments)
        return original(self, segments, num_layers)

    monkeypatch.setattr(PyramidDrop, "plan", plan)
    return seen


@pytest.mark.parametrize("columns", ["prompt", "messages"])
def test_trl_with_batches_by_tokens(tmp_path, columns):
    """Over 20 steps: packed as padded, whatever shares a micro-batch."""
    settings = {
        "columns": columns,
        "assistant_only_loss": columns == "messages",
        "learning_rate": 1e-5,
        "max_steps": 20,
    }
    padded = sft(fresh("plain"), tmp_path / "padded", **settings)
    packed = sft(pack(fresh("plain")), tmp_path / "packed", **settings)
    by_tokens = sft(pack(fresh("plain")), tmp_path / "tokens", max_tokens=220, **settings)
    assert len(padded) == 20
    assert np.allclose(packed, padded, rtol=1e-4)
    assert np.allclose(by_tokens, padded, rtol=1e-4)


def test_trl_with_peft_wrapped_before(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (make ecosystem)")
    set_seed(0)
    model = prune(peft.get_peft_model(tiny_model(), lora()), HALF)
    queries = spy_on_queries(monkeypatch)
    losses = sft(model, tmp_path)
    assert losses[-1] < losses[0]
    assert all(offset < length - 1 for offset, length in queries)


def test_labels_at_image_tokens_are_left_out_and_said(tmp_path, caplog):
    losses = sft(fresh(), tmp_path, columns="messages")
    assert "labels supervise image tokens" in caplog.text
    assert np.isfinite(losses).all()


def batch():
    return collate(rows(3))


def randomized(model):
    """LoRA starts at zero; make the adapters do something."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def test_peft_before_or_after_prune():
    peft = pytest.importorskip("peft", reason="PEFT is not installed (make ecosystem)")
    inputs = batch()
    base = fresh().eval()(**inputs).logits
    after = randomized(peft.get_peft_model(fresh(), lora())).eval()
    before = randomized(prune(peft.get_peft_model(fresh("plain"), lora()), HALF)).eval()
    adapted = after(**inputs)
    assert torch.equal(adapted.logits, before(**inputs).logits)
    assert not torch.allclose(adapted.logits, base, atol=1e-2)
    adapted.loss.backward()
    assert all(p.grad is not None for name, p in after.named_parameters() if "lora_" in name)
    with after.disable_adapter():
        assert torch.equal(after(**inputs).logits, base)
    prompt = {key: value for key, value in inputs.items() if key != "labels"}
    generated = after.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(before.generate(**prompt, max_new_tokens=4, do_sample=False), generated)
    with dense(before):
        packed_off = before(**inputs).logits
    assert not torch.allclose(packed_off, adapted.logits, atol=1e-3)
    merged = after.merge_and_unload()
    assert is_pruned(merged)
    assert torch.allclose(merged(**inputs).logits, adapted.logits, atol=1e-3)
    assert torch.equal(merged.generate(**prompt, max_new_tokens=4, do_sample=False), generated)
    unprune(before)
    assert not is_pruned(before)
    assert torch.equal(before(**inputs).logits, packed_off)


def test_peft_around_the_head_is_undone_by_unprune():
    peft = pytest.importorskip("peft", reason="PEFT is not installed (make ecosystem)")
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    plain = fresh("plain").eval()(**inputs).logits
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    adapted = peft.get_peft_model(fresh(), config).eval()
    with dense(adapted):
        assert torch.allclose(adapted(**inputs).logits, plain, atol=1e-4)
    unprune(adapted)
    assert torch.allclose(adapted(**inputs).logits, plain, atol=1e-4)


def test_a_reference_model_that_is_never_trained_ranks_by_the_prompt(monkeypatch):
    """TRL's DPO puts a forward of its own on policy and reference, which keeps the labels from the model."""
    trl_utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed (make ecosystem)")
    model = fresh().eval()
    trl_utils.add_fused_lm_head(model)
    queries = spy_on_queries(monkeypatch)
    model(**batch(), fused_lm_head=True)
    assert queries
    assert all(offset < length - 1 for offset, length in queries)


def test_label_smoothing_is_warned_of(caplog):
    model = fresh()
    model(**{key: value for key, value in batch().items() if key != "labels"})
    assert "forward in training mode without labels" in caplog.text


def test_peft_adapters_are_saved_and_opened(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (make ecosystem)")
    inputs = batch()
    model = randomized(peft.get_peft_model(fresh(), lora())).eval()
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert torch.equal(opened(**inputs).logits, model(**inputs).logits)


def test_accelerate_and_a_plain_loop():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (make ecosystem)")
    losses = []
    for accelerated in (False, True):
        model = fresh()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if accelerated:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
        own = []
        for _ in range(3):
            loss = model(**batch()).loss
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_accelerates_bf16_wrapper_around_a_pruned_model():
    """accelerate wraps the instance's forward; unprune leaves that in place and the dense model behind it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (make ecosystem)")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = fresh().eval()
    inputs = batch()
    with dense(model):
        expected = model(**inputs).logits
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model).eval()
    assert prepared(**inputs).loss.isfinite()
    unprune(model)
    assert (prepared(**inputs).logits.float() - expected).abs().mean() < 0.1
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_deep_copy_is_its_own_model():
    model = fresh().eval()
    twin = copy.deepcopy(model)
    inputs = batch()
    before = model(**inputs).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**inputs).logits, before)
    assert kept_tokens(twin, {key: value for key, value in inputs.items() if key != "labels"})
    unprune(twin)
    assert is_pruned(model) and not is_pruned(twin)


@pytest.mark.parametrize("method", [KEEP_ALL, HALF], ids=["keep_all", "half"])
def test_torch_compile_of_the_decoder_layers(method):
    """Layers are compiled around the attention call, whose lengths change with every batch; training and decoding."""
    model = fresh(method)
    inputs = batch()
    prompt = {key: value for key, value in inputs.items() if key != "labels"}
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tokens = model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
    model.train().zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.model.language_model.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    compiled = model(**inputs).loss
    compiled.backward()
    assert torch.allclose(compiled, loss, atol=1e-5)
    for name, expected in gradients.items():
        got = model.get_parameter(name).grad
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max().clamp(min=1))), name
    assert torch.equal(model.eval().generate(**prompt, max_new_tokens=4, do_sample=False), tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch._dynamo.reset()
