import dataclasses
import re

import pytest
import torch

from ssl_flow.config import Config, load_config, preset_files, save_config
from ssl_flow.data.augment import normalize_flow
from ssl_flow.models import create_encoder
from ssl_flow.training.flow_task import FlowTask

PRESETS = ["default", "loc2vec", "multi_gpu", "paper_alexnet", "quickstart", "small", "vit_small"]


def test_every_preset_is_known():
    assert sorted(preset_files()) == PRESETS


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "loc2vec"])
def test_every_preset_trains(name):
    """One step of its backbone, head and loss; on small crops, which all backbones must take."""
    config = load_config(name)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store="synthetic"))
    model = config.model
    torch.manual_seed(0)
    encoder = create_encoder(model.backbone, model.embedding_dim, model.hidden_dim)
    weight = torch.ones(2, 16, 16)
    flow = normalize_flow(torch.randn(2, 2, 16, 16), weight, config.loss.flow_normalization)
    embedding = encoder(torch.randn(2, 3, 64, 64))
    assert embedding.shape == (2, model.embedding_dim, 16, 16)
    loss = FlowTask(config).objective(encoder, None).loss(embedding, flow, weight)
    loss.backward()
    assert loss.isfinite()
    for key, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
    assert any(p.grad is not None and p.grad.any() for p in encoder.backbone.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_for_and_takes(name):
    comment = preset_files()[name].read_text().partition("\ndata:")[0]
    assert all(line.startswith("#") for line in comment.splitlines()) and len(comment) > 60
    assert re.search(r"\d (minutes|hours|days)", comment) and re.search(r"\d (GB|GiB|MiB)", comment)


@pytest.mark.parametrize("name", PRESETS)
def test_numbers_in_a_preset_s_comment_are_its_own(name):
    comment, train = preset_files()[name].read_text(), load_config(name).train
    for millions in re.findall(r"for ([0-9.]+) million crops", comment):
        assert float(millions) * 1e6 == train.steps * train.batch_size
    for processes, share, step in re.findall(
        r"(\d+) processes of (\d+) crops, (\d+) crops a step", comment
    ):
        assert int(processes) * int(share) == int(step) == train.batch_size
    assert name != "multi_gpu" or "8 processes of 32 crops" in comment
    for base, step, one in re.findall(r"'s ([0-9.e-]+) times sqrt\((\d+) / (\d+)\)", comment):
        default = load_config("default").train
        assert (float(base), int(one)) == (default.learning_rate, default.batch_size)
        assert int(step) == train.batch_size
        assert train.learning_rate == pytest.approx(float(base) * (int(step) / int(one)) ** 0.5)
    for size, rate in re.findall(
        r"--train.batch-size (\d+) --train.learning-rate ([\d.e-]+\d)", comment
    ):
        scaled = train.learning_rate * (int(size) / train.batch_size) ** 0.5
        assert float(rate) == pytest.approx(scaled, rel=0.02)


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
        ("seed: 9223372036854775808", "seed is 9223372036854775808; expected in"),
        ("data: {crop: 64", r"bad\.yaml is not YAML: .*(\n.*)*line 1"),
        ("data: {crop: \x07}", r"bad\.yaml is not YAML: "),
        ("seed: 1\nseed: 2", r"bad\.yaml is not YAML: the key 'seed' is there twice(\n.*)*line 2"),
        ("train: {learning_rate: fast}", "train.learning_rate is 'fast'; expected float"),
        ("train: {learning_rate: true}", "train.learning_rate is True; expected float"),
        ("train: {batch_size: 16, accumulate: 3}", "accumulate is 3; expected a divisor of train"),
        ("train: {weight_decay: .nan}", "train.weight_decay is nan; expected a finite number"),
        ("evaluation: {every: -1}", "evaluation.every is -1; expected 0 or more"),
        ("? [1, 2]\n: 3", r"bad\.yaml is not YAML: .*(\n.*)*unhashable"),
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
    assert _knobs(Config()) <= 40


def _knobs(config):
    if not dataclasses.is_dataclass(config):
        return 1
    return sum(_knobs(getattr(config, f.name)) for f in dataclasses.fields(config))
