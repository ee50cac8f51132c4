"""Metadata hook of hatchling: absolute links in the README, and the URLs of the project.

Package indexes show the README without the rest of the repository, so that relative links and
images do not work there. `repository` in `[tool.hatch.metadata.hooks.custom]` of pyproject.toml is
the address of the repository; if it is empty, links stay relative.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?![a-z]+:|#|/)[^)\s]+)\)")
_BRANCH = "main"


def absolute_links(text: str, repository: str) -> str:
    """Return Markdown whose relative links and images are URLs of files in the repository.

    Args:
        repository: URL on a host with the paths `/blob/BRANCH/` for pages and `/raw/BRANCH/` for
            files; empty leaves the text unchanged.
    """
    if not repository:
        return text

    def replaced(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        target = f"{repository.rstrip('/')}/{kind}/{_BRANCH}/{match['target']}"
        return f"{match['image']}[{match['text']}]({target})"

    return _LINK.sub(replaced, text)


def project_urls(repository: str) -> dict[str, str]:
    """Return the project's URLs by label, for the package metadata."""
    urls = {"AI Toolkit": "https://github.com/ostris/ai-toolkit"}
    if repository:
        pages = f"{repository.rstrip('/')}/blob/{_BRANCH}"
        urls |= {
            "Repository": repository,
            "Documentation": f"{pages}/docs/index.md",
            "Changelog": f"{pages}/CHANGELOG.md",
            "Issues": f"{repository.rstrip('/')}/issues",
        }
    return urls


def get_metadata_hook() -> type[Any]:
    """Return the hook; called by hatchling, which is installed only while a package is built."""
    from hatchling.metadata.plugin.interface import MetadataHookInterface

    class PackageMetadata(MetadataHookInterface):  # type: ignore[misc]  # hatchling is untyped here
        """Fills in the fields `readme` and `urls`."""

        def update(self, metadata: dict[str, Any]) -> None:
            repository = str(self.config["repository"])
            readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
            metadata["readme"] = {
                "content-type": "text/markdown",
                "text": absolute_links(readme, repository),
            }
            metadata["urls"] = project_urls(repository)

    return PackageMetadata
