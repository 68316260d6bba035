// Continue a text with layers FIRST to LAST applied three times, one Euler step of a third each:
//
//     cc -std=c11 loop.c $(edgeloop config --cflags --libs --rpath) -o loop
//     ./loop model.gguf 12 20 "Once upon a time"

#include "llama-loop.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_CTX = 512, N_PREDICT = 32 };

static void print_errors(enum ggml_log_level level, const char * text, void * user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

int main(int argc, char ** argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: %s MODEL FIRST LAST TEXT\n", argv[0]);
        return 2;
    }
    llama_log_set(print_errors, NULL);
    ggml_backend_load_all(); // of a portable build, from the program's folder or the current one

    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    struct llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return 1;
    }

    const float h = 1.0f/3.0f;
    const float mix[] = {
        h, 0, 0,
        h, h, 0,
        h, h, h,
    };
    const struct llama_loop_span span = { atoi(argv[2]), atoi(argv[3]), 3, mix };

    struct llama_loop_params loop = llama_loop_default_params();
    loop.spans   = &span;
    loop.n_spans = 1;
    if (llama_set_loop(ctx, &loop) < 0) {
        fprintf(stderr, "%s\n", llama_loop_last_error());
        return 1;
    }

    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    struct llama_sampler * greedy = llama_sampler_init_greedy();
    llama_token tokens[N_CTX - N_PREDICT];
    int32_t n_tokens = llama_tokenize(vocab, argv[4], (int32_t) strlen(argv[4]), tokens, N_CTX - N_PREDICT, true, false);
    for (int i = 0; i < N_PREDICT && n_tokens > 0; i++) {
        if (llama_decode(ctx, llama_batch_get_one(tokens, n_tokens)) != 0) {
            return 1;
        }
        tokens[0] = llama_sampler_sample(greedy, ctx, -1);
        n_tokens = 1;
        if (llama_vocab_is_eog(vocab, tokens[0])) {
            break;
        }
        char piece[256];
        const int32_t n = llama_token_to_piece(vocab, tokens[0], piece, sizeof(piece), 0, false);
        fwrite(piece, 1, n > 0 ? (size_t) n : 0, stdout);
    }
    putchar('\n');

    llama_sampler_free(greedy);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
