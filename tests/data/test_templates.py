"""Whether a template fits its checkpoint, what is said of it at the start, and what a model without one is told."""

import json
import logging
import re

import pytest
import yaml
from tokenizers.processors import TemplateProcessing

from tests.support.checkpoints import save_folder
from tests.support.runner import TINY, write_data
from tests.support.tokenizers_made import TOKENIZERS, byte_level
from vtprune_train.cli import main
from vtprune_train.data.chat import TEMPLATES, ChatEncoder, Turn, get_template
from vtprune_train.data.jinja import written_by
from vtprune_train.data.templates import describe_sample, misfits, saved_chat_template
from vtprune_train.evaluation.answering import load

OWN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder_of(tokenizer, spec, **changes):
    template = get_template(spec)
    for key, value in changes.items():
        object.__setattr__(template := type(template)(**vars(template)), key, value)
    return ChatEncoder(tokenizer, template, tokenizer.convert_tokens_to_ids("<image>"))


def said(encoder, saved=None):
    return list(misfits(encoder, saved, "model.path=here"))


def without_marks():
    return TOKENIZERS["gpt2"]().__class__(
        tokenizer_object=byte_level().backend_tokenizer.__class__.from_str(
            byte_level().backend_tokenizer.to_str().replace("im_start", "other_start").replace("im_end", "other_end")
        ),
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def test_marks_that_are_no_tokens_are_named():
    [line] = said(encoder_of(without_marks(), "qwen"))
    assert "data.template=qwen writes <|im_start|>, <|im_end|>, which the tokenizer of model.path" in line
    assert said(encoder_of(TOKENIZERS["qwen"](), "qwen")) == []
    assert said(encoder_of(without_marks(), "vicuna_v1")) == [] == said(encoder_of(without_marks(), "mistral"))


def test_another_template_than_the_checkpoints_is_named_with_the_one_that_fits():
    tokenizer = TOKENIZERS["qwen"]()
    assert said(encoder_of(tokenizer, "qwen", default_system=""), OWN) == []
    [line] = said(encoder_of(tokenizer, "vicuna_v1"), OWN)
    assert "data.template=vicuna_v1 is not the chat template of model.path=here. It writes" in line
    assert repr("<|im_start|>user\n<image>What is shown here?<|im_end|>")[1:-1] in line
    with_system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + OWN
    [line] = said(encoder_of(tokenizer, "mistral"), with_system)
    assert "is not the chat template of model.path=here; data.template=qwen is. It writes" in line
    for spec in TEMPLATES:
        encoder = encoder_of(tokenizer, spec)
        assert said(encoder, written_by(encoder)) == [], "a run that goes on from its own checkpoint"


def test_a_template_that_this_tokenizer_cannot_train_with_is_no_hint_and_no_error():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    with pytest.raises(ValueError, match="to every text"):
        encoder_of(tokenizer, "qwen")
    [line] = said(encoder_of(tokenizer, "vicuna_v1"), "{{ 'Q: ' }}<image>{{ messages[0].content }}")
    assert "data.template=vicuna_v1 is not the chat template of model.path=here" in line


def test_chat_templates_of_older_processors_are_found(tmp_path):
    tokenizer = TOKENIZERS["gpt2"]()
    assert saved_chat_template(tokenizer, str(tmp_path)) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))
    assert saved_chat_template(tokenizer, str(tmp_path)) == OWN
    (tmp_path / "chat_template.json").write_text('{"chat_template": ')
    with pytest.raises(ValueError, match=r"chat_template\.json is not JSON: .* \(line 1, column 19\)"):
        saved_chat_template(tokenizer, str(tmp_path))
    tokenizer.chat_template = {"default": "default", "tool_use": "other"}
    assert saved_chat_template(tokenizer, str(tmp_path)) == "default"


@pytest.mark.parametrize("kind", ["gpt2", "llama-new", "legacy-file"])
def test_a_sample_is_shown_with_its_answers_marked(kind):
    tokenizer = TOKENIZERS[kind]()
    encoder = encoder_of(tokenizer, "mistral")
    turns = [
        Turn("user", "What is this?<image>"),
        Turn("assistant", "No."),
        Turn("user", "And?"),
        Turn("assistant", "é"),
    ]
    shown = describe_sample(encoder, encoder.encode(turns), [576])
    spaces = " " if kind == "legacy-file" else ""
    assert shown.replace("[[ ", "[[").replace(f"</s>]]{spaces}", "</s>]]") == (
        f"<s>{spaces}[INST] What is this?<image> x 576{spaces} [/INST][[No.</s>]][INST] And? [/INST][[é</s>]]"
    )


def test_a_bare_prompt_is_warned_of(tmp_path, caplog):
    save_folder(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        load(str(tmp_path / "model"), device="cpu")
    assert f"{tmp_path / 'model'} has no chat template, so prompts have no roles" in caplog.text


def test_a_dry_run_shows_a_sample_and_what_does_not_fit(tmp_path, capsys):
    write_data(tmp_path / "data")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    settings = [f"data.root={tmp_path / 'data'}", f"run.output_dir={tmp_path}", "data.template=qwen"]
    assert main(["train", "--config", str(tmp_path / "tiny.yaml"), "--dry_run", *settings]) == 0
    said = capsys.readouterr().out
    assert "WARNING       data.template=qwen writes <|im_start|>, <|im_end|>, which the tokenizer of" in said
    assert re.search(r"sample        train0: \d+ tokens, \d+ supervised \(between \[\[ and \]\]\):", said)
    assert re.search(r"<image> x \d+\nhow bright is number 0\?<\|im_end\|>\n", said) and re.search(
        r"assistant\n\[\[about \d<", said
    )
