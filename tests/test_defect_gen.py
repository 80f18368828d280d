"""The hand-over: one trajectory, each network at its own timesteps; joint channels; checkpoints that fit."""
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import defect_gen
from conftest import picture
from datasets import open_dataset, write_image
from defect_gen import (GUIDANCE, GUIDED_FROM, IMAGE_STD, NOISE_SCALE, NUM_STEPS, PAINT_STEPS, REPEATS,
                        STAGES, SWITCH_T, DefectGen, Joint, Known, checkpoints, enlarge, exact_denoiser,
                        guided, image_statistics, in_tiles, load_stage, switched, with_known)
from diffusion import logsnr, noise_for, q_sample, rng, sample, schedule, timesteps
from unet import UNet, receptive_field


# --- the idea ---

@pytest.mark.parametrize("channels, num_classes", [(1, 2), (3, 6), (3, 1)])
def test_decode_inverts_encode(channels, num_classes):
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, channels, 16, 16)
    mask = torch.randint(0, num_classes, (2, 16, 16), dtype=torch.uint8)
    way = Joint({"mean": [72.3, 128.0, 255.0][:channels], "std": [20.9, 1.0, 73.1][:channels]}, num_classes)
    joint = way.encode(image, mask)
    assert joint.shape == (2, channels + num_classes, 16, 16) and joint.dtype == torch.float32
    assert set(joint[:, channels:].unique().tolist()) <= {-1, 1}
    assert (joint[:, channels:].sum(1) == 2 - num_classes).all()                        # one class per pixel
    again_image, again_mask = way.decode(joint)
    assert torch.equal(again_image, image) and torch.equal(again_mask, mask)            # every grey level
    assert again_image.dtype == again_mask.dtype == torch.uint8
    ignored = way.encode(image, torch.where(mask == 0, 255, mask).byte())               # as background
    assert torch.equal(ignored, joint)
    assert torch.equal(way.decode(3 * joint)[1], mask) and way.decode(3 * joint)[0].max() == 255
    low, high = way.limits                      # black and white, background and class: no x_0 is beyond
    assert torch.equal(joint.clamp(low, high), joint) and torch.equal(joint.amax((0, 2, 3)), high.flatten())
    assert way.weights[:channels].sum().item() == way.weights[channels:].sum().item() == pytest.approx(0.5)


def test_images_are_standardised_over_the_training_set_whatever_the_size(data):
    found, other = (image_statistics(open_dataset(data, size, "train")) for size in ((24, 32), (8, 8)))
    assert found == other                                       # both stages have the same
    images, masks = open_dataset(data, (64, 64), "train").tensors()
    image = Joint(found, 3).encode(images, masks)[:, :3]
    torch.testing.assert_close(image.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(image.std((0, 2, 3)), torch.full((3,), IMAGE_STD))
    # So photos of any contrast are as strong as the noise at one timestep, close to the switch.
    assert (IMAGE_STD ** 2 * logsnr(schedule()).exp() > 1).sum() == 383


def test_statistics_are_the_same_with_any_number_of_threads(tmp_path):
    """They are compared exactly: of the two stages, and by --resume."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 1, 64, 64), np.uint8)
    for i, image in enumerate(noise):
        write_image(tmp_path / f"images/good/{i}.png", image)
    (tmp_path / "masks").mkdir()
    data, before, found = open_dataset(tmp_path), torch.get_num_threads(), []
    for threads in 1, 2, 3:
        torch.set_num_threads(threads)
        found.append(image_statistics(data))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0] == {"mean": [pytest.approx(noise.mean())], "std": [pytest.approx(noise.std())]}


@pytest.mark.parametrize("switch_t", [0, 1, 400, 1000])
def test_each_network_receives_exactly_its_timesteps_of_one_trajectory(switch_t):
    seen, x_T = {"large": [], "small": []}, noise_for([3, 4], (2, 4, 4))()

    def network(name):
        return lambda x_t, t: seen[name].append(t) or torch.tanh(x_t) * (1 - t / 1000)

    steps = list(range(999, -1, -1))
    both = sample(switched(network("large"), network("small"), switch_t), x_T, steps, schedule())
    assert seen == {"large": list(range(999, switch_t - 1, -1)), "small": list(range(switch_t - 1, -1, -1))}
    assert torch.equal(both, sample(network("large"), x_T, steps, schedule()))  # equal networks are one


def test_the_exact_denoiser_copies_a_training_image():
    data, noise = torch.rand(5, 3, 4, 4) * 2 - 1, noise_for(range(8), (3, 4, 4))()
    drawn = sample(exact_denoiser(data, schedule()), noise, timesteps(1000, 50), schedule())
    assert torch.cdist(drawn.flatten(1), data.flatten(1)).min(1).values.max() < 1e-3


@pytest.mark.parametrize("depth, blocks", [(0, 1), (1, 2), (2, 1)])
def test_pieces_with_margins_give_the_same_as_one_piece(depth, blocks, monkeypatch):
    torch.manual_seed(0)
    net = UNet(4, 8, (1, 2, 2)[:depth + 1], blocks, attention_levels=(), middle=False, norm="local").double()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)     # else the last layer answers 0
    step, shapes = 2 ** depth, []
    tile = math.ceil(receptive_field(net) / step) * step
    x_t = torch.randn(1, 4, tile + step, 2 * tile + step, dtype=torch.float64)
    whole = net(x_t, 7)
    monkeypatch.setattr(defect_gen, "TILE", tile)
    net.register_forward_pre_hook(lambda net, inputs: shapes.append(inputs[0].shape[2:]))
    torch.testing.assert_close(in_tiles(net, x_t, 7), whole, rtol=0, atol=1e-12)
    assert len(shapes) == 6 and max(max(shape) for shape in shapes) <= 2 * tile + step


# --- sampling a trained run ---

@pytest.mark.parametrize("sampler, target", [("dpm++", "x0"), ("ddim", "v"), ("ddpm", "v")])
def test_picture_17_is_the_same_alone_and_in_a_batch_with_every_sampler(trained, sampler, target):
    generator, seeds = DefectGen.load(trained), [5, 17, 99, 3]
    generator.config = {**generator.config, "target": target}

    def draw(seeds, **settings):
        return generator.sample(seeds, 6, sampler, **settings)

    images, masks = draw(seeds)
    assert images.shape == (4, 3, 16, 16) and masks.shape == (4, 16, 16)
    assert images.dtype == masks.dtype == torch.uint8 and masks.max() < len(generator.classes)
    assert torch.equal(draw(seeds)[0], images) and not torch.equal(images[0], images[1])
    generator.large.double(), generator.small.double()          # a batch rounds sums otherwise
    exact = draw(seeds)
    for batch_size in 1, 3:
        assert all(map(torch.equal, draw(seeds, batch_size=batch_size), exact))
    assert draw([1], size=(24, 40))[0].shape == (1, 3, 24, 40)


def test_each_stage_is_asked_in_its_own_timesteps_and_answers_with_its_average(trained):
    generator, seen = DefectGen.load(trained), []
    for stage in STAGES:
        net, checkpoint = getattr(generator, stage), load_stage(trained / stage, stage)
        net.register_forward_pre_hook(lambda net, inputs, stage=stage: seen.append((stage, inputs[1])))
        assert not net.training and net.config == checkpoint["network"]
        torch.testing.assert_close(net.state_dict(), checkpoint["ema"], rtol=0, atol=0)
        assert not torch.equal(checkpoint["model"]["input.weight"], checkpoint["ema"]["input.weight"])
    generator.sample([0], num_steps=20, switch_t=380)
    assert seen == [("large" if t >= 380 else "small", t) for t in timesteps(1000, 20)]


@pytest.mark.parametrize("of_a_run, num_steps", [(False, 12), (True, 4)])
def test_the_command_draws_one_trajectory(trained, tmp_path, monkeypatch, capsys, of_a_run, num_steps):
    out = tmp_path / "new" / "trajectory.png"
    flags = ["--run", str(trained), "--num-steps", "4"] if of_a_run else []
    monkeypatch.setattr("sys.argv", ["defect_gen.py", *flags, "--switch-t", "450", "--out", str(out),
                                     "--device", "cpu"])
    defect_gen.main()
    by_large = sum(t >= 450 for t in timesteps(1000, num_steps))
    where = "by the large network" if of_a_run else "above the switch"
    words = f"{num_steps} steps, {by_large} of them {where}; picture: {out}"
    assert words in capsys.readouterr().out
    assert picture(out).shape[1] > 132 * num_steps                                      # one column per step


# --- two sizes ---

@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def edit(run, stage, part="config", **changes):
    """Change a part of a stage's newest checkpoint on disk."""
    path = checkpoints(run / stage)[4]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[part].update(changes)
    torch.save(checkpoint, path)


@pytest.fixture
def relay(copy):
    """The trained run as one whose plans are half as large, over all timesteps."""
    edit(copy, "large", size=[8, 8], t_range=[0, 1000])
    return copy


def test_a_plan_is_drawn_to_its_end_enlarged_and_noised_to_the_first_step_of_small(relay):
    generator, steps, seen = DefectGen.load(relay), timesteps(1000, NUM_STEPS), []
    images, masks = generator.sample([3], on_step=lambda t, x_t, pred: seen.append((t, *x_t.shape[2:])))
    below = [t for t in steps if t < 400]
    assert seen == [(t, 8, 8) for t in steps] + [(t, 16, 16) for t in below]

    table, limits = schedule(), generator.joint.limits          # the same, step by step
    x_T = noise_for([3], (6, 8, 8))()
    plan = sample(generator.denoiser(generator.large), x_T, steps, table, limits=limits)
    x = q_sample(enlarge(plan, (16, 16)), below[0], noise_for([~3], (6, 16, 16))(), table)
    joint = sample(generator.denoiser(generator.small), x, below, table, limits=limits,
                   noise_scale=NOISE_SCALE)
    assert all(map(torch.equal, generator.joint.decode(joint), (images, masks)))

    planned = generator.sample([3], switch_t=0)                 # large alone: the plan, enlarged
    assert torch.equal(planned[1], generator.joint.decode(enlarge(plan, (16, 16)))[1])
    assert torch.equal(generator.sample([9, 3])[1][1], masks[0])                # a function of its seed
    assert generator.sample([3], size=(24, 40))[0].shape == (1, 3, 24, 40)
    edit(relay, "large", t_range=[350, 1000])
    with pytest.raises(ValueError, match="draws to the end, but knows only 350 <= t: .* --t-range full"):
        DefectGen.load(relay).sample([0])


# --- checkpoints that do not fit ---

def swap(run):
    shutil.rmtree(run / "small")
    shutil.copytree(run / "large", run / "small")


@pytest.mark.parametrize("spoil, words", [
    (lambda run: shutil.rmtree(run / "small"),
     "no checkpoint of the small stage; train it with: python train.py --stage small --out .*run"),
    (shutil.rmtree, "--run .*run: no such folder; train first"),
    (swap, "step_000004.pt: holds the large stage, not small; .* swapped"),
    (lambda run: edit(run, "small", images=["crack/007"]), "run: the stages differ in images; train one of"),
    (lambda run: edit(run, "small", classes=["background", "b", "c"]), "stages differ in classes .*'b', 'c'"),
    (lambda run: edit(run, "small", channels=1), r"the stages differ in channels \(3 and 1\); train one"),
    (lambda run: edit(run, "small", statistics={"mean": [0], "std": [1]}), "the stages differ in statistics"),
    (lambda run: edit(run, "small", augment=["flip"]), r"the stages differ in augment \(\[\] and .*flip"),
    (lambda run: edit(run, "small", T=500), r"the stages differ in T \(1000 and 500\); train one of them"),
    (lambda run: edit(run, "small", target="x0"), r"the stages differ in target \(v and x0\); train one of"),
    (lambda run: edit(run, "small", "ema", more=1), "Unexpected key")])                 # loaded strictly
def test_stages_that_do_not_fit_together_are_refused(copy, spoil, words):
    spoil(copy)
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=words):
        DefectGen.load(copy)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:40] + b[44:]])
def test_a_damaged_checkpoint_is_named_and_the_older_one_can_be_asked_for(copy, damage):
    path = checkpoints(copy / "large")[4]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: damaged, or not written by this program .*; remove it"):
        DefectGen.load(copy)
    assert DefectGen.load(copy, step=2).steps_trained == {"large": 2, "small": 2}
    with pytest.raises(FileNotFoundError, match="no checkpoint at step 3 of the large stage"):
        DefectGen.load(copy, step=3)


def test_a_pickle_that_would_run_code_is_refused_and_an_old_checkpoint_as_well(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))
    for words, content in {"damaged, or not written by this program": {"stage": "large", "model": Evil()},
                           "of an older version, .*; train again": {"stage": "large", "config": {}}}.items():
        torch.save(content, checkpoints(copy / "large")[4])
        with pytest.raises(ValueError, match=f"step_000004.pt: {words}"):
            DefectGen.load(copy)
    assert not (tmp_path / "was_here").exists()


def test_a_stage_is_not_asked_at_timesteps_it_was_never_trained_at(copy):
    generator = DefectGen.load(copy)
    for switch_t in (350, 450):
        assert generator.timesteps(1000, "even", switch_t) == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="--switch-t 349 asks the large stage at t = 349, but it knows "
                                         "350 <= t < 1000: use 350 to 450, or train with --t-range full"):
        generator.timesteps(1000, "even", 349)
    with pytest.raises(ValueError, match="--switch-t 451 asks the small stage at t = 450.* 0 <= t < 450"):
        generator.sample([0], num_steps=1000, spacing="even", switch_t=451)
    edit(copy, "large", t_range=[0, 1000])
    assert DefectGen.load(copy).timesteps(1000, "even", 0)


def test_the_steps_of_checkpoints_are_numbers(tmp_path):
    for step in 7, 1_000_000, 90_000:
        (tmp_path / f"step_{step:06d}.pt").touch()
    assert list(checkpoints(tmp_path)) == [7, 90_000, 1_000_000] and checkpoints(tmp_path / "nowhere") == {}


# --- known parts ---

def test_an_exact_denoiser_draws_the_picture_that_is_known_in_part():
    """Of eight, by four columns of six at once; by one channel of three the more often the more repeats."""
    table, steps = schedule(), timesteps(1000, 20)
    pictures = torch.randn(8, 3, 6, 6, generator=rng(0)).clamp(-1, 1)
    asked, exact = pictures.repeat(8, 1, 1, 1), exact_denoiser(pictures, table)

    def found(part, repeats):
        known = torch.zeros(64, 3, 6, 6, dtype=torch.bool)
        known[part] = True
        noise = noise_for(range(64), (3, 6, 6))
        denoise = with_known(exact, Known(asked, known, None))
        drawn = sample(denoise, noise(), steps, table, "ddpm", noise, repeats=repeats)
        return ((drawn - asked).abs().amax((1, 2, 3)) < 0.1).double().mean()
    assert found((..., slice(4)), 1) == 1
    assert found((slice(None), slice(2, None)), 1) < 0.6 and found((slice(None), slice(2, None)), 10) > 0.85


def test_a_known_pixel_tells_the_other_nearly_as_much_as_in_a_gaussian(trained, data, monkeypatch):
    """Two pixels, N(0, 1) with correlation 0.9: where one is 1.5, the other is N(1.35, 0.44^2).

    Few steps leave the mean a tenth and the deviation a seventh too small.
    """
    asked, joint = {}, torch.zeros(1, 3 + 3, 16, 16)

    def draw(self, seeds, steps, sampler, switch_t, size, known, repeats):
        asked.update(timesteps=steps, method=sampler, repeats=repeats)
        return joint
    monkeypatch.setattr(DefectGen, "draw", draw)                    # how does paint sample?
    images, masks = open_dataset(data, (16, 16)).subset([0]).tensors()
    DefectGen.load(trained).paint(images, masks, masks == 0, [0])

    table, both = schedule(), torch.tensor([[1, 0.9], [0.9, 1]], dtype=torch.float64)

    def exact(x_t, t):
        signal, noise = table[t], (1 - table[t]) * torch.eye(2)
        return torch.einsum("ij,njhw->nihw", signal ** 0.5 * both @ (signal * both + noise).inverse(), x_t)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(3000, 2, 1, 1, dtype=torch.float64, generator=generator)
    known, where = torch.full((3000, 2, 1, 1), 1.5), torch.tensor([True, False]).view(1, 2, 1, 1)
    denoise = with_known(exact, Known(known, where, None))
    drawn = sample(denoise, noise(), alphas_cumprod=table, noise=noise, **asked)[:, 1]
    assert drawn.mean().item() == pytest.approx(1.35, abs=0.1)
    assert 0.33 < drawn.std().item() < 0.44
    once = sample(denoise, noise(), alphas_cumprod=table, noise=noise, **{**asked, "repeats": 1})[:, 1]
    assert once.mean() < 1                                          # why steps are repeated

    added = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)
    answer = guided(exact, Known(known, where, added), table)(torch.full_like(known, 0.5).double(), 600)
    a = table[600].item()                                           # E[x | x_t] = m x_t, in closed form
    m = math.sqrt(a) * both @ (a * both + (1 - a) * torch.eye(2)).inverse()
    wanted = 0.5 * m.sum(1) + GUIDANCE * m[:, 0] * math.sqrt(a) * 3
    assert answer[0].flatten().tolist() == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("stages", ["trained", "relay"])            # of one size, of two
def test_guidance_asks_small_again_without_the_defect_that_is_added(stages, data, request, monkeypatch):
    asked, draw = [], DefectGen.draw
    monkeypatch.setattr(DefectGen, "draw", lambda self, *args: asked.append(args[5]) or draw(self, *args))
    images, old = open_dataset(data, (16, 16)).subset([0]).tensors()
    region = torch.zeros(1, 16, 16, dtype=torch.bool)
    region[:, 10:14, 10:14] = True
    assert old.any() and not old[region].any()
    generator, masks = DefectGen.load(request.getfixturevalue(stages)), old.where(~region, 2)
    calls = Counter()
    for name in STAGES:
        getattr(generator, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    steps = generator.timesteps(PAINT_STEPS, "logsnr", SWITCH_T)
    generator.paint(images, masks, region, [0])
    known, encode = asked[0], generator.joint.encode
    assert torch.equal(known.x_start, encode(images, masks))
    assert torch.equal(known.added, encode(images, masks) - encode(images, old))
    below, again = sum(t < SWITCH_T for t in steps), sum(GUIDED_FROM <= t < SWITCH_T for t in steps)
    assert 0 < again < below and calls["small"] == REPEATS * (below - 1 + again) + 1    # the last comes once
    above = PAINT_STEPS - (below if stages == "trained" else 1)
    assert calls["large"] == REPEATS * above + (stages == "relay")


@pytest.mark.parametrize("stages", ["trained", "relay"])            # of one size, of two
def test_where_nothing_is_known_a_pair_is_drawn_and_painting_changes_the_region_alone(stages, data, request):
    generator = DefectGen.load(request.getfixturevalue(stages))
    nothing = torch.zeros(2, generator.config["channels"] + len(generator.classes), 16, 16)
    how = generator.timesteps(6, "logsnr", SWITCH_T), "ddpm", SWITCH_T, generator.size
    drawn = generator.joint.decode(generator.draw([4, 5], *how, Known(nothing, nothing > 0, nothing)))
    assert all(map(torch.equal, drawn, generator.sample([4, 5], 6, "ddpm")))
    images, masks = open_dataset(data, (16, 16)).subset([0, 1]).tensors()
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[:, 3:9, 5:12] = True
    painted = generator.paint(images, masks, region, [4, 5], 6)
    outside = ~region[:, None].expand_as(images)
    assert torch.equal(painted[outside], images[outside]) and not torch.equal(painted, images)
    assert torch.equal(generator.paint(images[1:], masks[1:], region[1:], [5], 6)[0], painted[1])


def test_what_the_small_network_cannot_see_is_not_computed(relay, data, monkeypatch):
    generator = DefectGen.load(relay)
    big = generator.size = (32, 64)                                 # its field is smaller
    generator.plan_size = (16, 32)
    images, masks = open_dataset(data, big).subset([0]).tensors()
    region, seen = torch.zeros(1, *big, dtype=torch.bool), []
    region[:, 2:6, 30:36] = True
    forward = generator.small.forward
    monkeypatch.setattr(generator.small, "forward", lambda x, t: seen.append(x.shape[2:]) or forward(x, t))
    part = generator.paint(images, masks, region, [0], num_steps=6)
    whole = [slice(0, n) for n in big]
    monkeypatch.setattr(defect_gen, "surroundings", lambda drawn, net: whole)
    assert torch.equal(part, generator.paint(images, masks, region, [0], num_steps=6))
    assert seen[0] != big and seen[-1] == big
