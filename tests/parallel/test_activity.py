"""What a rank says it does, and what its watcher makes of it."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moetrain.parallel import BETWEEN_STEPS, Activity, AllToAllExchange, Doing
from tests.support.ranks import replace_in_rank, run_ranks
from tests.support.runs import tiny_config, train_as_rank, write_shards


def test_a_phase_keeps_its_step_and_forgets_layer_and_collective() -> None:
    activity = Activity()
    activity.begin("forward", step=3)
    activity.layer(5)
    with activity.collective("token all-to-all of layer 5"):
        said = str(activity.read()[0])
    assert said == "forward at step 3, layer 5, waiting for token all-to-all of layer 5"
    assert activity.read()[0] == Doing(phase="forward", step=3, layer=5)
    activity.begin("backward")
    assert activity.read()[0] == Doing(phase="backward", step=3)


def test_a_failed_collective_stays_named() -> None:
    activity = Activity()
    with pytest.raises(RuntimeError), activity.collective("the sum"):
        raise RuntimeError
    assert activity.read()[0].collective == "the sum"


def test_silence_grows_until_something_is_said() -> None:
    activity = Activity()
    activity.begin("save", step=1)
    time.sleep(0.05)
    assert activity.read()[1] >= 0.05
    activity.goes_on()
    doing, silent = activity.read()
    assert doing.phase == "save"
    assert silent < 0.05


def test_the_slowest_step_is_known_after_some_and_counts_no_saves() -> None:
    activity = Activity()
    for step in range(6):
        assert activity.slowest_step() is None
        activity.begin(BETWEEN_STEPS, step=step)
        activity.begin("forward")
        time.sleep(0.06 if step == 2 else 0.001)
        if step == 3:
            activity.begin("save")
            time.sleep(0.3)
    activity.begin(BETWEEN_STEPS)
    slowest = activity.slowest_step()
    assert slowest is not None
    assert 0.06 <= slowest < 0.3


def _second_stays_away(folder: Path, shards: Path) -> list[str]:
    """Trains; at step 2, rank 1 leaves the first alone in the second layer's token exchange."""
    seen: list[str] = []
    if dist.get_rank() == 1:
        planned = AllToAllExchange._plan

        def stay_away(self: AllToAllExchange, table: Any) -> object:
            doing = self.activity.read()[0]
            if (doing.step, doing.phase, doing.layer) == (2, "forward", 1) and not seen:
                seen.append(str(doing))
                time.sleep(4.0)
            return planned(self, table)

        replace_in_rank(AllToAllExchange, "_plan", stay_away)
    else:
        listened = Activity.collective

        def listen(self: Activity, name: str) -> object:
            def look() -> None:
                doing, silent = self.read()
                if silent > 1.5:
                    seen.append(str(doing))

            threading.Timer(2.0, look).start()
            return listened(self, name)

        replace_in_rank(Activity, "collective", listen)
    train_as_rank(tiny_config(folder, shards=shards, num_workers=2, train__num_steps=4), None, 1)
    return seen[:1]


@pytest.mark.trap(19)
def test_a_hang_names_step_phase_layer_collective_and_counts(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    (waiting,), (absent,) = run_ranks(_second_stays_away, 2, tmp_path, shards)
    assert absent == "forward at step 2, layer 1"
    assert re.fullmatch(
        r"forward at step 2, layer 1, waiting for token all-to-all of layer 1 on rank 0, "
        r"sending \[\d+, \d+\] and receiving \[\d+, \d+\] rows",
        waiting,
    )
