"""Training steps of the real model on a fake accelerator, as one rank of many; prints JSON lines.

`python step_on_fake_gpu.py SOURCES {"world": N, "configs": [CONFIG …]}`, run with the rewritten
sources on the path, in a process of its own: it replaces parts of torch. Tensors have shapes,
dtypes and devices and no values (FakeTensorMode), and process groups answer at once (torch's `fake`
backend). What would go wrong on a GPU and not on a CPU shows: a tensor on the wrong device, an
operator that has no meaning there, a read that holds the host, a copy from unpinned memory, an
asynchronous collective that nobody waits for, a group of one rank.
"""

import collections
import contextlib
import importlib
import json
import sys
import traceback
import types
from datetime import datetime
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

SOURCE = sys.argv[1].rstrip("/") + "/"
ASKED: dict[str, Any] = json.loads(sys.argv[2])
GPU = "gpu"  # the name of torch's extension backend here; sources say it instead of "cuda"

reads: list[str] = []
copies: list[str] = []
collectives: list[str] = []
groups: list[int] = []
attended: list[str] = []
in_flight: list["Work"] = []
MODE = FakeTensorMode(allow_non_fake_inputs=True)


def where() -> str:
    """Returns the innermost line of the sources on the stack."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(SOURCE)]
    if not frames:
        return "torch"
    return f"{frames[-1].filename.removeprefix(SOURCE)}:{frames[-1].name}"


class Event:
    """An event that is over."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> "Event":
        """Does nothing."""
        return self

    def wait(self, *_: Any) -> None:
        """Does nothing."""

    def query(self) -> bool:
        """Returns True."""
        return True


class Stream:
    """A stream that is idle."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device_index, self.stream_id = 0, id(self)

    @property
    def device(self) -> torch.device:
        """The accelerator."""
        return torch.device(GPU, 0)

    def wait_stream(self, _: Any) -> None:
        """Does nothing."""

    def wait_event(self, _: Any) -> None:
        """Does nothing."""

    def record_event(self, *_: Any) -> Event:
        """Returns an event."""
        return Event()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Work:
    """A collective in flight."""

    def __init__(self, what: str) -> None:
        self.what, self.waited = what, False

    def wait(self, *_: Any) -> bool:
        """Remembers that somebody waited."""
        self.waited = True
        return True


def fake_device() -> None:
    """Registers the accelerator with torch."""
    idle = Stream()
    module = types.ModuleType("torch.gpu")
    vars(module).update(
        Stream=Stream,
        Event=Event,
        current_stream=lambda *_: idle,
        stream=lambda _: contextlib.nullcontext(),
        current_device=lambda: 0,
        set_device=lambda _: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        synchronize=lambda *_: reads.append(f"synchronize {where()}"),
        manual_seed_all=lambda _: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_device_capability=lambda *_: (9, 0),
        get_device_name=lambda *_: "fake",
        get_rng_state=lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=lambda *_, **__: None,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
    )
    backend_registration._setup_privateuseone_for_python_backend(GPU, backend_module=module)

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        grouped = "grouped" if options["enable_gqa"] else f"{k.shape[1]} of {q.shape[1]}"
        attended.append(f"{q.dtype} {grouped}")
        return q * 1.0 + (k.sum() + v.sum())  # CPU builds have no kernel to ask for a shape

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]  # a part of torch's


def on_gpu(x: Any) -> bool:
    """Returns whether it is a tensor of the accelerator."""
    return isinstance(x, FakeTensor) and x.device.type == GPU


def count_reads() -> None:
    """Makes reads of values answer with ones, and be counted where they would hold the host."""

    def ones(shape: tuple[int, ...]) -> Any:
        return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1

    real_item, real_list = Tensor.item, Tensor.tolist

    def item(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return real_item(self)
        if on_gpu(self):
            reads.append(f"item {where()}")
        return 1.0 if self.dtype.is_floating_point else 1

    def as_list(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return real_list(self)
        if on_gpu(self):
            reads.append(f"tolist {where()}")
        return ones(tuple(self.shape))

    def cpu(self: Tensor) -> Tensor:
        if on_gpu(self):
            reads.append(f"cpu {where()}")
            with unset_fake_temporarily():
                return torch.ones(self.shape, dtype=self.dtype)
        return self

    Tensor.item, Tensor.tolist, Tensor.cpu = item, as_list, cpu  # type: ignore[assignment]  # a part of torch's
    pinned: set[int] = set()

    def pin_memory(self: Tensor) -> Tensor:
        pinned.add(id(self))
        kept.append(self)
        return self

    kept: list[Tensor] = []
    real_to = Tensor.to

    def to(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        target = next((a for a in arguments if isinstance(a, torch.device)), None)
        if target is not None and target.type == GPU and not on_gpu(self):
            held = id(self) not in pinned or not named.get("non_blocking")
            copies.append(f"{'holds the host' if held else 'pinned'} {where()}")
            with MODE:
                return torch.empty(self.shape, dtype=self.dtype, device=target)
        return real_to(self, *arguments, **named)

    Tensor.pin_memory, Tensor.to = pin_memory, to  # type: ignore[assignment]  # a part of torch's
    real_tensor = torch.tensor

    def tensor(data: Any, *, device: Any = None, **named: Any) -> Tensor:
        if device is not None and torch.device(device).type == GPU:
            copies.append(f"holds the host {where()}")
            with unset_fake_temporarily():
                shape = real_tensor(data, **named)
            return torch.zeros(shape.shape, dtype=shape.dtype, device=device)
        return real_tensor(data, device=device, **named)

    torch.tensor = tensor  # type: ignore[assignment]  # a part of torch's


def count_collectives(world: int) -> None:
    """Joins a world of fake ranks, and counts groups and collectives."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    real_group = dist.new_group

    def new_group(*arguments: Any, **named: Any) -> Any:
        groups.append(len(named.get("ranks") or (arguments[0] if arguments else range(world))))
        named["backend"] = None  # gloo would look for its peers
        return real_group(*arguments, **named)

    dist.new_group = new_group

    def counted(name: str) -> Any:
        def call(*_: Any, group: Any = None, async_op: bool = False, **__: Any) -> Work | None:
            collectives.append(f"{name} over {dist.get_world_size(group)} {where()}")
            if not async_op:
                return None
            in_flight.append(Work(f"{name} {where()}"))
            return in_flight[-1]

        return call

    for name in (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_to_all_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    ):
        setattr(dist, name, counted(name))


class Operators(TorchDispatchMode):
    """Notes operators that need values on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten.nonzero", "aten._local_scalar_dense", "aten.masked_select")) and (
            any(on_gpu(a) for a in args)
        ):
            reads.append(f"{name} {where()}")
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Takes a step of each configuration, and prints what it saw."""
    fake_device()
    count_reads()
    count_collectives(ASKED["world"])
    import numpy as np
    from torch.distributed.device_mesh import DeviceMesh

    import moetrain.parallel.all_to_all_exchange as exchange
    from moetrain.config import resolve
    from moetrain.kernels import HostCounts
    from moetrain.parallel import begin_micro_batch
    from moetrain.settings import Config
    from moetrain.train.step import train_step

    building: Any = importlib.import_module("moetrain.train.build")
    parallelizing: Any = importlib.import_module("moetrain.parallel.parallelize")

    def outside(function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            with unset_fake_temporarily():
                return function(*arguments, **named)

        return run

    building.build_meshes = outside(building.build_meshes)
    building.settle_backend = building.settle_attention = lambda *_, **__: None
    parallelizing.compute_local_shape_and_global_offset = outside(
        parallelizing.compute_local_shape_and_global_offset
    )
    parallelizing.initial_values = lambda name, shape, *, settings, seed, device, expert=None: (
        torch.empty(shape, device=device)
    )
    for name in ("__getitem__", "_concatenate", "get_coordinate", "size", "_unflatten", "_flatten"):
        if (method := DeviceMesh.__dict__.get(name)) is not None:
            is_static = isinstance(method, staticmethod)
            wrapped = outside(method.__func__ if is_static else method)
            setattr(DeviceMesh, name, staticmethod(wrapped) if is_static else wrapped)

    for asked in ASKED["configs"]:
        config = resolve(Config(**asked), num_workers=ASKED["world"], now=datetime.now())

        def read(self: Any, config: Any = config) -> Any:
            """Answers as if every rank sent equally many tokens to each expert."""
            reads.append(f"counts {where()}")
            self.work.wait()
            experts, top_k = config.model.num_experts, config.model.top_k
            degree = config.parallel.expert_degree
            tokens = config.train.micro_batch_size * config.train.seq_len
            rows = [min(tokens, tokens * top_k // degree)] * degree
            row = [config.model.dim, 2, top_k, *rows, *[tokens * top_k // experts] * experts]
            return np.array([row] * degree)

        def read_counts(self: Any, config: Any = config) -> Any:
            """Answers for the local exchange: equally many tokens for each expert."""
            if isinstance(self._counts, Tensor):
                reads.append(f"counts {where()}")
                num_assignments = config.train.micro_batch_size * config.train.seq_len
                num_assignments *= config.model.top_k
                self._counts = [num_assignments // len(self._counts)] * len(self._counts)
            return self._counts

        exchange._Counting.read, HostCounts.read = read, read_counts
        groups.clear()
        attended.clear()
        with MODE:
            model, optimizer, gradients, meshes = building.build_model(
                config, device=torch.device(GPU, 0), timeout_seconds=10.0
            )
            made = list(groups)
            for _ in range(2):  # the first allocates the optimizer's state
                for lists in (reads, copies, collectives, in_flight):
                    lists.clear()
                with Operators():
                    report = train_step(
                        micro_batches(config),
                        model=model,
                        optimizer=optimizer,
                        gradients=gradients,
                        meshes=meshes,
                        learning_rate=1e-3,
                        data_counts=[1, 2],
                        begin_micro_batch=partial(begin_micro_batch, model, config.parallel),
                    )
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [t for s in optimizer.state.values() for t in s.values() if t.ndim]
        found = {
            "skipped": report.skipped,
            "devices": sorted({f"{t.device.type} {t.dtype}" for t in tensors}),
            "groups": made,
            "attention": sorted(set(attended)),
            "reads": collections.Counter(reads),
            "copies": collections.Counter(copies),
            "collectives": collections.Counter(collectives),
            "left in flight": [work.what for work in in_flight if not work.waited],
        }
        print(json.dumps(found), flush=True)


def micro_batches(config: Any) -> Any:
    """Returns a rank's micro-batches of two documents a sequence, on the accelerator."""
    import numpy as np

    from data_pipeline import Batch
    from moetrain.train.micro_batch import MicroBatch, noise_seeds

    sequences = config.train.global_batch_size // ASKED["world"]
    shape = (sequences, config.train.seq_len)
    with unset_fake_temporarily():
        starts = np.zeros(shape, dtype=bool)
        starts[:, :: config.train.seq_len // 2] = True
        batch = Batch(
            tokens=np.zeros(shape, dtype=np.int64),
            targets=np.zeros(shape, dtype=np.int64),
            loss_mask=np.ones(shape, dtype=bool),
            document_starts=starts,
            sources=np.zeros(sequences, dtype=np.int64),
            num_corrupt=0,
        )
        return MicroBatch.cut(
            batch,
            config.train.micro_batch_size,
            device=torch.device(GPU, 0),
            mask_documents=config.data.mask_documents,
            noise_seeds=noise_seeds(config, range(sequences)),
        )


main()
