"""Make a Python on Linux lack what Windows lacks and refuse what Windows refuses, as far as this project could notice.

A test runs it in the process of a script, before anything else: as sitecustomize.py in a folder on PYTHONPATH, or by name in a forked
one. Libraries may go on using what is here; our own files may not.
"""

import builtins
import errno
import fcntl
import os

ROOT = os.environ["LIKE_WINDOWS_ROOT"]  # the project
FOLDER = os.environ["LIKE_WINDOWS_FOLDER"]  # in which open files cannot be moved, replaced or removed
ABSENT = {"fcntl", "grp", "pty", "pwd", "readline", "syslog", "termios", "tty"}


def refuse_import(name, namespace=None, *rest, **options):
    importer = (namespace or {}).get("__file__") or ""
    if importer.startswith(f"{ROOT}/") and "/.venv/" not in importer and name in ABSENT:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real_import(name, namespace, *rest, **options)


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


real_import, builtins.__import__ = builtins.__import__, refuse_import
real_fsync, os.fsync = os.fsync, flush
os.replace, os.rename, os.unlink, os.remove = map(unless_open, (os.replace, os.rename, os.unlink, os.remove))
del os.fork
