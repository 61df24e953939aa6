import re

import numpy as np
import pytest
import torch
from clips import texture
from safetensors.torch import save_file

from ssl_flow.flow import OPTIONS, optical_flow, optical_flows

raft_small = pytest.importorskip("torchvision.models.optical_flow").raft_small


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return raft_small(weights=None).eval()


@pytest.fixture(scope="module")
def options(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("raft") / "raft_small.pth"
    torch.save(network.state_dict(), path)
    return {"weights": str(path), "model": "small", "updates": 2}


def pair(height, width):
    image = texture(3, height, width + 4)
    return image[:, 4:].copy(), image[:, :-4].copy()


@pytest.mark.parametrize("width", [136, 131])
def test_flow_is_that_of_torchvisions_network(network, options, width):
    first, second = pair(128, width)
    # 131 columns are padded to 136: 2 before and 3 behind, copies of the edge.
    missing = 136 - width
    before = missing // 2
    images = (
        np.pad(image, ((0, 0), (before, missing - before), (0, 0)), mode="edge")
        for image in (first, second)
    )
    images = (torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in images)
    with torch.no_grad():
        expected = network(*images, num_flow_updates=2)[-1][0].permute(1, 2, 0).numpy()
    flow = optical_flow(first, second, "raft", **options)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, expected[:, before : before + width], atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 16), (17, 150)])
def test_small_and_odd_images_work(options, shape):
    flow = optical_flow(*pair(*shape), "raft", **options)
    assert flow.shape == (*shape, 2)
    assert np.isfinite(flow).all()


def test_a_batch_gives_the_flow_of_its_pairs(options):
    pairs = [pair(64, 96), pair(64, 96)[::-1]]
    flows = optical_flows(*(np.stack(x) for x in zip(*pairs, strict=True)), "raft", **options)
    for flow, images in zip(flows, pairs, strict=True):
        np.testing.assert_allclose(flow, optical_flow(*images, "raft", **options), atol=1e-3)
    empty = np.zeros((0, 32, 48, 3), np.uint8)
    assert optical_flows(empty, empty, "raft", **options).shape == (0, 32, 48, 2)


def test_grey_images_count_as_colourless(options):
    grey = [image[..., 0].copy() for image in pair(64, 96)]
    colour = [np.repeat(image[..., None], 3, -1) for image in grey]
    np.testing.assert_allclose(
        optical_flow(*grey, "raft", **options),
        optical_flow(*colour, "raft", **options),
        atol=1e-3,
    )


def test_every_option_changes_the_flow(network, options, tmp_path):
    assert set(options) == set(OPTIONS["raft"])
    images = pair(64, 96)
    default = optical_flow(*images, "raft", **options)
    assert not np.array_equal(default, optical_flow(*images, "raft", **{**options, "updates": 3}))
    path = tmp_path / "other.safetensors"
    save_file({name: 1.01 * value for name, value in network.state_dict().items()}, path)
    other = optical_flow(*images, "raft", **{**options, "weights": str(path)})
    assert not np.array_equal(default, other)
    with pytest.raises(ValueError, match="raft_large"):  # the small network's weights
        optical_flow(*images, "raft", **{**options, "model": "large"})


def test_a_file_that_changes_is_read_again(network, tmp_path):
    path = tmp_path / "weights.safetensors"
    images = pair(64, 96)
    flows = []
    for factor in (1.0, 1.01):
        save_file({name: factor * value for name, value in network.state_dict().items()}, path)
        flows.append(optical_flow(*images, "raft", weights=str(path), model="small", updates=1))
    assert not np.array_equal(*flows)


def test_without_weights_it_says_where_they_are():
    with pytest.raises(ValueError, match=r"needs the option weights.*Raft_Large_Weights.*url"):
        optical_flow(*pair(32, 32), "raft")
    with pytest.raises(FileNotFoundError, match=r"not there: /nowhere/w\.pth"):
        optical_flow(*pair(32, 32), "raft", weights="/nowhere/w.pth")


@pytest.mark.parametrize("content", [b"", b"no weights at all", None])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "w.pth":
        torch.save([1, 2], path)
    else:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " does not hold .*raft_large"):
        optical_flow(*pair(32, 32), "raft", weights=str(path))


@pytest.mark.parametrize("wrong", [{"model": "medium"}, {"updates": 0}])
def test_impossible_options_are_refused(options, wrong):
    with pytest.raises(ValueError, match="model must be 'large' or 'small'"):
        optical_flow(*pair(32, 32), "raft", **{**options, **wrong})
