"""Serve a simulated configfs-tsm as real files by FUSE, so that unmodified code meets real system calls.

The mount lives in a thread of this process, so tests reach machine and items while others use the files. Python's file
operations release the interpreter's lock, so this process may use its own mount, too. One thing would hang: to start a
program with its working directory in the mount, since ``subprocess`` keeps the lock until the program runs.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import importlib
import itertools
import os
import signal
import stat
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from kagimori_protocol.errors import HardwareError, ImageError
from kagimori_simulator import configfs

if TYPE_CHECKING:
    from collections.abc import Iterator

_READY_S: Final = 10.0
_STOP_S: Final = 5.0
_PAGE: Final = 4096
_TIMEOUTS: Final = ("attr_timeout", "entry_timeout", "negative_timeout", "ac_attr_timeout")
"""Nothing is cached: attributes appear and change without notice."""
_REPORT_DIRECTORY: Final = "report"
_PROBE: Final = ".probe"


@dataclass
class _OpenFile:
    """An open attribute: what was read once (the kernel, too, asks only at the first read), or what is to be written."""

    item: configfs.ReportItem
    name: str
    content: bytes | None = None
    pending: bytearray = field(default_factory=bytearray)


class Files:
    """The operations that libfuse calls, in mfusepy's names. One at a time: the mount has a single thread."""

    use_ns = True

    def __init__(self, tsm: configfs.ConfigfsTsm) -> None:
        """Serve ``tsm``."""
        self.ready = threading.Event()
        self._tsm = tsm
        self._open: dict[int, _OpenFile] = {}
        self._numbers = itertools.count(1)

    def init(self, _path: str) -> None:
        """Tell who waits that the mount is there."""
        self.ready.set()

    def getattr(self, path: str, _handle: int | None = None) -> dict[str, int]:
        """Stat a directory or an attribute."""
        item, name = self._find(path)
        if not name:
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if item is None or name not in item.names():
            _refuse(errno.ENOENT)
        attribute = configfs.ATTRIBUTES[name]
        size = 0 if attribute.binary else _PAGE
        return {"st_mode": stat.S_IFREG | attribute.mode, "st_nlink": 1, "st_size": size}

    def readdir(self, path: str, _handle: int) -> list[str]:
        """List a directory."""
        item, _ = self._find(path)
        if item is not None:
            return [".", "..", *item.names()]
        return [".", "..", *([_REPORT_DIRECTORY] if path == "/" else self._tsm.items)]

    def mkdir(self, path: str, _mode: int) -> None:
        """Make a report item. EPERM anywhere else."""
        self._tsm.make_item(self._item_name(path))

    def rmdir(self, path: str) -> None:
        """Remove a report item with its attributes. EPERM for anything else."""
        self._tsm.drop_item(self._item_name(path))

    def unlink(self, _path: str) -> None:
        """Refuse: attributes come and go with their item."""
        _refuse(errno.EPERM)

    def create(self, _path: str, _mode: int, _info: object = None) -> NoReturn:
        """Refuse: configfs has no files of its users."""
        _refuse(errno.EACCES)

    def truncate(self, _path: str, _length: int, _handle: int | None = None) -> None:
        """Accept and ignore, as configfs does for O_TRUNC."""

    def open(self, path: str, flags: int) -> int:
        """Open an attribute. EACCES, even for root, in a direction that it does not have."""
        item, name = self._find(path)
        if item is None or not name:
            _refuse(errno.ENOENT)
        mode = configfs.ATTRIBUTES[name].mode
        access = flags & os.O_ACCMODE
        if access == os.O_RDWR or not mode & (0o200 if access == os.O_WRONLY else 0o400):
            _refuse(errno.EACCES)
        number = next(self._numbers)
        self._open[number] = _OpenFile(item, name)
        return number

    def read(self, _path: str, size: int, offset: int, handle: int) -> bytes:
        """Read an attribute; its content is made at the first read of an open file."""
        file = self._open[handle]
        if file.content is None:
            file.content = file.item.show(file.name)
            if self._tsm.after_show is not None:
                self._tsm.after_show(file.item, file.name)
        return file.content[offset : offset + size]

    def write(self, _path: str, data: bytes, offset: int, handle: int) -> int:
        """Write an attribute: text takes effect at once, a binary one at close. EFBIG beyond 64 bytes of inblob."""
        file = self._open[handle]
        if not configfs.ATTRIBUTES[file.name].binary:
            file.item.store(file.name, data)
            return len(data)
        if offset + len(data) > configfs.INBLOB_MAX:
            _refuse(errno.EFBIG)
        file.pending[offset:] = data
        return len(data)

    def release(self, _path: str, handle: int) -> None:
        """Take what was written to a binary attribute, at the last close. As in the kernel, an error reaches nobody."""
        file = self._open.pop(handle, None)
        if file is not None and file.pending:
            with contextlib.suppress(OSError):
                file.item.store(file.name, bytes(file.pending))

    def decline_flush(self, directory: Path) -> None:
        """Let the kernel learn, by one close, that we have no FLUSH; it never sends one again.

        A new program's process closes its copies of our open files before it runs. FLUSH would wait there for this
        process, which waits for the program. RELEASE comes at the last close only, as in configfs, nobody waits for it,
        and this mount's one thread has always done it before what comes next.
        """
        self._tsm.items[_PROBE] = configfs.ReportItem(self._tsm)
        try:
            os.close(os.open(directory / _REPORT_DIRECTORY / _PROBE / "generation", os.O_RDONLY))
        finally:
            del self._tsm.items[_PROBE]

    def _find(self, path: str) -> tuple[configfs.ReportItem | None, str]:
        """Split a path into its item and attribute name; both empty for the two upper directories."""
        top, _, rest = path.removeprefix("/").partition("/")
        if top not in ("", _REPORT_DIRECTORY):
            _refuse(errno.ENOENT)
        if not rest:
            return None, ""
        item_name, _, name = rest.partition("/")
        item = self._tsm.items.get(item_name)
        if item is None or "/" in name:
            _refuse(errno.ENOENT)
        return item, name

    @staticmethod
    def _item_name(path: str) -> str:
        parent, _, name = path.rpartition("/")
        if parent != f"/{_REPORT_DIRECTORY}":
            _refuse(errno.EPERM)
        return name


@contextlib.contextmanager
def mounted(files: Files, directory: Path) -> Iterator[None]:
    """Mount ``files`` at ``directory``; unmount whatever happens, also when this process dies.

    Raises ImageError if libfuse is missing, HardwareError if the mount does not come up.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mfusepy = _load_mfusepy()
    trouble: list[BaseException] = []

    def serve() -> None:
        try:
            mfusepy.FUSE(
                files,
                str(directory),
                foreground=True,
                nothreads=True,
                direct_io=True,  # attributes have no size to trust
                fsname="kagimori-simulator",
                **dict.fromkeys(_TIMEOUTS, 0),
            )
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits
            trouble.append(error)
            files.ready.set()

    thread = threading.Thread(target=serve, name="kagimori-configfs", daemon=True)
    with unmounted_at_end(directory):
        thread.start()
        if not files.ready.wait(_READY_S) or trouble:
            raise HardwareError(
                "The simulated configfs did not come up.",
                code="simulator.fuse",
                expected=f"a FUSE mount at {directory}",
                found=str(trouble[0]) if trouble else f"nothing within {_READY_S:.0f} s",
                todo="Check that /dev/fuse is there and that fuse3 is installed.",
            )
        _restore_signals()
        files.decline_flush(directory)
        yield
    thread.join(_STOP_S)


@contextlib.contextmanager
def unmounted_at_end(directory: Path) -> Iterator[None]:
    """Let a watcher unmount when its pipe from us closes: at the end of the block, or at our death, however it comes."""
    script = 'read -r _; fusermount3 -u -z -q "$1"'
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        ["sh", "-c", script, "sh", str(directory)], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet
    ):
        yield


def _restore_signals() -> None:
    """Give SIGHUP and SIGTERM back to who had them: libfuse took them for itself when it started."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))


def _load_mfusepy() -> Any:  # noqa: ANN401 - a module
    """Import mfusepy with libfuse3, which it would not find by itself in an initramfs."""
    if "FUSE_LIBRARY_PATH" not in os.environ:
        library = ctypes.util.find_library("fuse3") or next(
            (str(path) for path in Path("/usr/lib").glob("**/libfuse3.so.*")), None
        )
        if library is None:
            raise ImageError("libfuse3 is missing.", code="simulator.libfuse", todo="apt-get install fuse3")
        os.environ["FUSE_LIBRARY_PATH"] = library
    return importlib.import_module("mfusepy")


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
