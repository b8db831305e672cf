"""How fast are checkpoints, what limits them, and how do the alternatives compare?

    python bench_ckpt.py --quick                   three minutes; 124 M parameters, under 5 GB of disk
    python bench_ckpt.py --size 3.6G --dir /data   all rows, on the disk that holds /data
    python bench_ckpt.py --rows list               the names of the rows; --rows a,b measures these
    python bench_ckpt.py --json result.json --plot result.png       --json alone prints to standard output
    torchrun --nnodes 2 ... bench_ckpt.py          on several nodes; --dir is storage that all of them share

What is measured against what. No checkpoint is faster than the slowest part that each byte must pass:

    save        tensor --copy--> aligned buffer --CRC32--> disk --fsync--> durable
    cold load   disk --> buffer --CRC32--> tensor
    warm load   page cache --> buffer --CRC32--> tensor
    async save  tensor --copy--> host memory; the rest runs behind training

Each row therefore moves the same bytes in two more ways, by a few lines that do nothing else (`RawFiles`):

    raw         I/O alone, in warm buffers
    raw+        I/O with the copy and the CRC32 of each block, which a verified checkpoint needs

The column "of raw+" is a line's speed divided by that of raw+. "Limited by" says what takes the time, with a
figure from this run. The peers are torch.distributed.checkpoint (DCP), and torch.save and safetensors where
they fit. A list below the tables says what each line does and does not do (`DOES`).

Why it is fair.
    - All lines of a row take turns, in another order each round: a slow minute of the disk affects all alike.
    - A warm-up round runs every setting of every line. The two fastest settings of each line are measured in
      `--rounds` rounds. The better one is shown: median, minimum, maximum. Ratios are ratios of medians.
    - Time runs from a barrier of all ranks to the next one. A save ends when its bytes are durable (fsync).
    - "Cold" files were read and dropped from the page cache; caches below the operating system stay.
      "Warm" files were just read. Loads fill existing tensors, as a restart after a fault does.
    - Every value is a function of its place in its tensor. Before a load is timed, all tensors are wiped and
      loaded, and each rank compares every bit with that function. Wrong bits of ours end the run with code 1.

A GB is 1e9 bytes of tensors; replicas count once. There is one rank a GPU, or --nproc on the CPU. A reshard
goes from N ranks to M and back: M = 2N on the CPU, N/2 on GPUs. Read `measure`, `RawFiles` and `ROWS` first.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import staging, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import ckpt
import ckpt_coord
import ckpt_storage

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
CORES = len(os.sched_getaffinity(0))
WAIT = timedelta(hours=4)  # for ranks that have no part in a row
Form = ckpt.CheckpointFormat
Settings = argparse.Namespace  # the command line; what `parse` returns
Io = tuple[bool, int, int]  # how raw I/O is done: whether with O_DIRECT, threads of one rank, MiB of a block
Held = tuple[str, tuple[int, int], ckpt_storage.Box, torch.Tensor]  # name, shape, box, memory
SAVE = ckpt.SaveOptions(checkpoint_prefix="x", include_rng_state=False)  # peers do not save generators either
LOAD = ckpt.LoadOptions(checkpoint_prefix="x", load_rng_state=False)
SMALL_TENSORS = 20_000
GROWTH_RANKS, GROWTH_TENSORS = (64, 512, 4096), 1000

DOES = {  # what each line does and does not do
    "raw": "I/O alone: warm aligned buffers, preallocated files, the best of several settings, fsync",
    "raw+": "raw, and each block is copied from or to other memory and its CRC32 is computed",
    "raw+ cached": "raw+ by the page cache, without O_DIRECT: the limit where ranks read the same bytes",
    "ours": "CRC32 of every byte on save and on load, fsync of files and directories",
    "DCP": "torch.distributed.checkpoint: data files are fsynced; no checksum on save or load",
    "DCP HuggingFace": "shards fsynced, then rank 0 copies them into one file without fsync; no checksum",
    "torch.save": "one process, fsynced by this benchmark; a CRC32 that loads do not check",
    "safetensors": "one process, save_file, fsynced by this benchmark; no checksum",
    "gloo exchange": "no I/O: each rank sends all but 1/N of its share to the others",
    "ours, eager": "the state is copied to host memory before the call returns; CRC32 and fsync follow",
    "ours, overlapped": "the copy runs during training, the optimizer's step waits; CRC32 and fsync follow",
    "DCP thread": "copied to host memory, then saved by a thread; fsync, no checksum",
    "DCP process": "copied to shared memory, then saved by a process; fsync, no checksum",
    "one copy": "copy_ of all tensors into warm host memory",
    "one step": "a training step without a save",
    "ours, plan": "S1 to S3 of a save on rank 0: agree, collect, plan, with the JSON of all other ranks",
    "ours, load plan": "L1 and L3 of a load by one rank of half as many: decode the record, find its reads",
    "ours, exchanged": "bytes to and from rank 0 in S1 to S3",
    "zlib-9": "zlib.compress(block, 9) in memory, of 4 MiB blocks",
}


class Candidate(NamedTuple):
    """One way to do a row's work: one setting of the line `family`. Only `run` is timed."""

    family: str
    run: Callable[[], object]
    setting: str = ""
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    check: Callable[[], object] = lambda: None  # once, before the warm-up; raises if the result is wrong


@dataclass
class Line:
    """One line of a table: the samples of one family at its best setting."""

    family: str
    unit: str
    samples: list[float]
    setting: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass
class Row:
    """One table. `limits`: what limits ours if it comes close to raw+, and if not; or one sentence."""

    key: str  # its name in `ROWS`
    name: str
    limits: tuple[str, str]
    lines: list[Line] = field(default_factory=list)
    nbytes: int = 0
    notes: list[str] = field(default_factory=list)

    def line(self, family: str) -> Line | None:
        """The line of this family; None if it was not measured."""
        return next((line for line in self.lines if line.family == family), None)

    def ratio(self, one: str, other: str) -> float:
        """How many times as good: 2.0 is twice as fast, or half the time or memory; 0.0 if not measured."""
        first, second = self.line(one), self.line(other)
        if first is None or second is None or 0 in (first.median, second.median):
            return 0.0
        faster = first.median / second.median
        return faster if first.unit in ("GB/s", "MB/s", "x") else 1 / faster

    def limit(self) -> str:
        """What limits ours, in a few words."""
        share = self.ratio("ours", "raw+")
        if self.key == "small" and (ours := self.line("ours")):
            return f"Python: {self.nbytes / ours.median / 1e3 / SMALL_TENSORS:.1f} us a tensor"
        return f"{self.limits[share < 0.85]}: {share:.2f} of raw+" if share else self.limits[0]


def gpt2_width(nbytes: int) -> int:
    """The width, a multiple of 64, that comes nearest to `nbytes` with AdamW. GPT-2 small: 768, 1.48 GB."""
    width = (math.sqrt(50_415**2 + 4 * 144 * nbytes / 12) - 50_415) / (2 * 144)
    return max(64, round(width / 64) * 64)


@dataclass
class State:
    """A model and its optimizer, if it has one, on the ranks of one world. All tensors are fp32."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the checkpoint: the parameters, then the optimizer's state."""
        parameters = list(self.model.parameters())
        states = [self.optimizer.state[parameter] for parameter in parameters] if self.optimizer else []
        return [p.detach() for p in parameters] + [value for state in states for value in state.values()]

    def nbytes(self) -> int:
        """Bytes of all tensors, whole ones, each counted once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def filled(self) -> State:
        """The state, after every element got the value that belongs to its place."""
        for number, tensor in enumerate(self.tensors()):
            local(tensor).copy_(expected(number, tensor))
        return self

    def check(self, load: Callable[[], object]) -> None:
        """Overwrite every tensor, load, and compare every bit; RuntimeError if one is wrong."""
        for tensor in self.tensors():
            local(tensor).fill_(-1.0)
        load()
        for number, tensor in enumerate(self.tensors()):
            pair = [part.reshape(-1).view(torch.int32) for part in (local(tensor), expected(number, tensor))]
            if not torch.equal(*pair):
                raise RuntimeError(f"loaded other bits than were saved, in tensor {number}")

    def payload(self) -> dict[str, object]:
        """The state as DCP takes it."""
        if self.optimizer is None:
            return {"model": self.model.state_dict()}
        return dict(zip(("model", "optim"), get_state_dict(self.model, self.optimizer)))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def expected(number: int, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of tensor `number`, computed without the library: exact multiples of 2**-20.

    The period is a prime, so that swapped rows or tensors do not go unnoticed.
    """
    place = torch.arange(tensor.numel(), dtype=torch.int32, device=tensor.device).view(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh, (placement,) = tensor.device_mesh, tensor.placements
        parts = place.chunk(mesh.size(), placement.dim if isinstance(placement, Shard) else 0)
        rank = mesh.get_local_rank()
        place = parts[rank] if rank < len(parts) else place.flatten()[:0]  # short dimensions have fewer parts
    return ((place + number * 7919) % 65521).view(local(tensor).shape) * 2.0**-20


@functools.lru_cache(2)
def build_state(world: World, layout: str, nbytes: int) -> State | None:
    """A model of GPT-2's size with AdamW in `layout` (plain, ddp, fsdp, columns), or small tensors (small).

    All are filled; the last two are kept. None on ranks outside of the world.
    """
    gc.collect()
    if not world.member:
        return None
    torch.set_num_threads(world.threads)
    if layout == "small":
        return State(nn.ParameterList(torch.empty(KIB) for _ in range(SMALL_TENSORS)), None).filled()
    width, options = gpt2_width(nbytes), {"activation": "gelu", "batch_first": True, "norm_first": True}
    block = partial(nn.TransformerEncoderLayer, width, width // 64, 4 * width, 0.0, **options)
    with torch.device("meta"):  # GPT-2's parameters, but for the positions; its head is the embedding
        blocks = [block() for _ in range(12)]
        model: nn.Module = nn.Sequential(nn.Embedding(50257, width), *blocks, nn.LayerNorm(width))
    if layout in ("fsdp", "columns"):
        by_columns = (lambda p: Shard(1) if p.ndim > 1 else Shard(0)) if layout == "columns" else None
        for module in [*blocks, model]:
            fully_shard(module, mesh=world.mesh, shard_placement_fn=by_columns)
    model.to_empty(device=world.device)
    if layout == "ddp":
        model = DistributedDataParallel(model, process_group=world.mesh.get_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return State(model, optimizer).filled()


class World:
    """Ranks 0..size-1 of the job as a group of their own. Creating one is collective over all ranks."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device, self.rank = size, device, dist.get_rank()
        self.member = self.rank < size
        self.threads = max(1, CORES // min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size))))
        self.group = dist.new_group(list(range(size)), backend="gloo", timeout=WAIT)
        self.mesh = DeviceMesh(device.type, list(range(size)))
        self.dcp = {"process_group": self.group} if size > 1 else {"no_dist": True}  # how DCP knows its ranks

    def seconds(self, action: Callable[[], object]) -> float:
        """Seconds from the first start of `action` to its last end; an exception is raised on all ranks."""
        failure: Exception | None = None
        dist.barrier(self.group)
        start = time.perf_counter()
        try:
            action()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            failure = error
        outcome = torch.tensor([float(failure is not None), time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(outcome, dist.ReduceOp.MAX, group=self.group)
        if outcome[0]:
            raise failure or RuntimeError("another rank failed")
        return float(outcome[1])

    def measure(self, candidate: Candidate) -> float:
        """Seconds of a candidate's run."""
        candidate.before()
        if self.rank == 0:
            os.sync()  # writes and deletions of before must not count
        try:
            return self.seconds(candidate.run)
        finally:
            candidate.after()


class Bench:
    """The run: settings, worlds, scratch directory, rows. Every rank has one; all make the same calls."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings, self.scratch, self.rank = settings, scratch, dist.get_rank()
        self.machine, self.doubts = machine(settings)
        self.device, ranks = torch.device("cpu"), dist.get_world_size()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            self.device = torch.device("cuda", torch.cuda.current_device())
        # On the CPU 2N ranks were started for --nproc N; else all ranks save, and half of them load.
        main, other = (settings.nproc, ranks) if ranks == 2 * settings.nproc else (ranks, max(1, ranks // 2))
        worlds = {size: World(size, self.device) for size in sorted({1, main, other})}
        self.worlds = {"single": worlds[1], "main": worlds[main], "other": worlds[other]}
        self.raw = RawFiles(scratch / f"raw-{self.rank}")
        self.rows: list[Row] = []
        self.stored = ""  # what the directories "ours" and "DCP" hold for the load rows
        self._started = time.perf_counter()

    def progress(self, text: str) -> None:
        """Show on rank 0's standard error what happens."""
        if self.rank == 0:
            print(f"[{time.perf_counter() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def remove(self, *names: str) -> None:
        """Delete files or directories of the scratch directory, on rank 0."""
        for path in [self.scratch / name for name in names] if self.rank == 0 else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def store(self, what: str) -> None:
        """Note what the directories "ours" and "DCP" will hold, and empty them. Collective."""
        self.stored = what
        self.remove("ours", "DCP")
        dist.barrier()


def measure(bench: Bench, world: World, row: Row, state: State | None, found: list[Candidate]) -> None:
    """Run all candidates in turns; add the best setting of each family to `row`, in GB/s. Collective.

    Ranks outside of `world` wait. A peer that fails in the warm-up round is left out, with a note.
    """
    if state is not None:
        torch.set_num_threads(world.threads)
        row.nbytes = state.nbytes()
        bench.progress(f"{row.name}: warm-up")
        first_s: dict[str, list[tuple[float, int]]] = {candidate.family: [] for candidate in found}
        for index, candidate in enumerate(found):
            try:
                world.seconds(candidate.check)
                first_s[candidate.family].append((world.measure(candidate), index))
            except Exception as error:
                if candidate.family == "ours":
                    raise
                row.notes.append(f"failed: {candidate.family} {candidate.setting}: {error!r}"[:150])
        times: dict[int, list[float]] = {i: [] for family in first_s.values() for _, i in sorted(family)[:2]}
        for turn in range(bench.settings.rounds):
            bench.progress(f"{row.name}: round {turn + 1} of {bench.settings.rounds}")
            for index in random.Random(turn).sample([*times], len(times)):  # the same on all ranks
                times[index].append(world.measure(found[index]))
        for index in sorted(times, key=lambda index: statistics.median(times[index])):
            if row.line(found[index].family) is None:
                samples = [row.nbytes / seconds / 1e9 for seconds in times[index]]
                row.lines.append(Line(found[index].family, "GB/s", samples, found[index].setting))
        row.lines.sort(key=lambda line: list(DOES).index(line.family))
    dist.barrier()
    bench.rows.append(row)


# ------------------------------------------------------------------------------------------------- raw I/O

# Settings that won on the disks seen so far come first: --quick tries four. What does not work is left out.
DISK_IO: list[Io] = [(True, 4, 16), (True, 2, 4), (False, 1, 4), (False, 4, 16), (True, 1, 4), (True, 2, 16)]
WARM_IO: list[Io] = [(False, threads, mib) for threads in (1, 2, 4) for mib in (1, 4)]


class RawFiles:
    """Raw I/O of one rank: what disk and memory do when nothing else is in the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = ThreadPoolExecutor(4)
        self.memory = numpy.empty(0, numpy.uint8)  # ordinary memory, such as that of tensors
        # Aligned memory in huge pages, as ours has it: the fastest for direct I/O on a virtual disk.
        self._buffers = [ckpt_storage.aligned_buffer(16 * MIB) for _ in range(4)]
        for buffer in self._buffers:
            buffer.reshape(16, MIB)[:] = numpy.frombuffer(os.urandom(MIB), numpy.uint8)

    def write(self, io: Io, nbytes: int, plus: bool) -> None:
        """Write `nbytes`, in whole pages, to a new file and fsync it. `plus`: with copy and CRC32."""
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, -(-nbytes // 4096) * 4096)
        self.move(io, [self.path], 0, 1, plus, os.O_WRONLY)
        sync([self.path])

    def move(self, io: Io, files: list[Path], part: int, parts: int, plus: bool, mode: int) -> None:
        """Write or read part `part` of `parts` of all blocks; each thread has every `threads`-th of them."""
        direct, threads, mib = io
        places = [(path, at) for path in files for at in range(0, path.stat().st_size, mib * MIB)]
        places = places[len(places) * part // parts : len(places) * (part + 1) // parts]

        def drain(thread: int) -> None:
            for path, offset in places[thread::threads]:
                length = min(mib * MIB, -(-(path.stat().st_size - offset) // 4096) * 4096)
                block, memory = self._buffers[thread][:length], self.memory[offset : offset + length]
                fd = os.open(path, mode | (os.O_DIRECT if direct else 0))
                if mode == os.O_RDONLY:
                    length = os.preadv(fd, [block], offset)
                elif plus:
                    block[:] = memory
                if plus:
                    ckpt_storage.crc32(block[:length])
                if mode == os.O_WRONLY:
                    os.pwrite(fd, block, offset)
                elif plus:
                    memory[:length] = block[:length]
                os.close(fd)

        list(self._pool.map(drain, range(threads)))


def raw_io(bench: Bench, world: World, nbytes: int, cold: bool | None = None) -> list[Candidate]:
    """The limit of a save (each rank writes its share of `nbytes`), or of a load of the files of ours."""
    raw, found, files = bench.raw, list[Candidate](), sorted((bench.scratch / "ours").rglob("*.safetensors"))
    most = nbytes // world.size if cold is None else max(path.stat().st_size for path in files)
    if len(raw.memory) < most + 16 * MIB:
        raw.memory = numpy.ones(most + 16 * MIB, numpy.uint8)
    settings = WARM_IO if cold is False else DISK_IO[: 4 if bench.settings.quick else None]
    families = ("raw", "raw+", "raw+ cached") if cold else ("raw", "raw+")
    for family, io in itertools.product(families, settings):
        setting, plus = f"{'O_DIRECT' if io[0] else 'buffered'}, {io[1]} x {io[2]} MiB", family != "raw"
        if cold is None:
            run, after = partial(raw.write, io, most, plus), partial(raw.path.unlink, missing_ok=True)
            found.append(Candidate(family, run, setting, after=after))
        elif not (io[0] and family == "raw+ cached"):
            run = partial(raw.move, io, files, world.rank, world.size, plus, os.O_RDONLY)
            found.append(Candidate(family, run, setting, before=partial(prepare, files, cold)))
    return found


def prepare(files: Sequence[Path], cold: bool) -> None:
    """Read files once; then, if `cold`, drop them from the page cache."""
    # A virtual machine may have given free memory back to its host: to get it anew costs more than the disk.
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(4 * MIB):
                pass
    sync(files if cold else (), drop=True)


def sync(files: Sequence[Path], drop: bool = False) -> None:
    """Fsync files; `drop` them from the page cache, which only clean pages leave."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if drop:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def library(bench: Bench, world: World) -> ckpt.DistributedCheckpoint:
    """The library under test over the ranks of one world."""
    return ckpt.DistributedCheckpoint(ckpt.TorchCoordinator(world.group), bench.scratch / "ours")


def our_saves(bench: Bench, world: World, state: State, form: Form = Form.MULTI_SHARD) -> list[Candidate]:
    """Our save, alone in a list."""
    run = partial(library(bench, world).save, state.model, state.optimizer, replace(SAVE, format=form))
    return [Candidate("ours", run, after=partial(bench.remove, "ours"))]


def dcp_saves(bench: Bench, world: World, state: State, consolidated: bool = False) -> list[Candidate]:
    """DCP's save, or `consolidated` that of its HuggingFaceStorageWriter, at several thread counts."""

    def save(threads: int) -> None:
        path, whole = bench.scratch / "DCP", {"save_distributed": True, "enable_consolidation": True}
        writer: dcp.StorageWriter = dcp.FileSystemWriter(path, thread_count=threads)
        if consolidated:  # fails where safetensors is not installed
            counts = {"thread_count": threads, "thread_count_consolidation": threads}
            writer = dcp.HuggingFaceStorageWriter(str(path), **whole, **counts)
        payload = state.model.state_dict() if consolidated else state.payload()
        dcp.save(payload, storage_writer=writer, **world.dcp)

    family, after = "DCP HuggingFace" if consolidated else "DCP", partial(bench.remove, "DCP")
    return [Candidate(family, partial(save, count), f"{count} threads", after=after) for count in (2, 1, 4)]


hugging_face_saves = partial(dcp_saves, consolidated=True)


def one_process_saves(bench: Bench, world: World, state: State) -> list[Candidate]:
    """torch.save, and safetensors, which fails where it is not installed."""
    path, after = bench.scratch / "file", partial(bench.remove, "file")

    def torch_save() -> None:
        optimizer = state.optimizer.state_dict() if state.optimizer else {}
        torch.save({"model": state.model.state_dict(), "optim": optimizer}, path)
        sync([path])

    def safetensors_save() -> None:
        tensors = {str(number): tensor for number, tensor in enumerate(state.tensors())}
        importlib.import_module("safetensors.torch").save_file(tensors, path)
        sync([path])

    runs = {"torch.save": torch_save, "safetensors": safetensors_save}
    return [Candidate(family, run, after=after) for family, run in runs.items()]


def exchanges(bench: Bench, world: World, state: State) -> list[Candidate]:
    """What ranks exchange at most for a whole file, alone: all bytes that are not on their writer."""

    def exchange() -> None:
        outgoing = torch.zeros(4 * MIB * world.size, dtype=torch.uint8)
        incoming = torch.zeros_like(outgoing)
        for _ in range(-(-state.nbytes() // world.size // outgoing.numel())):
            dist.all_to_all_single(incoming, outgoing, group=world.group)

    return [Candidate("gloo exchange", exchange)]


def loads(bench: Bench, world: World, state: State, cold: bool) -> list[Candidate]:
    """Our load and DCP's of what is in the directories "ours" and "DCP"."""

    def dcp_load() -> None:
        payload = state.payload()
        dcp.load(payload, storage_reader=dcp.FileSystemReader(bench.scratch / "DCP"), **world.dcp)
        if state.optimizer is not None:
            model, optimizer = payload["model"], payload["optim"]
            set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    found, ours = [], partial(library(bench, world).load, state.model, state.optimizer, LOAD)
    for family, load in {"ours": ours, "DCP": dcp_load}.items():
        files = [path for path in (bench.scratch / family).rglob("*") if path.is_file()]
        before = partial(prepare, files, cold)
        found.append(Candidate(family, load, before=before, check=partial(state.check, load)))
    return found


def save_row(bench: Bench, key: str, names: tuple[str, str, Form, str, Sequence[Callable]]) -> None:
    """Save a state with raw I/O, ours and the peers: one of `SAVES`."""
    world, (_, layout, form, rest, peers) = bench.worlds[names[0]], names
    bench.store("")
    state, found = build_state(world, layout, bench.settings.size), list[Candidate]()
    if state is not None:
        state = replace(state, optimizer=None) if form is Form.CONSOLIDATED else state
        found = raw_io(bench, world, state.nbytes()) + our_saves(bench, world, state, form)
        found += [candidate for peer in peers for candidate in peer(bench, world, state)]
    measure(bench, world, Row(key, f"{key}: save, {world.size} rank(s)", ("disk", rest)), state, found)


def load_rows(bench: Bench, key: str, names: tuple[str, str, str, str, Sequence[bool]]) -> None:
    """Load with raw I/O, ours and DCP: one of `LOADS`; --quick: only the first."""
    source, target, (_, layout, _, wanted, colds) = bench.worlds[names[0]], bench.worlds[names[2]], names
    if bench.stored != (what := f"{layout} x{source.size}"):
        bench.store(what)
        saved = build_state(source, layout, bench.settings.size)
        if saved is not None:
            for saves in (our_saves, dcp_saves):
                saves(bench, source, saved)[0].run()
        dist.barrier()
    for cold in colds[: 1 if bench.settings.quick else None]:
        state, found = build_state(target, wanted, bench.settings.size), list[Candidate]()
        if state is not None:
            found = raw_io(bench, target, 0, cold) + loads(bench, target, state, cold)
        limits = ("disk", "CPU cores") if cold else ("copy and CRC32", "the copy into tensors")
        if wanted == "columns":
            limits = limits[0], "the page cache, which ranks share" if cold else "short copies into rows"
        ranks = f"{source.size} rank(s)" if source is target else f"{source.size} to {target.size} ranks"
        row = Row(key, f"{key}: {'cold' if cold else 'warm'} load, {ranks}", limits)
        measure(bench, target, row, state, found)


class Reached(BaseException):
    """Ends a simulated rank at a gather."""


class OtherRank(ckpt.LocalCoordinator):
    """A rank that gets what rank 0 has given to earlier gathers, and ends at the next one."""

    def __init__(self, rank: int, world_size: int, earlier: Sequence[object]) -> None:
        self.rank, self.world_size, self.earlier = rank, world_size, iter(earlier)
        self.given: list[object] = []

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        for found in self.earlier:
            return [found] * self.world_size
        self.given.append(value)
        raise Reached


class Simulation(ckpt.LocalCoordinator):
    """S1 to S3 of a save by many ranks, in one process that holds one of them at a time; it is rank 0's.

    Rank 0 runs as it would in a job. When it gathers, each other rank runs from the start, gets rank 0's
    earlier values, and ends at this gather with its value. That time is not rank 0's.
    """

    def __init__(self, ranks: int, replicated: bool, storage: ckpt.LocalStorage) -> None:
        self.rank, self.world_size, self.replicated, self.storage = 0, ranks, replicated, storage
        self.earlier: list[object] = []  # rank 0's values
        self.planned: list[ckpt.CheckpointMetadata] = []
        self.exchanged_bytes, self.others_s, self.plan_s = 0, 0.0, 0.0
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def plan(self) -> None:
        """S1 to S3 on rank 0: sets `planned`, `plan_s`, and the bytes that went to and from this rank."""
        started = time.perf_counter()
        self.planned.append(self.run(self))
        self.plan_s = time.perf_counter() - started - self.others_s

    def held(self, rank: int, ranks: int) -> Iterator[Held]:
        """(name, shape, box, memory) of what a rank holds: whole tensors, or shards of uneven size.

        Boxes of one size share memory, since only one rank exists at a time.
        """
        for index in range(GROWTH_TENSORS):
            rows = 4096 + index % 7 * 13
            chunk = rows if self.replicated else -(-rows // ranks)
            low = 0 if self.replicated else min(rows, chunk * rank)
            size = (min(chunk, rows - low), 1)
            if (index, size[0]) not in self._views:
                self._views[index, size[0]] = torch.zeros(size, dtype=torch.bfloat16)
            box, view = ckpt_storage.Box((low, 0), size), self._views[index, size[0]]
            yield f"model/layers.{index}.weight", (rows, 1), box, view

    def collect(self, rank: int) -> ckpt.ShardData:
        """What S2 collects on a rank."""
        mesh = () if self.replicated else tuple(range(self.world_size))
        tensors = [ckpt_coord.local_value("rng/state", b"%08d" % rank, per_rank=True)]
        for name, shape, box, view in self.held(rank, self.world_size):
            pieces = [(box, view)] if view.numel() else []
            tensors.append(ckpt_coord.LocalTensor(name, "BF16", shape, pieces, mesh, self.replicated))
        return ckpt.ShardData(tensors)

    def run(self, coordinator: ckpt.LocalCoordinator) -> ckpt.CheckpointMetadata:
        """S1 to S3 on one rank; the plan."""
        op = ckpt_coord.Operation(coordinator, "save", WAIT.total_seconds())
        names = {"prefix": "x", "format": "multi_shard", "compression": "none", "contents": ["model"]}
        request = {**names, "overwrite": True, "verify_replicas": True, "custom_metadata": {}}
        save = ckpt_coord.CheckpointCoordinator(coordinator, self.storage)
        ticket = save.agree(op, lambda: request)
        data = save.collect(op, lambda: self.collect(coordinator.rank))
        return save.plan(op, ticket, data)[0]

    def all_gather(self, value: object, timeout: float = 600.0) -> list[object]:
        """Every rank's value, as JSON and back."""
        given, started = json.dumps(value), time.perf_counter()
        texts = [self._text_of(1)]
        broadcast = '"value": null' in texts[0]  # then no other rank gives anything
        texts += texts * (self.world_size - 2) if broadcast else map(self._text_of, range(2, self.world_size))
        self.others_s += time.perf_counter() - started
        copies = 1 if given.startswith('{"value": [') else self.world_size - 1  # 1: a part for each rank
        self.exchanged_bytes += len(given) * copies if broadcast else sum(map(len, texts))
        self.earlier.append(json.loads(given))
        return [value, *map(json.loads, texts)]

    def _text_of(self, rank: int) -> str:
        """What a rank gives to rank 0's present gather."""
        other = OtherRank(rank, self.world_size, self.earlier)
        with contextlib.suppress(Reached):
            self.run(other)
        return json.dumps(other.given[0])


def growth(bench: Bench) -> None:
    """Plan for many simulated ranks, then for a load by one rank of half as many."""
    for replicated, ranks in itertools.product((False, True), GROWTH_RANKS):
        kind = "replicated" if replicated else "sharded"
        name = f"growth: {ranks} ranks x {GROWTH_TENSORS} {kind} tensors"
        bench.progress(name)
        simulation = Simulation(ranks, replicated, ckpt.LocalStorage(str(bench.scratch / "growth")))
        grown = peak_growth(simulation.plan)
        # What S5 fills in. A record's rows are bounded by the bytes of its headers.
        plan, held = simulation.planned[0], list(simulation.held(1, ranks // 2))
        shards = tuple(shard._replace(length=1 << 40, header_bytes=100_000_000) for shard in plan.shards)
        record = ckpt_storage.encode_record(replace(plan, shards=shards))
        started = time.perf_counter()
        found = ckpt_storage.decode_record(record, "x")
        index_of = {tensor.name: index for index, tensor in enumerate(found.tensors)}
        targets = (ckpt_coord.Target(index_of[name], box, view) for name, _, box, view in held)
        ckpt.CheckpointReader(simulation.storage, found).plan(targets)
        figures = {"plan": ("s", simulation.plan_s), "load plan": ("s", time.perf_counter() - started)}
        figures |= {"peak memory": ("MiB", grown / MIB), "record": ("MB", len(record) / 1e6)}
        figures["exchanged"] = ("MB", simulation.exchanged_bytes / 1e6)
        lines = [Line(f"ours, {what}", unit, [value]) for what, (unit, value) in figures.items()]
        limit = f"JSON and numpy: {simulation.plan_s / ranks / GROWTH_TENSORS * 1e6:.2f} us a rank and tensor"
        notes = [f"{len(found.pieces.begin):,} pieces"]
        bench.rows.append(Row("growth", name, (limit, ""), lines, notes=notes))
        bench.remove("growth")


def memory(bench: Bench) -> None:
    """Peak memory of saves and loads, each in fresh processes, at two sizes."""
    ranks = min(bench.worlds["main"].size, torch.cuda.device_count() or bench.worlds["main"].size)
    jobs = [("fsdp", ranks, ("save", "load", "consolidated save")), ("plain", 1, ("save", "load"))]
    sizes = (bench.settings.size // 4, bench.settings.size)
    found = collections.defaultdict[str, list[Line]](list)
    for who, size, (layout, count, actions) in itertools.product(("ours", "DCP"), sizes, jobs):
        for action in actions:  # the load takes what the save has left
            name = f"memory: {action}, {layout} x{count}, MiB of a rank beyond its tensors"
            bench.progress(f"{name}: {who}, {size / 1e9:.2g} GB")
            if who == "ours" or action != "consolidated save" or importlib.util.find_spec("safetensors"):
                job, log = json.dumps([who, action, layout, size]), bench.scratch / "log"
                extra = {"CKPT_BENCH_JOB": job, "CKPT_BENCH_DIR": str(bench.scratch)}
                with open(log, "wb") as errors:
                    if code := launch(count, sys.argv[1:], extra, errors.fileno()):
                        raise RuntimeError(f"{job} failed with code {code}:\n{log.read_text()[-4000:]}")
                answer = float((bench.scratch / "answer").read_text())
                found[name].append(Line(f"{who}, {size / 1e9:.2g} GB of tensors", "MiB", [answer]))
        bench.remove("ours", "DCP")
    for name, lines in found.items():
        limit = f"fixed buffers: {lines[1].median - lines[0].median:+.0f} MiB for four times the tensors"
        bench.rows.append(Row("memory", name, (limit, ""), lines))


def peak_memory(bench: Bench, who: str, action: str, layout: str, size: int) -> float:
    """MiB by which the resident set grows at most, on any rank, while `who` performs an action."""
    world = bench.worlds["main"]
    state = build_state(world, layout, size)
    assert state is not None
    whole = action == "consolidated save"
    state, form = (replace(state, optimizer=None), Form.CONSOLIDATED) if whole else (state, Form.MULTI_SHARD)
    found = our_saves(bench, world, state, form) + dcp_saves(bench, world, state, whole)
    found = loads(bench, world, state, cold=False) if action == "load" else found
    run = next(candidate.run for candidate in found if candidate.family.startswith(who))
    grown = torch.tensor([peak_growth(run) / MIB], dtype=torch.float64)
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    return float(grown[0])


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which the resident set is larger at its peak during `run` than before it."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc returns free memory: otherwise its reuse would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = proc_bytes("/proc/self/status", "VmRSS")
    run()
    return proc_bytes("/proc/self/status", "VmHWM") - before


def proc_bytes(path: str, key: str) -> int:
    """The bytes of `key` in a file of /proc with lines like "VmRSS:  1024 kB"; 0 if it has none."""
    lines = (line.split() for line in Path(path).read_text().splitlines() if line.startswith(key + ":"))
    return next((int(words[1]) * KIB for words in lines), 0)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Pin all threads of this process to one core, and with them the threads and processes they start."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def pin(where: set[int], count: int) -> None:
        torch.set_num_threads(count)
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), where)

    pin({min(allowed)}, 1)
    yield
    pin(allowed, threads)


def compression(bench: Bench) -> None:
    """Compress normal weights on one core: ratio (x) and speed (MB/s) of each level, and of zlib-9."""
    ours = library(bench, bench.worlds["single"])
    for dtype in (torch.bfloat16, torch.float32):
        count, lines = (4 if bench.settings.quick else 16) * 4 // dtype.itemsize, list[Line]()
        model = nn.ParameterList(torch.randn(MIB).mul_(0.02).to(dtype) for _ in range(count))
        raw = b"".join(p.detach().view(torch.uint8).numpy().tobytes() for p in model)
        blocks = [raw[at : at + 4 * MIB] for at in range(0, len(raw), 4 * MIB)]

        for family in ("ours, FAST", "ours, BALANCED", "ours, MAXIMUM", "zlib-9"):
            bench.progress(f"compression: {dtype}, {family}")
            with on_one_core():
                start = time.perf_counter()
                if family == "zlib-9":
                    stored = sum(len(zlib.compress(block, 9)) for block in blocks)
                else:
                    level = ckpt.CompressionLevel[family.removeprefix("ours, ")]
                    ours.save(model, None, replace(SAVE, compression_level=level))
                    stored = ours.list_checkpoints()[-1].size_bytes
                lines.append(Line(family, "MB/s", [len(raw) / (time.perf_counter() - start) / 1e6]))
            lines.append(Line(family, "x", [len(raw) / stored]))
        limit = f"deflate on one core: {lines[0].median:.0f} MB/s with {lines[0].family}"
        bench.rows.append(Row("compression", f"compression: {dtype}, whole saves", (limit, ""), lines))
        bench.remove("ours")


RETURN, DURABLE, LOST = "call to return", "call to durable", "training time lost per save on one core"
AsyncSaver = tuple[str, Callable[[], Future], Callable[[], object]]  # family, start, close


def async_savers(bench: Bench, state: State) -> Iterator[AsyncSaver]:
    """save_async of ours with each staging, then of DCP in a thread and in a process."""
    world, pinning = bench.worlds["single"], (False, True) if torch.cuda.is_available() else (False,)
    for how in ("eager", "overlapped"):
        ours, options = library(bench, world), replace(SAVE, staging=how)
        yield f"ours, {how}", partial(ours.save_async, state.model, state.optimizer, options), ours.close
    for pinned, how in itertools.product(pinning, ("thread", "process")):
        # With an accelerator DCP stages in the background, from pinned memory.
        stager = staging.DefaultStager(staging.StagingOptions(pinned, how == "process", pinned, pinned))

        def start(how: str = how, stager: staging.DefaultStager = stager) -> Future:
            answer = dcp.async_save(
                state.payload(),
                storage_writer=dcp.FileSystemWriter(bench.scratch / "DCP", thread_count=2),
                process_group=world.group,
                async_checkpointer_type=state_dict_saver.AsyncCheckpointerType[how.upper()],
                async_stager=stager,
            )
            if isinstance(answer, state_dict_saver.AsyncSaveResponse):
                answer.staging_completion.result()
                return answer.upload_completion
            return answer

        yield f"DCP {how}{', pinned' if pinned else ''}", start, stager.close


def async_saves(bench: Bench) -> None:
    """Save behind training: time to return, time to durable, and training time lost on one core."""
    state = build_state(bench.worlds["single"], "plain", bench.settings.size)
    assert state is not None and state.optimizer is not None
    for value in state.tensors()[len(list(state.model.parameters())) :]:
        value.zero_()  # so that steps compute finite numbers
    times: dict[str, dict[str, list[float]]] = {}  # milliseconds by row and family
    for measured, where in ((until_durable, contextlib.nullcontext), (training_lost, on_one_core)):
        with where():
            for family, start, close in async_savers(bench, state):
                bench.progress(f"async: {family}, {measured.__name__}")
                for turn in range(bench.settings.rounds + 1):
                    os.sync()
                    for (row, other), seconds in measured(state, start).items():
                        samples = times.setdefault(row, {}).setdefault(other or family, [])
                        samples += [seconds * 1e3] if turn else []  # the first save allocates
                close()
                bench.remove("ours", "DCP")
    for name, found in times.items():
        lines = [Line(family, "ms", samples) for family, samples in found.items()]
        row = Row("async", f"async: {name}", ("the core, which training and save share", ""), lines)
        if copies := row.ratio("one copy", "ours, eager"):
            row.limits = f"memory bandwidth: eager takes {copies:.2f} of one copy", ""
        elif name == DURABLE:
            row.limits = f"the copy, then the disk: {state.nbytes() / lines[0].median / 1e6:.2f} GB/s", ""
        bench.rows.append(row)


def until_durable(state: State, start: Callable[[], Future]) -> dict[tuple[str, str], float]:
    """Seconds until the call returns and until the bytes are durable; then of one copy, as a limit."""
    began = time.perf_counter()
    pending = start()
    returned = time.perf_counter() - began
    pending.result()
    durable, tensors = time.perf_counter() - began, state.tensors()
    warm = [torch.zeros_like(tensor, device="cpu") for tensor in tensors]
    os.sync()
    began = time.perf_counter()
    for target, source in zip(warm, tensors):
        target.copy_(source)
    copied = time.perf_counter() - began
    return {(RETURN, ""): returned, (RETURN, "one copy"): copied, (DURABLE, ""): durable}


def training_lost(state: State, start: Callable[[], Future]) -> dict[tuple[str, str], float]:
    """Seconds that a loop with one save takes more than its steps at their usual pace; and that pace."""
    tokens, optimizer = torch.randint(50257, (1, 64), device=state.tensors()[0].device), state.optimizer

    def step() -> float:
        began = time.perf_counter()
        state.model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    pace, steps = statistics.median(step() for _ in range(5)), 0
    began = time.perf_counter()
    pending = start()
    while steps < 5 or not pending.done():
        step()
        steps += 1
    lost = time.perf_counter() - began - steps * pace
    pending.result()
    return {(LOST, ""): lost, (LOST, "one step"): pace}


SAVES = {
    # world, layout, form, what limits ours where the disk does not, peers
    "save-one": ("single", "plain", Form.MULTI_SHARD, "copy and CRC32", [dcp_saves, one_process_saves]),
    "save-ddp": ("main", "ddp", Form.MULTI_SHARD, "each rank's CRC32 of its whole replica", [dcp_saves]),
    "save-fsdp": ("main", "fsdp", Form.MULTI_SHARD, "copy and CRC32", [dcp_saves]),
    "single-file": ("main", "fsdp", Form.SINGLE_FILE, "exchange, disk", [dcp_saves, exchanges]),
    "consolidated": ("main", "fsdp", Form.CONSOLIDATED, "exchange, disk", [hugging_face_saves, exchanges]),
    "small": ("single", "small", Form.MULTI_SHARD, "", [dcp_saves]),
}
LOADS = {
    # world that saves, its layout, world that loads, its layout, cold or not
    "load-one": ("single", "plain", "single", "plain", [True, False]),
    "load-cold": ("main", "fsdp", "main", "fsdp", [True]),
    "load-warm": ("main", "fsdp", "main", "fsdp", [False]),
    "reshard-up": ("main", "fsdp", "other", "fsdp", [True, False]),
    "reshard-down": ("other", "fsdp", "main", "fsdp", [True, False]),
    "reshard-columns": ("main", "fsdp", "main", "columns", [True, False]),
    "small": ("single", "small", "single", "small", [False]),
}
OTHERS = {"growth": growth, "memory": memory, "compression": compression, "async": async_saves}
ROWS = {
    "save-one": "save of one process; torch.save and safetensors, too",
    "save-ddp": "save of a DDP model from N ranks; replicas are compared, and written once",
    "save-fsdp": "save of an FSDP2 model from N ranks",
    "single-file": "save of an FSDP2 model into one file (SINGLE_FILE), against DCP's files, one a rank",
    "consolidated": "save of an FSDP2 model, no optimizer (CONSOLIDATED), against DCP's HuggingFace writer",
    "load-one": "load of one process, cold and warm",
    "load-cold": "load into the layout that was saved; files are not in the page cache",
    "load-warm": "load into the layout that was saved; files are in the page cache",
    "reshard-up": "load on M ranks what N have saved, cold and warm (--quick: cold)",
    "reshard-down": "load on N ranks what M have saved, cold and warm",
    "reshard-columns": "load by columns what was saved by rows, cold and warm",
    "small": "save and warm load of 20,000 tensors of 4 KiB in one process",
    "growth": "plans of 64, 512 and 4,096 simulated ranks x 1,000 tensors: time, memory, bytes; takes long",
    "memory": "peak memory of saves and loads beyond the model's, at two model sizes",
    "compression": "compression of normal weights on one core, bf16 and fp32, against zlib-9",
    "async": "async save: time to return, time to durable, and training time lost on one core",
}
QUICK_ROWS = ["save-fsdp", "load-cold", "reshard-up"]


def machine(settings: Settings) -> tuple[dict[str, str], list[str]]:
    """What the figures depend on: hardware, file system, versions; and why they should not be quoted."""
    mount, kind, device = file_system(settings.dir)
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    cpu, gpus = next(names, platform.machine()).split(":")[-1].strip(), torch.cuda.device_count()
    total, free = (proc_bytes("/proc/meminfo", key) / GIB for key in ("MemTotal", "MemAvailable"))
    disk, load = shutil.disk_usage(settings.dir).free / GIB, os.getloadavg()[0]
    facts = {
        "cpu": f"{cpu}, {CORES} cores" + (f"; {gpus} x {torch.cuda.get_device_name(0)}" if gpus else ""),
        "memory": f"{total:.0f} GiB, {free:.0f} GiB available",
        "file system": f"{kind} on {device} at {mount}, {disk:.0f} GiB free",
        "system": f"{platform.system()} {platform.release()}, load average {load:.1f}",
        "versions": f"torch {torch.__version__}, numpy {numpy.__version__}, Python {sys.version.split()[0]}",
        "CRC32": ckpt_storage.CRC_PROVIDER,
    }
    debug = hasattr(sys, "gettotalrefcount") or sys.flags.dev_mode or torch.version.debug
    reasons = {
        f"{settings.dir} is on {kind}, not on a disk": kind in ("tmpfs", "ramfs", "overlay"),
        f"load average {load:.1f}: other programs use this machine": load > 0.5 * CORES + 0.5,
        "a debug build of Python or torch, or -X dev": debug,
        "too little memory: files may leave the page cache": free * GIB < 4 * settings.size,
        f"only {settings.rounds} rounds: too few to quote": settings.rounds < 5,
    }
    return facts, [reason for reason, holds in reasons.items() if holds]


def file_system(directory: str) -> tuple[str, str, str]:
    """(mount point, type, device) of the file system that holds `directory`."""
    best, real = ("/", "unknown", "unknown"), Path(os.path.realpath(directory))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        mount, (kind, device) = left.split()[4], right.split()[:2]
        if real.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind, device)
    return best


def show_header(bench: Bench) -> None:
    """Print the model, the machine and the doubts."""
    settings, ranks, width = bench.settings, bench.worlds["main"].size, gpt2_width(bench.settings.size)
    size = f"{settings.size / 12e6:.0f} M parameters, {settings.size / 1e9:.2f} GB with AdamW, fp32"
    run = f"{ranks} ranks, resharded to and from {bench.worlds['other'].size}; {settings.rounds} rounds"
    facts = [("model", f"GPT-2 of width {width}: {size}"), ("run", run), *bench.machine.items()]
    for key, value in [*facts, *(("WARNING", doubt) for doubt in bench.doubts)]:
        print(f"  {key:12} {value}")
    print(flush=True)


def show_row(row: Row) -> None:
    """Print one table: raw I/O, ours, the peers."""
    print(row.name + (f", {row.nbytes / 1e9:.2f} GB" if row.nbytes else ""))
    print(f"  {ROWS[row.key]}\n  limited by {row.limit()}")
    print(f"  {'':26} {'':5} {'median':>9} {'min':>9} {'max':>9} {'of raw+':>8} {'ours is':>8}  best setting")
    first = next((line.family for line in row.lines if line.family.startswith("ours")), "")
    for line in row.lines:
        share = f"{row.ratio(line.family, 'raw+'):.2f}" if row.line("raw+") else ""
        same = "ours" + "".join(line.family.partition(", ")[1:])
        ours = same if row.line(same) else first  # of the same size, in the rows on memory
        peer = line.family.startswith(("DCP", "torch", "safe", "gloo", "zlib"))
        better = f"{row.ratio(ours, line.family):.2f} x" if peer else ""
        values = (line.median, min(line.samples), max(line.samples))
        figures = " ".join(f"{value:9.{2 if abs(value) < 100 else 0}f}" for value in values)
        print(f"  {line.family:26} {line.unit:5} {figures} {share:>8} {better:>8}  {line.setting}")
    print("".join(f"  {note}\n" for note in row.notes), flush=True)


def summary(bench: Bench) -> str:
    """The result of --quick in one sentence; "" if one of its rows is missing."""
    rows = {row.key: row for row in bench.rows if row.key in ("save-fsdp", "reshard-up")}
    if len(rows) < 2:
        return ""
    saved, loaded = rows["save-fsdp"], rows["reshard-up"]
    faster = [f"{row.ratio('ours', 'DCP'):.2f} times as fast" for row in (saved, loaded)]
    shares = [f"{row.ratio('ours', 'raw'):.0%} of the disk's speed" for row in (saved, loaded)]
    return (
        f"Saved {saved.nbytes / 1e9:.2f} GB from {bench.worlds['main'].size} ranks, loaded it on "
        f"{bench.worlds['other'].size} and verified every bit: compared with torch.distributed.checkpoint, "
        f"the save was {faster[0]}, at {shares[0]}, and the load {faster[1]}, at {shares[1]}."
    )


def plot(path: str, rows: Sequence[Row]) -> None:
    """Draw the rows in GB/s: a bar a line, with its minimum and maximum."""
    importlib.import_module("matplotlib").use("Agg")  # needs no display
    pyplot = importlib.import_module("matplotlib.pyplot")
    shown = [row for row in rows if row.lines and row.lines[0].unit == "GB/s"]
    families = [family for family in DOES if any(row.line(family) for row in shown)]
    figure, axes = pyplot.subplots(figsize=(9.0, 1.2 + 0.22 * sum(len(row.lines) + 1 for row in shown)))
    bars, ticks, place = dict[str, object](), dict[float, str](), 0
    for row in shown:
        ticks[place + (len(row.lines) - 1) / 2] = row.name.replace(", ", "\n", 1)
        for line in sorted(row.lines, key=lambda line: families.index(line.family)):
            spread = [[line.median - min(line.samples)], [max(line.samples) - line.median]]
            colour = f"C{families.index(line.family)}"
            bars[line.family] = axes.barh(place, line.median, 0.9, xerr=spread, color=colour, capsize=2)
            place += 1
        place += 1
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.invert_yaxis()
    axes.set_xlabel("GB/s: median, minimum and maximum")
    axes.legend([bars[family] for family in families], families, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=120, bbox_inches="tight")


# ------------------------------------------------------------------------------------------------- running


def run_rows(bench: Bench) -> None:
    """Measure all rows, print each at once, and report. Collective."""
    settings, rows = bench.settings, bench.rows
    if bench.rank == 0:
        show_header(bench)
    for key in settings.rows:
        first = len(rows)
        if key in SAVES:
            save_row(bench, key, SAVES[key])
        if key in LOADS:
            load_rows(bench, key, LOADS[key])
        if key in OTHERS:
            build_state.cache_clear()
            bench.store("")
            if bench.rank == 0:
                OTHERS[key](bench)
            build_state.cache_clear()  # async has trained a state
            dist.barrier()
        for row in rows[first:] if bench.rank == 0 else ():
            show_row(row)
    if bench.rank == 0:
        report(bench)


def report(bench: Bench) -> None:
    """Print what each line does, write what was asked for, and end with the sentence of --quick."""
    print("What each line does and does not do")
    for family in dict.fromkeys(line.family for row in bench.rows for line in row.lines):
        if what := DOES.get(family.removesuffix(", pinned")):
            print(f"  {family:18} {what}")
    sentence = summary(bench) if bench.settings.quick else ""
    found = {"settings": vars(bench.settings), "machine": bench.machine, "warnings": bench.doubts}
    found["rows"] = [{**asdict(row), "limit": row.limit()} for row in bench.rows]
    text = json.dumps({"benchmark": "ckpt", **found, "summary": sentence})
    if bench.settings.json == "-":
        print(text)
    elif bench.settings.json:
        Path(bench.settings.json).write_text(text + "\n")
    if bench.settings.plot:
        plot(bench.settings.plot, bench.rows)
    print(f"\n{sentence}" if sentence else "", flush=True)


def work(settings: Settings) -> NoReturn:
    """One rank of the benchmark, or of a job in fresh processes; ends the process."""
    warnings.simplefilter("ignore")  # the peers' deprecation notes would hide the tables
    logging.disable(logging.WARNING)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    given, scratch = os.environ.get("CKPT_BENCH_DIR"), [""]
    if dist.get_rank() == 0:
        scratch = [given or tempfile.mkdtemp(prefix="ckpt-bench-", dir=settings.dir)]
    dist.broadcast_object_list(scratch, 0)
    try:
        bench, job = Bench(settings, Path(scratch[0])), json.loads(os.environ.get("CKPT_BENCH_JOB", "null"))
        if job is None:
            run_rows(bench)
        elif (grown := peak_memory(bench, *job)) and bench.rank == 0:
            (bench.scratch / "answer").write_text(str(grown))
        dist.barrier()
    finally:
        if not given and dist.get_rank() == 0:
            shutil.rmtree(scratch[0], ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # a regular exit may abort after gloo collectives


def launch(ranks: int, argv: Sequence[str], extra: Mapping[str, str], errors: int | None = None) -> int:
    """Start this file once a rank and wait; the first exit code that is not 0, at which all ranks are ended.

    The ranks meet at a store of this process, as under torchrun. `errors`: where their standard error goes.
    """
    store, size = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), str(ranks)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), **extra}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    command, started = [sys.executable, os.path.abspath(__file__), *argv], list[subprocess.Popen[bytes]]()
    end_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # In a session of its own: Ctrl-C reaches only this process, which then ends the ranks.
    start = partial(subprocess.Popen, command, start_new_session=True, preexec_fn=end_with_parent)
    try:
        for rank in map(str, range(ranks)):
            variables = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
            started.append(start(env=variables, stderr=errors))
        while any(rank.poll() is None for rank in started) and not any(rank.poll() for rank in started):
            time.sleep(0.02)
        return next((rank.returncode for rank in started if rank.poll()), 0)
    finally:
        for process in started:
            process.kill()  # its files are in the scratch directory, which is deleted as a whole
        for process in started:
            process.wait()


def size(text: str) -> int:
    """'3.6G' -> 3,600,000,000; K, M, G and T are powers of 1000."""
    scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    return int(float(text[:-1]) * scale if scale else float(text))


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line; exits with a message if they make no sense."""
    parser = argparse.ArgumentParser(description="Measure ckpt against the machine's limits and its peers.")
    add = parser.add_argument
    add("--quick", action="store_true", help="three rows, three rounds: three minutes")
    add("--size", type=size, help="bytes of the model with AdamW, such as 500M (default: 3.6G, quick 1.49G)")
    add("--dir", default=".", help="a directory on the disk to measure (default: the current one)")
    add("--rounds", type=int, help="rounds after the warm-up (default: 5, quick 3)")
    add("--rows", help="names, separated by commas; 'list' prints them")
    add("--json", default="", nargs="?", const="-", metavar="FILE", help="write JSON; no FILE: print it")
    add("--plot", default="", metavar="FILE.png", help="draw the rows in GB/s (needs matplotlib)")
    add("--nproc", type=int, default=2, help="ranks on a machine without GPUs (default: 2)")
    given = parser.parse_args(argv)
    if given.rows == "list":
        parser.exit(0, "".join(f"{name:16} {what}\n" for name, what in ROWS.items()))
    given.rows = given.rows.split(",") if given.rows else QUICK_ROWS if given.quick else list(ROWS)
    given.rounds = (3 if given.quick else 5) if given.rounds is None else given.rounds
    given.size = (1_493_000_000 if given.quick else 3_600_000_000) if given.size is None else given.size
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"no rows {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    for path in (given.dir, *(os.path.dirname(os.path.abspath(path)) for path in (given.json, given.plot))):
        if not os.path.isdir(path):
            parser.error(f"no such directory: {path}")
    if given.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if min(given.nproc, given.rounds, given.size) < 1:
        parser.error("--nproc, --rounds and --size must be at least 1")
    width, given.dir = gpt2_width(given.size), os.path.abspath(given.dir)
    given.size = 12 * (144 * width**2 + 50_415 * width)  # of a model that exists
    return given


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; the exit code."""
    settings = parse(argv)
    if "RANK" in os.environ:  # a rank, started by `launch` or by torchrun
        if "CKPT_BENCH_DIR" not in os.environ or "CKPT_BENCH_JOB" in os.environ or torch.cuda.is_available():
            settings.nproc = 0  # no rank has been started only to load
        work(settings)
    # A checkpoint of ours and one of DCP to load, and some space to work.
    free, needed = shutil.disk_usage(settings.dir).free / GIB, 2.1 * settings.size / GIB + 1.5
    if free < needed:
        print(f"{settings.dir} has {free:.1f} GiB free, and this needs {needed:.1f}: choose a smaller --size")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = tempfile.mkdtemp(prefix="ckpt-bench-", dir=settings.dir)
    try:
        ranks = torch.cuda.device_count() or 2 * settings.nproc
        return launch(ranks, argv, {"CKPT_BENCH_DIR": scratch})
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
