// The public functions, and llama_context::set_loop().

#include "llama-context.h"
#include "llama-io.h"
#include "llama-model.h"

#include <cinttypes>
#include <cmath>
#include <cstdlib>
#include <cstring>

static thread_local std::string loop_last_error;

// where a sequence's state made without a loop has a count, which can never be as large
static constexpr uint32_t LOOP_STATE_MAGIC = 0xf0706f6c;

//
// llama_loop
//

uint64_t llama_loop::hash() const {
    uint64_t res = 0xcbf29ce484222325; // FNV-1a

    const auto add = [&](const void * data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            res = (res ^ ((const uint8_t *) data)[i])*0x100000001b3;
        }
    };

    for (const auto & block : blocks) {
        const int32_t numbers[] = { block.first, block.last, block.n_passes, block.kv, params.routing, params.scope, params.rule, params.norm };
        add(numbers, sizeof(numbers));
        add(block.mix.data(), block.mix.size()*sizeof(float));
    }
    return res;
}

int32_t llama_loop::n_visits() const {
    int32_t res = n_layer;
    for (const auto & block : blocks) {
        res += (block.n_passes - 1)*(block.last - block.first + 1);
    }
    return res;
}

uint32_t llama_loop::n_nodes_max(uint32_t n_nodes_plain) const {
    uint64_t res = (uint64_t) n_nodes_plain*n_visits()/n_layer;
    for (const auto & block : blocks) {
        // the sum after pass i has at most 2*i + 3 terms of three nodes each, or i + 1 of thirteen; a mean takes four for each
        // layer, the scope six, a norm twelve for each pass
        res += 13u*block.n_passes*(block.n_passes + 2u) + 12u*block.n_passes + 4u*block.n_passes*(block.last - block.first + 1u) + 6u;
    }
    return res;
}

// null when the parameters are wrong, error then says why
static std::shared_ptr<const llama_loop> loop_init(const llama_loop_params & params, const llama_hparams & hparams, std::string & error) {
    const int32_t n_layer = hparams.n_layer();

    auto res = std::make_shared<llama_loop>();

    res->n_layer = n_layer;

    if (!params.spans) {
        error = "the loop has no spans; pass NULL for the parameters to turn it off";
        return nullptr;
    }
    if (params.n_spans < 1 || params.n_spans > LLAMA_LOOP_MAX_VISITS) {
        error = format("a loop needs 1 to %d spans, got %d", LLAMA_LOOP_MAX_VISITS, params.n_spans);
        return nullptr;
    }
    if (params.unit != LLAMA_LOOP_UNIT_BLOCK && params.unit != LLAMA_LOOP_UNIT_LAYER) {
        error = format("unit %d is unknown", params.unit);
        return nullptr;
    }
    if (params.kv < LLAMA_LOOP_KV_FROZEN || params.kv > LLAMA_LOOP_KV_LAST) {
        error = format("kv mode %d is unknown", params.kv);
        return nullptr;
    }

    if (params.routing != LLAMA_LOOP_ROUTING_FREE && params.routing != LLAMA_LOOP_ROUTING_FROZEN) {
        error = format("routing %d is unknown", params.routing);
        return nullptr;
    }
    if (params.routing == LLAMA_LOOP_ROUTING_FROZEN && hparams.n_expert == 0) {
        error = "the model has no experts whose routing could be frozen";
        return nullptr;
    }

    if (params.scope < LLAMA_LOOP_SCOPE_ALL || params.scope > LLAMA_LOOP_SCOPE_GEN) {
        error = format("scope %d is unknown", params.scope);
        return nullptr;
    }
    if (params.scope != LLAMA_LOOP_SCOPE_ALL && params.kv == LLAMA_LOOP_KV_LAST) {
        error = "kv=last keeps the last pass's K/V, which tokens outside the scope do not have; use another kv or scope=all";
        return nullptr;
    }

    if (params.rule < LLAMA_LOOP_RULE_MIX || params.rule > LLAMA_LOOP_RULE_AUTO_ALIGN) {
        error = format("rule %d is unknown", params.rule);
        return nullptr;
    }

    if (params.norm < LLAMA_LOOP_NORM_NONE || params.norm > LLAMA_LOOP_NORM_INTERP) {
        error = format("norm %d is unknown", params.norm);
        return nullptr;
    }

    const auto kv = (llama_loop_kv) params.kv;

    int32_t n_visits = n_layer;
    int32_t prev     = -1;

    for (int32_t s = 0; s < params.n_spans; ++s) {
        const auto & span = params.spans[s];

        if (span.first < 0 || span.last < span.first || span.last >= n_layer) {
            error = format("span %d..%d is not in the model, which has layers 0..%d", span.first, span.last, n_layer - 1);
            return nullptr;
        }
        if (span.first <= prev) {
            error = format("span %d..%d starts before the end of the one before it, %d", span.first, span.last, prev);
            return nullptr;
        }
        if (span.n_passes < 1 || span.n_passes > LLAMA_LOOP_MAX_PASSES) {
            error = format("%d passes asked for, 1 to %d are possible", span.n_passes, LLAMA_LOOP_MAX_PASSES);
            return nullptr;
        }
        const int32_t n_stack = hparams.n_hrm_layers_per_stack > 0 ? hparams.n_hrm_layers_per_stack : n_layer;
        if (params.unit == LLAMA_LOOP_UNIT_BLOCK && span.first/n_stack != span.last/n_stack) {
            error = format("span %d..%d crosses the border between two of the model's stacks, which have %d layers each; use unit=layer or a span inside one",
                span.first, span.last, n_stack);
            return nullptr;
        }
        // no overflow: every term is below 64 * n_layer, and n_layer is at most LLAMA_MAX_LAYERS
        n_visits += (span.n_passes - 1)*(span.last - span.first + 1);
        if (n_visits > LLAMA_LOOP_MAX_VISITS) {
            error = format("the loop applies more than %d layers to a token", LLAMA_LOOP_MAX_VISITS);
            return nullptr;
        }
        if (!span.mix && params.rule == LLAMA_LOOP_RULE_MIX) {
            error = format("span %d..%d has no mix", span.first, span.last);
            return nullptr;
        }

        std::vector<float> mix(size_t(span.n_passes)*span.n_passes, 0.0f);
        for (int32_t i = 0; params.rule == LLAMA_LOOP_RULE_MIX && i < span.n_passes; ++i) {
            for (int32_t j = 0; j <= i; ++j) {
                const float m = span.mix[i*span.n_passes + j];
                if (!std::isfinite(m)) {
                    error = format("span %d..%d: mix[%d][%d] is not a finite number", span.first, span.last, i, j);
                    return nullptr;
                }
                mix[i*span.n_passes + j] = m;
            }
        }

        if (params.unit == LLAMA_LOOP_UNIT_BLOCK) {
            res->blocks.push_back({ span.first, span.last, span.n_passes, kv, mix });
        } else {
            for (int32_t il = span.first; il <= span.last; ++il) {
                res->blocks.push_back({ il, il, span.n_passes, kv, mix });
            }
        }

        res->spans.push_back(span);
        res->mixes.push_back(std::move(mix));

        prev = span.last;
    }

    for (size_t s = 0; s < res->spans.size(); ++s) {
        res->spans[s].mix = res->mixes[s].data();
    }
    res->params       = params;
    res->params.spans = res->spans.data();

    return res;
}

static bool loop_is_same(const llama_loop * a, const llama_loop * b) {
    if (!a || !b) {
        return a == b;
    }
    if (a->params.unit    != b->params.unit    || a->params.kv    != b->params.kv    ||
        a->params.routing != b->params.routing || a->params.scope != b->params.scope ||
        a->params.rule    != b->params.rule    || a->params.norm  != b->params.norm  ||
        a->mixes          != b->mixes) {
        return false;
    }
    for (size_t s = 0; s < a->spans.size(); ++s) {
        if (a->spans[s].first != b->spans[s].first || a->spans[s].last != b->spans[s].last) {
            return false;
        }
    }
    return true;
}

// the scheduler keeps its memory plan for every graph with as many nodes as the last one. that holds for the graphs of
// one loop, but two loops can have as many nodes in another order: show it a graph that has not, and it plans anew
static void loop_forget_plan(ggml_backend_sched_t sched) {
    const size_t n_nodes = 4;

    ggml_init_params params = {
        /*.mem_size   =*/ n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx { ggml_init(params) };

    ggml_cgraph * gf  = ggml_new_graph_custom(ctx.get(), n_nodes, false);
    ggml_tensor * inp = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 1);

    ggml_set_input(inp);
    ggml_build_forward_expand(gf, ggml_scale(ctx.get(), inp, 1.0f));

    ggml_backend_sched_reset(sched);
    ggml_backend_sched_reserve(sched, gf);
}

// what is known of the architectures that loop_probe() refuses
static const char * loop_why_not(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_QWEN4EXP:
            return "the compressed keys of its cache have no room for passes";
        case LLM_ARCH_T5:
            return "it has an encoder and a decoder, and a span would not say in which";
        default:
            return "its layers are not built one after another";
    }
}

//
// llama_context
//

int32_t llama_context::loop_probe(int32_t n_layer) {
    auto probe = std::make_shared<llama_loop>();

    probe->n_layer = n_layer;
    probe->blocks  = { { 0, 0, 2, LLAMA_LOOP_KV_FROZEN, { 1.0f, 0.0f, 1.0f, 1.0f } } };

    llama_memory_context_ptr mctx;

    if (memory) {
        // no loop was set before, so there are no slots that this one could displace
        const int32_t res = memory->loop_reserve(probe.get());
        memory->loop_apply(res >= 0);
        if (res < 0) {
            return res;
        }
        mctx = memory->init_full();
    }

    cparams.loop = probe;
    const auto * gf = graph_reserve(cparams.n_seq_max, cparams.n_seq_max, cparams.n_seq_max, mctx.get(), true);
    cparams.loop = nullptr;

    if (memory) {
        memory->loop_reserve(nullptr);
        memory->loop_apply(true);
    }

    return gf && get_gf_res_reserve()->n_loop_visits == probe->n_visits() ? 0 : LLAMA_LOOP_ERROR_UNSUPPORTED;
}

int32_t llama_context::set_loop(std::shared_ptr<const llama_loop> loop, std::string & error) {
    if (loop_is_same(loop.get(), cparams.loop.get())) {
        return 0; // keeps the graph
    }

    // the last graph may still be running on memory that is about to change hands
    synchronize();

    if (loop && loop_support == LLAMA_LOOP_SUPPORT_UNKNOWN) {
        const int32_t res = loop_probe(loop->n_layer);
        if (res < 0 && res != LLAMA_LOOP_ERROR_UNSUPPORTED) {
            error = "not enough memory to try a loop on this model";
            return res;
        }
        loop_support = res < 0 ? LLAMA_LOOP_SUPPORT_NO : LLAMA_LOOP_SUPPORT_YES;
    }

    if (loop && loop_support == LLAMA_LOOP_SUPPORT_NO) {
        error = format("architecture '%s' cannot be looped: %s", model.arch_name().c_str(), loop_why_not(model.arch));
        return LLAMA_LOOP_ERROR_UNSUPPORTED;
    }

    int32_t res = 0;

    if (memory) {
        res = memory->loop_reserve(loop.get());
        memory->loop_apply(res >= 0);

        if (res == LLAMA_LOOP_ERROR_MEMORY) {
            error = "not enough memory for the K/V of the passes; the old loop is still set. use kv=frozen, a smaller context or fewer passes";
        } else if (res < 0) {
            error = format("architecture '%s' cannot be looped in this context: its K/V belongs to another one", model.arch_name().c_str());
        }
        if (res < 0) {
            return res;
        }
        if (res == 1) {
            memory->clear(true);
        }
    }

    cparams.loop      = std::move(loop);
    cparams.loop_part = cparams.loop && cparams.loop->params.scope != LLAMA_LOOP_SCOPE_ALL ? LLAMA_LOOP_PART_SOME : LLAMA_LOOP_PART_ALL;

    gf_res_prev_active = nullptr;
    loop_forget_plan(sched.get());

    // the next decode reserves again, but only for a loop larger than any before
    const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);
    if (graph_max_nodes(n_tokens) > get_gf_res_reserve()->get_max_nodes()) {
        sched_need_reserve = true;
    }

    return res;
}

void llama_context::loop_prepare(const llama_ubatch & ubatch) {
    cparams.loop_part = LLAMA_LOOP_PART_ALL;
    cparams.loop_mask = nullptr;

    const auto * loop = cparams.loop.get();

    if (!loop || loop->params.scope == LLAMA_LOOP_SCOPE_ALL) {
        return;
    }

    // the whole batch decides, not the part of it that happens to be in this ubatch
    const auto & batch = balloc->get_batch();

    std::vector<uint32_t> n_seq_tokens(LLAMA_MAX_SEQ, 0);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        n_seq_tokens[batch.seq_id[i][0]]++;
    }

    auto mask = std::make_shared<std::vector<float>>(ubatch.n_tokens);

    uint32_t n_looped = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const bool is_prompt = loop_phase == LLAMA_LOOP_PHASE_AUTO ?
            n_seq_tokens[ubatch.seq_id[i][0]] > 1 : loop_phase == LLAMA_LOOP_PHASE_PROMPT;

        const bool is_looped = is_prompt == (loop->params.scope == LLAMA_LOOP_SCOPE_PROMPT);

        (*mask)[i] = is_looped ? 1.0f : 0.0f;
        n_looped  += is_looped;
    }

    // tokens outside the scope still need their K/V and states in the passes that have their own
    const bool has_slots = memory && memory->loop_size() > 0;

    if (n_looped < ubatch.n_tokens) {
        cparams.loop_part = n_looped == 0 && !has_slots ? LLAMA_LOOP_PART_NONE : LLAMA_LOOP_PART_SOME;
        cparams.loop_mask = std::move(mask);
    }
}

int32_t llama_context::loop_reserve(std::shared_ptr<const llama_loop> loop, std::string & error) {
    const auto old = cparams.loop;

    const int32_t res = set_loop(std::move(loop), error);
    if (res < 0) {
        return res;
    }

    loop_n_nodes = std::max(loop_n_nodes, graph_max_nodes(std::min(cparams.n_ctx, cparams.n_ubatch)));
    sched_reserve();

    const int32_t res_old = set_loop(old, error);

    return res_old < 0 ? res_old : std::max(res, res_old);
}

// a number and the separator after it, or, where may_end, the end of the text; moves p behind both
template <typename T>
static T loop_env_number(const char *& p, char separator, bool may_end, T (*convert)(const char *, char **)) {
    char * rest;
    const T res = convert(p, &rest);

    if (rest == p || (*rest != separator && (*rest || !may_end))) {
        throw std::runtime_error(format("LLAMA_LOOP: a number and '%c' were expected at '%.16s'", separator, p));
    }
    p = *rest ? rest + 1 : rest;
    return res;
}

static long loop_env_strtol(const char * p, char ** rest) {
    return strtol(p, rest, 10);
}

void llama_context::loop_from_env() {
    const char * p = getenv("LLAMA_LOOP");

    if (!p || !*p || model.hparams.vocab_only) {
        return;
    }

    const auto integer = [&](char separator) {
        const long res = loop_env_number<long>(p, separator, false, loop_env_strtol);
        if (res < INT32_MIN || res > INT32_MAX) {
            throw std::runtime_error(format("LLAMA_LOOP: %ld is out of range", res));
        }
        return (int32_t) res;
    };

    auto params = llama_loop_default_params();

    params.unit    = integer(',');
    params.kv      = integer(',');
    params.routing = integer(',');
    params.scope   = integer(',');
    params.rule    = integer(',');
    params.norm    = integer('/');

    std::vector<llama_loop_span>    spans;
    std::vector<std::vector<float>> mixes;

    do {
        llama_loop_span span = {};

        span.first    = integer(',');
        span.last     = integer(',');
        span.n_passes = integer(',');

        if (span.n_passes < 1 || span.n_passes > LLAMA_LOOP_MAX_PASSES || spans.size() >= LLAMA_LOOP_MAX_VISITS) {
            throw std::runtime_error(format("LLAMA_LOOP: %d passes, 1 to %d are possible", span.n_passes, LLAMA_LOOP_MAX_PASSES));
        }

        mixes.emplace_back(size_t(span.n_passes)*span.n_passes, 0.0f);
        for (int32_t i = 0; i < span.n_passes; ++i) {
            for (int32_t j = 0; j <= i; ++j) {
                const bool is_last = i + 1 == span.n_passes && j == i;

                mixes.back()[i*span.n_passes + j] = loop_env_number<float>(p, is_last ? '/' : ',', is_last, strtof);
            }
        }
        spans.push_back(span);
    } while (*p || p[-1] == '/');

    for (size_t s = 0; s < spans.size(); ++s) {
        spans[s].mix = mixes[s].data();
    }
    params.spans   = spans.data();
    params.n_spans = spans.size();

    std::string error;

    auto loop = loop_init(params, model.hparams, error);
    if (!loop || set_loop(std::move(loop), error) < 0) {
        throw std::runtime_error("LLAMA_LOOP: " + error);
    }

    LLAMA_LOG_INFO("%s: loop set, %d layers are applied\n", __func__, cparams.loop->n_visits());
}

std::string llama_context::loop_state_name() const {
    return cparams.loop ? format("+loop:%016" PRIx64, cparams.loop->hash()) : "";
}

void llama_context::loop_state_write(llama_io_write_i & io) const {
    if (cparams.loop) {
        const uint64_t hash = cparams.loop->hash();

        io.write(&LOOP_STATE_MAGIC, sizeof(LOOP_STATE_MAGIC));
        io.write(&hash, sizeof(hash));
    }
}

void llama_context::loop_state_read(llama_io_read_i & io) const {
    if (cparams.loop) {
        uint32_t magic;
        uint64_t hash;

        io.read(&magic, sizeof(magic));
        io.read(&hash,  sizeof(hash));

        if (magic != LOOP_STATE_MAGIC || hash != cparams.loop->hash()) {
            throw std::runtime_error("the state of the sequence was made under another loop");
        }
    }
}

//
// interface implementation
//

int32_t llama_loop_version() {
    return LLAMA_LOOP_VERSION;
}

llama_loop_params llama_loop_default_params() {
    return {
        /*.spans   =*/ nullptr,
        /*.n_spans =*/ 0,
        /*.unit    =*/ LLAMA_LOOP_UNIT_BLOCK,
        /*.kv      =*/ LLAMA_LOOP_KV_FROZEN,
        /*.routing =*/ LLAMA_LOOP_ROUTING_FREE,
        /*.scope   =*/ LLAMA_LOOP_SCOPE_ALL,
        /*.rule    =*/ LLAMA_LOOP_RULE_MIX,
        /*.norm    =*/ LLAMA_LOOP_NORM_NONE,
    };
}

static int32_t loop_call(
        llama_context * ctx,
        const llama_loop_params * params,
        int32_t (llama_context::*call)(std::shared_ptr<const llama_loop>, std::string &)) {
    loop_last_error.clear();

    if (!ctx) {
        loop_last_error = "the context is NULL";
        return LLAMA_LOOP_ERROR_INVALID;
    }

    try {
        std::shared_ptr<const llama_loop> loop;

        if (params) {
            loop = loop_init(*params, ctx->get_model().hparams, loop_last_error);
            if (!loop) {
                return LLAMA_LOOP_ERROR_INVALID;
            }
        }

        return (ctx->*call)(std::move(loop), loop_last_error);
    } catch (const std::exception & err) {
        loop_last_error = err.what();
        return LLAMA_LOOP_ERROR_MEMORY;
    }
}

int32_t llama_set_loop(llama_context * ctx, const llama_loop_params * params) {
    return loop_call(ctx, params, &llama_context::set_loop);
}

int32_t llama_loop_reserve(llama_context * ctx, const llama_loop_params * params) {
    return loop_call(ctx, params, &llama_context::loop_reserve);
}

void llama_loop_set_phase(llama_context * ctx, llama_loop_phase phase) {
    ctx->loop_phase = phase;
}

const llama_loop_params * llama_get_loop(const llama_context * ctx) {
    const auto * loop = ctx ? ctx->get_cparams().loop.get() : nullptr;

    return loop ? &loop->params : nullptr;
}

size_t llama_loop_memory_size(const llama_context * ctx) {
    const auto * memory = ctx ? ctx->get_memory() : nullptr;

    return memory ? memory->loop_size() : 0;
}

const char * llama_loop_last_error() {
    return loop_last_error.c_str();
}
