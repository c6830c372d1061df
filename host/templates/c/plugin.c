/* The reward: how near the last number of an answer is to the number in the row's column `answer`. */
#include "plugin.h"

#include "json.h"

#include <math.h>

typedef struct {
    double tolerance; /* Relative error that still earns 1. */
    double partial;   /* What a number just outside of the tolerance would earn at an error of 0. */
} settings_t;

static const settings_t DEFAULT = { 1e-6, 0.1 };
static settings_t settings = { 1e-6, 0.1 };

/* What is known of a row: 1 with its number, or 0 if it holds none. */
typedef struct { int found; double number; } gold_t;

static int is(grpo_string text, const char *word) {
    return text.len == strlen(word) && memcmp(text.ptr, word, text.len) == 0;
}

static int is_digit(char c) { return c >= '0' && c <= '9'; }

/* The last decimal number of a text. Commas between its digits are ignored. */
static int last_number(grpo_string text, double *number) {
    size_t end = text.len;
    while (end > 0 && !is_digit(text.ptr[end - 1])) end--;
    size_t start = end;
    while (start > 0 && (is_digit(text.ptr[start - 1]) || strchr(".,", text.ptr[start - 1]))) start--;
    if (start == end) return 0;
    char *run = grpo_alloc(end - start + 1), *to = run, *point = NULL, *first = run;
    for (size_t at = start; at < end; at++) {
        if (text.ptr[at] == ',') continue;
        if (text.ptr[at] == '.') {
            /* Of `1.2.3` the last two pieces are a number. */
            if (point) first = point + 1;
            point = to;
        }
        *to++ = text.ptr[at];
    }
    *to = 0;
    *number = strtod(first, NULL);
    if (start > 0 && text.ptr[start - 1] == '-') *number = -*number;
    return isfinite(*number);
}

static int configure(grpo_string config, grpo_error *error) {
    json text = { config.ptr, config.ptr + config.len }, value;
    grpo_string key;
    settings = DEFAULT;
    while (json_member(&text, &key, &value)) {
        double *setting = is(key, "tolerance") ? &settings.tolerance : is(key, "partial") ? &settings.partial : NULL;
        if (!setting) return grpo_fail(error, GRPO_CONFIG, grpo_join("unknown setting `", key, "`"));
        if (!json_number(value, setting) || *setting < 0)
            return grpo_fail(error, GRPO_CONFIG, grpo_join("`", key, "` must be a number of at least 0"));
    }
    return 1;
}

static int gold_of(grpo_string row, gold_t *gold, grpo_error *error) {
    json text = { row.ptr, row.ptr + row.len }, value;
    grpo_string key;
    int there = 0;
    while (json_member(&text, &key, &value)) {
        if (!is(key, "answer")) continue;
        there = 1;
        gold->found = *value.at == '"' ? last_number(json_string(value), &gold->number)
                                       : json_number(value, &gold->number);
    }
    return there || grpo_fail(error, GRPO_INPUT, grpo_text("row has no column `answer`"));
}

static grpo_verdict judge(grpo_string answer, double gold) {
    double number;
    if (!last_number(answer, &number)) return (grpo_verdict){ GRPO_VALUE, .value = { 0, NULL, 0 } };
    double error = fabs(number - gold) / fmax(fabs(gold), 1);
    double total = error <= settings.tolerance ? 1 : settings.partial / (1 + error);
    grpo_part *part = grpo_alloc(sizeof *part);
    *part = (grpo_part){ grpo_text("error"), fmin(error, 1e9) };
    return (grpo_verdict){ GRPO_VALUE, .value = { total, part, 1 } };
}

static int score(const grpo_question *questions, size_t questions_len, const grpo_sample *samples,
                 size_t samples_len, grpo_verdict *verdicts, grpo_error *error) {
    gold_t *golds = grpo_alloc(questions_len * sizeof *golds);
    for (size_t i = 0; i < questions_len; i++)
        if (!gold_of(questions[i].row, &golds[i], error)) return 0;
    for (size_t i = 0; i < samples_len; i++) {
        const grpo_sample *sample = &samples[i];
        const gold_t *gold = &golds[sample->question];
        grpo_string skip = grpo_text("column `answer` holds no number");
        grpo_string answer = sample->answer.is_some ? sample->answer.value : sample->completion;
        verdicts[i] = gold->found ? judge(answer, gold->number) : (grpo_verdict){ GRPO_SKIP, .skip = skip };
    }
    return 1;
}
