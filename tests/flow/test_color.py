import numpy as np
import pytest

from ssl_flow.flow import flow_to_rgb

pytest.importorskip("torchvision")


def test_direction_is_the_hue_and_stillness_is_white():
    flow = np.zeros((4, 6, 2), np.float32)
    flow[:, 3:, 0] = 5  # to the right: red on the Middlebury wheel
    picture = flow_to_rgb(flow)
    assert picture.shape == (4, 6, 3)
    assert picture.dtype == np.uint8
    assert (picture[:, :3] == 255).all()
    assert (picture[0, 5, 0] > 200) and (picture[0, 5, 1:] < 60).all()


def test_max_magnitude_sets_the_scale():
    flow = np.full((4, 6, 2), 3, np.float32)
    pale, strong = flow_to_rgb(flow, max_magnitude=100), flow_to_rgb(flow, max_magnitude=1)
    assert pale.min() > strong.min()
    np.testing.assert_array_equal(strong, flow_to_rgb(flow * 50, max_magnitude=1))
    with pytest.raises(ValueError, match="positive"):
        flow_to_rgb(flow, max_magnitude=0)
    with pytest.raises(ValueError, match=r"\(H, W, 2\)"):
        flow_to_rgb(np.zeros((2, 4, 4), np.float32))
