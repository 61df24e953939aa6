"""The command `ssl-flow`: each subcommand takes the rest of the line."""

from __future__ import annotations

import importlib
import sys

import ssl_flow

# Name -> module, function, one line of help. Imported only when called: --help stays instant.
_COMMANDS = {
    "flow": ("ssl_flow.flow.command", "flow_command", "videos -> a store of frames and flow"),
    "merge-flow": ("ssl_flow.flow.merge", "merge_command", "several stores -> one"),
    "show flow": ("ssl_flow.flow.show", "show_flow_command", "a store -> a sheet of pictures"),
    "show run": ("ssl_flow.evaluation.report", "show_run_command", "runs -> curves and report"),
    "show embedding": (
        "ssl_flow.evaluation.embedding_command",
        "show_embedding_command",
        "a video -> what an encoder sees in it",
    ),
    "show heatmap": (
        "ssl_flow.evaluation.heatmap_command",
        "show_heatmap_command",
        "an image -> what is alike, what speaks for a class",
    ),
    "train": ("ssl_flow.training.command", "train_command", "a store -> an encoder with a score"),
    "eval": ("ssl_flow.evaluation.suite_command", "eval_command", "encoders, data -> a report"),
    "export": ("ssl_flow.models.export", "export_command", "an encoder -> other libraries' files"),
    "loc2vec rasterize": (
        "ssl_flow.data.osm_command",
        "rasterize_command",
        "OpenStreetMap -> layers",
    ),
    "loc2vec embed": (
        "ssl_flow.evaluation.loc2vec_command",
        "embed_command",
        "places of a map -> vectors",
    ),
    "loc2vec neighbours": (
        "ssl_flow.evaluation.loc2vec_command",
        "neighbours_command",
        "vectors -> the places most alike one",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run `ssl-flow COMMAND ...`; returns the exit status (2 = wrong usage or input)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, (module, function, _) in _COMMANDS.items():
        words = name.split()
        if argv[: len(words)] == words:
            status: int = getattr(importlib.import_module(module), function)(argv[len(words) :])
            return status
    if argv == ["--version"]:
        print(ssl_flow.__version__)
        return 0
    words = [word for word in argv if word not in ("-h", "--help")]
    listed = [name for name in _COMMANDS if name.split()[: len(words)] == words]  # `show`: its own
    lines = [] if listed else [f"ssl-flow: no command {' '.join(words[:2])!r}"]
    lines += ["usage: ssl-flow COMMAND [--help] ...", ""]
    lines += [f"  {name:<18} {_COMMANDS[name][2]}" for name in listed or _COMMANDS]
    print("\n".join(lines), file=sys.stdout if listed else sys.stderr)
    return 0 if listed else 2


if __name__ == "__main__":
    sys.exit(main())
