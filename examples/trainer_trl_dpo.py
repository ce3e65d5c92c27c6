"""TRL's DPOTrainer without padding, in a few lines.

python examples/trainer_trl_dpo.py
"""

from tiny import conversations, said, saved_llava_next
from trl import DPOConfig, DPOTrainer

from vtprune_train import pack

model, processor = saved_llava_next("runs/tiny")  # your model, loaded from a folder or the Hub, and processor
pack(model)  # or prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))
arguments = DPOConfig(
    "runs/dpo",
    per_device_train_batch_size=4,
    max_steps=10,
    max_length=None,
    learning_rate=1e-3,
    bf16=False,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
data = conversations(32, lambda answer: {"chosen": said(answer), "rejected": said("none")})
trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=processor)
trainer.train()
