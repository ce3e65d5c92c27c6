"""The methods for videos on every family: packed equals one by one and the model's own padded inputs."""

import pytest
import torch

from tests.models.families.test_loop_families import assert_same_gradients, gradients
from tests.support.video_runs import RECORDS, VIDEO_FAMILIES, VideoSetup, model_inputs
from vtprune_train import EVS, DyCoke, PruneVid, VidCom2, VideoLLMMoD, prune

ALL = range(len(RECORDS))
FAMILIES = [name for name in VIDEO_FAMILIES if name != "internvl"]  # its frames are images, which stay whole
METHODS = [
    EVS(keep=0.4),
    VidCom2(keep=0.4),
    DyCoke(keep=0.3),
    PruneVid(tau=0.2),
    PruneVid(keep=0.4, positions="keep"),
    VideoLLMMoD(keep=0.5, per="frame"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, tmp_path_factory):
    return VideoSetup(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_packed_equals_one_by_one_and_padded(setup, method):
    """Losses, and the gradients of every part; images and text alone are in the batch."""
    torch.manual_seed(1)  # of parameters that the method adds
    parts = setup.parts()
    collate, dense = setup.collator(parts, method), setup.collator(parts, None)
    model = prune(parts.model, method).train()
    batch = collate(ALL)
    packed = model(batch)
    packed.loss_sum.backward()
    shorter = [stage.num_tokens for stage in packed.plan.stages]
    assert min(shorter) < max(shorter), "nothing is dropped: the case is not met"
    together = gradients(model)
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for sample in ALL:
        alone = model(collate([sample])).loss_sum
        alone.backward()
        total += alone.detach()
        inputs, labels = model_inputs(dense, sample, model.config)
        with torch.no_grad():
            padded = model(**inputs, labels=labels).loss * (labels >= 0).sum()
        assert abs(padded - alone) < 1e-4 * alone, sample
    assert abs(packed.loss_sum - total) < 1e-4 * total
    assert_same_gradients(together, gradients(model))
