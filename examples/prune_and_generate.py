"""Prune a model and generate: answers and visual tokens, dense and pruned.

python examples/prune_and_generate.py                                    # a tiny model with random weights
python examples/prune_and_generate.py --model llava-hf/llava-v1.6-vicuna-7b-hf --image cat.jpg --prompt "What is it?"
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from tiny import QUESTION, draw_samples, tiny_llava_next
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtprune_train import PyramidDrop, kept_tokens, prune, unprune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder or Hub id; default: a tiny model with random weights")
    parser.add_argument("--image", help="default: a synthetic image")
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    arguments = parser.parse_args()

    if arguments.model is None:
        model, processor = tiny_llava_next()
        prompt = f"USER: <image>\n{arguments.prompt} ASSISTANT:"
    else:
        model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained(arguments.model)
        content = [{"type": "image"}, {"type": "text", "text": arguments.prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = draw_samples(1)[0][0] if arguments.image is None else Image.open(arguments.image).convert("RGB")
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    model.eval()

    def answer() -> str:
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("dense: ", answer())
    prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))  # layers default to quarters of the depth
    print("pruned:", answer())
    [[stages]] = kept_tokens(model, inputs)  # of the batch's only row, its only image
    total = int((inputs["input_ids"] == model.config.image_token_id).sum())
    print("visual tokens by stage:", [total, *map(len, stages)])
    unprune(model)


if __name__ == "__main__":
    main()
