"""Distributed checkpoints for PyTorch: from any layout into any other, in plain files, without pickle.

    training code  ->  ckpt.py (what users call)  ->  ckpt_coord.py (ranks)  ->  ckpt_storage.py (bytes)

    checkpoint = DistributedCheckpoint(storage="./checkpoints")
    checkpoint.save(model, optimizer, "step_100", extra_state={"scheduler": scheduler})
    checkpoint.load(model, optimizer, "step_100", extra_state={"scheduler": scheduler})

A checkpoint stores tensors and values under these names:

    model/<key>           a tensor of `model.state_dict()`
    model-values/<key>    an entry of it that is not a tensor
    model-metadata/...    `model.state_dict()._metadata`: the versions of modules
    optimizer/<name>/...  a tensor of the optimizer's state, under the name of its parameter
    optimizer/state       the rest of the optimizer
    extra/<key>...        extra_state
    rng/state             random number generators, per rank

ckpt_coord.py defines the steps S1 to S7 of a save and L1 to L5 of a load. ckpt_storage.py defines the bytes,
and when a checkpoint counts as committed. Guaranteed: once `save` has returned, the checkpoint is durable;
until its commit the old checkpoint is whole; a bit that changed on disk is never loaded. Not guaranteed:
protection against malicious edits, or against damage before the bytes reached `save`.

The order of this file: options and results; `DistributedCheckpoint`; saves in the background; state
(`ModelState`, `OptimizerState`, and for a load `Restore`); validation; export, import and diff; the command
line. Read next: ckpt_coord.py.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import inspect
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
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TextIO, TypeGuard, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING or __package__:  # mypy sees these files as part of a package, where most copies live
    from . import ckpt_coord as coord
    from . import ckpt_storage as st
    from .ckpt_coord import (
        CheckpointCoordinator,
        CheckpointFormat,
        CheckpointLoader,
        CheckpointReader,
        DistributedCoordinator,
        FaultToleranceHandler,
        LocalCoordinator,
        Progress,
        RetryPolicy,
        ShardData,
        TorchCoordinator,
    )
    from .ckpt_storage import (
        CheckpointException,
        CheckpointMetadata,
        CheckpointStorage,
        CompressionLevel,
        ExceptionType,
        LocalStorage,
        StorageFactory,
        StorageOptions,
        StoredFile,
    )
    from .ckpt_storage import ShardMetadata as ShardMetadata
    from .ckpt_storage import TensorMetadata as TensorMetadata
    from .ckpt_storage import collect_garbage as collect_garbage
else:
    import ckpt_coord as coord
    import ckpt_storage as st
    from ckpt_coord import *  # noqa: F403
    from ckpt_storage import *  # noqa: F403

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

# ----------------------------------------------------------------------------------------------------------
# Options and results


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: every nn.Module, Optimizer and LRScheduler is one."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state_dict: dict[str, object]) -> object: ...


Model = Stateful | Mapping[str, Stateful] | Mapping[str, torch.Tensor]
Optimizers = Stateful | Mapping[str, Stateful] | Sequence[Stateful]


def _is_stateful(value: object) -> TypeGuard[Stateful]:
    """As `isinstance`, which from Python 3.12 on overlooks methods that `__getattr__` gives."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _check_member(value: object, allowed: Iterable[object], what: str) -> None:
    """ValueError unless `value` is one of `allowed`, or the value of an enum member among them."""
    allowed = list(allowed)
    values = [getattr(member, "value", member) for member in allowed]
    if value not in allowed + values:
        raise ValueError(f"unknown {what} {value!r}; allowed: {', '.join(map(repr, values))}")


def _check_timeout(timeout: object) -> None:
    """ValueError unless `timeout` is None or a positive number of seconds."""
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < 1e9):
        raise ValueError(f"timeout must be a positive number of seconds below 1e9, not {timeout!r}")


@dataclass
class SaveOptions:
    """How to save. Every rank must give the same. Enums may be given by value: "single_file", "fast".

    checkpoint_prefix   the name, such as "run/step_100"; None: "checkpoint_" and the UTC time
    format              MULTI_SHARD: a file for each rank; SINGLE_FILE: one file; CONSOLIDATED: one file of
                        the model's tensors (not complex128) under the names of its state_dict, the rest as
                        in MULTI_SHARD
    compression_level   NONE, FAST, BALANCED or MAXIMUM; files of whole tensors are never compressed
    include_optimizer   False: leave the optimizer out, even if it is given
    include_rng_state   whether to store the random number generators of each rank
    timeout             seconds for the whole save; None: the default of `CheckpointOptions`
    custom_metadata     values to store in the record; lists of checkpoints show them
    overwrite           False: fail if there is a checkpoint of this prefix; True: replace it on commit
    staging             for `save_async`: "eager" or "overlapped", see there
    replicas            "verify": compare the copies that ranks hold; "trust": take them as equal
    progress            called now and then with a `Progress` of this rank; what it raises fails the save
    """

    checkpoint_prefix: str | None = None
    format: CheckpointFormat | str = CheckpointFormat.MULTI_SHARD
    compression_level: CompressionLevel | str = CompressionLevel.NONE
    include_optimizer: bool = True
    include_rng_state: bool = True
    timeout: float | None = None
    custom_metadata: Mapping[str, object] = field(default_factory=dict)
    overwrite: bool = True
    staging: str = "eager"
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
    """How to load. Every rank must give the same.

    checkpoint_prefix     the name of the checkpoint; required
    load_optimizer        False: leave the optimizer as it is, even if it is given
    load_rng_state        whether to restore the random number generators of each rank
    resharding_strategy   "parallel": all ranks read at once; "sequential": one rank after the other;
                          "broadcast": each byte of a tensor is read by one rank, and sent to the others
    timeout               seconds for the whole load; None: the default of `CheckpointOptions`
    skip_validation       whether to skip the checkers; every byte that is read is verified in any case
    strict_mode           True: missing, unexpected or differently typed entries are an error, and nothing
                          changes; False: they are warnings, and what fits is loaded
    fallback              whether to load the newest older checkpoint that verifies if this one is corrupt
    progress              called now and then with a `Progress` of this rank; what it raises fails the load
    """

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
            raise ValueError("LoadOptions.checkpoint_prefix is required; see latest_checkpoint()")
        st.check_prefix(self.checkpoint_prefix)
        _check_member(self.resharding_strategy, coord.RESHARDING_STRATEGIES, "resharding_strategy")
        _check_timeout(self.timeout)


Parts = dict[str, Stateful]  # of a model or an optimizer, by name; a single one has the name ""


class _State(NamedTuple):
    """A mapping of names to tensors (and values) as a Stateful. A load fills the tensors in place."""

    state: Mapping[str, object]

    def state_dict(self) -> Mapping[str, object]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, object]) -> object: ...


def _parts(what: str, given: object) -> Parts:
    """The parts of a "model" or an "optimizer" by name, "" for a single one. ValueError for other types."""
    if what == "optimizer" and isinstance(given, (list, tuple)):
        given = {str(number): part for number, part in enumerate(given)}
    named = given if isinstance(given, Mapping) else {"": given}
    of_tensors = (
        what == "model" and named is given and any(isinstance(v, torch.Tensor) for v in named.values())
    )
    parts: Parts = {}
    for name, part in named.items():
        # What a module keeps under such a key may change its shape, so it cannot be filled in place.
        is_value = not isinstance(name, str) or name.endswith("_extra_state")
        if not of_tensors and _is_stateful(part):
            parts[name] = part
        elif is_value or not (of_tensors and isinstance(part, torch.Tensor)):
            must = "must have state_dict() and load_state_dict(), or be a mapping to such, or"
            also = "to tensors alone, not named '..._extra_state'" if what == "model" else "a list of such"
            also += "; give the optimizer itself, not its state_dict()" if isinstance(given, Mapping) else ""
            raise ValueError(f"{what} {must} {also}; {name!r} is {type(part)}")
    return {"": _State(dict(named))} if of_tensors else parts


Options = TypeVar("Options", SaveOptions, LoadOptions)


class Given(Generic[Options]):
    """The arguments of a save or a load, checked and copied.

    A misuse is not raised before the first step calls `check`, which is where all ranks raise it.
    """

    coordinator: DistributedCoordinator
    limit_s: float
    started: float  # when the time of the call began

    def __init__(
        self,
        kind: type[Options],
        model: object,
        optimizer: object,
        options: object,
        extra_state: object,
        cancel: threading.Event | None,
    ) -> None:
        self.options: Options = kind()
        self.cancel: threading.Event | None = None
        self.begun = set[str]()  # steps of any attempt
        self.model: Parts = {}
        self.optimizer: Parts | None = None
        self.extra_state: dict[str, object] = {}
        self.problem: BaseException | None = None  # a misuse
        self.earlier: BaseException | None = None  # why the last background save failed
        try:
            if isinstance(optimizer, str):
                raise ValueError(f"optimizer is {optimizer!r}: a prefix goes third, as options")
            if isinstance(model, torch.optim.Optimizer):
                raise ValueError("model is an optimizer: that goes second")
            if cancel is not None and not hasattr(cancel, "is_set"):
                raise ValueError(f"cancel must be a threading.Event, not {cancel!r}")
            self.cancel = cancel
            if options is None or isinstance(options, str):
                options = kind(checkpoint_prefix=options)
            if not isinstance(options, kind):
                must = f"options must be {kind.__name__}, or the prefix as a string"
                raise ValueError(f"{must}, not {type(options)}")
            options.check()
            if options.progress is not None and not callable(options.progress):
                raise ValueError(f"progress must be a function, not {options.progress!r}")
            self.options = replace(options)
            self.model = _parts("model", model)
            if optimizer is not None:
                self.optimizer = _parts("optimizer", optimizer)
            extra = {} if extra_state is None else extra_state
            if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
                raise ValueError("extra_state must be a mapping of names to values")
            self.extra_state = dict(extra)
        except Exception as error:
            self.problem = error

    def check(self) -> None:
        """Raise the misuse, or the failure of the last background save."""
        if (earlier := self.earlier) is not None:
            kind = getattr(earlier, "type", ExceptionType.SAVE_FAILED)
            prefix = getattr(earlier, "checkpoint_path", "")
            which = f"the save of {prefix!r}" if prefix else "a save"
            message = f"{which} in the background had failed: {earlier}"
            raise CheckpointException(message, type=kind) from earlier
        if self.problem is not None:
            raise self.problem


@dataclass(frozen=True)
class CheckpointLoadResult:
    """What a load has restored.

    metadata               the record of the checkpoint
    model_state            the model's entries by name; the tensors share the live ones' memory
    optimizer_state        the optimizer's state_dict; of several optimizers one for each name
    source_world_size      the number of ranks that saved
    target_world_size      the number of ranks that loaded
    was_resharded          whether these differ
    extra_state            by name; an entry kept per rank that has no copy for this rank is left out
    prefix                 the name of the checkpoint, another one than asked for after a fallback
    warnings               what did not fit, which strict mode refuses, and what was kept per rank
    extra_state_per_rank   if world sizes differ: all copies of the entries kept per rank, by name and saved
                           rank, the same on all ranks
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
    """A committed checkpoint, as lists show it.

    prefix            its name
    version           the version of its format on disk
    timestamp         when it was saved, with time zone UTC
    world_size        the number of ranks that saved
    size_bytes        the length of its tensor files
    format            "multi_shard", "single_file" or "consolidated"
    custom_metadata   as in `SaveOptions`
    """

    prefix: str
    version: str
    timestamp: datetime.datetime
    world_size: int
    size_bytes: int
    format: str
    custom_metadata: Mapping[str, object] = field(default_factory=dict)

    @staticmethod
    def of(meta: CheckpointMetadata) -> CheckpointInfo:
        """From its record."""
        return CheckpointInfo(
            meta.prefix,
            str(meta.version),
            datetime.datetime.fromisoformat(meta.timestamp),
            meta.world_size,
            meta.size_bytes(),
            meta.format,
            meta.custom_metadata,
        )


Retain = Callable[[Sequence[CheckpointInfo]], Iterable[str]]  # all checkpoints -> the prefixes to keep


@dataclass
class CheckpointOptions:
    """Global configuration for `DistributedCheckpointFactory.create`.

    storage                  where checkpoints are; a path means local files there
    retry_policy             which failures to try again, and how often
    integrity_checkers       run on each shard, in addition to the built-in ones
    compatibility_checkers   run on the record, in addition to the built-in ones
    default_timeout          seconds for an operation whose options have none
    keep_last                how many checkpoints stay after a save; None: all
    retain                   which checkpoints stay: called on rank 0 after a commit with all of them, oldest
                             first, it returns the prefixes to keep; the new checkpoint always stays
    """

    storage: st.AnyStorage = field(default_factory=StorageOptions)
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    integrity_checkers: Sequence[IntegrityChecker] = ()
    compatibility_checkers: Sequence[CompatibilityChecker] = ()
    default_timeout: float = 600.0
    keep_last: int | None = None
    retain: Retain | None = None


# ----------------------------------------------------------------------------------------------------------
# The checkpoint

R = TypeVar("R")


class DistributedCheckpoint:
    """Saves and loads checkpoints. As a context manager it waits for a pending save at its end.

        with DistributedCheckpoint(storage="./checkpoints") as checkpoint:
            checkpoint.save(model, optimizer, "step_100", extra_state={"epoch": 3})
            epoch = checkpoint.load(model, optimizer, "step_100").extra_state["epoch"]

    `save`, `save_async`, `save_model_only` and `load` are collective: every rank must call them. The other
    methods are local: any one process may call them; they raise ValueError for an illegal prefix, and
    STORAGE_ERROR where the storage fails. `DistributedCheckpointFactory` builds one with further policies,
    such as `keep_last`. The arguments of the collective methods:

    model         a Stateful, which has `state_dict` and `load_state_dict`, such as a module; a mapping of
                  names to Statefuls, such as pipeline stages; or a mapping of names to tensors, which a load
                  fills in place
    optimizer     a Stateful, a mapping of names to Statefuls, or a list of them, named "0", "1", ...; or None
    options       `SaveOptions` or `LoadOptions`, or a string: the prefix, with default options
    extra_state   a mapping of names to Statefuls, or to values of plain types, arrays and tensors. A load
                  restores the Statefuls in place, and returns all values in its result.
    cancel        an event; once it is set on any rank, the operation stops on all ranks with CANCELLED

    Each collective call has a deadline. At the deadline it raises TIMEOUT and names the missing ranks.
    """

    def __init__(
        self,
        coordinator: DistributedCoordinator | None = None,
        storage: st.AnyStorage | None = None,
        fault_handler: FaultToleranceHandler | None = None,
        validator: CheckpointValidator | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        """Local: touches no file, and needs no process group yet.

        coordinator     None: each collective call uses the ranks of the default process group at that time,
                        or this process alone if there is none
        storage         a path means local files there; None: "./checkpoints"
        fault_handler   None: up to three attempts after an OSError
        validator       None: the built-in checkers
        logger          None: the logger "ckpt"
        """
        if coordinator is not None and not hasattr(coordinator, "all_gather"):
            how = "give a path as storage=, options as options=, a process group as TorchCoordinator(group)"
            raise ValueError(f"coordinator is a {type(coordinator).__name__}: {how}")
        self._given_coordinator = coordinator
        self._made = weakref.WeakKeyDictionary[dist.ProcessGroup, Future[TorchCoordinator]]()
        self.storage = StorageFactory.create(StorageOptions() if storage is None else storage)
        self.fault_handler = fault_handler or FaultToleranceHandler(self.storage)
        self.validator = validator or CheckpointValidator(self.storage)
        self.logger = logger or log
        self.default_timeout = CheckpointOptions.default_timeout
        self.keep_last: int | None = None
        self.retain: Retain | None = None
        self._warned = set[tuple[str, ...]]()  # past warnings: names kept per rank, or ("WORLD_SIZE",)
        self._staging: st.Bytes = np.empty(0, np.uint8)  # memory for `save_async`, kept from one to the next
        self._pending = PendingSave()  # the last save in the background
        self._pending.set_result("")

    @property
    def coordinator(self) -> DistributedCoordinator:
        """What a collective call would use now. Unless it was given, every rank must read it alike."""
        return self._look_up(self.default_timeout)

    @coord.no_garbage_collection()
    def save(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        options: SaveOptions | str | None = None,
        *,
        extra_state: Mapping[str, object] | None = None,
        cancel: threading.Event | None = None,
    ) -> str:
        """Save a checkpoint and return its prefix. Collective; blocks until it is committed.

        Python's garbage collection pauses meanwhile, as in a load.

        ValueError for a misuse, CheckpointException for a failure, on every rank alike. Then nothing was
        committed, an older checkpoint of this prefix is untouched, and this save's files are gone.
        """
        return self._save(self._begin(Given(SaveOptions, model, optimizer, options, extra_state, cancel)))

    def save_async(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        options: SaveOptions | str | None = None,
        *,
        extra_state: Mapping[str, object] | None = None,
        cancel: threading.Event | None = None,
    ) -> PendingSave:
        """Copy the state to host memory, and save the copy in the background. Collective.

        Waits for the save before it, so that one is in flight at a time. TIMEOUT if that one does not end.
        `result()` of what this returns raises the errors of `save`, a misuse too.

        With staging="eager" the copy is complete on return, as without an optimizer of torch. With
        "overlapped", parameters and optimizer state are copied while forward and backward run, and the
        optimizer's next step waits for the copy. If anything else changes them meanwhile (an EMA, clipping in
        place), the save fails and names the tensor; a write through `.data` is not noticed. `wait_staged()`
        of what this returns waits for the copy; `result()` waits for the save and raises its failure. If
        nobody calls that, the next call that saves, which then saves nothing, or `close` raises it, or it is
        printed when the interpreter exits.
        """
        pending, interrupt = PendingSave(cancel), None
        given = self._begin(Given(SaveOptions, model, optimizer, options, extra_state, pending.cancel_event))
        if given.earlier is not None:
            self._save(given)  # here and now, since nobody may ask for the result of this one either
        try:
            given.check()
            # The caller may change it from now on.
            given.options.custom_metadata = deepcopy(dict(given.options.custom_metadata))
            collect = self._stage(given, pending)
        except BaseException as error:  # S1 or S2 raises it, on all ranks
            failed = Future[ShardData]()
            failed.set_exception(error)
            collect = failed.result
            pending.staged.set()
            interrupt = None if isinstance(error, Exception) else error

        def save() -> None:
            try:
                # Before S1, so that the optimizer waits for no other rank. S2 raises an error again.
                with contextlib.suppress(BaseException):
                    collect()
                pending.set_result(self._save(given, collect))
            except BaseException as error:
                self.logger.error("background save failed: %s", error)
                pending.set_exception(error)

        try:
            # Not a daemon: the interpreter waits for it when it exits.
            threading.Thread(target=save, name="ckpt-save").start()
        except RuntimeError:  # no thread left: else the other ranks, and the optimizer's step, would wait
            save()
        self._pending = pending
        if interrupt is not None:
            pending.asked = True
            raise interrupt
        return pending

    @coord.no_garbage_collection()
    def save_model_only(
        self, model: Model, options: SaveOptions | str | None = None, *, cancel: threading.Event | None = None
    ) -> str:
        """Save the model alone: no optimizer, no random number generators. Otherwise as `save`."""
        given = self._begin(Given(SaveOptions, model, None, options, None, cancel))
        given.options.include_rng_state = False
        return self._save(given)

    @coord.no_garbage_collection()
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

        Blocks until every rank has its state. Waits for a save in the background first.

        ValueError for a misuse, CheckpointException for a failure, on every rank alike. Nothing has changed,
        unless the error says that tensors are undefined: then reading into them had begun. With `fallback`,
        the newest older checkpoint that verifies is loaded in place of a corrupt one, with a warning.
        """
        given = self._begin(Given(LoadOptions, model, optimizer, options, extra_state, cancel))
        tried: list[str] = []
        warnings: list[str] = []
        while True:
            try:
                result = self._load(given)
                result.warnings[:0] = warnings  # which are logged already
                return result
            except CheckpointException as error:
                is_corrupt = error.type is ExceptionType.CORRUPTED_CHECKPOINT
                in_time = (
                    time.monotonic() <= given.started + given.limit_s
                )  # else a rank may be alone with it
                if not (given.options.fallback and is_corrupt and in_time):
                    raise
                tried.append(error.checkpoint_path)
                warnings.append(f"{tried[-1]} is corrupt, falling back: {error}")
                self.logger.warning("%s", warnings[-1])
                given.options.checkpoint_prefix = self._older(given, tried)
                if not given.options.checkpoint_prefix:
                    raise

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints, oldest first. Local. Skips unreadable ones with a warning."""
        with _typed(""):
            return [CheckpointInfo.of(meta) for meta in st.list_committed(self.storage, self.logger.warning)]

    def latest_checkpoint(self) -> CheckpointInfo | None:
        """The newest committed checkpoint, by the order of saves, or None. Local."""
        return next(reversed(self.list_checkpoints()), None)

    def delete_checkpoint(self, checkpoint_prefix: str) -> None:
        """Delete a checkpoint: its record first, then its shards; safe to repeat. Local: call it on one rank.

        CheckpointException(STORAGE_ERROR) if there is none.
        """
        st.check_prefix(checkpoint_prefix)
        with _typed(checkpoint_prefix):
            self.fault_handler.rollback(checkpoint_prefix)

    def validate_checkpoint(self, checkpoint_prefix: str) -> ValidationResult:
        """Read and check every byte of a checkpoint. Local. Damage is in the result, not raised."""
        return self.validator.validate_checkpoint(checkpoint_prefix)

    def close(self) -> None:
        """Wait for a pending save, and free the staging memory. Local.

        Raises the failure of the save unless somebody has seen it; TIMEOUT if the save does not end in time.
        """
        try:
            self._wait(self.default_timeout)
            if not self._pending.asked:
                self._pending.result()
        finally:
            self._staging = np.empty(0, np.uint8)

    def __enter__(self) -> DistributedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- save and load

    def _look_up(self, limit_s: float) -> DistributedCoordinator:
        """The coordinator that was given, else one for the default process group, kept as long as the group.

        TIMEOUT if the group's store does not answer within `limit_s` seconds.
        """
        if self._given_coordinator is not None:
            return self._given_coordinator
        if (group := dist.group.WORLD) is None:
            return LocalCoordinator()
        # The keys of a coordinator contain its number, so every rank must make as many.
        if group not in self._made:
            self._made[group] = coord.in_thread(TorchCoordinator)
        try:
            return self._made[group].result(limit_s)
        except (concurrent.futures.TimeoutError, RuntimeError) as error:
            message = f"the rendezvous store is unreachable (has the process that hosts it died?): {error!r}"
            raise CheckpointException(message, type=ExceptionType.TIMEOUT) from error

    def _begin(self, given: Given[Options]) -> Given[Options]:
        """Look up the ranks, and wait for the save in flight. A new save takes over its failure."""
        given.limit_s = given.options.timeout or self.default_timeout
        given.coordinator = self._look_up(given.limit_s)
        self._wait(given.limit_s)
        given.started = time.monotonic()
        if isinstance(given.options, SaveOptions):
            if not self._pending.asked:
                given.earlier = self._pending.exception()
            if not given.options.include_optimizer:
                given.optimizer = None
            alone = self._given_coordinator is None and isinstance(given.coordinator, LocalCoordinator)
            world_size = os.environ.get("WORLD_SIZE", "")
            if alone and world_size not in ("", "1") and ("WORLD_SIZE",) not in self._warned:
                self._warned.add(("WORLD_SIZE",))
                self.logger.warning(
                    "this process saves alone, though WORLD_SIZE is %s: call init_process_group first, or "
                    "each overwrites the others' checkpoints; if only one saves, say LocalCoordinator()",
                    world_size,
                )
        return given

    def _wait(self, limit_s: float) -> None:
        """Wait for the save in flight."""
        if concurrent.futures.wait([self._pending], limit_s + coord.GRACE_S).not_done:
            message = f"the save in flight is not done after {limit_s:g} s"
            raise CheckpointException(message, type=ExceptionType.TIMEOUT)

    def _run(self, given: Given[Options], verb: str, body: Callable[[Callable[[], coord.Operation]], R]) -> R:
        """Run `body` on all ranks, again if they agree to. It gets a function that begins an operation.

        The failure that they agree on becomes the public exception.
        """
        retryable = tuple(self.fault_handler.retry_policy.retryable_exceptions)
        rest = given.limit_s, given.started, given.cancel, retryable, given.options.progress, given.begun
        begin = functools.partial(coord.Operation, given.coordinator, verb, *rest)
        attempt, deadline = functools.partial(body, begin), given.started + given.limit_s
        for again in (True, False):
            try:
                return self.fault_handler.execute_with_retry(attempt, given.cancel, deadline)
            except coord.OperationFailed as failed:
                # If a save has replaced what was read, read the new checkpoint, once.
                if not (again and failed.failure["superseded"]):
                    raise failed.public(given.options.checkpoint_prefix or "") from failed.__cause__
        raise AssertionError("the loop returns or raises")

    def _report(
        self, op: coord.Operation, prefix: str, warnings: Iterable[str], what: str, count: int
    ) -> None:
        """Log the warnings, and a line on `count` bytes: at INFO on rank 0, at DEBUG on the others."""
        lines = list(dict.fromkeys(warnings))
        if len(lines) > 20:
            lines[20:] = [f"and {len(lines) - 20} more warnings"]
        for line in lines:
            self.logger.warning("%s: %s", prefix, st.escaped(line))
        seconds = sum(op.seconds.values())
        steps = " ".join(f"{name[:2]} {took:.3f}" for name, took in op.seconds.items())
        rate = f"{seconds:.3f} s, {_human(count / max(seconds, 1e-9))}/s ({steps})"
        self.logger.log(logging.DEBUG if op.rank else logging.INFO, "%s in %s", what, rate)

    # ---- save

    def _save(self, given: Given[SaveOptions], collect: Callable[[], ShardData] | None = None) -> str:
        """S1 to S7. `collect` is S2; None: collect the live state."""
        options, retain = given.options, self.retain

        def request() -> coord.Message:
            given.check()
            contents = ("optimizer",) * (given.optimizer is not None) + ("rng",) * options.include_rng_state
            return {
                "prefix": options.checkpoint_prefix,
                "format": CheckpointFormat(options.format).value,
                "compression": CompressionLevel(options.compression_level).value,
                "overwrite": options.overwrite,
                "verify_replicas": options.replicas == "verify",
                "contents": contents + tuple(sorted(given.extra_state)),
                "custom_metadata": dict(options.custom_metadata),
            }

        chosen = None if retain is None else lambda metas: retain([CheckpointInfo.of(meta) for meta in metas])
        saver = CheckpointCoordinator(given.coordinator, self.storage, self.keep_last, chosen, self._warned)
        collect = collect or (lambda: self._collect(given))
        save = functools.partial(saver.coordinate_save, request=request, collect=collect)
        prefix, op = self._run(given, "save", save), saver.op
        count = saver.size_bytes or saver.bytes_written  # rank 0 knows that of all ranks
        who = f"rank {op.rank}" if op.rank else f"{op.world_size} rank(s)"
        what = f"saved {prefix}: {_human(count)} by {who}"
        self._report(op, prefix, saver.warnings, what, count)
        return prefix

    def _collect(self, given: Given[SaveOptions]) -> ShardData:
        """S2: everything that this rank holds."""
        into, model = Collecting(), ModelState(given.model)
        model.collect(into)
        if given.optimizer is not None:
            optimizer = OptimizerState(given.optimizer, model.parameters())
            optimizer.collect(into)
            if outside := optimizer.outside:
                message = "%d optimizer parameter(s) are not in this model; kept by position, first %s: %s"
                self.logger.warning(message, len(outside), outside[0], _OUTSIDE)
        for key, value in given.extra_state.items():
            into.value(f"extra/{key}", value.state_dict() if _is_stateful(value) else value)
        if given.options.include_rng_state:
            into.value("rng/state", rng_state(), per_rank=True)
        return into.finish()

    @coord.no_garbage_collection()
    @torch.inference_mode(False)
    def _stage(self, given: Given[SaveOptions], pending: PendingSave) -> Callable[[], ShardData]:
        """Collect the live state, and copy it to host memory, pinned if CUDA is in use.

        Returns S2, which returns the copy. Overlapped staging leaves to its first call what only the
        optimizer's step changes; the step waits for that.
        """
        live = self._collect(given)
        views = {coord.identity(view): (t.name, view) for t in live.tensors for _, view in t.pieces}
        sizes = (-(-view.nbytes // 64) * 64 for _, view in views.values())  # aligned for every dtype
        *starts, total = itertools.accumulate(sizes, initial=0)
        if total > len(self._staging):
            self._staging = np.empty(0, np.uint8)  # free it before the larger one is made
            self._staging = st.aligned_buffer(total)
        memory = torch.from_numpy(self._staging)
        overlapped = given.options.staging == "overlapped"
        optimizers = list((given.optimizer or {}).values()) if overlapped else []
        guarded = _optimizer_memory(optimizers)
        copies: dict[tuple[object, ...], torch.Tensor] = {}
        late: list[tuple[str, torch.Tensor, torch.Tensor, int]] = []
        for start, (key, (name, view)) in zip(starts, views.items()):
            copies[key] = copy = memory[start : start + view.nbytes].view(view.dtype).view(view.shape)
            # An inference tensor has no version counter, so a change would go unseen.
            if view.data_ptr() in guarded and not view.is_inference():
                late.append((name, view, copy, view._version))
            else:
                copy.copy_(view)
        tensors = [
            t._replace(pieces=[(box, copies[coord.identity(view)]) for box, view in t.pieces])
            for t in live.tensors
        ]
        hooks = [
            getattr(optimizer, "register_step_pre_hook")(lambda *_: pending.wait_staged())
            for optimizer in optimizers
            if late
        ]

        def collect() -> ShardData:
            try:
                for name, view, copy, version in late:
                    copy.copy_(view)
                    if view._version != version:
                        what = f"{name} was changed in place while it was being copied"
                        advice = "wait_staged() first, or use staging='eager'"
                        raise CheckpointException(f"{what}; {advice}", type=ExceptionType.SAVE_FAILED)
                late.clear()  # a retry must not copy again what may change from now on
            finally:
                for hook in hooks:
                    hook.remove()
                pending.staged.set()
            return live._replace(tensors=tensors)

        if not late:
            pending.staged.set()
        return collect

    # ---- load

    def _load(
        self,
        given: Given[LoadOptions],
        warnings: Sequence[str] = (),
        open_reader: Callable[[coord.Operation], CheckpointReader] | None = None,
    ) -> CheckpointLoadResult:
        """L1 to L5. `warnings` come before those of the load."""
        loader = CheckpointLoader(given.coordinator, self.storage)

        def body(begin: Callable[[], coord.Operation]) -> Restore:
            restore = Restore(given, op := begin(), self.validator)
            restore.warnings += warnings
            steps = restore.validate, restore.match, restore.apply
            loader.coordinate_load(op, restore.request, *steps, open_reader)
            return restore

        restored = self._run(given, "load", body)
        result, op = restored.result, restored.op
        own = sum(target.view.nbytes for target in restored.targets.values())
        of_whole = f"{_human(own)} of {_human(result.metadata.size_bytes())}"
        what = f"loaded {result.prefix}: {of_whole} to rank {op.rank} of {op.world_size}"
        self._report(op, result.prefix, result.warnings, what, own)
        return result

    def _older(self, given: Given[LoadOptions], tried: Sequence[str]) -> str:
        """The newest checkpoint that is older than those tried, the same on all ranks; "" if there is none.

        If none of their records can be read, any other checkpoint counts as older.
        """

        def choose(begin: Callable[[], coord.Operation]) -> str:
            with (op := begin()).step("L1 record"):
                older = [""]
                if op.rank == 0:
                    heads = [st.record_head(self.storage, prefix, sound=False) for prefix in tried]
                    limit = min((head.sequence for head in heads if head), default=math.inf)
                    found = st.list_committed(self.storage, self.logger.warning)
                    older += [m.prefix for m in found if m.sequence < limit and m.prefix not in tried]
                return str(op.broadcast(older[-1]))

        return self._run(given, "load", choose)


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
        """Local. `coordinator` as for `DistributedCheckpoint`. ValueError for bad options."""
        options = CheckpointOptions() if options is None else options
        if not isinstance(options, CheckpointOptions):
            raise ValueError(f"options must be CheckpointOptions, not {type(options)}")
        _check_timeout(options.default_timeout or 0)
        keep = options.keep_last
        if keep is not None and (not isinstance(keep, int) or keep < 1 or options.retain):
            raise ValueError(f"keep_last={keep!r}: must be an int of at least 1, and not given with retain")
        storage = StorageFactory.create(options.storage)
        made = DistributedCheckpoint(
            coordinator,
            storage,
            FaultToleranceHandler(storage, options.retry_policy),
            CheckpointValidator(storage, options.integrity_checkers, options.compatibility_checkers),
        )
        made.default_timeout = options.default_timeout
        made.keep_last = options.keep_last
        made.retain = options.retain
        return made


# ----------------------------------------------------------------------------------------------------------
# Saves in the background


class PendingSave(Future[str]):
    """A save in the background: a future of the prefix, done once every rank knows of the commit."""

    def __init__(self, cancel: threading.Event | None = None) -> None:
        super().__init__()
        self.cancel_event = cancel or threading.Event()
        self.staged = threading.Event()
        self.asked = False  # whether somebody has seen the outcome
        self._alarm: Callable[[], object] = lambda: None

    def wait_staged(self, timeout: float | None = None) -> None:
        """Return once the live tensors may be changed; TimeoutError after `timeout` seconds."""
        if not self.staged.wait(timeout):
            raise TimeoutError(f"not staged within {timeout} s")

    def cancel(self) -> bool:
        """Ask every rank to stop; False if the save is over already. `result()` has the outcome."""
        self.cancel_event.set()
        return not self.done()

    def result(self, timeout: float | None = None) -> str:
        """The prefix. Raises what the save raised; TimeoutError after `timeout` seconds."""
        self.exception(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the save raised, or None; TimeoutError after `timeout` seconds."""
        if concurrent.futures.wait([self], timeout).not_done:
            raise TimeoutError(f"the save is not done within {timeout} s; it goes on")
        error = super().exception()
        self.asked = True
        self._alarm()
        return error

    def set_exception(self, exception: BaseException | None) -> None:
        """End with a failure, and print it at exit (or when this object is deleted) if nobody has seen it."""
        why = f"ckpt: a save in the background failed, and nobody asked for its result: {exception}"
        self._alarm = weakref.finalize(self, print, why, file=sys.stderr).detach
        super().set_exception(exception)


def _optimizer_memory(optimizers: Iterable[object]) -> set[int]:
    """Addresses of what only the optimizers' steps change: parameters and state.

    Nothing if one of them is not torch's, for it may have no hooks that could hold up its step.
    """
    found = set[int]()
    for optimizer in optimizers:
        # A subclass that skips `Optimizer.__init__` lacks the attribute.
        if not (
            isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
        ):
            return set()
        params = (tensor for group in optimizer.param_groups for tensor in group["params"])
        states = (state for state in optimizer.state.values() if isinstance(state, dict))
        state = (value for state in states for value in state.values())
        for tensor in itertools.chain(params, state):
            if isinstance(tensor, torch.Tensor):
                local = tensor if (sharded := coord.as_dtensor(tensor)) is None else sharded.to_local()
                found.add(local.data_ptr())
    return found


# ----------------------------------------------------------------------------------------------------------
# State: a load collects what it fills as a save does, then matches it by name


_OF_MODEL = ("model/", "model-values/")  # how the stored names of the model's entries begin


class Collecting:
    """S2 and L3: the tensors and values of this rank under their stored names."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self.data = ShardData([], self.steps)
        self.live: dict[str, torch.Tensor] = {}  # stored name -> the tensor
        self._values: dict[str, tuple[object, bool]] = {}

    def tensor(self, name: str, tensor: torch.Tensor) -> str:
        """Add a tensor. Returns its name, with a number behind it where another entry has that name."""
        unique, number = name, 0
        while unique in self.live or unique in self._values:
            unique, number = f"{name}#{number + 1}", number + 1
        self.live[unique] = tensor
        self.data.tensors.append(coord.local_tensor(unique, tensor))
        return unique

    def encode(self, value: object, path: str, root: str = "") -> object:
        """`value` as JSON. Its tensors are added under `root` and their path, which begins with `path`."""
        try:
            return st.encode_value(
                value, path, lambda at, tensor: self.tensor(root + at.removeprefix("."), tensor)
            )
        except ValueError as error:
            raise CheckpointException(root + str(error).removeprefix(".")) from error
        except RecursionError as error:
            raise CheckpointException(f"{root or path}: nested too deeply, or contains itself") from error

    def value(self, name: str, value: object, per_rank: bool = False) -> None:
        """Add a non-tensor value, with the tensors inside it."""
        self._values[name] = value, per_rank

    def finish(self) -> ShardData:
        """All of it. The tensors inside values get their names last, so that none takes a value's name."""
        for name, (value, per_rank) in self._values.items():
            text = st.dump_json(self.encode(value, name))
            self.data.tensors.append(coord.local_value(name, text, per_rank))
        return self.data


def _torch_class(module: str, name: str) -> tuple[type, ...]:
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


def _wrapped(module: object) -> str | None:
    """The attribute in which a wrapper has its module. None if `module` is not a wrapper."""
    return next((name for path, name in _WRAPPERS.items() if isinstance(module, _torch_class(*path))), None)


def _walk(
    module: torch.nn.Module, name: str, live: str = "", key: str = ""
) -> Iterator[tuple[torch.nn.Module, str, str, str]]:
    """`module` and every module inside it, each with its canonical name, live name, and prefix of keys.

    Each is "" or ends in a dot. Live names are paths in the module tree; canonical names leave out the
    attributes of wrappers.
    """
    yield module, name, live, key
    attribute = _wrapped(module) if module._modules else None
    for child_name, child in module._modules.items():
        if child is not None:
            part = f"{child_name}."
            child_key = key if child_name == attribute == _ACTIVATIONS else key + part
            yield from _walk(child, name if child_name == attribute else name + part, live + part, child_key)


def _canonical(key: str, prefixes: Mapping[str, str]) -> str:
    """The canonical name of a key. `prefixes`: prefix of keys -> canonical name of the module."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) >= 0:
        if (name := prefixes.get(key[: end + 1])) is not None:
            return name + key[end + 1 :]
    return prefixes[""] + key


class ModelState:
    """The state of a model, or of several by name, under canonical names.

    CheckpointException for FSDP1.
    """

    def __init__(self, model: Parts) -> None:
        # Each part, with canonical names by prefixes of keys and, without final dots, by live names.
        self._parts: list[tuple[Stateful, dict[str, str], dict[str, str]]] = []
        self._modules: list[tuple[torch.nn.Module, str]] = []
        self._states: list[dict[str, object]] = []
        self._entries: list[tuple[str, dict[str, object], str]] = []  # stored name, state dict, key in it
        self._versions: list[tuple[dict[str, object], dict[str, str]]] = []  # state dict, live -> canonical
        fsdp1 = _torch_class("torch.distributed.fsdp", "FullyShardedDataParallel")
        for part_name, part in model.items():
            while (attribute := _wrapped(part)) is not None:
                part = getattr(part, attribute)
            prefix = f"{part_name}." if part_name else ""
            keys, modules = {"": prefix}, {"": part_name}
            for module, name, live, key in _walk(part, prefix) if isinstance(part, torch.nn.Module) else ():
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
        """id -> name of every parameter, or tensor of a mapping. Tied ones have their first name."""
        names: dict[int, str] = {}
        for module, name in self._modules:
            for key, parameter in module._parameters.items():
                names.setdefault(id(parameter), name + key)
        for part, keys, _ in self._parts:
            for key, tensor in part.state.items() if isinstance(part, _State) else ():
                names.setdefault(id(tensor), _canonical(key, keys))
        return names

    def collect(self, into: Collecting) -> None:
        """Add every tensor as `model/`, every other value as `model-values/`, and the modules' versions."""
        seen, versions = set[str](), dict[str, object]()
        for part, keys, modules in self._parts:
            given = part.state_dict()
            self._states.append(state := shallow_copy(given) if isinstance(given, dict) else dict(given))
            for key, value in state.items():
                if (name := _canonical(key, keys)) in seen:
                    raise CheckpointException(f"two entries of the model's state are named {name!r}")
                seen.add(name)
                # A module may change the shape of what it keeps under this key, which has no shape to match.
                if isinstance(value, torch.Tensor) and not key.endswith("_extra_state"):
                    stored = into.tensor(f"model/{name}", value)
                else:
                    into.value(stored := f"model-values/{name}", value)
                self._entries.append((stored, state, key))
            if isinstance(metadata := getattr(state, "_metadata", None), dict):
                names = {live: modules.get(live, keys[""] + live) for live in metadata}
                self._versions.append((state, names))
                # A wrapper has the canonical name of its module, which comes after it.
                versions |= {name: metadata[live] for live, name in names.items()}
        if versions:
            into.value("model-metadata/modules", versions)

    def fill(self, restore: Restore, tensors: Sequence[coord.LocalTensor]) -> None:
        """L3: every tensor of the state is filled in place. Values are decoded into it."""
        stored = restore.reader.stored
        known = [t for t in tensors if t.name in stored]
        for t in known:
            restore.fill(t)
        places = {coord.identity(view) for t in known for _, view in t.pieces} if known != tensors else set()
        for t in tensors:
            # A tied name may fill the memory of a missing one, or the rank may have none of it.
            if t.name not in stored and (
                0 in t.shape or any(coord.identity(view) not in places for _, view in t.pieces)
            ):
                restore.find(t.name)
        for name, state, key in self._entries:
            if name.startswith("model-values/") and (index := restore.find(name)) is not None:
                state[key] = restore.decode(restore.reader.read_value(index))
        versions: dict[object, object] = {}
        for _, node in restore.copies("model-metadata/modules"):
            found = restore.decode(node)
            versions |= found if isinstance(found, dict) else {}
        for state, names in self._versions:  # where none is stored, the live one stays
            mine = {live: versions[name] for live, name in names.items() if name in versions}
            if mine:
                vars(state)["_metadata"] = OrderedDict(deepcopy(mine))  # load_state_dict writes into them

    def apply(self, strict: bool) -> dict[str, object]:
        """L5: hand the filled state to `load_state_dict`. Returns it under canonical names."""
        for (part, *_), state in zip(self._parts, self._states):
            if strict or "strict" not in inspect.signature(part.load_state_dict).parameters:
                part.load_state_dict(state)
            else:
                getattr(part, "load_state_dict")(state, strict=False)
        filled = {name.partition("/")[2]: state[key] for name, state, key in self._entries}
        return {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in filled.items()}


class _Group(NamedTuple):
    """A parameter group of a torch optimizer, as in its state dict."""

    options: dict[str, object]
    params: list[tuple[str, torch.Tensor, object]]  # name, parameter, key in "state"


class SavedParameter(NamedTuple):
    """What "optimizer/state" says of a parameter, encoded."""

    part: str  # the optimizer that had it
    options: dict[str, object]  # of its group
    state: object  # None: it had none


class SavedOptimizer:
    """The values "optimizer/state" of all ranks, as pipeline ranks have different parameters.

    Where they differ, this rank's counts, else the lowest rank's.
    """

    def __init__(self, restore: Restore) -> None:
        self.parameters: dict[str, SavedParameter] = {}
        self.others: dict[str, object] = {}  # by part: what belongs to no parameter
        self.empty: dict[str, list[dict[str, object]]] = {}  # by part: options of groups without parameters
        self.defaults: dict[str, object] = {}  # by part: the names of its options
        source, differing = dict[str, int](), set[str]()
        for rank, node in restore.copies("optimizer/state"):
            value, parameters = st.Fields(node), dict[str, SavedParameter]()
            states, others = value.child("states").all, value.child("others").all
            self.empty = {}
            for group in map(st.Fields, value.array("groups")):
                part, options = group.text("part"), group.child("options").all
                if not (names := group.texts("params")):
                    self.empty.setdefault(part, []).append(options)
                parameters |= {name: SavedParameter(part, options, states.get(name)) for name in names}
            mine, known = {**others, **parameters}, {**self.others, **self.parameters}
            differing |= {name for name in mine if name in known and known[name] != mine[name]}
            source |= dict.fromkeys(mine, rank)
            self.parameters |= parameters
            self.others |= others
            self.defaults |= value.child("defaults").all
            restore.plain.update(value.texts("plain") if "plain" in value.all else ())
        for name in differing:
            if source[name] != restore.op.rank:
                restore.lent.setdefault(source[name], set()).add(f"optimizer/{name}")


_OUTSIDE = "make the optimizer after whatever replaces the model's parameters (fully_shard, to_empty)"


def _defaults(optimizer: Stateful) -> list[str]:
    """The names of an optimizer's options, which tell its kind; [] where it does not say."""
    defaults = getattr(optimizer, "defaults", None)
    return sorted(map(str, defaults)) if isinstance(defaults, Mapping) else []


class OptimizerState:
    """The state of one or several optimizers, keyed by the names of their parameters.

    So it survives another order of parameters, other groups and another parallelism. A parameter outside of
    the model is keyed by its position, one of several optimizers by `<optimizer>/<parameter>`. Tensors of the
    state are entries of their own. The rest is one value, "optimizer/state": `groups`, each with its `part`,
    its `params` by name and its `options`; `states` by parameter; `plain`, the names of plain tensors in the
    state of DTensors; by part `defaults`, and `others`: what belongs to no parameter, such as all of a
    Stateful that is not a torch optimizer.
    """

    def __init__(self, optimizer: Parts, names: Mapping[int, str]) -> None:
        zero = _torch_class("torch.distributed.optim", "ZeroRedundancyOptimizer")
        if any(isinstance(part, zero) for part in optimizer.values()):
            raise CheckpointException(
                "optimizer: a ZeroRedundancyOptimizer gathers its state on one rank at a time, but all ranks "
                "save: use FSDP2 (fully_shard) with an ordinary optimizer; or pass its `optim`, this rank's "
                "part, and after a load copy the options (lr, ...) of `optim.param_groups` to its own"
            )
        self._parts, self._names = optimizer, names
        groups = (group for part in optimizer.values() for group in getattr(part, "param_groups", ()))
        uses = Counter(id(parameter) for group in groups for parameter in group["params"])
        self._shared = {key for key, count in uses.items() if count > 1}
        self.outside: list[str] = []  # names of parameters outside of the model
        self._groups: dict[str, list[_Group]] = {}  # by part: those of torch optimizers
        self._states: dict[str, dict[str, object]] = {}  # by part: the state dict
        self._filled: list[tuple[Stateful, torch.Tensor, dict[str, object]]] = []

    def _name(self, parameter: object, part: str, group: int, position: int) -> str:
        if (name := self._names.get(id(parameter))) is not None:
            return f"{part}/{name}" if id(parameter) in self._shared else name
        self.outside.append("#" + ".".join(filter(None, (part, str(group), str(position)))))
        return self.outside[-1]

    def collect(self, into: Collecting) -> None:
        """Add the tensors of the state, the steps that are numbers, and the value "optimizer/state"."""
        groups, states, others = list[object](), dict[str, object](), dict[str, object]()
        plain = list[str]()
        for part_name, part in self._parts.items():
            state = self._states[part_name] = dict(part.state_dict())
            by_key, packed = state.get("state"), state.get("param_groups")
            live = getattr(part, "param_groups", None)
            if live is None or not (isinstance(by_key, dict) and isinstance(packed, list)):
                others[part_name] = into.encode(state, f"optimizer/{part_name}")
                continue
            own = self._groups[part_name] = []
            rest = dict(by_key)  # what belongs to no parameter
            for number, (group, saved) in enumerate(zip(live, packed)):
                pairs = enumerate(zip(group["params"], saved["params"]))
                params = [(self._name(p, part_name, number, at), p, key) for at, (p, key) in pairs]
                own.append(_Group(saved, params))
                options = {k: v for k, v in saved.items() if k not in ("params", "param_names")}
                names = [name for name, _, _ in params]
                node = into.encode(options, "param_groups", "/".join(["optimizer", *names[:1], ""]))
                groups.append({"part": part_name, "params": names, "options": node})
                for name, parameter, key in params:
                    inner, first = rest.pop(key, options), len(into.data.tensors)
                    if key in by_key:
                        states[name] = into.encode(inner, "", f"optimizer/{name}/")
                    if coord.as_dtensor(parameter) is not None:
                        plain += [t.name for t in into.data.tensors[first:] if not t.mesh]
                    step = inner.get("step", options.get("step")) if isinstance(inner, dict) else None
                    if isinstance(step, (int, float, np.number)):
                        into.steps[name] = float(step)
            surplus = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
            if rest or surplus:
                others[part_name] = into.encode({**surplus, "state": rest}, f"optimizer/{part_name}")
        defaults = {part_name: _defaults(part) for part_name, part in self._parts.items()}
        node = {"groups": groups, "states": states, "others": others, "defaults": defaults}
        node |= {"plain": plain} if plain else {}
        into.data.tensors.append(coord.local_value("optimizer/state", st.dump_json(node)))

    def fill(self, restore: Restore) -> None:
        """L3: state tensors are filled in place where they exist, else made, sharded as their parameter.

        An optimizer of another kind than the saved one is a problem. If not strict, it stays as it is.
        """
        with st.well_formed("optimizer/state"):
            saved = SavedOptimizer(restore)
        names = {
            part: [n for g in self._groups.get(part, ()) for n, _, _ in g.params] for part in self._parts
        }
        restore.unexpected |= {f"optimizer/{name}" for name in saved.parameters}
        restore.unexpected -= {f"optimizer/{name}" for found in names.values() for name in found}
        for part_name, part in self._parts.items():
            who = f"optimizer {part_name}".rstrip()
            if difference := _other_kind(part, part_name, names[part_name], saved):
                what = f"{who}: another kind was saved"
                advice = "give one of that kind, or load_optimizer=False; strict_mode=False keeps it as it is"
                restore.problems.append(f"{what}: {difference}; {advice}")
                del self._states[part_name]
            elif part_name in self._groups:
                self._fill_groups(part_name, saved, restore)
            elif isinstance(whole := restore.decode(saved.others.get(part_name)), dict):
                self._states[part_name] = whole
            else:
                restore.problems.append(f"{who}: missing from the checkpoint")
                del self._states[part_name]

    def _fill_groups(self, part_name: str, saved: SavedOptimizer, restore: Restore) -> None:
        """L3 of a torch optimizer. Groups without parameters are matched by their order."""
        groups, empty = self._groups[part_name], saved.empty.get(part_name, [])
        if len(empty) != (count := sum(not group.params for group in groups)):
            what = f"{len(empty)} group(s) without parameters in the checkpoint, {count} here"
            restore.warnings.append(f"optimizer {part_name}: {what}, which keep their options")
            empty = [{}] * count
        by_key, packed, in_order = self._states[part_name]["state"], list[object](), iter(empty)
        states = dict(by_key) if isinstance(by_key, dict) else {}
        for options, params in groups:
            found = [saved.parameters[name] for name, _, _ in params if name in saved.parameters]
            distinct = {id(p.options): p.options for p in found}.values() if params else [next(in_order)]
            merged = {}
            for option, node in next(iter(distinct), {}).items():
                if any(other.get(option) != node for other in distinct):
                    what = f"group of {params[0][0]}: its parameters were saved with different {option!r}"
                    restore.warnings.append(f"optimizer {what}; it keeps {options.get(option)!r}")
                else:
                    merged[option] = restore.decode(node)
            packed.append({**options, **merged})
            for name, parameter, key in params:
                if name not in saved.parameters:
                    advice = f"; {_OUTSIDE}" if name in self.outside else ""
                    restore.problems.append(f"optimizer/{name}: missing from the checkpoint{advice}")
                    continue
                states.pop(key, None)
                if (node := saved.parameters[name].state) is not None:
                    states[key] = value = restore.decode(node, parameter)
                    # After a cast of the parameter, torch's cast of its state is right.
                    stored = restore.dtype_of(f"model/{self._names.get(id(parameter))}")
                    if isinstance(value, dict) and stored in (None, parameter.dtype):
                        self._filled.append((self._parts[part_name], parameter, value))
        rest = restore.decode(saved.others.get(part_name))
        if isinstance(rest, dict) and "param_groups" not in rest:
            states |= rest.get("state", {})
            self._states[part_name] |= rest
        self._states[part_name] |= {"state": states, "param_groups": packed}

    def apply(self) -> dict[str, object]:
        """L5: hand over to `load_state_dict`, then put back the tensors whose dtype it changed."""
        for part_name, state in self._states.items():
            self._parts[part_name].load_state_dict(state)
        for part, parameter, filled in self._filled:
            live = getattr(part, "state", {}).get(parameter, {})
            for key in (filled.keys() & live.keys()) - {"step"}:
                live[key] = _with_dtypes(live[key], filled[key])
        return self._states.get("", dict(self._states))


def _with_dtypes(now: object, filled: object) -> object:
    """A value of an optimizer's state as it is now, but for tensors whose dtype is not that of `filled`."""
    if isinstance(now, torch.Tensor) and isinstance(filled, torch.Tensor):
        return now if now.dtype == filled.dtype else filled.to(now.device)
    if isinstance(now, dict) and isinstance(filled, dict):
        return {key: _with_dtypes(value, filled.get(key)) for key, value in now.items()}
    if isinstance(now, (list, tuple)) and isinstance(filled, (list, tuple)):
        return type(now)(map(_with_dtypes, now, filled))
    return now


def _other_kind(part: Stateful, part_name: str, names: Iterable[str], saved: SavedOptimizer) -> str:
    """How an optimizer is of another kind than the saved one: each has options that the other lacks. Else "".

    Options that one side alone adds decide nothing: another version of torch may have them.
    """
    live = set(_defaults(part))
    parts = {saved.parameters[name].part for name in names if name in saved.parameters}
    for saved_part in parts or {part_name}:
        defaults = saved.defaults.get(saved_part)
        stored = set(map(str, defaults)) if isinstance(defaults, list) else set[str]()
        if (lacking := sorted(stored - live)) and (added := sorted(live - stored)):
            return f"that has the options {', '.join(lacking)}, the one here {', '.join(added)}"
    return ""


def rng_state() -> dict[str, object]:
    """The state of every random number generator in use: torch CPU and CUDA devices, numpy, random."""
    state: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": np.random.get_state(),
        "random": random.getstate(),
    }
    if st.cuda_in_use():
        devices = range(torch.cuda.device_count())
        state["cuda"] = [torch.cuda.get_rng_state(device).numpy().tobytes() for device in devices]
    return state


def set_rng_state(state: Mapping[str, object]) -> None:
    """Inverse of `rng_state`. CUDA devices that the state does not have keep theirs."""

    def tensor(data: object) -> torch.Tensor:
        return torch.frombuffer(bytearray(data if isinstance(data, bytes) else b""), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    numpy_state, python_state, devices = state["numpy"], state["random"], state.get("cuda")
    if isinstance(numpy_state, (tuple, dict)):  # a dict: of another bit generator than numpy's first
        np.random.set_state(numpy_state)
    if isinstance(python_state, tuple):
        random.setstate(python_state)
    if isinstance(devices, list) and torch.cuda.is_available():
        for device, data in enumerate(devices[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(tensor(data), device)


def _tensors_in(node: object) -> list[str]:
    """The names of the tensors in an encoded value."""
    names: list[str] = []
    st.decode_value(node, names.append)
    return names


@torch.inference_mode(False)
def _allocate(name: str, shape: st.Shape, dtype: torch.dtype, param: torch.Tensor | None) -> torch.Tensor:
    """An empty tensor for optimizer state on its parameter's device, sharded alike if shapes are equal."""
    # torch keeps a step on the CPU; load_state_dict moves it where it must be.
    if param is None or name.endswith("/step"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    if (sharded := coord.as_dtensor(param)) is not None and shape:
        if tuple(sharded.shape) == shape:
            return torch.empty_like(sharded.detach(), dtype=dtype)
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import empty as empty_dtensor

        mesh = sharded.device_mesh
        return empty_dtensor(shape, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return torch.empty(shape, dtype=dtype, device=param.device)


class Restore:
    """One load on one rank: validation, which tensors are filled, and what does not fit."""

    reader: CheckpointReader  # from L3 on
    result: CheckpointLoadResult  # from L5 on

    def __init__(
        self, given: Given[LoadOptions], op: coord.Operation, validator: CheckpointValidator
    ) -> None:
        self.given, self.op, self._validator = given, op, validator
        # With a LocalCoordinator in a job of several ranks, each of them probably loads the same.
        local = isinstance(given.coordinator, LocalCoordinator) and dist.is_initialized()
        self._only_rank = op.world_size == 1 and not (local and dist.get_world_size() > 1)
        self.targets: dict[tuple[object, ...], coord.Target] = {}  # by the `identity` of the memory
        self.problems: list[str] = []  # errors in strict mode, else warnings
        self.errors: list[str] = []  # errors in any mode
        self.warnings: list[str] = []
        self.lent: dict[int, set[str]] = {}  # saved rank -> names of its copies that this rank gets
        self._taken: set[int] = set()  # indices of the copies that this rank takes, of tensors kept per rank
        self.unexpected: set[str] = set()  # stored names to which nothing of this rank has been matched
        self.plain: set[str] = set()  # plain tensors in the state of a DTensor
        self._made: dict[tuple[object, ...], torch.Tensor] = {}  # for a live tensor with two stored ones
        self._collected, self._model, self._optimizer = Collecting(), ModelState({}), OptimizerState({}, {})
        self._extra: dict[str, object] = {}
        self._rng: object = None

    def request(self) -> dict[str, object]:
        """L1: what must be the same on all ranks."""
        self.given.check()
        options = self.given.options
        with_optimizer = options.load_optimizer and self.given.optimizer is not None
        return {
            "prefix": options.checkpoint_prefix,
            "strategy": options.resharding_strategy,
            "fallback": options.fallback,
            "skip_validation": options.skip_validation,
            "optimizer, rng, strict": [with_optimizer, options.load_rng_state, options.strict_mode],
        }

    def validate(self, reader: CheckpointReader) -> None:
        """L2: the record, and this rank's part of the files."""
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
        """L3: collect the state as a save does, and match it by name with what is stored."""
        self.reader, given, options, into = reader, self.given, self.given.options, self._collected
        values = {t.name for t in reader.metadata.tensors if t.dtype == "JSON"}
        with_optimizer = options.load_optimizer and "optimizer/state" in values
        needed = {
            "optimizer/state": with_optimizer and bool(given.optimizer),
            "rng/state": options.load_rng_state,
        }
        indices = (reader.find(name, self.op.rank) for name in sorted(values) if needed.get(name, True))
        reader.read_values(index for index in indices if index is not None)
        self._model = ModelState(given.model)
        self._model.collect(into)
        tensors = list(into.data.tensors)
        if given.optimizer is not None and with_optimizer:
            self._optimizer = OptimizerState(given.optimizer, self._model.parameters())
            self._optimizer.collect(into)
        for key, live in given.extra_state.items():
            if _is_stateful(live):
                into.value(f"extra/{key}", live.state_dict())
        into.finish()
        self.unexpected = {t.name for t in reader.metadata.tensors if t.name.startswith("model/")}
        self.unexpected |= {name for name in values if name.startswith(_OF_MODEL)}
        self._model.fill(self, tensors)
        if given.optimizer is not None and with_optimizer:
            self._optimizer.fill(self)
        elif with_optimizer:
            what = "the checkpoint has optimizer state, and load was given no optimizer"
            self.warnings.append(f"{what}: give it, or load_optimizer=False")
        elif given.optimizer is not None and options.load_optimizer:
            self.problems.append("the checkpoint has no optimizer state (load with load_optimizer=False)")
        extra = {name for name in values if name.startswith("extra/")}
        for name in sorted(extra | {f"extra/{key}" for key in given.extra_state}):
            if name not in values:
                self.problems.append(f"{name}: missing from the checkpoint")
            elif own := self._own_value(name):
                self._extra[name.removeprefix("extra/")] = own[0]
        self._extra_per_rank = self._read_extra_per_rank()
        if options.load_rng_state:
            if "rng/state" not in values:
                self.warnings.append("rng/state: missing from the checkpoint, so that it stays as it is")
            else:
                self._rng = next(iter(self._own_value("rng/state")), None)
        self._decide()
        return list(self.targets.values())

    def copies(self, name: str) -> Iterator[tuple[int, object]]:
        """Every rank's value of a name, with the rank, encoded: from the highest rank on, this one last."""
        own = self.op.rank
        for rank in sorted(self.reader.ranks(name) or [own], key=lambda rank: (rank == own, -rank)):
            if (index := self.reader.find(name, rank)) is not None:
                yield rank, self.reader.read_value(index)

    def _own(self, mesh: st.Shape) -> int:
        """The rank under which this rank's copy is kept: of a DTensor the lowest of its mesh, else itself."""
        return min(self.op.own_ranks(mesh), default=self.op.rank)

    def find(self, name: str, mesh: st.Shape = ()) -> int | None:
        """The index of the copy of `name` that this rank takes; None after noting the problem.

        `mesh`: the ranks of its DTensor.
        """
        self.unexpected.discard(name)
        if (index := self.reader.find(name, self._own(mesh))) is None:
            self.problems.append(f"{name}: missing from the checkpoint")
        elif (rank := self.reader.metadata.tensors[index].rank) is not None:
            self._taken.add(index)
            if rank != self._own(mesh):
                self.lent.setdefault(rank, set()).add(name)
        return index

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype of the stored tensor that this rank gets by this name."""
        index = self.reader.find(name, self.op.rank)
        return None if index is None else st.DTYPES[self.reader.metadata.tensors[index].dtype]

    def _own_value(self, name: str) -> list[object]:
        """The stored value; [] after a warning if it, or a tensor in it, is kept for other ranks only."""
        reader, kept = self.reader, self.reader.ranks(name)
        if not kept or self.op.rank in kept:
            if (index := reader.find(name, self.op.rank)) is None:
                return []
            node = reader.read_value(index)
            parts = ((self._collected.live.get(inner), reader.ranks(inner)) for inner in _tensors_in(node))
            foreign = [r for live, r in parts if r and self._own(coord.mesh_ranks(live)) not in r]
            if not foreign:
                self.find(name)
                return [self.decode(node)]
            kept = foreign[0]
        what = f"kept for rank(s) {st.some(kept, 20)}, not for rank {self.op.rank}, where it stays as it is"
        others = "; see result.extra_state_per_rank" if name.startswith("extra/") else ""
        self.warnings.append(f"{name}: {what}{others}")
        return []

    def _read_extra_per_rank(self) -> dict[str, dict[int, object]]:
        """If world sizes differ: all ranks' copies of `extra_state` values that differ, wholly or in part.

        Rank 0 reads them, and hands out values and bytes.
        """
        reader, meta = self.reader, self.reader.metadata
        extra = [(index, t) for index, t in enumerate(meta.tensors) if t.name.startswith("extra/")]
        if meta.world_size == self.op.world_size or all(t.rank is None for _, t in extra):
            return {}
        found: dict[str, dict[int, object]] = {}
        for index, t in extra if self.op.rank == 0 else ():
            if t.dtype == "JSON":
                node = reader.read_value(index)
                within = {rank for name in _tensors_in(node) for rank in reader.ranks(name)}
                for rank in sorted(within) if t.rank is None else [t.rank]:
                    value = st.decode_value(node, functools.partial(self._read_tensor, rank=rank))
                    found.setdefault(t.name.removeprefix("extra/"), {})[rank] = value
        node = self.op.broadcast(st.encode_value(found, "extra_state", _tensor_to_text))
        handed_out = st.decode_value(node, _tensor_from_text)
        return handed_out if isinstance(handed_out, dict) else {}

    def _read_tensor(self, name: str, rank: int) -> torch.Tensor:
        """The copy of a stored tensor that `rank` gets, whole."""
        if (index := self.reader.find(name, rank)) is None:
            raise st.corrupted(f"{name}: a stored value has this tensor in it, the record does not")
        return self.reader.read(index)

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
            dtypes = f"dtype {meta.dtype} in the checkpoint, {local.dtype} here"
            self.problems.append(f"{local.name}: {dtypes}; cast if not strict")
        self._target(index, local)

    def _target(self, index: int, local: coord.LocalTensor) -> None:
        """Have this rank's pieces of a tensor filled. The last of several tied names wins, as in torch."""
        exclusive = self._only_rank or (len(local.mesh) == self.op.world_size and not local.replicated)
        for box, view in local.pieces:
            if 0 in view.stride() and not view.is_contiguous():
                self.errors.append(f"{local.name}: is expanded: its elements share memory; clone() it")
            before = self.targets.get(place := coord.identity(view))
            # CONSOLIDATED, and an export, have a copy for each tied name.
            copied = self.reader.metadata.format in ("consolidated", "safetensors")
            if before is not None and before.tensor != index and not copied:
                lost = self.reader.metadata.tensors[before.tensor].name
                self.warnings.append(f"{lost}: is one tensor with {local.name}, whose stored value it gets")
            self.targets[place] = coord.Target(index, box, view, exclusive)

    def decode(self, node: object, param: torch.Tensor | None = None) -> object:
        """An encoded value with its tensors, which L4 fills.

        A tensor is the live one of its name where that fits, else a new one, laid out as `param`. It is new
        too where another stored tensor fills the live one: at first an average may share memory with its
        parameter.
        """

        def tensor(name: str) -> torch.Tensor:
            found, model = self._collected.live.get(name), None if name in self.plain else param
            if (index := self.find(name, coord.mesh_ranks(model if found is None else found))) is None:
                return torch.empty(0) if found is None else found
            shape, dtype = (meta := self.reader.metadata.tensors[index]).shape, st.DTYPES[meta.dtype]
            if found is not None and param is not None and tuple(found.shape) != shape:
                self.errors.append(f"{name}: shape {list(shape)} in the checkpoint, {list(found.shape)} here")
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                found = _allocate(name, shape, dtype, model)
            local = coord.local_tensor(name, found)
            places = [coord.identity(view) for _, view in local.pieces]
            if any(place in self.targets and self.targets[place].tensor != index for place in places):
                found = self._made.setdefault((index, *places), torch.empty_like(found.detach()))
                local = coord.local_tensor(name, found)
            self._target(index, local)
            return found

        return st.decode_value(node, tensor)

    def _decide(self) -> None:
        """Raise for misfits, or warn of them if not strict. A name that no rank has is unexpected."""
        taken = np.array(sorted(self._taken), np.int64)  # consecutive ones, where ranks have the same layout
        rows = self.op.gather_at_0((sorted(self.unexpected), len(taken), st.pack_ints(taken)))
        agreed = None
        if self.op.rank == 0:
            everywhere = (st.unpack_ints(packed, count).tolist() for _, count, packed in rows)
            agreed = set.intersection(*(set(names) for names, _, _ in rows)), set().union(*everywhere)
        unwanted, taken_by_any = self.op.broadcast(agreed)
        self._warn_of_kept(taken_by_any)
        missing = {p.partition(": missing")[0] for p in self.problems}
        self.problems += [f"{name}: in the checkpoint, but not here" for name in sorted(unwanted)]
        for longer, shorter in ((missing, unwanted), (unwanted, missing)):
            if any("model/" + name.partition("/")[2].partition(".")[2] in shorter for name in longer):
                how = "the module inside it, or the one around it; load_safetensors has rename="
                self.problems.insert(0, f"names differ by a first part (net.weight, weight): load {how}")
        if self.given.options.strict_mode:
            self.errors += self.problems
        else:
            self.warnings += self.problems
        if self.errors:
            what = f"checkpoint {self.reader.metadata.prefix!r} does not fit ({len(self.errors)} problem(s))"
            message = f"{what}:\n  " + st.some(self.errors, 20, "\n  ")
            raise CheckpointException(message, type=ExceptionType.VALIDATION_FAILED)

    def _warn_of_kept(self, taken: set[int]) -> None:
        """Of tensors kept per rank: name what this rank takes of another one, and what no rank takes."""
        for rank, names in sorted(self.lent.items()):
            which = f"kept per rank, not for rank {self.op.rank}, which gets rank {rank}'s copy"
            self.warnings.append(f"{which}: {st.some(sorted(names), 20)}")
        left: dict[tuple[int, ...], list[str]] = {}
        for name in sorted({self.reader.metadata.tensors[index].name for index in taken}):
            kept = self.reader.ranks(name)
            ranks = tuple(rank for rank in kept if self.reader.find(name, rank) not in taken)
            if ranks:
                left.setdefault(ranks, []).append(name)
        for ranks, lost in left.items():
            which = f"kept for rank(s) {st.some(ranks, 20)}, and taken by no rank here"
            self.warnings.append(f"{which}: {st.some(lost, 20)}")

    def apply(self) -> None:
        """L5: hand the filled states over."""
        model_state = self._model.apply(self.given.options.strict_mode)
        optimizer_state = self._optimizer.apply()
        for key, value in self._extra.items():
            if _is_stateful(live := self.given.extra_state.get(key)):
                getattr(live, "load_state_dict")(value)  # a state may be something else than a dict
        if isinstance(self._rng, dict):
            set_rng_state(self._rng)
        meta, here = self.reader.metadata, self.op.world_size
        self.result = CheckpointLoadResult(
            meta,
            model_state,
            optimizer_state,
            source_world_size=meta.world_size,
            target_world_size=here,
            was_resharded=meta.world_size != here,
            extra_state=self._extra,
            prefix=meta.prefix,
            warnings=self.warnings,
            extra_state_per_rank=self._extra_per_rank,
        )


def _tensor_to_text(path: str, tensor: torch.Tensor) -> str:
    """A tensor as text, for other ranks."""
    data = base64.b64encode(_bytes_of(tensor).tobytes())
    return json.dumps([st.CODES[tensor.dtype], list(tensor.shape), data.decode()])


def _tensor_from_text(text: str) -> torch.Tensor:
    """Inverse of `_tensor_to_text`."""
    code, shape, data = json.loads(text)
    out = torch.empty(shape, dtype=st.DTYPES[code], device="cpu")
    _bytes_of(out)[:] = np.frombuffer(base64.b64decode(data), np.uint8)
    return out


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

        def check(low: int, buffer: st.Bytes) -> None:
            found.errors.extend(reader.check_block(shard, low, buffer))
            reader.meter.add(min(st.BLOCK_BYTES, blocks.stop - low))

        st.in_parallel(blocks, check, reader.meter.tick, len(blocks))
        reader.meter.tick()
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
        wrong = st.not_covered_once(metadata.tensors, metadata.pieces.tensor, metadata.pieces.box)[:20]
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
        result = ValidationResult()
        try:
            for _ in range(2):  # a second time if a save replaces the checkpoint meanwhile
                with _open_checkpoint(self.storage, checkpoint_prefix) as reader:
                    result = self.validate_metadata(reader.metadata)
                    total = sum(shard.length - shard.header_bytes for shard in reader.metadata.shards)
                    reader.meter = coord.Meter("verify", total, progress)
                    result.add(self.validate_shards(reader, extra=[ChecksumIntegrityChecker()]))
                    if result.is_valid or not reader.is_superseded():
                        break
        except (CheckpointException, OSError) as error:
            result.errors.append(str(error))
        return result

    def validate_metadata(self, metadata: CheckpointMetadata | str) -> ValidationResult:
        """Run the compatibility checkers on a record, or on that of a prefix: see `read_committed`."""
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

    `out` ends in ".safetensors". More than `max_shard_bytes` become `<stem>-00001-of-0000N.safetensors`
    and an index, as Hugging Face's libraries expect. The model's tensors have the names of
    `model.state_dict()`; each tied name gets a copy. Without `model_only` the other tensors follow, named as
    stored. `dtype` casts the model's floats of 16 bits and more. An older export to `out` is replaced.

    ValueError for a misuse; CheckpointException for no checkpoint, damage or a failing disk. Then no file is
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

    def read(part: tuple[int, int, st.Box, R], buffer: st.Bytes) -> None:
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
        is_model, name, code = t.name.startswith("model/"), st.entry_name(t, st.whole_box(t.shape)), t.dtype
        if code == "JSON":
            if t.name.startswith(_OF_MODEL) or not (model_only or t.name.startswith("model")):
                notes["left out, being no tensors"].append(name)
            continue
        if is_model and t.rank == lowest[t.name]:
            name = t.name.removeprefix("model/")
            if t.rank is not None:
                notes["kept per rank, exported as the lowest rank has it"].append(name)
        elif model_only:
            continue
        if is_model and dtype is not None and code in _FLOATS:
            code = st.CODES[dtype]
        form, shape = st.stored_form(code, t.shape)
        if form != code:
            notes["complex, exported as pairs of floats (see torch.view_as_complex)"].append(name)
        stored, nbytes = index if t.alias_of is None else t.alias_of, math.prod(t.shape) * st.itemsize(code)
        chosen.append(_Exported(stored, code, name, form, shape, nbytes))
    names = Counter(["__metadata__", *(exported.name for exported in chosen)])  # safetensors' own entry
    if twice := [name for name, count in names.items() if count > 1]:
        what = f"two entries of the export would have one name: {st.some(twice)}"
        raise ValueError(f"{meta.prefix}: {what}; rename one (safetensors itself uses '__metadata__')")
    with st.well_formed(meta.prefix):
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
    old = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.[0-9a-f]{{8}}\.tmp)?")
    present = st.os.listdir(folder) if os.path.isdir(folder) else []
    older = [name for name in present if old.fullmatch(name) and name not in files]
    for name in (*files, *older):
        directory.length(name)  # raises for a link, before anything has changed
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
        for name in older:  # readers would prefer an older single file to the new index
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
      model, so export with `model_only` what will be imported again;
    - a file of torch.save, or a directory of torch.distributed.checkpoint (DCP): the model is what is under
      "model", "state_dict" or "model_state_dict", and the rest is `extra_state`. Without such a key the model
      is all tensors, by dotted names, and `extra_state` the entries without any.
    If all names begin with DDP's "module.", that is dropped.

    DCP's metadata is a pickle, which may run any code: import such a directory only if you trust its origin.
    ValueError for a misuse; CheckpointException for a damaged source, a failing disk, or an existing
    checkpoint of that prefix.
    """
    path = os.fspath(source)
    st.check_prefix(prefix)
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
        with st.well_formed(index):
            table = st.Fields(st.parse_json(text, index)).child("weight_map")
            weights, names = table.all, sorted(set(map(table.text, table.all)))
            for name in names:
                st.check_name(name)
                plain = os.path.basename(name) == name
                st.require(plain, f"{name!r} is not the plain name of a file beside the index")
    found: dict[str, R] = {}
    for name in names:
        tensors = read(os.path.join(folder, name))
        if indices:  # a file may have tensors that the index leaves out
            tensors = {key: tensor for key, tensor in tensors.items() if weights.get(key) == name}
        elif twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{path}: several files have {st.some(twice)}; name one file")
        found |= tensors
    if missing := sorted(weights.keys() - found.keys()):
        raise st.corrupted(f"{path}: not in the file that the index names: {st.some(missing)}", path)
    return found


def _read_header(path: str) -> dict[str, tuple[str, st.Entry]]:
    """The tensors of a safetensors file by name, in the order of their bytes: the file, and the entry.

    `begin` and `end` count from the start of the file. CORRUPTED_CHECKPOINT if the file breaks a rule.
    """
    storage, name = _locate(path)
    with st.well_formed(path), contextlib.closing(storage.open(name)) as file:
        length = file.length()
        file.read(0, memoryview(start := bytearray(min(8, length))))
        data = 8 + int.from_bytes(start, "little")
        fits = 10 <= data <= min(length, 8 + st.MAX_HEADER_BYTES)
        st.require(fits, f"no safetensors file, or damaged: header of {data - 8} bytes in one of {length}")
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
        found: dict[str, object] = {
            entry.name: part.view(st.DTYPES[entry.dtype]).view(entry.shape) for entry, part in parts
        }
        if ours := [name for name in found if name.startswith(("model/", "optimizer/", "extra/"))]:
            what = f"has {ours[0]!r}: it is part of a checkpoint, or a full export"
            raise ValueError(f"{path}: {what}; import what was exported with model_only")
        return found
    _locate(path)
    if zipfile.is_zipfile(path):  # torch.load does not look at its CRC32s
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise st.corrupted(f"{path}: {damaged} fails its CRC32", path)
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
    named: dict[str, object] = {str(key): value for key, value in state.items()}
    if len(named) < len(state):
        raise ValueError(f"{path}: two entries would have one name: a number, and its text")
    return named


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
    source = os.path.abspath(str(path))  # what is no path is not found, on all ranks alike

    def read_headers(op: coord.Operation) -> CheckpointReader:
        meta = _as_record(source, rename)
        crc = st.crc32(st.dump_json(st.encode_tables(meta)))
        op.agree({"the headers of the files (CRC32)": f"{crc:08x}"})
        return _UnverifiedReader(LocalStorage(meta.prefix), meta)

    options = LoadOptions("safetensors", load_rng_state=False, skip_validation=True, strict_mode=strict)
    checkpoint = DistributedCheckpoint(coordinator)
    given = checkpoint._begin(Given(LoadOptions, model, None, options, None, None))
    warnings = ["safetensors files have no checksums; nothing was verified"]
    try:
        return checkpoint._load(given, warnings, read_headers)
    except CheckpointException as error:
        error.checkpoint_path = source
        raise


class _UnverifiedReader(CheckpointReader):
    """Reads safetensors files that other programs have written; they have no checksums to verify."""

    def damage(self, index: int, low: int, data: st.Bytes) -> list[str]:
        return []

    def _open(self, index: int) -> StoredFile:
        storage, name = _locate(self.metadata.shard_path(index))
        return storage.open(name)


def _as_record(source: str, rename: Rename | None) -> CheckpointMetadata:
    """The headers of safetensors files as a record, with one piece a tensor. Its prefix is their directory.

    ValueError if two tensors get one name.
    """
    shards, tensors, rows = list[ShardMetadata](), dict[str, TensorMetadata](), list[tuple[int, int, int]]()
    for name, (path, (_, dtype, shape, begin, end)) in _read_parts(source, _read_header).items():
        new = rename(name) if callable(rename) else (rename or {}).get(name, name)
        if new is None:
            continue
        if not isinstance(new, str):
            raise ValueError(f"rename must give names, not {new!r}")
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
    width = max((len(t.shape) for t in tensors.values()), default=0)
    boxes = coord.stack_boxes([st.whole_box(t.shape) for t in tensors.values()], width)
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
    CheckpointException for a missing or damaged checkpoint.
    """
    storage, changes = StorageFactory.create(storage), dict[str, list[float]]()
    with _typed(f"{a}, {b}"), _open_checkpoint(storage, a) as old, _open_checkpoint(storage, b) as new:
        before, after = _by_name(old.metadata), _by_name(new.metadata)

        def compare(source: coord.Target, start: int, name: str) -> None:
            (_, was), (index, now) = before[name], after[name]
            other = torch.empty(source.box.size, dtype=st.DTYPES[now.dtype], device="cpu")
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


def _say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines. Every command prints this way, so that no stored name can control a terminal."""
    if (file := file or sys.stdout) is None:  # closed by the caller
        return
    encoding = file.encoding or "utf-8"
    text = "\n".join(map(st.escaped, lines))
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


class _Warnings(logging.Handler):
    """Prints what the library logs while a command runs, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"ckpt.py: {record.getMessage()}", file=sys.stderr)


def _cell(key: str, value: object) -> str:
    """A value on one line: bytes in units, shapes as [3, 5], nothing for None."""
    if isinstance(value, int) and "bytes" in key:
        return _human(value)
    if isinstance(value, tuple):
        return str([*value])
    return "" if value is None else st.escaped(f"{value:.3g}" if isinstance(value, float) else str(value))


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
        columns = [column for column in zip(*cells) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns))
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
    if not infos:
        log.warning("%s: there are no checkpoints below it", args.dir)
    for info in infos:
        info["timestamp"] = info["timestamp"].isoformat()
        info["custom_metadata"] = st.encode_value(dict(info["custom_metadata"]), "custom_metadata")
    return 0, infos


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
    if not report:  # a check of the wrong directory must not pass
        raise CheckpointException(f"{args.dir}: there are no checkpoints below it")
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
    rows = [difference._asdict() for difference in found]
    for row in rows:  # JSON has no NaN and no infinity
        row["largest_change"] = (
            None if (size := row["largest_change"]) is None else size if math.isfinite(size) else str(size)
        )
    return 1 if found else 0, rows


def _rm(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Delete a checkpoint."""
    st.delete_committed(storage, args.prefix)
    return 0, {"deleted": args.prefix}


def _gc(storage: CheckpointStorage, args: argparse.Namespace) -> _Result:
    """Remove what crashed saves left behind."""
    if not args.min_age >= 0:
        raise ValueError(f"--min-age must be at least 0, not {args.min_age}")
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
_ARGUMENTS = {
    "dir": "the directory that holds the checkpoints",
    "prefix": "the name of a checkpoint",
    "out": "the file to write; ends in .safetensors",
    "source": "a file, an index of files, or a directory",
    "a": "the earlier checkpoint",
    "b": "the later checkpoint",
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
            name, count = argument.strip("[]"), "?" if argument.startswith("[") else None
            command.add_argument(name, nargs=count, help=_ARGUMENTS[name])
        command.add_argument("--json", action="store_true", help="print JSON")
    export, diff, gc = (commands.choices[name].add_argument for name in ("export", "diff", "gc"))
    export("--model-only", action="store_true", help="leave out optimizer and extra state")
    export("--dtype", choices=[code.lower() for code in _FLOATS], help="cast the model's floating tensors")
    export("--max-shard-size", type=_byte_count, default="5GB", help="of each file; default 5GB")
    diff("--values", action="store_true", help="show the largest change of each tensor")
    gc("--min-age", type=float, default=24.0, help="hours until an unfinished save is dead; default 24")
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
