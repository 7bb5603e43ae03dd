"""Live progress on stderr: a bar on a terminal, a line per stage elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Progress of one run."""

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._console = Console(stderr=True, force_jupyter=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, what: str) -> None:
        """Name what runs now."""
        self._bar.update(self._task, description=f"{self._name}: {what}")
        if not self._console.is_terminal:
            self._console.print(f"{self._name}: {what}", highlight=False, markup=False, emoji=False, soft_wrap=True)

    def advance(self, count: int = 1) -> None:
        """Count finished work."""
        self._bar.advance(self._task, count)
