"""What comes from outside and what leaves: pinned packages, no code from model folders, no token, no usage figures."""

import importlib.metadata
import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT
from fake_hub import TOKEN, FakeHub

from utils.errors import UserError
from utils.model.folder import check_model, load_model, load_tokenizer

REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PACKAGES = [line for line in REQUIREMENTS if line and not line.startswith("#")]
PINS = dict(re.match(r"([\w-]+)==([\w.]+) ", line).groups() for line in PACKAGES)
CODE = "from pathlib import Path\nPath({!r}).write_text('ran', encoding='utf-8')\nclass Own: pass\n"


# ---- Packages


def test_every_requirement_is_installed_as_pinned_and_says_what_for():
    for line in PACKAGES:
        assert re.fullmatch(r"[\w-]+==[\w.]+ +# \S.*", line), line
    for name, version in PINS.items():
        assert importlib.metadata.version(name).partition("+")[0] == version, name


# ---- Model folders: no code of theirs is run (of the results of our own: tests/faults/test_given.py)


@pytest.mark.parametrize("kind, loads", [("qwen3", True), ("own", False)])
def test_code_in_a_model_folder_is_not_run(tiny_folder, tmp_path, kind, loads):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "trace")), encoding="utf-8")
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": 2 * ["own.Own"]}
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values = {**values, "auto_map": auto_map} | ({"model_type": kind} if name == "config.json" else {})
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    if loads:
        load_tokenizer(check_model(str(folder)))
        load_model(str(folder), torch.float32)
    else:
        with pytest.raises(UserError, match="is a model of type own; wanted Qwen3"):
            load_model(check_model(str(folder)), torch.float32)
    assert not (tmp_path / "trace").exists()


def test_an_adapter_in_pickled_form_is_refused_whatever_lies_beside_it(tiny_folder, tmp_path):
    """peft takes adapter_model.bin where there is no adapter_model.safetensors."""
    config = json.dumps({"base_model_name_or_path": str(tiny_folder)})
    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    shutil.copy(tiny_folder / "model.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no .*safetensors weights; other formats are not loaded"):
        check_model(str(tmp_path))


# ---- Tokens and telemetry


def test_a_download_tells_nobody_the_token_and_the_hub_nothing_of_this_machine(run_script, tmp_path):
    hub = FakeHub()
    hub.add("model", "a/b", {"config.json": b"{}", "model.safetensors": b"w" * 100_000})
    kept = [name for name in os.environ if not name.startswith("HF_") and not name.upper().endswith("_PROXY")]
    environment = {name: os.environ[name] for name in kept}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    words = ["--model", "a/b", "--output-dir", tmp_path / "out"]
    done = run_script("model_download/download_model.py", *words, env=environment)
    hub.stop()
    assert done.returncode == 0, done.stderr
    assert hub.asked("/resolve/")[0][1]["Authorization"] == f"Bearer {TOKEN}"  # it was used ...
    assert TOKEN not in done.stdout + done.stderr  # ... and is nowhere else
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    for _, headers in hub.log:
        assert not re.search("torch|agent/", headers["User-Agent"]), headers["User-Agent"]


def test_libraries_are_told_to_report_nothing(run_script, tmp_path):
    """Whatever trackers are installed, nothing is reported to them, and the Hub is out of reach for a model on disk."""
    ask = "from utils.model.folder import quiet_offline\nquiet_offline()\nfrom huggingface_hub import constants\n"
    ask += "print(constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_OFFLINE)\n"
    (tmp_path / "ask.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{ask}", encoding="utf-8"
    )
    kept = [name for name in os.environ if not name.startswith(("HF_", "DO_NOT", "DISABLE_TELEMETRY"))]
    done = run_script(tmp_path / "ask.py", env={name: os.environ[name] for name in kept})
    assert done.stdout.split() == ["True", "True"]
    for script in ROOT.glob("model_finetune/finetune_*.py"):
        assert 'TRACKER = "none"' in script.read_text(encoding="utf-8")
