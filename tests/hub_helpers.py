"""A model and a data set for the tests of downloads, and what has to arrive of the model."""

import json
import random

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
ROWS = "".join(
    json.dumps({"query": f"问{n}", "response": "答" * 20}, ensure_ascii=False) + "\n" for n in range(2000)
).encode()


def assert_whole(folder):
    """The wanted files are there, right to the last bit, and no unfinished one."""
    wanted = {"config.json", "tokenizer.json", "LICENSE", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted | {"source.json"}
    assert all((folder / name).read_bytes() == MODEL[name] for name in wanted)
