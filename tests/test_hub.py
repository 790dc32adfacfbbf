"""Downloads, against a stand-in for the Hub on the loopback: every fault that a network or a server has, one test each."""

import errno
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from fake_hub import TOKEN, FakeHub

from data_prepare import download_tcm_data
from model_download import download_model
from utils.errors import run
from utils.progress import Meter

WEIGHTS = random.Random(1).randbytes(3_000_000)
MODEL = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "LICENSE": b"Apache",
    "README.md": b"card",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "mlx/model.safetensors": b"other",
}
ROWS = "".join(
    json.dumps({"query": f"问{n}", "response": "答" * 20}, ensure_ascii=False) + "\n" for n in range(2000)
).encode()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A FakeHub with one model and one data set, as HF_ENDPOINT; `hub.waits` holds the waits instead of waiting."""
    import huggingface_hub

    fake = FakeHub()
    fake.commit = fake.add("model", "tcm/small", MODEL)
    fake.add("dataset", "tcm/rows", {"train.json": ROWS, "README.md": b"card", "dataset_infos.json": b"{}"})
    fake.waits = []
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("utils.hub.time", SimpleNamespace(sleep=fake.waits.append, time=time.time))
    yield fake
    huggingface_hub.close_session()
    fake.stop()


@pytest.fixture
def get(capsys, tmp_path):
    """get(script, ...) -> (exit code, stdout, stderr); get.folder is the output folder. No token is ever printed or kept."""

    def call(script, *arguments):
        code = run(lambda: script.main([*map(str, arguments), "--output-dir", str(call.folder)]))
        out, err = capsys.readouterr()
        assert (os.environ.get("HF_TOKEN") or TOKEN) not in out + err
        assert not any(TOKEN.encode() in path.read_bytes() for path in call.folder.glob("*"))
        return code, out, err

    call.folder = tmp_path / "got"
    call.model = lambda *arguments: call(download_model, "--model", "tcm/small", *arguments)
    call.data = lambda *arguments: call(download_tcm_data, "--dataset", "tcm/rows", *arguments)
    return call


def assert_whole(folder):
    """The wanted files are there, right to the last bit, and no unfinished one."""
    wanted = {"config.json", "tokenizer.json", "LICENSE", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted | {"source.json"}
    assert all((folder / name).read_bytes() == MODEL[name] for name in wanted)


# ---- what is fetched and recorded


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
    damaged = bytearray(WEIGHTS)
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


def test_progress_shows_speed_and_time_left(capsys, monkeypatch):
    seconds = iter([0, 20, 25, 100, 100])
    monkeypatch.setattr("utils.progress.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with Meter("model.safetensors", 500_000_000, 1_500_000_000) as meter:
        meter.show(700_000_000)
        meter.show(800_000_000)  # five seconds later: too soon for another line
        meter.show(1_500_000_000)
    assert capsys.readouterr().out.splitlines() == [
        "  model.safetensors: going on at 500.0 MB of 1.500 GB",
        "  model.safetensors   47%  700.0 MB of 1.500 GB  10.0 MB/s  80 s left",
        "  model.safetensors  100%  1.500 GB of 1.500 GB  10.0 MB/s  in 1.7 min",
        "  model.safetensors  100%  1.500 GB of 1.500 GB  10.0 MB/s  in 1.7 min",
    ]


# ---- faults that pass


def test_busy_listing_429_waits_as_long_as_the_server_asks(hub, get):
    hub.fault("/revision/", times=1, status=429, headers={"Retry-After": "7"})
    hub.fault("/tree/", times=1, status=429, headers={"RateLimit": '"api";r=0;t=55'})
    code, out, _ = get.model()
    assert code == 0 and hub.waits == [7, 55]
    assert "127.0.0.1 answered 429 (too many requests); retry 1 of 6 in 7 s" in out


def test_listing_503_is_tried_again_with_growing_waits(hub, get):
    hub.fault("/revision/", times=3, status=503)
    code, out, _ = get.model()
    assert code == 0 and hub.waits == [1, 2, 4]
    assert "127.0.0.1 answered 503 (Service Unavailable); retry 3 of 6 in 4 s" in out


def test_file_503_is_tried_again(hub, get):
    hub.fault("/resolve/.*/model.safetensors", times=1, status=503, headers={"Retry-After": "2"})
    code, out, _ = get.model()
    assert code == 0 and hub.waits == [2] and "answered 503" in out
    assert_whole(get.folder)


@pytest.mark.parametrize(
    "how, told", [({"rst": True}, "reset by peer"), ({}, "closed connection")], ids=["reset", "cut"]
)
def test_broken_connection_goes_on_where_it_broke(hub, get, how, told):
    hub.fault("/storage/", times=1, cut=1_000_000, **how)
    code, out, _ = get.model()
    assert (
        code == 0
        and "the connection to localhost broke (" in out
        and told in out
        and "retry 1 of 6 in 1 s" in out
    )
    assert int(hub.asked("/storage/")[1][1]["Range"].removeprefix("bytes=").rstrip("-")) > 900_000
    assert_whole(get.folder)


def test_stall_is_noticed_and_goes_on(hub, get):
    hub.fault("/storage/", times=1, cut=1_000_000, hang=1)
    code, out, _ = get.model("--timeout", "0.3")
    assert code == 0 and "no byte from localhost for 0.3 s; retry 1 of 6" in out
    assert_whole(get.folder)


def test_server_without_ranges_and_a_cut(hub, get):
    hub.fault("/storage/", times=1, cut=1_000_000)
    hub.fault("/storage/", ignore_range=True)
    code, out, _ = get.model()
    assert code == 0 and "damaged" not in out
    assert_whole(get.folder)


def test_answer_that_ends_early_in_good_order(hub, get):
    hub.fault("/storage/", times=1, cut=1_000_000, short=True)
    code, out, _ = get.model()
    assert (
        code == 0 and "localhost ended model.safetensors at 1,000,000 of 3,000,000 bytes; retry 1 of 6" in out
    )
    assert_whole(get.folder)


def test_range_that_the_server_refuses(hub, get):
    hub.fault("/storage/", times=1, cut=1_000_000)
    hub.fault("/storage/", times=1, status=416)
    code, out, _ = get.model()
    assert code == 0 and "localhost cannot resume model.safetensors at " in out
    assert_whole(get.folder)


def test_expired_storage_link_is_asked_for_again(hub, get):
    hub.fault("/storage/", times=1, status=403)
    code, out, _ = get.model()
    assert code == 0 and "localhost answered 403 (Forbidden); retry 1 of 6" in out


def test_progress_earns_new_retries(hub, get):
    hub.fault("/storage/", cut=1_100_000)
    assert (
        get.model("--retries", "1")[0] == 0
    )  # two cuts, one retry allowed: each cut came a megabyte further
    assert_whole(get.folder)


def test_same_size_corruption_is_fetched_once_more(hub, get):
    hub.fault("/storage/", times=1, corrupt=True)
    hub.fault("config.json", times=1, corrupt=True)
    code, out, _ = get.model()
    assert code == 0
    assert (
        "model.safetensors arrived damaged (sha256 " in out
        and "config.json arrived damaged (git blob id " in out
    )
    assert_whole(get.folder)


def test_killed_download_goes_on(hub, get, tmp_path):
    hub.fault("/storage/", times=1, cut=2_000_000, hang=30)
    command = [
        sys.executable,
        ROOT / "model_download/download_model.py",
        "--model",
        "tcm/small",
        "--output-dir",
        get.folder,
    ]
    killed = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "0"}
    )
    deadline = time.monotonic() + 20
    while not (parts := [p for p in get.folder.glob("*.part") if p.stat().st_size >= 2_000_000]):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (get.folder / "model.safetensors").exists() and not (get.folder / "source.json").exists()
    code, out, _ = get.model()
    assert code == 0 and "model.safetensors: going on at 2.0 MB of 3.0 MB" in out and not parts[0].exists()
    assert hub.asked("/storage/")[1][1]["Range"] == "bytes=2000000-"
    assert_whole(get.folder)


def test_part_of_another_commit_is_not_mixed_in(hub, get):
    hub.fault("/storage/", cut=1_000_000)
    assert get.model("--retries", "0")[0] == 1
    hub.faults.clear()
    hub.add("model", "tcm/small", {**MODEL, "model.safetensors": WEIGHTS[::-1]})
    assert get.model()[0] == 0
    assert (get.folder / "model.safetensors").read_bytes() == WEIGHTS[::-1] and not list(
        get.folder.glob("*.part")
    )


# ---- faults that stay: the true cause, and what to do


def test_corruption_that_stays_is_refused(hub, get):
    hub.fault("/storage/", corrupt=True)
    code, _, err = get.model()
    assert (
        code == 1 and f"model.safetensors of tcm/small arrived damaged twice from {hub.url} (sha256 " in err
    )
    assert not list(get.folder.glob("model.safetensors*"))


def test_503_that_stays(hub, get):
    hub.fault("/revision/", status=503)
    code, _, err = get.model()
    assert code == 1 and hub.waits == [1, 2, 4, 8, 16, 30] and err.count("\n") == 1
    assert (
        "127.0.0.1 answered 503 (Service Unavailable); gave up after 7 failures: the trouble is the server's"
        in err
    )


def test_429_that_stays(hub, get, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fault("/storage/", status=429, headers={"Retry-After": "9"})
    code, _, err = get.model("--retries", "2")
    assert code == 1 and hub.waits == [9, 9] and err.count("\n") == 1
    assert (
        "localhost answered 429 (too many requests); gave up after 3 failures: wait some minutes, or set HF_TOKEN"
        in err
    )


def test_429_that_asks_for_an_hour(hub, get):
    hub.fault("/revision/", status=429, headers={"Retry-After": "3600"})
    code, _, err = get.model()
    assert code == 1 and hub.waits == []
    assert (
        "answered 429 (too many requests) and asks to wait 3600 s; run the same command again after that"
        in err
    )


def test_refused_connection(hub, get, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    code, out, err = get.model("--retries", "2")
    assert code == 1 and hub.waits == [1, 2] and "retry 2 of 2" in out
    assert "cannot connect to 127.0.0.1 (" in err and "refused" in err
    assert f"gave up after 3 failures: check the network and HF_ENDPOINT ({address})" in err


def test_stall_that_stays(hub, get):
    hub.fault("/revision/", stall=0.5)
    code, _, err = get.model("--timeout", "0.1", "--retries", "1")
    assert (
        code == 1
        and "no byte from 127.0.0.1 for 0.1 s; gave up after 2 failures" in err
        and "more with --timeout" in err
    )


def test_gated(hub, get, monkeypatch):
    hub.add("model", "tcm/gated", MODEL, gated=True)
    code, _, err = get(download_model, "--model", "tcm/gated")
    assert code == 2 and hub.waits == []
    assert (
        "tcm/gated is gated: accept its terms at https://huggingface.co/tcm/gated, then set HF_TOKEN" in err
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert get(download_model, "--model", "tcm/gated")[0] == 0
    assert all("Authorization" in headers for _, headers in hub.asked("/api/|/resolve/")[-3:])
    assert not any(
        "Authorization" in headers for _, headers in hub.asked("/storage/")
    )  # the token stays with the Hub


def test_wrong_token_401(hub, get, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = get.model()
    assert code == 2 and "127.0.0.1 refused the token in HF_TOKEN (401, Invalid credentials" in err
    monkeypatch.setenv("HF_TOKEN", "令牌")
    assert "HF_TOKEN is not a token" in get.model()[2]


@pytest.mark.parametrize("token, status", [("", 401), (TOKEN, 404)], ids=["guest", "user"])
def test_missing_repository(hub, get, monkeypatch, token, status):
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = get(download_tcm_data, "--dataset", "tcm/nothing")
    assert (
        code == 2
        and f"no dataset tcm/nothing on {hub.url} ({status}, Repository not found); check the name" in err
    )


def test_missing_revision(hub, get):
    code, _, err = get.model("--revision", "v9")
    assert (
        code == 2
        and "tcm/small has no revision 'v9'; see https://huggingface.co/tcm/small/commits/main" in err
    )


def test_missing_file(hub, get):
    code, _, err = get.data("--files", "trian.json")
    assert code == 2 and "tcm/rows has no data file trian.json" in err and "did you mean train.json?" in err


def test_file_that_is_listed_but_gone(hub, get):
    hub.fault("/resolve/.*config", status=404, headers={"X-Error-Code": "EntryNotFound"})
    code, _, err = get.model()
    assert code == 2 and "tcm/small has no file config.json at " in err


@pytest.mark.parametrize("name", ["small", "https://huggingface.co/tcm/small", "a/b/c", ""])
def test_names_that_are_no_names(hub, get, name):
    code, _, err = get(download_model, "--model", name)
    assert code == 2 and f"{name!r} is not the name of a model on the Hub, wanted owner/name" in err


def test_no_safetensors(hub, get):
    hub.add("model", "tcm/pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    code, _, err = get(download_model, "--model", "tcm/pickles")
    assert code == 2 and "no config.json with *.safetensors weights" in err and "pytorch_model.bin" in err


def test_another_default_model_from_a_mirror_is_refused(hub, get):
    hub.add("model", download_model.PINNED_MODEL, MODEL, commit=download_model.PINNED_COMMIT)
    code, _, err = get(download_model)
    assert (
        code == 1
        and "the server lists another model.safetensors for Qwen/Qwen3-0.6B than this script knows" in err
    )
    assert not hub.asked("/resolve/")


def test_login_page_of_the_network(hub, get):
    hub.fault("/revision/", status=200)
    code, _, err = get.model()
    assert code == 1 and "did not answer in JSON; is a login page of this network in the way" in err


def test_disk_too_small(hub, get, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    code, _, err = get.model()
    assert code == 1 and "3.0 MB to fetch, but only 1.0 MB free in" in err and not hub.asked("/resolve/")


def test_disk_that_fills_underway(hub, get, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = get.model()
    assert code == 1 and "the disk is full; free some space and run the same command again" in err


def test_offline_and_wrong_addresses(hub, get, monkeypatch):
    for endpoint in ("hf-mirror.com", "https://", "http://[x", "http://127.0.0.1:99999"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        code, _, err = get.model()
        assert code == 2 and "HF_ENDPOINT is " in err
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = get.model()
    assert code == 2 and "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it" in err


@pytest.mark.parametrize(
    "proxy, told", [("socks5://127.0.0.1:1", "pip install socksio"), ("ftp://x", "cannot be used: ")]
)
def test_proxy_that_cannot_be_used(hub, get, monkeypatch, proxy, told):
    monkeypatch.setenv("ALL_PROXY", proxy)
    code, _, err = get.model()
    assert code == 2 and told in err


def test_proxy_is_used(hub, get, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert get.data()[0] == 0
    assert {headers["Host"] for _, headers in hub.asked("/api/")} == {"hub.invalid"}
