"""Places that are few."""

from contextlib import ExitStack

import pytest

from flowcontrol_server.common.places import NoPlaceError, Places


class TestPlaces:
    """So many in all, so many for each peer."""

    def test_limits(self) -> None:
        """Each limit is named when it is reached, and a place that is left is free."""
        places = Places(count_max=3, per_peer_max=2)
        with ExitStack() as stack:
            for peer in ("a", "a"):
                stack.enter_context(places.taken(peer))
            with pytest.raises(NoPlaceError, match="at most 2 at once from one address"):
                stack.enter_context(places.taken("a"))
            stack.enter_context(places.taken("b"))
            with pytest.raises(NoPlaceError, match=r"at most 3 at once$"):
                stack.enter_context(places.taken("c"))

        with places.taken("a"), places.taken("c"):
            pass
