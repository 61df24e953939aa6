import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from ssl_flow.evaluation.heatmap import (
    METHODS,
    check_method,
    class_map,
    region_classifier,
    similarity,
)
from ssl_flow.models import create_encoder

BOX = (8, 16, 24, 40)


def picture(seed=0, height=64, width=96):
    """Smooth noise, (H, W, 3) uint8."""
    noise = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


def encoder(name="test_resnet", seed=0, dim=None):
    torch.manual_seed(seed)
    return create_encoder(name, dim, hidden_dim=16).eval()


class Net(nn.Module):
    """Its ReLU is in place and used twice; what it gives is read by two layers."""

    strides, channels = [2], [4]

    def __init__(self, relu=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.second, self.third = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu = relu or nn.ReLU(inplace=True)

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).to(self.first.weight) / 255 - 0.5

    def features(self, images):
        x = self.relu(self.first(images))
        return [self.third(self.relu(self.second(x)) + x)]


class Rule(torch.autograd.Function):
    """A ReLU whose gradient is that of guided backpropagation, or of a deconvnet."""

    @staticmethod
    def forward(ctx, x, guided):
        ctx.save_for_backward(x)
        ctx.guided = guided
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * ((x > 0) if ctx.guided else 1), None


def test_similarity_is_the_cosine_of_the_embedding():
    network, image = encoder(dim=8), picture()
    with torch.no_grad():
        maps = network.embed(network.normalize(torch.from_numpy(image)[None]))
    for region, cells in (((41, 22, 42, 23), maps[..., 5:6, 10:11]), (BOX, maps[..., 4:10, 2:6])):
        chosen = cells.mean((2, 3), keepdim=True)
        cosine = F.cosine_similarity(maps, chosen, dim=1)[:, None]
        expected = F.interpolate(cosine, scale_factor=4, mode="bilinear")[0, 0]
        found = similarity(network, image, region)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("dim", [8, None])
def test_similarity_is_largest_at_the_chosen_pixel(dim):
    image = picture(height=61, width=90)  # no multiples of a stride
    found = similarity(encoder(dim=dim), image, (70, 30, 71, 31))
    row, column = np.unravel_index(found.argmax(), found.shape)
    cell = 4 if dim else 8
    assert found.shape == (61, 90)
    assert abs(row - 30) <= cell and abs(column - 70) <= cell


def test_cam_and_grad_cam_of_autograd_agree():
    pytest.importorskip("captum")
    image, network = picture(), encoder()
    weight, bias = torch.randn(3, network.channels[-1]), torch.randn(3)
    maps = network.features(network.normalize(torch.from_numpy(image)[None]))[-1].detach()
    maps.requires_grad_()
    F.linear(maps.mean((2, 3)), weight, bias)[0, 1].backward()
    small = (maps.grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    expected = F.interpolate(small, image.shape[:2], mode="bilinear")[0, 0].detach().numpy()
    found = class_map(network, image, "grad-cam", weight, bias, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    # Zhou's map is the same without the ReLU, times the number of cells.
    plain = torch.einsum("c,bchw->bhw", weight[1], maps.detach())[:, None]
    cam = class_map(network, image, "cam", weight, bias, 1)
    expected = F.interpolate(plain, image.shape[:2], mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(cam, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(small.detach() * maps[0, 0].numel(), plain.relu())


def test_grad_cam_plus_plus_has_the_derivatives_of_the_exponential_score():
    network, image = Net(), picture(height=6, width=4)
    weight = torch.randn(2, 4)
    maps = (
        network.features(network.normalize(torch.from_numpy(image)[None]))[0][0].detach().double()
    )
    combined = torch.zeros(3, 2, dtype=torch.float64)
    for c in range(4):
        a = 0.0
        for place in np.ndindex(3, 2):
            t = torch.zeros((), dtype=torch.float64, requires_grad=True)
            one = torch.zeros_like(maps)
            one[(c, *place)] = 1
            y = (weight[1].double() @ (maps + t * one).mean((1, 2))).exp()
            d1 = torch.autograd.grad(y, t, create_graph=True)[0]
            d2 = torch.autograd.grad(d1, t, create_graph=True)[0]
            d3 = torch.autograd.grad(d2, t)[0]
            alpha = d2 / (2 * d2 + maps[c].sum() * d3)
            a = a + (alpha * d1.relu() / y).detach()
        combined += a * maps[c]
    expected = F.interpolate(combined.relu()[None, None], (6, 4), mode="bilinear")[0, 0]
    found = class_map(network, image, "grad-cam++", weight, torch.zeros(2), 1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-7)
    assert found.max() > 0


@pytest.mark.parametrize("method", ["guided-backprop", "deconvolution"])
def test_relus_let_through_what_the_papers_say(method):
    pytest.importorskip("captum")
    image = picture(height=8, width=10)
    weight, bias = torch.randn(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    found = class_map(Net().double(), image, method, weight, bias, 1)
    reference = Net(lambda x: Rule.apply(x, method == "guided-backprop")).double()
    x = reference.normalize(torch.from_numpy(image)[None]).requires_grad_()
    F.linear(reference.features(x)[0].mean((2, 3)), weight, bias)[0, 1].backward()
    np.testing.assert_allclose(found, x.grad[0].abs().amax(0).numpy(), rtol=1e-9)
    x.grad = None
    F.linear(Net().double().features(x)[0].mean((2, 3)), weight, bias)[0, 1].backward()
    assert not np.allclose(found, x.grad[0].abs().amax(0).numpy())  # the plain gradient


def test_a_region_is_an_example_of_its_class():
    network, image = encoder(), picture()
    weight, bias = region_classifier(network, image, BOX)
    cam = class_map(network, image, "cam", weight, bias, 0)
    assert cam[16:40, 8:24].mean() > cam.mean()
    with pytest.raises(ValueError, match="the region does not differ from the whole"):
        region_classifier(network, image, (0, 0, 96, 64))


class Learner(nn.Module):
    """A small network that can learn where red and green squares lie."""

    strides, channels = [4], [16]

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = []
        for before, stride in ((3, 2), (16, 2), (16, 1)):
            layers += [nn.Conv2d(before, 16, 3, stride, 1), nn.BatchNorm2d(16), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() / 255 - 0.5

    def features(self, images):
        return [self.backbone(images)]


def squares(rng, wanted):
    """Grey noise with a square of each colour wanted (0 red, 1 green), and the places."""
    image = rng.integers(60, 200, (32, 32, 1), dtype=np.uint8).repeat(3, 2)
    places = {}
    for color, left in zip(wanted, rng.permutation([0, 16]), strict=False):
        y, x = rng.integers(0, 24), left + rng.integers(0, 8)
        image[y : y + 8, x : x + 8] = np.eye(3, dtype=np.uint8)[color] * 200
        places[color] = slice(y, y + 8), slice(x, x + 8)
    return image, places


@pytest.fixture(scope="module")
def learned():
    network, rng, head = Learner(0), np.random.default_rng(0), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 3e-3)
    for _ in range(60):
        labels = rng.integers(0, 2, 32)
        images = torch.from_numpy(np.stack([squares(rng, [label])[0] for label in labels]))
        scores = head(network.features(network.normalize(images))[0].mean((2, 3)))
        loss = F.cross_entropy(scores, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return network.eval(), head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_map_shows_what_was_learned_and_random_weights_change_it(method, learned):
    """The sanity check of Adebayo et al., with their measure, the rank correlation."""
    if method in ("grad-cam", "guided-backprop", "deconvolution"):
        pytest.importorskip("captum")
    network, weight, bias = learned
    image, places = squares(np.random.default_rng(9), [0, 1])
    rows, columns = places[0]

    def heat(network):
        if method == "similarity":
            return similarity(network, image, (columns.start, rows.start, columns.stop, rows.stop))
        return class_map(network, image, method, weight, bias, 0)

    found, changed = heat(network), heat(Learner(3).eval())
    np.testing.assert_array_equal(found, heat(network))
    assert spearmanr(found.ravel(), changed.ravel())[0] < 0.7
    if method != "deconvolution":  # which shows red and green alike, as its critics found
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert abs(row - rows.start - 4) <= 8 and abs(column - columns.start - 4) <= 8


def test_tokens_of_a_transformer_are_a_map():
    network, image = encoder("test_vit"), picture(height=160, width=160)
    weight = torch.randn(2, network.channels[-1])
    found = class_map(network, image, "cam", weight, torch.zeros(2), 0)
    with torch.no_grad():
        tokens = network.features(network.normalize(torch.from_numpy(image)[None]))[-1]
    cells = torch.einsum("c,chw->hw", weight[0], tokens[0])
    expected = F.interpolate(cells[None, None], (160, 160), mode="bilinear")[0, 0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_what_a_method_cannot_do_is_told(monkeypatch):
    pytest.importorskip("captum")
    with pytest.raises(ValueError, match="this encoder has none \\(activations: GELU"):
        check_method(encoder("test_convnext"), "guided-backprop")
    mixed = Net()
    mixed.gate = nn.Sigmoid()
    with pytest.warns(UserWarning, match="leaves the gradient of these as it is: Sigmoid"):
        check_method(mixed, "deconvolution")
    frozen = Net()
    frozen.features = lambda images: [Net.features(frozen, images)[0].detach()]
    with pytest.raises(ValueError, match="no gradient"):
        class_map(frozen, picture(), "guided-backprop", torch.ones(1, 4), torch.zeros(1), 0)


def test_a_missing_captum_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    check_method(encoder(), "cam")
    with pytest.raises(ImportError, match=r"pip install 'ssl-flow\[heatmap\]'"):
        check_method(encoder(), "grad-cam")
