"""What helps a network to draw photos from a few: variants of one training, each alone, at equal time.

    python -m experiments.recipe large --data drawn:pill --minutes 3 --seeds 3
    python -m experiments.recipe small --data FOLDER --split few_shot --size 256 256
    python -m experiments.recipe large --quick                                  a run-through

"large" trains networks that see the whole image and draws 64 pairs with each. "small" trains networks that
see patches and asks them for what the small stage is for: held-out photos with their masks are shrunk by 4,
as if a large stage had planned them, enlarged, noised to SWITCH_T and finished. The time is what the process
computes on one thread, so a busy machine changes nothing. Finished cells are kept in --out.
"""
import argparse
import math
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets import (augment, fingerprint, has_bf16, open_dataset, overlay, run_main, sheet, write_image,
                      write_json)
from defect_gen import SWITCH_T, Joint, enlarge, image_statistics
from diffusion import (noise_for, q_sample, rng, sample, schedule, time_weights, timesteps, to_x_start,
                       training_loss)
from evaluate import (COPY_BELOW, grain, halves, mask_fit, novelty, print_table, sliced_wasserstein, spread,
                      variants)
from inspect_rules import read_json
from segment import build, fit, predict
from train import window
from unet import UNet

LARGE = dict(channels=32, multipliers=(1, 1, 2, 4), num_res_blocks=1, attention_levels=(3,), middle=True,
             norm="group", dropout=0.0, target="v", weighting="uniform", decay=True, lr=1e-3, ema=0.998,
             batch_size=8, amplitude=1.0, flip=False, balanced=False, t_max=1000, crop=0, share=0.0,
             sampler="dpm++", num_steps=20)
SMALL = dict(LARGE, multipliers=(1, 2), attention_levels=(), middle=False, norm="local", batch_size=4,
             t_max=SWITCH_T + 50, crop=96, share=0.7)
SAMPLING = ("sampler", "num_steps")                         # what changes no weights
VARIANTS = {
    "large": {
        "base": {}, "batches of 4": dict(batch_size=4), "48 channels": dict(channels=48),
        "24 channels": dict(channels=24), "batches of 2": dict(batch_size=2),
        "min-SNR, batches of 4, constant rate": dict(weighting="min-snr", batch_size=4, decay=False),
        "x0-prediction, min-SNR weights": dict(target="x0", weighting="min-snr"),
        "x0-prediction": dict(target="x0"), "min-SNR weights": dict(weighting="min-snr"),
        "constant learning rate": dict(decay=False), "EMA 0.99": dict(ema=0.99),
        "learning rate 2e-3": dict(lr=2e-3), "classes drawn alike": dict(balanced=True),
        "two blocks a level": dict(num_res_blocks=2),
        "one level less": dict(multipliers=(1, 2, 4), attention_levels=(2,)),
        "masks of amplitude 0.5": dict(amplitude=0.5), "dropout 0.1": dict(dropout=0.1),
        "flips": dict(flip=True), "ancestral, 100 steps": dict(sampler="ddpm", num_steps=100)},
    "small": {
        "base": {}, "x0-prediction": dict(target="x0"), "depth 2": dict(multipliers=(1, 2, 2)),
        "depth 0": dict(multipliers=(1,)), "two blocks a level": dict(num_res_blocks=2),
        "64 channels": dict(channels=64), "crops of 48, 16 a step": dict(crop=48, batch_size=16),
        "GroupNorm": dict(norm="group"), "min-SNR weights": dict(weighting="min-snr"),
        "40 steps": dict(num_steps=40), "ancestral, 20 steps": dict(sampler="ddpm"),
        "ancestral, 100 steps": dict(sampler="ddpm", num_steps=100)}}
BF16 = has_bf16(torch.device("cpu"))                        # without, each step takes several times as long
MEASURES = ("grain across", "grain along", "patch distance", "empty %", "defects %", "copies %", "mask fit %")


class Photos:
    """Photos with defects that train; held-out ones: half to compare with, half for the judge of masks."""

    def __init__(self, args):
        training, held_out = (open_dataset(args.data, args.size, split) for split in (args.split, "test"))
        training, held_out = (part.subset(part.defective()) for part in (training, held_out))
        self.classes, (self.images, self.masks) = training.classes, training.tensors()
        self.held_out = held_images, held_masks = held_out.tensors()
        of_reference, of_judge = halves(held_out, 0)
        self.reference = held_images[of_reference], held_masks[of_reference]
        self.joint = Joint(image_statistics(training), len(self.classes))
        self.judge = build("deeplabv3+", len(self.classes), 0)
        fit(self.judge, *shrink(held_images[of_judge], held_masks[of_judge]), args.judge_steps, 8)

    def measure(self, images, masks):
        """{measure: number} of pictures; grain and defects as a share of the real ones'."""
        real_images, real_masks = self.reference
        ratios = [a / b for a, b in zip(grain(images), grain(real_images))]
        known = variants(self.images, self.masks, ["flip"])[0]
        small_images, small_masks = shrink(images, masks)
        values = (*ratios, sum(sliced_wasserstein(images, real_images)) / 3,
                  100 * (masks == 0).flatten(1).all(1).double().mean().item(),
                  100 * (masks > 0).double().mean().item(),
                  100 * (novelty(images, known, real_images) < COPY_BELOW).double().mean().item(),
                  100 * mask_fit(predict(self.judge, small_images), small_masks).nanmean().item())
        return dict(zip(MEASURES, values))


def shrink(images, masks):
    """Pairs at 64x64, where the judge of masks works."""
    return (F.interpolate(images.float(), (64, 64), mode="area").round().byte(),
            F.interpolate(masks[:, None], (64, 64), mode="nearest-exact")[:, 0])


def draw_batch(photos, how, random):
    """Images and masks of one step, as `how` says."""
    images, masks = photos.images, photos.masks
    if how["balanced"]:
        present = [(masks == k).flatten(1).any(1) for k in range(1, len(photos.classes))]
        present = torch.stack(present).double()                                 # (K - 1, N)
        classes = torch.randint(len(present), (how["batch_size"],), generator=random)
        index = torch.multinomial(present[classes] + 1e-9, 1, generator=random)[:, 0]
    else:
        index = torch.randint(len(images), (how["batch_size"],), generator=random)
    pairs = []
    for image, mask in zip(images[index], masks[index]):
        if how["flip"]:
            image, mask = augment(image, mask, ["flip"], random)
        if how["crop"]:
            rows, columns = window(mask, how["crop"], how["share"], random)
            image, mask = image[:, rows, columns], mask[rows, columns]
        pairs.append((image, mask))
    return (torch.stack(part) for part in zip(*pairs))


def train(photos, how, minutes, seed):
    """A network's average weights after so many minutes of computing, and its steps."""
    torch.manual_seed(seed)
    names = ("channels", "multipliers", "num_res_blocks", "attention_levels", "middle", "norm", "dropout")
    C, K = photos.images.shape[1], len(photos.classes)
    net = UNet(C + K, **{name: how[name] for name in names})
    ema, table, step = deepcopy(net).requires_grad_(False), schedule(), 0
    optimizer = torch.optim.AdamW(net.parameters(), how["lr"], weight_decay=0.0, fused=True)
    scale = torch.tensor([1.0] * C + [how["amplitude"]] * K).view(1, -1, 1, 1)
    by_time = time_weights(table, how["target"], how["weighting"]).float()
    start = time.process_time()
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        random = rng(seed, 2, step)
        x_start = photos.joint.encode(*draw_batch(photos, how, random)) * scale
        t = torch.randint(how["t_max"], (len(x_start),), generator=random)
        noise = torch.randn(x_start.shape, generator=random)
        with torch.autocast("cpu", torch.bfloat16, BF16):
            losses = training_loss(net, x_start, t, noise, table, how["target"], photos.joint.weights)
        (losses * by_time[t]).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = how["lr"] * min(1, (step + 1) / 50)
            group["lr"] *= 0.5 * (1 + math.cos(math.pi * done)) if how["decay"] else 1
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()),
                                 1 - min(how["ema"], (1 + step) / (10 + step)))
        step += 1
    return ema, step


def draw(net, stage, photos, how, seed, count):
    """Pairs of a large network, or held-out pairs whose detail a small one drew anew."""
    table, K = schedule(), len(photos.classes)
    scale = torch.tensor([1.0] * (net.config["in_channels"] - K) + [how["amplitude"]] * K).view(1, -1, 1, 1)
    limits = [limit * scale for limit in photos.joint.limits]

    def denoise(x_t, t):
        with torch.autocast("cpu", torch.bfloat16, BF16):
            output = net(x_t, t)
        return to_x_start(output.float(), x_t, t, table, how["target"])

    steps, found = timesteps(1000, how["num_steps"]), []
    for first in range(0, count, 4):
        noise = noise_for([1000 * seed + i for i in range(first, first + 4)],
                          (net.config["in_channels"], *photos.images.shape[2:]))
        x = noise()
        if stage == "small":
            images, masks = (part[first:first + 4] for part in photos.reference)
            plan = F.interpolate(photos.joint.encode(images, masks), scale_factor=0.25, mode="area")
            plan = enlarge(plan, images.shape[2:]) * scale
            steps = [t for t in timesteps(1000, how["num_steps"]) if t < SWITCH_T]
            x = q_sample(plan, steps[0], x, table)
        found.append(photos.joint.decode(sample(denoise, x, steps, table, how["sampler"], noise, limits)))
    return tuple(torch.cat(part) for part in zip(*found))


def main():
    parser = argparse.ArgumentParser(description="Variants of one training, each alone, at equal time.")
    parser.add_argument("stage", choices=VARIANTS)
    parser.add_argument("--data", default="drawn:pill", help="default: %(default)s")
    parser.add_argument("--split", default="train", help="images that train (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), help="default: 64 64")
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--minutes", type=float, default=3, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two variants, a second each; no numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.judge_steps, count = 300, 64 if args.stage == "large" else 12
    names = args.variants or list(VARIANTS[args.stage])
    if args.quick:
        args.judge_steps, args.minutes, args.seeds, args.size, count = 2, 1 / 60, 1, (64, 64), 4
        names = names[:2]
    photos, base = Photos(args), LARGE if args.stage == "large" else SMALL
    data = args.data.strip("/").split("/")[-1].replace(":", "_")
    pixels = fingerprint(args.judge_steps, photos.images, photos.masks, *photos.held_out)
    path = args.out / f"{args.stage}_{data}_{pixels}.json"        # another size or split: other cells
    cells = read_json(path) if path.exists() else {}
    nets = {}                                               # of a seed: variants of sampling share them
    for seed in range(args.seeds):
        for name in names:
            key = f"{name}|{seed}|{args.minutes:g}"
            if key in cells:
                continue
            change = VARIANTS[args.stage][name]
            how, sampled = dict(base, **change), set(change) <= set(SAMPLING)
            if not sampled or seed not in nets:
                trained = train(photos, how, args.minutes, seed)
                nets.update({seed: trained} if sampled else {})
            net, steps = nets[seed] if sampled else trained
            start = time.process_time()
            images, masks = draw(net.eval(), args.stage, photos, how, seed, count)
            seconds = (time.process_time() - start) / len(images)
            cells[key] = dict(photos.measure(images, masks), steps=steps, seconds=seconds)
            write_json(path, cells)
            pictures = [("image", list(images[:8])), ("mask", list(map(overlay, images[:8], masks[:8])))]
            write_image(path.with_suffix("") / f"{name} {seed}.png", sheet(pictures, classes=photos.classes))
            print(key, {k: round(v, 3) for k, v in cells[key].items()}, flush=True)
    columns, real = [*MEASURES, "steps", "seconds"], photos.measure(*photos.reference)
    rows = [["held-out photos", *(f"{value:.2f}" for value in real.values()), "", ""]]
    for name in names:
        found = [cells[f"{name}|{seed}|{args.minutes:g}"] for seed in range(args.seeds)]
        rows.append([name, *(spread([cell[column] for cell in found], 2) for column in columns)])
    print_table({"caption": f"{args.stage}, {args.data}", "head": ["variant", *columns], "rows": rows})


if __name__ == "__main__":
    run_main(main)
