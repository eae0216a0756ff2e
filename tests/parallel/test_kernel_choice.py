"""Which expert backend the ranks take: on real gloo ranks, whose clocks and files differ."""

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.kernels import Assignments
from moetrain.kernels.expert_swiglu import GROUPED
from moetrain.model import Transformer
from moetrain.parallel import build_meshes, parallelize, resolve_topology, settle_backend
from moetrain.parallel.kernel_choice import backend_of_all_ranks, default_cache, fastest
from moetrain.settings import ParallelSettings
from moetrain.settings.model import ModelSettings
from tests.support.ranks import run_ranks

SMALL = ModelSettings(
    dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, ffn_hidden_dim=64,
    num_experts=4, top_k=2, vocab_size=101, max_seq_len=64, rope_theta=1e4,
)  # fmt: skip
CPU = torch.device("cpu")
BOTH = ("cpu", "grouped_mm")


class Skewed:
    """A clock on which what is timed at every other place takes longer than all else."""

    def __init__(self, slow: str) -> None:
        self.looks, self._ahead = 0, 0.0
        self._slow = BOTH.index(slow)

    def __call__(self) -> float:
        # Two looks for each call of each backend in turn; the second ends what was timed.
        if self.looks % 2 and self.looks // 2 % len(BOTH) == self._slow:
            self._ahead += 1000
        self.looks += 1
        return time.perf_counter() + self._ahead


class Operators(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.replace("::", "."))
        return func(*args, **(kwargs or {}))


def settled(
    slow: Sequence[str], cache_homes: Sequence[str], degree: int, wrong_on: int | None = None
) -> tuple[Any, ...]:
    """Returns a rank's choice, which backend computes, looks at its clock, and an output.

    On the rank `wrong_on`, grouped_mm leaves what it doesn't write as it finds it.
    """
    rank = dist.get_rank()
    if rank == wrong_on:
        right = GROUPED["grouped_mm"]

        def wrong(x: Tensor, gates: Tensor, assignments: Assignments, *weights: Tensor) -> Tensor:
            empty = assignments.counts == 0
            for weight in weights:
                weight.register_hook(
                    lambda grad: grad.masked_fill(empty[:, None, None], float("nan"))
                )
            return right(x, gates, assignments, *weights)

        GROUPED["grouped_mm"] = wrong  # type: ignore[index]  # a mapping for everybody else
    os.environ["XDG_CACHE_HOME"] = cache_homes[rank]
    parallel = ParallelSettings(expert_degree=degree)
    topology = resolve_topology(
        parallel,
        world_size=2,
        num_experts=SMALL.num_experts,
        ffn_hidden_dim=SMALL.ffn_hidden_dim,
        ranks_per_node=2,
    )
    meshes = build_meshes(topology, device=CPU)
    with torch.device("meta"):
        model = Transformer(SMALL)
    parallelize(model, meshes, parallel, seed=0, device=CPU, compute_dtype=torch.float32)
    clock = Skewed(slow[rank])
    settle_backend(
        model, meshes, num_tokens=32, device=CPU, dtype=torch.float32, among=BOTH, clock=clock
    )
    (backend,) = {moe.experts.preferred_backend for moe in model.moe_layers()}
    torch.manual_seed(0)
    tokens = torch.randint(SMALL.vocab_size, (2, 16))
    with Operators() as operators, torch.no_grad():
        logits = model(tokens)
    computed_by = "grouped_mm" if "aten._grouped_mm" in operators.names else "cpu"
    return backend, computed_by, clock.looks, logits.double().sum().item()


def test_a_backend_that_answers_wrongly_on_a_rank_is_taken_by_none(tmp_path: Path) -> None:
    homes = [str(tmp_path / str(rank)) for rank in range(2)]
    right = run_ranks(settled, 2, ["cpu", "cpu"], homes, 2)
    assert [choice for choice, *_ in right] == ["grouped_mm"] * 2
    wrong = run_ranks(settled, 2, ["cpu", "cpu"], homes, 2, 1)
    assert [choice for choice, *_ in wrong] == ["cpu"] * 2


def settled_deterministically(among: tuple[str, ...]) -> tuple[str | None, int]:
    topology = resolve_topology(
        ParallelSettings(), world_size=1, num_experts=4, ffn_hidden_dim=64, ranks_per_node=1
    )
    clock, model = Skewed("cpu"), Transformer(SMALL)
    settle_backend(
        model, build_meshes(topology, device=CPU), num_tokens=32, device=CPU, dtype=torch.float32,
        deterministic=True, among=among, clock=clock,
    )  # fmt: skip
    return model.moe_layers()[0].experts.preferred_backend, clock.looks


def test_a_deterministic_run_measures_nothing_and_takes_no_tuned_kernel() -> None:
    hopper, a100 = ("megablocks", "grouped_mm"), ("megablocks", "grouped_mm", "cpu")
    assert run_ranks(settled_deterministically, 1, hopper) == [("grouped_mm", 0)]
    assert run_ranks(settled_deterministically, 1, a100) == [("cpu", 0)]


@pytest.mark.parametrize(("first", "degree"), [("cpu", 1), ("grouped_mm", 2)])
def test_all_ranks_take_the_first_ones_choice_where_another_would_measure_otherwise(
    tmp_path: Path, first: str, degree: int
) -> None:
    other = {"cpu": "grouped_mm", "grouped_mm": "cpu"}[first]
    homes = [str(tmp_path / name) for name in "ab"]
    (backend, here, looks, out), (theirs, there, their_looks, their_out) = run_ranks(
        settled, 2, (other, first), homes, degree
    )
    assert backend == theirs == here == there == first
    assert looks == 24, "two for each of two backends, once to warm up and five times"
    assert their_looks == 0, "one rank measures"
    assert out == their_out
    assert (tmp_path / "a/moetrain/backends.json").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kept_by", ["a", "b"])
def test_ranks_of_which_one_alone_has_kept_a_choice_neither_wait_nor_differ(
    tmp_path: Path, kept_by: str
) -> None:
    homes = [str(tmp_path / name) for name in "ab"]
    run_ranks(settled, 2, ("grouped_mm",) * 2, homes, 1)  # it keeps cpu
    (tmp_path / "a").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / kept_by)
    found = run_ranks(settled, 2, ("cpu",) * 2, homes, 1)
    assert [backend for backend, *_ in found] == ["cpu" if kept_by == "a" else "grouped_mm"] * 2
    assert [looks for *_, looks, _ in found] == [0 if kept_by == "a" else 24, 0]


def agreed(able: Sequence[Sequence[str]], failure: str) -> str:
    """Returns what a rank makes of backends that each rank is able to run, or what it raises."""

    def measured(names: Sequence[str]) -> Mapping[str, float]:
        assert dist.get_rank() == 0
        if failure == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if failure:
            raise RuntimeError(failure)
        return {name: 1.0 + index for index, name in enumerate(reversed(names))}

    mine = able[dist.get_rank()]
    try:
        return backend_of_all_ranks(mine, key="k", device="cpu", measured=measured, cache=None)
    except RuntimeError as error:
        return str(error)


MEGABLOCKS, TORCHS = "megablocks", "grouped_mm"


@pytest.mark.parametrize(
    ("able", "chosen"),
    [
        ([(MEGABLOCKS, TORCHS)] * 2, TORCHS),
        ([(MEGABLOCKS, TORCHS), (TORCHS,)], TORCHS),
        ([(MEGABLOCKS,), (MEGABLOCKS, TORCHS)], MEGABLOCKS),
        ([(MEGABLOCKS,), (TORCHS,)], "cpu"),
        ([(), (MEGABLOCKS, TORCHS)], "cpu"),
    ],
)
def test_a_backend_that_a_rank_cannot_run_is_nobodys(
    able: list[tuple[str, ...]], chosen: str
) -> None:
    assert run_ranks(agreed, 2, able, "") == [chosen] * 2


def test_where_the_first_rank_fails_all_do_and_without_room_all_take_grouped_mm() -> None:
    both = [(MEGABLOCKS, TORCHS)] * 2
    assert run_ranks(agreed, 2, both, "no backend runs") == [
        "no backend runs",
        "rank 0: RuntimeError: no backend runs",
    ]
    assert run_ranks(agreed, 2, both, "memory") == [TORCHS] * 2


def told_of_devices() -> str:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("moetrain.parallel.kernel_choice").addHandler(handler)
    backend_of_all_ranks(
        ["cpu"], key="k", device="AB"[dist.get_rank()], measured=lambda _: {}, cache=None
    )
    return "\n".join(said)


def test_devices_that_differ_are_told_by_the_first_rank() -> None:
    first, second = run_ranks(told_of_devices, 2)
    assert "rank 1 computes with B and rank 0 with A" in first
    assert second == ""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "backends.json"


def chosen(
    seconds: Mapping[str, float], *, cache: Path, key: str = "k", calls: list[str] | None = None
) -> str:
    def measured(names: Sequence[str]) -> Mapping[str, float]:
        if calls is not None:
            calls.append(key)
        return {name: seconds[name] for name in names}

    return fastest(list(seconds), key=key, measured=measured, cache=cache)


def test_a_choice_is_kept_and_the_next_start_measures_nothing(cache: Path) -> None:
    calls: list[str] = []
    assert chosen({"a": 2.0, "b": 1.0}, cache=cache, calls=calls) == "b"
    entry = json.loads(cache.read_text())["k"]
    assert entry == {"fastest": "b", "seconds": {"a": 2.0, "b": 1.0}}
    assert chosen({"a": 1.0, "b": 2.0}, cache=cache, calls=calls) == "b"
    assert calls == ["k"]


def test_another_key_is_measured_and_kept_beside_the_first(cache: Path) -> None:
    chosen({"a": 1.0, "b": 2.0}, cache=cache, key="first")
    assert chosen({"a": 2.0, "b": 1.0}, cache=cache, key="second") == "b"
    assert set(json.loads(cache.read_text())) == {"first", "second"}


def test_a_choice_that_is_no_candidate_is_measured_anew(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps({"k": {"fastest": "uninstalled"}}))
    assert chosen({"a": 2.0, "b": 1.0}, cache=cache) == "b"
    assert json.loads(cache.read_text())["k"]["fastest"] == "b"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"k": 1}', '{"k": {"fastest": 3}}', "\x00", '{"k": {"fastest": []}}']
)
def test_a_corrupted_file_is_written_anew(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert chosen({"a": 1.0, "b": 2.0}, cache=cache) == "a"
    assert json.loads(cache.read_text())["k"]["fastest"] == "a"


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert chosen({"a": 1.0, "b": 2.0}, cache=tmp_path / "file" / "backends.json") == "a"
    assert "the next start measures again" in caplog.text


def _measure_in_a_process(cache: Path, name: str, barrier: Any) -> str:
    def measured(names: Sequence[str]) -> Mapping[str, float]:
        barrier.wait(timeout=60)  # both processes have found no entry
        return {which: 0.0 if which == name else 1.0 for which in names}

    return fastest("ab", key="k", measured=measured, cache=cache)


def test_two_runs_that_measure_at_once_agree(cache: Path) -> None:
    """Each alone would choose another; the first to write decides."""
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager, context.Pool(2) as pool:
        barrier = manager.Barrier(2)
        jobs = [pool.apply_async(_measure_in_a_process, (cache, name, barrier)) for name in "ab"]
        first, second = (job.get(timeout=100) for job in jobs)
    assert first == second == json.loads(cache.read_text())["k"]["fastest"]


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "moetrain" / "backends.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "moetrain" / "backends.json"
