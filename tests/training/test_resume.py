import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import lines, stop_at_step, tiny

from ssl_flow.config import load_config, save_config
from ssl_flow.training import loop, pretrain, train_command
from ssl_flow.training.checkpoint import (
    Progress,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from ssl_flow.training.flow_task import FlowTask
from ssl_flow.training.safety import Interrupted
from ssl_flow.training.step import learning_rate

TIMES = {"images_per_second", "data_wait"}


def drive(jobs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("driver.py")), json.dumps(jobs)],
        capture_output=True, text=True, env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("statuses")]
    return json.loads(line.removeprefix("statuses")), done.stderr


def weights(run):
    return {p.name: p.read_bytes() for p in sorted((run / "encoder").glob("*.safetensors"))}


def untimed(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in lines(run)]


def only(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def killed(store, tmp_path_factory):
    """Runs with everything that has a state: undisturbed, killed, and stopped by signals."""
    if not hasattr(os, "fork"):
        pytest.skip("needs POSIX processes and signals")
    folder = tmp_path_factory.mktemp("killed")
    config = tiny(store, folder, steps=14, log_every=1, checkpoint_every=3, ema=0.9)
    config = replace(config, data=replace(config.data, start_crop=32))
    config = replace(config, loss=replace(config.loss, ridge_weight=0.4, deep_weight=0.5))
    save_config(config, folder / "c.yaml")
    argv, rng = [str(folder / "c.yaml"), "--train.amp", "float16"], random.Random(0)
    outs = {name: str(folder / name) for name in ("whole", "killed", "stopped", "reading")}
    # Only the undisturbed run has processes that read data: they must not change what is learned.
    jobs = [{"argv": [*argv, "--data.workers", "2"], "out": outs["whole"]}]
    for number, at in enumerate(sorted(rng.sample(range(1, 14), 4))):
        start = {"resume": True, "argv": []} if number else {"argv": argv}
        jobs.append({**start, "out": outs["killed"], "at": at})
    jobs.append({"argv": [], "out": outs["killed"], "resume": True})
    for number, name in enumerate([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]):
        start = {"resume": True, "argv": []} if number else {"argv": argv}
        jobs.append({**start, "out": outs["stopped"], "at": 3 + 3 * number, "sent": int(name)})
    jobs.append({"argv": [], "out": outs["stopped"], "resume": True})
    # Ctrl-C and schedulers signal the whole group, the processes that read included.
    jobs.append({"argv": [*argv, "--data.workers", "1"], "out": outs["reading"], "at": 2,
                 "sent": int(signal.SIGINT), "group": True})  # fmt: skip
    statuses, stderr = drive(jobs)
    return {k: only(Path(v)) for k, v in outs.items()}, statuses, stderr


def test_a_killed_run_goes_on_to_the_same_bytes(killed):
    runs, statuses, _ = killed
    assert statuses[:6] == [0, -9, -9, -9, -9, 0]
    assert weights(runs["killed"]) == weights(runs["whole"])
    assert untimed(runs["killed"]) == untimed(runs["whole"])
    assert [row["step"] for row in lines(runs["whole"])] == list(range(1, 15))


def test_a_signalled_run_saves_says_how_to_go_on_and_loses_nothing(killed):
    runs, statuses, stderr = killed
    assert statuses[6:10] == [143, 128 + signal.SIGUSR1, 130, 0]
    assert weights(runs["stopped"]) == weights(runs["whole"])
    assert untimed(runs["stopped"]) == untimed(runs["whole"])
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        assert f"{name} at step" in stderr
    assert f"ssl-flow train --resume {runs['stopped']}" in stderr


def test_a_signal_to_the_whole_group_saves_too(killed):
    runs, statuses, _ = killed
    assert statuses[10] == 130
    assert any((runs["reading"] / "checkpoints").glob("step-*.pt"))
    assert not (runs["reading"] / "encoder").exists()


def test_the_last_two_checkpoints_and_the_best_are_kept(killed):
    runs, _, _ = killed
    for run in (runs["whole"], runs["killed"], runs["stopped"]):
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert names == ["best.pt", "step-00000012.pt", "step-00000014.pt"]
    rows = lines(runs["whole"])
    windows = [rows[start : start + 3] for start in range(0, 14, 3)]
    excess = [
        [row["kl"] + 0.4 * row["ridge"] + 0.5 * row["deep"] for row in window] for window in windows
    ]
    means = [sum(window) / len(window) for window in excess]
    best = torch.load(runs["whole"] / "checkpoints" / "best.pt", weights_only=True)["progress"]
    assert best["best"] == pytest.approx(-min(means))
    assert best["step"] == windows[means.index(min(means))][-1]["step"]


def test_a_signal_at_a_step_that_saves_anyway_does_not_spoil_the_choice_of_the_best(
    store, tmp_path, finished, monkeypatch
):
    closed = []
    stop_at_step(monkeypatch, FlowTask, 4)
    monkeypatch.setattr(loop.Metrics, "close", lambda metrics: closed.append(metrics))
    with pytest.raises(Interrupted):
        pretrain(tiny(store, tmp_path))
    assert len(closed) == 1
    run = only(tmp_path)
    progress = read_checkpoint(run / "checkpoints" / "step-00000004.pt")["progress"]
    assert progress["window"] == []
    assert progress["best"] == -min(row["kl"] for row in lines(run))
    pretrain(tiny(store, tmp_path), resume=run)
    best = [read_checkpoint(r / "checkpoints" / "best.pt")["progress"] for r in (run, finished)]
    assert best[0] == best[1]


def test_an_edited_weight_decay_holds_after_a_resume(store, tmp_path, finished, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = load_config(str(run / "config.yaml"))
    save_config(
        replace(config, train=replace(config.train, weight_decay=0.25)), run / "config.yaml"
    )
    real, seen = loop.take_step, []
    monkeypatch.setattr(
        loop,
        "take_step",
        lambda *a: seen.append([g["weight_decay"] for g in a[2].param_groups]) or real(*a),
    )
    assert train_command(["--resume", str(run), "--train.steps", "7"]) == 0
    assert seen == [[0.25, 0.0]]


def test_a_finished_run_can_be_made_longer_and_nothing_else(store, tmp_path, finished, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = lines(run)
    assert train_command(["--resume", str(run), "--train.steps", "8"]) == 0
    rows = lines(run)
    assert rows[:3] == before
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    rate = learning_rate(
        load_config(str(run / "config.yaml")), 7
    )  # the schedule is that of 8 steps
    assert rows[-1]["learning_rate"] == rate > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 8
    assert weights(run) != weights(finished)
    capsys.readouterr()
    for wrong, message in [(["--train.steps", "7"], "not shorter"), (["--seed", "1"], "--seed 1")]:
        assert train_command(["--resume", str(run), *wrong]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="keeps its own"):
        pretrain(replace(load_config(str(run / "config.yaml")), seed=1), resume=run)


class Part:
    """Something with a state."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = int(state["value"])


def checkpoints(run):
    for step in (1, 2, 3):
        save_checkpoint(run, Progress(step), {"part": Part(step)})
    return run / "checkpoints" / "step-00000003.pt"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "zeros"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, damage):
    newest = checkpoints(tmp_path)
    data = bytearray(newest.read_bytes())
    data[data.index(b"value") + 1] ^= 255
    halves = {"cut": data[: len(data) // 2], "empty": b"", "flipped": data, "zeros": bytes(2000)}
    newest.write_bytes(halves[damage])
    part = Part(0)
    assert load_checkpoint(tmp_path, {"part": part}).step == part.value == 2
    printed = capsys.readouterr().out
    assert "step-00000003.pt is damaged" in printed
    assert "going on from step-00000002.pt" in printed


READERS = """
import os, signal
from ssl_flow.config import Config, DataConfig
from ssl_flow.training.batches import make_loader, reading
from ssl_flow.training.distributed import World
import torch

if __name__ == "__main__":
    config = Config(data=DataConfig(workers=1))
    with reading(make_loader(config, range(99), list, World(torch.device("cpu")), 0)) as batches:
        next(batches)
        print(batches._workers[0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_killed_run_leaves_no_process_that_reads(tmp_path):
    (tmp_path / "readers.py").write_text(READERS)
    command = [sys.executable, str(tmp_path / "readers.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    reader = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 30
    while reader.exists() and " Z " not in reader.read_text():
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.1)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused(store, tmp_path, finished, capsys, legacy):
    run, trace = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(finished, run)
    pickle.loads(pickle.dumps(Malicious(trace)))
    trace.unlink()  # so it would have
    for path in (run / "checkpoints").iterdir():
        torch.save({"progress": {"step": Malicious(trace)}}, path,
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
    assert train_command(["--resume", str(run)]) == 2
    refusal = "was not opened, since loading it could run code (it asks for "
    assert refusal in capsys.readouterr().err
    assert train_command(["--init-from", str(run / "checkpoints" / "best.pt"),
                          "--data.store", str(store), "--out", str(tmp_path)]) == 2  # fmt: skip
    assert f"best.pt {refusal}" in capsys.readouterr().err
    assert not trace.exists()


def test_a_checkpoint_of_another_architecture_is_told_so(tmp_path):
    checkpoints(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(tmp_path, {"other": Part(0)})
