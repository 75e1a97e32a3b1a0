"""The page in a real browser: it streams, stops, shows what goes wrong, and fits a phone in the dark."""

import asyncio
import re
import shutil

import pytest

from kivi_jax.serve.app import create_app
from kivi_jax.serve.service import Service

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


class Slow(Service):
    """As a large model on a small machine: each chunk takes its time."""

    async def chunks(self, pending):
        """See `Service`."""
        async for chunk in super().chunks(pending):
            await asyncio.sleep(0.03)
            yield chunk


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_a_chat_streams_stops_and_shows_errors(engine, serving, browser):
    service = Slow(engine, name="tiny", fingerprint="fp_0", timeout=60.0)
    _, address = serving(create_app(service, key="secret"))
    page = browser.new_page()
    failures = []
    page.on("pageerror", lambda error: failures.append(error))
    page.goto(address)
    expect = playwright.expect
    expect(page.locator(".error")).to_contain_text("the API key is missing or wrong")
    page.locator("summary").click()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").blur()
    expect(page.locator("h1")).to_have_text("tiny")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Message").fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".user")).to_have_text("hello")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".note")).to_have_text("cut at the most tokens")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.locator(".assistant").text_content()
    stats = page.locator("#stats").text_content()
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s · cache .+, full .+ \(\d\.\d\dx smaller\)", stats)
    assert 0 < float(page.locator("#held").evaluate("it => it.style.width").rstrip("%")) < 100
    page.get_by_label("Most tokens").fill("40")
    page.get_by_label("Message").fill("go on")
    page.get_by_role("button", name="Send").click()
    last = page.locator(".assistant").last
    expect(last).not_to_have_text("")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    shown = last.text_content()
    page.wait_for_timeout(200)
    assert last.text_content() == shown
    page.get_by_label("Most tokens").fill("1000")
    page.get_by_label("Message").fill("more")
    page.keyboard.press("Enter")
    expect(page.locator(".error").last).to_contain_text("context of 128")
    expect(page.get_by_label("Message")).to_have_value("more")  # to be sent again
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("main > p")).to_have_count(0)
    assert failures == []
    page.close()


@pytest.mark.slow
def test_it_fits_a_phone_and_the_dark(service, serving, browser):
    _, address = serving(create_app(service))
    backs = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 320, "height": 568}, color_scheme=scheme)
        page = context.new_page()
        page.goto(address)
        playwright.expect(page.locator("h1")).to_have_text("tiny")
        page.evaluate("show('assistant', 'word'.repeat(200)); show('user', 'x '.repeat(400))")
        wide, high = page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert (wide, high) == (320, 568)
        assert page.get_by_role("button", name="Send").is_visible()
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(backs) == 2
