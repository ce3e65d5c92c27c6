"""Every ``vtprune`` line of the pages on inference and export does what it says."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from tests.support.checkpoints import save_data, save_images, save_run
from tests.support.families import SPECIAL
from tests.support.video_runs import VideoSetup
from tests.support.videos import moving_frames, write_video
from vtprune_train import PyramidDrop, prune
from vtprune_train.cli import main
from vtprune_train.data.synthetic import write_dataset

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def commands(page):
    blocks = BASH.findall((DOCS / page).read_text())
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("vtprune ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages name: two runs, pictures, data."""
    for name in ("llava_next_pdrop", "llava_next_pretrain"):
        save_run(tmp_path / "runs" / name, PyramidDrop(layers=(1, 2, 3)))
    write_videos(tmp_path)
    for path, name in zip(save_images(tmp_path / "drawn", 2), ("cat.jpg", "dog.jpg"), strict=True):
        path.rename(tmp_path / name)
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_videos(folder):
    """A model that takes videos, with pruning settings, and records with a video."""
    setup = VideoSetup("qwen3_vl", folder / "setup")
    parts = setup.parts()
    with torch.no_grad():
        parts.model.lm_head.weight[: len(SPECIAL)] = 0  # answer with words
    for part in (prune(parts.model, PyramidDrop(layers=(1, 2, 3))), parts.processor):
        part.save_pretrained(folder / "runs" / "qwen3_vl_videos")
    (folder / "videos").mkdir()
    for path in ("clip.mp4", "videos/clip.mp4"):
        write_video(folder / path, moving_frames())
    turns = [{"from": "human", "value": "<video> what happens ?"}, {"from": "gpt", "value": "a red cat"}]
    (folder / "videos.json").write_text(json.dumps([{"id": "a", "video": "clip.mp4", "conversations": turns}]))


def save_original():
    """What the original code left, and the tower that it names."""
    model = LlavaNextForConditionalGeneration.from_pretrained("runs/llava_next_pdrop/checkpoints/step_00000008/hf")
    model.model.vision_tower.save_pretrained("tower")
    for form, out, *tower in (
        ("original", "llava-v1.6-vicuna-7b", "--vision_tower", "tower"),
        ("mm_projector", "mm_projector.bin"),
    ):
        assert main(["convert", "--model", "runs/llava_next_pdrop", "--to", form, "--out", out, *tower]) == 0


@pytest.mark.parametrize("page", ["inference.md", "export.md", "methods/search.md"])
def test_commands(page, folder, capsys):
    lines = commands(page)
    assert len(lines) >= 3
    if page == "export.md":
        lines = [line.replace("openai/clip-vit-large-patch14-336", "tower") for line in lines]
        save_original()
    for line in lines:
        capsys.readouterr()
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
        out = capsys.readouterr().out
        assert out.strip() or line.startswith(("vtprune export", "vtprune convert", "vtprune train")), line
    if page == "inference.md":
        assert len(list((folder / "runs" / "eval").iterdir())) == 4
        files = {path.name for path in (folder / "runs" / "eval" / "hundred").iterdir()} - {".lock"}
        named = re.findall(r"^\| `(\S+)` \|", (DOCS / page).read_text(), re.MULTILINE)
        assert files == set(named) == {"samples.jsonl", "results.json", "settings.json"}
        assert json.loads((folder / "runs" / "eval" / "hundred" / "results.json").read_text())["answers"] == 13
    if page == "export.md":
        made = {path.name for path in (folder / "exports").iterdir()}
        converted = {"original", "mm_projector.bin", "projector_of_bin"}
        assert made == {"llava_next_pdrop", "small_files", "projector"} | converted
        assert (folder / "checkpoints" / "llava_next" / "config.json").is_file()


def test_commands_of_the_readme(folder):
    (folder / "configs").symlink_to(DOCS.parent / "configs")
    elsewhere = ("lora", "bench-methods", "--help")  # on the adapters' and methods' pages, with tests of their own
    lines = [line for line in commands("../README.md") if not any(word in line for word in elsewhere)]
    assert len(lines) == 6
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    assert (folder / "show.png").is_file() and (folder / "show.html").is_file()


def test_commands_of_the_quickstart(folder, capsys):
    save_run(folder / "runs" / "quickstart", PyramidDrop(layers=(1, 2, 3)))
    write_dataset(folder / "runs" / "data" / "quickstart", num_train=2, num_eval=3, seed=0)
    asking = ("generate", "show", "eval", "export")
    lines = [line for line in commands("quickstart.md") if line.split()[1] in asking]
    assert [line.split()[1] for line in lines] == list(asking)
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert (folder / "show.png").is_file() and (folder / "exports" / "quickstart" / "config.json").is_file()
    [help_line] = [line for line in commands("quickstart.md") if "--help" in line]
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        main(shlex.split(help_line)[1:])
    assert "pruning.method" in capsys.readouterr().out


def test_python(folder, capsys):
    [block] = PYTHON.findall((DOCS / "inference.md").read_text())
    exec(block, {})
    assert len(capsys.readouterr().out.strip()) > 5
