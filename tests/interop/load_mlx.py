"""Load rows with mlx-lm's own loader: python load_mlx.py DATA_DIR sft FOLDER -> [{"input_ids", "labels"}, ...] as JSON"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from mlx_lm.tuner.datasets import load_local_dataset
from mlx_lm.utils import load_tokenizer

data, kind, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
for ours, its in (("train", "train"), ("eval", "valid")):  # as docs/other_tools.md says
    shutil.copy(data / f"{kind}_{ours}.jsonl", data / f"{its}.jsonl")
train, _, _ = load_local_dataset(data, load_tokenizer(folder), SimpleNamespace(mask_prompt=True))
rows = [train.process(train[number]) for number in range(len(train))]
print(json.dumps([{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in rows]))
