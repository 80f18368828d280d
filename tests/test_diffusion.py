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


def wavy(x, t):
    """A denoiser whose answer depends on all it is given."""
    return torch.tanh(0.8 * x + t / 1000)


# --- schedule ---

def test_the_schedule_has_the_released_values():
    for t in range(999):                            # as long as no beta is clipped, the product telescopes
        angles = [(s / 1000 + 0.008) / 1.008 * math.pi / 2 for s in (t + 1, 0)]
        expected = (math.cos(angles[0]) / math.cos(angles[1])) ** 2
        assert COSINE[t].item() == pytest.approx(expected, rel=1e-9)
    golden = {0: 0.9999587, 100: 0.9715757, 400: 0.6459882, 998: 2.428767e-6, 999: 2.428767e-9}
    assert {t: COSINE[t].item() for t in golden} == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize("T", [1, 2, 10, 1000, 4000])
def test_schedules_fall_strictly_between_one_and_zero(T):
    alphas_cumprod = schedule(T)
    assert len(alphas_cumprod) == T and alphas_cumprod.dtype == torch.float64
    assert 0 < alphas_cumprod[-1] and alphas_cumprod[0] < 1 and (alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close(logsnr(alphas_cumprod), torch.logit(alphas_cumprod))


# --- forward process and targets ---

def test_q_sample_is_its_closed_form_for_each_image_and_keeps_the_dtype():
    x, noise, t = images(3, 2, 4, 5), images(3, 2, 4, 5, seed=1), torch.tensor([0, 500, 999])
    x_t = q_sample(x, t, noise, COSINE)
    for i in range(3):
        a = COSINE[t[i]].item()
        torch.testing.assert_close(x_t[i], a ** 0.5 * x[i] + (1 - a) ** 0.5 * noise[i])
        torch.testing.assert_close(q_sample(x[i:i + 1], int(t[i]), noise[i:i + 1], COSINE)[0], x_t[i])
    assert q_sample(x.bfloat16(), t, noise.bfloat16(), COSINE).dtype == torch.bfloat16


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_targets_are_their_closed_forms_and_inverted(target, dtype, tolerance):
    x, noise = images(4, 1, 8, 8, dtype=dtype), images(4, 1, 8, 8, seed=1, dtype=dtype)
    t = torch.tensor([0, 400, 900, 999])
    signal, sigma = COSINE[t].sqrt().view(-1, 1, 1, 1), (1 - COSINE[t]).sqrt().view(-1, 1, 1, 1)
    wanted = diffusion.target_of(x, noise, t, COSINE, target)
    torch.testing.assert_close(wanted, {"x0": x, "v": (signal * noise - sigma * x).to(dtype)}[target])
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
    """The error of v that an error of x_0 makes at x_t is that over sigma."""
    counts = {target: diffusion.time_weights(COSINE, target, "min-snr") for target in TARGETS}
    torch.testing.assert_close(counts["x0"], (COSINE / (1 - COSINE)).clamp(max=5))
    torch.testing.assert_close(counts["v"] / (1 - COSINE), counts["x0"])
    assert all((diffusion.time_weights(COSINE, target, "uniform") == 1).all() for target in TARGETS)


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

@pytest.mark.parametrize("t, t_prev", [(999, 998), (999, 0), (500, 499), (500, 20), (1, 0)])
def test_ddim_step_is_q_sample_without_noise_and_the_posterior_of_ddpm_with_it(t, t_prev):
    x, noise, fresh = (images(2, 1, 4, 4, seed=seed) for seed in range(3))
    x_t, a, a_prev = q_sample(x, t, noise, COSINE), COSINE[t], COSINE[t_prev]
    torch.testing.assert_close(ddim_step(x_t, x, t, t_prev, COSINE), q_sample(x, t_prev, noise, COSINE))
    beta = 1 - a / a_prev                                                               # DDPM eq. 7
    mean = a_prev.sqrt() * beta / (1 - a) * x + (1 - beta).sqrt() * (1 - a_prev) / (1 - a) * x_t
    variance = (1 - a_prev) / (1 - a) * beta
    torch.testing.assert_close(ddim_step(x_t, x, t, t_prev, COSINE, 1.0, fresh),
                               mean + variance.sqrt() * fresh)
    assert torch.equal(ddim_step(x_t, x, t, -1, COSINE, 1.0), x)        # the clean image, without noise


@pytest.mark.parametrize("method, eta", [("ddim", 0.0), ("ddpm", 1.0)])
def test_ddim_and_ddpm_are_ddim_steps_over_any_subset_of_timesteps(method, eta):
    x = x_T = images(2, 1, 4, 4)
    steps, noise, again = [999, 700, 40, 3, 0], noise_for([1, 2], (1, 4, 4)), noise_for([1, 2], (1, 4, 4))
    for t, t_prev in zip(steps, steps[1:] + [-1]):
        x = ddim_step(x, wavy(x, t), t, t_prev, COSINE, eta, noise())
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


def test_ddim_and_dpm_converge_to_the_solution_for_gaussian_data():
    std, a_T, x_T = 0.5, COSINE[-1].item(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = std / math.sqrt(a_T * std ** 2 + 1 - a_T)           # the flow maps quantiles to quantiles

    def ideal(x, t):
        """x_0 = E[x_0 | x_t] of data ~ N(0, std^2)."""
        a = COSINE[t].item()
        return a ** 0.5 * std ** 2 / (a * std ** 2 + 1 - a) * x

    ddim, dpm = ([abs(sample(ideal, x_T, timesteps(1000, n), COSINE, method).item() - exact)
                  for n in (10, 30, 1000)] for method in ("ddim", "dpm++"))
    assert ddim[0] > ddim[1] > ddim[2] < 1e-3 > dpm[2] and dpm[1] < ddim[1] / 5         # second order pays


@pytest.mark.parametrize("method", METHODS)
def test_an_oracle_is_sampled_exactly_within_limits_without_gradient_in_its_dtype(method):
    noise, three = noise_for([1], (1, 4, 4)), torch.tensor(3.0, requires_grad=True)
    for limits, answer in ((-1, 1), 1), (None, 3):
        for steps in [999], [999, 0], timesteps(1000, 7):
            x = sample(lambda x, t: (three + 0 * x).bfloat16(), noise(), steps, COSINE, method, noise, limits)
            assert (x == answer).all() and not x.requires_grad and x.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_samplers_agree_with_diffusers_step_by_step(method):
    schedulers = pytest.importorskip("diffusers")
    betas = torch.cat([1 - COSINE[:1], 1 - COSINE[1:] / COSINE[:-1]]).numpy()
    settings = dict(num_train_timesteps=1000, trained_betas=betas, prediction_type="sample")
    theirs = {"dpm++": lambda: schedulers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero"),
              "ddim": lambda: schedulers.DDIMScheduler(**settings, clip_sample=False),
              "ddpm": lambda: schedulers.DDPMScheduler(**settings, clip_sample=False)}[method]()
    theirs.set_timesteps(20)
    released = schedulers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(released, COSINE.float(), rtol=1e-3, atol=1e-5)      # theirs is float32

    x = x_T = torch.randn(2, 1, 8, 8, generator=rng(3))
    (generator, again), ours, expected = (rng(4), rng(4)), [], []
    for t in theirs.timesteps:
        expected.append(x)
        random = {} if method == "dpm++" else {"generator": generator}
        x = theirs.step(wavy(x, t.item()), t, x, **random).prev_sample
    x_0 = sample(wavy, x_T, theirs.timesteps.tolist(), COSINE, method,
                 noise=lambda: torch.randn(x_T.shape, generator=again),
                 on_step=lambda t, x_t, pred_x_start: ours.append(x_t))
    torch.testing.assert_close(torch.stack([*ours, x_0]), torch.stack([*expected, x]), rtol=0, atol=1e-4)


# --- randomness ---

def test_rng_is_a_function_of_its_arguments_and_of_nothing_else():
    def first(*key):
        return torch.randint(2 ** 62, (1,), generator=rng(*key)).item()

    assert first(17, 3) == 321534693156879517                   # every published picture hangs on it
    keys = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (-1,)]
    assert len({first(seed, *salt) for seed in range(300) for salt in keys}) == 300 * len(keys)


def test_neighbouring_streams_are_uncorrelated():
    keys = [(seed, salt) for seed in range(4) for salt in range(4)]
    streams = torch.stack([torch.randn(10_000, generator=rng(*key)) for key in keys])
    assert (torch.corrcoef(streams) - torch.eye(16)).abs().max() < 0.05


def test_an_image_has_the_same_noise_alone_and_in_a_batch_call_after_call():
    batch, alone, other = (noise_for(seeds, (2, 8, 8)) for seeds in (range(16, 20), [17], [19, 17]))
    draws = [batch() for _ in range(3)]
    assert draws[0].shape == (4, 2, 8, 8) and not torch.equal(draws[0], draws[1])
    for noise in draws:
        assert torch.equal(alone()[0], noise[1]) and torch.equal(other(), noise[[3, 1]])


# --- messages and the command ---

@pytest.mark.parametrize("call, words", [
    (lambda: schedule(0), "T is 0"),
    (lambda: timesteps(10, 11), "num_steps is 11.*pass 1 to 10"), (lambda: timesteps(10, 0), "pass 1 to 10"),
    (lambda: timesteps(10, 5, "log"), "spacing is 'log', but there are only logsnr, even"),
    (lambda: diffusion.to_x_start(None, None, 0, COSINE, "x"), "x0, v"),
    (lambda: sample(None, torch.zeros(1), [1, 0], COSINE, "euler"), r"dpm\+\+, ddim, ddpm")])
def test_mistakes_are_answered_with_what_exists(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_command_prints_where_the_switch_falls(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "diffusion.py --num-steps 5 --switch-t 500 --spacing even".split())
    diffusion.main()
    head, *rows, calls = capsys.readouterr().out.splitlines()
    cells = [row.split() for row in rows]
    assert [row[0] for row in cells] == ["999", "749", "500", "250", "0"]
    assert [row[3] for row in cells] == ["large"] * 3 + ["small"] * 2 and calls == (
        "calls, where both stages have one size: large 3, small 2")
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


@pytest.mark.parametrize("method", METHODS)
def test_a_noise_scale_gives_back_what_a_denoiser_takes_away_too_much(method):
    """Data with the deviation 0.5, and a network that believes 0.49."""
    def denoise(x, t):
        a = COSINE[t].item()
        return a ** 0.5 * 0.49 ** 2 / (a * 0.49 ** 2 + 1 - a) * x

    def deviation(noise_scale):
        noise = noise_for([0], (1, 100, 100))
        drawn = sample(denoise, noise(), timesteps(1000, 40), COSINE, method, noise, noise_scale=noise_scale)
        return drawn.std().item()
    assert deviation(1) < 0.5 and 1.005 * deviation(1) < deviation(1.003) < 1.1 * deviation(1)
