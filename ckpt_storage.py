"""Bytes: where checkpoints lie, what their files look like, and when one counts as committed.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file imports neither of the others)

Layout below the base path, for the prefix `run/step_100` saved as `4f2a9c1e` by two ranks:

    run/step_100.metadata.json                         the record: the checkpoint exists if and only if this does
    run/step_100.metadata.json.4f2a9c1e.tmp            the fence: a save under way, renamed to the record at the commit
    run/step_100/4f2a9c1e-00000-of-00002.safetensors   a tensor file ("shard"), one a rank

A checkpoint is **committed** when all of this holds; `read_committed` is the one place that says so:
    C1  the record is a regular file whose last field is the CRC32 of every byte before it;
    C2  its format version is one that this code knows;
    C3  it is well formed, and every name in it passes the name rules;
    C4  every shard that it names is a regular file of exactly the length that it states.

The tensor file (all integers little-endian) is a valid safetensors file:

    Offset | Size | Field
    0      | 8    | N: length of the JSON header, u64 (struct "<Q")
    8      | N    | JSON header, starts with "{", padded with spaces so that 8 + N is a multiple of 4096
    8 + N  | rest | data: the entries, contiguous, in the order of their offsets, in blocks of 4 MiB

The header's `__metadata__` (strings to strings) has `ckpt_version`, `block_bytes`, `crc32` (eight hex digits a
block, in order) and `pieces` (JSON: for every entry that is part of a larger tensor, or compressed, its `offset` in
the whole, the `whole` shape, and its logical `dtype`, `shape` and `frames`). CRCs cover the stored bytes of a block; the
record holds the CRC32 of the header itself (offset 0 up to the data). So every byte of a checkpoint is under a checksum.

Assumed of the file system: rename and link within a directory are atomic; fsync of a file and of its directory make
both durable. Not assumed: clocks, ordering of unsynced operations, that a failed fsync can be tried again.

Read next: `FileOps` (every system call), `LocalStorage`, the tensor file, the record, then `ckpt_coord.py`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import datetime
import enum
import errno
import fcntl
import functools
import importlib
import json
import logging
import math
import mmap
import os
import re
import resource
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
    "CheckpointException", "CheckpointMetadata", "CheckpointStorage", "CompressionLevel", "ExceptionType", "FileOps",
    "LocalStorage", "ShardMetadata", "StorageFactory", "StorageOptions", "StoredFile", "TensorMetadata",
]  # fmt: skip

T = TypeVar("T")
Warn = Callable[[str], object]  # is told what was left out, and why
_WARN: Warn = logging.getLogger("ckpt").warning

FORMAT_VERSION = 1
BLOCK_BYTES = 4 << 20  # the unit of checksums, of I/O and of who writes what
IO_THREADS = 6  # of a rank: they keep the disk busy while some of them copy and checksum
FRAME_BYTES = 4 << 20  # logical bytes behind one compressed frame
ALIGN_BYTES = 4096  # data start: a multiple of the page, so that blocks can be read and written directly
MAX_HEADER_BYTES = 100_000_000  # what safetensors readers accept
DIRECT_BYTES = 256 << 10  # smaller reads and writes go through the page cache
STUCK_S = 2.0  # a thread that is stuck in the kernel holds up the end of a failed operation no longer
COLD_BYTES = 64 << 20  # whether the page cache has a file's bytes is asked of such regions
SLOW_TO_FREE_BYTES = 64 << 20
HUGE_PAGE_BYTES = 2 << 20  # size and alignment of a huge page
RECORD_SUFFIX = ".metadata.json"

_LIBC = ctypes.CDLL(None, use_errno=True)
_MADV_WIPEONFORK = 18  # of Linux 4.14; Python's mmap lacks the name

# --------------------------------------------------------------------------------------------------------------------
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


def _require(fact: object, problem: str) -> None:
    """ValueError(problem) unless `fact`; what parses bytes turns it into CORRUPTED_CHECKPOINT."""
    if not fact:
        raise ValueError(problem)


# --------------------------------------------------------------------------------------------------------------------
# Names: every file name is made and judged here

_PART = re.compile(r"[A-Za-z0-9._=+-]{1,200}")
_SHARD = re.compile(r"([0-9a-f]{8})(-[0-9]{5,}-of-[0-9]{5,}|\.model|\.rest)?\.safetensors")
_SHARD_PATH = re.compile(f"(.+)/{_SHARD.pattern}")
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
    return prefix + RECORD_SUFFIX


def fence_name(prefix: str, save_id: str) -> str:
    """The record under construction; removing it makes it impossible for that save to commit."""
    return f"{prefix}{RECORD_SUFFIX}.{save_id}.tmp"


def shard_name(save_id: str, rank: int, world_size: int) -> str:
    """One rank's tensor file."""
    return f"{save_id}-{rank:05d}-of-{world_size:05d}.safetensors"


def shared_name(save_id: str, part: str = "") -> str:
    """A tensor file that all ranks share; `part`: "model" and "rest", where there are two."""
    return f"{save_id}{part and f'.{part}'}.safetensors"


def save_of(shard: str) -> str:
    """The id of the save that made a tensor file."""
    return shard.rpartition("/")[2][:8]


# --------------------------------------------------------------------------------------------------------------------
# The seam: every system call that touches a checkpoint goes through these methods, so tests can log, fail or stop it


class FileOps:
    """The operating system's file calls, one method each; `dir_fd` is an open directory, names are single parts."""

    def open(self, name: str, flags: int, dir_fd: int | None = None) -> int:
        """Open, never following a link in the last part, never blocking on a FIFO."""
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def open_direct(self, fd: int, flags: int) -> int:
        """Open the file behind `fd` once more, past the page cache. OSError where that cannot be, or few descriptors are left."""
        direct = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_DIRECT)
        if direct >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:  # the other half is for files not open yet
            os.close(direct)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return direct

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def is_cached(self, fd: int, offset: int, length: int) -> bool:
        """Whether most of it is in the page cache, by eight pages of it. (By mincore: a read would start a readahead.)"""
        step, page = -(-length // (8 * mmap.PAGESIZE)) * mmap.PAGESIZE, ctypes.c_ubyte()
        with mmap.mmap(fd, length, access=mmap.ACCESS_READ, offset=offset) as view:
            address = np.frombuffer(view, np.uint8).ctypes.data  # the array is gone, so that the map can close
            asked = [ctypes.c_void_p(address + at) for at in range(0, length, step)]
            held = [_LIBC.mincore(at, ctypes.c_size_t(1), ctypes.byref(page)) == 0 and page.value & 1 for at in asked]
        return 2 * sum(held) > len(held)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def allocate(self, fd: int, length: int) -> None:
        """Extend to `length`, reserving the room, so that writes neither run out of it nor wait for each other."""
        if _LIBC.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(length)) != 0:
            if (code := ctypes.get_errno()) not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(code, os.strerror(code))
            os.ftruncate(fd, length)  # os.posix_fallocate would write zeros

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_dir(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: str, target: str, dir_fd: int) -> None:
        os.rename(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def link(self, source: str, target: str, dir_fd: int) -> None:
        os.link(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def unlink(self, name: str, dir_fd: int) -> None:
        """Remove a name at once. Freeing gigabytes may take the file system a second: a thread's last close waits for it."""
        if os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_size < SLOW_TO_FREE_BYTES:
            return os.unlink(name, dir_fd=dir_fd)
        held = os.open(name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            os.unlink(name, dir_fd=dir_fd)
        finally:
            try:
                threading.Thread(target=os.close, args=(held,), name="ckpt-free", daemon=True).start()
            except RuntimeError:  # no more threads: then this call waits
                os.close(held)

    def mkdir(self, name: str, dir_fd: int | None) -> None:
        os.mkdir(name, dir_fd=dir_fd)

    def rmdir(self, name: str, dir_fd: int) -> None:
        os.rmdir(name, dir_fd=dir_fd)

    def stat(self, name: str, dir_fd: int) -> os.stat_result:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def listdir(self, fd: int) -> list[str]:
        return os.listdir(fd)

    def lock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --------------------------------------------------------------------------------------------------------------------
# Storage


@runtime_checkable
class StoredFile(Protocol):
    """An open file of a storage. Reads and writes are positioned and may come from several threads at once.

    `close` may come while a thread is stuck in one of them. What that thread does afterwards must touch no other file.
    """

    def read(self, offset: int, buffer: memoryview, bounce: memoryview | None = None) -> None:
        """Fill `buffer`. `bounce`: given where nobody else wants these bytes soon, memory by way of which they may come;
        all of `buffer`, or apart from it."""

    def write(self, offset: int, data: memoryview) -> None: ...
    def length(self) -> int: ...
    def resize(self, length: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class Gate:
    """Admits threads, `with gate:`, until it is closed: what a thread does inside ends before the gate counts as shut.

    Afterwards a thread that outlives its operation (stuck in a read of a dead file server, say) gets an OSError here.
    """

    def __init__(self) -> None:
        self._changed, self._inside, self._open = threading.Condition(), set[int](), True

    def __enter__(self) -> None:
        with self._changed:
            if not self._open:
                raise OSError(errno.EBADF, "the operation that this belongs to is over")
            self._inside.add(threading.get_ident())

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside.discard(threading.get_ident())
            self._changed.notify_all()

    def close(self, wait: bool) -> bool:
        """Admit no thread any more. Whether no other thread is inside; `wait` until that is so."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: self._inside <= {threading.get_ident()}, None if wait else 0.0)


@runtime_checkable
class CheckpointStorage(Protocol):
    """Where checkpoints are kept; names are '/'-separated paths below the storage's root."""

    def create(self, name: str) -> StoredFile:
        """Make a new file, and the directories above it; it is locked until closed. FileExistsError if there."""

    def open(self, name: str, write: bool = False) -> StoredFile:
        """Open an existing regular file; FileNotFoundError if there is none."""

    def length(self, name: str) -> int | None:
        """Bytes in the regular file `name`, or None where nothing is."""

    def names(self, directory: str = "") -> list[str]:
        """Every regular file below `directory`, sorted.

        A link, which is never followed, and a directory that cannot be listed come with a `/` at the end; as
        `directory` itself they are an error.
        """

    def publish(self, temporary: str, name: str, overwrite: bool) -> None:
        """Atomically give `temporary` its final name, in the same directory. FileExistsError unless `overwrite`."""

    def delete(self, name: str) -> bool:
        """Remove a file; False where there was none."""

    def prune(self, directory: str) -> None:
        """Remove `directory` if it is empty."""

    def sync_directory(self, name: str) -> None:
        """Make creations, renames and removals in the directory that holds `name` durable."""

    def reap(self, name: str, only_look: bool = False) -> bool:
        """Remove a file whose creator is proved dead (or only look); False where it may be alive."""


_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # direct I/O refused after it was opened


class LocalFile:
    """A file on a local or mounted file system.

    Large aligned writes go past the page cache where the file system allows it: that is the disk's own speed, and pushes
    nothing out of memory. So do reads of what only one rank wants, unless the cache has it: filling the cache takes more
    time than the disk. What several ranks want comes through it, so that the disk is read once.
    """

    def __init__(self, files: FileOps, fd: int, name: str, flags: int) -> None:
        self._files, self._fd, self._name, self._flags = files, fd, name, flags
        self._direct_fd: int | None = None  # -1 where there is none
        self._cold: dict[int, bool] = {}  # of regions of COLD_BYTES
        self._lock, self._gate = threading.Lock(), Gate()

    def read(self, offset: int, buffer: memoryview, bounce: memoryview | None = None) -> None:
        with self._gate:
            alone = bounce is not None and len(buffer) >= DIRECT_BYTES and self._is_cold(offset)
            done = self._move(self._files.pread, offset, buffer, bounce if alone else None)
        if done < len(buffer):
            raise corrupted(f"{self._name}: ends at byte {offset + done}, {len(buffer) - done} bytes missing")

    def write(self, offset: int, data: memoryview) -> None:
        with self._gate:
            done = self._move(self._files.pwrite, offset, data, data)
        if done < len(data):
            raise OSError(errno.EIO, "the disk takes nothing more", self._name)

    def _move(
        self, call: Callable[[int, memoryview, int], int], offset: int, data: memoryview, via: memoryview | None
    ) -> int:
        """Read or write all of `data` by `call`, past the page cache by way of `via`; short calls go on. Returns how much."""
        direct = -1 if via is None else self._direct(offset, via)
        whole = _aligned(data) if direct >= 0 else 0  # [0, whole) passes the cache, while what is left of it is aligned
        done = 0
        while done < len(data):
            fd, part = self._fd, data[done : done + (1 << 30)]
            if via is not None and done < whole and done % ALIGN_BYTES == 0:
                at = done % _aligned(via)  # `via` may be `data` itself
                fd, part = direct, via[at : min(_aligned(via), at + whole - done)]
            try:
                count = call(fd, part, offset + done)
            except OSError as error:
                if fd != direct or error.errno not in _NOT_DIRECT:
                    raise
                whole = 0
                continue
            if count <= 0:
                break
            if fd == direct and via is not data:
                data[done : done + count] = part[:count]
            done += count
        return done

    def _is_cold(self, offset: int) -> bool:
        """Looked up once a region: asking takes a good part of the time that reading from the cache does."""
        region = offset // COLD_BYTES
        if region not in self._cold:
            length = min(COLD_BYTES, self.length() - region * COLD_BYTES)
            try:
                self._cold[region] = length > 0 and not self._files.is_cached(self._fd, region * COLD_BYTES, length)
            except (OSError, ValueError):  # it cannot be mapped
                self._cold[region] = False
        return self._cold[region]

    def _direct(self, offset: int, memory: memoryview) -> int:
        """A descriptor that passes the page cache, for what starts at that place and in that memory; -1 without one."""
        if len(memory) < DIRECT_BYTES or (offset | np.frombuffer(memory, np.uint8).ctypes.data) % ALIGN_BYTES:
            return -1
        with self._lock:
            if self._direct_fd is None:
                try:
                    self._direct_fd = self._files.open_direct(self._fd, self._flags)
                except OSError:  # tmpfs, or no /proc: the cache will do
                    self._direct_fd = -1
            return self._direct_fd

    def length(self) -> int:
        return os.fstat(self._fd).st_size

    def resize(self, length: int) -> None:
        (self._files.allocate if length > self.length() else self._files.truncate)(self._fd, length)

    def sync(self) -> None:
        self._files.fsync(self._fd)

    def close(self) -> None:
        """Close, unless a thread is stuck in a read or write: then the descriptors stay open until the process ends.

        Else the next file would get their numbers, and that thread's next call would land in it.
        """
        if not self._gate.close(wait=False):
            return
        fds, self._fd, self._direct_fd = (self._direct_fd, self._fd), -1, -1
        for fd in fds:
            if fd is not None and fd >= 0:
                self._files.close(fd)


def _aligned(memory: memoryview) -> int:
    """The whole pages of it."""
    return len(memory) // ALIGN_BYTES * ALIGN_BYTES


_ABSENT = (FileNotFoundError, NotADirectoryError)


def _refusal(name: str, mode: int) -> CheckpointException:
    """The exception for something else where a file or directory of ours should be."""
    if stat.S_ISLNK(mode):
        what = "a symbolic link, and none is followed below the base path; replace it by what it points to"
        return CheckpointException(f"{name}: {what}", name, ExceptionType.STORAGE_ERROR)
    return corrupted(f"{name}: not a regular file", name)


class LocalStorage:
    """Plain files below `base_path`. No path component below it is ever followed through a symbolic link."""

    def __init__(self, base_path: str | os.PathLike[str] = "./checkpoints", files: FileOps | None = None) -> None:
        self.base_path = os.path.abspath(base_path)
        self.files = files or FileOps()
        self._made_above = {os.path.dirname(self.base_path)}  # directories above the base path to fsync

    def create(self, name: str) -> LocalFile:
        for _ in range(100):
            with (
                contextlib.suppress(FileNotFoundError),  # a clean-up has pruned the directory since we entered it
                self._parent(name, make=True) as (directory, leaf),
                contextlib.ExitStack() as undo,
            ):
                fd = self.files.open(leaf, os.O_RDWR | os.O_CREAT | os.O_EXCL, directory)
                undo.callback(self.files.close, fd)
                # Else a clean-up has removed it before it was locked: again.
                if not self._lock(fd) or self.files.stat(leaf, directory).st_ino == os.fstat(fd).st_ino:
                    undo.pop_all()
                    return LocalFile(self.files, fd, name, os.O_RDWR)
        raise FileNotFoundError(errno.ENOENT, "removed again and again while it was created", name)

    def _lock(self, fd: int) -> bool:
        """Lock a new file, which somebody may hold for an instant to see if it is in use; False where nothing locks."""
        deadline = time.monotonic() + 5.0
        while True:
            try:
                self.files.lock(fd)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    return False  # then nobody is ever proved dead
                raise

    def open(self, name: str, write: bool = False) -> LocalFile:
        flags = os.O_RDWR if write else os.O_RDONLY
        with self._parent(name) as (directory, leaf):
            try:
                fd = self.files.open(leaf, flags, directory)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise _refusal(name, stat.S_IFLNK) from error
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
            self.files.close(fd)
            raise _refusal(name, mode)
        return LocalFile(self.files, fd, name, flags)

    def length(self, name: str) -> int | None:
        with contextlib.suppress(*_ABSENT), self._parent(name) as (directory, leaf):
            if stat.S_ISREG((status := self.files.stat(leaf, directory)).st_mode):
                return status.st_size
            raise _refusal(name, status.st_mode)
        return None

    def names(self, directory: str = "") -> list[str]:
        found, below, above = list[str](), list[str](), f"{directory}/" if directory else ""
        with contextlib.suppress(*_ABSENT), self._parent(f"{above}x") as (fd, _):
            for name in self.files.listdir(fd):
                with contextlib.suppress(FileNotFoundError):  # gone since: a writer is at work beside us
                    mode = self.files.stat(name, fd).st_mode
                    if stat.S_ISDIR(mode):
                        below.append(above + name)
                    elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                        found.append(above + name + "/" * stat.S_ISLNK(mode))
        for inner in below:  # with this one closed: no more than one chain of directories is open at a time
            try:
                found += self.names(inner)
            except (OSError, CheckpointException):  # somebody else's: the rest can be listed
                found.append(f"{inner}/")
        return sorted(found)

    def publish(self, temporary: str, name: str, overwrite: bool) -> None:
        with self._parent(name) as (directory, leaf):
            source = temporary.rpartition("/")[2]
            if overwrite:
                self.files.rename(source, leaf, directory)
            else:
                self.files.link(source, leaf, directory)
                with contextlib.suppress(OSError):  # published already; a clean-up finds the other name
                    self.files.unlink(source, directory)

    def delete(self, name: str) -> bool:
        with contextlib.suppress(*_ABSENT), self._parent(name) as (directory, leaf):
            self.files.unlink(leaf, directory)
            return True
        return False

    def prune(self, directory: str) -> None:
        try:
            with self._parent(directory) as (parent, leaf):
                self.files.rmdir(leaf, parent)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise

    def sync_directory(self, name: str) -> None:
        """Also syncs the directories above, up to the one that holds the base path: they may be new."""
        while name:
            with self._parent(name) as (directory, _):
                self.files.fsync_dir(directory)
            name = name.rpartition("/")[0]
        for path in sorted(self._made_above):
            with self._opened(os.path.realpath(path)) as above:
                self.files.fsync_dir(above)

    def reap(self, name: str, only_look: bool = False) -> bool:
        try:
            with self._parent(name) as (directory, leaf), self._opened(leaf, directory, os.O_RDONLY) as fd:
                self.files.lock(fd)
                if not only_look:  # under the lock, so that a new owner cannot come between
                    self.files.unlink(leaf, directory)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        return True

    @contextlib.contextmanager
    def _parent(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open directory that holds `name`, reached part by part without following links, and its last part."""
        parts = name.split("/")
        if any(p in ("", ".", "..") or "\0" in p for p in parts):
            raise ValueError(f"illegal path {name!r}")
        with contextlib.ExitStack() as opened:
            # The base path itself may be, or lie behind, a link of the user's own making.
            directory = opened.enter_context(self._opened(os.path.realpath(self.base_path), make=make))
            for depth, part in enumerate(parts[:-1], 1):
                try:
                    directory = opened.enter_context(self._opened(part, directory, make=make))
                except NotADirectoryError as error:
                    if not stat.S_ISLNK(mode := self.files.stat(part, directory).st_mode):
                        raise
                    raise _refusal("/".join(parts[:depth]), mode) from error
            yield directory, parts[-1]

    @contextlib.contextmanager
    def _opened(
        self, name: str, directory: int | None = None, flags: int = os.O_DIRECTORY, make: bool = False
    ) -> Iterator[int]:
        """Open to look, by a path or in an open directory. `make`: also a directory that is not there yet, or none above."""
        try:
            fd = self.files.open(name, flags, directory)
        except FileNotFoundError:
            if not make:
                raise
            if directory is None:
                with self._opened(above := os.path.dirname(name), make=True):
                    self._made_above = self._made_above | {above}
            with contextlib.suppress(FileExistsError):  # another rank was faster
                self.files.mkdir(name, directory)
            fd = self.files.open(name, flags, directory)
        try:
            yield fd
        finally:
            with contextlib.suppress(OSError):  # nothing was written through it, and it is closed in any case
                self.files.close(fd)


@dataclass(frozen=True)
class StorageOptions:
    """Which registered provider to build a storage with, and its settings."""

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


# --------------------------------------------------------------------------------------------------------------------
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
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
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
        _require(all(type(item) is str for item in found), f"{key!r}: expected strings")
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
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_PLAIN_KINDS = "biufcmMSU"  # of numpy's dtypes, those without objects or fields


def _pack_array(value: npt.ArrayLike) -> list[object] | None:
    array = np.asarray(value)
    return [array.dtype.str, list(array.shape), _base64(array.tobytes())] if array.dtype.kind in _PLAIN_KINDS else None


def _unpack_array(body: tuple[str, list[int], str]) -> npt.NDArray[np.generic]:
    dtype, shape, data = body
    _require(np.dtype(dtype).kind in _PLAIN_KINDS, f"dtype {dtype}")
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()


def _pack_datetime(value: datetime.datetime) -> str | None:
    return value.isoformat() if value.tzinfo is None or type(value.tzinfo) is datetime.timezone else None


_TORCH_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_MAPPINGS = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}  # as lists of pairs
_SEQUENCES = {"$tuple": tuple, "$Size": torch.Size, "$set": set, "$frozenset": frozenset}  # as lists
_TORN_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # two characters of Python, which JSON reads as one
_LEAVES: dict[str, tuple[type, Callable[..., object], Callable[..., object]]] = {  # type, to JSON (or None), and back
    "$str": (
        str,
        lambda text: _base64(text.encode("utf-8", "surrogatepass")),
        lambda data: base64.b64decode(data).decode("utf-8", "surrogatepass"),
    ),
    "$int": (int, hex, lambda text: int(text, 16)),
    "$float": (float, lambda x: struct.pack(">d", x).hex(), lambda text: struct.unpack(">d", bytes.fromhex(text))[0]),
    "$bytes": (bytes, _base64, base64.b64decode),
    "$datetime": (datetime.datetime, _pack_datetime, datetime.datetime.fromisoformat),
    "$dtype": (torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), _TORCH_DTYPES.__getitem__),
    "$device": (torch.device, str, lambda text: torch.device(str(text))),
    "$ndarray": (np.ndarray, _pack_array, _unpack_array),
    "$scalar": (np.generic, _pack_array, lambda body: _unpack_array(body)[()]),
}


def encode_value(value: object, path: str, on_tensor: Callable[[str, torch.Tensor], str] | None = None) -> object:
    """`value` as plain JSON; what JSON lacks becomes {"$type": ...}. Tensors become {"$tensor": on_tensor(path, t)}.

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
        f"{path}: cannot store a {type(value).__module__}.{type(value).__qualname__}; convert it to tensors, numbers, "
        "strings, or lists, tuples, sets and dicts of them (for an Enum its .value, for a dataclass dataclasses.asdict)"
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


# --------------------------------------------------------------------------------------------------------------------
# Dtypes and the row-major geometry of boxes

_CODES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
    "C128": "complex128", "C32": "complex32",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: _TORCH_DTYPES[name] for code, name in _CODES.items() if name in _TORCH_DTYPES}
DTYPES["JSON"] = torch.uint8  # a value that is no tensor, as UTF-8
CODES = {dtype: code for code, dtype in DTYPES.items() if code != "JSON"}
_PAIRS = {"C128": "F64", "C32": "F16"}  # not in safetensors: stored with a last dimension of 2

Shape = tuple[int, ...]


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


def row_boxes(shape: Shape, start: int, stop: int) -> list[tuple[int, Box]]:
    """Cover elements [start, stop) of a row-major array by boxes: (position of its first element, box), in order.

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
    """The tensors whose boxes leave a hole or overlap: by index, in order. Time and memory are linear in the boxes.

    `box` is (rows, 2, dimensions), offset and size, padded with 0 and 1; `tensor` is the index of each row's tensor, whose
    shape is None where it has no boxes. Each index of a dimension has a random weight. Boxes cover a tensor once if the
    products of weights, summed over their elements, add up to the same sum over the whole. Another set of elements
    passes with a probability of about 2^-60 (the lemma of Schwartz and Zippel).
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
    """Random bits for each value, always the same: the mixing function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    bits = values.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


Bytes = npt.NDArray[np.uint8]  # one-dimensional
Ints = npt.NDArray[np.int64]


def byte_view(tensor: torch.Tensor) -> Bytes | None:
    """The memory of a contiguous CPU tensor as bytes, or None where it is elsewhere, strided, or not the values (conj).

    By its address, in a fourth of the time of torch's views: it is valid as long as the caller keeps the tensor.
    """
    if not (tensor.is_cpu and tensor.is_contiguous()) or not tensor.nbytes or tensor.is_conj() or tensor.is_neg():
        return None
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memoryview(memory), np.uint8)


def _in_boxes(data: Bytes, start: int, dtype: torch.dtype, shape: Shape) -> Iterator[tuple[Box, torch.Tensor]]:
    """Row-major bytes of an array, from byte `start` of it on, as boxes of the array, each with its elements."""
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


# --------------------------------------------------------------------------------------------------------------------
# CRC32, compression, threads

for _name in ("isal.isal_zlib", "zlib_ng.zlib_ng", "zlib"):  # the same functions; the first two by vector instructions
    with contextlib.suppress(ImportError):
        _FAST_ZLIB = importlib.import_module(_name)
        break
CRC_PROVIDER = _name.partition(".")[0]
crc32: Callable[..., int] = _FAST_ZLIB.crc32

# A CRC32 begins with all ones and ends inverted. Without either it is linear: what the parts of some bytes give, each in its
# place among zeros, comes together by exclusive or to what the whole gives. (This is what zlib's crc32_combine rests on.)
_ONES = 0xFFFFFFFF
_POLYNOMIAL = 0xEDB88320  # of the CRC32, as all polynomials here with the coefficient of x^0 in the highest bit


def linear_crc32(data: Bytes) -> int:
    """The linear CRC32 of some bytes."""
    return crc32(data, _ONES) ^ _ONES


@functools.lru_cache
def _crc32_of_zeros(length: int) -> int:
    return crc32(bytes(length))


def as_linear(crc: int, length: int) -> int:
    """The linear CRC32 of that many bytes which have this CRC32."""
    return crc ^ _crc32_of_zeros(length)


def with_zeros_behind(crcs: Ints, counts: Ints) -> Ints:
    """The linear CRC32s of the same bytes with so many zeros behind them: times x^(8 count), modulo the polynomial."""
    power = 1 << 23  # x^8
    for bit in range(int(counts.max(initial=0)).bit_length()):
        crcs = np.where(counts >> bit & 1, _times(crcs, power), crcs)
        power = int(_times(np.array(power), power))
    return crcs


def _times(a: Ints, b: int) -> Ints:
    product = np.zeros_like(a)
    for power in range(32):
        product ^= (a >> (31 - power) & 1) * b
        b = b >> 1 ^ (b & 1) * _POLYNOMIAL
    return product


class CompressionLevel(enum.Enum):
    """How hard to compress: NONE, FAST (little more than entropy coding), BALANCED, MAXIMUM."""

    NONE = "none"
    FAST = "fast"
    BALANCED = "balanced"
    MAXIMUM = "maximum"


# Module, level, strategy. Entropy coding is fast, and gives all that can be had from the exponents of weights. ISA-L, which
# knows no strategies, looks for matches too, and still takes half the time of zlib.
_ENTROPY_ONLY = (zlib, 1, zlib.Z_HUFFMAN_ONLY)
_FAST = (_FAST_ZLIB, 1, zlib.Z_DEFAULT_STRATEGY if CRC_PROVIDER == "isal" else zlib.Z_HUFFMAN_ONLY)
_WAYS = {
    CompressionLevel.FAST: (_FAST,),
    CompressionLevel.BALANCED: (_ENTROPY_ONLY, (zlib, 6, zlib.Z_DEFAULT_STRATEGY)),
    CompressionLevel.MAXIMUM: (_ENTROPY_ONLY, (zlib, 9, zlib.Z_DEFAULT_STRATEGY)),
}


def _deflate(data: memoryview, level: CompressionLevel) -> bytes | memoryview:
    """`data` compressed the best way of the level, or as it is where it does not shrink (or a sample not by 2 %)."""

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

    Else: u8 number of planes P (1 or `width`), P times u32 stored length, the planes. Plane i holds byte i of every
    element, since the exponents of neighbouring weights are alike while their mantissas are noise; a plane as long as its
    share is raw. The idea is Blosc's shuffle filter.
    """
    found = []
    for count in sorted({1, width}) if level is CompressionLevel.MAXIMUM else [width]:
        word = math.gcd(count, 8)  # shifts of whole words take a third of the time of strided bytes
        columns = data.view(f"<u{word}").reshape(-1, count // word).T
        bytewise = ((column >> shift).astype(np.uint8) for column in columns for shift in range(0, 8 * word, 8))
        planes = [_deflate(plane.data, level) for plane in bytewise]
        found.append(b"".join([struct.pack(f"<B{count}I", count, *map(len, planes)), *planes]))
    best = min(found, key=len)
    return best if len(best) < len(data) else data.tobytes()


def expand_frame(data: bytes, length: int, width: int) -> Bytes:
    """Inverse of `compress_frame`; never takes more memory than the `length` bytes that the header declares."""
    if len(data) == length:
        return np.frombuffer(bytearray(data), np.uint8)
    try:
        count = data[0]
        _require(count in (1, width) and length % count == 0, f"{count} planes")
        lengths = struct.unpack_from(f"<{count}I", data, 1)
        at, share = 1 + 4 * count, length // count
        out = np.empty((share, count), np.uint8)
        for index, size in enumerate(lengths):
            plane, at = data[at : at + size], at + size
            if size != share:
                stream = _FAST_ZLIB.decompressobj()
                plane = stream.decompress(plane, share + 1)
                _require(stream.eof, "plane longer than declared")
            _require(len(plane) == share, "plane of another length than declared")
            out[:, index] = np.frombuffer(plane, np.uint8)
        _require(at == len(data), "frame of another length than declared")
    except (ValueError, IndexError, struct.error, _FAST_ZLIB.error) as error:
        raise corrupted(f"compressed frame is damaged: {error}") from error
    return out.reshape(-1)


SUM_WORDS = 4 << 20  # of eight bytes, that a device sums up at a time


def device_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum of a tensor's row-major bytes, computed on its device: 64 bits, where a CRC32 would bring all of it here.

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
        for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):  # the constants of `_mixed`, as signed numbers
            weight = weight * factor
            weight ^= (weight >> 29) & 0x7FFFFFFFF
        total += (part * (weight | 1)).sum()
    return total


def cuda_in_use() -> bool:
    """Whether this process has initialised CUDA; asking does not."""
    return torch.cuda.is_available() and bool(getattr(torch.cuda, "is_initialized")())  # torch does not type it


def aligned_buffer(length: int) -> Bytes:
    """Memory for I/O, at least page-aligned, so that device copies and direct I/O are fast: pinned where CUDA is in use.

    Else in huge pages where the system has them: then a transfer is few long segments instead of one a page of 4 KiB,
    which virtual disks take many times longer for. A fork's child finds zeros in it: pages that are copied on write would
    cost their size again, and what direct I/O reads into them could be lost.
    """
    if cuda_in_use():
        pinned: Bytes = torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned
    memory = mmap.mmap(-1, length + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, _MADV_WIPEONFORK):
        with contextlib.suppress(OSError):  # a kernel without it
            memory.madvise(advice)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + length]


def in_parallel(
    items: Iterable[T], work: Callable[[T, Bytes], None], count: int, poll: Callable[[], None] = lambda: None
) -> None:
    """Run `work(item, buffer)` for all `count` items (none is None) on `IO_THREADS`, each with its buffer of `BLOCK_BYTES`.

    `poll` runs in the calling thread a few times a second and may raise to stop. The first error of any thread is
    raised here after the others have stopped: none vanishes. Or after `STUCK_S`, while some are stuck in `work`: so what
    changes anything but its buffer passes a `Gate`, which the operation closes.
    """
    source, lock, stop, errors = iter(items), threading.Lock(), threading.Event(), list[BaseException]()

    def drain() -> None:
        try:
            buffer = aligned_buffer(BLOCK_BYTES)
            while not stop.is_set():
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item, buffer)
        except BaseException as error:
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=drain, name=f"ckpt-io-{n}", daemon=True) for n in range(min(IO_THREADS, count))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive() and not errors:
                worker.join(0.05)
                poll()
    finally:
        stop.set()
        deadline = time.monotonic() + STUCK_S
        for worker in workers:
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]


# --------------------------------------------------------------------------------------------------------------------
# The tensor file


class Entry(NamedTuple):
    """One entry of a tensor file: a piece (a box) of the tensor `whole`, at [begin, end) of the file's data."""

    name: str
    dtype: str  # logical code, a key of DTYPES
    shape: Shape  # logical shape of the piece
    begin: int
    end: int
    offset: Shape  # where the piece lies in the whole tensor
    whole: Shape
    frames: tuple[int, ...] = ()  # stored length of each compressed frame; () where stored raw

    def nbytes(self) -> int:
        """Logical bytes of the piece."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def described(self) -> tuple[dict[str, object], dict[str, object]]:
        """What the header says of it: in the table of all safetensors files, and in `pieces`."""
        code, shape = ("U8", (self.end - self.begin,)) if self.frames else stored_form(self.dtype, self.shape)
        more: dict[str, object] = {}
        if self.shape != self.whole:
            more = {"offset": [*self.offset], "whole": [*self.whole]}
        if code != self.dtype or self.frames:
            more["dtype"] = self.dtype
        if self.frames:
            more |= {"shape": [*self.shape], "frames": _hex(self.frames)}
        elif self.dtype == "F4" and not self.shape:  # two elements, for safetensors as for a shape of (1,)
            more["shape"] = []
        return {"dtype": code, "shape": [*shape], "data_offsets": [self.begin, self.end]}, more


class Header(NamedTuple):
    """A parsed tensor-file header; `entries` are in the order of their bytes."""

    entries: list[Entry]
    block_crcs: list[int]
    data_start: int
    data_length: int


def block_count(data_length: int) -> int:
    return -(-data_length // BLOCK_BYTES)


def encode_header(entries: Sequence[Entry], block_crcs: Sequence[int], reserve: int = 0) -> bytes:
    """The header's bytes, up to the data. Gaps between entries become named pad entries.

    CRCs are fixed-width fields: a header with zeros for CRCs is as long as the final one. `reserve` is the least length.
    Raises ValueError over safetensors' limit of 100,000,000 bytes.
    """
    table, pieces, position = dict[str, object](), dict[str, object](), 0
    for entry in entries:
        if (gap := entry.begin - position) > 0:
            table[f"pad/{position}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [position, entry.begin]}
        if entry.name == "__metadata__":
            raise ValueError(
                "a safetensors file cannot hold a tensor named '__metadata__', a name that it uses itself: "
                "rename it, or save with CheckpointFormat.MULTI_SHARD, which names it 'model/__metadata__'"
            )
        _require(entry.name not in table, f"two entries of one file are named {entry.name!r}")
        table[entry.name], more = entry.described()
        if more:
            pieces[entry.name] = more
        position = entry.end
    metadata = {
        "format": "pt",
        "ckpt_version": str(FORMAT_VERSION),
        "block_bytes": str(BLOCK_BYTES),
        "crc32": _hex(block_crcs),
        "pieces": dump_json(pieces).decode(),
    }
    text = dump_json({"__metadata__": metadata, **table})
    length = max(reserve, -(-(8 + len(text)) // ALIGN_BYTES) * ALIGN_BYTES)
    if length - 8 > MAX_HEADER_BYTES:
        raise ValueError(
            f"a tensor file's header would take {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors readers "
            "accept; save with CheckpointFormat.MULTI_SHARD, which spreads the tensors over one file a rank"
        )
    return struct.pack("<Q", length - 8) + text + b" " * (length - 8 - len(text))


def with_checksums(header: bytes, block_crcs: Sequence[int]) -> bytes:
    """A header that was made with zeros for checksums, with these in their place: the first field that has the name."""
    digits, (before, name, behind) = _hex(block_crcs).encode(), header.partition(b'"crc32":"')
    return before + name + digits + behind[len(digits) :]


def read_header(file: StoredFile, path: str, expected_crc: int, most: int) -> Header:
    """Read and check the header of an open tensor file; CORRUPTED_CHECKPOINT for whatever is wrong with it.

    One of more than `most` bytes is refused unread: parsed, it would take many times its length.
    """
    length, prefix = file.length(), bytearray(8)
    if length < 8:
        raise corrupted(f"{path}: {length} bytes are too short for a tensor file", path)
    file.read(0, memoryview(prefix))
    (size,) = struct.unpack("<Q", prefix)
    if not 2 <= size <= min(MAX_HEADER_BYTES, most, length - 8) or (8 + size) % ALIGN_BYTES:
        raise corrupted(f"{path}: impossible header length {size} in a file of {length} bytes", path)
    text, data_length = bytearray(size), length - 8 - size
    file.read(8, memoryview(text))
    if (crc := crc32(text, crc32(prefix))) != expected_crc:
        raise corrupted(f"{path}: header has CRC32 {crc:08x}, the record says {expected_crc:08x}", path)
    try:
        _require(text.startswith(b"{"), "does not start with '{'")
        table = Fields(parse_json(text, path))
        metadata = table.child("__metadata__")
        _require(all(type(value) is str for value in metadata.all.values()), "__metadata__ holds more than strings")
        if (version := metadata.text("ckpt_version")) != str(FORMAT_VERSION):
            message = f"{path}: tensor-file version {version!r}, this code reads {FORMAT_VERSION}"
            raise CheckpointException(message, path, ExceptionType.INCOMPATIBLE_VERSION)
        _require(metadata.text("block_bytes") == str(BLOCK_BYTES), f"blocks are not of {BLOCK_BYTES} bytes")
        block_crcs = _unhex(metadata.text("crc32"))
        _require(len(block_crcs) == block_count(data_length), "checksum field does not fit the data")
        pieces = Fields(parse_json(metadata.text("pieces").encode(), path))
        _require(pieces.all.keys() <= table.all.keys() - {"__metadata__"}, "pieces of unknown entries")
        return Header(parse_entries(table, pieces, data_length), block_crcs, 8 + size, data_length)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise corrupted(f"{path}: malformed header: {error}", path) from error


def parse_entries(table: Fields, pieces: Fields, data_length: int) -> list[Entry]:
    """The entries of any safetensors header, in the order of their bytes; ValueError where it breaks the rules."""
    nothing = Fields({})
    entries = [
        _parse_entry(name, table.child(name), pieces.child(name) if name in pieces.all else nothing)
        for name in table.all
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ValueError(f"hole or overlap at byte {position} of the data, before {entry.name!r}")
        position = entry.end
    _require(position == data_length, f"entries end at byte {position} of {data_length} bytes of data")
    return entries


def _hex(numbers: Iterable[int]) -> str:
    return "".join(f"{number:08x}" for number in numbers)


def _unhex(digits: str) -> list[int]:
    """Numbers of eight lower-case hex digits each."""
    _require(len(digits) % 8 == 0 and re.fullmatch("[0-9a-f]*", digits), "malformed hexadecimal field")
    return [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]


def _parse_entry(name: str, item: Fields, info: Fields) -> Entry:
    """An entry of the header's table, and what `pieces` says of it: the inverse of `Entry.described`."""
    code, shape, (begin, end) = item.text("dtype"), item.shape("shape"), item.shape("data_offsets")
    dtype = info.text("dtype") if "dtype" in info.all else code
    if dtype not in DTYPES or begin > end:
        raise ValueError(f"{name!r}: dtype {dtype!r} at bytes {begin} to {end}")
    frames = tuple(_unhex(info.text("frames"))) if "frames" in info.all else ()
    if "shape" in info.all:
        shape = info.shape("shape")
    elif dtype in _PAIRS:
        shape = shape[:-1]
    elif dtype == "F4" and shape:
        shape = (*shape[:-1], shape[-1] // 2)
    offset, whole = (0,) * len(shape), shape
    if "whole" in info.all:
        offset, whole = info.shape("offset"), info.shape("whole")
        inside = all(o + n <= w for o, n, w in zip(offset, shape, whole))
        if not len(whole) == len(offset) == len(shape) or not inside:
            raise ValueError(f"{name!r}: piece outside of its tensor")
    entry = Entry(name, dtype, shape, begin, end, offset, whole, frames)
    nbytes = entry.nbytes()
    whole_frames = sum(frames) == end - begin and len(frames) == -(-nbytes // FRAME_BYTES)
    if entry.described() != (item.all, info.all) or not (whole_frames if frames else nbytes == end - begin):
        raise ValueError(f"{name!r}: {dtype} of shape {list(shape)} stored as {code} in {end - begin} bytes")
    return entry


def read_blocks(
    file: StoredFile, header: Header, first: int, last: int, out: Bytes, path: str, alone: bool = False
) -> None:
    """Read blocks [first, last) into `out` and check each one's CRC32 before anybody uses it. `alone`: nobody else wants them.

    CORRUPTED_CHECKPOINT names the file, the block and the tensors in it.
    """
    memory = out.data
    file.read(header.data_start + first * BLOCK_BYTES, memory, memory if alone else None)
    for block in range(first, last):
        low = (block - first) * BLOCK_BYTES
        found = crc32(out[low : low + BLOCK_BYTES])
        if found != header.block_crcs[block]:
            start, stop = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            names = [entry.name for entry in header.entries if entry.begin < stop and entry.end > start]
            crcs = f"CRC32 {found:08x}, expected {header.block_crcs[block]:08x}"
            raise corrupted(f"{path}: block {block} has {crcs}; it holds {some(names)}", path)


def block_span(header: Header, first: int, last: int) -> int:
    """Bytes in blocks [first, last)."""
    return min(last * BLOCK_BYTES, header.data_length) - first * BLOCK_BYTES


# --------------------------------------------------------------------------------------------------------------------
# The record


class ShardMetadata(NamedTuple):
    """One tensor file of a checkpoint."""

    file: str  # name within the checkpoint's directory
    length: int  # bytes
    header_crc: int


class TensorMetadata(NamedTuple):
    """One tensor (or JSON value) of a checkpoint. `rank` is set for what is kept per rank."""

    name: str
    dtype: str
    shape: Shape  # global
    rank: int | None = None
    alias_of: int | None = None  # index of the tensor that holds the bytes, for tied tensors


class PieceTable(NamedTuple):
    """Where the bytes of all tensors lie: one row a piece, in columns, sorted by tensor and offset.

    `tensor` and `shard` are indices, `begin` is the byte offset in the shard's data; `box` is (pieces, 2, dimensions):
    offset and size, padded with 0 and 1 for tensors of fewer dimensions.
    """

    tensor: Ints
    shard: Ints
    begin: Ints
    box: Ints

    def sort(self) -> PieceTable:
        """The same rows in the order that readers search in."""
        order = np.lexsort((*self.box[:, 0].T[::-1], self.tensor))
        return PieceTable(*(column[order] for column in self))


@dataclass(frozen=True)
class CheckpointMetadata:
    """The commit record, parsed."""

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
    table: PieceTable | Fields = field(repr=False)  # unpacked when needed: after sizes on disk are checked
    version: int = FORMAT_VERSION

    @functools.cached_property
    def pieces(self) -> PieceTable:
        """The pieces, unpacked; CORRUPTED_CHECKPOINT where they make no sense."""
        if isinstance(self.table, PieceTable):
            return self.table
        width = max((len(t.shape) for t in self.tensors), default=0)
        try:
            lengths = np.array([shard.length for shard in self.shards], np.int64)
            # A piece has at least a byte: this bounds the rows.
            (tensor, shard, begin), box = decode_table(self.table, ("tensor", "shard", "begin"), self.size_bytes())
            _require(box.shape[2] == width, "pieces of other dimensions than the tensors")
            padded = [t.shape + (1,) * (width - len(t.shape)) for t in self.tensors] if len(box) else []
            shapes = np.array(padded, np.int64).reshape(len(padded), width)
            _require((np.diff(tensor) >= 0).all(), "pieces in another order than the tensors")
            _require((tensor < len(shapes)).all(), "pieces of unknown tensors")
            _require((shard < len(lengths)).all(), "pieces of unknown shards")
            _require((box[:, 1] >= 1).all(), "pieces of nothing")
            _require((box.sum(axis=1) <= shapes[tensor]).all(), "piece outside of its tensor")
            _require((begin < lengths[shard]).all(), "piece behind the end of its shard")
        except (ValueError, TypeError, OverflowError, IndexError, MemoryError) as error:
            path = record_name(self.prefix)
            raise corrupted(f"{path}: malformed pieces: {type(error).__name__}: {error}", path) from error
        return PieceTable(tensor, shard, begin, box)

    def shard_path(self, index: int) -> str:
        return f"{self.prefix}/{self.shards[index].file}"

    def size_bytes(self) -> int:
        return sum(shard.length for shard in self.shards)


def encode_runs(column: Ints) -> list[int]:
    """A column of integers as arithmetic runs: start, step, count, start, step, count, ...

    Regular sharding makes long runs, so a table of millions of pieces takes a few numbers a tensor.
    """
    values = np.asarray(column, np.int64)
    if not len(values):
        return []
    steps = np.diff(values, append=values[-1])
    starts = [0]
    for at in np.flatnonzero(np.diff(steps[:-1])).tolist():  # the step after value at + 1 is another than before it
        if at >= starts[-1]:
            starts.append(at + 2)
    runs: list[int] = np.stack((values[starts], steps[starts], np.diff(starts, append=len(values))), 1).ravel().tolist()
    return runs


def decode_runs(runs: object, length: int) -> Ints:
    """Inverse of `encode_runs`; ValueError unless the runs are well formed and make exactly `length` values >= 0."""
    if not isinstance(runs, list) or len(runs) % 3 or not set(map(type, runs)) <= {int}:
        raise ValueError("malformed runs")
    _require(sum(runs[2::3]) == length and min(runs[2::3], default=1) >= 1, "runs do not add up")
    top = 1 << 62
    inside = (0 <= at < top and 0 <= at + step * (n - 1) < top > abs(step) for at, step, n in zip(*[iter(runs)] * 3))
    _require(all(inside), "runs leave the range of offsets")
    start, step, count = np.array(runs, np.int64).reshape(-1, 3).T
    # Each run extended back to row 0; where int64 overflows, it does so there and back.
    base = start - step * (np.cumsum(count) - count)
    return base.repeat(count) + step.repeat(count) * np.arange(length)


def encode_table(columns: Mapping[str, Ints], box: Ints) -> dict[str, object]:
    """Columns of integers and boxes (rows, 2, dimensions) as runs."""
    runs = {name: encode_runs(column) for name, column in columns.items()}
    boxes = {name: list(map(encode_runs, box[:, half].T)) for half, name in enumerate(("offset", "size"))}
    return {"count": len(box), **runs, **boxes}


def decode_table(table: Fields, names: Sequence[str], most: int = 1 << 62) -> tuple[list[Ints], Ints]:
    """Inverse of `encode_table`; ValueError for anything malformed, or more than `most` rows."""
    count, width = table.number("count"), len(table.array("offset"))
    _require(count <= most and len(table.array("size")) == width <= 64, f"{count} rows of {width} dimensions")
    columns = [decode_runs(table.array(name), count) for name in names]
    box = np.empty((count, 2, width), np.int64)
    for half, name in enumerate(("offset", "size")):
        for dim, runs in enumerate(table.array(name)):
            box[:, half, dim] = decode_runs(runs, count)
    return columns, box


def encode_tensors(tensors: Sequence[TensorMetadata]) -> dict[str, object]:
    """A list of tensors, in columns."""
    return {
        "name": [t.name for t in tensors],
        "dtype": [t.dtype for t in tensors],
        "shape": [t.shape for t in tensors],
        "rank": [[i, t.rank] for i, t in enumerate(tensors) if t.rank is not None],
        "alias_of": [[i, t.alias_of] for i, t in enumerate(tensors) if t.alias_of is not None],
    }


def encode_record(meta: CheckpointMetadata) -> bytes:
    """The record's bytes; `decode_record` is the inverse."""
    pieces = meta.pieces
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
        "shards": {
            "file": [shard.file for shard in meta.shards],
            "length": encode_runs(np.array([shard.length for shard in meta.shards])),
            "header_crc32": [f"{shard.header_crc:08x}" for shard in meta.shards],
        },
        "tensors": encode_tensors(meta.tensors),
        "pieces": encode_table({"tensor": pieces.tensor, "shard": pieces.shard, "begin": pieces.begin}, pieces.box),
    }
    text = dump_json(body)[:-1]
    return text + _seal(text)


def _seal(text: bytes) -> bytes:
    """The last field of a record, and its end."""
    return b',"crc32":"%08x"}\n' % crc32(text)


def _unseal(record: bytes, prefix: str) -> bytes:
    """A record without its seal, which must hold: C1."""
    text = record[: -len(_seal(b""))]
    if record[len(text) :] != _seal(text):
        path = record_name(prefix)
        raise corrupted(f"{path}: the commit record fails its CRC32; the checkpoint is damaged", path)
    return text


def decode_record(data: bytes, prefix: str) -> CheckpointMetadata:
    """Parse a record: C1 to C3 of "committed". CORRUPTED_CHECKPOINT or INCOMPATIBLE_VERSION otherwise."""
    path = record_name(prefix)
    try:
        body = Fields(parse_json(_unseal(data, prefix) + b"}", path))
        version = body.number("format_version")
        if version > FORMAT_VERSION:  # C2
            message = f"{path}: written in format version {version}; this code knows up to {FORMAT_VERSION}: update it"
            raise CheckpointException(message, path, ExceptionType.INCOMPATIBLE_VERSION)
        _require(version == FORMAT_VERSION, f"format version {version}")
        custom = decode_value(body.child("custom_metadata").all, str)  # C3
        if not isinstance(custom, dict):
            raise ValueError("no custom metadata")
        datetime.datetime.fromisoformat(body.text("timestamp"))
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
            shards=_decode_shards(body.child("shards")),
            tensors=decode_tensors(body.child("tensors")),
            table=body.child("pieces"),
        )
    except (ValueError, TypeError, OverflowError, IndexError, RecursionError) as error:
        raise corrupted(f"{path}: malformed record: {error}", path) from error


def _decode_shards(columns: Fields) -> tuple[ShardMetadata, ...]:
    files = columns.texts("file")
    if bad := [name for name in files if not _SHARD.fullmatch(name)]:
        raise ValueError(f"illegal shard name {bad[0]!r}")
    _require(len(set(files)) == len(files), "a shard is named twice")
    lengths = decode_runs(columns.array("length"), len(files)).tolist()
    crcs = _unhex("".join(columns.texts("header_crc32")))
    _require(len(crcs) == len(files), "shard columns of different lengths")
    return tuple(ShardMetadata(*row) for row in zip(files, lengths, crcs))


def decode_tensors(columns: Fields) -> tuple[TensorMetadata, ...]:
    """Inverse of `encode_tensors`; ValueError for anything malformed."""
    names, dtypes, shapes = columns.texts("name"), columns.texts("dtype"), list(map(int_tuple, columns.array("shape")))
    _require(len(names) == len(dtypes) == len(shapes), "tensor columns of different lengths")
    if unknown := set(dtypes) - DTYPES.keys():
        raise ValueError(f"dtype(s) {sorted(unknown)} unknown to torch {torch.__version__}")
    ranks, aliases = ({i: other for i, other in map(int_tuple, columns.array(key))} for key in ("rank", "alias_of"))
    _require(all(target < len(names) and target not in aliases for target in aliases.values()), "alias of nothing")
    return tuple(
        TensorMetadata(name, dtype, shape, ranks.get(i), aliases.get(i))
        for i, (name, dtype, shape) in enumerate(zip(names, dtypes, shapes))
    )


# --------------------------------------------------------------------------------------------------------------------
# Committed, and what follows from it


def read_file(storage: CheckpointStorage, name: str) -> bytes:
    """All bytes of a file; FileNotFoundError where there is none."""
    with contextlib.closing(storage.open(name)) as file:
        data = bytearray(file.length())
        file.read(0, memoryview(data))
    return bytes(data)


def read_committed(storage: CheckpointStorage, prefix: str) -> CheckpointMetadata:
    """The record of a committed checkpoint: C1 to C4 hold. Any process, at any time.

    FileNotFoundError where no checkpoint exists; CORRUPTED_CHECKPOINT or INCOMPATIBLE_VERSION where one exists that
    is not intact. A save that overwrites it meanwhile makes this start again.
    """
    return read_committed_record(storage, prefix)[1]


def read_committed_record(storage: CheckpointStorage, prefix: str) -> tuple[bytes, CheckpointMetadata]:
    """The same, and the bytes that it was decoded from, for other ranks to decode."""
    doubted = ""  # a save whose shards did not fit: damaged, or overwritten since
    while True:
        text = read_file(storage, record_name(check_prefix(prefix)))
        meta = decode_record(text, prefix)
        for index, shard in enumerate(meta.shards):  # C4
            path = meta.shard_path(index)
            if (found := storage.length(path)) != shard.length:
                break
        else:
            _ = meta.pieces  # C3, now that the sizes are known to be true
            return text, meta
        if meta.save_id == doubted:
            what = "is missing" if found is None else f"has {found} bytes"
            raise corrupted(f"{path}: shard {what}, the record says {shard.length} bytes", prefix)
        doubted = meta.save_id


_RECORD_HEAD = re.compile(rb'\{"format_version":[0-9]+,"save_id":"([0-9a-f]{8})","sequence":([0-9]{1,18}),')


def record_head(storage: CheckpointStorage, prefix: str, sound: bool = True) -> tuple[str, int] | None:
    """Save id and sequence number of the record of `prefix`, without parsing it whole; None where C1 does not hold.

    Not `sound`: also of a record that does not hold its CRC32, as far as they can be read. An OSError, or a
    STORAGE_ERROR for a link, where nobody can tell.
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            text = read_file(storage, record_name(prefix))
            if head := _RECORD_HEAD.match(_unseal(text, prefix) if sound else text):
                return head[1].decode(), int(head[2])
        except CheckpointException as error:
            if error.type is ExceptionType.STORAGE_ERROR:
                raise
    return None


def committed_id(storage: CheckpointStorage, prefix: str) -> str | None:
    """The save id in the record of `prefix`, None without a sound record; raises as `record_head` does."""
    return head[0] if (head := record_head(storage, prefix)) else None


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


def recorded_prefixes(storage: CheckpointStorage, warn: Warn = _WARN) -> list[str]:
    """Every prefix that has a record, intact or not."""
    names = [name for name in _walk(storage, warn) if name.endswith(RECORD_SUFFIX)]
    return [name for name in (name.removesuffix(RECORD_SUFFIX) for name in names) if _is_prefix(name)]


def list_committed(storage: CheckpointStorage, warn: Warn = _WARN) -> list[CheckpointMetadata]:
    """Every committed checkpoint, oldest first; `warn` is told of those that are damaged or unreadable."""
    found = []
    for prefix in recorded_prefixes(storage, warn):
        with skipping(prefix, warn):
            found.append(read_committed(storage, prefix))
    return sorted(found, key=lambda meta: (meta.sequence, meta.timestamp, meta.prefix))


def _files(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The shards and fences among these files: prefix, save id, name."""
    for name in names:
        if (m := _SHARD_PATH.fullmatch(name) or _FENCE.fullmatch(name)) and _is_prefix(m[1]):
            yield m[1], m[2], name


def shard_files(storage: CheckpointStorage, prefix: str) -> list[str]:
    """The tensor files that lie directly in the directory of `prefix`."""
    return [name for owner, _, name in _files(storage.names(prefix)) if owner == prefix]


def delete_files(storage: CheckpointStorage, prefix: str, files: Iterable[str]) -> None:
    """Remove files in the directory of `prefix`, then the directory if nothing is left in it."""
    for name in files:
        storage.delete(name)
    storage.prune(prefix)


def delete_committed(storage: CheckpointStorage, prefix: str) -> None:
    """Delete a checkpoint backwards: the record, made durable, then its shards. Safe to repeat after a crash.

    FileNotFoundError where there is nothing. Files of a save under way are left alone.
    """
    files = shard_files(storage, check_prefix(prefix))
    live = live_saves(storage, prefix)
    existed = storage.delete(record_name(prefix))
    if not existed and not files:
        raise FileNotFoundError(f"no checkpoint {prefix!r}")
    if existed:
        storage.sync_directory(record_name(prefix))
    delete_files(storage, prefix, (name for name in files if save_of(name) not in live))


def live_saves(storage: CheckpointStorage, prefix: str, reap: bool = False) -> set[str]:
    """Ids of saves to `prefix` whose fence a living process holds; `reap` removes the fences of dead ones."""
    ours = (file[1:] for file in _files(storage.names(prefix.rpartition("/")[0])) if file[0] == prefix)
    return {i for i, name in ours if name.endswith(".tmp") and not storage.reap(name, only_look=not reap)}


def collect_garbage(storage: CheckpointStorage, warn: Warn = _WARN) -> list[str]:
    """Remove what crashed saves and deletes left behind, and return its names. Any process, at any time.

    Never touches a committed checkpoint, a save whose fence is locked by a living process, or anything under a prefix
    whose record cannot be read; `warn` is told of these. The order (files, then fences, then records) lets a
    save commit at any moment.
    """
    found: dict[str, list[tuple[str, str]]] = {}  # prefix -> the save id and the name of each shard and fence
    for prefix, save_id, name in _files(_walk(storage, warn)):
        found.setdefault(prefix, []).append((save_id, name))
    removed: list[str] = []
    for prefix, files in sorted(found.items()):
        try:
            recorded_id(storage, prefix)
            live = live_saves(storage, prefix, reap=True)
            keep = {*live, recorded_id(storage, prefix)}
        except (OSError, CheckpointException) as error:
            warn(f"left {prefix} as it is: {error}")
            continue
        dead = [name for save_id, name in files if save_id not in (live if name.endswith(".tmp") else keep)]
        # Not fences: those went under their lock, and one of the same name may be a new, living one.
        delete_files(storage, prefix, (name for name in dead if not name.endswith(".tmp")))
        removed += dead
    return removed


def recorded_id(storage: CheckpointStorage, prefix: str) -> str | None:
    """The save id in the record of `prefix`, None without one; an exception where it cannot be read."""
    try:
        return decode_record(read_file(storage, record_name(prefix)), prefix).save_id
    except FileNotFoundError:
        return None
