"""What a run needs of a machine: each requirement says what was found, and how to mend it where it is not fine."""

import collections
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import command, write_dataset

from mss_utils import environment
from mss_utils.__main__ import main
from mss_utils.config import resolve_settings
from mss_utils.environment import FINE, STOP, WARNING, requirements

NAMES = [
    "Python",
    "packages",
    "device",
    "memory",
    "disk for results",
    "may write results",
    "disk for songs and stems",
    "may write songs and stems",
    "ffmpeg",
    "dataset",
]


def found(settings=None):
    return {need.name: need for need in requirements(settings or resolve_settings("smoke"))}


def test_a_machine_that_has_everything_is_fine(museval):
    needs = found()
    assert list(needs) == NAMES
    assert {need.state for need in needs.values()} <= {FINE, WARNING} and not any(
        need.mend for need in needs.values() if need.state == FINE
    )


def _old_python(patch, _):
    patch.setattr(environment.sys, "version_info", (3, 9))


def _missing_package(patch, folder):
    (folder / "requirements.txt").write_text(
        "torch>=99  # from the future\nno-such-package\nnumpy\n-e .\n"
    )
    patch.setattr(environment, "ROOT", folder)


def _missing_test_package(patch, folder):
    (folder / "requirements.txt").write_text("hypothesis>=9999\nnumpy>=9999\n")
    patch.setattr(environment, "ROOT", folder)


def _little_memory(patch, _):
    patch.setattr(environment.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))


def _little_disk(patch, _):
    patch.setattr(
        environment.shutil, "disk_usage", lambda _: collections.namedtuple("usage", "free")(2**30)
    )


LACKING = {
    "Python": (_old_python, {}, STOP, "install Python 3.11"),
    "packages": (_missing_package, {}, STOP, "pip install -r requirements.txt"),
    "memory": (_little_memory, {}, WARNING, "batch_size lower"),
    "disk for results": (_little_disk, {}, WARNING, "MSS_RESULTS"),
    "disk for songs and stems": (_little_disk, {}, WARNING, "MSS_CACHE"),
    "may write results": (
        lambda patch, _: patch.setenv("MSS_RESULTS", "/proc/nowhere"),
        {},
        STOP,
        "MSS_RESULTS",
    ),
    "may write songs and stems": (
        lambda patch, _: patch.setenv("MSS_CACHE", "/proc/nowhere"),
        {},
        STOP,
        "MSS_CACHE",
    ),
    "ffmpeg": (
        lambda patch, folder: patch.setenv("PATH", str(folder)),
        {},
        WARNING,
        "apt-get install ffmpeg",
    ),
    "dataset": (lambda *_: None, dict(data="no/such/folder"), STOP, "--data"),
}


def test_what_only_tests_need_and_what_is_merely_old_stops_nothing(monkeypatch, tmp_path):
    _missing_test_package(monkeypatch, tmp_path)
    need = found()["packages"]
    assert (
        need.state == WARNING
        and "hypothesis>=9999 (" in need.found
        and "numpy>=9999 (" in need.found
    )


def test_nothing_is_rendered_to_be_looked_at(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("mss_utils.demo.render_songs", lambda *_, **__: pytest.fail("rendered"))
    assert found()["ffmpeg"].state == WARNING


def test_nothing_is_fetched_to_be_looked_at(monkeypatch, tmp_path):
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        "mss_utils.data.sources._download_excerpts", lambda root: pytest.fail("fetched")
    )
    needs = found(resolve_settings("musdb7"))
    assert needs["ffmpeg"].state == STOP and "which musdb fetches" in needs["dataset"].found


@pytest.mark.parametrize("name", LACKING)
def test_what_is_lacking_is_told_with_how_to_mend_it(name, monkeypatch, tmp_path):
    strike, settings, state, mend = LACKING[name]
    strike(monkeypatch, tmp_path)
    need = found(resolve_settings("smoke", **settings))[name]
    assert need.state == state and mend in need.mend and need.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_stops_a_run():
    need = found(resolve_settings("smoke", overrides="device=cuda"))["device"]
    assert need.state == STOP and "device=auto" in need.mend
    assert found(resolve_settings("musdb18", data="x"))["device"].state == WARNING


def test_stem_files_need_ffmpeg(monkeypatch, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(2):
            (tmp_path / split / f"{number}.stem.mp4").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(resolve_settings("musdb7", data=str(tmp_path)))["ffmpeg"].state == STOP


def test_check_says_all_of_it_and_stops_only_for_what_would_stop_a_run(tmp_path, capsys):
    root = write_dataset(tmp_path / "data", 3, 1, 2, seconds=0.6)
    assert main(["check", "--data", str(root), "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["requirements"]
    assert [need["name"] for need in needs] == NAMES and set(needs[0]) == {
        "name",
        "found",
        "state",
        "mend",
    }
    assert main(["check", "--data", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert all(name in printed.out for name in NAMES) and "-> pass --data DIR" in printed.out
    assert (
        printed.err
        == "mss_utils check: dataset would stop a run; how to mend that is told with each.\n"
    )
    assert main(["check", "--data", str(tmp_path / "none"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["requirements"][-1]["state"] == "stop"


def test_a_package_that_is_missing_is_one_sentence(tmp_path):
    """Python finds an empty module in the place of the real one, and so nothing in it."""
    (tmp_path / "pydantic.py").touch()
    done = command("check", PYTHONPATH=str(tmp_path))
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and "pip install -r requirements.txt" in done.stderr
    )
    assert sys.version_info >= environment.MIN_PYTHON
