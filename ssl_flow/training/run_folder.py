"""A run's folder: a new one, or the right one to go on with."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ssl_flow.config import Config, load_config


def check_same_run(config: Config, run: Path) -> None:
    """ValueError unless `config` is the run's own, or that with a larger `train.steps`."""
    saved = load_config(str(run / "config.yaml"))
    longer = replace(saved, train=replace(saved.train, steps=config.train.steps))
    if config != longer:
        raise ValueError(f"a resumed run keeps its own {run / 'config.yaml'}")
    if config.train.steps < saved.train.steps:
        raise ValueError(
            f"train.steps is {config.train.steps}, but {run} has {saved.train.steps}: a resumed "
            "run can be made longer, not shorter"
        )


def new_run_folder(config: Config) -> Path:
    """Make a folder named by the time of day in `config.out`."""
    base = Path(config.out) / time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        run = base if attempt == 0 else base.with_name(f"{base.name}-{attempt}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        return run
    raise FileExistsError(f"cannot make a new run folder beside {base}")
