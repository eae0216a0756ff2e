"""The choice of the fastest backend, with real work and real files; only the clock is counted."""

import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.kernels import Copies
from moetrain.kernels.autotune import _known, choose_backend, default_cache, fastest, shape_key


class Work:
    """Candidates that move a clock of their own, and count how often they were called."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.calls = dict.fromkeys(seconds, 0)
        self.candidates = {name: self.candidate(name, took) for name, took in seconds.items()}

    def candidate(self, name: str, took: float) -> Callable[[], None]:
        def call() -> None:
            self.calls[name] += 1
            # The first call compiles: the slowest of all, whoever is the fastest later.
            self.now += took if self.calls[name] > 1 else 100 / took

        return call

    def clock(self) -> float:
        return self.now


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "backends.json"


def test_the_faster_is_chosen_and_the_warm_up_does_not_count(cache: Path) -> None:
    work = Work(slow=2.0, quick=1.0)
    assert fastest(work.candidates, key="k", cache=cache, clock=work.clock) == "quick"
    entry = json.loads(cache.read_text())["k"]
    assert entry == {"fastest": "quick", "seconds": {"slow": 2.0, "quick": 1.0}}


def test_real_work_on_the_real_clock(cache: Path) -> None:
    candidates = {"slow": lambda: time.sleep(0.05), "quick": lambda: time.sleep(0.001)}
    assert fastest(candidates, key="k", cache=cache) == "quick"


def test_a_process_measures_once_and_the_next_process_not_at_all(cache: Path) -> None:
    work = Work(slow=2.0, quick=1.0)
    fastest(work.candidates, key="k", cache=cache, clock=work.clock)
    calls = dict(work.calls)
    cache.unlink()  # this process still knows
    assert fastest(work.candidates, key="k", cache=cache, clock=work.clock) == "quick"
    assert work.calls == calls
    cache.write_text(json.dumps({"k": {"fastest": "slow"}}))
    _known.cache_clear()  # as in a new process, which takes what stands there
    assert fastest(work.candidates, key="k", cache=cache, clock=work.clock) == "slow"
    assert work.calls == calls


def test_another_key_is_measured_and_kept_beside_the_first(cache: Path) -> None:
    work = Work(a=1.0, b=2.0)
    fastest(work.candidates, key="first", cache=cache, clock=work.clock)
    other = Work(a=2.0, b=1.0)
    assert fastest(other.candidates, key="second", cache=cache, clock=other.clock) == "b"
    assert set(json.loads(cache.read_text())) == {"first", "second"}


def test_a_choice_that_is_no_candidate_is_measured_anew(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps({"k": {"fastest": "uninstalled"}}))
    work = Work(a=2.0, b=1.0)
    assert fastest(work.candidates, key="k", cache=cache, clock=work.clock) == "b"
    assert json.loads(cache.read_text())["k"]["fastest"] == "b"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"k": 1}', '{"k": {"fastest": 3}}', "\x00", '{"k": {"fastest": []}}']
)
def test_a_harmed_file_is_written_anew(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    work = Work(a=1.0, b=2.0)
    assert fastest(work.candidates, key="k", cache=cache, clock=work.clock) == "a"
    assert json.loads(cache.read_text())["k"]["fastest"] == "a"


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    work = Work(a=1.0, b=2.0)
    cache = tmp_path / "file" / "backends.json"
    assert fastest(work.candidates, key="k", cache=cache, clock=work.clock) == "a"
    assert "the next start measures again" in caplog.text


def test_one_that_raises_is_left_out_with_its_reason(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ValueError("rows of 3 bytes")

    work = Work(a=1.0)
    with caplog.at_level(logging.WARNING):
        chosen = fastest(
            {"broken": broken, **work.candidates}, key="k", cache=cache, clock=work.clock
        )
    assert chosen == "a"
    assert "backend broken is left out: ValueError: rows of 3 bytes" in caplog.text
    with pytest.raises(RuntimeError, match="broken: ValueError: rows of 3 bytes"):
        fastest({"broken": broken}, key="other", cache=cache)


def _measure_in_a_process(cache: Path, name: str, barrier: Barrier) -> str:
    calls = 0

    def wait_then_work() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # the last call: both processes have found no entry
            barrier.wait(timeout=60)

    later = {"a": "b", "b": "a"}[name]
    seconds = {name: 0.0, later: 1.0}
    now = 0.0

    def clock() -> float:
        return now

    def work(which: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += seconds[which]
            if which == name:
                wait_then_work()

        return call

    return fastest({which: work(which) for which in "ab"}, key="k", cache=cache, clock=clock)


def test_two_processes_that_measure_at_once_agree(cache: Path) -> None:
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


def layer(num_copies: int) -> tuple[Tensor, Tensor, Copies, Tensor]:
    """Returns rows, gates, copies (all to one expert) and a weight for all three."""
    row = torch.arange(num_copies)
    copies = Copies(row, torch.tensor([num_copies]), row, torch.arange(num_copies + 1), 1, row)
    return torch.randn(num_copies, 8), torch.rand(num_copies), copies, torch.randn(1, 16, 8)


def test_choices_are_for_copies_up_to_the_next_power_of_two() -> None:
    keys = []
    for num_copies in (1000, 1024, 1025):
        x, _, copies, weight = layer(num_copies)
        keys.append(shape_key(x, copies, weight))
    assert keys[0] == keys[1] != keys[2]
    assert keys[0].endswith("float32, dim 8, hidden 16, experts 1, copies 1024")
    x, _, copies, weight = layer(0)
    assert shape_key(x, copies, weight).endswith("copies 1")


def test_it_measures_inside_a_checkpoint_and_the_backward_pass_still_recomputes(
    cache: Path,
) -> None:
    def product(x: Tensor, gates: Tensor, copies: Copies, *weights: Tensor) -> Tensor:
        return x * (gates.sum() + sum((weight * weight).sum() for weight in weights))

    x, gates, copies, weight = layer(4)
    x.requires_grad_()

    def measured(x: Tensor) -> Tensor:
        y = (x * x) * 2
        candidates = {"one": product, "other": product}
        choose_backend(y, gates, copies, weight, weight, weight, candidates=candidates, cache=cache)
        return y * y

    checkpoint(measured, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 16 * x.detach() ** 3)


def test_running_out_of_memory_decides_nothing(cache: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fastest({"a": full, "b": lambda: None}, key="k", cache=cache)
    assert not cache.exists()


def test_forward_and_backward_are_measured_and_leave_nothing_behind(cache: Path) -> None:
    """The forward alone would choose the wrong one; it works where gradients are off, too."""

    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            time.sleep(0.05)
            return grad

    def slow(x: Tensor, gates: Tensor, copies: Copies, *weights: Tensor) -> Tensor:
        total = gates.sum() + sum(weight.sum() for weight in weights)
        apply: Callable[..., Tensor] = SlowBackward.apply
        return apply(x * total)

    def quick(x: Tensor, gates: Tensor, copies: Copies, *weights: Tensor) -> Tensor:
        time.sleep(0.01)
        return x * (gates.sum() + sum(weight.sum() for weight in weights))

    x, gates, copies, weight = layer(4)
    weights = [weight.clone().requires_grad_() for _ in range(3)]
    state = torch.get_rng_state()
    with torch.no_grad():
        chosen = choose_backend(
            x, gates, copies, *weights, candidates={"slow": slow, "quick": quick}, cache=cache
        )
    assert chosen == "quick"
    assert all(weight.grad is None for weight in weights)
    assert torch.equal(torch.get_rng_state(), state)
