"""Claims about segment.py. CPU, no download; the comparison with transformers runs where that package is installed."""
import json
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision

import segment
from datasets import write_classes, write_pair
from segment import ARCHS, IGNORE, build, confusion_matrix, fit, miou, predict


def squares(n=4, size=48):
    """n images of noise, each with one red (class 1) and one blue (class 2) square; the last image has none."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(100, 156, (n, 3, size, size), generator=rng).to(torch.uint8)
    masks = torch.zeros(n, size, size, dtype=torch.uint8)
    for i in range(n - 1):
        for k, (y, x) in enumerate(torch.randint(0, 2, (2, 2), generator=rng).mul(4).add(torch.tensor([[4, 4], [24, 24]])).tolist(), 1):
            images[i, :, y:y + 16, x:x + 16] = torch.tensor([[230, 30, 30], [30, 30, 230]])[k - 1].view(3, 1, 1)
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


@pytest.mark.parametrize("arch, options, millions", [("deeplabv3+", {}, 12.3), ("deeplabv3+", {"backbone": "resnet50"}, 26.7),
                                                     ("segformer", {}, 3.7)])
def test_parameter_counts_are_those_of_the_published_networks(arch, options, millions):
    assert sum(p.numel() for p in build(arch, 5, **options).parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


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


HF_NAMES = [(r"^segformer\.(encoder\.)?", "backbone."), (r"^decode_head\.", ""),
            (r"\.(patch_embeddings|layer_norm)\.(\d)\.", r".stages.\2.\1."), (r"\.block\.(\d)\.", r".stages.\1.blocks."),
            (r"patch_embeddings\.layer_norm", "0.norm"), (r"patch_embeddings", "0"),
            (r"blocks\.0", "1"), (r"blocks\.1", "2"), (r"(stages\.\d)\.layer_norm", r"\1.3"),
            (r"layernorm_before|layer_norm_1", "norm1"), (r"layernorm_after|layer_norm_2", "norm2"),
            (r"attention\.self\.", "attention."), (r"query|q_proj", "q"), (r"key|k_proj", "k"), (r"value|v_proj", "v"),
            (r"output\.dense|o_proj", "out"), (r"sequence_reduction\.layer_norm|attention\.layer_norm", "attention.reduce.norm"),
            (r"attention\.attention", "attention"), (r"sequence_reduction\.sequence_reduction|attention\.sr", "attention.reduce.proj"),
            (r"attention\.attention", "attention"), (r"mlp\.dwconv", "ffn"), (r"mlp\.(dense|fc)", "ffn.fc"),
            (r"^linear_(c|projections)\.(\d)\.proj", r"linears.\2"), (r"^linear_fuse", "fuse.0"), (r"^batch_norm", "fuse.1")]


def test_segformer_equals_transformers_with_the_same_weights():
    """Names of transformers 4 (those of the published files) and 5 are both understood."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = randomised(transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5)))
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, ours in HF_NAMES:
            name = re.sub(pattern, ours, name)
        state[name] = value
    net = build("segformer", 5).eval()
    net.load_state_dict(state)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, got = theirs(pixel_values=x).logits, net.logits(x)
    difference = ((got - expected).abs().max() / expected.std()).item()
    print(f"largest difference {difference:.1e} of the logits' standard deviation, {expected.std():.3g}")
    assert difference < 1e-5


# --- training ---

@pytest.mark.parametrize("arch, steps", [("deeplabv3+", 70), ("segformer", 80)])
def test_four_images_are_learned_and_predictions_do_not_depend_on_the_batch(arch, steps):
    images, masks = squares()
    net = build(arch, 3)
    untrained = miou(confusion_matrix(predict(net, images), masks, 3))["miou"]
    losses = fit(net, images, masks, steps, batch_size=4, lr=1e-3)["losses"]
    pred = predict(net, images)
    assert untrained < 0.3 and len(losses) == steps and losses[-1] < losses[0] / 3
    assert miou(confusion_matrix(pred, masks, 3))["miou"] > 0.95
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


@pytest.mark.parametrize("arch", ARCHS)
def test_one_grey_photo_and_a_batch_of_one_are_enough(arch):
    images, masks = squares(2, 32)
    net = build(arch, 3)
    fit(net, images[:1, :1], masks[:1], 1, batch_size=1)
    assert predict(net, images[:, :1]).shape == (2, 32, 32)


def test_grey_input_is_repeated_and_normalised():
    x = segment.to_input(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_rare_classes_and_good_images_are_drawn_as_often_as_common_ones():
    masks = torch.zeros(100, 4, 4, dtype=torch.uint8)
    masks[:90, 0, 0] = 1                                                                       # 90 images of class 1, one of 2, 9 good
    masks[90, 0, 0] = 2
    table = segment.draw_table(masks, num_classes=5)                                           # classes 3 and 4 occur nowhere
    index = segment.draw(table, 3000, torch.Generator().manual_seed(0))
    share = [((index >= a) & (index < b)).float().mean().item() for a, b in ((0, 90), (90, 91), (91, 100))]
    assert share == pytest.approx([1 / 3] * 3, abs=0.03)


def test_sample_weight_shifts_the_drawing_within_a_class():
    masks = torch.ones(4, 2, 2, dtype=torch.uint8)
    table = segment.draw_table(masks, 2, torch.tensor([3.0, 1.0, 0.0, 0.0]))
    index = segment.draw(table, 4000, torch.Generator().manual_seed(0))
    assert (torch.bincount(index, minlength=4) / 4000).tolist() == pytest.approx([0.75, 0.25, 0, 0], abs=0.03)


def test_augmentation_moves_image_and_mask_together_and_invents_no_class():
    images, masks = squares(4, 64)
    seen = set()
    for seed in range(10):
        x, target = segment.augment(images, masks, torch.Generator().manual_seed(seed))
        seen |= set(target.unique().tolist())
        red, blue = x[:, 0] - x[:, 2] > 60, x[:, 2] - x[:, 0] > 60                             # what the image itself shows
        inside = target != IGNORE
        for shown, k in ((red, 1), (blue, 2)):
            assert ((target == k) & shown & inside).sum() / ((target == k) | shown & inside).sum() > 0.85
    assert seen == {0, 1, 2, IGNORE}


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
    assert score["pixel_accuracy"] == pytest.approx((pred == target)[target != IGNORE].float().mean().item())
    assert score["absent"] == []


def test_a_class_absent_from_the_target_is_left_out_and_named():
    target, pred = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 2, 1, 1]])                  # 2 predicted, 3 nowhere
    confusion = confusion_matrix(pred, target, 4)
    assert confusion.tolist() == [[1, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    score = miou(confusion)
    assert score["absent"] == [2, 3] and score["iou"] == pytest.approx([0.5, 1, float("nan"), float("nan")], nan_ok=True)
    assert score["miou"] == 1 and score["miou_with_background"] == 0.75


# --- errors ---

def test_bad_input_is_answered_with_a_sentence(tmp_path):
    images, masks = squares(2, 32)
    with pytest.raises(ValueError, match=r"no architecture 'unet': choose one of deeplabv3\+, segformer"):
        build("unet", 3)
    with pytest.raises(ValueError, match="no backbone 'vgg'"):
        build("deeplabv3+", 3, backbone="vgg")
    with pytest.raises(ValueError, match=r"masks hold the values \[2\], but there are 2 classes"):
        fit(build("segformer", 2), images, masks, 1)
    with pytest.raises(ValueError, match="one mask per image"):
        fit(build("segformer", 3), images, masks[:1], 1)
    with pytest.raises(ValueError, match="0 steps"):
        fit(build("segformer", 3), images, masks, 0)
    with pytest.raises(ValueError, match="1 or 3"):
        predict(build("segformer", 3), torch.zeros(1, 4, 32, 32, dtype=torch.uint8))
    with pytest.raises(FloatingPointError, match=r"at step 0 of 3 with lr 0.001: try a smaller lr"):
        net = build("segformer", 3)
        net.classifier.bias.data.fill_(float("nan"))
        fit(net, images, masks, 3)


def test_backbone_weights_come_from_torchvision_files_and_wrong_ones_are_named(tmp_path):
    resnet, net = torchvision.models.resnet18(weights=None), build("deeplabv3+", 3)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")                                 # with fc.*, as published
    segment.load_backbone(net, tmp_path / "resnet18.pth")
    assert torch.equal(net.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    bad = {"conv2.weight" if key == "conv1.weight" else key: value for key, value in resnet.state_dict().items()}
    torch.save(bad, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="missing conv1.weight; not wanted conv2.weight"):
        segment.load_backbone(net, tmp_path / "bad.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="shape.pth does not fit DeepLabV3Plus's backbone: .*size mismatch for conv1.weight"):
        segment.load_backbone(net, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match="text.pth is no state dict"):
        segment.load_backbone(net, tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        segment.load_backbone(net, tmp_path / "none.pth")


def test_the_command_scores_and_saves_a_network_that_comes_back(tmp_path, monkeypatch, capsys):
    images, masks = squares(7, 32)                                                             # the last is good: 5 + 1 train, 1 scores
    write_classes(tmp_path / "data", ("background", "red", "blue", "dent"))
    for i in range(7):
        write_pair(tmp_path / "data", f"{i:03d}", images[i], masks[i], "stain" if i < 6 else "good")
    monkeypatch.setattr("sys.argv", ["segment.py", "--data", str(tmp_path / "data"), "--size", "32", "48", "--steps", "2",
                                     "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "out")])
    segment.main()
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "segment.json").read_text())
    assert "backbone weights: none" in printed and "6 images (split train: the first 5 images of each kind train)" in printed
    assert list(report["iou"]) == ["background", "red", "blue", "dent"] and report["absent"] == ["dent"] and report["iou"]["dent"] is None
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 0
    saved = torch.load(tmp_path / "out" / "segment.pt", weights_only=True)
    net = build(**saved["build"])
    net.load_state_dict(saved["model"])
    assert predict(net, images).shape == masks.shape
