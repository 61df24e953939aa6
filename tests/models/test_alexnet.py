import pytest
import timm
import torch
import torch.nn.functional as F

from ssl_flow.models import create_encoder, load_encoder, save_encoder

CHANNELS, STRIDES = [96, 96, 384, 256, 4096], [4, 8, 16, 32, 32]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("alexnet_bn", embedding_dim=16, hidden_dim=8).eval()


@pytest.mark.parametrize("size", [(32, 32), (67, 67), (64, 227)])
def test_the_papers_hypercolumn_for_any_image_size(encoder, size):
    assert (encoder.channels, encoder.strides) == (CHANNELS, STRIDES)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        for level, channels, stride in zip(
            encoder.features(images), CHANNELS, STRIDES, strict=True
        ):
            assert level.shape == (1, channels, *(-(-side // stride) for side in size))
        assert encoder.embed(images).shape == (1, 16, *(-(-side // 4) for side in size))


def test_fc6_is_the_fully_connected_layer_of_a_6_x_6_map(encoder):
    """In the middle of such a map the convolution sees all of it, as AlexNet's fc6 does."""
    fc6, pooled = encoder.backbone.fc7[:2], torch.randn(2, 256, 6, 6)
    convolution, norm, _ = fc6[1]
    with torch.no_grad():
        dense = F.linear(pooled.flatten(1), convolution.weight.flatten(1))
        expected = F.relu(norm(dense[..., None, None]))[..., 0, 0]
        torch.testing.assert_close(fc6(pooled)[..., 2, 2], expected, rtol=1e-4, atol=1e-4)


def test_every_convolution_learns_and_is_batch_normalised():
    model = create_encoder("alexnet_bn", embedding_dim=4, hidden_dim=8)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    kinds = [type(m).__name__ for m in model.backbone.modules()]
    assert kinds.count("Conv2d") == kinds.count("BatchNorm2d") == 7
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_saved_folder_loads_here_and_with_timm(encoder, tmp_path):
    save_encoder(encoder, tmp_path)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = encoder.features(images)
        again = load_encoder(tmp_path)
        assert torch.equal(again.embed(images), encoder.embed(images))
        pyramid = timm.create_model(
            f"local-dir:{tmp_path}", pretrained=True, features_only=True
        ).eval()
        assert pyramid.feature_info.channels() == CHANNELS
        assert pyramid.feature_info.reduction() == STRIDES
        for ours, theirs in zip(expected, pyramid(images), strict=True):
            assert torch.equal(ours, theirs)


def test_as_a_timm_model():
    model = timm.create_model("alexnet_bn", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last, levels = model.forward_intermediates(images, [0, -1])
        assert torch.equal(levels[1], last) and levels[0].shape == (2, 96, 16, 16)
        assert torch.equal(model.forward_features(images), last)
        assert torch.equal(model(images), model.fc(last.mean((2, 3))))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', found 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")
