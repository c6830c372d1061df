"""The CPU peer of `grpo-host bench`: transformers decoding and training the same model on the same machine.

    python -m venv .venv
    .venv/bin/pip install torch transformers --extra-index-url https://download.pytorch.org/whl/cpu
    .venv/bin/python xtask/bench/peer_cpu.py MODEL_FOLDER [--threads 2] [--what decode,train,train_micro]

MODEL_FOLDER is a Hugging Face folder; the model runs in f32. Prints one JSON object per measurement:
`name, unit, value` and its parameters. Every measurement is repeated and the best is reported, since
noise on a shared machine only ever slows down; all samples are listed as `samples`.

decode       batch 8, prompt 128, 64 new tokens, KV cache, sampling at temperature 1, end-of-text ignored;
             tokens/s over the whole call, prefill included.
decode_only  the same less the time of a call that makes one token.
train        8 sequences of 256 tokens: forward, loss = -mean log-prob of the targets, backward, AdamW over
             all weights; seconds per step, one batch.
train_micro  the same one sequence at a time with accumulated gradients.
"""

import argparse
import json
import time

import torch
import transformers

BATCH, PROMPT, NEW, TRAIN_LENGTH = 8, 128, 64, 256


def repeated(repeats, run):
    """Seconds of each of `repeats` runs after one that warms up."""
    run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def report(name, unit, value, samples, args, **more):
    line = {
        "name": f"peer_{name}",
        "unit": unit,
        "value": round(value, 4),
        "samples": [round(s, 4) for s in samples],
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **more,
    }
    print(json.dumps(line), flush=True)


def decode(model, args):
    ids = torch.randint(10, model.config.vocab_size, (BATCH, PROMPT))
    mask = torch.ones_like(ids)

    def generate(tokens):
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
            )
        assert out.shape == (BATCH, PROMPT + tokens)

    whole = repeated(args.repeats, lambda: generate(NEW))
    first = repeated(args.repeats, lambda: generate(1))
    shape = dict(batch=BATCH, prompt=PROMPT, new_tokens=NEW)
    report("decode", "tokens/s", BATCH * NEW / min(whole), whole, args, **shape)
    seconds = min(whole) - min(first)
    report("decode_only", "tokens/s", BATCH * (NEW - 1) / seconds, first, args, **shape)


def train(model, args, micro):
    model.train()
    ids = torch.randint(10, model.config.vocab_size, (BATCH, TRAIN_LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    size = 1 if micro else BATCH

    def step():
        for rows in ids.split(size):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            logp = torch.log_softmax(logits, dim=-1).gather(-1, rows[:, 1:, None])
            (-logp.sum() / (BATCH * (TRAIN_LENGTH - 1))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    samples = repeated(args.repeats, step)
    report(
        "train_micro" if micro else "train",
        "s/step",
        min(samples),
        samples,
        args,
        sequences=BATCH,
        tokens=TRAIN_LENGTH,
        micro_batch=size,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--what", default="decode,train,train_micro")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    what = args.what.split(",")
    if unknown := set(what) - {"decode", "train", "train_micro"}:
        parser.error(f"unknown measurement {', '.join(sorted(unknown))}")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if "decode" in what:
        decode(model, args)
    if "train" in what:
        train(model, args, micro=False)
    if "train_micro" in what:
        train(model, args, micro=True)


if __name__ == "__main__":
    main()
