"""A look as values: answered anywhere, dropped when it comes too late, and how many workers are wanted in the end."""

from collections.abc import Sequence

import pytest

from runtime.layout import layout_from_counts
from scheduler.planning.forecast import Device
from scheduler.planning.look import Answer, Question, Staffing, answer, without_room
from scheduler.planning.planner import plan
from scheduler.planning.plans import Plan
from scheduler.planning.sizing import num_wanted
from scheduler.planning.traffic import Slo, Traffic
from tests.unit.load_harness import FACTS, Phase, World, device, make

PRESENT = layout_from_counts(1, ["a", "l"], [4, 28])


def asked() -> tuple[World, Question]:
    """A world under load whose autopilot has a question, and it."""
    devices = [device("a", "a100"), device("l", "l40s")]
    world = World(make("off"), devices, devices, PRESENT, 0)
    world.run(Phase(30, 256, 256, clients=32))
    world.autopilot.set_mode(world.now_s, "on")
    question = world.autopilot.ask(world.now_s, devices, PRESENT)
    assert question is not None
    return world, question


def test_nothing_is_asked_while_an_answer_is_awaited() -> None:
    world, question = asked()
    pilot, later_s = world.autopilot, world.now_s + 60.0
    assert pilot.ask(later_s, question.devices, PRESENT) is None
    found = answer(question)
    assert found == answer(question), "a question always has the same answer"
    assert found.plan is not None
    assert found.plan.is_change
    pilot.heard(later_s, question, found, PRESENT)
    assert pilot.plan is found.plan
    assert pilot.regret_s > 0, "it counts towards a change"
    assert pilot.ask(later_s, question.devices, PRESENT) is not None


def test_whoever_watches_delays_no_decision() -> None:
    world, question = asked()
    pilot, now_s = world.autopilot, world.now_s
    pilot.heard(now_s, question, answer(question), PRESENT)
    for tenth in range(1, 20):
        assert pilot.question(now_s + tenth / 10, question.devices, PRESENT) is not None
    assert pilot.ask(now_s + 2.0, question.devices, PRESENT) is not None


def test_an_answer_for_a_layout_that_is_gone_is_dropped() -> None:
    world, question = asked()
    other = layout_from_counts(2, ["a", "l"], [5, 27])
    assert world.autopilot.heard(world.now_s + 1, question, answer(question), other) is None
    assert world.autopilot.heard(world.now_s + 1, question, answer(question), None) is None, "a change is under way"
    assert world.autopilot.plan is None
    assert world.autopilot.ask(world.now_s + 5, question.devices, other) is not None, "it asks again"


def test_a_planner_that_failed_changes_nothing() -> None:
    world, question = asked()
    assert world.autopilot.heard(world.now_s + 1, question, Answer(None, "the planner failed: why"), PRESENT) is None
    assert world.autopilot.log[-1].text == "the planner failed: why"


def test_gains_within_the_models_error_are_not_proposed() -> None:
    world, question = asked()
    devices = question.devices
    found = answer(question).plan
    assert found is not None
    certain = world.autopilot.question(world.now_s, devices, PRESENT, error=0.0)
    doubtful = world.autopilot.question(world.now_s, devices, PRESENT, error=found.gain * 1.1)
    assert certain is not None
    assert doubtful is not None
    kept = answer(doubtful).plan
    assert kept is not None
    assert not kept.is_change
    assert kept.within_error
    assert "within the model's own error" in kept.explain()


def test_staffing() -> None:
    """More after two looks that say so, fewer after a minute of them, and then as many as the most of that minute."""
    staffing = Staffing().after(0.0, 4, 3, 60.0)
    assert staffing.wanted == 3
    assert staffing.after(2.0, 5, 3, 60.0).wanted == 4
    assert staffing.after(2.0, 3, 3, 60.0) == Staffing(3)
    staffing = Staffing(3).after(0.0, 1, 3, 60.0).after(30.0, 2, 3, 60.0)
    assert staffing.wanted == 3
    assert staffing.after(60.0, 1, 3, 60.0).wanted == 2


def test_whoever_is_told_of_workers_hears_of_them_without_an_autopilot() -> None:
    devices = [device("a", "a100"), device("l", "l40s")]
    world = World(make("off", tells_workers=True), devices, devices, PRESENT, 0)
    world.run(Phase(60, 256, 256, clients=32))
    pilot = world.autopilot
    assert pilot.workers is not None
    assert pilot.workers.counts() == {"present": 2, "used": pilot.workers.used, "wanted": 2, "spare": 0}
    assert world.changes == []
    pilot.set_mode(world.now_s, "advise")
    pilot.set_mode(world.now_s, "off")
    assert pilot.workers is None, "what was said in another mode is no news"


@pytest.mark.parametrize("num_devices", [4, 20])
def test_no_more_workers_are_wanted_for_an_slo_that_nobody_meets(num_devices: int) -> None:
    """An autoscaler would add one after the other, for ever."""
    devices = [device(f"l{i}", "l4") for i in range(num_devices)]
    slo = Slo(2.0, 0.001)
    traffic = Traffic(requests_per_s=2.0, prompt_tokens=512, output_tokens=128, concurrency=0.0)

    def ask(devices: Sequence[Device], num_stages: int) -> Plan:
        return plan(FACTS, devices, traffic, objective="goodput", slo=slo, num_stages=num_stages)

    assert num_wanted(ask, devices, FACTS.num_layers, slo, num_devices) == num_devices


def test_workers_that_are_missed_soon_are_given_back_later_the_next_time() -> None:
    staffing, waits = Staffing(2), []
    now_s = 0.0
    for _ in range(6):
        began_s = now_s
        while staffing.wanted > 1:
            staffing = staffing.after(now_s, 1, 2, 60.0)
            now_s += 2.0
        waits.append(now_s - began_s)
        for _ in range(2):
            staffing = staffing.after(now_s, 2, 1, 60.0)
            now_s += 2.0
        assert staffing.wanted == 2
    assert [round(wait_s / 60) for wait_s in waits] == [1, 2, 4, 8, 8, 8]
    while now_s < 5000.0:  # it was right at last
        staffing = staffing.after(now_s, 1, 2, 60.0)
        now_s += 2.0
    for _ in range(2):
        staffing = staffing.after(now_s, 2, 1, 60.0)
    assert (staffing.wanted, staffing.regrets) == (2, 0)


def test_a_change_that_has_no_room_is_not_proposed() -> None:
    """What arrives is held beside what leaves and the page pool; the answer says who lacks the memory."""
    world, question = asked()
    found = answer(question).plan
    assert found is not None
    assert found.is_change
    facts = question.facts
    pool = 4 * 10**9
    tight = round(28.5 * facts.layer_bytes[0]) + facts.spec.embedding_bytes + facts.spec.lm_head_bytes + pool
    devices = [Device(d.worker, d.speed, tight, pool) for d in question.devices]
    cramped = world.autopilot.question(world.now_s, devices, layout_from_counts(1, ["l", "a"], [4, 28]))
    assert cramped is not None
    told = answer(cramped)
    assert told.plan is not None
    if told.plan.is_change:
        assert not without_room(cramped, told.plan.layout)
    backwards = layout_from_counts(1, ["a", "l"], [28, 4])
    assert "a has" in without_room(cramped, layout_from_counts(1, ["a", "l"], [20, 12]))
    assert without_room(cramped, cramped.present) == ""
    assert "GB of KV pages" in without_room(cramped, backwards)
