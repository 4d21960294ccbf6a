"""A folder that appears whole or not at all: written beside its place, made durable, then renamed.

Nothing under the destination's name changes before the last rename, so an error, a full disk or a kill at any moment
leaves the destination as it was. With ``force`` the old folder is exchanged for the new one in one step where the
system can do that (Linux), and removed afterwards.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from bdlora_sglang.errors import BDLoRAError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PARTIAL = ".partial"


class NewFolder:
    """A context manager: fill `path`, then `commit`. Without a commit everything written is removed."""

    def __init__(self, destination: Path, force: bool) -> None:
        """Raises:
        BDLoRAError: the destination exists and ``force`` is false, or it is not a folder, or its parent is missing.
        """
        self.destination = destination
        self._force = force
        self._check()

    def _check(self) -> None:
        if os.path.lexists(self.destination):
            if not self._force:
                raise BDLoRAError(f"{self.destination}: found an existing path, expected none (or --force)")
            if self.destination.is_symlink() or not self.destination.is_dir():
                raise BDLoRAError(f"{self.destination}: found a file or a link, expected a folder to replace")
        if not self.destination.absolute().parent.is_dir():
            raise BDLoRAError(f"{self.destination.parent}: found no such folder, expected the destination's parent")

    def __enter__(self) -> Self:
        parent, prefix = (
            self.destination.absolute().parent,
            f".{self.destination.name}.",
        )
        _remove_stale(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, suffix=_PARTIAL, dir=parent))
        self.path.chmod(0o755)
        # Held while we live, and let go by the system even if we are killed: it tells a stale folder from one in use.
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        os.close(self._lock)
        shutil.rmtree(self.path, ignore_errors=True)  # after a commit, the old folder or nothing

    def commit(self) -> None:
        """Make the files durable and put the folder in its place.

        Raises:
            BDLoRAError: the destination has appeared in the meantime.
            OSError: the disk is full, or the rename failed.
        """
        for folder, _, files in os.walk(self.path):
            for file in files:
                _sync(Path(folder) / file)
            _sync(Path(folder))
        self._check()
        if os.path.lexists(self.destination):
            _exchange(self.path, self.destination)
        else:
            os.rename(self.path, self.destination)
        _sync(self.destination.absolute().parent)


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove what killed runs to the same destination left behind."""
    for folder in parent.glob(f"{prefix}*{_PARTIAL}"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # another run is writing it
        finally:
            os.close(lock)


def _libc_renameat2() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step; where the system cannot, in two renames, the first undone if the second fails."""
    renameat2 = _libc_renameat2()
    if renameat2 is not None:
        if (
            renameat2(
                _AT_FDCWD,
                os.fsencode(new),
                _AT_FDCWD,
                os.fsencode(old),
                _RENAME_EXCHANGE,
            )
            == 0
        ):
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(old))
    # Not named like a partial folder: a kill between the renames must not let the next run remove the only copy.
    aside = new.with_name(f"{new.name}.old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
