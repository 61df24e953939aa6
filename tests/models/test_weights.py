"""Checkpoints of other libraries, and files that would like to run code."""

import argparse
import contextlib
import pickle
import re
import shutil
from pathlib import PurePosixPath

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from ssl_flow.models import create_encoder, load_encoder, save_encoder
from ssl_flow.models.weights import read_tensors
from ssl_flow.training.initial import initialize


def _network(name="test_resnet", seed=1, **options):
    torch.manual_seed(seed)
    network = timm.create_model(name, **options).eval()
    with torch.no_grad():  # no statistic stays as every new network has it
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    return network


def _under(prefix, network):
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def _same(encoder, network, **options):
    """Whether the encoder is that timm network, by the last map."""
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = network.forward_intermediates(images, intermediates_only=True, **options)
        return torch.equal(encoder.features(images)[-1], expected[-1])


PREFIXES = ["", "module.", "backbone.", "encoder.", "model.module.backbone.", "online.trunk."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_removed_as_a_prefix(prefix, tmp_path):
    network = _network()  # with its classifier
    heads = {f"{prefix}".split(".")[0] + "_head.0.weight": torch.zeros(3)} if prefix else {}
    torch.save({"state_dict": _under(prefix, network) | heads, "epoch": 3}, tmp_path / "w.pth")
    encoder = load_encoder(f"timm:test_resnet@{tmp_path / 'w.pth'}")
    assert _same(encoder, network) and not encoder.training
    count = len(network.state_dict()) - 2
    aside = f"left aside: 2 of a classifier, {len(heads)} elsewhere in the file"
    found = f"{count} tensors taken under 'state_dict.{prefix}', {aside}"
    assert found in encoder.report and "missing" not in encoder.report


def test_a_name_that_begins_with_the_letters_of_a_prefix_keeps_them(tmp_path):
    """`lstrip("module.")` would have made `model` out of `module.model`, less of `module.mlp`."""
    network = _network("test_vit")
    assert any(".mlp." in name for name in network.state_dict())
    torch.save(_under("blocks.norm.mlp.", network), tmp_path / "w.pth")
    encoder = load_encoder(f"timm:test_vit@{tmp_path / 'w.pth'}")
    assert _same(encoder, network, norm=True)


def test_strict_names_what_is_missing_and_unexpected(tmp_path):
    tensors = _under("backbone.", _network())
    del tensors["backbone.conv1.0.weight"]
    tensors["backbone.extra.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "w.safetensors")
    spec = f"timm:test_resnet@{tmp_path / 'w.safetensors'}"
    with pytest.raises(ValueError, match=r"missing: conv1\.0\.weight\n.*unexpected: extra\.weight"):
        load_encoder(spec)
    with pytest.warns(UserWarning, match=r"missing: conv1\.0\.weight"):
        encoder = load_encoder(spec, strict=False)
    assert torch.equal(encoder.backbone.bn1.weight, tensors["backbone.bn1.weight"])


def test_another_architectures_weights_are_refused_even_when_not_strict(tmp_path):
    torch.save(_network("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit VisionTransformer"):
        load_encoder(f"timm:test_vit@{tmp_path / 'w.pth'}", strict=False)
    wider = {n: torch.cat([t, t]) if t.ndim else t for n, t in _network().state_dict().items()}
    torch.save(wider | {"bn1.weight": _network().bn1.weight}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"wrong: .* is \(\d+.*, expected"):
        load_encoder(f"timm:test_resnet@{tmp_path / 'w.pth'}", strict=False)
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        load_encoder("timm:resnet18@nothing.pth")


def test_kernels_of_another_patch_size_are_refused_not_resampled(tmp_path):
    tensors = _network("vit_tiny_patch16_224", num_classes=0).state_dict()
    patches = {"patch_embed.proj.weight": torch.randn(192, 3, 8, 8)}
    torch.save(tensors | patches, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"wrong: patch_embed.* is \(192, 3, 8, 8\), expected"):
        load_encoder(f"timm:vit_tiny_patch16_224@{tmp_path / 'w.pth'}")


def test_lightlys_sequence_of_children(tmp_path):
    """backbone = nn.Sequential(*list(resnet.children())[:-1]), in a Lightning checkpoint."""
    resnet = torchvision.models.resnet18().eval()
    module = nn.ModuleDict({"backbone": nn.Sequential(*list(resnet.children())[:-1]),
                            "backbone_momentum": nn.Sequential(*list(_tv().children())[:-1]),
                            "projection_head": nn.Linear(4, 4)})  # fmt: skip
    state = {"state_dict": module.state_dict(), "hyper_parameters": {"lr": 0.1}, "loops": {}}
    torch.save(state, tmp_path / "last.ckpt")
    encoder = load_encoder(f"timm:resnet18@{tmp_path / 'last.ckpt'}")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = encoder.features(images)[-1].mean((2, 3))
        torch.testing.assert_close(pooled, module["backbone"](images).flatten(1))
    assert "under 'state_dict.backbone.'" in encoder.report


def _tv():
    return torchvision.models.resnet18()


def test_torchvisions_state_dict_by_torchvision_and_by_timm(tmp_path):
    network = torchvision.models.resnet18().eval()
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    images = torch.randn(1, 3, 64, 96)
    theirs = load_encoder(f"torchvision:resnet18@{tmp_path / 'w.pth'}")
    ours = load_encoder(f"timm:resnet18@{tmp_path / 'w.pth'}")
    assert theirs.input_size == (224, 224) and "2 of a classifier" in theirs.report
    with torch.no_grad():
        pooled = theirs.features(images)[-1].mean((2, 3))
        torch.testing.assert_close(network.fc(pooled), network(images))
        for a, b in zip(ours.features(images), theirs.features(images), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="does not fit ResNet"):
        load_encoder(f"torchvision:resnet34@{tmp_path / 'w.pth'}")


def _dino_training_file(path, teacher, **args):
    student = _network("test_vit", seed=2, num_classes=0)
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2)}
    optimizer = torch.optim.AdamW(student.parameters())
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1, 5)[1]  # of DINO's cosine_scheduler
    content = {
        "student": {f"module.{n}": t for n, t in (_under("backbone.", student) | head).items()},
        "teacher": _under("backbone.", teacher) | head,
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, **args),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    torch.save(content, path)


def test_dinos_training_file_gives_its_teacher(tmp_path):
    """Laid out as DINO's main_dino.py saves it: an argparse.Namespace and NumPy's numbers, too."""
    teacher = _network("test_vit", num_classes=0)
    _dino_training_file(tmp_path / "checkpoint.pth", teacher)
    encoder = load_encoder(f"timm:test_vit@{tmp_path / 'checkpoint.pth'}")
    assert _same(encoder, teacher, norm=True)
    assert "under 'teacher.backbone.'" in encoder.report
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    del content["teacher"]["backbone.norm.weight"]
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"(?s)teacher.*missing: norm\.weight"):  # not the student
        load_encoder(f"timm:test_vit@{tmp_path / 'checkpoint.pth'}")


def test_mocos_checkpoint_gives_its_query_encoder(tmp_path):
    """Laid out as MoCo's main_moco.py saves it: two encoders with their heads, a queue."""
    query = _network()
    tensors = _under("module.encoder_k.", _network(seed=2)) | {"module.queue": torch.zeros(3, 4)}
    tensors |= _under("module.encoder_q.", query)
    torch.save({"state_dict": tensors, "arch": "resnet"}, tmp_path / "moco.pt")
    spec = f"timm:test_resnet@{tmp_path / 'moco.pt'}"
    assert _same(load_encoder(spec), query)
    trained = create_encoder("test_resnet", 4)
    assert "start weights from timm:test_resnet@" in initialize(trained, spec)
    assert _same(trained.eval(), query)


def test_dinov2s_release_and_training_file(tmp_path):
    """A mask token beside timm's names; in training files, blocks in chunks (blocks.1.3.)."""
    network = _network("vit_small_patch14_dinov2", num_classes=0, img_size=70)
    release = network.state_dict() | {"mask_token": torch.zeros(1, 384)}
    torch.save(release, tmp_path / "release.pth")
    chunked = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 3}.{m[1]}", n): t
               for n, t in release.items()}  # fmt: skip
    torch.save({"teacher": {f"backbone.{n}": t for n, t in chunked.items()}}, tmp_path / "t.pth")
    for name in ("release.pth", "t.pth"):
        encoder = load_encoder(f"timm:vit_small_patch14_dinov2@{tmp_path / name}")
        weight = encoder.backbone.blocks[11].attn.qkv.weight
        assert torch.equal(weight, release["blocks.11.attn.qkv.weight"])
        assert encoder.input_size == (518, 518)  # the grid of 5 x 5 was brought to 37 x 37
        assert encoder.backbone.pos_embed.shape[1] == 37 * 37 + 1


def test_the_network_twice_in_a_file_is_refused(tmp_path):
    both = _under("a.", _network()) | _under("b.", _network(seed=2))
    torch.save(both, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"holds the network twice, under 'a\.' and 'b\.'"):
        load_encoder(f"timm:test_resnet@{tmp_path / 'w.pth'}")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "in a Namespace", "in a dict"])
def test_no_code_of_a_file_is_run(how, tmp_path):
    mark, file = tmp_path / "it_ran", tmp_path / "evil.pth"
    tensors = _under("module.", _network())
    if how == "in a Namespace":
        _dino_training_file(file, _network("test_vit"), evil=_Evil(mark))
    elif how == "bare pickle":
        file.write_bytes(pickle.dumps({"state_dict": tensors, "evil": _Evil(mark)}))
    else:
        content = tensors | {"evil": _Evil(mark)} if how == "in a dict" else _Evil(mark)
        torch.save(content, file, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(ValueError, match="was not opened, since loading it could run code"):
        load_encoder(f"timm:test_resnet@{file}")
    assert not mark.exists()
    with contextlib.suppress(RuntimeError):  # the file is dangerous indeed
        torch.load(file, weights_only=False)
    assert mark.exists()


def test_other_files_are_no_way_in_either(tmp_path):
    mark = tmp_path / "it_ran"
    save_encoder(create_encoder("test_resnet"), tmp_path / "e")
    torch.save(_Evil(mark), tmp_path / "e" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_encoder(tmp_path / "e")
    shutil.copy(tmp_path / "e" / "model.safetensors", tmp_path / "e" / "model.pt2")
    with pytest.raises(ValueError, match=r"can run code.*config\.json"):
        load_encoder(tmp_path / "e" / "model.pt2")
    assert not mark.exists()


def test_only_a_namespace_is_allowed_and_only_while_reading(tmp_path):
    torch.save({"args": argparse.Namespace(a=1), "w": torch.ones(2)}, tmp_path / "w.pth")
    assert read_tensors(tmp_path / "w.pth").keys() == {"w"}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)
    torch.save({"p": PurePosixPath("a")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"asks for pathlib\.PurePosixPath"):
        read_tensors(tmp_path / "w.pth")
