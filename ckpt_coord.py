"""Ranks: who writes and reads which bytes, and how all of them agree that it happened.

    ckpt.py  ->  ckpt_coord.py  ->  ckpt_storage.py        (this file does not import ckpt)

The save protocol (`CheckpointCoordinator.coordinate_save`); the checkpoint exists from the rename in S6 on:

    step        | who    | what                                                             | a crash leaves
    S1 agree    | all    | same prefix and options on every rank; rank 0 draws the save id  | nothing
    S2 collect  | each   | state dicts -> pieces held by this rank (`LocalTensor`)          | nothing
    S3 plan     | rank 0 | who writes which bytes, handed out; rank 0 raises the fence      | the fence, orphan shards
    S4 write    | each   | its blocks, checksummed in the same pass, fsync                  | orphan shards
    S5 report   | all    | lengths and CRCs to rank 0; replicas that differ: back to S3     | orphan shards
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
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
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
EARLY_PROOF_BYTES = 1 << 20  # replicas smaller than this are compared before writing, larger ones during it
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
    replicas: list[int]  # a CRC32 for each copy that it was asked for


class SaveResult(NamedTuple):
    """A committed save."""

    prefix: str
    warnings: list[str]
    bytes_written: int  # by this rank
    size_bytes: int  # of the whole checkpoint; 0 where not known, which is on other ranks than 0


class CheckpointCoordinator:
    """Runs S1 to S7 on one rank. `suspects`: tensors whose copies once differed, compared before they are written."""

    def __init__(
        self, coordinator: DistributedCoordinator, storage: st.CheckpointStorage, keep_last: int | None = None,
        suspects: set[str] | None = None,
    ) -> None:  # fmt: skip
        self.coordinator, self.storage, self.keep_last = coordinator, storage, keep_last
        self.suspects = set() if suspects is None else suspects

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
            proved = False
            while not proved:  # copies differ that were planned as replicas: once more, each rank its own
                attempt.plan()
                attempt.write()
                proved = attempt.report()
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
    _late_proof: ReplicaProof  # S3: of the copies that are checksummed in S4
    _fence: st.StoredFile | None = None  # S3
    _shared: Draft | None = None  # S3: the files that ranks share
    _model: Draft | None = None
    _reports: list[Report]  # S5
    size_bytes = 0  # S6

    def __init__(self, parent: CheckpointCoordinator, op: Operation) -> None:
        self.storage, self.keep_last, self._suspects = parent.storage, parent.keep_last, parent.suspects
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
        taken, prefix = st.recorded_prefixes(self.storage), self.request.prefix
        heads = [st.record_head(self.storage, other) for other in taken]
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
            self._data = data._replace(tensors=mark_tied(data.tensors))
            self._pieces = [piece for t in data.tensors for piece in t.pieces]
            for text, _ in data.values.values():
                self._pieces.append((Box((0,), (len(text),)), torch.frombuffer(bytearray(text), dtype=torch.uint8)))

    # S3
    def plan(self) -> None:
        with self.op.step("S3 plan"), no_garbage_collection():
            crcs = self._checksums()
            first = describe(self._data, crcs=crcs) if self.op.rank == 0 else None
            reference = self.op.broadcast(first[1] if first else None)
            description, _ = first or describe(self._data, str(reference), crcs)
            gathered = self.op.collect_at_0(st.dump_json(description))
            orders = self._lay_out(Holdings(gathered)) if self.op.rank == 0 else []
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

    def _checksums(self) -> dict[int, int]:
        """CRC32s, by their number, of those of this rank's pieces whose copies are compared before the writing.

        These are small ones, those that differed before, and in CONSOLIDATED, where whoever has most of a block writes it, all.
        """
        if not self.request.verify_replicas or self.op.world_size == 1:
            return {}
        chosen, index = list[int](), 0
        for t in self._data.tensors:
            early = t.name in self._suspects or self.request.format is CheckpointFormat.CONSOLIDATED
            for _, view in t.pieces:
                if not (t.cut_up or t.alias_of) and (early or view.nbytes < EARLY_PROOF_BYTES):
                    chosen.append(index)
                index += 1
        jobs, rows = checksum_jobs([self._pieces[index][1] for index in chosen])
        run_jobs(jobs, Meter(poll=self.op.poll), len(jobs))
        return dict(zip(chosen, summaries(rows)))

    def _views(self, runs: object) -> list[torch.Tensor]:
        """The pieces of this rank that rank 0 names by their numbers."""
        counts = runs[2::3] if isinstance(runs, list) else []
        return [self._pieces[index][1] for index in st.decode_runs(runs, sum(counts)).tolist()]

    def _split_differing(self, holdings: Holdings) -> None:
        """Where copies differ: of a DTensor the lowest rank's is kept, a plain tensor is kept per rank."""
        groups, apart, spoilt = holdings.groups, set[str](), list[int]()
        for group, odd_ranks in groups.differing(groups.members.crc).items():
            name, odd = holdings.tensors[groups.rows.tensor[group]].name, ", ".join(map(str, odd_ranks))
            which = f"rank(s) {odd} from rank {groups.rows.rank[group]}"
            if holdings.known[name].declared:
                spoilt += range(groups.start[group] + 1, groups.start[group] + groups.count[group])
                told = f"copies that its placement declares equal differ: {which}, whose copy is kept"
            elif name in apart:
                continue
            else:
                apart.add(name)
                told = f"differs between ranks ({which}); it is saved per rank"
            self.warnings.append(f"{name}: {told}")
        if apart or spoilt:
            holdings.arrange(apart, groups.members.take(np.array(spoilt, np.int64)))

    def _lay_out(self, holdings: Holdings) -> list[bytes]:
        """Plan, raise the fence, make the files that ranks share; what each rank needs to know to write its bytes."""
        self._split_differing(holdings)
        plan = self._plan = plan_layout(holdings, self.request.format, self.op.world_size)
        self._late_proof = ReplicaProof(holdings, self.request.verify_replicas)
        if self._fence is None:
            self._fence = self.storage.create(st.fence_name(self.ticket.prefix, self.ticket.save_id))
        common: dict[str, object] = {"proving": self._late_proof.count > 0, "shared": None, "model": None}
        if plan.shared:
            self._shared = self._draft_shared(plan)
            common["shared"] = self._make(self._shared)
        if plan.model_rows is not None:
            self._model = self._draft_model(plan)
            common["model"] = {**self._make(self._model), **_model_order(plan, plan.model_rows)}
            if self.request.packed:
                self.warnings.append("the consolidated model file is not compressed: others could not read it")
        return [
            st.dump_json({**common, **plan.order(rank), "replicas": self._late_proof.wanted(rank)})
            for rank in range(self.op.world_size)
        ]

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
            beside, replicas = checksum_jobs(self._views(order.all["replicas"]))
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
                    crcs, moved = self._write_part(file, len(draft.header), meter, beside)
                    shard = draft.finish(file, crcs, moved)
                    file.sync()  # I2
            elif entries:
                told = order.child("shared")
                with self._open(told.text("file")) as file:
                    crcs, moved = self._write_part(file, told.number("start"), meter, beside)
            else:
                run_jobs(beside, meter, len(beside))
            places, end = [(e.begin, e.frames) for e in moved], data_end(moved or entries)
            crcs = [] if shard else crcs
            self._report = Report(list(model.items()), shard, crcs, end, places, summaries(replicas))
            meter.tick()
            self.bytes_written = total

    def _write_part(
        self, file: st.StoredFile, start: int, meter: Meter, beside: Sequence[Job]
    ) -> tuple[list[int], list[st.Entry]]:
        """This rank's part of a file: the CRCs of its blocks, and its entries where compression has moved them."""
        if self.request.packed:
            return write_packed(file, start, self._sources, meter, beside, self.request.compression)
        return write_raw(file, start, self._sources, meter, beside), []

    # S5
    def report(self) -> bool:
        """Whether what was written may be committed; if not, its files are deleted and S3 runs again."""
        with self.op.step("S5 report"):
            self._reports = [Report(*json.loads(text)) for text in self.op.collect_at_0(st.dump_json(self._report))]
            if not self._order.all["proving"]:
                return True
            differing: set[str] = set()
            if self.op.rank == 0:
                found = self._late_proof.differing([report.replicas for report in self._reports])
                differing = {self._plan.tensors[index].name for index in found.tolist()}
            names = self.op.broadcast(sorted(differing))
            if not isinstance(names, list) or not names:
                return True
            self._suspects.update(map(str, names))
            for name in self._created:
                self.storage.delete(name)
            self._created = []
            self.warnings.clear()  # what they told is found again
            return False

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

    def _is_recorded(self, doubt: OSError) -> bool:
        prefix = self.ticket.prefix
        try:
            return st.committed_id(self.storage, prefix) == self.ticket.save_id
        except OSError:
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
            others = [m for m in st.list_committed(self.storage) if m.prefix != self.ticket.prefix]
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
        except OSError as error:  # the failure that brought us here matters more; `gc` finds what is left
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
        if self.step_name == "L4 read":
            text += "; tensors being loaded are undefined now: load again, or restart"
        message = f"{text} (rank {self.rank}, in {self.step_name})" if self.world_size > 1 else text
        return {
            "type": kind, "rank": rank, "message": message, "retryable": isinstance(error, self._retryable),
            "superseded": isinstance(error, Superseded),
        }  # fmt: skip

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
        self.rank, self.world_size = ranks.index(dist.get_rank()), len(ranks)
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
    declared: bool = False  # a DTensor: equal copies on several ranks are declared by its placements
    cut_up: bool = False  # a DTensor: its placements tell that no element is on several ranks
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
    cut_up = sharded is not None and not any(placement.is_replicate() for placement in placements)
    box, size = None, tuple(local.shape)
    if local.numel():
        box = whole_box(size) if sharded is None else _shard_box(name, sharded, size)
    pieces = [] if box is None else [(box, local.detach())]
    return LocalTensor(name, st.CODES[local.dtype], tuple(tensor.shape), pieces, sharded is not None, cut_up)


def _refuse_unsupported(name: str, tensor: torch.Tensor, placements: Sequence[Placement]) -> None:
    problem = ""
    if type(tensor).__name__ == "ShardedTensor":
        problem = "is an FSDP1 ShardedTensor; use FSDP2 (torch.distributed.fsdp.fully_shard), which holds DTensors"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
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
    if problem:
        raise CheckpointException(f"{name} {problem}", type=ExceptionType.SAVE_FAILED)


def _shard_box(name: str, tensor: DTensor, size: Shape) -> Box | None:
    """The part of a DTensor that this rank holds, which is of `size`; None outside of its mesh."""
    if (coordinate := tensor.device_mesh.get_coordinate()) is None:
        return None
    box = _strided_box(tensor, coordinate)
    if box is None or box.size != size:
        chunks = getattr(tensor, "__create_chunk_list__")()  # torch does not type it
        box = Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes))
        if len(chunks) != 1 or box.size != size:
            raise CheckpointException(
                f"{name}: its local shape {list(size)} is not what placements {tensor.placements} imply",
                type=ExceptionType.SAVE_FAILED,
            )
    return box


def _strided_box(tensor: DTensor, coordinate: Sequence[int]) -> Box | None:
    """The box of an FSDP2+TP shard: the later mesh dimensions cut first, the strided one cuts what they left.

    torch's own offsets are wrong for some such tensors whose dimension does not divide; None where this rule is not theirs.
    """
    offset, size, mesh = [0] * tensor.ndim, list(tensor.shape), tensor.device_mesh
    strided = [i for i, p in enumerate(tensor.placements) if hasattr(p, "split_factor")]
    if not strided:
        return None
    for index in [i for i in range(mesh.ndim) if i not in strided] + strided[::-1]:
        placement = tensor.placements[index]
        if placement.is_replicate():
            continue
        dim: int = getattr(placement, "dim")
        chunk = -(-size[dim] // mesh.size(index))  # as torch.chunk
        low = min(size[dim], chunk * coordinate[index])
        offset[dim], size[dim] = offset[dim] + low, min(chunk, size[dim] - low)
    return Box(tuple(offset), tuple(size))


def identity(view: torch.Tensor) -> tuple[object, ...]:
    """Equal for views of the same elements in the same order, and for no others."""
    flags = (view.is_conj(), view.is_neg())
    return (view.data_ptr(), view.device, view.dtype, tuple(view.shape), view.stride(), *flags)


def mark_tied(tensors: list[LocalTensor]) -> list[LocalTensor]:
    """Mark those that are the same view of the same memory as an earlier one: their bytes are stored once."""
    seen: dict[object, str] = {}
    marked = []
    for item in tensors:
        if item.pieces:
            box, view = item.pieces[0]
            first = seen.setdefault((item.dtype, item.shape, box, *identity(view)), item.name)
            item = item if first == item.name else item._replace(alias_of=first)
        marked.append(item)
    return marked


class CheckpointFormat(enum.Enum):
    """How tensors are spread over files."""

    SINGLE_FILE = "single_file"
    MULTI_SHARD = "multi_shard"
    CONSOLIDATED = "consolidated"


class ShardData(NamedTuple):
    """What S2 collects on a rank: tensors, and values as JSON text by name (True: kept per rank)."""

    tensors: list[LocalTensor]
    values: dict[str, tuple[bytes, bool]]


def in_model(name: str) -> bool:
    """Whether a stored name belongs to the model: such entries come first in a file."""
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
    declared: bool = False
    alias_of: str = ""
    crc: int = 0  # of a value
    kept: bool = False  # a value that every rank has for itself


def describe(
    data: ShardData, reference: str | None = None, crcs: Mapping[int, int] | None = None
) -> tuple[dict[str, object], str]:
    """What a rank holds, for the planner, and a digest of its tensors. `crcs`: those of pieces, by number.

    Where the digest equals `reference` (rank 0's), they are left out: at thousands of ranks it is nearly always equal.
    """
    tensors = [Told(t.name, t.dtype, t.shape, t.declared, t.alias_of or "") for t in data.tensors]
    values = [Told(n, "JSON", (len(text),), crc=st.crc32(text), kept=kept) for n, (text, kept) in data.values.items()]
    digest = hashlib.sha256(st.dump_json(tensors)).hexdigest()
    held = [(index, box) for index, t in enumerate(data.tensors) for box, _ in t.pieces]
    held += [(index, whole_box(value.shape)) for index, value in enumerate(values, len(tensors))]
    tensor = np.array([index for index, _ in held], np.int64)
    crc = np.zeros(len(held), np.int64)
    crc[list(crcs or {})] = [value + 1 for value in (crcs or {}).values()]
    pieces = st.encode_table({"tensor": tensor, "crc": crc}, stack_boxes([box for _, box in held]))
    return {"tensors": None if digest == reference else tensors, "values": values, "pieces": pieces}, digest


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
    crc: Ints  # 1 + the CRC32 of the bytes, 0 where not known
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

    def differing(self, crc: Ints) -> dict[int, list[int]]:
        """Groups whose copies differ, each with the ranks that differ from the lowest one; `crc` of each member, as in `Rows`."""
        first = crc[self.start[self.of_member]]
        odd = np.flatnonzero((crc != first) & (crc > 0) & (first > 0))
        found: dict[int, list[int]] = {}
        for group, rank in zip(self.of_member[odd].tolist(), self.members.rank[odd].tolist()):
            found.setdefault(group, []).append(rank)
        return found


class Holdings:
    """Every rank's description put together: one list of tensors, the rows of all their pieces, and which are equal."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        # Of each rank: its tensors (one object where ranks have the same), its values, and which of those each piece is of.
        self._told: list[tuple[list[Told], list[Told], Ints]] = []
        boxes, crcs = [], []
        for text in texts:
            body = json.loads(text)
            tensors = self._told[0][0] if body["tensors"] is None else _read_told(body["tensors"])
            (local, crc), box = st.decode_table(Fields(body["pieces"]), ("tensor", "crc"))
            self._told.append((tensors, _read_told(body["values"]), local))
            boxes.append(box)
            crcs.append(crc)
        tables = list({id(tensors): tensors for tensors, *_ in self._told}.values())
        width = max([1, *(len(t.shape) for table in tables for t in table)])  # empty ones too
        counts = [len(box) for box in boxes]
        stacked = np.zeros((sum(counts), 2, width), np.int64)
        stacked[:, 1] = 1
        for part, box in zip(np.split(stacked, np.cumsum(counts)), boxes):
            part[:, :, : box.shape[2]] = box
        rank, source = np.arange(len(counts)).repeat(counts), np.concatenate([np.arange(count) for count in counts])
        self._held = Rows(rank, source, np.zeros_like(rank), np.concatenate(crcs), stacked)
        self._spoilt = np.zeros(len(rank), bool)
        self.known, self._apart = _compare(itertools.chain(*tables, *(values for _, values, _ in self._told)))
        self.arrange(set())

    def arrange(self, apart: set[str], spoilt: Rows | None = None) -> None:
        """Keep the tensors `apart`, and what is tied to them, per rank; drop the `spoilt` copies.

        Aliases store no bytes.
        """
        self._apart |= apart | {t.name for t in self.known.values() if t.alias_of in apart}
        if spoilt is not None:
            self._spoilt[np.searchsorted(self._held.rank, spoilt.rank) + spoilt.source] = True
        self.tensors: list[st.TensorMetadata] = []
        self._ids: dict[tuple[str, int | None], int] = {}  # by name, and the rank that it is kept for
        columns = []
        shared: dict[int, tuple[Ints, list[int]]] = {}  # what is the same for all ranks that have one table
        for rank, (table, values, local) in enumerate(self._told):
            if id(table) not in shared:
                own = [i for i, t in enumerate(table) if t.name in self._apart]
                shared[id(table)] = np.array([self._number(t, rank) for t in table], np.int64), own
            common, own = shared[id(table)]
            ids = np.append(common, np.zeros(len(values), np.int64))
            ids[own] = [self._number(table[i], rank) for i in own]
            ids[len(table) :] = [self._number(value, rank) for value in values]
            columns.append(ids[local])
        for index, t in enumerate(self.tensors):
            if (target := self._ids.get((self.known[t.name].alias_of, t.rank))) is not None:
                self.tensors[index] = t._replace(alias_of=target)
        stored = np.array([t.alias_of is None for t in self.tensors], bool)
        rows = self._held._replace(tensor=np.concatenate(columns))
        self.groups = Groups(rows.take(stored[rows.tensor] & ~self._spoilt))
        self.itemsize = np.array([st.itemsize(t.dtype) for t in self.tensors], np.int64)

    def _number(self, told: Told, rank: int) -> int:
        """The index of a tensor, added at first sight."""
        own = rank if told.name in self._apart else None
        index = self._ids.setdefault((told.name, own), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(st.TensorMetadata(told.name, told.dtype, told.shape, own))
        return index

    def nbytes(self, rows: Rows) -> Ints:
        """Logical bytes of each row."""
        sizes: Ints = rows.box[:, 1].prod(axis=1) * self.itemsize[rows.tensor]
        return sizes

    def check_complete(self) -> None:
        """Every tensor's pieces must make up the whole of it; else VALIDATION_FAILED."""
        volume = np.zeros(len(self.tensors), np.int64)
        np.add.at(volume, self.groups.rows.tensor, self.groups.rows.box[:, 1].prod(axis=1))
        expected = [0 if t.alias_of is not None else math.prod(t.shape) for t in self.tensors]
        wrong = np.flatnonzero(volume != np.array(expected, np.int64))
        if len(wrong):
            t, found = self.tensors[wrong[0]], int(volume[wrong[0]])
            raise CheckpointException(
                f"{t.name}: the ranks together hold {found} of its {math.prod(t.shape)} elements (and {len(wrong) - 1} more "
                "tensors so): save with all ranks of its mesh, and with the same parallelism for it on each",
                type=ExceptionType.VALIDATION_FAILED,
            )


def _read_told(rows: Iterable[tuple[str, str, Shape, bool, str, int, bool]]) -> list[Told]:
    return [Told(*row)._replace(shape=tuple(row[2])) for row in rows]


def _compare(told: Iterable[Told]) -> tuple[dict[str, Told], set[str]]:
    """The first description of each name, and the names kept per rank because ranks differ, or asked to be.

    An alias counts if all ranks agree. A DTensor must not differ.
    """
    known: dict[str, Told] = {}
    apart = set()
    for t in told:
        first = known.setdefault(t.name, t)
        if t.alias_of != first.alias_of:
            known[t.name] = first._replace(alias_of="")
        differs = (t.dtype, t.shape, t.crc) != (first.dtype, first.shape, first.crc)
        if differs and (t.declared or first.declared):
            raise CheckpointException(
                f"{t.name}: ranks disagree: {first.dtype}{list(first.shape)} against {t.dtype}{list(t.shape)}",
                type=ExceptionType.VALIDATION_FAILED,
            )
        if differs or t.kept:
            apart.add(t.name)
    return known, apart


class ReplicaProof:
    """On rank 0: which copies each rank is to checksum beside the writing, those that were not compared before it."""

    def __init__(self, holdings: Holdings, verify: bool) -> None:
        self._groups = groups = holdings.groups
        values = np.array([t.dtype == "JSON" for t in holdings.tensors], bool)  # compared while planning
        open_ = np.zeros(len(groups.count), bool)
        open_[groups.of_member[groups.members.crc == 0]] = verify
        open_ &= (groups.count > 1) & ~values[groups.rows.tensor]
        asked = np.flatnonzero(open_[groups.of_member])
        rank, source = groups.members.rank[asked], groups.members.source[asked]
        order = np.lexsort((source, rank))  # a rank's pieces in their order make few runs
        self._asked, self._rank, self._source, self.count = asked[order], rank[order], source[order], len(asked)

    def wanted(self, rank: int) -> list[int]:
        """The pieces of a rank that it is to checksum, as runs."""
        return st.encode_runs(self._source[slice(*np.searchsorted(self._rank, (rank, rank + 1)))])

    def differing(self, answers: Sequence[Sequence[int]]) -> Ints:
        """The tensors of which copies differ, by number. `answers`: each rank's CRC32s."""
        crcs = np.zeros(len(self._groups.of_member), np.int64)
        crcs[self._asked] = np.concatenate([np.array(answer, np.int64) for answer in answers]) + 1
        return self._groups.rows.tensor[list(self._groups.differing(crcs))]


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
    section = np.array([not in_model(t.name) for t in tensors], np.int64)[rows.tensor]
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


def checksum_jobs(views: Sequence[torch.Tensor]) -> tuple[list[Job], list[list[int]]]:
    """Jobs that checksum the row-major bytes of views a block at a time, and where they put the CRC32s, a row a view."""
    rows = [[0] * st.block_count(view.numel() * view.dtype.itemsize) for view in views]

    def checksum(index: int, block: int, buffer: Bytes) -> None:
        view, start = views[index], block * st.BLOCK_BYTES
        stop = min(start + st.BLOCK_BYTES, view.numel() * view.dtype.itemsize)
        if (flat := st.byte_view(view)) is not None:
            rows[index][block] = st.crc32(flat[start:stop])
        else:
            st.copy_out(view, start, buffer[: stop - start])
            rows[index][block] = st.crc32(buffer[: stop - start])

    return [functools.partial(checksum, i, block) for i, row in enumerate(rows) for block in range(len(row))], rows


def summaries(rows: Iterable[Sequence[int]]) -> list[int]:
    """One CRC32 for each row of them."""
    return [st.crc32(np.array(row, np.uint32)) for row in rows]


def write_raw(
    file: st.StoredFile, start: int, sources: Sequence[Source], meter: Meter, beside: Sequence[Job]
) -> list[int]:
    """Write this rank's part of a file block by block: gather, checksum while in cache, write. Returns the blocks' CRCs.

    `start`: where the file's data start. `beside`: more work for the threads, spread over the time in which others wait
    for the disk.
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
    turns = [(index / len(row), job) for row in (blocks, beside) for index, job in enumerate(row)]
    run_jobs([job for _, job in sorted(turns, key=lambda turn: turn[0])], meter, len(turns))
    return crcs


def write_packed(
    file: st.StoredFile, start: int, sources: Sequence[Source], meter: Meter, beside: Sequence[Job],
    level: st.CompressionLevel,
) -> tuple[list[int], list[st.Entry]]:  # fmt: skip
    """Write this rank's part of a file compressed, one frame right behind the other; `start` and `beside` as above.

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
        yield from beside
        for future in under_way:
            write(future.result())
        write(b"", least=1)

    run_jobs(jobs(), meter, len(frames) + len(beside))
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
        """The index of what is stored as `name` for `rank`: shared by all, or its own; None where it has none."""
        held = self.stored.get(name, {})
        if (index := held.get(None, held.get(rank))) is None:
            return None
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
