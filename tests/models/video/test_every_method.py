"""Methods on videos: equal to a slow loop, alone and in batches, and without reads of the device."""

from itertools import pairwise

import pytest
import torch
import yaml

from tests.models.families.test_loop_families import assert_same_gradients, gradients, position_of_each_frequency
from tests.models.test_waits import ALL_PARTS, check_training
from tests.support.families import family_model, tokenizer
from tests.support.helpers import Reads
from tests.support.reference import pyramiddrop
from tests.support.video_runs import RECORDS, VIDEO_FAMILIES, VideoSetup, model_inputs
from vtprune_train import EVS, PyramidDrop, prune
from vtprune_train.cli.commands import main
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning import METHODS, method_class, method_from_settings
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.random_tokens import Random

ALL = range(len(RECORDS))
VISUAL_WORDS = ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<IMG_CONTEXT>")
PER = ("video", "frame")
VISUAL = [tokenizer().convert_tokens_to_ids(word) for word in VISUAL_WORDS]


def drop(per="video", **settings):
    return PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep", per=per, **settings)


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    made = {}

    def setup(name):
        if name not in made:
            made[name] = VideoSetup(name, tmp_path_factory.mktemp(name))
        return made[name]

    return setup


# ------------------------------------------------------------------------------------------------------ a slow loop


def seen_by_the_decoder(model, inputs):
    """What transformers passes to the decoder: embeddings, positions and the features added after the first layers."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor(VISUAL))
    features = seen.get("deepstack_visual_embeds") or ()
    spread = [torch.zeros_like(seen["inputs_embeds"]).masked_scatter(visual[..., None], f) for f in features]
    return seen["inputs_embeds"][0], seen.get("position_ids"), [features[0] for features in spread]


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_dropping_equals_a_slow_loop_over_transformers_inputs(setups, name, per):
    """Loss and gradients of all parts, in float64: rounding must not decide which token stays. The spans are written
    from the tokens, not from the plan."""
    setup = setups(name)
    parts, method = setup.parts(), drop(per)
    dense, collate = setup.collator(parts, None), setup.collator(parts, method)
    model = parts.model.double()
    text_model, total = model.model.language_model, 0.0
    rope = text_model.config.rope_parameters
    for sample in ALL:
        inputs, labels = model_inputs(dense, sample, model.config)
        embeds, positions, deepstack = seen_by_the_decoder(model, inputs)
        has_parts = "mrope_section" in rope and positions is not None  # transformers makes none for text alone
        start = position_of_each_frequency(rope, positions[-3:, 0]) if has_parts else None
        loaded = dense.load(sample, sample)
        spans = spans_of(dense.layout, loaded, inputs["input_ids"][0].tolist(), per)
        supervised = (labels[0] >= 0).nonzero()[:, 0].tolist()
        queries = [offset - 1 for offset in supervised if offset - 1 not in supervised]
        hidden, alive = pyramiddrop(
            text_model, embeds, spans, queries, list(method.layers), list(method.keep), positions="keep", start=start,
            deepstack=deepstack,
        )  # fmt: skip
        rows = [alive.index(offset - 1) for offset in supervised]
        logits = model.lm_head(text_model.norm(hidden[rows]))
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, supervised], reduction="sum")
    total.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    output = prune(model, method)(collate(ALL))
    output.loss_sum.backward()
    assert abs(output.loss_sum - total) < 1e-4 * total
    ours = {name: grad for name, grad in gradients(model).items() if name in expected or grad.abs().max() > 0}
    assert_same_gradients(ours, expected)


def spans_of(layout, loaded, ids, per):
    """The offsets of each image, video, or step of a video, from the ids of image and video tokens."""
    visual = iter([offset for offset, token in enumerate(ids) if token in VISUAL])
    spans = []
    for of in layout.visual_tokens(loaded.images.sizes):
        offsets = [next(visual) for _ in range(of.total)]
        if not of.frames:
            edges = [sum(of.runs[:i]) for i in range(len(of.runs) + 1)]  # InternVL's frames are images
        elif per == "frame":
            each = of.total // of.frames  # of the last step, a newline is one more
            edges = [*range(0, each * of.frames, each), of.total]
        else:
            edges = [0, of.total]
        spans += [offsets[a:b] for a, b in pairwise(edges)]
    assert not list(visual)
    return spans


# ----------------------------------------------------------------------------------------------------- the device


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_the_packed_loop_reads_nothing_from_the_device(setups, name, per):
    """Forward, recomputation and backward on meta tensors, which hold no data: a read of one is an error."""
    setup, method = setups(name), drop(per)
    parts = setup.parts()
    batch = setup.collator(parts, method)(ALL)
    parts.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model = prune(parts.model, method).to("meta")
    with Reads() as reads:
        model(batch.to("meta")).loss_sum.backward()
    assert reads.seen == []
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_training_does_not_wait(setups, name):
    setup = setups(name)

    def model():
        made = setup.parts().model
        set_trainable(made, ALL_PARTS)
        return prune(made, drop()).train()

    check_training(model, setup.collator(setup.parts(), drop())(ALL))


# ---------------------------------------------------------------------------------------------------- every method

TOWER = {name for name in METHODS if method_class(name)().needs.from_tower}
WITH_TEXT_BETWEEN = [name for name in METHODS if name not in TOWER]
COMBINED = Combined((Random(keep=0.5), drop()))


def method_of(name):
    return COMBINED if name == "combined" else method_class(name)()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("name", [*WITH_TEXT_BETWEEN, "combined"])
def test_every_method_packed_alone_and_padded(setups, family, name):
    setup, method = setups(family), method_of(name)
    parts = setup.parts()
    collate, dense = setup.collator(parts, method), setup.collator(parts, None)
    torch.manual_seed(3)  # of parameters that the method adds
    model = prune(parts.model.double(), method).eval()
    with torch.no_grad():
        together = model(collate(ALL)).loss_sum
        alone = [model(collate([sample])).loss_sum for sample in ALL]
        padded = []
        for sample in ALL:
            inputs, labels = model_inputs(dense, sample, model.config)
            padded.append(model(**inputs, labels=labels).loss * (labels >= 0).sum())
    assert abs(together - sum(alone)) < 1e-6 * together
    assert torch.allclose(torch.stack(alone), torch.stack(padded).to(alone[0].dtype), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(TOWER))
def test_methods_that_read_the_towers_attention_are_refused(setups, name):
    model = setups("qwen3_vl").parts().model
    with pytest.raises(ValueError, match=f"{name}:? .*the vision tower"):
        prune(model, method_class(name)())


# ------------------------------------------------------------------------------------------------ `per: frame`


@pytest.mark.parametrize("name", [name for name in VIDEO_FAMILIES if name != "internvl"])
def test_each_step_keeps_its_share(setups, name):
    """``floor(keep * n)`` of each step in time; LLaVA-OneVision's newline belongs to the last one."""
    setup = setups(name)
    collate = setup.collator(setup.parts(), drop("frame"))
    spans = collate([0]).plan.boundaries[0].spans
    [video] = collate.layout.visual_tokens(collate.load(0, 0).images.sizes)
    sizes = [rows * columns for rows, columns in video.grids[: video.frames]]
    sizes[-1] += video.total - sum(sizes)
    assert len(spans) == video.frames > 1
    assert [(span.before, span.after) for span in spans] == [(n, n // 2) for n in sizes]
    assert sizes[-1] - sizes[0] == (name == "llava_onevision")
    assert [span.after for span in collate([0]).plan.boundaries[1].spans] == [n // 4 for n in sizes]


def test_per_is_saved_and_read_back(setups, tmp_path):
    model = prune(setups("qwen3_vl").parts().model, drop("frame"))
    model.save_pretrained(tmp_path)
    again = prune(type(model).from_pretrained(tmp_path))
    assert again.config.pruning["per"] == "frame"
    assert method_from_settings(again.config.pruning) == drop("frame")
    assert "per" not in drop().settings()


def test_per_in_yaml_and_on_the_command_line(tmp_path, capsys):
    section = PruningConfig(**yaml.safe_load("{method: fastv, per: frame}"))
    assert section.build().per == "frame" and section.settings["per"] == "frame"
    with pytest.raises(ValueError, match="per"):
        PruningConfig(method="fastv", per="image")
    assert main(["methods", "pyramiddrop"]) == 0
    shown = capsys.readouterr().out
    assert "per                  video" in shown and "per: what the keep ratios refer to in a video" in shown


def test_a_combination_divides_videos_as_its_methods_do():
    video = SegmentLayout(30, (ImageSpan(2, 20, ((2, 5),) * 2, 2),), (25,), (26,))
    combined = Combined((Random(keep=0.5, per="frame"), drop("frame")))
    assert combined.per == "frame"
    assert [span.before for span in combined.plan([video], 6).boundaries[0].spans] == [10, 10]
    assert method_from_settings(combined.settings()) == combined
    assert combined.eased(1.0, 0.0).per == "frame"
    with pytest.raises(ValueError, match="random has per=video and pyramiddrop has per=frame"):
        Combined((Random(keep=0.5), drop("frame")))
    with pytest.raises(ValueError, match="per=frame is set for a combination"):
        Combined((Random(keep=0.5), drop()), per="frame")


# ------------------------------------------------------------------------------------------- without video tokens


@pytest.mark.parametrize(
    "family,method,warns",
    [
        ("internvl", EVS(), True),
        ("llava_next", Combined((EVS(), drop())), True),
        ("internvl", drop(), False),
        ("qwen3_vl", EVS(), False),
    ],
)
def test_methods_for_videos_warn_in_families_without_video_tokens(caplog, family, method, warns):
    prune(family_model(family), method)
    assert ("evs drops only tokens of videos" in caplog.text) == warns
    assert "pyramiddrop drops only" not in caplog.text


def test_estimate_warns_too(caplog):
    assert main(["estimate", "--model", "OpenGVLab/InternVL3_5-8B-HF", "--method", "evs"]) == 0
    assert "evs drops only tokens of videos, but InternVL has no video tokens" in caplog.text
