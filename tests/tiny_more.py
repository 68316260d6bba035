"""Tiny models of more architectures, as in tiny.py; oracle.py knows qwen3 and qwen3moe of them.

Each brings a mechanism of llama.cpp that the loop has to get along with: biases, experts, a K-only cache, recurrent
states, K/V shared between layers, per-layer inputs.
"""

from __future__ import annotations

import os

import numpy as np
from tiny import (
    ATTENTION,
    FEED_FORWARD,
    N_CTX_TRAIN,
    N_EMBD,
    N_HEAD,
    N_HEAD_DIM,
    N_HEAD_KV,
    VOCAB,
    Model,
    Shapes,
    hyperparameters,
    layer_shapes,
    outer_shapes,
    random_tensors,
    write,
)

D_CONV = 4
D_INNER = 2 * N_EMBD
D_STATE = 16

GEMMA3N_GELU_SCALE = 0.03  # see GEMMA3_FFN_SCALE; there are more layers here to pass a difference on

N_EXPERT, N_EXPERT_USED = 4, 2
N_FF_EXPERT = 32
EXPERTS_METADATA = {
    "expert_count": N_EXPERT,
    "expert_used_count": N_EXPERT_USED,
    "expert_feed_forward_length": N_FF_EXPERT,
}
EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (N_EXPERT, N_EMBD),
    "ffn_gate_exps.weight": (N_EXPERT, N_FF_EXPERT, N_EMBD),
    "ffn_up_exps.weight": (N_EXPERT, N_FF_EXPERT, N_EMBD),
    "ffn_down_exps.weight": (N_EXPERT, N_EMBD, N_FF_EXPERT),
}
SHARED_EXPERT: Shapes = {
    "ffn_gate_shexp.weight": (N_FF_EXPERT, N_EMBD),
    "ffn_up_shexp.weight": (N_FF_EXPERT, N_EMBD),
    "ffn_down_shexp.weight": (N_EMBD, N_FF_EXPERT),
}
QK_NORMS: Shapes = {"attn_q_norm.weight": (N_HEAD_DIM,), "attn_k_norm.weight": (N_HEAD_DIM,)}


def write_qwen2(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture qwen2: biases on Q, K and V."""
    model = hyperparameters("qwen2", n_layer, rope_base=1e6)
    biases = {f"{name}.bias": ATTENTION[f"{name}.weight"][:1] for name in ("attn_q", "attn_k", "attn_v")}
    return write(path, model | _tensors([ATTENTION | biases | FEED_FORWARD] * n_layer, seed))


def write_qwen3(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture qwen3: norms on Q and K."""
    model = hyperparameters("qwen3", n_layer, rope_base=1e6)
    return write(path, model | _tensors([ATTENTION | QK_NORMS | FEED_FORWARD] * n_layer, seed))


def write_qwen3moe(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture qwen3moe: experts in every layer."""
    model = hyperparameters("qwen3moe", n_layer, rope_base=1e6)
    model["metadata"] |= EXPERTS_METADATA
    layer = ATTENTION | QK_NORMS | {"ffn_norm.weight": (N_EMBD,)} | EXPERTS
    return write(path, model | _tensors([layer] * n_layer, seed))


def write_deepseek2(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture deepseek2: MLA, which caches K only; a dense layer, then experts with a bias and a shared expert."""
    q_rank, kv_rank, n_rot, key_dim, value_dim = 24, 32, 8, 24, 16
    model = hyperparameters("deepseek2", n_layer, rope_base=1e4)
    model["metadata"] |= EXPERTS_METADATA | {
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_gating_func": 2,  # sigmoid
        "expert_weights_norm": True,
        "expert_weights_scale": 1.5,
        "rope.dimension_count": n_rot,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + n_rot,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": key_dim,
        "attention.value_length_mla": value_dim,
    }
    attention = {
        "attn_norm.weight": (N_EMBD,),
        "attn_q_a.weight": (q_rank, N_EMBD),
        "attn_q_a_norm.weight": (q_rank,),
        "attn_q_b.weight": (N_HEAD * key_dim, q_rank),
        "attn_kv_a_mqa.weight": (kv_rank + n_rot, N_EMBD),
        "attn_kv_a_norm.weight": (kv_rank,),
        "attn_k_b.weight": (N_HEAD, kv_rank, key_dim - n_rot),
        "attn_v_b.weight": (N_HEAD, value_dim, kv_rank),
        "attn_output.weight": (N_EMBD, N_HEAD * value_dim),
    }
    experts = {"ffn_norm.weight": (N_EMBD,)} | EXPERTS | SHARED_EXPERT | {"exp_probs_b.bias": (N_EXPERT,)}
    return write(path, model | _tensors([attention | FEED_FORWARD] + [attention | experts] * (n_layer - 1), seed))


def write_gemma3n(path: str | os.PathLike, seed: int = 0, n_layer: int = 25) -> Model:
    """Architecture gemma3n: four streams side by side, per-layer inputs, K/V only in the first 20 layers.

    llama.cpp hard-codes the 20 and the widths below. Every fifth layer sees everything, so with 25 layers there are
    both kinds among those that read the K/V of layers 18 and 19. What passes a GELU is scaled down, as in gemma3.
    """
    n_stream, laurel_rank, n_per_layer = 4, 64, 256
    model = hyperparameters("gemma3n", n_layer, rope_base=1e6) | {"n_layer_kv": 20}
    model["metadata"] |= {"attention.sliding_window": 8, "rope.freq_base_swa": 1e4}
    layer = (
        ATTENTION
        | QK_NORMS
        | FEED_FORWARD
        | {
            "post_attention_norm.weight": (N_EMBD,),
            "post_ffw_norm.weight": (N_EMBD,),
            "inp_gate.weight": (n_per_layer, N_EMBD),
            "proj.weight": (N_EMBD, n_per_layer),
            "post_norm.weight": (N_EMBD,),
            "altup_correct_coef.weight": (n_stream, n_stream),
            "altup_correct_scale.weight": (N_EMBD,),
            "altup_predict_coef.weight": (n_stream * n_stream, n_stream),
            "altup_router.weight": (n_stream, N_EMBD),
            "altup_router_norm.weight": (N_EMBD,),
            "laurel_l.weight": (laurel_rank, N_EMBD),
            "laurel_r.weight": (N_EMBD, laurel_rank),
            "laurel_post_norm.weight": (N_EMBD,),
        }
    )
    outer = outer_shapes() | {
        "altup_proj.weight": (n_stream - 1, N_EMBD, N_EMBD),
        "altup_unembd_proj.weight": (n_stream - 1, N_EMBD, N_EMBD),
        "per_layer_token_embd.weight": (len(VOCAB), n_per_layer * n_layer),
        "per_layer_model_proj.weight": (n_per_layer * n_layer, N_EMBD),
        "per_layer_proj_norm.weight": (n_per_layer,),
    }
    tensors = _tensors([layer] * n_layer, seed, outer)
    for name in tensors:
        if name.endswith((".post_ffw_norm.weight", ".post_norm.weight")):
            tensors[name] *= np.float32(GEMMA3N_GELU_SCALE)
    return write(path, model | tensors)


def write_mamba2(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture mamba2: recurrent layers only, heads and groups."""
    n_head, n_group = 8, 2
    d_xbc = D_INNER + 2 * n_group * D_STATE
    layer = {
        "attn_norm.weight": (N_EMBD,),
        "ssm_in.weight": (D_INNER + d_xbc + n_head, N_EMBD),
        "ssm_conv1d.weight": (d_xbc, D_CONV),
        "ssm_conv1d.bias": (d_xbc,),
        "ssm_dt.bias": (n_head,),
        "ssm_a": (n_head, 1),
        "ssm_d": (n_head, 1),
        "ssm_norm.weight": (n_group, D_INNER // n_group),
        "ssm_out.weight": (N_EMBD, D_INNER),
    }
    model = {"arch": "mamba2", "n_layer": n_layer}
    model["metadata"] = {
        "ssm.conv_kernel": D_CONV,
        "ssm.inner_size": D_INNER,
        "ssm.state_size": D_STATE,
        "ssm.time_step_rank": n_head,
        "ssm.group_count": n_group,
    }
    return write(path, model | _tensors([layer] * n_layer, seed))


def write_qwen3next(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture qwen3next: two layers of gated delta net to one of gated attention, experts and a shared expert."""
    n_head_k, n_head_v = 2, 4
    d_key, d_value = n_head_k * D_STATE, n_head_v * D_STATE
    is_recurrent = [il % 3 < 2 for il in range(n_layer)]
    model = hyperparameters("qwen3next", n_layer, rope_base=1e7)
    model["metadata"] |= EXPERTS_METADATA | {
        "expert_shared_feed_forward_length": N_FF_EXPERT,
        "rope.dimension_count": N_HEAD_DIM // 4,
        "attention.recurrent_layers": is_recurrent,
        "ssm.conv_kernel": D_CONV,
        "ssm.inner_size": d_value,
        "ssm.state_size": D_STATE,
        "ssm.time_step_rank": n_head_v,
        "ssm.group_count": n_head_k,
    }
    attention = ATTENTION | QK_NORMS | {"attn_q.weight": (2 * N_HEAD * N_HEAD_DIM, N_EMBD)}  # queries and gates
    delta_net = {
        "attn_norm.weight": (N_EMBD,),
        "attn_qkv.weight": (2 * d_key + d_value, N_EMBD),
        "attn_gate.weight": (d_value, N_EMBD),
        "ssm_conv1d.weight": (2 * d_key + d_value, D_CONV),
        "ssm_dt.bias": (n_head_v,),
        "ssm_a": (n_head_v,),
        "ssm_ba.weight": (2 * n_head_v, N_EMBD),
        "ssm_norm.weight": (D_STATE,),
        "ssm_out.weight": (N_EMBD, d_value),
    }
    norm_and_gate = {"post_attention_norm.weight": (N_EMBD,), "ffn_gate_inp_shexp.weight": (N_EMBD,)}
    experts = norm_and_gate | EXPERTS | SHARED_EXPERT
    return write(path, model | _tensors([(delta_net if r else attention) | experts for r in is_recurrent], seed))


def write_lfm2(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture lfm2: two layers of short convolution to one of attention."""
    l_cache = 3
    is_recurrent = [il % 3 < 2 for il in range(n_layer)]
    model = hyperparameters("lfm2", n_layer, rope_base=1e6)
    n_head_kv = [0 if r else N_HEAD_KV for r in is_recurrent]
    model["metadata"] |= {"shortconv.l_cache": l_cache, "attention.head_count_kv": n_head_kv}
    convolution = {
        "attn_norm.weight": (N_EMBD,),
        "shortconv.conv.weight": (N_EMBD, l_cache),
        "shortconv.in_proj.weight": (3 * N_EMBD, N_EMBD),
        "shortconv.out_proj.weight": (N_EMBD, N_EMBD),
    }
    layers = [(convolution if r else ATTENTION | QK_NORMS) | FEED_FORWARD for r in is_recurrent]
    outer = outer_shapes()
    outer["token_embd_norm.weight"] = outer.pop("output_norm.weight")  # lfm2's name of it
    return write(path, model | _tensors(layers, seed, outer))


def write_hrm_text(path: str | os.PathLike, seed: int = 0) -> Model:
    """Architecture hrm_text: two stacks of two blocks each, applied in turn to two streams; a loop of its own."""
    per_stack, h_cycles, l_cycles = 2, 2, 2
    n_layer = per_stack * h_cycles * (l_cycles + 1)  # each application counts
    model = hyperparameters("hrm_text", n_layer, rope_base=1e4)
    model["metadata"] |= {"hrm.layers_per_stack": per_stack, "hrm.h_cycles": h_cycles, "hrm.l_cycles": l_cycles}
    gate = {"attn_gate.weight": (N_HEAD * N_HEAD_DIM, N_EMBD)}
    layer = {name: shape for name, shape in (ATTENTION | gate | FEED_FORWARD).items() if "norm" not in name}
    outer = {"token_embd.weight": (len(VOCAB), N_EMBD), "hrm.z_l_init": (N_EMBD,)}
    return write(path, model | _tensors([layer] * 2 * per_stack, seed, outer))


def write_bert(path: str | os.PathLike, seed: int = 0, n_layer: int = 6) -> Model:
    """Architecture bert: an encoder without a cache, norms behind its sums, the mean over the tokens as embedding."""
    model = hyperparameters("bert", n_layer, rope_base=1e4)
    model["metadata"] |= {
        "attention.layer_norm_epsilon": 1e-6,
        "attention.causal": False,
        "pooling_type": 1,
        "tokenizer.ggml.token_type_count": 1,
    }
    matrices = {name: shape for name, shape in (ATTENTION | FEED_FORWARD).items() if "norm" not in name}
    matrices.pop("ffn_gate.weight")
    norms = {name: (N_EMBD,) for norm in ("attn_output_norm", "layer_output_norm") for name in _with_bias(norm)}
    outer = {
        "token_embd.weight": (len(VOCAB), N_EMBD),
        "position_embd.weight": (N_CTX_TRAIN, N_EMBD),
        **{name: (N_EMBD,) for name in _with_bias("token_embd_norm")},
    }
    return write(path, model | _tensors([matrices | norms] * n_layer, seed, outer))


def _with_bias(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def write_t5(path: str | os.PathLike, seed: int = 0, n_layer: int = 2) -> Model:
    """Architecture t5: an encoder, and a decoder that attends to it."""
    model = hyperparameters("t5", n_layer, rope_base=1e4)
    model["metadata"] |= {
        "attention.relative_buckets_count": 8,
        "attention.head_count_kv": N_HEAD,
        "decoder_start_token_id": 0,
    }
    inner = N_HEAD * N_HEAD_DIM
    attention = {f"attn_{name}.weight": (inner, N_EMBD) for name in "qkv"} | {"attn_o.weight": (N_EMBD, inner)}
    layer = attention | FEED_FORWARD | {"attn_norm.weight": (N_EMBD,), "attn_rel_b.weight": (8, N_HEAD)}
    cross = {f"cross_{name}": shape for name, shape in (attention | {"attn_norm.weight": (N_EMBD,)}).items()}
    shapes = {"token_embd.weight": (len(VOCAB), N_EMBD)}
    for part, tensors in (("enc", layer), ("dec", layer | cross)):
        shapes[f"{part}.output_norm.weight"] = (N_EMBD,)
        shapes |= {f"{part}.{name}": s for il in range(n_layer) for name, s in layer_shapes(il, tensors).items()}
    return write(path, model | random_tensors(shapes, seed))


def _tensors(layers: list[Shapes], seed: int, outer: Shapes | None = None) -> dict[str, np.ndarray]:
    """Random tensors of `layers`, one after another, and of `outer`, which are in no layer."""
    shapes = outer or outer_shapes()
    for il, layer in enumerate(layers):
        shapes |= layer_shapes(il, layer)
    tensors = random_tensors(shapes, seed)
    for name, values in tensors.items():
        if name.endswith(".ssm_a"):
            tensors[name] = -np.abs(values)  # a state that decays
        elif name.endswith((".bias", "inp_shexp.weight")):
            tensors[name] = values - 1  # about 0
    return tensors
