"""Notebooks outside the pipeline: from another folder, broken ones, a clean environment."""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import little_run, notebook_text
from nbclient import NotebookClient

from mss_utils import pipeline
from mss_utils.config import ROOT
from mss_utils.pipeline import NOTEBOOKS, STAGES


@pytest.mark.parametrize("name", STAGES)
def test_notebook_runs_twice_from_another_folder(name, smoke_run, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code[0] = code[0].replace('profile: str = "demo"', 'profile: str = "smoke"')
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (*code, *code)]
    resources = dict(metadata=dict(path=tmp_path))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert not list(tmp_path.iterdir())


BROKEN = {
    "cut in half": (notebook_text("1 + 1")[:200], "Cannot read notebook"),
    "no parameters": (notebook_text("1 + 1").replace('"parameters"', '"other"'), "profile"),
    "syntax error": (notebook_text("for"), "SyntaxError"),
    "long error": (notebook_text("raise ValueError('one\\ntwo\\n' * 300)"), "ValueError: one two"),
    "exit": (notebook_text("import sys; sys.exit(0)", "1 + 1"), "stopped by a cell"),
    "dead kernel": (notebook_text("import os; os._exit(0)"), "kernel"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_notebook_is_a_short_error(kind, tmp_path, monkeypatch):
    run = little_run(tmp_path, monkeypatch)
    content, words = BROKEN[kind]
    (pipeline.NOTEBOOKS / "two.ipynb").write_text(content)
    with pytest.raises((ChildProcessError, ValueError)) as error:
        pipeline.run_pipeline(run)
    text = str(error.value)
    assert words in text and "two" in text and len(text.splitlines()) <= 3, text


def test_colab_setup_keeps_the_installed_torch(tmp_path):
    """torch is installed already; a clone, another working directory, no make."""
    clone, environment = tmp_path / "content" / "clone", tmp_path / "env"
    ignore = shutil.ignore_patterns(".venv", ".cache", "results", ".git", "*.egg-info")
    shutil.copytree(ROOT, clone, ignore=ignore)
    venv.create(environment, with_pip=True)
    site_packages = next(environment.glob("lib/*/site-packages"))
    (site_packages / "google" / "colab").mkdir(parents=True)
    installed = Path(torch.__file__).parents[1]  # has all packages; mss_utils itself is not found
    (site_packages / "colab.pth").write_text(f"{installed}\nimport google.colab\n")
    hidden = ("MSS_", "PYTHONPATH")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    papermill = [environment / "bin" / "python", "-m", "papermill", "-p", "profile", "smoke"]
    files = [clone / "notebooks" / "01_data.ipynb", tmp_path / "out.ipynb"]
    command = [*papermill, "--cwd", clone.parent, *files]
    subprocess.run(command, check=True, cwd=tmp_path, env=variables)
    assert list(site_packages.glob("*mss_utils*")) and not list(site_packages.glob("torch*"))
    assert (clone / "results" / "smoke" / "environment.json").exists()
