"""The benchmark compares like with like: the reference computes the same, and the clock is read in turn."""
import json

import pytest
import torch

import benchmark
from unet import LARGE, SMALL, UNet, count_parameters


@pytest.mark.parametrize("network", [dict(LARGE, channels=16), dict(SMALL, channels=16)])
def test_the_released_reference_computes_the_same_and_keeps_its_own_weights(network):
    torch.manual_seed(0)
    ours = UNet(5, **network)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    theirs, x = benchmark.released(ours), torch.randn(2, 5, 32, 32)
    assert count_parameters(theirs) == count_parameters(ours)
    outputs = [net(x, torch.tensor([3, 800])) for net in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    before = next(theirs.parameters()).clone()
    benchmark.training_step(ours, x, ours=True, bf16=False)()
    assert torch.equal(before, next(theirs.parameters()))
    benchmark.training_step(theirs, x, ours=False, bf16=False)()
    assert not torch.equal(before, next(theirs.parameters()))


def test_bytes_kept_for_the_backward_pass_are_counted_once():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, t):
            y = x * self.weight                                     # keeps x; the weight is no activation
            return y * y                                            # keeps y, once
    x = torch.ones(1, 3, 8, 8)
    assert benchmark.kept_for_backward(Twice(), x) == 2 * x.nbytes


def test_the_tables_of_the_generator_are_written_and_sampling_needs_a_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "in_turn", lambda calls, rounds: {name: call() or 0.5 for name, call in calls.items()})
    monkeypatch.setattr(benchmark, "LARGE", dict(LARGE, multipliers=(1, 2), attention_levels=(1,)))
    monkeypatch.setattr(benchmark, "SMALL", dict(SMALL, multipliers=(1, 2)))
    flags = ("--quick", "--out", str(tmp_path), "--part", "training", "--part", "size", "--part", "sampling", "--run")
    benchmark.speed(benchmark.parse_args([*flags, str(trained)]))
    numbers = json.loads((tmp_path / "quick/speed.json").read_text())
    assert list(numbers) == ["training", "size", "sampling"]
    numbers = {part: found["measured"] for part, found in numbers.items()}
    assert [(row["network"], row["what"]) for row in numbers["training"]["rows"]] == [
        (name, what) for name in ("large", "small") for what in ("train", "denoise")]
    assert numbers["size"][0]["seconds_per_image"] == [0.5, 0.5]
    by_sampler = {(row["sampler"], row["steps"], row["spacing"]): row for row in numbers["sampling"]}
    assert by_sampler["ddim", 20, "even"]["rms_to_long"] == 0 < by_sampler["dpm++", 10, "logsnr"]["rms_to_long"]
    benchmark.speed(benchmark.parse_args([*flags[:3], "--part", "sampling", "--run", str(tmp_path / "none")]))
    assert "not measured, there is no trained run" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "quick/speed.json").read_text())) == ["training", "size", "sampling"]        # the others are kept


def test_speed_prints_every_network_beside_what_is_installed_and_needs_no_run(tmp_path, monkeypatch, capsys):
    peer = torch.nn.Conv2d(3, 2, 1)
    loss = lambda net, x, target: torch.nn.functional.cross_entropy(net(x), target)
    monkeypatch.setattr(benchmark, "published_segmenters", lambda num_classes: {"segformer": [("a peer", peer, lambda net, x: net(x), loss)]})
    monkeypatch.setattr(benchmark, "in_turn", lambda calls, rounds: {name: call() or (1.0 if name[0] else 2.0) for name, call in calls.items()})
    before = peer.weight.clone()
    benchmark.speed(benchmark.parse_args(["--part", "segmentation", "--quick", "--arch", "segformer,deeplabv3+:resnet50", "--out", str(tmp_path)]))
    said, numbers = capsys.readouterr().out, json.loads((tmp_path / "quick" / "speed.json").read_text())["segmentation"]["measured"]
    assert list(numbers) == ["segformer", "segformer a peer", "deeplabv3+:resnet50"]
    assert numbers["segformer a peer"] == dict(parameters=8, flops_per_image=2 * 6 * 64 * 64, ms=[1000, 1000, 250, 250], over_ours=[0.5] * 4)
    assert "  a peer" in said and "1000 (0.50x)" in said and not torch.equal(before, peer.weight)


def test_in_turn_takes_the_median_and_forgets_the_first_lap(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds.pop(0)

    a, b = [100, 1, 3, 2], [7, 7, 7, 7]
    assert benchmark.in_turn({"a": lambda: call("a", a), "b": lambda: call("b", b)}, 3) == {"a": 2, "b": 7}
    assert order == list("abababab")
