"""The conversion script, run in this process."""

import json
import sys

import pytest
from conftest import ROOT
from data_rows import read

sys.path.insert(0, str(ROOT / "data_prepare"))
import convert_to_qwen3_format as script

from utils.data.schemas import OUTPUTS


@pytest.fixture
def convert(tmp_path):
    """convert(paths, **settings) runs the script's main in this process and returns {output: rows} with "report"."""

    def run(*paths, **settings):
        folder = tmp_path / "out"
        arguments = ["--input-files", *map(str, paths), "--output-dir", str(folder), "--tokenizer-model", ""]
        for name, value in settings.items():
            arguments += ["--" + name.replace("_", "-"), str(value)]
        assert script.main(arguments) == 0
        found = {name: read(folder / f"{name}.jsonl") for name in (*OUTPUTS, "set_aside")}
        found["report"] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        kept = sum(len(found[name]) for name in OUTPUTS)
        assert found["report"]["rows_in"] == kept + len(found["set_aside"])
        assert found["report"]["rows_kept"] == kept and found["report"]["rows_set_aside"] == len(
            found["set_aside"]
        )
        return found

    return run
