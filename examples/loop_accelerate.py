"""A loop with accelerate on a packed model. Start it on several GPUs with ``accelerate launch``.

python examples/loop_accelerate.py
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from finetune_with_trainer import Collator
from tiny import draw_samples, tiny_llava_next
from torch.optim import AdamW

from vtprune_train import pack
from vtprune_train.data.trainer_batches import StepLoader

# LLaVA does not use the last layers of its vision tower.
accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
model, processor = tiny_llava_next()  # your model and processor
loader = StepLoader(pack(model), draw_samples(64), Collator(processor), batch_size=16, max_tokens=2048)
model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-3))
for epoch in range(3):
    loader.set_epoch(epoch)
    for step in loader:
        batches, total = step["micro_batches"], torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches, start=1):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            is_last = number == len(batches)
            with nullcontext() if is_last else accelerator.no_sync(model):  # reduce gradients once in a step
                loss = model(**batch, num_items_in_batch=step["num_items_in_batch"]).loss
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: last loss {accelerator.reduce(total).item():.3f}")
