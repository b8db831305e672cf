"""Ranks: who writes and reads which bytes, and how all of them agree that it happened.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file does not import ckpt)

The save protocol (`CheckpointCoordinator.coordinate_save`); the checkpoint exists from the rename in S6 on:

    step        | who    | what                                                             | a crash leaves
    S1 agree    | all    | same prefix and options on every rank; rank 0 draws the save id  | nothing
    S2 collect  | each   | state dicts -> pieces held by this rank (`LocalTensor`)          | nothing
    S3 plan     | all    | replicas compared; rank 0 plans who writes what, raises the fence | the fence, orphan shards
    S4 write    | each   | its blocks, checksummed in the same pass, fsync                  | orphan shards
    S5 report   | all    | lengths and CRCs to rank 0                                       | orphan shards
    S6 commit   | rank 0 | headers of shared files, fsync directories, record, RENAME, fsync | old or new, whole
    S7 announce | all    | every rank learns; then superseded shards and old checkpoints go | extra files

The load protocol (`CheckpointLoader.coordinate_load`):

    L1 record · L2 validate · L3 plan · L4 read (only what is needed, verified, straight into place) · L5 agree

Invariants, cited where they are upheld:
    I1  A block has exactly one writer.
    I2  Every byte that a record names is fsynced, and its directory entry too, before the record is renamed.
    I3  No file of the old checkpoint is touched before the new one is committed.
    I4  Whoever gives a save up removes its fence first, then looks at the record: the storage decides (`settle`).
    I5  A failure on one rank ends the operation on all of them with that rank's error (`Operation.step`).

In this order below: the two protocols, step by step; `Operation` and the coordinators, on which they stand; then what the
steps do: what a rank holds (S2), the plan (S3), writing (S4), reading (L3, L4).
"""

from __future__ import annotations

import bisect
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

if TYPE_CHECKING or __package__:
    from . import ckpt_storage as st
    from .ckpt_storage import Box, Bytes, CheckpointException, ExceptionType, Fields, Ints, Shape
else:
    import ckpt_storage as st
    from ckpt_storage import Box, Bytes, CheckpointException, ExceptionType, Fields, Ints, Shape

__all__ = [
    "CheckpointCoordinator", "CheckpointFormat", "CheckpointLoader", "CheckpointReader", "DistributedCoordinator",
    "FaultToleranceHandler", "LocalCoordinator", "Progress", "RetryPolicy", "ShardData", "TorchCoordinator",
]  # fmt: skip

GRACE_S = 1.0  # past a deadline, for the living to say that they are: so that only the missing are named
STORE_BYTES = 4 << 20  # the most in one value: over twice that, a TCPStore drops the connection
CACHE_BYTES = 256 << 10  # what is copied and checksummed at a time: it stays in the second-level cache
T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# --------------------------------------------------------------------------------------------------------------------
# The save protocol


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

    @property
    def packed(self) -> bool:
        """Whether anything is compressed."""
        return self.compression is not st.CompressionLevel.NONE

    def claim(self) -> dict[str, object]:
        """As a value to compare between ranks."""
        told = {"format": self.format.value, "compression": self.compression.value, "contents": list(self.contents)}
        return {"verb": "save", **vars(self), **told, "custom_metadata": dict(self.custom_metadata)}


def demand_equal(claims: Sequence[object]) -> None:
    """ValueError that names the first difference between what the ranks ask for."""
    first = claims[0]
    for rank, claim in enumerate(claims):
        if claim != first and isinstance(claim, dict) and isinstance(first, dict):
            key = next((k for k in [*first, *claim] if first.get(k) != claim.get(k)), "?")
            raise ValueError(
                f"ranks disagree about {key}: rank 0 has {first.get(key)!r}, rank {rank} has {claim.get(key)!r}"
            )


class Ticket(NamedTuple):
    """The outcome of S1."""

    prefix: str
    save_id: str
    sequence: int


class Report(NamedTuple):
    """What a rank tells rank 0 in S5, as JSON."""

    model: list[tuple[int, int]]  # the blocks that it wrote of CONSOLIDATED's model file, and their CRC32s
    shard: st.ShardMetadata | None  # its own file, else:
    crcs: list[int]  # of the blocks of its part of the file that ranks share
    end: int  # of the data in that part
    placed: list[tuple[int, Shape]]  # where its entries came to lie, and their frames, where they are compressed


class SaveResult(NamedTuple):
    """A committed save."""

    prefix: str
    warnings: list[str]
    bytes_written: int  # by this rank
    size_bytes: int  # of the whole checkpoint; 0 where not known, which is on other ranks than 0


class CheckpointCoordinator:
    """Runs S1 to S7 on one rank. `warned`: sets of names that a warning has said to be kept per rank."""

    def __init__(
        self, coordinator: DistributedCoordinator, storage: st.CheckpointStorage, keep_last: int | None = None,
        warned: set[tuple[str, ...]] | None = None,
    ) -> None:  # fmt: skip
        self.coordinator, self.storage, self.keep_last = coordinator, storage, keep_last
        self.warned = set() if warned is None else warned

    def coordinate_save(
        self, op: Operation, request: Callable[[], SaveRequest], collect: Callable[[], ShardData]
    ) -> SaveResult:
        """Save what `collect` returns on every rank. Collective; blocks until committed and announced.

        `OperationFailed` on all ranks if nothing was committed, with this save's files removed again. Once S6 has renamed
        the record, the save has succeeded, whatever happens to a rank: what goes wrong then is a warning.
        """
        attempt = _Attempt(self, op)
        try:
            attempt.agree(request)
            attempt.collect(collect)
            attempt.plan()
            attempt.write()
            attempt.report()
            attempt.commit()
            attempt.announce()
        except BaseException as error:
            if not attempt.settle() or not isinstance(error, Exception):
                raise
            attempt.warnings.append(f"committed, but not every rank may know: {error}")
        finally:
            attempt.release()
        return SaveResult(attempt.ticket.prefix, attempt.warnings, attempt.bytes_written, attempt.size_bytes)


class _Attempt:
    """One try at a save: the seven steps, and what they hold in common on this rank."""

    # What the steps leave to those after them, on every rank:
    request: SaveRequest  # S1
    ticket = Ticket("", "", 0)  # S1
    _data: ShardData  # S2
    _pieces: list[tuple[Box, torch.Tensor]]  # S2: this rank's pieces, in the order of `describe`
    _order: Fields  # S3: what rank 0 has this rank do
    _sources: list[Source]  # S3: what it writes into its part of a file
    _gathering: Gathering | None = None  # S3: CONSOLIDATED's model file
    _report: Report  # S4
    bytes_written = 0  # S4
    _committed = False  # S6, elsewhere than on rank 0: S7
    # And on rank 0 alone:
    _plan: SavePlan  # S3
    _fence: st.StoredFile | None = None  # S3
    _shared: Draft | None = None  # S3: the files that ranks share
    _model: Draft | None = None
    _reports: list[Report]  # S5
    size_bytes = 0  # S6

    def __init__(self, parent: CheckpointCoordinator, op: Operation) -> None:
        self.storage, self.keep_last, self._warned = parent.storage, parent.keep_last, parent.warned
        self.op = op
        self.warnings: list[str] = []
        self._created: list[str] = []  # S3, S4: tensor files, to be removed after a failure
        self._superseded: list[str] = []  # S6: those of the old checkpoint, to be removed in S7

    # S1
    def agree(self, request: Callable[[], SaveRequest]) -> None:
        with self.op.step("S1 agree"):
            self.request = request()
            demand_equal(self.op.gather(self.request.claim()))
            drawn = Fields(self.op.broadcast(self._draw_ticket()._asdict() if self.op.rank == 0 else None))
            self.ticket = Ticket(drawn.text("prefix"), drawn.text("save_id"), drawn.number("sequence"))

    def _draw_ticket(self) -> Ticket:
        warn, prefix, heads = self.warnings.append, self.request.prefix, list[tuple[str, int] | None]()
        taken = st.recorded_prefixes(self.storage, warn)
        for other in taken:
            with nullcontext() if other == prefix else st.skipping(other, warn):
                heads.append(st.record_head(self.storage, other))
        # An unreadable record may have this number or a higher one: readable again, it may count as newer.
        sequence = max((head[1] for head in heads if head is not None), default=0)
        if prefix is None:
            now = datetime.datetime.now(datetime.timezone.utc).strftime("checkpoint_%Y%m%d_%H%M%S")
            names = itertools.chain([now], (f"{now}_{count}" for count in itertools.count(1)))
            prefix = next(name for name in names if name not in taken)
        elif prefix in taken and not self.request.overwrite:
            raise CheckpointException(f"checkpoint {prefix!r} exists, and overwrite=False", prefix)
        return Ticket(prefix, secrets.token_hex(4), sequence + 1)

    # S2
    def collect(self, collect: Callable[[], ShardData]) -> None:
        with self.op.step("S2 collect"), no_garbage_collection():
            data = collect()
            tensors = [t._replace(mesh=self.op.own_ranks(t.mesh)) for t in data.tensors]
            # A rank outside of a DTensor's mesh has nothing to tell of it.
            data = data._replace(tensors=mark_tied([t for t in tensors if not t.mesh or self.op.rank in t.mesh]))
            self._data, self._pieces = data, [piece for t in data.tensors for piece in t.pieces]
            for text, _ in data.values.values():
                self._pieces.append((Box((0,), (len(text),)), torch.frombuffer(bytearray(text), dtype=torch.uint8)))

    # S3
    def plan(self) -> None:
        with self.op.step("S3 plan"), no_garbage_collection():
            first = describe(self._data) if self.op.rank == 0 else None
            reference = self.op.broadcast(first[1] if first else None)
            description, _ = first or describe(self._data, str(reference))
            gathered = self.op.collect_at_0(st.dump_json(description))
            holdings = Holdings(gathered) if self.op.rank == 0 else None
            if self.op.world_size > 1:
                self._compare_replicas(holdings)
            orders = self._lay_out(holdings) if holdings else []
            order = self._order = Fields(json.loads(self.op.hand_out(orders)))
            self._sources = []
            for meta, box, (piece, begin) in read_rows(order, "source", "begin"):
                held, view = self._pieces[piece]
                entry = draft_entry(meta, box, begin, self.request.packed)
                view = view if held == box else view[box.within(held)]
                self._sources.append(Source(entry, view, st.byte_view(view)))
            if order.all["model"] is not None:
                rows = read_rows(order.child("model"), "begin", "rank", "source")
                self._gathering = Gathering(self.op, self._pieces, rows)

    def _compare_replicas(self, holdings: Holdings | None) -> None:
        """Checksum what several ranks hold. Copies that differ are then kept per rank or mesh. `holdings`: on rank 0."""
        asked, asks = np.empty(0, np.int64), list[bytes]()
        if holdings:
            asked, on_device = holdings.replicas(self.request.verify_replicas)
            members = holdings.groups.members.take(asked)
            edges = np.searchsorted(members.rank, np.arange(self.op.world_size + 1)).tolist()
            for low, high in itertools.pairwise(edges):
                columns = {"source": members.source[low:high], "on_device": on_device[low:high]}
                runs = {name: st.encode_runs(column) for name, column in columns.items()}
                asks.append(st.dump_json({**runs, "count": high - low, "any": len(asked) > 0}))
        ask = Fields(json.loads(self.op.hand_out(asks)))
        if ask.all["any"]:
            sources, on_device = (st.decode_runs(ask.array(k), ask.number("count")) for k in ("source", "on_device"))
            views = [self._pieces[index][1] for index in sources.tolist()]
            sums = checksums(views, on_device.tolist(), Meter(poll=self.op.poll))
            answers = self.op.collect_at_0(st.dump_json(sums))
            if holdings:
                found = itertools.chain.from_iterable(map(json.loads, answers))
                holdings.keep_differing(asked, np.fromiter(found, np.uint64, len(asked)), self.warnings)
        if holdings:
            holdings.check_steps()

    def _lay_out(self, holdings: Holdings) -> list[bytes]:
        """Plan, raise the fence, make the files that ranks share; what each rank needs to know to write its bytes."""
        plan = self._plan = plan_layout(holdings, self.request.format, self.op.world_size)
        self._fence = self.storage.create(st.fence_name(self.ticket.prefix, self.ticket.save_id))
        common: dict[str, object] = {"shared": None, "model": None}
        if plan.shared:
            self._shared = self._draft_shared(plan)
            common["shared"] = self._make(self._shared)
        if plan.model_rows is not None:
            self._model = self._draft_model(plan)
            common["model"] = {**self._make(self._model), **_model_order(plan, plan.model_rows)}
            if self.request.packed:
                self.warnings.append("the consolidated model file is not compressed: others could not read it")
        return [st.dump_json({**common, **plan.order(rank)}) for rank in range(self.op.world_size)]

    def _draft_shared(self, plan: SavePlan) -> Draft:
        entries = []
        for index, row, begin in zip(plan.rows.tensor.tolist(), plan.rows.box.tolist(), plan.begin.tolist()):
            tensor = plan.tensors[index]
            entries.append(draft_entry(tensor, _box(row, len(tensor.shape)), begin, self.request.packed))
        name = st.shared_name(self.ticket.save_id, "" if plan.model_rows is None else "rest")
        return draft_file(name, entries, self.op.world_size)

    def _draft_model(self, plan: SavePlan) -> Draft:
        entries = []
        for index, begin, _ in plan.model_entries:
            tensor = plan.tensors[index]
            entry = draft_entry(tensor, whole_box(tensor.shape), begin, packed=False)
            entries.append(entry._replace(name=tensor.name.removeprefix("model/")))
        return draft_file(st.shared_name(self.ticket.save_id, "model"), entries)

    def _make(self, draft: Draft) -> dict[str, object]:
        """Create a file that ranks share; what they need to know of it."""
        with self._create(draft):
            return {"file": draft.name, "start": len(draft.header)}

    @contextmanager
    def _create(self, draft: Draft) -> Iterator[st.StoredFile]:
        self._created.append(f"{self.ticket.prefix}/{draft.name}")
        with closing(self.storage.create(self._created[-1])) as file:
            file.resize(len(draft.header) + data_end(draft.entries))
            yield file

    @contextmanager
    def _open(self, name: str) -> Iterator[st.StoredFile]:
        """A file that ranks share; what is written into it is durable at the end (I2)."""
        with closing(self.storage.open(f"{self.ticket.prefix}/{name}", write=True)) as file:
            yield file
            file.sync()

    # S4
    def write(self) -> None:
        with self.op.step("S4 write"):
            order, entries = self._order, [s.entry for s in self._sources]
            total = sum(e.end - e.begin for e in entries)
            if entries and not self.request.packed:
                total = entries[-1].end - entries[0].begin  # and what lies between them
            total += self._gathering.nbytes if self._gathering is not None else 0
            meter = self.op.meter(total)
            model, shard, crcs, moved = dict[int, int](), None, list[int](), list[st.Entry]()
            if self._gathering is not None:
                told = order.child("model")
                with self._open(told.text("file")) as file:
                    model = self._gathering.write(file, told.number("start"), meter)
            if order.all["shared"] is None:
                draft = draft_file(st.shard_name(self.ticket.save_id, self.op.rank, self.op.world_size), entries)
                with self._create(draft) as file:
                    crcs, moved = self._write_part(file, len(draft.header), meter)
                    shard = draft.finish(file, crcs, moved)
                    file.sync()  # I2
            elif entries:
                told = order.child("shared")
                with self._open(told.text("file")) as file:
                    crcs, moved = self._write_part(file, told.number("start"), meter)
            places, end = [(e.begin, e.frames) for e in moved], data_end(moved or entries)
            crcs = [] if shard else crcs
            self._report = Report(list(model.items()), shard, crcs, end, places)
            meter.tick()
            self.bytes_written = total

    def _write_part(self, file: st.StoredFile, start: int, meter: Meter) -> tuple[list[int], list[st.Entry]]:
        """This rank's part of a file: the CRCs of its blocks, and its entries where compression has moved them."""
        if self.request.packed:
            return write_packed(file, start, self._sources, meter, self.request.compression)
        return write_raw(file, start, self._sources, meter), []

    # S5
    def report(self) -> None:
        with self.op.step("S5 report"):
            self._reports = [Report(*json.loads(text)) for text in self.op.collect_at_0(st.dump_json(self._report))]

    # S6
    def commit(self) -> None:
        with self.op.step("S6 commit"), no_garbage_collection():
            if self.op.rank == 0:
                metadata = self._metadata(self._finish_shards())
                self.size_bytes, record = metadata.size_bytes(), st.encode_record(metadata)
                self.storage.sync_directory(f"{self.ticket.prefix}/x")  # I2: the shards' names
                assert self._fence is not None
                self._fence.write(0, memoryview(record))
                self._fence.sync()
                files = st.shard_files(self.storage, self.ticket.prefix)
                old = st.committed_id(self.storage, self.ticket.prefix)
                self._superseded = [name for name in files if st.save_of(name) == old]
                self._rename()
                self._warn_of_kept()

    def _rename(self) -> None:
        """The instant of commit. A rename that reports an error may have happened: the record tells."""
        prefix, target = self.ticket.prefix, st.record_name(self.ticket.prefix)
        try:
            self.storage.publish(st.fence_name(prefix, self.ticket.save_id), target, self.request.overwrite)
        except OSError as error:
            if not self._is_recorded(error):
                if isinstance(error, FileExistsError):
                    raise CheckpointException(f"checkpoint {prefix!r} exists, and overwrite=False", prefix) from error
                raise
        self._committed = self.op.past_return = True
        try:
            self.storage.sync_directory(target)
        except OSError as error:
            self._superseded = []  # the rename may not be durable: the old checkpoint must stay whole
            self.warnings.append(f"committed, but its directory could not be synced: {error}")

    def _warn_of_kept(self) -> None:
        """Name what is kept per rank because ranks differ; once for the same names."""
        kept = {t.name for t in self._plan.tensors if t.rank is not None} - {"rng/state", "optimizer/state"}
        if kept and (names := tuple(sorted(kept))) not in self._warned:
            self._warned.add(names)
            self.warnings.append(
                f"differ between ranks, or meshes of ranks, and are kept for each: {st.some(names, 20)}"
            )

    def _is_recorded(self, doubt: OSError) -> bool:
        prefix = self.ticket.prefix
        try:
            return st.committed_id(self.storage, prefix) == self.ticket.save_id
        except (OSError, CheckpointException):
            message = f"{doubt}; the record cannot be read back either, so {prefix!r} may have been committed"
            raise OSError(message) from doubt

    def _finish_shards(self) -> list[st.ShardMetadata]:
        """Write the headers of shared files; the list of shards for the record."""
        plan, shards = self._plan, [st.ShardMetadata(*report.shard) for report in self._reports if report.shard]
        places = [place for report in self._reports for place in report.placed]  # in the order of the plan's rows
        if places:
            self._plan = plan._replace(begin=np.array([begin for begin, _ in places], np.int64))
        if self._model is not None:
            crcs = dict(pair for report in self._reports for pair in report.model)
            with self._open(self._model.name) as file:
                shards.append(self._model.finish(file, [crcs[block] for block in range(len(crcs))], []))
        if self._shared is not None:
            moved = [placed(entry, *place) for entry, place in zip(self._shared.entries, places)]
            end = data_end(moved or self._shared.entries)
            with self._open(self._shared.name) as file:
                shards.append(self._shared.finish(file, self._shared_crcs(end), moved))
        return shards

    def _shared_crcs(self, end: int) -> list[int]:
        """CRCs of all blocks of the file that ranks share: behind each one's part lie zeros as far as the next one's."""
        crcs, zeros = list[int](), bytes(st.BLOCK_BYTES)
        zeros_crc = st.crc32(zeros)
        for report, stop in zip(self._reports, self._plan.bases[1:]):
            crcs += report.crcs
            if report.crcs and (gap := min(stop, end) - report.end) > 0:
                crcs[-1] = st.crc32(memoryview(zeros)[: gap % st.BLOCK_BYTES], crcs[-1])
                crcs += [zeros_crc] * (gap // st.BLOCK_BYTES)
        return crcs

    def _metadata(self, shards: Sequence[st.ShardMetadata]) -> st.CheckpointMetadata:
        request = self.request
        tensors, pieces = self._plan.record()
        return st.CheckpointMetadata(
            self.ticket.prefix, self.ticket.save_id, self.ticket.sequence, self.op.world_size, request.format.value,
            request.compression.value, torch.__version__, datetime.datetime.now(datetime.timezone.utc).isoformat(),
            request.custom_metadata, tuple(shards), tuple(tensors), pieces,
        )  # fmt: skip

    # S7
    def announce(self) -> None:
        with self.op.step("S7 announce"):
            self.op.broadcast(self._committed)
            self._committed = True
            if self.op.rank == 0:
                st.delete_files(self.storage, self.ticket.prefix, self._superseded)  # I3: only now
                self._retain()

    def _retain(self) -> None:
        if self.keep_last is not None:
            found = st.list_committed(self.storage, self.warnings.append)
            others = [m for m in found if m.prefix != self.ticket.prefix]
            for meta in others[: max(0, len(others) + 1 - self.keep_last)]:
                st.delete_committed(self.storage, meta.prefix)

    # After a failure
    def settle(self) -> bool:
        """I4: whether the save was committed after all; if not, no trace of it stays, and it cannot commit any more."""
        if self._committed:
            return True
        prefix, save_id = self.ticket.prefix, self.ticket.save_id
        if not save_id:
            return False
        try:
            self.storage.delete(st.fence_name(prefix, save_id))
            if st.committed_id(self.storage, prefix) == save_id:
                return True
            st.delete_files(self.storage, prefix, self._created)
        except (OSError, CheckpointException) as error:  # the first failure matters more; `gc` finds the rest
            self.warnings.append(f"could not clean up after the failed save: {error}")
        return False

    def release(self) -> None:
        """Let go of the fence's lock."""
        try:
            if self._fence is not None:
                self._fence.close()
        except OSError as error:  # the outcome stands already
            self.warnings.append(f"closing the record failed: {error}")


def read_rows(order: Fields, *names: str) -> Iterator[tuple[st.TensorMetadata, Box, list[int]]]:
    """The rows of an order: the tensor, its box, and the values of the columns `names`."""
    tensors = st.decode_tensors(order.child("tensors"))
    columns, boxes = st.decode_table(order.child("rows"), ("tensor", *names))
    for index, *numbers, row in zip(*(column.tolist() for column in columns), boxes.tolist()):
        yield tensors[index], _box(row, len(tensors[index].shape)), numbers


def _model_order(plan: SavePlan, held: Rows) -> dict[str, object]:
    """The rows for `Gathering`: for each entry of the model file in turn, who holds what of its tensor."""
    tensor, begin, of = np.array(plan.model_entries, np.int64).reshape(-1, 3).T
    held = held.take(np.argsort(held.tensor, kind="stable"))
    low, high = (np.searchsorted(held.tensor, of, side) for side in ("left", "right"))
    rows = held.take(np.concatenate([np.arange(0), *map(np.arange, low, high)]))
    entry = np.arange(len(of)).repeat(high - low)
    columns = {"tensor": entry, "begin": begin[entry], "rank": rows.rank, "source": rows.source}
    tables = st.encode_tensors([plan.tensors[index] for index in tensor.tolist()])
    return {"tensors": tables, "rows": st.encode_table(columns, rows.box)}


# --------------------------------------------------------------------------------------------------------------------
# The load protocol

RESHARDING_STRATEGIES = ("parallel", "sequential", "broadcast")
RELAYED_BLOCKS = 8  # a round: so many are read by some rank, sent, and put into place


def committed(storage: st.CheckpointStorage, prefix: str) -> tuple[bytes, st.CheckpointMetadata]:
    """`st.read_committed_record`, with LOAD_FAILED where there is no checkpoint of this name."""
    try:
        return st.read_committed_record(storage, prefix)
    except FileNotFoundError as error:
        known = ", ".join(st.recorded_prefixes(storage)[-5:]) or "none"
        message = f"there is no checkpoint {prefix!r}; the last ones here: {known}"
        raise CheckpointException(message, prefix, ExceptionType.LOAD_FAILED) from error


class Loading(Protocol):
    """What a load is for, on one rank."""

    def claim(self) -> Mapping[str, object]: ...  # L1: what all ranks must ask for alike, with "prefix" and "strategy"
    def validate(self, reader: CheckpointReader) -> None: ...  # L2
    def prepare(self, reader: CheckpointReader) -> list[Target]: ...  # L3: what is to be filled; changes nothing yet
    def apply(self) -> None: ...  # L5: it is filled, on all ranks


class CheckpointLoader:
    """Runs L1 to L5 on one rank."""

    def __init__(self, coordinator: DistributedCoordinator, storage: st.CheckpointStorage) -> None:
        self.coordinator, self.storage = coordinator, storage

    def coordinate_load(self, op: Operation, loading: Loading) -> None:
        """Fill what `loading` prepares, and let it apply that, on every rank. Collective; blocks until all ranks are done.

        `OperationFailed` on all ranks if one fails: in L1 to L3 nothing has changed; in L4 and L5 tensors are undefined,
        and the message says so.
        """
        with op.step("L1 record"), no_garbage_collection():
            request = loading.claim()
            demand_equal(op.gather(request))
            reader = CheckpointReader(self.storage, self._read_record(op, str(request["prefix"])))
        with reader:
            reader.meter = Meter(poll=op.poll)
            with op.step("L2 validate"), no_garbage_collection():
                loading.validate(reader)
            with op.step("L3 plan"), no_garbage_collection():
                tasks = reader.plan(loading.prepare(reader))
                told = op.gather(sum(task.spared() for task in tasks))  # nobody writes before everybody has a plan
                worth_it = sum(spared for spared in told if isinstance(spared, int)) >= LEAST_SPARED_BYTES
            with op.step("L4 read"):
                if request["strategy"] == "broadcast" and op.world_size > 1:
                    _relay(op, reader, tasks)
                else:
                    _read(op, reader, tasks, request["strategy"] == "sequential", worth_it and op.world_size > 1)
        with op.step("L5 agree"), no_garbage_collection():
            op.gather(None)  # every rank has its bytes
            loading.apply()
            op.gather(None)

    def _read_record(self, op: Operation, prefix: str) -> st.CheckpointMetadata:
        if op.rank == 0:
            text, metadata = committed(self.storage, prefix)
            op.broadcast(text.decode())
            return metadata
        return st.decode_record(str(op.broadcast(None)).encode(), prefix)


def _read(op: Operation, reader: CheckpointReader, tasks: list[Task], in_turn: bool, in_parts: bool) -> None:
    """L4: read what this rank's tasks ask for, `in_turn` after the lower ranks, `in_parts` where they share blocks."""
    meter, claims = op.meter(sum(task.nbytes for task in tasks)), list[Claim]()

    def run(task: Task, buffer: Bytes) -> None:
        if in_parts and task.spared():
            claims.extend(reader.run_part(task, buffer))
        else:
            reader.run(task, buffer)
        meter.add(task.nbytes)

    for turn in range(op.world_size) if in_turn else [op.rank]:
        if turn == op.rank:
            st.in_parallel(tasks, run, len(tasks), meter.tick)
        if in_turn:
            op.gather(None)
    if in_parts:
        unproved = _unproved(op, claims)
        again = [task for task in tasks if (task.shard, task.first) in unproved]
        st.in_parallel(again, reader.run, len(again), op.poll)
    meter.tick()


class Claim(NamedTuple):
    """What a rank tells of a part of a block that it has read: bytes [low, high) of the shard's data."""

    shard: int
    block: int
    low: int
    high: int
    crc: int  # linear (see `st.linear_crc32`), of the part, and later with zeros for what is behind it
    behind: int  # bytes of the block
    whole: int  # the linear CRC32 of the block, by its header


JUDGED_BLOCKS = 4096  # in a row of a shard, by the same rank: so that ranks send their claims to few others


def _unproved(op: Operation, claims: Sequence[Claim]) -> set[tuple[int, ...]]:
    """Of the blocks that were read in parts here, those whose parts on all ranks are not proved to be right.

    One rank judges a block. What is not proved need not be damaged: such a block must be read whole.
    """
    crcs = np.array([claim.crc for claim in claims], np.int64)
    crcs = st.with_zeros_behind(crcs, np.array([claim.behind for claim in claims], np.int64))
    outgoing: dict[int, list[Claim]] = {}
    for claim, crc in zip(claims, crcs.tolist()):
        judge = (claim.shard + claim.block // JUDGED_BLOCKS) % op.world_size
        outgoing.setdefault(judge, []).append(claim._replace(crc=crc))
    told = {rank: [Claim(*row) for row in rows] for rank, rows in _exchange_rows(op, outgoing).items()}
    parts: dict[tuple[int, ...], set[Claim]] = {}
    for claim in itertools.chain(*told.values()):
        parts.setdefault(claim[:2], set()).add(claim)  # what several ranks have read alike counts once
    bad = {block for block, found in parts.items() if not _adds_up(sorted(found))}
    answer = {rank: [claim[:2] for claim in found if claim[:2] in bad] for rank, found in told.items()}
    return {tuple(row) for rows in _exchange_rows(op, answer).values() for row in rows}


def _adds_up(parts: Sequence[Claim]) -> bool:
    """Whether the parts of a block are apart, and come together to its CRC32, with zeros for what nobody has read.

    Where parts overlap, what is wrong in both would cancel out.
    """
    apart = all(part.high <= after.low for part, after in zip(parts, parts[1:]))
    return apart and functools.reduce(operator.xor, (part.crc for part in parts)) == parts[0].whole


def _exchange_rows(op: Operation, outgoing: Mapping[int, Sequence[tuple[int, ...]]]) -> dict[int, list[list[int]]]:
    """Rows of numbers, all equally long, to and from every rank."""
    told = {
        rank: np.array([len(rows[0]), *itertools.chain(*rows)], np.int64) for rank, rows in outgoing.items() if rows
    }
    heard = op.exchange({rank: numbers.view(np.uint8) for rank, numbers in told.items()})
    numbers = {rank: data.view(np.int64) for rank, data in heard.items()}
    return {rank: found[1:].reshape(-1, found[0]).tolist() for rank, found in numbers.items()}


def _relay(op: Operation, reader: CheckpointReader, tasks: list[Task]) -> None:
    """L4, where every block is read by one of the ranks that need it, in turn, and sent to the others; a few a round."""
    meter = op.meter(sum(task.nbytes for task in tasks))
    wanted = sorted({(task.shard, block) for task in tasks for block in range(task.first, task.last)})
    columns = np.array(wanted, np.int64).reshape(-1, 2).T
    needs: dict[tuple[int, int], list[int]] = {}
    for rank, row in enumerate(op.gather([len(wanted), *map(st.encode_runs, columns)])):
        if isinstance(row, list):
            for key in zip(*(st.decode_runs(runs, row[0]).tolist() for runs in row[1:])):
                needs.setdefault(key, []).append(rank)
    order = sorted(needs)
    sender = {key: needs[key][n % len(needs[key])] for n, key in enumerate(order)}
    waiting, here = deque(tasks), dict[tuple[int, int], Bytes]()  # the blocks that have come and are needed yet

    def read(key: tuple[int, int], _: Bytes) -> None:
        here[key] = reader.read(*key, key[1] + 1, st.aligned_buffer(st.BLOCK_BYTES), alone=True)

    for at in range(0, len(order), RELAYED_BLOCKS):
        batch = order[at : at + RELAYED_BLOCKS]
        outgoing: dict[int, list[Bytes]] = {}
        mine = [key for key in batch if sender[key] == op.rank]
        st.in_parallel(mine, read, len(mine), meter.tick)
        for key in mine:
            for rank in needs[key]:
                if rank != op.rank:
                    outgoing.setdefault(rank, []).append(here[key])
        received = op.exchange({rank: np.concatenate(parts) for rank, parts in outgoing.items()})
        for shard, block in (key for key in batch if op.rank in needs[key] and sender[key] != op.rank):
            size, source = st.block_span(reader.header(shard), block, block + 1), sender[shard, block]
            here[shard, block], received[source] = np.split(received[source], [size])
        # Tasks come in the order of their blocks, and so do the blocks.
        while waiting and all((waiting[0].shard, b) in here for b in range(waiting[0].first, waiting[0].last)):
            task = waiting.popleft()
            reader.place(task, np.concatenate([here[task.shard, b] for b in range(task.first, task.last)]))
            meter.add(task.nbytes)
        here = {key: data for key, data in here.items() if waiting and key >= (waiting[0].shard, waiting[0].first)}
        meter.tick()


# --------------------------------------------------------------------------------------------------------------------
# Operations: a deadline, a cancel event, and one failure for all


class OperationFailed(Exception):
    """Every rank has agreed that the operation failed, and how. Turned into the public exception at the API."""

    def __init__(self, failure: Mapping[str, object]) -> None:
        told = Fields(failure)
        super().__init__(told.text("message"))
        self.kind, self.rank = told.text("type"), told.number("rank")
        self.retryable = told.all["retryable"] is True  # whether the rank that failed first would try again
        self.superseded = told.all["superseded"] is True

    def public(self, checkpoint_path: str) -> Exception:
        """The exception that the user sees, the same on every rank."""
        if self.kind == "value_error":
            return ValueError(str(self))
        return CheckpointException(str(self), checkpoint_path, ExceptionType(self.kind), self.rank)


class Operation:
    """One collective save or load, as one rank sees it."""

    def __init__(
        self, coordinator: DistributedCoordinator, verb: str, timeout: float, cancel: threading.Event | None = None,
        retryable: tuple[type[BaseException], ...] = (), progress: Callable[[Progress], None] | None = None,
    ) -> None:  # fmt: skip
        in_band = InBand(coordinator, self.remaining)
        self.coordinator = coordinator if isinstance(coordinator, OperationCoordinator) else in_band
        self.rank, self.world_size, self.timeout = coordinator.rank, coordinator.world_size, timeout
        numbers: Sequence[int] = getattr(coordinator, "global_ranks", range(self.world_size))
        self._own_rank = {number: rank for rank, number in enumerate(numbers)}
        self._verb = verb
        self._default = ExceptionType.SAVE_FAILED if verb == "save" else ExceptionType.LOAD_FAILED
        self._deadline = time.monotonic() + timeout
        self._cancel, self._retryable, self._progress = cancel, retryable, progress
        self.step_name = ""
        self.past_return = False  # committed: what follows may not fail
        self.seconds: dict[str, float] = {}
        self.coordinator.begin(self.interrupted)

    def interrupted(self) -> None:
        """Raise if this rank was cancelled or another one failed; no more once the outcome stands."""
        if self.past_return:
            return
        if self._cancel is not None and self._cancel.is_set():
            raise CheckpointException("cancelled", type=ExceptionType.CANCELLED)
        if (failure := self.coordinator.failure()) is not None:
            raise OperationFailed(failure)

    def poll(self) -> None:
        """Raise if interrupted, or if the deadline has passed; called a few times a second while working."""
        self.interrupted()
        if time.monotonic() > self._deadline:
            late = f"not done by the deadline of {self.timeout:g} s"
            raise CheckpointException(late, type=ExceptionType.TIMEOUT, rank=self.rank)

    def meter(self, total: int) -> Meter:
        """Counts this step's bytes on this rank."""
        return Meter(self.step_name, total, self._progress, self.poll)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step; I5: what goes wrong in it is announced to all ranks, and the first announcement is raised."""
        self.step_name = name
        started = time.monotonic()
        try:
            self.poll() if name < "S6" else self.interrupted()  # who is late begins nothing more; a commit is finished
            yield
        except OperationFailed:
            raise
        except BaseException as error:
            failure = self.coordinator.fail(self._describe(error))
            if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit: now that the others know, go
                raise
            raise OperationFailed(failure) from error
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def _describe(self, error: BaseException) -> dict[str, object]:
        kind, rank, text = self._default.value, self.rank, f"{type(error).__name__}: {error}"
        if isinstance(error, CheckpointException):
            kind = kind if error.type is ExceptionType.UNKNOWN else error.type.value
            rank, text = rank if error.rank is None else error.rank, str(error)
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
            "type": kind, "rank": rank, "message": message, "retryable": isinstance(error, self._retryable),
            "superseded": isinstance(error, Superseded),
        }  # fmt: skip

    def own_ranks(self, mesh: Sequence[int]) -> Shape:
        """The ranks of a mesh as this operation counts them; those that take no part in it are left out."""
        return tuple(sorted(self._own_rank[rank] for rank in mesh if rank in self._own_rank))

    def remaining(self) -> float:
        """Seconds until waits for other ranks end: the deadline and the grace."""
        return max(0.05, self._deadline + GRACE_S - time.monotonic())

    def gather(self, value: object) -> list[object]:
        """All ranks' values."""
        return self.coordinator.all_gather(value, timeout=self.remaining())

    def broadcast(self, value: object) -> object:
        """Rank 0's value."""
        return self.coordinator.broadcast(value, 0, timeout=self.remaining())

    def exchange(self, outgoing: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Bytes to and from every rank."""
        return self.coordinator.exchange(outgoing, timeout=self.remaining())

    def collect_at_0(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on rank 0; elsewhere an empty list."""
        got = self.exchange({0: np.frombuffer(bytearray(data), np.uint8)})
        return [got[rank].tobytes() for rank in range(self.world_size)] if self.rank == 0 else []

    def hand_out(self, parts: Sequence[bytes]) -> bytes:
        """This rank's part of what rank 0 gives out."""
        got = self.exchange({rank: np.frombuffer(bytearray(part), np.uint8) for rank, part in enumerate(parts)})
        return got[0].tobytes()


def fulfil(result: Future[T], work: Callable[..., T], *args: object) -> None:
    """Do some work for whoever waits for its result, or its error."""
    try:
        result.set_result(work(*args))
    except BaseException as error:
        result.set_exception(error)


def in_thread(work: Callable[..., T], *args: object) -> Future[T]:
    """Do some work beside this thread.

    Not in an executor: those take nothing more once the interpreter exits, while a save in flight goes on.
    """
    result: Future[T] = Future()
    threading.Thread(target=fulfil, args=(result, work, *args), name="ckpt-beside", daemon=True).start()
    return result


def wait_for(result: Future[T], poll: Callable[[], None]) -> T:
    """The result, or the error, of such work; `poll` runs meanwhile, and may raise."""
    while not result.done():
        wait([result], 0.05)
        poll()
    return result.result()


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again: `max_retries` attempts in all, waiting `initial_delay` s, growing by `backoff_factor`."""

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
        """Call `function` until it succeeds, fails in a way not worth retrying, or the policy's attempts are used up.

        A collective operation fails as `OperationFailed`, whose verdict all ranks share: they all retry, or none.
        """
        policy = self.retry_policy
        for attempt in range(policy.max_retries - 1):
            try:
                return function()
            except Exception as error:
                again = isinstance(error, tuple(policy.retryable_exceptions))
                if isinstance(error, OperationFailed):
                    again = error.retryable
                if not again or (cancel and cancel.is_set()):
                    raise
            (cancel or threading.Event()).wait(policy.delay(attempt))
        return function()

    def execute_with_timeout(self, function: Callable[[], T], timeout: float) -> T:
        """Call `function` in a thread; TIMEOUT if it takes longer than `timeout` seconds (it may go on in the background)."""
        result = in_thread(function)
        if not wait([result], timeout).done:
            raise CheckpointException(f"not done within {timeout:g} s", type=ExceptionType.TIMEOUT)
        return result.result()

    def rollback(self, checkpoint_prefix: str) -> None:
        """Delete a checkpoint, committed or not: record first, then shards. FileNotFoundError where there is none."""
        st.delete_committed(self.storage, checkpoint_prefix.removesuffix(st.RECORD_SUFFIX))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Planning makes many objects but no cycles: collecting garbage meanwhile would double its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --------------------------------------------------------------------------------------------------------------------
# Coordinators


@runtime_checkable
class DistributedCoordinator(Protocol):
    """How ranks talk. Values are what `encode_value` takes. Every wait ends at `timeout` (seconds) with TIMEOUT.

    All methods are collective: every rank calls them, in the same order.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self, timeout: float = 600.0) -> None: ...
    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object: ...
    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]: ...


@runtime_checkable
class OperationCoordinator(Protocol):
    """What an `Operation` asks of a coordinator: one with these methods is used as it is, any other by way of `InBand`."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object: ...
    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]: ...

    def exchange(self, outgoing: Mapping[int, Bytes], timeout: float = 600.0) -> dict[int, Bytes]:
        """Send bytes to ranks, and return what every rank sent here. Collective."""
        ...

    def begin(self, poll: Callable[[], None]) -> None:
        """Start a collective operation; `poll` runs in every wait and may raise to leave it."""
        ...

    def fail(self, failure: dict[str, object]) -> dict[str, object]:
        """Announce that this operation failed here; returns the failure that was announced first."""
        ...

    def failure(self) -> dict[str, object] | None:
        """The failure that some rank announced for this operation."""
        ...


class InBand:
    """An `OperationCoordinator` over `all_gather` alone, for coordinators that have no more than the five basic methods.

    A rank that fails says so in its next gather, which is the one that the others wait in, or come to: they learn of it there.
    """

    def __init__(self, basic: DistributedCoordinator, remaining: Callable[[], float]) -> None:
        self.rank, self.world_size, self._gather = basic.rank, basic.world_size, basic.all_gather
        self._remaining = remaining  # seconds until the operation's deadline

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        rows = [Fields(row).all for row in self._gather({"value": value}, timeout=timeout)]
        for row in rows:
            if isinstance(failure := row.get("failure"), dict):
                raise OperationFailed(failure)
        return [row["value"] for row in rows]

    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object:
        return self.all_gather(value if self.rank == src else None, timeout)[src]

    def exchange(self, outgoing: Mapping[int, Bytes], timeout: float = 600.0) -> dict[int, Bytes]:
        rows = self.all_gather({str(rank): data.tobytes() for rank, data in outgoing.items() if len(data)}, timeout)
        found = ((rank, Fields(row).all.get(str(self.rank))) for rank, row in enumerate(rows))
        return {rank: np.frombuffer(bytearray(data), np.uint8) for rank, data in found if isinstance(data, bytes)}

    def begin(self, poll: Callable[[], None]) -> None:
        """Nothing to prepare: the waits of the basic methods cannot be left."""

    def fail(self, failure: dict[str, object]) -> dict[str, object]:
        try:
            rows = self._gather({"failure": failure}, timeout=self._remaining())
            return next(found for row in rows if isinstance(found := Fields(row).all.get("failure"), dict))
        except Exception:  # the others cannot be reached: then the failure here is all there is to tell
            return failure

    def failure(self) -> dict[str, object] | None:
        return None


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


class TorchCoordinator:
    """The ranks of a `torch.distributed` process group. Creating one is collective over that group.

    Control goes over keys of the rendezvous store: it can tell who is missing, and survives a timeout. Bulk bytes go over
    a private gloo group, also where training runs on NCCL; it is made at first need and again after a failure.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not initialised: call init_process_group, or use LocalCoordinator()")
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        if dist.get_rank() not in ranks:
            raise ValueError(f"rank {dist.get_rank()} is not in the process group of ranks {ranks}")
        self.rank, self.world_size, self.global_ranks = ranks.index(dist.get_rank()), len(ranks), tuple(ranks)
        store = dist.distributed_c10d._get_default_store()
        if hasattr(store, "clone"):  # a connection of our own: training threads block on theirs
            store = store.clone()
        name = "ckpt/" + hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        instance = store.add(f"{name}/made/{self.rank}", 1)
        self._store = PrefixStore(f"{name}/{instance}", store)
        self._operation = self._step = 0
        self._posted: list[str] = []
        self._poll: Callable[[], None] = lambda: None
        self._store_error = ""
        self._longest_pause = min(0.5, 0.02 * max(1.0, self.world_size / 64))  # thousands of ranks ask one store
        self._group: dist.ProcessGroupGloo | None = None
        self._generation = ""  # which group that is; "" where it is not usable: no more after an exchange that failed
        # gloo's threads must not drop the last reference to a tensor: at interpreter exit that ends the process.
        self._in_flight: tuple[object, ...] = ()

    def begin(self, poll: Callable[[], None]) -> None:
        self._operation += 1
        self._step = 0
        self._poll, self._store_error = poll, ""

    def barrier(self, timeout: float = 600.0) -> None:
        self.all_gather(None, timeout)

    def broadcast(self, value: object, src: int = 0, timeout: float = 600.0) -> object:
        key = self._next_step()
        if self.rank == src:
            self._post(key, value)
            return value
        return self._await([key], timeout, {src: key})[0]

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        """Two hops: everybody posts, rank 0 collects and posts the whole."""
        step, before = self._next_step(), len(self._posted)
        posts = {rank: f"{step}/{rank}" for rank in range(self.world_size)}
        self._post(posts[self.rank], value)
        if self.rank == 0:
            values = self._await(list(posts.values()), timeout, posts)
            self._post(f"{step}/all", values)
        else:
            (gathered,) = self._await([f"{step}/all"], timeout, posts)
            values = gathered if isinstance(gathered, list) else []
        # Everybody has come as far as this step, so nobody still reads what was posted before it.
        retired, self._posted = self._posted[:before], self._posted[before:]
        for key in retired:
            self._call(self._store.delete_key, key)
        return values

    def exchange(self, outgoing: Mapping[int, Bytes], timeout: float = 600.0) -> dict[int, Bytes]:
        deadline = time.monotonic() + timeout
        sizes = {str(rank): len(data) for rank, data in outgoing.items() if len(data)}
        told = [Fields(row) for row in self.all_gather({"generation": self._generation, "sizes": sizes}, timeout)]
        tables = [row.child("sizes") for row in told]
        if not any(table.all for table in tables):
            return {}
        key = str(self.rank)
        incoming = [table.number(key) if key in table.all else 0 for table in tables]
        order = [outgoing.get(rank, np.empty(0, np.uint8)) for rank in range(self.world_size)]
        sent, received = np.concatenate(order), np.empty(sum(incoming), np.uint8)
        problem = ""
        generation, self._generation = self._generation, ""  # usable again if this goes well on every rank
        try:
            if not generation or len({row.text("generation") for row in told}) > 1:
                generation = f"{self._operation}.{self._step}"
                store = PrefixStore(f"gloo/{generation}", self._store)
                limit = datetime.timedelta(seconds=max(0.1, deadline - time.monotonic()))
                self._group = dist.ProcessGroupGloo(store, self.rank, self.world_size, limit)
            options = dist.AllToAllOptions()
            options.timeout = datetime.timedelta(seconds=max(0.1, deadline - GRACE_S - time.monotonic()))
            send = getattr(self._group, "alltoall_base")  # missing in torch's type stubs
            tensors = torch.from_numpy(received), torch.from_numpy(sent)
            self._in_flight = (work := send(*tensors, incoming, list(map(len, order)), options), tensors)
            work.wait()
        except RuntimeError as error:
            problem = str(error)
        for rank, text in enumerate(self.all_gather(problem, max(0.1, deadline - time.monotonic()))):
            if text:
                raise CheckpointException(f"gloo exchange failed on rank {rank}: {text}", rank=rank)
        self._generation = generation
        parts = np.split(received, np.cumsum(incoming)[:-1])
        return {rank: part for rank, part in enumerate(parts) if len(part)}

    def fail(self, failure: dict[str, object]) -> dict[str, object]:
        key = f"{self._operation}/failed"
        try:
            told = {**failure, "message": str(failure["message"])[: 1 << 16]}  # one value: see STORE_BYTES
            text = st.dump_json(st.encode_value(told, key)).decode()
            self._call(self._store.compare_set, key, "", text)  # the first one stays
            self._posted.append(key)
            return self.failure() or failure
        except CheckpointException:  # the store is gone: nobody is left to agree with
            return failure

    def failure(self) -> dict[str, object] | None:
        key = f"{self._operation}/failed"
        return Fields(self._get([key])[0]).all if self._call(self._store.check, [key]) else None

    def _next_step(self) -> str:
        self._step += 1
        return f"{self._operation}/{self._step}"

    def _post(self, key: str, value: object) -> None:
        text = st.dump_json(st.encode_value(value, key))
        for at in range(
            len(text) // STORE_BYTES * STORE_BYTES, -1, -STORE_BYTES
        ):  # `key` last: then all parts are there
            part_key = f"{key}+{at}" if at else key
            self._call(self._store.set, part_key, text[at : at + STORE_BYTES])
            self._posted.append(part_key)

    def _get(self, keys: list[str]) -> list[object]:
        texts: list[bytes] = self._call(self._store.multi_get, keys)
        at = 0
        while going_on := [n for n, text in enumerate(texts) if len(text) == at + STORE_BYTES]:
            at += STORE_BYTES
            for n, part in zip(going_on, self._call(self._store.multi_get, [f"{keys[n]}+{at}" for n in going_on])):
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
                f"the rendezvous store is unreachable (has the process that hosts it, by default rank 0, died?): {error}",
                type=ExceptionType.TIMEOUT,
            ) from error

    def _await(self, keys: list[str], timeout: float, posts: Mapping[int, str]) -> list[object]:
        """The values of `keys`, once they are there; TIMEOUT names the ranks whose `posts` are not."""
        now = time.monotonic()
        deadline, polled, pause = now + timeout, now, 0.0003
        while not self._call(self._store.check, keys):
            if (now := time.monotonic()) > polled + 0.02:
                self._poll()
                polled = now
            if now > deadline:
                late = [rank for rank, key in posts.items() if not self._call(self._store.check, [key])]
                late = late or list(posts)[:1]  # all have posted: then it is the rank that hands out the whole
                message = f"no answer from rank(s) {st.some(late, 20)} of {self.world_size} by the deadline"
                raise CheckpointException(message, type=ExceptionType.TIMEOUT, rank=late[0])
            time.sleep(pause)
            pause = min(pause * 1.25, self._longest_pause)
        return self._get(keys)


# --------------------------------------------------------------------------------------------------------------------
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


def as_dtensor(tensor: object) -> DTensor | None:
    """`tensor` if it is a DTensor. Does not import that class, which takes as long as torch itself: somebody has, or not."""
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
    return LocalTensor(name, code, shape, pieces, mesh_ranks(sharded), any(p.is_replicate() for p in placements))


def mesh_ranks(tensor: object) -> Shape:
    """The global ranks of a DTensor's mesh, sorted: neither their order nor its shape matters. () for a plain tensor."""
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
        problem = (
            f"is a {type(tensor).__name__}, a tensor subclass without a known layout; convert it to a plain tensor"
        )
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
        problem = "has a Partial() placement, a sum not yet taken: redistribute it to Replicate() or Shard() first"
    elif unknown := {type(p).__name__ for p in placements} - {"Shard", "_StridedShard", "Replicate"}:
        problem = f"has placements {sorted(unknown)}, whose layout is not known here: redistribute it to Shard()"
    if problem:
        raise CheckpointException(f"{name} {problem}")  # of the type that fits the call


Runs = list[tuple[int, int]]  # parts [begin, end) of one dimension, one behind the other in the local tensor
Cut = tuple[int, int, int, int]  # dimension, number of shards, which of them, split factor


def shard_boxes(name: str, tensor: DTensor, local_shape: Shape) -> list[tuple[Box, Box]]:
    """The boxes of a DTensor that this rank holds, each with its box in the local tensor; none outside of its mesh.

    Placements can be read in two ways: as torch cuts a tensor by them, and as FSDP2 makes them of a tensor-parallel
    one. Usually both give the same. CheckpointException where not exactly one result has the local shape.
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
            f"{name}: placements {tensor.placements} on a mesh of shape {tuple(tensor.device_mesh.shape)} {what} its "
            f"shape {list(shape)} and local shape {list(local_shape)}; redistribute it to Shard() and Replicate() "
            "placements, or choose a size that divides evenly"
        )
    boxes = [(Box((), ()), Box((), ()))]
    for runs in readings[0]:
        starts = itertools.accumulate((end - begin for begin, end in runs), initial=0)
        parts = [(begin, start, end - begin) for (begin, end), start in zip(runs, starts)]
        boxes = [
            (Box((*whole.offset, begin), (*whole.size, size)), Box((*local.offset, start), (*local.size, size)))
            for whole, local in boxes
            for begin, start, size in parts
        ]
    return boxes


def _cuts(tensor: DTensor, coordinate: Sequence[int]) -> Iterator[list[Cut]]:
    """The cuts that placements stand for, in their order: as torch applies them, and as FSDP2 has applied them.

    FSDP2 cuts what tensor parallelism has left, but its placement comes first, with the number of shards that it found
    as split factor. Torch cuts by such a placement group by group, with another result where sizes do not divide.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    declared = getattr(getattr(tensor, "_spec", None), "shard_order", None)  # from torch 2.10 on, where not the default
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
    """Cut the elements of `runs` into `split_factor` groups, each of them into `ways` shards; shard `index` of each."""

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
    """Mark those that are the same views of the same memory as an earlier one: their bytes are stored once."""
    seen: dict[object, str] = {}
    marked = []
    for item in tensors:
        if item.pieces:
            views = tuple((box, *identity(view)) for box, view in item.pieces)
            first = seen.setdefault((item.dtype, item.shape, views), item.name)
            item = item if first == item.name else item._replace(alias_of=first)
        marked.append(item)
    return marked


class CheckpointFormat(enum.Enum):
    """How tensors are spread over files."""

    SINGLE_FILE = "single_file"
    MULTI_SHARD = "multi_shard"
    CONSOLIDATED = "consolidated"


class ShardData(NamedTuple):
    """What S2 collects on a rank: tensors, and values as JSON text by name (True: kept per rank).

    `steps`: the optimizer's step of a parameter, by name, where it is a number instead of a tensor.
    """

    tensors: list[LocalTensor]
    values: dict[str, tuple[bytes, bool]]
    steps: Mapping[str, float] = types.MappingProxyType({})


def in_model(name: str) -> bool:
    """Whether a stored name is that of an entry of the model's state."""
    return name.startswith(("model/", "model-values/"))


def lowest_ranks(tensors: Iterable[st.TensorMetadata]) -> dict[str, int | None]:
    """For each name that is kept per rank the lowest such rank, which stands for all where only one can; else None."""
    return {t.name: t.rank for t in sorted(tensors, key=lambda t: t.rank or 0, reverse=True)}


def entry_name(tensor: st.TensorMetadata, offset: Sequence[int], whole: bool) -> str:
    """The name of a piece in its file: the tensor's, then the piece's offset, then the rank that it is kept for."""
    name = tensor.name.replace("~", "~0").replace("@", "~1")
    place, kept_for = "@" + ",".join(map(str, offset)), f"~r{tensor.rank}"
    return name + ("" if whole else place) + ("" if tensor.rank is None else kept_for)


# --------------------------------------------------------------------------------------------------------------------
# S3: the plan, made on rank 0 from every rank's description, as columns of numpy arrays


class Told(NamedTuple):
    """A tensor, or a value (dtype "JSON"), as a rank tells the planner of it."""

    name: str
    dtype: str
    shape: Shape
    alias_of: str = ""
    crc: int = 0  # of a value
    kept: bool = False  # a value that every rank has for itself


def describe(data: ShardData, reference: str | None = None) -> tuple[dict[str, object], str]:
    """What a rank holds, for the planner, and a digest of its tensors.

    Where the digest equals `reference` (rank 0's), they are left out: at thousands of ranks it is nearly always equal.
    """
    tensors = [Told(t.name, t.dtype, t.shape, t.alias_of or "") for t in data.tensors]
    values = [Told(n, "JSON", (len(text),), crc=st.crc32(text), kept=kept) for n, (text, kept) in data.values.items()]
    digest = hashlib.sha256(st.dump_json(tensors)).hexdigest()
    meshes = {mesh: number for number, mesh in enumerate(dict.fromkeys(t.mesh for t in data.tensors))}
    held = [(index, box, view.is_cuda) for index, t in enumerate(data.tensors) for box, view in t.pieces]
    held += [(index, whole_box(value.shape), False) for index, value in enumerate(values, len(tensors))]
    columns = {
        "tensor": np.array([index for index, _, _ in held], np.int64),
        "on_device": np.array([on_device for _, _, on_device in held], np.int64),
    }
    description: dict[str, object] = {
        "tensors": None if digest == reference else tensors,
        "meshes": [st.encode_runs(np.array(mesh, np.int64)) for mesh in meshes],
        "mesh": st.encode_runs(np.array([meshes[t.mesh] for t in data.tensors], np.int64)),
        "values": values,
        "steps": dict(data.steps),
        "pieces": st.encode_table(columns, stack_boxes([box for _, box, _ in held])),
    }
    return description, digest


def whole_box(shape: Shape) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def stack_boxes(boxes: Sequence[Box], least_width: int = 0) -> Ints:
    """Boxes as an array (rows, 2, dimensions), padded with offset 0 and size 1."""
    width = max([least_width, *(len(box.size) for box in boxes)])
    pads = [width - len(box.size) for box in boxes]
    rows = [(box.offset + (0,) * pad, box.size + (1,) * pad) for box, pad in zip(boxes, pads)]
    return np.array(rows, np.int64).reshape(len(boxes), 2, width)


def _box(row: Sequence[Sequence[int]], ndim: int) -> Box:
    """A row of such an array as the box of a tensor of `ndim` dimensions."""
    return Box(tuple(row[0][:ndim]), tuple(row[1][:ndim]))


class Rows(NamedTuple):
    """Pieces in columns: who holds them (`rank`), as which of its pieces (`source`), of which tensor, and where."""

    rank: Ints
    source: Ints
    tensor: Ints
    mesh: Ints  # the lowest rank of the tensor's mesh, -1 for a plain tensor
    on_device: Ints  # 1: in the memory of a CUDA device
    box: Ints  # (rows, 2, dimensions): offset and size, padded with 0 and 1

    def take(self, index: Ints | Mask | slice) -> Rows:
        """The rows at `index`."""
        return Rows(*(column[index] for column in self))


class Groups:
    """Equal pieces (same tensor, same box) on several ranks: one row a group, and which rows hold it."""

    def __init__(self, rows: Rows) -> None:
        columns = rows.box.reshape(len(rows.box), math.prod(rows.box.shape[1:])).T
        self.members = rows.take(np.lexsort((*columns[::-1], rows.tensor)))  # stable: within a group by rank
        tensor, box, first = self.members.tensor, self.members.box, np.ones(len(rows.tensor), bool)
        first[1:] = (tensor[1:] != tensor[:-1]) | (box[1:] != box[:-1]).any(axis=(1, 2))
        self.start = np.flatnonzero(first)
        self.count = np.diff(self.start, append=len(first))
        self.rows = self.members.take(self.start)  # the lowest rank stands for the group
        self.of_member = np.arange(len(self.count)).repeat(self.count)


class Table(NamedTuple):
    """The tensors that a rank has told of, and the ranks of each one's mesh; () for a plain tensor."""

    tensors: list[Told]
    meshes: list[Shape]


class Holdings:
    """Every rank's description put together: one list of tensors, the rows of all their pieces, and which are equal.

    A name is one tensor for all ranks, unless it is in `apart`: then it is one for each rank, or mesh of ranks.
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        # Of each rank: its tensors (one object where ranks have the same), its values, and which of those each piece is of.
        self._told: list[tuple[Table, list[Told], Ints]] = []
        self._steps: list[Mapping[str, float]] = []
        boxes, on_device, tables, first = list[Ints](), list[Ints](), dict[tuple[bool, bytes], Table](), list[Told]()
        for text in texts:
            body = json.loads(text)
            alike = body["tensors"] is None
            tensors = first if alike else _read_told(body["tensors"])
            first = first or tensors
            key = (alike or not self._told, st.dump_json([body["meshes"], body["mesh"]]))
            if not key[0] or key not in tables:
                meshes = [tuple(st.decode_runs(runs, sum(runs[2::3])).tolist()) for runs in body["meshes"]]
                of_tensor = [meshes[n] for n in st.decode_runs(body["mesh"], len(tensors)).tolist()]
                tables[key] = Table(tensors, of_tensor)
            (local, device), box = st.decode_table(Fields(body["pieces"]), ("tensor", "on_device"))
            self._told.append((tables[key], _read_told(body["values"]), local))
            self._steps.append(body["steps"])
            boxes.append(box)
            on_device.append(device)
        distinct = list({id(table): table for table, *_ in self._told}.values())
        width = max([1, *(len(t.shape) for table in distinct for t in table.tensors)])  # empty ones too
        counts = [len(box) for box in boxes]
        stacked = np.zeros((sum(counts), 2, width), np.int64)
        stacked[:, 1] = 1
        for part, box in zip(np.split(stacked, np.cumsum(counts)), boxes):
            part[:, :, : box.shape[2]] = box
        rank, source = np.arange(len(counts)).repeat(counts), np.concatenate([np.arange(count) for count in counts])
        nothing = np.zeros_like(rank)
        self._held = Rows(rank, source, nothing, nothing, np.concatenate(on_device), stacked)
        self._dropped = np.zeros(len(rank), bool)
        self.known, self.apart, several = self._compare(distinct)
        self.arrange(set())
        self.arrange(self._unlike_boxes(several))

    def _compare(self, tables: Sequence[Table]) -> tuple[dict[str, Told], set[str], dict[str, int]]:
        """The first description of each name; the names that ranks keep apart; the number of meshes of a name, if several.

        A tensor is tied if all ranks say so. CheckpointException where ranks cannot mean the same tensor by a name.
        """
        known, apart, of_mesh = dict[str, Told](), set[str](), dict[str, dict[Shape, Told]]()
        values = ((value, ()) for _, values, _ in self._told for value in values)
        for t, mesh in itertools.chain(*(zip(*table) for table in tables), values):
            first = known.setdefault(t.name, t)
            same = of_mesh.setdefault(t.name, {}).setdefault(mesh, t)
            if t.alias_of != first.alias_of:
                known[t.name] = first._replace(alias_of="")
            if mesh and (t.dtype, t.shape) != (same.dtype, same.shape):
                raise _disagreement(t.name, f"{same.dtype}{list(same.shape)}", f"{t.dtype}{list(t.shape)}")
            if (t.dtype, t.shape, t.crc) != (first.dtype, first.shape, first.crc) or t.kept:
                apart.add(t.name)
        several = {name: len(meshes) for name, meshes in of_mesh.items() if len(meshes) > 1}
        for name in several:
            seen: dict[int, Shape] = {}
            for mesh in of_mesh[name]:
                if other := next((seen[rank] for rank in mesh if rank in seen), ()):
                    raise _disagreement(name, f"a mesh of ranks {list(other)}", f"one of ranks {list(mesh)}")
                seen |= dict.fromkeys(mesh, mesh)
            if () in of_mesh[name]:
                plain = [rank for rank, (table, *_) in enumerate(self._told) if (name, ()) in _names(table)]
                raise _disagreement(name, f"a plain tensor on rank(s) {st.some(plain)}", f"a DTensor on {sorted(seen)}")
        return known, apart, several

    def _unlike_boxes(self, several: Mapping[str, int]) -> set[str]:
        """Of the tensors of several meshes, those that the meshes cut into different boxes: each mesh keeps its own."""
        groups, meshes = self.groups, np.array([several.get(t.name, 0) for t in self.tensors], np.int64)
        inside = np.flatnonzero(meshes[groups.members.tensor] > 0)
        pairs = np.unique(np.stack((groups.of_member[inside], groups.members.mesh[inside])), axis=1)
        found = np.bincount(pairs[0], minlength=len(groups.count))
        unlike = np.flatnonzero((found > 0) & (found != meshes[groups.rows.tensor]))
        return {self.tensors[index].name for index in np.unique(groups.rows.tensor[unlike]).tolist()}

    def arrange(self, apart: set[str]) -> None:
        """Keep the tensors `apart`, and what is tied to them, for each rank or mesh. Tied tensors store no bytes."""
        self.apart |= apart | {t.name for t in self.known.values() if t.alias_of in apart}
        self.tensors: list[st.TensorMetadata] = []
        self._ids: dict[tuple[str, int | None], int] = {}  # by name, and the rank that it is kept for
        columns, meshes = list[Ints](), list[Ints]()
        shared: dict[int, tuple[Ints, Ints, list[int]]] = {}  # what is the same for all ranks that have one table
        for rank, (table, values, local) in enumerate(self._told):
            if id(table) not in shared:
                lowest = [min(mesh, default=-1) for mesh in table.meshes]
                ids = [self._number(t, low if low >= 0 else rank) for t, low in zip(table.tensors, lowest)]
                own = [n for n, t in enumerate(table.tensors) if t.name in self.apart and lowest[n] < 0]
                shared[id(table)] = np.array(ids, np.int64), np.array(lowest, np.int64), own
            common, low, own = shared[id(table)]
            column = np.append(common, np.zeros(len(values), np.int64))
            column[own] = [self._number(table.tensors[n], rank) for n in own]
            column[len(common) :] = [self._number(value, rank) for value in values]
            columns.append(column[local])
            meshes.append(np.append(low, np.full(len(values), -1))[local])
        for index, t in enumerate(self.tensors):
            if (target := self._ids.get((self.known[t.name].alias_of, t.rank))) is not None:
                self.tensors[index] = t._replace(alias_of=target)
        stored = np.array([t.alias_of is None for t in self.tensors], bool)
        rows = self._held._replace(tensor=np.concatenate(columns), mesh=np.concatenate(meshes))
        self.groups = Groups(rows.take(stored[rows.tensor] & ~self._dropped))
        self.itemsize = np.array([st.itemsize(t.dtype) for t in self.tensors], np.int64)

    def _number(self, told: Told, owner: int) -> int:
        """The index of a tensor, added at first sight. `owner`: the rank that it is kept for, if it is kept apart."""
        own = owner if told.name in self.apart else None
        index = self._ids.setdefault((told.name, own), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(st.TensorMetadata(told.name, told.dtype, told.shape, own))
        return index

    def replicas(self, verify: bool) -> tuple[Ints, Ints]:
        """Which members of groups are to be checksummed, by rank and source, and 1 for those on the device.

        That is every copy but those of values, which are compared already. Unless `verify` only the optimizer's steps:
        they tell whether ranks are at the same step.
        """
        groups = self.groups
        chosen = np.array([t.dtype != "JSON" and (verify or bool(_STEP.fullmatch(t.name))) for t in self.tensors], bool)
        asked = np.flatnonzero(((groups.count > 1) & chosen[groups.rows.tensor])[groups.of_member])
        on_device = np.minimum.reduceat(groups.members.on_device, groups.start) if len(groups.start) else groups.start
        asked = asked[np.lexsort((groups.members.source[asked], groups.members.rank[asked]))]
        return asked, on_device[groups.of_member[asked]]

    def keep_differing(self, asked: Ints, sums: npt.NDArray[np.uint64], warnings: list[str]) -> None:
        """Keep apart what differs between plain tensors, or between meshes; within a mesh the lowest rank's copy is kept."""
        groups = self.groups
        members, of_member, apart = groups.members, groups.of_member, set[str]()
        found = np.zeros(len(of_member), np.uint64)
        found[asked] = sums
        one_mesh = of_member * (int(members.mesh.max(initial=0)) + 2) + members.mesh + 1  # of a group, on one mesh
        _, first, inverse = np.unique(one_mesh, return_index=True, return_inverse=True)
        reference = first[inverse]
        declared = dict[str, list[int]]()  # by name: ranks whose copy differs from their mesh's lowest
        for row in np.flatnonzero(found != found[reference]).tolist():
            name = self.tensors[members.tensor[row]].name
            if members.mesh[row] < 0:
                apart.add(name)
            else:
                declared.setdefault(name, []).append(int(members.rank[row]))
                self._dropped[np.searchsorted(self._held.rank, members.rank[row]) + members.source[row]] = True
        between = np.flatnonzero(found[reference] != found[groups.start[of_member]])
        apart |= {self.tensors[index].name for index in np.unique(members.tensor[between]).tolist()}
        for name, ranks in declared.items():
            what = f"rank(s) {st.some(sorted(set(ranks)), 20)} from the lowest of their mesh, whose copy is kept"
            warnings.append(f"{name}: copies that its placement declares equal differ: {what}")
        if apart or declared:
            self.arrange(apart)

    def check_steps(self) -> None:
        """An optimizer's step of a parameter is the same on all ranks, unless the parameter itself is kept apart."""
        at, differing = dict[str, float](), {m[1] for name in self.apart if (m := _STEP.fullmatch(name))}
        for steps in self._steps:
            differing |= {name for name, step in steps.items() if at.setdefault(name, step) != step}
        # A parameter that several optimizers hold is named <optimizer>/<parameter>.
        wrong = sorted(p for p in differing if not {f"model/{p}", f"model/{p.partition('/')[2]}"} & self.apart)
        if wrong:
            raise CheckpointException(
                f"ranks are at different optimizer steps of {st.some(wrong)}: has a rank skipped a step, or a save? Bring "
                "all ranks to the same step, by loading the last checkpoint or restarting, before you save"
            )

    def nbytes(self, rows: Rows) -> Ints:
        """Logical bytes of each row."""
        sizes: Ints = rows.box[:, 1].prod(axis=1) * self.itemsize[rows.tensor]
        return sizes

    def check_complete(self) -> None:
        """Every tensor's pieces must make up the whole of it, each element once; else VALIDATION_FAILED."""
        shapes = [t.shape if t.alias_of is None else None for t in self.tensors]
        rows = self.groups.rows
        wrong = st.not_covered_once(rows.tensor, rows.box, shapes)
        if wrong:
            t, inside = self.tensors[wrong[0]], rows.tensor == wrong[0]
            held = int(rows.box[inside, 1].prod(axis=1).sum())
            raise CheckpointException(
                f"{t.name}: the ranks together hold {held} elements of its {math.prod(t.shape)}, with holes or overlaps (and "
                f"{len(wrong) - 1} more tensors so): save with all ranks of its mesh, and the same parallelism on each",
                type=ExceptionType.VALIDATION_FAILED,
            )


_STEP = re.compile("optimizer/(.+)/step")  # where a torch optimizer keeps the number of a parameter's updates


def _names(table: Table) -> Iterator[tuple[str, Shape]]:
    return ((t.name, mesh) for t, mesh in zip(table.tensors, table.meshes))


def _disagreement(name: str, one: str, other: str) -> CheckpointException:
    message = f"{name}: ranks disagree: {one} against {other}; give it the same layout on all of them, or another name"
    return CheckpointException(message, type=ExceptionType.VALIDATION_FAILED)


def _read_told(rows: Iterable[tuple[str, str, Shape, str, int, bool]]) -> list[Told]:
    return [Told(*row)._replace(shape=tuple(row[2])) for row in rows]


MIN_SPLIT_BYTES = 1 << 20  # smaller replicas are written whole by one of their holders
SMALL_BYTES = 64 << 10  # smaller pieces lie together: every rank wants some of them, and would want a block for each


def assign_writers(holdings: Holdings, todo: Mask, world_size: int) -> Rows:
    """One writer for every byte (I1) of the groups `todo`: the only holder, else all holders a share.

    The least loaded ranks get more.
    """
    groups, nbytes = holdings.groups, holdings.nbytes(holdings.groups.rows)
    single = todo & (groups.count == 1)
    load: Floats = np.bincount(groups.rows.rank[single], nbytes[single], world_size).astype(np.float64)
    parts = [groups.rows.take(single)]
    lots = np.random.default_rng(0).integers(1 << 62, size=world_size)  # equal sums of them: held by the same ranks
    sums = np.add.reduceat(lots[groups.members.rank], groups.start)
    multi = np.flatnonzero(todo & ~single)
    for kind in np.unique(sums[multi]):
        chosen = multi[sums[multi] == kind]
        holders = groups.members.rank[groups.start[chosen[0]] :][: groups.count[chosen[0]]]
        # With the k least loaded filled up alike they come to levels[k - 1]; one more pays as long as that gets lower.
        levels = (nbytes[chosen].sum() + np.cumsum(np.sort(load[holders]))) / np.arange(1, len(holders) + 1)
        shares = np.maximum(0.0, levels.min() - load[holders])
        load[holders] += shares
        parts.append(_cut(groups, chosen, nbytes[chosen], np.cumsum(shares)[:-1]))
    return Rows(*(np.concatenate(columns) for columns in zip(*parts)))


def _cut(groups: Groups, chosen: Ints, nbytes: Ints, cuts: Floats) -> Rows:
    """Lay the chosen groups end to end and cut the row of bytes at `cuts`, rounded to what a piece can be cut into.

    Cuts fall between rows of the first dimension larger than 1; small pieces stay whole. Between two cuts lies
    what one of the holders writes.
    """
    box, at = groups.rows.box[chosen], np.arange(len(chosen))
    dim = np.argmax(box[:, 1] > 1, axis=1)
    count = np.where(nbytes >= MIN_SPLIT_BYTES, box[at, 1, dim], 1)  # of such rows
    first, begin = np.cumsum(count) - count, np.cumsum(nbytes) - nbytes
    hit = np.searchsorted(begin, cuts, side="right") - 1
    cuts = first[hit] + np.rint((cuts - begin[hit]) / nbytes[hit] * count[hit]).astype(np.int64)
    low = np.unique(np.append(first, cuts[cuts < count.sum()]))
    piece, holder = np.searchsorted(first, low, side="right") - 1, np.searchsorted(cuts, low, side="right")
    size = np.diff(low, append=count.sum())
    rows = groups.members.take(groups.start[chosen[piece]] + holder)
    split = np.flatnonzero(size < count[piece])
    rows.box[split, 0, dim[piece[split]]] += (low - first[piece])[split]
    rows.box[split, 1, dim[piece[split]]] = size[split]
    return rows


class SavePlan(NamedTuple):
    """The result of S3, on rank 0."""

    tensors: list[st.TensorMetadata]
    rows: Rows  # every piece once, under its writer, in the order of the files
    begin: Ints  # of each row, in the data of its shard
    shard: Ints
    bases: list[int]  # first byte of each rank's region in a shared file, and the end of the last
    shared: bool  # one file for all ranks
    model_rows: Rows | None  # CONSOLIDATED: all holders of the model file's tensors
    model_entries: list[tuple[int, int, int]]  # tensor, begin, and the tensor whose pieces these are: itself, or tied

    def order(self, rank: int) -> dict[str, object]:
        """What a rank needs to know to write its bytes."""
        mine = slice(*np.searchsorted(self.rows.rank, (rank, rank + 1)))
        rows = self.rows.take(mine)
        used, local = np.unique(rows.tensor, return_inverse=True)
        tensors = st.encode_tensors([self.tensors[index] for index in used.tolist()])
        columns = {"tensor": local, "source": rows.source, "begin": self.begin[mine]}
        return {"tensors": tensors, "rows": st.encode_table(columns, rows.box)}

    def record(self) -> tuple[list[st.TensorMetadata], st.PieceTable]:
        """The tensors and pieces of the commit record; those of the model file come as whole tensors."""
        width = max((len(t.shape) for t in self.tensors), default=0)
        pieces = st.PieceTable(self.rows.tensor, self.shard, self.begin, self.rows.box[:, :, :width])
        if self.model_entries:
            whole = [(i, 0, begin) for i, begin, _ in self.model_entries if math.prod(self.tensors[i].shape)]
            columns = np.array(whole, np.int64).reshape(-1, 3).T
            boxes = stack_boxes([whole_box(self.tensors[i].shape) for i, *_ in whole], width)
            pieces = st.PieceTable(*map(np.concatenate, zip(pieces, (*columns, boxes))))
        return self.tensors, pieces.sort()


def plan_layout(holdings: Holdings, form: CheckpointFormat, world_size: int) -> SavePlan:
    """Who writes which bytes where, from what every rank holds."""
    holdings.check_complete()
    tensors, shared = list(holdings.tensors), form is not CheckpointFormat.MULTI_SHARD
    todo, model_rows, model_entries = np.ones(len(tensors), bool), None, list[tuple[int, int, int]]()
    if form is CheckpointFormat.CONSOLIDATED:
        model_rows, model_entries = _plan_model_file(holdings)
        for index, *_ in model_entries:
            todo[index], tensors[index] = False, tensors[index]._replace(alias_of=None)
    rows = assign_writers(holdings, todo[holdings.groups.rows.tensor], world_size)
    section = np.array([not t.name.startswith("model") for t in tensors], np.int64)[rows.tensor]
    nbytes = holdings.nbytes(rows)
    place = (*rows.box[:, 0].T[::-1], rows.tensor)
    order = np.lexsort((*place, nbytes < SMALL_BYTES, -holdings.itemsize[rows.tensor], section, rows.rank))
    rows, section, nbytes = rows.take(order), section[order], nbytes[order]
    # Sections start on 16 bytes and hold wide elements first, so every entry is aligned to its element size.
    model_bytes = np.bincount(rows.rank, nbytes * (1 - section), world_size).astype(np.int64)
    totals = np.bincount(rows.rank, nbytes, world_size).astype(np.int64)
    pads = -model_bytes % 16 * (totals > model_bytes)
    lengths = totals + pads
    bases = np.zeros(world_size + 1, np.int64)
    if shared:
        room = -(-lengths // st.BLOCK_BYTES) * st.BLOCK_BYTES  # I1: regions start on block boundaries
        last = max(np.flatnonzero(lengths), default=0)
        room[last] = lengths[last]
        bases[1:] = np.cumsum(room)
    first = bases[:-1] - (np.cumsum(totals) - totals)
    begin = np.cumsum(nbytes) - nbytes + first[rows.rank] + pads[rows.rank] * section
    shard = np.full_like(begin, form is CheckpointFormat.CONSOLIDATED) if shared else rows.rank
    return SavePlan(tensors, rows, begin, shard, bases.tolist(), shared, model_rows, model_entries)


def _plan_model_file(holdings: Holdings) -> tuple[Rows, list[tuple[int, int, int]]]:
    """CONSOLIDATED's model file: the entries of `model.state_dict()` that safetensors knows, as whole tensors.

    Tied ones are in it each; of per-rank copies the lowest rank's.
    """
    lowest, members = lowest_ranks(holdings.tensors), holdings.groups.members
    entries, begin = [], 0
    for index in np.argsort(-holdings.itemsize, kind="stable").tolist():
        t = holdings.tensors[index]
        if t.name.startswith("model/") and t.dtype not in ("C128", "C32", "JSON") and t.rank == lowest[t.name]:
            entries.append((index, begin, index if t.alias_of is None else t.alias_of))
            begin += math.prod(t.shape) * st.itemsize(t.dtype)
    return members.take(np.isin(members.tensor, [source for *_, source in entries])), entries


# --------------------------------------------------------------------------------------------------------------------
# S4: writing


class Source(NamedTuple):
    """What this rank writes into a tensor file: the row-major bytes of `view`, at [begin, end) of the file's data."""

    entry: st.Entry
    view: torch.Tensor
    flat: Bytes | None  # the memory of `view`, where it is as it goes into the file


def draft_entry(meta: st.TensorMetadata, box: Box, begin: int, packed: bool) -> st.Entry:
    """A piece's entry before it is written. `packed`: it will be compressed, to frames of at most these lengths."""
    nbytes = math.prod(box.size) * st.itemsize(meta.dtype)
    frames = tuple(min(st.FRAME_BYTES, nbytes - at) for at in range(0, nbytes, st.FRAME_BYTES)) if packed else ()
    name = entry_name(meta, box.offset, box.size == meta.shape)
    return st.Entry(name, meta.dtype, box.size, begin, begin + nbytes, box.offset, meta.shape, frames)


def placed(entry: st.Entry, begin: int, frames: Iterable[int]) -> st.Entry:
    """A compressed entry at its final place, with the stored lengths of its frames."""
    lengths = tuple(frames)
    return entry._replace(begin=begin, end=begin + sum(lengths), frames=lengths)


def data_end(entries: Sequence[st.Entry]) -> int:
    """Bytes of data in a file of these entries."""
    return entries[-1].end if entries else 0


class Draft(NamedTuple):
    """A tensor file under way: it is made with room for its header, which is written last."""

    name: str
    entries: list[st.Entry]
    header: bytes  # with zeros for checksums; as long as the final one

    def finish(self, file: st.StoredFile, crcs: Sequence[int], moved: Sequence[st.Entry]) -> st.ShardMetadata:
        """Write the header: the file is complete. `moved`: its entries, where compression has moved them."""
        end, header = data_end(moved or self.entries), st.with_checksums(self.header, crcs)
        if moved:
            header = st.encode_header(moved, crcs, len(self.header))
            file.resize(len(header) + end)
        if len(header) != len(self.header) or len(crcs) != st.block_count(end):
            raise AssertionError(
                f"{self.name}: {len(crcs)} checksums, {len(header)} bytes in a room of {len(self.header)}"
            )
        file.write(0, memoryview(header))
        return st.ShardMetadata(self.name, len(header) + end, st.crc32(header))


@no_garbage_collection()
def draft_file(name: str, entries: list[st.Entry], writers: int = 1) -> Draft:
    """The file that will hold `entries`, which that many ranks write."""
    end, room = data_end(entries), list[st.Entry]()
    if writers > 1 and any(e.frames for e in entries):  # compression leaves a gap behind every rank's part
        gap = st.Entry("", "U8", (end,), end, end, (0,), (end,))
        room = [gap._replace(name=f"pad/{end}{rank:06d}") for rank in range(min(writers, len(entries)))]
    return Draft(name, entries, st.encode_header([*entries, *room], [0] * st.block_count(end)))


class Progress(NamedTuple):
    """How far a save or load is: the step ("S4 write", "L4 read"), and its bytes on this rank, which end at the total."""

    step: str
    bytes_done: int
    bytes_total: int


class Meter:
    """Counts bytes from several threads and reports them from one: `tick` is what `in_parallel` polls."""

    def __init__(
        self, step: str = "", total: int = 0, report: Callable[[Progress], None] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._step, self._total, self._report, self._poll = step, total, report, poll
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
            self._report(Progress(self._step, self._sum, self._total))


Job = Callable[[Bytes], None]  # something for a thread of `in_parallel` to do, given its buffer


def run_jobs(jobs: Iterable[Job], meter: Meter, count: int) -> None:
    """Do all `count` of them on a few threads."""
    st.in_parallel(jobs, lambda job, buffer: job(buffer), count, meter.tick)


def checksums(views: Sequence[torch.Tensor], on_device: Sequence[int], meter: Meter) -> list[int]:
    """A checksum of the row-major bytes of each view: a CRC32 of CRC32s, or where asked, a sum made on its device."""
    rows = [[0] * st.block_count(0 if device else view.nbytes) for view, device in zip(views, on_device)]

    def checksum(index: int, block: int, buffer: Bytes) -> None:
        view, start = views[index], block * st.BLOCK_BYTES
        stop = min(start + st.BLOCK_BYTES, view.numel() * view.dtype.itemsize)
        if (flat := st.byte_view(view)) is not None:
            rows[index][block] = st.crc32(flat[start:stop])
        else:
            st.copy_out(view, start, buffer[: stop - start])
            rows[index][block] = st.crc32(buffer[: stop - start])

    jobs = [functools.partial(checksum, i, block) for i, row in enumerate(rows) for block in range(len(row))]
    run_jobs(jobs, meter, len(jobs))
    on_devices = [st.device_sum(view) if device else None for view, device in zip(views, on_device)]
    return [
        st.crc32(np.array(row, np.uint32)) if device is None else int(device) % (1 << 64)
        for row, device in zip(rows, on_devices)
    ]


def write_raw(file: st.StoredFile, start: int, sources: Sequence[Source], meter: Meter) -> list[int]:
    """Write this rank's part of a file block by block: gather, checksum while in cache, write. Returns the blocks' CRCs.

    `start`: where the file's data start.
    """
    ends = [s.entry.end for s in sources]
    first, stop = (sources[0].entry.begin // st.BLOCK_BYTES, ends[-1]) if sources else (0, 0)  # I1: begins on a block
    crcs = [0] * (st.block_count(stop) - first)

    def write_block(block: int, buffer: Bytes) -> None:
        low, high = block * st.BLOCK_BYTES, min(stop, (block + 1) * st.BLOCK_BYTES)
        index, position, data, crc = bisect.bisect_right(ends, low), low, buffer[: high - low], 0
        checked = low
        while position < high:  # copy a part, and checksum it while it is in the processor's cache
            flat, begin = sources[index].flat, sources[index].entry.begin
            stop_here = min(high, begin if position < begin else ends[index], position + CACHE_BYTES)
            part = data[position - low : stop_here - low]
            if position < begin:
                part[:] = 0  # a gap between entries
            elif flat is not None:
                part[:] = flat[position - begin : stop_here - begin]
            else:
                st.copy_out(sources[index].view, position - begin, part)
            position = stop_here
            index += position == ends[index]
            if position - checked >= CACHE_BYTES or position == high:
                crc, checked = st.crc32(data[checked - low : position - low], crc), position
        crcs[block - first] = crc
        file.write(start + low, data.data)
        meter.add(high - low)

    blocks: list[Job] = [functools.partial(write_block, first + index) for index in range(len(crcs))]
    run_jobs(blocks, meter, len(blocks))
    return crcs


def write_packed(
    file: st.StoredFile, start: int, sources: Sequence[Source], meter: Meter, level: st.CompressionLevel
) -> tuple[list[int], list[st.Entry]]:
    """Write this rank's part of a file compressed, one frame right behind the other; `start` as above.

    Returns the blocks' CRCs, and the entries as they came to lie. Frames are compressed on a few threads. A thread that
    asks for the next one first writes the oldest, so that they get into the file in order, and few wait in memory.
    """
    frames = [(s, number) for s in sources for number in range(len(s.entry.frames))]
    lengths, crcs, pending = [0] * len(frames), list[int](), bytearray()
    position = base = sources[0].entry.begin if sources else 0

    def compress(index: int, buffer: Bytes) -> bytes:
        source, number = frames[index]
        raw = buffer[: source.entry.frames[number]]
        st.copy_out(source.view, number * st.FRAME_BYTES, raw)
        packed = st.compress_frame(raw, source.view.dtype.itemsize, level)
        lengths[index] = len(packed)
        meter.add(len(raw))
        return packed

    def write(packed: bytes, least: int = st.BLOCK_BYTES) -> None:
        pending.extend(packed)
        while len(pending) >= least:
            block = pending[: st.BLOCK_BYTES]
            file.write(start + base + len(crcs) * st.BLOCK_BYTES, memoryview(block))
            crcs.append(st.crc32(block))
            del pending[: len(block)]

    def jobs() -> Iterator[Job]:  # runs in one thread at a time
        under_way: deque[Future[bytes]] = deque()
        for index in range(len(frames)):
            if len(under_way) == 2 * st.IO_THREADS:
                write(under_way.popleft().result())
            under_way.append(Future())
            yield functools.partial(fulfil, under_way[-1], compress, index)
        for future in under_way:
            write(future.result())
        write(b"", least=1)

    run_jobs(jobs(), meter, len(frames))
    entries, left = list[st.Entry](), iter(lengths)
    for source in sources:
        entries.append(placed(source.entry, position, itertools.islice(left, len(source.entry.frames))))
        position = entries[-1].end
    return crcs, entries


class Segment(NamedTuple):
    """A part of a block of the consolidated file: who has it, and where it goes (a box of the block)."""

    holders: Mapping[int, int]  # rank -> which of its pieces; the lowest rank first
    common: Box  # of the whole tensor
    inside: Box  # the box of the whole tensor that the block's bytes [at, at + ...) are
    at: int
    dtype: torch.dtype

    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.common.size) * self.dtype.itemsize

    def provider(self, owner: int) -> int:
        """The rank that gives it for a block of `owner`: the owner if it can, else the lowest."""
        return owner if owner in self.holders else next(iter(self.holders))


class Gathering:
    """The consolidated model file: whole tensors, cut into blocks, each written by the rank that holds most of it.

    Every rank works out the same schedule. What an owner lacks is sent to it, a few blocks of every owner a round, so the
    extra memory is a few blocks a rank, whatever the size of the model.
    """

    BLOCKS_A_ROUND = 4

    def __init__(
        self, op: Operation, pieces: Sequence[tuple[Box, torch.Tensor]],
        rows: Iterable[tuple[st.TensorMetadata, Box, list[int]]],
    ) -> None:  # fmt: skip
        """`rows`, in the order of the file: a tensor, the box of it that a rank holds, (begin, rank, as which piece)."""
        self._op, self._pieces = op, pieces
        found: dict[int, tuple[st.Entry, dict[Box, dict[int, int]]]] = {}
        for meta, box, (begin, rank, piece) in rows:
            if begin not in found:
                found[begin] = (draft_entry(meta, whole_box(meta.shape), begin, packed=False), {})
            found[begin][1].setdefault(box, {})[rank] = piece
        self._tensors = list(found.values())
        self._ends = [entry.end for entry, _ in self._tensors]
        self._owned = self._share_out()
        self.nbytes = sum(high - low for low, high in map(self._span, self._owned[op.rank]))  # that this rank writes

    def _span(self, block: int) -> tuple[int, int]:
        return block * st.BLOCK_BYTES, min(self._ends[-1], (block + 1) * st.BLOCK_BYTES)

    def _segments(self, block: int) -> Iterator[Segment]:
        """What makes up a block."""
        low, high = self._span(block)
        for index in range(bisect.bisect_right(self._ends, low), len(self._tensors)):
            entry, boxes = self._tensors[index]
            if entry.begin >= high:
                break
            width, dtype = st.itemsize(entry.dtype), st.DTYPES[entry.dtype]
            start, stop = (max(low, entry.begin) - entry.begin) // width, (min(high, entry.end) - entry.begin) // width
            for at, inside in st.row_boxes(entry.shape, start, stop):
                for box, holders in boxes.items():
                    if (common := box.intersect(inside)) is not None:
                        yield Segment(holders, common, inside, entry.begin + at * width - low, dtype)

    def _share_out(self) -> list[list[int]]:
        """The blocks that each rank owns: those that it holds most of; ties go to the rank with the fewest."""
        owned: list[list[int]] = [[] for _ in range(self._op.world_size)]
        for block in range(st.block_count(self._ends[-1] if self._ends else 0)):
            held: Counter[int] = Counter()
            for segment in self._segments(block):
                held.update(dict.fromkeys(segment.holders, segment.nbytes()))
            owned[min(held, key=lambda rank: (-held[rank], len(owned[rank]), rank))].append(block)
        return owned

    def write(self, file: st.StoredFile, start: int, meter: Meter) -> dict[int, int]:
        """Exchange and write; returns the CRC of every block that this rank owns. `start`: where the file's data start.

        What one round has gathered is checksummed and written while the next one is exchanged.
        """
        crcs: dict[int, int] = {}
        count = self.BLOCKS_A_ROUND
        buffers = [st.aligned_buffer(st.BLOCK_BYTES) for _ in range(2 * count)]
        stop = threading.Event()

        def finish(filled: Sequence[tuple[int, Bytes]]) -> None:
            for block, data in filled:
                if not stop.is_set():
                    crcs[block] = st.crc32(data)
                    file.write(start + block * st.BLOCK_BYTES, data.data)
                    meter.add(len(data))

        finished = in_thread(finish, ())
        try:
            for first in range(0, max(map(len, self._owned)), count):
                turn = [blocks[first : first + count] for blocks in self._owned]
                received = self._op.exchange(self._outgoing(turn))
                filled = [(b, self._put_together(b, out, received)) for b, out in zip(turn[self._op.rank], buffers)]
                wait_for(finished, meter.tick)
                finished = in_thread(finish, filled)
                buffers = buffers[count:] + buffers[:count]
                meter.tick()
            wait_for(finished, meter.tick)
        finally:
            stop.set()
            wait([finished], st.STUCK_S)
        return crcs

    def _outgoing(self, turn: Sequence[Sequence[int]]) -> dict[int, Bytes]:
        """What the other ranks lack for their blocks and have from here."""
        me, parts = self._op.rank, dict[int, list[Bytes]]()
        others = ((rank, block) for rank, blocks in enumerate(turn) if rank != me for block in blocks)
        for rank, segment in ((rank, s) for rank, block in others for s in self._segments(block)):
            if segment.provider(rank) == me:
                parts.setdefault(rank, []).append(out := np.empty(segment.nbytes(), np.uint8))
                st.copy_out(self._held(segment), 0, out)
        return {rank: np.concatenate(data) for rank, data in parts.items()}

    def _put_together(self, block: int, buffer: Bytes, received: dict[int, Bytes]) -> Bytes:
        """A block that this rank owns, from its own pieces and from received bytes, which it consumes."""
        low, high = self._span(block)
        for s in self._segments(block):
            if (rank := s.provider(self._op.rank)) == self._op.rank:
                part = self._held(s)
            else:
                data, received[rank] = np.split(received[rank], [s.nbytes()])
                part = torch.from_numpy(data).view(s.dtype).view(s.common.size)
            area = torch.from_numpy(buffer[s.at : s.at + math.prod(s.inside.size) * s.dtype.itemsize])
            area.view(s.dtype).view(s.inside.size)[s.common.within(s.inside)].copy_(part)
        return buffer[: high - low]

    def _held(self, segment: Segment) -> torch.Tensor:
        """A segment, in the piece that this rank has."""
        box, view = self._pieces[segment.holders[self._op.rank]]
        return view[segment.common.within(box)]


# --------------------------------------------------------------------------------------------------------------------
# Loading: L3 plan and L4 read


class Target(NamedTuple):
    """Where stored bytes shall go: `box` of the stored tensor `tensor` (its index) into `view`, of the box's size."""

    tensor: int
    box: Box
    view: torch.Tensor
    alone: bool = False  # no other rank wants these bytes


class Copy(NamedTuple):
    """What bytes [low, high) of a shard's data, in one block or one compressed frame, are for."""

    low: int
    high: int
    start: int  # expanded, they are the row-major bytes of `piece` from here on
    entry: st.Entry
    piece: Box  # of the stored tensor: what `entry` holds
    target: Target
    flat: Bytes | None  # the target's memory, where the whole piece goes there as it is
    need: tuple[int, int]  # of [low, high), from the first byte that is wanted to behind the last
    wanted: int  # and how many in there are; 0 where frames hide that


class Task(NamedTuple):
    """Blocks [first, last) of a shard, and what to do with their `nbytes` once they are read and verified."""

    shard: int
    first: int
    last: int
    nbytes: int
    copies: list[Copy]

    def spared(self) -> int:
        """How many of its bytes are for other ranks to read; 0 where they are not worth it, or not to be told apart."""
        runs = len(self.copies) <= MOST_PARTS and all(c.wanted == c.need[1] - c.need[0] for c in self.copies)
        spared = self.nbytes - sum(c.wanted for c in self.copies) if runs else 0
        return spared if spared >= PART_BYTES else 0

    def alone(self) -> bool:
        """Whether to read it past the cache: at least three quarters of what is read are for this rank alone."""
        return 4 * sum(c.wanted for c in self.copies if c.target.alone) >= 3 * (self.nbytes - self.spared())


MOST_PARTS = 16  # of a block that are worth reading one by one
PART_BYTES = 64 << 10  # parts that are nearer to each other are read together
LEAST_SPARED_BYTES = 16 << 20  # by all ranks: what is worth an exchange of CRC32s
COMPRESSED_WINDOW = 4  # blocks a task for compressed entries, whose frames do not end where blocks do


class Superseded(CheckpointException):
    """The checkpoint was replaced while it was read: reading again finds the new one."""


R = TypeVar("R", bound="CheckpointReader")


class CheckpointReader:
    """Verified reads of one committed checkpoint: every byte that it hands out has passed its block's CRC32.

    But for `run_part`, which leaves the proof to all ranks together. Bytes are read into a buffer, and copied from there
    into tensors only until the `with` block ends: a thread that is stuck in a read then changes no tensor when it returns.
    """

    def __init__(self, storage: st.CheckpointStorage, metadata: st.CheckpointMetadata) -> None:
        self.storage, self.metadata = storage, metadata
        self._headers: dict[int, st.Header] = {}
        self._entries: dict[int, dict[int, st.Entry]] = {}
        self._files: dict[int, st.StoredFile] = {}
        self._lock, self._gate = threading.Lock(), st.Gate()
        self.meter = Meter()  # of long checks
        self._rows = np.searchsorted(metadata.pieces.tensor, np.arange(len(metadata.tensors) + 1)).tolist()
        self.stored: dict[str, dict[int | None, int]] = {}  # name -> rank that it is kept for, None: all -> its index
        for index, t in enumerate(metadata.tensors):
            self.stored.setdefault(t.name, {})[t.rank] = index

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc: object) -> None:
        self._gate.close(wait=True)  # for copies from memory to memory, a block each
        for file in list(self._files.values()):
            file.close()

    def find(self, name: str, rank: int) -> int | None:
        """The index of the copy of `name` that `rank` gets: the shared, its own, or the lowest rank's; None: none."""
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
        return st.committed_id(self.storage, self.metadata.prefix) != self.metadata.save_id

    def file(self, shard: int) -> st.StoredFile:
        """The open file of a shard."""
        path = self.metadata.shard_path(shard)
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = self.storage.open(path)
                except FileNotFoundError as error:
                    if self.is_superseded():
                        raise Superseded(f"{path}: replaced by a newer save while it was read") from error
                    raise st.corrupted(f"{path}: shard is missing", path) from error
            return self._files[shard]

    def header(self, shard: int) -> st.Header:
        """The checked header of a shard."""
        if shard not in self._headers:
            info, path, file = self.metadata.shards[shard], self.metadata.shard_path(shard), self.file(shard)
            if file.length() != info.length:
                raise st.corrupted(f"{path}: {file.length()} bytes, the record says {info.length}", path)
            self._headers[shard] = st.read_header(file, path, info.header_crc, self._longest_header)
        return self._headers[shard]

    @functools.cached_property
    def _longest_header(self) -> int:
        """More bytes than any header can have that describes what the record lists.

        An entry for each piece and each empty tensor, with its name twice, each character escaped; six rows of numbers; eight
        digits a block and a frame; and the filler before it.
        """
        meta = self.metadata
        entries, ndim = len(meta.pieces.tensor) + len(meta.tensors), int(meta.pieces.box.shape[2])
        name = max((len(t.name) for t in meta.tensors), default=0)
        logical = sum(math.prod(t.shape) * st.itemsize(t.dtype) for t in meta.tensors)
        # Room for a compressed shard's header is made before anybody knows how many blocks that will be.
        digits = 8 * (logical // st.FRAME_BYTES + st.block_count(logical + meta.size_bytes()))
        return st.ALIGN_BYTES + entries * (1024 + 128 * ndim + 32 * name) + digits

    def pieces(self, tensor: int, box: Box) -> list[tuple[int, int, Box]]:
        """Stored pieces of a tensor that overlap `box`: (shard, begin, piece). CORRUPTED if they leave a hole in it."""
        table, (low, high) = self.metadata.pieces, self._rows[tensor : tensor + 2]
        ndim, rows = len(box.size), range(low, high)
        if high - low > 4 and ndim:
            start, size = table.box[low:high, 0, :ndim], table.box[low:high, 1, :ndim]
            first, count = np.array(box.offset), np.array(box.size)
            overlaps = ((start < first + count) & (start + size > first)).all(axis=1)
            rows = (np.flatnonzero(overlaps) + low).tolist()
        found, volume = [], 0
        for row in rows:
            piece = _box(table.box[row].tolist(), ndim)
            place = int(table.shard[row]), int(table.begin[row]), piece
            if piece == box:  # the layout that was saved
                return [place]
            if (common := piece.intersect(box)) is not None:
                found.append(place)
                volume += math.prod(common.size)
        if volume != math.prod(box.size):
            name = self.metadata.tensors[tensor].name
            raise st.corrupted(f"{name}: stored pieces cover {volume} of {math.prod(box.size)} elements", name)
        return found

    def _entry(self, shard: int, begin: int, box: Box, tensor: st.TensorMetadata) -> st.Entry:
        if shard not in self._entries:
            self._entries[shard] = {e.begin: e for e in self.header(shard).entries if e.end > e.begin}
        entry = self._entries[shard].get(begin)
        if entry is None or entry.shape != box.size or entry.dtype != tensor.dtype:
            path = self.metadata.shard_path(shard)
            raise st.corrupted(f"{path}: the record places {tensor.name} at byte {begin}, the header does not", path)
        return entry

    def plan(self, targets: Iterable[Target]) -> list[Task]:
        """L3: which blocks to read, and where each part of them goes; in the order of the blocks."""
        windows: dict[tuple[int, int], list[Copy]] = {}
        for target in targets:
            want, meta = target.box, self.metadata.tensors[target.tensor]
            if math.prod(want.size) == 0:
                continue
            for shard, begin, piece in self.pieces(target.tensor, want):
                entry = self._entry(shard, begin, piece, meta)
                exact = piece == want and target.view.dtype == st.DTYPES[meta.dtype]
                flat = st.byte_view(target.view) if exact else None
                blocks = COMPRESSED_WINDOW if entry.frames else 1
                for low, high, start, need, wanted in _spans(entry, piece, want):
                    copy = Copy(low, high, start, entry, piece, target, flat, need, wanted)
                    windows.setdefault((shard, low // st.BLOCK_BYTES // blocks * blocks), []).append(copy)
        tasks = []
        for (shard, _), copies in sorted(windows.items()):
            first = min(copy.low for copy in copies) // st.BLOCK_BYTES
            last = st.block_count(max(copy.high for copy in copies))
            tasks.append(Task(shard, first, last, st.block_span(self.header(shard), first, last), copies))
        return tasks

    def read(self, shard: int, first: int, last: int, buffer: Bytes, alone: bool = False) -> Bytes:
        """Blocks [first, last) of a shard, verified, in the beginning of `buffer`. `alone`: nobody else wants them."""
        header = self.header(shard)
        data = buffer[: st.block_span(header, first, last)]
        st.read_blocks(self.file(shard), header, first, last, data, self.metadata.shard_path(shard), alone)
        return data

    def read_task(self, task: Task, buffer: Bytes) -> Bytes:
        """A task's bytes, verified, in `buffer` unless they are too many for it."""
        room = buffer if task.nbytes <= len(buffer) else np.empty(task.nbytes, np.uint8)
        return self.read(task.shard, task.first, task.last, room, task.alone())

    def run(self, task: Task, buffer: Bytes) -> None:
        """L4 for one task: read, verify, put into place."""
        self.place(task, self.read_task(task, buffer))

    def run_part(self, task: Task, buffer: Bytes) -> list[Claim]:
        """L4 for one task of which others read the rest: read what is wanted, and put it into place, on trust.

        The claims tell what was read: all ranks together prove that it was right (`_unproved`).
        """
        header, base = self.header(task.shard), task.first * st.BLOCK_BYTES
        parts = sorted({copy.need for copy in task.copies})
        reads: list[tuple[int, int]] = []
        for low, high in parts:
            near = bool(reads) and low < reads[-1][1] + PART_BYTES
            reads.append((reads.pop()[0] if near else low // st.ALIGN_BYTES * st.ALIGN_BYTES, high))
        for low, high in reads:
            stop = min(task.nbytes, -(-(high - base) // st.ALIGN_BYTES) * st.ALIGN_BYTES)
            memory = buffer[low - base : stop].data
            self.file(task.shard).read(header.data_start + low, memory, memory if task.alone() else None)
        whole, end = st.as_linear(header.block_crcs[task.first], task.nbytes), base + task.nbytes
        crcs = [st.linear_crc32(buffer[low - base : high - base]) for low, high in parts]
        self.place(task, buffer[: task.nbytes])
        return [Claim(task.shard, task.first, *part, crc, end - part[1], whole) for part, crc in zip(parts, crcs)]

    def place(self, task: Task, data: Bytes) -> None:
        """Put the bytes of a task where they belong; OSError, and nothing changes, once the reader is closed."""
        for copy, part in self.parts(task, data):
            with self._gate:
                if copy.flat is not None:
                    copy.flat[copy.start : copy.start + len(part)] = part
                else:
                    dtype, target = st.DTYPES[copy.entry.dtype], copy.target
                    st.copy_in(part, copy.start, dtype, copy.piece, target.box, target.view)

    def parts(self, task: Task, data: Bytes) -> Iterator[tuple[Copy, Bytes]]:
        """What a task's verified bytes hold for each copy: bytes of its piece from `start` on, expanded."""
        base = task.first * st.BLOCK_BYTES
        for copy in task.copies:
            part, entry = data[copy.low - base : copy.high - base], copy.entry
            if entry.frames:
                length = min(st.FRAME_BYTES, entry.nbytes() - copy.start)
                part = st.expand_frame(part.tobytes(), length, st.itemsize(entry.dtype))
            yield copy, part

    def read_value(self, tensor: int) -> object:
        """A stored JSON value, still encoded."""
        meta = self.metadata.tensors[tensor]
        out = torch.empty(meta.shape, dtype=torch.uint8)
        for task in self.plan([Target(tensor, Box((0,), meta.shape), out)]):
            self.run(task, np.empty(task.nbytes, np.uint8))
        return st.parse_json(out.numpy().tobytes(), meta.name)


def _spans(entry: st.Entry, piece: Box, want: Box) -> Iterator[tuple[int, int, int, tuple[int, int], int]]:
    """The parts of blocks, or the frames, of a piece that overlap `want`: the numbers of a `Copy`."""
    first, last, count = 0, 0, 1  # of what is wanted of it, the first and last element in row-major order, and how many
    for at, size, begin, width in zip(*piece, *want):
        low, high = max(0, begin - at), min(size, begin + width - at)
        first, last, count = first * size + low, last * size + high - 1, count * (high - low)
    share, itemsize = count / (last + 1 - first), st.itemsize(entry.dtype)
    first, stop = first * itemsize, (last + 1) * itemsize
    if entry.frames:
        edges = np.cumsum([entry.begin, *entry.frames]).tolist()
        for frame in range(first // st.FRAME_BYTES, -(-stop // st.FRAME_BYTES)):
            low, high = edges[frame], edges[frame + 1]
            yield low, high, frame * st.FRAME_BYTES, (low, high), 0  # windows overlap: through the page cache
    else:
        first, stop = entry.begin + first, entry.begin + stop
        for block in range(first // st.BLOCK_BYTES, st.block_count(stop)):
            low, high = max(entry.begin, block * st.BLOCK_BYTES), min(entry.end, (block + 1) * st.BLOCK_BYTES)
            need = max(first, low), min(stop, high)
            yield low, high, low - entry.begin, need, int((need[1] - need[0]) * share)
