// Which K/V the passes see, and room for those that are kept.

#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"

#include "llama-impl.h"

#include <algorithm>

const llama_loop_kv_slot * llama_loop_kv_state::find(uint32_t il, int32_t pass) const {
    for (const auto & slot : slots) {
        if (slot.il == il && slot.pass == pass) {
            return &slot;
        }
    }
    return nullptr;
}

bool llama_loop_kv_state::store(std::vector<stored> & dst, ggml_tensor * cur, ggml_tensor * idxs, int32_t il) {
    if (!pass.computes_kv()) {
        return false;
    }
    if (pass.is_looped && pass.kv == LLAMA_LOOP_KV_FIRST && pass.i == 0) {
        dst.push_back({ cur, idxs, il });
    }
    return true;
}

//
// llama_kv_cache
//

int32_t llama_kv_cache::loop_layer_id(int32_t il) const {
    if (loop.pass.i > 0 && loop.pass.kv == LLAMA_LOOP_KV_OWN) {
        const auto it = loop.layer_ids.find({ il, loop.pass.i });
        if (it != loop.layer_ids.end()) {
            return it->second;
        }
        // a layer without K/V of its own reads another layer's
    }
    return map_layer_ids.at(il);
}

int32_t llama_kv_cache::loop_reserve(const llama_loop * lp) {
    loop.slots_next = {};
    loop.wanted.clear();

    if (!lp) {
        return 0;
    }

    if (other) {
        return LLAMA_LOOP_ERROR_UNSUPPORTED; // the K/V belongs to another context
    }

    const size_t n_plain = loop.n_layers_plain > 0 ? loop.n_layers_plain : layers.size();

    for (size_t i = 0; i < n_plain; ++i) {
        if (!layers[i].v) {
            return LLAMA_LOOP_ERROR_UNSUPPORTED; // K-only cache
        }
    }

    bool have_all = true;

    for (const auto & block : lp->blocks) {
        if (block.kv != LLAMA_LOOP_KV_OWN) {
            continue;
        }
        for (size_t i = 0; i < n_plain; ++i) {
            if ((int32_t) layers[i].il < block.first || (int32_t) layers[i].il > block.last) {
                continue;
            }
            for (int32_t pass = 1; pass < block.n_passes; ++pass) {
                loop.wanted.emplace_back(layers[i].il, pass);
                have_all = have_all && loop.find(layers[i].il, pass);
            }
        }
    }

    if (have_all) {
        return 0;
    }

    // every slot lives where the layer's first-pass K/V lives
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & [il, pass] : loop.wanted) {
        const auto & layer = layers[map_layer_ids.at(il)];

        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layer.k->buffer);

        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ggml_init_params params = {
                /*.mem_size   =*/ size_t(2u*(1 + n_stream)*loop.wanted.size()*ggml_tensor_overhead()),
                /*.mem_buffer =*/ NULL,
                /*.no_alloc   =*/ true,
            };

            ctx.reset(ggml_init(params));
        }

        llama_loop_kv_slot slot = { il, pass, ggml_dup_tensor(ctx.get(), layer.k), ggml_dup_tensor(ctx.get(), layer.v), {}, {} };

        ggml_format_name(slot.k, "cache_k_l%d_p%d", (int) il, pass);
        ggml_format_name(slot.v, "cache_v_l%d_p%d", (int) il, pass);

        for (uint32_t s = 0; s < n_stream; ++s) {
            slot.k_stream.push_back(ggml_view_2d(ctx.get(), slot.k, slot.k->ne[0], slot.k->ne[1], slot.k->nb[1], s*slot.k->nb[2]));
            slot.v_stream.push_back(ggml_view_2d(ctx.get(), slot.v, slot.v->ne[0], slot.v->ne[1], slot.v->nb[1], s*slot.v->nb[2]));
        }

        loop.slots_next.data.push_back(std::move(slot));
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        if (!buf) {
            loop.slots_next = {};
            return LLAMA_LOOP_ERROR_MEMORY;
        }

        LLAMA_LOG_INFO("%s: %10s KV buffer size of the loop = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ggml_backend_buffer_clear(buf, 0);
        loop.slots_next.ctxs_bufs.emplace_back(std::move(ctx), buf);
    }

    return 1;
}

void llama_kv_cache::loop_apply(bool accept) {
    if (!accept) {
        loop.slots_next = {};
        return;
    }

    if (loop.n_layers_plain == 0) {
        loop.n_layers_plain = layers.size();
        loop.n_bufs_plain   = ctxs_bufs.size();
    }

    if (!loop.slots_next.data.empty()) {
        loop.slots = std::move(loop.slots_next.data);

        ctxs_bufs.resize(loop.n_bufs_plain);
        for (auto & ctx_buf : loop.slots_next.ctxs_bufs) {
            ctxs_bufs.push_back(std::move(ctx_buf));
        }
        loop.slots_next = {};
    }

    // only the slots of this loop are shifted, copied and saved with the layers
    layers.resize(loop.n_layers_plain);
    loop.layer_ids.clear();

    for (const auto & [il, pass] : loop.wanted) {
        const auto * slot = loop.find(il, pass);

        loop.layer_ids[{ (int32_t) il, pass }] = layers.size();
        layers.push_back({ il, slot->k, slot->v, slot->k_stream, slot->v_stream });
    }
}

size_t llama_kv_cache::loop_kv_size() const {
    size_t res = 0;
    for (const auto & [_, ikv] : loop.layer_ids) {
        res += ggml_nbytes(layers[ikv].k) + ggml_nbytes(layers[ikv].v);
    }
    return res;
}

void llama_kv_cache_context::loop_select(const llama_loop_pass & pass) const {
    kv->loop.pass = pass;

    if (pass.i == 0 && !pass.is_looped) {
        kv->loop.first_k.clear();
        kv->loop.first_v.clear();
    }
}

void llama_kv_cache_context::loop_finish(ggml_context * ctx, ggml_cgraph * gf) const {
    kv->loop.pass = {};

    const auto first_k = std::move(kv->loop.first_k);
    const auto first_v = std::move(kv->loop.first_v);

    for (const auto & s : first_k) {
        ggml_build_forward_expand(gf, cpy_k(ctx, s.cur, s.idxs, s.il));
    }
    for (const auto & s : first_v) {
        ggml_build_forward_expand(gf, cpy_v(ctx, s.cur, s.idxs, s.il));
    }

    kv->loop.first_k.clear();
    kv->loop.first_v.clear();
}

//
// llama_kv_cache_iswa
//

int32_t llama_kv_cache_iswa::loop_reserve(const llama_loop * lp) {
    const int32_t res_base = kv_base->loop_reserve(lp);
    const int32_t res_swa  = kv_swa ->loop_reserve(lp);

    return res_base < 0 || res_swa < 0 ? std::min(res_base, res_swa) : std::max(res_base, res_swa);
}

void llama_kv_cache_iswa::loop_apply(bool accept) {
    kv_base->loop_apply(accept);
    kv_swa ->loop_apply(accept);
}

size_t llama_kv_cache_iswa::loop_kv_size() const {
    return kv_base->loop_kv_size() + kv_swa->loop_kv_size();
}

void llama_kv_cache_iswa_context::loop_select(const llama_loop_pass & pass) const {
    ctx_base->loop_select(pass);
    ctx_swa ->loop_select(pass);
}

void llama_kv_cache_iswa_context::loop_finish(ggml_context * ctx, ggml_cgraph * gf) const {
    ctx_base->loop_finish(ctx, gf);
    ctx_swa ->loop_finish(ctx, gf);
}
