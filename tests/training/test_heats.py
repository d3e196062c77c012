"""When heats end, and the learning rate in them."""

import itertools
import math
from types import SimpleNamespace

import pytest

import luthier.training.heats as heats
from luthier.training.heats import (
    MAX_IMAGES,
    MAX_ON_GPU,
    MIN_STEPS,
    EndHeat,
    EndInTime,
    Schedule,
    first_heat,
    heat_ends,
    most_steps,
)


@pytest.mark.parametrize(
    ("steps_per_epoch", "batch", "expected"),
    [
        (32, 32, 32), (MIN_STEPS, 32, MIN_STEPS), (5, 32, 10), (1, 32, MIN_STEPS), (31_250, 32, MAX_IMAGES // 32),
        (31_250, 256, MAX_IMAGES // 256), (31_250, MAX_IMAGES, MIN_STEPS),
    ],
)  # fmt: skip
def test_first_heat_is_an_epoch_several_of_few_images_and_a_part_of_many(steps_per_epoch, batch, expected):
    assert first_heat(steps_per_epoch, batch) == expected


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [(10, 150, (10, 30, 70, 150)), (10, 4, (4,)), (10, 24, (24,)), (10, 26, (10, 26)), (10, 35, (10, 35))],
)
def test_each_heat_is_twice_as_long_as_the_one_before(first, total, expected):
    assert heat_ends(first, total) == expected


@pytest.mark.parametrize("steps_per_epoch", [5, 100, 400, 4000, 40_000])
def test_on_a_gpu_many_images_are_seen_as_often_as_few_within_a_bound(steps_per_epoch):
    first = first_heat(steps_per_epoch, 32)
    on_cpu, on_gpu = (most_steps(4, first, steps_per_epoch, 32, on_gpu=each) for each in (False, True))
    assert on_cpu == 15 * first
    assert on_gpu == max(on_cpu, min(15 * steps_per_epoch, MAX_ON_GPU // 32))
    ends = heat_ends(first, on_gpu)
    assert ends[0] == first and ends[-1] == on_gpu and len(ends) >= len(heat_ends(first, on_cpu))


def test_last_heat_is_never_a_short_one():
    for total in range(1, 400):
        ends = (0, *heat_ends(10, total))
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        assert all(b >= 1.4 * a for a, b in itertools.pairwise(lengths)), (total, lengths)


def test_learning_rate_rises_and_decays_in_each_heat():
    schedule = Schedule((10, 30), warmup=0.2)
    rates = [schedule(step) for step in range(30)]
    assert rates[0] == 0.5 and rates[10] == 0.25  # of 2 and of 4 steps of warm-up
    assert rates[9] < 0.03 and rates[29] < 0.01 and schedule(30) == 0.0
    assert rates[20] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert Schedule((10,), warmup=5)(0) == 0.2 and Schedule((10,))(0) == 1.0
    assert max(map(Schedule((10,), warmup=500), range(10))) > 0.5  # half of a heat at most


def test_epoch_that_would_end_too_late_with_its_evaluation_is_not_begun(monkeypatch):
    clock, told, control = [0.0], [], SimpleNamespace(should_training_stop=False)
    monkeypatch.setattr(heats.time, "perf_counter", lambda: clock[0])
    ends, state = EndInTime(lambda seconds: bool(told.append(seconds)) or seconds < 10), SimpleNamespace(epoch=0.0)
    for event, moment in (
        ("evaluate", 0),
        ("epoch_begin", 0),
        ("evaluate", 4),
        ("epoch_end", 5),
        ("evaluate", 8),
        ("epoch_begin", 8),
        ("epoch_end", 13),
    ):
        clock[0] = moment
        state.epoch += event == "epoch_end"
        getattr(ends, f"on_{event}")(None, state, control)
        assert control.should_training_stop == (moment == 13)
    assert told == [5, 11]


@pytest.mark.parametrize("evaluate", [True, False])
def test_end_of_a_heat_is_evaluated_and_kept_whatever_the_strategies_are(evaluate):
    end = EndHeat(10, evaluate)
    for step in (9, 10):
        control = SimpleNamespace(
            should_training_stop=False, should_save=False, should_log=False, should_evaluate=not evaluate
        )
        state = SimpleNamespace(global_step=step)
        end.on_step_end(None, state, control)
        end.on_epoch_end(None, state, control)
        assert control.should_training_stop == control.should_save == control.should_log == (step == 10)
        assert control.should_evaluate == (evaluate if step == 10 else not evaluate)


def test_end_of_a_heat_is_not_kept_before_its_evaluation():
    """Or a run that goes on from there would take the heat for one without gain."""
    control = SimpleNamespace(should_training_stop=False, should_save=True, should_log=False, should_evaluate=False)
    end, state = EndHeat(10, evaluate=True), SimpleNamespace(global_step=10)
    end.on_step_end(None, state, control)
    assert not control.should_save
    end.on_epoch_end(None, state, control)
    assert control.should_save and control.should_evaluate


def test_part_of_an_epoch_is_not_taken_for_a_whole_one(monkeypatch):
    clock, told, control = [0.0], [], SimpleNamespace(should_training_stop=False)
    monkeypatch.setattr(heats.time, "perf_counter", lambda: clock[0])
    ends = EndInTime(lambda seconds: bool(told.append(seconds)) or True)
    ends.on_epoch_begin(None, SimpleNamespace(epoch=3.5), control)
    clock[0] = 4.0
    ends.on_epoch_end(None, SimpleNamespace(epoch=4.0), control)
    assert told == [8.0]
