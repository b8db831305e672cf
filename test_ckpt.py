"""The specification of ckpt, as tests: every promise of the README, tried on real files and real processes.

    python -m pytest -q test_ckpt.py                 all of it
    python -m pytest -q test_ckpt.py -k reshard      one section

Sections follow the README's promises: API, bytes, protocol, resharding, resume, bad input, command line, format, recipes,
faults, README.
Nothing is mocked. Ranks are real processes that speak gloo (`run` below); files are reopened with a reader that
shares no code with the library (`Shard` below, and the `safetensors` package where it is installed); the truth
that a restored tensor is compared with never went through a checkpoint. A hang is a failure, never a wait; no test asserts
a time on the wall clock: work is bounded by counts, processor time and memory.

The fault matrix. At every fault a reader sees exactly the old or exactly the new checkpoint, bit for bit, or a typed
error where nothing was ever committed; once `save` has returned, only the new one.

    row | fault                                            | tests (test_...)
    1   | a process ends after any operation               | a_process_that_ends_at_any_operation_...
    2   | power loss: unsynced writes and names, torn      | a_power_loss_at_any_moment_of_a_save_..., ..._of_a_delete_or_...,
        |                                                  | a_power_loss_right_after_..., a_power_loss_during_any_kind_of_...
    3   | crash or error during clean-up                   | a_crash_during_the_clean_up_..., an_error_at_any_operation_of_gc_...
    4   | disk full, quota                                 | a_disk_that_is_full_from_byte_n_on_..., a_full_disk_is_a_...
    5   | the same again during the retry                  | the same (3 attempts), an_error_at_any_operation_... (from then on)
    6   | I/O error on write, fsync, directory, close      | a_file_whose_write_or_sync_failed_..., an_error_at_any_operation_...
    7   | short reads and writes, EINTR, over 0x7ffff000   | short_reads_..., signals_that_..., a_read_or_write_of_more_...,
        |                                                  | a_write_that_takes_nothing_...
    8   | error in any worker thread                       | an_error_in_any_worker_thread_...
    9   | SIGKILL of a rank in each step, rank 0 too       | a_rank_killed_in_any_step_..., a_rank_killed_while_it_waits_...,
        |                                                  | a_rank_that_dies_or_stops_in_an_exchange_...
    10  | a rank raises in each step                       | a_rank_that_raises_in_any_step_..., what_keeps_one_rank_from_...,
        |                                                  | an_error_in_the_clean_up_after_a_commit_...
    11  | SIGSTOP past the deadline, then SIGCONT          | a_rank_stopped_past_the_deadline_..., ranks_retry_together_...
    12  | the process that hosts the store dies            | if_the_host_of_the_store_dies_...
    13  | each bit flipped, of every file                  | each_bit_and_each_length_..., a_flipped_bit_anywhere_...
    14  | cut, extended; shards swapped, replayed          | each_bit_and_each_length_..., shards_swapped_duplicated_...
    15  | tensor-file header fuzz, seeded                  | fuzz_of_headers_and_records_... (header, import), a_key_that_...
    16  | record fuzz, seeded                              | fuzz_of_headers_and_records_... (record), a_key_that_comes_twice_...
    17  | well-formed lies: 10^6 entries, too large shapes | a_well_formed_lie_..., a_lie_never_takes_...
    18  | decompression bomb                               | a_decompression_bomb_...
    19  | names: '..', absolute, NUL, backslash, long      | a_bad_name_in_a_record_..., a_bad_path_..., a_bad_prefix_...,
        |                                                  | files_with_names_that_no_checkpoint_can_have_...
    20  | a link, FIFO, device, directory instead of ours  | what_replaces_a_file_or_directory_of_ours_...,
        |                                                  | a_link_below_the_base_path_...
    21  | pickle payload in any file                       | a_pickle_in_any_file_..., no_pickle_is_ever_loaded
    22  | two jobs, one prefix                             | two_jobs_on_one_prefix_..., two_jobs_in_lockstep_...
    23  | reader during overwrite, delete, retention       | a_reader_between_any_two_operations_...,
        |                                                  | a_reader_that_a_writer_overtakes_..., a_listing_that_...,
        |                                                  | a_save_during_which_another_prefix_changes_...
    24  | SIGTERM, KeyboardInterrupt at any operation      | a_signal_at_any_operation_..., an_interrupt_on_one_rank_...,
        |                                                  | an_interrupt_of_a_rank_that_waits_...
    25  | cancel in each step; exit with a save in flight  | cancel_in_any_step_..., the_cancel_of_a_pending_save_...,
        |                                                  | a_failure_or_cancel_stops_..., a_cancel_on_one_rank_...,
        |                                                  | an_interpreter_that_exits_..., an_exit_with_a_save_in_flight_...
    26  | tensors changed after, or during, staging        | tensors_changed_after_wait_staged_...,
        |                                                  | a_tensor_changed_during_overlapped_staging_...
    27  | the clock is ten years off                       | a_clock_that_is_ten_years_off_...
    28  | clean-up races a live writer                     | clean_up_at_any_operation_of_a_live_save_..., clean_up_that_...,
        |                                                  | clean_up_keeps_a_save_whose_fence_...
    29  | rename "fails" but happened                      | a_rename_that_reports_an_error_but_happened_...
    30  | a read or write hangs past its operation's end   | a_read_that_returns_after_..., however_a_load_ends_...,
        |                                                  | a_load_ends_only_when_..., a_write_that_returns_after_...
    31  | ranks at different steps of training             | ranks_at_different_optimizer_steps_...
    32  | one name on disjoint meshes                      | a_name_on_disjoint_meshes_...
    33  | copies drift apart outside of their mesh         | copies_that_drift_apart_outside_of_their_mesh_...
    34  | layouts of several boxes, uneven, empty          | every_layout_of_a_tensor_..., a_shard_of_several_runs_...
    35  | names: control, bidi characters, lone surrogates | a_name_that_utf_8_cannot_encode_..., no_stored_name_...,
        |                                                  | a_lone_surrogate_in_a_record_...
    36  | a FIFO, device, directory as source of an import | what_is_no_regular_file_...
    37  | a record that cannot be read beside good ones    | an_unreadable_record_...
    38  | no hard links, no O_DIRECT, no directory fsync   | a_file_system_without_something_...
    -   | a job of two ranks is killed again and again     | a_training_job_killed_twenty_times_...
    -   | twelve mutants of the library                    | each_mutant_of_the_library_is_caught

The fuzz is seeded: the same cases every time, and with `CKPT_FUZZ_ROUNDS=10` ten times as many.

Slow, and why: each bit (a hundred thousand loads), 200 saves in the background (leaks show late), the job that is killed
twenty times (each start imports torch), the power losses (every state is a directory that is loaded).
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
import fcntl
import functools
import gc
import importlib
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import os
import pty
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
import termios
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
from ckpt import (
    CheckpointException,
    CheckpointFormat,
    CompressionLevel,
    ExceptionType,
    LoadOptions,
    SaveOptions,
)

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE), os.environ.get("PYTHONPATH")])
)  # for children
# c10d looks up the name of a peer that it has lost; where no name server answers, that would take ten seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # torch is chatty
torch.set_num_threads(1)
gc.freeze()  # collections skip the objects that torch made at import: a fifth of the time of the long loops below
MiB = 1 << 20
BLOCK = 4 * MiB
UNIT = 256 << 10
PAGE = 4096
FORMATS = list(CheckpointFormat)
LEVELS = list(CompressionLevel)
STRATEGIES = ["parallel", "sequential", "broadcast"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# A wait of this length is a hang, however busy the machine. It is shorter than the library's default deadline of 600 s, so
# that a rank that waits for that deadline hangs too. No test asserts how long something takes on the wall clock.
HANG_S = 500.0


# ---- the one multi-process helper ------------------------------------------------------------------------------------
# A fork server imports torch once; each rank of each test is a fresh fork of it, so a rank starts in milliseconds, no
# state leaks from test to test, and a killed rank costs nothing. The parent hosts the store, as torchrun does.

CTX = multiprocessing.get_context("forkserver")
CTX.set_forkserver_preload(["torch._dynamo", "test_ckpt"])


def _rank_main(pipe, port, rank, world_size, body, tmp, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        if port is None:
            answer = (True, body(Path(tmp), *args))
        else:
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            answer = (True, body(rank, world_size, Path(tmp), *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.recv()  # stay until every rank has reported: leaving early closes sockets that others still use


def run(world_size, body, tmp, *args, limit_s=HANG_S, dies=(), group=True):
    """Run `body(rank, world_size, tmp, *args)` in `world_size` processes; return their results in the order of ranks.

    Without a `group`, the processes know nothing of each other, and have no threads: `body(tmp, *args)`.
    Fails with the tracebacks of the ranks that raised, died (except those in `dies`) or still run after `limit_s`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pending, results, failures = [], {}, [None] * world_size, []
    for rank in range(world_size):
        pipe, theirs = CTX.Pipe()
        arguments = (theirs, store.port if group else None, rank, world_size, body, str(tmp), args)
        processes.append(CTX.Process(target=_rank_main, args=arguments))
        processes[-1].start()
        theirs.close()
        pending[pipe] = rank
    deadline = time.monotonic() + limit_s
    try:
        while pending and (ready := connection.wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = pending.pop(pipe)
                processes[rank].pipe = pipe  # keep our end open until the end
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = rank in dies, "died"
                if not ok:
                    failures.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + 30)
        if pending:
            failures.append(
                f"ranks {sorted(pending.values())} hang: still running at the limit of {limit_s} s"
            )
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return results


# ---- opening, comparing, reading by hand -----------------------------------------------------------------------------


def opened(tmp, coordinator=None, **options):
    """The library, as a user opens it, on the directory `tmp`."""
    storage = ckpt.StorageOptions(connection_settings={"base_path": str(tmp)})
    options = ckpt.CheckpointOptions(**{"storage": storage, **options})
    return ckpt.DistributedCheckpointFactory.create(coordinator, options)


def to(prefix="p", **options):
    return SaveOptions(checkpoint_prefix=prefix, **options)


def at(prefix="p", **options):
    return LoadOptions(checkpoint_prefix=prefix, **options)


def told(call):
    """The exception of `call()` as plain values (type, rank, message), or ("returned", None, value)."""
    try:
        return "returned", None, call()
    except CheckpointException as error:
        return error.type.name, error.rank, str(error)
    except ValueError as error:
        return "ValueError", None, str(error)


def refusal(call, kind=None):
    """The message of the CheckpointException (of type `kind`) that `call()` must raise."""
    with pytest.raises(CheckpointException) as caught:
        call()
    assert kind is None or caught.value.type is kind, (caught.value.type, str(caught.value))
    return str(caught.value)


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

    ITEM: ClassVar = dict.fromkeys(
        ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"], 1
    )
    ITEM |= dict.fromkeys(["U16", "I16", "F16", "BF16"], 2) | dict.fromkeys(["U32", "I32", "F32"], 4)
    ITEM |= dict.fromkeys(["U64", "I64", "F64", "C64"], 8) | {"F4": 0.5}

    def __init__(self, path):
        def no_duplicates(pairs):
            assert len(dict(pairs)) == len(pairs), "duplicate keys"
            return dict(pairs)

        self.path, self.bytes = Path(path), Path(path).read_bytes()
        (length,) = struct.unpack("<Q", self.bytes[:8])
        text = self.bytes[8 : 8 + length]
        assert length <= 100_000_000 and text.startswith(b"{")
        self.header = json.loads(text.decode(), object_pairs_hook=no_duplicates)
        assert text.rstrip(b" ").endswith(b"}")
        self.metadata = self.header.pop("__metadata__", {})
        assert all(type(value) is str for value in self.metadata.values())
        self.data_at = 8 + length
        assert self.data_at % PAGE == 0
        assert list(self.metadata) == ["format", "ckpt_version", "unit_bytes", "crc32"]
        assert list(self.metadata.values())[:3] == ["pt", "2", str(UNIT)]
        end = 0
        for name, entry in sorted(self.header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            size = self.ITEM[entry["dtype"]]
            assert begin == end and stop - begin == size * math.prod(entry["shape"]), (name, entry, end)
            assert begin % max(1, size) == 0, f"{name} is not aligned"
            end = stop
        assert self.data_at + end == len(self.bytes)
        units = [self.bytes[at : at + UNIT] for at in range(self.data_at, len(self.bytes), UNIT)]
        assert self.metadata["crc32"] == "".join(f"{zlib.crc32(unit):08x}" for unit in units)

    def data(self, name):
        begin, end = self.header[name]["data_offsets"]
        return self.bytes[self.data_at + begin : self.data_at + end]

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


def packed(column):
    """Its inverse."""
    steps = [
        (number - before + (1 << 63)) % (1 << 64) - (1 << 63) for before, number in zip([0, *column], column)
    ]
    return base64.b64encode(zlib.compress(struct.pack(f"<{len(steps)}q", *steps))).decode()


def expanded(record):
    """A record, as JSON has it, with its columns as lists of integers: `packed` to a string by `sealed`."""
    columns = record["pieces"]
    for key, value in columns.items():
        if key != "count":
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


# ---- the seam: every system call on a checkpoint, logged, failed or stopped -------------------------------------------


class Op(NamedTuple):
    """One file operation: what, on which path; the other path of rename and link; what is written where; bytes asked."""

    call: str  # a function of `os`, or "create" for an open that makes the file
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""
    size: int = 0


CHANGES = (
    "create",
    "pwrite",
    "truncate",
    "allocate",
    "fsync",
    "fsync_dir",
    "rename",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
)


class Seam:
    """A stand-in for the library's `os`: all file calls are in `log`, those that succeeded in `done`, each in order.

    `before(op)` and `after(op)` may look on, stop, or raise; at most `cap` bytes are read or written at a time. A
    `Storage(base_path, seam)` makes its calls through it; subclasses override a call to change what it does.
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
        call = "create" if flags & os.O_CREAT else "open"
        if path.startswith("/proc/self/fd/"):
            call, path, real = "open_direct", self.paths[int(path.rpartition("/")[2])], path
        else:
            real = path
        fd = self._do(Op(call, path), lambda: os.open(real, flags, mode))
        self.paths[fd] = path
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
        self._do(
            Op("allocate", self.paths[fd], offset=length), lambda: os.posix_fallocate(fd, offset, length)
        )

    def ftruncate(self, fd, length):
        self._do(Op("truncate", self.paths[fd], offset=length), lambda: os.ftruncate(fd, length))

    def fsync(self, fd):
        call = "fsync_dir" if fd in self.directories else "fsync"
        self._do(Op(call, self.paths[fd]), lambda: os.fsync(fd))

    def rename(self, source, target):
        self._do(Op("rename", source, target), lambda: os.rename(source, target))

    def link(self, source, target):
        self._do(Op("link", source, target), lambda: os.link(source, target))

    def close(self, fd):
        try:
            self._do(Op("close", self.paths[fd]), lambda: None)
        finally:
            os.close(fd)  # as Linux: a close that reports an error has closed


def _on_name(call):
    return lambda self, path, **options: self._do(Op(call, path), lambda: getattr(os, call)(path, **options))


for _call in ("unlink", "mkdir", "rmdir", "stat", "listdir"):
    setattr(Seam, _call, _on_name(_call))


class _Current(threading.local):
    seam = os


class _Dispatch:
    """What the library has as `os`: the seam of the storage that a thread is in."""

    current = _Current()

    def __getattr__(self, name):
        return getattr(self.current.seam, name)


st.os = _Dispatch()


def _within(method):
    @functools.wraps(method)
    def call(self, *args, **options):
        before, _Dispatch.current.seam = _Dispatch.current.seam, self.seam
        try:
            result = method(self, *args, **options)
        finally:
            _Dispatch.current.seam = before
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


def test_every_file_call_of_the_library_goes_through_the_seam(tmp_path):
    (outside,) = run(1, work_under_audit, tmp_path, group=False)
    assert outside == {}


def work_under_audit(tmp):
    """What the interpreter has been asked to do with files below `tmp`, but not through the library's `os`."""
    audited, st.os = [], Seam()
    names = {"open": "open", "os.remove": "unlink", "os.listdir": "listdir", "os.scandir": "scandir"}
    names |= {f"os.{name}": name for name in ("rename", "link", "mkdir", "rmdir", "truncate", "symlink")}

    def audit(event, args):
        if event in names and str(args[0]).startswith(f"{tmp}/"):
            is_map = event == "open" and args[1] is not None and "/source/" in args[0]  # of a file to import
            audited.extend([] if is_map else [(names[event], args[0])])

    sys.addaudithook(audit)
    storage, (model, optimizer) = ckpt.LocalStorage(tmp / "base"), small()
    with ckpt.DistributedCheckpoint(storage=storage) as checkpoint:
        for form in FORMATS:
            checkpoint.save(model, optimizer, to(f"runs/{form.value}", format=form))
        checkpoint.save(model, optimizer, to("runs/single_file", compression_level="fast"))
        checkpoint.save_async(model, optimizer, to("once", overwrite=False)).result(HANG_S)
        checkpoint.load(model, optimizer, at("runs/consolidated"))
        checkpoint.validate_checkpoint("once")
        ckpt.export_checkpoint(storage, "once", tmp / "source" / "m.safetensors", max_shard_bytes=100)
        ckpt.export_checkpoint(storage, "once", tmp / "source" / "m.safetensors", max_shard_bytes=100)
        ckpt.import_checkpoint(tmp / "source" / "m.safetensors.index.json", storage, "again")
        ckpt.load_safetensors(small()[0], tmp / "source" / "m.safetensors.index.json", strict=False)
        ckpt.diff_checkpoints(storage, "once", "again")
        checkpoint.delete_checkpoint("once")
        (tmp / "base" / f"lost{st.RECORD_SUFFIX}.0badf00d.tmp").touch()
        ckpt.collect_garbage(storage, 0.0)
    expected = {"open", "unlink", "listdir", "rename", "link", "mkdir", "rmdir"}
    assert {call for call, _ in audited} - {"scandir"} == expected
    return (
        Counter(audited)
        - Counter(("open" if op.call == "create" else op.call, op.path) for op in st.os.log)
        - Counter({("open", str(tmp / "base" / f"lost{st.RECORD_SUFFIX}.0badf00d.tmp")): 1})
    )


class Strike:
    """A hook that calls `act(op)` at operation number k, or numbers k up to `until`, of those that `when` accepts."""

    def __init__(self, k, act, when=lambda op: True, until=None):
        self.numbers, self.act, self.when = range(k, k + 1 if until is None else until), act, when
        self.count, self.hit = itertools.count(), None

    def __call__(self, op):
        if self.when(op) and next(self.count) in self.numbers:
            self.hit = self.hit or op  # the first one
            self.act(op)


FOREVER = 1 << 40


def fail(code):
    def act(op):
        raise OSError(code, os.strerror(code), op.path)

    return act


def is_change(op):
    return op.call in CHANGES


# ---- API: every public name, every option has its effect -------------------------------------------------------------

PUBLIC = [
    "DistributedCheckpoint", "PendingSave", "DistributedCheckpointFactory", "StorageFactory", "Stateful",
    "SaveOptions", "LoadOptions", "CheckpointLoadResult", "CheckpointInfo", "CheckpointOptions", "StorageOptions",
    "RetryPolicy", "CheckpointException", "ExceptionType", "CheckpointValidator", "ValidationResult",
    "IntegrityChecker", "CompatibilityChecker", "ChecksumIntegrityChecker", "SizeIntegrityChecker",
    "VersionCompatibilityChecker", "SchemaCompatibilityChecker", "FaultToleranceHandler", "DistributedCoordinator",
    "LocalCoordinator", "TorchCoordinator", "CheckpointCoordinator", "CheckpointLoader", "CheckpointStorage",
    "LocalStorage", "CheckpointMetadata", "ShardMetadata", "TensorMetadata", "ShardData", "CheckpointFormat",
    "CompressionLevel", "export_checkpoint", "import_checkpoint", "diff_checkpoints", "Difference",
    "CheckpointReader", "Progress", "StoredFile", "collect_garbage",
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_imported_from_ckpt_and_says_what_it_is(name):
    assert getattr(ckpt, name).__doc__


def test_options_have_the_documented_fields_and_defaults():
    def defaults(cls):
        return {f.name: getattr(cls(), f.name) for f in dataclasses.fields(cls)}

    save = dict(
        checkpoint_prefix=None, format=CheckpointFormat.MULTI_SHARD, compression_level=CompressionLevel.NONE
    )
    save |= dict(
        include_optimizer=True, include_rng_state=True, timeout=None, custom_metadata={}, overwrite=True
    )
    assert defaults(SaveOptions) == save | dict(staging="eager", replicas="verify", progress=None)
    load = dict(
        checkpoint_prefix=None, load_optimizer=True, load_rng_state=True, resharding_strategy="parallel"
    )
    load |= dict(timeout=None, skip_validation=False, strict_mode=True, fallback=False, progress=None)
    assert defaults(LoadOptions) == load
    assert defaults(ckpt.StorageOptions) == dict(
        provider="local", connection_settings={"base_path": "./checkpoints"}
    )
    assert ckpt.CheckpointOptions().default_timeout == 600.0 and ckpt.CheckpointOptions().keep_last is None
    retry = ckpt.RetryPolicy()
    assert (retry.max_retries, retry.initial_delay, retry.max_delay, retry.backoff_factor) == (
        3,
        1.0,
        30.0,
        2.0,
    )
    members = (
        "UNKNOWN SAVE_FAILED LOAD_FAILED VALIDATION_FAILED CORRUPTED_CHECKPOINT INCOMPATIBLE_VERSION TIMEOUT"
    )
    assert {m.name for m in ExceptionType} == {*members.split(), "STORAGE_ERROR", "CANCELLED"}


def test_the_exception_is_a_plain_exception_with_path_type_and_rank():
    error = CheckpointException("m", "p/x", ExceptionType.TIMEOUT)
    assert isinstance(error, Exception) and str(error) == "m"
    assert (error.checkpoint_path, error.type, error.rank) == ("p/x", ExceptionType.TIMEOUT, None)
    assert CheckpointException("m").type is ExceptionType.UNKNOWN


def test_modules_optimizers_and_schedulers_are_stateful():
    model, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert all(isinstance(thing, ckpt.Stateful) for thing in (model, optimizer, scheduler, Bag()))
    assert not isinstance(object(), ckpt.Stateful)


def test_what_was_saved_is_restored_in_place_bit_for_bit(tmp_path):
    model, optimizer = small()
    other, other_optimizer = small("other")
    weight = other[0].weight
    with opened(tmp_path) as checkpoint:
        assert checkpoint.save(model, optimizer, to("a/b")) == "a/b"
        result = checkpoint.load(other, other_optimizer, at("a/b"))
    assert identical(state_of(other, other_optimizer), state_of(model, optimizer))
    assert other[0].weight is weight and result.prefix == "a/b" and not result.warnings
    assert (result.source_world_size, result.target_world_size, result.was_resharded) == (1, 1, False)
    assert identical(dict(result.model_state), dict(other.state_dict()))
    assert set(result.optimizer_state) >= {"state", "param_groups"}


def test_one_object_saves_with_defaults_and_names_checkpoints_by_utc_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = small()
    checkpoint = ckpt.DistributedCheckpoint()
    before = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
    first, second = checkpoint.save(model), checkpoint.save(model)
    after = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
    assert before <= re.fullmatch(r"checkpoint_(\d{8}_\d{6})", first)[1] <= after
    assert second.startswith("checkpoint_") and second != first
    assert [info.prefix for info in checkpoint.list_checkpoints()] == [first, second]
    assert (tmp_path / "checkpoints" / f"{first}.metadata.json").is_file()


def test_list_gives_committed_checkpoints_oldest_first_whatever_the_clock_says(tmp_path):
    model, optimizer = small()
    checkpoint = opened(tmp_path)
    assert checkpoint.list_checkpoints() == [] and checkpoint.latest_checkpoint() is None
    moments = [datetime.datetime.now(datetime.timezone.utc)]
    for age, prefix in enumerate(["z", "deep/er/m", "a"]):
        checkpoint.save(model, optimizer, to(prefix, format=FORMATS[age]))
        os.utime(tmp_path / f"{prefix}.metadata.json", (1e9 - age, 1e9 - age))
        moments.append(datetime.datetime.now(datetime.timezone.utc))
    infos = checkpoint.list_checkpoints()
    assert [info.prefix for info in infos] == ["z", "deep/er/m", "a"]
    assert checkpoint.latest_checkpoint() == infos[-1]
    for info, form, before, after in zip(infos, FORMATS, moments, moments[1:]):
        assert info.format in (form, form.name, form.value) and info.world_size == 1 and info.version
        assert before <= info.timestamp <= after
        assert info.timestamp.utcoffset() == datetime.timedelta(0)
        stored = sum(path.stat().st_size for path in shards(tmp_path, info.prefix))
        assert (
            stored <= info.size_bytes <= stored + (tmp_path / f"{info.prefix}.metadata.json").stat().st_size
        )


def test_delete_removes_one_checkpoint_and_leaves_those_below_it_alone(tmp_path):
    model, _ = small()
    checkpoint = opened(tmp_path)
    for prefix in ("a", "a/b", "c"):
        checkpoint.save(model, None, to(prefix))
    checkpoint.delete_checkpoint("a")
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["a/b", "c"]
    assert not (tmp_path / "a.metadata.json").exists() and not shards(tmp_path, "a")
    checkpoint.load(small("other")[0], None, at("a/b"))
    checkpoint.delete_checkpoint("a/b")
    checkpoint.delete_checkpoint("c")
    assert listing(tmp_path) == {}
    assert "c" in refusal(lambda: checkpoint.delete_checkpoint("c"))


def test_include_optimizer_false_stores_none_and_model_only_does_the_same(tmp_path):
    model, optimizer = small()
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to("a", include_optimizer=False))
    assert checkpoint.save_model_only(model, to("b")) == "b"
    for prefix in ("a", "b"):
        assert not any("exp_avg" in name for path in shards(tmp_path, prefix) for name in Shard(path).header)
        other, other_optimizer = small("other")
        before = state_of(other, other_optimizer)
        strict = functools.partial(checkpoint.load, other, other_optimizer, at(prefix))
        refusal(strict, ExceptionType.VALIDATION_FAILED)
        assert identical(state_of(other, other_optimizer), before)
        result = checkpoint.load(other, other_optimizer, at(prefix, strict_mode=False))
        assert result.warnings and identical(state_of(other_optimizer)[0], before[1])
        assert identical(state_of(other)[0], state_of(model)[0])
        checkpoint.load(small("other")[0], None, at(prefix))


def test_load_optimizer_false_leaves_the_optimizer_as_it_is(tmp_path):
    model, optimizer = small()
    other, other_optimizer = small("other")
    before = state_of(other, other_optimizer)
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to())
    checkpoint.load(other, other_optimizer, at(load_optimizer=False))
    assert identical(state_of(other_optimizer)[0], before[1]) and identical(
        state_of(other)[0], state_of(model)[0]
    )


def test_a_forgotten_optimizer_is_a_warning_unless_it_is_left_out_on_purpose(tmp_path):
    model, optimizer = small()
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to("both"))
    checkpoint.save(model, None, to("model"))
    (warning,) = checkpoint.load(model, None, at("both")).warnings
    assert "load_optimizer=False" in warning
    assert not checkpoint.load(model, None, at("both", load_optimizer=False)).warnings
    assert not checkpoint.load(model, None, at("model")).warnings


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


@pytest.mark.parametrize("included, loaded", [(True, True), (True, False), (False, True)])
def test_rng_of_torch_numpy_and_random_come_back_if_saved_and_asked_for(tmp_path, included, loaded):
    model, _ = small()
    checkpoint = opened(tmp_path)
    draws()
    checkpoint.save(model, None, to(include_rng_state=included))
    first, second = draws(), draws()
    result = checkpoint.load(model, None, at(load_rng_state=loaded))
    again = draws()
    assert (again == first) == (included and loaded) and again != second
    assert bool(result.warnings) == (loaded and not included)


def test_custom_metadata_comes_back_and_must_be_json(tmp_path):
    model, _ = small()
    checkpoint = opened(tmp_path)
    mine = {"epoch": 3, "ünï": [1.5, None, {"deep": True}]}
    checkpoint.save(model, None, to(custom_metadata=mine))
    assert checkpoint.load(model, None, at()).metadata.custom_metadata == mine
    with pytest.raises(ValueError, match="epoch"):
        checkpoint.save(model, None, to("q", custom_metadata={"epoch": object()}))
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["p"]


def test_overwrite_replaces_the_old_checkpoint_and_its_files(tmp_path):
    checkpoint = opened(tmp_path)
    model, optimizer = small()
    for form in FORMATS:
        checkpoint.save(model, optimizer, to(format=form))
    checkpoint.save(*small("second"), to())
    assert len(listing(tmp_path)) == 2
    checkpoint.load(model, optimizer, at())
    assert identical(state_of(model, optimizer), state_of(*small("second")))


def test_overwrite_false_refuses_and_keeps_the_old_checkpoint(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to())
    before = listing(tmp_path)
    assert "p" in refusal(lambda: checkpoint.save(*small("second"), to(overwrite=False)))
    assert listing(tmp_path) == before
    assert checkpoint.save(*small("second"), to("q", overwrite=False)) == "q"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_format_and_compression_level_restores_the_same_bits(tmp_path, form, level):
    checkpoint = opened(tmp_path)
    model = filled(
        nn.Sequential(nn.Embedding(700, 1000), nn.Linear(1000, 3).bfloat16()), "truth"
    )  # over one frame
    optimizer = stepped(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    other = filled(nn.Sequential(nn.Embedding(700, 1000), nn.Linear(1000, 3).bfloat16()), "other")
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9)
    checkpoint.save(model, optimizer, to(format=form, compression_level=level))
    checkpoint.load(other, other_optimizer, at())
    assert identical(state_of(other, other_optimizer), state_of(model, optimizer))
    assert checkpoint.validate_checkpoint("p").is_valid
    names = [path.name for path in shards(tmp_path)]
    patterns = {"MULTI_SHARD": [r"[0-9a-f]{8}-00000-of-00001"], "SINGLE_FILE": [r"[0-9a-f]{8}"]}
    patterns["CONSOLIDATED"] = [*patterns["MULTI_SHARD"], r"[0-9a-f]{8}\.model"]
    expected = patterns[form.name]
    assert len(names) == len(expected)
    assert all(re.fullmatch(pattern + r"\.safetensors", name) for pattern, name in zip(expected, names))


def test_compression_shrinks_what_it_can_and_costs_next_to_nothing_where_it_cannot(tmp_path):
    checkpoint = opened(tmp_path)
    generator = torch.Generator().manual_seed(1)
    weights = Bag(w=torch.randn(1 << 20, generator=generator).bfloat16())
    noise = Bag(w=torch.randint(0, 256, (2 << 20,), generator=generator, dtype=torch.uint8))
    size = {}
    for level in LEVELS:
        for name, bag in (("weights", weights), ("noise", noise)):
            checkpoint.save(bag, None, to(f"{name}-{level.name}", compression_level=level))
            size[name, level.name] = sum(
                path.stat().st_size for path in shards(tmp_path, f"{name}-{level.name}")
            )
    for level in ("FAST", "BALANCED", "MAXIMUM"):
        assert size["weights", level] < 0.85 * size["weights", "NONE"]  # exponents share a plane
        assert size["noise", level] < 1.01 * size["noise", "NONE"]
    assert size["weights", "MAXIMUM"] <= size["weights", "BALANCED"] <= size["weights", "FAST"]


class Objector:
    """A checker of either kind that counts its calls and may object."""

    name = "objector"

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def check_integrity(self, *_args):
        self.calls += 1
        return ckpt.ValidationResult(errors=list(self.errors))

    check_compatibility = check_integrity


@pytest.mark.parametrize("kind", ["integrity_checkers", "compatibility_checkers"])
def test_a_custom_checker_can_refuse_a_load_unless_validation_is_skipped(tmp_path, kind):
    model, optimizer = small()
    other, other_optimizer = small("other")
    before = state_of(other, other_optimizer)
    checker = Objector("the moon is full")
    checkpoint = opened(tmp_path, **{kind: [checker]})
    checkpoint.save(model, optimizer, to())
    message = refusal(lambda: checkpoint.load(other, other_optimizer, at()), ExceptionType.VALIDATION_FAILED)
    assert "the moon is full" in message and checker.calls
    assert identical(state_of(other, other_optimizer), before)
    summary = checkpoint.validate_checkpoint("p")
    assert not summary.is_valid and "the moon is full" in summary.get_summary()
    calls = checker.calls
    checkpoint.load(other, other_optimizer, at(skip_validation=True))
    assert checker.calls == calls and identical(state_of(other, other_optimizer), state_of(model, optimizer))


def test_skip_validation_never_skips_the_checksums_of_bytes_read(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to())
    (path,) = shards(tmp_path)
    flip(path, Shard(path).data_at)
    refusal(lambda: checkpoint.load(*small(), at(skip_validation=True)), ExceptionType.CORRUPTED_CHECKPOINT)


def test_keep_last_keeps_the_newest_and_what_other_jobs_saved_elsewhere(tmp_path):
    model, _ = small()
    checkpoint = opened(tmp_path, keep_last=2)
    for prefix in "dcba":
        checkpoint.save(model, None, to(prefix))
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["b", "a"]
    assert {name.split("/")[0].split(".")[0] for name in listing(tmp_path)} == {"a", "b"}
    with pytest.raises(ValueError, match="keep_last"):
        opened(tmp_path, keep_last=0).save(model, None, to())


def test_progress_is_told_of_every_byte_saved_and_loaded(tmp_path):
    bag = Bag(w=torch.zeros(3 * MiB, dtype=torch.int32))
    checkpoint = opened(tmp_path)
    saved, loaded = [], []
    checkpoint.save(bag, None, to(progress=saved.append))
    checkpoint.load(bag, None, at(progress=loaded.append))
    for calls, step in ((saved, "S4 write"), (loaded, "L4 read")):
        done = [call.bytes_done for call in calls if call.step == step]
        assert done == sorted(done)
        assert done[-1] == calls[-1].bytes_total >= 12 * MiB


def test_options_objects_are_never_changed(tmp_path):
    model, optimizer = small()
    save, load = to(custom_metadata={"a": [1]}), at()
    save_before, load_before = copy.deepcopy(save), copy.deepcopy(load)
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, save)
    checkpoint.load(model, optimizer, load)
    assert (save, load) == (save_before, load_before)


@pytest.mark.parametrize("path", [str, Path])
def test_a_path_means_local_storage_there_and_a_string_means_options_with_that_prefix(tmp_path, path):
    directories = [path(tmp_path / name) for name in "ab"]
    options = ckpt.CheckpointOptions(storage=directories[1])
    made = [
        ckpt.DistributedCheckpoint(storage=directories[0]),
        ckpt.DistributedCheckpointFactory.create(options=options),
    ]
    model, optimizer = small()
    for checkpoint, directory in zip(made, directories):
        assert checkpoint.save(model, optimizer, "lr=1e+3/step=1") == "lr=1e+3/step=1"
        assert checkpoint.save_async(model, optimizer, "late").result(20.0) == "late"
        assert checkpoint.save_model_only(model, "only") == "only"
        assert len(list(Path(directory).rglob("*.metadata.json"))) == 3
        other, other_optimizer = small("other")
        assert checkpoint.load(other, other_optimizer, "lr=1e+3/step=1").prefix == "lr=1e+3/step=1"
        assert identical(state_of(other, other_optimizer), state_of(model, optimizer))
        stored = checkpoint.load(other, None, "only").metadata.tensors
        assert {tensor.name.partition("/")[0] for tensor in stored} == {"model", "model-metadata"}
        assert ckpt.diff_checkpoints(directory, "late", "lr=1e+3/step=1") == []
        (exported,) = ckpt.export_checkpoint(directory, "only", tmp_path / "out.safetensors")
        assert ckpt.import_checkpoint(exported, directory, "again") == "again"
        assert {d.name for d in ckpt.diff_checkpoints(directory, "only", "again")} == {
            "model-metadata/modules"
        }
    with pytest.raises(ValueError, match="s3://bucket/ckpts"):
        ckpt.DistributedCheckpoint(storage="s3://bucket/ckpts")


@pytest.mark.parametrize("form, level", [*zip(FORMATS, LEVELS), (CheckpointFormat.MULTI_SHARD, LEVELS[3])])
def test_an_enum_option_also_takes_its_value(tmp_path, form, level):
    checkpoint, options = opened(tmp_path), to(format=form.value, compression_level=level.value)
    checkpoint.save(small()[0], None, options)
    found = checkpoint.load(small("other")[0], None, "p").metadata
    assert (found.format, found.compression) == (form.value, level.value)
    assert options == to(format=form.value, compression_level=level.value), "the user's object has changed"


def test_the_repr_of_a_result_is_one_short_line_that_names_the_checkpoint(tmp_path):
    checkpoint, bag = opened(tmp_path), Bag(**{f"layer.{n}": torch.rand(100) for n in range(100)})
    pending = checkpoint.save_async(bag, None, "p")
    pending.result(20.0)
    result = checkpoint.load(bag, None, "p", extra_state={})
    for thing in (result, result.metadata, pending, checkpoint.latest_checkpoint()):
        assert len(repr(thing)) < 250 and "\n" not in repr(thing), thing
    assert "'p'" in repr(result) and "'p'" in repr(result.metadata)


def test_a_registered_provider_is_used_and_an_unknown_one_is_refused_with_the_list(tmp_path):
    seen = []
    ckpt.StorageFactory.register(
        "mine", lambda settings: seen.append(settings) or ckpt.LocalStorage(tmp_path)
    )
    storage = ckpt.StorageOptions("mine", {"bucket": "b"})
    checkpoint = ckpt.DistributedCheckpointFactory.create(options=ckpt.CheckpointOptions(storage=storage))
    checkpoint.save(small()[0], None, to())
    assert seen == [{"bucket": "b"}] and (tmp_path / "p.metadata.json").exists()
    with pytest.raises(ValueError, match=r"nowhere.*local"):
        ckpt.StorageFactory.create(ckpt.StorageOptions(provider="nowhere"))


class Doomed:
    """A Stateful whose state_dict() raises `error`, `times` times."""

    def __init__(self, error, times=10**9):
        self.error, self.times, self.calls = error, times, 0

    def state_dict(self):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return {"w": torch.zeros(2)}

    def load_state_dict(self, state):
        raise self.error


def hiccups(times):
    """The file calls of an operating system on which the first `times` creations of a tensor file fail."""
    return Seam(Strike(0, fail(errno.EIO), is_new_shard, until=times))


def is_new_shard(op):
    return op.call == "create" and op.path.endswith(".safetensors")


@pytest.mark.parametrize("attempts, succeeds", [(1, False), (2, False), (3, True)])
def test_the_retry_policy_decides_how_often_a_storage_error_is_tried_again(tmp_path, attempts, succeeds):
    files = hiccups(times=2)
    ckpt.StorageFactory.register("hiccups", lambda settings: Storage(tmp_path, files))
    retry = ckpt.RetryPolicy(max_retries=attempts, initial_delay=0.01, max_delay=0.02)
    checkpoint = opened(tmp_path, storage=ckpt.StorageOptions("hiccups"), retry_policy=retry)
    if succeeds:
        assert checkpoint.save(*small(), to()) == "p"
        checkpoint.load(*small(), at())
    else:
        assert ".safetensors" in refusal(lambda: checkpoint.save(*small(), to()), ExceptionType.STORAGE_ERROR)
        assert listing(tmp_path) == {}
    assert sum(map(is_new_shard, files.log)) == attempts


def test_the_fault_tolerance_handler_retries_times_out_and_rolls_back(tmp_path):
    storage = ckpt.LocalStorage(tmp_path)
    retry = ckpt.RetryPolicy(max_retries=3, initial_delay=0.01, retryable_exceptions=(KeyError,))
    handler = ckpt.FaultToleranceHandler(storage, retry)
    errors = [KeyError(), KeyError()]

    def twice_in_vain():
        if errors:
            raise errors.pop()
        return "done"

    assert handler.execute_with_retry(twice_in_vain) == "done"
    errors[:] = [KeyError(), OSError()]
    with pytest.raises(OSError):
        handler.execute_with_retry(twice_in_vain)
    assert len(errors) == 1
    never = threading.Event()
    refusal(lambda: handler.execute_with_timeout(lambda: never.wait(HANG_S), 0.1), ExceptionType.TIMEOUT)
    never.set()
    assert handler.execute_with_timeout(lambda: 7, HANG_S) == 7
    ckpt.DistributedCheckpoint(storage=storage).save(*small(), to())
    handler.rollback("p")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("call", ["save", "save_async", "load"])
def test_a_prefix_in_the_optimizers_place_is_an_error_that_says_where_it_goes(tmp_path, call):
    checkpoint = opened(tmp_path)
    answer = told(lambda: getattr(checkpoint, call)(Bag(w=torch.zeros(2)), "step_1"))
    if call == "save_async":
        answer = told(answer[2].result)
    assert answer[0] == "ValueError" and "'step_1'" in answer[2] and "third" in answer[2], answer
    assert listing(tmp_path) == {}


# ---- found in public reports: optimizers and calls out of the ordinary -------------------------------------------------


class Odd(torch.optim.SGD):
    """Keeps a list, a counter that belongs to no parameter, and a further entry of its state dict."""

    version = 1

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "factors": [torch.full((2,), 1 / 3)],
                    "sum": torch.full_like(p, 1 / 3).float(),
                }
        self.state["calls"] = self.state.get("calls", 0) + 1

    def state_dict(self):
        return {**super().state_dict(), "version": self.version}

    def load_state_dict(self, state):
        self.version = state.pop("version")
        super().load_state_dict(state)


def test_state_of_an_optimizer_that_is_nested_or_belongs_to_no_parameter_comes_back_bit_for_bit(tmp_path):
    checkpoint, model = opened(tmp_path), filled(nn.Linear(2, 2), "truth").bfloat16()
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.version = 7
    before = copy.deepcopy(optimizer.state_dict())
    checkpoint.save(model, optimizer, "p")
    assert checkpoint.save_async(model, optimizer, to("q", staging="overlapped")).result(HANG_S) == "q"
    for prefix in ("p", "q"):
        fresh = Odd(reversed(list(model.parameters())), lr=0.2)
        assert checkpoint.load(model, fresh, prefix).warnings == []
        after = fresh.state_dict()
        assert fresh.version == 7 and after["state"]["calls"] == 1
        assert [identical(after["state"][1 - n], before["state"][n]) for n in (0, 1)] == [True, True]


def test_a_tensor_among_a_groups_options_follows_its_parameters_to_another_rank(ram):
    assert run(2, swap_stages, ram) == [(0.25, []), (0.5, [])]


def swap_stages(rank, world_size, tmp):
    """Save stage `rank` of a pipeline; load the other one. The stages have different learning rates, in tensors."""
    checkpoint, stages = opened(tmp), [nn.ModuleDict({f"stage{k}": nn.Linear(2, 2)}) for k in range(2)]
    rates = [torch.tensor(0.5), torch.tensor(0.25)]
    checkpoint.save(stages[rank], torch.optim.AdamW(stages[rank].parameters(), lr=rates[rank]), "p")
    other = torch.optim.AdamW(stages[1 - rank].parameters(), lr=torch.tensor(1.0))
    result = checkpoint.load(stages[1 - rank], other, at(load_rng_state=False))
    return float(other.param_groups[0]["lr"]), result.warnings


def test_plain_state_of_a_sharded_parameter_stays_that_of_its_rank(ram):
    assert run(2, keep_plain_state, ram) == [True, True]


def keep_plain_state(rank, world_size, tmp):
    checkpoint, mesh = opened(tmp), init_device_mesh("cpu", (2,))
    model = nn.ParameterDict({"w": distribute_tensor(torch.ones(4, 2), mesh, [ShardDim(0)])})
    optimizer = torch.optim.SGD(model.parameters())
    state = {
        "norm": torch.tensor(float(rank)),
        "local": torch.full((2, 2), float(rank)),
        "same": torch.ones(1),
    }
    optimizer.state[model["w"]] = state
    checkpoint.save(model, optimizer, "p")
    fresh = torch.optim.SGD(model.parameters())
    checkpoint.load(model, fresh, "p")
    return identical(dict(fresh.state[model["w"]]), state)


def test_a_stateful_whose_state_is_no_dict_is_restored(tmp_path):
    class Sampler:
        place = 7

        def state_dict(self):
            return self.place

        def load_state_dict(self, place):
            self.place = place

    checkpoint, sampler = opened(tmp_path), Sampler()
    checkpoint.save({}, None, "p", extra_state={"sampler": sampler})
    sampler.place = 0
    checkpoint.load({}, None, "p", extra_state={"sampler": sampler})
    assert sampler.place == 7


def test_after_a_load_has_cast_the_parameters_the_optimizer_steps(tmp_path):
    checkpoint, model = opened(tmp_path), filled(nn.Linear(2, 2), "truth")
    checkpoint.save(model, stepped(model), "p")
    half = filled(nn.Linear(2, 2), "truth").bfloat16()
    optimizer = torch.optim.AdamW(half.parameters())
    checkpoint.load(half, optimizer, at(strict_mode=False))
    half(torch.ones(2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


def test_loose_mode_keeps_state_that_the_checkpoint_lacks_and_asks_no_module_for_strict(tmp_path):
    class Own(nn.Linear):
        def load_state_dict(self, state_dict):
            return super().load_state_dict(state_dict)

    checkpoint, model = opened(tmp_path), filled(nn.Sequential(Own(2, 2), nn.Linear(2, 2)), "truth")
    checkpoint.save({"0.weight": model[0].weight, "0.bias": model[0].bias}, None, "p")
    assert checkpoint.load(model[0], None, at(strict_mode=False)).warnings
    checkpoint.save(nn.Sequential(model[0]), stepped(nn.Sequential(model[0])), "p")
    optimizer = stepped(model)
    before = copy.deepcopy(optimizer.state[model[1].weight])
    checkpoint.load(model, optimizer, at(strict_mode=False))
    assert identical(optimizer.state[model[1].weight], before)


def test_metadata_that_json_lacks_is_equal_on_all_ranks(ram):
    metadata = {"loss": math.nan, "counts": np.arange(3)}
    together(2, lambda c: opened(ram, c).save({"w": torch.ones(2)}, None, to(custom_metadata=metadata)))
    assert identical(opened(ram).latest_checkpoint().custom_metadata, metadata)


def test_overlapped_staging_copies_at_once_where_an_optimizer_takes_no_hook(tmp_path):
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, inner):  # without that of its base
            self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

        def state_dict(self):
            return self.inner.state_dict()

    checkpoint, (model, optimizer) = opened(tmp_path), small()
    pending = checkpoint.save_async(model, Wrapped(optimizer), to(staging="overlapped"))
    before = copy.deepcopy(model.state_dict())
    nn.init.zeros_(model[0].weight)
    pending.result(HANG_S)
    checkpoint.load(model, optimizer, "p")
    assert identical(model.state_dict(), before)


def test_saves_and_loads_in_inference_mode_leave_tensors_that_can_be_trained(tmp_path):
    checkpoint, (model, optimizer) = opened(tmp_path), small()
    fresh = torch.optim.AdamW(model.parameters())
    with torch.inference_mode():
        checkpoint.save_async(model, optimizer, to(staging="overlapped")).result(HANG_S)
        checkpoint.load(model, fresh, "p")
    model(torch.ones(3)).sum().backward()
    fresh.step()


def test_a_default_device_does_not_matter(tmp_path):
    checkpoint, (model, optimizer) = opened(tmp_path), small()
    checkpoint.save(model, optimizer, "p", extra_state={"t": torch.ones(2)})
    with torch.device("meta"):
        loaded = checkpoint.load(model, torch.optim.AdamW(model.parameters()), "p")
    assert identical(loaded.extra_state, {"t": torch.ones(2)})


def test_all_attempts_together_have_the_limit_of_the_call(tmp_path):
    class Broken(ckpt.LocalStorage):
        def create(self, name):
            raise OSError(errno.EIO, "broken")

    policy = ckpt.RetryPolicy(max_retries=3, initial_delay=0.4, jitter=0.0)
    checkpoint = opened(tmp_path, storage=Broken(tmp_path), retry_policy=policy)
    refusal(lambda: checkpoint.save({"w": torch.ones(1)}, None, to(timeout=0.2)), ExceptionType.TIMEOUT)
    with pytest.raises(ValueError, match="timeout"):
        checkpoint.save({"w": torch.ones(1)}, None, to(timeout=math.inf))


def test_an_interrupt_while_a_background_save_collects_ends_it_on_all_ranks_and_nothing_else(ram):
    rank_0, rank_1 = run(2, interrupt_staging, ram)
    assert rank_0[0][:2] == ("SAVE_FAILED", 1) and rank_1[0] == "interrupted"
    assert rank_0[1] == rank_1[1] == ("returned", None, "q")


def interrupt_staging(rank, world_size, tmp):
    class Interrupted(Bag):
        def state_dict(self):
            raise KeyboardInterrupt

    checkpoint = opened(tmp, default_timeout=HANG_S / 2)
    try:
        first = told(checkpoint.save_async(Interrupted() if rank else Bag(w=torch.ones(2)), None, "p").result)
    except KeyboardInterrupt:
        first = "interrupted"
    return first, told(lambda: checkpoint.save(Bag(w=torch.ones(2)), None, "q"))


def test_an_expanded_tensor_is_refused_by_a_load_before_anything_changes(tmp_path):
    checkpoint, bag = opened(tmp_path), Bag(mask=torch.ones(1, 3).expand(4, 3), w=torch.ones(2))
    checkpoint.save(bag, None, "p")
    live = Bag(mask=torch.zeros(1, 3).expand(4, 3), w=torch.zeros(2))
    message = refusal(lambda: checkpoint.load(live, None, "p"), ExceptionType.VALIDATION_FAILED)
    assert "model/mask" in message and "clone()" in message and not live.state["w"].any()


def test_warnings_and_errors_that_would_mislead_are_not_there(tmp_path, ram):
    checkpoint, tied = opened(tmp_path), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    checkpoint.save(tied, None, to(format="consolidated"))
    assert checkpoint.load(tied, None, at()).warnings == []
    for wrong in ("./ckpts", ckpt.CheckpointOptions()):
        with pytest.raises(ValueError, match="storage="):
            ckpt.DistributedCheckpoint(wrong)
    assert told(checkpoint.save_async(tied, None, "../x").result)[0] == "ValueError"
    failed = checkpoint.save_async(tied, None, "../x")
    concurrent.futures.wait([failed], HANG_S)
    assert "in the background" in refusal(lambda: checkpoint.save(tied, None, "q"), ExceptionType.SAVE_FAILED)
    assert run(2, save_stages, ram) == [[], []]


def save_stages(rank, world_size, tmp):
    checkpoint, warnings = opened(tmp), []
    checkpoint.logger = types.SimpleNamespace(
        warning=lambda *args: warnings.append(args), log=lambda *args: None
    )
    checkpoint.save(nn.ModuleDict({f"stage{rank}": nn.Linear(2, 2)}), None, "p")
    return warnings


def test_wide_elements_that_other_ranks_send_are_copied_whatever_their_place(ram):
    run(3, save_wide, ram)
    found = {"a": torch.zeros(301, dtype=torch.uint8), "z": torch.zeros(33, dtype=torch.complex128)}
    opened(ram).load(found, None, at(load_rng_state=False))
    assert found["a"].sum() == 301 and torch.equal(
        found["z"], torch.full((33,), 1 + 2j, dtype=torch.complex128)
    )


def save_wide(rank, world_size, tmp):
    mesh = init_device_mesh("cpu", (3,))
    whole = {"a": torch.ones(301, dtype=torch.uint8), "z": torch.full((33,), 1 + 2j, dtype=torch.complex128)}
    state = {name: distribute_tensor(tensor, mesh, [ShardDim(0)]) for name, tensor in whole.items()}
    opened(tmp).save(state, None, to(format="single_file"))


def test_a_save_to_storages_that_ranks_do_not_share_fails(ram):
    outcomes = together(2, lambda c: told(lambda: opened(ram / str(c.rank), c).save(small()[0], None, "p")))
    assert {kind for kind, _, _ in outcomes} == {"STORAGE_ERROR"} and "share" in outcomes[0][2]
    assert opened(ram / "0").list_checkpoints() == []


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = opened(tmp_path)
    for call in ("pwrite", "posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(st, "os", types.SimpleNamespace(**{**vars(os), call: full}))
            kind, _, message = told(lambda: checkpoint.save(Bag(w=torch.ones(9)), None, to()))
        assert kind == "STORAGE_ERROR" and re.search(r"No space left.*: 'p[/.]", message), message


def test_what_does_not_fit_is_said_with_the_way_out(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save({"module.w": torch.ones(2), "b": torch.ones(2)}, None, to())
    message = told(lambda: checkpoint.load({"w": torch.ones(2), "b": torch.ones(2).half()}, None, at()))[2]
    assert "first part" in message and "strict_mode=False" in message, message
    message = told(lambda: checkpoint.load({"module.w": torch.ones(2), "net.b": torch.ones(2)}, None, at()))[
        2
    ]
    assert "first part" in message, message
    message = told(lambda: checkpoint.load({"module.w": torch.ones(2)}, None, at()))[2]
    assert "first part" not in message, message


def test_a_table_on_the_command_line_has_no_empty_column(tmp_path, capsys):
    checkpoint = opened(tmp_path)
    for prefix, value in (("a", 1.0), ("b", 2.0)):
        checkpoint.save({"w": torch.full((2,), value)}, None, prefix)
    assert "LARGEST_CHANGE" not in command(capsys, "diff", tmp_path, "a", "b")[1]
    head, row = command(capsys, "diff", tmp_path, "a", "b", "--values")[1].splitlines()
    assert head.split() == ["NAME", "KIND", "WHAT", "LARGEST_CHANGE"] and row.split()[-1] == "1"


@pytest.mark.parametrize("dimensions", [1, 2, 5, 24, 56])
def test_the_schema_checker_sees_every_overlap_and_hole_in_any_number_of_dimensions(tmp_path, dimensions):
    bag = Bag(cube=torch.zeros((1,) * dimensions), flat=torch.zeros(8))
    opened(tmp_path).save(bag, None, to(include_rng_state=False))
    metadata, checker = opened(tmp_path).load(bag, None, at()).metadata, ckpt.SchemaCompatibilityChecker()
    index = {t.name: number for number, t in enumerate(metadata.tensors)}
    cube, flat = (np.zeros((1, 2, dimensions), np.int64) for _ in range(2))
    cube[:, 1], flat[:, 1], flat[0, 1, 0] = 2, 1, 8
    tensors = [t._replace(shape=(2,) * dimensions) if t.name == "model/cube" else t for t in metadata.tensors]
    tensors = [
        t if t.name.startswith("model/") else t._replace(alias_of=index["model/flat"]) for t in tensors
    ]
    for dim in range(dimensions):
        (first := cube.copy())[0, 1, dim] = 1
        (second := first.copy())[0, 0, dim] = 1
        (hole := flat.copy())[0, 1, 0] = 7
        for boxes, wrong in (
            ([(cube, "cube"), (flat, "flat")], set()),
            ([(first, "cube"), (second, "cube"), (flat, "flat")], set()),
            ([(first, "cube"), (first, "cube"), (flat, "flat")], {"cube"}),
            ([(first, "cube"), (hole, "flat")], {"cube", "flat"}),
        ):
            tensor = np.array([index[f"model/{name}"] for _, name in boxes])
            column, box = np.zeros(len(boxes), np.int64), np.concatenate([box for box, _ in boxes])
            pieces = st.Pieces(tensor, column, column, column, box)
            record = dataclasses.replace(metadata, tensors=tuple(tensors), pieces=pieces)
            errors = checker.check_compatibility(record).errors
            assert {error.partition(":")[0].removeprefix("model/") for error in errors} == wrong


def test_the_validator_reports_errors_and_warnings_for_record_and_shards(tmp_path):
    storage = ckpt.LocalStorage(tmp_path)
    ckpt.DistributedCheckpoint(storage=storage).save(*small(), to())
    validator = ckpt.CheckpointValidator(storage)
    metadata = opened(tmp_path).load(*small(), at()).metadata
    for result in (validator.validate_checkpoint("p"), validator.validate_metadata(metadata)):
        assert result.is_valid and not result.errors and not result.has_warnings
    with ckpt.CheckpointReader(storage, metadata) as reader:
        assert validator.validate_shards(reader).is_valid
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with ckpt.CheckpointReader(storage, metadata) as reader:
        assert not validator.validate_shards(reader).is_valid
    result = ckpt.ValidationResult(errors=["bad"], warnings=["odd"])
    assert not result.is_valid and result.has_warnings
    assert "bad" in result.get_summary() and "odd" in result.get_summary()
    for name in ("ChecksumIntegrityChecker", "SizeIntegrityChecker"):
        assert isinstance(getattr(ckpt, name)(), ckpt.IntegrityChecker)
    for name in ("VersionCompatibilityChecker", "SchemaCompatibilityChecker"):
        assert isinstance(getattr(ckpt, name)(), ckpt.CompatibilityChecker)


def test_cancel_stops_a_validation_in_a_load_before_all_is_read(tmp_path):
    opened(tmp_path).save(Bag(w=torch.zeros(20 * MiB)), None, to())  # 20 blocks
    noticed, read = threading.Event(), []

    class Cancel(threading.Event):
        def is_set(self):
            if super().is_set():
                noticed.set()
            return super().is_set()

    class Stopping(Seam):
        def pread(self, fd, buffer, offset):
            if len(buffer) >= BLOCK:
                cancel.set()
                read.append(offset)
                noticed.wait(30.0)  # nothing more is read before the load has looked whether it is cancelled
            return super().pread(fd, buffer, offset)

    cancel, storage = Cancel(), Storage(tmp_path, Stopping())
    validator = ckpt.CheckpointValidator(storage, [ckpt.ChecksumIntegrityChecker()])
    checkpoint = ckpt.DistributedCheckpoint(storage=storage, validator=validator)
    refusal(
        lambda: checkpoint.load(Bag(w=torch.zeros(20 * MiB)), None, at(), cancel=cancel),
        ExceptionType.CANCELLED,
    )
    assert 0 < len(read) < 15


def test_cancel_stops_a_save_and_a_load_and_leaves_nothing_behind(tmp_path):
    model, optimizer = small()
    cancel = threading.Event()
    cancel.set()
    checkpoint = opened(tmp_path)
    refusal(lambda: checkpoint.save(model, optimizer, to(), cancel=cancel), ExceptionType.CANCELLED)
    assert listing(tmp_path) == {}
    cancel.clear()
    large, halfway = Bag(w=torch.zeros(40 * MiB, dtype=torch.uint8)), to(progress=lambda *_: cancel.set())
    refusal(lambda: checkpoint.save(large, None, halfway, cancel=cancel), ExceptionType.CANCELLED)
    assert listing(tmp_path) == {}
    checkpoint.save(model, optimizer, to())
    other, other_optimizer = small("other")
    before = state_of(other, other_optimizer)
    refusal(lambda: checkpoint.load(other, other_optimizer, at(), cancel=cancel), ExceptionType.CANCELLED)
    assert identical(state_of(other, other_optimizer), before)


def test_fallback_takes_the_newest_older_checkpoint_that_verifies_and_says_so(tmp_path):
    checkpoint = opened(tmp_path)
    for prefix in ("one", "two", "three", "four"):
        checkpoint.save(*small(prefix), to(prefix))
    for prefix in ("two", "three"):
        flip(shards(tmp_path, prefix)[0], Shard(shards(tmp_path, prefix)[0]).data_at)
    model, optimizer = small("other")
    result = checkpoint.load(model, optimizer, at("three", fallback=True))
    assert result.prefix == "one" and any("three" in warning for warning in result.warnings)
    assert identical(state_of(model, optimizer), state_of(*small("one")))
    refusal(lambda: checkpoint.load(model, optimizer, at("three")), ExceptionType.CORRUPTED_CHECKPOINT)


def test_fallback_of_a_damaged_record_is_older_too(tmp_path):
    checkpoint = opened(tmp_path)
    for prefix in ("one", "two", "three"):
        checkpoint.save(*small(prefix), to(prefix))
    record = tmp_path / "two.metadata.json"
    flip(record, record.stat().st_size - 40)
    assert checkpoint.load(*small("other"), at("two", fallback=True)).prefix == "one"


@pytest.mark.parametrize("kind", ["save", "save_async", "load"])
def test_options_of_another_type_on_one_rank_are_an_error_on_all_and_the_next_save_works(tmp_path, kind):
    for kinds in run(2, give_other_options, tmp_path, kind):
        assert kinds == ["ValueError", "returned"]


def give_other_options(rank, world_size, tmp, kind):
    checkpoint, model = opened(tmp), small()[0]
    checkpoint.save(model, None, to("first"))
    right = at("first") if kind == "load" else to("q")
    options = right if rank == 0 else {"checkpoint_prefix": "q"}
    calls = {"save": checkpoint.save, "load": checkpoint.load}
    calls["save_async"] = lambda *given: checkpoint.save_async(*given).result()
    outcomes = [
        told(lambda: calls[kind](model, None, options)),
        told(lambda: checkpoint.save(model, None, to("r"))),
    ]
    return [outcome[0] for outcome in outcomes]


class FiveMethods:
    """What a DistributedCoordinator has to have, and nothing more, over the store of torch.distributed."""

    def __init__(self):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def barrier(self, timeout=600.0):
        dist.barrier()

    def broadcast(self, value, src=0, timeout=600.0):
        return self.all_gather(value, timeout)[src]

    def all_gather(self, value, timeout=600.0):
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@pytest.mark.parametrize("form", FORMATS)
def test_a_coordinator_of_the_five_documented_methods_is_enough(tmp_path, form):
    for outcome, failed, again in run(2, use_five_methods, tmp_path, form):
        assert outcome == "exact" and again == "returned"
        assert failed[:2] == ("STORAGE_ERROR", 1) and "no room" in failed[2]


def use_five_methods(rank, world_size, tmp, form):
    coordinator = FiveMethods()
    assert isinstance(coordinator, ckpt.DistributedCoordinator)
    checkpoint = over(tmp, coordinator)
    mesh = init_device_mesh("cpu", (world_size,))
    truth = torch.arange(3 * MiB, dtype=torch.float32).reshape(3, MiB)
    source = Bag(w=distribute_tensor(truth, mesh, [ShardDim(1)]))
    target = Bag(w=distribute_tensor(torch.zeros_like(truth), mesh, [ShardDim(0)]))
    checkpoint.save(source, None, to(format=form))
    checkpoint.load(target, None, at(resharding_strategy="broadcast"))
    outcome = "exact" if identical(target.state["w"].full_tensor(), truth) else "wrong"

    def fails():
        if rank == 1:
            raise OSError("no room")
        return {"w": truth}

    failed = told(
        lambda: checkpoint.save(types.SimpleNamespace(state_dict=fails, load_state_dict=print), None, to("q"))
    )
    return outcome, failed, told(lambda: checkpoint.save(source, None, to("r")))[0]


class ManualTime:
    """In the place of the module `time`: a clock that goes on only when somebody sleeps, and then at once."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def manual_time(monkeypatch):
    """The deadlines of the library use this clock."""
    monkeypatch.setattr(ckpt.coord, "time", ManualTime())
    return ckpt.coord.time


class Deserted:
    """Rank 0 of two over five methods, where rank 1 says nothing any more."""

    rank, world_size, broadcast = 0, 2, None

    def __init__(self, time):
        self.time = time

    def barrier(self, timeout=600.0):
        self.all_gather(None, timeout)

    def all_gather(self, value, timeout=600.0):
        self.time.sleep(timeout)
        raise ckpt.CheckpointException("rank 1 is silent", type=ckpt.ExceptionType.TIMEOUT, rank=1)


def test_with_a_coordinator_of_five_methods_too_the_deadline_ends_the_wait_for_a_silent_rank(
    tmp_path, manual_time
):
    answer = told(lambda: save_word(over(tmp_path, Deserted(manual_time)), "new", timeout=100.0))
    assert answer[:2] == ("TIMEOUT", 1) and 100 <= manual_time.now < 105


def test_what_the_caller_changes_after_save_async_has_returned_is_not_saved(tmp_path):
    gate, given, extra = threading.Event(), {"epoch": [1]}, {"step": 1}
    checkpoint, options = (
        over(Storage(tmp_path, Seam(lambda *_: gate.wait(HANG_S)))),
        to(custom_metadata=given),
    )
    pending = checkpoint.save_async(small()[0], None, options, extra_state=extra)
    given["epoch"].append(2)
    extra["more"] = 2
    options.checkpoint_prefix = "q"
    assert not pending.done() and not listing(tmp_path)
    gate.set()
    assert pending.result(HANG_S) == "p"
    result = checkpoint.load(small()[0], None, at())
    assert result.metadata.custom_metadata == {"epoch": [1]} and result.extra_state == {"step": 1}


def test_a_save_that_is_late_when_a_step_begins_does_not_begin_it(tmp_path, manual_time):
    class Slow(ckpt.LocalStorage):
        made: ClassVar[list[str]] = []

        def create(self, name):
            self.made.append(name)
            manual_time.sleep(101)  # longer than the save may take
            return super().create(name)

    refusal(lambda: over(Slow(tmp_path)).save(small()[0], None, to(timeout=100.0)), ExceptionType.TIMEOUT)
    assert len(Slow.made) == 1 and Slow.made[0].endswith(".tmp") and listing(tmp_path) == {}


def test_threads_that_get_no_memory_fail_the_save_and_publish_nothing(tmp_path, monkeypatch):
    def refuse(length):
        raise MemoryError("no room for a buffer")

    monkeypatch.setattr(st, "aligned_buffer", refuse)
    assert "no room for a buffer" in refusal(lambda: opened(tmp_path).save(small()[0], None, to()))
    assert listing(tmp_path) == {} or not list(tmp_path.glob("*.json"))


@pytest.fixture
def vendored(tmp_path):
    """The three files as somebody else's package: pkg/vendor/ckpt.py and its neighbours."""
    vendor = tmp_path / "pkg" / "vendor"
    vendor.mkdir(parents=True)
    for path in (vendor.parent / "__init__.py", vendor / "__init__.py"):
        path.touch()
    for name in ("ckpt.py", "ckpt_coord.py", "ckpt_storage.py"):
        shutil.copy(HERE / name, vendor)
    return tmp_path


def test_the_three_files_work_inside_somebodys_package(vendored):
    for name, prefixes, same, code in run(2, use_the_vendored_copy, vendored):
        assert (name, prefixes, same, code) == ("pkg.vendor.ckpt", ["p"], True, 0)
    command = [sys.executable, "-m", "pkg.vendor.ckpt", "verify", "c"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=vendored, env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0 and "p: ok" in done.stdout, done.stderr


def use_the_vendored_copy(rank, world_size, tmp):
    for name in ("ckpt", "ckpt_coord", "ckpt_storage"):
        sys.modules[name] = None  # an import of the top-level name would now fail
    sys.path[:] = [str(tmp)] + [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    vendored = importlib.import_module("pkg.vendor.ckpt")
    model, optimizer = small()
    other, other_optimizer = small("other")
    with vendored.DistributedCheckpoint(storage=vendored.LocalStorage(str(tmp / "c"))) as checkpoint:
        checkpoint.save(model, optimizer, vendored.SaveOptions(checkpoint_prefix="p"))
        checkpoint.load(other, other_optimizer, vendored.LoadOptions(checkpoint_prefix="p"))
        same = identical(state_of(other, other_optimizer), state_of(model, optimizer))
        prefixes = [info.prefix for info in checkpoint.list_checkpoints()]
        return vendored.__name__, prefixes, same, vendored.main(["verify", str(tmp / "c")])


@pytest.mark.parametrize(
    "tool",
    ["mypy --strict", "ruff check --isolated --select E4,E7,E9,F", "ruff check", "ruff format --check"],
)
def test_the_three_files_and_the_readmes_job_please_the_checkers_inside_somebodys_package(vendored, tool):
    name, *arguments = tool.split()
    pytest.importorskip(name)
    job = training_script(steps=300).replace("from ckpt import", "from .vendor.ckpt import")
    (vendored / "pkg" / "train.py").write_text(job.replace("import time\n", ""))
    ours = (
        ["--config", str(HERE / "pyproject.toml")] if name == "ruff" and "--isolated" not in arguments else []
    )
    command = [sys.executable, "-m", name, *arguments, *ours, "pkg"]
    done = subprocess.run(command, cwd=vendored, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_ckpt_imports_no_part_of_torch_that_torch_itself_does_not():
    script = "import sys, torch; before = set(sys.modules); import ckpt; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S, check=True
    )
    assert "ckpt" in done.stdout.split() and not [
        name for name in done.stdout.split() if name.startswith("torch")
    ]


# ---- bytes: the tensor file, the record, what may be in them ---------------------------------------------------------

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
DTYPES = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
]
DTYPES += ["float32", "float64", "complex64", "complex128", *FLOAT8, "float4_e2m1fn_x2"]
DTYPES = [getattr(torch, name) for name in DTYPES if hasattr(torch, name)]


def code_of(dtype):
    """What safetensors calls a dtype: bfloat16 BF16, float8_e4m3fn F8_E4M3, complex64 C64."""
    name = str(dtype).removeprefix("torch.").removesuffix("fnu").upper().replace("UINT", "U")
    name = re.sub("^FLOAT4.*", "F4", re.sub("^FLOAT8_(E...)(FN$)?", r"F8_\1", name))
    return re.sub("^(B?)(INT|FLOAT|COMPLEX)", lambda kind: kind[1] + kind[2][0], name)


def pattern(dtype, salt=0):
    """96 bytes of every kind of bit pattern, seen as `dtype`: NaN payloads, infinities, -0.0, denormals."""
    special = struct.pack("<4d4f", math.nan, -math.inf, -0.0, 5e-324, math.nan, -math.inf, -0.0, 1e-45)
    bits = special + bytes((37 * i + salt) % 256 for i in range(48 - len(special) % 48))
    bits += struct.pack("<QQ", 0x7FF4DEADBEEF0001, 0xFFF8000000000123)  # NaNs that carry a payload
    bits = (bits + bytes(range(96)))[:96]
    tensor = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    return (tensor % 2 if dtype == torch.bool else tensor).view(dtype)


def blank(tensor):
    """A dense tensor of zero bits like `tensor`."""
    size = tensor.numel() * tensor.element_size()
    return torch.zeros(size, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
@pytest.mark.parametrize("form", FORMATS)
def test_every_dtype_survives_bit_by_bit(tmp_path, form, level):
    truth = {str(dtype).removeprefix("torch."): pattern(dtype) for dtype in DTYPES}
    target = Bag(**{name: blank(tensor) for name, tensor in truth.items()})
    checkpoint = opened(tmp_path)
    checkpoint.save(Bag(**truth), None, to(format=form, compression_level=level))
    checkpoint.load(target, None, at())
    for name, tensor in truth.items():
        assert identical(target.state[name], tensor), name
    for path in shards(tmp_path):
        Shard(path)


@pytest.mark.parametrize("form", FORMATS)
def test_scalar_empty_strided_expanded_and_tied_tensors_are_fine(tmp_path, form):
    base = torch.arange(60.0).reshape(3, 4, 5)
    shared = torch.arange(600.0)
    truth = {
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 3),
        "hollow": torch.zeros(2, 0, 5, dtype=torch.int16),
        "turned": base.permute(2, 0, 1),
        "every": base[:, ::2, 1::3],
        "wide": torch.tensor([[7.0], [8.0]]).expand(2, 9),
        "first": shared,
        "second": shared,
        "half": shared[300:],
    }
    target = Bag(**{name: blank(tensor) for name, tensor in truth.items()})
    checkpoint = opened(tmp_path)
    checkpoint.save(Bag(**truth), None, to(format=form))
    checkpoint.load(target, None, at())
    for name, tensor in truth.items():
        assert identical(target.state[name], tensor.contiguous()), name
    entries = [
        name
        for path in shards(tmp_path)
        for name in Shard(path).header
        if "first" in name or "second" in name
    ]
    assert len(entries) == (
        2 if form is CheckpointFormat.CONSOLIDATED else 1
    )  # safetensors knows no shared offsets


def test_conjugated_and_negated_views_are_saved_and_filled_as_the_values_that_they_show(tmp_path):
    def views(numbers):
        return {
            "plain": numbers,
            "conj": numbers.conj(),
            "neg": numbers.conj().imag,
            "real": numbers.conj().real,
        }

    truth, target = (
        Bag(**views(torch.arange(6) + 2j)),
        Bag(**{n: t.clone() for n, t in views(torch.zeros(6) * 1j).items()}),
    )
    target.state["conj"] = torch.zeros(6, dtype=torch.complex64).conj()
    target.state["neg"] = torch.zeros(6, dtype=torch.complex64).conj().imag
    assert truth.state["neg"].is_neg() and target.state["neg"].is_neg() and target.state["conj"].is_conj()
    filled_views = [target.state["conj"], target.state["neg"]]
    opened(tmp_path).save(truth, None, to())
    opened(tmp_path).load(target, None, at())
    for name, tensor in truth.state.items():
        assert torch.equal(
            target.state[name].resolve_conj().resolve_neg(), tensor.resolve_conj().resolve_neg()
        ), name
    assert torch.equal(filled_views[0], truth.state["conj"]) and torch.equal(
        filled_views[1], truth.state["neg"]
    )


def test_a_tensor_whose_memory_was_freed_is_refused_by_name(tmp_path):
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    assert "freed" in refusal(
        lambda: opened(tmp_path).save(Bag(w=freed), None, to()), ExceptionType.SAVE_FAILED
    )
    assert not listing(tmp_path)


def test_a_header_with_room_for_more_units_than_compression_left_is_read(tmp_path):
    target, options = Bag(w=torch.ones(96 * MiB, dtype=torch.uint8)), to(compression_level="balanced")
    opened(tmp_path).save(Bag(w=torch.zeros(96 * MiB, dtype=torch.uint8)), None, options)
    shard = Shard(shards(tmp_path)[0])
    assert shard.data_at == 2 * PAGE and not shard.bytes[PAGE : shard.data_at].strip(b" ")
    assert len(shard.metadata["crc32"]) == 8 * math.ceil((len(shard.bytes) - shard.data_at) / UNIT) < 200
    assert opened(tmp_path).validate_checkpoint("p").is_valid
    opened(tmp_path).load(target, None, at())
    assert not target.state["w"].any()


@pytest.mark.parametrize("on_device", [0, 1])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_copies_have_equal_checksums_exactly_if_their_bytes_are_equal(device, on_device):
    meter = coord.Meter()
    for shape, dtype in (
        ((5 * MiB,), torch.float32),
        ((1001, 3), torch.bfloat16),
        ((), torch.int64),
        ((7, 2), torch.bool),
    ):
        whole = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
        other = whole.clone() if not shape or len(shape) == 1 else whole.t().contiguous().t()
        flipped, swapped = whole.clone(), whole.clone()
        flipped.reshape(-1)[-1] = 1 - int(flipped.reshape(-1)[-1])
        first, last = (int(x) for x in whole.reshape(-1)[[0, -1]])
        swapped.reshape(-1)[0], swapped.reshape(-1)[-1] = last, first
        sums = coord.checksums([whole, other, flipped, swapped], [on_device] * 4, meter)
        assert sums[0] == sums[1] != sums[2] and (sums[0] == sums[3]) == (first == last)


@pytest.mark.parametrize("form", FORMATS)
def test_an_interpreter_that_exits_waits_for_a_save_in_any_format(tmp_path, form):
    script = (
        "import sys, torch, ckpt\n"
        "saver = ckpt.DistributedCheckpoint(storage=ckpt.LocalStorage(sys.argv[1]))\n"
        "form = ckpt.CheckpointFormat(sys.argv[2])\n"
        "saver.save_async(torch.nn.Linear(2000, 2000), None, ckpt.SaveOptions('p', form))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, form.value], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    assert opened(tmp_path).validate_checkpoint("p").is_valid


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_of_nothing_but_scalars_empties_or_nothing_at_all_is_fine(tmp_path, form):
    scalars, empties = (
        {"a": torch.tensor(1.5), "b": torch.tensor(-0.0)},
        {"a": torch.zeros(0, 3), "b": torch.zeros(2, 0)},
    )
    for truth in (scalars, empties, {**empties, "c": torch.ones(3)}, {}):
        target = Bag(**{name: blank(tensor) for name, tensor in truth.items()})
        opened(tmp_path).save(Bag(**truth), None, to(format=form, include_rng_state=False))
        opened(tmp_path).load(target, None, at())
        assert identical(target.state, truth)


@pytest.mark.parametrize("form", FORMATS)
def test_a_rank_that_holds_nothing_saves_and_loads_with_one_that_does(tmp_path, form):
    assert run(2, save_on_one_rank, tmp_path, form) == [[True, True]] * 2


def save_on_one_rank(rank, world_size, tmp, form):
    found = []
    for holder in range(world_size):
        truth = {"w": torch.ones(3, 2), "empty": torch.zeros(0, 1, 2)} if rank == holder else {}
        target = Bag(**{name: blank(tensor) for name, tensor in truth.items()})
        prefix = to(f"by-{holder}", format=form, include_rng_state=False)
        opened(tmp).save(Bag(**truth), None, prefix)
        opened(tmp).load(target, None, at(f"by-{holder}", strict_mode=False))
        found.append(identical(target.state, truth))
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_pairs_of_four_bit_floats_of_any_shape_come_back(tmp_path, form, shape):
    truth = (
        torch.arange(1, 1 + math.prod(shape), dtype=torch.uint8).reshape(shape).view(torch.float4_e2m1fn_x2)
    )
    target = Bag(w=torch.zeros(shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    opened(tmp_path).save(Bag(w=truth), None, to(format=form))
    opened(tmp_path).load(target, None, at())
    assert identical(target.state["w"], truth)


def test_a_load_fills_tensors_that_are_not_contiguous(tmp_path):
    checkpoint = opened(tmp_path)
    truth = torch.arange(5 * MiB // 4, dtype=torch.int32).reshape(-1, 1024)
    checkpoint.save(Bag(w=truth), None, to())
    buffer = torch.zeros(1024, truth.shape[0] * 2, dtype=torch.int32)
    target = buffer.t()[::2]
    checkpoint.load(Bag(w=target), None, at())
    assert torch.equal(target, truth) and not buffer.t()[1::2].any()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_file_is_a_valid_safetensors_file_with_aligned_data(tmp_path, world_size, form, level):
    run(world_size, save_ddp, tmp_path, form, level)
    assert (
        len(shards(tmp_path))
        == {"MULTI_SHARD": world_size, "SINGLE_FILE": 1, "CONSOLIDATED": world_size + 1}[form.name]
    )
    for path in shards(tmp_path):
        shard = Shard(path)  # asserts the rules
        names = sorted(shard.header, key=shard.place)
        if not path.name.endswith(".model.safetensors"):
            others = [not name.startswith("model") for name in names if not name.startswith("pad/")]
            assert others == sorted(others) and True in others, "model entries come first"
    safe_open = pytest.importorskip("safetensors").safe_open
    for path in shards(tmp_path):
        with safe_open(path, framework="pt") as file:
            shard = Shard(path)
            assert sorted(file.keys()) == sorted(shard.header)
            for name in shard.header:
                if shard.header[name]["dtype"] not in ("F4", "C64"):
                    assert raw(file.get_tensor(name)) == shard.data(name)


def save_ddp(rank, world_size, tmp, form, level):
    model = filled(nn.Sequential(nn.Embedding(50, 30), nn.Linear(30, 7), nn.Linear(7, 3)), "truth")
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    opened(tmp).save(
        wrapped, stepped(wrapped), to(format=form, compression_level=level), extra_state={"rank": rank}
    )


def test_the_consolidated_model_file_feeds_load_state_dict_directly(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    run(4, save_layout, tmp_path, "fsdp2tp2", [CheckpointFormat.CONSOLIDATED])
    (path,) = (tmp_path / "fsdp2tp2/CONSOLIDATED").glob("*.model.safetensors")
    model = Net()
    assert set(load_file(path)) == set(model.state_dict())
    model.load_state_dict(load_file(path))
    assert identical(model.state_dict(), filled(Net(), "truth").state_dict())


def test_what_safetensors_cannot_name_goes_to_the_files_beside_the_consolidated_one(tmp_path):
    state = Bag(
        w=torch.ones(3), z=torch.ones(2, dtype=torch.complex128), _extra_state={"calls": 3}, unset=None
    )
    target = Bag(
        w=torch.zeros(3), z=torch.zeros(2, dtype=torch.complex128), _extra_state={"calls": 0}, unset=5
    )
    checkpoint = opened(tmp_path)
    checkpoint.save(state, None, to(format=CheckpointFormat.CONSOLIDATED))
    checkpoint.load(target, None, at())
    assert identical(target.state, state.state)
    rest, model = map(Shard, shards(tmp_path))
    assert set(model.header) == {"w"} and rest.header["model/z"]["shape"] == [2, 2]
    assert rest.header["model/z"]["dtype"] == "F64" and "model-values/_extra_state" in rest.header


def test_a_tensor_named_metadata_is_kept_where_a_file_can_hold_it_and_else_refused_by_name(tmp_path):
    checkpoint, state = opened(tmp_path), Bag(__metadata__=torch.ones(3), w=torch.zeros(2))
    message = refusal(
        lambda: checkpoint.save(state, None, to(format=CheckpointFormat.CONSOLIDATED)),
        ExceptionType.SAVE_FAILED,
    )
    assert "'__metadata__'" in message and "MULTI_SHARD" in message and listing(tmp_path) == {}
    for form in (CheckpointFormat.MULTI_SHARD, CheckpointFormat.SINGLE_FILE):
        checkpoint.save(state, None, to(format=form))
        target = Bag(__metadata__=torch.zeros(3), w=torch.ones(2))
        checkpoint.load(target, None, at())
        assert identical(target.state, state.state)
    with pytest.raises(ValueError, match="one name: __metadata__; rename one"):
        ckpt.export_checkpoint(checkpoint.storage, "p", tmp_path / "m.safetensors")


@pytest.mark.parametrize("form", [CheckpointFormat.SINGLE_FILE, CheckpointFormat.CONSOLIDATED])
def test_a_header_that_other_readers_would_refuse_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, form
):
    monkeypatch.setattr(st, "MAX_HEADER_BYTES", 2 * PAGE)  # of 100,000,000
    files, bag = Seam(), Bag(**{f"layer.{n}": torch.ones(2) for n in range(150)})
    message = refusal(lambda: over(Storage(tmp_path, files)).save(bag, None, to(format=form)))
    assert "a tensor file's header would take" in message and "MULTI_SHARD" in message
    assert not listing(tmp_path) and not any(map(is_change, files.done))


def test_a_consolidated_model_file_is_never_compressed_and_the_save_says_so(tmp_path, caplog):
    options = to(format=CheckpointFormat.CONSOLIDATED, compression_level=CompressionLevel.FAST)
    opened(tmp_path).save(Bag(w=torch.zeros(MiB)), Bag(m=torch.zeros(MiB)), options)
    rest, model = map(Shard, shards(tmp_path))
    assert model.header["w"]["dtype"] == "F32" and model.path.name in caplog.text
    assert "is not compressed" in caplog.text and len(rest.bytes) < MiB


def test_the_record_lists_tensors_shards_versions_and_ends_in_its_own_crc(tmp_path):
    model, optimizer = small()
    opened(tmp_path).save(model, optimizer, to(custom_metadata={"epoch": 3}))
    text = (tmp_path / "p.metadata.json").read_bytes()
    body, tail = text[: text.rindex(b',"crc32":"')], text[text.rindex(b',"crc32":"') :]
    assert tail == b',"crc32":"%08x"}\n' % zlib.crc32(body)
    json.loads(text)
    (path,) = shards(tmp_path)
    for part in (
        b"0.weight",
        b"1.bias",
        b"exp_avg_sq",
        b"epoch",
        torch.__version__.encode(),
        path.name.encode(),
    ):
        assert part in text
    assert str(path.stat().st_size).encode() in text


def test_nothing_but_the_record_and_its_shards_is_left_on_disk(tmp_path):
    for form in FORMATS:
        run(2, save_ddp, tmp_path / form.name, form, CompressionLevel.NONE)
        names = set(listing(tmp_path / form.name))
        assert names == {"p.metadata.json", *(f"p/{path.name}" for path in shards(tmp_path / form.name))}


def test_a_replicated_tensor_is_written_once_and_its_bytes_are_balanced(tmp_path):
    run(2, save_replicas, tmp_path)
    sizes = [path.stat().st_size for path in shards(tmp_path)]
    assert 16 * MiB <= sum(sizes) < 16.5 * MiB and max(sizes) < 0.6 * sum(sizes)


def save_replicas(rank, world_size, tmp):
    opened(tmp).save(Bag(w=torch.arange(4 * MiB, dtype=torch.int32)), None, to())


@pytest.mark.parametrize("holder", [0, 1])
@pytest.mark.parametrize("form", FORMATS)
def test_a_tied_name_that_only_one_rank_has_is_stored_whole(tmp_path, form, holder):
    assert run(2, save_a_tie_of_one_rank, tmp_path, form, holder) == [True, True]


def save_a_tie_of_one_rank(rank, world_size, tmp, form, holder):
    w = torch.arange(6.0)
    state = {"w": w, "tied": w} if rank == holder else {"w": w}
    opened(tmp).save(Bag(**state), None, to(format=form, include_rng_state=False))
    target = Bag(w=torch.zeros(6), tied=torch.zeros(6))
    opened(tmp).load(target, None, at(load_rng_state=False))
    return torch.equal(target.state["w"], w) and torch.equal(target.state["tied"], w)


def test_twenty_thousand_small_tensors_cost_what_their_bytes_cost(tmp_path):
    bag = Bag(**{f"t{i}": torch.full((16,), i, dtype=torch.int32) for i in range(20_000)})
    files = Seam()
    checkpoint, began = over(Storage(tmp_path, files)), time.process_time()
    checkpoint.save(bag, None, to())
    checkpoint.load(Bag(**{name: torch.zeros(16, dtype=torch.int32) for name in bag.state}), None, at())
    assert len(files.log) < 100 and time.process_time() - began < 60
    shard = Shard(shards(tmp_path)[0])
    assert len(shard.bytes) - shard.data_at < 20_000 * 64 + 64 * 1024


def test_damage_is_named_by_file_unit_and_tensor_and_spares_what_lies_in_other_units(tmp_path):
    bag = Bag(alpha=torch.ones(6 * MiB, dtype=torch.uint8), beta=torch.ones(6 * MiB, dtype=torch.uint8))
    checkpoint = opened(tmp_path)
    checkpoint.save(bag, None, to(include_rng_state=False))
    (path,) = shards(tmp_path)
    flip(path, Shard(path).place("model/beta")[1] - 1)
    message = refusal(lambda: checkpoint.load(bag, None, at()), ExceptionType.CORRUPTED_CHECKPOINT)
    assert f"{path.name}: unit 47 has CRC32" in message and "beta" in message and "alpha" not in message
    result = checkpoint.validate_checkpoint("p")
    assert not result.is_valid and path.name in result.get_summary() and "beta" in result.get_summary()
    checkpoint.load(Bag(alpha=torch.zeros(6 * MiB, dtype=torch.uint8)), None, at(strict_mode=False))


@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_bit_anywhere_in_any_file_is_found(tmp_path, form):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to(format=form))
    assert checkpoint.validate_checkpoint("p").is_valid
    for path in [*shards(tmp_path), tmp_path / "p.metadata.json"]:
        whole = path.read_bytes()
        places = {0, 9, len(whole) // 2, len(whole) - 1, *range(0, len(whole), len(whole) // 40 + 1)}
        if path.suffix == ".safetensors":
            places |= {Shard(path).data_at - 1, Shard(path).data_at}  # header padding, first byte
        for position in places:
            flip(path, position)
            assert not checkpoint.validate_checkpoint("p").is_valid, (path.name, position)
            path.write_bytes(whole)
    assert checkpoint.validate_checkpoint("p").is_valid


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int = 0


EXTRA = {
    "none": None,
    "yes": True,
    "huge": -(10**60),
    "third": 1 / 3,
    "odd floats": [-0.0, math.inf, -math.inf, math.nan],
    "text": "ünï\ud7ff\u0000\n",
    "bytes": bytes(range(256)),
    "list": [1, [2.0, ("three", [])], ()],
    "set": {1, "a", (2,)},
    "keys": {1: "int", "1": "str", False: "no", 2.5: "float", (1, "a"): "tuple", None: "none", b"b": "bytes"},
    "empty": [{}, [], (), set(), "", b""],
    "torch": [torch.bfloat16, torch.device("cpu"), torch.Size([2, 0])],
    "numpy": [np.arange(6, dtype=">i2").reshape(2, 3), np.float32(1.1), np.array(["a", "bc"])],
    "dates": [
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
    ],
    "tensor": torch.arange(5.0),
    "nested": {"deep": [torch.ones(2, dtype=torch.float64), {"x": torch.tensor(3)}]},
    "surrogates": [
        "\ud800",
        "\ud83d\ude00",
        "\udc00\ud800",
        {"\ud83d\ude00": 1, "\U0001f600": 2, "\udfff": 3},
    ],
    "like a tag": {"$tensor": "x", "$": {}, "@": [], "a/b": {"$int": "0x1"}},
}


@pytest.mark.parametrize("key", EXTRA)
def test_extra_state_comes_back_exactly(tmp_path, key):
    checkpoint = opened(tmp_path)
    model, _ = small()
    checkpoint.save(model, None, to(), extra_state={key: EXTRA[key]})
    result = checkpoint.load(model, None, at())
    assert set(result.extra_state) == {key}
    assert identical(result.extra_state[key], EXTRA[key]), result.extra_state[key]


@pytest.mark.parametrize(
    "extra",
    [
        {"a": {"b": torch.ones(1)}, "a.b": 5},
        {"w": torch.ones(1), "w#1": 5},
        {"ema": {"decay": torch.ones(4)}, "ema.decay": 1000},
        {"a": [torch.ones(2), torch.zeros(2)], "a.0": torch.full((3,), 7.0)},
    ],
    ids=["value", "number", "long value", "list"],
)
def test_a_tensor_inside_a_value_never_takes_the_name_of_another_value(tmp_path, extra):
    checkpoint = opened(tmp_path)
    model, _ = small()
    checkpoint.save(model, None, to(), extra_state=extra)
    assert identical(checkpoint.load(model, None, at()).extra_state, extra)


def test_two_optimizers_of_the_same_parameters_each_get_their_own_state_back(tmp_path):
    def start():
        model = torch.nn.Linear(3, 2)
        fast = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, {"fast": fast, "slow": torch.optim.AdamW(model.parameters(), lr=0.5)}

    (model, optimizers), (other, fresh) = start(), start()
    model(torch.ones(3)).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    opened(tmp_path).save(model, optimizers, to())
    reversed_order = dict(reversed(fresh.items()))
    opened(tmp_path).load(other, reversed_order, at())
    for name, optimizer in optimizers.items():
        assert identical(fresh[name].state_dict(), optimizer.state_dict())


def test_tensors_stored_apart_that_are_tied_here_are_told_of(tmp_path):
    opened(tmp_path).save(Bag(a=torch.ones(2), b=torch.zeros(2)), None, to())
    tied = torch.full((2,), 5.0)
    (warning,) = opened(tmp_path).load(Bag(a=tied, b=tied), None, at()).warnings
    assert "model/a" in warning and "model/b" in warning and identical(tied, torch.zeros(2))


def test_stateful_extra_state_is_restored_in_place_and_returned(tmp_path):
    def start():
        model, optimizer = small()
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=50)

    model, optimizer, scheduler = start()
    for _ in range(7):
        scheduler.step()
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to(), extra_state={"scheduler": scheduler, "step": 7})
    model, optimizer, fresh = start()
    result = checkpoint.load(model, optimizer, at(), extra_state={"scheduler": fresh})
    assert fresh.last_epoch == 7 and fresh.get_last_lr() == scheduler.get_last_lr()
    assert set(result.extra_state) == {"scheduler", "step"} and result.extra_state["step"] == 7
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_tensors_at_places_of_a_state_that_read_alike_come_back_each_to_its_own(tmp_path):
    def state(first, second):
        return Bag(
            **{
                "a": {"b": torch.full((2,), first)},
                "a.b": torch.full((2,), second),
                "c": {1: (torch.ones(1),)},
            }
        )

    checkpoint, (model, _), target = opened(tmp_path), small(), state(3.0, 4.0)
    live = target.state["a"]["b"], target.state["a.b"], target.state["c"][1][0].zero_()
    checkpoint.save(model, None, to(), extra_state={"x": state(1.0, 2.0)})
    checkpoint.load(model, None, at(), extra_state={"x": target})
    assert [tensor.tolist() for tensor in live] == [[1.0, 1.0], [2.0, 2.0], [1.0]]  # in place


def test_stored_tensors_that_are_one_tensor_here_come_back_as_several(tmp_path):
    checkpoint, truth = opened(tmp_path), [torch.full((4,), float(i)) for i in range(3)]
    averages = Bag(w=truth[1], other=truth[2], tied=truth[2])
    checkpoint.save(Bag(w=truth[0]), None, to(), extra_state={"ema": averages})
    live = torch.zeros(4)
    model, averages = Bag(w=live), Bag(w=live.detach(), other=live, tied=live)  # as before their first step
    checkpoint.load(model, None, at(), extra_state={"ema": averages})
    assert model.state["w"] is live and identical(live, truth[0])
    assert identical(averages.state, {"w": truth[1], "other": truth[2], "tied": truth[2]})


def test_of_stored_tensors_that_are_one_parameter_here_the_last_is_loaded(tmp_path):
    first, last = torch.full((MiB,), 1.0), torch.full((MiB,), 2.0)
    checkpoint, tied = opened(tmp_path), torch.zeros(MiB)
    checkpoint.save(Bag(first=first, last=last), None, to())
    for _ in range(5):
        tied.zero_()
        checkpoint.load(Bag(first=tied, last=tied), None, at())
        assert identical(tied, last)


class Averaged(nn.Module):
    """Its average, kept as extra state, is the weight itself until the first step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.average = self.weight.data

    def get_extra_state(self):
        return {"average": self.average}

    def set_extra_state(self, state):
        self.average = state["average"]


def test_an_average_in_extra_state_that_is_the_weight_so_far_is_loaded_apart(tmp_path):
    model, checkpoint = filled(Averaged(), "truth"), opened(tmp_path)
    model.average = torch.full((4,), 7.0)
    checkpoint.save(model, None, to())
    other = Averaged()
    checkpoint.load(other, None, at())
    assert identical(other.weight.data, model.weight.data) and identical(other.average, model.average)


UNSUPPORTED = {
    "enum": Colour.RED,
    "dataclass": Point(),
    "lambda": lambda: 0,
    "object": object(),
    "file": io.StringIO(),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_object_that_is_not_data_is_refused_by_path_and_type_before_anything_is_written(tmp_path, kind):
    thing = UNSUPPORTED[kind]
    with pytest.raises((CheckpointException, ValueError)) as caught:
        opened(tmp_path).save(small()[0], None, to(), extra_state={"outer": [{"inner": thing}]})
    message = str(caught.value)
    assert "outer" in message and "inner" in message and type(thing).__name__ in message
    assert listing(tmp_path) == {}


class Wrapped(torch.Tensor):
    """A tensor subclass that the library cannot know."""


UNSUITED = {
    "sparse": lambda: torch.eye(3).to_sparse(), "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"), "subclass": lambda: torch.ones(3).as_subclass(Wrapped),
    "lazy": nn.UninitializedParameter,
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSUITED)
def test_a_tensor_that_is_not_dense_and_real_is_refused_by_key_before_anything_is_written(tmp_path, kind):
    bag = Bag(good=torch.ones(3), **{"layer.odd": UNSUITED[kind]()})
    message = refusal(lambda: opened(tmp_path).save(bag, None, to()), ExceptionType.SAVE_FAILED)
    assert "layer.odd" in message and listing(tmp_path) == {}


@pytest.mark.parametrize("kind", UNSUITED)
def test_a_tensor_that_is_not_dense_and_real_is_refused_by_a_load_as_its_failure_before_anything_changes(
    tmp_path, kind
):
    checkpoint = opened(tmp_path)
    checkpoint.save(Bag(good=torch.zeros(3), **{"layer.odd": torch.zeros(3)}), None, to())
    bag = Bag(good=torch.ones(3), **{"layer.odd": UNSUITED[kind]()})
    message = refusal(lambda: checkpoint.load(bag, None, at()), ExceptionType.LOAD_FAILED)
    assert (
        "layer.odd" in message and "undefined" not in message and identical(bag.state["good"], torch.ones(3))
    )


class Scale(nn.Parameter):
    """A parameter of a class of its own, as FP8 and quantisation libraries have."""


class Unusual(nn.Linear):
    """Such a parameter, an `nn.Buffer`, and a state whose methods take no options."""

    def __init__(self, number):
        super().__init__(3, 2)
        self.scale, self.offset = Scale(torch.zeros(3)), nn.Buffer(torch.zeros(3))
        for tensor in self.state_dict().values():
            tensor.fill_(number)

    def state_dict(self):
        return super().state_dict()

    def load_state_dict(self, state):
        return super().load_state_dict(state)


def test_what_a_save_accepts_a_load_of_the_same_objects_accepts(tmp_path):
    def start(number):
        bag, extra = (
            Bag(a=Scale(torch.full((2,), number)), b=torch.ones(2, requires_grad=True) * number) for _ in "12"
        )
        model = {"unusual": Unusual(number), "bag": bag}
        optimizer = {
            "adamw": stepped(model["unusual"], lr=number),
            "own": Bag(momentum=Scale(torch.full((2,), number))),
        }
        return model, optimizer, {"extra": extra}

    def values(model, optimizer, extra):
        states = optimizer["adamw"].state_dict()["state"].values()
        found = [*model["unusual"].state_dict().values(), *(t for state in states for t in state.values())]
        found += [t for bag in (model["bag"], optimizer["own"], extra["extra"]) for t in bag.state.values()]
        return [raw(tensor) for tensor in found]

    (model, optimizer, extra), other, checkpoint = start(0.5), start(0.25), opened(tmp_path)
    checkpoint.save(model, optimizer, to(), extra_state=extra)
    assert values(*other) != values(model, optimizer, extra)
    checkpoint.load(*other[:2], at(), extra_state=other[2])
    assert values(*other) == values(model, optimizer, extra)


def test_partial_placements_and_fsdp1_shards_are_refused_by_name(tmp_path):
    for message, nothing in run(2, save_the_unsaveable, tmp_path):
        assert "grad_sum" in message[0] and "Partial" in message[0]
        assert "weight" in message[1] and "device_mesh" in message[1] and nothing


def save_the_unsaveable(rank, world_size, tmp):
    mesh = init_device_mesh("cpu", (2,))
    partial = Bag(grad_sum=DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    old = FullyShardedDataParallel(nn.Linear(5, 7), device_id=torch.device("cpu"))
    FullyShardedDataParallel.set_state_dict_type(old, StateDictType.SHARDED_STATE_DICT)
    checkpoint = opened(tmp / "c")
    bags = (partial, Bag(**old.state_dict()))
    messages = [told(functools.partial(checkpoint.save, model, None, to()))[2] for model in bags]
    return messages, not (tmp / "c").exists() or listing(tmp / "c") == {}


def test_fsdp1_at_any_depth_is_refused_by_save_and_load_before_anything_changes_with_the_ways_out(tmp_path):
    for told_of_save, told_of_load, unchanged in run(2, offer_fsdp1, tmp_path):
        for (kind, _, message), expected in ((told_of_save, "SAVE_FAILED"), (told_of_load, "LOAD_FAILED")):
            assert kind == expected and message.startswith("part.1.inner is FSDP1")
            assert all(
                word in message for word in ("fully_shard", "get_state_dict", "device_mesh", "extra_state")
            )
        assert unchanged


def offer_fsdp1(rank, world_size, tmp):
    def start():
        return nn.Sequential(nn.Linear(3, 5), nn.ModuleDict({"inner": nn.Linear(5, 2)}))

    plain, model, checkpoint = start(), start(), opened(tmp)
    checkpoint.save({"part": plain}, None, to("plain"))
    before = listing(tmp)
    model[1]["inner"] = FullyShardedDataParallel(model[1]["inner"], device_id=torch.device("cpu"))
    given, kept = {"part": DistributedDataParallel(model)}, state_of(model[0])
    saved, loaded = (
        told(lambda: checkpoint.save(given, None, to())),
        told(lambda: checkpoint.load(given, None, at("plain"))),
    )
    return saved, loaded, listing(tmp) == before and identical(state_of(model[0]), kept)


def test_no_pickle_is_ever_loaded(tmp_path):
    (events,) = run(1, load_under_audit, tmp_path)
    assert events == []


def load_under_audit(rank, world_size, tmp):
    events = []
    checkpoint = opened(tmp)
    model, optimizer = small()
    extra = {key: value for key, value in EXTRA.items() if key != "text"}
    checkpoint.save(model, optimizer, to(), extra_state=extra)
    watched = ("pickle.find_class", "marshal.loads", "exec", "compile")
    sys.addaudithook(lambda name, args: events.append((name, str(args))) if name in watched else None)
    checkpoint.load(model, optimizer, at())
    return [event for event in events if event[0] != "exec" or "ckpt" in event[1]]


# ---- protocol: S1 to S7, L1 to L5, over real ranks -------------------------------------------------------------------


def test_a_local_coordinator_is_rank_zero_of_one():
    local = ckpt.LocalCoordinator()
    assert (local.rank, local.world_size) == (0, 1) and isinstance(local, ckpt.DistributedCoordinator)


def test_a_torch_coordinator_gathers_broadcasts_and_names_who_is_late(tmp_path):
    for rank, (gathered, sent, late, again) in enumerate(run(3, coordinate, tmp_path)):
        assert gathered == [{"rank": 0}, {"rank": 1}, {"rank": 2}] and sent == "from 1" and again == [0, 1, 2]
        assert rank == 1 or (late[0] == "TIMEOUT" and 1 in named(late)), late


def coordinate(rank, world_size, tmp):
    coordinator = ckpt.TorchCoordinator()
    assert isinstance(coordinator, ckpt.DistributedCoordinator)
    gathered = coordinator.all_gather({"rank": rank})
    sent = coordinator.broadcast(f"from {rank}", src=1)
    late = None
    if rank == 1:
        await_file(tmp / "gave-up-0")
        await_file(tmp / "gave-up-2")
    late = told(lambda: coordinator.barrier(timeout=1.0))
    (tmp / f"gave-up-{rank}").touch()
    ckpt.TorchCoordinator().barrier()
    return gathered, sent, late, ckpt.TorchCoordinator().all_gather(rank)


def named(answer):
    """The ranks that a TIMEOUT names: whoever is silent, and on a busy machine also who came late to this wait."""
    return [int(rank) for rank in re.search(r"rank\(s\) ([\d, ]+) of", answer[2])[1].split(", ")]


def test_ranks_tell_each_other_values_of_any_size(tmp_path):
    for rank, (sizes, same, keys) in enumerate(run(3, tell_much, tmp_path)):
        assert sizes == [1 << 22, (1 << 22) - 2, 30_000_000] and same and keys <= 20, rank


def tell_much(rank, world_size, tmp):
    coordinator = ckpt.TorchCoordinator()
    mine = (
        str(rank) * [1 << 22, (1 << 22) - 2, 30_000_000][rank]
    )  # with its two quotes the second fills a part
    gathered = coordinator.all_gather(mine)
    same = coordinator.broadcast(mine, src=2) == gathered[2]
    coordinator.barrier()
    coordinator.barrier()
    return [len(told) for told in gathered], same, dist.distributed_c10d._get_default_store().num_keys()


def await_file(path):
    """Wait until another rank has made `path`: a gate, not a sleep."""
    while not path.exists():
        time.sleep(0.01)


def test_the_store_does_not_fill_up_with_keys(tmp_path):
    for few, many in run(2, count_keys, tmp_path):
        assert many <= few + 10


def count_keys(rank, world_size, tmp):
    checkpoint, counts = opened(tmp), []
    for saves in (3, 12):
        for _ in range(saves):
            checkpoint.save(Bag(w=torch.zeros(2)), None, to())
            checkpoint.load(Bag(w=torch.zeros(2)), None, at())
        dist.barrier()
        counts.append(dist.distributed_c10d._get_default_store().num_keys())
        dist.barrier()
    return counts


def first_after(log, start, call, ending=""):
    """Where in the log, from `start` on, `call` on a file of that ending comes first."""
    return next(i for i in range(start, len(log)) if log[i].call == call and log[i].path.endswith(ending))


def test_the_file_operations_of_an_overwrite_and_a_delete_come_in_the_documented_order(tmp_path):
    files = Seam()
    checkpoint = ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files))
    checkpoint.save(*small(), to())
    (old,) = shards(tmp_path)
    files.log.clear()
    checkpoint.save(*small("second"), to())
    log, (new,) = files.log, shards(tmp_path)
    fence = first_after(log, 0, "create", ".tmp")  # the fence, then S4 to S7
    written = first_after(log, fence, "pwrite", new.name)
    synced = first_after(log, written, "fsync", new.name)
    assert not any(op.call == "pwrite" and op.path.endswith(new.name) for op in log[synced:])
    synced_names = first_after(log, synced, "fsync_dir")
    record = first_after(log, fence, "fsync", ".tmp")
    rename = first_after(log, max(record, synced_names), "rename", ".tmp")
    assert not any(op.call == "pwrite" and op.path == log[rename].path for op in log[record:])
    assert [op.call for op in log].count("rename") == 1
    assert first_after(log, rename, "fsync_dir") < first_after(log, 0, "unlink", old.name)

    files.log.clear()
    checkpoint.delete_checkpoint("p")
    record = first_after(log, 0, "unlink", "p.metadata.json")
    assert first_after(log, record, "fsync_dir") < first_after(log, 0, "unlink", new.name)


def test_without_its_record_a_checkpoint_does_not_exist(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to())
    (tmp_path / "p.metadata.json").unlink()
    assert checkpoint.list_checkpoints() == [] and checkpoint.latest_checkpoint() is None
    refusal(lambda: checkpoint.load(*small(), at()))


def test_a_checkpoint_that_lacks_a_shard_is_not_listed_and_is_corrupt_at_load(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to("whole"))
    checkpoint.save(*small(), to("torn"))
    shards(tmp_path, "torn")[0].unlink()
    assert checkpoint.latest_checkpoint().prefix == "whole" and len(checkpoint.list_checkpoints()) == 1
    message = refusal(lambda: checkpoint.load(*small(), at("torn")), ExceptionType.CORRUPTED_CHECKPOINT)
    assert ".safetensors" in message


def test_a_failed_overwrite_leaves_the_old_checkpoint_as_it_was(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to())
    before = listing(tmp_path)
    message = refusal(
        lambda: checkpoint.save(Doomed(RuntimeError("boom")), None, to()), ExceptionType.SAVE_FAILED
    )
    assert "boom" in message and listing(tmp_path) == before


def test_the_rank_that_fails_is_named_on_every_rank_and_nothing_is_left(tmp_path):
    for save, load, stored in run(3, fail_on_rank_one, tmp_path):
        assert save[:2] == ("SAVE_FAILED", 1) and "boom" in save[2]
        assert load[:2] == ("LOAD_FAILED", 1) and "boom" in load[2]
        assert stored == ["good"]
    assert {name.split("/")[0].split(".")[0] for name in listing(tmp_path)} == {"good"}


def fail_on_rank_one(rank, world_size, tmp):
    checkpoint = opened(tmp)
    good = Bag(w=torch.zeros(2))
    model = Doomed(RuntimeError("boom")) if rank == 1 else good
    save = told(lambda: checkpoint.save(model, None, to("bad")))
    checkpoint.save(good, None, to("good"))
    if rank == 1:
        model = Doomed(RuntimeError("boom"), times=0)
    load = told(lambda: checkpoint.load(model, None, at("good")))
    return save, load, [info.prefix for info in checkpoint.list_checkpoints()]


@pytest.mark.parametrize("difference", ["prefix", "format", "compression", "optimizer"])
def test_ranks_that_disagree_are_all_told_about_what(tmp_path, difference):
    for kind, _, message in run(2, disagree, tmp_path, difference):
        assert kind == "ValueError" and "disagree" in message and difference in message
    assert listing(tmp_path) == {}


def disagree(rank, world_size, tmp, difference):
    odd = {
        "prefix": to("other"),
        "format": to(format=CheckpointFormat.SINGLE_FILE),
        "compression": to(compression_level=CompressionLevel.FAST),
        "optimizer": to(include_optimizer=False),
    }
    return told(lambda: opened(tmp).save(*small(), odd[difference] if rank else to()))


def test_a_misuse_by_one_rank_alone_is_raised_on_all(tmp_path):
    for errors in run(2, misuse_on_rank_one, tmp_path):
        assert errors == [True] * 7


def misuse_on_rank_one(rank, world_size, tmp):
    checkpoint = opened(tmp)
    model, optimizer = small()
    checkpoint.save(model, optimizer, to())

    def raises(call):
        try:
            call()
        except (ValueError, CheckpointException):
            return True
        return False

    return [
        raises(lambda: checkpoint.save(model, optimizer, to("../x" if rank else "p"))),
        raises(
            lambda: checkpoint.load(
                model, optimizer, at(resharding_strategy="psychic" if rank else "parallel")
            )
        ),
        raises(lambda: checkpoint.load(model, optimizer, LoadOptions() if rank else at())),
        raises(lambda: checkpoint.save_model_only(model, at() if rank else to())),
        raises(lambda: checkpoint.load({"a": model, "b": torch.ones(2)} if rank else model, None, at())),
        raises(lambda: checkpoint.save(model, optimizer, to(format="zip" if rank else "single_file"))),
        not raises(lambda: checkpoint.save(model, None, to(format=FORMATS[0] if rank else FORMATS[0].value))),
    ]


@pytest.mark.parametrize("operation", ["save", "load"])
def test_a_dead_rank_is_named_at_the_deadline(tmp_path, operation):
    first, _, third = run(3, outlive_rank_one, tmp_path, operation, dies={1})
    assert first[:2] == third[:2] == ("TIMEOUT", 1), (first, third)
    assert 1 in named(first) and 1 in named(third), (first, third)


def outlive_rank_one(rank, world_size, tmp, operation):
    checkpoint = opened(tmp, default_timeout=DEADLINE_S)
    model, optimizer = small()
    checkpoint.save(model, optimizer, to("before", timeout=600.0))
    dist.barrier()
    if rank == 1:
        os._exit(9)
    if operation == "save":
        answer = told(lambda: checkpoint.save(model, optimizer, to()))
    else:
        answer = told(lambda: checkpoint.load(model, optimizer, at("before")))
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["before"]
    return answer


def test_a_straggler_is_named_cannot_commit_and_then_all_save_again(tmp_path):
    prompt, late = run(2, straggle, tmp_path)
    assert prompt[0][0] == "TIMEOUT" and named(prompt[0]) == [1], prompt
    assert late[0] == prompt[0], late
    assert prompt[1] == late[1] == ["again"]


def straggle(rank, world_size, tmp):
    checkpoint = opened(tmp)
    model, optimizer = small()
    gate = tmp / "gave-up"
    if rank == 1:
        await_file(gate)
    answer = told(lambda: checkpoint.save(model, optimizer, to("late", timeout=600.0 if rank else 1.5)))
    gate.touch()
    checkpoint.save(model, optimizer, to("again"))
    checkpoint.load(model, optimizer, at("again"))
    return answer, [info.prefix for info in checkpoint.list_checkpoints()]


def test_queries_and_deletes_are_local_and_never_wait_for_other_ranks(tmp_path):
    assert run(2, ask_alone, tmp_path)[0] == (["a", "b"], "b", True, ["b"])


def ask_alone(rank, world_size, tmp):
    if rank == 0:
        assert opened(tmp).list_checkpoints() == []  # nor does the making of an object
    checkpoint = opened(tmp)
    for prefix in "ab":
        checkpoint.save(*small(), to(prefix))
    if rank:
        return None
    listed = [info.prefix for info in checkpoint.list_checkpoints()]
    answer = listed, checkpoint.latest_checkpoint().prefix, checkpoint.validate_checkpoint("a").is_valid
    checkpoint.delete_checkpoint("a")
    checkpoint.close()
    return *answer, [info.prefix for info in checkpoint.list_checkpoints()]


def test_a_process_group_of_some_ranks_saves_without_the_others(tmp_path):
    answers = run(3, save_in_a_subset, tmp_path)
    assert answers == [None, (0, 2, True), (1, 2, True)]
    assert len(shards(tmp_path)) == 2


def save_in_a_subset(rank, world_size, tmp):
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    coordinator = ckpt.TorchCoordinator(process_group=group)
    checkpoint = opened(tmp, coordinator)
    model, optimizer = small()
    checkpoint.save(model, optimizer, to())
    other, other_optimizer = small("other")
    checkpoint.load(other, other_optimizer, at())
    same = identical(state_of(other, other_optimizer), state_of(model, optimizer))
    return coordinator.rank, coordinator.world_size, same


def test_an_object_made_before_the_process_group_saves_with_all_ranks_of_whichever_group_there_is(tmp_path):
    for rank, (together, alone) in enumerate(run(2, outlive_process_groups, tmp_path)):
        assert together == [("p", "late", 2, 2, True)] * 2
        assert alone == ("LocalCoordinator", 1), f"rank {rank}, without a process group"
    assert len(shards(tmp_path)) == 2


def outlive_process_groups(rank, world_size, tmp):
    store, together = dist.distributed_c10d._get_default_store(), []
    dist.destroy_process_group()
    checkpoint = opened(tmp)
    checkpoint.save(small()[0], None, to(f"alone-{rank}"))
    for name in ("first", "second"):
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world_size)
        model, other = (DistributedDataParallel(small(salt)[0]) for salt in ("truth", "other"))
        saved = checkpoint.save(model, None, to())
        coordinator = checkpoint.coordinator
        result = checkpoint.load(other, None, at())
        same = identical(state_of(other), state_of(model)) and checkpoint.coordinator is coordinator
        pending = checkpoint.save_async(model, None, to("late"))
        dist.destroy_process_group()  # the save in the background goes on with the ranks that began it
        late = pending.result(20.0)
        together.append((saved, late, result.metadata.world_size, result.target_world_size, same))
    found = [info.world_size for info in checkpoint.list_checkpoints() if info.prefix == f"alone-{rank}"]
    return together, (type(checkpoint.coordinator).__name__, *found)


LONELY = [(False, "2", 1), (True, "2", 0), (False, "1", 0), (False, "", 0)]


@pytest.mark.parametrize("given, world_size, times", LONELY)
def test_a_process_that_saves_alone_in_a_job_of_several_is_warned_once(
    tmp_path, monkeypatch, caplog, given, world_size, times
):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    checkpoint = opened(tmp_path, ckpt.LocalCoordinator() if given else None)
    assert checkpoint.latest_checkpoint() is None and "WORLD_SIZE" not in caplog.text
    for save in (checkpoint.save, checkpoint.save_async, checkpoint.save):
        save(small()[0], None, "p")
    checkpoint.close()
    assert caplog.text.count("WORLD_SIZE is 2: call init_process_group") == times


def test_a_call_on_one_rank_alone_says_at_the_deadline_that_it_is_collective(tmp_path):
    lonely, _ = run(2, call_alone, tmp_path)
    for call, (kind, rank, message) in lonely.items():
        hint = f"{'load' if call == 'load' else 'save'} is collective: every rank must call it"
        assert (kind, rank) == ("TIMEOUT", 1) and hint in message, message


def call_alone(rank, world_size, tmp):
    checkpoint, model = opened(tmp, default_timeout=0.2), small()[0]
    calls = {"save": checkpoint.save, "load": checkpoint.load}
    calls["save_async"] = lambda *given: checkpoint.save_async(*given).result(20.0)
    calls["save_model_only"] = lambda model, _, prefix: checkpoint.save_model_only(model, prefix)
    if rank == 0:
        return {name: told(functools.partial(call, model, None, "p")) for name, call in calls.items()}


def test_a_transient_error_on_one_rank_is_retried_by_all(tmp_path):
    (zero, tries), (one, tries_of_one) = run(2, hiccup_on_rank_one, tmp_path)
    assert zero == one == ("returned", None, "p") and tries_of_one == 2
    assert tries in (1, 2), "rank 0 may hear of the first failure before it makes a file"
    assert len(listing(tmp_path)) == 3


def hiccup_on_rank_one(rank, world_size, tmp):
    files = hiccups(times=rank)
    ckpt.StorageFactory.register("hiccups", lambda settings: Storage(tmp, files))
    retry = ckpt.RetryPolicy(max_retries=2, initial_delay=0.01)
    checkpoint = opened(tmp, storage=ckpt.StorageOptions("hiccups"), retry_policy=retry)
    return told(lambda: checkpoint.save(*small(), to())), sum(map(is_new_shard, files.log))


def test_cancel_on_one_rank_stops_all(tmp_path):
    for kind, _, _ in run(2, cancel_on_rank_one, tmp_path):
        assert kind == "CANCELLED"
    assert listing(tmp_path) == {}


def cancel_on_rank_one(rank, world_size, tmp):
    cancel = threading.Event()
    if rank == 1:
        cancel.set()
    return told(lambda: opened(tmp).save(*small(), to(), cancel=cancel))


def test_the_default_prefix_is_the_same_on_all_ranks(tmp_path):
    first, second = run(2, save_without_a_name, tmp_path)
    assert first == second and first[0] != first[1]


def save_without_a_name(rank, world_size, tmp):
    checkpoint = opened(tmp)
    return [checkpoint.save(*small()), checkpoint.save(*small())]


# ---- resharding: from every layout to every layout, bit for bit ------------------------------------------------------

LAYOUTS = {"plain": 1, "ddp2": 2, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "tp2": 2, "fsdp2tp2": 4, "hsdp2x2": 4}


class Net(nn.Module):
    """Dimensions that no world size divides, some smaller than the world size, a tied weight, scalar buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 6), nn.Embedding(7, 5)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.tiny, self.row = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("mask", torch.zeros(5, dtype=torch.bool))


def laid_out(model, layout):
    """Shard a Net as `layout` says, by torch's own means."""
    if layout == "ddp2":
        return DistributedDataParallel(model)
    mesh = None
    if layout == "hsdp2x2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    elif layout == "tp2":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    elif layout == "fsdp2tp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if "tp" in layout:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "place": ColwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    if layout.startswith(("fsdp", "hsdp")):
        mesh = mesh["dp"] if layout == "fsdp2tp2" else mesh
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def the_truth(layout):
    """A model and an AdamW in a known state, sharded by torch, not by a checkpoint: what every load must give."""
    model = laid_out(Net(), layout)
    optimizer = stepped(model, lr=0.125, foreach=False)
    donors = {slot: filled(Net(), f"truth{slot}") for slot in ("", "exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        for slot, donor in donors.items():
            donor = laid_out(donor, "plain" if layout == "ddp2" else layout)
            for (name, source), parameter in zip(donor.named_parameters(), model.parameters()):
                state = optimizer.state[parameter]
                (state[slot] if slot else parameter).copy_(source)
                state["step"].fill_(zlib.crc32(name.encode()) % 1000)
            if not slot:
                for source, buffer in zip(donor.buffers(), model.buffers()):
                    buffer.copy_(source)
    return model, optimizer


def save_layout(rank, world_size, tmp, layout, formats, level=CompressionLevel.NONE):
    model, optimizer = the_truth(layout)
    checkpoint = opened(tmp)
    for form in formats:
        checkpoint.save(model, optimizer, to(f"{layout}/{form.name}", format=form, compression_level=level))


def differences(model, optimizer, truth_model, truth_optimizer):
    """What differs from the truth, by name; [] if every bit of every local shard is right."""
    wrong, truth = [], truth_model.state_dict()
    for name, tensor in model.state_dict().items():
        if not identical(tensor.detach(), truth[name].detach()):
            wrong.append(name)
    named = zip(truth_model.named_parameters(), model.parameters())
    for (name, there), here in named:
        a, b = optimizer.state[here], truth_optimizer.state[there]
        wrong += [
            f"{name}.{slot}" for slot in sorted(set(a) | set(b)) if not identical(a.get(slot), b.get(slot))
        ]
    here, there = (dict(o.param_groups[0], params=0) for o in (optimizer, truth_optimizer))
    return wrong + [f"param_groups.{key}" for key in there if here.get(key) != there[key]]


def load_layout(rank, world_size, tmp, layout, prefixes, fresh):
    """Load each (prefix, strategy) into a model of this layout and report what differs from the truth."""
    truth, answer = the_truth(layout), {}
    checkpoint = opened(tmp)
    for number, (prefix, strategy) in enumerate(prefixes):
        model = laid_out(Net(), layout)
        new = (fresh + number) % 2
        optimizer = (
            torch.optim.AdamW(model.parameters(), foreach=False) if new else stepped(model, foreach=False)
        )
        options = at(prefix, resharding_strategy=strategy)
        kind, _, message = told(lambda: checkpoint.load(model, optimizer, options))
        wrong = differences(model, optimizer, *truth) if kind == "returned" else [message]
        answer[prefix, strategy, "fresh" if new else "stepped"] = wrong
    return answer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory that holds `<layout>/<format>` of every layout asked for; each is saved once."""
    base, done = tmp_path_factory.mktemp("layouts"), set()

    def save(layout):
        if layout not in done:
            run(LAYOUTS[layout], save_layout, base, layout, FORMATS)
            done.add(layout)
        return base

    return save


@pytest.fixture(scope="module")
def reloaded(saved):
    """What each rank of a target layout got from every source in every format; one set of processes a target."""
    answers = {}

    def load(target):
        if target not in answers:
            pairs = [(source, form) for source in LAYOUTS for form in FORMATS]
            loads = [
                (f"{pair[0]}/{pair[1].name}", STRATEGIES[(n // 3 + n) % 3]) for n, pair in enumerate(pairs)
            ]
            base = [saved(source) for source in LAYOUTS][0]
            answers[target] = run(LAYOUTS[target], load_layout, base, target, loads, 0)
        return answers[target]

    return load


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_reshard_from_any_layout_to_any_other_is_exact(reloaded, target, source):
    for rank, answer in enumerate(reloaded(target)):
        loads = [load for load in answer if load[0].split("/")[0] == source]
        assert len(loads) == 3
        for load in loads:
            assert answer[load] == [], f"rank {rank}, {load}"


@pytest.mark.parametrize("source, target", [("fsdp3", "fsdp2tp2"), ("fsdp2tp2", "fsdp3")])
def test_reshard_every_format_by_every_strategy_gives_the_same_bits(saved, source, target):
    loads = [(f"{source}/{form.name}", strategy) for form in FORMATS for strategy in STRATEGIES]
    for answer in run(LAYOUTS[target], load_layout, saved(source), target, loads, 0):
        assert len(answer) == 9 and not any(answer.values()), answer


@pytest.mark.parametrize("level", [level for level in LEVELS if level.name != "NONE"])
def test_reshard_compressed_checkpoints_of_every_format(tmp_path, level):
    run(3, save_layout, tmp_path, "fsdp3", FORMATS, level)
    loads = [(f"fsdp3/{form.name}", strategy) for form, strategy in zip(FORMATS, STRATEGIES)]
    for answer in run(4, load_layout, tmp_path, "fsdp2tp2", loads, 1):
        assert len(answer) == 3 and not any(answer.values()), answer


@pytest.mark.parametrize("level", LEVELS)
def test_a_shard_of_many_blocks_is_broadcast_whole(tmp_path, level):
    assert all(run(2, broadcast_many_blocks, tmp_path, level))


def broadcast_many_blocks(rank, world_size, tmp, level):
    truth = torch.randn(48 * MiB // 4, generator=torch.Generator().manual_seed(1))
    opened(tmp).save(Bag(a=truth, b=truth[:100]), None, to(compression_level=level))
    found = Bag(a=torch.zeros_like(truth), b=torch.zeros(100))
    opened(tmp).load(found, None, at(resharding_strategy="broadcast"))
    return torch.equal(found.state["a"], truth) and torch.equal(found.state["b"], truth[:100])


class Halves(nn.Module):
    """Eight layers of 6 MiB: where each of two ranks wants half of a layer, both want a part of nearly every block."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1536, bias=False) for _ in range(8))


def half_a_model(mesh, layers=8):
    model = Halves()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    del model.layers[layers:]
    return model


def load_halves(rank, world_size, tmp, case):
    """What each rank got, the bytes that it read of shards, and the bytes that it wants."""
    mesh = init_device_mesh("cpu", (world_size,))
    truth, model = filled(Halves(), "truth"), half_a_model(mesh, layers=6 if case == "fewer" and rank else 8)
    checkpoint = ckpt.DistributedCheckpoint(storage=Storage(tmp, files := Seam()))
    strategy = "parallel" if case == "fewer" else case
    options = at(strict_mode=case != "fewer", resharding_strategy=strategy)
    kind, _, message = told(lambda: checkpoint.load(model, None, options))
    mine = {name: tensor.to_local() for name, tensor in model.state_dict().items()}
    theirs = {n: tensor.chunk(world_size)[rank] for n, tensor in truth.state_dict().items() if n in mine}
    read = sum(op.size for op in files.done if op.call == "pread" and op.path.endswith("safetensors"))
    wanted = sum(tensor.nbytes for tensor in mine.values())
    return (kind, message if kind != "returned" else identical(mine, theirs)), read, wanted


@pytest.mark.parametrize("case", ["parallel", "sequential", "broadcast", "fewer"])
def test_ranks_that_share_blocks_read_only_the_units_of_their_own_part_of_each(tmp_path, case):
    opened(tmp_path).save(filled(Halves(), "truth"), None, to())
    outcomes, reads, wanted = zip(*run(2, load_halves, tmp_path, case))
    assert set(outcomes) == {("returned", True)} and wanted[0] == 24 * MiB
    if case == "broadcast":  # where a block is read by one of the ranks that want it, each byte once
        assert 48 * MiB <= sum(reads) < 49 * MiB
    assert case == "broadcast" or all(0 <= r - w < 3 * UNIT for r, w in zip(reads, wanted)), (reads, wanted)


def broadcast_columns(rank, world_size, tmp, level):
    """Save by rows, and load by columns: every rank needs all pieces. The bytes that this rank read of shards."""
    mesh = init_device_mesh("cpu", (world_size,))
    truth = {
        f"w{n}": torch.randn(1000 + n, 1030, generator=torch.Generator().manual_seed(n)) for n in range(9)
    }
    rows = Bag(**{name: distribute_tensor(w, mesh, [ShardDim(0)]) for name, w in truth.items()})
    opened(tmp).save(rows, None, to(compression_level=level, include_rng_state=False))
    columns = {name: distribute_tensor(torch.zeros_like(w), mesh, [ShardDim(1)]) for name, w in truth.items()}
    checkpoint = ckpt.DistributedCheckpoint(storage=Storage(tmp, files := Seam()))
    checkpoint.load(Bag(**columns), None, at(load_rng_state=False, resharding_strategy="broadcast"))
    exact = all(torch.equal(columns[name].full_tensor(), w) for name, w in truth.items())
    return exact, sum(op.size for op in files.done if op.call == "pread" and op.path.endswith("safetensors"))


@pytest.mark.parametrize("level", LEVELS)
def test_broadcast_reads_each_stored_byte_once_where_pieces_share_units_and_blocks_too(tmp_path, level):
    (exact, one), (too, other) = run(2, broadcast_columns, tmp_path, level)
    files = [Shard(path) for path in shards(tmp_path)]
    headers, data = sum(f.data_at for f in files), sum(len(f.bytes) - f.data_at for f in files)
    assert exact and too and data + headers <= one + other <= data + 2 * headers, (one + other, data, headers)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layer_half", [1, 2])
def test_damage_in_any_ranks_part_of_a_shared_block_is_named_and_fails_all(tmp_path, layer_half, strategy):
    opened(tmp_path).save(filled(Halves(), "truth"), None, to())
    place = 12 * MiB + (2 * layer_half - 1) * MiB
    flip(shards(tmp_path)[0], 4096 + place)
    for (kind, message), _, _ in run(2, load_halves, tmp_path, strategy):
        assert kind == "CORRUPTED_CHECKPOINT"
        assert f"unit {place // UNIT} has CRC32" in message and "layers.2.weight" in message
        assert "undefined" in message


def load_random_layouts(rank, world_size, tmp, cases):
    """Tensors saved in one layout and loaded into another, every second time after a bit of a file was flipped."""
    st.UNIT_BYTES, st.BLOCK_BYTES, st._MIN_DIRECT_BYTES = PAGE, 2 * PAGE, PAGE
    mesh, outcomes = init_device_mesh("cpu", (world_size,)), []
    for case in range(cases):
        rng, path = np.random.default_rng(case), f"{tmp}/{case}"

        def laid(tensor):
            placement = Replicate() if rng.random() < 0.2 else ShardDim(int(rng.integers(tensor.ndim)))
            return distribute_tensor(tensor, mesh, [placement])

        shapes = [rng.integers(1, (9000,) if flat else (60, 40, 8)) for flat in rng.integers(2, size=5)]
        dtypes = [
            (torch.float64, torch.float32, torch.bfloat16, torch.uint8)[n] for n in rng.integers(4, size=5)
        ]
        truth = [torch.from_numpy(rng.integers(0, 200, size=s)).to(d) for s, d in zip(shapes, dtypes)]
        saved = Bag(**{str(n): laid(tensor) for n, tensor in enumerate(truth)})
        form, level = FORMATS[case % 3], LEVELS[case // 2 % 4]
        opened(path).save(saved, None, to(format=form, compression_level=level, include_rng_state=False))
        place = rng.random()
        if rank == 0 and case % 2:
            flip(file := shards(path)[0], int(place * file.stat().st_size))
        dist.barrier()
        found = Bag(**{str(n): laid(torch.zeros_like(tensor)) for n, tensor in enumerate(truth)})
        options = at(load_rng_state=False, resharding_strategy=STRATEGIES[case // 3 % 3])
        kind, _, _ = told(lambda: opened(path).load(found, None, options))
        whole = [tensor.full_tensor() for tensor in found.state.values()]
        outcomes.append("exact" if kind == "returned" and all(map(torch.equal, whole, truth)) else kind)
    return outcomes


def torchs_shard(rows, dim, ways, index, split_factor):
    """What torch gives shard `index` of a tensor: by `torch.chunk` alone, for `_StridedShard` group by group."""

    def chunk(part, count, at):
        parts = part.chunk(count, dim)
        return parts[at] if at < len(parts) else part.narrow(dim, 0, 0)

    groups = [chunk(rows, split_factor, group) for group in range(split_factor)]
    return torch.cat([chunk(group, ways, index) for group in groups], dim)


def random_layout(rng, meshes, shape):
    """A mesh, placements, and a function from a whole tensor to what a coordinate holds of it."""
    mesh = meshes[int(rng.integers(len(meshes)))]
    dims = [int(rng.integers(-1, len(shape))) for _ in range(mesh.ndim)]  # -1: replicated
    factors = [int(rng.choice([1, 1, 1, 2, 3])) for _ in dims]
    later = [
        math.prod(mesh.size(j) for j in range(i + 1, mesh.ndim) if dims[j] == d) for i, d in enumerate(dims)
    ]
    as_fsdp = mesh.ndim > 1 and rng.random() < 0.4 and later[0] > 1 and dims[0] >= 0
    if as_fsdp:
        factors = [later[0], *[1] * (mesh.ndim - 1)]
    placements = [
        Replicate() if d < 0 else ShardDim(d) if factor == 1 else StridedShard(d, split_factor=factor)
        for d, factor in zip(dims, factors)
    ]

    def part(whole, coordinate):
        order = (
            [*range(1, mesh.ndim), 0] if as_fsdp else range(mesh.ndim)
        )  # FSDP2 cuts what the others have left
        for i in order:
            if dims[i] >= 0:
                whole = torchs_shard(
                    whole, dims[i], mesh.size(i), coordinate[i], 1 if as_fsdp else factors[i]
                )
        return whole.clone()

    return mesh, placements, part


def save_random_meshes(rank, world_size, tmp, cases):
    tables = [
        [0, 1, 2, 3],
        [2, 0, 3, 1],
        [[0, 1], [2, 3]],
        [[3, 1], [0, 2]],
        [[[0, 1]], [[2, 3]]],
        [[1], [0], [2], [3]],
        [1, 3],
    ]
    meshes, outcomes = [DeviceMesh("cpu", torch.tensor(table)) for table in tables], []
    for case in range(cases):
        rng = np.random.default_rng(case)
        shape = tuple(
            int(n) for n in rng.integers(0 if case % 9 == 0 else 1, 14, size=int(rng.integers(1, 4)))
        )
        index, checkpoint = torch.arange(math.prod(shape)).view(shape), opened(f"{tmp}/{case}")

        def laid(whole, layout):
            mesh, placements, part = layout
            coordinate = mesh.get_coordinate()
            local = whole.new_empty(0) if coordinate is None else part(whole, coordinate)
            return DTensor.from_local(
                local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
            )

        source, target = (random_layout(rng, meshes, shape) for _ in range(2))
        form = FORMATS[case % 3]
        kind, _, message = told(lambda: checkpoint.save(Bag(w=laid(index, source)), None, to(format=form)))
        if kind != "returned":
            assert not listing(f"{tmp}/{case}"), "refused before anything is written"
            outcomes.append((kind, str(source[1]), message))
            continue
        found = Bag(w=laid(torch.full(shape, -1), target))
        kind, _, message = told(lambda: checkpoint.load(found, None, at(load_rng_state=False)))
        plain = Bag(w=torch.full(shape, -1))
        checkpoint.load(plain, None, at(load_rng_state=False))
        exact = torch.equal(plain.state["w"], index)
        if kind == "returned":
            exact = exact and torch.equal(found.state["w"].to_local(), laid(index, target).to_local())
        outcomes.append(
            ("exact" if exact else "WRONG", f"{source[1]} {shape} -> {target[1]}: {message}", kind)
        )
    return outcomes


def test_every_layout_of_a_tensor_is_saved_and_loaded_exactly_or_refused_before_anything_is_written(tmp_path):
    cases = 60
    for outcomes in run(4, save_random_meshes, tmp_path, cases):
        assert not [outcome for outcome in outcomes if outcome[0] == "WRONG"]
        refused = [outcome for outcome in outcomes if outcome[0] != "exact"]
        assert len(refused) < cases // 10 and all("Strided" in placements for _, placements, _ in refused), (
            refused
        )


def save_packed_rows(rank, world_size, tmp):
    """Two packed matrices, each cut by rows: what `distribute_tensor(x, mesh, [Shard(1)]).flatten(0, 1)` makes of them."""
    mesh = init_device_mesh("cpu", (2,))

    def packed(whole):
        local, kind = whole.view(2, 4, 3).chunk(2, 1)[rank].reshape(4, 3), StridedShard(0, split_factor=2)
        return DTensor.from_local(
            local, mesh, [kind], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    truth, target, plain = (
        packed(torch.arange(24.0).view(8, 3)),
        packed(torch.zeros(8, 3)),
        Bag(w=torch.zeros(8, 3)),
    )
    opened(tmp).save(Bag(w=truth), None, to())
    opened(tmp).load(Bag(w=target), None, at())
    opened(tmp).load(plain, None, at())
    return plain.state["w"].tolist(), torch.equal(target.to_local(), truth.to_local())


def test_a_shard_of_several_runs_of_rows_is_stored_in_the_order_of_the_whole(tmp_path):
    assert run(2, save_packed_rows, tmp_path) == [(torch.arange(24.0).view(8, 3).tolist(), True)] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_random_layouts_are_loaded_exactly_into_others_or_on_all_ranks_refused_as_damaged(
    tmp_path, world_size
):
    first, *others = run(world_size, load_random_layouts, tmp_path, 36)
    assert all(other == first for other in others)
    assert set(first[::2]) == {"exact"} and {"CORRUPTED_CHECKPOINT"} <= set(first[1::2])
    assert set(first[1::2]) <= {
        "exact",
        "CORRUPTED_CHECKPOINT",
    }  # what no rank wants, such as a filler, need not be right


def test_small_pieces_lie_together_so_that_a_rank_that_wants_all_of_them_reads_few_blocks(tmp_path):
    state = {
        f"layer{n}.{what}": torch.ones(size)
        for n in range(3)
        for what, size in (("step", 1), ("weight", MiB))
    }
    opened(tmp_path).save(Bag(**state), None, to(include_rng_state=False))
    names = list(Shard(shards(tmp_path)[0]).header)
    assert names == [f"model/layer{n}.{what}" for what in ("weight", "step") for n in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reshard_to_whole_tensors_on_disk_holds_the_unsharded_truth(saved, layout):
    (path,) = (saved(layout) / layout / "CONSOLIDATED").glob("*.model.safetensors")
    shard, truth = Shard(path), filled(Net(), "truth").state_dict()
    assert set(shard.header) == set(truth)
    for name, tensor in truth.items():
        assert shard.header[name]["shape"] == list(tensor.shape) and shard.data(name) == raw(tensor), name


def test_reshard_reports_what_it_did(saved):
    for answer in run(2, describe_a_load, saved("fsdp4")):
        assert answer == (4, 2, True, True)


def describe_a_load(rank, world_size, tmp):
    model, optimizer = the_truth("fsdp2")
    result = opened(tmp).load(model, optimizer, at("fsdp4/MULTI_SHARD"))
    (rng,) = [warning for warning in result.warnings if "rng" in warning]  # ranks 0 and 1 have theirs
    return result.source_world_size, result.target_world_size, result.was_resharded, "rank(s) 2, 3," in rng


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.tensor(0.0)), nn.Linear(3, 2)


def test_a_scalar_parameter_goes_from_one_process_to_ddp_and_back(tmp_path):
    model = filled(Scaled(), "truth")
    optimizer = stepped(model)
    opened(tmp_path).save(model, optimizer, to("one"))
    run(2, pass_on_through_ddp, tmp_path)
    other = Scaled()
    other_optimizer = torch.optim.AdamW(other.parameters())
    opened(tmp_path).load(other, other_optimizer, at("two"))
    assert identical(state_of(other, other_optimizer), state_of(model, optimizer))


def pass_on_through_ddp(rank, world_size, tmp):
    model = DistributedDataParallel(Scaled())
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = opened(tmp)
    checkpoint.load(model, optimizer, at("one", load_rng_state=False))
    checkpoint.save(model, optimizer, to("two"))


def by_name(model, optimizer):
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def test_optimizer_state_follows_names_through_another_order_and_other_groups(tmp_path):
    model = filled(Net(), "truth")
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": 0.5}, {"params": others, "lr": 0.25, "weight_decay": 0.0}]
    )
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to())

    swapped = Net()
    others = [p for p in swapped.parameters() if p.ndim <= 1]
    weights = [p for p in swapped.parameters() if p.ndim > 1]
    swapped_optimizer = torch.optim.AdamW([{"params": others[::-1]}, {"params": weights[::-1]}])
    checkpoint.load(swapped, swapped_optimizer, at())
    assert identical(by_name(swapped, swapped_optimizer), by_name(model, optimizer))
    assert [(g["lr"], g["weight_decay"]) for g in swapped_optimizer.param_groups] == [
        (0.25, 0.0),
        (0.5, 0.01),
    ]

    single = Net()
    single_optimizer = torch.optim.AdamW(reversed(list(single.parameters())))
    checkpoint.load(single, single_optimizer, at(strict_mode=False))
    assert identical(by_name(single, single_optimizer), by_name(model, optimizer))


def test_options_of_groups_without_parameters_come_back_by_their_order_among_those(tmp_path):
    def start(*groups, **lr):
        models = {name: nn.Linear(2, 2) for name in ("a", "b")}
        groups = [{"params": [], "lr": lr} if lr else {"params": models["a"].parameters()} for lr in groups]
        b = [{"params": [], "lr": 0.3}, {"params": models["b"].parameters()}]
        return models, {"a": torch.optim.SGD(groups, lr=0.2), "b": torch.optim.SGD(b, lr=0.4)}

    def rates(optimizers):
        return [[g["lr"] for g in optimizers[name].param_groups] for name in ("a", "b")]

    checkpoint = opened(tmp_path)
    checkpoint.save(*start(0.05, None, 0.07), to())
    models, optimizers = start(None, 0.9, 0.8)
    optimizers["b"].param_groups[0]["lr"] = 0.7
    mixed = {"b": optimizers["b"], "a": optimizers["a"]}  # parts in another order
    assert not checkpoint.load(models, mixed, at()).warnings
    assert rates(optimizers) == [[0.2, 0.05, 0.07], [0.3, 0.4]]
    models, optimizers = start(0.9, None)  # one fewer: which one it is, nobody can tell
    (warning,) = checkpoint.load(models, optimizers, at()).warnings
    assert "optimizer 'a': 2 group(s)" in warning and rates(optimizers) == [[0.9, 0.2], [0.3, 0.4]]


class WithoutDefaults:
    """An optimizer as a wrapper may show it."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict


ADAMW, ADAM, RADAM, SGD = torch.optim.AdamW, torch.optim.Adam, torch.optim.RAdam, torch.optim.SGD


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize(
    "saved, here, differ",
    [(ADAMW, SGD, True), (SGD, ADAMW, True), (ADAM, ADAMW, False), (RADAM, ADAM, False)],
)
def test_another_kind_of_optimizer_is_refused_or_left_as_it_is(
    tmp_path, saved, here, differ, renamed, strict
):
    models = {"a": filled(nn.Linear(3, 2), "truth"), "b": filled(nn.Linear(2, 2), "truth")}
    optimizers = {"a": stepped(models["a"], saved, lr=0.5), "b": stepped(models["b"], ADAMW, lr=0.25)}
    torch.optim.lr_scheduler.StepLR(optimizers["a"], 5)  # adds an option of its own, initial_lr
    checkpoint = opened(tmp_path)
    checkpoint.save(models, optimizers, to())
    others = {"a": filled(nn.Linear(3, 2), "mine"), "b": filled(nn.Linear(2, 2), "mine")}
    mine = {"c" if renamed else "a": stepped(others["a"], here, lr=0.125)}
    mine["b"] = stepped(others["b"], ADAMW, lr=0.75)
    first, before = list(mine.values())[0], state_of(nn.ModuleDict(others))
    state = copy.deepcopy(first.state_dict())
    if differ and strict:
        message = refusal(lambda: checkpoint.load(others, mine, at()), ExceptionType.VALIDATION_FAILED)
        assert "betas" in message and "momentum" in message and "initial_lr" not in message
        assert identical(state_of(nn.ModuleDict(others)), before) and mine["b"].param_groups[0]["lr"] == 0.75
        assert identical(first.state_dict(), state)
        return
    (*warnings,) = checkpoint.load(others, mine, at(strict_mode=strict)).warnings
    assert [("betas" in w, "momentum" in w) for w in warnings] == [(True, True)] * differ
    expected = state if differ else optimizers["a"].state_dict()
    assert identical(first.state_dict()["state"], expected["state"])
    assert first.param_groups[0]["lr"] == (0.125 if differ else 0.5)
    assert mine["b"].param_groups[0]["lr"] == 0.25
    assert identical(state_of(nn.ModuleDict(others)), state_of(nn.ModuleDict(models)))
    for p in (p for model in others.values() for p in model.parameters()):
        p.grad = torch.ones_like(p)
    first.step()


@pytest.mark.parametrize("saver, loader", [(WithoutDefaults, lambda o: o), (lambda o: o, WithoutDefaults)])
def test_an_optimizer_that_does_not_tell_its_options_is_of_no_other_kind(tmp_path, saver, loader):
    (model, optimizer), (other, other_optimizer) = small(), small("other")
    checkpoint = opened(tmp_path)
    checkpoint.save(model, saver(optimizer), to())
    assert not checkpoint.load(other, loader(other_optimizer), at()).warnings
    assert identical(state_of(other, other_optimizer), state_of(model, optimizer))


@pytest.mark.parametrize("strict", [True, False])
def test_optimizer_state_of_another_shape_is_always_an_error_that_names_both(tmp_path, strict):
    model, other = filled(nn.Linear(3, 2), "truth"), filled(nn.Linear(3, 2), "mine")
    optimizer, mine = (stepped(m, SGD, lr=0.5, momentum=0.9) for m in (model, other))
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to())
    mine.state[other.weight]["momentum_buffer"] = torch.ones(6)
    before = state_of(other, mine)
    message = refusal(
        lambda: checkpoint.load(other, mine, at(strict_mode=strict)), ExceptionType.VALIDATION_FAILED
    )
    assert "optimizer/weight/momentum_buffer: shape [2, 3] in the checkpoint, [6] here" in message
    assert identical(state_of(other, mine), before)
    del mine.state[other.weight]["momentum_buffer"]  # nothing here to compare with: as it was stored
    checkpoint.load(other, mine, at(strict_mode=strict))
    assert identical(state_of(other, mine), state_of(model, optimizer))


OPTIMIZERS = {
    "adafactor": (torch.optim.Adafactor, {}), "momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "lbfgs": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}), "rmsprop": (torch.optim.RMSprop, {"centered": True}),
    "adamw_amsgrad": (torch.optim.AdamW, {"amsgrad": True}), "sgd_without_state": (torch.optim.SGD, {"lr": 0.1}),
}  # fmt: skip


def train_with(model, optimizer, steps):
    data = torch.arange(12.0).reshape(4, 3).sin()

    def closure():
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_continues_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, kind, world_size):
    for same_state, same_after in run(world_size, continue_with, tmp_path, kind):
        assert same_state and same_after


def continue_with(rank, world_size, tmp, kind):
    def start():
        model = filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), "start")
        model = DistributedDataParallel(model) if world_size > 1 else model
        optimizer, options = OPTIMIZERS[kind]
        return model, optimizer(model.parameters(), **options)

    model, optimizer = start()
    train_with(model, optimizer, 3)
    checkpoint = opened(tmp)
    checkpoint.save(model, optimizer, to())
    other, other_optimizer = start()
    checkpoint.load(other, other_optimizer, at())
    same_state = identical(state_of(other, other_optimizer), state_of(model, optimizer))
    train_with(model, optimizer, 2)
    train_with(other, other_optimizer, 2)
    return same_state, identical(state_of(other, other_optimizer), state_of(model, optimizer))


def test_momentum_of_sharded_parameters_reshards(tmp_path):
    run(3, save_momentum, tmp_path)
    model = filled(Net(), "truth")
    optimizer = stepped(model, torch.optim.SGD, lr=0.01, momentum=0.9)
    truth = state_of(model, optimizer)
    fresh = Net()
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5, momentum=0.1)
    opened(tmp_path).load(fresh, fresh_optimizer, at())
    assert identical(state_of(fresh)[0], truth[0])
    assert identical(by_name(fresh, fresh_optimizer), by_name(model, optimizer))
    assert fresh_optimizer.param_groups[0]["momentum"] == 0.9


def save_momentum(rank, world_size, tmp):
    model = laid_out(filled(Net(), "truth"), "fsdp3")
    opened(tmp).save(model, stepped(model, torch.optim.SGD, lr=0.01, momentum=0.9, foreach=False), to())


class Tenths(nn.Module):
    """Divides what versions before 2 have stored; its attributes have the names that wrappers use."""

    _version = 2

    def __init__(self, value=0.0, old_key=False):
        super().__init__()
        self.value, self.heard = nn.Parameter(torch.full((4, 3), value)), []
        self.module, self._orig_mod = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self._checkpoint_wrapped_module = nn.ModuleDict({"inner": nn.Linear(3, 3)})

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.heard.append(metadata.get("version"))
        if (self.heard[-1] or 1) < 2:
            state[prefix + "value"] = state[prefix + "value"] / 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def in_layers(*wrappers):
    """Each layer wrapped by all of these, the last one outermost."""

    def wrap(model):
        for index, layer in enumerate(model):
            for wrapper in wrappers:
                layer = wrapper(layer)
            model[index] = layer
        return model

    return wrap


def in_children(wrapper):
    def wrap(model):
        layer = model[0]
        layer.module, layer._orig_mod = wrapper(layer.module), wrapper(layer._orig_mod)
        layer._checkpoint_wrapped_module["inner"] = wrapper(layer._checkpoint_wrapped_module["inner"])
        return model

    return wrap


WRAPPINGS = {
    "ddp": [DistributedDataParallel], "data parallel": [nn.DataParallel], "compile": [torch.compile],
    "checkpoint": [checkpoint_wrapper], "layers in ddp": [in_layers(DistributedDataParallel)],
    "layers in checkpoint of compile in compile": [in_layers(torch.compile, checkpoint_wrapper), torch.compile],
    "layers in compile of checkpoint in ddp": [in_layers(checkpoint_wrapper, torch.compile), DistributedDataParallel],
    "layers in two checkpoints": [in_layers(checkpoint_wrapper, offload_wrapper)],
    "children in compile, layers in checkpoint": [in_children(torch.compile), in_layers(checkpoint_wrapper)],
    "children in checkpoint, layers in data parallel": [in_children(checkpoint_wrapper), in_layers(nn.DataParallel)],
    "layers in compile of checkpoint, in fsdp2": [in_layers(checkpoint_wrapper, torch.compile), fully_shard],
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_and_module_versions_do_not_depend_on_wrappers_at_any_depth(tmp_path, wrapping):
    names, heard, equal = run(1, load_through_wrappers, tmp_path, wrapping)[0]
    assert names[0] == names[1] and names[0] > {"model/0.module.weight", "model/0._orig_mod.bias"}
    assert "model/0._checkpoint_wrapped_module.inner.bias" in names[0]
    assert heard == [[2], [2]] and equal == [True, True]


def load_through_wrappers(rank, world_size, tmp, wrapping):
    def start(salt, wrap):
        model = inner = filled(nn.Sequential(Tenths(), nn.Linear(3, 2)), salt)
        tenths = inner[0]
        for wrapper in WRAPPINGS[wrapping] if wrap else ():
            model = wrapper(model)
        return model, stepped(model, lr=0.1 + wrap), tenths

    def values(model, optimizer):
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [tensor for state in optimizer.state_dict()["state"].values() for tensor in state.values()]
        return [whole(tensor) for tensor in tensors]

    names, heard, equal, checkpoint = [], [], [], opened(tmp)
    for prefix, wrap in (("wrapped", True), ("plain", False)):
        model, optimizer, _ = start("truth", wrap)
        checkpoint.save(model, optimizer, to(prefix))
        other, other_optimizer, tenths = start("other", not wrap)
        found = checkpoint.load(other, other_optimizer, at(prefix))
        names.append({t.name for t in found.metadata.tensors})
        heard.append(tenths.heard)
        equal.append(values(other, other_optimizer) == values(model, optimizer))
    return names, heard, equal


def test_two_entries_that_have_one_name_without_wrappers_are_an_error(tmp_path):
    model, checkpoint = nn.Sequential(nn.DataParallel(nn.Linear(3, 2))), opened(tmp_path)
    model[0].weight = nn.Parameter(torch.zeros(3))
    checkpoint.save(Bag(**{"0.weight": torch.zeros(3), "0.bias": torch.zeros(2)}), None, to())
    for call in (lambda: checkpoint.save(model, None, to("q")), lambda: checkpoint.load(model, None, at())):
        assert "'0.weight'" in refusal(call)
    checkpoint.save(bag := Bag(**{"module.a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}), None, to("bag"))
    result = checkpoint.load(bag, None, at("bag"))
    assert list(result.model_state) == ["module.a", "_orig_mod.a"], "what is no module keeps its keys"


class Renaming(nn.Module):
    """Takes what versions before 2 call `old`."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.new = nn.Parameter(torch.zeros(1))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "new"] = state.pop(prefix + "old")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_module_is_handed_the_version_that_was_saved_else_its_own(tmp_path):
    checkpoint, saved = opened(tmp_path), {"now": Tenths(5.0), "before": Tenths(5.0), "renamed": Renaming()}
    saved["before"]._version = 1
    checkpoint.save(saved, None, to("mapping"))
    checkpoint.save(nn.ModuleDict(saved), None, to("one"))
    checkpoint.save(Bag(**nn.ModuleDict(saved).state_dict()), None, to("imported"))
    for prefix, before in (("mapping", 0.5), ("one", 0.5), ("imported", 5.0)):
        live = {"now": Tenths(), "before": Tenths(), "renamed": Renaming()}
        checkpoint.load(nn.ModuleDict(live) if prefix == "mapping" else live, None, at(prefix))
        assert [live[name].value.unique().item() for name in ("now", "before")] == [5.0, before]


class Handed(nn.ModuleDict):
    def load_state_dict(self, state, strict=True):
        self.metadata = dict(state._metadata)
        return super().load_state_dict(state, strict)


def test_load_state_dict_is_handed_the_metadata_that_torch_load_would_hand_it(tmp_path):
    saved, checkpoint = Handed({"a": Tenths(), "gone": nn.Linear(1, 1)}), opened(tmp_path)
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


def test_a_module_in_extra_state_gets_its_versions_too(tmp_path):
    checkpoint, average, other = opened(tmp_path), nn.Sequential(Tenths(5.0)), nn.Sequential(Tenths())
    state = {"ema": average, "nested": [average.state_dict()]}
    checkpoint.save(nn.Module(), None, to(), extra_state=state)
    result = checkpoint.load(nn.Module(), None, at(), extra_state={"ema": other})
    assert other[0].value.unique().item() == 5.0
    assert result.extra_state["nested"][0]._metadata == average.state_dict()._metadata


def test_versions_of_modules_that_pipeline_ranks_hold_apart_come_together(tmp_path):
    versions = [[("0", 1)], [("1", 2)], []]
    assert run(2, save_versions, tmp_path) == versions[:2]
    assert run(1, load_versions, tmp_path, [["0", "1"]]) == [{"0": 0.5, "1": 5.0}]
    assert run(3, load_versions, tmp_path, [["1"], ["0", "1"], ["0"]]) == [
        {"1": 5.0},
        {"0": 0.5, "1": 5.0},
        {"0": 0.5},
    ]


def save_versions(rank, world_size, tmp):
    stage = nn.ModuleDict({str(rank): Tenths(5.0)})
    stage[str(rank)]._version = 1 + rank
    opened(tmp).save(stage, None, to())
    return [(name, module._version) for name, module in stage.items()]


def load_versions(rank, world_size, tmp, held):
    stage = nn.ModuleDict({name: Tenths() for name in held[rank]})
    opened(tmp).load(stage, None, at(load_rng_state=False))
    return {name: module.value.unique().item() for name, module in stage.items()}


def test_only_the_models_bytes_are_read_for_only_the_model(tmp_path):
    model = filled(nn.Linear(1024, 3072), "truth")  # 12 MiB; its optimizer twice that
    opened(tmp_path).save(model, stepped(model), to())
    files = Seam()
    other = nn.Linear(1024, 3072)
    ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files)).load(other, None, at(load_rng_state=False))
    read = sum(op.size for op in files.log if op.call == "pread")
    assert 12 * MiB <= read < 12 * MiB + 3 * UNIT, (
        "the header, and the units with the bias and the modules' versions"
    )
    shard = Shard(shards(tmp_path)[0])
    last = max(
        shard.place(name) for name in shard.header if name.startswith("optimizer/") and "exp_avg" in name
    )
    flip(shard.path, last[1] - 1)
    other = nn.Linear(1024, 3072)
    checkpoint = opened(tmp_path)
    checkpoint.load(other, None, at(load_rng_state=False))
    assert identical(state_of(other)[0], state_of(model)[0])
    full = stepped(other)
    refusal(lambda: checkpoint.load(other, full, at()), ExceptionType.CORRUPTED_CHECKPOINT)


def is_cold(tmp):
    """Drop every file below `tmp` from the page cache; whether that is so now (a file system in memory keeps them)."""
    for path in filter(Path.is_file, tmp.rglob("*")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:  # a read would have the kernel read ahead
            there = (ctypes.c_ubyte * -(-len(view) // PAGE))()
            address = np.frombuffer(view, np.uint8).ctypes.data
            libc = ctypes.CDLL(None)
            assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), there) == 0
        os.close(fd)
        if any(page & 1 for page in there):
            return False
    return True


def reads_past_the_cache(rank, world_size, tmp, layout):
    """Whether this rank's load of a cold checkpoint of 24 MiB reads past the page cache; None where nothing gets cold."""
    model = nn.Linear(2048, 3072, bias=False)
    if layout != "plain":
        fully_shard(model)
    opened(tmp).save(model, None, to())
    if layout == "rows to columns":
        mesh = init_device_mesh("cpu", (world_size,))
        model = Bag(weight=distribute_tensor(torch.zeros(3072, 2048), mesh, [ShardDim(1)]))
    cold = [is_cold(tmp)] if rank == 0 else [None]
    dist.broadcast_object_list(cold)
    if not cold[0]:
        return None
    files = Seam()
    ckpt.DistributedCheckpoint(storage=Storage(tmp, files)).load(model, None, at())
    return any(op.call == "open_direct" for op in files.log)


@pytest.mark.parametrize(
    "world_size, layout, past",
    [(1, "plain", True), (2, "sharded", True), (2, "plain", False), (2, "rows to columns", False)],
)
def test_a_cold_file_is_read_past_the_page_cache_where_no_other_rank_wants_the_same_bytes(
    tmp_path, world_size, layout, past
):
    found = run(world_size, reads_past_the_cache, tmp_path, layout)
    if None in found:
        pytest.skip("the files stay in memory here")
    assert found == [past] * world_size


def test_what_the_page_cache_has_is_read_from_it(tmp_path):
    model = filled(nn.Linear(1024, 3072), "truth")
    opened(tmp_path).save(model, None, to())
    assert all(path.read_bytes() for path in shards(tmp_path))
    files = Seam()
    ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files)).load(model, None, at())
    assert not any(op.call == "open_direct" for op in files.log)


@pytest.mark.parametrize("rows, alone", [((0, 512), True), ((100, 400), True), ((0, 512, 2), False)])
@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
def test_only_what_is_to_three_quarters_one_ranks_alone_counts_as_such(tmp_path, rows, alone, level):
    weight = torch.randn(512, 1 << 14)  # 32 MiB: 64 rows a block, 4 rows a unit
    opened(tmp_path).save(Bag(weight=weight), None, to(compression_level=level))
    storage = ckpt.LocalStorage(tmp_path)
    with ckpt.CheckpointReader(storage, st.read_committed(storage, "p")) as reader:
        (index,) = reader.stored["model/weight"].values()
        low, high, *halves = rows
        box = st.Box((low, 0), (high - low, (1 << 14) // (halves or [1])[0]))
        view = torch.empty(box.size)
        reads = reader.plan([coord.Target(index, box, view, alone=True)])
        own = sum(fill.alone * (fill.high - fill.low) for read in reads for fill in read.fills)
        assert level is not CompressionLevel.NONE or own == pytest.approx(view.nbytes, rel=1e-4)
        assert {read.alone() for read in reads[1:-1]} == {alone}
        assert not any(read.alone() for read in reader.plan([coord.Target(index, box, view)]))
        for read in reads:
            assert read.low % UNIT == 0 and read.nbytes <= 2 * BLOCK
            reader.run(read, aligned(2 * BLOCK), st.Gate(), coord.Meter())
    assert torch.equal(view, weight[low:high, : box.size[1]])


@pytest.mark.parametrize("low, high", [(0, 64), (128, 1024), (0, 65), (100, 101), (127, 129), (60, 1000)])
@pytest.mark.parametrize("columns", [1024, 512])
def test_a_partial_read_verifies_its_own_units_and_copies_nothing_of_a_damaged_one(
    tmp_path, low, high, columns
):
    weight = torch.arange(1024 * 1024.0).view(1024, 1024)  # 64 rows a unit
    opened(tmp_path).save(Bag(weight=weight), None, to(include_rng_state=False))
    (path,), storage = shards(tmp_path), ckpt.LocalStorage(tmp_path)
    flip(path, Shard(path).place("model/weight")[0] + 100 * 4096)  # in the second unit
    with ckpt.CheckpointReader(storage, st.read_committed(storage, "p")) as reader:
        (index,) = reader.stored["model/weight"].values()
        view = torch.full((high - low, columns), -1.0)
        kind, _, message = told(
            lambda: reader.fill([coord.Target(index, st.Box((low, 0), tuple(view.shape)), view)])
        )
    if high <= 64 or low >= 128:
        assert kind == "returned" and torch.equal(view, weight[low:high, :columns])
        return
    assert kind == "CORRUPTED_CHECKPOINT" and "unit 1 has CRC32" in message and "model/weight" in message
    assert (view[max(0, 64 - low) : 128 - low] == -1.0).all(), "not one element of that unit"


@pytest.mark.parametrize("refused", ["is_cold", "open_direct", "pread", "pwrite"])
def test_where_the_page_cache_cannot_be_passed_by_saves_and_loads_go_through_it(tmp_path, refused):
    class Refusing(Seam):
        def refuse(self, call, fd=None):
            if call == refused and (fd is None or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT):
                self.refused += 1
                raise OSError(errno.EINVAL, "not on this file system")

        def open(self, path, flags, mode=0o777):
            self.refuse("open_direct") if flags & os.O_DIRECT else None
            return super().open(path, flags, mode)

        def preadv(self, fd, buffers, offset, flags=0):
            self.refuse("is_cold" if flags else "pread", None if flags else fd)
            if flags:
                raise OSError(errno.EAGAIN, "not in the page cache")
            return super().preadv(fd, buffers, offset)

        def pwrite(self, fd, data, offset):
            self.refuse("pwrite", fd)
            return super().pwrite(fd, data, offset)

    model, other = filled(nn.Linear(1024, 3072), "truth"), filled(nn.Linear(1024, 3072), "other")
    files = Refusing()
    files.refused = 0
    checkpoint = ckpt.DistributedCheckpoint(storage=Storage(tmp_path, files))
    checkpoint.save(model, None, to())
    checkpoint.load(other, None, at())
    assert identical(state_of(other)[0], state_of(model)[0])
    passed = any(op.call == "open_direct" for op in files.log)  # not in memory, such as tmpfs
    assert files.refused or (refused in ("pread", "pwrite") and not passed)


@pytest.mark.parametrize("left", [MiB, 64 * MiB])
def test_a_file_cut_short_while_it_is_open_is_damage_wherever_it_is_read(tmp_path, left):
    with open(tmp_path / "file", "wb") as sparse:
        sparse.truncate(130 * MiB)
    with contextlib.closing(ckpt.LocalStorage(tmp_path).open("file")) as file:
        os.truncate(tmp_path / "file", left)
        for offset, read in itertools.product((64 * MiB, 128 * MiB), (file.read, file.read_directly)):
            with pytest.raises(ckpt.CheckpointException, match="bytes missing"):
                read(offset, aligned(MiB).data)


def test_a_load_leaves_half_of_the_file_descriptors_to_files_that_are_not_open_yet(tmp_path):
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = Seam()
    with contextlib.closing(Storage(tmp_path, files).create("file")) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * free, limits[1]))
        try:
            file.write(0, aligned(2 * MiB).data)
            with open(tmp_path / "file", "rb") as other:
                assert other.fileno() == free + 1, "nothing else is open"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (tmp_path / "file").stat().st_size == 2 * MiB


@pytest.mark.parametrize("length", [MiB, 3 * MiB + 5, 4 * MiB])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("cap", [1 << 40, 3 * PAGE, 5000])
def test_a_read_gives_the_same_bytes_past_the_cache_or_not_however_short_its_parts(
    tmp_path, length, past, start, cap
):
    class Cold(Seam):
        def preadv(self, fd, buffers, offset, flags=0):
            if flags:
                raise OSError(errno.EAGAIN, "not in the page cache")
            return super().preadv(fd, buffers, offset)

    data = np.random.default_rng(1).integers(0, 256, PAGE + 4 * MiB, np.uint8)
    (tmp_path / "file").write_bytes(data)
    into = aligned(length + 1)[start:][:length]
    with contextlib.closing(Storage(tmp_path, Cold(cap=cap)).open("file")) as file:
        read = file.read_directly if past else file.read
        read(PAGE, into.data)
        assert np.array_equal(into, data[PAGE : PAGE + length])
        with pytest.raises(ckpt.CheckpointException, match="bytes missing"):
            read(2 * PAGE, aligned(4 * MiB).data)


def test_a_fork_finds_zeros_in_the_memory_for_io_not_its_parents_bytes():
    memory = st.aligned_buffer(3 * MiB)
    memory[:] = 7
    assert memory.ctypes.data % PAGE == 0 and forked(lambda: memory.any() and 1 / 0) == 0
    assert (memory == 7).all()


class Stage(nn.Module):
    """Layers `first`..`last` of a pipeline, under the names that they have in the whole model."""

    def __init__(self, first, last):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(3 + i, 4 + i) for i in range(first, last + 1)})


def test_pipeline_ranks_with_the_same_optimizer_indices_join_and_part_again(tmp_path):
    run(2, save_stage, tmp_path)
    model, truth = Stage(0, 3), filled(Stage(0, 3), "truth")
    optimizer, truth_optimizer = torch.optim.AdamW(model.parameters()), stepped(truth, lr=0.125)
    checkpoint = opened(tmp_path)
    checkpoint.load(model, optimizer, at("stages"))
    assert identical(state_of(model)[0], state_of(truth)[0])
    assert identical(by_name(model, optimizer), by_name(truth, truth_optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.125
    checkpoint.save(model, optimizer, to("whole"))
    assert run(2, load_stage, tmp_path, "whole") == [True, True]
    assert run(2, load_stage, tmp_path, "stages") == [True, True]


def stage_of(rank):
    model = filled(Stage(2 * rank, 2 * rank + 1), "truth")
    return model, stepped(model, lr=0.125)


def save_stage(rank, world_size, tmp):
    opened(tmp).save(*stage_of(rank), to("stages"))


def load_stage(rank, world_size, tmp, prefix):
    model = Stage(2 * rank, 2 * rank + 1)
    optimizer = torch.optim.AdamW(model.parameters())
    opened(tmp).load(model, optimizer, at(prefix))
    truth, truth_optimizer = stage_of(rank)
    same = identical(by_name(model, optimizer), by_name(truth, truth_optimizer))
    return same and identical(state_of(model)[0], state_of(truth)[0])


@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
@pytest.mark.parametrize("form", FORMATS)
def test_plain_tensors_that_differ_between_ranks_are_kept_per_rank_and_named_once(tmp_path, form, level):
    logs, values, trusted = zip(*run(3, save_different, tmp_path, form, level))
    assert list(values) == [[0.0, 7.0, 0.5], [1.0, 7.0, 1.5], [2.0, 7.0, 0.5]]
    assert (
        logs[0].count("model/layer.place") == logs[0].count("model/layer.odd") == 1
        and "layer.same" not in logs[0]
    )
    assert len(set(trusted)) == 1  # told to trust, the save kept one rank's copy


def save_different(rank, world_size, tmp, form, level):
    log = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(log))
    values = (float(rank), 7.0, rank % 2 + 0.5)

    def bag(place, same, odd):
        tensors = {"layer.place": torch.full((400_000,), place), "layer.same": torch.full((400_000,), same)}
        return Bag(**tensors, **{"layer.odd": torch.tensor(odd)})

    checkpoint = opened(tmp)
    for attempt in ("first", "again"):
        checkpoint.save(bag(*values), None, to(attempt, format=form, compression_level=level))
    both, first = bag(-1.0, -1.0, -1.0), bag(-2.0, -2.0, -2.0)
    result, target = checkpoint.load(both, None, at("again")), both
    checkpoint.load(first, None, at("first"))
    assert identical(first.state, both.state)
    left = [name for name in listing(tmp) if name.startswith(("first", "again"))]
    assert len(left) == 2 * (1 + {"multi_shard": 3, "single_file": 1, "consolidated": 4}[form.value]), left
    text = log.getvalue() + " ".join(result.warnings)
    checkpoint.save(bag(*values), None, to("trusted", format=form, replicas="trust"))
    blind = bag(-1.0, -1.0, -1.0)
    checkpoint.load(blind, None, at("trusted"))
    names = ("layer.place", "layer.same", "layer.odd")
    return (
        text,
        [target.state[name].flatten()[0].item() for name in names],
        blind.state["layer.place"][0].item(),
    )


def test_batch_norm_statistics_of_every_ddp_rank_survive(tmp_path):
    assert run(2, save_batch_norm, tmp_path) == [(True, True)] * 2


def save_batch_norm(rank, world_size, tmp):
    def start():
        return DistributedDataParallel(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), broadcast_buffers=False
        )

    model, other = start(), start()
    model(torch.rand(8, 3, generator=torch.Generator().manual_seed(rank))).sum().backward()
    checkpoint = opened(tmp)
    checkpoint.save(model, None, to())
    checkpoint.load(other, None, at())
    means = [torch.zeros(4) for _ in range(world_size)]
    dist.all_gather(means, model.module[1].running_mean)
    return identical(state_of(other)[0], state_of(model)[0]), not torch.equal(*means)


def test_copies_that_a_placement_declares_equal_but_are_not_are_named_and_the_lowest_ranks_is_kept(tmp_path):
    (values, log), (others, _) = run(2, save_false_replicas, tmp_path)
    assert values == others == [0.0] and "declared" in log and re.search(r"\brank\D*[01]\b", log)


def save_false_replicas(rank, world_size, tmp):
    log = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(log))
    mesh = init_device_mesh("cpu", (2,))
    checkpoint = opened(tmp)
    checkpoint.save(
        Bag(declared=DTensor.from_local(torch.full((400_000,), float(rank)), mesh, [Replicate()])), None, to()
    )
    target = Bag(declared=DTensor.from_local(torch.full((400_000,), 9.0), mesh, [Replicate()]))
    result = checkpoint.load(target, None, at())
    return target.state["declared"].to_local().unique().tolist(), log.getvalue() + " ".join(result.warnings)


# A name on several meshes: per case what rank r holds of it, as (ranks of its mesh, placement, value); None: a plain tensor.
MESHES = {
    "sharded, equal": lambda r: (PAIRS[r // 2], ShardDim(0), 1.0),
    "sharded, different": lambda r: (PAIRS[r // 2], ShardDim(0), float(r // 2)),
    "replicated, equal": lambda r: (PAIRS[r // 2], Replicate(), 1.0),
    "replicated, different": lambda r: (PAIRS[r // 2], Replicate(), float(r // 2)),
    "cut differently, equal": lambda r: (PAIRS[r // 2], (ShardDim(0), Replicate())[r // 2], 1.0),
    "other order of ranks": lambda r: ((0, 1, 2, 3) if r < 2 else (3, 2, 1, 0), Replicate(), 1.0),
    "overlapping": lambda r: ((0, 1, 2) if r < 2 else (2, 3), Replicate(), 1.0),
    "plain beside": lambda r: ((0, 1), Replicate(), 1.0) if r < 2 else (None, None, 1.0),
}
PAIRS = ((0, 1), (2, 3))


def save_on_meshes(rank, world_size, tmp, form):
    """Per case: the outcome, the number of stored copies, what came back, and the warnings of rank 0."""
    meshes = {
        ranks: DeviceMesh("cpu", torch.tensor(ranks))
        for ranks in (*PAIRS, (0, 1, 2), (2, 3), (0, 1, 2, 3), (3, 2, 1, 0))
    }
    answer, log = {}, io.StringIO()
    logging.getLogger("ckpt").addHandler(logging.StreamHandler(log))
    for number, (case, layout) in enumerate(MESHES.items()):
        (ranks, placement, value), checkpoint = layout(rank), opened(tmp)

        def laid(value, ranks=ranks, placement=placement):
            whole = torch.full((6, 3), value) + torch.arange(6).view(6, 1)
            return (
                whole
                if ranks is None
                else distribute_tensor(whole, meshes[ranks], [placement], src_data_rank=None)
            )

        log.truncate(log.seek(0))
        outcome = told(lambda: checkpoint.save(Bag(w=laid(value)), None, to(f"p{number}", format=form)))
        if outcome[0] != "returned":
            answer[case] = outcome[0], outcome[2]
            continue
        model = Bag(w=laid(-1.0))
        warned, result = log.getvalue(), checkpoint.load(model, None, at(f"p{number}"))
        kept = [t.rank for t in result.metadata.tensors if t.name == "model/w"]
        local, truth = (getattr(x, "to_local", lambda x=x: x)() for x in (model.state["w"], laid(value)))
        answer[case] = kept, torch.equal(local, truth), "model/w" in warned, result.warnings
    return answer


@pytest.mark.parametrize("form", FORMATS)
def test_a_name_on_disjoint_meshes_is_one_tensor_if_equal_else_each_mesh_gets_its_own_back(tmp_path, form):
    answers = run(4, save_on_meshes, tmp_path, form)
    for rank, answer in enumerate(answers):
        for case in ("sharded, equal", "replicated, equal", "other order of ranks"):
            assert answer[case] == ([None], True, False, []), (case, answer)
        for case in ("sharded, different", "replicated, different", "cut differently, equal"):
            assert answer[case] == ([0, 2], True, rank == 0, []), (case, answer)
        for case, what in {
            "overlapping": r"\[0, 1, 2\].*\[2, 3\]",
            "plain beside": r"plain.* 2, 3 .*DTensor",
        }.items():
            kind, message = answer[case]
            assert kind == "VALIDATION_FAILED" and "model/w" in message and re.search(what, message), message
            assert answer[case] == answers[0][case], "one error on all ranks"


def train_one_dimension(rank, world_size, tmp):
    """FSDP2 on one dimension of a mesh whose other one these parameters do not use; the copies drift apart there."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "other"))
    log = io.StringIO()
    logging.getLogger("ckpt").addHandler(logging.StreamHandler(log))

    def start(salt):
        model = filled(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), salt)
        fully_shard(model, mesh=mesh["dp"])
        return model, stepped(model)

    checkpoint, answers = opened(tmp), []
    model, optimizer = start("truth")
    for drift in (0.0, 1e-7 * mesh.get_coordinate()[1]):
        with torch.no_grad():
            model[1].weight.to_local().add_(drift)
        log.truncate(log.seek(0))
        checkpoint.save(model, optimizer, to())
        warned = log.getvalue()
        other, other_optimizer = start("other")
        result = checkpoint.load(other, other_optimizer, at())
        kept = {t.name for t in result.metadata.tensors if t.rank is not None and t.name != "rng/state"}
        same = identical(state_of(other, other_optimizer), state_of(model, optimizer))
        answers.append((sorted(kept), "model/1.weight" in warned, same))
    return answers


def test_copies_that_drift_apart_outside_of_their_mesh_are_kept_per_mesh_and_training_goes_on(tmp_path):
    for rank, (equal, drifted) in enumerate(run(4, train_one_dimension, tmp_path)):
        assert equal == ([], False, True)
        assert drifted == (["model/1.weight"], rank == 0, True)
    assert len(shards(tmp_path)) == 4, "one file a rank: nothing was written twice"


class Counted(torch.optim.SGD):
    """An optimizer whose step is a number in its state."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1


def save_at_different_steps(rank, world_size, tmp):
    """Outcomes of saves of which rank 1 has made one step less, or not, by optimizer; then after they are level again."""
    mesh, answers = init_device_mesh("cpu", (2,)), {}
    makers = {
        "AdamW": torch.optim.AdamW,
        "Counted": Counted,
        "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    }
    for layout, (name, maker) in itertools.product(("plain", "fsdp2"), makers.items()):
        model = filled(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), "truth")
        if layout == "fsdp2":
            fully_shard(model, mesh=mesh)
        optimizer, checkpoint = maker(model.parameters(), lr=0.0), opened(tmp)

        def step(times, model=model, optimizer=optimizer):
            for _ in range(times):
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()

        step(2 - rank)
        for options in ({}, {"replicas": "trust"}):
            outcome = told(lambda: checkpoint.save(model, optimizer, to(**options)))
            answers[(layout, name, *options)] = (outcome[0], "different optimizer steps" in str(outcome[2]))
        step(rank)
        answers[layout, name, "level"] = told(lambda: checkpoint.save(model, optimizer, to()))[0]
    return answers


def test_ranks_at_different_optimizer_steps_cannot_save(tmp_path):
    for answers in run(2, save_at_different_steps, tmp_path):
        for (_, name, *options), outcome in answers.items():
            if options == ["level"]:
                assert outcome == "returned"
            else:  # SGD has no step: nothing tells
                assert outcome == (("returned", False) if name == "SGD" else ("SAVE_FAILED", True)), (
                    name,
                    outcome,
                )


class Experts(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.expert, self.shared = nn.Parameter(torch.full((4,), float(rank))), nn.Parameter(torch.ones(3))


def save_experts(rank, world_size, tmp):
    model = Experts(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter, steps in ((model.expert, rank + 1), (model.shared, 2)):
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            parameter.grad = None
    checkpoint, other = opened(tmp), Experts(7)
    checkpoint.save(model, optimizer, to())
    others = torch.optim.AdamW(other.parameters())
    checkpoint.load(other, others, at())
    return identical(state_of(other, others), state_of(model, optimizer))


def test_experts_that_each_rank_has_for_itself_may_be_at_steps_of_their_own(tmp_path):
    assert run(2, save_experts, tmp_path) == [True, True]


def test_what_is_no_tensor_is_stored_per_rank_where_it_differs(tmp_path):
    assert run(2, save_data_place, tmp_path, True) == [({"at": 0}, 5, False), ({"at": 1}, 5, False)]
    (alone,) = run(1, save_data_place, tmp_path, False)
    assert alone[:2] == ({"at": 0}, 5)
    *known, newcomer = run(3, save_data_place, tmp_path, False)
    assert [k[0] for k in known] == [{"at": 0}, {"at": 1}] and newcomer == ({"at": -1}, 5, True)


def save_data_place(rank, world_size, tmp, save):
    checkpoint = opened(tmp)
    model = Bag(w=torch.zeros(2))
    if save:
        checkpoint.save(model, None, to(), extra_state={"loader": Bag(at=rank), "epoch": 5})
    loader = Bag(at=-1)
    options = at(load_rng_state=False)
    result = checkpoint.load(model, None, options, extra_state={"loader": loader})
    return loader.state, result.extra_state["epoch"], any("loader" in warning for warning in result.warnings)


class PerRank:
    """A training job in which every part of the state contains the number of its rank."""

    def __init__(self, rank):
        net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        net = DistributedDataParallel(net, broadcast_buffers=False)
        self.norm, expert = net.module[1], nn.Linear(2, 2, bias=False)
        self.model = {"net": net, "expert": expert, "config": Bag(value=50.0 + rank)}
        sgd = stepped(expert, torch.optim.SGD, lr=10.0 + rank, momentum=0.5)
        self.optimizer = {"sgd": sgd, "other": Bag(value=55.0 + rank)}
        self.momentum = sgd.state[expert.weight]["momentum_buffer"]
        for number, tensor in enumerate((self.norm.running_mean, expert.weight.data, self.momentum)):
            tensor.fill_(20.0 + 10 * number + rank)
        # A value; a value with a tensor in it; a value that all ranks have alike, with a tensor that differs.
        seen, state = torch.full((2, 1), 60.0 + rank), torch.full((3,), 70 + rank, dtype=torch.bfloat16)
        self.extra = {"place": rank, "loader": Bag(at=[rank, 5], seen=seen), "sampler": Bag(state=state)}
        torch.manual_seed(80 + rank)

    def numbers(self):
        tensors = (self.norm.running_mean, self.model["expert"].weight, self.momentum)
        values = (part.state["value"] for part in (self.model["config"], self.optimizer["other"]))
        return [self.optimizer["sgd"].param_groups[0]["lr"], *(t.unique().item() for t in tensors), *values]

    def values(self):
        return {key: value.state if isinstance(value, Bag) else value for key, value in self.extra.items()}


def save_per_rank(rank, world_size, tmp, form):
    log = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(log))
    job, checkpoint = PerRank(rank), opened(tmp)
    for _ in range(2):
        extra = {**job.extra, "epoch": 7}
        checkpoint.save(job.model, job.optimizer, to(format=form), extra_state=extra)
    return log.getvalue()


def load_per_rank(rank, world_size, tmp, strategy):
    job, own, checkpoint = PerRank(-1 - rank), PerRank(rank), opened(tmp)
    kept, drawn = job.values(), {who: torch.manual_seed(who).get_state() for who in (80 + rank, 79 - rank)}
    torch.manual_seed(79 - rank)
    options = at(resharding_strategy=strategy)
    result = checkpoint.load(job.model, job.optimizer, options, extra_state=job.extra)
    generator = 80 + rank if rank < result.source_world_size else 79 - rank
    assert identical(torch.get_rng_state(), drawn[generator])
    assert result.extra_state.pop("epoch") == 7
    if rank < result.source_world_size:
        assert identical(result.extra_state, own.values())
        assert identical(job.values() | {"place": rank}, own.values())
    else:
        assert result.extra_state == {} and identical(job.values(), kept)
    everything = {} if world_size == result.source_world_size else {key: {} for key in kept}
    for saved in range(result.source_world_size):
        for key, value in PerRank(saved).values().items():
            everything.get(key, {})[saved] = value
    assert identical({key: result.extra_state_per_rank[key] for key in everything}, everything)
    assert result.extra_state_per_rank.keys() == everything.keys()
    return job.numbers(), result.warnings


PER_RANK = ["model/net.1.running_mean", "model/expert.weight", "model-values/config.value"]
PER_RANK += ["optimizer/expert.weight/momentum_buffer"]
EXTRA_PER_RANK = ["extra/place", "extra/loader", "extra/sampler"]


@pytest.mark.parametrize(
    "saved, here, form, strategy",
    [(2, 3, "multi_shard", "parallel"), (3, 2, "single_file", "broadcast"),
     (2, 1, "consolidated", "parallel"), (2, 2, "multi_shard", "sequential")],
)  # fmt: skip
def test_what_is_kept_per_rank_goes_to_its_rank_or_from_the_lowest_one_and_what_does_not_is_named(
    tmp_path, saved, here, form, strategy
):
    log, *_ = run(saved, save_per_rank, tmp_path, CheckpointFormat(form))
    for name in (*PER_RANK, "extra/place", "extra/loader", "extra/loader.seen", "extra/sampler.state"):
        assert len(re.findall(re.escape(name) + r"(?![\w.])", log)) == 1, (name, log)
    assert "rng" not in log and "optimizer/state" not in log and "epoch" not in log
    for rank, (numbers, told) in enumerate(run(here, load_per_rank, tmp_path, strategy)):
        own, text = rank if rank < saved else 0, "\n".join(told)
        assert numbers == [number + own for number in (10.0, 20.0, 30.0, 40.0, 50.0, 55.0)]
        for name in [*PER_RANK, "optimizer/other", "optimizer/expert.weight,"]:
            assert bool(re.search(f"rank 0's copy.*{re.escape(name)}", text)) == (rank >= saved), text
        for name in [*EXTRA_PER_RANK, "rng/state"]:
            assert (f"{name}: kept for" in text) == (rank >= saved), text
        for name in [*PER_RANK, *EXTRA_PER_RANK, "rng/state"]:
            lost = f"{here}, and taken by no rank here.*{re.escape(name)}"
            assert bool(re.search(lost, text)) == (here < saved), text
        assert bool(told) == (rank >= saved or here < saved), text


def test_mappings_of_models_and_optimizers_are_saved_under_their_names(tmp_path):
    def start(salt):
        models = {"actor": filled(nn.Linear(3, 2), salt), "critic": filled(nn.Linear(3, 1), salt)}
        optimizers = {name: stepped(model, lr=0.1 + len(name)) for name, model in models.items()}
        return models, optimizers

    models, optimizers = start("truth")
    others, other_optimizers = start("other")
    checkpoint = opened(tmp_path)
    checkpoint.save(models, optimizers, to())
    checkpoint.load(others, other_optimizers, at())
    for name in models:
        assert identical(
            state_of(others[name], other_optimizers[name]), state_of(models[name], optimizers[name])
        )


def named_tensors(scale, *, place=lambda tensor: tensor, swap=False):
    """Tensors under the names of `nn.Linear(6, 4)`, with an optimizer for each, in one order or the other."""
    tensors = {"weight": scale * torch.arange(24.0).reshape(4, 6), "bias": torch.full((4,), scale)}
    tensors = {name: place(tensor).requires_grad_() for name, tensor in tensors.items()}
    optimizers = [torch.optim.AdamW([tensor], lr=tensor.ndim / 10) for tensor in tensors.values()]
    for tensor, optimizer in zip(tensors.values(), optimizers):
        tensor.grad = torch.full_like(tensor, scale * tensor.ndim)
        optimizer.step()
    return tensors, optimizers[::-1] if swap else optimizers


def save_named_tensors(rank, world_size, tmp):
    mesh = init_device_mesh("cpu", (world_size,))
    opened(tmp).save(*named_tensors(2.0, place=lambda t: distribute_tensor(t, mesh, [ShardDim(0)])), to())


def test_a_mapping_of_names_to_tensors_is_filled_in_place_and_its_optimizers_go_by_these_names(tmp_path):
    run(2, save_named_tensors, tmp_path)
    (tensors, optimizers), (truth, true_optimizers) = named_tensors(5.0, swap=True), named_tensors(2.0)
    held, checkpoint = dict(tensors), opened(tmp_path)
    result = checkpoint.load(types.MappingProxyType(tensors), tuple(optimizers), "p")
    names = {t.name for t in result.metadata.tensors if not t.name.startswith(("optimizer/", "rng/"))}
    assert names == {"model/weight", "model/bias"} and all("rng/state" in w for w in result.warnings)
    for name, tensor in tensors.items():
        assert tensor is held[name] and identical(tensor.detach(), truth[name].detach())
        assert identical(result.model_state[name], truth[name].detach())
    for optimizer, true in zip(optimizers[::-1], true_optimizers):
        assert identical(optimizer.state_dict(), true.state_dict())
    linear = nn.Linear(6, 4)  # and a module may go on from it
    checkpoint.load(linear, torch.optim.AdamW(linear.parameters()), "p")
    assert identical(linear.weight.detach(), truth["weight"].detach())
    before = copy.deepcopy(tensors)
    message = refusal(lambda: checkpoint.load({"weight": tensors["weight"], "b": tensors["bias"]}, None, "p"))
    assert "model/b:" in message and "model/bias" in message and identical(tensors, before)


def test_a_zero_redundancy_optimizer_is_refused_with_a_way_that_works(tmp_path):
    truth = run(2, save_zero, tmp_path)
    assert run(2, load_zero, tmp_path) == truth and run(1, load_unsharded_zero, tmp_path) == truth[:1]


def start_zero(kind=ZeroRedundancyOptimizer, lr=0.5):
    model = DistributedDataParallel(filled(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "truth"))
    options = {"optimizer_class": torch.optim.AdamW} if kind is ZeroRedundancyOptimizer else {}
    return model, kind(model.parameters(), lr=lr, **options)


def go_on(model, optimizer):
    for _ in range(2):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [raw(parameter) for parameter in model.parameters()]


def save_zero(rank, world_size, tmp):
    (model, optimizer), checkpoint = start_zero(lr=0.125), opened(tmp)
    go_on(model, optimizer)
    for holder in (None, 0, 1):  # on no rank, and where torch itself says
        if holder is not None:
            optimizer.consolidate_state_dict(to=holder)
        message = refusal(lambda: checkpoint.save(model, optimizer, to()), ExceptionType.SAVE_FAILED)
        assert "`optim`" in message and "fully_shard" in message and "consolidate" not in message
    checkpoint.save(model, optimizer.optim, to())
    assert "`optim`" in refusal(lambda: checkpoint.load(model, optimizer, at()), ExceptionType.LOAD_FAILED)
    return go_on(model, optimizer)


def load_zero(rank, world_size, tmp):
    model, optimizer = start_zero()
    opened(tmp).load(model, optimizer.optim, at())
    for group, own in zip(optimizer.param_groups, optimizer.optim.param_groups):
        group.update({**own, "params": group["params"]})
    return go_on(model, optimizer)


def load_unsharded_zero(rank, world_size, tmp):
    model, optimizer = start_zero(torch.optim.AdamW)
    opened(tmp).load(model, optimizer, at())
    return go_on(model, optimizer)


def test_two_optimizers_may_share_one_model(tmp_path):
    def start(salt):
        model = filled(Net(), salt)
        matrices = [model.up.weight, model.down.weight]
        rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
        optimizers = {"muon": torch.optim.Muon(matrices, lr=0.1), "adamw": torch.optim.AdamW(rest)}
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        for optimizer in optimizers.values():
            optimizer.step()
        return model, optimizers

    model, optimizers = start("truth")
    other, others = start("other")
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizers, to())
    checkpoint.load(other, others, at())
    assert identical(state_of(other)[0], state_of(model)[0])
    assert all(identical(state_of(others[name])[0], state_of(optimizers[name])[0]) for name in optimizers)


def test_an_optimizer_over_parameters_outside_the_model_goes_by_position_and_says_so(tmp_path, caplog):
    def start(salt):
        model, outside = filled(nn.Linear(3, 2), salt), nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([*model.parameters(), outside], lr=0.3)
        for p in [*model.parameters(), outside]:
            p.grad = torch.full_like(p, len(salt))
        optimizer.step()
        return model, optimizer, outside

    model, optimizer, outside = start("truth")
    other, other_optimizer, other_outside = start("elsewhere")
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to())
    assert "position" in caplog.text
    checkpoint.load(other, other_optimizer, at())
    assert identical(other_optimizer.state[other_outside], optimizer.state[outside])


def test_float32_state_of_bfloat16_parameters_stays_float32(tmp_path):
    def start(salt):
        model = filled(nn.Linear(3, 2).bfloat16(), salt)
        optimizer = stepped(model)
        for p in model.parameters():
            for slot in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][slot] = torch.rand(
                    p.shape, generator=torch.Generator().manual_seed(len(salt))
                )
        return model, optimizer

    model, optimizer = start("truth")
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to())
    fresh = nn.Linear(3, 2).bfloat16()
    for other, other_optimizer in (start("elsewhere"), (fresh, torch.optim.AdamW(fresh.parameters()))):
        checkpoint.load(other, other_optimizer, at())
        assert identical(by_name(other, other_optimizer), by_name(model, optimizer))
        assert other_optimizer.state[other.weight]["exp_avg"].dtype == torch.float32


# ---- resume: a run that stopped goes on as if it had not -------------------------------------------------------------


def train(rank, world_size, tmp, start, stop):
    """Train from step `start` (from its checkpoint, unless 0) to `stop`; save there; return losses and weights."""
    model = filled(nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 3)), "start")
    if world_size > 1:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(100 * start + rank)
    checkpoint = opened(tmp)
    if start:
        result = checkpoint.load(model, optimizer, at(f"step{start}"), extra_state={"scheduler": scheduler})
        assert result.extra_state["step"] == start
    losses = []
    for _ in range(start, stop):
        noise = torch.from_numpy(np.random.rand(4, 5)).float() * random.random()
        loss = model(torch.randn(4, 5) + noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    checkpoint.save(model, optimizer, to(f"step{stop}"), extra_state={"scheduler": scheduler, "step": stop})
    return losses, [raw(p.to_local() if isinstance(p, DTensor) else p) for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2], ids=["one process", "fsdp2"])
def test_resume_gives_the_losses_and_weights_of_a_run_that_never_stopped(tmp_path, world_size):
    whole = run(world_size, train, tmp_path / "whole", 0, 10)
    first = run(world_size, train, tmp_path / "parts", 0, 5)
    second = run(world_size, train, tmp_path / "parts", 5, 10)  # new processes, nothing shared but the files
    for rank in range(world_size):
        assert whole[rank][0] == first[rank][0] + second[rank][0]
        assert whole[rank][1] == second[rank][1] and len(set(whole[rank][0])) == 10


# ---- bad input: refused clearly, and nothing changes -----------------------------------------------------------------

BAD_PREFIXES = [
    "",
    "/abs",
    "..",
    "../x",
    "a/../b",
    "a//b",
    "a/",
    "./a",
    "a/.",
    "a b",
    "a\\b",
    "a\0b",
    "ü",
    "a" * 201,
]
BAD_PREFIXES += ["a.metadata.json", "a.metadata.json/b", "a\n"]


@pytest.mark.parametrize("prefix", BAD_PREFIXES, ids=repr)
def test_a_bad_prefix_is_refused_before_any_file_is_touched(tmp_path, prefix):
    base = tmp_path / "inner" / "base"
    checkpoint = opened(base)
    model, optimizer = small()
    checkpoint.save(model, optimizer, to("good"))
    before = listing(tmp_path)
    calls = [
        lambda: checkpoint.save(model, optimizer, to(prefix)),
        lambda: checkpoint.save_model_only(model, to(prefix)),
        lambda: checkpoint.load(model, optimizer, at(prefix)),
        lambda: checkpoint.delete_checkpoint(prefix),
        lambda: checkpoint.validate_checkpoint(prefix),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="prefix"):
            call()
    assert listing(tmp_path) == before


MISUSES = {
    "format": lambda c, m: c.save(m, None, to(format="ZIP")),
    "compression_level": lambda c, m: c.save(m, None, to(compression_level="ULTRA")),
    "staging": lambda c, m: c.save(m, None, to(staging="lazy")),
    "replicas": lambda c, m: c.save(m, None, to(replicas="hope")),
    "resharding_strategy": lambda c, m: c.load(m, None, at(resharding_strategy="psychic")),
    "timeout": lambda c, m: c.save(m, None, to(timeout=-1.0)),
    "checkpoint_prefix": lambda c, m: c.load(m, None, LoadOptions()),
    "provider": lambda c, m: ckpt.StorageFactory.create(ckpt.StorageOptions(provider="ftp")),
    "basepath": lambda c, m: ckpt.StorageFactory.create(
        ckpt.StorageOptions(connection_settings={"basepath": "x"})
    ),
}
ALLOWED = {
    "format": "'multi_shard' 'single_file' 'consolidated'", "compression_level": "'none' 'fast' 'balanced' 'maximum'",
    "staging": "eager overlapped", "replicas": "verify trust", "resharding_strategy": "parallel sequential broadcast",
    "timeout": "", "checkpoint_prefix": "", "provider": "local", "basepath": "base_path",
}  # fmt: skip


@pytest.mark.parametrize("option", MISUSES)
def test_an_unknown_value_is_a_value_error_that_lists_what_is_allowed(tmp_path, option):
    checkpoint = opened(tmp_path)
    with pytest.raises(ValueError) as caught:
        MISUSES[option](checkpoint, small()[0])
    assert option in str(caught.value)
    for word in ALLOWED[option].split():
        assert word in str(caught.value)
    assert listing(tmp_path) == {}


MODULE = nn.Linear(1, 1)
UNFIT = [
    ("layer", {"layer": MODULE, "w": torch.ones(2)}, None), ("step", {"w": torch.ones(2), "step": 3}, None),
    ("7", {7: torch.ones(2)}, None), ("x._extra_state", {"x._extra_state": torch.ones(2)}, None),
    ("ndarray", np.ones(2), None), ("list", [MODULE], None), ("Tensor", torch.ones(2), None),
    ("optimizer", MODULE, [torch.ones(2)]), ("'w'", MODULE, {"w": torch.ones(2)}), ("str", MODULE, "p"),
]  # fmt: skip


@pytest.mark.parametrize("word, model, optimizer", UNFIT)
def test_a_model_or_optimizer_of_another_type_is_a_value_error_naming_it(tmp_path, word, model, optimizer):
    checkpoint = opened(tmp_path)
    calls = [lambda: checkpoint.save(model, optimizer, "p"), lambda: checkpoint.load(model, optimizer, "p")]
    for call in [*calls, lambda: checkpoint.save_async(model, optimizer, "p").result(20.0)]:
        with pytest.raises(ValueError, match=re.escape(word)):
            call()
    assert listing(tmp_path) == {}


def test_a_checkpoint_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to("here"))
    with pytest.raises(CheckpointException) as caught:
        checkpoint.load(*small(), at("gone"))
    assert "gone" in str(caught.value) and "gone" in caught.value.checkpoint_path
    assert not checkpoint.validate_checkpoint("gone").is_valid


def test_missing_and_unexpected_keys_are_all_listed_and_nothing_changes(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(Bag(**{f"old{i}": torch.ones(1) for i in range(30)}, both=torch.ones(2)), None, to())
    target = Bag(new=torch.zeros(1), both=torch.zeros(2))
    message = refusal(lambda: checkpoint.load(target, None, at()), ExceptionType.VALIDATION_FAILED)
    assert "new" in message and "old0" in message and "31 problem" in message and "11 more" in message
    assert not target.state["both"].any()
    result = checkpoint.load(target, None, at(strict_mode=False))
    assert target.state["both"].all() and not target.state["new"].any()
    text = " ".join(result.warnings)
    assert "new" in text and "old0" in text


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_always_an_error_that_names_both(tmp_path, strict):
    checkpoint = opened(tmp_path)
    checkpoint.save(nn.Linear(3, 5), None, to())
    model = filled(nn.Linear(4, 5), "mine")
    before = state_of(model)
    message = refusal(
        lambda: checkpoint.load(model, None, at(strict_mode=strict)), ExceptionType.VALIDATION_FAILED
    )
    assert "weight" in message and re.search(r"5, ?3", message) and re.search(r"5, ?4", message)
    assert identical(state_of(model), before)


def test_another_dtype_is_an_error_if_strict_and_else_a_cast_with_a_warning(tmp_path):
    checkpoint = opened(tmp_path)
    model = filled(nn.Linear(3, 5), "truth")
    checkpoint.save(model, None, to())
    half = filled(nn.Linear(3, 5).bfloat16(), "mine")
    before = state_of(half)
    message = refusal(lambda: checkpoint.load(half, None, at()), ExceptionType.VALIDATION_FAILED)
    assert re.search(r"weight.*(float32|\bF32).*(bfloat16|BF16)", message) and identical(
        state_of(half), before
    )
    result = checkpoint.load(half, None, at(strict_mode=False))
    assert "weight" in " ".join(result.warnings)
    assert identical(half.weight.data, model.weight.data.bfloat16())


CUTS = {"one byte": lambda size: size - 1, "half": lambda size: size // 2, "all": lambda size: 0}


@pytest.mark.parametrize("cut", [*CUTS, "extended", "replaced by another save's"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_of_another_length_is_corrupt_and_named_and_nothing_changes(tmp_path, form, cut):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to(format=form))
    checkpoint.save(*small("second"), to("q", format=form))
    model, optimizer = small("other")
    before = state_of(model, optimizer)
    for path, twin in zip(shards(tmp_path), shards(tmp_path, "q")):
        whole = path.read_bytes()
        changed = whole + b"\0" if cut == "extended" else twin.read_bytes()
        path.write_bytes(whole[: CUTS[cut](len(whole))] if cut in CUTS else changed)
        message = refusal(lambda: checkpoint.load(model, optimizer, at()), ExceptionType.CORRUPTED_CHECKPOINT)
        assert path.name in message and identical(state_of(model, optimizer), before)
        assert not checkpoint.validate_checkpoint("p").is_valid
        path.write_bytes(whole)
    checkpoint.load(model, optimizer, at())


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "not json", "a list", "bad utf-8", "deep"])
def test_a_damaged_record_is_corrupt_never_absent(tmp_path, damage):
    checkpoint = opened(tmp_path)
    checkpoint.save(*small(), to())
    path = tmp_path / "p.metadata.json"
    whole = path.read_bytes()
    flipped = whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]
    bad = {"empty": b"", "cut": whole[:-20], "flipped": flipped, "a list": b"[]\n", "not json": b"hello"}
    bad |= {"bad utf-8": b"\xff" + whole, "deep": b"[" * 100_000}
    path.write_bytes(bad[damage])
    message = refusal(lambda: checkpoint.load(*small(), at()), ExceptionType.CORRUPTED_CHECKPOINT)
    assert "p.metadata.json" in message
    assert not checkpoint.validate_checkpoint("p").is_valid and checkpoint.list_checkpoints() == []


@pytest.mark.parametrize("version", [1, 99])
def test_another_format_version_is_refused_by_its_number_left_alone_by_gc_overwritten_and_deleted(
    tmp_path, version, caplog
):
    checkpoint, record = opened(tmp_path), tmp_path / "p.metadata.json"

    def save_in_that_version():
        checkpoint.save(*small(), to())
        reseal(record, lambda fields: fields.update(format_version=version))
        (tmp_path / "p" / f"{json.loads(record.read_bytes())['save_id']}.rest.safetensors").touch()
        return listing(tmp_path)

    before = save_in_that_version()
    message = refusal(lambda: checkpoint.load(*small(), at()), ExceptionType.INCOMPATIBLE_VERSION)
    assert f"version {version};" in message and "version 2" in message
    assert checkpoint.list_checkpoints() == [] and "skipped p" in caplog.text
    assert "overwrite" in refusal(lambda: checkpoint.save(*small(), to(overwrite=False)))
    assert ckpt.collect_garbage(checkpoint.storage, 0.0) == [] and listing(tmp_path) == before
    checkpoint.save(*small(), to())
    assert set(listing(tmp_path)) == named_files(tmp_path) and not set(listing(tmp_path)) & set(before) - {
        "p.metadata.json"
    }
    save_in_that_version()
    checkpoint.delete_checkpoint("p")
    assert listing(tmp_path) == {}


def test_a_base_path_that_is_no_directory_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoint = opened(tmp_path / "file" / "base", retry_policy=ckpt.RetryPolicy(max_retries=1))
    refusal(lambda: checkpoint.save(*small(), to()), ExceptionType.STORAGE_ERROR)
    with pytest.raises(CheckpointException):
        checkpoint.load(*small(), at())


def test_a_directory_that_may_not_be_read_is_a_storage_error(tmp_path):
    opened(tmp_path).save(*small(), to())
    checkpoint = ckpt.DistributedCheckpoint(
        storage=Storage(tmp_path, Seam(Strike(0, fail(errno.EACCES), until=FOREVER)))
    )
    assert "Permission denied" in refusal(
        lambda: checkpoint.load(*small(), at()), ExceptionType.STORAGE_ERROR
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_is_a_storage_error_on_all_ranks_and_harms_nothing(tmp_path, world_size, form):
    for (kind, _, message), old, files in run(world_size, fill_the_disk, tmp_path, form):
        assert kind == "STORAGE_ERROR" and old == (3.0, 3.0)
        assert files["after"] == files["before"], message


def fill_the_disk(rank, world_size, tmp, form):
    retry = ckpt.RetryPolicy(max_retries=2, initial_delay=0.01)
    checkpoint = opened(tmp, retry_policy=retry)
    checkpoint.save(Bag(w=torch.full((5 * MiB,), 3.0)), None, to(format=form))
    files = {"before": sorted(listing(tmp))}
    dist.barrier()
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (6 * MiB, resource.RLIM_INFINITY)
    )  # every rank's share is larger
    answer = told(lambda: checkpoint.save(Bag(w=torch.full((5 * MiB,), 4.0)), None, to(format=form)))
    dist.barrier()
    files["after"] = sorted(listing(tmp))
    target = Bag(w=torch.zeros(5 * MiB))
    checkpoint.load(target, None, at())
    return answer, (target.state["w"].min().item(), target.state["w"].max().item()), files


def test_a_failure_after_bytes_began_to_land_says_that_tensors_are_undefined(tmp_path):
    bag = Bag(a=torch.ones(2 * BLOCK, dtype=torch.uint8), b=torch.ones(2 * BLOCK, dtype=torch.uint8))
    checkpoint = opened(tmp_path)
    checkpoint.save(bag, None, to(include_rng_state=False))
    (path,) = shards(tmp_path)
    flip(path, Shard(path).place(Shard(path).find("model/b"))[1] - 1)
    message = refusal(lambda: checkpoint.load(bag, None, at()), ExceptionType.CORRUPTED_CHECKPOINT)
    assert "undefined" in message


def test_an_error_of_load_state_dict_says_that_tensors_are_undefined(tmp_path):
    class Broken(Bag):
        def load_state_dict(self, state):
            raise KeyError("step")

    checkpoint = opened(tmp_path)
    checkpoint.save(Bag(a=torch.ones(2)), None, to())
    target = Broken(a=torch.zeros(2))
    message = refusal(lambda: checkpoint.load(target, None, at()), ExceptionType.LOAD_FAILED)
    assert "KeyError" in message and "undefined" in message and target.state["a"].all()


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(tmp_path):
    checkpoint = opened(tmp_path)
    model, optimizer = small()
    checkpoint.save(model, optimizer, to("runs/one", custom_metadata={"epoch": 3}))
    checkpoint.save_model_only(model, to("two"))
    return tmp_path


def command(capsys, *words):
    """The exit code and what was printed."""
    code = ckpt.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err, captured.out


def test_ls_lists_checkpoints_with_size_ranks_and_format(two_checkpoints, capsys):
    code, text, _ = command(capsys, "ls", two_checkpoints)
    assert code == 0 and text.index("runs/one") < text.index("two") and "MULTI_SHARD" in text.upper()
    code, _, text = command(capsys, "ls", two_checkpoints, "--json")
    entries = json.loads(text)
    entries = entries if isinstance(entries, list) else entries["checkpoints"]
    assert code == 0 and [entry["prefix"] for entry in entries] == ["runs/one", "two"]
    assert entries[0]["world_size"] == 1 and entries[0]["size_bytes"] > entries[1]["size_bytes"] > 0


def test_show_tells_tensors_shapes_dtypes_shards_and_metadata(two_checkpoints, capsys):
    code, text, _ = command(capsys, "show", two_checkpoints, "runs/one")
    (path,) = shards(two_checkpoints, "runs/one")
    assert code == 0
    for part in ("0.weight", "exp_avg", "F32", "epoch", path.name, torch.__version__):
        assert part in text
    assert re.search(r"0\.weight.*5\D+3", text)
    code, _, text = command(capsys, "show", two_checkpoints, "runs/one", "--json")
    assert code == 0 and "0.weight" in json.dumps(json.loads(text)) and path.name in text


def test_verify_checks_every_byte_and_exits_1_naming_tensor_and_file(two_checkpoints, capsys):
    assert command(capsys, "verify", two_checkpoints)[0] == 0
    (path,) = shards(two_checkpoints, "runs/one")
    shard = Shard(path)
    flip(path, shard.place(shard.find("model/1.weight"))[0])
    code, text, _ = command(capsys, "verify", two_checkpoints)
    assert code == 1 and "1.weight" in text and path.name in text and "runs/one" in text
    assert command(capsys, "verify", two_checkpoints, "two")[0] == 0
    code, _, text = command(capsys, "verify", two_checkpoints, "runs/one", "--json")
    assert code == 1 and "1.weight" in json.dumps(json.loads(text)) and path.name in text


@pytest.mark.parametrize("dtype", ["float99", [], {}, None, 1])
def test_a_tensor_of_a_record_whose_dtype_is_no_name_of_one_is_malformed(dtype):
    with pytest.raises(ValueError, match="malformed, or of a dtype unknown"):
        st.decode_tensors([["weight", dtype, [1], None, None]])


def test_verify_exits_1_on_a_damaged_record_and_a_missing_shard(two_checkpoints, capsys):
    flip(two_checkpoints / "two.metadata.json", 30)
    code, text, _ = command(capsys, "verify", two_checkpoints)
    assert code == 1 and "two" in text
    shards(two_checkpoints, "runs/one")[0].unlink()
    code, text, _ = command(capsys, "verify", two_checkpoints, "runs/one")
    assert code == 1 and ".safetensors" in text


def test_rm_deletes_one_checkpoint(two_checkpoints, capsys):
    assert command(capsys, "rm", two_checkpoints, "runs/one")[0] == 0
    assert [info.prefix for info in opened(two_checkpoints).list_checkpoints()] == ["two"]
    assert not (two_checkpoints / "runs/one").exists() or not shards(two_checkpoints, "runs/one")
    code, text, _ = command(capsys, "rm", two_checkpoints, "runs/one")
    assert code != 0 and "runs/one" in text


def test_gc_removes_orphans_and_nothing_that_a_record_names_or_that_is_not_ours(two_checkpoints, capsys):
    (path,) = shards(two_checkpoints, "two")
    orphan = path.with_name("0badf00d-00000-of-00001.safetensors")
    shutil.copy(path, orphan)
    foreign = two_checkpoints / "two" / "notes.txt"
    foreign.write_text("mine")
    damaged = two_checkpoints / "runs" / "one" / "0badf00d-00000-of-00001.safetensors"
    shutil.copy(path, damaged)
    flip(
        two_checkpoints / "runs/one.metadata.json", 30
    )  # gc touches nothing under a record that it cannot read
    code, text, _ = command(capsys, "gc", two_checkpoints)
    assert code == 0 and orphan.name in text
    assert not orphan.exists() and path.exists() and foreign.exists() and damaged.exists()
    code, _, text = command(capsys, "gc", two_checkpoints, "--json")
    assert code == 0 and orphan.name not in json.dumps(json.loads(text))


def test_the_command_line_says_what_is_wrong_with_its_arguments(tmp_path, capsys):
    for words in (["show", tmp_path, "gone"], ["verify", tmp_path, "gone"], ["show", tmp_path, "../x"]):
        code, text, _ = command(capsys, *words)
        assert code != 0 and words[-1] in text and "Traceback" not in text
    code, text, _ = command(capsys, "ls", tmp_path / "nowhere")
    assert "Traceback" not in text


def test_python_ckpt_py_is_the_command(two_checkpoints):
    def python(*words):
        command = [sys.executable, str(HERE / "ckpt.py"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)

    done = python("ls", two_checkpoints, "--json")
    assert done.returncode == 0 and "runs/one" in json.dumps(json.loads(done.stdout))
    shards(two_checkpoints, "two")[0].unlink()
    done = python("verify", two_checkpoints)
    assert done.returncode == 1 and "two" in done.stdout + done.stderr and "Traceback" not in done.stderr


# Out: safetensors files, as Hugging Face's libraries expect them


def contents(path):
    """A safetensors file as anybody may write it, read by hand: {name: (dtype, shape, bytes)}."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    places = sorted(entry["data_offsets"] for entry in header.values())
    assert [0, *(end for _, end in places)] == [*(begin for begin, _ in places), len(body)], (
        "a hole, or an overlap"
    )
    return {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()}


def as_stored(state):
    """What a file must hold of a state dict of plain tensors; of F4, two elements a byte."""
    forms = {n: (code_of(t.dtype), list(t.shape), raw(t)) for n, t in state.items()}
    return {
        n: (c, [*s[:-1], s[-1] * 2], data) if c == "F4" else (c, s, data) for n, (c, s, data) in forms.items()
    }


def exported(capsys, tmp, prefix, *words, out="out/model.safetensors"):
    """What `export` writes as one file."""
    code, text, _ = command(capsys, "export", tmp, prefix, Path(tmp) / out, *words)
    assert code == 0, text
    return contents(Path(tmp) / out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_from_any_layout_and_format_holds_the_unsharded_truth_in_the_same_bytes(
    saved, layout, capsys
):
    base, truth = saved(layout), as_stored(filled(Net(), "truth").state_dict())
    files = set()
    for form in FORMATS:
        assert exported(capsys, base, f"{layout}/{form.name}", "--model-only") == truth
        files.add((base / "out/model.safetensors").read_bytes())
        whole = exported(capsys, base, f"{layout}/{form.name}")
        moments = {name: whole.pop(name) for name in list(whole) if name.startswith("optimizer/")}
        assert whole == truth
        for slot in ("exp_avg", "exp_avg_sq"):
            wanted = as_stored(dict(filled(Net(), f"truth{slot}").named_parameters()))
            assert {name: moments[f"optimizer/{name}/{slot}"] for name in wanted} == wanted
    assert len(files) == 1 and not list(base.rglob("*.tmp"))


@pytest.mark.parametrize("level", [level for level in LEVELS if level.name != "NONE"])
def test_an_export_of_a_compressed_checkpoint_is_the_same(tmp_path, level, capsys):
    run(2, save_layout, tmp_path, "fsdp2", FORMATS, level)
    for form in FORMATS:
        exact = as_stored(filled(Net(), "truth").state_dict())
        assert exported(capsys, tmp_path, f"fsdp2/{form.name}", "--model-only") == exact


class Wide(nn.Module):
    """Two blocks and a bit of a matrix, which TP cuts into columns, and small things before and behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(3, 5), nn.Linear(1100, 2000), nn.Linear(5, 3)


def save_columns(rank, world_size, tmp):
    mesh = init_device_mesh("cpu", (world_size,))
    model = parallelize_module(filled(Wide(), "truth"), mesh, {"wide": RowwiseParallel()})
    for form in FORMATS:
        for level in (CompressionLevel.NONE, CompressionLevel.FAST):
            opened(tmp).save(
                model, None, to(f"{form.name}/{level.name}", format=form, compression_level=level)
            )


def test_an_export_puts_columns_of_several_blocks_together(tmp_path, capsys):
    run(3, save_columns, tmp_path)
    truth = as_stored(filled(Wide(), "truth").state_dict())
    for form, level in itertools.product(FORMATS, ("NONE", "FAST")):
        assert exported(capsys, tmp_path, f"{form.name}/{level}", "--model-only") == truth, (form, level)


def test_an_export_is_byte_for_byte_what_safetensors_itself_writes(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.torch").save_file
    truth = {f"{name}.é\n": pattern(dtype) for name, dtype in ((str(d), d) for d in DTYPES)}
    truth |= {"z": torch.ones(3, 5), "a": torch.zeros(()), "empty": torch.zeros(2, 0)}
    truth = {name: tensor for name, tensor in truth.items() if tensor.dtype != torch.complex128}
    opened(tmp_path).save(Bag(**truth), None, to())
    save_file(truth, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    exported(capsys, tmp_path, "p")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_an_export_over_the_size_limit_is_cut_into_files_with_an_index(tmp_path, capsys):
    truth = {f"h.{i}": torch.full((1000, 1 + i % 3), i, dtype=torch.int16) for i in range(10)} | {
        "big": torch.ones(9000)
    }
    opened(tmp_path).save(Bag(**truth), None, to())
    exported(capsys, tmp_path, "p")
    folder, name = tmp_path / "out", "model.safetensors"
    assert command(capsys, "export", tmp_path, "p", folder / name, "--max-shard-size", "8kB")[0] == 0
    index = json.loads((folder / f"{name}.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in truth.values())}
    count = len(list(folder.iterdir())) - 1  # and the single file of before is gone: readers would prefer it
    parts = {f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    assert (
        set(index["weight_map"].values())
        == parts
        == {p.name for p in folder.iterdir()} - {f"{name}.index.json"}
    )
    found = {part: contents(folder / part) for part in sorted(parts)}
    assert all(
        len(part) == 1 or sum(len(data) for *_, data in part.values()) <= 8000 for part in found.values()
    )
    assert {n: found[part][n] for n, part in index["weight_map"].items()} == as_stored(truth)
    assert sum(map(len, found.values())) == len(truth)
    assert list(index["weight_map"]) == sorted(truth) and count > 3
    exported(capsys, tmp_path, "p")
    assert [path.name for path in folder.iterdir()] == [name], (
        "an index, or parts, of before are those of another model"
    )


def test_an_export_cut_into_files_opens_with_safetensors(tmp_path, capsys):
    safe_open = pytest.importorskip("safetensors").safe_open
    truth = {f"h.{i}": torch.randn(30, 1 + i) for i in range(10)}
    opened(tmp_path).save(Bag(**truth), None, to())
    assert (
        command(capsys, "export", tmp_path, "p", tmp_path / "m.safetensors", "--max-shard-size", "2KiB")[0]
        == 0
    )
    for name, part in json.loads((tmp_path / "m.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(tmp_path / part, framework="pt") as file:
            assert identical(file.get_tensor(name), truth.pop(name)) and file.metadata() == {"format": "pt"}
    assert not truth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=code_of)
def test_export_casts_the_floats_of_the_model_and_nothing_else(tmp_path, dtype, capsys):
    model = nn.Linear(300, 5)
    model.register_buffer("narrow", torch.randn(7).half())
    model.register_buffer("tiny", torch.randn(7).to(torch.float8_e5m2))
    model.register_buffer("steps", torch.arange(7))
    optimizer = stepped(model)
    checkpoint = opened(tmp_path)
    checkpoint.save(model, optimizer, to(compression_level=CompressionLevel.FAST))
    kept = {"tiny", "steps"}
    wanted = {name: t if name in kept else t.to(dtype) for name, t in model.state_dict().items()}
    found = exported(capsys, tmp_path, "p", "--dtype", code_of(dtype).lower())
    assert {name: found[name] for name in wanted} == as_stored(wanted)
    assert {found[name][0] for name in found.keys() - wanted.keys()} == {"F32"}, (
        "moments and steps of the optimizer"
    )
    with pytest.raises(ValueError, match="bfloat16"):
        ckpt.export_checkpoint(checkpoint.storage, "p", tmp_path / "x.safetensors", dtype=torch.int8)


def test_export_tells_what_is_complex_per_rank_or_no_tensor(tmp_path, capsys):
    run(2, save_odd, tmp_path)
    code, text, _ = command(capsys, "export", tmp_path, "p", tmp_path / "m.safetensors")
    found = contents(tmp_path / "m.safetensors")
    assert code == 0 and set(found) == {"c", "mean", "model/mean~r1"} and "rng/state~r0" in text
    assert (
        re.search("pairs.*: c\n", text)
        and re.search("lowest rank.*: mean\n", text)
        and "model-values/note" in text
    )
    assert found["c"] == ("F64", [2, 2], raw(torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128)))
    assert found["mean"][2] == raw(torch.tensor([1.0])) and found["model/mean~r1"][2] == raw(
        torch.tensor([2.0])
    )
    assert set(exported(capsys, tmp_path, "p", "--model-only")) == {"c", "mean"}


def save_odd(rank, world_size, tmp):
    state = Bag(
        c=torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128), mean=torch.tensor([rank + 1.0]), note="x"
    )
    opened(tmp).save(state, None, to())


def memory_of(act):
    """By how much the memory of this process grows at most during `act()`."""

    def status(field):
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    act()  # what is allocated once and for all, such as the stacks of threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    act()
    return status("VmHWM") - before


def test_an_export_takes_the_memory_of_a_few_blocks_whatever_the_size_of_a_tensor(tmp_path):
    for part in (64, 256):
        assert (
            run(1, export_wide, tmp_path, part, group=False)[0] < 64 * MiB
        )  # two buffers of up to two blocks for each thread


def export_wide(tmp, size):
    storage = ckpt.LocalStorage(tmp / str(size))
    state = Bag(w=torch.arange(size * MiB // 8, dtype=torch.int64).view(-1, 1 << 14))
    opened(storage.base_path).save(state, None, to())
    state.state.clear()
    peak = memory_of(lambda: ckpt.export_checkpoint(storage, "p", tmp / "m.safetensors", model_only=True))
    assert (tmp / "m.safetensors").stat().st_size > size * MiB
    return peak


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_of_a_damaged_checkpoint_exits_1_naming_it_and_leaves_what_was_there(
    tmp_path, form, capsys
):
    state = Bag(a=torch.ones(5), b=torch.randn(3 * BLOCK // 4 + 5))
    opened(tmp_path).save(state, None, to(format=form))
    before = exported(capsys, tmp_path, "p", "--model-only")
    victim = next(path for path in shards(tmp_path) if any(name.endswith("b") for name in Shard(path).header))
    flip(victim, victim.stat().st_size - 1)
    for words in ((), ("--max-shard-size", "1kB")):
        code, text, _ = command(
            capsys, "export", tmp_path, "p", tmp_path / "out/model.safetensors", "--model-only", *words
        )
        assert code == 1 and victim.name in text and re.search(r"holds .*\bb\b", text)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}
        assert contents(tmp_path / "out/model.safetensors") == before


@pytest.mark.parametrize(
    "name, limit, why",
    [("m.pt", 1, "must end in .safetensors: .*m.pt"), ("m.safetensors", 0, "at least 1, not 0")],
)
def test_an_export_that_cannot_be_says_which_argument_is_wrong(tmp_path, name, limit, why):
    with pytest.raises(ValueError, match=why):
        ckpt.export_checkpoint(ckpt.LocalStorage(tmp_path), "p", tmp_path / name, max_shard_bytes=limit)


def test_an_export_that_the_disk_cannot_take_leaves_nothing(tmp_path):
    opened(tmp_path).save(Bag(w=torch.ones(MiB)), None, to())
    kind, _, message = run(1, export_to_little_room, tmp_path, group=False)[0]
    assert kind == "STORAGE_ERROR" and "m.safetensors" in message, message
    assert not list(tmp_path.glob("m*"))


def export_to_little_room(tmp):
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, MiB))
    return told(lambda: ckpt.export_checkpoint(ckpt.LocalStorage(tmp), "p", tmp / "m.safetensors"))


def test_two_exports_to_one_name_are_each_whole_and_what_a_dead_one_has_left_goes_a_day_later(tmp_path):
    checkpoint, out, storage = opened(tmp_path), tmp_path / "out", ckpt.LocalStorage(tmp_path)
    states = {prefix: {"w": torch.full((2 * BLOCK,), number)} for number, prefix in enumerate("ab")}
    for prefix, state in states.items():
        checkpoint.save(Bag(**state), None, to(prefix, include_rng_state=False))

    def export(prefix, between=lambda told: None):
        ckpt.export_checkpoint(storage, prefix, out / "m.safetensors", progress=between)
        assert contents(out / "m.safetensors") == as_stored(states[prefix])

    export("a", between=lambda told: export("b"))  # the whole of the other one while this one writes
    assert [path.name for path in out.iterdir()] == ["m.safetensors"]
    for name, age_s in (("m.safetensors.0badf00d.tmp", 90_000), ("m.safetensors.0badf00e.tmp", 80_000)):
        (out / name).touch()
        os.utime(out / name, times=(time.time() - age_s,) * 2)
    export("a")
    assert sorted(path.name for path in out.iterdir()) == ["m.safetensors", "m.safetensors.0badf00e.tmp"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_transformers_model_goes_through_fsdp2_and_safetensors_to_from_pretrained(tmp_path, kind, capsys):
    transformers = pytest.importorskip("transformers")
    logits = run(2, save_transformer, tmp_path, kind)
    for number, words in enumerate(([], ["--max-shard-size", "20kB"])):
        out = tmp_path / f"hf{number}" / "model.safetensors"
        assert command(capsys, "export", tmp_path, "p", out, "--model-only", *words)[0] == 0
        transformer_of(kind).config.save_pretrained(out.parent)
        model = transformers.AutoModelForCausalLM.from_pretrained(out.parent).eval()
        assert torch.equal(model(torch.arange(12).view(2, 6)).logits, logits[0]), (
            "the same logits, bit for bit"
        )
        assert model.lm_head.weight is model.get_input_embeddings().weight
    transformer_of(kind).save_pretrained(tmp_path / "theirs")
    assert command(capsys, "import", tmp_path / "theirs", tmp_path, "imported")[0] == 0
    opened(tmp_path).load(filled(model, "other"), None, at("imported"))
    assert identical(dict(model.state_dict()), dict(transformer_of(kind).state_dict()))


def transformer_of(kind):
    import transformers

    tied = dict(vocab_size=50, tie_word_embeddings=True)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **tied)
    else:
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, **heads, **tied
        )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_transformer(rank, world_size, tmp, kind):
    model = transformer_of(kind)
    with torch.no_grad():
        logits = model(torch.arange(12).view(2, 6)).logits
    for block in model.model.layers if kind == "llama" else model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    opened(tmp).save(model, None, to())
    return logits


# In: what others have saved


def safetensors_file(path, state, pad=0, metadata=None):
    """Write a safetensors file by hand; `pad` spaces misalign its data."""
    table, body = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, (code, shape, data) in as_stored(state).items():
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(table).encode() + b" " * pad
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def as_index(tmp, state):
    """The same in two files with an index."""
    names = [list(state)[::2], list(state)[1::2]]
    for number, part in enumerate(names):
        safetensors_file(tmp / f"m-{number}.safetensors", {name: state[name] for name in part})
    weights = {name: f"m-{number}.safetensors" for number, part in enumerate(names) for name in part}
    (tmp / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return tmp / "m.safetensors.index.json"


def as_torch(tmp, state, **options):
    torch.save(state, tmp / "m.pt", **options)
    return tmp / "m.pt"


def as_dcp(tmp, state):
    run(2, save_dcp, tmp, state)
    return tmp / "dcp"


def save_dcp(rank, world_size, tmp, state):
    mesh, nested = init_device_mesh("cpu", (world_size,)), isinstance(next(iter(state.values())), dict)
    model = state["model"] if nested else state
    for name in [name for name in model if name.endswith("weight")]:
        model[name] = distribute_tensor(model[name], mesh, [ShardDim(0)])
    dcp.save(state, checkpoint_id=tmp / "dcp")


def as_links(source):
    """A directory of links to the files of another one, as Hugging Face's cache has them."""
    (source.parent / "links").mkdir()
    for path in [path for path in source.parent.iterdir() if path.is_file()]:
        (source.parent / "links" / path.name).symlink_to(f"../{path.name}")
    return source.parent / "links"


SOURCES = {
    "safetensors": lambda tmp, state: safetensors_file(tmp / "m.safetensors", state),
    "misaligned safetensors": lambda tmp, state: safetensors_file(tmp / "m.safetensors", state, pad=3),
    "index": as_index,
    "safetensors, from DDP": lambda tmp, state: safetensors_file(
        tmp / "m.safetensors", {f"module.{name}": tensor for name, tensor in state.items()}
    ),
    "directory with an index": lambda tmp, state: as_index(tmp, state).parent,
    "directory of safetensors": lambda tmp, state: safetensors_file(tmp / "any.safetensors", state).parent,
    "directory of links": lambda tmp, state: as_links(as_index(tmp, state)),
    "torch": as_torch,
    "torch, of before zip": lambda tmp, state: as_torch(tmp, state, _use_new_zipfile_serialization=False),
    "torch, from DDP": lambda tmp, state: as_torch(tmp, {f"module.{name}": t for name, t in state.items()}),
    "torch, nested": lambda tmp, state: as_torch(
        tmp, {"model": state, "epoch": 3, "optimizer": {0: {"m": torch.ones(2)}}}
    ),
    "torch, Lightning": lambda tmp, state: as_torch(
        tmp, {"epoch": 3, "state_dict": state, "optimizer": None}
    ),
    "DCP": as_dcp,
    "DCP, nested": lambda tmp, state: as_dcp(
        tmp, {"model": state, "epoch": 3, "optimizer": {"m": torch.ones(2)}}
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_import_from_any_source_loads_strictly_and_bit_for_bit(tmp_path, kind, capsys):
    (tmp_path / "in").mkdir()
    source = SOURCES[kind](tmp_path / "in", dict(filled(Net(), "truth").state_dict()))
    code, text, _ = command(capsys, "import", source, tmp_path / "new/checkpoints", "a/b")
    assert code == 0 and ("pickle" in text) == kind.startswith("DCP"), text
    model, checkpoint = filled(Net(), "other"), opened(tmp_path / "new/checkpoints")
    result = checkpoint.load(model, None, at("a/b"))
    assert identical(model.state_dict(), filled(Net(), "truth").state_dict())
    nested = kind in ("torch, nested", "torch, Lightning", "DCP, nested")
    assert set(result.extra_state) == ({"epoch", "optimizer"} if nested else set())
    if nested:
        assert result.extra_state["epoch"] == 3 and "epoch" in text
    code, text, _ = command(capsys, "import", source, tmp_path / "new/checkpoints", "a/b")
    assert code == 1 and "a/b" in text and "exists" in text


def test_the_optimizer_of_an_imported_torch_file_comes_back_as_extra_state(tmp_path, capsys):
    model, optimizer = small()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "m.pt")
    assert command(capsys, "import", tmp_path / "m.pt", tmp_path, "p")[0] == 0
    other, other_optimizer = small("other")
    result = opened(tmp_path).load(other, None, at())
    other_optimizer.load_state_dict(result.extra_state["optimizer"])
    assert identical(state_of(other, other_optimizer), state_of(model, optimizer))


def test_dicts_of_dicts_of_tensors_are_imported_by_dotted_names_and_tied_tensors_once(tmp_path, capsys):
    shared = torch.randn(1000)
    source = as_torch(tmp_path, {"a": {"w": shared, "b": {"0": torch.ones(2)}}, "c": shared, "lr": 0.1})
    assert command(capsys, "import", source, tmp_path, "p")[0] == 0
    state = Bag(**{"a.w": torch.zeros(1000), "a.b.0": torch.zeros(2), "c": torch.zeros(1000)})
    result = opened(tmp_path).load(state, None, at())
    assert result.extra_state == {"lr": 0.1}
    assert identical(state.state["c"], shared) and identical(state.state["a.w"], shared)
    assert [t.name for t in result.metadata.tensors if t.alias_of is not None] == ["model/c"]


def test_a_tied_tensor_may_be_imported_under_one_of_its_names_alone(tmp_path, capsys):
    state = dict(filled(Net(), "truth").state_dict())
    del state["head.weight"]  # as save_pretrained leaves it out
    assert (
        command(capsys, "import", safetensors_file(tmp_path / "m.safetensors", state), tmp_path, "p")[0] == 0
    )
    model, apart = filled(Net(), "other"), filled(Net(), "other")
    opened(tmp_path).load(model, None, at())
    assert identical(model.state_dict(), filled(Net(), "truth").state_dict())
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    assert "model/head.weight: missing" in refusal(lambda: opened(tmp_path).load(apart, None, at()))


def test_an_export_of_an_import_is_the_same_tensors_and_the_same_files_as_safetensors_writes(
    tmp_path, capsys
):
    state = {f"{number}/~@.{dtype}": pattern(dtype, number) for number, dtype in enumerate(DTYPES)}
    state = {name: tensor for name, tensor in state.items() if tensor.dtype != torch.complex128}
    state |= {"empty": torch.zeros(0), "scalar": torch.tensor(-0.0), "big": torch.randn(3 * MiB + 5)}
    source = safetensors_file(tmp_path / "m.safetensors", state)
    code, text, _ = command(capsys, "import", source, tmp_path, "p")
    assert code == 0, text
    assert (
        exported(capsys, tmp_path, "p") == exported(capsys, tmp_path, "p", "--model-only") == as_stored(state)
    )
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state, source, metadata={"format": "pt"})
    assert source.read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_an_import_reads_no_more_into_memory_than_blocks_in_flight(tmp_path):
    assert run(1, import_wide, tmp_path, group=False)[0] < 48 * MiB


def import_wide(tmp):
    safetensors_file(tmp / "m.safetensors", {"w": torch.arange(16 * MiB)})
    storage, names = ckpt.LocalStorage(tmp), itertools.count()

    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    ckpt.import_checkpoint(tmp / "m.safetensors", storage, f"p{next(names)}")
    before, most = anonymous(), 0

    def watch(told):
        nonlocal most
        most = max(most, anonymous())

    ckpt.import_checkpoint(tmp / "m.safetensors", storage, f"p{next(names)}", progress=watch)
    return most - before


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def bad_sources(tmp):
    """(what, source, exit code, a word of the message)."""
    good = safetensors_file(tmp / "good.safetensors", {"w": torch.ones(3)}).read_bytes()
    text = good[8:-12]

    def file(name, data):
        (tmp / name).write_bytes(data)
        return tmp / name

    def header(name, old, new):
        changed = text.replace(old, new)
        assert changed != text
        return file(name, struct.pack("<Q", len(changed)) + changed + good[-12:])

    def folder(name, *files):
        (tmp / name).mkdir()
        for path in files:
            shutil.copy(path, tmp / name)
        return tmp / name

    both = folder("both", tmp / "good.safetensors")
    safetensors_file(both / "again.safetensors", {"w": torch.ones(3)})
    index = as_index(folder("index"), {"a": torch.ones(1), "b": torch.ones(2)})
    beside = shutil.copytree(index.parent, tmp / "beside")
    shutil.copy(tmp / "good.safetensors", beside / "m.safetensors")
    short = shutil.copytree(index.parent, tmp / "short") / index.name
    short.write_text(index.read_text().replace('"a":', '"x":'))
    path = shutil.copytree(index.parent, tmp / "path") / index.name
    path.write_text(index.read_text().replace('"m-1.', '"../index/m-1.'))
    gone = shutil.copytree(index.parent, tmp / "gone") / index.name
    (gone.parent / "m-1.safetensors").unlink()
    torch.save({"w": Bomb()}, tmp / "bomb.pt")
    torch.save([torch.ones(2)], tmp / "list.pt")
    torch.save({"w": torch.ones(2), "x": {"w": torch.ones(2).to_sparse()}}, tmp / "sparse.pt")
    torch.save({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, tmp / "twice.pt")
    torn = folder("torn")
    (torn / ".metadata").write_bytes(b"no pickle")
    return [
        ("nothing", tmp / "nothing", 1, "nothing"), ("empty directory", folder("empty"), 2, "empty"),
        ("two files", both, 2, "w"), ("index beside a file", beside, 2, "m.safetensors"), ("wrong index", short, 1, "x"),
        ("path in an index", path, 1, "'../index/m-1.safetensors' is not the plain name"),
        ("missing part", gone, 1, "m-1.safetensors"), ("no index", file("i.index.json", b"{}"), 1, "weight_map"),
        ("empty file", file("0.safetensors", b""), 1, "0.safetensors"), ("cut", file("c.safetensors", good[:-1]), 1, "c.safet"),
        ("longer", file("l.safetensors", good + b"\0"), 1, "l.safetensors"), ("7", file("7.safetensors", good[:7]), 1, "7."),
        ("length", file("h.safetensors", struct.pack("<Q", 1 << 63) + good[8:]), 1, "header length"),
        ("dtype", header("d.safetensors", b"F32", b"F31"), 1, "F31"), ("ours", header("o.safetensors", b"F32", b"C32"), 1, "C32"),
        ("overlap", header("s.safetensors", b"[0, 12]", b"[4, 12]"), 1, "s.safet"),
        ("shape", header("z.safetensors", b"[3]", b"[4]"), 1, "'w': F32 of shape [4] in 12"),
        ("twice", header("t.safetensors", b'"w": {', b'"w": 1, "w": {'), 1, "duplicate"),
        ("pickle", tmp / "bomb.pt", 1, "weights_only"), ("text", file("x.pt", b"hello"), 1, "x.pt"),
        ("list", tmp / "list.pt", 2, "list"), ("sparse", tmp / "sparse.pt", 1, "x.w"), ("names", tmp / "twice.pt", 2, "a.b"),
        ("DCP", torn, 1, "torn"),
    ]  # fmt: skip


def test_an_import_of_what_is_damaged_or_unclear_says_so_and_saves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, source, wanted, word in bad_sources(tmp_path):
        code, text, _ = command(capsys, "import", source, tmp_path / "c", "p")
        assert code == wanted and word in text and "Traceback" not in text, (what, code, text)
        assert not (tmp_path / "exploded").exists() and not listing(tmp_path / "c"), what


def refused_by_torch(tmp):
    """Files that torch.load refuses, each for another reason, and what is to be said of them."""
    torch.jit.script(nn.Linear(2, 2)).save(tmp / "script.pt")
    torch.save({"w": torch.ones(1000)}, tmp / "cut.pt")
    (tmp / "cut.pt").write_bytes((tmp / "cut.pt").read_bytes()[:-50])
    torch.save({"w": torch.ones(2), "x": Point()}, tmp / "class.pt")
    torch.save(nn.Linear(2, 2), tmp / "module.pt")
    for name, zipped in (("bomb.pt", True), ("legacy.pt", False)):
        torch.save({"w": Bomb()}, tmp / name, _use_new_zipfile_serialization=zipped)
    with tarfile.open(tmp / "tar.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    (tmp / "text.pt").write_text("hello")
    names = {"class.pt": "it holds test_ckpt.Point", "bomb.pt": "posix.mkdir", "legacy.pt": "posix.mkdir"}
    names |= {
        "module.pt": "torch.nn.modules.linear.Linear",
        "script.pt": "TorchScript",
        "tar.pt": ".tar format",
    }
    return names | {"cut.pt": "it is cut short or damaged", "text.pt": "KeyError"}


def test_a_refused_torch_file_says_why_and_what_to_do_without_torchs_advice_to_turn_checks_off(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, word in refused_by_torch(tmp_path).items():
        with pytest.raises(CheckpointException, match=re.escape(word)) as caught:
            ckpt.import_checkpoint(tmp_path / name, ckpt.LocalStorage(tmp_path / "c"), "p")
        text = "".join(traceback.format_exception(caught.value))
        assert caught.value.type is ExceptionType.LOAD_FAILED and "save these alone" in text, name
        assert not re.search("False|safe_globals|likely succeed|trust", str(caught.value)), (name, text)
        assert not re.search("safe_globals|likely succeed", text), (name, text)
    assert not (tmp_path / "exploded").exists()


# Safetensors files of other programs, straight into a model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_load_safetensors_fills_an_fsdp2_model_as_from_pretrained_does_a_whole_one(tmp_path, kind):
    pytest.importorskip("transformers")
    transformer_of(kind).save_pretrained(tmp_path / "hf", max_shard_size="8kB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    for same, told_of in run(2, load_transformer, tmp_path, kind):
        assert all(same.values()) and len(same) > 20, same
        assert len(told_of) == 1 and "nothing was verified" in told_of[0]


def load_transformer(rank, world_size, tmp, kind):
    import transformers

    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp / "hf").state_dict()
    model = filled(transformer_of(kind), "other")
    for block in model.model.layers if kind == "llama" else model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    result = ckpt.load_safetensors(model, tmp / "hf")
    found = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    assert found.keys() == wanted.keys() and (result.source_world_size, result.target_world_size) == (1, 2)
    return {name: identical(tensor.detach(), wanted[name]) for name, tensor in found.items()}, result.warnings


def test_load_safetensors_reads_on_each_rank_little_more_than_its_own_bytes(tmp_path):
    layers = filled(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), "truth")
    path = safetensors_file(tmp_path / "m.safetensors", dict(layers.state_dict()))
    for count in run(2, load_counted, tmp_path):
        assert 0.5 < count / path.stat().st_size < 0.65


def load_counted(rank, world_size, tmp):
    layers = filled(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), "other")
    for layer in layers:
        fully_shard(layer)
    st.os = Seam()
    ckpt.load_safetensors(layers, tmp / "m.safetensors")
    wanted = filled(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), "truth").state_dict()
    assert all(torch.equal(t.full_tensor(), wanted[name]) for name, t in layers.state_dict().items())
    return sum(op.size for op in st.os.log if op.call == "pread")


def safetensors_state():
    return {"w": torch.randn(3, 5), "b": torch.arange(4)}


def misfit(tmp, model, **options):
    """What load_safetensors of `safetensors_state` into `model` raises, which leaves `model` as it is."""
    before = copy.deepcopy(model)
    kind, _, message = told(lambda: ckpt.load_safetensors(model, tmp / "m.safetensors", **options))
    assert identical(model, before) and kind in ("VALIDATION_FAILED", "ValueError"), (kind, message)
    return message


def test_load_safetensors_refuses_what_does_not_fit_or_warns_of_it_and_casts(tmp_path):
    state = safetensors_state()
    path = safetensors_file(tmp_path / "m.safetensors", state)
    fits = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert "model/x: missing" in misfit(tmp_path, {**fits, "x": torch.zeros(1)})
    assert "model/b: in the checkpoint, but not here" in misfit(tmp_path, {"w": fits["w"]})
    assert "dtype F32 in the checkpoint, BF16 here" in misfit(tmp_path, {**fits, "w": fits["w"].bfloat16()})
    for strict in (True, False):
        assert "shape [3, 5] in the" in misfit(tmp_path, {**fits, "w": torch.zeros(5, 3)}, strict=strict)
    assert "model" in misfit(tmp_path, [1])
    loose = {"w": torch.zeros(3, 5, dtype=torch.bfloat16), "x": torch.ones(1)}
    result = ckpt.load_safetensors(loose, path, strict=False)
    assert identical(loose, {"w": state["w"].bfloat16(), "x": torch.ones(1)})
    for word in ("nothing was verified", "model/x: missing", "model/b: in the", "dtype F32"):
        assert any(word in warning for warning in result.warnings), word


def test_load_safetensors_renames_by_a_mapping_or_a_function_and_leaves_out_what_becomes_none(tmp_path):
    state = safetensors_state()
    path = safetensors_file(tmp_path / "m.safetensors", state)
    for rename in ({"w": "layer.w", "b": None}, lambda name: {"w": "layer.w"}.get(name)):
        model = {"layer.w": torch.zeros(3, 5)}
        ckpt.load_safetensors(model, path, rename=rename)
        assert identical(model["layer.w"], state["w"])
    assert "the name 'b', one of them from 'b'" in misfit(tmp_path, dict(state), rename={"w": "b"})

    def fails(name):
        raise KeyError("no such layer")

    with pytest.raises(CheckpointException, match="no such layer"):
        ckpt.load_safetensors(dict(state), path, rename=fails)


def test_load_safetensors_takes_files_whose_tensors_are_not_aligned_and_empty_ones(tmp_path):
    big = torch.randn(3 * BLOCK // 8 + 3)  # more than a block
    state = {
        "a": torch.ones(3, dtype=torch.uint8),
        "big": big,
        "none": torch.zeros(0, 2),
        "half": torch.ones(3).half(),
    }
    state |= {"z": torch.randn(5).double()}
    path = safetensors_file(tmp_path / "m.safetensors", state, pad=3)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    found["big"] = torch.zeros(len(big), 2)[:, 0]  # strided, so that it is filled box by box
    result = ckpt.load_safetensors(found, path)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert {shard.file for shard in result.metadata.shards} == {path.name}
    ckpt.load_safetensors({}, safetensors_file(tmp_path / "0.safetensors", {}))


def test_load_safetensors_follows_the_links_of_a_snapshot_in_hugging_faces_cache(tmp_path):
    state = dict(filled(Net(), "truth").state_dict())
    (tmp_path / "blobs").mkdir()
    as_index(tmp_path / "blobs", state)
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (snapshot / blob.name).symlink_to(f"../../blobs/{number}")
        blob.rename(blob.with_name(str(number)))
    for source in (snapshot, snapshot / "m.safetensors.index.json"):
        model = filled(Net(), "other")
        ckpt.load_safetensors(model, source)
        assert identical(model.state_dict(), filled(Net(), "truth").state_dict())


def test_load_safetensors_raises_on_all_ranks_what_fails_on_one(tmp_path):
    state = {name: torch.randn(8, 4) for name in ("a", "b")}
    for place in ("0", "1"):
        (tmp_path / place).mkdir()
        as_index(tmp_path / place, state)
    outcomes = run(2, load_with_faults, tmp_path)
    assert outcomes[0] == outcomes[1]
    read, cut, other = outcomes[0]
    assert read[:2] == ("STORAGE_ERROR", 1) and "tensors being loaded are undefined" in read[2]
    assert cut[:2] == ("CORRUPTED_CHECKPOINT", 1) and "m-1.safetensors" in cut[2]
    assert other[0] == "ValueError" and "disagree about the headers" in other[2]


def load_with_faults(rank, world_size, tmp):
    """What a disk that fails in L4, a file cut short, and another file do on rank 1."""
    model = {
        name: distribute_tensor(torch.zeros(8, 4), init_device_mesh("cpu", (2,)), [ShardDim(0)])
        for name in ("a", "b")
    }
    source, outcomes = tmp / str(rank), []

    def load():
        outcomes.append(told(lambda: ckpt.load_safetensors(model, source)))

    def broken(op):
        if rank == 1 and op.call == "pread" and op.offset > 8:
            fail(errno.EIO)(op)

    st.os = Seam(broken)
    load()
    st.os = os
    part = source / "m-1.safetensors"
    data = part.read_bytes()
    if rank == 1:
        part.write_bytes(data[:-1])
    load()
    if rank == 1:
        safetensors_file(part, {"b": torch.randn(4, 8)})
    load()
    part.write_bytes(data)
    ckpt.load_safetensors(model, source)
    return outcomes


def test_a_rank_that_is_stopped_in_a_checker_does_not_hide_what_failed_on_the_other(tmp_path):
    for outcome, _, message in run(2, load_with_checkers, tmp_path):
        assert outcome == "VALIDATION_FAILED" and "bad on rank 1" in message, (outcome, message)


def load_with_checkers(rank, world_size, tmp):
    class Checker:
        name = "checker"

        def check_integrity(self, reader, shard):
            while rank == 0:
                time.sleep(0.01)
                reader.meter.tick()
            return ckpt.ValidationResult(["bad on rank 1"])

    checkpoint = opened(tmp, integrity_checkers=[Checker()], default_timeout=20.0)
    state = {"w": distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [ShardDim(0)])}
    checkpoint.save(state, None, "p")
    return told(lambda: checkpoint.load(state, None, "p"))


# What differs between two checkpoints


def kinds(capsys, tmp, *words):
    """Exit code, and {name: (kind, what, largest change)}, of diff."""
    code, _, text = command(capsys, "diff", tmp, *words, "--json")
    return code, {d["name"]: (d["kind"], d["what"], d["largest_change"]) for d in json.loads(text or "[]")}


def test_diff_names_what_was_added_removed_and_changed_and_how_much(tmp_path, capsys):
    checkpoint = opened(tmp_path)
    old = dict(
        same=torch.ones(5),
        gone=torch.ones(2),
        wide=torch.ones(3),
        typed=torch.ones(4),
        moved=torch.zeros(2 * MiB),
    )
    old |= dict(
        nan=torch.tensor([1.0, math.nan]),
        ints=torch.tensor([1, 2]),
        z=torch.tensor([3 + 4j]),
        far=torch.ones(2),
    )
    new = {**old, "wide": torch.ones(4), "typed": torch.full((4,), 1.5).bfloat16(), "new": torch.ones(1)}
    new |= dict(
        moved=old["moved"].index_fill(0, torch.tensor([MiB]), -0.25), nan=torch.tensor([math.nan, math.nan])
    )
    new |= dict(ints=torch.tensor([1, -5]), z=torch.tensor([0j]), far=torch.tensor([1.0, math.inf]))
    del new["gone"]
    checkpoint.save(
        Bag(**old), None, to("a", include_rng_state=False), extra_state={"step": 1, "day": 1, "lr": 0.5}
    )
    checkpoint.save(
        Bag(**new), None, to("b", include_rng_state=False), extra_state={"step": 20, "day": 2, "lr": 0.5}
    )
    wanted = {
        "model/gone": ("removed", "F32 [2]", None), "model/new": ("added", "F32 [1]", None),
        "model/wide": ("changed", "F32 [3] -> F32 [4]", None), "model/typed": ("changed", "F32 [4] -> BF16 [4]", 0.5),
        "model/moved": ("changed", "value", 0.25), "model/ints": ("changed", "value", 7.0), "model/z": ("changed", "value", 5.0),
        "model/far": ("changed", "value", math.inf), "extra/step": ("changed", "value", None),
        "extra/day": ("changed", "value", None),
    }  # fmt: skip
    code, found = kinds(capsys, tmp_path, "a", "b", "--values")
    kind, what, change = found.pop("model/nan")
    assert code == 1 and found == wanted and (kind, what) == ("changed", "value") and math.isnan(change)
    code, found = kinds(capsys, tmp_path, "a", "b")
    assert code == 1 and {n: (k, w) for n, (k, w, _) in found.items()} == {
        n: (k, w) for n, (k, w, _) in {**wanted, "model/nan": ("changed", "value", 0)}.items()
    }
    assert all(change is None for *_, change in found.values())
    code, text, _ = command(capsys, "diff", tmp_path, "a", "b", "--values")
    assert re.search(r"^model/gone +removed +F32 \[2\]$", text, re.M) and re.search(
        r"^model/moved +changed +value +0.25$", text, re.M
    )
    assert command(capsys, "diff", tmp_path, "a", "a") == (0, "", "")


def test_diff_of_two_layouts_of_the_same_state_is_nothing(saved, capsys):
    base = saved("fsdp2tp2")
    for form in FORMATS:
        _, found = kinds(capsys, saved("fsdp3"), "fsdp3/MULTI_SHARD", f"fsdp2tp2/{form.name}")
        assert base == saved("fsdp3") and all(name.startswith("rng/state~r") for name in found)


# Shown on a terminal, or not


def on_terminal(columns, *words):
    """Exit code and screen output of the command, on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    line = [sys.executable, str(HERE / "ckpt.py"), *map(str, words)]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(ours, 1 << 16):
            text += data
    os.close(ours)
    return process.wait(HANG_S), text.decode()


def test_show_lists_each_tensor_with_its_dtype_shape_size_and_pieces(two_checkpoints, capsys):
    opened(two_checkpoints).save_model_only(nn.ModuleDict({"block": nn.Linear(500, 1000)}), to("tree"))
    code, text, _ = command(capsys, "show", two_checkpoints, "tree")
    assert code == 0 and "\x1b" not in text
    assert re.search(r"^model/block\.weight +F32 +1000x500 +1 +2\.00 MB$", text, re.M), text


def test_the_json_of_show_is_as_documented(two_checkpoints, capsys):
    told = json.loads(command(capsys, "show", two_checkpoints, "runs/one", "--json")[2])
    keys = "prefix save_id sequence version timestamp world_size format compression torch_version size_bytes"
    assert list(told) == [*keys.split(), "custom_metadata", "shards", "tensors"]
    assert list(told["shards"][0]) == ["file", "bytes"]
    (tensor,) = [tensor for tensor in told["tensors"] if tensor["name"] == "model/0.weight"]
    documented = dict(
        name="model/0.weight", dtype="F32", shape=[5, 3], rank=None, pieces=1, bytes=60, tied_to=None
    )
    assert tensor == documented and list(tensor) == list(documented)
    documented = (HERE / "README.md").read_text()
    assert all(f"`{key}`" in documented for key in [*told, *tensor])


@pytest.mark.parametrize("words", [["verify"], ["export"]])
def test_long_commands_show_rate_and_time_left_on_a_terminal_alone(tmp_path, words, capsys):
    opened(tmp_path).save(Bag(w=torch.randn(32 * MiB)), None, to())
    words = [*words, tmp_path, "p", *([tmp_path / "m.safetensors"] if words == ["export"] else [])]
    code, text = on_terminal(100, *words)
    line = rf"{words[0]} p +\d+ %  [\d.]+ \wB of 134\.\d\d MB  [\d.]+ \wB/s  \d+:\d\d left  \[#* *\]"
    assert code == 0 and re.search(line, text), text
    assert (
        text.rstrip()
        .rpartition("\r")[2]
        .lstrip()
        .startswith("p: ok" if words[0] == "verify" else str(tmp_path)[:20])
    ), "it is gone"
    code, text, _ = command(capsys, *words)
    assert code == 0 and "B/s" not in text and "\r" not in text


def test_a_reader_of_the_output_may_stop_early(two_checkpoints):
    line = [sys.executable, str(HERE / "ckpt.py"), "show", str(two_checkpoints), "runs/one"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(HANG_S)) == (b"", 0)


MISUSE = [
    "export {} two {}/model.bin", "export {} ../x {}/m.safetensors", "export {} two {}/m.safetensors --dtype int8",
    "export {} two {}/m.safetensors --max-shard-size big", "export {} two {}/m.safetensors --max-shard-size 0",
    "import {} {} ../x", "import {}/m.safetensors {}", "diff {} two", "show {}/nowhere two", "",
]  # fmt: skip


@pytest.mark.parametrize("words", MISUSE)
def test_misuse_exits_2_and_writes_nothing(two_checkpoints, words, capsys):
    before = listing(two_checkpoints)
    try:
        code = ckpt.main([word.format(two_checkpoints) for word in words.split()])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and capsys.readouterr().err and listing(two_checkpoints) == before


# ---- the README's format: enough to write a reader from -----------------------------------------------------------------


class Stranger:
    """A checkpoint as somebody reads it who has the README's section "On disk" and a standard library, and nothing else."""

    SIZES: ClassVar = {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "U16": 2,
        "I16": 2,
        "F16": 2,
        "BF16": 2,
        "U32": 4,
        "I32": 4,
        "F32": 4,
    }
    SIZES |= {"U64": 8, "I64": 8, "F64": 8, "C64": 8, "C128": 16, "C32": 4, "JSON": 1}

    def __init__(self, directory, prefix):
        with open(f"{directory}/{prefix}.metadata.json", "rb") as file:
            text = file.read()
        assert text[-21:-10] == b',"crc32":"' + text[-11:-10] and text[-3:] == b'"}\n'
        assert int(text[-11:-3], 16) == zlib.crc32(text[:-21])
        self.record = json.loads(text)
        assert self.record["format_version"] == 2
        self.files = []  # of each: its data, and where the entries begin and end
        for name, length, header_bytes, crc in self.record["files"]:
            assert name.startswith(self.record["save_id"])
            with open(f"{directory}/{prefix}/{name}", "rb") as file:
                self.files.append(self.file(file.read(), length, header_bytes, crc))

    @staticmethod
    def file(content, length, header_bytes, crc):
        (n,) = struct.unpack("<Q", content[:8])
        assert len(content) == length and 8 + n == header_bytes and header_bytes % 4096 == 0
        assert f"{zlib.crc32(content[:header_bytes]):08x}" == crc
        header, data = json.loads(content[8:header_bytes]), content[header_bytes:]
        assert list(header)[0] == "__metadata__"
        metadata = header.pop("__metadata__")
        assert list(metadata) == ["format", "ckpt_version", "unit_bytes", "crc32"]
        assert (metadata["format"], metadata["ckpt_version"], metadata["unit_bytes"]) == ("pt", "2", "262144")
        units = [data[at : at + 262144] for at in range(0, len(data), 262144)]
        assert metadata["crc32"] == "".join(f"{zlib.crc32(unit):08x}" for unit in units)
        return data, {name: tuple(entry["data_offsets"]) for name, entry in header.items()}

    @staticmethod
    def column(text):
        differences = struct.iter_unpack("<q", zlib.decompress(base64.b64decode(text)))
        total, numbers = 0, []
        for (difference,) in differences:
            total += difference
            numbers.append(total)
        return numbers

    @staticmethod
    def expand(stored, size, length):
        """The row-major bytes of a piece of `length` bytes, with elements of `size`, from its stored ones."""
        if len(stored) == length:
            return stored
        planes = stored[0]
        assert planes in (1, size)
        lengths = struct.unpack(f"<{planes}I", stored[1 : 1 + 4 * planes])
        share, at, plain = length // planes, 1 + 4 * planes, bytearray(length)
        for plane, stored_length in enumerate(lengths):
            chunk = stored[at : at + stored_length]
            at += stored_length
            plain[plane::planes] = chunk if stored_length == share else zlib.decompress(chunk)
        assert at == len(stored) and len(plain) == length
        return bytes(plain)

    def entry(self, name, low, count, shape, rank, in_model):
        """What the name of a piece's entry must be."""
        if in_model:
            return name.removeprefix("model/")
        name = name.replace("~", "~0").replace("@", "~1")
        name += "" if count == shape else "@" + ",".join(map(str, low))
        return name if rank is None else f"{name}~r{rank}"

    def tensors(self):
        """(name, rank or None) -> (dtype, shape, row-major bytes) of every tensor, whole."""
        rows, pieces = self.record["tensors"], self.record["pieces"]
        whole = [bytearray(math.prod(shape) * self.SIZES[code]) for _, code, shape, _, _ in rows]
        which, file, begin, length = (
            self.column(pieces[key]) for key in ("tensor", "file", "begin", "length")
        )
        offset, size = ([self.column(text) for text in pieces[key]] for key in ("offset", "size"))
        assert which == sorted(which) and len(which) == pieces["count"]
        self.compressed = []  # the stored lengths of compressed pieces, and the lengths of their boxes
        for row, index in enumerate(which):
            name, code, shape, rank, tied = rows[index]
            item, ndim = self.SIZES[code], len(shape)
            low, count = ([column[row] for column in columns] for columns in (offset, size))
            assert not any(low[ndim:]) and set(count[ndim:]) <= {1} and tied is None
            low, count, end = low[:ndim], count[:ndim], begin[row] + length[row]
            data, entries = self.files[file[row]]
            in_model = self.record["files"][file[row]][0].endswith(".model.safetensors")
            assert entries[self.entry(name, low, count, shape, rank, in_model)] == (begin[row], end)
            if length[row] < math.prod(count) * item:
                self.compressed.append((length[row], math.prod(count) * item))
            data = self.expand(data[begin[row] : end], item, math.prod(count) * item)
            line = (count[-1] if count else 1) * item
            for number in range(len(data) // line):  # a line of the last dimension at a time
                rest, at, stride = number, low[-1] if low else 0, 1
                for dim in range(len(shape) - 2, -1, -1):
                    stride *= shape[dim + 1]
                    at += (low[dim] + rest % count[dim]) * stride
                    rest //= count[dim]
                whole[index][at * item : at * item + line] = data[number * line : (number + 1) * line]
        return {
            (name, rank): (code, shape, bytes(whole[row if tied is None else tied]))
            for row, (name, code, shape, rank, tied) in enumerate(rows)
        }

    def value(self, node):
        """A value, with what its own language has for each kind."""
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if not any(key.startswith("$") for key in node):
            return {key: self.value(item) for key, item in node.items()}
        (kind, body), *metadata = node.items()
        assert not metadata or metadata[0][0] == "metadata"
        if kind in ("$dict", "$OrderedDict", "$Counter"):
            return {self.value(key): self.value(item) for key, item in body}
        readers = {
            "$tuple": lambda: tuple(self.value(body)),
            "$Size": lambda: tuple(body),
            "$set": lambda: set(self.value(body)),
            "$frozenset": lambda: frozenset(self.value(body)),
            "$int": lambda: int(body, 16),
            "$float": lambda: struct.unpack(">d", bytes.fromhex(body))[0],
            "$bytes": lambda: base64.b64decode(body),
            "$str": lambda: base64.b64decode(body).decode("utf-8", "surrogatepass"),
            "$ndarray": lambda: ("array", body[0], body[1], base64.b64decode(body[2])),
            "$scalar": lambda: ("scalar", body[0], body[1], base64.b64decode(body[2])),
        }
        return readers[kind]() if kind in readers else (kind, body)  # tensor, dtype, device, datetime: a name


def documented_state(rank):
    """Every kind of thing that the README's tables name, as `rank` has it before anything is sharded."""
    big = torch.arange(2_600_000, dtype=torch.float32).view(1300, 2000)  # several blocks
    tied, noise = torch.arange(6).view(2, 3), torch.Generator().manual_seed(1)
    model = {
        "big": big, "noise": torch.randn(40_000, generator=noise), "tied": tied, "again": tied, "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64), "flag": torch.tensor([True, False, True]),
        "half": torch.randn(7, 3, generator=noise).bfloat16(), "strided": torch.arange(24.0).view(4, 6).T,
        "complex": torch.randn(3, 2, dtype=torch.complex128, generator=noise), "own~@name": torch.ones(1, 1, 1, 2),
        "apart": torch.full((2, 2), float(rank)), "config": {"depth": 3, "name": "ü", 5: (1.5, None)},
    }  # fmt: skip
    extra = {
        "plain": [1, -2.5, "x", None, True], "tuple": (1, (2,)), "large": -(2**70), "odd": [math.inf, -math.inf],
        "set": {3, 1}, "bytes": b"\0\xff", "torn": "\ud83d\ude00", "keys": {(1, 2): "a"}, "counter": Counter("aab"),
        "place": {"rank": rank}, "array": np.arange(3, dtype=">i2"), "size": torch.Size([2, 3]), "dtype": torch.bfloat16,
        "nested": {"deep": [torch.arange(3)]}, "frozen": frozenset("a"),
    }  # fmt: skip
    return model, extra


def documented_layers(salt="truth"):
    return filled(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), salt)


def save_documented(rank, world_size, tmp, form, level):
    layers = documented_layers()
    fully_shard(layers[0])  # 7 rows over 2 ranks: uneven
    fully_shard(layers)
    optimizer = stepped(layers)
    model, extra = documented_state(rank)
    torch.manual_seed(rank)
    random.seed(rank)
    options = to(format=form, compression_level=level, custom_metadata={"note": [1, 2]})
    opened(tmp).save({"layers": layers, "bag": Bag(**model)}, optimizer, options, extra_state=extra)


@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST, CompressionLevel.MAXIMUM])
@pytest.mark.parametrize("form", FORMATS)
def test_a_reader_written_from_the_readme_alone_reads_every_format_bit_for_bit(ram, form, level):
    run(2, save_documented, ram, form, level)
    found = Stranger(ram, "p")
    assert found.record["custom_metadata"] == {"note": [1, 2]} and found.record["format"] == form.value
    tensors = found.tensors()
    values = {
        key: found.value(json.loads(data)) for key, (dtype, _, data) in tensors.items() if dtype == "JSON"
    }
    assert max((plain for _, plain in found.compressed), default=0) <= 4194304
    own_files = form is not CheckpointFormat.SINGLE_FILE
    assert bool(found.compressed) == (level is not CompressionLevel.NONE and own_files)
    whole_file = {"single_file": "model/bag.empty", "consolidated": "bag.empty"}.get(form.value)
    assert whole_file is None or whole_file in found.files[0][1], "an empty tensor has an entry there"
    layers = documented_layers()
    optimizer = stepped(layers)
    expected = {(f"model/layers.{name}", None): tensor for name, tensor in layers.state_dict().items()}
    for (name, _), state in zip(layers.named_parameters(), optimizer.state_dict()["state"].values()):
        expected |= {(f"optimizer/layers.{name}/{key}", None): tensor for key, tensor in state.items()}
    for rank in (0, 1):
        model, extra = documented_state(rank)
        config, apart = model.pop("config"), model.pop("apart")
        expected |= {(f"model/bag.{key}", None): tensor for key, tensor in model.items()}
        expected["model/bag.apart", rank] = apart
        generator = torch.Generator().manual_seed(rank).get_state().numpy().tobytes()
        assert values["rng/state", rank]["torch"] == generator
        assert values["rng/state", rank]["random"] == random.Random(rank).getstate()
        assert values["extra/place", rank] == extra["place"]
        expected["extra/nested.deep.0", None] = extra["nested"]["deep"][0]
    codes = {
        torch.float32: "F32",
        torch.float64: "F64",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.bool: "BOOL",
    }
    codes[torch.complex128] = "C128"
    expected = {key: (codes[t.dtype], list(t.shape), raw(t)) for key, t in expected.items()}
    assert {key: found for key, found in tensors.items() if found[0] != "JSON"} == expected
    assert values["model-values/bag.config", None] == config
    group = values["optimizer/state", None]["groups"][0]
    assert group["params"] == [f"layers.{name}" for name, _ in layers.named_parameters()]
    assert group["options"]["betas"] == (0.9, 0.999)
    for key in ("plain", "tuple", "large", "odd", "set", "bytes", "torn", "keys", "counter", "frozen"):
        assert identical(values[f"extra/{key}", None], dict(extra[key]) if key == "counter" else extra[key])
    assert values["extra/array", None] == ("array", ">i2", [3], np.arange(3, dtype=">i2").tobytes())
    assert values["extra/size", None] == (2, 3) and values["extra/dtype", None] == ("$dtype", "bfloat16")
    assert values["extra/nested", None] == {"deep": [("$tensor", "extra/nested.deep.0")]}


def test_the_worked_examples_of_the_readme_are_what_is_written(tmp_path):
    readme = (HERE / "README.md").read_text()
    opened(tmp_path).save_model_only(Bag(w=torch.tensor([1.0, 2.0])), to(custom_metadata={"epoch": 3}))
    (path,) = shards(tmp_path)
    dump = re.findall(r"^0000([0-9a-f]{4})  ((?:[0-9a-f]{2} +)+)", readme, re.MULTILINE)
    content = path.read_bytes()
    assert len(dump) == 3 and len(content) == 4096 + 8
    for place, digits in dump:
        assert content[int(place, 16) :].startswith(bytes.fromhex(digits))
    assert f"CRC32 {zlib.crc32(content[4096:]):08x}" in readme
    (example,) = re.findall(r"^```json\n(\{\"format_version.*\n)```", readme, re.MULTILINE)
    assert example.endswith(f',"crc32":"{zlib.crc32(example[:-21].encode()):08x}"}}\n')
    written, shown = (
        expanded(json.loads(text)) for text in ((tmp_path / "p.metadata.json").read_bytes(), example)
    )
    assert list(written) == list(shown)
    for key in ("save_id", "torch_version", "timestamp", "crc32"):
        written[key] = shown[key]
    written["files"][0][0] = shown["save_id"] + written["files"][0][0][8:]
    assert written == shown


# ---- recipes: the README names these, and each is ready to copy -------------------------------------------------------


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # on GPUs "cuda"
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


SHARDINGS = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": fully_shard,
    "tp": tensor_parallel,
}


def train_in_any_layout(layout, steps):
    """Continue from the newest checkpoint, of whatever layout and number of ranks; returns the step reached."""
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
    """A callback for Lightning with any strategy: it saves after each epoch, and resumes before the first step.

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
    """An object of an object store: read in ranges; a new one is collected in memory, and written by `sync`."""

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

    Writing the record, last and in one request, is the commit. What a file system has and this lacks: files that
    ranks share (save as MULTI_SHARD), and a rename that fails once the ranks have abandoned a save (do not reuse
    prefixes).
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


# ---- the recipes do what they say ---------------------------------------------------------------------------------------


def test_every_recipe_that_the_readme_names_is_here_or_there():
    text = (HERE / "README.md").read_text().partition("## Recipes")[2].partition("\n## ")[0]
    named = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    section = (HERE / "test_ckpt.py").read_text().partition("\n# ---- recipes:")[2].partition("\n# ---- ")[0]
    defined = re.findall(r"^(?:def|class) (\w+)", section, re.MULTILINE)
    assert len(named) >= 5 and {name for row in named for name in re.findall(r"`(\w+)`", row)} <= set(defined)


def test_one_loop_continues_in_any_layout_from_what_any_other_has_saved(tmp_path):
    steps, losses = 0, []
    for layout, ranks in (("plain", 1), ("ddp", 2), ("fsdp2", 2), ("tp", 2), ("ddp", 3), ("plain", 1)):
        told = run(ranks, follow_the_recipe, tmp_path, layout)
        steps += 3
        assert told == [steps] * ranks
    (tmp_path / "whole").mkdir()
    run(1, follow_the_recipe, tmp_path / "whole", "plain", steps)
    for directory in (tmp_path, tmp_path / "whole"):
        linear = {name: torch.zeros(shape) for name, shape in (("0.weight", (64, 8)), ("2.bias", (1,)))}
        bag = Bag(**linear)
        opened(directory / "ckpts").load(bag, None, at(f"step_{steps}", strict_mode=False))
        losses.append(torch.cat([tensor.reshape(-1) for tensor in bag.state.values()]))
    assert torch.allclose(*losses, rtol=1e-4, atol=1e-6)  # other layouts add in another order


def follow_the_recipe(rank, world_size, tmp, layout, steps=3):
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


class TwoParts(nn.Module):
    """A backbone and a head."""

    def __init__(self, salt, head=2):
        super().__init__()
        self.backbone, self.head = filled(nn.Linear(3, 5), salt), filled(nn.Linear(5, head), salt)


def test_a_renamed_subset_of_a_checkpoint_fills_the_backbone_for_fine_tuning(tmp_path):
    run(2, save_an_encoder, tmp_path)
    for found in run(3, fine_tune_it, tmp_path):
        assert found == (True, True, True)


def save_an_encoder(rank, world_size, tmp):
    model = nn.ModuleDict({"encoder": filled(nn.Linear(3, 5), "truth"), "decoder": nn.Linear(5, 4)})
    fully_shard(model["encoder"])
    opened(tmp).save(model, stepped(model["encoder"], lr=0.0), to())


def fine_tune_it(rank, world_size, tmp):
    model, same = TwoParts("other"), TwoParts("other")
    fully_shard(model.backbone)
    warnings = recipes().fine_tune(opened(tmp), "p", model)
    loaded = whole(model.backbone.weight) == whole(filled(nn.Linear(3, 5), "truth").weight)
    untouched = identical(state_of(model.head), state_of(same.head))
    return loaded, untouched, any("decoder.weight" in warning for warning in warnings)


def test_the_optimizer_of_an_imported_file_loads_into_an_fsdp2_optimizer(tmp_path):
    model = documented_layers()
    optimizer = stepped(model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    storage = ckpt.LocalStorage(tmp_path / "c")
    ckpt.import_checkpoint(tmp_path / "old.pt", storage, "old")
    other = documented_layers("other")
    whole_prefix = recipes().with_optimizer(
        ckpt.DistributedCheckpoint(ckpt.LocalCoordinator(), storage),
        "old",
        other,
        torch.optim.AdamW(other.parameters()),
    )
    truth = [raw(t) for s in optimizer.state_dict()["state"].values() for t in s.values()]
    for found in run(2, load_the_optimizer, tmp_path / "c", whole_prefix):
        assert found == truth


def load_the_optimizer(rank, world_size, tmp, prefix):
    model = documented_layers("third")
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    opened(tmp).load(model, optimizer, at(prefix, load_rng_state=False))
    return [whole(t) for s in optimizer.state_dict()["state"].values() for t in s.values()]


def test_retain_keeps_every_thousandth_step_and_the_best_five(tmp_path):
    options = dataclasses.replace(
        recipes().options, storage=ckpt.StorageOptions("local", {"base_path": str(tmp_path)})
    )
    checkpoint = ckpt.DistributedCheckpointFactory.create(options=options)
    losses = {step: abs(step - 1450) for step in range(100, 2400, 100)}
    for step, loss in losses.items():
        metadata = {"step": step, "loss": loss}
        checkpoint.save(Bag(w=torch.ones(1)), None, to(f"step_{step}", custom_metadata=metadata))
    kept = {info.custom_metadata["step"] for info in checkpoint.list_checkpoints()}
    assert kept == {1000, 2000, 2300} | set(sorted(losses, key=losses.get)[:5])  # 2300: the new one


def test_fsdp1_goes_through_the_stateful_of_the_readme_to_any_number_of_ranks(tmp_path):
    (lr, truth), again = run(2, save_fsdp1, tmp_path)
    assert again == (lr, truth) and len(truth) == 4 * 3
    for ranks in (2, 3, 1):
        assert run(ranks, load_fsdp1, tmp_path) == [(0.125, truth)] * ranks


def start_fsdp1(salt, lr):
    mesh, model = (
        init_device_mesh("cpu", (dist.get_world_size(),)),
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)),
    )
    cpu, policy = torch.device("cpu"), ModuleWrapPolicy({nn.Linear})
    model = FullyShardedDataParallel(
        filled(model, salt), device_mesh=mesh, device_id=cpu, auto_wrap_policy=policy, use_orig_params=True
    )
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def whole_fsdp1(stateful, optimizer):
    """The options that count, and all tensors whole, as bytes by name."""
    state = stateful.state_dict()
    tensors = {
        f"{key}.{slot}": t for key, slots in state["optimizer"]["state"].items() for slot, t in slots.items()
    }
    tensors = {name: t for name, t in tensors.items() if not name.endswith("step")} | state["model"]
    return optimizer.param_groups[0]["lr"], {name: whole(t) for name, t in tensors.items()}


def save_fsdp1(rank, world_size, tmp):
    model, optimizer = start_fsdp1("truth", 0.125)
    for _ in range(2):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    stateful = recipes().FSDP1(model, optimizer)
    opened(tmp).save(nn.Module(), None, to(), extra_state={"fsdp": stateful})
    return whole_fsdp1(stateful, optimizer)


def load_fsdp1(rank, world_size, tmp):
    model, optimizer = start_fsdp1("other", 0.5)
    stateful = recipes().FSDP1(model, optimizer)
    opened(tmp).load(nn.Module(), None, at(load_rng_state=False), extra_state={"fsdp": stateful})
    return whole_fsdp1(stateful, optimizer)


@contextlib.contextmanager
def inside(directory):
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("stop", [7, 10])  # in the middle of an epoch, and at its end
def test_a_trainer_of_hugging_face_resumes_with_the_losses_steps_and_weights_of_an_uninterrupted_run(
    tmp_path, stop
):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == self.step

    def fit(directory, step):
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=0.2)
        model = transformers.LlamaForCausalLM(config)
        data = [
            {"input_ids": torch.arange(8) * n % 32, "labels": torch.arange(8)} for n in range(40)
        ]  # shuffled
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        saving = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 4}
        arguments = transformers.TrainingArguments(str(tmp_path / directory), **quiet, **saving)
        stopper = Stop()
        stopper.step = step
        trainer = ckpt_trainer()(model, arguments, train_dataset=data, callbacks=[stopper])
        trainer.train(trainer.newest())
        keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        logged = [[line.get(key) for key in keys] for line in trainer.state.log_history[:-1]]
        reached = trainer.state.global_step, trainer.state.epoch
        return reached, logged, state_of(model, trainer.optimizer), trainer.lr_scheduler.state_dict()

    uninterrupted = fit("whole", None)
    assert fit("stopped", stop)[0][0] == stop
    resumed = fit("stopped", None)
    assert resumed[0] == (20, 4.0) and len(resumed[1]) == 20 and identical(resumed, uninterrupted)


LIGHTNING_JOB = """
import os, sys
import lightning, torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from test_ckpt import ckpt, lightning_callback, whole

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
        self.losses = []
    def configure_model(self):
        if sharded:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, index):
        loss = self.layers(batch[0]).square().mean()
        self.losses.append((self.trainer.global_step, self.current_epoch, index, loss.item()))
        return loss
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

class Stop(lightning.Callback):
    def __init__(self, step):
        self.step = step
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

def fit(directory, step=0):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.arange(320.0).view(40, 8) / 320)
    data = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    callbacks = [lightning_callback()(ckpt.DistributedCheckpoint(storage=directory)), Stop(step)]
    how = {"strategy": ModelParallelStrategy(ranks, 1)} if sharded else {}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", devices=ranks, callbacks=callbacks, enable_checkpointing=False, **how, **quiet
    )
    module = Module()
    try:
        trainer.fit(module, data)
    except SystemExit:
        return trainer.global_step
    rates = [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs]
    moments = [whole(t) for s in trainer.optimizers[0].state.values() for t in s.values()]
    return module.losses, [whole(t) for t in module.state_dict().values()], moments, rates

sharded, ranks = sys.argv[1] == "fsdp2", int(os.environ.get("WORLD_SIZE", 1))
per_epoch = 10 // ranks
uninterrupted = fit("whole")
assert fit("stopped", 2 * per_epoch + 1) == 2 * per_epoch + 1
resumed = fit("stopped")
assert len(uninterrupted[0]) == 4 * per_epoch and resumed[0] == uninterrupted[0][2 * per_epoch :]
assert resumed[1:] == uninterrupted[1:]
print("resumed equally")
"""


@pytest.mark.parametrize("how", ["one device", "fsdp2"])
def test_lightning_resumes_by_the_callback_as_if_it_had_never_stopped(tmp_path, how):
    pytest.importorskip("lightning")
    (tmp_path / "job.py").write_text(LIGHTNING_JOB)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    launcher = [*TORCHRUN, "2"] if how == "fsdp2" else [sys.executable]
    done = subprocess.run(
        [*launcher, "job.py", how],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0 and "resumed equally" in done.stdout, done.stderr[-3000:]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket of a real S3 server: a process of its own, which `timeout` ends if nobody does."""
    why = "needs moto[server] and s3fs, which .ci/run installs"
    s3fs, _ = (pytest.importorskip(name, reason=why) for name in ("s3fs", "moto.server"))
    log, deadline = tmp_path_factory.mktemp("s3") / "log", time.monotonic() + 60
    with log.open("wb") as told, pytest.MonkeyPatch.context() as patch:
        line = ["timeout", "300", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(line, stdout=told, stderr=told)
        try:
            while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            patch.setenv("AWS_ENDPOINT_URL", found[0])
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "testing")
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield "s3://bucket"
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(params=["memory", "s3"])
def bucket(request, tmp_path):
    """An object store of the README's recipe: in the memory of this process, and on a server."""
    fsspec = pytest.importorskip("fsspec")
    base = "memory:/" if request.param == "memory" else request.getfixturevalue("s3")
    url = f"{base}/{tmp_path.name}"
    storage = ObjectStorage(url)
    yield storage
    with contextlib.suppress(FileNotFoundError):
        fsspec.url_to_fs(url)[0].rm(fsspec.url_to_fs(url)[1], recursive=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_object_store_of_the_readme_saves_loads_lists_validates_and_deletes(bucket, world_size):
    assert isinstance(bucket, ckpt.CheckpointStorage)

    def each(body):
        coordinators = (ckpt.LocalCoordinator(),)
        return together(world_size, body) if world_size > 1 else [body(*coordinators)]

    large = Bag(w=torch.arange(3 * MiB, dtype=torch.int32))  # several blocks: written by several threads
    for word in ("old", "new"):  # the second replaces the first
        each(lambda coordinator: put(bucket, word, coordinator=coordinator))
        each(
            lambda coordinator: over(bucket, coordinator).save(
                large, None, to("deep/large", include_rng_state=False)
            )
        )
    assert seen(bucket) == "new" and len(bucket.names("p")) == world_size
    target = Bag(w=torch.zeros(3 * MiB, dtype=torch.int32))
    over(bucket).load(target, None, at("deep/large", load_rng_state=False))
    assert identical(target.state, large.state)
    assert [info.prefix for info in over(bucket).list_checkpoints()] == ["p", "deep/large"]
    assert over(bucket).validate_checkpoint("deep/large").is_valid
    name = bucket.names("p")[0]
    content = bytearray(bucket.fs.cat_file(name))
    content[-1] ^= 1
    bucket.fs.pipe_file(name, bytes(content))
    assert not over(bucket).validate_checkpoint("p").is_valid and "CORRUPTED" in seen(bucket)
    with pytest.raises(CheckpointException, match="exists"):
        put(bucket, "next", overwrite=False)
    for prefix in ("p", "deep/large"):
        over(bucket).delete_checkpoint(prefix)
    assert bucket.names() == []


def test_the_object_store_of_the_readme_keeps_the_old_checkpoint_until_the_record_and_refuses_shared_files(
    bucket,
):
    put(bucket, "old")
    before = bucket.names()
    cancel = threading.Event()
    stop = to(include_rng_state=False, progress=lambda _: cancel.set())
    refusal(lambda: over(bucket).save(value("new"), None, stop, cancel=cancel), ExceptionType.CANCELLED)
    for form in (CheckpointFormat.SINGLE_FILE, CheckpointFormat.CONSOLIDATED):
        assert "MULTI_SHARD" in refusal(
            lambda form=form: put(bucket, "new", format=form), ExceptionType.SAVE_FAILED
        )
    assert bucket.names() == before and seen(bucket) == "old"
    left = ["p.metadata.json.0badf00d.tmp", "p/0badf00d-00000-of-00001.safetensors"]
    for name in left:
        bucket.create(name)
    time.sleep(1.1)  # the clock of S3 has whole seconds
    assert st.collect_garbage(bucket) == [] and bucket.names() == sorted([*before, *left])
    assert st.collect_garbage(bucket, 0.5) == left and bucket.names() == before
    options = ckpt.StorageOptions("objects", {"url": "memory://elsewhere"})
    ckpt.StorageFactory.register("objects", lambda settings: type(bucket)(**settings))
    assert ckpt.StorageFactory.create(options).names() == []


def test_the_checkers_of_the_readme_refuse_a_checkpoint_that_is_not_finite_or_of_another_architecture(
    tmp_path,
):
    with inside(tmp_path):
        checkers = {
            "integrity_checkers": [
                Finite(),
                ckpt.ChecksumIntegrityChecker(),
            ],  # the second: at every load, of every byte
            "compatibility_checkers": [SameArchitecture()],
        }
        checkpoint = opened(tmp_path, **checkers)
        for prefix, number, version in (("good", 1.0, "v2"), ("bad", math.nan, "v2"), ("other", 1.0, "v1")):
            options = to(prefix, custom_metadata={"architecture": version})
            checkpoint.save(Bag(w=torch.tensor([number]), none=torch.zeros(0)), None, options)
        target = Bag(w=torch.zeros(1), none=torch.zeros(0))
        checkpoint.load(target, None, at("good"))
        assert target.state["w"].item() == 1.0 and checkpoint.validate_checkpoint("good").is_valid
        for prefix, why in (("bad", "model/w is not finite"), ("other", "architecture 'v1'")):
            message = refusal(
                functools.partial(checkpoint.load, target, None, at(prefix)), ExceptionType.VALIDATION_FAILED
            )
            assert why in message
            assert not checkpoint.validate_checkpoint(prefix).is_valid


@pytest.mark.parametrize("form", FORMATS)
def test_progress_reaches_its_total_on_every_rank_and_comes_from_one_thread(ram, form):
    for calls in run(2, watch_progress, ram, form):
        for what, seen in calls.items():
            done = [at.bytes_done for at, _ in seen]
            totals = {at.bytes_total for at, _ in seen}
            assert done == sorted(done) and {done[-1]} == totals and done[-1] > 0, (what, seen[-1], totals)
            assert {at.step for at, _ in seen} == {"L4 read" if what.startswith("load") else "S4 write"}
            assert len({thread for _, thread in seen}) == 1


def watch_progress(rank, world_size, tmp, form):
    calls, checkpoint = {}, opened(tmp)
    layers = documented_layers()
    fully_shard(layers)
    replica = Bag(
        w=torch.arange(3 * MiB, dtype=torch.int32), odd=torch.zeros(5, dtype=torch.uint8)
    )  # leaves a gap
    model = {"layers": layers, "replica": replica, "own": Bag(x=torch.full((MiB,), float(rank)))}

    def note(what):
        return lambda at: calls.setdefault(what, []).append((at, threading.get_ident()))

    checkpoint.save(
        model, None, to("first", format=form)
    )  # finds that `own` differs, and starts over: once only
    for level in LEVELS:
        checkpoint.save(
            model, None, to(level.name, format=form, compression_level=level, progress=note(level.name))
        )
        for strategy in STRATEGIES:
            told = note(f"load {level.name} {strategy}")
            checkpoint.load(model, None, at(level.name, resharding_strategy=strategy, progress=told))
    checkpoint.save_async(model, None, to("later", format=form, progress=note("later"))).result()
    return calls


@pytest.mark.parametrize("form", FORMATS)
def test_an_error_in_the_progress_callback_of_one_rank_fails_the_operation_on_all_and_leaves_nothing(
    ram, form
):
    for left, failed, ran, broken, after in run(2, spoil_progress, ram, form):
        assert failed[:2] == ("SAVE_FAILED", 1) and "ZeroDivisionError" in failed[2]
        assert left == set() and ran == ("returned", None, "p")
        assert (
            broken[:2] == ("LOAD_FAILED", 1) and "ZeroDivisionError" in broken[2] and "undefined" in broken[2]
        )
        assert after == "returned"
    assert set(listing(ram)) == named_files(ram)


def spoil_progress(rank, world_size, tmp, form):
    checkpoint, (model, optimizer) = opened(tmp), small()
    spoilt = {"progress": (lambda _: 1 / 0) if rank else None}
    failed = told(lambda: checkpoint.save(model, optimizer, to(format=form, **spoilt)))
    dist.barrier()
    left = set(listing(tmp))
    dist.barrier()
    ran = told(lambda: checkpoint.save(model, optimizer, to(format=form)))
    broken = told(lambda: checkpoint.load(model, optimizer, at(**spoilt)))
    return left, failed, ran, broken, told(lambda: checkpoint.load(model, optimizer, at()))[0]


def test_a_save_and_a_load_are_one_line_each_at_info_on_rank_zero_with_bytes_seconds_and_steps(ram):
    rank_0, rank_1 = run(2, keep_a_log, ram)
    size = f"{sum(path.stat().st_size for path in shards(ram)) / 1e6:.2f} MB"
    steps = " ".join(rf"S{number} \d+\.\d{{3}}" for number in range(1, 8))
    saved, loaded = [line for level, line in rank_0 if level == "INFO"]
    rate = r"in \d+\.\d{3} s, \d+(\.\d\d)? [kMG]?B/s"
    assert re.fullmatch(rf"saved p: {size} by 2 rank\(s\) {rate} \({steps}\)", saved)
    steps = steps.replace("S", "L").partition(" L6")[0]
    assert re.fullmatch(rf"loaded p: 33\.55 MB of {size} to rank 0 of 2 {rate} \({steps}\)", loaded)
    assert [level for level, _ in rank_1 if level != "DEBUG"] == []
    assert [line[:24] for _, line in rank_1] == ["saved p: 16.79 MB by ran", "loaded p: 33.55 MB of 33"]


def keep_a_log(rank, world_size, tmp):
    checkpoint, lines = opened(tmp), []
    checkpoint.logger = logging.Logger("mine")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    checkpoint.logger.addHandler(handler)
    bag = Bag(w=torch.zeros(8 * MiB))
    checkpoint.save(bag, None, to())
    checkpoint.load(bag, None, at())
    return lines


def test_warnings_are_printed_and_logging_once_set_up_says_what_the_readme_says(tmp_path):
    script = (
        "import sys, logging, torch, ckpt\n"
        "if len(sys.argv) > 1: logging.basicConfig(level=logging.INFO)\n"
        "options = ckpt.SaveOptions('step_100', ckpt.CheckpointFormat.CONSOLIDATED, ckpt.CompressionLevel.FAST)\n"  # warns
        "with ckpt.DistributedCheckpoint() as checkpoint:\n"
        "    checkpoint.save(torch.nn.Linear(2, 2), options=options)\n"
        "    checkpoint.load(torch.nn.Linear(2, 2), options=ckpt.LoadOptions('step_100'))\n"
    )
    said = []
    for arguments in ([], ["loud"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S, check=True
        )
        said.append(done.stdout + done.stderr)
    quiet, loud = said
    assert quiet.startswith("step_100: ") and quiet.count("\n") == 1 and "WARNING:ckpt:step_100" in loud
    lines = [line for line in loud.splitlines() if line.startswith("INFO")]
    assert [line.split()[0] for line in lines] == ["INFO:ckpt:saved", "INFO:ckpt:loaded"]
    (example,) = re.findall(r"`(INFO:ckpt:.*?) \.\.\.`", (HERE / "README.md").read_text())
    saved, shown = (re.sub(r"[0-9.]+", "#", line) for line in (lines[0], example))
    assert saved.startswith(shown)


def test_what_the_readme_says_of_dcp_is_there_in_torch():
    import inspect

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import format_utils, state_dict

    table = (HERE / "README.md").read_text().partition("## Moving from DCP")[2].partition("\n## ")[0]
    names = {}
    for row in table.splitlines():
        for name, arguments in re.findall(
            r"(?:dcp\.)?(\w+)\((.*?)\)(?=`|,)", row.split("|")[1] if "|" in row else ""
        ):
            names.setdefault(name, set()).update(re.findall(r"(\w+)=", arguments))
    assert {
        "save",
        "load",
        "async_save",
        "set_state_dict",
        "DefaultLoadPlanner",
    } <= names.keys()
    for name, keywords in names.items():
        (thing,) = {
            getattr(module, name) for module in (dcp, format_utils, state_dict) if hasattr(module, name)
        }
        assert keywords <= set(inspect.signature(thing).parameters), name


def test_a_checkpoint_moves_from_dcp_as_the_readme_says_and_the_calls_do_the_same(tmp_path):
    assert run(2, move_from_dcp, tmp_path) == [(True, True, 3)] * 2


def move_from_dcp(rank, world_size, tmp):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start(salt):
        model = documented_layers(salt)
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters())

    model, _ = start("truth")
    optimizer = stepped(model)
    m, o = get_state_dict(model, optimizer)
    dcp.save({"model": m, "optim": o, "epoch": 3}, checkpoint_id=tmp / "dcp")
    other, other_optimizer = start("other")
    m, o = get_state_dict(other, other_optimizer)
    state = {"model": m, "optim": o, "epoch": 0}
    dcp.load(state, checkpoint_id=tmp / "dcp")
    set_state_dict(other, other_optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    moved = identical(state_of(other), state_of(model))
    checkpoint = opened(tmp)
    checkpoint.save(other, other_optimizer, to(), extra_state={"epoch": state["epoch"]})
    third, third_optimizer = start("third")
    result = checkpoint.load(third, third_optimizer, at())
    same = identical(third_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    return moved, same and identical(state_of(third), state_of(model)), result.extra_state["epoch"]


# ---- faults: every row of the matrix in the header; at each of them a reader sees old or new, whole ---------------------


@pytest.fixture
def ram(tmp_path):
    """A directory in memory, where the system has one: these tests sync files thousands of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="test_ckpt-", dir=memory))
    yield path
    shutil.rmtree(path, ignore_errors=True)


COUNTS = Counter()  # what the fault tests have tried; printed when the run ends


@pytest.fixture(scope="session", autouse=True)
def _counts_are_printed_at_the_end(request):
    yield
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter and COUNTS:
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            reporter.write_line("")  # ends the line of dots
            reporter.write_line(
                "faults tried: " + ", ".join(f"{number:,} {what}" for what, number in COUNTS.items())
            )


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
    options = to(prefix, include_rng_state=False, **options)
    return over(storage, coordinator, attempts, keep_last).save(value(word, tensors), None, options)


def seen(storage, prefix="p", tensors=2):
    """Oracle O: the word that a reader finds whole at `prefix`, "absent", or what else came out."""
    target = Bag(**{name: torch.zeros_like(t) for name, t in value("old", tensors).state.items()})
    try:
        over(storage).load(target, None, at(prefix, load_rng_state=False))
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
    """Whatever happened: `gc` leaves only what records name, what is listed loads, and a save succeeds.

    That is, once a day has passed. Before, `gc` takes nothing of a save that still has its fence.
    """
    storage, left = ckpt.LocalStorage(tmp), set(listing(tmp))
    alive = {path.name.split(".")[-2] for path in fences(tmp) if time.time() - path.stat().st_mtime < 86400}
    if alive:
        st.collect_garbage(storage)
        gone = left - set(listing(tmp))
        assert not [name for name in gone if alive & set(re.findall("[0-9a-f]{8}", name))], (gone, context)
    make_old(tmp)
    st.collect_garbage(storage)
    listed = {info.prefix for info in over(storage).list_checkpoints()}
    assert listed == {prefix for prefix in prefixes if seen(storage, prefix) in WORDS}
    assert set(listing(tmp)) == named_files(tmp), context
    put(storage, "next")
    assert seen(storage) == "next" and over(storage).validate_checkpoint("p").is_valid
    assert set(listing(tmp)) == named_files(tmp)


def named_files(tmp):
    """The records below `tmp`, and the shards that they name."""
    found = set()
    for path in Path(tmp).rglob("*.metadata.json"):
        prefix = str(path.relative_to(tmp)).removesuffix(".metadata.json")
        named = re.findall(r'"([0-9a-f]{8}[^"]*\.safetensors)"', path.read_text())
        found |= {f"{prefix}.metadata.json", *(f"{prefix}/{name}" for name in named)}
    return found


class Scene(NamedTuple):
    """Something done to checkpoints: how it begins, what is done, and what readers may see meanwhile."""

    before: Callable
    act: Callable
    allowed: dict  # prefix: what may be seen at any time
    after: dict  # prefix: what is seen once `act` has returned


def _save_scene(form, old, **options):
    before = (lambda s: put(s, "old", format=form)) if old else (lambda s: None)
    return Scene(
        before,
        lambda s: put(s, "new", format=form, **options),
        {"p": {"old" if old else "absent", "new"}},
        {"p": {"new"}},
    )


def _leave_orphans(storage):
    """A checkpoint, and beside it what a crashed overwrite leaves."""
    put(storage, "old")
    put(storage, "other", "q")
    record, shard = (
        next(Path(storage.base_path).glob(f"q{end}")) for end in (".metadata.json", "/*.safetensors")
    )
    (Path(storage.base_path) / "p" / shard.name).write_bytes(shard.read_bytes())
    record.rename(record.with_name(f"p.metadata.json.{shard.name[:8]}.tmp"))
    make_old(storage.base_path)


SCENES = {
    "save": _save_scene(CheckpointFormat.MULTI_SHARD, old=False),
    "save, overwrite=False": _save_scene(CheckpointFormat.MULTI_SHARD, old=False, overwrite=False),
    "overwrite": _save_scene(CheckpointFormat.MULTI_SHARD, old=True),
    "overwrite a single file": _save_scene(CheckpointFormat.SINGLE_FILE, old=True),
    "overwrite a consolidated one": _save_scene(CheckpointFormat.CONSOLIDATED, old=True),
    "delete": Scene(
        lambda s: put(s, "old"),
        lambda s: over(s).delete_checkpoint("p"),
        {"p": {"old", "absent"}},
        {"p": {"absent"}},
    ),
    "retention": Scene(
        lambda s: [put(s, "old", "q"), put(s, "other", "r")],
        lambda s: put(s, "new", keep_last=1),
        {"p": {"absent", "new"}, "q": {"old", "absent"}, "r": {"other", "absent"}},
        {"p": {"new"}, "q": {"absent"}, "r": {"absent"}},
    ),
    "gc": Scene(
        _leave_orphans, st.collect_garbage, {"p": {"old"}, "q": {"absent"}}, {"p": {"old"}, "q": {"absent"}}
    ),
}
PREFIXES = ("p", "q", "r")


def check_oracle(storage, scene, returned, context):
    for prefix, words in (scene.after if returned else scene.allowed).items():
        assert seen(storage, prefix) in words, (prefix, seen(storage, prefix), context)
    if scene is SCENES["retention"]:  # the older ones go only once the new one is there
        assert seen(storage, "p") == "new" or seen(storage, "q") == "old", context


# Row 1, 3: a real process ends at operation k


def apart(body, tmp, *args, limit_s=HANG_S):
    """`body(tmp, *args)` in a fresh process that has no other threads, so that it may fork; its result."""
    return run(1, body, tmp, *args, limit_s=limit_s, group=False)[0]


def forked(act, limit_s=HANG_S):
    """How a fork of this process ends that runs `act()` and then exits with code 0: its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 97
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit_s
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"hangs: still running after {limit_s} s")
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(ended[1])


CRASHED = 42


def crash(op):
    os._exit(CRASHED)


def crash_everywhere(base, act, judge, when=is_change):
    """Run `act(storage)` from the state of `base`, ending its process at each operation; judge what is left.

    The number of crash points. Operations that change nothing leave what the next one that does finds.
    """
    for k in itertools.count():
        tmp = base.with_name(f"{base.name}-{k}")
        shutil.copytree(base, tmp)
        code = forked(lambda: act(Storage(tmp, Seam(Strike(k, crash, when)))))
        assert code in (0, CRASHED), f"operation {k}: exit code {code}"
        judge(tmp, k, returned=code == 0)
        shutil.rmtree(tmp)
        if code == 0:
            return k


@pytest.mark.parametrize("scene", SCENES)
def test_a_process_that_ends_at_any_operation_leaves_old_or_new_and_the_next_save_succeeds(ram, scene):
    COUNTS["crash points"] += apart(crash_in_scene, ram, scene)


def crash_in_scene(tmp, name):
    scene, base = SCENES[name], tmp / "base"
    base.mkdir()
    scene.before(ckpt.LocalStorage(base))

    def judge(left, k, returned):
        check_oracle(ckpt.LocalStorage(left), scene, returned, f"{name}, crash at change {k}")
        check_recovery(left, PREFIXES)

    return crash_everywhere(base, scene.act, judge)


CLEAN_UPS = {"gc": st.collect_garbage, "delete": lambda s: told(lambda: over(s).delete_checkpoint("p"))}


@pytest.mark.parametrize("clean_up", CLEAN_UPS)
def test_a_crash_during_the_clean_up_after_a_crash_is_cleaned_up_next_time(ram, clean_up):
    COUNTS["crash points"] += apart(crash_in_clean_up, ram, clean_up, limit_s=3 * HANG_S)


def crash_in_clean_up(tmp, clean_up):
    base, total, known = tmp / "base", 0, set()
    base.mkdir()
    put(ckpt.LocalStorage(base), "old")

    def judge_first(left, k, returned):
        nonlocal total
        state = (
            tuple(re.sub("[0-9a-f]{8}", "id", name) for name in listing(left)),
            seen(ckpt.LocalStorage(left)),
        )
        if state in known:  # the same files as after the operation before
            return
        known.add(state)

        def judge(twice, j, returned):
            allowed = {"old", "new"} if clean_up == "gc" else {"old", "new", "absent"}
            assert seen(ckpt.LocalStorage(twice)) in allowed, (k, j)
            CLEAN_UPS[clean_up](ckpt.LocalStorage(twice))
            if clean_up == "delete":
                assert seen(ckpt.LocalStorage(twice)) == "absent", (k, j)
            check_recovery(twice)

        total += crash_everywhere(left, CLEAN_UPS[clean_up], judge)

    return total + crash_everywhere(base, SCENES["overwrite"].act, judge_first)


# Row 3, 4, 5, 6, 29: an error code at operation k


def err_everywhere(tmp, scene, hook, attempts=1):
    """Run a scene with a fault at each operation in turn. Yields (outcome, directory, files, seam) for each."""
    base = tmp / "base"
    base.mkdir()
    scene.before(ckpt.LocalStorage(base))
    for k in itertools.count():
        left = tmp / f"{k}"
        shutil.copytree(base, left)
        files = hook(k)
        outcome = told(lambda: scene.act(Storage(left, files)))
        strike = next(h for h in (files.before, files.after) if isinstance(h, Strike))
        if strike.hit is None:
            assert k and outcome[0] == "returned"
            return
        yield outcome, left, set(listing(base)), files
        shutil.rmtree(left)


def check_errors(tmp, name, code, forever):
    """Row 4, 5: where `act` raises, the error is typed and nothing has changed; where it returns, it is done."""
    scene, total = SCENES[name], 0
    until = FOREVER if forever else None
    for (kind, _, message), left, before, files in err_everywhere(
        tmp, scene, lambda k: Seam(Strike(k, fail(code), until=until))
    ):
        total += 1
        context = name, files.before.hit, kind, message
        assert kind in ("returned", "STORAGE_ERROR"), context
        storage = ckpt.LocalStorage(left)
        check_oracle(storage, scene, False, context)
        assert kind != "returned" or name == "delete" or seen(storage) == "new", context
        if kind != "returned" and name != "delete":
            assert {seen(storage)} == scene.allowed["p"] - {"new"}, context
            assert forever or set(listing(left)) == before, context
        check_recovery(left, PREFIXES, context)
    return total


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("scene", [name for name in SCENES if name != "gc"])
def test_an_error_at_any_operation_is_typed_and_leaves_no_trace_or_happens_too_late_to_matter(
    ram, scene, forever, code
):
    COUNTS["failed operations"] += check_errors(ram, scene, getattr(errno, code), forever)


def test_an_error_at_any_operation_of_gc_loses_nothing_and_gc_can_be_repeated(ram):
    scene = SCENES["gc"]

    def act(storage):
        try:
            scene.act(storage)
        except OSError:
            return "OSError"

    for _, left, _, _ in err_everywhere(
        ram, scene._replace(act=act), lambda k: Seam(Strike(k, fail(errno.EIO)))
    ):
        check_oracle(ckpt.LocalStorage(left), scene, False, left)
        check_recovery(left, PREFIXES)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fsync_dir", "close"])
def test_a_file_whose_write_or_sync_failed_is_never_synced_again_but_replaced_under_a_new_save_id(ram, call):
    check_failed_sync(ram, call)


def check_failed_sync(tmp, call):
    scene = SCENES["overwrite"]
    scene = scene._replace(act=lambda s: put(s, "new", attempts=3))
    hooks = {"when": lambda op: op.call == call}
    tried = 0
    for outcome, left, _, files in err_everywhere(
        tmp, scene, lambda k: Seam(Strike(k, fail(errno.EIO), **hooks)), attempts=3
    ):
        tried += 1
        hit = files.before.hit
        at_hit = next(i for i, op in enumerate(files.log) if op is hit)
        if call != "fsync_dir":
            assert not any(op.call == "fsync" and op.path == hit.path for op in files.log[at_hit + 1 :]), hit
        ids = {Path(op.path).name[:8] for op in files.log if is_new_shard(op)}
        again = {Path(op.path).name[:8] for op in files.log[at_hit:] if is_new_shard(op)}
        assert len(ids) <= 2 and seen(ckpt.LocalStorage(left)) == (
            "new" if outcome[0] == "returned" else "old"
        )
        if hit.call in ("pwrite", "fsync"):
            assert len(ids) == 2 or ".tmp" in hit.path, hit
            assert outcome[0] == "returned" and again, (hit, outcome)
    assert tried


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_disk_that_is_full_from_byte_n_on_stops_all_ranks_after_bounded_attempts(ram, code, attempts):
    files = Seam()
    together(2, lambda c: put(Storage(ram / "unlimited", files), "new", coordinator=c))
    needed = sum(len(op.data) for op in files.log)
    for room in [0, 1, 511, *range(4096, needed, 999), needed - 1]:
        tmp = ram / str(room)
        put(ckpt.LocalStorage(tmp), "old")
        before, files = set(listing(tmp)), full_disk(room, getattr(errno, code))
        storage = Storage(tmp, files)
        outcomes = together(2, lambda c: told(lambda: put(storage, "new", coordinator=c, attempts=attempts)))
        assert {kind for kind, _, _ in outcomes} == {"STORAGE_ERROR"}, outcomes
        assert seen(ckpt.LocalStorage(tmp)) == "old" and set(listing(tmp)) == before
        assert sum(map(is_new_shard, files.log)) <= 2 * attempts
        check_recovery(tmp)


def full_disk(room, code):
    """File calls on a disk that has `room` more bytes: a write that does not fit is short, the next one fails."""

    class Full(Seam):
        left, taking = room, threading.Lock()

        def pwrite(self, fd, data, offset):
            with self.taking:
                if self.left <= 0:
                    fail(code)(Op("pwrite", self.paths[fd]))
                self.left -= (count := super().pwrite(fd, data[: self.left], offset))
                return count

    return Full()


@pytest.mark.parametrize(
    "call, options", [("rename", {}), ("link", {"overwrite": False}), ("unlink", {"overwrite": False})]
)
@pytest.mark.parametrize("code", ["EIO", "EINTR", "ESTALE"])
def test_a_rename_that_reports_an_error_but_happened_is_a_success(ram, call, options, code):
    files = Seam(after=Strike(0, fail(getattr(errno, code)), lambda op: op.call == call))
    assert put(Storage(ram, files), "new", **options) == "p"
    assert files.after.hit and seen(ckpt.LocalStorage(ram)) == "new"
    check_recovery(ram)


# Ranks that are threads of this process: their file operations come through one seam, in one log


class ThreadRank:
    """A coordinator for one of several threads, with the five methods that any coordinator has."""

    def __init__(self, shared, rank, world_size):
        self.shared, self.rank, self.world_size, self.step = shared, rank, world_size, 0

    def all_gather(self, value, timeout=600.0):
        self.step += 1
        changed, posts = self.shared
        with changed:
            row = posts.setdefault(self.step, {})
            row[self.rank] = copy.deepcopy(value)
            changed.notify_all()
            if not changed.wait_for(lambda: len(row) == self.world_size, timeout):
                missing = sorted(set(range(self.world_size)) - set(row))
                raise CheckpointException(f"no answer from rank(s) {missing}", type=ExceptionType.TIMEOUT)
            return [row[rank] for rank in range(self.world_size)]

    def barrier(self, timeout=600.0):
        self.all_gather(None, timeout)

    def broadcast(self, value, src=0, timeout=600.0):
        return self.all_gather(value, timeout)[src]


def together(world_size, body, limit_s=HANG_S):
    """`body(coordinator)` in a thread for each rank; the results in the order of ranks."""
    shared = threading.Condition(), {}
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(body, ThreadRank(shared, rank, world_size)) for rank in range(world_size)]
        return [future.result(limit_s) for future in futures]


# Row 2: what a power loss may leave


class Memory:
    """A storage that is a dict of bytes, all of one age, and that remembers which files were asked for."""

    def __init__(self, files, age=0.0):
        self.files, self.asked, self.age = dict(files), set(), age

    def create(self, name):
        if name in self.files:
            raise FileExistsError(errno.EEXIST, "exists", name)
        self.files[name] = b""
        return MemoryFile(self, name)

    def open(self, name, write=False):
        self.asked.add(name)
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return MemoryFile(self, name)

    def length(self, name):
        self.asked.add(name)
        return len(self.files[name]) if name in self.files else None

    def names(self, directory=""):
        return sorted(name for name in self.files if not directory or name.startswith(directory + "/"))

    def publish(self, temporary, name, overwrite):
        if name in self.files and not overwrite:
            raise FileExistsError(errno.EEXIST, "exists", name)
        self.files[name] = self.files.pop(temporary)

    def delete(self, name):
        return self.files.pop(name, None) is not None

    def sync_directory(self, name):
        pass

    def age_s(self, name):
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return self.age


class MemoryFile:
    def __init__(self, storage, name):
        self.storage, self.name = storage, name

    def read(self, offset, buffer):
        data = self.storage.files[self.name][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise CheckpointException(f"{self.name}: too short", type=ExceptionType.CORRUPTED_CHECKPOINT)
        buffer[:] = data

    def write(self, offset, data):
        self.storage.files[self.name] = patched(self.storage.files[self.name], offset, bytes(data))

    def length(self):
        return len(self.storage.files[self.name])

    def resize(self, length):
        self.storage.files[self.name] = self.storage.files[self.name][:length].ljust(length, b"\0")

    def sync(self):
        pass

    def close(self):
        pass


def patched(content, offset, data):
    """`content` after a write at `offset`."""
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


def test_any_object_with_the_methods_of_a_storage_can_hold_checkpoints():
    storage = Memory({})
    assert isinstance(storage, ckpt.CheckpointStorage)
    for form in FORMATS:
        put(storage, "old", format=form)
        put(storage, "new", format=form)
        assert seen(storage) == "new" and over(storage).validate_checkpoint("p").is_valid
    over(storage).delete_checkpoint("p")
    assert storage.files == {}


DIRECTORY = "a directory"


class PowerLoss:
    """A disk as it may be found after a power loss, worked out from the operations on it so far.

    Only what was synced is sure: a file's content by fsync of the file, a name by fsync of its directory.
    Changes of names not yet synced survive in any subset, the earlier or the later ones winning. Writes not
    yet synced survive in any subset, or up to any of them, torn at every 512 bytes; or the file has its new length and holds zeros.
    """

    def __init__(self, base):
        self.base, self.numbers = str(base), itertools.count()
        self.names, self.pending, self.synced, self.unsynced = {}, [], {}, {}
        for path in [p for p in Path(base).rglob("*")]:
            self.names[str(path.relative_to(base))] = number = next(self.numbers)
            self.synced[number] = DIRECTORY if path.is_dir() else path.read_bytes()
        self.sure = dict(self.names)

    def apply(self, op):
        path, target = (p.removeprefix(self.base).lstrip("/") for p in (op.path, op.target))
        if op.call in ("create", "mkdir") and path not in self.names and op.path != self.base:
            number = next(self.numbers)
            self.synced[number] = DIRECTORY if op.call == "mkdir" else b""
            self._rename({path: number})
        elif op.call in ("pwrite", "truncate", "allocate") and path in self.names:
            self.unsynced.setdefault(self.names[path], []).append(op)
        elif op.call == "fsync" and self.names.get(path) in self.unsynced:
            number = self.names[path]
            self.synced[number] = self._written(self.synced[number], self.unsynced.pop(number))
        elif op.call == "fsync_dir":
            for change in [
                c for c in self.pending if op.path.startswith(self.base) and self._directory(c) == path
            ]:
                self.sure.update(change)
                self.pending.remove(change)
        elif op.call in ("rename", "link") and path in self.names:
            self._rename({target: self.names[path]} | ({path: None} if op.call == "rename" else {}))
        elif op.call in ("unlink", "rmdir") and path in self.names:
            self._rename({path: None})

    def _rename(self, change):
        self.names = {p: n for p, n in (self.names | change).items() if n is not None}
        self.pending.append(change)

    @staticmethod
    def _directory(change):
        return next(iter(change)).rpartition("/")[0]

    @staticmethod
    def _written(content, ops):
        for op in ops:
            if op.call in ("truncate", "allocate"):
                content = content[: op.offset].ljust(op.offset, b"\0")
            else:
                content = patched(content, op.offset, op.data)
        return content

    def _contents(self, number):
        """Every content that a file may have."""
        start, ops = self.synced[number], self.unsynced.get(number, [])
        found = {start, self._written(start, ops)}
        for count in range(len(ops) + 1):
            for chosen in itertools.combinations(ops, count):
                found.add(self._written(start, chosen))
                if chosen and chosen[-1].call == "pwrite":
                    for tear in range(512, len(chosen[-1].data), 512):
                        torn = chosen[-1]._replace(data=chosen[-1].data[:tear])
                        found.add(self._written(start, [*chosen[:-1], torn]))
                zeros = [op._replace(data=bytes(len(op.data))) for op in chosen]
                found.add(self._written(start, zeros))
        return found

    def states(self):
        """Every state, as a set of (name, content)."""
        contents = {
            number: self._contents(number) for number in self.synced if self.synced[number] is not DIRECTORY
        }
        seen_names = set()
        for count in range(len(self.pending) + 1):
            for chosen in itertools.combinations(self.pending, count):
                for order in (chosen, chosen[::-1]):
                    names = dict(self.sure)
                    for change in order:
                        names.update(change)
                    there = {p: n for p, n in names.items() if n is not None and self._reachable(p, names)}
                    files = tuple((p, n) for p, n in sorted(there.items()) if self.synced[n] is not DIRECTORY)
                    if files in seen_names:
                        continue
                    seen_names.add(files)
                    numbers = sorted({n for _, n in files})
                    for mix in itertools.product(*(contents[n] for n in numbers)):
                        content = dict(zip(numbers, mix))
                        yield frozenset((p, content[n]) for p, n in files)

    @staticmethod
    def _reachable(path, names):
        parts = path.split("/")
        return all(names.get("/".join(parts[:depth])) is not None for depth in range(1, len(parts)))


class Judge:
    """Oracle O, asked once for each thing to see: a verdict depends on nothing but the files asked for."""

    def __init__(self, prefix, tensors):
        self.prefix, self.tensors, self.known = prefix, tensors, {}

    def __call__(self, files):
        for names, verdicts in self.known.items():
            if (verdict := verdicts.get(tuple(files.get(name) for name in names))) is not None:
                return verdict
        storage = Memory(files)
        verdict = seen(storage, self.prefix, self.tensors)
        names = tuple(sorted(storage.asked))
        self.known.setdefault(names, {})[tuple(files.get(name) for name in names)] = verdict
        return verdict


def check_power_loss(base, act, allowed, after, tensors=2, files=None):
    """Cut the power after every operation of `act(storage)`; each state that may be left obeys oracle O.

    The distinct states. `after` is what may be seen once `act` has returned.
    """
    model, files, visited = PowerLoss(base), files or Seam(), set()
    act(Storage(base, files))
    judges = {prefix: Judge(prefix, tensors) for prefix in allowed}
    log = [op for op in files.done if op.call in CHANGES]
    for done in range(len(log) + 1):
        if done:
            model.apply(log[done - 1])
        legal = after if done == len(log) else allowed
        for state in model.states():
            if state in visited and legal is allowed:
                continue
            visited.add(state)
            left = dict(state)
            for prefix, judge in judges.items():
                assert (verdict := judge(left)) in legal[prefix], (
                    prefix,
                    verdict,
                    log[:done][-5:],
                    sorted(left),
                )
    return visited


def check_states_recover(tmp, states, prefixes=("p",)):
    """From states of a power loss: clean-up, and the next save, on real files."""
    for state in states:
        for name, content in state:
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(content)
        check_recovery(tmp, prefixes)
        shutil.rmtree(tmp)


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 4 KiB, in units of half of it, so that a few KiB take several writes by several threads."""
    monkeypatch.setattr(st, "BLOCK_BYTES", PAGE)
    monkeypatch.setattr(st, "UNIT_BYTES", PAGE // 2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("old", [False, True], ids=["first save", "overwrite"])
def test_a_power_loss_at_any_moment_of_a_save_leaves_old_or_new(ram, tiny_blocks, old, world_size, form):
    for tensors in (1, 2, 3):
        base = ram / str(tensors)
        base.mkdir()
        visited = check_power_loss_of_save(base, old, world_size, form, tensors)
        COUNTS["power-loss states"] += len(visited)
        if tensors == 2:
            check_states_recover(
                ram / "left", random.Random(1).sample(sorted(visited, key=sorted), min(len(visited), 25))
            )


def check_power_loss_of_save(base, old, world_size=1, form=CheckpointFormat.MULTI_SHARD, tensors=2):
    if old:
        put(ckpt.LocalStorage(base), "old", tensors=tensors, format=form)

    def act(storage):
        together(world_size, lambda c: put(storage, "new", tensors=tensors, coordinator=c, format=form))

    allowed = {"p": {"old" if old else "absent", "new"}}
    return check_power_loss(base, act, allowed, {"p": {"new"}}, tensors)


@pytest.mark.parametrize("scene", ["save, overwrite=False", "delete", "retention", "gc"])
def test_a_power_loss_at_any_moment_of_a_delete_or_clean_up_leaves_each_checkpoint_or_none(ram, scene):
    scene = SCENES[scene]
    scene.before(ckpt.LocalStorage(ram))
    COUNTS["power-loss states"] += len(check_power_loss(ram, scene.act, scene.allowed, scene.after))


def test_a_power_loss_right_after_the_first_save_into_a_new_deep_directory_loses_nothing(ram):
    (ram / "there").mkdir()
    model, files = PowerLoss(ram / "there"), Seam()
    put(Storage(ram / "there" / "made" / "on" / "the" / "way", files), "new")
    for op in files.done:
        model.apply(op)
    for state in model.states():
        left = {name.removeprefix("made/on/the/way/"): content for name, content in state}
        assert seen(Memory(left)) == "new"


# Row 7: short reads and writes


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("cap", [1, 7, 4095])
def test_short_reads_and_writes_change_nothing(ram, cap, form):
    storage = Storage(ram, Seam(cap=cap))
    put(storage, "new", format=form)
    assert seen(storage) == "new" and seen(ckpt.LocalStorage(ram)) == "new"
    assert over(storage).validate_checkpoint("p").is_valid


def test_signals_that_interrupt_system_calls_change_nothing(tmp_path):
    interrupts = []
    before = signal.signal(signal.SIGALRM, lambda *_: interrupts.append(1))
    bag = Bag(w=torch.arange(4 * MiB, dtype=torch.int32))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        checkpoint = opened(tmp_path)
        checkpoint.save(bag, None, to())
        other = Bag(w=torch.zeros(4 * MiB, dtype=torch.int32))
        checkpoint.load(other, None, at())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts and identical(other.state, bag.state)


def test_a_read_or_write_of_more_than_the_kernel_takes_at_once_goes_on_where_it_stopped(ram):
    class Kernel(Seam):
        spans = ()

        def pwrite(self, fd, data, offset):
            done = min(len(data), 0x7FFFF000)
            self.spans += ((offset, done),)
            return done

        pread = pwrite

    memory = memoryview(mmap.mmap(-1, 0x7FFFF000 + 3 * PAGE))  # never touched, so it takes no room
    storage = Storage(ram, files := Kernel())
    file = storage.create("large")
    for call in (file.write, file.read):
        files.spans, end = (), PAGE
        call(PAGE, memory)
        for offset, done in files.spans:
            assert offset == end and done > 0
            end += done
        assert end == PAGE + len(memory)
    file.close()


def test_a_write_that_takes_nothing_is_an_error_not_a_hang(ram):
    class Stuck(Seam):
        calls = 0

        def pwrite(self, fd, data, offset):
            self.calls += 1
            assert self.calls < 10_000, "hangs"
            return 0

    storage = Storage(ram, files := Stuck())
    kind, _, message = told(lambda: put(storage, "new"))
    assert kind == "STORAGE_ERROR" and files.calls < 1000, message


# Row 8: an error in any worker thread


@pytest.mark.parametrize("number", range(st.IO_THREADS))
@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "bad disk"), RuntimeError("boom"), MemoryError()], ids=repr
)
def test_an_error_in_any_worker_thread_fails_the_save_and_publishes_nothing(
    ram, tiny_blocks, error, level, number
):
    check_thread_error(ram, error, level, number)


def check_thread_error(tmp, error, level=CompressionLevel.NONE, number=0):
    """Each of the threads is given a block; one of them fails on it."""
    storage = ckpt.LocalStorage(tmp)
    put(storage, "old")
    before, met, came, failed = listing(tmp), threading.Barrier(st.IO_THREADS), set(), []
    real = st.crc32 if level is CompressionLevel.NONE else st.compress_frame

    def work(*args):
        thread = threading.current_thread().name
        if thread.startswith("ckpt-io") and thread not in came:
            came.add(thread)
            met.wait(HANG_S)
            if thread == f"ckpt-io-{number}":
                failed.append(thread)
                raise error
        return real(*args)

    bag = Bag(**{f"w{n}": torch.full((4 * PAGE,), float(n)) for n in range(8)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(st, real.__name__, work)
        kind, _, message = told(
            lambda: over(storage).save(bag, None, to(compression_level=level, include_rng_state=False))
        )
    assert failed and kind in ("STORAGE_ERROR", "SAVE_FAILED"), (kind, message)
    assert f"{type(error).__name__}: {error}" in message
    assert listing(tmp) == before and seen(storage) == "old"


# Row 30: a worker outlives its operation


class Hung(Seam):
    """The first read or write (`call`) of data hangs until `opened`; if `failing`, the next one fails, once."""

    def __init__(self, call, failing=False, before=lambda op: None):
        super().__init__(before)
        self.call, self.failing, self.taking = call, failing, threading.Lock()
        self.reached, self.opened = threading.Event(), threading.Event()
        self.worker, self.fd, self.numbers, self.later = None, -1, [], 0

    def hangs(self, call, fd, offset):
        if call != self.call or offset < PAGE:  # headers and records are no worker's work
            return False
        with self.taking:
            if self.worker is None:
                self.worker, self.fd, self.later = threading.current_thread(), fd, len(self.numbers)
                self.reached.set()
                return True
            failing, self.failing = self.failing, False
        return failing and fail(errno.EIO)(Op(call, self.paths[fd]))

    def return_late(self):
        self.opened.set()
        self.worker.join(20)
        assert not self.worker.is_alive()

    def pread(self, fd, buffer, offset):
        if not self.hangs("pread", fd, offset):
            return super().pread(fd, buffer, offset)
        kept = bytearray(len(buffer))  # the kernel holds on to the file, and to the memory
        count = super().pread(fd, memoryview(kept), offset)
        assert self.opened.wait(60)
        buffer[:count] = kept[:count]
        return count

    def pwrite(self, fd, data, offset):
        if self.hangs("pwrite", fd, offset):
            assert self.opened.wait(60)
            return Seam.pwrite(
                self, fd, data[: len(data) // 2], offset
            )  # short: the writer goes on with the rest
        return super().pwrite(fd, data, offset)

    def open(self, path, flags, mode=0o777):
        self.numbers.append(super().open(path, flags, mode))
        return self.numbers[-1]


@pytest.fixture
def impatient(tiny_blocks, monkeypatch):
    """Small blocks, and failed operations that wait for stuck threads no longer than 0.05 s."""
    monkeypatch.setattr(st, "STUCK_S", 0.05)


def numbered(salt, dtype=torch.float32):
    """Eight tensors of two blocks of a page, no two blocks alike, that shrink only a little."""
    generator = torch.Generator().manual_seed(salt)
    return Bag(**{f"w{n}": torch.rand(2, PAGE // 4, generator=generator).to(dtype) for n in range(8)})


TARGETS = {
    "as saved": lambda: numbered(100).state,
    "strided": lambda: {name: t.T.contiguous().T for name, t in numbered(100).state.items()},
    "of another dtype": lambda: numbered(100, torch.float64).state,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
@pytest.mark.parametrize("form", FORMATS)
def test_a_read_that_returns_after_its_load_has_ended_changes_no_tensor(ram, impatient, form, level, target):
    over(ram).save(numbered(0), None, to(format=form, compression_level=level, include_rng_state=False))
    files, live, other = Hung("pread", failing=True), Bag(**TARGETS[target]()), numbered(200)
    checkpoint, options = (
        over(Storage(ram, files), attempts=2),
        at(load_rng_state=False, strict_mode=False),
    )
    tensors = live.state
    checkpoint.load(
        live, None, options
    )  # the first attempt fails with a worker stuck, the second one succeeds
    assert not files.failing and files.worker.is_alive()
    assert all(torch.equal(tensors[name], t) for name, t in numbered(0).state.items())
    for t in tensors.values():
        t.mul_(3).add_(1)  # training goes on
    checkpoint.load(other, None, options)
    trained = copy.deepcopy(tensors)
    files.return_late()
    assert identical(tensors, trained) and identical(other.state, numbered(0).state)
    assert files.fd not in files.numbers[files.later :]


@pytest.mark.parametrize("end", ["cancel", "deadline", "interrupt"])
def test_however_a_load_ends_a_read_that_returns_afterwards_changes_no_tensor(ram, impatient, end):
    over(ram).save(numbered(0), None, to(include_rng_state=False))
    files, live = Hung("pread"), numbered(100)

    def interrupt(progress):
        if files.reached.is_set():
            raise KeyboardInterrupt

    limits = {"deadline": {"timeout": 0.5}, "interrupt": {"progress": interrupt}}.get(end, {})
    cancel, options = files.reached if end == "cancel" else None, at(load_rng_state=False, **limits)
    with pytest.raises((CheckpointException, KeyboardInterrupt)) as caught:
        over(Storage(ram, files)).load(live, None, options, cancel=cancel)
    expected = {"cancel": ExceptionType.CANCELLED, "deadline": ExceptionType.TIMEOUT}
    assert getattr(caught.value, "type", None) is expected.get(end)
    for t in live.state.values():
        t.fill_(7.0)
    files.return_late()
    assert all((t == 7.0).all() for t in live.state.values())


def hung_load(rank, world_size, tmp, strategy, truth):
    """A rank's read hangs, a worker of the other (in turns: the same) fails, both retry; what is live then."""
    st.BLOCK_BYTES, st.UNIT_BYTES, st.STUCK_S = 8 * PAGE, PAGE, 0.05
    events = dist.FileStore(str(tmp / "events"), world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    live = {name: distribute_tensor(torch.zeros_like(t), mesh, [Replicate()]) for name, t in truth.items()}

    class Failing(Hung):
        def hangs(self, call, fd, offset):
            if rank == 1 and strategy != "sequential":
                if call == "pread" and offset >= PAGE and self.failing:
                    events.wait(["reached"], datetime.timedelta(seconds=20))
                    self.failing = False
                    fail(errno.EIO)(Op(call, self.paths[fd]))
                return False
            hangs = super().hangs(call, fd, offset) if rank == 0 else False
            if hangs:
                events.set("reached", "1")
            return hangs

    files = Failing("pread", failing=rank == (strategy != "sequential"))
    checkpoint = over(Storage(tmp, files), coord.TorchCoordinator(), attempts=2)
    checkpoint.load(Bag(**live), None, at(load_rng_state=False, resharding_strategy=strategy))
    loaded = all(torch.equal(t.full_tensor(), truth[name]) for name, t in live.items())
    local = {name: t.to_local().mul_(3).add_(1) for name, t in live.items()}
    trained = copy.deepcopy(local)
    if rank == 0:
        files.return_late()
    return loaded and not files.failing, identical(local, trained)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_read_that_returns_after_another_rank_failed_and_all_retried_changes_nothing(
    tmp_path, monkeypatch, strategy
):
    truth = {f"w{n}": torch.arange(n, n + 2 * PAGE, dtype=torch.float32).view(2, -1) for n in range(8)}
    monkeypatch.setattr(st, "BLOCK_BYTES", 8 * PAGE)
    monkeypatch.setattr(st, "UNIT_BYTES", PAGE)
    over(tmp_path).save(Bag(**truth), None, to(include_rng_state=False))
    assert run(2, hung_load, tmp_path, strategy, truth) == [(True, True)] * 2


@pytest.mark.parametrize("level", [CompressionLevel.NONE, CompressionLevel.FAST])
@pytest.mark.parametrize("form", FORMATS)
def test_a_write_that_returns_after_its_save_has_failed_lands_in_no_later_file(ram, impatient, form, level):
    files = Hung("pwrite")
    checkpoint, options = over(Storage(ram, files)), {"format": form, "compression_level": level}
    refusal(
        lambda: checkpoint.save(numbered(0), None, to(**options), cancel=files.reached),
        ExceptionType.CANCELLED,
    )
    check_late_write(files, lambda: checkpoint.save(numbered(200), None, to(**options)))
    assert checkpoint.validate_checkpoint("p").is_valid
    checkpoint.load(loaded := numbered(100), None, at())
    assert identical(loaded.state, numbered(200).state) and set(listing(ram)) == named_files(ram)


def check_late_write(files, write):
    """The hung write returns while `write()` has its own files open and written; none of them has its number."""
    before = len(files.numbers)
    files.before = lambda op: op.call == "fsync" and files.worker.is_alive() and files.return_late()
    write()
    assert not files.worker.is_alive() and files.fd not in files.numbers[before:]


def test_a_write_that_returns_after_its_export_has_failed_lands_in_no_later_file(ram, impatient, monkeypatch):
    over(ram / "c").save(numbered(0), None, to(include_rng_state=False))
    files, storage = Hung("pwrite", failing=True), ckpt.LocalStorage(ram / "c")
    ckpt.export_checkpoint(storage, "p", ram / "reference.safetensors")
    (ram / "out").mkdir()
    monkeypatch.setattr(ckpt, "LocalStorage", lambda folder: Storage(folder, files))
    refusal(
        lambda: ckpt.export_checkpoint(storage, "p", ram / "out/x.safetensors"), ExceptionType.STORAGE_ERROR
    )
    assert files.worker.is_alive() and not listing(ram / "out")
    check_late_write(files, lambda: ckpt.export_checkpoint(storage, "p", ram / "out/y.safetensors"))
    assert listing(ram / "out") == {"y.safetensors": (ram / "reference.safetensors").read_bytes()}


def test_a_load_ends_only_when_no_thread_copies_into_a_tensor_any_more(ram, impatient, monkeypatch):
    over(ram).save(numbered(0), None, to(include_rng_state=False))
    live, (reached, closing, returned), late = (
        Bag(**TARGETS["strided"]()),
        (threading.Event() for _ in range(3)),
        [],
    )
    copy_in, close = st.copy_in, st.Gate.close

    def slow(*args):
        reached.set()
        assert closing.wait(20)
        late.append(returned.wait(0.2))
        copy_in(*args)

    monkeypatch.setattr(st, "copy_in", slow)
    monkeypatch.setattr(st.Gate, "close", lambda self, *limit: closing.set() or close(self, *limit))
    refusal(
        lambda: over(ram).load(live, None, at(load_rng_state=False), cancel=reached), ExceptionType.CANCELLED
    )
    returned.set()
    assert late and not any(late)


# Row 22, 23, 28: others at work at the same time. An onlooker acts between any two operations of a writer


def between(act, storage_path, onlooker, when=lambda op: True):
    """Run `act(storage)` with `onlooker(op)` called before each of its operations, and once after."""
    busy = []

    def look(op):
        if not busy and when(op):
            busy.append(op)
            try:
                onlooker(op)
            finally:
                busy.clear()

    act(Storage(storage_path, Seam(look)))
    onlooker(None)


@pytest.mark.parametrize("scene", SCENES)
def test_a_reader_between_any_two_operations_of_a_writer_sees_old_or_new(ram, scene):
    scene = SCENES[scene]
    scene.before(ckpt.LocalStorage(ram))
    reads = []

    def read(op):
        check_oracle(ckpt.LocalStorage(ram), scene, op is None, op)
        reads.append(op)

    between(scene.act, ram, read)
    assert len(reads) > 5
    COUNTS["reads between operations"] += len(reads)


@pytest.mark.parametrize(
    "act",
    ["overwrite", "overwrite a single file", "overwrite a consolidated one", "delete", "two overwrites"],
)
def test_a_reader_that_a_writer_overtakes_at_any_operation_sees_old_or_new(ram, act):
    """The writer does all it does between two operations of the reader."""
    scene = SCENES["overwrite" if act == "two overwrites" else act]

    def write():
        scene.act(ckpt.LocalStorage(tmp))
        if act == "two overwrites":
            put(ckpt.LocalStorage(tmp), "next")

    allowed = scene.allowed["p"] | {"next"}
    for k in itertools.count():
        tmp = ram / str(k)
        scene.before(ckpt.LocalStorage(tmp))
        overtaken = Strike(k, lambda op: write())
        found = seen(Storage(tmp, Seam(overtaken)))
        assert found in allowed or (act == "delete" and found.startswith("LOAD_FAILED")), (
            overtaken.hit,
            found,
        )
        if overtaken.hit is None:
            break
    COUNTS["reads between operations"] += k


@pytest.mark.parametrize("act", ["overwrite", "delete"])
def test_a_listing_that_a_writer_overtakes_at_any_operation_still_has_every_other_checkpoint(ram, act):
    for k in itertools.count():
        tmp = ram / str(k)
        for prefix in ("a", "p", "z"):
            put(ckpt.LocalStorage(tmp), "old", prefix)
        overtaken = Strike(k, lambda op: SCENES[act].act(ckpt.LocalStorage(tmp)))
        found = [info.prefix for info in over(Storage(tmp, Seam(overtaken))).list_checkpoints()]
        assert {"a", "z"} <= set(found) and (act == "delete" or "p" in found), (overtaken.hit, found)
        if overtaken.hit is None:
            break
    COUNTS["reads between operations"] += k


@pytest.mark.parametrize("act", ["overwrite", "delete"])
def test_a_save_during_which_another_prefix_changes_still_becomes_the_newest(ram, act):
    for k in itertools.count():
        tmp = ram / str(k)
        for prefix in ("a", "p", "z"):
            put(ckpt.LocalStorage(tmp), "old", prefix)
        overtaken = Strike(k, lambda op: SCENES[act].act(ckpt.LocalStorage(tmp)))
        put(Storage(tmp, Seam(overtaken)), "new", "m")
        order = [
            info.prefix for info in over(ckpt.LocalStorage(tmp)).list_checkpoints() if info.prefix != "p"
        ]
        assert order == ["a", "z", "m"], (overtaken.hit, order)
        if overtaken.hit is None:
            break
    COUNTS["interleavings"] += k


def test_two_jobs_on_one_prefix_one_wins_whole(ram):
    """Each operation of one job is a place for the whole of the other."""
    tried = 0
    for k in itertools.count():
        tmp = ram / str(k)
        put(ckpt.LocalStorage(tmp), "old")
        outcomes = {}

        def job(word, hook):
            outcomes[word] = told(lambda: put(Storage(tmp, Seam(hook)), word, attempts=3))[0]
            assert seen(ckpt.LocalStorage(tmp)) in ("new", "other")

        overtaken = Strike(k, lambda op: job("other", lambda op: None))
        job("new", overtaken)
        if overtaken.hit is None:
            break
        assert set(outcomes.values()) == {"returned"}, (overtaken.hit, outcomes)
        check_recovery(tmp)
        tried += 1
    COUNTS["interleavings"] += tried


@pytest.mark.parametrize("overwrite", [True, False])
def test_two_jobs_in_lockstep_on_one_prefix_one_wins_whole(ram, overwrite):
    rng = random.Random(22)
    for number in range(60):
        tmp = ram / str(number)
        outcomes = interleaved(
            rng, [functools.partial(put_told, tmp, word, overwrite=overwrite) for word in ("new", "other")]
        )
        winners = [word for word, (kind, _, _) in zip(("new", "other"), outcomes) if kind == "returned"]
        assert winners and (overwrite or len(winners) == 1), outcomes
        assert seen(ckpt.LocalStorage(tmp)) in winners, outcomes
        assert all(kind in ("returned", "SAVE_FAILED", "STORAGE_ERROR") for kind, _, _ in outcomes), outcomes
        check_recovery(tmp)
    COUNTS["interleavings"] += number + 1


def put_told(tmp, word, hook, **options):
    return told(lambda: put(Storage(tmp, Seam(hook)), word, attempts=3, **options))


def interleaved(rng, jobs):
    """Run jobs in threads of which one at a time makes one file operation, in an order that `rng` draws."""
    turn, waiting, done = threading.Condition(), {}, set()

    def hook(number):
        def wait(op):
            with turn:
                waiting[number] = False
                turn.notify_all()
                assert turn.wait_for(lambda: waiting.get(number), HANG_S)
                del waiting[number]

        return wait

    def job(number):
        try:
            return jobs[number](hook(number))
        finally:
            with turn:
                done.add(number)
                turn.notify_all()

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job, number) for number in range(len(jobs))]
        with turn:
            while len(done) < len(jobs):
                # every job waits for its turn, or is done, or is busy in memory
                assert turn.wait_for(
                    lambda: len(waiting) + len(done) >= len(jobs) and not any(waiting.values()), HANG_S
                )
                if waiting:
                    waiting[rng.choice(sorted(waiting))] = True
                    turn.notify_all()
        return [future.result(HANG_S) for future in futures]


CLEANERS = {
    "gc": st.collect_garbage,
    "delete": lambda s: told(lambda: over(s).delete_checkpoint("p")),
    "retention": lambda s: put(s, "other", "z", keep_last=1),
}


@pytest.mark.parametrize("cleaner", CLEANERS)
@pytest.mark.parametrize("form", FORMATS)
def test_clean_up_at_any_operation_of_a_live_save_takes_nothing_from_it(ram, form, cleaner):
    """One attempt must do: nothing of a live save is deleted."""
    for k in itertools.count():
        tmp = ram / str(k)
        put(ckpt.LocalStorage(tmp), "old", format=form)
        strike = Strike(k, lambda op: CLEANERS[cleaner](ckpt.LocalStorage(tmp)))
        outcome = told(lambda: put(Storage(tmp, Seam(strike)), "new", format=form))
        assert outcome[0] == "returned", (strike.hit, outcome)
        found = seen(ckpt.LocalStorage(tmp))
        assert found == "new" or (found == "absent" and cleaner != "gc"), (strike.hit, found)
        if strike.hit is None:
            break
        if cleaner != "retention":
            check_recovery(tmp)
    COUNTS["interleavings"] += k


@pytest.mark.parametrize("cleaner", CLEANERS)
def test_clean_up_that_a_live_save_overtakes_at_any_operation_takes_nothing_from_it(ram, cleaner):
    """Within the clean-up a save begins, and gets as far as its rename, which waits for the clean-up's end."""
    for k in itertools.count():
        tmp = ram / str(k)
        put(ckpt.LocalStorage(tmp), "old", tensors=1)
        reached, go_on, outcomes = threading.Event(), threading.Event(), []

        def hold(op):
            if op.call == "rename":
                reached.set()
                assert go_on.wait(HANG_S)

        writer = threading.Thread(
            target=lambda: outcomes.append(told(lambda: put(Storage(tmp, Seam(hold)), "new")))
        )
        strike = Strike(k, lambda op: writer.start() or reached.wait(HANG_S))
        CLEANERS[cleaner](Storage(tmp, Seam(strike)))
        if strike.hit is None:
            break
        go_on.set()
        writer.join(HANG_S)
        assert outcomes[0][0] == "returned" and seen(ckpt.LocalStorage(tmp)) == "new", (strike.hit, outcomes)
    COUNTS["interleavings"] += k


@pytest.mark.parametrize("form", FORMATS)
def test_clean_up_keeps_a_save_whose_fence_is_younger_than_the_limit_and_takes_an_older_one(
    ram, caplog, form
):
    left = [ram / "fake clock", ram / "changed times"]

    def copy_as_a_crash_leaves_it(op):
        for path in left:
            shutil.copytree(ram / "base", path)

    put(ckpt.LocalStorage(ram / "base"), "old", format=form)
    files = Seam(Strike(0, copy_as_a_crash_leaves_it, lambda op: op.call == "rename"))
    together(2, lambda c: put(Storage(ram / "base", files), "new", coordinator=c, format=form))
    created = [op.path for op in files.log if op.call == "create"]
    assert created[0].endswith(".tmp") and len(created) > 1, "the fence comes before all other files"
    whole, (fence,) = set(listing(left[0])), fences(left[0])
    theirs = {str(fence.relative_to(left[0])), *(f"p/{Path(name).name}" for name in created[1:])}
    assert whole - named_files(left[0]) == theirs

    class Dated(st.LocalStorage):
        age = 0.0

        def age_s(self, name):
            assert super().age_s(name) < 86400
            return self.age

    storage, limit = Dated(left[0]), 24 * 3600.0
    for storage.age in (-10 * 365 * limit, -1.0, 0.0, 1.0, limit - 1):
        assert st.collect_garbage(storage) == [] and set(listing(left[0])) == whole
        assert f"kept save {fence.name.split('.')[-2]} of p" in caplog.text
        caplog.clear()
    storage.age = 3600.0
    assert st.collect_garbage(storage, 3601.0) == [] and "old enough in 0.0 h" in caplog.text
    assert set(st.collect_garbage(storage, 3600.0)) == theirs
    storage = st.LocalStorage(left[1])
    for hours in (-10 * 365 * 24, -1, 0, 23.9):
        make_old(left[1], hours)
        assert st.collect_garbage(storage) == [] and set(listing(left[1])) == whole
        assert hours or st.collect_garbage(storage, 3600.0) == []
    make_old(left[1], 24.1)
    assert set(st.collect_garbage(storage)) == theirs
    for path in left:
        assert set(listing(path)) == named_files(path) and seen(ckpt.LocalStorage(path)) == "old"


def test_directories_that_a_deletion_has_emptied_are_missed_by_nobody(ram):
    storage = ckpt.LocalStorage(ram)
    put(storage, "old", "a/b/p")
    over(storage).delete_checkpoint("a/b/p")
    assert os.listdir(ram) == []
    put(storage, "new", "a/p")  # by the same object, which has once made directories that are gone
    shutil.rmtree(ram / "a" / "p")
    over(storage).delete_checkpoint("a/p")
    assert os.listdir(ram) == []


# Row 38: a file system that lacks something

LACKED = {
    "hard links": lambda op: op.call == "link",
    "direct I/O": lambda op: op.call == "open_direct",
    "reads and writes of what it has opened for direct I/O": lambda op: op.path.startswith("/proc"),
    "directory fsync": lambda op: op.call == "fsync_dir",
    "reserved space": lambda op: op.call == "allocate",
    "reads that do not wait": lambda op: op.call == "is_cold",
}
REFUSED = {what: (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS) for what in LACKED}
REFUSED["hard links"] += (errno.EPERM,)


@pytest.mark.parametrize(
    "what, code",
    [(what, code) for what, codes in REFUSED.items() for code in codes],
    ids=lambda value: errno.errorcode.get(value, value),
)
def test_a_file_system_without_something_will_do_or_the_one_error_names_what_it_lacks(ram, what, code):
    lacked = []

    class Lacking(Seam):
        def open(self, path, flags, mode=0o777):
            fd = super().open(path, flags & ~os.O_DIRECT, mode)  # as if the file system here had it
            if path.startswith("/proc"):
                self.paths[fd] = path
            return fd

    def before(op):
        if LACKED[what](op) and op.call != "close":
            lacked.append(op)
            fail(code)(op)

    storage, bags = Storage(ram, Lacking(before)), [Bag(w=torch.arange(n, n + (1 << 17))) for n in (1, 2, 3)]
    for bag in bags[:2]:
        over(storage).save(bag, None, to(include_rng_state=False))
    st.collect_garbage(storage)
    whole = listing(ram)
    attempt = told(lambda: over(storage).save(bags[2], None, to("q", overwrite=False)))
    if what == "hard links":
        kind, _, message = attempt
        assert kind == "STORAGE_ERROR" and "hard links" in message and "overwrite=False" in message
        assert listing(ram) == whole
    else:
        assert attempt[0] == "returned", attempt
        over(storage).delete_checkpoint("q")
    over(storage).load(loaded := Bag(w=torch.zeros(1 << 17, dtype=torch.int64)), None, at())
    assert identical(loaded.state, bags[1].state) and over(storage).validate_checkpoint("p").is_valid
    assert lacked


# Row 13, 14: damage to any bit, any length, any file out of place

FUZZ_LEVELS = [CompressionLevel.NONE, CompressionLevel.FAST]
CORES = len(os.sched_getaffinity(0))
SMALL_BLOCK, SMALL_UNIT = 320, 64  # so that a file of few bytes, of which each bit can be tried, has several


def specimen_state():
    """Tensors of several kinds and sizes, some of which shrink when compressed."""
    ramp = torch.arange(24, dtype=torch.int32)
    return {"a": ramp, "b": torch.zeros(40), "c": torch.ones(2, 3, dtype=torch.bool)}


def specimen_extra():
    return {"table": {"x": [7, 1.5, None], "y": torch.tensor(2.5)}}


def specimen(tmp, form, level=CompressionLevel.NONE, world_size=1, change=0):
    """The files of a tiny checkpoint, as a dict."""
    state = {
        name: tensor if tensor.dtype == torch.bool else tensor + change
        for name, tensor in specimen_state().items()
    }
    options = {
        "format": form,
        "compression_level": level,
        "custom_metadata": {"epoch": 3, "best": [0.5, "x"]},
    }

    def save(c):
        options_now = to(include_rng_state=False, **options)
        over(tmp, coordinator=c).save(Bag(**state), None, options_now, extra_state=specimen_extra())

    together(world_size, save)
    files = listing(tmp)
    shutil.rmtree(tmp)
    return files


def load_specimen(files):
    """What a load of these files says: "exact", "other", or (type, message) of its refusal."""
    target = Bag(**{name: torch.zeros_like(tensor) for name, tensor in specimen_state().items()})
    kind, _, result = told(lambda: over(Memory(files)).load(target, None, at(load_rng_state=False)))
    if kind != "returned":
        return kind, result
    exact = identical(target.state, specimen_state()) and identical(
        dict(result.extra_state), specimen_extra()
    )
    return "exact" if exact else "other"


REFUSALS = ("CORRUPTED_CHECKPOINT", "INCOMPATIBLE_VERSION", "VALIDATION_FAILED")


def check_damage(files, context):
    """Damaged files are rejected by a validation; a load rejects them, or returns the exact state."""
    assert not over(Memory(files)).validate_checkpoint("p").is_valid, context
    outcome = load_specimen(files)
    assert outcome == "exact" or outcome[0] in REFUSALS, (context, outcome)
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
        for length in range(len(whole)):
            yield (name, length), {**files, name: whole[:length]}
        for more in (b"\0", b" ", b"}", b"\n", bytes(PAGE), whole):
            yield (name, more), {**files, name: whole + more}


def check_all(ram, monkeypatch, damage, form, level):
    """Each of the damages that `damage(files)` makes, shared out over the processor's cores. How many."""
    monkeypatch.setattr(st, "BLOCK_BYTES", SMALL_BLOCK)
    monkeypatch.setattr(st, "UNIT_BYTES", SMALL_UNIT)
    files = specimen(ram / "s", form, level)
    assert load_specimen(files) == "exact" and over(Memory(files)).validate_checkpoint("p").is_valid
    return sum(run(CORES, check_share, ram, damage, files, limit_s=6 * HANG_S))  # minutes of work


def check_share(rank, world_size, tmp, damage, files):
    st.BLOCK_BYTES, st.UNIT_BYTES, count = SMALL_BLOCK, SMALL_UNIT, 0
    os.sched_setaffinity(
        0, {sorted(os.sched_getaffinity(0))[rank]}
    )  # the I/O threads of one load: they take turns
    for context, broken in itertools.islice(damage(files), rank, None, world_size):
        assert check_damage(broken, context) != "exact", context  # this load needs every block
        count += 1
    return count


# Whole files are never compressed: a level changes nothing but the rank's own files.
BYTE_FORMS = [(form, CompressionLevel.NONE) for form in FORMATS]
BYTE_FORMS.append((CheckpointFormat.MULTI_SHARD, CompressionLevel.FAST))


@pytest.mark.parametrize("form, level", BYTE_FORMS)
@pytest.mark.parametrize("damage", [flipped, of_other_lengths])
def test_each_bit_and_each_length_of_every_file_is_missed_by_no_validation_and_by_no_load(
    ram, monkeypatch, damage, form, level
):
    COUNTS["bits flipped" if damage is flipped else "lengths"] += check_all(
        ram, monkeypatch, damage, form, level
    )


@pytest.mark.parametrize("level", FUZZ_LEVELS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_swapped_duplicated_missing_or_replayed_from_another_save_are_rejected(
    ram, tiny_blocks, world_size, form, level
):
    files, other = (specimen(ram / "s", form, level, world_size, change) for change in (0, 1))
    record = "p.metadata.json"
    names, theirs = ([name for name in sorted(found) if name != record] for found in (files, other))
    assert len(names) == len(theirs) and not set(names) & set(theirs)
    moved = [{**files, a: files[b], b: files[a]} for a, b in itertools.combinations(names, 2)]  # swapped
    moved += [{**files, a: files[b]} for a, b in itertools.permutations(names, 2)]  # duplicated
    moved += [{name: data for name, data in files.items() if name != gone} for gone in names]
    changed = [(a, b) for a, b in zip(names, theirs) if files[a] != other[b]]
    assert changed
    moved += [
        {**files, a: other[b]} for a, b in changed
    ]  # one shard, under the name that is expected, or all of them
    moved += [{**files, **{a: other[b] for a, b in changed}}, {**files, record: other[record]}]
    for number, broken in enumerate(moved):
        check_damage(broken, number)


# Row 15, 16: fuzz, seeded. Only what is documented comes out, with little work and in little memory

ROUNDS = int(os.environ.get("CKPT_FUZZ_ROUNDS", "1"))  # more of them: more cases of the same kinds


def with_record(files, record):
    """The files with another record: a dict, or JSON text that ends in `}`. Its CRC is right."""
    if isinstance(record, bytes):
        return {**files, "p.metadata.json": record[:-1] + b',"crc32":"%08x"}\n' % zlib.crc32(record[:-1])}
    return {**files, "p.metadata.json": sealed(record)}


def with_shard(files, name, header, data):
    """Replace a file: header text, data. The record knows its new length and the CRC of its header."""
    header += b" " * (-(8 + len(header)) % PAGE)
    start = struct.pack("<Q", len(header)) + header
    record = json.loads(files["p.metadata.json"])
    (row,) = (row for row in record["files"] if f"p/{row[0]}" == name)
    row[1:] = len(start + data), len(start), f"{zlib.crc32(start):08x}"
    return with_record({**files, name: start + data}, record)


def crcs_of(data):
    """The CRC32 of each unit, as a header has them."""
    return "".join(f"{zlib.crc32(data[at : at + UNIT]):08x}" for at in range(0, len(data), UNIT))


def header_of(content):
    """Header text and data of a shard."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].rstrip(b" "), content[8 + length :]


NASTY = [
    "-1", "0", "1", "3", "4096", str(1 << 31), str((1 << 53) + 1), str((1 << 62) - 1), str(1 << 62), str(1 << 63), str(1 << 64),
    "1" + "0" * 30, "9" * 5000, "-0", "1.0", "1e3", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "true", "null", '""',
    '".."', '"\\u0000"', '"\\ud800"', '"\xff"', "[]", "{}", "[[]]", "[0,0,1000000000]", "[1,1,1]", "[0,-1,5]", "[9,9]",
    "[4611686018427387903,1,9]", "[4611686018427387903,4611686018427387903]", '{"a":1,"a":2}', "[" * 100_000,
    "[" * 500 + "]" * 500,
    "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900,
    '"F32"', '"U8"', '"JSON"', '"BOOL"', '"F4"', '"C32"', '"C64"', '"00000000"', '"0"',
    '{"$tensor":"x"}', '{"$tensor":[]}', '{"$dict":[[[],1]]}', '{"$dict":[1]}', '{"$set":[[]]}', '{"$ndarray":["<f4",[-1],""]}',
    '{"$ndarray":["|O",[1],"gASVAA=="]}', '{"$scalar":["<f4",[1000000000,1000000000],""]}', '{"$int":"zz"}', '{"$int":""}',
    '{"$device":"moon:1"}', '{"$dtype":"nn"}', '{"$float":"00"}', '{"$datetime":"now"}', '{"$Size":[-1]}', '{"$Size":["x"]}',
    '{"$Counter":[[1,"x"]]}', '{"$bytes":"="}', '{"$str":"gA=="}', '{"$str":5}', '{"$eval":"1"}', '{"$":1}',
]  # fmt: skip


def places(node):
    """Every (container, key) of a JSON tree."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def mutated(rng, tree):
    """JSON text of a tree with some change: of its values, of its structure, or of its text."""
    tree = copy.deepcopy(tree)
    marks = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, key = rng.choice(list(places(tree)))
        old = node[key]
        kind = rng.randrange(8)
        if kind <= 2 or (kind == 3 and not isinstance(old, int)):
            mark = f"@@{len(marks)}@@"
            marks[f'"{mark}"'], node[key] = rng.choice(NASTY), mark
        elif kind == 3:
            node[key] = old + rng.choice((-1, 1, 8, -8, 1 << 20, 1 << 61))
        elif kind == 4:
            del node[key]
        elif kind == 5 and isinstance(node, dict):
            marks["@@twice@@"], node[f"@@twice@@{key}"] = "", copy.deepcopy(old)
        elif kind == 6:
            node[key] = copy.deepcopy(rng.choice([n[k] for n, k in places(tree)]))
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(old))
        else:
            node[f"{key}x"] = node.pop(key)
        if not tree:
            break
    text = json.dumps(tree)
    for mark, literal in marks.items():
        text = text.replace(mark, literal)
    return text.encode("latin-1")


def smeared(rng, text):
    """JSON text with some bytes changed, lost or repeated."""
    data = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        other = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + rng.choice((1, 3, 30))] = b""
        elif kind == 2:
            data[at:at] = data[other : other + rng.choice((1, 5, 50))]
        elif kind == 3:
            data[at] = rng.choice(b'0123456789-.eE{}[],:" \\\xff\xc0\x00')
        else:
            digits = [index for index, byte in enumerate(data) if chr(byte).isdigit()]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789")
        if len(data) < 2:
            break
    return bytes(data)


WILD = (-1, 0, 1, 1 << 31, (1 << 53) + 1, 1 << 61, 1 << 62, (1 << 63) - 1, -(1 << 63))
JUNK = (
    "",
    "=",
    "AAAA",
    "eJwDAAAAAAE=",
    "\xff",
    packed([]),
    packed([1 << 62] * 3),
    packed(range(50_000)),
    "eJwD" * 9,
)


def fuzzed_columns(rng, record):
    """A record with some change to the columns of its pieces: numbers, rows, or how they are packed."""
    pieces = expanded(record)["pieces"]
    columns = [
        c
        for key in pieces
        if key != "count"
        for c in (pieces[key] if key in ("offset", "size") else [pieces[key]])
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind, column = rng.randrange(5), rng.choice(columns)
        row = rng.randrange(len(column)) if column else 0
        if kind <= 1 and column:
            column[row] = rng.choice((*WILD, column[row] + rng.choice((-8, -1, 1, 8)), rng.choice(column)))
        elif kind == 2:
            for each in columns if rng.random() < 0.5 else [column]:
                each[row : row + 1] = each[row : row + 1] * rng.choice((0, 2, 2, 40))
            pieces["count"] = len(column)
        elif kind == 3:
            key = rng.choice(list(pieces))
            pieces[key] = (
                rng.choice((*JUNK, [], 7, None, [*JUNK[:2]])) if key != "count" else rng.choice(WILD)
            )
        elif len(column) > 1:
            other = rng.randrange(len(column))
            for each in columns:  # two rows change places
                if len(each) > max(row, other):
                    each[row], each[other] = each[other], each[row]
    return record


def fuzzed_record(rng, files):
    record, kind = json.loads(files["p.metadata.json"]), rng.random()
    del record["crc32"]
    if kind < 0.4:
        return with_record(files, fuzzed_columns(rng, record))
    text = json.dumps(record, separators=(",", ":")).encode()
    return with_record(files, mutated(rng, record) if kind < 0.8 else smeared(rng, text))


def fuzzed_header(rng, files):
    name = rng.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    header, data = header_of(files[name])
    text = mutated(rng, json.loads(header)) if rng.random() < 0.7 else smeared(rng, header)
    files = with_shard(files, name, text, data)
    if rng.random() < 0.1:  # the length field
        length = rng.choice((0, 1, 2, len(data), 1 << 31, 1 << 63, (1 << 64) - 1, rng.randrange(1 << 20)))
        files[name] = struct.pack("<Q", length) + files[name][8:]
    return files


FUZZERS = {"record": fuzzed_record, "header": fuzzed_header}


def check_bad_input(files, context="", seconds=1.0, save=True):
    """Only typed refusals come out of damaged or lying files, with little work; nor do they stop a save.

    `seconds` are of this process, in all its threads, whatever else the machine does.
    """
    started = time.process_time()
    outcome = load_specimen(files)
    assert outcome in ("exact", "other") or outcome[0] in REFUSALS, (outcome, context)
    checkpoint = over(Memory(files))
    checkpoint.list_checkpoints()
    valid = checkpoint.validate_checkpoint("p")
    valid.get_summary()
    assert not save or save_word(checkpoint, "new", "q") == "q", context
    took = time.process_time() - started
    assert took < seconds, (took, context)
    return outcome, valid.is_valid


SEALED = {
    "a float of one byte": {"$float": "00"},
    "a list in lists": functools.reduce(lambda node, _: [node], range(900), 0),
    "an object in objects": functools.reduce(lambda node, _: {"a": node}, range(900), 0),
    "a tuple in tuples": functools.reduce(lambda node, _: {"$tuple": [node]}, range(400), 0),
    "a mapping with a list as key": {"$dict": [[[], 1]]},
    "an array of objects": {"$ndarray": ["|O", [1], "gASVAA=="]},
    "an array larger than its bytes": {"$ndarray": ["<f4", [1 << 40], ""]},
    "a number of a million digits": {"$int": "f" * 1_000_000},
    "a dtype that is a module": {"$dtype": "nn"},
    "an unknown kind": {"$eval": "1"},
}


@pytest.mark.parametrize("value", SEALED)
def test_a_value_in_a_sealed_record_that_cannot_be_decoded_never_stops_a_listing_a_clean_up_or_a_save(
    ram, value
):
    files = edited(
        specimen(ram / "s", CheckpointFormat.MULTI_SHARD),
        lambda r: r["custom_metadata"].update(epoch=SEALED[value]),
    )
    check_bad_input(files)
    storage = Memory(files)
    st.collect_garbage(storage)
    put(storage, "new", "q", keep_last=3)
    assert seen(storage, "q") == "new" and "q" in [info.prefix for info in over(storage).list_checkpoints()]
    over(storage).delete_checkpoint("p")


def most_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", [*FUZZERS, "import"])
def test_fuzz_of_headers_and_records_raises_only_what_is_documented_in_little_time_and_memory(
    ram, form, what
):
    count, outcomes = apart(fuzz, ram, what, form, limit_s=HANG_S * ROUNDS)
    COUNTS["fuzz cases"] += count
    # The fuzz reaches the checks: an import looks at entries alone, a load at the CRC of all of the header.
    assert outcomes["CORRUPTED_CHECKPOINT"] > count // 4, outcomes


def fuzz(tmp, what, form):
    outcomes, count, started = Counter(), 1700 * ROUNDS, 0
    bases = [specimen(tmp / "s", form, level, world_size) for level in FUZZ_LEVELS for world_size in (1, 2)]
    for number in range(-20, count):  # a few to warm up
        seed = max(0, number)
        rng, base = random.Random(seed), bases[seed % len(bases)]
        files = FUZZERS["header" if what == "import" else what](rng, base)
        if number == 0:
            started = most_memory()
        if what == "import":
            outcome = fuzz_import(tmp / "m.safetensors", files, (form, seed))
        else:
            outcome, valid = check_bad_input(files, (what, form, seed), save=seed % 8 == 0)
            if what == "header" and files != base:  # which a load does not need, but for its CRCs
                assert not valid and outcome != "other", (form, seed, outcome)
        if number >= 0:
            outcomes[outcome if isinstance(outcome, str) else outcome[0]] += 1
    assert most_memory() - started < 64 * MiB, "memory"
    return count, outcomes


def fuzz_import(path, files, context):
    """A tensor file with a fuzzed header as the source of an import."""
    (name, *_) = [name for name in sorted(files) if name.endswith(".safetensors")]
    path.write_bytes(files[name])
    started = time.process_time()
    kind, _, message = told(lambda: ckpt.import_checkpoint(path, Memory({}), "p"))
    assert kind in ("returned", "ValueError", *REFUSALS), (context, kind, message)
    assert time.process_time() - started < 1.0, context
    return "CORRUPTED_CHECKPOINT" if kind == "ValueError" else kind


# Row 17, 18: lies that are well formed. They are refused before memory is taken for them


def dumped(tree):
    return json.dumps(tree, separators=(",", ":")).encode()


def edited(files, edit):
    """The files with a record changed by `edit(dict)`, which gets columns as lists, and sealed again."""
    record = expanded(json.loads(files["p.metadata.json"]))
    edit(record)
    return with_record(files, record)


def _tensor(record, name):
    """The index of a tensor, and that of its only piece."""
    (number,) = (number for number, row in enumerate(record["tensors"]) if row[0] == name)
    return number, record["pieces"]["tensor"].index(number)


def _shape(name, shape, piece=True, length=False):
    """A tensor of another shape. So is its piece, and its length is right too, if wished."""

    def edit(record):
        (number, row), pieces = _tensor(record, name), record["pieces"]
        record["tensors"][number][2] = shape
        for key, default in (("offset", 0), ("size", 1)):
            width = max(len(t[2]) for t in record["tensors"])
            pieces[key] += [[default] * pieces["count"] for _ in range(width - len(pieces[key]))]
            for dim in range(width if piece else 0):
                pieces[key][dim][row] = shape[dim] if key == "size" and dim < len(shape) else default
        if length:
            pieces["length"][row] = math.prod(shape) * (1 if record["tensors"][number][1] == "JSON" else 4)

    return lambda files: edited(files, edit)


def _entries(files, count):
    """A header with a great many entries of nothing."""
    path = next(name for name in files if name.endswith(".safetensors"))
    header, data = header_of(files[path])
    more = b",".join(b'"z%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(count))
    return with_shard(files, path, header[:-1] + b"," + more + b"}", data)


def _pieces(**columns):
    """Columns of the pieces replaced: by another one, or by a function of the one that is there."""

    def edit(record):
        pieces = record["pieces"]
        pieces |= {key: new(pieces[key]) if callable(new) else new for key, new in columns.items()}

    return lambda files: edited(files, edit)


def _row(column, number, of="model/a"):
    """One number of a column replaced."""

    def edit(record):
        record["pieces"][column][_tensor(record, of)[1]] = number

    return lambda files: edited(files, edit)


def _share(files):
    """A file in which all pieces of a large tensor are the same few bytes; header and record agree on it."""
    path = next(name for name in files if name.endswith(".safetensors"))
    header, data = header_of(files[path])
    tree = {"__metadata__": json.loads(header)["__metadata__"]}
    for n in range(40):
        tree[f"model/a@{24 * n}"] = {"dtype": "I32", "shape": [24], "data_offsets": [0, 96]}

    def edit(record):
        record["tensors"], record["compression"] = [["model/a", "I32", [24 * 40], None, None]], "none"
        columns = {"tensor": [0] * 40, "file": [0] * 40, "begin": [0] * 40, "length": [96] * 40}
        record["pieces"] = {"count": 40, **columns, "offset": [[*range(0, 24 * 40, 24)]], "size": [[24] * 40]}

    text = dumped(tree)
    return edited(with_shard(files, path, text, data), edit)


def _files(times=1, **fields):
    """A record whose file has another length or header length, or is named several times."""

    def edit(record):
        name, length, header_bytes, crc = record["files"][0]
        row = [name, fields.get("length", length), fields.get("header_bytes", header_bytes), crc]
        record["files"] = [row] * times

    return lambda files: edited(files, edit)


def _claim(**fields):
    return lambda files: edited(files, lambda record: record.update(fields))


BILLION = 10**9
BOMB = base64.b64encode(zlib.compress(bytes(256 * MiB), 9)).decode()  # a column of 33 million zeros
LIES = {
    "10^9 pieces": _pieces(count=BILLION),
    "2^62 pieces": _pieces(count=(1 << 62) - 1),
    "pieces of 64 dimensions": _pieces(
        offset=lambda old: old + [[0] * len(old[0])] * 62, size=lambda old: old + [[1] * len(old[0])] * 62
    ),
    "pieces of 10^4 dimensions": _pieces(
        offset=lambda old: old[:1] * 10**4, size=lambda old: old[:1] * 10**4
    ),
    "a column that inflates to 256 MiB": _pieces(begin=BOMB),
    "columns that inflate to 256 MiB": _pieces(offset=[BOMB] * 2, size=[BOMB] * 2),
    "a column of more rows": _pieces(begin=lambda old: old + old),
    "a column of fewer rows": _pieces(length=lambda old: old[:-1]),
    "a column with bytes behind its end": _pieces(
        file=lambda old: base64.b64encode(base64.b64decode(packed(old)) + b"\0").decode()
    ),
    "a begin of which the end overflows": _row("begin", (1 << 63) - 1),
    "a length of 2^63 - 1": _row("length", (1 << 63) - 1),
    "a negative begin": _row("begin", -1),
    "a negative length": _row("length", -96),
    "a tensor of a negative number": _row("tensor", -1),
    "a file of a negative number": _row("file", -1),
    "an offset and a size that overflow": lambda f: edited(
        f, lambda r: [r["pieces"][key][0].__setitem__(0, (1 << 63) - 1) for key in ("offset", "size")]
    ),
    "pieces that share their bytes": _share,
    "a shape over the file's size": _shape("model/a", [1 << 40]),
    "a shape over the file's size, and its length": _shape("model/a", [1 << 40], length=True),
    "a shape over the file's size, extra state": _shape("extra/table.y", [1 << 40]),
    "a value over the file's size": _shape("extra/table", [1 << 40]),
    "a value over the file's size, and its length": _shape("extra/table", [1 << 40], length=True),
    "a shape of 64 dimensions": _shape("model/a", [2] * 64),
    "a shape that overflows": _shape("model/a", [1 << 61] * 8),
    "a shape in the list of tensors alone": _shape("model/b", [1 << 40], piece=False),
    "10^6 entries": lambda f: _entries(f, 10**6),
    "5,000 files that are one": _files(times=5000),
    "10^9 ranks": _claim(world_size=BILLION),
    "a sequence number at the limit": _claim(sequence=(1 << 62) - 1),
    "a sequence number over the limit": _claim(sequence=1 << 62),
    "a file of 2^61 bytes": _files(length=1 << 61),
    "a header of 2^61 bytes": _files(length=1 << 61, header_bytes=1 << 61),
    "a header as long as the file": _files(header_bytes=4096 + 262),
}
TRUE_FOR_A_LOAD = ("10^9 ranks", "a sequence number at the limit", "10^6 entries")  # it needs none of that


@pytest.mark.parametrize("level", FUZZ_LEVELS)
@pytest.mark.parametrize("lie", LIES)
def test_a_well_formed_lie_is_refused_before_memory_is_taken_for_it(ram, lie, level):
    honest = specimen(ram / "s", CheckpointFormat.MULTI_SHARD, level)
    lying = LIES[lie](honest)
    size = sum(map(len, lying.values()))
    outcome, valid = check_bad_input(lying)
    tracemalloc.start()  # which takes its time
    try:
        check_bad_input(lying, seconds=60.0)
        assert tracemalloc.get_traced_memory()[1] < 2 * size + 64 * MiB
    finally:
        tracemalloc.stop()
    if lie in TRUE_FOR_A_LOAD:
        assert outcome == "exact" and valid is ("entries" not in lie)
    else:
        assert outcome[0] in REFUSALS and not valid, outcome


def test_a_lie_never_takes_the_memory_that_it_speaks_of(ram):
    """In a process that has no more address space than the files need: whoever tries to take it fails."""
    assert apart(load_with_little_room, ram)


def load_with_little_room(tmp):
    bases = [specimen(tmp / "s", CheckpointFormat.MULTI_SHARD, level) for level in FUZZ_LEVELS]
    for files in bases:
        check_bad_input(files)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + 512 * MiB,) * 2)
    for lie in LIES:
        for files in bases:
            check_bad_input(LIES[lie](files), lie, seconds=30.0)
    return True


def test_a_decompression_bomb_stops_at_its_declared_size(ram):
    live, options = Bag(a=torch.arange(9), b=torch.zeros(1 << 18)), at(load_rng_state=False)
    over(ram).save(live, None, to(compression_level=CompressionLevel.FAST, include_rng_state=False))
    files = listing(ram)
    (path,) = [name for name in files if name.endswith(".safetensors")]
    header, data = header_of(files[path])
    tree = json.loads(header)
    first, last = tree["model/b"]["data_offsets"]
    assert last == len(data)
    bomb = zlib.compress(bytes(200 * MiB), 9)
    plane = zlib.compress(bytes(1 << 18), 9)  # as it is declared
    for planes in ([bomb] * 4, [bomb, plane, plane, plane], [plane, plane, plane, bomb]):
        frame = struct.pack("<B4I", 4, *map(len, planes)) + b"".join(planes)
        body = data[:first] + frame
        tree["model/b"] = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [first, len(body)]}
        tree["__metadata__"]["crc32"] = crcs_of(body)
        bombed = with_shard(files, path, dumped(tree), body)
        bombed = edited(
            bombed, lambda r: r["pieces"]["length"].__setitem__(_tensor(r, "model/b")[1], len(frame))
        )
        tracemalloc.start()
        try:
            kind, _, message = told(lambda: over(Memory(bombed)).load(live, None, options))
            taken = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert kind == "CORRUPTED_CHECKPOINT" and "frame is damaged" in message, message
        assert taken < 2 * sum(map(len, bombed.values())) + 64 * MiB


# Row 19: names


BAD_NAMES = [
    "..", ".", "", "../outside.safetensors", "../../outside.safetensors", "/etc/passwd", "x/../../outside.safetensors",
    "{id}-00000-of-00001.safetensors/../../../outside.safetensors", "{id}-00000-of-00001.safetensors\0", "\0", "outside\\x",
    "..\\outside.safetensors", "n" * 300, "{id}-00000-of-00001.safetensors" + "n" * 300, "ü.safetensors", "p.metadata.json",
    "{id}-00000-of-00001.\N{LATIN SMALL LETTER LONG S}afetensors", "{id}-00000-of-00001.SAFETENSORS", "~/outside.safetensors",
    "{id}-\N{FULLWIDTH DIGIT ZERO}0000-of-00001.safetensors", "{id}-00000-of-00001.safetensors\n", "link/outside.safetensors",
    " {id}-00000-of-00001.safetensors", "./{id}-00000-of-00001.safetensors", "file:///etc/passwd", "outside.safetensors",
]  # fmt: skip


def check_bad_name(tmp, name):
    """A file has a bad name in its record: readers refuse it; nothing outside is read, written or deleted."""
    base = tmp / "base"
    put(base, "old")
    (path,) = shards(base)
    outside = [tmp / "outside.safetensors", base / "outside.safetensors", base / "p" / "outside.safetensors"]
    for copied in outside:
        shutil.copy(path, copied)
    (base / "p" / "link").symlink_to(tmp)
    for tree in (tmp, base / "p"):
        (tree / "outside\\x").write_bytes(path.read_bytes())
    name = name.replace("{id}", path.name[:8])
    reseal(base / "p.metadata.json", lambda record: record["files"][0].__setitem__(0, name))
    before, files = {k: v for k, v in listing(tmp).items() if "metadata.json" not in k}, Seam()
    checkpoint = over(Storage(base, files))
    assert seen(checkpoint.storage).startswith("CORRUPTED_CHECKPOINT"), (name, seen(checkpoint.storage))
    assert not checkpoint.validate_checkpoint("p").is_valid and checkpoint.list_checkpoints() == []
    assert not any(op.call == "pread" and not op.path.endswith(".metadata.json") for op in files.log), name
    st.collect_garbage(checkpoint.storage)
    assert {k: v for k, v in listing(tmp).items() if "metadata.json" not in k} == before, name
    told(lambda: put(checkpoint.storage, "new", "q"))
    told(lambda: checkpoint.delete_checkpoint("p"))
    told(lambda: put(checkpoint.storage, "new"))
    after = listing(tmp)
    own = str(path.relative_to(tmp))
    assert all(after.get(k) == v for k, v in before.items() if k != own), name


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_name_in_a_record_is_refused_and_nothing_that_it_may_mean_is_touched(ram, name):
    check_bad_name(ram, name)


@pytest.mark.parametrize(
    "name", [n for n in BAD_NAMES if n.count("/") or n in ("..", ".", "", "\0")], ids=ascii
)
def test_a_bad_path_is_refused_by_the_storage_itself(ram, name):
    (ram / "outside.safetensors").write_text("mine")
    (ram / "base" / "p").mkdir(parents=True)
    (ram / "base" / "p" / "link").symlink_to(ram)
    storage, before = ckpt.LocalStorage(ram / "base"), listing(ram)
    for path in (f"p/{name}", name):
        calls = [
            storage.open,
            storage.create,
            storage.delete,
            storage.length,
            storage.sync_directory,
            storage.names,
            storage.age_s,
        ]
        for call in calls:
            with contextlib.suppress(ValueError, OSError, CheckpointException):
                result = call(path)
                assert not result or call is storage.create or name.count("..") == 0, (call, path)
    after = {k: v for k, v in listing(ram).items() if not k.startswith("base/")}
    assert after == {k: v for k, v in before.items() if not k.startswith("base/")}


@pytest.mark.parametrize(
    "name", ["ü", "a b", ".", "..", "a\\b", "\x7f", "n" * 220, "\N{GREEK SMALL LETTER PI}", "-", "%2e%2e"]
)
def test_files_with_names_that_no_checkpoint_can_have_disturb_nobody(ram, name):
    put(ram, "old")
    for stray in (f"{name}.metadata.json", f"{name}.metadata.json.0badf00d.tmp", f"p/{name}.safetensors"):
        (ram / stray).write_bytes((ram / "p.metadata.json").read_bytes())
    (ram / f"{name}x").mkdir()
    before = listing(ram)
    checkpoint = over(ram)
    assert "p" in [info.prefix for info in checkpoint.list_checkpoints()]
    assert seen(ckpt.LocalStorage(ram)) == "old"
    put(ram, "new")
    assert seen(ckpt.LocalStorage(ram)) == "new"
    st.collect_garbage(checkpoint.storage)
    assert all(
        listing(ram).get(k) == v for k, v in before.items() if name in k and ".tmp" not in k and k[0] != "p"
    )


# Row 20: something else where a file of ours should be


def _fifo(path, outside):
    os.mkfifo(path)


def _device(path, outside):
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero, where it never ends
    except PermissionError:
        path.symlink_to("/dev/zero")


def _directory(path, outside):
    path.mkdir()
    (path / "mine").write_text("mine")


IMPOSTORS = {
    "a symbolic link": lambda path, outside: path.symlink_to(outside),
    "a dangling link": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a link to itself": lambda path, outside: path.symlink_to(path.name),
    "a FIFO": _fifo,
    "a device": _device,
    "a hard link": lambda path, outside: (
        os.link(outside, path) if outside.is_file() else path.symlink_to(outside)
    ),
    "a directory": _directory,
}
VICTIMS = ["shard", "record", "directory", "temporary"]


def impostor(tmp, victim, kind):
    """A base path in which one thing was replaced by something else, which looks to a copy of it outside."""
    base, outside = tmp / "base", tmp / "outside"
    put(base, "old")
    (shard,) = shards(base)
    path = {
        "shard": shard,
        "record": base / "p.metadata.json",
        "directory": base / "p",
        "temporary": base / "p.metadata.json.0badf00d.tmp",
    }[victim]
    if victim == "temporary":
        shutil.copy(base / "p.metadata.json", path)
    shutil.move(path, outside)
    IMPOSTORS[kind](path, outside)
    return base, path, {k: v for k, v in listing(tmp).items() if k.startswith("outside")}


IMPOSED = {
    "load": seen,
    "list": lambda s: over(s).list_checkpoints(),
    "validate": lambda s: over(s).validate_checkpoint("p").is_valid,
    "gc": lambda s: st.collect_garbage(s),
    "save elsewhere": lambda s: told(lambda: put(s, "other", "q")),
    "save": lambda s: told(lambda: put(s, "new")),
    "save, overwrite=False": lambda s: told(lambda: put(s, "new", overwrite=False)),
    "delete": lambda s: told(lambda: over(s).delete_checkpoint("p")),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_what_replaces_a_file_or_directory_of_ours_is_not_followed_and_holds_up_nobody(ram, victim, kind):
    """Each call in turn, on a fresh copy: it comes back, and nothing outside has changed."""
    for name, outcome, whole in apart(meet_impostor, ram, victim, kind):
        assert whole, f"{name} changed what is outside: {outcome}"
        if name == "load" and victim != "temporary" and (kind, victim) not in HARMLESS:
            assert outcome not in WORDS, (name, outcome)
        if name == "validate" and victim != "temporary" and (kind, victim) not in HARMLESS:
            assert outcome is False, name
        if name == "save elsewhere":
            assert outcome[0] == "returned", outcome
        assert not (isinstance(outcome, str) and outcome.startswith("raw")), (name, outcome)


HARMLESS = {("a hard link", "shard"), ("a hard link", "record")}  # the same bytes, in a regular file


def meet_impostor(tmp, victim, kind):
    found = []
    for number, (name, call) in enumerate(IMPOSED.items()):
        here = tmp / str(number)
        base, _, before = impostor(here, victim, kind)
        try:
            outcome = call(ckpt.LocalStorage(base))
        except Exception as error:
            outcome = f"raw {type(error).__name__} {error}"
        after = {k: v for k, v in listing(here).items() if k.startswith("outside")}
        found.append(
            (name, outcome if isinstance(outcome, (str, bool, tuple)) else str(outcome), after == before)
        )
        shutil.rmtree(here)
    return found


@pytest.mark.parametrize("victim", ["runs", "runs/p", "runs/p/*", "runs/p.metadata.json"])
def test_a_link_below_the_base_path_is_a_storage_error_that_says_so_and_is_never_followed(
    ram, victim, capsys, caplog
):
    base = ram / "base"
    put(base, "old", "before")
    put(base, "new", "runs/p")
    (path,) = base.glob(victim)
    shutil.move(path, ram / "outside")
    path.symlink_to(ram / "outside")
    says, before = "symbolic link", listing(ram / "outside") or listing(ram)["outside"]
    for fallback in (False, True):
        load = functools.partial(over(base).load, value("old"), None, at("runs/p", fallback=fallback))
        message = refusal(load, ExceptionType.STORAGE_ERROR)
        assert says in message and message.startswith(str(path.relative_to(base)))
    assert says in over(base).validate_checkpoint("runs/p").errors[0]
    code, text, _ = command(capsys, "verify", base, "runs/p")
    assert code == 1 and says in text
    assert [info.prefix for info in over(base).list_checkpoints()] == ["before"] and says in caplog.text
    caplog.clear()
    assert over(base).latest_checkpoint().prefix == "before" and says in caplog.text
    code, text, _ = command(capsys, "ls", base)
    assert code == 0 and says in text and "before" in text
    put(base, "next", "after", keep_last=1)
    assert (
        seen(ckpt.LocalStorage(base), "after") == "next"
        and seen(ckpt.LocalStorage(base), "before") == "absent"
    )
    assert st.collect_garbage(ckpt.LocalStorage(base)) == []
    for call in (lambda: put(base, "new", "runs/p"), lambda: over(base).delete_checkpoint("runs/p")):
        kind, _, message = told(call)
        assert kind == "returned" or (kind == "STORAGE_ERROR" and says in message)
    assert (listing(ram / "outside") or listing(ram)["outside"]) == before


# Row 21: pickles


PICKLE_MARK = "pickle_was_run"


def pickled(tmp):
    """A pickle that leaves a file if anybody loads it."""
    return b"\x80\x04cos\nsystem\n(S'touch " + str(tmp / PICKLE_MARK).encode() + b"'\ntR."


def _planted_values(payload):
    text = base64.b64encode(payload).decode()
    for tag in ("$pickle", "$object", "$reduce", "$bytes", "$ndarray", "$scalar", "$dtype", "$device"):
        body = ["|O", [1], text] if tag in ("$ndarray", "$scalar") else text
        yield {tag: body}
    yield {"$dtype": "serialization.pickle"}
    yield {"$ndarray": ["O", [1], text]}


def plant_pickles(files, payload):
    """Files with a pickle in every place where bytes or values are."""
    path = next(name for name in sorted(files) if name.endswith(".safetensors"))
    header, data = header_of(files[path])
    tree = json.loads(header)
    yield {**files, "p.metadata.json": payload}
    yield with_record(files, payload + b"}")
    yield {**files, path: payload}
    yield edited({**files, path: payload}, lambda r: r["files"][0].__setitem__(1, len(payload)))
    yield {**files, path: payload.ljust(len(files[path]), b"\0")}
    yield with_shard(files, path, payload, data)
    for value in _planted_values(payload):
        yield edited(files, lambda record, value=value: record["custom_metadata"].update(epoch=value))
    for key, entry in tree.items():
        if key == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        for value in (payload, *map(dumped, _planted_values(payload))):
            changed = copy.deepcopy(tree)
            body = data[:first] + value.ljust(last - first)[: last - first] + data[last:]
            changed["__metadata__"]["crc32"] = crcs_of(body)
            yield with_shard(files, path, dumped(changed), body)


def test_a_pickle_in_any_file_is_never_run(ram):
    count, events = apart(read_pickles, ram)
    assert events == [] and count > 50 and not (ram / PICKLE_MARK).exists()
    COUNTS["pickles"] += count


def read_pickles(tmp):
    bag = Bag(**specimen_state(), room="x" * 500)
    over(tmp / "s").save(
        bag,
        None,
        to(include_rng_state=False, custom_metadata={"epoch": 1}),
        extra_state={"long": ["y" * 500]},
    )
    files, payload, events, count = listing(tmp / "s"), pickled(tmp), [], 0
    sys.addaudithook(
        lambda name, args: events.append(name) if name in ("pickle.find_class", "os.system") else None
    )
    for planted in plant_pickles(files, payload):
        count += 1
        storage = Memory(planted)
        told(lambda: over(storage).load(copy.deepcopy(bag), None, at(load_rng_state=False)))
        over(storage).validate_checkpoint("p")
        over(storage).list_checkpoints()
    return count, events


# Row 27: a clock that is wrong


class Clock:
    """The `datetime` module with a clock that is some years off."""

    timezone, timedelta = datetime.timezone, datetime.timedelta

    def __init__(self):
        clock = self
        self.years = 0

        class Shifted(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                now = datetime.datetime.now(tz)
                return now.replace(year=now.year + clock.years, day=min(now.day, 28))

        self.datetime = Shifted


@pytest.mark.parametrize("years", [(0, -10, 10, -10), (10, 0, -10, -10), (-10, 10, 0, 5)], ids=str)
def test_a_clock_that_is_ten_years_off_changes_neither_order_nor_latest_nor_what_is_kept(
    ram, monkeypatch, years
):
    clock = Clock()
    monkeypatch.setattr(ckpt.coord, "datetime", clock)
    names, stamps = [], []
    for number, off in enumerate(years):
        clock.years = off
        names.append(put(ram, WORDS[number], f"run/{9 - number}" if number % 2 else None))
    checkpoint = over(ram)
    stamps = [
        info.timestamp.year - datetime.datetime.now(datetime.timezone.utc).year
        for info in checkpoint.list_checkpoints()
    ]
    assert stamps == list(years)  # the clock was really off
    assert [info.prefix for info in checkpoint.list_checkpoints()] == names
    assert checkpoint.latest_checkpoint().prefix == names[-1]
    flip(shards(ram, names[-1])[0], -1)
    target = value("old")
    options = at(names[-1], load_rng_state=False, fallback=True)
    assert checkpoint.load(target, None, options) and identical(target.state, value(WORDS[2]).state)
    clock.years = -10
    put(ram, "new", names[0], keep_last=2)
    assert [info.prefix for info in checkpoint.list_checkpoints()] == [names[-1], names[0]]
    assert seen(ckpt.LocalStorage(ram), names[0]) == "new"


# Row 35: names that a terminal obeys, or that UTF-8 cannot encode

ORDERS = [
    "\x1b[31m",
    "\r\n",
    "\x7f",
    "\x9b2J",
    "\u202egpj",
    "\u2066",
    "\u200f",
    "\u061c",
    "\u2028",
    "\x00",
    "\ufeff",
]


def check_printed(capsys, *words):
    """The exit code and what a command prints, which holds nothing that a terminal obeys."""
    code, text, _ = command(capsys, *words)
    assert all(c.isprintable() or c == "\n" for c in text), (words, text)
    return code, text


def test_no_stored_name_and_no_metadata_reaches_a_terminal_unescaped_and_json_is_exact(tmp_path, capsys):
    names = [f"{n}.a{order}b" for n, order in enumerate(ORDERS)]
    for prefix, number in (("p", 1.0), ("q", 2.0)):
        extra, custom = {name: number for name in names}, {"".join(ORDERS): "".join(ORDERS)}
        bag = Bag(**{name: torch.tensor([number, 1j], dtype=torch.complex128) for name in names})
        opened(tmp_path).save(bag, None, to(prefix, custom_metadata=custom), extra_state=extra)
    reseal(
        tmp_path / "q.metadata.json", lambda record: record.update(format="\x1b[2J", torch_version="2\u202e")
    )
    printed = {}
    export = ["export", tmp_path, "p", tmp_path / "m.safetensors"]
    for words in (
        ["ls", tmp_path],
        ["show", tmp_path, "q"],
        ["diff", tmp_path, "p", "q"],
        ["verify", tmp_path],
        export,
    ):
        printed[words[0]] = check_printed(capsys, *words)
    assert [code for code, _ in printed.values()] == [0, 0, 1, 0, 0]
    assert "\\x1b[2J" in printed["ls"][1] and "2\\u202e" in printed["show"][1]
    for name in names:
        escaped = name.encode("unicode_escape").decode()
        assert escaped in printed["show"][1] and f"model/{escaped} " in printed["diff"][1]
    assert "complex" in printed["export"][1] and "0.a\\x1b[31mb" in printed["export"][1], (
        "a warning names some"
    )
    assert set(contents(tmp_path / "m.safetensors")) == set(names)
    torch.save({"w": torch.ones(1), **{name: "x" for name in names}}, tmp_path / "m.pt")
    code, text = check_printed(capsys, "import", tmp_path / "m.pt", tmp_path, "r")
    assert code == 0 and "extra/0.a\\x1b[31mb" in text
    shown = json.loads(command(capsys, "show", tmp_path, "p", "--json")[2])
    assert {f"model/{name}" for name in names} < {tensor["name"] for tensor in shown["tensors"]}
    assert shown["custom_metadata"] == custom
    flip(shards(tmp_path)[0], shards(tmp_path)[0].stat().st_size - 1)
    code, text = check_printed(capsys, "verify", tmp_path, "p")
    assert code == 1 and "\\x" in text, "it names what is damaged"
    assert check_printed(capsys, *export)[0] == 1


REFUSED_NAMES = {
    "model/a\ud800": lambda c, name: c.save(Bag(**{name: torch.ones(1)}), None, to()),
    "model-values/a\ud800": lambda c, name: c.save(Bag(**{name: 5}), None, to()),
    "model/a\ud800.w": lambda c, name: c.save({name: Bag(w=torch.ones(1))}, None, to()),
    "extra/a\ud800": lambda c, name: c.save(Bag(), None, to(), extra_state={name: 1}),
    "extra/k.a\ud800": lambda c, name: c.save(Bag(), None, to(), extra_state={"k": {name: torch.ones(1)}}),
}


@pytest.mark.parametrize("path", REFUSED_NAMES, ids=ascii)
def test_a_name_that_utf_8_cannot_encode_is_refused_at_save_with_its_path(tmp_path, path):
    message = refusal(lambda: REFUSED_NAMES[path](opened(tmp_path), "a\ud800"), ExceptionType.SAVE_FAILED)
    assert path.encode("ascii", "backslashreplace").decode() in message and message.isascii()
    assert listing(tmp_path) == {}


def test_a_lone_surrogate_in_a_record_is_shown_escaped_and_is_never_an_encoding_error(
    tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(st, "check_name", lambda name: None)  # as if somebody else had written it
        for prefix, number in (("p", 1.0), ("q", 2.0)):
            custom = {"\udcff": "\ud800"}
            opened(tmp_path).save(
                Bag(**{"a\ud800": torch.tensor([number])}), None, to(prefix, custom_metadata=custom)
            )
    wanted = {
        "ls": 0,
        "show p": 0,
        "verify": 0,
        "diff p q --values": 1,
        "export p {}/m.safetensors": 1,
        "gc": 0,
        "rm q": 0,
    }
    printed = {}
    for line, code in wanted.items():
        word, *more = line.format(tmp_path).split()
        found, printed[word] = check_printed(capsys, word, tmp_path, *more)
        assert found == code and "codec" not in printed[word], (line, printed[word])
    for word in ("show", "diff", "export"):
        assert "a\\ud800" in printed[word]
    assert "UTF-8" in printed["export"] and "\\udcff" in printed["show"]
    shown = json.loads(command(capsys, "show", tmp_path, "p", "--json")[2])
    assert shown["custom_metadata"] == custom and "model/a\ud800" in [
        tensor["name"] for tensor in shown["tensors"]
    ]
    target = Bag(**{"a\ud800": torch.zeros(1)})
    opened(tmp_path).load(target, None, at())
    assert target.state["a\ud800"].item() == 1.0


# Row 36: something else than a file as the source of an import


def _socket(path, outside):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(path))


def places_of_files(tmp):
    """Sources of an import, each with one of its files."""
    state = {"a": torch.ones(1), "b": torch.ones(2)}
    for name in ("folder", "index", "dcp"):
        (tmp / name).mkdir(parents=True)
    yield (safetensors_file(tmp / "m.safetensors", state),) * 2
    yield (as_torch(tmp, state),) * 2
    index = as_index(tmp / "index", state)
    yield index, index.parent / "m-1.safetensors"
    yield index.parent, index
    yield tmp / "folder", safetensors_file(tmp / "folder" / "m.safetensors", state)
    dcp.save(dict(state), checkpoint_id=tmp / "dcp", no_dist=True)
    yield tmp / "dcp", tmp / "dcp" / "__0_0.distcp"
    yield tmp / "dcp", tmp / "dcp" / ".metadata"


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "a directory"])
def test_what_is_no_regular_file_is_refused_at_once_as_a_source_of_an_import(ram, kind):
    for source, path, (outcome, _, message), files in apart(import_impostors, ram, kind):
        if kind == "a directory" and (source == path or "dcp" in path):
            assert outcome in ("ValueError", "LOAD_FAILED"), (path, outcome, message)
        else:
            assert (outcome, message) == ("ValueError", f"{path}: expected a file, found {kind}"), (
                path,
                outcome,
                message,
            )
        assert files == {}


def import_impostors(tmp, kind):
    found = []
    for number in range(len([*places_of_files(tmp / "all")])):
        source, path = [*places_of_files(tmp / str(number))][number]
        path.unlink()
        {**IMPOSTORS, "a socket": _socket}[kind](path, tmp)
        answer = told(lambda: ckpt.import_checkpoint(source, ckpt.LocalStorage(tmp / "c"), "p"))
        found.append((str(source), str(path), answer, listing(tmp / "c")))
    return found


# Row 37: a record that cannot be read, beside good ones

UNREADABLE = {
    "a record that may not be opened": lambda op: op.call == "open" and op.path.endswith("/q.metadata.json"),
    "a record on a bad sector": lambda op: op.call == "pread" and op.path.endswith("/q.metadata.json"),
    "a directory that may not be listed": lambda op: op.call == "listdir" and op.path.endswith("/theirs"),
}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("what", UNREADABLE)
def test_an_unreadable_record_stops_only_who_asks_for_it_and_is_else_skipped_with_a_warning(
    ram, what, code, caplog
):
    put(ram, "old")
    put(ram, "other", "theirs/q")
    orphan = ram / "theirs" / "q" / "0badf00d-00000-of-00001.safetensors"
    orphan.write_bytes(b"")
    whole, theirs = ckpt.LocalStorage(ram), {k: v for k, v in listing(ram).items() if k.startswith("theirs")}
    storage = Storage(ram, Seam(lambda op: fail(code)(op) if UNREADABLE[what](op) else None))

    def warned(result):
        (line,) = [
            r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "theirs" in r.getMessage()
        ]
        caplog.clear()
        assert os.strerror(code) in line and "skipped theirs" in line
        return result

    assert [info.prefix for info in warned(over(storage).list_checkpoints())] == ["p"]
    assert warned(over(storage).latest_checkpoint()).prefix == "p"
    warned(put(storage, "new", "r", keep_last=2))
    warned(put(storage, "next", "s", keep_last=2))
    assert [seen(whole, prefix) for prefix in ("p", "r", "s", "theirs/q")] == [
        "absent",
        "new",
        "next",
        "other",
    ]
    assert [info.prefix for info in warned(over(storage).list_checkpoints())] == ["r", "s"]
    if "directory" not in what:
        calls = [
            lambda: put(storage, "new", "theirs/q"),
            lambda: over(storage).load(value("old"), None, at("theirs/q")),
        ]
        for call in calls:
            assert os.strerror(code) in refusal(call, ExceptionType.STORAGE_ERROR)
        assert os.strerror(code) in over(storage).validate_checkpoint("theirs/q").errors[0]
    caplog.clear()
    assert st.collect_garbage(storage) == [] and os.strerror(code) in caplog.text and "theirs" in caplog.text
    caplog.clear()
    assert {k: v for k, v in listing(ram).items() if k.startswith("theirs")} == theirs
    (path,) = shards(ram, "s")
    flip(path, path.stat().st_size - 1)
    load = at("s", fallback=True, load_rng_state=False)
    found = over(storage).load(target := value("old"), None, load)
    assert (
        found.prefix == "r"
        and identical(target.state, value("new").state)
        and "skipped theirs" in caplog.text
    )
    orphan.unlink()
    assert {info.prefix for info in over(whole).list_checkpoints()} == {"r", "s", "theirs/q"}


# Row 2, more of it: every kind of save and of delete


def _ranks(world_size, call):
    return lambda storage: together(world_size, lambda c: call(storage, c))


def _put_ranks(storage, word, world_size, prefix="p", **options):
    together(world_size, lambda c: put(storage, word, prefix, coordinator=c, **options))


def _put_extra(storage, word, coordinator, **options):
    checkpoint = over(storage, coordinator)
    checkpoint.save(
        value(word), None, to(include_rng_state=False, **options), extra_state={"word": word, "n": [1, 2]}
    )


def losses(ranks):
    """Saves and deletes by a number of ranks, each as a scene, by name."""
    first, one = (lambda s: Path(s.base_path).mkdir(exist_ok=True)), {"p": {"old", "new"}}
    old, done = (lambda s: _put_ranks(s, "old", ranks)), {"p": {"new"}}

    def new(**options):
        return lambda s: _put_ranks(s, "new", ranks, **options)

    def extra(**options):
        return _ranks(ranks, lambda s, c: _put_extra(s, "new", c, **options))

    yield "extra state", Scene(old, extra(), one, done)
    yield (
        "extra state, compressed",
        Scene(first, extra(compression_level=CompressionLevel.FAST), {"p": {"absent", "new"}}, done),
    )
    yield (
        "delete",
        Scene(old, lambda s: over(s).delete_checkpoint("p"), {"p": {"old", "absent"}}, {"p": {"absent"}}),
    )
    yield (
        "retention",
        Scene(
            lambda s: [_put_ranks(s, "old", ranks, "q"), _put_ranks(s, "other", ranks, "r")],
            new(keep_last=1),
            {"p": {"absent", "new"}, "q": {"old", "absent"}, "r": {"other", "absent"}},
            {"p": {"new"}, "q": {"absent"}, "r": {"absent"}},
        ),
    )
    yield (
        "two in a row",
        Scene(
            old,
            lambda s: [_put_ranks(s, "other", ranks, "q"), new()(s)],
            {"p": {"old", "new"}, "q": {"absent", "other"}},
            {"p": {"new"}, "q": {"other"}},
        ),
    )
    for form in FORMATS:
        for level in (CompressionLevel.FAST, CompressionLevel.MAXIMUM):
            yield (
                f"{form.name}, {level.name}",
                Scene(old, new(format=form, compression_level=level), one, done),
            )
        yield (
            f"{form.name}, overwrite=False",
            Scene(first, new(overwrite=False, format=form), {"p": {"absent", "new"}}, done),
        )
        yield (
            f"{form.name}, deeper",
            Scene(
                lambda s, form=form: _put_ranks(s, "old", ranks, "run/a/b", format=form),
                new(format=form, prefix="run/a/b"),
                {"run/a/b": {"old", "new"}},
                {"run/a/b": {"new"}},
            ),
        )


LOSSES = {f"{name}, {ranks} rank(s)": scene for ranks in (1, 2, 3) for name, scene in losses(ranks)}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_power_loss_during_any_kind_of_save_or_delete_leaves_old_or_new(ram, tiny_blocks, loss):
    scene, base = LOSSES[loss], ram / "base"
    scene.before(ckpt.LocalStorage(base))
    visited = check_power_loss(base, scene.act, scene.allowed, scene.after)
    COUNTS["power-loss states"] += len(visited)
    check_states_recover(
        ram / "left",
        random.Random(1).sample(sorted(visited, key=sorted), min(len(visited), 10)),
        {"p", *scene.allowed},
    )


# The harness itself: twelve mutants of the library, each of which a checker above must catch. Those of its file
# operations are made at the seam, which does, and logs, something else than what it is asked for.


def _instead_of(patch, call, act):
    """Where the library asks for `call`, `act(real, seam, *args)` is done."""
    real = getattr(Seam, call)
    patch.setattr(Seam, call, lambda self, *args: act(functools.partial(real, self), self, *args))


def _no_file_sync(patch):
    _instead_of(patch, "fsync", lambda fsync, seam, fd: fd in seam.directories and fsync(fd))


def _no_directory_sync(patch):
    _instead_of(patch, "fsync", lambda fsync, seam, fd: fd in seam.directories or fsync(fd))


def _unlink_before_rename(patch):
    def act(rename, seam, source, target):
        with contextlib.suppress(FileNotFoundError):
            seam.unlink(target)
        rename(source, target)

    _instead_of(patch, "rename", act)


def _write_again(seam, path, data, offset=0):
    """Write into a file, and sync it."""
    fd = seam.open(path, os.O_RDWR)
    seam.pwrite(fd, data, offset)
    seam.fsync(fd)
    seam.close(fd)


def _overwrite_in_place(patch):
    def act(rename, seam, source, target):
        if not Path(target).exists():
            return rename(source, target)
        record = Path(source).read_bytes()
        seam.ftruncate(fd := seam.open(target, os.O_RDWR), len(record))
        seam.close(fd)
        _write_again(seam, target, record)
        seam.unlink(source)

    _instead_of(patch, "rename", act)


def _sync_again(patch):
    def act(fsync, seam, fd):
        try:
            fsync(fd)
        except OSError:
            fsync(fd)

    _instead_of(patch, "fsync", act)


def _swallow_thread_errors(patch):
    real = st.in_parallel

    def in_parallel(items, work, *args, **options):
        def quiet(*item):
            with contextlib.suppress(Exception):
                work(*item)

        real(items, quiet, *args, **options)

    patch.setattr(st, "in_parallel", in_parallel)


def _commit_before_all_have_written(patch):
    """Rank 1 reports what it is going to write, and writes it after the commit."""
    late = []

    def promise(pwrite, seam, fd, data, offset):
        if "-00001-of-" not in seam.paths[fd]:
            return pwrite(fd, data, offset)
        late.append((seam.paths[fd], bytes(data), offset))
        return len(data)

    def keep_it(rename, seam, source, target):
        rename(source, target)
        with pytest.MonkeyPatch.context() as honest:
            honest.setattr(Seam, "pwrite", real)
            while late:
                _write_again(seam, *late.pop())

    real = Seam.pwrite
    _instead_of(patch, "pwrite", promise)
    _instead_of(patch, "rename", keep_it)


def _record_before_shards(patch):
    """Tensor files are synced, but after the rename."""
    late = []

    def sync_later(fsync, seam, fd):
        if fd in seam.directories or seam.paths[fd].endswith(".tmp"):
            fsync(fd)
        else:
            late.append(seam.paths[fd])

    def rename_first(rename, seam, source, target):
        rename(source, target)
        while late:
            real(seam, fd := seam.open(late.pop(), os.O_RDWR))
            seam.close(fd)

    real = Seam.fsync
    _instead_of(patch, "fsync", sync_later)
    _instead_of(patch, "rename", rename_first)


def _crc_not_checked(patch):
    class Any(list):
        __eq__ = lambda self, other: True  # noqa: E731
        __ne__ = lambda self, other: False  # noqa: E731
        __getitem__ = lambda self, index: self  # noqa: E731
        __format__ = lambda self, spec: ""  # noqa: E731

    patch.setattr(coord.CheckpointReader, "unit_crcs", lambda self, index: Any())


def _duplicate_keys(patch):
    patch.setattr(
        st, "json", types.SimpleNamespace(**vars(json) | {"loads": lambda text, **_: json.loads(text)})
    )


def _unchecked_join(patch):
    """Names of files in a record are not looked at, and paths are joined as they come."""
    patch.setattr(st, "_FILE", re.compile(r"(?s)(.*)"))
    patch.setattr(st.LocalStorage, "_path", lambda self, name, file=True: f"{self.base_path}/{name}")


def _clean_up_before_the_commit(patch):
    def act(rename, seam, source, target):
        save, directory = source.split(".")[-2], target.removesuffix(".metadata.json")
        for name in os.listdir(directory):
            if not name.startswith(save):
                seam.unlink(f"{directory}/{name}")
        rename(source, target)

    _instead_of(patch, "rename", act)


def check_duplicate_keys(files):
    """A key that comes twice is refused, even if both values are the same: in the record, and in a file to be imported.

    No load looks into a header of our own, whose every byte the record vouches for; a validation does.
    """
    record = json.loads(files["p.metadata.json"])
    del record["crc32"]
    text = dumped(record)
    nested = [b'"custom_metadata":{', b'"pieces":{']
    again = [b'{"sequence":1,' + text[1:]]
    again += [text.replace(start, start + b'"twice":1,"twice":1,') for start in nested]
    assert text not in again
    for number, broken in enumerate(again):
        outcome = load_specimen(with_record(files, broken))
        assert outcome[0] == "CORRUPTED_CHECKPOINT" and "duplicate" in outcome[1], (number, outcome)
    path = next(name for name in files if name.endswith(".safetensors"))
    header, data = header_of(files[path])
    name = next(key for key in json.loads(header) if key != "__metadata__")
    twice = b'"},"%s":%s,' % (name.encode(), dumped(json.loads(header)[name]))
    broken = with_shard(files, path, header.replace(b'"},', twice, 1), data)
    assert load_specimen(broken) == "exact"
    assert "describes other entries" in over(Memory(broken)).validate_checkpoint("p").get_summary()
    with tempfile.TemporaryDirectory() as tmp:
        (foreign := Path(tmp) / "foreign.safetensors").write_bytes(broken[path])
        message = refusal(lambda: ckpt.import_checkpoint(foreign, tmp, "p"))
        assert "duplicate" in message


def test_a_key_that_comes_twice_is_refused_in_the_record_and_in_a_header(ram):
    check_duplicate_keys(specimen(ram / "s", CheckpointFormat.MULTI_SHARD))


def _check_loss(tmp, **options):
    check_power_loss_of_save(tmp, True, **options)


def _check_bits(tmp):
    for context, broken in itertools.islice(
        flipped(specimen(tmp / "s", CheckpointFormat.MULTI_SHARD)), 0, None, 97
    ):
        check_damage(broken, context)


MUTANTS = {
    "no file fsync": (_no_file_sync, _check_loss),
    "no directory fsync": (_no_directory_sync, _check_loss),
    "unlink before rename": (_unlink_before_rename, _check_loss),
    "overwrite in place": (_overwrite_in_place, _check_loss),
    "fsync retried on the same file": (_sync_again, lambda tmp: check_failed_sync(tmp, "fsync")),
    "thread error swallowed": (
        _swallow_thread_errors,
        lambda tmp: check_thread_error(tmp, OSError(errno.EIO, "bad disk")),
    ),
    "commit before all ranks reported": (
        _commit_before_all_have_written,
        lambda tmp: _check_loss(tmp, world_size=2),
    ),
    "record written before shards are durable": (_record_before_shards, _check_loss),
    "CRC not checked": (_crc_not_checked, _check_bits),
    "duplicate keys accepted": (
        _duplicate_keys,
        lambda tmp: check_duplicate_keys(specimen(tmp / "s", CheckpointFormat.MULTI_SHARD)),
    ),
    "unchecked path join": (_unchecked_join, lambda tmp: check_bad_name(tmp, "../../outside.safetensors")),
    "superseded shards removed before the commit": (_clean_up_before_the_commit, _check_loss),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_of_the_library_is_caught(ram, tiny_blocks, mutant):
    mutate, checker = MUTANTS[mutant]
    (ram / "sound").mkdir()
    checker(ram / "sound")  # which passes without it
    (ram / "mutant").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError) as caught:
            checker(ram / "mutant")
    assert "\n" in str(caught.value) or str(caught.value)
    COUNTS["mutants killed"] += 1


# ---- faults of several ranks: killed, raising, stopped, cancelled, signalled -------------------------------------------

STEPS = ("S1", "S2", "S3", "S4", "S5", "S6", "S7")
DEADLINE_S = 3.0  # of operations that are to fail by it; others have the default, which is over HANG_S


def entering(step, act):
    """From now on `act()` runs in this process inside each save's `step`, as the first thing; returns how to stop that."""
    whole = ckpt.coord.Operation.step

    @contextlib.contextmanager
    def struck(self, name):
        with whole(self, name):
            if name.startswith(step):
                act()
            yield

    ckpt.coord.Operation.step = struck

    def undo():
        ckpt.coord.Operation.step = whole

    return undo


def at_once(calls, threads=12):
    """Each of `calls` in a thread: cases that mostly wait. The first failure is raised once all are over."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(call) for call in calls]
    return [future.result() for future in futures]


def room_for(base, *names):
    """A directory of its own for one case."""
    path = base / "-".join(map(str, names))
    path.mkdir()
    return path


class TimeSinceFile:
    """In the place of the module `time`: a clock that stands still until there is a file at `path`."""

    sleep = staticmethod(time.sleep)

    def __init__(self, path):
        self.path, self.started = path, None

    def monotonic(self):
        if self.started is None and self.path.exists():
            self.started = time.monotonic()
        return 0.0 if self.started is None else time.monotonic() - self.started


def strike_in(step, tmp, is_victim, number):
    """From now on the victim gets a signal in each save's `step`; on all ranks the deadline counts from that moment."""
    ckpt.coord.time = TimeSinceFile(tmp / "struck")

    def act():
        (tmp / "struck").touch()
        os.kill(os.getpid(), number)

    return entering(step, act) if is_victim else lambda: None


def save_word(checkpoint, word, prefix="p", **options):
    """Save a word by an object that exists already."""
    return checkpoint.save(value(word), None, to(prefix, include_rng_state=False, **options))


def names_rank(answer, rank):
    """Whether a failure names `rank`, in its text and as a value."""
    return answer[1] == rank and re.search(rf"\brank\(?s?\)?\D*{rank}\b", answer[2]) is not None


def is_committed_without(step, victim):
    """Whether a save goes through though `victim` does nothing from `step` on: rank 0 alone commits."""
    return step == "S7" or (step == "S6" and victim != 0)


def overheard(checkpoint):
    """The list that this object's warnings go to from now on."""
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    checkpoint.logger = logging.Logger("overheard")
    checkpoint.logger.addHandler(handler)
    return said


# Row 9: a rank is killed on entry of a step


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_killed_in_any_step_is_named_by_the_deadline_and_old_or_new_is_whole(ram, world_size):
    cases = [(step, victim) for step in STEPS for victim in range(world_size)]
    at_once([functools.partial(check_kill, ram, world_size, *case) for case in cases])
    COUNTS["ranks killed"] += len(cases)


def check_kill(base, world_size, step, victim):
    tmp = room_for(base, "kill", step, victim)
    case = f"rank {victim} of {world_size} killed in {step}"
    answers = run(world_size, killed_in_step, tmp, step, victim, dies={victim})
    assert answers[victim] == "died", case
    committed = is_committed_without(step, victim)
    for answer, warned in (a for rank, a in enumerate(answers) if rank != victim):
        if committed:
            assert answer == ("returned", None, "p"), (case, answer)
            (line,) = [line for line in warned if "committed, but not every rank may know" in line]
            assert re.search(rf"no answer from rank\(s\) {victim} of", line), (case, line)
        else:
            assert answer[0] == "TIMEOUT" and names_rank(answer, victim), (case, answer)
    assert seen(tmp) == ("new" if committed else "old"), case
    (tmp / "struck").unlink()
    check_recovery(tmp, context=case)


def killed_in_step(rank, world_size, tmp, step, victim):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    strike_in(step, tmp, rank == victim, signal.SIGKILL)
    warned = overheard(checkpoint)
    return told(lambda: save_word(checkpoint, "new", timeout=DEADLINE_S)), warned


def test_a_rank_killed_while_it_waits_in_a_gather_is_missed_in_the_next_one(ram):
    """It has given its value, so that the others go on with it, up to the commit if it was the last one."""
    at_once([functools.partial(check_kill_in_gather, ram, step) for step in ("S1", "S3", "S5")])


def check_kill_in_gather(base, step):
    tmp = room_for(base, "wait", step)
    answers = run(3, killed_in_gather, tmp, step, dies={1})
    for answer, warned in (answers[0], answers[2]):
        assert answer[0] == ("returned" if step == "S5" else "TIMEOUT"), (step, answer)
        assert any("no answer from rank(s) 1 of 3" in line for line in [str(answer[2]), *warned]), (
            step,
            answer,
        )
    assert seen(tmp) == ("new" if step == "S5" else "old")
    (tmp / "struck").unlink()
    check_recovery(tmp, context=step)


def killed_in_gather(rank, world_size, tmp, step):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    warned, clock = overheard(checkpoint), TimeSinceFile(tmp / "struck")
    ckpt.coord.time = clock

    def die(seconds):
        (tmp / "struck").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    # Rank 1 dies as soon as it sleeps, which it does in the wait for the others: those come only then.
    act = functools.partial(setattr, clock, "sleep", die) if rank == 1 else lambda: await_file(tmp / "struck")
    entering(step, act)
    return told(lambda: save_word(checkpoint, "new", timeout=DEADLINE_S)), warned


# Row 10: a rank raises on entry of a step; every process lives on, so one set of them tries all


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_raises_in_any_step_stops_all_alike_or_warns_once_it_is_committed(ram, world_size, form):
    cases, silent = run(world_size, raise_in_each_step, ram, form), []
    for told_by_rank in zip(*cases):
        step, victim = told_by_rank[0]["case"]
        answers = [told["answer"] for told in told_by_rank]
        words = {told["seen"] for told in told_by_rank}
        warned = [line for told in told_by_rank for line in told["warned"]]
        case = f"rank {victim} of {world_size} raised in {step}: {answers}"
        may_commit, may_fail = step == "S7" or (step == "S6" and victim != 0), step != "S7"
        if answers[0][0] == "returned":
            assert may_commit and set(answers) == {("returned", None, "p")} and words == {"new"}, case
            silent += [] if any("boom" in line for line in warned) else [(step, victim)]
        else:
            assert may_fail and len(set(answers)) == 1 and words == {"old"}, case
            assert (
                answers[0][0] == "SAVE_FAILED" and names_rank(answers[0], victim) and "boom" in answers[0][2]
            ), case
        assert not any(told["left"] for told in told_by_rank), (case, told_by_rank)
        COUNTS["ranks that raised"] += 1
    check_recovery(ram)
    assert not silent, f"committed, with an error of (step, rank) that no rank warned about: {silent}"


def raise_in_each_step(rank, world_size, tmp, form):
    checkpoint, found = over(tmp, ckpt.TorchCoordinator()), []
    warned = overheard(checkpoint)
    for step, victim in itertools.product(STEPS, range(world_size)):
        save_word(checkpoint, "old", format=form)
        dist.barrier()
        before = save_id(tmp)
        files = set(listing(tmp))
        dist.barrier()

        def boom(step=step, before=before):
            while step == "S7" and save_id(tmp) == before:
                time.sleep(0.001)  # S7 is after the rename
            raise RuntimeError("boom")

        undo = entering(step, boom) if rank == victim else lambda: None
        del warned[:]
        answer = told(lambda: save_word(checkpoint, "new", format=form))
        undo()
        dist.barrier()
        word = seen(tmp)
        left = (
            set(listing(tmp)) - files if word == "old" else set()
        )  # an error in S7 may leave the superseded files
        told_here = {"case": (step, victim), "answer": answer, "seen": word}
        found.append(told_here | {"left": sorted(left), "warned": list(warned)})
        dist.barrier()
    return found


# Row 11: a rank stops past the deadline, and goes on


def test_a_rank_stopped_past_the_deadline_is_named_cannot_commit_and_then_all_save_and_load_again(ram):
    cases = [(step, victim) for step in STEPS for victim in range(2)] + [("S4", 2), ("S6", 0)]
    sizes = [2] * 14 + [3, 3]
    at_once([functools.partial(check_stop, ram, size, *case) for size, case in zip(sizes, cases)])
    COUNTS["ranks stopped"] += len(cases)


def check_stop(base, world_size, step, victim):
    tmp = room_for(base, "stop", world_size, step, victim)
    case = f"rank {victim} of {world_size} stopped in {step}"
    answers = run(world_size, stopped_in_step, tmp, step, victim)
    committed = is_committed_without(step, victim)
    for rank, (answer, word, again) in enumerate(answers):
        assert word == ("new" if committed else "old"), (case, rank, answer, word)
        assert again == "next", (case, rank, again)
        if committed:
            assert answer == ("returned", None, "p"), (case, rank, answer)
        else:
            assert answer[0] == "TIMEOUT", (case, rank, answer)
        if rank != victim:
            assert committed or names_rank(answer, victim), (case, rank, answer)
    assert set(listing(tmp)) - {"struck", "pid", "gave-up-0", "gave-up-1", "gave-up-2"} == named_files(tmp), (
        case
    )


def stopped_in_step(rank, world_size, tmp, step, victim):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    if rank == victim:
        (tmp / "pid").write_text(str(os.getpid()))
    undo = strike_in(step, tmp, rank == victim, signal.SIGSTOP)
    dist.barrier()
    answer = told(lambda: save_word(checkpoint, "new", timeout=DEADLINE_S))
    undo()
    if rank != victim:
        (tmp / f"gave-up-{rank}").touch()
        for other in set(range(world_size)) - {victim}:
            await_file(tmp / f"gave-up-{other}")
        # It may not have come to the step where it stops yet: a signal to go on must come after it has.
        pid = int((tmp / "pid").read_text())
        while rank == min(set(range(world_size)) - {victim}):
            if "\nState:\tT" in Path(f"/proc/{pid}/status").read_text():
                os.kill(pid, signal.SIGCONT)
                break
            time.sleep(0.01)
    dist.barrier()
    word = seen(tmp)
    dist.barrier()
    save_word(checkpoint, "next")
    target = value("old")
    checkpoint.load(target, None, at(load_rng_state=False))
    return answer, word, "next" if identical(target.state, value("next").state) else "not what was saved"


# Row 12: the process that hosts the store dies


def test_if_the_host_of_the_store_dies_every_rank_says_that_the_store_is_unreachable(ram):
    cases = [(step, world_size) for step in STEPS for world_size in (2, 3)]
    at_once([functools.partial(check_store_death, ram, *case) for case in cases])
    COUNTS["store deaths"] += len(cases)


def check_store_death(base, step, world_size):
    tmp = room_for(base, "store", step, world_size)
    case = f"the host of the store, rank 0 of {world_size}, dies in {step}"
    answers = run(world_size, host_the_store_and_die, tmp, step, dies={0})
    assert answers[0] == "died", case
    for answer in answers[1:]:
        if step == "S7":  # after the rename
            assert answer == ("returned", None, "p"), (case, answer)
        else:
            assert answer[0] == "TIMEOUT" and "store is unreachable" in answer[2], (case, answer)
    assert seen(tmp) == ("new" if step == "S7" else "old"), case
    (tmp / "port").unlink()
    check_recovery(tmp, context=case)


def host_the_store_and_die(rank, world_size, tmp, step):
    dist.barrier()  # who leaves a group while others still connect to it ends it for them
    dist.destroy_process_group()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (tmp / "port.tmp").write_text(str(store.port))
        (tmp / "port.tmp").rename(tmp / "port")
    else:
        await_file(tmp / "port")
        store = dist.TCPStore("127.0.0.1", int((tmp / "port").read_text()), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    if rank == 0:
        entering(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return told(lambda: save_word(checkpoint, "new"))


def test_a_store_that_died_before_the_first_save_is_told_of_at_the_deadline_of_the_save(tmp_path):
    _, (kind, _, message) = run(2, save_after_the_store, tmp_path, dies={0})
    assert kind == "TIMEOUT" and "store is unreachable" in message


def save_after_the_store(rank, world_size, tmp):
    dist.destroy_process_group()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (tmp / "port.tmp").write_text(str(store.port))
        (tmp / "port.tmp").rename(tmp / "port")
        await_file(tmp / "connected")
        os._exit(9)
    await_file(tmp / "port")
    store = dist.TCPStore("127.0.0.1", int((tmp / "port").read_text()), is_master=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    checkpoint = opened(tmp / "c", default_timeout=1.0)
    (tmp / "connected").touch()
    with pytest.raises(RuntimeError):
        while not store.check(["nothing"]):
            time.sleep(0.01)
    return told(lambda: checkpoint.save(small()[0], None, "p"))


# Row 24: a signal at any operation


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("scene", ["overwrite", "overwrite a single file", "delete"])
def test_a_signal_at_any_operation_ends_the_process_at_once_as_it_should_and_leaves_old_or_new(
    ram, number, scene
):
    COUNTS["signals"] += apart(signal_everywhere, ram, number, scene, limit_s=3 * HANG_S)


INTERRUPTED = 130


def signal_everywhere(tmp, number, name):
    scene, base = SCENES[name], tmp / "base"
    base.mkdir()
    scene.before(ckpt.LocalStorage(base))

    def interrupted(storage):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            scene.act(storage)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)

    expected = INTERRUPTED if number == signal.SIGINT else -number
    when = is_change if number == signal.SIGTERM or name != "overwrite" else lambda op: True
    for k in itertools.count():
        left, fired = tmp / str(k), tmp / f"fired-{k}"
        shutil.copytree(base, left)

        def send(op, fired=fired):
            fired.touch()
            os.kill(os.getpid(), number)

        code = forked(functools.partial(interrupted, Storage(left, Seam(Strike(k, send, when)))))
        context = f"{name}, {number.name} at operation {k}: exit code {code}"
        if not fired.exists():
            assert code == 0, context
            return k
        assert code == expected, context
        check_oracle(ckpt.LocalStorage(left), scene, False, context)
        check_recovery(left, PREFIXES, context)
        shutil.rmtree(left)


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_on_one_rank_ends_the_save_on_all_and_leaves_old_or_new(ram, step):
    first, second = run(2, interrupt_rank_one, ram, step)
    assert second == "interrupted"
    if first[0] == "returned":
        assert step in ("S6", "S7") and seen(ram) == "new"
    else:
        assert step != "S7" and seen(ram) == "old"
        assert first[0] == "SAVE_FAILED" and names_rank(first, 1) and "KeyboardInterrupt" in first[2], first
    assert set(listing(ram)) == named_files(ram)


def interrupt_rank_one(rank, world_size, tmp, step):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    before = save_id(tmp)
    dist.barrier()

    def interrupt():
        while step == "S7" and save_id(tmp) == before:
            time.sleep(0.001)
        raise KeyboardInterrupt

    if rank == 1:
        entering(step, interrupt)
    try:
        answer = told(lambda: save_word(checkpoint, "new"))
    except KeyboardInterrupt:
        answer = "interrupted"
    dist.barrier()
    return answer


@pytest.mark.parametrize("waiting", [0, 1])
def test_an_interrupt_of_a_rank_that_waits_ends_its_save_at_once_and_that_of_the_others_when_they_come(
    ram, waiting
):
    answers = run(2, interrupt_who_waits, ram, waiting)
    for rank, (answer, again) in enumerate(answers):
        if rank == waiting:
            assert answer == "interrupted"
        else:
            assert answer[0] == "SAVE_FAILED" and names_rank(answer, waiting) and "Interrupt" in answer[2], (
                answer
            )
        assert again == ("returned", None, "p")
    assert seen(ram) == "next" and set(listing(ram)) == named_files(ram) | {"interrupted"}


def interrupt_who_waits(rank, world_size, tmp, waiting):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank == waiting:
        later = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        undo = entering("S3", later.start)
    else:
        undo = entering("S3", lambda: await_file(tmp / "interrupted"))
    try:
        answer = told(lambda: save_word(checkpoint, "new"))
    except KeyboardInterrupt:
        answer = "interrupted"
        (tmp / "interrupted").touch()
    undo()
    dist.barrier()
    return answer, told(lambda: save_word(checkpoint, "next"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad disk"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_clean_up_after_a_commit_is_a_warning_on_its_rank_and_keeps_no_other_waiting(
    ram, error
):
    (answer, warned, again), *others = run(2, fail_to_clean_up, ram, error)
    assert others == [(("returned", None, "p"), [], ("returned", None, "p"))]
    if isinstance(error, OSError):
        assert answer == ("returned", None, "p")
        assert any("not all that should go is gone" in line and "bad disk" in line for line in warned)
    else:
        assert answer == "interrupted"
    assert again == ("returned", None, "p")
    check_recovery(ram)


def fail_to_clean_up(rank, world_size, tmp, error):
    def act(op):
        raise error

    seam = Seam()
    checkpoint = over(Storage(tmp, seam), ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    seam.before, warned = Strike(0, act, lambda op: op.call == "unlink"), overheard(checkpoint)
    try:
        answer = told(lambda: save_word(checkpoint, "new"))
    except KeyboardInterrupt:
        answer = "interrupted"
    dist.barrier()
    assert seen(tmp) == "new"
    dist.barrier()
    return answer, list(warned), told(lambda: save_word(checkpoint, "next"))


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from test_ckpt import ckpt, over, put, value, to, Seam, Storage, Strike
tmp, how = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
put(ckpt.LocalStorage(tmp), "old")

def act(op):
    print(op.call, flush=True)
    if how in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, how))
    while threading.main_thread().is_alive():  # the interpreter has begun to exit: it waits for this thread
        time.sleep(0.01)

storage = Storage(tmp, Seam(Strike(1, act, lambda op: op.call in ("pwrite", "fsync"))))
checkpoint = over(storage)
pending = checkpoint.save_async(value("new"), None, to(include_rng_state=False))
if how in ("SIGINT", "SIGTERM"):
    pending.result()
print("main is done", flush=True)
sys.exit(3)
"""
ENDINGS = {"exit": (3, {"new"}), "SIGTERM": (-15, {"old"}), "SIGINT": (-2, {"old", "new"})}


def test_an_interpreter_that_exits_with_a_save_in_flight_ends_soon_with_its_code_and_old_or_new(ram):
    at_once([functools.partial(check_exit, ram, how) for how in ENDINGS], threads=2)


def check_exit(base, how):
    tmp = room_for(base, "exit", how)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp, how], capture_output=True, text=True, timeout=HANG_S
    )
    code, words = ENDINGS[how]
    assert done.returncode == code and seen(tmp) in words, (how, done.returncode, seen(tmp), done.stderr)
    assert ("main is done" in done.stdout) == (how == "exit"), done.stdout
    check_recovery(tmp, context=how)


def test_a_failed_pending_save_that_nobody_asked_about_is_told_when_the_interpreter_exits(tmp_path):
    script = (
        "import sys, torch, ckpt\n"
        "saver = ckpt.DistributedCheckpoint(storage=ckpt.LocalStorage(sys.argv[1]))\n"
        "saver.save_async(torch.nn.Linear(2, 2), None, extra_state={'odd': object()})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=HANG_S
    )
    assert "extra/odd" in done.stderr and "nobody asked" in done.stderr


def test_a_failed_pending_save_is_not_kept_once_somebody_has_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt.log, "disabled", True)  # pytest keeps what is logged
    pending = over(tmp_path).save_async(torch.nn.Linear(2, 2), None, extra_state={"odd": object()})
    with pytest.raises(ckpt.CheckpointException, match="extra/odd"):
        pending.result()
    kept = weakref.ref(pending)
    del pending
    gc.collect()
    assert kept() is None


def test_an_exit_with_a_save_in_flight_whose_other_rank_is_dead_is_bounded_by_the_deadline(ram):
    (exited, _) = run(2, exit_beside_a_dead_rank, ram, dies={0, 1})
    assert exited == "died"
    kind, _, message = json.loads((ram / "ended").read_text())
    assert kind == "TIMEOUT" and "deadline" in message, message
    (ram / "ended").unlink()
    assert seen(ram) == "old"
    check_recovery(ram)


def exit_beside_a_dead_rank(rank, world_size, tmp):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    save_word(checkpoint, "old")
    dist.barrier()
    if rank == 1:
        os._exit(9)
    pending = checkpoint.save_async(value("new"), None, to(include_rng_state=False, timeout=DEADLINE_S))
    threading._shutdown()  # what the interpreter does first when it exits: wait for its threads
    assert pending.done()
    (tmp / "ended").write_text(json.dumps(told(pending.result)))
    os._exit(5)


# Row 25: cancel in each step


def test_cancel_in_any_step_on_any_rank_stops_all_and_the_next_save_succeeds(ram):
    cases, extra = run(2, cancel_in_each_step, ram), []
    for told_by_rank in zip(*cases):
        (case, asynchronous), answers = told_by_rank[0][0], [told[1] for told in told_by_rank]
        context = (case, asynchronous, told_by_rank)
        step, victim = case
        may_commit = step in ("S6", "S7") or (
            step == "S5" and victim
        )  # rank 0 may be past its last look already
        may_fail = step != "S7" and (step != "S6" or victim)
        if answers[0][0] == "returned":
            assert may_commit and set(answers) == {("returned", None, "p")}, context
            extra += [(*case, files) for *_, files, _ in told_by_rank[:1] if files]
        else:
            assert not any(files for *_, files, _ in told_by_rank), context
            assert may_fail and {answer[0] for answer in answers} == {"CANCELLED"}, context
            assert all(names_rank(answer, victim) for answer in answers), context
        for _, answer, word, _, after in told_by_rank:
            assert after == "next", context
            assert word == ("new" if answer[0] == "returned" else "old"), context
        COUNTS["cancels"] += 1
    assert not extra, (
        f"(step, rank, files that no record names) of cancels that came after the commit: {extra}"
    )


def cancel_in_each_step(rank, world_size, tmp):
    checkpoint, found = over(tmp, ckpt.TorchCoordinator()), []
    for asynchronous, step, victim in itertools.product([False, True], STEPS, range(world_size)):
        save_word(checkpoint, "old")
        if rank == 0:
            st.collect_garbage(checkpoint.storage)
        dist.barrier()
        cancel, before = threading.Event(), save_id(tmp)

        def act(step=step, before=before, cancel=cancel):
            while step == "S7" and save_id(tmp) == before:
                time.sleep(0.001)
            cancel.set()

        undo = entering(step, act) if rank == victim else lambda: None
        options = to(include_rng_state=False)
        dist.barrier()
        if asynchronous:
            pending = checkpoint.save_async(value("new"), None, options, cancel=cancel)
            answer = told(pending.result)
        else:
            answer = told(functools.partial(checkpoint.save, value("new"), None, options, cancel=cancel))
        undo()
        dist.barrier()
        word, left = seen(tmp), sorted(set(listing(tmp)) - named_files(tmp))
        dist.barrier()
        save_word(checkpoint, "next")
        found.append((((step, victim), asynchronous), answer, word, left, seen(tmp)))
        dist.barrier()
    return found


def test_the_cancel_of_a_pending_save_stops_the_writes_on_all_ranks_long_before_they_are_done(ram):
    for kind, written, left in run(2, cancel_a_slow_write, ram):
        assert kind == "CANCELLED" and written < 32 and left == []


def cancel_a_slow_write(rank, world_size, tmp):
    began, files = tmp / f"began-{rank}", Seam()

    def slow(op):
        if op.call == "pwrite":
            began.touch()
            time.sleep(0.5)

    files.before = slow
    checkpoint = over(Storage(tmp / "c", files), ckpt.TorchCoordinator())
    model = Bag(**{f"w{n}": torch.full((BLOCK,), n, dtype=torch.uint8) for n in range(64)})
    pending = checkpoint.save_async(model, None, to())
    for other in range(world_size):
        await_file(tmp / f"began-{other}")
    if rank == 1:
        assert pending.cancel()
    kind, _, _ = told(pending.result)
    dist.barrier()
    assert not pending.cancel()
    return kind, sum(op.call == "pwrite" for op in files.log), sorted(listing(tmp / "c"))


def test_a_rank_that_is_cancelled_while_it_waits_returns_at_once_though_another_rank_hangs(ram):
    for rank, (answer, again) in enumerate(run(2, cancel_beside_a_hung_rank, ram)):
        assert answer[0] == "CANCELLED" and names_rank(answer, 0), (rank, answer)
        assert again == ("returned", None, "p"), rank
    assert seen(ram) == "next" and set(listing(ram)) == named_files(ram) | {"cancelled"}


def cancel_beside_a_hung_rank(rank, world_size, tmp):
    """Rank 1 goes on when rank 0 has returned: with a wait for rank 1 this would be a hang."""
    checkpoint, cancel = over(tmp, ckpt.TorchCoordinator()), threading.Event()
    hang, later = functools.partial(await_file, tmp / "cancelled"), threading.Timer(0.3, cancel.set)
    undo = entering("S4", later.start if rank == 0 else hang)
    answer = told(lambda: checkpoint.save(value("new"), None, to(include_rng_state=False), cancel=cancel))
    undo()
    if rank == 0:
        (tmp / "cancelled").touch()
    dist.barrier()
    return answer, told(lambda: save_word(checkpoint, "next"))


def test_a_failure_or_cancel_stops_a_rank_that_writes_though_only_ranks_that_wait_know_of_it(ram):
    for kind, answers in zip(("CANCELLED", "SAVE_FAILED"), zip(*run(3, stop_a_slow_writer, ram))):
        assert {answer[0] for answer in answers} == {kind}, answers
        assert answers[0][1] < 32, "rank 0 wrote on, long after rank 1 had given up"
        assert [left for *_, left in answers] == [[], [], []]


def stop_a_slow_writer(rank, world_size, tmp):
    files, found = Seam(), []
    checkpoint = over(Storage(tmp / "c", files), ckpt.TorchCoordinator())
    model = (
        Bag(**{f"w{n}": torch.full((BLOCK,), n, dtype=torch.uint8) for n in range(64)})
        if rank == 0
        else Bag()
    )
    for how in ("cancel", "raise"):
        began, cancel = tmp / f"began-{how}", threading.Event()

        def slow(op, began=began):
            if op.call == "pwrite":
                began.touch()
                time.sleep(0.5)

        def act(how=how, began=began, cancel=cancel):
            await_file(began)
            if how == "raise":
                raise ValueError("boom")
            threading.Timer(0.1, cancel.set).start()  # in the gather by then, or soon

        files.before, files.log[:] = slow, []
        undo = entering("S5", act) if rank == 1 else lambda: None
        kind, who, text = told(
            lambda: checkpoint.save(model, None, to(include_rng_state=False), cancel=cancel)
        )
        undo()
        assert who == 1, (kind, who, text)
        dist.barrier()
        found.append((kind, sum(op.call == "pwrite" for op in files.log), sorted(listing(tmp / "c"))))
        dist.barrier()
    return found


def test_a_cancel_on_one_rank_between_two_attempts_stops_all_ranks(ram):
    for answer, again in run(2, cancel_between_attempts, ram):
        assert answer[:2] == ("CANCELLED", 1) and again == ("returned", None, "p"), (answer, again)


def cancel_between_attempts(rank, world_size, tmp):
    cancel, failed = threading.Event(), ckpt.coord.OperationFailed.__init__

    def cancelling(self, failure):
        failed(self, failure)
        if rank == 1:
            cancel.set()

    ckpt.coord.OperationFailed.__init__ = cancelling
    checkpoint = broken(tmp, ckpt.TorchCoordinator(), until=FOREVER)
    checkpoint.fault_handler.retry_policy = ckpt.RetryPolicy(max_retries=3, initial_delay=0.01)
    answer = told(lambda: checkpoint.save(value("new"), None, to(), cancel=cancel))
    dist.barrier()
    checkpoint.storage.seam = Seam()
    return answer, told(lambda: save_word(checkpoint, "next"))


def test_ranks_retry_together_or_not_at_all_where_one_failed_while_another_had_stopped(ram):
    """The failure could be tried again, but not all ranks know of it: a rank that did alone would be out of step."""
    first, second = run(2, fail_beside_a_stopped_rank, ram)
    assert first[0][0] == "STORAGE_ERROR" and second[0][0] in ("STORAGE_ERROR", "TIMEOUT"), (first, second)
    assert first[1] == second[1] == ("returned", None, "p")
    assert seen(ram) == "next"


def fail_beside_a_stopped_rank(rank, world_size, tmp):
    checkpoint = over(tmp, ckpt.TorchCoordinator(), attempts=3)
    save_word(checkpoint, "old")
    (tmp / f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    undo = strike_in("S4", tmp, rank == 1, signal.SIGSTOP)
    if rank == 0:

        def fail_late():
            await_file(tmp / "struck")
            raise OSError(errno.EIO, "bad disk")

        undo = entering("S4", fail_late)
    answer = told(lambda: save_word(checkpoint, "new", timeout=DEADLINE_S))
    undo()
    if rank == 0:
        os.kill(int((tmp / "pid-1").read_text()), signal.SIGCONT)
    dist.barrier()
    return answer, told(lambda: save_word(checkpoint, "next"))


# Exchanges of bytes between ranks: what is in the way of one there reaches the others, who wait for its bytes


def at_exchange(number, act):
    """From now on `act()` runs before this process takes part in exchange `number`; returns how to stop that."""
    whole, count = ckpt.TorchCoordinator.all_to_all, itertools.count()

    def struck(self, *args):
        if next(count) == number:
            act()
        return whole(self, *args)

    ckpt.TorchCoordinator.all_to_all = struck

    def undo():
        ckpt.TorchCoordinator.all_to_all = whole
        return next(count) > number

    return undo


class Exchanging:
    """Saves, or loads, whose bytes are exchanged in several rounds, over the ranks of this process's group."""

    def __init__(self, tmp, world_size):
        st.BLOCK_BYTES, st.UNIT_BYTES = PAGE, PAGE // 2  # so that a few KiB take several rounds
        self.mesh = init_device_mesh("cpu", (world_size,))
        self.checkpoint = over(tmp, ckpt.TorchCoordinator())

    def model(self, number):
        columns = torch.full((512, 96), float(number))
        return Bag(
            w=distribute_tensor(columns, self.mesh, [ShardDim(1)])
        )  # every block has bytes of all ranks

    def run(self, verb, number=1, **options):
        cancel = options.pop("cancel", None)
        if verb == "save":
            options = to(format=CheckpointFormat.SINGLE_FILE, include_rng_state=False, **options)
            return self.checkpoint.save(self.model(number), None, options, cancel=cancel)
        options = at(resharding_strategy="broadcast", load_rng_state=False, **options)
        target = Bag(w=distribute_tensor(torch.zeros(512, 96), self.mesh, [Replicate()]))
        self.checkpoint.load(target, None, options, cancel=cancel)
        assert target.state["w"].to_local().unique().tolist() == [number]


EXCHANGE_FAULTS = ("raise", "gloo", "cancel", "cancel while waiting", "interrupt")


@pytest.mark.parametrize("verb", ["save", "load"])
def test_what_keeps_one_rank_from_an_exchange_ends_the_operation_on_all_and_the_next_one_succeeds(ram, verb):
    failed = "SAVE_FAILED" if verb == "save" else "LOAD_FAILED"
    kinds = {"cancel": "CANCELLED", "cancel while waiting": "CANCELLED"}
    words = {"raise": "boom", "gloo": "gloo exchange failed: reset", "interrupt": "KeyboardInterrupt"}
    for told_by_rank in zip(*run(2, fail_in_exchanges, ram, verb)):
        (how, number, victim), answers = told_by_rank[0][0], [told[1] for told in told_by_rank]
        context = how, number, victim, answers
        if how == "interrupt":
            assert answers.pop(victim) == "interrupted", context
        assert len(set(answers)) == 1 and answers[0][0] == kinds.get(how, failed), context
        assert names_rank(answers[0], victim) and words.get(how, "cancelled") in answers[0][2], context
        assert verb == "save" or "undefined" in answers[0][2], context
    assert set(listing(ram)) == named_files(ram)


def fail_in_exchanges(rank, world_size, tmp, verb):
    exchanging, found = Exchanging(tmp, world_size), []
    exchanging.run("save")
    cases = list(itertools.product(EXCHANGE_FAULTS, (0, 2), range(world_size)))
    for case in cases:
        (how, number, victim), cancel = case, threading.Event()

        def act(how=how, cancel=cancel, here=rank == victim):
            if how == "cancel while waiting":
                if here:
                    return threading.Timer(0.2, cancel.set).start()
                time.sleep(0.5)
            elif how == "cancel" and here:
                cancel.set()
            elif here:
                raise {
                    "raise": ValueError("boom"),
                    "gloo": RuntimeError("reset"),
                    "interrupt": KeyboardInterrupt(),
                }[how]

        undo = at_exchange(number, act)
        try:
            answer = told(functools.partial(exchanging.run, verb, cancel=cancel))
        except KeyboardInterrupt:
            answer = "interrupted"
        assert undo() or rank != victim, (case, answer)  # there were as many exchanges
        dist.barrier()
        exchanging.run(verb)
        found.append((case, answer))
        dist.barrier()
    return found


def test_a_rank_that_dies_or_stops_in_an_exchange_is_named_by_the_deadline(ram):
    cases = itertools.product(("save", "load"), ("SIGKILL", "SIGSTOP"), (0, 1), (0, 2))
    at_once([functools.partial(check_lost_in_exchange, ram, *case) for case in cases])


def check_lost_in_exchange(base, verb, name, victim, number):
    tmp, case = room_for(base, "exchange", verb, name, victim, number), (verb, name, victim, number)
    answers = run(3, lose_in_exchange, tmp, *case, dies={victim})
    assert answers.pop(victim) == "died"
    for answer in answers:
        assert answer[0] == "TIMEOUT" and names_rank(answer, victim), (case, answer)


def lose_in_exchange(rank, world_size, tmp, verb, name, victim, number):
    exchanging = Exchanging(tmp / "c", world_size)
    exchanging.run("save")
    ckpt.coord.time = TimeSinceFile(tmp / "struck")

    def act():
        (tmp / "struck").touch()
        os.kill(os.getpid(), getattr(signal, name))

    (tmp / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == victim:
        at_exchange(number, act)
    answer = told(lambda: exchanging.run(verb, timeout=DEADLINE_S))
    (tmp / f"over-{rank}").touch()
    others = sorted(set(range(world_size)) - {victim})
    for other in others:
        await_file(tmp / f"over-{other}")
    if rank == others[0] and name == "SIGSTOP":
        os.kill(int((tmp / f"pid-{victim}").read_text()), signal.SIGKILL)
    return answer


@pytest.mark.parametrize("holder", [0, 1, 2, None])
def test_a_save_in_which_one_rank_alone_holds_anything_or_none_does(ram, holder):
    assert run(3, hold_all_alone, ram, holder) == [{"w": 7.0} if rank == holder else {} for rank in range(3)]


def hold_all_alone(rank, world_size, tmp, holder):
    checkpoint = over(tmp, ckpt.TorchCoordinator())
    bag, other = ({"w": torch.full((5,), number)} if rank == holder else {} for number in (7.0, 0.0))
    checkpoint.save(Bag(**bag), None, to(include_rng_state=False))
    checkpoint.load(target := Bag(**other), None, at(load_rng_state=False, strict_mode=False))
    return {name: tensor.unique().item() for name, tensor in target.state.items()}


# Row 26 and the promises of save_async


class Gate:
    """Something that waits until it is opened: as the hook of a `Seam`, or in the place of the background copy."""

    def __init__(self, calls=("pwrite",)):
        self.calls, self.reached, self.opened = calls, threading.Event(), threading.Event()

    def wait(self):
        self.reached.set()
        assert self.opened.wait(HANG_S), "the gate was never opened"

    def __call__(self, op):
        if op.call in self.calls:
            self.wait()

    def before_the_copy(self):
        """The thread of a save in the background waits here before it does anything, such as the copies of staging."""
        run = threading.Thread.run

        def gated(thread):
            if thread.name == "ckpt-save":
                self.wait()
            run(thread)

        threading.Thread.run = gated
        return self


@pytest.fixture
def copy_gate(monkeypatch):
    monkeypatch.setattr(threading.Thread, "run", threading.Thread.run)  # put back when the test is over
    gate = Gate().before_the_copy()
    yield gate
    gate.opened.set()


def spoil(model, optimizer):
    """Change every tensor in place."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.add_(1)


def normed(salt):
    """A model with buffers too, and its optimizer."""
    model = filled(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), salt)
    return model, stepped(model, lr=0.1)


@pytest.mark.parametrize("staging", ["eager", "overlapped"])
def test_tensors_changed_after_wait_staged_do_not_change_the_snapshot(ram, staging):
    gate = Gate()
    checkpoint, (model, optimizer) = over(Storage(ram, Seam(gate))), normed("truth")
    truth, extra = state_of(model, optimizer), {"step": 7, "t": torch.zeros(3)}
    pending = checkpoint.save_async(model, optimizer, to(staging=staging), extra_state=extra)
    pending.wait_staged(HANG_S)
    spoil(model, optimizer)
    extra["t"].add_(1)
    extra["step"] = 8
    assert gate.reached.wait(HANG_S) and not pending.done()
    gate.opened.set()
    assert pending.result(HANG_S) == "p"
    again = normed("other")
    result = over(ram).load(*again, at(), extra_state={"step": 0, "t": torch.ones(3)})
    assert identical(state_of(*again), truth)
    assert result.extra_state["step"] == 7 and identical(result.extra_state["t"], torch.zeros(3))


@pytest.mark.parametrize("what, name", [("weight", "0.weight"), ("moment", "exp_avg")])
def test_a_tensor_changed_during_overlapped_staging_fails_the_save_and_is_named(ram, copy_gate, what, name):
    checkpoint, (model, optimizer) = over(ram), small()
    save_word(checkpoint, "old")
    files = listing(ram)
    pending = checkpoint.save_async(model, optimizer, to(staging="overlapped"))
    assert copy_gate.reached.wait(HANG_S)
    with torch.no_grad():
        (model[0].weight if what == "weight" else optimizer.state[model[0].weight]["exp_avg"]).mul_(2)
    copy_gate.opened.set()
    message = refusal(lambda: pending.result(HANG_S), ExceptionType.SAVE_FAILED)
    assert name in message and "changed" in message
    assert listing(ram) == files and seen(ram) == "old"
    optimizer.step()  # nothing waits any more
    checkpoint.save(model, optimizer, to())


def test_a_tensor_changed_on_one_rank_during_overlapped_staging_fails_the_save_on_all(ram):
    for kind, rank, message, word in run(2, change_while_staging, ram):
        assert (kind, rank, word) == ("SAVE_FAILED", 1, "old") and "1.weight" in message
    check_recovery(ram)


def change_while_staging(rank, world_size, tmp):
    checkpoint, (model, optimizer) = over(tmp, ckpt.TorchCoordinator()), small()
    save_word(checkpoint, "old")
    gate = Gate().before_the_copy()
    pending = checkpoint.save_async(model, optimizer, to(staging="overlapped"))
    assert gate.reached.wait(HANG_S)
    if rank == 1:
        with torch.no_grad():
            model[1].weight.zero_()
    gate.opened.set()
    answer = told(lambda: pending.result(HANG_S))
    dist.barrier()
    return *answer, seen(tmp)


def test_the_optimizers_next_step_waits_for_overlapped_staging_but_forward_and_backward_do_not(
    ram, copy_gate
):
    checkpoint, (model, optimizer) = over(ram), normed("truth")
    truth = state_of(model, optimizer)
    stepping, entered = threading.Thread(target=optimizer.step), threading.Event()
    optimizer.register_step_pre_hook(lambda *_: entered.set())  # the last thing before the hook of the save
    hooks = len(optimizer._optimizer_step_pre_hooks)
    pending = checkpoint.save_async(model, optimizer, to(staging="overlapped"))
    assert copy_gate.reached.wait(HANG_S)
    with pytest.raises(TimeoutError):
        pending.wait_staged(0.01)
    model.train()
    model(
        torch.ones(4, 3)
    ).sum().backward()  # changes the statistics of the batch norm, which were copied already
    assert not identical(state_of(model)[0], truth[0])
    stepping.start()
    assert entered.wait(HANG_S)
    stepping.join(0.3)  # time enough to go on, if nothing stopped it
    assert stepping.is_alive() and identical(optimizer.state_dict()["state"], truth[1]["state"])
    copy_gate.opened.set()
    stepping.join(HANG_S)
    assert not stepping.is_alive() and not identical(optimizer.state_dict()["state"], truth[1]["state"])
    assert pending.result(HANG_S) == "p" and len(optimizer._optimizer_step_pre_hooks) == hooks
    again = normed("other")
    checkpoint.load(*again, at())
    assert identical(state_of(*again), truth)


def test_what_was_made_in_inference_mode_is_staged_like_the_rest(ram):
    with torch.inference_mode():
        best = torch.arange(6.0)
    with opened(ram) as checkpoint:
        checkpoint.save_async(nn.Linear(2, 2), None, to(), extra_state={"best": best}).result()
        assert torch.equal(
            checkpoint.load(nn.Linear(2, 2), None, at()).extra_state["best"], torch.arange(6.0)
        )


def test_without_an_optimizer_to_hook_overlapped_staging_copies_before_it_returns(ram):
    gate = Gate()
    checkpoint, model = over(Storage(ram, Seam(gate))), Bag(w=torch.zeros(100))
    pending = checkpoint.save_async(model, None, to(staging="overlapped"))
    pending.wait_staged(0.0)
    model.state["w"].fill_(1)
    gate.opened.set()
    pending.result(HANG_S)
    target = Bag(w=torch.ones(100))
    over(ram).load(target, None, at())
    assert identical(target.state["w"], torch.zeros(100))


def broken(tmp, coordinator=None, until=1):
    """A checkpoint object whose first `until` tensor files cannot be made."""
    return over(Storage(tmp, Seam(Strike(0, fail(errno.EIO), is_new_shard, until=until))), coordinator)


def test_a_failed_pending_save_raises_at_result_and_then_not_again(ram):
    checkpoint = broken(ram)
    pending = checkpoint.save_async(value("new"), None, to())
    refusal(pending.result, ExceptionType.STORAGE_ERROR)
    save_word(checkpoint, "next")
    checkpoint.close()
    assert seen(ram) == "next"
    checkpoint = broken(ram)
    assert isinstance(checkpoint.save_async(value("new"), None, to()).exception(HANG_S), CheckpointException)
    checkpoint.close()


@pytest.mark.parametrize("call", ["save", "save_async", "save_model_only", "close", "with"])
def test_a_failed_pending_save_that_nobody_asked_about_raises_at_the_next_call(ram, call):
    put(ckpt.LocalStorage(ram), "old")
    checkpoint = broken(ram)
    checkpoint.save_async(value("new"), None, to())
    calls = {
        "save": lambda: save_word(checkpoint, "next"),
        "save_async": lambda: checkpoint.save_async(value("next"), None, to()).result(),
        "save_model_only": lambda: checkpoint.save_model_only(value("next"), to()),
        "close": checkpoint.close,
        "with": lambda: checkpoint.__exit__(None, None, None),
    }
    assert identical(
        checkpoint.load(value("next"), None, at()).model_state, value("old").state
    )  # no concern of a load
    assert call in ("close", "with") or "'p'" in refusal(calls[call], ExceptionType.STORAGE_ERROR)
    assert call not in ("close", "with") or refusal(calls[call], ExceptionType.STORAGE_ERROR)
    assert seen(ram) == "old"
    checkpoint.close()  # said once
    save_word(checkpoint, "next")
    assert seen(ram) == "next" and set(listing(ram)) == named_files(ram)


@pytest.mark.parametrize("call", ["save", "save_async"])
def test_a_failed_pending_save_that_one_rank_alone_asked_about_keeps_no_rank_waiting(ram, call):
    answers = run(2, ask_on_rank_zero, ram, call)
    for _, after in answers:
        assert after == ("returned", None, "p"), answers
    assert answers[1][0][0] == "STORAGE_ERROR" and answers[0][0][0] == "STORAGE_ERROR", answers
    assert seen(ram) == "next"


def ask_on_rank_zero(rank, world_size, tmp, call):
    checkpoint = broken(tmp, ckpt.TorchCoordinator(), until=FOREVER)
    put(ckpt.LocalStorage(tmp / "good"), "old")
    pending = checkpoint.save_async(value("new"), None, to())
    if rank == 0:
        assert told(pending.result)[0] == "STORAGE_ERROR"
    assert not concurrent.futures.wait([pending], HANG_S).not_done
    checkpoint.storage.seam = Seam()  # the disk is whole again
    dist.barrier()
    calls = {
        "save": lambda: save_word(checkpoint, "next"),
        "save_async": lambda: checkpoint.save_async(value("next"), None, to()).result(),
    }
    answer = told(calls[call])
    dist.barrier()
    after = told(lambda: save_word(checkpoint, "next"))
    dist.barrier()
    return answer[:3] if isinstance(answer[2], str) else answer[:2], after


@pytest.mark.parametrize("call", ["save_async", "save", "close"])
def test_one_save_is_in_flight_at_a_time_and_the_next_call_waits_for_it(ram, call):
    gate = Gate()
    checkpoint = over(Storage(ram, Seam(gate)))
    first = checkpoint.save_async(value("old"), None, to("first"))
    assert gate.reached.wait(HANG_S)
    calls = {
        "save_async": lambda: checkpoint.save_async(value("new"), None, to("second")).result(),
        "save": lambda: checkpoint.save(value("new"), None, to("second")),
        "close": checkpoint.close,
    }
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(calls[call])
        with pytest.raises(TimeoutError):
            second.result(0.3)
        assert not first.done()
        gate.opened.set()
        second.result(HANG_S)
    assert first.done() and first.result() == "first"
    prefixes = ["first"] if call == "close" else ["first", "second"]
    assert [info.prefix for info in checkpoint.list_checkpoints()] == prefixes


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_goes_on_during_two_hundred_background_saves_as_without_them_and_each_is_right(ram, kind):
    for right, overlapped, disturbed, alone in run(2, train_and_save, ram, kind, limit_s=3 * HANG_S):
        assert right == [True] * 200 and overlapped > 0 and disturbed == alone and len(set(alone[0])) > 200
    COUNTS["background saves"] += 200


def train_and_save(rank, world_size, tmp, kind):
    def start(salt):
        torch.manual_seed(rank)
        model = filled(
            nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4)), salt
        )
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model[0])
            fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model, optimizer, save):
        losses = []
        for step in range(400):
            loss = model(torch.randn(8, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()  # collectives of the training, while the save before is under way
            optimizer.step()
            losses.append(loss.item())
            if step % 2:
                save(step // 2)
        return losses, [raw(p.to_local() if isinstance(p, DTensor) else p) for p in model.parameters()]

    def save(number):
        nonlocal pending, overlapped
        overlapped += pending is not None and not pending.done()
        truths.append(state_of(model, optimizer))
        staging = "overlapped" if number % 2 else "eager"
        pending = checkpoint.save_async(model, optimizer, to(f"p{number}", staging=staging))

    alone = train(*start("truth"), lambda number: None)
    checkpoint, (model, optimizer), truths, pending, overlapped = opened(tmp), start("truth"), [], None, 0
    disturbed = train(model, optimizer, save)
    checkpoint.close()
    other, other_optimizer = start("other")
    right = []
    for number, truth in enumerate(truths):
        checkpoint.load(other, other_optimizer, at(f"p{number}", load_rng_state=False))
        right.append(identical(state_of(other, other_optimizer), truth))
    return right, overlapped, disturbed, alone


def test_two_hundred_background_saves_keep_memory_threads_files_groups_and_store_keys_flat(ram):
    for counts in run(2, count_resources, ram, limit_s=3 * HANG_S):
        room = Resources(resident=8 * MiB, threads=2, descriptors=4, groups=0, keys=10, files=0)
        first, *later = counts
        for number, after in enumerate(later, 2):
            grown = Resources(*(b - a for a, b in zip(first, after)))
            assert all(more <= most for more, most in zip(grown, room)), (
                f"{number * 40} saves",
                first,
                after,
            )
    COUNTS["background saves"] += 200


class Resources(NamedTuple):
    """What a process holds, and what is on disk."""

    resident: int  # bytes
    threads: int
    descriptors: int
    groups: int  # process groups, those that the library has made included
    keys: int  # of the rendezvous store
    files: int


def count_resources(rank, world_size, tmp):
    model = filled(
        nn.Linear(512, 512), "truth"
    )  # with its optimizer 3 MiB, so that keeping any of it would show
    optimizer = stepped(model, lr=0.1)
    checkpoint, counts, made, gloo = (
        over(tmp, ckpt.TorchCoordinator(), keep_last=2),
        [],
        [],
        dist.ProcessGroupGloo,
    )
    dist.ProcessGroupGloo = lambda *args: made.append(args[1:]) or gloo(*args)
    for number in range(200):
        staging = "overlapped" if number % 2 else "eager"
        checkpoint.save_async(model, optimizer, to(f"p{number}", staging=staging))
        if number % 40 == 39:
            checkpoint.close()
            dist.barrier()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
            threads, descriptors = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
            groups = len(dist.distributed_c10d._world.pg_map) + len(made)
            keys = dist.distributed_c10d._get_default_store().num_keys()
            counts.append(Resources(resident, threads, descriptors, groups, keys, len(listing(tmp))))
            dist.barrier()
    return counts


# Background saves with `keep_last`, and falling back together


def test_background_saves_keep_the_last_and_a_load_falls_back_among_them(ram):
    for kept, failed, after, prefix, warned, same in run(2, keep_and_fall_back, ram):
        assert kept == after == ["p3", "p4"] and failed == "STORAGE_ERROR"
        assert prefix == "p3" and any("p4" in line and "corrupt" in line for line in warned) and same


def keep_and_fall_back(rank, world_size, tmp):
    checkpoint = over(Storage(tmp), ckpt.TorchCoordinator(), keep_last=2)
    for number in range(5):
        model, optimizer = small(f"p{number}")
        checkpoint.save_async(
            model, optimizer, to(f"p{number}", staging="overlapped" if number % 2 else "eager")
        )
    checkpoint.close()
    dist.barrier()  # rank 0 removes what goes once all know that the new one is there
    kept = [info.prefix for info in checkpoint.list_checkpoints()]
    dist.barrier()
    checkpoint.storage.seam = Seam(Strike(0, fail(errno.EIO), is_new_shard, until=FOREVER))
    pending = checkpoint.save_async(model, optimizer, to("p5"))
    failed = told(pending.result)[0]  # which takes the place of none
    checkpoint.storage.seam = Seam()
    after = [info.prefix for info in checkpoint.list_checkpoints()]
    dist.barrier()
    if rank == 0:
        flip(shards(tmp, "p4")[0], -1)
    dist.barrier()
    latest = checkpoint.latest_checkpoint().prefix
    result = checkpoint.load(model, optimizer, at(latest, fallback=True))
    same = identical(state_of(model, optimizer), state_of(*small("p3")))
    return kept, failed, after, result.prefix, list(result.warnings), same


def test_retain_is_given_all_checkpoints_oldest_first_and_what_it_does_not_name_goes_but_never_the_new_one(
    ram,
):
    asked = []

    def best_and_last(infos):
        asked.append([info.prefix for info in infos])
        return [info.prefix for info in infos if info.custom_metadata.get("best")] + [infos[-1].prefix]

    checkpoint = opened(ram, retain=best_and_last)
    for number in range(5):
        checkpoint.save(value("old"), None, to(f"p{number}", custom_metadata={"best": number in (1, 2)}))
    assert asked == [["p0"], ["p0", "p1"], ["p1", "p2"], ["p1", "p2", "p3"], ["p1", "p2", "p3", "p4"]]
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["p1", "p2", "p4"]
    checkpoint.retain = lambda infos: []
    checkpoint.save(value("new"), None, to("p5"))
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["p5"]
    assert set(listing(ram)) == named_files(ram) and seen(ram, "p5") == "new"
    with pytest.raises(ValueError, match="retain"):
        opened(ram, retain=best_and_last, keep_last=2)


@pytest.mark.parametrize(
    "retain",
    [
        lambda infos: 1 / 0,
        lambda infos: infos[1:],
        lambda infos: "p0",
        lambda infos: None,
        lambda infos: ["q"],
    ],
)
def test_a_retain_that_fails_or_names_no_checkpoints_is_a_warning_and_nothing_goes(ram, retain):
    checkpoint = over(ram)
    for prefix in ("p0", "p1"):
        save_word(checkpoint, "old", prefix)
    checkpoint.retain, warned = retain, overheard(checkpoint)
    assert save_word(checkpoint, "new", "p2") == "p2"
    assert [info.prefix for info in checkpoint.list_checkpoints()] == ["p0", "p1", "p2"]
    (line,) = warned
    assert "p2: committed, but not all that should go is gone" in line, line


def test_retain_is_asked_on_rank_zero_alone_after_the_commit(ram):
    assert run(2, retain_together, ram) == [(["old", "new"], ["new"]), ([], ["new"])]


def retain_together(rank, world_size, tmp):
    checkpoint, asked = over(tmp, ckpt.TorchCoordinator()), []
    checkpoint.retain = lambda infos: asked.extend(info.prefix for info in infos) or [infos[-1].prefix]
    put(ckpt.LocalStorage(tmp), "old", "old") if rank == 0 else None
    dist.barrier()
    save_word(checkpoint, "new", "new")
    dist.barrier()
    return asked, [info.prefix for info in checkpoint.list_checkpoints()]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("damaged", [0, 1])
def test_fallback_takes_all_ranks_to_the_same_older_checkpoint_though_one_rank_alone_met_the_damage(
    ram, damaged, form
):
    for prefix, warned, same, refused in run(2, fall_back, ram, damaged, form):
        assert prefix == "one" and same
        assert any("two" in line and "corrupt" in line for line in warned), warned
        assert refused[0] == "CORRUPTED_CHECKPOINT", refused


def fall_back(rank, world_size, tmp, damaged, form):
    def sharded(salt):
        model = filled(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), salt)
        fully_shard(model)
        return model

    checkpoint = opened(tmp)
    for prefix in ("one", "two", "three"):
        checkpoint.save(sharded(prefix), None, to(prefix, format=form))
    dist.barrier()
    if rank == 0:
        path = shards(tmp, "two")[damaged if form is CheckpointFormat.MULTI_SHARD else -1]
        shard = Shard(path)
        names = sorted(
            (name for name in shard.header if "rng" not in name), key=lambda name: shard.place(name)
        )
        places = [shard.place(name) for name in names if shard.place(name)[1] > shard.place(name)[0]]
        flip(path, places[-damaged][0])
    dist.barrier()
    model = sharded("other")
    refused = told(lambda: checkpoint.load(model, None, at("two")))
    result = checkpoint.load(model, None, at("two", fallback=True))
    return result.prefix, list(result.warnings), identical(state_of(model), state_of(sharded("one"))), refused


# ---- README: its examples run as they stand --------------------------------------------------------------------------


def readme_blocks():
    return re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_ten_line_example_of_the_readme_prints_what_the_readme_says(tmp_path):
    (tmp_path / "example.py").write_text(readme_blocks()[0])
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.metadata.json"))
    assert f"\n```\n{done.stdout}```\n" in (HERE / "README.md").read_text()


def test_the_readme_names_every_option_with_its_default_and_every_type_of_exception():
    text = (HERE / "README.md").read_text()
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", text, re.MULTILINE)
    defaults = {}
    for names, default in table:
        for name in re.findall(r"\w+", names):
            defaults.setdefault(name, []).append(default)
    for kind in (SaveOptions, LoadOptions, ckpt.CheckpointOptions):
        for field in dataclasses.fields(kind):
            default = getattr(kind(), field.name)
            shown = default.name if isinstance(default, enum.Enum) else repr(default).replace("'", '"')
            if dataclasses.is_dataclass(default):
                shown = f"{type(default).__name__}()"
            assert f"`{shown}`" in defaults[field.name], (kind, field.name, shown)
    for field in dataclasses.fields(ckpt.RetryPolicy):
        shown = "(OSError,)" if field.name == "retryable_exceptions" else repr(field.default)
        assert f"{field.name}={shown}" in text
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE))
    assert {kind.name for kind in ckpt.ExceptionType} <= named


def test_the_readme_is_short_and_its_line_counts_are_about_those_of_the_files():
    text = (HERE / "README.md").read_text()
    assert len(text) <= 30_000
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", text, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert list(counts) == ["ckpt.py", "ckpt_coord.py", "ckpt_storage.py", "test_ckpt.py", "bench_ckpt.py"]
    (total,) = re.findall(r"([\d,]+) lines", text)
    assert int(total.replace(",", "")) == sum(list(counts.values())[:3])
    for name, count in counts.items():
        assert abs(count / len((HERE / name).read_text().splitlines()) - 1) < 0.05, name


def training_script(steps):
    """The README's training job, with another number of steps, which take no time."""
    (script,) = [block for block in readme_blocks() if "init_process_group" in block]
    assert script.count("STEPS = 300\n") == 1 and script.count("        time.sleep(0.1)") == 1
    return re.sub("        time.sleep.*\n", "", script.replace("STEPS = 300\n", f"STEPS = {steps}\n"))


def newest_step(tmp):
    """The step of the newest checkpoint of that job."""
    latest = opened(tmp / "ckpts").latest_checkpoint()
    return int(latest.prefix.removeprefix("step_")) if latest else 0


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def test_the_torchrun_example_of_the_readme_trains_stops_on_sigterm_and_resumes_on_other_ranks(tmp_path):
    options = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    (tmp_path / "train.py").write_text(training_script(steps=1_000_000))
    job = subprocess.Popen(
        [*TORCHRUN, "2", "train.py"], **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + HANG_S
        while not newest_step(tmp_path) and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        said, errors = job.communicate(timeout=HANG_S)
    finally:
        job.kill()
    stopped = newest_step(tmp_path)
    assert stopped and f"stopped at step {stopped}\n" in said, errors
    readme = (HERE / "README.md").read_text()
    for words in ("Received 15 death signal, shutting down workers", "got signal: 15", "INFO:ckpt:saved"):
        assert words in errors and words in readme
    assert job.returncode == 1
    for ranks, steps in ((3, 7), (1, 14)):
        (tmp_path / "train.py").write_text(training_script(steps=stopped + steps))
        before = newest_step(tmp_path)
        done = subprocess.run(
            [*TORCHRUN, str(ranks), "train.py"], **options, capture_output=True, timeout=HANG_S
        )
        assert done.returncode == 0 and f"stopped at step {stopped + steps}\n" in done.stdout, done.stderr
        assert f"resumed from step_{before} on {ranks} ranks\n" in done.stdout
        assert newest_step(tmp_path) == (stopped + steps) // 5 * 5


JOB_STEPS = 300
KILLS = 20


def test_a_training_job_killed_twenty_times_ends_with_the_state_of_one_that_never_was(ram):
    truth = run(2, train_by_the_readme, room_for(ram, "alone"))
    tmp, rng, reached = room_for(ram, "killed"), random.Random(7), 0
    for number in range(KILLS):
        kill = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
        victims = rng.choice(((0,), (1,), (0, 1), (1, 0)) if kill is signal.SIGTERM else ((0, 1), (1, 0)))
        plan = Plan(kill, victims, rng.randrange(12), 0.02 * rng.random(), rng.choice((0.0, 0.3)))
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


class Plan(NamedTuple):
    """How a job is to end: which signal, to which ranks one after the other, and when."""

    kill: signal.Signals
    victims: tuple
    steps: int  # that it makes before; 0: while it loads
    delay_s: float
    pause_s: float  # between one victim and the next


def train_by_the_readme(rank, world_size, tmp, plan=None):
    """Run the README's job to its end, or to the one that is planned for it; its last step, and all its state."""
    os.chdir(tmp)
    pids, names = [None] * world_size, {"__name__": "__main__"}
    dist.all_gather_object(pids, os.getpid())
    if plan is not None and rank == plan.victims[-1]:
        threading.Thread(target=carry_out, args=(plan, pids, names), daemon=True).start()
    script, ending = training_script(JOB_STEPS), "dist.barrier()\nos._exit(0)"
    assert script.count(ending) == 1  # this process goes on, and `run` has made the group
    script = re.sub(
        "^(dist.init_process_group|dist.barrier|os._exit|logging.basic).*\n", "", script, flags=re.MULTILINE
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(script, "README.md", "exec"), names)
    except Exception:
        if plan is None or plan.kill is signal.SIGTERM:
            raise
        return "the other rank is dead"
    moments = names["optimizer"].state_dict()["state"].values()
    tensors = [t for part in (names["model"].state_dict(), *moments) for t in part.values()]
    bits = [raw(t.to_local() if isinstance(t, DTensor) else t) for t in tensors]
    return names["step"], bits, names["scheduler"].state_dict(), raw(torch.get_rng_state())


def carry_out(plan, pids, names):
    """Send the signals, from a thread of the last victim, which is left over when another rank has died."""
    while "checkpoint" not in names or (
        plan.steps and "stop" not in names
    ):  # the latter stands after the load
        time.sleep(0.0005)
    goal = names["step"] + plan.steps if plan.steps else 0
    while plan.steps and names["step"] < goal:
        time.sleep(0.0005)
    time.sleep(plan.delay_s)
    for victim in plan.victims:
        os.kill(pids[victim], plan.kill)
        time.sleep(plan.pause_s)


def test_the_benchmarks_rows_for_growth_have_a_figure_for_all_that_they_name(tmp_path, monkeypatch):
    import bench_ckpt

    def ignore(*words):
        pass

    monkeypatch.setattr(bench_ckpt, "GROWTH_RANKS", (4,))
    monkeypatch.setattr(bench_ckpt, "GROWTH_TENSORS", 8)
    bench = types.SimpleNamespace(rows=[], scratch=tmp_path, remove=ignore, progress=ignore)
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
    for wrong in (lambda: None, lambda: load((0, 2, 1)), lambda: load((0, 1))):
        with pytest.raises(RuntimeError, match="other bits"):
            state.check(wrong)


def test_the_quick_benchmark_ends_in_one_sentence(tmp_path):
    line = [
        sys.executable,
        str(HERE / "bench_ckpt.py"),
        "--quick",
        "--size=1M",
        "--rounds=1",
        "--dir",
        tmp_path,
    ]
    line += ["--rows=save-fsdp,reshard-up", "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"Saved .* GB from 2 ranks, loaded it on 4 and verified every bit: .* the load .*", last
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["summary"] == last and [row["key"] for row in found["rows"]] == ["save-fsdp", "reshard-up"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
