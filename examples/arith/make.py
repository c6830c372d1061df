#!/usr/bin/env python3
"""Makes the arithmetic task: `train.jsonl`, `heldout.jsonl`, `sft.jsonl` and the tiny tokenizer.

No argument, no dependency, the same bytes on every machine. `README.md` says what is done with them.
"""
import json
import pathlib
import random

HERE = pathlib.Path(__file__).parent


def problem(rng):
    """Two numbers of two digits, and their sum column by column as it is taught in school."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    steps = f"{a % 10}+{b % 10}={ones};{a // 10}+{b // 10}{carry}={tens}"
    return f"{a}+{b}", steps, str(a + b)


def rows(rng, count, seen):
    """`count` problems that are not in `seen`, which grows by them."""
    while count:
        question, steps, answer = problem(rng)
        if question not in seen:
            seen.add(question)
            count -= 1
            yield question, steps, answer


def write(name, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (HERE / name).write_text(text)


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(extra)) for b in range(256)]


def tokenizer():
    """One token per byte, the chat markers, and three texts the task repeats."""
    added = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<think>", "</think>", "####"]
    alphabet = byte_alphabet()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokens = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": text.startswith("<|")}
        for i, text in enumerate(added)
    ]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "vocab": {text: i for i, text in enumerate(alphabet)}, "merges": []}
    full = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}
    template = (
        "{%- for message in messages -%}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
    )
    config = {"eos_token": "<|end|>", "chat_template": template, "model_max_length": 128}
    for folder in ["model", "draft"]:
        (HERE / folder / "tokenizer.json").write_text(json.dumps(full, ensure_ascii=False))
        (HERE / folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main():
    rng, seen = random.Random(20260101), set()
    heldout = [{"question": q, "answer": a} for q, _, a in rows(rng, 400, seen)]
    train = [{"question": q, "answer": a} for q, _, a in rows(rng, 3000, seen)]
    # A third of them: 100 steps pass over these four times, so that the curriculum has epochs to compare. The
    # others are drawn all the same, because the model was made with the sft rows that come after them.
    del train[1000:]
    sft = [{"question": q, "completion": f"<think>{s}</think>#### {a}"} for q, s, a in rows(rng, 3000, seen)]
    write("heldout.jsonl", heldout)
    write("train.jsonl", train)
    write("sft.jsonl", sft)
    tokenizer()


if __name__ == "__main__":
    main()
