import json

import cv2
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from ssl_flow.evaluation.curves import draw_curves, drawable_panels, exponential_mean, read_run

FULL = {"loss": 6.0, "constant_loss": 6.9, "random_loss": 7.2, "target_entropy": 5.0,
        "effective_rank": 9.0, "embedding_std": 0.2, "gradient_norm": 0.5, "learning_rate": 1e-3,
        "images_per_second": 9.0, "data_wait": 0.1}  # fmt: skip


def make_run(folder, rows, config=None):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def rows(count=5, **changes):
    return [{"step": 10 * (i + 1), **FULL, "loss": 6.0 - 0.1 * i, **changes} for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 50])
def test_exponential_mean_is_the_weighted_mean_of_the_past(count):
    values = np.random.default_rng(0).normal(5, 1, count)
    keep = 1 - 2 / (np.sqrt(count) + 1)
    weights = np.tril(keep ** np.maximum(0, np.subtract.outer(range(count), range(count))))
    expected = (weights @ values) / weights.sum(1)
    np.testing.assert_allclose(exponential_mean(values.tolist()), expected, rtol=1e-12)


def test_a_torn_file_gives_its_whole_lines_in_order(tmp_path):
    run = make_run(tmp_path / "run", rows(3), {"train": {"steps": 40}, "seed": 1})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 8.0}\n{"step": NaN}\n[1]\n{"step": 40, "lo')
    log = read_run(run)
    assert log.curve("loss")[0] == [5, 10, 20, 30]
    assert log.unreadable == 3
    assert log.config == {"train.steps": 40, "seed": 1}
    assert log.summary == "30 of 40 steps"


def test_kl_divergence_and_what_is_not_finite(tmp_path):
    bad = [{"step": 90, "loss": float("nan"), "target_entropy": 5.0}, {"step": 91, "loss": None}]
    log = read_run(make_run(tmp_path / "run", rows(2) + bad))
    assert log.curve("kl") == ([10, 20], pytest.approx([1.0, 0.9]))
    assert log.curve("loss") == ([10, 20], [6.0, 5.9])


def test_a_probe_of_the_same_step_takes_nothing_away(tmp_path):
    log = read_run(make_run(tmp_path / "run", [*rows(1), {"step": 10, "probe_miou": 0.3}]))
    assert log.curve("loss") == ([10], [6.0])
    assert log.curve("probe_miou") == ([10], [0.3])


def test_a_panel_for_each_known_key_that_was_logged(tmp_path):
    full = read_run(make_run(tmp_path / "full", [*rows(), {"step": 60, "probe_miou": 0.3}]))
    old = read_run(make_run(tmp_path / "old", [{"step": 1, "loss": 3.0, "gradient_norm": 0.0}]))
    titles = [panel.title for panel in drawable_panels([full])]
    assert len(titles) == 9 and "probe while training: miou" in titles
    # No logarithm of 0, and no divergence without the floor.
    assert [panel.title for panel in drawable_panels([old])] == ["loss"]
    assert [panel.title for panel in drawable_panels([old, full])] == titles
    for key in ("loss", "effective_rank", "embedding_std", "learning_rate", "data_wait"):
        less = [{k: v for k, v in row.items() if k != key} for row in rows()]
        missing = read_run(make_run(tmp_path / key, less))
        assert len(drawable_panels([missing])) == (6 if key == "loss" else 7)


def test_bounds_and_every_line_are_in_the_picture(tmp_path):
    """Colours are looked for in the pixels: what is drawn is what was logged."""

    def pixels(runs):
        return cv2.imdecode(np.frombuffer(draw_curves(runs), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    def has(picture, color):
        return bool((picture == color).all(-1).any())

    blue, vermilion, green, purple = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)
    one = read_run(make_run(tmp_path / "one", rows()))
    two = read_run(make_run(tmp_path / "two", rows(constant_loss=None, random_loss=None)))
    sheet = pixels([one])
    assert all(has(sheet, c) for c in (blue, vermilion, green, purple))
    sheet = pixels([two])
    assert has(sheet, purple) and not has(sheet, vermilion)
    sheet = pixels([one, two])
    assert has(sheet, vermilion) and not has(sheet, purple)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    heads, real = [], Figure.legend
    monkeypatch.setattr(
        Figure, "legend", lambda self, lines, texts, **o: (heads.extend(texts),
                                                           real(self, lines, texts, **o))[1]
    )  # fmt: skip
    folders = [tmp_path / "a" / "seed0", tmp_path / "b" / "seed0", tmp_path / "b" / "seed1"]
    draw_curves([read_run(make_run(folder, rows())) for folder in folders])
    assert heads == [f"{folders[0]}: 50 steps", f"{folders[1]}: 50 steps", "seed1: 50 steps"]


def test_a_name_is_no_formula(tmp_path):
    runs = [read_run(make_run(tmp_path / name, rows())) for name in ("$a_{$", "b")]
    assert all(draw_curves(some).startswith(b"\x89PNG") for some in (runs[:1], runs))


def test_nothing_to_draw(tmp_path):
    assert draw_curves([read_run(make_run(tmp_path / "run", []))]) is None
