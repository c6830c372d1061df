#!/usr/bin/env python3
"""Runs the experiments of this folder on the arithmetic task and draws them.

    python3 docs/experiments/experiments.py run NAME --binary target/release/grpo-host --out DIR
    python3 docs/experiments/experiments.py plot NAME --out DIR          # needs matplotlib

NAME is `acceptance`, `acceptance-fixed` (the draft does not learn), `distillation` or `curriculum`. A run that is already in DIR is not done again.
"""
import argparse
import json
import pathlib
import statistics
import subprocess

HERE = pathlib.Path(__file__).parent
BASE = HERE.parent.parent / "examples/arith/run.yaml"
SEEDS = (1, 2, 3)

# Arm → texts to replace in the base config, and steps.
ACCEPT = "accept_weight: 0.1"
FIXED = ("draft_learning_rate: 1.0e-3", "draft_learning_rate: 0")
EXPERIMENTS = {
    "acceptance": {f"weight {weight}": ([(ACCEPT, f"accept_weight: {weight}")], 100) for weight in ("0", "1.0", "5.0")},
    "acceptance-fixed": {
        f"weight {weight}": ([(ACCEPT, f"accept_weight: {weight}"), FIXED], 100) for weight in ("0", "1.0", "5.0")
    },
    "distillation": {"distilled": ([], 200), "fixed": ([FIXED], 200)},
    "curriculum": {
        "curriculum-kde": ([("eval_steps: 50", "eval_steps: 10")], 100),
        "curriculum-uniform": (
            [("eval_steps: 50", "eval_steps: 10"), ("source: curriculum-kde", "source: curriculum-uniform")],
            100,
        ),
    },
}
# What is drawn: title → metric.
PLOTS = {
    "acceptance": {"acceptance rate": "spec_decode/acceptance_rate", "task reward": "rewards/reward-math/mean"},
    "acceptance-fixed": {
        "acceptance rate": "spec_decode/acceptance_rate",
        "task reward": "rewards/reward-math/mean",
    },
    "distillation": {"acceptance rate": "spec_decode/acceptance_rate", "draft loss (nats)": "draft/loss"},
    "curriculum": {"held-out accuracy": "eval_accuracy_strict", "task reward": "rewards/reward-math/mean"},
}
# Steps that a curve is averaged over.
SMOOTH = 5


def folder(out, name, arm, seed):
    return out / name / f"{arm.replace(' ', '-')}-seed{seed}"


def run(name, binary, out):
    for arm, (changes, steps) in EXPERIMENTS[name].items():
        text = BASE.read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} is not once in {BASE}"
            text = text.replace(old, new)
        for seed in SEEDS:
            target = folder(out, name, arm, seed)
            if (target / "report.html").exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            config = target.with_name(target.name + ".yaml")
            config.write_text(text)
            command = [binary, "--config", config, "--steps", str(steps), "--seed", str(seed), "--out", target]
            subprocess.run([*command, "--quiet"], check=True)


def read(out, name, arm, seed):
    lines = (folder(out, name, arm, seed) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(lines, metric):
    points = [(line["step"], line[metric]) for line in lines if metric in line]
    if not metric.startswith("eval"):
        width = range(len(points) // SMOOTH)
        points = [
            (points[i * SMOOTH][0], statistics.fmean(y for _, y in points[i * SMOOTH : (i + 1) * SMOOTH]))
            for i in width
        ]
    return points


def plot(name, out):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name
    from matplotlib import pyplot

    titles = PLOTS[name]
    figure, axes = pyplot.subplots(1, len(titles), figsize=(9, 3.2))
    for axis, (title, metric) in zip(axes, titles.items()):
        for number, arm in enumerate(EXPERIMENTS[name]):
            curves = [curve(read(out, name, arm, seed), metric) for seed in SEEDS]
            for points in filter(None, curves):
                axis.plot(*zip(*points), color=f"C{number}", alpha=0.25, linewidth=1)
            if not all(curves):
                continue
            mean = [statistics.fmean(y for _, y in at) for at in zip(*curves)]
            axis.plot([x for x, _ in curves[0]], mean, color=f"C{number}", label=arm)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


def table(name, out):
    """First and last tenth of each metric, and the evaluations, per seed."""
    for arm in EXPERIMENTS[name]:
        for seed in SEEDS:
            lines = read(out, name, arm, seed)
            cells = []
            for title, metric in PLOTS[name].items():
                values = [line[metric] for line in lines if metric in line]
                edge = -(-len(values) // 10)
                if values:
                    first, last = statistics.fmean(values[:edge]), statistics.fmean(values[-edge:])
                    cells.append(f"{title} {first:.3f} → {last:.3f}, mean {statistics.fmean(values):.3f}")
            held = [line["eval_accuracy_strict"] for line in lines if "eval_accuracy_strict" in line]
            drawn = sum(line.get("curriculum/completions", 0) for line in lines)
            length = [line["completions/mean_length"] for line in lines if "completions/mean_length" in line]
            print(f"{arm} seed {seed}: {'; '.join(cells)}; held-out {held[0]:.3f} → {held[-1]:.3f};"
                  f" length {statistics.fmean(length[-10:]):.1f}; planned completions {drawn:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "plot"])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--binary", default="target/release/grpo-host")
    parser.add_argument("--out", type=pathlib.Path, default="experiments")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.name, arguments.binary, arguments.out)
    else:
        table(arguments.name, arguments.out)
        plot(arguments.name, arguments.out)


if __name__ == "__main__":
    main()
