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
    QUESTIONS,
    SIGN,
    WORDS,
    Page,
    draw_page,
    random_page,
    write_dataset,
)


def read(image):
    """``(word, color)`` of the sign in an image, from the pixels alone: the word, color and place at which a newly
    drawn sign differs least."""
    pixels, best = np.asarray(image).astype(int), (np.inf,)
    for colour in COLOURS:
        for word in WORDS:
            sign = np.asarray(draw_page(Page(*SIGN, 0, (), word, colour, 0, 0))).astype(int)
            for top in range(0, image.height, SIGN[1]):
                for left in range(0, image.width, SIGN[0]):
                    crop = pixels[top : top + SIGN[1], left : left + SIGN[0]]
                    best = min(best, (np.abs(crop - sign).mean(), word, colour))
    assert best[0] == 0, "a sign is drawn exactly, and no line crosses it"
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
    for record in json.loads((data / f"{split}.json").read_text()):
        image, answers = Image.open(data / "images" / record["image"]), asked(record)
        word, colour = read(image)
        expected = {QUESTIONS["word"]: word, QUESTIONS["colour"]: colour}
        assert answers == (expected if split == "train" else {QUESTIONS["word"]: word})
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
    """All answers to a question are equally likely, also given the answer to the other, the place and the size."""
    rng = random.Random(3)
    pages = [random_page(rng) for _ in range(6000)]
    for topic, choices in (("word", WORDS), ("colour", COLOURS)):
        counts = Counter(page.truth[topic] for page in pages)
        assert set(counts) == set(choices) and max(counts.values()) / 6000 < 1 / len(choices) + 0.02
    for known in (lambda page: page.colour, lambda page: (page.width, page.left, page.top)):
        words = {key: Counter() for key in {known(page) for page in pages}}
        for page in pages:
            words[known(page)][page.word] += 1
        best = sum(max(counts.values()) for counts in words.values())
        assert best / 6000 < 1 / len(WORDS) + 0.06  # of 32 places, some have a frequent word by chance


def test_a_sign_is_a_sixteenth_of_the_image():
    rng = random.Random(4)
    for _ in range(500):
        page = random_page(rng)
        assert page.left % SIGN[0] == page.top % SIGN[1] == 0
        assert page.left + SIGN[0] <= page.width and page.top + SIGN[1] <= page.height
        assert SIGN[0] * SIGN[1] * 16 == page.width * page.height
