"""The committed weights reproduce their scores."""

import os

import pytest

from mss_utils.config import ROOT
from mss_utils.report import typesetting
from mss_utils.report.export import rescore


def test_committed_weights_reproduce_their_scores(tmp_path, monkeypatch):
    data = os.environ.get("MUSDB_PATH")
    if not data:
        pytest.skip("needs MUSDB_PATH: the MUSDB18 excerpts")
    (tmp_path / "reference").symlink_to(ROOT / "results" / "reference")
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    assert typesetting.find_collection("reference")
    table = rescore("reference", data)
    assert len(table) == 5
    assert table["largest_track_db"].max() < 0.05 and table["largest_median_db"].max() < 0.01
