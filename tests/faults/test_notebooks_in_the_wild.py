"""Notebooks as people use them: twice in one kernel, from anywhere, under any kernel, in Colab; and a zoo of broken ones for the runner."""

import os
import shutil
import subprocess
import sys
import venv

import nbformat
import pytest
from conftest import little_run, notebook_text
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from mss_utils import pipeline
from mss_utils.config import ROOT
from mss_utils.pipeline import NOTEBOOKS, STAGES, StageError


@pytest.mark.parametrize("name", STAGES)
def test_a_notebook_runs_twice_in_one_kernel_from_another_folder_under_another_name(
    name, smoke_run, tmp_path, monkeypatch, long_form, count
):
    if not (long_form or name == "02_baseline_unet"):
        pytest.skip("in the long form only: pytest --long")
    write_kernel_spec(tmp_path / "kernels" / "mine", overrides=dict(display_name="Mine"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.metadata.kernelspec = dict(name="mine", display_name="Mine", language="python")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = code[0].source.replace('profile: str = "demo"', 'profile: str = "smoke"')
    twice = [nbformat.v4.new_code_cell(cell.source) for cell in (*code, *code)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    NotebookClient(
        nbformat.v4.new_notebook(cells=twice, metadata=notebook.metadata),
        timeout=600,
        resources=dict(metadata=dict(path=elsewhere)),
    ).execute()
    assert not list(elsewhere.iterdir()), "nothing is written where the kernel happens to be"
    assert all(cell.execution_count for cell in twice)
    count("notebooks run twice")


# --- the zoo ------------------------------------------------------------------------------------------------------------

ZOO = {
    "empty": ("", "is no notebook"),
    "cut in half": (notebook_text("1 + 1")[:200], "is no notebook"),
    "a list": ("[]", "is no notebook"),
    "null": ("null", "is no notebook"),
    "cells are no list": (
        '{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
        "is no notebook",
    ),
    "from the future": (
        '{"cells": [], "metadata": {}, "nbformat": 99, "nbformat_minor": 0}',
        "is no notebook",
    ),
    "without a kernel": (
        notebook_text("1 + 1").replace('"kernelspec"', '"other"'),
        "choose a Python 3 kernel",
    ),
    "without parameters": (
        notebook_text("1 + 1").replace('"parameters"', '"other"'),
        "has no parameter 'profile'",
    ),
    "a syntax error": (notebook_text("for"), "failed in cell 3.\nSyntaxError"),
    "an error of many lines": (
        notebook_text("raise ValueError('one\\ntwo\\n' * 300)"),
        "failed in cell 3.\nValueError: one two one",
    ),
    "an error without words": (
        notebook_text("raise RuntimeError"),
        "failed in cell 3.\nRuntimeError",
    ),
    "an error that cannot be shown": (
        notebook_text(
            "class Shy(Exception):\n    def __str__(self): raise OSError('no')\nraise Shy"
        ),
        "failed in cell 3.",
    ),
    "an end in the middle": (
        notebook_text("import sys; sys.exit(0)", "1 + 1"),
        "stopped after cell 3 of 4",
    ),
    "a question": (
        notebook_text("input('your name? ')"),
        "failed in cell 3.\nStdinNotImplementedError",
    ),
    "an interruption": (
        notebook_text("raise KeyboardInterrupt"),
        "failed in cell 3.\nKeyboardInterrupt",
    ),
    "a kernel that is killed": (
        notebook_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        "its kernel was killed or died",
    ),
    "a kernel that ends": (
        notebook_text("import os; os._exit(0)"),
        "its kernel was killed or died",
    ),
}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A run of two little stages, of which the second is to be replaced; the first has run."""
    with pytest.MonkeyPatch.context() as patch:
        run = little_run(tmp_path_factory.mktemp("zoo"), patch)
        pipeline.run_pipeline(run)
        yield run


@pytest.mark.parametrize("animal", ZOO)
def test_a_broken_notebook_is_told_in_a_few_lines(animal, line, count):
    (pipeline.NOTEBOOKS / "two.ipynb").write_text(ZOO[animal][0])
    with pytest.raises((StageError, ValueError)) as error:
        pipeline.run_pipeline(line)
    text = str(error.value)
    assert ZOO[animal][1] in text and "two" in text and len(text.splitlines()) <= 3, text
    assert not list(line.folder.rglob(".part-*"))
    count("broken notebooks")


def test_the_run_goes_on_when_the_notebook_is_mended_and_an_executed_copy_in_any_state_is_made_anew(
    line, count
):
    (pipeline.NOTEBOOKS / "two.ipynb").write_text(notebook_text("2 + 2"))
    copy, key = line.folder / "notebooks" / "two.ipynb", pipeline.stage_key(line, "two")
    for left in ("", "[]", "{}", '{"cells": [', "\udcff"):
        copy.write_bytes(os.fsencode(left))
        assert not pipeline.is_finished(line, "two", key)
        count("broken notebooks")
    pipeline.run_pipeline(line)
    assert pipeline.is_finished(line, "two", key)
    assert (line.folder / "one.txt").read_text() == "ran ", "what was finished is not repeated"


def test_a_kernel_of_the_same_name_that_is_another_python_is_not_taken(tmp_path, monkeypatch):
    """A `python3` in the user's own Jupyter folder goes before the one of this environment."""
    write_kernel_spec(
        tmp_path / "jupyter" / "kernels" / "python3", overrides=dict(argv=["/bin/false"])
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    run = little_run(tmp_path, monkeypatch)
    (pipeline.NOTEBOOKS / "two.ipynb").write_text(
        notebook_text(f"import sys; assert sys.executable == {sys.executable!r}")
    )
    pipeline.run_pipeline(run)


# --- Colab --------------------------------------------------------------------------------------------------------------


def test_in_a_clean_environment_with_torch_the_set_up_cell_installs_the_rest_and_jupyter_runs_it(
    tmp_path, long_form, count
):
    """As in Colab: torch is there, and stays; a clone, another working directory, no make; then plain `jupyter execute`."""
    if not long_form:
        pytest.skip("in the long form only, it installs some gigabytes: pytest --long")
    clone, place = tmp_path / "content" / "clone", tmp_path / "env"
    shutil.copytree(
        ROOT,
        clone,
        ignore=shutil.ignore_patterns(".venv", ".cache", "results", ".git", "*.egg-info"),
    )
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    )
    there = [
        f"{name}=={pins[name]}"
        for name in ("torch", "torchaudio", "ipykernel", "nbclient", "numpy")
    ]
    subprocess.run([python, "-m", "pip", "install", "-q", *there], check=True)
    package = next(place.glob("lib/*/site-packages/torch/__init__.py"))
    stamp = package.stat().st_mtime_ns
    fake = next(place.glob("lib/*/site-packages")) / "google" / "colab"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    script = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
code = [cell for cell in notebook.cells if cell.cell_type == "code"]
code[0].source = "import google.colab\\n" + code[0].source.replace('"demo"', '"smoke"')
NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=dict(metadata=dict(path=sys.argv[2]))).execute()
"""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MSS_", "PYTHONPATH"))
    } | dict(PATH=f"{place / 'bin'}:{os.environ['PATH']}")
    subprocess.run(
        [python, "-c", script, clone / "notebooks" / "01_data.ipynb", clone.parent],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert package.stat().st_mtime_ns == stamp, "Colab's torch stays"
    assert (clone / "results" / "smoke" / "environment.json").exists()
    executed = tmp_path / "02.ipynb"
    shutil.copy(clone / "notebooks" / "02_baseline_unet.ipynb", executed)
    executed.write_text(
        executed.read_text().replace('profile: str = \\"demo\\"', 'profile: str = \\"smoke\\"')
    )
    subprocess.run(
        [place / "bin" / "jupyter", "execute", executed], check=True, cwd=tmp_path, env=environment
    )
    assert (
        clone / "results" / "smoke" / "models" / "piano" / "unet" / "seed0" / "model.json"
    ).exists()
    count("clean environments")
