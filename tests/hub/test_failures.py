"""Downloads: faults that stay. The true cause in one line, and what to do."""

import errno
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
from fake_hub import TOKEN
from hub_helpers import MODEL

from data_prepare import download_tcm_data
from model_download import download_model


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
    assert "answered 429 (too many requests) and asks to wait 3600 s; run this again after that" in err


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
    # The token stays with the Hub.
    assert not any("Authorization" in headers for _, headers in hub.asked("/storage/"))


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
    assert code == 1 and "2.9 MiB to fetch, but only 976.6 KiB free in" in err and not hub.asked("/resolve/")


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
    hub.add("dataset", "tcm/rows", {"train.json": b"{}\n"})  # small: no storage elsewhere
    assert get.data()[0] == 0
    assert {headers["Host"] for _, headers in hub.asked("/api/")} == {"hub.invalid"}
