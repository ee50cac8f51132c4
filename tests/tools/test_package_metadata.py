"""Links of the package's description, and its URLs."""

from __future__ import annotations

import re
from pathlib import Path

from tools.package_metadata import absolute_links, project_urls

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
HOME = "https://code.example/me/fidelora"


def test_relative_links_and_images_become_urls():
    text = "![a\nb](docs/a.png) [c](d.md#e) [f](https://x.y/z) [g](#h) [i](mailto:j@k.l)"
    assert absolute_links(text, f"{HOME}/") == (
        f"![a\nb]({HOME}/raw/main/docs/a.png) [c]({HOME}/blob/main/d.md#e) "
        "[f](https://x.y/z) [g](#h) [i](mailto:j@k.l)"
    )
    assert absolute_links(text, "") == text


def test_the_readme_has_no_relative_link_with_a_repository():
    made = absolute_links(README, HOME)
    targets = re.findall(r"\]\(([^)]+)\)", made)
    assert len(targets) == len(re.findall(r"\]\(([^)]+)\)", README)) > 10
    assert not [target for target in targets if not target.startswith(("https://", "#"))]


def test_a_repository_adds_its_own_urls():
    assert "Repository" not in project_urls("")
    urls = project_urls(HOME)
    assert (urls["Repository"], urls["Issues"]) == (HOME, f"{HOME}/issues")
