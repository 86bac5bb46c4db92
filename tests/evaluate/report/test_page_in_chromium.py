"""The page in a real browser: clicks, keys, fingers, and not a word to the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lit_prefopt.evaluate.report.page import write_page
from tests.helpers.evaluations import HOSTILE, write_evaluation

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


class Visit(NamedTuple):
    """A page that is open, and what it asked for and complained of since."""

    page: api.Page
    requests: list[str]
    complaints: list[str]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the page of 70 prompts, 65 of them with pictures."""
    folder = tmp_path_factory.mktemp("chromium") / "run" / "evaluation"
    return write_page(write_evaluation(folder, count=70, pictures=65)).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        # a container's root has no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: api.Browser, url: str, **context: object) -> Iterator[Visit]:
    """Open the page in a context of its own, and look at the end what it did."""
    page = browser.new_context(**context).new_page()
    visit = Visit(page, [], [])
    page.on("request", lambda request: visit.requests.append(request.url))
    page.on("console", lambda message: visit.complaints.append(message.text))
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.goto(url)
    yield visit
    assert visit.complaints == []
    assert [asked for asked in visit.requests if not asked.startswith("data:")] == [url]
    # a prompt's script would have changed it
    assert page.title().endswith(": policy against reference")
    page.context.close()


@pytest.fixture
def visit(browser: api.Browser, url: str) -> Iterator[Visit]:
    yield from opened(browser, url, viewport={"width": 1280, "height": 900})


@pytest.fixture
def phone(browser: api.Browser, url: str) -> Iterator[Visit]:
    size = {"width": 390, "height": 844}
    yield from opened(browser, url, viewport=size, has_touch=True, is_mobile=True)


def changes(page: api.Page) -> list[float]:
    """Return the differences of the cards, from first to last."""
    texts = page.locator(".card .change b").all_inner_texts()
    return [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts]


def test_cards_come_sorted_and_in_parts(visit: Visit) -> None:
    page = visit.page
    assert page.locator(".card").count() == 60
    assert page.locator("#count").inner_text() == "65 of 70"
    assert page.get_by_text("need JavaScript").count() == 0
    assert changes(page) == sorted(changes(page), reverse=True)
    page.get_by_role("button", name="Show more").click()
    assert page.locator(".card").count() == 65
    assert page.locator("#more").is_hidden()
    page.get_by_label("with pictures only").uncheck()
    assert page.locator("#count").inner_text() == "70 of 70"
    page.get_by_label("Order").select_option("loss")
    assert changes(page) == sorted(changes(page))


def test_pictures_are_drawn(visit: Visit) -> None:
    images = visit.page.locator(".card").first.locator("img")
    assert images.count() == 2
    assert images.evaluate_all("all => all.map(image => image.naturalWidth)") == [32, 32]
    assert images.first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_another_judge_sorts_and_draws_anew(visit: Visit) -> None:
    page = visit.page
    best = page.locator(".card .text").first.inner_text()
    page.get_by_label("Judge").select_option("Second")  # its scores go the other way
    assert changes(page) == sorted(changes(page), reverse=True)
    assert page.locator(".card .text").first.inner_text() != best
    assert page.locator("figure[data-judge='0']:visible").count() == 0
    assert page.locator("figure[data-judge='1']:visible").count() == 2


def test_filters_join(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("Category").select_option("counting")
    assert page.locator("#count").inner_text() == "22 of 70"
    page.get_by_label("Search").fill("BLUE circle")
    texts = page.locator(".card .text").all_inner_texts()
    assert 0 < len(texts) < 22
    assert all("blue" in text and "circle" in text for text in texts)
    page.get_by_label("Search").fill("no such words")
    assert page.locator("#cards").inner_text() == "No prompt matches."
    page.keyboard.press("Enter")  # sends no form
    assert page.locator("#count").inner_text() == "0 of 70"


def test_the_bar_shows_for_which_prompts(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("Judge").select_option("Second")
    page.get_by_role("button", name="worse").click()
    assert page.get_by_label("Judge").input_value() == "0"
    assert changes(page)
    assert max(changes(page)) < 0
    assert changes(page) == sorted(changes(page))


def test_keys_lead_through_the_large_view(visit: Visit) -> None:
    page = visit.page
    texts = page.locator(".card .text").all_inner_texts()
    page.locator(".card").first.focus()
    page.keyboard.press("Enter")
    large, place = page.get_by_role("dialog"), page.locator("#large-place")
    assert large.is_visible()
    assert large.locator("img").first.get_attribute("alt") == f"reference: {texts[0]}"
    page.keyboard.press("ArrowLeft")
    assert place.inner_text() == "1 of 65"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert place.inner_text() == "3 of 65"
    assert page.locator("#large-text").inner_text() == texts[2]
    assert page.locator("#large-scores tbody tr").count() == 3  # two judges, one attribute
    page.get_by_role("button", name="Previous prompt").click()
    assert place.inner_text() == "2 of 65"
    page.keyboard.press("End")
    assert place.inner_text() == "65 of 65"
    assert page.get_by_role("button", name="Next prompt").is_disabled()
    page.keyboard.press("Escape")
    assert not large.is_visible()
    last = page.locator(".card").nth(64)  # its card was made meanwhile
    assert last.evaluate("card => card === document.activeElement")


def test_a_prompt_that_is_markup_stays_text(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("Search").fill("onerror")
    assert page.locator(".card .text").all_inner_texts() == [HOSTILE]
    page.get_by_label("Category").select_option("colour")
    page.locator(".card").click()
    assert page.locator("#large-text").inner_text() == HOSTILE
    page.get_by_role("button", name="Close").click()
    page.get_by_label("Category").select_option(HOSTILE)
    assert page.locator(".card").count() == 0


def test_on_a_phone(phone: Visit) -> None:
    page = phone.page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator(".wide").first
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    page.locator(".card").first.tap()
    place = page.locator("#large-place")
    swipe(page, 300, 100)
    api.expect(place).to_have_text("2 of 65")  # what a finger does comes a little later
    swipe(page, 100, 300)
    api.expect(place).to_have_text("1 of 65")
    page.get_by_role("button", name="Close").tap()
    api.expect(page.get_by_role("dialog")).to_be_hidden()


def swipe(page: api.Page, start: int, end: int) -> None:
    """Draw a finger over the large view, from one x to another."""
    client = page.context.new_cdp_session(page)
    for kind, points in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
        touch = {"type": kind, "touchPoints": [{"x": x, "y": 300} for x in points]}
        client.send("Input.dispatchTouchEvent", touch)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: api.Browser, url: str, scheme: str) -> None:
    """Ink, muted and accent stand out from their paper by WCAG's 4.5, in light and in dark."""
    for visit in opened(browser, url, color_scheme=scheme):
        for name in ("ink", "muted", "accent"):
            assert contrast(visit.page, name, "paper") > 4.5
        assert contrast(visit.page, "on-accent", "accent") > 4.5


def contrast(page: api.Page, one: str, other: str) -> float:
    def luminance(name: str) -> float:
        read = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        colour = page.evaluate(read, f"--{name}").removeprefix("#")
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_table_and_plots_need_no_script(browser: api.Browser, url: str) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(url)
    assert page.locator("table").first.is_visible()
    assert page.locator("figure svg").first.is_visible()
    assert page.get_by_text("need JavaScript").is_visible()
    assert page.locator("#tools").is_hidden()
    page.context.close()
