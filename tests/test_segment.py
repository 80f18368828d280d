"""Claims about segment.py. CPU, no download; transformers is compared with where it is installed."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import experiments.mask2former                                      # adds itself to ARCHS
import inspect_rules
import segment
from datasets import write_classes, write_image, write_json, write_pair
from data.drawn import draw
from segment import IGNORE, build, confusion_matrix, fit, miou, mix, predict

ARCHS = ["deeplabv3+", "segformer"]


def squares(n=4, size=48):
    """n images of noise, each with one red (class 1) and one blue (class 2) square, the last with none."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(100, 156, (n, 3, size, size), generator=rng).to(torch.uint8)
    masks = torch.zeros(n, size, size, dtype=torch.uint8)
    for i in range(n - 1):
        places = 4 * torch.randint(0, 2, (2, 2), generator=rng) + torch.tensor([[4, 4], [24, 24]])
        for k, ((y, x), colour) in enumerate(zip(places.tolist(), ([230, 30, 30], [30, 30, 230])), 1):
            images[i, :, y:y + 16, x:x + 16] = torch.tensor(colour).view(3, 1, 1)
            masks[i, y:y + 16, x:x + 16] = k
    return images, masks


def randomised(net, seed=0):
    """Random weights, norms and running statistics, so that no layer is an identity by its initialisation."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                noise = 0.05 * torch.randn(value.shape, generator=rng)
                value.add_(noise.abs() if name.endswith("running_var") else noise)
    return net.eval()


# --- networks ---

@pytest.mark.parametrize("arch, millions", [
    ("deeplabv3+", 12.3), ("deeplabv3+:resnet50", 26.7), ("segformer", 3.7), ("mask2former", 28.7)])
def test_networks_have_the_published_size_and_pad_any_image_without_a_shift(arch, millions):
    net = randomised(build(arch, 5))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    for h, w, below, right in ((40, 56, 24, 8), (7, 130, 57, 30)):
        x = torch.rand(1, 3, h, w)
        with torch.no_grad():
            scores, whole = net(x), net(F.pad(x, (0, right, 0, below), mode="replicate"))
        assert scores.shape == (1, 5, h, w)
        torch.testing.assert_close(scores, whole[..., :h, :w])


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_dilated_resnet_is_the_plain_one_at_twice_the_resolution(backbone):
    plain = randomised(getattr(torchvision.models, backbone)(weights=None)).double()
    x = torch.rand(1, plain.layer4[0].conv1.in_channels, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        before = plain.layer4(x)
        segment.dilate(plain.layer4)
        after = plain.layer4(x)
    assert after.shape[-2:] == (8, 6)
    torch.testing.assert_close(after[..., ::2, ::2], before)


# --- published weights ---

def their_weights(names):
    """Our SegFormer with random weights, and the same weights under a list of other names."""
    net = randomised(build("segformer", 5))
    state = net.state_dict()
    return net, {name: state[list(net.our_names({name: None}))[0]] for name in names}


def published_names():
    """The tensors of the published backbone and those of the head, as Hugging Face names them."""
    block = ["layer_norm_1", "attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense", "layer_norm_2", "mlp.dense1", "mlp.dwconv.dwconv", "mlp.dense2",
             "attention.self.sr", "attention.self.layer_norm"]
    names, head = [], [*(f"linear_c.{i}.proj" for i in range(4)), "batch_norm", "classifier"]
    for i in range(4):
        layers = block if i < 3 else block[:-2]                     # the last stage does not reduce
        names += [f"patch_embeddings.{i}.proj", f"patch_embeddings.{i}.layer_norm", f"layer_norm.{i}"]
        names += [f"block.{i}.{j}.{layer}" for j in range(2) for layer in layers]
    both, running = ("weight", "bias"), ("running_mean", "running_var")
    head = [f"{name}.{part}" for name in head for part in both] + [f"batch_norm.{part}" for part in running]
    return ([f"segformer.encoder.{name}.{part}" for name in names for part in both],
            [f"decode_head.{name}" for name in ("linear_fuse.weight", *head)])


def equal(ours, theirs):
    return all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_segformer_takes_published_files_and_the_head_where_the_classes_are_as_many(tmp_path):
    backbone, head = published_names()
    source, state = their_weights(backbone + head)                  # num_batches_tracked: older files lack it
    alone, whole, bad = (tmp_path / name for name in ("mit.bin", "b0.bin", "bad.bin"))
    torch.save({"classifier.bias": torch.zeros(1000), **{name: state[name] for name in backbone}}, alone)
    torch.save({"state_dict": state}, whole)
    for path, classes, loaded in ((alone, 5, "only"), (whole, 4, "only"), (whole, 5, "and head")):
        net = build("segformer", classes, seed=9)
        assert segment.load_backbone(net, path) == f"{path}, backbone {loaded}"
        assert equal(net.backbone, source.backbone) and (loaded == "only" or equal(net, source))
    torch.save({name: value for name, value in state.items() if "block.1.0.mlp.dense1" not in name}
               | {"segformer.encoder.neck": torch.zeros(1)}, bad)
    with pytest.raises(ValueError, match=r"missing backbone.stages.1.1.ffn.fc1.bias \(256,\), .*; "
                                         r"not wanted backbone.neck \(1,\)$"):
        segment.load_backbone(net, bad)


GOLDEN = [1.303866, 1.219513, -0.805816, 0.514631, -0.240069, -1.167645, -0.777376, -0.715449, -0.872004]


def test_segformer_logits_are_those_transformers_computed_once():
    """Weights of their_weights, image below, transformers 5.23: logits [0, :, 3, 5] and [0, 2, ::4, 7]."""
    x = torch.linspace(-2, 2, 3 * 64 * 96).sin().view(1, 3, 64, 96)
    with torch.no_grad():
        logits = their_weights([])[0].logits(x)
    found = torch.cat([logits[0, :, 3, 5], logits[0, 2, ::4, 7]])
    torch.testing.assert_close(found, torch.tensor(GOLDEN), atol=1e-5, rtol=1e-5)


def test_segformer_equals_transformers_with_the_same_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5)).eval()
    if "segformer.encoder.patch_embeddings.0.proj.weight" not in theirs.state_dict():
        pytest.skip("this transformers has other names than the published files")
    theirs.load_state_dict(their_weights(theirs.state_dict())[1])
    torch.save(theirs.state_dict(), tmp_path / "b0.bin")
    net, x = build("segformer", 5, seed=9).eval(), torch.rand(2, 3, 64, 96)
    assert segment.load_backbone(net, tmp_path / "b0.bin").endswith("backbone and head")
    with torch.no_grad():
        expected, got = theirs(pixel_values=x).logits, net.logits(x)
    assert ((got - expected).abs().max() / expected.std()).item() < 1e-5


def test_resnets_take_torchvision_files_or_its_cache_and_wrong_ones_are_named(tmp_path, monkeypatch):
    def no_route(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    net, state = build("deeplabv3+", 3), torchvision.models.resnet18().state_dict()     # random, with fc.*
    torch.save({"conv2.weight" if key == "conv1.weight" else key: value for key, value in state.items()},
               tmp_path / "name.pth")
    torch.save({**state, "conv1.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for source, sentence in (
            (tmp_path / "name.pth", r"missing backbone.conv1.weight .*; not wanted backbone.conv2.weight"),
            (tmp_path / "shape.pth", r"DeepLabV3Plus's backbone: missing backbone.conv1.weight "
                                     r"\(64, 3, 7, 7\); not wanted backbone.conv1.weight \(1,\)"),
            (tmp_path / "text.pth", "text.pth is no state dict"),
            ("imagenet", r"weights of resnet18, .*\(no route to host\): fetch \S+/resnet18-\w+.pth")):
        with pytest.raises(ValueError, match=sentence):
            segment.load_backbone(net, source)
    with pytest.raises(ValueError, match="torchvision has no ImageNet weights of SegFormer: pass the file"):
        segment.load_backbone(build("segformer", 3), "imagenet")
    with pytest.raises(FileNotFoundError):
        segment.load_backbone(net, tmp_path / "none.pth")
    cache = tmp_path / "checkpoints/resnet18-f37072fd.pth"
    cache.parent.mkdir(exist_ok=True)
    torch.save(state, cache)
    for source in (cache, "imagenet"):
        net = build("deeplabv3+", 3)
        assert segment.load_backbone(net, source) == f"{source}, backbone only"
        assert torch.equal(net.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


# --- training ---

def blobs():
    """Four 64x64 windows of drawn pills, filled by two colour stains (class 1) and two contaminations (2)."""
    pairs = []
    for index, size in ((119, 640), (126, 640), (85, 320), (57, 320)):
        image, mask, *_ = draw("pill", 0, index, (size, size))
        y, x = (round(where.mean()) - 32 for where in np.nonzero(mask))
        pairs.append((image[y:y + 64, x:x + 64].transpose(2, 0, 1), mask[y:y + 64, x:x + 64]))
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*pairs))


@pytest.mark.parametrize("arch, steps", [("deeplabv3+", 100), ("segformer", 80)])
def test_four_images_are_learned_and_predictions_do_not_depend_on_the_batch(arch, steps):
    images, masks = blobs()
    net = build(arch, 3)
    untrained = miou(confusion_matrix(predict(net, images), masks, 3))["miou"]
    losses = fit(net, images, masks, steps, batch_size=4, lr=2e-3)
    pred = predict(net, images)
    assert untrained < 0.4 and len(losses) == steps and losses[-1] < losses[0] / 3
    assert miou(confusion_matrix(pred, masks, 3))["miou"] > 0.9
    assert torch.equal(pred, torch.cat([predict(net, image[None]) for image in images]))
    assert torch.equal(pred[1:], predict(net, images[1:], batch_size=2))


@pytest.mark.parametrize("arch", ARCHS)
def test_same_seed_same_weights_from_one_grey_photo_and_the_global_stream_is_left_alone(arch):
    images, masks = squares(2, 32)

    def trained(seed):
        net = build(arch, 3, seed=0)
        fit(net, images[:1, :1], masks[:1], 2, batch_size=1, seed=seed)
        return predict(net, images[:, :1]), torch.cat([p.flatten() for p in net.parameters()]).detach()

    torch.manual_seed(1)
    (pred, first), after = trained(5), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after) and pred.shape == (2, 32, 32)
    assert torch.equal(first, trained(5)[1]) and not torch.equal(first, trained(6)[1])


def test_the_learning_rate_warms_up_and_decays(monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args))
    net = build("segformer", 3)
    monkeypatch.setattr(net, "loss", lambda x, target: net.classifier.bias.sum())       # takes no time
    fit(net, *squares(2, 32), 20, batch_size=1, lr=0.1)
    assert rates == pytest.approx([0.1 * min(1, (i + 1) / 2) * (1 - i / 20) ** 0.9 for i in range(20)])


def test_grey_input_is_repeated_and_normalised():
    x = segment.to_input(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    torch.testing.assert_close(x[0, :, 0, 0],
                               torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_a_pool_draws_its_groups_by_the_ratio_and_all_classes_of_a_group_alike():
    real = torch.zeros(100, 4, 4, dtype=torch.uint8)
    real[:90, 0, 0], real[90, 0, 0] = 1, 2                            # 90 images of class 1, one of 2, 9 good
    real[95, 1] = IGNORE                                              # which is no class
    generated = (torch.arange(200) % 4 == 0).byte().view(200, 1, 1).expand(200, 4, 4)     # 50 of class 1

    def shares(table, edges):
        """Of the draws of 500 batches, those between two edges."""
        draws = [segment.draw_indices(table, 8, torch.Generator().manual_seed(step)) for step in range(500)]
        return torch.histogram(torch.cat(draws).float(), torch.tensor(edges), density=False)[0] / 4000

    thirds = torch.full((3,), 1 / 3)
    torch.testing.assert_close(shares(segment.draw_table(real), [0., 90, 91, 100]), thirds, atol=0.03, rtol=0)
    for ratio, share in ((0.5, 1 / 3), (1, 1 / 2), (2, 2 / 3)):
        images, masks, table = mix((real[:, None], real), (generated[:, None], generated), ratio)
        found = shares(table, [0., 90, 91, 100, len(masks)])
        expected = torch.cat([(1 - share) * thirds, torch.tensor([share])])
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
        flawed = masks[100:, 0, 0] > 0
        assert table[0, 100:][flawed].sum() / table[0, 100:].sum() == pytest.approx(1 / 2)


def test_larger_ratios_add_to_smaller_ones_and_too_large_ones_are_refused():
    real, values = (torch.zeros(5, 3, 4, 4), torch.zeros(5, 4, 4)), torch.arange(1, 13.0).view(12, 1, 1)
    generated, drawn = (values[:, None].expand(12, 3, 4, 4), values.expand(12, 4, 4)), []
    for ratio, seed, count in ((0, 3, 0), (0.5, 3, 2), (1, 3, 5), (2.4, 3, 12), (1, 4, 5)):
        images, masks, _ = mix(real, generated, ratio, seed)
        assert len(masks) == 5 + count and torch.equal(images[:, 0], masks) and not images[:5].any()
        drawn.append(set(masks[5:, 0, 0].tolist()))
        assert len(drawn[-1]) == count
    assert drawn[1] < drawn[2] < drawn[3] and drawn[2] != drawn[4]
    with pytest.raises(ValueError, match="pairs for each of 5 real ones are 15, but there are 12"):
        mix(real, generated, 3)


@pytest.mark.parametrize("axis", [1, 2])
def test_random_views_do_not_shift_the_mask_against_the_picture(axis):
    """Of a picture with one step, from 100 to 150; both sides of it count, in px of the view."""
    masks = (torch.arange(64) >= 32).byte().view(64, 1).expand(400, 64, 64).movedim(1, axis)
    x, target = segment.random_view(100 + 50 * masks[:, None], masks, torch.Generator().manual_seed(0))
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    shown, inside = ((x - low) / (high - low))[:, 0], target != IGNORE
    offsets = ((shown - target) * inside).sum((1, 2)) / inside.any(axis).sum(1)     # mean over the lines
    turned = (target == 0).float().argmax(axis).amax(1) > (target == 1).float().argmax(axis).amax(1)
    assert offsets[turned].mean().abs() < 0.1 and offsets[~turned].mean().abs() < 0.1 and turned.any()
    assert offsets.abs().max() < 0.75 and target.unique().tolist() == [0, 1, IGNORE]


def test_the_loss_is_cross_entropy_and_dice_of_the_pixels_that_count():
    """One image is half ignored, the other wholly; background alone and nothing at all are finite too."""
    net, x = build("segformer", 3).eval(), torch.rand(2, 3, 40, 56)
    target = torch.randint(0, 3, (2, 40, 56), generator=torch.Generator().manual_seed(0))
    target[0, :16], target[1] = IGNORE, IGNORE
    logits, counts = net(x)[:1, :, 16:], target[:1, 16:]
    prob, truth = logits.softmax(1), F.one_hot(counts, 3).permute(0, 3, 1, 2)
    dice = 1 - 2 * (prob * truth).sum((0, 2, 3)) / (prob + truth).sum((0, 2, 3))
    torch.testing.assert_close(net.loss(x, target), F.cross_entropy(logits, counts) + dice.mean())
    assert net.loss(x, torch.zeros_like(target)).isfinite()
    nothing = net.loss(x, torch.full_like(target, IGNORE))
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad is None or not p.grad.any() for p in net.parameters())


# --- score ---

def test_miou_equals_a_plain_loop_and_leaves_out_a_class_that_the_target_lacks():
    rng = torch.Generator().manual_seed(0)
    pred, target = (torch.randint(0, 4, (3, 9, 9), generator=rng) for _ in range(2))
    target[0, :2], pred[1, 1], target[2, 8] = IGNORE, 4, 5         # 4 is only predicted, 5 never, 6 nowhere
    score, expected = miou(confusion_matrix(pred, target, 7)), []
    for k in range(7):
        both = either = 0
        for p, t in zip(pred.flatten().tolist(), target.flatten().tolist()):
            if t != IGNORE:
                both, either = both + (p == t == k), either + (p == k or t == k)
        expected.append(both / either if (target == k).any() else float("nan"))
    assert score["iou"] == pytest.approx(expected, nan_ok=True) and expected[5] == 0
    assert score["miou"] == pytest.approx(sum((*expected[1:4], expected[5])) / 4)
    assert score["miou_with_background"] == pytest.approx(sum((*expected[:4], expected[5])) / 5)
    assert confusion_matrix(torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 2]), 3).tolist() == [
        [1, 0, 1], [0, 1, 0], [0, 1, 0]]                            # [target, pred]


# --- errors and the command ---

def test_bad_input_is_answered_with_a_sentence():
    images, masks = squares(2, 32)
    net, nan = build("segformer", 3), build("segformer", 3)
    nan.classifier.bias.data.fill_(float("nan"))
    for error, message, call in (
            (ValueError, r"no architecture 'unet': choose one of deeplabv3\+, ", lambda: build("unet", 3)),
            (ValueError, r"deeplabv3\+:vgg'.* deeplabv3\+:resnet18, ", lambda: build("deeplabv3+:vgg", 3)),
            (ValueError, "segformer:resnet50", lambda: build("segformer:resnet50", 3)),
            (ValueError, r"masks hold the values \[2\], but the classes are 0..1",
             lambda: fit(build("segformer", 2), images, masks, 1)),
            (ValueError, "they must fit", lambda: fit(net, images, masks[:1], 1)),
            (ValueError, "0 steps", lambda: fit(net, images, masks, 0)),
            (ValueError, "1 or 3", lambda: predict(net, torch.zeros(1, 4, 32, 32, dtype=torch.uint8))),
            (FloatingPointError, "is nan at step 0: try a smaller lr", lambda: fit(nan, images, masks, 3)),
            (FloatingPointError, "at step [12]", lambda: fit(net, images, masks, 3, batch_size=1, lr=1e20))):
        with pytest.raises(error, match=message):
            call()


def test_the_command_scores_and_saves_a_network_that_comes_back(tmp_path, monkeypatch, capsys):
    images, masks = squares(7, 32)                                   # the last is good: 5 + 1 train, 1 scores
    write_classes(tmp_path / "data", ("background", "red", "blue", "dent"))
    for i in range(7):
        write_pair(tmp_path / "data", f"{i:03d}", images[i], masks[i], "stain" if i < 6 else "good")
    flags = f"--data {tmp_path}/data --size 32 48 --steps 2 --batch-size 2 --device cpu --out {tmp_path}/out"
    monkeypatch.setattr("sys.argv", ["segment.py", *flags.split()])
    segment.main()
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "segment.json").read_text())
    assert "backbone weights: none" in printed and "6 images (split train: the first 5 images" in printed
    assert report["classes"] == ["background", "red", "blue", "dent"] and report["iou"][3] is None
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 0
    saved = torch.load(tmp_path / "out" / "segment.pt", weights_only=True)
    net = build(**saved["build"])
    net.load_state_dict(saved["model"])
    assert predict(net, images).shape == masks.shape


def test_new_photos_get_masks_of_their_own_size_that_the_rules_read(tmp_path, monkeypatch, capsys):
    random, photos, out = np.random.default_rng(0), tmp_path / "photos", tmp_path / "masks"
    for name, size in (("a", (40, 56)), ("line/b", (70, 33))):
        write_image(photos / f"{name}.png", random.integers(0, 256, (3, *size), np.uint8))
    write_image(photos / "line/grey.png", random.integers(0, 256, (1, 32, 32), np.uint8))
    net = build("segformer", 3)
    saved = {"build": dict(arch="segformer", num_classes=3), "model": net.state_dict(), "size": [32, 32],
             "classes": ["background", "crack", "dirt"], "white": None, "iou": [0.9, 0.0, math.nan]}
    torch.save(saved, tmp_path / "segment.pt")
    flags = ["--predict", str(photos), "--weights", str(tmp_path / "segment.pt"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["segment.py", *flags])
    segment.main()
    assert "this segmenter found no crack in its test photos; train" in capsys.readouterr().out
    masks = {path.relative_to(out).as_posix(): path for path in (out / "mask").rglob("*.png")}
    assert set(masks) == {"mask/a_mask.png", "mask/line/b_mask.png", "mask/line/grey_mask.png"}
    assert Image.open(masks["mask/line/b_mask.png"]).size == (33, 70)
    standard = {"object": "x", "native_size": "mask", "rules": [{"classes": ["crack"], "max_area_px": 0}]}
    write_json(tmp_path / "standard.json", standard)
    said = inspect_rules.main(["--standard", str(tmp_path / "standard.json"), "--masks", str(out)])
    assert said in (0, 1)                                           # judged, whatever it is
    photo = inspect_rules.find_photo(masks["mask/line/b_mask.png"])                 # verdicts are drawn on it
    assert np.array_equal(photo, Image.open(photos / "line/b.png"))
    write_image(photos / "line/b.png", np.zeros((3, 50, 60), np.uint8))             # another of that name
    segment.main()
    assert Image.open(masks["mask/line/b_mask.png"]).size == (60, 50)
    assert not np.asarray(inspect_rules.find_photo(masks["mask/line/b_mask.png"])).any()
    pictures = tmp_path / "data/image"
    write_image(pictures / "a.png", np.zeros((3, 50, 60), np.uint8))
    into_data = ["--predict", str(pictures), *flags[2:-1], str(pictures.parent)]
    monkeypatch.setattr("sys.argv", ["segment.py", *into_data])
    with pytest.raises(ValueError, match="data: holds a data set; name a new folder"):
        segment.main()
    assert Image.open(pictures / "a.png").size == (60, 50)                          # as it was
    monkeypatch.setattr("sys.argv", ["segment.py", *flags[:2], "--weights", str(photos / "a.png")])
    with pytest.raises(ValueError, match="a.png: damaged, or not written by segment.py"):
        segment.main()
    monkeypatch.setattr("sys.argv", ["segment.py", *flags[:2], "--weights", str(tmp_path / "none.pt")])
    with pytest.raises(FileNotFoundError, match="none.pt: no such file; train a segmenter first: python"):
        segment.main()
    torch.save({name: saved[name] for name in ("build", "model", "size", "classes")}, tmp_path / "old.pt")
    monkeypatch.setattr("sys.argv", ["segment.py", *flags[:2], "--weights", str(tmp_path / "old.pt")])
    with pytest.raises(ValueError, match="old.pt: of an older segment.py; train it again"):
        segment.main()
    torch.save({**saved, "white": 4095}, tmp_path / "segment.pt")
    monkeypatch.setattr("sys.argv", ["segment.py", *flags])
    with pytest.raises(ValueError, match="masks holds what was made with other .* checkpoints"):
        segment.main()
    (photos / "a.png").unlink()                                     # dark photos of 12 bits, none else
    Image.fromarray(np.full((8, 8), 500, np.uint16)).save(photos / "dark.png")
    monkeypatch.setattr("sys.argv", ["segment.py", *flags[:-1], str(tmp_path / "deep")])
    monkeypatch.setattr(segment, "overlay", lambda image, mask: image)
    segment.main()
    assert np.unique(Image.open(tmp_path / "deep/overlay/dark.png")).tolist() == [round(500 / 4095 * 255)]
