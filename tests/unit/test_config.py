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
        ("stepz=3", "Unknown setting 'stepz'; there are: .*batch_size"),
        ("steps=many", "'steps' of profile demo is 'many'"),
        ("steps", "key=value, not 'steps'"),
        ("steps=0", "greater than or equal to 1"),
        ("sample_rate=48000", "sample_rate.*16000"),
        ("segment_s=nan", "finite"),
        ("groups=synth+fx", "a group is written"),
        ("groups=synth+->other", "a group is written"),
        ("groups=synth+fx->../out", "cannot be called '../out'"),
        ("groups=synth+fx->all", "cannot be called 'all'"),
        ("demucs_strides=4,3", "not all even"),
        ("demucs_max_channels=128", "below demucs_channels"),
        ("attention_heads=3", "does not divide 256"),
        ("hop=2000", "above half of n_fft"),
        ("n_fft=1100", "no multiple of 64"),
        ("segment_s=0.1 demucs_strides=64,64", "shorter than one step"),
        ("song_min_s=100", "above song_max_s"),
    ],
)
def test_wrong_setting_is_one_sentence(overrides, words):
    with pytest.raises(ValueError, match=words) as error:
        resolve_settings(overrides=overrides)
    assert "\n" not in str(error.value)


def test_unknown_profile_lists_profiles():
    with pytest.raises(ValueError, match="'dmeo'.*smoke, demo, musdb7, musdb18"):
        resolve_settings("dmeo")


def test_stored_settings_take_precedence(results):
    run = create_or_load_run("smoke", "mine", overrides="steps=20 demucs_strides=4,4,2,2")
    assert not list(results.iterdir())  # nothing is written yet
    run.write_settings()
    again = create_or_load_run("smoke", "mine")
    assert again.settings == run.settings and again.settings.steps == 20
    assert create_or_load_run("smoke", "mine", overrides="steps=20") == again
    assert load_run("mine") == again


def test_contradiction_is_an_error(results):
    create_or_load_run("smoke", "mine", overrides="steps=20").write_settings()
    with pytest.raises(ValueError, match="steps=20.*30.*another run name"):
        create_or_load_run("smoke", "mine", overrides="steps=30")
    with pytest.raises(ValueError, match="profile='smoke'.*'demo'"):
        create_or_load_run("demo", "mine")


def test_groups_are_parsed_and_stored():
    text = ["groups=synth + fx -> other, kick+my snare->drums"]
    run = create_or_load_run("smoke", "mine", overrides=text)
    assert run.settings.groups == {"other": ("synth", "fx"), "drums": ("kick", "my snare")}
    run.write_settings()
    assert create_or_load_run("smoke", "mine", overrides=text).settings == run.settings


def test_damaged_settings_file_is_named(results):
    write_text(results / "old" / "settings.json", '{"profile": "smoke", "gone": 1}')
    with pytest.raises(ValueError, match="gone"):
        create_or_load_run("smoke", "old")
    write_text(results / "old" / "settings.json", "[1")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        load_run("old")


def test_renamed_setting_is_still_read(results):
    write_text(results / "old" / "settings.json", '{"profile": "smoke", "referee_tracks": 5}')
    assert load_run("old").settings.cross_check_tracks == 5


@pytest.mark.parametrize("name", ["../elsewhere", ".", "a/../../b"])
def test_run_name_stays_in_the_results(name):
    with pytest.raises(ValueError, match="run name"):
        create_or_load_run("smoke", name)


def test_missing_run_lists_runs():
    create_or_load_run("smoke", "mine").write_settings()
    with pytest.raises(FileNotFoundError, match="No run 'other'.*mine"):
        load_run("other")


def test_collection_is_not_a_run():
    create_or_load_run("smoke", "both/first").write_settings()
    assert [run.name for run in config.collection_runs("both")] == ["both/first"]
    with pytest.raises(ValueError, match="is a collection"):
        create_or_load_run("smoke", "both")


def test_paths_are_relative_to_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSS_CACHE", "some/cache")
    monkeypatch.delenv("MSS_RESULTS")
    assert config.cache_folder() == ROOT / "some" / "cache"
    assert config.results_folder() == ROOT / "results"
