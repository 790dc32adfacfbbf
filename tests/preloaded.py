"""What a process that forks others for tests has imported. Each start then takes a fraction of a second instead of seconds."""

# ruff: noqa: F401
import gc
import os

import datasets
import matplotlib.pyplot
import peft
import transformers.models.qwen3.modeling_qwen3
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import utils.training.loop
import utils.training.losses
import utils.training.rows

get_checkpoint_conversion_mapping("qwen3")  # made once in a process, of thousands of patterns
os.fsync = lambda file: None  # as in conftest.py
gc.freeze()  # a million objects of the imports: the collections of a small run take half of its time with them
