"""What became of a trace on its way into a replay: the one line that is told, and the record that is kept.

    read -> dropped -> cut -> taken, or repeated -> left out -> served
    drawn           -> cut                       -> left out -> served

Every count is of what the one before it has left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvarena.harness.trace.arrival import ArrivalConfig
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.recipes import NO_LIMIT
from kvarena.harness.trace.trace import Ints, Trace

_NAMED = 8  # fields of a file that are told by name


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How requests arrive, and who chose that."""

    config: ArrivalConfig  # with the seed that they are drawn with
    chosen: str = ""  # of harness/trace/file_arrivals.py; empty: nobody but the caller
    span_s: float = 0.0  # until the last arrives

    def __str__(self) -> str:
        """`artifact, 4/s for 900 s (asked for)`."""
        config = self.config
        said = config.process if config.rate is None else f"{config.process}, {config.rate:g}/s"
        if config.process == "recorded":
            said += f", over {self.span_s:g} s"
        elif config.duration_s is not None:
            said += f" for {config.duration_s:g} s"
        return f"{said} ({self.chosen})" if self.chosen else said


@dataclass(frozen=True, slots=True)
class TraceAccount:
    """Every record of a trace: lost on its way, or served. Lengths in tokens; means are of what is served."""

    name: str  # of conf/trace/
    source: str  # file, hub name, table or rule
    filter: str  # the recipe that was applied
    limit: int | None  # prompt + output that the context holds
    read: int | None  # records of a file; None where lengths are drawn
    kept: int | None  # of them, after all that is dropped
    asked: int | None  # requests asked for: by trace.num_requests, or as many as arrive; None: all there are
    taken: int  # of the kept, or as they are repeated; or drawn
    rounds: int  # times that the kept records are gone through; above 1 they are repeated
    served: int
    mean_prompt_tokens: float
    mean_output_tokens: float
    dropped: dict[str, int] = field(default_factory=dict)  # rule -> records
    cut: dict[str, int] = field(default_factory=dict)  # what, and to which length -> records, or draws
    left_out: dict[str, int] = field(default_factory=dict)  # rule -> requests that were taken, and cannot be served
    shuffled: bool = False
    arrivals: Arrivals | None = None  # None: nothing arrives, the lengths alone are used
    assumed: list[str] = field(default_factory=list)  # of a file's units, which nobody has said
    not_read: list[str] = field(default_factory=list)  # a file's fields that its format does not know

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "TraceAccount":
        """The account that `asdict` made plain, as JSON gives it back."""
        arrivals = plain["arrivals"]
        if arrivals is not None:
            arrivals = Arrivals(**{**arrivals, "config": ArrivalConfig(**arrivals["config"])})
        return cls(**{**plain, "arrivals": arrivals})

    @property
    def origin(self) -> str:
        """All but what depends on the seed, the rate and the number of requests: what a run tells once."""
        chosen = self.arrivals and (self.arrivals.config.process, self.arrivals.chosen)
        confined = self.limit if self.read is None else sorted(self.dropped.items())
        return f"{self.name} {self.source} {self.filter} {self.read} {confined} {chosen}"

    @property
    def losses(self) -> tuple[int, ...]:
        """What differs between replays of one origin, and must not grow in silence."""
        return self.rounds, sum(self.cut.values()), sum(self.left_out.values())

    def __str__(self) -> str:
        """The one line: `trace sharegpt, a.csv: 3000 read, 354 over 2048 dropped (filter fits_context), ...`."""
        cut = [f"{count} {what}" for what, count in self.cut.items()]
        left_out = [f"{count} {rule} left out" for rule, count in self.left_out.items()]
        parts = [self._records(), *cut, self._taken(), *left_out, self._served()]
        means = f"mean prompt {_tokens(self.mean_prompt_tokens)}, output {_tokens(self.mean_output_tokens)} tokens"
        line = f"trace {self.name}, {self.source}: {', '.join([*filter(None, parts), means])}"
        arrivals = [] if self.arrivals is None else [f"arrivals: {self.arrivals}"]
        assumed = [f"assumed: {each}" for each in self.assumed]
        return "; ".join([line, *arrivals, *assumed, *self._not_read()])

    def quantities(self) -> dict[str, tuple[float, str]]:
        """Name -> value and unit, for summary.csv: of records where there are any, of losses where there were."""
        records: dict[str, tuple[float, str]] = {}
        if self.read is not None:
            records = {
                "requests_read": (float(self.read), "records"),
                "requests_dropped": (float(sum(self.dropped.values())), "records"),
            }
        losses = {
            "lengths_cut": (float(sum(self.cut.values())), "lengths"),
            "requests_repeated": (float(max(0, self.taken - (self.kept or self.taken))), "requests"),
            "requests_left_out": (float(sum(self.left_out.values())), "requests"),
        }
        return records | {
            "requests_served": (float(self.served), "requests"),
            "mean_prompt_tokens": (self.mean_prompt_tokens, "tokens"),
            "mean_output_tokens": (self.mean_output_tokens, "tokens"),
            **{name: loss for name, loss in losses.items() if loss[0]},
        }

    def without(self, rule: str, count: int) -> "TraceAccount":
        """The account where `count` of the requests that were taken are left out, by one rule."""
        return replace(self, left_out={**self.left_out, rule: count}) if count else self

    def _not_read(self) -> list[str]:
        if not self.not_read:
            return []
        more = f" and {len(self.not_read) - _NAMED} more" if len(self.not_read) > _NAMED else ""
        return [f"not read: {', '.join(self.not_read[:_NAMED])}{more}"]

    def _records(self) -> str:
        if self.read is None:
            within = "" if self.limit is None else f" within {self.limit} tokens"
            return f"{self.taken} drawn{within} (filter {self.filter})"
        rules = [f"{count} {rule}" for rule, count in self.dropped.items()]
        named = "" if f"by {self.filter}" in self.dropped else f" (filter {self.filter})"
        return f"{self.read} read, {', '.join(rules or ['none'])} dropped{named}"

    def _taken(self) -> str:
        if self.kept is None or self.taken == self.kept:
            short = self.kept is not None and self.asked is not None and self.asked > self.taken
            return f"{self.taken} of {self.asked} asked for (not repeated)" if short else ""
        if self.taken > self.kept:
            return f"repeated to {self.taken} ({self.rounds} rounds)"
        return f"{'random' if self.shuffled else 'first'} {self.taken} of {self.kept} taken"

    def _served(self) -> str:
        left = self.taken - sum(self.left_out.values())
        return "" if self.served == left else f"first {self.served} of {left} served"


def account_of(
    config: TraceConfig, trace: Trace, asked: int | None = None, arrivals: Arrivals | None = None
) -> TraceAccount:
    """The account of requests that were loaded as `config` says; `trace` holds those served, and its provenance.

    asked: how many arrive, where arrivals say so.
    """
    facts, limit = trace.provenance, trace.provenance.get("max_total")
    return TraceAccount(
        name=config.name,
        source=trace.source,
        filter=facts.get("recipe", "none"),
        limit=None if limit == NO_LIMIT else limit,
        read=facts.get("read"),
        kept=facts.get("kept"),
        asked=config.num_requests if asked is None else asked,
        taken=facts["requests"],
        rounds=facts.get("rounds", 1),
        served=len(trace),
        mean_prompt_tokens=_mean(trace.prompt_tokens),
        mean_output_tokens=_mean(trace.output_tokens),
        dropped=_dropped(facts),
        cut=_cut(facts),
        shuffled=facts.get("shuffle", False),
        arrivals=arrivals,
        assumed=list(facts.get("assumed", ())),
        not_read=list(facts.get("not_read", ())),
    )


def _tokens(mean: float) -> str:
    return f"{mean:.4g}" if mean < 1000 else f"{mean:.0f}"


def _mean(lengths: Ints) -> float:
    return float(lengths.mean())


def _dropped(facts: Mapping[str, Any]) -> dict[str, int]:
    over = f"over {facts.get('max_total')}"
    by_filter = over if facts.get("recipe") == "fits_context" else f"by {facts.get('recipe')}"
    rules = (("malformed", "malformed"), ("without_request", "without a request"), ("failed", "failed with no output"),
             ("filtered", by_filter))  # fmt: skip
    counts = {rule: facts.get(key, 0) for key, rule in (*rules, ("over_long", over)) if facts.get(key)}
    return {rule: int(count) for rule, count in counts.items()}


def _cut(facts: Mapping[str, Any]) -> dict[str, int]:
    what = {
        f"prompts cut to {facts.get('cut_prompt')}": facts.get("prompts_cut"),
        f"outputs cut to {facts.get('cut_output')}": facts.get("outputs_cut"),
        f"cut to {facts.get('max_total')} in all": facts.get("cut"),
    }
    return {name: int(count) for name, count in what.items() if count}
