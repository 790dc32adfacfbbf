"""What a process that forks others for tests has imported. Each start then takes a fraction of a second instead of seconds."""

import gc

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
import transformers.trainer  # noqa: F401

import utils.training.dataset  # noqa: F401
import utils.training.forecast  # noqa: F401
import utils.training.reference  # noqa: F401
import utils.training.setup  # noqa: F401

gc.freeze()  # a million objects of the imports: the collections of a small run take half of its time with them
