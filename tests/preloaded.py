"""What a process that forks others for tests has imported. Each start then takes a fraction of a second instead of seconds."""

# ruff: noqa: F401
import gc
import os

import datasets
import matplotlib.pyplot
import peft
import transformers.models.qwen3.modeling_qwen3
from tiny_model import TEMPLATE
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.chat_template_utils import render_jinja_template

import utils.training.loop
import utils.training.losses
import utils.training.rows

# A process makes these once: thousands of patterns, and Python code of the chat template.
get_checkpoint_conversion_mapping("qwen3")
render_jinja_template([[{"role": "user", "content": ""}]], chat_template=TEMPLATE.read_text(encoding="utf-8"))
os.fsync = lambda file: None  # as in conftest.py
gc.freeze()  # a million objects of the imports: the collections of a small run take half of its time with them
