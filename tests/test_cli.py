import contextlib
import subprocess
import sys

import pytest

import ssl_flow
from ssl_flow.cli import _COMMANDS, main
from ssl_flow.evaluation.protocols import PROTOCOLS


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("flow", "train", "eval"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == ssl_flow.__version__


def test_unknown_command_is_told_with_the_known_ones(capsys):
    assert main(["pretrain"]) == 2
    assert "no command 'pretrain'" in capsys.readouterr().err


def test_the_first_word_of_several_commands_lists_them(capsys):
    for words in (["show"], ["show", "--help"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "show flow" in shown and "show run" in shown and "loc2vec" not in shown


@pytest.mark.parametrize("command", [*_COMMANDS, "eval suite", *(f"eval {p}" for p in PROTOCOLS)])
def test_every_command_has_help(command, capsys):
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    assert f"usage: ssl-flow {command}" in capsys.readouterr().out


def python(code):
    """Run in a process of its own, which has imported nothing yet."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_and_help_are_light():
    """torch takes seconds; nobody who only asks for the version should wait for it."""
    heavy = {"torch", "torchvision", "timm", "cv2", "av", "matplotlib", "numpy", "tyro"}
    code = "import sys, ssl_flow\nfrom ssl_flow.cli import main\nmain({})\nprint(*sys.modules)"
    for words in ("['--version']", "['--help']", "['show', '--help']"):
        assert not heavy & set(python(code.format(words)).split())


def test_core_rooms_need_torch_numpy_timm_and_opencv_alone():
    python(
        "import sys\n"
        "names = 'av tyro tensorboard matplotlib jinja2 tqdm yaml zstandard ray triton sklearn '\n"
        "names += 'scipy onnx onnxruntime onnxscript captum osmium rasterio pyarrow pandas'\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        "import ssl_flow.losses, ssl_flow.models, ssl_flow.flow\n"
    )


def test_all_commands_start_without_the_extras():
    """What an extra is for is only imported where it is used, and then named (see smoke.py)."""
    modules = sorted({module for module, _, _ in _COMMANDS.values()})
    python(
        "import sys\n"
        "names = 'sklearn scipy onnx onnxruntime onnxscript captum osmium rasterio pyarrow ray '\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        f"import {', '.join(modules)}\n"
    )
