// Graph building: which layer comes next, and the state it gets.

#include "llama-graph.h"
#include "llama-memory.h"

#include <cmath>
#include <tuple>

// a coefficient below this is what is left of two that cancel in float arithmetic
static constexpr double LOOP_COEF_EPS = 1e-6;

using loop_terms = std::vector<std::pair<ggml_tensor *, double>>;

static void loop_term_add(loop_terms & terms, ggml_tensor * t, double coef) {
    for (auto & term : terms) {
        if (term.first == t) {
            term.second += coef;
            return;
        }
    }
    terms.emplace_back(t, coef);
}

static void loop_terms_clean(loop_terms & terms) {
    loop_terms res;
    for (const auto & term : terms) {
        if (std::fabs(term.second) > LOOP_COEF_EPS) {
            res.push_back(term);
        }
    }
    terms = std::move(res);
}

class llm_graph_input_loop_mask : public llm_graph_input_i {
public:
    llm_graph_input_loop_mask(const llama_cparams & cparams) : mask(cparams.loop_mask) {}

    void set_input(const llama_ubatch * ubatch) override {
        GGML_ASSERT(mask && mask->size() == ubatch->n_tokens);
        ggml_backend_tensor_set(tensor, mask->data(), 0, ggml_nbytes(tensor));
    }

    bool can_reuse(const llm_graph_params & params) override {
        mask = params.cparams.loop_mask;
        return mask && (int64_t) mask->size() == tensor->ne[1];
    }

    ggml_tensor * tensor = nullptr; // F32 [1, n_tokens]

    std::shared_ptr<const std::vector<float>> mask;
};

const llama_loop * llm_graph_context::loop_get() const {
    return cparams.loop_part == LLAMA_LOOP_PART_NONE ? nullptr : cparams.loop.get();
}

int llm_graph_context::loop_begin(ggml_tensor *& inpL) {
    loop    = {};
    loop.il = -1;

    if (loop_get() && cparams.loop_part == LLAMA_LOOP_PART_SOME) {
        auto inp = std::make_unique<llm_graph_input_loop_mask>(cparams);

        loop.mask = inp->tensor = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, 1, n_tokens);
        ggml_set_input(loop.mask);
        ggml_set_name (loop.mask, "loop_mask");

        res->add_input(std::move(inp));
    }

    return loop_next(inpL);
}

int llm_graph_context::loop_enter(int il, ggml_tensor *& inpL) {
    if (il == 0) {
        return loop_begin(inpL);
    }
    GGML_ASSERT(il == loop.il);

    // what was there when the stack below ended is not what enters this one
    if (!loop.x.empty()) {
        loop.x = { inpL };
    }
    return il;
}

int llm_graph_context::loop_next(ggml_tensor *& inpL) {
    const llama_loop * lp = loop_get();

    if (!lp) {
        return ++loop.il;
    }

    const bool in_block = loop.i_block < lp->blocks.size() && loop.il >= lp->blocks[loop.i_block].first;

    if (in_block && lp->params.rule == LLAMA_LOOP_RULE_RUNNING_MEAN) {
        inpL = loop_mean(inpL);
    }

    if (in_block && loop.il == lp->blocks[loop.i_block].last) {
        const auto & block = lp->blocks[loop.i_block];

        // the next pass may overwrite the K/V that this one attends to, so this one goes first even if nothing depends on it
        ggml_build_forward_expand(gf, inpL);

        loop.g.push_back(inpL);
        inpL = loop_state(block);

        // every pass starts with what entered the first one, the layers above see what the first one left
        if (loop_side) {
            loop.side_first = loop.pass.i == 0 ? *loop_side : loop.side_first;
            *loop_side = loop.pass.i + 1 < block.n_passes ? loop.side_in : loop.side_first;
        }

        loop.il = loop.pass.i + 1 < block.n_passes ? block.first : block.last + 1;
        loop.i_routing = 0;

        if (loop.il == block.first) {
            loop.x.push_back(inpL);
            loop.pass.i++;
        } else {
            if (mctx) {
                mctx->loop_finish(ctx0, gf);
            }
            loop.i_block++;
            loop.pass = {};
            loop.x.clear();
            loop.g.clear();
            loop.mean.clear();
            loop.routing_first.clear();
        }
    } else {
        loop.il++;
    }

    if (loop.i_block < lp->blocks.size() && loop.il == lp->blocks[loop.i_block].first && loop.pass.i == 0) {
        loop.pass = { 0, lp->blocks[loop.i_block].kv, true };
        loop.x    = { inpL };

        loop.side_in = loop_side ? *loop_side : nullptr;
    }

    if (mctx) {
        mctx->loop_select(loop.pass);
    }

    if (loop.il < n_layer) {
        res->n_loop_visits++;
    }

    return loop.il;
}

bool llm_graph_context::loop_is_last(int il) const {
    const bool again = loop.pass.is_looped && loop.pass.i + 1 < cparams.loop->blocks[loop.i_block].n_passes;

    return il == n_layer - 1 && !again;
}

ggml_tensor * llm_graph_context::loop_rows(ggml_tensor * t, int64_t n_rows) const {
    if (t->ne[1] == n_rows) {
        return t;
    }
    for (const auto & input : res->inputs) {
        if (const auto * inp = dynamic_cast<const llm_graph_input_out_ids *>(input.get())) {
            return ggml_get_rows(ctx0, t, inp->out_ids);
        }
    }
    GGML_ABORT("rows were dropped without out_ids");
}

ggml_tensor * llm_graph_context::loop_state(const llama_loop_block & block) {
    const int32_t i = loop.pass.i;

    ggml_tensor * cur = loop.g[i];

    switch (cparams.loop->params.rule) {
        case LLAMA_LOOP_RULE_MIX:          cur = loop_mix(block); break;
        case LLAMA_LOOP_RULE_AUTO_ALIGN:   cur = loop_align();    break;
        case LLAMA_LOOP_RULE_RUNNING_MEAN: break; // is the last layer's mean already
    }

    if (cparams.loop->params.norm != LLAMA_LOOP_NORM_NONE && i + 1 < block.n_passes) {
        cur = loop_rescale(cur, (i + 1.0f)/block.n_passes);
    }

    // tokens outside the scope leave the span as after the first pass
    if (loop.mask && i + 1 == block.n_passes) {
        ggml_tensor * plain = loop_rows(loop.g[0], cur->ne[1]);

        cur = ggml_add(ctx0, plain, ggml_mul(ctx0, ggml_sub(ctx0, cur, plain), loop_rows(loop.mask, cur->ne[1])));
    }
    cb(cur, "loop_x", block.last);

    return cur;
}

ggml_tensor * llm_graph_context::loop_norm(ggml_tensor * x) const {
    return ggml_sqrt(ctx0, ggml_sum_rows(ctx0, ggml_sqr(ctx0, x)));
}

ggml_tensor * llm_graph_context::loop_rescale(ggml_tensor * cur, float depth) const {
    ggml_tensor * target = loop_norm(loop.x[0]);

    if (cparams.loop->params.norm == LLAMA_LOOP_NORM_INTERP) {
        ggml_tensor * first = loop_norm(loop.g[0]);

        target = ggml_add(ctx0, ggml_scale(ctx0, target, 1.0f - depth), ggml_scale(ctx0, first, depth));
    }
    // a state of zeros stays one
    return ggml_mul(ctx0, cur, ggml_div(ctx0, target, ggml_scale_bias(ctx0, loop_norm(cur), 1.0f, 1e-30f)));
}

ggml_tensor * llm_graph_context::loop_mean(ggml_tensor * cur) {
    auto & mean = loop.mean[loop.il];

    if (loop.pass.i == 0) {
        mean = cur;
    } else {
        mean = loop_rows(mean, cur->ne[1]);
        mean = ggml_add(ctx0, mean, ggml_scale(ctx0, ggml_sub(ctx0, cur, mean), 1.0f/(loop.pass.i + 1)));
    }
    return mean;
}

ggml_tensor * llm_graph_context::loop_align() {
    const int64_t n_rows = loop.g.back()->ne[1];

    ggml_tensor * g0  = loop_rows(loop.g[0], n_rows);
    ggml_tensor * gg0 = ggml_sum_rows(ctx0, ggml_sqr(ctx0, g0));

    ggml_tensor * cur   = g0; // the first weight is cos(G(x[0]), G(x[0])) = 1
    ggml_tensor * w_sum = nullptr;

    for (size_t j = 1; j < loop.g.size(); ++j) {
        ggml_tensor * g  = loop_rows(loop.g[j], n_rows);
        ggml_tensor * gg = ggml_sum_rows(ctx0, ggml_sqr(ctx0, g));

        ggml_tensor * w = ggml_sum_rows(ctx0, ggml_mul(ctx0, g, g0)); // [1, n_rows]
        w = ggml_relu(ctx0, ggml_div(ctx0, w, ggml_sqrt(ctx0, ggml_mul(ctx0, gg, gg0))));

        cur   = ggml_add(ctx0, cur, ggml_mul(ctx0, g, w));
        w_sum = w_sum ? ggml_add(ctx0, w_sum, w) : w;
    }

    return w_sum ? ggml_div(ctx0, cur, ggml_scale_bias(ctx0, w_sum, 1.0f, 1.0f)) : cur;
}

ggml_tensor * llm_graph_context::loop_mix(const llama_loop_block & block) {
    const int32_t i = loop.pass.i;

    // two ways to write the same state: from x[0], or as a step from x[i]. states that cancel drop out; take the shorter sum.
    // only the first holds when x[i] was rescaled
    loop_terms terms;
    loop_terms step;

    loop_term_add(terms, loop.x[0], 1.0);
    loop_term_add(step,  loop.x[i], 1.0);

    for (int32_t j = 0; j <= i; ++j) {
        const double m  = block.m(i, j);
        const double dm = m - (j < i ? block.m(i - 1, j) : 0.0);

        loop_term_add(terms, loop.g[j],  m);
        loop_term_add(terms, loop.x[j], -m);
        loop_term_add(step,  loop.g[j],  dm);
        loop_term_add(step,  loop.x[j], -dm);
    }

    loop_terms_clean(terms);
    loop_terms_clean(step);

    if (step.size() < terms.size() && cparams.loop->params.norm == LLAMA_LOOP_NORM_NONE) {
        terms = std::move(step);
    }

    ggml_tensor * cur = nullptr;
    for (const auto & [t, coef] : terms) {
        // the last layer of the model may have kept the rows with outputs only
        ggml_tensor * term = loop_rows(t, loop.g[i]->ne[1]);

        if (std::fabs(coef - 1.0) > LOOP_COEF_EPS) {
            term = ggml_scale(ctx0, term, (float) coef);
        }
        cur = cur ? ggml_add(ctx0, cur, term) : term;
    }

    return cur;
}

void llm_graph_context::loop_reuse_kv(ggml_tensor *& k_cur, ggml_tensor *& v_cur, int il) const {
    if (!loop.pass.is_looped || loop.pass.kv != LLAMA_LOOP_KV_FROZEN) {
        return;
    }
    if (loop.pass.i == 0) {
        loop.kv_first[il] = { k_cur, v_cur };
    } else {
        std::tie(k_cur, v_cur) = loop.kv_first.at(il);
    }
}

void llm_graph_context::loop_reuse_routing(ggml_tensor *& selected_experts, ggml_tensor *& weights) const {
    if (!loop.pass.is_looped || cparams.loop->params.routing != LLAMA_LOOP_ROUTING_FROZEN) {
        return;
    }
    if (loop.pass.i == 0) {
        loop.routing_first.emplace_back(selected_experts, weights);
        return;
    }

    const int64_t n_rows = weights->ne[2];

    std::tie(selected_experts, weights) = loop.routing_first.at(loop.i_routing++);

    if (weights->ne[2] != n_rows) {
        selected_experts = loop_rows(selected_experts, n_rows);

        weights = loop_rows(ggml_reshape_2d(ctx0, weights, weights->ne[1], weights->ne[2]), n_rows);
        weights = ggml_reshape_3d(ctx0, weights, 1, weights->ne[0], weights->ne[1]);
    }
}

void llm_graph_context::loop_forward_kv(ggml_tensor * cur) const {
    if (loop.pass.computes_kv()) {
        ggml_build_forward_expand(gf, cur);
    }
}
