from pathlib import Path

import cv2
import pytest

DATA = Path(__file__).parents[3] / "shared/data"


@pytest.fixture(autouse=True)
def one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.fixture
def data():
    if not (DATA / "flow").is_dir():
        pytest.skip(f"the data set is not there: {DATA}")
    return DATA
