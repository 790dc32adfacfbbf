"""For the tests of chat: a session with a stand-in for the model."""

import pytest
import torch
from chat_helpers import CPU, Echo

from utils.chat.model import ChatModel
from utils.chat.options import Options
from utils.chat.session import Chat


@pytest.fixture
def chat(chat_model):
    options = Options(False, 64, True, torch.Generator())
    return Chat(Echo(chat_model), options, "", lambda name: ChatModel(name, CPU))
