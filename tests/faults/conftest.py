"""The Hub and the folder that all fault tests of one process share. The folder takes seconds to make."""

import pytest
from fake_hub import FakeHub


@pytest.fixture(scope="session")
def hub():
    """A Hub on the loopback with the model tcm/small and the data set tcm/rows."""
    fake = FakeHub()
    fake.add(
        "model",
        "tcm/small",
        {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights" * 100_000},
    )
    fake.add("dataset", "tcm/rows", {"train.json": b'{"query": "?"}\n' * 50_000})
    yield fake
    fake.stop()


@pytest.fixture(scope="session")
def world(tmp_path_factory, hub):
    """The folder {w}: repository, inputs, what every script made of them, and things that are none of these."""
    from fault_runs import fill_world

    folder = tmp_path_factory.mktemp("中医 数据")
    fill_world(folder, hub)
    return folder
