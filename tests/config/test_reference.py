"""The descriptions of settings, and what is generated from them."""

import re

import pytest
from pydantic import BaseModel

from vtprune_train.config.reference import all_settings, find_setting, first_sentence, method_settings
from vtprune_train.config.settings import Config
from vtprune_train.pruning import METHODS, method_class, setting_types
from write_settings import PAGE, page


def fields_of(section, prefix=""):
    """``(key, field)`` of every field, by the classes themselves."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                is_list = getattr(field.annotation, "__origin__", None) is list
                yield from fields_of(part, f"{key}.N." if is_list else f"{key}.")


FIELDS = dict(fields_of(Config))


def test_every_field_of_every_section_is_a_setting():
    assert set(all_settings()) == set(FIELDS) and len(FIELDS) > 100


@pytest.mark.parametrize("key", FIELDS)
def test_a_description_is_a_plain_sentence(key):
    text = find_setting(key).description
    assert re.fullmatch(r"[A-Z0-9`].*\.", text, re.DOTALL), text
    assert len(first_sentence(text)) <= 110, "it is also the comment in recipes"


def test_the_page_is_complete_and_up_to_date():
    text = PAGE.read_text()
    assert text == page(), "run `make settings`"
    for key, setting in all_settings().items():
        if not key.startswith("data.eval.N."):
            _, _, rest = text.partition(f"# `{key}`\n")
            entry = rest.partition("\n#")[0]
            assert " ".join(entry.split()).endswith(" ".join(setting.description.split())), key
            if setting.type:
                assert f"default `{setting.default}`" in entry or "required" in entry, key


@pytest.mark.parametrize(
    ("key", "type", "default"),
    [
        ("train.clip", "number >= 0", "0.0"),
        ("train.schedule", None, "cosine"),
        ("train.export", "every | last | never", "every"),
        ("train.activation_checkpointing", "all | first_stage | none | integer >= 1", "all"),
        ("train.betas", "[number, number]", "[0.9, 0.999]"),
        ("data.train.3.weight", "number > 0 and <= 1e+06", "1.0"),
        ("data.train.N.path", "text", "required"),
        ("data.system", "text or null", "null"),
        ("model.peft.dropout", "number >= 0 and < 1", "0.0"),
        ("model.train", "mapping", "{projector: 2e-05, language_model: 2e-05, vision_tower: 2e-06}"),
        ("deepspeed", "text or mapping", "configs/deepspeed/zero2.json"),
        ("pruning.warmup", "mapping or null", "null"),
        ("run", "", ""),
    ],
)
def test_type_choices_bounds_and_default(key, type, default):
    setting = find_setting(key)
    assert setting.default == default and type in (None, setting.type)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_described(name):
    cls = method_class(name)
    assert setting_types(cls).keys() <= method_settings(cls).keys()
