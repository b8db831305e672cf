"""Distributed checkpoints for PyTorch: from any layout into any other, in plain files, without pickle.

    training code  ->  DistributedCheckpoint (here)  ->  ckpt_coord.py (ranks)  ->  ckpt_storage.py (bytes)

    checkpoint = DistributedCheckpoint(storage="./checkpoints")
    checkpoint.save(model, optimizer, "step_100", extra_state={"scheduler": scheduler})
    checkpoint.load(model, optimizer, "step_100", extra_state={"scheduler": scheduler})

Under these names a checkpoint keeps its tensors and values:

    model/<key>           a tensor of `model.state_dict()`; `model-values/<key>` is what is no tensor there
    model-metadata/...    `model.state_dict()._metadata`: the versions of modules
    optimizer/<fqn>/...   a tensor of the optimizer's state, by the *name* of its parameter
    optimizer/state       all else of the optimizer
    extra/<key>...        extra_state
    rng/state             random number generators, per rank

The steps S1 to S7 of a save and L1 to L5 of a load stand in ckpt_coord.py, the bytes and "committed" in
ckpt_storage.py. Guaranteed: after `save` has returned the checkpoint is durable; until its commit the old
one is whole; a bit that changed on disk is never loaded. Not guaranteed: protection against malicious
edits, or against damage before the bytes reached `save`.

In this order below: options and results; `DistributedCheckpoint`; saves in the background; state
(`ModelState`, `OptimizerState`, and for a load `Restore`); validation; export, import and diff; the command
line. Read next: ckpt_coord.py.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import contextlib
import datetime
import enum
import errno
import functools
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import stat
import sys
import threading
import time
import weakref
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import copy as shallow_copy
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TextIO, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING or __package__:  # mypy sees these files as part of a package, where most copies live
    from . import ckpt_coord as coord
    from . import ckpt_storage as st
else:
    import ckpt_coord as coord
    import ckpt_storage as st

CheckpointCoordinator = coord.CheckpointCoordinator
CheckpointFormat = coord.CheckpointFormat
CheckpointLoader = coord.CheckpointLoader
CheckpointReader = coord.CheckpointReader
DistributedCoordinator = coord.DistributedCoordinator
FaultToleranceHandler = coord.FaultToleranceHandler
LocalCoordinator = coord.LocalCoordinator
Progress = coord.Progress
RetryPolicy = coord.RetryPolicy
ShardData = coord.ShardData
TorchCoordinator = coord.TorchCoordinator
CheckpointException = st.CheckpointException
CheckpointMetadata = st.CheckpointMetadata
CheckpointStorage = st.CheckpointStorage
CompressionLevel = st.CompressionLevel
ExceptionType = st.ExceptionType
LocalStorage = st.LocalStorage
ShardMetadata = st.ShardMetadata
StorageFactory = st.StorageFactory
StorageOptions = st.StorageOptions
StoredFile = st.StoredFile
TensorMetadata = st.TensorMetadata
collect_garbage = st.collect_garbage

__all__ = [
    "CheckpointInfo",
    "CheckpointLoadResult",
    "CheckpointOptions",
    "CheckpointValidator",
    "ChecksumIntegrityChecker",
    "CompatibilityChecker",
    "Difference",
    "DistributedCheckpoint",
    "DistributedCheckpointFactory",
    "IntegrityChecker",
    "LoadOptions",
    "PendingSave",
    "SaveOptions",
    "SchemaCompatibilityChecker",
    "SizeIntegrityChecker",
    "Stateful",
    "ValidationResult",
    "VersionCompatibilityChecker",
    "diff_checkpoints",
    "export_checkpoint",
    "import_checkpoint",
    "load_safetensors",
]
__all__ += coord.__all__ + st.__all__

log = logging.getLogger("ckpt")
log.addHandler(logging.NullHandler())

# ----------------------------------------------------------------------------------------------------------
# Options and results


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: every nn.Module, Optimizer and LRScheduler is one."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state_dict: dict[str, object]) -> object: ...


Model = Stateful | Mapping[str, Stateful] | Mapping[str, torch.Tensor]  # pipeline stages by name; tensors
Optimizers = Stateful | Mapping[str, Stateful] | Sequence[Stateful]


def _check_member(value: object, allowed: Iterable[object], what: str) -> None:
    """ValueError unless `value` is one of `allowed`, or the value of an enum member among them."""
    members = list(allowed)
    values = [member.value if isinstance(member, enum.Enum) else member for member in members]
    if value not in members + values:
        names = ", ".join(f"{v!r} ({m})" if m is not v else repr(v) for m, v in zip(members, values))
        raise ValueError(f"unknown {what} {value!r}; allowed: {names}")


def _seconds(timeout: object) -> float | None:
    """A time limit, None for anything that is none."""
    return float(timeout) if isinstance(timeout, (int, float)) and timeout > 0 else None


def _check_timeout(timeout: object) -> None:
    if timeout is not None and _seconds(timeout) is None:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")


@dataclass
class SaveOptions:
    """How to save; the same on every rank. `timeout` in seconds, None: the default of `CheckpointOptions`.

    Enums may be given by value: "single_file", "fast".
    """

    checkpoint_prefix: str | None = None
    format: CheckpointFormat | str = CheckpointFormat.MULTI_SHARD
    compression_level: CompressionLevel | str = CompressionLevel.NONE
    include_optimizer: bool = True
    include_rng_state: bool = True
    timeout: float | None = None
    custom_metadata: Mapping[str, object] = field(default_factory=dict)
    overwrite: bool = True
    staging: str = "eager"  # save_async only
    replicas: str = "verify"
    progress: Callable[[Progress], None] | None = None

    def check(self) -> None:
        """ValueError for a value that is not allowed."""
        if self.checkpoint_prefix is not None:
            st.check_prefix(self.checkpoint_prefix)
        _check_member(self.format, CheckpointFormat, "format")
        _check_member(self.compression_level, CompressionLevel, "compression_level")
        _check_member(self.staging, ("eager", "overlapped"), "staging")
        _check_member(self.replicas, ("verify", "trust"), "replicas")
        _check_timeout(self.timeout)
        if not isinstance(self.custom_metadata, Mapping):
            raise ValueError(f"custom_metadata must be a mapping, not {self.custom_metadata!r}")
        st.encode_value(dict(self.custom_metadata), "custom_metadata")


@dataclass
class LoadOptions:
    """How to load; the same on every rank."""

    checkpoint_prefix: str | None = None
    load_optimizer: bool = True
    load_rng_state: bool = True
    resharding_strategy: str = "parallel"
    timeout: float | None = None
    skip_validation: bool = False
    strict_mode: bool = True
    fallback: bool = False
    progress: Callable[[Progress], None] | None = None

    def check(self) -> None:
        """ValueError for a value that is not allowed."""
        if not self.checkpoint_prefix:
            raise ValueError(
                "LoadOptions.checkpoint_prefix is required; latest_checkpoint() knows the newest"
            )
        st.check_prefix(self.checkpoint_prefix)
        _check_member(self.resharding_strategy, coord.RESHARDING_STRATEGIES, "resharding_strategy")
        _check_timeout(self.timeout)


Parts = dict[str, Stateful]  # of a model or an optimizer, by name; a single one has the name ""


class _State(NamedTuple):
    """A mapping of names to tensors (and values) as a Stateful; a load fills the tensors in place."""

    state: Mapping[str, object]

    def state_dict(self) -> Mapping[str, object]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, object]) -> object: ...


def _parts(what: str, given: object) -> Parts:
    """The parts of a "model" or an "optimizer" by name, "" for a single one. ValueError for other types."""
    if what == "optimizer" and isinstance(given, (list, tuple)) and not isinstance(given, Stateful):
        given = {str(number): part for number, part in enumerate(given)}
    named = given if isinstance(given, Mapping) else {"": given}
    if what == "model" and named is given and any(isinstance(part, torch.Tensor) for part in named.values()):
        for name, part in named.items():  # modules keep values under "_extra_state", not always of one shape
            named_well = isinstance(name, str) and not name.endswith("_extra_state")
            if not (named_well and isinstance(part, torch.Tensor)):
                must = "must have tensors alone, under names that do not end in '_extra_state'"
                raise ValueError(f"model: a mapping with tensors {must}; {name!r}: {type(part)}")
        return {"": _State(dict(named))}
    parts: Parts = {}
    for name, part in named.items():
        if not isinstance(part, Stateful):
            which = f"{what}[{name!r}]" if named is given else what
            others = "to tensors" if what == "model" else "a list of such"
            must = f"must have state_dict() and load_state_dict(), or be a mapping to such, or {others}"
            raise ValueError(f"{what} {must}; {which}: {type(part)}")
        parts[name] = part
    return parts


Options = TypeVar("Options", SaveOptions, LoadOptions)


@dataclass(frozen=True)
class Given(Generic[Options]):
    """What the user gave to a save or a load."""

    model: Parts
    optimizer: Parts | None
    options: Options
    extra_state: Mapping[str, object]
    cancel: threading.Event | None
    limit_s: float
    coordinator: DistributedCoordinator
    problem: BaseException | None  # an argument of another type; or why the last background save failed

    @property
    def prefix(self) -> str:
        """For messages: "" where there is none yet."""
        return prefix if isinstance(prefix := self.options.checkpoint_prefix, str) else ""

    def check(self) -> None:
        """ValueError for a misuse, or the earlier failure: in the first step, so that all ranks raise it."""
        if isinstance(self.problem, CheckpointException):
            message = (
                f"the save of {self.problem.checkpoint_path!r} in the background had failed: {self.problem}"
            )
            raise CheckpointException(message, type=self.problem.type) from self.problem
        if self.problem is not None:
            raise self.problem
        self.options.check()
        if not (
            isinstance(self.extra_state, Mapping) and all(isinstance(key, str) for key in self.extra_state)
        ):
            raise ValueError("extra_state must be a mapping of names to values")


@dataclass(frozen=True)
class CheckpointLoadResult:
    """What was loaded; `warnings` also has what strict mode refuses.

    `extra_state` has every entry, but for those kept per rank that have no copy for this rank.
    If world sizes differ, `extra_state_per_rank` has every copy of what is kept per rank: by key and saved
    rank, the same on all ranks.
    """

    metadata: CheckpointMetadata = field(repr=False)
    model_state: dict[str, object] = field(repr=False)
    optimizer_state: dict[str, object] = field(repr=False)
    source_world_size: int
    target_world_size: int
    was_resharded: bool
    extra_state: dict[str, object] = field(default_factory=dict, repr=False)
    prefix: str = ""
    warnings: list[str] = field(default_factory=list, repr=False)
    extra_state_per_rank: dict[str, dict[int, object]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint, for listings."""

    prefix: str
    version: str
    timestamp: datetime.datetime  # aware, UTC
    world_size: int
    size_bytes: int
    format: str
    custom_metadata: Mapping[str, object] = field(default_factory=dict)

    @staticmethod
    def of(meta: CheckpointMetadata) -> CheckpointInfo:
        """From its record."""
        when = datetime.datetime.fromisoformat(meta.timestamp)
        facts = (meta.prefix, str(meta.version), when, meta.world_size, meta.size_bytes(), meta.format)
        return CheckpointInfo(*facts, custom_metadata=meta.custom_metadata)


@dataclass
class CheckpointOptions:
    """Global configuration for `DistributedCheckpointFactory.create`; times in seconds.

    A path as `storage` means local files there.
    """

    storage: st.AnyStorage = field(default_factory=StorageOptions)
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    integrity_checkers: Sequence[IntegrityChecker] = ()
    compatibility_checkers: Sequence[CompatibilityChecker] = ()
    default_timeout: float = 600.0
    keep_last: int | None = None
    retain: Callable[[Sequence[CheckpointInfo]], Iterable[str]] | None = None


# ----------------------------------------------------------------------------------------------------------
# The checkpoint

R = TypeVar("R")


class DistributedCheckpoint:
    """Saves and loads checkpoints; also a context manager that waits for pending saves.

    Collective, called by every rank: `save`, `save_async`, `save_model_only`, `load`. Local, from any one
    rank: everything else. Without a coordinator each collective call takes that of the default process group.

    A path as `storage` means local files there; a string as `options` means options with that prefix.
    A `model` is a Stateful, a mapping of names to Statefuls, or one of names to tensors, which a load fills.
    An `optimizer` is a Stateful, a mapping of names to Statefuls, or a list of them, named "0", "1", ...
    """

    def __init__(
        self,
        coordinator: DistributedCoordinator | None = None,
        storage: st.AnyStorage | None = None,
        fault_handler: FaultToleranceHandler | None = None,
        validator: CheckpointValidator | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        self._given_coordinator = coordinator
        self._made: tuple[weakref.ref[dist.ProcessGroup], Future[TorchCoordinator]] | None = None
        self._warned_alone = False
        self.storage = StorageFactory.create(StorageOptions() if storage is None else storage)
        self.fault_handler = fault_handler or FaultToleranceHandler(self.storage)
        self.validator = validator or CheckpointValidator(self.storage)
        self.logger = logger or log
        self.default_timeout = CheckpointOptions.default_timeout
        self.keep_last: int | None = None
        self.retain: Callable[[Sequence[CheckpointInfo]], Iterable[str]] | None = None
        self._warned: set[tuple[str, ...]] = set()  # sets of names, as `CheckpointCoordinator` has them
        self._staging: st.Bytes = np.empty(0, np.uint8)  # memory for `save_async`, kept from one to the next
        self._pending: PendingSave | None = None

    @property
    def coordinator(self) -> DistributedCoordinator:
        """What a collective call would use now. Where none was given, reading it is such a call, too."""
        return self._look_up(self.default_timeout)

    def _look_up(self, limit_s: float) -> DistributedCoordinator:
        """The one given; else that of the default process group, kept while the group is the same object.

        TIMEOUT where the group's store does not answer within `limit_s` seconds.
        """
        if self._given_coordinator is not None:
            return self._given_coordinator
        group = dist.group.WORLD if dist.is_available() else None
        if group is None:
            return LocalCoordinator()
        if self._made is None or self._made[0]() is not group:  # its keys have a number: as many on all ranks
            self._made = weakref.ref(group), coord.in_thread(TorchCoordinator)
        try:
            return self._made[1].result(limit_s)
        except (concurrent.futures.TimeoutError, RuntimeError) as error:
            why = str(error) or f"no answer within {limit_s:g} s"
            message = f"the rendezvous store is unreachable (has the process that hosts it died?): {why}"
            raise CheckpointException(message, type=ExceptionType.TIMEOUT) from error

    def save(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        options: SaveOptions | str | None = None,
        *,
        extra_state: Mapping[str, object] | None = None,
        cancel: threading.Event | None = None,
    ) -> str:
        """Save a checkpoint and return its prefix. Collective; blocks until it is durable on every rank.

        ValueError for a misuse, CheckpointException for a failure, on every rank alike; then nothing was
        committed, an older checkpoint of this prefix is untouched, and this save's files are gone.
        """
        given = self._given(model, optimizer, options, SaveOptions, extra_state, cancel)
        return self._save(given, lambda: self._collect(given))

    def save_async(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        options: SaveOptions | str | None = None,
        *,
        extra_state: Mapping[str, object] | None = None,
        cancel: threading.Event | None = None,
    ) -> PendingSave:
        """Copy the state to host memory, and save it in the background. Collective.

        One save is in flight at a time.

        With staging="eager" the copy is done on return. With "overlapped" parameters and optimizer state are
        copied while forward and backward run: the optimizer's next step waits for it, and a change from
        elsewhere (an EMA, clipping in place; not one through `.data`, which leaves no trace) fails the save
        with the tensor's name. Every failure is raised by `result()`, or, if nobody asks, by the next save or
        `close`, and printed at exit.
        """
        pending = PendingSave(cancel)
        given = self._given(model, optimizer, options, SaveOptions, extra_state, pending.cancel_event)
        with pending.staging(), coord.no_garbage_collection():
            given.options.check()
            metadata = deepcopy(dict(given.options.custom_metadata))  # the caller may change it from now on
            given = replace(given, options=replace(given.options, custom_metadata=metadata))
            self._stage(pending, given)

        def save() -> None:
            try:
                with pending.staging():
                    _copy_staged(pending.late)
                pending.staged()
                pending.set_result(self._save(given, pending.collect))
            except BaseException as error:  # kept for whoever asks
                self.logger.error("background save failed: %s", error)
                pending.fail(error)
            finally:
                pending.data, pending.late = ShardData([]), []  # `pending` may be kept, the copy need not

        self._pending = pending
        threading.Thread(
            target=save, name="ckpt-save"
        ).start()  # no daemon: the interpreter's exit waits for it
        return pending

    def save_model_only(
        self, model: Model, options: SaveOptions | str | None = None, *, cancel: threading.Event | None = None
    ) -> str:
        """Save the model alone: no optimizer, no random number generators. Otherwise as `save`."""
        given = self._given(model, None, options, SaveOptions, None, cancel)
        given = replace(given, options=replace(given.options, include_rng_state=False))
        return self._save(given, lambda: self._collect(given))

    def load(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        options: LoadOptions | str | None = None,
        *,
        extra_state: Mapping[str, object] | None = None,
        cancel: threading.Event | None = None,
    ) -> CheckpointLoadResult:
        """Restore a checkpoint in place, whatever layout it was saved from. Collective.

        Blocks until every rank has its own.

        ValueError for a misuse, CheckpointException for a failure, on every rank alike. Before any byte was
        read into a tensor nothing has changed; after that tensors are undefined, and the error says so. With
        `fallback`, the newest older checkpoint that verifies is loaded instead of one that is corrupt.
        """
        given = self._given(model, optimizer, options, LoadOptions, extra_state, cancel)
        tried: list[str] = []
        warnings: list[str] = []
        while True:
            try:
                return self._load(given, warnings)
            except CheckpointException as error:
                if not given.options.fallback or error.type is not ExceptionType.CORRUPTED_CHECKPOINT:
                    raise
                tried.append(given.prefix)
                warnings.append(f"{given.prefix} is corrupt, falling back: {error}")
                self.logger.warning("%s", warnings[-1])
                if (older := self._older(given, tried)) is None:
                    raise
                given = replace(given, options=replace(given.options, checkpoint_prefix=older))

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints, oldest first. Local."""
        with _typed(""):
            return [CheckpointInfo.of(meta) for meta in st.list_committed(self.storage, self.logger.warning)]

    def latest_checkpoint(self) -> CheckpointInfo | None:
        """The newest committed checkpoint, by the order of saves. Local."""
        return next(reversed(self.list_checkpoints()), None)

    def delete_checkpoint(self, checkpoint_prefix: str) -> None:
        """Delete a checkpoint: its record first, then its shards; safe to repeat. Local: call it on one rank.

        CheckpointException(STORAGE_ERROR) where there is none.
        """
        st.check_prefix(checkpoint_prefix)
        with _typed(checkpoint_prefix):
            self.fault_handler.rollback(checkpoint_prefix)

    def validate_checkpoint(self, checkpoint_prefix: str) -> ValidationResult:
        """Read and check every byte of a checkpoint. Local."""
        return self.validator.validate_checkpoint(checkpoint_prefix)

    def close(self) -> None:
        """Wait for a pending save, raise its failure if nobody has asked for it, free the staging memory."""
        try:
            self._wait(self.default_timeout)
            if (error := self._unasked()) is not None:
                raise error
        finally:
            self._staging = np.empty(0, np.uint8)

    def __enter__(self) -> DistributedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- both

    def _given(
        self,
        model: Model,
        optimizer: Optimizers | None,
        options: Options | str | None,
        kind: type[Options],
        extra_state: Mapping[str, object] | None,
        cancel: threading.Event | None,
    ) -> Given[Options]:
        """Wait for the save in flight, and put together what was given. Nothing raises.

        S1 and L1 do, on all ranks.
        """
        problem: BaseException | None = None
        parts: tuple[Parts, Parts | None] = {}, None
        try:
            parts = _parts("model", model), None if optimizer is None else _parts("optimizer", optimizer)
        except ValueError as error:
            problem = error
        if isinstance(options, str):
            options = kind(checkpoint_prefix=options)
        if not isinstance(options, kind):
            if options is not None:
                must = f"options must be {kind.__name__}, or the prefix as a string"
                problem = ValueError(f"{must}, not {type(options)}")
            options = kind()
        limit_s = _seconds(options.timeout) or self.default_timeout
        coordinator = self._look_up(limit_s)
        self._wait(limit_s)
        if kind is SaveOptions:  # a load has nothing to do with it
            problem = self._unasked() or problem
            self._warn_if_alone(coordinator)
        extra = (
            dict(extra_state)
            if isinstance(extra_state, Mapping)
            else {}
            if extra_state is None
            else extra_state
        )
        return Given(*parts, replace(options), extra, cancel, limit_s, coordinator, problem)

    def _warn_if_alone(self, coordinator: DistributedCoordinator) -> None:
        """Warn once of a save by this process alone, which nobody has asked for, in a job of several."""
        world_size = os.environ.get("WORLD_SIZE", "")
        alone = self._given_coordinator is None and isinstance(coordinator, LocalCoordinator)
        if alone and not self._warned_alone and world_size.isdecimal() and int(world_size) > 1:
            self._warned_alone = True
            self.logger.warning(
                "this process saves alone, though WORLD_SIZE is %s: call init_process_group first, or each "
                "overwrites the others' checkpoints; if only one saves, say LocalCoordinator()",
                world_size,
            )

    def _wait(self, limit_s: float) -> None:
        """Wait for the save in flight."""
        if self._pending and concurrent.futures.wait([self._pending], limit_s + coord.GRACE_S).not_done:
            raise CheckpointException(
                f"the save in flight is not done after {limit_s:g} s", type=ExceptionType.TIMEOUT
            )

    def _unasked(self) -> BaseException | None:
        """What the last save in the background failed with, if nobody here has asked for it."""
        pending, self._pending = self._pending, None
        return None if pending is None or pending.asked else pending.exception()

    def _run(
        self, given: Given[Options], verb: str, body: Callable[[coord.Operation], R]
    ) -> tuple[R, coord.Operation]:
        """Run `body` on all ranks, again where they agree to.

        The failure that they agree on becomes the public exception.
        """
        retryable = tuple(self.fault_handler.retry_policy.retryable_exceptions)

        def attempt() -> tuple[R, coord.Operation]:
            for again in (True, False):
                limit_s, cancel, progress = given.limit_s, given.cancel, given.options.progress
                op = coord.Operation(given.coordinator, verb, limit_s, cancel, retryable, progress)
                try:
                    return body(op), op
                except coord.OperationFailed as failed:
                    self.logger.debug("an attempt failed: %s", failed)
                    if not (
                        again and failed.superseded
                    ):  # a save has replaced what was read: once more, for that
                        raise
            raise AssertionError("the loop returns or raises")

        try:
            return self.fault_handler.execute_with_retry(attempt, given.cancel)
        except coord.OperationFailed as failed:
            raise failed.public(given.prefix) from failed.__cause__

    def _log(self, level: int, what: str, count: int, started: float, op: coord.Operation) -> None:
        seconds = time.monotonic() - started
        steps = " ".join(f"{name.split()[0]} {took:.3f}" for name, took in op.seconds.items())
        self.logger.log(
            level, "%s in %.3f s, %.2f GB/s (%s)", what, seconds, count / 1e9 / max(seconds, 1e-9), steps
        )

    # ---- save

    def _save(self, given: Given[SaveOptions], collect: Callable[[], ShardData]) -> str:
        started, options = time.monotonic(), given.options

        def request() -> coord.SaveRequest:
            given.check()
            contents = ("optimizer",) * (given.optimizer is not None and options.include_optimizer)
            contents += ("rng",) * options.include_rng_state + tuple(sorted(given.extra_state))
            form, level = CheckpointFormat(options.format), CompressionLevel(options.compression_level)
            return coord.SaveRequest(
                options.checkpoint_prefix,
                form,
                level,
                options.overwrite,
                options.replicas == "verify",
                contents,
                options.custom_metadata,
            )

        retain = self.retain
        chosen = None if retain is None else lambda metas: retain([CheckpointInfo.of(meta) for meta in metas])
        saver = CheckpointCoordinator(given.coordinator, self.storage, self.keep_last, chosen, self._warned)
        save = functools.partial(saver.coordinate_save, request=request, collect=collect)
        result, op = self._run(given, "save", save)
        for warning in dict.fromkeys(result.warnings):
            self.logger.warning("%s: %s", result.prefix, warning)
        own, whole = result.bytes_written, result.size_bytes
        self._log(
            logging.DEBUG, f"rank {op.rank} wrote {own / 1e9:.3f} GB of {result.prefix}", own, started, op
        )
        if op.rank == 0:
            what = f"saved {result.prefix}: {whole / 1e9:.3f} GB by {op.world_size} rank(s)"
            self._log(logging.INFO, what, whole, started, op)
        return result.prefix

    def _collect(self, given: Given[SaveOptions]) -> ShardData:
        """S2: everything that this rank holds."""
        into, model = Collecting(), ModelState(given.model)
        model.collect(into)
        if given.optimizer is not None and given.options.include_optimizer:
            optimizer = OptimizerState(given.optimizer, model.parameters())
            optimizer.collect(into)
            if outside := optimizer.outside:
                message = "%d optimizer parameter(s) are not in the model and are kept by position, first %s"
                self.logger.warning(message, len(outside), outside[0])
        for key, value in given.extra_state.items():
            into.value(f"extra/{key}", value.state_dict() if isinstance(value, Stateful) else value)
        if given.options.include_rng_state:
            into.value("rng/state", rng_state(), per_rank=True)
        return into.finish()

    def _stage(self, pending: PendingSave, given: Given[SaveOptions]) -> None:
        """Collect, and copy to host memory all that the optimizer's next step, which will wait, does not
        change.
        """
        live = self._collect(given)
        copies = self._reserve(live)
        optimizers, guarded = list((given.optimizer or {}).values()), set[int]()
        if given.options.staging == "overlapped" and all(
            hasattr(o, "register_step_pre_hook") for o in optimizers
        ):
            guarded = _optimizer_memory(optimizers)
            for optimizer in optimizers:
                pending.hooks.append(
                    getattr(optimizer, "register_step_pre_hook")(lambda *_: pending.wait_staged())
                )
        for copy in copies.values():
            if (
                copy.view.data_ptr() in guarded and copy.version >= 0
            ):  # without a counter a change would go unseen
                pending.late.append(copy)
            else:
                copy.room.copy_(copy.view, non_blocking=True)
        if st.cuda_in_use():
            torch.cuda.current_stream().synchronize()
        for t in live.tensors:
            pieces = [(box, copies[coord.identity(view)].room) for box, view in t.pieces]
            pending.data.tensors.append(t._replace(pieces=pieces))
        pending.data = pending.data._replace(steps=live.steps)
        if not pending.late:
            pending.staged()

    def _reserve(self, live: ShardData) -> dict[tuple[object, ...], StagedCopy]:
        """Host memory for every piece, by `identity`, pinned where CUDA is in use."""
        views: dict[tuple[object, ...], tuple[str, torch.Tensor]] = {}
        for name, view in ((t.name, view) for t in live.tensors for _, view in t.pieces):
            views.setdefault(coord.identity(view), (name, view))
        *starts, total = itertools.accumulate(
            (-(-view.nbytes // 64) * 64 for _, view in views.values()), initial=0
        )
        if total > len(self._staging):
            self._staging = np.empty(0, np.uint8)  # before the larger one comes
            self._staging = st.aligned_buffer(total)
        memory, copies = torch.from_numpy(self._staging), dict[tuple[object, ...], StagedCopy]()
        as_dtype = {dtype: memory.view(dtype) for dtype in {view.dtype for _, view in views.values()}}
        for start, (key, (name, view)) in zip(starts, views.items()):
            first = start // view.itemsize
            room = as_dtype[view.dtype][first : first + view.numel()].view(view.shape)
            version = -1 if view.is_inference() else view._version  # those have no counter
            copies[key] = StagedCopy(name, view, room, version)
        return copies

    # ---- load

    def _load(
        self,
        given: Given[LoadOptions],
        warnings: Sequence[str],
        open_reader: Callable[[coord.Operation], CheckpointReader] | None = None,
    ) -> CheckpointLoadResult:
        started = time.monotonic()
        loader = CheckpointLoader(given.coordinator, self.storage)

        def body(op: coord.Operation) -> Restore:
            restore = Restore(given, op, self.validator, isinstance(given.coordinator, LocalCoordinator))
            loader.coordinate_load(op, restore, open_reader)
            return restore

        restored, op = self._run(given, "load", body)
        result = replace(restored.result, warnings=[*warnings, *restored.warnings])
        for warning in result.warnings:
            self.logger.warning("%s: %s", result.prefix, warning)
        own, whole = (
            sum(target.view.nbytes for target in restored.targets.values()),
            result.metadata.size_bytes(),
        )
        what = f"loaded {result.prefix}: {own / 1e9:.3f} of {whole / 1e9:.3f} GB"
        what += f" to rank {op.rank} of {op.world_size}"
        self._log(logging.DEBUG if op.rank else logging.INFO, what, own, started, op)
        return result

    def _older(self, given: Given[LoadOptions], tried: Sequence[str]) -> str | None:
        """The newest checkpoint older than those tried; any other where none of their records can be read."""

        def choose(op: coord.Operation) -> object:
            with op.step("L1 record"):
                choice = None
                if op.rank == 0:
                    heads = filter(
                        None, (st.record_head(self.storage, prefix, sound=False) for prefix in tried)
                    )
                    limit = min((head.sequence for head in heads), default=math.inf)
                    found = st.list_committed(self.storage, self.logger.warning)
                    older = [m.prefix for m in found if m.sequence < limit]
                    choice = next((prefix for prefix in reversed(older) if prefix not in tried), None)
                return op.broadcast(choice)

        found, _ = self._run(given, "load", choose)
        return found if isinstance(found, str) else None


@contextlib.contextmanager
def _typed(path: str, doing: str = "") -> Iterator[None]:
    """Turn an OSError of the storage into a CheckpointException, for the local calls."""
    try:
        yield
    except OSError as error:
        message = f"{doing}{type(error).__name__}: {error}"
        raise CheckpointException(message, path, ExceptionType.STORAGE_ERROR) from error


class DistributedCheckpointFactory:
    """Builds a `DistributedCheckpoint` from `CheckpointOptions`."""

    @staticmethod
    def create(
        coordinator: DistributedCoordinator | None = None, options: CheckpointOptions | None = None
    ) -> DistributedCheckpoint:
        """Local. ValueError for bad options."""
        options = options or CheckpointOptions()
        _check_timeout(options.default_timeout)
        if options.keep_last is not None and options.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {options.keep_last}")
        if options.keep_last is not None and options.retain is not None:
            raise ValueError("give keep_last or retain, not both")
        storage = StorageFactory.create(options.storage)
        made = DistributedCheckpoint(
            coordinator,
            storage,
            FaultToleranceHandler(storage, options.retry_policy),
            CheckpointValidator(storage, options.integrity_checkers, options.compatibility_checkers),
        )
        made.default_timeout, made.keep_last, made.retain = (
            options.default_timeout,
            options.keep_last,
            options.retain,
        )
        return made


# ----------------------------------------------------------------------------------------------------------
# Saves in the background


class StagedCopy(NamedTuple):
    """A live tensor and its copy in host memory; `version` is the live one's when the save was asked for."""

    name: str
    view: torch.Tensor
    room: torch.Tensor
    version: int


class PendingSave(Future[str]):
    """A save under way; `result()` is the prefix once it is committed and announced."""

    def __init__(self, cancel: threading.Event | None = None) -> None:
        super().__init__()
        self.cancel_event = cancel or threading.Event()
        self.asked = False  # whether somebody has seen the outcome
        self.late: list[
            StagedCopy
        ] = []  # what is copied in the background; `hooks` hold up the optimizer until then
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.data = ShardData([])
        self._staging_error: Exception | None = None
        self._staged = threading.Event()

    def wait_staged(self, timeout: float | None = None) -> None:
        """Return once the live tensors may be changed; TimeoutError after `timeout` seconds."""
        if not self._staged.wait(timeout):
            raise TimeoutError(f"not staged within {timeout} s")

    def cancel(self) -> bool:
        """Ask every rank to stop; False if it is over already. `result()` still tells the outcome."""
        self.cancel_event.set()
        return not self.done()

    def result(self, timeout: float | None = None) -> str:
        """The prefix; raises what the save raised."""
        try:
            return super().result(timeout)
        finally:
            self._seen()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the save raised, or None."""
        try:
            return super().exception(timeout)
        finally:
            self._seen()

    def _seen(self) -> None:
        if self.done():
            self.asked = True
            atexit.unregister(self._tell)

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Keep an error of the copying for `collect`."""
        try:
            yield
        except Exception as error:
            self._staging_error = self._staging_error or error

    def staged(self) -> None:
        """The copy is done, or given up: the live tensors are free."""
        for handle in self.hooks:
            handle.remove()
        self._staged.set()

    def fail(self, error: BaseException) -> None:
        """Keep the error for whoever asks; if nobody has when the interpreter exits, it is printed."""
        atexit.register(self._tell, str(error))
        self.set_exception(error)

    def _tell(self, why: str) -> None:
        print(
            f"ckpt: a save in the background failed, and nobody asked for its result: {why}", file=sys.stderr
        )

    def collect(self) -> ShardData:
        """S2 of the background save: the copy. An error of the copying is raised here, on all ranks."""
        if self._staging_error is not None:
            raise self._staging_error
        return self.data


def _copy_staged(copies: Sequence[StagedCopy]) -> None:
    """Copy in the background; a tensor that was changed meanwhile fails the save."""
    for name, view, room, version in copies:
        room.copy_(view)
        if view._version != version:
            raise CheckpointException(
                f"{name} was changed in place while it was being copied; wait_staged() first, "
                "or use staging='eager'",
                type=ExceptionType.SAVE_FAILED,
            )


def _optimizer_memory(optimizers: Iterable[object]) -> set[int]:
    """Addresses of what only an optimizer's step changes: its parameters and its state."""
    found: set[int] = set()
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            tensors += [
                v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
            ]
            for tensor in tensors:
                local = tensor if (sharded := coord.as_dtensor(tensor)) is None else sharded.to_local()
                found.add(local.data_ptr())
    return found


# ----------------------------------------------------------------------------------------------------------
# State: from state dicts to stored names, and back


class Collecting:
    """S2: what a save collects on a rank."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self.data = ShardData([], self.steps)
        self._values: dict[str, tuple[object, bool]] = {}
        self._names: set[str] = set()

    def tensor(self, name: str, tensor: torch.Tensor) -> str:
        """Add a tensor; returns the name that it gets, made unique."""
        unique, count = name, 0
        while unique in self._names:
            count += 1
            unique = f"{name}#{count}"
        self._names.add(unique)
        self.data.tensors.append(coord.local_tensor(unique, tensor))
        return unique

    def encode(self, value: object, path: str, root: str = "") -> object:
        """`value` as JSON, its tensors added under `root` and the path that they have in it, which begins
        with `path`.
        """
        try:
            return st.encode_value(
                value, path, lambda at, tensor: self.tensor(root + at.removeprefix("."), tensor)
            )
        except ValueError as error:
            raise CheckpointException(root + str(error).removeprefix(".")) from error
        except RecursionError as error:
            raise CheckpointException(f"{root or path}: nested too deeply, or contains itself") from error

    def value(self, name: str, value: object, per_rank: bool = False) -> None:
        """Add a value that is no tensor, with the tensors inside it."""
        self._names.add(name)
        self._values[name] = value, per_rank

    def finish(self) -> ShardData:
        """All of it.

        The tensors inside values get their names now, so that none takes that of a value to come.
        """
        for name, (value, per_rank) in self._values.items():
            text = st.dump_json(self.encode(value, name))
            self.data.tensors.append(coord.local_value(name, text, per_rank))
        try:
            for name in self._names:
                st.check_name(name)
        except ValueError as error:
            raise CheckpointException(str(error), type=ExceptionType.SAVE_FAILED) from error
        return self.data


def _torchs(module: str, name: str) -> tuple[type, ...]:
    """A class of torch, for `isinstance`. Imports nothing: a class not yet imported has no instances."""
    kind = getattr(sys.modules.get(module), name, None)
    return (kind,) if isinstance(kind, type) else ()


# Activation checkpointing leaves its attribute out of the keys of a state dict, but not out of `_metadata`.
_ACTIVATIONS = "_checkpoint_wrapped_module"
_WRAPPERS = {  # class -> the attribute that holds the wrapped module
    ("torch.nn.parallel", "DistributedDataParallel"): "module",
    ("torch.nn.parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): _ACTIVATIONS,
}


_Wrappers = list[tuple[tuple[type, ...], str]]  # the same as classes


def _wrapped(module: Stateful, wrappers: _Wrappers) -> str | None:
    """The attribute in which a wrapper holds its module; None if `module` is not a wrapper."""
    return next((attribute for kind, attribute in wrappers if isinstance(module, kind)), None)


def _walk(
    module: torch.nn.Module, wrappers: _Wrappers, name: str, live: str = "", key: str = ""
) -> Iterator[tuple[torch.nn.Module, str, str, str]]:
    """Every module inside `module`, itself first: with its canonical name, live name, and prefix of keys.

    Each is "" or ends in a dot. Canonical names leave out the attributes of wrappers.
    """
    yield module, name, live, key
    attribute = _wrapped(module, wrappers)
    for child_name, child in module._modules.items():
        if child is not None:
            part = f"{child_name}."
            child_key = key if child_name == attribute == _ACTIVATIONS else key + part
            child_of = name if child_name == attribute else name + part
            yield from _walk(child, wrappers, child_of, live + part, child_key)


def _canonical(key: str, prefixes: Mapping[str, str]) -> str:
    """The canonical name of a key. `prefixes`: a map from prefixes of keys to canonical names of modules."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) >= 0:
        if (name := prefixes.get(key[: end + 1])) is not None:
            return name + key[end + 1 :]
    return prefixes[""] + key


class ModelState:
    """The state of a model, or of several by name, under canonical names.

    CheckpointException for FSDP1. Each part comes with two maps to canonical names of modules: from prefixes
    of keys and, without final dots, from live names.
    """

    def __init__(self, model: Parts) -> None:
        self._parts: list[tuple[Stateful, dict[str, str], dict[str, str]]] = []
        self._states: list[dict[str, object]] = []
        self._modules: list[tuple[torch.nn.Module, str]] = []
        wrappers = [(_torchs(*path), attribute) for path, attribute in _WRAPPERS.items()]
        fsdp1 = _torchs("torch.distributed.fsdp", "FullyShardedDataParallel")
        for part_name, part in model.items():
            while (attribute := _wrapped(part, wrappers)) is not None:
                part = getattr(part, attribute)
            prefix = f"{part_name}." if part_name else ""
            keys, modules = {"": prefix}, {"": part_name}
            walk = _walk(part, wrappers, prefix) if isinstance(part, torch.nn.Module) else ()
            for module, name, live, key in walk:
                if isinstance(module, fsdp1):
                    raise CheckpointException(
                        f"{name[:-1] or 'the model'} is FSDP1 (FullyShardedDataParallel), whose state fits "
                        "no other number of ranks: use FSDP2 (fully_shard), or FSDP(..., device_mesh=mesh) "
                        "and get_state_dict(model, optimizer) in a Stateful in extra_state: see the README"
                    )
                keys[key], modules[live[:-1]] = name, name[:-1]
                self._modules.append((module, name))
            self._parts.append((part, keys, modules))

    def parameters(self) -> dict[int, str]:
        """id -> name of every parameter, or tensor of a mapping; of tied ones the first name."""
        names: dict[int, str] = {}
        for module, name in self._modules:
            for key, parameter in module._parameters.items():
                names.setdefault(id(parameter), name + key)
        for part, keys, _ in self._parts:
            for key, tensor in part.state.items() if isinstance(part, _State) else ():
                names.setdefault(id(tensor), _canonical(key, keys))
        return names

    def _entries(self) -> Iterator[tuple[str, dict[str, object], str, torch.Tensor | None]]:
        """Name, state dict, key in it, and tensor of every entry.

        None for `_extra_state` and what is no tensor.
        """
        self._states, seen = [], set[str]()
        for part, keys, _ in self._parts:
            given = part.state_dict()
            self._states.append(state := shallow_copy(given) if isinstance(given, dict) else dict(given))
            for key, value in state.items():
                if (name := _canonical(key, keys)) in seen:
                    raise CheckpointException(f"two entries of the model's state are named {name!r}")
                seen.add(name)
                tensor = (
                    value if isinstance(value, torch.Tensor) and not key.endswith("_extra_state") else None
                )
                yield name, state, key, tensor

    def _metadata(self) -> Iterator[tuple[dict[str, object], dict[str, object], dict[str, str]]]:
        """Each state dict that has `_metadata`, with this, and the canonical names of its keys."""
        for (_, keys, modules), state in zip(self._parts, self._states):
            if isinstance(metadata := getattr(state, "_metadata", None), dict):
                yield state, metadata, {live: modules.get(live, keys[""] + live) for live in metadata}

    def collect(self, into: Collecting) -> None:
        """S2."""
        for name, state, key, tensor in self._entries():
            if tensor is not None:
                into.tensor(f"model/{name}", tensor)
            else:
                into.value(f"model-values/{name}", state[key])
        # A wrapper has the canonical name of its module, which comes after it.
        found = {name: own[live] for _, own, names in self._metadata() for live, name in names.items()}
        if found:
            into.value("model-metadata/modules", {name: _shortened(own) for name, own in found.items()})

    def fill(self, restore: Restore) -> None:
        """L3: every tensor of the state is filled in place; values are decoded into it."""
        tensors: list[coord.LocalTensor] = []
        values: list[tuple[str, dict[str, object], str]] = []
        for name, state, key, tensor in self._entries():
            if tensor is not None:
                tensors.append(coord.local_tensor(f"model/{name}", tensor))
            else:
                values.append((f"model-values/{name}", state, key))
        stored = restore.reader.stored
        lacking = [t for t in tensors if t.name not in stored]
        places = {coord.identity(v) for t in tensors if lacking and t.name in stored for _, v in t.pieces}
        for t in tensors:
            # Other names that it is tied to may fill its memory, or it may have none on this rank.
            elsewhere = math.prod(t.shape) > 0 and all(coord.identity(view) in places for _, view in t.pieces)
            if t.name in stored or not elsewhere:
                restore.fill(t)
        for name, state, key in values:  # after the tensors: see `Restore.decode`
            if (index := restore.find(name)) is not None:
                state[key] = restore.value(index, state[key])
        self._fill_metadata(restore)

    def _fill_metadata(self, restore: Restore) -> None:
        """Put in the stored `_metadata`, under live names; where none is stored, the live one stays."""
        known: dict[object, object] = {}
        for index in restore.indices("model-metadata/modules"):
            value = restore.value(index, None)
            known |= value if isinstance(value, dict) else {}
        for state, _, names in self._metadata():
            found = [(live, known[name]) for live, name in names.items() if name in known]
            both = {live: dict(own) if isinstance(own, dict) else {"version": own} for live, own in found}
            if both:
                vars(state)["_metadata"] = OrderedDict(both)

    def apply(self, strict: bool) -> dict[str, object]:
        """L5: hand the filled state to the model's `load_state_dict`; returns it under canonical names."""
        result: dict[str, object] = {}
        for (part, keys, _), state in zip(self._parts, self._states):
            if isinstance(part, torch.nn.Module) and not strict:
                part.load_state_dict(state, strict=False)
            else:  # an override of it may not know `strict`
                part.load_state_dict(state)
            for key, value in state.items():
                result[_canonical(key, keys)] = value.detach() if isinstance(value, torch.Tensor) else value
        return result


def _shortened(metadata: object) -> object:
    """A module's metadata as it is stored: {"version": n}, which nearly all have, as n."""
    if isinstance(metadata, dict) and list(metadata) == ["version"] and type(metadata["version"]) is int:
        return metadata["version"]
    return metadata


class SavedParameter(NamedTuple):
    """What "optimizer/state" holds for a parameter, encoded."""

    part: str  # the optimizer that had it
    options: dict[str, object]  # of its group
    state: object  # None: it had none


class SavedOptimizer(NamedTuple):
    """What "optimizer/state" holds, of all ranks together."""

    parameters: dict[str, SavedParameter]
    empty: dict[str, list[dict[str, object]]]  # by part, the options of its groups without parameters
    others: dict[str, object]
    defaults: dict[str, object]  # by part, their names


def _saved_optimizer(restore: Restore) -> SavedOptimizer:
    """Read it, of all ranks, as pipeline ranks hold different parameters.

    The own wins, else the lowest rank's.
    """
    reader, name, own = restore.reader, "optimizer/state", restore.op.rank
    saved, differing, source = SavedOptimizer({}, {}, {}, {}), set[str](), dict[str, int]()
    for rank in sorted(reader.ranks(name), key=lambda rank: (rank == own, -rank)) or [own]:
        if (index := reader.find(name, rank)) is None:
            continue
        value, parameters = st.Fields(reader.read_value(index)), dict[str, SavedParameter]()
        states, others = value.child("states").all, value.child("others").all
        saved.empty.clear()
        for group in map(st.Fields, value.array("groups")):
            part, options = str(group.all.get("part", "")), group.child("options").all
            if not (names := group.texts("params")):
                saved.empty.setdefault(part, []).append(options)
            parameters |= {param: SavedParameter(part, options, states.get(param)) for param in names}
        for known, new in ((saved.parameters, parameters), (saved.others, others)):
            differing |= {key for key in new if key in known and known[key] != new[key]}
            source |= dict.fromkeys(new, rank)
        saved.parameters.update(parameters)
        saved.others.update(others)
        saved.defaults.update(value.child("defaults").all if "defaults" in value.all else {})
    for key in differing:
        if source[key] != own:
            restore.lent.setdefault(source[key], set()).add(f"optimizer/{key}")
    restore.unexpected |= {f"optimizer/{param}" for param in saved.parameters}
    return saved


def _defaults(optimizer: Stateful) -> set[str]:
    """The names of an optimizer's options, which tell its kind; none where it does not say."""
    defaults = getattr(optimizer, "defaults", None)
    return set(map(str, defaults)) if isinstance(defaults, Mapping) else set()


# The parameter groups of a torch optimizer: each as in the state_dict, and of its parameters name, tensor and
# key in "state".
_Groups = list[tuple[dict[str, object], list[tuple[str, torch.Tensor, object]]]]


class OptimizerState:
    """The state of one or several optimizers, keyed by the names of their parameters.

    So it survives another order of parameters, other groups and another parallelism. A parameter outside of
    the model is keyed by its position, one that several optimizers hold by their names too. Any other
    Stateful is stored as it is. All is one value, "optimizer/state": `groups`, each with its `part`, its
    `params` by name and its `options`; `states` by parameter; `others` and `defaults` by part.
    """

    def __init__(self, optimizer: Parts, names: Mapping[int, str]) -> None:
        zero = _torchs("torch.distributed.optim", "ZeroRedundancyOptimizer")
        if any(isinstance(part, zero) for part in optimizer.values()):
            raise CheckpointException(
                "optimizer: a ZeroRedundancyOptimizer gathers its state on one rank at a time, but all ranks "
                "save: use FSDP2 (fully_shard) with an ordinary optimizer; or pass its `optim`, this rank's "
                "part, and after a load copy the options (lr, ...) of `optim.param_groups` to its own"
            )
        self._parts, self._names = optimizer, names
        held = (
            id(p)
            for part in optimizer.values()
            for g in getattr(part, "param_groups", ())
            for p in g["params"]
        )
        self._contested = {key for key, count in Counter(held).items() if count > 1}
        self.outside: list[str] = []
        self._saved = SavedOptimizer({}, {}, {}, {})
        self._states: dict[str, dict[str, object]] = {}
        self._kept: list[tuple[Stateful, torch.Tensor, dict[str, object]]] = []

    def _apart(
        self, part_name: str, state: Mapping[str, object]
    ) -> tuple[dict[object, object], _Groups] | None:
        """A torch optimizer's state_dict taken apart: state by key, and groups; None for another Stateful."""
        live, by_key = getattr(self._parts[part_name], "param_groups", None), state.get("state")
        packed = state.get("param_groups")
        if live is None or len(state) > 2 or not isinstance(by_key, dict) or not isinstance(packed, list):
            return None
        groups: _Groups = []
        for number, (group, options) in enumerate(zip(live, packed)):
            groups.append((options, []))
            for position, (parameter, key) in enumerate(zip(group["params"], options["params"])):
                name = self._names.get(id(parameter))
                if name is None:
                    name = "#" + ".".join(filter(None, (part_name, str(number), str(position))))
                    self.outside.append(name)
                elif id(parameter) in self._contested:
                    name = f"{part_name}/{name}"
                groups[-1][1].append((name, parameter, key))
        return by_key, groups

    def collect(self, into: Collecting) -> None:
        """S2."""
        groups, states, others = list[object](), dict[str, object](), dict[str, object]()
        defaults = {part_name: sorted(_defaults(part)) for part_name, part in self._parts.items()}
        for part_name, part in self._parts.items():
            state = part.state_dict()
            if (apart := self._apart(part_name, state)) is None:
                others[part_name] = into.encode(state, f"optimizer/{part_name}")
                continue
            by_key, packed_groups = apart
            for packed, params in packed_groups:
                options = {
                    key: value for key, value in packed.items() if key not in ("params", "param_names")
                }
                encoded = into.encode(options, "optimizer/param_groups")
                names = [name for name, _, _ in params]
                groups.append({"part": part_name, "params": names, "options": encoded})
                for name, _, key in params:
                    if key in by_key:
                        states[name] = into.encode(by_key[key], "", f"optimizer/{name}/")
                    own = by_key.get(key)
                    step = own["step"] if isinstance(own, dict) and "step" in own else options.get("step")
                    if isinstance(step, (int, float)):
                        into.steps[name] = step
        node = {"groups": groups, "states": states, "others": others, "defaults": defaults}
        into.data.tensors.append(coord.local_value("optimizer/state", st.dump_json(node)))

    def fill(self, restore: Restore) -> None:
        """L3: state tensors are filled in place where they exist, else made, sharded as their parameter.

        An optimizer of another kind than the saved one is a problem; it stays as it is in loose mode.
        """
        saved = self._saved = _saved_optimizer(restore)
        for part_name, part in self._parts.items():
            state = part.state_dict()
            apart = self._apart(part_name, state)
            names = [name for _, params in (apart[1] if apart else ()) for name, _, _ in params]
            restore.unexpected -= {f"optimizer/{name}" for name in names}
            if difference := self._other_kind(part_name, names):
                what = f"optimizer {part_name!r}: another kind was saved"
                advice = "give one of that kind, or load_optimizer=False; strict_mode=False keeps it as it is"
                restore.problems.append(f"{what}: {difference}; {advice}")
            elif apart is not None:
                self._fill_torch(part_name, apart, restore)
            elif isinstance(whole := restore.decode(saved.others.get(part_name), state), dict):
                self._states[part_name] = whole
            else:
                restore.problems.append(f"optimizer {part_name!r}: missing from the checkpoint")

    def _other_kind(self, part_name: str, names: Iterable[str]) -> str:
        """How the saved optimizer is of another kind: each side has options that the other lacks. Else "".

        Options that one side alone adds decide nothing: another version of torch may have them.
        """
        here, known = _defaults(self._parts[part_name]), self._saved.parameters
        for saved_part in {known[name].part for name in names if name in known} or {part_name}:
            defaults = self._saved.defaults.get(saved_part)
            there = set(map(str, defaults)) if isinstance(defaults, list) else set[str]()
            if (lacking := sorted(there - here)) and (added := sorted(here - there)):
                return f"that has the options {', '.join(lacking)}, the one here {', '.join(added)}"
        return ""

    def _fill_torch(
        self, part_name: str, apart: tuple[dict[object, object], _Groups], restore: Restore
    ) -> None:
        """L3 of a torch optimizer."""
        saved, by_key, new_groups = self._saved, dict(apart[0]), []
        empty = saved.empty.get(part_name, [])
        if len(empty) != (count := sum(not params for _, params in apart[1])):
            what = f"{len(empty)} group(s) without parameters in the checkpoint, {count} here"
            restore.warnings.append(f"optimizer {part_name!r}: {what}, which keep their options")
            empty = [{}] * count
        in_order = iter(empty)
        for packed, params in apart[1]:
            if params:
                found = _group_options([name for name, _, _ in params], packed, saved.parameters, restore)
            else:
                found = {key: restore.decode(node, packed.get(key)) for key, node in next(in_order).items()}
            new_groups.append({**packed, **found})
            for name, parameter, key in params:
                live = by_key.pop(key, None)
                if name in saved.parameters and (node := saved.parameters[name].state) is not None:
                    by_key[key] = value = restore.decode(node, live, parameter)
                    if isinstance(value, dict):
                        self._kept.append((self._parts[part_name], parameter, value))
        self._states[part_name] = {"state": by_key, "param_groups": new_groups}

    def apply(self) -> dict[str, object]:
        """L5: hand over to `load_state_dict`, then put back the tensors whose dtype it changed."""
        for part_name, state in self._states.items():
            self._parts[part_name].load_state_dict(state)
        for part, parameter, kept in self._kept:
            live = getattr(part, "state", {}).get(parameter, {})
            for key, value in kept.items():
                now = live.get(key)
                if key != "step" and isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
                    if now.dtype != value.dtype:
                        live[key] = value.to(now.device)
        return self._states.get("", dict(self._states))


def _group_options(
    names: Sequence[str], packed: Mapping[str, object], saved: Mapping[str, SavedParameter], restore: Restore
) -> dict[str, object]:
    """The saved options of a group; where its parameters were saved with different ones, it keeps its own."""
    restore.problems += [
        f"optimizer/{name}: missing from the checkpoint" for name in names if name not in saved
    ]
    saved_options = [saved[name].options for name in names if name in saved]
    found = list({id(one): one for one in saved_options}.values())
    options: dict[str, object] = {}
    for key, node in (found[0] if found else {}).items():
        if any(other.get(key) != node for other in found):
            restore.warnings.append(
                f"optimizer group of {names[0]}: its parameters were saved with different {key!r}; "
                f"it keeps {packed.get(key)!r}"
            )
        else:
            options[key] = restore.decode(node, packed.get(key))
    return options


def rng_state() -> dict[str, object]:
    """The state of every random number generator in use: torch CPU and CUDA devices, numpy, random."""
    state: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": np.random.get_state(),
        "random": random.getstate(),
    }
    if st.cuda_in_use():
        state["cuda"] = [
            torch.cuda.get_rng_state(d).numpy().tobytes() for d in range(torch.cuda.device_count())
        ]
    return state


def set_rng_state(state: Mapping[str, object]) -> None:
    """Inverse of `rng_state`; CUDA devices that the state does not have keep theirs."""

    def tensor(data: object) -> torch.Tensor:
        return torch.frombuffer(bytearray(data if isinstance(data, bytes) else b""), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    numpy_state, python_state, devices = state["numpy"], state["random"], state.get("cuda")
    if isinstance(numpy_state, tuple) and isinstance(python_state, tuple):
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    if isinstance(devices, list) and torch.cuda.is_available():
        for device, data in enumerate(devices[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(tensor(data), device)


def _match(node: object, live: object) -> Iterator[tuple[str, torch.Tensor]]:
    """(stored name, live tensor) wherever an encoded value and `live` both have a tensor."""
    if isinstance(node, list) and isinstance(live, (list, tuple)):
        for item, other in zip(node, live):
            yield from _match(item, other)
    elif isinstance(node, dict) and node:
        tag, body = next(iter(node.items()))
        if tag == "$tensor" and isinstance(live, torch.Tensor):
            yield body, live
        elif tag == "$tuple":
            yield from _match(body, live)
        elif isinstance(live, dict):
            keyed = tag in ("$dict", "$OrderedDict", "$Counter")
            for key, item in body if keyed else node.items():
                yield from _match(item, live.get(st.decode_value(key, str) if keyed else key))


def _tensors_in(node: object) -> list[str]:
    """The names of the tensors in an encoded value."""
    names: list[str] = []
    st.decode_value(node, names.append)
    return names


def _allocate(name: str, shape: st.Shape, dtype: torch.dtype, param: torch.Tensor | None) -> torch.Tensor:
    """An empty tensor for optimizer state, laid out as its parameter.

    Sharded alike where the shapes are equal.
    """
    if param is None or name.endswith(
        "/step"
    ):  # torch keeps a step on the CPU; load_state_dict moves it where it must
        return torch.empty(shape, dtype=dtype)
    if (sharded := coord.as_dtensor(param)) is not None and shape:
        if tuple(sharded.shape) == shape:
            return torch.empty_like(sharded.detach(), dtype=dtype)
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import empty as empty_dtensor

        mesh = sharded.device_mesh
        return empty_dtensor(shape, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return torch.empty(shape, dtype=dtype, device=param.device)


class Restore:
    """One load on one rank.

    What is validated, which tensors are filled, what does not fit, and handing it all over.
    """

    reader: CheckpointReader  # from L3 on
    result: CheckpointLoadResult  # from L5 on

    def __init__(
        self, given: Given[LoadOptions], op: coord.Operation, validator: CheckpointValidator, local: bool
    ) -> None:
        self.given, self.op, self._validator = given, op, validator
        # With a LocalCoordinator in a job of several ranks, as likely as not each of them loads the same.
        local = local and dist.is_available() and dist.is_initialized()
        self._only_rank = op.world_size == 1 and not (local and dist.get_world_size() > 1)
        self.targets: dict[
            tuple[object, ...], coord.Target
        ] = {}  # by the memory that they fill, see `identity`
        self.problems: list[str] = []  # errors in strict mode, else warnings
        self.errors: list[str] = []  # errors in any mode
        self.warnings: list[str] = []
        self.lent: dict[int, set[str]] = {}  # by saved rank: names whose copy this rank takes, as it has none
        self._sought: set[str] = set()  # stored names that this rank asked for
        self._taken: set[int] = set()  # the indices of the copies that it takes, of what is kept per rank
        self.unexpected: set[str] = set()  # stored names that nothing here has claimed yet
        self._made: dict[
            tuple[object, ...], torch.Tensor
        ] = {}  # copies, where one live tensor has two stored ones
        self._model, self._optimizer = ModelState({}), OptimizerState({}, {})
        self._extra: dict[str, object] = {}
        self._extra_per_rank: dict[str, dict[int, object]] = {}
        self._rng: object = None

    def claim(self) -> dict[str, object]:
        """L1: what all ranks must ask for alike."""
        self.given.check()
        options = self.given.options
        with_optimizer = options.load_optimizer and self.given.optimizer is not None
        return {
            "verb": "load",
            "prefix": options.checkpoint_prefix,
            "strategy": options.resharding_strategy,
            "fallback": options.fallback,
            "skip_validation": options.skip_validation,
            "optimizer, rng, strict": [with_optimizer, options.load_rng_state, options.strict_mode],
        }

    def validate(self, reader: CheckpointReader) -> None:
        """L2: the record, and this rank's part of the shards."""
        if self.given.options.skip_validation:
            return
        result = self._validator.validate_metadata(reader.metadata)
        if result.is_valid:
            mine = range(self.op.rank, len(reader.metadata.shards), self.op.world_size)
            for shard in mine:
                reader.unit_crcs(shard)  # raises CORRUPTED_CHECKPOINT, which is more than "not valid"
            result.add(self._validator.validate_shards(reader, mine))
        if not result.is_valid:
            message = f"validation failed: {result.get_summary()}"
            raise CheckpointException(message, type=ExceptionType.VALIDATION_FAILED)
        self.warnings += result.warnings

    def match(self, reader: CheckpointReader) -> list[coord.Target]:
        """L3: match the state here with what is stored."""
        self.reader, given, options = reader, self.given, self.given.options
        stored = reader.metadata.tensors
        values = {t.name for t in stored if t.dtype == "JSON"}
        self.unexpected |= {t.name for t in stored if t.name.startswith("model/")} | set(
            filter(coord.in_model, values)
        )
        self._model = ModelState(given.model)
        self._model.fill(self)
        if given.optimizer is None and options.load_optimizer and "optimizer/state" in values:
            what = "the checkpoint has optimizer state, and load was given no optimizer"
            self.warnings.append(f"{what}: give it, or load_optimizer=False")
        elif given.optimizer is not None and options.load_optimizer:
            if "optimizer/state" in values:
                self._optimizer = OptimizerState(given.optimizer, self._model.parameters())
                self._optimizer.fill(self)
            else:
                self.problems.append("the checkpoint has no optimizer state (load with load_optimizer=False)")
        extra = {name for name in values if name.startswith("extra/")}
        for name in sorted(extra | {f"extra/{key}" for key in given.extra_state}):
            if name not in values:
                self.problems.append(f"{name}: missing from the checkpoint")
            else:
                live = given.extra_state.get(key := name.removeprefix("extra/"))
                for value in self._own_value(name, live.state_dict() if isinstance(live, Stateful) else None):
                    self._extra[key] = value
        self._extra_per_rank = self._read_extra_per_rank()
        if options.load_rng_state:
            if "rng/state" not in values:
                self.warnings.append("rng/state: missing from the checkpoint, so that it stays as it is")
            else:
                self._rng = next(iter(self._own_value("rng/state", None)), None)
        self._judge()
        return list(self.targets.values())

    def _own(self, mesh: st.Shape) -> int:
        """The rank under which this rank's copy is kept: of a DTensor the lowest of its mesh, else itself."""
        return min(self.op.own_ranks(mesh), default=self.op.rank)

    def find(self, name: str, mesh: st.Shape = ()) -> int | None:
        """The index of the copy of `name` that this rank takes, or None after noting the problem. `mesh`.

        Of its DTensor.
        """
        self.unexpected.discard(name)
        self._sought.add(name)
        if (index := self.reader.find(name, self._own(mesh))) is None:
            self.problems.append(f"{name}: missing from the checkpoint")
        elif (rank := self.reader.metadata.tensors[index].rank) is not None:
            self._taken.add(index)
            if rank != self._own(mesh):
                self.lent.setdefault(rank, set()).add(name)
        return index

    def _own_value(self, name: str, live: object) -> list[object]:
        """The stored value; [] after a warning if it, or a tensor in it, is kept for other ranks only."""
        reader, kept = self.reader, self.reader.ranks(name)
        self._sought.add(name)
        if not kept or self.op.rank in kept:
            index = reader.find(name, self.op.rank)
            node = None if index is None else reader.read_value(index)
            known = dict(_match(node, live))
            within = [
                (known.get(inner), ranks) for inner in _tensors_in(node) if (ranks := reader.ranks(inner))
            ]
            if all(self._own(coord.mesh_ranks(tensor)) in ranks for tensor, ranks in within):
                self.find(name)
                return [self.decode(node, live)]
            kept = within[0][1]
        what = f"kept for rank(s) {st.some(kept, 20)}, not for rank {self.op.rank}, where it stays as it is"
        others = "; see result.extra_state_per_rank" if name.startswith("extra/") else ""
        self.warnings.append(f"{name}: {what}{others}")
        return []

    def _read_extra_per_rank(self) -> dict[str, dict[int, object]]:
        """If world sizes differ: all copies of `extra_state` values that are kept per rank, or in part."""
        reader, meta = self.reader, self.reader.metadata
        extra = [(index, t) for index, t in enumerate(meta.tensors) if t.name.startswith("extra/")]
        if meta.world_size == self.op.world_size or all(t.rank is None for _, t in extra):
            return {}
        rows = {index: t for index, t in extra if t.dtype == "JSON"}
        texts, copies = self._hand_out(rows), list[tuple[str, int, object]]()
        for index, t in rows.items():
            node = st.parse_json(texts[index].numpy().tobytes(), t.name)
            within = {rank for name in _tensors_in(node) for rank in reader.ranks(name)}
            for rank in sorted(within) if t.rank is None else [t.rank]:
                copies.append((t.name.removeprefix("extra/"), rank, node))
        places: dict[tuple[str, int], int] = {}
        for name, rank in ((name, rank) for _, rank, node in copies for name in _tensors_in(node)):
            if (place := reader.find(name, rank)) is None:
                raise st.corrupted(f"{name}: a stored value has this tensor in it, the record does not")
            places[name, rank] = place
        tensors = self._hand_out(set(places.values()))
        found: dict[str, dict[int, object]] = {}
        for key, rank, node in copies:
            value = st.decode_value(node, lambda name: tensors[places[name, rank]].clone())
            found.setdefault(key, {})[rank] = value
        return found

    def _hand_out(self, indices: Iterable[int]) -> dict[int, torch.Tensor]:
        """Stored tensors, whole, by index, on all ranks: rank 0 reads them, and broadcasts their bytes."""
        metas = {index: self.reader.metadata.tensors[index] for index in sorted(indices)}
        tensors = {i: torch.empty(t.shape, dtype=st.DTYPES[t.dtype], device="cpu") for i, t in metas.items()}
        views = [view for tensor in tensors.values() if (view := st.byte_view(tensor)) is not None]
        if self.op.rank == 0:
            self.reader.fill(coord.Target(i, st.whole_box(t.shape), tensors[i]) for i, t in metas.items())
        read = self.op.broadcast([view.tobytes() for view in views] if self.op.rank == 0 else None)
        for view, data in zip(views, read if self.op.rank and isinstance(read, list) else ()):
            view[:] = np.frombuffer(data, np.uint8)
        return tensors

    def indices(self, name: str) -> Iterator[int]:
        """The indices of all ranks' values of a name: last this rank's own, before it the lowest rank's."""
        for rank in [*(r for r in reversed(self.reader.ranks(name)) if r != self.op.rank), self.op.rank]:
            if (index := self.reader.find(name, rank)) is not None:
                yield index

    def fill(self, local: coord.LocalTensor) -> None:
        """Arrange for a tensor of the model to be filled in place with what is stored under its name."""
        if (index := self.find(local.name, local.mesh)) is None:
            return
        meta = self.reader.metadata.tensors[index]
        if meta.shape != local.shape:
            shapes = f"shape {list(meta.shape)} in the checkpoint, {list(local.shape)} here"
            self.errors.append(f"{local.name}: {shapes}")
            return
        if meta.dtype != local.dtype:
            self.problems.append(f"{local.name}: dtype {meta.dtype} in the checkpoint, {local.dtype} here")
        self._aim(index, local)

    def _aim(self, index: int, local: coord.LocalTensor) -> None:
        """Have what is here of a tensor filled with the stored one of that number.

        The last of several wins, as in torch.
        """
        for box, view in local.pieces:  # tied tensors need one fill
            before = self.targets.get(place := coord.identity(view))
            if before is not None and before.tensor != index:
                lost = self.reader.metadata.tensors[before.tensor].name
                self.warnings.append(
                    f"{lost}: is one tensor here with {local.name}, whose stored value it gets"
                )
            alone = self._only_rank or (len(local.mesh) == self.op.world_size and not local.replicated)
            self.targets[place] = coord.Target(index, box, view, alone)

    def value(self, index: int, live: object) -> object:
        """A stored value with its tensors, as `decode`."""
        return self.decode(self.reader.read_value(index), live)

    def decode(self, node: object, live: object, param: torch.Tensor | None = None) -> object:
        """An encoded value.

        Its tensors are those in the same place of `live` where they fit, else new, laid out as `param`.

        New too where another stored tensor fills the live one: an average may start as what it averages.
        """
        known = dict(_match(node, live))

        def tensor(name: str) -> torch.Tensor:
            found = known.get(name)
            if (index := self.find(name, coord.mesh_ranks(param if found is None else found))) is None:
                return torch.empty(0) if found is None else found
            shape, dtype = (meta := self.reader.metadata.tensors[index]).shape, st.DTYPES[meta.dtype]
            if found is not None and param is not None and tuple(found.shape) != shape:
                self.errors.append(f"{name}: shape {list(shape)} in the checkpoint, {list(found.shape)} here")
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                found = _allocate(name, shape, dtype, param)
            local = coord.local_tensor(name, found)
            places = [coord.identity(view) for _, view in local.pieces]
            if any(place in self.targets and self.targets[place].tensor != index for place in places):
                found = self._made.setdefault((index, *places), torch.empty_like(found.detach()))
                local = coord.local_tensor(name, found)
            self._aim(index, local)
            return found

        return st.decode_value(node, tensor)

    def _judge(self) -> None:
        """Errors, or in loose mode warnings, for misfits; a name that no rank claims is unexpected."""
        taken = np.array(sorted(self._taken), np.int64)  # consecutive ones, where ranks have the same layout
        told = self.op.gather([sorted(self.unexpected), len(taken), st.pack_ints(taken)])
        rows = [row for row in told if isinstance(row, list)]
        unwanted = set.intersection(*(set(names) for names, _, _ in rows))
        everywhere = (st.unpack_ints(packed, count).tolist() for _, count, packed in rows)
        self._warn_of_kept(set(itertools.chain(*everywhere)))
        self.problems += [f"{name}: in the checkpoint, but not here" for name in sorted(unwanted)]
        if self.given.options.strict_mode:
            self.errors += self.problems
        else:
            self.warnings += self.problems
        if self.errors:
            what = f"checkpoint {self.reader.metadata.prefix!r} does not fit ({len(self.errors)} problem(s))"
            message = f"{what}:\n  " + st.some(self.errors, 20, "\n  ")
            raise CheckpointException(message, type=ExceptionType.VALIDATION_FAILED)

    def _warn_of_kept(self, taken: set[int]) -> None:
        """Of what is kept per rank, name what this rank takes of another one, and what no rank takes."""
        for rank, names in sorted(self.lent.items()):
            which = f"kept per rank, not for rank {self.op.rank}, which gets rank {rank}'s copy"
            self.warnings.append(f"{which}: {st.some(sorted(names), 20)}")
        tensors, left = self.reader.metadata.tensors, dict[tuple[int, ...], list[str]]()
        for name in sorted(self._sought | {tensors[index].name for index in taken}):
            copies = {rank: self.reader.find(name, rank) for rank in self.reader.ranks(name)}
            if ranks := tuple(rank for rank, index in copies.items() if index not in taken):
                left.setdefault(ranks, []).append(name)
        for ranks, names_left in left.items():
            which = f"kept for rank(s) {st.some(ranks, 20)}, and taken by no rank here"
            self.warnings.append(f"{which}: {st.some(names_left, 20)}")

    def apply(self) -> None:
        """L5: hand the filled states over."""
        model_state, optimizer_state = (
            self._model.apply(self.given.options.strict_mode),
            self._optimizer.apply(),
        )
        for key, value in self._extra.items():
            if isinstance(live := self.given.extra_state.get(key), Stateful) and isinstance(value, dict):
                live.load_state_dict(value)
        if isinstance(self._rng, dict):
            set_rng_state(self._rng)
        meta, here = self.reader.metadata, self.op.world_size
        self.result = CheckpointLoadResult(
            meta,
            model_state,
            optimizer_state,
            meta.world_size,
            here,
            meta.world_size != here,
            self._extra,
            meta.prefix,
            self.warnings,
            self._extra_per_rank,
        )


# ----------------------------------------------------------------------------------------------------------
# Validation


@dataclass
class ValidationResult:
    """What a validator found. It is valid if there are no errors."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        return not self.errors

    @property
    def has_warnings(self) -> bool:
        return bool(self.warnings)

    def get_summary(self) -> str:
        """Errors and warnings, a line each."""
        lines = [f"error: {e}" for e in self.errors] + [f"warning: {w}" for w in self.warnings]
        return "\n".join(lines) or "valid"

    def add(self, other: ValidationResult) -> None:
        """Add what another check found."""
        self.errors += other.errors
        self.warnings += other.warnings


@runtime_checkable
class IntegrityChecker(Protocol):
    """Checks one shard of a checkpoint.

    An exception that it raises counts as an error that it found, except CANCELLED and TIMEOUT.
    """

    name: str

    def check_integrity(self, reader: CheckpointReader, shard: int) -> ValidationResult: ...


@runtime_checkable
class CompatibilityChecker(Protocol):
    """Checks the record of a checkpoint. Exceptions count as with `IntegrityChecker`."""

    name: str

    def check_compatibility(self, metadata: CheckpointMetadata) -> ValidationResult: ...


class SizeIntegrityChecker:
    """Compares a shard's length, and the CRC32 of its header, with the record. Reads only the header."""

    name = "size"

    def check_integrity(self, reader: CheckpointReader, shard: int) -> ValidationResult:
        reader.unit_crcs(shard)
        return ValidationResult()


class ChecksumIntegrityChecker:
    """Compares every unit of a shard with its CRC32, and the header with the record. Reads every byte.

    Reports an error for each unit that differs.
    """

    name = "checksum"

    def check_integrity(self, reader: CheckpointReader, shard: int) -> ValidationResult:
        found, info = ValidationResult(), reader.metadata.shards[shard]
        reader.check_header(shard)
        blocks = range(0, info.length - info.header_bytes, st.BLOCK_BYTES)

        def check(low: int, buffer: st.Bytes, gate: st.Gate) -> None:
            found.errors.extend(reader.check_block(shard, low, buffer))
            reader.meter.add(min(st.BLOCK_BYTES, blocks.stop - low))

        st.in_parallel(blocks, check, reader.meter.tick, len(blocks))
        return found


class VersionCompatibilityChecker:
    """Compares the format version with this code's. Warns if torch was of another major version."""

    name = "version"

    def check_compatibility(self, metadata: CheckpointMetadata) -> ValidationResult:
        result = ValidationResult()
        if metadata.version != st.FORMAT_VERSION:
            result.errors.append(f"format version {metadata.version}; this code reads {st.FORMAT_VERSION}")
        if metadata.torch_version.partition(".")[0] != torch.__version__.partition(".")[0]:
            result.warnings.append(f"saved with torch {metadata.torch_version}, this is {torch.__version__}")
        return result


class SchemaCompatibilityChecker:
    """Checks that the pieces of each tensor hold each of its elements once. Reports at most 20 errors."""

    name = "schema"

    def check_compatibility(self, metadata: CheckpointMetadata) -> ValidationResult:
        shapes = [t.shape if t.alias_of is None else (0,) for t in metadata.tensors]
        wrong = st.not_covered_once(metadata.pieces.tensor, metadata.pieces.box, shapes)[:20]
        what = "its pieces do not hold each of its elements once"
        return ValidationResult([f"{metadata.tensors[index].name}: {what}" for index in wrong])


class CheckpointValidator:
    """Runs checkers: always the built-in ones, then the given ones."""

    def __init__(
        self,
        storage: CheckpointStorage,
        integrity_checkers: Sequence[IntegrityChecker] = (),
        compatibility_checkers: Sequence[CompatibilityChecker] = (),
    ) -> None:
        self.storage = storage
        self.integrity_checkers: list[IntegrityChecker] = [SizeIntegrityChecker(), *integrity_checkers]
        self.compatibility_checkers: list[CompatibilityChecker] = [
            VersionCompatibilityChecker(),
            SchemaCompatibilityChecker(),
            *compatibility_checkers,
        ]

    def validate_checkpoint(
        self, checkpoint_prefix: str, progress: Callable[[Progress], None] | None = None
    ) -> ValidationResult:
        """Check the record and every byte of every shard. Any process.

        Damage is reported, never raised.
        """
        for _ in range(2):  # a second time if a save replaces the checkpoint meanwhile
            try:
                reader = _open_checkpoint(self.storage, checkpoint_prefix)
            except (CheckpointException, OSError) as error:
                return ValidationResult([str(error)])
            with reader:
                result = self.validate_metadata(reader.metadata)
                reader.meter = coord.Meter("verify", reader.metadata.size_bytes(), progress)
                result.add(self.validate_shards(reader, extra=[ChecksumIntegrityChecker()]))
                if result.is_valid or not reader.is_superseded():
                    break
        return result

    def validate_metadata(self, metadata: CheckpointMetadata | str) -> ValidationResult:
        """Run the compatibility checkers on a record, or on that of a prefix."""
        record = st.read_committed(self.storage, metadata) if isinstance(metadata, str) else metadata
        result = ValidationResult()
        for checker in self.compatibility_checkers:
            result.add(_findings(checker.name, lambda: checker.check_compatibility(record)))
        return result

    def validate_shards(
        self,
        reader: CheckpointReader,
        shards: Iterable[int] | None = None,
        extra: Sequence[IntegrityChecker] = (),
    ) -> ValidationResult:
        """Run the integrity checkers, and those in `extra`, on some shards. Default: on all."""
        result = ValidationResult()
        for shard in range(len(reader.metadata.shards)) if shards is None else shards:
            for checker in (*self.integrity_checkers, *extra):
                found = _findings(checker.name, lambda: checker.check_integrity(reader, shard))
                result.add(found)
                if not found.is_valid:
                    break  # the next checker would only find the same damage again
        return result


def _open_checkpoint(storage: CheckpointStorage, prefix: str) -> CheckpointReader:
    """A reader of a committed checkpoint. LOAD_FAILED if there is none of that name."""
    return CheckpointReader(storage, coord.committed(storage, prefix)[1])


def _findings(name: str, check: Callable[[], ValidationResult]) -> ValidationResult:
    """What a checker returns, or its exception as an error, unless that ends the whole operation."""
    try:
        return check()
    except (coord.OperationFailed, coord._Stopped):
        raise
    except CheckpointException as error:
        if error.type in (ExceptionType.CANCELLED, ExceptionType.TIMEOUT):
            raise
        return ValidationResult([str(error)])
    except Exception as error:
        return ValidationResult([f"checker {name!r} raised {type(error).__name__}: {error}"])


# ----------------------------------------------------------------------------------------------------------
# Export: safetensors files for other programs

_FLOATS = ("F16", "BF16", "F32", "F64")  # what an export may cast: 8-bit floats mean nothing without scales
_SERIALIZED = (  # the order of dtypes in a file, as in safetensors' own serializer
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 "
    "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 F4 BOOL"
)


class _Exported(NamedTuple):
    """A tensor of an export."""

    stored: int  # the index of the tensor that holds its elements
    cast: str  # the dtype that they get
    name: str  # this, dtype and shape: what its file says
    dtype: str
    shape: st.Shape
    nbytes: int
    begin: int = 0  # its first byte in the file


_Files = dict[str, tuple[bytes, list[_Exported]]]  # by name: the bytes before the data, and the tensors


def export_checkpoint(
    storage: st.AnyStorage,
    prefix: str,
    out: str | os.PathLike[str],
    *,
    model_only: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[Progress], None] | None = None,
) -> list[str]:
    """Write a checkpoint of any layout as safetensors files. Local. Returns the paths of the files.

    `out` ends in ".safetensors". More than `max_shard_bytes` become `<out>-00001-of-0000N` and an index, as
    Hugging Face's libraries expect. The model's tensors have the names of `model.state_dict()`; each tied
    name gets a copy. Without `model_only` the other tensors follow, named as stored. `dtype` casts the
    model's floats of 16 bits and more. An older export to `out` is replaced.

    ValueError for a misuse; CheckpointException for damage or a failing disk. Then no file of the export is
    left, unless the disk failed while files got their final names or while an older export was removed.
    """
    storage = StorageFactory.create(storage)
    folder, name = os.path.split(os.path.abspath(out))
    stem, suffix = os.path.splitext(name)
    if suffix != ".safetensors":
        raise ValueError(f"the name of an export must end in .safetensors: {os.fspath(out)!r} does not")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    _check_member(dtype, (None, *(st.DTYPES[code] for code in _FLOATS)), "export dtype")
    with _typed(prefix, f"export to {out}: "), _open_checkpoint(storage, prefix) as reader:
        files = _lay_out(stem, _select(reader.metadata, model_only, dtype), max_shard_bytes)
        with _appearing(folder, stem, files) as opened:

            def write(source: coord.Target, start: int, to: tuple[StoredFile, _Exported]) -> None:
                file, exported = to
                data = _bytes_of(source.view.to(st.DTYPES[exported.cast]))
                file.write(exported.begin + start * st.itemsize(exported.cast), data.data)

            places = [
                (exported.stored, (opened[part], exported))
                for part, (_, tensors) in files.items()
                for exported in tensors
            ]
            _read_in_parts(reader, places, write, progress)
    return [os.path.join(folder, part) for part in files]


def _bytes_of(tensor: torch.Tensor) -> st.Bytes:
    """The memory of a contiguous tensor on the CPU."""
    data: st.Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return data


def _read_in_parts(
    reader: CheckpointReader,
    tensors: Iterable[tuple[int, R]],
    take: Callable[[coord.Target, int, R], None],
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Read stored tensors, by index, a block at a time. Call `take` for each box, on several threads.

    `take(target, start, item)` gets the elements in `target.view`, contiguous. The first one is element
    `start` of the tensor. `item` is what came with the index.
    """
    metas, own = reader.metadata.tensors, threading.local()
    parts = [(index, *part, item) for index, item in tensors for part in _blocks(metas[index])]
    total = sum(math.prod(box.size) * st.itemsize(metas[index].dtype) for index, _, box, _ in parts)
    meter = coord.Meter("export", total, progress)

    def read(part: tuple[int, int, st.Box, R], buffer: st.Bytes, gate: st.Gate) -> None:
        index, start, box, item = part
        if not hasattr(own, "memory"):  # one for each thread: malloc would keep several times as much
            own.memory = torch.from_numpy(st.aligned_buffer(st.BLOCK_BYTES))
        elements = own.memory.view(st.DTYPES[metas[index].dtype])[: math.prod(box.size)]
        target = coord.Target(index, box, elements.view(box.size))
        reader.fill([target], buffer)
        take(target, start, item)
        meter.add(elements.nbytes)

    st.in_parallel(parts, read, meter.tick, len(parts))
    meter.tick()


def _blocks(tensor: TensorMetadata) -> Iterator[tuple[int, st.Box]]:
    """Boxes of at most a block that make up a tensor, each with the position of its first element."""
    count, step = math.prod(tensor.shape), st.BLOCK_BYTES // st.itemsize(tensor.dtype)
    for low in range(0, count, step):
        yield from st.row_boxes(tensor.shape, low, min(count, low + step))


def _select(meta: CheckpointMetadata, model_only: bool, dtype: torch.dtype | None) -> list[_Exported]:
    """The tensors to export, in the order of the record. Logs what a user may not expect.

    ValueError if two get one name, CORRUPTED_CHECKPOINT for a name that no file can hold.
    """
    lowest, notes = st.lowest_ranks(meta.tensors), defaultdict[str, list[str]](list)
    chosen = list[_Exported]()
    for index, t in enumerate(meta.tensors):
        in_model, name, code = t.name.startswith("model/"), st.entry_name(t, st.whole_box(t.shape)), t.dtype
        if code == "JSON":
            if t.name.startswith("model") or not model_only:
                notes["left out, being no tensors"].append(name)
            continue
        if in_model and t.rank == lowest[t.name]:
            name = t.name.removeprefix("model/")
            if t.rank is not None:
                notes["kept per rank, exported as the lowest rank has it"].append(name)
        elif model_only:
            continue
        if in_model and dtype is not None and code in _FLOATS:
            code = st.CODES[dtype]
        form, shape = st.stored_form(code, t.shape)
        if form != code:
            notes["complex, exported as pairs of floats (see torch.view_as_complex)"].append(name)
        stored, nbytes = index if t.alias_of is None else t.alias_of, math.prod(t.shape) * st.itemsize(code)
        chosen.append(_Exported(stored, code, name, form, shape, nbytes))
    names = Counter(["__metadata__", *(exported.name for exported in chosen)])  # safetensors' own entry
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{meta.prefix}: two entries of the export would have one name: {st.some(twice)}")
    with _well_formed(meta.prefix):
        for name in names:
            st.check_name(name)
    for what, found in notes.items():
        log.warning("%s: %s: %s", meta.prefix, what, st.some(found))
    return chosen


def _lay_out(stem: str, chosen: Iterable[_Exported], limit_bytes: int) -> _Files:
    """The files of an export: one, or several and, last, their index."""
    groups, size = [list[_Exported]()], 0
    for exported in chosen:
        if groups[-1] and size + exported.nbytes > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(exported)
        size += exported.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": _with_header(groups[0])}
    many = len(groups)
    files = {f"{stem}-{n:05d}-of-{many:05d}.safetensors": _with_header(g) for n, g in enumerate(groups, 1)}
    weights = {exported.name: part for part, (_, tensors) in files.items() for exported in tensors}
    total = sum(exported.nbytes for group in groups for exported in group)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    return files | {f"{stem}.safetensors.index.json": (text, [])}


def _with_header(group: Iterable[_Exported]) -> tuple[bytes, list[_Exported]]:
    """The header of a safetensors file, byte for byte as their own serializer writes it; its tensors, placed.

    Wide elements come first, so that every tensor is aligned.
    """
    order, size = _SERIALIZED.split(), 0
    group = sorted(group, key=lambda exported: (order.index(exported.dtype), exported.name))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for _, _, name, dtype, shape, nbytes, _ in group:
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + nbytes]}
        size += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > st.MAX_HEADER_BYTES:
        what = f"a header for {len(group)} tensors is over the limit of safetensors"
        raise ValueError(f"{what}; make smaller files")
    begins = itertools.accumulate((exported.nbytes for exported in group), initial=8 + len(text))
    placed = [exported._replace(begin=begin) for exported, begin in zip(group, begins)]
    return len(text).to_bytes(8, "little") + text, placed


@contextlib.contextmanager
def _appearing(folder: str, stem: str, files: _Files) -> Iterator[Mapping[str, StoredFile]]:
    """Create files that get their names, durably, at the end and in order; or leave none of them.

    They replace the older export of that stem; at no time does an index name files of another export.
    Temporary files older than a day, which a dead process has left, are removed.
    """
    directory, opened = LocalStorage(folder), dict[str, st.LocalFile]()
    ending = f".{secrets.token_hex(4)}.tmp"  # unique: another export to the same name may be under way
    try:
        for part, (head, tensors) in files.items():
            opened[part] = file = directory.create(part + ending)
            file.resize(len(head) + sum(exported.nbytes for exported in tensors))
            file.write(0, memoryview(head))
        yield opened
        for file in opened.values():
            file.sync()
        directory.delete(f"{stem}.safetensors.index.json")
        for part in files:
            directory.publish(part + ending, part, overwrite=True)
        # Readers would prefer an older single file to the new index.
        old = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.[0-9a-f]{{8}}\.tmp)?")
        for name in st.os.listdir(folder):
            if old.fullmatch(name) and name not in files:
                with contextlib.suppress(FileNotFoundError):
                    if not name.endswith(".tmp") or directory.age_s(name) > 86400:
                        directory.delete(name)
        directory.sync_directory(stem)
    finally:
        for part, file in opened.items():
            file.close()
            directory.delete(part + ending)


# ----------------------------------------------------------------------------------------------------------
# Import: checkpoints of other programs


def import_checkpoint(
    source: str | os.PathLike[str],
    storage: st.AnyStorage,
    prefix: str,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> str:
    """Save the checkpoint of another program, bit for bit, as a new checkpoint. Local. Returns `prefix`.

    `load(model, None, prefix)` takes it. `source` is one of these:
    - a safetensors file, an index of several (`*.index.json`), or a directory with them: all of it is the
      model;
    - a file of torch.save, or a directory of torch.distributed.checkpoint (DCP): the model is what is under
      "model", "state_dict" or "model_state_dict", and the rest is `extra_state`. Without such a key the model
      is all tensors, by dotted names, and `extra_state` the entries without any.
    If all names begin with DDP's "module.", that is dropped.

    DCP's metadata is a pickle, which may run any code: import such a directory only if you trust its origin.
    ValueError for a misuse; CheckpointException for a damaged source, a failing disk, or an existing
    checkpoint of that prefix.
    """
    path = os.fspath(source)
    with _typed(path, f"{path}: "):
        is_dcp = os.path.isdir(path) and ".metadata" in st.os.listdir(path)
        model, extra = _split(_read_dcp(path) if is_dcp else _read_parts(path, _read_file))
    options = SaveOptions(prefix, include_rng_state=False, overwrite=False, progress=progress)
    with DistributedCheckpoint(LocalCoordinator(), storage) as checkpoint:
        return checkpoint.save(_State(model), None, options, extra_state=extra)


def _split(state: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """The model's state by dotted names, and the extra state: see `import_checkpoint`."""

    def has_tensor(key: str) -> bool:
        return any(isinstance(leaf, torch.Tensor) for _, leaf in _leaves(state[key], key))

    named = [
        key for key in ("model", "state_dict", "model_state_dict") if isinstance(state.get(key), Mapping)
    ]
    ours = named[:1] or list(filter(has_tensor, state))
    found = [leaf for key in ours for leaf in _leaves(state[key], "" if named else key)]
    dropped = "module." if all(name.startswith("module.") for name, _ in found) else ""
    model = {name.removeprefix(dropped): value for name, value in found}
    if len(model) < len(found):
        raise ValueError("two tensors would have one name: an a.b, and a b in an a")
    return model, {key: value for key, value in state.items() if key not in ours}


def _leaves(node: object, path: str) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of everything in nested mappings; a module's `_extra_state` is one value."""
    if isinstance(node, Mapping) and not path.endswith("_extra_state"):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _read_parts(path: str, read: Callable[[str], Mapping[str, R]]) -> dict[str, R]:
    """`read(file)` of all files of a source, joined. A source is a file, an index, or a directory with one.

    ValueError if it is not clear which files are meant.
    """
    folder, name = os.path.split(path)
    names = [name]
    if os.path.isdir(path):
        endings = (".safetensors", ".safetensors.index.json")
        folder, names = path, sorted(name for name in st.os.listdir(path) if name.endswith(endings))
    indices = [name for name in names if name.endswith(".index.json")]
    if not names or len(indices) > 1 or (indices and indices[0].removesuffix(".index.json") in names):
        raise ValueError(f"{path}: name one file; the safetensors files there: {st.some(names) or 'none'}")
    weights = dict[str, object]()
    for name in indices:
        index = os.path.join(folder, name)
        text = st.read_file(*_locate(index))
        with _well_formed(index):
            table = st.Fields(st.parse_json(text, index)).child("weight_map")
            weights, names = table.all, sorted(set(map(table.text, table.all)))
            for name in names:
                st.check_name(name)
                plain = os.path.basename(name) == name
                st.require(plain, f"{name!r} is not the plain name of a file beside the index")
    found: dict[str, R] = {}
    for name in names:
        tensors = read(os.path.join(folder, name))
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{path}: several files have {st.some(twice)}; name one file")
        found |= tensors
    if indices and (wrong := sorted(found.keys() ^ weights.keys())):
        raise st.corrupted(f"{path}: the index and its files do not agree on {st.some(wrong)}", path)
    return found


def _read_header(path: str) -> dict[str, tuple[str, st.Entry]]:
    """The tensors of a safetensors file by name, in the order of their bytes: the file, and the entry.

    `begin` and `end` count from the start of the file. CORRUPTED_CHECKPOINT if the file breaks a rule.
    """
    storage, name = _locate(path)
    with _well_formed(path), contextlib.closing(storage.open(name)) as file:
        length = file.length()
        file.read(0, memoryview(start := bytearray(min(8, length))))
        data = 8 + int.from_bytes(start, "little")
        fits = 10 <= data <= min(length, 8 + st.MAX_HEADER_BYTES)
        st.require(fits, f"impossible header length {data - 8} in a file of {length} bytes")
        file.read(8, memoryview(text := bytearray(data - 8)))
        entries = st.parse_entries(st.Fields(st.parse_json(text, path)), length - data)
    return {e.name: (path, e._replace(begin=data + e.begin, end=data + e.end)) for e in entries}


def _read_file(path: str) -> dict[str, object]:
    """The contents of a safetensors file, or of one of torch.save.

    Tensors are mapped into memory where possible: nothing is read before it is saved.
    """
    if path.endswith(".safetensors"):
        entries = [entry for _, entry in _read_header(path).values()]
        data = np.asarray(np.memmap(path, np.uint8, "c"))  # "c": private, since torch wants it writable
        parts = ((entry, torch.from_numpy(data[entry.begin : entry.end])) for entry in entries)
        return {entry.name: part.view(st.DTYPES[entry.dtype]).view(entry.shape) for entry, part in parts}
    _locate(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:
        # EINVAL: torch seeks to where a damaged file says.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointException(
            f"{path}: not *.safetensors, and torch.load(weights_only=True) refuses it: {_reason(error)}. "
            "Import takes tensors, numbers, strings, and lists, tuples and dicts of them: where the file "
            "comes from, save these alone, with torch.save or as safetensors, and import that",
            path,
            ExceptionType.LOAD_FAILED,
        ) from None  # a traceback would show torch's advice to turn its checks off
    if not isinstance(state, dict):
        what = f"holds a {type(state).__name__}; expected a dict of tensors, or of dicts of them"
        raise ValueError(f"{path}: {what}")
    return {str(key): value for key, value in state.items()}


def _reason(error: Exception) -> str:
    """Why torch refused a file, without its advice to turn checks off."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+?)[.,;]?(\s|$)", text)
    if found is not None:
        return f"it holds {found[1]}, which is not plain data"
    if isinstance(error, OSError) or "PytorchStreamReader" in text:
        return "it is cut short or damaged"
    sentence = text.partition("WeightsUnpickler error: ")[2] or text
    return f"{type(error).__name__}: {sentence.strip()}".splitlines()[0].partition(". ")[0].rstrip(".: ")


def _locate(path: str) -> tuple[LocalStorage, str]:
    """The directory and the name of a regular file; links are followed: Hugging Face's cache has them.

    ValueError for anything else: to open a FIFO or a device could block forever.
    """
    if not stat.S_ISREG(mode := st.os.stat(path).st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path}: expected a file, found {kinds.get(stat.S_IFMT(mode), 'a device')}")
    folder, name = os.path.split(os.path.realpath(path))
    return LocalStorage(folder), name


@contextlib.contextmanager
def _well_formed(path: str) -> Iterator[None]:
    """Raise CORRUPTED_CHECKPOINT for what the parsers find wrong."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise st.corrupted(f"{path}: malformed: {error}", path) from error


def _read_dcp(path: str) -> dict[str, object]:
    """What torch.distributed.checkpoint has saved, nested as it was. It unpickles: the source is trusted."""
    from torch.distributed.checkpoint import default_planner, state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException as DcpException  # a BaseException
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for folder, _, names in st.os.walk(path):
        for name in names:
            _locate(os.path.join(folder, name))
    state: dict[str, object] = {}
    planner = getattr(default_planner, "_EmptyStateDictLoadPlanner")()
    try:  # as torch's own dcp_to_torch_save does it
        state_dict_loader._load_state_dict(state, FileSystemReader(path), planner=planner, no_dist=True)
    except (Exception, DcpException) as error:
        why = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        message = f"{path}: torch.distributed.checkpoint cannot read it: {why}"
        raise CheckpointException(message, path, ExceptionType.LOAD_FAILED) from error
    return state


# ----------------------------------------------------------------------------------------------------------
# Load: safetensors files straight into a model

Rename = Mapping[str, str | None] | Callable[[str], str | None]  # from names in files to names of the model


def load_safetensors(
    model: Model,
    path: str | os.PathLike[str],
    *,
    rename: Rename | None = None,
    strict: bool = True,
    coordinator: DistributedCoordinator | None = None,
) -> CheckpointLoadResult:
    """Load safetensors files into a model, sharded or not, in place. Collective; every rank reads its part.

    `path` is a file, an index (`*.index.json`), or a directory with one of them, such as a snapshot in
    Hugging Face's cache; links to files are followed. `model` is as in `DistributedCheckpoint.load`.
    `rename` maps the names in the files to names of the model: a mapping, where names that it lacks stay as
    they are, or a function. None as the new name leaves a tensor out. Names that are tied in the model need
    one stored tensor.

    Missing and unexpected names, and other dtypes, are errors if `strict`; else they are warnings in the
    result, and dtypes are cast. Another shape is always an error. Safetensors files have no checksums, so
    nothing is verified; a warning says so.

    ValueError for a misuse, CheckpointException for a failure, on every rank alike. Nothing has changed then,
    unless the message says that tensors are undefined.
    """
    source = os.path.abspath(path)

    def read_headers(op: coord.Operation) -> CheckpointReader:
        meta = _as_record(source, rename)
        crc = st.crc32(st.dump_json(st.encode_tables(meta)))
        coord.demand_equal(op.gather({"the headers of the files (CRC32)": f"{crc:08x}"}))
        return _UnverifiedReader(LocalStorage(meta.prefix), meta)

    options = LoadOptions("safetensors", load_rng_state=False, skip_validation=True, strict_mode=strict)
    checkpoint = DistributedCheckpoint(coordinator)
    given = checkpoint._given(model, None, options, LoadOptions, None, None)
    warnings = [f"{source}: safetensors files have no checksums; nothing was verified"]
    try:
        return checkpoint._load(given, warnings, read_headers)
    except CheckpointException as error:
        error.checkpoint_path = source
        raise


class _UnverifiedReader(CheckpointReader):
    """Reads safetensors files that other programs have written; they have no checksums to verify."""

    def unit_crcs(self, index: int) -> list[int]:
        return []

    def file(self, index: int) -> StoredFile:
        with self._lock:
            if index not in self._files:
                storage, name = _locate(self.metadata.shard_path(index))
                self._files[index] = storage.open(name)
            return self._files[index]


def _as_record(source: str, rename: Rename | None) -> CheckpointMetadata:
    """The headers of safetensors files as a record, with one piece a tensor. Its prefix is their directory.

    ValueError if two tensors get one name.
    """
    shards, tensors, rows = list[ShardMetadata](), dict[str, TensorMetadata](), list[tuple[int, int, int]]()
    for name, (path, (_, dtype, shape, begin, end)) in _read_parts(source, _read_header).items():
        new = rename(name) if callable(rename) else (rename or {}).get(name, name)
        if new is None:
            continue
        if new in tensors:
            raise ValueError(f"{source}: two tensors would have the name {new!r}, one of them from {name!r}")
        file = os.path.basename(path)
        # Pieces begin at multiples of their element size. Where one would not, the file is listed once more.
        if not shards or shards[-1].file != file or (begin - shards[-1].header_bytes) % st.itemsize(dtype):
            shards.append(ShardMetadata(file, end, begin, 0))
        shards[-1] = shards[-1]._replace(length=end)
        rows.append((len(shards) - 1, begin - shards[-1].header_bytes, end - begin))
        tensors[new] = TensorMetadata(f"model/{new}", dtype, shape)
    shard, begins, lengths = np.array(rows, np.int64).reshape(-1, 3).T
    boxes = coord.stack_boxes([st.whole_box(t.shape) for t in tensors.values()])
    return CheckpointMetadata(
        prefix=source if os.path.isdir(source) else os.path.dirname(source),
        save_id="",
        sequence=0,
        world_size=1,
        format="safetensors",
        compression="none",
        torch_version="",
        timestamp="",
        custom_metadata={},
        shards=tuple(shards),
        tensors=tuple(tensors.values()),
        pieces=st.Pieces(np.arange(len(rows)), shard, begins, lengths, boxes),
    )


# ----------------------------------------------------------------------------------------------------------
# What differs between two checkpoints


class Difference(NamedTuple):
    """A tensor or other value that was "added", "removed" or "changed" between two checkpoints."""

    name: str
    kind: str
    what: str  # dtype and shape, or "value"
    largest_change: float | None = None  # of any element, with `values`; NaN: from or to NaN


def diff_checkpoints(storage: st.AnyStorage, a: str, b: str, *, values: bool = False) -> list[Difference]:
    """What differs between checkpoints `a` and `b`, by stored name. Local.

    [] if every tensor and value has the same bits. Reads and checks both sides where dtypes and shapes are
    equal. `values` finds the largest absolute change of each tensor, also between dtypes.
    CheckpointException for damage.
    """
    storage, changes = StorageFactory.create(storage), dict[str, list[float]]()
    with _typed(f"{a}, {b}"), _open_checkpoint(storage, a) as old, _open_checkpoint(storage, b) as new:
        before, after = _by_name(old.metadata), _by_name(new.metadata)

        def compare(source: coord.Target, start: int, name: str) -> None:
            (_, was), (index, now) = before[name], after[name]
            other = torch.empty(source.box.size, dtype=st.DTYPES[now.dtype])
            new.fill([source._replace(tensor=index, view=other)])
            if was.dtype != now.dtype or not np.array_equal(_bytes_of(source.view), _bytes_of(other)):
                sizes = changes.setdefault(name, [])
                if values and not {"JSON", "F4"} & {was.dtype, now.dtype}:
                    x, y = source.view.to(torch.complex128), other.to(torch.complex128)
                    same = (x == y) | (x.isnan() & y.isnan())
                    sizes.append(float((x - y).abs().masked_fill(same, 0.0).max()))

        alike = [
            (index, name)
            for name, (index, was) in before.items()
            if name in after and was.shape == after[name][1].shape
            if values or was.dtype == after[name][1].dtype
        ]
        _read_in_parts(old, alike, compare)
    found = list[Difference]()
    for name in before | after:
        was, now = (
            f"{t[1].dtype} {[*t[1].shape]}" if (t := side.get(name)) else "" for side in (before, after)
        )
        if not (was and now):
            found.append(Difference(name, "removed" if was else "added", was or now))
        elif was != now or name in changes:
            what = "value" if was == now or was[:4] == now[:4] == "JSON" else f"{was} -> {now}"
            largest = float(np.max(changes[name])) if changes.get(name) else None
            found.append(Difference(name, "changed", what, largest))
    return found


def _by_name(meta: CheckpointMetadata) -> dict[str, tuple[int, TensorMetadata]]:
    """All stored tensors and values by name and rank, each with the index of the one that holds its bytes."""
    return {
        st.entry_name(t, st.whole_box(t.shape)): (index if t.alias_of is None else t.alias_of, t)
        for index, t in enumerate(meta.tensors)
    }


# ----------------------------------------------------------------------------------------------------------
# Command line: a command returns its exit code, and a value that is printed as text or, with --json, as JSON

_Result = tuple[int, object]


def _human(count: float) -> str:
    """A number of bytes in decimal units."""
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:.{2 if power else 0}f} {' kMGT'[power].strip()}B"


def _escaped(text: str) -> str:
    """One printable line: control and bidi characters, line ends and lone surrogates become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines. Every command prints this way, so that no stored name can control a terminal."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    text = "\n".join(map(_escaped, lines))
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


class _Warnings(logging.Handler):
    """Prints what the library logs while a command runs, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"ckpt.py: {record.getMessage()}", file=sys.stderr)


def _cell(key: str, value: object) -> str:
    """A value on one line: bytes in units, shapes as 3x5, nothing for None."""
    if isinstance(value, int) and "bytes" in key:
        return _human(value)
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return "" if value is None else _escaped(f"{value:.3g}" if isinstance(value, float) else str(value))


def _text(value: object) -> Iterator[str]:
    """The lines for a value: a table for a list of objects; a line for each item of a list or an object."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, list):
                yield from (f"{key}:", *_text(item))
            else:
                yield f"{key:16} {_cell(key, item)}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        cells = [list(map(str.upper, value[0])), *([_cell(*item) for item in row.items()] for row in value)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    elif isinstance(value, list):
        yield from map(str, value)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[Progress], None]]:
    """Show progress, rate and time left on standard error, if that is a terminal; clear it at the end."""
    started = time.monotonic()

    def show(progress: Progress) -> None:
        (_, done, total), text = progress, ""
        if done and total:
            rate = done / max(time.monotonic() - started, 1e-3)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            text = f"{what}  {100 * done // total:3} %  {_human(done)} of {_human(total)}  {_human(rate)}/s"
            text += f"  {minutes}:{seconds:02} left  [{'#' * (20 * done // total):20}]"
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:columns]:{columns}}", end="\r", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show(Progress("", 0, 0))


def _ls(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """List the committed checkpoints below DIR."""
    infos = [vars(CheckpointInfo.of(meta)) for meta in st.list_committed(storage)]
    return 0, [{**info, "timestamp": info["timestamp"].isoformat()} for info in infos]


def _show(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Show the tensors, shards and metadata of a checkpoint."""
    _, meta = coord.committed(storage, args.prefix)
    keys = "prefix save_id sequence version timestamp world_size format compression torch_version"
    counts = np.bincount(meta.pieces.tensor, minlength=len(meta.tensors)).tolist()
    return 0, {
        **{key: vars(meta)[key] for key in keys.split()},
        "size_bytes": meta.size_bytes(),
        "custom_metadata": st.encode_value(dict(meta.custom_metadata), "custom_metadata"),
        "shards": [{"file": shard.file, "bytes": shard.length} for shard in meta.shards],
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": t.shape,
                "rank": t.rank,
                "pieces": count,
                "bytes": math.prod(t.shape) * st.itemsize(t.dtype),
                "tied_to": None if t.alias_of is None else meta.tensors[t.alias_of].name,
            }
            for t, count in zip(meta.tensors, counts)
        ],
    }


def _verify(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Read and check every byte of one checkpoint, or of all."""
    validator, report = CheckpointValidator(storage), {}
    for prefix in [args.prefix] if args.prefix else st.recorded_prefixes(storage):
        with _bar(f"verify {prefix}") as show:
            result = validator.validate_checkpoint(prefix, show)
        report[prefix] = {"valid": result.is_valid, **vars(result)}
        if not args.json:
            problems = (f"  {problem}" for problem in (*result.errors, *result.warnings))
            _say(f"{prefix}: {'ok' if result.is_valid else 'DAMAGED'}", *problems)
    return 0 if all(found["valid"] for found in report.values()) else 1, report


def _export(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Write a checkpoint as OUT.safetensors, in files named as Hugging Face's libraries expect."""
    with _bar(f"export {args.prefix}") as show:
        files = export_checkpoint(
            storage,
            args.prefix,
            args.out,
            model_only=args.model_only,
            dtype=args.dtype and st.DTYPES[args.dtype.upper()],
            max_shard_bytes=args.max_shard_size,
            progress=show,
        )
    return 0, {"files": files}


def _import(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Import safetensors, a torch.save file, or a (trusted) torch.distributed.checkpoint directory."""
    if os.path.isfile(os.path.join(args.source, ".metadata")):
        log.warning("%s: its metadata is a pickle, which can run any code: trusting it", args.source)
    with _bar(f"import {args.prefix}") as show:
        prefix = import_checkpoint(args.source, storage, args.prefix, progress=show)
    meta = st.read_committed(storage, prefix)
    extra = [t.name for t in meta.tensors if t.name.startswith("extra/") and t.dtype == "JSON"]
    return 0, {"imported": prefix, "size_bytes": meta.size_bytes(), "extra_state": extra}


def _diff(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Show what differs between checkpoints A and B; exit code 0: nothing, 1: something, 2: trouble."""
    found = diff_checkpoints(storage, args.a, args.b, values=args.values)
    return 1 if found else 0, [difference._asdict() for difference in found]


def _rm(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Delete a checkpoint."""
    st.delete_committed(storage, args.prefix)
    return 0, {"deleted": args.prefix}


def _gc(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Remove what crashed saves left behind."""
    return 0, {"removed": st.collect_garbage(storage, args.min_age * 3600)}


def _byte_count(text: str) -> int:
    """5GB, 500 MB, 1GiB, 4096."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *((?:[kMGT]i?)?)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 5GB or 500MiB")
    number, unit = match.groups()
    return int(float(number) * (1024 if unit[1:] else 1000) ** " kmgt".index(unit[:1].lower() or " "))


_COMMANDS: dict[str, Callable[[CheckpointStorage, argparse.Namespace], _Result]] = {
    "ls dir": _ls,
    "show dir prefix": _show,
    "verify dir [prefix]": _verify,
    "export dir prefix out": _export,
    "import source dir prefix": _import,
    "diff dir a b": _diff,
    "rm dir prefix": _rm,
    "gc dir": _gc,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ckpt.py", description="Show, verify, convert and delete checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for names, run in _COMMANDS.items():
        name, *arguments = names.split()
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        for argument in arguments:
            command.add_argument(argument.strip("[]"), nargs="?" if argument.startswith("[") else None)
        command.add_argument("--json", action="store_true", help="print JSON")
    export, diff, gc = (commands.choices[name].add_argument for name in ("export", "diff", "gc"))
    export("--model-only", action="store_true", help="leave out optimizer and extra state")
    export("--dtype", choices=[code.lower() for code in _FLOATS], help="cast the model's floating tensors")
    export("--max-shard-size", type=_byte_count, default="5GB", help="of each file; default 5GB")
    diff("--values", action="store_true", help="show the largest change of each tensor")
    gc(
        "--min-age",
        type=float,
        default=24.0,
        help="hours until an unfinished save counts as dead; default 24",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 good, 1 damage or failure, 2 misuse."""
    args = _parser().parse_args(argv)
    warnings = _Warnings(logging.WARNING)
    log.addHandler(warnings)
    try:
        if args.command != "import" and not os.path.isdir(args.dir):
            raise ValueError(f"{args.dir}: no such directory")
        code, value = args.run(LocalStorage(args.dir), args)
        if args.json:
            print(json.dumps(value))
        elif args.command != "verify":  # which has printed each checkpoint when it was done
            for line in _text(value):
                _say(line)
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, CheckpointException, OSError) as error:
        _say(f"ckpt.py: {error}", file=sys.stderr)
        return 2 if args.command == "diff" or isinstance(error, ValueError) else 1
    finally:
        log.removeHandler(warnings)


if __name__ == "__main__":
    sys.exit(main())
