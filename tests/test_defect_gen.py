"""The hand-over: one trajectory, each network at its own timesteps; joint channels; checkpoints that fit."""
import shutil

import pytest
import torch

import defect_gen
from conftest import picture
from datasets import open_dataset
from defect_gen import (IMAGE_STD, NUM_STEPS, DefectGen, Joint, checkpoints, enlarge, exact_denoiser,
                        image_statistics, in_tiles, load_stage, save_stage, switched, with_known)
from diffusion import logsnr, noise_for, q_sample, rng, sample, schedule, timesteps
from unet import UNet


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
    assert torch.equal(way.decode(3 * joint)[1], mask) and way.decode(3 * joint)[0].max() == 255
    low, high = way.limits                      # black and white, background and class: no x_0 is beyond
    assert torch.equal(joint.clamp(low, high), joint) and torch.equal(joint.amax((0, 2, 3)), high.flatten())
    assert way.weights[:channels].sum().item() == way.weights[channels:].sum().item() == pytest.approx(0.5)


def test_images_are_standardised_over_the_training_set_whatever_the_size(data):
    def statistics(size):
        return image_statistics(open_dataset(data, size, "train"))
    found = statistics((24, 32))
    assert found == statistics((8, 8))                          # both stages have the same
    images, masks = open_dataset(data, (64, 64), "train").tensors()
    image = Joint(found, 3).encode(images, masks)[:, :3]
    torch.testing.assert_close(image.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(image.std((0, 2, 3)), torch.full((3,), IMAGE_STD))
    # So photos of any contrast are as strong as the noise at one timestep, close to the switch.
    assert (IMAGE_STD ** 2 * logsnr(schedule()).exp() > 1).sum() == 383


@pytest.mark.parametrize("switch_t", [0, 1, 400, 999, 1000])
@pytest.mark.parametrize("num_steps", [1, 2, 20, 1000])
def test_each_network_receives_exactly_its_timesteps(switch_t, num_steps):
    seen = {"large": [], "small": []}

    def network(name):
        return lambda x_t, t: seen[name].append(t) or torch.zeros_like(x_t)

    steps = timesteps(1000, num_steps, "even")
    sample(switched(network("large"), network("small"), switch_t), torch.zeros(1, 1, 2, 2), steps, schedule())
    assert seen["large"] == [t for t in steps if t >= switch_t]
    assert seen["small"] == [t for t in steps if t < switch_t]
    if num_steps == 1000:                                       # nothing skipped, repeated or renumbered
        assert seen["large"] + seen["small"] == list(range(999, -1, -1))


def test_two_equal_networks_are_one_network():
    def network(x_t, t):
        return torch.tanh(x_t) * (1 - t / 1000)
    x_T, steps = noise_for([3, 4], (2, 4, 4))(), timesteps(1000, 20)
    alone = sample(network, x_T, steps, schedule())
    assert torch.equal(alone, sample(switched(network, network, 400), x_T, steps, schedule()))


def test_the_exact_denoiser_copies_a_training_image():
    data, noise = torch.rand(5, 3, 4, 4) * 2 - 1, noise_for(range(8), (3, 4, 4))()
    drawn = sample(exact_denoiser(data, schedule()), noise, timesteps(1000, 50), schedule())
    assert torch.cdist(drawn.flatten(1), data.flatten(1)).min(1).values.max() < 1e-3


# --- sampling a trained run ---

@pytest.mark.parametrize("sampler, target", [("dpm++", "x0"), ("ddim", "v"), ("ddpm", "v"), ("ddpm", "x0")])
def test_picture_17_is_the_same_alone_and_in_a_batch_with_every_sampler(trained, sampler, target):
    generator, seeds = DefectGen.load(trained), [5, 17, 99, 3]
    generator.config = {**generator.config, "target": target}

    def draw(seeds, **settings):
        return generator.sample(seeds, 6, sampler, **settings)

    images, masks = draw(seeds)
    assert images.shape == (4, 3, 16, 16) and masks.shape == (4, 16, 16)
    assert images.dtype == masks.dtype == torch.uint8 and masks.max() < len(generator.classes)
    assert torch.equal(draw(seeds)[0], images) and not torch.equal(images[0], images[1])
    off = draw([17])[0][0].int() - images[1].int()  # how a sum is rounded depends on the batch
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 0.01
    generator.large.double(), generator.small.double()          # with less rounding nothing is left of it
    exact, exact_masks = draw(seeds)
    for batch_size in 1, 3:
        again, again_masks = draw(seeds, batch_size=batch_size)
        assert torch.equal(again, exact) and torch.equal(again_masks, exact_masks)
    assert draw([1], size=(24, 40))[0].shape == (1, 3, 24, 40)


def test_each_stage_is_asked_in_its_own_timesteps_and_answers_with_its_average(trained):
    generator, seen = DefectGen.load(trained), []
    for stage in ("large", "small"):
        net, checkpoint = getattr(generator, stage), load_stage(trained / stage, stage)
        net.register_forward_pre_hook(lambda net, inputs, stage=stage: seen.append((stage, inputs[1])))
        assert not net.training and generator.steps_trained[stage] == 4
        model, ema, sampled = checkpoint["model"], checkpoint["ema"], net.state_dict()
        assert all(torch.equal(sampled[key], value) for key, value in ema.items())
        assert not all(torch.equal(model[key], value) for key, value in ema.items())
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
    words = f"{num_steps} steps, {by_large} of them by the large network; picture: {out}"
    assert words in capsys.readouterr().out
    assert picture(out).shape[1] > 132 * num_steps                                      # one column per step


# --- two sizes ---

@pytest.fixture
def relay(trained, tmp_path):
    """The trained run as one whose plans are half as large, over all timesteps."""
    run = shutil.copytree(trained, tmp_path / "relay")
    edit(run, "large", lambda checkpoint: checkpoint["config"].update(size=[8, 8], t_range=[0, 1000]))
    return run


def test_a_plan_is_drawn_to_its_end_enlarged_and_noised_to_the_first_step_of_small(relay):
    generator, steps, seen = DefectGen.load(relay), timesteps(1000, NUM_STEPS), []
    images, masks = generator.sample([3], on_step=lambda t, x_t, pred: seen.append((t, *x_t.shape[2:])))
    below = [t for t in steps if t < 400]
    assert seen == [(t, 8, 8) for t in steps] + [(t, 16, 16) for t in below]

    table, limits = schedule(), generator.joint.limits          # the same, step by step
    x_T = noise_for([3], (6, 8, 8))()
    plan = sample(generator.denoiser(generator.large), x_T, steps, table, limits=limits)
    x = q_sample(enlarge(plan, (16, 16)), below[0], noise_for([~3], (6, 16, 16))(), table)
    joint = sample(generator.denoiser(generator.small), x, below, table, limits=limits)
    assert all(map(torch.equal, generator.joint.decode(joint), (images, masks)))

    planned = generator.sample([3], switch_t=0)                 # large alone: the plan, enlarged
    assert torch.equal(planned[1], generator.joint.decode(enlarge(plan, (16, 16)))[1])
    assert torch.equal(generator.sample([9, 3])[1][1], masks[0])                # a function of its seed
    assert generator.sample([3], size=(24, 40))[0].shape == (1, 3, 24, 40)


def test_a_plan_of_another_size_needs_a_large_stage_that_knows_all_timesteps(relay):
    edit(relay, "large", lambda checkpoint: checkpoint["config"].update(t_range=[350, 1000]))
    with pytest.raises(ValueError, match="draws to the end, but knows only 350 <= t: .* --t-range full"):
        DefectGen.load(relay).sample([0])


@pytest.mark.parametrize("depth, blocks", [(0, 1), (1, 1), (1, 2), (2, 1)])
def test_pieces_with_margins_give_the_same_as_one_piece(depth, blocks, monkeypatch):
    torch.manual_seed(0)
    net = UNet(4, 8, (1, 2, 2)[:depth + 1], blocks, attention_levels=(), middle=False, norm="local").double()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)     # else the last layer answers 0
    x_t, shapes = torch.randn(2, 4, 200, 328, dtype=torch.float64), []
    whole = net(x_t, 7)
    monkeypatch.setattr(defect_gen, "TILE", 128)
    net.register_forward_pre_hook(lambda net, inputs: shapes.append(inputs[0].shape[2:]))
    torch.testing.assert_close(in_tiles(net, x_t, 7), whole, rtol=0, atol=1e-12)
    assert len(shapes) == 6 and max(max(shape) for shape in shapes) <= 128 + 2 * 64


# --- checkpoints that do not fit ---

@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def edit(run, stage, change):
    """Change a stage's newest checkpoint on disk."""
    path = checkpoints(run / stage)[4]
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_a_run_with_one_stage_names_the_missing_one(copy):
    shutil.rmtree(copy / "small")
    with pytest.raises(FileNotFoundError, match="no checkpoint of the small stage; train it with: "
                                                f"python train.py --stage small --out {copy}"):
        DefectGen.load(copy)
    with pytest.raises(FileNotFoundError, match="--run .*nowhere: no such folder; train first"):
        DefectGen.load(copy / "nowhere")


def test_a_checkpoint_of_before_the_statistics_is_refused(copy):
    edit(copy, "large", lambda checkpoint: checkpoint["config"].pop("statistics"))
    with pytest.raises(ValueError, match="step_000004.pt: of an older version, .*; train again"):
        DefectGen.load(copy)


def test_a_checkpoint_of_the_wrong_stage_is_refused(copy):
    shutil.rmtree(copy / "small")
    shutil.copytree(copy / "large", copy / "small")
    with pytest.raises(ValueError, match="step_000004.pt: holds the large stage, not small; .* swapped"):
        DefectGen.load(copy)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint",
                                    lambda b: bytes(100), lambda b: b[:40] + b[44:]])
def test_a_damaged_checkpoint_is_named_and_the_older_one_can_be_asked_for(copy, damage):
    path = checkpoints(copy / "large")[4]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: damaged, or not written by this program .*; remove it"):
        DefectGen.load(copy)
    assert DefectGen.load(copy, step=2).steps_trained == {"large": 2, "small": 2}


def test_a_pickle_that_would_run_code_is_refused(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))
    torch.save({"stage": "large", "model": Evil()}, checkpoints(copy / "large")[4])
    with pytest.raises(ValueError, match="damaged, or not written by this program"):
        DefectGen.load(copy)
    assert not (tmp_path / "was_here").exists()


def test_averages_are_loaded_strictly(copy):
    edit(copy, "small", lambda checkpoint: checkpoint["ema"].popitem())
    with pytest.raises(RuntimeError, match="Missing key"):
        DefectGen.load(copy)


@pytest.mark.parametrize("key, value", [("images", ["crack/007"]), ("classes", ["background", "b", "c"]),
                                        ("channels", 1), ("statistics", {"mean": [0] * 3, "std": [1] * 3}),
                                        ("augment", ["flip"]), ("T", 500), ("target", "x0")])
def test_stages_that_do_not_fit_together_are_refused(copy, key, value):
    edit(copy, "small", lambda checkpoint: checkpoint["config"].update({key: value}))
    with pytest.raises(ValueError, match=f"run: the stages differ in {key}.*; train one of them again"):
        DefectGen.load(copy)


def test_a_stage_is_not_asked_at_timesteps_it_was_never_trained_at(copy):
    generator = DefectGen.load(copy)
    assert generator.t_ranges == {"large": [350, 1000], "small": [0, 450]}
    for switch_t in (350, 400, 450):
        assert generator.timesteps(1000, "even", switch_t) == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="--switch-t 349 asks the large stage at t = 349, but it knows "
                                         "350 <= t < 1000: use 350 to 450, or train with --t-range full"):
        generator.timesteps(1000, "even", 349)
    with pytest.raises(ValueError, match="--switch-t 451 asks the small stage at t = 450.* 0 <= t < 450"):
        generator.timesteps(1000, "even", 451)
    with pytest.raises(ValueError, match="--switch-t 1000 asks the small stage at t = 999"):
        generator.sample([0], num_steps=4, switch_t=1000)
    edit(copy, "large", lambda checkpoint: checkpoint["config"].update(t_range=[0, 1000]))
    assert DefectGen.load(copy).timesteps(1000, "even", 0)


def test_an_older_checkpoint_can_be_asked_for(trained):
    assert list(checkpoints(trained / "small")) == [2, 4] and checkpoints(trained / "nowhere") == {}
    new, old = (DefectGen.load(trained, step=step) for step in (None, 2))
    assert new.steps_trained == {"large": 4, "small": 4} and old.steps_trained == {"large": 2, "small": 2}
    assert not torch.equal(new.small.input.weight, old.small.input.weight)
    with pytest.raises(FileNotFoundError, match="no checkpoint at step 3 of the large stage"):
        DefectGen.load(trained, step=3)


def test_a_saved_stage_is_loaded_bit_for_bit_and_steps_are_numbers(tmp_path):
    net, ema = UNet(4, 8, (1, 2), attention_levels=()), UNet(4, 8, (1, 2), attention_levels=())
    optimizer = torch.optim.AdamW(net.parameters())
    config = {"stage": "large", "statistics": {}}
    for step in 7, 1_000_000, 90_000:
        save_stage(tmp_path / f"step_{step:06d}.pt", net, ema, optimizer, step, config)
    assert list(checkpoints(tmp_path)) == [7, 90_000, 1_000_000]
    loaded = load_stage(tmp_path, "large")
    found = loaded["step"], loaded["config"], loaded["network"]
    assert found == (1_000_000, config, net.config)
    for name, module in (("model", net), ("ema", ema)):
        assert all(torch.equal(loaded[name][key], value) for key, value in module.state_dict().items())


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
        denoise = with_known(exact, asked, known)
        drawn = sample(denoise, noise(), steps, table, "ddpm", noise, repeats=repeats)
        return ((drawn - asked).abs().amax((1, 2, 3)) < 0.1).double().mean()
    assert found((..., slice(4)), 1) == 1
    assert found((slice(None), slice(2, None)), 1) < 0.6 and found((slice(None), slice(2, None)), 10) > 0.85


@pytest.mark.parametrize("stages", ["trained", "relay"])            # of one size, of two
def test_painting_changes_the_region_alone_and_a_region_of_everything_is_a_drawn_pair(stages, data, request):
    generator = DefectGen.load(request.getfixturevalue(stages))
    images, masks = open_dataset(data, (16, 16)).subset([0, 1]).tensors()
    everything, region = torch.ones(2, 16, 16, dtype=torch.bool), torch.zeros(2, 16, 16, dtype=torch.bool)
    drawn = generator.paint(images, masks, everything, [4, 5], mask_given=False, num_steps=6, repeats=1)
    assert all(map(torch.equal, drawn, generator.sample([4, 5], 6)))
    region[:, 3:9, 5:12] = True
    for mask_given in (True, False):
        new_images, new_masks = generator.paint(images, masks, region, [4, 5], mask_given, 6)
        outside = ~region[:, None].expand_as(images)
        assert torch.equal(new_images[outside], images[outside]) and not torch.equal(new_images, images)
        assert torch.equal(new_masks[~region], masks[~region])
        assert torch.equal(new_masks, masks) or not mask_given
    again = generator.paint(images[1:], masks[1:], region[1:], [5], False, 6)
    assert torch.equal(again[0][0], new_images[1]) and torch.equal(again[1][0], new_masks[1])


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
    assert all(map(torch.equal, part, generator.paint(images, masks, region, [0], num_steps=6)))
    assert seen[0] != big and seen[-1] == big
