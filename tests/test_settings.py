"""Settings: constants as flags, paths, one-line refusals, fast help."""

import os
import re
import runpy

import pytest
from conftest import ROOT

from utils.errors import UserError
from utils.settings import command, flag_of, read_constants, read_settings

SCRIPT = '''"""A script.

    python script.py
"""
IGNORED = 1
# ---- Settings: edit here ----
MODEL = "model_download"    # a folder
# a remark that belongs to nothing
DATA_FILE = "data_prepare/x.jsonl"  # a file
RATE = 2e-5                 # [> 0, at most 0.1] a rate, of 10 %
    # and more about it
STEPS = 3                   # [0, 1, ...] a count
EPOCHS = 3                  # [> 0] passes
WARMUP = 0.1                # [0 to 1] a share
TOP_P = -1.0                # [-1 or > 0, at most 1] a share; -1: as the folder says
SEED = -1                   # [-1, 0, ... 99] -1: another one every time
KEEP = "best"               # [best | last | empty] of the finished model
FAST = False                # a switch
INPUT_FILES = ["a", "b"]    # several
# ----
LATER = 2
'''
FILES = sorted([*ROOT.glob("data_prepare/*.py"), *ROOT.glob("model_*/*.py")])
MAINS = [path for path in FILES if "__main__" in path.read_text(encoding="utf-8")]
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in MAINS]


@pytest.fixture
def script(tmp_path):
    """script(wrong="right", ...) -> the globals() of the script, in which these texts are replaced."""

    def make(**changes):
        text = SCRIPT
        for name, line in changes.items():
            before = re.search(rf"^{name} = [^#]*", text, re.MULTILINE)[0]
            text = text.replace(before, f"{line}  ")
        (tmp_path / "script.py").write_text(text, encoding="utf-8")
        return runpy.run_path(str(tmp_path / "script.py"))

    return make


def test_constants_come_with_their_rules_and_comments():
    constants = read_constants(SCRIPT)
    assert " ".join(constants) == "MODEL DATA_FILE RATE STEPS EPOCHS WARMUP TOP_P SEED KEEP FAST INPUT_FILES"
    assert constants["RATE"] == (10, "> 0, at most 0.1", "a rate, of 10 % and more about it")
    assert constants["MODEL"] == (7, "", "a folder")


def test_flags_override_constants_and_paths_follow_their_origin(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    words = "--rate 0.01 --fast --input-files c --model mine --epochs 0.5 --keep".split()
    settings = read_settings(script(), [*words, ""])
    assert (settings.RATE, settings.STEPS, settings.FAST) == (0.01, 3, True)
    assert (settings.EPOCHS, settings.KEEP, settings.SEED, settings.TOP_P) == (0.5, "", -1, -1.0)
    assert settings.DATA_FILE == ROOT / "data_prepare/x.jsonl"  # from the script: relative to the repository
    assert settings.INPUT_FILES == [tmp_path / "c"]  # from the user: relative to where the user stands
    assert settings.MODEL == str(tmp_path / "mine")
    assert read_settings(script(), ["--model", "Qwen/Qwen3-0.6B"]).MODEL == "Qwen/Qwen3-0.6B"
    assert settings.as_dict()["DATA_FILE"] == "data_prepare/x.jsonl"


def test_a_switch_does_not_take_the_next_word_for_its_value(script, tmp_path):
    settings = read_settings(script(), ["--fast", str(tmp_path)], positional="MODEL")
    assert settings.FAST is True and settings.MODEL == str(tmp_path)
    assert read_settings(script(), ["--fast", "false"]).FAST is False


@pytest.mark.parametrize(
    "line, wanted",
    [
        ('RATE = "2e-5"', "RATE is '2e-5', wanted a number: > 0, at most 0.1"),
        ("RATE = 2e5", "RATE is 200000.0, wanted a number: > 0, at most 0.1; 2e-05 meant?"),
        ("RATE = 2e-5, 3", "RATE is (2e-05, 3), wanted a number: > 0, at most 0.1"),
        ("RATE = True", "RATE is True, wanted a number: > 0, at most 0.1"),
        ("STEPS = 3.5", "STEPS is 3.5, wanted a whole number: 0, 1, ..."),
        ('FAST = "False"', "FAST is 'False', wanted False without the quotes"),
        ('KEEP = "bets"', "KEEP is 'bets', wanted best | last | empty"),
        ("DATA_FILE = 7", "DATA_FILE is 7, wanted a text in quotes"),
        ('INPUT_FILES = "a"', "INPUT_FILES is 'a', wanted a list of texts"),
        ("INPUT_FILES = [7]", "INPUT_FILES is [7], wanted a list of texts"),
    ],
)
def test_a_constant_that_does_not_fit_is_told_by_its_name(script, line, wanted):
    name = line.split()[0]
    with pytest.raises(UserError) as refused:
        read_settings(script(**{name: line}), [])
    assert str(refused.value).endswith(f"script.py, line {read_constants(SCRIPT)[name][0]}: {wanted}")


@pytest.mark.parametrize(
    "line, code, told",
    [
        ("KEEP = best", 2, 'KEEP = best wants "best"\n'),
        ("FRESH = true      # start over", 2, "FRESH = true wants True\n"),
        ("import torhc", 2, "the package torhc is not installed"),
        ("def main():\n    print(nothing)\nmain()", 1, "NameError: name 'nothing' is not defined"),  # a bug
    ],
)
def test_an_error_before_main_is_one_line(tmp_path, run_script, line, code, told):
    text = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport utils.settings\n{line}\n"
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    done = run_script(tmp_path / "script.py")
    assert done.returncode == code and told in done.stderr
    assert done.stderr.startswith("Traceback") if code == 1 else done.stderr.count("\n") == 1


def test_the_next_command_carries_what_is_not_the_default_there(tmp_path):
    script = "model_finetune/finetune_sft.py"
    there = {"TRAIN_FILE": ROOT / "data_prepare/qwen3/sft_train.jsonl"}
    assert command(script, **there) == f"python {script}"
    elsewhere = {"TRAIN_FILE": tmp_path / "a b.jsonl", "MODEL": str(ROOT / "trainer_output/x")}
    expected = f"python {script} --train-file '{tmp_path}/a b.jsonl' --model trainer_output/x"
    assert command(script, **elsewhere) == expected
    raw = ROOT / "data_prepare/raw"
    assert command("data_prepare/convert_to_qwen3_format.py", INPUT_FILES=raw).endswith("format.py")


def test_settings_are_shown_in_short(script, capsys):
    for words, shown in (([], ""), (["--steps", "4"], "STEPS=4, ")):
        read_settings(script(), words).show()
        told = f"settings: MODEL='model_download', {shown}the rest as in the script\n"
        assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stepz", "4"], "unknown argument --stepz; did you mean --steps?"),
        (["--lx", "1"], "unknown argument --lx; python "),
        (["--steps", "many"], "--steps is 'many', wanted a whole number: 0, 1, ..."),
        (["--rate", "fast"], "--rate is 'fast', wanted a number: > 0, at most 0.1"),
        (["--fast", "perhaps"], "--fast is 'perhaps', wanted true or false"),
        (["--steps"], "--steps: expected one argument"),
        (["--rate", "nan"], "--rate is nan, wanted a number: > 0, at most 0.1"),
        (["--epochs", "inf"], "--epochs is inf, wanted a number: > 0"),
        (["--top-p", "0"], "--top-p is 0.0, wanted a number: -1 or > 0, at most 1"),
        (["--seed", "-2"], "--seed is -2, wanted a whole number: -1, 0, ... 99"),
        (["--seed", "100"], "--seed is 100, wanted a whole number: -1, 0, ... 99"),
        (["--keep", "newest"], "--keep is 'newest', wanted best | last | empty"),
        (["--data-file", ""], "--data-file is empty, wanted a path"),
        (["--input-files", "a", ""], "--input-files is empty, wanted a path"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(script, arguments, message):
    with pytest.raises(UserError) as refused:
        read_settings(script(), arguments)
    assert str(refused.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast_and_tells_every_setting(script, run_script):
    before = sum(os.times()[2:4])  # of the processor, for ended processes: other programs do not count
    shown = run_script(script, "--help")
    assert shown.returncode == 0, shown.stderr
    assert sum(os.times()[2:4]) - before < 0.5
    source = (ROOT / script).read_text(encoding="utf-8")
    for name, (_, rule, comment) in read_constants(source).items():
        assert flag_of(name) in shown.stdout and comment, name
        assert rule or type(runpy.run_path(str(ROOT / script))[name]) not in (int, float), name
    assert f"python {script}" in source.split('"""')[1]  # the docstring is the exact command


def test_utils_import_nothing_heavy(tmp_path, run_script):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils.device, utils.hub, utils.model.folder\n"
    )
    code += "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    assert run_script(tmp_path / "script.py").stdout == "[]\n"
