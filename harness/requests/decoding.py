"""What a user may say of decoding; the files of conf/decoding/ are instances, and a property of each request."""

from dataclasses import dataclass

from kvarena.errors import UserError

METHODS = ("greedy", "parallel", "beam")
SURVIVALS = ("neutral", "one", "all")  # harness/decoding/survival.py says what they mean


@dataclass(frozen=True)
class DecodingConfig:
    """One method of decoding. Every sequence of a request ends at the trace's output length, as the papers force it.

    Raises UserError for what does not exist or is out of range.
    """

    name: str = "greedy"  # of METHODS
    n: int = 1  # samples, or the beam's width: sequences of one request
    temperature: float = 1.0  # of samples
    seed: int = 0  # of samples, and of a beam's survival under the modelled clock
    survival: str = "neutral"  # of SURVIVALS: which beams live on under the modelled clock

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.name not in METHODS:
            raise UserError(f"decoding={self.name}: no such method. There are: {', '.join(METHODS)}")
        if self.n < 1:
            what = "a beam's width" if self.name == "beam" else "the number of samples"
            raise UserError(f"decoding.n={self.n}: {what} is at least 1")
        if self.name == "greedy" and self.n > 1:
            raise UserError(
                f"decoding.n={self.n}: greedy decoding yields one sequence; decoding=parallel or beam, more"
            )
        if not self.temperature > 0:
            raise UserError(
                f"decoding.temperature={self.temperature}: must be above 0; decoding=greedy takes the likeliest"
            )
        if self.seed < 0:
            raise UserError(f"decoding.seed={self.seed}: a seed is a whole number, 0 or more")
        if self.survival not in SURVIVALS:
            raise UserError(f"decoding.survival={self.survival}: is none of {', '.join(SURVIVALS)}")

    @property
    def is_beam(self) -> bool:
        """Whether the sequences of a request compete."""
        return self.name == "beam"


GREEDY = DecodingConfig()
