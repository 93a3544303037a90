"""Claims, leases and what becomes of rows: one worker each, none twice, none lost."""

import threading

import pytest

from dicom_node import worklist
from dicom_node.worklist.work import CLAIMS_CAP, NOTE_CLAIMS

NOTE = {"outcome": "declined", "finding": None, "probability": None}


def state(engine, scan_id):
    return worklist.row(engine, scan_id)["state"]


def test_a_claim_brings_all_that_the_worker_needs_and_hides_the_patient(camera, worker):
    scan_id = camera.send("a", "anterior").scan_id
    camera.send("p", "posterior")

    held = worker.claim()

    assert (held.scan_id, held.revision, held.reason, held.attempts, held.views) == (
        scan_id,
        2,
        None,
        0,
        "anterior,posterior",
    )
    assert (held.patient_id, held.issuer_of_patient_id, held.accession_number) == ("RMN-1", "HOSPITAL", "A-1")
    assert [one.sop_instance_uid for one in held.instances] == sorted(
        camera.facts(name).sop_instance_uid for name in ("a", "p")
    )
    assert held.instances[0].source_aet == "OPTIMA1"
    for secret in ("RMN-1", "Invented", "A-1"):
        assert secret not in repr(held)
    assert worklist.claim(camera.engine, "host:work", "boot-1") is None


def test_four_workers_never_hold_the_same_row(camera):
    sent = {camera.send(f"s{n}", minute=n, study_instance_uid=f"2.25.9{n}").scan_id for n in range(12)}
    taken = []
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        while (held := worklist.claim(camera.engine, f"w{number}", "b")) is not None:
            taken.append(held.scan_id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(taken) == sorted(sent)


def test_the_oldest_row_is_taken_first_and_one_that_has_to_wait_holds_nobody_up(camera, worker):
    ids = [camera.send(f"s{n}", study_instance_uid=f"2.25.8{n}").scan_id for n in range(3)]
    first = worker.claim()
    worklist.try_again(camera.engine, first, error="time-out", delay_s=300, max_attempts=3)

    assert [worker.claim().scan_id, worker.claim().scan_id] == ids[1:]
    due_s = worklist.next_work_in_s(camera.engine)
    assert due_s is not None
    assert 290 < due_s <= 300


def test_next_work_is_none_without_any_and_now_when_due(camera):
    assert worklist.next_work_in_s(camera.engine) is None
    camera.send("scan")
    assert worklist.next_work_in_s(camera.engine) == 0.0


def test_a_finding_goes_through_sending_to_delivered(camera, worker):
    scan_id = camera.send("scan").scan_id
    held = worker.claim()
    assert worker.finish(held, "pacs", "ris") == "sending"

    assert worker.deliver("pacs") == 2
    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["delivered_to"]) == ("sending", {"pacs": "acknowledged", "ris": "pending"})
    assert worker.deliver("ris") == 2

    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["outcome"], row["finding"], row["probability"]) == (
        "delivered",
        "analysed",
        "present",
        0.875,
    )
    assert (row["model"], row["delivered_to"]) == ("net 1", {"pacs": "acknowledged", "ris": "acknowledged"})
    assert [one["kind"] for one in row["results"]] == ["sr", "sc"]
    assert worklist.verify_events(camera.engine) == ()


@pytest.mark.parametrize(
    ("answer", "kinds", "to"),
    [
        ({}, ("sr",), "delivered"),
        (NOTE | {"reason": "low_counts"}, ("sr", "sc"), "declined"),
        (NOTE | {"outcome": "failed", "reason": "analysis_failed"}, ("sc",), "failed"),
        (NOTE | {"reason": "flood"}, (), "declined"),
        (NOTE | {"outcome": "failed", "reason": "gate_failed"}, (), "failed"),
    ],
)
def test_without_a_destination_a_row_rests_at_once_with_its_outcome(camera, worker, answer, kinds, to):
    scan_id = camera.send("scan").scan_id
    assert worker.finish(worker.claim(), kinds=kinds, **answer) == to
    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["reason"], len(row["results"])) == (to, answer.get("reason"), len(kinds))


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        ({"finding": None}, ("sr",)),
        ({"probability": None}, ("sr",)),
        ({"reason": "low_counts"}, ("sr",)),
        ({}, ()),
        ({"outcome": "declined", "reason": "low_counts"}, ("sr",)),
        (NOTE, ("sr",)),
        (NOTE | {"reason": "felt_wrong"}, ("sr",)),
    ],
)
def test_an_answer_that_contradicts_itself_is_not_written(camera, worker, answer, kinds):
    scan_id = camera.send("scan").scan_id
    held = worker.claim()
    with pytest.raises(ValueError, match=r"reason|finding|list"):
        worker.finish(held, "pacs", kinds=kinds, **answer)
    assert state(camera.engine, scan_id) == "analysing"


def test_attempts_are_counted_and_the_last_one_leaves_the_row_with_the_worker(camera, worker):
    scan_id = camera.send("scan").scan_id
    times = set()
    for attempt in (1, 2):
        held = worker.claim()
        times.add(held.analysed_at)
        assert held.attempts == attempt - 1
        assert worklist.try_again(camera.engine, held, error="killed", delay_s=0, max_attempts=3) == "queued"
    held = worker.claim()
    assert worklist.try_again(camera.engine, held, error="killed", delay_s=0, max_attempts=3) == "analysing"
    answer = NOTE | {"outcome": "failed", "reason": "analysis_failed", "last_error": "killed"}
    assert worker.finish(held, "pacs", **answer) == "sending"
    worker.deliver()

    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["attempts"], row["last_error"]) == ("failed", 3, "killed")
    assert len(times | {held.analysed_at}) == 1, "a later attempt must render the same bytes"


def test_a_worker_lost_after_the_last_attempt_leaves_a_note_to_be_made_not_an_analysis(camera, worker):
    camera.send("scan")
    held = worker.claim()
    worklist.try_again(camera.engine, held, error="killed", delay_s=0, max_attempts=1)
    assert worklist.release_owner(camera.engine, worker.owner, except_boot="boot-2") == 1
    assert worker.claim().reason == "analysis_failed"


def test_a_restarted_worker_frees_what_its_earlier_life_held_and_nothing_else(camera, worker):
    ids = [camera.send(f"s{n}", study_instance_uid=f"2.25.7{n}").scan_id for n in range(2)]
    mine = worker.claim()
    worklist.claim(camera.engine, "other:work", "boot-1")

    assert worklist.release_owner(camera.engine, worker.owner, except_boot="boot-1") == 0
    assert worklist.release_owner(camera.engine, worker.owner, except_boot="boot-2") == 1

    assert [state(camera.engine, scan_id) for scan_id in ids] == ["queued", "analysing"]
    assert worklist.heartbeat(camera.engine, mine) is False
    with pytest.raises(worklist.LeaseLost):
        worker.finish(mine, "pacs")
    with pytest.raises(worklist.LeaseLost):
        worklist.try_again(camera.engine, mine, error="x", delay_s=0, max_attempts=1)
    assert worklist.row(camera.engine, ids[0])["results"] == []


def test_a_lease_is_broken_only_where_its_counter_stands_still(camera, worker):
    camera.send("scan")
    held = worker.claim()
    (before,) = worklist.observe_leases(camera.engine)
    assert worklist.heartbeat(camera.engine, held) is True
    assert worklist.break_lease(camera.engine, before) is False

    (after,) = worklist.observe_leases(camera.engine)
    assert worklist.break_lease(camera.engine, after) is True
    assert worklist.observe_leases(camera.engine) == ()

    worker.claim()
    (fresh,) = worklist.observe_leases(camera.engine)
    assert worklist.break_lease(camera.engine, after) is False, "the same process, but another lease"
    assert worklist.break_lease(camera.engine, fresh) is True
    again = worker.claim()
    assert worklist.break_lease(camera.engine, fresh) is False, "no heartbeat since either claim, and yet another lease"
    assert worklist.heartbeat(camera.engine, held) is False
    assert worklist.heartbeat(camera.engine, again) is True


def test_a_scan_that_kills_every_worker_ends_with_a_note_or_with_a_person_but_ends(camera, worker):
    scan_id = camera.send("scan").scan_id
    for lost in range(1, CLAIMS_CAP + NOTE_CLAIMS + 1):
        held = worker.claim()
        assert held.reason == ("analysis_failed" if lost > CLAIMS_CAP else None)
        worklist.release_owner(camera.engine, worker.owner, except_boot="next")

    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["reason"], row["outcome"]) == ("failed", "analysis_failed", "failed")
    assert "note" in row["last_error"]
    assert worklist.claim(camera.engine, "x", "y") is None


@pytest.mark.parametrize("how", ["delivered", "declined", "failed"])
def test_a_retry_is_a_new_revision_that_starts_as_intake_left_it(camera, worker, how):
    scan_id = camera.send("scan").scan_id
    held = worker.claim()
    if how == "delivered":
        worker.finish(held, "pacs")
        worker.deliver()
    else:
        reason = {"declined": "low_counts", "failed": "gate_failed"}[how]
        worker.finish(held, **(NOTE | {"outcome": how, "reason": reason}))
    assert state(camera.engine, scan_id) == how

    assert worklist.retry(camera.engine, scan_id) == 2

    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["revision"], row["reason"], row["finding"], row["attempts"], row["results"]) == (
        "queued",
        2,
        None,
        None,
        0,
        [],
    )
    again = worker.claim()
    assert len(again.predecessors) == (2 if how == "delivered" else 0)
    assert len(worklist.details(camera.engine, scan_id)["results"]) == 2, "what was made stays on record"


def test_a_retry_of_a_scan_without_its_view_gives_a_note_again(camera, worker):
    waiting = camera.send("a", reason="unknown_view", frames=())
    worker.finish(worker.claim(), **(NOTE | {"reason": "unknown_view"}))
    worklist.retry(camera.engine, waiting.scan_id)
    assert worker.claim().reason == "unknown_view"


def test_a_retry_is_refused_with_a_sentence_where_it_cannot_help(camera, worker):
    waiting = camera.send("a", "anterior")
    kept = camera.send("ct", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", reason="wrong_class", frames=())
    for scan_id, why in (
        (waiting.scan_id, "still being worked on"),
        (kept.scan_id, "never analysed"),
        (999, "no scan"),
    ):
        with pytest.raises(worklist.TransitionRefused, match=why) as refusal:
            worklist.retry(camera.engine, scan_id)
        assert refusal.value.hint


def test_versions_with_the_same_content_change_nothing(camera, worker):
    scan_id = camera.send("scan").scan_id
    camera.send("scan", data="other syntax")
    (pending,) = worklist.pending_versions(camera.engine)

    worklist.judge_version(camera.engine, pending.instance_id, "same_content")

    assert worklist.pending_versions(camera.engine) == ()
    assert state(camera.engine, scan_id) == "queued"
    assert len(worker.claim().instances) == 1, "only the first bytes are analysed"
    worklist.judge_version(camera.engine, pending.instance_id, "other_pixels")
    assert worklist.details(camera.engine, scan_id)["instances"][1]["verdict"] == "same_content"


@pytest.mark.parametrize("when", ["receiving", "queued", "analysing", "sending", "delivered", "declined", "failed"])
def test_another_identity_stops_the_row_in_every_state_until_a_person_decides(camera, worker, when):
    view = "anterior" if when == "receiving" else "both"
    scan_id = camera.send("scan", view).scan_id
    held = worker.claim() if when not in ("receiving", "queued") else None
    if when in ("sending", "delivered"):
        worker.finish(held, "pacs")
    if when == "delivered":
        worker.deliver()
    if when in ("declined", "failed"):
        worker.finish(held, kinds=(), **(NOTE | {"outcome": when, "reason": "low_counts"}))
    camera.send("scan", view, data="another name")
    (pending,) = worklist.pending_versions(camera.engine)

    worklist.judge_version(camera.engine, pending.instance_id, "identity_changed")

    row = worklist.row(camera.engine, scan_id)
    assert (row["state"], row["reason"], row["finding"]) == ("failed", "identity_changed", None)
    assert worker.deliver() == 0
    if when == "analysing":
        with pytest.raises(worklist.LeaseLost):
            worker.finish(held, "pacs")
    with pytest.raises(worklist.TransitionRefused, match="two identities"):
        worklist.retry(camera.engine, scan_id)
    assert "identity_changed" in {one.event for one in worklist.events(camera.engine, scan_id)}
    # Another view does not decide it either.
    camera.send("more", "posterior")
    assert worklist.claim(camera.engine, "x", "y") is None
    assert state(camera.engine, scan_id) == "failed"


def test_other_pixels_are_an_alarm_and_leave_the_scan_alone(camera):
    scan_id = camera.send("scan").scan_id
    camera.send("scan", data="another image")
    (pending,) = worklist.pending_versions(camera.engine)
    worklist.judge_version(camera.engine, pending.instance_id, "other_pixels")
    assert state(camera.engine, scan_id) == "queued"
    assert "other_pixels" in {one.event for one in worklist.events(camera.engine, scan_id)}
    with pytest.raises(worklist.TransitionRefused):
        worklist.judge_version(camera.engine, 999, "other_pixels")
