import cv2
import numpy as np
import pytest

from ssl_flow.data.flow_pairs import open_flow_pairs, read_flow_pair


def _write_pair(folder, flow, known, frames):
    folder.mkdir(parents=True)
    for number, frame in zip((10, 11), frames, strict=True):
        cv2.imwrite(str(folder / f"frame{number}.png"), frame[..., ::-1])
    code = np.concatenate([known[..., None], flow[..., ::-1] * 64 + 32768], -1)  # known, v, u
    cv2.imwrite(str(folder / "flow10.png"), code.astype(np.uint16))


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    flow = rng.integers(-640, 640, (20, 30, 2)).astype(np.float32) / 64
    known = rng.random((20, 30)) < 0.8
    _write_pair(tmp_path / "Venus", flow, known, frames)
    return tmp_path, frames, flow, known


def test_a_written_pair_is_read(written):
    path, frames, flow, known = written
    pairs = open_flow_pairs(f"middlebury:{path}")
    assert pairs.names == ["Venus"] and len(list(pairs)) == len(pairs) == 1
    pair = pairs[0]
    np.testing.assert_array_equal([pair.first, pair.second], frames)
    np.testing.assert_array_equal(pair.flow, flow * known[..., None])
    np.testing.assert_array_equal(pair.known, known)
    with pytest.raises(IndexError, match="has 1 items"):
        pairs[1]


def test_synthetic_pairs_move_as_their_flow_says():
    pair = open_flow_pairs("synthetic")[0]
    again = cv2.remap(
        pair.second, (pair.flow + np.indices((128, 128))[::-1].transpose(1, 2, 0)).astype("f4"),
        None, cv2.INTER_LINEAR,
    )  # fmt: skip
    inside = (slice(16, -16),) * 2
    error, still = (np.abs(x.astype(int) - pair.first)[inside].mean() for x in (again, pair.second))
    assert error < 0.6 * still


def test_bad_pairs(written):
    path, *_ = written
    with pytest.raises(ValueError, match="unknown flow pairs 'sintel:x'; known: middlebury:PATH"):
        open_flow_pairs("sintel:x")
    with pytest.raises(FileNotFoundError, match="no pair in"):
        open_flow_pairs(f"middlebury:{path / 'Venus'}")
    (path / "Venus/frame11.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"frame11.png cannot be read"):
        open_flow_pairs(f"middlebury:{path}")[0]
    cv2.imwrite(str(path / "Venus/frame11.png"), np.zeros((20, 31, 3), np.uint8))
    with pytest.raises(ValueError, match=r"Venus: flow10.png is uint16 \(20, 30, 3\), the frames"):
        read_flow_pair(path / "Venus")
    (path / "Venus/frame11.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"frame11.png is missing"):
        open_flow_pairs(f"middlebury:{path}")
