"""Players, listening page and blind test in Chromium: keys, positions, levels, responses."""

import re
import time

import numpy as np
import pytest
import test_browser_quick as quick
from nbconvert import HTMLExporter
from test_browser_quick import FIRST, PITCHES, RATE

from mss_utils.listening.blind_test import RATED, read_response
from mss_utils.listening.player import common_gain, document, player_html

TEST = "document.getElementById('blind').blindTest"
READY = "figure.player[data-ready]"
browser, open_page = quick.browser, quick.open_page  # fixtures


@pytest.fixture(scope="module")
def versions():
    return quick.make_versions()


@pytest.fixture(scope="module")
def player_page(versions):
    return document(player_html("player", versions, RATE), "")


@pytest.fixture
def tab(open_page, player_page):
    """A page with one player, whose sounds are decoded."""
    tab = open_page(player_page)
    tab.wait_for_selector(READY)
    return tab


def player(tab, expression):
    """Evaluate an expression on the first player."""
    return tab.evaluate(f"{FIRST}.{expression}")


@pytest.fixture
def blind_tab(open_page, versions):
    """The blind test has begun; a version must be played for 0.6 s, not for two."""
    tab = open_page(quick.make_listening_page(versions, seconds=0.6))
    tab.click("nav button[data-view=blind]")
    tab.fill("#blind input[type=text]", "An <b>ear</b> 12")
    tab.click(".start")
    return tab


def measure_output(tab):
    """Pitch in Hz at the player's output, and the position that it shows."""
    return tab.evaluate("""async () => {
        const { transport } = document.querySelector('figure.player').player;
        const { context } = transport.output;
        const analyser = new AnalyserNode(context, { fftSize: 1024, smoothingTimeConstant: 0 });
        transport.output.connect(analyser);
        await new Promise((done) => setTimeout(done, 150));
        const bins = new Float32Array(512);
        analyser.getFloatFrequencyData(bins);
        const position = transport.currentTime;
        transport.output.disconnect(analyser);
        return [bins.indexOf(Math.max(...bins)) * context.sampleRate / 1024, position];
    }""")


def test_keys_switch_versions_and_residuals(tab, versions):
    tab.keyboard.press(" ")
    for key, (name, pitch) in enumerate(PITCHES.items(), 1):
        tab.keyboard.press(str(key))
        assert player(tab, "transport.selected") == name
        assert measure_output(tab)[0] == pytest.approx(pitch, abs=120)
    tab.keyboard.press("3")
    tab.keyboard.press("r")
    assert player(tab, "transport.selected") == "unet residual"
    samples = tab.evaluate(f"[...{FIRST}.transport.buffers['unet residual'].getChannelData(0)]")
    expected = common_gain(versions) * (versions["mixture"] - versions["unet"])[0]
    assert np.mean((samples - expected) ** 2) < 0.02 * np.mean(expected**2)
    tab.keyboard.press("1")
    assert player(tab, "transport.selected") == "mixture"  # it has no residual


def test_position_is_what_sounds(open_page):
    at = np.arange(2 * RATE) / RATE  # a sweep from 500 to 3500 Hz: its pitch is the position
    sweep = 0.5 * np.sin(2 * np.pi * (500 * at + 750 * at**2))[None].astype(np.float32)
    tab = open_page(document(player_html("sweep", dict.fromkeys(PITCHES, sweep), RATE), ""))
    tab.wait_for_selector(READY)
    player(tab, "loop([0.9, 1.9])")
    tab.keyboard.press(" ")
    for key in 2 * "146":
        tab.keyboard.press(key)
        pitch, position = measure_output(tab)
        in_seam = min(position - 0.9, 1.9 - position) < 0.07
        assert in_seam or (pitch - 500) / 1500 + 512 / RATE == pytest.approx(position, abs=0.04)
        assert 0.89 < position < 1.91
    tab.keyboard.press(" ")
    held = player(tab, "transport.currentTime")
    tab.keyboard.press("4")
    assert player(tab, "transport.paused") and player(tab, "transport.currentTime") == held


def test_switch_seek_loop_and_pause_do_not_click(open_page):
    tone = 0.5 * np.sin(2 * np.pi * 100 * np.arange(2 * RATE) / RATE)[None].astype(np.float32)
    tone_page = document(player_html("tone", {"reference": tone, "unet": 0.5 * tone}, RATE), "")
    tab = open_page(tone_page, ignore="ScriptProcessorNode")
    tab.wait_for_selector(READY)
    tab.keyboard.press(" ")
    recordings = tab.evaluate("""async () => {
        const { player } = document.querySelector('figure.player');
        const { context } = player.transport.output;
        const recorder = context.createScriptProcessor(2048, 1, 1);
        let samples = [];
        recorder.onaudioprocess = (event) => samples.push(...event.inputBuffer.getChannelData(0));
        player.transport.output.connect(recorder).connect(context.destination);
        const wait = (ms) => new Promise((done) => setTimeout(done, ms));
        const recordings = [];
        for (const act of [() => {}, () => player.select("unet"), () => player.seek(0.333),
                           () => player.setLoop([0.2, 1.7]), () => player.toggle()]) {
            samples = [];
            await wait(150);
            await act();
            await wait(350);
            recordings.push(samples);
        }
        return recordings;
    }""")
    steps = [np.abs(np.diff(samples)).max() for samples in recordings]
    assert steps[0] > 0.01 and max(steps[1:]) < 2 * steps[0]  # no steeper than the tone itself


def test_dragging_loops_and_escape_ends_the_loop(tab):
    box = tab.query_selector(".wave").bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 20, steps=4)
    tab.mouse.up()
    assert player(tab, "transport.region") == pytest.approx([1.0, 1.2], abs=0.03)
    tab.keyboard.press("Escape")
    assert player(tab, "transport.region") is None


def test_screen_reader_and_keyboard_reach_versions(tab):
    choices = tab.get_by_role("radiogroup").get_by_role("radio")
    assert tab.get_by_role("radio", checked=True).inner_text().endswith("mixture")
    choices.nth(0).focus()
    tab.keyboard.press("ArrowDown")
    assert choices.nth(1).evaluate("(node) => node === document.activeElement")
    tab.keyboard.press("ArrowRight")
    assert player(tab, "transport.currentTime") == pytest.approx(1.0)
    assert tab.get_by_role("status").inner_text() == "reference"
    assert tab.get_by_role("img").get_attribute("aria-label") == "spectrogram of reference"


def test_undecodable_sounds_leave_plain_players(browser, player_page):
    tab = browser.new_page()
    tab.set_content(re.sub('base64,[^"]*', "base64,AAAA", player_page, count=1))
    tab.wait_for_selector("text=cannot play these versions together")
    assert tab.locator("audio:visible").count() == 6 and tab.locator(".bar").count() == 0
    tab.close()


def test_listening_page_of_a_run_fits_a_phone(open_page, smoke_run):
    tab = open_page((smoke_run[1] / "listening.html").read_text(encoding="utf-8"))
    tab.wait_for_selector(READY)
    assert tab.locator("figure.player").count() >= 8
    assert tab.locator("#listen .scores").first.inner_text().startswith("SDR")
    tab.set_viewport_size(dict(width=360, height=740))
    assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_exported_notebook_plays(browser, smoke_run, tmp_path):
    notebook = smoke_run[1] / "notebooks" / "06_listening.ipynb"
    path, errors = tmp_path / "06.html", []
    path.write_text(HTMLExporter().from_filename(str(notebook))[0], encoding="utf-8")
    with browser.new_context(offline=True) as context:
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(error))
        tab.goto(path.as_uri())
        frames = [frame for frame in tab.frames if frame.parent_frame]
        assert len(frames) == 2  # the listening page, and the first track of the menu
        for inner in frames:
            inner.frame_element().scroll_into_view_if_needed()
            inner.wait_for_selector(READY)
            inner.click("figure.player .play")
            inner.wait_for_function(f"() => !{FIRST}.transport.paused")
            heights = "document.documentElement.scrollHeight - window.innerHeight"
            assert inner.evaluate(heights) <= 1  # the frame fits its content
        frames[0].wait_for_function(f"() => {FIRST}.transport.paused")  # one plays at a time
    assert not errors


def test_blind_test_requires_everything_and_gives_a_response(blind_tab):
    tab = blind_tab
    for number in (1, 2):
        assert tab.locator(".stage h2").inner_text() == f"Excerpt {number} of 2: piano"
        assert tab.is_disabled(".next") and "Still to play" in tab.inner_text(".stage .small")
        assert not re.search("U-Net|BiLSTM|attention<|low anchor", tab.inner_html(".stage"))
        tab.wait_for_function(f"() => {TEST}.player.transport")
        tab.keyboard.press(" ")
        for key in "123456":
            tab.keyboard.press(key)
            time.sleep(0.85)
        tab.wait_for_function("() => !document.body.innerText.includes('Still to play')")
        assert tab.is_disabled(".next")  # nothing is rated
        for place, slider in enumerate(tab.query_selector_all(".rating input")):
            slider.fill(str(10 * place + number))
        tab.fill("textarea", "3 of them hiss")  # digits in a comment switch nothing
        tab.click(".next")
    assert "low anchor" in tab.locator(".stage table").inner_text()
    with tab.expect_download() as download:
        tab.click(".download")
    response = read_response(download.value.path().read_bytes(), "file")
    assert (response.run, response.listener) == ("tones", "An <b>ear</b> 12")
    assert {excerpt.track for excerpt in response.pages} == {"one", quick.HOSTILE}
    for number, excerpt in enumerate(response.pages, 1):
        expected = {version: 10 * place + number for place, version in enumerate(excerpt.order)}
        assert excerpt.ratings == expected and excerpt.comment == "3 of them hiss"
        assert set(excerpt.heard_s) == {"open", *RATED} and min(excerpt.heard_s.values()) >= 0.6
    assert tab.evaluate("window.harmed") is None


def test_blind_test_ignores_silence_and_short_loops(blind_tab):
    blind_tab.keyboard.press("1")
    blind_tab.keyboard.press(" ")
    blind_tab.wait_for_function(f"() => {TEST}.player.transport?.selected === 'open'")
    blind_tab.evaluate(f"{TEST}.player.loop([0.1, 0.3])")
    time.sleep(0.8)
    assert blind_tab.evaluate(f"{TEST}.playedS.open") < 0.3
    blind_tab.evaluate(f"{TEST}.player.loop(null).then(() => contextOf({RATE}).suspend())")
    time.sleep(0.8)
    assert blind_tab.evaluate(f"{TEST}.playedS.open") < 0.5


def test_blind_test_order_is_random_and_sliders_select(blind_tab):
    orders = blind_tab.evaluate("Array.from({ length: 300 }, () => shuffle([0, 1, 2, 3, 4]))")
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert np.bincount([order[0] for order in orders], minlength=5).min() > 30
    first, second = blind_tab.query_selector_all(".rating input")[:2]
    first.click()  # a rating of 50 needs no movement
    second.focus()
    blind_tab.keyboard.press("Enter")
    assert list(blind_tab.evaluate(f"{TEST}.rated").values()) == [50, 50]
    assert blind_tab.evaluate(f"{TEST}.player.version === {TEST}.order[1]")
