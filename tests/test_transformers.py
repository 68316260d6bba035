"""The engine's logits agree with Hugging Face transformers, whose decoder layers are looped here in PyTorch.

A second oracle, which shares nothing with oracle.py: the layers, the rotary embedding and the experts are transformers',
upstream's own converter writes the GGUF files, and a loop is its textbook recursion over the whole prompt at once. Two
tiny random models in F32, qwen3 and qwen3moe. `make test-transformers` installs what this needs.
"""

import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from test_engine_moe import CASES, MIN_ROUTER_GAP
from test_engine_oracle import F32, ONE_THREAD, PLAINLY_DIFFERENT, TOLERANCE, UNITS, distance, evaluate

import edgeloop

REASON = "needs torch and transformers: make test-transformers"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

UPSTREAM = Path(__file__).parent.parent / "cmake" / "upstream.py"

N_LAYER, N_VOCAB = 6, 256
PROMPT = np.random.default_rng(0).integers(0, N_VOCAB, 20)
ONE_BY_ONE = tuple(range(1, len(PROMPT)))

TRANSFORMER = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attn_implementation": "eager",
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
CONFIGS = {
    "qwen3": partial(transformers.Qwen3Config, **TRANSFORMER),
    "qwen3moe": partial(transformers.Qwen3MoeConfig, **TRANSFORMER, **EXPERTS),
}
ARCHS = tuple(CONFIGS)
MODEL_SEED = 4

# writes model.gguf into each of the folders; there is no tokenizer, so upstream's step without one replaces its others
CONVERT = """
import sys

import convert_hf_to_gguf
from conversion.base import TextModel

def set_vocab_none(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2 = set_vocab_none
for folder in sys.argv[1:]:
    sys.argv[1:] = [folder, "--outtype", "f32", "--outfile", folder + "/model.gguf"]
    convert_hf_to_gguf.main()
"""


#
# solvers: g is a function here, so calling it twice with one x gives the same and is no pass of its own
#


def naive(g, x, passes):
    for _ in range(passes):
        x = g(x)
    return x


def euler(g, x, passes, step=None):
    h = step or 1 / passes
    for _ in range(passes):
        x = x + h * (g(x) - x)
    return x


def anchored(g, x, passes, beta=0.5):
    return beta * g(x) + (1 - beta) * euler(g, x, passes)


def heun(g, x, passes):
    h = 2 / passes
    for _ in range(passes // 2):
        k1 = g(x) - x
        end = x + h * k1
        k2 = g(end) - end
        x = x + h * (k1 + k2) / 2
    return x


def rk4(g, x, passes):
    def f(x):
        return g(x) - x

    h = 4 / passes
    for _ in range(passes // 4):
        k1 = f(x)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + h / 2 * k2)
        k4 = f(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


# what a spec says after the span -> what computes it
SOLVERS = {
    "x1:naive": partial(naive, passes=1),
    "x3:naive": partial(naive, passes=3),
    "x3:euler": partial(euler, passes=3),
    "x4:euler,step=0.5": partial(euler, passes=4, step=0.5),
    "x3:anchored": partial(anchored, passes=3),
    "x6:anchored,beta=0.2": partial(anchored, passes=6, beta=0.2),
    "x4:heun": partial(heun, passes=4),
    "x8:rk4": partial(rk4, passes=8),
}
SPANS = ((0, 1), (2, 3), (3, 5))  # start, middle, end


#
# transformers' layers in a loop
#


class FirstPass:
    """What the first pass over each layer made, which the later ones get again."""

    def __init__(self):
        self.keys_values = {}
        self.routed = {}

    def update(self, k, v, il, *_):
        """Takes the place of a transformers cache: gets a layer's K and V after RoPE, says what to attend to."""
        return self.keys_values.setdefault(il, (k, v))

    def route(self, router, inputs, output):
        """A hook that replaces a router's output."""
        if router not in self.routed:
            check_router(router, inputs, output)
            self.routed[router] = output
        return self.routed[router]


def check_router(router, inputs, _):
    """A hook that fails where float rounding could choose another expert, as in test_engine_moe.py."""
    ascending = (inputs[0] @ router.weight.T).sort().values
    gap = (ascending[:, -router.top_k] - ascending[:, -router.top_k - 1]).min()
    assert gap > MIN_ROUTER_GAP, f"a near-tie in the router, {gap:.1e}: choose another seed"


@torch.inference_mode()
def expect(model, span=(2, 3), solver="x3:naive", unit="block", kv="own", routing="free"):
    """Logits of all positions, shape (len(PROMPT), N_VOCAB)."""
    inner = model.model
    x = inner.embed_tokens(torch.tensor(PROMPT)[None])
    mask = torch.full((len(PROMPT), len(PROMPT)), -torch.inf).triu(1)[None, None]
    rotation = inner.rotary_emb(x, torch.arange(len(PROMPT))[None])
    first_pass = FirstPass()
    cache = first_pass if kv == "frozen" else None

    def g(x, layers):
        for il in layers:
            x = inner.layers[il](x, attention_mask=mask, position_embeddings=rotation, past_key_values=cache)
        return x

    first, last = span
    blocks = [range(first, last + 1)] if unit == "block" else [[il] for il in range(first, last + 1)]
    hook = first_pass.route if routing == "frozen" else check_router
    with ExitStack() as hooked:
        for router in routers(model):
            hooked.enter_context(router.register_forward_hook(hook))
        x = g(x, range(first))
        for layers in blocks:
            x = SOLVERS[solver](partial(g, layers=layers), x)
        x = g(x, range(last + 1, N_LAYER))
    return model.lm_head(inner.norm(x))[0].numpy()


def routers(model):
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]


@torch.inference_mode()
def plain(model):
    """The same from transformers' own forward pass, with nothing of ours in it."""
    return model(torch.tensor(PROMPT)[None], use_cache=False).logits[0].numpy()


@torch.no_grad()
def make_model(arch, n_layer=N_LAYER):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch](num_hidden_layers=n_layer)).eval()
    torch.manual_seed(MODEL_SEED)
    for name, parameter in sorted(model.named_parameters()):  # not in an order that depends on transformers' version
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=TRANSFORMER["hidden_size"] ** -0.5)
    return model


@pytest.fixture(scope="module")
def models():
    """arch -> transformers model"""
    return {arch: make_model(arch) for arch in ARCHS}


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    """The folder of upstream's converter, unpacked from the source distribution in the cache that the build filled."""
    spec = importlib.util.spec_from_file_location("edgeloop_upstream", UPSTREAM)
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    upstream.WANTED = [f"vendor/llama.cpp/{name}" for name in ("convert_hf_to_gguf.py", "conversion", "gguf-py")]
    folder = tmp_path_factory.mktemp("upstream")
    upstream.unpack(upstream.fetch(upstream.user_cache()), folder)
    return folder / "vendor" / "llama.cpp"


@pytest.fixture(scope="module")
def engines(models, converter, tmp_path_factory):
    """arch -> Llama that keeps the logits of all positions"""
    folders = {arch: tmp_path_factory.mktemp(arch) for arch in ARCHS}
    for arch, folder in folders.items():
        models[arch].save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *folders.values()], cwd=converter, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        arch: edgeloop.Llama(str(folder / "model.gguf"), logits_all=True, n_ctx=64, **F32, **ONE_THREAD)
        for arch, folder in folders.items()
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_off(engines, models, arch):
    assert distance(evaluate(engines[arch], "off", PROMPT), plain(models[arch])) < TOLERANCE
    assert distance(expect(models[arch], solver="x1:naive"), plain(models[arch])) < TOLERANCE


@pytest.mark.parametrize("split", ((), ONE_BY_ONE), ids=("one-batch", "one-by-one"))
@pytest.mark.parametrize("kv", ("frozen", "own"))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("arch, routing", CASES)
def test_solver(engines, models, arch, routing, solver, span, unit, kv, split):
    first, last = span
    spec = f"{first}-{last}{solver},unit={unit},kv={kv},routing={routing}"
    want = expect(models[arch], span, solver, unit, kv, routing)
    assert distance(evaluate(engines[arch], spec, PROMPT, split), want) < TOLERANCE


@pytest.mark.parametrize("arch", ARCHS)
def test_repeated_layers(engines, models, arch):
    """naive,kv=own is transformers' own forward pass through more layers."""
    model = models[arch]
    order = (0, 1, 2, 3, 2, 3, 2, 3, 4, 5)
    longer = make_model(arch, len(order))
    longer.model.embed_tokens, longer.model.norm = model.model.embed_tokens, model.model.norm
    longer.lm_head = model.lm_head
    for i, il in enumerate(order):
        longer.model.layers[i] = model.model.layers[il]
    assert distance(evaluate(engines[arch], "2-3x3:naive,kv=own", PROMPT), plain(longer)) < TOLERANCE


#
# controls: a comparison with the wrong thing fails
#


@pytest.mark.parametrize(
    "wrong",
    ({"solver": "x1:naive"}, {"solver": "x3:euler"}, {"span": (3, 4)}, {"unit": "layer"}, {"kv": "frozen"}),
    ids=str,
)
@pytest.mark.parametrize("arch", ARCHS)
def test_control_wrong_loop(engines, models, arch, wrong):
    got = evaluate(engines[arch], "2-3x3:naive,kv=own", PROMPT)
    assert distance(got, expect(models[arch], **wrong)) > PLAINLY_DIFFERENT


def test_control_wrong_routing(engines, models):
    for right, wrong in (("free", "frozen"), ("frozen", "free")):
        got = evaluate(engines["qwen3moe"], f"2-3x3:naive,kv=own,routing={right}", PROMPT)
        assert distance(got, expect(models["qwen3moe"], routing=wrong)) > PLAINLY_DIFFERENT


def test_control_weights_of_experts(engines, models, monkeypatch):
    """llama.cpp makes their sum 1 in every qwen3moe; norm_topk_prob=False is another model."""
    got = evaluate(engines["qwen3moe"], "2-3x3:naive,kv=own", PROMPT)
    for router in routers(models["qwen3moe"]):
        monkeypatch.setattr(router, "norm_topk_prob", False)
    assert distance(got, expect(models["qwen3moe"])) > PLAINLY_DIFFERENT


@pytest.mark.parametrize("unit", UNITS)
def test_control_solvers_are_told_apart(models, unit):
    logits = {solver: expect(models["qwen3"], (2, 3), solver, unit, "frozen") for solver in SOLVERS}
    for a, b in combinations(SOLVERS, 2):
        assert distance(logits[a], logits[b]) > 10 * TOLERANCE, f"{a} and {b} are too close to tell"
