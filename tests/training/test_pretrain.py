import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
import yaml
from tiny import lines, tiny

import ssl_flow
from ssl_flow.config import Config, DataConfig, EvaluationConfig, TrainConfig
from ssl_flow.evaluation import LinearProbe
from ssl_flow.flow import FlowStore
from ssl_flow.training import loop, pretrain, score, train_command
from ssl_flow.training.flow_task import FlowTask
from ssl_flow.training.step import learning_rate


def test_run_folder_holds_what_is_promised(finished):
    for name in [
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "encoder/config.json",
        "encoder/model.safetensors",
        "encoder/head.safetensors",
        "checkpoints/step-00000006.pt",
        "checkpoints/best.pt",
        "pictures/training.png",
    ]:
        assert (finished / name).stat().st_size > 0, name
    assert any((finished / "tensorboard").iterdir())


def test_every_logged_number_is_explained(finished):
    page = (Path(__file__).parents[2] / "docs" / "learning.md").read_text(encoding="utf-8")
    keys = set().union(*lines(finished)) - {"step"}
    assert len(keys) > 10 and not [key for key in keys if f"`{key}`" not in page]


def test_metrics_put_the_loss_between_its_floor_and_the_constant_embedding(finished):
    rows = lines(finished)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["target_entropy"] < row["loss"]
        assert row["target_entropy"] < row["constant_loss"] < row["random_loss"]
        assert row["kl"] == pytest.approx(row["loss"] - row["target_entropy"])
        assert 0 < row["embedding_std"] <= 1
        assert 1 <= row["effective_rank"] <= 16
        assert row["skipped_steps"] == 0


def test_the_encoder_loads_in_one_line_and_with_plain_timm(finished):
    images = torch.randn(1, 3, 64, 64)
    encoder = ssl_flow.load_encoder(finished / "encoder")
    plain = timm.create_model(f"local-dir:{finished / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        expected = plain.forward_intermediates(images, intermediates_only=True)[-1]
        assert torch.equal(encoder.features(images)[-1], expected)


def test_training_lowers_the_divergence_from_the_target(store, tmp_path):
    run = pretrain(tiny(store, tmp_path, steps=24, batch_size=8, log_every=4))
    # Batches differ, so each is measured against its own floor and its own constant embedding.
    shares = [
        (row["loss"] - row["target_entropy"]) / (row["constant_loss"] - row["target_entropy"])
        for row in lines(run)
    ]
    assert shares[-1] < 0.9 * shares[0]


@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"objective": "kernel_alignment"}},
        {"loss": {"objective": "regression"}},
        {"loss": {"flow_normalization": "log"}},
        {"loss": {"deep_weight": 0.5}},
        {"loss": {"self_pairs": "subtract_identity"}},
        {"loss": {"flow_normalization": "none"}},
        {"loss": {"embedding_scale": 0.5}},
        {"loss": {"embedding_temperature": 0.2}},
        {"loss": {"flow_sigma": 1.0}},
        {"loss": {"flow_temperature": 0.2}},
        {"data": {"crop": 32}},
        {"train": {"batch_size": 2}},
        {"data": {"color_jitter": 0.0}},
        {"data": {"min_scale": 1.0}},
        {"model": {"embedding_dim": 8}},
        {"model": {"hidden_dim": 16}},
        {"data": {"start_crop": 32}},
        {"train": {"accumulate": 2}},
        {"train": {"learning_rate": 3e-3}},
        {"train": {"weight_decay": 0.5}},
        {"train": {"warmup": 0.5}},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_knob_has_an_effect(store, tmp_path, finished, change):
    config = tiny(store, tmp_path)
    for key, value in change.items():
        group = replace(getattr(config, key), **value) if isinstance(value, dict) else value
        config = replace(config, **{key: group})
    assert lines(pretrain(config))[-1]["loss"] != lines(finished)[-1]["loss"]


def test_command_reads_the_file_and_flags_override_it(store, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"data": {"store": str(store), "crop": 64, "workers": 0},
        "train": {"steps": 3, "batch_size": 2}, "evaluation": {"data": "none"}}))  # fmt: skip
    out = ["--out", str(tmp_path / "runs")]
    assert train_command([str(config), "--train.steps", "1", *out]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["train"]["steps"] == 1
    assert resolved["train"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-preset"], "presets are"),
        (["--data.crop", "100"], "multiple of 32"),
        (["--data.store", "nowhere"], "nowhere"),
        (["--evaluation.data", "camvid:nowhere"], "nowhere"),
        (["--model.backbone", "resnet19"], "near it: resnet18"),
        (["--evaluation.data", "none", "--evaluation.every", "5"], "set evaluation.data"),
        (["--model.backbone", "vit_relpos_small_patch16_224"], "cannot take 16 crops of 128 px"),
        (["--loss.flow-temperature", "0.001"], "flow_temperature"),
        (["--resume", "nowhere"], "run folder"),
        (["--resume=nowhere"], "run folder"),
        (["--seed", "-1"], "seed is -1"),
        (["--device", "nonsense"], "--device cpu"),
        (["--train.stepps", "3"], "--train.steps"),
        (["--train.accumulate", "3"], "train.accumulate is 3; expected a divisor"),
        (["--data.start-crop", "160"], "data.start_crop is 160; expected 0 or a multiple of 32"),
        (["--train.learning-rate", "inf"], "finite"),
        (["--init-from", "nowhere"], "nowhere"),
        (["--init-from", "nowhere.safetensors"], "no file nowhere.safetensors"),
        (["--init-from", "random:resnet50"], "resnet18"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(tmp_path, capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if "--resume" not in arguments[0]:
        arguments = [*arguments, "--out", str(tmp_path)]
    try:
        status = train_command(arguments)
    except SystemExit as stop:  # tyro's own way to refuse an argument
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_amp_has_an_effect(store, tmp_path):
    losses = [
        lines(pretrain(tiny(store, tmp_path / amp, amp=amp)))[-1]["loss"]
        for amp in ("bfloat16", "none")
    ]
    assert losses[0] != losses[1]


def test_two_dimensional_embeddings_have_a_picture(store, tmp_path):
    config = tiny(store, tmp_path)
    config = replace(config, model=replace(config.model, embedding_dim=2))
    assert (pretrain(config) / "pictures" / "training.png").is_file()


def test_the_whole_job_on_synthetic_videos(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "LinearProbe", lambda: LinearProbe(steps=30, batch_pixels=512))
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "labelled" / folder).mkdir(parents=True)
    for i in range(10):
        mask = np.zeros((48, 64), np.uint8)
        mask[:, : rng.integers(10, 50)] = 1
        image = (40 + 150 * mask[..., None] + rng.integers(0, 30, (48, 64, 3))).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "labelled" / "images" / f"{i}.png"), image)
        cv2.imwrite(str(tmp_path / "labelled" / "masks" / f"{i}.png"), mask)
    config = Config(
        data=DataConfig(store="synthetic:2", crop=64, workers=0),
        train=TrainConfig(steps=2, batch_size=2),
        evaluation=EvaluationConfig(data=f"folder:{tmp_path / 'labelled'}"),
        out=str(tmp_path / "runs"),
    )
    run = pretrain(config)
    results = json.loads((run / "results.json").read_text())["linear_probe"]
    assert all(0 < results[name]["miou"] <= 1 for name in ("pretrained", "random"))
    printed = capsys.readouterr().out
    assert printed.index("pretrained  ") < printed.index("random  ")
    assert f"{results['pretrained']['miou']:.4f}" in printed
    for name in ("pretrained", "random"):
        assert (run / "pictures" / f"probe_{name}.png").is_file()
        assert f"{results[name]['miou']:.4f}" in (run / "report.html").read_text()
    assert len(FlowStore(run / "flow")) > 0


def test_speed_is_that_of_the_steps_alone(store, tmp_path, monkeypatch):
    clock = [0.0]

    def lasting(seconds, owner, name):
        real = getattr(owner, name)

        def slow(*arguments, **options):
            clock[0] += seconds
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    lasting(1, loop, "take_step")
    lasting(100, loop, "save_checkpoint")
    lasting(10, FlowTask, "sheet")
    rows = lines(pretrain(tiny(store, tmp_path, checkpoint_every=3)))
    assert [row["images_per_second"] for row in rows] == [4, 4, 4]
    assert [row["data_wait"] for row in rows] == [0, 0, 0]


@pytest.mark.parametrize(("steps", "warmup"), [(25, 0.1), (10, 0.0), (7, 0.5)])
def test_learning_rate_rises_to_its_peak_once_and_falls_to_zero(steps, warmup):
    config = Config(train=TrainConfig(steps=steps, warmup=warmup, learning_rate=1.0))
    rates = [learning_rate(config, step) for step in range(steps + 1)]
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
