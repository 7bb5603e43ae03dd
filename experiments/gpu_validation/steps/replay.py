"""A small trace served end to end on real memory: what every allocator must agree on, token by token.

With memory for all requests the schedulers decide alike, so that every step has the same shapes and one kernel body
gives the same bits in both layouts: tokens must be equal. Short of memory requests are preempted at different steps;
batches differ then, and a matrix product of other shapes rounds otherwise, so that shares are reported.
"""

from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.served import ALLOCATORS, make_run, serve, uses
from kvarena.harness.model.build import build_model

__all__ = ["cases", "run", "uses"]

MEMORY = {"memory for all": 1.25, "short of memory": 0.15}  # pool, over a longest row for every request


def cases(device: str) -> list[str]:
    """With memory for all, and without."""
    return list(MEMORY)


def run(case: str, context: Context) -> Values:
    """Serve with each allocator and compare the tokens with those of the first."""
    run = make_run(context)
    model = build_model(run.model, context.device)
    served = {s.allocator.name: serve(run, s, model, MEMORY[case]) for s in run.systems}
    first = served[ALLOCATORS[0]].tokens
    values: Values = {}
    for allocator, one in served.items():
        agree = sum(one.tokens[i] == first[i] for i in first) / len(first)
        if agree < 1 and case == "memory for all":
            raise FailedError(
                f"{allocator} yields other tokens than {ALLOCATORS[0]} in {1 - agree:.0%} of the requests"
            )
        values[f"{allocator}, token/s"] = round(one.tokens_per_s, 1)
        values[f"{allocator}, preemptions"] = one.preemptions
        values[f"{allocator}, critical driver calls"] = one.driver_calls
        values[f"{allocator}, requests that agree"] = round(agree, 3)
    return values
