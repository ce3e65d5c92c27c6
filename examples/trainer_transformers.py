"""transformers' Trainer without padding, in a few lines. For dropping, replace ``pack`` by ``prune``.

python examples/trainer_transformers.py
"""

from finetune_with_trainer import Collator
from tiny import draw_samples, tiny_llava_next
from transformers import Trainer, TrainingArguments

from vtprune_train import batch_by_tokens, pack

model, processor = tiny_llava_next()  # your model and processor
pack(model)  # or prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))
arguments = TrainingArguments(
    "runs/trainer",
    per_device_train_batch_size=8,
    max_steps=20,
    learning_rate=1e-3,
    remove_unused_columns=False,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(model, arguments, Collator(processor), train_dataset=draw_samples(64))
batch_by_tokens(trainer, max_tokens=2048)
trainer.train()
