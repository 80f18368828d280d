"""The hand-over: one trajectory, each network at its own timesteps; joint channels; checkpoints that say what is wrong with them."""
import shutil

import pytest
import torch

from defect_gen import DefectGen, checkpoints, decode, encode, exact_denoiser, load_stage, open_training, steps_of, strip, switched
from diffusion import noise_for, sample, schedule, timesteps


@pytest.mark.parametrize("channels, num_classes", [(1, 2), (3, 6), (3, 1)])
def test_decode_inverts_encode(channels, num_classes):
    image = torch.randint(0, 256, (4, channels, 8, 12), dtype=torch.uint8)
    mask = torch.randint(0, num_classes, (4, 8, 12), dtype=torch.uint8)
    joint = encode(image, mask, num_classes)
    assert joint.shape == (4, channels + num_classes, 8, 12) and joint.min() >= -1 and joint.max() <= 1
    assert set(joint[:, channels:].unique().tolist()) <= {-1.0, 1.0}
    again_image, again_mask = decode(joint, num_classes)
    assert torch.equal(again_image, image) and torch.equal(again_mask, mask)


def test_decode_of_every_grey_level_is_exact():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(decode(encode(image, torch.zeros(1, 16, 16), 2), 2)[0], image)


@pytest.mark.parametrize("switch_t", [0, 1, 400, 999, 1000])
@pytest.mark.parametrize("num_steps", [1, 2, 20, 1000])
def test_each_network_receives_exactly_its_timesteps(switch_t, num_steps):
    seen = {"large": [], "small": []}

    def network(name):
        return lambda x_t, t: seen[name].append(t) or torch.zeros_like(x_t)

    steps = timesteps(1000, num_steps, "even")
    sample(switched(network("large"), network("small"), switch_t), torch.zeros(1, 1, 2, 2), steps, schedule(), "ddim")
    assert seen["large"] == [t for t in steps if t >= switch_t] and seen["small"] == [t for t in steps if t < switch_t]
    if num_steps == 1000:
        assert seen["large"] + seen["small"] == list(range(999, -1, -1))        # nothing skipped, repeated or renumbered


def test_two_equal_networks_are_one_network():
    def network(x_t, t):
        return torch.tanh(x_t) * (1 - t / 1000)
    x_T = noise_for([3, 4], (2, 4, 4))()
    alone = sample(network, x_T, timesteps(1000, 20), schedule())
    assert torch.equal(alone, sample(switched(network, network, 400), x_T, timesteps(1000, 20), schedule()))


def test_the_exact_denoiser_copies_a_training_image():
    data = torch.rand(5, 3, 4, 4) * 2 - 1
    drawn = sample(exact_denoiser(data, schedule()), noise_for(range(8), (3, 4, 4))(), timesteps(1000, 50), schedule())
    assert torch.cdist(drawn.flatten(1), data.flatten(1)).min(1).values.max() < 1e-3


# --- with a trained run ---

def test_sample_17_is_the_same_alone_and_in_a_batch(trained):
    generator = DefectGen.load(trained)
    images, masks = generator.sample([5, 17, 99, 3], num_steps=6)
    alone, alone_mask = generator.sample([17], num_steps=6)
    assert images.shape == (4, 3, 16, 16) and masks.shape == (4, 16, 16) and images.dtype == masks.dtype == torch.uint8
    assert torch.equal(alone[0], images[1]) and torch.equal(alone_mask[0], masks[1])
    assert not torch.equal(images[0], images[1])
    chunked, _ = generator.sample([5, 17, 99, 3], num_steps=6, batch_size=3)
    assert torch.equal(chunked, images)


def test_ema_weights_are_the_ones_sampled(trained):
    generator, checkpoint = DefectGen.load(trained), load_stage(trained / "small", "small")
    assert all(torch.equal(generator.small.state_dict()[k], v) for k, v in checkpoint["ema"].items())
    assert any(not torch.equal(checkpoint["model"][k], v) for k, v in checkpoint["ema"].items())


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_with_one_stage_names_the_missing_one(copy):
    shutil.rmtree(copy / "small")
    with pytest.raises(FileNotFoundError, match="no checkpoint of the small stage; train it with: python train.py --stage small --out"):
        DefectGen.load(copy)
    with pytest.raises(FileNotFoundError, match="--run .*nowhere: no such folder"):
        DefectGen.load(copy / "nowhere")


def test_a_checkpoint_of_the_wrong_stage_is_refused(copy):
    shutil.rmtree(copy / "small")
    shutil.copytree(copy / "large", copy / "small")
    with pytest.raises(ValueError, match="defect-gen/large, but defect-gen/small is expected"):
        DefectGen.load(copy)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint", lambda b: b"\x00" * 100])
def test_a_damaged_checkpoint_is_named(copy, damage):
    older, path = checkpoints(copy / "large")
    older.unlink()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}: damaged or not a checkpoint"):
        DefectGen.load(copy)


def test_a_pickle_that_would_run_code_is_refused(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))
    torch.save({"kind": "defect-gen/large", "model": Evil()}, checkpoints(copy / "large")[-1])
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        DefectGen.load(copy)
    assert not (tmp_path / "was_here").exists()


def test_stages_trained_on_different_images_are_refused(copy):
    path = checkpoints(copy / "small")[-1]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["images"][0] = "crack/007"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="trained on different images"):
        DefectGen.load(copy)


def test_a_stage_is_not_asked_at_timesteps_it_was_never_trained_at(copy):
    for stage, t_range in {"large": [350, 1000], "small": [0, 450]}.items():
        path = checkpoints(copy / stage)[-1]
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["config"]["t_range"] = t_range
        torch.save(checkpoint, path)
    generator = DefectGen.load(copy)
    assert generator.t_ranges == {"large": [350, 1000], "small": [0, 450]}
    for switch_t in (350, 400, 450):
        generator.steps(1000, "even", switch_t)
    between = "choose --switch-t between 350 and 450, or train the"
    with pytest.raises(ValueError, match=rf"--switch-t 349 asks the large stage at t = 349, but .* t = 350 to 999 only: {between} large"):
        generator.steps(1000, "even", 349)
    with pytest.raises(ValueError, match=rf"--switch-t 451 asks the small stage at t = 450, but .* t = 0 to 449 only: {between} small"):
        generator.steps(1000, "even", 451)
    with pytest.raises(ValueError, match="--switch-t 1000 asks the small stage at t = 999"):
        generator.sample([0], num_steps=4, switch_t=1000)


def test_a_checkpoint_from_before_t_range_is_asked_anywhere(copy):
    path = checkpoints(copy / "small")[-1]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]["t_range"]
    torch.save(checkpoint, path)
    assert DefectGen.load(copy).t_ranges == {"large": [350, 1000], "small": [0, 1000]}


def test_stages_that_do_not_fit_together_are_refused(copy):
    path = checkpoints(copy / "small")[-1]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["classes"] = ["background", "other", "names"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="do not fit together: classes"):
        DefectGen.load(copy)


def test_an_older_checkpoint_can_be_asked_for(trained):
    assert steps_of(trained / "small") == [2, 4]
    new, old = (DefectGen.load(trained, step=step) for step in (None, 2))
    assert new.fingerprint == DefectGen.load(trained, step=4).fingerprint != old.fingerprint
    with pytest.raises(FileNotFoundError, match="no checkpoint of the large stage at step 3"):
        DefectGen.load(trained, step=3)


def test_a_strip_shows_the_first_and_last_step_and_who_was_asked():
    def draw(on_step):
        for t in (999, 500, 400, 399, 0):
            on_step(t, torch.full((1, 5, 4, 4), t / 1000), torch.zeros(1, 5, 4, 4))

    titles, rows = strip(draw, 2, 400, most=4)
    assert titles == ("large t=999", "large t=500", "small t=399", "small t=0")
    assert [name for name, _ in rows] == ["x_t", "image", "mask"] and all(len(pictures) == 4 for _, pictures in rows)
    assert rows[0][1][1].unique().tolist() == [191]                 # (0.5 + 1) * 127.5


def test_training_images_that_are_no_longer_the_same_are_refused(data, trained):
    config = load_stage(trained / "large", "large")["config"]
    assert len(open_training(trained, config, (8, 8))) == 15
    with pytest.raises(ValueError, match="no longer the 1 images"):
        open_training(trained, {**config, "images": ["crack/000"]}, (8, 8))
    with pytest.raises(ValueError, match="has the classes background, crack, dirt"):
        open_training(trained, {**config, "classes": ["background", "crack"]}, (8, 8))
