"""Pruned models in lmms-eval (``lmms-eval eval --model vtprune --model_args pretrained=DIR``).

lmms-eval finds this module through the package's entry point ``lmms_eval.models``. Model arguments: ``pretrained`` (as
in ``vtprune generate --model``), ``method`` (``saved``, ``none`` or the name of a method) with the method's settings,
lists separated by slashes (``layers=8/16/24,keep=0.5/0.25/0.125``), ``family`` (``path/to/file.py:FAMILY``, for a model
of a family outside the package), ``device``, ``dtype``, ``batch_size``, ``fps`` or ``num_frames`` (sampled frames of a
video, instead of the checkpoint's setting), and ``trust_remote_code`` (run the code of a method that the checkpoint
names). With ``accelerate launch`` or ``torchrun``, each process answers its share of the documents on its own GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def manifest() -> Any:
    """The entry for lmms-eval's registry.

    It is defined before the imports: importing lmms-eval builds the registry, which imports this module again.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    here = __name__
    return ModelManifest(
        model_id="vtprune", simple_class_path=f"{here}.VTPruneSimple", chat_class_path=f"{here}.VTPruneChat"
    )


import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.protocol import ChatMessages  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from vtprune_train.cli.options import takes_list  # noqa: E402
from vtprune_train.core.stream import IMAGE, VIDEO  # noqa: E402
from vtprune_train.data.chat import Turn  # noqa: E402
from vtprune_train.data.videos import is_video_name  # noqa: E402
from vtprune_train.evaluation.answering import Loaded, Prompt, answers, load, open_image  # noqa: E402
from vtprune_train.evaluation.videos import open_video  # noqa: E402
from vtprune_train.models.families import register_family  # noqa: E402
from vtprune_train.models.io.video_processor import DecodedVideo  # noqa: E402
from vtprune_train.pruning import NONE, SAVED, method_class, method_from_settings, setting_types  # noqa: E402

log = logging.getLogger(__name__)

MARKS = {"image": IMAGE, "video": VIDEO}
MAX_NEW_TOKENS = 1024  # lmms-eval's default
AUTO_BATCH = 32  # initial size for --batch_size auto; halved when the GPU runs out of memory
LENGTH, STOPS = ("max_new_tokens", "max_gen_toks"), ("until", "stop_sequences")  # names of the same setting
# Settings of other models with the values that apply here anyway.
FIXED = {"image_aspect_ratio": "original", "skip_special_tokens": True, "visual_cot": False, "use_cache": True}
# Settings without an effect unless sampling; transformers warns of them.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Settings of transformers' generate that change the form of its result.
NOT_SUPPORTED = ("num_return_sequences", "return_dict_in_generate", "max_length", "min_length", "stop_strings")


class _VTPrune(lmms):
    """Common base of both kinds of models."""

    def __init__(
        self,
        pretrained: str,
        method: str = SAVED,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        trust_remote_code: bool | str = False,
        family: str | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if family is not None:
            register_family(family)
        pruning: Any = SAVED
        if method != SAVED:
            pruning = method_from_settings({"method": method, **_with_lists(method, settings)})
        elif settings:
            raise ValueError(
                f"model_args {next(iter(settings))}={next(iter(settings.values()))} has no effect with the saved "
                "method; name one, for example method=pyramiddrop"
            )
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size, self.is_auto = _batch_size(batch_size, max_batch_size)
        where = _device_of_rank(device, self.accelerator)
        trusted = str(trust_remote_code).lower() == "true"
        self.loaded: Loaded | None = load(
            str(pretrained),
            pruning,
            device=where,
            dtype=dtype,
            trust_remote_code=trusted,
            fps=None if fps is None else float(fps),
            num_frames=None if num_frames is None else int(num_frames),
        )
        self.device = self.loaded.model.device

    def clean(self) -> None:
        """Free the model's memory after all requests, to make room for a judge model."""
        self.loaded = None
        super().clean()

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        results: list[str] = []
        with tqdm(total=len(requests), desc="vtprune", disable=self.rank != 0) as bar:
            while len(results) < len(requests):
                batch = _next_batch(requests, len(results), self.batch_size)
                try:
                    results += self._answers(batch)
                except torch.OutOfMemoryError:
                    if not self.is_auto or len(batch) == 1:
                        raise
                    self.batch_size = len(batch) // 2
                    log.warning("rank %d: out of memory; the batch size is now %d", self.rank, self.batch_size)
                    continue
                bar.update(len(batch))
        return results

    def _answers(self, batch: Sequence[Instance]) -> list[str]:
        assert self.loaded is not None
        settings = _gen_kwargs(batch[0])
        generation, stops = _generation(settings)
        if settings.get("seed") is not None:
            torch.manual_seed(int(settings["seed"]))
        texts = answers(self.loaded, [self.prompt(request) for request in batch], **generation)
        return [_cut(text, stops) for text in texts]

    def prompt(self, request: Instance) -> Prompt:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._generate(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vtprune in lmms-eval supports generate_until tasks only, not likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vtprune in lmms-eval supports generate_until tasks only, not several rounds")


class VTPruneChat(_VTPrune):
    """For tasks with conversations."""

    is_simple = False

    def prompt(self, request: Instance) -> Prompt:
        _, to_messages, _, doc_id, task, split = request.args
        conversation = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = conversation.extract_media()
        if audios:
            raise ValueError(f"task {task}, document {doc_id}: vtprune supports images and videos, not audio")
        turns = []
        for message in conversation.to_hf_messages():
            parts = [
                f"{MARKS[part['type']]}\n" if part["type"] in MARKS else part["text"] for part in message["content"]
            ]
            turns.append(Turn(message["role"], "".join(parts)))
        assert self.loaded is not None
        return _open_visuals([*images, *videos], self.loaded.processor, task, doc_id), turns


class VTPruneSimple(_VTPrune):
    """For tasks with a question and its images or videos."""

    is_simple = True

    def prompt(self, request: Instance) -> Prompt:
        context, _, to_visual, doc_id, task, split = request.args
        assert self.loaded is not None
        visuals = to_visual(self.task_dict[task][split][doc_id]) or []
        return _open_visuals(visuals, self.loaded.processor, task, doc_id), context


def _open_visuals(visuals: Sequence[Any], processor: Any, task: str, document: Any) -> list[Image.Image | DecodedVideo]:
    """The images of a document in RGB, from images or file names, and its videos, from file names. Errors name the
    document."""
    opened: list[Image.Image | DecodedVideo] = []
    for visual in visuals:
        try:
            if isinstance(visual, str | Path):
                path = Path(visual)
                is_video = is_video_name(path.name) or path.is_dir()
                opened.append(open_video(path, processor) if is_video else open_image(path))
            elif isinstance(visual, Image.Image):
                opened.append(visual.convert("RGB"))
            else:
                raise ValueError(f"vtprune supports images and file names, not {type(visual).__name__}")
        except ValueError as error:
            raise ValueError(f"task {task}, document {document}: {error}") from error
    return opened


def _with_lists(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Parse settings from ``model_args``, where lists are separated by slashes because a comma ends a value."""
    types = {} if method == NONE else setting_types(method_class(method))
    return {key: str(value).split("/") if takes_list(types.get(key)) else value for key, value in settings.items()}


def _gen_kwargs(request: Instance) -> dict[str, Any]:
    """The generation settings of a request: its third argument in chat tasks, its second in simple ones."""
    return next(argument for argument in request.args[1:3] if isinstance(argument, dict))


def _batch_size(size: int | str, largest: int | None) -> tuple[int, bool]:
    """The initial batch size, and whether it may be halved."""
    if str(size).partition(":")[0] == "auto":
        return int(largest or AUTO_BATCH), True
    if not str(size).isdigit() or int(size) < 1:
        raise ValueError(f"--batch_size={size} is neither a number above 0 nor auto")
    return int(size), False


def _device_of_rank(device: str, accelerator: Any) -> str:
    """The device of this process. Raises if it does not match the device type that the processes communicate over."""
    if accelerator.num_processes == 1:
        return device
    if accelerator.device.type != "cuda":
        if device.startswith("cuda"):
            raise ValueError(
                f"device={device}: these {accelerator.num_processes} processes have no GPU; use device=cpu"
            )
        return "cpu"
    if device == "cpu":
        raise ValueError("device=cpu, but the processes were started for GPUs; start them with accelerate launch --cpu")
    local, gpus = accelerator.local_process_index, torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"process {local} of this machine has no GPU, there are {gpus}; start {gpus} processes")
    return f"cuda:{local}"


def _next_batch(requests: Sequence[Instance], start: int, size: int) -> Sequence[Instance]:
    """Up to ``size`` requests from ``start`` on that have the same generation settings."""
    end = start + 1
    while end < len(requests) and end - start < size and _gen_kwargs(requests[end]) == _gen_kwargs(requests[start]):
        end += 1
    return requests[start:end]


def _generation(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keywords of ``generate`` for the settings of a task, and the stop strings.

    The model samples if ``do_sample`` is true or, without that setting, if ``temperature`` is above 0; never at
    temperature 0.

    Raises:
        ValueError: a setting is unknown or not supported, or has two names with different values.
    """
    keywords = {key: value for key, value in settings.items() if value is not None}
    length = _one_value(keywords, LENGTH, MAX_NEW_TOKENS)
    stops = _one_value(keywords, STOPS, [])
    keywords.pop("seed", None)
    for key, value in list(keywords.items()):
        if key in FIXED:
            if keywords.pop(key) != FIXED[key]:
                raise ValueError(
                    f"generation_kwargs {key}={value!r}: vtprune supports only {FIXED[key]!r}; set "
                    f"--gen_kwargs {key}={FIXED[key]} to override the task"
                )
        elif key in NOT_SUPPORTED or key not in GenerationConfig().to_dict():
            raise ValueError(
                f"generation_kwargs {key}={value!r} is not supported by vtprune; it supports the settings of "
                f"transformers' generate with one answer per request, {', '.join((*LENGTH, *STOPS))} and seed"
            )
    temperature = keywords.get("temperature")
    keywords["do_sample"] = bool(keywords.get("do_sample", bool(temperature))) and temperature != 0
    if not keywords["do_sample"]:
        keywords = {key: value for key, value in keywords.items() if key not in SAMPLING}
    return {**keywords, "max_new_tokens": int(length)}, [stops] if isinstance(stops, str) else list(stops)


def _one_value(settings: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """Remove a setting that has several names from ``settings`` and return its value."""
    values = {name: settings.pop(name) for name in names if name in settings}
    first = next(iter(values.values()), default)
    if any(value != first for value in values.values()):
        raise ValueError(f"generation_kwargs {values} are names of the same setting with different values; keep one")
    return first


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
