/* The world `reward` of grpo:plugin@0.1.0 in C: records as the canonical ABI lays them out in wasm32, and
 * the memory that they live in. Include it once, in the file with `configure` and `score`. */
#ifndef GRPO_PLUGIN_H
#define GRPO_PLUGIN_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* UTF-8 without a zero at the end. */
typedef struct { char *ptr; size_t len; } grpo_string;

typedef struct { uint8_t is_some; grpo_string value; } grpo_option_string;

typedef enum { GRPO_STOP, GRPO_LENGTH, GRPO_ABORT } grpo_finish;

/* Times in milliseconds; wit/types.wit says what each is. */
typedef struct {
    double latency_ms, queue_ms, prefill_ms, decode_ms;
    uint32_t prompt_tokens, cached_prompt_tokens, generated_tokens, draft_tokens, accepted_tokens;
    uint64_t kv_bytes;
} grpo_telemetry;

typedef struct { grpo_string row, prompt; } grpo_question;

typedef struct {
    uint32_t question;
    grpo_string completion;
    grpo_option_string reasoning, answer;
    uint8_t finish; /* grpo_finish */
} grpo_sample;

typedef struct { grpo_string name; double value; } grpo_part;

typedef struct { double total; grpo_part *parts; size_t parts_len; } grpo_scored;

typedef struct {
    uint8_t tag;
    union { grpo_scored value; grpo_string skip; };
} grpo_verdict;

typedef enum { GRPO_VALUE, GRPO_SKIP } grpo_verdict_tag;

/* What went wrong, as `plugin-error` of the WIT. */
typedef enum { GRPO_CONFIG, GRPO_INPUT, GRPO_INTERNAL } grpo_error_tag;

typedef struct { uint8_t tag; grpo_string message; } grpo_error;

_Static_assert(sizeof(grpo_question) == 16 && sizeof(grpo_sample) == 40 && sizeof(grpo_verdict) == 24
               && sizeof(grpo_part) == 16 && sizeof(grpo_telemetry) == 64, "the canonical ABI");

/* To be written by the plugin. Each returns whether it succeeded; if not, it has filled in `error`.
 * `verdicts` has room for one verdict a sample. */
static int configure(grpo_string config, grpo_error *error);
static int score(const grpo_question *questions, size_t questions_len, const grpo_sample *samples,
                 size_t samples_len, grpo_verdict *verdicts, grpo_error *error);

/* --- memory: everything of a call, freed at its end --- */

typedef struct grpo_block { struct grpo_block *next; size_t used, size; } grpo_block;
static grpo_block *grpo_blocks;

/* `size` bytes that live until the end of the call. */
static void *grpo_alloc(size_t size) {
    const size_t head = 16, least = 1 << 16;
    size = (size + 15) & ~(size_t)15;
    if (!grpo_blocks || grpo_blocks->size - grpo_blocks->used < size) {
        size_t room = head + (size > least ? size : least);
        grpo_block *block = malloc(room);
        if (!block) abort();
        *block = (grpo_block){ grpo_blocks, head, room };
        grpo_blocks = block;
    }
    void *at = (char *)grpo_blocks + grpo_blocks->used;
    grpo_blocks->used += size;
    return at;
}

static void grpo_free_all(void) {
    while (grpo_blocks) {
        grpo_block *next = grpo_blocks->next;
        free(grpo_blocks);
        grpo_blocks = next;
    }
}

/* Texts up to the zero; `grpo_join` makes one of three. */
static grpo_string grpo_text(const char *text) { return (grpo_string){ (char *)text, strlen(text) }; }

static grpo_string grpo_join(const char *before, grpo_string middle, const char *after) {
    size_t a = strlen(before), b = middle.len, c = strlen(after);
    grpo_string text = { grpo_alloc(a + b + c), a + b + c };
    memcpy(text.ptr, before, a);
    memcpy(text.ptr + a, middle.ptr, b);
    memcpy(text.ptr + a + b, after, c);
    return text;
}

static int grpo_fail(grpo_error *error, grpo_error_tag tag, grpo_string message) {
    *error = (grpo_error){ tag, message };
    return 0;
}

/* --- the border --- */

/* 0 debug, 1 info, 2 warn, 3 error. */
__attribute__((import_module("grpo:plugin/host@0.1.0"), import_name("log")))
void grpo_log(uint32_t level, const char *text, size_t len);

/* What the samples of the running `score` cost, in their order. */
typedef struct { grpo_telemetry *ptr; size_t len; } grpo_telemetry_list;
__attribute__((import_module("grpo:plugin/host@0.1.0"), import_name("sample-telemetry")))
void grpo_sample_telemetry(grpo_telemetry_list *list);

__attribute__((export_name("cabi_realloc")))
void *grpo_cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
    (void)align;
    void *at = grpo_alloc(size);
    if (old_size) memcpy(at, old, old_size < size ? old_size : size);
    return at;
}

typedef struct {
    uint8_t is_error;
    union { struct { grpo_verdict *ptr; size_t len; } ok; grpo_error error; };
} grpo_result;
static grpo_result grpo_returned;

__attribute__((export_name("grpo:plugin/scoring@0.1.0#configure")))
grpo_result *grpo_configure(char *ptr, size_t len) {
    grpo_returned.is_error = !configure((grpo_string){ ptr, len }, &grpo_returned.error);
    return &grpo_returned;
}

__attribute__((export_name("cabi_post_grpo:plugin/scoring@0.1.0#configure")))
void grpo_post_configure(grpo_result *result) { (void)result; grpo_free_all(); }

__attribute__((export_name("grpo:plugin/scoring@0.1.0#score")))
grpo_result *grpo_score(grpo_question *questions, size_t questions_len, grpo_sample *samples, size_t samples_len) {
    grpo_verdict *verdicts = grpo_alloc(samples_len * sizeof *verdicts);
    grpo_error error;
    grpo_returned.is_error = !score(questions, questions_len, samples, samples_len, verdicts, &error);
    if (grpo_returned.is_error) {
        grpo_returned.error = error;
    } else {
        grpo_returned.ok.ptr = verdicts;
        grpo_returned.ok.len = samples_len;
    }
    return &grpo_returned;
}

__attribute__((export_name("cabi_post_grpo:plugin/scoring@0.1.0#score")))
void grpo_post_score(grpo_result *result) { (void)result; grpo_free_all(); }

#endif
