"""The text task of the quickstart: the words are in the images, and they must be read."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vtprune_train.data.synthetic import COLOURS
from vtprune_train.data.synthetic_text import (
    CANVASES,
    NUMBERS,
    QUESTIONS,
    SIGN,
    WHITE,
    WORDS,
    Page,
    Sign,
    draw_page,
    random_page,
    write_dataset,
)


def read(image, words):
    """``(word, ground)`` of the sign in an image that shows one of ``words``, from the pixels alone: the place and
    ground at which a newly drawn sign differs least."""
    pixels, best = np.asarray(image).astype(int), None
    for ground in [*COLOURS.values(), WHITE]:
        for word in words:
            page = Page(*SIGN, 0, (), (Sign(word, ground, 0, 0),), {})
            sign = np.asarray(draw_page(page)).astype(int)
            for top in range(0, image.height, SIGN[1]):
                for left in range(0, image.width, SIGN[0]):
                    crop = pixels[top : top + SIGN[1], left : left + SIGN[0]]
                    # A sign below may cover the descenders, so the last rows do not count.
                    distance = np.abs(crop - sign)[:-3].mean()
                    best = min(best or (np.inf,), (distance, word, ground))
    assert best[0] < 3, "a sign is drawn exactly"
    return best[1:]


def asked(record):
    """``{question: answer}`` of a record."""
    turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return dict(zip(turns[::2], turns[1::2], strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_dataset(folder, num_train=16, num_eval=12, seed=1)
    return folder


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_answers_are_in_the_pixels(data, split):
    colours = {ground: name for name, ground in COLOURS.items()}
    for record in json.loads((data / f"{split}.json").read_text()):
        image, answers = Image.open(data / "images" / record["image"]), asked(record)
        word, ground = read(image, WORDS)
        number, white = read(image, NUMBERS)
        assert answers[QUESTIONS["word"]] == word and answers[QUESTIONS["number"]] == number and white == WHITE
        assert answers.get(QUESTIONS["colour"], colours[ground]) == colours[ground]
        assert (QUESTIONS["colour"] in answers) == (split == "train")
        assert record["conversations"][0]["value"].startswith("<image>\n") and image.size in CANVASES


def test_the_seed_determines_the_data(data, tmp_path):
    write_dataset(tmp_path / "same", num_train=16, num_eval=12, seed=1)
    write_dataset(tmp_path / "other", num_train=16, num_eval=12, seed=2)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert len(files) == 16 + 12 + 3
    assert all((tmp_path / "same" / file).read_bytes() == (data / file).read_bytes() for file in files)
    assert (tmp_path / "other" / "train.json").read_bytes() != (data / "train.json").read_bytes()
    assert len({path.read_bytes() for path in (data / "images").iterdir()}) == 28, "the splits differ"


def test_a_written_data_set_is_kept(data):
    before = (data / "train.json").stat().st_mtime_ns
    write_dataset(data, num_train=16, num_eval=12, seed=1)
    assert (data / "train.json").stat().st_mtime_ns == before


def test_no_answer_can_be_guessed():
    """All answers to a question are equally likely, also given the answer to another one, the place and the size."""
    rng = random.Random(3)
    pages = [random_page(rng) for _ in range(6000)]
    for topic, choices in (("word", WORDS), ("colour", COLOURS), ("number", NUMBERS)):
        counts = Counter(page.truth[topic] for page in pages)
        assert set(counts) == set(choices) and max(counts.values()) / 6000 < 1 / len(choices) + 0.02
    for known in (
        lambda page: page.truth["colour"],
        lambda page: page.truth["number"],
        lambda page: (page.width, page.signs[0].left, page.signs[0].top),
    ):
        best = Counter()
        for key in {known(page) for page in pages}:
            best += Counter(dict(Counter(p.truth["word"] for p in pages if known(p) == key).most_common(1)))
        assert sum(best.values()) / 6000 < 1 / len(WORDS) + 0.06  # 32 places


def test_signs_are_small_and_apart():
    rng = random.Random(4)
    for _ in range(500):
        page = random_page(rng)
        first, second = page.signs
        assert (first.left, first.top) != (second.left, second.top)
        for sign in page.signs:
            assert sign.left % SIGN[0] == sign.top % SIGN[1] == 0
            assert sign.left + SIGN[0] <= page.width and sign.top + SIGN[1] <= page.height
        assert SIGN[0] * SIGN[1] * 2 / (page.width * page.height) == 0.125
