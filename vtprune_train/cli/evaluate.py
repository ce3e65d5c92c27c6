"""``vtprune eval``: answer the questions of a data file; report accuracy, visual tokens, times and cache."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vtprune_train.cli.options import (
    add_data_options,
    add_method_options,
    add_model_option,
    add_sampling_options,
    check_least,
    load_model,
)
from vtprune_train.data.records import NO_PROMPT
from vtprune_train.data.sources import find_files, reader_identity
from vtprune_train.evaluation.answering import (
    Loaded,
    Prompt,
    batch,
    batchable,
    open_image,
    prompt_text,
    recorded_chat,
    recorded_prompt,
)
from vtprune_train.evaluation.questions import Question, as_answered, normalized, read_questions
from vtprune_train.evaluation.results import Ledger, open_ledger, summary, table
from vtprune_train.evaluation.timing import Measured, drop_layers, measured_answers
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.patch import dense, is_pruned, method_of

log = logging.getLogger(__name__)

PRUNED, DENSE = "pruned", "dense"
WARM_UP_TOKENS = 2
FORMAT = 2  # version of the lines of samples.jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_option(parser)
    add_data_options(parser, "conversations, in any format that training reads")
    help_text = "folder of the videos that the data names; without it, records with videos are left out"
    parser.add_argument("--videos", metavar="DIR", help=help_text)
    add_sampling_options(parser)
    parser.add_argument("--compare", choices=[DENSE], help="also run the dense model, alternating batch by batch")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="questions in a batch (default: 8)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=16, metavar="N", help="maximum tokens of an answer (default: 16)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use N random records (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random records")
    parser.add_argument("--out", metavar="DIR", help="output folder (default: one for these settings under runs/eval/)")
    add_method_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, or continue an evaluation that was interrupted."""
    check_least(arguments, batch_size=1, max_new_tokens=1)
    data, images = Path(arguments.data), Path(arguments.images)
    added = recorded_prompt(arguments.model, data)
    questions, malformed = read_questions(
        data, images, arguments.limit, arguments.seed, arguments.ignore, added, arguments.reader,
        recorded_chat(arguments.model),
        videos=None if arguments.videos is None else Path(arguments.videos),
    )  # fmt: skip
    loaded = load_model(arguments)
    if arguments.compare and not is_pruned(loaded.model):
        raise ValueError("--compare dense: the model already runs dense; set a --method to compare with")
    warn_of_long_answers(questions, loaded.processor.tokenizer, arguments.max_new_tokens)
    settings = identity(arguments, loaded)
    if added != NO_PROMPT:
        settings["prompt"] = asdict(added)
    folder = Path(arguments.out) if arguments.out else default_folder(arguments, settings)
    with open_ledger(folder, settings) as ledger:
        left_out = [*malformed, *_ask_all(loaded, questions, ledger, arguments)]
        for sample, reason in left_out:
            log.warning("left out %s: %s", sample, reason)
        lines = [ledger.done[question.key] for question in questions if question.key in ledger.done]
        if not lines:
            raise ValueError(f"none of the {len(questions)} question(s) could be used; the first: {left_out[0][1]}")
        results = summary(lines, drop_layers(loaded), left_out)
        ledger.write("results.json", {"settings": settings, **results})
    print(table(results))
    log.info("wrote the results to %s", folder)
    return 0


def warn_of_long_answers(questions: Sequence[Question], tokenizer: Any, most: int) -> None:
    """Warn about reference answers with more tokens than may be generated: they cannot be matched."""
    lengths = [len(tokenizer.encode(question.reference, add_special_tokens=False)) for question in questions]
    if long := sum(length > most for length in lengths):
        log.warning(
            "%d of %d reference answers have more than --max_new_tokens=%d tokens (up to %d), so the generated answers "
            "are truncated and count as wrong; raise it",
            long, len(questions), most, max(lengths),
        )  # fmt: skip


def identity(arguments: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """The settings that must not change when an evaluation continues."""
    folder = Path(resolve_checkpoint(arguments.model))
    method = method_of(loaded.model) if is_pruned(loaded.model) else None
    return {
        "model": str(folder.resolve()) if folder.is_dir() else arguments.model,
        "weights": _files_digest(folder) if folder.is_dir() else None,
        "data": str(Path(arguments.data).resolve()),
        "data_sha256": _data_digest(find_files(Path(arguments.data), arguments.reader)),
        "images": str(Path(arguments.images).resolve()),
        **({"videos": str(Path(arguments.videos).resolve())} if arguments.videos else {}),
        **({"fps": arguments.fps} if arguments.fps else {}),
        **({"num_frames": arguments.num_frames} if arguments.num_frames else {}),
        **({"ignore": sorted(arguments.ignore)} if arguments.ignore else {}),
        **({"reader": reader_identity(arguments.reader)} if arguments.reader else {}),
        "limit": arguments.limit,
        "seed": arguments.seed,
        "method": {"method": "none"} if method is None else method.settings(),
        "compare": arguments.compare,
        "batch_size": arguments.batch_size,
        "max_new_tokens": arguments.max_new_tokens,
        "format": FORMAT,
        "device": loaded.model.device.type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def _data_digest(files: Sequence[Path]) -> str:
    """Hash of the content of all data files."""
    digest = hashlib.sha256()
    for path in files:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                hashlib.file_digest(opened, lambda: digest)  # adds to the same digest
    return digest.hexdigest()[:16]


def _files_digest(folder: Path) -> str:
    """A hash of names, sizes and times of the files of a model."""
    with os.scandir(folder) as entries:
        files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def default_folder(arguments: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """A folder for this combination of settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = arguments.model.strip("/").replace("/", "_") if not Path(arguments.model).exists() else None
    name = name or Path(arguments.model).resolve().name
    return Path("runs") / "eval" / f"{name}-{Path(arguments.data).stem}-{digest}"


def _ask_all(
    loaded: Loaded, questions: Sequence[Question], ledger: Ledger, arguments: argparse.Namespace
) -> list[tuple[str, str]]:
    """Answer the remaining questions, in the batches of an uninterrupted run; returns ``(id, reason)`` of unreadable
    samples."""
    unreadable: dict[str, str] = {}
    names = [PRUNED, DENSE] if arguments.compare else [PRUNED if is_pruned(loaded.model) else DENSE]
    is_warm = False
    done = sum(question.key in ledger.done for question in questions)
    with tqdm(total=len(questions), initial=done, desc="eval", unit="answer") as progress:
        for number, start in enumerate(range(0, len(questions), arguments.batch_size)):
            group = questions[start : start + arguments.batch_size]
            waiting = [question for question in group if question.key not in ledger.done]
            ready = list(_prompts(loaded, waiting, unreadable))
            progress.update(len(waiting) - len(ready))
            if not ready:
                continue
            # The first of a batch alternates, so that drift during the run affects both equally.
            order = names if number % 2 == 0 else names[::-1]
            for indices in batchable(loaded, [prompt for _, prompt in ready]):
                asked = [ready[index] for index in indices]
                inputs = batch(loaded, [prompt for _, prompt in asked])
                if not is_warm:
                    for name in names:
                        _measure(loaded, inputs, name, WARM_UP_TOKENS)
                    is_warm = True
                runs = {name: _measure(loaded, inputs, name, arguments.max_new_tokens) for name in order}
                tokenizer = loaded.processor.tokenizer
                ledger.append([_line(question, row, names, runs, tokenizer) for row, (question, _) in enumerate(asked)])
                progress.update(len(asked))
    return list(unreadable.items())


def _prompts(
    loaded: Loaded, questions: Sequence[Question], unreadable: dict[str, str]
) -> Iterator[tuple[Question, Prompt]]:
    """The questions whose images and videos can be read and whose turns the chat template accepts, with prompts."""
    for question in questions:
        try:
            images = [open_image(path) for path in question.images]
            videos = [open_video(file, loaded.processor) for file in question.videos]
            prompt_text(loaded, len(images), question.turns, len(videos))
        except ValueError as error:
            unreadable[question.sample] = str(error)
            continue
        yield question, ([*images, *videos], question.turns)


def _measure(loaded: Loaded, inputs: Any, name: str, max_new_tokens: int) -> list[Measured]:
    with dense(loaded.model) if name == DENSE and is_pruned(loaded.model) else nullcontext():
        return measured_answers(loaded, inputs, max_new_tokens)


def _line(
    question: Question, row: int, names: Sequence[str], runs: dict[str, list[Measured]], tokenizer: Any
) -> dict[str, Any]:
    """One line of ``samples.jsonl``."""
    expected = normalized(as_answered(question.reference, tokenizer))
    measured = {name: runs[name][row] for name in names}
    results = {name: {**asdict(one), "exact": normalized(one.answer) == expected} for name, one in measured.items()}
    return {"key": question.key, "id": question.sample, "reference": question.reference, "runs": results}
