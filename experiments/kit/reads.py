"""What an experiment that serves requests reads of the configuration, clock by clock (`harness/run/unread.py`)."""

REPLAY = ("model", "trace", "arrival", "decoding", "engine", "device", "systems")


def reads(*more: str, decoding: bool = True) -> dict[str, tuple[str, ...]]:
    """Clock -> groups of keys. decoding: they say how each request is decoded, else the experiment does itself."""
    groups = tuple(group for group in REPLAY if decoding or group != "decoding") + more
    return {"modelled": groups, "measured": (*groups, "threads")}
