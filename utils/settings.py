"""Settings: the UPPER_CASE constants at the top of a script, each of them also a command-line flag.

A script holds one block, from a line that starts with `# ---- Settings` to the next line that starts with `# ----`:

    # ---- Settings: edit here, or override on the command line (--learning-rate 1e-5) ----
    LEARNING_RATE = 2e-5    # [> 0, at most 0.1] full fine-tuning; LoRA takes about ten times this
    KEEP = "best"           # [best | last] the finished model
    # ----

and calls `settings = read_settings(globals())` before any heavy import, so that `--help` is quick. A comment may begin with a
rule in brackets, which holds for the constant and for its flag alike:

    [1, 2, ...]  [-1, 0, ...]  [0, 1, ... 65535]                  whole numbers, from the first to the last
    [> 0]  [0 or more]  [0 to 1]  [> 0, at most 0.1]  [-1 or > 0]  numbers, with or without a fraction
    [best | last]  [bf16 | fp32 | empty]                          one of these texts; empty stands for ""

Without a rule a flag takes what its constant is: true or false, a text, a number, or a list of texts.

Paths: a constant whose name ends in _DIR, _FILE or _FILES is a path. Written in the script it is relative to the
repository, given as a flag it is relative to the folder the user stands in. A name that is or ends in MODEL(S) may be a
folder or a Hub id: what exists as a folder becomes its path, anything else stays as it is.
"""

import argparse
import ast
import difflib
import functools
import io
import itertools
import linecache
import os
import re
import shlex
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import Any

from utils.errors import UserError, complain, explain

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**32 - 1  # if a rule names no last number; numpy takes no larger seed
# A number's rule: where it begins, whether that is excluded or -1 is allowed too, whole or not, and where it ends.
RULE = re.compile(
    r"(-1 or )?(> )?(-?[\d.]+)((?:, -?\d+)*, \.\.\.)?(?: or more)?(?:(?: to|, at most|) ([\d.]+))?"
)
WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    list: "a list of texts",
}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Settings:
    """The resolved constants as attributes. `overridden` names those that the command line gave."""

    def __init__(self, values: dict[str, Any], overridden: set[str], verbose: bool = False):
        vars(self).update(values, overridden=overridden, verbose=verbose)

    def __getattr__(self, name):
        """Only asked for what is not there: a constant that was misspelt, or left out, at the top of the script."""
        if not name.isupper():
            raise AttributeError(name)
        raise UserError(f"the settings at the top of the script have no {name}{_nearest(name, vars(self))}")

    def as_dict(self) -> dict[str, Any]:
        """{name: value}, with paths inside the repository written relative to it (for printing and run.json)."""
        return {name: _plain(value) for name, value in vars(self).items() if name.isupper()}

    def show(self) -> None:
        """Print MODEL and the settings that the command line gave; with --verbose all, those marked with a star."""
        shown, rest = {"MODEL", *self.overridden}, "the rest as in the script (--verbose shows all)"
        if self.verbose:
            shown, rest = vars(self), "(* from the command line)"
        words = [
            f"{name}={value!r}{'*' * (self.verbose and name in self.overridden)}"
            for name, value in self.as_dict().items()
            if name in shown
        ]
        line = "settings: " + "  ".join([*words, rest])
        print(
            textwrap.fill(line, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        )


def read_settings(namespace: dict[str, Any], argv: list[str] | None = None, positional: str = "") -> Settings:
    """Read the settings of a script, whose globals() are `namespace`, and the flags in `argv` (default: sys.argv[1:]).

    `positional` names the one constant that may also be given without its flag. Exits 0 after --help. UserError, in one line,
    for an unknown flag (the nearest is named) and for a constant or a flag that is not as its rule wants it.
    """
    script = Path(namespace["__file__"]).resolve()
    constants = read_constants(script.read_text(encoding="utf-8"))
    kinds = {name: _kind(name, rule, namespace[name]) for name, (_, rule, _) in constants.items()}
    words = sys.argv[1:] if argv is None else argv
    if positional:  # the word after a true-or-false flag may be the model folder
        switches = [flag_of(name) for name, kind in kinds.items() if kind is bool]
        pairs = itertools.zip_longest(words, words[1:], fillvalue="")
        words = [
            f"{one}=true" if one in switches and two.lower() not in BOOLEANS else one for one, two in pairs
        ]
    given = vars(_make_parser(script, namespace, constants, kinds, positional).parse_args(words))
    verbose = given.pop("verbose", False)
    if "positional" in given:
        given[positional] = given.pop("positional")
    try:
        values, here = {}, Path.cwd()
    except FileNotFoundError:
        gone = "the folder that this was started in has been deleted; go to one that is there, with cd"
        raise UserError(gone) from None
    for name, (line, rule, _) in constants.items():
        label = flag_of(name) if name in given else f"{_plain(script)}, line {line}: {name}"
        value = _checked(label, given.get(name, namespace[name]), kinds[name], rule)
        values[name] = _resolve(name, value, here if name in given else ROOT)
    return Settings(values, set(given), verbose)


def command(script: str, **values: str | Path) -> str:
    """The command that runs `script` of this repository with these constants: a flag for each that its own default is not.

    command("model_finetune/finetune_sft.py", TRAIN_FILE=path) -> "python model_finetune/finetune_sft.py --train-file ..."
    """
    body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    defaults = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}
    words = ["python", script]
    for name, value in values.items():
        default = ast.literal_eval(defaults[name])
        default = default[0] if isinstance(default, list) and default else default
        if (ROOT / str(value)).resolve() != (ROOT / str(default)).resolve():
            words += [flag_of(name), str(_plain(value))]
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
    parts = {
        name: re.match(r"(?:\[([^]]+)\])?\s*(.*)", " ".join(comment)) for name, (_, comment) in found.items()
    }
    return {name: (found[name][0], *part.groups("")) for name, part in parts.items()}


def read_number(label: str, value: object, rule: str) -> Any:
    """A number, or the text of one, by a rule such as "0 to 1" or "0, 1, ..."; UserError, which names `label`, for any other."""
    kind = _kind("", rule, 0)
    return _checked(label, _from_text(kind, value) if isinstance(value, str) else value, kind, rule)


def flag_of(name: str) -> str:
    """MAX_LENGTH -> --max-length."""
    return "--" + name.lower().replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the nearest flag for an unknown one."""

    def parse_args(self, argv=None):
        known, unknown = self.parse_known_args(argv)
        if unknown:
            near = _nearest(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{near or f'; {self.prog} --help lists the flags'}")
        return known

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def _make_parser(script, namespace, constants, kinds, positional):
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS}
    prog, about = f"python {_plain(script)}", namespace["__doc__"]
    parser = _Parser(prog=prog, usage="%(prog)s [flags]", description=about, allow_abbrev=False, **form)
    for name, (_, rule, comment) in constants.items():
        told = f"{f'[{rule}] ' if rule else ''}{comment} ({namespace[name]!r})".replace("%", "%%")
        form = {bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(kinds[name], {})
        form["metavar"] = {bool: "true|false", int: "N", float: "X"}.get(kinds[name], "TEXT")
        form["type"] = functools.partial(_from_text, kinds[name])
        parser.add_argument(flag_of(name), dest=name, help=told, **form)
    parser.add_argument("--verbose", action="store_true", help="print every setting at the start")
    if positional:
        parser.add_argument("positional", nargs="?", help=argparse.SUPPRESS)
    return parser


def _from_text(kind, text):
    """A flag's text in its type. It stays a text if it is no number or truth value: _checked refuses it then."""
    try:
        return (
            BOOLEANS.get(text.lower(), text) if kind is bool else kind(text) if kind in (int, float) else text
        )
    except ValueError:
        return text


def _nearest(word, known):
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _kind(name, rule, value):
    """The type of a constant: by its rule, else by its name, else by its value in the script."""
    if limits := RULE.fullmatch(rule):
        return int if limits[4] else float
    if "|" in rule or name.endswith(("_DIR", "_FILE", "MODEL")):
        return str
    if name.endswith(("FILES", "MODELS")):
        return list
    return type(value) if type(value) in WANTED else str


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
        mantissa, _, exponent = f"{value:e}".partition("e+") if kind is type(value) is float else ("", "", "")
        if not fits and exponent and least < (meant := float(f"{mantissa}e-{exponent}")) <= most:
            wanted += f"; {meant:g} meant?"  # 2e5: 2e-5
    if not fits:
        raise UserError(f"{label} is {value!r}, wanted {wanted}")
    return value


def _resolve(name, value, base):
    """A value with its paths made whole, from the folder `base` on."""

    def path(text):
        return base / os.path.expanduser(text)

    def folder_or_id(text):
        return str(path(text)) if text and path(text).exists() else text

    if name.endswith(("_DIR", "_FILE")):
        whole = path(value) if value else None
        for part in (whole, *whole.parents) if name.endswith("_DIR") and value else ():
            if part.is_file() or part.is_symlink() and not part.exists():
                kind = "a file" if part.is_file() else "a link to something that is not there"
                raise UserError(f"{flag_of(name)}: {part} is {kind}, wanted a folder")
        return whole
    if name.endswith("MODEL"):
        return folder_or_id(value)
    one = path if name.endswith("_FILES") else folder_or_id if name.endswith("MODELS") else None
    return [one(item) for item in value] if one else value


def _plain(value):
    """A value for printing and run.json: a path inside the repository is written relative to it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    inside = isinstance(value, str | Path) and str(value).startswith(str(ROOT))
    if inside and Path(value).is_relative_to(ROOT):
        return Path(value).relative_to(ROOT).as_posix()
    return str(value) if isinstance(value, Path) else value


def _tell(kind, error, trace):
    """Python calls this for an error that nobody caught. A text without quotes in the settings is told in one line."""
    while trace.tb_next:
        trace = trace.tb_next
    file, failure = trace.tb_frame.f_code.co_filename, explain(error)
    line = linecache.getline(file, trace.tb_lineno).partition("#")[0].strip()
    if isinstance(error, NameError) and re.fullmatch(r"[A-Z_]+ *= *\S+", line):
        right = {"true": "True", "false": "False"}.get(error.name.lower(), f'"{error.name}"')
        failure = f"{_plain(Path(file).resolve())}, line {trace.tb_lineno}: {line} wants {right}", 2
    if failure is None:
        return sys.__excepthook__(kind, error, trace)
    sys.exit(complain(*failure))


sys.excepthook = _tell
