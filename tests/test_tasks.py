"""tasks.py: the demo's commands, the environment, Ctrl-C and failures, and the same through make."""

import ast
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import tasks
from utils.files import read_jsonl
from utils.settings import read_settings

# Stands in for every script of the demo: says how it was called, and may fail, be slow, or be stopped
SCRIPT = """
import os, sys, time
sys.stdout.reconfigure(encoding="utf-8")
print("ran", os.path.basename(__file__), "in", os.getcwd(), "by", sys.argv[-1], flush=True)
{}
"""
STOPPED_LATE = """
try:
    time.sleep(0.3)     # tasks.py waits for this script by then
    open("waiting", "x").close()
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.8)     # a checkpoint is written
    print("stopped well", flush=True)
    sys.exit(130)
"""


@pytest.fixture
def project(tmp_path):
    """tasks.py in a path with a space and Chinese characters, with an environment and scripts that only say what they are."""
    folder = tmp_path / "中医 模型"
    for _, (name, *_) in tasks.demo_steps():
        script = folder / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPT.format(""), encoding="utf-8")
    for name in ("tasks.py", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "trainer_output/demo/sft").mkdir(parents=True)
    (folder / "trainer_output/demo/sft/loss_curve.png").touch()
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv/.installed")
    return folder


def call(project, *words, **options):
    """Run words as a user does, from another folder."""
    options |= {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300}
    return subprocess.run([sys.executable, *map(str, words)], cwd=project.parent, **options)


def test_the_demo_runs_every_script_with_flags_that_it_has():
    for _, (script, *words) in tasks.demo_steps():
        positional = "MODEL" if "load_local" in script else ""
        read_settings(runpy.run_path(str(ROOT / script)), words, positional=positional)


def test_the_demo_runs_its_steps_one_after_another(project):
    done = call(project, project / "tasks.py", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    titles = re.findall(r"^== (\d)/9 (.*)", done.stdout, re.MULTILINE)
    assert [number for number, _ in titles] == list("123456789")
    assert [title for _, title in titles[:8]] == [title.splitlines()[0] for title, _ in tasks.demo_steps()]
    assert re.fullmatch(r"done in \d+ s\. Look at:", titles[8][1])
    ran = re.findall(r"^ran (\S+) in (.*) by (\S+)$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in ran] == [command[0].split("/")[1] for _, command in tasks.demo_steps()]
    assert {folder for _, folder, _ in ran} == {str(project)}
    chat = "Chat: .venv/bin/python model_download/load_local_model.py trainer_output/demo/dpo_finetuned\n"
    assert f"trainer_output/demo/sft/loss_curve.png\n\n{chat}" in done.stdout
    assert done.stdout.endswith(f"Ask it, for example:\n{tasks.SUGGESTED}\n")


def test_the_suggested_questions_are_about_held_out_entities_and_none_is_a_training_question():
    rows = list(read_jsonl(ROOT / "data_prepare/sample/tcm_sample.jsonl"))
    held_out = {row["entity"] for row in rows if row["split"] == "eval"}
    trained = {row["instruction"] for row in rows if row["split"] == "train"}
    questions = tasks.SUGGESTED.splitlines()
    assert len(set(questions)) == 10
    for question in questions:
        assert any(name in question for name in held_out) and question not in trained


@pytest.mark.parametrize(
    "ending, code", [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)]
)
def test_a_failing_step_is_the_last_and_its_exit_code_stays(project, ending, code):
    (project / "model_finetune/finetune_dpo.py").write_text(ending, encoding="utf-8")
    done = call(project, project / "tasks.py", "demo")
    assert done.returncode == code and done.stderr == ""
    assert "== 5/9" in done.stdout and "== 6/9" not in done.stdout


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="sends Ctrl-C as a POSIX terminal does")
@pytest.mark.parametrize("code", [130, 0])
def test_ctrl_c_lets_the_step_end_in_its_own_way(project, code):
    ending = STOPPED_LATE.replace("exit(130)", f"exit({code})")
    (project / "model_finetune/finetune_sft.py").write_text(SCRIPT.format(ending), encoding="utf-8")
    command, piped = [sys.executable, str(project / "tasks.py"), "demo"], subprocess.PIPE
    with subprocess.Popen(command, stdout=piped, stderr=piped, start_new_session=True) as running:
        deadline = time.monotonic() + 180
        while not (project / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        said, complained = (text.decode("utf-8") for text in running.communicate(timeout=180))
    assert (running.returncode, complained) == (130, "")
    assert "stopped well" in said and "== 4/9" not in said


@pytest.mark.parametrize(
    "pretended, told",
    [
        ("sys.version_info = (3, 15, 0)", "Python 3.15, wanted 3.11 to 3.14"),
        ("sys.version_info = (3, 9, 6)", "wanted 3.11 to 3.14: python3.11 tasks.py, or make PYTHON="),
        ("sys.platform, platform.machine = 'darwin', lambda: 'x86_64'", "Macs with an Intel processor"),
        ("sys.argv.append('demmo')", "unknown command in 'install demmo'; wanted one of: help, install,"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(project, pretended, told):
    (project / ".venv/.installed").unlink()
    script = f"import platform, runpy, sys; sys.argv = ['tasks.py', 'install']; {pretended}; runpy.run_path('tasks.py', run_name='__main__')"
    done = call(project, "-c", f"import os; os.chdir({str(project)!r}); {script}")
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_an_old_python_is_told_in_one_line(run_script, tmp_path):
    """With what it can read: tasks.py, and utils/__init__.py, which every script imports first."""
    text = f"import sys; sys.hexversion = 0x03090000; sys.path.insert(0, {str(ROOT)!r}); import utils.errors"
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    told = run_script(tmp_path / "script.py").stderr
    assert told.startswith("error: Python 3.") and told.count("\n") == 1
    for name in ("tasks.py", "utils/__init__.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.slow
def test_the_environment_is_made_once_and_again_where_requirements_changed(project):
    shutil.rmtree(project / ".venv")
    (project / "requirements.txt").write_text("# nothing\n", encoding="utf-8")

    def install():
        done = call(project, project / "tasks.py", "install")
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert install().startswith("installing the packages of requirements.txt into .venv")
    assert install() == ""
    kept = project / ".venv/kept"
    kept.touch()
    (project / "requirements.txt").write_text("# nothing more\n", encoding="utf-8")
    assert "installing" in install() and kept.exists()
    call(project, project / "tasks.py", "demo-clean", "clean")
    assert not (project / ".venv").exists() and not (project / "trainer_output/demo").exists()
    assert (project / "trainer_output").exists()


# ---- make: version 3.81 and the BSD tools of macOS


def test_make_has_the_same_commands():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^TASKS *:= (.*)$", text, re.MULTILINE)[1].split() == list(tasks.TASKS)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_runs_tasks(project):
    done = subprocess.run(
        ["make", "demo", f"PYTHON={sys.executable}"], cwd=project, capture_output=True, timeout=180
    )
    assert done.stdout.count(b"ran ") == 8
