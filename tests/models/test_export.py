"""Each export is loaded by the library it is for, and gives the encoder's features."""

import hashlib
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

from ssl_flow.cli import main
from ssl_flow.evaluation.pixel_features import check_features
from ssl_flow.models import (
    Normalization,
    create_encoder,
    create_tile_encoder,
    export,
    load_encoder,
    save_encoder,
    save_tile_encoder,
)
from ssl_flow.models.export import export_encoder
from ssl_flow.models.export_graph import export_program

NORMALIZATION = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
ROOT = Path(__file__).parents[2]


def _saved(folder, architecture, embedding_dim=4):
    torch.manual_seed(0)
    encoder = create_encoder(architecture, embedding_dim, hidden_dim=8).eval()
    encoder.normalization, encoder.input_size = NORMALIZATION, (96, 128)
    with torch.no_grad():  # no statistic stays as every new network has it
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    save_encoder(encoder, folder)
    return encoder


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_timm(tmp_path, images):
    encoder = _saved(tmp_path / "e", "test_resnet")
    checks = export_encoder(tmp_path / "e", "timm", tmp_path / "out")
    assert len(checks) == 4 and all("largest error 0.0e+00" in line for line in checks)
    source = f"local-dir:{tmp_path / 'out'}"
    pyramid = timm.create_model(source, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        for a, b in zip(pyramid(images), encoder.features(images), strict=True):
            assert torch.equal(a, b)
    assert pyramid.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert pyramid.pretrained_cfg["input_size"] == (3, 96, 128)
    again = load_encoder(tmp_path / "out")
    assert again.normalization == NORMALIZATION and again.input_size == (96, 128)
    assert "0 elsewhere" in again.report


def test_a_vit_of_one_size_keeps_its_position_embeddings_in_timm(tmp_path):
    """DINOv2's are of 518 pixels, which timm would resample to 224 if nothing said so."""
    save_encoder(load_encoder("random:vit_small_patch14_dinov2"), tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert network.pos_embed.shape[1] == 37 * 37 + 1


def test_torchvision_and_its_segmentation_and_detection_networks(tmp_path, images):
    encoder = _saved(tmp_path / "e", "resnet18")
    export_encoder(tmp_path / "e", "torchvision", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    network = torchvision.models.resnet18().eval()
    network.fc = torch.nn.Identity()
    network.load_state_dict(weights, strict=True)
    with torch.no_grad():
        last = encoder.features(images)[-1]
        torch.testing.assert_close(network(images), last.mean((2, 3)))
        fpn = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None
        ).eval()
        fpn.body.load_state_dict(weights, strict=True)
        torch.testing.assert_close(fpn.body(images)["3"], last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_torchvision_segmentation(kind, tmp_path, images):
    encoder = load_encoder("random:resnet50")
    save_encoder(encoder, tmp_path)
    network = torchvision.models.get_model(kind, weights=None, weights_backbone=None).eval()
    network.backbone.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    with torch.no_grad():  # later stages are dilated there
        early = network.backbone.layer2(
            network.backbone.layer1(network.backbone.maxpool(_stem(network.backbone, images)))
        )
        torch.testing.assert_close(early, encoder.features(images)[2])
        assert network(images)["out"].shape == (2, 21, 64, 96)


def _stem(backbone, images):
    return backbone.relu(backbone.bn1(backbone.conv1(images)))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_segmentation_models_pytorch(architecture, tmp_path, images):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="not installed")
    encoder = _saved(tmp_path / "e", architecture)
    if architecture == "test_vit":
        network = smp.DPT(f"tu-local-dir:{tmp_path / 'e'}", encoder_weights="its own").eval()
    else:
        network = smp.Unet(f"tu-local-dir:{tmp_path / 'e'}", encoder_weights="its own").eval()
        with torch.no_grad():
            last = network.encoder(images)[-1]
            assert torch.equal(last, encoder.features(images)[-1])
    with torch.no_grad():
        assert network(images).shape == (2, 1, 64, 96)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_onnx_for_any_batch_and_size(architecture, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    encoder = _saved(tmp_path / "e", architecture)
    checks = export_encoder(tmp_path / "e", "onnx", tmp_path / "out")
    assert sum("onnxruntime" in line for line in checks) == 2
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    levels = len(encoder.strides)
    assert names == [*(f"stage{i + 1}" for i in range(levels)), "embedding"]
    lone = load_encoder(tmp_path / "out" / "model.onnx")
    assert (lone.channels, lone.strides) == (encoder.channels, encoder.strides)
    assert (lone.normalization, lone.input_size) == (NORMALIZATION, (96, 128))
    for size in ((1, 3, 64, 96), (3, 3, 97, 45), (2, 3, 33, 224)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = [*encoder.features(x), encoder.embed(x)]
        for a, b in zip(session.run(None, {"images": x.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4)
        for a, b in zip(lone.features(x), expected[:-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not lone.features(x.requires_grad_())[0].requires_grad
    check_features(lone, "hypercolumn")
    assert lone.backbone.digest.tolist() == list(
        hashlib.sha256((tmp_path / "out" / "model.onnx").read_bytes()).digest()
    )  # in the key of a cache of features


def test_a_foreign_onnx_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    value = onnx.helper.make_tensor_value_info("images", 1, ["b", 3, "h", "w"])
    other = onnx.helper.make_tensor_value_info("maps", 1, ["b", 3, "h", "w"])
    node = onnx.helper.make_node("Relu", ["images"], ["maps"])
    graph = onnx.helper.make_graph([node], "g", [value], [other])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx"
    )
    with pytest.raises(ValueError, match=r"not written by `ssl-flow export`.*python:MODULE"):
        load_encoder(tmp_path / "m.onnx")
    (tmp_path / "t.onnx").write_text("no graph")
    with pytest.raises(ValueError, match=r"t\.onnx is no readable ONNX model"):
        load_encoder(tmp_path / "t.onnx")
    with pytest.raises(FileNotFoundError, match=r"no\.onnx"):
        load_encoder(tmp_path / "no.onnx")


def test_torch_export_for_any_batch_and_size(tmp_path):
    encoder = _saved(tmp_path / "e", "test_vit")
    export_encoder(tmp_path / "e", "torch-export", tmp_path / "out")
    about = {"config.json": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=about).module()
    assert json.loads(about["config.json"])["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    for size in ((1, 3, 64, 96), (3, 3, 97, 45)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = [*encoder.features(x), encoder.embed(x)]
            for a, b in zip(program(x), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_of_windows_it_is_told_that_a_graph_takes_long(monkeypatch):
    def give_up(*_, **__):
        raise RuntimeError("given up")

    monkeypatch.setattr("torch.export.export", give_up)
    with pytest.warns(UserWarning, match="windows"), pytest.raises(ValueError, match="given up"):
        export_program(create_encoder("swin_tiny_patch4_window7_224"))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="given up"):
        warnings.simplefilter("error")
        export_program(create_encoder("test_vit"))


def test_hub_folder_and_torch_hub(tmp_path, images, monkeypatch):
    encoder = _saved(tmp_path / "e", "test_resnet")
    export_encoder(tmp_path / "e", "hub", tmp_path / "out", licence="cc-by-4.0")
    hub = torch.hub.load(str(ROOT), "encoder", str(tmp_path / "out"), source="local")
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path / "out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    downloaded = load_encoder("hf-hub:someone/encoder")
    assert asked == [("someone/encoder", ["config.json", "*.safetensors"])]
    with torch.no_grad():
        for again in (hub, downloaded):
            assert torch.equal(again.embed(images), encoder.embed(images))


def test_the_card_tells_of_the_run(tmp_path):
    run = tmp_path / "run"
    _saved(run / "encoder", "test_resnet")
    (run / "config.yaml").write_text(
        "data: {store: /disk/videos_of_birds, crop: 128}\n"
        "model: {init_from: ''}\nloss: {objective: cross_entropy}\nseed: 3\n"
        "train: {steps: 700, batch_size: 16, learning_rate: 0.001}\n"
    )
    score = {"miou": 0.4216, "pixel_accuracy": 0.8}
    data = {"spec": "camvid:/disk/camvid", "split": "val", "images": 101}
    probe = {"data": data, "protocol": {"steps": 1000}, "pretrained": score}
    (run / "results.json").write_text(json.dumps({"linear_probe": probe}))
    export_encoder(run, "hub", tmp_path / "out", licence="cc-by-4.0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\nlicense: cc-by-4.0\n")
    for said in ("700 steps of 16 crops of 128 px", "`videos_of_birds`", "seed 3", "random weights",
                 "| pretrained | 0.422 | 0.800 |", "camvid val, 101 images", "steps 1000",
                 "96 x 128", "(0.1, 0.2, 0.3)", "test_resnet"):  # fmt: skip
        assert said in card, said
    assert "/disk" not in card
    sums = dict(line.split()[::-1] for line in re.findall(r"    ([0-9a-f]{64}  .*)", card))
    assert sums.keys() == {"config.json", "model.safetensors", "head.safetensors"}
    for name, sha256 in sums.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == sha256


def test_an_encoder_from_elsewhere_gets_no_runs_history(tmp_path, monkeypatch):
    """Not even in a folder that has a config.yaml."""
    (tmp_path / "config.yaml").write_text("data: {}\n")
    monkeypatch.chdir(tmp_path)
    export_encoder("random:test_vit", "hub", "out")
    card = Path("out/README.md").read_text()
    assert "## Pretraining" not in card and "before the final norm" in card


@pytest.mark.parametrize("wrong", [0.001, float("nan")])
def test_an_embedding_is_judged_by_its_own_size(wrong, tmp_path, monkeypatch):
    """0.001 is little beside the features of some networks, and max(0.0, nan) is 0.0."""
    real = export._outputs

    def damaged(encoder, images):
        *features, embedding = real(encoder, images)
        off = wrong if encoder is not loaded[0] else 0.0
        return [1000 * features[0], *features[1:], embedding + off]

    loaded = []
    monkeypatch.setattr(export, "_outputs", damaged)
    monkeypatch.setattr(
        export, "load_encoder", lambda spec: loaded.append(load_encoder(spec)) or loaded[-1]
    )
    _saved(tmp_path / "e", "test_resnet")
    with pytest.raises(RuntimeError, match="the export is not the encoder"):
        export_encoder(tmp_path / "e", "timm", tmp_path / "out")


def test_a_wrong_export_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    save_encoder(create_encoder("test_resnet"), tmp_path / "e")
    real = export.save_encoder

    def damaged(encoder, folder):
        with torch.no_grad():
            encoder.backbone.bn1.weight.add_(0.01)
        real(encoder, folder)
        with torch.no_grad():
            encoder.backbone.bn1.weight.sub_(0.01)

    monkeypatch.setattr(export, "save_encoder", damaged)
    with pytest.raises(RuntimeError, match="the export is not the encoder: ssl_flow, noise"):
        export_encoder(tmp_path / "e", "timm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_the_command_and_its_refusals(tmp_path, capsys, monkeypatch):
    save_encoder(create_encoder("test_resnet"), tmp_path / "e")
    encoder, out = str(tmp_path / "e"), str(tmp_path / "out")
    assert main(["export", encoder, "--to", "timm", out]) == 0
    assert "timm, photograph (1 x 3 x 224 x 256): largest error 0.0e+00" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    tiles = create_tile_encoder("random:resnet18", ["red", "green", "blue"])
    save_tile_encoder(tiles, tmp_path / "tiles")
    for arguments, message in [
        ([encoder, "--to", "timm", out], "out is there already"),
        ([encoder, "--to", "torchvision", f"{out}2"], "no such ResNet as test_resnet; it has res"),
        ([encoder, "--to", "timm", f"{out}2", "--push", "a/b"], "--push goes with --to hub"),
        (["handmade", "--to", "timm", f"{out}2"], "handmade is no timm backbone of 3"),
        ([str(tmp_path / "tiles"), "--to", "timm", f"{out}2"], "is an encoder of tiles"),
        ([str(tmp_path / "x"), "--to", "timm", f"{out}2"], r"config.json is missing"),
        ([encoder, "--to", "onnx", f"{out}2"], "pip install 'ssl-flow[onnx]'"),
    ]:
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path(f"{out}2").exists()


def test_push_uploads_the_folder_only_when_asked(tmp_path, monkeypatch):
    calls = []
    api = "huggingface_hub.HfApi."
    monkeypatch.setattr(f"{api}create_repo", lambda self, name, exist_ok: calls.append(name))
    monkeypatch.setattr(f"{api}upload_folder", lambda self, **where: calls.append(where))
    arguments = ["export", "random:test_resnet", "--to", "hub"]
    assert main([*arguments, str(tmp_path / "a")]) == 0 and not calls
    assert main([*arguments, str(tmp_path / "b"), "--push", "me/it"]) == 0
    assert calls == ["me/it", {"repo_id": "me/it", "folder_path": tmp_path / "b"}]
