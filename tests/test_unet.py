"""unet.py: closed forms, the released networks' counts, what each network sees, sizes it cannot take."""
import math

import pytest
import torch
from torch import nn
import torch.nn.functional as F

import unet
from unet import UNet, receptive_field


def filled(std=0.1, **settings):
    """A narrow network with every weight random, also those that start at 0."""
    torch.manual_seed(0)
    net = UNet(**{"in_channels": 4, "channels": 16, "multipliers": (1, 2), "num_res_blocks": 1,
                  "attention_levels": (1,), **settings})
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net.eval()


# --- the function ---

@pytest.mark.parametrize("size, settings", [
    ((5, 7), dict(in_channels=1, channels=2, multipliers=(1,))),              # depth 0 takes any size
    ((6, 2), dict(in_channels=1, channels=6, middle=False, scale_shift=False)),
    ((12, 20), dict(in_channels=5, channels=20, multipliers=(1, 1, 2), scale_shift=False)),
    ((8, 24), dict(in_channels=9, channels=24, multipliers=(1, 2, 2, 3), middle=False))])
def test_answers_in_the_shape_of_its_input_and_0_at_first(size, settings):
    net = filled(attention_levels=(1, 3), **settings)
    x = torch.randn(2, settings["in_channels"], *size)
    answer = net(x, torch.tensor([3, 900]))
    assert answer.shape == x.shape and answer.isfinite().all() and answer.any()
    assert not UNet(**net.config)(x, 10).any()                  # at initialisation


def test_the_time_embedding_is_its_closed_form():
    t = torch.tensor([0, 1, 417, 999])
    angles = [[int(step) * 10000 ** (-i / 6) for i in range(6)] for step in t]
    expected = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    torch.testing.assert_close(unet.timestep_embedding(t, 12), torch.tensor(expected), rtol=0, atol=1e-4)


def test_attention_is_its_closed_form_in_heads_of_16_channels():
    torch.manual_seed(0)
    layer, x = unet.Attention(48, "local").double(), torch.randn(2, 48, 3, 5, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    qkv = layer.qkv(layer.norm(x)).flatten(2).view(2, 3, 3, 16, 15)                 # (B, qkv, head, 16, HW)
    q, k, v = qkv.unbind(1)
    heads = v @ torch.softmax(q.mT @ k / 16 ** 0.5, dim=-1).mT
    torch.testing.assert_close(layer(x), x + layer.out(heads.reshape(x.shape)))


@pytest.mark.parametrize("scale_shift", [True, False])
def test_time_scales_and_shifts_or_is_added(scale_shift):
    block, x, emb = unet.Block(4, 4, 6, scale_shift, 0.0, "local"), torch.randn(2, 4, 3, 5), torch.randn(2, 6)
    block.norm1 = block.norm2 = block.conv1 = block.conv2 = nn.Identity()
    time = block.modulation(emb)[..., None, None]
    h = F.silu(x) * (1 + time[:, :4]) + time[:, 4:] if scale_shift else F.silu(x) + time
    torch.testing.assert_close(block(x, emb), x + F.silu(h))


def test_an_image_gets_the_same_answer_alone_and_in_a_batch_and_t_may_be_an_int():
    net, x, t = filled(), torch.randn(3, 4, 8, 12), torch.tensor([0, 250, 999])
    batch = net(x, t)
    for i in range(3):
        for alone in t[i:i + 1], int(t[i]):
            torch.testing.assert_close(net(x[i:i + 1], alone), batch[i:i + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(net(x, 417), net(x, 17))          # t matters


def test_every_parameter_learns_once_the_zeros_are_gone_and_dropout_drops():
    net, x = filled(dropout=0.1), torch.randn(2, 4, 8, 8)
    net(x, torch.tensor([1, 2])).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert not torch.equal(net.train()(x, 7), net.eval()(x, 7))


def test_bfloat16_by_autocast_or_by_weights_stays_close_and_returns_the_dtype_of_its_input():
    net, x = filled(), torch.randn(2, 4, 16, 16)
    exact = net(x, 321)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = net(x, 321)
    for answer in autocast, net.bfloat16()(x, 321):
        assert answer.dtype == torch.float32
        assert 0 < (answer - exact).norm() < 0.02 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_forward_pass_never_waits_for_the_gpu():
    net, x = filled().cuda(), torch.randn(2, 4, 8, 8, device="cuda")
    expected = filled()(x.cpu(), 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            net(x, 5)
        answer = net(x.to(memory_format=torch.channels_last), 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(answer.cpu(), expected, rtol=1e-2, atol=1e-2)            # TF32 convolutions


# --- counts and sizes ---

@pytest.mark.parametrize("size, large, small", [("64", "31.4", "132.0"), ("256", "507.0", "2112.3")])
def test_the_command_prints_the_counts_of_the_released_networks(monkeypatch, capsys, size, large, small):
    monkeypatch.setattr("sys.argv", ["unet.py", "--size", size, size])
    unet.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["LARGE", "125,380,871", large, "the", "whole", "image"] in rows
    assert ["SMALL", "98,216,839", small, "157", "px"] in rows and ["3", "2", "337", "px"] in rows
    monkeypatch.setattr("sys.argv", ["unet.py", "--size", size, "90"])
    with pytest.raises(SystemExit):
        unet.main()
    assert f"error: image is {size}x90" in capsys.readouterr().err


@pytest.mark.parametrize("height, width, advice", [
    (100, 90, "--size 96 64 or --size 128 96"), (64, 65, "--size 64 64 or --size 64 96"),
    (0, 32, "--size 32 32$")])
def test_a_network_refuses_sizes_that_it_cannot_halve_and_names_others(height, width, advice):
    net = UNet(1, 2, (1,) * 6, num_res_blocks=1, attention_levels=())
    with pytest.raises(ValueError, match=f"image is {height}x{width}, .* halves it 5 times: pass {advice}"):
        net(torch.zeros(1, 1, height, width), 0)


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="channels is 7, .*use an even number"):
        UNet(3, channels=7)


# --- the receptive field ---

def seeing(*multipliers, **settings):
    """A network whose norms do not mix pixels."""
    return filled(std=0.3, multipliers=multipliers,
                  **{"channels": 4, "attention_levels": (), "middle": False, "norm": "local", **settings})


def measured_field(net, width=1024):
    """The oracle: how many input columns move one output pixel, by gradient, at the worst alignment.

    The input is a strip as low as the network allows: rows and columns are treated alike. inf if the gradient
    reaches an end of the strip.
    """
    f = 2 ** net.depth
    x = torch.rand(1, net.config["in_channels"], f, width, dtype=torch.float64)
    x = x.expand(f, -1, -1, -1).contiguous().requires_grad_()
    columns = width // 2 + torch.arange(f)                      # image i is asked about column width/2 + i
    net.double()(x, 0)[torch.arange(f), 0, 0, columns].sum().backward()
    touched = x.grad.abs().amax(dim=(1, 2)) > 0                                         # (f, width)
    return math.inf if touched[:, [0, -1]].any() else touched.sum(dim=1).max().item()


@pytest.mark.parametrize("num_res_blocks, fields", [(1, (17, 45, 101, 213)), (2, (25, 69, 157, 337))])
def test_the_receptive_field_is_the_one_measured(num_res_blocks, fields):
    for depth, field in enumerate(fields):
        net = seeing(*[1] * (depth + 1), num_res_blocks=num_res_blocks)
        assert receptive_field(net) == measured_field(net) == field


def test_also_with_a_middle_and_attention_and_group_norm_couple_all_pixels():
    net = seeing(1, 3, middle=True)
    assert receptive_field(net) == measured_field(net) > 45
    net = seeing(1, 1, attention_levels=(1,))
    assert receptive_field(net) == measured_field(net) == math.inf
    assert receptive_field(seeing(1, 1, attention_levels=(2,))) == 45           # there is no such level
    assert measured_field(seeing(1, 1, channels=8, norm="group"), width=256) == math.inf
