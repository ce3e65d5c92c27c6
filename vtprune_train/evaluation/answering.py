"""Models that answer: a checkpoint with its processor and chat template; prompts to batches, batches to answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from vtprune_train.core.stream import IMAGE
from vtprune_train.data.chat import Template, Turn, get_template
from vtprune_train.data.images import UNREADABLE, image_size, load_image
from vtprune_train.data.jinja import written_by
from vtprune_train.data.records import NO_PROMPT
from vtprune_train.data.records import Prompt as AddedPrompt
from vtprune_train.data.templates import build_encoder, carry, stop_where_answers_end
from vtprune_train.models import HFModule
from vtprune_train.models.families import trained_family
from vtprune_train.models.io.build import first_line, load_any_config, open_whole, resolve_checkpoint
from vtprune_train.models.io.method_parameters import check_trained
from vtprune_train.models.io.peft import is_adapter, open_adapter
from vtprune_train.models.io.processors import open_processor
from vtprune_train.models.patch import prune, resolve_method
from vtprune_train.pruning import CONFIG_KEY, SAVED, saved_settings, trust_saved
from vtprune_train.pruning.base import PruningMethod

log = logging.getLogger(__name__)

Prompt = tuple[Sequence[Image.Image], str | Sequence[Turn]]
"""Pictures, and a question or the turns up to one; ``<image>`` marks their places, or they stand first."""

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with what turns conversations into its inputs.

    Args:
        model: pruned, unless it was asked for or saved without dropping.
        processor: its own, padding on the left.
        content: what the processor's chat template takes: ``text`` with image tokens in it, or ``parts``; ``None``
            where there is no template.
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
) -> Loaded:
    """A model of any supported family, ready to answer.

    Args:
        path: a run of this project, one of its checkpoints, a Hugging Face folder or a hub id.
        method: as for :func:`vtprune_train.prune`; where nothing was saved the model runs dense, and a warning says so.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run the code of a method outside of the package that the checkpoint names.

    Raises:
        ValueError: no readable model or processor there, no such device, or a method that does not fit or whose
            parameters are not in the checkpoint, or whose code nobody has named.
    """
    where = choose_device(device)
    folder = resolve_checkpoint(path)
    config = model_config(folder)
    if trust_remote_code:
        trust_saved(config)
    if method == SAVED:
        saved_settings(config)  # refuses a method whose code is not to be run, before anything large is read
    processor = load_processor(folder, config)
    model = load_weights(folder, dtype).to(where).eval()
    if method == SAVED and getattr(config, CONFIG_KEY, None) is None:
        log.warning("%s holds no pruning settings: it runs dense; name a method to drop visual tokens", path)
        method = None
    method = resolve_method(model, method)
    if method is not None:
        check_trained(model, method)
        prune(model, method)
    template = recorded_template(folder)
    if template is not None:
        stop_where_answers_end(model, processor.tokenizer, template)
    content = content_of(processor)
    if content is None:
        log.warning(
            "%s has no chat template: prompts are sent as they are written, without roles, which a model that was "
            "trained on conversations answers badly; save its chat_template.jinja beside the model", path
        )  # fmt: skip
    return Loaded(model, processor, content)


def choose_device(name: str) -> torch.device:
    """``auto`` resolved.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    has_cuda = torch.cuda.is_available()
    if name.startswith("cuda") and not has_cuda:
        raise ValueError(f"device={name}: PyTorch sees no CUDA device here; use cpu or auto")
    return torch.device(("cuda" if has_cuda else "cpu") if name == "auto" else name)


def model_config(folder: str) -> PreTrainedConfig:
    """``config.json`` of a model folder or hub id.

    Raises:
        ValueError: there is none.
    """
    if not Path(folder).exists() and (folder.startswith(("/", ".", "~")) or folder.count("/") > 1):
        raise ValueError(f"model {folder}: there is no such folder")
    return load_any_config(folder, f"model {folder}", offline=False)


def load_weights(folder: str, dtype: str) -> HFModule:
    """The model on the CPU, without changes; one trained by an adapter with its base, which is checked.

    Raises:
        ValueError: there are no weights, or they are of no vision-language model, or an adapter's base is gone.
    """
    if is_adapter(folder):
        return open_adapter(folder, dtype, merge=False)
    return open_whole(AutoModelForImageTextToText, folder, DTYPES[dtype], f"model {folder}")


def load_processor(folder: str, config: PreTrainedConfig) -> Any:
    """The processor saved with a model, padding on the left; a checkpoint of this project brings its chat template.

    Raises:
        ValueError: see :func:`vtprune_train.models.io.processors.open_processor`.
    """
    processor = open_processor(folder, config)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = recorded_template(folder)
    if template is not None:
        settings = _data_settings(folder)  # older checkpoints do not hold the chat template itself
        _, loop = trained_family(config.model_type, f"model {folder}")
        tokenization = settings.get("tokenization", "processor")
        carry(processor, written_by(build_encoder(template, tokenizer, loop, settings["image_position"], tokenization)))
    return processor


def _data_settings(folder: str) -> dict[str, Any]:
    """The ``data`` section that a checkpoint of this project was trained with; empty for other folders."""
    record = Path(folder).parent / "config.yaml"
    if Path(folder).name != "hf" or not record.is_file():
        return {}
    try:
        return yaml.safe_load(record.read_text())["data"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        said = f"{record} holds no settings of a run ({first_line(error)}); copy the checkpoint again"
        raise ValueError(said) from error


def recorded_template(folder: str) -> Template | None:
    """The template a checkpoint of this project was trained with; ``None`` for other folders."""
    settings = _data_settings(folder)
    if not settings:
        return None
    template = get_template(settings["template"])
    system = settings["system"]
    return template if system is None else replace(template, default_system=system)


def recorded_prompt(model: str, data: Path) -> AddedPrompt:
    """What the run that trained a model adds to the conversations of a data file (``prompt`` of an entry of
    ``data.eval`` or ``data.train``); nothing for a file that it does not name, with a warning where it adds something
    to others."""
    settings = _data_settings(resolve_checkpoint(model))
    added = []
    for which in ("eval", "train"):
        for number, entry in enumerate(settings.get(which, [])):
            key, prompt = f"data.{which}.{number}", AddedPrompt(**entry.get("prompt", {}))
            if Path(settings["root"], entry["path"]).resolve() == data.resolve():
                if prompt != NO_PROMPT:
                    log.info("questions are asked with the prompt of the run's %s: %s", key, prompt)
                return prompt
            added += [f"{key}: {prompt}"] if prompt != NO_PROMPT else []
    if added:
        log.warning(
            "%s was trained with prompts of its own (%s); %s is no file of that run, so they are left out",
            model, "; ".join(added), data,
        )  # fmt: skip
    return NO_PROMPT


def content_of(processor: Any) -> Literal["text", "parts"] | None:
    """What a processor's chat template takes.

    Templates of vision-language processors take parts; those of language models, which only know text, take a message
    with the image token in it; those of this project take both alike.
    """
    if processor.chat_template is None:
        return None
    token = _image_token(processor)
    as_text = _try_template(processor, f"{token}\na question")
    as_parts = _try_template(processor, [{"type": "image"}, {"type": "text", "text": "\na question"}])
    text_works = as_text is not None and as_text.count(token) == 1
    if as_parts is not None and as_parts.count(token) == 1 and not (text_works and as_text == as_parts):
        return "parts"
    if text_works:
        return "text"
    raise ValueError(f"the chat template of this {type(processor).__name__} writes no {token} for a picture")


def _try_template(processor: Any, content: Any) -> str | None:
    """The text of one user message; ``None`` if the template does not take this kind of content."""
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        log.debug("the chat template does not take %s: %s", type(content).__name__, error)
        return None


def _image_token(processor: Any) -> str:
    return getattr(processor, "image_token", IMAGE)


def open_image(path: Path | bytes) -> Image.Image:
    """An image, or its encoded bytes, in RGB, EXIF rotation applied.

    Raises:
        ValueError: it is missing or no image.
    """
    try:
        return load_image(path, image_size(path))
    except UNREADABLE as error:
        name = "of the record" if isinstance(path, bytes) else path
        raise ValueError(f"picture {name} cannot be read ({error.reason})") from error


def prompt_text(loaded: Loaded, images: int, question: str | Sequence[Turn]) -> str:
    """:func:`write_prompt` for a loaded model."""
    return write_prompt(loaded.processor, loaded.content, images, question)


def write_prompt(
    processor: Any, kind: Literal["text", "parts"] | None, images: int, question: str | Sequence[Turn]
) -> str:
    """The text of a prompt, up to where the answer begins.

    Args:
        processor: whose chat template writes it.
        kind: see :func:`content_of`.
        pictures: how many.
        question: see :data:`Prompt`.

    Raises:
        ValueError: it marks the places of another number of images, or holds the model's own token for one, or the
            template refuses the turns.
    """
    turns = [Turn("user", question)] if isinstance(question, str) else list(question)
    marked = sum(turn.text.count(IMAGE) for turn in turns)
    if not marked and images:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", IMAGE * images + "\n" + turns[first].text)
    elif marked != images:
        raise ValueError(f"{images} image(s) but {marked} {IMAGE} in the prompt; leave {IMAGE} out or give as many")
    token = _image_token(processor)
    if token != IMAGE and any(token in turn.text for turn in turns):
        raise ValueError(f"the prompt holds {token}, which stands for a picture in this model; write {IMAGE} for one")
    if kind is None:
        return "\n".join(turn.text for turn in turns).replace(IMAGE, token)
    messages = [{"role": turn.role, "content": _content(turn.text, kind, token)} for turn in turns]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error


def _content(text: str, kind: str, token: str) -> str | list[dict[str, str]]:
    if kind == "text":
        return text.replace(IMAGE, token)
    parts: list[dict[str, str]] = []
    texts = text.split(IMAGE)
    for index, part in enumerate(texts):  # the template sets line breaks around an image itself
        if index:
            parts.append({"type": "image"})
            part = re.sub(r"^\s*\n\s*", "", part)
        if index < len(texts) - 1:
            part = re.sub(r"\s*\n\s*$", "", part)
        parts += [{"type": "text", "text": part}] if part else []
    return parts


def batch(loaded: Loaded, prompts: Sequence[Prompt]) -> Any:
    """``generate``'s inputs for several prompts: ``input_ids`` [B, L] padded on the left, pixels of all images, on
    the model's device.

    Raises:
        ValueError: see :func:`prompt_text`.
    """
    texts = [prompt_text(loaded, len(images), question) for images, question in prompts]
    if not all(texts):
        raise ValueError("the prompt is empty and there is no picture; ask something")
    images = [image for own, _ in prompts for image in own]
    bos = loaded.processor.tokenizer.bos_token
    complete = bos is not None and texts[0].startswith(bos)
    inputs = loaded.processor(
        images=images or None, text=texts, padding=True, add_special_tokens=not complete, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    return inputs.to(loaded.model.device, loaded.model.dtype)


def decoded(loaded: Loaded, inputs: Any, sequences: torch.Tensor) -> list[str]:
    """The answers in ``generate``'s ``sequences`` [B, L + new]."""
    new = sequences[:, inputs["input_ids"].shape[1] :]
    texts = loaded.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answers(loaded: Loaded, prompts: Sequence[Prompt], **generation: Any) -> list[str]:
    """One batch of answers; greedy unless ``generation`` says otherwise.

    Args:
        loaded: see :func:`load`.
        prompts: images and questions.
        generation: passed to ``generate``, for example ``max_new_tokens``.

    Raises:
        ValueError: see :func:`prompt_text`.
    """
    inputs = batch(loaded, prompts)
    with torch.inference_mode():
        sequences = loaded.model.generate(**inputs, **{**GREEDY, **padding(loaded), **generation})
    return decoded(loaded, inputs, sequences)


def padding(loaded: Loaded) -> dict[str, Any]:
    """What rows that are done go on with."""
    return {"pad_token_id": loaded.processor.tokenizer.pad_token_id}
