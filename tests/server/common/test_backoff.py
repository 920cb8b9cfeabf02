"""Waits between tries."""

from flowcontrol_server.common.backoff import Backoff


class TestBackoff:
    """How long to wait."""

    def test_doubles_to_the_longest(self) -> None:
        """Each wait is twice the one before, up to the longest; luck takes up to half away."""
        backoff = Backoff(1, 5, lambda: 1.0)
        assert [backoff.next_s() for _ in range(4)] == [1, 2, 4, 5]

        backoff = Backoff(1, 5, lambda: 0.0)
        assert [backoff.next_s() for _ in range(4)] == [0.5, 1, 2, 2.5]

    def test_reset(self) -> None:
        """After a success it begins anew."""
        backoff = Backoff(1, 5, lambda: 1.0)
        backoff.next_s()
        backoff.next_s()
        backoff.reset()

        assert backoff.next_s() == 1
