"""No network, a Hub switched off, broken mirrors."""

import pytest
from fault_runs import assert_told, assert_works_again, contents, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "command",
    [
        "data --dataset tcm/other",
        "model --model tcm/other",
        "sft --model Qwen/Nowhere",
        "compare --models {w}/base Qwen/Nowhere",
        "chat --model Qwen/Nowhere",
        "pairs --kind model --model Qwen/Nowhere",
    ],
)
def test_no_network(world, command):
    before = contents(world)
    script = start(world, command, environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None})
    assert_told(
        script, 1, "cannot connect to 127.0.0.1", "check the network and HF_ENDPOINT (http://127.0.0.1:9)"
    )
    assert contents(world) == before


@pytest.mark.parametrize("command", ["lora --model Qwen/Nowhere", "model --model tcm/other"])
def test_hub_switched_off(world, command):
    script = start(world, command, environment={"HF_HUB_OFFLINE": "1"})
    assert_told(script, 2, "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it")


@pytest.mark.parametrize(
    "name, where, action, words",
    [
        (
            "data",
            "/revision/",
            {"status": 200},
            "does not answer as the Hub does; check HF_ENDPOINT and the network's login page",
        ),
        ("data", "/resolve/", {"status": 500}, "answered 500 (Internal Server Error); try later"),
        ("data", "/storage/", {"corrupt": True}, "arrived damaged twice"),
        ("model", "/tree/", {"status": 200}, "does not answer as the Hub does"),
        ("model", "/storage/", {"cut": 1000}, "the connection broke: localhost"),
        (
            "chat --model tcm/small",
            "/revision/",
            {"status": 500},
            "answered 500 (Internal Server Error); try later",
        ),
    ],
)
def test_broken_mirror(world, hub, tmp_path, name, where, action, words):
    hub.fault(where, **action)
    try:
        output = [] if name.startswith("chat") else ["--output-dir", tmp_path / "new"]
        assert_told(start(world, name, *output, hub=hub), 1, words)
    finally:
        hub.faults.clear()
    if output:
        assert not [
            path
            for path in output[1].glob("*")
            if path.suffix not in (".part", ".json") or path.name == "train.json"
        ]
        assert_works_again(world, name, output[1], hub)
