import subprocess
import sys

import pytest

import ssl_flow
from ssl_flow.cli import main


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


@pytest.mark.parametrize(
    "command",
    [
        "flow",
        "merge-flow",
        "show flow",
        "show run",
        "show embedding",
        "show heatmap",
        "train",
        "eval linear-probe",
        "eval suite",
        "eval loc2vec",
        "loc2vec rasterize",
        "loc2vec embed",
        "loc2vec neighbours",
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_import_is_light():
    """torch takes seconds; nobody who only asks for the version should wait for it."""
    code = "import sys, ssl_flow; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_core_rooms_need_torch_numpy_timm_and_opencv_alone():
    code = (
        "import sys\n"
        "names = 'av tyro tensorboard matplotlib jinja2 tqdm yaml zstandard ray triton'\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        "import ssl_flow.losses, ssl_flow.models, ssl_flow.flow\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
