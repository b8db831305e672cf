"""How fast are checkpoints, what limits them, and is there anything left to win?

    python bench_ckpt.py --quick                 a minute or two, 124 M parameters with AdamW, < 6 GB disk
    python bench_ckpt.py --size 3.6G --dir /data --json result.json --plot result.png
    python bench_ckpt.py --rows list             what can be measured, one row a line; --rows a,b measures those
    torchrun --nnodes 2 ... bench_ckpt.py        the same on several nodes (--dir on storage that all of them see)

The argument. A checkpoint can be no faster than the slowest thing that every byte has to pass:

    save        tensor --copy--> aligned buffer --CRC32--> disk --fsync--> durable      limit: the disk's writes
    cold load   disk --> buffer --CRC32--> tensor                                       limit: the disk's reads
    warm load   page cache --copy--> buffer --CRC32--> tensor                           limit: cores (copy + CRC32)
    async       tensor --copy--> warm host buffer, and the rest behind training         limit: memory bandwidth

So each row measures that limit as well, on the same bytes, in the same run, by a few lines that do nothing else
(section "The ceilings"), and prints it first. "of ceiling" is ours divided by it; what is left to win is the rest.
Beside it stand the peers at their best settings, and below the tables what each of them does and does not do.

How. Per row: one warm-up round, in which every setting of every candidate runs once; the best two settings of each
go on. Then --rounds rounds in which all candidates take turns (the order rotates), so that a slow minute of the disk
hits all of them. Printed: median, minimum and maximum; ratios are ratios of medians. Time runs from a barrier of all
ranks to the next one. A save ends when its bytes are durable (fsync), unless the line says otherwise. Its files are
then deleted and the file system synced, outside the measurement. "GB/s" are 1e9 bytes of tensors, each counted once.

Cold means: files fsynced, then dropped from the page cache with posix_fadvise(DONTNEED); a cache below the operating
system (of a hypervisor, a RAID controller) is not dropped, neither for the ceiling nor for anybody.
Warm means: read once in full right before. Loads go into tensors that exist (model and optimizer), as on a restart
after a fault. A first load, before the measuring, is compared bit for bit with what was saved (--quick: of ours,
resharded); where ours differs, the exit code is 1.

Who runs. Ranks 0..N-1 of one set of processes, as sub-groups: N = --nproc (CPU), or all GPUs. Resharding goes from N
to M ranks and back, M = 2N on CPU, N/2 on GPUs. Rows that need a process of their own (peak memory, one pinned core)
start it. Reading order: rows (the sections named so), measure(), the ceilings.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import logging
import math
import os
import platform
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import ckpt
import ckpt_coord
import ckpt_storage

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
DCP_THREADS = (1, 2, 4)
KEEP = 2  # settings of each candidate that survive the warm-up round
PAGE = 4096
WAIT = timedelta(hours=4)  # ranks that sit out a row wait for the others

PAGE_CACHE = "raw, page cache"  # a family
LOADED = {"ours": "ours-to-load", "DCP": "dcp-to-load"}  # directories of the checkpoints of the load rows

DCP_DOES = "torch.distributed.checkpoint: fsyncs each data file, no checksum"
OURS_DOES = "fsync of files and directories, CRC32 of every byte on save and on load"


# ---------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Settings:
    """What the command line asked for; the same on all ranks."""

    quick: bool
    size_bytes: int
    directory: str
    rounds: int
    rows: tuple[str, ...]
    json_path: str
    plot_path: str
    nproc: int


@dataclass(frozen=True)
class Candidate:
    """One way of doing a row's work. `family` is what the table shows one line for, the best `setting` of it."""

    family: str
    run: Callable[[], object]
    setting: str = ""
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    kind: str = "peer"  # ceiling | ours | peer
    does: str = ""


@dataclass
class Line:
    """One line of the table: all samples of one candidate, in `unit`."""

    family: str
    kind: str
    unit: str
    samples: list[float]
    setting: str = ""
    does: str = ""

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    def ratio(self, other: Line) -> float:
        """How much better this line is than `other` (2.0: twice as fast, or half the time or memory)."""
        more, less = (self, other) if self.unit.endswith("B/s") or self.unit == "x" else (other, self)
        return more.median / less.median if less.median > 0 else math.inf


@dataclass
class Row:
    """One question of the benchmark.

    Its lines, what limits it, and the targets `(family, factor)` it is held to.
    """

    name: str
    limit: str
    nbytes: int = 0
    lines: list[Line] = field(default_factory=list)
    targets: tuple[tuple[str, float], ...] = ()
    notes: list[str] = field(default_factory=list)
    wrong: bool = False  # a load of ours gave other bits than were saved: the run fails

    def line(self, family: str) -> Line | None:
        """The line of this family, None where it was not measured."""
        return next((line for line in self.lines if line.family == family), None)

    def of_kind(self, kind: str) -> Line | None:
        """The best line of this kind: the ceiling, or ours."""
        lines = [line for line in self.lines if line.kind == kind]
        return next((line for line in lines if all(line.ratio(other) >= 1 for other in lines)), None)


# ---------------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """One transformer block of GPT-2: attention and MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, time, width] -> the same shape."""
        batch, time_steps, width = x.shape
        heads = self.qkv(self.ln_1(x)).view(batch, time_steps, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time_steps, width))
        result: torch.Tensor = x + self.out(F.gelu(self.fc(self.ln_2(x))))
        return result


class GPT2(nn.Module):
    """GPT-2; the head is the token embedding again (tied), so it has no parameter of its own."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50257, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, time] -> the mean loss of predicting each next one."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        loss: torch.Tensor = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss


def gpt2_bytes(width: int, layers: int) -> int:
    """Bytes of the fp32 parameters and of AdamW's two moments of each."""
    return 12 * (51_281 * width + layers * (12 * width * width + 13 * width) + 2 * width)


def gpt2_shape(size_bytes: int) -> tuple[int, int]:
    """The (width, layers) nearest to `size_bytes` with parameters and AdamW, of about 12 layers; small.

    (768, 12).
    """
    widths = (64, 128, 256, 512, 768, 1024, 1280, 1600, 2048, 3072, 4096, 6144, 8192)
    layers = {
        width: (size_bytes / 12 - 51_283 * width) / (12 * width * width + 13 * width) for width in widths
    }
    best = min(widths, key=lambda width: abs(math.log(max(layers[width], 0.01) / 12)))
    return best, max(1, round(layers[best]))


@dataclass
class State:
    """A model and its optimizer on the ranks of one world, with all optimizer state in place."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the checkpoint by name: parameters, then `<parameter>.<state>`."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[name.removeprefix("module.")] = parameter.detach()
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name.removeprefix('module.')}.{key}"] = value
        return found

    def nbytes(self) -> int:
        """Bytes of all tensors, whole ones, each counted once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def wipe(self) -> None:
        """Overwrite every tensor, so that a load that restores nothing is found out."""
        for tensor in self.tensors().values():
            local(tensor).fill_(-1.0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_state(world: World, layout: str, seed: int, size_bytes: int) -> State:
    """A GPT-2 with random weights in `layout` (plain | ddp | fsdp | fsdp-columns) after one real AdamW step.

    With another seed than 1 it is only to be loaded into: AdamW's state is there, but zero and never stepped.
    """
    device = world.device
    torch.set_num_threads(world.threads)
    with torch.device("meta"):
        model: nn.Module = GPT2(*gpt2_shape(size_bytes))
    if layout.startswith("fsdp"):
        by_columns = layout == "fsdp-columns"
        for module in [*model.get_submodule("blocks").children(), model]:
            place = (lambda p: Shard(1) if p.ndim > 1 else Shard(0)) if by_columns else None
            fully_shard(module, mesh=world.mesh, shard_placement_fn=place)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(
        seed * 1000 + (world.rank if layout.startswith("fsdp") else 0)
    )
    for parameter in model.parameters():
        local(parameter.detach()).normal_(0.0, 0.02, generator=generator)
    if layout == "ddp":
        model = DistributedDataParallel(model, process_group=world.mesh.get_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = State(model, optimizer)
    if seed == 1:
        train_step(state, torch.full((1, 8), 7, device=device))
    else:
        for parameter in model.parameters():
            moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return state


def train_step(
    state: State, tokens: torch.Tensor, guard: AbstractContextManager[object] | None = None
) -> None:
    """One forward, backward and optimizer step; `guard` is held around the step."""
    state.model(tokens).backward()
    with guard or nullcontext():
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------- worlds


class World:
    """Ranks 0..size-1 of the job as a group of their own.

    Creating one is collective over all ranks of the job.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self.rank = dist.get_rank()
        self.member = self.rank < size
        self.threads = max(1, cores() // min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size))))
        self.group = dist.new_group(list(range(size)), backend="gloo", timeout=WAIT)
        self.mesh = DeviceMesh(device.type, list(range(size)))

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds from all ranks starting `action` to the last one ending it, the same number on all ranks.

        An exception on any rank is raised on all of them."""
        failure: Exception | None = None
        dist.barrier(self.group)
        start = time.perf_counter()
        try:
            action()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            failure = error
        outcome = torch.tensor(
            [0.0 if failure is None else 1.0, time.perf_counter() - start], dtype=torch.float64
        )
        dist.all_reduce(outcome, dist.ReduceOp.MAX, group=self.group)
        if failure is not None:
            raise failure
        if outcome[0]:
            raise RuntimeError("another rank failed")
        return float(outcome[1])

    def all_true(self, answer: bool) -> bool:
        """True where every rank says so."""
        flag = torch.tensor([int(answer)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag[0])


class Bench:
    """The run: settings, worlds, scratch directory, the rows measured so far. Every rank holds one, in step."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings = settings
        self.scratch = scratch
        self.rank = dist.get_rank()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            self.device = torch.device("cuda", torch.cuda.current_device())
        main, other = world_sizes(dist.get_world_size(), settings.nproc)
        worlds = {size: World(size, self.device) for size in sorted({1, main, other})}
        self.single, self.main, self.other = worlds[1], worlds[main], worlds[other]
        self.rows: list[Row] = []
        self.machine, self.doubts = (
            machine(settings.directory),
            doubts(settings),
        )  # before this run shows in the load
        self._states: dict[tuple[int, str, int], State] = {}
        self.stored = ""  # what the directories LOADED hold
        self._started, self._shown = time.perf_counter(), ""

    def progress(self, text: str, detail: str = "") -> None:
        """Show on rank 0's standard error what is going on.

        The detail only on a terminal, where lines are reused.
        """
        if self.rank:
            return
        line = f"[{time.perf_counter() - self._started:6.1f} s] {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line} {detail}"[:120], end="", file=sys.stderr, flush=True)
        elif text != self._shown:
            print(line, file=sys.stderr, flush=True)
        self._shown = text

    def state(self, world: World, layout: str, seed: int = 1) -> State:
        """The state of this world, layout and seed, built on first use and kept until release()."""
        key = (world.size, layout, seed)
        if key not in self._states:
            self.progress(f"building the model: {layout} on {world.size} ranks")
            self._states[key] = build_state(world, layout, seed, self.settings.size_bytes)
        return self._states[key]

    def release(self) -> None:
        """Forget all states and their memory, and the checkpoints that were saved to be loaded."""
        self._states.clear()
        self.stored = ""
        gc.collect()
        self.remove(*LOADED.values())

    def path(self, name: str) -> Path:
        """A place in the scratch directory."""
        return self.scratch / name

    def remove(self, *names: str) -> None:
        """Rank 0 deletes these from the scratch directory."""
        if self.rank == 0:
            for name in names:
                shutil.rmtree(self.path(name), ignore_errors=True)

    def child(self, job: str, ranks: int = 1, cpu: int = -1, **parameters: object) -> dict[str, list[float]]:
        """Run CHILDREN[job] in `ranks` new processes (pinned to `cpu`) and return what its rank 0 returned.

        Called by rank 0 alone; the child starts from a fresh heap and its threads inherit the pinning."""
        answer = self.path(f"child-{job}.json")
        request = {
            "job": job,
            "answer": str(answer),
            "parameters": parameters,
            "size": self.settings.size_bytes,
        }
        environment = {"CKPT_BENCH_CHILD": json.dumps(request), "CKPT_BENCH_DIR": str(self.scratch)}
        log = self.path(f"child-{job}.log")  # DCP's writer process logs every save
        with open(log, "wb") as errors:
            code = launch(
                ranks, sys.argv[1:], environment, cpu=cpu, own_session=False, errors=errors.fileno()
            )
        if code:
            raise RuntimeError(f"{job} {parameters} failed with code {code}:\n{log.read_text()[-4000:]}")
        return {key: list(values) for key, values in json.loads(answer.read_text()).items()}


def world_sizes(processes: int, nproc: int) -> tuple[int, int]:
    """(main, other): the ranks that save, and those that it is resharded to.

    N and 2N where this file started 2 x --nproc ranks on a machine without GPUs; else all ranks, and half of
    them.
    """
    return (nproc, processes) if processes == 2 * nproc else (processes, max(1, processes // 2))


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def same_bits(saved: State | None, source: World, loaded: State | None, target: World) -> bool:
    """Gather every tensor of both states on rank 0 and compare the bytes; called by all ranks of both worlds.

    A rank outside one of the worlds passes None for its state. Only rank 0's answer counts; the others say
    True.
    """
    ours = loaded.tensors() if loaded is not None else {}
    truth = saved.tensors() if saved is not None else {}
    equal = True
    for name in truth or ours:  # the same model, so the same order, on all ranks
        a = whole(truth[name], source) if truth else None
        b = whole(ours[name], target) if ours else None
        if a is not None and b is not None:
            equal = equal and a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return equal


def whole(tensor: torch.Tensor, world: World) -> torch.Tensor | None:
    """The whole tensor on rank 0, in host memory; None on the other ranks. A sharded one is sent there."""
    if not isinstance(tensor, DTensor):
        return tensor.cpu() if world.rank == 0 else None
    shard = tensor.to_local().contiguous().cpu()
    dim = next(place.dim for place in tensor.placements if isinstance(place, Shard))
    shapes = [part.shape for part in torch.empty(tensor.shape, device="meta").chunk(world.size, dim)]
    if world.rank > 0:
        if world.rank < len(shapes):  # a short dimension leaves the last ranks without a share
            dist.send(shard, 0, group=world.group)
        return None
    parts = [shard, *(torch.empty(shape, dtype=tensor.dtype) for shape in shapes[1:])]
    for rank, part in enumerate(parts[1:], start=1):
        dist.recv(part, rank, group=world.group)
    return torch.cat(parts, dim)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN and -0.0 compare as what they are."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------------------------------------- the ceilings


@dataclass(frozen=True)
class Setting:
    """How raw I/O is done.

    Threads of one rank, each over blocks of its own, past the page cache or through it.
    """

    direct: bool
    threads: int
    block: int

    def __str__(self) -> str:
        return f"{'O_DIRECT' if self.direct else 'buffered'}, {self.threads} thr x {self.block // MIB} MiB"


WRITE_SETTINGS = [
    *(Setting(True, threads, block) for threads in (1, 2, 4) for block in (4 * MIB, 16 * MIB)),
    *(Setting(False, threads, block) for threads in (1, 2) for block in (4 * MIB, 16 * MIB)),
]
READ_SETTINGS = [
    *(Setting(True, threads, block) for threads in (1, 2, 4) for block in (4 * MIB, 16 * MIB)),
    *(Setting(False, threads, block) for threads in (1, 2, 4) for block in (4 * MIB, 16 * MIB)),
]
WARM_SETTINGS = [Setting(False, threads, block) for threads in (1, 2, 4) for block in (1 * MIB, 4 * MIB)]
QUICK_WRITE_SETTINGS = [  # those that won on the disks seen so far: a shorter warm-up round
    Setting(True, 1, 4 * MIB),
    Setting(True, 2, 4 * MIB),
    Setting(True, 4, 16 * MIB),
    Setting(False, 1, 4 * MIB),
]
QUICK_READ_SETTINGS = [
    Setting(True, 2, 16 * MIB),
    Setting(True, 4, 16 * MIB),
    Setting(False, 1, 4 * MIB),
    Setting(False, 4, 16 * MIB),
]


class RawFile:
    """This rank's share of a row's bytes in a file of its own, written and read with nothing in between."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = -(-nbytes // PAGE) * PAGE
        self._pool = ThreadPoolExecutor(4)
        self._memory = numpy.empty(0, numpy.uint8)
        # As good as they get: aligned, and in huge pages, which direct I/O on a virtual disk is much faster
        # with.
        self._buffers = [ckpt_storage.aligned_buffer(16 * MIB) for _ in range(4)]
        for buffer in self._buffers:
            buffer.reshape(16, MIB)[:] = numpy.frombuffer(os.urandom(MIB), numpy.uint8)  # warm

    def takes_direct(self) -> bool:
        """Whether this file system opens files with O_DIRECT."""
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0)))
        except OSError:
            return False
        return hasattr(os, "O_DIRECT")

    def write(self, setting: Setting, checked: bool = False) -> None:
        """Write the bytes to a new, preallocated file and fsync it; `checked`.

        Each block copied from memory, with its CRC32.
        """
        self.path.unlink(missing_ok=True)
        fd = self._open(setting, os.O_RDWR | os.O_CREAT)
        memory = self.memory(self.nbytes) if checked else None

        def block(buffer: memoryview, fd: int, offset: int) -> None:
            data = buffer[: self.nbytes - offset]
            if memory is not None:
                data[:] = memory[offset : offset + len(data)]
                ckpt_storage.crc32(data)
            os.pwrite(fd, data, offset)

        try:
            os.posix_fallocate(fd, 0, self.nbytes)
            self._each(setting, [(fd, offset) for offset in range(0, self.nbytes, setting.block)], block)
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(
        self,
        setting: Setting,
        files: Sequence[Path],
        world: World,
        checksum: bool = False,
        copied: bool = False,
    ) -> None:
        """Read this rank's share of `files` into buffers used again and again.

        If asked to with the CRC32 of each block, or `copied` to memory."""
        fds = [self._open(setting, os.O_RDONLY, path) for path in files]
        memory = self.memory(max(path.stat().st_size for path in files)) if copied else None

        def block(buffer: memoryview, fd: int, offset: int) -> None:
            count = os.preadv(fd, [buffer], offset)
            if checksum:
                ckpt_storage.crc32(buffer)
            if memory is not None:
                memory[offset : offset + count] = buffer[:count]

        try:
            blocks = [(fd, offset) for fd in fds for offset in range(0, os.fstat(fd).st_size, setting.block)]
            low, high = (len(blocks) * rank // world.size for rank in (world.rank, world.rank + 1))
            self._each(setting, blocks[low:high], block)
        finally:
            for fd in fds:
                os.close(fd)

    def memory(self, nbytes: int) -> memoryview:
        """Ordinary memory, touched before: where tensors lie."""
        if len(self._memory) < nbytes:
            self._memory = numpy.ones(nbytes, numpy.uint8)
        return self._memory.data

    def _open(self, setting: Setting, flags: int, path: Path | None = None) -> int:
        return os.open(
            path or self.path, flags | (getattr(os, "O_DIRECT", 0) if setting.direct else 0), 0o600
        )

    def _each(
        self,
        setting: Setting,
        blocks: Sequence[tuple[int, int]],
        work: Callable[[memoryview, int, int], object],
    ) -> None:
        """Call `work(buffer, fd, offset)` for all blocks, every thread taking each `threads`-th."""

        def drain(thread: int) -> None:
            with self._buffers[thread].data as buffer, buffer[: setting.block] as part:
                for fd, offset in blocks[thread :: setting.threads]:
                    work(part, fd, offset)

        for done in [self._pool.submit(drain, thread) for thread in range(setting.threads)]:
            done.result()


def raw_write(bench: Bench, world: World, nbytes: int) -> list[Candidate]:
    """The ceiling of a save: every rank writes its share of `nbytes`, fsynced, in the ways that disks like."""
    raw = RawFile(bench.path(f"raw-{bench.rank}"), nbytes // world.size)
    settings = QUICK_WRITE_SETTINGS if bench.settings.quick else WRITE_SETTINGS
    does = "preallocated file, warm aligned buffers, fsync"
    kinds = {"raw write + fsync": (False, does + ", no checksum")}
    if not bench.settings.quick:
        kinds["raw, copy + CRC32"] = True, does + ", each block copied from memory and its CRC32 taken"
        raw.memory(raw.nbytes)
    return [
        Candidate(
            family,
            partial(raw.write, setting, checked),
            str(setting),
            after=lambda: raw.path.unlink(missing_ok=True),
            kind="ceiling",
            does=does,
        )
        for family, (checked, does) in kinds.items()
        for setting in usable(raw, world, settings)
    ]


def raw_read(bench: Bench, world: World, cold: bool) -> list[Candidate]:
    """The ceiling of a load: every rank reads its share of the files that ours loads.

    From a warm cache also its CRC32.
    """
    raw = RawFile(bench.path(f"raw-{bench.rank}"), 0)
    settings = usable(raw, world, QUICK_READ_SETTINGS if bench.settings.quick else READ_SETTINGS)
    files = [path for path in files_below([bench.path(LOADED["ours"])]) if path.suffix == ".safetensors"]
    before = (lambda: drop_cache(files)) if cold else (lambda: fill_cache(files))
    does = "the same files into warm buffers"
    kinds = {"raw read + CRC32": (True, False, does + ", CRC32 of every block, all cores")}
    if cold:
        kinds = {"raw read": (False, False, does)}
        if not bench.settings.quick:
            kinds["raw, CRC32 + copy"] = (
                True,
                True,
                does + ", CRC32 of every block, and a copy to ordinary memory",
            )
            kinds[PAGE_CACHE] = True, True, "the same without O_DIRECT: the limit of whatever ranks share"
    return [
        Candidate(
            family,
            partial(raw.read, setting, files, world, checksum, copied),
            str(setting),
            before=before,
            kind="ceiling",
            does=does,
        )
        for family, (checksum, copied, does) in kinds.items()
        for setting in (settings if cold else WARM_SETTINGS)
        if not (setting.direct and family == PAGE_CACHE)
    ]


def usable(raw: RawFile, world: World, settings: Sequence[Setting]) -> list[Setting]:
    """Those of the settings that the file system supports, the same on all ranks."""
    direct = world.all_true(raw.takes_direct())
    return [setting for setting in settings if direct or not setting.direct]


def drop_cache(paths: Sequence[Path]) -> None:
    """Take the files below `paths` out of the page cache (clean pages only, hence the fsync)."""
    for path in files_below(paths):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def fill_cache(paths: Sequence[Path]) -> None:
    """Read the files below `paths` once."""
    buffer = bytearray(4 * MIB)
    for path in files_below(paths):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def files_below(paths: Sequence[Path]) -> list[Path]:
    """All regular files at or below these paths."""
    return [
        file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()
    ]


# --------------------------------------------------------------------------------------------- ours and the peers


class NoSync:
    """The operating system without fsync, for the line that shows what fsync costs."""

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        """Do nothing."""


def save_options(
    layout: ckpt.CheckpointFormat = ckpt.CheckpointFormat.MULTI_SHARD,
    level: ckpt.CompressionLevel = ckpt.CompressionLevel.NONE,
    staging: str = "eager",
) -> ckpt.SaveOptions:
    """Save as "x", without the generators' state, which the peers do not save either."""
    return ckpt.SaveOptions(
        checkpoint_prefix="x",
        format=layout,
        compression_level=level,
        include_rng_state=False,
        staging=staging,
    )


class Ours:
    """The library under test over the ranks of one world, with its checkpoints in a directory of the scratch
    one.
    """

    def __init__(self, bench: Bench, world: World, name: str, fsync: bool = True) -> None:
        logger = logging.getLogger("bench_ckpt.ours")
        logger.setLevel(logging.ERROR)
        coordinator = ckpt.TorchCoordinator(process_group=world.group)
        self.library = ckpt.DistributedCheckpoint(coordinator, bench.path(name), logger=logger)
        self._os = os if fsync else NoSync()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        layout: ckpt.CheckpointFormat = ckpt.CheckpointFormat.MULTI_SHARD,
        level: ckpt.CompressionLevel = ckpt.CompressionLevel.NONE,
    ) -> None:
        """Save as "x"."""
        ckpt_storage.os = self._os  # the seam through which all of its file calls go
        try:
            self.library.save(model, optimizer, save_options(layout, level))
        finally:
            ckpt_storage.os = os

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Load "x" in place."""
        self.library.load(model, optimizer, ckpt.LoadOptions(checkpoint_prefix="x", load_rng_state=False))

    def stored_bytes(self) -> int:
        """Bytes on disk of "x"."""
        return next(info.size_bytes for info in self.library.list_checkpoints() if info.prefix == "x")


def dcp_save(path: Path, world: World, state: State, threads: int, sync: bool = True) -> None:
    """Save with torch.distributed.checkpoint."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    writer = FileSystemWriter(path, thread_count=threads, sync_files=sync)
    group = world.group if world.size > 1 else None
    state_dict_saver.save(
        {"model": model, "optim": optimizer},
        storage_writer=writer,
        process_group=group,
        no_dist=world.size == 1,
    )


def dcp_load(path: Path, world: World, state: State) -> None:
    """Load with torch.distributed.checkpoint, in place."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    wanted = {"model": model, "optim": optimizer}
    group = world.group if world.size > 1 else None
    state_dict_loader.load(
        wanted, storage_reader=FileSystemReader(path), process_group=group, no_dist=world.size == 1
    )
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def dcp_savers(bench: Bench, world: World, state: State, sync: bool = True) -> list[Candidate]:
    """DCP's save at each of its thread counts."""
    name = "dcp" if sync else "dcp-nosync"
    return [
        Candidate(
            "DCP" if sync else "DCP, no fsync",
            partial(dcp_save, bench.path(name), world, state, threads, sync),
            f"thread_count={threads}",
            after=lambda: bench.remove(name),
            does=DCP_DOES if sync else "sync_files=False, no checksum",
        )
        for threads in DCP_THREADS
    ]


def our_savers(bench: Bench, world: World, state: State) -> list[Candidate]:
    """Our save, and (not in --quick) the same without fsync."""
    found = []
    for name, family, does in [
        ("ours", "ours", OURS_DOES),
        ("nosync", "ours, no fsync", "CRC32, nothing durable"),
    ]:
        if name == "ours" or not bench.settings.quick:
            library = Ours(bench, world, name, fsync=name == "ours")
            run, after = partial(library.save, state.model, state.optimizer), partial(bench.remove, name)
            kind = "ours" if name == "ours" else "peer"
            found.append(Candidate(family, run, after=after, kind=kind, does=does))
    return found + also_with_zlib(bench, found[0])


def also_with_zlib(bench: Bench, ours: Candidate) -> list[Candidate]:
    """The same with zlib's CRC32, where a faster package does it else and this is not --quick."""
    if ckpt_storage.CRC_PROVIDER == "zlib" or bench.settings.quick:
        return []

    def run() -> None:
        fast, ckpt_storage.crc32 = ckpt_storage.crc32, zlib.crc32
        try:
            ours.run()
        finally:
            ckpt_storage.crc32 = fast

    return [
        replace(
            ours, family="ours, zlib", run=run, kind="peer", does="the same, without the package for CRC32"
        )
    ]


def file_savers(bench: Bench, state: State) -> list[Candidate]:
    """The one-process libraries: torch.save, and safetensors where it is installed; both fsynced by us."""
    path = bench.path("file")

    def plain() -> None:
        with open(path, "wb") as file:
            torch.save({"model": state.model.state_dict(), "optim": state.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    def safe() -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.reshape(tensor.shape) for name, tensor in state.tensors().items()}, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def remove() -> None:
        path.unlink(missing_ok=True)

    candidates = [
        Candidate("torch.save + fsync", plain, after=remove, does="CRC32 in the zip, not checked on load")
    ]
    if importlib.util.find_spec("safetensors"):
        candidates.append(Candidate("safetensors + fsync", safe, after=remove, does="save_file, no checksum"))
    return candidates


# ---------------------------------------------------------------------------------------------- measuring


def measure(bench: Bench, world: World, row: Row, nbytes: int, candidates: Sequence[Candidate]) -> Row:
    """Run all candidates in turns and add the best setting of each family to `row` (GB/s).

    Kept on every rank.

    Called by all ranks; those outside `world` wait. A peer that fails in the warm-up round is left out with a
    note.
    """
    if world.member:
        row.nbytes = nbytes
        torch.set_num_threads(world.threads)
        timings = _warm_up(bench, world, row, candidates)
        for turn in range(bench.settings.rounds):
            alive = [candidate for candidate in candidates if _key(candidate) in timings]
            start = turn % max(1, len(alive))
            for candidate in alive[start:] + alive[:start]:
                bench.progress(f"{row.name}: round {turn + 1} of {bench.settings.rounds}", candidate.family)
                timings[_key(candidate)].append(_once(world, candidate))
        for candidate in candidates:
            samples = [nbytes / seconds / 1e9 for seconds in timings.get(_key(candidate), [])]
            line = Line(candidate.family, candidate.kind, "GB/s", samples, candidate.setting, candidate.does)
            known = row.line(candidate.family)
            if samples and known is None:
                row.lines.append(line)
            elif samples and known is not None and line.median > known.median:
                row.lines[row.lines.index(known)] = line
    dist.barrier()
    bench.rows.append(row)
    return row


def _warm_up(bench: Bench, world: World, row: Row, candidates: Sequence[Candidate]) -> dict[str, list[float]]:
    """Run everything once.

    Returns an empty list of timings for each of the KEEP best settings of each family.
    """
    seconds: dict[str, dict[str, float]] = {}
    for candidate in candidates:
        bench.progress(f"{row.name}: warm-up", f"{candidate.family} {candidate.setting}")
        try:
            once = _once(world, candidate)
        except Exception as error:
            if candidate.kind == "ours":
                raise
            row.notes.append(
                f"{candidate.family} {candidate.setting}: failed, {type(error).__name__}: {error}"[:200]
            )
            continue
        seconds.setdefault(candidate.family, {})[_key(candidate)] = once
    best = [sorted(family, key=lambda key: family[key])[:KEEP] for family in seconds.values()]
    return {key: [] for keys in best for key in keys}


def _once(world: World, candidate: Candidate) -> float:
    candidate.before()
    if world.rank == 0:
        os.sync()  # what was written or deleted before must not be paid for here
    try:
        return world.timed(candidate.run)
    finally:
        candidate.after()


def _key(candidate: Candidate) -> str:
    return f"{candidate.family}/{candidate.setting}"


# ---------------------------------------------------------------------------------------------- rows: save


def bench_save_one(bench: Bench) -> None:
    """save of one process, against DCP, torch.save and safetensors"""
    bench.release()
    world = bench.single
    state = bench.state(world, "plain") if world.member else None
    candidates: list[Candidate] = []
    if state is not None:
        candidates = raw_write(bench, world, state.nbytes()) + our_savers(bench, world, state)
        candidates += dcp_savers(bench, world, state) + dcp_savers(bench, world, state, sync=False)
        candidates += file_savers(bench, state)
    targets = (("ceiling", 0.9), ("DCP", 2.0), ("safetensors + fsync", 1.0))
    row = Row(
        "save, 1 process", "the disk's sequential writes, then one core's copy + CRC32", targets=targets
    )
    measure(bench, world, row, state.nbytes() if state else 0, candidates)


def bench_save_fsdp(bench: Bench) -> None:
    """save of an FSDP2 model from N ranks"""
    _save_from_all(bench, "fsdp", "FSDP2", (("ceiling", 0.9), ("DCP", 2.5)))


def bench_save_ddp(bench: Bench) -> None:
    """save of a DDP model from N ranks: replicas written once, and proved equal"""
    bench.release()
    _save_from_all(bench, "ddp", "DDP", (("ceiling", 0.8), ("DCP", 2.0)))
    bench.release()


def _save_from_all(bench: Bench, layout: str, title: str, targets: tuple[tuple[str, float], ...]) -> None:
    world = bench.main
    candidates: list[Candidate] = []
    nbytes = 0
    if world.member:
        state = bench.state(world, layout)
        nbytes = state.nbytes()
        candidates = raw_write(bench, world, nbytes) + our_savers(bench, world, state)
        candidates += dcp_savers(bench, world, state)
        if not bench.settings.quick:
            candidates += dcp_savers(bench, world, state, sync=False)
    limit = "the disk's sequential writes, shared by the ranks"
    if layout == "ddp":
        limit += "; on top each rank's CRC32 of its whole copy (the proof that replicas agree)"
    measure(bench, world, Row(f"save, {title} x{world.size}", limit, targets=targets), nbytes, candidates)


# ---------------------------------------------------------------------------------------------- rows: load


def bench_load_cold(bench: Bench) -> None:
    """load into the layout that was saved, files dropped from the page cache"""
    _load(bench, bench.main, "fsdp", bench.main, "fsdp", cold=True)


def bench_load_warm(bench: Bench) -> None:
    """load into the layout that was saved, files in the page cache"""
    _load(bench, bench.main, "fsdp", bench.main, "fsdp", cold=False)


def bench_load_one(bench: Bench) -> None:
    """load of one process, cold and warm"""
    bench.release()
    for cold in (True, False):
        _load(bench, bench.single, "plain", bench.single, "plain", cold)
    bench.release()


def bench_reshard_up(bench: Bench) -> None:
    """load on M ranks what N saved, cold and (not in --quick) warm"""
    for cold in (True,) if bench.settings.quick else (True, False):
        _load(bench, bench.main, "fsdp", bench.other, "fsdp", cold)


def bench_reshard_down(bench: Bench) -> None:
    """load on N ranks what M saved, cold and warm"""
    for cold in (True, False):
        _load(bench, bench.other, "fsdp", bench.main, "fsdp", cold)


def bench_reshard_columns(bench: Bench) -> None:
    """load sharded by columns what was saved sharded by rows, cold and warm"""
    for cold in (True, False):
        _load(bench, bench.main, "fsdp", bench.main, "fsdp-columns", cold)


def _load(bench: Bench, source: World, layout: str, target: World, wanted: str, cold: bool) -> None:
    """One load row.

    Save with ours and with DCP on `source`, load both in turns on `target`, compare the bits.
    """
    same = source is target and layout == wanted
    compare = not (same and bench.settings.quick)
    saved = bench.state(source, layout) if source.member else None
    loaded = bench.state(target, wanted, seed=2 if compare else 1) if target.member else None
    nbytes = agreed_bytes(saved)
    _store(bench, source, layout, saved)
    change = f"FSDP2 x{source.size}"
    if not same:
        change += f" -> x{target.size}" if wanted == layout else " rows -> columns"
    name = f"load {'cold' if cold else 'warm'}, {'1 process' if layout == 'plain' else change}"
    goals = (("DCP", 3.0 if cold else 2.5),)
    row = Row(name, _load_limit(cold, same), targets=(("ceiling", 0.9), *goals) if same else goals)
    candidates: list[Candidate] = []
    loaders: dict[str, Callable[[], object]] = {"ours": lambda: None, "DCP": lambda: None}
    if loaded is not None:
        library = Ours(bench, target, LOADED["ours"])
        loaders["ours"] = lambda: library.load(loaded.model, loaded.optimizer)
        loaders["DCP"] = lambda: dcp_load(bench.path(LOADED["DCP"]), target, loaded)
        candidates = raw_read(bench, target, cold)
    for family, load in loaders.items():
        if compare and (family == "ours" or not bench.settings.quick):
            exact = restores(bench, saved, source, loaded, target, load)
            row.notes.append(f"{family}: bit-exact: {'yes' if exact else 'NO'}")
            row.wrong = row.wrong or (family == "ours" and not exact)
        candidates.append(_loader(bench, family, load, cold))
    candidates += also_with_zlib(bench, next(c for c in candidates if c.kind == "ours"))
    measure(bench, target, row, nbytes, candidates)
    bench.path(f"raw-{bench.rank}").unlink(missing_ok=True)


def _store(bench: Bench, source: World, layout: str, saved: State | None) -> None:
    """Save with ours and with DCP what the load rows load, unless it is there already."""
    if bench.stored != f"{layout} x{source.size}":
        bench.stored = f"{layout} x{source.size}"
        bench.progress("writing the checkpoints to load")
        bench.remove(*LOADED.values())
        dist.barrier()
        if saved is not None:
            Ours(bench, source, LOADED["ours"]).save(saved.model, saved.optimizer)
            dcp_save(bench.path(LOADED["DCP"]), source, saved, 2)
    dist.barrier()


def _load_limit(cold: bool, same: bool) -> str:
    if cold:
        return "the disk's reads" + ("" if same else ", at the pieces that each rank needs")
    return "copy + CRC32 on all cores" + ("" if same else ", and rows that are cut into many short copies")


def _loader(bench: Bench, family: str, load: Callable[[], object], cold: bool) -> Candidate:
    """The candidate that loads with `load` from the directory of `family`, its files made cold or warm
    before.
    """
    files = [bench.path(LOADED[family])]
    return Candidate(
        family,
        load,
        before=(lambda: drop_cache(files)) if cold else (lambda: fill_cache(files)),
        kind="ours" if family == "ours" else "peer",
        does="CRC32 of every unit read" if family == "ours" else "no check of the bytes",
    )


def agreed_bytes(state: State | None) -> int:
    """The bytes of a state that rank 0 holds, on all ranks."""
    count = torch.tensor([state.nbytes() if state is not None else 0])
    dist.broadcast(count, 0)
    return int(count[0])


def restores(
    bench: Bench,
    saved: State | None,
    source: World,
    loaded: State | None,
    target: World,
    load: Callable[[], object],
) -> bool:
    """Overwrite the target, load, and compare it bit for bit with what was saved; called by all ranks."""
    bench.progress("comparing a first load bit for bit")
    if loaded is not None:
        loaded.wipe()
        load()
    dist.barrier()
    answer = torch.tensor([int(same_bits(saved, source, loaded, target))])
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer[0])


# ---------------------------------------------------------------------------------------------- rows: shapes


class Tensors(nn.Module):
    """`count` parameters of `numel` fp32 normal numbers each (cast to `dtype`)."""

    def __init__(self, count: int, numel: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for index in range(count):
            values = torch.randn(numel, generator=generator).mul_(0.02).to(dtype)
            self.register_parameter(f"layers_{index}_weight", nn.Parameter(values, requires_grad=False))


def bench_small(bench: Bench) -> None:
    """save and load of 20,000 tensors of 4 KiB"""
    bench.release()
    count, world = 20_000, bench.single
    for action in ("save", "load"):
        candidates: list[Candidate] = []
        if world.member:
            candidates = _small(bench, world, Tensors(count, KIB), action)
        row = Row(
            f"{action}{' warm' if action == 'load' else ''}, 20,000 tensors of 4 KiB",
            "Python: microseconds a tensor for the state dict, the plan and the JSON",
            targets=(("DCP", 15.0),),
        )
        measure(bench, world, row, count * 4 * KIB, candidates)
        ours = row.of_kind("ours")
        if ours is not None:
            row.notes.append(f"ours: {4 * KIB / ours.median / 1e3:.1f} us a tensor (target: at most 30)")
        bench.release()


def _small(bench: Bench, world: World, model: Tensors, action: str) -> list[Candidate]:
    """The candidates of the row of small tensors; for the load, the checkpoints are written here."""
    nbytes = sum(parameter.numel() * 4 for parameter in model.parameters())

    theirs = bench.path(LOADED["DCP"] if action == "load" else "dcp")

    def save(threads: int) -> None:
        writer = FileSystemWriter(theirs, thread_count=threads)
        state_dict_saver.save(dict(model.state_dict()), storage_writer=writer, no_dist=True)

    def load() -> None:
        state = dict(model.state_dict())
        state_dict_loader.load(state, storage_reader=FileSystemReader(theirs), no_dist=True)
        model.load_state_dict(state)

    if action == "load":
        library = Ours(bench, world, LOADED["ours"])
        library.save(model, None)
        save(1)
        loaders = {"ours": lambda: library.load(model, None), "DCP": load}
        found = [_loader(bench, family, run, cold=False) for family, run in loaders.items()]
        return raw_read(bench, world, cold=False) + found
    library = Ours(bench, world, "ours")
    ours = Candidate("ours", lambda: library.save(model, None), kind="ours", does=OURS_DOES)
    ours = replace(ours, after=lambda: bench.remove("ours"))
    return (
        raw_write(bench, world, nbytes)
        + [ours]
        + [
            Candidate(
                "DCP", partial(save, n), f"thread_count={n}", after=lambda: bench.remove("dcp"), does=DCP_DOES
            )
            for n in DCP_THREADS[: 1 if bench.settings.quick else 3]
        ]
    )


def bench_consolidated(bench: Bench) -> None:
    """consolidated save of an FSDP2 model (no optimizer), against DCP's HuggingFaceStorageWriter"""
    world = bench.main
    candidates: list[Candidate] = []
    nbytes = 0
    if world.member:
        model = bench.state(world, "fsdp").model
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        library = Ours(bench, world, "ours")
        candidates = raw_write(bench, world, nbytes)
        candidates += [
            Candidate("gloo exchange", lambda: _exchange(world, nbytes), kind="peer", does=EXCHANGE_DOES)
        ]
        run = partial(library.save, model, None, ckpt.CheckpointFormat.CONSOLIDATED)
        ours = Candidate("ours", run, after=lambda: bench.remove("ours"), kind="ours", does=OURS_DOES)
        candidates += [ours, *_hugging_face(bench, world, model)]
    limit = "the disk's writes, and the exchange of pieces between ranks over gloo"
    row = Row(
        f"consolidated save, FSDP2 x{world.size}, model only", limit, targets=(("DCP HuggingFace", 2.0),)
    )
    measure(bench, world, row, nbytes, candidates)
    share = 1 - 1 / world.size
    row.notes.append(
        f"exchanged: at most {share * nbytes / 1e6:.0f} MB, all that is not on its writer already"
    )


EXCHANGE_DOES = (
    "the exchange alone, at most: each rank sends all but 1/N of its share in 4 MiB blocks, nothing stored"
)


def _exchange(world: World, nbytes: int) -> None:
    """Send between neighbours what a consolidation has to move at most: the exchange's own limit."""
    block = torch.zeros(4 * MIB, dtype=torch.uint8)
    incoming = torch.zeros_like(block)
    share = nbytes // world.size * (world.size - 1) // world.size
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for _ in range(-(-share // block.numel()) if world.size > 1 else 0):
        sending = dist.isend(block, right, group=world.group)
        dist.recv(incoming, left, group=world.group)
        if sending is not None:
            sending.wait()


def _hugging_face(bench: Bench, world: World, model: nn.Module) -> list[Candidate]:
    """DCP's writer of consolidated safetensors at its settings; none where safetensors is not installed."""
    if not importlib.util.find_spec("safetensors"):
        return []

    def save(threads: int) -> None:
        writer = HuggingFaceStorageWriter(
            str(bench.path("dcp")),
            thread_count=threads,
            save_distributed=True,
            enable_consolidation=True,
            thread_count_consolidation=threads,
        )
        group = world.group if world.size > 1 else None
        state_dict_saver.save(
            get_model_state_dict(model), storage_writer=writer, process_group=group, no_dist=world.size == 1
        )

    return [
        Candidate(
            "DCP HuggingFace",
            partial(save, threads),
            f"thread_count={threads}",
            after=lambda: bench.remove("dcp"),
            does="shards fsynced, then rank 0 copies them into one file, not fsynced; no checksum",
        )
        for threads in DCP_THREADS
    ]


PLAN_TENSORS = 1000
PLAN_RANKS = (64, 512, 4096)


def _simulated(rank: int, ranks: int) -> ckpt.ShardData:
    """What one of many FSDP ranks holds.

    1,000 tensors cut along their first dimension, which does not always divide.
    """
    empty, tensors = torch.empty(0), []
    for index in range(PLAN_TENSORS):
        shape = (4096 + index % 7 * 13, 1024)
        chunk = -(-shape[0] // ranks)
        low = min(shape[0], chunk * rank)
        size = min(chunk, shape[0] - low)
        box = ckpt_storage.Box((low, 0), (size, 1024))
        pieces = [(box, empty)] if size else []
        name, mesh = f"model/layers.{index}.weight", tuple(range(ranks))
        tensors.append(ckpt_coord.LocalTensor(name, "BF16", shape, pieces, mesh, replicated=False))
    values = [("rng/state", b"%d" % rank, True), ("optimizer/state", b"{}", False)]
    return ckpt.ShardData(tensors + [ckpt_coord.local_value(*value) for value in values])


def _plan_ours(ranks: int) -> dict[str, float]:
    """Seconds and bytes of rank 0's plan, of the record, and of one rank's load plan at half the ranks."""
    described = (ckpt_coord.describe(_simulated(rank, ranks)) for rank in range(ranks))
    told = [
        ckpt_storage.dump_json(body | ({"tensors": None} if rank else {}))
        for rank, body in enumerate(described)
    ]
    tensors: tuple[ckpt.TensorMetadata, ...] = ()
    nothing = ckpt_coord.NO_PIECES
    ticket = ckpt.CheckpointMetadata(
        "x", "01234567", 1, ranks, "multi_shard", "none", torch.__version__, "2026-01-01T00:00:00+00:00", {}, (),
        tensors, nothing,
    )  # fmt: skip
    started = time.perf_counter()
    with ckpt_coord.no_garbage_collection():
        holdings = ckpt_coord.Holdings([ckpt_storage.Fields(json.loads(text)) for text in told])
        alone = time.perf_counter()
        plan, sources = ckpt_coord.lay_out(holdings, ticket, ckpt.CheckpointFormat.MULTI_SHARD)
        alone = time.perf_counter() - alone
        order = ckpt_storage.dump_json(ckpt_coord.pack_plan(plan, sources))
        shards = tuple(shard._replace(length=1 << 40, header_bytes=100_000_000) for shard in plan.shards)
        record = ckpt_storage.encode_record(replace(plan, shards=shards))
    saved = time.perf_counter() - started
    started = time.perf_counter()
    reader = ckpt.CheckpointReader(ckpt.LocalStorage(), ckpt_storage.decode_record(record, "x"))
    for index, tensor in enumerate(_simulated(1, ranks // 2).tensors):
        reader.plan([ckpt_coord.Target(index, box, view) for box, view in tensor.pieces])
    loaded = time.perf_counter() - started
    exchanged = sum(map(len, told)) + len(order) * ranks
    return {
        "save": saved,
        "alone": alone,
        "load": loaded,
        "record": len(record) / 1e6,
        "exchanged": exchanged / 1e6,
        "pieces": len(plan.pieces.begin),
    }


def _plan_dcp(ranks: int) -> float:
    """Seconds of DCP's global planner on the same pieces, without its deduplication of replicas.

    There are none.
    """
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    plans = []
    for rank in range(ranks):
        items = []
        for tensor in _simulated(rank, ranks).tensors:
            for box, _ in tensor.pieces:
                offset, size = torch.Size(box.offset), torch.Size(box.size)
                data = TensorWriteData(
                    ChunkStorageMetadata(offset, size),
                    TensorProperties(torch.bfloat16),
                    torch.Size(tensor.shape),
                )
                items.append(
                    WriteItem(MetadataIndex(tensor.name, offset), WriteItemType.SHARD, tensor_data=data)
                )
        plans.append(SavePlan(items))
    started = time.perf_counter()
    create_default_global_save_plan(plans)
    return time.perf_counter() - started


def bench_plan(bench: Bench) -> None:
    """plan + metadata at 64, 512 and 4,096 simulated ranks x 1,000 tensors"""
    bench.release()
    if not bench.single.member:
        return
    largest = 0.0
    for ranks in PLAN_RANKS:
        bench.progress(f"planning for {ranks} ranks")
        row = Row(
            f"plan for {ranks} ranks x {PLAN_TENSORS} tensors", "Python and numpy on rank 0; linear in pieces"
        )
        ours = _plan_ours(ranks)
        values = {
            "ours, save plan": [ours["save"]],
            "ours, of that the plan alone": [ours["alone"]],
            "ours, load plan of a rank": [ours["load"]],
        }
        if largest < 60.0 / 8:  # the next size is eight times this one: DCP gets a minute
            values["DCP, global planner"] = [largest := _plan_dcp(ranks)]
            row.notes.append(
                f"plan alone: {largest / ours['alone']:.1f}x DCP (target: at least 10 on its largest size), with descriptions, "
                f"orders and record {largest / ours['save']:.1f}x"
            )
        add_values(bench, row, "s", values, {"DCP, global planner": "no record, no exchange: the plan alone"})
        at_most(row, "ours, save plan", 20.0, "record and orders included")
        at_most(row, "ours, load plan of a rank", 5.0, "parsing included")
        row.notes.append(
            f"{ours['pieces']:,} pieces; record {ours['record']:.2f} MB; {ours['exchanged']:.1f} MB to and from rank 0 in all"
        )


# ---------------------------------------------------------------------------------------------- rows: own process


def add_values(
    bench: Bench, row: Row, unit: str, values: Mapping[str, list[float]], does: Mapping[str, str]
) -> None:
    """Lines of `unit` from {family: samples}; families named "ours" and "limit" are what they say."""
    for family, samples in values.items():
        kind = {"ours": "ours", "limit": "ceiling"}.get(family.split(",")[0].split(":")[0], "peer")
        row.lines.append(Line(family, kind, unit, samples, does=does.get(family, "")))
    bench.rows.append(row)


def at_most(row: Row, family: str, limit: float, why: str) -> None:
    """Note whether this line of the row stays below a limit in the row's unit."""
    line = row.line(family)
    if line is not None:
        verdict = "met" if line.median <= limit else "MISSED"
        row.notes.append(
            f"target {family} at most {limit:.4g} {line.unit} ({why}): {line.median:.4g}, {verdict}"
        )


def at_least(row: Row, family: str, limit: float, why: str) -> None:
    """Note whether this line of the row reaches a limit in the row's unit."""
    line = row.line(family)
    if line is not None:
        verdict = "met" if line.median >= limit else "MISSED"
        row.notes.append(
            f"target {family} at least {limit:.4g} {line.unit} ({why}): {line.median:.4g}, {verdict}"
        )


def bench_memory(bench: Bench) -> None:
    """peak extra memory of save and load, at two model sizes, each in fresh processes"""
    bench.release()
    ranks = min(bench.main.size, torch.cuda.device_count() or bench.main.size)
    jobs = [("save", "fsdp", ranks), ("load", "fsdp", ranks), ("consolidated save", "fsdp", ranks)]
    jobs += [("save", "plain", 1), ("load", "plain", 1)]
    for action, layout, size in [(*job[:2], bench.settings.size_bytes // n) for job in jobs for n in (4, 1)]:
        if bench.rank == 0:
            values: dict[str, list[float]] = {}
            title = f"peak extra memory, {action}, {layout} x{ranks if layout == 'fsdp' else 1}, {size / 1e9:.2g} GB"
            for who in ("ours", "DCP"):
                bench.progress(f"{title}, {who}")
                for step in ("save", "load") if action == "load" else (action,):  # one to load must be there
                    number = ranks if layout == "fsdp" else 1
                    answer = bench.child("memory", number, who=who, action=step, layout=layout, size=size)
                    values[who] = answer["MiB"]
                bench.remove("ours", "dcp")
            row = Row(title, "fixed buffers a rank, whatever the model's size")
            add_values(bench, row, "MiB", values, {})
            at_most(row, "ours", 256 if action.startswith("cons") else 128, "largest rank")
    dist.barrier()


def child_memory(bench: Bench, who: str, action: str, layout: str, size: int) -> dict[str, list[float]]:
    """Largest growth over all ranks of the resident set (VmHWM) while `who` performs `action` for the first
    time.
    """
    world = bench.main
    state = build_state(world, layout, 1, size)
    library = Ours(bench, world, "ours")
    runs: dict[tuple[str, str], Callable[[], object]] = {
        ("save", "ours"): lambda: library.save(state.model, state.optimizer),
        ("save", "DCP"): lambda: dcp_save(bench.path("dcp"), world, state, 2),
        ("load", "ours"): lambda: library.load(state.model, state.optimizer),
        ("load", "DCP"): lambda: dcp_load(bench.path("dcp"), world, state),
        ("consolidated save", "ours"): lambda: library.save(
            state.model, None, ckpt.CheckpointFormat.CONSOLIDATED
        ),
        ("consolidated save", "DCP"): lambda: [
            save.run() for save in _hugging_face(bench, world, state.model)[:1]
        ],
    }
    grown = torch.tensor([peak_growth(runs[action, who]) / MIB], dtype=torch.float64)
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    return {"MiB": [float(grown[0])]}


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process was larger at its peak during `run` than before it."""
    gc.collect()
    trim = getattr(
        ctypes.CDLL(None), "malloc_trim", None
    )  # glibc: give back what is free, or its reuse goes unseen
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = proc_bytes("/proc/self/status", "VmRSS")
    run()
    return proc_bytes("/proc/self/status", "VmHWM") - before


def proc_bytes(path: str, key: str) -> int:
    """The bytes behind `key:` in a file of /proc with lines like "VmRSS:  1024 kB"; 0 where it has none."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * KIB
    return 0


def bench_compression(bench: Bench) -> None:
    """compression of normal weights, bf16 and fp32, on one core, against zlib-9 without planes"""
    bench.release()
    if bench.rank == 0:
        for dtype in ("bfloat16", "float32"):
            bench.progress(f"compression of {dtype}")
            answer = bench.child("compression", 1, cpu=min(os.sched_getaffinity(0)), dtype=dtype)
            for unit in ("x", "MB/s"):
                values = {
                    key.split("|")[0]: found for key, found in answer.items() if key.endswith("|" + unit)
                }
                what = "ratio" if unit == "x" else "MB/s of input, whole save"
                row = Row(
                    f"compression, {dtype}, one core: {what}", "zlib on the planes that are compressible"
                )
                add_values(bench, row, unit, values, {"zlib-9": "zlib.compress(bytes, 9), nothing written"})
                if unit == "x":
                    at_least(row, "ours, MAXIMUM", values["zlib-9"][0], "zlib-9 without planes")
                if dtype == "bfloat16":
                    at_least(row, "ours, FAST", 1.35 if unit == "x" else 250, "bf16")
    dist.barrier()


def child_compression(bench: Bench, dtype: str) -> dict[str, list[float]]:
    """Ratio (x) and speed (MB/s) of each level, and of plain zlib-9.

    On the core that this process is pinned to.
    """
    count = (4 if bench.settings.quick else 16) * (2 if dtype == "bfloat16" else 1)
    model = Tensors(count, MIB, getattr(torch, dtype))
    raw = b"".join(parameter.detach().view(torch.uint8).numpy().tobytes() for parameter in model.parameters())
    library = Ours(bench, bench.single, "ours")
    found: dict[str, list[float]] = {}
    for level in ("FAST", "BALANCED", "MAXIMUM"):
        for _ in range(1 if level == "MAXIMUM" else min(3, bench.settings.rounds)):
            start = time.perf_counter()
            library.save(model, None, level=ckpt.CompressionLevel[level])
            found.setdefault(f"ours, {level}|MB/s", []).append(len(raw) / (time.perf_counter() - start) / 1e6)
        found[f"ours, {level}|x"] = [len(raw) / library.stored_bytes()]
    start = time.perf_counter()
    packed = sum(len(zlib.compress(raw[at : at + 4 * MIB], 9)) for at in range(0, len(raw), 4 * MIB))
    found["zlib-9|MB/s"] = [len(raw) / (time.perf_counter() - start) / 1e6]
    found["zlib-9|x"] = [len(raw) / packed]
    return found


# ---------------------------------------------------------------------------------------------- rows: async


class Pending(Protocol):
    """A save on its way, as the futures of all libraries are."""

    def done(self) -> bool: ...
    def result(self) -> object: ...


@dataclass
class AsyncSaver:
    """One way of saving behind training: `start` returns when training may go on; the Future when it is done."""

    family: str
    start: Callable[[], Pending]
    guard: Callable[[], AbstractContextManager[object]] = nullcontext  # held around optimizer.step()
    finish: Callable[[], object] = lambda: None  # what is still missing until the bytes are durable
    close: Callable[[], object] = lambda: None


def our_async(bench: Bench, state: State, staging: str) -> AsyncSaver:
    """save_async of ours with one of its stagings."""
    library = Ours(bench, bench.single, "ours").library
    options = save_options(staging=staging)
    return AsyncSaver(
        f"ours, {staging}",
        lambda: library.save_async(state.model, state.optimizer, options),
        close=library.close,
    )


def dcp_async(bench: Bench, state: State, where: str, pinned: bool) -> AsyncSaver:
    """DCP's async_save in a thread or a process, with staging buffers that it keeps."""
    asynchronous = pinned  # DCP stages in the background only with an accelerator
    share = where == "process"
    stager = DefaultStager(StagingOptions(pinned, share, asynchronous, asynchronous))

    def start() -> Pending:
        model, optimizer = get_state_dict(state.model, state.optimizer)
        answer = state_dict_saver.async_save(
            {"model": model, "optim": optimizer},
            storage_writer=FileSystemWriter(bench.path("dcp"), thread_count=2),
            process_group=bench.single.group,
            async_checkpointer_type=AsyncCheckpointerType[where.upper()],
            async_stager=stager,
        )
        if isinstance(answer, AsyncSaveResponse):
            answer.staging_completion.result()
            return answer.upload_completion
        return answer

    return AsyncSaver(f"DCP {where}{', pinned' if pinned else ''}", start, close=stager.close)


def torch_checkpointing_async(bench: Bench, state: State) -> AsyncSaver:
    """The torch_checkpointing package: staging in a thread, writing in a process; its lock guards the step."""
    package = importlib.import_module("torch_checkpointing")
    storage = importlib.import_module("torch_checkpointing.storage.filesystem")
    settings = importlib.import_module("torch_checkpointing.config")
    buffered = storage.LocalFileSystemStorageConfig(
        use_direct_io=False
    )  # its direct writes fail on ext4 (EINVAL)
    manager = package.CheckpointManager(
        package.CheckpointManager.Config(save=settings.AsyncCheckpointSaverConfig(), storage_config=buffered)
    )
    path = bench.path("tc")

    def start() -> Pending:
        shutil.rmtree(path, ignore_errors=True)
        payload = {"model": state.model.state_dict(), "optim": state.optimizer.state_dict()}
        pending: Pending = manager.save(str(path), payload)
        return pending

    def finish() -> None:
        for file in files_below([path]):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    return AsyncSaver("torch_checkpointing", start, manager.lock, finish, manager.close)


def async_savers(bench: Bench, state: State) -> Iterator[AsyncSaver]:
    """All async savers that can be had here, one after the other."""
    yield our_async(bench, state, "eager")
    yield our_async(bench, state, "overlapped")
    for pinned in (False, True) if torch.cuda.is_available() else (False,):
        for where in ("thread", "process"):
            yield dcp_async(bench, state, where, pinned)
    if importlib.util.find_spec("torch_checkpointing"):
        yield torch_checkpointing_async(bench, state)


ASYNC_DOES = {
    "ours, eager": "state copied into kept buffers before the call returns; fsync and CRC32 behind",
    "ours, overlapped": "copied while training goes on, the optimizer's step waits for it; fsync and CRC32 behind",
    "DCP thread": "copied into kept buffers, then saved in a thread; fsync, no checksum",
    "DCP process": "copied into shared memory, then saved in a process; fsync, no checksum",
    "torch_checkpointing": "copied in a thread, saved in a process; no fsync (durable: fsynced by us), no checksum",
    "limit: copy": "copy_ of the same bytes into warm buffers",
}


def bench_async(bench: Bench) -> None:
    """async save: time until the call returns, time until durable, training seconds lost on one core"""
    bench.release()
    if bench.rank == 0:
        bench.progress("async: time until return")
        answer = bench.child("async_return")
        for what, limit in (
            ("return", "one copy of the state in memory"),
            ("durable", "the copy, then the disk"),
        ):
            row = Row(f"async, call to {what}", limit)
            values = {key.split("|")[0]: found for key, found in answer.items() if key.endswith("|" + what)}
            add_values(bench, row, "ms", values, ASYNC_DOES)
            if what == "return":
                at_most(row, "ours, eager", 1.15 * statistics.median(values["limit: copy"]), "1.15 x a copy")
                collect = statistics.median(values["collecting the state dicts"])
                tensors = int(answer["tensors"][0])
                at_most(
                    row,
                    "ours, overlapped",
                    5 + 0.02 * tensors + collect,
                    f"5 ms + 20 us x {tensors} + collecting",
                )
        bench.progress("async: training seconds lost, one core")
        answer = bench.child("async_train", 1, cpu=min(os.sched_getaffinity(0)))
        limit = "the core's copy, CRC32 and write, which training has to give up"
        row = Row("async, training time lost per save, all on one core", limit)
        step = answer.pop("step")
        row.targets = tuple((family, 2.0) for family in answer if not family.startswith("ours"))
        row.notes.append(f"a training step without a save takes {statistics.median(step):.0f} ms")
        add_values(bench, row, "ms", answer, ASYNC_DOES)
    dist.barrier()


def child_async_return(bench: Bench) -> dict[str, list[float]]:
    """Milliseconds until each saver's call returns and until its bytes are durable; and of a plain copy."""
    state = build_state(bench.single, "plain", 1, bench.settings.size_bytes)
    found: dict[str, list[float]] = {"limit: copy|return": [], "collecting the state dicts|return": []}
    tensors = list(state.tensors().values())
    warm = [torch.zeros_like(tensor, device="cpu") for tensor in tensors]
    for _ in range(bench.settings.rounds):
        start = time.perf_counter()
        state.model.state_dict(), state.optimizer.state_dict()
        found["collecting the state dicts|return"].append((time.perf_counter() - start) * 1e3)
    found["tensors"] = [len(tensors)]
    for saver in async_savers(bench, state):
        for turn in range(bench.settings.rounds + 1):
            os.sync()
            start = time.perf_counter()
            done = saver.start()
            returned = time.perf_counter() - start
            done.result()
            saver.finish()
            if turn:  # the first one allocates
                found.setdefault(f"{saver.family}|return", []).append(returned * 1e3)
                found.setdefault(f"{saver.family}|durable", []).append((time.perf_counter() - start) * 1e3)
            os.sync()
            start = time.perf_counter()  # here, so that it finds the machine as the savers find it
            for target, source in zip(warm, tensors):
                target.copy_(source)
            found["limit: copy|return"] += [(time.perf_counter() - start) * 1e3] * (turn > 0)
        saver.close()
        bench.remove("ours", "dcp", "tc")
    return found


def child_async_train(bench: Bench) -> dict[str, list[float]]:
    """Milliseconds of training lost per save.

    A loop with a save in it, less its steps at their undisturbed pace.
    """
    torch.set_num_threads(1)
    state = build_state(bench.single, "plain", 1, bench.settings.size_bytes)
    tokens = torch.randint(50257, (1, 64), device=bench.device)
    found: dict[str, list[float]] = {"step": []}
    for saver in async_savers(bench, state):
        for turn in range(bench.settings.rounds + 1):
            os.sync()
            steps = []
            for _ in range(5):
                start = time.perf_counter()
                train_step(state, tokens, saver.guard())
                steps.append(time.perf_counter() - start)
            pace = statistics.median(steps)
            start = time.perf_counter()
            done = saver.start()
            count = 0
            while count < 5 or not done.done():
                train_step(state, tokens, saver.guard())
                count += 1
            lost = time.perf_counter() - start - count * pace
            done.result()
            if turn:
                found.setdefault(saver.family, []).append(lost * 1e3)
                found["step"].append(pace * 1e3)
        saver.close()
        bench.remove("ours", "dcp", "tc")
    return found


# ---------------------------------------------------------------------------------------------- the rows by name

ROWS: dict[str, Callable[[Bench], None]] = {
    "save-one": bench_save_one,
    "load-one": bench_load_one,
    "save-ddp": bench_save_ddp,
    "save-fsdp": bench_save_fsdp,
    "load-cold": bench_load_cold,
    "load-warm": bench_load_warm,
    "reshard-up": bench_reshard_up,
    "reshard-down": bench_reshard_down,
    "reshard-columns": bench_reshard_columns,
    "consolidated": bench_consolidated,
    "small": bench_small,
    "plan": bench_plan,
    "memory": bench_memory,
    "compression": bench_compression,
    "async": bench_async,
}
QUICK_ROWS = ("save-fsdp", "load-cold", "reshard-up")
CHILDREN: dict[str, Callable[..., dict[str, list[float]]]] = {
    "memory": child_memory,
    "compression": child_compression,
    "async_return": child_async_return,
    "async_train": child_async_train,
}


# ---------------------------------------------------------------------------------------------- the machine


def machine(directory: str) -> dict[str, str]:
    """What the figures depend on: hardware, file system, versions."""
    mount, kind, device = file_system(directory)
    gpus = torch.cuda.device_count()
    return {
        "cpu": f"{cpu_name()}, {cores()} cores"
        + (f"; {gpus} x {torch.cuda.get_device_name(0)}" if gpus else ""),
        "memory": f"{proc_bytes('/proc/meminfo', 'MemTotal') / GIB:.0f} GiB, "
        f"{proc_bytes('/proc/meminfo', 'MemAvailable') / GIB:.0f} GiB available",
        "file system": f"{kind} on {device} at {mount}, {shutil.disk_usage(directory).free / GIB:.0f} GiB free",
        "system": f"{platform.system()} {platform.release()}, load average {os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
        "CRC32": ckpt_storage.CRC_PROVIDER,
    }


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def file_system(directory: str) -> tuple[str, str, str]:
    """(mount point, type, device) of the file system that holds `directory`."""
    best = ("/", "unknown", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        mount, (kind, device) = left.split()[4], right.split()[:2]
        inside = Path(os.path.realpath(directory)).is_relative_to(mount)
        if inside and len(mount) >= len(best[0]):
            best = (mount, kind, device)
    return best


def doubts(settings: Settings) -> list[str]:
    """What makes the figures of this run not worth quoting."""
    found = []
    kind = file_system(settings.directory)[1]
    if kind in ("tmpfs", "ramfs", "overlay"):
        found.append(f"{settings.directory} is on {kind}: this is not a disk; choose another --dir")
    load = os.getloadavg()[0]
    if load > 0.5 * cores() + 0.5:
        found.append(f"load average {load:.1f} on {cores()} cores: somebody else is working here")
    if hasattr(sys, "gettotalrefcount") or sys.flags.dev_mode or torch.version.debug:
        found.append("a debug build of Python or torch, or -X dev")
    needed = 4 * settings.size_bytes
    if proc_bytes("/proc/meminfo", "MemAvailable") < needed:
        found.append(f"less than {needed / GIB:.0f} GiB of memory available: warm rows are not warm")
    if settings.rounds < 5:
        found.append(f"only {settings.rounds} rounds: good for a look, not for quoting")
    return found


def disk_needed(settings: Settings) -> int:
    """Most bytes on disk at any time: a checkpoint of ours, one of a peer and the raw file, and some room."""
    return int(3.1 * settings.size_bytes) + 512 * MIB


# ---------------------------------------------------------------------------------------------- the report


def show_header(bench: Bench) -> None:
    """Print the machine, the sizes and the doubts."""
    settings = bench.settings
    width, layers = gpt2_shape(settings.size_bytes)
    print(
        f"bench_ckpt: {settings.size_bytes / 1e9:.2f} GB, {settings.size_bytes / 12e6:.0f} M parameters with AdamW, "
        f"GPT-2 of width {width} with {layers} blocks, fp32"
    )
    for key, value in bench.machine.items():
        print(f"  {key:12} {value}")
    print(
        f"  {'ranks':12} {bench.main.size}, resharded to and from {bench.other.size}; {settings.rounds} rounds"
    )
    print(f"  {'cold':12} fsync, then posix_fadvise(DONTNEED); caches below the operating system stay")
    for doubt in bench.doubts:
        print(f"  WARNING      {doubt}")
    print(flush=True)


def show_row(row: Row) -> None:
    """Print one row: the ceiling, ours, the peers, and how ours does against the targets."""
    ours, ceiling = row.of_kind("ours"), row.of_kind("ceiling")
    size = f" · {row.nbytes / 1e9:.2f} GB" if row.nbytes else ""
    print(f"{row.name}{size} · limit: {row.limit}")
    unit = row.lines[0].unit if row.lines else ""
    print(f"  {'':26} {'best setting':26} {unit:>9} {'min':>9} {'max':>9} {'of ceiling':>11} {'ours is':>8}")
    order = {"ceiling": 0, "ours": 1, "peer": 2}
    for line in sorted(row.lines, key=lambda line: order[line.kind]):
        against = f"{line.ratio(ceiling):.2f}" if ceiling and line is not ceiling else ""
        better = f"{ours.ratio(line):.2f}x" if ours and line.kind == "peer" else ""
        figures = " ".join(f"{value:9.{_digits(value)}f}" for value in _spread(line))
        print(f"  {line.family:26} {line.setting:26} {figures} {against:>11} {better:>8}")
    for note in [*verdicts(row), *row.notes]:
        print(f"  {note}")
    print(flush=True)


def _spread(line: Line) -> tuple[float, float, float]:
    return line.median, min(line.samples), max(line.samples)


def _digits(value: float) -> int:
    return 2 if abs(value) < 100 else 0


def verdicts(row: Row) -> list[str]:
    """The targets of a row, each with what was reached. k x a peer also counts as met at 0.9 of the ceiling."""
    ours, ceiling = row.of_kind("ours"), row.of_kind("ceiling")
    found = []
    for family, factor in row.targets:
        line = ceiling if family == "ceiling" else row.line(family)
        if ours is None or line is None:
            continue
        reached = ours.ratio(line)
        at_ceiling = family != "ceiling" and ceiling is not None and ours.ratio(ceiling) >= 0.9
        verdict = "met" if reached >= factor else "met: at the ceiling" if at_ceiling else "MISSED"
        found.append(f"target {factor:g} x {family}: {reached:.2f}, {verdict}")
    return found


def show_legend(rows: Sequence[Row]) -> None:
    """Print once for each line what it does and does not do."""
    print("What each does and does not do")
    told = {(line.family, line.does): None for row in rows for line in row.lines if line.does}
    for family, does in told:
        print(f"  {family:26} {does}")
    print(flush=True)


def as_json(bench: Bench) -> dict[str, object]:
    """Everything measured, for machines."""
    table = [
        {
            **asdict(row),
            "lines": [{**asdict(line), "median": line.median} for line in row.lines],
            "verdicts": verdicts(row),
        }
        for row in bench.rows
    ]
    where = {"machine": bench.machine, "warnings": bench.doubts}
    return {"benchmark": "ckpt", "settings": asdict(bench.settings), **where, "rows": table}


def plot(path: str, rows: Sequence[Row]) -> None:
    """Draw the rows in GB/s as bars, ours and the best peer, with the ceiling as a line across each pair."""
    importlib.import_module("matplotlib").use("Agg")  # no display needed
    pyplot = importlib.import_module("matplotlib.pyplot")
    shown = [row for row in rows if row.of_kind("ours") and row.lines[0].unit == "GB/s"]
    figure, axes = pyplot.subplots(figsize=(2.0 + 1.3 * len(shown), 5.0))
    for place, row in enumerate(shown):
        peers = [
            line.median for line in row.lines if line.kind == "peer" and not line.family.startswith("ours")
        ]
        bars = [line.median for line in [row.of_kind("ours")] if line] + [max(peers, default=0.0)]
        axes.bar([place - 0.2, place + 0.2], bars, 0.38, color=["tab:blue", "tab:gray"])
        ceiling = row.of_kind("ceiling")
        if ceiling:
            axes.hlines(ceiling.median, place - 0.45, place + 0.45, color="tab:red")
    axes.set_xticks(
        range(len(shown)), [row.name.replace(", ", "\n") for row in shown], rotation=30, ha="right"
    )
    axes.set_ylabel("GB/s")
    axes.set_title("ours (blue), best peer (gray), ceiling (red line)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------- running


def run_rows(bench: Bench) -> bool:
    """Measure the rows that were asked for, each shown as soon as it is there; called by all ranks.

    False where a checkpoint of ours did not come back bit for bit."""
    settings = bench.settings
    if bench.rank == 0:
        show_header(bench)
    shown = 0
    for name in settings.rows:
        ROWS[name](bench)
        if bench.rank == 0:
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            for row in bench.rows[shown:]:
                show_row(row)
        shown = len(bench.rows)
    if bench.rank == 0:
        finish_report(bench)
    return not any(row.wrong for row in bench.rows)


def finish_report(bench: Bench) -> None:
    """The legend, the files that were asked for, and last the one line of JSON."""
    settings, rows = bench.settings, bench.rows
    show_legend(rows)
    result = json.dumps(as_json(bench))
    if settings.json_path:
        Path(settings.json_path).write_text(result + "\n")
    if settings.plot_path:
        if importlib.util.find_spec("matplotlib"):
            plot(settings.plot_path, rows)
        else:
            print(f"no {settings.plot_path}: --plot needs matplotlib (pip install matplotlib)")
    print(result, flush=True)


def work(settings: Settings) -> int:
    """One rank of the benchmark, or of a job in processes of its own; its exit code."""
    warnings.simplefilter("ignore")  # the peers' deprecation notes would drown the table
    logging.getLogger("torch").setLevel(logging.ERROR)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
    rank, scratch = dist.get_rank(), [os.environ.get("CKPT_BENCH_DIR", "")]
    mine = not scratch[0]
    if mine and rank == 0:
        scratch = [tempfile.mkdtemp(prefix="ckpt-bench-", dir=settings.directory)]
    dist.broadcast_object_list(scratch, 0)
    good = True
    try:
        request = json.loads(os.environ.get("CKPT_BENCH_CHILD", "null"))
        if request is None:
            good = run_rows(Bench(settings, Path(scratch[0])))
        else:
            bench = Bench(replace(settings, size_bytes=request["size"]), Path(scratch[0]))
            answer = CHILDREN[request["job"]](bench, **request["parameters"])
            if rank == 0:
                Path(request["answer"]).write_text(json.dumps(answer))
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):  # another rank failed, and tells why itself
            raise SystemExit(1) from None
        raise
    finally:
        if mine and rank == 0:
            shutil.rmtree(scratch[0], ignore_errors=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if good else 1


def launch(
    ranks: int,
    argv: Sequence[str],
    extra: Mapping[str, str],
    cpu: int = -1,
    own_session: bool = True,
    errors: int | None = None,
) -> int:
    """Start this file once a rank, wait for all, and return the first exit code that is not 0 (then all are
    ended).

    The ranks meet at a store that this process hosts, as under torchrun. With `cpu`, all of them run on that
    core; with `errors`, what they write to standard error goes to that file descriptor.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        **extra,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }

    processes: list[subprocess.Popen[bytes]] = []
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(
            0, {cpu} if cpu >= 0 else allowed
        )  # a process inherits it from the thread that forks
        for rank in range(ranks):
            command = [sys.executable, os.path.abspath(__file__), *argv]
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=environment, stderr=errors, start_new_session=own_session)
            )
        os.sched_setaffinity(0, allowed)
        while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
            time.sleep(0.02)
        return next((process.returncode for process in processes if process.poll()), 0)
    finally:
        os.sched_setaffinity(0, allowed)
        for process in processes:
            if process.poll() is None:
                process.kill()  # its files are in the scratch directory, which goes as a whole
        for process in processes:
            process.wait()


def read_size(text: str) -> int:
    """'3.6G' -> 3,600,000,000; K, M, G and T are powers of 1000."""
    scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        size = int(float(text[:-1] if scale else text) * (scale or 1))
    except ValueError:
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 500M or 3.6G")
    return size


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line; exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(description="Measure ckpt against the machine's limits and its peers.")
    parser.add_argument("--quick", action="store_true", help="three rows, three rounds, a minute or two")
    parser.add_argument(
        "--size", type=read_size, help="bytes of model and AdamW state (default: 3.6G, quick 1.49G)"
    )
    parser.add_argument("--dir", default=".", help="directory on the disk to measure (default: here)")
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up (default: 5, quick 3)")
    parser.add_argument("--rows", help="names, comma separated; 'list' shows them")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the final JSON line here")
    parser.add_argument("--plot", default="", metavar="FILE.png", help="draw the rows (needs matplotlib)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks on a machine without GPUs (default: 2)")
    given = parser.parse_args(argv)
    if given.rows == "list":
        for name, function in ROWS.items():
            print(f"{name:16} {function.__doc__}{' (quick)' if name in QUICK_ROWS else ''}")
        raise SystemExit(0)
    rows = given.rows.split(",") if given.rows else list(QUICK_ROWS if given.quick else ROWS)
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        parser.error(f"no rows {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    if not os.path.isdir(given.dir):
        parser.error(f"--dir {given.dir}: no such directory")
    if given.nproc < 1 or (given.rounds is not None and given.rounds < 1):
        parser.error("--nproc and --rounds must be at least 1")
    size = gpt2_bytes(768, 12) if given.quick and not given.size else given.size or 3_600_000_000
    size = gpt2_bytes(*gpt2_shape(size))  # of a model that there is
    rounds = given.rounds or (3 if given.quick else 5)
    return Settings(
        given.quick,
        size,
        os.path.abspath(given.dir),
        rounds,
        tuple(rows),
        given.json,
        given.plot,
        given.nproc,
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; the exit code."""
    settings = parse(argv)
    if "RANK" in os.environ:  # a rank, started by launch() or by torchrun
        launched = "CKPT_BENCH_DIR" in os.environ
        if launched:
            ctypes.CDLL(None).prctl(
                1, signal.SIGKILL
            )  # PR_SET_PDEATHSIG: no rank outlives the one that started it
        by_nproc = launched and "CKPT_BENCH_CHILD" not in os.environ and not torch.cuda.is_available()
        return work(settings if by_nproc else replace(settings, nproc=0))
    free, needed = shutil.disk_usage(settings.directory).free, disk_needed(settings)
    if free < needed + GIB:
        print(
            f"{settings.directory} has {free / GIB:.1f} GiB free; this needs {needed / GIB:.1f} GiB and leaves one."
        )
        print("Choose a smaller --size or another --dir.")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = tempfile.mkdtemp(prefix="ckpt-bench-", dir=settings.directory)
    gpus = torch.cuda.device_count()
    try:
        return launch(gpus or 2 * settings.nproc, argv, {"CKPT_BENCH_DIR": scratch})
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
