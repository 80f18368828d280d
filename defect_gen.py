"""Defect-Gen (arXiv:2310.17316): a network with a large receptive field begins, a small one ends.

Few images make a diffusion model memorise them. A network with few down-samplings sees patches only: it
draws new local patches but loses the product's shape. So `large` owns the noisy steps t >= switch_t, where
the shape is decided, and `small` owns t < switch_t, where the details are. It is ONE trajectory over one list
of timesteps; nothing is renumbered at the switch (the released code takes the picture that `large` ends with
for x_t of `small`, which is another method).

The stages may work at two sizes: `large` plans the whole product in a small picture, `small` draws its detail
at full resolution. Then the plan is drawn to its end, enlarged, and noised again to where `small` begins.

Image and mask are denoised together, as the channels of one picture; see Joint.

    python defect_gen.py [--run runs/demo]      draws one trajectory (without a run: of an exact denoiser)
"""
import argparse
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets import (IGNORE, has_bf16, open_dataset, overlay, pick_device, run_main, sheet,
                      write_atomically, write_image)
from diffusion import noise_for, q_sample, sample, schedule, timesteps, to_x_start
from unet import UNet, receptive_field

STAGES = ("large", "small")
NUM_STEPS = 40      # of sampling: a defect of 1 % of the photos comes 97 % as often; after 20 steps 84 %
PAINT_STEPS, REPEATS = 20, 10      # of painting: timesteps, how often each is taken (diffusion.sample)
NOISE_SCALE = 1.02  # of small after a plan: its pictures have too little grain without, see docs/results.md
SWITCH_T = 400      # the released script's value; the paper's own u is reported ambiguously (50 in one place)
IMAGE_STD = 0.7     # of the standardised image channels: most of their values lie in [-1, 1], as masks do
# Of painting: how strong it is, and from which t on. With 0 defects come out half as strong as real ones, at
# t < 100 it draws rims: docs/results.md.
GUIDANCE, GUIDED_FROM = 0.5, 100
# (B, C + K, H, W) each. x_start: x_0; where: bool, true where x_0 is known; added: what the defects
# asked for change in x_start; None for plans, which are never guided
Known = namedtuple("Known", "x_start where added")
TILE = 512          # px; a small network that sees patches goes over larger pictures piece by piece


# --- the idea ---

def switched(large, small, switch_t):
    """The paper's hand-over: a denoiser that asks `large` at t >= switch_t and `small` below.

    switch_t = 0 is the large network alone, switch_t = T the small one alone.
    """
    def denoise(x_t, t):
        return large(x_t, t) if t >= switch_t else small(x_t, t)
    return denoise


def with_known(denoise, known):
    """A denoiser for a picture of which parts are known.

    It answers there with what they are, so a step leaves them at their noise level, and the network draws
    the rest to fit: RePaint (Lugmayr et al. 2022, eq. 8), said by x_0. Its resampling is sample()'s repeats.

    known: a Known, or None where nothing is.
    """
    if known is None:
        return denoise
    return lambda x_t, t: torch.where(known.where, known.x_start, denoise(x_t, t))


def guided(denoise, known, alphas_cumprod):
    """A denoiser for `small` that exaggerates the defect asked for, which comes out faint.

    The network is asked again, with the same noise but without the defect in the mask, and GUIDANCE times
    the difference of the two answers is added to the first: classifier-free guidance (Ho & Salimans 2022,
    eq. 6) with "no defect" in place of no condition. It needs no training. `large` is not guided: what it
    sees of a mask is large enough, and what it draws would be exaggerated a second time by `small`.

    known: a Known, or None.
    """
    if known is None or not known.added.any():
        return denoise

    def answer(x_t, t):
        x_start = denoise(x_t, t)
        if t < GUIDED_FROM:                     # a limited interval of noise (Kynkäänniemi et al. 2024)
            return x_start
        without = denoise(x_t - alphas_cumprod[t].item() ** 0.5 * known.added, t)
        return x_start + GUIDANCE * (x_start - without)
    return answer


class Joint:
    """Image and mask as the channels of one picture, and back.

        joint (B, C + K, H, W) float32: C image channels, whose mean over the training images is 0 and whose
        standard deviation is IMAGE_STD; then one channel per class (background too), +1 inside, -1 outside

    Photos of low contrast are a weak signal: left in [-1, 1] they drown in noise long before their masks do.
    Standardised, a timestep and so `switch_t` mean the same signal-to-noise ratio for every product.

    Attributes: limits, the (low, high) that x_0 can have, each (1, C + K, 1, 1); weights (C + K,) of the
    channels in the loss: image and mask count the same, however many channels they have.
    """

    def __init__(self, statistics, num_classes, device="cpu"):
        """statistics: as image_statistics returns them."""
        self.mean, std = (torch.tensor(statistics[name], device=device).view(1, -1, 1, 1)
                          for name in ("mean", "std"))
        self.scale, self.num_classes, C = IMAGE_STD / std, num_classes, std.shape[1]
        ones = torch.ones(1, num_classes, 1, 1, device=device)
        self.limits = tuple(torch.cat([(grey - self.mean) * self.scale, sign * ones], dim=1)
                            for grey, sign in ((0, -1), (255, 1)))
        self.weights = torch.tensor([0.5 / C] * C + [0.5 / num_classes] * num_classes, device=device)

    def encode(self, image, mask):
        """Image uint8 (B, C, H, W) and mask uint8 (B, H, W) -> joint."""
        classes = torch.arange(self.num_classes, device=mask.device).view(1, -1, 1, 1)
        one_hot = mask.where(mask != IGNORE, 0).unsqueeze(1) == classes                    # (B, K, H, W) bool
        return torch.cat([(image.float() - self.mean) * self.scale, one_hot.float() * 2 - 1], dim=1)

    def decode(self, joint):
        """joint -> image uint8 (B, C, H, W), mask uint8 (B, H, W): the class whose channel is highest."""
        image, classes = joint[:, :-self.num_classes], joint[:, -self.num_classes:]
        grey = (image / self.scale + self.mean).round().clamp(0, 255).to(torch.uint8)
        return grey, classes.argmax(1).to(torch.uint8)


def image_statistics(dataset):
    """{"mean", "std"}: a number per image channel, in grey levels, over copies of 64x64.

    The same for both stages, whatever their sizes. A constant channel gets the std 1.
    """
    copies = dataset.subset(range(len(dataset)))
    copies.size = (64, 64)
    images = copies.tensors()[0].double()       # sums of whole numbers: exact in any order, with any threads
    mean = images.mean((0, 2, 3))
    std = (images.square().mean((0, 2, 3)) - mean.square()).clamp(min=1).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist()}


def enlarge(joint, size):
    """A plan (B, C + K, h, w) at `size`, bicubic: what it lacks there is finer than the noise it gets."""
    return F.interpolate(joint, size=size, mode="bicubic", align_corners=False)


def shrink(known, size):
    """The known parts of a picture as those of its plan: means of its pixels, known where all of them are."""
    return Known(F.adaptive_avg_pool2d(known.x_start, size),
                 F.adaptive_max_pool2d((~known.where).float(), size) == 0, None)


def sight(net):
    """How far from itself a pixel of a net's answer can see, in px; inf where it sees everything."""
    return receptive_field(net) / 2 if net.config["norm"] == "local" else math.inf


def in_sight(net, first, stop):
    """The rows, or columns, that a net needs to draw first .. stop - 1: a slice, which may end outside."""
    step, margin = 2 ** net.depth, math.ceil(min(sight(net), 1 << 30))
    return slice(max(0, first - margin) // step * step, math.ceil((stop + margin) / step) * step)


def surroundings(free, net):
    """[rows, columns] that hold all that a net sees which draws where `free`, bool (H, W), is true."""
    return [in_sight(net, at.min().item(), at.max().item() + 1) for at in free.nonzero().T]


def in_tiles(net, x_t, t):
    """net(x_t, t), in pieces of TILE px where the net sees less than that: the same answer in flat memory."""
    height, width = x_t.shape[2:]
    if sight(net) > TILE / 2 or max(height, width) <= TILE:
        return net(x_t, t)
    answer = torch.empty_like(x_t)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            rows, columns = in_sight(net, top, top + TILE), in_sight(net, left, left + TILE)
            y, x = top - rows.start, left - columns.start
            piece = net(x_t[..., rows, columns], t)[..., y:y + TILE, x:x + TILE]
            answer[..., top:top + TILE, left:left + TILE] = piece
    return answer


# --- checkpoints ---

def save_stage(path, net, ema, optimizer, step, config):
    """Write one stage's checkpoint: tensors and plain values only.

    config: the settings of training, complete; it names stage, data, classes, channels, statistics, size, T
    and target, so that sampling needs nothing else. Raises OSError; older checkpoints stay as they were.
    """
    checkpoint = {"stage": config["stage"], "step": step, "config": config, "network": net.config,
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
        wanted = "checkpoint" if step is None else f"checkpoint at step {step}"
        raise FileNotFoundError(f"{folder}: no {wanted} of the {stage} stage; train it with: "
                                f"python train.py --stage {stage} --out {Path(folder).parent}")
    path = found[max(found) if step is None else step]
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        holds = checkpoint["stage"]
    except Exception as error:      # the reader raises many types; to the user they are one fact
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"{path}: damaged, or not written by this program ({reason}); remove it") from None
    if not {"statistics", "white"} <= checkpoint["config"].keys():
        raise ValueError(f"{path}: of an older version, which read images otherwise; train again")
    if holds != stage:
        raise ValueError(f"{path}: holds the {holds} stage, not {stage}; are large/ and small/ swapped?")
    return checkpoint


def check_fit(run, large, small):
    """Raise ValueError, naming the setting, where the configs of two stages make no generator."""
    for key in ("images", "classes", "channels", "augment", "statistics", "T", "target"):
        if large[key] != small[key]:
            values = "" if key in ("images", "statistics") else f" ({large[key]} and {small[key]})"
            raise ValueError(f"{run}: the stages differ in {key}{values}; train one of them again")
    if large["size"] != small["size"] and large["t_range"][0] > 0:
        raise ValueError(f"{run}: a large stage of another size than the small one draws to the end, but "
                         f"knows only {large['t_range'][0]} <= t: train it with --t-range full")


# --- the generator ---

class DefectGen:
    """Two trained stages and the settings they share.

        generator = DefectGen.load("runs/demo")
        images, masks = generator.sample(seeds=[0, 1, 2, 3])

    Attributes: config (of the small stage), classes, size (of pairs), plan_size (of the large stage),
    steps_trained and t_ranges ({stage: ...}; a stage was trained at low <= t < high). The weights are laid
    out for sampling: channels last, and in bfloat16 if they were trained so and the device is faster with it.
    """

    def __init__(self, large, small, device="cpu"):
        """large, small: checkpoints as load_stage returns them."""
        self.config, self.device = small["config"], torch.device(device)
        self.classes, self.size = tuple(self.config["classes"]), tuple(self.config["size"])
        self.plan_size = tuple(large["config"]["size"])
        self.joint = Joint(self.config["statistics"], len(self.classes), device)
        self.alphas_cumprod = schedule(self.config["T"])
        self.steps_trained = {"large": large["step"], "small": small["step"]}
        self.t_ranges = {"large": large["config"]["t_range"], "small": small["config"]["t_range"]}
        self.large, self.small = self.network(large), self.network(small)

    def network(self, checkpoint):
        """The network of one stage with its EMA weights, ready to sample."""
        net = UNet(**checkpoint["network"]).to(self.device)
        net.load_state_dict(checkpoint["ema"], strict=True)
        bf16 = checkpoint["config"]["bf16"] and has_bf16(self.device)
        dtype = torch.bfloat16 if bf16 else torch.float32
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
        check_fit(run, large["config"], small["config"])
        return cls(large, small, torch.device(device))

    def denoiser(self, net):
        """f(x_t, t) -> x_0 of one network, whatever it was trained to predict."""
        return lambda x_t, t: to_x_start(in_tiles(net, x_t, t), x_t, t, self.alphas_cumprod,
                                         self.config["target"])

    def timesteps(self, num_steps, spacing, switch_t):
        """The timesteps to sample along. Raises ValueError where a stage would be asked at an unknown t."""
        steps = timesteps(len(self.alphas_cumprod), num_steps, spacing)
        least, most = self.t_ranges["large"][0], self.t_ranges["small"][1]
        for t in steps:
            stage = "large" if t >= switch_t else "small"
            low, high = self.t_ranges[stage]
            if not low <= t < high:
                raise ValueError(f"--switch-t {switch_t} asks the {stage} stage at t = {t}, but it knows "
                                 f"{low} <= t < {high}: use {least} to {most}, or train with --t-range full")
        return steps

    def paint(self, images, masks, regions, seeds, num_steps=PAINT_STEPS):
        """Draw into photos: masks and what is outside a region are known, the image in it is drawn to fit.

        A region of the whole picture makes an image for a mask. One photo at a time: the small network goes
        over the region and what its pixels see alone.

        Args:
            images:  uint8 (N, C, H, W), of the run's size.
            masks:   uint8 (N, H, W), how they shall be; outside the regions they are those of the images.
            regions: bool (N, H, W).
        Returns: uint8 (N, C, H, W), unchanged outside the regions.
        """
        steps, painted = self.timesteps(num_steps, "logsnr", SWITCH_T), []
        for image, mask, region, seed in zip(images, masks, regions, seeds):
            x_start, before = (self.joint.encode(image[None].to(self.device), part[None].to(self.device))
                               for part in (mask, mask.where(~region, 0)))
            where = torch.ones_like(x_start, dtype=torch.bool)
            where[:, :len(image)] = ~region.to(self.device)
            known = Known(x_start, where, x_start - before)
            drawn = self.joint.decode(self.draw([seed], steps, "ddpm", SWITCH_T, self.size, known, REPEATS))
            painted.append(torch.where(region, drawn[0][0].cpu(), image))
        return torch.stack(painted)

    def sample(self, seeds, num_steps=NUM_STEPS, sampler="dpm++", spacing="logsnr", switch_t=SWITCH_T,
               size=None, batch_size=16, on_step=None):
        """Draw one pair per seed. A pair is a function of its seed, not of the batch it is drawn in.

        Args:
            seeds: list of ints.  num_steps: timesteps from noise to picture.
            switch_t: `small` is asked below it, `large` above, or where it draws a plan, to the end.
            size: (H, W), that of training by default; the plan grows by the same factor.
            on_step: callback (t, x_t, pred_x_start).
        Returns: images uint8 (N, C, H, W), masks uint8 (N, H, W), on the CPU.
        """
        size = tuple(size or self.size)
        steps = self.timesteps(num_steps, spacing, switch_t)
        batches = [seeds[start:start + batch_size] for start in range(0, len(seeds), batch_size)]
        drawn = [self.joint.decode(self.draw(batch, steps, sampler, switch_t, size, on_step=on_step))
                 for batch in batches]
        images, masks = (torch.cat(part).cpu() for part in zip(*drawn))
        return images, masks

    def draw(self, seeds, steps, sampler, switch_t, size, known=None, repeats=1, on_step=None):
        """One batch of joints (B, C + K, *size): see sample(). known: see with_known()."""
        large = self.denoiser(self.large)
        along = partial(sample, alphas_cumprod=self.alphas_cumprod, method=sampler, limits=self.joint.limits,
                        repeats=repeats, on_step=on_step)
        channels = self.config["channels"] + len(self.classes)
        if self.plan_size == self.size:                             # the paper: one trajectory
            denoise = switched(large, guided(self.denoiser(self.small), known, self.alphas_cumprod), switch_t)
            noise = noise_for(seeds, (channels, *size), self.device)
            return along(with_known(denoise, known), noise(), steps, noise=noise)

        multiple = 2 ** self.large.depth
        plan_size = [math.ceil(n * plan / own / multiple) * multiple
                     for n, plan, own in zip(size, self.plan_size, self.size)]
        noise = noise_for(seeds, (channels, *plan_size), self.device)
        denoise = with_known(large, known and shrink(known, plan_size))
        plan = enlarge(along(denoise, noise(), steps, noise=noise), size)
        noise = noise_for([~seed for seed in seeds], plan.shape[1:], self.device)           # not the plan's
        return self.detail(plan, [t for t in steps if t < switch_t], noise, known, along)

    def detail(self, joint, steps, noise, known, along):
        """An enlarged plan with its detail: noised again to where `small` begins, and ended by it.

        Where parts are known, `small` goes over the box of the others, and what it sees around them, alone.
        """
        box = [slice(None), slice(None)]
        if known is not None:
            joint = torch.where(known.where, known.x_start, joint)
            box = surroundings(~known.where[0].all(0), self.small)
            known = Known(*(part[..., *box] for part in known))
        if steps:
            x = q_sample(joint, steps[0], noise(), self.alphas_cumprod)[..., *box]
            denoise = guided(self.denoiser(self.small), known, self.alphas_cumprod)
            joint[..., *box] = along(with_known(denoise, known), x, steps, noise=lambda: noise()[..., *box],
                                     noise_scale=NOISE_SCALE)
        return joint


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
    add = parser.add_argument
    add("--run", help="a run with both stages (default: an exact denoiser, which copies 30 drawn pills)")
    add("--seed", type=int, default=0, help="the picture's seed (default: %(default)s)")
    add("--num-steps", type=int, default=12, help="timesteps from noise to picture (default: "
        "%(default)s)")
    add("--switch-t", type=int, default=SWITCH_T, help="small draws at t < this (default: %(default)s)")
    add("--out", default="runs/trajectory.png", help="the picture to write (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.run:
        generator = DefectGen.load(args.run, device)
        joint, classes, size = generator.joint, generator.classes, generator.size
        draw = partial(generator.sample, [args.seed], args.num_steps, switch_t=args.switch_t)
    else:
        size, alphas_cumprod = (64, 64), schedule()
        data = open_dataset("drawn:pill", size, "train")
        classes = data.classes
        joint = Joint(image_statistics(data), len(classes), device)
        x_start = joint.encode(*(part.to(device) for part in data.tensors()))
        exact = exact_denoiser(x_start, alphas_cumprod)
        steps = timesteps(len(alphas_cumprod), args.num_steps)
        x_T = noise_for([args.seed], x_start.shape[1:], device)()
        draw = partial(sample, exact, x_T, steps, alphas_cumprod, limits=joint.limits)

    seen = []                                                       # (t, x_t, pred_x_start) of each step
    draw(on_step=lambda *step: seen.append(step))
    by_large = [x_t.shape[2:] != size or t >= args.switch_t for t, x_t, _ in seen]  # a plan has its own size
    names = [("large " if large else "small ") if args.run else "" for large in by_large]   # else no network
    titles = [f"{name}t={t}" for name, (t, _, _) in zip(names, seen)]
    noisy, predicted = (torch.cat([F.interpolate(step[k], size) for step in seen]) for k in (1, 2))
    images, masks = (part.cpu() for part in joint.decode(predicted))
    overlays = list(map(overlay, images, masks))
    rows = [("x_t", joint.decode(noisy)[0].cpu()), ("image", images), ("mask", overlays)]
    write_image(args.out, sheet(rows, titles, classes))
    where = "by the large network" if args.run else "above the switch"
    print(f"{len(seen)} steps, {sum(by_large)} of them {where}; picture: {args.out}")


if __name__ == "__main__":
    run_main(main)
