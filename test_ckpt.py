"""The specification of ckpt, as tests: every promise of the README, tried on real files and real processes.

    python -m pytest -q test_ckpt.py                 all of it
    python -m pytest -q test_ckpt.py -k reshard      those with this word in their names

Nothing is mocked. Ranks are real processes that speak gloo (`run` below). Files are reopened with a reader
that shares no code with the library (`Shard` below, and the `safetensors` package where it is installed). The
truth that a restored tensor is compared with never went through a checkpoint. A hang is a failure, never a
wait. No test asserts a time on the wall clock: work is bounded by counts, processor time, memory.

The fault matrix. At every fault a reader sees exactly the old or exactly the new checkpoint, bit for bit, or
a typed error where nothing was ever committed; once `save` has returned, only the new one. The sections
"faults" have a heading "Row n" for most rows; rows 4 and 21 are also in "bad input" and "bytes", rows 31-34
in "resharding".

    1  a process ends after any operation            21  pickle payload in any file
    2  power loss: unsynced writes, names, torn      22  two jobs, one prefix
    3  crash or error during clean-up                23  reader during overwrite, delete, retention
    4  disk full, quota                              24  SIGTERM, KeyboardInterrupt at any operation
    5  the same again during the retry               25  cancel in each step; exit with a save in flight
    6  I/O error on write, fsync, directory, close   26  tensors changed after, or during, staging
    7  short reads, writes; EINTR; over 0x7ffff000   27  the clock is ten years off
    8  error in any worker thread                    28  clean-up races a live writer
    9  SIGKILL of a rank in each step, rank 0 too    29  rename "fails" but happened
    10 a rank raises in each step                    30  a read or write hangs past its operation's end
    11 SIGSTOP past the deadline, then SIGCONT       31  ranks at different steps of training
    12 the process that hosts the store dies         32  one name on disjoint meshes
    13 each bit flipped, of every file               33  copies drift apart outside of their mesh
    14 cut, extended; shards swapped, replayed       34  layouts of several boxes, uneven, empty
    15 tensor-file header fuzz, seeded               35  names: control, bidi characters, lone surrogates
    16 record fuzz, seeded                           36  a FIFO, device, directory as source of an import
    17 well-formed lies: 10^6 entries, huge shapes   37  a record that cannot be read beside good ones
    18 decompression bomb                            38  no hard links, no O_DIRECT, no directory fsync
    19 names: '..', absolute, NUL, backslash, long   -   a job of two ranks is killed again and again
    20 a link, FIFO, device, directory of ours       -   twelve mutants of the library, each caught

The fuzz is seeded: the same cases every time, and with `CKPT_FUZZ_ROUNDS=10` ten times as many. Slow, and
why: each bit (a hundred thousand loads), 200 saves in the background (leaks show late), the job that is
killed twenty times (each start imports torch), the power losses (every state is a directory that is loaded).
"""

import base64
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import enum
import errno
import functools
import gc
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardDim
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.nn.parallel import DistributedDataParallel

import ckpt
import ckpt_coord as coord
import ckpt_storage as st
from ckpt import CheckpointException, CheckpointFormat, ExceptionType, LoadOptions, SaveOptions

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
# Children import what this process imports.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
# c10d looks up the name of a peer that it has lost: ten seconds where no name server answers.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of torch
torch.set_num_threads(1)
gc.freeze()  # collections skip what torch made at import: a fifth of the time of the long loops
MiB = 1 << 20
BLOCK, UNIT, PAGE = 4 * MiB, 256 << 10, 4096
FORMATS, LEVELS = list(CheckpointFormat), list(ckpt.CompressionLevel)
STRATEGIES, STAGINGS = ["parallel", "sequential", "broadcast"], ["eager", "overlapped"]
FOREVER = 1 << 40
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HANG_S = 500.0  # a longer wait is a hang, however busy the machine; the library's own deadline is 600 s


# ---- the one multi-process helper --------------------------------------------------------------------------
# A fork server imports torch once; each rank of each test is a fresh fork of it: a rank starts soon, no state
# leaks from test to test, and a killed rank costs nothing. The parent hosts the store, as torchrun does.

CTX = multiprocessing.get_context("forkserver")
CTX.set_forkserver_preload(["torch._dynamo", "test_ckpt"])


def _rank_main(pipe, port, rank, world_size, body, tmp, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        if port is not None:
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        place = () if port is None else (rank, world_size)
        answer = (True, body(*place, Path(tmp), *args))
    except BaseException:
        variables = str(inspect.trace()[-1].frame.f_locals)[:5000]  # of the function that raised
        answer = (False, f"{traceback.format_exc()}where {variables}")
    pipe.send(answer)
    pipe.recv()  # stay until every rank has reported: leaving early closes sockets that others still use


def run(world_size, body, tmp, *args, limit_s=HANG_S, dies=(), group=True):
    """Run `body(rank, world_size, tmp, *args)` in `world_size` processes; return their results, by rank.

    Without a `group`, the processes know nothing of each other, and have no threads: `body(tmp, *args)`.
    Fails with the tracebacks of ranks that raised, died (but for those in `dies`) or run after `limit_s`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pending, pipes, results, failures = [], {}, [], [None] * world_size, []
    for rank in range(world_size):
        pipe, theirs = CTX.Pipe()
        arguments = (theirs, store.port if group else None, rank, world_size, body, str(tmp), args)
        processes.append(CTX.Process(target=_rank_main, args=arguments))
        processes[-1].start()
        theirs.close()
        pending[pipe] = rank
        pipes.append(pipe)  # our ends stay open until the end
    deadline = time.monotonic() + limit_s
    try:
        while pending and (ready := connection.wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = rank in dies, "died"
                if not ok:
                    failures.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + 30)
        if pending:
            failures.append(f"ranks {sorted(pending.values())} hang: they still run after {limit_s} s")
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return results


def for_each(**columns):
    """A test for each combination of these values."""
    marks = [pytest.mark.parametrize(name, values) for name, values in columns.items()]
    return lambda test: functools.reduce(lambda test, mark: mark(test), marks, test)


COUNTS = Counter()  # what the fault tests have tried


@pytest.fixture(scope="session", autouse=True)
def _counts_are_printed_at_the_end(request):
    yield
    if COUNTS:
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print("\nfaults tried:", ", ".join(f"{number:,} {what}" for what, number in COUNTS.items()))


def on_ranks(world_size, counts=None, limit_s=HANG_S, group=True):
    """A test whose body is run by so many processes (or a parameter), as `test(rank, tmp_path or ram, ...)`.

    Without a `group`, as `test(tmp_path or ram, ...)`. What rank 0 returns is how many of `counts` it tried.
    """

    def decorate(body):
        place, *given = [*inspect.signature(body).parameters.values()][group:]

        def early(values):
            size, how = values.get(world_size, world_size), {"limit_s": limit_s, "group": group}
            with directory(in_memory=place.name == "ram") as tmp:
                return run(size, _body_of_test, tmp, body.__name__, values, **how)

        def test(request, **values):
            future = EARLY[request.node.nodeid]
            tried, *_ = early(values) if future.cancel() else future.result()  # at the latest it begins now
            COUNTS.update({counts: tried} if counts else {})

        request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__, test.early = inspect.Signature([*given, request]), early
        return functools.update_wrapper(test, body)

    return decorate


EARLY = {}  # by the id of a test: what its processes return


@pytest.fixture(scope="session", autouse=True)
def _tests_in_processes_of_their_own_begin_before_their_turn(request):
    """One after the other, while this process is busy with the tests before them: so two cores are busy."""
    with ThreadPoolExecutor(1) as pool:
        for item in request.session.items:
            if early := getattr(item.obj, "early", None):
                values = item.callspec.params if hasattr(item, "callspec") else {}
                EARLY[item.nodeid] = pool.submit(early, values)
        yield
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + HANG_S
        # A test that nobody waits for any more.
        while not all(future.done() for future in EARLY.values()) and time.monotonic() < deadline:
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.1)


def _body_of_test(*given):
    *place, tmp, name, fixtures = given
    return globals()[name].__wrapped__(*place[:1], tmp, **fixtures)


isolated = functools.partial(on_ranks, 1, group=False)  # in a fresh process with no threads: it may fork


def gathered(value):
    """What each rank has given."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def directory(in_memory):
    """A new directory, in memory if the system has such."""
    memory = "/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="test_ckpt-", dir=memory, ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def ram():
    """A directory in memory: these tests sync files thousands of times."""
    with directory(in_memory=True) as path:
        yield path


# ---- opening, comparing, reading by hand -------------------------------------------------------------------


def opened(tmp, coordinator=None, **options):
    """The library, as a user opens it, on the directory `tmp`."""
    storage = ckpt.StorageOptions(connection_settings={"base_path": str(tmp)})
    options = ckpt.CheckpointOptions(**{"storage": storage, **options})
    return ckpt.DistributedCheckpointFactory.create(coordinator, options)


def to(prefix="p", **options):
    return SaveOptions(checkpoint_prefix=prefix, **options)


def at(prefix="p", **options):
    return LoadOptions(checkpoint_prefix=prefix, **options)


def outcome_of(call):
    """The exception of `call()` as plain values (type, rank, message), or ("returned", None, value)."""
    try:
        return "returned", None, call()
    except CheckpointException as error:
        return error.type.name, error.rank, str(error)
    except ValueError as error:
        return "ValueError", None, str(error)


def refusal(call, kind=None, *words):
    """The message, with these words in it, of what `call()` must raise.

    The `kind` is a class of exceptions, or the type of a CheckpointException; None stands for any type.
    """
    with pytest.raises(kind if isinstance(kind, type) else CheckpointException) as caught:
        call()
    message = str(caught.value)
    assert not isinstance(kind, str) or caught.value.type.name == kind, (caught.value.type, message)
    assert all(word in message for word in words), (words, message)
    return message


class Bag:
    """The smallest Stateful: named tensors (or anything else) in a dict."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)


def identical(a, b):
    """Same type, same structure, same bits; -0.0 is not 0.0, and a NaN equals only itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, DTensor):
        return a.shape == b.shape and identical(a.to_local().detach(), b.to_local().detach())
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return a == b


def raw(tensor):
    """A tensor's elements as bytes, whatever its dtype."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def local_part(tensor):
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """The bytes of a tensor, those of all ranks if it is sharded."""
    return raw(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def listing(tmp):
    """Every file below `tmp`, with its bytes: a directory as a value."""
    return {str(p.relative_to(tmp)): p.read_bytes() for p in sorted(Path(tmp).rglob("*")) if p.is_file()}


def save_id(tmp, prefix="p"):
    """The id of the save that the record names."""
    return json.loads((Path(tmp) / f"{prefix}.metadata.json").read_text())["save_id"]


def aligned(length):
    """Memory that begins at a page, for direct I/O."""
    return np.frombuffer(mmap.mmap(-1, length), np.uint8)


def shards(tmp, prefix="p"):
    return sorted((Path(tmp) / prefix).glob("*.safetensors"))


class Shard:
    """A safetensors file read by hand, with the rules that their reader enforces, and ours on top."""

    CODES: ClassVar = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0", 2: "U16 I16 F16 BF16"}
    CODES |= {0.5: "F4", 4: "U32 I32 F32", 8: "U64 I64 F64 C64"}
    ITEM: ClassVar = {code: size for size, codes in CODES.items() for code in codes.split()}

    def __init__(self, path, ours=True):
        def no_duplicates(pairs):
            assert len(dict(pairs)) == len(pairs), "duplicate keys"
            return dict(pairs)

        self.path, self.bytes = Path(path), Path(path).read_bytes()
        (length,) = struct.unpack("<Q", self.bytes[:8])
        text = self.bytes[8 : 8 + length]
        assert length <= 100_000_000 and text.startswith(b"{") and text.rstrip(b" ").endswith(b"}")
        self.header = json.loads(text.decode(), object_pairs_hook=no_duplicates)
        assert next(iter(self.header)) == "__metadata__" or not ours
        self.metadata = self.header.pop("__metadata__", {})
        self.data_at, end = 8 + length, 0
        for name, entry in sorted(self.header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            size = self.ITEM[entry["dtype"]]
            assert begin == end and stop - begin == size * math.prod(entry["shape"]), (name, entry, end)
            assert begin % max(1, size) == 0 or not ours, f"{name} is not aligned"
            end = stop
        assert self.data_at + end == len(self.bytes)
        if not ours:
            return
        assert self.data_at % PAGE == 0
        units = [self.bytes[at : at + UNIT] for at in range(self.data_at, len(self.bytes), UNIT)]
        checksums = "".join(f"{zlib.crc32(unit):08x}" for unit in units)
        expected = {"format": "pt", "ckpt_version": "2", "unit_bytes": str(UNIT), "crc32": checksums}
        assert list(self.metadata.items()) == list(expected.items())

    def data(self, name):
        return self.bytes[slice(*self.place(name))]

    def place(self, name):
        """Where an entry's bytes are in the file: (first, end)."""
        begin, end = self.header[name]["data_offsets"]
        return self.data_at + begin, self.data_at + end

    def find(self, start):
        """The one entry whose name starts so."""
        (name,) = [name for name in self.header if name.startswith(start)]
        return name


def flip(path, position):
    """Flip one bit of one byte of a file."""
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1
    Path(path).write_bytes(data)


def column_of(text):
    """A packed column of a record, as a list of integers."""
    data = zlib.decompress(base64.b64decode(text))
    return list(itertools.accumulate(number for (number,) in struct.iter_unpack("<q", data)))


def packed(column, tail=b""):
    """Its inverse. Differences wrap around at 64 bits."""
    steps = [(number - before) % (1 << 64) for before, number in zip([0, *column], column)]
    return base64.b64encode(zlib.compress(struct.pack(f"<{len(steps)}Q", *steps)) + tail).decode()


def expanded(record):
    """A record, as JSON has it, with its columns as lists of integers: `packed` to a string by `sealed`."""
    columns = record["pieces"]
    for key in columns.keys() - {"count"}:
        value = columns[key]
        columns[key] = list(map(column_of, value)) if isinstance(value, list) else column_of(value)
    return record


def sealed(record):
    """The bytes of a record, with a right CRC. Columns that are lists of integers are packed."""

    def pack(value):
        if isinstance(value, list) and all(type(number) is int for number in value):
            return packed(value)
        return list(map(pack, value)) if isinstance(value, list) else value

    record = {key: value for key, value in record.items() if key != "crc32"}
    if isinstance(record.get("pieces"), dict):
        boxes = {key: [] for key in ("offset", "size") if record["pieces"].get(key) == []}  # of no dimensions
        record["pieces"] = {key: pack(value) for key, value in record["pieces"].items()} | boxes
    body = json.dumps(record, separators=(",", ":")).encode()[:-1]
    return body + b',"crc32":"%08x"}\n' % zlib.crc32(body)


def reseal(path, edit):
    """Rewrite a record through `edit(dict)`, with a right CRC: damage that only its meaning can betray.

    `edit` gets the columns of the pieces as lists of integers.
    """
    text = path.read_bytes()
    assert text == sealed(json.loads(text))
    record = expanded(json.loads(text))
    edit(record)
    path.write_bytes(sealed(record))


def filled(module, salt):
    """Fill parameters and buffers with values that depend on `salt` and the name alone; return the module."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{salt}/{name}".encode()))
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randint(-(1 << 30), 1 << 30, tensor.shape, generator=generator) % 3 - 1)
    return module


def stepped(model, optimizer=torch.optim.AdamW, steps=2, **options):
    """An optimizer over `model` that has taken `steps` steps, so that all its state exists."""
    optimizer = optimizer(model.parameters(), **options)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def small(salt="truth"):
    """A little plain model with its optimizer, both in a known state."""
    model = filled(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), salt)
    return model, stepped(model, lr=0.1 if salt == "truth" else 0.2)


def state_of(model, optimizer=None):
    """A deep copy of everything that a load may change."""
    return copy.deepcopy((model.state_dict(), optimizer and optimizer.state_dict()))


# ---- the seam: every system call on a checkpoint, logged, failed or stopped --------------------------------


class Op(NamedTuple):
    """One file operation: what, on which path; the second path; what is written where; bytes asked for."""

    call: str  # a function of `os`, or a word of `Seam` such as "create", "is_cold", "fsync_dir"
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""
    size: int = 0


NAMING = ["create", "open", "rename", "link", "unlink", "mkdir", "rmdir", "stat", "listdir", "scandir"]
CHANGES = ["create", "pwrite", "truncate", "allocate", "fsync", "fsync_dir", *NAMING[2:7]]


class Seam:
    """A stand-in for the library's `os`: all file calls are in `log`, those that succeeded in `done`.

    `before(op)` and `after(op)` may look on, stop, or raise; at most `cap` bytes are read or written at once.
    `Storage(base_path, seam)` makes its calls through it; subclasses override a call to change its effect.
    """

    def __init__(self, before=lambda op: None, after=lambda op: None, cap=1 << 40):
        self.before, self.after, self.cap = before, after, cap
        self.log, self.done, self.paths, self.directories = [], [], {}, set()

    def __getattr__(self, name):
        return getattr(os, name)

    def _do(self, op, perform):
        self.log.append(op)
        self.before(op)
        result = perform()
        self.done.append(op)
        self.after(op)
        return result

    def open(self, path, flags, mode=0o777):
        op = Op("create" if flags & os.O_CREAT else "open", path)
        if path.startswith("/proc/self/fd/"):
            op = Op("open_direct", self.paths[int(path.rpartition("/")[2])])
        fd = self._do(op, lambda: os.open(path, flags, mode))
        self.paths[fd] = op.path
        (self.directories.add if flags & os.O_DIRECTORY else self.directories.discard)(fd)
        return fd

    def preadv(self, fd, buffers, offset, flags=0):
        if flags:
            return self._do(Op("is_cold", self.paths[fd]), lambda: os.preadv(fd, buffers, offset, flags))
        op = Op("pread", self.paths[fd], offset=offset, size=len(buffers[0]))
        return self._do(op, lambda: self.pread(fd, buffers[0], offset))

    def pread(self, fd, buffer, offset):
        return os.preadv(fd, [buffer[: self.cap]], offset)

    def pwrite(self, fd, data, offset):
        op = Op("pwrite", self.paths[fd], offset=offset, data=bytes(data[: self.cap]), size=len(data))
        return self._do(op, lambda: os.pwrite(fd, data[: self.cap], offset))

    def posix_fallocate(self, fd, offset, length):
        op = Op("allocate", self.paths[fd], offset=length)
        self._do(op, lambda: os.posix_fallocate(fd, offset, length))

    def ftruncate(self, fd, length):
        self._do(Op("truncate", self.paths[fd], offset=length), lambda: os.ftruncate(fd, length))

    def fsync(self, fd):
        call = "fsync_dir" if fd in self.directories else "fsync"
        self._do(Op(call, self.paths[fd]), lambda: os.fsync(fd))

    def close(self, fd):
        try:
            self._do(Op("close", self.paths[fd]), lambda: None)
        finally:
            os.close(fd)  # as Linux: a close that reports an error has closed


def _on_names(call):
    act = getattr(os, call)
    return lambda self, *paths, **options: self._do(Op(call, *paths), lambda: act(*paths, **options))


for _call in NAMING[2:]:
    setattr(Seam, _call, _on_names(_call))


class _Dispatch(threading.local):
    """What the library has as `os`: the seam of the storage that a thread is in."""

    seam = os

    def __getattr__(self, name):
        return getattr(self.seam, name)


DISPATCH = st.os = _Dispatch()


def _within(method):
    @functools.wraps(method)
    def call(self, *args, **options):
        before, DISPATCH.seam = DISPATCH.seam, self.seam
        try:
            result = method(self, *args, **options)
        finally:
            DISPATCH.seam = before
        if isinstance(result, st.LocalFile):
            result.__class__, result.seam = SeamedFile, self.seam
        return result

    return call


class Storage(st.LocalStorage):
    """Local storage whose file calls go through a seam."""

    def __init__(self, base_path, seam=None):
        super().__init__(base_path)
        self.seam = seam or Seam()


class SeamedFile(st.LocalFile):
    """A file of such a storage."""


for _kind in (Storage, SeamedFile):
    for _name, _method in vars(_kind.__base__).items():
        if callable(_method) and not _name.startswith("_"):
            setattr(_kind, _name, _within(_method))


@isolated()
def test_every_file_call_of_the_library_goes_through_the_seam(tmp_path):
    """An audit hook hears of all that the interpreter is asked to do with files."""
    audited, st.os = Counter(), Seam()
    names = {"open": "open", "os.remove": "unlink", "os.listdir": "listdir", "os.scandir": "scandir"}
    names |= {f"os.{name}": name for name in ("rename", "link", "mkdir", "rmdir", "truncate", "symlink")}

    def audit(event, args):
        is_map = event == "open" and args[1] is not None and "/source/" in str(args[0])  # of a file to import
        if event in names and str(args[0]).startswith(f"{tmp_path}/") and not is_map:
            audited[names[event], args[0]] += 1

    (tmp_path / "base").mkdir()
    (lost := tmp_path / f"base/lost{st.RECORD_SUFFIX}.0badf00d.tmp").touch()
    os.utime(lost, (1e9, 1e9))
    sys.addaudithook(audit)
    storage, (model, optimizer) = ckpt.LocalStorage(tmp_path / "base"), small()
    index = f"{(exported := tmp_path / 'source/m.safetensors')}.index.json"
    with ckpt.DistributedCheckpoint(storage=storage) as checkpoint:
        for form in FORMATS:
            checkpoint.save(model, optimizer, to(f"runs/{form.value}", format=form))
        checkpoint.save(model, optimizer, to("runs/single_file", compression_level="fast"))
        checkpoint.save_async(model, optimizer, to("once", overwrite=False)).result(HANG_S)
        checkpoint.load(model, optimizer, at("runs/consolidated"))
        checkpoint.validate_checkpoint("once")
        for _ in ("new", "again"):
            ckpt.export_checkpoint(storage, "once", exported, max_shard_bytes=100, model_only=True)
        ckpt.import_checkpoint(index, storage, "again")
        ckpt.load_safetensors(small()[0], index, strict=False)
        ckpt.diff_checkpoints(storage, "once", "again")
        checkpoint.delete_checkpoint("once")
        ckpt.collect_garbage(storage, 0.0)
    assert {call for call, _ in audited} == set(names.values()) - {"truncate", "symlink"}
    logged = Counter(("open" if op.call == "create" else op.call, op.path) for op in st.os.log)
    assert not audited - logged, audited - logged


class Strike:
    """A hook: calls `act(op)` at number k, or numbers k to `until` - 1, of the operations `when` accepts."""

    def __init__(self, k, act, when=lambda op: True, until=None):
        self.numbers, self.act, self.when = range(k, k + 1 if until is None else until), act, when
        self.count, self.hit = itertools.count(), None

    def __call__(self, op):
        if self.when(op) and next(self.count) in self.numbers:
            self.hit = self.hit or op  # the first one
            self.act(op)


def fail(code):
    """Fail as the system does: without the path if it knows only a descriptor."""

    def act(op):
        raise OSError(code, os.strerror(code), *[op.path] * (op.call in NAMING))

    return act


def is_change(op):
    return op.call in CHANGES


# ---- API: every public name, every option has its effect ---------------------------------------------------

PUBLIC = """
DistributedCheckpoint PendingSave DistributedCheckpointFactory StorageFactory Stateful SaveOptions LoadOptions
CheckpointLoadResult CheckpointInfo CheckpointOptions StorageOptions RetryPolicy CheckpointException
ExceptionType CheckpointValidator ValidationResult IntegrityChecker CompatibilityChecker
ChecksumIntegrityChecker SizeIntegrityChecker VersionCompatibilityChecker SchemaCompatibilityChecker
FaultToleranceHandler DistributedCoordinator LocalCoordinator TorchCoordinator CheckpointCoordinator
CheckpointLoader CheckpointStorage LocalStorage CheckpointMetadata ShardMetadata TensorMetadata ShardData
CheckpointFormat CompressionLevel export_checkpoint import_checkpoint load_safetensors diff_checkpoints
Difference CheckpointReader Progress StoredFile collect_garbage
"""


def test_the_public_names_are_these_and_each_says_what_it_is():
    assert sorted(ckpt.__all__) == sorted(PUBLIC.split())
    assert [name for name in ckpt.__all__ if not getattr(ckpt, name).__doc__] == []
    model, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert all(isinstance(thing, ckpt.Stateful) for thing in (model, optimizer, scheduler, Bag()))
    assert not isinstance(object(), ckpt.Stateful)
    integrity = ckpt.ChecksumIntegrityChecker(), ckpt.SizeIntegrityChecker()
    compatibility = ckpt.VersionCompatibilityChecker(), ckpt.SchemaCompatibilityChecker()
    assert all(isinstance(checker, ckpt.IntegrityChecker) for checker in integrity)
    assert all(isinstance(checker, ckpt.CompatibilityChecker) for checker in compatibility)
    error = CheckpointException("m", "p/x", ExceptionType.TIMEOUT)
    assert isinstance(error, Exception) and str(error) == "m"
    assert (error.checkpoint_path, error.type, error.rank) == ("p/x", ExceptionType.TIMEOUT, None)
    assert CheckpointException("m").type is ExceptionType.UNKNOWN


@pytest.fixture
def checkpoint(tmp_path):
    """The library on the directory of this test."""
    return opened(tmp_path)


def loaded(checkpoint, options):
    """What a load gives: the state of a model and optimizer that had another one before, and the result."""
    model, optimizer = small("other")
    result = checkpoint.load(model, optimizer, options)
    return state_of(model, optimizer), result


def refused(checkpoint, options, kind, *words, **more):
    """A load raises `kind`, with these words, and changes nothing."""
    model, optimizer = small("other")
    refusal(lambda: checkpoint.load(model, optimizer, options, **more), kind, *words)
    assert identical(state_of(model, optimizer), state_of(*small("other")))


def prefixes(checkpoint):
    return [info.prefix for info in checkpoint.list_checkpoints()]


def test_one_object_saves_with_defaults_and_names_checkpoints_by_utc_time(tmp_path, monkeypatch):
    def moment():
        return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")

    monkeypatch.chdir(tmp_path)
    checkpoint, before = ckpt.DistributedCheckpoint(), moment()
    first, second = (checkpoint.save(small()[0]) for _ in range(2))
    assert before <= re.fullmatch(r"checkpoint_(\d{8}_\d{6})", first)[1] <= moment()
    assert second.startswith("checkpoint_") and prefixes(checkpoint) == [first, second] and second != first
    assert (tmp_path / "checkpoints" / f"{first}.metadata.json").is_file()


def test_an_optimizer_is_saved_and_loaded_unless_left_out_and_forgetting_it_warns(tmp_path, checkpoint):
    model, optimizer = small()
    truth, mine = state_of(model, optimizer), state_of(*small("other"))
    checkpoint.save(model, optimizer, to("both"))
    checkpoint.save(model, optimizer, to("excluded", include_optimizer=False))
    assert checkpoint.save_model_only(model, to("only")) == "only"
    checkpoint.save(model, None, to("none"))
    for prefix in ("excluded", "only", "none"):
        assert not any("exp_avg" in name for path in shards(tmp_path, prefix) for name in Shard(path).header)
        refused(checkpoint, at(prefix), "VALIDATION_FAILED")
        state, result = loaded(checkpoint, at(prefix, strict_mode=False))
        assert result.warnings and identical(state, (truth[0], mine[1]))
        assert not checkpoint.load(model, None, at(prefix, load_rng_state=False)).warnings
    assert identical(loaded(checkpoint, at("both", load_optimizer=False))[0], (truth[0], mine[1]))
    (warning,) = checkpoint.load(model, None, at("both")).warnings
    assert "load_optimizer=False" in warning
    assert not checkpoint.load(model, None, at("both", load_optimizer=False)).warnings


@isolated()
def test_rng_states_come_back_if_saved_and_asked_for(tmp_path):
    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    cases = (True, True), (True, False), (False, True)
    for generator, (included, asked_for) in itertools.product((np.random.MT19937, np.random.PCG64), cases):
        np.random.set_bit_generator(generator())
        opened(tmp_path).save(small()[0], None, to(include_rng_state=included))
        first, second = draws(), draws()
        result = opened(tmp_path).load(small()[0], None, at(load_rng_state=asked_for))
        again = draws()
        assert (again == first) == (included and asked_for) and again != second
        assert bool(result.warnings) == (asked_for and not included)


def test_custom_metadata_comes_back_on_all_ranks_is_listed_and_must_be_data_of_bounded_depth(ram, capsys):
    mine = {"epoch": 3, "ünï": [1.5, None, {"deep": True}], "loss": math.nan, "counts": np.arange(3)}
    mine |= {"set": {1, 2}, "huge": 10**5000, (1, 2): math.nan}  # beyond JSON
    together(2, lambda c: opened(ram, c).save(small()[0], None, to(custom_metadata=mine)))
    checkpoint = opened(ram)
    result = checkpoint.load(small()[0], None, at(load_rng_state=False))
    for found in (result.metadata, checkpoint.latest_checkpoint()):
        assert identical(found.custom_metadata, mine)
    assert command(capsys, "ls", ram)[0] == 0
    assert json.loads(command(capsys, "ls", ram, "--json")[2])[0]["prefix"] == "p"
    deep = functools.reduce(lambda inner, _: [inner], range(300), 1)
    for wrong, words in ((object(), "epoch"), (deep, "nested too deeply")):
        options = to("q", custom_metadata={"epoch": wrong})
        refusal(lambda: checkpoint.save(small()[0], None, options), ValueError, words)
    assert prefixes(checkpoint) == ["p"]


@pytest.mark.parametrize("form, level", [*zip(FORMATS, LEVELS)])
def test_results_and_listings_tell_what_was_saved_how_and_when(tmp_path, checkpoint, form, level):
    (model, optimizer), (other, other_optimizer), now = small(), small("other"), datetime.datetime.now
    options = to(format=form.value, compression_level=level.value, custom_metadata={"a": [1]}), at()
    before, weight, began = copy.deepcopy(options), other[0].weight, now(datetime.timezone.utc)
    assert checkpoint.save(model, optimizer, options[0]) == "p"
    (info,) = checkpoint.list_checkpoints()
    assert info == checkpoint.latest_checkpoint() and info.world_size == 1 and info.version
    assert began <= info.timestamp <= now(datetime.timezone.utc)
    record, stored = tmp_path / "p.metadata.json", sum(path.stat().st_size for path in shards(tmp_path))
    assert info.format == form.value and stored <= info.size_bytes <= stored + record.stat().st_size
    result = checkpoint.load(other, other_optimizer, options[1])
    assert options == before, "an enum option takes its value, and no options object is ever changed"
    assert (result.metadata.format, result.metadata.compression) == (form.value, level.value)
    assert identical(state_of(other, other_optimizer), state_of(model, optimizer))
    assert other[0].weight is weight and result.prefix == "p" and not result.warnings
    assert (result.source_world_size, result.target_world_size, result.was_resharded) == (1, 1, False)
    assert identical(dict(result.model_state), dict(other.state_dict()))
    assert set(result.optimizer_state) >= {"state", "param_groups"}
    number, shard = re.fullmatch("[0-9a-f]{8}", save_id(tmp_path))[0], "-00000-of-00001"
    endings = {"multi_shard": [shard], "single_file": [""], "consolidated": [shard, ".model"]}
    assert [path.stem for path in shards(tmp_path)] == [number + ending for ending in endings[form.value]]


def test_compression_shrinks_what_it_can_and_costs_next_to_nothing_where_it_cannot(tmp_path, checkpoint):
    generator, sizes = torch.Generator().manual_seed(1), {}
    weights = torch.randn(1 << 20, generator=generator).bfloat16()  # their exponents share a plane
    noise = torch.randint(0, 256, (2 << 20,), generator=generator, dtype=torch.uint8)
    for (name, tensor), level in itertools.product({"weights": weights, "noise": noise}.items(), LEVELS):
        checkpoint.save({"w": tensor}, None, to(compression_level=level))
        checkpoint.load(found := {"w": torch.zeros_like(tensor)}, None, at())
        assert identical(found["w"], tensor)
        sizes.setdefault(name, []).append(sum(path.stat().st_size for path in shards(tmp_path)))
    none, fast, balanced, maximum = sizes["weights"]
    assert maximum <= balanced <= fast < 0.85 * none
    assert max(sizes["noise"]) < 1.01 * sizes["noise"][0]


def test_a_path_means_local_storage_there_and_a_string_means_options_with_that_prefix(tmp_path):
    first, second = tmp_path / "a", str(tmp_path / "b")
    made = {first: ckpt.DistributedCheckpoint(storage=first)}
    made[second] = ckpt.DistributedCheckpointFactory.create(options=ckpt.CheckpointOptions(storage=second))
    for directory, checkpoint in made.items():
        model, optimizer = small()
        assert checkpoint.save(model, optimizer, "lr=1e+3/step=1") == "lr=1e+3/step=1"
        assert checkpoint.save_async(model, optimizer, "late").result(HANG_S) == "late"
        assert checkpoint.save_model_only(model, "only") == "only"
        assert len(list(Path(directory).rglob("*.metadata.json"))) == 3
        state, result = loaded(checkpoint, "lr=1e+3/step=1")
        assert result.prefix == "lr=1e+3/step=1" and identical(state, state_of(*small()))
        stored = checkpoint.load(small()[0], None, "only").metadata.tensors
        assert {tensor.name.partition("/")[0] for tensor in stored} == {"model", "model-metadata"}
        assert ckpt.diff_checkpoints(directory, "late", "lr=1e+3/step=1") == []
        (exported,) = ckpt.export_checkpoint(directory, "only", tmp_path / "out.safetensors")
        assert ckpt.import_checkpoint(exported, directory, "again") == "again"
        differences = ckpt.diff_checkpoints(directory, "only", "again")
        assert {difference.name for difference in differences} == {"model-metadata/modules"}


def test_a_registered_provider_is_used_and_what_is_no_storage_is_refused_with_what_is(tmp_path):
    class Forwarding:
        def __getattr__(self, name):
            return getattr(storage, name)

    settings, storage = [], ckpt.LocalStorage(tmp_path)
    create, options = ckpt.StorageFactory.create, ckpt.StorageOptions
    ckpt.StorageFactory.register("mine", lambda given: settings.append(given) or storage)
    opened(tmp_path / "no", storage=options("mine", {"bucket": "b"})).save(small()[0], None, to())
    assert settings == [{"bucket": "b"}]
    assert prefixes(ckpt.DistributedCheckpoint(storage=Forwarding())) == ["p"]
    refusal(lambda: create(options("nowhere")), ValueError, "nowhere", "local")
    refusal(lambda: create(options("local", {"basepath": "x"})), ValueError, "basepath", "base_path")
    for wrong in (ckpt.CheckpointOptions(), "./ckpts"):
        refusal(lambda: ckpt.DistributedCheckpoint(wrong), ValueError, "storage=")
    for wrong, words in (("s3://bucket", "s3://bucket"), (3, "storage must be a path")):
        refusal(lambda: ckpt.DistributedCheckpoint(storage=wrong), ValueError, words)


def test_a_repr_is_one_short_line_that_names_the_checkpoint(checkpoint):
    bag = Bag(**{f"layer.{n}": torch.rand(2) for n in range(100)})
    pending = checkpoint.save_async(bag, None, to())
    pending.result(HANG_S)
    result = checkpoint.load(bag, None, at(), extra_state={})
    for thing in (result, result.metadata, pending, checkpoint.latest_checkpoint()):
        assert len(repr(thing)) < 250 and "\n" not in repr(thing), thing
    assert "'p'" in repr(result) and "'p'" in repr(result.metadata)


class Doomed:
    """A Stateful whose methods raise `error`; or that alone which loads."""

    def __init__(self, error, can_save=False):
        self.error, self.can_save = error, can_save

    def state_dict(self):
        if self.can_save:
            return {"w": torch.zeros(2)}
        raise self.error

    def load_state_dict(self, state):
        raise self.error


def is_new_shard(op):
    return op.call == "create" and op.path.endswith(".safetensors")


def hiccups(times):
    """The file calls of an operating system on which the first `times` creations of a tensor file fail."""
    return Seam(Strike(0, fail(errno.EIO), is_new_shard, until=times))


TRIES = [(1, 60.0, "STORAGE_ERROR"), (2, 60.0, "STORAGE_ERROR"), (3, 60.0, "returned"), (3, 0.5, "TIMEOUT")]


@pytest.mark.parametrize("attempts, limit_s, wanted", TRIES)
def test_the_retry_policy_decides_how_often_a_save_is_tried(tmp_path, manual_time, attempts, limit_s, wanted):
    class Policy(ckpt.RetryPolicy):
        def delay(self, attempt):
            manual_time.sleep(super().delay(attempt))
            return 0.0

    files, policy = hiccups(times=2), Policy(max_retries=attempts, initial_delay=1.0, jitter=0.0)
    checkpoint = opened(tmp_path, storage=Storage(tmp_path, files), retry_policy=policy)
    kind, _, message = outcome_of(lambda: checkpoint.save(*small(), to(timeout=limit_s)))
    made = sum(map(is_new_shard, files.log))
    assert (kind, made) == (wanted, 1 if wanted == "TIMEOUT" else attempts), message
    if kind == "returned":
        checkpoint.load(*small(), at())
        assert manual_time.now == 1.0 + 2.0
    else:
        assert listing(tmp_path) == {} and (kind == "TIMEOUT" or ".safetensors" in message)


def test_the_fault_tolerance_handler_retries_times_out_and_rolls_back(tmp_path):
    storage, never, errors, waits = ckpt.LocalStorage(tmp_path), threading.Event(), [], []
    retry = ckpt.RetryPolicy(max_retries=3, initial_delay=1000.0, retryable_exceptions=(KeyError,))
    handler = ckpt.FaultToleranceHandler(storage, retry)
    waiting = types.SimpleNamespace(wait=waits.append, is_set=bool)  # in the place of the event of a cancel

    def fails_as_long_as_there_are_errors():
        if errors:
            raise errors.pop()
        return "done"

    def attempt():
        until = time.monotonic() + 5.0
        return handler.execute_with_retry(fails_as_long_as_there_are_errors, waiting, until)

    errors[:] = [KeyError(), KeyError()]
    assert attempt() == "done" and len(waits) == 2
    assert all(0.0 <= wait <= 5.0 for wait in waits), "the deadline ends a delay"
    errors[:] = [KeyError(), OSError(), KeyError()]
    refusal(attempt, OSError)
    assert len(errors) == 1
    errors[:], cancel = [KeyError()], threading.Event()
    cancel.set()
    refusal(lambda: handler.execute_with_retry(fails_as_long_as_there_are_errors, cancel), KeyError)
    assert ckpt.RetryPolicy(max_delay=1.0, jitter=0.0).delay(5000) == 1.0
    slow = ckpt.RetryPolicy(initial_delay=1.0, backoff_factor=1.01, jitter=0.0)
    assert slow.delay(100) == 1.01**100 and dataclasses.replace(slow, initial_delay=0.0).delay(10**6) == 0.0
    refusal(lambda: handler.execute_with_timeout(lambda: never.wait(HANG_S), 0.1), "TIMEOUT")
    never.set()
    assert handler.execute_with_timeout(lambda: 7, HANG_S) == handler.execute_with_retry(lambda: 7) == 7
    put(storage, "old")
    handler.rollback("p")
    assert listing(tmp_path) == {}


def test_the_validator_reports_errors_and_warnings_for_record_and_shards(tmp_path, checkpoint):
    checkpoint.save(*small(), to())
    storage, metadata = checkpoint.storage, loaded(checkpoint, at())[1].metadata
    validator, told = ckpt.CheckpointValidator(storage), []
    for result in (validator.validate_checkpoint("p", told.append), validator.validate_metadata(metadata)):
        assert result.is_valid and not result.errors and not result.has_warnings
    validator.integrity_checkers.append(ckpt.ChecksumIntegrityChecker())
    assert told[-1].bytes_done == told[-1].bytes_total > 0 and told[-1].step == "verify"
    (path,) = shards(tmp_path)
    for data in (path.read_bytes(), path.read_bytes()[:-1]):
        path.write_bytes(data)
        with ckpt.CheckpointReader(storage, metadata) as reader:
            assert validator.validate_shards(reader).is_valid == (len(data) == metadata.shards[0].length)
    old = ckpt.VersionCompatibilityChecker().check_compatibility(dataclasses.replace(metadata, version=1))
    assert old.errors == ["format version 1; this code reads 2"]
    raising = types.SimpleNamespace(name="mine", check_compatibility=lambda _: {}["odd"])
    mine = ckpt.CheckpointValidator(storage, [], [raising]).validate_metadata(metadata)
    assert mine.errors == ["checker 'mine' raised KeyError: 'odd'"]
    result = ckpt.ValidationResult(errors=["bad"], warnings=["odd"])
    assert not result.is_valid and result.has_warnings
    assert "bad" in result.get_summary() and "odd" in result.get_summary()


@pytest.mark.parametrize("dimensions", [1, 2, 5, 24, 56])
def test_the_schema_checker_sees_every_overlap_and_hole_in_any_number_of_dimensions(dimensions):
    def wrong(*pieces):
        """The tensors that have errors, if these are the pieces: (the number of a tensor, its box)."""
        tensor, box = map(np.array, zip(*pieces))
        record = types.SimpleNamespace(tensors=tensors, pieces=types.SimpleNamespace(tensor=tensor, box=box))
        errors = ckpt.SchemaCompatibilityChecker().check_compatibility(record).errors
        return [error.partition(":")[0] for error in errors]

    tied = ckpt.TensorMetadata("tied", "F32", (8,), alias_of=1)  # it needs no boxes
    shapes = {"cube": (2,) * dimensions, "flat": (8,)}
    tensors = [*(ckpt.TensorMetadata(name, "F32", shape) for name, shape in shapes.items()), tied]
    cube, flat = np.zeros((2, 2, dimensions), np.int64)
    cube[1], flat[1], flat[1, 0] = 2, 1, 8
    assert wrong((0, cube), (1, flat)) == []
    for dim in range(dimensions):
        first, second, short = cube.copy(), cube.copy(), flat.copy()
        first[1, dim], second[:, dim], short[1, 0] = 1, 1, 7  # halves of the cube; a row with a hole
        assert wrong((0, first), (0, second), (1, flat)) == []
        assert wrong((0, first), (0, first), (1, flat)) == ["cube"]
        assert wrong((0, first), (1, short)) == ["cube", "flat"]


def test_cancel_stops_a_validation_in_a_load_before_all_is_read_or_anything_begins(tmp_path, checkpoint):
    bag, cancel, noticed, read = Bag(w=torch.zeros(20 * MiB)), Sensor(), threading.Event(), []  # 20 blocks
    checkpoint.save(bag, None, to())

    def stop(op):
        if op.call == "pread" and op.size >= BLOCK:
            read.append(op)
            cancel.set()
            cancel.act = noticed.set
            noticed.wait(30.0)  # nothing more is read before the load has looked whether it is cancelled

    storage = Storage(tmp_path, Seam(stop))
    validator = ckpt.CheckpointValidator(storage, [ckpt.ChecksumIntegrityChecker()])
    checkpoint = ckpt.DistributedCheckpoint(storage=storage, validator=validator)
    refusal(lambda: checkpoint.load(bag, None, at(), cancel=cancel), "CANCELLED")
    assert 0 < len(read) < 15
    refused(checkpoint, at(), "CANCELLED", cancel=cancel)


@pytest.fixture
def manual_time(monkeypatch):
    """The clock of the library's deadlines: it goes on only when somebody sleeps, and then at once."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: vars(clock).update(now=clock.now + seconds)
    for module in (ckpt, coord):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_save_stops_waiting_for_a_silent_rank_at_the_deadline(tmp_path, manual_time):
    class Deserted(ckpt.DistributedCoordinator):
        rank, world_size = 0, 2

        def all_gather(self, value, timeout=600.0):
            manual_time.sleep(timeout)
            raise CheckpointException("rank 1 is silent", type=ExceptionType.TIMEOUT, rank=1)

    answer = outcome_of(lambda: save_word(over(tmp_path, Deserted()), "new", timeout=100.0))
    assert answer[:2] == ("TIMEOUT", 1) and 100 <= manual_time.now < 105


def test_a_save_that_is_late_when_a_step_begins_does_not_begin_it(tmp_path, manual_time):
    # Making a file takes longer than the save may take.
    files = Seam(lambda op: manual_time.sleep(101) if op.call == "create" else None)
    checkpoint = over(Storage(tmp_path, files))
    refusal(lambda: checkpoint.save(small()[0], None, to(timeout=100.0)), "TIMEOUT")
    (made,) = [op.path for op in files.log if op.call == "create"]
    assert made.endswith(".tmp") and listing(tmp_path) == {}


def test_a_load_that_is_late_when_it_finds_damage_does_not_fall_back(tmp_path, manual_time):
    """Else a rank that could not agree with a dead one on the damage would go on alone."""
    for word in ("old", "new"):
        put(ckpt.LocalStorage(tmp_path), word, word)
    flip(tmp_path / "new.metadata.json", -40)
    files = Seam(lambda op: manual_time.sleep(101) if op.call == "pread" else None)
    load = functools.partial(over(Storage(tmp_path, files)).load, value("other"), None)
    refusal(
        lambda: load(at("new", fallback=True, timeout=100.0)), "CORRUPTED_CHECKPOINT", "new.metadata.json"
    )


def test_threads_that_get_no_memory_fail_the_save_and_publish_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(st, "aligned_buffer", lambda length: np.empty(1 << 60, np.uint8))
    assert "Unable to allocate" in refusal(lambda: opened(tmp_path).save(small()[0], None, to()))
    assert not list(tmp_path.rglob("*.json"))


def vendor_into(tmp):
    """The three files as somebody else's package: pkg/vendor/ckpt.py and its neighbours."""
    vendor = tmp / "pkg" / "vendor"
    vendor.mkdir(parents=True)
    for package in (vendor.parent, vendor):
        (package / "__init__.py").touch()
    for name in ("ckpt.py", "ckpt_coord.py", "ckpt_storage.py"):
        shutil.copy(HERE / name, vendor)


def output_of(*arguments, **options):
    """What a Python process that succeeds prints."""
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANG_S)
    done = subprocess.run([sys.executable, *arguments], **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@isolated()
def test_the_three_files_work_inside_somebodys_package(tmp_path):
    vendor_into(tmp_path)
    for name in ("ckpt", "ckpt_coord", "ckpt_storage"):
        sys.modules[name] = None  # an import of the top-level name would now fail
    sys.path[:] = [str(tmp_path)] + [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    library = importlib.import_module("pkg.vendor.ckpt")
    with library.DistributedCheckpoint(storage=library.LocalStorage(tmp_path / "c")) as checkpoint:
        checkpoint.save(*small(), library.SaveOptions(checkpoint_prefix="p"))
        state, _ = loaded(checkpoint, library.LoadOptions(checkpoint_prefix="p"))
        assert identical(state, state_of(*small())) and prefixes(checkpoint) == ["p"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    assert "p: ok" in output_of("-m", "pkg.vendor.ckpt", "verify", "c", cwd=tmp_path, env=environment)


CHECKERS = ["mypy --strict", "ruff check --isolated --select E4,E7,E9,F"]
CHECKERS += [f"ruff {command} --config {HERE / 'pyproject.toml'}" for command in ("check", "format --check")]


@pytest.mark.parametrize("tool", CHECKERS)
def test_the_three_files_and_the_readmes_job_please_the_checkers_inside_somebodys_package(tmp_path, tool):
    pytest.importorskip(tool.split()[0])
    vendor_into(tmp_path)
    job = training_script(steps=300).replace("from ckpt import", "from .vendor.ckpt import")
    (tmp_path / "pkg" / "train.py").write_text(job.replace("import time\n", ""))
    output_of("-m", *tool.split(), "pkg", cwd=tmp_path)


def test_importing_ckpt_imports_no_part_of_torch_that_torch_itself_does_not():
    script = "import sys, torch; before = set(sys.modules); import ckpt; print(*set(sys.modules) - before)"
    modules = output_of("-c", script).split()
    assert "ckpt" in modules and not [name for name in modules if name.startswith("torch")]


# ---- API, out of the ordinary: odd optimizers and states, damaged records, disks that fail -----------------


def test_state_that_is_nested_belongs_to_no_parameter_or_is_no_dict_comes_back_bit_for_bit(checkpoint):
    def start(version, parameters):
        """An optimizer with a further entry in its state dict."""
        optimizer = SGD(parameters, lr=0.1)
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "version": version})
        optimizer.register_load_state_dict_pre_hook(lambda _, state: found.append(state["version"]))
        return optimizer

    model, found = filled(nn.Linear(2, 2), "truth").bfloat16(), []
    optimizer = start(7, model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {"factors": [torch.full((2,), 1 / 3)], "sum": torch.full_like(p, 1 / 3).float()}
    optimizer.state["calls"] = 1
    before = copy.deepcopy(optimizer.state_dict()["state"])
    extra = {"sampler": types.SimpleNamespace(state_dict=lambda: 5, load_state_dict=found.append)}
    for staging in STAGINGS:
        pending = checkpoint.save_async(model, optimizer, to(staging, staging=staging), extra_state=extra)
        pending.result(HANG_S)
        fresh = start(1, reversed(list(model.parameters())))
        assert checkpoint.load(model, fresh, staging, extra_state=extra).warnings == []
        assert identical(fresh.state_dict()["state"], {0: before[1], 1: before[0], "calls": 1})
    assert found == [7, 5] * 2


def test_a_tensor_among_a_groups_options_follows_its_parameters_to_another_rank(ram):
    def swap(coordinator):
        """Save a stage of a pipeline; load the other, whose learning rate, a tensor, is another one."""
        rank, checkpoint = coordinator.rank, opened(ram, coordinator)
        mine, other = (nn.ModuleDict({f"stage{n}": nn.Linear(2, 2)}) for n in (rank, 1 - rank))
        said, rate = overheard(checkpoint), torch.tensor([0.5, 0.25][rank])
        checkpoint.save(mine, ADAMW(mine.parameters(), lr=rate), "p")
        optimizer = ADAMW(other.parameters(), lr=torch.tensor(1.0))
        result = checkpoint.load(other, optimizer, at(load_rng_state=False))
        return float(optimizer.param_groups[0]["lr"]), result.warnings, said

    assert together(2, swap) == [(0.25, [], []), (0.5, [], [])], "and no stage is warned of"


@on_ranks(2)
def test_plain_state_of_a_sharded_parameter_stays_that_of_its_rank(rank, ram):
    checkpoint, mesh = opened(ram), init_device_mesh("cpu", (2,))
    model = nn.ParameterDict({"w": distribute_tensor(torch.ones(4, 2), mesh, [ShardDim(0)])})
    optimizer, fresh = (SGD(model.parameters()) for _ in range(2))
    own = torch.full((2, 2), float(rank))
    optimizer.state[model["w"]] = state = {"norm": own.norm(), "local": own, "same": torch.ones(1)}
    checkpoint.save(model, optimizer, "p")
    checkpoint.load(model, fresh, "p")
    assert identical(dict(fresh.state[model["w"]]), state)


def test_a_background_save_for_which_there_is_no_thread_is_done_at_once(checkpoint, monkeypatch):
    def start(thread, real=threading.Thread.start):
        if thread.name == "ckpt-save":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    model, optimizer = small()
    pending = checkpoint.save_async(model, optimizer, to(staging="overlapped"))
    optimizer.step()  # does not wait forever
    checkpoint.load(model, optimizer, pending.result(HANG_S))
    assert identical(state_of(model, optimizer), state_of(*small()))


def test_the_lists_of_many_tensors_are_not_searched_for_garbage_but_training_beside_a_save_is(checkpoint):
    state, writing, runs = {f"w{number}": torch.ones(2) for number in range(5000)}, [], []
    progress = to(progress=lambda _: writing.append(gc.isenabled()))
    gc.callbacks.append(count := lambda phase, _: runs.append(phase))
    try:
        for call, most in (  # without pauses there are 80 to 200; one is due when the call returns
            (lambda: checkpoint.save(state, None, "p"), 5),
            (lambda: checkpoint.save_async(state, None, progress).result(HANG_S), 50),
            (lambda: checkpoint.load(state, None, "p"), 5),
        ):
            runs.clear()
            call()
            assert runs.count("start") < most and gc.isenabled(), (most, runs.count("start"))
    finally:
        gc.callbacks.remove(count)
    assert writing and all(writing)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_a_load_under_another_default_leaves_the_saved_tensors_and_they_can_be_trained(checkpoint, context):
    (model, optimizer), (other, _) = small(), small("other")
    fresh, extra = ADAMW(other.parameters()), {"t": torch.ones(2)}
    with context():
        checkpoint.save_async(model, optimizer, to(staging="overlapped"), extra_state=extra).result(HANG_S)
        assert identical(checkpoint.load(other, fresh, "p").extra_state, extra)
    assert identical(state_of(other, fresh), state_of(model, optimizer))
    other(torch.ones(3)).sum().backward()
    fresh.step()


@on_ranks(3)
def test_wide_elements_that_other_ranks_send_are_copied_whatever_their_place(rank, ram):
    mesh = init_device_mesh("cpu", (3,))
    truth = {"a": torch.ones(301, dtype=torch.uint8), "z": torch.full((33,), 1 + 2j, dtype=torch.complex128)}
    state = {name: distribute_tensor(tensor, mesh, [ShardDim(0)]) for name, tensor in truth.items()}
    opened(ram).save(state, None, to(format="single_file"))
    opened(ram).load(found := blank(truth), None, at(load_rng_state=False))
    assert identical(found, truth)


def test_a_save_to_storages_that_ranks_do_not_share_fails(ram):
    outcomes = together(2, lambda c: outcome_of(lambda: put(ram / str(c.rank), "new", coordinator=c)))
    assert {kind for kind, _, _ in outcomes} == {"STORAGE_ERROR"} and "share" in outcomes[0][2]
    assert prefixes(opened(ram / "0")) == []


def test_no_file_goes_before_the_removal_of_its_record_is_durable(ram):
    """A deletion, or a save that has replaced the record, may have crashed before its sync."""
    for clean_up in (st.collect_garbage, drop):
        put(ram, "old")
        (old,), files = shards(ram), Seam()
        (ram / RECORD).unlink()
        clean_up(Storage(ram, files))
        calls = [op.call for op in files.log if op.call == "fsync_dir" or op[:2] == ("unlink", str(old))]
        assert calls[0] == "fsync_dir" and calls.count("unlink") == 1, calls


def test_retention_keeps_all_where_the_commit_may_not_be_durable(ram):
    put(ram, "old", "a")
    committed = lambda op: op.call == "fsync_dir" and (ram / "b.metadata.json").exists()  # noqa: E731
    put(Storage(ram, Seam(unsynced := Strike(0, fail(errno.EIO), committed))), "new", "b", keep_last=1)
    assert unsynced.hit and prefixes(opened(ram)) == ["a", "b"]


@pytest.mark.parametrize("call, pattern", [("close", "/good/"), ("stat", "/bad.meta"), ("open", "/above$")])
def test_neither_an_error_that_does_not_matter_nor_an_odd_record_stops_anything(ram, caplog, call, pattern):
    """The close of a file that was only read; a look at one record; the directory above, another user's.

    Beside them, one record is huge, and one no file.
    """
    put(base := ram / "above" / "base", "old", "good")
    (base / "bad.metadata.json").write_text("{}")
    os.mkfifo(base / "odd.metadata.json")
    with open(base / "huge.metadata.json", "wb") as file:
        file.truncate(1 << 40)
    fault = fail(errno.EACCES if call == "open" else errno.EUCLEAN)
    strike = Strike(0, fault, lambda op: op.call == call and re.search(pattern, op.path), FOREVER)
    checkpoint = over(storage := Storage(base, Seam(strike)))
    assert seen(storage, "good") == "old" and save_word(checkpoint, "new", "next") == "next"
    assert prefixes(checkpoint) == ["good", "next"] and "skipped odd" in caplog.text
    assert ckpt.collect_garbage(storage, 0.0) == [] and strike.hit


@isolated()
def test_a_reader_of_many_files_keeps_few_open(ram):
    together(40, lambda c: opened(ram, c).save(small()[0], None, "p"))
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 36,) * 2)
    found = opened(ram).validate_checkpoint("p")
    opened(ram).load(small()[0], None, at(load_rng_state=False))
    assert found.is_valid, found.get_summary()


def test_a_load_that_falls_back_still_says_that_an_attempt_has_touched_tensors(tmp_path, checkpoint):
    checkpoint.save({"other": torch.ones(4)}, None, "old")
    checkpoint.save(live := {"a": torch.ones(MiB), "b": torch.ones(MiB)}, None, "new")
    flip(path := shards(tmp_path, "new")[0], path.stat().st_size // 2)
    load = functools.partial(checkpoint.load, live, None, at("new", fallback=True))
    refusal(load, "VALIDATION_FAILED", "missing from the checkpoint", "undefined")


# ---- bytes: the tensor file, the record, what may be in them -----------------------------------------------

CODE_NAMES = """bool=BOOL uint8=U8 uint16=U16 uint32=U32 uint64=U64 int8=I8 int16=I16 int32=I32 int64=I64
    float16=F16 bfloat16=BF16 float32=F32 float64=F64 complex64=C64 complex128=C128 float8_e4m3fn=F8_E4M3
    float8_e5m2=F8_E5M2 float8_e4m3fnuz=F8_E4M3FNUZ float8_e5m2fnuz=F8_E5M2FNUZ float8_e8m0fnu=F8_E8M0
    float4_e2m1fn_x2=F4"""
PAIRS = (pair.split("=") for pair in CODE_NAMES.split())
CODES = {getattr(torch, name): code for name, code in PAIRS if hasattr(torch, name)}
DTYPES = list(CODES)
try:
    torch.zeros(1, dtype=torch.uint8).view(DTYPES[-1]).clone()
except NotImplementedError:  # in torch 2.9, which cannot copy float4
    DTYPES.pop()


code_of = CODES.__getitem__  # what safetensors calls a dtype


def pattern(dtype, salt=0):
    """96 bytes of every kind of bit pattern, seen as `dtype`: NaN payloads, infinities, -0.0, denormals."""
    special = struct.pack("<4d4f", math.nan, -math.inf, -0.0, 5e-324, math.nan, -math.inf, -0.0, 1e-45)
    payloads = struct.pack("<QQ", 0x7FF4DEADBEEF0001, 0xFFF8000000000123)  # of NaNs
    bits = special + payloads + bytes((37 * i + salt) % 256 for i in range(32))
    tensor = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    return (tensor % 2 if dtype == torch.bool else tensor).view(dtype)


def blank(state):
    """Dense tensors of zero bits, like those of `state`."""
    return {name: torch.zeros(t.nbytes).byte().view(t.dtype).view(t.shape) for name, t in state.items()}


@for_each(level=["none", "fast"], form=["multi_shard", "single_file", "consolidated"])
def test_tensors_of_every_dtype_shape_and_stride_come_back_in_place_bit_by_bit(tmp_path, caplog, form, level):
    def views(rows, numbers):
        return {"rows": rows, "conj": numbers.conj(), "neg": numbers.clone().conj().imag}

    base, shared, empty = torch.arange(60.0).reshape(3, 4, 5), torch.arange(600.0), torch.zeros(0, 3)
    words = torch.randint(-(1 << 31), 1 << 31, (MiB * 2,)).int()
    pairs = torch.arange(1, 7, dtype=torch.uint8).view(DTYPES[-1])  # float4 has two elements a byte
    buffer = torch.zeros(1024, 2560, dtype=torch.int32)
    truth = {
        "dtypes": {str(dtype): pattern(dtype) for dtype in DTYPES},
        "pairs": {"one": pairs[:1], "scalar": pairs[:1].reshape(()), "matrix": pairs.reshape(3, 2)},
        "scalars": {"a": torch.tensor(1.5), "b": torch.tensor(-0.0)},
        "empties": {"a": empty, "b": torch.zeros(2, 0, 5, dtype=torch.int16)},
        "empties-and-more": {"a": empty, "b": torch.zeros(2, 0), "c": torch.ones(3)},
        "nothing": {},
        "raw-pieces": {"a": torch.zeros(12345), "b": words, "z": torch.randn(9999, dtype=torch.complex128)},
        "tied": {"first": shared, "second": shared, "half": shared[300:]},
        "strides": {"turned": base.permute(2, 0, 1), "every": base[:, ::2, 1::3]},
        "expanded": {"wide": torch.tensor([[7.0], [8.0]]).expand(2, 9), "real": (base + 1j).conj().real},
        "views": views(torch.arange(1280 << 10, dtype=torch.int32).reshape(-1, 1024), torch.arange(6) + 2j),
    }
    targets = {prefix: blank(state) for prefix, state in truth.items()}
    targets["views"] = views(buffer.t()[::2], torch.zeros(6, dtype=torch.complex64))
    assert targets["views"]["conj"].is_conj() and targets["views"]["neg"].is_neg()
    checkpoint = opened(tmp_path)
    for prefix, state in truth.items():
        options = to(prefix, format=form, compression_level=level, include_rng_state=False)
        checkpoint.save(Bag(**state), None, options)
        checkpoint.load(Bag(**targets[prefix]), None, at(prefix))
        assert checkpoint.validate_checkpoint(prefix).is_valid
        for name, tensor in state.items():
            found, expected = (t.resolve_conj().resolve_neg() for t in (targets[prefix][name], tensor))
            assert identical(found, expected), (prefix, name)
    # The consolidated file has a copy for each tied name: safetensors knows no shared offsets.
    entries = [name for path in shards(tmp_path, "tied") for name in Shard(path).header]
    assert sum("half" not in name for name in entries) == (2 if form == "consolidated" else 1)
    assert not buffer.t()[1::2].any(), "what lies between the rows of a view stays as it is"
    assert ("safetensors is not compressed" in caplog.text) == (level == "fast" and form != "multi_shard")


def test_a_header_with_room_for_more_units_than_compression_left_is_read(checkpoint, tmp_path):
    zeros = {"w": torch.zeros(96 * MiB, dtype=torch.uint8)}
    checkpoint.save(zeros, None, to(compression_level="balanced"))
    shard = Shard(shards(tmp_path)[0])
    assert shard.data_at == 2 * PAGE and not shard.bytes[PAGE : shard.data_at].strip(b" ")
    assert len(shard.metadata["crc32"]) == 8 * math.ceil((len(shard.bytes) - shard.data_at) / UNIT) < 200
    assert checkpoint.validate_checkpoint("p").is_valid
    checkpoint.load(found := {"w": zeros["w"] + 1}, None, at())
    assert not found["w"].any()


SHAPES = [((5 * MiB,), torch.float32), ((1001, 3), torch.bfloat16), ((), torch.int64), ((7, 2), torch.bool)]


@pytest.mark.parametrize("shape, dtype", SHAPES)
@for_each(on_device=[0, 1], device=["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_copies_have_equal_checksums_exactly_if_their_bytes_are_equal(device, on_device, shape, dtype):
    whole = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    other = whole.t().contiguous().t() if len(shape) == 2 else whole.clone()
    flipped, swapped = whole.clone(), whole.clone()
    first, last = int(whole.view(-1)[0]), int(whole.view(-1)[-1])
    flipped.view(-1)[-1] = 1 - last
    swapped.view(-1)[0], swapped.view(-1)[-1] = last, first
    sums = coord.checksums([whole, other, flipped, swapped], [on_device] * 4, coord.Meter())
    assert sums[0] == sums[1] != sums[2] and (sums[0] == sums[3]) == (first == last)


def test_what_safetensors_cannot_name_goes_beside_the_consolidated_file_or_is_refused(checkpoint, tmp_path):
    def state(number):
        z = torch.full((2,), number, dtype=torch.complex128)
        return Bag(w=torch.full((3,), number), z=z, _extra_state={"calls": number}, unset=[None, 5][number])

    reserved = {"__metadata__": torch.ones(3), "w": torch.ones(2)}
    save = functools.partial(checkpoint.save, reserved, None)
    refusal(lambda: save(to(format="consolidated")), "SAVE_FAILED", "'__metadata__'", "MULTI_SHARD")
    assert listing(tmp_path) == {}
    for form in ("multi_shard", "single_file"):
        save(to(format=form))
        checkpoint.load(found := blank(reserved), None, at())
        assert identical(found, reserved)
    export = functools.partial(ckpt.export_checkpoint, checkpoint.storage, "p", tmp_path / "m.safetensors")
    refusal(export, ValueError, "one name: __metadata__; rename one")
    checkpoint.save(state(0), None, to(format="consolidated"))
    checkpoint.load(target := state(1), None, at())
    assert identical(target.state, state(0).state)
    rest, model = map(Shard, shards(tmp_path))
    assert set(model.header) == {"w"} and rest.header["model/z"]["shape"] == [2, 2]
    assert rest.header["model/z"]["dtype"] == "F64" and "model-values/_extra_state" in rest.header


@pytest.mark.parametrize("form", ["single_file", "consolidated"])
def test_a_header_that_other_readers_refuse_is_refused_before_any_write(tmp_path, monkeypatch, form):
    monkeypatch.setattr(st, "MAX_HEADER_BYTES", 2 * PAGE)  # of 100,000,000
    files, state = Seam(), {f"layer.{n}": torch.ones(2) for n in range(150)}
    save = functools.partial(over(Storage(tmp_path, files)).save, state, None, to(format=form))
    refusal(save, None, "a tensor file's header would take", "MULTI_SHARD")
    assert not listing(tmp_path) and not any(map(is_change, files.done))


@pytest.mark.parametrize("shape", [(3, MiB + MiB // 3), (5, 1, MiB)])
@on_ranks(2)
def test_a_replicated_tensor_is_written_once_and_its_bytes_are_balanced(rank, tmp_path, shape):
    opened(tmp_path).save({"w": torch.arange(math.prod(shape), dtype=torch.int32).view(shape)}, None, to())
    sizes, nbytes = [path.stat().st_size for path in shards(tmp_path)], 4 * math.prod(shape)
    assert nbytes <= sum(sizes) < 1.03 * nbytes and max(sizes) < 0.53 * sum(sizes)


@pytest.mark.parametrize("form", FORMATS)
@on_ranks(4)
def test_a_tie_is_stored_once_if_a_shard_is_empty_and_kept_per_rank_without_a_warning(rank, tmp_path, form):
    """Of 5 rows on 4 ranks the last has none."""
    full, own = torch.arange(20.0).view(5, 4), torch.full((3,), float(rank))
    w = distribute_tensor(full.clone(), init_device_mesh("cpu", (4,)), [ShardDim(0)])
    checkpoint, state = opened(tmp_path), {"w": w, "tied": w, "own": own, "own too": own}
    checkpoint.save(state, None, to(format=form, include_rng_state=False), extra_state={"own": own})
    w.to_local().zero_()
    own.fill_(-1.0)
    result = checkpoint.load(state, None, at(load_rng_state=False))
    assert not result.warnings and torch.equal(w.full_tensor(), full) and own[0] == rank
    stored = {t.name: t.alias_of is None for t in result.metadata.tensors}
    copied = form is CheckpointFormat.CONSOLIDATED  # a copy for each name
    assert stored["model/w"] and stored["model/tied"] == copied
    assert not copied or set(Shard(shards(tmp_path)[-1]).header) == set(state)


def test_twenty_thousand_small_tensors_and_hundreds_of_values_cost_what_their_bytes_cost(tmp_path):
    state, files = {f"t{i}": torch.full((16,), i, dtype=torch.int32) for i in range(20_000)}, Seam()
    values = {f"layer.{n}": n for n in range(300)}
    checkpoint, began = over(Storage(tmp_path, files)), time.process_time()
    checkpoint.save(Bag(**state, **values), None, to())
    checkpoint.load(Bag(**blank(state), **dict.fromkeys(values, -1)), None, at())
    assert len(files.log) < 100 and time.process_time() - began < 60
    shard, read = Shard(shards(tmp_path)[0]), sum(op.size for op in files.log if op.call == "pread")
    assert len(shard.bytes) - shard.data_at < 20_300 * 64 + 64 * 1024
    assert read < 3 * sum(map(len, listing(tmp_path).values()))


EXTRA = {
    "none": None,
    "numbers": [True, -(10**60), 1 / 3, -0.0, math.inf, -math.inf, math.nan],
    "text": ["ünï\ud7ff\u0000\n", "\ud800", "\ud83d\ude00", "\udc00\ud800", bytes(range(256))],
    "lists": [[1, [2.0, ("three", [])], ()], {1, "a", (2,)}, {}, [], (), set(), "", b""],
    "keys": {1: "int", "1": "str", False: "no", 2.5: "float", (1, "a"): "tuple", None: "none", b"b": "bytes"},
    "surrogate keys": {"\ud83d\ude00": 1, "\U0001f600": 2, "\udfff": 3},
    "torch": [torch.bfloat16, torch.device("cpu"), torch.Size([2, 0])],
    "numpy": [np.arange(6, dtype=">i2").reshape(2, 3), np.float32(1.1), np.array(["a", "bc"])],
    "naive date": datetime.datetime(2024, 2, 29, 1, 2, 3, 4),
    "date": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
    "tensor": torch.arange(5.0),
    "nested": {"deep": [torch.ones(2, dtype=torch.float64), {"x": torch.tensor(3)}]},
    "like a tag": {"$tensor": "x", "$": {}, "@": [], "a/b": {"$int": "0x1"}},
}
ALIKE = [  # a tensor inside a value never takes the name of another value
    {"a": {"b": torch.ones(1)}, "a.b": 5},
    {"w": torch.ones(1), "w#1": 5},
    {"a": [torch.ones(2), torch.zeros(2)], "a.0": torch.full((3,), 7.0)},
]


@isolated()
def test_extra_state_comes_back_exactly_and_no_pickle_is_ever_loaded(tmp_path):
    events, checkpoint = [], opened(tmp_path)
    cases = [*({key: value} for key, value in EXTRA.items()), EXTRA, *ALIKE]
    for number, extra in enumerate(cases):
        checkpoint.save({}, None, f"case-{number}", extra_state=extra)
    watched = ("pickle.find_class", "marshal.loads", "exec", "compile")
    sys.addaudithook(lambda name, args: events.append((name, str(args))) if name in watched else None)
    for number, extra in enumerate(cases):
        found = checkpoint.load({}, None, f"case-{number}").extra_state
        assert identical(found, extra), found
    assert [event for event in events if event[0] != "exec" or "ckpt" in event[1]] == []


def test_tensors_whose_places_read_alike_or_are_one_tensor_here_come_back_each_to_its_own(checkpoint):
    a, b, c, d, weight, average = (torch.full((4,), float(number)) for number in range(6))
    truth = {"a": {"b": a}, "a.b": b, "c": {1: (c,)}, "d": d, "tied": d}
    model = Bag(weight=weight, _extra_state={"average": average})
    checkpoint.save(model, None, to(), extra_state={"x": Bag(**truth)})
    live, places = torch.full((4,), 7.0), torch.zeros(3, 4).unbind()
    target = Bag(**{"a": {"b": places[0]}, "a.b": places[1], "c": {1: (places[2],)}, "d": live})
    target.state["tied"] = live.detach()
    model = Bag(weight=live, _extra_state={"average": live})  # as an average is before the first step
    checkpoint.load(model, None, at(), extra_state={"x": target})
    assert identical(live, weight) and identical(model.state["_extra_state"], {"average": average})
    assert identical(places, (a, b, c)), "filled in place"
    assert identical(target.state, truth)


def test_of_stored_tensors_that_are_one_parameter_here_the_last_is_loaded_with_a_warning(checkpoint):
    first, last, tied = (torch.full((MiB,), number) for number in (1.0, 2.0, 0.0))
    checkpoint.save({"first": first, "last": last}, None, to())
    for _ in range(5):
        (warning,) = checkpoint.load({"first": tied.zero_(), "last": tied}, None, at()).warnings
        assert "model/first" in warning and "model/last" in warning and identical(tied, last)


@dataclasses.dataclass
class Point:
    x: int = 0


REFUSED = [  # what is said of it; model and extra state. UTF-8 cannot encode half of a surrogate pair
    ("extra/outer.0.inner .ExceptionType;", {}, {"outer": [{"inner": ExceptionType.UNKNOWN}]}),
    ("extra/outer.0.inner .Point;", {}, {"outer": [{"inner": Point()}]}),
    (r"model/a\ud800", Bag(**{"a\ud800": torch.ones(1)}), None),
    (r"model-values/a\ud800", Bag(**{"a\ud800": 5}), None),
    (r"extra/k.a\ud800", {}, {"k": {"a\ud800": torch.ones(1)}}),
]


@pytest.mark.parametrize("words, model, extra", REFUSED)
def test_what_is_no_data_or_no_utf_8_is_refused_by_path_before_any_write(tmp_path, words, model, extra):
    save = functools.partial(opened(tmp_path).save, model, None, to(), extra_state=extra)
    assert refusal(save, "SAVE_FAILED", *words.split()).isascii() and listing(tmp_path) == {}


class Wrapped(torch.Tensor):
    """A tensor subclass that the library cannot know."""


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


UNSUITED = {
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "dtype torch.qint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta device": lambda: torch.empty(3, device="meta"),
    "a Wrapped, a tensor subclass": lambda: torch.ones(3).as_subclass(Wrapped),
    "lazy module": nn.UninitializedParameter,
    "storage was freed": freed,
}


@pytest.mark.parametrize("problem", UNSUITED)
def test_a_tensor_that_is_not_dense_and_real_is_refused_by_key_and_nothing_changes(checkpoint, problem):
    state = {"good": torch.ones(3), "layer.odd": UNSUITED[problem]()}
    refusal(lambda: checkpoint.save(state, None, to()), "SAVE_FAILED", "layer.odd", problem)
    assert checkpoint.storage.names() == []
    checkpoint.save({"good": torch.zeros(3), "layer.odd": torch.zeros(3)}, None, to())
    message = refusal(lambda: checkpoint.load(state, None, at()), "LOAD_FAILED", "layer.odd", problem)
    assert "undefined" not in message and identical(state["good"], torch.ones(3))


@on_ranks(2)
def test_parts_that_do_not_make_up_a_tensor_are_refused_before_any_write(rank, tmp_path):
    """A part of another size than its placement says; and one of two ranks of a mesh, which saves alone."""
    mesh, sizes = init_device_mesh("cpu", (2,)), {"shape": torch.Size((4, 3)), "stride": (3, 1)}
    for coordinator, rows, kind, words in (
        (None, 3, "SAVE_FAILED", "do not fit its shape [4, 3] and local shape [3, 3]"),
        (ckpt.LocalCoordinator(), 2, "VALIDATION_FAILED", "together hold 6 elements of its 12"),
    ):
        w = DTensor.from_local(torch.ones(rows, 3), mesh, [ShardDim(0)], run_check=False, **sizes)
        refusal(lambda: opened(tmp_path, coordinator).save({"w": w}, None, "p"), kind, "model/w", words)
        assert listing(tmp_path) == {}


def test_an_expanded_tensor_is_refused_by_a_load_before_anything_changes(checkpoint):
    checkpoint.save({"mask": torch.ones(1, 3).expand(4, 3), "w": torch.ones(2)}, None, "p")
    live = {"mask": torch.zeros(1, 3).expand(4, 3), "w": torch.zeros(2)}
    refusal(lambda: checkpoint.load(live, None, "p"), "VALIDATION_FAILED", "model/mask", "clone()")
    assert not live["w"].any()


class Scale(nn.Parameter):
    """A parameter of a class of its own, as FP8 and quantisation libraries have."""


class Unusual(nn.Linear):
    """Such a parameter, an `nn.Buffer`, and a state whose methods take no options."""

    def __init__(self):
        super().__init__(3, 2)
        self.scale, self.offset = Scale(torch.zeros(3)), nn.Buffer(torch.zeros(3))

    def state_dict(self):
        return super().state_dict()

    def load_state_dict(self, state):
        return super().load_state_dict(state)


def test_what_a_save_accepts_a_load_of_the_same_objects_accepts(checkpoint):
    def start(number, steps):
        def bag():
            return Bag(a=Scale(torch.full((2,), number)), b=torch.ones(2, requires_grad=True) * number)

        model = filled(Unusual(), number)  # two optimizers have the same parameters
        optimizers = {"adamw": stepped(model, ADAMW, steps, lr=number), "own": bag()}
        optimizers["sgd"] = stepped(model, SGD, steps, momentum=number)
        return {"unusual": model, "bag": bag()}, optimizers, {"extra": bag()}

    def values(*parts):
        return [dict(part.state_dict()) for named in parts for _, part in sorted(named.items())]

    (model, optimizers, extra), other = start(0.5, 2), start(0.25, 0)
    truth = values(model, optimizers, extra)
    assert not any(map(identical, values(*other), truth))
    checkpoint.save(model, optimizers, to(), extra_state=extra)
    checkpoint.load(other[0], dict(reversed(other[1].items())), at(), extra_state=other[2])
    assert identical(values(*other), truth)


def test_loose_mode_keeps_state_that_the_checkpoint_lacks_and_asks_no_module_for_strict(checkpoint):
    own, model = Unusual(), filled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "truth")
    checkpoint.save({"weight": own.weight}, None, "p")
    assert checkpoint.load(own, None, at(strict_mode=False)).warnings
    checkpoint.save(model[:1], stepped(model[:1]), "p")
    optimizer = stepped(model)
    before = copy.deepcopy(optimizer.state[model[1].weight])
    checkpoint.load(model, optimizer, at(strict_mode=False))
    assert identical(optimizer.state[model[1].weight], before)


@on_ranks(2)
def test_partial_placements_and_fsdp1_at_any_depth_are_refused_with_the_ways_out(rank, tmp_path):
    plain, model = (nn.Sequential(nn.Linear(3, 5), nn.ModuleDict({"inner": nn.Linear(5, 2)})) for _ in "12")
    checkpoint, mesh = opened(tmp_path), init_device_mesh("cpu", (2,))
    checkpoint.save({"part": plain}, None, "plain")
    before = listing(tmp_path)
    partial = {"grad_sum": DTensor.from_local(torch.ones(3), mesh, [Partial()])}
    old = FullyShardedDataParallel(nn.Linear(5, 7), device_id=torch.device("cpu"))
    FullyShardedDataParallel.set_state_dict_type(old, StateDictType.SHARDED_STATE_DICT)
    model[1]["inner"] = FullyShardedDataParallel(model[1]["inner"], device_id=torch.device("cpu"))
    deep, kept = {"part": DistributedDataParallel(model)}, state_of(model[0])
    ways = ("part.1.inner is FSDP1", "fully_shard", "get_state_dict", "device_mesh", "extra_state")
    for verb, prefix, given, words in (
        ("save", "p", partial, ("grad_sum", "Partial")),
        ("save", "p", Bag(**old.state_dict()), ("weight", "device_mesh")),
        ("save", "p", deep, ways),
        ("load", "plain", deep, ways),
    ):
        refusal(lambda: getattr(checkpoint, verb)(given, None, prefix), f"{verb.upper()}_FAILED", *words)
    assert listing(tmp_path) == before and identical(state_of(model[0]), kept)


# ---- protocol: S1 to S7, L1 to L5, over real ranks ---------------------------------------------------------


@on_ranks(3)
def test_coordinators_of_all_or_some_ranks_exchange_values_of_any_size_and_name_who_is_late(rank, tmp_path):
    coordinator = ckpt.TorchCoordinator()
    assert all(isinstance(c, ckpt.DistributedCoordinator) for c in (coordinator, ckpt.LocalCoordinator()))
    sizes = (1 << 22, (1 << 22) - 2, 30_000_000)  # with its two quotes the second fills a value of the store
    texts, names = [str(rank) * size for rank, size in enumerate(sizes)], r"rank\(s\) ([02], )?1(, [02])? of"
    assert coordinator.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert coordinator.all_gather(texts[rank]) == texts
    assert [coordinator.broadcast(texts[rank], src=src) for src in (1, 2)] == texts[1:]
    coordinator.barrier()
    coordinator.barrier()
    assert dist.distributed_c10d._get_default_store().num_keys() <= 20
    for other in (0, 2) if rank == 1 else ():
        await_file(tmp_path / f"gave-up-{other}")
    late = outcome_of(lambda: coordinator.barrier(timeout=1.0))
    (tmp_path / f"gave-up-{rank}").touch()
    # It names who is silent, and on a busy machine who came late to this wait.
    assert rank == 1 or (late[0] == "TIMEOUT" and re.search(names, late[2])), late
    ckpt.TorchCoordinator().barrier()
    assert ckpt.TorchCoordinator().all_gather(rank) == [0, 1, 2]
    group, base, truth, other = dist.new_group([1, 2]), tmp_path / "c", small(), small("other")
    if rank == 0:
        refusal(lambda: ckpt.TorchCoordinator(group), ValueError, "rank 0 is not in", "[1, 2]")
        dist.destroy_process_group()
        refusal(ckpt.TorchCoordinator, ValueError, "call init_process_group")
    else:
        some = ckpt.TorchCoordinator(process_group=group)
        opened(base, some).save(*truth, "p")
        opened(base, some).load(*other, "p")
        assert identical(state_of(*other), state_of(*truth)) and len(shards(base)) == 2
        assert (some.rank, some.world_size) == (rank - 1, 2)


@on_ranks(3)
def test_a_rank_reads_what_it_needs_of_other_ranks_values_not_all_of_them(rank, ram):
    """Were it all, thousands of ranks would read thousands of values each from one store."""
    names = [f"{'layer' * 20}.{number}" for number in range(300)]
    coordinator, third = ckpt.TorchCoordinator(), {name: torch.zeros(1) for name in names[rank::3]}
    checkpoint = opened(ram, coordinator)
    checkpoint.save({name: torch.ones(1) for name in names}, None, to())
    read, get = [], coordinator._get
    coordinator._get = lambda key, text: read.append(len(text)) or get(key, text)
    checkpoint.load(third, None, at(load_rng_state=False))
    assert all(tensor == 1 for tensor in third.values())
    assert rank == 0 or 0 < sum(read) < 1.2 * (ram / "p.metadata.json").stat().st_size
    read.clear()
    checkpoint.save(third, None, to("q", include_rng_state=False))  # a third of the plan is for this rank
    assert rank == 0 or 0 < sum(read) < 0.7 * (ram / "q.metadata.json").stat().st_size
    dist.barrier()


def await_file(path):
    """Wait until another rank has made `path`: a gate, not a sleep."""
    while not path.exists():
        time.sleep(0.01)


def test_the_file_operations_of_an_overwrite_and_a_delete_come_in_the_documented_order(tmp_path):
    def in_order(*steps):
        rest = iter(files.log)
        return all(any(op.call == call and op.path.endswith(end) for op in rest) for call, end in steps)

    files = Seam()
    checkpoint = ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files))
    checkpoint.save(*small(), "p")
    (old,) = (path.name for path in shards(tmp_path))
    files.log.clear()
    checkpoint.save(*small("second"), "p")
    (new,) = (path.name for path in shards(tmp_path))
    record, synced, renamed, gone = ("create", ".tmp"), ("fsync_dir", ""), ("rename", ".tmp"), ("unlink", old)
    assert in_order(record, ("pwrite", new), ("fsync", new), synced, renamed, synced, gone)
    assert in_order(record, ("pwrite", ".tmp"), ("fsync", ".tmp"), renamed)
    for path in (new, ".tmp"):
        assert not in_order(("fsync", path), ("pwrite", path))
    assert not in_order(renamed, renamed) and not in_order(gone, gone), "there is one of each"
    files.log.clear()
    checkpoint.delete_checkpoint("p")
    assert in_order(("unlink", "p.metadata.json"), synced, ("unlink", new))
    assert not in_order(("unlink", new), ("unlink", new))


ODD = [
    (to("other"), "disagree about prefix"),
    (to(format="single_file"), "disagree about format"),
    (to(compression_level="fast"), "disagree about compression"),
    (to(include_optimizer=False), "disagree about contents: rank 0 has ('optimizer', 'rng'), rank 1 has"),
    ({"x": 1}, "options must be SaveOptions, or the prefix as a string, not <class 'dict'>"),
    (7, "options must be LoadOptions, or the prefix as a string, not <class 'int'>"),
]


@on_ranks(2)
def test_what_one_rank_alone_gets_wrong_is_an_error_on_all_and_nothing_changes(rank, tmp_path):
    checkpoint, bag = opened(tmp_path), Bag(w=torch.full((2,), 3.0))
    checkpoint.save(*small(), to(format="multi_shard" if rank else CheckpointFormat.MULTI_SHARD))  # the same
    checkpoint.save(bag, None, "good")
    before, in_background = listing(tmp_path), lambda *given: checkpoint.save_async(*given).result(HANG_S)
    for odd, words in ODD:
        calls, even = ([checkpoint.load], at()) if odd == 7 else ([checkpoint.save, in_background], to())
        for call in calls:
            kind, _, message = outcome_of(lambda: call(*small(), odd if rank else even))
            assert kind == "ValueError" and words in message and listing(tmp_path) == before, message
    bag.state["w"].zero_()
    # A failure of a type that fits no save; and one of a load, which fails when its bytes are there.
    saved = Doomed(CheckpointException("boom", type=ExceptionType.LOAD_FAILED)) if rank else bag
    found = Doomed(KeyError("boom"), can_save=True) if rank else bag
    fails = ("save", saved, "boom (rank 1, in S2 "), ("load", found, "KeyError: 'boom'; tensors being")
    for verb, given, words in fails:
        *answer, message = outcome_of(lambda: getattr(checkpoint, verb)(given, None, "good"))
        assert answer == [f"{verb.upper()}_FAILED", 1] and words in message, message
        assert ("undefined" in message) == (verb == "load") and listing(tmp_path) == before, message
    assert rank == 1 or bag.state["w"].tolist() == [3.0, 3.0]
    names = [checkpoint.save(bag) for _ in range(3)]
    assert gathered(names) == [names] * 2 and len(set(names)) == 3, "default prefixes are new, and alike"


@on_ranks(2)
def test_a_call_on_one_rank_alone_says_at_the_deadline_that_it_is_collective_as_the_late_one(rank, tmp_path):
    if rank == 0:
        assert prefixes(opened(tmp_path)) == []  # nor does the making of an object wait
    checkpoint, model = opened(tmp_path, default_timeout=600.0 if rank else 0.2), small()[0]
    calls = checkpoint.save, lambda *given: checkpoint.save_async(*given).result(20.0), checkpoint.load
    for prefix in "pq":
        checkpoint.save(model, None, to(prefix, timeout=600.0))
    if rank == 1:
        await_file(tmp_path / "gave-up")
    answers = [outcome_of(lambda: call(model, None, "p")) for call in calls]
    for verb, (*answer, message) in zip(("save", "save", "load"), answers):
        hint = f"{verb} is collective: every rank must call it"
        assert answer == ["TIMEOUT", 1] and hint in message, message
    if rank == 0:  # neither queries nor a deletion wait for the late rank
        assert prefixes(checkpoint) == ["p", "q"] and checkpoint.latest_checkpoint().prefix == "q"
        assert checkpoint.validate_checkpoint("p").is_valid
        checkpoint.delete_checkpoint("p")
        assert prefixes(checkpoint) == ["q"]
    (tmp_path / "gave-up").touch()
    checkpoint.save(model, None, to("again", timeout=600.0))
    checkpoint.load(model, None, at("again", timeout=600.0))
    assert gathered(answers) == [answers] * 2
    assert prefixes(checkpoint) == ["q", "again"], "the late rank has committed nothing"


@on_ranks(2)
def test_an_object_made_before_the_process_group_saves_with_all_ranks_of_any_group(rank, tmp_path):
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()  # who leaves a group while others still connect to it ends it for them
    dist.destroy_process_group()
    checkpoint = opened(tmp_path)
    checkpoint.save(small()[0], None, f"alone-{rank}")
    for name in ("first", "second"):
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=2)
        model, other = (DistributedDataParallel(small(salt)[0]) for salt in ("truth", "other"))
        saved, coordinator = checkpoint.save(model, None, "p"), checkpoint.coordinator
        result = checkpoint.load(other, None, "p")
        assert identical(state_of(other), state_of(model)) and checkpoint.coordinator is coordinator
        pending = checkpoint.save_async(model, None, "late")
        dist.destroy_process_group()  # the save in the background goes on with the ranks that began it
        assert (saved, pending.result(20.0)) == ("p", "late") and len(shards(tmp_path)) == 2
        assert result.metadata.world_size == result.target_world_size == 2
    found = {info.prefix: info.world_size for info in checkpoint.list_checkpoints()}
    assert found[f"alone-{rank}"] == 1 and type(checkpoint.coordinator) is ckpt.LocalCoordinator


@pytest.mark.parametrize("given, size, times", [(0, "2", 1), (1, "2", 0), (0, "1", 0), (0, "", 0)])
def test_a_save_by_one_process_of_several_warns_once(tmp_path, monkeypatch, caplog, given, size, times):
    monkeypatch.setenv("WORLD_SIZE", size)
    checkpoint = opened(tmp_path, ckpt.LocalCoordinator() if given else None)
    assert checkpoint.latest_checkpoint() is None and "WORLD_SIZE" not in caplog.text
    for save in (checkpoint.save, checkpoint.save_async, checkpoint.save):
        save(small()[0], None, "p")
    checkpoint.close()
    assert caplog.text.count("WORLD_SIZE is 2: call init_process_group") == times


# ---- resharding: from every layout to every layout, bit for bit --------------------------------------------

LAYOUTS = {"plain": 1, "ddp2": 2, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "tp2": 2, "fsdp2tp2": 4, "hsdp2x2": 4}
MESH_DIMENSIONS = {"hsdp2x2": ("replicate", "shard"), "tp2": ("tp",), "fsdp2tp2": ("dp", "tp")}


class Net(nn.Module):
    """Dimensions that no world size divides, some smaller than it, a tied weight, a scalar, buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 6), nn.Embedding(7, 5)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.tiny, self.row = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 3))
        self.gain = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("mask", torch.zeros(5, dtype=torch.bool))


def laid_out(model, layout):
    """Shard a Net as `layout` says, by torch's own means."""
    if layout == "ddp2":
        return DistributedDataParallel(model)
    dimensions = MESH_DIMENSIONS.get(layout)
    mesh = dimensions and init_device_mesh("cpu", (2,) * len(dimensions), mesh_dim_names=dimensions)
    if "tp" in layout:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "place": ColwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    if layout.startswith(("fsdp", "hsdp")):
        mesh = mesh["dp"] if layout == "fsdp2tp2" else mesh
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.gain})  # which takes no scalars
    return model


def the_truth(layout):
    """A model and an AdamW in a known state, sharded by torch: what every load must give."""
    model = laid_out(filled(Net(), "truth"), layout)
    optimizer = stepped(model, lr=0.0, foreach=False)
    optimizer.param_groups[0]["lr"] = 0.125
    for slot in ("exp_avg", "exp_avg_sq"):
        donor = laid_out(filled(Net(), f"truth{slot}"), "plain" if layout == "ddp2" else layout)
        for (name, source), parameter in zip(donor.named_parameters(), model.parameters()):
            optimizer.state[parameter][slot].copy_(source.detach())
            optimizer.state[parameter]["step"].fill_(zlib.crc32(name.encode()) % 1000)
    return model, optimizer


def everything(model, optimizer):
    """The entries of a model, the state of its optimizer by name, and the options of its groups."""
    found = {"groups": [{**group, "params": 0} for group in optimizer.param_groups], **model.state_dict()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{slot}": value for slot, value in optimizer.state[parameter].items()}
    return found


def save_layout(rank, world_size, tmp, layout):
    model, optimizer = the_truth(layout)
    for form in FORMATS:
        opened(tmp).save(model, optimizer, to(f"{layout}/{form.name}", format=form))


def load_layout(rank, world_size, tmp, layout, loads):
    """What differs from the truth after each load of (prefix, strategy), into fresh and used optimizers."""
    truth, wrong, checkpoint = everything(*the_truth(layout)), [], opened(tmp)
    for number, (prefix, strategy) in enumerate(loads):
        model = laid_out(Net(), layout)
        optimizer = stepped(model, steps=2 * (number % 2), foreach=False)
        checkpoint.load(model, optimizer, at(prefix, resharding_strategy=strategy))
        found = everything(model, optimizer)
        names = [name for name in truth | found if not identical(found.get(name), truth.get(name))]
        wrong += [(prefix, strategy, name) for name in names]
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(layout)` is a directory that holds `<layout>/<format>`; each layout is saved once."""
    base = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def save(layout):
        run(LAYOUTS[layout], save_layout, base, layout)
        return base

    return save


@pytest.mark.parametrize("target", LAYOUTS)
def test_reshard_from_any_layout_in_any_format_to_any_other_is_exact(saved, target):
    loads = []
    for (n, source), (m, form) in itertools.product(enumerate(LAYOUTS), enumerate(FORMATS)):
        every = {source, target} == {"fsdp3", "fsdp2tp2"}
        strategies = STRATEGIES if every else [STRATEGIES[(n + m) % 3]]
        loads += [(f"{source}/{form.name}", strategy) for strategy in strategies]
        base = saved(source)
    assert run(LAYOUTS[target], load_layout, base, target, loads) == [[]] * LAYOUTS[target]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reshard_files_are_those_of_the_format_and_safetensors_reads_the_truth(saved, layout):
    base, safetensors = saved(layout), pytest.importorskip("safetensors.torch")
    for form, whole_files in {"MULTI_SHARD": 0, "SINGLE_FILE": 1, "CONSOLIDATED": 1}.items():
        found = [Shard(path) for path in sorted((base / layout / form).iterdir())]  # asserts the rules
        assert len(found) == whole_files + (0 if form == "SINGLE_FILE" else LAYOUTS[layout])
        for shard in found:
            with safetensors.safe_open(shard.path, framework="pt") as file:
                assert sorted(file.keys()) == sorted(shard.header)
                assert all(raw(file.get_tensor(name)) == shard.data(name) for name in shard.header)
    truth = dict(filled(Net(), "truth").state_dict())
    assert identical(safetensors.load_file(shard.path), truth), "it feeds load_state_dict"


@pytest.mark.parametrize("how", ["parallel", "sequential", "load_safetensors"])
@on_ranks(2)
def test_ranks_that_share_blocks_read_only_the_units_of_their_own_part_of_the_model(rank, tmp_path, how):
    """Each rank wants a half of each layer, of 3 MiB; none an optimizer, in which a bit is flipped."""
    layers = (nn.ModuleList(nn.Linear(1024, 768, bias=False) for _ in range(8)) for _ in "12")
    truth, model = map(filled, layers, ("truth", "other"))
    if rank == 0:
        opened(tmp_path, ckpt.LocalCoordinator()).save(truth, stepped(truth, SGD, lr=0.0, momentum=0.9), to())
        shard = Shard(shards(tmp_path)[0])
        flip(shard.path, shard.place(shard.find("optimizer/7.weight/"))[1] - 1)
    for layer in model:
        fully_shard(layer)
    st.os = files = Seam()
    if how == "load_safetensors":  # of another program
        (foreign := tmp_path / str(rank)).mkdir()
        ckpt.load_safetensors(model, as_file(foreign, truth.state_dict()))
    else:
        opened(tmp_path).load(model, None, at(resharding_strategy=how, load_rng_state=False))
    for found, expected in zip(model.parameters(), truth.parameters()):
        assert identical(found.to_local().data, expected.data.chunk(2)[rank])
    read = sum(op.size for op in files.done if op.call == "pread" and op.path.endswith("safetensors"))
    assert 0 <= read - 12 * MiB < (4 * MiB if how == "load_safetensors" else 3 * UNIT), read
    optimizer = stepped(model, SGD, momentum=0.9)
    refusal(lambda: opened(tmp_path).load(model, optimizer, at()), "CORRUPTED_CHECKPOINT")


@pytest.mark.parametrize("level", LEVELS)
@on_ranks(2)
def test_broadcast_reads_each_stored_byte_once_where_pieces_share_units_and_blocks_too(rank, tmp_path, level):
    """Saved by rows and loaded by columns: every rank needs all pieces."""
    mesh, noise = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    truth = {f"w{number}": torch.randn(1000 + number, 1030, generator=noise) for number in range(4)}
    rows = {name: distribute_tensor(w, mesh, [ShardDim(0)]) for name, w in truth.items()}
    columns = {name: distribute_tensor(torch.zeros_like(w), mesh, [ShardDim(1)]) for name, w in truth.items()}
    opened(tmp_path).save(rows, None, to(compression_level=level, include_rng_state=False))
    checkpoint = ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files := Seam()))
    checkpoint.load(columns, None, at(load_rng_state=False, resharding_strategy="broadcast"))
    assert all(torch.equal(columns[name].full_tensor(), w) for name, w in truth.items())
    reads = [op.size for op in files.done if op.call == "pread" and op.path.endswith("safetensors")]
    read, saved = sum(gathered(sum(reads))), [Shard(path) for path in shards(tmp_path)]
    headers, stored = sum(file.data_at for file in saved), sum(len(file.bytes) for file in saved)
    assert stored <= read <= stored + headers, (read, stored, headers)


def torchs_shard(rows, dim, ways, index, split_factor):
    """Shard `index` of a tensor: by `torch.chunk` alone, for `_StridedShard` group by group."""

    def chunk(part, count, at):
        parts = part.chunk(count, dim)
        return parts[at] if at < len(parts) else part.narrow(dim, 0, 0)

    groups = [chunk(rows, split_factor, group) for group in range(split_factor)]
    return torch.cat([chunk(group, ways, index) for group in groups], dim)


def random_layout(rng, meshes, shape):
    """A function from a whole tensor to its DTensor on some mesh, and whether that has a `_StridedShard`."""
    mesh = meshes[int(rng.integers(len(meshes)))]
    dims = [int(rng.integers(-1, len(shape))) for _ in range(mesh.ndim)]  # -1: replicated
    factors = cuts = [int(rng.choice([1, 1, 1, 2, 3])) for _ in dims]
    order = list(range(mesh.ndim))
    later = math.prod(mesh.size(i) for i in order[1:] if dims[i] == dims[0])
    if dims[0] >= 0 and later > 1 and rng.random() < 0.4:  # FSDP2 cuts what the others have left
        cuts, order = [1] * mesh.ndim, [*order[1:], 0]
        factors = [later, *cuts[1:]]
    placements = [
        Replicate() if dim < 0 else ShardDim(dim) if factor == 1 else StridedShard(dim, split_factor=factor)
        for dim, factor in zip(dims, factors)
    ]

    def laid(whole):
        coordinate, part = mesh.get_coordinate(), whole
        for i in order:
            if coordinate is not None and dims[i] >= 0:
                part = torchs_shard(part, dims[i], mesh.size(i), coordinate[i], cuts[i])
        part = whole.new_empty(0) if coordinate is None else part.clone()
        sizes = {"shape": whole.shape, "stride": whole.stride()}
        return DTensor.from_local(part, mesh, placements, run_check=False, **sizes)

    return laid, "Strided" in str(placements)


@on_ranks(4)
def test_every_layout_of_a_tensor_is_saved_and_loaded_exactly_or_refused_before_any_write(rank, tmp_path):
    """A tensor is saved in one layout and loaded in another, sometimes after a bit of a file was flipped."""
    st.UNIT_BYTES, st.BLOCK_BYTES, st._MIN_DIRECT_BYTES = PAGE, 2 * PAGE, PAGE
    tables = [[0, 1, 2, 3], [2, 0, 3, 1], [[0, 1], [2, 3]], [[3, 1], [0, 2]]]
    tables += [[[[0, 1]], [[2, 3]]], [[1], [0], [2], [3]], [1, 3], [0, 1, 2]]
    meshes, outcomes, cases = [DeviceMesh("cpu", torch.tensor(table)) for table in tables], [], 130
    for case in range(cases):
        rng, path = np.random.default_rng(case), f"{tmp_path}/{case}"
        least, most = 0 if case % 9 == 0 else 1, (14, 14, 40, 9000)[case % 4]
        shape = tuple(rng.integers(least, most, size=1 if most == 9000 else rng.integers(1, 4)).tolist())
        dtype = (torch.int64, torch.float32, torch.bfloat16, torch.uint8)[rng.integers(4)]
        truth = (torch.arange(math.prod(shape)) * 37 % 251).view(shape).to(dtype)
        (source, strided), (target, target_strided) = (random_layout(rng, meshes, shape) for _ in range(2))
        level, place, is_damaged = LEVELS[case // 2 % 4], rng.random(), rng.random() < 0.3
        options = to(format=FORMATS[case % 3], compression_level=level, include_rng_state=False)
        kind, _, message = outcome_of(lambda: opened(path).save(Bag(w=source(truth)), None, options))
        if kind != "returned":
            assert strided and not listing(path), (case, kind, message)
            outcomes.append("refused")
            continue
        if rank == 0 and is_damaged:
            flip(file := shards(path)[0], int(place * file.stat().st_size))
        dist.barrier()
        if rank == 0:
            out = f"{path}/w.safetensors"
            kind = outcome_of(lambda: ckpt.export_checkpoint(path, "p", out))[0]
            right = is_damaged if kind == "CORRUPTED_CHECKPOINT" else contents(out) == as_stored({"w": truth})
            assert right, (case, kind)
        options = at(resharding_strategy=STRATEGIES[case // 3 % 3])
        for found, exact, may_fail in (
            (torch.zeros(shape, dtype=dtype), truth, False),
            (target(torch.zeros(shape, dtype=dtype)), target(truth), target_strided),
        ):
            kind, _, message = outcome_of(lambda: opened(path).load(Bag(w=found), None, options))
            if kind == "returned":
                assert identical(found, exact), case
            else:
                assert (kind == "CORRUPTED_CHECKPOINT" and is_damaged) or may_fail, (case, kind, message)
            outcomes.append(kind)
    assert gathered(outcomes) == [outcomes] * 4 and outcomes.count("refused") < cases // 10
    assert outcomes.count("returned") > cases and outcomes.count("CORRUPTED_CHECKPOINT") > cases // 10


def test_the_model_comes_first_and_small_pieces_lie_together_so_that_a_rank_reads_few_blocks(tmp_path):
    sizes = {f"layer{n}.{what}": size for n in range(3) for what, size in (("step", 1), ("weight", MiB))}
    bag = Bag(**{name: torch.ones(size) for name, size in sizes.items()})
    opened(tmp_path).save(bag, None, to(), extra_state={"t": torch.ones(MiB)})
    names = list(Shard(shards(tmp_path)[0]).header)
    assert names[:6] == [f"model/layer{n}.{what}" for what in ("weight", "step") for n in range(3)]
    assert "extra/t" in names


ADAMW, ADAM, RADAM, SGD = torch.optim.AdamW, torch.optim.Adam, torch.optim.RAdam, torch.optim.SGD


def test_optimizer_state_and_options_follow_names_into_another_order_and_other_groups(tmp_path):
    def momentum(parameters):
        """SGD over matrices and the rest, with options."""
        matrices, rest = [], []
        for parameter in parameters:
            (matrices if parameter.ndim > 1 else rest).append(parameter)
        groups = [{"params": matrices, "lr": 0.5}, {"params": rest, "lr": 0.25, "weight_decay": 0.5}]
        return SGD(groups, momentum=0.9, weight_decay=0.125)

    model, checkpoint = filled(Net(), "truth"), opened(tmp_path)
    truth = everything(model, optimizer := stepped(model, momentum)) | {"groups": 0}
    checkpoint.save(model, optimizer, to())
    turned = Net()
    groups = [{"params": group["params"][::-1]} for group in momentum(turned.parameters()).param_groups[::-1]]
    optimizer = SGD(groups, momentum=0.1)
    assert not checkpoint.load(turned, optimizer, at()).warnings
    assert identical(everything(turned, optimizer) | {"groups": 0}, truth)
    options = [(group["lr"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups]
    assert options == [(0.25, 0.5, 0.9), (0.5, 0.125, 0.9)]


def test_options_of_groups_without_parameters_come_back_by_their_order_among_those(tmp_path):
    def start(**rates):
        """A model and an optimizer of each name, with a group without parameters for each rate."""
        models, optimizers = {name: nn.Linear(2, 2) for name in rates}, {}
        for name, mine in rates.items():
            groups = [{"params": [] if lr else models[name].parameters(), "lr": lr or 0.2} for lr in mine]
            optimizers[name] = SGD(groups)
        return models, optimizers

    checkpoint = opened(tmp_path)
    checkpoint.save(*start(a=[0.05, None, 0.07], b=[0.3, None]), to())
    for a, found, warned in (([None, 0.9, 0.8], [0.2, 0.05, 0.07], 0), ([0.9, None], [0.9, 0.2], 1)):
        models, optimizers = start(b=[0.7, None], a=a)
        warnings = checkpoint.load(models, optimizers, at()).warnings
        assert ["optimizer a: 2 group(s)" in warning for warning in warnings] == [True] * warned
        rates = {name: [group["lr"] for group in o.param_groups] for name, o in optimizers.items()}
        assert rates == {"a": found, "b": [0.3, 0.2]}, "which of two has gone, nobody can tell"


class Undeclared:
    """An AdamW as a wrapper may show it, without its `defaults`."""

    def __init__(self, parameters, **options):
        self.inner = ADAMW(parameters, **options)

    def __getattr__(self, name):
        return getattr(self.inner, "missing" if name == "defaults" else name)


KINDS = [(ADAMW, SGD), (SGD, ADAMW), (ADAM, ADAMW), (RADAM, ADAM), (Undeclared, ADAMW), (ADAMW, Undeclared)]


@for_each(strict=[True, False], kinds=KINDS)
def test_another_kind_of_optimizer_is_refused_or_left_as_it_is_whatever_its_name(tmp_path, kinds, strict):
    def start(salt, kind, name, rate):
        models = {part: filled(nn.Linear(3, 2), salt) for part in "ab"}
        return models, {name: stepped(models["a"], kind, lr=rate), "b": stepped(models["b"], lr=rate)}

    def states(models, optimizers):
        return [copy.deepcopy(part.state_dict()) for part in (*models.values(), *optimizers.values())]

    checkpoint, differ = opened(tmp_path), SGD in kinds
    saved, mine = start("truth", kinds[0], "a", 0.5), start("mine", kinds[1], "renamed", 0.125)
    saved[1]["a"].param_groups[0]["initial_lr"] = 0.5  # as a scheduler adds it
    checkpoint.save(*saved, to())
    before, load = states(*mine), functools.partial(checkpoint.load, *mine, at(strict_mode=strict))
    if differ and strict:
        assert "initial_lr" not in refusal(load, "VALIDATION_FAILED", "betas", "momentum")
        assert identical(states(*mine), before)
        return
    warnings = load().warnings
    assert [("betas" in w, "momentum" in w) for w in warnings] == [(True, True)] * differ
    found, expected = states(*mine), states(*saved)
    if differ:
        expected[2] = before[2]
    for state in () if differ else (found, expected):  # the one here may have further options
        state[2] = state[2]["state"], state[2]["param_groups"][0]["lr"]
    assert identical(found, expected)
    mine[0]["a"].weight.grad = torch.ones(2, 3)
    mine[1]["renamed"].step()


@pytest.mark.parametrize("strict", [True, False])
def test_optimizer_state_of_another_shape_is_always_an_error_that_names_both(tmp_path, strict):
    (model, other), checkpoint = (
        (filled(nn.Linear(3, 2), salt) for salt in ("truth", "mine")),
        opened(tmp_path),
    )
    optimizer, mine = (stepped(m, SGD, lr=0.5, momentum=0.9) for m in (model, other))
    checkpoint.save(model, optimizer, to())
    mine.state[other.weight]["momentum_buffer"] = torch.ones(6)
    before, words = (
        state_of(other, mine),
        "optimizer/weight/momentum_buffer: shape [2, 3] in the checkpoint, [6]",
    )
    refusal(lambda: checkpoint.load(other, mine, at(strict_mode=strict)), "VALIDATION_FAILED", words)
    assert identical(state_of(other, mine), before)


JOBS = {
    "adafactor": torch.optim.Adafactor,
    "momentum": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
    "rmsprop": lambda params: torch.optim.RMSprop(params, centered=True),
    "amsgrad": lambda params: ADAMW(params, amsgrad=True),
    "sgd without state": SGD,
    "two of one model": lambda params: {"muon": torch.optim.Muon(params[::2]), "adamw": ADAMW(params[1::2])},
    # Of a parameter that is not in the model the state alone is stored: so that must not change.
    "outside": lambda p: ADAMW([{"params": p}, {"params": [nn.Parameter(torch.ones(4))], "lr": 0.0}]),
    "pipeline": ADAMW,
}


def start_job(kind, rank, world_size):
    """Layers of different shapes, under their names in the whole model: all, or half in a pipeline."""
    split = kind == "pipeline" and world_size > 1
    layers = range(2 * rank, 2 * rank + 2) if split else range(4)
    model = filled(nn.ModuleDict({str(n): nn.Linear(3 + n, 4 + n) for n in layers}), "start")
    optimizer = JOBS[kind](list(model.parameters()))
    return model if split or world_size == 1 else DistributedDataParallel(model), optimizer


def train_job(model, optimizer, steps):
    """The state of a job after some more steps."""
    optimizers = list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]
    parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]

    def closure():
        for parameter in parameters:
            parameter.grad = (3 * parameter.detach()).cos()
        return sum((3 * parameter.detach()).sin().sum() for parameter in parameters)

    for each in optimizers * steps:
        each.step(closure)
    return model.state_dict(), [each.state_dict() for each in optimizers]


@pytest.mark.parametrize("kind", JOBS)
@on_ranks(2)
def test_any_optimizer_continues_from_a_checkpoint_as_if_it_had_not_stopped(rank, tmp_path, kind):
    """Saved by one rank, and by two; continued by one, and by two, at once and two steps later."""
    jobs = {1: opened(tmp_path, ckpt.LocalCoordinator()), 2: opened(tmp_path)}
    if rank == 1:
        del jobs[1]
    for size, checkpoint in jobs.items():
        said, job = overheard(checkpoint), start_job(kind, rank, size)
        train_job(*job, 3)
        checkpoint.save(*job, to(f"of-{size}"))
        assert rank == 1 or ("position" in "".join(said)) == (kind == "outside")
    dist.barrier()
    for (size, checkpoint), saved in itertools.product(jobs.items(), (1, 2)):
        never_stopped, loaded = (start_job(kind, rank, size) for _ in "12")
        train_job(*never_stopped, 3)
        checkpoint.load(*loaded, at(f"of-{saved}"))
        for steps in (0, 2):
            states = train_job(*never_stopped, steps), train_job(*loaded, steps)
            assert identical(*states), (size, saved, steps)


class Tenths(nn.Module):
    """Divides what versions before 2 have stored; its attributes have the names that wrappers use."""

    _version = 2

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.versions = nn.Parameter(torch.full((4, 3), value)), []
        self.module, self._orig_mod = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self._checkpoint_wrapped_module = nn.ModuleDict({"inner": nn.Linear(3, 3)})

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.versions.append(metadata.get("version"))
        if (self.versions[-1] or 1) < 2:
            state[prefix + "value"] = state[prefix + "value"] / 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)


# Wrappers, innermost first: of the children of a module, or of the model itself.
CHILDREN, LAYERS, MODEL = "0._checkpoint_wrapped_module", "", None
BOTH = [(LAYERS, checkpoint_wrapper), (LAYERS, torch.compile)]
WRAPPINGS = {
    "layers in ddp": [(LAYERS, DistributedDataParallel), (MODEL, nn.DataParallel)],
    "checkpoint of compile": [*BOTH[::-1], (MODEL, torch.compile)],
    "compile of checkpoint": [*BOTH, (MODEL, DistributedDataParallel)],
    "two checkpoints": [(LAYERS, checkpoint_wrapper), (LAYERS, offload_wrapper), (MODEL, checkpoint_wrapper)],
    "compiled children": [(CHILDREN, torch.compile), ("0", torch.compile), (LAYERS, checkpoint_wrapper)],
    "children": [(CHILDREN, checkpoint_wrapper), ("0", checkpoint_wrapper), (LAYERS, nn.DataParallel)],
    "fsdp2": [*BOTH, (MODEL, fully_shard)],
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@on_ranks(1)
def test_names_and_module_versions_do_not_depend_on_wrappers_at_any_depth(rank, tmp_path, wrapping):
    def start(salt, wrappers):
        tenths = Tenths()
        model = filled(nn.Sequential(tenths, nn.Linear(3, 2)), salt)
        for name, wrapper in wrappers:
            parent = nn.ModuleDict({"model": model}) if name is MODEL else model.get_submodule(name)
            for key, child in list(parent.named_children()):
                setattr(parent, key, wrapper(child))
            model = parent.model if name is MODEL else model
        return tenths, model, stepped(model, lr=0.1 + bool(wrappers))

    def values(*job):
        return [whole(value) for value in everything(*job).values() if isinstance(value, torch.Tensor)]

    names, checkpoint, rows = {}, opened(tmp_path), WRAPPINGS[wrapping]
    for prefix, saved_in, loaded_in in (("wrapped", rows, []), ("plain", [], rows)):
        _, *saved = start("truth", saved_in)
        tenths, *loaded = start("other", loaded_in)
        checkpoint.save(*saved, to(prefix))
        names[prefix] = {tensor.name for tensor in checkpoint.load(*loaded, at(prefix)).metadata.tensors}
        assert tenths.versions == [2] and values(*loaded) == values(*saved)
    assert names["wrapped"] == names["plain"] > {"model/0.module.weight", "model/0._orig_mod.bias"}
    assert "model/0._checkpoint_wrapped_module.inner.bias" in names["plain"]


def test_two_entries_that_have_one_name_without_wrappers_are_an_error(tmp_path):
    model, checkpoint = nn.Sequential(nn.DataParallel(nn.Linear(3, 2))), opened(tmp_path)
    model[0].weight = nn.Parameter(torch.zeros(3))
    checkpoint.save(Bag(**{"0.weight": torch.zeros(3), "0.bias": torch.zeros(2)}), None, to())
    for call in (lambda: checkpoint.save(model, None, to("q")), lambda: checkpoint.load(model, None, at())):
        assert "'0.weight'" in refusal(call)


@on_ranks(2)
def test_a_module_is_handed_the_version_that_was_saved_else_its_own(rank, tmp_path):
    stage, checkpoint = Tenths(5.0), opened(tmp_path, ckpt.LocalCoordinator())
    stage._version = 2 - rank
    opened(tmp_path).save(nn.ModuleDict({("now", "before")[rank]: stage}), None, to("stages"))
    if rank == 1:
        return
    saved = {"now": Tenths(5.0), "before": Tenths(5.0)}
    saved["before"]._version = 1
    together = nn.ModuleDict(saved)
    state = together.state_dict()
    checkpoint.save(saved, None, to("mapping"))
    checkpoint.save(together, None, to("one"), extra_state={"module": together, "nested": [state]})
    checkpoint.save(Bag(**state), None, to("imported"))
    for prefix in ("mapping", "one", "stages", "imported", "extra state"):
        live = {"now": Tenths(), "before": Tenths()}
        if prefix == "extra state":
            extra = {"module": nn.ModuleDict(live)}
            result = checkpoint.load(Bag(), None, at("one", strict_mode=False), extra_state=extra)
            assert result.extra_state["nested"][0]._metadata == state._metadata
        else:
            checkpoint.load(nn.ModuleDict(live) if prefix == "mapping" else live, None, at(prefix))
        values = [module.value.unique().item() for module in live.values()]
        assert values == [5.0, 5.0 if prefix == "imported" else 0.5], prefix


def test_load_state_dict_is_handed_the_metadata_that_torch_load_would_hand_it(tmp_path):
    class Handed(nn.ModuleDict):
        def load_state_dict(self, state, strict=True):
            self.metadata = dict(state._metadata)
            return super().load_state_dict(state, strict)

    saved, checkpoint = nn.ModuleDict({"a": Tenths(), "gone": nn.Linear(1, 1)}), opened(tmp_path)
    saved["a"]._orig_mod._version = None
    saved["a"].module.register_state_dict_post_hook(lambda *args: args[3].update(scheme=["int8", 4]))
    checkpoint.save(saved, None, to())
    torch.save(saved.state_dict(), tmp_path / "theirs")
    ours, theirs = (Handed({"a": Tenths(), "added": nn.BatchNorm1d(2)}) for _ in "12")
    checkpoint.load(ours, None, at(strict_mode=False))
    theirs.load_state_dict(torch.load(tmp_path / "theirs"), strict=False)
    assert theirs.metadata.pop("gone") == {"version": 1}
    assert ours.metadata == theirs.metadata and ours.metadata["a._orig_mod"] == {"version": None}
    assert ours.metadata["a.module"] == {"version": 1, "scheme": ["int8", 4]} and "added" not in ours.metadata


def not_cached(op):
    """Nothing is in the page cache."""
    if op.call == "is_cold":
        raise OSError(errno.EAGAIN, "not in the page cache")


def is_in_memory(path):
    """Drop a file from the page cache; whether the kernel keeps pages of it nevertheless, as tmpfs does."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    view = np.memmap(path, np.uint8, mode="r")
    there = np.zeros(math.ceil(view.size / PAGE), np.uint8)
    address, length, pages = map(ctypes.c_void_p, (view.ctypes.data, view.size, there.ctypes.data))
    assert ctypes.CDLL(None).mincore(address, length, pages) == 0
    return bool((there & 1).any())


PAST = [("cold", 1, "none"), ("dropped", 1, "none"), ("rows", 2, "none"), ("rows", 2, "fast")]
THROUGH = [("in the cache", 1, "none"), ("cold", 2, "none"), ("columns", 2, "none"), ("columns", 2, "fast")]


@pytest.mark.parametrize("layout, size, level", PAST + THROUGH)
@on_ranks("size")
def test_a_cold_file_is_read_past_the_cache_if_no_other_rank_wants_it(rank, tmp_path, layout, size, level):
    """Saved by rows, loaded by rows or columns: of columns each rank wants half of what it reads."""
    model = filled(nn.Linear(2048, 3072, bias=False), "truth")
    truth = raw(model.weight)
    if layout in ("rows", "columns"):
        fully_shard(model)
    opened(tmp_path).save(model, None, to(compression_level=level))
    if layout == "columns":
        mesh = init_device_mesh("cpu", (size,))
        model = Bag(weight=distribute_tensor(torch.zeros(3072, 2048), mesh, [ShardDim(1)]))
    cached = layout == "in the cache" and all(path.read_bytes() for path in shards(tmp_path))
    if layout == "dropped" and any(map(is_in_memory, shards(tmp_path))):
        return  # the files stay in memory here
    files = Seam() if cached or layout == "dropped" else Seam(not_cached)
    ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files)).load(model, None, at())
    assert any(op.call == "open_direct" for op in files.log) == ((layout, size, level) in PAST)
    assert whole(model.state_dict()["weight"]) == truth


@for_each(columns=[1024, 512])
@pytest.mark.parametrize(
    "low, high", [(0, 64), (128, 1024), (0, 65), (100, 101), (127, 129), (60, 1000), (200, 201)]
)
def test_a_partial_read_copies_no_damaged_unit_and_one_run_at_once(tmp_path, monkeypatch, low, high, columns):
    weight = torch.arange(1024 * 1024.0).view(1024, 1024)  # 64 rows a unit
    opened(tmp_path).save(Bag(weight=weight), None, to(include_rng_state=False))
    (path,), storage, copied, copy_in = shards(tmp_path), ckpt.LocalStorage(tmp_path), [], st.copy_in
    flip(path, Shard(path).place("model/weight")[0] + 100 * 4096)  # in the second unit
    monkeypatch.setattr(st, "copy_in", lambda *words: copied.append(copy_in(*words)))
    box, view = st.Box((low, 0), (high - low, columns)), torch.full((high - low, columns), -1.0)
    with ckpt.CheckpointReader(storage, st.read_committed(storage, "p")) as reader:
        target = coord.Target(reader.find("model/weight", 0), box, view)
        kind, _, message = outcome_of(lambda: reader.fill([target]))
    if high <= 64 or low >= 128:
        assert kind == "returned" and torch.equal(view, weight[low:high, :columns])
        assert bool(copied) == (columns < 1024 and high - low > 1)
    else:
        assert kind == "CORRUPTED_CHECKPOINT" and "unit 1 has CRC32" in message and "model/weight" in message
        assert (view[max(0, 64 - low) : 128 - low] == -1.0).all(), "not one element of that unit"


@pytest.mark.skipif("mesh" not in vars(DeviceMesh), reason="this torch keeps the table of a mesh")
@on_ranks(2)
def test_the_ranks_of_a_mesh_are_listed_once_for_all_its_tensors(rank, tmp_path):
    mesh, listed, real = init_device_mesh("cpu", (2,)), [], DeviceMesh.mesh
    state = {f"w{n}": distribute_tensor(torch.ones(4), mesh, [ShardDim(0)]) for n in range(50)}
    DeviceMesh.mesh = property(lambda mesh: listed.append(mesh) or real.fget(mesh))
    opened(tmp_path).save(state, None, to())
    opened(tmp_path).load(state, None, at())
    assert 0 < len(listed) < 10, len(listed)


@isolated()
def test_a_load_leaves_half_of_the_file_descriptors_to_files_that_are_not_open_yet(tmp_path):
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    file = Storage(tmp_path, Seam()).create("file")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * free,) * 2)
    file.write(0, aligned(2 * MiB).data)
    with open(tmp_path / "file", "rb") as other:
        assert other.fileno() == free + 1, "nothing else is open"
    assert (tmp_path / "file").stat().st_size == 2 * MiB


@for_each(past=[False, True], cap=[1 << 40, 3 * PAGE, 5000])
def test_a_read_gives_the_same_bytes_past_the_cache_or_not_however_short_its_parts(tmp_path, past, cap):
    data = np.random.default_rng(1).integers(0, 256, PAGE + 4 * MiB, np.uint8)
    (tmp_path / "file").write_bytes(data)
    with contextlib.closing(Storage(tmp_path, Seam(not_cached, cap=cap)).open("file")) as file:
        read = file.read_directly if past else file.read
        for length, start in itertools.product((MiB, 3 * MiB + 5, 4 * MiB), (0, 1)):
            into = aligned(length + 1)[start:][:length]
            read(PAGE, into.data)
            assert np.array_equal(into, data[PAGE : PAGE + length]), (length, start)
        for offset, length in ((2 * PAGE, 4 * MiB), (PAGE, MiB), (2 * MiB, MiB)):
            refusal(lambda: read(offset, aligned(length).data), None, "bytes missing")
            os.truncate(tmp_path / "file", MiB)  # while it is open


def test_a_fork_finds_zeros_in_the_memory_for_io_not_its_parents_bytes():
    memory = st.aligned_buffer(3 * MiB)
    memory[:] = 7
    assert memory.ctypes.data % PAGE == 0 and forked(lambda: memory.any() and 1 / 0) == 0
    assert (memory == 7).all()


@pytest.mark.parametrize("form", FORMATS)
@on_ranks(3)
def test_of_copies_that_are_declared_or_trusted_to_be_equal_one_is_kept(rank, tmp_path, form):
    def bag(value):
        mesh, values = init_device_mesh("cpu", (3,)), [torch.full((400_000,), value) for _ in "12"]
        return Bag(declared=DTensor.from_local(values[0], mesh, [Replicate()]), plain=values[1])

    checkpoint, each = opened(tmp_path), {}
    said = overheard(checkpoint)
    for replicas in ("verify", "trust"):
        found = bag(-1.0)
        checkpoint.save(bag(float(rank)), None, to(format=form, replicas=replicas))
        checkpoint.load(found, None, at())
        each[replicas] = gathered([local_part(part).unique().tolist() for part in found.state.values()])
    assert each["verify"] == [[[0.0], [float(n)]] for n in range(3)], "the lowest rank's; each its own"
    assert each["trust"] == [each["trust"][0]] * 3 and sum(map(len, each["trust"][0])) == 2
    assert rank or re.search(r"model/declared.*\brank\D*[012]\b", "\n".join(said))


# What ranks 0 and 1, and ranks 2 and 3, hold of one tensor: ranks of a mesh, placement, value. Then the ranks
# that its copies are kept for, or what the error says.
LOW, HIGH, ALL, SHARDED, COPIES = (0, 1), (2, 3), (0, 1, 2, 3), ShardDim(0), Replicate()
MESHES = {
    "sharded, equal": ((LOW, SHARDED, 1.0), (HIGH, SHARDED, 1.0), [None]),
    "sharded, different": ((LOW, SHARDED, 0.0), (HIGH, SHARDED, 1.0), [0, 2]),
    "replicated, equal": ((LOW, COPIES, 1.0), (HIGH, COPIES, 1.0), [None]),
    "replicated, different": ((LOW, COPIES, 0.0), (HIGH, COPIES, 1.0), [0, 2]),
    "cut differently, equal": ((LOW, SHARDED, 1.0), (HIGH, COPIES, 1.0), [0, 2]),
    "other order of ranks": ((ALL, COPIES, 1.0), (ALL[::-1], COPIES, 1.0), [None]),
    "overlapping": (((0, 1, 2), COPIES, 1.0), (HIGH, COPIES, 1.0), r"\[0, 1, 2\].*\[2, 3\]"),
    "plain beside": ((LOW, COPIES, 1.0), (None, None, 1.0), r"plain.* 2, 3 .*DTensor"),
}


@pytest.mark.parametrize("form", FORMATS)
@on_ranks(4)
def test_a_name_on_disjoint_meshes_is_one_tensor_if_equal_else_each_gets_its_own_back(rank, tmp_path, form):
    groups = (LOW, HIGH, (0, 1, 2), ALL, ALL[::-1])
    meshes = {ranks: DeviceMesh("cpu", torch.tensor(ranks)) for ranks in groups}

    def laid(ranks, placement, value):
        tensor = torch.full((6, 3), value) + torch.arange(6).view(6, 1)
        if ranks:
            tensor = distribute_tensor(tensor, meshes[ranks], [placement], src_data_rank=None)
        return {"w": tensor}

    for case, (*sides, expected) in MESHES.items():
        *layout, value = sides[rank // 2]
        checkpoint, truth, model = opened(tmp_path), laid(*layout, value), laid(*layout, -1.0)
        said = overheard(checkpoint)  # it warns once of a name
        answer = outcome_of(lambda: checkpoint.save(truth, None, to(format=form)))
        if isinstance(expected, str):
            kind, _, message = answer
            assert kind == "VALIDATION_FAILED" and "model/w" in message and re.search(expected, message), case
            assert gathered(answer) == [answer] * 4, "one error on all ranks"
            continue
        warned = "model/w" in "".join(said)
        result = checkpoint.load(model, None, at())
        kept = [tensor.rank for tensor in result.metadata.tensors if tensor.name == "model/w"]
        assert kept == expected and identical(model, truth) and not result.warnings, (case, kept)
        assert warned == (len(expected) == 2 and rank == 0), case


@pytest.mark.parametrize("counted", ["by AdamW", None, "int", "numpy", "replicated"])
@on_ranks(2)
def test_ranks_at_different_optimizer_steps_cannot_save(rank, tmp_path, counted):
    """Rank 1 has made one step less; at last both are level. One layer is sharded."""
    mesh, model, checkpoint = init_device_mesh("cpu", (2,)), small()[0], opened(tmp_path)
    fully_shard(model[1], mesh=mesh)
    counts = {"int": int, "numpy": np.int64}
    counts["replicated"] = lambda steps: DTensor.from_local(torch.tensor(steps), mesh, run_check=False)
    for steps, replicas in ((2 - rank, "verify"), (2 - rank, "trust"), (2, "verify")):
        optimizer = stepped(model, ADAMW if counted == "by AdamW" else SGD, steps=steps, lr=0.0)
        for parameter in model.parameters() if counted in counts else ():
            optimizer.state[parameter]["step"] = counts[counted](float(steps))
        kind, _, message = outcome_of(lambda: checkpoint.save(model, optimizer, to(replicas=replicas)))
        if gathered(steps) == [2, 1] and counted:
            words = "different optimizer steps", "0.weight", "1.weight"
            assert kind == "SAVE_FAILED" and all(word in message for word in words), (kind, message)
        else:  # of SGD without a count nothing tells
            assert kind == "returned", message


def per_rank_job(rank):
    """A model, optimizers and extra state that contain the number of a rank, but for the parameter `same`."""
    expert = nn.Parameter(torch.full((2, 2), 20.0 + rank))
    params = nn.ParameterDict({"same": nn.Parameter(torch.ones(3)), "expert": expert})
    adamw = ADAMW(params.parameters(), lr=10.0 + rank)
    for number, slot in enumerate(("exp_avg", "exp_avg_sq", "step")):  # an expert may be at a step of its own
        shape = () if slot == "step" else (2, 2)
        adamw.state[expert][slot] = torch.full(shape, 30.0 + 10 * number + rank)
    # A value; a value with a tensor in it; a value that all ranks have alike, with a tensor that differs.
    seen, state = torch.full((2, 1), 60.0 + rank), torch.full((3,), 70 + rank, dtype=torch.bfloat16)
    extra = {"place": rank, "loader": Bag(at=[rank, 5], seen=seen), "sampler": Bag(state=state)}
    torch.manual_seed(80 + rank)
    config, other = Bag(value=60.0 + rank), Bag(value=70.0 + rank)
    return {"net": params, "config": config}, {"adamw": adamw, "other": other}, extra


def plain_values(extra):
    return {key: value.state if isinstance(value, Bag) else value for key, value in extra.items()}


def save_per_rank(rank, world_size, tmp, options):
    (model, optimizer, extra), checkpoint = per_rank_job(rank), opened(tmp)
    said = overheard(checkpoint)
    for _ in range(2):
        checkpoint.save(model, optimizer, options, extra_state={**extra, "epoch": 7})
    return "\n".join(said)


def load_per_rank(rank, world_size, tmp, saved, strategy):
    """Check all but the numbers in model and optimizer, and the warnings: return those."""
    known, sizes = rank < saved, (saved, world_size, saved != world_size)
    *_, own = per_rank_job(rank)
    copies = {number: plain_values(per_rank_job(number)[2]) for number in range(saved)}
    model, optimizer, extra = per_rank_job(-1 - rank)  # which seeds torch too
    drawn = torch.Generator().manual_seed(80 + rank if known else 79 - rank)
    before, options = plain_values(extra), at(resharding_strategy=strategy)
    result = opened(tmp).load(model, optimizer, options, extra_state=extra)
    assert torch.equal(torch.get_rng_state(), drawn.get_state())
    assert (result.source_world_size, result.target_world_size, result.was_resharded) == sizes
    own = plain_values(own) if known else {}
    assert identical(result.extra_state, own | {"epoch": 7})
    assert identical(plain_values(extra) | {"place": rank}, before | own | {"place": rank})
    copies = {key: {number: copy[key] for number, copy in copies.items()} for key in extra if sizes[-1]}
    assert identical(dict(result.extra_state_per_rank), copies)
    group, slots = optimizer["adamw"].param_groups[0], optimizer["adamw"].state[model["net"]["expert"]]
    numbers = [tensor.unique().item() for tensor in (model["net"]["expert"], *slots.values())]
    values = [part.state["value"] for part in (model["config"], optimizer["other"])]
    return [group["lr"], *numbers, *values], "\n".join(result.warnings)


PER_RANK = ["model/net.expert", "model-values/config.value"]
PER_RANK += [f"optimizer/net.expert/{slot}" for slot in ("exp_avg", "exp_avg_sq", "step")]
VALUES_PER_RANK = ["extra/place", "extra/loader", "extra/sampler", "rng/state"]
MOVES = [(2, 3, "multi_shard", "none", "parallel"), (3, 2, "single_file", "none", "broadcast")]
MOVES += [(2, 1, "consolidated", "none", "parallel"), (2, 2, "multi_shard", "fast", "sequential")]


@pytest.mark.parametrize("saved, here, form, level, how", MOVES)
def test_what_is_kept_per_rank_goes_to_it_or_from_rank_0_or_is_named(tmp_path, saved, here, form, level, how):
    log, *_ = run(saved, save_per_rank, tmp_path, to(format=form, compression_level=level))
    for name in (*PER_RANK, "extra/place", "extra/loader", "extra/loader.seen", "extra/sampler.state"):
        assert len(re.findall(re.escape(name) + r"(?![\w.])", log)) == 1, (name, log)
    assert not re.search("rng|optimizer/state|epoch|same", log)
    lent, lost = (*PER_RANK, "optimizer/other", "optimizer/net.expert,"), (*PER_RANK, *VALUES_PER_RANK)
    for rank, (numbers, text) in enumerate(run(here, load_per_rank, tmp_path, saved, how)):
        new, fewer = rank >= saved, here < saved
        assert numbers == [number + (0.0 if new else rank) for number in range(10, 80, 10)]
        patterns = {f"rank 0's copy.*{re.escape(name)}": new for name in lent}
        patterns |= {f"{name}: kept for": new for name in VALUES_PER_RANK}
        patterns |= {f"{here}, and taken by no rank here.*{re.escape(name)}": fewer for name in lost}
        assert {pattern: bool(re.search(pattern, text)) for pattern in patterns} == patterns, text
        assert bool(text) == (new or fewer), text


def test_a_mapping_of_names_to_tensors_is_filled_in_place_and_its_optimizers_go_by_them(tmp_path):
    def start(scale):
        """Tensors under the names of `nn.Linear(6, 4)`, with an optimizer for each."""
        tensors = {"weight": scale * torch.arange(24.0).reshape(4, 6), "bias": torch.full((4,), scale)}
        optimizers = [ADAMW([tensor.requires_grad_()], lr=tensor.ndim / 10) for tensor in tensors.values()]
        for tensor, optimizer in zip(tensors.values(), optimizers):
            tensor.grad = torch.full_like(tensor, scale * tensor.ndim)
            optimizer.step()
        return tensors, optimizers

    (tensors, optimizers), (truth, true_optimizers), checkpoint = start(5.0), start(2.0), opened(tmp_path)
    checkpoint.save(truth, true_optimizers, to())
    result = checkpoint.load(types.MappingProxyType(tensors), tuple(optimizers[::-1]), at())
    assert identical(tensors, truth) and not result.warnings
    assert identical(*([o.state_dict() for o in mine] for mine in (optimizers, true_optimizers)))
    linear = nn.Linear(6, 4)  # and a module may go on from it, with one optimizer for all
    optimizer = ADAMW(linear.parameters(), lr=0.5)
    (warning,) = checkpoint.load(linear, optimizer, at()).warnings
    assert "different 'lr'" in warning and optimizer.param_groups[0]["lr"] == 0.5
    assert identical(dict(linear.state_dict()), {name: tensor.detach() for name, tensor in truth.items()})
    assert identical(optimizer.state[linear.bias], true_optimizers[1].state[truth["bias"]])


@on_ranks(2)
def test_a_zero_redundancy_optimizer_is_refused_with_a_way_that_works(rank, tmp_path):
    def trained(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = (3 * parameter.detach()).cos()
        optimizer.step()
        return [raw(parameter) for parameter in model.parameters()]

    (model, other), checkpoint = (DistributedDataParallel(small()[0]) for _ in "12"), opened(tmp_path)
    optimizer, fresh = (
        ZeroRedundancyOptimizer(part.parameters(), ADAMW, lr=lr)
        for part, lr in ((model, 0.125), (other, 0.5))
    )
    trained(model, optimizer)
    message = refusal(
        lambda: checkpoint.save(model, optimizer, to()), "SAVE_FAILED", "`optim`", "fully_shard"
    )
    assert "consolidate" not in message, "which torch itself names, and it would not help"
    checkpoint.save(model, optimizer.optim, to())
    refusal(lambda: checkpoint.load(other, fresh, at()), "LOAD_FAILED", "`optim`")
    checkpoint.load(other, fresh.optim, at())
    for group, own in zip(fresh.param_groups, fresh.optim.param_groups):
        group.update({**own, "params": group["params"]})
    alone = small()[0]
    whole_optimizer = ADAMW(alone.parameters(), lr=0.5)
    opened(tmp_path, ckpt.LocalCoordinator()).load(alone, whole_optimizer, at())
    assert trained(model, optimizer) == trained(other, fresh) == trained(alone, whole_optimizer)


# ---- bad input: refused clearly, and nothing changes -------------------------------------------------------

MODULE, ONES = nn.Linear(1, 1), torch.ones(2)
BAD_PREFIXES = ["", "/abs", "..", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "a b", "a\\b", "a\0b", "ü"]
BAD_PREFIXES += ["a" * 201, "a.metadata.json", "a.metadata.json/b", "a\n"]
MISUSES = [  # model, optimizer, options, and words of the message
    *((MODULE, None, options(prefix), "prefix") for prefix in BAD_PREFIXES for options in (to, at)),
    (MODULE, None, to(format="ZIP"), "format 'multi_shard' 'single_file' 'consolidated'"),
    (MODULE, None, to(compression_level="ULTRA"), "compression_level 'none' 'fast' 'balanced' 'maximum'"),
    (MODULE, None, to(staging="lazy"), "staging eager overlapped"),
    (MODULE, None, to(replicas="hope"), "replicas verify trust"),
    (MODULE, None, to(timeout=-1.0), "timeout"),
    (MODULE, None, at(timeout=math.inf), "timeout"),
    (MODULE, None, to(progress=3), "progress function 3"),
    (MODULE, None, to(custom_metadata=[1]), "custom_metadata mapping [1]"),
    (MODULE, None, at(resharding_strategy="psychic"), "resharding_strategy parallel sequential broad"),
    (MODULE, None, LoadOptions(), "checkpoint_prefix"),
    ({"layer": MODULE, "w": ONES}, None, "p", "layer"),
    ({"w": ONES, "step": 3}, None, "p", "step"),
    ({7: ONES}, None, "p", "7"),
    ({"x._extra_state": ONES}, None, "p", "x._extra_state"),
    ([MODULE], None, "p", "list"),
    (ONES, None, "p", "Tensor"),
    (torch.optim.SGD([nn.Parameter(ONES)]), None, "p", "optimizer second"),
    (MODULE, [ONES], "p", "optimizer"),
    (MODULE, {"w": ONES}, "p", "'w'"),
    (MODULE, "step_1", "p", "'step_1' third"),  # a prefix goes there
]


@pytest.mark.parametrize("model, optimizer, options, words", MISUSES)
def test_a_misuse_is_a_value_error_that_says_what_is_allowed(tmp_path, model, optimizer, options, words):
    checkpoint = opened(tmp_path / "inner" / "base")
    calls = [checkpoint.load, checkpoint.save, lambda *a, **k: checkpoint.save_async(*a, **k).result(20.0)]
    for call in {LoadOptions: calls[:1], SaveOptions: calls[1:]}.get(type(options), calls):
        refusal(lambda: call(model, optimizer, options), ValueError, *words.split())
        refusal(lambda: call(MODULE, None, "p", cancel=True), ValueError, "cancel", "True")
        refusal(lambda: call(MODULE, None, "p", extra_state=[1]), ValueError, "extra_state must be a mapping")
    for prefix in BAD_PREFIXES:
        refusal(lambda: checkpoint.delete_checkpoint(prefix), ValueError, "prefix")
        refusal(lambda: checkpoint.validate_checkpoint(prefix), ValueError, "prefix")
    concurrent.futures.wait([checkpoint.save_async(MODULE, None, "/")], HANG_S)
    refusal(lambda: checkpoint.save(MODULE, None, "p"), "SAVE_FAILED", "in the background", "prefix")
    assert listing(tmp_path) == {}


def test_all_names_that_do_not_fit_are_counted_and_the_first_twenty_listed(checkpoint):
    checkpoint.save(Bag(**{f"old{i}": torch.ones(1) for i in range(30)}, both=ONES), None, to())
    target, said = Bag(new=torch.zeros(1), both=torch.zeros(2)), overheard(checkpoint)
    words = "new", "old0", "31 problem", "11 more"
    refusal(lambda: checkpoint.load(target, None, at()), "VALIDATION_FAILED", *words)
    text = " ".join(checkpoint.load(target, None, at(strict_mode=False)).warnings)
    assert all(name in text for name in ("new", "old0", "old29"))
    assert len(said) == 21 and said[-1] == "p: and 11 more warnings"
    assert target.state["both"].all() and not target.state["new"].any()


@pytest.mark.parametrize("source", ["a checkpoint", "safetensors"])
def test_what_does_not_fit_changes_nothing_or_if_not_strict_is_cast_with_a_warning(tmp_path, source):
    state, w, b = {"w": torch.randn(3, 5), "net.b": torch.arange(4)}, torch.zeros(3, 5), torch.zeros(4).long()
    opened(tmp_path).save(state, None, to())
    foreign = as_file(tmp_path, state)

    def load(model, strict=True):
        if source == "safetensors":
            return ckpt.load_safetensors(model, foreign, strict=strict)
        return opened(tmp_path).load(model, None, at(strict_mode=strict))

    for words, model, *strict in (
        ("model/x: missing", {"w": w, "net.b": b, "x": torch.zeros(1)}),
        ("model/net.b: in the checkpoint, but not here", {"w": w}),
        ("names differ by a first part", {"w": w, "b": b}),
        ("names differ by a first part", {"net.w": w, "net.b": b}),
        ("model/w: dtype F32 in the checkpoint, BF16 here; cast if not", {"w": w.bfloat16(), "net.b": b}),
        ("model/w: shape [3, 5] in the checkpoint, [5, 3] here", {"w": w.reshape(5, 3), "net.b": b}),
        ("model/w: shape [3, 5] in the checkpoint, [5, 3] here", {"w": w.reshape(5, 3), "net.b": b}, False),
    ):
        before = copy.deepcopy(model)
        message = refusal(lambda: load(model, *strict), "VALIDATION_FAILED", words)
        assert ("first part" in message) == ("first part" in words) and identical(model, before)
    loose = {"w": w.bfloat16(), "x": torch.ones(1)}
    warnings = " ".join(load(loose, strict=False).warnings)
    assert identical(loose, {"w": state["w"].bfloat16(), "x": torch.ones(1)})
    for words in ("model/x: missing", "model/net.b: in the", "model/w: dtype F32"):
        assert words in warnings


def test_an_optimizer_or_extra_state_that_the_checkpoint_lacks_is_named_and_if_not_strict_kept(checkpoint):
    (model, optimizer), own = small(), Bag(x=1)
    checkpoint.save(model, {"a": optimizer}, "p")
    load = functools.partial(checkpoint.load, model, {"a": optimizer, "b": own}, extra_state={"gone": 0})
    missing = "missing from the checkpoint"
    refusal(lambda: load("p"), "VALIDATION_FAILED", f"optimizer b: {missing}", f"extra/gone: {missing}")
    assert len(load(at(strict_mode=False)).warnings) == 2 and own.state == {"x": 1}


def test_an_optimizer_goes_on_after_a_load_into_another_dtype(checkpoint):
    model = nn.Linear(3, 5).bfloat16()
    checkpoint.save(truth := nn.Linear(3, 5), stepped(truth), to())
    checkpoint.load(model, optimizer := torch.optim.AdamW(model.parameters()), at(strict_mode=False))
    model(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()  # which needs state of the right dtypes


@pytest.mark.parametrize("version", [1, 99])
def test_another_version_is_refused_kept_by_gc_overwritten_and_deleted(tmp_path, checkpoint, version, caplog):
    def save_in_that_version():
        checkpoint.save(MODULE, None, "p")
        for path in shards(tmp_path):
            path.write_bytes(path.read_bytes().replace(b'"ckpt_version":"2"', b'"ckpt_version":"1"'))
        reseal(tmp_path / RECORD, lambda fields: fields.update(format_version=version))
        (tmp_path / "p" / f"{save_id(tmp_path)}.rest.safetensors").touch()
        return listing(tmp_path)

    before, load = save_in_that_version(), functools.partial(checkpoint.load, MODULE, None, "p")
    refusal(load, "INCOMPATIBLE_VERSION", f"version {version};", "version 2")
    assert checkpoint.list_checkpoints() == [] and "skipped p" in caplog.text
    refusal(lambda: checkpoint.save(MODULE, None, to(overwrite=False)), None, "overwrite")
    assert ckpt.collect_garbage(checkpoint.storage, 0.0) == [] and listing(tmp_path) == before
    checkpoint.save(MODULE, None, "p")
    after = set(listing(tmp_path))
    assert after == named_files(tmp_path) and after & set(before) == {RECORD}
    load()
    for crashed in (False, True):  # an earlier removal may have crashed after the record
        save_in_that_version()
        if crashed:
            (tmp_path / RECORD).unlink()
        checkpoint.delete_checkpoint("p")
        assert listing(tmp_path) == {}


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path, checkpoint):
    """Two that are whole, and one each with a damaged tensor, a damaged record, a missing file."""
    model, optimizer = small()
    checkpoint.save(model, optimizer, to("runs/one", custom_metadata={"epoch": 3}))
    for prefix in ("two", "torn", "lost", "bare"):
        checkpoint.save_model_only(model, to(prefix))
    flip(shards(tmp_path, "torn")[0], -1)
    flip(tmp_path / "lost.metadata.json", 30)
    shards(tmp_path, "bare")[0].unlink()
    return tmp_path


def command(capsys, *words):
    """The exit code and what was printed."""
    code = ckpt.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err, captured.out


COMMANDS = r"""
0 ls {}                                                 (?s)runs/one.*multi_shard.*two
0 show {} runs/one                                      (?m)^model/0\.weight +F32 +\[5, 3\] +1 +60 B$
0 show {} runs/one                                      (?s)torch_version +\d.*epoch.*1\.safetensors.*exp_avg
1 verify {}                                             (?s)^bare: DAM.*lost: DAM.*one: ok.*torn: DAM.*two: ok
0 verify {} two                                         two: ok
1 verify {} torn                                        torn: DAMAGED\n +torn/.*1\.safetensors: .*1\.weight
1 verify {} bare                                        bare: DAMAGED\n +bare/.*1\.safetensors: is missing
1 verify {} torn --json                                 ^{"torn": {"valid": false, "errors": \["torn/.*holds
1 show {} gone                                          gone
1 verify {} gone                                        gone
1 verify {}/runs/one                                    there are no checkpoints below it
0 ls {}/runs/one                                        there are no checkpoints below it
1 rm {} gone                                            gone
2 show {} ../x                                          \.\./x
2 import {} {} new                                      name one file; .* there: none
2 export {} ../x {}/m.safetensors                       \.\./x
2 export {} two {}/model.bin                            must end in \.safetensors
2 export {} two {}/m.safetensors --dtype int8           int8
2 export {} two {}/m.safetensors --max-shard-size big   'big' is no size
2 export {} two {}/m.safetensors --max-shard-size 0     at least 1, not 0
2 import {}/m.safetensors {}                            required: prefix
2 diff {} two                                           required: b
2 gc {} --min-age -1                                    --min-age must be at least 0
2 show {}/nowhere two                                   nowhere: no such directory
2 ls {}/nowhere                                         nowhere: no such directory
2                                                       required: command
"""


@pytest.mark.parametrize("line", COMMANDS.strip().splitlines())
def test_a_command_says_what_is_there_or_exits_1_or_2_and_why(checkpoints, line, capsys):
    wanted, *words = line[:56].format(*[checkpoints] * 2).split()
    before = listing(checkpoints)
    try:
        code = ckpt.main(words)
    except SystemExit as exit:
        code = exit.code
    said = "".join(capsys.readouterr())
    assert code == int(wanted) and re.search(line[56:], said), said
    assert not re.search("Traceback|\x1b", said) and listing(checkpoints) == before


def test_the_json_of_ls_and_show_is_as_documented(checkpoints, capsys):
    (path,) = shards(checkpoints, "runs/one")
    one, two, *_ = json.loads(command(capsys, "ls", checkpoints, "--json")[2])
    assert (one["prefix"], two["prefix"], one["world_size"]) == ("runs/one", "two", 1)
    assert one["size_bytes"] > two["size_bytes"] > 0
    shown = json.loads(command(capsys, "show", checkpoints, "runs/one", "--json")[2])
    keys = "prefix save_id sequence version timestamp world_size format compression torch_version size_bytes"
    assert list(shown) == [*keys.split(), "custom_metadata", "shards", "tensors"]
    assert shown["shards"] == [{"file": path.name, "bytes": path.stat().st_size}]
    (weight,) = [tensor for tensor in shown["tensors"] if tensor["name"] == "model/0.weight"]
    keys = ("name", "dtype", "shape", "rank", "pieces", "bytes", "tied_to")
    assert list(weight.items()) == list(zip(keys, ("model/0.weight", "F32", [5, 3], None, 1, 60, None)))
    assert all(f"`{key}`" in README for key in [*shown, *shown["shards"][0], *weight])


def test_gc_and_rm_remove_nothing_that_a_record_names_or_that_is_not_ours(checkpoints, capsys):
    orphan = "0badf00d-00000-of-00001.safetensors"
    for name in (f"two/{orphan}", "two/notes.txt", f"lost/{orphan}"):  # whose record gc cannot read
        (checkpoints / name).write_bytes(bytes(9999))  # as a save that crashed leaves it
    exported(capsys, checkpoints, "two", out="exports/20261126.safetensors")
    before = set(listing(checkpoints))
    for words, is_named in (((), True), (("--json",), False)):  # the second time there is nothing
        code, text, _ = command(capsys, "gc", checkpoints, *words)
        assert code == 0 and (orphan in text) == is_named
        assert before - set(listing(checkpoints)) == {f"two/{orphan}"}
    assert command(capsys, "rm", checkpoints, "two")[0] == 0
    assert {name for name in listing(checkpoints) if name.startswith("two")} == {"two/notes.txt"}


def test_python_ckpt_py_is_the_command_whose_reader_may_stop_early(checkpoints):
    words, pipe = (["verify", checkpoints], ["show", checkpoints, "runs/one"]), subprocess.PIPE
    lines = ([sys.executable, HERE / "ckpt.py", *arguments] for arguments in words)
    verify, show = (subprocess.Popen(line, stdout=pipe, stderr=pipe) for line in lines)
    show.stdout.close()
    assert (show.stderr.read(), show.wait(HANG_S)) == (b"", 0)
    said, errors = verify.communicate(timeout=HANG_S)
    assert verify.returncode == 1 and b"torn: DAMAGED" in said and b"Traceback" not in errors


@pytest.mark.parametrize("name, last", [("verify", "p: ok"), ("export", "m.safetensors")])
def test_long_commands_show_rate_and_time_left_on_a_terminal_alone(tmp_path, name, last, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    opened(tmp_path).save(Bag(w=torch.randn(32 * MiB)), None, to())
    words = (name, tmp_path, "p", *[tmp_path / "m.safetensors"] * (name == "export"))
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.redirect_stderr(Terminal()) as terminal:
        assert command(capsys, *words)[0] == 0
    bar = rf"\r{name} p +\d+ %  [\d.]+ \wB of 134\.\d\d MB  [\d.]+ \wB/s  \d+:\d\d left  \[#* *\] *\r"
    text = terminal.getvalue()
    assert re.search(bar, text) and re.search(r"\r {99}\r$", text), text  # it is gone in the end
    code, text, printed = command(capsys, *words)
    assert code == 0 and printed.endswith(f"{last}\n") and "B/s" not in text and "\r" not in text


# Out: safetensors files, as Hugging Face's libraries expect them
def contents(path):
    """A safetensors file as anybody may write it, read by hand: {name: (dtype, shape, bytes)}."""
    file = Shard(path, ours=False)
    assert file.metadata == {"format": "pt"} and file.data_at % 8 == 0
    return {name: (entry["dtype"], entry["shape"], file.data(name)) for name, entry in file.header.items()}


def as_stored(state):
    """What a file must hold of a state dict of plain tensors; of F4, two elements a byte."""
    found = {}
    for name, tensor in state.items():
        code, shape = code_of(tensor.dtype), list(tensor.shape)
        found[name] = code, [*shape[:-1], 2 * shape[-1]] if code == "F4" else shape, raw(tensor)
    return found


def exported(capsys, tmp, prefix, *words, out="out/model.safetensors"):
    """What `export` writes as one file."""
    code, text, _ = command(capsys, "export", tmp, prefix, Path(tmp) / out, *words)
    assert code == 0, text
    return contents(Path(tmp) / out)


def differing(capsys, tmp, *words):
    """Exit code, and {name: (kind, what, largest change)}, of diff."""
    code, _, text = command(capsys, "diff", tmp, *words, "--json")
    return code, {d["name"]: (d["kind"], d["what"], d["largest_change"]) for d in json.loads(text)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_from_any_layout_and_format_is_the_truth_and_a_diff_finds_nothing(saved, layout, capsys):
    base, truth, files = saved(layout), as_stored(filled(Net(), "truth").state_dict()), set()
    # What is a DTensor elsewhere is listed there as a plain one.
    moments, plain_steps = {}, ["optimizer/state"] * (layout in ("plain", "ddp2", "tp2"))
    for slot in ("exp_avg", "exp_avg_sq"):
        state = as_stored(dict(filled(Net(), f"truth{slot}").named_parameters()))
        moments |= {f"optimizer/{name}/{slot}": stored for name, stored in state.items()}
    for form in FORMATS:
        prefix = f"{layout}/{form.name}"
        found = exported(capsys, base, prefix)
        assert moments.items() <= found.items()
        assert {name: found[name] for name in found if not name.startswith("optimizer/")} == truth
        assert exported(capsys, base, prefix, "--model-only") == truth
        files.add((base / "out/model.safetensors").read_bytes())
        _, found = differing(capsys, saved("fsdp3"), "fsdp3/MULTI_SHARD", prefix)
        assert all(name.startswith("rng/state~r") or name in plain_steps for name in found), found
    assert len(files) == 1 and not list(base.rglob("*.tmp"))


def test_an_export_is_as_safetensors_writes_it_or_over_a_limit_in_files_with_an_index(tmp_path, capsys):
    state = {f"{number}/~@é\n.{dtype}": pattern(dtype, number) for number, dtype in enumerate(DTYPES)}
    state = {name: tensor for name, tensor in state.items() if tensor.dtype != torch.complex128}
    state |= {"empty": torch.zeros(2, 0), "scalar": torch.tensor(-0.0), "big": torch.randn(3 * MiB + 5)}
    state |= {"z": torch.ones(3, 5), "a": torch.zeros(()), "none": torch.zeros(0)}
    opened(tmp_path).save(Bag(**state), None, to("saved"))
    source, out, files = safetensors_file(tmp_path / "m.safetensors", state), tmp_path / "out", set()
    assert command(capsys, "import", source, tmp_path, "imported")[0] == 0
    for words in (["saved"], ["imported"], ["imported", "--model-only"]):
        assert exported(capsys, tmp_path, *words) == as_stored(state)
        files.add((out / "model.safetensors").read_bytes())
    ckpt.main(["export", str(tmp_path), "saved", f"{out}/model.safetensors", "--max-shard-size", "1kB"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state.values())}
    found = {path.name: contents(path) for path in out.iterdir() if path.suffix != ".json"}
    many = len(found)  # the single file of before is gone
    assert many > 3 and set(found) == {f"model-{n + 1:05d}-of-{many:05d}.safetensors" for n in range(many)}
    for part in found.values():
        assert len(part) == 1 or sum(len(data) for *_, data in part.values()) <= 1000
    assert {name: found[part][name] for name, part in index["weight_map"].items()} == as_stored(state)
    assert sum(map(len, found.values())) == len(state) and list(index["weight_map"]) == sorted(state)
    exported(capsys, tmp_path, "saved")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]  # without the index of before
    pytest.importorskip("safetensors.torch").save_file(state, source, metadata={"format": "pt"})
    assert files == {source.read_bytes()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=code_of)
def test_export_casts_the_floats_of_the_model_and_nothing_else(tmp_path, dtype, capsys):
    model, kept = nn.Linear(300, 5), {"tiny": torch.randn(7).to(torch.float8_e5m2), "steps": torch.arange(7)}
    for name, tensor in {"narrow": torch.randn(7).half(), **kept}.items():
        model.register_buffer(name, tensor)
    opened(tmp_path).save(model, stepped(model), to(compression_level="fast"))
    wanted = {name: t if name in kept else t.to(dtype) for name, t in model.state_dict().items()}
    found = exported(capsys, tmp_path, "p", "--dtype", code_of(dtype).lower())
    assert {name: found.pop(name) for name in wanted} == as_stored(wanted)
    assert {code for code, _, _ in found.values()} == {"F32"}, "moments and steps of the optimizer"


def test_export_tells_what_is_complex_per_rank_or_no_tensor(ram, capsys):
    numbers = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128)
    odd = [Bag(c=numbers, mean=torch.tensor([rank + 1.0]), note="x") for rank in range(2)]
    together(2, lambda c: opened(ram, c).save(odd[c.rank], None, to()))
    code, text, _ = command(capsys, "export", ram, "p", ram / "m.safetensors")
    for said in ("pairs.*: c\n", "lowest rank.*: mean\n", "model-values/note", "rng/state~r0"):
        assert code == 0 and re.search(said, text), (said, text)
    pairs, mean, other = ("F64", [2, 2], raw(numbers)), *(("F32", [1], raw(o.state["mean"])) for o in odd)
    assert contents(ram / "m.safetensors") == {"c": pairs, "mean": mean, "model/mean~r1": other}
    assert exported(capsys, ram, "p", "--model-only") == {"c": pairs, "mean": mean}


@isolated()
def test_an_export_or_import_takes_the_memory_of_a_few_blocks_however_large_a_tensor_is(tmp_path):
    def memory(field):
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    out, samples = tmp_path / "out.safetensors", []
    opened(tmp_path).save(Bag(w=torch.arange(32 * MiB).view(-1, 1 << 14)), None, to())
    for _ in range(2):  # the first one takes more
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = memory("VmRSS")
        ckpt.export_checkpoint(tmp_path, "p", out, model_only=True)
    assert memory("VmHWM") - before < 64 * MiB and out.stat().st_size > 256 * MiB
    ckpt.import_checkpoint(out, tmp_path, "first")
    before = memory("RssAnon")  # without the source, which is mapped
    ckpt.import_checkpoint(out, tmp_path, "second", progress=lambda _: samples.append(memory("RssAnon")))
    assert max(samples) - before < 48 * MiB


@isolated()
def test_an_export_that_fails_says_why_and_leaves_what_was_there(tmp_path):
    """Of a damaged checkpoint, in the place of a link, on a full disk."""
    out, bag = tmp_path / "out" / "m.safetensors", Bag(a=torch.ones(5), layer=torch.randn(3 * BLOCK // 4 + 5))
    export = functools.partial(ckpt.export_checkpoint, tmp_path, out=out, model_only=True)
    for form in FORMATS:
        opened(tmp_path).save(bag, None, to(form.value, format=form))
    opened(tmp_path).save(bag, None, to("good"))
    export("good", max_shard_bytes=64)
    before = listing(out.parent)
    refusal(lambda: export("good", dtype=torch.int8), ValueError, "bfloat16")
    out.symlink_to("elsewhere")
    refusal(lambda: export("good"), "STORAGE_ERROR", out.name)
    out.unlink()
    for form in FORMATS:
        (path,) = (p for p in shards(tmp_path, form.value) if re.search("layer", str(Shard(p).header)))
        flip(path, -1)
        for limit in (1000, MiB * 100):
            call = functools.partial(export, form.value, max_shard_bytes=limit)
            refusal(call, "CORRUPTED_CHECKPOINT", path.name, "layer")
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, MiB))
    refusal(lambda: export("good"), "STORAGE_ERROR", out.name)
    assert listing(out.parent) == before and len(before) == 3


def test_two_exports_to_one_name_are_each_whole_and_what_a_dead_one_has_left_goes_a_day_later(tmp_path):
    out, bags = tmp_path / "out" / "m.safetensors", {}
    for number, prefix in enumerate("ab"):
        bags[prefix] = Bag(w=torch.full((2 * BLOCK,), number))
        opened(tmp_path).save(bags[prefix], None, prefix)

    def export(prefix, between=None):
        ckpt.export_checkpoint(tmp_path, prefix, out, model_only=True, progress=between)
        assert contents(out) == as_stored(bags[prefix].state)

    export("a", between=lambda _: export("b"))  # the whole of the other one while this one writes
    assert list(out.parent.iterdir()) == [out]
    dead, young = (out.with_name(f"{out.name}.0badf00{digit}.tmp") for digit in "de")
    for path, age_s in ((dead, 90_000), (young, 80_000)):
        path.touch()
        os.utime(path, times=(time.time() - age_s,) * 2)
    export("a")
    assert set(out.parent.iterdir()) == {out, young}


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
@on_ranks(2)
def test_a_transformers_model_goes_from_fsdp2_to_from_pretrained_and_back(rank, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    def model(salt=None):
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 50}
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(GPT2Config(**sizes)).eval()
        return filled(made, salt) if salt else made

    def sharded(model):
        for block in model.transformer.h:
            fully_shard(block)
        return fully_shard(model)

    tokens, theirs = torch.arange(12).view(2, 6), tmp_path / "theirs"
    opened(tmp_path).save(sharded(model()), None, to())
    if rank == 0:
        for words in ([], ["--max-shard-size", "20kB"]):
            out = tmp_path / f"hf{len(words)}" / "model.safetensors"
            assert ckpt.main(["export", str(tmp_path), "p", str(out), "--model-only", *words]) == 0
            model().config.save_pretrained(out.parent)
            found = AutoModelForCausalLM.from_pretrained(out.parent).eval()
            assert identical(found(tokens).logits, model()(tokens).logits)
            assert found.lm_head.weight is found.get_input_embeddings().weight
        model().save_pretrained(theirs, max_shard_size="8kB")
        assert (theirs / "model.safetensors.index.json").exists()
    dist.barrier()
    result = ckpt.load_safetensors(live := sharded(model("other")), theirs)
    assert (result.source_world_size, result.target_world_size) == (1, 2)
    assert all(whole(tensor) == raw(model().state_dict()[name]) for name, tensor in live.state_dict().items())


# In: what others have saved
def safetensors_file(path, state, pad=0):
    """Write a safetensors file by hand; `pad` spaces misalign its data."""
    table, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (code, shape, data) in as_stored(state).items():
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(table).encode() + b" " * pad
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def as_file(tmp, state, pad=0):
    return safetensors_file(tmp / "m.safetensors", state, pad)


def as_index(tmp, state):
    """The same in two files with an index; each has other values too for the tensors of the other."""
    weights = {name: f"m-{number % 2}.safetensors" for number, name in enumerate(state)}
    for part in sorted(set(weights.values())):
        own = {name: t if weights[name] == part else torch.zeros_like(t) for name, t in state.items()}
        safetensors_file(tmp / part, own)
    (tmp / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return tmp / "m.safetensors.index.json"


def as_links(tmp, state):
    """The same as links to blobs, as Hugging Face's cache has them."""
    (snapshot := tmp / "snapshots" / "0a1b").mkdir(parents=True)
    for number, path in enumerate(sorted(as_index(tmp, state).parent.glob("m*"))):
        path.rename(tmp / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blob{number}")
    return snapshot / "m.safetensors.index.json"


def as_torch(tmp, state, **options):
    torch.save(state, tmp / "m.pt", **options)
    return tmp / "m.pt"


def as_dcp(tmp, state):
    run(2, save_dcp, tmp, state)
    return tmp / "dcp"


def save_dcp(rank, world_size, tmp, state):
    mesh = init_device_mesh("cpu", (world_size,))
    sharded = {n: distribute_tensor(t, mesh, [ShardDim(0)]) for n, t in state.items() if n.endswith("weight")}
    dcp.save({"model": state | sharded, **BESIDE}, checkpoint_id=tmp / "dcp")


def nested(state):
    """A dict of dicts, as `{"up": {"weight": ...}, "tiny": ...}`."""
    up = {name.removeprefix("up."): tensor for name, tensor in state.items() if name.startswith("up.")}
    return {name: tensor for name, tensor in state.items() if name[:3] != "up."} | {"up": up}


BESIDE = {"epoch": 3, "optimizer": {"m": torch.ones(2)}}
SOURCES = {
    "safetensors": as_file,
    "safetensors, misaligned": lambda tmp, state: as_file(tmp, state, pad=3),
    "safetensors, from DDP": lambda tmp, state: as_file(tmp, {f"module.{k}": v for k, v in state.items()}),
    "safetensors, without a tied name": lambda tmp, state: as_file(
        tmp, {name: state[name] for name in state if name != "head.weight"}
    ),
    "safetensors, in a directory": lambda tmp, state: as_file(tmp, state).parent,
    "index, in a directory": lambda tmp, state: as_index(tmp, state).parent,
    "index, of links": as_links,
    "torch": as_torch,
    "torch, of before zip": lambda tmp, state: as_torch(tmp, state, _use_new_zipfile_serialization=False),
    "torch, of dicts of dicts": lambda tmp, state: as_torch(tmp, nested(state)),
    "torch, nested": lambda tmp, state: as_torch(tmp, {"model": state, **BESIDE, "optimizer": {0: {"m": 1}}}),
    "torch, nested, of Lightning": lambda tmp, state: as_torch(tmp, {"state_dict": state, **BESIDE}),
    "DCP, nested": as_dcp,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_import_or_load_safetensors_from_any_source_is_strict_and_bit_for_bit(tmp_path, kind, capsys):
    (tmp_path / "in").mkdir()
    truth, model = filled(Net(), "truth").state_dict(), filled(Net(), "other")
    source = SOURCES[kind](tmp_path / "in", dict(truth))
    words = ("import", source, tmp_path / "new/checkpoints", "a/b")
    code, text, _ = command(capsys, *words)
    assert code == 0 and ("pickle" in text) == kind.startswith("DCP"), text
    load = functools.partial(opened(tmp_path / "new/checkpoints").load, optimizer=None, options=at("a/b"))
    result = load(model)
    tied = [tensor.name for tensor in result.metadata.tensors if tensor.alias_of is not None]
    assert identical(model.state_dict(), truth) and (kind != "torch" or tied == ["model/head.weight"])
    if "without" in kind:
        (apart := filled(Net(), "other")).head.weight = nn.Parameter(torch.zeros(11, 6))
        refusal(lambda: load(apart), None, "model/head.weight: missing")
    assert set(result.extra_state) == (set(BESIDE) if "nested" in kind else set())
    assert "nested" not in kind or (result.extra_state["epoch"] == 3 and "epoch" in text)
    code, text, _ = command(capsys, *words)
    assert code == 1 and "a/b" in text and "exists" in text
    if kind.startswith(("safetensors", "index")):
        model = filled(Net(), "other")
        ckpt.load_safetensors(model, source, rename=lambda name: name.removeprefix("module."))
        assert identical(model.state_dict(), truth)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def pickled(state, save=torch.save, **options):
    save(state, file := io.BytesIO(), **options)
    return file.getvalue()


def bad_sources(tmp):
    """(name, bytes of the file, or of files in a directory, exit code, what is to be said of it)."""
    good, ones = as_file(tmp, {"w": torch.ones(3)}).read_bytes(), torch.ones(2)
    index = as_index(tmp, {"a": ones, "b": ones})
    first, second = ({path.name: path.read_bytes()} for path in sorted(tmp.glob("m-*")))
    text = index.read_bytes()
    three, four = (struct.pack("<f", number) * 9 for number in (3.0, 4.0))
    damaged = pickled({"w": torch.full((4096,), 3.0)}).replace(three, four, 1)
    opened(tmp / "base").save(*small(), "p")
    (full,) = ckpt.export_checkpoint(tmp / "base", "p", tmp / "base" / "full.safetensors")
    return [
        ("nothing", None, 1, "nothing"),
        ("empty", {}, 2, "name one file; the safetensors files there: none"),
        ("both", {"a.safetensors": good, "b.safetensors": good}, 2, "several files have w"),
        ("beside", {**first, **second, index.name: text, "m.safetensors": good}, 2, "name one file"),
        ("wrong", {**first, **second, index.name: text.replace(b'"a":', b'"x":')}, 1, "names: x"),
        ("path", {index.name: text.replace(b'"m-1.', b'"../m-1.')}, 1, "is not the plain name"),
        ("gone", {**first, index.name: text}, 1, "m-1.safetensors"),
        ("torn", {".metadata": b"no pickle"}, 1, "torn"),
        ("i.index.json", b"{}", 1, "weight_map"),
        ("0.safetensors", b"", 1, "no safetensors file, or damaged"),
        ("cut.safetensors", good[:-1], 1, "entries end at byte 12 of 11 bytes"),
        ("longer.safetensors", good + b"\0", 1, "entries end at byte 12 of 13 bytes"),
        ("length.safetensors", struct.pack("<Q", 1 << 63) + good[8:], 1, "header of 9223372036854775808"),
        ("dtype.safetensors", good.replace(b"F32", b"F31"), 1, "F31"),
        ("ours.safetensors", good.replace(b"F32", b"C32"), 1, "C32"),
        ("hole.safetensors", good.replace(b"[0, 12]", b"[4, 16]") + bytes(4), 1, "hole or overlap at byte 0"),
        ("shape.safetensors", good.replace(b"[3]", b"[4]"), 1, "'w': F32 of shape [4] in 12"),
        ("full.safetensors", Path(full).read_bytes(), 2, "model_only"),
        ("list.pt", pickled([ones]), 2, "holds a list"),
        ("sparse.pt", pickled({"w": ones, "x": {"w": ones.to_sparse()}}), 1, "x.w"),
        ("names.pt", pickled({"a.b": ones, "a": {"b": ones}}), 2, "a.b"),
        ("one_name.pt", pickled({1: ones, "1": ones}), 2, "one name"),
        ("bit.pt", damaged, 1, "fails its CRC32"),
    ]


def test_an_import_of_what_is_damaged_or_unclear_says_why_and_saves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content, wanted, why in bad_sources(tmp_path):
        if isinstance(content, dict):
            Path(name).mkdir()
        for file, data in (content if isinstance(content, dict) else {"": content}).items():
            data is None or Path(name, file).write_bytes(data)
        code, text, _ = command(capsys, "import", tmp_path / name, "c", "p")
        assert code == wanted and why in text and not re.search("Traceback|weights_only", text), (name, text)
        assert not listing("c"), name


def test_an_import_of_what_torch_refuses_says_why_without_advice_to_turn_checks_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open("tar", mode="w") as archive:
        list(map(archive.addfile, map(tarfile.TarInfo, ("storages", "tensors", "pickle"))))
    for why, data in (
        ("it holds posix.mkdir", pickled({"w": Bomb()})),
        ("it holds posix.mkdir", pickled({"w": Bomb()}, _use_new_zipfile_serialization=False)),
        ("it holds test_ckpt.Point", pickled({"w": ONES, "x": Point()})),
        ("it is cut short or damaged", pickled({"w": ONES})[:-50]),
        ("KeyError", b"hello"),
        ("TorchScript", pickled(torch.jit.script(MODULE), torch.jit.save)),
        (".tar format", Path("tar").read_bytes()),
    ):
        Path("bad.pt").write_bytes(data)
        with pytest.raises(CheckpointException) as caught:
            ckpt.import_checkpoint("bad.pt", "c", "p")
        shown, text = "".join(traceback.format_exception(caught.value)), str(caught.value)
        assert caught.value.type is ExceptionType.LOAD_FAILED and why in text, text
        assert "torch.load(weights_only=True) refuses it" in text and "save these alone" in text
        assert not re.search("False|trust", text) and not re.search("safe_globals|likely succeed", shown)
        assert not Path("exploded").exists() and not listing("c"), why


# Safetensors files of other programs, straight into a model
def test_load_safetensors_renames_and_takes_tensors_of_any_size_at_any_place(tmp_path):
    state = {"a": torch.ones(3).byte(), "none": torch.zeros(0, 2), "half": torch.ones(3).half()}
    state |= {"big": torch.randn(3 * BLOCK // 8 + 3), "z": torch.randn(5).double()}  # big: more than a block
    path, names = as_file(tmp_path, state, pad=3), {"a": None, "half": "layer.half"}
    wanted = {names.get(name, name): tensor for name, tensor in state.items() if name != "a"}
    for rename in (names, lambda name: names.get(name, name)):
        found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        found["big"] = torch.zeros(len(state["big"]), 2)[:, 0]  # strided: filled box by box
        result = ckpt.load_safetensors(found, path, rename=rename)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert result.warnings == ["safetensors files have no checksums; nothing was verified"]
        assert {shard.file for shard in result.metadata.shards} == {path.name}
    for words, rename, model in (
        ("the name 'z', one of them from 'z'", {"big": "z"}, {}),
        ("no such layer", lambda name: [].index("no such layer"), {}),
        ("rename must give names, not 3", lambda name: 3, {}),
        ("model must have state_dict()", None, [1]),
    ):
        refusal(lambda: ckpt.load_safetensors(model, path, rename=rename), ValueError, words)
    ckpt.load_safetensors({}, safetensors_file(tmp_path / "0.safetensors", {}))


@on_ranks(2)
def test_load_safetensors_raises_on_all_ranks_what_fails_on_one(rank, tmp_path):
    """A file cut short, then another file, on rank 1."""
    path, model, shapes = tmp_path / f"{rank}/m.safetensors", {"w": torch.zeros(8, 4)}, ((8, 4), (4, 8))
    path.parent.mkdir()
    good, other = (safetensors_file(path, {"w": torch.ones(shape)}).read_bytes() for shape in shapes)
    for content, *end, words in (
        (good[:-1], "CORRUPTED_CHECKPOINT", 1, "1/m.safetensors"),
        (other, "ValueError", None, "disagree about the headers"),
    ):
        path.write_bytes(content if rank else good)
        *found, message = answer = outcome_of(lambda: ckpt.load_safetensors(model, path))
        assert found == end and words in message and gathered(answer) == [answer] * 2
    path.write_bytes(good)
    ckpt.load_safetensors(model, path)


# What differs between two checkpoints
def test_diff_names_what_was_added_removed_and_changed_and_by_how_much(tmp_path, capsys):
    zeros, tensor = torch.zeros(2 * MiB), torch.tensor
    rows = [  # name, old, new, kind, what, largest change
        ("same", torch.ones(5), torch.ones(5), None, "", None),
        ("gone", torch.ones(2), None, "removed", "F32 [2]", None),
        ("new", None, torch.ones(1), "added", "F32 [1]", None),
        ("wide", torch.ones(3), torch.ones(4), "changed", "F32 [3] -> F32 [4]", None),
        ("typed", torch.ones(4), tensor([1.5] * 4).bfloat16(), "changed", "F32 [4] -> BF16 [4]", 0.5),
        ("moved", zeros, zeros.index_fill(0, tensor([MiB]), -0.25), "changed", "value", 0.25),
        ("nan", tensor([1.0, math.nan]), tensor([math.nan, math.nan]), "changed", "value", "nan"),
        ("ints", tensor([1, 2]), tensor([1, -5]), "changed", "value", 7.0),
        ("z", tensor([3 + 4j]), tensor([0j]), "changed", "value", 5.0),
        ("far", torch.ones(2), tensor([1.0, math.inf]), "changed", "value", "inf"),
    ]
    for side, prefix in enumerate("ab", 1):
        state = Bag(**{row[0]: row[side] for row in rows if row[side] is not None})
        extra = {"step": 9 * side, "day": side, "lr": 0.5}  # a step of one digit, then of two
        opened(tmp_path).save(state, None, to(prefix, include_rng_state=False), extra_state=extra)
    wanted = {f"model/{name}": tuple(change) for name, _, _, *change in rows if change[0]}
    wanted |= dict.fromkeys(("extra/step", "extra/day"), ("changed", "value", None))
    assert identical(differing(capsys, tmp_path, "a", "b", "--values"), (1, wanted))
    unmeasured = {name: (kind, what, None) for name, (kind, what, _) in wanted.items()}
    assert differing(capsys, tmp_path, "a", "b") == (1, unmeasured)
    assert "LARGEST_CHANGE" not in command(capsys, "diff", tmp_path, "a", "b")[1]  # no empty column
    text = command(capsys, "diff", tmp_path, "a", "b", "--values")[1]
    for line in ("NAME +KIND +WHAT +LARGEST_CHANGE", r"model/moved +changed +value +0.25"):
        assert re.search(f"^{line}$", text, re.M)
    assert command(capsys, "diff", tmp_path, "a", "a") == (0, "", "")


# ---- the README's format: enough to write a reader from ----------------------------------------------------


class Stranger:
    """A checkpoint as read by somebody who has the README's section "On disk", Python and numpy alone."""

    SIZES: ClassVar = Shard.ITEM | {"JSON": 1, "C32": 4, "C128": 16}

    def __init__(self, directory, prefix):
        text = (directory / f"{prefix}.metadata.json").read_bytes()
        assert text[-21:] == b',"crc32":"%08x"}\n' % zlib.crc32(text[:-21])
        self.record = expanded(json.loads(text))
        self.files = []
        assert self.record["format_version"] == 2
        for name, length, header_bytes, crc in self.record["files"]:
            file = Shard(directory / prefix / name)  # which asserts the rules of a file alone
            assert (len(file.bytes), file.data_at) == (length, header_bytes)
            assert f"{zlib.crc32(file.bytes[:header_bytes]):08x}" == crc
            assert name.startswith(self.record["save_id"])
            self.files.append(file)

    @staticmethod
    def expand(stored, size, length):
        """The row-major bytes of a piece of `length` bytes, with elements of `size`, from its stored ones."""
        if len(stored) == length:
            return stored
        planes, plain = stored[0], bytearray(length)
        begin = 1 + 4 * planes
        for plane, stored_length in enumerate(struct.unpack(f"<{planes}I", stored[1:begin])):
            chunk = stored[begin : begin + stored_length]
            plain[plane::planes] = chunk if stored_length == length // planes else zlib.decompress(chunk)
            begin += stored_length
        assert begin == len(stored) and len(plain) == length and planes in (1, size)
        return bytes(plain)

    def tensors(self):
        """(name, rank or None) -> (dtype, shape, row-major bytes) of every tensor, whole."""
        rows, pieces = self.record["tensors"], self.record["pieces"]
        assert list(pieces) == ["count", "tensor", "file", "begin", "length", "offset", "size"]
        count, which, *columns, offsets, sizes = pieces.values()
        assert which == sorted(which) and len(which) == count
        self.compressed = []  # the lengths of the boxes of compressed pieces
        whole = [np.zeros((*shape, self.SIZES[code]), np.uint8) for _, code, shape, _, _ in rows]
        for index, number, begin, length, low, size in zip(which, *columns, zip(*offsets), zip(*sizes)):
            name, code, shape, rank, tied = rows[index]
            item, ndim, file = self.SIZES[code], len(shape), self.files[number]
            assert not any(low[ndim:]) and set(size[ndim:]) <= {1} and tied is None
            low, size = low[:ndim], list(size[:ndim])
            if file.path.name.endswith(".model.safetensors"):
                entry = name.removeprefix("model/")
            else:
                entry = name.replace("~", "~0").replace("@", "~1")
                entry += "" if size == shape else "@" + ",".join(map(str, low))
                entry += "" if rank is None else f"~r{rank}"
            assert file.header[entry]["data_offsets"] == [begin, begin + length]
            plain = self.expand(file.data(entry), item, math.prod(size) * item)
            if length < len(plain):
                self.compressed.append(len(plain))
            box = tuple(slice(first, first + extent) for first, extent in zip(low, size))
            whole[index][box] = np.frombuffer(plain, np.uint8).reshape(*size, item)
        return {
            (name, rank): (code, shape, whole[row if tied is None else tied].tobytes())
            for row, (name, code, shape, rank, tied) in enumerate(rows)
        }

    READERS: ClassVar = {"$dict": dict, "$OrderedDict": dict, "$Counter": dict, "$bytes": base64.b64decode}
    READERS |= {"$tuple": tuple, "$Size": tuple, "$set": set, "$frozenset": frozenset}
    READERS |= {
        "$int": lambda digits: int(digits, 16),
        "$float": lambda digits: struct.unpack(">d", bytes.fromhex(digits))[0],
        "$str": lambda text: base64.b64decode(text).decode("utf-8", "surrogatepass"),
        "$ndarray": lambda body: (*body[:2], base64.b64decode(body[2])),
        "$scalar": lambda body: (*body[:2], base64.b64decode(body[2])),
    }

    def value(self, node):
        """A value, with what its own language has for each kind."""
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: self.value(item) for key, item in node.items()}
        if not any(key.startswith("$") for key in node):
            return node
        kind, *rest = node
        assert rest in ([], ["metadata"])
        return self.READERS.get(kind, lambda body: (kind, body))(node[kind])  # or a name


def documented_state(rank):
    """Every kind of thing that the README's tables name, as `rank` has it before anything is sharded."""
    tied, noise = torch.arange(6).view(2, 3), torch.randn(40_000, generator=torch.Generator().manual_seed(1))
    tensors = dict(tied=tied, again=tied, empty=torch.zeros(0, 3), strided=torch.arange(24.0).view(4, 6).T)
    tensors |= dict(big=torch.arange(2.6e6).view(1300, 2000), noise=noise, scalar=torch.tensor(2.5).double())
    tensors |= dict(half=noise[:21].view(7, 3).bfloat16(), complex=noise[:6].view(3, 2).double() * (1 - 2j))
    tensors |= dict(flag=torch.tensor([True, False, True]), apart=torch.full((2, 2), float(rank)))
    tensors["own~@name"] = torch.ones(1, 1, 1, 2)
    values = dict(plain=[1, -2.5, "x", None, True], tuple=(1, (2,)), large=-(2**70), bytes=b"\0\xff")
    values |= dict(odd=[math.inf, -math.inf], set={3, 1}, torn="\ud83d\ude00", keys={(1, 2): "a"})
    values |= dict(place={"rank": rank}, array=np.arange(3, dtype=">i2"), number=np.float32(0.1))
    values |= dict(size=torch.Size([2, 3]), dtype=torch.bfloat16, frozen=frozenset("a"))
    values |= dict(nested={"deep": [torch.arange(3)]}, counter=Counter("aab"))
    return tensors, values


@for_each(level=[LEVELS[0], LEVELS[1], LEVELS[3]], form=FORMATS)
@on_ranks(2)
def test_a_reader_written_from_the_readme_alone_reads_every_format_bit_for_bit(rank, ram, form, level):
    layers, (tensors, values) = small()[0], documented_state(rank)
    fully_shard(layers[0])  # 5 rows over 2 ranks: uneven
    fully_shard(layers)
    torch.manual_seed(rank)
    random.seed(rank)
    note, config = {"note": [1, 2]}, {"depth": 3, "name": "ü", 5: (1.5, None)}  # a value in a model's state
    model = {"layers": layers, "bag": Bag(**tensors, config=config)}
    options = to(format=form, compression_level=level, custom_metadata=note)
    opened(ram).save(model, stepped(layers), options, extra_state=values)
    found = Stranger(ram, "p")
    assert found.record["custom_metadata"] == note and found.record["format"] == form.value
    stored = found.tensors()
    values = {key: found.value(json.loads(data)) for key, (code, _, data) in stored.items() if code == "JSON"}
    assert all(length <= BLOCK for length in found.compressed)
    compressible = level is not LEVELS[0] and form is not CheckpointFormat.SINGLE_FILE
    assert bool(found.compressed) == compressible
    whole_file = {"single_file": "model/bag.empty", "consolidated": "bag.empty"}.get(form.value)
    assert whole_file is None or whole_file in found.files[0].header, "an empty tensor has an entry there"
    layers = small()[0]
    states, names = stepped(layers).state_dict()["state"], [f"layers.{key}" for key in layers.state_dict()]
    expected = {f"model/layers.{key}": tensor for key, tensor in layers.state_dict().items()}
    for number, name in enumerate(names):
        expected |= {f"optimizer/{name}/{key}": tensor for key, tensor in states[number].items()}
    for number in (0, 1):
        tensors, extra = documented_state(number)
        apart = tensors.pop("apart")
        assert stored.pop(("model/bag.apart", number)) == ("F32", [2, 2], raw(apart))
        rng = values["rng/state", number]
        assert rng["torch"] == torch.Generator().manual_seed(number).get_state().numpy().tobytes()
        assert rng["random"] == random.Random(number).getstate()
        assert values["extra/place", number] == extra.pop("place")
    expected |= {f"model/bag.{key}": tensor for key, tensor in tensors.items()}
    expected["extra/nested.deep.0"] = extra["nested"]["deep"][0]
    expected = {(key, None): (code_of(t.dtype), list(t.shape), raw(t)) for key, t in expected.items()}
    assert {key: found for key, found in stored.items() if found[0] != "JSON"} == expected
    group = values["optimizer/state", None]["groups"][0]
    assert group["params"] == names and group["options"]["betas"] == (0.9, 0.999)
    extra |= {"counter": dict(extra["counter"]), "size": (2, 3), "dtype": ("$dtype", "bfloat16")}
    extra |= {"array": (">i2", [3], b"\0\0\0\1\0\2"), "number": ("<f4", [], b"\xcd\xcc\xcc\x3d")}
    extra["nested"] = {"deep": [("$tensor", "extra/nested.deep.0")]}
    expected = {f"extra/{key}": value for key, value in extra.items()} | {"model-values/bag.config": config}
    assert all(identical(values[key, None], value) for key, value in expected.items())


def test_the_worked_examples_of_the_readme_are_what_is_written(tmp_path):
    opened(tmp_path).save_model_only(Bag(w=torch.tensor([1.0, 2.0])), to(custom_metadata={"epoch": 3}))
    (path,) = shards(tmp_path)
    dump = re.findall(r"^0000([0-9a-f]{4})  ((?:[0-9a-f]{2} +)+)", README, re.MULTILINE)
    content = path.read_bytes()
    assert len(dump) == 3 and len(content) == 4096 + 8
    assert all(content[int(place, 16) :].startswith(bytes.fromhex(digits)) for place, digits in dump)
    assert f"CRC32 {zlib.crc32(content[4096:]):08x}" in README
    (example,) = re.findall(r"^```json\n(\{\"format_version.*\n)```", README, re.MULTILINE)
    assert example.encode() == sealed(json.loads(example))
    text = (tmp_path / "p.metadata.json").read_text()
    written, shown = expanded(json.loads(text)), expanded(json.loads(example))
    assert list(written) == list(shown)
    written["files"][0][0] = shown["save_id"] + written["files"][0][0][8:]
    others = ("save_id", "torch_version", "timestamp", "crc32")
    assert written == shown | {key: written[key] for key in others}


# ---- recipes: the README names these, and each is ready to copy --------------------------------------------


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # on GPUs "cuda"
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


SHARDINGS = {"plain": lambda model: model, "ddp": DistributedDataParallel, "fsdp2": fully_shard}
SHARDINGS["tp"] = tensor_parallel


def train_in_any_layout(layout, steps):
    """Continue from the newest checkpoint, of any layout and number of ranks; return the step reached."""
    model = SHARDINGS[layout](nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)))
    optimizer, step = torch.optim.AdamW(model.parameters()), 0
    with ckpt.DistributedCheckpoint(storage="./ckpts") as checkpoint:
        if (latest := checkpoint.latest_checkpoint()) is not None:
            step = checkpoint.load(model, optimizer, latest.prefix).extra_state["step"]
        for _ in range(steps):
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        checkpoint.save(model, optimizer, f"step_{step}", extra_state={"step": step})
    return step


def ckpt_trainer():
    """A `Trainer` that saves and resumes here, in its `output_dir`, whenever its arguments say save.

    To resume: `trainer.train(trainer.newest())`. Use `keep_last` or `retain`, not `save_total_limit`.
    """
    from transformers import Trainer

    class CkptTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.checkpoint = ckpt.DistributedCheckpoint(storage=self.args.output_dir)

        def newest(self):
            latest = self.checkpoint.latest_checkpoint()
            return latest and os.path.join(self.args.output_dir, latest.prefix)

        def save_model(self, output_dir=None, _internal_call=False):
            if not _internal_call:
                return super().save_model(output_dir)
            os.makedirs(output_dir, exist_ok=True)

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)  # trainer_state.json alone, which a resume reads
            prefix, extra = f"checkpoint-{self.state.global_step}", {"scheduler": self.lr_scheduler}
            self.checkpoint.save(self.model_wrapped, self.optimizer, prefix, extra_state=extra)

        def _load_rng_state(self, path):  # Trainer calls it when the data are where they were
            if path is not None:
                prefix, extra = os.path.basename(path), {"scheduler": self.lr_scheduler}
                self.checkpoint.load(self.model_wrapped, self.optimizer, prefix, extra_state=extra)

        def _save_optimizer_and_scheduler(self, output_dir): ...
        def _save_rng_state(self, output_dir): ...
        def _load_from_checkpoint(self, path, model=None): ...
        def _load_optimizer_and_scheduler(self, path): ...

    return CkptTrainer


def lightning_callback():
    """A callback for Lightning with any strategy: it saves after each epoch, and resumes at the start.

    `Trainer(callbacks=[CkptCallback(DistributedCheckpoint(storage="./ckpts"))], enable_checkpointing=False)`.
    """
    from lightning import Callback

    class CkptCallback(Callback):
        def __init__(self, checkpoint):
            self.checkpoint = checkpoint

        def on_fit_start(self, trainer, module):
            if (latest := self.checkpoint.latest_checkpoint()) is not None:
                found = self.checkpoint.load(module, trainer.optimizers, latest.prefix).extra_state
                for config, state in zip(trainer.lr_scheduler_configs, found["schedulers"]):
                    config.scheduler.load_state_dict(state)
                trainer.fit_loop.load_state_dict(found["loop"])

        def on_train_epoch_end(self, trainer, module):
            schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            extra = {"schedulers": schedulers, "loop": trainer.fit_loop.state_dict()}
            prefix = f"epoch_{trainer.current_epoch + 1}"
            self.checkpoint.save(module, trainer.optimizers, prefix, extra_state=extra)

    return CkptCallback


class StoredObject:
    """An object of an object store: read in ranges; a new one is collected in memory, written by `sync`."""

    def __init__(self, fs, name):
        self.fs, self.name, self.data = fs, name, bytearray()

    def read(self, offset, buffer):
        buffer[:] = self.fs.cat_file(self.name, start=offset, end=offset + len(buffer))

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def length(self):
        return self.fs.size(self.name)

    def resize(self, length):
        self.data = self.data[:length].ljust(length, b"\0")

    def sync(self):
        self.fs.pipe_file(self.name, self.data)

    def close(self): ...


class ObjectStorage:
    """S3, GCS or Azure, by `fsspec`: `DistributedCheckpoint(storage=ObjectStorage("s3://bucket/ckpts"))`.

    Writing the record, last and in one request, is the commit. What a file system has and this lacks: files
    that ranks share (save as MULTI_SHARD), and a rename that fails once the ranks have abandoned a save (do
    not reuse prefixes).
    """

    def __init__(self, url):
        import fsspec  # comes with torch

        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        self.fs = fsspec.filesystem("dir", fs=fs, path=path)

    def create(self, name):
        self.fs.pipe_file(name, b"", mode="create")
        return StoredObject(self.fs, name)

    def open(self, name, write=False):
        why = "an object cannot be written in part: save with CheckpointFormat.MULTI_SHARD"
        assert not write or name.endswith(".tmp"), why  # the record is written as a whole
        self.fs.info(name)  # FileNotFoundError
        return StoredObject(self.fs, name)

    def length(self, name):
        return self.fs.size(name) if self.fs.isfile(name) else None

    def names(self, directory=""):
        return sorted(self.fs.find(directory))

    def publish(self, temporary, name, overwrite):
        self.fs.pipe_file(name, self.fs.cat_file(temporary), mode="overwrite" if overwrite else "create")
        self.fs.rm_file(temporary)

    def delete(self, name):
        if found := self.fs.isfile(name):
            self.fs.rm_file(name)
        return found

    def sync_directory(self, name): ...

    def age_s(self, name):  # by the store's own clock: that of an object made now
        now = f"{name[:-12]}{os.urandom(4).hex()}.tmp"  # a fence too, which `gc` removes if this is cut off
        self.fs.pipe_file(now, b"")
        try:
            return (self.fs.modified(now) - self.fs.modified(name)).total_seconds()
        finally:
            self.fs.rm_file(now)


class Finite:
    """An IntegrityChecker: every floating-point number of a shard is finite."""

    name = "finite"

    def check_integrity(self, reader, shard):
        result, record = ckpt.ValidationResult(), reader.metadata
        for row in reader.pieces_of_file(shard):
            piece = reader.read_piece(row)
            if piece.is_floating_point() and not piece.double().isfinite().all():
                result.errors.append(f"{record.tensors[record.pieces.tensor[row]].name} is not finite")
        return result


class SameArchitecture:
    """A CompatibilityChecker: the record names the architecture that this code has."""

    name = "same architecture"

    def check_compatibility(self, metadata):
        found = metadata.custom_metadata.get("architecture")
        return ckpt.ValidationResult([] if found == "v2" else [f"architecture {found!r}, not 'v2'"])


# ---- the recipes do what they say --------------------------------------------------------------------------


def test_every_recipe_that_the_readme_names_is_in_the_section_recipes():
    text = README.partition("## Recipes")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)))
    recipes = Path(__file__).read_text().partition("\n# ---- recipes")[2].partition("\n# ---- ")[0]
    assert len(named) >= 6 and set(named) <= set(re.findall(r"^(?:def|class) (\w+)", recipes, re.MULTILINE))


def test_one_loop_continues_in_any_layout_from_what_any_other_has_saved(tmp_path):
    layouts = (("plain", 1), ("ddp", 2), ("fsdp2", 2), ("tp", 2), ("ddp", 3), ("plain", 1))
    for number, (layout, ranks) in enumerate(layouts, 1):
        assert run(ranks, follow_the_recipe, tmp_path, layout, 3) == [3 * number] * ranks
    run(1, follow_the_recipe, tmp_path / "whole", "plain", 18)
    changes = ckpt.diff_checkpoints(tmp_path, "ckpts/step_18", "whole/ckpts/step_18", values=True)
    changes = [change.largest_change for change in changes if not change.name.startswith("rng/")]
    assert all(change < 1e-6 for change in changes)  # other layouts add in another order


def follow_the_recipe(rank, world_size, tmp, layout, steps):
    tmp.mkdir(exist_ok=True)
    os.chdir(tmp)
    if layout == "plain":
        dist.destroy_process_group()
    torch.manual_seed(0)
    return train_in_any_layout(layout, steps)


def recipes():
    """What the README's block of short recipes defines."""
    (block,) = [block for block in readme_blocks() if "class FSDP1" in block]
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    return types.SimpleNamespace(**namespace)


@on_ranks(2)
def test_a_renamed_subset_of_a_checkpoint_fills_the_backbone_for_fine_tuning(rank, tmp_path):
    model = nn.ModuleDict({"encoder": filled(nn.Linear(3, 5), "truth"), "decoder": nn.Linear(5, 4)})
    fully_shard(model["encoder"])
    opened(tmp_path).save(model, stepped(model["encoder"], lr=0.0), to())
    model = filled(nn.ModuleDict({"backbone": nn.Linear(3, 5), "head": nn.Linear(5, 2)}), "other")
    before = state_of(model["head"])
    fully_shard(model["backbone"])
    warnings = recipes().fine_tune(opened(tmp_path), "p", model)
    assert whole(model["backbone"].weight) == whole(filled(nn.Linear(3, 5), "truth").weight)
    assert identical(state_of(model["head"]), before) and any("decoder.weight" in line for line in warnings)


def moments(optimizer):
    """The bytes of all tensors of an optimizer's state, those of all ranks."""
    return [whole(t) for state in optimizer.state_dict()["state"].values() for t in state.values()]


@on_ranks(2)
def test_the_optimizer_of_an_imported_file_loads_here_and_into_an_fsdp2_optimizer(rank, tmp_path):
    (model, other, third), base = (small(salt)[0] for salt in ("truth", "other", "third")), tmp_path / "c"
    optimizer, here = stepped(model, lr=0.125), torch.optim.AdamW(other.parameters())
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
        ckpt.import_checkpoint(tmp_path / "old.pt", base, "old")
        alone = opened(base, ckpt.LocalCoordinator())
        assert recipes().with_optimizer(alone, "old", other, here) == "old_whole"
        assert identical(state_of(other, here), state_of(model, optimizer))
    sharded = torch.optim.AdamW(fully_shard(third).parameters())
    dist.barrier()
    opened(base).load(third, sharded, at("old_whole", load_rng_state=False))
    assert sharded.param_groups[0]["lr"] == 0.125 and moments(sharded) == moments(optimizer)


def test_retain_keeps_every_thousandth_step_and_the_best_five(tmp_path):
    options = dataclasses.replace(recipes().options, storage=str(tmp_path))
    checkpoint = ckpt.DistributedCheckpointFactory.create(options=options)
    losses = {step: abs(step - 1450) for step in range(100, 2400, 100)}
    for step, loss in losses.items():
        metadata = {"step": step, "loss": loss}
        checkpoint.save(Bag(w=torch.ones(1)), None, to(f"step_{step}", custom_metadata=metadata))
    kept = {info.custom_metadata["step"] for info in checkpoint.list_checkpoints()}
    assert kept == {1000, 2000, 2300} | set(sorted(losses, key=losses.get)[:5])  # 2300: the new one


def test_fsdp1_goes_through_the_stateful_of_the_readme_to_any_number_of_ranks(tmp_path):
    truth, _ = run(2, through_fsdp1, tmp_path, "truth")
    assert truth[0] == 0.125 and len(truth[1]) == 4 * 4
    for ranks in (2, 3, 1):
        assert run(ranks, through_fsdp1, tmp_path, "other") == [truth] * ranks


def through_fsdp1(rank, world_size, tmp, salt):
    """Save "truth", or load it; the learning rate, and the bytes of all tensors, whole."""
    how = {"device_mesh": init_device_mesh("cpu", (world_size,)), "device_id": torch.device("cpu")}
    how |= {"auto_wrap_policy": ModuleWrapPolicy({nn.Linear}), "use_orig_params": True}
    model = FullyShardedDataParallel(small(salt)[0], **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125 if salt == "truth" else 0.5)
    stateful = recipes().FSDP1(model, optimizer)
    if salt == "truth":
        for _ in range(2):
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        opened(tmp).save(nn.Module(), None, to(), extra_state={"fsdp": stateful})
    else:
        opened(tmp).load(nn.Module(), None, at(load_rng_state=False), extra_state={"fsdp": stateful})
    state = stateful.state_dict()
    parts = state["model"], *state["optimizer"]["state"].values()
    return optimizer.param_groups[0]["lr"], [(name, whole(t)) for part in parts for name, t in part.items()]


@pytest.mark.parametrize("stop", [7, 10])  # in the middle of an epoch, and at its end
def test_a_trainer_of_hugging_face_resumes_with_the_losses_and_weights_of_one_never_stopped(tmp_path, stop):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def fit(directory, last=None):
        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop |= state.global_step == last

        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=0.2)
        model = transformers.LlamaForCausalLM(config)
        data = [{"input_ids": torch.arange(8) * n % 32, "labels": torch.arange(8)} for n in range(40)]
        how = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        how |= {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 4}
        arguments = transformers.TrainingArguments(str(tmp_path / directory), **how)
        trainer = ckpt_trainer()(model, arguments, train_dataset=data, callbacks=[Stop])
        trainer.train(trainer.newest())
        logged = trainer.state.log_history[:-1]  # but for the time that it took
        return logged, state_of(model, trainer.optimizer), trainer.lr_scheduler.state_dict()

    uninterrupted = fit("whole")
    assert len(fit("stopped", stop)[0]) == stop
    assert identical(fit("stopped"), uninterrupted) and len(uninterrupted[0]) == 20


@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning_resumes_by_the_callback_as_if_it_had_never_stopped(tmp_path, ranks):
    pytest.importorskip("lightning")
    run(ranks, resume_with_lightning, tmp_path)


def resume_with_lightning(rank, world_size, tmp):
    """Four epochs at once give what two and two give: in one process without a group, or by FSDP2."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    os.chdir(tmp)
    how = {"accelerator": "cpu", "devices": world_size, "enable_checkpointing": False}
    how |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    os.environ["LOCAL_RANK"] = str(rank)  # else Lightning starts the other ranks
    if world_size == 1:
        dist.destroy_process_group()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
            self.losses = []

        def configure_model(self):
            if world_size > 1:
                fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, index):
            loss = self.layers(batch).square().mean()
            self.losses.append((self.trainer.global_step, self.current_epoch, index, loss.item()))
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    def fit(directory, epochs=4):
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(torch.arange(320.0).view(40, 8) / 320, batch_size=4, shuffle=True)
        callback = lightning_callback()(ckpt.DistributedCheckpoint(storage=directory))
        strategy, module = "auto" if world_size == 1 else ModelParallelStrategy(world_size, 1), Module()
        trainer = lightning.Trainer(callbacks=[callback], strategy=strategy, max_epochs=epochs, **how)
        trainer.fit(module, data)
        rates = [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs]
        weights = [whole(tensor) for tensor in module.state_dict().values()]
        return module.losses, (weights, moments(trainer.optimizers[0]), rates)

    losses, end = fit("whole")
    (first, _), (later, resumed) = fit("stopped", 2), fit("stopped")
    assert len(losses) == 40 // world_size and first + later == losses and resumed == end


@pytest.fixture(params=["memory", "s3"])
def bucket(request, tmp_path, monkeypatch):
    """An object store of the README's recipe: in the memory of this process, or on a real S3 server."""
    pytest.importorskip("fsspec")
    if request.param == "memory":
        yield ObjectStorage(f"memory://{tmp_path.name}")
        return
    why = "needs moto[server] and s3fs, which .ci/run installs"
    s3fs, moto = (pytest.importorskip(name, reason=why) for name in ("s3fs", "moto.server"))
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield ObjectStorage("s3://bucket/ckpts")
    server.stop()


def test_the_object_store_of_the_readme_saves_loads_lists_validates_collects_and_deletes(bucket):
    large = Bag(w=torch.arange(3 * MiB, dtype=torch.int32))  # several blocks: written by several threads
    alone, options = over(bucket), to("deep/large", include_rng_state=False)
    put(bucket, "old")
    putting("new", ranks=2)(bucket)  # which replaces the first
    together(2, lambda coordinator: over(bucket, coordinator).save(large, None, options))
    assert seen(bucket) == "new" and len(bucket.names("p")) == 2
    target, before = {"w": torch.zeros(3 * MiB, dtype=torch.int32)}, bucket.names()
    alone.load(target, None, at("deep/large", load_rng_state=False))
    assert identical(target, large.state) and alone.validate_checkpoint("deep/large").is_valid
    assert prefixes(alone) == ["p", "deep/large"]
    for form in (CheckpointFormat.SINGLE_FILE, CheckpointFormat.CONSOLIDATED):
        refusal(lambda: put(bucket, "next", format=form), "SAVE_FAILED", "MULTI_SHARD")
    refusal(lambda: put(bucket, "next", overwrite=False), None, "exists")
    assert bucket.names() == before and seen(bucket) == "new"
    left = ["p.metadata.json.0badf00d.tmp", "p/0badf00d-00000-of-00001.safetensors"]
    for name in left:
        bucket.create(name)
    while bucket.age_s(left[0]) < 1.0:  # the clock of S3 has whole seconds
        time.sleep(0.05)
    assert st.collect_garbage(bucket) == [] and bucket.names() == sorted([*before, *left])
    assert st.collect_garbage(bucket, 0.5) == left and bucket.names() == before
    content = bucket.fs.cat_file(name := bucket.names("p")[0])
    bucket.fs.pipe_file(name, content[:-1] + bytes([content[-1] ^ 1]))
    assert not alone.validate_checkpoint("p").is_valid and "CORRUPTED" in seen(bucket)
    for prefix in ("p", "deep/large"):
        alone.delete_checkpoint(prefix)
    assert bucket.names() == []


def test_checkers_like_the_readmes_refuse_unless_skipped_but_checksums_are_never_skipped(tmp_path):
    finite, ran = Finite(), []
    finite.check_integrity = lambda *given: ran.append(given) or Finite.check_integrity(finite, *given)
    integrity = [finite, ckpt.ChecksumIntegrityChecker()]  # the second: at every load, of every byte
    checkpoint = opened(tmp_path, integrity_checkers=integrity, compatibility_checkers=[SameArchitecture()])
    for prefix, number, version, why in (
        ("good", 1.0, "v2", ""),
        ("bad", math.nan, "v2", "model/w is not finite"),
        ("other", 1.0, "v1", "architecture 'v1'"),
    ):
        target, saved = ({"w": torch.tensor([n]), "none": torch.zeros(0)} for n in (0.0, number))
        checkpoint.save(saved, None, to(prefix, custom_metadata={"architecture": version}))
        load = functools.partial(checkpoint.load, target, None)
        kind, _, message = outcome_of(lambda: load(at(prefix)))
        assert kind == ("VALIDATION_FAILED" if why else "returned") and why in str(message)
        assert target["w"].item() == (0.0 if why else 1.0)
        report, skip = checkpoint.validate_checkpoint(prefix), at(prefix, skip_validation=True)
        assert report.is_valid == (not why) and why in report.get_summary() and ran
        ran.clear()
        load(skip)
        assert identical(target, saved) and not ran
        flip(path := shards(tmp_path, prefix)[0], Shard(path).data_at)
        refusal(lambda: load(skip), "CORRUPTED_CHECKPOINT")


@pytest.mark.parametrize("form", FORMATS)
@on_ranks(2)
def test_progress_reaches_its_total_in_one_thread_and_what_it_raises_on_one_rank_fails_all(rank, ram, form):
    """And a coordinator that has only the five documented methods is enough."""
    calls, torchs = {}, ckpt.TorchCoordinator()
    methods = ("rank", "world_size", "all_gather", "barrier", "broadcast")
    five = types.SimpleNamespace(**{name: getattr(torchs, name) for name in methods})
    assert isinstance(five, ckpt.DistributedCoordinator)

    def model(number):
        replica = Bag(w=torch.full((3 * MiB,), number), odd=torch.zeros(5).byte())  # leaves a gap
        layers = fully_shard(filled(nn.Linear(3, 5), number))
        return {"layers": layers, "replica": replica, "own": Bag(x=torch.full((MiB,), number + rank))}

    def note(*what):
        return lambda at: calls.setdefault(what, []).append((at, threading.get_ident()))

    truth = model(1.0)
    for coordinator, levels in ((torchs, LEVELS), (five, LEVELS[:1])):
        checkpoint = opened(ram, coordinator)
        for level in levels:
            told = note("S4 write", level, type(coordinator))
            checkpoint.save(truth, None, to(format=form, compression_level=level, progress=told))
            for strategy in STRATEGIES:
                found, told = model(0.0), note("L4 read", level, type(coordinator), strategy)
                checkpoint.load(found, None, at(resharding_strategy=strategy, progress=told))
                assert all(identical(found[key].state_dict(), truth[key].state_dict()) for key in truth)
        fails = {"progress": (lambda _: 1 / 0) if rank else None}
        for kind, call in (
            ("SAVE_FAILED", lambda: checkpoint.save(truth, None, to("q", format=form, **fails))),
            ("LOAD_FAILED", lambda: checkpoint.load(found, None, at(**fails))),
        ):
            *failure, message = outcome_of(call)
            assert failure == [kind, 1] and "progress raised ZeroDivisionError" in message
        assert set(listing(ram)) == set(own_files(ram, "p"))
        dist.barrier()
    told = note("S4 write", "later")
    checkpoint.save_async(truth, None, to("later", format=form, progress=told)).result()
    for what, seen in calls.items():
        done, totals = [at.bytes_done for at, _ in seen], {at.bytes_total for at, _ in seen}
        assert done == sorted(done) and {done[-1]} == totals and done[-1] > 0, (what, seen[-1], totals)
        assert {at.step for at, _ in seen} == {what[0]} and len({thread for _, thread in seen}) == 1
        assert LEVELS[0] not in what or done[-1] > 4 * MiB, "every byte counts, and so do those of `own`"


@on_ranks(2)
def test_warnings_are_printed_and_once_asked_for_a_line_for_each_save_and_load_on_rank_zero(rank, ram):
    checkpoint, bag, error = opened(ram), Bag(w=torch.zeros(8 * MiB)), io.StringIO()
    options = to("step_10", format="consolidated", compression_level="fast")  # which warns
    with contextlib.redirect_stderr(error):
        for _ in range(2):
            checkpoint.save(bag, None, options)
            checkpoint.load(bag, None, "step_10")
            logging.basicConfig(level=logging.INFO)  # the first time nobody has asked for more than warnings
            checkpoint.logger.setLevel(logging.DEBUG)
    size = f"{sum(path.stat().st_size for path in shards(ram, 'step_10')) / 1e6:.2f} MB"
    level, saved = ("DEBUG", "16.79 MB by rank 1") if rank else ("INFO", f"{size} by 2 rank(s)")
    saved = f"{level}:ckpt:saved step_10: {saved} in T s, R B/s (S1 T S2 T S3 T S4 T S5 T S6 T S7 T)"
    loaded = f"{level}:ckpt:loaded step_10: 33.55 MB of {size} to rank {rank} of 2 in T s, R B/s"
    said = re.sub(r"\d+(\.\d\d)? [kMG]?B/s", "R B/s", re.sub(r"\d+\.\d{3}\b", "T", error.getvalue()))
    *warned, first, second = said.splitlines()
    assert [first, second] == [saved, f"{loaded} (L1 T L2 T L3 T L4 T L5 T)"]
    assert [line.partition(": ")[0] for line in warned] == (["step_10", "WARNING:ckpt:step_10"], [])[rank]
    (example,) = re.findall(r"`(INFO:ckpt:.*?) \.\.\.`", README)
    assert rank or saved.startswith(re.sub(r"[\d.]+ kB", size, example))


def test_what_the_readme_says_of_dcp_is_there_in_torch():
    from torch.distributed.checkpoint import format_utils, state_dict

    table = README.partition("## Moving from DCP")[2].partition("\n## ")[0]
    column = "\n".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE))
    calls = re.findall(r"(?:dcp\.)?(\w+)\((.*?)\)(?=`|,)", column)
    assert {"save", "load", "async_save", "set_state_dict", "DefaultLoadPlanner"} <= dict(calls).keys()
    for name, arguments in calls:
        (thing,) = {vars(module)[name] for module in (dcp, format_utils, state_dict) if name in vars(module)}
        assert set(re.findall(r"(\w+)=", arguments)) <= set(inspect.signature(thing).parameters), name


@on_ranks(2)
def test_a_checkpoint_moves_from_dcp_as_the_readme_says_and_the_calls_do_the_same(rank, tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    models = [fully_shard(small(salt)[0]) for salt in ("truth", "other", "third")]
    truth = models[0], stepped(models[0])
    other, third = ((model, torch.optim.AdamW(model.parameters())) for model in models[1:])
    m, o = get_state_dict(*truth)
    dcp.save({"model": m, "optim": o, "epoch": 3}, checkpoint_id=tmp_path / "dcp")
    m, o = get_state_dict(*other)
    state = {"model": m, "optim": o, "epoch": 0}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    set_state_dict(*other, model_state_dict=state["model"], optim_state_dict=state["optim"])
    checkpoint = opened(tmp_path)
    checkpoint.save(*other, to(), extra_state={"epoch": state["epoch"]})
    assert checkpoint.load(*third, at()).extra_state == {"epoch": 3}
    assert identical(state_of(*other), state_of(*truth)) and identical(state_of(*third), state_of(*truth))


# ---- faults: every row of the matrix in the header; at each, a reader sees old or new, whole ---------------

WORDS = ("old", "new", "next", "other")


def value(word, tensors=2):
    """A tiny model whose every byte tells the word that it stands for; two ranks write some of it each."""
    number = float(WORDS.index(word) + 1)
    return Bag(**{f"w{n}": torch.full((4 + n,), number) for n in range(tensors)})


def over(storage, coordinator=None, attempts=1, keep_last=None):
    """The library on a storage (or a directory), trying `attempts` times without much delay."""
    storage = ckpt.LocalStorage(storage) if isinstance(storage, Path) else storage
    retry = ckpt.RetryPolicy(max_retries=attempts, initial_delay=0.001, max_delay=0.002)
    handler = ckpt.FaultToleranceHandler(storage, retry)
    checkpoint = ckpt.DistributedCheckpoint(coordinator or ckpt.LocalCoordinator(), storage, handler)
    checkpoint.keep_last = keep_last
    return checkpoint


def put(storage, word, prefix="p", tensors=2, coordinator=None, attempts=1, keep_last=None, **options):
    """Save a word."""
    checkpoint, extra = over(storage, coordinator, attempts, keep_last), options.pop("extra", None)
    options = to(prefix, include_rng_state=False, **options)
    return checkpoint.save(value(word, tensors), None, options, extra_state=extra)


def putting(word, prefix="p", ranks=0, **options):
    """A function of a storage that saves a word, from so many threads as ranks, if from any."""

    def act(storage):
        if not ranks:
            return put(storage, word, prefix, **options)
        return together(ranks, lambda c: put(storage, word, prefix, coordinator=c, **options))[0]

    return act


def drop(storage, prefix="p"):
    over(storage).delete_checkpoint(prefix)


def in_turn(*acts):
    return lambda storage: [act(storage) for act in acts]


def seen(storage, prefix="p", tensors=2, **options):
    """Oracle O: the word that a reader finds whole at `prefix`, "absent", or what else came out."""
    target = Bag(**{name: torch.zeros_like(t) for name, t in value("old", tensors).state.items()})
    try:
        over(storage).load(target, None, at(prefix, load_rng_state=False, **options))
    except CheckpointException as error:
        return "absent" if "there is no checkpoint" in str(error) else f"{error.type.name}: {error}"
    return next((word for word in WORDS if identical(target.state, value(word, tensors).state)), "a mix")


def fences(tmp):
    """The fences below `tmp`, those of probes for the age of others included."""
    return sorted(Path(tmp).rglob("*.metadata.json.*.tmp"))


def make_old(tmp, hours=25):
    """Make every fence as old as that of a save that counts as abandoned."""
    for path in fences(tmp):
        os.utime(path, (time.time() - 3600 * hours,) * 2)


def check_recovery(tmp, prefixes=("p",), context=""):
    """After a day, `gc` leaves only what records name, what is listed loads, and a save succeeds.

    Before that day is over, `gc` takes nothing of a save that still has its fence.
    """
    storage, before = ckpt.LocalStorage(tmp), set(listing(tmp))
    alive = {path.name.split(".")[-2] for path in fences(tmp) if time.time() - path.stat().st_mtime < 86400}
    st.collect_garbage(storage)
    gone = before - set(listing(tmp))
    assert not [name for name in gone if alive & set(re.findall("[0-9a-f]{8}", name))], (gone, context)
    make_old(tmp)
    st.collect_garbage(storage)
    listed = {info.prefix for info in over(storage).list_checkpoints()}
    assert listed == {prefix for prefix in prefixes if seen(storage, prefix) in WORDS}, context
    assert set(listing(tmp)) == named_files(tmp), context
    put(storage, "next")
    assert seen(storage) == "next" and over(storage).validate_checkpoint("p").is_valid, context
    assert set(listing(tmp)) == named_files(tmp), context


def own_files(tmp, prefix):
    """The record of a prefix, and the files that it names."""
    text = (Path(tmp) / f"{prefix}.metadata.json").read_text(errors="replace")
    names = re.findall(r'"([0-9a-f]{8}[^"]*\.safetensors)"', text)
    return [f"{prefix}.metadata.json", *(f"{prefix}/{name}" for name in names)]


def named_files(tmp):
    """The records below `tmp`, and the shards that they name."""
    records = (str(path.relative_to(tmp)) for path in Path(tmp).rglob("*.metadata.json"))
    return {name for path in records for name in own_files(tmp, path.removesuffix(".metadata.json"))}


class Scene(NamedTuple):
    """Something done to checkpoints: how it begins, what is done, and what readers see.

    At each prefix a reader may see any of its words, and once `act` has returned, only the last.
    """

    before: Callable
    act: Callable
    words: dict


nothing = in_turn()


def _leave_orphans(storage):
    """A checkpoint, and beside it what a crashed overwrite leaves."""
    base = Path(storage.base_path)
    put(storage, "old")
    put(storage, "other", "q")
    (shard,) = shards(base, "q")
    shutil.copy(shard, base / "p")
    (base / "q.metadata.json").rename(base / f"p.metadata.json.{shard.name[:8]}.tmp")
    make_old(base)


def _overwrite(**options):
    return Scene(putting("old", **options), putting("new", **options), {"p": ("old", "new")})


TWO_OTHERS = in_turn(putting("old", "q"), putting("other", "r"))
FIRST, DELETED = {"p": ("absent", "new")}, {"p": ("old", "absent")}
RETAINED = {"q": ("old", "absent"), "r": ("other", "absent")} | FIRST  # in the order that they are read
SCENES = {
    "save": Scene(nothing, putting("new"), FIRST),
    "save, overwrite=False": Scene(nothing, putting("new", overwrite=False), FIRST),
    "overwrite": _overwrite(),
    "overwrite a single file": _overwrite(format="single_file"),
    "overwrite a consolidated one": _overwrite(format="consolidated"),
    "delete": Scene(putting("old"), drop, DELETED),
    "retention": Scene(TWO_OTHERS, putting("new", keep_last=1), RETAINED),
    "gc": Scene(_leave_orphans, st.collect_garbage, {"p": ("old",), "q": ("absent",)}),
}
PREFIXES = ("p", "q", "r")


def begun(tmp, before):
    """A directory below `tmp` in the state that `before(storage)` makes."""
    (base := tmp / "base").mkdir(parents=True)
    before(ckpt.LocalStorage(base))
    return base


def check_oracle(storage, scene, returned, context):
    check_words(scene, {prefix: seen(storage, prefix) for prefix in scene.words}, returned, context)


def check_words(scene, found, returned, context):
    """What was found at each prefix is allowed, while the scene's act runs or once it has `returned`."""
    for prefix, words in scene.words.items():
        assert found[prefix] in (words[-1:] if returned else words), (found, context)
    if scene.words is RETAINED:  # the older ones go only once the new one is there
        assert found["p"] == "new" or found["q"] == "old", (found, context)


# Row 1, 3: a real process ends at operation k
def at_each_operation(tmp, before, main, act, when=lambda op: True, until=None):
    """Run `main(storage)` with `act(op, storage)` before its operation k, for each k in turn.

    Yields the outcome of `main`, its directory, which begins as `before(storage)` leaves it, and its seam.
    The last k is beyond the last operation: nothing is hit.
    """
    base = begun(tmp, before)
    for k in itertools.count():
        left = tmp / str(k)
        shutil.copytree(base, left)
        files = Seam(Strike(k, lambda op: act(op, ckpt.LocalStorage(left)), when, until))
        try:
            outcome = outcome_of(lambda: main(Storage(left, files)))
        except OSError as error:
            outcome = "OSError", None, str(error)
        yield outcome, left, files
        shutil.rmtree(left)
        if files.before.hit is None:
            assert k or when is is_change  # a clean-up may find nothing to change
            return


def forked(act, limit_s=HANG_S):
    """The exit code of a fork of this process that runs `act()`; one that hangs is killed."""
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(limit_s)
    process.kill()
    process.join()
    return process.exitcode


CRASHED = 42


def crash_everywhere(tmp, before, act, strike=lambda *_: os._exit(CRASHED), ends=CRASHED, when=is_change):
    """`act(storage)` in a process that ends at change k, for each k. Yields if it did, and what it left."""

    def main(storage):
        code = forked(lambda: act(storage))
        assert code in (0, ends), f"exit code {code}"
        storage.seam.before.hit = code or None  # which only the fork knows

    for _, left, files in at_each_operation(tmp, before, main, strike, when):
        yield bool(files.before.hit), left


CLEANERS = {
    "gc": st.collect_garbage,
    "delete": lambda s: outcome_of(lambda: drop(s)),
    "retention": putting("other", "z", keep_last=1),
}
CRASHES = [*itertools.product(SCENES, [None]), *itertools.product(["overwrite"], CLEANERS)]


@pytest.mark.parametrize("name, cleaner", CRASHES)
@isolated("crash points", 3 * HANG_S)
def test_a_process_that_ends_at_any_operation_leaves_old_or_new_whole(ram, name, cleaner):
    """With a `cleaner`, which runs after a crash, its process ends at any operation, too."""
    scene, points, known = SCENES[name], 0, set()
    for crashed, left in crash_everywhere(ram, scene.before, scene.act):
        context = name, f"crash at change {points}"
        check_oracle(left, scene, not crashed, context)
        points += crashed
        state = seen(left), *(re.sub("[0-9a-f]{8}", "id", file) for file in listing(left))
        if cleaner and state not in known:  # else the same files as after the change before
            known.add(state)
            copied = functools.partial(shutil.copytree, left, dirs_exist_ok=True)
            again, clean = ram / f"again-{points}", CLEANERS[cleaner]
            for crashed_too, twice in crash_everywhere(again, lambda s: copied(s.base_path), clean):
                points += crashed_too
                assert seen(twice) in ("old", "new", *["absent"] * (cleaner != "gc")), context
                clean(ckpt.LocalStorage(twice))
                assert cleaner == "gc" or seen(twice) == "absent", context
                check_recovery(twice, ("p", "z"), context)
        check_recovery(left, PREFIXES, context)
    return points


# Row 3, 4, 5, 6, 29: an error code at operation k
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("until", [None, FOREVER], ids=["once", "from then on"])
@pytest.mark.parametrize("name", SCENES)
def test_an_error_at_any_operation_is_typed_and_leaves_no_trace_or_does_not_matter(ram, name, until, code):
    scene, fault = SCENES[name], fail(code)
    failing = at_each_operation(ram, scene.before, scene.act, lambda op, _: fault(op), until=until)
    for (kind, _, message), left, files in failing:
        hit, returned = files.before.hit, kind == "returned"
        context = name, hit, kind, message
        assert kind in ("returned", "OSError" if name == "gc" else "STORAGE_ERROR"), context
        check_oracle(left, scene, hit is None, context)
        if kind != "returned" and not until and hit.call in ("pwrite", "allocate"):
            assert re.search(r"(No space left|Input/output error).*: 'p[/.]", message), context
        if name not in ("gc", "delete"):
            assert seen(left) == scene.words["p"][returned], context
            assert returned or until or set(listing(left)) == set(listing(ram / "base")), context
        check_recovery(left, PREFIXES, context)
        COUNTS["failed operations"] += hit is not None


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fsync_dir", "close"])
def test_a_file_whose_write_or_sync_failed_is_never_synced_again_but_replaced_under_a_new_save_id(ram, call):
    fault, old, new = fail(errno.EIO), putting("old"), putting("new", attempts=3)
    saves = at_each_operation(ram, old, new, lambda op, _: fault(op), lambda op: op.call == call)
    for (kind, _, _), left, files in saves:
        assert seen(left) == ("new" if kind == "returned" else "old")
        if hit := files.before.hit:
            later = files.log[next(number for number, op in enumerate(files.log) if op is hit) :]
            synced = [op.path for op in later[1:] if op.call == "fsync"]
            assert call == "fsync_dir" or hit.path not in synced, hit
            ids = {Path(op.path).name[:8] for op in files.log if is_new_shard(op)}
            assert len(ids) <= 2
            if call in ("pwrite", "fsync"):
                assert len(ids) == 2 or ".tmp" in hit.path, hit
                assert kind == "returned" and any(map(is_new_shard, later)), (hit, kind)


@pytest.mark.parametrize("code, attempts", [(errno.ENOSPC, 3), (errno.EDQUOT, 1)])
@pytest.mark.parametrize("form", FORMATS)
def test_a_disk_that_is_full_from_byte_n_on_stops_all_ranks_after_bounded_attempts(ram, form, code, attempts):
    class Full(Seam):
        """A disk with room for `left` more bytes: a write that does not fit is short, the next one fails."""

        left, taking = FOREVER, threading.Lock()

        def pwrite(self, fd, data, offset):
            with self.taking:
                if self.left <= 0:
                    fail(code)(Op("pwrite", self.paths[fd]))
                self.left -= (count := super().pwrite(fd, data[: self.left], offset))
                return count

    unlimited, how = Storage(ram / "unlimited"), {"attempts": attempts, "format": form}
    putting("new", ranks=2, **how)(unlimited)
    needed = sum(len(op.data) for op in unlimited.seam.log)
    for room in [0, 1, 511, *range(4096, needed, 999), needed - 1]:
        tmp, files = ram / str(room), Full()
        put(tmp, "old")
        before, files.left, storage = set(listing(tmp)), room, Storage(tmp, files)
        outcomes = together(2, lambda c: outcome_of(lambda: put(storage, "new", coordinator=c, **how)))
        assert {kind for kind, _, _ in outcomes} == {"STORAGE_ERROR"}, outcomes
        assert seen(tmp) == "old" and set(listing(tmp)) == before
        assert sum(map(is_new_shard, files.log)) <= attempts * sum(map(is_new_shard, unlimited.seam.log))
        check_recovery(tmp)


@pytest.mark.parametrize("call, overwrite", [("rename", True), ("link", False), ("unlink", False)])
@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR, errno.ESTALE], ids=errno.errorcode.get)
def test_a_rename_that_reports_an_error_but_happened_is_a_success(ram, call, overwrite, code):
    files = Seam(after=Strike(0, fail(code), lambda op: op.call == call))
    assert put(Storage(ram, files), "new", overwrite=overwrite) == "p"
    assert files.after.hit and seen(ram) == "new"
    check_recovery(ram)


# Ranks that are threads of this process: their file operations come through one seam, in one log
class ThreadRank:
    """A coordinator for one of several threads, with the five methods that any coordinator has."""

    def __init__(self, shared, rank, world_size):
        self.shared, self.rank, self.world_size = shared, rank, world_size

    def all_gather(self, value, timeout=600.0):
        met, values = self.shared
        values[self.rank] = copy.deepcopy(value)
        met.wait(timeout)
        found = list(values)
        met.wait(timeout)  # before a rank begins the next one
        return found

    def barrier(self, timeout=600.0):
        self.all_gather(None, timeout)

    def broadcast(self, value, src=0, timeout=600.0):
        return self.all_gather(value, timeout)[src]


def together(world_size, body, limit_s=HANG_S):
    """`body(coordinator)` in a thread for each rank; the results in the order of ranks."""
    shared = threading.Barrier(world_size), [None] * world_size
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(body, ThreadRank(shared, rank, world_size)) for rank in range(world_size)]
        return [future.result(limit_s) for future in futures]


# Row 2: what a power loss may leave
class Memory:
    """A storage that is a dict of bytes, all of one age, and that remembers which files were asked for."""

    def __init__(self, files, age=0.0):
        self.files, self.asked, self.age = dict(files), set(), age

    def _require(self, name, present):
        if (name in self.files) != present:
            code = errno.ENOENT if present else errno.EEXIST
            raise OSError(code, os.strerror(code), name)

    def create(self, name):
        self._require(name, False)
        self.files[name] = b""
        return MemoryFile(self.files, name)

    def open(self, name, write=False):
        self.asked.add(name)
        self._require(name, True)
        return MemoryFile(self.files, name)

    def length(self, name):
        self.asked.add(name)
        return len(self.files[name]) if name in self.files else None

    def names(self, directory=""):
        return sorted(name for name in self.files if not directory or name.startswith(directory + "/"))

    def publish(self, temporary, name, overwrite):
        overwrite or self._require(name, False)
        self.files[name] = self.files.pop(temporary)

    def delete(self, name):
        return self.files.pop(name, None) is not None

    def sync_directory(self, name):
        pass

    def age_s(self, name):
        self._require(name, True)
        return self.age


class MemoryFile(NamedTuple):
    files: dict
    name: str

    def read(self, offset, buffer):
        data = self.files[self.name][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise CheckpointException(f"{self.name}: too short", type=ExceptionType.CORRUPTED_CHECKPOINT)
        buffer[:] = data

    def write(self, offset, data):
        self.files[self.name] = patched(self.files[self.name], offset, bytes(data))

    def length(self):
        return len(self.files[self.name])

    def resize(self, length):
        self.files[self.name] = resized(self.files[self.name], length)

    def sync(self):
        pass

    close = sync


def patched(content, offset, data):
    """`content` after a write at `offset`."""
    return resized(content, max(offset, len(content)))[:offset] + data + content[offset + len(data) :]


def resized(content, length):
    return content[:length].ljust(length, b"\0")


class PowerLoss:
    """A disk as it may be found after a power loss, worked out from the operations on it so far.

    Only what was synced is sure: a file's content by fsync of the file, a name by fsync of its directory.
    Changes of names not yet synced survive in any subset, the earlier or the later ones winning. Writes not
    yet synced survive in any subset, the last one torn at any 512 bytes, or as zeros.
    """

    def __init__(self, base):
        self.base, self.numbers = str(base), itertools.count()
        self.names, self.pending = {}, []
        self.synced, self.unsynced = {}, {}  # by file number; a directory has the content None
        for path in Path(base).rglob("*"):
            self.names[str(path.relative_to(base))] = number = next(self.numbers)
            self.synced[number] = None if path.is_dir() else path.read_bytes()
        self.sure = dict(self.names)

    def apply(self, op):
        path, target = (p.removeprefix(self.base).lstrip("/") for p in (op.path, op.target))
        number = self.names.get(path)
        if op.call in ("create", "mkdir") and number is None and op.path != self.base:
            number = next(self.numbers)
            self.synced[number] = None if op.call == "mkdir" else b""
            self._rename({path: number})
        elif op.call == "fsync_dir" and op.path.startswith(self.base):
            for change in [c for c in self.pending if next(iter(c)).rpartition("/")[0] == path]:
                self.sure.update(change)
                self.pending.remove(change)
        elif number is None:
            return
        elif op.call in ("pwrite", "truncate", "allocate"):
            self.unsynced.setdefault(number, []).append(op)
        elif op.call == "fsync":
            self.synced[number] = self._written(self.synced[number], self.unsynced.pop(number, []))
        elif op.call in ("rename", "link"):
            self._rename({target: number} | ({path: None} if op.call == "rename" else {}))
        elif op.call in ("unlink", "rmdir"):
            self._rename({path: None})

    def _rename(self, change):
        self.names.update(change)
        self.pending.append(change)

    @staticmethod
    def _written(content, ops):
        for op in ops:
            write = op.call == "pwrite"
            content = patched(content, op.offset, op.data) if write else resized(content, op.offset)
        return content

    def _contents(self, number):
        """Every content that a file may have."""
        start, ops = self.synced[number], self.unsynced.get(number, [])
        found = {start, self._written(start, ops)}
        for chosen in subsets(ops):
            zeros = [op._replace(data=bytes(len(op.data))) for op in chosen]
            found |= {self._written(start, chosen), self._written(start, zeros)}
            for tear in range(512, len(chosen[-1].data) if chosen else 0, 512):
                torn = chosen[-1]._replace(data=chosen[-1].data[:tear])
                found.add(self._written(start, [*chosen[:-1], torn]))
        return found

    def _files(self, changes):
        """The names of files, with their numbers, if of the pending changes of names these have survived."""
        names = functools.reduce(dict.__or__, changes, self.sure)
        there = {path for path, number in names.items() if number is not None}
        for path in sorted(there):  # what is in a directory that is not there is not there
            if "/" in path and path.rpartition("/")[0] not in there:
                there.remove(path)
        return tuple((path, names[path]) for path in sorted(there) if self.synced[names[path]] is not None)

    def states(self):
        """Every state, as a set of (name, content)."""
        contents = functools.cache(self._contents)
        orders = (order for chosen in subsets(self.pending) for order in (chosen, chosen[::-1]))
        for files in set(map(self._files, orders)):
            numbers = sorted({number for _, number in files})
            for mix in itertools.product(*map(contents, numbers)):
                content = dict(zip(numbers, mix))
                yield frozenset((path, content[number]) for path, number in files)


def subsets(items):
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


def check_power_loss(tmp, scene, tensors=2):
    """Cut the power after every operation of a scene; each state that may be left obeys oracle O.

    So does what a reader sees before every operation. The distinct states.
    """
    base = begun(tmp, scene.before)
    model, reads, visited, known = PowerLoss(base), [], set(), {prefix: {} for prefix in scene.words}

    def verdict(prefix, state):
        """The oracle's. It depends only on the files asked for, so each of their states is tried once."""
        for names, verdicts in known[prefix].items():
            if (found := verdicts.get(tuple(map(state.get, names)))) is not None:
                return found
        found, names = seen(storage := Memory(state), prefix, tensors), tuple(sorted(storage.asked))
        return known[prefix].setdefault(names, {}).setdefault(tuple(map(state.get, names)), found)

    def read(op):
        reads.append((op, {prefix: seen(Storage(base), prefix, tensors) for prefix in scene.words}))

    scene.act(Storage(base, files := Seam(read)))
    log = [op for op in files.done if op.call in CHANGES]
    for done in range(len(log) + 1):
        if done:
            model.apply(log[done - 1])
        for state in model.states():
            if state not in visited or done == len(log):
                visited.add(state)
                found = {prefix: verdict(prefix, dict(state)) for prefix in scene.words}
                check_words(scene, found, done == len(log), (log[:done][-5:], sorted(dict(state))))
    for op, found in reads:
        check_words(scene, found, False, op)
    COUNTS["reads between operations"] += len(reads)
    COUNTS["power-loss states"] += len(visited)
    return visited


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 4 KiB, in units of half of it, so that a few KiB take several writes by several threads."""
    monkeypatch.setattr(st, "BLOCK_BYTES", PAGE)
    monkeypatch.setattr(st, "UNIT_BYTES", PAGE // 2)


def _save_deep(storage):
    put(Storage(f"{storage.base_path}/{DEEP}", storage.seam), "new")


def losses(ranks):
    """What ranks do when the power is lost: name, scene, number of tensors."""
    old, new, other = (functools.partial(putting, word, ranks=ranks) for word in ("old", "new", "other"))
    second, extra = {"p": ("old", "new")}, {"word": "new", "n": [1, 2]}
    for form, tensors in itertools.product(FORMATS, (1, 2, 3)):
        options = {"format": form, "tensors": tensors}
        yield f"first {form.name} of {tensors}", Scene(nothing, new(**options), FIRST), tensors
        yield f"{form.name} of {tensors}", Scene(old(**options), new(**options), second), tensors
    for form in FORMATS:
        for level in (ckpt.CompressionLevel.FAST, ckpt.CompressionLevel.MAXIMUM):
            smaller = new(format=form, compression_level=level)
            yield f"{form.name}, {level.name}", Scene(old(), smaller, second), 2
        yield f"{form.name}, overwrite=False", Scene(nothing, new(overwrite=False, format=form), FIRST), 2
        before, after = (act("run/a/b", format=form) for act in (old, new))
        yield f"{form.name}, deeper", Scene(before, after, {"run/a/b": ("old", "new")}), 2
    yield "extra state", Scene(old(), new(extra=extra), second), 2
    yield "extra state, compressed", Scene(nothing, new(extra=extra, compression_level="fast"), FIRST), 2
    yield "two in a row", Scene(old(), in_turn(other("q"), new()), second | {"q": ("absent", "other")}), 2
    yield "delete", Scene(old(), drop, DELETED), 2
    yield "retention", Scene(in_turn(old("q"), other("r")), new(keep_last=1), RETAINED), 2


LOSSES = {f"{name}, {ranks} rank(s)": loss for ranks in (1, 2, 3) for name, *loss in losses(ranks)}
LOSSES["gc"] = SCENES["gc"], 2
DEEP = "made/on/the/way"
LOSSES["into a new deep directory"] = Scene(nothing, _save_deep, {f"{DEEP}/p": FIRST["p"]}), 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_power_loss_at_any_moment_leaves_old_or_new_as_a_reader_sees(ram, tiny_blocks, loss):
    """Clean-up, and the next save, are tried on real files, from some of the states."""
    scene, tensors = LOSSES[loss]
    states = sorted(check_power_loss(ram, scene, tensors), key=sorted)
    most = 10 if tensors == 2 and loss != "gc" else 0
    for state in random.Random(1).sample(states, min(len(states), most)):
        for name, content in state:
            (path := ram / "left" / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        check_recovery(ram / "left", {"p", *scene.words})
        shutil.rmtree(ram / "left")


# Row 7: short reads and writes
@for_each(form=FORMATS, cap=[1, 7, 4095, "in memory"])
def test_short_reads_and_writes_or_another_kind_of_storage_change_nothing(ram, cap, form):
    storage = Memory({}) if cap == "in memory" else Storage(ram, Seam(cap=cap))
    assert isinstance(storage, ckpt.CheckpointStorage)
    for word in ("old", "new"):
        put(storage, word, format=form)
        assert seen(storage) == word and over(storage).validate_checkpoint("p").is_valid
    assert cap == "in memory" or seen(ram) == "new"
    over(storage).delete_checkpoint("p")
    assert storage.names() == []


@isolated()
def test_signals_that_interrupt_system_calls_change_nothing(tmp_path):
    interrupts, checkpoint = [], opened(tmp_path)
    bag, other = (Bag(w=torch.arange(start, start + 4 * MiB, dtype=torch.int32)) for start in (0, 1))
    signal.signal(signal.SIGALRM, lambda *_: interrupts.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    checkpoint.save(bag, None, to())
    checkpoint.load(other, None, at())
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert interrupts and identical(other.state, bag.state)


def test_a_read_or_write_of_more_than_the_kernel_takes_at_once_goes_on_where_it_stopped(ram):
    class Kernel(Seam):
        def pwrite(self, fd, data, offset):
            spans.append((offset, min(len(data), 0x7FFFF000)))
            return spans[-1][1]

        pread = pwrite

    memory = memoryview(mmap.mmap(-1, 0x7FFFF000 + 3 * PAGE))  # never touched, so it takes no room
    file, spans = Storage(ram, Kernel()).create("large"), []
    for call in (file.write, file.read):
        call(PAGE, memory)
    assert spans == 2 * [(PAGE, 0x7FFFF000), (PAGE + 0x7FFFF000, 3 * PAGE)]
    file.close()


def test_a_write_that_takes_nothing_is_an_error_not_a_hang(ram):
    files = Seam(Strike(1000, lambda op: 1 / 0, until=FOREVER), cap=0)
    kind, _, message = outcome_of(lambda: put(Storage(ram, files), "new"))
    assert kind == "STORAGE_ERROR" and "takes nothing more" in message and not files.before.hit, message


# Row 8: an error in any worker thread
@for_each(number=range(st.IO_THREADS), level=LEVELS[:2])
@pytest.mark.parametrize("error", [OSError(5, "bad disk"), RuntimeError("boom"), MemoryError()], ids=repr)
def test_an_error_in_any_thread_fails_the_save_and_publishes_nothing(ram, tiny_blocks, error, level, number):
    """Each of the threads is given a block; one of them fails on it."""
    put(ram, "old")
    before, met, came, failed = listing(ram), threading.Barrier(st.IO_THREADS), set(), []
    real = st.crc32 if level is ckpt.CompressionLevel.NONE else st.compress_frame

    def work(*args):
        thread = threading.current_thread().name
        if thread.startswith("ckpt-io") and thread not in came:
            came.add(thread)
            met.wait(HANG_S)
            if thread == f"ckpt-io-{number}":
                failed.append(thread)
                raise error
        return real(*args)

    options = to(compression_level=level, include_rng_state=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(st, real.__name__, work)
        kind, _, message = outcome_of(lambda: over(ram).save(numbered(0), None, options))
    assert failed and kind in ("STORAGE_ERROR", "SAVE_FAILED"), (kind, message)
    assert f"{type(error).__name__}: {error}" in message
    assert listing(ram) == before and seen(ram) == "old"


# Row 30: a worker outlives its operation
class Hung(Seam):
    """The first read or write (`call`) of data hangs until `return_late`. If `failing`, another one fails."""

    def __init__(self, call, failing=False):
        super().__init__(fail_data(1 if failing else FOREVER, call, lambda: self.reached.wait(HANG_S)))
        self.reached, self.go_on, first = threading.Event(), threading.Event(), threading.Lock()
        move = getattr(self, call)

        def hang(fd, data, offset):
            if offset < PAGE or not first.acquire(blocking=False):
                return move(fd, data, offset)
            self.worker, self.fd, self.paths[fd] = threading.current_thread(), fd, "hung"
            self.reached.set()
            assert self.go_on.wait(HANG_S)
            return move(fd, data[: len(data) // 2], offset)  # so that the library goes on with the rest

        setattr(self, call, hang)

    def return_late(self):
        """The call goes on. No file that was opened since it hung has its descriptor."""
        self.go_on.set()
        self.worker.join(HANG_S)
        assert not self.worker.is_alive() and self.paths[self.fd] == "hung"


def fail_data(number, call, wait):
    """A hook that fails the read or write of data (below a page are headers and records) of that number."""
    is_data = lambda op: op.call == call and op.offset >= PAGE  # noqa: E731
    return Strike(number, lambda op: (wait(), fail(errno.EIO)(op)), is_data)


@pytest.fixture
def impatient(tiny_blocks, monkeypatch):
    """Small blocks, and failed operations that wait for stuck threads no longer than 0.05 s."""
    monkeypatch.setattr(st, "STUCK_S", 0.05)


def numbered(salt):
    """Eight tensors of two blocks of a page, no two blocks alike, that shrink only a little."""
    generator = torch.Generator().manual_seed(salt)
    return {f"w{n}": torch.rand(2, PAGE // 4, generator=generator) for n in range(8)}


TARGETS = {
    "as saved": lambda t: t,
    "strided": lambda t: t.T.contiguous().T,
    "of another dtype": torch.Tensor.double,
}
ENDS = {"cancel": "CANCELLED", "deadline": "TIMEOUT", "interrupt": KeyboardInterrupt}
LATE_READS = [("retry", *case) for case in itertools.product(FORMATS, LEVELS[:2], TARGETS)]
LATE_READS += [(end, FORMATS[1], LEVELS[0], "as saved") for end in ENDS]


@pytest.mark.parametrize("end, form, level, target", LATE_READS)
def test_a_read_that_returns_after_its_load_changes_no_tensor(ram, impatient, end, form, level, target):
    def interrupt(progress):
        if files.reached.is_set():
            raise KeyboardInterrupt

    over(ram).save(numbered(0), None, to(format=form, compression_level=level, include_rng_state=False))
    files, other = Hung("pread", failing=end == "retry"), numbered(200)
    live = {name: TARGETS[target](t) for name, t in numbered(100).items()}
    limits = {"deadline": {"timeout": 0.5}, "interrupt": {"progress": interrupt}}.get(end, {})
    cancel, options = (
        files.reached if end == "cancel" else None,
        {"load_rng_state": False, "strict_mode": False},
    )
    checkpoint = over(Storage(ram, files), attempts=2)
    load = functools.partial(checkpoint.load, live, None, at(**options, **limits), cancel=cancel)
    if end == "retry":  # the first attempt failed, with a worker stuck
        load()
        assert files.before.hit and all(torch.equal(live[name], t) for name, t in numbered(0).items())
    else:
        refusal(load, ENDS[end])
    assert files.worker.is_alive()
    for t in live.values():
        t.mul_(3).add_(1)  # training goes on
    checkpoint.load(other, None, at(**options))
    trained = copy.deepcopy(live)
    files.return_late()
    assert identical(live, trained) and identical(other, numbered(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
@on_ranks(2)
def test_a_read_that_returns_after_all_ranks_retried_changes_nothing(rank, tmp_path, strategy):
    """A read of rank 0 hangs, one of rank 1 (or rank 0, where it reads alone) fails, both ranks retry."""
    st.BLOCK_BYTES, st.UNIT_BYTES, st.STUCK_S = 8 * PAGE, PAGE, 0.05
    truth = {f"w{n}": torch.arange(n, n + 2 * PAGE, dtype=torch.float32).view(2, -1) for n in range(8)}
    opened(tmp_path).save(truth, None, to(include_rng_state=False))
    mesh, hangs = init_device_mesh("cpu", (2,)), tmp_path / "hangs"
    live = {name: distribute_tensor(torch.zeros_like(t), mesh, [Replicate()]) for name, t in truth.items()}
    failing = rank == (strategy != "sequential")
    if rank == 0:
        files = Hung("pread", failing)
        files.reached = types.SimpleNamespace(set=hangs.touch, wait=lambda _: await_file(hangs))
    else:
        files = Seam(fail_data(0 if failing else FOREVER, "pread", lambda: await_file(hangs)))
    checkpoint = over(Storage(tmp_path, files), coord.TorchCoordinator(), attempts=2)
    checkpoint.load(live, None, at(load_rng_state=False, resharding_strategy=strategy))
    assert all(torch.equal(t.full_tensor(), truth[name]) for name, t in live.items())
    local = {name: t.to_local().mul_(3).add_(1) for name, t in live.items()}
    trained = copy.deepcopy(local)
    if rank == 0:
        files.return_late()
    assert identical(local, trained) and bool(files.before.hit) == failing


@for_each(level=LEVELS[:2], form=[*FORMATS, "export"])
def test_a_late_write_of_a_failed_save_or_export_lands_in_no_later_file(
    ram, impatient, monkeypatch, form, level
):
    def write(salt, cancel=None):
        if form == "export":
            return ckpt.export_checkpoint(ram, f"of{salt}", out / "x.safetensors")
        return checkpoint.save(numbered(salt), None, to(format=form, compression_level=level), cancel=cancel)

    files, out = Hung("pwrite", failing=form == "export"), ram / "out"
    checkpoint = over(Storage(out, files))
    if form == "export":
        for salt in (0, 200):
            options = to(f"of{salt}", include_rng_state=False, compression_level=level)
            over(ram).save(numbered(salt), None, options)
        ckpt.export_checkpoint(ram, "of200", ram / "reference.safetensors")
        out.mkdir()
        monkeypatch.setattr(ckpt, "LocalStorage", lambda folder: Storage(folder, files))
    refusal(lambda: write(0, files.reached), "STORAGE_ERROR" if form == "export" else "CANCELLED")
    assert files.worker.is_alive() and not listing(out)
    files.before = lambda op: op.call == "fsync" and files.return_late()  # while the next file is open
    write(200)
    assert files.go_on.is_set()
    files.return_late()  # again, for the files that were opened since
    if form == "export":
        assert listing(out) == {"x.safetensors": (ram / "reference.safetensors").read_bytes()}
    else:
        checkpoint.load(loaded := numbered(100), None, at())
        assert identical(loaded, numbered(200)) and checkpoint.validate_checkpoint("p").is_valid
        assert set(listing(out)) == named_files(out)


def test_a_load_ends_only_when_no_thread_copies_into_a_tensor_any_more(ram, impatient, monkeypatch):
    over(ram).save(numbered(0), None, to(include_rng_state=False))
    live, late = {name: TARGETS["strided"](t) for name, t in numbered(100).items()}, []
    reached, closing, returned = (threading.Event() for _ in range(3))
    copy_in, close = st.copy_in, st.Gate.close

    def slow(*args):
        reached.set()
        assert closing.wait(HANG_S)
        late.append(returned.wait(0.2))
        copy_in(*args)

    monkeypatch.setattr(st, "copy_in", slow)
    monkeypatch.setattr(st.Gate, "close", lambda self, *limit: closing.set() or close(self, *limit))
    load = functools.partial(over(ram).load, live, None, at(load_rng_state=False), cancel=reached)
    refusal(load, "CANCELLED")
    returned.set()
    assert late and not any(late)


# Row 22, 23, 28: others at work at the same time, who do all they do between two operations
WRITERS = {name: SCENES[name] for name in SCENES if name.startswith("overwrite") or name == "delete"}
TWICE = in_turn(putting("new"), putting("next"))
WRITERS["two overwrites"] = Scene(putting("old"), TWICE, {"p": ("old", "new", "next")})


@pytest.mark.parametrize("writer", WRITERS)
def test_a_reader_that_a_writer_overtakes_at_any_operation_sees_old_or_new_and_lists_every_other(ram, writer):
    scene, deleted = WRITERS[writer], writer == "delete"
    before = in_turn(putting("old", "a"), scene.before, putting("old", "z"))
    read = in_turn(seen, lambda s: {info.prefix for info in over(s).list_checkpoints()})
    reads = at_each_operation(ram, before, read, lambda _, storage: scene.act(storage))
    for (_, _, (found, listed)), _, files in reads:
        context = files.before.hit, found, listed
        assert found in scene.words["p"] or (deleted and found.startswith("LOAD_FAILED")), context
        assert {"a", "z"} <= listed and (deleted or "p" in listed), context
        COUNTS["reads between operations"] += bool(files.before.hit)


# What others do while "p" is saved, and what is seen of it then. Only a second save to "p" costs attempts.
OTHERS = {
    "gc": (CLEANERS["gc"], {"new"}),
    "delete": (CLEANERS["delete"], {"new", "absent"}),
    "retention": (CLEANERS["retention"], {"new", "absent"}),
    "save": (putting("other", attempts=3), {"new", "other"}),
    "save elsewhere": (putting("new", "b"), {"new"}),
    "delete elsewhere": (lambda s: drop(s, "b"), {"new"}),
}
OTHERS_OF = [*itertools.product(CLEANERS, FORMATS), *((other, FORMATS[0]) for other in list(OTHERS)[3:])]


@pytest.mark.parametrize("other, form", OTHERS_OF)
def test_what_others_do_at_any_operation_takes_nothing_from_a_save_and_it_is_the_newest(ram, form, other):
    act, words = OTHERS[other]
    olds = in_turn(*(putting("old", prefix, format=form) for prefix in "pabc"))
    save = putting("new", format=form, attempts=3 if other == "save" else 1)
    for outcome, left, files in at_each_operation(ram, olds, save, lambda _, storage: act(storage)):
        hit, found = files.before.hit, seen(left)
        assert outcome[0] == "returned" and found in words, (hit, outcome, found)
        listed = [info.prefix for info in over(left).list_checkpoints() if info.prefix not in ("b", "z")]
        kept = [] if other == "retention" and hit else ["a", "c"]
        assert listed == kept + ["p"] * (found != "absent"), (hit, found, listed)
        check_recovery(left, ("a", "b", "c", "p", "z"), hit)
        COUNTS["interleavings"] += bool(hit)


@pytest.mark.parametrize("overwrite", [True, False])
def test_two_jobs_in_lockstep_on_one_prefix_one_wins_whole(ram, overwrite):
    rng, words = random.Random(22), ("new", "other")
    for number in range(60):
        tmp = ram / str(number)

        def save(word, hook):
            return outcome_of(lambda: put(Storage(tmp, Seam(hook)), word, attempts=3, overwrite=overwrite))

        outcomes = interleaved(rng, [functools.partial(save, word) for word in words])
        winners = [word for word, (kind, _, _) in zip(words, outcomes) if kind == "returned"]
        assert winners and (overwrite or len(winners) == 1), outcomes
        assert seen(tmp) in winners, outcomes
        assert all(kind in ("returned", "SAVE_FAILED", "STORAGE_ERROR") for kind, _, _ in outcomes), outcomes
        check_recovery(tmp)
    COUNTS["interleavings"] += number + 1


def interleaved(rng, jobs):
    """Run jobs in threads of which one at a time makes one file operation, in an order that `rng` draws."""
    changed, waiting, running = threading.Condition(), set(), set(range(len(jobs)))

    def await_turn(number, done=False):
        with changed:
            (running.remove if done else waiting.add)(number)
            if waiting and waiting == running:  # all others wait too, or have ended
                waiting.remove(rng.choice(sorted(waiting)))
                changed.notify_all()
            assert changed.wait_for(lambda: number not in waiting, HANG_S)

    def work(number):
        try:
            return jobs[number](lambda op: await_turn(number))
        finally:
            await_turn(number, done=True)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(work, range(len(jobs))))


@pytest.mark.parametrize("cleaner", CLEANERS)
def test_clean_up_that_a_live_save_overtakes_at_any_operation_takes_nothing_from_it(ram, cleaner):
    """Within the clean-up a save begins, and gets to its rename, which waits until the clean-up ends."""
    saves = []

    def begin(op, storage):
        gate = Gate("rename")
        saves.append((gate, pool.submit(put, Storage(storage.base_path, Seam(gate)), "new")))
        assert gate.reached.wait(HANG_S)

    with ThreadPoolExecutor(1) as pool:
        for _, left, files in at_each_operation(ram, putting("old", tensors=1), CLEANERS[cleaner], begin):
            if files.before.hit:
                gate, save = saves.pop()
                gate.opened.set()
                assert save.result(HANG_S) == "p" and seen(left) == "new", files.before.hit
                COUNTS["interleavings"] += 1


@pytest.mark.parametrize("form", FORMATS)
def test_clean_up_keeps_a_save_whose_fence_is_young_and_takes_an_older_one(ram, caplog, form):
    base, left = ram / "base", ram / "left"
    put(base, "old", format=form)
    files = Seam(Strike(0, lambda op: shutil.copytree(base, left), lambda op: op.call == "rename"))
    together(2, lambda c: put(Storage(base, files), "new", coordinator=c, format=form))
    created = [op.path for op in files.log if op.call == "create"]
    assert created[0].endswith(".tmp") and len(created) > 1, "the fence comes before all other files"
    whole, (fence,) = set(listing(left)), fences(left)
    theirs = {fence.name, *(f"p/{Path(name).name}" for name in created[1:])}
    assert whole - named_files(left) == theirs
    cases = [(hours, (), False) for hours in (-87600, -1, 0, 23.9)]
    cases += [(24.1, (), True), (1, (3700.0,), False), (1, (3600.0,), True)]
    for hours, limit_s, takes in cases:
        shutil.copytree(left, tmp := ram / f"{hours} {limit_s}")
        make_old(tmp, hours + 0.001)  # its clock is coarse
        for storage in (Memory(listing(left), 3600.0 * hours), ckpt.LocalStorage(tmp)):
            caplog.clear()
            assert set(st.collect_garbage(storage, *limit_s)) == (theirs if takes else set())
            assert set(storage.names()) == (named_files(left) if takes else whole)
            assert takes or f"kept save {fence.name.split('.')[-2]} of p" in caplog.text
            assert takes or not limit_s or "old enough in 0.0 h" in caplog.text
            assert hours != -1 or "old enough in 25.0 h" in caplog.text
            assert seen(storage) == "old"


def test_directories_that_a_deletion_has_emptied_are_missed_by_nobody(ram):
    storage = ckpt.LocalStorage(ram)
    for prefix in ("a/b/p", "a/p"):  # by one object, which has once made directories that are gone
        put(storage, "old", prefix)
        if prefix == "a/p":
            shutil.rmtree(ram / prefix)
        drop(storage, prefix)
        assert os.listdir(ram) == []


# Row 38: a file system that lacks something

LACKED = {
    "hard links": lambda op: op.call == "link",
    "direct I/O": lambda op: op.call == "open_direct",
    "reads and writes past the page cache": lambda op: op.path.startswith("/proc"),
    "directory fsync": lambda op: op.call == "fsync_dir",
    "reserved space": lambda op: op.call == "allocate",
    "reads that do not wait": lambda op: op.call == "is_cold",
}
UNSUPPORTED = [*itertools.product(LACKED, (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS))]


@pytest.mark.parametrize("what, code", [*UNSUPPORTED, ("hard links", errno.EPERM)])
def test_a_file_system_without_something_will_do_or_the_one_error_names_what_it_lacks(ram, what, code):
    class Lacking(Seam):
        def open(self, path, flags, mode=0o777):
            fd = super().open(path, flags & ~os.O_DIRECT, mode)  # as if the file system here had it
            if path.startswith("/proc"):
                self.paths[fd] = path
            return fd

    # Nothing is in the page cache, so that reads, too, would go past it.
    lacked = Strike(0, fail(code), lambda op: LACKED[what](op) and op.call != "close", FOREVER)
    storage, bags = Storage(ram, Lacking(lacked)), [Bag(w=torch.arange(n, n + (1 << 17))) for n in (1, 2, 3)]
    storage.seam.before = lambda op: lacked(op) or not_cached(op)
    for bag in bags[:2]:
        over(storage).save(bag, None, to(include_rng_state=False))
    st.collect_garbage(storage)
    whole = listing(ram)
    kind, _, message = outcome_of(lambda: over(storage).save(bags[2], None, to("q", overwrite=False)))
    if what == "hard links":
        assert kind == "STORAGE_ERROR" and "hard links" in message and "overwrite=False" in message
        assert listing(ram) == whole
    else:
        assert kind == "returned", message
        over(storage).delete_checkpoint("q")
    over(storage).load(loaded := Bag(w=torch.zeros(1 << 17, dtype=torch.int64)), None, at())
    assert identical(loaded.state, bags[1].state) and over(storage).validate_checkpoint("p").is_valid
    past = {op.call for op in storage.seam.log if op.path.startswith("/proc")}
    assert lacked.hit and (past >= {"pread", "pwrite"} or "page cache" not in what)


IMAGE = "truncate -s 320M {tmp}/image && {} && mount -o loop {tmp}/image {at}"
MOUNTS = {  # how to make a file system at {at}
    "tmpfs": "mount -t tmpfs -o size=96m tmpfs {at}",
    "ext4": IMAGE.replace("{}", "mkfs.ext4 -q {tmp}/image"),
    "xfs": IMAGE.replace("{}", "mkfs.xfs -q {tmp}/image"),
    "btrfs": IMAGE.replace("{}", "mkfs.btrfs -q {tmp}/image"),
    "vfat": IMAGE.replace("{}", "mkfs.vfat {tmp}/image"),
    "overlay": "cd {tmp} && mkdir a b c && mount -t overlay -o lowerdir=a,upperdir=b,workdir=c overlay {at}",
    "bindfs": "mkdir {tmp}/a && bindfs {tmp}/a {at}",
}


def shell(command):
    return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=HANG_S)


@pytest.fixture
def mounted(tmp_path, request):
    """A new file system of a kind; skips with the system's reason where none can be made."""
    places = {"tmp": tmp_path, "at": tmp_path / "at"}
    places["at"].mkdir()
    made = shell(MOUNTS[request.param].format(**places))
    if made.returncode:
        pytest.skip(f"no {request.param}: {made.stderr.strip()}")
    yield places["at"]
    assert shell(f"umount -l {places['at']}").returncode == 0


@pytest.mark.parametrize("mounted", MOUNTS, indirect=True)
def test_all_goes_well_on_a_file_system_until_it_is_full_or_read_only(mounted):
    base, large = mounted / "base", [Bag(w=torch.randn(3 * MiB)) for _ in range(2)]
    for form, level in itertools.product(FORMATS, ("none", "fast")):
        options = {"format": form, "compression_level": level, "include_rng_state": False}
        for bag in large:  # with direct I/O, where the file system has it; the second one replaces the first
            over(base).save(bag, None, to(**options))
        for path in shards(base):
            is_in_memory(path)  # drops it from the page cache
        found = Bag(w=torch.zeros(3 * MiB))
        over(base).load(found, None, at())
        assert identical(found.state, large[1].state) and set(listing(base)) == named_files(base)
    kind, _, message = outcome_of(lambda: put(base, "old", "once", overwrite=False))
    assert kind == "returned" or "hard links" in message
    assert put(base, "old") == "p" and over(base).save_async(value("new"), None, "q").result(HANG_S) == "q"
    over(base).delete_checkpoint("q")
    assert st.collect_garbage(base, 0.0) == [] and over(base).validate_checkpoint("p").is_valid
    before = listing(base)
    huge = Bag(w=torch.zeros(120 * MiB))
    if os.statvfs(base).f_bavail * os.statvfs(base).f_frsize < huge.state["w"].nbytes:
        refusal(lambda: over(base).save(huge, None, to()), "STORAGE_ERROR", "No space left")
        assert listing(base) == before and seen(base) == "old"
    if shell(f"mount -o remount,ro {mounted}").returncode == 0:
        refusal(lambda: put(base, "new"), "STORAGE_ERROR", "Read-only file system")
        assert listing(base) == before and seen(base) == "old"


# Row 13, 14: damage to any bit, any length, any file out of place
RECORD = "p.metadata.json"
REFUSALS = ("CORRUPTED_CHECKPOINT", "INCOMPATIBLE_VERSION", "VALIDATION_FAILED")
SPECIMEN_EXTRA = {"table": {"x": [7, 1.5, None], "y": torch.tensor(2.5)}}


def specimen_state(change=0):
    """Tensors of several kinds and sizes, some of which shrink when compressed."""
    ramp = torch.arange(24, dtype=torch.int32)
    return {"a": ramp + change, "b": torch.zeros(40) + change, "c": torch.ones(2, 3, dtype=torch.bool)}


def specimen(tmp, form=CheckpointFormat.MULTI_SHARD, level="none", world_size=1, change=0):
    """The files of a tiny checkpoint. One rank makes one piece of each tensor: a, b, c, table.y, table."""
    custom = {"epoch": 3, "best": [0.5, "x"]}
    options = to(include_rng_state=False, format=form, compression_level=level, custom_metadata=custom)
    bag = Bag(**specimen_state(change))
    together(world_size, lambda c: over(tmp, c).save(bag, None, options, extra_state=SPECIMEN_EXTRA))
    files = listing(tmp)
    shutil.rmtree(tmp)
    return files


def load_specimen(files):
    """What a load of these files gives: "exact", "other", or (type, message) of its refusal."""
    target = Bag(**{name: torch.zeros_like(tensor) for name, tensor in specimen_state().items()})
    kind, _, result = outcome_of(lambda: over(Memory(files)).load(target, None, at(load_rng_state=False)))
    if kind != "returned":
        return kind, result
    found = target.state, dict(result.extra_state)
    return "exact" if identical(found, (specimen_state(), SPECIMEN_EXTRA)) else "other"


def check_bad_input(files, context="", seconds=1.0, write=False):
    """What a load and a validation say: typed refusals at most, soon. `write`: a save goes on beside them."""
    started, storage = time.process_time(), Memory(files)
    outcome, checkpoint = load_specimen(files), over(storage, keep_last=3)
    assert outcome in ("exact", "other") or outcome[0] in REFUSALS, (outcome, context)
    valid = checkpoint.validate_checkpoint("p")
    valid.get_summary()
    if write:
        st.collect_garbage(storage)
        assert save_word(checkpoint, "new", "q") == "q" and seen(storage, "q") == "new", context
        assert "q" in prefixes(checkpoint)
        checkpoint.delete_checkpoint("p")
    took = time.process_time() - started
    assert took < seconds, (took, context)
    return outcome, valid.is_valid


def check_damage(context, files):
    """Damaged files are rejected by a validation; a load rejects them, or returns the exact state."""
    outcome, valid = check_bad_input(files, context)
    assert not valid and outcome != "other", (outcome, context)
    return outcome


def flipped(files):
    """Each bit of every file, flipped: what it is, and the files."""
    for name, whole in files.items():
        for bit in range(len(whole) * 8):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            yield (name, bit), {**files, name: bytes(changed)}


def of_other_lengths(files):
    """Every file cut to each shorter length, and extended."""
    for name, whole in files.items():
        cut = (whole[:length] for length in range(len(whole)))
        for other in (*cut, *(whole + more for more in (b"\0", b" ", b"}", b"\n", bytes(PAGE), whole))):
            yield (name, len(other), other[-1:]), {**files, name: other}


def remember(name, key):
    """Let `st.name` work out its answer once for each `key(*args)`: all that the answer depends on."""
    known, real = {}, getattr(st, name)

    def call(*args):
        if (case := key(*args)) not in known:
            known[case] = real(*args)
        return known[case]

    setattr(st, name, call)


# Whole files are never compressed: a level changes nothing but the rank's own files.
@pytest.mark.parametrize("form, level", [*zip(FORMATS, ["none"] * 3), (CheckpointFormat.MULTI_SHARD, "fast")])
@pytest.mark.parametrize("damage", [flipped, of_other_lengths])
@isolated("bits and lengths", 6 * HANG_S)
def test_each_bit_and_each_length_is_missed_by_no_validation_and_no_load(ram, damage, form, level):
    st.BLOCK_BYTES, st.UNIT_BYTES = 320, 64  # a file of so few bytes that each bit can be tried has several
    # Most damages are not the record's: what follows from it, and from lengths of files, is worked out once.
    remember("decode_record", lambda data, _, storage: (data, *map(len, storage.files.values())))
    remember("not_covered_once", lambda tensors, *ints: (*tensors, *map(bytes, ints)))
    files, count = specimen(ram / "s", form, level), 0
    assert load_specimen(files) == "exact" and over(Memory(files)).validate_checkpoint("p").is_valid
    for context, broken in damage(files):
        outcome = check_damage(context, broken)
        assert context[0] in outcome[1], (context, outcome)  # not "exact": this load needs every block
        assert damage is flipped or prefixes(over(Memory(broken))) == [], context
        count += 1
    return count


@for_each(level=["none", "fast"], form=FORMATS, world_size=[1, 2])
def test_shards_swapped_copied_missing_or_replayed_are_rejected(ram, tiny_blocks, world_size, form, level):
    files, other = (specimen(ram / "s", form, level, world_size, change) for change in (0, 1))
    names, theirs = (sorted(found.keys() - {RECORD}) for found in (files, other))
    assert len(names) == len(theirs) and not set(names) & set(theirs)
    contents = {*files.values(), *other.values()}
    changes = [{name: data} for name in files for data in sorted(contents - {files[name]})]
    changes += [{a: files[b], b: files[a]} for a, b in itertools.combinations(names, 2)]
    changes += [dict(zip(names, map(other.get, theirs)))]
    damaged = [files | change for change in changes]
    damaged += [{name: data for name, data in files.items() if name != gone} for gone in names]
    for number, broken in enumerate(damaged):
        check_damage(number, broken)


# Row 15, 16: fuzz, seeded. Only what is documented comes out, with little work and in little memory
ROUNDS = int(os.environ.get("CKPT_FUZZ_ROUNDS", "1"))  # more of them: more cases of the same kinds


def with_record(files, record):
    """The files with another record: a dict, or JSON text that ends in `}`. Its CRC is right."""
    if isinstance(record, bytes):
        return {**files, RECORD: record[:-1] + b',"crc32":"%08x"}\n' % zlib.crc32(record[:-1])}
    return {**files, RECORD: sealed(record)}


def edited(files, changes):
    """The files with a record in which each {path: new} was put: a value, or a function of what is there."""
    record = expanded(json.loads(files[RECORD]))
    for path, new in changes.items():
        *above, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        node = functools.reduce(lambda node, key: node[key], above, record)
        node[last] = new(node[last]) if callable(new) else new
    return with_record(files, record)


def with_shard(files, name, header, data):
    """The files with another tensor file, known to the record. A header given as a dict gets right CRCs."""
    if isinstance(header, dict):
        units = [data[start : start + UNIT] for start in range(0, len(data), UNIT)]
        crcs = "".join(f"{zlib.crc32(unit):08x}" for unit in units)
        header = st.dump_json(header | {"__metadata__": header["__metadata__"] | {"crc32": crcs}})
    header += b" " * (-(8 + len(header)) % PAGE)
    start = struct.pack("<Q", len(header)) + header
    record = json.loads(files[RECORD])
    (row,) = (row for row in record["files"] if f"p/{row[0]}" == name)
    row[1:] = len(start + data), len(start), f"{zlib.crc32(start):08x}"
    return with_record({**files, name: start + data}, record)


def shard_of(files, choose=min):
    """Name, header text and data of one of the tensor files."""
    name = choose(sorted(files.keys() - {RECORD}))
    (length,) = struct.unpack("<Q", files[name][:8])
    return name, files[name][8 : 8 + length].rstrip(b" "), files[name][8 + length :]


NASTY_TEXT = r"""
-1 0 1 3 4096 2147483648 9007199254740993 4611686018427387903 4611686018427387904 9223372036854775808
18446744073709551616 -0 1.0 1e3 1e999 -1e999 NaN Infinity -Infinity true null "" ".." "\u0000" "\ud800" "ÿ"
[] {} [[]] [0,0,1000000000] [1,1,1] [0,-1,5] [9,9] [4611686018427387903,1,9] {"a":1,"a":2}
[4611686018427387903,4611686018427387903] "F32" "U8" "JSON" "BOOL" "F4" "C32" "C64" "00000000" "0"
{"$tensor":"x"} {"$tensor":[]} {"$dict":[[[],1]]} {"$dict":[1]} {"$set":[[]]} {"$ndarray":["<f4",[-1],""]}
{"$ndarray":["|O",[1],"gASVAA=="]} {"$scalar":["<f4",[1000000000,1000000000],""]} {"$int":"zz"} {"$int":""}
{"$device":"moon:1"} {"$dtype":"nn"} {"$float":"00"} {"$datetime":"now"} {"$Size":[-1]} {"$Size":["x"]}
{"$Counter":[[1,"x"]]} {"$bytes":"="} {"$str":"gA=="} {"$str":5} {"$eval":"1"} {"$":1}
"=" "AAAA" "eJwDAAAAAAE=" "eJwDeJwDeJwDeJwD" ["","="]
"""
NASTY = [*NASTY_TEXT.split(), "1" + "0" * 30, "9" * 5000, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900]
NASTY += ["[" * depth + "]" * depth for depth in (500, 900)]
NASTY += [json.dumps(packed(column)) for column in ([], [1 << 62] * 3, range(50_000))]
COLUMNS = ("tensor", "file", "begin", "length")


def places(node):
    """Every (container, key) of a JSON tree."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def mutated(rng, tree):
    """JSON text of a tree of which some has another value, or is lost, copied, doubled or renamed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, key = rng.choice(list(places(tree)))
        old, kind = node[key], rng.randrange(8)
        if kind == 0 and type(old) is int:
            node[key] = old + rng.choice((-8, -1, 1, 8, 1 << 20, 1 << 61))
        elif kind <= 3:
            node[key] = f"@@{rng.randrange(len(NASTY))}@@"
        elif kind == 4:
            del node[key]
        elif kind == 5:
            node[key] = copy.deepcopy(rng.choice([node[key] for node, key in places(tree)]))
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(old))
        else:
            node[f"@@twice@@{key}" if kind == 6 else f"{key}x"] = copy.deepcopy(old)
        if not tree:
            break
    text = re.sub('"@@([0-9]+)@@"', lambda mark: NASTY[int(mark[1])], json.dumps(tree))
    return text.replace("@@twice@@", "").encode("latin-1")


def fuzzed(rng, text):
    """JSON text that is `mutated`, or of which some bytes are others, lost or repeated."""
    if rng.random() < 0.7:
        return mutated(rng, json.loads(text))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, other = rng.randrange(len(text)), rng.randrange(len(text))
        stray = bytes([rng.choice(b'0123456789-.eE{}[],:" \\\xff\xc0\x00')])
        new = rng.choice((b"", stray, stray, text[other : other + rng.choice((1, 5, 50))]))
        text = text[:place] + new + text[place + rng.choice((0, 1, 1, 1, 3, 30)) :] or b"{"
    return text


def fuzzed_record(rng, files):
    record, kind = json.loads(files[RECORD]), rng.random()
    del record["crc32"]
    if kind < 0.1:  # rows of all columns are lost, or become copies of another one
        pieces = expanded(record)["pieces"]
        (row, other), times = rng.sample(range(pieces["count"]), 2), rng.choice((0, 1, 2, 40))
        for column in (*pieces["offset"], *pieces["size"], *(pieces[key] for key in COLUMNS)):
            column[row : row + 1] = [column[other]] * times
        pieces["count"] += times - 1
        return with_record(files, record)
    if kind < 0.4:  # numbers in columns, which are packed if they still are numbers
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            return with_record(files, json.loads(fuzzed(rng, st.dump_json(expanded(record)))))
    return with_record(files, fuzzed(rng, st.dump_json(record)))


def fuzzed_header(rng, files):
    name, header, data = shard_of(files, rng.choice)
    files = with_shard(files, name, fuzzed(rng, header), data)
    if rng.random() < 0.1:  # the length field
        length = rng.choice((0, 1, 2, len(data), 1 << 31, 1 << 63, (1 << 64) - 1, rng.randrange(1 << 20)))
        files[name] = struct.pack("<Q", length) + files[name][8:]
    return files


@for_each(form=FORMATS, what=["record", "header", "import"])
@isolated("fuzz cases", HANG_S * ROUNDS)
def test_fuzz_of_headers_and_records_raises_only_what_is_documented(ram, form, what):
    """And takes little time and memory."""
    outcomes, count = Counter(), 1700 * ROUNDS
    kinds = itertools.product(("none", "fast"), (1, 2))
    bases = [specimen(ram / "s", form, level, world_size) for level, world_size in kinds]
    for seed in range(20 + count):  # the first few to warm up
        rng, base, context = random.Random(seed), bases[seed % len(bases)], (what, form, seed)
        files = fuzzed_record(rng, base) if what == "record" else fuzzed_header(rng, base)
        if seed == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if what == "import":
            (ram / "m.safetensors").write_bytes(files[shard_of(files)[0]])
            started = time.process_time()
            outcome = outcome_of(lambda: ckpt.import_checkpoint(ram / "m.safetensors", Memory({}), "p"))
            assert outcome[0] in ("returned", "ValueError", *REFUSALS), (context, outcome)
            assert time.process_time() - started < 1.0, context
        else:
            outcome, valid = check_bad_input(files, context, write=seed % 4 == 0)
            # A load does not need the header, but for its CRCs.
            assert what == "record" or files == base or (not valid and outcome != "other"), (context, outcome)
        outcomes[outcome if isinstance(outcome, str) else outcome[0]] += 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * MiB, "memory"
    # The fuzz reaches the checks: an import looks at entries alone, a load at the CRC of all of the header.
    assert outcomes["CORRUPTED_CHECKPOINT"] + outcomes["ValueError"] > count // 4, outcomes
    return count


# Row 17, 18: lies that are well formed. They are refused before memory is taken for them
def of_shape(shape):
    """Another shape of the first tensor, and of its piece."""
    sizes = [[24, 40, 2, 1, 50], [1, 1, 3, 1, 1], *([1] * 5 for _ in shape[2:])]
    for column, size in itertools.zip_longest(sizes, shape, fillvalue=1):
        column[0] = size
    return {"tensors/0/2": shape, "pieces/offset": [[0] * 5 for _ in sizes], "pieces/size": sizes}


TOP, HUGE, EPOCH = (1 << 63) - 1, 1 << 40, "custom_metadata/epoch"
BOMB = base64.b64encode(zlib.compress(bytes(256 * MiB), 9)).decode()  # a column of 33 million zeros
SHARED = {"compression": "none", "tensors": [["model/a", "I32", [960], None, None]]}
SHARED["pieces"] = dict.fromkeys(COLUMNS, [0] * 40) | {"count": 40, "length": [96] * 40}
SHARED["pieces"] |= {"offset": [[*range(0, 960, 24)]], "size": [[24] * 40]}
LIES = {
    "10^9 pieces": {"pieces/count": 10**9},
    "pieces of 64 dimensions": {"pieces/offset": [[0] * 5] * 64, "pieces/size": [[1] * 5] * 64},
    "pieces of 10^4 dimensions": {"pieces/offset": [[0] * 5] * 10**4, "pieces/size": [[1] * 5] * 10**4},
    "pieces that share their bytes": SHARED,
    "a column that inflates to 256 MiB": {"pieces/begin": BOMB},
    "a column of more rows": {"pieces/begin": lambda old: old + old},
    "a column of fewer rows": {"pieces/length": lambda old: old[:-1]},
    "a column with bytes behind its end": {"pieces/file": lambda old: packed(old, tail=b"\0")},
    "an offset and a size that overflow": {"pieces/offset/0/0": TOP, "pieces/size/0/0": TOP},
    "a shape over the file's size, and its length": of_shape([HUGE]) | {"pieces/length/0": 4 * HUGE},
    "a shape in the list of tensors alone": {"tensors/1/2": [HUGE]},
    "another save id": {"save_id": "00000000"},
    "no save id": {"save_id": ""},
    "5,000 files that are one": {"files": lambda rows: rows * 5000},
    "a sequence number over the limit": {"sequence": 1 << 62},
    "a file of 2^61 bytes": {"files/0/1": 1 << 61},
    "a header of 2^61 bytes": {"files/0/1": 1 << 61, "files/0/2": 1 << 61},
    "a header as long as the file": {"files/0/2": 4096 + 262},
    "lists 900 deep": {EPOCH: functools.reduce(lambda node, _: [node], range(900), 0)},
    "objects 900 deep": {EPOCH: functools.reduce(lambda node, _: {"a": node}, range(900), 0)},
    "tuples 400 deep": {EPOCH: functools.reduce(lambda node, _: {"$tuple": [node]}, range(400), 0)},
}
LIES |= {f"a {key} of {number}": {f"pieces/{key}/0": number} for key in COLUMNS for number in (-1, TOP)}
LIES |= {f"the dtype {dtype}": {"tensors/1/1": dtype} for dtype in ("float99", [], {}, 1, None)}
LIES |= {f"the shape {shape}": of_shape(shape) for shape in ([12], [HUGE], [2] * 64, [1 << 61] * 8)}
VALUES = [{"$float": "00"}, {"$dict": [[[], 1]]}, {"$ndarray": ["|O", [1], "gASVAA=="]}, {"$eval": "1"}]
VALUES += [{"$ndarray": ["<f4", [HUGE], ""]}, {"$dtype": "nn"}]
LIES |= {f"the value {value}": {EPOCH: value} for value in VALUES}
# What is odd, and may be true.
TRUE = {"10^9 ranks": {"world_size": 10**9}, "a sequence at the limit": {"sequence": (1 << 62) - 1}}
TRUE["a number of a million digits"] = {EPOCH: {"$int": "f" * 1_000_000}}


def traced(call):
    """What a call returns, and the most memory that was taken meanwhile."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("level", ["none", "fast"])
@isolated("lies")
def test_a_well_formed_lie_is_refused_before_memory_is_taken_for_it(ram, level):
    """At last in a process without address space for it, where whoever tries to take it fails."""
    honest = specimen(ram / "s", level=level)
    check_bad_input(honest, write=True)
    cases = {lie: edited(honest, changes) for lie, changes in (LIES | TRUE).items()}
    name, header, data = shard_of(honest)  # of which a load looks at the CRC alone
    entries = b"".join(b',"z%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(10**6))
    cases["10^6 entries"] = with_shard(honest, name, header[:-1] + entries + b"}", data)
    for lie, files in cases.items():
        outcome, valid = check_bad_input(files, lie, write=True)
        _, taken = traced(lambda: check_bad_input(files, lie, seconds=60.0, write=True))  # tracing is slow
        assert taken < 2 * sum(map(len, files.values())) + 64 * MiB, lie
        if lie in LIES:
            assert st.collect_garbage(Memory(files), 0.0) == [], lie
            is_refused = outcome[0] == "CORRUPTED_CHECKPOINT" and not valid
            assert is_refused or "deep" in lie, (lie, outcome)  # the interpreter says how deep is too deep
        else:
            assert outcome == "exact" and valid is (lie in TRUE), (lie, outcome)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + 512 * MiB,) * 2)
    for lie, files in cases.items():
        check_bad_input(files, lie, seconds=30.0, write=True)
    return len(cases)


def test_a_record_that_contradicts_itself_is_corrupt(ram, monkeypatch):
    """Not least one whose pieces a reader could not read block by block."""
    over(ram).save(Bag(a=(tensor := torch.zeros(5)), b=tensor), None, to(include_rng_state=False))
    tied, whole, fast = listing(ram), specimen(ram / "s"), specimen(ram / "s", level="fast")
    cases = [(tied, {f"tensors/1/{column}": other}) for column, other in enumerate(("model/a", "F64", [2]))]
    monkeypatch.setattr(st, "BLOCK_BYTES", 64)
    for files, changes in (*cases, (whole, {"pieces/begin/0": 1}), (fast, {})):
        kind, message = load_specimen(edited(files, changes))
        words = "tied to another kind, or twice" if files is tied else "over 4 MiB, compressed or not aligned"
        assert kind == "CORRUPTED_CHECKPOINT" and words in message, message


def test_a_decompression_bomb_stops_at_its_declared_size(ram):
    live = Bag(a=torch.arange(9), b=torch.zeros(1 << 18))
    over(ram).save(live, None, to(compression_level="fast", include_rng_state=False))
    name, header, data = shard_of(sound := listing(ram))
    first, _ = json.loads(header)["model/b"]["data_offsets"]
    bomb, plane = (zlib.compress(bytes(size), 9) for size in (200 * MiB, 1 << 18))  # 2^18: as it is declared
    for planes in ([bomb, plane, plane, plane], [plane, plane, plane, bomb]):
        frame = struct.pack("<B4I", 4, *map(len, planes)) + b"".join(planes)
        entry = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [first, first + len(frame)]}
        changed = with_shard(sound, name, json.loads(header) | {"model/b": entry}, data[:first] + frame)
        files = edited(changed, {"pieces/length/1": len(frame)})
        load = functools.partial(over(Memory(files)).load, live, None, at(load_rng_state=False))
        (kind, _, message), taken = traced(lambda: outcome_of(load))
        assert kind == "CORRUPTED_CHECKPOINT" and "frame is damaged" in message, message
        assert taken < 2 * sum(map(len, files.values())) + 64 * MiB


# Row 19: names
NAMES = (
    "..|.||\0|../outside.safetensors|../../outside.safetensors|/etc/passwd|x/../../outside.safetensors"
    "|~/outside.safetensors|link/outside.safetensors|./{own}.safetensors|file:///etc/passwd"
    "|{own}.safetensors/../../../outside.safetensors|outside.safetensors|..\\outside.safetensors|outside\\x"
    "|{own}.safetensors\0|{own}.safetensors\n| {own}.safetensors|{own}.SAFETENSORS|ü.safetensors"
    "|{own}.\N{LATIN SMALL LETTER LONG S}afetensors|{own}\N{FULLWIDTH DIGIT ZERO}.safetensors|p.metadata.json"
)
BAD_NAMES = [*NAMES.split("|"), "n" * 300, "{own}.safetensors" + "n" * 300]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_name_in_a_record_is_refused_and_nothing_outside_is_touched(ram, name):
    base, files = ram / "base", Seam()
    put(base, "old")
    (path,) = shards(base)
    for folder, outside in itertools.product((ram, base, base / "p"), ("outside.safetensors", "outside\\x")):
        shutil.copy(path, folder / outside)
    (base / "p" / "link").symlink_to(ram)
    name = name.replace("{own}", path.stem)
    (base / RECORD).write_bytes(edited(listing(base), {"files/0/0": name, "save_id": name[:8]})[RECORD])
    before, checkpoint = listing(ram), over(storage := Storage(base, files))
    assert seen(storage).startswith("CORRUPTED_CHECKPOINT"), seen(storage)
    assert not checkpoint.validate_checkpoint("p").is_valid and checkpoint.list_checkpoints() == []
    assert not any(op.call == "pread" and not op.path.endswith(".metadata.json") for op in files.log)
    st.collect_garbage(storage)
    assert listing(ram) == before
    for mine in (path, base / RECORD):
        del before[str(mine.relative_to(ram))]
    for act in (putting("new", "q"), drop, putting("new")):
        outcome_of(lambda: act(storage))
    if {"", ".", ".."} & set(name.split("/")) or "\0" in name:  # which the storage itself refuses, too
        for call in ("open", "create", "delete", "length", "sync_directory", "names", "age_s"):
            kind, _, message = outcome_of(lambda: getattr(storage, call)(f"p/{name}"))
            assert kind == "ValueError" and "illegal path" in message, call
    assert before.items() <= listing(ram).items()
    assert set(os.listdir(ram)) == {"base", "outside.safetensors", "outside\\x"}


def test_files_with_names_that_no_checkpoint_can_have_disturb_nobody(ram):
    put(ram, "old")
    record, strays = (ram / RECORD).read_bytes(), []
    for name in ("ü", "a b", ".", "..", "a\\b", "\x7f", "n" * 220, "-", "%2e%2e"):
        (ram / f"{name}x").mkdir()
        for stray in (f"{name}.metadata.json", f"{name}.metadata.json.0badf00d.tmp", f"p/{name}.safetensors"):
            strays.append(ram / stray)
            strays[-1].write_bytes(record)
    assert prefixes(over(ram)) == ["p"] and seen(ram) == "old"
    put(ram, "new")
    assert seen(ram) == "new" and st.collect_garbage(ram) == []
    assert all(stray.read_bytes() == record for stray in strays)


# Row 20: something else where a file of ours should be
IMPOSTORS = {
    "a symbolic link": lambda path, outside: path.symlink_to(outside),
    "a dangling link": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a link to itself": lambda path, outside: path.symlink_to(path.name),
    "a FIFO": lambda path, outside: os.mkfifo(path),
    "a device": lambda path, outside: shell(f"mknod '{path}' c 1 5 || ln -s /dev/zero '{path}'"),  # endless
    "a socket": lambda path, outside: socket.socket(socket.AF_UNIX).bind(str(path)),
    "a hard link": lambda path, outside: (os.link if outside.is_file() else os.symlink)(outside, path),
    "a directory": lambda path, outside: (path.mkdir(), (path / "mine").write_text("mine")),
}
VICTIMS = {"shard": "p/*", "record": RECORD, "directory": "p", "temporary": f"{RECORD}.0badf00d.tmp"}
IMPOSED = {"load": seen, "list": lambda s: prefixes(over(s)), "gc": st.collect_garbage}
IMPOSED |= {"validate": lambda s: over(s).validate_checkpoint("p").is_valid, "other": putting("other", "q")}
ALWAYS = [*IMPOSED]  # these come back without an error
IMPOSED |= {"save": putting("new"), "once": putting("new", overwrite=False), "delete": drop}


@for_each(kind=IMPOSTORS, victim=VICTIMS)
@isolated("impostors")
def test_what_replaces_a_file_or_directory_of_ours_is_not_followed_and_holds_up_nobody(ram, victim, kind):
    """Each call in turn, on a fresh copy: it comes back, and nothing outside has changed."""
    outcomes = {}
    for name, call in IMPOSED.items():
        base, outside = ram / name / "base", ram / name / "outside"
        put(base, "old")
        shutil.copy(base / RECORD, base / VICTIMS["temporary"])
        (path,) = base.glob(VICTIMS[victim])
        shutil.move(path, outside)
        IMPOSTORS[kind](path, outside)
        before = listing(outside) or outside.read_bytes()
        outcomes[name] = outcome_of(lambda: call(ckpt.LocalStorage(base)))
        assert (listing(outside) or outside.read_bytes()) == before, f"{name} changed what is outside"
    assert {outcomes[name][0] for name in ALWAYS} == {"returned"}, outcomes
    # A hard link has the same bytes, in a regular file.
    if victim != "temporary" and (kind != "a hard link" or victim == "directory"):
        assert outcomes["load"][2] not in WORDS and outcomes["validate"][2] is False, outcomes
    return len(IMPOSED)


# Row 21: pickles
@isolated("pickles")
def test_a_pickle_in_any_file_is_never_run(ram):
    """In place of the record, a tensor file, its header, a value in either."""
    files, payload, events = specimen(ram / "s"), b"cos\ngetpid\n(tR.", []
    (name, header, data), code = shard_of(files), base64.b64encode(payload).decode()
    values = [{tag: code} for tag in ("$pickle", "$object", "$reduce", "$bytes", "$dtype", "$device")]
    values += [{tag: [kind, [1], code]} for tag in ("$ndarray", "$scalar") for kind in ("|O", "O")]
    values += [{"$dtype": "serialization.pickle"}]
    planted = [{**files, RECORD: payload}, with_record(files, payload + b"}")]
    planted += [edited({**files, name: payload}, {"files/0/1": len(payload)})]
    planted += [with_shard(files, name, payload, data), *(edited(files, {EPOCH: value}) for value in values)]
    first, last = json.loads(header)["extra/table"]["data_offsets"]
    for value in (payload, *map(st.dump_json, values)):
        changed = data[:first] + value.ljust(last - first)[: last - first] + data[last:]
        planted += [with_shard(files, name, json.loads(header), changed)]
    sys.addaudithook(lambda event, args: events.append(event) if event == "pickle.find_class" else None)
    for broken in planted:
        check_bad_input(broken, write=True)
    assert events == []
    return len(planted)


# Row 27: a clock that is wrong
@pytest.mark.parametrize("years", [(0, -10, 10, -10), (10, 0, -10, -10), (-10, 10, 0, 5)], ids=str)
def test_a_clock_that_is_ten_years_off_changes_neither_order_nor_what_is_kept(ram, monkeypatch, years):
    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + cls.years * year

    monkeypatch.setattr(coord, "datetime", types.SimpleNamespace(**vars(datetime) | {"datetime": Shifted}))
    names, checkpoint, year = [], over(ram), datetime.timedelta(365.25)
    for number, Shifted.years in enumerate(years):
        names.append(put(ram, WORDS[number], f"run/{9 - number}" if number % 2 else None))
        os.utime(ram / f"{names[-1]}.metadata.json", (1e9 - number, 1e9 - number))
    infos, now = checkpoint.list_checkpoints(), datetime.datetime.now(datetime.timezone.utc)
    assert [(info.prefix, round((info.timestamp - now) / year)) for info in infos] == list(zip(names, years))
    flip(shards(ram, names[-1])[0], -1)
    assert seen(ram, names[-1], fallback=True) == WORDS[2]
    Shifted.years = -10
    put(ram, "new", names[0], keep_last=2)
    assert prefixes(checkpoint) == [names[-1], names[0]] and seen(ram, names[0]) == "new"


# Row 35: names that a terminal obeys, or that UTF-8 cannot encode
ORDERS = ["\x1b[31m", "\r\n", "\x9b2J", "\u202egpj", *"\x7f\u2066\u200f\u061c\u2028\x00\ufeff"]


@pytest.mark.parametrize("orders", [ORDERS, ["\ud800"]], ids=["control characters", "a lone surrogate"])
def test_what_is_stored_reaches_a_terminal_escaped_and_json_is_exact(tmp_path, capsys, monkeypatch, orders):
    def is_escaped(text):
        return all(c.isprintable() or c == "\n" for c in text) and "codec" not in text

    def check(line, expected, *words):
        code, text, _ = command(capsys, *line.replace("{}", str(tmp_path)).split())
        assert code == expected and is_escaped(text) and all(word in text for word in words), (line, text)

    names, custom = [f"{n}.a{order}b" for n, order in enumerate(orders)], {"".join(orders): "".join(orders)}
    escaped, checkpoint = [name.encode("unicode_escape").decode() for name in names], opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(st, "check_name", lambda name: None)  # as if somebody else had written it
        for prefix, number in (("p", 1.0), ("q", 2.0)):
            bag = Bag(**{name: torch.tensor([number, 1j], dtype=torch.complex128) for name in names})
            options = to(prefix, custom_metadata=custom)
            checkpoint.save(bag, None, options, extra_state=dict.fromkeys(names, number))
    changes = {"format": "\x1b[2J", "torch_version": "2\u202e"}
    reseal(tmp_path / "q.metadata.json", lambda record: record.update(changes))
    export, encodable = "export {} p {}/m.safetensors", orders is ORDERS
    check("ls {}", 0, "\\x1b[2J")
    check("show {} q", 0, "2\\u202e", *escaped)
    check("diff {} p q", 1, *(f"model/{name} " for name in escaped))
    check("diff {} p q --values", 1)
    check("verify {}", 0, "p", "q")
    check(export, not encodable, escaped[0], "complex" if encodable else "UTF-8")
    shown = json.loads(command(capsys, "show", tmp_path, "p", "--json")[2])
    assert {f"model/{name}" for name in names} < {tensor["name"] for tensor in shown["tensors"]}
    assert shown["custom_metadata"] == custom
    said, loaded = overheard(checkpoint), Bag(**{name: torch.zeros_like(bag.state[name]) for name in names})
    said.append(refusal(lambda: checkpoint.load(Bag(), None, at("q")), "VALIDATION_FAILED"))
    checkpoint.load(Bag(), None, at("q", strict_mode=False))
    assert len(said) > 1 and all(map(is_escaped, said)), said
    checkpoint.load(loaded, None, at("q"))
    assert identical(loaded.state, bag.state)
    if encodable:
        assert set(contents(tmp_path / "m.safetensors")) == set(names)
        as_torch(tmp_path, {"w": torch.ones(1), **dict.fromkeys(names, "x")})
        check("import {}/m.pt {} r", 0, f"extra/{escaped[0]}")
    flip(shards(tmp_path)[0], -1)
    check("verify {} p", 1, "a\\")  # it names what is damaged
    check(export, 1, "a\\")
    check("gc {}", 0)
    check("rm {} q", 0)


# Row 36: something else than a file as the source of an import
IMPORTS = ["m.safetensors", "m.pt", "index/m.safetensors.index.json", "index/m-1.safetensors"]
IMPORTS += ["dcp/__0_0.distcp", "dcp/.metadata"]


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "a directory"])
@isolated("sources of imports")
def test_what_is_no_regular_file_is_refused_at_once_as_a_source_of_an_import(ram, kind):
    state, whole = {"a": torch.ones(1), "b": torch.ones(2)}, ram / "whole"
    (whole / "index").mkdir(parents=True)
    for make, folder in ((as_file, whole), (as_torch, whole), (as_index, whole / "index")):
        make(folder, state)
    dcp.save(dict(state), checkpoint_id=whole / "dcp", no_dist=True)
    # Another directory is a source itself.
    victims = [victim for victim in IMPORTS if kind != "a directory" or victim.startswith("index")]
    for victim in victims:
        shutil.copytree(whole, here := ram / victim.replace("/", "-"))
        (path := here / victim).unlink()
        IMPOSTORS[kind](path, here)
        source = here / Path(victim).parts[0]
        outcome = outcome_of(lambda: ckpt.import_checkpoint(source, str(ram / "c"), "p"))
        assert outcome == ("ValueError", None, f"{path}: expected a file, found {kind}"), path
        assert listing(ram / "c") == {}
    return len(victims)


# Row 20, 37: a record that cannot be read, or what is a link, beside good checkpoints
@pytest.mark.parametrize("call", ["open", "pread", "scandir"])
def test_a_save_is_the_newest_although_a_first_look_at_the_others_fails(ram, call):
    for word, prefix in ("old", "a"), ("old", "b/b"), ("other", "b/b"):
        put(ram, word, prefix)
    names = f"{ram}/b", f"{ram}/b/b.metadata.json"
    passing = Strike(0, fail(errno.ESTALE), lambda op: op.call == call and op.path in names)
    put(Storage(ram, Seam(passing)), "new", "c")
    assert passing.hit and prefixes(over(ram)) == ["a", "b/b", "c"]


UNREADABLE = [("open", "theirs/q.metadata.json"), ("pread", "theirs/q.metadata.json"), ("scandir", "theirs")]
UNREADABLE = [(*case, code) for case in UNREADABLE for code in (errno.EACCES, errno.EIO)]
LINKED = ["theirs", "theirs/q", "theirs/q/*", "theirs/q.metadata.json"]


@pytest.mark.parametrize("call, path, code", UNREADABLE + [("link", path, None) for path in LINKED])
def test_what_is_unreadable_or_a_link_is_named_or_skipped(ram, caplog, call, path, code):
    """A STORAGE_ERROR for who asks for it; all others warn and go on."""
    base, place, failing, says = ram / "base", ram / "outside", lambda op: None, "symbolic link"
    put(base, "old")
    put(base, "other", "theirs/q")
    if code:
        place, says = base / "theirs", os.strerror(code)
        (
            place / "q" / "0badf00d-00000-of-00001.safetensors"
        ).touch()  # which nobody can tell now to be an orphan
        failing = Strike(0, fail(code), lambda op: op.call == call and op.path == f"{base}/{path}", FOREVER)
    else:
        (path,) = base.glob(path)
        shutil.move(path, place)
        path.symlink_to(place)
    checkpoint, theirs = over(storage := Storage(base, Seam(failing))), listing(place) or place.read_bytes()

    def warned(result):
        about = [message for message in caplog.messages if "theirs" in message]
        caplog.clear()
        assert len(about) == 1 or (about and not code), about
        assert all(says in message and "skipped theirs" in message for message in about), about
        return result

    assert warned(prefixes(checkpoint)) == ["p"] and warned(checkpoint.latest_checkpoint()).prefix == "p"
    warned(put(storage, "new", "r", keep_last=2))
    warned(put(storage, "next", "s", keep_last=2))
    expected = {"p": "absent", "r": "new", "s": "next"} | ({"theirs/q": "other"} if code else {})
    assert {prefix: seen(base, prefix) for prefix in expected} == expected
    assert warned(prefixes(checkpoint)) == ["r", "s"]
    if call != "scandir":  # which only who looks for checkpoints needs
        for fallback in (False, True):
            load = functools.partial(checkpoint.load, value("old"), None, at("theirs/q", fallback=fallback))
            message = refusal(load, "STORAGE_ERROR", says)
            assert code or message.startswith(str(path.relative_to(base)))
        assert says in checkpoint.validate_checkpoint("theirs/q").errors[0]
    caplog.clear()
    assert st.collect_garbage(storage) == []
    if code:
        warned(None)
    flip(shards(base, "s")[0], -1)
    assert seen(storage, "s", fallback=True) == "new" and "skipped theirs" in caplog.text
    writes = [putting("new", "theirs/q"), lambda storage: drop(storage, "theirs/q")]
    for write in writes[: {"scandir": 0, "link": 2}.get(call, 1)]:
        kind, _, message = outcome_of(lambda: write(storage))
        assert says in message if kind == "STORAGE_ERROR" else (kind == "returned" and not code)
    assert (listing(place) or place.read_bytes()) == theirs
    assert not code or set(prefixes(over(base))) == {"r", "s", "theirs/q"}


# The harness itself: twelve mutants of the library, each of which a checker above must catch. A function of
# the library, or a call at the seam, is replaced by a function of the real one and its arguments.
def after_the_commit(calls, pattern):
    """By the log, these calls for files whose path matches are made after the rename."""
    late = []

    def do_late(do, seam, op, perform):
        result = do(seam, op, perform)
        if op.call in calls and re.search(pattern, op.path):
            seam.done.remove(op)
            late.append(op)
        elif op.call == "rename":
            seam.done += late
            late.clear()
        return result

    return Seam, "_do", do_late


def _unlink_before_rename(rename, seam, source, target):
    seam.unlink(target)
    rename(seam, source, target)


def _overwrite_in_place(rename, seam, source, target):
    record, fd = Path(source).read_bytes(), seam.open(target, os.O_RDWR)
    seam.ftruncate(fd, len(record))
    seam.pwrite(fd, record, 0)
    seam.fsync(fd)
    seam.close(fd)
    seam.unlink(source)


def _clean_up_before_the_commit(rename, seam, source, target):
    for path in shards(Path(target).parent):
        if path.name[:8] not in source:
            seam.unlink(str(path))
    rename(seam, source, target)


def _sync_again(fsync, seam, fd):
    with contextlib.suppress(OSError):
        return fsync(seam, fd)
    fsync(seam, fd)


def _swallow_errors(in_parallel, items, work, *more):
    def quiet(*item):
        with contextlib.suppress(Exception):
            work(*item)

    return in_parallel(items, quiet, *more)


def _check_bits(tmp):
    for context, broken in itertools.islice(flipped(specimen(tmp / "s")), 0, None, 97):
        check_damage(context, broken)


def test_a_key_that_comes_twice_is_refused_in_the_record_and_in_a_header(ram):
    """No load looks into a header of our own, whose every byte the record vouches for; a validation does."""
    files = specimen(ram / "s")
    text = files[RECORD].rpartition(b",")[0] + b"}"
    again = [(b"{", b'"sequence":1,'), (b'data":{', b'"x":1,"x":1,'), (b'"pieces":{', b'"count":5,')]
    for start, twice in again:
        outcome = load_specimen(with_record(files, text.replace(start, start + twice, 1)))
        assert outcome[0] == "CORRUPTED_CHECKPOINT" and "duplicate" in outcome[1], (start, outcome)
    name, header, data = shard_of(files)
    twice = b'"},"model/a":%s,' % st.dump_json(json.loads(header)["model/a"])
    broken = with_shard(files, name, header.replace(b'"},', twice, 1), data)
    assert load_specimen(broken) == "exact"
    assert "describes other entries" in over(Memory(broken)).validate_checkpoint("p").get_summary()


SYNC_TEST = test_a_file_whose_write_or_sync_failed_is_never_synced_again_but_replaced_under_a_new_save_id
THREAD_TEST = test_an_error_in_any_thread_fails_the_save_and_publishes_nothing
BY_KEY = (test_a_key_that_comes_twice_is_refused_in_the_record_and_in_a_header,)
NAME_TEST = test_a_bad_name_in_a_record_is_refused_and_nothing_outside_is_touched
BY_SYNC, BY_THREAD = (SYNC_TEST, "fsync"), (THREAD_TEST, None, OSError(5, ""), LEVELS[0], 0)
BY_NAME, BY_BITS = (NAME_TEST, "../../outside.safetensors"), (_check_bits,)
BY_ONE, BY_TWO = ((check_power_loss, *LOSSES[f"MULTI_SHARD of 2, {ranks} rank(s)"]) for ranks in (1, 2))
FSYNC, RENAME, PATH = (Seam, "fsync"), (Seam, "rename"), (st.LocalStorage, "_path")
MUTANTS = {  # what is replaced by what, and what catches it, with the arguments that follow a directory
    "no file fsync": (*FSYNC, lambda sync, seam, fd: fd in seam.directories and sync(seam, fd), BY_ONE),
    "no directory fsync": (*FSYNC, lambda sync, seam, fd: fd in seam.directories or sync(seam, fd), BY_ONE),
    "unlink before rename": (*RENAME, _unlink_before_rename, BY_ONE),
    "overwrite in place": (*RENAME, _overwrite_in_place, BY_ONE),
    "commit before all ranks reported": (*after_the_commit(("pwrite", "fsync"), "-00001-of-"), BY_TWO),
    "record written before shards are durable": (*after_the_commit(("fsync",), "safetensors$"), BY_ONE),
    "superseded shards removed before the commit": (*RENAME, _clean_up_before_the_commit, BY_ONE),
    "fsync retried on the same file": (*FSYNC, _sync_again, BY_SYNC),
    "thread error swallowed": (st, "in_parallel", _swallow_errors, BY_THREAD),
    "CRC not checked": (coord.CheckpointReader, "damage", lambda *_: [], BY_BITS),
    "duplicate keys accepted": (st, "parse_json", lambda _, text, path: json.loads(text), BY_KEY),
    "unchecked path join": (*PATH, lambda _, self, name: os.path.join(self.base_path, name), BY_NAME),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_of_the_library_is_caught(ram, tiny_blocks, mutant):
    owner, name, replacement, (check, *arguments) = MUTANTS[mutant]
    check(ram / "sound", *arguments)  # which passes without it
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args: replacement(real, *args))
        with pytest.raises(AssertionError) as caught:
            check(ram / "mutant", *arguments)
    assert str(caught.value)
    COUNTS["mutants killed"] += 1


# ---- faults of several ranks: killed, raising, stopped, cancelled, signalled -------------------------------

EXCHANGES = ("exchange 0", "exchange 2")
STEPS = ("S1", "S2", "S3", "S4", "S5", "S6", "S7")
DEADLINE_S = 3.0  # of operations that are to fail by it; others have the default, which is over HANG_S
SAVED = ("returned", None, "p")


def time_since_file(path):
    """In the place of the module `time`: a clock that stands still until there is a file at `path`."""
    began = []

    def monotonic():
        if not began and path.exists():
            began.append(time.monotonic())
        return time.monotonic() - began[0] if began else 0.0

    return types.SimpleNamespace(sleep=time.sleep, monotonic=monotonic)


class Sensor(threading.Event):
    """A `cancel`, at which every wait looks: once it has an `act`, the next look calls that."""

    act = None

    def is_set(self):
        act, self.act = self.act, None
        if act:
            act()
        return super().is_set()


def save_word(checkpoint, word, prefix="p", call="save", tensors=2, cancel=None, **options):
    """Save a word by an object that exists already."""
    options = to(prefix, include_rng_state=False, **options)
    return getattr(checkpoint, call)(value(word, tensors), None, options, cancel=cancel)


def overheard(checkpoint):
    """The list that this object's warnings go to from now on."""
    said, checkpoint.logger = [], logging.Logger("overheard", logging.WARNING)
    checkpoint.logger.addFilter(lambda record: said.append(record.getMessage()))
    return said


@contextlib.contextmanager
def entering(place, act, seam=None):
    """In it, `act()` runs first in this process in a step, an exchange of bytes, or a call of the seam."""
    step, exchange, count = coord.Operation.step, ckpt.TorchCoordinator.all_to_all, itertools.count()

    @contextlib.contextmanager
    def struck_step(self, name):
        with step(self, name):
            if name.startswith(place):
                act()
            yield

    def struck_exchange(self, *args):
        if place == f"exchange {next(count)}":
            act()
        return exchange(self, *args)

    if seam:
        seam.before = Strike(0, lambda op: act(), lambda op: op.call == place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coord.Operation, "step", struck_step)
        patch.setattr(ckpt.TorchCoordinator, "all_to_all", struck_exchange)
        yield


FAULTS = {  # what a rank does: its signal or exception; the type and text of the failure of all ranks
    "dies": (signal.SIGKILL, "TIMEOUT", ""),
    "ends the store": (signal.SIGKILL, "TIMEOUT", "the rendezvous store is unreachable"),
    "stops": (signal.SIGSTOP, "TIMEOUT", ""),
    "stops before another fails": (signal.SIGSTOP, "STORAGE_ERROR", "bad disk"),
    "raises": (ArithmeticError("boom"), "FAILED", "boom"),
    "fails in gloo": (RuntimeError("boom"), "FAILED", "gloo exchange failed: boom"),
    "is interrupted": (KeyboardInterrupt(), "FAILED", "KeyboardInterrupt"),
    "cannot delete": (OSError(errno.EIO, "bad disk"), "", "not all that should go is gone: OSError(5, 'bad"),
    "cancels": (None, "CANCELLED", "cancelled"),
}


class Fault(NamedTuple):
    """What one rank does, where, in an operation of several."""

    how: str
    place: str  # a step, the number of an exchange, or "unlink"
    victim: int
    waits: bool = False  # it acts only once it waits there for the others, who come when that is over
    verb: str = "save"  # or "save_async", "save at exit", "load"
    form: CheckpointFormat = CheckpointFormat.MULTI_SHARD

    def tensors(self):
        return 250 if self.place.startswith("exchange") else 2  # so many take several exchanges

    def words(self):
        """What may be seen afterwards: one word, or two where it depends on who is faster."""
        if self.place in ("S7", "unlink") or (self.waits and self.place == "S5"):
            return {"new"}
        if self.place == "S6" and self.victim == 0:  # it has looked for a cancel already
            return {"new"} if self.how == "cancels" else {"old"}
        if self.place == "S6":
            return {"new"} if self.how in ("dies", "stops") else {"old", "new"}
        return {"old", "new"} if (self.how, self.place, self.victim) == ("cancels", "S5", 1) else {"old"}

    def save(self, checkpoint, word, **rest):
        return save_word(checkpoint, word, tensors=self.tensors(), format=self.form, **rest)

    def load(self, checkpoint, word, cancel=None, **options):
        target = value("other", self.tensors())
        options = at(resharding_strategy="broadcast", load_rng_state=False, **options)
        checkpoint.load(target, None, options, cancel=cancel)
        assert identical(target.state, value(word, self.tensors()).state)

    def operate(self, checkpoint, cancel):
        """The operation in which the fault happens: it saves "new", or loads "old"."""
        rest = {"timeout": DEADLINE_S} if self.how.startswith(("dies", "stops")) else {}
        rest["cancel"] = cancel
        if self.verb == "load":
            return self.load(checkpoint, "old", **rest)
        if self.verb == "save":
            return self.save(checkpoint, "new", **rest)
        pending = self.save(checkpoint, "new", call="save_async", **rest)
        if self.verb == "save at exit":
            threading._shutdown()  # what the interpreter does first when it exits: wait for its threads
            assert pending.done()
        return pending.result()


def every(how, places, victims, **fields):
    return [Fault(how, place, victim, **fields) for place in places for victim in victims]


def check_together(base, size, faults):
    """Try faults one after the other in the same `size` processes."""
    tmp, is_deadly = Path(tempfile.mkdtemp(dir=base)), FAULTS[faults[0].how][0] == signal.SIGKILL
    by_rank = run(size, meet_faults, tmp, faults, dies={faults[0].victim} if is_deadly else ())
    for number, fault in enumerate(faults):
        others = [found if found == "died" else found[number] for found in by_rank]
        context, own = (fault, *others), others.pop(fault.victim)
        committed, (_, kind, text) = others[0][0] == SAVED, FAULTS[fault.how]
        word = "new" if committed else "old"
        assert word in fault.words(), context
        for answer, warned, *_ in others:
            assert (answer == SAVED) == committed and (not warned or fault.place != "unlink"), context
            if not committed:
                assert answer[0] in (kind, f"{fault.verb[:4].upper()}_{kind}") and text in answer[2], context
                named = answer[1] == fault.victim and re.search(rf"\brank\(?s?\)?\D*{answer[1]}\b", answer[2])
                assert named or fault.how in ("ends the store", "stops before another fails"), context
                assert "undefined" in answer[2] or fault.verb != "load" or kind == "TIMEOUT", context
            elif fault.how in ("dies", "stops"):
                (line,) = [line for line in warned if "committed, but not every rank may know" in line]
                assert f"no answer from rank(s) {fault.victim} of {size}" in line, context
        if is_deadly:
            assert own == "died", context
            continue
        if fault.how == "is interrupted":
            assert own[0] == "interrupted", context
        elif fault.how.startswith("stops"):
            assert own[0] == SAVED if committed else own[0][0] in ("TIMEOUT", "STORAGE_ERROR"), context
        else:
            assert {answer for answer, *_ in others} == {own[0]}, context
        if committed and fault.how in ("raises", "cannot delete"):
            assert any(text in line for _, warned, *_ in [own, *others] for line in warned), context
        may_stay = fault.place == "unlink" or (own[0] == "interrupted" and fault.victim == 0 and committed)
        assert all(found == word and (may_stay or not left) for *_, found, left in [own, *others]), context
    if fault.tensors() == 2:  # other checkpoints have units of another size
        assert not is_deadly or seen(tmp / "c") == word, context
        check_recovery(tmp / "c", context=faults)


def strike_of(fault, cancel, gone, base, acted):
    """What the victim does at the fault's place. All deadlines count from the moment that `gone` is there."""
    cause, before = FAULTS[fault.how][0], save_id(base)

    def act():
        acted.append(fault)
        while fault.place == "S7" and save_id(base) == before:
            time.sleep(0.001)  # S7 is after the rename
        if isinstance(cause, int) or fault.place.startswith("exchange"):
            gone.touch()
        if isinstance(cause, int):
            os.kill(os.getpid(), cause)
        elif cause:
            raise cause
        else:
            cancel.set()

    return act


def wake_up(victim, rank, pids, number):
    """The last of the others that has given up tells the victim, which has stopped, to go on."""
    given_up = rank != victim and dist.distributed_c10d._get_default_store().add(f"given up {number}", 1)
    if given_up == len(pids) - 1:
        # It may be about to stop yet: a signal to go on must come after that.
        while "\nState:\tT" not in Path(f"/proc/{pids[victim]}/status").read_text():
            time.sleep(0.01)
        os.kill(pids[victim], signal.SIGCONT)


def meet_faults(rank, world_size, tmp, faults):
    """Of each fault this rank's answer and warnings; if all live, what is seen, and what no record names."""
    if faults[0].how == "ends the store":
        use_store_of_rank_zero(rank, world_size)
    if faults[0].tensors() > 2:
        st.BLOCK_BYTES, st.UNIT_BYTES = PAGE, PAGE // 2
    seam, found, base = Seam(), [], tmp / "c"
    checkpoint = over(Storage(base, seam), ckpt.TorchCoordinator(), attempts=3)
    pids, warned = checkpoint.coordinator.all_gather(os.getpid()), overheard(checkpoint)
    for number, fault in enumerate(faults):
        gone, acted, cancel, is_victim = tmp / f"gone-{number}", [], Sensor(), rank == fault.victim
        ckpt.time = coord.time = time_since_file(gone)
        fault.save(checkpoint, "old")
        if rank == 0:
            assert seen(base, tensors=fault.tensors()) == "old"
            st.collect_garbage(checkpoint.storage)
        act = strike_of(fault, cancel, gone, base, acted)

        def first():
            if is_victim and fault.waits:
                cancel.act = act  # at the next look, in the wait
            elif is_victim:
                act()
            elif fault.waits:
                await_file(gone)
                if fault.how == "stops before another fails":
                    raise OSError(errno.EIO, "bad disk")

        dist.barrier()
        del warned[:]
        with entering(fault.place, first, seam):
            try:
                answer = outcome_of(lambda: fault.operate(checkpoint, cancel))
            except KeyboardInterrupt:
                answer = "interrupted"
        assert acted or not is_victim, (fault, answer, "this place was not reached")
        if FAULTS[fault.how][0] == signal.SIGKILL:
            return [(answer, warned)]
        if is_victim:
            gone.touch()
        if fault.how.startswith("stops"):
            wake_up(fault.victim, rank, pids, number)
        dist.barrier()
        left = sorted(set(listing(base)) - named_files(base))
        found.append((answer, list(warned), seen(base, tensors=fault.tensors()), left))
        dist.barrier()
        cancel.clear()
        fault.save(checkpoint, "next")
        fault.load(checkpoint, "next")
    return found


def use_store_of_rank_zero(rank, world_size):
    """Make the default process group anew, on a store in the process of a rank instead of the test's."""
    store = rank == 0 and dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port, *_ = gathered(store and store.port)
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.barrier()  # who leaves a group while others still connect to it ends it for them
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


# Rows 9 to 12, 24, 25: how many ranks, and what one of them does
TRIALS = {
    "killed in any step, of two": (2, every("dies", STEPS, range(2))),
    "killed in any step, of three": (3, every("dies", STEPS, range(3))),
    # It has given its value, so that the others go on with it, up to the commit if it was the last one.
    "killed while it waits in a gather": (3, every("dies", ("S1", "S3", "S5"), [1], waits=True)),
    "dead when another exits with a save in flight": (2, [Fault("dies", "S1", 1, verb="save at exit")]),
    "stopped past the deadline, of two": (2, every("stops", STEPS, range(2))),
    "stopped past the deadline, of three": (3, [Fault("stops", "S4", 2), Fault("stops", "S6", 0)]),
    # That failure may be tried again, but not all ranks know of it: one that did would be out of step.
    "stopped before another fails": (2, [Fault("stops before another fails", "S4", 1, waits=True)]),
    "host of the store dies, of two": (2, every("ends the store", STEPS, [0])),
    "host of the store dies, of three": (3, every("ends the store", STEPS, [0])),
    "fails to clean up": (2, [Fault("cannot delete", "unlink", 0), Fault("is interrupted", "unlink", 0)]),
    "interrupted in any step": (2, every("is interrupted", STEPS, range(2))),
    "cancels in any step": (2, every("cancels", STEPS, range(2))),
    "cancels in any step in the background": (2, every("cancels", STEPS, range(2), verb="save_async")),
    "interrupted before the background": (2, every("is interrupted", ["S2"], range(2), verb="save_async")),
    # The other rank hangs until the one that waited has returned.
    "interrupted while it waits": (2, every("is interrupted", ("S1", "S3"), range(2), waits=True)),
    "cancels while it waits": (2, every("cancels", ("S1", "S3"), range(2), waits=True)),
}
for _size, _form in itertools.product((2, 3), FORMATS):
    _faults = every("raises", STEPS, range(_size), form=_form)
    TRIALS[f"raises in any step, of {_size}, {_form.value}"] = (_size, _faults)
for _verb in ("save", "load"):
    _in_exchanges = functools.partial(every, verb=_verb, form=CheckpointFormat.SINGLE_FILE)
    _faults = _in_exchanges("cancels", EXCHANGES, range(2), waits=True)
    for _how in ("raises", "fails in gloo", "cancels", "is interrupted"):
        _faults += _in_exchanges(_how, EXCHANGES, range(2))
    TRIALS[f"fails in an exchange of a {_verb}"] = (2, _faults)
    for _how in ("dies", "stops"):
        TRIALS[f"{_how} in an exchange of a {_verb}"] = (3, _in_exchanges(_how, EXCHANGES, range(2)))


@pytest.mark.parametrize("trial", TRIALS)
def test_what_one_rank_does_ends_the_save_or_load_on_all_alike_and_old_or_new_is_whole(ram, trial):
    size, faults = TRIALS[trial]
    is_lost = isinstance(FAULTS[faults[0].how][0], int)
    groups = [[fault] for fault in faults] if is_lost else [faults]
    with ThreadPoolExecutor(12) as pool:  # they mostly wait
        list(pool.map(functools.partial(check_together, ram, size), groups))
    COUNTS.update(f"times that a rank {fault.how}" for fault in faults)


@isolated()
def test_a_store_that_died_before_the_first_save_is_told_of_at_the_deadline_of_the_save(tmp_path):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", host.port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    del host
    checkpoint = opened(tmp_path, default_timeout=1.0)
    refusal(lambda: checkpoint.save(small()[0], None, "p"), "TIMEOUT", "store is unreachable")


# Row 24: a signal at any operation
@for_each(number=[signal.SIGTERM, signal.SIGINT], name=["overwrite", "overwrite a single file", "delete"])
@isolated("signals", 3 * HANG_S)
def test_a_signal_at_any_operation_ends_the_process_at_once_and_leaves_old_or_new(ram, number, name):
    def interrupted(storage):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the test may run where it is ignored
        try:
            scene.act(storage)
        except KeyboardInterrupt:
            os._exit(CRASHED)
        assert storage.seam.before.hit is None, "the signal changed nothing"

    scene, count = SCENES[name], 0
    ends = CRASHED if number == signal.SIGINT else -number
    when = is_change if number == signal.SIGTERM or name != "overwrite" else lambda op: True
    strike = lambda *_: os.kill(os.getpid(), number)  # noqa: E731
    for ended, left in crash_everywhere(ram, scene.before, interrupted, strike, ends, when):
        context = f"{name}, {number.name} at operation {count}"
        check_oracle(left, scene, not ended, context)
        check_recovery(left, PREFIXES, context)
        count += ended
    return count


# Row 25: a cancel; the interpreter exits with a save in flight
@for_each(how=["raise", "cancel", "cancel a writer"])
@on_ranks(3)
def test_a_failure_or_cancel_stops_the_writes_of_all_ranks_long_before_they_are_done(rank, ram, how):
    """Rank 1 raises, or cancels, in its wait for rank 0, which alone writes; or cancels as it writes too."""

    def slow(op):
        if op.call == "pwrite":
            (ram / f"writing-{rank}").touch()
            time.sleep(0.5)

    def act():
        await_file(ram / "writing-0")
        if how == "raise":
            raise ValueError("boom")
        cancel.act = cancel.set  # in the gather

    files, cancel, writers = Seam(slow), Sensor(), [0, 1] if how == "cancel a writer" else [0]
    checkpoint, tensors = over(Storage(ram / "c", files), ckpt.TorchCoordinator()), {}
    if rank in writers:
        tensors = {f"{rank}_{n}": torch.full((BLOCK,), n, dtype=torch.uint8) for n in range(64)}
        tensors["both"] = torch.zeros(BLOCK, dtype=torch.uint8)  # which two writers share
    with entering("S5", act if rank == 1 else lambda: None):
        pending = checkpoint.save_async(tensors, None, to(include_rng_state=False), cancel=cancel)
        for writer in writers:
            await_file(ram / f"writing-{writer}")
        if rank == 1 and rank in writers:
            assert pending.cancel()
        answer = outcome_of(pending.result)
    dist.barrier()
    assert not pending.cancel() and listing(ram / "c") == {}
    assert answer[:2] == ("SAVE_FAILED" if how == "raise" else "CANCELLED", 1), answer
    assert sum(op.call == "pwrite" for op in files.log) < 32


@on_ranks(2)
def test_a_cancel_on_one_rank_between_two_attempts_stops_all_ranks(rank, ram):
    checkpoint = over(Storage(ram, hiccups(FOREVER)), ckpt.TorchCoordinator(), attempts=3)
    cancel = threading.Event()
    if rank == 1:
        cancel.wait = lambda timeout: cancel.set()  # as it does between two attempts
    answer = outcome_of(lambda: save_word(checkpoint, "new", cancel=cancel))
    assert answer[:2] == ("CANCELLED", 1), answer
    dist.barrier()
    checkpoint.storage.seam = Seam()
    assert save_word(checkpoint, "next") == "p"


SCRIPT = """
import os, pathlib, signal, sys, test_ckpt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
for case in map(pathlib.Path, sys.argv[1:]):  # each in a fork of this interpreter, which exits as one does
    if not os.fork():
        test_ckpt.end_with_a_save_in_flight(case)
    (case / "code").write_text(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""
ENDINGS = {f"exit-{form.value}": ("3", "new") for form in FORMATS} | {"OSError-multi_shard": ("3", "old")}
ENDINGS |= {"SIGTERM-multi_shard": ("-15", "old"), "SIGINT-multi_shard": ("-2", "old, new")}


def end_with_a_save_in_flight(tmp):
    """End this interpreter as the name of `tmp` says, once the second write or sync of a save begins."""
    how, form = tmp.name.split("-")
    for descriptor in (1, 2):
        os.dup2(os.open(tmp / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)

    def act(op):
        if how == "OSError":
            raise OSError("bad disk")
        if how != "exit":
            os.kill(os.getpid(), getattr(signal, how))
        while threading.main_thread().is_alive():  # until the interpreter waits for this thread
            time.sleep(0.01)

    put(ckpt.LocalStorage(tmp / "c"), "old")
    checkpoint = over(Storage(tmp / "c", Seam(Strike(1, act, lambda op: op.call in ("pwrite", "fsync")))))
    pending = save_word(checkpoint, "new", call="save_async", format=form)
    if how.startswith("SIG"):
        pending.result()
    print("main is done", flush=True)
    sys.exit(3)


def test_an_interpreter_that_exits_with_a_save_in_flight_ends_with_its_code(ram):
    """And tells of a failed save that nobody asked about."""
    for case in ENDINGS:
        (ram / case).mkdir()
    output_of("-c", SCRIPT, *(ram / case for case in ENDINGS))
    for case, (wanted, words) in ENDINGS.items():
        code, said = ((ram / case / name).read_text() for name in ("code", "said"))
        word = seen(ram / case / "c")
        assert code == wanted and word in words, (case, code, word, said)
        assert ("main is done" in said) == (code == "3"), (case, said)
        assert ("bad disk" in said and "nobody asked" in said) == case.startswith("OSError"), (case, said)
        check_recovery(ram / case / "c")


@pytest.mark.parametrize("form", FORMATS)
@on_ranks(3)
def test_a_save_in_which_one_rank_alone_holds_anything_or_a_tied_name_or_none_does(rank, ram, form):
    checkpoint, w = over(ram, ckpt.TorchCoordinator()), torch.full((5,), 7.0)
    for holder, others in itertools.product((0, 1, 2, None), ({}, {"w": w})):
        saved = {"w": w, "tied": w, "empty": torch.zeros(0, 1, 2)} if rank == holder else others
        target = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
        checkpoint.save(Bag(**saved), None, to(format=form, include_rng_state=False))
        checkpoint.load(target, None, at(load_rng_state=False, strict_mode=False))
        assert identical(target, saved), (holder, others)


# Row 26 and the promises of save_async
class Gate:
    """A hook of a `Seam` that waits before a call, or before any, until it is opened."""

    def __init__(self, call=None):
        self.call, self.reached, self.opened = call, threading.Event(), threading.Event()

    def __call__(self, op):
        if self.call in (None, op.call):
            self.reached.set()
            assert self.opened.wait(HANG_S), "the gate was never opened"


def hold_back_the_copy():
    """Keep the thread of a save in the background, and so its copy, from starting until this is called."""
    start, held = threading.Thread.start, []
    threading.Thread.start = lambda t: held.append(t) if t.name == "ckpt-save" else start(t)
    return lambda: start(held.pop())


def normed(salt):
    """A model with buffers too, and its optimizer."""
    model = filled(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), salt)
    return model, stepped(model, lr=0.1)


@for_each(staging=STAGINGS, kind=["waits", "has no hooks", "is not saved"])
def test_what_changes_after_wait_staged_does_not_change_the_snapshot(ram, staging, kind):
    """Without an optimizer whose next step could wait, overlapped staging copies before it returns."""
    gate, (model, optimizer), again = Gate(), normed("truth"), normed("other")
    saved = model, optimizer
    if kind == "has no hooks":  # as one that does not call the `__init__` of its base
        del optimizer._optimizer_step_pre_hooks
    if kind == "is not saved":
        saved, again = (model, None), (again[0], None)
    extra, options = {"step": 7, "t": torch.zeros(3)}, to(staging=staging, custom_metadata={"epoch": [1]})
    with torch.inference_mode():
        extra["best"] = torch.arange(6.0)
    truth = state_of(*saved), copy.deepcopy(extra)
    checkpoint = over(Storage(ram, Seam(gate)))
    pending = checkpoint.save_async(*saved, options, extra_state=extra)
    pending.wait_staged(HANG_S if staging == "overlapped" and kind == "waits" else 0.0)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with torch.inference_mode():
        for tensor in [*model.parameters(), *model.buffers(), *moments, extra["t"], extra["best"]]:
            tensor.add_(1)
    extra |= {"step": 8, "more": 2}
    options.custom_metadata["epoch"].append(2)
    options.checkpoint_prefix = "q"
    assert gate.reached.wait(HANG_S) and not pending.done() and not listing(ram)
    gate.opened.set()
    assert pending.result(HANG_S) == "p"
    live = {"step": 0, "t": torch.ones(3), "best": torch.ones(6)}
    result = over(ram).load(*again, at(), extra_state=live)
    assert identical((state_of(*again), result.extra_state), truth)
    assert result.metadata.custom_metadata == {"epoch": [1]}


@for_each(what=["0.weight", "exp_avg"])
@on_ranks(2)
def test_a_tensor_changed_during_overlapped_staging_fails_the_save_on_all_and_is_named(rank, ram, what):
    checkpoint, (model, optimizer) = over(ram, ckpt.TorchCoordinator()), small()
    save_word(checkpoint, "old")
    dist.barrier()
    files, weight, start = listing(ram), model[0].weight, hold_back_the_copy()
    pending = checkpoint.save_async(model, optimizer, to(staging="overlapped"))
    if rank == 1:
        with torch.no_grad():
            (weight if what == "0.weight" else optimizer.state[weight][what]).mul_(2)
    start()
    kind, where, message = outcome_of(lambda: pending.result(HANG_S))
    assert (kind, where) == ("SAVE_FAILED", 1) and what in message and "changed" in message, message
    dist.barrier()
    assert listing(ram) == files and seen(ram) == "old"
    optimizer.step()  # nothing waits any more
    dist.barrier()
    checkpoint.save(model, optimizer, to())


@isolated()
def test_the_next_step_waits_for_overlapped_staging_but_forward_and_backward_do_not(ram):
    checkpoint, (model, optimizer), start = over(ram), normed("truth"), hold_back_the_copy()
    truth = state_of(model, optimizer)
    stepping, entered = threading.Thread(target=optimizer.step), threading.Event()
    optimizer.register_step_pre_hook(lambda *_: entered.set())  # the last thing before the hook of the save
    hooks = len(optimizer._optimizer_step_pre_hooks)
    pending = checkpoint.save_async(model, optimizer, to(staging="overlapped"))
    refusal(lambda: pending.wait_staged(0.01), TimeoutError)
    model.train()
    model(torch.ones(4, 3)).sum().backward()  # changes the statistics of the batch norm, which were copied
    assert not identical(state_of(model)[0], truth[0])
    stepping.start()
    assert entered.wait(HANG_S)
    stepping.join(0.3)  # time enough to go on, if nothing stopped it
    assert stepping.is_alive() and identical(optimizer.state_dict()["state"], truth[1]["state"])
    start()
    stepping.join(HANG_S)
    assert not stepping.is_alive() and not identical(optimizer.state_dict()["state"], truth[1]["state"])
    assert pending.result(HANG_S) == "p" and len(optimizer._optimizer_step_pre_hooks) == hooks
    again = normed("other")
    checkpoint.load(*again, at())
    assert identical(state_of(*again), truth)


NEXT_CALLS = {
    "save": lambda checkpoint, prefix="p": save_word(checkpoint, "next", prefix),
    "save_async": lambda checkpoint, prefix="p": save_word(checkpoint, "next", prefix, "save_async"),
    "save_model_only": lambda checkpoint: checkpoint.save_model_only(value("next"), to()),
    "close": lambda checkpoint, _=None: checkpoint.close(),
    "with": lambda checkpoint: checkpoint.__exit__(None, None, None),
}


@for_each(asked=[(), (0,), (0, 1)], call=NEXT_CALLS)
@on_ranks(2)
def test_a_failed_pending_save_raises_once_at_result_or_the_next_call(rank, ram, call, asked):
    """Where one rank alone has asked, the next save fails on all ranks, so that no rank waits."""
    # A save that fails is none of those that are kept.
    checkpoint = over(Storage(ram, hiccups(FOREVER)), ckpt.TorchCoordinator(), keep_last=1)
    if rank == 0:
        put(ckpt.LocalStorage(ram), "old")
    pending = checkpoint.save_async(value("new"), None, to())
    assert not concurrent.futures.wait([pending], HANG_S).not_done
    if rank in asked:
        assert pending.exception().type is ExceptionType.STORAGE_ERROR
        assert outcome_of(pending.result)[0] == "STORAGE_ERROR"
    checkpoint.storage.seam = Seam()  # the disk is whole again
    checkpoint.load(target := value("next"), None, at())  # no concern of a load
    assert identical(target.state, value("old").state)
    dist.barrier()
    kind, _, message = answer = outcome_of(lambda: NEXT_CALLS[call](checkpoint))
    if call == "save_async" and rank in asked:
        # Who has not asked hears of it in the call: a loop that never asks would save nothing more.
        kind, _, message = answer = outcome_of(message.result)
    if asked == (0, 1) or (call in ("close", "with") and rank in asked):
        assert kind == "returned", answer
    else:
        why = "" if call in ("close", "with") else "the save of 'p' in the background had failed"
        assert kind == "STORAGE_ERROR" and why in message, answer
    dist.barrier()
    assert seen(ram) == ("next" if answer == SAVED else "old")
    dist.barrier()
    checkpoint.close()  # said once
    assert save_word(checkpoint, "next") == "p"
    dist.barrier()
    assert seen(ram) == "next" and set(listing(ram)) == named_files(ram)


def test_a_failed_pending_save_is_not_kept_once_somebody_has_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt.log, "disabled", True)  # pytest keeps what is logged
    pending = opened(tmp_path).save_async(nn.Linear(2, 2), None, extra_state={"odd": object()})
    assert "extra/odd" in refusal(pending.result)
    kept = weakref.ref(pending)
    del pending
    gc.collect()
    assert kept() is None


def test_cancel_does_not_wait_for_an_fsync(ram):
    gate = Gate("fsync")
    pending = save_word(over(Storage(ram, Seam(gate))), "old", call="save_async")
    assert gate.reached.wait(HANG_S) and pending.cancel()
    refusal(lambda: pending.result(HANG_S), "CANCELLED")
    gate.opened.set()
    assert listing(ram) == {}


@for_each(call=["save_async", "save", "close"])
def test_one_save_is_in_flight_at_a_time_and_the_next_call_waits_for_it(ram, call):
    gate = Gate()
    checkpoint = over(Storage(ram, Seam(gate)))
    first = save_word(checkpoint, "old", "first", "save_async")
    assert gate.reached.wait(HANG_S)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(NEXT_CALLS[call], checkpoint, "second")
        refusal(lambda: second.result(0.3), concurrent.futures.TimeoutError)
        refusal(lambda: first.result(0), TimeoutError, "not done within 0 s")
        gate.opened.set()
        second.result(HANG_S)
    assert first.done() and first.result() == "first"
    checkpoint.close()
    assert prefixes(checkpoint) == ["first"] + ["second"] * (call != "close")


@for_each(kind=["ddp", "fsdp2"])
@on_ranks(2, "background saves", 3 * HANG_S)
def test_training_goes_on_during_two_hundred_background_saves_as_without_and_each_is_right(rank, ram, kind):
    def start(salt):
        torch.manual_seed(rank)
        layers = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4)
        model = filled(nn.Sequential(*layers), salt)
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model[0])
            fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(save=lambda *_: None):
        model, optimizer = start("truth")
        for step in range(400):
            loss = model(torch.randn(8, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()  # collectives of the training, while the save before is under way
            optimizer.step()
            losses.append(loss.item())
            if step % 2:
                save(model, optimizer)
        return state_of(model, optimizer)

    def save(model, optimizer):
        under_way.append(bool(pending) and not pending[-1].done())
        options = to(f"p{len(truths)}", staging=STAGINGS[len(truths) % 2])
        truths.append(state_of(model, optimizer))
        pending.append(checkpoint.save_async(model, optimizer, options))

    checkpoint, losses, truths, pending, under_way = opened(ram), [], [], [], []
    assert identical(train(), train(save)) and any(under_way)
    assert losses[:400] == losses[400:] and len(set(losses)) > 200
    checkpoint.close()
    other = start("other")
    for number, truth in enumerate(truths):
        checkpoint.load(*other, at(f"p{number}", load_rng_state=False))
        assert identical(state_of(*other), truth), number
    return len(truths)


@on_ranks(2, "background saves", 3 * HANG_S)
def test_two_hundred_background_saves_keep_memory_threads_files_groups_and_store_keys_flat(rank, ram):
    # With its optimizer the model has 3 MiB, so that keeping any of it would show.
    model, made, gloo = filled(nn.Linear(512, 512), "truth"), [], dist.ProcessGroupGloo
    optimizer, counts = stepped(model, lr=0.1), []
    checkpoint = over(ram, ckpt.TorchCoordinator(), keep_last=2)
    dist.ProcessGroupGloo = lambda *args: made.append(args[1:]) or gloo(*args)
    limits = {  # how far each may grow
        "resident": (8 * MiB, lambda: int(Path("/proc/self/statm").read_text().split()[1]) * PAGE),
        "threads": (2, lambda: len(os.listdir("/proc/self/task"))),
        "descriptors": (4, lambda: len(os.listdir("/proc/self/fd"))),
        "groups": (0, lambda: len(dist.distributed_c10d._world.pg_map) + len(made)),
        "keys": (10, lambda: dist.distributed_c10d._get_default_store().num_keys()),
        "files": (0, lambda: len(listing(ram))),
    }
    for number in range(200):
        checkpoint.save_async(model, optimizer, to(f"p{number}", staging=STAGINGS[number % 2]))
        if number % 40 == 39:
            checkpoint.close()
            dist.barrier()
            counts.append({name: count() for name, (_, count) in limits.items()})
            dist.barrier()
            grown = {name: counts[-1][name] - counts[0][name] for name in limits}
            assert all(grown[name] <= most for name, (most, _) in limits.items()), counts
    assert prefixes(checkpoint) == ["p198", "p199"] and checkpoint.latest_checkpoint().prefix == "p199"
    return number + 1


# What stays: `keep_last`, `retain`, and falling back together
WRONG_RETAINS = [lambda _: 1 / 0, lambda infos: infos[1:], lambda _: "p0", lambda _: None, lambda _: ["q"]]


@on_ranks(2)
def test_retain_names_what_stays_on_rank_zero_after_the_commit_and_a_wrong_one_is_a_warning(rank, ram):
    """The new one always stays."""

    def best_and_last(infos):
        asked.append(" ".join(info.prefix for info in infos))
        return [info.prefix for info in infos if info.custom_metadata["best"]] + [infos[-1].prefix]

    def listed_after(number):
        checkpoint.save(value("old"), None, to(f"p{number}", custom_metadata={"best": number in (1, 2)}))
        dist.barrier()
        return gathered(prefixes(checkpoint))[0]

    asked, checkpoint = [], opened(ram, retain=best_and_last)
    *_, found = [listed_after(number) for number in range(5)]
    assert asked == ([] if rank else ["p0", "p0 p1", "p1 p2", "p1 p2 p3", "p1 p2 p3 p4"])
    assert found == ["p1", "p2", "p4"]
    for number, wrong in enumerate(WRONG_RETAINS, 5):
        checkpoint.retain, warned = wrong, overheard(checkpoint)
        assert listed_after(number) == (found := [*found, f"p{number}"])
        why = "committed, but not all that should go is gone"
        assert [f"p{number}: {why}" in line for line in warned] == [True] * (rank == 0), warned
    checkpoint.retain = lambda infos: []
    assert listed_after(10) == ["p10"] and set(listing(ram)) == named_files(ram)
    create = ckpt.DistributedCheckpointFactory.create
    for wrong in ({"retain": list, "keep_last": 2}, {"keep_last": 0}, {"keep_last": "2"}, {"keep_last": 1.5}):
        refusal(lambda: create(None, ckpt.CheckpointOptions(**wrong)), ValueError, "keep_last")
    refusal(lambda: create(None, "a path"), ValueError, "must be CheckpointOptions")


@for_each(form=FORMATS, damaged=[0, 1])
@on_ranks(2)
def test_fallback_takes_all_ranks_to_the_newest_older_checkpoint_that_verifies(rank, ram, damaged, form):
    """Though one rank alone meets the damage. The one between has a damaged record."""

    def sharded(salt):
        return fully_shard(filled(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), salt))

    checkpoint, model = opened(ram), sharded("other")
    for prefix in ("zero", "one", "between", "two", "three"):
        checkpoint.save(sharded(prefix), None, to(prefix, format=form))
    dist.barrier()
    if rank == 0:
        shard = Shard(shards(ram, "two")[damaged if form is CheckpointFormat.MULTI_SHARD else -1])
        places = sorted(shard.place(name) for name in shard.header if "rng" not in name)
        flip(shard.path, [begin for begin, end in places if end > begin][-damaged])
        flip(ram / "between.metadata.json", -40)
    dist.barrier()
    refusal(lambda: checkpoint.load(model, None, at("two")), "CORRUPTED_CHECKPOINT")
    said, begin, deadlines = overheard(checkpoint), coord.Operation.__post_init__, []
    coord.Operation.__post_init__ = lambda op: begin(op) or deadlines.append(op._deadline)
    result = checkpoint.load(model, None, at("two", fallback=True))
    assert len(deadlines) > 2 and len(set(deadlines)) == 1, "one limit for all attempts"
    assert result.prefix == "one" and identical(state_of(model), state_of(sharded("one")))
    (line,) = (line for line in said if "falling back" in line)
    assert line == result.warnings[0] and "two" in line and "corrupt" in line


# ---- sequences: random steps and faults; after each step the disk is compared with a model ----------------
# A step is a dict drawn from a seed, and `play(tmp, steps)` replays any list of them. A model maps each
# prefix, oldest save first, to the number of the step that saved it; what was saved follows from that step,
# without a checkpoint. A fault may allow several models, until `settle` finds which one the disk shows.
# Of a failure the seed and the step's number are told: `drawn_steps(seed)` has the step.

SEQUENCES = int(os.environ.get("CKPT_SEQUENCES", "5"))
FIRST_SEQUENCE = int(os.environ.get("CKPT_FIRST_SEQUENCE", "0"))
ALL_RANKS, PLACES = 4, ("a", "a/b", "c")
VERBS = {"save": 10, "load": 10, "damage": 3, "gc": 2, "delete": 2}
TABLES = {1: [[0], [[0]]], 2: [[0, 1], [[0], [1]], [1, 0]], 3: [[0, 1, 2], [[0, 1, 2]], [2, 0, 1]]}
TABLES[4] = [[0, 1, 2, 3], [[0, 1], [2, 3]], [[3, 1], [0, 2]]]  # of meshes; FSDP2 cannot take the last ones


def drawn_steps(seed, length=37):
    """The steps of a sequence; the last one removes what crashed saves have left."""
    rng, steps = random.Random(seed), []

    one_of = rng.choice

    def likely(chance):
        return rng.random() < chance

    for _ in range(length):
        verb, layout = rng.choices([*VERBS], VERBS.values())[0], one_of(["plain", "fsdp2", "placed"])
        after_damage = bool(steps) and steps[-1]["verb"] == "damage"
        saved = [step["prefix"] for step in steps if step["verb"] == "save"][-2:]
        prefix = one_of(saved if saved and verb != "save" and likely(0.8) else PLACES)
        verb, prefix = ("load", steps[-1]["prefix"]) if after_damage else (verb, prefix)
        collective = verb in ("save", "load")
        ranks = one_of([1, 1, 2, 2, 3, 4]) if collective else 1
        fault = {"kind": one_of([*["error"] * 3, "cancel", "kill all", "kill one"])}
        fault |= {"rank": rng.randrange(ranks), "number": int((40 if collective else 10) * rng.random() ** 2)}
        fault |= {"late": likely(0.2), "changes only": likely(0.7), "for ever": likely(0.5)}
        fault |= {"code": one_of(["EIO", "ENOSPC", "ESTALE"]), "attempts": one_of([1, 1, 2])}
        save = {"format": one_of(FORMATS).value, "compression_level": one_of(LEVELS).value}
        save |= {"replicas": one_of(["verify", "trust"]), "overwrite": likely(0.8)}
        load = {"resharding_strategy": one_of(STRATEGIES), "strict_mode": likely(0.7)}
        load |= {"fallback": likely(0.4), "skip_validation": likely(0.2)}
        step = {"verb": verb, "prefix": prefix, "options": save if verb == "save" else load}
        meshes = len(TABLES[ranks]) - (layout == "fsdp2")
        step |= {"ranks": ranks, "layout": layout, "mesh": rng.randrange(meshes), "salt": rng.randrange(99)}
        step |= {"fault": fault if (collective or verb in ("gc", "delete")) and likely(0.4) else None}
        step |= {"shapes": 2 * seed + likely(0.1), "optimizer": likely(0.8), "rng": likely(0.3)}
        step |= {"staging": one_of([None, None, *STAGINGS])}
        step |= {"differ": save["replicas"] == "verify" and likely(0.5)}
        step |= {"keep": one_of([*[None] * 6, 1, 2, "even"]), "fresh": likely(0.5)}
        step |= {"misfit": one_of([*[None] * 5, "missing", "unexpected", "dtype", "shape"])}
        step |= {"cut": likely(0.4), "file": rng.random(), "place": rng.random()}
        steps.append(step | {"age": one_of([0.0, 86400.0]), "old": likely(0.3)})
    return [*steps, steps[-1] | {"verb": "gc", "ranks": 1, "fault": None, "age": 0.0, "old": True}]


def per_rank(step, rank):
    """The rank whose own values `rank` has after a save in this step, or a load of it."""
    return rank if step["differ"] and rank < step["ranks"] else 0


class Job(nn.Module):
    """What one rank saves or fills: a model, laid out as a step says, and its optimizer.

    The model has parameters and buffers of random shapes and dtypes, a tied one, a value that is no tensor.
    """

    def __init__(self, step, mesh=None, fresh=False):
        super().__init__()
        self.value, rng = None, random.Random(step["shapes"])
        for number in range(rng.randrange(1, 5)):
            shape = [rng.choice((0, 1, 2, 3, 7, 40)), *rng.choices((1, 2, 5, 40), k=rng.randrange(3))]
            dtype = getattr(torch, rng.choice(("float32", "float32", "float64", "bfloat16", "float16")))
            self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
        for name in ("count", "b0", "b1"):
            shape = [rng.choice((0, 1, 3, 30)) for _ in range(rng.randrange(3)) if name != "count"]
            dtype = getattr(torch, rng.choice(("int8", "uint8", "int32", "int64", "bool")))
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        rng.seed(step["salt"])
        if mesh and step["layout"] == "fsdp2":
            fully_shard(self, mesh=mesh)
        for name, weight in [*self.named_parameters()] if mesh and step["layout"] == "placed" else ():
            dims = [rng.randrange(-1, weight.ndim) for _ in range(mesh.ndim)]
            placements = [Replicate() if dim < 0 else ShardDim(dim) for dim in dims]
            placed = distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)
            self.register_parameter(name, nn.Parameter(placed))
        self.tied, self.optimizer = self.w0, torch.optim.AdamW(self.parameters())
        self.parts = self, self.optimizer if step["optimizer"] else None
        for weight in () if fresh else self.parameters():
            moments = {slot: torch.zeros_like(weight.detach()) for slot in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": torch.tensor(0.0), **moments}

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state

    def bend(self, misfit):
        """Make the model differ from the one that was saved."""
        if misfit == "missing":
            self.register_buffer("more", torch.zeros(3))
        elif misfit == "unexpected":
            del self.b0
        elif misfit:
            b0 = self.b0
            self.b0 = b0.double() if misfit == "dtype" else b0[..., None, None]
        return self

    def tensors(self):
        found = {f"model/{k}": v for k, v in self.state_dict().items() if k != "_extra_state"}
        for name, weight in self.named_parameters():
            state = self.optimizer.state.get(weight, {})
            found |= {f"optimizer/{name}/{slot}": tensor for slot, tensor in state.items()}
        return found

    def fill(self, salt, rank=0):
        """Fill all with bits that follow from the salt and the name; the buffer `count` also by the rank."""
        for name, tensor in self.tensors().items():
            seed = zlib.crc32(f"{salt}/{name}/{rank if name == 'model/count' else 0}".encode())
            size, most = tensor.numel() * tensor.element_size(), 2 if tensor.dtype is torch.bool else 256
            generator = torch.Generator().manual_seed(seed)
            data = torch.randint(most, (size,), generator=generator, dtype=torch.uint8)
            data[: size // 4 * (seed % 3)] = 1  # so that some pieces shrink, and others do not
            whole = data.view(tensor.dtype).view(tensor.shape)
            whole = torch.tensor(float(salt)) if name.endswith("/step") else whole
            if isinstance(tensor, DTensor):
                whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
            local_part(tensor).copy_(local_part(whole))
        self.value = {"salt": salt, "odd": (-0.0, float("nan"), b"\0")}
        self.optimizer.param_groups[0]["lr"] = salt / 7
        return self

    def state(self):
        """All that a load may change, as plain values."""
        found = {name: raw(local_part(tensor)) for name, tensor in self.tensors().items()}
        return found | {"model/value": self.value, "optimizer/lr": self.optimizer.param_groups[0]["lr"]}


def truth_of(step):
    """What was saved in a step, in one process."""
    return Job(step).fill(step["salt"])


def extra_of(salt, rank):
    return {"plan": {"epoch": salt, "t": torch.full((2,), salt)}, "own": f"{salt} of {rank}"}


class Player:
    """One rank. Each verb returns how its step ended, as `outcome_of` does."""

    def __init__(self, rank, tmp, steps):
        self.rank, self.tmp, self.steps, self.pids = rank, tmp, steps, gathered(os.getpid())
        groups = {ranks: dist.new_group([*range(ranks)]) for ranks in range(2, ALL_RANKS + 1)}
        self.coordinators = {n: ckpt.TorchCoordinator(group) for n, group in groups.items() if rank < n}
        self.coordinators[1] = ckpt.LocalCoordinator()
        self.meshes = {}
        for ranks, tables in TABLES.items():
            names = [tuple("xy"[: np.ndim(table)]) for table in tables]
            self.meshes[ranks] = [DeviceMesh("cpu", t, mesh_dim_names=n) for t, n in zip(tables, names)]

    def perform(self, number, kept):
        """Perform a step. `kept`: the steps whose saves are there, by prefix."""
        self.kept, self.cancel, strike = kept, threading.Event(), Strike(-1, None)
        step = self.steps[number] | {"number": number}
        fault, deadly = step["fault"], is_deadly(step)
        if self.rank >= step["ranks"]:
            return None
        if fault and fault["rank"] == self.rank:
            acts = {"kill one": lambda op: os._exit(1), "kill all": self.kill_all}
            acts |= {"cancel": lambda op: self.cancel.set(), "error": fail(getattr(errno, fault["code"]))}
            act = acts[fault["kind"]]
            when = is_change if fault["changes only"] and step["verb"] != "load" else lambda op: True
            strike = Strike(fault["number"], act, when, until=FOREVER if fault["for ever"] else None)
        seam = Seam(**{"after" if fault and fault["late"] else "before": strike})
        attempts, coordinator = fault["attempts"] if fault else 1, self.coordinators[step["ranks"]]
        checkpoint = over(Storage(self.tmp, seam), coordinator, attempts)
        checkpoint.default_timeout = DEADLINE_S if deadly else checkpoint.default_timeout
        kind, rank, message = getattr(self, step["verb"])(step, checkpoint)
        return kind, rank, str(message), strike.hit is not None

    def kill_all(self, op):
        for pid in sorted(self.pids, key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)

    def save(self, step, checkpoint):
        rank, salt, keep = per_rank(step, self.rank), step["salt"], step["keep"]
        job = Job(step, self.meshes[step["ranks"]][step["mesh"]]).fill(salt, rank)
        checkpoint.keep_last = None if keep == "even" else keep
        if keep == "even":
            checkpoint.retain = lambda infos: [x.prefix for x in infos if not x.custom_metadata["number"] % 2]
        options = to(step["prefix"], **step["options"], include_rng_state=step["rng"])
        options.staging, options.custom_metadata = step["staging"] or "eager", {"number": step["number"]}
        torch.manual_seed(100 * salt + self.rank)
        rest = {"extra_state": extra_of(salt, rank), "cancel": self.cancel}
        if step["staging"] is None:
            return outcome_of(lambda: checkpoint.save(*job.parts, options, **rest))
        pending = checkpoint.save_async(*job.parts, options, **rest)
        pending.wait_staged()
        job.fill(salt + 1)  # must not change what is saved
        return outcome_of(pending.result)

    def load(self, step, checkpoint):
        mesh, shapes = self.meshes[step["ranks"]][step["mesh"]], self.kept.get(step["prefix"], step)["shapes"]
        job = Job(step | {"shapes": shapes}, mesh, step["fresh"]).bend(step["misfit"]).fill(step["salt"] + 1)
        before, random_numbers = job.state(), torch.manual_seed(7).get_state()
        options = at(step["prefix"], **step["options"], load_rng_state=step["rng"])
        options.load_optimizer = step["optimizer"]
        answer = outcome_of(lambda: checkpoint.load(*job.parts, options, cancel=self.cancel))
        (kind, _, result), after = answer, job.state()
        if kind != "returned":
            changed = [name for name in before | after if not identical(before.get(name), after.get(name))]
            assert not changed or "undefined" in result, f"{changed} changed: {answer}"
            return answer
        source = self.kept[result.prefix]
        salt, ranks, own = source["salt"], source["ranks"], per_rank(source, self.rank)
        truth = Job(step | {"shapes": source["shapes"]}, mesh).fill(salt, own).bend(step["misfit"]).state()
        others = "model/more" if step["optimizer"] and source["optimizer"] else ("model/more", "optimizer")
        truth = before | {name: value for name, value in truth.items() if not name.startswith(others)}
        extra, per_saved_rank, differ = extra_of(salt, own), {}, source["differ"] and ranks > 1
        if differ and self.rank >= ranks:
            del extra["own"]
        if differ and ranks != step["ranks"]:
            per_saved_rank = {"own": {rank: f"{salt} of {rank}" for rank in range(ranks)}}
        if step["rng"] and source["rng"] and self.rank < ranks:
            random_numbers = torch.Generator().manual_seed(100 * salt + self.rank).get_state()
        truth |= {"extra": extra, "extra per rank": per_saved_rank, "random numbers": random_numbers}
        after |= {"extra": dict(result.extra_state), "extra per rank": result.extra_state_per_rank}
        after["random numbers"] = torch.get_rng_state()
        wrong = [name for name in truth | after if not identical(truth.get(name), after.get(name))]
        assert not wrong, f"{result.prefix} came back wrong: {wrong}"
        return kind, None, result.prefix

    def gc(self, step, checkpoint):
        if step["old"]:
            make_old(self.tmp)
        # An earlier step may have made a fence old, and its own gc may have been killed.
        limit_s = min(step["age"], 3600.0)
        young = {fence for fence in fences(self.tmp) if time.time() - fence.stat().st_mtime < limit_s}
        kind, removed = "STORAGE_ERROR", []
        with contextlib.suppress(OSError):
            kind, removed = "returned", ckpt.collect_garbage(checkpoint.storage, step["age"])
        assert young <= set(fences(self.tmp)), f"gc took the fence of a save that may be alive: {removed}"
        return kind, None, removed

    def delete(self, step, checkpoint):
        return outcome_of(lambda: checkpoint.delete_checkpoint(step["prefix"]))

    def damage(self, step, checkpoint):
        """Flip a bit of a file, or cut it. Tell whether the record still looks committed."""
        if step["prefix"] not in self.kept or self.kept[step["prefix"]]["damage"]:
            return "returned", None, ""
        files = own_files(self.tmp, step["prefix"])
        path = self.tmp / files[int(step["file"] * len(files))]
        data = bytearray(path.read_bytes())
        place = len(data) - 1 - int(step["place"] ** 3 * len(data))  # mostly behind the header
        data[place] ^= 1 << place % 8
        path.write_bytes(data[:place] if step["cut"] else data)
        return "returned", None, "record" if path.suffix == ".json" else "cut" if step["cut"] else "flip"


def stored(steps, state):
    """The steps whose saves are on disk, by prefix, each with the damage done to it since."""
    return {p: steps[n] | {"damage": state["damage"].get(n)} for p, n in state["models"][0].items()}


def right_kinds(step, kept, dirty):
    """How a step may end, its fault apart."""
    prefix, verb, options = step["prefix"], step["verb"], step["options"]
    exists = prefix in kept
    if verb == "save":
        return {"SAVE_FAILED" if exists and not options["overwrite"] else "returned"}
    if verb == "delete":  # it may remove what a crash has left
        return {"returned"} if exists else {"STORAGE_ERROR", "returned"} if dirty else {"STORAGE_ERROR"}
    if verb != "load":
        return {"returned"}
    if not exists:
        return {"LOAD_FAILED"}
    hidden = kept[prefix]["damage"] == "record"  # its age too
    older = [*kept] if hidden else [*kept][: [*kept].index(prefix)]
    older = [p for p in reversed(older) if p != prefix and kept[p]["damage"] in (None, "flip")]
    found = {"CORRUPTED_CHECKPOINT"} if hidden else set()
    for source in (kept[p] for p in [prefix, *(older if options["fallback"] else [])]):
        unfit = step["misfit"] == "shape" or source["shapes"] != kept[prefix]["shapes"]
        differs = step["misfit"] or (step["optimizer"] and not source["optimizer"])
        unfit |= options["strict_mode"] and bool(differs)
        if source["damage"] in (None, "flip"):
            found |= {"VALIDATION_FAILED" if unfit else "returned"}
        if source["damage"] is None and not hidden:
            return found
    return found | {"CORRUPTED_CHECKPOINT"}


def check_outcomes(steps, number, outcomes, state):
    """Check how a step ended on the ranks that live. Note in `state` what may be on disk now."""
    step, model, kept = steps[number], state["models"][0], stored(steps, state)
    prefix, fault, outcomes = step["prefix"], step["fault"], [outcome for outcome in outcomes if outcome]
    deadly = is_deadly(step)
    hit = bool(fault) and (deadly or any(was_hit for *_, was_hit in outcomes))
    kinds = right_kinds(step, kept, state["dirty"])
    if hit:
        kinds |= {"TIMEOUT" if deadly else "STORAGE_ERROR" if fault["kind"] == "error" else "CANCELLED"}
    if hit and step["verb"] == "load" and prefix in kept and kept[prefix]["damage"]:
        kinds |= {"CORRUPTED_CHECKPOINT"}  # it may find nothing to fall back to
    ends = {outcome[:2] for outcome in outcomes}
    if deadly and "CORRUPTED_CHECKPOINT" in dict(ends):  # who found damage says so, others who is dead
        ends.discard(("TIMEOUT", fault["rank"]))
    assert len(ends) <= 1 and {kind for kind, _ in ends} <= kinds, f"not {kinds}, the same on all: {outcomes}"
    kind, message = (outcomes[0][0], outcomes[0][2]) if outcomes else ("died", "")
    if step["verb"] == "damage" and message:
        state["damage"][model[prefix]] = message
        del state["files"][model[prefix]]
    once = hit and not deadly and step["verb"] == "save" and not fault["for ever"] and kind != "returned"
    state["dirty"] |= hit and not once
    others = {p: n for p, n in model.items() if p != prefix}
    if step["verb"] == "delete":
        state["models"] = [others] if kind == "returned" else [model, others] if hit else [model]
    if step["verb"] == "save" and (kind in ("returned", "died") or "may have been committed" in message):
        state["dirty"] |= prefix in kept and kept[prefix]["damage"] == "record"  # which hides its files
        new, keep = others | {prefix: number}, step["keep"]
        listed = [p for p, n in new.items() if state["damage"].get(n) in (None, "flip")]
        stay = [p for p in listed if new[p] % 2 == 0] if keep == "even" else listed[-(keep or len(listed)) :]
        gone = [p for p in listed if p not in (*stay, prefix)]
        counts = range(len(gone) + 1) if hit else [len(gone)]
        some = itertools.chain(*(itertools.combinations(gone, count) for count in counts))
        state["models"] = [{p: n for p, n in new.items() if p not in less} for less in some]
        state["models"] += [model] * (kind != "returned")


def settle(tmp, steps, state, gc=None):
    """Find the model that is true of the disk, and check every file. `gc`: the minimum age, after `gc`."""
    checkpoint, names, damage = over(tmp), set(listing(tmp)), state["damage"]
    found = [(info.prefix, info.custom_metadata["number"]) for info in checkpoint.list_checkpoints()]
    records = {name.removesuffix(".metadata.json") for name in names if name.endswith(".metadata.json")}
    listed = [[item for item in m.items() if damage.get(item[1]) in (None, "flip")] for m in state["models"]]
    true = [m for m, items in zip(state["models"], listed) if set(m) == records and found == items]
    assert true, f"listed: {found}, records: {records}; right would be one of {state['models']}"
    state["models"], (model, *_) = true[:1], true
    latest, kept = checkpoint.latest_checkpoint(), stored(steps, state)
    assert (latest and latest.prefix) == (found[-1][0] if found else None), f"the latest is {latest}"
    for prefix, number in model.items():
        present = names.intersection(own_files(tmp, prefix))  # a damaged record may name others
        files = {name: zlib.crc32((tmp / name).read_bytes()) for name in present}
        if number not in state["files"]:  # it is new, or newly damaged
            is_valid = checkpoint.validate_checkpoint(prefix).is_valid
            assert is_valid is not bool(damage.get(number)), f"{prefix} is valid: {is_valid}"
            wrong = [] if damage.get(number) else what_is_wrong(checkpoint, kept, prefix)
            assert not wrong, f"{prefix} was saved wrong: {wrong}"
        assert state["files"].setdefault(number, files) == files, f"the files of {prefix} have changed"
    hidden = tuple(f"{p}{end}" for p in model if kept[p]["damage"] == "record" for end in "/.")
    left = names.difference(*(own_files(tmp, prefix) for prefix in model))
    left = {name for name in left if not name.startswith(hidden)}
    if gc is not None:
        live = {path.name.split(".")[-2] for path in fences(tmp)}
        unknown = {name for name in left if not live & set(re.findall("[0-9a-f]{8}", name))}
        assert not (left if gc == 0 else unknown), f"gc has left {left}"
        state["dirty"] = bool(left or hidden)
    assert state["dirty"] or not left, f"left over: {left}"


def what_is_wrong(checkpoint, kept, prefix):
    """What a load of a checkpoint, its export, or its difference from another one gets wrong."""
    step, storage = kept[prefix], checkpoint.storage
    job, truth, parts = Job(step), truth_of(step), ("model", "optimizer") if step["optimizer"] else "model"
    checkpoint.load(*job.parts, at(prefix, load_rng_state=False, load_optimizer=step["optimizer"]))
    found, right = job.state(), truth.state()
    wrong = [name for name in found if name.startswith(parts) and not identical(found[name], right[name])]
    exported, state = Path(storage.base_path).parent / "out" / "m.safetensors", truth.state_dict()
    del state["_extra_state"]
    ckpt.export_checkpoint(storage, prefix, exported, model_only=True)
    wrong += ["its export"] * (contents(exported) != as_stored(state))
    for other in PLACES:
        kind, _, told = outcome_of(lambda: ckpt.diff_checkpoints(storage, prefix, other))
        damage = other in kept and kept[other]["damage"]
        kinds = ["returned" if other in kept else "LOAD_FAILED"] + ["CORRUPTED_CHECKPOINT"] * bool(damage)
        wrong += [f"the difference from {other}: {kind}"] * (kind not in kinds)
        if kind == "returned" and not damage:
            a, b = truth.tensors(), truth_of(kept[other]).tensors()
            differ = {name for name in a | b if not identical(a.get(name), b.get(name))}
            wrong += [name for name in differ ^ {found.name for found in told} if name.startswith("model/w")]
    return wrong


def is_deadly(step):
    return bool(step["fault"]) and "kill" in step["fault"]["kind"]


def perform(rank, world_size, tmp, steps, numbers, state):
    """Perform some steps on every rank; rank 0 judges each. `play` judges a step that kills."""
    st.UNIT_BYTES, st.BLOCK_BYTES, st._MIN_DIRECT_BYTES = PAGE, 2 * PAGE, PAGE
    logging.disable(logging.CRITICAL)
    player, box, number = Player(rank, tmp, steps), [state], "before"
    try:
        if rank == 0:
            settle(tmp, steps, state)
        for number in numbers:
            dist.broadcast_object_list(box)
            outcome = player.perform(number, stored(steps, box[0]))
            if is_deadly(step := steps[number]):
                return outcome
            outcomes = gathered(outcome)
            if rank == 0:
                check_outcomes(steps, number, outcomes, state)
                done = step["verb"] == "gc" and outcomes[0][0] == "returned" and not outcomes[0][3]
                settle(tmp, steps, state, gc=(0.0 if step["old"] else step["age"]) if done else None)
    except Exception as error:
        raise AssertionError(f"step {number}: {error!r}") from error
    return box[0]


def play(base, steps):
    """Perform all steps; after each that may kill, in new processes."""
    tmp, first = Path(base) / "base", 0
    tmp.mkdir()
    state = {"models": [{}], "damage": {}, "dirty": False, "files": {}}
    for number in [n for n, step in enumerate(steps) if is_deadly(step)]:
        state = run(ALL_RANKS, perform, tmp, steps, range(first, number), state)[0]
        ends = run(ALL_RANKS, perform, tmp, steps, [number], state, dies=range(ALL_RANKS))
        victim, first = steps[number]["fault"]["rank"], number + 1
        assert "died" not in ends or ends[victim] == "died", f"step {number}: another than {victim}: {ends}"
        check_outcomes(steps, number, [end for end in ends if end != "died"], state)
    run(ALL_RANKS, perform, tmp, steps, range(first, len(steps)), state)


@pytest.mark.parametrize("seed", range(FIRST_SEQUENCE, FIRST_SEQUENCE + SEQUENCES))
def test_any_sequence_of_saves_loads_faults_and_clean_up_leaves_what_a_model_says(ram, seed):
    play(ram, steps := drawn_steps(seed))
    COUNTS["steps in sequences"] += len(steps)


# ---- README: its examples run as they stand ----------------------------------------------------------------


def readme_blocks():
    return re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_ten_line_example_of_the_readme_prints_what_the_readme_says(tmp_path):
    line = [sys.executable, "-c", readme_blocks()[0]]
    said = subprocess.check_output(line, cwd=tmp_path, text=True, timeout=HANG_S)
    assert f"\n```\n{said}```\n" in README and (tmp_path / "ckpts/step_1.metadata.json").exists()


def test_the_readme_names_every_option_with_its_default_and_every_type_of_exception():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", README, re.MULTILINE)
    for kind in (SaveOptions, LoadOptions, ckpt.CheckpointOptions):
        for name, default in vars(kind()).items():
            shown = default.name if isinstance(default, enum.Enum) else repr(default).replace("'", '"')
            if dataclasses.is_dataclass(default):
                shown = f"{type(default).__name__}()"
            assert any(f"`{name}`" in names and f"`{shown}`" in cell for names, cell in rows), (name, shown)
    for name, default in vars(ckpt.RetryPolicy()).items():
        assert f"{name}={'(OSError,)' if name == 'retryable_exceptions' else default}" in README
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", README, re.MULTILINE))
    assert {kind.name for kind in ExceptionType} <= named


def test_the_readme_is_short_and_its_line_counts_are_about_those_of_the_files():
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert list(counts) == ["ckpt.py", "ckpt_coord.py", "ckpt_storage.py", "test_ckpt.py", "bench_ckpt.py"]
    (total,) = re.findall(r"([\d,]+) lines", README)
    assert int(total.replace(",", "")) == sum(list(counts.values())[:3]) and len(README) <= 30_000
    for name, count in counts.items():
        assert abs(count / len((HERE / name).read_text().splitlines()) - 1) < 0.05, name


def training_script(steps):
    """The README's training job, with another number of steps, which take no time."""
    (script,) = [block for block in readme_blocks() if "init_process_group" in block]
    script, slept = re.subn(r"        time.sleep\(0.1\).*\n", "", script)
    assert slept == script.count("STEPS = 300\n") == 1
    return script.replace("STEPS = 300\n", f"STEPS = {steps}\n")


def newest_step(tmp):
    """The step of the newest checkpoint of that job."""
    latest = opened(tmp / "ckpts").latest_checkpoint()
    return int(latest.prefix.removeprefix("step_")) if latest else 0


JOB_STEPS, KILLS = 300, 20
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def test_the_torchrun_example_of_the_readme_trains_stops_on_sigterm_and_resumes_on_other_ranks(tmp_path):
    options = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    script, deadline = tmp_path / "train.py", time.monotonic() + HANG_S
    script.write_text(training_script(steps=1_000_000))
    job = subprocess.Popen([*TORCHRUN, "2", script], **options)
    try:
        while not newest_step(tmp_path) and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        said, errors = job.communicate(timeout=HANG_S)
        errors = errors.replace("Signals.SIGTERM", "15")  # as Python 3.10 writes it
    finally:
        job.kill()
    stopped = newest_step(tmp_path)
    assert stopped and f"stopped at step {stopped}\n" in said and job.returncode == 1, errors
    for words in ("Received 15 death signal, shutting down workers", "got signal: 15", "INFO:ckpt:saved"):
        assert words in errors and words in README
    for ranks, steps in ((3, stopped + 7), (1, stopped + 14)):
        script.write_text(training_script(steps))
        before = newest_step(tmp_path)
        done = subprocess.run([*TORCHRUN, str(ranks), script], **options, timeout=HANG_S)
        assert done.returncode == 0 and f"stopped at step {steps}\n" in done.stdout, done.stderr
        assert f"resumed from step_{before} on {ranks} ranks\n" in done.stdout
        assert newest_step(tmp_path) == steps // 5 * 5


def test_a_training_job_killed_twenty_times_ends_with_the_state_of_one_that_never_was(ram):
    truth = run(2, train_by_the_readme, ram / "alone")
    tmp, rng, reached = ram / "killed", random.Random(7), 0
    for number in range(KILLS):
        kill = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
        victims = rng.choice(((0,), (1,), (0, 1), (1, 0)) if kill is signal.SIGTERM else ((0, 1), (1, 0)))
        plan = types.SimpleNamespace(kill=kill, victims=victims, steps=rng.randrange(12))
        plan.delay_s, plan.pause_s = 0.02 * rng.random(), rng.choice((0.0, 0.3))
        answers = run(2, train_by_the_readme, tmp, plan, dies={0, 1})
        before, reached = reached, newest_step(tmp)
        assert reached >= before, (plan, "a committed checkpoint is gone")
        if kill is signal.SIGTERM:
            assert [answer[0] for answer in answers] == [reached, reached], (plan, answers)
    assert reached < JOB_STEPS, "the last kills met a job that was done: let it take longer"
    assert run(2, train_by_the_readme, tmp) == truth
    st.collect_garbage(ckpt.LocalStorage(tmp / "ckpts"), 0.0)
    assert set(listing(tmp / "ckpts")) == named_files(tmp / "ckpts")
    COUNTS["jobs killed"] += KILLS


def train_by_the_readme(rank, world_size, tmp, plan=None):
    """Run the README's job to its end, or to the planned one; its last step, and all its state."""
    tmp.mkdir(exist_ok=True)
    os.chdir(tmp)
    pids, names = gathered(os.getpid()), {"__name__": "__main__"}
    if plan is not None and rank == plan.victims[-1]:
        threading.Thread(target=carry_out, args=(plan, pids, names), daemon=True).start()
    # This process goes on, and `run` has made the group.
    left_out = "^(dist.init_process_group|dist.barrier|os._exit|logging.basic).*\n"
    script, count = re.subn(left_out, "", training_script(JOB_STEPS), flags=re.MULTILINE)
    assert count == 4
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(script, "README.md", "exec"), names)
    except Exception:
        if plan is None or plan.kill is signal.SIGTERM:
            raise
        return "the other rank is dead"
    parts = names["model"].state_dict(), *names["optimizer"].state_dict()["state"].values()
    bits = [raw(local_part(t)) for part in parts for t in part.values()]
    return names["step"], bits, names["scheduler"].state_dict(), raw(torch.get_rng_state())


def carry_out(plan, pids, names):
    """Send the signals, from a thread of the last victim: in the load, or so many steps after it."""
    goal = None
    while "checkpoint" not in names or (plan.steps and not (goal and names["step"] >= goal)):
        if goal is None and "stop" in names:  # it stands after the load
            goal = names["step"] + plan.steps
        time.sleep(0.0005)
    time.sleep(plan.delay_s)
    for victim in plan.victims:
        os.kill(pids[victim], plan.kill)
        time.sleep(plan.pause_s)


def test_the_benchmarks_rows_for_growth_have_a_figure_for_all_that_they_name(tmp_path, monkeypatch):
    import bench_ckpt

    monkeypatch.setattr(bench_ckpt, "GROWTH_RANKS", (4,))
    monkeypatch.setattr(bench_ckpt, "GROWTH_TENSORS", 8)
    bench = types.SimpleNamespace(rows=[], scratch=tmp_path, remove=lambda _: None, progress=lambda _: None)
    bench_ckpt.growth(bench)
    for row in bench.rows:
        assert [line.unit for line in row.lines] == ["s", "s", "MiB", "MB", "MB"]
        assert all(line.median > 0 for line in row.lines if line.unit != "MiB")
    # 8 tensors of 4 shards each, or of one piece; and a value of each rank
    assert [row.notes for row in bench.rows] == [["36 pieces"], ["12 pieces"]]


def test_the_benchmark_refuses_a_load_that_gives_other_bits():
    import bench_ckpt

    state = bench_ckpt.State(nn.ParameterList(torch.empty(6, 4) for _ in range(3)), None).filled()
    saved = [tensor.clone() for tensor in state.tensors()]

    def load(order):
        for tensor, number in zip(state.tensors(), order):
            tensor.copy_(saved[number])

    state.check(lambda: load((0, 1, 2)))
    for wrong in ((), (0, 2, 1), (0, 1)):
        refusal(lambda: state.check(lambda: load(wrong)), RuntimeError, "other bits")


def test_the_quick_benchmark_ends_in_one_sentence(tmp_path):
    words = "--quick --size=1M --rounds=1 --nproc=1 --rows=save-fsdp,reshard-up --json={0}/out.json --dir={0}"
    last = output_of(HERE / "bench_ckpt.py", *words.format(tmp_path).split()).splitlines()[-1]
    sentence = "Saved .* GB from 1 ranks?, loaded it on 2 and verified every bit: .* the load .*"
    assert re.fullmatch(sentence, last)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["summary"] == last and [row["key"] for row in found["rows"]] == ["save-fsdp", "reshard-up"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
