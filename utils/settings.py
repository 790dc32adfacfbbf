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
from typing import Any, NamedTuple

from utils.errors import UserError, complain, explain

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**32 - 1  # if a rule names no last number; numpy takes no larger seed
WHOLE = re.compile(r"(?P<least>-?\d+), (?:-?\d+, )*\.\.\.(?: (?P<most>\d+))?")
NUMBER = re.compile(
    r"(?P<unset>-1 or )?(?P<above>> )?(?P<least>[\d.]+)(?: or more|(?: to|, at most) (?P<most>[\d.]+))?"
)
WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    list: '["a list", "of texts"]',
}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Constant(NamedTuple):
    """A constant of a settings block: its line in the script, its rule without the brackets (or ""), the rest of its comment."""

    line: int
    rule: str
    comment: str


class Settings:
    """The resolved constants as attributes. `overridden` names those that the command line gave."""

    def __init__(self, values: dict[str, Any], overridden: set[str], verbose: bool = False):
        vars(self).update(values, overridden=overridden, verbose=verbose)

    def __getattr__(self, name):
        """Only asked for what is not there: a constant that was misspelt, or left out, at the top of the script."""
        if not name.isupper():
            raise AttributeError(name)
        raise UserError(
            f"the settings at the top of the script have no {name}{_nearest(name, self.as_dict())}"
        )

    def as_dict(self) -> dict[str, Any]:
        """{name: value}, with paths inside the repository written relative to it (for printing and run.json)."""
        return {name: _plain(value) for name, value in vars(self).items() if name.isupper()}

    def show(self) -> None:
        """Print MODEL and the settings that the command line gave; with --verbose all, those marked with a star."""
        begin, rest, star = "settings: ", ["the rest as in the script (--verbose shows all)"], ""
        shown = {name: value for name, value in self.as_dict().items() if name in {"MODEL", *self.overridden}}
        if self.verbose:
            begin, rest, star, shown = "settings (* from the command line): ", [], "*", self.as_dict()
        words = [
            f"{name}={value!r}{star if name in self.overridden else ''}" for name, value in shown.items()
        ]
        line = begin + "  ".join(words + rest)
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
    kinds = {name: _kind(name, constant.rule, namespace[name]) for name, constant in constants.items()}
    parser = _make_parser(script, namespace, constants, kinds, positional)
    words = sys.argv[1:] if argv is None else argv
    given = vars(parser.parse_args(_switched_on(words, kinds) if positional else words))
    verbose = given.pop("verbose", False)
    if "positional" in given:
        given[positional] = given.pop("positional")
    try:
        here, values = Path.cwd(), {}
    except FileNotFoundError:
        raise UserError(
            "the folder that this was started in has been deleted; go to one that is there, with cd"
        ) from None
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


def read_constants(source: str) -> dict[str, Constant]:
    """{NAME: Constant} of the settings block in a script's source text, in order. A comment goes on in indented lines below it."""
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
    rule_and_rest = re.compile(r"(?:\[([^]]+)\])?\s*(.*)")
    return {
        name: Constant(line, *rule_and_rest.fullmatch(" ".join(comments)).groups(""))
        for name, (line, comments) in found.items()
    }


def flag_of(name: str) -> str:
    """MAX_LENGTH -> --max-length."""
    return "--" + name.lower().replace("_", "-")


# ---- The command line


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
        form = {bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(kinds[name], {})
        metavar = {bool: "true|false", int: "N", float: "X"}.get(kinds[name], "TEXT")
        read = functools.partial(_read, kinds[name])
        parser.add_argument(flag_of(name), dest=name, help=told, metavar=metavar, type=read, **form)
    parser.add_argument(
        "--verbose", action="store_true", help="print every setting at the start, not only what was given"
    )
    if positional:
        parser.add_argument("positional", nargs="?", help=argparse.SUPPRESS)
    return parser


def _read(kind, text):
    """The text of a flag in its type. It stays a text if it is no number or truth value: _checked refuses it then."""
    try:
        return BOOLEANS.get(text.lower(), text) if kind is bool else text if kind is list else kind(text)
    except ValueError:
        return text


def _switched_on(argv, kinds):
    """argv with =true added to true-or-false flags without a value: the word after them may be the model folder."""
    switches = {flag_of(name) for name, kind in kinds.items() if kind is bool}
    return [
        f"{word}=true" if word in switches and after.lower() not in BOOLEANS else word
        for word, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
    ]


def _nearest(word, known):
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


# ---- Types, rules and paths


def _kind(name, rule, value):
    """The type of a constant: by its rule, else by its name, else by its value in the script."""
    if limits := WHOLE.fullmatch(rule) or NUMBER.fullmatch(rule):
        return int if limits.re is WHOLE else float
    if "|" in rule or name.endswith(("_DIR", "_FILE", "MODEL")):
        return str
    if name.endswith(("FILES", "MODELS")):
        return list
    return type(value) if type(value) in WANTED else str


def _checked(label, value, kind, rule):
    """The value of a constant or a flag, in its type; UserError if it is not what its type and its rule want."""
    fits, hint = type(value) is kind or kind is float and type(value) is int, ""
    wanted = rule or WANTED[kind]
    if kind in (int, float) and rule:
        wanted = f"{WANTED[kind]}: {rule}"
        value, (fits, hint) = (kind(value), _within(kind(value), rule)) if fits else (value, (False, ""))
    elif rule and kind is str:
        fits = value in ["" if choice == "empty" else choice for choice in rule.split(" | ")]
    elif value in ("True", "False"):
        fits, wanted = False, f"{value} without the quotes"
    elif kind is list and fits:
        fits = all(isinstance(item, str) for item in value)
    if not fits:
        raise UserError(f"{label} is {value!r}, wanted {wanted}{hint}")
    return value


def _within(value, rule):
    """(whether a number is within the limits of its rule, what was probably meant)."""
    limits = (WHOLE.fullmatch(rule) or NUMBER.fullmatch(rule)).groupdict()
    least, most = float(limits["least"]), float(limits["most"] or LARGEST)
    if (
        value == -1
        and limits.get("unset")
        or least <= value <= most
        and not (limits.get("above") and value == least)
    ):
        return True, ""
    mantissa, _, exponent = f"{value:e}".partition("e+")
    meant = float(f"{mantissa}e-{exponent}") if exponent and isinstance(value, float) else least  # 2e5: 2e-5
    return False, f"; {meant:g} meant?" if least < meant <= most else ""


def _resolve(name, value, base):
    """A value with its paths made whole, from the folder `base` on."""

    def path(text):
        return base / os.path.expanduser(text)

    def folder_or_id(text):
        return str(path(text)) if text and path(text).exists() else text

    if name.endswith("_FILES"):
        return [path(item) for item in value]
    if name.endswith(("_DIR", "_FILE")) and value:
        whole = path(value)
        for part in (whole, *whole.parents) if name.endswith("_DIR") else ():
            if part.is_file() or part.is_symlink() and not part.exists():
                kind = "a file" if part.is_file() else "a link to something that is not there"
                raise UserError(f"{flag_of(name)}: {part} is {kind}, wanted a folder")
        return whole
    if name.endswith(("_DIR", "_FILE")):
        return None
    if name.endswith("MODELS"):
        return [folder_or_id(item) for item in value]
    return folder_or_id(value) if name.endswith("MODEL") else value


def _plain(value):
    """A value for printing and run.json: a path inside the repository is written relative to it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if (
        isinstance(value, str | Path)
        and str(value).startswith(str(ROOT))
        and Path(value).is_relative_to(ROOT)
    ):
        return Path(value).relative_to(ROOT).as_posix()
    return str(value) if isinstance(value, Path) else value


# ---- Errors before main()


def _tell(kind, error, trace):
    """Python calls this for an error that nobody caught. A text without quotes in the settings is told in one line."""
    while trace.tb_next:
        trace = trace.tb_next
    file, failure = trace.tb_frame.f_code.co_filename, explain(error)
    if isinstance(error, NameError) and trace.tb_frame.f_globals["__name__"] == "__main__":
        line = linecache.getline(file, trace.tb_lineno).partition("#")[0].strip()
        right = {"true": "True", "false": "False"}.get(error.name.lower(), f'"{error.name}"')
        if re.fullmatch(r"[A-Z_]+ *= *\S+", line):
            failure = f"{_plain(Path(file).resolve())}, line {trace.tb_lineno}: {line} wants {right}", 2
    if failure is None:
        return sys.__excepthook__(kind, error, trace)
    sys.exit(complain(*failure))


sys.excepthook = _tell
