"""The paper's claim, measured: does the hand-over copy less than the large network alone, and keep the shape better than the small one alone?

    python docs/claim.py                            drawn pills; about three hours on one core
    python docs/claim.py --tile magnetic_tile       and 25 photos of magnetic tiles, an hour more
    python docs/claim.py --quick                    two runs of a few steps; their numbers mean nothing

Trains every run of RUNS that is not finished, draws pairs, runs `evaluate.py generation` on each, and writes the numbers to docs/claim.json
and plots beside. What is finished is not done again.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate                                                                                               # noqa: E402
import sample                                                                                                 # noqa: E402
import train                                                                                                  # noqa: E402
from datasets import print_table, read_json, run_main, write_classes, write_image, write_json, write_pair     # noqa: E402
from defect_gen import SWITCH_T, steps_of                                                                     # noqa: E402
from data.drawn import DRAWN, draw, drawn_kind                                                                     # noqa: E402
from evaluate import name_of, plot, spread                                                                    # noqa: E402

PILL = ["--size", "32", "32", "--batch-size", "16"]
TILE = ["--size", "48", "48", "--batch-size", "8"]
# name: (split, steps, whose large network is taken instead of one of its own, flags of the small network)
RUNS = {"pill25": ("train25", 4000, None, []), "pill5": ("train5", 1500, None, []), "pill100": ("train100", 1500, None, []),
        **{f"pill25-d{depth}": ("train25", 1500, "pill25", ["--depth", str(depth)]) for depth in (0, 3)},
        "trial-local": ("train25", 1500, "pill25", ["--norm", "local"]),
        "trial-own": ("train25", 1500, "pill25", ["--t-range", "own"]), "tile": ("few_shot", 4000, None, [])}


def write_pills(folder, count=300, side=32, drawn=44):
    """Drawn pills with defects, their background cut off so that defects are large; splits of 5, 25 and 100, and the others to score on."""
    names, index, edge = [], 0, (drawn - side) // 2
    while len(names) < count:
        kind = drawn_kind("pill", index)
        if kind != "good":
            image, mask, *_ = draw("pill", 1, index, (drawn, drawn))
            cut = slice(edge, edge + side), slice(edge, edge + side)
            name = f"{len(names):03d}"
            write_pair(folder, name, torch.from_numpy(image[cut]).permute(2, 0, 1), mask[cut], kind)
            names.append(f"{kind}/{name}")
        index += 1
    write_classes(folder, DRAWN["pill"].classes)
    write_json(folder / "split.json", {**{f"train{n}": names[:n] for n in (5, 25, 100)}, "test": names[100:]})


def train_and_score(name, out, data, quick):
    """Whatever is missing of one run: large, small, pairs and report."""
    split, steps, borrowed, flags = RUNS[name]
    steps, run = 4 if quick else steps, out / name
    for stage in ("large", "small"):
        if stage == "large" and borrowed:
            (run / "large").mkdir(parents=True, exist_ok=True)
            for file in ("config.json", f"step_{steps:06d}.pt"):
                if not (run / "large" / file).exists():
                    (run / "large" / file).symlink_to((out / borrowed / "large" / file).resolve())
        elif steps not in steps_of(run / stage):
            resume = ["--resume"] if steps_of(run / stage) else []
            status = train.train(train.parse_args(list(map(str, ["--stage", stage, "--data", data, "--split", split, "--out", run, "--t-range", "full", "--keep", 99,
                        *(TILE if name == "tile" else PILL), "--steps", steps, "--save-every", 2 if quick else 500, *(flags if stage == "small" else []), *resume]))))
            if status:                                              # a signal ended it: the same command goes on
                raise SystemExit(status)
    if status := sample.draw_pairs(sample.parse_args(["--run", str(run), "--count", "8" if quick else "64", "--num-steps", "2" if quick else "20"])):
        raise SystemExit(status)
    report = run / ("quick/metrics.json" if quick else "metrics.json")
    if not (report.exists() and "generation" in read_json(report)):
        evaluate.evaluate(evaluate.parse_args(["generation", "--run", str(run), "--seeds", "3", "--steps", "150"] + ["--quick"] * quick))
    return read_json(report)["generation"]["numbers"]["measures"]


def show(results):
    """The tables of the README: against switch, training steps, number of images, depth and ways of training the small network."""
    columns = ["copies %", "novelty", "shape", "patch distance", "coverage %", "mask fit %"]
    ends, both = ("large only", name_of(SWITCH_T), "small only"), (name_of(SWITCH_T), "small only")
    equal = max(set.intersection(*(set(steps) for run, steps in results.items() if run != "tile")), key=int)       # steps that all pills have

    def cell(values):
        return "–" if None in values else spread(values, 2)         # None: not a number

    def table(caption, rows):
        """rows: (label, run, step, set)"""
        print_table({"caption": caption, "head": ["", *columns], "rows": [[label, *(cell(results[run][step][kind][c]) for c in columns)]
                                                                          for label, run, step, kind in rows if kind in results.get(run, {}).get(step, {})]})

    for run, steps in results.items():
        last = max(steps, key=int)
        table(f"{run}: against switch_t, {last} steps", [(kind, run, last, kind) for kind in steps[last]])
    table("25 pills: against training steps", [(f"{step}, {kind}", "pill25", step, kind) for step in results["pill25"] for kind in ends])
    table(f"against the number of images, {equal} steps", [(f"{n}, {kind}", f"pill{n}", equal, kind) for n in (5, 25, 100) for kind in ends])
    table(f"25 pills: against the depth of the small network, {equal} steps",
          [(f"{depth}, {kind}", run, equal, kind) for depth, run in ((0, "pill25-d0"), (1, "pill25"), (3, "pill25-d3")) for kind in both])
    table(f"25 pills: ways of training the small network, {equal} steps",
          [(f"{run}, {kind}", run, equal, kind) for run in ("pill25", "trial-own", "trial-local") for kind in both])


def plots(results):
    """Novelty against switch_t for each number of images."""
    switches, runs = (0, 100, 200, 400, 600, 800, 1000), {f"{n} images": results[f"pill{n}"] for n in (5, 25, 100)}
    lines = {label: [statistics.mean(steps[max(steps, key=int)][name_of(s)]["novelty"]) for s in switches] for label, steps in runs.items()}
    write_image(ROOT / "docs" / "claim.png", plot(switches, lines))


def main():
    parser = argparse.ArgumentParser(description="Measure the paper's claim.")
    parser.add_argument("--out", default="runs/claim", type=Path, help="where the runs go (default: %(default)s)")
    parser.add_argument("--tile", metavar="FOLDER", help="magnetic tile photos with a split few_shot, to measure them as well")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; writes no docs/claim.json")
    args = parser.parse_args()
    args.out = args.out / "quick" if args.quick else args.out
    if not (args.out / "pills" / "split.json").exists():
        write_pills(args.out / "pills")
    names = ["pill25", "pill25-d0"] if args.quick else [name for name in RUNS if name != "tile" or args.tile]
    results = {name: train_and_score(name, args.out, args.tile if name == "tile" else args.out / "pills", args.quick) for name in names}
    show(results)
    if not args.quick:
        path = ROOT / "docs" / "claim.json"
        write_json(path, {**(read_json(path) if path.exists() else {}), **results})         # without --tile its numbers stay
        plots(results)


if __name__ == "__main__":
    run_main(main)
