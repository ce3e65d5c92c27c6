"""TRL's GRPOTrainer without padding, in a few lines: answers of the right length are rewarded.

python examples/trainer_trl_grpo.py
"""

from tiny import conversations, tiny_llava_next
from trl import GRPOConfig, GRPOTrainer

from vtprune_train import pack


def reward(completions, answer, **_):
    """The closer the length to that of the right answer, the more."""
    texts = [completion[0]["content"] for completion in completions]
    return [-abs(len(text) - len(right)) / 8 for text, right in zip(texts, answer, strict=True)]


model, processor = tiny_llava_next()  # your model and processor
pack(model)  # or prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))
arguments = GRPOConfig(
    "runs/grpo",
    per_device_train_batch_size=8,
    num_generations=4,
    max_steps=10,
    max_completion_length=8,
    learning_rate=1e-3,
    bf16=False,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
data = conversations(32, lambda answer: {"answer": answer})
trainer = GRPOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=processor)
trainer.train()
