"""Claims about segment.py. CPU, no download; the comparison with transformers runs where that package is
installed.
"""
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import segment
from datasets import write_classes, write_pair
from data.drawn import draw
from segment import IGNORE, build, confusion_matrix, fit, miou, mix, predict

ARCHS = ["deeplabv3+", "segformer"]


def squares(n=4, size=48):
    """n images of noise, each with one red (class 1) and one blue (class 2) square; the last image has
    none.
    """
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

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 50, 75), (1, 3, 7, 130)])
def test_logits_have_the_size_of_the_image(arch, shape):
    with torch.no_grad():
        assert build(arch, 4).eval()(torch.rand(shape)).shape == (shape[0], 4, *shape[2:])


@pytest.mark.parametrize("arch, options, millions", [
    ("deeplabv3+", {}, 12.3), ("deeplabv3+", {"backbone": "resnet50"}, 26.7), ("segformer", {}, 3.7)])
def test_parameter_counts_are_those_of_the_published_networks(arch, options, millions):
    count = sum(p.numel() for p in build(arch, 5, **options).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_to_32_does_not_shift_the_image(arch):
    net, x = randomised(build(arch, 3)), torch.rand(1, 3, 40, 56)
    padded = F.pad(x, (0, 8, 0, 24), mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded)[..., :40, :56])


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


def test_attention_without_reduction_is_the_plain_formula():
    attention, x = segment.EfficientAttention(12, num_heads=3, reduction=1), torch.randn(2, 4, 5, 12)
    tokens = x.reshape(2, 20, 12)
    heads = []
    for h in range(3):
        q, k, v = (layer(tokens)[..., 4 * h:4 * h + 4] for layer in (attention.q, attention.k, attention.v))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 4 ** 0.5, dim=-1) @ v)
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, dim=-1)).reshape(2, 4, 5, 12))


def their_weights(names, seed=0):
    """Our SegFormer with random weights, and the same weights under a list of other names."""
    net = randomised(build("segformer", 5, seed), seed)
    state = net.state_dict()
    ours = {name: list(net.our_names({name: torch.zeros(2)}))[0] for name in names}
    return net, {name: state[our_name] for name, our_name in ours.items()}


def published_names():
    """All tensors of the published files, as Hugging Face names them."""
    block = ["layer_norm_1", "attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense", "layer_norm_2", "mlp.dense1", "mlp.dwconv.dwconv", "mlp.dense2",
             "attention.self.sr", "attention.self.layer_norm"]
    names = []
    for i in range(4):
        layers = block if i < 3 else block[:-2]                     # the last stage does not reduce
        names += [f"patch_embeddings.{i}.proj", f"patch_embeddings.{i}.layer_norm", f"layer_norm.{i}"]
        names += [f"block.{i}.{j}.{layer}" for j in range(2) for layer in layers]
    return [f"segformer.encoder.{name}.{part}" for name in names for part in ("weight", "bias")]


HF_HEAD = [
    f"decode_head.{name}"
    for name in (*(f"linear_c.{i}.proj.{kind}" for i in range(4)
                   for kind in ("weight", "bias")), "linear_fuse.weight", "batch_norm.weight",
                 "batch_norm.bias", "batch_norm.running_mean", "batch_norm.running_var",
                 "batch_norm.num_batches_tracked", "classifier.weight", "classifier.bias")
]


def test_published_segformer_names_are_ours(tmp_path):
    source, state = their_weights(published_names())
    torch.save({**state, "classifier.bias": torch.zeros(1000)}, tmp_path / "mit.bin")
    net = build("segformer", 5, seed=9)
    assert segment.load_backbone(net, tmp_path / "mit.bin") == f"{tmp_path / 'mit.bin'}, backbone only"
    assert all(
        torch.equal(value,
                    net.backbone.state_dict()[name]) for name, value in source.backbone.state_dict().items())


def test_a_whole_segformer_brings_its_head_where_the_classes_are_as_many(tmp_path):
    source, state = their_weights(published_names() + HF_HEAD)
    torch.save(state, tmp_path / "b0.bin")
    net, other = build("segformer", 5, seed=9), build("segformer", 4, seed=9)
    assert segment.load_backbone(net, tmp_path / "b0.bin").endswith("b0.bin, backbone and head")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in source.state_dict().items())
    assert segment.load_backbone(other, tmp_path / "b0.bin").endswith("backbone only")
    assert torch.equal(other.backbone.stages[3][3].weight, source.backbone.stages[3][3].weight)
    torch.save({name: value
                for name, value in state.items() if "block.1.0.mlp.dense1" not in name}
               | {"segformer.encoder.neck": torch.zeros(1)}, tmp_path / "bad.bin")
    with pytest.raises(
            ValueError,
            match=
            r"missing backbone.stages.1.1.ffn.fc1.bias, .*; not wanted backbone.neck;"
    ):
        segment.load_backbone(net, tmp_path / "bad.bin")


GOLDEN = [1.303866, 1.219513, -0.805816, 0.514631, -0.240069, -1.167645, -0.777376, -0.715449, -0.872004]


def test_segformer_logits_are_those_transformers_computed_once():
    """Weights of their_weights, image below, transformers 5.23: logits [0, :, 3, 5] and [0, 2, ::4, 7]."""
    x = torch.linspace(-2, 2, 3 * 64 * 96).sin().view(1, 3, 64, 96)
    with torch.no_grad():
        logits = their_weights([])[0].logits(x)
    torch.testing.assert_close(torch.cat([logits[0, :, 3, 5], logits[0, 2, ::4, 7]]),
                               torch.tensor(GOLDEN),
                               atol=1e-5,
                               rtol=1e-5)


def test_segformer_equals_transformers_with_the_same_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5)).eval()
    if "segformer.encoder.patch_embeddings.0.proj.weight" not in theirs.state_dict():
        pytest.skip("this transformers has other names than the published files")
    theirs.load_state_dict(their_weights(theirs.state_dict())[1])
    torch.save(theirs.state_dict(), tmp_path / "b0.bin")
    net = build("segformer", 5, seed=9).eval()
    assert segment.load_backbone(net, tmp_path / "b0.bin").endswith("backbone and head")
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, got = theirs(pixel_values=x).logits, net.logits(x)
    assert ((got - expected).abs().max() / expected.std()).item() < 1e-5


# --- training ---

def blobs():
    """Four 64x64 windows of drawn pills, each filled by one defect: two colour stains (class 1), two
    contaminations (2).
    """
    pairs = []
    for index, size in ((119, 640), (126, 640), (85, 320), (57, 320)):
        image, mask, *_ = draw("pill", 0, index, (size, size))
        y, x = (round(where.mean()) - 32 for where in np.nonzero(mask))
        pairs.append((image[y:y + 64, x:x + 64].transpose(2, 0, 1), mask[y:y + 64, x:x + 64]))
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*pairs))


@pytest.mark.parametrize("arch, steps, lr", [("deeplabv3+", 100, 2e-3), ("segformer", 80, 2e-3)])
def test_four_images_are_learned_and_predictions_do_not_depend_on_the_batch(arch, steps, lr):
    images, masks = blobs()
    net = build(arch, 3)
    untrained = miou(confusion_matrix(predict(net, images), masks, 3))["miou"]
    losses = fit(net, images, masks, steps, batch_size=4, lr=lr)
    pred = predict(net, images)
    assert untrained < 0.4 and len(losses) == steps and losses[-1] < losses[0] / 3
    assert miou(confusion_matrix(pred, masks, 3))["miou"] > 0.9
    assert torch.equal(pred, torch.cat([predict(net, image[None]) for image in images]))
    assert torch.equal(pred[1:], predict(net, images[1:], batch_size=2))


@pytest.mark.parametrize("arch", ARCHS)
def test_same_seed_same_weights_and_the_global_stream_is_left_alone(arch):
    images, masks = squares(size=32)

    def trained(seed):
        net = build(arch, 3, seed=0)
        fit(net, images, masks, 2, batch_size=2, seed=seed)
        return torch.cat([p.flatten() for p in net.parameters()]).detach()

    torch.manual_seed(1)
    first = trained(5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(first, trained(5)) and not torch.equal(first, trained(6))


def test_the_learning_rate_warms_up_and_decays(monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args))
    net = build("segformer", 3)
    monkeypatch.setattr(net, "loss",
                        lambda x, target: net.classifier.bias.sum())  # the network itself would take its time
    fit(net, *squares(2, 32), 20, batch_size=1, lr=0.1)
    assert rates == pytest.approx([0.1 * min(1, (i + 1) / 2) * (1 - i / 20) ** 0.9 for i in range(20)])


@pytest.mark.parametrize("arch", ARCHS)
def test_one_grey_photo_and_a_batch_of_one_are_enough(arch):
    images, masks = squares(2, 32)
    net = build(arch, 3)
    fit(net, images[:1, :1], masks[:1], 1, batch_size=1)
    assert predict(net, images[:, :1]).shape == (2, 32, 32)


def test_grey_input_is_repeated_and_normalised():
    x = segment.to_input(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    torch.testing.assert_close(x[0, :, 0, 0],
                               torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_rare_classes_and_good_images_are_drawn_as_often_as_common_ones():
    masks = torch.zeros(100, 4, 4, dtype=torch.uint8)
    masks[:90, 0, 0] = 1                                              # 90 images of class 1, one of 2, 9 good
    masks[90, 0, 0] = 2
    table = segment.draw_table(masks, num_classes=5)                           # classes 3 and 4 occur nowhere
    index = segment.draw_indices(table, 3000, torch.Generator().manual_seed(0))
    share = [((index >= a) & (index < b)).float().mean().item() for a, b in ((0, 90), (90, 91), (91, 100))]
    assert share == pytest.approx([1 / 3] * 3, abs=0.03)


def test_augmentation_moves_image_and_mask_together_and_invents_no_class():
    images, masks = squares(4, 64)
    seen = set()
    for seed in range(10):
        x, target = segment.random_view(images, masks, torch.Generator().manual_seed(seed))
        seen |= set(target.unique().tolist())
        red, blue = x[:, 0] - x[:, 2] > 60, x[:, 2] - x[:, 0] > 60               # what the image itself shows
        inside = target != IGNORE
        for shown, k in ((red, 1), (blue, 2)):
            assert ((target == k) & shown & inside).sum() / ((target == k) | shown & inside).sum() > 0.85
    assert seen == {0, 1, 2, IGNORE}


@pytest.mark.parametrize("arch", ARCHS)
def test_background_alone_and_nothing_but_ignored_pixels_give_a_finite_loss(arch):
    net, x = build(arch, 3), torch.rand(2, 3, 40, 56)
    assert torch.isfinite(net.loss(x, torch.zeros(2, 40, 56, dtype=torch.int64)))
    nothing = net.loss(x, torch.full((2, 40, 56), IGNORE))
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_an_ignored_image_has_no_say(arch):
    """A second image of nothing but IGNORE leaves the loss as it is."""
    net, x = build(arch, 3).eval(), torch.rand(2, 3, 64, 64)
    target = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    target[1] = IGNORE
    both, alone = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        both.append(net.loss(x, target).item())
        torch.manual_seed(seed)
        alone.append(net.loss(x[:1], target[:1]).item())
    assert both == pytest.approx(alone, rel=0.02)                                      # points are drawn anew


def test_a_class_never_trained_on_scores_zero():
    images, masks = squares(3, 32)
    net = build("segformer", 4)
    fit(net, images, masks, 15, batch_size=2)
    masks[0, :8] = 3
    score = miou(confusion_matrix(predict(net, images), masks, 4))
    assert score["iou"][3] == 0


def test_the_ratio_is_of_the_pool_and_larger_ones_add_to_smaller():
    real = (torch.zeros(5, 3, 4, 4), torch.zeros(5, 4, 4))
    values = torch.arange(1, 13.0).view(12, 1, 1)
    synthetic = values[:, None].expand(12, 3, 4, 4), values.expand(12, 4, 4)
    drawn = {}
    for ratio, count in ((0, 0), (0.5, 2), (1, 5), (2.4, 12)):
        images, masks = mix(real, synthetic, ratio, seed=3)
        assert len(images) == len(masks) == 5 + count and torch.equal(
            images[:, 0, 0, 0], masks[:, 0, 0]) and not images[:5].any()
        drawn[ratio] = set(masks[5:, 0, 0].tolist())
        assert len(drawn[ratio]) == count
    assert drawn[0.5] < drawn[1] < drawn[2.4] and drawn[1] != set(
        mix(real, synthetic, 1, seed=4)[1][5:, 0, 0].tolist())
    with pytest.raises(
            ValueError,
            match="3 generated pairs for each of 5 real ones are 15, but there are 12: generate more"):
        mix(real, synthetic, 3)
    with pytest.raises(ValueError, match=r"real images are \(3, 4, 4\) and generated ones \(3, 8, 8\)"):
        mix(real, (torch.zeros(9, 3, 8, 8), torch.zeros(9, 8, 8)), 1)


def test_ignored_pixels_do_not_change_the_loss_even_if_all_are():
    net = build("segformer", 3).eval()
    x = torch.rand(1, 3, 32, 32)
    target = torch.randint(0, 3, (1, 32, 32))
    target[:, :16] = IGNORE
    logits = net(x)
    expected = F.cross_entropy(logits[:, :, 16:], target[:, 16:])
    prob, truth = logits[:, :, 16:].softmax(1), F.one_hot(target[:, 16:], 3).permute(0, 3, 1, 2)
    expected = expected + (1 - 2 * (prob * truth).sum((0, 2, 3)) / (prob + truth).sum((0, 2, 3))).mean()
    torch.testing.assert_close(net.loss(x, target), expected)
    assert net.loss(x, torch.full_like(target, IGNORE)).item() == 0


# --- score ---

def test_miou_equals_a_plain_loop():
    rng = torch.Generator().manual_seed(0)
    pred, target = (torch.randint(0, 4, (3, 9, 9), generator=rng) for _ in range(2))
    target[0, :2] = IGNORE
    score = miou(confusion_matrix(pred, target, 4))
    expected = []
    for k in range(4):
        both = either = 0
        for p, t in zip(pred.flatten().tolist(), target.flatten().tolist()):
            if t != IGNORE:
                both, either = both + (p == t == k), either + (p == k or t == k)
        expected.append(both / either)
    assert score["iou"] == pytest.approx(expected)
    assert score["miou"] == pytest.approx(sum(expected[1:]) / 3)
    assert score["miou_with_background"] == pytest.approx(sum(expected) / 4)


def test_a_class_absent_from_the_target_is_left_out():
    target, pred = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 2, 1, 1]])         # 2 predicted, 3 nowhere
    confusion = confusion_matrix(pred, target, 4)
    assert confusion.tolist() == [[1, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    score = miou(confusion)
    assert score["iou"] == pytest.approx(
        [0.5, 1, float("nan"), float("nan")], nan_ok=True)
    assert score["miou"] == 1 and score["miou_with_background"] == 0.75


# --- errors ---

def test_bad_input_is_answered_with_a_sentence(tmp_path):
    images, masks = squares(2, 32)
    with pytest.raises(ValueError, match=r"no architecture 'unet': choose one of deeplabv3\+, segformer"):
        build("unet", 3)
    with pytest.raises(ValueError, match="deeplabv3\\+ has no backbone 'vgg': choose resnet18 or resnet50"):
        build("deeplabv3+:vgg", 3)
    with pytest.raises(ValueError, match="segformer has no backbone 'resnet50': choose none"):
        build("segformer:resnet50", 3)
    with pytest.raises(ValueError, match=r"masks hold the values \[2\], but the classes are 0..1"):
        fit(build("segformer", 2), images, masks, 1)
    with pytest.raises(ValueError, match="they must fit"):
        fit(build("segformer", 3), images, masks[:1], 1)
    with pytest.raises(ValueError, match="0 steps"):
        fit(build("segformer", 3), images, masks, 0)
    with pytest.raises(ValueError, match="1 or 3"):
        predict(build("segformer", 3), torch.zeros(1, 4, 32, 32, dtype=torch.uint8))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0: try a smaller lr"):
        net = build("segformer", 3)
        net.classifier.bias.data.fill_(float("nan"))
        fit(net, images, masks, 3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [12]"):
        fit(build("segformer", 3), images, masks, 3, batch_size=1, lr=1e20)


def test_backbone_weights_come_from_torchvision_files_and_wrong_ones_are_named(tmp_path):
    resnet, net = torchvision.models.resnet18(weights=None), build("deeplabv3+", 3)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")                       # with fc.*, as published
    segment.load_backbone(net, tmp_path / "resnet18.pth")
    assert torch.equal(net.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    bad = {
        "conv2.weight" if key == "conv1.weight" else key: value
        for key, value in resnet.state_dict().items()
    }
    torch.save(bad, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="missing backbone.conv1.weight; not wanted backbone.conv2.weight"):
        segment.load_backbone(net, tmp_path / "bad.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(
            ValueError,
            match=
            r"DeepLabV3Plus's backbone: .*backbone.conv1.weight of \(1,\) instead of \(64, 3, 7, 7\)"
    ):
        segment.load_backbone(net, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match="text.pth is no state dict"):
        segment.load_backbone(net, tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        segment.load_backbone(net, tmp_path / "none.pth")


def test_imagenet_weights_come_from_the_cache_or_the_sentence_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__:
                        (_ for _ in ()).throw(OSError("no route to host")))
    net = build("deeplabv3+", 3)
    with pytest.raises(
            ValueError,
            match=
            r"no ImageNet weights of resnet18, .*\(no route to host\): fetch \S+/resnet18-\w+.pth"
    ):
        segment.load_backbone(net, "imagenet")
    with pytest.raises(ValueError, match="torchvision has no ImageNet weights of SegFormer: pass the file"):
        segment.load_backbone(build("segformer", 3), "imagenet")
    resnet = torchvision.models.resnet18(weights=None)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(resnet.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert segment.load_backbone(net, "imagenet") == "imagenet, backbone only"
    assert torch.equal(net.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)


def test_the_command_scores_and_saves_a_network_that_comes_back(tmp_path, monkeypatch, capsys):
    images, masks = squares(7, 32)                                   # the last is good: 5 + 1 train, 1 scores
    write_classes(tmp_path / "data", ("background", "red", "blue", "dent"))
    for i in range(7):
        write_pair(tmp_path / "data", f"{i:03d}", images[i], masks[i], "stain" if i < 6 else "good")
    monkeypatch.setattr("sys.argv", [
        "segment.py", "--data",
        str(tmp_path / "data"), "--size", "32", "48", "--steps", "2", "--batch-size", "2", "--device", "cpu",
        "--out",
        str(tmp_path / "out")
    ])
    segment.main()
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "segment.json").read_text())
    assert "backbone weights: none" in printed and "6 images (split train: the first 5 images" in printed
    assert report["classes"] == ["background", "red", "blue", "dent"] and report["iou"][3] is None
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 0
    saved = torch.load(tmp_path / "out" / "segment.pt", weights_only=True)
    net = build(**saved["build"])
    net.load_state_dict(saved["model"])
    assert predict(net, images).shape == masks.shape
