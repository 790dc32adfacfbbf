"""No network, and a Hub switched off. Broken mirrors are in tests/test_hub.py."""

import pytest
from fault_runs import assert_told, contents, start

pytestmark = pytest.mark.slow
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None}


@pytest.mark.parametrize(
    "command, environment, code, words",
    [
        ("data --dataset tcm/other", NOWHERE, 1, "no connection to http://127.0.0.1:9 ("),
        ("model --model tcm/other", {"HF_HUB_OFFLINE": "1"}, 1, "HF_HUB_OFFLINE"),
        # training downloads nothing itself
        ("sft --model Qwen/Nowhere", NOWHERE, 2, "download_model.py --model Qwen/Nowhere"),
    ],
)
def test_no_network(world, command, environment, code, words):
    before = contents(world)
    assert_told(start(world, command, environment=environment), code, words)
    assert contents(world) == before
