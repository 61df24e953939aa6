import cv2
import numpy as np
import pytest

from ssl_flow.flow import decode_flow, encode_flow


def test_round_trip_is_within_half_a_step():
    flow = np.random.default_rng(0).normal(0, 30, (37, 53, 2)).astype(np.float32)
    decoded = decode_flow(encode_flow(flow))
    assert decoded.dtype == np.float32
    assert decoded.shape == flow.shape
    assert np.abs(decoded - flow).max() <= 1 / 32 + 1e-6
    # What is on the grid comes back exactly, and so does everything the second time.
    np.testing.assert_array_equal(decode_flow(encode_flow(decoded)), decoded)


def test_large_values_are_clipped():
    flow = np.float32([[[1e9, -1e9], [2047.9375, -2048]]])
    expected = [[[2047.9375, -2048], [2047.9375, -2048]]]
    np.testing.assert_array_equal(decode_flow(encode_flow(flow)), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    flow = np.zeros((4, 4, 2), np.float32)
    flow[1, 2, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        encode_flow(flow)


def test_the_image_is_u_above_v_in_sixteen_bit_grey():
    flow = np.zeros((3, 5, 2), np.float32)
    flow[..., 0], flow[..., 1] = 1.5, -2
    image = cv2.imdecode(np.frombuffer(encode_flow(flow), np.uint8), cv2.IMREAD_UNCHANGED)
    assert image.shape == (6, 5)
    assert image.dtype == np.uint16
    assert (image[:3] == 32768 + 24).all()
    assert (image[3:] == 32768 - 32).all()


def test_other_data_are_refused():
    eight_bit = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    for data in (b"", b"no image", eight_bit):
        with pytest.raises(ValueError, match="not an encoded flow"):
            decode_flow(data)
    with pytest.raises(ValueError, match=r"\(H, W, 2\)"):
        encode_flow(np.zeros((2, 4, 4), np.float32))
