"""Load rows with mlx-lm's own loader: python load_mlx.py DATA_DIR FOLDER -> [[token ids, tokens that are not trained], ...]"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from mlx_lm.tuner.datasets import load_local_dataset
from mlx_lm.utils import load_tokenizer

tokenizer = load_tokenizer(Path(sys.argv[2]))
train, _, _ = load_local_dataset(Path(sys.argv[1]), tokenizer, SimpleNamespace(mask_prompt=True))
print(json.dumps([train.process(train[number]) for number in range(len(train))]))
