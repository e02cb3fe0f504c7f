import json

import pytest

from mss_utils.config import (
    PROFILES,
    ROOT,
    cache_folder,
    create_or_load_run,
    resolve_settings,
    results_folder,
)
from mss_utils.files import write_text


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_resolves(profile):
    settings = resolve_settings(profile)
    assert settings.profile == profile
    assert settings.stage2_step <= settings.stage3_step < settings.steps


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(profile="dmeo"), ["dmeo", "smoke", "demo", "musdb7", "musdb18"]),
        (dict(overrides="stepz=3"), ["stepz", "steps", "batch_size"]),
        (dict(overrides="steps=many"), ["steps", "many"]),
        (dict(overrides="steps"), ["key=value", "steps"]),
        (dict(overrides="sample_rate=48000"), ["sample_rate", "16000"]),
        (dict(overrides="steps=0"), ["steps", "greater than or equal to 1"]),
        (
            dict(overrides="groups=synth+fx"),
            ["groups", "a group is written stem+stem->name, not 'synth+fx'"],
        ),
        (dict(overrides="groups=synth+->other"), ["groups", "stem+stem->name"]),
        (dict(overrides="groups=synth+fx->../out"), ["groups", "cannot be called '../out'"]),
        (dict(overrides="groups=synth+fx->all"), ["groups", "cannot be called 'all'"]),
        (dict(overrides="segment_s=nan"), ["segment_s", "finite"]),
        (dict(overrides="demucs_strides=4,3"), ["demucs_strides are not all even"]),
        (
            dict(overrides="demucs_channels=255 attention_heads=5 demucs_max_channels=255"),
            ["demucs_channels is no multiple of 2"],
        ),
        (
            dict(overrides="demucs_max_channels=128"),
            ["demucs_max_channels is below demucs_channels"],
        ),
        (dict(overrides="attention_heads=3"), ["attention_heads does not divide 256"]),
        (dict(overrides="hop=2000"), ["hop is above half of n_fft"]),
        (dict(overrides="n_fft=1100"), ["n_fft is no multiple of 64"]),
        (
            dict(overrides="segment_s=0.1 demucs_strides=64,64"),
            ["segment_s=0.1 is shorter than one step"],
        ),
        (dict(overrides="song_min_s=100"), ["song_min_s is above song_max_s"]),
    ],
)
def test_a_wrong_setting_is_one_sentence(arguments, words):
    with pytest.raises(ValueError) as error:
        resolve_settings(**arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_stored_settings_win_and_contradictions_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    run = create_or_load_run("smoke", "mine", overrides="steps=20 demucs_strides=4,4,2,2")
    assert not list(tmp_path.iterdir()), "opening a run writes nothing"
    run.write_settings()
    again = create_or_load_run("smoke", "mine")
    assert (
        again.settings == run.settings
        and again.settings.steps == 20
        and again.settings.demucs_strides == (4, 4, 2, 2)
    )
    assert create_or_load_run("smoke", "mine", overrides="steps=20") == again
    with pytest.raises(ValueError, match="steps=20.*30.*another run name"):
        create_or_load_run("smoke", "mine", overrides="steps=30")
    with pytest.raises(ValueError, match="profile='smoke'.*'demo'"):
        create_or_load_run("demo", "mine")


def test_stem_groups_are_read_stored_and_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    text = ["groups=synth + fx -> other, kick+my snare->drums"]
    run = create_or_load_run("smoke", "mine", overrides=text)
    assert run.settings.groups == {"other": ("synth", "fx"), "drums": ("kick", "my snare")}
    run.write_settings()
    assert (
        create_or_load_run("smoke", "mine").settings
        == run.settings
        == create_or_load_run("smoke", "mine", overrides=text).settings
    )
    with pytest.raises(ValueError, match="groups=.*this call asks for"):
        create_or_load_run("smoke", "mine", overrides="groups=synth+fx->rest")


def test_a_damaged_settings_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    write_text(tmp_path / "old" / "settings.json", json.dumps({"profile": "smoke", "gone": 1}))
    with pytest.raises(ValueError, match="gone"):
        create_or_load_run("smoke", "old")


def test_a_run_name_cannot_leave_the_results():
    with pytest.raises(ValueError, match="run name"):
        create_or_load_run("smoke", "../elsewhere")


def test_paths_are_relative_to_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSS_CACHE", "some/cache")
    monkeypatch.delenv("MSS_RESULTS")
    assert cache_folder() == ROOT / "some" / "cache"
    assert results_folder() == ROOT / "results"
