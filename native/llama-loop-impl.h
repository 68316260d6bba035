#pragma once

// What the engine keeps of a loop. Included by upstream's headers through patches/; knows nothing of specs and solvers.

#include "llama-loop.h"

#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

// one map G that is applied n_passes times: a span, or one layer of it with unit = layer
struct llama_loop_block {
    int32_t first;
    int32_t last;
    int32_t n_passes;

    llama_loop_kv kv;

    std::vector<float> mix; // [n_passes][n_passes]

    float m(int32_t i, int32_t j) const { return i < 0 ? 0.0f : mix[i*n_passes + j]; }
};

// immutable; shared by a context and the graphs it built, which are reused while they point to the same loop
struct llama_loop {
    int32_t n_layer;

    std::vector<llama_loop_block> blocks; // ascending, disjoint

    // the caller's view, for llama_get_loop()
    llama_loop_params params;
    std::vector<llama_loop_span>    spans;
    std::vector<std::vector<float>> mixes;

    // the same for equal loops in every process
    uint64_t hash() const;

    // how many layers are built for one token
    int32_t n_visits() const;

    // the node budget of a graph, given the plain model's
    uint32_t n_nodes_max(uint32_t n_nodes_plain) const;
};

// which tokens of a ubatch are in the loop's scope
enum llama_loop_part {
    LLAMA_LOOP_PART_ALL,
    LLAMA_LOOP_PART_SOME, // the mask says which
    LLAMA_LOOP_PART_NONE, // the plain model
};

// the pass that the layers being built belong to. kv says nothing of recurrent states: each pass has its own
struct llama_loop_pass {
    int32_t       i  = 0;
    llama_loop_kv kv = LLAMA_LOOP_KV_FROZEN;
    bool          is_looped = false;

    // every pass after the first that has K/V of its own to store
    bool computes_kv() const { return i == 0 || kv != LLAMA_LOOP_KV_FROZEN; }
};

// where the graph builder stands in the loop
struct llama_loop_cursor {
    int32_t il      = 0;
    size_t  i_block = 0;

    llama_loop_pass pass;

    std::vector<ggml_tensor *> x; // states that entered the passes of this block
    std::vector<ggml_tensor *> g; // what the passes made of them

    // rule = running mean: of each layer's outputs in the passes so far
    std::map<int, ggml_tensor *> mean;

    // models without a cache: the first pass's K and V of each layer
    mutable std::map<int, std::pair<ggml_tensor *, ggml_tensor *>> kv_first;

    // what goes beside the residual stream: as it entered the block, and as the first pass left it
    ggml_tensor * side_in    = nullptr;
    ggml_tensor * side_first = nullptr;

    ggml_tensor * mask = nullptr; // [1, n_tokens], 1 for tokens in the scope; null: all are

    // routing = frozen: the first pass's experts and weights, in the order in which the layers of the block route
    mutable std::vector<std::pair<ggml_tensor *, ggml_tensor *>> routing_first;
    mutable size_t i_routing = 0;
};

// does the graph builder of this architecture go through llm_graph_context::loop_next()?
enum llama_loop_support {
    LLAMA_LOOP_SUPPORT_UNKNOWN,
    LLAMA_LOOP_SUPPORT_YES,
    LLAMA_LOOP_SUPPORT_NO,
};

// what one layer keeps in one pass after the first: K and V, or the recurrent states. null where the layer has none
struct llama_loop_slot {
    uint32_t il;
    int32_t  pass;

    std::vector<ggml_tensor *> data;
    std::vector<std::vector<ggml_tensor *>> streams; // views of data, one per stream of a K/V cache
};

// the loop's part of a memory: the slots of the passes
struct llama_loop_slots {
    using ctxs_bufs_t = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;

    llama_loop_pass pass; // selected while a graph is built

    // entries of the memory's layers that are not slots
    size_t n_layers_plain = 0;

    // (layer, pass) of the current loop -> entry of the memory's layers
    std::map<std::pair<int32_t, int32_t>, int32_t> layer_ids;

    // the entry for the selected pass; id_plain is where the first pass of a layer is
    int32_t layer_id(int32_t il, int32_t id_plain) const;
    int32_t layer_id(int32_t il) const { return layer_id(il, il); }

    // for llama_memory_i::loop_reserve(): wanted are (layer, pass), layer_data() what a layer keeps in its first pass
    int32_t reserve(std::vector<std::pair<uint32_t, int32_t>> wanted, const std::function<std::vector<ggml_tensor *>(uint32_t)> & layer_data);

    // for llama_memory_i::loop_apply(): true when reserve() was accepted; the slots to use are then in active()
    bool apply(bool accept, ctxs_bufs_t & ctxs_bufs);

    std::vector<llama_loop_slot> active() const;

private:
    // allocated slots outlive their loop, so that switching it off and on again costs nothing
    std::vector<llama_loop_slot> slots;
    size_t n_bufs_plain = 0; // entries of the memory's ctxs_bufs that do not hold slots
    bool   has_bufs     = false;

    std::vector<llama_loop_slot> slots_next;
    ctxs_bufs_t                  ctxs_bufs_next;

    std::vector<std::pair<uint32_t, int32_t>> wanted;

    const llama_loop_slot * find(uint32_t il, int32_t pass) const;
};

// for a K/V cache: also what kv = first has to put back after the last pass
struct llama_loop_kv_slots : llama_loop_slots {
    struct stored {
        ggml_tensor * cur;
        ggml_tensor * idxs;
        int32_t       il;
    };
    std::vector<stored> first_k;
    std::vector<stored> first_v;

    // false: the selected pass must not store, it attends to what is there
    bool store_k(ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il) { return store(first_k, k_cur, k_idxs, il); }
    bool store_v(ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il) { return store(first_v, v_cur, v_idxs, il); }

    bool store(std::vector<stored> & dst, ggml_tensor * cur, ggml_tensor * idxs, int32_t il);
};
