import numpy as np

from ssl_flow.evaluation.pictures import palette, prediction_strips


def test_palette_is_the_one_of_voc():
    colors = palette(21)
    assert colors[[0, 1, 2, 8, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [64, 0, 0], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len(np.unique(colors[:21], axis=0)) == 21


def test_strips_show_image_truth_and_prediction():
    image = np.full((10, 20, 3), 77, np.uint8)
    truth, prediction = np.zeros((10, 20), np.uint8), np.ones((10, 20), np.uint8)
    truth[:, 10:] = 255
    strips = prediction_strips([(image, truth, prediction)] * 2, classes=2, height=10)
    assert strips.shape == (20, 68, 3)  # with gaps
    assert strips[0, [0, 24, 34, 48, 58]].tolist() == [
        [77] * 3, [0, 0, 0], [224, 224, 192], [128, 0, 0], [224, 224, 192],
    ]  # fmt: skip


def test_strips_of_different_widths():
    examples = [(np.zeros((8, w, 3), np.uint8), *[np.zeros((8, w), np.uint8)] * 2) for w in (8, 4)]
    assert prediction_strips(examples, classes=1, height=8).shape == (16, 32, 3)
