import errno

import numpy as np
import pytest
from clips import moving, texture

from ssl_flow.flow import Frame, VideoError
from ssl_flow.flow.pairs import MAX_GAP, USABLE_MOTION, choose_gap


def video(images, fps=30.0, begin=0.0):
    return [Frame(begin + i / fps, image) for i, image in enumerate(images)]


def shifting(step, count=90, seed=0):
    """A picture 128 pixels high that moves `step` (also a fraction) pixels to the right a frame."""
    big = texture(seed, 128, 160 + round(abs(step) * count) + 8)
    return [big[:, (o := round(step * (count - i))) : o + 160] for i in range(count)]


@pytest.mark.parametrize("step", [0.25, 0.5, 1, 2])
def test_the_gap_makes_the_motion_usable(step):
    gap = choose_gap(video(shifting(step)))
    motion = step * 30 * gap * 256 / 128  # in a picture of shorter side 256
    assert 0.9 * USABLE_MOTION <= motion <= 2.2 * USABLE_MOTION


def test_fast_motion_keeps_the_smallest_step():
    assert choose_gap(video(shifting(7))) == pytest.approx(1 / 30, abs=1e-5)
    assert choose_gap(video(shifting(16))) == pytest.approx(1 / 30, abs=1e-5)


def test_the_gap_is_a_time_whatever_the_frame_rate():
    slow = choose_gap(video(shifting(2, 60), fps=15))
    fast = choose_gap(video(shifting(0.5, 240), fps=60))
    assert slow == pytest.approx(fast, rel=0.01)


def test_a_static_video_takes_the_largest_gap():
    still = [texture(1, 128, 160)] * 60
    assert choose_gap(video(still)) == MAX_GAP


def test_a_small_thing_before_a_static_camera_counts():
    background = texture(1, 128, 160)
    images = []
    for i in range(90):
        image = background.copy()
        image[40:72, i : i + 32] = texture(5, 32, 32)  # 5 % of the picture, 1 pixel a frame
        images.append(image)
    assert choose_gap(video(images)) < 0.3


def test_a_title_is_passed_over():
    title = [texture(3, 128, 160)] * 150  # 5 s at 30 frames a second
    assert choose_gap(video(title + shifting(1))) == choose_gap(video(shifting(1)))


def test_only_the_beginning_is_read():
    read = []

    def frames():
        for frame in video(shifting(1, 300)):
            read.append(frame.time)
            yield frame

    choose_gap(frames())
    assert len(read) <= 92
    read.clear()

    def still():
        for i in range(30 * 60):
            read.append(i / 30)
            yield Frame(i / 30, np.zeros((16, 16, 3), np.uint8))

    assert choose_gap(still()) == MAX_GAP
    assert read[-1] < 20


def test_dense_time_stamps_do_not_fill_the_memory():
    read = []

    def frames():
        for i, image in enumerate(shifting(0.1, 2000)):
            read.append(i)
            yield Frame(i / 1e5, image)

    assert 0 < choose_gap(frames()) <= MAX_GAP
    assert len(read) <= 1001


def test_an_error_of_the_disk_is_no_end_of_the_video():
    def failing():
        yield from video(shifting(1))[:45]
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        choose_gap(failing())


def test_damaged_short_and_changing_videos_get_an_answer():
    def damaged():
        yield from video(shifting(1))[:45]
        raise VideoError("cut off")

    assert choose_gap(damaged()) == choose_gap(video(shifting(1)))
    assert choose_gap([]) == MAX_GAP
    assert choose_gap(video(moving(1))) == MAX_GAP
    assert 0 < choose_gap(video(moving(2))) <= MAX_GAP
    assert 0 < choose_gap(video(moving(5) + moving(5, height=48))) <= MAX_GAP
