"""Bytes: where checkpoints lie, what their files look like, and when a checkpoint counts as committed.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file imports neither of the others)

Words, in this file and in the other two:

    tensor   a whole tensor, known by its name, however many ranks hold parts of it
    box      a rectangular part of a tensor: its offset and its size in each dimension
    file     a tensor file, or shard: of one rank; a *whole file* holds whole tensors, from all ranks
    piece    a box with its place in a file: one row of the record; compressed, it is one *frame*
    unit     256 KiB of a file's data, under one CRC32: the least that is read
    block    up to 4 MiB of a file's data: what one write moves; a read may have parts of two
    record   the metadata file; the checkpoint exists if and only if its record does
    fence    the record before its rename: the mark of a save under way

Layout below the base path, for the prefix `run/step_100` saved as `4f2a9c1e` by two ranks:

    run/step_100.metadata.json                         the record
    run/step_100.metadata.json.4f2a9c1e.tmp            the fence
    run/step_100/4f2a9c1e-00000-of-00002.safetensors   a tensor file, one for each rank

A checkpoint is **committed** if all of this holds; `decode_record`, given the storage, decides alone:
    C1  the record is a regular file whose last field is the CRC32 of every byte before it;
    C2  its format version is one that this code reads;
    C3  it is well formed, and every file name in it passes the name rules;
    C4  each file that it names is a regular file of exactly the stated length.

A tensor file is a valid safetensors file. All integers are little-endian:

    Offset | Size | Field
    0      | 8    | N: length of the JSON header, u64 (struct "<Q")
    8      | N    | JSON header, padded with spaces so that 8 + N is a multiple of 4096
    8 + N  | rest | data: the entries, one behind the other

The header's `__metadata__` has `format`, `ckpt_version`, `unit_bytes` and `crc32`: eight hex digits for
each unit of the data, in order. The record holds the CRC32 of the header, so every byte of a checkpoint is
under a checksum. Which box of which tensor lies where is said once, by the record.

Assumed of the file system: rename and link within a directory are atomic; fsync of a file and of its
directory make both durable. Not assumed: clocks, the order of unsynced operations, that a failed fsync can
be tried again. Not defended: a race against a process that swaps files for links meanwhile, since such a
process can also edit the files.

All access to a checkpoint's files goes through this module's `os`: tests replace it by a stand-in that
records, fails or stops.

Read next: `LocalStorage`, "The tensor file", "The record", "Committed", then ckpt_coord.py.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import datetime
import enum
import errno
import importlib
import itertools
import json
import logging
import math
import mmap
import operator
import os as os  # explicitly, since ckpt.py uses this one too
import re
import resource
import secrets
import stat
import struct
import threading
import time
import types
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "CheckpointException",
    "CheckpointMetadata",
    "CheckpointStorage",
    "CompressionLevel",
    "ExceptionType",
    "LocalStorage",
    "ShardMetadata",
    "StorageFactory",
    "StorageOptions",
    "StoredFile",
    "TensorMetadata",
    "collect_garbage",
]

Warn = Callable[[str], object]  # gets a message: what was skipped or kept, and why
log = logging.getLogger("ckpt")
T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]  # one-dimensional
Ints = npt.NDArray[np.int64]
Shape = tuple[int, ...]

FORMAT_VERSION = 2
UNIT_BYTES = 256 << 10  # of the format
BLOCK_BYTES = 4 << 20  # a multiple of units; of the format too: no compressed piece has more
ALIGN_BYTES = 4096  # data start on a multiple of the page, so that blocks can be read and written directly
IO_THREADS = min(6, 1 + len(os.sched_getaffinity(0)))  # of a rank: one waits, the others copy and checksum
STUCK_S = 2.0  # how long an operation that is over waits for threads, which may be stuck in the kernel
MAX_HEADER_BYTES = 100_000_000  # what safetensors readers accept
MOST = (1 << 62) - 1  # the largest integer of a record: sums of two fit into 64 bits
MIN_ROW_BYTES = 40  # no piece has an entry with a shorter description in a file's header
RECORD_SUFFIX = ".metadata.json"
_HUGE_PAGE_BYTES = 2 << 20
_MADV_WIPEONFORK = 18  # of Linux 4.14; Python's mmap lacks the name

# ----------------------------------------------------------------------------------------------------------
# Errors


class ExceptionType(enum.Enum):
    """What kind of failure a `CheckpointException` reports."""

    UNKNOWN = "unknown"
    SAVE_FAILED = "save_failed"
    LOAD_FAILED = "load_failed"
    VALIDATION_FAILED = "validation_failed"
    CORRUPTED_CHECKPOINT = "corrupted_checkpoint"
    INCOMPATIBLE_VERSION = "incompatible_version"
    TIMEOUT = "timeout"
    STORAGE_ERROR = "storage_error"
    CANCELLED = "cancelled"


class CheckpointException(Exception):
    """A checkpoint operation failed; `type` says how, `rank` which rank failed first, where that is known."""

    def __init__(
        self,
        message: str,
        checkpoint_path: str = "",
        type: ExceptionType = ExceptionType.UNKNOWN,
        rank: int | None = None,
    ) -> None:
        super().__init__(escaped(message, "\n"))
        self.checkpoint_path, self.type, self.rank = checkpoint_path, type, rank


def corrupted(message: str, path: str = "") -> CheckpointException:
    """The exception for bytes that are not what was written."""
    return CheckpointException(message, path, ExceptionType.CORRUPTED_CHECKPOINT)


@contextlib.contextmanager
def well_formed(path: str) -> Iterator[None]:
    """Raise CORRUPTED_CHECKPOINT for what the parsers of a file find wrong."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise corrupted(f"{path}: {error}", path) from error


def escaped(text: str, kept: str = "") -> str:
    """Replace what is not printable by escapes, but for `kept`: no stored name may control a terminal."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def some(names: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first of some names, for a message, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join([*map(str, names[:most]), *more])


def require(fact: object, problem: str) -> None:
    """ValueError(problem) unless `fact`. Code that parses bytes turns it into CORRUPTED_CHECKPOINT."""
    if not fact:
        raise ValueError(problem)


# ----------------------------------------------------------------------------------------------------------
# Names: this section makes and checks every file name

_PART = re.compile(r"[A-Za-z0-9._=+-]{1,200}")
# `.rest` is of version 1.
_FILE = re.compile(r"([0-9a-f]{8})(-[0-9]{5,}-of-[0-9]{5,}|\.model|\.rest)?\.safetensors")
_FILE_PATH = re.compile(f"(.+)/{_FILE.pattern}")
_FENCE = re.compile(r"(.+)\.metadata\.json\.([0-9a-f]{8})\.tmp")


def check_name(name: str) -> None:
    """ValueError for the name of a tensor, value or file that other programs could not write or read."""
    try:
        name.encode()
    except UnicodeEncodeError:
        what = "holds half of a surrogate pair, which UTF-8 cannot encode: rename it"
        raise ValueError(f"the name {name!a} {what}") from None


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is a legal checkpoint name, else raise ValueError; touches no file."""
    if not isinstance(prefix, str) or not _is_prefix(prefix):
        raise ValueError(
            f"illegal checkpoint prefix {prefix!r}: use '/'-separated parts of letters, digits and '._=+-', "
            f"each at most 200 long, none empty, '.', '..' or ending in {RECORD_SUFFIX!r}"
        )
    return prefix


def _is_prefix(name: str) -> bool:
    parts = name.split("/")
    return all(_PART.fullmatch(p) and p not in (".", "..") and not p.endswith(RECORD_SUFFIX) for p in parts)


def record_name(prefix: str) -> str:
    """The metadata file of a checkpoint."""
    return prefix + RECORD_SUFFIX


def fence_name(prefix: str, save_id: str) -> str:
    """The record under construction. Without it that save cannot commit."""
    return f"{prefix}{RECORD_SUFFIX}.{save_id}.tmp"


def own_file_name(save_id: str, rank: int, world_size: int) -> str:
    """The tensor file of one rank."""
    return f"{save_id}-{rank:05d}-of-{world_size:05d}.safetensors"


def whole_file_name(save_id: str, part: str = "") -> str:
    """The tensor file of whole tensors: of all ("") or of the model's ("model")."""
    return f"{save_id}{part and f'.{part}'}.safetensors"


# ----------------------------------------------------------------------------------------------------------
# Storage


@runtime_checkable
class StoredFile(Protocol):
    """An open file of a storage. Reads and writes are positioned, and may come from several threads.

    A save writes blocks in any order and the header last, perhaps after `resize` to the final length. `sync`
    makes all of it durable. `close` does not; it may come while a read or write hangs.
    """

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. CORRUPTED_CHECKPOINT where the file ends before."""

    def write(self, offset: int, data: memoryview) -> None: ...
    def length(self) -> int: ...
    def resize(self, length: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class CheckpointStorage(Protocol):
    """Where checkpoints are kept. Names are '/'-separated paths below the storage's root.

    A failure is an OSError: only those are tried again, and skipped in lists. SINGLE_FILE and CONSOLIDATED
    need files into which several processes write.
    """

    def create(self, name: str) -> StoredFile:
        """Make a new file, and the directories above it. FileExistsError if it is there."""

    def open(self, name: str, write: bool = False) -> StoredFile:
        """Open an existing regular file. FileNotFoundError if there is none."""

    def length(self, name: str) -> int | None:
        """Bytes in the regular file `name`, or None where there is none."""

    def names(self, directory: str = "") -> list[str]:
        """Every regular file below `directory`, sorted; [] if there is no such directory.

        What is neither file nor directory (a link, which is never followed; a device) and what cannot be
        looked at come with a `/` at the end; as `directory` itself a link is an error.
        """

    def publish(self, temporary: str, name: str, overwrite: bool) -> None:
        """Atomically give `temporary` its final name, in the same directory.

        FileExistsError if `name` exists, unless `overwrite`.
        """

    def delete(self, name: str) -> bool:
        """Remove a file, and the directories above it that this empties; False where there was none."""

    def sync_directory(self, name: str) -> None:
        """Make creations, renames and removals in the directory that holds `name` durable."""

    def age_s(self, name: str) -> float:
        """Seconds since `name` was last written, by the storage's own clock; 0 or less if that is not known.

        FileNotFoundError if there is no such file.
        """


_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_REGION_BYTES = 64 << 20  # one probe tells whether a region of a file is in the page cache
_MIN_DIRECT_BYTES = 256 << 10  # smaller writes and reads go through the page cache


class LocalFile:
    """A file on a local or mounted file system.

    Optimisation (skip on first reading): large aligned writes bypass the page cache where the file system
    allows it, and so does `read_directly`. It makes saves 1.2 to 2 times as fast, and pushes nothing else out
    of memory.
    """

    def __init__(self, name: str, fd: int, flags: int) -> None:
        self._name, self._fd, self._flags = name, fd, flags
        self._direct_fd = -1  # -1: not opened yet; `_fd`: there is none
        self._cold: dict[int, bool] = {}  # by region
        self._lock = threading.Lock()
        # `close` leaves the descriptors open while a call hangs: else their numbers could belong to other
        # files when the call goes on.
        self._gate = Gate()

    def read(self, offset: int, buffer: memoryview) -> None:
        self._move(False, offset, buffer, direct=False)

    def read_directly(self, offset: int, buffer: memoryview) -> None:
        """Read past the page cache, unless the cache has the bytes: for what no other process wants soon."""
        self._move(False, offset, buffer, self.is_cold(offset, len(buffer)))

    def write(self, offset: int, data: memoryview) -> None:
        self._move(True, offset, data, direct=True)

    def _move(self, write: bool, offset: int, data: memoryview, direct: bool) -> None:
        """Read or write all of `data`: what is aligned past the page cache, the rest through it."""
        done = 0
        with self._gate:
            fd = self._directly(offset, data) if direct and len(data) >= _MIN_DIRECT_BYTES else self._fd
            while done < len(data):  # short calls go on
                stop = len(data) if fd == self._fd else len(data) // ALIGN_BYTES * ALIGN_BYTES
                part, at = data[done:stop], offset + done
                try:
                    count = os.pwrite(fd, part, at) if write else os.preadv(fd, [part], at)
                except OSError as error:
                    if fd == self._fd or error.errno not in _UNSUPPORTED:
                        if error.errno:
                            error.filename = self._name
                        raise
                    count = 0
                if not count and fd == self._fd:
                    if write:
                        raise OSError(errno.EIO, "the disk takes nothing more", self._name)
                    raise corrupted(f"{self._name}: ends at byte {at}, {len(data) - done} bytes missing")
                done, fd = done + count, self._fd

    def _directly(self, offset: int, memory: memoryview) -> int:
        """A descriptor that bypasses the page cache, where memory and offset are aligned; else the other."""
        if (offset | np.frombuffer(memory, np.uint8).ctypes.data) % ALIGN_BYTES:
            return self._fd
        with self._lock:
            if self._direct_fd < 0:
                self._direct_fd = self._fd
                # Only in the lower half of the descriptors: the upper half is for files not yet open.
                if 2 * self._fd < resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                    with contextlib.suppress(OSError):  # tmpfs, or no /proc: the page cache will do
                        flags = self._flags | os.O_CLOEXEC | os.O_DIRECT
                        self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", flags)
            return self._direct_fd

    def is_cold(self, offset: int, length: int) -> bool:
        """Whether the page cache lacks the region of the file where these bytes begin.

        Decided once a region, by a read of the last byte that does not wait for the disk. The first bytes may
        be there because the kernel has read ahead. A second probe may find what the first one has brought.
        """
        region = offset // _REGION_BYTES
        if region not in self._cold:
            try:
                os.preadv(self._fd, [bytearray(1)], offset + length - 1, os.RWF_NOWAIT)
                self._cold[region] = False
            except OSError as error:
                self._cold[region] = error.errno == errno.EAGAIN
        return self._cold[region]

    def length(self) -> int:
        return os.fstat(self._fd).st_size

    def resize(self, length: int) -> None:
        """Extending reserves the space, so that writes do not wait for each other."""
        try:
            if length > self.length():
                return os.posix_fallocate(self._fd, 0, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                if error.errno:
                    error.filename = self._name
                raise
        os.ftruncate(self._fd, length)

    def sync(self) -> None:
        with self._gate:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._gate.close(0):
            fds, self._fd, self._direct_fd = {self._fd, self._direct_fd}, -1, -1
            for fd in fds - {-1}:
                os.close(fd)


class LocalStorage:
    """Plain files below `base_path`, which may itself be a link; a link below it is a STORAGE_ERROR."""

    def __init__(self, base_path: str | os.PathLike[str] = "./checkpoints") -> None:
        self.base_path = os.path.abspath(base_path)
        self._unsynced: set[str] = set()  # directories in which this object has made a directory

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ValueError(f"illegal path {name!r}")
        path = os.path.join(os.path.realpath(self.base_path), *parts)
        if os.path.realpath(path) != path:
            what = "a symbolic link, or behind one; links below the base path are not followed"
            raise CheckpointException(f"{name}: is {what}", name, ExceptionType.STORAGE_ERROR)
        return path

    def _open(self, name: str, flags: int) -> LocalFile:
        """Open a file, neither following a link nor waiting for the other end of a FIFO."""
        safe = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return LocalFile(name, os.open(self._path(name), flags | safe, 0o666), flags & os.O_ACCMODE)

    def create(self, name: str) -> LocalFile:
        for _ in range(10):  # a clean-up may remove the directory before the file is in it
            with contextlib.suppress(FileNotFoundError):
                self._make_directory(os.path.dirname(self._path(name)))
                return self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        raise FileNotFoundError(errno.ENOENT, "its directory was removed again and again", name)

    def _make_directory(self, path: str) -> None:
        if os.path.isdir(path):
            return
        self._make_directory(os.path.dirname(path))
        self._unsynced.add(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another rank was faster
            os.mkdir(path)

    def open(self, name: str, write: bool = False) -> LocalFile:
        self.length(name)  # refuses what is not a regular file
        return self._open(name, os.O_RDWR if write else os.O_RDONLY)

    def length(self, name: str) -> int | None:
        try:
            status = os.stat(self._path(name), follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise corrupted(f"{name}: not a regular file", name)
        return status.st_size

    def names(self, directory: str = "") -> list[str]:
        path = self._path(directory) if directory else os.path.realpath(self.base_path)
        found = list[str]()
        # scandir tells files from directories without a call for each: a job may have 100,000 remote files.
        for entry in list(os.scandir(path)) if os.path.isdir(path) else ():
            inner = os.path.join(directory, entry.name)
            try:
                if entry.is_dir(follow_symlinks=False):
                    found += self.names(inner)
                else:
                    found.append(inner + "/" * (not entry.is_file(follow_symlinks=False)))
            except FileNotFoundError:  # removed since
                continue
            except (OSError, CheckpointException):  # another owner's, or damaged: the rest can be listed
                found.append(f"{inner}/")
        return sorted(found)

    def publish(self, temporary: str, name: str, overwrite: bool) -> None:
        source, target = self._path(temporary), self._path(name)
        if overwrite:
            return os.rename(source, target)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in (*_UNSUPPORTED, errno.EPERM):
                why = "this file system has no hard links, which overwrite=False needs"
                raise OSError(error.errno, why, name) from error
            raise
        with contextlib.suppress(OSError):  # published already; a clean-up finds the other name
            os.unlink(source)

    def delete(self, name: str) -> bool:
        path = self._path(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        with contextlib.suppress(OSError):  # not empty, or another process was faster
            for _ in range(name.count("/")):
                os.rmdir(path := os.path.dirname(path))
        return True

    def sync_directory(self, name: str) -> None:
        """Also syncs the directories above, up to the one that holds the base path: they may be new."""
        path, waiting = self._path(name), set(self._unsynced)
        for _ in range(name.count("/") + 2):
            waiting.add(path := os.path.dirname(path))
        for directory in sorted(waiting, reverse=True):
            # Removed since: the directory above it is synced too. The one above the base path, which comes
            # last, may be another user's.
            missing = (FileNotFoundError, PermissionError) if directory == path else (FileNotFoundError,)
            with contextlib.suppress(*missing):
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:  # else the file system needs no such sync
                        raise
                finally:
                    os.close(fd)
        self._unsynced -= waiting

    def age_s(self, name: str) -> float:
        """By the clock of the file system: the time of a file made now less that of `name`.

        The new file is named as a fence, so that one that a crash leaves is cleaned up as one.
        """
        written = os.stat(self._path(name), follow_symlinks=False).st_mtime
        new = os.path.join(os.path.dirname(name), fence_name("now", secrets.token_hex(4)))
        self.create(new).close()
        try:
            return os.stat(self._path(new)).st_mtime - written
        finally:
            self.delete(new)


@dataclass(frozen=True)
class StorageOptions:
    """Which registered provider to build a storage with, and its settings. "local" has one: `base_path`."""

    provider: str = "local"
    connection_settings: Mapping[str, str] = field(default_factory=lambda: {"base_path": "./checkpoints"})


def _local(settings: Mapping[str, str]) -> LocalStorage:
    if unknown := set(settings) - {"base_path"}:
        raise ValueError(f"unknown setting(s) {sorted(unknown)} for the local provider; allowed: base_path")
    if "://" in (path := settings.get("base_path", "./checkpoints")):
        raise ValueError(f"{path!r} is a URL, not a path: `StorageFactory.register` a provider for it")
    return LocalStorage(path)


AnyStorage = CheckpointStorage | StorageOptions | str | os.PathLike[str]  # what `StorageFactory.create` takes


class StorageFactory:
    """Builds storages by provider name."""

    _providers: ClassVar[dict[str, Callable[[Mapping[str, str]], CheckpointStorage]]] = {"local": _local}

    @staticmethod
    def create(options: AnyStorage) -> CheckpointStorage:
        """The storage of `options.provider`; local storage at a path; a storage as it is.

        ValueError for anything else, and for an unknown provider or setting.
        """
        if isinstance(options, (str, os.PathLike)):
            options = StorageOptions(connection_settings={"base_path": os.fspath(options)})
        if not isinstance(options, StorageOptions):
            # Not `isinstance`: from Python 3.12 on it overlooks methods that `__getattr__` gives.
            if all(hasattr(options, name) for name in vars(CheckpointStorage) if name[0] != "_"):
                return options
            must = "must be a path, StorageOptions, or have all methods of CheckpointStorage"
            raise ValueError(f"storage {must}, not {type(options)}")
        if (factory := StorageFactory._providers.get(options.provider)) is None:
            known = ", ".join(sorted(StorageFactory._providers))
            raise ValueError(f"unknown storage provider {options.provider!r}; registered: {known}")
        return factory(options.connection_settings)

    @staticmethod
    def register(provider: str, factory: Callable[[Mapping[str, str]], CheckpointStorage]) -> None:
        """Make `factory(connection_settings)` available as `provider`, replacing one of that name."""
        StorageFactory._providers[provider] = factory


# ----------------------------------------------------------------------------------------------------------
# JSON: strict parsing, and an exact, pickle-free form for every value that is not a tensor


def parse_json(text: bytes | bytearray, path: str) -> object:
    """Parse UTF-8 JSON; duplicate keys, NaN, overflowing floats and absurd nesting are corruption."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(mapping := dict(pairs)) != len(pairs):
            raise ValueError("duplicate key")
        return mapping

    def finite(literal: str) -> float:
        if not math.isfinite(number := float(literal)):
            raise ValueError(f"{literal} is not a number of JSON, or out of range")
        return number

    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
    except (ValueError, RecursionError) as error:
        raise corrupted(f"{path}: not valid JSON: {error}", path) from error


def typed(value: object, kind: type[T], what: str) -> T:
    """`value`, if it is a `kind`, else ValueError: `what` is malformed."""
    if type(value) is not kind:
        raise ValueError(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
    return value


class Fields:
    """A JSON object whose fields are read as the type that they must have; ValueError where they are not."""

    def __init__(self, node: object) -> None:
        self.all: dict[str, object] = typed(node, dict, "an object")

    def text(self, key: str) -> str:
        return typed(self.all.get(key), str, key)

    def number(self, key: str) -> int:
        """From 0 to `MOST`."""
        return int_tuple([self.all.get(key)], key)[0]

    def shape(self, key: str) -> Shape:
        return int_tuple(self.all.get(key), key)

    def array(self, key: str) -> list[object]:
        return typed(self.all.get(key), list, key)

    def texts(self, key: str) -> list[str]:
        return [typed(item, str, key) for item in self.array(key)]

    def child(self, key: str) -> Fields:
        return Fields(typed(self.all.get(key), dict, key))


def int_tuple(value: object, what: str, most: int = 64) -> Shape:
    """`value` as a tuple of at most `most` ints from 0 to `MOST`, or ValueError: `what` is malformed."""
    if not isinstance(value, (list, tuple)) or len(value) > most:
        raise ValueError(f"{what}: expected at most {most} integers, found {type(value).__name__}")
    for number in value:
        if type(number) is not int or not 0 <= number <= MOST:
            raise ValueError(f"{what}: expected an integer from 0 to {MOST}, found {number!r}")
    return tuple(value)


def dump_json(value: object) -> bytes:
    """JSON without spaces, in ASCII. ValueError for NaN and infinities."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_PLAIN_KINDS = "biufcmMSU"  # of numpy's dtypes, those without objects or fields


def _pack_array(value: npt.ArrayLike) -> list[object] | None:
    array = np.asarray(value)
    plain = array.dtype.kind in _PLAIN_KINDS
    return [array.dtype.str, list(array.shape), _base64(array.tobytes())] if plain else None


def _unpack_array(body: tuple[str, list[int], str]) -> npt.NDArray[np.generic]:
    dtype, shape, data = body
    require(np.dtype(dtype).kind in _PLAIN_KINDS, f"dtype {dtype}")
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()


def _pack_datetime(value: datetime.datetime) -> str | None:
    return value.isoformat() if value.tzinfo is None or type(value.tzinfo) is datetime.timezone else None


_TORCH_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_MAPPINGS = (dict, OrderedDict, Counter)  # stored as lists of pairs
_SEQUENCES = (tuple, torch.Size, set, frozenset)  # stored as lists
_CONTAINERS: dict[str, type] = {f"${kind.__name__}": kind for kind in (*_MAPPINGS, *_SEQUENCES)}
_TORN_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # two characters of Python, which JSON reads as one

# tag: type, to JSON (None: impossible), back
_LEAVES: dict[str, tuple[type, Callable[..., object], Callable[..., object]]] = {
    "$str": (
        str,
        lambda text: _base64(text.encode("utf-8", "surrogatepass")),
        lambda data: base64.b64decode(data).decode("utf-8", "surrogatepass"),
    ),
    "$int": (int, hex, lambda text: int(text, 16)),
    "$float": (
        float,
        lambda number: struct.pack(">d", number).hex(),
        lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    ),
    "$bytes": (bytes, _base64, base64.b64decode),
    "$datetime": (datetime.datetime, _pack_datetime, datetime.datetime.fromisoformat),
    "$dtype": (torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), _TORCH_DTYPES.__getitem__),
    "$device": (torch.device, str, torch.device),
    "$ndarray": (np.ndarray, _pack_array, _unpack_array),
    "$scalar": (np.generic, _pack_array, lambda body: _unpack_array(body)[()]),
}


def encode_value(
    value: object, path: str, on_tensor: Callable[[str, torch.Tensor], str] | None = None
) -> object:
    """`value` as plain JSON; what JSON lacks becomes {"$<kind>": ...}.

    A tensor becomes {"$tensor": on_tensor(path, tensor)}. ValueError, naming `path` and the type, for
    anything that could not be restored exactly.
    """
    kind = type(value)
    if value is None or kind is bool or (type(value) is str and not _TORN_PAIR.search(value)):
        return value
    if (type(value) is int and abs(value) < 1 << 53) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, torch.Tensor):
        if on_tensor is None:
            raise ValueError(f"{path}: a tensor cannot be stored here; put it into extra_state")
        return {"$tensor": on_tensor(path, value)}
    if path.count(".") > 100:  # a reader's stack may be small
        raise ValueError(f"{path[:100]}...: nested too deeply, or under a key with over 100 dots")
    if isinstance(value, dict) and kind in _MAPPINGS:
        if kind is dict and all(type(k) is str and k[:1] != "$" and not _TORN_PAIR.search(k) for k in value):
            return {k: encode_value(v, f"{path}.{k}", on_tensor) for k, v in value.items()}
        pairs = [[encode_value(k, path), encode_value(v, f"{path}.{k}", on_tensor)] for k, v in value.items()]
        node: dict[str, object] = {f"${kind.__name__}": pairs}
        if (metadata := getattr(value, "_metadata", None)) is not None:  # of a module's state dict: versions
            node["metadata"] = encode_value(metadata, f"{path}._metadata", on_tensor)
        return node
    if isinstance(value, (list, tuple, set, frozenset)) and kind in (list, *_SEQUENCES):
        items = [encode_value(item, f"{path}.{index}", on_tensor) for index, item in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            items.sort(key=dump_json)
        return items if kind is list else {f"${kind.__name__}": items}
    kind = np.generic if isinstance(value, np.generic) else np.ndarray if kind is np.memmap else kind
    for tag, (leaf, pack, _) in _LEAVES.items():
        if leaf is kind and (packed := pack(value)) is not None:
            return {tag: packed}
    raise ValueError(
        f"{path}: cannot store a {type(value).__module__}.{type(value).__qualname__}; convert it to tensors, "
        "numbers, strings, or lists, tuples, sets and dicts of them (for an Enum its .value, for a dataclass "
        "dataclasses.asdict)"
    )


def decode_value(node: object, tensor: Callable[[str], object]) -> object:
    """Inverse of `encode_value`; `tensor(name)` supplies what stands for {"$tensor": name}."""
    if isinstance(node, list):
        return [decode_value(item, tensor) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return {key: decode_value(item, tensor) for key, item in node.items()}
    body, kind = node[tag], _CONTAINERS.get(tag)
    if tag == "$tensor" and isinstance(body, str):
        return tensor(body)
    try:
        if kind is None or not isinstance(body, list):
            return _LEAVES[tag][2](body)
        is_mapping = issubclass(kind, dict)
        if not is_mapping:
            return kind([decode_value(item, tensor) for item in body])
        made = kind({decode_value(key, tensor): decode_value(item, tensor) for key, item in body})
        if "metadata" in node:
            vars(made)["_metadata"] = decode_value(node["metadata"], tensor)
        return made
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, struct.error) as error:
        raise corrupted(f"stored value {tag} is malformed: {error}") from error


# ----------------------------------------------------------------------------------------------------------
# Dtypes and boxes

_CODES = {  # a new one also goes into ckpt.py's `_SERIALIZED`
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C128": "complex128",
    "C32": "complex32",
}
DTYPES: dict[str, torch.dtype] = {
    code: _TORCH_DTYPES[name] for code, name in _CODES.items() if name in _TORCH_DTYPES
}
DTYPES["JSON"] = torch.uint8  # a non-tensor value, as UTF-8
CODES = {dtype: code for code, dtype in DTYPES.items() if code != "JSON"}
_PAIRS = {"C128": "F64", "C32": "F16"}  # not in safetensors: stored with a last dimension of 2


def itemsize(code: str) -> int:
    """Bytes of an element of dtype `code`."""
    return DTYPES[code].itemsize


def itemsizes(tensors: Iterable[TensorMetadata]) -> Ints:
    """Bytes of an element of each tensor."""
    return np.array([itemsize(t.dtype) for t in tensors], np.int64)


def stored_form(code: str, shape: Shape) -> tuple[str, Shape]:
    """Dtype and shape under which safetensors knows a tensor of dtype `code`."""
    if code in _PAIRS:
        return _PAIRS[code], (*shape, 2)
    if code == "F4":  # torch counts pairs, safetensors single elements
        return code, (*shape[:-1], shape[-1] * 2) if shape else (2,)
    return ("U8" if code == "JSON" else code), shape


_SAFETENSORS = {code for code in DTYPES if stored_form(code, ())[0] == code}  # not JSON, nor C32 and C128


class Box(NamedTuple):
    """A rectangular part of a tensor: `offset` and `size` in each dimension."""

    offset: Shape
    size: Shape

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where it is empty."""
        low = tuple(map(max, self.offset, other.offset))
        high = tuple(min(o + s, p + t) for o, s, p, t in zip(*self, *other))
        size = tuple(h - lo for h, lo in zip(high, low))
        return Box(low, size) if all(s > 0 for s in size) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in an array that holds `outer`."""
        return tuple(slice(o - p, o - p + s) for o, s, p in zip(self.offset, self.size, outer.offset))

    def span(self, outer: Box) -> tuple[int, int]:
        """Positions of its first element, and behind its last one, in the row-major elements of `outer`."""
        first, last = 0, 0
        for at, size, start, count in zip(*outer, *self):
            first, last = first * size + start - at, last * size + start - at + count - 1
        return first, last + 1


def whole_box(shape: Shape) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def row_boxes(shape: Shape, start: int, stop: int) -> list[tuple[int, Box]]:
    """Cover elements [start, stop) of a row-major array by boxes: (position of the first element, box).

    They come in order, at most 2 * ndim - 1: a ragged head and tail in each dimension, whole rows between.
    """
    if not shape:
        return [(0, Box((), ()))][start:stop]
    rows = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # elements to a step in each dimension
    found = []
    while start < stop:  # as many as fit of the longest rows that begin at `start`
        dim = next(dim for dim, row in enumerate(rows) if start % row == 0 and start + row <= stop)
        offset = tuple(start // row % size for row, size in zip(rows, shape))
        count = min((stop - start) // rows[dim], shape[dim] - offset[dim])
        found.append((start, Box(offset, (1,) * dim + (count, *shape[dim + 1 :]))))
        start += count * rows[dim]
    return found


def not_covered_once(tensors: Sequence[TensorMetadata], tensor: Ints, box: Ints) -> list[int]:
    """The tensors that boxes do not cover exactly once: their indices, in order.

    `box` is (rows, 2, dimensions), offset and size, padded with 0 and 1; `tensor` is the index of each row's
    tensor. A tied tensor has no boxes. Time and memory are linear in tensors and boxes.

    Each index of a dimension has a random weight. If boxes cover a tensor once, then the products of weights,
    summed over the elements of all boxes, add up to the sum over the whole. For four elements with weights a
    to d: boxes [0, 2) and [2, 4) give (a + b) + (c + d), as the whole does; [0, 2) and [1, 4) give b twice.
    Wrong boxes pass with a probability of about 2^-60, in any number of dimensions: sums are taken modulo two
    primes (the lemma of Schwartz and Zippel). Modulo 2^64 each dimension would lose a bit.
    """
    width, bare = box.shape[2], {n for n, t in enumerate(tensors) if t.alias_of is None and 0 not in t.shape}
    used, tensor = np.unique(tensor, return_inverse=True)  # memory for these alone
    bare -= (indices := set(used.tolist()))
    columns = itertools.zip_longest((1,) * width, *(tensors[n].shape for n in sorted(indices)), fillvalue=1)
    whole: Ints = np.array([*columns], np.int64).reshape(width, len(used) + 1).T[1:]
    low, size = box[:, 0], box[:, 1]
    most = whole[tensor] - size
    wrong = np.zeros(len(used), bool)
    wrong[tensor[((low < 0) | (size <= 0) | (most < 0) | (low > most)).any(axis=1)]] = True
    tied = np.array([tensors[n].alias_of is not None for n in used.tolist()], bool)
    for seed, prime in enumerate(((1 << 31) - 1, (1 << 31) - 19)):

        def weight(low: Ints, high: Ints) -> Ints:
            """The sum of weights in each box: in each dimension those before its end less those before it."""
            product = np.ones(len(low), np.int64)
            for dim in range(width):
                until, before = (_mixed(end[:, dim], 64 * seed + dim) % prime for end in (high, low))
                product = product * ((until.astype(np.int64) - before.astype(np.int64)) % prime) % prime
            return product

        found = np.zeros(len(used), np.int64)
        np.add.at(found, tensor, weight(low, low + size))
        wrong |= found % prime != np.where(tied, 0, weight(np.zeros_like(whole), whole))
    return sorted(bare.union(used[wrong].tolist()))


def _mixed(values: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """64 random bits for each value, the same in each run: SplitMix64 (Steele, Lea and Flood, 2014)."""
    bits = values.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def byte_view(tensor: torch.Tensor) -> Bytes | None:
    """The memory of a contiguous CPU tensor as bytes; None if elsewhere, strided, empty or lazily conjugated.

    Made from the address, in a fourth of the time of torch's views: it is valid while the caller keeps the
    tensor.
    """
    plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if not plain or not tensor.nbytes:
        return None
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memoryview(memory), np.uint8)


def _in_boxes(
    data: Bytes, start: int, dtype: torch.dtype, shape: Shape
) -> Iterator[tuple[Box, torch.Tensor]]:
    """Row-major bytes of an array, from byte `start` on, as boxes of the array, each with its elements."""
    width = dtype.itemsize
    for at, box in row_boxes(shape, start // width, (start + len(data)) // width):
        low = at * width - start
        yield box, torch.from_numpy(data[low : low + math.prod(box.size) * width]).view(dtype).view(box.size)


@torch.no_grad()
def copy_out(tensor: torch.Tensor, start: int, out: Bytes) -> None:
    """Copy the row-major bytes of `tensor` (any strides, any device) from byte `start` into `out`."""
    whole = whole_box(tuple(tensor.shape))
    for box, elements in _in_boxes(out, start, tensor.dtype, whole.size):
        elements.copy_(tensor[box.within(whole)])


@torch.no_grad()
def copy_in(data: Bytes, start: int, dtype: torch.dtype, piece: Box, want: Box, target: torch.Tensor) -> None:
    """Put the row-major bytes of `piece` from byte `start` where they fall into `want`, which `target` holds.

    `data` has elements of `dtype`; a target of another dtype gets them cast.
    """
    if data.ctypes.data % dtype.itemsize:  # torch ends the process where complex128 is not aligned
        data = data.copy()
    for part, elements in _in_boxes(data, start, dtype, piece.size):
        inside = Box(tuple(map(operator.add, piece.offset, part.offset)), part.size)
        if (common := inside.intersect(want)) is not None:
            target[common.within(want)].copy_(elements[common.within(inside)])


# ----------------------------------------------------------------------------------------------------------
# CRC32, compression, threads

# Libraries with zlib's functions. The first two use vector instructions.
for _name in ("isal.isal_zlib", "zlib_ng.zlib_ng", "zlib"):
    with contextlib.suppress(ImportError):
        _FAST_ZLIB = importlib.import_module(_name)
        break
CRC_PROVIDER = _name.partition(".")[0]
crc32: Callable[..., int] = _FAST_ZLIB.crc32


class CompressionLevel(enum.Enum):
    """How hard to compress: NONE, FAST (little more than entropy coding), BALANCED, MAXIMUM."""

    NONE = "none"
    FAST = "fast"
    BALANCED = "balanced"
    MAXIMUM = "maximum"


# Module, depth (zlib's level), strategy; the last way also compresses the sample. Entropy coding is fast, and
# gives all that can be had from the exponents of weights. ISA-L, which knows no strategies, looks for matches
# too, and still takes half the time of zlib.
_ENTROPY_ONLY = (zlib, 1, zlib.Z_HUFFMAN_ONLY)
_FAST = (_FAST_ZLIB, 1, zlib.Z_DEFAULT_STRATEGY if CRC_PROVIDER == "isal" else zlib.Z_HUFFMAN_ONLY)
_WAYS = {
    CompressionLevel.FAST: (_FAST,),
    CompressionLevel.BALANCED: (_ENTROPY_ONLY, (zlib, 6, zlib.Z_DEFAULT_STRATEGY)),
    CompressionLevel.MAXIMUM: (_ENTROPY_ONLY, (zlib, 9, zlib.Z_DEFAULT_STRATEGY)),
}


def _deflate(data: bytes, level: CompressionLevel) -> bytes:
    """`data` compressed in the best way of the level, or as it is where it does not shrink.

    Below MAXIMUM, data over 64 KiB of which a sample does not shrink by 2 % stay as they are.
    """

    def packed(part: bytes, module: types.ModuleType, depth: int, strategy: int) -> bytes:
        stream = module.compressobj(depth, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
        return bytes(stream.compress(part) + stream.flush())

    if level is not CompressionLevel.MAXIMUM and len(data) > 1 << 16:
        sample = data[len(data) // 2 :][: 1 << 14]
        if len(packed(sample, *_WAYS[level][-1])) > 0.98 * len(sample):
            return data
    return min([data, *(packed(data, *way) for way in _WAYS[level])], key=len)


def compress_frame(data: Bytes, width: int, level: CompressionLevel) -> bytes:
    """Compress one frame of elements of `width` bytes. A frame as long as its input is the input, raw.

    Else: u8 number of planes P (1 or `width`), P times u32 stored length, the planes. Plane i holds byte i of
    every element, since the exponents of neighbouring weights are alike while their mantissas are noise; a
    plane as long as its share is raw. The idea is Blosc's shuffle filter.
    """
    found = [data.tobytes()]
    for count in {1, width} if level is CompressionLevel.MAXIMUM else {width}:
        planes = [_deflate(plane.tobytes(), level) for plane in data.reshape(-1, count).T]
        found.append(b"".join([struct.pack(f"<B{count}I", count, *map(len, planes)), *planes]))
    return min(found, key=len)


def expand_frame(data: bytes, length: int, width: int) -> Bytes:
    """Inverse of `compress_frame` for a frame that has shrunk; takes memory for `length` bytes."""
    try:
        count = data[0]
        require(count in (1, width), f"{count} planes")
        sizes, at = struct.unpack_from(f"<{count}I", data, 1), 1 + 4 * count
        require(at + sum(sizes) == len(data), "frame of another length than declared")
        out = np.empty((length // count, count), np.uint8)
        for plane, size in zip(out.T, sizes):
            stored = data[at : at + size]
            plane[:] = np.frombuffer(stored if size == len(plane) else inflate(stored, len(plane)), np.uint8)
            at += size
    except (ValueError, IndexError, struct.error) as error:
        raise corrupted(f"compressed frame is damaged: {error}") from error
    return out.reshape(-1)


def inflate(data: bytes, length: int) -> bytes:
    """`data` inflated; takes memory for `length` bytes. ValueError unless it is a stream of as many."""
    stream = _FAST_ZLIB.decompressobj()
    try:
        found: bytes = stream.decompress(data, length + 1)
    except _FAST_ZLIB.error as error:
        raise ValueError(f"does not inflate: {error}") from error
    require(
        stream.eof and not stream.unused_data and len(found) == length,
        f"inflates to other than {length} bytes",
    )
    return found


SUM_WORDS = 4 << 20  # of eight bytes, that a device sums up at a time


def device_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum of 64 bits of a tensor's row-major bytes, computed on its device.

    A CRC32 would need all of the bytes on the CPU. This is the sum of all words of eight bytes modulo 2^64,
    each times an odd random weight of its position.
    """
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    total, tail = data.new_zeros((), dtype=torch.int64), -len(data) % 8
    if tail or data.storage_offset() % 8:
        data = torch.cat((data, data.new_zeros(tail)))
    words = data.view(torch.int64)
    for start in range(0, len(words), SUM_WORDS):
        part = words[start : start + SUM_WORDS]
        weight = torch.arange(start, start + len(part), device=part.device)
        for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):  # those of `_mixed`, as signed numbers
            weight = weight * factor
            weight ^= (weight >> 29) & 0x7FFFFFFFF
        total += (part * (weight | 1)).sum()
    return total


def cuda_in_use() -> bool:
    """Whether this process has initialised CUDA; the question does not initialise it."""
    return bool(getattr(torch.cuda, "is_initialized")())  # torch does not type it


def aligned_buffer(length: int) -> Bytes:
    """Memory for I/O, at least page-aligned, so that device copies and direct I/O are fast.

    Pinned where CUDA is in use. Else in huge pages where the system has them: then a transfer is few long
    segments instead of one for each page of 4 KiB, which virtual disks take many times longer for. After a
    fork the child finds zeros in it: copy-on-write would take as much memory again, and could lose what
    direct I/O reads.
    """
    if cuda_in_use():
        pinned: Bytes = torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned
    memory = mmap.mmap(-1, length + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, _MADV_WIPEONFORK):
        with contextlib.suppress(OSError):  # a kernel without it
            memory.madvise(advice)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE_BYTES
    return whole[start : start + length]


class Gate:
    """Lets the workers of an operation touch live tensors, or a file, until the operation is over.

    A read may hang, and return long after its operation has failed and another one has filled the tensors. So
    a worker copies only inside `with gate:`, and `close` waits for the copies under way (one read each)
    before it returns.
    """

    def __init__(self) -> None:
        self._changed, self._inside, self.is_open = threading.Condition(), 0, True

    def __enter__(self) -> None:
        with self._changed:
            if not self.is_open:
                raise OSError(errno.ECANCELED, "the operation is over")
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            if not self.is_open:
                self._changed.notify_all()

    def close(self, timeout_s: float | None = None) -> bool:
        """Refuse to let threads in, and wait for those inside; False if some remain after `timeout_s`."""
        with self._changed:
            self.is_open = False
            return self._changed.wait_for(lambda: not self._inside, timeout_s)


def in_parallel(
    items: Iterable[T],
    work: Callable[[T, Bytes], None],
    poll: Callable[[], None] = lambda: None,
    most: int = IO_THREADS,
    gate: Gate | None = None,
) -> None:
    """Run `work(item, buffer)` for each item (None is not allowed), on up to `most` threads.

    Each thread has a buffer of `2 * BLOCK_BYTES`. `poll` runs in the calling thread some 20 times a second,
    and may raise to stop. The first error of any thread is raised once `gate` is closed.
    """
    source, lock, errors, gate = iter(items), threading.Lock(), list[BaseException](), gate or Gate()

    def drain() -> None:
        try:
            buffer = aligned_buffer(2 * BLOCK_BYTES)
            while gate.is_open:
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item, buffer)
        except BaseException as error:
            errors.append(error)
            gate.is_open = False

    names = [f"ckpt-io-{number}" for number in range(min(most, IO_THREADS))]
    workers = [threading.Thread(target=drain, name=name, daemon=True) for name in names]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive() and not errors:
                worker.join(0.05)
                poll()
    finally:
        gate.close()
        end = time.monotonic() + STUCK_S
        for worker in workers:
            if worker.ident is not None:
                worker.join(end - time.monotonic())
    if errors:
        raise errors[0]


# ----------------------------------------------------------------------------------------------------------
# The tensor file


class Entry(NamedTuple):
    """One entry of a safetensors file: what its header says of it."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


_HEADER_START = (
    '{"__metadata__":{"format":"pt",'
    f'"ckpt_version":"{FORMAT_VERSION}","unit_bytes":"{UNIT_BYTES}","crc32":"'
).encode()
_CRC_AT = 8 + len(_HEADER_START)  # where the hex digits of the unit CRCs begin


def unit_count(data_bytes: int) -> int:
    """How many units that many bytes of data take; the last may be short."""
    return -(-data_bytes // UNIT_BYTES)


def encode_header(entries: Iterable[Entry], data_bytes: int, header_bytes: int = 0) -> bytes:
    """A tensor file's bytes up to its data, at least `header_bytes` long, with zeros for the unit CRCs.

    A gap between entries becomes an entry named `pad/<begin>`. ValueError for a header that safetensors
    readers refuse.
    """
    table, position = dict[str, object](), 0
    for name, dtype, shape, begin, end in entries:
        require(begin >= position, f"{name!r} overlaps the entry before it")
        if begin > position:
            offsets = [position, begin]
            table[f"pad/{position}"] = {"dtype": "U8", "shape": [begin - position], "data_offsets": offsets}
        if name == "__metadata__":
            raise ValueError(
                "a safetensors file cannot hold a tensor named '__metadata__', a name that it uses itself: "
                "rename it, or save with CheckpointFormat.MULTI_SHARD, which names it 'model/__metadata__'"
            )
        require(name not in table, f"two entries of one file would be named {name!r}")
        table[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}
        position = end
    digits = b"0" * (8 * unit_count(data_bytes))
    text = _HEADER_START + digits + b'"}' + (b"," + dump_json(table)[1:] if table else b"}")
    length = max(header_bytes, -(-(8 + len(text)) // ALIGN_BYTES) * ALIGN_BYTES)
    require(
        length - 8 <= MAX_HEADER_BYTES,
        f"a tensor file's header would take {length} bytes, more than the {MAX_HEADER_BYTES} that "
        "safetensors readers accept; save with CheckpointFormat.MULTI_SHARD, which spreads the tensors "
        "over one file a rank",
    )
    return struct.pack("<Q", length - 8) + text.ljust(length - 8)


def with_crcs(header: bytes, crcs: Iterable[int]) -> bytes:
    """A header with its unit CRCs in place of the zeros."""
    digits = b"".join(b"%08x" % crc for crc in crcs)
    return b"".join((header[:_CRC_AT], digits, memoryview(header)[_CRC_AT + len(digits) :]))


def unit_crcs(header: bytes, data_bytes: int) -> list[int]:
    """The unit CRCs that a header holds; ValueError for a header that `encode_header` cannot have made."""
    digits = header[_CRC_AT : _CRC_AT + 8 * unit_count(data_bytes)]
    crcs: list[int] = np.frombuffer(bytes.fromhex(digits.decode()), ">u4").tolist()
    start = struct.pack("<Q", len(header) - 8) + _HEADER_START
    require(with_crcs(start, crcs) == header[: _CRC_AT + len(digits)], "not a header of this version")
    return crcs


def parse_entries(table: Fields, data_bytes: int) -> list[Entry]:
    """The entries of any safetensors header, in the order of their bytes.

    ValueError where it breaks the rules of the format: holes, overlaps, other sizes than dtype and shape say.
    """
    items = [(name, table.child(name)) for name in table.all if name != "__metadata__"]
    found, position = list[Entry](), 0
    for name, item in sorted(items, key=lambda pair: pair[1].shape("data_offsets")):
        (begin, end), dtype, shape = item.shape("data_offsets"), item.text("dtype"), item.shape("shape")
        require(begin == position, f"hole or overlap at byte {position} of the data, before {name!r}")
        require(dtype in _SAFETENSORS, f"{name!r}: unknown dtype {dtype!r}")
        if dtype == "F4" and shape:  # torch counts pairs, safetensors single elements
            shape = (*shape[:-1], shape[-1] // 2)
        fits = math.prod(shape) * itemsize(dtype) == end - begin
        require(fits, f"{name!r}: {dtype} of shape {[*shape]} in {end - begin} bytes")
        found.append(Entry(name, dtype, shape, begin, end))
        position = end
    require(position == data_bytes, f"entries end at byte {position} of {data_bytes} bytes of data")
    return found


# ----------------------------------------------------------------------------------------------------------
# The record


class ShardMetadata(NamedTuple):
    """One tensor file of a checkpoint."""

    file: str  # its name in the checkpoint's directory
    length: int  # bytes
    header_bytes: int  # up to the data
    header_crc: int


class TensorMetadata(NamedTuple):
    """One tensor, or value, of a checkpoint.

    A value that is not a tensor has the dtype "JSON", and its bytes as shape.
    """

    name: str
    dtype: str
    shape: Shape  # global
    rank: int | None = None  # the rank that it is kept for, or the lowest of the mesh; None: one for all
    alias_of: int | None = None  # index of the tensor that it is tied to, which holds the bytes


class Pieces(NamedTuple):
    """Pieces in columns, a row each: the table of a plan and of the record, sorted by tensor and offset."""

    tensor: Ints  # index
    file: Ints  # index; while a save is planned: the rank that holds it
    begin: Ints  # in the file's data
    length: Ints  # bytes as stored: fewer than the box has where compressed
    box: Ints  # (rows, 2, dimensions): offset and size, padded with 0 and 1 for tensors of fewer dimensions

    def take(self, index: Ints | npt.NDArray[np.bool_] | slice) -> Pieces:
        """The rows at `index`."""
        return Pieces(*[column[index] for column in self])

    def nbytes(self, itemsizes: Ints) -> Ints:
        """Bytes of each row's box."""
        sizes: Ints = self.box[:, 1].prod(axis=1) * itemsizes[self.tensor]
        return sizes

    def boxes(self, tensors: Sequence[TensorMetadata]) -> Iterator[tuple[int, int, int, Box]]:
        """The rows as (tensor, begin, length, box)."""
        for index, begin, length, (offset, size) in zip(
            *(c.tolist() for c in (self.tensor, self.begin, self.length, self.box))
        ):
            ndim = len(tensors[index].shape)
            yield index, begin, length, Box(tuple(offset[:ndim]), tuple(size[:ndim]))


@dataclass(frozen=True)
class CheckpointMetadata:
    """The record, parsed. While a save is under way: its plan, with lengths and CRCs yet to come."""

    prefix: str
    save_id: str
    sequence: int  # orders checkpoints, instead of clocks
    world_size: int
    format: str  # a value of `CheckpointFormat`; "safetensors": files of other programs, see ckpt.py
    compression: str
    torch_version: str
    timestamp: str  # ISO 8601, UTC
    custom_metadata: Mapping[str, object] = field(repr=False)
    shards: tuple[ShardMetadata, ...] = field(repr=False)
    tensors: tuple[TensorMetadata, ...] = field(repr=False)
    pieces: Pieces = field(repr=False)
    version: int = FORMAT_VERSION

    def shard_path(self, index: int) -> str:
        return f"{self.prefix}/{self.shards[index].file}"

    def size_bytes(self) -> int:
        return sum(shard.length for shard in self.shards)

    def entries(self, index: int) -> list[Entry]:
        """What the header of a tensor file says, as the record has it: a whole file's empty tensors too."""
        name, empty = self.shards[index].file, list[tuple[int, int, int, Box]]()
        whole, in_model = "-of-" not in name, name == whole_file_name(self.save_id, "model")
        if whole:
            inside = in_model_file(self.tensors) if in_model else range(len(self.tensors))
            for n, t in enumerate(self.tensors):
                if 0 in t.shape and t.alias_of is None and n in inside:
                    empty.insert(0, (n, 0, 0, whole_box(t.shape)))
        rows = self.pieces.take(self.pieces.file == index)
        rows = rows.take(np.argsort(rows.begin, kind="stable"))
        packed, found = self.compression != "none" and not whole, list[Entry]()
        for tensor, begin, length, box in itertools.chain(empty, rows.boxes(self.tensors)):
            t = self.tensors[tensor]
            dtype, shape = ("U8", (length,)) if packed else stored_form(t.dtype, box.size)
            found.append(Entry(entry_name(t, box, in_model), dtype, shape, begin, begin + length))
        return found


def lowest_ranks(tensors: Iterable[TensorMetadata]) -> dict[str, int | None]:
    """Map each name to the lowest rank that has a copy of its own: that copy is used where only one can be.

    None for a tensor that is kept for all ranks.
    """
    return {t.name: t.rank for t in sorted(tensors, key=lambda t: t.rank or 0, reverse=True)}


def in_model_file(tensors: Sequence[TensorMetadata]) -> set[int]:
    """The tensors of CONSOLIDATED's model file: those of the model, of a dtype of safetensors.

    Of a tensor that is kept per rank, the lowest rank's.
    """
    lowest = lowest_ranks(t for t in tensors if t.name.startswith("model/"))
    return {n for n, t in enumerate(tensors) if lowest.get(t.name, -1) == t.rank and t.dtype in _SAFETENSORS}


def entry_name(tensor: TensorMetadata, box: Box, in_model: bool = False) -> str:
    """The name of a piece in its file, for a human reader: tensor, offset, and rank that it is kept for."""
    if in_model:
        return tensor.name.removeprefix("model/")
    name = tensor.name.replace("~", "~0").replace("@", "~1")
    place = "" if box.size == tensor.shape else "@" + ",".join(map(str, box.offset))
    return name + place + ("" if tensor.rank is None else f"~r{tensor.rank}")


def pack_ints(column: Ints) -> str:
    """A column of integers as text: the differences of its little-endian int64 values, deflated, in base64.

    Regular sharding has regular differences: a table of millions of pieces takes a few hundred kilobytes.
    """
    steps = np.diff(np.asarray(column, "<i8"), prepend=np.int64(0))
    return _base64(zlib.compress(steps.tobytes(), 1))


def unpack_ints(text: str, count: int) -> Ints:
    """Inverse of `pack_ints`. ValueError unless it gives `count` integers, in no more memory than theirs."""
    data = inflate(base64.b64decode(text, validate=True), 8 * count)
    return np.cumsum(np.frombuffer(data, "<i8"), dtype=np.int64)


def pack_pieces(pieces: Pieces) -> dict[str, object]:
    """Pieces as JSON: their number, and a text for each column."""
    columns = pieces._asdict()
    box = columns.pop("box")
    boxes = {name: list(map(pack_ints, box[:, half].T)) for half, name in enumerate(("offset", "size"))}
    return {"count": len(box), **{name: pack_ints(column) for name, column in columns.items()}, **boxes}


def unpack_pieces(table: Fields) -> Pieces:
    """Inverse of `pack_pieces`. ValueError for a malformed table."""
    count, offset, size = table.number("count"), table.texts("offset"), table.texts("size")
    require(len(offset) == len(size) <= 64, "offsets and sizes of other dimensions")
    texts = (*map(table.text, ("tensor", "file", "begin", "length")), *offset, *size)
    tensor, file, begin, length, *boxes = (unpack_ints(text, count) for text in texts)
    box = np.array(boxes, np.int64).reshape(2, len(offset), count).transpose(2, 0, 1)
    return Pieces(tensor, file, begin, length, box)


def encode_record(meta: CheckpointMetadata) -> bytes:
    """The record's bytes; `decode_record` is the inverse."""
    keys = "save_id sequence world_size format compression torch_version timestamp"
    body = {
        "format_version": meta.version,
        **{key: vars(meta)[key] for key in keys.split()},
        "custom_metadata": encode_value(dict(meta.custom_metadata), "custom_metadata"),
        **encode_tables(meta),
    }
    text = dump_json(body)[:-1]
    return text + _seal(text)


def encode_tables(meta: CheckpointMetadata) -> dict[str, object]:
    """The files, tensors and pieces of a record, or a plan, as JSON."""
    return {
        "files": [[s.file, s.length, s.header_bytes, f"{s.header_crc:08x}"] for s in meta.shards],
        "tensors": [[*t] for t in meta.tensors],
        "pieces": pack_pieces(meta.pieces),
    }


def _seal(text: bytes) -> bytes:
    """The last field of a record, and its end."""
    return b',"crc32":"%08x"}\n' % crc32(text)


def _unseal(data: bytes) -> bytes | None:
    """A record without its last field; None unless C1 holds."""
    text = data[: -len(_seal(b""))]
    return text if data[len(text) :] == _seal(text) else None


def decode_record(data: bytes, prefix: str, storage: CheckpointStorage | None = None) -> CheckpointMetadata:
    """Parse a record: C1 to C3, and C4 where `storage` is given, before memory is taken for the pieces.

    CORRUPTED_CHECKPOINT or INCOMPATIBLE_VERSION for a record that is not as it should be.
    """
    path = record_name(prefix)
    if (text := _unseal(data)) is None:  # C1
        raise corrupted(f"{path}: the record fails its CRC32; the checkpoint is damaged", path)
    try:
        body = Fields(parse_json(text + b"}", path))
        version = body.number("format_version")
        if version != FORMAT_VERSION:  # C2
            message = f"{path}: written in format version {version}; this code reads version {FORMAT_VERSION}"
            raise CheckpointException(message, path, ExceptionType.INCOMPATIBLE_VERSION)
        custom = decode_value(body.child("custom_metadata").all, str)  # C3
        timestamp, compression = body.text("timestamp"), body.text("compression")
        datetime.datetime.fromisoformat(timestamp)
        shards = tuple(map(_decode_file, body.array("files")))
        require(len({shard.file for shard in shards}) == len(shards), "a file is named twice")
        save_id = body.text("save_id")
        require(all(shard.file[:8] == save_id for shard in shards), "a file of another save")
        tensors = decode_tensors(body.array("tensors"))
        if storage is not None:  # C4
            for shard in shards:
                file = f"{prefix}/{shard.file}"
                if (found := storage.length(file)) != shard.length:
                    what = "is missing" if found is None else f"has {found} bytes"
                    raise corrupted(f"{file}: {what}, the record says {shard.length} bytes", prefix)
        return CheckpointMetadata(
            prefix=prefix,
            save_id=save_id,
            sequence=body.number("sequence"),
            world_size=body.number("world_size"),
            format=body.text("format"),
            compression=compression,
            torch_version=body.text("torch_version"),
            timestamp=timestamp,
            custom_metadata=typed(custom, dict, "custom_metadata"),
            shards=shards,
            tensors=tensors,
            pieces=_decode_pieces(body.child("pieces"), shards, tensors, compression != "none"),
        )
    except (ValueError, TypeError, OverflowError, IndexError, RecursionError, MemoryError) as error:
        raise corrupted(f"{path}: malformed record: {error}", path) from error


def _decode_file(row: object) -> ShardMetadata:
    name, length, header_bytes, crc = typed(row, list, "a file")
    require(_FILE.fullmatch(name), f"illegal file {name!r:.100}")
    int_tuple([length, header_bytes], name)
    fits = 8 <= header_bytes <= min(length, 8 + MAX_HEADER_BYTES)
    require(fits, f"a header of {header_bytes} bytes in {length}")
    require(re.fullmatch("[0-9a-f]{8}", crc), "malformed CRC32")
    return ShardMetadata(name, length, header_bytes, int(crc, 16))


def decode_tensors(rows: Sequence[object]) -> tuple[TensorMetadata, ...]:
    """The tensors of a record. ValueError for a malformed row."""
    found, sizes, indices = list[TensorMetadata](), list[object](), list[object]()
    for row in rows:
        if (
            type(row) is not list
            or len(row) != 5
            or str(row[1]) not in DTYPES
            or type(row[2]) not in (list, tuple)
        ):
            what = f"malformed, or of a dtype unknown to torch {torch.__version__}"
            raise ValueError(f"tensor {row!r:.100}: {what}")
        name, dtype, shape, rank, alias_of = row
        found.append(TensorMetadata(typed(name, str, "a name"), dtype, tuple(shape), rank, alias_of))
        sizes += shape
        indices += (rank, alias_of)
    int_tuple(sizes, "shapes", 64 * len(rows))  # all at once, which takes a third of the time
    int_tuple([n for n in indices if n is not None], "ranks and tied tensors", 2 * len(rows))
    large = [t.name for t in found if len(t.shape) > 64 or math.prod(t.shape) >= 1 << 57]
    require(not large, f"too large: {some(large)}")
    tied = [t.alias_of for t in found if t.alias_of is not None]
    require(all(target < len(found) and found[target].alias_of is None for target in tied), "tied to nothing")
    like = all(t.alias_of is None or t[1:3] == found[t.alias_of][1:3] for t in found)
    require(like and len({(t.name, t.rank) for t in found}) == len(found), "tied to another kind, or twice")
    return tuple(found)


_MOST_INFLATION = 1032  # bytes that deflate can make of one


def _decode_pieces(
    table: Fields, shards: Sequence[ShardMetadata], tensors: Sequence[TensorMetadata], packed: bool
) -> Pieces:
    """The pieces, checked: each lies in its file and its tensor, and they hold each element once."""
    count = table.number("count")
    few = count * MIN_ROW_BYTES <= sum(shard.header_bytes for shard in shards)
    require(few, f"{count} pieces in so few headers")
    tensor, file, begin, length, box = pieces = unpack_pieces(table)
    dimensions = max((len(t.shape) for t in tensors), default=0)
    require(box.shape[2] == dimensions, "boxes of other dimensions than the tensors")
    for numbers, end in ((tensor, len(tensors)), (file, len(shards))):
        require(((numbers >= 0) & (numbers < end)).all(), "pieces of unknown tensors or files")
    require((np.diff(tensor) >= 0).all(), "pieces in another order than the tensors")
    data_bytes = np.array([shard.length - shard.header_bytes for shard in shards], np.int64)
    last = data_bytes[file] - length  # the last place where the piece fits
    inside = (length > 0) & (begin >= 0) & (begin <= last)
    require(inside.all(), "a piece outside of its file")
    require((np.bincount(file, length, len(shards)) <= data_bytes).all(), "pieces that share their bytes")
    if wrong := not_covered_once(tensors, tensor, box):
        raise ValueError(f"{tensors[wrong[0]].name}: its pieces do not hold each of its elements once")
    nbytes = pieces.nbytes(widths := itemsizes(tensors))
    most = _MOST_INFLATION * length if packed else length
    require(((length <= nbytes) & (nbytes <= most)).all(), "piece of another length than its box")
    aligned = (length == nbytes) & (begin % widths[tensor] == 0)  # else a reader needs it whole, in a buffer
    require((aligned | (nbytes <= BLOCK_BYTES)).all(), "a piece over 4 MiB, compressed or not aligned")
    return pieces


# ----------------------------------------------------------------------------------------------------------
# Committed, and what follows from it


def read_file(storage: CheckpointStorage, name: str, sealed: bool = False) -> bytes:
    """All bytes of a file; FileNotFoundError where there is none. `sealed`: it must end as a record does."""
    with contextlib.closing(storage.open(name)) as file:
        length, end = file.length(), bytearray(len(_seal(b"")))
        if sealed and length > len(end):  # before memory is taken
            file.read(length - len(end), memoryview(end))
            if end[-2:] != b"}\n":
                raise corrupted(f"{name}: does not end as a record", name)
        try:
            file.read(0, memoryview(data := bytearray(length)))
        except MemoryError as error:
            raise corrupted(f"{name}: has {length} bytes, more than fit into memory", name) from error
    return bytes(data)


def read_committed(storage: CheckpointStorage, prefix: str) -> CheckpointMetadata:
    """The record of a committed checkpoint: C1 to C4 hold. Any process, at any time.

    ValueError for an illegal prefix; FileNotFoundError where no checkpoint exists; CORRUPTED_CHECKPOINT,
    INCOMPATIBLE_VERSION or STORAGE_ERROR where one exists that is not intact.
    """
    return read_committed_record(storage, prefix)[1]


def read_committed_record(storage: CheckpointStorage, prefix: str) -> tuple[bytes, CheckpointMetadata]:
    """The same, and the bytes that it was decoded from, for other ranks to decode."""
    name = record_name(check_prefix(prefix))
    text = read_file(storage, name, sealed=True)
    for _ in range(10):  # a save may overwrite it meanwhile: then its files go
        try:
            return text, decode_record(text, prefix, storage)
        except CheckpointException:
            before, text = text, read_file(storage, name, sealed=True)
            if text == before:
                raise
    return text, decode_record(text, prefix, storage)


_RECORD_HEAD = re.compile(
    rb'\{"format_version":([0-9]{1,9}),"save_id":"([0-9a-f]{8})","sequence":([0-9]{1,19}),'
)


class RecordHead(NamedTuple):
    """The first fields of a record of any version."""

    version: int
    save_id: str
    sequence: int


def record_head(storage: CheckpointStorage, prefix: str, sound: bool = True) -> RecordHead | None:
    """The head of a record, without parsing it whole; None where there is none, or C1 does not hold.

    Not `sound`: the head also where C1 does not hold, if it can be read. An OSError where the record
    cannot be read, a STORAGE_ERROR where it is a link.
    """
    try:
        data = read_file(storage, record_name(prefix), sealed=sound)
    except FileNotFoundError:
        return None
    except CheckpointException as error:
        if error.type is ExceptionType.STORAGE_ERROR:
            raise
        return None
    head = _RECORD_HEAD.match(data)
    if head is None or (sound and _unseal(data) is None):
        return None
    return RecordHead(int(head[1]), head[2].decode(), int(head[3]))


@contextlib.contextmanager
def skipping(what: str, warn: Warn) -> Iterator[None]:
    """Turn what is wrong with one checkpoint among several into a warning: it must not stop the rest."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        if not isinstance(error, FileNotFoundError):  # gone meanwhile
            warn(f"skipped {what}: {error}")


def _walk(storage: CheckpointStorage, warn: Warn, directory: str = "") -> Iterator[str]:
    """Every file, and links in place of records. A warning for other links and unreadable directories."""
    for name in storage.names(directory):
        path = name.removesuffix("/")
        if path == name or path.endswith(RECORD_SUFFIX):
            yield path
        elif _is_prefix(path):
            with skipping(path, warn):
                yield from _walk(storage, warn, path)


def recorded_prefixes(storage: CheckpointStorage, warn: Warn = log.warning) -> list[str]:
    """Every prefix that has a record, intact or not."""
    names = (name for name in _walk(storage, warn) if name.endswith(RECORD_SUFFIX))
    return list(filter(_is_prefix, (name.removesuffix(RECORD_SUFFIX) for name in names)))


def list_committed(storage: CheckpointStorage, warn: Warn = log.warning) -> list[CheckpointMetadata]:
    """Every committed checkpoint, oldest first. A warning for those that are damaged or unreadable."""
    found = []
    for prefix in recorded_prefixes(storage, warn):
        with skipping(prefix, warn):
            found.append(read_committed(storage, prefix))
    return sorted(found, key=lambda meta: (meta.sequence, meta.timestamp, meta.prefix))


def save_files(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The tensor files and fences among some files: prefix, save id, name."""
    for name in names:
        if (m := _FILE_PATH.fullmatch(name) or _FENCE.fullmatch(name)) and _is_prefix(m[1]):
            yield m[1], m[2], name


def tensor_files(storage: CheckpointStorage, prefix: str) -> Iterator[tuple[str, str]]:
    """The tensor files in the directory of a prefix: save id, name."""
    return ((i, name) for owner, i, name in save_files(storage.names(prefix)) if owner == prefix)


def _is_ours(storage: CheckpointStorage, name: str) -> bool:
    """Whether a save of this library, of any version, has begun this file: its header comes last, over zeros.

    False for a file that is gone.
    """
    try:
        with contextlib.closing(storage.open(name)) as file:
            file.read(0, memoryview(head := bytearray(min(ALIGN_BYTES, file.length()))))
    except FileNotFoundError:
        return False
    return not any(head) or b'"ckpt_version"' in head


def delete_committed(storage: CheckpointStorage, prefix: str) -> None:
    """Delete a checkpoint backwards: the record, made durable, then its files. Safe to repeat after a crash.

    FileNotFoundError where there is nothing. Files of a save under way, which has a fence, are left alone.
    """
    files = list(tensor_files(storage, check_prefix(prefix)))  # first: no file is older than its fence
    live = {i for i, _ in files if storage.length(fence_name(prefix, i)) is not None}
    existed = storage.delete(record_name(prefix))
    if existed or files:  # an earlier call may have crashed before its sync
        storage.sync_directory(record_name(prefix))
    dead = [name for save_id, name in files if save_id not in live]
    if not existed:  # without a record, these may be files of another program
        dead = [name for name in dead if _is_ours(storage, name)]
    if not existed and not dead:
        raise FileNotFoundError(f"no checkpoint {prefix!r}")
    for name in dead:
        storage.delete(name)


def collect_garbage(storage: AnyStorage, min_age_s: float = 86400.0, warn: Warn = log.warning) -> list[str]:
    """Remove what crashed saves and deletes left behind, and return its names. Any process, at any time.

    A save whose fence is younger than `min_age_s` seconds counts as alive: its files stay. So does everything
    under a prefix whose record cannot be read, or is of another version. `warn` gets what stays, and until
    when. OSError if the base path cannot be listed.
    """
    storage = StorageFactory.create(storage)
    found: dict[str, list[tuple[str, str]]] = {}
    for prefix, save_id, name in save_files(_walk(storage, warn)):
        found.setdefault(prefix, []).append((save_id, name))
    removed: list[str] = []
    for prefix, files in sorted(found.items()):
        keep = set[str]()
        with skipping(prefix, warn):
            for save_id in sorted({save_id for save_id, _ in files}):  # a fence may be newer than the list
                with contextlib.suppress(FileNotFoundError):  # its save has committed, or was abandoned
                    fence = fence_name(prefix, save_id)
                    age = storage.age_s(fence)
                    if 0 < age >= min_age_s:  # I4: first the fence
                        removed += [fence] if storage.delete(fence) else []
                    else:
                        keep.add(save_id)
                        left = f"{(min_age_s - age) / 3600:.1f} h"
                        warn(f"kept save {save_id} of {prefix}, which may be alive: old enough in {left}")
            with contextlib.suppress(FileNotFoundError):
                keep.add(decode_record(read_file(storage, record_name(prefix), sealed=True), prefix).save_id)
            dead = [name for save_id, name in files if save_id not in keep and not name.endswith(".tmp")]
            dead = [name for name in dead if _is_ours(storage, name)]
            if dead:  # the save that replaced them may have crashed before its sync
                storage.sync_directory(record_name(prefix))
            removed += [name for name in dead if storage.delete(name)]
    return removed
