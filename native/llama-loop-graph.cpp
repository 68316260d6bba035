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

// the rows that the builder keeps in its last layer
static ggml_tensor * loop_out_ids(const llm_graph_result & res) {
    for (const auto & input : res.inputs) {
        if (const auto * inp = dynamic_cast<const llm_graph_input_out_ids *>(input.get())) {
            return inp->out_ids;
        }
    }
    GGML_ABORT("rows were dropped without out_ids");
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

int llm_graph_context::loop_next(ggml_tensor *& inpL) {
    const llama_loop * lp = loop_get();

    if (!lp) {
        return ++loop.il;
    }

    const bool in_block = loop.i_block < lp->blocks.size() && loop.il >= lp->blocks[loop.i_block].first;

    if (in_block && loop.il == lp->blocks[loop.i_block].last) {
        const auto & block = lp->blocks[loop.i_block];

        // the next pass may overwrite the K/V that this one attends to, so this one goes first even if nothing depends on it
        ggml_build_forward_expand(gf, inpL);

        loop.g.push_back(inpL);
        inpL = loop_mix(block);

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
            loop.routing_first.clear();
        }
    } else {
        loop.il++;
    }

    if (loop.i_block < lp->blocks.size() && loop.il == lp->blocks[loop.i_block].first && loop.pass.i == 0) {
        loop.pass = { 0, lp->blocks[loop.i_block].kv, true };
        loop.x    = { inpL };
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

ggml_tensor * llm_graph_context::loop_mix(const llama_loop_block & block) {
    const int32_t i = loop.pass.i;

    // two ways to write the same state: from x[0], or as a step from x[i]. states that cancel drop out; take the shorter sum
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

    if (step.size() < terms.size()) {
        terms = std::move(step);
    }

    // the last layer of the model may have kept the rows with outputs only
    const int64_t n_rows = loop.g[i]->ne[1];

    ggml_tensor * cur = nullptr;
    for (const auto & [t, coef] : terms) {
        ggml_tensor * term = t->ne[1] != n_rows ? ggml_get_rows(ctx0, t, loop_out_ids(*res)) : t;

        if (std::fabs(coef - 1.0) > LOOP_COEF_EPS) {
            term = ggml_scale(ctx0, term, (float) coef);
        }
        cur = cur ? ggml_add(ctx0, cur, term) : term;
    }
    // tokens outside the scope leave the span as after the first pass
    if (loop.mask && i + 1 == block.n_passes) {
        const auto rows = [&](ggml_tensor * t) { return t->ne[1] != n_rows ? ggml_get_rows(ctx0, t, loop_out_ids(*res)) : t; };

        ggml_tensor * plain = rows(loop.g[0]);

        cur = ggml_add(ctx0, plain, ggml_mul(ctx0, ggml_sub(ctx0, cur, plain), rows(loop.mask)));
    }
    cb(cur, "loop_x", block.last);

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
        ggml_tensor * out_ids = loop_out_ids(*res);

        selected_experts = ggml_get_rows(ctx0, selected_experts, out_ids);

        weights = ggml_reshape_2d(ctx0, weights, weights->ne[1], weights->ne[2]);
        weights = ggml_get_rows  (ctx0, weights, out_ids);
        weights = ggml_reshape_3d(ctx0, weights, 1, weights->ne[0], weights->ne[1]);
    }
}

void llm_graph_context::loop_forward_kv(ggml_tensor * cur) const {
    if (loop.pass.computes_kv()) {
        ggml_build_forward_expand(gf, cur);
    }
}
