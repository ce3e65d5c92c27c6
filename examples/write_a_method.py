"""Write a pruning method, use it, save the model with it and load it again.

python examples/write_a_method.py

The class below is all there is to a method. In YAML and on the command line it is named by its path:
``pruning.method=examples/write_a_method.py:Outliers``.
"""

from __future__ import annotations

import tempfile

import torch
from tiny import QUESTION, draw_samples, tiny_llava_next
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from vtprune_train import Candidates, Drop, PruningMethod, Share, kept_tokens, prune


class Outliers(PruningMethod):
    """Before decoder layer ``layer``, keep the share ``keep`` of each image: the tokens farthest from their mean."""

    layer: int = 2
    keep: Share = 0.25

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Drop(min(self.layer, num_layers - 1), self.keep),)

    def score(self, candidates: Candidates) -> Tensor:
        hidden = candidates.hidden.float()  # [V, C], image after image
        image = candidates.boundary.span_of_visual  # [V], the image that each token belongs to
        num_images = len(candidates.boundary.spans)
        sums = hidden.new_zeros(num_images, hidden.shape[1]).index_add_(0, image, hidden)
        counts = torch.bincount(image, minlength=num_images).clamp(min=1)
        return (hidden - (sums / counts[:, None])[image]).norm(dim=1)


def main() -> None:
    model, processor = tiny_llava_next()
    model.eval()
    prune(model, Outliers(keep=0.5))

    images = [image for image, _ in draw_samples(2)]
    text = f"USER: <image>\n<image>\n{QUESTION} ASSISTANT:"
    inputs = processor(images=images, text=text, return_tensors="pt")
    [images_of_row] = kept_tokens(model, inputs)
    for number, [kept] in enumerate(images_of_row, start=1):
        print(f"image {number}: keeps tokens {kept.tolist()}")

    # It trains: gradients flow through the kept tokens. Only the answer is supervised.
    batch = processor(images=images, text=f"{text} red", return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    loss = model(**batch, labels=labels).loss
    loss.backward()
    print(f"loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # config.json names the method and its settings, not its code
        loaded = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    prune(loaded)  # uses the saved settings; the class is known because this script defines it
    with torch.no_grad():
        same = torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    print("the loaded model gives the same logits:", same)


if __name__ == "__main__":
    main()
