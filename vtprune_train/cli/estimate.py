"""``vtprune estimate``: the savings of pruning, computed from a model's config and the sizes of images and
videos."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from transformers import PreTrainedConfig

from vtprune_train.bench.costs import (
    TYPICAL_ANSWER,
    Cost,
    Estimate,
    ImageTokens,
    Sample,
    Subject,
    estimate,
    images_of,
    images_of_sample,
)
from vtprune_train.bench.decoder_time import Clock, clock
from vtprune_train.bench.decoder_time import render as render_clock
from vtprune_train.bench.run_cost import render as render_run
from vtprune_train.bench.run_cost import run_cost
from vtprune_train.bench.videos import VideoSize, clip_of, with_videos
from vtprune_train.cli.options import METHOD_HELP, add_set_option, add_trust_option, changed, named_method, set_values
from vtprune_train.config.load import load_config
from vtprune_train.core.flops import TYPICAL_TEXT, DecoderGeometry
from vtprune_train.data.videos import video_header
from vtprune_train.evaluation.answering import choose_device
from vtprune_train.models.families import KNOWN_CONFIGS, family_of_type
from vtprune_train.models.families.layout import Clip, ImageLayout
from vtprune_train.models.forward.encoder import check_tower
from vtprune_train.models.io.build import load_any_config, load_model_config, resolve_checkpoint
from vtprune_train.pruning import CONFIG_KEY, PruningMethod, method_from_settings, saved_settings
from vtprune_train.pruning.attending import check_attending, fitted
from vtprune_train.pruning.contract import check_method
from vtprune_train.pruning.describe import in_words
from vtprune_train.pruning.phases import Phases

LARGEST = 10**6  # tokens of a sample; planning takes memory for each
MOST_SAMPLES = 10**9
MOST_CLOCKED = 1024
OPTIONS = ("method", "layers", "keep")  # method settings with an option of this name; others use --set
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(result: Estimate, *, published: bool = False) -> str:
    """Format the estimate as text; with ``published``, also in the paper's convention."""
    scale, unit = _unit(result.prefill_decoder.dense, "FLOP")
    lines = [*_describe(result), "", *_stage_table(result), ""]
    lines += _visual_lines(result)
    lines += [f"head on the prompt's last row {result.head / scale:.4f} {unit}, {_selector_line(result, scale, unit)}"]
    vision = result.not_counted if result.vision is None else f"{result.vision / scale:.3f} {unit} forward"
    lines += [f"tower and projector {vision}"]
    lines += ["", *_totals(result)]
    if published:
        lines += ["", *_published_lines(result)]
    return "\n".join(lines)


def _describe(result: Estimate) -> list[str]:
    geometry, sample = result.decoder, result.sample
    pictures = [
        f"{image.label}: {image.tokens} tokens"
        + (f" of {image.tiles} {result.unit}" if image.tiles else "")
        + (f" in {image.steps} steps in time" if image.steps else "")
        for image in sample.images
    ]
    rows = {
        "model": f"{result.model} ({result.family})",
        "decoder": f"{geometry.num_layers} layers of width {geometry.hidden}, MLP of {geometry.intermediate}, "
        f"{geometry.heads} heads, {geometry.kv_heads} for keys and values",
        "pruning": in_words(result.pruning),
        "from": result.pruning_from,
        **({"schedule": result.schedule} if result.schedule != "none" else {}),
        "sample": "; ".join([*pictures, f"{sample.text} text tokens; an answer of {sample.answer}"]),
        "batch": str(sample.batch),
        "trained": ", ".join(result.trained),
        "cache": f"keys and values in {result.dtype}",
    }
    return [f"{label:<10}{value}" for label, value in rows.items()]


def _stage_table(result: Estimate) -> list[str]:
    flops, flop_unit = _unit(result.prefill_decoder.dense, "FLOP")
    size, byte_unit = _unit(result.cache_prompt.dense, "B")
    flop_title, byte_title = f"prefill, {flop_unit}", f"cache, {byte_unit}"
    lines = [
        f"{'':>9}{'prompt tokens':>26}{flop_title:>24}{byte_title:>24}",
        f"{'layers':>9}{'visual':>10}{'text':>8}{'all':>8}" + f"{'dense':>12}{'pruned':>12}" * 2,
    ]
    for stage in result.stages:
        lines.append(
            f"{f'{stage.first_layer}-{stage.end_layer - 1}':>9}{stage.visual_tokens:>10}{stage.text_tokens:>8}"
            f"{stage.visual_tokens + stage.text_tokens:>8}"
            f"{stage.prefill.dense / flops:>12.3f}{stage.prefill.pruned / flops:>12.3f}"
            f"{stage.cache.dense / size:>12.3f}{stage.cache.pruned / size:>12.3f}"
        )
    return lines


def _visual_lines(result: Estimate) -> list[str]:
    """Visual tokens in both conventions, for comparison with budgets in papers."""
    visual, whole = result.visual, sum(image.tokens for image in result.sample.images)
    rows = [
        ("enter a layer", visual.entering, "tokens processed by the layers"),
        ("leave a layer", visual.leaving, "as in papers: a drop after a layer counts for that layer"),
        ("stay in the cache", visual.cached, "keys read during decoding"),
    ]
    about = ", as planned; the method decides at run time" if result.expected else ""
    return [
        f"visual tokens of a sample, mean over {result.decoder.num_layers} layers, of {whole}{about}",
        *(f"  {label:<18}{_tenths(count):>9}{count / whole:>9.1%}   {note}" for label, count, note in rows),
    ]


def _tenths(count: float) -> str:
    """Round half up to one decimal, as papers do."""
    return f"{math.floor(10 * count + 0.5) / 10:.1f}"


def _selector_line(result: Estimate, scale: float, unit: str) -> str:
    if not result.selector:
        return "no selector" if result.schedule == "none" else "negligible selector cost"
    ways = {"next_layer": " (next_layer projects keys)", "this_layer": " (this_layer projects nothing)"}
    how = ways.get(result.pruning.get("rank_with", ""), "")
    return f"selector {result.selector / scale:.4f} {unit}{how}"


def _totals(result: Estimate) -> list[str]:
    rows: list[tuple[str, str, Cost | None, str]] = [
        ("prefill, decoder", "FLOP", result.prefill_decoder, "x faster"),
        ("prefill, whole model", "FLOP", result.prefill_whole, "x faster"),
        ("training step, decoder", "FLOP", result.training_decoder, "x faster"),
        ("training step, whole model", "FLOP", result.training_whole, "x faster"),
        ("cache of the prompt", "B", result.cache_prompt, "x smaller"),
        (f"cache after {result.sample.answer} tokens", "B", result.cache_answer, "x smaller"),
    ]
    lines = [f"{'':<28}{'':<7}{'dense':>12}{'pruned':>12}{'dense / pruned':>17}"]
    for label, kind, cost, word in rows:
        if cost is None:
            lines.append(f"{label:<28}{'':<7}{'-':>12}{'-':>12}")
            continue
        scale, unit = _unit(cost.dense, kind)
        numbers = f"{cost.dense / scale:>12.3f}{cost.pruned / scale:>12.3f}{cost.ratio:>12.3f}{word}"
        lines.append(f"{label:<28}{unit:<7}{numbers}")
    lines.append("FLOP ratios, not measurements; decoder and whole model include the head and the selector")
    return lines


def _published_lines(result: Estimate) -> list[str]:
    cost, tokens = result.published, sum(image.tokens for image in result.sample.images)
    return [
        f"as published (arXiv 2410.17247): decoder layers, {tokens} visual tokens only, 4nd^2 + 2n^2d + 3ndm a layer",
        f"  dense {cost.dense / 1e12:.3g} TFLOP, pruned {cost.pruned / 1e12:.3g} TFLOP, {cost.ratio:.3f}x",
    ]


def _unit(value: float, name: str) -> tuple[float, str]:
    """The largest scale in which ``value`` is at least 1, and its unit."""
    return next(((scale, prefix + name) for scale, prefix in UNITS if value >= scale), (1.0, name))


def _split(text: Any) -> Any:
    return text.split(",") if isinstance(text, str) else text


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise ValueError(f"{text!r} is not WIDTHxHEIGHT in pixels, for example 672x336")
    return int(match[1]), int(match[2])


def _video(text: Any) -> VideoSize | Path:
    """The number of frames and their size, or the path of a video."""
    if match := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})", text):
        return VideoSize(*map(int, match.groups()))
    if not Path(text).exists():
        raise ValueError(f"{text!r} is neither FRAMESxWIDTHxHEIGHT, for example 64x640x360, nor a file on this machine")
    return Path(text)


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Clockable = Annotated[int, Field(ge=1, le=MOST_CLOCKED)]
Size = Annotated[tuple[int, int], BeforeValidator(_size)]
Video = Annotated[VideoSize | Path, BeforeValidator(_video)]


class Request(BaseModel):
    """Validated command-line arguments; all errors are reported at once."""

    config: str | None = None
    overrides: list[str] = []
    model: str | None = None
    resolution: list[Size] = []
    video: list[Video] = []
    visual_tokens: Annotated[list[Count], BeforeValidator(_split)] = []
    text: Count = TYPICAL_TEXT
    answer: Count = TYPICAL_ANSWER
    batch: Samples = 1
    method: str | None = None
    layers: Annotated[list[int] | None, BeforeValidator(_split)] = None
    keep: Annotated[list[float] | None, BeforeValidator(_split)] = None
    set: list[str] = []
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    published: bool = False
    samples: Samples | None = None
    tflops: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    clock: Annotated[list[Clockable], BeforeValidator(_split)] = []
    repeats: Clockable = 3
    device: str = "auto"
    report: str | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Request:
        if (self.config is None) == (self.model is None):
            raise ValueError("pass either --config FILE or --model FOLDER_OR_ID")
        if self.model is not None and self.overrides:
            raise ValueError(f"{self.overrides[0]!r}: key=value only works with --config; with --model use the options")
        if self.config is not None and self.pruning:
            key, value = next(iter(self.pruning.items()))
            raise ValueError(f"--{key} only works with --model; with --config write 'pruning.{key}={value}'")
        if self.method == "none" and len(self.pruning) > 1:
            raise ValueError("--layers, --keep and --set have no effect with --method none; remove them")
        for option in ("resolution", "video"):
            if getattr(self, option) and self.visual_tokens:
                raise ValueError(f"pass either --{option} or --visual_tokens, not both")
        if (self.samples is None) != (self.tflops is None):
            has, lacks = ("samples", "tflops") if self.tflops is None else ("tflops", "samples")
            raise ValueError(f"--{has} has no effect without --{lacks}; GPU hours need both")
        if not self.clock and (idle := sorted({"repeats", "device"} & self.model_fields_set)):
            raise ValueError(f"--{idle[0]} has no effect without --clock; add batch sizes, for example --clock 1,8")
        return self

    @property
    def pruning(self) -> dict[str, Any]:
        """Pruning settings from the options."""
        options = {"method": self.method, "layers": self.layers, "keep": self.keep}
        return {**{key: value for key, value in options.items() if value is not None}, **set_values(self.set)}

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Request:
        """Validate parsed arguments; the error has one line per problem."""
        values = {key: value for key, value in vars(arguments).items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    message = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return message
    value = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"--{item['loc'][0]}: {message}{value}"


def _from_config(request: Request) -> tuple[Subject, Phases]:
    from vtprune_train.training.loop.settings import with_saved_settings  # slow import, only needed here

    assert request.config is not None
    config = with_saved_settings(load_config(request.config, request.overrides))
    model_config = load_model_config(config.model, offline=True)
    subject = Subject(
        name=request.config,
        config=model_config,
        method=_method(config.pruning.settings, model_config, "pruning."),
        method_from=f"the settings of {request.config}",
        trained=tuple(config.model.train),
        peft=config.model.peft,
        dtype=request.dtype or config.model.dtype,
        source=config.model.path if config.model.path and Path(config.model.path).is_dir() else None,
        max_pixels=config.model.max_pixels,
        video=config.data.video.model_dump(),
    )
    phases = config.phases(1, DecoderGeometry.of(model_config.get_text_config()).num_layers)
    return subject, replace(phases, method=subject.method)


def _from_checkpoint(request: Request) -> Subject:
    assert request.model is not None
    config = load_any_config(resolve_checkpoint(request.model), f"--model={request.model}", offline=True)
    saved = getattr(config, CONFIG_KEY, None)
    if saved is None:
        settings, source_of_settings = (
            {"method": "pyramiddrop"},
            "PyramidDrop's defaults (the checkpoint has no pruning settings)",
        )
    else:
        source_of_settings = "the settings saved in the checkpoint"
        settings = saved if request.method is not None else saved_settings(config) or {}
    options = {key: value for key, value in request.pruning.items() if key != "method"}
    if request.method is not None:
        settings, source_of_settings = named_method(request.method), "the command line"
    elif options:
        source_of_settings = f"the command line, and {source_of_settings}"
    method = _method(settings, config, None if request.pruning else f"pruning in {request.model}: ", options)
    known = request.model in KNOWN_CONFIGS and not Path(request.model).exists()
    source = None if known else request.model
    return Subject(
        request.model, config, method, source_of_settings, dtype=request.dtype or Subject.dtype, source=source
    )


def _method(
    settings: Mapping[str, Any], config: PreTrainedConfig, place: str | None, options: Mapping[str, Any] | None = None
) -> PruningMethod | None:
    """Build the method from ``settings`` and ``options``, and check that it fits the decoder. ``place`` is the prefix
    of errors; ``None`` means that they are about options."""
    text = config.get_text_config()
    num_layers = DecoderGeometry.of(text).num_layers
    try:
        method = method_from_settings(changed(settings, options or {}))
        if method is not None:
            method = fitted(method, text)
            check_method(method, num_layers)
            check_attending(method, text)
    except ValueError as error:
        option = str(error).partition("=")[0] in OPTIONS  # otherwise from --set
        raise ValueError(f"{('--' if option else '') if place is None else place}{error}") from error
    family = family_of_type(config.model_type)
    if method is not None and family is not None:
        check_tower(config, family, method)
        family.warn_without_videos(method, num_layers)
    return method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``vtprune estimate``; :class:`Request` validates them."""
    parser.add_argument("--config", help="YAML file of a run: a path, or a name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of --config")
    parser.add_argument("--model", help="instead of --config: checkpoint folder, run folder or hub id")
    add_trust_option(parser)
    parser.add_argument(
        "--resolution", action="append", metavar="WIDTHxHEIGHT", help="image size in pixels; repeat for several images"
    )
    parser.add_argument(
        "--video",
        action="append",
        metavar="FRAMESxWIDTHxHEIGHT",
        help="sampled frames of a video and their size in pixels, or a video file; repeat for several videos",
    )
    parser.add_argument(
        "--visual_tokens", "--visual-tokens", metavar="N[,N]", help="numbers of visual tokens, instead of --resolution"
    )
    parser.add_argument("--text", metavar="N", help=f"text tokens excluding the answer (default {TYPICAL_TEXT})")
    parser.add_argument(
        "--answer", metavar="N", help=f"tokens of the answer, generated or supervised (default {TYPICAL_ANSWER})"
    )
    parser.add_argument("--batch", metavar="N", help="samples (default 1)")
    parser.add_argument("--method", help=f"{METHOD_HELP} (default: what the checkpoint has saved, or pyramiddrop)")
    parser.add_argument("--layers", metavar="N,N", help="layers before which tokens are dropped")
    parser.add_argument("--keep", metavar="X,X", help="keep ratios after each drop, relative to the original tokens")
    add_set_option(parser)
    parser.add_argument("--dtype", help="cache dtype: float32, bfloat16, float16 (default: the config's, or bfloat16)")
    parser.add_argument(
        "--samples", metavar="N", help="samples of a training run, to estimate GPU hours; with --tflops"
    )
    parser.add_argument("--tflops", metavar="X", help="TFLOP/s that a GPU achieves in training, for GPU hours")
    parser.add_argument("--published", action="store_true", help="also print FLOPs in the paper's convention")
    parser.add_argument(
        "--clock",
        metavar="N[,N]",
        help="also measure the time on this machine with random weights, at these batch sizes: 1,8",
    )
    parser.add_argument("--repeats", metavar="N", help="repetitions for --clock (default 3)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="device for --clock; auto: CUDA if available")
    parser.add_argument("--json", dest="report", metavar="FILE", help="also write all numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate, and with ``--clock`` the measured time."""
    request = Request.of(arguments)
    if request.config is not None:
        subject, phases = _from_config(request)
    else:
        subject = _from_checkpoint(request)
        phases = Phases(subject.method)
    images = None if request.visual_tokens else images_of(subject.config, subject.source, subject.max_pixels)
    clips: list[Clip] = []
    if request.video:
        assert images is not None
        images = with_videos(subject.config, images, subject.source, subject.video, subject.max_pixels)
        clips = [_clip(images, video) for video in request.video]
    pictures = images_of_sample(subject.config, request.resolution, request.visual_tokens, images, clips)
    sample = Sample(pictures, request.text + sum(image.text for image in pictures), request.answer, request.batch)
    result = estimate(subject, sample)
    run = None
    if phases.vary or request.samples is not None:
        run = run_cost(subject, sample, phases, request.samples, request.tflops)
    measured = _measured(request, subject, sample) if request.clock else None
    if request.report is not None:
        report = {**asdict(result), "clock": measured and asdict(measured), "run": run and asdict(run)}
        report["sample"]["pictures"] = [_picture(image) for image in sample.images]  # the key of the first release
        del report["sample"]["images"]
        _write(Path(request.report), report)
    print(render(result, published=request.published))
    if run is not None:
        print("\n".join(render_run(run)))
    if measured is not None:
        print("\n".join(["", *render_clock(measured)]))
    return 0


def _clip(layout: ImageLayout, video: VideoSize | Path) -> Clip:
    return layout.clip(video_header(video)) if isinstance(video, Path) else clip_of(layout, video)


def _picture(image: ImageTokens) -> dict[str, Any]:
    of_video = {"steps": image.steps, "text": image.text} if image.steps else {}
    return {"label": image.label, "tokens": image.tokens, "tiles": image.tiles, **of_video}


def _measured(request: Request, subject: Subject, sample: Sample) -> Clock:
    sizes, dtype = DecoderGeometry.of(subject.config.get_text_config()), getattr(torch, subject.dtype)
    device = choose_device(request.device)
    return clock(sizes, subject.method, sample, request.clock, repeats=request.repeats, device=device, dtype=dtype)


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--json={path}: cannot write the file ({error.strerror})") from error
