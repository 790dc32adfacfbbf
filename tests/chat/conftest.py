"""For the tests of chat: a session with a stand-in for the model."""

import pytest
from chat_helpers import CPU, Echo

from utils.chat.model import ChatModel, Options
from utils.chat.session import Chat


@pytest.fixture(autouse=True)
def english(monkeypatch):
    """The language of the notice and of the help, whatever the machine's is."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.fixture
def chat(chat_model):
    options = Options(False, numbers={"max_new_tokens": 64})
    return Chat(Echo(chat_model), options, lambda name: ChatModel(name, CPU))
