"""The page in headless Chromium: an image is dropped, sentences are typed, masks and tokens appear."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_files import nifti, png
from tiny_segmenter import TEXTS, shared

DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
}"""
# The order in which tiles are filled, as it happens.
WATCH = """() => {
  window.filled = [];
  new MutationObserver((changes) => {
    for (const { target } of changes) window.filled.push([...target.parentElement.children].indexOf(target));
  }).observe(document.getElementById("token-grid"), { subtree: true, attributeFilter: ["data-order"] });
}"""
# How many pixels of the canvas are (nearly) of a colour.
COUNT = """(hex) => {
  const canvas = document.getElementById("canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const want = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  let found = 0;
  for (let i = 0; i < data.length; i += 4) if (want.every((v, c) => Math.abs(data[i + c] - v) < 12)) found++;
  return found;
}"""


def launch(playwright: Any) -> Any:
    """Chromium: that of the system, or Playwright's own; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None and not Path(playwright.chromium.executable_path).exists():
        pytest.skip(f"needs Chromium: none of {', '.join(names)} is installed, nor Playwright's own")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def wrong() -> list[str]:
    """Errors of the page's console."""
    return []


@pytest.fixture
def page(address: str, wrong: list[str]) -> Iterator[Any]:
    """The page; at the end nothing must have gone wrong on it, and nobody else must have been asked."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as playwright:
        browser = launch(playwright)
        opened = browser.new_page(viewport={"width": 1200, "height": 800})
        opened.set_default_timeout(20_000)
        hosts: set[str] = set()
        opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("request", lambda request: hosts.add(request.url if request.url[:5] == "http:" else ""))
        opened.goto(address)
        yield opened
        assert wrong == []
        assert all(url == "" or url.startswith(address) for url in hosts) and len(hosts) > 5
        browser.close()


def drop(page: Any, name: str, content: bytes) -> None:
    page.locator("#examples button").first.wait_for()
    page.evaluate(DROP, [name, base64.b64encode(content).decode()])
    page.locator("#canvas").wait_for()


def ask(page: Any, text: str, number: int) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.locator("#sentences li").nth(number).locator("a", has_text="PNG").wait_for()


def test_an_image_is_dropped_and_two_sentences_keep_their_colours(page: Any) -> None:
    drop(page, "x.png", png())
    page.evaluate(WATCH)
    ask(page, TEXTS[0], 0)
    cells = shared()[1].sequence.mask_grid[0] * shared()[1].sequence.mask_grid[1]
    assert page.evaluate("() => window.filled") == list(range(cells))
    assert f"{cells} tokens, shown as they are decoded" in page.inner_text("#token-note")
    assert f"token {cells} of {cells}" in page.inner_text("#token-status")
    ask(page, TEXTS[1], 1)
    assert page.evaluate("() => window.filled") == list(range(cells)) * 2
    colours = page.locator("#sentences li").evaluate_all("(items) => items.map((item) => item.dataset.colour)")
    assert len(set(colours)) == 2
    assert all(page.evaluate(COUNT, colour) > 50 for colour in colours)
    # Hidden, the first is gone from the image and stays in the list; the second keeps its colour when it is removed.
    page.get_by_role("button", name=f"Hide {TEXTS[0]}").click()
    page.get_by_role("button", name=f"Show {TEXTS[0]}").wait_for()
    assert page.evaluate(COUNT, colours[0]) == 0 and page.evaluate(COUNT, colours[1]) > 50
    page.get_by_role("button", name=f"Remove {TEXTS[0]}").click()
    assert page.locator("#sentences li").count() == 1
    assert page.locator("#sentences li").get_attribute("data-colour") == colours[1]
    assert "%" in page.inner_text("#sentences .numbers") and "confidence" in page.inner_text("#sentences .numbers")
    with page.expect_download() as download:
        page.locator("#sentences a", has_text="PNG").click()
    assert download.value.suggested_filename == "mask.png"
    before = page.evaluate(COUNT, colours[1])
    page.get_by_text("Probability", exact=True).click()
    page.locator("#legend").wait_for()
    assert page.evaluate(COUNT, colours[1]) < before / 5


def test_a_volume_is_scrolled_and_segmented_whole(page: Any, tmp_path: Path) -> None:
    drop(page, "ct.nii.gz", nifti(tmp_path))
    page.select_option("#model-window", "percentile")
    assert page.inner_text("#slice-number") == "4 / 6"
    ask(page, TEXTS[0], 0)
    assert "mm²" in page.inner_text("#sentences .numbers")
    page.focus("#canvas")
    page.keyboard.press("ArrowUp")
    page.get_by_text("not segmented on this slice").wait_for()
    assert page.inner_text("#slice-number") == "5 / 6"
    page.get_by_role("button", name=f"Segment the whole volume: {TEXTS[0]}").click()
    page.get_by_text("NIfTI", exact=True).wait_for()
    assert "ml" in page.inner_text("#sentences .numbers")
    colour = page.locator("#sentences li").get_attribute("data-colour")
    assert page.evaluate(COUNT, colour) > 50
    page.select_option("#axis", "coronal")
    page.locator("#slice-number", has_text="/ 40").wait_for()
    with page.expect_download() as download:
        page.get_by_text("NIfTI", exact=True).click()
    assert download.value.suggested_filename == "mask.nii.gz"


def test_a_button_that_is_drawn_again_while_it_is_pressed_still_acts(page: Any) -> None:
    drop(page, "x.png", png())
    ask(page, TEXTS[0], 0)
    page.get_by_role("button", name=f"Hide {TEXTS[0]}").hover()
    page.mouse.down()
    # As the masks of a slice that arrive late do.
    page.get_by_text("Probability", exact=True).dispatch_event("click")
    page.locator("#legend").wait_for()
    page.wait_for_timeout(100)
    page.mouse.up()
    page.get_by_role("button", name=f"Show {TEXTS[0]}").wait_for(timeout=5_000)


def test_what_cannot_be_read_is_said_and_a_phone_has_no_sideways_scroll(page: Any, wrong: list[str]) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.locator("#examples button").first.wait_for()
    page.set_input_files("#files", {"name": "x.png", "mimeType": "image/png", "buffer": b"<html>"})
    page.locator("#message", has_text="web page").wait_for()
    # Chromium itself notes an answer that is an error.
    assert [message for message in wrong if "400 (Bad Request)" not in message] == []
    wrong.clear()
    page.set_input_files("#files", {"name": "x.png", "mimeType": "image/png", "buffer": png()})
    page.locator("#canvas").wait_for()
    page.locator("#examples button").first.click()
    page.locator("#sentences a", has_text="PNG").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    unnamed = """() => [...document.querySelectorAll("button, input:not([type=file]), select, a, [role=img]")]
      .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).map((one) => one.outerHTML)"""
    assert page.evaluate(unnamed) == []
