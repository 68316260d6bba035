// What the passes of a loop see and keep, and room for it.

#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include "llama-impl.h"

#include <algorithm>

//
// llama_loop_slots
//

int32_t llama_loop_slots::layer_id(int32_t il, int32_t id_plain) const {
    const auto it = layer_ids.find({ il, pass.i });

    // no slot: the first pass, a mode that shares it, or a layer that keeps nothing itself
    return it != layer_ids.end() ? it->second : id_plain;
}

const llama_loop_slot * llama_loop_slots::find(uint32_t il, int32_t pass) const {
    for (const auto & slot : slots) {
        if (slot.il == il && slot.pass == pass) {
            return &slot;
        }
    }
    return nullptr;
}

int32_t llama_loop_slots::reserve(
        std::vector<std::pair<uint32_t, int32_t>> wanted_new,
        const std::function<std::vector<ggml_tensor *>(uint32_t)> & layer_data) {
    slots_next.clear();
    ctxs_bufs_next.clear();

    wanted = std::move(wanted_new);

    if (std::all_of(wanted.begin(), wanted.end(), [&](const auto & w) { return find(w.first, w.second); })) {
        return 0;
    }

    // every slot lives where the layer's first pass lives
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    // a model that is loaded only to measure it has dummy buffers, and must get no others
    bool is_dummy = false;

    for (const auto & [il, pass] : wanted) {
        llama_loop_slot slot = { il, pass, {}, {} };

        for (const ggml_tensor * t : layer_data(il)) {
            slot.streams.emplace_back();
            if (!t) {
                slot.data.push_back(nullptr);
                continue;
            }

            is_dummy = ggml_backend_buffer_get_size(t->buffer) == 0;

            auto & ctx = ctx_map[ggml_backend_buffer_get_type(t->buffer)];
            if (!ctx) {
                ggml_init_params params = {
                    /*.mem_size   =*/ size_t(3u*(1 + t->ne[2])*wanted.size()*ggml_tensor_overhead()), // R, S and P at most
                    /*.mem_buffer =*/ NULL,
                    /*.no_alloc   =*/ true,
                };

                ctx.reset(ggml_init(params));
            }

            ggml_tensor * dup = ggml_dup_tensor(ctx.get(), t);
            ggml_format_name(dup, "%s_p%d", t->name, pass);

            for (int64_t s = 0; s < dup->ne[2]; ++s) {
                slot.streams.back().push_back(ggml_view_2d(ctx.get(), dup, dup->ne[0], dup->ne[1], dup->nb[1], s*dup->nb[2]));
            }
            slot.data.push_back(dup);
        }

        slots_next.push_back(std::move(slot));
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (is_dummy) {
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); buf && t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            slots_next.clear();
            ctxs_bufs_next.clear();
            return LLAMA_LOOP_ERROR_MEMORY;
        }

        LLAMA_LOG_INFO("%s: %10s buffer size of the loop = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ggml_backend_buffer_clear(buf, 0);
        ctxs_bufs_next.emplace_back(std::move(ctx), buf);
    }

    return 1;
}

bool llama_loop_slots::apply(bool accept, ctxs_bufs_t & ctxs_bufs) {
    if (accept && !slots_next.empty()) {
        if (!has_bufs) {
            n_bufs_plain = ctxs_bufs.size();
            has_bufs     = true;
        }

        slots = std::move(slots_next);

        ctxs_bufs.resize(n_bufs_plain);
        std::move(ctxs_bufs_next.begin(), ctxs_bufs_next.end(), std::back_inserter(ctxs_bufs));
    }

    slots_next.clear();
    ctxs_bufs_next.clear();

    if (accept) {
        layer_ids.clear();
    }

    return accept;
}

std::vector<llama_loop_slot> llama_loop_slots::active() const {
    std::vector<llama_loop_slot> res;
    for (const auto & [il, pass] : wanted) {
        res.push_back(*find(il, pass));
    }
    return res;
}

//
// llama_loop_kv_slots
//

bool llama_loop_kv_slots::store(std::vector<stored> & dst, ggml_tensor * cur, ggml_tensor * idxs, int32_t il) {
    if (!pass.computes_kv()) {
        return false;
    }
    if (pass.is_looped && pass.kv == LLAMA_LOOP_KV_FIRST && pass.i == 0) {
        dst.push_back({ cur, idxs, il });
    }
    return true;
}

//
// llama_memory_i, llama_memory_context_i: on to the parts
//

int32_t llama_memory_i::loop_reserve(const llama_loop * lp) {
    const auto parts = loop_parts();

    if (parts.empty() && lp) {
        return LLAMA_LOOP_ERROR_UNSUPPORTED;
    }

    int32_t res = 0;
    for (auto * part : parts) {
        const int32_t cur = part->loop_reserve(lp);
        res = res < 0 || cur < 0 ? std::min(res, cur) : std::max(res, cur);
    }
    return res;
}

void llama_memory_i::loop_apply(bool accept) {
    for (auto * part : loop_parts()) {
        part->loop_apply(accept);
    }
}

size_t llama_memory_i::loop_size() const {
    size_t res = 0;
    for (const auto * part : loop_parts()) {
        res += part->loop_size();
    }
    return res;
}

void llama_memory_context_i::loop_select(const llama_loop_pass & pass) const {
    for (const auto * part : loop_parts()) {
        part->loop_select(pass);
    }
}

void llama_memory_context_i::loop_finish(ggml_context * ctx, ggml_cgraph * gf) const {
    for (const auto * part : loop_parts()) {
        part->loop_finish(ctx, gf);
    }
}

//
// llama_kv_cache
//

int32_t llama_kv_cache::loop_reserve(const llama_loop * lp) {
    if (lp && other) {
        return LLAMA_LOOP_ERROR_UNSUPPORTED; // the K/V belongs to another context
    }

    if (loop.n_layers_plain == 0) {
        loop.n_layers_plain = layers.size();
    }

    std::vector<std::pair<uint32_t, int32_t>> wanted;

    for (size_t b = 0; lp && b < lp->blocks.size(); ++b) {
        const auto & block = lp->blocks[b];

        if (block.kv != LLAMA_LOOP_KV_OWN) {
            continue;
        }
        for (size_t i = 0; i < loop.n_layers_plain; ++i) {
            if ((int32_t) layers[i].il < block.first || (int32_t) layers[i].il > block.last) {
                continue;
            }
            for (int32_t pass = 1; pass < block.n_passes; ++pass) {
                wanted.emplace_back(layers[i].il, pass);
            }
        }
    }

    return loop.reserve(std::move(wanted), [&](uint32_t il) -> std::vector<ggml_tensor *> {
        const auto & layer = layers[map_layer_ids.at(il)];
        return { layer.k, layer.v };
    });
}

void llama_kv_cache::loop_apply(bool accept) {
    if (!loop.apply(accept, ctxs_bufs)) {
        return;
    }

    // only the slots of this loop are shifted, copied and saved with the layers
    layers.resize(loop.n_layers_plain);

    for (const auto & slot : loop.active()) {
        loop.layer_ids[{ (int32_t) slot.il, slot.pass }] = layers.size();

        layers.push_back({ slot.il, slot.data[0], slot.data[1], slot.streams[0], slot.streams[1] });
        layers.back().v_stream.resize(n_stream); // null where there is no V
    }
}

size_t llama_kv_cache::loop_size() const {
    size_t res = 0;
    for (const auto & [_, ikv] : loop.layer_ids) {
        res += ggml_nbytes(layers[ikv].k) + (layers[ikv].v ? ggml_nbytes(layers[ikv].v) : 0);
    }
    return res;
}

void llama_kv_cache_context::loop_select(const llama_loop_pass & pass) const {
    kv->loop.pass = pass;

    if (!pass.is_looped) {
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
}

//
// llama_memory_recurrent
//

int32_t llama_memory_recurrent::loop_reserve(const llama_loop * lp) {
    if (loop.n_layers_plain == 0) {
        loop.n_layers_plain = r_l.size();
    }

    std::vector<std::pair<uint32_t, int32_t>> wanted;

    // one state per pass in every mode: a state that two passes advance would be wrong for both
    for (size_t b = 0; lp && b < lp->blocks.size(); ++b) {
        const auto & block = lp->blocks[b];

        for (int32_t il = block.first; il <= block.last; ++il) {
            for (int32_t pass = 1; r_l[il] && pass < block.n_passes; ++pass) {
                wanted.emplace_back(il, pass);
            }
        }
    }

    return loop.reserve(std::move(wanted), [&](uint32_t il) -> std::vector<ggml_tensor *> {
        return { r_l[il], s_l[il], p_l[il] };
    });
}

void llama_memory_recurrent::loop_apply(bool accept) {
    if (!loop.apply(accept, ctxs_bufs)) {
        return;
    }

    for (auto * l : { &r_l, &s_l, &p_l }) {
        l->resize(loop.n_layers_plain);
    }

    for (const auto & slot : loop.active()) {
        loop.layer_ids[{ (int32_t) slot.il, slot.pass }] = r_l.size();

        r_l.push_back(slot.data[0]);
        s_l.push_back(slot.data[1]);
        p_l.push_back(slot.data[2]);
    }
}

size_t llama_memory_recurrent::loop_size() const {
    size_t res = 0;
    for (const auto & [_, i] : loop.layer_ids) {
        for (const ggml_tensor * t : { r_l[i], s_l[i], p_l[i] }) {
            res += t ? ggml_nbytes(t) : 0;
        }
    }
    return res;
}

void llama_memory_recurrent_context::loop_select(const llama_loop_pass & pass) const {
    mem->loop.pass = pass;
}
