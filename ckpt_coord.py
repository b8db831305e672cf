"""Ranks: who writes and reads which bytes, and how all of them agree that it happened.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file does not import ckpt)

One idea carries everything: **a checkpoint is a table of pieces**, (tensor, file, begin, length, box). Rank
0 makes the table in S3, every rank writes its rows in S4, the lengths are filled in in S5, and the table is
sealed and renamed in S6: the plan has become the record. A load receives the same table and inverts it.

Words: see the head of ckpt_storage.py (tensor, box, piece, unit, block, record, fence), and

    rank, world size   of the processes that save or load together
    replica            a copy of a piece that another rank holds too
    mesh               the ranks among which a DTensor is distributed; its placements say how
    gather             every rank gives a value, and gets the values of all

The save protocol (`CheckpointCoordinator.coordinate_save`). The checkpoint exists from the rename in S6 on:

    step        | who    | what                                                            | a crash leaves
    S1 agree    | all    | same prefix and options on every rank; rank 0 draws the save id | nothing
    S2 collect  | each   | state dicts -> the pieces that this rank holds                  | nothing
    S3 plan     | all    | replicas are compared; rank 0 makes fence and table              | fence and files
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
import random
import re
import secrets
import sys
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

if TYPE_CHECKING or __package__:
    from . import ckpt_storage as st
    from .ckpt_storage import (
        Box,
        Bytes,
        CheckpointException,
        CheckpointMetadata,
        ExceptionType,
        Fields,
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
        Fields,
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

GRACE_S = 1.0  # past a deadline, for the living to say that they are: so that only missing ranks are named
STORE_BYTES = 4 << 20  # the most in one value: over twice that, a TCPStore drops the connection
SPLIT_BYTES = 1 << 20  # replicas are shared out in parts of at least this
SMALL_BYTES = 64 << 10  # smaller pieces lie together: every rank wants some, and would read a unit for each
ROUND_BLOCKS = 4  # of each rank, in a round of exchanges
T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------
# The save protocol


class CheckpointFormat(enum.Enum):
    """How tensors are spread over files."""

    SINGLE_FILE = "single_file"
    MULTI_SHARD = "multi_shard"
    CONSOLIDATED = "consolidated"


@dataclass(frozen=True)
class SaveRequest:
    """What all ranks must ask for alike; `prefix` None lets rank 0 make one up from the time."""

    prefix: str | None
    format: CheckpointFormat
    compression: st.CompressionLevel
    overwrite: bool
    verify_replicas: bool
    contents: tuple[str, ...]  # which arguments were given
    custom_metadata: Mapping[str, object]

    def claim(self) -> dict[str, object]:
        """As a value to compare between ranks."""
        plain = {
            "format": self.format.value,
            "compression": self.compression.value,
            "contents": list(self.contents),
        }
        return {"verb": "save", **vars(self), **plain, "custom_metadata": dict(self.custom_metadata)}


def demand_equal(claims: Sequence[object]) -> None:
    """ValueError that names the first difference between what the ranks ask for."""
    first = claims[0]
    for rank, claim in enumerate(claims):
        if claim != first and isinstance(claim, dict) and isinstance(first, dict):
            key = next((k for k in [*first, *claim] if first.get(k) != claim.get(k)), "?")
            raise ValueError(
                f"ranks disagree about {key}: rank 0 has {first.get(key)!r}, "
                f"rank {rank} has {claim.get(key)!r}"
            )


class SaveResult(NamedTuple):
    """A committed save."""

    prefix: str
    warnings: list[str]
    bytes_written: int  # by this rank
    size_bytes: int  # of the whole checkpoint; 0 on other ranks than 0


class CheckpointCoordinator:
    """Runs S1 to S7 on one rank.

    `keep_last`: how many checkpoints stay; `retain`: which ones, of those that it is given, oldest first.
    `warned`: sets of names that a warning has said to be kept per rank.
    """

    def __init__(
        self,
        coordinator: DistributedCoordinator,
        storage: st.CheckpointStorage,
        keep_last: int | None = None,
        retain: Callable[[Sequence[CheckpointMetadata]], Iterable[str]] | None = None,
        warned: set[tuple[str, ...]] | None = None,
    ) -> None:
        self.coordinator, self.storage, self.keep_last, self.retain = coordinator, storage, keep_last, retain
        self.warned = set() if warned is None else warned
        self.warnings: list[str] = []  # of the save under way
        self.bytes_written = 0

    def coordinate_save(
        self, op: Operation, request: Callable[[], SaveRequest], collect: Callable[[], ShardData]
    ) -> SaveResult:
        """Save what `collect` returns on every rank. Collective; blocks until committed and announced.

        `OperationFailed` on all ranks if nothing was committed, with this save's files removed again. Once S6
        has renamed the record, the save has succeeded, whatever happens to a rank: what goes wrong then is a
        warning.
        """
        self.warnings, ticket, asked = [], None, None
        try:
            asked, ticket = self.agree(op, request)  # S1
            data = self.collect(op, collect)  # S2
            plan, sources = self.plan(op, asked, ticket, data)  # S3
            written = self.write(op, asked, plan, sources, data)  # S4
            record = self.report(op, plan, written)  # S5
            superseded = self.commit(op, asked, record)  # S6
            self.announce(op, record, superseded)  # S7
            return SaveResult(record.prefix, self.warnings, self.bytes_written, record.size_bytes())
        except BaseException as error:
            if ticket is None or not self._settle(op, ticket) or not isinstance(error, Exception):
                raise
            self.warnings.append(f"committed, but not every rank may know: {error}")
            return SaveResult(ticket.prefix, self.warnings, self.bytes_written, 0)

    # S1
    def agree(
        self, op: Operation, request: Callable[[], SaveRequest]
    ) -> tuple[SaveRequest, CheckpointMetadata]:
        with op.step("S1 agree"):
            asked = request()
            drawn = self._draw(op, asked) if op.rank == 0 else None
            rows = list(map(Fields, op.gather({"claim": asked.claim(), "ticket": drawn})))
            demand_equal([row.all["claim"] for row in rows])
            prefix, save_id, sequence, timestamp = rows[0].array("ticket")
            return asked, CheckpointMetadata(
                prefix=str(prefix),
                save_id=str(save_id),
                sequence=int(str(sequence)),
                world_size=op.world_size,
                format=asked.format.value,
                compression=asked.compression.value,
                torch_version=torch.__version__,
                timestamp=str(timestamp),
                custom_metadata=asked.custom_metadata,
                shards=(),
                tensors=(),
                pieces=NO_PIECES,
            )

    def _draw(self, op: Operation, asked: SaveRequest) -> list[object]:
        """Prefix, save id, sequence number and time of a save."""
        prefix, now, sequence = asked.prefix, datetime.datetime.now(datetime.timezone.utc), 0
        taken = st.recorded_prefixes(self.storage, self.warnings.append)
        for other in taken:
            with nullcontext() if other == prefix else st.skipping(other, self.warnings.append):
                # An unreadable record may have this number or a higher one: readable again, it may count as
                # newer.
                head = st.record_head(self.storage, other)
                sequence = max(sequence, head.sequence if head else 0)
        if prefix is None:
            name = now.strftime("checkpoint_%Y%m%d_%H%M%S")
            names = [name, *(f"{name}_{count}" for count in range(1, len(taken) + 2))]
            prefix = next(name for name in names if name not in taken)
        elif prefix in taken and not asked.overwrite:
            raise CheckpointException(f"checkpoint {prefix!r} exists, and overwrite=False", prefix)
        return [prefix, secrets.token_hex(4), sequence + 1, now.isoformat()]

    # S2
    def collect(self, op: Operation, collect: Callable[[], ShardData]) -> ShardData:
        with op.step("S2 collect"):
            data = collect()
            tensors = [t._replace(mesh=op.own_ranks(t.mesh)) for t in data.tensors]
            # A rank outside of a DTensor's mesh has nothing to tell of it.
            return data._replace(tensors=mark_tied([t for t in tensors if not t.mesh or op.rank in t.mesh]))

    # S3
    def plan(
        self, op: Operation, asked: SaveRequest, ticket: CheckpointMetadata, data: ShardData
    ) -> tuple[CheckpointMetadata, Pieces]:
        """The table, on other ranks than 0 with the rows that they need.

        And who gives which boxes to whole files.
        """
        with op.step("S3 plan"):
            holdings = gather_holdings(op, data)
            self._compare_replicas(op, asked, data, holdings)
            if not holdings:
                return unpack_plan(op.broadcast(None), ticket, op.rank)
            plan, sources = lay_out(holdings, ticket, asked.format)
            self.storage.create(st.fence_name(plan.prefix, plan.save_id)).close()
            for index, shard in enumerate(plan.shards):
                if shard.header_bytes:
                    with closing(self.storage.create(plan.shard_path(index))) as file:
                        file.resize(shard.length)
                    if asked.compression is not st.CompressionLevel.NONE:
                        self.warnings.append(
                            f"{shard.file} is not compressed: other readers could not read it"
                        )
            op.broadcast(pack_plan(plan, sources))
            return plan, sources

    def _compare_replicas(
        self, op: Operation, asked: SaveRequest, data: ShardData, holdings: Holdings | None
    ) -> None:
        """Compare what several ranks hold by checksums. Copies that differ are then kept per rank or mesh."""
        requests = list[object]()
        if holdings:
            compared, on_device = holdings.replicas(asked.verify_replicas)
            rows = holdings.rows.take(compared)
            ends = np.searchsorted(rows.file, np.arange(1, op.world_size))
            requests += [
                pack_columns(*part) for part in np.split(np.stack((rows.begin, on_device)), ends, axis=1)
            ]
        numbers, devices = unpack_columns(as_list(op.broadcast(requests))[op.rank])
        views = [view for t in data.tensors for _, view in t.pieces]
        sums = checksums([views[n] for n in numbers.tolist()], devices.tolist(), Meter(poll=op.poll))
        answers = op.gather_at_0(sums)
        if holdings:
            found = itertools.chain.from_iterable(map(as_list, answers))
            holdings.keep_differing(compared, np.fromiter(found, np.uint64, len(compared)), self.warnings)
            holdings.check_steps()

    # S4
    def write(
        self, op: Operation, asked: SaveRequest, plan: CheckpointMetadata, sources: Pieces, data: ShardData
    ) -> list[object]:
        """What rank 0 has to know of the files that this rank has written: of its own, and of whole ones."""
        with op.step("S4 write"):
            views = views_by_index(op, plan, data)
            whole = [index for index, shard in enumerate(plan.shards) if shard.header_bytes]
            own = len(plan.shards) - op.world_size + op.rank if len(plan.shards) > len(whole) else None
            writers = [WholeFile(op, plan, index, sources, views) for index in whole]
            total = sum(writer.nbytes for writer in writers)
            rows = plan.pieces.take(plan.pieces.file == own) if own is not None else NO_PIECES
            if len(rows.file):
                packed = asked.compression is not st.CompressionLevel.NONE
                sizes = rows.nbytes(plan.itemsizes()) if packed else rows.begin + rows.length
                total += int(sizes.sum() if packed else sizes.max())  # with the gaps between entries
            meter = op.meter(total)
            crcs = []
            for writer in writers:
                with closing(self.storage.open(plan.shard_path(writer.index), write=True)) as file:
                    crcs.append(writer.write(file, meter))
                    file.sync()  # I2
            report: list[object] = [crcs]
            if own is not None:
                with closing(self.storage.create(plan.shard_path(own))) as file:
                    report += write_own_file(file, plan, own, views, asked.compression, meter)
                    file.sync()  # I2
            meter.tick()
            self.bytes_written = meter.total
            return report

    # S5
    def report(self, op: Operation, plan: CheckpointMetadata, written: list[object]) -> CheckpointMetadata:
        """The record, on rank 0; elsewhere the plan."""
        with op.step("S5 report"):
            reports = op.gather_at_0(written)
            if op.rank != 0:
                return plan
            return self._complete(plan, reports)

    # S6
    def commit(self, op: Operation, asked: SaveRequest, record: CheckpointMetadata) -> list[str]:
        """The files of the checkpoint that this one has replaced, on rank 0."""
        with op.step("S6 commit"):
            if op.rank != 0:
                return []
            prefix, fence = record.prefix, st.fence_name(record.prefix, record.save_id)
            self.storage.sync_directory(f"{prefix}/x")  # I2: the names of the files
            with closing(self.storage.open(fence, write=True)) as file:
                text = st.encode_record(record)
                file.write(0, memoryview(text))
                file.sync()
            old = st.record_head(self.storage, prefix)
            files = st.tensor_files(self.storage, prefix)
            superseded = [name for save_id, name in files if old and save_id == old.save_id]
            try:
                self.storage.publish(fence, st.record_name(prefix), asked.overwrite)  # the instant of commit
            except OSError as error:
                if not self._is_recorded(record, error):
                    if isinstance(error, FileExistsError):
                        raise CheckpointException(
                            f"checkpoint {prefix!r} exists, and overwrite=False", prefix
                        ) from error
                    raise
            op.committed = True
            self._warn_of_kept(record)
            try:
                self.storage.sync_directory(st.record_name(prefix))
            except OSError as error:  # the rename may not be durable: the old checkpoint must stay whole
                self.warnings.append(f"committed, but its directory could not be synced: {error}")
                return []
            return superseded

    def _warn_of_kept(self, record: CheckpointMetadata) -> None:
        """Name what is kept per rank because ranks differ; once for the same names."""
        kept = {t.name for t in record.tensors if t.rank is not None} - {"rng/state", "optimizer/state"}
        if kept and (names := tuple(sorted(kept))) not in self.warned:
            self.warned.add(names)
            what = "differ between ranks, or meshes of ranks, and are kept for each"
            self.warnings.append(f"{what}: {st.some(names, 20)}")

    def _is_recorded(self, record: CheckpointMetadata, doubt: OSError) -> bool:
        """Whether a rename that reported an error has happened: the record tells."""
        try:
            head = st.record_head(self.storage, record.prefix)
        except (OSError, CheckpointException):
            message = f"{doubt}; the record cannot be read back, so {record.prefix!r} may have been committed"
            raise OSError(message) from doubt
        return head is not None and head.save_id == record.save_id

    # S7
    def announce(self, op: Operation, record: CheckpointMetadata, superseded: list[str]) -> None:
        try:
            with op.step("S7 announce"):
                op.gather(None)
            op.committed = True
        except OperationFailed as failed:
            if not op.committed:
                raise
            self.warnings.append(f"committed, but not every rank may know: {failed}")
        if op.rank == 0:
            try:
                for name in superseded:  # I3: only now
                    self.storage.delete(name)
                self._retain(record.prefix)
            except Exception as error:
                self.warnings.append(f"committed, but not all that should go is gone: {error!r}")

    def _retain(self, newest: str) -> None:
        """Delete the checkpoints that the user does not want any more; the new one always stays."""
        if self.keep_last is None and self.retain is None:
            return
        known = st.list_committed(self.storage, self.warnings.append)
        if self.retain is None:
            others = [m.prefix for m in known if m.prefix != newest]
            doomed = others[: max(0, len(others) + 1 - (self.keep_last or 1))]
        else:
            kept = list(self.retain(known))
            if wrong := [prefix for prefix in kept if prefix not in [m.prefix for m in known]]:
                raise ValueError(f"retain must return prefixes of those that it is given, not {wrong[0]!r}")
            doomed = [m.prefix for m in known if m.prefix not in [newest, *kept]]
        for prefix in doomed:
            st.delete_committed(self.storage, prefix)

    # After a failure
    def _settle(self, op: Operation, ticket: CheckpointMetadata) -> bool:
        """I4: whether the save was committed after all.

        If not, no trace of it stays, and it cannot commit any more.
        """
        if op.committed:
            return True
        try:
            self.storage.delete(st.fence_name(ticket.prefix, ticket.save_id))
            head = st.record_head(self.storage, ticket.prefix)
            if head is not None and head.save_id == ticket.save_id:
                return True
            for save_id, name in st.tensor_files(self.storage, ticket.prefix):
                if save_id == ticket.save_id:
                    self.storage.delete(name)
        except (
            OSError,
            CheckpointException,
        ) as error:  # the failure that led here matters more; `gc` finds the rest
            log.warning("%s: could not clean up after the failed save: %s", ticket.prefix, error)
        return False

    def _complete(self, plan: CheckpointMetadata, reports: Sequence[object]) -> CheckpointMetadata:
        """The plan with lengths, CRCs and the headers of whole files."""
        shards, pieces, first_own = list(plan.shards), plan.pieces, len(plan.shards) - len(reports)
        blocks: list[dict[str, object]] = [
            {} for _ in shards
        ]  # of whole files: the CRCs of the units of each block
        for rank, report in enumerate(map(as_list, reports)):
            for index, found in enumerate(as_list(report[0])):
                blocks[index] |= Fields(found).all
            if len(report) > 1:
                name, length, header_bytes, header_crc, lengths = report[1:]
                numbers = st.int_tuple([length, header_bytes, header_crc])
                shards[first_own + rank] = st.ShardMetadata(str(name), *numbers)
                if lengths is not None:
                    rows = np.flatnonzero(pieces.file == first_own + rank)
                    pieces.length[rows] = st.unpack_ints(str(lengths), len(rows))
                    pieces.begin[rows] = np.cumsum(pieces.length[rows]) - pieces.length[rows]
        for index, shard in enumerate(plan.shards):
            if shard.header_bytes:
                crcs = (st.int_tuple(as_list(blocks[index][str(n)])) for n in range(len(blocks[index])))
                header = st.encode_header(plan.entries(index), shard.length - shard.header_bytes)
                header = st.with_crcs(header, itertools.chain.from_iterable(crcs))
                with closing(self.storage.open(plan.shard_path(index), write=True)) as file:
                    file.write(0, memoryview(header))
                    file.sync()  # I2
                shards[index] = shard._replace(header_crc=st.crc32(header))
        return dataclasses.replace(plan, shards=tuple(shards), pieces=pieces)


def as_list(value: object) -> list[object]:
    """A value that another rank sent, which is a list; ValueError if not."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {type(value).__name__}")
    return value


# ----------------------------------------------------------------------------------------------------------
# The load protocol

RESHARDING_STRATEGIES = ("parallel", "sequential", "broadcast")


def committed(storage: st.CheckpointStorage, prefix: str) -> tuple[bytes, CheckpointMetadata]:
    """`st.read_committed_record`, with LOAD_FAILED where there is no checkpoint of this name."""
    try:
        return st.read_committed_record(storage, prefix)
    except FileNotFoundError as error:
        known = ", ".join(st.recorded_prefixes(storage)[-5:]) or "none"
        message = f"there is no checkpoint {prefix!r}; the last ones here: {known}"
        raise CheckpointException(message, prefix, ExceptionType.LOAD_FAILED) from error


class Loading(Protocol):
    """What a load is for, on one rank."""

    def claim(
        self,
    ) -> Mapping[str, object]: ...  # L1: what all ranks must ask for alike, with "prefix" and "strategy"
    def validate(self, reader: CheckpointReader) -> None: ...  # L2
    def match(
        self, reader: CheckpointReader
    ) -> list[Target]: ...  # L3: what is to be filled; changes nothing yet
    def apply(self) -> None: ...  # L5: it is filled, on all ranks


class CheckpointLoader:
    """Runs L1 to L5 on one rank."""

    def __init__(self, coordinator: DistributedCoordinator, storage: st.CheckpointStorage) -> None:
        self.coordinator, self.storage = coordinator, storage

    def coordinate_load(self, op: Operation, loading: Loading) -> None:
        """Fill what `loading` matches, and let it apply that, on every rank. Collective.

        Blocks until all ranks are done.

        `OperationFailed` on all ranks if one fails: in L1 to L3 nothing has changed; in L4 and L5 tensors are
        undefined, and the message says so.
        """
        with op.step("L1 record"):
            claim = loading.claim()
            demand_equal(op.gather(claim))
            record = self._read_record(op, str(claim["prefix"]))
        with CheckpointReader(self.storage, record) as reader:
            reader.meter = Meter(poll=op.poll)
            with op.step("L2 validate"):
                loading.validate(reader)
            with op.step("L3 match"):
                reads = reader.plan(loading.match(reader))
                op.gather(None)  # nothing changes anywhere before every rank has a plan
            with op.step("L4 read"):
                meter = op.meter(sum(read.nbytes for read in reads))
                if claim["strategy"] == "broadcast" and op.world_size > 1:
                    read_once(op, reader, reads, meter)
                for turn in range(op.world_size) if claim["strategy"] == "sequential" else [op.rank]:
                    if turn == op.rank and (claim["strategy"] != "broadcast" or op.world_size == 1):
                        st.in_parallel(
                            reads,
                            lambda read, buffer, gate: reader.run(read, buffer, gate, meter),
                            meter.tick,
                            len(reads),
                        )
                    if claim["strategy"] == "sequential":
                        op.gather(None)
                meter.tick()
        with op.step("L5 apply"):
            op.gather(None)  # every rank has its bytes
            loading.apply()
            op.gather(None)

    def _read_record(self, op: Operation, prefix: str) -> CheckpointMetadata:
        if op.rank == 0:
            text, metadata = committed(self.storage, prefix)
            op.broadcast(text.decode())
            return metadata
        return st.decode_record(str(op.broadcast(None)).encode(), prefix)


# ----------------------------------------------------------------------------------------------------------
# Operations: a deadline, a cancel event, and one failure for all


class OperationFailed(Exception):
    """Every rank has agreed that the operation failed, and how. The API raises the public exception."""

    def __init__(self, failure: Mapping[str, object]) -> None:
        fields = Fields(failure)
        super().__init__(fields.text("message"))
        self.kind, self.rank = fields.text("type"), fields.number("rank")
        self.retryable = fields.all["retryable"] is True  # whether the rank that failed first would try again
        self.superseded = fields.all["superseded"] is True

    def public(self, checkpoint_path: str) -> Exception:
        """The exception that the user sees, the same on every rank."""
        if self.kind == "value_error":
            return ValueError(str(self))
        return CheckpointException(str(self), checkpoint_path, ExceptionType(self.kind), self.rank)


class _Stopped(CheckpointException):
    """This rank cannot go on, and another may know why: it says so in the next gather, or is missing."""


class Operation:
    """One collective save or load, as one rank sees it.

    All that ranks tell each other goes through `gather`, in the same order on every rank. A rank that fails
    gives its failure instead of a value in its next gather, which is the one that the others wait in, or come
    to; there all raise it. Where the coordinator has a flag, the failing rank raises it, so that the others
    come at once. A rank that waits no longer leaves its failure there for those who come later.
    """

    def __init__(
        self,
        coordinator: DistributedCoordinator,
        verb: str,
        timeout: float,
        cancel: threading.Event | None = None,
        retryable: tuple[type[BaseException], ...] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.rank, self.world_size, self.timeout = coordinator.rank, coordinator.world_size, timeout
        self._coordinator, self._verb = coordinator, verb
        self._torch = coordinator if isinstance(coordinator, TorchCoordinator) else None
        numbers = self._torch.global_ranks if self._torch else range(self.world_size)
        self._own_rank = {number: rank for rank, number in enumerate(numbers)}
        self._deadline = time.monotonic() + timeout
        self._cancel, self._retryable, self._progress = cancel, retryable, progress
        self._reachable = True  # until a gather itself has failed
        self.committed = False  # what follows may not fail
        self.step_name = ""
        self.seconds: dict[str, float] = {}
        if self._torch:
            self._torch.begin(self._while_waiting)

    def poll(self) -> None:
        """Raise if cancelled, late, or if another rank has failed; called a few times a second."""
        self._poll_others()
        if time.monotonic() > self._deadline and not self.committed:
            late = f"not done by the deadline of {self.timeout:g} s"
            raise CheckpointException(late, type=ExceptionType.TIMEOUT, rank=self.rank)

    def _poll_others(self) -> None:
        """`poll` while waiting for other ranks: then it is not this one that is late."""
        if self._is_cancelled():
            raise CheckpointException("cancelled", type=ExceptionType.CANCELLED)
        if self._torch and not self.committed and self._torch.flag_is_up():
            raise _Stopped("")

    def _is_cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set() and not self.committed

    def _while_waiting(self) -> None:
        """Called while this rank waits in a gather, which it may not leave: it has the others come to it."""
        if self._torch and self._is_cancelled():
            self._torch.raise_flag()

    def meter(self, total: int) -> Meter:
        """Counts this step's bytes on this rank."""
        return Meter(self.step_name, total, self._progress, self.poll)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step; I5: what goes wrong in it is raised on all ranks."""
        self.step_name, started = name, time.monotonic()
        try:
            if not name.startswith("S7"):  # a commit is announced, however late
                self.poll()
            with no_garbage_collection():
                yield
        except OperationFailed:
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.seconds[name] = time.monotonic() - started

    def _fail(self, error: BaseException) -> None:
        """Give this failure to the others.

        Raises the one that all ranks agree on, unless `error` must end the process: then it waits for nobody.
        """
        failure, going = self._describe(error), not isinstance(error, Exception)
        row: dict[str, object] = {"failure": failure}
        if isinstance(error, (_Stopped, FileNotFoundError)):  # one who gave up has removed the files
            row = {"stopped": failure if str(error) else None}
        try:
            if self._torch:
                self._torch.raise_flag()
            if self._reachable and not (going and self._torch):
                self._gather(row)
        except OperationFailed as agreed:
            if going:
                return
            raise agreed from error
        except Exception as unreachable:
            log.debug("could not tell the other ranks: %s", unreachable)
            if "stopped" in row:
                failure = self._describe(unreachable)
        failure |= {"retryable": False, "superseded": False}  # the others have not agreed to that
        if self._torch:
            with suppress(CheckpointException):
                self._torch.leave({"failure": failure})
        if not going:
            raise OperationFailed(failure) from error

    def _describe(self, error: BaseException) -> dict[str, object]:
        default = ExceptionType.SAVE_FAILED if self._verb == "save" else ExceptionType.LOAD_FAILED
        kind, rank, text = default.value, self.rank, f"{type(error).__name__}: {error}"
        if isinstance(error, CheckpointException):
            own = error.type not in (
                ExceptionType.UNKNOWN,
                ExceptionType.SAVE_FAILED,
            )  # what fits a save fits no load
            kind, text = error.type.value if own else kind, str(error)
            rank = rank if error.rank is None else error.rank
        elif isinstance(error, OSError):
            kind = ExceptionType.STORAGE_ERROR.value
        elif isinstance(error, ValueError):
            kind, text = "value_error" if self.step_name[:2] in ("S1", "L1") else kind, str(error)
        if kind == ExceptionType.TIMEOUT.value and rank != self.rank and self.step_name[:2] in ("S1", "L1"):
            text += f"; {self._verb} is collective: every rank must call it"
        if self.step_name[:2] in ("L4", "L5"):
            text += "; tensors being loaded are undefined now: load again, or restart"
        message = f"{text} (rank {self.rank}, in {self.step_name})" if self.world_size > 1 else text
        return {
            "type": kind,
            "rank": rank,
            "message": message[: 1 << 16],
            "retryable": isinstance(error, self._retryable),
            "superseded": isinstance(error, Superseded),
        }

    def own_ranks(self, mesh: Sequence[int]) -> Shape:
        """The ranks of a mesh as this operation counts them; those that take no part in it are left out."""
        return tuple(sorted(self._own_rank[rank] for rank in mesh if rank in self._own_rank))

    def remaining(self) -> float:
        """Seconds until waits for other ranks end: the deadline and the grace."""
        return max(0.05, self._deadline + GRACE_S - time.monotonic())

    def gather(self, value: object) -> list[object]:
        """All ranks' values."""
        return self._gather({"value": value})

    def gather_at_0(self, value: object) -> list[object]:
        """All ranks' values on rank 0; elsewhere what a coordinator may give besides."""
        return self._gather({"value": value}, at_0=True)

    def broadcast(self, value: object) -> object:
        """Rank 0's value."""
        return self._gather({"value": value if self.rank == 0 else None})[0]

    def _gather(self, row: dict[str, object], at_0: bool = False) -> list[object]:
        for _ in range(2):
            try:
                if self._torch and at_0:
                    rows = self._torch.gather_at_0(row, self.remaining())
                else:
                    rows = self._coordinator.all_gather(row, timeout=self.remaining())
            except Exception:
                self._reachable = False
                raise
            fields = [Fields(found).all for found in rows]
            for found in fields:
                if isinstance(failure := found.get("failure"), dict):
                    raise OperationFailed(failure)
            if not any("stopped" in found for found in fields):
                return [found.get("value") for found in fields]
            # Somebody was cancelled in a gather, and has raised the flag. Once more, for it to say why.
            row = {"stopped": row.get("stopped")}
            if self._is_cancelled():
                why = CheckpointException("cancelled", type=ExceptionType.CANCELLED)
                row = {"failure": self._describe(why)}
        for found in fields:
            if isinstance(failure := found.get("stopped"), dict):
                raise OperationFailed(failure)
        raise CheckpointException("stopped by another rank, which did not say why")

    def exchange(self, outgoing: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Bytes to and from every rank."""
        sizes: dict[str, object] = {str(rank): len(data) for rank, data in outgoing.items() if len(data)}
        if not self._torch:
            rows = self.gather({key: outgoing[int(key)].tobytes() for key in sizes})
            found = ((rank, Fields(row).all.get(str(self.rank))) for rank, row in enumerate(rows))
            return {rank: np.frombuffer(bytearray(d), np.uint8) for rank, d in found if isinstance(d, bytes)}
        tables = [Fields(row).all for row in self.gather(sizes)]
        if not any(tables):
            return {}
        incoming = [int(str(table.get(str(self.rank), 0))) for table in tables]
        try:
            return self._torch.all_to_all(outgoing, incoming, self.remaining() - GRACE_S, self._poll_others)
        except RuntimeError as error:  # whoever has died, or is late, misses the next gather
            late = ExceptionType.TIMEOUT if time.monotonic() > self._deadline else ExceptionType.UNKNOWN
            raise _Stopped(f"gloo exchange failed: {error}", type=late) from error


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Steps make many objects but no cycles: looking for some would double the time of a plan."""
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

    `max_retries` attempts in all, waiting `initial_delay` s, growing by `backoff_factor`.
    """

    max_retries: int = 3
    initial_delay: float = 1.0
    max_delay: float = 30.0
    backoff_factor: float = 2.0
    jitter: float = 0.1  # as a part of the delay
    retryable_exceptions: tuple[type[BaseException], ...] = (OSError,)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 0)."""
        base = min(self.max_delay, self.initial_delay * self.backoff_factor**attempt)
        return base * (1 + random.uniform(-self.jitter, self.jitter))


class FaultToleranceHandler:
    """Retries, timeouts and rollback."""

    def __init__(self, storage: st.CheckpointStorage, retry_policy: RetryPolicy | None = None) -> None:
        self.storage = storage
        self.retry_policy = retry_policy or RetryPolicy()

    def execute_with_retry(self, function: Callable[[], T], cancel: threading.Event | None = None) -> T:
        """Call `function` until it succeeds, fails in a way not worth retrying, or the policy's attempts are
        used up.

        A collective operation fails as `OperationFailed`, whose verdict all ranks share: they all retry, or
        none.
        """
        policy = self.retry_policy
        for attempt in range(policy.max_retries - 1):
            try:
                return function()
            except Exception as error:
                again = isinstance(error, tuple(policy.retryable_exceptions))
                if isinstance(error, OperationFailed):
                    again = error.retryable
                elif cancel and cancel.is_set():  # of a collective operation the next attempt tells all ranks
                    raise
                if not again:
                    raise
            (cancel or threading.Event()).wait(policy.delay(attempt))
        return function()

    def execute_with_timeout(self, function: Callable[[], T], timeout: float) -> T:
        """Call `function` in a thread.

        TIMEOUT if it takes longer than `timeout` seconds (it may go on in the background).
        """
        result = in_thread(function)
        if not wait([result], timeout).done:
            raise CheckpointException(f"not done within {timeout:g} s", type=ExceptionType.TIMEOUT)
        return result.result()

    def rollback(self, checkpoint_prefix: str) -> None:
        """Delete a checkpoint, committed or not: record first, then its files.

        FileNotFoundError where there is none.
        """
        st.delete_committed(self.storage, checkpoint_prefix.removesuffix(st.RECORD_SUFFIX))


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Do some work beside this thread.

    Not in an executor: those take nothing more once the interpreter exits, while a save in flight goes on.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="ckpt-beside", daemon=True).start()
    return result


# ----------------------------------------------------------------------------------------------------------
# Coordinators


@runtime_checkable
class DistributedCoordinator(Protocol):
    """How ranks talk. Values are what `encode_value` takes.

    Every wait ends at `timeout` (seconds) with TIMEOUT.

    All methods are collective: every rank calls them, in the same order.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self, timeout: float = 600.0) -> None: ...
    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object: ...
    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]: ...


class LocalCoordinator:
    """One process: rank 0 of 1."""

    rank = 0
    world_size = 1

    def barrier(self, timeout: float = 600.0) -> None:
        """Nothing to wait for."""

    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object:
        return value

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        return [value]


# Work that gloo had not finished when its operation ended, with its buffers. gloo's threads must not drop the
# last reference to a tensor: at interpreter exit that ends the process.
_in_flight: list[tuple[dist.Work, object]] = []


def _own_connection(store: Store) -> Store:
    """For who must not be held up: a thread that waits for a key holds its connection."""
    return store.clone() if hasattr(store, "clone") else store


class TorchCoordinator:
    """The ranks of a `torch.distributed` process group. Creating one is collective over that group.

    Control goes over keys of the rendezvous store: it can tell who is missing, and survives a timeout. Bulk
    bytes go over a private gloo group, also where training runs on NCCL; an operation makes one when it first
    needs it.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "torch.distributed is not initialised: call init_process_group, or use LocalCoordinator()"
            )
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        if dist.get_rank() not in ranks:
            raise ValueError(f"rank {dist.get_rank()} is not in the process group of ranks {ranks}")
        self.rank, self.world_size, self.global_ranks = ranks.index(dist.get_rank()), len(ranks), tuple(ranks)
        store = _own_connection(dist.distributed_c10d._get_default_store())
        name = "ckpt/" + hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        instance = store.add(f"{name}/made/{self.rank}", 1)
        self._store = PrefixStore(f"{name}/{instance}", store)
        self._operation = self._step = 0
        self._posted: list[str] = []
        self._while_waiting: Callable[[], None] = lambda: None
        self._store_error = ""
        self._longest_pause = min(
            0.5, 0.02 * max(1.0, self.world_size / 64)
        )  # thousands of ranks ask one store
        self._group: dist.ProcessGroupGloo | None = None  # of this operation

    def begin(self, while_waiting: Callable[[], None]) -> None:
        """Start a collective operation; `while_waiting` runs in every wait."""
        self._operation += 1
        self._step, self._group = 0, None
        self._while_waiting, self._store_error = while_waiting, ""

    def raise_flag(self) -> None:
        """Have the other ranks go to their next gather at once."""
        if self._flag() not in self._posted:
            self._call(self._store.set, self._flag(), "up")
            self._posted.append(self._flag())

    def flag_is_up(self) -> bool:
        return bool(self._call(self._store.check, [self._flag()]))

    def _flag(self) -> str:
        return f"{self._operation}/flag"

    def barrier(self, timeout: float = 600.0) -> None:
        self.all_gather(None, timeout)

    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object:
        return self.all_gather(value if self.rank == src else None, timeout)[src]

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        """Two hops: every rank posts, rank 0 collects and posts the whole."""
        return self._gather(value, timeout, list)

    def gather_at_0(self, row: dict[str, object], timeout: float) -> list[object]:
        """As `all_gather`, but other ranks than 0 get no values: only what ends the operation."""
        return self._gather(
            row,
            timeout,
            lambda rows: [{k: v for k, v in Fields(r).all.items() if k != "value"} for r in rows],
        )

    def _gather(
        self, value: object, timeout: float, to_all: Callable[[list[object]], list[object]]
    ) -> list[object]:
        step, before = f"{self._operation}/{self._step + 1}", len(self._posted)
        posts = {rank: f"{step}/{rank}" for rank in range(self.world_size)}
        try:
            self._post(posts[self.rank], value)
            if self.rank == 0:
                values = self._await(list(posts.values()), timeout, posts)
                self._post(f"{step}/all", to_all(values))
            else:
                values = as_list(self._await([f"{step}/all"], timeout, posts)[0])
        finally:
            self._step += 1
        # Every rank has come as far as this step, so nobody still reads what was posted before it.
        retired, self._posted = self._posted[:before], self._posted[before:]
        for key in retired:
            self._call(self._store.delete_key, key)
        return values

    def leave(self, row: dict[str, object]) -> None:
        """Give a row to this gather, if it still goes on, and to the next one, without a wait for anybody."""
        for step in (self._step, self._step + 1):
            self._post(f"{self._operation}/{step}/{self.rank}", row)
            if self.rank == 0:
                self._post(f"{self._operation}/{step}/all", [row])

    def all_to_all(
        self, outgoing: Mapping[int, Bytes], incoming: Sequence[int], timeout: float, poll: Callable[[], None]
    ) -> dict[int, Bytes]:
        """Send bytes to ranks and receive `incoming[rank]` bytes from each.

        RuntimeError from gloo. `poll` runs meanwhile, and may raise.
        """
        deadline = time.monotonic() + timeout
        _in_flight[:] = [(work, buffers) for work, buffers in _in_flight if not work.is_completed()]
        limit = datetime.timedelta(seconds=max(0.1, timeout))
        if self._group is None:  # which waits until every rank makes it

            def make() -> dist.ProcessGroupGloo:
                store = PrefixStore(f"gloo/{self._operation}", _own_connection(self._store))
                return dist.ProcessGroupGloo(store, self.rank, self.world_size, limit)

            made = in_thread(make)
            while not wait([made], 0.01).done:
                poll()
            self._group = made.result()
        order = [outgoing.get(rank, np.empty(0, np.uint8)) for rank in range(self.world_size)]
        received, sent = np.empty(sum(incoming), np.uint8), np.concatenate(order)
        tensors, options = (torch.from_numpy(received), torch.from_numpy(sent)), dist.AllToAllOptions()
        options.timeout = limit
        send = getattr(self._group, "alltoall_base")  # missing in torch's type stubs
        work = send(*tensors, list(incoming), list(map(len, order)), options)
        _in_flight.append((work, (self._group, tensors)))
        pause = 1e-4
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.005)
            poll()
        work.wait(datetime.timedelta(seconds=0.1))  # raises what went wrong
        parts = np.split(received, np.cumsum(incoming)[:-1])
        return {rank: part for rank, part in enumerate(parts) if len(part)}

    def _post(self, key: str, value: object) -> None:
        text = st.dump_json(st.encode_value(value, key))
        for at in range(
            len(text) // STORE_BYTES * STORE_BYTES, -1, -STORE_BYTES
        ):  # `key` last: then all is there
            part_key = f"{key}+{at}" if at else key
            self._call(self._store.set, part_key, text[at : at + STORE_BYTES])
            self._posted.append(part_key)

    def _get(self, keys: list[str]) -> list[object]:
        texts: list[bytes] = self._call(self._store.multi_get, keys)
        at = 0
        while going_on := [n for n, text in enumerate(texts) if len(text) == at + STORE_BYTES]:
            at += STORE_BYTES
            for n, part in zip(
                going_on, self._call(self._store.multi_get, [f"{keys[n]}+{at}" for n in going_on])
            ):
                texts[n] += part
        return [st.decode_value(json.loads(text), str) for text in texts]

    def _call(self, function: Callable[..., T], *args: object) -> T:
        try:
            if self._store_error:  # asking a dead store again may take seconds each time
                raise RuntimeError(self._store_error)
            return function(*args)
        except (RuntimeError, OSError) as error:
            self._store_error = str(error)
            raise CheckpointException(
                "the rendezvous store is unreachable (has the process that hosts it, by default rank 0, "
                "died?): "
                f"{error}",
                type=ExceptionType.TIMEOUT,
            ) from error

    def _await(self, keys: list[str], timeout: float, posts: Mapping[int, str]) -> list[object]:
        """The values of `keys`, once they are there; TIMEOUT names the ranks whose `posts` are not."""
        now = time.monotonic()
        deadline, polled, pause = now + timeout, now, 0.0003
        while not self._call(self._store.check, keys):
            if (now := time.monotonic()) > polled + 0.02:
                self._while_waiting()
                polled = now
            if now > deadline:
                late = [rank for rank, key in posts.items() if not self._call(self._store.check, [key])]
                late = (
                    late or list(posts)[:1]
                )  # all have posted: then it is the rank that hands out the whole
                message = f"no answer from rank(s) {st.some(late, 20)} of {self.world_size} by the deadline"
                raise CheckpointException(message, type=ExceptionType.TIMEOUT, rank=late[0])
            time.sleep(pause)
            pause = min(pause * 1.25, self._longest_pause)
        return self._get(keys)


# ----------------------------------------------------------------------------------------------------------
# What a rank holds


class LocalTensor(NamedTuple):
    """A tensor as one rank holds it."""

    name: str
    dtype: str
    shape: Shape  # global
    pieces: list[tuple[Box, torch.Tensor]]  # none where the rank's shard is empty
    mesh: Shape = ()  # a DTensor: the global ranks of its mesh, sorted
    replicated: bool = True  # whether a placement declares equal copies, or nothing tells
    alias_of: str | None = None
    per_rank: bool = False  # every rank has its own


def as_dtensor(tensor: object) -> DTensor | None:
    """`tensor` if it is a DTensor. Does not import that class, which takes as long as torch itself.

    Somebody has, or not.
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
    whole, boxes = whole_box(tuple(local.shape)), list[tuple[Box, Box]]()
    if local.numel():
        boxes = [(whole, whole)] if sharded is None else shard_boxes(name, sharded, whole.size)
    pieces = [(box, local if part == whole else local[part.within(whole)]) for box, part in boxes]
    replicated = sharded is None or any(placement.is_replicate() for placement in placements)
    return LocalTensor(name, code, shape, pieces, mesh_ranks(tensor), replicated)


def mesh_ranks(tensor: object) -> Shape:
    """The global ranks of a DTensor's mesh, sorted: neither their order nor its shape matters.

    () for a plain tensor.
    """
    sharded = as_dtensor(tensor)
    return () if sharded is None else tuple(sorted(sharded.device_mesh.mesh.flatten().tolist()))


def _refuse_unsupported(name: str, tensor: torch.Tensor, placements: Sequence[Placement]) -> None:
    problem = ""
    if type(tensor).__name__ == "ShardedTensor":
        problem = "is an FSDP1 ShardedTensor; use fully_shard, or FSDP(..., device_mesh=mesh), for DTensors"
    elif torch.nn.parameter.is_lazy(tensor):
        problem = "is not initialised: run its lazy module on a batch first, which makes it"
    # A subclass over plain memory is a plain tensor once it is detached, as nn.Parameter is.
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter) and type(tensor.detach()) is not torch.Tensor:
        what = "a tensor subclass without a known layout; convert it to a plain tensor"
        problem = f"is a {type(tensor).__name__}, {what}"
    elif tensor.is_nested:
        problem = "is a nested tensor; store its values() and offsets(), or to_padded_tensor()"
    elif tensor.layout is not torch.strided:
        problem = f"has layout {tensor.layout}; store to_dense(), or its indices and values"
    elif tensor.is_quantized or tensor.dtype not in st.CODES:
        problem = f"has dtype {tensor.dtype}; store dequantize(), or int_repr() with its scales"
    elif tensor.is_meta:
        problem = "is on the meta device, which holds no data; materialise it (to_empty) first"
    elif tensor.numel() and not tensor.data_ptr():
        problem = "has no memory: its storage was freed, or never made; save while it is there"
    elif any(placement.is_partial() for placement in placements):
        problem = (
            "has a Partial() placement, a sum not yet taken: redistribute it to Replicate() or Shard() first"
        )
    elif unknown := {type(p).__name__ for p in placements} - {"Shard", "_StridedShard", "Replicate"}:
        problem = (
            f"has placements {sorted(unknown)}, whose layout is not known here: redistribute it to Shard()"
        )
    if problem:
        raise CheckpointException(f"{name} {problem}")  # of the type that fits the call


Cut = tuple[int, int, int, int]  # dimension, number of shards, which of them, split factor


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

    FSDP2 cuts what tensor parallelism has left, but its placement comes first, with the number of shards that
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
    """Cut the elements of `runs` into `split_factor` groups, each into `ways` shards; shard `index` of each.

    Runs are parts of one dimension, which lie one behind the other in the local tensor.
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
    """Mark those that are the same views of the same memory as an earlier one: they are stored once."""
    seen, marked = dict[object, str](), []
    for item in tensors:
        views = tuple((box, *identity(view)) for box, view in item.pieces)
        first = seen.setdefault((item.dtype, item.shape, views), item.name) if views else item.name
        marked.append(item if first == item.name else item._replace(alias_of=first))
    return marked


class ShardData(NamedTuple):
    """What S2 collects on a rank: tensors, values, and optimizer steps that are numbers, not tensors."""

    tensors: list[LocalTensor]
    steps: Mapping[str, float] = types.MappingProxyType({})  # by parameter


def local_value(name: str, text: bytes, per_rank: bool = False) -> LocalTensor:
    """A value that is not a tensor, as JSON text; `per_rank`: every rank has its own."""
    view = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return LocalTensor(name, "JSON", (len(text),), [(whole_box((len(text),)), view)], per_rank=per_rank)


def views_by_index(
    op: Operation, meta: CheckpointMetadata, data: ShardData
) -> dict[int, list[tuple[Box, torch.Tensor]]]:
    """What this rank holds of each tensor of a plan, by its index."""
    index = {(t.name, t.rank): number for number, t in enumerate(meta.tensors)}
    owners = ((t, (None, min(t.mesh, default=op.rank))) for t in data.tensors)
    return {index[t.name, r]: t.pieces for t, ranks in owners for r in ranks if (t.name, r) in index}


def in_model(name: str) -> bool:
    """Whether a stored name is that of an entry of the model's state."""
    return name.startswith(("model/", "model-values/"))


# ----------------------------------------------------------------------------------------------------------
# S3: the plan, made on rank 0 from every rank's description, in columns of numpy arrays


_NONE: Ints = np.empty(0, np.int64)
NO_PIECES = Pieces(_NONE, _NONE, _NONE, _NONE, np.empty((0, 2, 0), np.int64))
_STEP = re.compile("optimizer/(.+)/step")  # where a torch optimizer keeps the number of a parameter's updates


def pack_columns(*columns: Ints) -> list[object]:
    """Columns of one length as JSON: that length, and each column."""
    return [len(columns[0]), *map(st.pack_ints, columns)]


def unpack_columns(packed: object) -> Iterator[Ints]:
    """Inverse of `pack_columns`; expands one column at a time."""
    count, *texts = as_list(packed)
    return (st.unpack_ints(str(text), int(str(count))) for text in texts)


def pack_pieces(pieces: Pieces) -> list[object]:
    """Pieces as JSON."""
    return pack_columns(pieces.file, pieces.tensor, pieces.begin, pieces.length, *box_columns(pieces.box))


def unpack_pieces(packed: object, files: Sequence[int] | None = None) -> Pieces:
    """Inverse of `pack_pieces`, for the rows of `files` or all. Takes memory for one column of all rows."""
    columns = unpack_columns(packed)
    file = next(columns)
    kept = np.ones(len(file), bool) if files is None else np.isin(file, files)
    tensor, begin, length, *boxes = (column[kept] for column in columns)
    box = np.array(boxes, np.int64).reshape(2, len(boxes) // 2, len(tensor)).transpose(2, 0, 1)
    return Pieces(tensor, file[kept], begin, length, box)


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


def describe(data: ShardData) -> dict[str, object]:
    """Describe what a rank holds, for the planner."""
    meshes = {mesh: number for number, mesh in enumerate(dict.fromkeys(t.mesh for t in data.tensors))}
    held = [(index, view.is_cuda) for index, t in enumerate(data.tensors) for _, view in t.pieces]
    width = max([1, *(len(t.shape) for t in data.tensors)])
    boxes = stack_boxes([box for t in data.tensors for box, _ in t.pieces], width)
    tensor, on_device = np.array(held, np.int64).reshape(-1, 2).T
    return {
        "tensors": [
            [t.name, t.dtype, () if t.dtype == "JSON" else t.shape, t.alias_of, t.per_rank, meshes[t.mesh]]
            for t in data.tensors
        ],
        "meshes": [pack_columns(np.array(mesh, np.int64)) for mesh in meshes],
        "pieces": pack_pieces(Pieces(tensor, tensor * 0, np.arange(len(held)), on_device, boxes)),
        "steps": dict(data.steps),
    }


def gather_holdings(op: Operation, data: ShardData) -> Holdings | None:
    """Gather what all ranks hold, on rank 0; None elsewhere.

    Optimisation (skip on first reading): a rank whose tensors have the names and shapes of rank 0's leaves
    them out. At 4,096 ranks of 1,000 tensors each that is 240 MB of 250.
    """
    body = describe(data)
    digest = hashlib.sha256(st.dump_json(body["tensors"])).hexdigest()
    if op.broadcast(digest) == digest and op.rank > 0:
        body["tensors"] = None
    bodies = op.gather_at_0(body)
    return Holdings(list(map(Fields, bodies))) if op.rank == 0 else None


class Holdings:
    """What all ranks hold, in columns, on rank 0.

    A *copy* of a tensor is a plain tensor on one rank, or a DTensor on one mesh. Its owner is that rank, or
    the lowest rank of the mesh. Copies of one name are one tensor if their dtypes, shapes, boxes and bytes
    are equal. Otherwise the name is in `apart`, and each copy is a tensor of its own.

    `name`, `owner` and `kind` are columns of the copies, sorted by name and owner; they index `names`, ranks
    and `kinds`. `rows` are the pieces of all ranks, sorted by name, box, owner and rank, so that equal pieces
    are neighbours. In them `tensor` is the copy, `file` the rank, `begin` which piece of its rank it is, and
    `length` whether it is in the memory of a CUDA device.
    """

    def __init__(self, bodies: Sequence[Fields]) -> None:
        kinds, meshes, tables = dict[Described, int](), {(): 0}, dict[bytes, Ints]()
        held, parts = list[Ints](), list[Pieces]()
        for rank, body in enumerate(bodies):
            rows, packed = body.all["tensors"], body.array("meshes")
            if (key := st.dump_json([rows, packed])) not in tables:
                local = [tuple(next(unpack_columns(mesh)).tolist()) for mesh in packed]
                numbers = [meshes.setdefault(mesh, len(meshes)) for mesh in local]
                rows = bodies[0].all["tensors"] if rows is None else rows
                found = (
                    Described(
                        str(name),
                        str(dtype),
                        st.int_tuple(shape),
                        str(origin or ""),
                        own is True,
                        numbers[int(str(mesh))],
                    )
                    for name, dtype, shape, origin, own, mesh in map(as_list, as_list(rows))
                )
                tables[key] = np.array([kinds.setdefault(kind, len(kinds)) for kind in found], np.int64)
            held.append(tables[key])
            pieces = unpack_pieces(body.all["pieces"])
            parts.append(pieces._replace(file=np.full_like(pieces.file, rank)))
        self.steps = [body.child("steps").all for body in bodies]
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
        self.apart, self.tied = set[str](), dict[str, str]()
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
                self.apart.add(name)
            ties = {kind.alias_of for kind in same}
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
        """Keep apart the names whose copies have different boxes, or different bytes.

        `sums` are the checksums of the rows `compared`. Where replicas within a copy differ, the lowest
        rank's stays, with a warning.
        """
        name, found = self.name[self.rows.tensor], np.zeros(len(self.rows.tensor), np.uint64)
        found[compared] = sums
        first_of_copy = self.first_of_box | starts(self.rows.tensor)
        copies = np.bincount(np.cumsum(self.first_of_box) - 1, first_of_copy)  # that have a box
        of_box, of_copy = (
            found[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
            for first in (self.first_of_box, first_of_copy)
        )
        unlike = name[self.first_of_box][copies != np.bincount(self.name)[name[self.first_of_box]]]
        apart = np.unique(np.append(unlike, name[of_box != of_copy])).tolist()
        self.apart |= {self.names[index] for index in apart} - self.tied.keys()
        self.apart |= {tied for tied, origin in self.tied.items() if origin in self.apart}
        differs = found != of_copy
        for index in np.unique(name[differs]).tolist():
            ranks = np.unique(self.rows.file[differs & (name == index)]).tolist()
            warnings.append(
                f"{self.names[index]}: copies that its placement declares equal differ: rank(s) "
                f"{st.some(ranks, 20)} from the lowest of their mesh, whose copy is kept"
            )
        self.rows = self.rows.take(~differs)

    def check_steps(self) -> None:
        """Check that ranks have the same optimizer step of each parameter that is not itself kept apart."""
        first, differing = dict[str, object](), {m[1] for name in self.apart if (m := _STEP.fullmatch(name))}
        for steps in self.steps:
            differing |= {name for name, step in steps.items() if first.setdefault(name, step) != step}
        # A parameter that several optimizers hold is named <optimizer>/<parameter>.
        wrong = sorted(
            p for p in differing if not {f"model/{p}", f"model/{p.partition('/')[2]}"} & self.apart
        )
        if wrong:
            raise CheckpointException(
                f"ranks are at different optimizer steps of {st.some(wrong)}: has a rank skipped a step, or "
                "a save? Bring all ranks to one step, by loading the last checkpoint or restarting, first"
            )

    def tensors(self) -> tuple[list[TensorMetadata], Pieces]:
        """The tensors as the record names them, and all pieces of them, those of tied ones too."""
        apart = np.array([name in self.apart for name in self.names], bool)[self.name]
        first = apart | starts(self.name)
        rows = self.rows._replace(tensor=(np.cumsum(first) - 1)[self.rows.tensor])
        lengths = np.zeros(len(self.name), np.int64)
        lengths[rows.tensor] = rows.box[:, 1, 0]
        found = []
        for copy, length in zip(np.flatnonzero(first).tolist(), lengths.tolist()):
            kind, owner = self.kinds[self.kind[copy]], int(self.owner[copy]) if apart[copy] else None
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
    wrong = st.not_covered_once(
        rows.tensor, rows.box, [t.shape if t.alias_of is None else None for t in tensors]
    )
    if wrong:
        t, held = tensors[wrong[0]], int(rows.box[rows.tensor == wrong[0], 1].prod(axis=1).sum())
        raise CheckpointException(
            f"{t.name}: the ranks together hold {held} elements of its {math.prod(t.shape)}, with holes "
            f"or overlaps (and {len(wrong) - 1} more tensors so): save with all ranks of its mesh, and "
            "the same parallelism on each",
            type=ExceptionType.VALIDATION_FAILED,
        )


def share_out(rows: Pieces, itemsizes: Ints, world_size: int) -> Pieces:
    """Give every byte one writer, as `file` (I1): its only holder, or an equal part to each of its holders.

    Replicas of less than two parts go whole to the holder with the least to write.
    """
    start = np.flatnonzero(starts(rows.tensor, *box_columns(rows.box)))
    count, nbytes = np.diff(start, append=len(rows.tensor)), rows.nbytes(itemsizes)
    alone = start[count == 1]
    load = np.bincount(rows.file[alone], nbytes[alone], world_size)
    parts = [rows.take(alone)]
    for first, copies in zip(start[count > 1].tolist(), count[count > 1].tolist()):
        holders, size = rows.file[first : first + copies], rows.box[first, 1]
        dim = int(np.argmax(size > 1))
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
    """The plan, which is the record without lengths and CRCs; and who gives which boxes to a whole file.

    In the latter `file` is the rank.
    """
    tensors, rows = holdings.tensors()
    itemsizes = np.array([st.itemsize(t.dtype) for t in tensors], np.int64)
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


def pack_plan(plan: CheckpointMetadata, sources: Pieces) -> dict[str, object]:
    """Pack the plan for the other ranks."""
    tables = {"pieces": pack_pieces(plan.pieces), "sources": pack_pieces(sources)}
    return {"files": [[*s] for s in plan.shards], "tensors": [[*t] for t in plan.tensors], **tables}


def unpack_plan(packed: object, ticket: CheckpointMetadata, rank: int) -> tuple[CheckpointMetadata, Pieces]:
    """The plan, with the rows of whole files and of this rank's own; and who gives which box to them."""
    body = Fields(packed)
    shards = [
        st.ShardMetadata(str(name), *st.int_tuple(sizes))
        for name, *sizes in map(as_list, body.array("files"))
    ]
    own = len(shards) - ticket.world_size + rank
    wanted = [n for n, shard in enumerate(shards) if shard.header_bytes or n == own]
    plan = dataclasses.replace(
        ticket,
        shards=tuple(shards),
        tensors=st.decode_tensors(body.array("tensors")),
        pieces=unpack_pieces(body.all["pieces"], wanted),
    )
    return plan, unpack_pieces(body.all["sources"])


# ----------------------------------------------------------------------------------------------------------
# S4: writing


class Progress(NamedTuple):
    """How far a save or load is.

    The step ("S4 write", "L4 read"), and its bytes on this rank, which end at the total.
    """

    step: str
    bytes_done: int
    bytes_total: int


class Meter:
    """Counts bytes from several threads and reports them from one: `tick` is what `in_parallel` polls."""

    def __init__(
        self,
        step: str = "",
        total: int = 0,
        report: Callable[[Progress], None] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.total = total
        self._step, self._report, self._poll = step, report, poll
        self._done: deque[int] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        """From any thread."""
        self._done.append(count)

    def tick(self) -> None:
        """Report, unless `poll` raises."""
        self._poll()
        while self._done:
            self._sum += self._done.popleft()
        if self._report is not None:
            self._report(Progress(self._step, self._sum, self.total))


def checksums(views: Sequence[torch.Tensor], on_device: Sequence[int], meter: Meter) -> list[int]:
    """A checksum of the row-major bytes of each view: CRC32s of its blocks, or a sum made on its device."""
    sums: list[torch.Tensor | int] = [
        st.device_sum(view) if device else 0 for view, device in zip(views, on_device)
    ]
    crcs: dict[tuple[int, int], int] = {}

    def checksum(place: tuple[int, int], buffer: Bytes, gate: st.Gate) -> None:
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


Views = Mapping[int, Sequence[tuple[Box, torch.Tensor]]]  # what a rank holds of each tensor, by index


def held_view(views: Views, tensor: int, box: Box) -> torch.Tensor:
    """The elements of a box, of which this rank holds the same or a larger one."""
    for held, view in views[tensor]:
        if held == box:
            return view
        if held.intersect(box) == box:
            return view[box.within(held)]
    raise AssertionError("planned to write what this rank does not hold")


def crcs_of(data: Bytes) -> list[int]:
    """The CRC32 of each unit."""
    return [st.crc32(data[at : at + st.UNIT_BYTES]) for at in range(0, len(data), st.UNIT_BYTES)]


def write_own_file(
    file: st.StoredFile,
    plan: CheckpointMetadata,
    index: int,
    views: Views,
    level: st.CompressionLevel,
    meter: Meter,
) -> list[object]:
    """Write all of a rank's own file but for its sync.

    Returns name, length, header bytes, header CRC32, piece lengths.
    """
    rows = plan.pieces.take(plan.pieces.file == index)
    packed, lengths = level is not st.CompressionLevel.NONE, None
    if packed:  # room for the header of the raw lengths, which are the most
        raw = rows.nbytes(plan.itemsizes())
        rows = rows._replace(begin=np.cumsum(raw) - raw, length=raw)
    rows = rows.take(np.argsort(rows.begin, kind="stable"))
    plan = dataclasses.replace(plan, pieces=rows)
    data_bytes = int(rows.begin[-1] + rows.length[-1]) if len(rows.begin) else 0
    header = st.encode_header(plan.entries(index), data_bytes)
    parts = [(begin, begin + n, held_view(views, t, box)) for t, begin, n, box in rows.boxes(plan.tensors)]
    if packed:
        crcs, stored = write_packed(file, len(header), parts, level, meter)
        rows = rows._replace(begin=np.cumsum(stored) - stored, length=stored)
        data_bytes, lengths = int(stored.sum()), st.pack_ints(stored)
        entries = dataclasses.replace(plan, pieces=rows).entries(index)
        header = st.encode_header(entries, data_bytes, len(header))
    else:
        file.resize(len(header) + data_bytes)
        crcs = write_raw(file, len(header), data_bytes, parts, meter)
    header = st.with_crcs(header, crcs)
    file.write(0, memoryview(header))
    return [plan.shards[index].file, len(header) + data_bytes, len(header), st.crc32(header), lengths]


def write_raw(
    file: st.StoredFile,
    start: int,
    data_bytes: int,
    parts: Sequence[tuple[int, int, torch.Tensor]],
    meter: Meter,
) -> list[int]:
    """Write parts (begin, end, elements), sorted, as the data of a file that begin at `start`.

    The CRC32 of each unit.
    """
    begins, ends, flats = [p[0] for p in parts], [p[1] for p in parts], [st.byte_view(p[2]) for p in parts]
    crcs: dict[int, list[int]] = {}

    def fill(low: int, out: Bytes) -> None:
        position, high, index = low, low + len(out), bisect.bisect_right(ends, low)
        while position < high:
            begin, end, view = parts[index]
            stop = min(high, begin if position < begin else end)
            part = out[position - low : stop - low]
            if position < begin:
                part[:] = 0  # a gap between entries
            elif (flat := flats[index]) is not None:
                part[:] = flat[position - begin : stop - begin]
            else:
                st.copy_out(view, position - begin, part)
            position = stop
            index += position == end

    def write_block(low: int, buffer: Bytes, gate: st.Gate) -> None:
        data = buffer[: min(st.BLOCK_BYTES, data_bytes - low)]
        inside = slice(bisect.bisect_right(ends, low), bisect.bisect_left(begins, low + len(data)))
        # A unit at a time stays in the processor's cache. But a copy from a device, or of strided memory,
        # takes as long for a unit as for a block: by units, six threads got 2.5 GB/s from an H100, not 21.
        step = len(data) if any(flat is None for flat in flats[inside]) else st.UNIT_BYTES
        crcs[low] = []
        for at in range(0, len(data), step):
            part = data[at : at + step]
            fill(low + at, part)
            crcs[low] += crcs_of(part)
        file.write(start + low, data.data)
        meter.add(len(data))

    blocks = range(0, data_bytes, st.BLOCK_BYTES)
    st.in_parallel(blocks, write_block, meter.tick, len(blocks))
    return [crc for low in blocks for crc in crcs[low]]


def write_packed(
    file: st.StoredFile,
    start: int,
    parts: Sequence[tuple[int, int, torch.Tensor]],
    level: st.CompressionLevel,
    meter: Meter,
) -> tuple[list[int], Ints]:
    """Write parts compressed, one frame right behind the other.

    The CRC32 of each unit, and the length of each frame.

    Frames are compressed on a few threads. A thread that asks for the next one first writes the oldest, so
    that they get into the file in order, and few wait in memory.
    """
    lengths, crcs, pending, position = list[int](), list[int](), bytearray(), start
    under_way: deque[Future[bytes]] = deque()

    def compress(item: tuple[Future[bytes], torch.Tensor], buffer: Bytes, gate: st.Gate) -> None:
        result, view = item
        try:
            st.copy_out(view, 0, raw := buffer[: view.nbytes])
            result.set_result(st.compress_frame(raw, view.dtype.itemsize, level))
            meter.add(len(raw))
        except BaseException as error:
            result.set_exception(error)
            raise

    def flush(least: int) -> None:
        nonlocal position
        while len(pending) >= least:
            block = bytes(pending[: st.BLOCK_BYTES])
            crcs.extend(crcs_of(np.frombuffer(block, np.uint8)))
            file.write(position, memoryview(block))
            position += len(block)
            del pending[: len(block)]

    def take_oldest() -> None:
        frame = under_way.popleft().result()
        lengths.append(len(frame))
        pending.extend(frame)
        flush(st.BLOCK_BYTES)

    def items() -> Iterator[tuple[Future[bytes], torch.Tensor]]:  # runs in one thread at a time
        for *_, view in parts:
            if len(under_way) == 2 * st.IO_THREADS:
                take_oldest()
            under_way.append(Future())
            yield under_way[-1], view
        while under_way:
            take_oldest()
        flush(1)

    st.in_parallel(items(), compress, meter.tick, len(parts))
    return crcs, np.array(lengths, np.int64)


class Segment(NamedTuple):
    """A part of a unit of a whole file: which rank gives it, and where it goes."""

    rank: int
    tensor: int
    common: Box  # of the tensor: what the rank gives
    inside: Box  # the box of the tensor whose row-major bytes lie in the unit from byte `at` on
    at: int


class WholeFile:
    """A file of whole tensors that ranks write together: each block by the rank that gives most of it.

    Every rank works out the same schedule. What an owner lacks is sent to it, a few blocks of every owner a
    round, so the extra memory is a few blocks a rank, whatever the size of the model: two-phase I/O (del
    Rosario, Bordawekar and Choudhary, 1993).
    """

    def __init__(
        self, op: Operation, plan: CheckpointMetadata, index: int, sources: Pieces, views: Views
    ) -> None:
        self.index, self._op, self._views = index, op, views
        shard, rows = plan.shards[index], plan.pieces.take(plan.pieces.file == index)
        self._start, self._data_bytes = shard.header_bytes, shard.length - shard.header_bytes
        self._dtypes = [st.DTYPES[t.dtype] for t in plan.tensors]
        self._rows = sorted((begin, begin + n, t, box) for t, begin, n, box in rows.boxes(plan.tensors))
        self._ends = [end for _, end, *_ in self._rows]
        self._givers: dict[int, list[tuple[Box, int]]] = {}
        for rank, (tensor, _, _, box) in zip(sources.file.tolist(), sources.boxes(plan.tensors)):
            self._givers.setdefault(tensor, []).append((box, rank))
        self._owned: list[list[int]] = [[] for _ in range(op.world_size)]
        for low in range(0, self._data_bytes, st.BLOCK_BYTES):
            given: Counter[int] = Counter(dict.fromkeys(range(op.world_size), 0))
            for segment in self._segments(low, min(self._data_bytes, low + st.BLOCK_BYTES)):
                given[segment.rank] += math.prod(segment.common.size) * self._dtypes[segment.tensor].itemsize
            self._owned[min(given, key=lambda rank: (-given[rank], len(self._owned[rank]), rank))].append(low)
        mine = self._owned[op.rank]
        self.nbytes = sum(
            min(st.BLOCK_BYTES, self._data_bytes - low) for low in mine
        )  # that this rank writes

    def _segments(self, low: int, high: int) -> Iterator[Segment]:
        """What bytes [low, high) of the data are made of."""
        for begin, end, tensor, piece in self._rows[bisect.bisect_right(self._ends, low) :]:
            if begin >= high:
                return
            width = self._dtypes[tensor].itemsize
            start, stop = (max(low, begin) - begin) // width, (min(high, end) - begin) // width
            for at, inside in st.row_boxes(piece.size, start, stop):
                for box, rank in self._givers[tensor]:
                    if (common := box.intersect(inside)) is not None:
                        yield Segment(rank, tensor, common, inside, begin + at * width - low)

    def write(self, file: st.StoredFile, meter: Meter) -> dict[str, object]:
        """Exchange and write.

        The CRC32s of the units of every block that this rank owns, by the block's first byte.

        What one round has gathered is written while the next one is exchanged.
        """
        crcs: dict[str, object] = {}
        most = max(map(len, self._owned), default=0)
        buffers = [st.aligned_buffer(st.BLOCK_BYTES) for _ in range(2 * min(most, ROUND_BLOCKS))]

        def write_block(item: tuple[int, Bytes], buffer: Bytes, gate: st.Gate) -> None:
            low, data = item
            crcs[str(low // st.BLOCK_BYTES)] = crcs_of(data)
            file.write(self._start + low, data.data)
            meter.add(len(data))

        with Background() as background:
            for first in range(0, most, ROUND_BLOCKS):
                owned = [blocks[first : first + ROUND_BLOCKS] for blocks in self._owned]
                received = self._op.exchange(self._outgoing(owned))
                filled = [
                    (low, self._put_together(low, data, received))
                    for low, data in zip(owned[self._op.rank], buffers)
                ]
                background.start(functools.partial(st.in_parallel, filled, write_block, most=2), meter.tick)
                buffers = buffers[len(buffers) // 2 :] + buffers[: len(buffers) // 2]
            background.finish(meter.tick)
        return crcs

    def _outgoing(self, owned: Sequence[Sequence[int]]) -> dict[int, Bytes]:
        """What the other ranks lack for their blocks, and this one gives."""
        parts: dict[int, list[Bytes]] = {}
        for owner, blocks in enumerate(owned):
            for low in blocks if owner != self._op.rank else ():
                for segment in self._segments(low, min(self._data_bytes, low + st.BLOCK_BYTES)):
                    if segment.rank == self._op.rank:
                        view = held_view(self._views, segment.tensor, segment.common)
                        parts.setdefault(owner, []).append(out := np.empty(view.nbytes, np.uint8))
                        st.copy_out(view, 0, out)
        return {owner: np.concatenate(data) for owner, data in parts.items()}

    def _put_together(self, low: int, buffer: Bytes, received: dict[int, Bytes]) -> Bytes:
        """A block that this rank owns, from its own pieces and from received bytes, which it consumes."""
        data = buffer[: min(st.BLOCK_BYTES, self._data_bytes - low)]
        data[:] = 0  # gaps between entries
        for rank, tensor, common, inside, at in self._segments(low, low + len(data)):
            dtype = self._dtypes[tensor]
            if rank == self._op.rank:
                part = held_view(self._views, tensor, common)
            else:
                taken, received[rank] = np.split(received[rank], [math.prod(common.size) * dtype.itemsize])
                part = torch.from_numpy(taken).view(dtype).view(common.size)
            area = torch.from_numpy(data[at : at + math.prod(inside.size) * dtype.itemsize])
            area.view(dtype).view(inside.size)[common.within(inside)].copy_(part)
        return data


class Background:
    """One piece of work at a time beside this thread; what it raises is raised here."""

    def __init__(self) -> None:
        self._work: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def start(self, work: Callable[[], None], poll: Callable[[], None]) -> None:
        """Once the work before is done."""
        self.finish(poll)
        self._work = in_thread(work)

    def finish(self, poll: Callable[[], None]) -> None:
        """Wait for the work; `poll` runs meanwhile, and may raise."""
        while self._work is not None and not self._work.done():
            wait([self._work], 0.05)
            poll()
        if self._work is not None:
            self._work.result()

    def __exit__(self, *exc: object) -> None:
        if self._work is not None:
            wait([self._work], st.STUCK_S)


# ----------------------------------------------------------------------------------------------------------
# Loading: L3 match and L4 read


class Target(NamedTuple):
    """Where stored bytes shall go.

    `box` of the stored tensor `tensor` (its index) into `view`, of the box's size.
    """

    tensor: int
    box: Box
    view: torch.Tensor
    alone: bool = False  # no other rank wants these bytes


class Fill(NamedTuple):
    """Bytes [low, high) of a file's data, as a target wants them of one piece, which begins at `begin`."""

    low: int
    high: int
    begin: int
    piece: Box
    dtype: torch.dtype
    frame_bytes: int  # what a compressed piece expands to; 0 where it is stored raw
    target: Target
    flat: Bytes | None  # the target's memory, where the whole piece goes there as it is

    def wanted(self) -> float:
        """How many of these bytes the target wants: where it has columns of a piece, its part of each row."""
        if self.flat is not None or (common := self.piece.intersect(self.target.box)) is None:
            return self.high - self.low
        sizes = self.piece.size
        steps = ((size - 1) * math.prod(sizes[dim + 1 :]) for dim, size in enumerate(common.size))
        span = math.prod(sizes) if self.frame_bytes else 1 + sum(steps)  # of which [low, high) is a part
        return (self.high - self.low) * math.prod(common.size) / span


class Read(NamedTuple):
    """Units [low, high) of a file's data, and the fills in them, in order.

    `high - low` is at most two blocks.
    """

    file: int
    low: int
    high: int
    fills: list[Fill]

    @property
    def nbytes(self) -> int:
        return self.high - self.low

    def alone(self) -> bool:
        """Whether to read it past the cache: at least three quarters of it are for this rank alone."""
        return 4 * sum(fill.wanted() for fill in self.fills if fill.target.alone) >= 3 * self.nbytes


class Superseded(CheckpointException):
    """The checkpoint was replaced while it was read: reading again finds the new one."""


R = TypeVar("R", bound="CheckpointReader")


class CheckpointReader:
    """Verified reads of one committed checkpoint: every byte that it gives has passed its unit's CRC32."""

    def __init__(self, storage: st.CheckpointStorage, metadata: CheckpointMetadata) -> None:
        self.storage, self.metadata = storage, metadata
        self._crcs: dict[int, list[int]] = {}
        self._files: dict[int, st.StoredFile] = {}
        self._lock = threading.Lock()
        self.meter = Meter()  # of long checks
        self._rows = np.searchsorted(metadata.pieces.tensor, np.arange(len(metadata.tensors) + 1)).tolist()
        self.stored: dict[
            str, dict[int | None, int]
        ] = {}  # name -> rank that it is kept for, None: all -> its index
        for index, t in enumerate(metadata.tensors):
            self.stored.setdefault(t.name, {})[t.rank] = index

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def find(self, name: str, rank: int) -> int | None:
        """The index of the copy of `name` that `rank` gets: the shared, its own, or the lowest rank's; None.

        None.
        """
        if not (held := self.stored.get(name)):
            return None
        if (index := held.get(None, held.get(rank))) is None:
            index = held[self.ranks(name)[0]]
        alias = self.metadata.tensors[index].alias_of
        return index if alias is None else alias

    def ranks(self, name: str) -> list[int]:
        """Ranks for which `name` is kept apart."""
        return sorted(rank for rank in self.stored.get(name, {}) if rank is not None)

    def is_superseded(self) -> bool:
        """Whether the checkpoint was overwritten or deleted since its record was read."""
        head = st.record_head(self.storage, self.metadata.prefix)
        return head is None or head.save_id != self.metadata.save_id

    def file(self, index: int) -> st.StoredFile:
        """An open tensor file."""
        path = self.metadata.shard_path(index)
        with self._lock:
            if index not in self._files:
                try:
                    self._files[index] = self.storage.open(path)
                except FileNotFoundError as error:
                    if self.is_superseded():
                        raise Superseded(f"{path}: replaced by a newer save while it was read") from error
                    raise st.corrupted(f"{path}: is missing", path) from error
            return self._files[index]

    def unit_crcs(self, index: int) -> list[int]:
        """The CRC32 of each unit of a file, from its header, which is checked."""
        if index not in self._crcs:
            info, path, file = self.metadata.shards[index], self.metadata.shard_path(index), self.file(index)
            if file.length() != info.length:
                raise st.corrupted(f"{path}: {file.length()} bytes, the record says {info.length}", path)
            header = bytearray(info.header_bytes)
            file.read(0, memoryview(header))
            if (crc := st.crc32(header)) != info.header_crc:
                raise st.corrupted(
                    f"{path}: header has CRC32 {crc:08x}, the record says {info.header_crc:08x}", path
                )
            try:
                self._crcs[index] = st.unit_crcs(bytes(header), info.length - info.header_bytes)
            except ValueError as error:
                raise st.corrupted(f"{path}: malformed header: {error}", path) from error
        return self._crcs[index]

    def check_header(self, index: int) -> None:
        """Whether a file's header says what the record says; CORRUPTED_CHECKPOINT if not."""
        info, path = self.metadata.shards[index], self.metadata.shard_path(index)
        crcs, header = self.unit_crcs(index), bytearray(info.header_bytes)
        self.file(index).read(0, memoryview(header))
        try:
            expected = st.encode_header(
                self.metadata.entries(index), info.length - info.header_bytes, info.header_bytes
            )
        except ValueError as error:
            raise st.corrupted(f"{path}: malformed header: {error}", path) from error
        if st.with_crcs(expected, crcs) != header:
            raise st.corrupted(f"{path}: its header describes other entries than the record", path)

    def pieces_of_file(self, index: int) -> list[int]:
        """The rows of the record that lie in a file."""
        return np.flatnonzero(self.metadata.pieces.file == index).tolist()

    def read_piece(self, row: int) -> torch.Tensor:
        """The elements of one piece, verified."""
        meta = self.metadata
        ((tensor, _, _, box),) = meta.pieces.take(np.array([row])).boxes(meta.tensors)
        out = torch.empty(box.size, dtype=st.DTYPES[meta.tensors[tensor].dtype])
        self.fill([Target(tensor, box, out)])
        return out

    def pieces(self, tensor: int, box: Box) -> list[tuple[int, int, int, Box]]:
        """Stored pieces of a tensor that overlap `box`: (file, begin, length, piece)."""
        table, (low, high) = self.metadata.pieces, self._rows[tensor : tensor + 2]
        ndim, rows, found = len(box.size), list(range(low, high)), []
        if high - low > 4 and ndim:
            start, size = table.box[low:high, 0, :ndim], table.box[low:high, 1, :ndim]
            first, count = np.array(box.offset), np.array(box.size)
            overlaps = ((start < first + count) & (start + size > first)).all(axis=1)
            rows = (np.flatnonzero(overlaps) + low).tolist()
        for row in rows:
            offset, extent = table.box[row].tolist()
            piece = Box(tuple(offset[:ndim]), tuple(extent[:ndim]))
            if piece == box or piece.intersect(box) is not None:
                found.append((int(table.file[row]), int(table.begin[row]), int(table.length[row]), piece))
        return found

    def _fills(self, target: Target) -> Iterator[tuple[int, Fill]]:
        """What a target wants, as (file, fill)."""
        meta, want = self.metadata.tensors[target.tensor], target.box
        dtype, width = st.DTYPES[meta.dtype], st.itemsize(meta.dtype)
        for file, begin, length, piece in self.pieces(target.tensor, want) if 0 not in want.size else ():
            nbytes = math.prod(piece.size) * width
            exact = piece == want and target.view.dtype == dtype
            flat, first, last = st.byte_view(target.view) if exact else None, 0, 0
            if piece == want or length < nbytes:
                span = (0, length)
            else:
                for at, size, start, count in zip(*piece, *want):  # in the piece's row-major order
                    low, high = max(0, start - at), min(size, start + count - at)
                    first, last = first * size + low, last * size + high - 1
                span = (first * width, (last + 1) * width)
            frame = nbytes if length < nbytes else 0
            yield file, Fill(begin + span[0], begin + span[1], begin, piece, dtype, frame, target, flat)

    def plan(self, targets: Iterable[Target]) -> list[Read]:
        """L3: which units to read, and what each is for; in the order of the files."""
        blocks: dict[tuple[int, int], list[Fill]] = {}
        for target in targets:
            for file, fill in self._fills(target):
                low = fill.low
                while low < fill.high:  # raw fills are cut where blocks end, frames are not
                    block = low // st.BLOCK_BYTES
                    high = fill.high if fill.frame_bytes else min(fill.high, (block + 1) * st.BLOCK_BYTES)
                    part = fill if (low, high) == fill[:2] else fill._replace(low=low, high=high)
                    blocks.setdefault((file, block), []).append(part)
                    low = high
        reads = list[Read]()
        for (file, _), fills in sorted(blocks.items()):
            info = self.metadata.shards[file]
            for fill in sorted(fills, key=lambda fill: (fill.low, fill.high)):
                low = fill.low // st.UNIT_BYTES * st.UNIT_BYTES
                high = min(-(-fill.high // st.UNIT_BYTES) * st.UNIT_BYTES, info.length - info.header_bytes)
                if reads and reads[-1].file == file and reads[-1].low <= low <= reads[-1].high:
                    if high <= reads[-1].low + 2 * st.BLOCK_BYTES:
                        reads[-1].fills.append(fill)
                        reads[-1] = reads[-1]._replace(high=max(high, reads[-1].high))
                        continue
                reads.append(Read(file, low, high, [fill]))
        return reads

    def fill(self, targets: Iterable[Target], buffer: Bytes | None = None) -> None:
        """Read into targets at once, in this thread. `buffer`: at least two blocks."""
        for read in self.plan(targets):
            buffer = np.empty(2 * st.BLOCK_BYTES, np.uint8) if buffer is None else buffer
            self.run(read, buffer, st.Gate(), Meter())

    def run(self, read: Read, buffer: Bytes, gate: st.Gate, meter: Meter) -> None:
        """L4 for some units: read, verify, and put into place.

        Optimisation (skip on first reading): what only this rank wants, and the page cache lacks, is read
        past it at once. Bytes that go to tensors as they are come a unit at a time, so that they are still in
        the processor's cache when they are checked and copied.
        """
        file, start = self.file(read.file), self.metadata.shards[read.file].header_bytes
        direct = (
            isinstance(file, st.LocalFile) and read.alone() and file.is_cold(start + read.low, read.nbytes)
        )
        by_units = not direct and all(fill.flat is not None and not fill.frame_bytes for fill in read.fills)
        step = st.UNIT_BYTES if by_units else read.nbytes
        for low in range(read.low, read.high, step):
            data = buffer[: min(read.high, low + step) - low]
            if direct and isinstance(file, st.LocalFile):
                file.read_directly(start + low, data.data)
            else:
                file.read(start + low, data.data)
            self.place(read, low, data, gate)
        meter.add(read.nbytes)

    def place(self, read: Read, low: int, data: Bytes, gate: st.Gate) -> None:
        """Verify units from byte `low` on, each before it is copied to where it belongs."""
        crcs, fills, first = self.unit_crcs(read.file), read.fills, 0

        def part_of(fill: Fill, begin: int, end: int) -> tuple[Bytes, int]:
            begin, end = max(begin, fill.low), min(end, fill.high)
            part = data[begin - low : end - low]
            if fill.frame_bytes:
                return st.expand_frame(part.tobytes(), fill.frame_bytes, fill.dtype.itemsize), 0
            return part, begin - fill.begin

        for begin in range(low, low + len(data), st.UNIT_BYTES):
            unit = data[begin - low : begin - low + st.UNIT_BYTES]
            if (crc := st.crc32(unit)) != crcs[begin // st.UNIT_BYTES]:
                raise self._damage(read.file, begin // st.UNIT_BYTES, crc)
            while first < len(fills) and fills[first].high <= begin:
                first += 1
            with gate:
                for fill in itertools.islice(fills, first, None):
                    if fill.low >= begin + len(unit):
                        break
                    if fill.high > begin and fill.flat is not None and not fill.frame_bytes:
                        put(fill, *part_of(fill, begin, begin + len(unit)))
        for fill in fills:  # what is expanded, cast, scattered or sent to a device: all of it at once
            if fill.flat is None or fill.frame_bytes:
                part = part_of(fill, low, low + len(data))
                with gate:
                    put(fill, *part)

    def check_block(self, index: int, low: int, buffer: Bytes) -> list[str]:
        """Read a block of a file; what is wrong with each of its units."""
        info, crcs = self.metadata.shards[index], self.unit_crcs(index)
        data = buffer[: min(st.BLOCK_BYTES, info.length - info.header_bytes - low)]
        file = self.file(index)
        getattr(file, "read_directly", file.read)(info.header_bytes + low, data.data)
        found = crcs_of(data)
        units = range(low // st.UNIT_BYTES, low // st.UNIT_BYTES + len(found))
        return [str(self._damage(index, unit, crc)) for unit, crc in zip(units, found) if crc != crcs[unit]]

    def _damage(self, index: int, unit: int, crc: int) -> CheckpointException:
        meta, low, path = self.metadata, unit * st.UNIT_BYTES, self.metadata.shard_path(index)
        rows = meta.pieces.take(meta.pieces.file == index)
        inside = rows.tensor[(rows.begin < low + st.UNIT_BYTES) & (rows.begin + rows.length > low)]
        names = [meta.tensors[tensor].name for tensor in np.unique(inside).tolist()]
        crcs = f"CRC32 {crc:08x}, expected {self.unit_crcs(index)[unit]:08x}"
        return st.corrupted(f"{path}: unit {unit} has {crcs}; it holds {st.some(names)}", path)

    def read_value(self, tensor: int) -> object:
        """A stored JSON value, still encoded."""
        meta = self.metadata.tensors[tensor]
        out = torch.empty(meta.shape, dtype=torch.uint8)
        self.fill([Target(tensor, whole_box(meta.shape), out)])
        return st.parse_json(out.numpy().tobytes(), meta.name)


def put(fill: Fill, part: Bytes, start: int) -> None:
    """Copy bytes of a fill's piece, from byte `start` of the piece on, to where the target wants them."""
    if fill.flat is not None:
        fill.flat[start : start + len(part)] = part
    else:
        st.copy_in(part, start, fill.dtype, fill.piece, fill.target.box, fill.target.view)


def read_once(op: Operation, reader: CheckpointReader, reads: Sequence[Read], meter: Meter) -> None:
    """L4, where every block is read by one of the ranks that need it, in turn, and sent to the others.

    A few a round.
    """
    mine: dict[tuple[int, int], list[Read]] = {}
    for read in reads:
        mine.setdefault((read.file, read.low // st.BLOCK_BYTES), []).append(read)
    spans = [(*key, min(r.low for r in found), max(r.high for r in found)) for key, found in mine.items()]
    columns = np.array(spans, np.int64).reshape(-1, 4).T
    needs: dict[
        tuple[int, int], tuple[int, int, list[int]]
    ] = {}  # by file and block: the span, and who needs it
    for rank, row in enumerate(op.gather([len(spans), *map(st.pack_ints, columns)])):
        count, *texts = as_list(row)
        for file, block, low, high in zip(*(st.unpack_ints(str(t), int(str(count))).tolist() for t in texts)):
            start, stop, ranks = needs.get((file, block), (low, high, []))
            needs[file, block] = min(start, low), max(stop, high), [*ranks, rank]
    order = sorted(needs)
    sender = {key: needs[key][2][n % len(needs[key][2])] for n, key in enumerate(order)}
    for first in range(0, len(order), 2 * ROUND_BLOCKS):
        batch, here = order[first : first + 2 * ROUND_BLOCKS], dict[tuple[int, int], Bytes]()

        def fetch(key: tuple[int, int], buffer: Bytes, gate: st.Gate) -> None:
            low, high, _ = needs[key]
            data = np.empty(high - low, np.uint8)
            reader.file(key[0]).read(reader.metadata.shards[key[0]].header_bytes + low, data.data)
            with gate:
                here[key] = data

        st.in_parallel([key for key in batch if sender[key] == op.rank], fetch, op.poll)
        outgoing: dict[int, list[Bytes]] = {}
        for key, data in sorted(here.items()):
            for rank in needs[key][2]:
                if rank != op.rank:
                    outgoing.setdefault(rank, []).append(data)
        received = op.exchange({rank: np.concatenate(parts) for rank, parts in outgoing.items()})
        for key in (key for key in batch if key in mine):
            low, high, _ = needs[key]
            if sender[key] != op.rank:
                here[key], received[sender[key]] = np.split(received[sender[key]], [high - low])
            for read in mine[key]:
                reader.place(read, read.low, here[key][read.low - low : read.high - low], st.Gate())
                meter.add(read.nbytes)
        meter.tick()
