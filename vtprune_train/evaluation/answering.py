"""Loads a checkpoint with its processor and chat template, and answers prompts in batches."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.auto_template import AUTO, AutoTemplate, content_kind, message_of
from vtprune_train.data.chat import Template, Turn, get_template
from vtprune_train.data.images import UNREADABLE, image_size, load_image
from vtprune_train.data.jinja import written_by
from vtprune_train.data.records import NO_PROMPT
from vtprune_train.data.records import Prompt as AddedPrompt
from vtprune_train.data.template_fields import RENDER_ERRORS, Message, reasoning_name, written_messages
from vtprune_train.data.templates import build_encoder, carry, open_auto_template, stop_where_answers_end
from vtprune_train.data.turns import IMAGE_MARK, TOOLS, VISUAL, join_prefixes
from vtprune_train.data.videos import is_video_name
from vtprune_train.evaluation.videos import video_processor
from vtprune_train.models import HFModule
from vtprune_train.models.families import trained_family
from vtprune_train.models.io.build import first_line, load_any_config, open_whole, resolve_checkpoint
from vtprune_train.models.io.method_parameters import check_trained
from vtprune_train.models.io.peft import is_adapter, open_adapter
from vtprune_train.models.io.processors import open_processor
from vtprune_train.models.io.video_processor import DecodedVideo, video_keywords
from vtprune_train.models.patch import prune, resolve_method
from vtprune_train.pruning import CONFIG_KEY, SAVED, saved_settings, trust_saved
from vtprune_train.pruning.base import PruningMethod

log = logging.getLogger(__name__)

Prompt = tuple[Sequence[Image.Image | DecodedVideo], str | Sequence[Turn]]
"""Images and videos, and a question or the turns up to one. ``<image>`` and ``<video>`` mark their positions; without
markers, images come first, then videos."""

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its processor.

    Args:
        model: the model, pruned unless its method is ``none``.
        processor: the model's processor, which pads on the left.
        content: form of message content that the processor's chat template accepts: ``text`` with image tokens, or
            ``parts``; ``None`` without a template.
    """

    model: HFModule
    processor: Any
    content: Literal["text", "parts"] | None


def load(
    path: str,
    method: PruningMethod | str | Mapping[str, Any] | None = SAVED,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    fps: float | None = None,
    num_frames: int | None = None,
) -> Loaded:
    """Load a model of any supported family for inference.

    Args:
        path: a run of this project, one of its checkpoints, a Hugging Face folder or a hub id.
        method: see :func:`vtprune_train.prune`. By default the saved method; without one the model runs dense, with a
            warning.
        device: ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run the code of a method outside the package that the checkpoint names.
        fps, num_frames: sampled frames of a video, per second or in total; ``None`` for the checkpoint's setting.

    Raises:
        ValueError: the model or processor cannot be read, the device does not exist, or the method does not fit the
            model, has parameters that the checkpoint lacks, or is code outside the package that the user did not name.
    """
    where = choose_device(device)
    folder = resolve_checkpoint(path)
    config = model_config(folder)
    if trust_remote_code:
        trust_saved(config)
    if method == SAVED:
        saved_settings(config)  # refuses an untrusted method before any weights are read
    processor = load_processor(folder, config)
    if fps is not None or num_frames is not None:
        processor.video_processor = video_processor(processor, "fps, num_frames").changed(fps, num_frames)
    if not sys.stderr.isatty():
        disable_progress_bar()  # in a file it would be one long line
    model = load_weights(folder, dtype).to(where).eval()
    if method == SAVED and getattr(config, CONFIG_KEY, None) is None:
        log.warning("%s has no pruning settings and runs dense; name a method to drop visual tokens", path)
        method = None
    method = resolve_method(model, method)
    if method is not None:
        check_trained(model, method)
        prune(model, method)
    template = recorded_template(folder, processor.tokenizer)
    if template is not None:
        stop_where_answers_end(model, processor.tokenizer, template)
    content = content_of(processor)
    if content is None:
        log.warning(
            "%s has no chat template, so prompts have no roles, and a model that was trained on conversations answers "
            "them badly; save its chat_template.jinja in the model's folder", path
        )  # fmt: skip
    return Loaded(model, processor, content)


def choose_device(name: str) -> torch.device:
    """The device for ``name``; ``auto`` is CUDA if available.

    Raises:
        ValueError: CUDA is not available.
    """
    has_cuda = torch.cuda.is_available()
    if name.startswith("cuda") and not has_cuda:
        raise ValueError(f"device={name}: PyTorch finds no CUDA device; use cpu or auto")
    return torch.device(("cuda" if has_cuda else "cpu") if name == "auto" else name)


def model_config(folder: str) -> PreTrainedConfig:
    """``config.json`` of a model folder or hub id.

    Raises:
        ValueError: it does not exist.
    """
    return load_any_config(folder, f"model {folder}", offline=False)


def load_weights(folder: str, dtype: str) -> HFModule:
    """Load a model on the CPU, without pruning. For an adapter, load and verify its base too.

    Raises:
        ValueError: there are no weights, they are not of a vision-language model, or the base of an adapter is missing.
    """
    if is_adapter(folder):
        return open_adapter(folder, dtype, merge=False)
    return open_whole(AutoModelForImageTextToText, folder, DTYPES[dtype], f"model {folder}")


def load_processor(folder: str, config: PreTrainedConfig) -> Any:
    """The processor saved with a model, which pads on the left, with the chat template of this project's checkpoints.

    Raises:
        ValueError: see :func:`vtprune_train.models.io.processors.open_processor`.
    """
    processor = open_processor(folder, config)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = recorded_template(folder, tokenizer)
    if isinstance(template, Template):
        settings = _data_settings(folder)  # older checkpoints do not contain the chat template
        _, loop = trained_family(config.model_type, f"model {folder}")
        tokenization = settings.get("tokenization", "processor")
        encoder = build_encoder(template, tokenizer, loop, settings["image_position"], tokenization)
        carry(processor, written_by(encoder, loop))
    return processor


def _data_settings(folder: str) -> dict[str, Any]:
    """The ``data`` section of the settings of a checkpoint of this project; empty for other folders."""
    record = Path(folder).parent / "config.yaml"
    if Path(folder).name != "hf" or not record.is_file():
        return {}
    try:
        return yaml.safe_load(record.read_text())["data"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{record} holds no settings of a run ({first_line(error)}); copy the checkpoint again"
        raise ValueError(reason) from error


def recorded_template(folder: str, tokenizer: Any) -> Template | AutoTemplate | None:
    """The template of a checkpoint of this project; ``None`` for other folders."""
    settings = _data_settings(folder)
    if not settings:
        return None
    if settings["template"] == AUTO:
        _, loop = trained_family(model_config(folder).model_type, f"model {folder}")
        return open_auto_template(tokenizer, loop, folder)
    template = get_template(settings["template"])
    system = settings["system"]
    return template if system is None else replace(template, default_system=system)


def recorded_chat(model: str) -> bool:
    """Whether a run trained a model with ``data.template: auto``, so that its records may have tools and reasoning."""
    return _data_settings(resolve_checkpoint(model)).get("template") == AUTO


def recorded_prompt(model: str, data: Path) -> AddedPrompt:
    """The ``prompt`` of the entry for ``data`` in the settings of the run that trained a model. Empty if the run has no
    entry for that file, with a warning if its other entries have a prompt."""
    settings = _data_settings(resolve_checkpoint(model))
    added = []
    for which in ("eval", "train"):
        for number, entry in enumerate(settings.get(which, [])):
            key, prompt = f"data.{which}.{number}", AddedPrompt(**entry.get("prompt", {}))
            if Path(settings["root"], entry["path"]).resolve() == data.resolve():
                if prompt != NO_PROMPT:
                    log.info("using the prompt of the run's %s: %s", key, prompt)
                return prompt
            added += [f"{key}: {prompt}"] if prompt != NO_PROMPT else []
    if added:
        log.warning(
            "%s was trained with additional prompts (%s); %s is not a data file of that run, so they are not used",
            model, "; ".join(added), data,
        )  # fmt: skip
    return NO_PROMPT


def content_of(processor: Any) -> Literal["text", "parts"] | None:
    """The form of message content that a processor's chat template accepts, see
    :func:`~vtprune_train.data.auto_template.content_kind`; ``None`` without a template."""
    if processor.chat_template is None:
        return None
    token = _image_token(processor)
    kind = content_kind(lambda content: _try_template(processor, content), token)
    if kind is not None:
        return kind
    raise ValueError(f"the chat template of this {type(processor).__name__} outputs no {token} for an image")


def _try_template(processor: Any, content: Any) -> str | None:
    """The text of one user message; ``None`` if the template does not accept this form of content."""
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except RENDER_ERRORS as error:
        log.debug("the chat template does not accept %s: %s", type(content).__name__, error)
        return None


def _image_token(processor: Any) -> str:
    return getattr(processor, "image_token", IMAGE)


def open_image(path: Path | bytes) -> Image.Image:
    """Load an image from a file or from encoded bytes, in RGB with EXIF rotation applied.

    Raises:
        ValueError: the file is missing or is not an image.
    """
    try:
        return load_image(path, image_size(path))
    except UNREADABLE as error:
        name = "of the record" if isinstance(path, bytes) else path
        hint = "; pass a video as a video (--video)" if isinstance(path, Path) and is_video_name(path.name) else ""
        raise ValueError(f"image {name} cannot be read ({error.reason}){hint}") from error


def prompt_text(loaded: Loaded, images: int, question: str | Sequence[Turn], videos: int = 0) -> str:
    """:func:`write_prompt` for a loaded model."""
    return write_prompt(loaded.processor, loaded.content, images, question, videos)


def write_prompt(
    processor: Any, kind: Literal["text", "parts"] | None, images: int, question: str | Sequence[Turn], videos: int = 0
) -> str:
    """The text of a prompt, up to the beginning of the answer.

    Args:
        processor: its chat template formats the prompt.
        kind: see :func:`content_of`.
        images: number of images.
        question: see :data:`Prompt`.
        videos: number of videos; without any, ``<video>`` is text.

    Raises:
        ValueError: the number of ``<image>`` (or ``<video>``) in the question differs from the number of images (or
            videos), the question contains the model's token for them, the model does not take videos, or the template
            refuses the turns.
    """
    turns = [Turn("user", question)] if isinstance(question, str) else list(question)
    tokens = {IMAGE: _image_token(processor)}
    counts = {IMAGE: ("image", images), VIDEO: ("video", videos)}
    if videos:
        video_processor(processor)
        tokens[VIDEO] = processor.video_token
    elif getattr(processor, "video_token", None) is None:
        del counts[VIDEO]  # plain text for this model
    marked = {mark: sum(turn.text.count(mark) for turn in turns) for mark in counts}
    if not any(marked.values()) and images + videos:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", IMAGE * images + VIDEO * videos + "\n" + turns[first].text)
    else:
        for mark, (what, count) in counts.items():
            if marked[mark] != count:
                raise ValueError(
                    f"{count} {what}(s) but {marked[mark]} {mark} in the prompt; write {mark} once for each {what}, or "
                    "not at all"
                )
    for mark, what, one in ((IMAGE, "image", "an image"), (VIDEO, "video", "a video")):
        token = tokens.get(mark) or getattr(processor, "video_token", None)
        if token and (token != mark or mark not in tokens) and any(token in turn.text for turn in turns):
            raise ValueError(f"the prompt contains {token}, this model's {what} token; write {mark} for {one}")
    mark_of = VISUAL if videos else IMAGE_MARK
    if kind is None:
        return "\n".join(mark_of.sub(lambda match: tokens[match.group()], turn.text) for turn in turns)
    tools = next((json.loads(turn.text) for turn in turns if turn.role == TOOLS), None)
    messages = [message_of(turn, kind, mark_of, tokens) for turn in _continued(turns)]
    begun = turns[-1].is_prefix

    def render(messages: Sequence[Message], tools: list[Any] | None, **settings: bool) -> str:
        try:
            return str(processor.apply_chat_template(messages, tools=tools, **settings))
        except RENDER_ERRORS as error:
            raise ValueError(f"the model's chat template rejects this conversation: {error}") from error

    messages = written_messages(
        render, messages, tools, lambda: reasoning_name(render, kind), "the model's chat template"
    )
    text = render(messages, tools, add_generation_prompt=not begun, continue_final_message=begun)
    if videos and text.count(tokens[VIDEO]) != videos:
        raise ValueError(f"the model's chat template writes no {tokens[VIDEO]} for a video; export the run again")
    return text


def _continued(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without tools. Prefixes of answers are joined with the turns that continue them, or stay the last
    turn."""
    spoken = [turn for turn in turns if turn.role != TOOLS]
    last = [Turn("assistant", "")] if spoken[-1].is_prefix else []
    return join_prefixes([*spoken, *last])[0]


def by_kind(visuals: Sequence[Image.Image | DecodedVideo]) -> tuple[list[Image.Image], list[DecodedVideo]]:
    """The images and the videos among ``visuals``."""
    videos = [visual for visual in visuals if isinstance(visual, DecodedVideo)]
    return [visual for visual in visuals if not isinstance(visual, DecodedVideo)], videos


def in_order(visuals: Sequence[Image.Image | DecodedVideo], question: str) -> list[Image.Image | DecodedVideo]:
    """``visuals`` in the order of their placeholders in a question; without placeholders, images come first."""
    images, videos = by_kind(visuals)
    marks = [mark for mark in VISUAL.findall(question) if mark == IMAGE or videos]
    if not marks:
        return [*images, *videos]
    next_image, next_video = iter(images), iter(videos)
    return [next(next_image) if mark == IMAGE else next(next_video) for mark in marks]


def batchable(loaded: Loaded, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of the prompts of each batch: all of them, or, in families whose models take the frames of all videos as
    one tensor, one batch for each number of frames."""
    frames = [{len(video.frames) for video in by_kind(visuals)[1]} for visuals, _ in prompts]
    if not any(frames) or not video_processor(loaded.processor).layout.stacks_videos:
        return [list(range(len(prompts)))]
    groups: dict[int, list[int]] = {}
    for index, counts in enumerate(frames):
        groups.setdefault(max(counts, default=0), []).append(index)
    return list(groups.values())


def batch(loaded: Loaded, prompts: Sequence[Prompt]) -> Any:
    """Inputs of ``generate`` for several prompts, on the model's device: ``input_ids`` [B, L] padded on the left, and
    the pixels of all images.

    Raises:
        ValueError: see :func:`prompt_text`; or the prompts cannot be one batch, see :func:`batchable`.
    """
    media = [by_kind(visuals) for visuals, _ in prompts]
    texts = [
        prompt_text(loaded, len(images), question, len(videos))
        for (images, videos), (_, question) in zip(media, prompts, strict=True)
    ]
    if not all(texts):
        raise ValueError("the prompt is empty and has no image or video; write a question")
    images = [image for of_prompt, _ in media for image in of_prompt]
    videos = [video for _, of_prompt in media for video in of_prompt]
    bos = loaded.processor.tokenizer.bos_token
    complete = bos is not None and texts[0].startswith(bos)
    inputs = loaded.processor(
        images=images or None,
        text=texts,
        padding=True,
        add_special_tokens=not complete,
        return_tensors="pt",
        **video_keywords(videos),
    )
    inputs.pop("token_type_ids", None)
    seconds = inputs.get("second_per_grid_ts")
    inputs = inputs.to(loaded.model.device, loaded.model.dtype)
    if seconds is not None:  # times lose positions in half precision
        inputs["second_per_grid_ts"] = torch.as_tensor(seconds, dtype=torch.float32, device=loaded.model.device)
    return inputs


def decoded(loaded: Loaded, inputs: Any, sequences: torch.Tensor) -> list[str]:
    """The answers in ``generate``'s ``sequences`` [B, L + new]."""
    new = sequences[:, inputs["input_ids"].shape[1] :]
    texts = loaded.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answers(loaded: Loaded, prompts: Sequence[Prompt], **generation: Any) -> list[str]:
    """Generate answers, greedily by default, in one batch if the prompts can be one (see :func:`batchable`).

    Args:
        loaded: see :func:`load`.
        prompts: images, videos and questions.
        generation: keywords of ``generate``, for example ``max_new_tokens``.

    Raises:
        ValueError: see :func:`prompt_text`.
    """
    texts = [""] * len(prompts)
    for group in batchable(loaded, prompts):
        inputs = batch(loaded, [prompts[index] for index in group])
        with torch.inference_mode():
            sequences = loaded.model.generate(**inputs, **{**GREEDY, **padding(loaded), **generation})
        for index, answer in zip(group, decoded(loaded, inputs, sequences), strict=True):
            texts[index] = answer
    return texts


def padding(loaded: Loaded) -> dict[str, Any]:
    """The keyword of ``generate`` for padding finished rows."""
    return {"pad_token_id": loaded.processor.tokenizer.pad_token_id}
