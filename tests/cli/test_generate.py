"""``vtprune generate``, and the loading and prompting behind it, against plain ``generate``."""

import argparse
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.support.checkpoints import HALF, TEMPLATE, save_folder, save_images, save_run, talkative
from tests.support.families import family_processor
from tests.support.helpers import tiny_processor
from vtprune_train import PyramidDrop, is_pruned, prune
from vtprune_train.cli import main
from vtprune_train.cli.options import add_method_options, add_model_option, asked_method
from vtprune_train.data.chat import TEMPLATES, ChatEncoder, Template, Turn
from vtprune_train.evaluation.answering import Loaded, answers, batch, content_of, load, prompt_text

pytestmark = pytest.mark.slow

QUESTION = "what is shown on the left ?"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("pictures"))


def plain_answer(text, pictures, method=HALF, **settings):
    """By hand: processor, ``prune``, ``generate``."""
    model, processor = talkative(), tiny_processor()
    if method is not None:
        prune(model, method)
    images = [Image.open(path).convert("RGB") for path in pictures]
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=12, **{"do_sample": False, **settings})
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def said(capsys, *options):
    assert main(["generate", "--max_new_tokens", "12", *map(str, options)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_answer_is_that_of_generate(capsys, folder, pictures, number):
    images = pictures[:number]
    expected = plain_answer("<image>" * number + ("\n" if number else "") + QUESTION, images)
    options = ["--image", *images] if images else []
    assert said(capsys, "--model", folder, *options, "--prompt", QUESTION) == expected + "\n" != "\n"


def test_what_a_prompt_took_is_said(caplog, capsys, folder, pictures):
    """PLPHP, here with every layer in its middle class, drops nothing but keys."""
    common = ["--model", folder, "--image", pictures[0], "--prompt", QUESTION]
    fixed = ["--set", "keep=0.5", "--set", "alpha=2", "--set", "beta=0", "--set", "untouched=0"]
    took = {}
    for method, settings in (("pyramiddrop", []), ("plphp", fixed), ("uniform", [])):
        caplog.clear()
        with caplog.at_level("INFO"):
            said(capsys, *common, "--method", method, *settings)
        took[method] = [float(n) for n in re.findall(r"[0-9.]+(?= visual| enter| leave| stay)", caplog.text)]
    whole, enter, leave, stay = took["plphp"]
    assert enter == leave == whole and stay == whole // 2
    whole, enter, leave, stay = took["uniform"]
    assert enter == leave == stay == whole // 2
    whole, enter, leave, stay = took["pyramiddrop"]
    assert whole > enter == stay > leave


def test_methods_can_be_named_changed_and_left_out(capsys, folder, pictures):
    text, common = f"<image>\n{QUESTION}", ["--model", folder, "--image", pictures[3], "--prompt", QUESTION]
    asked = PyramidDrop(layers=(1, 3, 5), keep=(0.6, 0.3, 0.1), rank_with="this_layer", positions="keep")
    options = ["--layers", "1,3,5", "--keep", "0.6,0.3,0.1", "--rank_with", "this_layer", "--positions", "keep"]
    dense = said(capsys, *common, "--method", "none").strip()
    named = said(capsys, *common, "--method", "pyramiddrop", *options).strip()
    changed = said(capsys, *common, "--keep", "0.1,0.1").strip()
    assert dense == plain_answer(text, pictures[3:4], None)
    assert named == plain_answer(text, pictures[3:4], asked)
    assert changed == plain_answer(text, pictures[3:4], PyramidDrop(layers=(2, 4), keep=(0.1, 0.1)))
    assert len({dense, named, changed}) > 1, "dropping changed nothing"


def test_nothing_saved_runs_dense_and_says_so(caplog, capsys, tmp_path, pictures):
    folder = save_folder(tmp_path, method=None)
    answer = said(capsys, "--model", folder, "--image", pictures[0], "--prompt", QUESTION)
    assert answer.strip() == plain_answer(f"<image>\n{QUESTION}", pictures[:1], None)
    assert "has no pruning settings and runs dense" in caplog.text


def test_streaming_and_sampling(capsys, folder, pictures):
    common = ["--model", folder, "--image", pictures[0], "--prompt", QUESTION]
    whole = said(capsys, *common)
    assert said(capsys, *common, "--stream").strip() == whole.strip()
    drawn = [said(capsys, *common, "--temperature", "3", "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_real_process_prints_the_answer_alone(folder, pictures, tmp_path):
    command = [sys.executable, "-m", "vtprune_train.cli", "generate", "--model", str(folder), "--max_new_tokens", "12"]
    command += ["--image", str(pictures[0]), "--prompt", QUESTION]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == plain_answer(f"<image>\n{QUESTION}", pictures[:1])
    assert done.stdout.count("\n") == 1


def test_a_runs_template_is_used(capsys, run_folder, pictures):
    text = f"<s>user : <image>\n{QUESTION} assistant :"
    expected = plain_answer(text, pictures[:1])
    assert said(capsys, "--model", run_folder, "--image", pictures[0], "--prompt", QUESTION).strip() == expected
    checkpoint = run_folder / "checkpoints" / "step_00000008"
    for path in (checkpoint, checkpoint / "hf"):
        assert said(capsys, "--model", path, "--image", pictures[0], "--prompt", QUESTION).strip() == expected


def test_a_template_that_leaves_the_question_out_is_named(caplog, capsys, tmp_path, pictures):
    run = save_run(tmp_path, template="plain")
    said(capsys, "--model", run, "--image", pictures[0], "--prompt", QUESTION)
    assert "leaves out the text of the prompt" in caplog.text


def test_prompts_get_the_tokens_of_training(run_folder):
    """Several turns and pictures through Jinja and processor, against the encoder that made the training data."""
    loaded = load(str(run_folder))
    turns = [
        Turn("user", "<image>\nwhat is shown ?"), Turn("assistant", "a red cat"), Turn("user", "and <image> here ?"),
        Turn("assistant", "two"), Turn("user", "on the left ?"), Turn("assistant", "no"),
    ]  # fmt: skip
    encoder = ChatEncoder(loaded.processor.tokenizer, Template(**TEMPLATE), loaded.model.config.image_token_id)
    encoded = encoder.encode(turns)
    images = [Image.new("RGB", size, "red") for size in ((40, 60), (30, 30))]
    ids = batch(loaded, [(images, turns[:-1])])["input_ids"][0].tolist()
    image = loaded.model.config.image_token_id
    merged = [token for place, token in enumerate(ids) if token != image or ids[place - 1] != image]
    assert merged == encoded.input_ids[: encoded.answer_starts[-1]].tolist()


def test_a_batch_equals_single_prompts(run_folder, pictures):
    loaded = load(str(run_folder))
    opened = [Image.open(path).convert("RGB") for path in pictures]
    prompts = [
        (opened[:1], QUESTION), ([], "what is a dog ?"), (opened[1:3], "a red <image> and <image> ?"),
        (opened[3:], [Turn("user", "<image> here <image>"), Turn("assistant", "yes"), Turn("user", "left ?")]),
    ]  # fmt: skip
    together = answers(loaded, prompts, max_new_tokens=10)
    assert together == [answers(loaded, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert len(set(together)) > 1


@pytest.mark.parametrize(
    ("template", "image_token", "content", "expected"),
    [
        (LLAVA_TEMPLATE, "<image>", "parts", "USER: <image>\nhere ? ASSISTANT:"),
        (QWEN_TEMPLATE, "<|image_pad|>", "parts", "<|vision_start|><|image_pad|><|vision_end|>here ?<|im_end|>"),
        (TEXT_TEMPLATE, "<image>", "text", "[user] <image>\nhere ?\n[assistant]"),
        (None, "<image>", None, "<image>\nhere ?"),
    ],
)
def test_chat_templates_of_other_projects(template, image_token, content, expected):
    processor = family_processor("llava")
    processor.chat_template, processor.image_token = template, image_token
    loaded = Loaded(None, processor, content_of(processor))
    assert loaded.content == content
    for question in ("here ?", "<image>\nhere ?"):
        assert expected in prompt_text(loaded, 1, question)
    assert "image" not in prompt_text(loaded, 0, "here ?")
    if image_token != "<image>":
        with pytest.raises(ValueError, match=r"the prompt contains <\|image_pad\|>, .*write <image> for an image"):
            prompt_text(loaded, 1, f"<image> or {image_token} ?")


def test_spaces_around_images_are_kept_for_chat_templates_of_other_projects():
    """Only line breaks beside a picture are the template's own business."""
    processor = family_processor("llava")
    processor.chat_template, processor.image_token = QWEN_TEMPLATE, "<|image_pad|>"
    loaded = Loaded(None, processor, content_of(processor))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    for question, expected in (
        ("is <image> like <image>, or not ?\n", f"is {picture} like {picture}, or not ?\n"),
        ("\nis it <image>\n<image>\n here ?", f"\nis it {picture}{picture}here ?"),
    ):
        assert expected in prompt_text(loaded, 2, question)


def test_answers_end_where_training_ended_them(tmp_path):
    """``plain`` ends answers with a line break, ``qwen`` with its own token."""
    from vtprune_train.evaluation.answering import stop_where_answers_end

    words = {"\n": [9], "<|im_end|>": [7], " the end": [4, 5], "</s>": [2]}

    def encode(text, add_special_tokens):
        return [1, *words.get(text.removeprefix("a"), [])]

    tokenizer = SimpleNamespace(encode=encode, eos_token="</s>")
    for template, expected in (
        (TEMPLATES["plain"], [2, 9]), (TEMPLATES["qwen"], [2, 7]), (TEMPLATES["vicuna_v1"], 2),
        (Template("{text}", ":", "{text} the end"), 2),
    ):  # fmt: skip
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
        stop_where_answers_end(model, tokenizer, template)
        assert model.generation_config.eos_token_id == expected


def test_a_processor_is_built_where_none_was_saved(caplog, folder, tmp_path):
    without = tmp_path / "without"
    model = talkative()
    prune(model, HALF)
    model.save_pretrained(without)
    tiny_processor().tokenizer.save_pretrained(without)
    prompt = ([Image.new("RGB", (70, 40), "red")], QUESTION)
    ours, theirs = (answers(load(str(path)), [prompt], max_new_tokens=9) for path in (without, folder))
    assert ours == theirs
    assert "built from the model's config" in caplog.text


def test_other_families(tmp_path, capsys, pictures):
    model = talkative("llava")
    model.save_pretrained(tmp_path)
    family_processor("llava").save_pretrained(tmp_path)
    common = ["--model", tmp_path, "--image", pictures[0], "--prompt", QUESTION]
    dropped = said(capsys, *common, "--method", "pyramiddrop", "--keep", "0.1,0.1")
    assert dropped != said(capsys, *common, "--method", "none")
    assert is_pruned(load(str(tmp_path), HALF).model)


def test_a_budget_fits_the_method(folder):
    def chosen(*options):
        parser = argparse.ArgumentParser()
        add_model_option(parser)
        add_method_options(parser)
        return asked_method(parser.parse_args(["--model", str(folder), *options]))

    saved = chosen("--keep", "0.5,0.25", "--layers", "2,4")
    assert chosen("--keep", "0.5,0.25", "--layers", "2,4", "--budget", "0.4") == saved.for_budget(0.4, 6)
    assert chosen("--budget", "0.4").input_share(6) == pytest.approx(0.4, abs=1e-4), "of the saved method"
    assert chosen("--method", "divprune", "--budget", "0.3").keep == pytest.approx(0.3, abs=1e-3)
    assert chosen("--budget", "1") is None, "all tokens"


def test_dtype(folder):
    assert load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(str(folder)).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere"], "model /nowhere: no such folder here"),
        (["--model", "nowhere/model"], "model nowhere/model: no such folder here"),
        (["--image", "/nowhere.png"], "image /nowhere.png cannot be read"),
        (["--image", __file__], "cannot be read (not an image that Pillow can read"),
        (["--method", "abc"], "method='abc' is unknown; known methods: pyramiddrop"),
        (["--layers", "2,9"], "layer 9 does not exist in a decoder of 6 layers"),
        (["--keep", "2,1"], "2.0 is not in (0, 1]"),
        (["--method", "none", "--keep", "0.5"], "--keep has no effect with --method none"),
        (["--method", "none", "--budget", "0.5"], "--budget=0.5 has no effect without a method that drops tokens"),
        (["--budget", "0"], "--budget=0 is not in (0, 1]"),
        (["--budget", "0.01"], "--budget=0.01: budget 0.01 is out of range for pyramiddrop on 6 layers"),
        (["--positions", "first"], "positions='first' is not one of renumber, keep"),
        (["--prompt", "<image><image> ?"], "0 image(s) but 2 <image> in the prompt"),
        (["--max_new_tokens", "0"], "--max_new_tokens=0"),
        (["--temperature", "-1"], "--temperature=-1.0 is not between 0.01 and 100"),
        (["--seed", "1"], "--seed=1 has no effect without --temperature"),
    ],
)
def test_wrong_input_is_one_line(capsys, folder, options, message):
    """``options`` come last and overrule what is right."""
    assert main(["generate", "--model", str(folder), "--prompt", QUESTION, *options]) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error and "Traceback" not in error
    told = error[error.index("vtprune generate:") :].strip().splitlines()
    assert len(told) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--layers", "2,x"], "'2,x' is not a list of numbers such as 8,16,24"), (["--device", "tpu"], "invalid choice")],
)
def test_wrong_options(capsys, folder, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", str(folder), "--prompt", QUESTION, *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_device_that_is_not_there(capsys, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", "--model", str(folder), "--prompt", QUESTION, "--device", "cuda"]) == 2
    assert "device=cuda: PyTorch finds no CUDA device" in capsys.readouterr().err


def test_settings_without_a_saved_method(capsys, tmp_path):
    folder = save_folder(tmp_path, method=None)
    assert main(["generate", "--model", str(folder), "--prompt", QUESTION, "--keep", "0.5"]) == 2
    assert "set --method" in capsys.readouterr().err
