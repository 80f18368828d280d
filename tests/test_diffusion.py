"""diffusion.py: closed forms, samplers against known answers, and randomness that is a function of its integers."""
import math

import pytest
import torch

import diffusion
from diffusion import METHODS, SPACINGS, TARGETS, ddim_step, logsnr, noise_for, q_sample, rng, sample, schedule, timesteps

COSINE = schedule(1000)


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=rng(seed), dtype=dtype) * 2 - 1


def gaussian_denoiser(std, alphas_cumprod):
    """The ideal denoiser of data ~ N(0, std^2): x_0 = E[x_0 | x_t]."""
    def denoise(x, t):
        a = alphas_cumprod[t].item()
        return a ** 0.5 * std ** 2 / (a * std ** 2 + 1 - a) * x
    return denoise


# --- schedule ---

def test_cosine_schedule_has_the_released_values():
    assert COSINE.dtype == torch.float64 and COSINE.shape == (1000,)
    for t in range(999):                                        # as long as no beta is clipped, the product telescopes
        angles = [(s / 1000 + 0.008) / 1.008 * math.pi / 2 for s in (t + 1, 0)]
        assert COSINE[t].item() == pytest.approx((math.cos(angles[0]) / math.cos(angles[1])) ** 2, rel=1e-9)
    for t, golden in {0: 0.9999587, 100: 0.9715757, 400: 0.6459882, 998: 2.428767e-6, 999: 2.428767e-9}.items():
        assert COSINE[t].item() == pytest.approx(golden, rel=1e-6)


def test_linear_schedule_is_that_of_ddpm():
    betas = 1 - schedule(1000, "linear")[1:] / schedule(1000, "linear")[:-1]
    assert betas[0].item() == pytest.approx(1e-4 + (0.02 - 1e-4) / 999) and betas[-1].item() == pytest.approx(0.02)
    assert schedule(1000, "linear")[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


@pytest.mark.parametrize("kind", diffusion.SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 10, 250, 1000, 4000])
def test_schedules_fall_strictly_between_one_and_zero(kind, T):
    alphas_cumprod = schedule(T, kind)
    assert len(alphas_cumprod) == T and 0 < alphas_cumprod[-1] and alphas_cumprod[0] < 1
    assert (alphas_cumprod.diff() < 0).all() and logsnr(alphas_cumprod).isfinite().all()


# --- forward process and targets ---

def test_q_sample_is_its_closed_form_for_each_image():
    x, noise, t = images(3, 2, 4, 5), images(3, 2, 4, 5, seed=1), torch.tensor([0, 500, 999])
    x_t = q_sample(x, t, noise, COSINE)
    for i in range(3):
        a = COSINE[t[i]].item()
        torch.testing.assert_close(x_t[i], a ** 0.5 * x[i] + (1 - a) ** 0.5 * noise[i])
        torch.testing.assert_close(q_sample(x[i:i + 1], int(t[i]), noise[i:i + 1], COSINE)[0], x_t[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_q_sample_keeps_the_dtype(dtype):
    x = images(1, 1, 2, 2, dtype=torch.float32).to(dtype)
    assert q_sample(x, torch.tensor([7]), x, COSINE).dtype == dtype


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_targets_invert(kind, dtype, tolerance):
    x, noise, t = images(4, 1, 8, 8, dtype=dtype), images(4, 1, 8, 8, seed=1, dtype=dtype), torch.tensor([0, 400, 900, 999])
    x_t = q_sample(x, t, noise, COSINE)
    target = diffusion.target_of(x, noise, t, COSINE, kind)
    back = diffusion.to_x_start(target, x_t, t, COSINE, kind)
    last = 1e4 if kind == "eps" else 1                          # eps at T-1 multiplies rounding by 2e4
    torch.testing.assert_close(back[:3], x[:3], rtol=0, atol=tolerance * (10 if kind == "eps" else 1))
    torch.testing.assert_close(back[3:], x[3:], rtol=0, atol=tolerance * last)


@pytest.mark.parametrize("target", TARGETS)
def test_training_loss_is_a_float32_mean_per_image(target):
    x, noise, t = images(3, 2, 4, 4, dtype=torch.float32), images(3, 2, 4, 4, seed=1, dtype=torch.float32), torch.tensor([1, 500, 999])
    wanted = diffusion.target_of(x, noise, t, COSINE, target)
    seen = []
    def net(x_t, t):
        seen.append((x_t, t))
        return (wanted + torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1, 1)).bfloat16()
    loss = diffusion.training_loss(net, x, t, noise, COSINE, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.25, 4.0]), rtol=2e-2, atol=1e-4)
    assert torch.equal(seen[0][0], q_sample(x, t, noise, COSINE)) and torch.equal(seen[0][1], t)


# --- timesteps ---

@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 37])
def test_timesteps_are_distinct_and_visit_both_ends_for_every_number_of_steps(T, spacing):
    assert timesteps(T, 1, spacing) == [T - 1]
    for num_steps in range(2, T + 1):
        steps = timesteps(T, num_steps, spacing)
        assert len(steps) == num_steps and steps[0] == T - 1 and steps[-1] == 0
        assert all(isinstance(t, int) for t in steps) and all(a > b for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("kind", diffusion.SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_the_usual_schedule(spacing, kind):
    for num_steps in 2, 7, 20, 50, 250, 999, 1000:
        steps = timesteps(1000, num_steps, spacing, schedule(1000, kind))
        assert len(set(steps)) == num_steps and steps == sorted(steps, reverse=True) and (steps[0], steps[-1]) == (999, 0)


def test_each_spacing_is_uniform_on_its_clock():
    assert timesteps(1001, 11, "even") == list(range(1000, -1, -100))
    assert timesteps(101, 11, "quadratic") == [k * k for k in range(10, -1, -1)]
    linear = schedule(1000, "linear")
    gaps = logsnr(linear)[timesteps(1000, 9, "logsnr", linear)].diff()
    assert gaps.max() / gaps.min() < 1.3
    steps = timesteps(1000, 20)                                 # the leap at T-1 gets one step, the rest share what it leaves
    assert logsnr(COSINE)[steps[4:-2]].diff().std() < 0.15 * logsnr(COSINE)[steps[4:-2]].diff().mean()


# --- samplers ---

@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_step_goes_where_q_sample_goes(eta):
    x, noise, fresh = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1), images(2, 1, 4, 4, seed=2)
    for t, t_prev in (999, 998), (999, 0), (500, 20), (1, 0):
        x_t, a, a_prev = q_sample(x, t, noise, COSINE), COSINE[t], COSINE[t_prev]
        variance = eta ** 2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        mixed = ((1 - a_prev - variance).clamp(min=0).sqrt() * noise + variance.sqrt() * fresh) / (1 - a_prev).sqrt()
        torch.testing.assert_close(ddim_step(x_t, x, t, t_prev, COSINE, eta, fresh), q_sample(x, t_prev, mixed, COSINE))
        assert torch.equal(ddim_step(x_t, x, t, -1, COSINE, eta), x)                    # the clean image, without noise


def test_eta_one_is_the_posterior_of_ddpm():
    x, x_t, zero = images(1, 1, 4, 4), images(1, 1, 4, 4, seed=1), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    for t in 1, 500, 999:
        a, a_prev = COSINE[t], COSINE[t - 1]
        beta = 1 - a / a_prev
        mean = a_prev.sqrt() * beta / (1 - a) * x + (1 - beta).sqrt() * (1 - a_prev) / (1 - a) * x_t    # DDPM eq. 7
        variance = (1 - a_prev) / (1 - a) * beta
        torch.testing.assert_close(ddim_step(x_t, x, t, t - 1, COSINE, 1.0, zero), mean)
        torch.testing.assert_close(ddim_step(x_t, x, t, t - 1, COSINE, 1.0, zero + 1) - mean, zero + variance.sqrt())


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


def test_the_trajectory_of_an_oracle_is_q_sample():
    x_start, noise, seen = images(1, 1, 4, 4), images(1, 1, 4, 4, seed=1), []
    for method in "ddim", "dpm++":
        sample(lambda x, t: x_start, q_sample(x_start, 999, noise, COSINE), timesteps(1000, 9), COSINE, method,
               on_step=lambda t, x_t, pred_x_start: seen.append((t, x_t)))
    assert len(seen) == 18
    for t, x_t in seen:
        torch.testing.assert_close(x_t, q_sample(x_start, t, noise, COSINE))


def test_ddim_and_dpm_converge_to_the_solution_for_gaussian_data():
    std, a_T = 0.5, COSINE[-1].item()
    exact = std / math.sqrt(a_T * std ** 2 + 1 - a_T)           # the flow maps quantiles of x_T to quantiles of the data
    denoise, x_T = gaussian_denoiser(std, COSINE), torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def errors(method):
        return [abs(sample(denoise, x_T, timesteps(1000, n), COSINE, method).item() - exact) for n in (10, 30, 100, 1000)]

    ddim, dpm = errors("ddim"), errors("dpm++")
    assert ddim == sorted(ddim, reverse=True) and ddim[-1] < 1e-3
    assert dpm[0] > dpm[1] > dpm[2] and dpm[-1] < 1e-3
    assert dpm[1] < ddim[1] / 5                                 # second order pays


@pytest.mark.parametrize("num_steps, tolerance", [(1000, 0.02), (250, 0.04), (50, 0.2)])
def test_ddpm_reaches_the_variance_of_gaussian_data(num_steps, tolerance):
    draw = noise_for([1], (1, 128, 128))
    x = sample(gaussian_denoiser(0.3, COSINE), draw(), timesteps(1000, num_steps, "even"), COSINE, "ddpm", noise=draw, clip=False)
    assert x.std().item() == pytest.approx(0.3, rel=tolerance)


def test_clip_keeps_predictions_in_range():
    x_T = images(1, 1, 4, 4)
    assert (sample(lambda x, t: x_T * 0 + 3, x_T, [9, 4, 0], COSINE) == 1).all()
    assert (sample(lambda x, t: x_T * 0 + 3, x_T, [9, 4, 0], COSINE, clip=False) == 3).all()


def test_sampling_needs_no_gradient_and_keeps_the_dtype():
    weight = torch.ones((), requires_grad=True)
    x = sample(lambda x, t: (weight * x).bfloat16(), torch.ones(1, 1, 2, 2), [5, 0], COSINE)
    assert not x.requires_grad and x.dtype == torch.float32


@pytest.mark.parametrize("method, eta", [("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0), ("dpm++", 0.0)])
@pytest.mark.parametrize("kind", diffusion.SCHEDULES)
def test_samplers_agree_with_diffusers_step_by_step(method, eta, kind):
    schedulers = pytest.importorskip("diffusers")
    alphas_cumprod = schedule(1000, kind)
    betas = torch.cat([1 - alphas_cumprod[:1], 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]]).numpy()
    settings = dict(num_train_timesteps=1000, trained_betas=betas, prediction_type="sample")
    if method == "dpm++":
        theirs = schedulers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
    else:
        theirs = {"ddim": schedulers.DDIMScheduler, "ddpm": schedulers.DDPMScheduler}[method](**settings, clip_sample=False)
    theirs.set_timesteps(20)

    def denoise(x, t):
        return torch.tanh(0.8 * x + t / 1000)

    x = x_T = torch.randn(2, 1, 8, 8, generator=rng(3))
    draws, ours, expected = torch.Generator().manual_seed(4), [], []
    for t in theirs.timesteps:
        expected.append(x)
        random = {"generator": draws} if method == "ddpm" else {"eta": eta, "generator": draws} if method == "ddim" else {}
        x = theirs.step(denoise(x, t.item()), t, x, **random).prev_sample
    draws = torch.Generator().manual_seed(4)
    x_0 = sample(denoise, x_T, theirs.timesteps.tolist(), alphas_cumprod, method, eta,
                 noise=lambda: torch.randn(x_T.shape, generator=draws), on_step=lambda t, x_t, pred_x_start: ours.append(x_t))
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(x_0, x, rtol=0, atol=1e-4)


# --- randomness ---

def test_rng_is_a_function_of_its_arguments_and_of_nothing_else():
    def first(*key):
        return torch.randint(2 ** 62, (1,), generator=rng(*key)).item()

    torch.manual_seed(1)
    once = first(17, 3)
    torch.manual_seed(2)
    assert first(17, 3) == once
    keys = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (-1,)]
    assert len({first(seed, *salt) for seed in range(300) for salt in keys}) == 300 * len(keys)


def test_neighbouring_streams_are_uncorrelated():
    streams = torch.stack([torch.randn(10_000, generator=rng(seed, salt)) for seed in range(4) for salt in range(4)])
    assert (torch.corrcoef(streams) - torch.eye(16)).abs().max() < 0.05


def test_an_image_has_the_same_noise_alone_and_in_a_batch_call_after_call():
    batch, alone, other = noise_for(range(16, 20), (2, 8, 8)), noise_for([17], (2, 8, 8)), noise_for([19, 17], (2, 8, 8))
    draws = [batch() for _ in range(3)]
    for noise in draws:
        assert noise.shape == (4, 2, 8, 8) and noise.dtype == torch.float32
        assert torch.equal(alone()[0], noise[1])
        assert torch.equal(other(), noise[[3, 1]])
    assert not torch.equal(draws[0], draws[1])


# --- messages ---

@pytest.mark.parametrize("call, words", [
    (lambda: schedule(1000, "sigmoid"), "cosine, linear"),
    (lambda: schedule(0), "T is 0"),
    (lambda: timesteps(10, 11), "num_steps is 11.*pass 1 to 10"),
    (lambda: timesteps(10, 0), "pass 1 to 10"),
    (lambda: timesteps(10, 5, "log"), "logsnr, quadratic, even"),
    (lambda: q_sample(torch.zeros(1, 3, 4, 4), 0, torch.zeros(1, 1, 4, 4), COSINE), r"noise is \(1, 1, 4, 4\)"),
    (lambda: diffusion.target_of(None, None, 0, COSINE, "x"), "x0, eps, v"),
    (lambda: diffusion.to_x_start(None, None, 0, COSINE, "x"), "x0, eps, v"),
    (lambda: sample(None, torch.zeros(1), [1, 0], COSINE, "euler"), r"dpm\+\+, ddim, ddpm"),
    (lambda: sample(None, torch.zeros(1), [0, 1], COSINE), "decrease strictly"),
    (lambda: sample(None, torch.zeros(1), [], COSINE), "decrease strictly"),
    (lambda: sample(None, torch.zeros(1), [1, 0], COSINE, "ddpm"), "pass noise=noise_for"),
    (lambda: sample(None, torch.zeros(1), [1, 0], COSINE, eta=0.5), "only ddim"),
    (lambda: ddim_step(torch.zeros(2, 1), torch.zeros(2, 1), 9, 5, COSINE, 1.0, torch.zeros(1)), "noise is .*pass noise of shape"),
])
def test_mistakes_are_answered_with_what_exists(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the command ---

def test_command_prints_the_split_and_writes_the_picture(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "schedule.png"
    monkeypatch.setattr("sys.argv", ["diffusion.py", "--out", str(out), "--num-steps", "5", "--switch-t", "400", "--spacing", "even"])
    diffusion.main()
    assert out.stat().st_size > 1000
    text = capsys.readouterr().out
    assert "calls: large 3, small 2" in text and str(out) in text
