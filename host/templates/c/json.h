/* The little of JSON that a reward needs: members of an object, numbers and strings. The host hands over
 * valid JSON only, so nothing here checks it. */
#ifndef GRPO_JSON_H
#define GRPO_JSON_H

#include "plugin.h"

/* A place in a text. */
typedef struct { const char *at, *end; } json;

static void json_space(json *text) {
    while (text->at < text->end && strchr(" \t\r\n:,", *text->at)) text->at++;
}

/* Behind a string whose opening quote is at `text->at`. */
static void json_skip_string(json *text) {
    for (text->at++; text->at < text->end && *text->at != '"'; text->at++)
        if (*text->at == '\\') text->at++;
    text->at++;
}

/* Behind a value of any type. */
static void json_skip(json *text) {
    int depth = 0;
    do {
        json_space(text);
        char c = *text->at;
        if (c == '"') {
            json_skip_string(text);
        } else if (c == '{' || c == '[') {
            depth++;
            text->at++;
        } else if (c == '}' || c == ']') {
            depth--;
            text->at++;
        } else {
            while (text->at < text->end && !strchr(" \t\r\n:,]}", *text->at)) text->at++;
        }
    } while (depth > 0 && text->at < text->end);
}

static unsigned json_hex(const char *at) {
    unsigned value = 0;
    for (int i = 0; i < 4; i++) {
        char c = at[i];
        value = value * 16 + (unsigned)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return value;
}

static char *json_utf8(char *to, unsigned code) {
    if (code < 0x80) {
        *to++ = (char)code;
        return to;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (char)((more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0) | (code >> (6 * more)));
    while (more-- > 0) *to++ = (char)(0x80 | ((code >> (6 * more)) & 0x3F));
    return to;
}

/* The text of the string at `text->at`, escapes resolved. */
static grpo_string json_string(json text) {
    json end = text;
    json_skip_string(&end);
    const char *at = text.at + 1, *stop = end.at - 1;
    grpo_string out = { grpo_alloc((size_t)(stop - at)), 0 };
    char *to = out.ptr;
    while (at < stop) {
        if (*at != '\\') {
            *to++ = *at++;
            continue;
        }
        const char *from = "bfnrt", *into = "\b\f\n\r\t", *found = strchr(from, at[1]);
        if (at[1] == 'u') {
            unsigned code = json_hex(at + 2);
            at += 6;
            if (code >= 0xD800 && code < 0xDC00) {
                code = 0x10000 + ((code - 0xD800) << 10) + (json_hex(at + 2) - 0xDC00);
                at += 6;
            }
            to = json_utf8(to, code);
        } else {
            *to++ = found ? into[found - from] : at[1];
            at += 2;
        }
    }
    out.len = (size_t)(to - out.ptr);
    return out;
}

/* The next member of the object that `text` is in: its key and, in `value`, where its value begins. Begin
 * with `text` at the opening brace. Returns 0 behind the last. */
static int json_member(json *text, grpo_string *key, json *value) {
    json_space(text);
    if (text->at < text->end && *text->at == '{') text->at++;
    json_space(text);
    if (text->at >= text->end || *text->at == '}') return 0;
    *key = json_string(*text);
    json_skip_string(text);
    json_space(text);
    *value = *text;
    json_skip(text);
    return 1;
}

/* Whether a number begins here, and which. */
static int json_number(json text, double *number) {
    if (*text.at != '-' && (*text.at < '0' || *text.at > '9')) return 0;
    json end = text;
    json_skip(&end);
    /* What stands behind it in memory may be a digit. */
    grpo_string digits = { (char *)text.at, (size_t)(end.at - text.at) };
    *number = strtod(grpo_join("", digits, " ").ptr, NULL);
    return 1;
}

#endif
