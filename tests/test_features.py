"""llama.cpp's features with a loop on: sequences, shifts, quantized K/V, adapters, embeddings, drafts, failures.

Mostly through the plain C functions. What is right comes from the same tokens evaluated without the feature, or from
the model with its layers physically repeated, which naive with kv=own has to equal bit for bit.
"""

import ctypes
import re
from unittest.mock import patch

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny
import tiny_more
from llama_cpp import LlamaGrammar
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from edgeloop import Loop, gguf_tools, native
from edgeloop.llama import native_arguments
from edgeloop.native import lib

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
ITEM_SIZES = {F32: 4, F16: 2, Q4_0: 18 / 32, Q8_0: 34 / 32}
ON, OFF = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
SETTINGS = {"n_ctx": 256, "type_k": F32, "type_v": F32, "flash_attn_type": OFF, "swa_full": True, "no_perf": False}

ARCHS = ["tiny_llama", "tiny_gemma3"]
SPANS = ["2-3x3", "4-5x2"]  # in the middle, and at the last of the six layers
KV_MODES = ["frozen", "own", "first", "last"]

PROMPT = [5 + 7 * i % 240 for i in range(20)]
ONE, TWO, THREE = [17, 99, 203], [40, 41, 250], [77, 3, 128]


class Context:
    """A model and one context, through the plain C functions: F32 K/V and no flash attention unless told."""

    def __init__(self, path, spec="off", **settings):
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_threads = params.n_threads_batch = 1
        for name, value in (SETTINGS | settings).items():
            setattr(params, name, value)
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.set_loop(spec)

    def close(self):
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def set_loop(self, spec):
        """True when the memory was cleared."""
        return native.set_loop(self.ctx, **native_arguments(Loop.parse(spec).resolve(self.n_layer)))

    def n_past(self, sequence):
        return llama_cpp.llama_memory_seq_pos_max(self.memory, sequence) + 1

    def try_decode(self, work, only_last=False):
        """llama_decode of one batch with tokens for each sequence, or tuple of sequences, after those that it has."""
        entries = []
        for key, tokens in work.items():
            sequences = key if isinstance(key, tuple) else (key,)
            n_past = self.n_past(sequences[0])
            for i, token in enumerate(tokens):
                entries.append((token, n_past + i, sequences, not only_last or i + 1 == len(tokens)))
        batch = llama_cpp.llama_batch_init(len(entries), 0, 8)
        batch.n_tokens = len(entries)
        for i, (token, position, sequences, is_output) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_output
            batch.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
        code = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        return code, [i for i, entry in enumerate(entries) if entry[3]]

    def decode(self, work, only_last=False):
        """The logits of all tokens, or of the last of each sequence, in the order of `work`."""
        code, outputs = self.try_decode(work, only_last)
        assert code == 0
        rows = [llama_cpp.llama_get_logits_ith(self.ctx, i) for i in outputs]
        return np.array([np.ctypeslib.as_array(row, (self.n_vocab,)) for row in rows])

    def rm(self, sequence, p0=-1, p1=-1):
        assert llama_cpp.llama_memory_seq_rm(self.memory, sequence, p0, p1)

    def cp(self, source, target, p0=-1, p1=-1):
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, p0, p1)

    def add(self, sequence, p0, p1, delta):
        assert llama_cpp.llama_memory_can_shift(self.memory)
        llama_cpp.llama_memory_seq_add(self.memory, sequence, p0, p1, delta)

    @property
    def n_reused(self):
        return llama_cpp.llama_perf_context(self.ctx).n_reused


@pytest.fixture
def context():
    opened = []

    def open_context(*args, **settings):
        opened.append(Context(*args, **settings))
        return opened[-1]

    yield open_context
    for c in opened:
        c.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def wide_llama(folder):
    """As tiny_llama, with heads of 64: quantized K/V needs 32, and llama.cpp crashes when it shifts less than 64."""
    head, n_head, n_head_kv = 64, 2, 1
    model = tiny.hyperparameters("llama", 6, rope_base=1e4)
    model["metadata"] |= {"attention.key_length": head, "attention.value_length": head}
    model["metadata"] |= {"attention.head_count": n_head, "attention.head_count_kv": n_head_kv}
    shapes = tiny.common_shapes(model) | {"output.weight": (len(tiny.VOCAB), tiny.N_EMBD)}
    for name in shapes:
        if name.endswith("attn_q.weight"):
            shapes[name] = (n_head * head, tiny.N_EMBD)
        elif name.endswith(("attn_k.weight", "attn_v.weight")):
            shapes[name] = (n_head_kv * head, tiny.N_EMBD)
        elif name.endswith("attn_output.weight"):
            shapes[name] = (tiny.N_EMBD, n_head * head)
    tiny.write(folder / "wide.gguf", model | tiny.random_tensors(shapes, 0))
    return str(folder / "wide.gguf")


@pytest.fixture(scope="module")
def recurrent(folder):
    tiny.write_mamba(folder / "tiny_mamba.gguf", n_layer=6)
    tiny_more.write_lfm2(folder / "tiny_lfm2.gguf")
    return {arch: str(folder / f"{arch}.gguf") for arch in ("tiny_mamba", "tiny_lfm2")}


@pytest.fixture
def as_duplicated(context, folder):
    """Checks that a function of a context gives the same bits looped and with the layers repeated in the file."""

    def check(path, span, run, **settings):
        spec = f"{span}:naive,kv=own"
        out = folder / f"{path}-{spec}".replace("/", "_")
        if not out.exists():
            gguf_tools.export(path, out, spec)
        looped = run(context(path, spec, **settings))
        assert np.array_equal(looped, run(context(out, **settings)))
        assert distance(run(context(path, **settings)), looped) > 1e-3  # the comparison can fail
        return looped

    return check


def distance(a, b):
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return np.abs(a - b).max() / np.abs(b).max()


def shared_or_split(n_sequences, is_unified):
    return {"n_seq_max": n_sequences, "kv_unified": is_unified, "n_ctx": 256 * n_sequences}


# ---- sequences ----


def copy_by_state(c, source, target):
    size = llama_cpp.llama_state_seq_get_size(c.ctx, source)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(c.ctx, data, size, source) == size
    assert llama_cpp.llama_state_seq_set_data(c.ctx, data, size, target) == size


@pytest.mark.parametrize("is_unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", [*ARCHS, "tiny_mamba", "tiny_lfm2"])
def test_a_copied_sequence_goes_on_as_the_original(arch, span, kv, is_unified, context, recurrent, request):
    path = recurrent.get(arch) or request.getfixturevalue(arch)
    spec = f"{span}:kv={kv}"
    for copy, flash in ((Context.cp, OFF), (copy_by_state, OFF), (copy_by_state, ON)):  # V is stored in another order
        expected = []
        for tokens in (ONE, TWO):
            alone = context(path, spec, flash_attn_type=flash)
            alone.decode({0: PROMPT})
            expected.append([alone.decode({0: [t]})[0] for t in tokens])
        c = context(path, spec, flash_attn_type=flash, **shared_or_split(3, is_unified))
        c.decode({2: THREE})
        c.decode({0: PROMPT})
        copy(c, 0, 1)
        rows = np.array([c.decode({0: [one], 1: [two]}) for one, two in zip(ONE, TWO)])
        # flash attention rounds to half precision on the way
        assert distance(rows.swapaxes(0, 1), np.array(expected)) < (1e-5 if flash == OFF else 1e-3), (copy, flash)


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_shared_beginning_and_a_removed_end(arch, span, kv, context, request):
    """A part of a sequence copied, its end replaced: as if only those tokens had ever been there."""
    path, spec, n = request.getfixturevalue(arch), f"{span}:kv={kv}", 12
    fresh = context(path, spec)
    fresh.decode({0: PROMPT[:n]})
    expected = fresh.decode({0: THREE})

    c = context(path, spec, **shared_or_split(3, True))
    c.decode({(0, 1): PROMPT})  # tokens of two sequences at once
    c.cp(0, 2, 0, n)
    c.rm(1, n)
    rows = c.decode({1: THREE, 2: THREE, 0: ONE})
    assert distance(rows[:3], expected) < 1e-5
    assert distance(rows[3:6], expected) < 1e-5

    c.rm(0)
    c.rm(2)
    c.decode({2: PROMPT[:n]})  # into cells that others have used
    assert distance(c.decode({2: THREE}), expected) < 1e-5
    c.rm(1, n)
    assert distance(c.decode({1: THREE}), expected) < 1e-5


@pytest.mark.parametrize("is_unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", [*ARCHS, "tiny_mamba", "tiny_lfm2"])
def test_several_sequences_in_a_batch(arch, span, kv, is_unified, context, recurrent, request):
    path = recurrent.get(arch) or request.getfixturevalue(arch)
    spec = f"{span}:kv={kv}"
    prompts = [PROMPT, PROMPT[::-1], PROMPT[3:] + THREE]
    if kv in ("frozen", "own"):  # the others may depend on how a batch is cut, and split K/V cuts it by length
        prompts = [PROMPT, PROMPT[9:], PROMPT[4:7]]
    c = context(path, spec, **shared_or_split(3, is_unified))
    steps = [c.decode(dict(enumerate(prompts)), only_last=True)]
    steps += [c.decode(dict(enumerate(tokens))) for tokens in zip(*([[t] for t in x] for x in (ONE, TWO, THREE)))]
    for s, tokens in enumerate((ONE, TWO, THREE)):
        alone = context(path, spec)
        rows = [alone.decode({0: prompts[s]}, only_last=True)] + [alone.decode({0: [t]}) for t in tokens]
        assert distance(np.array([step[s] for step in steps]), np.array([row[0] for row in rows])) < 1e-5, s


@pytest.mark.parametrize("kv", ["frozen", "own"])
@pytest.mark.parametrize("span", ["0-1x3", "2-3x3", "4-5x2"])
def test_recurrent_states_are_rolled_back(span, kv, context, recurrent):
    """lfm2 keeps the states of the last tokens when it is asked to, as a draft model needs it."""
    path, spec = recurrent["tiny_lfm2"], f"{span}:kv={kv}"
    fresh = context(path, spec)
    fresh.decode({0: PROMPT})
    expected = np.concatenate([fresh.decode({0: [t]}) for t in ONE])
    c = context(path, spec, n_rs_seq=3)
    c.decode({0: PROMPT + TWO})
    c.rm(0, len(PROMPT))
    assert distance(c.decode({0: ONE}), expected) < 1e-5
    c.rm(0, len(PROMPT) + 1)
    assert distance(c.decode({0: ONE[1:]}), expected[1:]) < 1e-5


@pytest.mark.parametrize("kv", ["frozen", "own"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ["tiny_gemma3", "tiny_mamba", "tiny_lfm2"])
def test_a_partial_state_is_a_checkpoint(arch, span, kv, context, recurrent, request):
    """What llama-server keeps of windows and recurrent states, to go back in a sequence without evaluating it anew."""
    path = recurrent.get(arch) or request.getfixturevalue(arch)
    settings = {"n_ctx": 1024, "n_ubatch": 32, "swa_full": False}
    many = PROMPT * 20  # more than the 256 cells of the window
    fresh, c = (context(path, f"{span}:kv={kv}", **settings) for _ in range(2))
    fresh.decode({0: PROMPT})
    c.decode({0: PROMPT})
    partial = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    size = llama_cpp.llama_state_seq_get_size_ext(c.ctx, 0, partial)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data_ext(c.ctx, data, size, 0, partial) == size
    c.decode({0: many})
    assert llama_cpp.llama_state_seq_set_data_ext(c.ctx, data, size, 0, partial) == size
    c.rm(0, len(PROMPT))
    assert c.n_past(0) == len(PROMPT)
    for tokens in (ONE, [7]):
        assert distance(c.decode({0: tokens}), fresh.decode({0: tokens})) < 1e-5


# ---- shifts ----


def shift(c):
    """Keep 4 tokens, drop 8."""
    c.decode({0: PROMPT})
    c.rm(0, 4, 12)
    c.add(0, 12, -1, -8)
    return np.concatenate([c.decode({0: ONE}), c.decode({0: [7]})])


def divide(c):
    """Two tokens to a position, as in self-extend."""
    c.decode({0: PROMPT})
    llama_cpp.llama_memory_seq_div(c.memory, 0, 0, 16, 2)
    c.add(0, 16, -1, -8)
    return np.concatenate([c.decode({0: ONE}), c.decode({0: [7]})])


@pytest.mark.parametrize("run", [shift, divide])
@pytest.mark.parametrize("span", ["0-1x2", *SPANS])
@pytest.mark.parametrize("arch", ["wide_llama", "tiny_gemma3"])
def test_a_shift_is_that_of_the_duplicated_model(arch, span, run, as_duplicated, request):
    path = request.getfixturevalue(arch)
    as_duplicated(path, span, run)
    as_duplicated(path, span, run, type_k=F16, type_v=F16, flash_attn_type=ON)
    if arch == "wide_llama":
        as_duplicated(path, span, run, type_k=Q8_0, type_v=Q8_0, flash_attn_type=ON)


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ARCHS)
def test_only_relative_positions_matter(arch, span, kv, context, request):
    """RoPE is relative: without the first tokens, the rest may be anywhere, as long as all K are turned once."""
    c = context(request.getfixturevalue(arch), f"{span}:kv={kv}", n_seq_max=2, kv_unified=True)
    rows = {}
    for delta in (0, -8, 100):
        c.rm(0)
        c.decode({0: PROMPT})
        c.rm(0, 0, 8)
        if delta:
            c.add(0, 8, -1, delta)
        rows[delta] = np.concatenate([c.decode({0: ONE}), c.decode({0: [7]})])
    assert distance(rows[-8], rows[0]) < 1e-4
    assert distance(rows[100], rows[0]) < 1e-4


# ---- K/V types, flash attention ----


def prompt_and_steps(c):
    return np.concatenate([c.decode({0: PROMPT}), c.decode({0: ONE}), *(c.decode({0: [t]}) for t in TWO)])


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    "type_k, type_v, flash",
    [(Q8_0, Q8_0, ON), (Q4_0, Q4_0, ON), (Q8_0, Q4_0, ON), (Q8_0, F16, OFF), (Q4_0, F16, OFF)],
)
def test_quantized_kv_is_that_of_the_duplicated_model(span, type_k, type_v, flash, wide_llama, as_duplicated, context):
    settings = {"type_k": type_k, "type_v": type_v, "flash_attn_type": flash}
    own = as_duplicated(wide_llama, span, prompt_and_steps, **settings)
    full = prompt_and_steps(context(wide_llama, f"{span}:naive,kv=own"))
    assert 1e-4 < distance(own, full) < 0.5
    for kv in ("frozen", "first", "last"):
        full = prompt_and_steps(context(wide_llama, f"{span}:kv={kv}"))
        assert distance(prompt_and_steps(context(wide_llama, f"{span}:kv={kv}", **settings)), full) < 0.5


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ["wide_llama", *ARCHS])
def test_flash_attention_changes_nothing(arch, span, as_duplicated, context, request):
    path = request.getfixturevalue(arch)
    half = {"type_k": F16, "type_v": F16}
    on, off = (as_duplicated(path, span, prompt_and_steps, flash_attn_type=f, **half) for f in (ON, OFF))
    assert distance(on, off) < 5e-3
    for kv in KV_MODES:
        on, off = (prompt_and_steps(context(path, f"{span}:kv={kv}", flash_attn_type=f)) for f in (ON, OFF))
        assert distance(on, off) < 5e-3, kv


def long_text(c):
    """More than the window's 256 cells, in pieces."""
    return np.concatenate([c.decode({0: PROMPT}) for _ in range(30)])


@pytest.mark.parametrize("span", ["0-1x2", *SPANS])
def test_cells_of_a_sliding_window_are_used_again(span, tiny_gemma3, as_duplicated, context):
    settings = {"n_ctx": 1024, "n_ubatch": 32, "swa_full": False}
    as_duplicated(tiny_gemma3, span, long_text, **settings)
    for kv in KV_MODES:
        rows = [long_text(context(tiny_gemma3, f"{span}:kv={kv}", **settings | {"swa_full": f})) for f in (False, True)]
        assert distance(*rows) < 1e-4, kv


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_to_later_tokens(arch, span, as_duplicated, request):
    def run(c):
        llama_cpp.llama_set_causal_attn(c.ctx, False)
        rows = c.decode({0: PROMPT})
        llama_cpp.llama_set_causal_attn(c.ctx, True)
        return np.concatenate([rows, c.decode({0: ONE})])

    as_duplicated(request.getfixturevalue(arch), span, run)


# ---- adapters ----

LORA_ALPHA, LORA_SCALE, LORA_RANK = 8.0, 0.5, 4


def write_lora(path, arch, pairs):
    """pairs: name of a weight -> (A, B), for W + scale * alpha / rank * B A"""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", LORA_ALPHA)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_lora(model, names):
    rng = np.random.default_rng(3)
    pairs = {}
    for name in names:
        *experts, n_out, n_in = model[name].shape
        a, b = rng.normal(0, n_in**-0.5, (*experts, LORA_RANK, n_in)), rng.normal(0, 0.3, (*experts, n_out, LORA_RANK))
        pairs[name] = a.astype(np.float32), b.astype(np.float32)
    return pairs


def set_lora(c, path):
    """None takes it away."""
    adapters = []
    if path is not None:
        adapters.append(llama_cpp.llama_adapter_lora_init(c.model, str(path).encode()))
        assert adapters[0]
    n = len(adapters)
    array = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(*adapters)
    assert llama_cpp.llama_set_adapters_lora(c.ctx, array, n, (ctypes.c_float * 1)(LORA_SCALE)) == 0


def renumbered(pairs, order):
    """The entries of the physical layers for each layer of the duplicated model."""
    names = [(f"blk.{i}.", f"blk.{il}.") for i, il in enumerate(order)]
    return {name.replace(old, new): pairs[name] for new, old in names for name in pairs if name.startswith(old)}


LORA_NAMES = {
    "llama": ["attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_down.weight"],
    "qwen3moe": ["attn_k.weight", "attn_output.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"],
}


@pytest.mark.parametrize("arch", LORA_NAMES)
@pytest.mark.parametrize("span", SPANS)
def test_lora(span, arch, tmp_path, context):
    base, merged, adapter = (tmp_path / f"{name}.gguf" for name in ("base", "merged", "lora"))
    model = (tiny.write_llama if arch == "llama" else tiny_more.write_qwen3moe)(base)
    pairs = random_lora(model, [f"blk.{il}.{name}" for il in (1, 2, 5) for name in LORA_NAMES[arch]])
    write_lora(adapter, arch, pairs)
    factor = np.float32(LORA_SCALE * LORA_ALPHA / LORA_RANK)
    tiny.write(merged, model | {name: model[name] + factor * (b @ a) for name, (a, b) in pairs.items()})

    # the weights themselves, in every mode
    for keys in [f"kv={kv}" for kv in KV_MODES] + (["routing=frozen"] if arch == "qwen3moe" else []):
        c = context(base, f"{span}:{keys}")
        plain = prompt_and_steps(c)
        c.rm(0)
        set_lora(c, adapter)  # between two decodes
        adapted = prompt_and_steps(c)
        assert distance(adapted, prompt_and_steps(context(merged, f"{span}:{keys}"))) < 1e-4, keys
        assert distance(adapted, plain) > 1e-2
        c.rm(0)
        set_lora(c, None)
        assert np.array_equal(prompt_and_steps(c), plain)

    # bit for bit: the duplicated model with an adapter for all its layers
    spec, duplicated = f"{span}:naive,kv=own", tmp_path / "duplicated.gguf"
    order = gguf_tools.export(base, duplicated, spec)
    write_lora(tmp_path / "lora2.gguf", arch, renumbered(pairs, order))
    looped, repeated = context(base, spec), context(duplicated)
    set_lora(looped, adapter)
    set_lora(repeated, tmp_path / "lora2.gguf")
    assert np.array_equal(prompt_and_steps(looped), prompt_and_steps(repeated))


def set_control_vector(c, directions, first=1, last=None):
    """directions: layer -> what is added after it; llama.cpp has none for layer 0."""
    data = np.zeros((c.n_layer - 1, c.n_embd), np.float32)
    for il, direction in directions.items():
        data[il - 1] = direction
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(c.ctx, pointer, data.size, c.n_embd, first, last or c.n_layer - 1) == 0


@pytest.mark.parametrize("span", ["1-2x3", *SPANS, "2-3x2:unit=layer"])
def test_control_vector(span, tmp_path, context):
    model = tiny.write_llama(tmp_path / "base.gguf")
    rng = np.random.default_rng(4)
    directions = {il: rng.normal(0, 0.5, tiny.N_EMBD).astype(np.float32) for il in (1, 3, 4, 5)}
    separator = "," if ":" in span else ":"

    # bit for bit: the duplicated model, with a vector for all its layers; the range of layers counts as well
    spec = f"{span}{separator}kv=own".replace(":", ":naive,")
    order = gguf_tools.export(tmp_path / "base.gguf", tmp_path / "duplicated.gguf", spec)
    looped, repeated = context(tmp_path / "base.gguf", spec), context(tmp_path / "duplicated.gguf")
    plain = prompt_and_steps(looped)
    for first, last in ((1, 5), (2, 4)):
        looped.rm(0)
        repeated.rm(0)
        used = {il: d for il, d in directions.items() if first <= il <= last}
        set_control_vector(looped, directions, first, last)
        set_control_vector(repeated, {i: used[il] for i, il in enumerate(order) if il in used})
        rows = prompt_and_steps(looped)
        assert np.array_equal(rows, prompt_and_steps(repeated))
        assert distance(rows, plain) > 1e-2

    # in every mode: a bias of the layers' last matrix is the same thing
    tiny.write(tmp_path / "bias.gguf", model | {f"blk.{il}.ffn_down.bias": d for il, d in directions.items()})
    for kv in KV_MODES:
        spec = f"{span}{separator}kv={kv}"
        c = context(tmp_path / "base.gguf", spec)
        set_control_vector(c, directions)
        assert distance(prompt_and_steps(c), prompt_and_steps(context(tmp_path / "bias.gguf", spec))) < 1e-5, kv


# ---- embeddings ----


@pytest.mark.parametrize("pooling", ["NONE", "MEAN", "LAST"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ARCHS)
def test_embeddings_are_those_of_the_duplicated_model(arch, span, pooling, as_duplicated, context, request):
    pooling_type = getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{pooling}")
    prompts = {0: PROMPT, 1: PROMPT[5:], 2: THREE}

    def embed(c):
        code, outputs = c.try_decode(prompts)
        assert code == 0
        if pooling == "NONE":
            rows = [llama_cpp.llama_get_embeddings_ith(c.ctx, i) for i in outputs]
        else:
            rows = [llama_cpp.llama_get_embeddings_seq(c.ctx, s) for s in prompts]
        return np.array([np.ctypeslib.as_array(row, (c.n_embd,)) for row in rows])

    settings = {"embeddings": True, "pooling_type": pooling_type}
    path = request.getfixturevalue(arch)
    for is_unified in (False, True):  # split K/V cuts the batch by length, and means are upstream's of the last piece
        # four: upstream aborts when it pools with a batch size that is no multiple of the sequences
        together = as_duplicated(path, span, embed, **settings, **shared_or_split(4, is_unified))
    if pooling != "NONE":
        llm = context(path, f"{span}:naive,kv=own", **settings)
        for s, tokens in prompts.items():
            llm.rm(0)
            llm.try_decode({0: tokens})
            alone = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(llm.ctx, 0), (llm.n_embd,))
            assert distance(together[s], alone) < 1e-5


def test_embeddings_through_python(tiny_llama, load, tmp_path):
    spec = "4-5x2:naive,kv=own"
    gguf_tools.export(tiny_llama, tmp_path / "duplicated.gguf", spec)
    texts = ["hello", "a longer text", "x"]
    for pooling_type in (llama_cpp.LLAMA_POOLING_TYPE_NONE, llama_cpp.LLAMA_POOLING_TYPE_MEAN):
        options = {"embedding": True, "pooling_type": pooling_type}
        looped, repeated = load(tiny_llama, loop=spec, **options), load(tmp_path / "duplicated.gguf", **options)
        assert looped.embed(texts) == repeated.embed(texts) != load(tiny_llama, **options).embed(texts)


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
def test_embeddings_instead_of_tokens(span, kv, tmp_path, context):
    """As a vision model's: the rows of the embedding matrix give what the tokens give."""
    model = tiny.write_llama(tmp_path / "llama.gguf")
    c = context(tmp_path / "llama.gguf", f"{span}:kv={kv}")
    expected = prompt_and_steps(c)[len(PROMPT) :]
    c.rm(0)
    batch = llama_cpp.llama_batch_init(len(PROMPT), c.n_embd, 1)
    batch.n_tokens = len(PROMPT)
    np.ctypeslib.as_array(batch.embd, (len(PROMPT), c.n_embd))[:] = model["token_embd.weight"][PROMPT]
    for i in range(len(PROMPT)):
        batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i, 1, False
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(c.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)
    assert distance(np.concatenate([c.decode({0: ONE}), *(c.decode({0: [t]}) for t in TWO)]), expected) < 1e-5


# ---- grammars and drafts, with the demo model ----


@pytest.mark.parametrize("spec", ["12-14x3", "12-14x3:naive,kv=own", "28-29x2:kv=last"])
def test_grammar(spec, demo_model, load):
    llm = load(demo_model, loop=spec)
    grammar = LlamaGrammar.from_string("root ::= [0-9]{8} [a-c]", verbose=False)
    for options in ({"temperature": 0}, {"temperature": 1.5, "seed": 1}):
        text = llm("Some animals:", max_tokens=32, grammar=grammar, **options)["choices"][0]["text"]
        assert re.fullmatch("[0-9]{8}[a-c]", text)


@pytest.mark.parametrize("spec", ["12-14x3", "12-14x3:naive,kv=own", "28-29x2:kv=own"])
def test_a_draft_changes_nothing(spec, demo_model, load):
    text = "one two three four five six seven one two three four five six seven one two"
    answers, n_evals = [], []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=4)):
        llm = load(demo_model, loop=spec, draft_model=draft)
        with patch.object(llm, "eval", wraps=llm.eval) as evaluate:
            answers.append(llm(text, max_tokens=24, temperature=0)["choices"][0]["text"])
        n_evals.append(evaluate.call_count)
    assert answers[0] == answers[1]
    assert n_evals[1] < n_evals[0]  # drafted tokens were accepted


# ---- memory and graphs ----


@pytest.mark.parametrize("type_k, type_v", [(F32, F32), (F16, F16), (Q8_0, Q4_0)])
@pytest.mark.parametrize("is_unified", [True, False])
def test_memory_of_kv(type_k, type_v, is_unified, wide_llama, context):
    settings = {"type_k": type_k, "type_v": type_v, "flash_attn_type": ON} | shared_or_split(3, is_unified)
    c = context(wide_llama, **settings)
    cell = 64 * (ITEM_SIZES[type_k] + ITEM_SIZES[type_v])
    for spec, n_slots in (("2-3x3", 4), ("0-0x2+4-5x4", 7), ("2-3x3:unit=layer", 4), ("1-2x1", 0)):
        for kv in KV_MODES:
            c.set_loop(f"{spec}{',' if 'unit' in spec else ':'}kv={kv}")
            assert lib.llama_loop_memory_size(c.ctx) == (768 * cell * n_slots if kv == "own" else 0), (spec, kv)
    c.set_loop("off")
    assert lib.llama_loop_memory_size(c.ctx) == 0


def test_memory_of_windows_and_states(tiny_gemma3, recurrent, context):
    cell = tiny.N_HEAD_KV * tiny.N_HEAD_DIM * 8
    c = context(tiny_gemma3, n_ctx=1024, n_ubatch=32, swa_full=False)  # a window of 8 gets 256 cells
    for spec, n_cells in (("1-2x3", 4 * 256), ("4-5x2", 256 + 1024), ("5-5x3", 2 * 1024)):
        c.set_loop(f"{spec}:kv=own")
        assert lib.llama_loop_memory_size(c.ctx) == n_cells * cell, spec
    for n_sequences in (1, 3):
        state = 4 * n_sequences * 2 * tiny.N_EMBD * (4 - 1 + 16)  # convolution and SSM
        c = context(recurrent["tiny_mamba"], **shared_or_split(n_sequences, True))
        for kv in KV_MODES:
            c.set_loop(f"2-3x3:kv={kv}")
            assert lib.llama_loop_memory_size(c.ctx) == 4 * state, kv


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", [*ARCHS, "tiny_mamba"])
def test_graphs_are_reused_as_without_a_loop(arch, span, kv, context, recurrent, request):
    path = recurrent.get(arch) or request.getfixturevalue(arch)
    n_reused = []
    for spec in ("off", f"{span}:kv={kv}"):
        c = context(path, spec)
        c.decode({0: PROMPT})
        for token in ONE + TWO + THREE:
            c.decode({0: [token]})
        n_reused.append(c.n_reused)
    assert n_reused[0] == n_reused[1] >= 7


CHANGES = ["2-3x3:kv=own", "off", "2-3x3", "2-3x3:naive", "2-3x3:kv=first", "2-3x3:kv=last", "1-2x3", "2-3x2", "2-3x3"]
CHANGES += ["off", "2-3x3:scope=gen", "2-3x3:kv=own", "2-2x2:kv=own", "4-5x2", "2-3x3:unit=layer", "2-3x3:kv=own"]


def follow_changes(c, n_steps=2):
    rows, reused = [], []
    for spec in CHANGES:
        cleared = c.set_loop(spec)
        if cleared:
            rows.append(c.decode({0: PROMPT}))
        for token in ONE[:n_steps]:
            before = c.n_reused
            rows.append(c.decode({0: [token]}))
            reused.append(c.n_reused - before)
    return np.concatenate(rows), reused


@pytest.mark.parametrize("arch", ARCHS)
def test_no_stale_graph_after_a_change(arch, context, monkeypatch, request):
    path = request.getfixturevalue(arch)
    rows, reused = follow_changes(context(path))
    assert reused[2:] == [0, 1] * (len(CHANGES) - 1)
    monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
    expected, reused = follow_changes(context(path))
    assert sum(reused) == 0
    assert np.array_equal(rows, expected)


@pytest.mark.parametrize("scope", ["prompt", "gen"])
def test_a_reused_graph_has_the_scope_of_its_batch(scope, tiny_llama, context, monkeypatch):
    """Of three tokens, other ones are in the scope each time."""
    batches = [{0: ONE[:2], 1: ONE[2:]}, {0: TWO[:1], 1: TWO[1:]}, {1: TWO[:2], 0: THREE[2:]}, {0: THREE}]
    batches += [{1: [9], 0: ONE[1:]}, {0: TWO[:2], 1: [9]}]
    rows = []
    for is_disabled in ("0", "1"):
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", is_disabled)
        c = context(tiny_llama, f"2-3x3:naive,scope={scope}", **shared_or_split(2, True))
        rows.append(np.concatenate([c.decode(batch) for batch in batches]))
        assert (c.n_reused > 0) == (is_disabled == "0")
    assert np.array_equal(*rows)


# ---- failures ----


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_failing_decode_leaves_everything_usable(arch, span, kv, context, request):
    path, spec = request.getfixturevalue(arch), f"{span}:kv={kv}"
    many = [5 + 11 * i % 240 for i in range(250)]
    fresh = context(path, spec)
    fresh.decode({0: many})
    expected = fresh.decode({0: ONE})

    c = context(path, spec)
    address = ctypes.cast(lib.llama_get_loop(c.ctx), ctypes.c_void_p).value
    c.decode({0: many})
    assert c.try_decode({0: PROMPT})[0] == 1  # no room for 20
    assert c.try_decode({0: [len(tiny.VOCAB)]})[0] == -1  # no such token
    assert ctypes.cast(lib.llama_get_loop(c.ctx), ctypes.c_void_p).value == address
    assert np.array_equal(c.decode({0: ONE}), expected)
    c.rm(0)
    assert np.array_equal(prompt_and_steps(c), prompt_and_steps(context(path, spec)))


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", SPANS)
def test_an_aborted_decode_leaves_everything_usable(span, kv, tiny_llama, context):
    fresh = context(tiny_llama, f"{span}:kv={kv}")
    fresh.decode({0: PROMPT})
    expected = fresh.decode({0: ONE}), fresh.decode({0: [7]})

    c = context(tiny_llama, f"{span}:kv={kv}")
    c.decode({0: PROMPT})
    n_left = 0

    @llama_cpp.ggml_abort_callback
    def abort(_):
        nonlocal n_left
        n_left -= 1
        return n_left < 0

    for n_nodes in (0, 60, 150):
        n_left = n_nodes
        llama_cpp.llama_set_abort_callback(c.ctx, abort, None)
        assert c.try_decode({0: ONE})[0] == 2
        assert c.n_past(0) == len(PROMPT)
    llama_cpp.llama_set_abort_callback(c.ctx, llama_cpp.ggml_abort_callback(), None)
    assert np.array_equal(c.decode({0: ONE}), expected[0])
    assert np.array_equal(c.decode({0: [7]}), expected[1])
