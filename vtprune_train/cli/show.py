"""``vtprune show``: draw which visual tokens of images and videos are kept in each stage, for a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from vtprune_train.cli.options import (
    METHOD_HELP,
    add_sampling_options,
    add_set_option,
    add_trust_option,
    changed,
    named_method,
    numbers,
    set_values,
)
from vtprune_train.evaluation.answering import load, model_config, open_image
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.families import supported_family
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.patch import is_pruned, prune
from vtprune_train.pruning import CONFIG_KEY, PruningMethod, method_class, method_from_settings, saved_settings
from vtprune_train.viz.draw_video import draw_all
from vtprune_train.viz.page import page
from vtprune_train.viz.show import encode, look_at, stage_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", required=True, help="a run, one of its checkpoints, a Hugging Face model folder, or a Hub id"
    )
    add_trust_option(parser)
    help_text = "one or more image files"
    parser.add_argument("--image", nargs="+", action="extend", default=[], type=Path, help=help_text)
    help_text = "one or more video files or folders of frames"
    parser.add_argument("--video", nargs="+", action="extend", default=[], type=Path, help=help_text)
    add_sampling_options(parser)
    help_text = "the question; <image> and <video> mark the places of images and videos"
    parser.add_argument("--prompt", required=True, help=help_text)
    parser.add_argument("--out", required=True, type=Path, help="image file to write (.png, .jpg, ...)")
    parser.add_argument("--html", type=Path, help="also write an HTML page with sliders over stages and time")
    parser.add_argument("--method", help=f"{METHOD_HELP} (default: the saved settings)")
    add_set_option(parser)
    parser.add_argument("--layers", type=numbers(int, "8,16,24"), help="drop before these layers, for example 8,16,24")
    parser.add_argument("--keep", type=numbers(float, "0.5,0.25"), help="keep ratios, for example 0.5,0.25")


def run(arguments: argparse.Namespace) -> int:
    """Check the options, load the model, write the files."""
    disable_progress_bar()
    for path in (arguments.out, arguments.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    if Image.registered_extensions().get(arguments.out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {arguments.out}: unknown image format {arguments.out.suffix!r}; use .png")
    if not arguments.image and not arguments.video:
        raise ValueError("there is nothing to show; pass --image or --video")
    files: list[Any] = [open_image(path) for path in arguments.image]
    config = model_config(resolve_checkpoint(arguments.model))
    supported_family(config.model_type, f"--model {arguments.model}: it")
    loaded = load(arguments.model, _method(config, arguments), fps=arguments.fps, num_frames=arguments.num_frames)
    model, processor = loaded.model if is_pruned(loaded.model) else prune(loaded.model, None), loaded.processor
    files += [open_video(path, processor) for path in arguments.video]
    inputs = encode(processor, files, arguments.prompt, model.device)
    images, stages = look_at(model, processor, inputs, files, arguments.prompt), stage_names(model)
    draw_all(images, stages, arguments.prompt).save(arguments.out)
    counts = [sum(image.counts[stage] for image in images) for stage in range(len(stages))]
    print(f"wrote {arguments.out}: {counts[0]} visual tokens, kept by stage: {', '.join(map(str, counts[1:]))}")
    if arguments.html is not None:
        arguments.html.write_text(page(images, stages, arguments.prompt), encoding="utf-8")
    return 0


def _method(config: PreTrainedConfig, arguments: argparse.Namespace) -> PruningMethod | None:
    """The settings of the checkpoint, changed by the options."""
    options = {key: value for key in ("layers", "keep") if (value := getattr(arguments, key)) is not None}
    options.update(set_values(arguments.set))
    recorded = (getattr(config, CONFIG_KEY, None) or {}).get("method")
    if arguments.method is not None and arguments.method == recorded:
        method_class(recorded)  # named by the user, so its code may run
    named = arguments.method not in (None, recorded)
    settings: dict[str, Any] = named_method(arguments.method) if named else saved_settings(config) or {}
    if "method" not in settings:
        raise ValueError(
            f"--model {arguments.model}: it has no saved pruning settings; set a method, for example "
            "--method pyramiddrop --layers 8,16,24 --keep 0.5,0.25,0.125"
        )
    return method_from_settings(changed(settings, options))
