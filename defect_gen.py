"""Defect-Gen (arXiv:2310.17316): a network with a large receptive field begins, a small one ends.

Few images make a diffusion model memorise them. A network with few down-samplings sees patches only: it
draws new local patches but loses the product's shape. So `large` owns the noisy steps t >= switch_t, where
the shape is decided, and `small` owns t < switch_t, where the details are. It is ONE trajectory over one list
of timesteps; nothing is renumbered at the switch (the released code denoises to the end with `large` and
starts again with `small`, which is another method).

Image and mask are denoised together, as the channels of one picture:
    joint (B, C + K, H, W) in [-1, 1]: C image channels, then one channel per class (background too), which is
    +1 inside and -1 outside.

    python defect_gen.py [--run runs/demo]      draws one trajectory (without a run: of an exact denoiser)
"""
import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets import (has_bf16, open_dataset, overlay, pick_device, run_main, sheet, write_atomically,
                      write_image)
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
    """Image uint8 (B, C, H, W) and mask uint8 (B, H, W) -> joint float32 (B, C + K, H, W) in [-1, 1].

    Masks have the amplitude of images ({-1, +1}); the released code's {0, 1} halves their signal to noise.
    """
    classes = torch.arange(num_classes, device=mask.device).view(1, -1, 1, 1)
    one_hot = mask.unsqueeze(1) == classes                                                 # (B, K, H, W) bool
    return torch.cat([image.float() / 127.5 - 1, one_hot.float() * 2 - 1], dim=1)


def decode(joint, num_classes):
    """joint (B, C + K, H, W) -> image uint8 (B, C, H, W), mask uint8 (B, H, W): the highest class channel."""
    image, classes = joint[:, :-num_classes], joint[:, -num_classes:]
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), classes.argmax(1).to(torch.uint8)


# --- checkpoints ---

def save_stage(path, stage, net, ema, optimizer, step, config):
    """Write one stage's checkpoint: tensors and plain values only.

    config: the resolved settings of training; it names data, classes, channels, size, T and target, so that
    sampling needs nothing else. Raises OSError, and the checkpoints there are stay as they were.
    """
    checkpoint = {"stage": stage, "step": step, "config": config, "network": net.config,
                  "model": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
    write_atomically(path, lambda p: torch.save(checkpoint, p))


def checkpoints(folder):
    """{step: path} of the step_NNNNNN.pt in a stage's folder, oldest first."""
    found = {int(path.stem.removeprefix("step_")): path for path in Path(folder).glob("step_[0-9]*.pt")}
    return dict(sorted(found.items()))


def load_stage(folder, stage, step=None):
    """A checkpoint of run/<stage> as a dict on the CPU, the newest by default.

    Raises FileNotFoundError or ValueError, saying what to do.
    """
    found = checkpoints(folder)
    if not found or step not in (None, *found):
        wanted = f"checkpoint at step {step}" if step else "checkpoint"
        raise FileNotFoundError(f"{folder}: no {wanted} of the {stage} stage; train it with: "
                                f"python train.py --stage {stage} --out {Path(folder).parent}")
    path = found[step or max(found)]
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        holds = checkpoint["stage"]
    except Exception as error:      # the reader raises many types; to the user they are one fact
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"{path}: damaged, or not written by this program ({reason}); remove it") from None
    if holds != stage:
        raise ValueError(f"{path}: holds the {holds} stage, not {stage}; are large/ and small/ swapped?")
    return checkpoint


# --- the generator ---

class DefectGen:
    """Two trained stages and the settings they share.

        generator = DefectGen.load("runs/demo")
        images, masks = generator.sample(seeds=[0, 1, 2, 3])

    Attributes: config (of training), classes, size, steps_trained and t_ranges ({stage: ...}; a stage was
    trained at low <= t < high). The weights are laid out for sampling: channels last, and in bfloat16 if they
    were trained so and the device is faster with it.
    """

    def __init__(self, large, small, device="cpu"):
        """large, small: checkpoints as load_stage returns them."""
        self.config, self.device = large["config"], device
        self.classes, self.size = tuple(self.config["classes"]), tuple(self.config["size"])
        self.alphas_cumprod = schedule(self.config["T"])
        self.steps_trained = {"large": large["step"], "small": small["step"]}
        self.t_ranges = {"large": large["config"]["t_range"], "small": small["config"]["t_range"]}
        self.large, self.small = self.network(large), self.network(small)

    def network(self, checkpoint):
        """The network of one stage with its EMA weights, ready to sample."""
        net = UNet(**checkpoint["network"]).to(self.device)
        net.load_state_dict(checkpoint["ema"], strict=True)
        dtype = torch.bfloat16 if self.config["bf16"] and has_bf16(self.device) else torch.float32
        return net.eval().to(dtype, memory_format=torch.channels_last)

    @classmethod
    def load(cls, run, device="cpu", step=None):
        """Read both stages of a run folder, of the newest checkpoints or those at `step`.

        Raises where one is missing or the two do not fit together.
        """
        if not Path(run).is_dir():
            raise FileNotFoundError(f"--run {run}: no such folder; train first: "
                                    f"python train.py --stage large --out {run}")
        large, small = (load_stage(Path(run) / stage, stage, step) for stage in STAGES)
        for key in ("images", "classes", "channels", "size", "T", "target"):
            ours, theirs = large["config"][key], small["config"][key]
            if ours != theirs:
                values = "" if key == "images" else f" ({ours} and {theirs})"
                raise ValueError(f"{run}: the stages differ in {key}{values}; train one of them again")
        return cls(large, small, torch.device(device))

    def denoiser(self, net):
        """f(x_t, t) -> x_0 of one network, whatever it was trained to predict."""
        return lambda x_t, t: to_x_start(net(x_t, t), x_t, t, self.alphas_cumprod, self.config["target"])

    def timesteps(self, num_steps, spacing, switch_t):
        """The timesteps to sample along. Raises ValueError where a stage would be asked at an unknown t."""
        steps = timesteps(len(self.alphas_cumprod), num_steps, spacing)
        for t in steps:
            stage = "large" if t >= switch_t else "small"
            low, high = self.t_ranges[stage]
            if not low <= t < high:
                least, most = self.t_ranges["large"][0], self.t_ranges["small"][1]
                raise ValueError(f"--switch-t {switch_t} asks the {stage} stage at t = {t}, but it knows "
                                 f"{low} <= t < {high}: use {least} to {most}, or train with --t-range full")
        return steps

    def sample(self, seeds, num_steps=20, sampler="dpm++", spacing="logsnr", switch_t=SWITCH_T, size=None,
               batch_size=16, on_step=None):
        """Draw one pair per seed. A pair is a function of its seed, not of the batch it is drawn in.

        Args:
            seeds: list of ints.  num_steps: network calls per picture.  switch_t: first timestep of `large`.
            size: (H, W), that of training by default.  on_step: callback (t, x_t, pred_x_start).
        Returns: images uint8 (N, C, H, W), masks uint8 (N, H, W), on the CPU.
        """
        steps = self.timesteps(num_steps, spacing, switch_t)
        denoise = switched(self.denoiser(self.large), self.denoiser(self.small), switch_t)
        shape = (self.config["channels"] + len(self.classes), *(size or self.size))
        images, masks = [], []
        for start in range(0, len(seeds), batch_size):
            noise = noise_for(seeds[start:start + batch_size], shape, self.device)
            joint = sample(denoise, noise(), steps, self.alphas_cumprod, sampler, noise, on_step=on_step)
            image, mask = decode(joint, len(self.classes))
            images.append(image.cpu())
            masks.append(mask.cpu())
        return torch.cat(images), torch.cat(masks)


# --- python defect_gen.py: one trajectory as a picture ---

def exact_denoiser(x_start, alphas_cumprod):
    """E[x_0 | x_t] when the data are exactly these N pictures: softmax of their Gaussian log-likelihoods.

    It is what a network of unlimited capacity learns from few images: it can only copy them.
    """
    def denoise(x_t, t):
        a = float(alphas_cumprod[t])
        squared = (x_t[:, None] - math.sqrt(a) * x_start[None]).square().flatten(2).sum(-1)         # (B, N)
        weights = F.softmax(-squared / (2 * (1 - a)), dim=1)
        return torch.einsum("bn,nchw->bchw", weights, x_start)
    return denoise


def main():
    parser = argparse.ArgumentParser(description="Draw one trajectory: x_t, and the pair predicted from it.")
    parser.add_argument("--run", help="a run with both stages (default: an exact denoiser of 35 drawn pills)")
    parser.add_argument("--seed", type=int, default=0, help="the picture's seed (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=12, help="network calls (default: %(default)s)")
    parser.add_argument("--switch-t", type=int, default=SWITCH_T, help="first t of large (default: 400)")
    parser.add_argument("--out", default="trajectory.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.run:
        generator = DefectGen.load(args.run, device)
        classes = generator.classes
        draw = partial(generator.sample, [args.seed], args.num_steps, switch_t=args.switch_t)
    else:
        data, alphas_cumprod = open_dataset("drawn:pill", (64, 64), "train"), schedule()
        classes = data.classes
        x_start = encode(*data.tensors(), len(classes)).to(device)
        exact = exact_denoiser(x_start, alphas_cumprod)
        steps = timesteps(len(alphas_cumprod), args.num_steps)
        x_T = noise_for([args.seed], x_start.shape[1:], device)()
        draw = partial(sample, switched(exact, exact, args.switch_t), x_T, steps, alphas_cumprod)

    titles, noisy, predicted, masks = [], [], [], []

    def watch(t, x_t, pred_x_start):
        image, mask = (part[0].cpu() for part in decode(pred_x_start, len(classes)))
        titles.append(f"{'large' if t >= args.switch_t else 'small'} t={t}")
        noisy.append(decode(x_t, len(classes))[0][0].cpu())
        predicted.append(image)
        masks.append(overlay(image, mask))

    draw(on_step=watch)
    write_image(args.out, sheet([("x_t", noisy), ("image", predicted), ("mask", masks)], titles, classes))
    by_large = sum(title.startswith("large") for title in titles)
    print(f"{len(titles)} steps, {by_large} of them by the large network; picture: {args.out}")


if __name__ == "__main__":
    run_main(main)
