"""The report of the smoke run and of the committed collection, as PDF and as HTML page."""

import base64
import html
import re
import shutil
import subprocess

import pytest

from mss_utils.config import MODELS, ROOT, collection_runs, create_or_load_run
from mss_utils.report import build_report, write_report
from mss_utils.report.export import export, kept_weights
from mss_utils.report.typesetting import find_collection

REFERENCE = ROOT / "results" / "reference"


def pdf_text(path):
    if not shutil.which("pdftotext"):
        pytest.skip("needs pdftotext (poppler-utils)")
    done = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, text=True)
    return done.stdout


def words(text):
    """Words and numbers; words hyphenated at a line end are joined."""
    text = re.sub(r"-\s*\n\s*", "", text)
    return set(re.findall(r"[A-Za-z]{5,}|\d+\.\d+", text))


def html_text(page):
    """Text of a page and of the diagrams embedded in it."""
    for svg in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        page += base64.b64decode(svg).decode()
    page = re.sub(r"<(style|script|iframe).*?</\1>", " ", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """PDF and HTML page of a copy of the committed collection."""
    root = tmp_path_factory.mktemp("results")
    ignore = shutil.ignore_patterns("*.safetensors", "notebooks", "facts.json")
    shutil.copytree(REFERENCE, root / "copy", ignore=ignore)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(root))
        return write_report("copy")


def test_page_has_every_caption_number_and_table_of_the_pdf(collection):
    pdf, page = collection
    text = html_text(page.read_text())
    missing = words(pdf_text(pdf)) - words(text)
    missing = {word for word in missing if not re.search(word, re.sub(r"[\s-]", "", text))}
    assert not missing, sorted(missing)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text(), flags=re.S)
    assert len(captions) > 15
    assert all(len(html_text(caption).split()) > 6 for caption in captions)


def test_page_makes_no_requests(collection):
    page = re.sub(r"<iframe.*?</iframe>", "", collection[1].read_text(), flags=re.S)
    assert not re.findall(r"<(?:img|script|link)[^>]+(?:src|href)=\"http", page)


def test_committed_report_is_that_of_the_committed_tables(collection):
    fresh, committed = pdf_text(collection[0]), pdf_text(ROOT / "report" / "report.pdf")
    assert words(fresh) ^ words(committed) <= {"reference"}


def test_committed_collection_is_small_and_has_no_machine_paths():
    files = [path for path in REFERENCE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50e6
    assert not [path for path in files if path.suffix in (".wav", ".mp3", ".ckpt")]
    for path in files:
        if path.suffix in (".json", ".csv", ".ipynb", ".txt"):
            assert not re.search(r"/(home|root|work|tmp)/", path.read_text()), path


def test_report_of_a_run(smoke_run):
    pdf = build_report(create_or_load_run("smoke"))
    text = pdf_text(pdf)
    assert "Separating one instrument from a mixture" in text and "piano" in text
    assert "Settings of the run" in text and "Nobody has taken the blind test yet" in text


def test_unfinished_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    run = create_or_load_run("smoke", "begun")
    run.write_settings()
    with pytest.raises(FileNotFoundError, match="environment.json: finish the run first"):
        build_report(run)
    with pytest.raises(ValueError, match="No collection 'nothing'"):
        find_collection("nothing")


@pytest.fixture
def full(smoke_run, tmp_path, monkeypatch):
    """A collection `full` with one finished run, which counts as no study."""
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    folder = tmp_path / "full" / "songs"
    shutil.copytree(smoke_run[1], folder, ignore=shutil.ignore_patterns("ablations", "data_study"))
    settings = folder / "settings.json"
    text = re.sub(r'"ablations": \[[^]]*\]', '"ablations": []', settings.read_text())
    settings.write_text(text.replace('"data_study": true', '"data_study": false'))
    return tmp_path


def test_export_is_small_and_keeps_answers(full):
    folder = export("full", "copy", complete=["piano"])
    (folder / "songs" / "answers").mkdir()
    (folder / "songs" / "answers" / "ada.json").write_text("{}")
    export("full", "copy")
    assert (folder / "songs" / "answers" / "ada.json").exists()
    assert not list(folder.rglob("*.wav")) and not list(folder.rglob("last.ckpt"))
    assert len(list(folder.rglob("model.safetensors"))) == 1
    assert (folder / "songs" / "listening.html").exists()
    assert not list(full.glob(".part-*"))
    (folder / "songs" / "answers" / "ada.json").unlink()
    assert all(path.exists() for path in write_report("copy"))


def test_export_refuses_wrong_names(full):
    with pytest.raises(ValueError, match="no collection"):
        (full / "other").mkdir()
        export("full", "other")
    with pytest.raises(ValueError, match="the source"):
        export("full", "full")
    with pytest.raises(ValueError, match="target 'guitar'; use piano"):
        export("full", "copy", complete=["guitar"])


def test_export_keeps_the_best_weights_of_each_target(full):
    runs = collection_runs("full")
    assert len(kept_weights(runs)) == 1 and len(kept_weights(runs, ["piano"])) == len(MODELS)
