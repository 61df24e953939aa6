"""What a run folder says about its training: config.yaml and metrics.jsonl, whole or torn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunLog:
    """The configuration and the logged numbers of one run."""

    folder: Path
    config: dict[str, Any]
    """Flat: `train.steps` -> 400. Empty without config.yaml."""
    rows: list[dict[str, Any]]
    """One a logged step, ascending: `step`, and what else was logged."""
    unreadable: int
    """Lines of metrics.jsonl that hold no step."""

    @property
    def name(self) -> str:
        """The folder's own name, in characters that can be drawn."""
        return "".join(c if c.isprintable() else "?" for c in self.folder.resolve().name)

    @property
    def summary(self) -> str:
        """Backbone, objective and steps, as far as the files tell."""
        parts = [self.config.get("model.backbone"), self.config.get("loss.objective")]
        if self.rows:
            done = self.rows[-1]["step"]
            wanted = self.config.get("train.steps", done)
            parts.append(f"{done} steps" if done == wanted else f"{done} of {wanted} steps")
        return ", ".join(str(part) for part in parts if part)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key, without what is missing or not finite."""
        rows = [row for row in self.rows if is_number(row.get(key))]
        return [row["step"] for row in rows], [row[key] for row in rows]


def is_number(value: object) -> bool:
    """Whether a value of a JSON file can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> RunLog:
    """Read a run folder; a missing file counts as an empty one, torn lines are left out.

    The lines of one step (a probe has its own) are joined; `kl` is added to those of old runs.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: config.yaml is not a YAML file of keys.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}; `ssl-flow train` prints the one it makes")
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML; put back what the run wrote: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no keys; put back what the run wrote")

    metrics, unreadable = folder / "metrics.jsonl", 0
    rows: dict[float, dict[str, Any]] = {}
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not (isinstance(row, dict) and is_number(row.get("step"))):
            unreadable += 1
            continue
        if is_number(row.get("loss")) and is_number(row.get("target_entropy")):
            row["kl"] = row["loss"] - row["target_entropy"]
        rows.setdefault(row["step"], {}).update(row)
    return RunLog(folder, _flat(config), [rows[step] for step in sorted(rows)], unreadable)


def _flat(config: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
