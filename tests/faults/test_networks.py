"""No network, and a Hub switched off. Broken mirrors are in tests/test_hub.py."""

import pytest
from fault_runs import assert_told, contents, start

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
    assert_told(script, 1, "cannot connect to 127.0.0.1", "the network and HF_ENDPOINT (http://127.0.0.1:9)")
    assert contents(world) == before


@pytest.mark.parametrize("command", ["lora --model Qwen/Nowhere", "model --model tcm/other"])
def test_hub_switched_off(world, command):
    script = start(world, command, environment={"HF_HUB_OFFLINE": "1"})
    assert_told(script, 2, "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it")
