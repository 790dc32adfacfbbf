"""Make a Python on Linux lack what Windows lacks and refuse what Windows refuses, as far as this project could notice.

A test copies this file to a folder on PYTHONPATH under the name sitecustomize.py: every process started from there, the worker
processes too, runs it before anything else. Libraries may go on using what is here; our own files may not.
"""

import builtins
import errno
import fcntl
import multiprocessing
import os
import signal
import types

ROOT = os.environ["LIKE_WINDOWS_ROOT"]  # the project
FOLDER = os.environ["LIKE_WINDOWS_FOLDER"]  # in which open files cannot be moved, replaced or removed
ABSENT = {"fcntl", "grp", "pty", "pwd", "readline", "syslog", "termios", "tty"}


def refuse_import(name, namespace=None, *rest, **options):
    importer = (namespace or {}).get("__file__") or ""
    if importer.startswith(f"{ROOT}/") and "/.venv/" not in importer:
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "msvcrt":
            return types.SimpleNamespace(LK_NBLCK=2, locking=lock_bytes)
    return real_import(name, namespace, *rest, **options)


def lock_bytes(number, mode, count):
    """msvcrt.locking: some bytes from the present position on, for this process."""
    fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)


def flush(number):
    """FlushFileBuffers wants a handle that may write."""
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real_fsync(number)


def opened():
    """The files that this process has open or mapped into its memory."""
    for number in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the listing's own
            pass
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        yield from (line.split(maxsplit=5)[-1].strip() for line in maps)


def unless_open(function):
    """A function that refuses paths which are open, or hold an open file, as Windows does."""

    def call(*paths, **options):
        for path in paths:
            number = options.get("dir_fd")
            folder = "" if number is None else os.readlink(f"/proc/self/fd/{number}")
            path = os.path.realpath(os.path.join(folder, os.fspath(path)))
            for name in opened() if path.startswith(FOLDER) else ():
                if (name == path or name.startswith(f"{path}/")) and os.path.isfile(name):
                    raise PermissionError(errno.EACCES, "it is being used by another process", name)
        return function(*paths, **options)

    return call


def only_spawn(method=None):
    """multiprocessing.get_context: Windows can only start processes anew."""
    if method in ("fork", "forkserver"):
        raise ValueError(f"cannot find context for {method!r}")
    return real_context(method)


real_import, builtins.__import__ = builtins.__import__, refuse_import
real_fsync, os.fsync = os.fsync, flush
os.replace, os.rename, os.unlink, os.remove = map(unless_open, (os.replace, os.rename, os.unlink, os.remove))
real_context, multiprocessing.get_context = multiprocessing.get_context, only_spawn
del os.fork, signal.pthread_sigmask
