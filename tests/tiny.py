"""Writes tiny F32 GGUF models with seeded random weights, small enough to be checked number by number.

Every writer returns the model as a flat dict: the tensors under their GGUF names, as they stand in the file (a matrix
has one row per output), the hyperparameters under names like n_embd, and under "metadata" what else the file says of
the architecture. oracle.py computes with it; tiny_more.py has more architectures. Knows nothing of
edgeloop.
"""

from __future__ import annotations

import os
from typing import Any

import gguf
import numpy as np

N_EMBD = 64
N_HEAD = 4
N_HEAD_KV = 2
N_HEAD_DIM = 16
N_FF = 128
N_CTX_TRAIN = 1024
NORM_EPS = 1e-6

GEMMA3_N_SWA = 8  # a token sees itself and the seven before it, so that the window matters in a short prompt
GEMMA3_SWA_PERIOD = 6  # llama.cpp's gemma3: every sixth layer sees everything
# ggml rounds GELU to half precision: where the last bit of its input decides, one unit may differ by 1e-3. A
# feed-forward network that moves the stream by a tenth keeps that far below 1e-4 in the logits.
GEMMA3_FFN_SCALE = 0.1

BOS, EOS = 1, 2
SPACE = "\u2581"
# the least that llama.cpp's SPM tokenizer accepts, specials and all bytes; and SPM's space, so that text survives it
VOCAB = (
    [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL)]
    + [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    + [(SPACE, gguf.TokenType.NORMAL)]
)

Model = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

ATTENTION: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "attn_q.weight": (N_HEAD * N_HEAD_DIM, N_EMBD),
    "attn_k.weight": (N_HEAD_KV * N_HEAD_DIM, N_EMBD),
    "attn_v.weight": (N_HEAD_KV * N_HEAD_DIM, N_EMBD),
    "attn_output.weight": (N_EMBD, N_HEAD * N_HEAD_DIM),
}
FEED_FORWARD: Shapes = {
    "ffn_norm.weight": (N_EMBD,),
    "ffn_gate.weight": (N_FF, N_EMBD),
    "ffn_up.weight": (N_FF, N_EMBD),
    "ffn_down.weight": (N_EMBD, N_FF),
}


def write_llama(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture llama: SwiGLU, adjacent RoPE pairs, full attention, an output matrix of its own."""
    model = hyperparameters("llama", n_layer, rope_base=1e4)
    shapes = common_shapes(model) | {"output.weight": (len(VOCAB), N_EMBD)}
    return write(path, model | random_tensors(shapes, seed))


def write_gemma3(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture gemma3: GeGLU, half-split RoPE, norms on both sides and on Q and K, sliding windows, tied output."""
    model = hyperparameters("gemma3", n_layer, rope_base=1e6)
    model |= {"n_swa": GEMMA3_N_SWA, "swa_period": GEMMA3_SWA_PERIOD, "rope_base_swa": 1e4}
    model["metadata"] |= {"attention.sliding_window": model["n_swa"], "rope.freq_base_swa": model["rope_base_swa"]}
    shapes = common_shapes(model)
    for il in range(n_layer):
        shapes[f"blk.{il}.attn_q_norm.weight"] = shapes[f"blk.{il}.attn_k_norm.weight"] = (N_HEAD_DIM,)
        shapes[f"blk.{il}.post_attention_norm.weight"] = shapes[f"blk.{il}.post_ffw_norm.weight"] = (N_EMBD,)
    tensors = random_tensors(shapes, seed)
    for il in range(n_layer):
        tensors[f"blk.{il}.post_ffw_norm.weight"] *= np.float32(GEMMA3_FFN_SCALE)
    return write(path, model | tensors)


def write_mamba(path: str | os.PathLike, seed: int = 0, n_layer: int = 2) -> Model:
    """Architecture mamba: recurrent layers only, for what has no K/V cache. No oracle."""
    d_conv, d_inner, d_state, dt_rank = 4, 2 * N_EMBD, 16, 8
    ssm = {"conv_kernel": d_conv, "inner_size": d_inner, "state_size": d_state, "time_step_rank": dt_rank}
    model = {"arch": "mamba", "n_layer": n_layer, "metadata": {f"ssm.{key}": value for key, value in ssm.items()}}
    layer = {
        "attn_norm.weight": (N_EMBD,),
        "ssm_in.weight": (2 * d_inner, N_EMBD),
        "ssm_conv1d.weight": (d_inner, d_conv),
        "ssm_conv1d.bias": (d_inner,),
        "ssm_x.weight": (dt_rank + 2 * d_state, d_inner),
        "ssm_dt.weight": (d_inner, dt_rank),
        "ssm_dt.bias": (d_inner,),
        "ssm_a": (d_inner, d_state),
        "ssm_d": (d_inner,),
        "ssm_out.weight": (N_EMBD, d_inner),
    }
    shapes = outer_shapes()
    for il in range(n_layer):
        shapes |= layer_shapes(il, layer)
    tensors = random_tensors(shapes, seed)
    for il in range(n_layer):
        tensors[f"blk.{il}.ssm_a"] = -np.abs(tensors[f"blk.{il}.ssm_a"])  # a state that decays
    return write(path, model | tensors)


def hyperparameters(arch: str, n_layer: int, rope_base: float) -> Model:
    """Of a transformer with the widths above."""
    return {
        "arch": arch,
        "n_layer": n_layer,
        "n_embd": N_EMBD,
        "n_head": N_HEAD,
        "n_head_kv": N_HEAD_KV,
        "n_head_dim": N_HEAD_DIM,
        "norm_eps": NORM_EPS,
        "rope_base": rope_base,
        "metadata": {
            "feed_forward_length": N_FF,
            "attention.head_count": N_HEAD,
            "attention.head_count_kv": N_HEAD_KV,
            "attention.key_length": N_HEAD_DIM,
            "attention.value_length": N_HEAD_DIM,
            "rope.freq_base": rope_base,
        },
    }


def common_shapes(model: Model) -> Shapes:
    """The tensors of a transformer with the widths above, the output matrix tied to the embedding."""
    shapes = outer_shapes()
    for il in range(model["n_layer"]):
        shapes |= layer_shapes(il, ATTENTION | FEED_FORWARD)
    return shapes


def outer_shapes() -> Shapes:
    """What is not in a layer."""
    return {"token_embd.weight": (len(VOCAB), N_EMBD), "output_norm.weight": (N_EMBD,)}


def layer_shapes(il: int, shapes: Shapes) -> Shapes:
    """Tensor names with the layer's number before them."""
    return {f"blk.{il}.{name}": shape for name, shape in shapes.items()}


def random_tensors(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Norms about 1, matrices that keep the size of a vector: a layer moves the stream by about the stream's size."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        is_vector = len(shape) == 1 or "norm" in name
        values = rng.uniform(0.5, 1.5, shape) if is_vector else rng.normal(0.0, shape[-1] ** -0.5, shape)
        tensors[name] = values.astype(np.float32)
    return tensors


def write(path: str | os.PathLike, model: Model) -> Model:
    """Write every array and the metadata of `model`, with a tokenizer; returns `model`."""
    writer = gguf.GGUFWriter(os.fspath(path), model["arch"])
    writer.add_name(f"tiny {model['arch']}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_block_count(model["n_layer"])
    writer.add_embedding_length(N_EMBD)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    for key, value in model["metadata"].items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key if key.startswith("tokenizer.") else f"{model['arch']}.{key}", value, kind)

    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in VOCAB])
    writer.add_token_scores([0.0] * len(VOCAB))
    writer.add_token_types([kind for _, kind in VOCAB])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_space_prefix(False)  # text -> tokens -> text is the identity

    for name, value in model.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
