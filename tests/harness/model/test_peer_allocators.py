"""Every allocator with every kernel that can read it: transformers' logits, and everyone's tokens."""

from functools import cache

import pytest
import torch

from kvarena.allocators.policy import Map, Policy
from kvarena.allocators.registry import allocator_names, config_class, make_policy
from kvarena.allocators.stores import make_store
from kvarena.harness.engine.engine import Engine
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import assemble, build_model
from kvarena.harness.model.contract import Model
from kvarena.harness.model.reference import Reference
from kvarena.harness.model.weights import weights_from_hf
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import config_class as scheduler_config
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import Executor
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel, kernel_names, kernel_spec, missing

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = (40, 500, 1, 7)  # tokens; while it decodes, the second crosses into another page-group of 64 KB
OUTPUT = 33  # one token of the prompt's step, 32 of decode steps
MAX_TOKENS = 1024
TOLERANCE = 1e-5  # of the largest logit: float32, summed in another order
FAMILIES = ("tiny-llama", "tiny-opt")
_HF_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
HF_SIZES = {
    "llama": _HF_COMMON | {"num_key_value_heads": 2, "intermediate_size": 128, "rms_norm_eps": 1e-5},
    "opt": _HF_COMMON | {"ffn_dim": 256, "word_embed_proj_dim": 64, "pad_token_id": None},
}


class Recorder(Executor):
    """Keeps the tokens of each request, the logits that each of its output tokens came from, and counts mappings."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.executor = executor
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.maps_of_decodes = 0

    def execute(self, plan):
        if not plan.prefills:
            self.maps_of_decodes += sum(isinstance(action, Map) for action in [*plan.actions, *plan.ahead])
        time = self.executor.execute(plan)
        rows = [(r, True) for r in plan.decodes] + [(chunk.request, chunk.is_last) for chunk in plan.prefills]
        for (request, is_ready), logits in zip(rows, self.executor.logits, strict=True):
            if is_ready:
                self.logits.setdefault(request.seq_id, []).append(logits)
        return time

    def finish(self, request):
        self.tokens[request.seq_id] = list(self.executor.known(request))
        self.executor.finish(request)


def serve(
    model: Model, allocator: str, kernel="numba", pool_tokens=16_384, scheduler="vllm", preemption=None, **policy
):
    """Serve PROMPTS, which all arrive at once. Returns the recorder and the number of preemptions."""
    config = config_class(allocator)(**{"name": allocator, **_small(allocator), **policy})
    kv_layout = model.config.kv_layout()
    memory = make_policy(config, kv_layout, pool_tokens * kv_layout.token_bytes, MAX_TOKENS)
    shape = (model.config.num_layers, model.config.num_kv_heads, model.config.head_size)
    store = make_store(memory, *shape, model.config.dtype)
    recorder = Recorder(TorchExecutor(model, store, get_kernel(kernel)))
    try:
        replay = Engine(_scheduler(scheduler, memory, preemption), recorder).run(
            Request(i, prompt, OUTPUT) for i, prompt in enumerate(PROMPTS)
        )
    finally:
        store.close()
    memory.check_integrity()
    assert all(request.state is RequestState.FINISHED for request in replay.requests)
    return recorder, sum(request.num_preemptions for request in replay.requests)


def _small(allocator: str) -> dict:
    return {"page_group": "64KB"} if allocator == "vattention" else {}


def _scheduler(name: str, memory: Policy, preemption: str | None) -> Scheduler:
    options = {"token_budget": 64, "max_seqs": 64} if name == "chunked_prefill" else {}
    options |= {"preemption": preemption} if preemption else {}
    return make_scheduler(scheduler_config(name)(name=name, **options), memory, MAX_TOKENS)


def scheduler_of(allocator: str) -> str:
    """The scheduler that the papers give an allocator; everything else runs under vLLM's."""
    return {"fastertransformer": "fastertransformer"}.get(allocator, "orca" if "orca" in allocator else "vllm")


def pairs() -> list[tuple[str, str]]:
    """Every allocator with every kernel that can read its layout, and runs here. `flex` has a test of its own."""
    kernels = [name for name in kernel_names() if name != "flex" and not missing(kernel_spec(name))]
    return [(a, k) for a in allocator_names() for k in kernels if reads(k, a)]


def reads(kernel: str, allocator: str) -> bool:
    return not fits(kernel_spec(kernel), layout_of(allocator), "cpu", "float32", head_size=16, block_size=16)


def layout_of(allocator: str) -> Layout:
    config = config_class(allocator)(name=allocator)
    return make_policy(config, load_preset("tiny-llama").kv_layout(), 64 << 20, MAX_TOKENS).memory_layout


@cache
def seeded_model(family: str) -> Model:
    return build_model(load_preset(family))


@cache
def reference_tokens(family: str) -> dict[int, list[int]]:
    """Tokens of each request, prompt and output, decoded greedily one by one over the plainest cache."""
    first, _ = serve(seeded_model(family), "static")
    tokens = {}
    for seq_id, prompt in enumerate(PROMPTS):
        reference, known = Reference(seeded_model(family)), first.tokens[seq_id][:prompt]
        fed = known
        for _ in range(OUTPUT):
            fed = reference.step({0: torch.tensor(fed)}).argmax(-1).tolist()
            known = known + fed
        tokens[seq_id] = known
    return tokens


def logits_of(recorder: Recorder) -> dict[int, torch.Tensor]:
    """Logits [OUTPUT, V] of each request."""
    return {seq_id: torch.stack(logits) for seq_id, logits in recorder.logits.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("allocator", "kernel"), pairs())
def test_every_system_generates_the_same_tokens(allocator, kernel, family):
    recorder, _ = serve(seeded_model(family), allocator, kernel, scheduler=scheduler_of(allocator))
    assert recorder.tokens == reference_tokens(family)
    assert allocator != "vattention" or recorder.maps_of_decodes > 0  # it grew while decoding


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, when it compiles
def test_a_kernel_that_compiles_for_half_a_minute_generates_the_same_tokens():
    if "flex" not in kernel_names() or missing(kernel_spec("flex")):
        pytest.skip("kernel=flex does not run here")
    recorder, _ = serve(seeded_model("tiny-llama"), "paged", "flex")
    assert recorder.tokens == reference_tokens("tiny-llama")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("body", sorted({kernel_spec(kernel).body for _, kernel in pairs()}))
def test_one_kernel_body_gives_the_same_bits_under_every_allocator(body, family):
    same_body = [(a, k) for a, k in pairs() if kernel_spec(k).body == body]
    first, *others = [logits_of(serve(seeded_model(family), a, k, scheduler=scheduler_of(a))[0]) for a, k in same_body]
    for (allocator, kernel), logits in zip(same_body[1:], others, strict=True):
        same = [torch.equal(logits[seq_id], first[seq_id]) for seq_id in first]
        assert all(same), f"{allocator}/{kernel} differs from {same_body[0]} in requests {same}"


@cache
def peer_and_ours(family: str):
    """A model of transformers with random weights, and ours with the same."""
    transformers = pytest.importorskip("transformers", reason="transformers, the peer, is a development dependency")
    config = load_preset(family)
    theirs = (transformers.LlamaForCausalLM if config.family == "llama" else transformers.OPTForCausalLM)(
        transformers.AutoConfig.for_model(config.family, **HF_SIZES[config.family], attn_implementation="eager")
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.4)
    return theirs.eval(), assemble(config, weights_from_hf(config, theirs.state_dict(), torch.device("cpu")))


@cache
def peer_logits(family: str, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits of the peer after each of a request's last OUTPUT tokens, from its own cache: [OUTPUT, V]."""
    peer, _ = peer_and_ours(family)
    prompt, fed = torch.tensor(tokens[: 1 - OUTPUT]), torch.tensor(tokens[1 - OUTPUT :])
    with torch.inference_mode():
        out = peer(prompt[None], use_cache=True)
        logits = [out.logits[0, -1]]
        for token in fed:
            out = peer(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocator", allocator_names())
def test_logits_equal_those_of_transformers_under_every_allocator(allocator, family):
    _, model = peer_and_ours(family)
    recorder, _ = serve(model, allocator, scheduler=scheduler_of(allocator))
    for seq_id, logits in logits_of(recorder).items():
        expected = peer_logits(family, tuple(recorder.tokens[seq_id][:-1]))  # the last token was never fed
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


ABLATIONS = {
    "blocks of 1": {"allocator": "paged", "block_size": 1},
    "blocks of 256": {"allocator": "paged", "block_size": 256},
    "page-groups of 2 MB": {"allocator": "vattention", "page_group": "2MB", "pool_tokens": 1 << 17},
    "tensor slicing": {"allocator": "vattention", "tensor_slicing": True},
    "no overlap": {"allocator": "vattention", "overlap": False},
    "no deferred reclamation": {"allocator": "vattention", "deferred_reclamation": False},
    "no eager allocation": {"allocator": "vattention", "eager_allocation": False},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_no_switch_of_an_allocator_changes_a_bit(ablation, family):
    changed, _ = serve(seeded_model(family), **ABLATIONS[ablation])
    plain, _ = serve(seeded_model(family), "static")
    assert all(torch.equal(logits, logits_of(plain)[seq_id]) for seq_id, logits in logits_of(changed).items())


TIGHT = {  # pools in which the four cannot stay to the end together
    "recompute": {"allocator": "paged", "pool_tokens": 600, "preemption": "recompute"},
    "swap": {"allocator": "paged", "pool_tokens": 600, "preemption": "swap", "swap_bytes": 4 << 20},
    "chunked prefill": {"allocator": "paged", "pool_tokens": 600, "scheduler": "chunked_prefill"},
    "vattention": {"allocator": "vattention", "pool_tokens": 2048, "watermark": 0.0},
}


@pytest.mark.parametrize("path", TIGHT)
def test_preempted_requests_come_back_with_the_same_tokens(path):
    recorder, preemptions = serve(seeded_model("tiny-llama"), **TIGHT[path])
    assert preemptions > 0
    assert recorder.tokens == reference_tokens("tiny-llama")


@pytest.mark.parametrize("allocator", ["static", "paged", "vattention"])
def test_prompts_in_chunks_give_the_same_tokens(allocator):
    recorder, _ = serve(seeded_model("tiny-llama"), allocator, scheduler="chunked_prefill")
    assert recorder.tokens == reference_tokens("tiny-llama")
