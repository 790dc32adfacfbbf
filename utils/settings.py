"""Settings: the UPPER_CASE constants at the top of a script, each of them also a command-line flag.

A script holds one block, and calls `settings = read_settings(globals())` before any heavy import, so that `--help` is quick:

    # ---- Settings: edit here, or override on the command line (--learning-rate 1e-5) ----
    LEARNING_RATE = 2e-5    # [> 0, at most 0.1] full fine-tuning; LoRA takes about ten times this
    KEEP = "best"           # [best | last] the finished model
    # ----

A comment may begin with a rule in brackets, for the constant and for its flag alike. Without one a flag takes what its constant is.

    [1, 2, ...]  [-1, 0, ...]  [0, 1, ... 65535]                  whole numbers, from the first to the last
    [> 0]  [0 or more]  [0 to 1]  [> 0, at most 0.1]  [-1 or > 0]  numbers, with or without a fraction
    [best | last]  [bf16 | fp32 | empty]                          one of these texts; empty stands for ""

A constant whose name ends in _DIR, _FILE or _FILES is a path, one in MODEL or MODELS a path or a Hub id: relative to the repository
in the script, and to the folder the user stands in as a flag. It may be empty where the comment says what `empty` or `""` stands for.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
import sys
import time
import tokenize
import traceback
from pathlib import Path
from typing import Any

from utils.errors import UserError, complain, explain

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**32 - 1  # if a rule names no last number; numpy takes no larger seed
# A number's rule: -1 is allowed too, the least is excluded, the least, whole numbers only, the most.
RULE = re.compile(
    r"(-1 or )?(> )?(-?[\d.]+)((?:, -?\d+)*, \.\.\.)?(?: or more)?(?:(?: to|, at most|) ([\d.]+))?"
)
WANTED = {int: "a whole number", float: "a number", bool: "true or false"}
WANTED |= {str: "a text in quotes", list: "a list of texts"}
PATHS = ("_DIR", "_FILE", "_FILES", "MODEL", "MODELS")  # how the names of constants that are paths end
BOOLEANS = {"true": True, "false": False}


class Settings:
    """The resolved constants as attributes. `overridden` names those that the command line gave; `began` is the time, monotonic."""

    def __init__(self, values: dict[str, Any], overridden: set[str]):
        vars(self).update(values, overridden=overridden, began=time.monotonic())

    def as_dict(self) -> dict[str, Any]:
        """{name: value}, with paths inside the repository written relative to it (for printing and run.json)."""
        return {name: _plain(value) for name, value in vars(self).items() if name.isupper()}

    def show(self) -> None:
        """Print MODEL and the settings that the command line gave."""
        shown = {"MODEL", *self.overridden}
        words = [f"{name}={value!r}, " for name, value in self.as_dict().items() if name in shown]
        print(f"settings: {''.join(words)}{'the rest ' if words else ''}as in the script")


def read_settings(namespace: dict[str, Any], argv: list[str] | None = None, positional: str = "") -> Settings:
    """Read the settings of a script, whose globals() are `namespace`, and the flags in `argv` (default: sys.argv[1:]).

    `positional` names the one constant that may also be given without its flag. Exits 0 after --help. UserError, in one line,
    for an unknown flag (the nearest is named) and for a constant or a flag that is not as its rule wants it.
    """
    script = Path(namespace["__file__"]).resolve()
    constants = read_constants(script.read_text(encoding="utf-8"))
    kinds = {name: _kind(name, rule, namespace[name]) for name, (_, rule, _) in constants.items()}
    parser = _Parser(
        prog=f"python {_plain(script)}",
        usage="%(prog)s [flags]",
        description=namespace["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, (_, rule, comment) in constants.items():
        told = f"{f'[{rule}] ' if rule else ''}{comment} ({namespace[name]!r})".replace("%", "%%")
        form = {bool: {"nargs": "?", "const": "true"}, list: {"nargs": "+"}}.get(kinds[name], {})
        form["metavar"] = {bool: "true|false", int: "N", float: "X"}.get(kinds[name], "TEXT")
        parser.add_argument(flag_of(name), dest=name, help=told, **form)
    words = sys.argv[1:] if argv is None else argv
    if positional:
        parser.add_argument(positional, nargs="?", help=argparse.SUPPRESS)
        switches = [flag_of(name) for name, kind in kinds.items() if kind is bool]
        for at, (word, after) in enumerate(zip(words, [*words[1:], ""])):
            if word in switches and after.lower() not in BOOLEANS:
                words = [*words[:at], f"{word}=true", *words[at + 1 :]]  # or it would take the word after it
    given, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], map(flag_of, constants), 1, 0.55)
        mend = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {mend}")
    values = {}
    for name, (line, rule, comment) in constants.items():
        label, value, base = f"{_plain(script)}, line {line}: {name}", namespace[name], ROOT
        if name in given:
            label, value, base = flag_of(name), _from_text(kinds[name], getattr(given, name)), Path.cwd()
        texts = value if type(value) is list else [value]
        if name.endswith(PATHS) and "" in texts and not re.search('empty|""', comment):
            raise UserError(f"{label} is empty, wanted a path")
        values[name] = _resolve(name, _checked(label, value, kinds[name], rule), base)
    return Settings(values, set(vars(given)))


def command(script: str, **values: str | Path) -> str:
    """The command that runs `script` of this repository with these constants: one flag for each that differs from the script.

    command("model_finetune/finetune_sft.py", TRAIN_FILE=path) -> "python model_finetune/finetune_sft.py --train-file ..."
    """
    words, source = ["python", script], (ROOT / script).read_text(encoding="utf-8")
    for name, value in values.items():
        text = str(_plain(value))
        if f'\n{name} = "{text}"' not in source and f'\n{name} = ["{text}"]' not in source:
            words += [flag_of(name), text]
    return shlex.join(words)


def read_constants(source: str) -> dict[str, tuple[int, str, str]]:
    """{NAME: (line, rule without its brackets or "", rest of the comment)} of the settings block in a script's source text.

    A comment goes on in indented lines below it.
    """
    found, name, inside = {}, "", False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (line, column), text = token.start, token.string
        if not column and text.startswith("# ----"):
            if inside:
                break
            inside = text.startswith("# ---- Settings")
        elif inside and not column and token.type == tokenize.NAME and text.isupper():
            name, found[text] = text, (line, [])
        elif name and column and token.type == tokenize.COMMENT:
            found[name][1].append(text[1:].strip())
    comments = {name: re.match(r"(?:\[([^]]+)\])?\s*(.*)", " ".join(found[name][1])) for name in found}
    return {name: (found[name][0], *comment.groups("")) for name, comment in comments.items()}


def read_number(label: str, value: object, rule: str) -> Any:
    """A number by a rule such as "0 to 1" or "0, 1, ..."; UserError, which names `label`, for any other."""
    return _checked(label, value, _kind("", rule, 0), rule)


def flag_of(name: str) -> str:
    """MAX_LENGTH -> --max-length."""
    return "--" + name.lower().replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def _from_text(kind, text):
    """A flag's text in its type. It stays as it is if it is no number or truth value: _checked refuses it then."""
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    with contextlib.suppress(ValueError):
        return kind(text) if kind in (int, float) else text
    return text


def _kind(name, rule, value):
    """The type of a constant: by its rule, else by its name, else by its value in the script."""
    if limits := RULE.fullmatch(rule):
        return int if limits[4] else float
    if name.endswith(("FILES", "MODELS")):
        return list
    return type(value) if type(value) in WANTED and "|" not in rule and not name.endswith(PATHS) else str


def _checked(label, value, kind, rule):
    """The value of a constant or a flag, in its type; UserError if it is not what its type and its rule want."""
    fits, wanted = type(value) is kind or kind is float and type(value) is int, rule or WANTED[kind]
    if fits and kind is list:
        fits = all(isinstance(item, str) for item in value)
    elif rule and kind is str:
        fits = value in ["" if choice == "empty" else choice for choice in rule.split(" | ")]
    elif value in ("True", "False"):
        fits, wanted = False, f"{value} without the quotes"
    elif limits := RULE.fullmatch(rule):
        wanted = f"{WANTED[kind]}: {rule}"
        unset, above, least, _, most = limits.groups()
        least, most = float(least), float(most or LARGEST)
        if fits:
            value = kind(value)
            fits = least <= value <= most and not (above and value == least) or value == -1 and bool(unset)
        if not fits and type(value) is float and value > most and "e+" in f"{value:e}":
            meant = float(f"{value:e}".replace("e+", "e-"))
            wanted += f"; {meant:g} meant?" * (least < meant <= most)  # 2e5: 2e-5
    if not fits:
        raise UserError(f"{label} is {value!r}, wanted {wanted}")
    return value


def _resolve(name, value, base):
    """A value with its paths made whole, from the folder `base` on. An empty path is None, an empty model stays a text."""
    if not name.endswith(PATHS):
        return value
    if isinstance(value, list):
        return [_resolve(name[:-1], item, base) for item in value]
    path = base / os.path.expanduser(value)
    if name.endswith("MODEL"):
        return str(path) if value and path.exists() else value
    if name.endswith("_DIR") and value:
        for part in (path, *path.parents):
            if part.is_file():
                raise UserError(f"{flag_of(name)}: {part} is a file, wanted a folder")
    return path if value else None


def _plain(value):
    """A value for printing and run.json: a path inside the repository is written relative to it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str | Path) and Path(value).is_relative_to(ROOT):
        return Path(value).relative_to(ROOT).as_posix()
    return str(value) if isinstance(value, Path) else value


def _tell(kind, error, trace):
    """Python calls this for an error that nobody caught. A text without quotes in the settings is told in one line."""
    failure, place = explain(error), (traceback.extract_tb(trace) or [None])[-1]
    line = place.line.partition("#")[0].strip() if place else ""
    if isinstance(error, NameError) and re.fullmatch(r"[A-Z_]+ *= *\S+", line):
        right = {"true": "True", "false": "False"}.get(error.name.lower(), f'"{error.name}"')
        failure = f"{_plain(Path(place.filename).resolve())}, line {place.lineno}: {line} wants {right}", 2
    if failure is None:
        return sys.__excepthook__(kind, error, trace)
    sys.exit(complain(*failure))


sys.excepthook = _tell
