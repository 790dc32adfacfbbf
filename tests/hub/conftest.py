"""For the tests of downloads: a FakeHub, and the download scripts called on it."""

import os
import time
from types import SimpleNamespace

import pytest
from fake_hub import TOKEN, FakeHub
from hub_helpers import MODEL, ROWS

from data_prepare import download_tcm_data
from model_download import download_model
from utils.errors import run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A FakeHub with one model and one data set, as HF_ENDPOINT; `hub.waits` holds the waits instead of waiting."""
    import huggingface_hub

    fake = FakeHub()
    fake.commit = fake.add("model", "tcm/small", MODEL)
    fake.add("dataset", "tcm/rows", {"train.json": ROWS, "README.md": b"card", "dataset_infos.json": b"{}"})
    fake.waits = []
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(
        "utils.hub_requests.time",
        SimpleNamespace(sleep=fake.waits.append, time=time.time, monotonic=time.monotonic),
    )
    yield fake
    huggingface_hub.close_session()
    fake.stop()


@pytest.fixture
def get(capsys, tmp_path):
    """get(script, ...) -> (exit code, stdout, stderr); get.folder is the output folder. No token is ever printed or kept."""

    def call(script, *arguments):
        code = run(lambda: script.main([*map(str, arguments), "--output-dir", str(call.folder)]))
        out, err = capsys.readouterr()
        assert (os.environ.get("HF_TOKEN") or TOKEN) not in out + err
        assert not any(TOKEN.encode() in path.read_bytes() for path in call.folder.glob("*"))
        return code, out, err

    call.folder = tmp_path / "got"
    call.model = lambda *arguments: call(download_model, "--model", "tcm/small", *arguments)
    call.data = lambda *arguments: call(download_tcm_data, "--dataset", "tcm/rows", *arguments)
    return call
