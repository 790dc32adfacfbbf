"""What the source text shows: nothing that Windows lacks, every encoding named, nothing newer than Python 3.11."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sources import FOR_USERS, SOURCES

# ---- Windows

NOT_ON_WINDOWS = re.compile(
    r"\b(?:os\.(?:fork|forkpty|killpg|getuid|geteuid|getgid|getpgid|setsid|setpgrp|sysconf|uname|mkfifo|chown|chroot|nice|wait3|wait4"
    r"|statvfs|getloadavg|sched_\w+|posix_\w+|pread|pwrite|sync|register_at_fork|openpty)"
    r"|signal\.(?:SIGKILL|SIGALRM|SIGHUP|SIGQUIT|SIGUSR\d|SIGCHLD|SIGPIPE|SIGSTOP|alarm|setitimer|pause|sigwait|pthread_\w+)"
    r"|time\.tzset|socket\.AF_UNIX)\b|[\"']/(?:proc|dev|tmp|etc|sys)/(?!fs/cgroup|self/cgroup)"
)  # a container's limit is read where there is one


@pytest.mark.parametrize("name", FOR_USERS)
def test_nothing_that_windows_lacks_is_used_unasked(name):
    for found in set(NOT_ON_WINDOWS.findall(FOR_USERS[name])):
        module, _, attribute = found.partition(".")
        asked = rf'hasattr\(\s*{module},\s*"{attribute}"\s*\)'
        assert re.search(asked, FOR_USERS[name]), found


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


# ---- Python 3.11 to 3.13

# The libraries in requirements.txt need 3.11. What came later and might be reached for here:
NEWER = {
    "": {"PythonFinalizationError"},
    "copy": {"replace"},
    "itertools": {"batched"},
    "math": {"sumprod", "fma"},
    "os": {"process_cpu_count", "listdrives", "unshare"},
    "random": {"binomialvariate"},
    "sys": {"monitoring"},
    "typing": {"override", "ReadOnly", "TypeIs"},
    "warnings": {"deprecated"},
}
NEWER_MODULES = {"annotationlib", "compression"}
NEWER_KEYWORDS = {"onexc", "walk_up", "delete_on_close", "case_sensitive", "recurse_symlinks"}


def newer_names(source):
    """What a source text uses of the standard library that Python 3.11 does not have."""
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
def test_python_3_11_can_read_it(name):
    ast.parse(SOURCES[name], feature_version=(3, 11))
    assert not set(newer_names(SOURCES[name]))


def test_newer_python_is_found():
    used = (
        "import annotationlib\nfrom typing import override\nfrom math import fma\nitertools.batched(x, 2)\n"
        "shutil.rmtree(x, onexc=f)\nPythonFinalizationError"
    )
    assert set(newer_names(used)) == {
        "annotationlib",
        "override",
        "fma",
        "batched",
        "onexc",
        "PythonFinalizationError",
    }
    with pytest.raises(SyntaxError):
        ast.parse("type Row = dict\n", feature_version=(3, 11))


@pytest.mark.parametrize("version", ["3.12", "3.13"])
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
