import dataclasses

import pytest

from ssl_flow.config import Config, load_config, preset_files, save_config


def test_every_preset_loads():
    presets = preset_files()
    assert {"quickstart", "small"} <= presets.keys()
    for name in presets:
        assert isinstance(load_config(name), Config)


def test_round_trip(tmp_path):
    config = dataclasses.replace(Config(), seed=7)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(str(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "unknown key 'trian'; did you mean 'train'"),
        ("train: {stepps: 3}", r"unknown key 'train.stepps'; did you mean 'steps'"),
        ("train: {steps: many}", "train.steps is 'many'; expected int"),
        ("train: 3", "train holds 3; expected keys"),
        ("loss: {objective: mse}", "expected one of cross_entropy"),
        ("data: {crop: 100}", "data.crop is 100; expected a multiple of 32"),
    ],
)
def test_bad_files_name_the_key_and_the_mend(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(path))


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {learning_rate: 1e-3}")
    assert load_config(str(path)).train.learning_rate == 1e-3


def test_unknown_preset_lists_the_presets():
    with pytest.raises(FileNotFoundError, match="quickstart"):
        load_config("no-such-preset")


def test_few_knobs():
    groups = [f for f in dataclasses.fields(Config) if f.name in "data model loss train evaluation"]
    knobs = sum(len(dataclasses.fields(f.default_factory)) for f in groups)
    assert knobs + len(dataclasses.fields(Config)) - len(groups) <= 40
