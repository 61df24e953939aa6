import importlib
import importlib.metadata
import inspect
import subprocess
import sys

import cv2
import numpy as np
import pytest
from clips import texture

from ssl_flow.flow import OPTIONS, flow_validity, optical_flow, optical_flows
from ssl_flow.flow.estimators import OPENCV_METHODS

METHODS = [method for method in OPTIONS if method != "raft"]  # which needs weights: test_raft.py
# OpenCV's TV-L1 takes seconds a pair with its defaults.
QUICK = {"warps": 2, "outer_iterations": 1, "inner_iterations": 20, "scale_step": 0.5}


def shifted_pair(dx, dy):
    big = texture(1, 120, 150)
    prev = big[20:84, 20:116]
    # What is at (x, y) in prev is at (x + dx, y + dy) in next.
    return prev, big[20 - dy : 84 - dy, 20 - dx : 116 - dx]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, 2), (-2, 1)])
def test_translation_has_the_right_sign_and_axis_order(method, dx, dy):
    flow = optical_flow(*shifted_pair(dx, dy), method=method)
    assert flow.shape == (64, 96, 2)
    assert flow.dtype == np.float32
    inside = flow[12:-12, 12:-12]
    np.testing.assert_allclose(np.median(inside, axis=(0, 1)), (dx, dy), atol=0.25)


@pytest.mark.parametrize("method", METHODS)
def test_grey_images_give_the_flow_of_their_rgb_images(method):
    pair = shifted_pair(2, 1)
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in pair]
    np.testing.assert_array_equal(
        optical_flow(*grey, method=method), optical_flow(*pair, method=method)
    )


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("farneback", "pyr_scale", 0.8),
        ("farneback", "levels", 1),
        ("farneback", "winsize", 9),
        ("farneback", "iterations", 1),
        ("farneback", "poly_n", 7),
        ("farneback", "poly_sigma", 1.5),
        ("farneback", "flags", cv2.OPTFLOW_FARNEBACK_GAUSSIAN),
        ("dis", "preset", "ultrafast"),
        ("dis", "preset", "fast"),
        ("dis", "finest_scale", 2),
        ("dis", "patch_size", 12),
        ("dis", "patch_stride", 2),
        ("dis", "gradient_descent_iterations", 2),
        ("dis", "variational_refinement_iterations", 0),
        ("dis", "variational_refinement_alpha", 5.0),
        ("dis", "variational_refinement_delta", 1.0),
        ("dis", "variational_refinement_gamma", 1.0),
        ("dis", "use_mean_normalization", False),
        ("dis", "use_spatial_propagation", False),
        ("tvl1-opencv", "warps", 1),
        ("tvl1-opencv", "outer_iterations", 2),
        ("tvl1-opencv", "inner_iterations", 3),
        ("tvl1-opencv", "scale_step", 0.8),
        ("tvl1-opencv", "nscales", 1),
        ("tvl1-opencv", "tau", 0.1),
        ("tvl1-opencv", "lambda_", 0.02),
        ("tvl1-opencv", "theta", 0.1),
        ("tvl1-opencv", "epsilon", 0.5),
        ("tvl1-opencv", "gamma", 0.5),
        ("tvl1-opencv", "median_filtering", 1),
        ("tvl1", "lambda_", 0.15),
        ("tvl1", "theta", 0.1),
        ("tvl1", "tau", 0.1),
        ("tvl1", "warps", 1),
        ("tvl1", "iterations", 5),
        ("tvl1", "scale_step", 0.8),
        ("tvl1", "scales", 1),
        ("tvl1", "min_side", 64),
        ("tvl1", "median", False),
    ],
)
def test_every_option_changes_the_flow(method, name, value):
    first = texture(1, 128, 160)
    turn = cv2.getRotationMatrix2D((80, 64), 4, 1.05)
    second = cv2.warpAffine(first, turn, (160, 128))
    others = QUICK if method == "tvl1-opencv" else {}
    default = optical_flow(first, second, method, **others)
    assert not np.array_equal(
        default, optical_flow(first, second, method, **{**others, name: value})
    )


def test_every_option_is_tested():
    marks = test_every_option_changes_the_flow.pytestmark
    tested = {(method, name) for method, name, _ in marks[0].args[1]}
    # As "dis", "farneback"; test_farneback.py changes those of the last.
    same = {"dis-ultrafast", "dis-fast", "dis-medium", "farneback-opencv", "farneback-torch"}
    methods = set(METHODS) - same
    assert tested == {(method, name) for method in methods for name in OPTIONS[method]}


@pytest.mark.parametrize("method", ["tvl1", "farneback", "raft"])
def test_defaults_are_those_of_the_function(method):
    function = getattr(importlib.import_module(f"ssl_flow.flow.{method}"), method)
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    named.pop("engine", None)  # changes who computes, not what
    assert named == OPTIONS[method]


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
def test_dis_presets_have_names_of_their_own(preset):
    pair = shifted_pair(2, 1)
    expected = optical_flow(*pair, method="dis", preset=preset)
    np.testing.assert_array_equal(optical_flow(*pair, method=f"dis-{preset}"), expected)
    changed = optical_flow(*pair, method=f"dis-{preset}", patch_stride=2)
    assert not np.array_equal(changed, expected)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_the_flow_of_its_pairs(method, colour):
    pairs = [shifted_pair(*d) for d in ((3, 0), (0, 2), (-2, 1))]
    if not colour:
        pairs = [tuple(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in p) for p in pairs]
    prev, next = (np.stack(images) for images in zip(*pairs, strict=True))
    flows = optical_flows(prev, next, method)
    assert flows.shape == (3, 64, 96, 2)
    assert flows.dtype == np.float32
    for flow, pair in zip(flows, pairs, strict=True):
        np.testing.assert_allclose(flow, optical_flow(*pair, method=method), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 32, 48), (0, 32, 48, 3)])
def test_an_empty_batch_gives_no_flow(method, shape):
    assert optical_flows(*[np.zeros(shape, np.uint8)] * 2, method).shape == (0, 32, 48, 2)


@pytest.mark.parametrize("method", METHODS)
def test_images_may_be_read_only_and_lie_backwards(method):
    pair = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in shifted_pair(2, 1)]
    expected = optical_flow(*[image[::-1].copy() for image in pair], method)
    for image in pair:
        image.flags.writeable = False
    np.testing.assert_array_equal(optical_flow(*[image[::-1] for image in pair], method), expected)


@pytest.mark.parametrize("method", OPENCV_METHODS)
def test_what_is_opencvs_runs_on_no_other_device(method):
    batch = np.zeros((2, 32, 32), np.uint8)
    others = "tvl1, farneback, farneback-torch, raft"
    with pytest.raises(ValueError, match=f"'cpu' alone, not on 'cuda:0'.*: {others}"):
        optical_flows(batch, batch, method, device="cuda:0")


@pytest.mark.parametrize("device", ["gpu", "cuda:1000"])
def test_a_device_that_is_not_there_is_refused(device):
    batch = np.zeros((2, 32, 32), np.uint8)
    with pytest.raises(ValueError, match=f"device '{device}' can't be used"):
        optical_flows(batch, batch, "tvl1", device=device)


def test_opencvs_methods_do_without_torch():
    code = (
        "import sys, numpy as np; from ssl_flow.flow import optical_flow;"
        "a = np.zeros((32, 32), np.uint8); [optical_flow(a, a, m) for m in ('dis', 'farneback')];"
        "assert not {'torch', 'triton', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("farnebeck", {}, "did you mean 'farneback'"),
        ("brox", {}, "known: tvl1, farneback, dis, "),
        ("dis-fats", {}, "did you mean 'dis-fast'"),
        ("farneback", {"win_size": 9}, "did you mean 'winsize'"),
        ("dis", {"presett": "fast"}, "did you mean 'preset'"),
        ("dis", {"preset": "fats"}, "did you mean 'fast'"),
        ("dis", {"winsize": 9}, "has no option 'winsize'"),
        ("dis", {"patch_size": 0}, "at least 1, got 0"),
        ("dis-fast", {"preset": "fast"}, "has no option 'preset'"),
        ("tvl1", {"lambda": 0.1}, "did you mean 'lambda_'"),
        ("tvl1", {"device": "cuda"}, "has no option 'device'"),
        ("tvl1", {"warps": 2.5}, "'warps' of flow method 'tvl1' must be of type int"),
        ("tvl1", {"warps": True}, "must be of type int"),
        ("tvl1", {"median": 1}, "must be of type bool"),
        ("tvl1", {"tau": "x"}, "must be of type float"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(method, options, message):
    with pytest.raises(ValueError, match=message):
        optical_flow(*shifted_pair(1, 0), method=method, **options)


@pytest.mark.parametrize(
    ("prev", "next", "message"),
    [
        (np.zeros((32, 32)), np.zeros((32, 32)), "uint8 array, got float64"),
        ([[1]], [[1]], "uint8 array, got list"),
        (np.zeros((3, 32, 32), np.uint8),) * 2 + (r"RGB or \(H, W\) grey",),
        (np.zeros((32, 32, 4), np.uint8),) * 2 + (r"RGB or \(H, W\) grey",),
        (np.zeros((32, 32), np.uint8), np.zeros((32, 33), np.uint8), "must be equal"),
        (np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8), "must be equal"),
        (np.zeros((15, 32), np.uint8),) * 2 + ("at least 16",),
    ],
)
def test_unusable_images_are_refused(prev, next, message):
    with pytest.raises(ValueError, match=message):
        optical_flow(prev, next)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32), r"\(B, H, W, 3\) RGB or \(B, H, W\) grey"),
        ((32, 32, 3), "32x3 pixels"),
        ((2, 32, 32, 4), r"\(B, H, W, 3\) RGB"),
        ((2, 15, 32), "at least 16"),
        ((2, 32, 15, 3), "32x15 pixels"),
    ],
)
def test_unusable_batches_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        optical_flows(*[np.zeros(shape, np.uint8)] * 2)


def test_whole_numbers_stand_for_fractions():
    pair = shifted_pair(1, 0)
    expected = optical_flow(*pair, "tvl1", lambda_=1.0)
    np.testing.assert_array_equal(optical_flow(*pair, "tvl1", lambda_=1), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (200, 16), (17, 31)])
def test_the_smallest_images_work(method, shape):
    image = texture(2, *shape)
    flow = optical_flow(image, np.roll(image, 1, axis=1), method=method)
    assert flow.shape == (*shape, 2)
    assert np.isfinite(flow).all()


def test_missing_optflow_says_how_to_mend_it(monkeypatch):
    monkeypatch.delattr(cv2, "optflow", raising=False)
    first, second = shifted_pair(1, 0)
    with pytest.raises(RuntimeError) as caught:
        optical_flow(first, second, method="tvl1-opencv")
    message = str(caught.value)
    installed = [
        dist.metadata["Name"]
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"].lower().startswith("opencv")
    ]
    for name in installed:
        assert name in message
    assert "pip uninstall -y opencv" in message
    assert "pip install --no-cache-dir opencv-contrib-python-headless" in message
    for method in set(METHODS) - {"tvl1-opencv"}:  # the others do not need it
        optical_flow(first, second, method=method)


def test_validity_marks_targets_outside_the_image():
    flow = np.zeros((20, 30, 2), np.float32)
    flow[..., 0] = 5
    valid = flow_validity(flow)
    assert valid.dtype == bool
    assert valid[:, :25].all()
    assert not valid[:, 25:].any()
    flow[..., 0], flow[..., 1] = 0, -3
    valid = flow_validity(flow)
    assert valid[3:].all()
    assert not valid[:3].any()


def test_validity_compares_forward_and_backward_flow():
    flow = np.zeros((20, 40, 2), np.float32)
    flow[..., 0] = 4
    backward = -flow
    backward[:, 20:] = 0  # contradicts the pixels that move there: x >= 16
    valid = flow_validity(flow, backward)
    assert valid[:, :16].all()
    assert not valid[:, 16:].any()
    # |wf + wb|^2 < 0.01 (|wf|^2 + |wb|^2) + 0.5 at its border: 4 and -4 + d, d^2 = 0.5 + 0.01 (...)
    for d, expected in ((0.85, True), (0.95, False)):
        assert flow_validity(flow, -flow + np.float32([d, 0]))[:, :30].all() == expected


def test_validity_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(H, W, 2\)"):
        flow_validity(np.zeros((2, 8, 8), np.float32))
    with pytest.raises(ValueError, match="backward"):
        flow_validity(np.zeros((8, 8, 2), np.float32), np.zeros((8, 9, 2), np.float32))


# Mean endpoint error in pixels of each method at native size is below these.
CEILING = {
    "tvl1": 0.14,
    "farneback": 0.75,
    "dis": 0.30,
    "dis-ultrafast": 0.6,
    "dis-fast": 0.5,
    "dis-medium": 0.30,
    "tvl1-opencv": 0.25,
    "farneback-opencv": 0.75,
    "farneback-torch": 0.75,
}


@pytest.mark.parametrize("method", METHODS)
def test_endpoint_error_on_middlebury(method, data):
    folder = data / "flow/middlebury/RubberWhale"
    prev, next = (cv2.imread(str(folder / f"frame{i}.png")) for i in (10, 11))
    truth = cv2.imread(str(folder / "flow10.png"), cv2.IMREAD_UNCHANGED)  # known, v, u
    true_flow = (truth[..., :0:-1].astype(np.float32) - 32768) / 64
    others = QUICK if method == "tvl1-opencv" else {}
    flow = optical_flow(prev[..., ::-1].copy(), next[..., ::-1].copy(), method, **others)
    error = np.linalg.norm(flow - true_flow, axis=-1)[truth[..., 0] > 0]
    assert error.mean() < CEILING[method]
