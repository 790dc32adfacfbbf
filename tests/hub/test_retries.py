"""Downloads: faults of networks and servers that pass. Nothing is lost, and every retry is announced."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from hub_helpers import MODEL, assert_whole


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
    # Two cuts, one retry allowed: each cut came a megabyte further.
    assert get.model("--retries", "1")[0] == 0
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
    script = ROOT / "model_download/download_model.py"
    command = [sys.executable, script, "--model", "tcm/small", "--output-dir", get.folder]
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
    assert code == 0 and "model.safetensors: going on at 1.9 MiB of 2.9 MiB" in out and not parts[0].exists()
    assert hub.asked("/storage/")[1][1]["Range"] == "bytes=2000000-"
    assert_whole(get.folder)


def test_part_of_another_commit_is_not_mixed_in(hub, get):
    hub.fault("/storage/", cut=1_000_000)
    assert get.model("--retries", "0")[0] == 1
    hub.faults.clear()
    hub.add("model", "tcm/small", {**MODEL, "model.safetensors": MODEL["model.safetensors"][::-1]})
    assert get.model()[0] == 0
    assert (get.folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"][::-1] and not list(
        get.folder.glob("*.part")
    )
