"""Downloads from a server that means harm: the token stays with the endpoint, and whatever is listed ends in one line."""

import json

import pytest
from fake_hub import TOKEN, FakeHub
from hub_helpers import MODEL, assert_whole

from utils import hub_requests

ENTRY = {"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}
LFS = {"oid": "0" * 64, "size": 2}


@pytest.fixture
def elsewhere():
    """Another server, on another port."""
    other = FakeHub()
    other.add("model", "tcm/small", MODEL)
    yield other
    other.stop()


def test_the_token_and_the_pages_stay_with_the_endpoint(hub, get, elsewhere, monkeypatch):
    """A `next` link to another server is asked of the endpoint: mirrors pass the Hub's own links on."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("model", "tcm/small", MODEL, page_size=3)
    page = f'<{elsewhere.url}/api/models/tcm/small/tree/{hub.commit}?recursive=true&cursor=3>; rel="next"'
    entries = json.dumps(hub.repos["models", "tcm/small"]["entries"][:3]).encode()
    hub.fault("/tree/", times=1, status=200, body=entries, headers={"Link": page})
    assert get.model()[0] == 0
    assert_whole(get.folder)
    assert not elsewhere.log and len(hub.asked("/tree/")) == 3


@pytest.mark.parametrize("where", ["/revision/", "/tree/"])
def test_a_listing_is_not_asked_of_another_server(hub, get, elsewhere, monkeypatch, where):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fault(where, status=307, headers={"Location": f"{elsewhere.url}/api/models/tcm/small"})
    code, _, err = get.model()
    assert code == 1 and err.count("\n") == 1 and not elsewhere.log
    assert f"127.0.0.1 redirects to {elsewhere.url}/api/models/tcm/small for the listing of tcm/small" in err


def test_the_token_does_not_follow_a_file(hub, get, elsewhere, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    location = f"{elsewhere.url}/tcm/small/resolve/main/config.json"
    hub.fault("/resolve/.*config.json", status=302, headers={"Location": location})
    assert get.model()[0] == 0
    assert_whole(get.folder)
    assert elsewhere.log and not any("Authorization" in headers for _, headers in elsewhere.log)


def test_redirects_without_end(hub, get):
    hub.fault("/resolve/", status=302, headers={"Location": "/tcm/small/resolve/main/config.json"})
    code, _, err = get.model()
    assert code == 1 and "redirects without end" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "address, private",
    [
        ("http://127.0.0.1/x", True),
        ("http://localhost:8080/x", True),
        ("https://[::1]/x", True),
        ("https://[::ffff:10.0.0.1]/x", True),
        ("http://169.254.169.254/latest/meta-data", True),
        ("http://192.168.1.1/", True),
        ("http://0.0.0.0/", True),
        ("https://8.8.8.8/x", False),
        ("https://name.invalid/x", False),  # its resolution fails, and so will the request
    ],
)
def test_addresses_inside_this_network(address, private):
    assert hub_requests.is_internal(address) is private


def test_files_are_not_fetched_from_inside_the_network(hub, get, monkeypatch):
    """The endpoint is a public one here; it sends the weights' reader to the loopback."""
    monkeypatch.setattr(hub_requests, "is_internal", lambda url: "localhost" in url)
    code, _, err = get.model()
    assert code == 1 and err.count("\n") == 1 and not hub.asked("/storage/")
    assert f"127.0.0.1 redirects to http://localhost:{hub.port}/storage/" in err
    assert "for model.safetensors, which is inside this network" in err


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "http://[", "http://x:99999/", "ftp://x/y", "https://"]
)
@pytest.mark.parametrize("where", ["/tree/", "/resolve/"])
def test_redirects_to_no_address(hub, get, where, location):
    hub.fault(where, status=302, headers={"Location": location})
    code, _, err = get.model()
    assert code == 1 and "127.0.0.1 redirects to no address for " in err and err.count("\n") == 1


MALFORMED = [
    b"{}",
    b"null",
    b"3",
    b'"text"',
    b"[1]",
    b"[null]",
    b"[[]]",
    b"[{}]",
    b"[" * 100_000,
    b"\xff\xfe",
    *[
        json.dumps([{**ENTRY, **wrong}]).encode()
        for wrong in (
            {"type": None},
            {"path": None},
            {"path": ""},
            {"path": 3},
            {"path": "a\ud800"},
            {"path": "\x1b[2Jconfig.json"},
            {"path": "../config.json"},
            {"path": "/etc/config.json"},
            {"size": None},
            {"size": "2"},
            {"size": -1},
            {"size": 1.5},
            {"size": True},
            {"oid": None},
            {"oid": "zz"},
            {"oid": ["a"]},
            {"lfs": "text"},
            {"lfs": [1]},
            {"lfs": {"oid": None}},
            {"lfs": {**LFS, "oid": "../../x"}},
        )
    ],
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:60]))
def test_malformed_listings_are_told_in_one_line(hub, get, body):
    hub.fault("/tree/", status=200, body=body)
    code, _, err = get.model()
    assert code == 1 and err.count("\n") == 1 and hub.url in err and "\x1b" not in err


@pytest.mark.parametrize(
    "info",
    [[], None, {}, {"sha": 3}, {"sha": None}, {"sha": "0" * 40, "tags": 3}, {"sha": "0" * 40, "tags": [3]}],
)
def test_malformed_descriptions_are_told_in_one_line(hub, get, info):
    hub.fault("/revision/", status=200, body=json.dumps(info).encode())
    code, _, err = get.model()
    assert code == 1 and err.count("\n") == 1 and hub.url in err


def test_a_listing_of_endless_bytes(hub, get, monkeypatch):
    monkeypatch.setattr(hub_requests, "LISTING_BYTES", 1 << 20)
    hub.fault("/tree/", endless=b"[" + b" " * 65536)
    code, _, err = get.model()
    assert code == 1 and "more than 1.0 MiB" in err and err.count("\n") == 1


def test_a_listing_that_takes_for_ever(hub, get, monkeypatch):
    seconds = iter(range(0, 10**6, 400))
    monkeypatch.setattr(hub_requests.time, "monotonic", lambda: next(seconds), raising=False)
    code, _, err = get.model()
    assert code == 1 and "takes longer than 10.0 min" in err and err.count("\n") == 1


def test_a_listing_of_endless_pages(hub, get, monkeypatch):
    monkeypatch.setattr("utils.hub.LISTING_PAGES", 20)
    hub.add("model", "tcm/small", {**MODEL, **{f"{number}.txt": b"" for number in range(30)}}, page_size=1)
    code, _, err = get.model()
    assert code == 1 and "in pages without end" in err and err.count("\n") == 1
    assert len(hub.asked("/tree/")) == 20
    hub.fault("/tree/", status=200, body=b"[]", headers={"Link": '</x?cursor=7>; rel="next"'})
    assert "in pages without end" in get.model()[2] and len(hub.asked("/tree/")) == 22


@pytest.mark.parametrize("said", ["\u00b2", "-3", "Fri, 31 Dec 99999 23:59:59 GMT", "x", "9" * 30])
def test_waits_that_make_no_sense(said):
    assert hub_requests.server_wait({"Retry-After": said}) in (None, 10**30 - 1)


def test_words_of_a_server_do_not_reach_the_terminal_as_commands(hub, get):
    hub.fault(
        "/revision/", status=403, headers={"X-Error-Message": "\x1b]0;owned\x07\x1b[2J", "X-Error-Code": "x"}
    )
    code, out, err = get.model()
    assert code == 2 and not {"\x1b", "\x07"} & set(out + err)
    hub.faults.clear()
    hub.fault("/revision/", status=500, headers={"X-Error-Message": "\x1b[2J"})
    code, out, err = get.model()
    assert code == 1 and "\x1b" not in out + err
