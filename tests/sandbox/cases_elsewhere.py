"""Cases that one program alone cannot show."""

from __future__ import annotations

from cases import Elsewhere

CASES = [
    Elsewhere(10, "a sibling signalled, its files, its `/proc`", "not to be seen", "test_faults.py::test_siblings"),
    Elsewhere(18, "a symbolic link to fetch", "rejected, with the reason", "test_files.py::test_what_is_not_fetched"),
    Elsewhere(19, "`../` and absolute names", "ValueError before the run", "test_files.py::test_names"),
    Elsewhere(
        20, "FIFO, device, sparse file to fetch", "rejected or capped", "test_files.py::test_what_is_not_fetched"
    ),
    Elsewhere(21, "a file swapped while fetched", "never followed", "test_files.py::test_swapped"),
    Elsewhere(
        27,
        "an end that does not come",
        "answered by the deadline and 2 s, the slot set aside",
        "test_faults.py::test_slow_end",
    ),
    Elsewhere(43, "random numbers after fork", "differ", "test_faults.py::test_random_numbers"),
    Elsewhere(49, "the client goes away", "the run is killed", "test_faults.py::test_cancelled"),
    Elsewhere(50, "the zygote is killed", "started again; retried, else `infra`", "test_faults.py::test_zygote_killed"),
    Elsewhere(51, "many mixed runs", "none lost; stable memory and descriptors", "test_faults.py::test_mixed"),
    Elsewhere(52, "timeout 0, negative, NaN", "ValueError", "test_pool.py::test_impossible_timeouts_are_refused"),
    Elsewhere(90, "a keeper is killed", "the slot is built afresh", "test_faults.py::test_keeper_killed"),
    Elsewhere(91, "the launcher is killed", "started again", "test_faults.py::test_launcher_killed"),
    Elsewhere(92, "50 sessions", "each its own state", "test_sessions.py::test_many_sessions"),
]
