"""The paper's claim: two stages copy less than the large network and keep the shape better than the small.

    python -m experiments.claim             drawn pills, about an hour of one core
    python -m experiments.claim --quick     two runs of a few steps; their numbers mean nothing

Trains every run of RUNS that is not finished, draws its pairs with every switch and from every kept
checkpoint, measures them, and writes the numbers to OUT/claim.json and plots beside. What is finished is not
done again.
"""
import argparse
import statistics
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import evaluate
import sample
import train
from data.drawn import DRAWN, draw
from datasets import PALETTE, fingerprint, run_main, write_classes, write_image, write_json, write_pair
from defect_gen import SWITCH_T, DefectGen, checkpoints
from evaluate import compare, print_table, spread, variants
from inspect_rules import read_json

STEPS = 1500
# name: (split, whose large network is taken instead of one of its own, flags of the small network)
RUNS = {"pill25": ("train25", None, []), "pill5": ("train5", None, []), "pill100": ("train100", None, []),
        "pill25-d0": ("train25", "pill25", ["--depth", "0"])}
SWITCHES = 0, 100, 200, 400, 600, 800, 1000     # 0: the large network alone, 1000: the small one alone


# --- one run ---

def write_pills(folder, count=300, side=32, drawn_at=44):
    """Drawn pills cut out so that defects are large; splits of 5, 25 and 100, the others to score on.

    Each has a defect inside the cut, for only such images train: 25 are 25.
    """
    names, index, edge = [], 0, (drawn_at - side) // 2
    cut = slice(edge, edge + side), slice(edge, edge + side)
    while len(names) < count:
        image, mask, _, kind, _ = draw("pill", 1, index, (drawn_at, drawn_at))
        if mask[cut].any():
            name = f"{len(names):03d}"
            write_pair(folder, name, torch.from_numpy(image[cut]).permute(2, 0, 1), mask[cut], kind)
            names.append(f"{kind}/{name}")
        index += 1
    write_classes(folder, DRAWN["pill"].classes)
    splits = {f"train{n}": names[:n] for n in (5, 25, 100)}
    write_json(folder / "split.json", {**splits, "test": names[100:]})


def train_run(name, out, data, quick):
    """Train whatever is missing of one run, and draw its pairs."""
    split, borrowed, flags = RUNS[name]
    steps, run = 4 if quick else STEPS, out / name
    for stage in ("large", "small"):
        if stage == "large" and borrowed:
            (run / "large").mkdir(parents=True, exist_ok=True)
            file = f"step_{steps:06d}.pt"
            if not (run / "large" / file).exists():
                (run / "large" / file).symlink_to((out / borrowed / "large" / file).resolve())
        elif steps not in checkpoints(run / stage):
            words = ["--stage", stage, "--data", data, "--split", split, "--out", run, "--t-range", "full",
                     "--keep", 99, "--steps", steps, "--save-every", 2 if quick else 500,
                     "--size", 32, 32, "--batch-size", 16, "--no-soft-masks",
                     *(flags if stage == "small" else []),
                     *(["--resume"] if checkpoints(run / stage) else [])]
            if status := train.train(train.parse_args(list(map(str, words)))):      # a signal ended it
                raise SystemExit(status)
    few = ["--count", "8", "--num-steps", "2"] if quick else []
    sample.draw_pairs(sample.parse_args(["--run", str(run), *few]))
    return run


def name_of(switch_t):
    return {0: "large only", 1000: "small only"}.get(switch_t, f"switch_t {switch_t}")


def draw_sets(run, how, seeds):
    """{(step, set name): pairs} from the same seeds: every switch of the newest checkpoint, and from each
    older one that both stages have the two extremes and SWITCH_T. how: the config.json of RUN/samples.
    """
    steps = sorted(checkpoints(run.folder / "large").keys() & checkpoints(run.folder / "small").keys())
    sets = {}
    for step in steps:
        generator = DefectGen.load(run.folder, run.device, step)
        for switch_t in SWITCHES if step == steps[-1] else (0, SWITCH_T, 1000):
            least, most = generator.t_ranges["large"][0], generator.t_ranges["small"][1]
            if least <= switch_t <= most:  # a stage may know its own side only
                settings = how["num_steps"], how["sampler"], how["spacing"], switch_t
                sets[step, name_of(switch_t)] = generator.sample(seeds, *settings)
        print(f"{run.folder}: drawn from the checkpoint at step {step}", flush=True)
    return sets


def score_run(folder, quick):
    """{step: {set name: {measure: values of the parts}}} of a run; kept in its claim.json, by its weights."""
    path, how = folder / ("quick_claim.json" if quick else "claim.json"), folder / "samples" / "config.json"
    flags = ["--seeds", "3", "--steps", "150", *(["--quick"] if quick else [])]
    of = fingerprint(flags, how, *sorted(folder.glob("*/step_*.pt")))
    if path.exists() and (kept := read_json(path)).get("of") == of:
        return kept["results"]
    run, how = evaluate.Run(evaluate.parse_args(["--run", str(folder), *flags])), read_json(how)
    train_pairs = tuple(part[run.train.defective()] for part in run.real)
    sets = draw_sets(run, how, range(min(64, len(run.generated[0]))))
    numbers = compare(run, variants(*train_pairs, run.config["augment"]), sets, print)
    newest, results = max(step for step, _ in sets), {}
    for key, parts in numbers.items():
        step, name = key if key in sets else (newest, key)              # other real images are of no step
        values = {column: [part[column] for part in parts] for column in parts[0]}
        results.setdefault(str(step), {})[name] = values
    write_json(path, {"of": of, "results": results})
    return read_json(path)["results"]


# --- tables and a plot ---

def show(results):
    """The published tables: of each run by switch, and of 25 pills by training steps."""
    columns = ["copies %", "novelty", "defect novelty", "shape", "patch distance", "mask fit %"]
    ends = "large only", name_of(SWITCH_T), "small only"

    def table(caption, rows):
        """rows: (label, run, step, set)"""
        rows = [[label, *(cell(results[run][step][name][column]) for column in columns)]
                for label, run, step, name in rows if name in results.get(run, {}).get(step, {})]
        print_table({"caption": caption, "head": ["", *columns], "rows": rows})

    def cell(values):
        return "–" if None in values else spread(values, 2)         # None: not a number

    for run, steps in results.items():
        last = max(steps, key=int)
        table(f"{run}: against switch_t, {last} steps", [(name, run, last, name) for name in steps[last]])
    table("25 pills: against training steps",
          [(f"{step}, {name}", "pill25", step, name) for step in results["pill25"] for name in ends])


def plot(x, lines, size=(640, 360)):
    """Lines {name: values at x} as a PIL picture, axes from the least to the most value, names below."""
    font = ImageFont.load_default(16)
    picture = Image.new("RGB", (size[0], size[1] + 22 * len(lines)), "white")
    pen, (left, top, right, bottom) = ImageDraw.Draw(picture), (70, 20, size[0] - 30, size[1] - 40)
    low, high = (f(value for values in lines.values() for value in values) for f in (min, max))

    def place(a, value):
        return (left + (right - left) * (a - x[0]) / (x[-1] - x[0]),
                bottom - (bottom - top) * (value - low) / (high - low))

    pen.rectangle((left, top, right, bottom), outline="gray")
    for value in (low, (low + high) / 2, high):
        pen.text((left - 8, place(x[0], value)[1]), f"{value:.1f}", "dimgray", font, anchor="rm")
    for a in x:
        pen.text((place(a, low)[0], bottom + 8), f"{a:g}", "dimgray", font, anchor="ma")
    for i, (name, values) in enumerate(lines.items()):
        colour, y = tuple(PALETTE[i + 1].tolist()), size[1] + 22 * i
        pen.line([place(*point) for point in zip(x, values)], colour, 3)
        pen.line((left, y, left + 24, y), colour, 4)
        pen.text((left + 32, y), name, "black", font, anchor="lm")
    return picture


def main():
    parser = argparse.ArgumentParser(description="Measure the paper's claim.")
    parser.add_argument("--out", default="runs/claim", type=Path, help="for the runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two runs of a few steps")
    args = parser.parse_args()
    out = args.out / "quick" if args.quick else args.out
    if not (out / "pills" / "split.json").exists():
        write_pills(out / "pills")
    results = {}
    for name in ["pill25", "pill25-d0"] if args.quick else RUNS:
        results[name] = score_run(train_run(name, out, out / "pills", args.quick), args.quick)
        write_json(out / "claim.json", results)
    show(results)
    if not args.quick:
        runs = {f"{n} images": results[f"pill{n}"] for n in (5, 25, 100)}
        lines = {label: [statistics.mean(steps[max(steps, key=int)][name_of(s)]["novelty"]) for s in SWITCHES]
                 for label, steps in runs.items()}
        write_image(out / "claim.png", plot(SWITCHES, lines))
    print(f"numbers: {out / 'claim.json'}")


if __name__ == "__main__":
    run_main(main)
