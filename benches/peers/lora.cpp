// llama.cpp with an unmerged LoRA adapter, on and off in turn within one process.
//
//   lora MODEL.gguf ADAPTER.gguf THREADS ROUNDS [CONTEXT] [STREAMS,...]
//
// Each round measures, with the adapter and without: prefill of 512 tokens by one sequence, then decoding from CONTEXT
// tokens (default 128) of context with each number of streams (default 1,4,8,16). 128 tokens are generated for one
// stream; several streams share them, but each generates at least 16. So does `lonas bench`.
//
// Prints a JSON object a line: {"test", "context", "streams", "adapter", "threads", "round", "tokens_per_second"} and
// "logit_difference", the largest change of a logit by the adapter: it proves that the adapter is applied (llama-bench
// cannot load one, llama-batched-bench accepts --lora and ignores it).

#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int PROMPT = 512;
constexpr int OUTPUT = 128;
constexpr int LEAST_STEPS = 16;
// Prompt tokens of one step, as lonas computes them.
constexpr int STEP = 512;

[[noreturn]] void fail(const char * what) {
    std::fprintf(stderr, "lora: %s\n", what);
    std::exit(1);
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Peer {
public:
    Peer(const char * model_path, const char * adapter_path, int threads, int streams, int context) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        model = llama_model_load_from_file(model_path, llama_model_default_params());
        if (!model) fail("the model cannot be loaded");
        auto parameters = llama_context_default_params();
        const int each = std::max(context + OUTPUT, PROMPT);
        // A pool that all sequences share, as lonas has it; llama.cpp wants multiples of 256.
        parameters.n_ctx = (streams * each + 255) / 256 * 256;
        parameters.n_batch = STEP;
        parameters.n_ubatch = STEP;
        parameters.n_seq_max = streams;
        parameters.n_threads = threads;
        parameters.n_threads_batch = threads;
        parameters.kv_unified = true;
        state = llama_init_from_model(model, parameters);
        if (!state) fail("there is no memory for the context");
        adapter = llama_adapter_lora_init(model, adapter_path);
        if (!adapter) fail("the adapter cannot be loaded");
        vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
        batch = llama_batch_init(STEP, 0, 1);
    }

    void set_adapter(bool on) {
        float scale = 1.0f;
        if (llama_set_adapters_lora(state, &adapter, on ? 1 : 0, &scale) != 0) fail("the adapter cannot be set");
    }

    void forget() { llama_memory_clear(llama_get_memory(state), true); }

    // Forgets what a stream has from this position on.
    void forget(int stream, int position) { llama_memory_seq_rm(llama_get_memory(state), stream, position, -1); }

    // Tokens a second.
    double prefill(int stream, int tokens) {
        const double began = now();
        for (int start = 0; start < tokens; start += STEP) {
            const int end = std::min(start + STEP, tokens);
            batch.n_tokens = 0;
            for (int position = start; position < end; position++) push(stream, position, position + 1 == tokens);
            compute();
        }
        return tokens / (now() - began);
    }

    // Tokens a second, all streams together.
    double decode(int streams, int context, int steps) {
        const double began = now();
        for (int step = 0; step < steps; step++) {
            batch.n_tokens = 0;
            for (int stream = 0; stream < streams; stream++) push(stream, context + step, true);
            compute();
        }
        return streams * steps / (now() - began);
    }

    std::vector<float> last_logits() {
        const float * logits = llama_get_logits_ith(state, -1);
        return {logits, logits + vocabulary};
    }

private:
    void push(int stream, int position, bool logits) {
        const int i = batch.n_tokens++;
        batch.token[i] = (1000 + stream * 7919 + position * 104729L) % vocabulary;
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = stream;
        batch.logits[i] = logits;
    }

    void compute() {
        if (llama_decode(state, batch) != 0) fail("a step failed");
        llama_synchronize(state);
    }

    llama_model * model = nullptr;
    llama_context * state = nullptr;
    llama_adapter_lora * adapter = nullptr;
    llama_batch batch = {};
    int vocabulary = 0;
};

double logit_difference(Peer & peer) {
    std::vector<float> logits[2];
    for (const bool on : {false, true}) {
        peer.set_adapter(on);
        peer.forget();
        peer.prefill(0, 64);
        logits[on] = peer.last_logits();
    }
    double largest = 0;
    for (size_t i = 0; i < logits[0].size(); i++) {
        largest = std::max(largest, std::fabs(double(logits[1][i]) - logits[0][i]));
    }
    return largest;
}

} // namespace

int main(int count, char ** arguments) {
    if (count < 5) fail("usage: lora MODEL.gguf ADAPTER.gguf THREADS ROUNDS [CONTEXT] [STREAMS,...]");
    const int threads = std::atoi(arguments[3]), rounds = std::atoi(arguments[4]);
    const int context = count > 5 ? std::atoi(arguments[5]) : 128;
    std::vector<int> streams;
    std::istringstream list(count > 6 ? arguments[6] : "1,4,8,16");
    for (std::string number; std::getline(list, number, ',');) streams.push_back(std::atoi(number.c_str()));
    if (threads < 1 || rounds < 1 || context < 1 || streams.empty()) fail("numbers must be at least 1");
    const int most = *std::max_element(streams.begin(), streams.end());

    Peer peer(arguments[1], arguments[2], threads, most, context);
    const double difference = logit_difference(peer);
    if (!(difference > 0)) fail("the adapter changes nothing");
    auto print = [&](const char * test, int from, int of, bool on, int round, double rate) {
        std::printf("{\"test\":\"%s\",\"context\":%d,\"streams\":%d,\"adapter\":%s,\"threads\":%d,\"round\":%d,"
                    "\"tokens_per_second\":%.3f,\"logit_difference\":%.4g}\n",
                    test, from, of, on ? "true" : "false", threads, round, rate, difference);
        std::fflush(stdout);
    };
    for (int round = 0; round < rounds; round++) {
        for (int turn = 0; turn < 2; turn++) {
            const bool on = (turn + round) % 2 == 0;
            peer.set_adapter(on);
            peer.forget();
            print("prefill", 0, 1, on, round, peer.prefill(0, PROMPT));
        }
        peer.forget();
        for (int stream = 0; stream < most; stream++) peer.prefill(stream, context);
        for (const int together : streams) {
            const int steps = std::min(std::max(OUTPUT / together, LEAST_STEPS), OUTPUT);
            for (int turn = 0; turn < 2; turn++) {
                const bool on = (turn + round) % 2 == 0;
                peer.set_adapter(on);
                // One step that does not count: the first one with other adapters plans its work anew.
                peer.decode(together, context, 1);
                for (int stream = 0; stream < together; stream++) peer.forget(stream, context);
                print("decode", context, together, on, round, peer.decode(together, context, steps));
                for (int stream = 0; stream < together; stream++) peer.forget(stream, context);
            }
        }
    }
}
