"""Which arms of a race go on, and which weights are kept at the end."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import luthier.scoring.race as module
from luthier.errors import NotFinite, UserError
from luthier.output_dir import NO_TIME
from luthier.reporting import console
from luthier.run_files import RACE
from luthier.scoring.criterion import ENOUGH, LOG_LOSS, Criterion, Judge
from luthier.scoring.race import FAR, Outcome, Trained, _Progress, keep_best, predict_loss, race
from luthier.scoring.race_record import Course, Heat, Heats, read_record, write_record
from luthier.scoring.selection import LEAD, Candidate, choose
from luthier.terminal import Stopwatch
from luthier.training.arms import Workshop
from luthier.training.checkpoints import checkpoints_by_step
from luthier.training.recipe import RECIPES
from luthier.training.signals import Stop


def arm(name: str, ends: tuple[int, ...] = (10, 30, 70, 150)) -> SimpleNamespace:
    return SimpleNamespace(recipe=RECIPES[name], ends=ends, batch=32, schedule=len(ends) > 1, steps_per_epoch=10)


def heats(**losses: list[float]) -> Heats:
    ends = (10, 30, 70, 150)
    return Heats(
        Heat(name, end, end / 10, loss, 0.9, 1.0)
        for name, values in losses.items()
        for end, loss in zip(ends, values, strict=False)
    )


def candidate(losses: list[float], name: str = "full") -> Candidate:
    return Candidate(1.0, 1.0, 0.0, {"log_loss": float(np.mean(losses))}, {}, np.array(losses), name)


ARMS = [arm("lp_ft"), arm("full"), arm("full_from_probe")]


def begun(
    tried: Heats, arms: list[SimpleNamespace], probe: float | None = None, metric: str = "log_loss"
) -> _Progress:
    """Return a race whose arms have run some heats."""
    rival = None if probe is None else candidate([probe] * 4, "probe")
    begun = _Progress(arms, rival, SimpleNamespace(judge=Judge([], Criterion(metric))))
    begun.heats = tried
    return begun


def next_one(tried: Heats, arms: list[SimpleNamespace], probe: float | None) -> tuple[str | None, str]:
    chosen, reason = begun(tried, arms, probe).choose_next()
    return chosen and chosen.recipe.name, reason


@pytest.mark.parametrize("second", [0.41, 0.39])
def test_arms_run_two_heats_in_turns_but_the_one_from_the_probe_only_one_if_it_is_behind_by_then(second):
    order, tried = [], Heats()
    losses = {"lp_ft": [0.4] * 2, "full": [4.0] * 2, "full_from_probe": [0.5, second, 0.2, 0.1]}
    while (chosen := next_one(tried, ARMS, 0.45))[0] and len(order) < 9:
        order.append(chosen[0])
        tried = heats(**{arm.recipe.name: losses[arm.recipe.name][: order.count(arm.recipe.name)] for arm in ARMS})
    seen = ["lp_ft", "full", "full_from_probe", "full", "full_from_probe"] + ["lp_ft"] * (second > 0.4)
    assert (order, chosen[1]) == (seen + ["full_from_probe"] * 2, "its last heat")


def test_arm_that_promises_most_goes_on_and_others_only_where_it_breaks_its_promise():
    seen_twice = {"lp_ft": [0.4, 0.38], "full": [1.0, 0.4], "full_from_probe": [0.5, 0.3]}
    assert next_one(heats(**seen_twice), ARMS, 0.45)[0] == "full"
    assert next_one(heats(**seen_twice | {"full": [1.0, 0.4, 0.2]}), ARMS, 0.45)[0] == "full"
    assert next_one(heats(**seen_twice | {"full": [1.0, 0.4, 0.4]}), ARMS, 0.45)[0] == "full_from_probe"


def test_arm_from_the_probe_that_leads_by_now_is_seen_again_though_another_one_was_better_before():
    tried = heats(lp_ft=[0.4], full=[4.0, 4.0], full_from_probe=[0.39, 0.41])
    assert begun(tried, ARMS).leading().recipe.name == "lp_ft"
    assert next_one(tried, ARMS, 0.45) == ("lp_ft", "")


def test_second_heat_that_is_the_last_one_does_not_end_the_training_of_others():
    """As with `--max_steps 300` and 1,600 images, of which `full` takes 16 in a step and the others 32."""
    arms = [arm("lp_ft", (50, 150, 300)), arm("full", (100, 300)), arm("full_from_probe", (50, 150, 300))]
    steps = [("lp_ft", 50, 0.4), ("full", 100, 2.0), ("full_from_probe", 50, 0.5), ("full_from_probe", 150, 0.3)]
    tried = Heats(Heat(name, step, step / 50, loss, 0.9, 1.0) for name, step, loss in [*steps, ("full", 300, 1.0)])
    assert next_one(tried, arms, 0.45) == ("full_from_probe", "")
    tried.append(Heat("full_from_probe", 300, 6.0, 0.2, 0.9, 1.0))
    assert next_one(tried, arms, 0.45) == (None, "its last heat")


def test_last_heat_is_for_an_arm_that_is_not_behind():
    seen = {"lp_ft": [0.30, 0.299], "full": [1.2, 0.6, 0.32]}
    assert next_one(heats(**seen), ARMS[:2], 0.45) == (None, "no more gain in sight")
    assert next_one(heats(**seen | {"full": [1.2, 0.6, 0.31]}), ARMS[:2], 0.45)[0] == "full"


def test_last_heat_must_promise_a_tenth():
    """A power law through 0.4 and 0.37 leads to 0.345, 7% lower; one through 0.4 and 0.35 to 0.31, 11% lower."""
    assert next_one(heats(full=[0.6, 0.4, 0.37]), [arm("full")], None) == (None, "no more gain in sight")
    assert next_one(heats(full=[0.6, 0.4, 0.35]), [arm("full")], None) == ("full", "")


def test_probe_that_is_far_ahead_ends_the_race():
    tried = heats(lp_ft=[0.4], full=[1.0])
    assert next_one(tried, ARMS[:2], 0.4 / FAR - 0.01) == (None, "the probe far ahead")
    assert next_one(tried, ARMS[:2], 0.4 / FAR + 0.01) == ("full", "")
    assert next_one(heats(lp_ft=[0.4]), ARMS[:2], 0.01) == ("full", ""), "each arm is seen once"


def test_first_heat_that_leaves_little_to_gain_ends_the_race():
    little = ENOUGH - 0.001
    assert next_one(heats(lp_ft=[little]), ARMS, 0.05) == (None, "little left to gain")
    assert next_one(heats(lp_ft=[0.05], full=[little]), ARMS, 0.05) == (None, "little left to gain")
    assert next_one(heats(lp_ft=[ENOUGH]), ARMS, 0.05) == ("full", "")
    later = heats(lp_ft=[0.05], full=[0.06, little], full_from_probe=[0.05])
    assert next_one(later, ARMS, 0.05) == ("full_from_probe", ""), "later on the promises decide"
    alone = begun(heats(lp_ft=[little]), ARMS[:1]).choose_next()
    assert alone == (ARMS[0], ""), "a single recipe goes on as long as it pays"
    errors = begun(heats(lp_ft=[0.0]), ARMS, 0.05, "accuracy").choose_next()
    assert errors == (ARMS[1], ""), "few images are all right by chance"


@pytest.mark.parametrize(("last", "goes_on"), [(0.30, True), (0.399, False), (0.45, False), (math.nan, False)])
def test_race_ends_when_another_heat_promises_nothing(last, goes_on):
    expected = ("full", "") if goes_on else (None, "no more gain in sight")
    assert next_one(heats(full=[0.6, 0.4, last]), [arm("full")], 0.5) == expected


def test_race_ends_with_the_last_heat_of_an_arm():
    assert next_one(heats(full=[0.6, 0.5, 0.4, 0.3]), [arm("full")], None) == (None, "its last heat")
    tried = heats(full=[0.6, 0.5, 0.4, 0.3], lp_ft=[0.6, 0.3])
    assert next_one(tried, ARMS[:2], 0.5) == (None, "its last heat")
    single = [arm("lp_ft", (10,)), arm("full", (10,))]
    assert next_one(heats(lp_ft=[0.4]), single, 0.5) == ("full", "")
    assert next_one(heats(lp_ft=[0.4], full=[0.5]), single, 0.5) == (None, "its last heat")


def test_training_without_heats_goes_on_though_the_probe_is_far_ahead():
    tried = Heats([Heat("lp_ft", 100, 10.0, 0.5, 0.9, 1.0)])
    assert next_one(tried, [arm("lp_ft", (500,)), arm("full", (500,))], 0.01) == ("lp_ft", "")


def test_training_without_heats_that_the_time_limit_has_cut_short_goes_on_though_little_is_left():
    arms = [arm("lp_ft", (500,)), arm("full", (500,))]
    tried = Heats([Heat("lp_ft", 100, 10.0, ENOUGH - 0.001, 0.9, 1.0)])
    assert next_one(tried, arms, 0.05) == ("lp_ft", "")
    whole = Heats([tried[0]._replace(step=500, epochs=50.0)])
    assert next_one(whole, arms, 0.05) == (None, "little left to gain")


def test_training_without_heats_goes_on_however_often_the_time_limit_has_ended_it():
    tried = Heats(Heat("head", step, step / 10, loss, 0.9, 1.0) for step, loss in ((100, 0.50), (200, 0.49)))
    assert next_one(tried, [arm("head", (500,))], None) == ("head", "")


def test_arm_that_diverged_does_not_keep_others_from_going_on():
    assert next_one(heats(lp_ft=[math.nan, math.nan], full=[0.6, 0.4]), ARMS[:2], 0.5)[0] == "full"


def test_arm_that_leads_to_less_than_the_probe_does_not_go_on():
    assert next_one(heats(full=[0.60, 0.58]), [arm("full")], 0.3) == (None, "no more gain in sight")


def test_heat_after_a_named_checkpoint_is_expected_to_take_as_long_as_any():
    tried = heats(lp_ft=[0.4])
    assert begun(Heats(), ARMS).expected_seconds(arm("full"), 1) == 0
    assert begun(tried, ARMS).expected_seconds(arm("full"), 1) == 1.0
    assert begun(tried, ARMS).expected_seconds(arm("lp_ft"), 1) == 2.0


def course_in(folder: Path, **terms) -> Course:
    return Course(Judge([]), Stop(folder), folder, Stopwatch(), **terms)


def test_record_of_a_race_counts_for_the_same_arms_alone(tmp_path, caplog):
    tried, arms, course = heats(full=[0.5, 0.4]), [arm("full")], course_in(tmp_path, time_limit=5)
    assert read_record(course, arms) == ([], "", ())
    begun = {"arms": {"full": [10, 30, 70, 150]}, "options": {"seed": 1}, "time_limit": 5}
    text = json.dumps({**begun, "ended": "the time limit", "heats": [heat._asdict() for heat in tried]})
    (tmp_path / RACE).write_text(text)
    assert read_record(course, arms) == (tried, "the time limit", [])
    assert read_record(course, [arm("full", (10, 30, 300))]) == (tried, "", ()), "more epochs: it may go on"
    assert read_record(course, ARMS) == ([], "", ())
    assert not caplog.text
    edited = [text.replace('"time_limit": 5', '"time_limit": "5 min"'), text.replace('"step": 10', '"step": "ten"')]
    for damaged in ("", text[:-9], "[]", "{}", *edited, text.replace('"full": [', '"full", ['), "\xff"):
        (tmp_path / RACE).write_text(damaged, encoding="latin-1")
        assert read_record(course, arms) == ([], "", ())
        assert "race.json, which cannot be read" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(("limit", "ended"), [(5, "the time limit"), (4, "the time limit"), (6, ""), (None, "")])
def test_race_that_the_time_limit_ended_goes_on_with_more_time(tmp_path, limit, ended):
    arms = [SimpleNamespace(**vars(arm("full")), is_main_process=True)]
    write_record(course_in(tmp_path, time_limit=5), arms, heats(full=[0.5]), "the time limit")
    assert read_record(course_in(tmp_path, time_limit=limit), arms) == (heats(full=[0.5]), ended, [])
    write_record(course_in(tmp_path), arms, heats(full=[0.5]), "its last heat")
    assert read_record(course_in(tmp_path, time_limit=limit), arms)[1] == "its last heat"


def test_race_is_not_resumed_with_other_options(tmp_path):
    arms = [SimpleNamespace(**vars(arm("full")), is_main_process=True)]
    write_record(course_in(tmp_path, options={"balance": "auto", "none_class": None}), arms, [], "")
    assert read_record(course_in(tmp_path, options={"balance": "auto", "seed": 3}), arms) == ([], "", [])
    with pytest.raises(UserError, match="begun with --balance auto, and now there would be --balance weighted: give"):
        read_record(course_in(tmp_path, options={"balance": "weighted"}), arms)
    with pytest.raises(UserError, match="begun with no --none_class, and now there would be --none_class other"):
        read_record(course_in(tmp_path, options={"none_class": "other"}), arms)


def test_loss_that_is_no_number_never_wins():
    broken = candidate([math.nan] * 4, "full")
    assert broken.loss == math.inf
    assert predict_loss(*heats(full=[math.inf, 0.5]), 150) == 0.5
    assert begun(heats(full=[math.inf], lp_ft=[0.3]), ARMS).leading().recipe.name == "lp_ft"


def test_loss_that_is_corrected_by_too_much_is_zero():
    assert candidate([-0.5, 0.1]).loss == 0


def test_power_law_goes_through_both_heats_and_never_rises():
    first, second = heats(full=[0.8, 0.4])
    slope = math.log(0.5) / math.log(3)
    assert predict_loss(first, second, 7.0) == pytest.approx(0.4 * (7 / 3) ** slope)
    assert predict_loss(second, first._replace(epochs=7.0), 15.0) == 0.8


def test_probe_must_be_ahead_beyond_doubt():
    probe, better = candidate([0.4, 0.6, 0.5, 0.5], "probe"), candidate([0.3, 0.5, 0.4, 0.4])
    worse, doubtful = candidate([0.5, 0.7, 0.6, 0.65]), candidate([2.1, 0.01, 0.04, 0.01])
    assert choose(probe, [better]) is better and choose(probe, [worse]) is probe
    assert doubtful.loss > probe.loss and choose(probe, [doubtful]) is doubtful
    assert choose(probe, [worse, doubtful]) is doubtful
    assert choose(None, [doubtful, candidate([5.0, 5.0, 5.0, 5.0])]) is doubtful
    assert choose(probe, []) is probe


@pytest.mark.parametrize(("errors", "is_probe"), [(0.9 * LEAD, False), (1.1 * LEAD, True)])
def test_lead_of_the_probe_is_counted_in_standard_errors_of_the_difference(errors, is_probe):
    losses = np.array([0.0, 1.0, 0.0, 1.0]) + errors * 0.25  # their standard error is 0.25
    assert choose(candidate([0.5] * 4, "probe"), [candidate(losses)]).is_probe == is_probe


def test_weights_that_diverged_are_not_kept():
    broken, probe = candidate([math.nan] * 4), candidate([0.5] * 4, "probe")
    assert choose(probe, [broken]) is probe


@pytest.mark.parametrize(("broken", "kept"), [(["full"], "lp_ft"), (["full", "lp_ft", "full_from_probe"], None)])
def test_arm_whose_loss_is_not_finite_leaves_the_race(tmp_path, monkeypatch, capsys, broken, kept):
    def loss(name: str) -> float:
        if name in broken:
            raise NotFinite("its loss is not finite")
        return 0.4 if name == "lp_ft" else 0.6

    without_training(monkeypatch, lambda name, end: loss(name))
    arms, course = [in_folder(one, tmp_path) for one in ARMS], course_in(tmp_path)
    outcome, trainer = race(arms, candidate([0.5] * 4, "probe"), course, None)
    assert (outcome.winner and outcome.winner.arm.recipe.name) == kept and (trainer is None) == (kept is None)
    printed = capsys.readouterr().out
    assert all(f"{name} leaves the race: its loss is not finite" in printed for name in broken)
    assert not {heat.arm for heat in outcome.heats} & set(broken)
    if kept is None:
        assert outcome.ended == "no recipe left"
        with pytest.raises(NotFinite):  # nothing is left but the error
            race(arms, None, course, None)


def test_arm_that_has_left_does_not_return_when_the_run_is_resumed(tmp_path, monkeypatch):
    trained: list[str] = []

    def loss(name: str, end: int) -> float:
        trained.append(name)
        if name == "full" and end == 30:
            raise NotFinite("its loss is not finite")
        if name == "full_from_probe" and end == 30:
            raise KeyboardInterrupt  # the run is killed
        return 1 / end

    without_training(monkeypatch, loss)
    arms, probe = [in_folder(one, tmp_path) for one in ARMS], candidate([0.5] * 4, "probe")
    with pytest.raises(KeyboardInterrupt):
        race(arms, probe, course_in(tmp_path), None)
    assert trained[-2:] == ["full", "full_from_probe"]
    trained.clear()
    without_training(monkeypatch, lambda name, end: trained.append(name) or 1 / end)
    outcome, _ = race(arms, probe, course_in(tmp_path), "auto")
    assert "full" not in trained and "full_from_probe" in trained
    assert not outcome.heats.of("full")


def test_no_race_where_the_probe_leaves_little_to_gain(tmp_path):
    outcome, trainer = race(ARMS, candidate([0.01] * 4, "probe"), course_in(tmp_path), None)
    assert outcome.winner is trainer is None and not outcome.heats and "little to gain" in outcome.ended


def test_race_that_goes_back_removes_later_checkpoints_and_counts_as_unfinished(tmp_path, monkeypatch):
    named, card, checked = tmp_path / "checkpoint-20", tmp_path / "README.md", []
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"global_step": step}))
    card.touch()
    one = in_folder(arm("full"), tmp_path)
    one.origin, one.workshop = "origin", SimpleNamespace(copy=lambda: None)
    progress = _Progress([one], None, course_in(tmp_path), str(named))

    def refuse(*_):
        raise UserError("it is of another model")

    monkeypatch.setattr(module, "check_named", lambda *given: checked.append(given))
    monkeypatch.setattr(module, "load_weights", refuse)
    with pytest.raises(UserError, match="of another model"):
        progress.return_to(named)
    assert checked == [(named, "origin")] and len(checkpoints_by_step(tmp_path)) == 3 and card.exists()
    monkeypatch.setattr(module, "load_weights", lambda *_: None)
    progress.return_to(named)
    assert list(checkpoints_by_step(tmp_path)) == [20, 10] and not card.exists()


@pytest.mark.parametrize(("images", "says"), [(100, False), (20_000, True)])
def test_arms_have_folders_and_starts_of_their_own_and_large_batches_are_said(tmp_path, capsys, images, says):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, gradient_accumulation_steps=4)
    shop, rows = Workshop(nn.Module(), args, compute_metrics=None), {"train": range(images)}
    recipes = [RECIPES[name] for name in ("probe", "lp_ft", "full_from_probe", "full")]
    starts = {"probe": {"weight": 1}, "soft probe": {"weight": 2}}
    arms = module.plan_arms(recipes, shop, rows, starts)
    assert [one.recipe.name for one in arms] == ["lp_ft", "full_from_probe", "full"]
    assert [one.folder for one in arms] == [tmp_path / "race" / one.recipe.name for one in arms]
    assert [one.start for one in arms] == [starts["probe"], starts["soft probe"], None]
    said = " ".join(capsys.readouterr().out.split())
    assert ("batch images in a step of all processes, and learning rate: lp_ft 128 at 0.0006," in said) == says
    assert bool(said) == says
    (alone,) = module.plan_arms(recipes[:2], shop, rows, starts)
    assert alone.folder == tmp_path


def test_heat_is_that_of_the_best_of_its_weights():
    state = SimpleNamespace(global_step=10, epoch=1.0)
    mean, end = (
        candidate([loss] * 4)._replace(validation={"accuracy": accuracy})
        for loss, accuracy in ((0.4, 0.9), (0.5, 0.8))
    )
    for candidates in ([mean, end], [end, mean]):
        heat = module._describe(Trained(arm("full"), candidates, state), 1.23456)
        assert heat == Heat("full", 10, 1.0, 0.4, 0.9, 1.235)


def test_heats_after_a_named_checkpoint_do_not_count(tmp_path):
    arms = [SimpleNamespace(**vars(arm("full")), is_main_process=True)]
    write_record(course_in(tmp_path), arms, heats(full=[0.5, 0.4, 0.3]), "its last heat")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 30}')
    assert read_record(course_in(tmp_path), arms, tmp_path) == (heats(full=[0.5, 0.4]), "", ())


def test_heats_of_the_same_length_promise_nothing():
    assert predict_loss(Heat("full", 10, 1.0, 0.5, 0.9, 1.0), Heat("full", 10, 1.0, 0.4, 0.9, 1.0), 15) == 0.4


def test_seconds_of_heats_add_up_and_epochs_are_counted_from_the_start():
    tried = heats(full=[0.5, 0.4], lp_ft=[0.3])
    assert (tried.epochs("full"), tried.seconds("full"), tried.epochs("probe")) == (3.0, 2.0, 0.0)


def in_folder(arm: SimpleNamespace, folder: Path) -> SimpleNamespace:
    """Return an arm with what a race needs of it."""
    return SimpleNamespace(**vars(arm), is_main_process=True, folder=folder, training_args=None)


def without_training(monkeypatch, loss: Callable[[str, int], float]) -> None:
    """Let heats take no time, and end with the loss that a function gives for an arm's name and a step."""

    def train(self, arm, end, checkpoint):
        self.record()
        state = SimpleNamespace(global_step=end, epoch=end / 10, best_global_step=None)
        best = candidate([loss(arm.recipe.name, end)] * 4, arm.recipe.name)
        return Trained(arm, [best._replace(validation={"accuracy": 0.9})], state), SimpleNamespace()

    monkeypatch.setattr(_Progress, "_train", train)
    monkeypatch.setattr(module.EpochTable, "write_header", lambda args: None)
    monkeypatch.setattr(module, "newest_shared", lambda *_: None)


def run_race(tmp_path, monkeypatch, resume: str | None = None, **terms) -> tuple[Outcome, SimpleNamespace]:
    """Run a race of one arm that is trained in no time, and return its outcome and the arm."""
    without_training(monkeypatch, lambda name, end: 10 / end)
    one = in_folder(arm("full"), tmp_path)
    return race([one], None, course_in(tmp_path, **terms), resume)[0], one


def test_race_that_the_time_limit_ends_says_so(tmp_path, monkeypatch):
    outcome, one = run_race(tmp_path, monkeypatch, time_limit=0)  # the first heat is run in any case
    assert len(outcome.heats) == 1 and outcome.ended == NO_TIME
    assert read_record(course_in(tmp_path, time_limit=0), [one])[1] == NO_TIME


def test_heat_that_was_interrupted_counts_the_seconds_that_were_expected(tmp_path, monkeypatch):
    arms = [SimpleNamespace(**vars(arm("full")), is_main_process=True)]
    write_record(course_in(tmp_path), arms, heats(full=[0.5]), "")
    outcome, _ = run_race(tmp_path, monkeypatch, "auto")
    assert [heat.seconds >= 1 for heat in outcome.heats] == [True, True, False, False], "the first one of this part"


def test_heat_that_was_interrupted_counts_the_seconds_of_all_its_steps(tmp_path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 400}')
    clock = iter(range(0, 1_000, 10))
    without_training(monkeypatch, lambda name, end: 0.5)
    monkeypatch.setattr(module, "newest_shared", lambda *_: tmp_path)
    course = course_in(tmp_path)._replace(stopwatch=SimpleNamespace(total=lambda: next(clock)))
    outcome, _ = race([in_folder(arm("head", (500,)), tmp_path)], None, course, "auto")
    assert outcome.heats.seconds("head") == 50, "a fifth of the steps took 10 seconds"


def test_first_heat_runs_whatever_the_limit_is_only_where_there_is_no_probe(tmp_path, monkeypatch):
    without_training(monkeypatch, lambda name, end: 1 / end)
    arms = [in_folder(one, tmp_path) for one in ARMS]
    assert len(race(arms, None, course_in(tmp_path / "a", time_limit=0), None)[0].heats) == 1
    assert not race(arms, candidate([0.5] * 4, "probe"), course_in(tmp_path / "b", time_limit=0), None)[0].heats


@pytest.mark.parametrize(("seconds", "limit", "says"), [(60, None, True), (1, None, False), (60, 90, False)])
def test_race_says_how_long_it_may_go_on(tmp_path, monkeypatch, capsys, seconds, limit, says):
    """After 10 of 150 steps each: 60 more of all, and 80 more of one, at 6 seconds a step."""
    clock = iter(range(0, 100_000, seconds))
    without_training(monkeypatch, lambda name, end: 1 / end)
    course = course_in(tmp_path, time_limit=limit)._replace(
        stopwatch=SimpleNamespace(total=lambda: next(clock)), stop=Stop(tmp_path)
    )
    race([in_folder(one, tmp_path) for one in ARMS], candidate([0.5] * 4, "probe"), course, None)
    printed = capsys.readouterr().out
    assert ("it may take 26 minutes more" in printed) == says and printed.count("minutes more") == says


def test_race_that_ends_after_its_first_heats_is_not_said_to_go_on_and_does_not(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 100_000, 60))
    without_training(monkeypatch, lambda name, end: 0.03 if name == "full_from_probe" else 0.05)
    course = course_in(tmp_path)._replace(stopwatch=SimpleNamespace(total=lambda: next(clock)), stop=Stop(tmp_path))
    arms, probe = [in_folder(one, tmp_path) for one in ARMS], candidate([0.06] * 4, "probe")
    outcome, _ = race(arms, probe, course, None)
    assert len(outcome.heats) == 3 and outcome.ended == "little left to gain"
    assert outcome.winner.arm.recipe.name == "full_from_probe"
    assert "minutes more" not in capsys.readouterr().out
    again, _ = race(arms, probe, course, "auto")
    assert (again.heats, again.ended) == (outcome.heats, outcome.ended)
    assert again.winner.arm.recipe.name == "full_from_probe"


def test_longest_race_of_two_heats_has_the_second_one_of_every_arm(tmp_path, monkeypatch, capsys):
    """40 more steps for each of three arms, at 6 seconds a step."""
    clock = iter(range(0, 100_000, 60))
    without_training(monkeypatch, lambda name, end: 1 / end)
    course = course_in(tmp_path)._replace(stopwatch=SimpleNamespace(total=lambda: next(clock)), stop=Stop(tmp_path))
    arms = [in_folder(arm(name, (10, 50)), tmp_path) for name in ("lp_ft", "full", "full_from_probe")]
    race(arms, candidate([0.5] * 4, "probe"), course, None)
    assert "it may take 12 minutes more" in capsys.readouterr().out


def test_probe_must_be_ahead_in_more_than_a_few_groups():
    probe, best = candidate([0.0] * 4, "probe"), candidate([1.0, 1.0, -0.5, -0.5])
    together = probe._replace(groups=np.array([0, 0, 1, 1]))
    assert choose(probe, [best]) is probe and choose(together, [best]) is best


@pytest.mark.parametrize(
    ("tried", "kept", "expected"),
    [
        ({"full": [0.5], "lp_ft": [0.4]}, "probe", "the probe, which no recipe has beaten: 0.300"),
        ({"lp_ft": [0.4]}, "probe", "the probe, which lp_ft has not beaten: 0.300"),
        ({}, "probe", "the probe: 0.300"),
        ({"full": [0.5]}, "full", "full, the trained weights: 0.300"),
    ],
)
def test_what_is_kept_is_said_with_what_it_was_compared_with(capsys, tried, kept, expected):
    probe = candidate([0.3] * 4, "probe")
    console.say_race(Outcome(heats(**tried), "its last heat", probe), candidate([0.3] * 4, kept), Judge([]))
    assert f"kept     {expected}\n" in capsys.readouterr().out


def test_single_recipe_without_a_probe_is_no_race(capsys):
    console.say_race(Outcome(heats(full=[0.5]), "its last heat"), candidate([0.5] * 4), Judge([]))
    assert capsys.readouterr().out.startswith("trained  validation loss: full 0.500 (1 epoch, 1 s)\n")


def test_probe_that_is_ahead_by_chance_alone_is_said_to_be(capsys):
    outcome = Outcome(heats(full=[0.31]), "its last heat", candidate([0.3] * 4, "probe"))
    console.say_race(outcome, candidate([0.31] * 4), Judge([], LOG_LOSS._replace(metric="macro_f1")))
    said = " ".join(capsys.readouterr().out.split())
    assert "race 1 - macro F1 on validation: the probe 0.300, full 0.310" in said
    assert "kept full, the trained weights, because the probe is not clearly ahead: 0.310" in said


def test_weights_between_start_and_end_are_kept_as_they_were_scored(monkeypatch):
    monkeypatch.setattr("luthier.training.layers.linear_head", lambda model: "head")
    model = nn.ModuleDict({"head": nn.Linear(1, 1)})
    model.config = SimpleNamespace()
    start, end = (
        {"head.weight": torch.full((1, 1), value), "head.bias": torch.full((1,), value)} for value in (2.0, 6.0)
    )
    model.load_state_dict(end)
    between = candidate([0.4] * 4)._replace(share=0.25, temperature=2.0, threshold=0.3)
    winner = Trained(SimpleNamespace(start=start), [candidate([0.5] * 4), between], None)
    trainer = SimpleNamespace(model=model)
    kept, found = keep_best(Outcome(Heats(), "", None, winner), trainer, None, {})
    assert kept is between and found is trainer
    assert model["head"].weight.item() == model["head"].bias.item() == 1.5  # a fourth of the way is 3
    assert model.config.unsure_below == 0.3


@pytest.mark.parametrize(
    ("losses", "goes_on"),
    [([0.51, 0.5], False), ([0.6, 0.5], True), ([0.021, 0.02], False), ([0.03, 0.02], True)],
)
def test_more_training_must_promise_a_share_of_the_best_loss_and_more_than_next_to_nothing(losses, goes_on):
    expected = ("full", "") if goes_on else (None, "no more gain in sight")
    assert next_one(heats(full=losses), [arm("full")], None) == expected


@pytest.mark.parametrize(("step", "number"), [(10, 0), (29, 1), (30, 1), (31, 2), (150, 3), (200, 3)])
def test_heat_that_a_named_checkpoint_is_in_or_ends_is_the_next_one(tmp_path, step, number):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    state = begun(Heats(), [arm("full")])
    state.named = tmp_path
    assert state.next_heat(arm("full")) == number


@pytest.mark.parametrize("groups", [None, np.zeros(4, dtype=int)])
def test_lead_whose_error_is_unknown_is_no_lead(groups):
    losses = [0.2, 0.6, 0.4, 0.4] if groups is not None else [0.4]
    probe = candidate(losses, "probe")._replace(groups=groups)
    best = candidate([0.5, 0.4, 0.35, 0.3501] if groups is not None else [0.4001])
    assert choose(probe, [best._replace(losses=best.losses + 1e-3)]) is not probe
    assert choose(probe, [probe._replace(arm="full")]).arm == "full", "a draw"


def test_first_heat_is_expected_to_take_as_long_as_predictions_tell():
    state = begun(Heats(), ARMS)
    assert state.expected_seconds(ARMS[0], 0) == 0, "nothing was predicted"
    state.predicting = 0.01
    assert state.expected_seconds(ARMS[0], 0) == pytest.approx(3 * 0.01 * 10 * 32)
    state.heats = heats(full=[0.4])
    assert state.expected_seconds(ARMS[0], 0) == 1.0, "what was measured counts"


def test_training_in_one_heat_needs_time_for_an_epoch_alone():
    """It ends after the epoch in which the time is over."""
    state = begun(Heats(), [arm("head", (500,))])
    state.predicting = 0.01
    assert state.expected_seconds(arm("head", (500,)), 0) == pytest.approx(3 * 0.01 * 10 * 32)


def test_training_that_was_cut_short_needs_time_for_one_epoch_more():
    state = begun(Heats([Heat("head", 200, 20.0, 0.5, 0.9, 540.0)]), [arm("head", (500,))])
    assert state.expected_seconds(arm("head", (500,)), 0) == 27.0


def test_leader_wins_though_another_arm_has_run_the_last_heat(tmp_path, monkeypatch):
    losses = {("lp_ft", 10): 0.385, ("lp_ft", 30): 0.38}
    losses |= {("full", 10): 1.0, ("full", 30): 0.4, ("full", 70): 0.39}  # it breaks its promise
    without_training(monkeypatch, lambda name, end: losses[name, end])
    arms = [in_folder(one, tmp_path) for one in ARMS[:2]]
    outcome, trainer = race(arms, candidate([0.5] * 4, "probe"), course_in(tmp_path), None)
    assert outcome.heats[-1].arm == "full" and outcome.ended == "no more gain in sight"
    assert outcome.winner.arm.recipe.name == outcome.winner.candidates[0].arm == "lp_ft" and trainer is not None


@pytest.mark.parametrize(("only_trained", "expected"), [(True, (1.0,)), (False, (0.5, 1.0))])
def test_mean_with_the_start_is_a_candidate_unless_only_trained_weights_are(
    tmp_path, monkeypatch, only_trained, expected
):
    seen = []
    monkeypatch.setattr(module, "train", lambda *_: None)
    monkeypatch.setattr(module, "score_candidates", lambda trainer, rows, *rest: seen.append(rest[:2]) or [])
    one = in_folder(arm("lp_ft"), tmp_path)
    best = SimpleNamespace(best_global_step=10, global_step=20)
    one.trainer, one.rows, one.start = lambda: SimpleNamespace(state=best), {"validation": None}, {"weight": 0}
    state = _Progress([one], None, course_in(tmp_path, only_trained=only_trained))
    state._train(one, 10, None)
    state._train(one, 20, None)
    assert seen == [({"weight": 0}, expected)], "weights that are still the best are scored once"
