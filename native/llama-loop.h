#ifndef LLAMA_LOOP_H
#define LLAMA_LOOP_H

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

//
// Looping: apply spans of layers more than once, damped, without a second copy of the weights.
//
// With x[0] the residual stream that enters a span and G one pass over its layers, the passes i = 0..n_passes-1 compute
//
//     x[i+1] = x[0] + sum over j <= i of mix[i][j] * (G(x[j]) - x[j])
//
// and x[n_passes] enters the layer after the span. All ones is plain repetition; all 1/n_passes is n_passes Euler steps.
//
// A program that does not call these functions can be given a loop in the environment variable LLAMA_LOOP, which every
// context reads when it is made (a wrong one is an error):
//
//     UNIT,KV,ROUTING,SCOPE,RULE,NORM/FIRST,LAST,N_PASSES,MIX.../FIRST,...
//
// with the numbers of the enums below and the rows of the mix up to the diagonal, also where the rule does not use them. `edgeloop env SPEC -m MODEL` writes it.
//

#define LLAMA_LOOP_VERSION 1 // of this interface; raised when a struct or a meaning changes

#define LLAMA_LOOP_MAX_PASSES 64  // passes of one span
#define LLAMA_LOOP_MAX_VISITS 512 // layers applied for one token, repeated ones counted each time

#ifdef __cplusplus
extern "C" {
#endif

    // returned by llama_set_loop(); llama_loop_last_error() has the sentence
    enum llama_loop_error {
        LLAMA_LOOP_ERROR_INVALID     = -1, // the parameters are wrong, or do not fit the model
        LLAMA_LOOP_ERROR_UNSUPPORTED = -2, // this architecture cannot be looped
        LLAMA_LOOP_ERROR_MEMORY      = -3, // no memory for the K/V of the passes
    };

    // what one pass applies
    enum llama_loop_unit {
        LLAMA_LOOP_UNIT_BLOCK = 0, // the whole span
        LLAMA_LOOP_UNIT_LAYER = 1, // each layer makes all its passes before the next layer
    };

    // the keys and values that the passes after the first attend to, and those kept for later tokens
    enum llama_loop_kv {
        LLAMA_LOOP_KV_FROZEN = 0, // the first pass's; keeps them; computes no others
        LLAMA_LOOP_KV_OWN    = 1, // each pass its own; keeps all; needs (n_passes - 1) times the span's K/V
        LLAMA_LOOP_KV_FIRST  = 2, // this batch's of the same pass, older tokens' first; keeps the first pass's
        LLAMA_LOOP_KV_LAST   = 3, // this batch's of the same pass, older tokens' last; keeps the last pass's
    };

    // how the state after a pass is put together
    enum llama_loop_rule {
        LLAMA_LOOP_RULE_MIX          = 0, // by the matrix, as above
        LLAMA_LOOP_RULE_RUNNING_MEAN = 1, // every layer passes on the mean of its outputs in the passes so far
        LLAMA_LOOP_RULE_AUTO_ALIGN   = 2, // sum of w[j] G(x[j]) with w[j] ~ max(cos(G(x[j]), G(x[0])), 0) for each token, sum 1
    };

    // the length of the states x[1] .. x[n_passes-1] that enter the passes after the first, for each token; they are rescaled
    // before G sees them, and it is the rescaled ones that the equation above means. x[n_passes] leaves the span as it is
    enum llama_loop_norm {
        LLAMA_LOOP_NORM_NONE   = 0, // whatever comes out
        LLAMA_LOOP_NORM_HOLD   = 1, // |x[0]|
        LLAMA_LOOP_NORM_INTERP = 2, // for x[i] |x[0]| + i/n_passes (|G(x[0])| - |x[0]|)
    };

    // the experts of mixture-of-experts layers in the passes after the first
    enum llama_loop_routing {
        LLAMA_LOOP_ROUTING_FREE   = 0, // each pass selects its own
        LLAMA_LOOP_ROUTING_FROZEN = 1, // the first pass's, with its weights
    };

    // the tokens that are looped; the others get the plain model's states in the same batch
    enum llama_loop_scope {
        LLAMA_LOOP_SCOPE_ALL    = 0,
        LLAMA_LOOP_SCOPE_PROMPT = 1,
        LLAMA_LOOP_SCOPE_GEN    = 2,
    };

    // what a batch holds, for the scope
    enum llama_loop_phase {
        LLAMA_LOOP_PHASE_AUTO   = 0, // of each sequence: one token is generated, more are a prompt
        LLAMA_LOOP_PHASE_PROMPT = 1,
        LLAMA_LOOP_PHASE_GEN    = 2,
    };

    struct llama_loop_span {
        int32_t first;    // layers, both inclusive, 0-based
        int32_t last;
        int32_t n_passes; // in total; 1 is the plain model

        const float * mix; // [n_passes][n_passes], row-major; entries above the diagonal are not read. NULL with another rule
    };

    struct llama_loop_params {
        const struct llama_loop_span * spans; // ascending, disjoint

        int32_t n_spans;

        // sized integers, because a caller may pass anything
        int32_t unit;    // enum llama_loop_unit
        int32_t kv;      // enum llama_loop_kv
        int32_t routing; // enum llama_loop_routing
        int32_t scope;   // enum llama_loop_scope; with kv = last only all
        int32_t rule;    // enum llama_loop_rule
        int32_t norm;    // enum llama_loop_norm
    };

    // LLAMA_LOOP_VERSION of the library that is loaded.
    LLAMA_API int32_t llama_loop_version(void);

    // No spans, unit = block, kv = frozen, routing = free, scope = all, rule = mix, norm = none.
    LLAMA_API struct llama_loop_params llama_loop_default_params(void);

    // Set the loop of a context; NULL turns it off. May be called between any two decodes; the parameters are copied.
    // Returns 0, or 1 when room for more K/V had to be made and the memory was cleared, or a negative llama_loop_error
    // after which the old loop is still set. Otherwise the K/V made under the old loop stays and is the caller's to keep or clear.
    LLAMA_API int32_t llama_set_loop(struct llama_context * ctx, const struct llama_loop_params * params);

    // Make room now for a loop that llama_set_loop() will be given later, and for every smaller one: setting those allocates and
    // reserves nothing more. The loop that is set stays. Returns what llama_set_loop() would have returned.
    LLAMA_API int32_t llama_loop_reserve(struct llama_context * ctx, const struct llama_loop_params * params);

    // Say what the next batches of a context hold; AUTO until then. Only a loop with a scope needs to know.
    LLAMA_API void llama_loop_set_phase(struct llama_context * ctx, enum llama_loop_phase phase);

    // The loop of a context, or NULL when it is off. Owned by the context, valid until the next llama_set_loop().
    LLAMA_API const struct llama_loop_params * llama_get_loop(const struct llama_context * ctx);

    // Bytes of K/V and recurrent states that the loop holds beyond the plain model's. 0 without recurrent layers unless kv = own.
    LLAMA_API size_t llama_loop_memory_size(const struct llama_context * ctx);

    // Why the last llama_set_loop() of this thread failed, one sentence; "" after a success. Valid until the next one.
    LLAMA_API const char * llama_loop_last_error(void);

#ifdef __cplusplus
}
#endif

#endif // LLAMA_LOOP_H
