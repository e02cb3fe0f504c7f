import os

import pytest

from mss_utils.config import ROOT
from mss_utils.report.export import rescore


@pytest.mark.skipif("MUSDB_PATH" not in os.environ, reason="needs the MUSDB18 excerpts")
def test_committed_weights_reproduce_their_scores(tmp_path, monkeypatch):
    (tmp_path / "reference").symlink_to(ROOT / "results" / "reference")
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    table = rescore("reference", os.environ["MUSDB_PATH"])
    assert len(table) == 6
    assert table["largest_track_db"].max() < 0.05 and table["largest_median_db"].max() < 0.01
