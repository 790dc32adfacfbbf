"""Windows: whole scripts on a Python that lacks what Windows lacks (tests/like_windows.py), and what differs there, faked."""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from small_runs import arguments, make_place, same_weights

from model_download.download_model import model_files
from utils import errors
from utils.errors import UserError
from utils.files import write_jsonl
from utils.hub import HubFile, Repo
from utils.model.folder import check_model
from utils.training import log as log_module

like_windows = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees open files in /proc")
LIKE_WINDOWS = ROOT / "tests/like_windows.py"


@like_windows
@pytest.mark.slow
def test_conversion_like_on_windows(run_script, tmp_path):
    """The terminal's encoding holds no rare characters, and no file of ours is opened in the system's."""
    (tmp_path / "site").mkdir()
    shutil.copy(LIKE_WINDOWS, tmp_path / "site/sitecustomize.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUTF8"}
    environment |= {"LIKE_WINDOWS_ROOT": str(ROOT), "LIKE_WINDOWS_FOLDER": str(tmp_path)}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "PYTHONIOENCODING": "cp936"}
    write_jsonl(tmp_path / "问.jsonl", [{"query": f"问题{n}", "response": f"答{n}"} for n in range(5000)])
    words = [
        "--input-files",
        tmp_path / "问.jsonl",
        "--output-dir",
        tmp_path / "out",
        "--tokenizer-model",
        "",
    ]
    script = "data_prepare/convert_to_qwen3_format.py"
    done = run_script(script, *words, env=environment | {"PYTHONWARNDEFAULTENCODING": "1"})
    assert done.returncode == 0 and "问.jsonl" in done.stdout, done.stderr
    warned = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and str(ROOT) in line]
    assert not [line for line in warned if "/.venv/" not in line]
    assert len((tmp_path / "out/sft_train.jsonl").read_text(encoding="utf-8").splitlines()) == 4750


TRAIN_STOP_AND_GO_ON = """
import json, shutil, sys
from pathlib import Path
root, output, command = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, root)
from model_finetune import finetune_sft
from utils.errors import run
if run(lambda: finetune_sft.main(command)):
    sys.exit(1)
shutil.copytree(output, output.with_name("whole"))
newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
shutil.rmtree(newest)                               # as if killed before it
(output / "model.safetensors").unlink()
record = json.loads((output / "run.json").read_text(encoding="utf-8"))
(output / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
sys.exit(run(lambda: finetune_sft.main([*command, "--keep-checkpoints", "1"])))
"""


@like_windows
@pytest.mark.slow
def test_training_and_resuming_like_on_windows(tmp_path):
    """Checkpoints are flushed and moved into place, old ones removed, with no file open; a stopped run goes on."""
    from processes import Script

    place, output = make_place(tmp_path), tmp_path / "out"
    (tmp_path / "twice.py").write_text(TRAIN_STOP_AND_GO_ON, encoding="utf-8")
    words = [tmp_path / "twice.py", ROOT, output, *arguments("sft", place, output)]
    environment = {"LIKE_WINDOWS_ROOT": str(ROOT), "LIKE_WINDOWS_FOLDER": str(tmp_path)}
    before = [(runpy.run_path, str(LIKE_WINDOWS))]
    script = Script(words, ROOT, tmp_path / "said", environment=environment, before=before, ready=True)
    assert script.end() == 0, script.err
    assert "going on from" in script.out and script.out.count("finished in") == 2
    assert same_weights(output, tmp_path / "whole")
    kept = [len(list(folder.glob("checkpoint-*"))) for folder in (tmp_path / "whole", output)]
    assert kept == [2, 1]


def test_no_line_editing_where_there_is_no_readline(monkeypatch):
    from utils.chat.terminal import prepare_terminal

    monkeypatch.setitem(sys.modules, "readline", None)
    prepare_terminal({})


def test_a_picture_that_a_viewer_holds_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(log_module, "plot_training", refuse)
    log = log_module.RunLog(tmp_path, True, "SFT")
    log.entries.append({"step": 1, "loss": 1.0})
    log.draw()
    told = "loss_curve.png cannot be redrawn now (Permission denied); training goes on"
    assert told in capsys.readouterr().out


def test_on_windows_a_file_that_is_open_elsewhere_is_thought_of(monkeypatch):
    refused = PermissionError(13, "Permission denied", "comparison.png")
    with monkeypatch.context() as windows:  # as short as can be: pathlib looks at this name too
        windows.setattr(errors.os, "name", "nt")
        said = errors.explain(refused)[0]
    assert "(comparison.png); close the program that has it open, or choose another folder" in said


@pytest.mark.parametrize(
    "name", ["C:/models", "D:/Qwen3-0.6B", "~/models", "./models", "models\\tiny", "\\\\server/models"]
)
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(UserError, match="does not exist"):
        check_model(name)


def test_names_in_a_listing_stay_in_their_folder():
    """Windows takes a backslash for a separator and what stands before a colon for a drive."""
    names = "config.json model.safetensors ..\\..\\evil.safetensors C:evil.safetensors ../evil.safetensors".split()
    listed = {name: HubFile(name, 1, "0" * 40) for name in names}
    assert list(model_files(Repo("model", "a/b", "0" * 40, None, listed))) == names[:2]
