"""`ssl-flow eval suite` and `ssl-flow eval PROTOCOL`, the suite with one protocol.

    ssl-flow eval suite --encoders mine=runs/NAME random:resnet18 handmade \\
        --data camvid:CAMVID davis:DAVIS --protocols linear-probe label-propagation --out scores
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

import tyro

from ssl_flow.evaluation.outcome import Settings
from ssl_flow.evaluation.protocols import PROTOCOLS, fits, parse_settings
from ssl_flow.evaluation.refusal import told
from ssl_flow.evaluation.suite import Cell, Options, plan, run_cells
from ssl_flow.evaluation.suite_report import write_results

_DEFAULT = ("linear-probe", "dense-knn", "clustering", "label-propagation", "classification",
            "correspondence", "loc2vec")  # fmt: skip


@dataclass
class SuiteCommand(Options):
    """Judge frozen encoders with several protocols; tables with intervals, and a report."""

    protocols: tuple[str, ...] = ()
    """Some of those named above. By default all that take some of the data, but the slow ones:
    fine-tune, linear-probe-bn, linear-probe-plain."""
    set: tuple[str, ...] = ()
    """Changed settings, as dense-knn.neighbours=20; `ssl-flow eval dense-knn --help` has them."""


def eval_command(argv: list[str]) -> int:
    """Run `ssl-flow eval NAME ...` with the arguments that follow `eval`.

    Returns:
        0; 1 when a cell failed (it is named in the table); 2 for bad input, told on stderr.
    """
    name, *words = argv or ["--help"]
    prog = f"ssl-flow eval {name}"
    command: Any = None
    settings: dict[str, Settings] | None = None
    if name == "suite":
        text = f"{SuiteCommand.__doc__} Protocols: {', '.join(PROTOCOLS)}."
        command = tyro.cli(SuiteCommand, args=words, prog=prog, description=text)
    elif name in PROTOCOLS:
        kind: Any = PROTOCOLS[name].settings
        # The settings' own class stays as it is: its fields become flags without a prefix.
        flat = ("settings", Annotated[kind, tyro.conf.arg(name="")], field(default_factory=kind))
        both = make_dataclass("Command", [flat], bases=(Options,))
        text = f"Judge frozen encoders by the protocol {name}, version {kind.version}."
        command = tyro.cli(both, args=words, prog=prog, description=text)
        settings = {name: command.settings}
    else:
        asked = name in ("-h", "--help")
        lines = [] if asked else [f"ssl-flow eval: no protocol {name!r}"]
        lines += ["usage: ssl-flow eval NAME [--help] ...", "", "  suite: several at once"]
        lines += [f"  {name}: takes {entry.kind}" for name, entry in PROTOCOLS.items()]
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    cells: list[Cell] = []

    def prepare() -> None:
        wanted = settings
        if wanted is None:
            fitting = [p for p in _DEFAULT if any(fits(PROTOCOLS[p].kind, d) for d in command.data)]
            wanted = parse_settings(command.protocols or fitting, command.set)
        cells.extend(plan(command, wanted))

    if told(prog, prepare):
        return 2
    run_cells(cells, command)
    results, text = write_results(cells, command, shlex.join(["ssl-flow", "eval", *argv]))
    print(json.dumps(results, indent=2) if command.json else text)
    print(f"report: {command.out / 'report.html'}", file=sys.stderr)
    return int(any(cell.error for cell in cells))
