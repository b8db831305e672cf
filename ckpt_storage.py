"""Bytes: where checkpoints lie, what their files look like, and when a checkpoint counts as committed.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file imports neither of the others)

Words, here and in the other two files:

    tensor   a whole tensor, known by its name, however many ranks hold parts of it
    box      a rectangular part of a tensor: its offset and its size in each dimension
    piece    a box with its place in a file: one row of the record
    unit     256 KiB of a file's data, under one CRC32: the least that is read
    block    up to 4 MiB of a file's data: what one write moves, and one read at most
    record   the metadata file; the checkpoint exists if and only if its record does
    fence    the record before its rename: the mark of a save under way

Layout below the base path, for the prefix `run/step_100` saved as `4f2a9c1e` by two ranks:

    run/step_100.metadata.json                         the record
    run/step_100.metadata.json.4f2a9c1e.tmp            the fence
    run/step_100/4f2a9c1e-00000-of-00002.safetensors   a tensor file, one for each rank

A checkpoint is **committed** if all of this holds; `read_committed` is the one place that decides:
    C1  the record is a regular file whose last field is the CRC32 of every byte before it;
    C2  its format version is one that this code reads;
    C3  it is well formed, and every name in it passes the name rules;
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
be tried again. Not defended: a race against somebody who swaps files for links meanwhile, for who can do
that can also edit the files.

All file access goes through this module's `os`: tests replace it by a stand-in that records, fails or
stops.

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
import json
import logging
import math
import mmap
import os as os  # explicitly, since ckpt.py uses this one too
import re
import resource
import secrets
import stat
import struct
import threading
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

Warn = Callable[[str], object]  # is told what was left out, and why
log = logging.getLogger("ckpt")
log.addHandler(logging.NullHandler())
T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]  # one-dimensional
Ints = npt.NDArray[np.int64]
Shape = tuple[int, ...]

FORMAT_VERSION = 2
UNIT_BYTES = 256 << 10
BLOCK_BYTES = 4 << 20
ALIGN_BYTES = 4096  # data start on a multiple of the page, so that blocks can be read and written directly
IO_THREADS = 6  # of a rank: some wait for the disk while others copy and checksum
STUCK_S = 2.0  # that an operation that is over waits for a thread that may be stuck in the kernel
MAX_HEADER_BYTES = 100_000_000  # what safetensors readers accept
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
        super().__init__(message)
        self.checkpoint_path, self.type, self.rank = checkpoint_path, type, rank


def corrupted(message: str, path: str = "") -> CheckpointException:
    """The exception for bytes that are not what was written."""
    return CheckpointException(message, path, ExceptionType.CORRUPTED_CHECKPOINT)


def some(names: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first of some names, for a message, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join([*map(str, names[:most]), *more])


def require(fact: object, problem: str) -> None:
    """ValueError(problem) unless `fact`. Code that parses bytes turns it into CORRUPTED_CHECKPOINT."""
    if not fact:
        raise ValueError(problem)


# ----------------------------------------------------------------------------------------------------------
# Names: every file name is made and checked here

_PART = re.compile(r"[A-Za-z0-9._=+-]{1,200}")
_FILE = re.compile(
    r"([0-9a-f]{8})(-[0-9]{5,}-of-[0-9]{5,}|\.model|\.rest)?\.safetensors"
)  # .rest: of version 1
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
    """An open file of a storage. Reads and writes are positioned, and may come from several threads."""

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. CORRUPTED_CHECKPOINT where the file ends before."""

    def write(self, offset: int, data: memoryview) -> None: ...
    def length(self) -> int: ...
    def resize(self, length: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class CheckpointStorage(Protocol):
    """Where checkpoints are kept. Names are '/'-separated paths below the storage's root."""

    def create(self, name: str) -> StoredFile:
        """Make a new file, and the directories above it. FileExistsError if it is there."""

    def open(self, name: str, write: bool = False) -> StoredFile:
        """Open an existing regular file. FileNotFoundError if there is none."""

    def length(self, name: str) -> int | None:
        """Bytes in the regular file `name`, or None where there is none."""

    def names(self, directory: str = "") -> list[str]:
        """Every regular file below `directory`, sorted.

        A link, which is never followed, and a directory that cannot be listed come with a `/` at the end; as
        `directory` itself they are an error.
        """

    def publish(self, temporary: str, name: str, overwrite: bool) -> None:
        """Atomically give `temporary` its final name, in the same directory.

        FileExistsError unless `overwrite`.
        """

    def delete(self, name: str) -> bool:
        """Remove a file, and the directories above it that this empties; False where there was none."""

    def sync_directory(self, name: str) -> None:
        """Make creations, renames and removals in the directory that holds `name` durable."""

    def age_s(self, name: str) -> float:
        """Seconds since `name` was last written, by the storage's own clock; 0 or less if that is not known.

        FileNotFoundError if there is no such file.
        """


_ABSENT = (FileNotFoundError, NotADirectoryError)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_REGION_BYTES = 64 << 20  # of a file that is in the page cache or not, as one probe tells
_MIN_DIRECT_BYTES = 256 << 10  # smaller writes and reads go through the page cache


class LocalFile:
    """A file on a local or mounted file system.

    Optimisation (skip on first reading): large aligned writes bypass the page cache where the file system
    allows it, and so does `read_directly`. It makes saves 1.2 to 2 times as fast, and pushes nothing else out
    of memory.
    """

    def __init__(self, name: str, fd: int, flags: int) -> None:
        self._name, self._fd, self._flags = name, fd, flags
        self._direct_fd: int | None = None  # -1 where there is none
        self._cold: dict[int, bool] = {}  # by region
        self._lock = threading.Lock()
        self._calls, self._closed = 0, False

    def read(self, offset: int, buffer: memoryview) -> None:
        self._move(lambda fd, part, at: os.preadv(fd, [part], at), offset, buffer, False)

    def read_directly(self, offset: int, buffer: memoryview) -> None:
        """Read past the page cache, unless the cache has it: for what no other process will want soon."""
        direct = len(buffer) >= _MIN_DIRECT_BYTES and self.is_cold(offset, len(buffer))
        self._move(lambda fd, part, at: os.preadv(fd, [part], at), offset, buffer, direct)

    def write(self, offset: int, data: memoryview) -> None:
        self._move(os.pwrite, offset, data, len(data) >= _MIN_DIRECT_BYTES)

    def _move(
        self, call: Callable[[int, memoryview, int], int], offset: int, data: memoryview, direct: bool
    ) -> None:
        """Read or write all of `data`, directly as far as it is aligned; short calls go on."""
        direct_fd = self._directly(offset, data) if direct else -1
        whole = len(data) // ALIGN_BYTES * ALIGN_BYTES if direct_fd >= 0 else 0
        done = 0
        while done < len(data):
            directly = done < whole and done % ALIGN_BYTES == 0
            fd, stop = (direct_fd, whole) if directly else (self._fd, len(data))
            try:
                with self._under_way():
                    count = call(fd, data[done : min(stop, done + (1 << 30))], offset + done)
            except OSError as error:
                if not directly or error.errno not in _UNSUPPORTED:
                    raise
                whole = 0
                continue
            if count <= 0 and call == os.pwrite:
                raise OSError(errno.EIO, "the disk takes nothing more", self._name)
            if count <= 0:
                raise corrupted(
                    f"{self._name}: ends at byte {offset + done}, {len(data) - done} bytes missing"
                )
            done += count

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """A call that hangs keeps the file open.

        Else its number could be that of another file when it goes on.
        """
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the operation is over", self._name)
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1

    def _directly(self, offset: int, memory: memoryview) -> int:
        """A descriptor that bypasses the page cache, for what is so aligned; -1 without one."""
        if (offset | np.frombuffer(memory, np.uint8).ctypes.data) % ALIGN_BYTES:
            return -1
        with self._lock:
            if self._direct_fd is None:
                try:
                    self._direct_fd = os.open(
                        f"/proc/self/fd/{self._fd}", self._flags | os.O_CLOEXEC | os.O_DIRECT
                    )
                except OSError:  # tmpfs, or no /proc: the page cache will do
                    self._direct_fd = -1
                if 2 * self._direct_fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                    os.close(self._direct_fd)  # the other half is for files that are not open yet
                    self._direct_fd = -1
            return self._direct_fd

    def is_cold(self, offset: int, length: int) -> bool:
        """Whether the page cache lacks the region of the file where these bytes begin.

        A read of the last one that must not wait tells: the first ones may be there because the header has
        been read, and the kernel reads ahead.
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
                raise
        os.ftruncate(self._fd, length)

    def sync(self) -> None:
        with self._under_way():
            os.fsync(self._fd)

    def close(self) -> None:
        with self._lock:
            if not self._closed and not self._calls:
                fds = [fd for fd in (self._direct_fd, self._fd) if fd is not None and fd >= 0]
                self._closed = True
                for fd in fds:
                    os.close(fd)
            self._closed = True


class LocalStorage:
    """Plain files below `base_path`, which may itself be a link; a link below it is a STORAGE_ERROR."""

    def __init__(self, base_path: str | os.PathLike[str] = "./checkpoints") -> None:
        self.base_path = os.path.abspath(base_path)
        self._unsynced: set[str] = set()  # directories in which this object has made a directory

    def _path(self, name: str, file: bool = True) -> str:
        parts = name.split("/") if name or file else []
        if any(p in ("", ".", "..") or "\0" in p for p in parts):
            raise ValueError(f"illegal path {name!r}")
        path = os.path.join(os.path.realpath(self.base_path), *parts)
        if os.path.realpath(path) != path:
            what = "a symbolic link, or behind one; links below the base path are not followed"
            raise CheckpointException(f"{name}: is {what}", name, ExceptionType.STORAGE_ERROR)
        return path

    def _open(self, name: str, path: str, flags: int) -> LocalFile:
        try:  # neither following a link nor waiting for the other end of a FIFO
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise corrupted(f"{name}: not a regular file", name) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise corrupted(f"{name}: not a regular file", name)
        return LocalFile(name, fd, flags & os.O_ACCMODE)

    def create(self, name: str) -> LocalFile:
        path = self._path(name)
        for _ in range(10):  # a clean-up may remove the directory before the file is in it
            with contextlib.suppress(FileNotFoundError):
                self._make_directory(os.path.dirname(path))
                return self._open(name, path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        raise FileNotFoundError(errno.ENOENT, "its directory was removed again and again", name)

    def _make_directory(self, path: str) -> None:
        if os.path.isdir(path):
            return
        self._make_directory(os.path.dirname(path))
        self._unsynced.add(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another rank was faster
            os.mkdir(path)

    def open(self, name: str, write: bool = False) -> LocalFile:
        return self._open(name, self._path(name), os.O_RDWR if write else os.O_RDONLY)

    def length(self, name: str) -> int | None:
        try:
            status = os.stat(self._path(name), follow_symlinks=False)
        except _ABSENT:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise corrupted(f"{name}: not a regular file", name)
        return status.st_size

    def names(self, directory: str = "") -> list[str]:
        path, found = self._path(directory, file=False), list[str]()
        for name in os.listdir(path) if os.path.isdir(path) else ():
            inner = f"{directory}/{name}" if directory else name
            with contextlib.suppress(FileNotFoundError):  # removed since
                mode = os.stat(os.path.join(path, name), follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    try:
                        found += self.names(inner)
                    except (OSError, CheckpointException):  # somebody else's: the rest can be listed
                        found.append(f"{inner}/")
                elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                    found.append(inner + "/" * stat.S_ISLNK(mode))
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
        except _ABSENT:
            return False
        base = os.path.realpath(self.base_path)
        with contextlib.suppress(OSError):  # not empty, or somebody else was faster
            while (path := os.path.dirname(path)) != base:
                os.rmdir(path)
        return True

    def sync_directory(self, name: str) -> None:
        """Also syncs the directories above, up to the one that holds the base path: they may be new.

        A directory that a removal has emptied is gone itself, as the one above it then tells.
        """
        path, above = os.path.dirname(self._path(name)), os.path.dirname(os.path.realpath(self.base_path))
        waiting = {path, above, *self._unsynced}
        while (path := os.path.dirname(path)) != above and len(path) > 1:
            waiting.add(path)
        for directory in sorted(waiting, reverse=True):
            with contextlib.suppress(FileNotFoundError):  # removed since, which those above it tell
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:  # else the file system needs no such thing
                        raise
                finally:
                    os.close(fd)
        self._unsynced -= waiting

    def age_s(self, name: str) -> float:
        """By the clock of the file system: the time of a file made now less that of `name`.

        The new file is named as a fence, so that one that a crash leaves is cleaned up as one.
        """
        path = self._path(name)
        written = os.stat(path, follow_symlinks=False).st_mtime
        beside = os.path.join(os.path.dirname(path), fence_name("now", secrets.token_hex(4)))
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            return os.fstat(fd).st_mtime - written
        finally:
            os.close(fd)
            os.unlink(beside)


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

        ValueError for an unknown provider or setting.
        """
        if isinstance(options, (str, os.PathLike)):
            options = StorageOptions(connection_settings={"base_path": os.fspath(options)})
        if not isinstance(options, StorageOptions):
            return options
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


class Fields:
    """A JSON object whose fields are read as the type that they must have; ValueError where they are not."""

    def __init__(self, node: object) -> None:
        if not isinstance(node, dict):
            raise ValueError(f"expected an object, found {type(node).__name__}")
        self.all: dict[str, object] = node

    def _typed(self, key: str, kind: type[T]) -> T:
        value = self.all.get(key)
        if type(value) is not kind:
            raise ValueError(f"{key!r}: expected {kind.__name__}, found {type(value).__name__}")
        return value

    def text(self, key: str) -> str:
        return self._typed(key, str)

    def number(self, key: str) -> int:
        """In [0, 2**62)."""
        return int_tuple([self._typed(key, int)])[0]

    def shape(self, key: str) -> Shape:
        return int_tuple(self._typed(key, list))

    def array(self, key: str) -> list[object]:
        return self._typed(key, list)

    def texts(self, key: str) -> list[str]:
        found = self._typed(key, list)
        require(all(type(item) is str for item in found), f"{key!r}: expected strings")
        return found

    def child(self, key: str) -> Fields:
        return Fields(self._typed(key, dict))


def int_tuple(value: object) -> Shape:
    """`value` as a tuple of at most 64 ints in [0, 2**62), or ValueError."""
    if not isinstance(value, (list, tuple)) or len(value) > 64:
        raise ValueError(f"expected a short list of integers, found {type(value).__name__}")
    for n in value:
        if type(n) is not int or not 0 <= n < 1 << 62:
            raise ValueError(f"expected a non-negative integer, found {n!r}")
    return tuple(value)


def dump_json(value: object) -> bytes:
    """JSON without spaces, in ASCII. ValueError for NaN and infinities."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_PLAIN_KINDS = "biufcmMSU"  # of numpy's dtypes, those without objects or fields


def _pack_array(value: npt.ArrayLike) -> list[object] | None:
    array = np.asarray(value)
    return (
        [array.dtype.str, list(array.shape), _base64(array.tobytes())]
        if array.dtype.kind in _PLAIN_KINDS
        else None
    )


def _unpack_array(body: tuple[str, list[int], str]) -> npt.NDArray[np.generic]:
    dtype, shape, data = body
    require(np.dtype(dtype).kind in _PLAIN_KINDS, f"dtype {dtype}")
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()


def _pack_datetime(value: datetime.datetime) -> str | None:
    return value.isoformat() if value.tzinfo is None or type(value.tzinfo) is datetime.timezone else None


_TORCH_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_MAPPINGS = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}  # as lists of pairs
_SEQUENCES = {"$tuple": tuple, "$Size": torch.Size, "$set": set, "$frozenset": frozenset}  # as lists
_TORN_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # two characters of Python, which JSON reads as one
_LEAVES: dict[
    str, tuple[type, Callable[..., object], Callable[..., object]]
] = {  # type, to JSON (or None), and back
    "$str": (
        str,
        lambda text: _base64(text.encode("utf-8", "surrogatepass")),
        lambda data: base64.b64decode(data).decode("utf-8", "surrogatepass"),
    ),
    "$int": (int, hex, lambda text: int(text, 16)),
    "$float": (
        float,
        lambda x: struct.pack(">d", x).hex(),
        lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    ),
    "$bytes": (bytes, _base64, base64.b64decode),
    "$datetime": (datetime.datetime, _pack_datetime, datetime.datetime.fromisoformat),
    "$dtype": (torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), _TORCH_DTYPES.__getitem__),
    "$device": (torch.device, str, lambda text: torch.device(str(text))),
    "$ndarray": (np.ndarray, _pack_array, _unpack_array),
    "$scalar": (np.generic, _pack_array, lambda body: _unpack_array(body)[()]),
}


def encode_value(
    value: object, path: str, on_tensor: Callable[[str, torch.Tensor], str] | None = None
) -> object:
    """`value` as plain JSON; what JSON lacks becomes {"$type": ...}. Tensors become {"$tensor".

    On_tensor(path, t)}.

    Raises ValueError, naming `path` and the type, for anything that could not be restored exactly.
    """
    kind = type(value)
    if value is None or kind is bool or (type(value) is str and not _TORN_PAIR.search(value)):
        return value
    if isinstance(value, torch.Tensor):
        if on_tensor is None:
            raise ValueError(f"{path}: a tensor cannot be stored here; put it into extra_state")
        return {"$tensor": on_tensor(path, value)}
    if (type(value) is int and abs(value) < 1 << 53) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, dict) and kind in _MAPPINGS.values():
        if kind is dict and all(type(k) is str and k[:1] != "$" and not _TORN_PAIR.search(k) for k in value):
            return {k: encode_value(v, f"{path}.{k}", on_tensor) for k, v in value.items()}
        pairs = [[encode_value(k, path), encode_value(v, f"{path}.{k}", on_tensor)] for k, v in value.items()]
        node: dict[str, object] = {f"${kind.__name__}": pairs}
        if (metadata := getattr(value, "_metadata", None)) is not None:  # of a module's state dict: versions
            node["metadata"] = encode_value(metadata, f"{path}._metadata", on_tensor)
        return node
    if isinstance(value, (list, tuple, set, frozenset)) and (kind is list or kind in _SEQUENCES.values()):
        items = [encode_value(item, f"{path}.{index}", on_tensor) for index, item in enumerate(value)]
        if kind is list:
            return items
        return {f"${kind.__name__}": items if isinstance(value, tuple) else sorted(items, key=dump_json)}
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
    body = node[tag]
    if tag == "$tensor" and isinstance(body, str):
        return tensor(body)
    try:
        if tag in _MAPPINGS and isinstance(body, list):
            items = ((decode_value(key, tensor), decode_value(item, tensor)) for key, item in body)
            made = _MAPPINGS[tag](dict(items))
            if "metadata" in node:
                vars(made)["_metadata"] = decode_value(node["metadata"], tensor)
            return made
        if tag in _SEQUENCES and isinstance(body, list):
            return _SEQUENCES[tag]([decode_value(item, tensor) for item in body])
        return _LEAVES[tag][2](body)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, struct.error) as error:
        raise corrupted(f"stored value {tag} is malformed: {error}") from error


# ----------------------------------------------------------------------------------------------------------
# Dtypes and boxes

_CODES = {
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
DTYPES["JSON"] = torch.uint8  # a value that is no tensor, as UTF-8
CODES = {dtype: code for code, dtype in DTYPES.items() if code != "JSON"}
_PAIRS = {"C128": "F64", "C32": "F16"}  # not in safetensors: stored with a last dimension of 2


def itemsize(code: str) -> int:
    """Bytes an element of dtype `code`."""
    return DTYPES[code].itemsize


def stored_form(code: str, shape: Shape) -> tuple[str, Shape]:
    """Dtype and shape under which safetensors knows a tensor of dtype `code`."""
    if code in _PAIRS:
        return _PAIRS[code], (*shape, 2)
    if code == "F4":  # torch counts pairs, safetensors single elements
        return code, (*shape[:-1], shape[-1] * 2) if shape else (2,)
    return ("U8" if code == "JSON" else code), shape


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


def whole_box(shape: Shape) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def row_boxes(shape: Shape, start: int, stop: int) -> list[tuple[int, Box]]:
    """Cover elements [start, stop) of a row-major array by boxes.

    (position of its first element, box), in order.

    At most 2 * ndim - 1 boxes: a ragged head and tail in each dimension, whole rows between.
    """
    if not shape:
        return [(0, Box((), ()))][start:stop]
    rows = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # elements to a step in each dimension
    found = []
    while start < stop:  # the longest rows that begin here and fit, as many as there are
        dim = next(dim for dim, row in enumerate(rows) if start % row == 0 and start + row <= stop)
        offset = tuple(start // row % size for row, size in zip(rows, shape))
        count = min((stop - start) // rows[dim], shape[dim] - offset[dim])
        found.append((start, Box(offset, (1,) * dim + (count, *shape[dim + 1 :]))))
        start += count * rows[dim]
    return found


def not_covered_once(tensor: Ints, box: Ints, shapes: Sequence[Shape | None]) -> list[int]:
    """The tensors whose boxes leave a hole or overlap: by index, in order.

    Time and memory are linear in the boxes.

    `box` is (rows, 2, dimensions), offset and size, padded with 0 and 1; `tensor` is the index of each row's
    tensor, whose shape is None where it has no boxes. Each index of a dimension has a random weight. Boxes
    cover a tensor once if the products of weights, summed over their elements, add up to the same sum over
    the whole. Another set of elements passes with a probability of about 2^-60 (the lemma of Schwartz and
    Zippel).
    """
    width = box.shape[2]
    padded = [(*(shape or ()), *[1] * (width - len(shape or ()))) for shape in shapes]
    whole, there = (
        np.array(padded, np.int64).reshape(len(shapes), width),
        np.array([s is not None for s in shapes], bool),
    )
    wrong = np.zeros(len(shapes), bool)
    for seed, prime in enumerate(((1 << 31) - 1, (1 << 31) - 19)):

        def weight(
            low: Ints, size: Ints
        ) -> Ints:  # of [low, low + size): the weights before its end less those before it
            product = np.ones(len(low), np.int64)
            for dim in range(width):
                first, stop = low[:, dim], low[:, dim] + size[:, dim]
                before, until = ((_mixed(x, seed * 64 + dim) % prime).astype(np.int64) for x in (first, stop))
                product = product * ((until - before) % prime) % prime
            return product

        found = np.zeros(len(shapes), np.int64)
        np.add.at(found, tensor, weight(box[:, 0], box[:, 1]))
        wrong |= found % prime != weight(np.zeros_like(whole), whole) * there
    return np.flatnonzero(wrong).tolist()


def _mixed(values: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """Random bits for each value, always the same.

    The mixing function of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    bits = values.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def byte_view(tensor: torch.Tensor) -> Bytes | None:
    """The memory of a contiguous CPU tensor as bytes, or None where it is elsewhere, strided, or not the
    values (conj).

    By its address, in a fourth of the time of torch's views: it is valid as long as the caller keeps the
    tensor.
    """
    if (
        not (tensor.is_cpu and tensor.is_contiguous())
        or not tensor.nbytes
        or tensor.is_conj()
        or tensor.is_neg()
    ):
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


def copy_out(tensor: torch.Tensor, start: int, out: Bytes) -> None:
    """Copy the row-major bytes of `tensor` (any strides, any device) from byte `start` into `out`."""
    with torch.no_grad():
        for box, elements in _in_boxes(out, start, tensor.dtype, tuple(tensor.shape)):
            elements.copy_(tensor[tuple(slice(o, o + s) for o, s in zip(*box))])


def copy_in(data: Bytes, start: int, dtype: torch.dtype, piece: Box, want: Box, target: torch.Tensor) -> None:
    """Put the row-major bytes of `piece` from byte `start` where they fall into `want`, which `target` holds.

    `data` has elements of `dtype`; a target of another dtype gets them cast.
    """
    with torch.no_grad():
        for part, elements in _in_boxes(data, start, dtype, piece.size):
            here = Box(tuple(p + o for p, o in zip(piece.offset, part.offset)), part.size)
            if (common := here.intersect(want)) is not None:
                target[common.within(want)].copy_(elements[common.within(here)])


# ----------------------------------------------------------------------------------------------------------
# CRC32, compression, threads

for _name in (
    "isal.isal_zlib",
    "zlib_ng.zlib_ng",
    "zlib",
):  # the same functions; the first two by vector instructions
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


# Module, level, strategy. Entropy coding is fast, and gives all that can be had from the exponents of
# weights. ISA-L, which knows no strategies, looks for matches too, and still takes half the time of zlib.
_ENTROPY_ONLY = (zlib, 1, zlib.Z_HUFFMAN_ONLY)
_FAST = (_FAST_ZLIB, 1, zlib.Z_DEFAULT_STRATEGY if CRC_PROVIDER == "isal" else zlib.Z_HUFFMAN_ONLY)
_WAYS = {
    CompressionLevel.FAST: (_FAST,),
    CompressionLevel.BALANCED: (_ENTROPY_ONLY, (zlib, 6, zlib.Z_DEFAULT_STRATEGY)),
    CompressionLevel.MAXIMUM: (_ENTROPY_ONLY, (zlib, 9, zlib.Z_DEFAULT_STRATEGY)),
}


def _deflate(data: memoryview, level: CompressionLevel) -> bytes | memoryview:
    """`data` compressed the best way of the level, or as it is where it does not shrink (or a sample not by 2
    %).
    """

    def packed(part: memoryview, module: types.ModuleType, depth: int, strategy: int) -> bytes | memoryview:
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
    found = []
    for count in sorted({1, width}) if level is CompressionLevel.MAXIMUM else [width]:
        word = math.gcd(count, 8)  # shifts of whole words take a third of the time of strided bytes
        columns = data.view(f"<u{word}").reshape(-1, count // word).T
        bytewise = (
            (column >> shift).astype(np.uint8) for column in columns for shift in range(0, 8 * word, 8)
        )
        planes = [_deflate(plane.data, level) for plane in bytewise]
        found.append(b"".join([struct.pack(f"<B{count}I", count, *map(len, planes)), *planes]))
    best = min(found, key=len)
    return best if len(best) < len(data) else data.tobytes()


def expand_frame(data: bytes, length: int, width: int) -> Bytes:
    """Inverse of `compress_frame`; takes no more memory than the `length` bytes that the frame stands for."""
    if len(data) == length:
        return np.frombuffer(bytearray(data), np.uint8)
    try:
        count = data[0]
        require(count in (1, width) and length % count == 0, f"{count} planes")
        lengths = struct.unpack_from(f"<{count}I", data, 1)
        at, share = 1 + 4 * count, length // count
        out = np.empty((share, count), np.uint8)
        for index, size in enumerate(lengths):
            plane, at = data[at : at + size], at + size
            if size != share:
                stream = _FAST_ZLIB.decompressobj()
                plane = stream.decompress(plane, share + 1)
                require(stream.eof, "plane longer than declared")
            require(len(plane) == share, "plane of another length than declared")
            out[:, index] = np.frombuffer(plane, np.uint8)
        require(at == len(data), "frame of another length than declared")
    except (ValueError, IndexError, struct.error, _FAST_ZLIB.error) as error:
        raise corrupted(f"compressed frame is damaged: {error}") from error
    return out.reshape(-1)


SUM_WORDS = 4 << 20  # of eight bytes, that a device sums up at a time


def device_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum of a tensor's row-major bytes, computed on its device.

    64 bits, where a CRC32 would bring all of it here.

    The sum of all words of eight bytes modulo 2^64, each times an odd random weight of its position.
    """
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    total, tail = data.new_zeros((), dtype=torch.int64), -len(data) % 8
    if tail or data.storage_offset() % 8:
        data = torch.cat((data, data.new_zeros(tail)))
    words = data.view(torch.int64)
    for start in range(0, len(words), SUM_WORDS):
        part = words[start : start + SUM_WORDS]
        weight = torch.arange(start, start + len(part), device=part.device)
        for factor in (
            -0x61C8864680B583EB,
            -0x40A7B892E31B1A47,
        ):  # the constants of `_mixed`, as signed numbers
            weight = weight * factor
            weight ^= (weight >> 29) & 0x7FFFFFFFF
        total += (part * (weight | 1)).sum()
    return total


def cuda_in_use() -> bool:
    """Whether this process has initialised CUDA; asking does not."""
    return torch.cuda.is_available() and bool(
        getattr(torch.cuda, "is_initialized")()
    )  # torch does not type it


def aligned_buffer(length: int) -> Bytes:
    """Memory for I/O, at least page-aligned, so that device copies and direct I/O are fast.

    Pinned where CUDA is in use.

    Else in huge pages where the system has them: then a transfer is few long segments instead of one a page
    of 4 KiB, which virtual disks take many times longer for. A fork's child finds zeros in it: pages that are
    copied on write would cost their size again, and what direct I/O reads into them could be lost.
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
    """Lets the workers of an operation touch live tensors, until the operation is over.

    A read may hang, and return long after its operation has failed and another one has filled the tensors. So
    a worker copies only inside `with gate:`, and `close` waits for the copies under way (one unit each)
    before it returns.
    """

    def __init__(self) -> None:
        self._changed, self._inside, self._open = threading.Condition(), 0, True

    def __enter__(self) -> None:
        with self._changed:
            if not self._open:
                raise OSError(errno.ECANCELED, "the operation is over")
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._inside)


def in_parallel(
    items: Iterable[T],
    work: Callable[[T, Bytes, Gate], None],
    poll: Callable[[], None] = lambda: None,
    most: int = IO_THREADS,
) -> None:
    """Run `work(item, buffer, gate)` for all items (none is None) on a few threads, `most` at most, each with
    its buffer.

    A buffer has `2 * BLOCK_BYTES`. `poll` runs in the calling thread a few times a second, and may raise to
    stop. The first error of any thread is raised here, after the gate is closed: none vanishes.
    """
    source, lock, stop, errors, gate = (
        iter(items),
        threading.Lock(),
        threading.Event(),
        list[BaseException](),
        Gate(),
    )

    def drain() -> None:
        try:
            buffer = aligned_buffer(2 * BLOCK_BYTES)
            while not stop.is_set():
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item, buffer, gate)
        except BaseException as error:
            errors.append(error)
            stop.set()

    workers = [
        threading.Thread(target=drain, name=f"ckpt-io-{n}", daemon=True) for n in range(min(most, IO_THREADS))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive() and not errors:
                worker.join(0.05)
                poll()
    finally:
        stop.set()
        gate.close()
        for worker in workers:
            if worker.ident is not None:
                worker.join(STUCK_S)
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
            table[f"pad/{position}"] = {
                "dtype": "U8",
                "shape": [begin - position],
                "data_offsets": [position, begin],
            }
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
    (length,) = struct.unpack_from("<Q", header)
    stop = _CRC_AT + 8 * unit_count(data_bytes)
    digits = header[_CRC_AT:stop]
    require(length == len(header) - 8 and len(header) % ALIGN_BYTES == 0, f"header length {length}")
    require(
        header[8:_CRC_AT] == _HEADER_START and header[stop : stop + 2] == b'"}',
        "not a header of this version",
    )
    require(not digits.strip(b"0123456789abcdef"), "malformed CRC32s")
    return [int(crc) for crc in np.frombuffer(bytes.fromhex(digits.decode()), ">u4")]


def parse_entries(table: Fields, data_bytes: int) -> list[Entry]:
    """The entries of any safetensors header, in the order of their bytes.

    ValueError where it breaks the rules of the format: holes, overlaps, other sizes than dtype and shape say.
    """
    found, position = list[Entry](), 0
    for name in table.all:
        if name != "__metadata__":
            item = table.child(name)
            begin, end = item.shape("data_offsets")
            found.append(Entry(name, item.text("dtype"), item.shape("shape"), begin, end))
    found.sort(key=lambda entry: (entry.begin, entry.end))
    for index, (name, dtype, shape, begin, end) in enumerate(found):
        require(begin == position, f"hole or overlap at byte {position} of the data, before {name!r}")
        known = dtype in DTYPES and stored_form(dtype, ())[0] == dtype  # neither JSON nor pairs of ours
        require(known, f"{name!r}: unknown dtype {dtype!r}")
        if dtype == "F4" and shape:  # torch counts pairs, safetensors single elements
            shape = (*shape[:-1], shape[-1] // 2)
        require(
            math.prod(shape) * itemsize(dtype) == end - begin,
            f"{name!r}: {dtype} of shape {[*shape]} in {end - begin} bytes",
        )
        found[index], position = Entry(name, dtype, shape, begin, end), end
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
        return Pieces(*(column[index] for column in self))

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
    format: str
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

    def itemsizes(self) -> Ints:
        """Bytes of an element of each tensor."""
        return np.array([itemsize(t.dtype) for t in self.tensors], np.int64)

    def entries(self, index: int) -> list[Entry]:
        """What the header of a tensor file says, as the record has it: a whole file's empty tensors too."""
        name = self.shards[index].file
        in_model, whole = name == whole_file_name(self.save_id, "model"), "-of-" not in name
        rows = self.pieces.take(self.pieces.file == index)
        rows, found = rows.take(np.argsort(rows.begin, kind="stable")), list[Entry]()
        model_file = in_model_file(self.tensors) if in_model else set[int]()
        for tensor, begin, length, box in rows.boxes(self.tensors):
            t = self.tensors[tensor]
            packed = self.compression != "none" and not whole
            dtype, shape = ("U8", (length,)) if packed else stored_form(t.dtype, box.size)
            found.append(Entry(entry_name(t, box, in_model), dtype, shape, begin, begin + length))
        for n, t in enumerate(self.tensors if whole else ()):
            if 0 in t.shape and t.alias_of is None and (not in_model or n in model_file):
                dtype, shape = stored_form(t.dtype, t.shape)
                found.insert(0, Entry(entry_name(t, whole_box(t.shape), in_model), dtype, shape, 0, 0))
        return found


def lowest_ranks(tensors: Iterable[TensorMetadata]) -> dict[str, int | None]:
    """For each name that is kept per rank the lowest such rank, whose copy stands for all where only one can.

    Else None.
    """
    return {t.name: t.rank for t in sorted(tensors, key=lambda t: t.rank or 0, reverse=True)}


def in_model_file(tensors: Sequence[TensorMetadata]) -> set[int]:
    """The tensors of CONSOLIDATED's model file.

    Those of the model that safetensors knows, of per-rank ones the lowest.
    """
    lowest = lowest_ranks(t for t in tensors if t.name.startswith("model/"))
    stored = {code for code in DTYPES if stored_form(code, ())[0] == code}  # not JSON, nor C32 and C128
    return {n for n, t in enumerate(tensors) if lowest.get(t.name, -1) == t.rank and t.dtype in stored}


def entry_name(tensor: TensorMetadata, box: Box, in_model: bool = False) -> str:
    """The name of a piece in its file, for a human reader.

    The tensor's, its offset, and the rank that it is kept for.
    """
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
    return base64.b64encode(zlib.compress(steps.tobytes(), 1)).decode()


def unpack_ints(text: str, count: int) -> Ints:
    """Inverse of `pack_ints`. ValueError unless it gives `count` integers, in no more memory than theirs."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(text, validate=True), 8 * count + 1)
    except zlib.error as error:
        raise ValueError(f"a column does not inflate: {error}") from error
    require(
        stream.eof and not stream.unused_data and len(data) == 8 * count,
        f"a column of other than {count} integers",
    )
    return np.cumsum(np.frombuffer(data, "<i8"), dtype=np.int64)


def pack_table(columns: Mapping[str, Ints], box: Ints) -> dict[str, object]:
    """Columns of integers, and boxes (rows, 2, dimensions), as JSON."""
    boxes = {name: list(map(pack_ints, box[:, half].T)) for half, name in enumerate(("offset", "size"))}
    return {"count": len(box), **{name: pack_ints(column) for name, column in columns.items()}, **boxes}


def unpack_box(table: Fields, count: int) -> Ints:
    """The boxes of `pack_table`."""
    offset, size = table.texts("offset"), table.texts("size")
    require(len(offset) == len(size) <= 64, "offsets and sizes of other dimensions")
    box = np.empty((count, 2, len(offset)), np.int64)
    for dim, pair in enumerate(zip(offset, size)):
        for half, text in enumerate(pair):
            box[:, half, dim] = unpack_ints(text, count)
    return box


def encode_record(meta: CheckpointMetadata) -> bytes:
    """The record's bytes; `decode_record` is the inverse."""
    body: dict[str, object] = {
        "format_version": meta.version,
        "save_id": meta.save_id,
        "sequence": meta.sequence,
        "world_size": meta.world_size,
        "format": meta.format,
        "compression": meta.compression,
        "torch_version": meta.torch_version,
        "timestamp": meta.timestamp,
        "custom_metadata": encode_value(dict(meta.custom_metadata), "custom_metadata"),
        **encode_tables(meta),
    }
    text = dump_json(body)[:-1]
    return text + _seal(text)


def encode_tables(meta: CheckpointMetadata) -> dict[str, object]:
    """The files, tensors and pieces of a record, or a plan, as JSON."""
    columns = meta.pieces._asdict()
    return {
        "files": [[s.file, s.length, s.header_bytes, f"{s.header_crc:08x}"] for s in meta.shards],
        "tensors": [[*t] for t in meta.tensors],
        "pieces": pack_table(columns, columns.pop("box")),
    }


def _seal(text: bytes) -> bytes:
    """The last field of a record, and its end."""
    return b',"crc32":"%08x"}\n' % crc32(text)


def decode_record(
    data: bytes, prefix: str, check_files: Callable[[Sequence[ShardMetadata]], None] = lambda files: None
) -> CheckpointMetadata:
    """Parse a record: C1 to C3. `check_files` may raise before memory is taken for the pieces.

    CORRUPTED_CHECKPOINT or INCOMPATIBLE_VERSION for a record that is not as it should be.
    """
    path, text = record_name(prefix), data[: -len(_seal(b""))]
    if data[len(text) :] != _seal(text):  # C1
        raise corrupted(f"{path}: the record fails its CRC32; the checkpoint is damaged", path)
    try:
        body = Fields(parse_json(text + b"}", path))
        version = body.number("format_version")
        if version != FORMAT_VERSION:  # C2
            message = f"{path}: written in format version {version}; this code reads version {FORMAT_VERSION}"
            raise CheckpointException(message, path, ExceptionType.INCOMPATIBLE_VERSION)
        custom = decode_value(body.child("custom_metadata").all, str)  # C3
        if not isinstance(custom, dict):
            raise ValueError("no custom metadata")
        datetime.datetime.fromisoformat(body.text("timestamp"))
        shards = tuple(map(_decode_file, body.array("files")))
        require(len({shard.file for shard in shards}) == len(shards), "a file is named twice")
        tensors = decode_tensors(body.array("tensors"))
        check_files(shards)
        return CheckpointMetadata(
            prefix=prefix,
            save_id=body.text("save_id"),
            sequence=body.number("sequence"),
            world_size=body.number("world_size"),
            format=body.text("format"),
            compression=body.text("compression"),
            torch_version=body.text("torch_version"),
            timestamp=body.text("timestamp"),
            custom_metadata=custom,
            shards=shards,
            tensors=tensors,
            pieces=_decode_pieces(body.child("pieces"), shards, tensors, body.text("compression") != "none"),
        )
    except (ValueError, TypeError, OverflowError, IndexError, RecursionError, MemoryError) as error:
        raise corrupted(f"{path}: malformed record: {error}", path) from error


def _decode_file(row: object) -> ShardMetadata:
    if (
        not isinstance(row, list)
        or len(row) != 4
        or not isinstance(row[0], str)
        or not _FILE.fullmatch(row[0])
    ):
        raise ValueError(f"illegal file {row!r:.100}")
    length, header_bytes = int_tuple(row[1:3])
    require(
        8 <= header_bytes <= min(length, 8 + MAX_HEADER_BYTES),
        f"a header of {header_bytes} bytes in {length}",
    )
    require(isinstance(row[3], str) and re.fullmatch("[0-9a-f]{8}", row[3]), "malformed CRC32")
    return ShardMetadata(row[0], length, header_bytes, int(row[3], 16))


def decode_tensors(rows: Sequence[object]) -> tuple[TensorMetadata, ...]:
    """The tensors of a record. ValueError for a malformed row."""
    found = []
    for row in rows:
        if (
            not isinstance(row, list)
            or len(row) != 5
            or not isinstance(row[0], str)
            or str(row[1]) not in DTYPES
        ):
            raise ValueError(
                f"tensor {row!r:.100}: malformed, or of a dtype unknown to torch {torch.__version__}"
            )
        rank, alias_of = (None if number is None else int_tuple([number])[0] for number in row[3:])
        found.append(TensorMetadata(row[0], row[1], int_tuple(row[2]), rank, alias_of))
        require(math.prod(found[-1].shape) < 1 << 57, f"{row[0]!r} is too large")
    tied = [t.alias_of for t in found if t.alias_of is not None]
    require(all(target < len(found) and found[target].alias_of is None for target in tied), "tied to nothing")
    return tuple(found)


_MOST_INFLATION = 1032  # bytes that deflate can make of one


def _decode_pieces(
    table: Fields, shards: Sequence[ShardMetadata], tensors: Sequence[TensorMetadata], packed: bool
) -> Pieces:
    """The pieces, with their ranges checked.

    Each lies in its file and its tensor, and they hold each element once.
    """
    count = table.number("count")
    require(
        count * MIN_ROW_BYTES <= sum(shard.header_bytes for shard in shards),
        f"{count} pieces in so few headers",
    )
    columns = [unpack_ints(table.text(name), count) for name in ("tensor", "file", "begin", "length")]
    tensor, file, begin, length = columns
    pieces = Pieces(tensor, file, begin, length, box := unpack_box(table, count))
    width = max((len(t.shape) for t in tensors), default=0)
    require(box.shape[2] == width, "boxes of other dimensions than the tensors")
    padded = [(*t.shape, *[1] * (width - len(t.shape))) for t in tensors]
    shapes = np.array(padded, np.int64).reshape(len(tensors), width)
    data_bytes = np.array([shard.length - shard.header_bytes for shard in shards], np.int64)
    require((tensor >= 0).all() and (tensor < len(tensors)).all(), "pieces of unknown tensors")
    require((np.diff(tensor) >= 0).all(), "pieces in another order than the tensors")
    require((file >= 0).all() and (file < len(shards)).all(), "pieces of unknown files")
    require((begin >= 0).all() and (length > 0).all(), "pieces of nothing")
    require(
        (length <= data_bytes[file]).all() and (begin <= data_bytes[file] - length).all(),
        "piece outside of its file",
    )
    require(
        (box[:, 0] >= 0).all() and (box[:, 1] > 0).all() and (box[:, 1] <= shapes[tensor]).all(),
        "malformed box",
    )
    require((box[:, 0] <= shapes[tensor] - box[:, 1]).all(), "box outside of its tensor")
    nbytes = pieces.nbytes(np.array([itemsize(t.dtype) for t in tensors], np.int64))
    most = _MOST_INFLATION * length if packed else length
    require(((length <= nbytes) & (nbytes <= most)).all(), "piece of another length than its box")
    np.add.at(held := np.zeros(len(shards), np.int64), file, length)
    require((held <= data_bytes).all(), "pieces that share their bytes")
    wrong = not_covered_once(tensor, box, [t.shape if t.alias_of is None else None for t in tensors])
    if wrong:
        raise ValueError(f"{tensors[wrong[0]].name}: its pieces do not hold each of its elements once")
    return pieces


# ----------------------------------------------------------------------------------------------------------
# Committed, and what follows from it


def read_file(storage: CheckpointStorage, name: str) -> bytes:
    """All bytes of a file; FileNotFoundError where there is none."""
    with contextlib.closing(storage.open(name)) as file:
        data = bytearray(file.length())
        file.read(0, memoryview(data))
    return bytes(data)


def read_committed(storage: CheckpointStorage, prefix: str) -> CheckpointMetadata:
    """The record of a committed checkpoint: C1 to C4 hold. Any process, at any time.

    FileNotFoundError where no checkpoint exists; CORRUPTED_CHECKPOINT, INCOMPATIBLE_VERSION or STORAGE_ERROR
    where one exists that is not intact.
    """
    return read_committed_record(storage, prefix)[1]


def read_committed_record(storage: CheckpointStorage, prefix: str) -> tuple[bytes, CheckpointMetadata]:
    """The same, and the bytes that it was decoded from, for other ranks to decode."""

    def check_files(shards: Sequence[ShardMetadata]) -> None:  # C4
        for shard in shards:
            path = f"{prefix}/{shard.file}"
            if (found := storage.length(path)) != shard.length:
                what = "is missing" if found is None else f"has {found} bytes"
                raise corrupted(f"{path}: {what}, the record says {shard.length} bytes", prefix)

    for left in range(9, -1, -1):  # a save may overwrite it meanwhile: then its files go
        text = read_file(storage, record_name(check_prefix(prefix)))
        try:
            return text, decode_record(text, prefix, check_files)
        except CheckpointException:
            if not left or read_file(storage, record_name(prefix)) == text:
                raise
    raise AssertionError("the loop returns or raises")


_RECORD_HEAD = re.compile(
    rb'\{"format_version":([0-9]{1,9}),"save_id":"([0-9a-f]{8})","sequence":([0-9]{1,18}),'
)


class RecordHead(NamedTuple):
    """The first fields of a record of any version."""

    version: int
    save_id: str
    sequence: int


def record_head(storage: CheckpointStorage, prefix: str, sound: bool = True) -> RecordHead | None:
    """The head of a record, without parsing it whole; None where there is none, or C1 does not hold.

    Not `sound`: also of a record that does not hold its CRC32, as far as it can be read. An OSError, or a
    STORAGE_ERROR for a link, where nobody can tell.
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            data = read_file(storage, record_name(prefix))
        except CheckpointException as error:
            if error.type is ExceptionType.STORAGE_ERROR:
                raise
            return None
        text = data[: -len(_seal(b""))]
        if (head := _RECORD_HEAD.match(data)) and (not sound or data[len(text) :] == _seal(text)):
            return RecordHead(int(head[1]), head[2].decode(), int(head[3]))
    return None


@contextlib.contextmanager
def skipping(what: str, warn: Warn) -> Iterator[None]:
    """Turn what is wrong with one checkpoint among several into a warning: it must not stop the rest."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        if not isinstance(error, FileNotFoundError):  # gone meanwhile
            warn(f"skipped {what}: {error}")


def _walk(storage: CheckpointStorage, warn: Warn, directory: str = "") -> Iterator[str]:
    """Every file, and links in place of records; `warn` is told of other links and unreadable directories."""
    for name in storage.names(directory):
        path = name.removesuffix("/")
        if path == name or path.endswith(RECORD_SUFFIX):
            yield path
        elif _is_prefix(path):
            with skipping(path, warn):
                yield from _walk(storage, warn, path)


def recorded_prefixes(storage: CheckpointStorage, warn: Warn = log.warning) -> list[str]:
    """Every prefix that has a record, intact or not."""
    names = [name for name in _walk(storage, warn) if name.endswith(RECORD_SUFFIX)]
    return [name for name in (name.removesuffix(RECORD_SUFFIX) for name in names) if _is_prefix(name)]


def list_committed(storage: CheckpointStorage, warn: Warn = log.warning) -> list[CheckpointMetadata]:
    """Every committed checkpoint, oldest first; `warn` is told of those that are damaged or unreadable."""
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


def delete_committed(storage: CheckpointStorage, prefix: str) -> None:
    """Delete a checkpoint backwards: the record, made durable, then its files. Safe to repeat after a crash.

    FileNotFoundError where there is nothing. Files of a save under way, which has a fence, are left alone.
    """
    files = list(tensor_files(storage, check_prefix(prefix)))  # first: no file is older than its fence
    fences = save_files(storage.names(prefix.rpartition("/")[0]))
    live = {i for owner, i, name in fences if owner == prefix and name.endswith(".tmp")}
    existed = storage.delete(record_name(prefix))
    if existed:
        storage.sync_directory(record_name(prefix))
    dead = [name for save_id, name in files if save_id not in live]
    if not existed and not dead:
        raise FileNotFoundError(f"no checkpoint {prefix!r}")
    for name in dead:
        storage.delete(name)


def collect_garbage(
    storage: CheckpointStorage, min_age_s: float = 86400.0, warn: Warn = log.warning
) -> list[str]:
    """Remove what crashed saves and deletes left behind, and return its names. Any process, at any time.

    A save whose fence is younger than `min_age_s` seconds counts as alive: its files stay. So does everything
    under a prefix whose record cannot be read, or is of another version. `warn` is told what stays, and until
    when.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for prefix, save_id, name in save_files(_walk(storage, warn)):
        found.setdefault(prefix, []).append((save_id, name))
    removed: list[str] = []
    for prefix, files in sorted(found.items()):
        keep = set[str]()
        with skipping(prefix, warn):
            for save_id in sorted({save_id for save_id, _ in files}):  # a fence may be newer than the list
                fence = fence_name(prefix, save_id)
                if (age := _age_of_fence(storage, fence)) is not None:
                    if 0 < age >= min_age_s:  # I4: first the fence
                        removed += [fence] if storage.delete(fence) else []
                    else:
                        keep.add(save_id)
                        left = f"{(min_age_s - max(0.0, age)) / 3600:.1f} h"
                        warn(f"kept save {save_id} of {prefix}, which may be alive: old enough in {left}")
            head = record_head(storage, prefix)
            if head is None and storage.length(record_name(prefix)) is not None:
                raise corrupted("its record is damaged", prefix)
            if head is not None and head.version != FORMAT_VERSION:
                raise corrupted(f"its record is of format version {head.version}", prefix)
            keep |= {head.save_id} if head else set()
            dead = [name for save_id, name in files if save_id not in keep and not name.endswith(".tmp")]
            removed += [name for name in dead if storage.delete(name)]
    return removed


def _age_of_fence(storage: CheckpointStorage, name: str) -> float | None:
    """None for a fence that is gone: its save has committed, or was abandoned."""
    try:
        return storage.age_s(name)
    except FileNotFoundError:
        return None
