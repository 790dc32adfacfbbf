"""A place with a tiny model and data, and runs that were finished once, in both number formats."""

import shutil

import pytest
from small_runs import METHODS, make_place, no_picture, train

from utils.files import read_json, write_json
from utils.training import log, memory

PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="session", autouse=True)
def quick():
    """No pictures, and the memory of a kind of model is counted once: a third of the time of a small run."""
    count, found = memory.bytes_kept, {}

    def count_once(model, batch, device):
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        kind = trained, device.format, tuple(batch["layout"])
        if kind not in found:
            found[kind] = count(model, batch, device)
        return found[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "plot_training", no_picture)
        patch.setattr(memory, "bytes_kept", count_once)
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("训练 数据"))  # a space and Chinese characters in the path


@pytest.fixture(scope="session")
def runs(place):
    """runs(method, precision) -> the finished folder of a run that was never stopped, trained at the first call."""
    folders = {}

    def finished(method, precision="fp32"):
        if (method, precision) not in folders:
            folder = folders[method, precision] = place / f"{method}_{precision}_whole"
            assert train(method, place, folder, precision=precision) == 0
        return folders[method, precision]

    return finished


@pytest.fixture
def stopped(runs, tmp_path):
    """stopped(method) -> a copy of a finished run, as it stands after a kill in its second epoch."""

    def copy(method):
        output = shutil.copytree(runs(method), tmp_path / "stopped")
        write_json(output / "run.json", read_json(output / "run.json") | {"status": "running"})
        shutil.rmtree(output / "checkpoint-12")
        return output

    return copy


def pytest_generate_tests(metafunc):
    """Every test that takes `method` or `precision` runs for all of them."""
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", METHODS)
    if "precision" in metafunc.fixturenames:
        metafunc.parametrize("precision", PRECISIONS)
