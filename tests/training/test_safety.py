import math
import os
import signal
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import lines, tiny

from ssl_flow.config import Config, EvaluationConfig
from ssl_flow.evaluation.metrics import effective_rank
from ssl_flow.models import create_encoder, load_encoder, save_encoder
from ssl_flow.models.encoder import Normalization
from ssl_flow.training import flow_task, initial, loop, pretrain, score, train_command
from ssl_flow.training.flow_task import FlowTask
from ssl_flow.training.initial import initialize
from ssl_flow.training.monitors import embedding_std
from ssl_flow.training.safety import (
    CollapseError,
    Interrupted,
    MemoryAdvice,
    StopSignals,
    check_collapse,
    explain_out_of_memory,
)


def weights(run):
    return {p.name: p.read_bytes() for p in sorted((run / "encoder").glob("*.safetensors"))}


def test_non_finite_steps_are_skipped_counted_and_in_the_end_fatal(store, tmp_path, monkeypatch):
    real, calls = FlowTask.batch, []

    def sometimes_nan(*arguments):
        calls.append(1)
        batch = real(*arguments)
        return batch._replace(images=batch.images * (math.nan if len(calls) in bad else 1))

    monkeypatch.setattr(FlowTask, "batch", sometimes_nan)
    bad = {2, 3}
    rows = lines(pretrain(tiny(store, tmp_path / "a")))
    assert rows[-1]["skipped_steps"] == 2
    assert rows[0]["step"] == 2 and rows[0]["loss"] is None  # JSON has no NaN
    calls.clear()
    bad = range(1, 1000)
    with pytest.raises(FloatingPointError, match="10 times in a row") as caught:
        pretrain(tiny(store, tmp_path / "b", steps=30))
    (run,) = (tmp_path / "b").iterdir()
    assert str(run / "bad_batch.pt") in str(caught.value)
    # Nothing was saved on the way: the weights may be what is broken.
    assert not list((run / "checkpoints").glob("*.pt"))
    saved = torch.load(run / "bad_batch.pt", weights_only=True)
    assert saved["images"].shape == (4, 3, 64, 64)
    assert saved["images"].isnan().all()
    assert saved["step"] == 9


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_knobs(error):
    with pytest.raises(MemoryAdvice) as caught, explain_out_of_memory(Config()):
        raise error
    for knob in ("train.batch_size", "train.accumulate", "data.crop", "train.amp",
                 "train.checkpoint_activations"):  # fmt: skip
        assert knob in str(caught.value)


@pytest.mark.parametrize("place", ["make_optimizer", "load_checkpoint", "score_run"])
def test_a_lack_of_memory_anywhere_is_explained(store, tmp_path, monkeypatch, capsys, place):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(loop, place, full)
    with pytest.raises(MemoryAdvice, match=r"train\.accumulate"):
        pretrain(tiny(store, tmp_path, steps=1))


def test_a_probe_that_lacks_memory_names_its_own_knobs():
    for data, named in (("synthetic", True), ("none", False)):
        config = Config(evaluation=EvaluationConfig(data=data))
        with pytest.raises(MemoryAdvice) as caught, explain_out_of_memory(config):
            raise MemoryError
        assert ("evaluation.every" in str(caught.value)) == named


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory(Config()):
        raise RuntimeError("shape mismatch")


def test_a_real_lack_of_memory_is_told_in_one_line_before_any_work(store, tmp_path, capsys):
    size = ["--data.crop", "32000", "--train.batch-size", str(2**20)]  # beyond any address space
    assert train_command([*size, "--data.store", str(store), "--out", str(tmp_path)]) == 2
    assert "train.accumulate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_signals_are_remembered_and_a_second_ctrl_c_acts():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_embedding_std_is_zero_for_a_constant_and_one_for_all_directions():
    torch.manual_seed(0)
    assert embedding_std(torch.ones(32, 8) * 3) == pytest.approx(0, abs=1e-3)
    units = torch.nn.functional.normalize(torch.randn(8192, 8), dim=1)
    assert embedding_std(units) == pytest.approx(1, abs=1e-3)


def test_effective_rank_counts_the_dimensions_that_are_used():
    points = torch.zeros(4000, 6)
    points[:, :3] = torch.randn(4000, 3)
    assert effective_rank(points + 5) == pytest.approx(3, abs=0.01)
    assert effective_rank(torch.ones(50, 6)) == pytest.approx(1, abs=0.01)


def test_a_collapse_ends_the_run_after_several_logs_in_a_row(tmp_path):
    fine = {"step": 1, "effective_rank": 6.0, "embedding_std": 0.7}
    times = 0
    for values in [{"effective_rank": 1.1}] * 4 + [{}] + [{"embedding_std": 0.001}] * 4:
        times = check_collapse({**fine, **values}, times, tmp_path)
    assert times == 4
    with pytest.raises(CollapseError, match=r"effective rank 6.00 .* deviation .* 0.0010"):
        check_collapse({**fine, "embedding_std": 0.001}, times, tmp_path)


def test_a_run_that_collapses_is_stopped(store, tmp_path, monkeypatch, capsys):
    def collapsed(images):
        flat = real(images)
        return flat * 1e-6 + 1

    def build(*arguments):
        nonlocal real
        encoder = create_encoder(*arguments)
        real = encoder.forward
        encoder.forward = collapsed
        return encoder

    real = None
    monkeypatch.setattr(flow_task, "create_encoder", build)
    config = tiny(store, tmp_path, steps=30, log_every=1, warmup=0.1)
    with pytest.raises(CollapseError, match=r"collapsed.* up to step 8"):
        pretrain(config)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for folder in ("images", "masks"):
        (path / folder).mkdir()
    for i in range(10):
        mask = np.zeros((48, 64), np.uint8)
        mask[:, : rng.integers(10, 50)] = 1
        image = (40 + 150 * mask[..., None] + rng.integers(0, 30, (48, 64, 3))).astype(np.uint8)
        cv2.imwrite(str(path / "images" / f"{i}.png"), image)
        cv2.imwrite(str(path / "masks" / f"{i}.png"), mask)
    return path


def test_the_online_probe_changes_nothing_and_chooses_the_best(
    store, tmp_path, finished, labelled, monkeypatch
):
    monkeypatch.setattr(loop, "score_run", lambda *_: lambda *_: None)
    config = replace(
        tiny(store, tmp_path), evaluation=EvaluationConfig(data=f"folder:{labelled}", every=3)
    )
    run = pretrain(config)
    assert weights(run) == weights(finished)
    probes = [row for row in lines(run) if "probe_miou" in row]
    assert [row["step"] for row in probes] == [3, 6]
    assert all(0 < row["probe_miou"] <= 1 for row in probes)
    assert [row["loss"] for row in lines(run) if "loss" in row] == [
        row["loss"] for row in lines(finished)
    ]
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["progress"]
    assert best["best"] == max(row["probe_miou"] for row in probes)


def test_a_probe_that_cannot_be_fitted_does_not_end_the_run(
    store, tmp_path, finished, labelled, monkeypatch, capsys
):
    def refuse(*_, **__):
        saved.append(sorted(p.name for p in tmp_path.glob("*/checkpoints/*.pt")))
        raise ValueError("features of 3.png are not finite")

    saved = []
    monkeypatch.setattr(score, "run_linear_probe", refuse)
    monkeypatch.setattr(loop, "score_run", lambda *_: lambda *_: None)
    evaluation = EvaluationConfig(data=f"folder:{labelled}", every=3)
    run = pretrain(replace(tiny(store, tmp_path), evaluation=evaluation))
    assert weights(run) == weights(finished)
    assert "online probe left out: features of 3.png" in capsys.readouterr().out
    assert "step-00000003.pt" in saved[0]  # before the probe
    assert not (run / "checkpoints" / "best.pt").exists()


def test_start_weights_bring_their_normalisation_and_keep_it(
    store, tmp_path, finished, monkeypatch
):
    source = load_encoder(finished)
    source.normalization = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_encoder(source, tmp_path / "source")
    config = tiny(store, tmp_path / "runs", ema=0.5)
    config = replace(config, model=replace(config.model, init_from=str(tmp_path / "source")))
    real, calls = FlowTask.batch, []

    def stop_at_three(*arguments):
        calls.append(arguments[3].normalization)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(FlowTask, "batch", stop_at_three)
    with pytest.raises(Interrupted):
        pretrain(config)
    (run,) = (tmp_path / "runs").iterdir()
    pretrain(config, resume=run)
    assert set(calls) == {source.normalization}
    assert load_encoder(run).normalization == source.normalization
    encoder = create_encoder("test_resnet", 16, 32)
    report = initialize(encoder, str(run / "checkpoints" / "best.pt"))
    assert encoder.normalization == source.normalization
    assert "mean (0.1, 0.2, 0.3), standard deviation (0.4, 0.5, 0.6), the source's own" in report


def test_start_weights_from_a_run_an_encoder_a_checkpoint_and_a_file(finished, tmp_path):
    source = load_encoder(finished).state_dict()
    lone = tmp_path / "backbone.safetensors"
    lone.write_bytes((finished / "encoder" / "model.safetensors").read_bytes())
    for spec in (finished, finished / "encoder", finished / "checkpoints" / "step-00000006.pt"):
        torch.manual_seed(1)
        encoder = create_encoder("test_resnet", 16, 32)
        report = initialize(encoder, str(spec))
        assert f"{len(source)} tensors taken" in report and "missing" not in report
        assert all(torch.equal(v, source[k]) for k, v in encoder.state_dict().items())
    torch.manual_seed(1)
    encoder = create_encoder("test_resnet", 16, 32)
    normalization = encoder.normalization
    report = initialize(encoder, str(lone))
    assert encoder.normalization == normalization
    assert "this backbone's own" in report
    assert "missing: head." in report
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, source[f"backbone.{name}"])
    assert not torch.equal(encoder.head.output[2].weight, source["head.output.2.weight"])


def test_keys_of_a_classifier_are_named_and_wrong_shapes_refused(finished, tmp_path):
    tensors = load_file(finished / "encoder" / "model.safetensors")
    save_file({**tensors, "fc.weight": torch.zeros(5, 5)}, tmp_path / "a.safetensors")
    encoder = create_encoder("test_resnet", 16, 32)
    report = initialize(encoder, str(tmp_path / "a.safetensors"))
    assert "unexpected: backbone.fc.weight" in report
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(7)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"backbone.{name} is \(7,\), expected"):
        initialize(encoder, str(tmp_path / "b.safetensors"))
    save_file({"nothing": torch.zeros(7)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"does not fit test_resnet(?s:.*): 0 tensors taken"):
        initialize(encoder, str(tmp_path / "c.safetensors"))
    with pytest.raises(ValueError, match="set model"):
        initialize(create_encoder("test_resnet", 8, 32), str(finished))


def test_timm_weights_go_into_the_backbone(monkeypatch):
    given = create_encoder("test_resnet")
    monkeypatch.setattr(initial, "load_encoder", lambda spec: {"timm:test_resnet": given}[spec])
    encoder = create_encoder("test_resnet", 16, 32)
    initialize(encoder, "timm:test_resnet")
    for name, value in given.backbone.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[name], value)


def test_a_run_starts_from_given_weights(store, tmp_path, finished, capsys):
    argv = ["--init-from", str(finished), "--data.store", str(store), "--train.steps", "1",
            "--model.backbone", "test_resnet", "--model.hidden-dim", "32", "--data.crop", "64",
            "--train.batch-size", "4", "--data.workers", "0", "--evaluation.data", "none",
            "--out", str(tmp_path)]  # fmt: skip
    assert train_command(argv) == 0
    assert "start weights from" in capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    assert str(finished) in (run / "config.yaml").read_text()
    assert train_command(argv[2:]) == 0
    other = next(path for path in tmp_path.iterdir() if path != run)
    assert lines(run)[0]["loss"] < lines(other)[0]["loss"]
