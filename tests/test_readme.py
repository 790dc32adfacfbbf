"""What the README tells people to type: every command that needs no hub is run, as it stands there, in a copy of the project."""

import os
import re
import shutil
from importlib.util import find_spec

import pytest
from conftest import ROOT

import tasks
from utils.files import read_jsonl, write_json, write_jsonl
from utils.settings import flag_of, read_constants

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def commands(text):
    """The commands of the indented blocks, without their comments, in order."""
    lines = re.findall(
        r"^    ((?:python3?(?:\.11)?|make|accelerate|torchrun|\w+=\S+ python) .*)$", text, re.MULTILINE
    )
    return [line.partition("  #")[0].partition(" && ")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project in a path with a space and Chinese characters, a tiny model in the place of Qwen3-0.6B, some raw rows."""
    place = tmp_path_factory.mktemp("中医 模型") / "tcm"
    left_out = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", ".pytest_cache", "demo", "bench", "sft_*"
    )
    shutil.copytree(ROOT, place, ignore=left_out)
    for folder in ("data_prepare/raw", "data_prepare/qwen3", "trainer_output", "model_download/Qwen3-0.6B"):
        shutil.rmtree(place / folder, ignore_errors=True)
        (place / folder).mkdir()
    tiny, base = (place / "model_download" / name for name in ("tiny_qwen3_tcm", "Qwen3-0.6B"))
    shutil.copytree(tiny, base, dirs_exist_ok=True)
    general = place / "data_prepare/sample/general_questions.jsonl"
    write_jsonl(general, list(read_jsonl(general))[:8])
    rows = list(read_jsonl(place / "data_prepare/sample/tcm_sample.jsonl"))[::120]
    rows = [{name: value for name, value in row.items() if name != "split"} for row in rows]
    write_jsonl(place / "data_prepare/raw/rows.jsonl", rows)
    write_json(place / "my_rows.json", rows[:20])
    return place


def test_both_readmes_are_short_and_have_the_same_commands_which_exist():
    powershell = r"^    ((?:py -3\.11|\.venv\\|\$env:).*?)(?:  .*)?$"
    assert commands(TEXT) == commands(CHINESE)
    assert re.findall(powershell, TEXT, re.MULTILINE) == re.findall(powershell, CHINESE, re.MULTILINE)
    scripts = re.findall(r"^    \.venv\\\S+ (\S+)", TEXT, re.MULTILINE)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    named = re.findall(r"^    (?:make|py -3.11 tasks.py) (.*?)(?:  .*)?$", TEXT, re.MULTILINE)
    assert named.count("demo") == named.count("test") == 2 and set(named) <= set(tasks.TASKS)
    assert max(len(TEXT.encode()), len(CHINESE.encode())) <= 11 << 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_setting_and_flag_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:data_prepare|model_download|model_finetune|utils|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "/raw/" in path or "/qwen3/" in path, path
    for path in re.findall(r"\]\((?!http)([\w./-]+)\)", text):
        assert (page.parent / path).exists(), path
    scripts = [*ROOT.glob("data_prepare/*.py"), *ROOT.glob("model_*/*.py")]
    sources = [path.read_text(encoding="utf-8") for path in scripts]
    settings = {name for source in sources if "# ---- Settings" in source for name in read_constants(source)}
    assert set(re.findall(r"\b[A-Z]{2,}_[A-Z_]+\b", text)) - {"HF_ENDPOINT", "HF_TOKEN"} <= settings
    ours = re.sub(
        "(?s)```.*?```|`(?:llama-server|modelscope|mlx_lm).*?`|accelerate launch.*|pip config.*", "", text
    )
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", ours))
    assert flags - {"--workers", "--help", "--multi"} <= {flag_of(name) for name in settings}


def test_the_tree_of_utils_names_every_module():
    tree = (ROOT / "utils/README.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "utils").rglob("*.py") if path.stem != "__init__"]
    assert not [path for path in modules if not re.search(rf"\b{path.stem}\b", tree)]
    assert not [name for name in re.findall(r"`([\w/]+\.py)`", tree) if not (ROOT / "utils" / name).is_file()]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts scripts in forked processes")
def test_the_commands_run_one_after_another(copy, tmp_path):
    """In the order of the README and of the page on other tools, with default settings and no flag but those written there."""
    from processes import Script

    question = tmp_path / "question.txt"
    question.write_text("麻黄的药性是什么？\n", encoding="utf-8")
    ran = []
    for line in commands(TEXT + (ROOT / "docs/other_tools.md").read_text(encoding="utf-8")):
        words = line.split()
        if (
            line in ran
            or words[0] != "python"
            or "download_" in words[1].rpartition("/")[2]
            or "--serve" in line
        ):
            continue  # downloads are tested against a stand-in for the Hub; a server does not end
        if "--format gguf" in line and not find_spec("gguf"):
            continue  # an optional package
        if "finetune_" in line and any(words[1] in earlier for earlier in ran):
            words.append("--fresh")
        script = Script(words[1:], copy, tmp_path / str(len(ran)), cwd=copy, stdin=question, ready=True)
        assert script.end() == 0, (line, script.err[-2000:])
        assert "Traceback" not in script.err, line
        ran.append(line)
    assert len(ran) >= 9
    for path in (
        "sft_finetuned/model.safetensors",
        "lora_finetuned/merged/model.safetensors",
        "comparison.md",
    ):
        assert (copy / "trainer_output" / path).is_file()
