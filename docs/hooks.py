"""For MkDocs: pages, pictures and results that lie outside of docs/ become part of the site.

On a page they are linked as in the repository, `../benchmarks/results/…`; in the site they are below its root.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ["CONTRIBUTING.md", "benchmarks/results/GROKKING_REPORT.md"]
LINKED = r"\]\(\.\./(benchmarks/results/[^)#]+(?<!\.md))\)"  # results that pages in docs/ link to or show


def on_files(files: Files, config: Any) -> Files:
    pages = [path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")]
    for path in sorted({path for page in pages for path in re.findall(LINKED, page)}):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
        for picture in re.findall(
            r"!\[[^\]]*\]\(([^):]+)\)", (ROOT / page).read_text(encoding="utf-8")
        ):
            path = (ROOT / page).parent / picture
            files.append(
                File.generated(
                    config, str(path.relative_to(ROOT)), abs_src_path=str(path)
                )
            )
    return files


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Mark names with hyphens in tables, so that site.css keeps them in one piece."""

    def marked(cell: re.Match[str]) -> str:
        return cell[1] + re.sub(
            r"[\w/]+-[\w/-]+", r'<span class="name">\g<0></span>', cell[2]
        )

    return re.sub(r"(<td[^>]*>)([^<]*)", marked, html)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    linked = "|".join(map(re.escape, PAGES))
    markdown = re.sub(rf"\]\(\.\./({linked})", r"](\1", markdown)
    return re.sub(LINKED, r"](\1)", markdown)
