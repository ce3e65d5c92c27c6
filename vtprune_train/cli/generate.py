"""``vtprune generate``: answer one prompt, with or without images and videos."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from vtprune_train.cli.options import add_method_options, add_model_option, add_sampling_options, load_model
from vtprune_train.evaluation.answering import answers, open_image, prompt_text
from vtprune_train.evaluation.timing import empty_cache, plans_run, visual_line
from vtprune_train.evaluation.videos import open_video

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_option(parser)
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="F", help="image files, in order")
    help_text = "video files or folders of frames, in order"
    parser.add_argument("--video", nargs="+", action="extend", default=[], metavar="F", help=help_text)
    add_sampling_options(parser)
    help_text = "the question; <image> and <video> mark the places of images and videos"
    parser.add_argument("--prompt", required=True, metavar="TEXT", help=help_text)
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, metavar="N", help="maximum tokens of the answer (default: 64)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="sample tokens instead of greedy decoding")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is generated")
    add_method_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer, and nothing else, on standard output."""
    settings = sampling(arguments)
    images = [open_image(Path(name)) for name in arguments.image]
    loaded = load_model(arguments)
    videos = [open_video(Path(name), loaded.processor) for name in arguments.video]
    written = prompt_text(loaded, len(images), arguments.prompt, len(videos))
    if not all(part.strip() in written for part in re.split("<image>|<video>", arguments.prompt)):
        log.warning("the chat template of this model leaves out the text of the prompt")
    if arguments.stream:
        settings["streamer"] = TextStreamer(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache = empty_cache(loaded.model)
    with plans_run(loaded.model) as plans:
        [answer] = answers(loaded, [([*images, *videos], arguments.prompt)], past_key_values=cache, **settings)
    if (images or videos) and plans:
        log.info("%s", visual_line(plans[0], cache))
    if not arguments.stream:
        print(answer)
    return 0


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``generate``; sets the seed."""
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={arguments.max_new_tokens} must be at least 1")
    if arguments.temperature is None:
        if arguments.seed is not None:
            raise ValueError(f"--seed={arguments.seed} has no effect without --temperature; leave it out or set both")
        return {"max_new_tokens": arguments.max_new_tokens}
    if not 0.01 <= arguments.temperature <= 100:
        raise ValueError(
            f"--temperature={arguments.temperature} is not between 0.01 and 100; leave it out for greedy decoding"
        )
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed={arguments.seed} is not between 0 and 2**63 - 1")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    return {"max_new_tokens": arguments.max_new_tokens, "do_sample": True, "temperature": arguments.temperature}
