"""A short version of `make torture`: nothing that was saved is lost, nothing is loaded silently."""

from pathlib import Path

import pytest

from tests.torture.disks import torture_by_disks
from tests.torture.kills import torture_by_kills
from tests.torture.loads import torture_by_harm
from tests.torture.rivals import torture_by_rivals
from tests.torture.tally import Tally
from tests.torture.undisturbed import Undisturbed, run_undisturbed

SEED = 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), num_steps=6)


def assert_nothing_is_lost(*tallies: Tally) -> None:
    problems = [problem for tally in tallies for problem in tally.problems]
    assert not problems, "\n".join(problems)
    assert all(tally.tried or tally.skipped for tally in tallies)


@pytest.mark.trap(21)
def test_runs_killed_while_they_save_end_as_if_undisturbed(
    tmp_path: Path, whole: Undisturbed
) -> None:
    assert_nothing_is_lost(torture_by_kills(tmp_path, whole, num_kills=10, seed=SEED))


@pytest.mark.trap(22)
@pytest.mark.parametrize(("group", "num"), [("flips", 49), ("structure", 44), ("hostile", 46)])
def test_what_was_corrupted_is_never_loaded_and_the_rest_is(
    tmp_path: Path, whole: Undisturbed, group: str, num: int
) -> None:
    tally = torture_by_harm(whole.pristine, tmp_path, group=group, num=num, seed=SEED)
    assert_nothing_is_lost(tally)
    assert tally.outcomes["detected"] > num // 2


def test_a_disk_that_fails_costs_no_older_checkpoint(tmp_path: Path) -> None:
    assert_nothing_is_lost(*torture_by_disks(tmp_path / "disks", num=11, seed=SEED))


@pytest.mark.trap(21)
def test_of_two_attempts_at_once_the_newer_one_wins(tmp_path: Path) -> None:
    assert_nothing_is_lost(*torture_by_rivals(tmp_path, num_rounds=8, seed=SEED))
