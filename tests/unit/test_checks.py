from types import SimpleNamespace

import pytest
import torch

from mss_utils import checks
from mss_utils.checks import FINE, STOP, WARNING, requirements
from mss_utils.config import resolve_settings


def find(name, settings=None):
    """The requirement of that name."""
    findings = requirements(settings or resolve_settings("smoke"))
    return next(finding for finding in findings if finding.name == name)


def test_every_finding_that_is_not_fine_has_a_remedy():
    findings = list(requirements(resolve_settings("smoke")))
    assert len(findings) == 8
    for finding in findings:
        assert finding.found and bool(finding.remedy) == (finding.state != FINE), finding


@pytest.mark.parametrize("need, state", [("no-such-package", STOP), ("numpy>=9999", WARNING)])
def test_missing_package_stops_and_old_one_warns(need, state, monkeypatch):
    monkeypatch.setattr(checks, "requires", lambda _: [need, "numpy", 'x; extra == "dev"'])
    finding = find("packages")
    assert finding.state == state and finding.found.startswith(f"{need} (")


def test_little_memory_and_disk_warn(monkeypatch):
    little = SimpleNamespace(available=2**30, free=2**30)
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: little)
    monkeypatch.setenv("MSS_RESULTS", "/proc/nowhere")
    assert find("memory").state == WARNING
    assert "MSS_CACHE" in find("disk for songs and stems").remedy
    assert find("disk for results").state == STOP


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_stops():
    finding = find("device", resolve_settings("smoke", overrides="device=cuda"))
    assert finding.state == STOP and "device=auto" in finding.remedy


def test_ffmpeg_is_needed_for_stem_files_only(monkeypatch, tmp_path):
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find("ffmpeg").state == WARNING
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.stem.mp4").touch()
    for data in (str(tmp_path), ""):
        assert find("ffmpeg", resolve_settings("musdb7", data=data)).state == STOP
