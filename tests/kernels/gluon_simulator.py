"""Runs the source of a warp-specialised Gluon kernel on CPU tensors; Triton's interpreter knows no Gluon.

What is modelled is what can go wrong between warps. Each partition is a thread of which one runs at a time; copies and
products are operations of their own that happen at any time until somebody has waited for them. Who goes next is drawn,
with odds that are drawn too, so that over the seeds each party is at times the slow one. mbarriers count phases, and a
wait sees only the phase's parity, as in hardware. Nobody able to go on is a `Deadlock`.

Not modelled: layouts, registers, the order of memory operations within a partition.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction


class Deadlock(Exception):
    """No partition can go on and no operation is under way."""


class _Killed(BaseException):
    """Ends the threads of a simulation that has failed."""


class _Partition:
    """One thread, what it waits for, and its products and stores under way."""

    def __init__(self, simulation: _Simulation, index: int, body: Callable[[], None]) -> None:
        self.ready: Callable[[], bool] = lambda: True
        self.done = self.killed = False
        self.error: BaseException | None = None
        self.products: list[Callable[[], None]] = []
        self.stores = 0
        self.speed = simulation.speed()
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            self._go.acquire()
            simulation.local.partition = self
            try:
                if not self.killed:
                    body()
            except _Killed:
                pass
            except BaseException as error:
                self.error = error
            self.done = True
            self._back.release()

        self.thread = threading.Thread(target=run, daemon=True, name=f"partition {index}")
        self.thread.start()

    def resume(self) -> None:
        self._go.release()
        self._back.acquire()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.ready = ready
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise _Killed


class _Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        assert self.pending >= count, "more arrivals than the barrier counts"
        self.pending -= count
        self._turn()

    def complete(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passes(self, parity: int) -> bool:
        assert self.count, "the barrier has not been initialised"
        return self.phase % 2 != parity


class _Shared:
    """A shared-memory allocation or a view of it."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.stores = 0

    def index(self, i: int) -> Any:
        return self.data[i]

    def permute(self, order: tuple[int, ...]) -> _Shared:
        return _Shared(self.data.permute(order))

    def store(self, value: torch.Tensor) -> None:
        assert not self.stores, "a store still reads this buffer"
        assert value.dtype == self.data.dtype
        self.data.copy_(value)


class _Pointer:
    def __init__(self, data: torch.Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.data, self.offset + offset)


class _Descriptor:
    """A tensor-memory descriptor: zeros outside on reads, clipped on writes."""

    def __init__(self, host: Any) -> None:
        self.data, self.block, self.dtype, self.layout = host.base, host.block_shape, host.base.dtype, host.layout

    def _cut(self, coord: list[int]) -> tuple[slice, ...]:
        return tuple(slice(c, min(c + b, s)) for c, b, s in zip(coord, self.block, self.data.shape))

    def read(self, coord: list[int]) -> torch.Tensor:
        inside = self.data[self._cut(coord)]
        out = self.data.new_zeros(self.block)
        out[tuple(slice(0, n) for n in inside.shape)] = inside
        return out

    def write(self, coord: list[int], value: torch.Tensor) -> None:
        inside = self.data[self._cut(coord)]
        inside.copy_(value[tuple(slice(0, n) for n in inside.shape)])


class _Accumulator:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class _Simulation:
    """One program of the grid."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.random = random.Random(f"{seed} {program}")
        self.program, self.programs = program, programs
        self.local = threading.local()
        self.partitions: list[_Partition] = []
        self.copies: list[tuple[float, Callable[[], None]]] = []
        self.load_speed, self.store_speed = self.speed(), self.speed()

    def speed(self) -> float:
        return 10.0 ** self.random.uniform(-3, 0)

    @property
    def me(self) -> _Partition:
        return self.local.partition

    def specialize(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        self.partitions = [
            _Partition(self, i, lambda f=f, args=args: f(*args)) for i, (f, args) in enumerate(functions)
        ]
        try:
            while not all(partition.done for partition in self.partitions):
                self._step()
            assert not self.copies, "a copy outlives the program"
        finally:
            for partition in self.partitions:
                if not partition.done:
                    partition.killed = True
                    partition.resume()
                partition.thread.join()

    def _step(self) -> None:
        able = [p for p in self.partitions if not p.done and p.ready()]
        busy = [p for p in self.partitions if p.products]
        if not (able or busy or self.copies):
            raise Deadlock([p.thread.name for p in self.partitions if not p.done])
        odds = [p.speed for p in able] + [p.speed for p in busy] + [speed for speed, _ in self.copies]
        chosen = self.random.choices(range(len(odds)), odds)[0]
        if chosen < len(able):
            able[chosen].resume()
            if able[chosen].error is not None:
                raise able[chosen].error
        elif chosen < len(able) + len(busy):
            busy[chosen - len(able)].products.pop(0)()
        else:
            self.copies.pop(chosen - len(able) - len(busy))[1]()

    # mbarrier

    def wait(self, barrier: _Barrier, parity: int) -> None:
        self.me.pause(lambda: barrier.passes(parity))

    def arrive(self, barrier: _Barrier, *, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.arrive(count)
        self.me.pause()

    def expect(self, barrier: _Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive()
        self.me.pause()

    # copies

    def load_block(self, descriptor: _Descriptor, coord: list[int], barrier: _Barrier, out: _Shared) -> None:
        def copy() -> None:
            out.data.copy_(descriptor.read(coord))
            barrier.complete(out.data.numel() * out.data.itemsize)

        self.copies.append((self.load_speed, copy))
        self.me.pause()

    def store_block(self, descriptor: _Descriptor, coord: list[int], source: _Shared) -> None:
        partition = self.me
        partition.stores += 1
        source.stores += 1

        def copy() -> None:
            descriptor.write(coord, source.data)
            partition.stores -= 1
            source.stores -= 1

        self.copies.append((self.store_speed, copy))
        partition.pause()

    def store_wait(self, pendings: int) -> None:
        partition = self.me
        partition.pause(lambda: partition.stores <= pendings)

    # products

    def mma(self, a: _Shared, b: _Shared, acc: Any, *, is_async: bool) -> _Accumulator:
        assert is_async
        acc = acc if isinstance(acc, _Accumulator) else _Accumulator(acc)

        def multiply() -> None:
            acc.value = acc.value + a.data.float() @ b.data.float()

        self.me.products.append(multiply)
        self.me.pause()
        return acc

    def mma_wait(self, num_outstanding: int, deps: tuple[_Accumulator]) -> Any:
        partition = self.me
        partition.pause(lambda: len(partition.products) <= num_outstanding)
        return deps[0] if num_outstanding else deps[0].value

    # gl

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> _Shared:
        if dtype is tl.int64:
            return _Shared([_Barrier() for _ in range(shape[0])])
        return _Shared([_Shared(torch.full(shape[1:], float("nan"), dtype=dtype)) for _ in range(shape[0])])

    def globals(self) -> dict[str, Any]:
        def load(pointer: _Pointer, mask: torch.Tensor | None = None, other: float = 0.0) -> Any:
            flat = pointer.data.reshape(-1)
            if mask is None:
                return flat[pointer.offset].item()
            value = flat.new_full(mask.shape, other)
            value[mask] = flat[pointer.offset[mask]]
            return value

        def store(pointer: _Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
            pointer.data.view(-1)[pointer.offset[mask]] = value[mask].to(pointer.data.dtype)

        def nothing(*args: Any, **keys: Any) -> None:
            pass

        gl = SimpleNamespace(
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            constexpr=lambda value: value,
            float32=torch.float32,
            int64=tl.int64,
            load=load,
            store=store,
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            minimum=min,
            maximum=max,
            max=lambda x, axis: x.amax(axis),
            min=lambda x, axis: x.amin(axis),
            sum=lambda x, axis: x.sum(axis),
            where=torch.where,
            exp2=torch.exp2,
            fma=lambda x, y, z: (x.double() * y + z).float(),
            static_range=range,
            SliceLayout=nothing,
            NVMMADistributedLayout=nothing,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
        )
        return {
            "gl": gl,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=nothing,
                init=lambda barrier, count: barrier.init(count),
                wait=self.wait,
                arrive=self.arrive,
                expect=self.expect,
            ),
            "tma": SimpleNamespace(store_wait=self.store_wait),
            "tma_load": self.load_block,
            "tma_store": self.store_block,
            "warpgroup_mma": self.mma,
            "warpgroup_mma_wait": self.mma_wait,
            "fence_async_shared": nothing,
        }


def _rebuilt(function: GluonJITFunction, edit: tuple[str, str] | None, replaced: dict[str, Any]) -> Callable[..., None]:
    """The function's source, edited, with other globals; its callees likewise."""
    scope: dict[str, Any] = {}
    for name, value in function.fn.__globals__.items():
        if isinstance(value, GluonJITFunction) and value.fn.__module__ == function.fn.__module__:
            scope[name] = value
        elif isinstance(value, tl.constexpr):
            scope[name] = value.value
    scope |= replaced
    for name, value in list(scope.items()):
        if isinstance(value, GluonJITFunction):
            scope[name] = _compiled(value, edit, scope)
    return _compiled(function, edit, scope)


def _compiled(function: GluonJITFunction, edit: tuple[str, str] | None, scope: dict[str, Any]) -> Callable[..., None]:
    source = inspect.getsource(function.fn)
    source = source[source.index("def ") :]
    if edit is not None:
        source = source.replace(*edit)
    code = compile("from __future__ import annotations\n" + source, inspect.getfile(function.fn), "exec")
    exec(code, scope)
    return scope[function.fn.__name__]


class SimulatedKernel:
    """Stands in for a Gluon kernel: ``kernel[grid](*args, **constants)`` runs its programs one after the other.

    Args:
        kernel: what to run.
        seed: of the order of events.
        edit: text of the source of the kernel and its functions to replace, as proof that a fault would be seen.
    """

    def __init__(self, kernel: GluonJITFunction, seed: int = 0, edit: tuple[str, str] | None = None) -> None:
        self.kernel, self.seed, self.edit = kernel, seed, edit
        if edit is not None:
            assert edit[0] in inspect.getsource(inspect.getmodule(kernel.fn)), "the text to replace is gone"

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            for program in range(grid[0]):
                simulation = _Simulation(program, grid[0], self.seed)
                body = _rebuilt(self.kernel, self.edit, simulation.globals())
                body(*_device_arguments(args), **constants)

        return launch


def _device_arguments(args: tuple[Any, ...]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield _Pointer(arg)
        else:
            yield _Descriptor(arg) if hasattr(arg, "block_shape") else arg
