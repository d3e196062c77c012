"""Which arms of a race go on, and which weights are kept at the end."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from luthier.scoring.race import FAR, Heat, _who_goes_on, predict_loss, race
from luthier.scoring.selection import Candidate, choose


def arm(name: str, ends: tuple[int, ...] = (10, 30, 70, 150)) -> SimpleNamespace:
    return SimpleNamespace(recipe=SimpleNamespace(name=name), ends=ends)


def heats(**losses: list[float]) -> list[Heat]:
    ends = (10, 30, 70, 150)
    return [
        Heat(name, end, end / 10, loss, 0.9, 1.0)
        for name, values in losses.items()
        for end, loss in zip(ends, values, strict=False)
    ]


def candidate(losses: list[float], name: str = "full") -> Candidate:
    return Candidate(1.0, 1.0, 0.0, {"log_loss": float(np.mean(losses))}, {}, np.array(losses), name)


ARMS = [arm("lp_ft"), arm("full"), arm("full_from_probe")]


def test_no_arm_ends_after_the_first_heat():
    tried = heats(lp_ft=[0.4], full=[4.0], full_from_probe=[0.5])
    assert _who_goes_on(tried, ARMS, 0, candidate([0.45, 0.45], "probe")) == (ARMS, "")


def test_worst_arm_ends_after_each_later_heat():
    probe, tried = (
        candidate([0.45, 0.45], "probe"),
        heats(lp_ft=[0.4, 0.38], full=[1.0, 0.4], full_from_probe=[0.5, 0.3]),
    )
    alive, _ = _who_goes_on(tried, ARMS, 1, probe)
    assert {each.recipe.name for each in alive} == {"full_from_probe", "full"}
    tried += heats(full=[1.0, 0.4, 0.15], full_from_probe=[0.5, 0.3, 0.2])[2::3]
    alive, _ = _who_goes_on(tried, alive, 2, probe)
    assert [each.recipe.name for each in alive] == ["full"]


def test_probe_that_is_far_ahead_ends_the_race():
    tried = heats(lp_ft=[0.4], full=[1.0])
    probe = candidate([0.4 / FAR - 0.01] * 4, "probe")
    assert _who_goes_on(tried, ARMS[:2], 0, probe) == ([], "the probe far ahead")


def test_second_heat_is_judged_by_where_it_leads():
    tried = heats(lp_ft=[0.42, 0.40], full=[1.2, 0.45])
    alive, _ = _who_goes_on(tried, ARMS[:2], 1, candidate([0.5, 0.5], "probe"))
    assert [each.recipe.name for each in alive] == ["full"]


@pytest.mark.parametrize(("last", "goes_on"), [(0.30, True), (0.399, False), (0.45, False)])
def test_race_ends_when_another_heat_promises_nothing(last, goes_on):
    alive, reason = _who_goes_on(heats(full=[0.6, 0.4, last]), [arm("full")], 2, candidate([0.5, 0.5], "probe"))
    assert bool(alive) is goes_on and (reason == "") is goes_on


def test_race_ends_with_its_last_heat():
    tried = heats(full=[0.6, 0.5, 0.4, 0.3])
    assert _who_goes_on(tried, [arm("full")], 3, None) == ([], "its last heat")


def test_arm_that_leads_to_less_than_the_probe_does_not_go_on():
    assert not _who_goes_on(heats(full=[0.60, 0.58]), [arm("full")], 1, candidate([0.3, 0.3], "probe"))[0]


def test_power_law_goes_through_both_heats_and_never_rises():
    first, second = heats(full=[0.8, 0.4])
    slope = math.log(0.5) / math.log(3)
    assert predict_loss(first, second, 7.0) == pytest.approx(0.4 * (7 / 3) ** slope)
    assert predict_loss(second, first._replace(epochs=7.0), 15.0) == 0.8


def test_probe_must_be_ahead_beyond_doubt():
    probe, better = candidate([0.4, 0.6, 0.5, 0.5], "probe"), candidate([0.3, 0.5, 0.4, 0.4])
    worse, doubtful = candidate([0.5, 0.7, 0.6, 0.65]), candidate([2.1, 0.01, 0.04, 0.01])
    assert choose([probe, better]) is better and choose([probe, worse]) is probe
    assert doubtful.loss > probe.loss and choose([probe, doubtful]) is doubtful
    assert choose([probe, worse, doubtful]) is doubtful
    assert choose([doubtful, candidate([5.0, 5.0, 5.0, 5.0])]) is doubtful  # without a probe the best one


def test_weights_that_diverged_are_not_kept():
    broken, probe = candidate([math.nan] * 4), candidate([0.5] * 4, "probe")
    assert choose([broken, probe]) is probe and choose([probe, broken]) is probe


def test_no_race_where_the_probe_leaves_little_to_gain():
    outcome = race(ARMS, candidate([0.01] * 4, "probe"), None, None)
    assert outcome.arm is None and not outcome.heats and "little to gain" in outcome.reason
