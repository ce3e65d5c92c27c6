"""Reading conversations: LLaVA JSON and JSONL, and the ``messages`` + ``images`` form.

Every record becomes the same flat row, held by ``datasets`` (memory-mapped, cached by fingerprint). A record that is
malformed keeps its place with an ``error``, so that it can be counted and named instead of ending a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from vtprune_train.data.chat import UNSUPERVISED, Turn
from vtprune_train.stream import IMAGE

FORMAT = 2  # of the rows below; part of their cache's key
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Value("string")),
        "roles": List(Value("string")),
        "texts": List(Value("string")),
        "error": Value("string"),
    }
)


def read_source(path: Path, cache_dir: str | None = None) -> Dataset:
    """Rows ``id, images, roles, texts, error`` of one file, read once and cached.

    Raises:
        ValueError: the file is missing, of an unknown kind, or not JSON; names the file.
    """
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; check data.root and the path under data.train or data.eval")
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"data file {path}: unknown kind {path.suffix!r}; use .json (a list) or .jsonl")
    status = path.stat()
    stamp = f"{FORMAT}-{status.st_size}-{status.st_mtime_ns}"
    try:
        return Dataset.from_generator(
            _rows, features=FEATURES, cache_dir=cache_dir, gen_kwargs={"path": str(path.resolve()), "stamp": stamp}
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # ours, which names the place
            raise error.__cause__ from None
        raise


def _rows(path: str, stamp: str) -> Iterator[dict[str, Any]]:
    """``stamp`` is part of the cache's fingerprint: a changed file is read again."""
    for index, record in enumerate(_json_records(Path(path))):
        yield normalize(record, f"{Path(path).stem}-{index}")


def _json_records(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
            return
        records = _parse(file.read(), str(path))
    if not isinstance(records, list):
        raise ValueError(f"data file {path} holds a {type(records).__name__}, not a list of conversations")
    yield from records


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error


def normalize(record: Any, default_id: str) -> dict[str, Any]:
    """One record as a row; what is wrong with it goes to ``error`` (empty if nothing is)."""
    row = {"id": default_id, "images": [], "roles": [], "texts": [], "error": ""}
    try:
        if not isinstance(record, Mapping):
            raise ValueError(f"the record is a {type(record).__name__}, not an object")
        row["id"] = str(record.get("id", default_id))
        turns = _turns(record)
        images = _images(record)
        _check(turns, images)
    except ValueError as error:
        return {**row, "error": str(error)}
    return {**row, "images": images, "roles": [t.role for t in turns], "texts": [t.text for t in turns]}


def turns_of(row: Mapping[str, Any]) -> list[Turn]:
    """The conversation of a row."""
    return [Turn(role, text) for role, text in zip(row["roles"], row["texts"], strict=True)]


def _turns(record: Mapping[str, Any]) -> list[Turn]:
    messages = record.get("conversations", record.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has neither 'conversations' (LLaVA) nor 'messages', or they are empty")
    turns = [_turn(message) for message in messages]
    if isinstance(record.get("system"), str) and turns[0].role != "system":
        turns.insert(0, Turn("system", record["system"]))
    return turns


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"a turn is a {type(message).__name__}, not an object")
    role = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the text of a {role} turn is {content!r}")
    return Turn(ROLES[role], content)


def _part(part: Any) -> str:
    """The text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"a part of a message is {part!r}; use {{type: text, text: ...}} or {{type: image}}")


def _images(record: Mapping[str, Any]) -> list[str]:
    images = record.get("images", record.get("image"))
    if images is None or images == "":
        return []
    if isinstance(images, str):
        return [images]
    if isinstance(images, list) and all(isinstance(image, str) for image in images):
        return images
    raise ValueError(f"image is {images!r}; use a path or a list of paths")


def _check(turns: list[Turn], images: list[str]) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system turn stands after the first turn")
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    if [turn.role for turn in spoken] != expected[: len(spoken)] or not spoken:
        raise ValueError(f"turns must alternate, the user first; they are {[turn.role for turn in spoken]}")
    if len(spoken) == 1:
        raise ValueError(UNSUPERVISED)
    if len(spoken) % 2:
        raise ValueError("the conversation ends with a user turn, so its last question has no answer to learn")
    if any(IMAGE in turn.text for turn in turns if turn.role != "user"):
        raise ValueError(f"{IMAGE} stands outside a user turn")
    placeholders = sum(turn.text.count(IMAGE) for turn in spoken)
    if placeholders != len(images):
        raise ValueError(f"{len(images)} image(s) but {placeholders} {IMAGE} in the text")
