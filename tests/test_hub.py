"""Downloads, against a stand-in for the Hub on the loopback: whole and verified, or one line that tells the cause."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from fake_hub import TOKEN, FakeHub, sleep

from data_prepare import download_tcm_data
from model_download import download_model
from utils.errors import UserError, run
from utils.model import folder

MODEL = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "LICENSE": b"Apache",
    "README.md": b"card",
    "model.safetensors": random.Random(1).randbytes(3_000_000),
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "mlx/model.safetensors": b"other",
}
BROKEN = b'{"id": "tcm/small", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}' % (b"0" * 40)
ROWS = "".join(
    json.dumps({"query": f"问{n}", "response": "答" * 20}, ensure_ascii=False) + "\n" for n in range(2000)
).encode()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A FakeHub with one model and one data set, as HF_ENDPOINT; nothing waits before it asks again."""
    import huggingface_hub

    fake = FakeHub()
    fake.commit = fake.add("model", "tcm/small", MODEL)
    fake.add("dataset", "tcm/rows", {"train.json": ROWS, "README.md": b"card", "dataset_infos.json": b"{}"})
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back after the test, whatever sets it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 60)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield fake
    huggingface_hub.close_session()
    fake.stop()


@pytest.fixture
def get(capsys, tmp_path):
    """get(script, ...) -> (exit code, stdout, the last line of stderr); get.folder is the output folder. No token is ever
    printed or kept."""

    def call(script, *arguments):
        code = run(lambda: script.main([*map(str, arguments), "--output-dir", str(call.folder)]))
        out, err = capsys.readouterr()
        assert (os.environ.get("HF_TOKEN") or TOKEN) not in out + err and err.count("error: ") == (code != 0)
        assert not any(TOKEN.encode() in path.read_bytes() for path in call.folder.glob("*"))
        return code, out, err.splitlines()[-1] if err else ""

    call.folder = tmp_path / "got"
    call.model = lambda *arguments: call(download_model, "--model", "tcm/small", *arguments)
    call.data = lambda *arguments: call(download_tcm_data, "--dataset", "tcm/rows", *arguments)
    return call


def assert_whole(folder):
    """The wanted files are there, right to the last bit, and no unfinished one."""
    wanted = {"config.json", "tokenizer.json", "LICENSE", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted | {"source.json"}
    assert all((folder / name).read_bytes() == MODEL[name] for name in wanted)


# ---- What is fetched, recorded and recognised


def test_of_a_model_only_what_is_needed_is_fetched_and_recorded(hub, get):
    code, out, _ = get.model()
    assert code == 0 and "next: python model_download/load_local_model.py" in out
    assert_whole(get.folder)
    source = json.loads((get.folder / "source.json").read_text(encoding="utf-8"))
    assert (source["repo"], source["revision"], source["asked_for"]) == ("tcm/small", hub.commit, "main")
    assert source["licence"] == "apache-2.0"
    for name, found in source["files"].items():
        assert found == {"size": len(MODEL[name]), "sha256": hashlib.sha256(MODEL[name]).hexdigest()}
    assert {path.rpartition("/")[2] for path, _ in hub.asked("/resolve/")} == set(source["files"])
    hub.log.clear()
    code, out, _ = get.model("--revision", hub.commit)
    assert (code, out.count("\n"), hub.log) == (0, 1, []) and "is complete in" in out
    damaged = bytearray(MODEL["model.safetensors"])
    damaged[5] ^= 1
    (get.folder / "model.safetensors").write_bytes(damaged)
    assert get.model("--revision", hub.commit)[0] == 0  # found and mended
    assert_whole(get.folder)


def test_what_is_there_already_is_not_overwritten(hub, get):
    get.folder.mkdir()
    (get.folder / "LICENSE").write_text("mine", encoding="utf-8")
    code, _, err = get.model()
    assert code == 2 and "LICENSE is there, but is not LICENSE of tcm/small" in err
    assert (get.folder / "LICENSE").read_text(encoding="utf-8") == "mine"
    (get.folder / "LICENSE").unlink()
    get.model()
    commit = hub.add("model", "tcm/small", {**MODEL, "config.json": b"{}"})
    code, _, err = get.model()
    assert code == 2 and f"source.json is of tcm/small {hub.commit}, not tcm/small {commit}; delete" in err
    assert_whole(get.folder)


def test_data_files_keep_their_bytes_and_stay_apart_and_clashes_are_refused(hub, get):
    code, out, _ = get.data()
    assert code == 0 and f"{len(ROWS):,} bytes, licence: apache-2.0" in out
    assert (get.folder / "rows-train.json").read_bytes() == ROWS
    source = json.loads((get.folder / "rows-train.source.json").read_text(encoding="utf-8"))
    wanted = {"repo": "tcm/rows", "file": "train.json", "size": len(ROWS)}
    assert source.items() >= {**wanted, "sha256": hashlib.sha256(ROWS).hexdigest()}.items()
    hub.log.clear()
    code, out, _ = get.data("--files", "train.json", "--revision", source["revision"])
    assert (code, out.count("\n"), hub.log) == (0, 1, [])
    files = {"zh/a.jsonl": b'{"a": 1}', "en/a.jsonl": b"{}\n"}
    hub.add("dataset", "tcm/many", files)
    assert get(download_tcm_data, "--dataset", "tcm/many")[0] == 0
    assert (get.folder / "many-zh-a.jsonl").read_bytes() == files["zh/a.jsonl"]
    hub.add("dataset", "tcm/clash", {"a.csv": b"", "A.tsv": b""})
    code, _, err = get(download_tcm_data, "--dataset", "tcm/clash")
    assert code == 2 and "A.tsv, a.csv would get the same name here; choose with --files" in err


def test_sample_and_tiny_model_are_offline(get, tmp_path, monkeypatch):
    monkeypatch.setattr(download_tcm_data, "SAMPLE_DIR", tmp_path)
    code, _, err = get(download_tcm_data, "--dataset", "sample")
    assert code == 2 and "tcm_sample.jsonl does not exist; make it with: git checkout" in err
    for name in download_tcm_data.SAMPLE_FILES:
        (tmp_path / name).write_bytes(ROWS)
    code, out, _ = get(download_tcm_data, "--dataset", "sample")
    assert code == 0 and "next: python data_prepare/convert_to_qwen3_format.py" in out
    assert (get.folder / "tcm_exam.jsonl").read_bytes() == ROWS
    monkeypatch.setattr(download_model, "TINY_DIR", tmp_path / "tiny")
    code, _, err = get(download_model, "--model", "tiny")
    assert code == 2 and "the built-in model is missing; get it with: git checkout" in err


def test_the_token_stays_with_the_endpoint(hub, get, monkeypatch):
    """A redirect of a file to another host loses it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    other = FakeHub()
    other.add("model", "tcm/small", MODEL)
    hub.add("model", "tcm/small", MODEL, gated=True)
    location = f"{other.url}/tcm/small/resolve/main/config.json"
    hub.fault("/resolve/.*config.json", status=302, headers={"Location": location})
    assert get.model()[0] == 0
    assert_whole(get.folder)
    assert all("Authorization" in headers for _, headers in hub.asked("/api/"))
    assert [path for path, _ in other.log] == ["/tcm/small/resolve/main/config.json"]
    assert not any("Authorization" in headers for _, headers in [*other.log, *hub.asked("/storage/")])
    other.stop()


# ---- Faults that pass


def test_a_connection_that_is_reset_goes_on(hub, get):
    hub.fault("/storage/", times=1, cut=1_000_000, rst=True)
    code, out, _ = get.model()
    assert code == 0 and "going on at " in out
    assert_whole(get.folder)
    assert "Range" in hub.asked("/storage/")[1][1]  # what arrived is kept


def test_killed_download_goes_on(hub, get, tmp_path):
    hub.fault("/storage/", times=1, cut=2_000_000, hang=600)
    command = [ROOT / "model_download/download_model.py", "--model", "tcm/small", "--output-dir", get.folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    killed = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 180
    while not (parts := [p for p in get.folder.glob("model*.part") if p.stat().st_size >= 1_800_000]):
        assert time.monotonic() < deadline and killed.poll() is None
        sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (get.folder / "model.safetensors").exists() and not (get.folder / "source.json").exists()
    size = parts[0].stat().st_size
    code, out, _ = get.model()
    assert code == 0 and "model.safetensors: going on at 1." in out and not parts[0].exists()
    assert hub.asked("/storage/")[1][1]["Range"] == f"bytes={size}-"
    assert_whole(get.folder)


def test_part_of_another_commit_is_not_mixed_in(hub, get):
    hub.fault("/storage/", times=1, cut=1_000_000, rst=True)
    hub.fault("/storage/", times=1, status=503)
    assert get.model()[0] == 1 and list(get.folder.glob("*.part"))
    hub.add("model", "tcm/small", {**MODEL, "model.safetensors": MODEL["model.safetensors"][::-1]})
    assert get.model()[0] == 0
    assert (get.folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"][::-1]


# ---- Faults that stay


@pytest.mark.parametrize(
    "where, fault, code, told",
    [
        ("/storage/", {"corrupt": True}, 1, "model.safetensors of tcm/small arrived damaged from http"),
        ("/config.json", {"corrupt": True}, 1, "config.json of tcm/small arrived damaged"),
        ("/storage/", {"status": 503}, 1, "localhost answered 503 (Service Unavailable); try later, or another mirror"),
        ("/revision/", {"status": 403}, 2, "127.0.0.1 answered 403 (Forbidden); check the token in HF_TOKEN"),
        ("/revision/", {"status": 200}, 1, "does not answer as the Hub does; check HF_ENDPOINT and the network's login page"),
        ("/revision/", {"status": 200, "body": BROKEN}, 1, "does not answer as the Hub does"),
        ("/revision/", {"status": 200, "body": BROKEN.replace(b"000", b"../")}, 1, "does not answer as the Hub does"),
    ],
)  # fmt: skip
def test_faults_that_stay_are_told_in_one_line(hub, get, where, fault, code, told):
    hub.fault(where, **fault)
    ended, _, err = get.model()
    assert ended == code and told in err
    assert not (get.folder / "source.json").exists()
    hub.faults.clear()
    assert get.model()[0] == 0  # the same command goes on
    assert_whole(get.folder)


@pytest.mark.parametrize(
    "environment, arguments, code, told",
    [
        ({}, ["--model", "tcm/gated"], 2, "tcm/gated is gated: accept its terms at https://huggingface.co/tcm/gated, then set HF_TOKEN"),
        ({"HF_TOKEN": "hf_wrong"}, [], 2, "127.0.0.1 answered 401 (Invalid credentials in Authorization header); check the token in HF_TOKEN"),
        ({}, ["--model", "tcm/nothing"], 2, "no model tcm/nothing at main on http"),
        ({}, ["--revision", "v9"], 2, "no model tcm/small at v9 on http"),
        ({}, ["--model", "small"], 2, "'small' is not the name of a model on the Hub, wanted owner/name"),
        ({}, ["--model", "tcm/pickles"], 2, "no config.json with *.safetensors weights"),
        ({"HF_TOKEN": "令牌"}, [], 1, "check the network, HF_ENDPOINT, HF_TOKEN and the proxy"),
        ({"HF_ENDPOINT": "hf-mirror.com"}, [], 1, "no connection to hf-mirror.com ("),
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, [], 1, "and the proxy"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_told(hub, get, monkeypatch, environment, arguments, code, told):
    hub.add("model", "tcm/gated", MODEL, gated=True)
    hub.add("model", "tcm/pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended, _, err = get(download_model, "--model", "tcm/small", *arguments)
    assert ended == code and told in err


def test_files_of_other_names_and_other_originals_are_refused(hub, get):
    code, _, err = get.data("--files", "trian.json")
    assert code == 2 and "tcm/rows has no data file trian.json (it has train.json)" in err
    hub.add("model", download_model.PINNED_MODEL, MODEL, commit=download_model.PINNED_COMMIT)
    code, _, err = get(download_model)
    assert code == 1 and "lists another model.safetensors for Qwen/Qwen3-0.6B than this script knows" in err
    assert not hub.asked("/resolve/")


def test_too_little_disk(hub, get, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    code, _, err = get.model()
    assert code == 1 and "2.9 MiB to fetch, but only 976.6 KiB free in" in err and not hub.asked("/resolve/")


def test_a_hub_id_stands_for_the_folder_of_its_download(hub, get, monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    with pytest.raises(UserError, match="not on this machine; get it with: .* --model tcm/small"):
        folder.check_model("tcm/small")
    get.folder = tmp_path / "model_download" / "small"
    assert get.model()[0] == 0
    assert folder.check_model("tcm/small") == str(get.folder)
    with pytest.raises(UserError, match="get it with: .* --model other/small"):
        folder.check_model("other/small")
