"""Shared by all tests: the repository on the import path, scripts run as a user runs them, no network."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

gc.disable()  # until all tests are imported: a million objects that stay, and hardly any garbage
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VIRTUAL_ENV"] = sys.prefix  # as if it were activated: messages say "python"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products: a second thread costs more than it brings
# A shell starts its background jobs with Ctrl-C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.fsync = lambda file: (
    None
)  # nobody cuts the power here, and a small run waited for 36 of them, half of its time

LONGEST = ("tests/training/", "tests/faults/", "tests/test_readme.py", "tests/model/", "tests/platforms/")


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that several processes end together."""
    items.sort(key=lambda item: [not item.nodeid.startswith(place) for place in LONGEST])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one file stay in one process, and so do those of a folder that share what takes seconds to make."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            shared = (folder for folder in LONGEST[:2] if nodeid.startswith(folder))
            return next(shared, nodeid.partition("::")[0])

    return Together(config, log)


def pytest_collection_finish():
    """What the imports made stays: small runs would spend half of their time in collections that go through it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def run_script(tmp_path):
    """run_script("model_finetune/finetune_sft.py", "--epochs", 2) -> CompletedProcess, run from another folder."""

    def run(script, *arguments, cwd=tmp_path, timeout=300, **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("errors", "backslashreplace")  # what is no UTF-8 shows in the text
        return subprocess.run(
            command, cwd=cwd, timeout=timeout, capture_output=True, text=True, encoding="utf-8", **options
        )

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A model folder: a tiny Qwen3 with random weights."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def chat_model(tiny_folder):
    """The ChatModel of that folder, in fp32 on the CPU."""
    from utils.chat.model import ChatModel
    from utils.device import Device

    return ChatModel(str(tiny_folder), Device("cpu", False, "test"))
