"""Rows of the race with LLaMA-Factory or ms-swift: ``python -m racing.peers NAME FOLDER RESULT``.

Both get the samples in the form, the order and the tokens of the other rows, through a template of their own.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from racing.recorder import Recorder
from racing.setup import Setup
from racing.trainers import Measure, ordered_samples, shared_settings
from vtprune_train.training.loop.metrics import device_peak_flops

TEMPLATE = "race"
PACKAGES = {"llamafactory": "llamafactory", "ms_swift": "ms-swift"}


def write_conversations(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """``peers.json`` with ``dataset_info.json`` for LLaMA-Factory, and ``peers.jsonl`` for ms-swift."""
    records = []
    for row in rows:
        user, assistant = (
            "".join("<image> " if part["type"] == "image" else part["text"] for part in message["content"])
            for message in row["messages"]
        )
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        records.append({"messages": messages, "images": row["images"]})
    (folder / "peers.json").write_text(json.dumps(records))
    (folder / "peers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entry = {"file_name": "peers.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"race": entry}))


def run_llamafactory(setup: Setup, recorder: Recorder, folder: Path) -> dict[str, Any]:
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(
        name=TEMPLATE,
        format_user=StringFormatter(slots=["user : {{content}} assistant : "]),
        format_assistant=StringFormatter(slots=["{{content}} </s>"]),
        format_prefix=EmptyFormatter(slots=[]),
        mm_plugin=get_mm_plugin(name="llava_next", image_token="<image>"),
    )
    settings = {
        **shared_settings(setup),
        "bf16": setup.device != "cpu",
        "seed": setup.seed,
        "stage": "sft",
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "pure_bf16": False,
        "cutoff_len": 2 * setup.longest,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa" if setup.device == "cpu" else "fa2",
        "preprocessing_num_workers": 1,
    }
    paths = {
        "model_name_or_path": str(setup.checkpoint),
        "template": TEMPLATE,
        "do_train": True,
        "dataset": "race",
        "dataset_dir": str(setup.data),
        "output_dir": str(folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    run_exp({**settings, **paths}, callbacks=[Measure(recorder)])
    return settings


def run_ms_swift(setup: Setup, recorder: Recorder, folder: Path) -> dict[str, Any]:
    from swift.callbacks import callbacks_map
    from swift.pipelines.train.sft import sft_main
    from swift.template import TemplateMeta, register_template
    from swift.template.templates.llava import Llava1_6HfTemplate, LlavaHfTemplate

    class Template(Llava1_6HfTemplate):  # type: ignore[misc]
        """ms-swift 4.6.0 cannot join the tiles of samples with one image and with two."""

        def _data_collator(self, batch: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
            for sample in batch:
                if sample.get("pixel_values") is not None:  # [images, tiles, ...]; images of a sample have one size
                    sample["pixel_values"] = sample["pixel_values"].flatten(0, 1)
            return LlavaHfTemplate._data_collator(self, batch, **kwargs)

    register_template(
        TemplateMeta(
            TEMPLATE,
            prefix=[],
            prompt=["user : {{QUERY}} assistant : "],
            chat_sep=[],
            suffix=[" </s>"],
            template_cls=Template,
        )
    )
    callbacks_map[TEMPLATE] = lambda *_: Measure(recorder)
    settings = {
        **shared_settings(setup),
        "bf16": setup.device != "cpu",
        "seed": setup.seed,
        "tuner_type": "full",
        "freeze_vit": False,
        "freeze_aligner": False,
        "vit_gradient_checkpointing": False,
        "torch_dtype": setup.dtype,
        "attn_impl": "sdpa" if setup.device == "cpu" else "flash_attn",
        "padding_free": setup.device != "cpu",  # needs FlashAttention
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "dataset_num_proc": 1,
        "max_length": 2 * setup.longest,
    }
    paths = {
        "model": str(setup.checkpoint),
        "model_type": "llava1_6_vicuna_hf",
        "template": TEMPLATE,
        "dataset": str(setup.data / "peers.jsonl"),
        "split_dataset_ratio": 0,
        "output_dir": str(folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_hf": True,
        "check_model": False,
        "callbacks": TEMPLATE,
    }
    sft_main([word for key, value in {**settings, **paths}.items() for word in (f"--{key}", str(value))])
    return settings


RUN = {"llamafactory": run_llamafactory, "ms_swift": run_ms_swift}


def run(name: str, setup: Setup, out: Path) -> None:
    """Train, and write the measurements to ``out``."""
    device = torch.device(setup.device)
    recorder = Recorder(device)
    settings = RUN[name](setup, recorder, out.with_suffix(""))
    lengths, per_step = [row["length"] for row in ordered_samples(setup)], setup.global_batch
    recorder.tokens = [sum(lengths[step * per_step : (step + 1) * per_step]) for step in range(setup.steps)]
    versions = {package: importlib.metadata.version(package) for package in (PACKAGES[name], "transformers", "torch")}
    recorder.write(out, {**settings, "versions": versions}, device_peak_flops(device))


if __name__ == "__main__":
    run(sys.argv[1], Setup.read(sys.argv[2]), Path(sys.argv[3]))
