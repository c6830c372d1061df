#!/usr/bin/env python3
"""Draws tokens per second over the batch from the JSON lines of `bench rollout` (docs/performance/rollouts.sh).

    python3 docs/performance/plots.py rollouts.jsonl        # needs matplotlib; writes rollouts.svg beside itself

Lines of other prompts than PROMPT_TOKENS are left out; of several lines of one model and batch the fastest counts.
"""
import argparse
import json
import pathlib

HERE = pathlib.Path(__file__).parent
PROMPT_TOKENS = 128
# vLLM 0.20 on the same kind of GPU with the same work: batch → tokens/s (docs/performance/rollouts.md).
VLLM = {
    "qwen2.5-0.5b": {1: 608, 64: 21_300, 256: 43_200, 512: 50_600},
    "qwen2.5-1.5b": {1: 419, 64: 18_300, 256: 32_200, 512: 34_600},
}


def read(path):
    """Shape → batch → the fastest line."""
    best = {}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        if run["name"] != "rollout" or run["prompt_tokens"] != PROMPT_TOKENS:
            continue
        of_shape = best.setdefault(run["model"].removeprefix("random weights, "), {})
        if run["value"] > of_shape.get(run["batch"], {"value": 0})["value"]:
            of_shape[run["batch"]] = run
    return best


def limit(run):
    """Tokens per second if a step only read what it must, at the bandwidth measured in the same run; None on a CPU."""
    if run.get("memory_bandwidth") is None:
        return None
    return run["batch"] * run["memory_bandwidth"] / run["step_bytes"]


def plot(best, to):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rollouts"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(best), figsize=(4.5 * len(best), 3.6), squeeze=False, sharey=True)
    for axis, (shape, runs) in zip(axes[0], best.items()):
        batches = sorted(runs)
        limits = [(batch, limit(runs[batch])) for batch in batches if limit(runs[batch])]
        if limits:
            axis.plot(*zip(*limits), color="grey", linestyle="--", label="memory bandwidth")
        axis.plot(batches, [runs[batch]["value"] for batch in batches], color="C0", marker="o", label="grpo-host")
        if shape in VLLM:
            axis.plot(*zip(*VLLM[shape].items()), color="C1", marker="s", label="vLLM 0.20")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(shape, fontsize=10)
        axis.set_xlabel("sequences")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("new tokens a second")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=pathlib.Path, help="JSON lines of bench rollout")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "rollouts.svg")
    arguments = parser.parse_args()
    best = read(arguments.lines)
    if not best:
        parser.error(f"{arguments.lines} has no line of bench rollout with {PROMPT_TOKENS} prompt tokens")
    plot(best, arguments.out)


if __name__ == "__main__":
    main()
