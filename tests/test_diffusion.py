"""diffusion.py: closed forms, samplers against known answers, and randomness as a function of integers."""
import math

import pytest
import torch

import diffusion
from defect_gen import NUM_STEPS
from diffusion import (METHODS, SPACINGS, TARGETS, ddim_step, logsnr, noise_for, q_sample, rng, sample,
                       schedule, timesteps)

COSINE = schedule(1000)


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=rng(seed), dtype=dtype) * 2 - 1


def gaussian_denoiser(std):
    """The ideal denoiser of data ~ N(0, std^2): x_0 = E[x_0 | x_t]."""
    def denoise(x, t):
        a = COSINE[t].item()
        return a ** 0.5 * std ** 2 / (a * std ** 2 + 1 - a) * x
    return denoise


def wavy(x, t):
    """A denoiser whose answer depends on all it is given."""
    return torch.tanh(0.8 * x + t / 1000)


# --- schedule ---

def test_the_schedule_has_the_released_values():
    assert COSINE.dtype == torch.float64 and COSINE.shape == (1000,)
    for t in range(999):                            # as long as no beta is clipped, the product telescopes
        angles = [(s / 1000 + 0.008) / 1.008 * math.pi / 2 for s in (t + 1, 0)]
        expected = (math.cos(angles[0]) / math.cos(angles[1])) ** 2
        assert COSINE[t].item() == pytest.approx(expected, rel=1e-9)
    golden = {0: 0.9999587, 100: 0.9715757, 400: 0.6459882, 998: 2.428767e-6, 999: 2.428767e-9}
    for t, value in golden.items():
        assert COSINE[t].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("T", [1, 2, 10, 250, 1000, 4000])
def test_schedules_fall_strictly_between_one_and_zero(T):
    alphas_cumprod = schedule(T)
    assert len(alphas_cumprod) == T and 0 < alphas_cumprod[-1] and alphas_cumprod[0] < 1
    assert (alphas_cumprod.diff() < 0).all() and logsnr(alphas_cumprod).isfinite().all()
    torch.testing.assert_close(logsnr(alphas_cumprod), torch.logit(alphas_cumprod))


# --- forward process and targets ---

def test_q_sample_is_its_closed_form_for_each_image_and_keeps_the_dtype():
    x, noise, t = images(3, 2, 4, 5), images(3, 2, 4, 5, seed=1), torch.tensor([0, 500, 999])
    for dtype in torch.bfloat16, torch.float32:
        assert q_sample(x.to(dtype), t, noise.to(dtype), COSINE).dtype == dtype
    x_t = q_sample(x, t, noise, COSINE)
    for i in range(3):
        a = COSINE[t[i]].item()
        torch.testing.assert_close(x_t[i], a ** 0.5 * x[i] + (1 - a) ** 0.5 * noise[i])
        torch.testing.assert_close(q_sample(x[i:i + 1], int(t[i]), noise[i:i + 1], COSINE)[0], x_t[i])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_targets_are_their_closed_forms_and_inverted(target, dtype, tolerance):
    x, noise = images(4, 1, 8, 8, dtype=dtype), images(4, 1, 8, 8, seed=1, dtype=dtype)
    t = torch.tensor([0, 400, 900, 999])
    signal, sigma = COSINE[t].sqrt().view(-1, 1, 1, 1), (1 - COSINE[t]).sqrt().view(-1, 1, 1, 1)
    expected = {"x0": x, "v": (signal * noise - sigma * x).to(dtype)}[target]
    wanted = diffusion.target_of(x, noise, t, COSINE, target)
    torch.testing.assert_close(wanted, expected)
    back = diffusion.to_x_start(wanted, q_sample(x, t, noise, COSINE), t, COSINE, target)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("target", TARGETS)
def test_training_loss_is_a_float32_mean_over_pixels_and_a_weighted_sum_over_channels(target):
    x, noise = images(3, 2, 4, 4, dtype=torch.float32), images(3, 2, 4, 4, seed=1, dtype=torch.float32)
    t, off = torch.tensor([1, 500, 999]), torch.tensor([[0.0, 0.0], [0.5, 1.0], [2.0, 0.0]]).view(3, 2, 1, 1)

    def net(x_t, given_t):
        assert torch.equal(x_t, q_sample(x, t, noise, COSINE)) and torch.equal(given_t, t)
        return (diffusion.target_of(x, noise, t, COSINE, target) + off).bfloat16()

    loss = diffusion.training_loss(net, x, t, noise, COSINE, target, torch.tensor([0.75, 0.25]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.4375, 3.0]), rtol=2e-2, atol=1e-4)


def test_min_snr_counts_the_same_error_of_x_0_whatever_the_target():
    snr = COSINE / (1 - COSINE)
    x, off, noise = images(1000, 1, 2, 2), 0.1 * images(1000, 1, 2, 2, seed=1), images(1000, 1, 2, 2, seed=2)
    t = torch.arange(1000)
    for target in TARGETS:
        wanted = diffusion.target_of(x, noise, t, COSINE, target)
        x_t = q_sample(x, t, noise, COSINE)
        signal, sigma = (part.view(-1, 1, 1, 1) for part in (COSINE.sqrt(), (1 - COSINE).sqrt()))
        answer = x + off if target == "x0" else (signal * x_t - x - off) / sigma
        losses = (answer - wanted).square().mean((1, 2, 3))
        losses = losses * diffusion.time_weights(COSINE, target, "min-snr")
        torch.testing.assert_close(losses, snr.clamp(max=5) * off.square().mean((1, 2, 3)))
        assert (diffusion.time_weights(COSINE, target, "uniform") == 1).all()


# --- timesteps ---

@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T, counts", [*((T, range(2, T + 1)) for T in (1, 2, 3, 10, 37)),
                                       (1000, (2, 7, 20, 50, 250, 999, 1000))])
def test_timesteps_are_distinct_and_visit_both_ends_for_every_number_of_steps(T, counts, spacing):
    assert timesteps(T, 1, spacing) == [T - 1]
    for num_steps in counts:
        steps = timesteps(T, num_steps, spacing)
        assert len(steps) == num_steps and steps[0] == T - 1 and steps[-1] == 0
        assert all(type(t) is int for t in steps) and all(a > b for a, b in zip(steps, steps[1:]))


def test_each_spacing_is_uniform_on_its_clock():
    assert timesteps(1001, 11, "even") == list(range(1000, -1, -100))
    gaps = logsnr(COSINE)[timesteps(1000, 20)[4:-2]].diff()     # the leap at T-1 gets one step
    assert gaps.std() < 0.15 * gaps.mean()
    assert timesteps(1000, 20) == [999, 998, 997, 995, 992, 985, 974, 951, 909, 831, 698, 509, 315, 174, 90,
                                   44, 20, 8, 2, 0]             # every published picture hangs on it


# --- samplers ---

@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_step_goes_where_q_sample_goes(eta):
    x, noise, fresh = (images(2, 1, 4, 4, seed=seed) for seed in range(3))
    for t, t_prev in (999, 998), (999, 0), (500, 20), (1, 0):
        x_t, a, a_prev = q_sample(x, t, noise, COSINE), COSINE[t], COSINE[t_prev]
        variance = eta ** 2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        of_noise = (1 - a_prev - variance).clamp(min=0).sqrt()
        mixed = (of_noise * noise + variance.sqrt() * fresh) / (1 - a_prev).sqrt()
        torch.testing.assert_close(ddim_step(x_t, x, t, t_prev, COSINE, eta, fresh),
                                   q_sample(x, t_prev, mixed, COSINE))
        assert torch.equal(ddim_step(x_t, x, t, -1, COSINE, eta), x)        # the clean image, without noise


def test_eta_one_is_the_posterior_of_ddpm():
    x, x_t, zero = images(1, 1, 4, 4), images(1, 1, 4, 4, seed=1), torch.zeros(1, 1, 4, 4).double()
    for t in 1, 500, 999:
        a, a_prev = COSINE[t], COSINE[t - 1]
        beta = 1 - a / a_prev                                                           # DDPM eq. 7
        mean = a_prev.sqrt() * beta / (1 - a) * x + (1 - beta).sqrt() * (1 - a_prev) / (1 - a) * x_t
        variance = (1 - a_prev) / (1 - a) * beta
        torch.testing.assert_close(ddim_step(x_t, x, t, t - 1, COSINE, 1.0, zero), mean)
        moved = ddim_step(x_t, x, t, t - 1, COSINE, 1.0, zero + 1) - mean
        torch.testing.assert_close(moved, zero + variance.sqrt())


@pytest.mark.parametrize("method, eta", [("ddim", 0.0), ("ddpm", 1.0)])
def test_ddim_and_ddpm_are_ddim_steps_over_any_subset_of_timesteps(method, eta):
    x = x_T = images(2, 1, 4, 4)
    steps, noise = [999, 700, 40, 3, 0], noise_for([1, 2], (1, 4, 4))
    for t, t_prev in zip(steps, steps[1:] + [-1]):
        fresh = noise() if eta and t_prev >= 0 else None
        x = ddim_step(x, wavy(x, t).clamp(-1, 1), t, t_prev, COSINE, eta, fresh)
    again = noise_for([1, 2], (1, 4, 4))
    torch.testing.assert_close(sample(wavy, x_T, steps, COSINE, method, noise=again), x)


def test_dpm_is_algorithm_2_of_its_paper():
    """DPM-Solver++(2M) written from the paper: alpha, sigma, lambda = log(alpha / sigma), h, r and D."""
    steps = timesteps(1000, 12)
    alpha, sigma = COSINE.sqrt(), (1 - COSINE).sqrt()
    lam = (alpha / sigma).log()
    x = x_T = images(2, 1, 4, 4)
    before, h_before = None, None
    for s, t in zip(steps, steps[1:]):
        x_0, h = wavy(x, s), lam[t] - lam[s]
        D = x_0 if before is None else (1 + h / h_before / 2) * x_0 - h / h_before / 2 * before
        x = sigma[t] / sigma[s] * x - alpha[t] * torch.expm1(-h) * D
        before, h_before = x_0, h
    torch.testing.assert_close(sample(wavy, x_T, steps, COSINE), wavy(x, steps[-1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_an_oracle_is_sampled_exactly(method, spacing):
    x_start = images(2, 3, 4, 6, dtype=torch.float32)
    for num_steps in 1, 2, 7, 50, 1000:
        draw, calls = noise_for([5, 6], (3, 4, 6)), []

        def oracle(x, t):
            assert type(t) is int and x.isfinite().all()
            calls.append(t)
            return x_start

        steps = timesteps(1000, num_steps, spacing)
        assert torch.equal(sample(oracle, draw(), steps, COSINE, method, noise=draw), x_start)
        assert calls == steps                                   # each step once, in order


def test_ddim_and_dpm_converge_to_the_solution_for_gaussian_data():
    std, a_T, x_T = 0.5, COSINE[-1].item(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = std / math.sqrt(a_T * std ** 2 + 1 - a_T)           # the flow maps quantiles to quantiles

    def errors(method):
        return [abs(sample(gaussian_denoiser(std), x_T, timesteps(1000, n), COSINE, method).item() - exact)
                for n in (10, 30, 100, 1000)]

    ddim, dpm = errors("ddim"), errors("dpm++")
    assert ddim == sorted(ddim, reverse=True) and dpm[0] > dpm[1] > dpm[2] and max(ddim[-1], dpm[-1]) < 1e-3
    assert dpm[1] < ddim[1] / 5                                 # second order pays


def test_ddpm_reaches_the_variance_of_gaussian_data():
    draw, steps = noise_for([1], (1, 128, 128)), timesteps(1000, 250, "even")
    x = sample(gaussian_denoiser(0.3), draw(), steps, COSINE, "ddpm", noise=draw)
    assert x.std().item() == pytest.approx(0.3, rel=0.04)


def test_predictions_are_clipped_need_no_gradient_and_keep_the_dtype():
    x_T, weight = images(1, 1, 4, 4), torch.ones((), requires_grad=True)
    assert (sample(lambda x, t: x_T * 0 + 3, x_T, [9, 4, 0], COSINE, limits=(-1, 1)) == 1).all()
    assert (sample(lambda x, t: x_T * 0 + 3, x_T, [9, 4, 0], COSINE) == 3).all()
    x = sample(lambda x, t: (weight * x).bfloat16(), torch.ones(1, 1, 2, 2), [5, 0], COSINE)
    assert not x.requires_grad and x.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_samplers_agree_with_diffusers_step_by_step(method):
    schedulers = pytest.importorskip("diffusers")
    betas = torch.cat([1 - COSINE[:1], 1 - COSINE[1:] / COSINE[:-1]]).numpy()
    settings = dict(num_train_timesteps=1000, trained_betas=betas, prediction_type="sample")
    if method == "dpm++":
        theirs = schedulers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
    else:
        name = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[method]
        theirs = getattr(schedulers, name)(**settings, clip_sample=False)
    theirs.set_timesteps(20)
    released = schedulers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(released, COSINE.float(), rtol=1e-3, atol=1e-5)      # theirs is float32

    x = x_T = torch.randn(2, 1, 8, 8, generator=rng(3))
    draws, ours, expected = torch.Generator().manual_seed(4), [], []
    for t in theirs.timesteps:
        expected.append(x)
        random = {} if method == "dpm++" else {"generator": draws}
        x = theirs.step(wavy(x, t.item()), t, x, **random).prev_sample
    draws = torch.Generator().manual_seed(4)
    x_0 = sample(wavy, x_T, theirs.timesteps.tolist(), COSINE, method,
                 noise=lambda: torch.randn(x_T.shape, generator=draws),
                 on_step=lambda t, x_t, pred_x_start: ours.append(x_t))
    torch.testing.assert_close(torch.stack([*ours, x_0]), torch.stack([*expected, x]), rtol=0, atol=1e-4)


# --- randomness ---

def test_rng_is_a_function_of_its_arguments_and_of_nothing_else():
    def first(*key):
        return torch.randint(2 ** 62, (1,), generator=rng(*key)).item()

    torch.manual_seed(1)
    once = first(17, 3)
    torch.manual_seed(2)
    assert first(17, 3) == once == 321534693156879517       # every published picture hangs on it
    keys = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (-1,)]
    assert len({first(seed, *salt) for seed in range(300) for salt in keys}) == 300 * len(keys)


def test_neighbouring_streams_are_uncorrelated():
    keys = [(seed, salt) for seed in range(4) for salt in range(4)]
    streams = torch.stack([torch.randn(10_000, generator=rng(*key)) for key in keys])
    assert (torch.corrcoef(streams) - torch.eye(16)).abs().max() < 0.05


def test_an_image_has_the_same_noise_alone_and_in_a_batch_call_after_call():
    batch, alone, other = (noise_for(seeds, (2, 8, 8)) for seeds in (range(16, 20), [17], [19, 17]))
    draws = [batch() for _ in range(3)]
    for noise in draws:
        assert noise.shape == (4, 2, 8, 8) and noise.dtype == torch.float32
        assert torch.equal(alone()[0], noise[1])
        assert torch.equal(other(), noise[[3, 1]])
    assert not torch.equal(draws[0], draws[1])


# --- messages and the command ---

@pytest.mark.parametrize("call, words", [
    (lambda: schedule(0), "T is 0"),
    (lambda: timesteps(10, 11), "num_steps is 11.*pass 1 to 10"),
    (lambda: timesteps(10, 0), "pass 1 to 10"),
    (lambda: timesteps(10, 5, "log"), "spacing is 'log', but there are only logsnr, even"),
    (lambda: diffusion.target_of(None, None, 0, COSINE, "x"), "x0, v"),
    (lambda: diffusion.to_x_start(None, None, 0, COSINE, "x"), "x0, v"),
    (lambda: sample(None, torch.zeros(1), [1, 0], COSINE, "euler"), r"dpm\+\+, ddim, ddpm"),
])
def test_mistakes_are_answered_with_what_exists(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_command_prints_where_the_switch_falls(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "diffusion.py --num-steps 5 --switch-t 400 --spacing even".split())
    diffusion.main()
    head, *rows, calls = capsys.readouterr().out.splitlines()
    cells = [row.split() for row in rows]
    assert [row[0] for row in cells] == ["999", "749", "500", "250", "0"]
    assert [row[3] for row in cells] == ["large"] * 3 + ["small"] * 2 and calls == "calls: large 3, small 2"
    a = float(cells[2][1])
    assert float(cells[2][2]) == pytest.approx(10 * math.log10(a / (1 - a)), abs=0.06)


@pytest.mark.parametrize("share", [0.1, 0.03, 0.01])
@pytest.mark.parametrize("distance", [2, 8, 64])
def test_rare_defects_come_as_often_as_they_should_at_the_default_steps(share, distance):
    """Pictures without a defect, and `share` of them with one, so far away: the denoiser is exact.

    Only the direction from one to the other counts, so the picture is one pixel, 0 or `distance`.
    """
    likely = math.log(share / (1 - share))

    def denoise(x, t):
        a = COSINE[t].item()
        return distance * torch.sigmoid(likely + (a ** 0.5 * distance * x - a * distance ** 2 / 2) / (1 - a))

    def drawn(num_steps):
        upper = 1 - 5 * share * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        x_T = torch.special.ndtri(upper).view(-1, 1, 1, 1)          # the noise that ends nearest to it
        pictures = sample(denoise, x_T, timesteps(1000, num_steps), COSINE)
        return 5 * (pictures > distance / 2).double().mean().item()

    assert 0.95 < drawn(NUM_STEPS) < 1.01 and drawn(1000) == pytest.approx(1, abs=0.01)
    assert share > 0.01 or drawn(20) == pytest.approx(0.85, abs=0.02)
