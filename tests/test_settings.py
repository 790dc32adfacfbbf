"""Settings: constants as flags, paths, one-line refusals, fast help."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from utils.errors import run
from utils.settings import command, parse_settings, read_constants

SCRIPT = '''"""A script.

    python script.py
"""
IGNORED = 1
# ---- Settings: edit here ----
MODEL = "model_download"    # a folder
# a remark that belongs to nothing
DATA_FILE = "data_prepare/x.jsonl"  # a file
RATE = 2e-5                 # a rate, of 10 %
    # and more about it
STEPS = 3                   # a count
EPOCHS = 3                  # passes
WARMUP = 0.1                # a share
SEED = -1                   # -1: another one every time
FAST = False                # a switch
INPUT_FILES = ["a", "b"]    # several
# ----
LATER = 2
'''
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("data_prepare", "model_download", "model_finetune")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_constants_come_with_their_comments():
    constants = read_constants(SCRIPT)
    assert " ".join(constants) == "MODEL DATA_FILE RATE STEPS EPOCHS WARMUP SEED FAST INPUT_FILES"
    assert constants["RATE"] == (2e-5, "a rate, of 10 % and more about it")


def test_flags_override_constants_and_paths_follow_their_origin(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    settings = parse_settings(script, ["--rate", "1", "--fast", "--input-files", "c", "--model", "mine"])
    assert (settings.RATE, settings.STEPS, settings.FAST) == (1.0, 3, True)
    assert settings.DATA_FILE == ROOT / "data_prepare/x.jsonl"  # from the script: relative to the repository
    assert settings.INPUT_FILES == [tmp_path / "c"]  # from the user: relative to where the user stands
    assert settings.MODEL == str(tmp_path / "mine")
    assert parse_settings(script, ["--model", "Qwen/Qwen3-0.6B"]).MODEL == "Qwen/Qwen3-0.6B"
    assert settings.as_dict()["DATA_FILE"] == "data_prepare/x.jsonl"


def test_a_switch_does_not_take_the_next_word_for_its_value(script, tmp_path):
    (tmp_path / "model").mkdir()
    settings = parse_settings(script, ["--fast", str(tmp_path / "model")], positional="MODEL")
    assert settings.FAST is True and settings.MODEL == str(tmp_path / "model")
    assert parse_settings(script, ["--fast", "false"]).FAST is False


@pytest.mark.parametrize(
    "line, wanted",
    [
        ('RATE = "2e-5"', "RATE is '2e-5', wanted 2e-5 without the quotes"),
        ('STEPS = "3"', "STEPS is '3', wanted 3 without the quotes"),
        ('FAST = "False"', "FAST is 'False', wanted False without the quotes"),
        ("MAX_STEPS = 3.5", "MAX_STEPS is 3.5, wanted a whole number"),
        ("DATA_FILE = 7", "DATA_FILE is 7, wanted a text"),
        ("MODEL = None", "MODEL is None, wanted a text"),
        ('INPUT_FILES = "a"', 'INPUT_FILES is \'a\', wanted ["a list", "of texts"]'),
        ("RATE = 2e-5, 3", "RATE is (2e-05, 3), wanted a number"),
        ("RATE = 2 * 1e-5", "RATE is a calculation, wanted a plain value"),
    ],
)
def test_a_constant_edited_to_another_type_is_told_by_its_name(tmp_path, capsys, line, wanted):
    path = tmp_path / "script.py"
    path.write_text(f'"""A script."""\n# ---- Settings ----\n{line}\n# ----\n', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        parse_settings(path, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: line 3 of the script: {wanted}")


def test_a_misspelt_constant_is_told_with_the_one_meant(script, capsys):
    script.write_text(SCRIPT.replace("RATE =", "RTAE ="), encoding="utf-8")
    settings = parse_settings(script, [])
    assert run(lambda: print(settings.RATE)) == 2
    assert capsys.readouterr().err == (
        "error: the settings at the top of the script have no RATE; is RTAE meant for it?\n"
    )
    assert not hasattr(settings, "anything_else")


def test_the_next_command_carries_what_is_not_the_default_there(tmp_path):
    script = "model_finetune/finetune_sft.py"
    there = {"TRAIN_FILE": ROOT / "data_prepare/qwen3/sft_train.jsonl"}
    assert command(script, **there) == f"python {script}"
    elsewhere = {"TRAIN_FILE": tmp_path / "a b.jsonl", "MODEL": str(ROOT / "trainer_output/x")}
    expected = f"python {script} --train-file '{tmp_path}/a b.jsonl' --model trainer_output/x"
    assert command(script, **elsewhere) == expected
    raw = ROOT / "data_prepare/raw"
    assert command("data_prepare/convert_to_qwen3_format.py", INPUT_FILES=raw).endswith("format.py")


def test_settings_are_shown_in_short_unless_asked_for(script, capsys):
    parse_settings(script, ["--steps", "4"]).show()
    assert capsys.readouterr().out == "settings: STEPS=4  the rest as in the script (--verbose shows all)\n"
    parse_settings(script, []).show()
    assert capsys.readouterr().out == "settings: as in the script (--verbose shows all)\n"
    parse_settings(script, ["--steps", "4", "--verbose"]).show()
    shown = capsys.readouterr().out
    assert "STEPS=4*" in shown and "RATE=2e-05" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stepz", "4"], "error: unknown argument --stepz; did you mean --steps?"),
        (["--steps", "many"], "error: --steps: wanted a whole number, got 'many'"),
        (["--rate", "fast"], "error: --rate: wanted a number such as 2e-5, got 'fast'"),
        (["--fast", "perhaps"], "error: --fast: wanted true or false, got 'perhaps'"),
        (["--steps"], "error: --steps: expected one argument"),
        (["--rate", "nan"], "error: --rate: wanted a finite number, got nan"),
        (["--rate", "inf"], "error: --rate: wanted a finite number, got inf"),
        (["--epochs", "0"], "error: --epochs: wanted 1 to 2,147,483,647, got 0"),
        (["--warmup", "1.5"], "error: --warmup: wanted 0 to 1, got 1.5"),
        (["--model", "~nobody_here/x"], "error: ~nobody_here/x: Could not determine home directory."),
        (["--seed", "-2"], "error: --seed: wanted 0 to 4,294,967,295, got -2"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parse_settings(script, arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast_and_tells_every_setting(script, run_script):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        shown = run_script(script, "--help")
        seconds.append(time.perf_counter() - began)
    assert shown.returncode == 0, shown.stderr
    assert min(seconds) < 0.7
    source = (ROOT / script).read_text(encoding="utf-8")
    for name, (_, comment) in read_constants(source).items():
        assert f"--{name.lower().replace('_', '-')}" in shown.stdout and comment, name
    assert f"python {script}" in source.split('"""')[1]  # the docstring is the exact command


ON_DISK = {  # what each script reads and writes
    "data_prepare/build_preference_pairs.py": "sft_train.jsonl sft_eval.jsonl dpo_train.jsonl dpo_eval.jsonl",
    "data_prepare/convert_to_qwen3_format.py": "sft_train.jsonl sft_eval.jsonl dpo_train.jsonl dpo_eval.jsonl exam.jsonl set_aside.jsonl "
    "report.json lengths.png",
    "data_prepare/download_tcm_data.py": "data_prepare/raw/ .source.json",
    "model_download/download_model.py": "model_download/ source.json",
    "model_download/export_model.py": "trainer_output/sft_finetuned README.md run.json",
    "model_download/load_local_model.py": "trainer_output/sft_finetuned /save",
    "model_download/pretrain_tiny_model.py": "statements.jsonl exercises.json terms.jsonl model_download/tiny_qwen3_tcm/",
    "model_finetune/compare_models.py": "sft_eval.jsonl exam.jsonl dpo_eval.jsonl general_questions.jsonl comparison.md comparison.json "
    "comparison.png comparison/",
    "model_finetune/finetune_dpo.py": "dpo_train.jsonl dpo_eval.jsonl checkpoints loss_curve.png training_log.jsonl run.json "
    "reference_logps.json",
    "model_finetune/finetune_lora.py": "sft_train.jsonl sft_eval.jsonl checkpoints loss_curve.png training_log.jsonl run.json merged/",
    "model_finetune/finetune_sft.py": "sft_train.jsonl sft_eval.jsonl checkpoints loss_curve.png training_log.jsonl run.json",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_file_that_is_read_or_written(script):
    said = (ROOT / script).read_text(encoding="utf-8").split('"""')[1]
    assert not [name for name in ON_DISK[script].split() if name not in said]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_an_unknown_flag(script, run_script):
    shown = run_script(script, "--no-such-flag", "1")
    assert shown.returncode == 2 and shown.stderr.startswith("error: unknown argument --no-such-flag")
    assert len(shown.stderr.splitlines()) == 1


def test_utils_import_nothing_heavy(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils.settings, utils.files, utils.errors, utils.model.folder; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_in_one_line_whoever_writes(capsys):
    import torch
    from safetensors import SafetensorError

    def plain():
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("a" * 100_000)

    def by_torch():
        with open("/dev/full", "wb") as file:
            torch.save({"a": torch.zeros(100_000)}, file)

    def by_safetensors():  # its words on a full tmpfs; it would put a file in the place of /dev/full
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def by_torch_elsewhere():  # its words on a full tmpfs
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    for write in (plain, by_torch, by_safetensors, by_torch_elsewhere):
        assert run(write) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: the disk is full") and len(errors.splitlines()) == 1


def test_an_error_that_nobody_foresaw_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
