"""Gaussian diffusion in the notation of DDPM (Ho et al. 2020); networks predict x_0 or v.

There are T timesteps; t runs 0 .. T-1 and t = 0 is the LEAST noisy step, not the clean image. A denoiser is
any f(x_t, t) -> x_0 with t a Python int, so a switch between two networks is an `if`. The schedule is a
float64 table that stays on the CPU; every scalar is computed from it in float64. The caller owns the
randomness: noise is passed in, made by noise_for.

    python diffusion.py                   # the timesteps of sampling, and where switch_t falls in them
    python diffusion.py --num-steps 50 --switch-t 600 --spacing even
"""
import argparse
import numpy as np
import torch

TARGETS = "x0", "v"
WEIGHTINGS = "uniform", "min-snr"
SPACINGS = "logsnr", "even"
METHODS = "dpm++", "ddim", "ddpm"


def check_choice(what, value, choices):
    """Raise ValueError listing what exists."""
    if value not in choices:
        raise ValueError(f"{what} is {value!r}, but there are only {', '.join(choices)}")


# --- forward process ---

def schedule(T=1000):
    """alphas_cumprod[t] = product over s <= t of (1 - betas[s]), the share of signal power left at t.

    The cosine schedule (Nichol & Dhariwal 2021, eq. 17; as released): alphas_cumprod follows
    cos^2((t/T + 0.008) / 1.008 * pi/2), but no beta is above 0.999.

    Returns: (T,) float64 on the CPU, decreasing from ~1 to ~0; with T = 1000 the last value is 2.4e-9.
    """
    if T < 1:
        raise ValueError(f"T is {T}, but diffusion needs at least 1 step")
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = 1 - f[1:] / f[:-1]
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def logsnr(alphas_cumprod):
    """log(signal power / noise power), the natural logarithm; twice the lambda of DPM-Solver."""
    return torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)


def at(table, t, like):
    """table[t] to multiply with `like`: (B, 1, 1, 1), or (1, 1, 1, 1) if t is an int. Waits for no device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return table.to(dtype).to(like.device, non_blocking=True)[t].view(-1, 1, 1, 1)


def q_sample(x_start, t, noise, alphas_cumprod):
    """Diffuse clean data to step t in one go: x_t ~ q(x_t | x_0).

        x_t = sqrt(alphas_cumprod[t]) * x_0 + sqrt(1 - alphas_cumprod[t]) * noise        DDPM eq. 4

    Args:
        x_start: (B, C, H, W) float.
        t:       (B,) int64 in [0, T-1], or one int for all.
        noise:   (B, C, H, W) float ~ N(0, I). Required: the caller owns the randomness.
        alphas_cumprod: (T,) float64, decreasing from ~1 to ~0.
    Returns: (B, C, H, W), dtype and device of x_start.
    """
    assert noise.shape == x_start.shape
    signal, sigma = at(alphas_cumprod.sqrt(), t, x_start), at((1 - alphas_cumprod).sqrt(), t, x_start)
    return (signal * x_start + sigma * noise).to(x_start.dtype)


# --- what the network predicts ---

def target_of(x_start, noise, t, alphas_cumprod, target):
    """What a network with this target should answer at x_t = q_sample(x_start, t, noise).

        x0: x_0            v: sqrt(alphas_cumprod[t]) * noise - sqrt(1 - alphas_cumprod[t]) * x_0

    v is Salimans & Ho 2022, appendix D. Arguments as in q_sample. Returns: (B, C, H, W).
    """
    check_choice("target", target, TARGETS)
    if target == "x0":
        return x_start
    return at(alphas_cumprod.sqrt(), t, noise) * noise - at((1 - alphas_cumprod).sqrt(), t, x_start) * x_start


def to_x_start(output, x_t, t, alphas_cumprod, target):
    """The x_0 that a network's output means: the inverse of target_of.

        x0: output         v: sqrt(alphas_cumprod[t]) * x_t - sqrt(1 - alphas_cumprod[t]) * output

    Neither divides by sqrt(alphas_cumprod[t]), which is 5e-5 at t = T-1. Arguments as in q_sample. Returns:
    (B, C, H, W), at least float32.
    """
    check_choice("target", target, TARGETS)
    if target == "x0":
        return output
    return at(alphas_cumprod.sqrt(), t, x_t) * x_t - at((1 - alphas_cumprod).sqrt(), t, x_t) * output


def time_weights(alphas_cumprod, target, weighting):
    """(T,) float64: what an error at t counts in training.

        uniform: 1, as in DDPM      min-snr: min(SNR, 5) for x0, that / (SNR + 1) for v

    min-snr is Hang et al. 2023, eq. 7: for either target min(SNR, 5) times the squared error of x_0. It keeps
    the last traces of noise, where the SNR is 1000, from taking all of what the network can learn.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    snr = logsnr(alphas_cumprod).exp()
    if weighting == "uniform":
        return torch.ones_like(snr)
    return snr.clamp(max=5) / (1 if target == "x0" else snr + 1)


def training_loss(net, x_start, t, noise, alphas_cumprod, target, weights):
    """Squared error of each image, the mean over pixels and a weighted sum over channels.

    Args:
        net:     f(x_t, t) -> (B, C, H, W), its answer read as `target`.
        t:       (B,) int64 on x_start's device.
        weights: (C,) of the channels, with the sum 1.
    Returns: (B,) float32, also under autocast.
    """
    output = net(q_sample(x_start, t, noise, alphas_cumprod), t)
    wanted = target_of(x_start, noise, t, alphas_cumprod, target)
    return ((output.float() - wanted.float()).square().mean(dim=(2, 3)) * weights).sum(1)


# --- sampling ---

def timesteps(T, num_steps, spacing="logsnr"):
    """Choose num_steps of the T steps, T-1 and 0 among them, uniformly on the clock that `spacing` names.

    The clock of log-SNR leaps near T-1 (by 30 dB between the last two steps) and would ask for the same
    integers again and again. So no interval gets more than one step, and the others share what is left.

    Args:
        num_steps: 1 .. T. One step visits T-1 alone.
        spacing:   logsnr: log signal-to-noise ratio of schedule(T); even: t.
    Returns: list of num_steps ints, strictly decreasing from T-1 to 0.
    """
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps is {num_steps}, but there are {T} steps to choose from: pass 1 to {T}")
    if num_steps == 1:
        return [T - 1]
    ticks = -np.diff(logsnr(schedule(T)).numpy()) if spacing == "logsnr" else np.ones(T - 1)    # (T-1,) > 0
    low, high = 0.0, 1 / ticks.min()                            # steps per tick, by bisection
    for _ in range(60):
        rate = (low + high) / 2
        too_few = np.minimum(1, rate * ticks).sum() < num_steps - 1
        low, high = (rate, high) if too_few else (low, rate)
    steps_until = np.concatenate([[0], np.cumsum(np.minimum(1, high * ticks))])     # (T,): 0 .. num_steps - 1
    nearest = np.rint(np.interp(np.arange(num_steps), steps_until, np.arange(T))).astype(int).tolist()
    steps = []
    for i, t in enumerate(nearest):
        # Two may round to one integer: then the later one moves on, leaving room for those still to come.
        steps.append(min(max(t, steps[-1] + 1 if steps else 0), T - num_steps + i))
    return steps[::-1]


def ddim_step(x_t, pred_x_start, t, t_prev, alphas_cumprod, eta=0.0, noise=None):
    """One step from t to t_prev < t, given x_0 (DDIM, Song et al. 2021, eq. 12 and 16).

        a, a_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
        eps    = (x_t - sqrt(a) * x_0) / sqrt(1 - a)
        sigma  = eta * sqrt((1 - a_prev) / (1 - a)) * sqrt(1 - a / a_prev)
        x_prev = sqrt(a_prev) * x_0 + sqrt(1 - a_prev - sigma^2) * eps + sigma * noise

    eta = 0 is deterministic; eta = 1 is the DDPM posterior q(x_prev | x_t, x_0) for any t_prev < t (DDPM eq.
    7: t_prev = t-1). Nothing is divided by sqrt(a), so t = T-1 is safe.

    Args:
        x_t, pred_x_start, noise: (B, C, H, W); noise is needed if eta > 0 and t_prev >= 0.
        t, t_prev: ints; t_prev = -1 means the clean image, for which the answer is pred_x_start.
    """
    a = alphas_cumprod[t].item()
    a_prev = alphas_cumprod[t_prev].item() if t_prev >= 0 else 1.0
    variance = eta ** 2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    of_x_t = (max(0.0, 1 - a_prev - variance) / (1 - a)) ** 0.5     # rounding may go a hair below 0
    x_prev = of_x_t * x_t + (a_prev ** 0.5 - of_x_t * a ** 0.5) * pred_x_start
    return x_prev + variance ** 0.5 * noise if variance > 0 else x_prev


@torch.inference_mode()
def sample(denoise, x_T, timesteps, alphas_cumprod, method="dpm++", noise=None, limits=None, on_step=None,
           repeats=1, noise_scale=1.0):
    """Denoise x_T along one list of timesteps.

    ddim:  ddim_step with eta = 0.
    ddpm:  ddim_step with eta = 1, ancestral sampling over any subset of steps; no noise in the last step.
    dpm++: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). Its update is ddim_step with x_0 extrapolated from
           the last two predictions, linearly in lambda, half the log-SNR; plain ddim_step in the first step
           and the last.

    Args:
        denoise:   f(x_t, t) -> x_0, (B, C, H, W); t is a Python int.
        x_T:       (B, C, H, W) float, x_t at timesteps[0]: N(0, I) at T - 1.
        timesteps: ints, strictly decreasing, usually timesteps(T, num_steps); after the last one comes the
                   clean image.
        noise:     for ddpm and repeats: callable that returns the next (B, C, H, W) draw, see noise_for.
        limits:    (low, high), tensors or numbers that each predicted x_0 is clamped to.
        on_step:   called as on_step(t, x_t, pred_x_start) after each call of denoise.
        repeats:   each step is taken so often, and noised back between: where denoise knows parts of the
                   picture, the others then agree with them (RePaint, Lugmayr et al. 2022, section 4.2). Take
                   ddpm: dpm++ extrapolates from a prediction of before that noise, and overshoots.
        noise_scale: the noise left after each step is multiplied by it. A little above 1 makes up for a
                   network that takes away too much and so loses grain (S_noise of Karras et al. 2022).
    Returns: (B, C, H, W) x_0, dtype and device of x_T.
    """
    check_choice("sampler", method, METHODS)
    lambdas = (logsnr(alphas_cumprod) / 2).tolist()
    x, last = x_T, None                                         # last: (t, predicted x_0) of the step before
    for t, t_prev in zip(timesteps, timesteps[1:] + [-1]):
        for repeat in range(repeats if t_prev >= 0 else 1):
            if repeat:                                              # back from t_prev to t
                kept = alphas_cumprod[t].item() / alphas_cumprod[t_prev].item()
                x = kept ** 0.5 * x + (1 - kept) ** 0.5 * noise()
            pred_x_start = denoise(x, t).to(x.dtype)
            if limits is not None:
                pred_x_start = pred_x_start.clamp(*limits)
            if on_step is not None:
                on_step(t, x, pred_x_start)
            direction = pred_x_start
            if method == "dpm++" and last is not None and t_prev >= 0:
                r = (lambdas[t] - lambdas[last[0]]) / (lambdas[t_prev] - lambdas[t])
                direction = pred_x_start + (pred_x_start - last[1]) / (2 * r)
            eta = 1.0 if method == "ddpm" else 0.0
            x = ddim_step(x, direction, t, t_prev, alphas_cumprod, eta, noise() if eta else None)
        last = t, pred_x_start
        if noise_scale != 1 and t_prev >= 0:
            clean = alphas_cumprod[t_prev].item() ** 0.5 * direction
            x = clean + noise_scale * (x - clean)
    return x


# --- randomness ---

def rng(seed, *salt):
    """A CPU generator that depends on its integer arguments alone: rng(seed, step) needs no state to resume.

    torch seeds its CPU generator with 32 bits and drops the rest, so with a hash two of 100,000 image seeds
    would likely meet. Each round here is a bijection of 32 bits (MurmurHash3's finaliser): with equal salt,
    different seeds below 2^32 never do.
    """
    state = 0
    for value in (*salt, seed):
        state = (state + int(value) + 0x9E3779B9) & 0xFFFFFFFF
        state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        state = state ^ state >> 16
    return torch.Generator().manual_seed(state)


def noise_for(seeds, shape, device="cpu"):
    """A callable that draws the next (B, *shape) float32 ~ N(0, I), one independent stream per image seed.

    Drawn on the CPU and moved: image 17 gets the same numbers alone, in a batch of 64 and on any device.
    """
    generators = [rng(seed) for seed in seeds]

    def draw():
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    return draw


# --- python diffusion.py ---

def main():
    parser = argparse.ArgumentParser(description="Where the timesteps of sampling fall in signal-to-noise.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--T", type=int, default=1000, help="number of timesteps of the schedule")
    parser.add_argument("--num-steps", type=int, default=40, help="timesteps that sampling visits")
    parser.add_argument("--spacing", choices=SPACINGS, default="logsnr", help="how they are spread")
    parser.add_argument("--switch-t", type=int, default=400, help="the large network owns t >= switch_t")
    args = parser.parse_args()
    try:
        alphas_cumprod = schedule(args.T)
        steps = timesteps(args.T, args.num_steps, args.spacing)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'t':>5} {'alphas_cumprod':>15} {'snr dB':>8}  network")
    for t in steps:
        snr_db = 10 * np.log10(np.e) * logsnr(alphas_cumprod)[t].item()
        network = "large" if t >= args.switch_t else "small"
        print(f"{t:5} {alphas_cumprod[t].item():15.6g} {snr_db:8.1f}  {network}")
    calls = sum(t >= args.switch_t for t in steps)
    print(f"calls, where both stages have one size: large {calls}, small {len(steps) - calls}")


if __name__ == "__main__":
    main()
