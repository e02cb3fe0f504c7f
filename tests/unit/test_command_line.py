import re

import pytest

from mss_utils.__main__ import format_error, main

RUN = ("run", "--profile", "smoke", "--run", "x")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "--profile", "dmeo"], "'dmeo'; there are: smoke, demo, musdb7, musdb18"),
        ([*RUN, "--target", "piano,violin"], "No stem 'violin'.*piano"),
        ([*RUN, "--set", "stepz=1"], "Unknown setting 'stepz'.*batch_size"),
        ([*RUN, "--data", "no/such/folder"], "no/such/folder"),
        (["run", "--profile", "musdb18", "--run", "x"], "MUSDB_PATH"),
        (["train", "--profile", "smoke", "--seed", "3"], "has seeds 0 to 0"),
        (["check", "--data", "no/such/folder"], "dataset: a run would stop"),
        (["report", "--run", "nothing"], "No run 'nothing'"),
        (["export", "--run", "full", "--to", "../x"], "."),
        (["separate", "no.wav", "--model", "nowhere"], "No model.json in nowhere.*seed0"),
    ],
)
def test_mistake_is_one_sentence(arguments, words, own_folders, monkeypatch, capsys):
    monkeypatch.setenv("MUSDB_PATH", "")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and re.search(words, error), error
    assert not (own_folders / "results" / "x").exists()


def test_error_of_the_operating_system_becomes_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        (tmp_path / "gone").read_text()
    assert "Cannot open" in format_error(error.value)
    assert "out-of-memory" in format_error(MemoryError())
