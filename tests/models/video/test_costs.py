"""The cost of a step on videos as it is planned from the index, against that of the batch that is made."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.slow_video import Clip, layouts
from tests.support.video_runs import RECORDS, VIDEO_FAMILIES, VideoSetup
from vtprune_train import DyCoke, PyramidDrop, VidCom2
from vtprune_train.config.errors import ConfigError
from vtprune_train.core.flops import stage_lengths
from vtprune_train.data.plan.planner import StepCosts
from vtprune_train.pruning.phases import Phases
from vtprune_train.training.dry_run import describe
from vtprune_train.training.faults.preflight import describe as describe_batches
from vtprune_train.training.faults.preflight import worst_micro_batches
from vtprune_train.training.memory.predict import MicroBatch

TWO_VIDEOS = 1  # a record


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_the_planner_counts_what_the_collator_counts(name, tmp_path):
    """Approximate only for InternVL, whose frames are images: the plan rounds once for the video."""
    setup = VideoSetup(name, tmp_path)
    parts = setup.parts()
    for per in ("video", "frame"):
        method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep", per=per)
        collate = setup.collator(parts, method)
        planned_tokens, planned = StepCosts(collate.index, collate.cost, Phases(method))(0, np.arange(len(RECORDS)))
        batches = [collate([sample]) for sample in range(len(RECORDS))]
        counted = [batch.costs["flops"] - batch.costs["flops_selector"] for batch in batches]
        assert planned_tokens.tolist() == [len(batch.input_ids) for batch in batches]
        assert planned == pytest.approx(counted, rel=1e-9 if name != "internvl" else 0.05)


@pytest.mark.parametrize(
    "method", [VidCom2(keep=0.3, per="frame"), DyCoke(keep=0.3), PyramidDrop(per="frame")], ids=repr
)
def test_stage_lengths_of_videos(method):
    """As in the plan of the batch, also for newlines and images."""
    clips = [[Clip(5, 3, 3, newline=True)], [Clip(0, 3, 4), Clip(2, 2, 5)], []]
    segments = layouts(clips)
    spans = [(span.length, span.frames, index) for index, s in enumerate(segments) for span in s.spans]
    lengths, frames, owner = map(np.array, zip(*spans, strict=True))
    text = np.array([segment.num_text for segment in segments])
    plan = method.plan(segments, 16)
    expected = [stage.segment_lengths for stage in plan.stages]
    assert stage_lengths(text, lengths, owner, method.drops(16), frames, method.per).T.tolist() == list(
        map(list, expected)
    )


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_preflight_counts_the_frames_of_videos(name, tmp_path):
    """The index and the batch agree on the load of the tower."""
    setup = VideoSetup(name, tmp_path)
    collate = setup.collator(setup.parts(), None)
    lengths = collate.index.lengths(np.arange(len(RECORDS)))
    assert MicroBatch.of(collate(range(len(RECORDS)))).tiles == lengths.tiles.sum()
    data = setup.config.data.model_copy(update={"max_tokens": int(lengths.tokens.max())})
    config = setup.config.model_copy(update={"data": data})
    *_, chosen = worst_micro_batches(SimpleNamespace(collate=collate, config=config))
    assert (most := lengths.tiles[chosen].sum()) >= lengths.tiles.max() == lengths.tiles[TWO_VIDEOS]
    assert f", {most} tiles or patches" in describe_batches([collate(chosen)])


def test_the_dry_run_shows_a_video_and_the_memory_of_a_long_one(tmp_path):
    """30 s at 2 frames per second are 30 steps; 480 x 854 is resized to 28 x 70 pixels, 2 x 5 merged patches."""
    config = VideoSetup("qwen2_5_vl", tmp_path).config
    report = describe(config)
    assert "30 s video: 480 x 854, 60 of 900 frames, 30 steps in time, 300 visual tokens\n" in report
    row = next(line.split() for line in report.splitlines() if line.strip().startswith("30 s video "))
    # 150, 75 and 37 of 300 tokens; 121 text tokens, and the start and end of the video.
    assert row[3:12] == ["1200", "123", "423", "/", "273", "/", "198", "/", "160"]
    # An hour has 768 frames, of which a sample of max_length=600 holds only a part.
    short = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 600, "max_tokens": 1200})})
    assert "2 sample(s) of data.max_length=600 tokens (600 visual, 0 text), 4800 patches, each with a video of 60" in (
        describe(short)
    )
    source = config.data.train[0].model_copy(update={"videos": None})
    images = config.model_copy(update={"data": config.data.model_copy(update={"train": [source]})})
    with pytest.raises(ConfigError, match="video"):
        describe(images)
