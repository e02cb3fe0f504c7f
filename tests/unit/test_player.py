import base64
import io
import re
from html import unescape

import numpy as np
import pytest
import soundfile
from test_excerpts import RATE, make_versions

from mss_utils.data import level_db
from mss_utils.listening import players, reencode
from mss_utils.listening.player import SOUND, common_gain, encode_mp3, mp3_rate


def decode_sounds(page):
    """Every mp3 of a page, `(samples, channels)`."""
    mp3s = map(base64.b64decode, re.findall(SOUND + "([A-Za-z0-9+/=]+)", page))
    return [soundfile.read(io.BytesIO(mp3), always_2d=True)[0] for mp3 in mp3s]


def test_versions_of_a_player_share_one_gain():
    versions = make_versions()
    page = players({"player": versions}, RATE).data
    for sounds in (decode_sounds(page), decode_sounds(reencode(page, 0.5))):
        pairs = zip(sounds, versions.values(), strict=True)
        gains = [level_db(sound) - level_db(audio) for sound, audio in pairs]
        assert np.ptp(gains) < 0.2
    assert common_gain({"mixture": np.zeros((1, 10))}) == 1.0


@pytest.mark.parametrize("rate, channels", [(16000, 1), (44100, 2), (96000, 2), (44100, 6)])
def test_any_rate_and_channels_become_small_mp3(rate, channels):
    noise = 0.2 * np.random.default_rng(0).standard_normal((channels, 10 * rate))
    mp3 = encode_mp3(noise, rate)
    audio, new_rate = soundfile.read(io.BytesIO(mp3), always_2d=True)
    assert len(mp3) <= 300_000 and new_rate == mp3_rate(rate)
    assert audio.shape == (10 * new_rate, 1 if channels in (1, 6) else 2)


def test_player_escapes_names_and_loads_nothing():
    name = "<script>alert('x')</script> & \"y\""
    frame = players({name: {name: make_versions()["unet"]}}, RATE, {name: {name: {name: 1.0}}})
    page = unescape(re.search('srcdoc="([^"]*)"', frame.data)[1])
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert page.count('<audio controls preload="none"') == 1  # plays without scripts, too
