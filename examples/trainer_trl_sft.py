"""TRL's SFTTrainer without padding, in a few lines.

python examples/trainer_trl_sft.py
"""

from tiny import conversations, said, tiny_llava_next
from trl import SFTConfig, SFTTrainer

from vtprune_train import batch_by_tokens, pack

model, processor = tiny_llava_next()  # your model and processor
pack(model)  # or prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))
arguments = SFTConfig(
    "runs/sft",
    per_device_train_batch_size=8,
    max_steps=20,
    max_length=None,
    learning_rate=1e-3,
    bf16=False,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
data = conversations(64, lambda answer: {"completion": said(answer)})
trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=processor)
batch_by_tokens(trainer, max_tokens=2048)
trainer.train()
