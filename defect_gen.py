"""Defect-Gen (arXiv:2310.17316): a network with a large receptive field starts the denoising, one with a small field ends it.

Few images make a diffusion model memorise them. A network with few down-samplings sees patches only: it draws new local
patches but loses the product's shape. So `large` owns the noisy steps t >= switch_t, where the shape is decided, and `small`
owns t < switch_t, where the details are. It is ONE trajectory over one list of timesteps; nothing is renumbered at the switch
(the released code denoises to the end with `large` and starts again with `small`, which is another method).

Image and mask are denoised together, as the channels of one picture:
    joint (B, C + K, H, W) in [-1, 1]: C image channels, then one channel per class (background too), +1 inside and -1 outside.

    python defect_gen.py [--run runs/demo]      draws one trajectory through the switch (without a run: of an exact denoiser)
"""
import argparse
import hashlib
import math
import sys
import zipfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets import data_options, has_bf16, open_dataset, overlay, pick_device, run_main, sheet, write_atomically, write_image
from diffusion import noise_for, sample, schedule, timesteps, to_x_start
from unet import UNet

STAGES = ("large", "small")
SWITCH_T = 400      # the released script's value; the paper's own u is reported ambiguously (50 in one place)


# --- the idea ---

def switched(large, small, switch_t):
    """The paper's hand-over: a denoiser that asks `large` at t >= switch_t and `small` below.

    switch_t = 0 is the large network alone, switch_t = T the small one alone.
    """
    def denoise(x_t, t):
        return large(x_t, t) if t >= switch_t else small(x_t, t)
    return denoise


def encode(image, mask, num_classes):
    """Image uint8 (B, C, H, W) and mask (B, H, W) of class indices -> joint float32 (B, C + K, H, W) in [-1, 1].

    Masks have the amplitude of images ({-1, +1}); the released code's {0, 1} halves it and with it the mask's signal to noise.
    """
    one_hot = mask.unsqueeze(1) == torch.arange(num_classes, device=mask.device).view(1, -1, 1, 1)      # (B, K, H, W) bool
    return torch.cat([image.float() / 127.5 - 1, one_hot.float() * 2 - 1], dim=1)


def decode(joint, num_classes):
    """joint (B, C + K, H, W) -> image uint8 (B, C, H, W), mask uint8 (B, H, W): the class with the highest channel."""
    image, classes = joint[:, :-num_classes], joint[:, -num_classes:]
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), classes.argmax(1).to(torch.uint8)


# --- checkpoints ---

KEYS = "kind", "step", "config", "network", "model", "ema", "optimizer"


def save_stage(path, stage, net, ema, optimizer, step, config, totals=None):
    """Write one stage's checkpoint: tensors and plain values only, to a temporary name first, and read back before it gets its own.

    config: the resolved settings of training; it names data, classes, channels, size, T, schedule and target, so that sampling
    needs nothing else.  totals: what train.py has summed up for the next row of its log.
    Raises: OSError, and the checkpoints there are stay as they were.
    """
    values = f"defect-gen/{stage}", step, config, net.config, net.state_dict(), ema.state_dict(), optimizer.state_dict()

    def write(temporary):
        try:
            torch.save({**dict(zip(KEYS, values)), "totals": totals}, temporary)
        except RuntimeError as error:                               # torch's word for a full disk
            raise OSError(f"the disk is full, or the file too large for it: {str(error).partition(chr(10))[0][:90]}") from None
        if broken := damage(temporary):
            raise OSError(f"the disk does not hold what was written: {broken}")
    write_atomically(path, write)


def damage(path):
    """What is wrong with the bytes of a checkpoint by the checksums in it, which torch.load does not look at; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as book:
            if sum(part.file_size for part in book.infolist()) > Path(path).stat().st_size:
                return "it unpacks to more than its own size"       # torch.save never packs
            part = book.testzip()
            return part and f"the checksum of {part} is wrong"
    except Exception as error:      # zipfile raises many types; to the user they are one fact
        return str(error).partition("\n")[0][:90] or type(error).__name__


def checkpoints(folder):
    """The step_NNNNNN.pt of a stage's folder, oldest first."""
    return sorted(Path(folder).glob("step_" + "[0-9]" * 6 + ".pt"), key=lambda p: int(p.stem.split("_")[1]))


def steps_of(folder):
    """The steps that a stage's folder has checkpoints of, in order."""
    return [int(path.stem.split("_")[1]) for path in checkpoints(folder)]


def load_stage(folder, stage, device="cpu", step=None):
    """A checkpoint of run/<stage> as a dict, the newest whole one by default. Raises FileNotFoundError or ValueError, saying what to do."""
    found = [path for path, at in zip(checkpoints(folder), steps_of(folder)) if step in (None, at)]
    if not found:
        raise FileNotFoundError(f"{folder}: no checkpoint of the {stage} stage{'' if step is None else f' at step {step}'}; train it with: "
                                f"python train.py --stage {stage} --out {Path(folder).parent}")
    while (broken := damage(found[-1])) and len(found) > 1:
        print(f"{found.pop()}: damaged ({broken}); going on with the one before, {found[-1].name}", file=sys.stderr)
    path = found[-1]
    try:
        if broken:
            raise ValueError(broken)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        kind = checkpoint["kind"]
    except Exception as error:      # the reader raises many types; to the user they are one fact
        raise ValueError(f"{path}: damaged or not a checkpoint of this program ({str(error).partition(chr(10))[0][:90]}); "
                         f"delete it, to use another one or to train again") from None
    if kind != f"defect-gen/{stage}":
        raise ValueError(f"{path}: holds the stage {kind}, but defect-gen/{stage} is expected here; are large/ and small/ swapped?")
    if set(KEYS) - set(checkpoint):
        raise ValueError(f"{path}: lacks {', '.join(sorted(set(KEYS) - set(checkpoint)))}; it was not written by train.py, delete it")
    return checkpoint


def open_training(run, config, size, data=None, **options):
    """The images that a run was trained on, as a data set read at `size`; config is that of one of its stages.

    Raises ValueError if they are no longer the same images: copies of them would pass for new, or scores be of training images.
    """
    data = data or config["data"]
    dataset = open_dataset(data, size, config["split"], **{**data_options(config), **options})
    if dataset.classes != tuple(config["classes"]):
        raise ValueError(f"{data} has the classes {', '.join(dataset.classes)}, but {run} was trained with {', '.join(config['classes'])}")
    if config["images"] != [dataset.samples[i].name for i in dataset.defective()]:
        raise ValueError(f"{data}: its split {config['split']} is no longer the {len(config['images'])} images that {run} was trained on; scores "
                         f"could be of training images. Restore the folder, or train again")
    return dataset


# --- the generator ---

def fingerprint(*nets):
    """A short name of the weights: pairs of one folder must come from the same ones."""
    hashed = hashlib.sha256()
    for net in nets:
        for value in net.state_dict().values():
            hashed.update(value.cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


class DefectGen:
    """Two trained stages, the settings they share, and t_ranges {stage: [low, high]}: each was trained at low <= t < high.

        generator = DefectGen.load("runs/demo")
        images, masks = generator.sample(seeds=[0, 1, 2, 3])

    The weights are laid out for sampling: channels last, and in bfloat16 if they were trained so and the device is faster with it.
    """

    def __init__(self, large, small, config, t_ranges):
        self.config, self.t_ranges, self.fingerprint = config, t_ranges, fingerprint(large, small)
        self.classes, self.size = tuple(config["classes"]), tuple(config["size"])
        self.alphas_cumprod = schedule(config["T"], config["schedule"])
        self.device = next(large.parameters()).device
        dtype = torch.bfloat16 if config["bf16"] and has_bf16(self.device) else torch.float32
        self.large, self.small = (net.eval().to(dtype, memory_format=torch.channels_last) for net in (large, small))

    @classmethod
    def load(cls, run, device="cpu", step=None):
        """Read both stages of a run folder, EMA weights, of the newest checkpoints or those at `step`.

        Raises where one is missing or the two do not fit together.
        """
        if not Path(run).is_dir():
            raise FileNotFoundError(f"--run {run}: no such folder; train first: python train.py --stage large --out {run}")
        nets, configs = [], []
        for stage in STAGES:
            checkpoint = load_stage(Path(run) / stage, stage, device, step)
            net = UNet(**checkpoint["network"]).to(device)
            net.load_state_dict(checkpoint["ema"], strict=True)
            nets.append(net)
            configs.append(checkpoint["config"])
        if configs[0]["images"] != configs[1]["images"]:
            raise ValueError(f"{run}: the stages do not fit together: they were trained on different images ({configs[0]['data']}, split "
                             f"{configs[0]['split']}, and {configs[1]['data']}, split {configs[1]['split']}); scores would prove nothing")
        for key in ("classes", "channels", "size", "T", "schedule", "target"):
            if configs[0][key] != configs[1][key]:
                raise ValueError(f"{run}: the stages do not fit together: {key} is {configs[0][key]} in large and {configs[1][key]} in "
                                 f"small; train both with the same data and size")
        t_ranges = [config.get("t_range", [0, config["T"]]) for config in configs]         # once, every stage was trained at every t
        return cls(*nets, configs[0], dict(zip(STAGES, t_ranges)))

    def denoiser(self, net):
        """f(x_t, t) -> x_0 of one network, whatever it was trained to predict."""
        return lambda x_t, t: to_x_start(net(x_t, t), x_t, t, self.alphas_cumprod, self.config["target"])

    def steps(self, num_steps, spacing, switch_t):
        """The timesteps to sample along. Raises ValueError if one of them would ask a stage at a t it was never trained at."""
        steps = timesteps(len(self.alphas_cumprod), num_steps, spacing, self.alphas_cumprod)
        for t in steps:
            stage = "large" if t >= switch_t else "small"
            low, high = self.t_ranges[stage]
            if not low <= t < high:
                raise ValueError(f"--switch-t {switch_t} asks the {stage} stage at t = {t}, but it was trained at t = {low} to {high - 1} "
                                 f"only: choose --switch-t between {self.t_ranges['large'][0]} and {self.t_ranges['small'][1]}, or train "
                                 f"the {stage} stage again with --t-range full")
        return steps

    def sample(self, seeds, num_steps=20, sampler="dpm++", spacing="logsnr", switch_t=SWITCH_T, size=None, batch_size=16,
               on_step=None):
        """Draw one pair per seed. A pair is a function of its seed, not of the batch it is drawn in.

        Args:
            seeds: list of ints.  num_steps: network calls per picture.  switch_t: first timestep of the large network.
            size: (H, W), that of training by default.  on_step: callback (t, x_t, pred_x_start).
        Returns: images uint8 (N, C, H, W), masks uint8 (N, H, W), on the CPU.
        """
        steps = self.steps(num_steps, spacing, switch_t)
        denoise = switched(self.denoiser(self.large), self.denoiser(self.small), switch_t)
        shape = (self.config["channels"] + len(self.classes), *(size or self.size))
        pairs = []
        for start in range(0, len(seeds), batch_size):
            noise = noise_for(seeds[start:start + batch_size], shape, self.device)
            joint = sample(denoise, noise(), steps, self.alphas_cumprod, sampler, noise=noise, on_step=on_step)
            pairs.append([part.cpu() for part in decode(joint, len(self.classes))])
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


# --- one trajectory as a picture ---

def strip(draw, num_classes, switch_t, most=12):
    """(titles, rows) of a sheet of one trajectory: x_t, and the image and mask predicted from it, at up to `most` of its steps.

    draw(on_step=...) draws one picture, see diffusion.sample. The titles say which network was asked at which t.
    """
    columns = []

    def watch(t, x_t, pred_x_start):
        image, mask = (part[0].cpu() for part in decode(pred_x_start[:1], num_classes))
        noisy = decode(x_t[:1], num_classes)[0][0].cpu()
        columns.append((f"{'large' if t >= switch_t else 'small'} t={t}", noisy, image, overlay(image, mask)))

    draw(on_step=watch)
    shown = [columns[i] for i in torch.linspace(0, len(columns) - 1, min(most, len(columns))).round().int().tolist()]
    titles, *rows = zip(*shown)
    return titles, list(zip(("x_t", "image", "mask"), rows))


# --- python defect_gen.py ---

def exact_denoiser(x_start, alphas_cumprod):
    """E[x_0 | x_t] when the data are exactly these N pictures: softmax of the Gaussian log-likelihoods over them.

    It is what a network of unlimited capacity learns from few images: it can only copy them.
    """
    def denoise(x_t, t):
        a = float(alphas_cumprod[t])
        squared = (x_t[:, None] - math.sqrt(a) * x_start[None]).square().flatten(2).sum(-1)             # (B, N)
        weights = F.softmax(-squared / (2 * (1 - a)), dim=1)
        return torch.einsum("bn,nchw->bchw", weights, x_start)
    return denoise


def main():
    parser = argparse.ArgumentParser(description="Draw one trajectory through the switch: x_t, and the image and mask predicted from it.")
    parser.add_argument("--run", help="a run folder with both stages (default: the exact denoiser of 35 drawn pills stands in for both)")
    parser.add_argument("--seed", type=int, default=0, help="the picture's seed (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=12, help="network calls (default: %(default)s)")
    parser.add_argument("--switch-t", type=int, default=SWITCH_T, help="first timestep of the large network (default: %(default)s)")
    parser.add_argument("--out", default="trajectory.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.run:
        generator = DefectGen.load(args.run, device)
        classes = generator.classes
        draw = partial(generator.sample, [args.seed], args.num_steps, switch_t=args.switch_t)
    else:
        data = open_dataset("drawn:pill", (64, 64), "train")
        classes, alphas_cumprod = data.classes, schedule()
        x_start = encode(*data.tensors(), len(classes)).to(device)
        noise = noise_for([args.seed], x_start.shape[1:], device)
        exact = exact_denoiser(x_start, alphas_cumprod)
        steps = timesteps(len(alphas_cumprod), args.num_steps)
        draw = partial(sample, switched(exact, exact, args.switch_t), noise(), steps, alphas_cumprod)
    titles, rows = strip(draw, len(classes), args.switch_t)
    write_image(args.out, sheet(rows, titles, classes))
    print(f"{len(titles)} steps shown, {sum(t.startswith('large') for t in titles)} of them by the large network; picture: {args.out}")


if __name__ == "__main__":
    run_main(main)
