"""How long a request will become, as the three Orca baselines guess it (PagedAttention section 6.1)."""

from collections.abc import Callable

from kvarena.allocators.policy import Sequence
from kvarena.allocators.reservation.buddy import next_power_of_two
from kvarena.errors import UserError

ESTIMATES = ("max", "pow2", "oracle")


def check_estimate(estimate: str) -> None:
    """Raises UserError for a guess that nobody makes."""
    if estimate not in ESTIMATES:
        raise UserError(f"allocator.estimate: {estimate!r} is none of {', '.join(ESTIMATES)}")


def estimator(estimate: str, max_tokens: int) -> Callable[[Sequence], int]:
    """Tokens to reserve for a sequence: min(prompt + guessed output, max_tokens), where the guess is

    max      max_tokens: nothing is known
    pow2     the next power of two of the true output: at most twice too much
    oracle   the true output

    """
    guesses: dict[str, Callable[[int], int]] = {
        "max": lambda output_tokens: max_tokens,
        "pow2": next_power_of_two,
        "oracle": lambda output_tokens: output_tokens,
    }
    guess = guesses[estimate]
    return lambda seq: min(seq.prompt_tokens + guess(seq.output_tokens), max_tokens)
