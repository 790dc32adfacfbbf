"""Downloads, against a stand-in for the Hub on the loopback: what is fetched, recorded, recognised and verified."""

import hashlib
import json

import pytest
from hub_helpers import MODEL, ROWS, assert_whole

from data_prepare import download_tcm_data
from model_download import download_model


def test_model_only_what_is_needed_and_its_source(hub, get):
    code, out, _ = get.model()
    assert code == 0 and "next: python model_download/load_local_model.py" in out
    assert_whole(get.folder)
    source = json.loads((get.folder / "source.json").read_text(encoding="utf-8"))
    assert (source["repo"], source["revision"], source["asked_for"]) == ("tcm/small", hub.commit, "main")
    assert source["licence"] == "apache-2.0"
    for name in ("config.json", "model.safetensors"):
        assert source["files"][name] == {
            "size": len(MODEL[name]),
            "sha256": hashlib.sha256(MODEL[name]).hexdigest(),
        }
    assert {path.rpartition("/")[2] for path, _ in hub.asked("/resolve/")} == set(source["files"])


def test_finished_model_needs_no_hub(hub, get):
    get.model()
    hub.log.clear()
    code, out, _ = get.model("--revision", hub.commit)
    assert (code, out.count("\n"), hub.log) == (0, 1, []) and "is complete in" in out


def test_damage_after_the_download_is_found_and_mended(hub, get):
    get.model()
    damaged = bytearray(MODEL["model.safetensors"])
    damaged[5] ^= 1
    (get.folder / "model.safetensors").write_bytes(damaged)
    code, out, _ = get.model("--revision", hub.commit)
    assert code == 0 and "model.safetensors is damaged (sha256" in out
    assert_whole(get.folder)


def test_another_model_or_commit_in_the_folder_is_refused(hub, get):
    get.model()
    commit = hub.add("model", "tcm/small", {**MODEL, "config.json": b"{}"})
    code, _, err = get.model()
    assert (
        code == 2
        and f"holds tcm/small at {hub.commit}, not tcm/small at {commit}; delete it, or choose" in err
    )
    assert_whole(get.folder)


def test_a_file_of_the_user_is_not_overwritten(hub, get):
    get.folder.mkdir()
    (get.folder / "LICENSE").write_text("mine", encoding="utf-8")
    code, _, err = get.model()
    assert code == 2 and "LICENSE is there, but is not LICENSE of tcm/small" in err
    assert (get.folder / "LICENSE").read_text(encoding="utf-8") == "mine"


def test_data_set_keeps_its_bytes_and_records_rows(hub, get):
    code, out, _ = get.data()
    assert code == 0 and "2,000 rows, licence: apache-2.0" in out
    assert (get.folder / "rows-train.json").read_bytes() == ROWS
    source = json.loads((get.folder / "rows-train.source.json").read_text(encoding="utf-8"))
    assert source["sha256"] == hashlib.sha256(ROWS).hexdigest()
    assert (source["repo"], source["file"], source["rows"], source["size"]) == (
        "tcm/rows",
        "train.json",
        2000,
        len(ROWS),
    )
    hub.log.clear()
    code, out, _ = get.data("--files", "train.json", "--revision", source["revision"])
    assert (code, out.count("\n"), hub.log) == (0, 1, [])


def test_data_files_of_two_folders_stay_apart_and_clashes_are_refused(hub, get):
    hub.add("dataset", "tcm/many", {"zh/a.jsonl": b"{}\n", "en/a.jsonl": b"{}\n{}\n", "b.csv": b"q,a\n"})
    code, _, _ = get(download_tcm_data, "--dataset", "tcm/many")
    assert code == 0
    assert {path.name for path in get.folder.glob("*[lv]")} == {
        "many-zh-a.jsonl",
        "many-en-a.jsonl",
        "many-b.csv",
    }
    assert json.loads((get.folder / "many-b.source.json").read_text(encoding="utf-8"))["rows"] is None
    hub.add("dataset", "tcm/clash", {"a.csv": b"", "A.tsv": b""})
    code, _, err = get(download_tcm_data, "--dataset", "tcm/clash")
    assert code == 2 and "A.tsv, a.csv would get the same name here; choose with --files" in err


@pytest.mark.parametrize(
    "content, rows",
    [(b'{"a": 1}\n\n{"a": 2}', 2), (b'[{"a": 1},\n{"a": 2}]', None), (b'{\n"a": 1\n}', None), (b"", None)],
)
def test_rows_are_counted_in_json_lines_only(tmp_path, content, rows):
    (tmp_path / "x.json").write_bytes(content)
    assert download_tcm_data.count_rows(tmp_path / "x.json") == rows


def test_sample_is_copied_offline(get, tmp_path, monkeypatch):
    monkeypatch.setattr(download_tcm_data, "SAMPLE_DIR", tmp_path)
    code, _, err = get(download_tcm_data, "--dataset", "sample")
    assert code == 2 and "tcm_sample.jsonl does not exist; make it with: git checkout" in err
    for name in ("tcm_sample.jsonl", "tcm_exam.jsonl"):
        (tmp_path / name).write_bytes(ROWS)
    code, out, _ = get(download_tcm_data, "--dataset", "sample")
    assert code == 0 and "next: python data_prepare/convert_to_qwen3_format.py" in out
    assert (get.folder / "tcm_exam.jsonl").read_bytes() == ROWS
    assert json.loads((get.folder / "tcm_sample.source.json").read_text(encoding="utf-8"))["rows"] == 2000


def test_tiny_model_is_named_or_missed(get, tmp_path, monkeypatch):
    monkeypatch.setattr(download_model, "TINY_DIR", tmp_path / "tiny")
    code, _, err = get(download_model, "--model", "tiny")
    assert code == 2 and "the built-in model is missing; get it back with: git checkout" in err
    (tmp_path / "tiny").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "tiny" / name).write_text("{}", encoding="utf-8")
    code, out, _ = get(download_model, "--model", "tiny")
    assert code == 0 and f"next: python model_download/load_local_model.py {tmp_path}" in out


def test_long_listings_come_in_pages(hub, get):
    hub.add("model", "tcm/small", MODEL, page_size=3)
    assert get.model()[0] == 0
    assert_whole(get.folder)
