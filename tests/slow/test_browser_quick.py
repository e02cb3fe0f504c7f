"""Player and listening page in Chromium, from disk: no request, no message, versions switch."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from mss_utils.config import COMPARED_MODELS
from mss_utils.listening import cut_excerpt, page, players

RATE = 16000
NAMES = ("mixture", "reference", *COMPARED_MODELS, "irm")
PITCHES = dict(zip(NAMES, (400, 900, 1400, 1900, 2400, 2900), strict=True))
HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed=1'>"
FIRST = "document.querySelector('figure.player').player"


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium; the test is skipped if there is none or it does not start."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (path := shutil.which("chromium")):
        pytest.skip("no Chromium: make chromium")
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that opens a page from disk; no request and no console message may follow."""
    context = browser.new_context(viewport=dict(width=1100, height=900))
    events = []

    def open_text(text, ignore="-"):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        tab = context.new_page()
        tab.on("request", lambda request: events.append(request.url))
        tab.on("console", lambda line: ignore in line.text or events.append(line.text))
        tab.on("pageerror", lambda error: events.append(str(error)))
        tab.goto(path.as_uri())
        events.remove(path.as_uri())
        return tab

    yield open_text
    context.close()
    assert events == []


def band(pitch):
    """Two seconds of noise within 100 Hz of a pitch; mp3 keeps its level, unlike that of a tone."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(2 * RATE))
    spectrum[np.abs(np.fft.rfftfreq(2 * RATE, 1 / RATE) - pitch) > 100] = 0
    noise = np.fft.irfft(spectrum)
    return (0.2 * noise / noise.std())[None].astype(np.float32)


def make_versions():
    return {name: band(pitch) for name, pitch in PITCHES.items()}


def make_listening_page(versions, seconds=2.0):
    """A listening page with two excerpts, without pair and demonstrations, which need a run."""
    short = {name: audio[:, : round(seconds * RATE)] for name, audio in versions.items()}
    rules = (("best", "one"), ("worst", HOSTILE))
    excerpts = {rule: cut_excerpt(short, track, RATE, seconds) for rule, track in rules}
    store = SimpleNamespace(sample_rate=RATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pair", lambda *_: "")
        patch.setattr(page, "_demonstrations", lambda *_: dict(phase="", repeat="", attack=""))
        run = SimpleNamespace(name="run")
        return page.listening_page(run, store, None, {"piano": excerpts}, "tones")


def test_listening_page_switches_versions(open_page):
    tab = open_page(make_listening_page(make_versions()))
    tab.wait_for_selector("figure.player[data-ready]")
    tab.keyboard.press(" ")
    tab.keyboard.press("3")
    state = f"[{FIRST}.transport.selected, {FIRST}.transport.paused]"
    assert tab.evaluate(state) == ["unet", False]
    tab.click("nav button[data-view=blind]")
    tab.click(".start")
    assert tab.locator(".stage .rating").count() == 5
    assert tab.evaluate("window.harmed") is None


def test_notebook_player_opens_and_names_are_escaped(open_page):
    scores = {HOSTILE: {HOSTILE: {HOSTILE: 1.0}}}
    versions = {HOSTILE: band(900), "unet": band(1400)}
    tab = open_page(players({HOSTILE: versions}, RATE, scores).data)
    frame = next(frame for frame in tab.frames if frame.parent_frame)
    frame.wait_for_selector("figure.player[data-ready]")
    frame.click("li[data-version=unet]")
    frame.wait_for_selector("li[data-version=unet][aria-checked=true]")
    assert frame.evaluate(f"{FIRST}.transport.selected") == "unet"
    assert tab.evaluate("window.harmed") is None and frame.evaluate("window.harmed") is None
