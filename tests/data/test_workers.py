"""Worker processes: the same files as one process, and an end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from data_rows import write_lines

pytestmark = pytest.mark.slow  # whole conversions in several processes

SCRIPT = "data_prepare/convert_to_qwen3_format.py"


def test_workers_give_the_same_files(tmp_path, run_script):
    rows = [{"query": f"问题{number % 900}", "response": f"答{number % 4900}"} for number in range(5000)]
    path = write_lines(tmp_path / "a.jsonl", *rows, *[{"query": "坏"}] * 3)
    for workers in (1, 2):
        places = ("--input-files", path, "--output-dir", tmp_path / str(workers))
        done = run_script(SCRIPT, *places, "--workers", workers, "--tokenizer-model", "")
        assert done.returncode == 0, done.stderr
    for name in ("sft_train", "sft_eval", "set_aside"):
        one, two = (tmp_path / workers / f"{name}.jsonl" for workers in ("1", "2"))
        assert one.read_bytes() == two.read_bytes()


@pytest.fixture
def at_work(tmp_path):
    """at_work(seconds) starts a conversion in two workers and returns it when both have used so much CPU time."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks for processes in /proc")
    rows = ({"query": f"问题{number}", "response": "答" * 200} for number in range(100_000))
    places = ("--input-files", write_lines(tmp_path / "a.jsonl", *rows), "--output-dir", tmp_path / "out")
    command = [sys.executable, ROOT / SCRIPT, *places, "--workers", "2"]

    def start(seconds):
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        # Three processes, as one is Python's resource tracker: it uses little, and ends by itself.
        wait_until(
            lambda: len(used := sorted(cpu_seconds(running.pid).values())) == 3 and used[-2] >= seconds
        )
        assert running.poll() is None
        return running

    return start


# A start takes about 0.15 s.
@pytest.mark.parametrize("seconds", [0.04, 0.6], ids=["while workers start", "while workers work"])
def test_ctrl_c_ends_all_processes_and_leaves_the_earlier_files(tmp_path, at_work, seconds):
    kept = write_lines(tmp_path / "out/sft_train.jsonl", {"id": "of an earlier run"}).read_bytes()
    running = at_work(seconds)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    errors = running.communicate(timeout=60)[1].decode()
    assert (running.returncode, errors) == (
        130,
        "error: stopped by Ctrl-C; the same command starts it again\n",
    )
    wait_until(lambda: not cpu_seconds(running.pid))
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir()] == [
        ("sft_train.jsonl", kept)
    ]


def test_workers_of_a_killed_conversion_end(at_work):
    running = at_work(0.6)
    running.kill()
    running.communicate(timeout=60)  # stderr ends when the last process that holds it has ended
    wait_until(lambda: not cpu_seconds(running.pid))


def test_a_killed_worker_is_told(at_work):
    running = at_work(0.6)
    used = cpu_seconds(running.pid)
    os.kill(int(max(used, key=used.get)), signal.SIGKILL)  # what the kernel does where memory runs out
    errors = running.communicate(timeout=60)[1].decode()
    assert running.returncode == 1 and errors.count("\n") == 1
    assert "a worker process was killed, most likely for want of memory; try again with --workers 1" in errors


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def cpu_seconds(session):
    """{process: CPU seconds} of the living processes of a session, without the one that leads it."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between two looks
        if int(fields[3]) == session != int(stat.parent.name) and fields[0] != "Z":
            found[stat.parent.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found
