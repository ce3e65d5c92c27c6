"""TRL's KTOTrainer without padding, in a few lines.

python examples/trainer_trl_kto.py
"""

from tiny import conversations, said, saved_llava_next
from trl import KTOConfig, KTOTrainer

from vtprune_train import pack

model, processor = saved_llava_next("runs/tiny")  # your model, loaded from a folder or the Hub, and processor
pack(model)  # or prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))
arguments = KTOConfig(
    "runs/kto",
    per_device_train_batch_size=4,
    max_steps=10,
    max_length=None,
    learning_rate=1e-3,
    bf16=False,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
data = conversations(32, lambda answer: {"completion": said(answer), "label": answer != "red"})
trainer = KTOTrainer(model, args=arguments, train_dataset=data, processing_class=processor)
trainer.train()
