"""Players, listening page and blind test in Chromium: keys, positions, levels, responses."""

import re
import time

import numpy as np
import pytest
import test_browser_quick as quick
from nbconvert import HTMLExporter
from test_browser_quick import FIRST, PITCHES, RATE

from mss_utils.listening import frame, reencode
from mss_utils.listening.blind_test import RATED, read_response
from mss_utils.listening.player import common_gain, document, player_html

TEST = "document.getElementById('blind').blindTest"
browser, open_page = quick.browser, quick.open_page  # fixtures


@pytest.fixture(scope="module")
def versions():
    return quick.make_versions()


@pytest.fixture(scope="module")
def two_players(versions):
    return document(2 * player_html("player", versions, RATE), "")


@pytest.fixture(scope="module")
def blind_page(versions):
    return quick.make_listening_page(versions, seconds=0.6)  # must be played for 0.6 s, not for two


def first_player(tab):
    """Wait for the first player; return a function that evaluates an expression on it."""
    tab.wait_for_selector("figure.player[data-ready]")
    return lambda expression: tab.evaluate(f"{FIRST}.{expression}")


def measure_output(tab, fft_size, wait_ms):
    """Level in dB and pitch in Hz at the player's output, and the position that it shows."""
    script = """async ([size, wait]) => {
        const { transport } = document.querySelector('figure.player').player;
        const { context } = transport.output;
        const analyser = new AnalyserNode(context, { fftSize: size, smoothingTimeConstant: 0 });
        transport.output.connect(analyser);
        await new Promise((done) => setTimeout(done, wait));
        const wave = new Float32Array(size), bins = new Float32Array(size / 2);
        analyser.getFloatTimeDomainData(wave);
        analyser.getFloatFrequencyData(bins);
        const position = transport.currentTime;
        transport.output.disconnect(analyser);
        const power = wave.reduce((sum, value) => sum + value * value, 0) / size;
        const pitch = bins.indexOf(Math.max(...bins)) * context.sampleRate / size;
        return [10 * Math.log10(power), pitch, position];
    }"""
    return tab.evaluate(script, [fft_size, wait_ms])


def test_keys_switch_versions_at_their_levels(open_page, versions, two_players):
    tab = open_page(two_players)
    player = first_player(tab)
    tab.keyboard.press(" ")
    gains, decoded_gains = [], []
    for key, (name, audio) in enumerate(versions.items(), 1):
        tab.keyboard.press(str(key))
        assert player("transport.selected") == name
        level_db, pitch, _ = measure_output(tab, 4096, 500)
        assert pitch == pytest.approx(PITCHES[name], abs=105)
        gains.append(level_db - quick.LEVELS_DB[name])
        decoded = tab.evaluate(f"[...{FIRST}.transport.buffers['{name}'].getChannelData(0)]")
        decoded_gains.append(10 * np.log10(np.mean(np.square(decoded)) / np.mean(audio**2)))
    assert np.ptp(decoded_gains) < 0.1
    assert np.ptp(gains) < 3  # a quarter of a second of noise varies by a decibel or two


def test_position_is_what_sounds(open_page):
    at = np.arange(2 * RATE) / RATE  # a sweep from 500 to 3500 Hz: its pitch is the position
    sweep = 0.5 * np.sin(2 * np.pi * (500 * at + 750 * at**2))[None].astype(np.float32)
    tab = open_page(document(player_html("sweep", dict.fromkeys(PITCHES, sweep), RATE), ""))
    player = first_player(tab)

    def check(low=None, high=None):
        _, pitch, position = measure_output(tab, 1024, 150)
        in_seam = low is not None and min(position - low, high - position) < 0.07
        sounding = (pitch - 500) / 1500 + 512 / RATE
        assert in_seam or sounding == pytest.approx(position, abs=0.04)
        return position

    player("seek(0.6)")
    tab.keyboard.press(" ")
    for key in "146":
        tab.keyboard.press(key)
        check()
    for low, high in ((0.4, 0.9), (0.35, 1.0)):  # jump into a loop, and continue in a wider one
        player(f"loop([{low}, {high}])")
        for _ in range(6):
            assert low - 0.01 < check(low, high) < high + 0.01
    tab.keyboard.press(" ")
    held = player("transport.currentTime")
    tab.keyboard.press("4")
    assert [player("transport.currentTime"), player("transport.paused")] == [held, True]
    tab.keyboard.press(" ")
    time.sleep(0.3)
    check(low, high)


def test_switch_seek_loop_and_pause_do_not_click(open_page):
    tone = 0.5 * np.sin(2 * np.pi * 100 * np.arange(2 * RATE) / RATE)[None].astype(np.float32)
    tone_page = document(player_html("tone", {"reference": tone, "unet": 0.5 * tone}, RATE), "")
    tab = open_page(tone_page, ignore="ScriptProcessorNode")
    first_player(tab)
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


def test_one_player_plays_at_a_time(open_page, two_players):
    tab = open_page(two_players)
    tab.wait_for_function("() => document.querySelectorAll('[data-ready]').length == 2")
    first, second = tab.query_selector_all("figure.player")
    first.query_selector(".play").click()
    second.query_selector(".play").click()
    tab.wait_for_function(f"() => {FIRST}.transport.paused")
    assert second.evaluate("(figure) => !figure.player.transport.paused")


def test_residual_is_mixture_minus_version(open_page, versions, two_players):
    tab = open_page(two_players)
    player = first_player(tab)
    tab.keyboard.press("3")
    tab.keyboard.press("r")
    assert player("transport.selected") == "unet residual"
    samples = tab.evaluate(f"[...{FIRST}.transport.buffers['unet residual'].getChannelData(0)]")
    expected = common_gain(versions) * (versions["mixture"] - versions["unet"])[0]
    assert np.mean((samples - expected) ** 2) < 0.02 * np.mean(expected**2)
    tab.keyboard.press("1")
    assert player("transport.selected") == "mixture"  # it has no residual


def test_dragging_loops_and_escape_ends_the_loop(open_page, two_players):
    tab = open_page(two_players)
    player = first_player(tab)
    box = tab.query_selector(".wave").bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 20, steps=4)
    tab.mouse.up()
    assert player("transport.region") == pytest.approx([1.0, 1.2], abs=0.03)
    tab.keyboard.press(" ")
    for _ in range(10):
        assert 0.97 < player("transport.currentTime") < 1.23
        time.sleep(0.07)
    tab.keyboard.press("Escape")
    assert player("transport.region") is None


def test_screen_reader_and_keyboard_reach_versions(open_page, two_players):
    tab = open_page(two_players)
    player = first_player(tab)
    choices = tab.get_by_role("radiogroup").first.get_by_role("radio")
    assert choices.count() == 6
    assert tab.get_by_role("radio", checked=True).first.inner_text().endswith("mixture")
    choices.nth(0).focus()
    tab.keyboard.press("ArrowDown")
    assert player("version") == "reference"
    assert choices.nth(1).evaluate("(node) => node === document.activeElement")
    tab.keyboard.press("ArrowRight")
    assert player("transport.currentTime") == pytest.approx(1.0)
    assert tab.get_by_role("status").first.inner_text() == "reference"
    assert tab.get_by_role("img").first.get_attribute("aria-label") == "spectrogram of reference"


def test_undecodable_sounds_leave_plain_players(browser, two_players):
    broken = re.sub('base64,[^"]*', "base64,AAAA", two_players, count=1)
    tab = browser.new_page()
    tab.set_content(broken)
    tab.wait_for_selector("text=cannot play these versions together")
    figure = tab.locator("figure").first
    assert figure.locator("audio:visible").count() == 6 and figure.locator(".bar").count() == 0
    tab.close()


def test_distant_player_frees_memory(open_page, versions):
    player = player_html("player", versions, RATE)
    tab = open_page(document(f"{player}<div style='height:9000px'></div>{player}", ""))
    first_player(tab)
    assert tab.evaluate("Player.all.map((player) => Boolean(player.transport))") == [True, False]
    tab.keyboard.press("3")
    tab.evaluate("scrollTo(0, 1e6)")
    tab.wait_for_function("() => !Player.all[0].transport && Player.all[1].transport")
    tab.evaluate("scrollTo(0, 0)")
    tab.wait_for_function("() => Player.all[0].transport?.selected === 'unet'")


def test_listening_page_of_a_run(open_page, smoke_run):
    tab = open_page((smoke_run[1] / "listening.html").read_text(encoding="utf-8"))
    first_player(tab)
    figures = tab.evaluate("""async () => Promise.all(
        [...document.querySelectorAll('figure.player')].map(async (figure) => Promise.all(
            [...figure.querySelectorAll('audio')].map(async (audio) => {
                const buffer = await decode(audio, Number(figure.dataset.rate));
                const samples = buffer.getChannelData(0);
                return [buffer.duration, samples.reduce((a, b) => Math.max(a, Math.abs(b)), 0)];
            }))))""")
    assert len(figures) >= 8
    for durations, peaks in (np.array(sounds).T for sounds in figures):
        assert np.ptp(durations) < 1e-6 and 0.5 < durations[0] <= 6.01
        assert peaks.max() == pytest.approx(10 ** (-1 / 20), abs=0.08) and peaks.min() > 1e-4
    assert tab.locator("#listen .scores").first.inner_text().startswith("SDR")
    tab.set_viewport_size(dict(width=360, height=740))  # a phone
    assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_exported_notebook_plays(browser, smoke_run, tmp_path):
    notebook = smoke_run[1] / "notebooks" / "06_listening.ipynb"
    path = tmp_path / "06.html"
    path.write_text(HTMLExporter().from_filename(str(notebook))[0], encoding="utf-8")
    with browser.new_context(offline=True) as context:
        tab = context.new_page()
        errors = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(path.as_uri())
        frames = [frame for frame in tab.frames if frame.parent_frame]
        assert len(frames) == 2  # the listening page, and the first track of the menu
        for inner in frames:
            inner.frame_element().scroll_into_view_if_needed()
            inner.wait_for_selector("figure.player[data-ready]")
            inner.click("figure.player .play")
            tab.keyboard.press("3")
            assert inner.evaluate(f"{FIRST}.transport.selected") == "unet"
            assert not inner.evaluate(f"{FIRST}.transport.paused")
            heights = "document.documentElement.scrollHeight - window.innerHeight"
            assert inner.evaluate(heights) <= 1  # the frame fits its content
        frames[0].wait_for_function(f"() => {FIRST}.transport.paused")
    assert errors == []


def test_blind_test_requires_everything_and_gives_a_response(open_page, blind_page):
    tab = open_page(blind_page)
    tab.click("nav button[data-view=blind]")
    tab.fill("#blind input[type=text]", "An <b>ear</b> 12")
    tab.click(".start")
    for number in (1, 2):
        assert tab.locator(".stage h2").inner_text() == f"Excerpt {number} of 2: piano"
        assert tab.is_disabled(".next") and "Still to play" in tab.inner_text(".stage .small")
        shown = tab.locator(".stage").inner_html()
        assert not re.search("U-Net|BiLSTM|attention<|low anchor", shown)
        tab.wait_for_function(f"() => {TEST}.player.transport")
        tab.keyboard.press(" ")
        for key in "123456":
            tab.keyboard.press(key)
            time.sleep(0.85)
        tab.wait_for_function("() => !document.body.innerText.includes('Still to play')")
        assert tab.is_disabled(".next")  # nothing is rated
        for place, slider in enumerate(tab.query_selector_all(".rating input")):
            slider.fill(str(10 * place + number))
        tab.fill("textarea", "3 of them hiss" if number == 1 else "")
        tab.click(".next")
    assert "low anchor" in tab.locator(".stage table").inner_text()
    with tab.expect_download() as download:
        tab.click(".download")
    response = read_response(download.value.path().read_bytes(), "file")
    named = (response.run, response.models, response.listener)
    assert named == ("tones", "abc", "An <b>ear</b> 12")
    assert {excerpt.track for excerpt in response.pages} == {"one", quick.HOSTILE}
    for number, excerpt in enumerate(response.pages, 1):
        ratings = [excerpt.ratings[version] for version in excerpt.order]
        assert ratings == [10 * place + number for place in range(5)]
        assert set(excerpt.heard_s) == {"open", *RATED} and min(excerpt.heard_s.values()) >= 0.6
    assert response.pages[0].comment == "3 of them hiss"  # digits in a comment switch nothing
    assert tab.evaluate("window.harmed") is None


def test_blind_test_ignores_silence_and_short_loops(open_page, blind_page):
    tab = open_page(blind_page)
    tab.click("nav button[data-view=blind]")
    tab.click(".start")
    first, second = tab.query_selector_all(".rating input")[:2]
    first.click()  # a rating of 50 needs no movement
    second.focus()
    tab.keyboard.press("Enter")
    assert list(tab.evaluate(f"{TEST}.rated").values()) == [50, 50]
    assert tab.evaluate(f"{TEST}.player.version === {TEST}.order[1]")
    tab.keyboard.press("1")
    tab.keyboard.press(" ")
    tab.wait_for_function(f"() => {TEST}.player.transport?.selected === 'open'")
    tab.evaluate(f"{TEST}.player.loop([0.1, 0.3])")
    time.sleep(0.8)
    assert tab.evaluate(f"{TEST}.playedS.open") < 0.3
    tab.evaluate(f"{TEST}.player.loop(null).then(() => contextOf({RATE}).suspend())")
    time.sleep(0.8)
    assert tab.evaluate(f"{TEST}.playedS.open") < 0.5


def test_blind_test_order_is_random(open_page, blind_page):
    tab = open_page(blind_page)
    orders = tab.evaluate("Array.from({ length: 300 }, () => shuffle([0, 1, 2, 3, 4]))")
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert np.bincount([order[0] for order in orders], minlength=5).min() > 30


def test_players_play_inside_the_html_report(open_page, two_players):
    tab = open_page(frame(reencode(two_players, 0.5), "players").data)
    inside = tab.frame_locator("iframe")
    inside.locator("figure.player[data-ready]").first.wait_for()
    inside.locator("figure.player button", has_text="Play").first.click()
    assert tab.locator("iframe").bounding_box()["height"] > 300
    tab.wait_for_timeout(1000)
    assert tab.frames[1].evaluate(f"{FIRST}.transport.currentTime") > 0.1
