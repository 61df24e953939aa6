import pytest
from tiny import tiny

from ssl_flow.data.synthetic import synthetic_sources
from ssl_flow.flow import extract
from ssl_flow.training import pretrain


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "store"
    extract(synthetic_sources(4, seed=5), path, method="farneback", size=64, gap=0.1, workers=1)
    return path


@pytest.fixture(scope="session")
def finished(store, tmp_path_factory):
    return pretrain(tiny(store, tmp_path_factory.mktemp("runs")))
