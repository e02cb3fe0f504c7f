import pytest

from mss_utils import config
from mss_utils.config import PROFILES, ROOT, create_or_load_run, load_run, resolve_settings
from mss_utils.files import write_text


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_resolves(profile):
    settings = resolve_settings(profile)
    assert settings.profile == profile
    assert settings.stage2_step <= settings.stage3_step < settings.steps


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("steps=many", "'steps' of profile demo is 'many'"),
        ("steps", "key=value, not 'steps'"),
        ("sample_rate=48000", "sample_rate.*16000"),
        ("segment_s=nan", "finite"),
        ("groups=synth+fx->../out", "a group is written"),
        ("demucs_strides=4,3", "was removed"),
        ("demucs_heads=3", "does not divide .*256"),
        ("segment_s=0.1 demucs_filter_ms=101", "shorter than demucs_filter_ms"),
        ("demucs_filter_ms=0.1", "shorter than two samples"),
    ],
)
def test_wrong_setting_is_one_sentence(overrides, words):
    with pytest.raises(ValueError, match=words) as error:
        resolve_settings(overrides=overrides)
    assert "\n" not in str(error.value)


def test_stored_settings_take_precedence(results):
    text = ["steps=20", "swap_channels=no", "groups=synth + fx -> other, my snare->drums"]
    run = create_or_load_run("smoke", "mine", overrides=text)
    assert run.settings.groups == {"other": ("synth", "fx"), "drums": ("my snare",)}
    assert not list(results.iterdir())  # nothing is written yet
    run.write_settings()
    assert create_or_load_run("smoke", "mine") == load_run("mine") == run
    assert create_or_load_run("smoke", "mine", overrides=text) == run
    with pytest.raises(ValueError, match="steps=20.*30.*another run name"):
        create_or_load_run("smoke", "mine", overrides="steps=30")
    with pytest.raises(ValueError, match="profile='smoke'.*'demo'"):
        create_or_load_run("demo", "mine")
    with pytest.raises(FileNotFoundError, match="No run 'other'.*mine"):
        load_run("other")


def test_old_and_damaged_settings_files(results):
    write_text(
        results / "old" / "settings.json",
        '{"profile": "smoke", "referee_tracks": 5, "attention_heads": 8}',
    )
    assert load_run("old").settings.cross_check_tracks == 5
    for content, words in (('{"gone": 1}', "Unknown setting 'gone'"), ("[1", "json is damaged")):
        write_text(results / "old" / "settings.json", content)
        with pytest.raises(ValueError, match=words):
            load_run("old")


def test_run_name_stays_in_the_results_and_is_no_collection():
    create_or_load_run("smoke", "both/first").write_settings()
    assert [run.name for run in config.collection_runs("both")] == ["both/first"]
    for name, words in (("../out", "run name"), ("a/../../b", "run name"), ("both", "collection")):
        with pytest.raises(ValueError, match=words):
            create_or_load_run("smoke", name)


def test_paths_are_relative_to_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSS_CACHE", "some/cache")
    monkeypatch.delenv("MSS_RESULTS")
    assert config.cache_folder() == ROOT / "some" / "cache"
    assert config.results_folder() == ROOT / "results"
