"""Books that do not add up."""


class IntegrityError(AssertionError):
    """A policy's books do not add up; the message shows the sum that fails. Always a bug of ours."""


def expect(what: str, kept: object, recounted: object) -> None:
    """Raise IntegrityError where a recount differs from what was kept."""
    if kept != recounted:
        raise IntegrityError(f"{what}: {kept} kept, {recounted} recounted")
