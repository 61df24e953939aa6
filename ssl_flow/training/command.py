"""`ssl-flow train`: the command line around `pretrain`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import tyro

from ssl_flow.config import Config, load_config
from ssl_flow.models import WeightsError
from ssl_flow.training.distributed import is_main_process
from ssl_flow.training.loop import pretrain
from ssl_flow.training.safety import CollapseError, Interrupted

_REFUSALS = (
    ValueError, OSError, ImportError, FloatingPointError, WeightsError, CollapseError, MemoryError,
)  # fmt: skip


def train_command(argv: list[str]) -> int:
    """`ssl-flow train [CONFIG] [--key.subkey VALUE]...` = `python train.py ...`.

    `--resume RUN` goes on with a run (`--train.steps N` beside it makes it longer),
    `--init-from SPEC` is short for `--model.init-from SPEC`.

    Returns:
        0; 2 for bad input and a run that failed, told on stderr; 128 + the signal when one
        stopped the run.
    """
    parser = argparse.ArgumentParser(prog="ssl-flow train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--init-from")
    known, rest = parser.parse_known_args(argv)
    if known.init_from is not None:
        rest += ["--model.init-from", known.init_from]
    try:
        config = _resumed(known.resume, rest) if known.resume else _new(rest)
        run = pretrain(config, known.resume)
    except Interrupted as stopped:
        if is_main_process():
            print(f"ssl-flow train: {stopped}", file=sys.stderr)
        return stopped.exit_status
    except _REFUSALS as error:
        print(f"ssl-flow train: error: {error}", file=sys.stderr)
        return 2
    if is_main_process():
        print(f"encoder: {run / 'encoder'}    report: {run / 'report.html'}")
    return 0


def _new(argv: list[str]) -> Config:
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    return tyro.cli(
        Config,
        args=argv,
        default=load_config(name),
        prog="ssl-flow train",
        description=f"Pretrain an encoder; defaults below are those of {name!r}. Before the "
        "options: a YAML file or a preset's name. --resume RUN goes on with a run, with "
        "--train.steps N to a new length.",
    )


def _resumed(run: Path, argv: list[str]) -> Config:
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume needs a run folder with a config.yaml; got {run}")
    parser = argparse.ArgumentParser(prog="ssl-flow train --resume", add_help=False)
    parser.add_argument("--train.steps", type=int, dest="steps")
    known, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(
            f"a resumed run keeps its own config.yaml, but for a larger --train.steps; "
            f"drop {' '.join(rest)}"
        )
    config = load_config(str(run / "config.yaml"))
    if known.steps is None:
        return config
    return replace(config, train=replace(config.train, steps=known.steps))
