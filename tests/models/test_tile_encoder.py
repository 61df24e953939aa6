"""Tiles of any channels -> vectors; start weights; the folder on disk."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F

from ssl_flow.models import (
    Normalization,
    create_encoder,
    create_tile_encoder,
    load_encoder,
    load_tile_encoder,
    save_encoder,
    save_tile_encoder,
)

LAYERS = [f"layer{i}" for i in range(12)]


@pytest.mark.parametrize(
    "architecture",
    ["tile_cnn", "resnet18", "convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224"],
)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_any_backbone_any_channels(architecture, count):
    encoder = create_tile_encoder(f"random:{architecture}", LAYERS[:count], 16).eval()
    tiles = torch.randint(0, 256, (2, 64, 64, count), dtype=torch.uint8)
    with torch.no_grad():
        embedding = encoder(encoder.normalize(tiles))
    assert embedding.shape == (2, 16)
    assert not torch.allclose(embedding[0], embedding[1])
    assert not torch.allclose(embedding.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("side", [16, 33, 128])
def test_the_small_network(side):
    encoder = create_tile_encoder("random:tile_cnn", LAYERS).eval()
    assert 0.15e6 < sum(p.numel() for p in encoder.parameters()) < 0.25e6
    tiles = torch.randn(2, 12, side, side)
    with torch.no_grad():
        maps = encoder.backbone.forward_features(tiles)
        assert maps.shape == (2, 256, side // 16, side // 16)
        torch.testing.assert_close(encoder.features(tiles), maps.mean((2, 3)))
        with_classes = timm.create_model("tile_cnn", num_classes=5, in_chans=12)
        assert with_classes(tiles).shape == (2, 5)


def test_every_weight_learns():
    encoder = create_tile_encoder("random:tile_cnn", LAYERS)
    encoder(torch.randn(8, 12, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_normalisation():
    layers = create_tile_encoder("random:tile_cnn", LAYERS)
    full = torch.full((1, 2, 2, 12), 255, dtype=torch.uint8)
    torch.testing.assert_close(layers.normalize(full), torch.ones(1, 12, 2, 2))
    rgb = create_tile_encoder("random:resnet18", LAYERS[:3])
    assert rgb.normalization == create_encoder("resnet18").normalization
    own = Normalization((0.5,) * 12, (0.25,) * 12)
    given = create_tile_encoder("random:tile_cnn", LAYERS, normalization=own)
    torch.testing.assert_close(given.normalize(full), torch.full((1, 12, 2, 2), 2.0))


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_a_cross_pixel_encoder_as_the_start(architecture, tmp_path):
    """As timm makes in_chans of pretrained weights, from the folder that it reads too."""
    start = create_encoder(architecture, embedding_dim=8)
    start.normalization = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_encoder(start, tmp_path / "run" / "encoder")
    first = {"first_conv": start.backbone.pretrained_cfg["first_conv"]}
    for count in (1, 2, 3, 12):
        ours = create_tile_encoder(tmp_path / "run", LAYERS[:count]).backbone.state_dict()
        theirs = timm.create_model(
            f"local-dir:{tmp_path / 'run' / 'encoder'}",
            pretrained=True,
            in_chans=count,
            pretrained_cfg_overlay=first,
        )
        assert ours.keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours[name], value), name
    assert create_tile_encoder(tmp_path / "run", LAYERS[:3]).normalization == start.normalization


def test_a_grey_picture_in_all_channels_looks_to_the_start_as_before(tmp_path):
    start = create_encoder("resnet18").eval()
    save_encoder(start, tmp_path)
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = start.backbone(grey.expand(-1, 3, -1, -1))
        for count in (1, 3, 12):
            encoder = create_tile_encoder(tmp_path, LAYERS[:count]).eval()
            found = encoder.features(grey.expand(-1, count, -1, -1))
            assert F.cosine_similarity(found, expected).min() > 0.999


@pytest.mark.parametrize("architecture", ["tile_cnn", "resnet18", "vit_tiny_patch16_224"])
def test_saved_and_loaded(architecture, tmp_path):
    tile = {"side": 64, "metres": 400.0}
    own = Normalization(tuple(i / 20 for i in range(12)), (0.3,) * 12)
    encoder = create_tile_encoder(f"random:{architecture}", LAYERS, 7, own, tile).eval()
    with torch.no_grad():  # weights and statistics that no initialisation would give
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    save_tile_encoder(encoder, tmp_path / "run" / "encoder")
    tiles = torch.randint(0, 256, (2, 64, 64, 12), dtype=torch.uint8)
    for path in (tmp_path / "run", tmp_path / "run" / "encoder"):
        loaded = load_tile_encoder(path)
        assert not loaded.training
        assert (loaded.channels, loaded.tile, loaded.embedding_dim) == (LAYERS, tile, 7)
        with torch.no_grad():
            expected = encoder(encoder.normalize(tiles))
            assert torch.equal(loaded(loaded.normalize(tiles)), expected)
    plain = timm.create_model(f"local-dir:{tmp_path / 'run' / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        normalized = encoder.normalize(tiles)
        assert torch.equal(plain(normalized), encoder.features(normalized))


def test_its_backbone_is_an_encoder_of_maps_too(tmp_path):
    encoder = create_tile_encoder("random:resnet18", LAYERS).eval()
    save_tile_encoder(encoder, tmp_path)
    bare = load_encoder(tmp_path)
    assert bare.head is None
    tiles = torch.randn(1, 12, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(bare.features(tiles)[-1].mean((2, 3)), encoder.features(tiles))


def test_errors_say_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="12 channels and a normalization of 3"):
        three = Normalization((0.0,) * 3, (1.0,) * 3)
        create_tile_encoder("random:tile_cnn", LAYERS, normalization=three)
    with pytest.raises(ValueError, match="0 channels"):
        create_tile_encoder("random:tile_cnn", [])
    with pytest.raises(ValueError, match="resnet19"):
        create_tile_encoder("random:resnet19", LAYERS)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_tile_encoder(tmp_path)
    save_encoder(create_encoder("resnet18", 8), tmp_path / "pixels")
    with pytest.raises(ValueError, match="is no encoder of tiles"):
        load_tile_encoder(tmp_path / "pixels")
    save_tile_encoder(create_tile_encoder("random:resnet18", LAYERS), tmp_path / "tiles")
    with pytest.raises(ValueError, match=r"conv1\.weight is \(64, 12, 7, 7\).*3 channels"):
        create_tile_encoder(tmp_path / "tiles", LAYERS[:5])
    config = json.loads((tmp_path / "tiles" / "config.json").read_text())
    config["tile_encoder"]["embedding_dim"] = 3
    (tmp_path / "tiles" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"head\.safetensors does not fit"):
        load_tile_encoder(tmp_path / "tiles")
