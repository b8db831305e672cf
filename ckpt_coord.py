"""Ranks: who writes and reads which bytes, and how all of them agree that it happened.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file does not import ckpt)

One idea carries everything: **a checkpoint is a table of pieces**, (tensor, file, begin, length, box). Rank
0 makes the table in S3, every rank writes its rows in S4, S5 fills in what only writers know, and the table
is sealed and renamed in S6: the plan has become the record. A load receives the same table and inverts it.

Words: see the head of ckpt_storage.py (tensor, box, piece, unit, block, record, fence), and

    rank, world size   of the processes that save or load together
    replica            a copy of a piece that another rank holds too
    mesh               the ranks among which a DTensor is distributed; its placements say how
    gather             every rank gives a value, and gets the values of all ranks

The save protocol (`CheckpointCoordinator.coordinate_save`). The checkpoint exists from the rename in S6 on:

    step        | who    | what                                                            | a crash leaves
    S1 agree    | all    | same prefix and options on every rank; rank 0 draws the save id | nothing
    S2 collect  | each   | state dicts -> the pieces that this rank holds                  | nothing
    S3 plan     | all    | replicas are compared; rank 0 makes fence and table             | fence and files
    S4 write    | each   | its rows, a CRC32 for each unit in the same pass, fsync         | fence and files
    S5 report   | all    | lengths and CRCs to rank 0                                      | fence and files
    S6 commit   | rank 0 | fsync directories, write and fsync the record, RENAME, fsync    | old or new, whole
    S7 announce | all    | every rank learns; then old files and old checkpoints go        | extra files

The load protocol (`CheckpointLoader.coordinate_load`):

    L1 record · L2 validate · L3 match · L4 read · L5 apply

L4 reads only the units that a rank needs, and verifies each in a buffer before it is copied into a tensor.

One tensor on two ranks, from `state_dict()` to its bytes and back. `w` is float32, (4, 2), sharded by rows:

    S2  rank 0 holds box (0,0)+(2,2), rank 1 box (2,0)+(2,2) of "model/w"
    S3  the table: (w, file 0, begin 0, length 16, (0,0)+(2,2)), (w, file 1, begin 0, length 16, (2,0)+(2,2))
    S4  each rank writes 16 bytes behind a header of 4096, whose entry is named "model/w@0,0" or "model/w@2,0"
    S6  the record lists both files and both rows; a load on one rank wants box (0,0)+(4,2), so that
    L4  reads one unit of each file, verifies it, and copies two rows into each half of `w`

Invariants, cited where they are upheld:
    I1  A byte of a file has exactly one writer.
    I2  Every byte that a record names is fsynced, and its directory entry too, before the record is renamed.
    I3  No file of the old checkpoint is touched before the new one is committed.
    I4  Whoever abandons a save removes its fence first, then looks at the record, which decides (`_settle`).
    I5  A failure on one rank ends the operation on all of them with that rank's error (`Operation.step`).

In this order below: the two protocols, step by step; `Operation` and the coordinators; then what the steps
do: what a rank holds (S2), the plan (S3), writing (S4), reading (L3, L4).
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import enum
import functools
import gc
import hashlib
import itertools
import json
import math
import operator
import random
import re
import secrets
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

if TYPE_CHECKING or __package__:
    from . import ckpt_storage as st
    from .ckpt_storage import (
        Box,
        Bytes,
        CheckpointException,
        CheckpointMetadata,
        ExceptionType,
        Ints,
        Pieces,
        Shape,
        TensorMetadata,
        log,
        whole_box,
    )
else:
    import ckpt_storage as st
    from ckpt_storage import (
        Box,
        Bytes,
        CheckpointException,
        CheckpointMetadata,
        ExceptionType,
        Ints,
        Pieces,
        Shape,
        TensorMetadata,
        log,
        whole_box,
    )

__all__ = [
    "CheckpointCoordinator",
    "CheckpointFormat",
    "CheckpointLoader",
    "CheckpointReader",
    "DistributedCoordinator",
    "FaultToleranceHandler",
    "LocalCoordinator",
    "Progress",
    "RetryPolicy",
    "ShardData",
    "TorchCoordinator",
]

GRACE_S = 1.0  # after a deadline: in it the remaining ranks answer, so that only missing ranks are named
STORE_BYTES = 4 << 20  # the most in one value: over twice that, a TCPStore drops the connection
SPLIT_BYTES = 1 << 20  # replicas are shared out in parts of at least this
SMALL_BYTES = 64 << 10  # smaller pieces lie together: every rank wants some, and would read a unit for each
ROUND_BLOCKS = 4  # of each rank in a round of a save; a round of a load has twice as many for all ranks
T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------
# The save protocol


class CheckpointFormat(enum.Enum):
    """How tensors are spread over files."""

    SINGLE_FILE = "single_file"
    MULTI_SHARD = "multi_shard"
    CONSOLIDATED = "consolidated"


# Values that may differ between ranks without a warning.
_NEVER_ALIKE = {"rng/state", "optimizer/state", "model-metadata/modules"}

# Plain values that ranks send each other: what the user requests, or how an operation failed.
Message = dict[str, Any]
# What a rank reports in S5. Of the whole file: the CRC32s of units, by the number of their block. Of its own
# file: the row of the record, and the lengths of compressed pieces.
Report = tuple[dict[str, list[int]], tuple[tuple[str, int, int, int], Ints | None] | None]
# What a rank needs of the plan; and which rank gives which boxes to the whole file.
Share = tuple[CheckpointMetadata, Pieces]


@dataclass
class CheckpointCoordinator:
    """Runs S1 to S7 on one rank."""

    coordinator: DistributedCoordinator
    storage: st.CheckpointStorage
    keep_last: int | None = None  # how many checkpoints stay
    # Given all checkpoints, oldest first, it returns the prefixes of those that stay.
    retain: Callable[[Sequence[CheckpointMetadata]], Iterable[str]] | None = None
    # Sets of names kept per rank for which a warning was given.
    warned: set[tuple[str, ...]] = field(default_factory=set)

    # Of the last save:
    op: Operation = field(init=False)
    request: Message = field(init=False)
    warnings: list[str] = field(init=False, default_factory=list)
    bytes_written = 0  # by this rank, before compression
    size_bytes = 0  # of the checkpoint, on rank 0

    def coordinate_save(
        self, begin: Callable[[], Operation], request: Callable[[], Message], collect: Callable[[], ShardData]
    ) -> str:
        """Save what `collect` returns on every rank, and return the prefix. Collective.

        `begin` returns the operation of this attempt.
        `request` returns "prefix" (None: made from the time), "format", "compression", "overwrite",
        "verify_replicas", "contents" (which arguments were given) and "custom_metadata".

        Blocks until the checkpoint is committed and announced. `OperationFailed` on all ranks if nothing was
        committed; then this save's files are removed. Once S6 has renamed the record, the save has succeeded,
        whatever happens to a rank: an error after that is a warning.
        """
        self.warnings, ticket, superseded = list[str](), None, None
        op = self.op = begin()
        try:
            ticket = self.agree(op, request)  # S1: the record, its tables empty
            data = self.collect(op, collect)  # S2
            plan, share = self.plan(op, ticket, data)  # S3
            written = self.write(op, share, data)  # S4
            record = self.report(op, plan, written)  # S5
            superseded = self.commit(op, record)  # S6
            self.announce(op)  # S7
        except BaseException as error:
            if ticket is None or not self._settle(op, ticket) or not isinstance(error, Exception):
                raise
            self.warnings.append(f"committed, but not every rank may know: {error}")
        if op.committed:  # on rank 0
            self.clean_up(record, superseded)
        return ticket.prefix

    # S1
    def agree(self, op: Operation, request: Callable[[], Message]) -> CheckpointMetadata:
        """Check that all ranks request the same save. Return its record, whose tables are still empty."""
        with op.step("S1 agree"):
            self.request = request()
            op.agree(self.request)
            drawn = self._draw(self.request["prefix"]) if op.rank == 0 else None
            prefix, save_id, sequence, now = op.broadcast(drawn)
            form, level, size = self.request["format"], self.request["compression"], op.world_size
            version, custom = torch.__version__, self.request["custom_metadata"]
            return CheckpointMetadata(
                prefix, save_id, sequence, size, form, level, version, now, custom, (), (), NO_PIECES
            )

    def _draw(self, prefix: str | None) -> tuple[str, str, int, str]:
        """Return prefix, save id, sequence number and time of a save."""
        now, sequence = datetime.datetime.now(datetime.timezone.utc), 0
        taken = st.recorded_prefixes(self.storage, self.warnings.append)
        for other in taken:
            with nullcontext() if other == prefix else st.skipping(other, self.warnings.append):
                try:
                    head = st.record_head(self.storage, other)
                except OSError:  # once more: what is left out here may later count as newer than this save
                    head = st.record_head(self.storage, other)
                sequence = max(sequence, head.sequence if head else 0)
        if prefix is None:
            name = now.strftime("checkpoint_%Y%m%d_%H%M%S")
            names = [name, *(f"{name}_{count}" for count in range(1, len(taken) + 2))]
            prefix = next(name for name in names if name not in taken)
        elif prefix in taken and not self.request["overwrite"]:
            raise _existing(prefix)
        return prefix, secrets.token_hex(4), min(sequence + 1, st.MOST), now.isoformat()

    # S2
    def collect(self, op: Operation, collect: Callable[[], ShardData]) -> ShardData:
        """Collect what this rank holds. A rank outside of a DTensor's mesh has no part of it."""
        with op.step("S2 collect"):
            data = collect()
            for t in data.tensors:
                st.check_name(t.name)
            tensors = [t._replace(mesh=op.own_ranks(t.mesh)) if t.mesh else t for t in data.tensors]
            return data._replace(tensors=mark_tied([t for t in tensors if not t.mesh or op.rank in t.mesh]))

    # S3
    def plan(
        self, op: Operation, ticket: CheckpointMetadata, data: ShardData
    ) -> tuple[CheckpointMetadata, Share]:
        """Make the table on rank 0, then the fence, then the whole file; no file exists before its fence.

        Return the plan, which ranks other than 0 do not get, and this rank's share of it.
        """
        with op.step("S3 plan"):
            holdings = gather_holdings(op, data)
            self._compare_replicas(op, data, holdings)
            plan, sources = ticket, NO_PIECES
            shares: Iterator[str] = iter(())
            if holdings:
                plan, sources = lay_out(holdings, ticket, CheckpointFormat(ticket.format))
                self._create_files(plan)
                shares = pack_shares(plan)
            if ticket.format != "multi_shard":  # all ranks compute the schedule of the whole file
                sources = st.unpack_pieces(st.Fields(op.broadcast(st.pack_pieces(sources))))
            return plan, (unpack_share(op.scatter(shares), ticket), sources)

    def _create_files(self, plan: CheckpointMetadata) -> None:
        """Create the fence, then the whole file."""
        self.storage.create(st.fence_name(plan.prefix, plan.save_id)).close()
        if (whole := plan.shards[0]).header_bytes:
            with closing(self.storage.create(plan.shard_path(0))) as file:
                file.resize(whole.length)
            if plan.compression != "none":
                self.warnings.append(f"{whole.file} is not compressed: other readers could not read it")

    def _compare_replicas(self, op: Operation, data: ShardData, holdings: Holdings | None) -> None:
        """Compare what several ranks hold by checksums. Copies that differ are then kept per rank or mesh."""
        requests = list[Packed]()
        if holdings:
            compared, on_device = holdings.replicas(self.request["verify_replicas"])
            rows = holdings.rows.take(compared)
            ends = np.searchsorted(rows.file, np.arange(1, op.world_size))
            requests += [
                pack_columns(*part) for part in np.split(np.stack((rows.begin, on_device)), ends, axis=1)
            ]
        numbers, devices = unpack_columns(op.scatter(requests))
        views = [view for t in data.tensors for _, view in t.pieces]
        sums = checksums([views[n] for n in numbers.tolist()], devices.tolist(), Meter(poll=op.poll))
        answers = op.gather_at_0(sums)
        if holdings:
            found = itertools.chain.from_iterable(answers)
            holdings.keep_differing(compared, np.fromiter(found, np.uint64, len(compared)), self.warnings)
            holdings.check_steps()

    # S4
    def write(self, op: Operation, share: Share, data: ShardData) -> Report:
        """Write this rank's blocks of the whole file, and its own file: the first and last of its share."""
        with op.step("S4 write"):
            plan, sources = share
            views, level = views_by_index(op, plan, data), st.CompressionLevel(plan.compression)
            own = -1 if plan.format == "single_file" else len(plan.shards) - 1
            whole = WholeFile(op, plan, sources, views) if plan.shards[0].header_bytes else None
            rows = plan.pieces.take(plan.pieces.file == own)
            if level is st.CompressionLevel.NONE:
                total = int((rows.begin + rows.length).max(initial=0))  # with the gaps between entries
            else:
                total = int(rows.nbytes(st.itemsizes(plan.tensors)).sum())
            total += whole.nbytes if whole else 0
            meter = Meter(op.step_name, total, op.progress, op.poll)
            crcs, written = dict[str, list[int]](), None
            if whole:
                with closing(self.storage.open(plan.shard_path(0), write=True)) as file:
                    crcs = whole.write(file, meter)
                    finish(in_thread(file.sync), meter.tick)  # I2
            if own >= 0:
                with closing(self.storage.create(plan.shard_path(own))) as file:
                    written = write_own_file(file, plan, own, views, level, meter)
                    finish(in_thread(file.sync), meter.tick)  # I2
            meter.tick()
            self.bytes_written = meter.total
            return crcs, written

    # S5
    def report(self, op: Operation, plan: CheckpointMetadata, written: Report) -> CheckpointMetadata:
        """Write the whole file's header, and return the record, on rank 0. Elsewhere return the plan."""
        with op.step("S5 report"):
            reports = op.gather_at_0(written)
            if op.rank != 0:
                return plan
            shards, pieces, blocks = list(plan.shards), plan.pieces, dict[str, list[int]]()
            for index, (crcs, own) in enumerate(reports, len(shards) - op.world_size):
                blocks |= crcs
                if own is not None:
                    row, lengths = own
                    shards[index] = st.ShardMetadata(*row)
                    if lengths is not None:
                        rows = pieces.file == index
                        pieces.begin[rows], pieces.length[rows] = np.cumsum(lengths) - lengths, lengths
            if (whole := plan.shards[0]).header_bytes:
                in_order = itertools.chain.from_iterable(blocks[str(n)] for n in range(len(blocks)))
                header = st.encode_header(plan.entries(0), whole.length - whole.header_bytes)
                header = st.with_crcs(header, in_order)
                with closing(self.storage.open(plan.shard_path(0), write=True)) as file:
                    file.write(0, memoryview(header))
                    finish(in_thread(file.sync), op.poll)  # I2
                shards[0] = whole._replace(header_crc=st.crc32(header))
            record = dataclasses.replace(plan, shards=tuple(shards))
            self.size_bytes = record.size_bytes()
            return record

    # S6
    def commit(self, op: Operation, record: CheckpointMetadata) -> str | None:
        """Commit on rank 0. Return the id of the save that this one has replaced, or "".

        None if the commit may not be durable: then nothing that it replaces may go.
        """
        with op.step("S6 commit"):
            if op.rank != 0:
                return ""
            prefix, fence = record.prefix, st.fence_name(record.prefix, record.save_id)
            self.storage.sync_directory(f"{prefix}/x")  # I2: the names of the files
            for index, shard in enumerate(record.shards):
                if self.storage.length(path := record.shard_path(index)) != shard.length:
                    problem = "rank 0 does not find it as it was written: do all ranks share one storage?"
                    raise CheckpointException(f"{path}: {problem}", path, ExceptionType.STORAGE_ERROR)
            with closing(self.storage.open(fence, write=True)) as file:
                file.write(0, memoryview(st.encode_record(record)))
                file.sync()
            old = st.record_head(self.storage, prefix)
            try:
                # The instant of commit.
                self.storage.publish(fence, st.record_name(prefix), self.request["overwrite"])
            except OSError as error:  # a rename that reports an error may have happened: the record tells
                if not self._is_recorded(record):
                    if isinstance(error, FileExistsError):
                        raise _existing(prefix) from error
                    raise
                with suppress(OSError):
                    self.storage.delete(fence)  # where a link has reported the error
            op.committed = True
            try:
                self.storage.sync_directory(st.record_name(prefix))
            except OSError as error:  # the rename may not be durable: the old checkpoint must stay whole
                self.warnings.append(f"committed, but its directory could not be synced: {error}")
                return None
            return old.save_id if old else ""

    # S7
    def announce(self, op: Operation) -> None:
        """Tell every rank that the save is committed."""
        with op.step("S7 announce"):
            op.gather_at_0(None)

    def clean_up(self, record: CheckpointMetadata, superseded: str | None) -> None:
        """Delete the replaced save's files, and checkpoints that are not kept. An error is a warning."""
        kept = {t.name for t in record.tensors if t.rank is not None} - _NEVER_ALIKE
        if kept and (names := tuple(sorted(kept))) not in self.warned:
            self.warned.add(names)
            what = "differ between ranks, or meshes of ranks, and are kept for each"
            self.warnings.append(f"{what}: {st.some(names, 20)}")
        try:
            self._delete_files(record.prefix, superseded or "")  # I3: only now
            if superseded is not None and (self.keep_last is not None or self.retain is not None):
                self._retain(record.prefix)
        except Exception as error:
            self.warnings.append(f"committed, but not all that should go is gone: {error!r}")

    def _retain(self, newest: str) -> None:
        """Delete the checkpoints that the user does not keep. The new one always stays."""
        known = st.list_committed(self.storage, self.warnings.append)
        prefixes = [meta.prefix for meta in known]
        try:
            kept = list(self.retain(known)) if self.retain else prefixes[-(self.keep_last or 1) :]
        except Exception as error:
            raise ValueError(f"retain raised {error!r}, so nothing was deleted") from error
        if wrong := [prefix for prefix in kept if prefix not in prefixes]:
            raise ValueError(f"retain must return prefixes of those that it is given, not {wrong[0]!r}")
        for prefix in prefixes:
            if prefix not in [newest, *kept]:
                st.delete_committed(self.storage, prefix)

    # After a failure
    def _settle(self, op: Operation, ticket: CheckpointMetadata) -> bool:
        """Return whether the save was committed after all (I4).

        If not, it cannot commit any more, and its files are removed.
        """
        if op.committed:
            return True
        try:
            self.storage.delete(st.fence_name(ticket.prefix, ticket.save_id))
            if self._is_recorded(ticket):
                return True
            self._delete_files(ticket.prefix, ticket.save_id)
        except (OSError, CheckpointException) as error:
            # The failure that led to this one matters more; `collect_garbage` finds the rest.
            log.warning("%s: could not clean up after the failed save: %s", ticket.prefix, error)
        return False

    def _delete_files(self, prefix: str, save_id: str) -> None:
        for owner, name in st.tensor_files(self.storage, prefix):
            if owner == save_id:
                self.storage.delete(name)

    def _is_recorded(self, ticket: CheckpointMetadata) -> bool:
        """Return whether the record is this save's. OSError if it cannot be read."""
        try:
            head = st.record_head(self.storage, ticket.prefix)
        except (OSError, CheckpointException) as error:
            message = f"{ticket.prefix!r} may have been committed: its record cannot be read: {error}"
            raise OSError(message) from error
        return head is not None and head.save_id == ticket.save_id


def _existing(prefix: str) -> CheckpointException:
    message = f"checkpoint {prefix!r} exists: delete it first, or save with overwrite=True"
    return CheckpointException(message, prefix)


# ----------------------------------------------------------------------------------------------------------
# The load protocol

RESHARDING_STRATEGIES = ("parallel", "sequential", "broadcast")


def committed(storage: st.CheckpointStorage, prefix: str) -> tuple[bytes, CheckpointMetadata]:
    """Call `st.read_committed_record`. LOAD_FAILED where there is no checkpoint of this name."""
    try:
        return st.read_committed_record(storage, prefix)
    except FileNotFoundError as error:
        known = ", ".join(st.recorded_prefixes(storage)[-5:]) or "none"
        where = getattr(storage, "base_path", "the storage")
        message = f"there is no checkpoint {prefix!r} in {where}; the last ones there: {known}"
        raise CheckpointException(message, prefix, ExceptionType.LOAD_FAILED) from error


@dataclass
class CheckpointLoader:
    """Runs L1 to L5 on one rank."""

    coordinator: DistributedCoordinator
    storage: st.CheckpointStorage

    def coordinate_load(
        self,
        op: Operation,
        request: Callable[[], Message],
        validate: Callable[[CheckpointReader], None],
        match: Callable[[CheckpointReader], list[Target]],
        apply: Callable[[], None],
        open_reader: Callable[[Operation], CheckpointReader] | None = None,
    ) -> None:
        """Fill the targets that `match` returns, and `apply` them, on every rank. Collective.

        Blocks until all ranks are done. `request` returns "prefix", "strategy" and what else must be the same
        on all ranks; `match` changes nothing yet.

        `OperationFailed` on all ranks if one fails: in L1 to L3 nothing has changed; in L4 and L5 tensors are
        undefined, and the message says so. `open_reader` opens, in L1, what is no checkpoint of this library.
        """
        with op.step("L1 record"):
            wanted = request()
            op.agree(wanted)
            strategy = wanted["strategy"]
            reader = open_reader(op) if open_reader else self._open(op, wanted["prefix"])
        with reader:
            reader.meter = Meter(poll=op.poll)
            with op.step("L2 validate"):
                validate(reader)
            with op.step("L3 match"):
                reads = reader.plan(match(reader))
                op.gather_at_0(None)  # nothing changes anywhere before every rank has a plan
            with op.step("L4 read"):
                total = sum(read.nbytes for read in reads)
                meter = Meter(op.step_name, total, op.progress, op.poll)
                if strategy == "broadcast" and op.world_size > 1:
                    read_once(op, reader, reads, meter)
                else:
                    for rank in range(op.world_size) if strategy == "sequential" else [op.rank]:
                        if rank == op.rank:
                            gate = st.Gate()
                            run = functools.partial(reader.run, gate=gate, meter=meter)
                            st.in_parallel(reads, run, meter.tick, len(reads), gate)
                        if strategy == "sequential":
                            op.gather_at_0(None)
                meter.tick()
        with op.step("L5 apply"):
            op.gather_at_0(None)  # every rank has its bytes
            apply()
            op.gather_at_0(None)

    def _open(self, op: Operation, prefix: str) -> CheckpointReader:
        """L1: rank 0 reads the record, and hands it out."""
        text, record = committed(self.storage, prefix) if op.rank == 0 else (b"", None)
        sent = op.broadcast(text.decode())
        return CheckpointReader(self.storage, record or st.decode_record(sent.encode(), prefix))


# ----------------------------------------------------------------------------------------------------------
# Operations: a deadline, a cancel event, and one failure for all


class OperationFailed(Exception):
    """Every rank has agreed that the operation failed, and how. The API raises the public exception."""

    def __init__(self, failure: Message) -> None:
        super().__init__(failure["message"])
        self.failure = failure  # as `Operation` describes it

    def public(self, checkpoint_path: str) -> Exception:
        """Return the exception that the user sees, the same on every rank."""
        kind, rank = self.failure["type"], self.failure["rank"]
        if kind == "value_error":
            return ValueError(str(self))
        return CheckpointException(str(self), checkpoint_path, ExceptionType(kind), rank)


@dataclass
class Operation:
    """One collective save or load, as one rank sees it.

    Ranks exchange all values by `gather`, in the same order on every rank. A rank that fails gives a failure
    instead of a value to its next gather. The others wait in that gather, or reach it later; there all ranks
    raise the failure. TorchCoordinator also has a flag: when it is up, ranks go to their next gather at once.
    A rank that cannot wait (interrupted, past the deadline, or cancelled while it waits) leaves its failure
    for the others to find.
    """

    coordinator: DistributedCoordinator
    verb: str  # "save" or "load"
    timeout: float  # seconds
    started: float | None = None  # when the first attempt began: all have one deadline
    cancel: threading.Event | None = None
    retryable: tuple[type[BaseException], ...] = ()
    progress: Callable[[Progress], None] | None = None
    begun: set[str] = field(default_factory=set)  # the steps that this attempt, or one before it, has begun

    committed = False  # on rank 0: the save has succeeded, whatever follows
    step_name = ""
    _doubt = 0  # does an error of this rank follow from another's? 0: no, 1: perhaps, 2: yes; the least wins

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.coordinator.rank, self.coordinator.world_size
        self.started = time.monotonic() if self.started is None else self.started
        self._deadline = self.started + self.timeout
        # Map from the rank that a mesh names to the rank in this operation.
        self._own_rank = getattr(self.coordinator, "own_rank", range(self.world_size))
        self._meshes: dict[Shape, Shape] = {}
        self.seconds: dict[str, float] = {}
        self._torch = self.coordinator if isinstance(self.coordinator, TorchCoordinator) else None
        if self._torch:
            self._torch.begin()

    def poll(self) -> None:
        """Raise if cancelled or late, or if another rank has failed; called a few times a second."""
        self._poll_cancel()
        if self._torch and self._torch.flag_is_up():
            self._doubt = 2
            why = "stopped by another rank, which did not say why"
            raise CheckpointException(why, type=ExceptionType.CANCELLED)
        if time.monotonic() > self._deadline:
            late = f"not done by the deadline of {self.timeout:g} s"
            raise CheckpointException(late, type=ExceptionType.TIMEOUT, rank=self.rank)

    def _poll_cancel(self) -> None:
        if self.cancel and self.cancel.is_set() and not self.committed:
            raise CheckpointException("cancelled", type=ExceptionType.CANCELLED)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step. I5: an error in it is raised on all ranks."""
        self.step_name, started = name, time.monotonic()
        self.begun.add(name[:2])
        try:
            if not name.startswith("S7"):  # a commit is announced, however late
                self.poll()
            # In a background save only this step and the lists of S4 pause it: training goes on beside it.
            with no_garbage_collection() if name.startswith("S3") else nullcontext():
                yield
        except OperationFailed:
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.seconds[name] = time.monotonic() - started

    def _fail(self, error: BaseException) -> None:
        """Raise the failure that all ranks agree on, which is this one or that of another rank.

        Return if `error` must end the process: then the caller raises it, with TorchCoordinator at once.
        """
        failure, ending = self._describe(error), not isinstance(error, Exception)
        if self._torch:
            if ending:
                self._leave(failure)
                return
            self._torch.raise_flag()
        self.cancel = None  # from now on this rank waits for the agreement
        try:
            self.gather(None, slice(0), failure)
        except OperationFailed as agreed:
            if not ending:
                raise agreed from error

    def _leave(self, failure: Message) -> OperationFailed:
        """Leave a failure for the others to find, and return it.

        This rank does not retry, so its failure wins over those that other ranks would retry.
        """
        failure |= {"retryable": False, "superseded": False, "doubt": -1}
        if self._torch:
            self._torch.leave({"failure": failure})
        return OperationFailed(failure)

    def _describe(self, error: BaseException) -> Message:
        kind, rank, text, step = f"{self.verb}_failed", self.rank, str(error), self.step_name[:2]
        if isinstance(error, CheckpointException):
            rank = rank if error.rank is None else error.rank
            # Those of the other verb do not fit this call.
            if error.type.value not in ("unknown", "save_failed", "load_failed"):
                kind = error.type.value
        elif isinstance(error, ValueError):
            kind = "value_error" if step in ("S1", "L1") else kind
        else:
            kind = ExceptionType.STORAGE_ERROR.value if isinstance(error, OSError) else kind
            text = f"{type(error).__name__}: {text}"
        late = kind == ExceptionType.TIMEOUT.value
        if late and rank != self.rank and step in ("S1", "L1"):
            text += f"; {self.verb} is collective: every rank must call it"
        if "L4" in self.begun:
            text += "; tensors being loaded are undefined now: load again, or restart"
        text += f" (rank {self.rank}, in {self.step_name})" if self.world_size > 1 else ""
        return {
            "type": kind,
            "rank": rank,
            "message": text[: 1 << 16],
            "retryable": isinstance(error, self.retryable),
            "superseded": isinstance(error, Superseded),
            # A rank that waits for a lost one is late too; a rank that failed before may have removed a file.
            "doubt": self._doubt or int(late or isinstance(error, FileNotFoundError)),
        }

    def own_ranks(self, mesh: Shape) -> Shape:
        """Return the ranks of a mesh as ranks of this operation, without those that take no part in it."""
        if mesh not in self._meshes:  # computed once: thousands of tensors have the same mesh
            own = (self._own_rank[rank] for rank in mesh if rank in self._own_rank)
            self._meshes[mesh] = tuple(sorted(own))
        return self._meshes[mesh]

    def _remaining(self) -> float:
        """Return the seconds until waits for other ranks end, at the deadline and the grace."""
        return max(0.05, self._deadline + GRACE_S - time.monotonic())

    def gather(
        self,
        value: T,
        shown: slice | None = None,
        failure: Message | None = None,
        parts: Iterable[object] = (),
    ) -> list[T]:
        """Return all ranks' values, or raise the most certain failure.

        All ranks run the same program, so all values have one type. `shown`: the ranks whose values ranks
        other than 0 need, so that thousands of ranks do not each read thousands of values. `parts`, on rank
        0: a value for each rank, for `scatter`.
        """
        row = {"value": value} if failure is None else {"failure": failure}
        rows = list[Any]()
        try:
            if self._torch:
                rows += self._torch.all_gather(row, self._remaining(), shown, self._poll_cancel, parts)
            else:
                rows += self.coordinator.all_gather(row, timeout=self._remaining())
        except Exception as error:
            if failure is None or failure["doubt"]:
                failure = self._describe(error)
            raise self._leave(failure) from error
        if failures := [row["failure"] for row in rows if "failure" in row]:
            raise OperationFailed(min(failures, key=lambda failure: failure["doubt"]))
        return [row["value"] for row in rows]

    def gather_at_0(self, value: T) -> list[T]:
        """Return all ranks' values on rank 0."""
        return self.gather(value, slice(0))

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value."""
        values: list[Any] = self.gather(value if self.rank == 0 else None, slice(1))
        value_of_0: T = values[0]
        return value_of_0

    def scatter(self, parts: Iterable[T] = ()) -> T:
        """Return this rank's one of the values that rank 0 gives, one for each rank."""
        if not self._torch:
            return self.broadcast(list(parts))[self.rank]
        self.gather(None, slice(0), parts=parts)
        part: T = self._torch.part()
        return part

    def agree(self, request: Message) -> None:
        """Check on rank 0 that all have the same request. ValueError that names the first difference."""
        rows = self.gather_at_0({"call": self.verb, **request})
        for rank, row in enumerate(rows if self.rank == 0 else ()):
            for key in {**rows[0], **row}:
                both = rows[0].get(key), row.get(key)
                if len({st.dump_json(st.encode_value(value, key)) for value in both}) > 1:
                    sides = f"rank 0 has {both[0]!r}, rank {rank} has {both[1]!r}"
                    raise ValueError(f"ranks disagree about {key}: {sides}; has a rank missed a call?")

    def exchange(self, outgoing: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Send bytes to ranks, and return the bytes that each rank has sent to this one."""
        if not self._torch:
            rows = self.gather({rank: data.tobytes() for rank, data in outgoing.items()})
            return {
                rank: np.frombuffer(bytearray(row[self.rank]), np.uint8)
                for rank, row in enumerate(rows)
                if self.rank in row
            }
        tables = self.gather({rank: len(data) for rank, data in outgoing.items()})
        if not any(tables):
            return {}
        incoming = [table.get(self.rank, 0) for table in tables]
        try:
            return self._torch.all_to_all(outgoing, incoming, self._remaining(), self.poll)
        except RuntimeError as error:
            self._doubt = 1  # a rank that has died misses the next gather
            raise CheckpointException(f"gloo exchange failed: {error}") from error


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the process's garbage collection: to search what a plan makes takes as long as to make it.

    None of that is a cycle. What is gone before the pause ends is never searched.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again.

    There are `max_retries` attempts in all. The delay between them starts at `initial_delay` seconds, and
    grows by `backoff_factor`.
    """

    max_retries: int = 3
    initial_delay: float = 1.0
    max_delay: float = 30.0
    backoff_factor: float = 2.0
    jitter: float = 0.1  # as a part of the delay
    retryable_exceptions: tuple[type[BaseException], ...] = (OSError,)

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait after failed attempt number `attempt` (from 0)."""
        try:
            base = min(self.max_delay, self.initial_delay * self.backoff_factor**attempt)
        except OverflowError:
            base = self.max_delay if self.initial_delay else 0.0
        return base * (1 + random.uniform(-self.jitter, self.jitter))


class FaultToleranceHandler:
    """Retries, timeouts and rollback."""

    def __init__(self, storage: st.CheckpointStorage, retry_policy: RetryPolicy | None = None) -> None:
        self.storage = storage
        self.retry_policy = retry_policy or RetryPolicy()

    def execute_with_retry(
        self,
        function: Callable[[], T],
        cancel: threading.Event | None = None,
        deadline: float = math.inf,
    ) -> T:
        """Call `function` until it succeeds, the policy ends the attempts, or an error is not retryable.

        No delay lasts beyond `deadline`, of `time.monotonic`.

        `OperationFailed` is the same on all ranks: they all retry, or none does. If `cancel` is set by then,
        the next attempt begins at once, and fails on all ranks alike.
        """
        policy, cancel = self.retry_policy, cancel or threading.Event()
        for attempt in range(policy.max_retries - 1):
            try:
                return function()
            except OperationFailed as failed:
                log.debug("attempt %d failed: %s", attempt + 1, failed)
                if not failed.failure["retryable"]:
                    raise
            except tuple(policy.retryable_exceptions):
                if cancel.is_set():
                    raise
            cancel.wait(max(0.0, min(policy.delay(attempt), deadline - time.monotonic())))
        return function()

    def execute_with_timeout(self, function: Callable[[], T], timeout: float) -> T:
        """Call `function` in a thread. TIMEOUT after `timeout` seconds; the thread may go on."""
        result = in_thread(function)
        if not wait([result], timeout).done:
            raise CheckpointException(f"not done within {timeout:g} s", type=ExceptionType.TIMEOUT)
        return result.result()

    def rollback(self, checkpoint_prefix: str) -> None:
        """Delete a checkpoint, committed or not: the record, then its files.

        FileNotFoundError where there is none.
        """
        st.delete_committed(self.storage, checkpoint_prefix.removesuffix(st.RECORD_SUFFIX))


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a daemon thread.

    An executor takes no more work once the interpreter exits, while a save in flight goes on.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="ckpt-helper", daemon=True).start()
    return result


# ----------------------------------------------------------------------------------------------------------
# Coordinators


@runtime_checkable
class DistributedCoordinator(Protocol):
    """How ranks exchange values, which are those that `encode_value` takes.

    All methods are collective: every rank calls them, in the same order. Each ends at `timeout` (seconds)
    with TIMEOUT. A class that derives from this one needs `rank`, `world_size` and `all_gather` only; for a
    part of a job's ranks also `own_rank`, a mapping from global ranks to its own.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]: ...

    def barrier(self, timeout: float = 600.0) -> None:
        self.all_gather(None, timeout)

    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object:
        return self.all_gather(value if self.rank == src else None, timeout)[src]


class LocalCoordinator(DistributedCoordinator):
    """One process: rank 0 of 1."""

    rank = 0
    world_size = 1

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        return [value]


# Work that gloo had not finished when its operation ended, with its buffers. gloo's threads must not drop the
# last reference to a tensor: at interpreter exit that ends the process.
_in_flight: list[tuple[dist.Work, object]] = []


def _own_connection(store: Store) -> Store:
    """A second connection: a thread that waits for a key blocks the connection that it uses."""
    own: Store = getattr(store, "clone")()  # missing in torch's type stubs
    return own


class TorchCoordinator(DistributedCoordinator):
    """The ranks of a `torch.distributed` process group. Creating one is collective over that group.

    Values go over keys of the rendezvous store, which shows which ranks are missing, and survives a timeout.
    Bulk bytes go over a private gloo group, also where training runs on NCCL; an operation makes one when it
    first needs it.
    """

    rank = world_size = 0  # instead of properties

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "torch.distributed is not initialised: call init_process_group, or use LocalCoordinator()"
            )
        ranks, own = dist.get_process_group_ranks(process_group or dist.group.WORLD), dist.get_rank()
        if own not in ranks:
            raise ValueError(f"rank {own} is not in the process group of ranks {ranks}")
        self.own_rank = {number: rank for rank, number in enumerate(ranks)}
        self.rank, self.world_size = self.own_rank[own], len(ranks)
        store = _own_connection(dist.distributed_c10d._get_default_store())
        name = "ckpt/" + hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        instance = store.add(f"{name}/made/{self.rank}", 1)
        self._store = PrefixStore(f"{name}/{instance}", store)
        self._operation = self._step = 0
        self._posted: list[str] = []
        self._store_error = ""
        self._longest_pause = min(0.5, max(0.02, self.world_size / 3200))  # thousands of ranks ask one store
        self._group: dist.ProcessGroupGloo | None = None  # of this operation

    def begin(self) -> None:
        """Start a collective operation."""
        self._operation, self._step, self._group, self._store_error = self._operation + 1, 0, None, ""
        self._next_look = 0.0  # at the flag

    def raise_flag(self) -> None:
        """Have the other ranks go to their next gather at once."""
        with suppress(CheckpointException):  # which the next gather raises again
            self._post(f"{self._operation}/flag", None)

    def flag_is_up(self) -> bool:
        """Whether a rank has raised the flag. Asks the store now and then; else the answer is no."""
        if (now := time.monotonic()) < self._next_look:
            return False
        self._next_look = now + self._longest_pause
        return self._call(self._store.check, [f"{self._operation}/flag"])

    def all_gather(
        self,
        value: object,
        timeout: float = 600.0,
        shown: slice | None = None,
        poll: Callable[[], None] = lambda: None,
        parts: Iterable[object] = (),
    ) -> list[Any]:
        """Return all ranks' values, in two hops: every rank posts its own, rank 0 collects and posts all.

        `shown`: ranks other than 0 get the values of these ranks, and failures. `poll` runs in waits, and may
        raise. `parts`, on rank 0: a value for each rank, which `part` returns there afterwards.
        """
        self._step += 1
        step, before = f"{self._operation}/{self._step}", len(self._posted)
        posts = [f"{step}/{rank}" for rank in range(self.world_size)]
        self._post(posts[self.rank], value)
        if self.rank == 0:
            rows = values = self._await(posts, posts, timeout, poll)
            if shown is not None:
                failures = [row for row in values if "failure" in row]
                rows = values[shown] + failures
                for rank, part in enumerate(() if failures else parts):
                    poll()
                    self._post(f"{step}/for/{rank}", part)
            self._post(f"{step}/all", rows)
        else:
            (values,) = self._await([f"{step}/all"], posts, timeout, poll)
        # Every rank has come as far as this step, so nobody still reads what was posted before it.
        retired, self._posted = self._posted[:before], self._posted[before:]
        for key in retired:
            self._call(self._store.delete_key, key)
        return values

    def part(self) -> Any:
        """Return this rank's part, once the gather that gives it is over."""
        key = f"{self._operation}/{self._step}/for/{self.rank}"
        return self._get(key, self._call(self._store.get, key))

    def leave(self, row: Message) -> None:
        """Post a row for the gather under way and for the next one, and raise the flag, without any wait."""
        with suppress(CheckpointException):
            for step in (self._step, self._step + 1):
                self._post(f"{self._operation}/{step}/{self.rank}", row)
                if self.rank == 0:
                    self._post(f"{self._operation}/{step}/all", [row])
            self.raise_flag()  # last: whoever sees it finds the row

    def all_to_all(
        self, outgoing: Mapping[int, Bytes], incoming: Sequence[int], timeout: float, poll: Callable[[], None]
    ) -> dict[int, Bytes]:
        """Send bytes to ranks, and receive `incoming[rank]` bytes from each. RuntimeError from gloo.

        `poll` runs in waits; it must raise at the deadline.
        """
        limit = datetime.timedelta(seconds=timeout)
        _in_flight[:] = [kept for kept in _in_flight if not kept[0].is_completed()]
        if self._group is None:

            def make() -> dist.ProcessGroupGloo:  # waits until every rank makes it
                store = PrefixStore(f"gloo/{self._operation}", _own_connection(self._store))
                return dist.ProcessGroupGloo(store, self.rank, self.world_size, limit)

            made = in_thread(make)
            while not wait([made], 0.01).done:
                poll()
            self._group = made.result()
        parts = [outgoing.get(rank, np.empty(0, np.uint8)) for rank in range(self.world_size)]
        received, options = np.empty(sum(incoming), np.uint8), dist.AllToAllOptions()
        options.timeout = limit
        buffers = torch.from_numpy(received), torch.from_numpy(np.concatenate(parts))
        send = getattr(self._group, "alltoall_base")  # missing in torch's type stubs
        work = send(*buffers, list(incoming), list(map(len, parts)), options)
        _in_flight.append((work, (self._group, buffers)))
        pause = 1e-4
        while not work.is_completed():
            time.sleep(pause)
            pause = min(1.5 * pause, 0.005)
            poll()
        work.wait()  # raises what went wrong
        return dict(enumerate(np.split(received, np.cumsum(incoming)[:-1])))

    def _post(self, key: str, value: object) -> None:
        text = st.dump_json(st.encode_value(value, key))
        # In parts, the last one first: once `key` is there, all is there.
        for start in range(len(text) // STORE_BYTES * STORE_BYTES, -1, -STORE_BYTES):
            part_key = f"{key}+{start}" if start else key
            self._call(self._store.set, part_key, text[start : start + STORE_BYTES])
            self._posted.append(part_key)

    def _get(self, key: str, text: bytes) -> Any:
        """Return the value of which `text` is the first part."""
        part = text
        while len(part) == STORE_BYTES:
            part = self._call(self._store.get, f"{key}+{len(text)}")
            text += part
        return st.decode_value(json.loads(text), str)

    def _await(
        self, keys: list[str], posts: Sequence[str], timeout: float, poll: Callable[[], None]
    ) -> list[Any]:
        """Wait for `keys`, and return their values. TIMEOUT names the ranks without their `posts`."""
        deadline, pause = time.monotonic() + timeout, 0.0003
        while not self._call(self._store.check, keys):
            poll()
            if time.monotonic() > deadline:
                late = [rank for rank, key in enumerate(posts) if not self._call(self._store.check, [key])]
                late = late or [0]  # all have posted: then rank 0 has not posted the whole
                message = f"no answer from rank(s) {st.some(late, 20)} of {self.world_size} by the deadline"
                raise CheckpointException(message, type=ExceptionType.TIMEOUT, rank=late[0])
            time.sleep(pause)
            pause = min(pause * 1.25, self._longest_pause)
        return list(map(self._get, keys, self._call(self._store.multi_get, keys)))

    def _call(self, function: Callable[..., T], *args: object) -> T:
        """Call a function of the store; TIMEOUT if it is unreachable."""
        try:
            if self._store_error:  # asking a dead store again may take seconds each time
                raise RuntimeError(self._store_error)
            return function(*args)
        except (RuntimeError, OSError) as error:
            self._store_error = str(error)
            why = "(has the process that hosts it, by default rank 0, died?)"
            message = f"the rendezvous store is unreachable {why}: {error}"
            raise CheckpointException(message, type=ExceptionType.TIMEOUT) from error


# ----------------------------------------------------------------------------------------------------------
# What a rank holds


class LocalTensor(NamedTuple):
    """A tensor as one rank holds it."""

    name: str
    dtype: str
    shape: Shape  # global
    pieces: list[tuple[Box, torch.Tensor]]  # none where this rank has no elements
    mesh: Shape = ()  # a DTensor: the ranks of its mesh, sorted: global ones; after S2 the operation's
    replicated: bool = True  # whether a placement declares equal copies, or nothing tells
    alias_of: str | None = None  # the tensor that it is tied to; its own name: this rank cannot tell
    per_rank: bool = False  # every rank has its own


def as_dtensor(tensor: object) -> DTensor | None:
    """`tensor` if it is a DTensor.

    Does not import that class, which takes as long as torch itself: where nobody has, there is no DTensor.
    """
    kind: type[DTensor] | None = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return tensor if kind is not None and isinstance(tensor, kind) else None


def local_tensor(name: str, tensor: torch.Tensor) -> LocalTensor:
    """The pieces of `tensor` on this rank. CheckpointException, naming it, for what cannot be stored."""
    sharded = as_dtensor(tensor)
    local = tensor if sharded is None else sharded.to_local()
    placements = () if sharded is None else sharded.placements
    _refuse_unsupported(name, local, placements)
    code, shape, local = st.CODES[local.dtype], tuple(tensor.shape), local.detach()
    if sharded is None:
        return LocalTensor(name, code, shape, [(whole_box(shape), local)] if local.numel() else [])
    whole = whole_box(tuple(local.shape))
    boxes = shard_boxes(name, sharded, whole.size) if local.numel() else []
    pieces = [(box, local if part == whole else local[part.within(whole)]) for box, part in boxes]
    replicated = any(placement.is_replicate() for placement in placements)
    return LocalTensor(name, code, shape, pieces, _ranks_of(sharded.device_mesh), replicated)


def mesh_ranks(tensor: object) -> Shape:
    """The global ranks of a DTensor's mesh, sorted: neither their order nor its shape matters.

    () for a plain tensor.
    """
    sharded = as_dtensor(tensor)
    return () if sharded is None else _ranks_of(sharded.device_mesh)


@functools.lru_cache(64)  # torch computes a mesh's table each time that it is asked, in 60 us
def _ranks_of(mesh: DeviceMesh) -> Shape:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _refuse_unsupported(name: str, tensor: torch.Tensor, placements: Sequence[Placement]) -> None:
    problem, is_plain = "", type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not is_plain and type(tensor).__name__ == "ShardedTensor":
        problem = "is an FSDP1 ShardedTensor; use fully_shard, or FSDP(..., device_mesh=mesh), for DTensors"
    elif not is_plain and torch.nn.parameter.is_lazy(tensor):
        problem = "is not initialised: run its lazy module on a batch first, which makes it"
    # A subclass over plain memory is a plain tensor once it is detached, as nn.Parameter is.
    elif not is_plain and type(tensor.detach()) is not torch.Tensor:
        what = "a tensor subclass without a known layout; convert it to a plain tensor"
        problem = f"is a {type(tensor).__name__}, {what}"
    elif tensor.is_nested:
        problem = "is a nested tensor; store its values() and offsets(), or to_padded_tensor()"
    elif tensor.layout is not torch.strided:
        problem = f"has layout {tensor.layout}; store to_dense(), or its indices and values"
    elif tensor.dtype not in st.CODES:
        problem = f"has dtype {tensor.dtype}; store dequantize(), or int_repr() with its scales"
    elif tensor.is_meta:
        problem = "is on the meta device, which holds no data; materialise it (to_empty) first"
    elif tensor.numel() and not tensor.data_ptr():
        problem = "has no memory: its storage was freed, or never made; save while it is there"
    elif any(placement.is_partial() for placement in placements):
        problem = "has a Partial() placement, a sum not yet taken: redistribute it to Replicate() or Shard()"
    elif unknown := {type(p).__name__ for p in placements} - {"Shard", "_StridedShard", "Replicate"}:
        problem = f"has placements {sorted(unknown)}, whose layout is unknown: redistribute it to Shard()"
    if problem:
        raise CheckpointException(f"{name} {problem}")  # of the type that fits the call


Cut = tuple[int, int, int, int]  # dimension, number of parts, which of them, split factor


def shard_boxes(name: str, tensor: DTensor, local_shape: Shape) -> list[tuple[Box, Box]]:
    """The boxes of a DTensor that this rank holds, each with its box in the local tensor.

    There are none outside of its mesh. Placements can be read in two ways: as torch cuts a tensor by them,
    and as FSDP2 makes them of a tensor-parallel one. Usually both give the same. CheckpointException where
    not exactly one result has the local shape.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    shape, readings = tuple(tensor.shape), list[list[list[range]]]()
    for cuts in _cuts(tensor, coordinate):
        dims = [[range(size)] for size in shape]
        for dim, *cut in cuts:
            dims[dim] = _cut_runs(dims[dim], *cut)
        if dims not in readings and local_shape == tuple(sum(map(len, runs)) for runs in dims):
            readings.append(dims)
    if len(readings) != 1:
        what = "fit two layouts of" if readings else "do not fit"
        raise CheckpointException(
            f"{name}: placements {tensor.placements} on a mesh of shape {tuple(tensor.device_mesh.shape)} "
            f"{what} its shape {list(shape)} and local shape {list(local_shape)}; redistribute it to Shard() "
            "and Replicate() placements, or choose a size that divides evenly"
        )
    placed = [zip(runs, itertools.accumulate(map(len, runs), initial=0)) for runs in readings[0]]
    boxes = []
    for parts in itertools.product(*placed):
        size = tuple(len(run) for run, _ in parts)
        inside = Box(tuple(at for _, at in parts), size)
        boxes.append((Box(tuple(run.start for run, _ in parts), size), inside))
    return boxes


def _cuts(tensor: DTensor, coordinate: Sequence[int]) -> Iterator[list[Cut]]:
    """The cuts that placements stand for, in order: as torch applies them, and as FSDP2 has applied them.

    FSDP2 cuts what tensor parallelism has left, but its placement comes first, with the number of parts that
    it found as split factor. Torch cuts by such a placement group by group, with another result where sizes
    do not divide.
    """
    mesh, placements, cuts = tensor.device_mesh, tensor.placements, dict[int, Cut]()
    # Torch has this from 2.10 on, where the order is not the default.
    declared = getattr(getattr(tensor, "_spec", None), "shard_order", None)
    for i in [i for entry in declared for i in entry.mesh_dims] if declared else range(mesh.ndim):
        if not placements[i].is_replicate():
            dim: int = getattr(placements[i], "dim")
            cuts[i] = dim, mesh.size(i), coordinate[i], getattr(placements[i], "split_factor", 1)
    yield list(cuts.values())
    plain = [i for i in cuts if cuts[i][3] == 1]
    strided = [i for i in cuts if i not in plain]
    found = (math.prod(cuts[j][1] for j in plain if j > i and cuts[j][0] == cuts[i][0]) for i in strided)
    if [cuts[i][3] for i in strided] == list(found):
        yield [(*cuts[i][:3], 1) for i in plain + strided[::-1]]


def _cut_runs(runs: list[range], ways: int, index: int, split_factor: int) -> list[range]:
    """Cut the elements of `runs` into `split_factor` groups, each into `ways` parts; part `index` of each.

    Runs are ranges of one dimension, which lie one behind the other in the local tensor. Of 8 elements, cut
    into 2 groups and 2 ways, part 0 has 0-1 and 4-5.
    """

    def chunk(whole: range, count: int, number: int) -> range:  # as torch.chunk
        size = -(-len(whole) // count)
        return whole[size * number : size * (number + 1)]

    positions, found = range(sum(map(len, runs))), list[range]()
    for group in range(split_factor):
        wanted, at = chunk(chunk(positions, split_factor, group), ways, index), 0
        for run in runs:
            part = run[max(0, wanted.start - at) : max(0, wanted.stop - at)]
            at += len(run)
            if part and found and found[-1].stop == part.start:
                part = range(found.pop().start, part.stop)
            found += [part] if part else []
    return found


def identity(view: torch.Tensor) -> tuple[object, ...]:
    """Equal for views of the same elements in the same order, and for no others."""
    flags = (view.is_conj(), view.is_neg())
    return (view.data_ptr(), view.device, view.dtype, tuple(view.shape), view.stride(), *flags)


def mark_tied(tensors: list[LocalTensor]) -> list[LocalTensor]:
    """Mark those that are the same views of the same memory as an earlier one: they are stored once.

    A tensor of which this rank has no part gets its own name: other ranks know whether it is tied.
    """
    seen, marked = dict[object, str](), []
    for item in tensors:
        views = tuple((box, *identity(view)) for box, view in item.pieces)
        first = seen.setdefault((item.dtype, item.shape, views), item.name) if views else item.name
        marked.append(item if views and first == item.name else item._replace(alias_of=first))
    return marked


class ShardData(NamedTuple):
    """What S2 collects on a rank: tensors, values, and optimizer steps that are numbers, not tensors."""

    tensors: list[LocalTensor]
    steps: Mapping[str, float] = types.MappingProxyType({})  # by parameter


def local_value(name: str, text: bytes, per_rank: bool = False) -> LocalTensor:
    """A value that is not a tensor, as JSON text; `per_rank`: every rank has its own."""
    view = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return LocalTensor(name, "JSON", (len(text),), [(whole_box((len(text),)), view)], per_rank=per_rank)


@no_garbage_collection()
def views_by_index(
    op: Operation, meta: CheckpointMetadata, data: ShardData
) -> dict[int, list[tuple[Box, torch.Tensor]]]:
    """What this rank holds of each tensor of a plan, by its index."""
    index = {(t.name, t.rank): number for number, t in enumerate(meta.tensors)}
    owners = ((t, (None, min(t.mesh, default=op.rank))) for t in data.tensors)
    return {index[t.name, r]: t.pieces for t, ranks in owners for r in ranks if (t.name, r) in index}


# ----------------------------------------------------------------------------------------------------------
# S3: the plan, made on rank 0 from every rank's description, in columns of numpy arrays


_NONE: Ints = np.empty(0, np.int64)
NO_PIECES = Pieces(_NONE, _NONE, _NONE, _NONE, np.empty((0, 2, 0), np.int64))
_STEP = re.compile("optimizer/(.+)/step")  # where a torch optimizer keeps the number of a parameter's updates


Packed = list[Any]  # columns of one length as JSON: that length, and a text for each column


def pack_columns(*columns: Ints) -> Packed:
    """Pack columns for other ranks."""
    return [len(columns[0]), *map(st.pack_ints, columns)]


def unpack_columns(packed: Packed) -> Iterator[Ints]:
    """Inverse of `pack_columns`; expands one column at a time."""
    count, *texts = packed
    return (st.unpack_ints(text, count) for text in texts)


def stack_boxes(boxes: Sequence[Box], width: int) -> Ints:
    """Boxes as an array (rows, 2, `width`), padded with offset 0 and size 1."""
    pads = [width - len(box.size) for box in boxes]
    rows = [(box.offset + (0,) * pad, box.size + (1,) * pad) for box, pad in zip(boxes, pads)]
    return np.array(rows, np.int64).reshape(len(boxes), 2, width)


def box_columns(box: Ints) -> Ints:
    """Boxes (rows, 2, dimensions) as columns (2 * dimensions, rows)."""
    return np.concatenate(box.transpose(1, 2, 0))


def join(parts: Sequence[Pieces]) -> Pieces:
    """The rows of all parts, with boxes of the same number of dimensions."""
    width = max(part.box.shape[2] for part in parts)
    pads = ([(0, 0), (0, 0), (0, width - part.box.shape[2])] for part in parts)
    padded = (part._replace(box=np.pad(part.box, pad)) for part, pad in zip(parts, pads))
    joined = Pieces(*map(np.concatenate, zip(*padded)))
    return joined._replace(box=np.maximum(joined.box, [[0], [1]]))


def starts(*columns: Ints) -> npt.NDArray[np.bool_]:
    """Whether each row differs from the row before it."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return first


class Described(NamedTuple):
    """A tensor as ranks describe it, without its pieces."""

    name: str
    dtype: str
    shape: Shape  # () for a value: its length may differ between ranks
    alias_of: str  # "": not tied
    per_rank: bool
    mesh: int  # the number of its mesh; 0: a plain tensor


def describe(data: ShardData) -> Message:
    """Describe what a rank holds, for the planner."""
    meshes = {mesh: number for number, mesh in enumerate(dict.fromkeys(t.mesh for t in data.tensors))}
    held = [(index, view.is_cuda) for index, t in enumerate(data.tensors) for _, view in t.pieces]
    width = max([1, *(len(t.shape) for t in data.tensors)])
    boxes = stack_boxes([box for t in data.tensors for box, _ in t.pieces], width)
    tensor, on_device = np.array(held, np.int64).reshape(-1, 2).T
    rows = [
        [t.name, t.dtype, () if t.dtype == "JSON" else t.shape, t.alias_of, t.per_rank, meshes[t.mesh]]
        for t in data.tensors
    ]
    return {
        "tensors": st.dump_json(rows).decode(),  # a gather encodes one text faster than 20,000 rows
        "meshes": [pack_columns(np.array(mesh, np.int64)) for mesh in meshes],
        "pieces": st.pack_pieces(Pieces(tensor, tensor * 0, np.arange(len(held)), on_device, boxes)),
        "steps": dict(data.steps),
    }


def gather_holdings(op: Operation, data: ShardData) -> Holdings | None:
    """Gather what all ranks hold, on rank 0; None elsewhere.

    Optimisation (skip on first reading): a rank whose tensors have the names and shapes of rank 0's leaves
    them out. At 4,096 ranks of 1,000 tensors each that is 240 MB of 250.
    """
    body = describe(data)
    digest = hashlib.sha256(body["tensors"].encode()).hexdigest()
    if op.broadcast(digest) == digest and op.rank > 0:
        body["tensors"] = None
    bodies = op.gather_at_0(body)
    return Holdings(bodies) if op.rank == 0 else None


class Holdings:
    """What all ranks hold, in columns, on rank 0.

    A *copy* of a tensor is a plain tensor on one rank, or a DTensor on one mesh. Its owner is that rank, or
    the lowest rank of the mesh. Copies of one name are one tensor if their dtypes, shapes, boxes and bytes
    are equal. Otherwise the name is in `unequal`, and each copy is a tensor of its own.

    `name`, `owner` and `kind` are columns of the copies, sorted by name and owner; they index `names`, ranks
    and `kinds`. `rows` are the pieces of all ranks, sorted by name, box, owner and rank, so that equal pieces
    are neighbours. In them `tensor` is the copy, `file` the rank, `begin` which piece of its rank it is, and
    `length` whether it is in the memory of a CUDA device.
    """

    def __init__(self, bodies: Sequence[Message]) -> None:
        kinds, meshes, tables = dict[Described, int](), {(): 0}, dict[tuple[str, str], Ints]()
        held, parts = list[Ints](), list[Pieces]()
        for rank, body in enumerate(bodies):
            text, packed = body["tensors"] or bodies[0]["tensors"], body["meshes"]
            if (key := (text, str(packed))) not in tables:
                local = [tuple(next(unpack_columns(mesh)).tolist()) for mesh in packed]
                numbers = [meshes.setdefault(mesh, len(meshes)) for mesh in local]
                found = (
                    Described(name, dtype, tuple(shape), origin or "", own, numbers[mesh])
                    for name, dtype, shape, origin, own, mesh in json.loads(text)
                )
                tables[key] = np.array([kinds.setdefault(kind, len(kinds)) for kind in found], np.int64)
            held.append(tables[key])
            pieces = st.unpack_pieces(st.Fields(body["pieces"]))
            parts.append(pieces._replace(file=np.full_like(pieces.file, rank)))
        self.steps = [body["steps"] for body in bodies]
        self.kinds, kind, counts = list(kinds), np.concatenate(held), np.array([len(ids) for ids in held])
        ranks = np.arange(len(held)).repeat(counts)
        self._compare(list(meshes), ranks, kind)
        # Copies, from the tensors of all ranks.
        number = {name: index for index, name in enumerate(self.names)}
        lowest = [min(mesh, default=-1) for mesh in meshes]
        columns = np.array([(number[k.name], lowest[k.mesh]) for k in kinds], np.int64).reshape(-1, 2)
        name, owner = columns[kind].T
        owner = np.where(owner < 0, ranks, owner)
        copies, firsts, copy = np.unique(name * len(held) + owner, return_index=True, return_inverse=True)
        (self.name, self.owner), self.kind = np.divmod(copies, len(held)), kind[firsts]
        # Pieces, with the copy that each belongs to.
        rows = join(parts)
        rows = rows._replace(tensor=copy[rows.tensor + (np.cumsum(counts) - counts)[rows.file]])
        order = (self.owner[rows.tensor], *box_columns(rows.box)[::-1], self.name[rows.tensor])
        self.rows = rows.take(np.lexsort(order))
        self.first_of_box = starts(self.name[self.rows.tensor], *box_columns(self.rows.box))

    def _compare(self, meshes: Sequence[Shape], ranks: Ints, kinds: Ints) -> None:
        """Compare what ranks have described. CheckpointException where they cannot mean the same tensor."""
        by_name = dict[str, list[Described]]()
        for kind in self.kinds:
            by_name.setdefault(kind.name, []).append(kind)
        self.names = sorted(by_name, key=lambda name: not name.startswith("model"))
        self.unequal, self.tied = set[str](), dict[str, str]()
        for name, same in by_name.items():
            on_rank = dict[int, Described]()
            for kind in same:
                for rank in meshes[kind.mesh]:
                    other = on_rank.setdefault(rank, kind)
                    if (other.mesh, *other[1:3]) != (kind.mesh, *kind[1:3]):
                        sides = (
                            f"{k.dtype}{list(k.shape)} on ranks {list(meshes[k.mesh])}" for k in (other, kind)
                        )
                        raise _disagreement(name, *sides)
            plain = [self.kinds.index(kind) for kind in same if on_rank and not kind.mesh]
            if plain:
                one = f"a plain tensor on rank(s) {st.some(ranks[np.isin(kinds, plain)].tolist())}"
                raise _disagreement(name, one, f"a DTensor on {sorted(on_rank)}")
            if len({kind[1:3] for kind in same}) > 1 or any(kind.per_rank for kind in same):
                self.unequal.add(name)
            ties = {kind.alias_of for kind in same} - {name}
            if len(ties) == 1 and "" not in ties:
                self.tied[name] = ties.pop()

    def replicas(self, verify: bool) -> tuple[Ints, Ints]:
        """The rows to checksum, by rank and piece; and 1 for those to checksum on their device.

        These are all replicas, or unless `verify` only those of values and of the optimizer's steps, which
        tell whether ranks are at the same step.
        """
        chosen = [
            kind.name not in self.tied
            and (verify or kind.dtype == "JSON" or bool(_STEP.fullmatch(kind.name)))
            for kind in self.kinds
        ]
        start = np.flatnonzero(self.first_of_box)
        count = np.diff(start, append=len(self.first_of_box))
        compared = (count > 1).repeat(count) & np.array(chosen, bool)[self.kind[self.rows.tensor]]
        on_device = np.minimum.reduceat(self.rows.length, start).repeat(count)
        order = np.lexsort((self.rows.begin, self.rows.file))
        order = order[compared[order]]
        return order, on_device[order]

    def keep_differing(self, compared: Ints, sums: npt.NDArray[np.uint64], warnings: list[str]) -> None:
        """Add to `unequal` the names whose copies have different boxes, or different bytes.

        `sums` are the checksums of the rows `compared`. Where replicas within a copy differ, the lowest
        rank's stays, with a warning.

        Two ranks have the same box of `w`, with checksums 5 and 7. If `w` is a plain tensor, these are two
        copies, and `w` is `unequal`. If it is a DTensor with Replicate(), they are one copy of one mesh:
        the row of rank 1 goes, with a warning.
        """
        name, found = self.name[self.rows.tensor], np.zeros(len(self.rows.tensor), np.uint64)
        found[compared] = sums
        first_of_copy = self.first_of_box | starts(self.rows.tensor)
        copies = np.bincount(np.cumsum(self.first_of_box) - 1, first_of_copy)  # that have a box
        # For each row: the checksum of the first row of its box, and of the first one of its copy there.
        of_box, of_copy = (
            found[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
            for first in (self.first_of_box, first_of_copy)
        )
        unlike = name[self.first_of_box][copies != np.bincount(self.name)[name[self.first_of_box]]]
        unequal = np.unique(np.append(unlike, name[of_box != of_copy])).tolist()
        self.unequal |= {self.names[index] for index in unequal} - self.tied.keys()
        self.unequal |= {tied for tied, origin in self.tied.items() if origin in self.unequal}
        differs = found != of_copy
        for index in np.unique(name[differs]).tolist():
            if step := _STEP.fullmatch(self.names[index]):
                self.steps.append({step[1]: math.nan})  # equal to none
            ranks = np.unique(self.rows.file[differs & (name == index)]).tolist()
            warnings.append(
                f"{self.names[index]}: copies that its placement declares equal differ: rank(s) "
                f"{st.some(ranks, 20)} from the lowest of their mesh, whose copy is kept"
            )
        self.rows = self.rows.take(~differs)

    def check_steps(self) -> None:
        """Check that ranks have the same optimizer step of each parameter that is not itself unequal."""
        first, differing = dict[str, float](), {m[1] for name in self.unequal if (m := _STEP.fullmatch(name))}
        for steps in self.steps:
            differing |= {name for name, step in steps.items() if first.setdefault(name, step) != step}
        # A parameter that several optimizers hold is named <optimizer>/<parameter>.
        wrong = sorted(
            p for p in differing if not {f"model/{p}", f"model/{p.partition('/')[2]}"} & self.unequal
        )
        if wrong:
            raise CheckpointException(
                f"ranks are at different optimizer steps of {st.some(wrong)}: has a rank skipped a step, or "
                "a save? Bring all ranks to one step, by loading the last checkpoint or restarting, first"
            )

    def tensors(self) -> tuple[list[TensorMetadata], Pieces]:
        """The tensors as the record names them, and all pieces of them, those of tied ones too."""
        unequal = np.array([name in self.unequal for name in self.names], bool)[self.name]
        first = unequal | starts(self.name)
        rows = self.rows._replace(tensor=(np.cumsum(first) - 1)[self.rows.tensor])
        lengths = np.zeros(len(self.name), np.int64)
        lengths[rows.tensor] = rows.box[:, 1, 0]
        found = []
        for copy, length in zip(np.flatnonzero(first).tolist(), lengths.tolist()):
            kind, owner = self.kinds[self.kind[copy]], int(self.owner[copy]) if unequal[copy] else None
            shape = (length,) if kind.dtype == "JSON" else kind.shape
            found.append(TensorMetadata(kind.name, kind.dtype, shape, owner))
        index = {(t.name, t.rank): number for number, t in enumerate(found)}
        return [t._replace(alias_of=index.get((self.tied.get(t.name, ""), t.rank))) for t in found], rows


def _disagreement(name: str, one: str, other: str) -> CheckpointException:
    what = "give it the same layout on all of them, or another name"
    message = f"{name}: ranks disagree: {one} against {other}; {what}"
    return CheckpointException(message, type=ExceptionType.VALIDATION_FAILED)


def check_complete(tensors: Sequence[TensorMetadata], rows: Pieces) -> None:
    """Every tensor's pieces must make up the whole of it, each element once; else VALIDATION_FAILED."""
    if wrong := st.not_covered_once(tensors, rows.tensor, rows.box):
        t, held = tensors[wrong[0]], int(rows.box[rows.tensor == wrong[0], 1].prod(axis=1).sum())
        raise CheckpointException(
            f"{t.name}: the ranks together hold {held} elements of its {math.prod(t.shape)}, with holes "
            f"or overlaps (and {len(wrong) - 1} more tensors so): save with all ranks of its mesh, and "
            "the same parallelism on each",
            type=ExceptionType.VALIDATION_FAILED,
        )


def share_out(rows: Pieces, itemsizes: Ints, world_size: int) -> Pieces:
    """Give every byte one writer, as `file` (I1): its only holder, or of replicas one of their holders.

    Replicas are cut into equal parts of at least `SPLIT_BYTES`, for the holders with the least to write.
    """
    start = np.flatnonzero(starts(rows.tensor, *box_columns(rows.box)))
    count, nbytes = np.diff(start, append=len(rows.tensor)), rows.nbytes(itemsizes)
    alone = start[count == 1]
    load = np.bincount(rows.file[alone], nbytes[alone], world_size)
    parts = [rows.take(alone)]
    for first, copies in zip(start[count > 1].tolist(), count[count > 1].tolist()):
        holders, size = rows.file[first : first + copies], rows.box[first, 1]
        dim = int(np.argmax(size >= min(8 * copies, size.max())))  # long enough for equal parts, or longest
        ways = max(1, min(copies, size[dim], nbytes[first] // SPLIT_BYTES))
        edges = size[dim] * np.arange(ways + 1) // ways
        part = rows.take(np.full(ways, first))
        part.file[:] = holders[np.argsort(load[holders], kind="stable")[:ways]]
        part.box[:, 0, dim] += edges[:-1]
        part.box[:, 1, dim] = np.diff(edges)
        load[part.file] += part.nbytes(itemsizes)
        parts.append(part)
    return join(parts)


def lay_out(
    holdings: Holdings, ticket: CheckpointMetadata, form: CheckpointFormat
) -> tuple[CheckpointMetadata, Pieces]:
    """The plan, the record without what only writers know; and who gives which boxes to a whole file.

    In the latter `file` is the rank, and `tensor` counts the tensors of the whole file.
    """
    tensors, rows = holdings.tensors()
    itemsizes = st.itemsizes(tensors)
    stored = np.array([t.alias_of is None for t in tensors], bool)[rows.tensor]
    files, whole = list[str](), list[int]()
    if form is CheckpointFormat.SINGLE_FILE:
        files, whole = [st.whole_file_name(ticket.save_id)], list(range(len(tensors)))
    elif form is CheckpointFormat.CONSOLIDATED:
        files, whole = [st.whole_file_name(ticket.save_id, "model")], sorted(st.in_model_file(tensors))
        for number in whole:  # a tied name gets a copy of its own, from ranks that hold both
            if (origin := tensors[number].alias_of) is not None:
                givers = rows.file[rows.tensor == origin]
                stored |= (rows.tensor == number) & np.isin(rows.file, givers)
                tensors[number] = tensors[number]._replace(alias_of=None)
    rows = share_out(rows.take(stored), itemsizes, ticket.world_size)
    check_complete(tensors, rows)
    rows = rows._replace(begin=rows.tensor * 0, length=rows.tensor * 0)
    inside = np.isin(rows.tensor, whole)
    sources, rows = rows.take(inside), rows.take(~inside)
    sources = sources._replace(tensor=np.unique(sources.tensor, return_inverse=True)[1])
    rows = rows._replace(file=rows.file + len(files))
    if form is not CheckpointFormat.SINGLE_FILE:
        numbers = range(ticket.world_size)
        files += [st.own_file_name(ticket.save_id, rank, ticket.world_size) for rank in numbers]
    if ticket.compression != "none":
        rows = cut_up(rows, itemsizes)
    filled = [n for n in whole if tensors[n].alias_of is None and 0 not in tensors[n].shape]
    boxes = stack_boxes([whole_box(tensors[n].shape) for n in filled], rows.box.shape[2])
    index = np.array(filled, np.int64)
    rows = join([Pieces(index, index * 0, index * 0, index * 0, boxes), rows])
    rows = place(rows, tensors, itemsizes)
    rows = rows.take(np.lexsort((*rows.box[:, 0].T[::-1], rows.tensor)))
    rows = rows._replace(box=rows.box[:, :, : max((len(t.shape) for t in tensors), default=0)])
    shards = [st.ShardMetadata(name, 0, 0, 0) for name in files]
    plan = dataclasses.replace(ticket, shards=tuple(shards), tensors=tuple(tensors), pieces=rows)
    if form is CheckpointFormat.MULTI_SHARD:
        return plan, sources
    data_bytes = int((rows.begin + rows.length)[rows.file == 0].max(initial=0))
    header = st.encode_header(plan.entries(0), data_bytes)
    shards[0] = shards[0]._replace(length=len(header) + data_bytes, header_bytes=len(header))
    return dataclasses.replace(plan, shards=tuple(shards)), sources


def place(rows: Pieces, tensors: Sequence[TensorMetadata], itemsizes: Ints) -> Pieces:
    """Lay the pieces of every file one behind the other: the model's first, then wide elements first.

    So every entry is aligned to its element size, since each of the two sections starts on 16 bytes.
    """
    section = np.array([not t.name.startswith("model") for t in tensors], np.int64)
    small, widths = rows.nbytes(itemsizes) < SMALL_BYTES, itemsizes[rows.tensor]
    order = (*rows.box[:, 0].T[::-1], rows.tensor, small, -widths, section[rows.tensor], rows.file)
    rows = rows.take(np.lexsort(order))
    nbytes, number = rows.nbytes(itemsizes), np.cumsum(starts(rows.file, section[rows.tensor])) - 1
    gaps = -np.bincount(number, nbytes).astype(np.int64) % 16  # behind each section
    begin = np.cumsum(nbytes) - nbytes + (np.cumsum(gaps) - gaps)[number]
    return rows._replace(begin=begin - begin[np.searchsorted(rows.file, rows.file)], length=nbytes)


def cut_up(rows: Pieces, itemsizes: Ints) -> Pieces:
    """Cut pieces of more than a block, between rows of their first dimension, then of the next."""
    for dim in range(rows.box.shape[2]):
        nbytes, size = rows.nbytes(itemsizes), rows.box[:, 1, dim]
        step = np.where(nbytes > st.BLOCK_BYTES, np.maximum(1, st.BLOCK_BYTES * size // nbytes), size)
        ways = -(-size // step)
        index = np.arange(len(ways)).repeat(ways)
        first = (np.arange(len(index)) - (np.cumsum(ways) - ways)[index]) * step[index]
        rows = rows.take(index)
        rows.box[:, 0, dim] += first
        rows.box[:, 1, dim] = np.minimum(step[index], size[index] - first)
    return rows


def pack_shares(plan: CheckpointMetadata) -> Iterator[str]:
    """What each rank needs of the plan, as JSON: the whole file, its own file, and the rows in them.

    At 4,096 ranks of 1,000 tensors each, the whole plan for every rank would be 6 GB.
    """
    files, order = plan.pieces.file, np.argsort(plan.pieces.file, kind="stable")
    ends = np.searchsorted(files[order], np.arange(len(plan.shards) + 1))
    whole = [0] if plan.shards[0].header_bytes else []
    tensors = [t._replace(alias_of=None) for t in plan.tensors]
    for rank in range(plan.world_size):
        own = [len(plan.shards) - plan.world_size + rank] if plan.format != "single_file" else []
        numbers = whole + own
        rows = plan.pieces.take(np.concatenate([order[ends[n] : ends[n + 1]] for n in numbers]))
        # Numbered as their rows come: those of the whole file first, as in `lay_out`'s sources.
        index = {tensor: number for number, tensor in enumerate(dict.fromkeys(rows.tensor.tolist()))}
        tensor = np.array([index[tensor] for tensor in rows.tensor.tolist()], np.int64)
        share = dataclasses.replace(
            plan,
            shards=tuple(plan.shards[n] for n in numbers),
            tensors=tuple(tensors[n] for n in index),
            pieces=rows._replace(tensor=tensor, file=np.searchsorted(numbers, rows.file)),
        )
        yield st.dump_json(st.encode_tables(share)).decode()


def unpack_share(text: str, ticket: CheckpointMetadata) -> CheckpointMetadata:
    """Inverse of `pack_shares`, for one rank."""
    share = json.loads(text)
    shards = tuple(st.ShardMetadata(name, size, header, 0) for name, size, header, _ in share["files"])
    tensors, pieces = st.decode_tensors(share["tensors"]), st.unpack_pieces(st.Fields(share["pieces"]))
    return dataclasses.replace(ticket, shards=shards, tensors=tensors, pieces=pieces)


# ----------------------------------------------------------------------------------------------------------
# S4: writing


class Progress(NamedTuple):
    """How far a call has come on this rank.

    `step` is "S4 write", "L4 read", "verify" or "export". At its end `bytes_done` equals `bytes_total`.
    """

    step: str
    bytes_done: int
    bytes_total: int


@dataclass
class Meter:
    """Counts the bytes of several threads. One thread reports them: `tick` is what `in_parallel` polls."""

    step: str = ""
    total: int = 0
    report: Callable[[Progress], None] | None = None
    poll: Callable[[], None] = lambda: None
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count bytes. Any thread may call it."""
        with self.lock:
            self.done += count

    def tick(self) -> None:
        """Report the progress. `poll` runs first, and may raise."""
        self.poll()
        if self.report is not None:
            try:
                self.report(Progress(self.step, self.done, self.total))
            except Exception as error:
                raise RuntimeError(f"progress raised {error!r}") from error


def checksums(views: Sequence[torch.Tensor], on_device: Sequence[int], meter: Meter) -> list[int]:
    """A checksum of the row-major bytes of each view: CRC32s of its blocks, or a sum made on its device."""
    sums: list[torch.Tensor | int] = [
        st.device_sum(view) if device else 0 for view, device in zip(views, on_device)
    ]
    crcs: dict[tuple[int, int], int] = {}

    def checksum(place: tuple[int, int], buffer: Bytes) -> None:
        index, start = place
        stop = min(start + st.BLOCK_BYTES, views[index].nbytes)
        if (flat := st.byte_view(views[index])) is None:
            st.copy_out(views[index], start, block := buffer[: stop - start])
        else:
            block = flat[start:stop]
        crcs[place] = st.crc32(block)

    places = [
        (index, start)
        for index, view in enumerate(views)
        for start in range(0, 0 if on_device[index] else view.nbytes, st.BLOCK_BYTES)
    ]
    st.in_parallel(places, checksum, meter.tick, len(places))
    for place in places:
        sums[place[0]] = st.crc32(np.array([int(sums[place[0]]), crcs[place]], np.uint32))
    return [int(total) % (1 << 64) for total in sums]


Views = Mapping[int, Sequence[tuple[Box, torch.Tensor]]]  # the boxes that a rank holds of each tensor

FEW = 8  # pieces of a block that is processed in steps, and of a tensor that is searched without numpy
MOST_OPEN = 16  # files of a checkpoint that stay open; a process may have 1,024, and a checkpoint more
STEP_UNITS = 4  # so many units at a time: of 1 MiB, a warm load ran at 6.2 GB/s, of 256 KiB at 4.2


def held_view(views: Views, tensor: int, box: Box) -> torch.Tensor:
    """Return the elements of a box. This rank holds this box or a larger one."""
    for held, view in views[tensor]:
        if held == box:
            return view
        if held.intersect(box) == box:
            return view[box.within(held)]
    raise AssertionError("planned to write what this rank does not hold")


def crcs_of(data: Bytes) -> list[int]:
    """Return the CRC32 of each unit."""
    return [st.crc32(data[at : at + st.UNIT_BYTES]) for at in range(0, len(data), st.UNIT_BYTES)]


def write_own_file(
    file: st.StoredFile,
    plan: CheckpointMetadata,
    index: int,
    views: Views,
    level: st.CompressionLevel,
    meter: Meter,
) -> tuple[tuple[str, int, int, int], Ints | None]:
    """Write this rank's own file, except for its sync.

    Returns its row of the record (name, length, header bytes, header CRC32), and of a compressed file the
    lengths of its frames.
    """
    rows = plan.pieces.take(plan.pieces.file == index)
    lengths = None if level is st.CompressionLevel.NONE else rows.nbytes(st.itemsizes(plan.tensors))

    def header_of(least_bytes: int = 0) -> tuple[bytes, int]:
        data_bytes = int((rows.begin + rows.length).max(initial=0))
        entries = dataclasses.replace(plan, pieces=rows).entries(index)
        return st.encode_header(entries, data_bytes, least_bytes), data_bytes

    if lengths is not None:  # the header with the raw lengths is the longest: reserve space for it
        rows = rows._replace(begin=np.cumsum(lengths) - lengths, length=lengths)
    rows = rows.take(np.argsort(rows.begin, kind="stable"))
    with no_garbage_collection():
        held = [held_view(views, tensor, box) for tensor, _, _, box in rows.boxes(plan.tensors)]
        header, data_bytes = header_of()
    if lengths is None:
        file.resize(len(header) + data_bytes)
        crcs = write_raw(file, len(header), rows.begin.tolist(), held, meter)
    else:
        crcs, lengths = write_packed(file, len(header), held, level, meter)
        rows = rows._replace(begin=np.cumsum(lengths) - lengths, length=lengths)
        header, data_bytes = header_of(len(header))
    header = st.with_crcs(header, crcs)
    file.write(0, memoryview(header))
    row = plan.shards[index].file, len(header) + data_bytes, len(header), st.crc32(header)
    return row, lengths


def write_raw(
    file: st.StoredFile, start: int, begins: list[int], views: Sequence[torch.Tensor], meter: Meter
) -> list[int]:
    """Write a file's data, which start at byte `start`, and return the CRC32 of each unit.

    The bytes of `views[n]` go to byte `begins[n]` of the data. `begins` is sorted.
    """
    with no_garbage_collection():
        ends, flats = [begin + v.nbytes for begin, v in zip(begins, views)], list(map(st.byte_view, views))
    data_bytes, crcs = max(ends, default=0), dict[int, list[int]]()

    def write_block(low: int, buffer: Bytes) -> None:
        data = buffer[: min(st.BLOCK_BYTES, data_bytes - low)]
        inside = range(bisect.bisect_right(ends, low), bisect.bisect_left(begins, low + len(data)))
        # A copy from a device, or of strided memory, takes as long for a unit as for a block: by units, six
        # threads copied 2.5 GB/s from an H100, not 21.
        in_steps = len(inside) <= FEW and all(flats[n] is not None for n in inside)
        crcs[low] = []
        for at in range(low, low + len(data), step := STEP_UNITS * st.UNIT_BYTES if in_steps else len(data)):
            part, filled = data[at - low :][:step], 0
            for n in inside:
                first, last = max(0, begins[n] - at), max(0, ends[n] - at)
                part[filled:first] = 0  # a gap between entries
                filled = last
                if (flat := flats[n]) is None:
                    st.copy_out(views[n], at + first - begins[n], part[first:last])
                else:
                    out = part[first:last]
                    out[:] = flat[at + first - begins[n] :][: len(out)]
            part[filled:] = 0
            crcs[low] += crcs_of(part)
        file.write(start + low, data.data)
        meter.add(len(data))

    blocks = range(0, data_bytes, st.BLOCK_BYTES)
    st.in_parallel(blocks, write_block, meter.tick, len(blocks))
    return [crc for low in blocks for crc in crcs[low]]


def write_packed(
    file: st.StoredFile,
    start: int,
    views: Sequence[torch.Tensor],
    level: st.CompressionLevel,
    meter: Meter,
) -> tuple[list[int], Ints]:
    """Write views compressed, each frame directly behind the one before it, from byte `start` of the file.

    Returns the CRC32 of each unit and the length of each frame. A few threads compress; each holds one frame
    until all frames before it are in line.
    """
    lengths, crcs, pending, written = list[int](), list[int](), bytearray(), threading.Condition()

    def write_frame(number: int, buffer: Bytes) -> None:
        view, frame = views[number], b""
        try:
            st.copy_out(view, 0, raw := buffer[: view.nbytes])
            frame = st.compress_frame(raw, view.dtype.itemsize, level)
            meter.add(len(raw))
        finally:  # After an error too: else the threads with later frames would wait forever.
            with written:
                written.wait_for(lambda: len(lengths) == number)
                written.notify_all()
                lengths.append(len(frame))
                pending.extend(frame)
                while len(pending) >= st.BLOCK_BYTES or (pending and len(lengths) == len(views)):
                    data = np.frombuffer(bytes(pending[: st.BLOCK_BYTES]), np.uint8)
                    file.write(start + len(crcs) * st.UNIT_BYTES, data.data)
                    crcs.extend(crcs_of(data))
                    del pending[: len(data)]

    st.in_parallel(range(len(views)), write_frame, meter.tick, len(views))
    return crcs, np.array(lengths, np.int64)


# A part of a whole file's block: the rank that gives it, how many bytes, tensor and box. Then where it goes:
# the box of the tensor whose row-major bytes lie in the block, and the byte of the block where they begin.
Segment = tuple[int, int, int, Box, Box, int]
Part = tuple[torch.Tensor, Box, Box, int]  # the elements of a segment, and its last three fields


class WholeFile:
    """A file of whole tensors, the plan's first, that ranks write together.

    Each block is written by the rank that gives most of it. Every rank computes the same schedule. A rank
    receives the parts of its blocks that other ranks hold, a few blocks of every rank a round. So the extra
    memory is a few blocks a rank, whatever the size of the model: two-phase I/O (del Rosario, Bordawekar and
    Choudhary, 1993).
    """

    def __init__(self, op: Operation, plan: CheckpointMetadata, sources: Pieces, views: Views) -> None:
        self._op, self._views = op, views
        shard, rows = plan.shards[0], plan.pieces.take(plan.pieces.file == 0)
        self._start, self._data_bytes = shard.header_bytes, shard.length - shard.header_bytes
        self._dtypes = [st.DTYPES[t.dtype] for t in plan.tensors]
        self._rows = sorted((begin, begin + n, t, box) for t, begin, n, box in rows.boxes(plan.tensors))
        self._givers: dict[int, list[tuple[Box, int]]] = {}
        for rank, (tensor, _, _, box) in zip(sources.file.tolist(), sources.boxes(plan.tensors)):
            self._givers.setdefault(tensor, []).append((box, rank))
        self._owned: list[list[int]] = [[] for _ in range(op.world_size)]  # first byte of each rank's blocks
        for low in range(0, self._data_bytes, st.BLOCK_BYTES):
            given = [0] * op.world_size
            for rank, nbytes, *_ in self._segments(low):
                given[rank] += nbytes
            owner = min(range(op.world_size), key=lambda rank: (-given[rank], len(self._owned[rank])))
            self._owned[owner].append(low)
        # Bytes that this rank writes.
        self.nbytes = sum(min(st.BLOCK_BYTES, self._data_bytes - low) for low in self._owned[op.rank])

    def _segments(self, low: int) -> Iterator[Segment]:
        """Yield the parts of the block that begins at byte `low` of the data."""
        high = low + st.BLOCK_BYTES
        first = bisect.bisect_right(self._rows, low, key=lambda row: row[1])
        for number in range(first, len(self._rows)):
            begin, end, tensor, piece = self._rows[number]
            if begin >= high:
                return
            width = self._dtypes[tensor].itemsize
            start, stop = (max(low, begin) - begin) // width, (min(high, end) - begin) // width
            for at, inside in st.row_boxes(piece.size, start, stop):
                for box, rank in self._givers[tensor]:
                    if (common := box.intersect(inside)) is not None:
                        nbytes = math.prod(common.size) * width
                        yield rank, nbytes, tensor, common, inside, begin + at * width - low

    def write(self, file: st.StoredFile, meter: Meter) -> dict[str, list[int]]:
        """Exchange and write this rank's blocks. Collective.

        Returns the CRC32s of the units of each block, by the block's number. The blocks of a round are
        written while the parts of the next round are exchanged.
        """
        crcs: dict[str, list[int]] = {}

        def write_block(block: tuple[int, list[Part]], buffer: Bytes) -> None:
            low, parts = block
            data = buffer[: min(st.BLOCK_BYTES, self._data_bytes - low)]
            data[:] = 0  # gaps between entries
            for elements, box, inside, at in parts:
                area = torch.frombuffer(data, dtype=elements.dtype, count=math.prod(inside.size), offset=at)
                area.view(inside.size)[box.within(inside)].copy_(elements)
            crcs[str(low // st.BLOCK_BYTES)] = crcs_of(data)
            file.write(self._start + low, data.data)
            meter.add(len(data))

        writing = in_thread(lambda: None)
        try:
            for first in range(0, max(map(len, self._owned)), ROUND_BLOCKS):
                blocks = self._exchange([owned[first : first + ROUND_BLOCKS] for owned in self._owned])
                finish(writing, meter.tick)
                writing = in_thread(functools.partial(st.in_parallel, blocks, write_block, most=2))
            finish(writing, meter.tick)
        finally:
            wait([writing], st.STUCK_S)
        return crcs

    def _exchange(self, owned: Sequence[Sequence[int]]) -> list[tuple[int, list[Part]]]:
        """Exchange parts for some blocks of each rank; return the blocks of this rank, with their parts."""
        own, outgoing = self._op.rank, dict[int, list[Bytes]]()
        for owner, blocks in enumerate(owned):
            for low in blocks if owner != own else ():
                for rank, nbytes, tensor, box, *_ in self._segments(low):
                    if rank == own:
                        outgoing.setdefault(owner, []).append(data := np.empty(nbytes, np.uint8))
                        st.copy_out(held_view(self._views, tensor, box), 0, data)
        received = self._op.exchange({owner: np.concatenate(parts) for owner, parts in outgoing.items()})
        found = list[tuple[int, list[Part]]]()
        for low in owned[own]:
            parts = list[Part]()
            for rank, nbytes, tensor, box, inside, at in self._segments(low):
                if rank == own:
                    elements = held_view(self._views, tensor, box)
                else:
                    data, received[rank] = np.split(received[rank], [nbytes])
                    # A copy, since its memory is aligned: torch kills the process for complex128 that is not.
                    elements = torch.from_numpy(data.copy()).view(self._dtypes[tensor]).view(box.size)
                parts.append((elements, box, inside, at))
            found.append((low, parts))
        return found


def finish(work: Future[None], poll: Callable[[], None]) -> None:
    """Wait for `work`, and raise what it raised. `poll` runs meanwhile, and may raise."""
    while not wait([work], 0.05).done:
        poll()
    work.result()


# ----------------------------------------------------------------------------------------------------------
# Loading: L3 match and L4 read


class Target(NamedTuple):
    """Where stored elements go: a box of the stored tensor number `tensor` into `view`, of the same size."""

    tensor: int
    box: Box
    view: torch.Tensor
    exclusive: bool = False  # no other rank needs these bytes


class Fill(NamedTuple):
    """Bytes [low, high) of a file's data that a target needs. They are bytes of one piece."""

    file: int
    low: int
    high: int
    begin: int  # of the piece in the file's data
    piece: Box
    dtype: torch.dtype
    frame_bytes: int  # the length of a compressed piece when expanded; 0 for a raw one
    target: Target
    flat: Bytes | None  # where they go in the target's memory, if in one run and not cast
    exclusive: float  # how much of these bytes this rank needs and no other: from 0 to 1


class Read(NamedTuple):
    """Units [low, high) of a file's data, at most two blocks, and the fills in them, in order."""

    file: int
    low: int
    high: int
    fills: list[Fill]

    @property
    def nbytes(self) -> int:
        return self.high - self.low

    def is_exclusive(self) -> bool:
        """Whether at least three quarters of these bytes are for this rank alone."""
        return 4 * sum(fill.exclusive * (fill.high - fill.low) for fill in self.fills) >= 3 * self.nbytes


class Superseded(CheckpointException):
    """The checkpoint was replaced while it was read. Another try reads the new one."""


class CheckpointReader:
    """Verified reads of one committed checkpoint: every byte that it returns has passed its unit's CRC32.

    CORRUPTED_CHECKPOINT for damage; `Superseded` if a save replaces the checkpoint meanwhile.
    """

    def __init__(self, storage: st.CheckpointStorage, metadata: CheckpointMetadata) -> None:
        self.storage, self.metadata = storage, metadata
        self._crcs: dict[int, list[int]] = {}
        self._values: dict[int, torch.Tensor] = {}  # read ahead
        self._files: dict[int, st.StoredFile] = {}
        self._users = Counter[int]()  # how many threads use each file
        self._lock = threading.Lock()
        self.meter = Meter()  # of long checks
        self._rows = np.searchsorted(metadata.pieces.tensor, np.arange(len(metadata.tensors) + 1)).tolist()
        # The index of each tensor, by its name and the rank that it is kept for. None: for all ranks.
        self.stored: dict[str, dict[int | None, int]] = {}
        for index, t in enumerate(metadata.tensors):
            self.stored.setdefault(t.name, {})[t.rank] = index

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # all that was read is verified
                file.close()

    def find(self, name: str, rank: int) -> int | None:
        """Return the index of the tensor that `rank` gets by this name, or None if nothing is stored.

        That is the tensor of all ranks, else the rank's own, else the lowest rank's.
        """
        if not (kept := self.stored.get(name)):
            return None
        if (index := kept.get(None, kept.get(rank))) is None:
            index = kept[self.ranks(name)[0]]
        alias = self.metadata.tensors[index].alias_of
        return index if alias is None else alias

    def ranks(self, name: str) -> list[int]:
        """Return the ranks that have their own tensor of this name, sorted."""
        return sorted(rank for rank in self.stored.get(name, {}) if rank is not None)

    def is_superseded(self) -> bool:
        """Return whether the checkpoint was overwritten or deleted since its record was read."""
        head = st.record_head(self.storage, self.metadata.prefix)
        return head is None or head.save_id != self.metadata.save_id

    @contextmanager
    def file(self, index: int) -> Iterator[st.StoredFile]:
        """Lend an open tensor file. Of those that nobody uses, the last ones used stay open."""
        with self._lock:
            idle = [other for other in self._files if other != index and not self._users[other]]
            for other in idle[: max(0, len(self._files) - MOST_OPEN)]:
                self._files.pop(other).close()
            self._files[index] = file = self._files.pop(index, None) or self._open(index)
            self._users[index] += 1
        try:
            yield file
        finally:
            with self._lock:
                self._users[index] -= 1

    def _open(self, index: int) -> st.StoredFile:
        path = self.metadata.shard_path(index)
        try:
            return self.storage.open(path)
        except FileNotFoundError as error:
            if self.is_superseded():
                raise Superseded(f"{path}: replaced by a newer save while it was read") from error
            raise st.corrupted(f"{path}: is missing", path) from error

    def unit_crcs(self, index: int) -> list[int]:
        """Return the CRC32 of each unit of a file, from its header. CORRUPTED_CHECKPOINT if it is damaged."""
        if index not in self._crcs:
            info = self.metadata.shards[index]
            with st.well_formed(self.metadata.shard_path(index)), self.file(index) as file:
                length = file.length()
                st.require(length == info.length, f"{length} bytes, the record says {info.length}")
                file.read(0, memoryview(header := bytearray(info.header_bytes)))
                crc, expected = st.crc32(header), info.header_crc
                st.require(crc == expected, f"header has CRC32 {crc:08x}, the record says {expected:08x}")
                self._crcs[index] = st.unit_crcs(bytes(header), info.length - info.header_bytes)
        return self._crcs[index]

    def check_header(self, index: int) -> None:
        """Check that a file's header says what the record says; CORRUPTED_CHECKPOINT if not."""
        info, crcs = self.metadata.shards[index], self.unit_crcs(index)
        with st.well_formed(self.metadata.shard_path(index)):
            entries, data_bytes = self.metadata.entries(index), info.length - info.header_bytes
            expected = st.with_crcs(st.encode_header(entries, data_bytes, info.header_bytes), crcs)
            # The header itself has this CRC32, as `unit_crcs` has checked.
            same = st.crc32(expected) == info.header_crc
            st.require(same, "its header describes other entries than the record")

    def pieces_of_file(self, index: int) -> list[int]:
        """Return the rows of the record that lie in a file."""
        return np.flatnonzero(self.metadata.pieces.file == index).tolist()

    def read_piece(self, row: int) -> torch.Tensor:
        """Return the elements of one piece, verified."""
        ((tensor, _, _, box),) = self.metadata.pieces.take(slice(row, row + 1)).boxes(self.metadata.tensors)
        return self.read(tensor, box)

    def read_values(self, tensors: Iterable[int]) -> None:
        """Read ahead, all at once, what `read_value` will return: hundreds of values lie in one unit."""
        found = {index: self._empty(index) for index in tensors}
        self.fill(found.values())
        self._values |= {index: target.view for index, target in found.items()}

    def read_value(self, tensor: int) -> object:
        """Return a stored JSON value, still encoded."""
        meta = self.metadata.tensors[tensor]
        if (view := self._values.pop(tensor, None)) is None:
            view = self.read(tensor)
        return st.parse_json(view.numpy().tobytes(), meta.name)

    def read(self, tensor: int, box: Box | None = None) -> torch.Tensor:
        """Return the elements of a box of a tensor; default: of the whole tensor."""
        self.fill([target := self._empty(tensor, box)])
        return target.view

    def _empty(self, tensor: int, box: Box | None = None) -> Target:
        """Return a target with memory of its own."""
        meta = self.metadata.tensors[tensor]
        box = whole_box(meta.shape) if box is None else box
        return Target(tensor, box, torch.empty(box.size, dtype=st.DTYPES[meta.dtype], device="cpu"))

    def _fills(self, target: Target) -> Iterator[Fill]:
        """Yield what a target needs of each piece. Aligned raw pieces are cut where blocks end."""
        tensors, want = self.metadata.tensors, target.box
        dtype = st.DTYPES[tensors[target.tensor].dtype]
        width = dtype.itemsize
        rows = self.metadata.pieces.take(slice(*self._rows[target.tensor : target.tensor + 2]))
        if len(rows.file) > FEW:  # a tensor may have thousands
            box = rows.box[:, :, : len(want.size)]
            near = (box[:, 0] < np.add(*want)) & (box.sum(axis=1) > np.array(want.offset))
            rows = rows.take(near.all(axis=1))
        for file, (_, begin, length, piece) in zip(rows.file.tolist(), rows.boxes(tensors)):
            if (common := want if piece == want else piece.intersect(want)) is None:
                continue
            raw_bytes, nbytes = math.prod(piece.size) * width, math.prod(common.size) * width
            (first, last), (into, until) = common.span(piece), common.span(want)
            low, high, frame_bytes = begin + first * width, begin + last * width, 0
            cuts = range((low // st.BLOCK_BYTES + 1) * st.BLOCK_BYTES, high, st.BLOCK_BYTES)
            if length < raw_bytes:
                low, high, frame_bytes, cuts = begin, begin + length, raw_bytes, range(0)
            elif begin % width:  # raw, behind frames: a cut would part an element
                cuts = range(0)
            exclusive = target.exclusive * nbytes / (frame_bytes or high - low)
            # What is one run of bytes in the piece and in the target is copied as it is.
            in_one_run = nbytes == (frame_bytes or high - low) == (until - into) * width
            memory = st.byte_view(target.view) if in_one_run and target.view.dtype == dtype else None
            for start, stop in itertools.pairwise([low, *cuts, high]):
                flat = memory[into * width + start - low :] if memory is not None else None
                yield Fill(file, start, stop, begin, piece, dtype, frame_bytes, target, flat, exclusive)

    def plan(self, targets: Iterable[Target]) -> list[Read]:
        """L3: return which units to read, and what each is for. In the order of the files and their bytes.

        A read begins and ends in one block; only a piece of a compressed file may reach into the next one.
        """
        reads, fills = list[Read](), [fill for target in targets for fill in self._fills(target)]
        for fill in sorted(fills, key=operator.itemgetter(0, 1, 2)):
            info = self.metadata.shards[fill.file]
            low = fill.low // st.UNIT_BYTES * st.UNIT_BYTES
            high = min(st.unit_count(fill.high) * st.UNIT_BYTES, info.length - info.header_bytes)
            last = reads[-1] if reads else Read(-1, 0, 0, [])
            block = low // st.BLOCK_BYTES * st.BLOCK_BYTES
            if last.file == fill.file and block <= last.low and low <= last.high:
                reads[-1] = last._replace(high=max(high, last.high))
                last.fills.append(fill)
            else:
                reads.append(Read(fill.file, low, high, [fill]))
        return reads

    def fill(self, targets: Iterable[Target], buffer: Bytes | None = None) -> None:
        """Read into targets at once, in this thread. `buffer`: at least two blocks."""
        buffer = np.empty(2 * st.BLOCK_BYTES, np.uint8) if buffer is None else buffer
        for read in self.plan(targets):
            self.run(read, buffer, st.Gate(), Meter())

    def run(self, read: Read, buffer: Bytes, gate: st.Gate, meter: Meter) -> None:
        """L4 for some units: read, verify and copy them.

        Optimisation (skip on first reading): bytes that only this rank needs, and that the page cache lacks,
        are read without the cache. Of bytes in the page cache a few units are read, verified and copied at a
        time, so that they are still in the processor's cache. That does not pay off for small pieces, nor for
        bytes that are expanded, cast, scattered or sent to a device.
        """
        start, step = self.metadata.shards[read.file].header_bytes, read.nbytes
        with self.file(read.file) as file:
            fetch = file.read
            if (
                isinstance(file, st.LocalFile)
                and read.is_exclusive()
                and file.is_cold(start + read.low, step)
            ):
                fetch = file.read_directly
            elif len(read.fills) <= FEW and all(f.flat is not None and not f.frame_bytes for f in read.fills):
                step = STEP_UNITS * st.UNIT_BYTES
            for low in range(read.low, read.high, step):
                data = buffer[: min(read.high - low, step)]
                fetch(start + low, data.data)
                self.place(read, low, data, gate)
        meter.add(read.nbytes)

    def place(self, read: Read, low: int, data: Bytes, gate: st.Gate) -> None:
        """Verify units, which begin at byte `low` of the file's data. Then copy them to the targets.

        CORRUPTED_CHECKPOINT if one is damaged; then nothing of `data` is copied.
        """
        if problems := self.damage(read.file, low, data):
            raise st.corrupted(problems[0], self.metadata.shard_path(read.file))
        with gate:
            for fill in read.fills:
                first, last = max(0, fill.low - low), fill.high - low
                if last <= 0 or first >= len(data):
                    continue
                part, at = data[first:last], low + first - fill.low
                if fill.frame_bytes:
                    part, at = st.expand_frame(part.tobytes(), fill.frame_bytes, fill.dtype.itemsize), 0
                if fill.flat is None:
                    at += fill.low - fill.begin
                    st.copy_in(part, at, fill.dtype, fill.piece, fill.target.box, fill.target.view)
                else:
                    fill.flat[at : at + len(part)] = part

    def check_block(self, index: int, low: int, buffer: Bytes) -> list[str]:
        """Read the block that begins at byte `low` of a file's data. Return what is wrong with each unit."""
        info = self.metadata.shards[index]
        data = buffer[: min(st.BLOCK_BYTES, info.length - info.header_bytes - low)]
        with self.file(index) as file:
            fetch = file.read_directly if isinstance(file, st.LocalFile) else file.read
            fetch(info.header_bytes + low, data.data)
        return self.damage(index, low, data)

    def damage(self, index: int, low: int, data: Bytes) -> list[str]:
        """Return what is wrong with units of a file, which begin at byte `low` of its data."""
        expected, found, meta = self.unit_crcs(index), list[str](), self.metadata
        for unit, crc in enumerate(crcs_of(data), low // st.UNIT_BYTES):
            if crc != expected[unit]:
                begin, rows = unit * st.UNIT_BYTES, meta.pieces.take(meta.pieces.file == index)
                inside = (rows.begin < begin + st.UNIT_BYTES) & (rows.begin + rows.length > begin)
                names = [meta.tensors[tensor].name for tensor in np.unique(rows.tensor[inside]).tolist()]
                what = f"unit {unit} has CRC32 {crc:08x}, expected {expected[unit]:08x}"
                found.append(f"{meta.shard_path(index)}: {what}; it holds {st.some(names)}")
        return found


def read_once(op: Operation, reader: CheckpointReader, reads: Sequence[Read], meter: Meter) -> None:
    """L4 where each unit is read by one of the ranks that need it, and sent to the others. Collective.

    The reads of all ranks are cut where another read begins or ends. The ranks that need a part read it in
    rotation. A round moves a few blocks, each to all ranks that need it; for each of them the sender has two
    copies.
    """
    spans = np.array([read[:3] for read in reads], np.int64).reshape(-1, 3).T
    wanted = [list(unpack_columns(packed)) for packed in op.gather(pack_columns(*spans))]
    cuts = sorted({cut for file, *ends in wanted for end in ends for cut in zip(file.tolist(), end.tolist())})
    stops = {cut: stop for cut, (_, stop) in itertools.pairwise(cuts)}

    def parts_of(file: int, low: int, high: int) -> list[tuple[int, int]]:
        return cuts[bisect.bisect_left(cuts, (file, low)) : bisect.bisect_left(cuts, (file, high))]

    ranks: dict[tuple[int, int], list[int]] = {}  # the ranks that need the part that begins at (file, byte)
    for rank, columns in enumerate(wanted):
        for part in sorted({p for span in np.stack(columns, axis=1).tolist() for p in parts_of(*span)}):
            ranks.setdefault(part, []).append(rank)
    order, found, placed = sorted(ranks), dict[tuple[int, int], Bytes](), 0

    def fetch(part: tuple[int, int], buffer: Bytes) -> None:
        (index, low), data = part, np.empty(stops[part] - part[1], np.uint8)
        with reader.file(index) as file:
            file.read(reader.metadata.shards[index].header_bytes + low, data.data)
        found[part] = data

    ends = np.cumsum([stops[part] - part[1] for part in order])
    rounds = np.searchsorted(ends, np.arange(0, ends[-1] if order else 0, 2 * ROUND_BLOCKS * st.BLOCK_BYTES))
    for first, last in itertools.pairwise([*rounds.tolist(), len(order)]):
        batch = {part: ranks[part][n % len(ranks[part])] for n, part in enumerate(order[first:last], first)}
        own = [part for part, sender in batch.items() if sender == op.rank]
        st.in_parallel(own, fetch, op.poll)
        outgoing: dict[int, list[Bytes]] = {}
        for part in own:
            for rank in ranks[part]:
                if rank != op.rank:
                    outgoing.setdefault(rank, []).append(found[part])
        received = op.exchange({rank: np.concatenate(parts) for rank, parts in outgoing.items()})
        for part, sender in batch.items():
            if sender != op.rank and op.rank in ranks[part]:
                found[part], received[sender] = np.split(received[sender], [stops[part] - part[1]])
        while placed < len(reads) and (parts := parts_of(*reads[placed][:3]))[-1] in found:
            read = reads[placed]
            data = np.concatenate([found[part] for part in parts])
            reader.place(read, read.low, data, st.Gate())
            meter.add(read.nbytes)
            placed += 1
        # Later reads begin at or behind this one.
        rest = (reads[placed].file, reads[placed].low) if placed < len(reads) else (math.inf, 0)
        for part in [part for part in found if part < rest]:
            del found[part]
        meter.tick()
