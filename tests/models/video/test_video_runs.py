"""Real training on videos: two ranks like one, and a stopped run like an uninterrupted one."""

import json

import pytest

from tests.support.family_runs import FamilyRuns
from tests.support.runner import assert_equal_checkpoints
from tests.support.video_runs import video_settings, write_video_records

pytestmark = pytest.mark.slow


class VideoRuns(FamilyRuns):
    """One sample for each rank and step, so that ranks have a video, an image, or text alone; activations are
    recomputed in the backward pass."""

    def __init__(self, folder, name):
        super().__init__(folder, name)
        (folder / "model" / "video_preprocessor_config.json").write_text(json.dumps(video_settings(name)))
        write_video_records(folder / "clips")

    def train(self, name, *overrides, **launch):
        sources = "[{path: train.json, images: images, videos: videos}]"
        own = (
            f"data.root={self.folder / 'clips'}",
            f"data.train={sources}",
            f"data.eval={sources}",
            "train.global_batch_size=2",
            "data.workers=1",
        )
        return super().train(name, *own, *overrides, **launch)


ZERO3 = "deepspeed=configs/deepspeed/zero3.json"


def losses(runs, name):
    return [m["loss"] for m in runs.metrics(name)]


@pytest.mark.parametrize(("name", "per"), [("qwen3_vl", "video"), ("llava_onevision", "frame")])
def test_two_ranks_with_zero_3(tmp_path, name, per):
    runs = VideoRuns(tmp_path, name)
    runs.train("single", f"pruning.per={per}")
    runs.train("whole", f"pruning.per={per}", ZERO3, ranks=2)
    assert losses(runs, "whole") == pytest.approx(losses(runs, "single"), abs=1e-5)
    assert losses(runs, "whole")[-1] < losses(runs, "whole")[0]
    assert json.loads((runs.directory("whole") / "eval.jsonl").read_text())["answers"] == 7
    if name == "qwen3_vl":  # its rows are ordered on the device
        runs.train("stopped", ZERO3, "run.stop_after=2", ranks=2)
        runs.train("stopped", ZERO3, ranks=2)
        assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint("whole"))
