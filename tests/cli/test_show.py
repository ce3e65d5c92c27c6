"""Where tokens lie, what is drawn of them, the page, and the command."""

import functools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from tests.support.checkpoints import save_run
from tests.support.family_runs import save_checkpoint
from tests.support.helpers import SPECIAL, tiny_image_processor, tiny_model, tiny_processor, tiny_tokenizer
from tests.support.runner import ROOT, Runs
from vtprune_train import PruningMethod, PyramidDrop, prune, unprune
from vtprune_train.cli import main
from vtprune_train.core.stream import Drop
from vtprune_train.models.families.layout import NEWLINE
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.places import grid_places
from vtprune_train.models.forward.padded import kept_tokens, stage_layers
from vtprune_train.pruning.needs import Needs
from vtprune_train.viz.draw import NEWLINE_DROPPED, NEWLINE_KEPT, STRIP, ImageStages, draw, panel, panel_size
from vtprune_train.viz.page import page
from vtprune_train.viz.show import encode, look, show, stage_names

pytestmark = pytest.mark.slow

ANYRES = AnyRes.of(LlavaNextConfig())  # as released: tiles of 336 pixels, patches of 14
TINY = AnyRes.of(tiny_model().config)
BLUE, MAGENTA = (0, 0, 255), (255, 0, 255)
STAGES = ["stage 1, layers 0-2", "stage 2, layers 3-5"]


def processor_336():
    """The released image processor; a tiny tokenizer."""
    size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=size[0], crop_size=size[1]),
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def model_336():
    """The released tiling; tiny widths."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=16384,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"))
    )


def seen(image_processor, anyres, picture):
    """[V, 3] in 0..1, the mean colour of the pixels that each visual token is made of; NaN for newlines."""
    pixels = image_processor(images=picture, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(getattr(image_processor, key))[:, None, None] for key in ("image_mean", "image_std"))
    side, patch = anyres.patches_per_side, anyres.patch_size
    patches = (pixels * std + mean).reshape(-1, 3, side, patch, side, patch).mean(axis=(3, 5))
    colours = np.concatenate([patches.transpose(0, 2, 3, 1).reshape(-1, 3), np.full((1, 3), np.nan)])
    return colours[anyres.visual_index((picture.height, picture.width))]  # NEWLINE is the last row


def gradient(height, width):
    """Red tells how far right, green how far down; blue is full, so it tells the share of a patch that is padding."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.rint(np.stack([x, y, np.ones_like(x)], axis=-1) * 255).astype(np.uint8))


def centres(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


SIZES = [(336, 672), (300, 500), (641, 333), (767, 1023), (150, 900), (999, 334), (500, 500), (1200, 1650)]


@pytest.mark.parametrize("size", SIZES)
def test_each_token_lies_where_the_processor_took_its_pixels_from(size):
    """Colours that the tower really sees, against boxes."""
    height, width = size
    places = ANYRES.places([size], None)[0]
    colours = seen(processor_336().image_processor, ANYRES, gradient(height, width))
    real = places.kinds != "newline"
    boxes, colours = places.boxes[real], colours[real]
    share_seen = colours[:, 2]
    where = colours[:, :2] / share_seen[:, None] * [width, height]
    half_token = np.array([width, height]) / 24 / 2
    assert (np.abs(where - centres(boxes)) < 0.1 * half_token).all(), "a token lies elsewhere"

    is_grid = (places.kinds == "grid")[real]
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    np.testing.assert_allclose(area[is_grid] / area[is_grid].max(), share_seen[is_grid], atol=0.01)
    assert np.allclose(share_seen[~is_grid], 1, atol=1e-3)


def check_places(anyres, size):
    height, width = size
    places = anyres.places([size], None)[0]
    assert len(places.kinds) == len(places.boxes) == anyres.tokens([size])[0]
    left, top, right, bottom = places.boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    assert ((places.kinds == "newline") == (anyres.visual_index(size) == NEWLINE)).all()

    base = places.boxes[places.kinds == "base"]
    check_tiling(base, (0, 0, width, height))
    assert len(base) == anyres.patches_per_tile

    is_grid, is_newline = places.kinds == "grid", places.kinds == "newline"
    grid = places.boxes[is_grid]
    if len(grid):
        rows, columns = anyres.grid(size)
        pixel = max(height / (rows * anyres.tile_size), width / (columns * anyres.tile_size))  # one of the grid
        covered = (*grid[:, :2].min(axis=0), *grid[:, 2:].max(axis=0))
        check_tiling(grid, covered)
        lost = np.abs(np.array(covered) - [0, 0, width, height])
        assert (lost <= pixel * (anyres.patch_size / 2 + 1)).all(), (
            "more of the picture is in no token than spatial_unpad cuts"
        )
    newlines = places.boxes[is_newline]
    assert (newlines[:, [0, 2]] == width).all()
    if len(grid):
        before = places.boxes[np.flatnonzero(is_newline) - 1]  # the last token of the row
        assert (newlines[:, [1, 3]] == before[:, [1, 3]]).all()
        assert len(newlines) == len(np.unique(grid[:, 1]))


def check_tiling(boxes, whole):
    """``boxes`` fill ``whole`` without overlap: a full product of columns and rows that follow on one another."""
    columns, rows = np.unique(boxes[:, [0, 2]], axis=0), np.unique(boxes[:, [1, 3]], axis=0)
    assert len(boxes) == len(columns) * len(rows) == len(np.unique(boxes, axis=0))
    for intervals, first, last in ((columns, whole[0], whole[2]), (rows, whole[1], whole[3])):
        assert (intervals[:, 1] > intervals[:, 0]).all(), "a token without area"
        assert (intervals[1:, 0] == intervals[:-1, 1]).all(), "a gap or an overlap"
        assert np.isclose(intervals[0, 0], first) and np.isclose(intervals[-1, 1], last)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_boxes_tile_any_image(height, width):
    check_places(ANYRES, (height, width))
    check_places(TINY, (height, width))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2000, 3), (3, 2000), (335, 337)])
def test_boxes_of_awkward_images(size):
    check_places(ANYRES, size)
    check_places(TINY, size)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 40), st.integers(1, 40))
def test_a_single_grid_tiles_the_image(height, width, rows, columns):
    places = grid_places(height, width, rows, columns)
    assert places.kinds.tolist() == ["grid"] * (rows * columns)
    check_tiling(places.boxes, (0, 0, width, height))
    assert (np.diff(centres(places.boxes)[:columns, 0]) > 0).all(), "tokens run along the rows"


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 x 3 tokens over 10 x 10 pixels"):
        grid_places(10, 10, 0, 3)


class Known(PruningMethod):
    """Keeps the tokens whose scores the test knows."""

    scores: tuple[float, ...]
    keep: float
    rank_with: str = "next_layer"
    positions: str = "renumber"
    name = "known"

    @property
    def needs(self):
        return Needs(rank_with=self.rank_with, positions=self.positions)

    def drops(self, num_layers):
        return (Drop(3, self.keep),)

    def score(self, candidates):
        assert len(candidates.boundary.visual_rows) == len(self.scores)
        return torch.tensor(self.scores)


def patch_image(size, patch):
    """Blue, and magenta in ``patch`` (left, top, right, bottom as shares)."""
    height, width = size
    left, top, right, bottom = (round(share * pixels) for share, pixels in zip(patch, [width, height] * 2, strict=True))
    pixels = np.full((height, width, 3), BLUE, dtype=np.uint8)
    pixels[top:bottom, left:right] = MAGENTA
    return Image.fromarray(pixels)


def redness(picture):
    """[V]: the share of the picture's part that each token sees which lies in the patch; -1 for newlines."""
    colours = seen(processor_336().image_processor, ANYRES, picture)
    return np.nan_to_num(colours[:, 0] / np.maximum(colours[:, 2], 1e-6), nan=-1)


def within(size, patch, margin):
    """[height, width] bool: pixels in ``patch`` grown by ``margin`` (x, y), in pixels."""
    width, height = size
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    in_x = (x > patch[0] * width - margin[0]) & (x < patch[2] * width + margin[0])
    in_y = (y > patch[1] * height - margin[1]) & (y < patch[3] * height + margin[1])
    return in_y[:, None] & in_x[None]


MIDDLE, CORNER, FAR_CORNER = (0.3, 0.35, 0.8, 0.7), (0, 0, 0.4, 0.5), (0.55, 0.45, 1, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [MIDDLE, CORNER, FAR_CORNER], ids=["middle", "corner", "far corner"])
def test_what_the_selector_keeps_is_what_is_bright(size, patch):
    """The tokens made of the patch's pixels survive: in both panels the patch stays as it is and all else fades."""
    picture = patch_image(size, patch)
    scores = redness(picture)
    wanted = np.flatnonzero(scores > 0.5)
    model = prune(model_336(), Known(tuple(scores.tolist()), (len(wanted) + 0.5) / len(scores)))
    (shown,) = look(
        model, processor_336().image_processor, encode(processor_336(), [picture], "what is shown here ?"), [picture]
    )
    assert shown.kept[1].tolist() == wanted.tolist()
    assert shown.kept[0].tolist() == list(range(len(scores)))

    width, height = panel_size(shown)
    original = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    scale = width / picture.width
    rows, columns = ANYRES.grid(size)
    feature = max(size[0] / rows, size[1] / columns) / 24 * scale
    half = {"base": (width / 24 / 2, height / 24 / 2), "grid": (feature / 2, feature / 2)}
    bright_pixels = 0
    for kind in ("base", "grid"):
        drawn = np.asarray(panel(shown, 1, kind, (width, height)))
        bright = (drawn == original).all(axis=-1)
        margin = np.array(half[kind]) + 1.5
        assert bright[within((width, height), patch, -margin) & ~uncovered(shown, kind, (width, height))].all(), kind
        assert not bright[~within((width, height), patch, margin)].any(), kind
        assert within((width, height), patch, -margin).sum() > 500, "the check looks at nothing"
        bright_pixels += (drawn == MAGENTA).all(axis=-1).sum()
        assert (np.asarray(panel(shown, 0, kind, (width, height))) == original).all(axis=-1).mean() > 0.95

    whole = np.asarray(draw([shown], STAGES))
    column = whole[:, whole.shape[1] // 2 :]
    assert (column == MAGENTA).all(axis=-1).sum() == bright_pixels
    assert (column == BLUE).all(axis=-1).sum() < (whole == BLUE).all(axis=-1).sum() / 8


def uncovered(shown, kind, size):
    """Pixels that no token of this kind sees."""
    every = np.asarray(panel(shown, 0, kind, size))
    none = np.asarray(panel(ImageStages(shown.image, shown.places, [np.arange(0)]), 0, kind, size))
    return (every == none).all(axis=-1)


def test_newlines_stand_apart():
    size = (300, 500)
    picture = patch_image(size, MIDDLE)
    places = ANYRES.places([size], None)[0]
    newlines = np.flatnonzero(places.kinds == "newline")
    shown = ImageStages(picture, places, [np.arange(len(places.kinds)), newlines[:5]])
    assert places.counts(shown.kept[1]) == {"base": 0, "grid": 0, "newline": 5}
    for kind in ("base", "grid"):
        assert not (np.asarray(panel(shown, 1, kind, (200, 120))) == MAGENTA).all(axis=-1).any()
    whole = draw([shown], STAGES)

    def marks(half, colour):
        """Rectangles of ``colour`` and of the strip's width in this half, counted down."""
        pixels = np.split(np.asarray(whole), [whole.width // 2], axis=1)[half]
        is_colour = (pixels == ImageColor.getrgb(colour)).all(axis=-1)
        is_mark = np.lib.stride_tricks.sliding_window_view(is_colour, STRIP, axis=1).all(axis=-1)
        return int((is_mark[1:] & ~is_mark[:-1]).sum(axis=0).max())

    assert marks(0, NEWLINE_KEPT) == len(newlines)
    assert marks(1, NEWLINE_KEPT) == 5
    assert marks(1, NEWLINE_DROPPED) == len(newlines) - 5


def test_a_single_grid_needs_no_newlines_or_base():
    picture = patch_image((40, 60), MIDDLE)
    places = grid_places(40, 60, 4, 6)
    shown = ImageStages(picture, places, [np.arange(24), np.array([0, 5])])
    assert shown.panels() == ["grid"]
    assert places.counts(shown.kept[1]) == {"grid": 2}
    drawn = np.asarray(panel(shown, 1, "grid", (60, 40)))
    bright = (drawn == np.asarray(picture)).all(axis=-1)
    assert bright[:10, :10].all() and bright[:10, 50:].all() and bright.sum() == 200
    assert draw([shown], STAGES).height < 500


def test_several_images_each_with_its_own_tokens():
    pictures = [patch_image((40, 70), MIDDLE), patch_image((90, 30), CORNER), patch_image((50, 50), MIDDLE)]
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    processor = tiny_processor()
    images = look(model, processor.image_processor, encode(processor, pictures, "what is this ?"), pictures)
    assert [shown.image for shown in images] == pictures
    for shown, picture in zip(images, pictures, strict=True):
        total = TINY.tokens([(picture.height, picture.width)])[0]
        assert [len(tokens) for tokens in shown.kept] == [total, total // 2, total // 4]
        assert set(shown.kept[2].tolist()) < set(shown.kept[1].tolist())
    assert stage_names(model) == ["stage 1, layers 0-1", "stage 2, layers 2-3", "stage 3, layers 4-5"]
    assert stage_names(prune(tiny_model(), PyramidDrop(layers=(5,), keep=(0.5,))))[1] == "stage 2, layer 5"
    drawn = show(model, processor, pictures, "what is this ?")
    one = show(model, processor, pictures[0], "what is this ?")
    assert drawn.height > one.height and one == show(model, processor, pictures[:1], "what is this ?")
    assert drawn.tobytes() == draw(images, stage_names(model), "what is this ?").tobytes()
    with pytest.raises(ValueError, match="show draws what a pruned model keeps; call prune"):
        show(unprune(model), processor, pictures[0])


def test_the_page_s_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "show.md").read_text(), re.DOTALL)
    names = {"processor": tiny_processor(), "image": patch_image((40, 70), MIDDLE), "prompt": "<image> what is here ?"}
    exec(code, {**names, "model": (model := tiny_model())})
    assert Image.open("kept.png").width > 100 and "pruned by fastv" in str(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_tokens_of_a_batch_equal_those_one_by_one(side):
    pictures = [patch_image((40, 70), MIDDLE), patch_image((90, 30), CORNER), patch_image((50, 50), MIDDLE)]
    texts = ["<s> <image> what is here ?", "<s> is a dog", "<image> and <image> two dog assistant :"]
    processor = tiny_processor()
    processor.tokenizer.padding_side = side
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))).eval()
    together = kept_tokens(model, processor(images=pictures, text=texts, return_tensors="pt", padding=True))
    assert [len(row) for row in together] == [1, 0, 2]
    for text, row, own in zip(texts, together, [pictures[:1], [], pictures[1:]], strict=True):
        (alone,) = kept_tokens(model, processor(images=own or None, text=text, return_tensors="pt"))
        for one, other in zip(row, alone, strict=True):
            assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in other]


def test_a_model_that_drops_nothing_has_one_stage():
    model = prune(tiny_model(), None)
    assert stage_layers(model) == [range(6)]
    picture = patch_image((40, 70), MIDDLE)
    (shown,) = look(
        model.train(), tiny_processor().image_processor, encode(tiny_processor(), [picture], "what ?"), [picture]
    )
    assert len(shown.kept) == 1
    assert model.training


def test_the_prompt_goes_through_the_chat_template():
    processor = tiny_processor()
    picture = patch_image((40, 70), MIDDLE)
    plain = processor.tokenizer.decode(encode(processor, [picture, picture], "what is here ?")["input_ids"][0])
    assert plain.endswith("what is here ?") and plain.count("<image>") == 2 * TINY.tokens([(40, 70)])[0]
    processor.chat_template = (
        "<s> user : {% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    written = processor.tokenizer.decode(encode(processor, [picture], "what is here ?")["input_ids"][0])
    assert written.startswith("<s> user :") and written.endswith("what is here ? assistant :")
    assert written.count("<s>") == 1


def test_what_cannot_be_drawn_is_said():
    picture = patch_image((40, 60), MIDDLE)
    places = grid_places(40, 60, 2, 2)
    with pytest.raises(ValueError, match=r"image is \(60, 40\), but its tokens were placed on \(60, 50\)"):
        ImageStages(picture, grid_places(50, 60, 2, 2), [np.arange(4)])
    with pytest.raises(ValueError, match="not among the 4 tokens"):
        ImageStages(picture, places, [np.arange(5)])
    with pytest.raises(ValueError, match="tokens of 1 stages, but 2 stages are named"):
        draw([ImageStages(picture, places, [np.arange(4)])], STAGES)
    with pytest.raises(ValueError, match="no image"):
        draw([], STAGES)
    with pytest.raises(ValueError, match="no image"):
        encode(tiny_processor(), [], "what ?")


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model with its processor, one with pruning settings, and pictures."""
    folder = tmp_path_factory.mktemp("show")
    tiny_model().save_pretrained(folder / "plain")
    prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))).save_pretrained(folder / "pruned")
    for name in ("plain", "pruned"):
        tiny_processor().save_pretrained(folder / name)
    LlamaConfig().save_pretrained(folder / "text")
    tiny_image_processor().save_pretrained(folder / "text")
    patch_image((40, 70), MIDDLE).save(folder / "a.png")
    patch_image((90, 31), CORNER).save(folder / "b.jpg")
    (folder / "c.png").write_text("no image")
    return folder


def command(folder, model="pruned", image=("a.png",), out="out.png", more=()):
    images = [str(folder / name) for name in image]
    flags = ["--image", *images, "--prompt", "what is shown here ?", "--out", str(folder / out), *more]
    return main(["show", "--model", str(folder / model), *flags])


def test_the_command_takes_the_saved_settings(folder):
    assert command(folder, image=("a.png", "b.jpg"), more=["--html", str(folder / "out.html")]) == 0
    with Image.open(folder / "out.png") as drawn:
        three_columns = drawn.size
    assert "stage 3, layers 4-5" in (folder / "out.html").read_text()
    assert command(folder, more=["--layers", "3", "--keep", "0.5"]) == 0
    with Image.open(folder / "out.png") as drawn:
        assert drawn.width < three_columns[0] and drawn.height < three_columns[1]


def test_the_command_takes_flags(folder):
    assert command(folder, model="plain", more=["--method", "pyramiddrop", "--layers", "1", "--keep", "0.3"]) == 0
    assert command(folder, model="pruned", more=["--method", "none"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": ("missing.png",)}, ["missing.png cannot be read"]),
        ({"image": ("c.png",)}, ["c.png cannot be read"]),
        ({"model": "missing"}, ["missing: no such folder here"]),
        ({"model": "text"}, ["text: it holds a llama", "llava_next"]),
        ({"model": "plain"}, ["plain: it has no saved pruning settings", "--method pyramiddrop"]),
        ({"model": "plain", "more": ["--keep", "0.5"]}, ["no saved pruning settings"]),
        ({"more": ["--layers", "9", "--keep", "0.5"]}, ["layer 9 does not exist in a decoder of 6"]),
        ({"out": "out.docx"}, ["out.docx", "'.docx'", "use .png"]),
        ({"out": "no/out.png"}, ["folder", "does not exist"]),
    ],
)
def test_wrong_input_exits_2_with_what_is_wrong(folder, capfd, arguments, words):
    assert command(folder, **arguments) == 2
    title, line = capfd.readouterr().err.strip().splitlines()
    assert title == "vtprune show:"
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "name", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl"]
)
def test_the_command_shows_every_family(tmp_path, name):
    save_checkpoint(name, tmp_path / "model")
    patch_image((80, 140), MIDDLE).save(tmp_path / "a.png")
    how = ["--method", "pyramiddrop", "--layers", "3", "--keep", "0.5", "--html", str(tmp_path / "out.html")]
    if name.startswith("qwen"):  # whose positions are made to stay with their tokens
        how += ["--set", "positions=keep"]
    assert command(tmp_path, model="model", more=how) == 0
    with Image.open(tmp_path / "out.png") as drawn:
        assert (np.asarray(drawn) == MAGENTA).all(axis=-1).sum() > 1000
    page = re.search(r'id="data">(.*?)</script>', (tmp_path / "out.html").read_text(), re.DOTALL)
    [image] = json.loads(page[1])["images"]
    first, second = image["kept"]
    assert len(first) == len(image["boxes"]) == len(image["kinds"]) > 5 and len(second) == len(first) // 2


def test_another_image_processor_than_the_models_is_said(tmp_path):
    """Its places would be wrong: as many tokens were asked for as images of one tile have."""
    model, picture = prune(tiny_model(), None), patch_image((40, 70), MIDDLE)
    inputs = encode(tiny_processor(), [picture], "what ?")
    with pytest.raises(ValueError, match=r"the prompt has \d+ visual tokens, but images of \[\(70, 40\)\] .* have"):
        look(model, tiny_image_processor(), inputs, [picture.transpose(Image.Transpose.ROTATE_90)])


def test_training_puts_images_into_tensorboard(tmp_path):
    """Under ZeRO-3 too, where every rank has to run the model for what one of them draws."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = Runs(tmp_path)
    often = ("train.eval_every=1", "train.max_steps=2")
    runs.run("shown", "train.eval_show=3", *often, "deepspeed=configs/deepspeed/zero3.json", ranks=2)
    events = EventAccumulator(str(runs.directory("shown") / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["kept_tokens/0", "kept_tokens/1"], "one picture, then a sample of three"
    single, triple = events.Images("kept_tokens/0"), events.Images("kept_tokens/1")
    assert [image.step for image in single] == [image.step for image in triple] == [1, 2]
    assert triple[0].height > 1.5 * single[0].height > 0


# The page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def browse(tmp_path, address, *flags):
    """What headless Chromium prints."""
    own = [f"--user-data-dir={tmp_path / 'profile'}", "--headless=new", "--no-sandbox", "--disable-gpu"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"]
    call = [CHROMIUM, *own, *quiet, *flags, address]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout


@functools.cache
def example():
    """Two pictures, three stages; the patch survives all of them."""
    images = []
    for size, patch in (((300, 500), MIDDLE), ((641, 333), CORNER)):
        picture = patch_image(size, patch)
        best = np.argsort(-redness(picture), kind="stable")
        counts = (len(best), len(best) // 2, len(best) // 10)
        images.append(ImageStages(picture, ANYRES.places([size], None)[0], [np.sort(best[:n]) for n in counts]))
    return images, ["stage 1, layers 0-1", "stage 2, layers 2-3", "stage 3, layers 4-5"]


def write_page(tmp_path, script=""):
    images, stages = example()
    text = page(images, stages, "</script><b>what</b> is %DATA% ?")
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return file.as_uri()


def state(dom):
    """Heading, totals and captions of a dumped page."""
    body = dom.partition("<main>")[2].partition("</main>")[0]
    heading = re.search(r'<label[^>]*id="heading"[^>]*>([^<]*)<', dom)[1]
    texts = [re.sub("<[^>]*>", "", text) for text in re.findall(r"<h2>.*?</h2>|<figcaption.*?</figcaption>", body)]
    return heading, texts, re.findall(r'<path class="dropped"[^>]* d="([^"]*)"', body)


def test_the_page_is_one_file_and_text_stays_text():
    images, stages = example()
    text = page(images, stages, "</script><b>what</b> is %DATA% ?")
    assert "&lt;/script&gt;&lt;b&gt;what&lt;/b&gt; is %DATA% ?" in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/jpeg;base64,") == len(images)


@needs_chromium
def test_the_stage_behind_the_address_is_what_the_page_shows(tmp_path):
    images, stages = example()
    address = write_page(tmp_path)
    for stage in (1, 2, 3):
        heading, texts, paths = state(browse(tmp_path, f"{address}#stage={stage}", "--dump-dom"))
        assert heading == stages[stage - 1]
        expected = []
        for number, shown in enumerate(images, start=1):
            total, kept = (shown.places.counts(shown.kept[i]) for i in (0, stage - 1))
            line = {kind: f"{kind} {kept[kind]} of {total[kind]}" for kind in total}
            expected += [f"image {number}: {shown.totals(stage - 1)}", line["base"]]
            expected += [f"{line['grid']}, {line['newline']}"]
        assert texts == expected
        holes = [path.count("M") - 1 for path in paths]
        assert holes == [s.places.counts(s.kept[stage - 1])[kind] for s in images for kind in ("base", "grid")]


@needs_chromium
@pytest.mark.parametrize(
    "script",
    [
        "slider.value = 3; slider.dispatchEvent(new Event('input'));",
        "const right = {key: 'ArrowRight', bubbles: true};"
        "for (let i = 0; i < 5; i++) document.body.dispatchEvent(new KeyboardEvent('keydown', right));",
    ],
    ids=["slider", "arrow keys"],
)
def test_moving_the_slider_moves_the_stage(tmp_path, script):
    still = state(browse(tmp_path, f"{write_page(tmp_path)}#stage=3", "--dump-dom"))
    assert state(browse(tmp_path, write_page(tmp_path, script), "--dump-dom")) == still
    assert state(browse(tmp_path, write_page(tmp_path), "--dump-dom")) != still


@needs_chromium
@pytest.mark.parametrize("window", [(1300, 1600), (390, 1800)], ids=["desk", "phone"])
def test_what_is_seen_fades_with_the_stage(tmp_path, window):
    """Screenshots: the patch stays bright, the rest of the picture does not."""
    address = write_page(tmp_path)
    shares = []
    for stage in (1, 3):
        size = f"--window-size={window[0]},{window[1]}"
        browse(tmp_path, f"{address}#stage={stage}", size, f"--screenshot={tmp_path / 'seen.png'}")
        with Image.open(tmp_path / "seen.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        is_near = [(np.abs(pixels - colour).max(axis=-1) < 40).sum() for colour in (BLUE, MAGENTA)]
        shares.append(np.array(is_near) / pixels[..., 0].size)
    (blue, magenta), (blue_left, magenta_left) = shares
    assert blue > 0.2 and magenta > 0.05
    assert blue_left < 0.01 * blue
    assert 0.3 * magenta < magenta_left


def requests_of_page(tmp_path, address):
    """What the page asks the network for. Chromium's own errands, which it runs besides, name no page as initiator."""
    log = tmp_path / "net.json"
    browse(tmp_path, address, f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom")
    found = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    found = [p for p in found if p.get("initiator", "not an origin") != "not an origin"]
    return {p["url"] for p in found if p.get("url", "").startswith(("http", "ws", "ftp"))}


@needs_chromium
def test_no_request_leaves_the_page(tmp_path):
    """Nor would one if it were asked for; the same page without its policy shows that a request would be noticed."""
    moves = "for (const stage of [2, 3, 1]) { slider.value = stage; slider.dispatchEvent(new Event('input')); }"
    leak = "new Image().src = 'http://elsewhere.test/leak.png';"
    address = write_page(tmp_path, moves + leak)
    assert requests_of_page(tmp_path, address) == set()
    file = tmp_path / "page.html"
    file.write_text(file.read_text().replace("Content-Security-Policy", "none"))
    assert requests_of_page(tmp_path, address) == {"http://elsewhere.test/leak.png"}


def test_a_runs_own_template_writes_the_prompt(tmp_path, monkeypatch):
    """The same tokens as ``vtprune generate`` asks with, so that the same token ranks."""
    from vtprune_train.evaluation import answering
    from vtprune_train.viz import show as module

    run = save_run(tmp_path / "run")
    path = tmp_path / "picture.png"
    patch_image((40, 70), MIDDLE).save(path)
    seen = []

    def spy(model, inputs):
        seen.append(inputs["input_ids"])
        return kept_tokens(model, inputs)

    monkeypatch.setattr(module, "kept_tokens", spy)
    options = ["--image", str(path), "--prompt", "what is here ?", "--out", str(tmp_path / "out.png")]
    assert main(["show", "--model", str(run), *options]) == 0
    asked = answering.batch(answering.load(str(run)), [([Image.open(path).convert("RGB")], "what is here ?")])
    assert torch.equal(seen[0], asked["input_ids"])
