"""Tests of the metadata that PyPI shows for a release, and that all files give the same version."""

from __future__ import annotations

import re
import subprocess
import sys
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import grokadamw

ROOT = Path(__file__).parent.parent
ADDRESS = "https://example.org/someone/grokadamw"
RELATIVE = re.compile(r"\]\((?!https?:|#)")


def copy_of_the_source(folder: Path) -> Path:
    """Copy the files of an sdist to this folder, because a build leaves its objects in the folder where it runs."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith("grokadamw/") or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def metadata(source: Path, address: str) -> Message:
    """Return the metadata that a build of the source writes if the owner has filled in this address."""
    pytest.importorskip("setuptools", minversion="77")
    setup = (source / "setup.py").read_text()
    (source / "setup.py").write_text(re.sub(r'^REPOSITORY = ".*"$', f'REPOSITORY = "{address}"', setup, flags=re.M))
    (source / "build").mkdir()
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('build')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (written,) = (source / "build").glob("*.dist-info/METADATA")
    return message_from_string(written.read_text(encoding="utf-8"))


def without_links(text: str) -> str:
    return re.sub(r"!?\[([^\]]*)\]\([^)]+\)", r"\1", text)


def test_the_readme_on_pypi_has_absolute_links(tmp_path: Path) -> None:
    told = metadata(copy_of_the_source(tmp_path), ADDRESS)
    assert told["Version"] == grokadamw.__version__
    urls = dict(url.split(", ") for url in told.get_all("Project-URL", []))
    assert urls["Repository"] == ADDRESS
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}

    page, readme = told.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert isinstance(page, str)
    assert without_links(page).strip() == without_links(readme).strip()
    assert RELATIVE.search(readme)
    assert not RELATIVE.search(page)
    version = re.escape(f"v{grokadamw.__version__}")
    targets = re.findall(rf"{re.escape(ADDRESS)}/(?:blob|raw)/{version}/([^)#]+)", page + urls["Changelog"])
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).is_file()] == []

    renderer = pytest.importorskip("readme_renderer.markdown", exc_type=ImportError)  # PyPI's renderer
    html = renderer.render(page)
    assert f'src="{ADDRESS}/raw/v{grokadamw.__version__}/benchmarks/results/mul97.png"' in html
    assert not re.findall(r'(?:src|href)="(?!https?://|#)', html)


def test_without_an_address_no_link_leads_nowhere(tmp_path: Path) -> None:
    told = metadata(copy_of_the_source(tmp_path), "")
    assert told.get_all("Project-URL") is None
    page = told.get_payload()
    assert isinstance(page, str)
    assert not RELATIVE.search(page)
    assert "https://arxiv.org/abs/2405.20233" in page


def test_every_file_tells_the_same_version() -> None:
    changes = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes[0] == citation[0] == grokadamw.__version__


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("github-workflows", ".github/workflows/*.yml"),
    ],
)
def test_files_that_others_read_have_their_form(schema: str, files: str) -> None:
    checker = pytest.importorskip("check_jsonschema")
    paths = sorted(map(str, ROOT.glob(files)))
    assert paths
    assert checker.main(["--builtin-schema", f"vendor.{schema}", *paths], standalone_mode=False) == 0
