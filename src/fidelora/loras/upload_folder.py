"""The uploads in the adapter folder of one server, or of several with a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from fidelora.errors import UploadNotFoundError
from fidelora.loras.shared import SharedLoras
from fidelora.loras.uploads import UploadQuota, add_upload, upload_path


class UploadFolder:
    """Adds, finds and removes uploads. Thread-safe.

    Args:
        root: adapter folder.
        quota: disk space for uploads. Each server counts the files in its own copy of the folder,
            so uploads to several servers at the same time can exceed it.
        shared: the adapter folder of all servers; None for one server, or for a shared folder.
    """

    def __init__(
        self, root: Path, quota: UploadQuota | None = None, shared: SharedLoras | None = None
    ) -> None:
        self._root = root
        self._quota = quota
        self._shared = shared

    def refresh(self) -> None:
        """Make the uploads of other servers available.

        Raises:
            StorageError: the object store cannot be used.
        """
        if self._shared is not None:
            self._shared.refresh()

    def add(self, file: BinaryIO, name: str, owner: str = "") -> tuple[str, bool]:
        """Store an upload; see `add_upload`.

        Raises:
            StorageError: the object store cannot be used; nothing was stored.
        """
        self.refresh()
        path, is_new = add_upload(self._root, file, name, owner, self._quota)
        if not is_new or self._shared is None:
            return path, is_new
        try:
            is_new = self._shared.publish(path)
        except BaseException:
            (self._root / path).unlink(missing_ok=True)
            raise
        if not is_new:  # another server has stored an upload with this name in the meantime
            (self._root / path).unlink(missing_ok=True)
            self.refresh()
            path, is_new = add_upload(self._root, file, name, owner, self._quota)
        return path, is_new

    def find(self, name: str, owner: str = "", *, is_admin: bool = True) -> Path:
        """Return the file of an upload that a caller may delete; see `upload_path`.

        Raises:
            UploadNotFoundError: the upload does not exist.
            StorageError: the object store cannot be used.
        """
        try:
            return upload_path(self._root, name, owner, is_admin=is_admin)
        except UploadNotFoundError:
            if self._shared is None:
                raise
            self.refresh()
            return upload_path(self._root, name, owner, is_admin=is_admin)

    def remove(self, path: Path) -> None:
        """Remove an upload, if it exists.

        Args:
            path: path from `find`.

        Raises:
            StorageError: the object store cannot be used; the upload remains.
        """
        if self._shared is not None:
            self._shared.remove(path.relative_to(self._root).as_posix())
        path.unlink(missing_ok=True)
