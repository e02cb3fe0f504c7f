"""The players, the listening page and the blind test in a real Chromium, from disk: keys, positions, sounds, levels, answers."""

import io
import re
import shutil
import time

import numpy as np
import pytest
from matplotlib.image import imread
from nbconvert import HTMLExporter

from mss_utils.config import MODELS, Run, Settings
from mss_utils.listening import cut_excerpt, document, players, reencode
from mss_utils.listening.blind_test import RATED, read_answers
from mss_utils.listening.page import excerpts_section, page_of
from mss_utils.listening.player import figure, gain_with_residuals
from mss_utils.report.collections import PLAYERS_MARK, with_players

RATE = 16000
FREQUENCIES = dict(
    zip(("mixture", "reference", *MODELS, "irm"), (400, 900, 1400, 1900, 2400, 2900))
)
LEVELS_DB = dict(zip(FREQUENCIES, (-6, -9, -12, -18, -24, -10)))
NASTY = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed=1'>"
FIRST = "document.querySelector('figure.player').player"


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium; the tests of this file are skipped where there is none, or none that starts (Ubuntu's is a stub)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (path := shutil.which("chromium")):
        pytest.skip("no Chromium; install it with: apt-get install chromium")
    with playwright.sync_playwright() as drive:
        try:
            chromium = drive.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page from disk and returns it; afterwards nothing was requested, and nothing complained, `but` of what a test does."""
    context = browser.new_context(viewport=dict(width=1100, height=900))
    seen = []

    def open_page(text, but="no such words"):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        page = context.new_page()
        page.on("request", lambda request: seen.append(request.url))
        page.on(
            "console",
            lambda message: but in message.text or seen.append(f"{message.type}: {message.text}"),
        )
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.goto(path.as_uri())
        seen.remove(path.as_uri())
        return page

    yield open_page
    context.close()
    assert seen == []


def band(frequency, level_db):
    """Two seconds of noise within 100 Hz of a frequency, `(1, samples)`: unlike a tone, mp3 keeps its level."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(2 * RATE))
    spectrum[np.abs(np.fft.rfftfreq(2 * RATE, 1 / RATE) - frequency) > 100] = 0
    noise = np.fft.irfft(spectrum)
    return (noise / noise.std() * 10 ** (level_db / 20))[None].astype(np.float32)


@pytest.fixture(scope="module")
def tones():
    """A band of noise a version, each of a pitch and a level of its own."""
    return {name: band(frequency, LEVELS_DB[name]) for name, frequency in FREQUENCIES.items()}


@pytest.fixture(scope="module")
def tone_page(tones):
    return document(
        figure("tones", tones, RATE) + figure("again", tones, RATE), "tones", ["startPlayers()"]
    )


def ready(page):
    page.wait_for_selector("figure.player[data-ready]")
    return lambda expression: page.evaluate(f"{FIRST}.{expression}")


def heard_spectrum(page):
    """Level in dB and pitch in Hz of what leaves the player just now, by an analyser on its output."""
    return page.evaluate("""async () => {
        const transport = document.querySelector('figure.player').player.transport;
        const context = transport.output.context;
        const analyser = new AnalyserNode(context, { fftSize: 4096 });
        transport.output.connect(analyser);
        await new Promise((done) => setTimeout(done, 500));
        const wave = new Float32Array(4096), bins = new Float32Array(2048);
        analyser.getFloatTimeDomainData(wave);
        analyser.getFloatFrequencyData(bins);
        transport.output.disconnect(analyser);
        const power = wave.reduce((sum, value) => sum + value * value, 0) / wave.length;
        return [10 * Math.log10(power), bins.indexOf(Math.max(...bins)) * context.sampleRate / 4096];
    }""")


def test_keys_choose_what_is_heard_and_all_versions_keep_their_level(opened, tone_page):
    page = opened(tone_page)
    player = ready(page)
    page.keyboard.press(" ")
    found = {}
    for key, name in enumerate(FREQUENCIES, 1):
        page.keyboard.press(str(key))
        assert player("transport.heard") == name
        found[name], pitch = heard_spectrum(page)
        assert pitch == pytest.approx(FREQUENCIES[name], abs=105), (
            "the sound that goes out is that of the version"
        )
    gains = [found[name] - LEVELS_DB[name] for name in FREQUENCIES]
    assert np.ptp(gains) < 3, (
        "a quarter of a second of noise is as loud as the rest within a decibel or two"
    )


def test_versions_have_one_gain_once_decoded(opened, tones, tone_page):
    page = opened(tone_page)
    player = ready(page)
    power = "(buffer) => buffer.getChannelData(0).reduce((sum, value) => sum + value * value, 0) / buffer.length"
    found = player(
        f"transport && Object.fromEntries(Object.entries({FIRST}.transport.buffers).map(([name, b]) => [name, ({power})(b)]))"
    )
    gains = [10 * np.log10(found[name] / np.mean(tones[name] ** 2)) for name in tones]
    assert np.ptp(gains) < 0.1, "through mp3 and browser"


@pytest.fixture(scope="module")
def sweep_page():
    """Every version is one sweep from 500 to 3500 Hz in two seconds: its pitch tells the position that is heard."""
    at = np.arange(2 * RATE) / RATE
    sweep = 0.5 * np.sin(2 * np.pi * (500 * at + 750 * at**2))[None].astype(np.float32)
    return document(
        figure("sweep", dict.fromkeys(FREQUENCIES, sweep), RATE), "sweep", ["startPlayers()"]
    )


def position_heard(page):
    """Seconds into the sweep that sound now, by their pitch, and what the player says: `(heard, said)`."""
    pitch, said, wave_s = page.evaluate("""async () => {
        const { transport } = document.querySelector('figure.player').player;
        const { context } = transport.output;
        const analyser = new AnalyserNode(context, { fftSize: 1024, smoothingTimeConstant: 0 });
        transport.output.connect(analyser);
        await new Promise((done) => setTimeout(done, 150));
        const bins = new Float32Array(512);
        analyser.getFloatFrequencyData(bins);
        const said = transport.currentTime;
        transport.output.disconnect(analyser);
        return [bins.indexOf(Math.max(...bins)) * context.sampleRate / 1024, said, 1024 / context.sampleRate];
    }""")
    return (pitch - 500) / 1500 + wave_s / 2, said


def test_what_sounds_is_where_the_player_says_after_starts_seeks_switches_and_loops(
    opened, sweep_page
):
    page = opened(sweep_page)
    player = ready(page)
    player("seek(0.6)")
    page.keyboard.press(" ")
    for key in "146":
        page.keyboard.press(key)
        heard, said = position_heard(page)
        assert heard == pytest.approx(said, abs=0.04), f"version {key}"
    for low, high in ((0.4, 0.9), (0.35, 1.0)):  # into the loop, and on within a wider one
        player(f"loop([{low}, {high}])")
        for _ in range(6):
            heard, said = position_heard(page)
            assert low - 0.01 < said < high + 0.01
            assert heard == pytest.approx(said, abs=0.04) or min(said - low, high - said) < 0.07, (
                "but for windows with the seam in them"
            )
    page.keyboard.press(" ")
    held = player("transport.currentTime")
    page.keyboard.press("4")
    assert (
        player("transport.currentTime") == held
        and player("transport.paused")
        and player("transport.heard") == "demucs_lstm"
    )
    page.keyboard.press(" ")
    time.sleep(0.3)
    heard, said = position_heard(page)
    assert heard == pytest.approx(said, abs=0.04) or min(said - low, high - said) < 0.07, (
        "after a pause"
    )


def test_nothing_clicks(opened):
    at = np.arange(2 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 100 * at)[None].astype(np.float32)
    page = opened(
        document(
            figure("tone", {"reference": tone, "unet": 0.5 * tone}, RATE),
            "tone",
            ["startPlayers()"],
        ),
        but="ScriptProcessorNode",
    )
    player = ready(page)
    page.keyboard.press(" ")
    steps = page.evaluate("""async () => {
        const { player } = document.querySelector('figure.player');
        const { context } = player.transport.output;
        const recorder = context.createScriptProcessor(2048, 1, 1);
        const recorded = [];
        recorder.onaudioprocess = ({ inputBuffer }) => recorded.push(...inputBuffer.getChannelData(0));
        player.transport.output.connect(recorder).connect(context.destination);
        const wait = (ms) => new Promise((done) => setTimeout(done, ms));
        const largest = [];
        for (const act of [() => {}, () => player.hear("unet"), () => player.seek(0.333), () => player.setLoop([0.2, 1.7]), () => player.toggle()]) {
            recorded.length = 0;
            await wait(150);
            await act();
            await wait(350);
            largest.push(recorded.reduce((most, value, index) => Math.max(most, index ? Math.abs(value - recorded[index - 1]) : 0), 0));
        }
        return largest;
    }""")
    assert steps[0] > 0.01 and max(steps[1:]) < 2 * steps[0], (
        "switch, seek, loop and pause are no steeper than the tone"
    )


def test_only_one_player_sounds(opened, tone_page):
    page = opened(tone_page)
    page.wait_for_function(
        "() => document.querySelectorAll('figure.player[data-ready]').length == 2"
    )
    first, second = page.query_selector_all("figure.player")
    first.query_selector(".play").click()
    second.query_selector(".play").click()
    page.wait_for_function(f"() => {FIRST}.transport.paused")
    assert second.evaluate("(figure) => !figure.player.transport.paused")


def test_the_residual_is_the_mixture_minus_the_version(opened, tones, tone_page):
    page = opened(tone_page)
    player = ready(page)
    page.keyboard.press("3")
    page.keyboard.press("r")
    assert player("transport.heard") == "unet residual"
    gain = gain_with_residuals(tones)
    samples = np.array(
        page.evaluate(f"[...{FIRST}.transport.buffers['unet residual'].getChannelData(0)]")
    )
    wanted = gain * (tones["mixture"] - tones["unet"])[0]
    assert np.mean((samples - wanted) ** 2) < 0.02 * np.mean(wanted**2)
    page.keyboard.press("1")
    assert player("transport.heard") == "mixture", "the mixture has no residual"


def test_dragging_loops_a_stretch_and_escape_ends_it(opened, tone_page):
    page = opened(tone_page)
    player = ready(page)
    box = page.query_selector(".wave").bounding_box()
    x, y, width = box["x"], box["y"] + 20, box["width"]
    page.mouse.move(x + 0.5 * width, y)
    page.mouse.down()
    page.mouse.move(x + 0.6 * width, y, steps=4)
    page.mouse.up()
    assert player("transport.region") == pytest.approx([1.0, 1.2], abs=0.03)
    page.keyboard.press(" ")
    positions = []
    for _ in range(10):
        page.keyboard.press(str(len(positions) % 6 + 1))
        positions.append(player("transport.currentTime"))
        time.sleep(0.07)
    assert min(positions) > 0.97 and max(positions) < 1.23 and np.ptp(positions) > 0.05
    page.keyboard.press("Escape")
    assert player("transport.region") is None and page.query_selector("text=loop all").is_disabled()


def test_screen_readers_and_keyboards_find_everything(opened, tone_page):
    page = opened(tone_page)
    player = ready(page)
    choices = page.get_by_role("radiogroup").first.get_by_role("radio")
    assert choices.count() == 6 and page.get_by_role(
        "radio", checked=True
    ).first.inner_text().endswith("mixture")
    choices.nth(0).focus()
    page.keyboard.press("ArrowDown")
    assert player("version") == "reference" and choices.nth(1).evaluate(
        "(node) => node === document.activeElement"
    )
    page.keyboard.press("ArrowRight")
    assert player("transport.currentTime") == pytest.approx(1.0)
    assert page.get_by_role("status").first.inner_text() == "reference"
    assert page.get_by_role("img").first.get_attribute("aria-label") == "spectrogram of reference"


def test_pictures_show_what_is_heard(opened, tone_page):
    page = opened(tone_page)
    ready(page)
    shown = {}
    for key, name in ((1, "mixture"), (6, "irm")):
        page.keyboard.press(str(key))
        time.sleep(0.8)
        shown[name] = [
            imread(io.BytesIO(page.locator(f"figure .{part}").first.screenshot()))[
                :, 100:, :3
            ].mean(axis=2)
            for part in ("wave", "spectrogram")
        ]
    rows = [
        spectrogram[8:].mean(axis=1).argmax() / len(spectrogram)
        for _, spectrogram in shown.values()
    ]
    assert 0.7 < rows[0] < 1 and rows[1] < rows[0] - 0.2, "400 Hz stands low, 2900 Hz higher"
    ink = [np.mean(np.abs(wave - wave[0, 0]) > 0.2) for wave, _ in shown.values()]
    assert ink[1] == pytest.approx(ink[0] * 10 ** (-4 / 20), rel=0.3), "4 dB lower"


def test_what_does_not_decode_is_left_as_plain_players(browser, tmp_path, tone_page):
    (tmp_path / "page.html").write_text(re.sub('base64,[^"]*', "base64,AAAA", tone_page, count=1))
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("text=cannot play these versions together")
    assert (
        page.locator("figure").first.locator("audio:visible").count() == 6
        and page.locator("figure").first.locator(".bar").count() == 0
    )
    page.close()


def test_a_silent_player_far_away_gives_back_its_memory(opened, tones):
    page = opened(
        document(
            figure("near", tones, RATE)
            + "<div style='height:9000px'></div>"
            + figure("far", tones, RATE),
            "two",
            ["startPlayers()"],
        )
    )
    ready(page)
    assert page.evaluate("Player.all.map((player) => Boolean(player.transport))") == [True, False]
    page.keyboard.press("3")
    page.evaluate("scrollTo(0, 1e6)")
    page.wait_for_function("() => !Player.all[0].transport && Player.all[1].transport")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_function("() => Player.all[0].transport?.heard === 'unet'")


# --- the page of a run -------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_plays_from_disk(opened, smoke_run):
    page = opened((smoke_run[1] / "listening.html").read_text(encoding="utf-8"))
    player = ready(page)
    facts = page.evaluate("""async () => Promise.all([...document.querySelectorAll('figure.player')].map(async (figure) =>
        Promise.all([...figure.querySelectorAll('audio')].map(async (audio) => {
            const buffer = await decode(audio, Number(figure.dataset.rate));
            const peak = buffer.getChannelData(0).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
            return [buffer.duration, peak];
        }))))""")
    assert len(facts) >= 8
    for sounds in facts:
        durations, peaks = np.array(sounds).T
        assert np.ptp(durations) < 1e-6 and 0.5 < durations[0] <= 6.01
        assert peaks.max() == pytest.approx(10 ** (-1 / 20), abs=0.08) and peaks.min() > 1e-4
    page.keyboard.press(" ")
    time.sleep(0.3)
    page.keyboard.press("2")
    assert player("transport.heard") == "reference" and player("transport.currentTime") > 0.2
    assert page.locator("#listen .scores").first.inner_text().startswith("SDR")


def test_a_phone_shows_everything_without_scrolling_sideways(opened, smoke_run):
    page = opened((smoke_run[1] / "listening.html").read_text(encoding="utf-8"))
    page.set_viewport_size(dict(width=360, height=740))
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_exported_notebook_plays(browser, smoke_run, tmp_path):
    exported, _ = HTMLExporter().from_filename(
        str(smoke_run[1] / "notebooks" / "06_listening.ipynb")
    )
    path = tmp_path / "06.html"
    path.write_text(exported, encoding="utf-8")
    with browser.new_context(
        offline=True
    ) as context:  # formulas and menus of an export come from a network, players must not
        page = context.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        frames = [frame for frame in page.frames if frame.parent_frame]
        assert len(frames) == 2, "the listening page, and the first track of the menu"
        for frame in frames:
            frame.frame_element().scroll_into_view_if_needed()
            frame.wait_for_selector("figure.player[data-ready]")
            frame.click("figure.player .play")
            page.keyboard.press("3")
            assert frame.evaluate(f"[{FIRST}.transport.heard, {FIRST}.transport.paused]") == [
                "unet",
                False,
            ]
            shown, needed = frame.evaluate(
                "[window.innerHeight, document.documentElement.scrollHeight]"
            )
            assert shown >= needed - 1, "the frame is as high as what it shows"
        frames[0].wait_for_function(f"() => {FIRST}.transport.paused")
    assert errors == []


# --- the blind test ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blind_page(tones):
    """Two excerpts of 0.6 seconds, so that a test need not listen for two seconds each."""
    short = {name: audio[:, : round(0.6 * RATE)] for name, audio in tones.items()}
    found = {
        rule: cut_excerpt(short, track, "piano", RATE, 0.6)
        for rule, track in (("best", "one"), ("worst", NASTY))
    }
    listen, pages = excerpts_section("piano", found, RATE, 0)
    return page_of("tones", "abc", ["piano"], listen, pages)


def hear_all(page):
    page.wait_for_function("() => document.getElementById('blind').blindTest.player.transport")
    page.keyboard.press(" ")
    for key in "123456":
        page.keyboard.press(key)
        time.sleep(0.85)


def test_the_blind_test_asks_for_everything_and_hands_out_answers(opened, blind_page):
    page = opened(blind_page)
    ready(page)
    page.click("nav button[data-view=blind]")
    page.fill("#blind input[type=text]", "An <b>ear</b> 12")
    page.click(".start")
    for number in (1, 2):
        assert page.locator(".stage h2").inner_text() == f"Excerpt {number} of 2: piano"
        assert page.is_disabled(".next") and "Still to hear" in page.inner_text(
            ".stage [role=status].small"
        )
        shown = page.locator(".stage").inner_html()
        assert not any(
            name in shown for name in ("U-Net", "BiLSTM", "attention</", "low anchor")
        ), "nothing names a version"
        hear_all(page)
        page.wait_for_function(
            "() => !document.querySelector('.stage [role=status].small').textContent.includes('hear')"
        )
        assert page.is_disabled(".next"), "heard, but not rated"
        for place, slider in enumerate(page.query_selector_all(".rating input")):
            slider.fill(str(10 * place + number))
        page.fill("textarea", "3 of them hiss" if number == 1 else "")
        page.click(".next")
    assert "low anchor" in page.locator(".stage table").inner_text()
    with page.expect_download() as download:
        page.click(".download")
    answers = read_answers(download.value.path().read_bytes(), "file")
    assert (answers.run, answers.models, answers.listener) == ("tones", "abc", "An <b>ear</b> 12")
    assert {answer.track for answer in answers.pages} == {"one", NASTY}
    for number, answer in enumerate(answers.pages, 1):
        assert [answer.ratings[version] for version in answer.order] == [
            10 * place + number for place in range(5)
        ]
        assert min(answer.heard_s.values()) >= 0.6 and set(answer.heard_s) == {"open", *RATED}
    assert answers.pages[0].comment == "3 of them hiss", "digits in a comment choose nothing"
    assert page.evaluate("window.harmed") is None


def test_a_rating_of_fifty_and_a_keyboard_are_enough(opened, blind_page):
    page = opened(blind_page)
    ready(page)
    page.click("nav button[data-view=blind]")
    page.click(".start")
    first, second = page.query_selector_all(".rating input")[:2]
    assert first.get_attribute("aria-valuetext") == "not rated"
    first.click()  # in the middle, where it stands
    second.focus()
    page.keyboard.press("Enter")
    test = "document.getElementById('blind').blindTest"
    assert list(page.evaluate(f"{test}.rated").values()) == [50, 50]
    assert page.evaluate(f"{test}.player.version === {test}.order[1]"), (
        "what is rated is what is heard"
    )


def test_silence_and_short_loops_are_not_heard(opened, blind_page):
    page = opened(blind_page)
    ready(page)
    page.click("nav button[data-view=blind]")
    page.click(".start")
    test = "document.getElementById('blind').blindTest"
    page.wait_for_function(f"() => {test}.player.transport")
    page.keyboard.press(" ")
    page.evaluate(f"{test}.player.loop([0.1, 0.3])")
    time.sleep(0.8)
    assert page.evaluate(f"{test}.heard.open") < 0.3
    page.evaluate(f"{test}.player.loop(null).then(() => contextOf({RATE}).suspend())")
    time.sleep(0.8)
    assert page.evaluate(f"{test}.heard.open") < 0.5


def test_the_anchor_is_as_loud_as_the_mixture_below_its_edge(opened, blind_page):
    page = opened(blind_page)
    ready(page)
    found = page.evaluate("""async () => Promise.all(['mixture', 'anchor'].map(async (version) => {
        const audio = document.querySelector(`#excerpt-0 [data-version=${version}] audio`);
        return [...(await decode(audio, 16000)).getChannelData(0)];
    }))""")
    assert 10 * np.log10(
        np.mean(np.square(found[1])) / np.mean(np.square(found[0]))
    ) == pytest.approx(0, abs=0.2)


def test_the_order_is_drawn_anew(opened, blind_page):
    page = opened(blind_page)
    ready(page)
    shown = page.evaluate("""() => Array.from({ length: 12 }, () => {
        const test = document.getElementById('blind').blindTest;
        test.number = 0;
        test.show();
        return test.order.join();
    })""")
    assert len(set(shown)) > 4, "of 120 orders"
    orders = page.evaluate("Array.from({ length: 300 }, () => shuffled([0, 1, 2, 3, 4]))")
    first = np.bincount([order[0] for order in orders], minlength=5)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and first.min() > 30, (
        "each is first about 60 times"
    )


def test_a_name_never_runs(opened, tones):
    page = opened(
        players({NASTY: {NASTY: tones["unet"]}}, RATE, {NASTY: {NASTY: {NASTY: NASTY}}}).data
    )
    frame = next(frame for frame in page.frames if frame.parent_frame)
    frame.wait_for_selector("figure.player[data-ready]")
    assert page.evaluate("window.harmed") is None and frame.evaluate("window.harmed") is None


def test_the_players_run_inside_the_html_report(opened, tone_page, tmp_path):
    (tmp_path / "listening.html").write_text(reencode(tone_page, 0.5), encoding="utf-8")
    page = opened(
        with_players(
            b"<!doctype html><html><body>" + PLAYERS_MARK + b"</body></html>",
            [Run("run", Settings(), tmp_path)],
        ).decode()
    )
    inside = page.frame_locator("iframe")
    inside.locator("figure.player[data-ready]").first.wait_for()
    assert (
        page.locator("iframe").bounding_box()["height"] > 300
        and page.locator("#players").count() == 0
    )
    inside.locator("figure.player button", has_text="Play").first.click()
    frame = page.frames[1]
    for _ in range(
        100
    ):  # the page's own policy forbids the string that wait_for_function would evaluate again and again
        if frame.evaluate(f"{FIRST}.transport.currentTime") > 0.1:
            break
        page.wait_for_timeout(50)
    else:
        pytest.fail("the player in the frame does not play")
