"""The web page in a headless Chromium, used by keyboard and mouse; UNITOK_SCREENSHOTS=DIR keeps pictures of it."""

import os
import shutil
from pathlib import Path

import pytest
from pipelines import make_pipeline, picture
from serving import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: install it (Debian: apt-get install chromium)"),
]
KEY = "a-key-of-tests"
VIEWS = {"light": (1100, 800), "dark": (1100, 800), "phone": (375, 720), "phone-dark": (375, 720)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(make_pipeline(tmp_path_factory.mktemp("browser")), name="tiny") as (address, server):
        yield address, server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page of a theme and size, and checks at the end that it complained of nothing and asked nobody else."""
    opened = []

    def start(address, view="light", hash=""):
        width, height = VIEWS[view]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if "dark" in view else "light"
        )
        page = context.new_page()
        complaints, asked = [], []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/{hash}")
        opened.append((context, address, complaints, asked))
        return page, complaints

    yield start
    for context, address, complaints, asked in opened:
        context.close()
        assert not complaints, complaints
        assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked


@pytest.fixture
def file(tmp_path):
    picture().resize((640, 480)).save(tmp_path / "circle.png")
    return str(tmp_path / "circle.png")


def keep(page, name):
    folder = os.environ.get("UNITOK_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def fits(page):
    """Nothing sticks out to the right."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("view", VIEWS)
def test_chat_pictures_and_tokenizer(server, open_page, file, view):
    from playwright.sync_api import expect

    page, _ = open_page(server[0], view)
    expect(page.locator("#model")).to_have_text("tiny")
    keep(page, f"{view}-0-start")
    # chat: a picture, a question, an answer that comes in pieces
    page.set_input_files("#chat-image", file)
    expect(page.locator("#chat-preview")).to_be_visible()
    page.fill("#question", "what color is the circle?")
    page.evaluate(
        "window.seen = new Set(); new MutationObserver(() => seen.add(document.querySelector('.assistant span')"
        "?.textContent)).observe(document.getElementById('talk'), {childList: true, subtree: true})"
    )
    page.press("#question", "Enter")
    expect(page.locator(".turn.user img")).to_be_visible()
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    answer = page.locator(".turn.assistant span").inner_text()
    assert answer and page.evaluate("seen.size") > 3, "the answer was seen growing"
    page.fill("#question", "is there a green triangle?")
    page.click("#send")
    expect(page.locator(".turn.assistant")).to_have_count(2)
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    assert fits(page)
    keep(page, f"{view}-1-chat")
    page.click("#chat-reset")
    expect(page.locator(".turn")).to_have_count(0)
    # pictures: by keyboard from the tabs on
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pictures")).to_be_visible()
    page.locator("#picture-examples button").nth(1).click()
    page.fill("#seed", "7")
    page.fill("#guidance", "3")
    page.press("#prompt", "Enter")
    expect(page.locator("#grid img")).to_have_count(4, timeout=20_000)
    assert page.locator("#grid img").last.get_attribute("alt") == "a photo of two blue squares, seed 10"
    assert page.evaluate("[...document.querySelectorAll('#grid img')].every(one => one.naturalWidth === 32)")
    first = page.locator("#grid img").first.get_attribute("src")
    page.click("#draw")
    expect(page.locator("#draw")).to_be_enabled(timeout=20_000)
    assert page.locator("#grid img").first.get_attribute("src") == first, "the seed decides"
    page.click("#other-seed")
    expect(page.locator("#grid img").first).to_have_attribute("alt", "a photo of two blue squares, seed 11")
    assert fits(page)
    keep(page, f"{view}-2-pictures")
    # tokenizer
    page.click("#tab-tokens")
    page.set_input_files("#tokens-image", file)
    expect(page.locator("#map button")).to_have_count(4, timeout=20_000)
    expect(page.locator("#codebook option")).to_have_count(3)
    expect(page.locator("#usage meter")).to_have_count(3)
    page.locator("#map button").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#cell")).to_contain_text("Row 2, column 1: codes")
    shown = page.locator("#map").inner_text()
    page.select_option("#codebook", "2")
    assert page.locator("#map").inner_text() != shown
    assert page.locator("#original").evaluate("one => one.naturalWidth") == 32
    assert fits(page)
    keep(page, f"{view}-3-tokenizer")


def test_an_error_is_shown_and_the_question_kept(server, open_page, tmp_path):
    from playwright.sync_api import expect

    page, complaints = open_page(server[0])
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#chat-image", str(tmp_path / "text.png"))
    expect(page.locator("#problem")).to_contain_text("text.png")
    page.fill("#question", "what is <image>?")
    page.press("#question", "Enter")
    expect(page.locator("#problem")).to_contain_text("which only the model's layout may set")
    assert page.input_value("#question") == "what is <image>?"
    expect(page.locator(".turn")).to_have_count(0)
    assert all("400" in one for one in complaints)
    complaints.clear()


def test_who_asks_before_the_model_is_known_waits(server, open_page):
    from playwright.sync_api import expect

    page, _ = open_page(server[0])
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.fill("#question", "red")
    page.press("#question", "Enter")
    expect(page.locator(".turn.assistant")).to_have_class("turn assistant waiting")
    while not held:
        page.wait_for_timeout(10)
    held[0].continue_()
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#problem")).to_be_hidden()


def test_who_waits_for_the_model_may_stop_and_ask_again(server, open_page):
    """The first request stands still, then fails; the next one is answered, and no old error is left."""
    from playwright.sync_api import expect

    page, complaints = open_page(server[0])
    held = []
    page.route("**/v1/models", lambda route: route.fallback() if held else held.append(route))
    page.reload()
    page.fill("#question", "red")
    page.press("#question", "Enter")
    page.click("#chat-stop")
    expect(page.locator("#send")).to_be_enabled()
    assert page.input_value("#question") == "red"
    page.press("#question", "Enter")
    expect(page.locator(".turn.assistant")).to_have_class("turn assistant waiting")
    held[0].abort()
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#problem")).to_be_hidden()
    assert complaints and all("ERR_FAILED" in one for one in complaints)
    complaints.clear()


def test_text_of_strangers_is_no_markup(server, open_page):
    from playwright.sync_api import expect

    page, _ = open_page(server[0])
    page.fill("#question", "<img src=x onerror=alert(1)>")
    page.press("#question", "Enter")
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    expect(page.locator(".turn.user")).to_have_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#talk img")).to_have_count(0)


def test_stop_ends_an_answer(server, open_page):
    from playwright.sync_api import expect
    from serving import eventually
    from test_serve_queue import SlowModel

    page, _ = open_page(server[0])
    scheduler = server[1].service.scheduler
    good, scheduler.model = scheduler.model, SlowModel(scheduler.model)
    try:
        page.fill("#question", "red")
        page.press("#question", "Enter")
        eventually(lambda: scheduler.running)
        page.click("#chat-stop")
        expect(page.locator("#send")).to_be_enabled()
        assert page.input_value("#question") == "red"
        eventually(lambda: scheduler.running[0].cancelled)
    finally:
        scheduler.model.gate.set()
        scheduler.model = good


def test_a_key_is_asked_for(browser, open_page, tmp_path):
    from playwright.sync_api import expect

    with running(make_pipeline(tmp_path), name="tiny", api_key=KEY) as (address, _):
        page, complaints = open_page(address)
        expect(page.locator("#key-form")).to_be_visible()
        assert all("401" in one for one in complaints)
        complaints.clear()
        page.fill("#key", KEY + "\u200b")
        page.press("#key", "Enter")
        expect(page.locator("#problem")).to_contain_text("copy it again")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.locator("#key-form")).to_be_hidden()
        page.goto("about:blank")


DROP = """async () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 40, height: 40 });
    const blob = await new Promise((made) => canvas.toBlob(made));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([blob], "one.png", { type: "image/png" }));
    const event = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
    document.querySelector("header, body").dispatchEvent(event);
    return event.defaultPrevented;
}"""


def test_a_picture_may_be_dropped_anywhere(server, open_page):
    from playwright.sync_api import expect

    page, _ = open_page(server[0])
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.evaluate(DROP), "else the browser leaves the page for the picture"
    expect(page.locator("#chat-preview")).to_be_visible()
    page.click("#tab-pictures")
    assert page.evaluate(DROP)
    page.click("#tab-tokens")
    assert page.evaluate(DROP)
    expect(page.locator("#map button")).to_have_count(4, timeout=20_000)
