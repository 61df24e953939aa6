import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from ssl_flow.models import (
    PixelEmbeddingHead,
    WeightsError,
    create_encoder,
    load_encoder,
    save_encoder,
)
from ssl_flow.models.head import to_stride

ARCHITECTURES = ["resnet18", "convnext_atto", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_encoder_and_plain_timm_give_the_same_features(architecture, tmp_path):
    encoder = create_encoder(architecture, embedding_dim=8).eval()
    with torch.no_grad():  # weights and statistics that no initialisation would give
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    save_encoder(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    plain = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    final_norm = {"norm": True} if "vit" in architecture else {}  # as DINO's are evaluated
    pyramid = timm.create_model(
        f"local-dir:{tmp_path / 'encoder'}", pretrained=True, features_only=True
    ).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        ours = loaded.features(images)
        torch.testing.assert_close(ours[-1], encoder.features(images)[-1], rtol=0, atol=0)
        theirs = plain.forward_intermediates(images, intermediates_only=True, **final_norm)[-1]
        torch.testing.assert_close(ours[-1], theirs, rtol=0, atol=0)
        if not final_norm:  # which features_only leaves out
            torch.testing.assert_close(ours[-1], pyramid(images)[-1], rtol=0, atol=0)
        torch.testing.assert_close(loaded.embed(images), encoder.embed(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, "swin_tiny_patch4_window7_224", 
     "vit_tiny_patch16_224.augreg_in21k", "vit_small_patch14_dinov2"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_shapes_for_any_image_size(architecture, size):
    encoder = create_encoder(architecture, embedding_dim=8).eval()
    height, width = size
    with torch.no_grad():
        images = torch.randn(1, 3, height, width)
        for level, channels, stride in zip(
            encoder.features(images), encoder.channels, encoder.strides, strict=True
        ):
            assert level.shape == (1, channels, -(-height // stride), -(-width // stride))
        grid = (-(-height // 4), -(-width // 4))
        assert encoder.hypercolumn(images).shape == (1, sum(encoder.channels), *grid)
        embedding = encoder.embed(images)
        assert embedding.shape == (1, 8, *grid)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(1, *grid))


@pytest.mark.parametrize("size", [(96, 96), (64, 320)])
def test_vit_position_embeddings_are_interpolated_to_the_image(size):
    """The same as a model built for that size whose embeddings were resampled beforehand."""
    encoder = create_encoder("vit_tiny_patch16_224").eval()
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size).eval()
    weights = encoder.backbone.state_dict()
    grid = [side // 16 for side in size]
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], grid)
    fixed.load_state_dict(weights)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = fixed.forward_intermediates(images, norm=True, intermediates_only=True)
        torch.testing.assert_close(encoder.features(images)[-1], expected[-1])


def test_head_equals_the_concatenated_hypercolumn():
    """Projecting before upsampling is the same function as the hypercolumn head of the field."""
    torch.manual_seed(0)
    channels, strides = [5, 7, 9, 3], [2, 4, 16, 16]
    head = PixelEmbeddingHead(channels, strides, embedding_dim=4, hidden_dim=6).double().eval()
    maps = [
        torch.randn(2, c, 64 // s, 64 // s, dtype=torch.double)
        for c, s in zip(channels, strides, strict=True)
    ]
    with torch.no_grad():
        at_4 = torch.cat([F.avg_pool2d(maps[0], 2), maps[1]], dim=1)
        at_16 = torch.cat(maps[2:], dim=1)
        fine, coarse = head.projections["4"], head.projections["16"]
        column = torch.cat([fine[0](at_4), to_stride(coarse[0](at_16), 16, 4)], dim=1)
        kernel = torch.cat([fine[1].weight, coarse[1].weight], dim=1)
        torch.testing.assert_close(head(maps), head.output(F.conv2d(column, kernel)))


def test_random_spec_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = load_encoder("random:resnet18", seed=1), load_encoder("random:resnet18", seed=1)
    other = load_encoder("random:resnet18", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [e.backbone.conv1.weight for e in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_normalize_matches_the_backbones_statistics():
    encoder = create_encoder("resnet18")
    images = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(encoder.normalization.mean)) / torch.tensor(
        encoder.normalization.std
    )
    torch.testing.assert_close(encoder.normalize(images)[0, :, 0, 0], expected)


def test_run_folder_and_weights_file_are_specs_too(tmp_path):
    encoder = create_encoder("resnet18", 8).eval()
    save_encoder(encoder, tmp_path / "run" / "encoder")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for spec in (tmp_path / "run", tmp_path / "run" / "encoder" / "model.safetensors"):
            assert torch.equal(load_encoder(spec).embed(images), encoder.embed(images))


def test_normalisation_and_model_arguments_come_from_the_folder(tmp_path):
    save_encoder(create_encoder("vit_tiny_patch16_224"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["model_args"]["dynamic_img_size"] is True
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path.write_text(json.dumps(config))
    loaded = load_encoder(tmp_path)
    assert loaded.normalization.mean == (0.1, 0.2, 0.3)
    assert loaded.normalization.std == (0.4, 0.5, 0.6)


def test_errors_say_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*random:NAME"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"resnet19.*near it"):
        load_encoder("random:resnet19")
    with pytest.raises(RuntimeError, match="no embedding head"):
        load_encoder("random:resnet18").embed(torch.zeros(1, 3, 32, 32))
    save_encoder(create_encoder("resnet18"), tmp_path / "e")
    config = (tmp_path / "e" / "config.json").read_text().replace("resnet18", "resnet34")
    (tmp_path / "e" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        load_encoder(tmp_path / "e")
    for config in ("{", "[]", "{}"):
        (tmp_path / "e" / "config.json").write_text(config)
        with pytest.raises(ValueError, match=r"config\.json names no 'architecture'"):
            load_encoder(tmp_path / "e")


def test_missing_pretrained_weights_are_an_error_never_random(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match="random:resnet18 if random weights are meant"):
        load_encoder("timm:resnet18")
