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
            if op.world_size > 1:
                self._compare_replicas(op, asked, data, holdings)
            if holdings:
                plan, sources = lay_out(holdings, ticket, asked.format, op.world_size)
                self.storage.create(st.fence_name(plan.prefix, plan.save_id)).close()
                for index, shard in enumerate(plan.shards):
                    if shard.header_bytes:
                        with closing(self.storage.create(plan.shard_path(index))) as file:
                            file.resize(shard.length)
                if asked.compression is not st.CompressionLevel.NONE and plan.shards[0].header_bytes:
                    self.warnings.append(
                        f"{plan.shards[0].file} is not compressed: other readers could not read it"
                    )
                op.broadcast(pack_plan(plan, sources))
                return plan, sources
            return unpack_plan(op.broadcast(None), ticket, op.rank)

    def _compare_replicas(
        self, op: Operation, asked: SaveRequest, data: ShardData, holdings: Holdings | None
    ) -> None:
        """Checksum what several ranks hold. Copies that differ are then kept per rank or mesh."""
        rows, asks = np.empty(0, np.int64), list[list[object]]()
        if holdings:
            rows, on_device = holdings.replicas(asked.verify_replicas)
            members = holdings.members.take(rows)
            edges = np.searchsorted(members.rank, np.arange(op.world_size + 1)).tolist()
            for low, high in itertools.pairwise(edges):
                columns = (members.source[low:high], on_device[low:high])
                asks.append([high - low, *map(st.pack_ints, columns)])
        asked_of = as_list(op.broadcast(asks if len(rows) else []))
        if asked_of:
            count, *texts = as_list(asked_of[op.rank])
            sources, devices = (st.unpack_ints(str(text), int(str(count))).tolist() for text in texts)
            views = [view for t in data.tensors for _, view in t.pieces]
            sums = checksums([views[index] for index in sources], devices, Meter(poll=op.poll))
            answers = op.gather_at_0(sums)
            if holdings:
                found = itertools.chain.from_iterable(map(as_list, answers))
                holdings.keep_differing(rows, np.fromiter(found, np.uint64, len(rows)), self.warnings)
        if holdings:
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
    if sharded is None:
        return LocalTensor(name, code, shape, [(whole_box(shape), local)] if local.numel() else [])
    boxes = shard_boxes(name, sharded, tuple(local.shape)) if local.numel() else []
    all_of_it = whole_box(tuple(local.shape))
    pieces = [(box, local if part == all_of_it else local[part.within(all_of_it)]) for box, part in boxes]
    return LocalTensor(
        name, code, shape, pieces, mesh_ranks(sharded), any(p.is_replicate() for p in placements)
    )


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


Runs = list[tuple[int, int]]  # parts [begin, end) of one dimension, one behind the other in the local tensor
Cut = tuple[int, int, int, int]  # dimension, number of shards, which of them, split factor


def shard_boxes(name: str, tensor: DTensor, local_shape: Shape) -> list[tuple[Box, Box]]:
    """The boxes of a DTensor that this rank holds, each with its box in the local tensor.

    None outside of its mesh.

    Placements can be read in two ways: as torch cuts a tensor by them, and as FSDP2 makes them of a tensor-
    parallel one. Usually both give the same. CheckpointException where not exactly one result has the local
    shape.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    shape, readings = tuple(tensor.shape), list[list[Runs]]()
    for cuts in _cuts(tensor, coordinate):
        dims: list[Runs] = [[(0, size)] for size in shape]
        for dim, ways, index, split_factor in cuts:
            dims[dim] = _cut_runs(dims[dim], ways, index, split_factor)
        fits = local_shape == tuple(sum(end - begin for begin, end in runs) for runs in dims)
        if fits and dims not in readings:
            readings.append(dims)
    if len(readings) != 1:
        what = "fit two layouts of" if readings else "do not fit"
        raise CheckpointException(
            f"{name}: placements {tensor.placements} on a mesh of shape {tuple(tensor.device_mesh.shape)} "
            f"{what} "
            f"its shape {list(shape)} and local shape {list(local_shape)}; redistribute it to Shard() and "
            "Replicate() "
            "placements, or choose a size that divides evenly"
        )
    boxes = [(Box((), ()), Box((), ()))]
    for runs in readings[0]:
        starts = itertools.accumulate((end - begin for begin, end in runs), initial=0)
        parts = [(begin, start, end - begin) for (begin, end), start in zip(runs, starts)]
        boxes = [
            (
                Box((*whole.offset, begin), (*whole.size, size)),
                Box((*local.offset, start), (*local.size, size)),
            )
            for whole, local in boxes
            for begin, start, size in parts
        ]
    return boxes


def _cuts(tensor: DTensor, coordinate: Sequence[int]) -> Iterator[list[Cut]]:
    """The cuts that placements stand for, in their order.

    As torch applies them, and as FSDP2 has applied them.

    FSDP2 cuts what tensor parallelism has left, but its placement comes first, with the number of shards that
    it found as split factor. Torch cuts by such a placement group by group, with another result where sizes
    do not divide.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    declared = getattr(
        getattr(tensor, "_spec", None), "shard_order", None
    )  # from torch 2.10 on, where not the default
    order = [i for entry in declared for i in entry.mesh_dims] if declared else list(range(mesh.ndim))
    cuts = dict[int, Cut]()
    for i in order:
        if not placements[i].is_replicate():
            dim: int = getattr(placements[i], "dim")
            cuts[i] = (dim, mesh.size(i), coordinate[i], getattr(placements[i], "split_factor", 1))
    yield list(cuts.values())
    plain = [i for i, (_, _, _, split_factor) in cuts.items() if split_factor == 1]
    strided = [i for i in cuts if i not in plain]
    found = {i: math.prod(cuts[j][1] for j in plain if j > i and cuts[j][0] == cuts[i][0]) for i in strided}
    if strided and all(cuts[i][3] == found[i] for i in strided):
        yield [(*cuts[i][:3], 1) for i in plain + strided[::-1]]


def _cut_runs(runs: Runs, ways: int, index: int, split_factor: int) -> Runs:
    """Cut the elements of `runs` into `split_factor` groups, each of them into `ways` shards.

    Shard `index` of each.
    """

    def chunk(length: int, count: int, at: int) -> tuple[int, int]:  # as torch.chunk
        size = -(-length // count)
        return min(length, size * at), min(length, size * (at + 1))

    length, found = sum(end - begin for begin, end in runs), Runs()
    for group in range(min(split_factor, length)):
        first, last = chunk(length, split_factor, group)
        low, high = (first + at for at in chunk(last - first, ways, index))
        at = 0
        for begin, end in runs:
            part = begin + max(0, low - at), min(end, begin + high - at)
            at += end - begin
            if part[0] < part[1]:
                joined = bool(found) and found[-1][1] == part[0]
                found.append((found.pop()[0], part[1]) if joined else part)
    return found


def identity(view: torch.Tensor) -> tuple[object, ...]:
    """Equal for views of the same elements in the same order, and for no others."""
    flags = (view.is_conj(), view.is_neg())
    return (view.data_ptr(), view.device, view.dtype, tuple(view.shape), view.stride(), *flags)


def mark_tied(tensors: list[LocalTensor]) -> list[LocalTensor]:
    """Mark those that are the same views of the same memory as an earlier one: they are stored once."""
    seen: dict[object, str] = {}
    marked = []
    for item in tensors:
        if item.pieces:
            views = tuple((box, *identity(view)) for box, view in item.pieces)
            first = seen.setdefault((item.dtype, item.shape, views), item.name)
            item = item if first == item.name else item._replace(alias_of=first)
        marked.append(item)
    return marked


class ShardData(NamedTuple):
    """What S2 collects on a rank.

    Tensors and values, and an optimizer's steps that are numbers instead of tensors.
    """

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
    found = {}
    for t in data.tensors:
        number = index.get((t.name, None), index.get((t.name, min(t.mesh, default=op.rank))))
        if number is not None:
            found[number] = t.pieces
    return found


def in_model(name: str) -> bool:
    """Whether a stored name is that of an entry of the model's state."""
    return name.startswith(("model/", "model-values/"))


# ----------------------------------------------------------------------------------------------------------
# S3: the plan, made on rank 0 from every rank's description, in columns of numpy arrays


class Told(NamedTuple):
    """A tensor as a rank describes it."""

    name: str
    dtype: str
    shape: Shape
    alias_of: str
    per_rank: bool


def gather_holdings(op: Operation, data: ShardData) -> Holdings | None:
    """What all ranks hold, on rank 0; None elsewhere.

    Optimisation (skip on first reading): a rank whose tensors have the names and shapes of rank 0's leaves
    them out, as a digest tells. At 4,096 ranks of 1,000 tensors each that is 240 MB of 250.
    """
    digest = hashlib.sha256(st.dump_json(_told(data))).hexdigest()
    gathered = op.gather_at_0(describe(data, alike=op.broadcast(digest) == digest and op.rank > 0))
    return Holdings(list(map(Fields, gathered))) if op.rank == 0 else None


def _told(data: ShardData) -> list[list[object]]:
    """The tensors of a rank but for the lengths of values, which differ between ranks."""
    return [
        [t.name, t.dtype, [] if t.dtype == "JSON" else t.shape, t.alias_of or "", t.per_rank]
        for t in data.tensors
    ]


def describe(data: ShardData, alike: bool) -> dict[str, object]:
    """What a rank holds, for the planner. `alike`: its tensors are rank 0's."""
    held = [(n, box, view.is_cuda) for n, t in enumerate(data.tensors) for box, view in t.pieces]
    meshes = {mesh: number for number, mesh in enumerate(dict.fromkeys(t.mesh for t in data.tensors))}
    # An empty tensor has no box, but its shape counts.
    width = max((len(t.shape) for t in data.tensors), default=0)
    columns = {
        "tensor": np.array([n for n, _, _ in held], np.int64),
        "on_device": np.array([on_device for _, _, on_device in held], np.int64),
    }
    return {
        "tensors": None if alike else _told(data),
        "lengths": [t.shape[0] for t in data.tensors if t.dtype == "JSON"],
        "meshes": [[len(mesh), st.pack_ints(np.array(mesh, np.int64))] for mesh in meshes],
        "mesh": st.pack_ints(np.array([meshes[t.mesh] for t in data.tensors], np.int64)),
        "steps": dict(data.steps),
        "pieces": st.pack_table(columns, stack_boxes([box for _, box, _ in held], width)),
    }


def stack_boxes(boxes: Sequence[Box], least_width: int = 0) -> Ints:
    """Boxes as an array (rows, 2, dimensions), padded with offset 0 and size 1."""
    width = max([least_width, *(len(box.size) for box in boxes)])
    pads = [width - len(box.size) for box in boxes]
    rows = [(box.offset + (0,) * pad, box.size + (1,) * pad) for box, pad in zip(boxes, pads)]
    return np.array(rows, np.int64).reshape(len(boxes), 2, width)


class Rows(NamedTuple):
    """Pieces that ranks hold, in columns.

    Who (`rank`), as which of its pieces (`source`), of which tensor, and where.
    """

    rank: Ints
    source: Ints
    tensor: Ints
    mesh: Ints  # the lowest rank of the tensor's mesh, -1 for a plain tensor
    on_device: Ints  # 1: in the memory of a CUDA device
    box: Ints  # (rows, 2, dimensions)

    def take(self, index: Ints | npt.NDArray[np.bool_]) -> Rows:
        """The rows at `index`."""
        return Rows(*(column[index] for column in self))


class Table(NamedTuple):
    """The tensors that a rank has described, and the ranks of each one's mesh; () for a plain tensor."""

    tensors: list[Told]
    meshes: list[Shape]


class Holdings:
    """Every rank's description put together.

    One list of tensors, the rows of all their pieces, and which are equal.

    A name is one tensor for all ranks, unless it is in `apart`: then it is one for each rank, or mesh of
    ranks. Equal pieces (same tensor, same box) form a group: `members` are the rows group by group, each from
    its lowest rank on.
    """

    def __init__(self, descriptions: Sequence[Fields]) -> None:
        self._tables: list[Table] = []  # of each rank; one object where ranks have the same
        self._steps = [body.child("steps").all for body in descriptions]
        seen, rows = dict[bytes, Table](), list[tuple[Ints, Ints, Ints]]()
        for body in descriptions:
            own = body.all["tensors"]  # None: those of rank 0
            key = st.dump_json([body.array("lengths"), body.array("meshes"), body.text("mesh")])
            if own is not None or key not in seen:
                told = self._tables[0].tensors if own is None else list(map(_read_told, as_list(own)))
                lengths = iter(map(int, map(str, body.array("lengths"))))
                told = [t._replace(shape=(next(lengths),)) if t.dtype == "JSON" else t for t in told]
                meshes = [
                    tuple(st.unpack_ints(str(text), int(str(count))).tolist())
                    for count, text in map(as_list, body.array("meshes"))
                ]
                of_tensor = [meshes[n] for n in st.unpack_ints(body.text("mesh"), len(told)).tolist()]
                table = Table(told, of_tensor)
                if own is None or not self._tables:
                    seen[key] = table
            else:
                table = seen[key]
            self._tables.append(table)
            pieces = body.child("pieces")
            count = pieces.number("count")
            local, device = (st.unpack_ints(pieces.text(name), count) for name in ("tensor", "on_device"))
            rows.append((local, device, st.unpack_box(pieces, count)))
        counts, width = [len(box) for _, _, box in rows], max([1, *(box.shape[2] for _, _, box in rows)])
        boxes = np.zeros((sum(counts), 2, width), np.int64)
        boxes[:, 1] = 1
        for part, (_, _, box) in zip(np.split(boxes, np.cumsum(counts)), rows):
            part[:, :, : box.shape[2]] = box
        rank, source = (
            np.arange(len(counts)).repeat(counts),
            np.concatenate([np.arange(count) for count in counts]),
        )
        self._local = [local for local, _, _ in rows]
        nothing, on_device = np.zeros_like(rank), np.concatenate([device for _, device, _ in rows])
        self._held = Rows(rank, source, nothing, nothing, on_device, boxes)
        self._dropped = np.zeros(len(rank), bool)
        self.known, self.apart, several = self._compare({id(table): table for table in self._tables}.values())
        self.arrange(set())
        self.arrange(self._unlike_boxes(several))

    def _compare(self, tables: Iterable[Table]) -> tuple[dict[str, Told], set[str], dict[str, int]]:
        """The first description of each name; the names that ranks keep apart.

        The number of meshes of a name, if several.

        A tensor is tied if all ranks say so. CheckpointException where ranks cannot mean the same tensor by a
        name.
        """
        known, apart, of_mesh = dict[str, Told](), set[str](), dict[str, dict[Shape, Told]]()
        for t, mesh in itertools.chain(*(zip(*table) for table in tables)):
            first = known.setdefault(t.name, t)
            same = of_mesh.setdefault(t.name, {}).setdefault(mesh, t)
            if t.alias_of != first.alias_of:
                known[t.name] = first._replace(alias_of="")
            if mesh and (t.dtype, t.shape) != (same.dtype, same.shape):
                raise _disagreement(t.name, f"{same.dtype}{list(same.shape)}", f"{t.dtype}{list(t.shape)}")
            if (t.dtype, t.shape) != (first.dtype, first.shape) or t.per_rank:
                apart.add(t.name)
        several = {name: len(meshes) for name, meshes in of_mesh.items() if len(meshes) > 1}
        for name in several:
            seen: dict[int, Shape] = {}
            for mesh in of_mesh[name]:
                if other := next((seen[rank] for rank in mesh if rank in seen), ()):
                    raise _disagreement(name, f"a mesh of ranks {list(other)}", f"one of ranks {list(mesh)}")
                seen |= dict.fromkeys(mesh, mesh)
            if () in of_mesh[name]:
                plain = [rank for rank, table in enumerate(self._tables) if (name, ()) in _names(table)]
                raise _disagreement(
                    name, f"a plain tensor on rank(s) {st.some(plain)}", f"a DTensor on {sorted(seen)}"
                )
        return known, apart, several

    def _unlike_boxes(self, several: Mapping[str, int]) -> set[str]:
        """Of the tensors of several meshes, those that the meshes cut into different boxes.

        Each mesh keeps its own.
        """
        meshes = np.array([several.get(t.name, 0) for t in self.tensors], np.int64)
        inside = np.flatnonzero(meshes[self.members.tensor] > 0)
        pairs = np.unique(np.stack((self.of_member[inside], self.members.mesh[inside])), axis=1)
        found = np.bincount(pairs[0], minlength=len(self.start))
        unlike = np.flatnonzero((found > 0) & (found != meshes[self.members.tensor[self.start]]))
        return {
            self.tensors[index].name for index in np.unique(self.members.tensor[self.start[unlike]]).tolist()
        }

    def arrange(self, apart: set[str]) -> None:
        """Keep the tensors `apart`, and what is tied to them, for each rank or mesh.

        Tied tensors store no bytes.
        """
        self.apart |= apart | {t.name for t in self.known.values() if t.alias_of in apart}
        self.tensors: list[TensorMetadata] = []
        self._ids: dict[tuple[str, int | None], int] = {}  # by name, and the rank that it is kept for
        columns, meshes = list[Ints](), list[Ints]()
        shared: dict[
            int, tuple[Ints, Ints, list[int]]
        ] = {}  # what is the same for all ranks that have one table
        for rank, (table, local) in enumerate(zip(self._tables, self._local)):
            if id(table) not in shared:
                lowest = [min(mesh, default=-1) for mesh in table.meshes]
                ids = [self._number(t, low if low >= 0 else rank) for t, low in zip(table.tensors, lowest)]
                own = [n for n, t in enumerate(table.tensors) if t.name in self.apart and lowest[n] < 0]
                shared[id(table)] = np.array(ids, np.int64), np.array(lowest, np.int64), own
            common, low, own = shared[id(table)]
            column = common.copy()
            column[own] = [self._number(table.tensors[n], rank) for n in own]
            columns.append(column[local])
            meshes.append(low[local])
        model_first = sorted(
            range(len(self.tensors)), key=lambda n: not self.tensors[n].name.startswith("model")
        )
        self.tensors, moved = [self.tensors[n] for n in model_first], np.argsort(model_first)
        for index, t in enumerate(self.tensors):
            if (target := self._ids.get((self.known[t.name].alias_of, t.rank))) is not None:
                self.tensors[index] = t._replace(alias_of=int(moved[target]))
        stored = np.array([t.alias_of is None for t in self.tensors], bool)
        self.itemsize = np.array([st.itemsize(t.dtype) for t in self.tensors], np.int64)
        rows = self._held._replace(tensor=moved[np.concatenate(columns)], mesh=np.concatenate(meshes))
        rows = rows.take(stored[rows.tensor] & ~self._dropped)
        flat = rows.box.reshape(len(rows.box), math.prod(rows.box.shape[1:])).T
        self.members = rows.take(np.lexsort((*flat[::-1], rows.tensor)))  # stable: within a group by rank
        tensor, box, first = self.members.tensor, self.members.box, np.ones(len(rows.tensor), bool)
        first[1:] = (tensor[1:] != tensor[:-1]) | (box[1:] != box[:-1]).any(axis=(1, 2))
        self.start = np.flatnonzero(first)
        self.count = np.diff(self.start, append=len(first))
        self.of_member = np.arange(len(self.count)).repeat(self.count)

    def _number(self, told: Told, owner: int) -> int:
        """The index of a tensor, added at first sight. `owner`.

        The rank that it is kept for, if it is kept apart.
        """
        own = owner if told.name in self.apart else None
        index = self._ids.setdefault((told.name, own), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(TensorMetadata(told.name, told.dtype, told.shape, own))
        return index

    def replicas(self, verify: bool) -> tuple[Ints, Ints]:
        """Which members are to be checksummed, by rank and source, and 1 for those on the device.

        That is every copy, or unless `verify` those of values and of the optimizer's steps, which tell
        whether ranks are at the same step.
        """
        small = (verify or t.dtype == "JSON" or bool(_STEP.fullmatch(t.name)) for t in self.tensors)
        chosen = np.fromiter(small, bool, len(self.tensors))
        asked = np.flatnonzero((self.count > 1)[self.of_member] & chosen[self.members.tensor])
        on_device = np.minimum.reduceat(self.members.on_device, self.start) if len(self.start) else self.start
        asked = asked[np.lexsort((self.members.source[asked], self.members.rank[asked]))]
        return asked, on_device[self.of_member[asked]]

    def keep_differing(self, asked: Ints, sums: npt.NDArray[np.uint64], warnings: list[str]) -> None:
        """Keep apart what differs between plain tensors, or between meshes.

        Within a mesh the lowest rank's copy is kept.
        """
        members, of_member, apart = self.members, self.of_member, set[str]()
        found = np.zeros(len(of_member), np.uint64)
        found[asked] = sums
        one_mesh = (
            of_member * (int(members.mesh.max(initial=0)) + 2) + members.mesh + 1
        )  # of a group, on one mesh
        _, first, inverse = np.unique(one_mesh, return_index=True, return_inverse=True)
        reference = first[inverse]
        declared = dict[str, list[int]]()  # by name: ranks whose copy differs from their mesh's lowest
        for row in np.flatnonzero(found != found[reference]).tolist():
            name = self.tensors[members.tensor[row]].name
            if members.mesh[row] < 0:
                apart.add(name)
            else:
                declared.setdefault(name, []).append(int(members.rank[row]))
                self._dropped[np.searchsorted(self._held.rank, members.rank[row]) + members.source[row]] = (
                    True
                )
        between = np.flatnonzero(found[reference] != found[self.start[of_member]])
        apart |= {self.tensors[index].name for index in np.unique(members.tensor[between]).tolist()}
        for name, ranks in declared.items():
            what = (
                f"rank(s) {st.some(sorted(set(ranks)), 20)} from the lowest of their mesh, whose copy is kept"
            )
            warnings.append(f"{name}: copies that its placement declares equal differ: {what}")
        if apart or declared:
            self.arrange(apart)

    def check_steps(self) -> None:
        """An optimizer's step of a parameter is the same on all ranks, unless the parameter itself is kept
        apart.
        """
        at, differing = dict[str, object](), {m[1] for name in self.apart if (m := _STEP.fullmatch(name))}
        for steps in self._steps:
            differing |= {name for name, step in steps.items() if at.setdefault(name, step) != step}
        # A parameter that several optimizers hold is named <optimizer>/<parameter>.
        wrong = sorted(
            p for p in differing if not {f"model/{p}", f"model/{p.partition('/')[2]}"} & self.apart
        )
        if wrong:
            raise CheckpointException(
                f"ranks are at different optimizer steps of {st.some(wrong)}: has a rank skipped a step, or "
                "a save? Bring all ranks to one step, by loading the last checkpoint or restarting, first"
            )

    def check_complete(self) -> None:
        """Every tensor's pieces must make up the whole of it, each element once; else VALIDATION_FAILED."""
        tensor, box = self.members.tensor[self.start], self.members.box[self.start]
        wrong = st.not_covered_once(
            tensor, box, [t.shape if t.alias_of is None else None for t in self.tensors]
        )
        if wrong:
            t, held = self.tensors[wrong[0]], int(box[tensor == wrong[0], 1].prod(axis=1).sum())
            raise CheckpointException(
                f"{t.name}: the ranks together hold {held} elements of its {math.prod(t.shape)}, with holes "
                f"or overlaps (and {len(wrong) - 1} more tensors so): save with all ranks of its mesh, and "
                "the same parallelism on each",
                type=ExceptionType.VALIDATION_FAILED,
            )

    def share_out(self, world_size: int) -> Pieces:
        """One writer for every byte (I1): the only holder, else all holders an equal part.

        `file` is the writer's rank.

        Replicas of less than two parts go whole to the holder with the least to write.
        """
        rows = self.members.take(self.start)
        nbytes = rows.box[:, 1].prod(axis=1) * self.itemsize[rows.tensor]
        load = np.bincount(rows.rank, nbytes * (self.count == 1), world_size).tolist()
        writer, cuts = rows.rank.copy(), list[tuple[int, int, int, int]]()
        for group in np.flatnonzero(self.count > 1).tolist():
            start, size = int(self.start[group]), int(nbytes[group])
            holders = self.members.rank[start : start + int(self.count[group])].tolist()
            dim = int(np.argmax(rows.box[group, 1] > 1)) if size >= 2 * SPLIT_BYTES else 0
            length = int(rows.box[group, 1, dim])
            ways = min(len(holders), length, size // SPLIT_BYTES) if size >= 2 * SPLIT_BYTES else 1
            if ways > 1:
                holders = sorted(holders, key=load.__getitem__)[:ways]
                edges = [length * part // ways for part in range(ways + 1)]
                cuts += [(group, rank, low, high - low) for rank, low, high in zip(holders, edges, edges[1:])]
                for rank, low, high in zip(holders, edges, edges[1:]):
                    load[rank] += size * (high - low) / length
            else:
                writer[group] = rank = min(holders, key=load.__getitem__)
                load[rank] += size
        whole = np.ones(len(writer), bool)
        whole[[group for group, *_ in cuts]] = False
        groups, ranks, lows, sizes = np.array(cuts, np.int64).reshape(-1, 4).T
        box, at = rows.box[groups], np.arange(len(groups))
        dims = np.argmax(box[:, 1] > 1, axis=1)
        box[at, 0, dims] += lows
        box[at, 1, dims] = sizes
        tensor = np.concatenate((rows.tensor[whole], rows.tensor[groups]))
        boxes = np.concatenate((rows.box[whole], box))
        return Pieces(tensor, np.concatenate((writer[whole], ranks)), tensor * 0, tensor * 0, boxes)


_STEP = re.compile("optimizer/(.+)/step")  # where a torch optimizer keeps the number of a parameter's updates


def _names(table: Table) -> Iterator[tuple[str, Shape]]:
    return ((t.name, mesh) for t, mesh in zip(table.tensors, table.meshes))


def _read_told(row: object) -> Told:
    name, dtype, shape, alias_of, per_rank = as_list(row)
    return Told(str(name), str(dtype), st.int_tuple(shape), str(alias_of), per_rank is True)


def _disagreement(name: str, one: str, other: str) -> CheckpointException:
    what = "give it the same layout on all of them, or another name"
    message = f"{name}: ranks disagree: {one} against {other}; {what}"
    return CheckpointException(message, type=ExceptionType.VALIDATION_FAILED)


_NONE: Ints = np.empty(0, np.int64)
NO_PIECES = Pieces(_NONE, _NONE, _NONE, _NONE, np.empty((0, 2, 0), np.int64))


def lay_out(
    holdings: Holdings, ticket: CheckpointMetadata, form: CheckpointFormat, world_size: int
) -> tuple[CheckpointMetadata, Pieces]:
    """The plan: the record but for lengths and CRCs; and of whole files which rank gives which box (`file`.

    A rank).
    """
    holdings.check_complete()
    tensors, rows, sources = list(holdings.tensors), holdings.share_out(world_size), NO_PIECES
    shards, whole, packed = list[st.ShardMetadata](), set[int](), ticket.compression != "none"
    if form is not CheckpointFormat.MULTI_SHARD:
        whole = set(range(len(tensors)))
        if form is CheckpointFormat.CONSOLIDATED:
            whole = st.in_model_file(tensors)
        inside = np.isin(rows.tensor, list(whole))
        sources, rows = rows.take(inside), rows.take(~inside)
        if form is CheckpointFormat.CONSOLIDATED:
            for number in whole:  # a tied name gets a copy of its own
                if (origin := tensors[number].alias_of) is not None:
                    copy = sources.take(sources.tensor == origin)
                    sources = join(sources, copy._replace(tensor=np.full_like(copy.tensor, number)))
                    tensors[number] = tensors[number]._replace(alias_of=None)
        part = "model" if form is CheckpointFormat.CONSOLIDATED else ""
        shards.append(st.ShardMetadata(st.whole_file_name(ticket.save_id, part), 0, 0, 0))
    if form is not CheckpointFormat.SINGLE_FILE:
        rows = rows._replace(file=rows.file + len(shards))
        names = (st.own_file_name(ticket.save_id, rank, world_size) for rank in range(world_size))
        shards += [st.ShardMetadata(name, 0, 0, 0) for name in names]
    itemsizes = np.array([st.itemsize(t.dtype) for t in tensors], np.int64)
    if packed:
        rows = cut_up(rows, itemsizes, st.BLOCK_BYTES)
    else:
        rows = place(rows, tensors, itemsizes)
    stored = [n for n in sorted(whole) if tensors[n].alias_of is None and 0 not in tensors[n].shape]
    if stored:
        index, boxes = np.array(stored, np.int64), [whole_box(tensors[n].shape) for n in stored]
        pieces = Pieces(index, index * 0, index * 0, index * 0, stack_boxes(boxes, rows.box.shape[2]))
        rows = join(place(pieces, tensors, itemsizes), rows)
    rows = rows._replace(box=rows.box[:, :, : max((len(t.shape) for t in tensors), default=0)])
    rows = rows.take(np.lexsort((*rows.box[:, 0].T[::-1], rows.tensor)))
    plan = dataclasses.replace(ticket, shards=tuple(shards), tensors=tuple(tensors), pieces=rows)
    if form is not CheckpointFormat.MULTI_SHARD:
        data_bytes = int((rows.begin + rows.length)[rows.file == 0].max(initial=0))
        header = st.encode_header(plan.entries(0), data_bytes)
        shards[0] = shards[0]._replace(length=len(header) + data_bytes, header_bytes=len(header))
        plan = dataclasses.replace(plan, shards=tuple(shards))
    return plan, sources


def join(one: Pieces, other: Pieces) -> Pieces:
    """The rows of both."""
    return Pieces(*map(np.concatenate, zip(one, other)))


def place(rows: Pieces, tensors: Sequence[TensorMetadata], itemsizes: Ints) -> Pieces:
    """Lay the pieces of every file one behind the other: the model's first, then wide elements first.

    So every entry is aligned to its element size, since each of the two sections starts on 16 bytes.
    """
    nbytes = rows.nbytes(itemsizes)
    section = np.array([not t.name.startswith("model") for t in tensors], np.int64)[rows.tensor]
    order = (
        *rows.box[:, 0].T[::-1],
        rows.tensor,
        nbytes < SMALL_BYTES,
        -itemsizes[rows.tensor],
        section,
        rows.file,
    )
    by_place = np.lexsort(order)
    rows, section, nbytes = rows.take(by_place), section[by_place], nbytes[by_place]
    first = np.ones(len(nbytes), bool)
    first[1:] = rows.file[1:] != rows.file[:-1]
    of_file = np.cumsum(first) - 1
    model_bytes = np.bincount(of_file, nbytes * (1 - section)).astype(np.int64)
    begin = np.cumsum(nbytes) - nbytes
    begin += (-model_bytes % 16)[of_file] * section - begin[np.flatnonzero(first)][of_file]
    return rows._replace(begin=begin, length=nbytes)


def cut_up(rows: Pieces, itemsizes: Ints, most: int) -> Pieces:
    """Cut pieces of more than `most` bytes, between rows of their first dimension, then of the next."""
    for dim in range(rows.box.shape[2]):
        nbytes, size = rows.nbytes(itemsizes), rows.box[:, 1, dim]
        step = np.maximum(1, most * size // np.maximum(1, nbytes))
        ways = np.where(nbytes > most, -(-size // step), 1)
        number = np.arange(ways.sum()) - (np.cumsum(ways) - ways).repeat(ways)
        rows, step, size = rows.take(np.arange(len(ways)).repeat(ways)), step.repeat(ways), size.repeat(ways)
        cut = ways.repeat(ways) > 1
        rows.box[cut, 0, dim] += (number * step)[cut]
        rows.box[cut, 1, dim] = np.minimum(step, size - number * step)[cut]
    return rows


def pack_plan(plan: CheckpointMetadata, sources: Pieces) -> dict[str, object]:
    """The plan for the other ranks."""
    columns = {"file": sources.file, "tensor": sources.tensor}
    return {**st.encode_tables(plan), "sources": st.pack_table(columns, sources.box)}


def unpack_plan(packed: object, ticket: CheckpointMetadata, rank: int) -> tuple[CheckpointMetadata, Pieces]:
    """The plan with the rows of whole files and of this rank's own; and who gives which box to whole files.

    Takes memory for one column of all rows at a time.
    """
    body = Fields(packed)
    files = [(str(name), st.int_tuple(numbers[:2])) for name, *numbers in map(as_list, body.array("files"))]
    shards = tuple(st.ShardMetadata(name, length, header, 0) for name, (length, header) in files)
    own = len(shards) - ticket.world_size + rank if len(shards) >= ticket.world_size else -1
    wanted = [n for n, shard in enumerate(shards) if shard.header_bytes or n == own]
    table, sources = body.child("pieces"), body.child("sources")
    count = table.number("count")
    mine = np.isin(st.unpack_ints(table.text("file"), count), wanted)

    def column(name: str) -> Ints:
        return st.unpack_ints(table.text(name), count)[mine]

    plan = dataclasses.replace(
        ticket,
        shards=shards,
        tensors=st.decode_tensors(body.array("tensors")),
        pieces=Pieces(
            column("tensor"),
            column("file"),
            column("begin"),
            column("length"),
            st.unpack_box(table, count)[mine],
        ),
    )
    given = sources.number("count")
    ranks, tensor = (st.unpack_ints(sources.text(name), given) for name in ("file", "tensor"))
    return plan, Pieces(tensor, ranks, tensor * 0, tensor * 0, st.unpack_box(sources, given))


# ----------------------------------------------------------------------------------------------------------
# S4: writing


class Progress(NamedTuple):
    """How far a save or load has come on this rank.

    `step` is "S4 write" or "L4 read". At its end `bytes_done` equals `bytes_total`.
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
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count bytes. Any thread may call it."""
        with self.lock:
            self.done += count

    def tick(self) -> None:
        """Report the progress. `poll` runs first, and may raise."""
        self.poll()
        if self.report is not None:
            self.report(Progress(self.step, self.done, self.total))


def checksums(views: Sequence[torch.Tensor], on_device: Sequence[int], meter: Meter) -> list[int]:
    """A checksum of the row-major bytes of each view.

    A CRC32 of CRC32s, or where asked, a sum made on its device.
    """
    rows = [
        [0] * (0 if device else -(-view.nbytes // st.BLOCK_BYTES)) for view, device in zip(views, on_device)
    ]

    def checksum(place: tuple[int, int], buffer: Bytes, gate: st.Gate) -> None:
        index, block = place
        view, start = views[index], block * st.BLOCK_BYTES
        stop = min(start + st.BLOCK_BYTES, view.nbytes)
        if (flat := st.byte_view(view)) is None:
            st.copy_out(view, start, flat := buffer[: stop - start])
            start, stop = 0, stop - start
        rows[index][block] = st.crc32(flat[start:stop])

    places = [(index, block) for index, row in enumerate(rows) for block in range(len(row))]
    st.in_parallel(places, checksum, meter.tick, len(places))
    on_devices = [st.device_sum(view) if device else None for view, device in zip(views, on_device)]
    return [
        st.crc32(np.array(row, np.uint32)) if device is None else int(device) % (1 << 64)
        for row, device in zip(rows, on_devices)
    ]


Views = Mapping[int, Sequence[tuple[Box, torch.Tensor]]]  # the boxes that a rank holds of each tensor

FEW = 8  # A block with at most so many pieces is processed a unit at a time, which keeps it in the cache.


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
) -> list[object]:
    """Write this rank's own file, except for its sync.

    Returns its name, length, header bytes and header CRC32, and for a compressed file the packed lengths of
    its pieces.
    """
    rows = plan.pieces.take(plan.pieces.file == index)
    lengths = None if level is st.CompressionLevel.NONE else rows.nbytes(plan.itemsizes())

    def header_of(least_bytes: int = 0) -> tuple[bytes, int]:
        data_bytes = int((rows.begin + rows.length).max(initial=0))
        entries = dataclasses.replace(plan, pieces=rows).entries(index)
        return st.encode_header(entries, data_bytes, least_bytes), data_bytes

    if lengths is not None:  # the header with the raw lengths is the longest: reserve space for it
        rows = rows._replace(begin=np.cumsum(lengths) - lengths, length=lengths)
    rows = rows.take(np.argsort(rows.begin, kind="stable"))
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
    packed = None if lengths is None else st.pack_ints(lengths)
    return [plan.shards[index].file, len(header) + data_bytes, len(header), st.crc32(header), packed]


def write_raw(
    file: st.StoredFile, start: int, begins: list[int], views: Sequence[torch.Tensor], meter: Meter
) -> list[int]:
    """Write a file's data, which start at byte `start`, and return the CRC32 of each unit.

    The bytes of `views[n]` go to byte `begins[n]` of the data. `begins` is sorted.
    """
    ends, flats = [begin + view.nbytes for begin, view in zip(begins, views)], list(map(st.byte_view, views))
    data_bytes, crcs = max(ends, default=0), dict[int, list[int]]()

    def write_block(low: int, buffer: Bytes, gate: st.Gate) -> None:
        data = buffer[: min(st.BLOCK_BYTES, data_bytes - low)]
        inside = range(bisect.bisect_right(ends, low), bisect.bisect_left(begins, low + len(data)))
        # A copy from a device, or of strided memory, takes as long for a unit as for a block: by units, six
        # threads copied 2.5 GB/s from an H100, not 21.
        by_units = len(inside) <= FEW and all(flats[n] is not None for n in inside)
        crcs[low] = []
        for at in range(low, low + len(data), step := st.UNIT_BYTES if by_units else len(data)):
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
    until all frames before it are in the file.
    """
    lengths, crcs, pending, turn = list[int](), list[int](), bytearray(), threading.Condition()

    def write_frame(number: int, buffer: Bytes, gate: st.Gate) -> None:
        view, frame = views[number], b""
        try:
            st.copy_out(view, 0, raw := buffer[: view.nbytes])
            frame = st.compress_frame(raw, view.dtype.itemsize, level)
            meter.add(len(raw))
        finally:  # Without its turn, after an error too, the other threads would wait forever.
            with turn:
                turn.wait_for(lambda: len(lengths) == number)
                turn.notify_all()
                lengths.append(len(frame))
                pending.extend(frame)
                while len(pending) >= st.BLOCK_BYTES or (pending and len(lengths) == len(views)):
                    data = np.frombuffer(bytes(pending[: st.BLOCK_BYTES]), np.uint8)
                    file.write(start + len(crcs) * st.UNIT_BYTES, data.data)
                    crcs.extend(crcs_of(data))
                    del pending[: len(data)]

    st.in_parallel(range(len(views)), write_frame, meter.tick, len(views))
    return crcs, np.array(lengths, np.int64)


# A part of a whole file's block: the rank that gives it, its bytes, tensor and box. Then where it goes: the
# box of the tensor whose row-major bytes lie in the block, and the byte of the block at which they begin.
Segment = tuple[int, int, int, Box, Box, int]
Part = tuple[torch.Tensor, Box, Box, int]  # the elements of a segment, and its last three fields


class WholeFile:
    """A file of whole tensors that ranks write together: each block by the rank that gives most of it.

    Every rank computes the same schedule. A rank receives the parts of its blocks that other ranks hold, a
    few blocks of every rank a round. So the extra memory is a few blocks a rank, whatever the size of the
    model: two-phase I/O (del Rosario, Bordawekar and Choudhary, 1993).
    """

    def __init__(
        self, op: Operation, plan: CheckpointMetadata, index: int, sources: Pieces, views: Views
    ) -> None:
        self.index, self._op, self._views = index, op, views
        shard, rows = plan.shards[index], plan.pieces.take(plan.pieces.file == index)
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

    def write(self, file: st.StoredFile, meter: Meter) -> dict[str, object]:
        """Exchange and write this rank's blocks. Collective.

        Returns the CRC32s of the units of each block, by the block's number. The blocks of a round are
        written while the parts of the next round are exchanged.
        """
        crcs: dict[str, object] = {}

        def write_block(block: tuple[int, list[Part]], buffer: Bytes, gate: st.Gate) -> None:
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
                    elements = torch.from_numpy(data).view(self._dtypes[tensor]).view(box.size)
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
    alone: bool = False  # no other rank needs these bytes


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
    flat: Bytes | None  # the target's memory, if the piece is copied there as it is
    alone: float  # how much of these bytes this rank needs and no other: from 0 to 1


class Read(NamedTuple):
    """Units [low, high) of a file's data, at most two blocks, and the fills in them, in order."""

    file: int
    low: int
    high: int
    fills: list[Fill]

    @property
    def nbytes(self) -> int:
        return self.high - self.low

    def alone(self) -> bool:
        """Whether at least three quarters of these bytes are for this rank alone."""
        return 4 * sum(fill.alone * (fill.high - fill.low) for fill in self.fills) >= 3 * self.nbytes


class Superseded(CheckpointException):
    """The checkpoint was replaced while it was read. Another try reads the new one."""


class CheckpointReader:
    """Verified reads of one committed checkpoint: every byte that it returns has passed its unit's CRC32."""

    def __init__(self, storage: st.CheckpointStorage, metadata: CheckpointMetadata) -> None:
        self.storage, self.metadata = storage, metadata
        self._crcs: dict[int, list[int]] = {}
        self._files: dict[int, st.StoredFile] = {}
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

    def file(self, index: int) -> st.StoredFile:
        """Return an open tensor file."""
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
        """Return the CRC32 of each unit of a file, from its header. CORRUPTED_CHECKPOINT if it is damaged."""
        if index not in self._crcs:
            info, file = self.metadata.shards[index], self.file(index)
            with self._blaming(index):  # a file shorter than the record says fails its reads
                file.read(0, memoryview(header := bytearray(info.header_bytes)))
                crc, expected = st.crc32(header), info.header_crc
                st.require(crc == expected, f"header has CRC32 {crc:08x}, the record says {expected:08x}")
                self._crcs[index] = st.unit_crcs(bytes(header), info.length - info.header_bytes)
        return self._crcs[index]

    def check_header(self, index: int) -> None:
        """Check that a file's header says what the record says; CORRUPTED_CHECKPOINT if not."""
        info, crcs = self.metadata.shards[index], self.unit_crcs(index)
        with self._blaming(index):
            entries, data_bytes = self.metadata.entries(index), info.length - info.header_bytes
            expected = st.with_crcs(st.encode_header(entries, data_bytes, info.header_bytes), crcs)
            # The header itself has this CRC32, as `unit_crcs` has checked.
            same = st.crc32(expected) == info.header_crc
            st.require(same, "its header describes other entries than the record")

    @contextmanager
    def _blaming(self, index: int) -> Iterator[None]:
        """Turn a ValueError into CORRUPTED_CHECKPOINT that names the file."""
        path = self.metadata.shard_path(index)
        try:
            yield
        except ValueError as error:
            raise st.corrupted(f"{path}: {error}", path) from error

    def pieces_of_file(self, index: int) -> list[int]:
        """Return the rows of the record that lie in a file."""
        return np.flatnonzero(self.metadata.pieces.file == index).tolist()

    def read_piece(self, row: int) -> torch.Tensor:
        """Return the elements of one piece, verified."""
        ((tensor, _, _, box),) = self.metadata.pieces.take(slice(row, row + 1)).boxes(self.metadata.tensors)
        return self._read(tensor, box)

    def read_value(self, tensor: int) -> object:
        """Return a stored JSON value, still encoded."""
        meta = self.metadata.tensors[tensor]
        text = self._read(tensor, whole_box(meta.shape)).numpy().tobytes()
        return st.parse_json(text, meta.name)

    def _read(self, tensor: int, box: Box) -> torch.Tensor:
        view = torch.empty(box.size, dtype=st.DTYPES[self.metadata.tensors[tensor].dtype], device="cpu")
        self.fill([Target(tensor, box, view)])
        return view

    def _fills(self, target: Target) -> Iterator[Fill]:
        """Yield what a target needs of each piece. Raw pieces are cut where blocks end, frames are not."""
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
            first, last = 0, 0  # needed elements, in the piece's row-major order
            for at, size, start, count in zip(*piece, *common):
                first, last = first * size + start - at, last * size + start - at + count - 1
            low, high, frame_bytes = begin + first * width, begin + (last + 1) * width, 0
            cuts = range((low // st.BLOCK_BYTES + 1) * st.BLOCK_BYTES, high, st.BLOCK_BYTES)
            if length < (raw_bytes := math.prod(piece.size) * width):
                low, high, frame_bytes, cuts = begin, begin + length, raw_bytes, range(0)
            alone = target.alone * math.prod(common.size) * width / (frame_bytes or high - low)
            exact = piece == want and target.view.dtype == dtype
            flat = st.byte_view(target.view) if exact else None
            for start, stop in itertools.pairwise([low, *cuts, high]):
                yield Fill(file, start, stop, begin, piece, dtype, frame_bytes, target, flat, alone)

    def plan(self, targets: Iterable[Target]) -> list[Read]:
        """L3: return which units to read, and what each is for. In the order of the files and their bytes.

        A read begins and ends in one block; only a frame may reach into the next one.
        """
        reads, fills = list[Read](), [fill for target in targets for fill in self._fills(target)]
        for fill in sorted(fills, key=lambda fill: fill[:3]):
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
        are read without the cache. Of bytes in the page cache a unit is read, verified and copied at a time,
        so that it is still in the processor's cache. That does not pay off for small pieces, nor for bytes
        that are expanded, cast, scattered or sent to a device.
        """
        file, start = self.file(read.file), self.metadata.shards[read.file].header_bytes
        fetch, step = file.read, read.nbytes
        if isinstance(file, st.LocalFile) and read.alone() and file.is_cold(start + read.low, read.nbytes):
            fetch = file.read_directly
        elif len(read.fills) <= FEW and not any(fill.flat is None or fill.frame_bytes for fill in read.fills):
            step = st.UNIT_BYTES
        for low in range(read.low, read.high, step):
            data = buffer[: min(read.high - low, step)]
            fetch(start + low, data.data)
            self.place(read, low, data, gate)
        meter.add(read.nbytes)

    def place(self, read: Read, low: int, data: Bytes, gate: st.Gate) -> None:
        """Verify units, which begin at byte `low` of the file's data. Then copy them to the targets.

        CORRUPTED_CHECKPOINT if one is damaged; then nothing of `data` is copied.
        """
        for problem in self.damage(read.file, low, data):
            raise st.corrupted(problem, self.metadata.shard_path(read.file))
        with gate:
            for fill in read.fills:
                first, last = max(0, fill.low - low), fill.high - low
                if last <= 0 or first >= len(data):
                    continue
                part, at = data[first:last], low + first - fill.begin
                if fill.frame_bytes:
                    part, at = st.expand_frame(part.tobytes(), fill.frame_bytes, fill.dtype.itemsize), 0
                if fill.flat is None:
                    st.copy_in(part, at, fill.dtype, fill.piece, fill.target.box, fill.target.view)
                else:
                    fill.flat[at : at + len(part)] = part

    def check_block(self, index: int, low: int, buffer: Bytes) -> list[str]:
        """Read the block that begins at byte `low` of a file's data. Return what is wrong with each unit."""
        info, file = self.metadata.shards[index], self.file(index)
        data = buffer[: min(st.BLOCK_BYTES, info.length - info.header_bytes - low)]
        getattr(file, "read_directly", file.read)(info.header_bytes + low, data.data)
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
    """L4 where each block is read by one of the ranks that need it, and sent to the others. Collective.

    A round moves a few blocks. The ranks that need a block take turns in reading it.
    """
    mine: dict[tuple[int, int], list[Read]] = {}
    for read in reads:
        mine.setdefault((read.file, read.low // st.BLOCK_BYTES), []).append(read)
    spans = np.array([read[:3] for read in reads], np.int64).reshape(-1, 3).T
    needs: dict[tuple[int, int], tuple[int, int, list[int]]] = {}  # by block: bytes [low, high), and ranks
    for rank, row in enumerate(op.gather([len(reads), *map(st.pack_ints, spans)])):
        count, *columns = as_list(row)
        for file, low, high in zip(*(st.unpack_ints(str(c), int(str(count))).tolist() for c in columns)):
            start, stop, ranks = needs.get(block := (file, low // st.BLOCK_BYTES), (low, high, []))
            needs[block] = min(start, low), max(stop, high), sorted({*ranks, rank})
    order, sender = sorted(needs), {b: ranks[sum(b) % len(ranks)] for b, (_, _, ranks) in needs.items()}
    for first in range(0, len(order), 2 * ROUND_BLOCKS):
        batch, found = order[first : first + 2 * ROUND_BLOCKS], dict[tuple[int, int], Bytes]()

        def fetch(block: tuple[int, int], buffer: Bytes, gate: st.Gate) -> None:
            low, high, _ = needs[block]
            data = np.empty(high - low, np.uint8)
            reader.file(block[0]).read(reader.metadata.shards[block[0]].header_bytes + low, data.data)
            found[block] = data

        st.in_parallel([block for block in batch if sender[block] == op.rank], fetch, op.poll)
        outgoing: dict[int, list[Bytes]] = {}
        for block in sorted(found):
            for rank in set(needs[block][2]) - {op.rank}:
                outgoing.setdefault(rank, []).append(found[block])
        received = op.exchange({rank: np.concatenate(parts) for rank, parts in outgoing.items()})
        for block in (block for block in batch if block in mine):
            low, high, _ = needs[block]
            if (rank := sender[block]) != op.rank:
                found[block], received[rank] = np.split(received[rank], [high - low])
            for read in mine[block]:
                reader.place(read, read.low, found[block][read.low - low : read.high - low], st.Gate())
                meter.add(read.nbytes)
        meter.tick()
