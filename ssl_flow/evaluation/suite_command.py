"""`ssl-flow eval suite` and `ssl-flow eval PROTOCOL`, the suite with one protocol.

    ssl-flow eval suite --encoders mine=runs/NAME random:resnet18 handmade \\
        --data camvid:CAMVID davis:DAVIS --protocols linear-probe label-propagation --out scores
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

import tyro

from ssl_flow.evaluation.protocols import PROTOCOLS, fits, parse_settings
from ssl_flow.evaluation.suite import Options, plan, run_cells
from ssl_flow.evaluation.suite_report import write_results
from ssl_flow.models import WeightsError

_DEFAULT = ("linear-probe", "dense-knn", "clustering", "label-propagation", "classification",
            "correspondence")  # fmt: skip


@dataclass
class SuiteCommand(Options):
    """Judge frozen encoders with several protocols; tables with intervals, and a report."""

    protocols: tuple[str, ...] = ()
    """Some of those named above. By default all that take some of the data, but the slow ones:
    fine-tune, linear-probe-bn, linear-probe-plain."""
    set: tuple[str, ...] = ()
    """Changed settings, as dense-knn.neighbours=20; `ssl-flow eval dense-knn --help` has them."""


def eval_command(argv: list[str]) -> int:
    """Run `ssl-flow eval NAME ...` with the arguments that follow `eval`."""
    if argv and argv[0] in PROTOCOLS:
        return protocol_command(argv[0], argv[1:])
    if argv and argv[0] == "suite":
        return suite_command(argv[1:])
    asked = not argv or argv[0] in ("-h", "--help")
    lines = [] if asked else [f"ssl-flow eval: no protocol {argv[0]!r}"]
    lines += ["usage: ssl-flow eval NAME [--help] ...", "", "  suite: several protocols at once"]
    lines += [f"  {name}: takes {entry.kind}" for name, entry in PROTOCOLS.items()]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def suite_command(argv: list[str]) -> int:
    """Run `ssl-flow eval suite`.

    Returns:
        0; 1 when a cell failed (it is named in the table); 2 for bad input, told on stderr.
    """
    text = f"{SuiteCommand.__doc__} Protocols: {', '.join(PROTOCOLS)}."
    prog = "ssl-flow eval suite"
    command = tyro.cli(SuiteCommand, args=argv, prog=prog, description=text)
    names = command.protocols or [
        name for name in _DEFAULT if any(fits(PROTOCOLS[name].kind, spec) for spec in command.data)
    ]
    return _run("suite", argv, command, names, command.set)


def protocol_command(name: str, argv: list[str]) -> int:
    """Run `ssl-flow eval NAME`: the suite with one protocol, whose settings are flags."""
    kind = PROTOCOLS[name].settings
    # The settings' own class stays as it is: its fields become flags without a prefix.
    settings = ("settings", Annotated[kind, tyro.conf.arg(name="")], field(default_factory=kind))
    both = make_dataclass("Command", [settings], bases=(Options,))
    text = f"Judge frozen encoders by the protocol {name}, version {kind.version}."
    command: Any = tyro.cli(both, args=argv, prog=f"ssl-flow eval {name}", description=text)
    return _run(name, argv, command, {name: command.settings})


def _run(
    name: str,
    argv: Sequence[str],
    options: Options,
    protocols: Sequence[str] | dict[str, Any],
    changes: Sequence[str] = (),
) -> int:
    try:
        settings = protocols if isinstance(protocols, dict) else parse_settings(protocols, changes)
        cells = plan(options, settings)
    except (ValueError, OSError, ImportError, WeightsError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    run_cells(cells, options)
    results, text = write_results(cells, options, shlex.join(["ssl-flow", "eval", name, *argv]))
    print(json.dumps(results, indent=2) if options.json else text)
    return int(any(cell.error for cell in cells))
