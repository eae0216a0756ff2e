"""Places for ranks: expert groups inside nodes, few nodes, good nodes first."""

import random

import pytest

from launch.placement import Node, Share, choose_nodes


def nodes(*rooms: int) -> list[Node]:
    return [Node(id=f"id{n}", address=f"10.0.0.{n}", room=room) for n, room in enumerate(rooms)]


def placed(shares: list[Share] | None) -> list[tuple[str, int]] | None:
    if shares is None:
        return None
    return [(share.node.address, share.num_ranks) for share in shares]


def test_ranks_of_one_node_are_neighbours_and_nodes_come_in_order() -> None:
    assert placed(choose_nodes(nodes(8, 8, 8), num_ranks=16, group_size=8)) == [
        ("10.0.0.0", 8),
        ("10.0.0.1", 8),
    ]


def test_an_expert_group_stays_inside_a_node_where_it_fits() -> None:
    """Six places hold one group of four: the other two stay empty while there is room elsewhere."""
    assert placed(choose_nodes(nodes(6, 6), num_ranks=8, group_size=4)) == [
        ("10.0.0.0", 4),
        ("10.0.0.1", 4),
    ]


def test_where_groups_fit_nowhere_they_are_cut_and_all_ranks_have_a_place() -> None:
    assert placed(choose_nodes(nodes(2, 2), num_ranks=4, group_size=4)) == [
        ("10.0.0.0", 2),
        ("10.0.0.1", 2),
    ]


def test_whole_groups_come_before_cut_ones() -> None:
    """Else a cut group would shift all that follow over the borders of nodes."""
    shares = choose_nodes(nodes(3, 4, 3), num_ranks=8, group_size=4)
    assert shares is not None
    assert shares[0].num_ranks == 4
    assert sum(share.num_ranks for share in shares) == 8


def test_the_last_ranks_take_the_tightest_node() -> None:
    assert placed(choose_nodes(nodes(8, 8, 2), num_ranks=10, group_size=2)) == [
        ("10.0.0.0", 8),
        ("10.0.0.2", 2),
    ]


def test_nodes_that_made_trouble_come_last() -> None:
    failures = {"10.0.0.0": 1}
    assert placed(choose_nodes(nodes(8, 8), num_ranks=8, group_size=1, failures=failures)) == [
        ("10.0.0.1", 8)
    ]
    both = choose_nodes(nodes(8, 8), num_ranks=16, group_size=1, failures=failures)
    assert placed(both) == [("10.0.0.0", 8), ("10.0.0.1", 8)], "used all the same where needed"


@pytest.mark.parametrize("rooms", [(), (0, 0), (3, 4)])
def test_too_little_room_is_no_place(rooms: tuple[int, ...]) -> None:
    assert choose_nodes(nodes(*rooms), num_ranks=8, group_size=2) is None


def test_any_cluster() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        cluster = nodes(*(draw.randrange(9) for _ in range(draw.randrange(1, 7))))
        group = draw.choice([1, 2, 4, 8])
        num_ranks = group * draw.randrange(1, 9)
        shares = choose_nodes(cluster, num_ranks=num_ranks, group_size=group)
        if sum(node.room for node in cluster) < num_ranks:
            assert shares is None
            continue
        assert shares is not None
        assert sum(share.num_ranks for share in shares) == num_ranks
        assert len({share.node.id for share in shares}) == len(shares)
        assert all(0 < share.num_ranks <= share.node.room for share in shares)
        if sum(node.room // group * group for node in cluster) >= num_ranks:
            assert all(share.num_ranks % group == 0 for share in shares)
