"""macOS and Windows, faked where they differ; and that every Python from 3.10 to 3.13 can read the project."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from small_runs import arguments, make_place, same_weights
from torch.utils._python_dispatch import TorchDispatchMode

from model_download.download_model import choose_files
from utils import device, errors
from utils.errors import UserError, run
from utils.hub import HubFile, Repo
from utils.model.folders import check_model
from utils.training import callbacks, run_folder, setup

OURS = sorted(
    path
    for folder in ("data_prepare", "model_download", "model_finetune", "utils", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in OURS}
FOR_USERS = {name: text for name, text in SOURCES.items() if not name.startswith("tests/")}


# ---- Windows: whole scripts on a Python that lacks what Windows lacks (tests/like_windows.py)


@pytest.fixture
def like_windows(tmp_path, run_script):
    """like_windows(script, ...) -> CompletedProcess; files under tmp_path behave as on NTFS."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("sees open files in /proc")
    (tmp_path / "site").mkdir()
    shutil.copy(ROOT / "tests/like_windows.py", tmp_path / "site/sitecustomize.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUTF8"}
    environment |= {
        "PYTHONPATH": str(tmp_path / "site"),
        "LIKE_WINDOWS_ROOT": str(ROOT),
        "LIKE_WINDOWS_PLACE": str(tmp_path),
        "PYTHONIOENCODING": "cp936",
        "PYTHONWARNDEFAULTENCODING": "1",
    }

    def call(script, *words):
        done = run_script(script, *words, env=environment)
        assert done.returncode == 0, done.stderr
        ours = [
            line
            for line in done.stderr.splitlines()
            if "EncodingWarning" in line and str(ROOT) in line and "/.venv/" not in line
        ]
        assert not ours, ours
        return done

    return call


def test_conversion_in_workers_like_on_windows(like_windows, tmp_path):
    """Started anew (spawn), as on Windows and macOS; the terminal's encoding holds no rare characters."""
    rows = [{"query": f"问题{number}", "response": f"答{number}"} for number in range(5000)]
    (tmp_path / "问.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    done = like_windows(
        "data_prepare/convert_to_qwen3_format.py",
        "--input-files",
        tmp_path / "问.jsonl",
        "--output-dir",
        tmp_path / "out",
        "--workers",
        2,
        "--tokenizer-model",
        "",
    )
    assert "问.jsonl" in done.stdout
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


def test_training_and_resuming_like_on_windows(like_windows, tmp_path):
    """Checkpoints are flushed and moved into place, old ones removed, with no file open; a stopped run goes on."""
    place, output = make_place(tmp_path), tmp_path / "out"
    (tmp_path / "twice.py").write_text(TRAIN_STOP_AND_GO_ON, encoding="utf-8")
    done = like_windows(tmp_path / "twice.py", ROOT, output, *arguments("sft", place, output))
    assert "going on from" in done.stdout and done.stdout.count("finished in") == 2
    assert same_weights(output, tmp_path / "whole")
    assert (
        len(list((tmp_path / "whole").glob("checkpoint-*"))) == 2
        and len(list(output.glob("checkpoint-*"))) == 1
    )


def test_a_folder_is_held_without_fcntl(tmp_path, monkeypatch):
    """By a byte that is the same for all and no part of the text: on Windows a locked byte cannot even be read."""
    held = set()

    def locking(number, mode, count):
        place = os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR)
        if place in held:
            raise PermissionError(13, "Permission denied")
        held.add(place)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    (tmp_path / run_folder.LOCK).write_text("4711", encoding="utf-8")  # of a process that was killed
    first = run_folder._lock(tmp_path)
    with pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()}\)"):
        run_folder._lock(tmp_path)
    first.close()
    assert all(position > (tmp_path / run_folder.LOCK).stat().st_size for _, position in held)


def test_no_line_editing_where_there_is_no_readline(monkeypatch):
    from utils.chat.terminal import prepare_terminal

    monkeypatch.setitem(sys.modules, "readline", None)
    prepare_terminal()


def test_old_windows_consoles_are_told_to_understand_codes(monkeypatch):
    told = []
    monkeypatch.setattr(errors.os, "system", told.append)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        with monkeypatch.context() as windows:  # as short as can be: pathlib looks at this name too
            windows.setattr(errors.os, "name", "nt")
            run(lambda: 0)
        assert told == [""] * terminal


def test_a_picture_that_a_viewer_holds_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(callbacks, "plot_training", refuse)
    log = callbacks.RunLog(SimpleNamespace(folder=tmp_path, main=True), 1, "SFT")
    log.entries.append({"step": 1, "loss": 1.0})
    log.draw()
    assert (
        "loss_curve.png cannot be redrawn now (Permission denied); training goes on"
        in capsys.readouterr().out
    )


def test_on_windows_a_file_that_is_open_elsewhere_is_thought_of(monkeypatch):
    refused = PermissionError(13, "Permission denied", "comparison.png")
    assert "close the program" not in errors.explain_os_error(refused)
    with monkeypatch.context() as windows:
        windows.setattr(errors.os, "name", "nt")
        said = errors.explain_os_error(refused)
    assert "(comparison.png); close the program that has it open, or choose another folder" in said


@pytest.mark.parametrize(
    "name", ["C:/models", "D:/Qwen3-0.6B", "~/models", "./models", "models\\tiny", "\\\\server/models"]
)
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(UserError, match="does not exist"):
        check_model(name)


def test_names_in_a_listing_stay_in_their_folder():
    """Windows takes a backslash for a separator and what stands before a colon for a drive."""
    names = [
        "config.json",
        "model.safetensors",
        "..\\..\\evil.safetensors",
        "C:evil.safetensors",
        "../evil.safetensors",
    ]
    listed = {name: HubFile(name, 1, "0" * 40, "") for name in names}
    assert set(choose_files(Repo("model", "a/b", "0" * 40, None, listed))) == {
        "config.json",
        "model.safetensors",
    }


NOT_ON_WINDOWS = re.compile(
    r"\b(?:os\.(?:fork|forkpty|killpg|getuid|geteuid|getgid|getpgid|setsid|setpgrp|sysconf|uname|mkfifo|chown|chroot|nice|wait3|wait4"
    r"|statvfs|getloadavg|sched_\w+|posix_\w+|pread|pwrite|sync|register_at_fork|openpty)"
    r"|signal\.(?:SIGKILL|SIGALRM|SIGHUP|SIGQUIT|SIGUSR\d|SIGCHLD|SIGPIPE|SIGSTOP|alarm|setitimer|pause|sigwait|pthread_\w+)"
    r"|time\.tzset|socket\.AF_UNIX)\b|[\"']/(?:proc|dev|tmp|etc|sys)/(?!fs/cgroup)"
)  # a container's limit is read where there is one


@pytest.mark.parametrize("name", FOR_USERS)
def test_nothing_that_windows_lacks_is_used_unasked(name):
    for found in set(NOT_ON_WINDOWS.findall(FOR_USERS[name])):
        module, _, attribute = found.partition(".")
        assert f'hasattr({module}, "{attribute}")' in FOR_USERS[name], found


def unnamed_encodings(source):
    """The lines of calls that read or write text in an encoding that they leave to the machine."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        options = {keyword.arg: keyword.value for keyword in node.keywords}  # None: ** of something
        named = "encoding" in options or None in options
        if called == "open" and getattr(getattr(node.func, "value", None), "id", "") != "os":
            mode = options.get("mode") or [*node.args, None, None][isinstance(node.func, ast.Name)]
            text = mode is None or "b" not in str(getattr(mode, "value", ""))
        elif called in ("read_text", "write_text"):
            text, named = True, named or len(node.args) > (called == "write_text")
        elif called in ("NamedTemporaryFile", "TemporaryFile"):
            text = "b" not in getattr(options.get("mode"), "value", "b")
        else:
            text = getattr(options.get("text"), "value", False) is True
        if text and not named:
            yield node.lineno


@pytest.mark.parametrize("name", SOURCES)
def test_every_text_file_is_opened_in_a_named_encoding(name):
    assert not list(unnamed_encodings(SOURCES[name]))


def test_an_unnamed_encoding_is_found():
    bad = [
        "open('a')",
        "open('a', 'w')",
        "p.open()",
        "p.open('r')",
        "p.read_text()",
        "p.write_text('a')",
        "run([], text=True)",
    ]
    good = [
        "open('a', 'rb')",
        "p.open('wb')",
        "p.read_text('utf-8')",
        "p.write_text('a', encoding='utf-8')",
        "os.open('a', 0)",
        "open('a', mode, **text)",
        "run([], text=True, encoding='utf-8')",
        "TemporaryFile(dir=d)",
    ]
    assert list(unnamed_encodings("\n".join(bad + good))) == list(range(1, len(bad) + 1))


# ---- macOS


def test_memory_is_left_alone_where_there_is_no_glibc(monkeypatch):
    for absent in ("darwin", "win32"):
        monkeypatch.setattr(device.sys, "platform", absent)
        monkeypatch.setattr(device.ctypes, "CDLL", lambda name: pytest.fail("asked for a C library"))
        device.hold_memory()
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())  # musl: no mallopt
    device.hold_memory()


def test_peak_memory_is_in_bytes_everywhere(monkeypatch):
    """Linux counts KiB, macOS bytes; Windows has no resource module."""
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5))
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(setup, "psutil", SimpleNamespace(Process=lambda: process))
    for platform, peak in (("linux", 3 * 2**30), ("darwin", 3 * 2**20), ("win32", 5)):
        if platform == "win32":
            monkeypatch.setitem(sys.modules, "resource", None)
        monkeypatch.setattr(setup.sys, "platform", platform)
        assert setup.peak_memory(torch.device("cpu")) == peak


class AppleGPU(TorchDispatchMode):
    """Refuses what an Apple GPU refuses or gets wrong: float64, and products as wide as the vocabulary for many rows at once."""

    def __init__(self, vocabulary, rows):
        super().__init__()
        self.vocabulary, self.rows, self.widest = vocabulary, rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(made, torch.Tensor):
                assert made.dtype is not torch.float64, function
                if made.shape[-1:] == (self.vocabulary,) and function.overloadpacket is torch.ops.aten.mm:
                    self.widest = max(self.widest, made.shape[0])
                    assert made.shape[0] <= self.rows, function
        return result


def test_losses_and_scores_keep_to_what_apple_gpus_can_do(tmp_path):
    from tiny_model import make_tiny_model
    from transformers import AutoModelForCausalLM

    from utils.model.lm_head import CHUNK, sum_of_losses, token_logps
    from utils.model.packed_forward import prepare_packed
    from utils.model.packing import collate, split_batch

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "tiny"))
    document = ([1] * 5, [7, 8, 9] * CHUNK)  # three chunks
    with AppleGPU(model.config.vocab_size, CHUNK) as gpu:
        inputs, targets, _ = split_batch(collate([[{"documents": [document]}]]))
        hidden = prepare_packed(model)(**inputs)
        (sum_of_losses(hidden, model.lm_head.weight, targets) / len(targets)).backward()
        token_logps(hidden, model.lm_head.weight, targets)
    assert gpu.widest == CHUNK


def test_training_on_an_apple_gpu_clears_its_caches_and_starts_no_workers(tmp_path, monkeypatch):
    """Rows differ in length, and every new length leaves buffers and a compiled graph behind; workers crash on macOS."""
    real = setup.TrainingArguments
    settings = SimpleNamespace(
        EPOCHS=1,
        MAX_STEPS=0,
        BATCH_SIZE=1,
        ACCUMULATION=4,
        LEARNING_RATE=1e-5,
        WARMUP=0.1,
        WEIGHT_DECAY=0.0,
        SEED=7,
        KEEP_CHECKPOINTS=2,
    )
    monkeypatch.setattr(setup, "TrainingArguments", lambda **given: given)
    given = {
        name: setup.training_arguments(
            settings, device.Device(name, False, "test"), SimpleNamespace(folder=tmp_path, checkpoint=None)
        )
        for name in ("mps", "cpu", "cuda")
    }
    assert [given[name]["torch_empty_cache_steps"] for name in given] == [10, None, None]
    assert real(**given["cpu"]).dataloader_num_workers == 0


def test_a_full_gpu_is_told_in_one_line(capsys):
    def fill():
        raise RuntimeError(
            "MPS backend out of memory (MPS allocated: 8.92 GB, other allocations: 1.11 GB, max allowed: 9.07 GB)."
        )

    assert run(fill) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory") and said.count("\n") == 1


def test_pictures_need_no_chinese_font(tmp_path):
    from utils.plots import plot_comparison

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_comparison(
            {"基座": {"heldout_loss": 2.0}, "微调": {"heldout_loss": 1.0}}, tmp_path / "comparison.png"
        )


# ---- make: version 3.81 and the BSD tools of macOS


def test_the_makefile_uses_nothing_of_gnu_alone():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    only_gnu = (
        r"\.ONESHELL|::=|^\w+ *!=|&:|\$\(file |\$\(let |"
        r"sed -i|grep -\w*P|date -d|%N|readlink -f|realpath|cp --|xargs -r|nproc|sort -V"
    )
    assert not re.findall(only_gnu, text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_refuses_a_python_that_is_too_old_in_one_line(tmp_path):
    """As the python3 of macOS is. Without this, pip says that it finds no torch."""
    old = tmp_path / "old python"
    pretend = "import sys; sys.version_info = (3, 9, 6); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n', encoding="utf-8")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[0].startswith("error: Python 3.9, wanted 3.11")
    assert not (tmp_path / "venv").exists()


# ---- Python 3.10 to 3.13

NEWER = {  # what came after 3.10 and might be reached for here
    "": {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"},
    "asyncio": {"TaskGroup", "Runner", "timeout"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum", "verify", "member", "nonmember"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "operator": {"call"},
    "os": {"process_cpu_count", "listdrives", "unshare"},
    "random": {"binomialvariate"},
    "sys": {"exception", "monitoring"},
    "typing": {
        "Self",
        "Never",
        "LiteralString",
        "Required",
        "NotRequired",
        "Unpack",
        "TypeVarTuple",
        "assert_never",
        "override",
        "ReadOnly",
    },
    "warnings": {"deprecated"},
}
NEWER_MODULES = {"tomllib", "annotationlib", "compression"}
NEWER_KEYWORDS = {
    "onexc",
    "walk_up",
    "delete_on_close",
    "case_sensitive",
    "recurse_symlinks",
    "include_hidden",
}


def newer_names(source):
    """What a source text uses of the standard library that Python 3.10 does not have."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name.partition(".")[0] for alias in node.names} & NEWER_MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").partition(".")[0]} & NEWER_MODULES
            yield from {alias.name for alias in node.names} & NEWER.get(node.module, set())
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {node.attr} & NEWER.get(node.value.id, set())
        elif isinstance(node, ast.Name):
            yield from {node.id} & NEWER[""]
        elif isinstance(node, ast.Call):
            yield from {keyword.arg for keyword in node.keywords} & NEWER_KEYWORDS


@pytest.mark.parametrize("name", SOURCES)
def test_python_3_10_can_read_it(name):
    ast.parse(SOURCES[name], feature_version=(3, 10))
    assert not set(newer_names(SOURCES[name]))


def test_newer_python_is_found():
    used = (
        "import tomllib\nfrom typing import Self\nfrom datetime import UTC\nitertools.batched(x, 2)\nshutil.rmtree(x, onexc=f)\n"
        "ExceptionGroup"
    )
    assert set(newer_names(used)) == {"tomllib", "Self", "UTC", "batched", "onexc", "ExceptionGroup"}
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    x\nexcept* OSError:\n    y\n", feature_version=(3, 10))


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_other_pythons_compile_it(version):
    """Where they are installed: their own parser, with warnings (of escapes, for one) as errors."""
    python = next(
        (
            path
            for path in [
                shutil.which(f"python{version}"),
                *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
            ]
            if path and subprocess.run([path, "-V"], capture_output=True).returncode == 0
        ),
        None,
    )
    if not python:
        pytest.skip(f"no Python {version} here")
    code = "import json, sys; [compile(text, name, 'exec') for name, text in json.load(sys.stdin).items()]"
    done = subprocess.run(
        [python, "-I", "-W", "error", "-c", code],
        input=json.dumps(SOURCES),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
