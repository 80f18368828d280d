"""Claims about segment.py. CPU, no download; the comparison with transformers runs where that package is installed."""
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
from segment import ARCHS, IGNORE, build, confusion_matrix, fit, miou, mix, predict

SMALL = {"mask2former": {"layers": 3, "pixel_layers": 1}}                                    # fewer layers of the same kind, for time


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
                                                     ("segformer", {}, 3.7), ("mask2former", {}, 28.7)])
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


def test_deformable_attention_equals_a_loop_over_its_formula():
    rng = torch.Generator().manual_seed(0)
    B, N, heads, C, points, sizes = 2, 3, 2, 4, 2, [(2, 3), (4, 5)]
    value = torch.randn(B, sum(h * w for h, w in sizes), heads, C, generator=rng)
    places = 1.4 * torch.rand(B, N, heads, len(sizes), points, 2, generator=rng) - 0.2         # some outside
    weights = torch.rand(B, N, heads, len(sizes), points, generator=rng)
    expected = torch.zeros(B, N, heads, C)
    for b, n, head, p in itertools.product(range(B), range(N), range(heads), range(points)):
        start = 0
        for i, (h, w) in enumerate(sizes):
            x, y = (places[b, n, head, i, p] * torch.tensor([w, h]) - 0.5).tolist()
            for row, column in itertools.product(range(h), range(w)):                          # bilinear: a tent around each pixel
                tent = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                expected[b, n, head] += weights[b, n, head, i, p] * tent * value[b, start + row * w + column, head]
            start += h * w
    torch.testing.assert_close(segment.deformable_attention(value, places, weights, sizes), expected.flatten(2))


def test_a_new_deformable_layer_looks_one_to_four_pixels_along_a_direction_per_head(monkeypatch):
    seen = {}
    monkeypatch.setattr(segment, "deformable_attention", lambda value, places, weights, sizes: seen.update(p=places, w=weights) or value.flatten(2))
    x, sizes = torch.rand(1, 21, 16), [(1, 1), (2, 2), (4, 4)]
    centre = torch.full((21, 2), 0.5)
    segment.DeformableLayer(16)(x, x, centre, sizes)
    offsets = (seen["p"] - 0.5)[0, 0] * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)            # (heads, maps, points, 2), in pixels
    torch.testing.assert_close(offsets.abs().amax(-1), torch.arange(1.0, 5).expand(8, 3, 4))
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(seen["w"], torch.full_like(seen["w"], 1 / 12))


@pytest.mark.parametrize("rows, columns", list(itertools.product(range(5), range(1, 6))))
def test_assignment_is_as_cheap_as_the_best_of_all(rows, columns):
    random = np.random.default_rng(rows * 10 + columns)
    for trial in range(20):
        cost = random.normal(size=(rows, columns)) if trial % 2 else random.integers(-2, 3, (rows, columns)).astype(float)   # ties
        r, c = segment.assign(cost)
        assert len(r) == len(c) == min(rows, columns) == len(set(r.tolist())) == len(set(c.tolist()))
        wide = cost if rows <= columns else cost.T
        best = min(sum(wide[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(wide.shape[1]), len(wide)))
        assert cost[r, c].sum() == pytest.approx(best)


def test_masked_attention_sees_what_a_query_claims_and_everything_if_that_is_nothing():
    masks = torch.full((1, 2, 4, 4), -1.0)
    masks[0, 0, :2, :2] = 1
    seen = segment.claimed(masks, (2, 2))
    assert seen.tolist() == [[[[True, False, False, False], [True] * 4]]]
    x, q = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    out = segment.attend(q, x, x, 2, seen)
    torch.testing.assert_close(out[0, 0], x[0, 0])                                             # one pixel seen: its value
    torch.testing.assert_close(out[0, 1], segment.attend(q, x, x, 2)[0, 1])


def test_points_are_pixel_centres_that_count_and_are_read_there():
    rng = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 6, 9), generator=rng)
    target[0, :, 4:] = IGNORE
    torch.manual_seed(0)
    places, classes = segment.draw_points(target, 500)
    assert IGNORE not in classes
    torch.testing.assert_close(segment.read_points(target[:, None].float(), places)[:, 0], classes.float())
    for i, area in enumerate((6 * 4, 6 * 9)):                                                  # every pixel that counts, about as often
        count = torch.unique(places[i], dim=0, return_counts=True)[1]
        assert len(count) == area and count.max() < 4 * 500 / area
    assert (segment.draw_points(torch.full((1, 2, 2), IGNORE), 5)[1] == IGNORE).all()


def test_score_is_class_chance_times_mask_summed_over_queries():
    net, x = randomised(build("mask2former", 3, **SMALL["mask2former"])), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        classes, masks = (p[-1, 0] for p in net.predictions(x))
        expected = torch.zeros(3, 64, 96)
        for q in range(len(masks)):
            chance = F.interpolate(masks[None, q:q + 1], size=(64, 96), mode="bilinear")[0, 0].sigmoid()
            for k in range(3):
                expected[k] += classes[q].softmax(0)[k] * chance
        torch.testing.assert_close(net(x)[0], expected)


def test_perfect_queries_cost_nothing_and_swapped_classes_do(monkeypatch):
    """Three queries that know the truth: the loss is 0 but for the smoothing of Dice; the matching finds them in any order."""
    net, target = build("mask2former", 3, **SMALL["mask2former"]), squares(2)[1].long()
    target = F.pad(target, (0, 16, 0, 16), value=IGNORE)
    masks = torch.stack([(target == k) * 40.0 - 20 for k in (2, 0, 1)], dim=1)[None]           # logits (L = 1, B, Q = 3, H, W)
    classes = torch.full((1, 2, 3, 4), -20.0)
    for query, k in enumerate((2, 0, 1)):
        classes[:, 0, query, k] = 20
        classes[:, 1, query, k if k == 0 else 3] = 20                                          # the second image holds background alone
    monkeypatch.setattr(net, "predictions", lambda x: (classes, masks))
    x = torch.rand(2, 3, 64, 64)
    assert net.loss(x, target).item() < 1e-3
    target[0] = torch.where(target[0] == 1, 2, torch.where(target[0] == 2, 1, target[0]))
    assert net.loss(x, target).item() > 5


def their_weights(names, seed=0):
    """Our SegFormer with random weights, and the same weights under a list of other names."""
    net = randomised(build("segformer", 5, seed), seed)
    state = net.state_dict()
    ours = {name: list(net.our_names({name: torch.zeros(2)})) for name in names}
    return net, {name: torch.cat([state[part] for part in parts]) if parts[1:] else state[parts[0]] for name, parts in ours.items()}


def names_of(naming):
    """All tensors of the published files: Hugging Face as transformers 4 writes them, or the original release."""
    block = {"hugging face": ["layer_norm_1", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                              "layer_norm_2", "mlp.dense1", "mlp.dwconv.dwconv", "mlp.dense2", "attention.self.sr", "attention.self.layer_norm"],
             "original": ["norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2", "attn.sr", "attn.norm"]}
    names = []
    for i in range(4):
        layers = block[naming] if i < 3 else block[naming][:-2]                                # the last stage does not reduce
        if naming == "hugging face":
            names += [f"segformer.encoder.{name}" for name in (f"patch_embeddings.{i}.proj", f"patch_embeddings.{i}.layer_norm", f"layer_norm.{i}")]
            names += [f"segformer.encoder.block.{i}.{j}.{layer}" for j in range(2) for layer in layers]
        else:
            names += [f"patch_embed{i + 1}.proj", f"patch_embed{i + 1}.norm", f"norm{i + 1}"]
            names += [f"block{i + 1}.{j}.{layer}" for j in range(2) for layer in layers]
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


HF_HEAD = [f"decode_head.{name}" for name in (
    *(f"linear_c.{i}.proj.{kind}" for i in range(4) for kind in ("weight", "bias")), "linear_fuse.weight", "batch_norm.weight", "batch_norm.bias",
    "batch_norm.running_mean", "batch_norm.running_var", "batch_norm.num_batches_tracked", "classifier.weight", "classifier.bias")]


ORIGINAL_HEAD = [*(f"decode_head.linear_c{i}.proj.{kind}" for i in range(1, 5) for kind in ("weight", "bias")),
                 *(name.replace("batch_norm", "linear_fuse.bn").replace("fuse.weight", "fuse.conv.weight").replace("classifier", "linear_pred")
                   for name in HF_HEAD[8:])]


@pytest.mark.parametrize("naming, prefix", [("hugging face", "segformer."), ("hugging face", ""), ("original", "")])
def test_published_segformer_names_are_ours(naming, prefix, tmp_path):
    source, state = their_weights(names_of(naming))
    state = {name.replace("segformer.", prefix): value for name, value in state.items()}
    torch.save({**state, "head.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}, tmp_path / "mit.pth")
    net = build("segformer", 5, seed=9)
    assert segment.load_backbone(net, tmp_path / "mit.pth") == f"{tmp_path / 'mit.pth'}, backbone only"
    assert all(torch.equal(value, net.backbone.state_dict()[name]) for name, value in source.backbone.state_dict().items())


def test_a_whole_segformer_of_the_original_release_comes_inside_a_checkpoint(tmp_path):
    source, state = their_weights([f"backbone.{name}" for name in names_of("original")] + ORIGINAL_HEAD)
    torch.save({"state_dict": state | {"decode_head.conv_seg.weight": torch.zeros(1)}, "meta": {"epoch": 1}}, tmp_path / "b0.pth")
    net = build("segformer", 5, seed=9)
    assert segment.load_backbone(net, tmp_path / "b0.pth").endswith("b0.pth, backbone and head")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_whole_segformer_brings_its_head_where_the_classes_are_as_many(tmp_path):
    source, state = their_weights(names_of("hugging face") + HF_HEAD)
    torch.save(state, tmp_path / "b0.bin")
    net, other = build("segformer", 5, seed=9), build("segformer", 4, seed=9)
    assert segment.load_backbone(net, tmp_path / "b0.bin").endswith("b0.bin, backbone and head")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in source.state_dict().items())
    assert segment.load_backbone(other, tmp_path / "b0.bin").endswith("backbone only, its head is for other classes")
    assert torch.equal(other.backbone.stages[3][3].weight, source.backbone.stages[3][3].weight)
    torch.save({name: value for name, value in state.items() if "block.1.0.mlp.dense1" not in name} | {"neck": torch.zeros(1)}, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match=r"missing backbone.stages.1.1.ffn.fc1.bias, backbone.stages.1.1.ffn.fc1.weight; not wanted backbone.neck;"):
        segment.load_backbone(net, tmp_path / "bad.bin")


GOLDEN = [1.303866, 1.219513, -0.805816, 0.514631, -0.240069, -1.167645, -0.777376, -0.715449, -0.872004]


def test_segformer_logits_are_those_transformers_computed_once():
    """Weights of their_weights, image below, transformers 5.23: logits [0, :, 3, 5] and [0, 2, ::4, 7]."""
    x = torch.linspace(-2, 2, 3 * 64 * 96).sin().view(1, 3, 64, 96)
    with torch.no_grad():
        logits = their_weights([])[0].logits(x)
    torch.testing.assert_close(torch.cat([logits[0, :, 3, 5], logits[0, 2, ::4, 7]]), torch.tensor(GOLDEN), atol=1e-5, rtol=1e-5)


def test_segformer_equals_transformers_with_the_same_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5)).eval()
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
    """Four 64x64 windows of drawn pills, each filled by one defect: two colour stains (class 1), two contaminations (2)."""
    pairs = []
    for index, size in ((119, 640), (126, 640), (85, 320), (57, 320)):
        image, mask, *_ = draw("pill", 0, index, (size, size))
        y, x = (round(where.mean()) - 32 for where in np.nonzero(mask))
        pairs.append((image[y:y + 64, x:x + 64].transpose(2, 0, 1), mask[y:y + 64, x:x + 64]))
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*pairs))


@pytest.mark.parametrize("arch, steps, lr", [("deeplabv3+", 160, 2e-3), ("segformer", 130, 2e-3), ("mask2former", 130, 5e-4)])
def test_four_images_are_learned_and_predictions_do_not_depend_on_the_batch(arch, steps, lr):
    images, masks = blobs()
    net = build(arch, 3, **SMALL.get(arch, {}))
    untrained = miou(confusion_matrix(predict(net, images), masks, 3))["miou"]
    losses = fit(net, images, masks, steps, batch_size=4, lr=lr)["losses"]
    pred = predict(net, images)
    assert untrained < 0.4 and len(losses) == steps and losses[-1] < losses[0] / 3
    assert miou(confusion_matrix(pred, masks, 3))["miou"] > 0.95
    assert torch.equal(pred, torch.cat([predict(net, image[None]) for image in images]))
    assert torch.equal(pred[1:], predict(net, images[1:], batch_size=2))


@pytest.mark.parametrize("arch", ARCHS)
def test_same_seed_same_weights_and_the_global_stream_is_left_alone(arch):
    images, masks = squares(size=32)

    def trained(seed):
        net = build(arch, 3, seed=0, **SMALL.get(arch, {}))
        fit(net, images, masks, 2, batch_size=2, seed=seed)
        return torch.cat([p.flatten() for p in net.parameters()]).detach()

    torch.manual_seed(1)
    first = trained(5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(first, trained(5)) and not torch.equal(first, trained(6))


@pytest.mark.parametrize("schedule, decay", [("poly", lambda done: (1 - done) ** 0.9), ("cosine", lambda done: math.cos(math.pi * done / 2) ** 2)])
def test_the_learning_rate_warms_up_and_decays(schedule, decay, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args))
    net = build("segformer", 3)
    monkeypatch.setattr(net, "loss", lambda x, target: net.classifier.bias.sum())              # the network itself would take its time
    fit(net, *squares(2, 32), 20, batch_size=1, lr=0.1, schedule=schedule)
    assert rates == pytest.approx([0.1 * min(1, (i + 1) / 2) * decay(i / 20) for i in range(20)])


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


@pytest.mark.parametrize("arch", ARCHS)
def test_background_alone_and_nothing_but_ignored_pixels_give_a_finite_loss(arch):
    net, x = build(arch, 3, **SMALL.get(arch, {})), torch.rand(2, 3, 40, 56)
    assert torch.isfinite(net.loss(x, torch.zeros(2, 40, 56, dtype=torch.int64)))
    nothing = net.loss(x, torch.full((2, 40, 56), IGNORE))
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_an_ignored_image_has_no_say(arch):
    """A second image of nothing but IGNORE leaves the loss as it is."""
    net, x = build(arch, 3, **SMALL.get(arch, {})).eval(), torch.rand(2, 3, 64, 64)
    target = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    target[1] = IGNORE
    both, alone = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        both.append(net.loss(x, target).item())
        torch.manual_seed(seed)
        alone.append(net.loss(x[:1], target[:1]).item())
    assert both == pytest.approx(alone, rel=0.02)                                              # points are drawn anew


def test_a_class_never_trained_on_scores_zero():
    images, masks = squares(3, 32)
    net = build("segformer", 4)
    fit(net, images, masks, 15, batch_size=2)
    masks[0, :8] = 3
    score = miou(confusion_matrix(predict(net, images), masks, 4))
    assert score["iou"][3] == 0 and score["absent"] == []


def test_the_ratio_is_of_the_pool_and_larger_ones_add_to_smaller():
    real = (torch.zeros(5, 3, 4, 4), torch.zeros(5, 4, 4))
    synthetic = (torch.arange(1, 13.0).view(12, 1, 1, 1).expand(12, 3, 4, 4), torch.arange(1, 13.0).view(12, 1, 1).expand(12, 4, 4))
    drawn = {}
    for ratio, count in ((0, 0), (0.5, 2), (1, 5), (2.4, 12)):
        images, masks = mix(real, synthetic, ratio, seed=3)
        assert len(images) == len(masks) == 5 + count and torch.equal(images[:, 0, 0, 0], masks[:, 0, 0]) and not images[:5].any()
        drawn[ratio] = set(masks[5:, 0, 0].tolist())
        assert len(drawn[ratio]) == count
    assert drawn[0.5] < drawn[1] < drawn[2.4] and drawn[1] != set(mix(real, synthetic, 1, seed=4)[1][5:, 0, 0].tolist())
    with pytest.raises(ValueError, match="3 synthetic pairs per real one are 15 for 5 real ones, but there are 12: generate more"):
        mix(real, synthetic, 3)
    with pytest.raises(ValueError, match=r"real images are \(3, 4, 4\) and synthetic ones \(3, 8, 8\)"):
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
    with pytest.raises(ValueError, match=r"no architecture 'unet': choose one of deeplabv3\+, segformer, mask2former"):
        build("unet", 3)
    with pytest.raises(ValueError, match="no backbone 'vgg'"):
        build("deeplabv3+", 3, backbone="vgg")
    with pytest.raises(ValueError, match=r"'mask2former:vgg': no backbone 'vgg', choose resnet18 or resnet50"):
        build("mask2former:vgg", 3)
    with pytest.raises(ValueError, match="SegFormer has one backbone"):
        build("segformer:resnet50", 3)
    with pytest.raises(ValueError, match="no schedule 'step': choose poly or cosine"):
        fit(build("segformer", 3), images, masks, 1, schedule="step")
    with pytest.raises(ValueError, match=r"masks hold the values \[2\], but there are 2 classes"):
        fit(build("segformer", 2), images, masks, 1)
    with pytest.raises(ValueError, match="one mask per image"):
        fit(build("segformer", 3), images, masks[:1], 1)
    with pytest.raises(ValueError, match="0 steps"):
        fit(build("segformer", 3), images, masks, 0)
    with pytest.raises(ValueError, match="1 or 3"):
        predict(build("segformer", 3), torch.zeros(1, 4, 32, 32, dtype=torch.uint8))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0 of 3 with lr 0.001: try a smaller lr"):
        net = build("segformer", 3)
        net.classifier.bias.data.fill_(float("nan"))
        fit(net, images, masks, 3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [12] of 3 with lr 1e\+20"):
        fit(build("segformer", 3), images, masks, 3, batch_size=1, lr=1e20)
    with pytest.raises(FloatingPointError, match="at step 0 of 1 with lr 0.0003"):
        net = build("mask2former", 3, **SMALL["mask2former"])
        net.queries.data.fill_(float("nan"))
        fit(net, images, masks, 1)


def test_backbone_weights_come_from_torchvision_files_and_wrong_ones_are_named(tmp_path):
    resnet, net = torchvision.models.resnet18(weights=None), build("deeplabv3+", 3)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")                                 # with fc.*, as published
    segment.load_backbone(net, tmp_path / "resnet18.pth")
    assert torch.equal(net.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    bad = {"conv2.weight" if key == "conv1.weight" else key: value for key, value in resnet.state_dict().items()}
    torch.save(bad, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="missing backbone.conv1.weight; not wanted backbone.conv2.weight"):
        segment.load_backbone(net, tmp_path / "bad.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"shape.pth does not fit DeepLabV3Plus's backbone: .*backbone.conv1.weight of \(1,\) instead of \(64, 3, 7, 7\)"):
        segment.load_backbone(net, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match="text.pth is no state dict"):
        segment.load_backbone(net, tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        segment.load_backbone(net, tmp_path / "none.pth")


def test_imagenet_weights_come_from_the_cache_or_the_sentence_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route to host")))
    net = build("mask2former", 3, **SMALL["mask2former"])
    with pytest.raises(ValueError, match=r"no ImageNet weights of resnet18, .*\(no route to host\): fetch https://\S+/resnet18-\w+.pth .* pass the file, or"):
        segment.load_backbone(net, "imagenet")
    with pytest.raises(ValueError, match="torchvision has no ImageNet weights for SegFormer: pass the file"):
        segment.load_backbone(build("segformer", 3), "imagenet")
    resnet = torchvision.models.resnet18(weights=None)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(resnet.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert segment.load_backbone(net, "imagenet") == "imagenet, backbone only"
    assert torch.equal(net.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)


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
