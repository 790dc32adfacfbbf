"""A run in float16, as on NVIDIA GPUs without bfloat16, learns what one in float32 learns."""

import pytest
from small_runs import train

from utils.files import read_log


def test_float16_ends_where_float32_does(place, runs):
    folder = place / "sft_fp16"
    assert train("sft", place, folder, precision="fp16") == 0
    halves, floats = (read_log(path / "training_log.jsonl") for path in (folder, runs("sft")))
    for one, other in zip(halves, floats, strict=True):
        for name in {"loss", "eval_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=0.01), one["step"]
