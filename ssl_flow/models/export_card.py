"""The model card of an exported encoder, written from its run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from ssl_flow import __version__
from ssl_flow.models.encoder import Encoder
from ssl_flow.models.export_graph import outputs

_USE = {
    "timm": 'timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)',
    "hub": 'timm.create_model("hf-hub:USER/NAME", pretrained=True, features_only=True)',
    "torchvision": """model = torchvision.models.{architecture}(weights=None)
model.fc = torch.nn.Identity()
model.load_state_dict(safetensors.torch.load_file("FOLDER/model.safetensors"), strict=True)""",
    "onnx": """session = onnxruntime.InferenceSession("FOLDER/model.onnx")
session.run(None, {{"images": images}})   # {outputs}""",
    "torch-export": """program = torch.export.load("FOLDER/model.pt2").module()
program(images)   # {outputs}""",
}


def write_card(
    encoder: Encoder, folder: Path, to: str, run: Path | None, licence: str, checks: list[str]
) -> None:
    """Write `README.md`: how to load it, what it was taught, what it scored, SHA-256 of its files.

    `run` is the training run that it comes from, if any; `licence` is named as on the Hub; `checks`
    tell what was compared after loading.
    """
    name = encoder.architecture.split(".")[0]
    use = _USE[to].format(architecture=name, outputs=", ".join(outputs(encoder)))
    if encoder._norm and to in ("timm", "hub"):
        use += "   # the last blocks, before the final norm"
    if type(encoder.backbone).__module__.startswith("ssl_flow"):
        use = f"import ssl_flow.models   # tells timm of {name}\n{use}"
    images = encoder.normalization
    what = "four blocks after the final norm" if encoder._norm else "the same features"
    sections = [
        f"---\nlibrary_name: timm\nlicense: {licence}\ntags: [image-feature-extraction]\n---",
        f"# {encoder.architecture}, an image encoder",
        f"```python\n{use}\nssl_flow.load_encoder('FOLDER')   # {what}\n```",
        "## Images and features",
        f"RGB in 0..1, minus {_numbers(images.mean)}, divided by {_numbers(images.std)}; trained "
        f"at {encoder.input_size[0]} x {encoder.input_size[1]} pixels. Any size: ssl_flow and the "
        "graphs (ONNX, torch.export; sides above one cell) pad to whole cells and crop back.\n\n"
        f"Channels {encoder.channels} at strides {encoder.strides}."
        + (f" Embedding: {encoder.head.embedding_dim} numbers a pixel of the grid of stride 4, "
           "unit length (`head.safetensors`)." if encoder.head is not None else ""),
        *(_history(run) if run else []),
        "## Checked after loading",
        "\n".join(f"- {line}" for line in checks),
        "## SHA-256",
        "\n".join(
            f"    {hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}"
            for file in sorted(folder.iterdir())
        ),
        f"Exported by ssl_flow {__version__}.",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _history(run: Path) -> list[str]:
    """What a run was taught and what it scored."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    data, train, start = config["data"], config["train"], config["model"].get("init_from")
    parts = [
        "## Pretraining",
        f"Self-supervised by optical flow: {config['loss']['objective']}, {train['steps']} steps "
        f"of {train['batch_size']} crops of {data['crop']} px from the store "
        f"`{Path(data['store']).name}`, learning rate {train['learning_rate']:g}, "
        f"seed {config['seed']}, start: "
        + (f"the weights of {Path(start).name}." if start else "random weights."),
    ]
    results = run / "results.json"
    probe = json.loads(results.read_text()).get("linear_probe") if results.is_file() else None
    if probe:
        data = Path(probe["data"]["spec"]).name
        rows = [f"| {name} | {probe[name]['miou']:.3f} | {probe[name]['pixel_accuracy']:.3f} |"
                for name in ("pretrained", "random") if name in probe]  # fmt: skip
        head = "| encoder | mIoU | pixel accuracy |\n|---|---|---|\n"
        settings = ", ".join(f"{key} {value}" for key, value in probe["protocol"].items())
        parts += [
            f"Linear probe, {data} {probe['data']['split']}, {probe['data']['images']} images:",
            head + "\n".join(rows),
            f"Protocol: {settings}.",
        ]
    return parts


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
