"""Notebooks outside the pipeline: from another folder, broken ones, a clean environment."""

import os
import shutil
import subprocess
import venv

import nbformat
import pytest
from conftest import little_run, notebook_text
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from mss_utils import pipeline
from mss_utils.config import ROOT
from mss_utils.pipeline import NOTEBOOKS

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_twice_from_another_folder(name, smoke_run, tmp_path, monkeypatch):
    write_kernel_spec(tmp_path / "kernels" / "mine", overrides=dict(display_name="Mine"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.metadata.kernelspec = dict(name="mine", display_name="Mine", language="python")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = code[0].source.replace('profile: str = "demo"', 'profile: str = "smoke"')
    cells = [nbformat.v4.new_code_cell(cell.source) for cell in (*code, *code)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    resources = dict(metadata=dict(path=folder))
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert not list(folder.iterdir())
    assert all(cell.execution_count for cell in cells)


BROKEN = {
    "empty": ("", "Cannot read notebook"),
    "cut in half": (notebook_text("1 + 1")[:200], "Cannot read notebook"),
    "a list": ("[]", "Cannot read notebook"),
    "no parameters": (notebook_text("1 + 1").replace('"parameters"', '"other"'), "profile"),
    "syntax error": (notebook_text("for"), "SyntaxError"),
    "long error": (notebook_text("raise ValueError('one\\ntwo\\n' * 300)"), "ValueError: one two"),
    "exit": (notebook_text("import sys; sys.exit(0)", "1 + 1"), "stopped by a cell"),
    "input": (notebook_text("input('your name? ')"), "StdinNotImplementedError"),
    "dead kernel": (notebook_text("import os; os._exit(0)"), "kernel"),
}


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A finished run of two small notebooks; tests replace the second one."""
    with pytest.MonkeyPatch.context() as patch:
        run = little_run(tmp_path_factory.mktemp("broken"), patch)
        pipeline.run_pipeline(run)
        yield run


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_notebook_is_a_short_error(kind, two_stages):
    content, words = BROKEN[kind]
    (pipeline.NOTEBOOKS / "two.ipynb").write_text(content)
    with pytest.raises((ChildProcessError, ValueError)) as error:
        pipeline.run_pipeline(two_stages)
    text = str(error.value)
    assert words in text and "two" in text and len(text.splitlines()) <= 3, text


def test_run_continues_once_the_notebook_is_fixed(two_stages):
    (pipeline.NOTEBOOKS / "two.ipynb").write_text(notebook_text("2 + 2"))
    pipeline.run_pipeline(two_stages)
    assert (two_stages.folder / "one.txt").read_text() == "ran "  # the first stage ran once


RUN_NOTEBOOK = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
code = [cell for cell in notebook.cells if cell.cell_type == "code"]
code[0].source = "import google.colab\\n" + code[0].source.replace('"demo"', '"smoke"')
resources = dict(metadata=dict(path=sys.argv[2]))
NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
"""


def test_colab_setup_keeps_the_installed_torch(tmp_path):
    """torch is installed already; a clone, another working directory, no make."""
    clone, environment = tmp_path / "content" / "clone", tmp_path / "env"
    ignore = shutil.ignore_patterns(".venv", ".cache", "results", ".git", "*.egg-info")
    shutil.copytree(ROOT, clone, ignore=ignore)
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    wanted = ("torch", "torchaudio", "ipykernel", "nbclient", "numpy")
    pins = [line for line in lines if line.partition("==")[0] in wanted]
    subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True)
    site_packages = next(environment.glob("lib/*/site-packages"))
    (site_packages / "google" / "colab").mkdir(parents=True)
    (site_packages / "google" / "colab" / "__init__.py").touch()
    torch_file = site_packages / "torch" / "__init__.py"
    before = torch_file.stat().st_mtime_ns
    hidden = ("MSS_", "PYTHONPATH")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    variables["PATH"] = f"{environment / 'bin'}:{os.environ['PATH']}"
    arguments = [clone / "notebooks" / "01_data.ipynb", clone.parent]
    command = [python, "-c", RUN_NOTEBOOK, *arguments]
    subprocess.run(command, check=True, cwd=tmp_path, env=variables)
    assert torch_file.stat().st_mtime_ns == before
    assert (clone / "results" / "smoke" / "environment.json").exists()
