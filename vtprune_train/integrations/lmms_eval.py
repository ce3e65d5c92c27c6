"""A pruned model under lmms-eval (``lmms-eval eval --model vtprune --model_args pretrained=DIR``).

lmms-eval finds it through the entry point ``lmms_eval.models`` of this package; nothing is to be copied. Model
arguments: ``pretrained`` (whatever ``vtprune generate --model`` takes), ``method`` (``saved``, ``none`` or a method's
name) with that method's settings, lists written with slashes (``layers=8/16/24,keep=0.5/0.25/0.125``), ``device``,
``dtype``, ``batch_size``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from vtprune_train.data.chat import Turn
from vtprune_train.inference.chatting import Prompt, answers, load
from vtprune_train.inference.options import takes_list
from vtprune_train.pruning import NONE, SAVED, method_class, method_from_settings, setting_types
from vtprune_train.stream import IMAGE

# What a task may ask of generate, and what its names mean there.
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class _VTPrune(lmms):
    """What both kinds of requests share."""

    def __init__(
        self,
        pretrained: str,
        method: str = SAVED,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        chosen: Any = SAVED
        if method != SAVED:
            chosen = method_from_settings({"method": method, **_with_lists(method, settings)})
        elif settings:
            raise ValueError(
                f"model_args {next(iter(settings))}={next(iter(settings.values()))} has no effect with the saved "
                "method; name one, for example method=pyramiddrop"
            )
        self.loaded = load(str(pretrained), chosen, device=device, dtype=dtype)
        self.batch_size = int(batch_size)

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        results: list[str] = []
        bar = tqdm(total=len(requests), desc="vtprune", disable=self.rank != 0)
        for batch in _batches(requests, self.batch_size):
            generation, stops = _generation(_gen_kwargs(batch[0]))
            texts = answers(self.loaded, [self.prompt(request) for request in batch], **generation)
            results += [_cut(text, stops) for text in texts]
            bar.update(len(batch))
        bar.close()
        return results

    def prompt(self, request: Instance) -> Prompt:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._generate(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vtprune under lmms-eval answers generate_until tasks; likelihoods are not offered")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vtprune under lmms-eval answers generate_until tasks; rounds are not offered")


class VTPruneChat(_VTPrune):
    """For tasks that give whole conversations."""

    is_simple = False

    def prompt(self, request: Instance) -> Prompt:
        _, to_messages, _, doc_id, task, split = request.args
        conversation = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        pictures, videos, audios = conversation.extract_media()
        if videos or audios:
            raise ValueError(f"task {task}, document {doc_id}: vtprune takes pictures, not videos or sounds")
        turns = []
        for message in conversation.to_hf_messages():
            parts = [IMAGE + "\n" if part["type"] == "image" else part["text"] for part in message["content"]]
            turns.append(Turn(message["role"], "".join(parts)))
        return [picture.convert("RGB") for picture in pictures], turns


class VTPruneSimple(_VTPrune):
    """For tasks that give a question and its pictures."""

    is_simple = True

    def prompt(self, request: Instance) -> Prompt:
        context, _, to_visual, doc_id, task, split = request.args
        pictures = to_visual(self.task_dict[task][split][doc_id]) or []
        return [picture.convert("RGB") for picture in pictures], context


def manifest() -> Any:
    """What the entry point gives to lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest  # the registry imports this module while it is built

    here = __name__
    return ModelManifest(
        model_id="vtprune", simple_class_path=f"{here}.VTPruneSimple", chat_class_path=f"{here}.VTPruneChat"
    )


def _with_lists(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings from ``model_args``, where a comma ends a value: lists are written 2/4."""
    types = {} if method == NONE else setting_types(method_class(method))
    return {key: str(value).split("/") if takes_list(types.get(key)) else value for key, value in settings.items()}


def _gen_kwargs(request: Instance) -> dict[str, Any]:
    """The generation settings of a request: its third argument in chat tasks, its second in simple ones."""
    return next(argument for argument in request.args[1:3] if isinstance(argument, dict))


def _batches(requests: Sequence[Instance], size: int) -> Iterator[Sequence[Instance]]:
    """Runs of at most ``size`` requests with the same generation settings, in order."""
    start = 0
    while start < len(requests):
        end = start + 1
        while end < len(requests) and end - start < size and _gen_kwargs(requests[end]) == _gen_kwargs(requests[start]):
            end += 1
        yield requests[start:end]
        start = end


def _generation(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``generate``'s keywords, and the strings to stop at."""
    generation = {key: settings[key] for key in GENERATION if settings.get(key) is not None}
    if not generation.get("do_sample", bool(generation.get("temperature"))):
        generation = {key: value for key, value in generation.items() if key in ("max_new_tokens", "num_beams")}
    until = settings.get("until") or []
    return generation, [until] if isinstance(until, str) else list(until)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
