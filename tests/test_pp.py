"""Pipelines: their schedules without processes, and against one process in every company."""

import pytest
from test_axes import check

from minitrain.config import ParallelConfig, TrainConfig
from minitrain.parallel.pp import schedule, share_blocks

SCHEDULES = ("1f1b", "gpipe")


# ---- schedules


def simulate(kind, stages, rows, forward=1, backward=2):
    """Every stage does its actions in order, each as soon as what it needs is there. -> (time of all, the most rows
    under way on each stage); AssertionError if they wait for each other."""
    plans = [schedule(kind, stage, stages, rows) for stage in range(stages)]
    at, clocks, ended, most = [0] * stages, [0] * stages, {}, [0] * stages
    while any(at[stage] < len(plan) for stage, plan in enumerate(plans)):
        moved = False
        for stage, plan in enumerate(plans):
            while at[stage] < len(plan):
                action, row = plan[at[stage]]
                neighbour = stage - 1 if action == "forward" else stage + 1
                needs = [(neighbour, action, row)] if 0 <= neighbour < stages else []
                needs += [(stage, "forward", row)] if action == "backward" else []
                if not all(need in ended for need in needs):
                    break
                begin = max([clocks[stage], *(ended[need] for need in needs)])
                clocks[stage] = begin + (forward if action == "forward" else backward)
                ended[stage, action, row] = clocks[stage]
                at[stage] += 1
                under_way = sum(1 if done == "forward" else -1 for done, _ in plan[: at[stage]])
                most[stage] = max(most[stage], under_way)
                moved = True
        assert moved, "the stages wait for each other"
    return max(clocks), most


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 20])
def test_a_schedule_ends_after_the_bubble_that_it_must_have(kind, stages, rows):
    time, most = simulate(kind, stages, rows)
    assert time == (rows + stages - 1) * 3
    assert most == [rows if kind == "gpipe" else min(rows, stages - stage) for stage in range(stages)]
    for stage in range(stages):
        actions = schedule(kind, stage, stages, rows)
        for action in ("forward", "backward"):  # that the last row's backward is the last one, Gradients relies on
            assert [row for what, row in actions if what == action] == list(range(rows))


def test_one_stage_does_a_row_after_the_other():
    assert schedule("1f1b", 0, 1, 2) == [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1)]


# ---- stages


@pytest.mark.parametrize(
    "costs, stages, lengths",
    [
        ([1] * 8, 4, [2, 2, 2, 2]),
        ([1] * 7, 4, [1, 2, 2, 2]),
        ([1] * 27 + [11], 4, [9, 9, 9, 1]),  # a head that costs as much as ten blocks
        ([1] * 7 + [4], 4, [2, 2, 3, 1]),
        ([5, 1, 1, 1, 1, 1], 2, [1, 5]),
        ([1, 1, 1], 3, [1, 1, 1]),
    ],
)
def test_the_costliest_stage_costs_as_little_as_can_be(costs, stages, lengths):
    parts = share_blocks(costs, stages)
    assert [len(part) for part in parts] == lengths
    assert [i for part in parts for i in part] == list(range(len(costs)))


# ---- against one process


def test_two_stages_equal_one_process(tmp_path):
    check(2, [ParallelConfig(pp=2)], tmp_path, num_rows=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_two_stages_equal_one_process_for_any_number_of_rows(kind, rows, tmp_path):
    check(2, [ParallelConfig(pp=2, pp_schedule=kind)], tmp_path, num_rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, rows", [(3, 1), (3, 5), (4, 1), (4, 6)])
def test_more_stages_equal_one_process(ranks, rows, tmp_path):
    check(ranks, [ParallelConfig(pp=ranks, pp_schedule=kind) for kind in SCHEDULES], tmp_path, num_rows=rows)


@pytest.mark.slow
def test_stages_and_another_axis_equal_one_process(tmp_path):
    layouts = [{}, {"tp": 2}, {"cp": 2}, {"ep": 2}, {"zero": 1}, {"zero": 2}, {"tp": 2, "zero": 2}]
    check(4, [ParallelConfig(pp=2, **sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
def test_recomputed_blocks_of_stages_repeat_their_collectives(tmp_path):
    layouts = [ParallelConfig(pp=2, tp=2), ParallelConfig(pp=2, ep=2)]
    check(4, layouts, tmp_path, TrainConfig(recompute="full"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_and_two_other_axes_equal_one_process(tmp_path):
    layouts = [{"tp": 2, "ep": 2}, {"tp": 2, "cp": 2}, {"cp": 2, "ep": 2}, {"zero": 2, "shard_within": 2}]
    check(8, [ParallelConfig(pp=2, **sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_axes_together_equal_one_process(tmp_path):
    check(16, [ParallelConfig(pp=2, cp=2, tp=2, ep=2)], tmp_path)
