"""Scripts in processes of their own, started as a shell starts them and stopped by signals.

    script = Script(["data_prepare/convert_to_qwen3_format.py", "--seed", "1"], repository, folder, before=[(os.close, 1)])
    script.wait_for(lambda: (folder / "half.part").exists())
    script.kill(signal.SIGINT)
    script.end()                        # the exit code; then script.out and script.err, the text of stdout and stderr

Every process is forked from one server. It then executes a new interpreter, as a shell does, or with `ready=True` runs the script
itself: torch and transformers are imported already, which saves seconds, and arguments, folder, files and limits are the same.
There `before` can change modules of utils.
"""

import ctypes
import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
DEADLINE = 180  # seconds: many times what anything here takes, also where other programs have the processor


def fork(target, *arguments):
    """A process of the server's that calls target(*arguments). It has imported what tests/preloaded.py imports."""
    # Python 3.11 does not tell the server where tests import from.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        forkserver.ensure_running()
    process = SERVER.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


class Script:
    """A running script. `before`: [(function, argument, ...), ...] is called in the new process before the script begins."""

    def __init__(
        self, words, repository, folder, cwd=None, environment=None, before=(), stdin=os.devnull, ready=False
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "stdout.txt", folder / "stderr.txt"]
        command = [str(repository / words[0]), *map(str, words[1:])]
        environment = {**os.environ, **(environment or {})}
        environment = {name: value for name, value in environment.items() if value is not None}
        files = [stdin, *self.files]
        self.process = fork(become, command, cwd or folder, environment, files, before, ready)

    def wait_for(self, happened):
        """Until `happened()`; AssertionError where the script ends before that, or DEADLINE has passed."""
        deadline = time.monotonic() + DEADLINE
        while self.process.is_alive() and time.monotonic() < deadline:
            if happened():
                return
            time.sleep(0.002)
        self.process.kill()
        raise AssertionError(f"ended before its time, or waited for in vain: {self.out}{self.err}")

    def kill(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)

    def end(self):
        self.process.join(DEADLINE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"did not end: {self.out}{self.err}")
        return self.process.exitcode

    @property
    def out(self):
        return self._read(0)

    @property
    def err(self):
        return self._read(1)

    def _read(self, number):
        """What was written so far, whose last character may not be whole yet."""
        path = self.files[number]
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def become(command, cwd, environment, files, before, ready):
    """In the new process: set folder, files and environment as a shell does, and run the command."""
    os.chdir(cwd)
    written = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (path, flags) in enumerate(zip(files, (os.O_RDONLY, written, written))):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    if ready:
        os.environ.clear()
        os.environ.update(environment)
        sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in environment
        ours = ("utils", "model_finetune", "model_download", "data_prepare")
        # another test's server may hold them, out of another copy of the repository
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        others = [path for path in sys.path if not (Path(path) / "utils" / "errors.py").is_file()]
        sys.path[:] = [str(Path(command[0]).parents[1]), *others]
    for function, *arguments in before:
        function(*arguments)
    if not ready:
        os.execve(sys.executable, [sys.executable, *command], environment)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            stream = open(number, mode, encoding="utf-8", closefd=False)
            if mode == "w" and environment.get("PYTHONUNBUFFERED"):
                stream.reconfigure(line_buffering=True)
            setattr(sys, name, stream)
        except OSError:  # closed: Python itself has None there, too
            setattr(sys, name, None)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def delay(module, name, seconds, calls=1):
    """For a script that is `ready`: from its `calls`-th call on, a function or Class.method of a module returns so much later.

    Its work then is not over before the test has looked and sent its signal, however busy the machine is.
    """
    place = importlib.import_module(module)
    *owners, name = name.split(".")
    for owner in owners:
        place = getattr(place, owner)
    function, count = getattr(place, name), itertools.count(1)

    def delayed(*values, **options):
        result = function(*values, **options)
        if next(count) >= calls:
            time.sleep(seconds)
        return result

    setattr(place, name, delayed)


def nobody_reads():
    """Make stdout a pipe whose reader has left, as `script | head -1` does after the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.close(writer)


def obey_permissions():
    """Permissions do not bind root. Give that power up and stay the owner of the files, or become nobody."""
    if os.geteuid():
        return
    if not sys.platform.startswith("linux"):
        os.setuid(65534)  # nobody
        return
    libc = ctypes.CDLL(None, use_errno=True)
    PR_SET_SECUREBITS, SECBIT_NOROOT, CAPABILITY_VERSION_3 = 28, 1, 0x20080522
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.prctl(PR_SET_SECUREBITS, SECBIT_NOROOT, 0, 0, 0) or libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "root cannot give up its power over permissions here")


def little_memory(more):
    """Limit the process to `more` bytes beyond what it has now (Linux, by RLIMIT_AS)."""
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + more,))
