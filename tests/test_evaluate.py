"""Measures are exact where the answer is known; the experiments score nothing that was trained on."""
import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import sample
import segment
import train
from conftest import TINY, picture
from data.drawn import draw
from datasets import augment, open_dataset
from evaluate import (defect_crops, halves, laplacian_pyramid, mask_fit, measure, novelty, shape_distance,
                      sliced_wasserstein, spread, variants, wasserstein)

RANDOM = torch.Generator().manual_seed(5)
PICTURES = F.interpolate(torch.randint(0, 256, (12, 3, 6, 6), generator=RANDOM).float(),
                         size=24,
                         mode="bilinear").byte()


# --- measures ---

def test_the_pyramid_adds_up_to_the_image():
    images = torch.rand(2, 3, 16, 24)
    fine, middle, small = laplacian_pyramid(images, 3)

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fine + up(middle + up(small)), images)
    assert small.shape == (2, 3, 4, 6)


def test_wasserstein_of_gaussians_of_a_shift_and_of_sets_of_other_sizes():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200_000, generator=rng) for _ in range(2))
    assert wasserstein(a, b + 3).item() == pytest.approx(3, abs=0.02)
    assert wasserstein(a, 2 * b).item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)      # E|z|
    assert wasserstein(a, a[torch.randperm(len(a), generator=rng)]) == 0
    assert wasserstein(torch.arange(4.0), torch.arange(4.0).repeat_interleave(5)) == 0
    assert wasserstein(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0])) == 0.5


def test_sliced_wasserstein_equals_loops_over_patches_and_directions():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (2, 1, 8, 9), generator=rng).byte() for _ in range(2))
    directions = torch.randn(5, 1, 7, 7, generator=torch.Generator().manual_seed(3))
    expected = []
    for direction in directions:
        direction = (direction / direction.norm()).numpy()
        along = [np.sort([(image[0, y:y + 7, x:x + 7].numpy() / 255 * direction[0]).sum()
                          for image in images for y in range(2) for x in range(3)]) for images in (a, b)]
        expected.append(np.abs(along[0] - along[1]).mean() / along[1].std(ddof=1))
    found = sliced_wasserstein(a, b, projections=5, seed=3)
    assert len(found) == 1 and found[0] == pytest.approx(np.mean(expected), rel=5e-3)  # quantiles: 1024 of 12


def test_equal_sets_in_any_order_are_at_distance_0_and_what_is_lost_shows_at_its_scale():
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert sliced_wasserstein(images.flip(0), images) == [0, 0, 0]
    fine, middle, coarse = sliced_wasserstein(F.avg_pool2d(images.float(), 3, 1, 1), images)
    assert fine > 2 * coarse and fine > 0.3
    brighter = sliced_wasserstein(images.float() + 10, images)
    assert brighter[0] < 0.01 and brighter[2] > 0.1  # a shift is no detail


@pytest.mark.parametrize("names", [[], ["flip"], ["turn"], ["flip", "turn"]])
@pytest.mark.parametrize("size", [(4, 4), (4, 6)])
def test_variants_are_what_augment_draws_each_once(names, size):
    image = torch.arange(3 * size[0] * size[1]).byte().view(3, *size)
    mask, rng = torch.arange(size[0] * size[1]).byte().view(size), torch.Generator().manual_seed(0)
    drawn = [augment(image, mask, names, rng) for _ in range(100)]
    expected = {(tuple(i.flatten().tolist()), tuple(m.flatten().tolist())) for i, m in drawn}
    images, masks = variants(image[None], mask[None], names)
    assert {(tuple(i.flatten().tolist()), tuple(m.flatten().tolist()))
            for i, m in zip(images, masks)} == expected
    assert len(images) == len(expected) and torch.equal(images[0], image)
    both = variants(torch.stack([image, image + 1]), mask.repeat(2, 1, 1), names)[0]
    assert torch.equal(both[::2], images) and torch.equal(both[1::2], images + 1)  # pair i is of i % N


def test_novelty_is_0_for_copies_1_for_held_out_images_and_in_units_of_them():
    training, held_out = PICTURES[:6], PICTURES[6:]
    assert novelty(training, training, held_out).tolist() == [0] * 6
    flipped = training.flip(-1)
    assert novelty(flipped, training, held_out).min() > 0.5
    assert novelty(flipped, variants(training, training[:, 0], ["flip"])[0], held_out).tolist() == [0] * 6
    assert novelty(held_out, training, held_out).quantile(0.5) == pytest.approx(1)

    def flat(*values):                                              # distances are differences
        return torch.tensor(values).byte().view(-1, 1, 1, 1).expand(-1, 3, 5, 4)
    assert novelty(flat(100, 96, 110, 200), flat(100, 180), flat(98, 104, 108)).tolist() == [0, 1, 2.5, 5]
    noise = 10 * torch.randn(training.shape, generator=torch.Generator().manual_seed(0))
    noisy = novelty((training + noise).clamp(0, 255).byte(), training, held_out)
    assert 0 < noisy.min() and noisy.max() < evaluate.COPY_BELOW                            # grain is not new
    with pytest.raises(ValueError, match="half of the held-out images are training images"):
        novelty(held_out, training, training)


def test_shape_distance_grows_with_a_broken_outline_and_not_with_texture():
    rng = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centres = 16 + 2 * torch.randn(40, 2, generator=rng)
    discs = torch.stack([100 + 100 * ((y - a) ** 2 + (x - b) ** 2 < 80) for a, b in centres])[:, None].float()
    images = (discs + 5 * torch.randn(discs.shape, generator=rng)).clamp(0, 255).byte()
    images, reference = images[:20], images[20:]
    real = shape_distance(images, reference).mean().item()
    assert real == pytest.approx(1, abs=0.2)
    assert shape_distance(images.roll((16, 16), (2, 3)), reference).mean() > 3 * real
    noisy = (images + 15 * torch.randn(images.shape, generator=rng)).clamp(0, 255).byte()
    assert shape_distance(noisy, reference).mean().item() == pytest.approx(real, abs=0.12)


def test_mask_fit_is_the_overlap_of_any_defect():
    masks, seen = torch.zeros(4, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, :2], seen[0, :2] = 1, 2                                # the same place, another class
    masks[1, :2], seen[1, 1:3] = 1, 1                               # 4 of 12 pixels
    masks[2, 0], masks[:, 3], seen[:, 3] = 3, 255, 1                # where masks are ignored, all is well
    fit = mask_fit(seen, masks)
    assert torch.equal(fit[:3], torch.tensor([1, 1 / 3, 0])) and fit[3].isnan()


def test_grain_is_the_difference_of_neighbours_each_way():
    stripes = torch.tensor([10, 14, 10, 14], dtype=torch.uint8).expand(2, 1, 3, 4)
    assert evaluate.grain(stripes) == [4, 0] and evaluate.grain(stripes.transpose(2, 3)) == [0, 4]


def test_a_copier_is_exposed_and_held_out_pictures_are_not():
    training, reference, others = PICTURES[:4], PICTURES[4:8], PICTURES[8:]
    masks = torch.ones(4, 24, 24, dtype=torch.uint8)
    copies, new, same = (measure((images, masks), masks, (training, masks), (reference, masks))
                         for images in (training, others, reference))
    assert copies["copies %"] == 100 and copies["novelty"] == copies["defect novelty"] == 0
    assert new["copies %"] == 0 and new["defect novelty"] > 0.5
    assert copies["mask fit %"] == 100 and same["patch distance"] == 0


def test_defect_crops_look_at_the_largest_defect_and_stay_inside():
    masks = torch.zeros(3, 24, 24, dtype=torch.uint8)
    masks[0, 2:6, 3:9], masks[0, 20, 20], masks[:, 12:20] = 1, 2, 255       # its middle is 4, 6
    masks[2, 22:, 23] = 1                                           # masks[1] has none
    crops = defect_crops(PICTURES[:3], masks, 6)
    assert torch.equal(crops, torch.stack([PICTURES[0, :, 1:7, 3:9], PICTURES[2, :, 18:, 18:]]))
    assert defect_crops(PICTURES[:1], masks[1:2], 6).shape == (0, 3, 6, 6)


def test_halves_hold_half_of_each_kind_whatever_the_order_of_the_images(data):
    whole = open_dataset(str(data))
    turned = whole.subset(range(len(whole) - 1, -1, -1))
    names = [[{part.samples[i].name for i in half} for half in halves(part, seed)]
             for part, seed in ((whole, 0), (turned, 0), (whole, 1))]
    assert names[0] == names[1] != names[2]
    for half in names[0]:
        assert sorted(name.split("/")[0] for name in half) == ["crack"] * 4 + ["dirt"] * 4


@pytest.mark.parametrize("alike", [0.0, 0.8, 1.0])
def test_the_interval_covers_the_rate_for_new_images_however_alike_the_seeds_are(alike):
    rng, rate, images, seeds, covered = np.random.default_rng(0), 0.8, 60, 3, 0
    for _ in range(400):
        own = rng.random((images, seeds)) < rate
        same = rng.random((images, 1)) < alike                      # then all seeds judge as the first
        hits = np.where(same, own[:, :1], own).sum()
        low, high = (float(end) / 100 for end in evaluate.interval(hits, images * seeds, seeds).split(" to "))
        covered += low <= rate <= high
    assert covered >= 0.93 * 400
    assert evaluate.interval(0, 0, 3) == "–"


def test_spread_is_the_sample_standard_deviation():
    assert spread([50, 60, 70], 1) == "60.0 ± 10.0" and spread([50.0], 0) == "50"
    assert spread([1, math.nan], 1) == "–"


def test_class_shares_count_pixels_and_images():
    masks = torch.zeros(4, 2, 5, dtype=torch.uint8)
    masks[0, 0, :3], masks[1, 1, 1] = 1, 2
    masks[2] = 255                                                  # neither a class nor background
    assert evaluate.class_shares(masks, 3) == ["50", "7.50 (25)", "2.50 (25)"]


# --- the experiments ---

@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    run = shutil.copytree(trained, tmp_path_factory.mktemp("evaluate") / "bolt")
    sample.draw_pairs(sample.parse_args(["--run", str(run), "--count", "12", "--num-steps", "2"]))
    return run


@pytest.fixture
def standard(tmp_path):
    """Cracks are not allowed, small dirt is; its name would be markup."""
    rules = [{"name": "<b>no</b> cracks", "classes": ["crack"], "max_area_px": 0},
             {"classes": ["dirt"], "max_area_px": 500}]
    path = tmp_path / "bolt.json"
    path.write_text(json.dumps({"object": "bolt", "native_size": [24, 32], "rules": rules}))
    return path


def go(run, *flags):
    evaluate.evaluate(evaluate.parse_args(["--run", str(run), "--quick", *map(str, flags)]))
    return json.loads((run / "quick/metrics.json").read_text())


def test_all_three_with_a_standard_of_ones_own(sampled, standard, capsys):
    metrics = go(sampled, "--standard", standard)
    assert list(metrics) == ["generation", "segmentation", "inspection"]
    report = (sampled / "quick/report.html").read_text()
    for word in ("Generation", "Segmentation", "Inspection", "data:image/png;base64",
                 "the numbers mean nothing", "&lt;b&gt;no&lt;/b&gt; cracks", "color-scheme: light dark"):
        assert word in report
    assert "http" not in report and "<script" not in report and "<b>" not in report
    for figure in ("nearest.png", "real.png", "segmentation.png"):
        assert picture(sampled / "quick/figures" / figure).std() > 0
    for way, seeds in metrics["inspection"]["numbers"].items():
        assert sum(seeds[0][key] for key in ("tp", "fn", "fp", "tn")) == 8, way
        assert seeds[0]["tp"] + seeds[0]["fn"] == 3  # images with a crack
    assert list(metrics["generation"]["numbers"]) == ["other real images", "generated"]
    assert len(metrics["segmentation"]["numbers"]) == 4 and len(
        metrics["segmentation"]["tables"][0]["rows"]) == 4
    assert str(sampled / "quick/report.html") in capsys.readouterr().out


def test_one_experiment_keeps_the_results_of_the_others_and_says_what_is_not_run(sampled):
    before = go(sampled, "generation")
    after = go(sampled, "inspection")
    assert after["generation"] == before["generation"]
    assert "Not run: no standard for bolt" in " ".join(after["inspection"]["text"])


def test_a_segmenter_is_trained_once_for_two_experiments(sampled, standard, monkeypatch):
    fitted, fit = [], evaluate.fit
    monkeypatch.setattr(evaluate, "fit", lambda *a, **k: fitted.append(0) or fit(*a, **k))
    go(sampled, "segmentation", "inspection", "--arch", "deeplabv3+", "--standard", standard)
    assert len(fitted) == 3                                         # real, real + generated, original


def test_differences_are_paired_by_seed_and_pools_mix_one_to_one(sampled, monkeypatch):
    scores = iter([0.2, 0.4, 0.3, 0.5])
    monkeypatch.setattr(
        evaluate, "miou",
        lambda confusion: {"miou": (s := next(scores)), "miou_with_background": s, "iou": [s] * 3})
    args = evaluate.parse_args(["--run", str(sampled), "--quick", "--arch", "deeplabv3+"])
    args.seeds = 2
    run = evaluate.Run(args)
    row = evaluate.segmentation(run, print)["tables"][0]["rows"][0]
    assert row == ["deeplabv3+", "mIoU", "30.0 ± 14.1", "40.0 ± 14.1", "10.0 ± 0.0"]
    assert len(run.mixed[0]) == len(run.real[0]) + 12


def test_original_and_exact_labels_see_the_same_photos_in_the_same_order(sampled, monkeypatch):
    seen, view = [], segment.random_view
    monkeypatch.setattr(segment, "random_view", lambda *args: seen.append(view(*args)) or seen[-1])
    run = evaluate.Run(evaluate.parse_args(["--run", str(sampled), "--quick"]))
    for pool in ("original", "real"):
        run.predict(evaluate.INSPECTOR, pool, seed=0)
    original, exact = seen[:2], seen[2:]
    assert len(exact) == 2
    for (images, masks), (same, labels) in zip(original, exact):
        assert torch.equal(images, same)
        assert torch.equal(masks, torch.where(labels == segment.IGNORE, labels, labels.clamp(max=1)))


def test_original_masks_come_from_another_folder_by_name(sampled, data, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(data, older)
    metrics = go(sampled, "inspection", "--original", older, "--standard", own_standard(tmp_path))
    assert f"those of {older}" in metrics["inspection"]["text"][1]
    (older / "image/crack/000.png").unlink(), (older / "mask/crack/000_mask.png").unlink()
    with pytest.raises(ValueError, match="--original .*: 1 training images are missing: crack/000"):
        go(sampled, "inspection", "--original", older, "--standard", own_standard(tmp_path))


def own_standard(folder):
    path = folder / "standard.json"
    path.write_text(
        json.dumps(
            {"object": "bolt", "native_size": "mask", "rules": [{"classes": ["crack"], "max_area_px": 0}]}))
    return path


@pytest.mark.slow
def test_a_perfect_generator_is_as_real_images_and_a_copier_is_exposed():
    """Fresh pills, and training pills handed back, in the generator's place."""
    size = (48, 48)
    train, test = (open_dataset("drawn:pill", size, split) for split in ("train", "test"))
    training = train.subset(train.defective()).tensors()
    drawn = [draw("pill", 1, index, size) for index in range(180)]
    fresh = [pair[:2] for pair in drawn if pair[3] != "good"]
    images, masks = (torch.from_numpy(np.stack(part)) for part in zip(*fresh))
    sets = {"fresh": (images.permute(0, 3, 1, 2).contiguous(), masks),
            "copies": tuple(part.repeat(5, *[1] * (part.ndim - 1)) for part in training)}
    run = SimpleNamespace(args=SimpleNamespace(steps=50, seeds=3, backbone_weights=None), test=test,
                          scored=test.tensors(), classes=test.classes, device=torch.device("cpu"))
    run.network, run.segmenter = (partial(way, run) for way in (evaluate.Run.network, evaluate.Run.segmenter))
    numbers = evaluate.compare(run, training, sets, print)
    real, new, copied = ({name: np.array([part[name] for part in parts]) for name in parts[0]}
                         for parts in numbers.values())
    for name in real:
        within = 3 * math.hypot(real[name].std(ddof=1), new[name].std(ddof=1))
        assert abs(real[name].mean() - new[name].mean()) <= within, name
    assert (copied["copies %"] == 100).all() and copied["defect novelty"].max() == 0
    assert copied["mask fit %"].mean() <= real["mask fit %"].mean() + real["mask fit %"].std(ddof=1)


@pytest.mark.parametrize("flags, message", [
    (["generations"], "unknown experiment generations"), (["--split", "val"], "no split 'val'"),
    (["--seeds", "0"], "at least 1"), (["--arch", "unet"], "no architecture .unet."),
    (["--split", "train"], "shares 8 images with the training split, crack/000 among them"),
    (["--data", "drawn:pill"], "has the classes .* but .* was trained with background, crack"),
    (["inspection", "--standard", "nowhere.json"], "no standard .*nowhere.json")])
def test_bad_flags_are_one_sentence(sampled, flags, message):
    with pytest.raises(ValueError, match=message):
        go(sampled, *flags)


@pytest.mark.parametrize("native, words", [((32, 24), "swapped?"), ((24, 24), "of another shape")])
def test_a_native_size_that_does_not_fit_is_refused_first(sampled, standard, native, words, monkeypatch):
    standard.write_text(standard.read_text().replace("[24, 32]", str(list(native))))
    monkeypatch.setattr(evaluate, "judge", None)
    with pytest.raises(ValueError, match=rf"crack/005: mask is \[24, 32\].*{words}"):
        go(sampled, "inspection", "--standard", standard)


def test_the_report_begins_with_what_is_wrong(tmp_path):
    fine = {"empty %": 0, "copies %": 3, "mask fit %": 60}
    bad = {"empty %": 100, "copies %": 12, "mask fit %": 9}
    assert evaluate.faults({"other real images": [fine], "generated": [fine]}) == []
    wrong = evaluate.faults({"other real images": [fine], "generated": [bad, bad]})
    assert [text[:24] for text in wrong] == ["Masks fit their pictures"]
    result = {"title": "Generation", "wrong": wrong, "tables": [], "text": [], "figures": [], "settings": {}}
    evaluate.write_report(tmp_path, {"generation": result}, "One run from 3 < 4 photos.")
    report = (tmp_path / "report.html").read_text()
    lead = "<p>One run from 3 &lt; 4 photos. Not run: segmentation and inspection.</p>"
    assert report.index("<p class=wrong>Masks fit") < report.index(lead) < report.index("<h2>")


def test_pairs_of_other_checkpoints_are_what_the_report_begins_with(sampled, tmp_path):
    run, args = shutil.copytree(sampled, tmp_path / "run"), ["--run", str(tmp_path / "run"), "--quick"]
    assert not any("checkpoints" in sentence for sentence in evaluate.Run(evaluate.parse_args(args)).wrong)
    config = json.loads((run / "samples/config.json").read_text())
    config["steps_trained"]["small"] += 1
    (run / "samples/config.json").write_text(json.dumps(config))
    assert "of other checkpoints: draw them again." in evaluate.Run(evaluate.parse_args(args)).wrong[-1]


def test_a_training_split_that_changed_since_is_refused(sampled, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "bolt")
    for folder, end in (("image", ""), ("mask", "_mask")):  # crack/004 is pushed out of the first five
        shutil.copy(copy / folder / "crack" / f"000{end}.png", copy / folder / "crack" / f"000-b{end}.png")
    with pytest.raises(ValueError, match="no longer names the images"):
        go(sampled, "--data", copy)


def test_missing_parts_name_the_command_that_makes_them(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with: python train.py --stage large"):
        go(tmp_path)
    with pytest.raises(FileNotFoundError, match="no pairs; draw them: python sample.py"):
        go(trained)


def test_nothing_left_to_score_is_a_sentence(data, tmp_path):
    def few(folder, names):                                         # the first five alone, which train
        return [n for n in names if n[:3].isdigit() and n[:3] > "004" and not folder.endswith("good")]
    copy, out = shutil.copytree(data, tmp_path / "bolt", ignore=few), tmp_path / "run"
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(copy), "--out", str(out), *TINY]))
    with pytest.raises(ValueError, match="no image has a defect in --split test; choose another"):
        go(out)
