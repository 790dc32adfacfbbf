"""A place with a tiny model and data, and runs that were finished once, in both number formats."""

import pytest
from small_runs import METHODS, make_place, no_picture, train

from utils.training import log

PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="session", autouse=True)
def quick_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "plot_training", no_picture)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("训练 数据"))  # a space and Chinese characters in the path


@pytest.fixture(scope="module")
def runs(place):
    """runs(method, precision) -> the finished folder of a run that was never stopped, trained at the first call."""
    folders = {}

    def finished(method, precision="fp32"):
        if (method, precision) not in folders:
            folder = folders[method, precision] = place / f"{method}_{precision}_whole"
            assert train(method, place, folder, precision=precision) == 0
        return folders[method, precision]

    return finished


def pytest_generate_tests(metafunc):
    """Every test that takes `method` or `precision` runs for all of them."""
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", METHODS)
    if "precision" in metafunc.fixturenames:
        metafunc.parametrize("precision", PRECISIONS)
