"""The videos of the quickstart: the order of the frames decides the answer, a single frame does not."""

import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from vtprune_train.data.synthetic_videos import FRAMES, SIDE, TOPICS, draw_frames, draw_scene, write_dataset
from vtprune_train.data.videos import load_frames, video_header


def scenes_of(topic, count=2000):
    rng = random.Random(3)
    return [TOPICS[topic](rng) for _ in range(count)]


def watched(frames, question):
    """The answer, from what is drawn in the frames."""
    shown = [drawn for drawn in frames if drawn is not None]
    if "move" in question or "direction" in question:
        right, down = shown[-1].x - shown[0].x, shown[-1].y - shown[0].y
        assert (right == 0) != (down == 0)
        return ("right" if right > 0 else "left") if right else ("down" if down > 0 else "up")
    return shown[-1 if "in the end" in question else 0].color


@pytest.mark.parametrize("topic", TOPICS)
def test_the_same_frames_in_reverse_have_another_answer(topic):
    for scene in scenes_of(topic, 500):
        assert len(scene.frames) == FRAMES and scene.answer != scene.reversed_answer
        assert watched(scene.frames, scene.question) == scene.answer
        assert watched(scene.frames[::-1], scene.question) == scene.reversed_answer


@pytest.mark.parametrize("topic", TOPICS)
def test_reversed_videos_are_as_likely(topic):
    """So frames without their order do not tell which of the two answers is right."""
    forward, backward = Counter(), Counter()
    for scene in scenes_of(topic, 6000):
        places = [drawn and (drawn.x // 19, drawn.y // 19) for drawn in scene.frames]
        forward[places[0], places[2]] += 1
        backward[places[-1], places[-3]] += 1
    assert sum(abs(forward[key] - backward[key]) for key in forward | backward) / 2 / 6000 < 0.06


@pytest.mark.parametrize(
    ("topic", "chance", "of_one_frame"), [("motion", 1 / 4, 0.8), ("order", 1 / 2, 0.75), ("change", 1 / 6, 0.55)]
)
def test_neither_the_question_nor_one_frame_tells_the_answer(topic, chance, of_one_frame):
    """The best guess from the question, and from one frame with its number, learned on other videos."""
    scenes = scenes_of(topic, 6000)

    def accuracy(seen):
        answers = defaultdict(Counter)
        for scene in scenes[:3000]:
            answers[seen(scene)][named(scene, scene.answer)] += 1
        guesses = {key: counts.most_common(1)[0][0] for key, counts in answers.items()}
        return np.mean([guesses.get(seen(scene)) == named(scene, scene.answer) for scene in scenes[3000:]])

    def named(scene, color):
        """Which of the two colors in a question it is, if it names two."""
        return scene.question.index(color) > len("Which comes first, the ") if topic == "order" else color

    def frame(scene, number):
        drawn = scene.frames[number]
        if topic == "motion":
            return drawn.x // 6, drawn.y // 6
        return drawn and named(scene, drawn.color), "in the end" in scene.question

    assert accuracy(lambda scene: topic != "order" and scene.question) == pytest.approx(chance, abs=0.03)
    for number in range(FRAMES):
        assert accuracy(lambda scene, n=number: frame(scene, n)) < of_one_frame, number


def test_the_data_set_is_readable_and_its_splits_differ(tmp_path):
    write_dataset(tmp_path, num_train=12, num_eval=6, seed=1)
    written = sorted((tmp_path / "videos").iterdir())
    rng = random.Random(1)
    for path in sorted(written, key=lambda path: "eval" in path.name):
        frames = draw_frames(draw_scene(rng), rng.randint(100, 135))
        header = video_header(path)
        assert (header.frames, header.height, header.width) == (FRAMES, SIDE, SIDE)
        read = load_frames(path, range(FRAMES), header)
        assert np.abs(read.astype(int) - frames).mean() < 4
    assert len({path.read_bytes() for path in written}) == 18
    [record, *_] = json.loads((tmp_path / "eval.json").read_text())
    assert record["video"] == "eval-00000.mp4" and record["conversations"][0]["value"].startswith("<video>\n")
