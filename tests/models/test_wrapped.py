import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from ssl_flow.data.segmentation import open_segmentation
from ssl_flow.evaluation import LinearProbe, run_linear_probe
from ssl_flow.evaluation.suite_command import eval_command
from ssl_flow.models import WeightsError, create_encoder, load_encoder

DINO = ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_224.dino"]


@pytest.mark.parametrize("name", DINO)
def test_patch_tokens_of_dino_are_maps_of_any_size(name):
    encoder = create_encoder(name).eval()
    stride = 14 if "14" in name else 16
    assert encoder.strides == [stride] * 4
    with torch.no_grad():
        for height, width in ((70, 33), (224, 96)):
            images = torch.randn(1, 3, height, width)
            for level in encoder.features(images):
                grid = (-(-height // stride), -(-width // stride))
                assert level.shape == (1, encoder.channels[0], *grid)
        # The tokens of the last block after the final norm, in rows from the top left.
        images = torch.randn(1, 3, 3 * stride, 5 * stride)
        tokens = encoder.backbone.forward_features(images)[:, -15:]
        last = encoder.features(images)[-1]
    torch.testing.assert_close(last, tokens.transpose(1, 2).reshape(1, -1, 3, 5))


@pytest.fixture
def offline(monkeypatch):
    """torchvision's networks with random weights."""
    real = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, weights: real(name, weights=None))


@pytest.mark.parametrize(
    ("name", "strides"),
    [("resnet18", [2, 4, 8, 16, 32]), ("convnext_tiny", [4, 8, 16, 32]),
     ("shufflenet_v2_x0_5", [2, 4, 8, 16, 32])],
)  # fmt: skip
def test_torchvision(offline, name, strides):
    torch.manual_seed(0)
    encoder = load_encoder(f"torchvision:{name}")
    torch.manual_seed(0)
    model = models.get_model(name, None).eval()
    assert encoder.strides == strides and not encoder.training
    assert encoder.normalization.mean == (0.485, 0.456, 0.406)
    images = torch.randn(1, 3, 50, 77)
    with torch.no_grad():
        for level, c, s in zip(encoder.features(images), encoder.channels, strides, strict=True):
            assert level.shape == (1, c, -(-50 // s), -(-77 // s))
        images = torch.randn(1, 3, 64, 96)  # no padding: the pooled last map is that of the model
        last = encoder.features(images)[-1]
        pooled = F.adaptive_avg_pool2d(last, 1)
        logits = model.classifier(pooled) if "conv" in name else model.fc(pooled.flatten(1))
        torch.testing.assert_close(logits, model(images))


def test_torchvision_refusals(offline, monkeypatch):
    with pytest.raises(ValueError, match=r"no model 'resnet19'; near it: resnet101"):
        load_encoder("torchvision:resnet19")
    with pytest.raises(ValueError, match=r"alexnet is no sequence.*timm:.*map of 55 x 111"):
        load_encoder("torchvision:alexnet")

    def no_network(name, weights):
        raise OSError("no network")

    monkeypatch.setattr(models, "get_model", no_network)
    with pytest.raises(WeightsError, match=r"resnet18.*no network"):
        load_encoder("torchvision:resnet18")


MODULE = """
import torch
from torch import nn
import torch.nn.functional as F

class Two(nn.Module):
    strides, channels = [2, 14], [4, 5]
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 7, 7)
    def features(self, images):
        first = self.a(images)
        return [first, self.b(first)]
    def normalize(self, images):
        return images.permute(0, 3, 1, 2) / 255 - 0.5

class Declares(Two):
    strides = [2, 4]

fixed = lambda: lambda x: F.avg_pool2d(x.view(len(x), 3, 224, 448), 4)
two, declares = Two, Declares
plain = lambda: nn.Sequential(nn.Conv2d(3, 7, 8, 8), nn.BatchNorm2d(7))
function = lambda: lambda x: {"a": F.avg_pool2d(x, 4), "b": F.avg_pool2d(x.view(x.shape), 14)}
coarse_first = lambda: lambda x: [F.avg_pool2d(x, 14), F.avg_pool2d(x, 2)]
unpadded = lambda: nn.Conv2d(3, 4, 3)
pooled = lambda: nn.AdaptiveAvgPool2d(1)
tokens = lambda: lambda x: x.flatten(2)
wrong = lambda: 3
nothing_found = lambda: lambda x: []

def closure():
    network = plain()
    return lambda x: network(x)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A module in the current folder, which is not on Python's path."""
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("my_networks", None)


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("two", [2, 14], [4, 5]),
        ("plain", [8], [7]),
        ("function", [4, 14], [3, 3]),
        ("closure", [8], [7]),
    ],
)
def test_a_users_function(user, name, strides, channels):
    encoder = load_encoder(f"python:my_networks:{name}", seed=1)
    assert (encoder.strides, encoder.channels) == (strides, channels)
    assert not any(module.training for module in encoder.modules())
    assert bool(list(encoder.parameters())) == (name != "function")
    images = encoder.normalize(torch.randint(0, 256, (2, 31, 45, 3), dtype=torch.uint8))
    for level, c, s in zip(encoder.features(images), channels, strides, strict=True):
        assert level.shape == (2, c, -(-31 // s), -(-45 // s))
    again = load_encoder(f"python:my_networks:{name}", seed=1)
    torch.testing.assert_close(again.features(images), encoder.features(images), rtol=0, atol=0)
    assert (images.min() >= -0.5) == (name == "two")  # its own normalize, else ImageNet's


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_networks", "write python:MODULE:FUNCTION"),
        ("my_networks:nothing", "has no attribute 'nothing'"),
        ("no_such_module:two", "No module named 'no_such_module'"),
        ("my_networks:wrong", "returned int; expected an nn.Module"),
        ("my_networks:nothing_found", "gives NoneType for images"),
        ("my_networks:unpadded", "map of 222 x 446 for an image of 224 x 448"),
        ("my_networks:pooled", "map of 1 x 1 for an image"),
        ("my_networks:tokens", r"gives \(1, 3, 100352\) for images"),
        ("my_networks:declares", r"strides = \[2, 4\], but its maps have \[2, 14\]"),
        ("my_networks:coarse_first", r"maps of strides \[14, 2\]; expected fine to coarse"),
        ("my_networks:fixed", "does not take images of any size"),
    ],
)
def test_wrong_results_of_a_users_function_are_refused(user, spec, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(f"python:{spec}")


def test_a_map_of_the_wrong_size_is_refused_whenever_it_comes(user):
    encoder = load_encoder("python:my_networks:plain")
    encoder.backbone[0] = nn.Conv2d(3, 7, 4, 4)
    with pytest.raises(ValueError, match="map of 4 x 4 for an image of 16 x 16"):
        encoder.features(torch.zeros(1, 3, 16, 16))


def test_the_probe_takes_them_all(user, offline, tmp_path, capsys):
    train, test = (_few(open_segmentation("synthetic", split)) for split in ("train", "test"))
    quick = LinearProbe(pixels_per_image=100, steps=20)
    for spec in ("handmade", "python:my_networks:function"):
        result = run_linear_probe(load_encoder(spec), train, test, quick)
        assert 0 < result.scores["miou"] <= 1
    arguments = ["--encoder", "no:such", "--data", "synthetic", "--out", str(tmp_path / "out")]
    assert eval_command(["linear-probe", *arguments]) == 2
    assert "python:MODULE:FUNCTION or handmade" in capsys.readouterr().err


def _few(whole):
    whole.names = whole.names[:3]
    return whole
