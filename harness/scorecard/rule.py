"""How near is near enough: a claim's tolerance around the published value, and the direction it states at least."""

import math
import re
from dataclasses import dataclass

from kvarena.errors import UserError

_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
_FORMS = {
    "abs": rf"abs {_NUMBER}",
    "rel": rf"rel {_NUMBER} %",
    "factor": rf"factor {_NUMBER}",
    "at most": rf"at most {_NUMBER}",
    "at least": rf"at least {_NUMBER}",
    "below": rf"below {_NUMBER}",
    "exact": "exact",
    "direction only": "direction only",
}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """`abs 2`, `rel 10 %`, `factor 1.5`, `at most 1.1`, `at least 10`, `below 1`, `exact` or `direction only`."""

    kind: str
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Tolerance":
        """Read one of the forms. Raises UserError with all of them."""
        for kind, form in _FORMS.items():
            if match := re.fullmatch(form, text):
                return cls(kind, float(match[1])) if match.groups() else cls(kind)
        raise UserError(f"tolerance {text!r}: none of {', '.join(form.replace(_NUMBER, 'N') for form in _FORMS)}")

    def told(self, unit: str) -> str:
        """As a reader sees it: within 2 points."""
        amount = f"{self.amount:g}"
        match self.kind:
            case "abs":
                return f"within {amount} {'points' if unit == '%' else '' if unit == 'x' else unit}".strip()
            case "rel":
                return f"within {amount} %"
            case "factor":
                return f"within a factor of {amount}"
            case "exact":
                return "exactly"
            case "direction only":
                return self.kind
        return f"{self.kind} {amount}"

    def met(self, value: float, published: float) -> bool:
        """Whether the value is near enough."""
        match self.kind:
            case "abs":
                return abs(value - published) <= self.amount
            case "rel":
                return abs(value - published) <= abs(published) * self.amount / 100
            case "factor":
                return value * published > 0 and abs(math.log(value / published)) <= math.log(self.amount)
            case "at most":
                return value <= self.amount
            case "at least":
                return value >= self.amount
            case "below":
                return value < self.amount
            case "exact":
                return math.isclose(value, published, rel_tol=1e-9)
        return False


@dataclass(frozen=True, slots=True)
class Direction:
    """`> 1`, `< 0` or `0.9 to 1.1`: what the claim says even where its number is missed."""

    low: float  # the value is above this ...
    high: float  # ... and below this

    @classmethod
    def parse(cls, text: str) -> "Direction | None":
        """Read one of the forms; None for an empty text. Raises UserError with all of them."""
        if not text:
            return None
        if match := re.fullmatch(rf"([<>]) {_NUMBER}", text):
            limit = float(match[2])
            return cls(limit, math.inf) if match[1] == ">" else cls(-math.inf, limit)
        if match := re.fullmatch(rf"{_NUMBER} to {_NUMBER}", text):
            return cls(float(match[1]), float(match[2]))
        raise UserError(f"direction {text!r}: none of > N, < N, N to N")

    @property
    def told(self) -> str:
        """As a reader sees it: above 1."""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        return f"below {self.high:g}" if math.isinf(self.low) else f"from {self.low:g} to {self.high:g}"

    def met(self, value: float) -> bool:
        """Whether the value lies there."""
        return self.low < value < self.high
