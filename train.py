"""Train one stage of Defect-Gen on a handful of photos with masks.

    python train.py                                     what would be trained, without training
    python train.py --stage large                       the drawn pill, minutes on two CPU cores
    python train.py --stage small
    python train.py --stage large --data FOLDER --out runs/mine --preset laptop        a plan of 64x64; then
    python train.py --stage small --data FOLDER --out runs/mine --preset laptop        256x256: an hour or two
    python train.py --stage large --resume --steps 20000            continue: the same flags, and more steps
    torchrun --nproc_per_node=4 train.py --stage large ...          one process per GPU; they share each batch

Everything random is a function of (seed, step), so a resumed run continues bit for bit where it stopped (on a
CPU). How many processes or micro-batches share a step's batch changes nothing but the rounding.
"""
import argparse
import math
import os
import signal
import time
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from datasets import (AUGMENTATIONS, add_data_flags, augment, defects, describe, gaps, has_bf16, open_dataset,
                      overlay, pick_device, run_main, sheet, write_atomically, write_image, write_json)
from defect_gen import (STAGES, SWITCH_T, Joint, check_fit, checkpoints, image_statistics, load_stage,
                        save_stage)
from diffusion import (TARGETS, WEIGHTINGS, q_sample, rng, sample, schedule, time_weights, timesteps,
                       to_x_start, training_loss)
from unet import LARGE, SMALL, UNet, check_size, count_parameters, field_in_words, receptive_field

TINY = dict(size=(64, 64), steps=1800, batch_size=4, lr=1e-3, weight_decay=0.0, ema=0.998,
            warmup=50, save_every=500, target="v", weighting="uniform", soft_masks=False, t_range="own")
LAPTOP = dict(TINY, steps=4000, ema=0.999, save_every=2000)
PAPER = dict(size=(256, 256), steps=160_000, batch_size=2, lr=1e-4, weight_decay=0.002, ema=0.9999, warmup=0,
             save_every=10_000, target="x0", weighting="uniform", soft_masks=False, t_range="full")
PLAN = dict(weighting="min-snr", soft_masks=True, t_range="full")       # a large stage in a smaller picture
WHOLE = dict(channels=32, multipliers=(1, 1, 2, 4), num_res_blocks=1, attention_levels=(3,))
PATCHES = dict(channels=32, multipliers=(1, 2), num_res_blocks=1, attention_levels=(), middle=False,
               norm="local")
PRESETS = {
    # 64x64 on two CPU cores in minutes, after a plan of 32x32: demo, tests, teaching
    "tiny": dict(large=dict({**TINY, **PLAN}, size=(32, 32), steps=2000, batch_size=8, network=WHOLE),
                 small=dict(TINY, network=PATCHES)),
    # 256x256 in an hour or two of a CPU core: a plan of 64x64, then crops of the photos
    "laptop": dict(large=dict({**LAPTOP, **PLAN}, size=(64, 64), steps=2000, network=WHOLE),
                   small=dict(LAPTOP, size=(256, 256), crop=96,
                              network=dict(PATCHES, num_res_blocks=2))),
    # the released configuration (its yaml files)
    "paper": dict(large=dict(PAPER, network=LARGE), small=dict(PAPER, network=SMALL)),
}
FINER = 4                       # --soft-masks: each pixel holds the mean of so many squared
T_MARGIN = 50                   # own timesteps reach this far beyond SWITCH_T: sampling may move the switch
MEMORY_LIMIT = 4 << 30          # bytes; data up to this size are decoded once and kept, larger ones loaded
ORDER, NOISE, PREVIEW, VIEW = 1, 2, 3, 4        # what random numbers are for; see diffusion.rng
LOG_EVERY = 10                  # steps between readings of the loss: each one waits for the device
QUARTERS = ["loss_q1", "loss_q2", "loss_q3", "loss_q4"]         # loss by quarter of [0, T)
COLUMNS = ["step", "loss", *QUARTERS, "lr", "images_per_s", "grad_norm"]   # unweighted; norm unclipped
FREE = {"steps", "lr", "save_every", "keep", "device", "bf16", "out", "data", "object", "accumulate",
        "resume"}                                   # settings that a resumed run may change


def parse_args(argv=None):
    """The flags, checked; those left out take the value of the preset."""
    parser = argparse.ArgumentParser(description="Train one stage of Defect-Gen.",
                                     epilog="Flags left out take the preset's value.")
    add = parser.add_argument
    add("--stage", choices=STAGES, help="which network (default: only say what both are)")
    add_data_flags(parser, split="train")
    add("--out", default="runs/demo", help="run folder; each stage has one in it (default: %(default)s)")
    add("--preset", default="tiny", choices=PRESETS, help="values for flags left out (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="images are resized to this; the stages may "
        "differ: the large one then plans in a smaller picture")
    add("--crop", type=int, metavar="PX", help="train small on random windows of this side; 0: whole images")
    add("--defect-share", type=float, default=0.7, help="share of windows on a defect (default: %(default)s)")
    add("--steps", type=int, help="optimiser steps in all")
    add("--batch-size", type=int, help="images per step, of all processes together")
    add("--accumulate", type=int, default=1, help="micro-batches a step: less memory (default: %(default)s)")
    add("--lr", type=float, help="learning rate of AdamW")
    add("--lr-decay", action="store_true", help="let the rate fall to 0 at the last of --steps, as half a "
        "cosine; resumed with more --steps it jumps up to the longer curve")
    add("--augment", nargs="+", default=[], choices=AUGMENTATIONS, help="change pairs at random, where the "
        "product may lie that way (default: none)")
    add("--depth", type=int, choices=range(7), help="down-samplings: fewer see less, see unet.py")
    add("--target", choices=TARGETS, help="what the network predicts")
    add("--weighting", choices=WEIGHTINGS, help="what errors count, by timestep")
    add("--soft-masks", action=argparse.BooleanOptionalAction, help=f"learn means of {FINER}x{FINER} finer "
        "pixels, of photo and mask: without, defects finer than a plan's pixels vanish")
    add("--t-range", choices=["own", "full"], help="timesteps to train at: the stage's own side of t = "
        f"{SWITCH_T} and {T_MARGIN} beyond it, or all, for any --switch-t")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--save-every", type=int, help="steps between checkpoints with a picture of samples")
    add("--keep", type=int, default=2, help="checkpoints to keep (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision (default: where it is faster)")
    add("--resume", action="store_true", help="continue from the newest checkpoint")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "accumulate", "save_every", "keep", "lr"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    if not 0 <= args.defect_share <= 1:
        raise ValueError(f"--defect-share is {args.defect_share}, but must be 0 to 1")
    return complete(args, args.stage) if args.stage else args


def complete(args, stage):
    """The settings of one stage: the flags, and the preset's values for those left out."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **PRESETS[args.preset][stage], **given, "stage": stage})


# --- data ---

def order(num_images, start, count, seed):
    """Positions start .. start + count - 1 of endless shuffled epochs: each image equally often."""
    positions = range(start, start + count)
    epochs = {p // num_images for p in positions}
    shuffled = {e: torch.randperm(num_images, generator=rng(seed, ORDER, e)).tolist() for e in epochs}
    return [shuffled[p // num_images][p % num_images] for p in positions]


def window(mask, side, defect_share, generator):
    """(rows, columns) of a random window of `side` px; a share of defect_share shows a defect's pixel."""
    least, most = [0, 0], [max(0, n - side) for n in mask.shape]
    pixels = defects(mask).nonzero()
    if len(pixels) and torch.rand((), generator=generator) < defect_share:
        pixel = pixels[torch.randint(len(pixels), (), generator=generator)].tolist()
        least = [min(max(0, p - side + 1), n) for p, n in zip(pixel, most)]
        most = [min(p, n) for p, n in zip(pixel, most)]
    starts = [int(torch.randint(a, b + 1, (), generator=generator)) for a, b in zip(least, most)]
    return [slice(start, start + side) for start in starts]


def batches(dataset, first_step, args, device, share=slice(None)):
    """Yield the slice `share` of each step's (images, masks), on the device, cropped and augmented."""
    indices = (order(len(dataset), step * args.batch_size, args.batch_size, args.seed)[share]
               for step in range(first_step, args.steps))
    size = len(dataset) * (dataset.channels + 1) * math.prod(dataset.size)
    if size <= MEMORY_LIMIT:
        all_images, all_masks = dataset.tensors()
        loader = ((all_images[index], all_masks[index]) for index in indices)
    else:
        print(f"data: {size / 2**30:.1f} GiB, loaded by worker processes (limit {MEMORY_LIMIT >> 30} GiB)")
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=indices, pin_memory=device.type == "cuda",
                                             num_workers=min(4, os.cpu_count()))
    for step, batch in enumerate(loader, first_step):
        pairs = []
        for place, image, mask in zip(range(args.batch_size)[share], *batch):
            generator = rng(args.seed, VIEW, step, place)   # by the place in the whole batch, whoever has it
            if args.crop:
                rows, columns = window(mask, args.crop, args.defect_share, generator)
                image, mask = image[:, rows, columns], mask[rows, columns]
            pairs.append(augment(image, mask, args.augment, generator))
        yield tuple(torch.stack(part).to(device, non_blocking=True) for part in zip(*pairs))


def encode(joint, images, masks, config):
    """What the network learns of images (B, C, H, W) and masks (B, H, W): see Joint, and --soft-masks."""
    x_start = joint.encode(images, masks)
    return F.avg_pool2d(x_start, FINER) if config["soft_masks"] else x_start


# --- pictures while training ---

def preview(net, config, joint, images, masks):
    """A sheet of 8 samples of this stage's EMA weights, from fixed seeds.

    The large stage draws from noise, as far down as it was trained; the small one denoises training images
    from where it takes over.
    """
    alphas_cumprod, device = schedule(config["T"]), images.device

    def denoise(x_t, t):
        with torch.autocast(device.type, torch.bfloat16, enabled=config["bf16"]):
            output = net(x_t, t)
        return to_x_start(output.float(), x_t, t, alphas_cumprod, config["target"])

    x_start = encode(joint, images, masks, config)
    x_t = torch.randn(x_start.shape, generator=rng(config["seed"], PREVIEW)).to(device)
    steps, rows = [t for t in timesteps(config["T"], 20) if t >= config["t_range"][0]], []
    if config["stage"] == "small":
        steps = [t for t in steps if t < SWITCH_T]
        x_t = q_sample(x_start, steps[0], x_t, alphas_cumprod)
        rows.append((f"t={steps[0]}", joint.decode(x_t)[0].cpu()))
    drawn = sample(denoise, x_t, steps, alphas_cumprod, limits=joint.limits)
    images, masks = (part.cpu() for part in joint.decode(drawn))
    rows += [("image", images), ("mask", list(map(overlay, images, masks)))]
    return sheet(rows, classes=config["classes"])


# --- before the loop ---

def prepare(args, processes):
    """(dataset, network settings, config, device): what can be wrong is found out before the first step."""
    folder, parts = Path(args.out) / args.stage, processes * args.accumulate
    if not args.resume and checkpoints(folder):
        raise ValueError(f"{folder} holds checkpoints: --resume continues them, another --out starts anew")
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} does not divide into {parts} equal parts "
                         f"({processes} processes, --accumulate {args.accumulate}): take a multiple")
    device = pick_device(args.device)
    dataset = open_dataset(args.data, args.size, args.split, args.object)
    print(describe(dataset))
    found = len(dataset)
    dataset = dataset.subset(dataset.defective())
    if len(dataset) < found:
        print(f"  left out: {found - len(dataset)} without a defect")
    if not len(dataset):
        raise ValueError(f"--data {args.data}, split {args.split}: no photo has a defect to learn; "
                         "choose another --split, or write a split.json")
    for sentence in gaps(dataset, FINER if args.soft_masks else 1):
        print(f"warning: {sentence}")
    network = dict(args.network)
    widths = network["multipliers"]
    depth = len(widths) - 1 if args.depth is None else args.depth
    network["multipliers"] = (widths + widths[-1:] * depth)[:depth + 1]         # the last, as often as needed
    if args.stage == "large" and depth < min(network["attention_levels"]):
        print(f"warning: at --depth {depth} the large network has no attention and sees patches")
    if args.crop and (args.stage == "large" or args.soft_masks):
        raise ValueError(f"--crop {args.crop} is for a small stage without --soft-masks; --crop 0 takes "
                         "whole photos")
    check_size(*args.size, depth)
    if args.crop and (args.crop < 0 or args.crop % 2 ** depth):
        raise ValueError(f"--crop {args.crop}: the net halves it {depth} times, use multiples of {2**depth}")
    T = 1000
    own = {"large": [SWITCH_T - T_MARGIN, T], "small": [0, SWITCH_T + T_MARGIN]}
    config = dict(vars(args), size=list(args.size), crop=args.crop or None, classes=list(dataset.classes),
                  channels=dataset.channels, images=[sample.name for sample in dataset.samples], T=T,
                  device=str(device), bf16=has_bf16(device) if args.bf16 is None else args.bf16,
                  t_range=own[args.stage] if args.t_range == "own" else [0, T],
                  statistics=image_statistics(dataset), white=dataset.white)
    config.pop("network")
    if args.soft_masks:                                         # photos larger by FINER, to take shares of
        dataset.size = tuple(FINER * n for n in args.size)
    other = folder.with_name("small" if args.stage == "large" else "large")
    if not args.resume and checkpoints(other):                  # found out now, not when both are trained
        configs = {args.stage: config, other.name: load_stage(other, other.name)["config"]}
        check_fit(args.out, configs["large"], configs["small"])
    return dataset, network, config, device


def build(network, config, device):
    """(net, ema, optimizer) at step 0, weights by the seed."""
    torch.manual_seed(config["seed"])
    # channels last is faster, but in bf16 on CPUs GroupNorm's backward pass is ten times slower with it
    layout = torch.contiguous_format if config["bf16"] and device.type == "cpu" else torch.channels_last
    net = UNet(config["channels"] + len(config["classes"]), **network).to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=config["weight_decay"], fused=True)
    (height, width), crop, field = config["size"], config["crop"], receptive_field(net)
    print(f"{config['stage']}: {count_parameters(net) / 1e6:.2f} M parameters, sees {field_in_words(net)} of "
          f"{height}x{width}{f' in windows of {crop} px' if crop else ''}, {device}, "
          f"{'bf16' if config['bf16'] else 'fp32'}")
    if config["stage"] == "small" and field >= max(height, width):
        print("warning: the small network sees the whole image and may memorise it; see --size and --depth")
    if crop and field > crop:
        print("warning: the network sees more than a window; its edges will look like windows: raise --crop")
    return net, deepcopy(net).requires_grad_(False), optimizer


def show_stages(flags):
    """Say what both stages would be, and check data and flags on the way."""
    flags.resume = True                                         # what is there already does not matter
    for stage in STAGES:
        args = complete(flags, stage)
        args.crop = args.crop if stage == "small" else None
        dataset, network, config, device = prepare(args, 1)
        build(network, config, device)
        low, high = config["t_range"]
        times = args.steps * args.batch_size / len(dataset)
        print(f"  {args.steps} steps of {args.batch_size} at {low} <= t < {high}: each of the "
              f"{len(dataset)} photos with a defect is seen {times:.0f} times")
    print("next: the same command with --stage large")


def restore(folder, config, net, ema, optimizer):
    """Load the newest checkpoint into the three; return its step. What shapes the weights must stay."""
    checkpoint = load_stage(folder, config["stage"])
    old = {"lr_decay": False, **checkpoint["config"]}           # older ones had none
    if old["images"] != config["images"]:                       # the folder may have moved, not its images
        raise ValueError(f"{folder}: --data {config['data']}, split {config['split']}, no longer names the "
                         f"{len(old['images'])} images of the start; use the old data, or another --out")
    changed = [f"{name} was {old.get(name)} and is {value}" for name, value in config.items()
               if name not in FREE and old.get(name, value) != value]
    if changed:
        raise ValueError(f"{folder}: cannot resume with other settings: {'; '.join(changed)}; give the old "
                         "ones, or another --out")
    net.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, state in optimizer.state.items():        # fused AdamW needs them to lie as the weights do
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.empty_like(parameter).copy_(state[name])
    return checkpoint["step"]


def open_log(path, first_step):
    """log.csv, to append to. What a killed run logged behind its last checkpoint goes: no row comes twice."""
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]] if path.exists() else []
    kept = [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) <= first_step]
    text = "".join(",".join(row) + "\n" for row in [COLUMNS, *kept])
    write_atomically(path, lambda p: p.write_text(text))
    return path.open("a", buffering=1)                          # each row at once


@contextmanager
def noted_signals():
    """Within it the first Ctrl-C or SIGTERM is noted in the list that this yields; a second stops at once."""
    received, undo = [], ExitStack()

    def note(signum, frame):
        received.append(signum)
        undo.close()

    with undo:
        for signum in (signal.SIGINT, signal.SIGTERM):
            undo.callback(signal.signal, signum, signal.signal(signum, note))   # back to the old handler
        yield received


# --- the loop ---

def learning_rate(step, args):
    """Of step 0, 1, ...: rises to args.lr in its first steps, then stays, or falls with --lr-decay."""
    left = (1 + math.cos(math.pi * step / args.steps)) / 2 if args.lr_decay else 1.0
    return args.lr * left * min(1.0, (step + 1) / max(args.warmup, 1))


def train(args):
    """Train args.stage to args.steps, from the start or from its newest checkpoint; see parse_args.

    Ctrl-C and SIGTERM end it after the step, with a checkpoint; under torchrun at once, without one.
    Returns None, or 128 + the number of the signal, which is a command's exit status.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dataset, network, config, device = prepare(args, processes)
    folder, alphas_cumprod = Path(args.out) / args.stage, schedule(config["T"])
    joint = Joint(config["statistics"], len(dataset.classes), device)
    by_time = time_weights(alphas_cumprod, args.target, args.weighting).float().to(device)
    share = slice(rank * args.batch_size // processes, (rank + 1) * args.batch_size // processes)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    net, ema, optimizer = build(network, config, device)
    first_step = restore(folder, config, net, ema, optimizer) if args.resume else 0
    model = DistributedDataParallel(net) if processes > 1 else net
    if first_step >= args.steps:
        print(f"{folder} has {first_step} steps already; raise --steps to go on")
        return
    if rank == 0:
        write_json(folder / "config.json", config)
    log = open_log(folder / "log.csv", first_step) if rank == 0 else open(os.devnull, "w")
    eight = dataset.subset([i * len(dataset) // 8 for i in range(8)]).tensors()
    eight = [part.to(device) for part in eight]                 # for the previews
    parameters, averages = list(net.parameters()), list(ema.parameters())
    totals = torch.zeros(2, 4, device=device)                   # loss sums and counts by quarter of [0, T)
    clock, last = time.perf_counter(), first_step
    bar = tqdm(total=args.steps, initial=first_step, unit="step", desc=args.stage, disable=rank > 0)

    with log, bar, noted_signals() if processes == 1 else nullcontext([]) as received:
        for step, (images, masks) in enumerate(batches(dataset, first_step, args, device, share), first_step):
            x_start = encode(joint, images, masks, config)
            generator = rng(args.seed, NOISE, step)             # one for all processes, which take shares
            t = torch.randint(*config["t_range"], (args.batch_size,), generator=generator)[share].to(device)
            noise = torch.randn(args.batch_size, *x_start.shape[1:], generator=generator)[share].to(device)
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args)

            micro_batches = zip(*(part.chunk(args.accumulate) for part in (x_start, t, noise)))
            for i, (x_start, t, noise) in enumerate(micro_batches, 1):
                wait = processes > 1 and i < args.accumulate    # gradients are averaged once, in the last
                with model.no_sync() if wait else nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=config["bf16"]):
                        losses = training_loss(model, x_start, t, noise, alphas_cumprod, args.target,
                                               joint.weights)
                    ((losses * by_time[t]).mean() / args.accumulate).backward()
                values = torch.stack([losses.detach(), torch.ones_like(losses)])
                totals.index_add_(1, t * 4 // config["T"], values)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(args.ema, (1 + step) / (10 + step))     # less at first, to forget step 0
            get_ema_multi_avg_fn(decay)(averages, parameters, step)

            done = step + 1
            stop = done == args.steps or bool(received)
            save = stop or done % args.save_every == 0
            if save or done % LOG_EVERY == 0:
                if processes > 1:
                    dist.all_reduce(totals)                     # one loss for all, who stop if it is broken
                sums, counts = totals.tolist()
                loss, now = sum(sums) / sum(counts), time.perf_counter()
                if not math.isfinite(loss + norm.item()):
                    raise ValueError(f"at step {done} the loss is {loss} and the gradient {norm.item():g}; "
                                     f"checkpoints are from before. Try a lower --lr or --no-bf16")
                rate = (done - last) * args.batch_size / (now - clock)
                quarters = [f"{total / count:.6f}" if count else "" for total, count in zip(sums, counts)]
                row = done, f"{loss:.6f}", *quarters, f"{lr:g}", f"{rate:.2f}", f"{norm.item():.4g}"
                print(*row, sep=",", file=log)
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.1f}")
                totals.zero_()
                clock, last = now, done
            if save and rank == 0:
                save_stage(folder / f"step_{done:06d}.pt", net, ema, optimizer, done, config)
                for path in list(checkpoints(folder).values())[:-args.keep]:
                    path.unlink()
                if not received:
                    write_image(folder / f"samples_{done:06d}.png", preview(ema, config, joint, *eight))
                    clock = time.perf_counter()
            if stop:
                break
    print(f"{args.stage} stage: {done} steps, in {folder}")
    if done < args.steps:
        print(f"stopped by {signal.Signals(received[0]).name}; continue with the same command and --resume")
        return 128 + received[0]
    other = "small" if args.stage == "large" else "large"
    other_trained = checkpoints(Path(args.out) / other)
    again = f"the same command with --stage {other}{', without --resume' if args.resume else ''}"
    print("next:", f"python sample.py --run {args.out}" if other_trained else again)


def main():
    """Train alone, or as one of the processes of torchrun, of which the first speaks for all."""
    with redirect_stdout(open(os.devnull, "w")) if int(os.environ.get("RANK", 0)) else nullcontext():
        args = parse_args()
        status = train(args) if args.stage else show_stages(args)
    if dist.is_initialized():                                   # not after an error: the others may be lost
        dist.barrier()                      # none ends while another writes, or while gloo holds tensors
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run_main(main)
