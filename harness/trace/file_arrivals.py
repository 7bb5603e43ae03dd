"""When the requests of somebody's own file arrive: as the file records it, unless the user or the experiment says how.
A duration alone says no how: it cuts what is recorded.

The papers' own data, tables and given lengths keep the arrivals of the experiment. So do experiments whose axis the
arrivals are: no rate can be asked of times that are recorded.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvarena.harness.files.local_file import local_file
from kvarena.harness.trace.arrival import DRAWN, ArrivalConfig
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.load import load_trace
from kvarena.harness.trace.published_files import is_published

ASKED = "asked for"
RATES = "at the experiment's rates"
_EXPERIMENTS = "the experiment's"
_CUT = "arrival.duration_s"  # of any arrivals; every other key of theirs asks for how they are drawn


class Chosen(NamedTuple):
    """Arrivals, and who chose them."""

    arrival: ArrivalConfig
    by: str


def chosen_arrivals(
    trace: TraceConfig, arrival: ArrivalConfig, overrides: Sequence[str], context: int | None
) -> Chosen:
    """The arrivals of a run. `arrival` is the experiment's, with all that the user and the profile changed.

    overrides: the user's own, of the command line; context: tokens of the longest sequence; None: what the file has.
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if any(key.partition(".")[0] == "arrival" and key != _CUT for key in keys):
        return Chosen(arrival, ASKED)
    if trace.path is None or is_published(trace):
        return Chosen(arrival, _EXPERIMENTS)
    if arrival.process not in DRAWN:
        return Chosen(arrival, f"{_EXPERIMENTS}, which draws none")
    if arrival.rate is None:
        return Chosen(arrival, f"{_EXPERIMENTS}, whose axis they are")
    if local_file(trace.path) is None:  # a data set of the hub, or a mistake that loading it tells
        return Chosen(arrival, f"{_EXPERIMENTS}; only a local file's own are taken")
    if trace.tokenizer is not None:  # text, which is not counted twice: no format of text records a time
        return Chosen(arrival, f"{_EXPERIMENTS}; the file records none")
    records = load_trace(trace, context)
    if records.arrival_s is None:
        return Chosen(arrival, f"{_EXPERIMENTS}; the file records none")
    if records.provenance["rounds"] > 1:
        return Chosen(arrival, f"{_EXPERIMENTS}; the file has fewer requests than are asked for")
    return Chosen(ArrivalConfig("recorded", duration_s=arrival.duration_s if _CUT in keys else None), "the file's own")
