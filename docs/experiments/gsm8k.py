#!/usr/bin/env python3
"""SFT, then GRPO on GSM8K with the configs of examples/gsm8k, three seeds; see gsm8k.md.

    python3 docs/experiments/gsm8k.py run --model MODEL --train train.jsonl --test test.jsonl --device cuda:0 --out experiments
    python3 docs/experiments/gsm8k.py plot --out experiments          # needs matplotlib
"""
import argparse
import pathlib
import subprocess
import time

import experiments

CONFIGS = experiments.HERE.parent.parent / "examples/gsm8k"
SFT = "--steps 350 --batch 64 --learning-rate 5e-5 --warmup-steps 10".split()
ARM = "GRPO"
experiments.EXPERIMENTS["gsm8k"] = {ARM: None}
experiments.PLOTS["gsm8k"] = {
    "test split, strict, greedy": "eval_accuracy_strict",
    "reward at temperature 1": "rewards/reward-math/mean",
}


def run(arguments):
    place = ["--device", arguments.device]
    binary = arguments.binary
    for seed in experiments.SEEDS:
        target = experiments.folder(arguments.out, "gsm8k", ARM, seed)
        if (target / "report.html").exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        tuned = target.with_name(f"sft-seed{seed}")
        start = time.monotonic()
        sft = [binary, "sft", "--config", CONFIGS / "sft.yaml", "--model", arguments.model, "--data", arguments.train]
        subprocess.run([*sft, *SFT, "--seed", str(seed), "--out", tuned, "--json", *place], check=True)
        middle = time.monotonic()
        grpo = [binary, "--config", CONFIGS / "grpo.yaml", "--model", tuned / "model", "--data", arguments.train]
        grpo += ["--set", f"eval_data={arguments.test}", "--seed", str(seed), "--out", target, *place]
        subprocess.run(grpo, check=True)
        print(f"seed {seed}: SFT {middle - start:.0f} s, GRPO {time.monotonic() - middle:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "plot"])
    parser.add_argument("--binary", default="target/release/grpo-host")
    parser.add_argument("--model", help="folder, GGUF file or hub id")
    parser.add_argument("--train", default="openai/gsm8k")
    parser.add_argument("--test", default="openai/gsm8k")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=pathlib.Path, default="experiments")
    arguments = parser.parse_args()
    if arguments.what == "run":
        if not arguments.model:
            parser.error("run needs --model")
        run(arguments)
    else:
        experiments.plot("gsm8k", arguments.out)
        experiments.table("gsm8k", arguments.out)


if __name__ == "__main__":
    main()
