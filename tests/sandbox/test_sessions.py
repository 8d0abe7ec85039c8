"""Interpreters that stay, in every tier."""

from __future__ import annotations

from tiers import Worker


def test_state_is_kept_within_and_never_across(worker: Worker) -> None:
    worker.call("session_state", {"workers": 2})


def test_calls_of_one_session_come_one_after_another(worker: Worker) -> None:
    assert worker.call("session_order") == "".join(f"<{n}{n}>" for n in range(8)) + "\n"


def test_many_sessions(worker: Worker) -> None:
    worker.call("many_sessions", {"workers": 2, "memory_mb": 128}, sessions=50)


def test_sessions_left_open(worker: Worker) -> None:
    worker.call("sessions_left_open")


def test_idle_session_is_ended(worker: Worker) -> None:
    worker.call("session_idle", {"session_idle_s": 0.2})


def test_files_of_a_session(worker: Worker) -> None:
    found = worker.call("session_fetch")
    assert found == [{"a.txt": "one two"}, ["none"], "[]\n", {"a": "there is no such session"}]


def test_session_that_lost_its_zygote(worker: Worker) -> None:
    assert worker.call("session_loses_zygote") == ["infra", "infra", "2"]
