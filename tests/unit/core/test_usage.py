"""Hit rates out of sums, and sums by the minute."""

from __future__ import annotations

from kvmesh.core.usage import Usage, UsageLog


def test_without_lookups_there_is_no_rate():
    usage = Usage()
    assert (usage.achieved, usage.achievable, usage.achievable_alone, usage.achievable_error) == (None,) * 4


def test_rates():
    usage = Usage(requests=4, chunks=100, device_chunks=10, own_chunks=20, peer_chunks=30, new_chunks=25, new_alone=50)
    assert (usage.achieved, usage.achievable, usage.achievable_alone, usage.achievable_error) == (0.6, 0.75, 0.5, 0.0)


def test_what_was_achieved_was_achievable():
    """An estimate never says less than what has happened."""
    assert Usage(chunks=10, peer_chunks=8, new_chunks=5.0).achievable == 0.8


def test_the_error_grows_with_the_weight_of_a_sampled_key():
    usage = Usage(chunks=1000)
    for _ in range(100):
        usage.note_new(4.0)
    assert usage.new_chunks == 400.0
    assert usage.achievable_error is not None
    assert 0.06 < usage.achievable_error < 0.08  # 2 * sqrt(100 * 4 * 3) / 1000


def test_minutes_pass():
    log = UsageLog(minutes=3)
    for minute in range(5):
        log.add(Usage(requests=1, chunks=10), 60.0 * minute + 1)
    assert log.total.requests == 5
    assert log.over(60, 4 * 60 + 30).requests == 1
    assert log.over(120, 4 * 60 + 30).requests == 2
    assert log.over(3600, 4 * 60 + 30).requests == 3, "as many minutes as are kept"
    assert log.over(3600, 100 * 60).requests == 0
