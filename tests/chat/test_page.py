"""The chat page in a real Chromium: what a person does there, and that nothing which a model says is interpreted."""

import contextlib
import json
import threading
import time

import pytest
from chat.browser import MISSING, Browser
from chat.test_serve import serving
from chat_helpers import Echo

from utils.chat.model import Reply

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
PLACES = "return [...document.querySelectorAll('.answer')].map((one) => one.getBoundingClientRect().x)"
ANSWERS = "[...document.querySelectorAll('.answer')].map((one) => one.querySelector('.text').innerText)"
DONE = "document.querySelectorAll('.answer').length && !document.querySelector('.writing') && !stopping"


class Speaker(Echo):
    """Stands in for a ChatModel: answers a question with the text after the mark @ in it, piece by piece until `held` is set."""

    def __init__(self, chat_model, name="speaker", **more):
        super().__init__(chat_model, name, **more)
        self.go_on, self.left = threading.Event(), threading.Event()
        self.go_on.set()

    def answer(self, prompt, options, show):
        question = self.tokenizer.decode(prompt).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        self.seen.append(self.tokenizer.decode(prompt))
        if "wrong" in question:
            raise RuntimeError("this cannot be answered")
        reasoning = "先想一想" if options.thinking else ""
        show(reasoning, True)
        said = f"{self.name}：" + question.partition("@")[2]
        try:
            for character in said:
                show(character, False)
            while not self.go_on.wait(0.05):
                show("。", False)
        except OSError:
            self.left.set()
            raise
        return Reply(said, reasoning, len(said), 0.5, 20.0, "length" if "long" in question else "stop")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("downloads")) as browser:
        yield browser


@pytest.fixture
def page(browser):
    """page(*models): the page that a server of these models gives."""
    with contextlib.ExitStack() as stack:

        def opened(*models, **more):
            port = stack.enter_context(serving(*models, **more))
            browser.open(f"http://127.0.0.1:{port}/")
            browser.wait("models.length || document.querySelector('[role=alert]')")
            return browser

        yield opened


def ask(browser, question):
    browser.type("#question", question + "\n")
    browser.wait(DONE)
    return browser.run(f"return {ANSWERS}")


def test_questions_and_answers(page, chat_model):
    speaker = Speaker(chat_model, system="你是中医师。")
    browser = page(speaker)
    assert "not medical advice" in browser.text("footer") and browser.text("#models b") == "speaker"
    assert browser.text("#models .faint") == "thinks first"
    assert ask(browser, "甘草 @甘") == ["speaker：甘"]
    assert browser.text(".answer .faint") == "9 tokens · 20.0 tokens/s"  # as the server measured it
    assert ask(browser, "long @未完") == ["speaker：甘", "speaker：未完"]
    assert ask(browser, "麻黄 @麻")[2] == "speaker：麻"
    assert "speaker：甘<|im_end|>" in speaker.seen[-1]  # the second question is asked with the first
    assert browser.run("return document.activeElement.id") == "question"
    browser.click(".turn:last-child .under button")  # retry
    browser.wait(f"{DONE} && true")
    assert len(speaker.seen) == 4 and speaker.seen[3] == speaker.seen[2]

    browser.click(".model button")  # save; a cut answer is left out
    path, deadline = browser.downloads / "my_chats.jsonl", time.monotonic() + 180
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    [row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    said = [message["content"] for message in row["messages"]]
    assert said == ["你是中医师。", "甘草 @甘", "speaker：甘", "麻黄 @麻", "speaker：麻"]
    browser.click("#new")
    assert browser.text(".start") and browser.run("return turns.length") == 0


def test_stop(page, chat_model):
    speaker = Speaker(chat_model)
    browser = page(speaker)
    for stop in (lambda: browser.click("#stop"), lambda: browser.press("Escape")):
        speaker.go_on.clear()
        speaker.left.clear()
        browser.type("#question", "甘草 @甘\n")
        browser.wait("document.querySelector('.turn:last-child .text').innerText.includes('。。')")
        assert browser.run("return send.hidden && !stop.hidden")
        stop()
        browser.wait(DONE)
        assert speaker.left.wait(180)  # the server has noticed, and computes no further
        assert "stopped" in browser.text(".turn:last-child .answer")
    speaker.go_on.set()
    assert ask(browser, "麻黄 @好")[-1] == "speaker：好"


def test_what_a_model_says_is_never_html(page, chat_model):
    browser = page(Speaker(chat_model))
    said = SCRIPT + " **粗** `<b>` &lt;"
    [answer] = ask(browser, f"{SCRIPT} @{said}")
    assert answer == f"speaker：{SCRIPT} 粗 <b> &lt;" and browser.run("return document.title") == "TCM chat"
    assert browser.run("return document.querySelectorAll('#log script, #log img, #log b').length") == 0
    assert browser.text(".text strong") == "粗" and SCRIPT in browser.text(".question")
    # and if it were, nothing would run
    browser.run("document.querySelector('#log').innerHTML = arguments[0]", SCRIPT)
    time.sleep(0.3)
    assert browser.run("return document.title") == "TCM chat"

    script = "const box = document.createElement('div'); box.append(...formatted(arguments[0])); return box.innerHTML"
    lists = '<h3>功效</h3><ul><li>补气</li><li>健脾</li></ul><ol start="1"><li>人参</li><li>白术</li></ol>'
    for text, made in (
        ("一\n二\n\n三", "<p>一\n二</p><p>三</p>"),
        ("# 功效\n- 补气\n- 健脾\n\n1. 人参\n2. 白术", lists),
        ("前\n```py\n<b>\n\n**x**\n```\n后", "<p>前</p><pre><code>&lt;b&gt;\n\n**x**</code></pre><p>后</p>"),
        ("```\n没有结束", "<pre><code>没有结束</code></pre>"),
        ("2 * 3 ** 4 `a` **甘**草", "<p>2 * 3 ** 4 <code>a</code> <strong>甘</strong>草</p>"),
    ):
        assert browser.run(script, text) == made


def test_errors_are_shown(page, chat_model):
    browser = page(Speaker(chat_model), key="secret")
    assert "wants a key" in browser.text("[role=alert]")
    browser.type("#key", "secret\n")
    browser.run("document.querySelector('#key').blur()")
    browser.wait("models.length")
    assert ask(browser, "wrong") == [""]
    assert "this cannot be answered" in browser.text("[role=alert]")
    browser.run("temperature.value = 11")
    ask(browser, "甘草 @甘")
    assert "temperature is 11.0, wanted" in browser.text(".turn:last-child [role=alert]")
    browser.run(
        "temperature.value = ''; window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))"
    )
    ask(browser, "甘草 @甘")
    assert "The server does not answer" in browser.text(".turn:last-child [role=alert]")


def test_two_models_side_by_side(page, chat_model):
    one, two = Speaker(chat_model, "before"), Speaker(chat_model, "after", single=True)
    browser = page(one, two)
    assert "each question starts afresh" in browser.text(".start").lower()
    assert ask(browser, "甘草 @甘") == ["before：甘", "after：甘"]
    left, right = browser.run(PLACES)
    assert right > left + 300
    browser.run("document.querySelector('#history').value = 'on'")
    ask(browser, "麻黄 @麻")
    assert "before：甘" in one.seen[-1] and "after：甘" in two.seen[-1] and "before" not in two.seen[-1]
    browser.run("which.selectedIndex = 2; which.onchange()")
    assert ask(browser, "桂枝 @桂") == ["after：甘", "after：麻", "after：桂"] and len(one.seen) == 2


def test_settings_reach_the_model(page, chat_model):
    speaker, asked = Speaker(chat_model), []
    answer = speaker.answer
    speaker.answer = lambda prompt, options, show: (asked.append(options), answer(prompt, options, show))[1]
    browser = page(speaker)
    browser.click("#open-settings")
    settings = {"temperature": 0.3, "top_k": 7, "max_tokens": 9, "seed": 5, "system": "你是中医师。"}
    for name, value in settings.items():
        browser.type(f"#{name}", str(value))
    browser.run("think.value = 'on'; think.onchange()")
    assert ask(browser, "甘草 @甘") == ["speaker：甘"]
    [options] = asked
    assert options.numbers == {"temperature": 0.3, "top_k": 7, "max_new_tokens": 9, "seed": 5}
    assert options.thinking and "你是中医师。" in speaker.seen[0]
    assert browser.run("return document.querySelector('details').open") is False  # folded
    browser.click("details summary")
    assert "先想一想" in browser.text("details")


def test_a_phone_the_keyboard_and_chinese(page, chat_model):
    browser = page(Speaker(chat_model, "before"), Speaker(chat_model, "after"))
    browser.resize(360, 640)
    ask(browser, "甘草 @" + "甘草味甘性平" * 20 + "https://" + "x" * 200)
    assert browser.run("return document.documentElement.scrollWidth <= 360")
    left, right = browser.run(PLACES)
    assert left == right  # one above the other
    reached = set()
    for _ in range(30):
        browser.press("Tab")
        reached.add(browser.run("const e = document.activeElement; return e.id || e.textContent"))
    assert reached >= {"which", "new", "open-settings", "question", "Retry", "Save as training rows"}
    browser.resize(1200, 820)
    browser.speak("zh-CN")
    page(Speaker(chat_model))
    assert browser.text("h1") == "中医问答" and "不能代替医生" in browser.text("footer")
    assert browser.run("return document.documentElement.lang") == "zh"
    browser.speak("en-US")
