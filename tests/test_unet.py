"""unet.py: the released networks' counts, what each network sees, and sizes it cannot take."""
import copy
import math

import pytest
import torch
from torch import nn

import unet
from unet import UNet, receptive_field


def filled(seed=0, std=0.1, **settings):
    """A narrow network with every weight random, also those that start at 0."""
    torch.manual_seed(seed)
    net = UNet(**{"in_channels": 4, "channels": 16, "multipliers": (1, 2), "num_res_blocks": 1,
                  "attention_levels": (1,), **settings})
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net.eval()


# --- the function ---

@pytest.mark.parametrize("in_channels, multipliers, middle, size", [
    (1, (1,), True, (5, 7)), (1, (1, 2), False, (6, 2)),        # depth 0 takes any size
    (5, (1, 1, 2), True, (12, 20)), (9, (1, 2, 2, 3), False, (8, 24))])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_answers_in_the_shape_of_its_input(in_channels, multipliers, middle, size, scale_shift):
    net = filled(in_channels=in_channels, multipliers=multipliers, middle=middle, scale_shift=scale_shift,
                 attention_levels=(1, 3))
    x = torch.randn(2, in_channels, *size)
    assert net.depth == len(multipliers) - 1
    assert net(x, torch.tensor([3, 900])).shape == x.shape


@pytest.mark.parametrize("channels", [2, 6, 20, 24, 40, 100])
def test_takes_any_even_width_and_refuses_odd_ones(channels):
    assert filled(channels=channels)(torch.randn(1, 4, 4, 4), 5).isfinite().all()
    with pytest.raises(ValueError, match=f"channels is {channels + 1}, .*use an even number"):
        UNet(3, channels=channels + 1)


def test_output_is_exactly_zero_at_initialisation():
    assert (UNet(3, 16, (1, 2, 2), attention_levels=(2,))(torch.randn(2, 3, 8, 8), 10) == 0).all()


def test_the_time_embedding_is_its_closed_form():
    t, dim = torch.tensor([0, 1, 417, 999]), 12
    angles = [[int(step) * 10000 ** (-i / 6) for i in range(6)] for step in t]
    expected = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    torch.testing.assert_close(unet.timestep_embedding(t, dim), torch.tensor(expected), rtol=0, atol=1e-4)


def test_attention_is_its_closed_form_in_heads_of_16_channels():
    torch.manual_seed(0)
    layer, x = unet.Attention(48, "local").double(), torch.randn(2, 48, 3, 5, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    qkv = layer.qkv(layer.norm(x)).flatten(2).view(2, 3, 3, 16, 15)                 # (B, qkv, head, 16, HW)
    q, k, v = qkv.unbind(1)
    heads = v @ torch.softmax(q.mT @ k / 16 ** 0.5, dim=-1).mT
    torch.testing.assert_close(layer(x), x + layer.out(heads.reshape(x.shape)))


def test_an_image_gets_the_same_answer_alone_and_in_a_batch_and_t_may_be_an_int():
    net, x, t = filled(), torch.randn(5, 4, 8, 12), torch.tensor([0, 9, 250, 700, 999])
    batch = net(x, t)
    for i in range(5):
        for alone in t[i:i + 1], int(t[i]):
            torch.testing.assert_close(net(x[i:i + 1], alone)[0], batch[i], rtol=0, atol=1e-5)
    torch.testing.assert_close(net(x, 417), net(x, torch.full((5,), 417)))
    assert not torch.allclose(net(x, 417), net(x, 17))          # and t matters


def test_config_rebuilds_the_network_and_holds_plain_values():
    net = filled(scale_shift=False, dropout=0.1, norm="local")
    again = UNet(**net.config)
    again.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(again.eval()(x, 7), net(x, 7))
    assert not torch.equal(again.train()(x, 7), net(x, 7))      # dropout
    assert all(isinstance(value, (int, float, bool, list, str)) for value in net.config.values())


def test_every_parameter_learns_once_the_zeros_are_gone():
    net = filled()
    net(torch.randn(2, 4, 8, 8), torch.tensor([1, 2])).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_bfloat16_by_autocast_or_by_weights_stays_close_and_returns_the_dtype_of_its_input():
    net, x = filled(), torch.randn(2, 4, 16, 16)
    exact = net(x, 321)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = net(x, 321)
    cast = net.bfloat16()(x, 321)
    for answer in autocast, cast:
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


# --- counts ---

@pytest.mark.parametrize("settings, parameters, gflops_64, gflops_256", [
    (unet.LARGE, 125_380_871, 31.4, 507.0), (unet.SMALL, 98_216_839, 132.0, 2112.3),
])
def test_parameters_and_flops_are_those_of_the_released_networks(settings, parameters, gflops_64, gflops_256):
    with torch.device("meta"):
        net, nine = UNet(7, **settings), UNet(9, **settings)
    assert unet.count_parameters(net) == parameters
    assert round(unet.count_parameters(nine) / 1e6, 1) == round(parameters / 1e6, 1)
    assert unet.count_flops(net, 64, 64) / 1e9 == pytest.approx(gflops_64, abs=0.05)
    assert unet.count_flops(net, 256, 256) / 1e9 == pytest.approx(gflops_256, abs=0.05)
    assert unet.field_in_words(net) == ("the whole image" if settings == unet.LARGE else "157 px")
    if settings == unet.LARGE:                                  # which the defaults are
        with torch.device("meta"):
            assert UNet(7).config == net.config


def test_the_command_prints_the_counts_and_refuses_a_size_with_one_that_works(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["unet.py", "--size", "64", "64"])
    unet.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["LARGE", "125,380,871", "31.4", "the", "whole", "image"] in rows
    assert ["SMALL", "98,216,839", "132.0", "157", "px"] in rows and ["3", "2", "337", "px"] in rows
    monkeypatch.setattr("sys.argv", ["unet.py", "--size", "100", "90"])
    with pytest.raises(SystemExit):
        unet.main()
    assert "error: image is 100x90" in capsys.readouterr().err


@pytest.mark.parametrize("height, width, advice", [
    (100, 90, "--size 96 64 or --size 128 96"), (64, 65, "--size 64 64 or --size 64 96"),
    (5, 32, "pass --size 32 32$"), (0, 32, "pass --size 32 32$"), (96, 128, None)])
def test_a_size_that_cannot_be_halved_names_sizes_that_can(height, width, advice):
    if advice is None:
        return unet.check_size(height, width, depth=5)
    with pytest.raises(ValueError, match=f"image is {height}x{width}, .* halves it 5 times: .*{advice}"):
        unet.check_size(height, width, depth=5)
    with pytest.raises(ValueError, match="--size 6 4 or --size 8 4"):
        filled()(torch.randn(1, 4, 7, 4), 0)


# --- the receptive field ---

def without_norms(net):
    """A copy whose norms are gone and whose weights are constant and positive: no two paths cancel."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.GroupNorm, unet.LocalNorm)):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for p in net.parameters():                              # convolutions average, all else is 0
            p.fill_(1 / p[0].numel() if p.dim() == 4 else 0)
    return net


def measured_field(net, max_width=1024):
    """The oracle: how many input columns move one output pixel, by gradient, at the worst alignment.

    The input is a strip as low as the network allows: rows and columns are treated alike. inf if the gradient
    reaches an end of a strip of max_width pixels.
    """
    net, f, width = copy.deepcopy(net).double().eval(), 2 ** net.depth, 128
    while width <= max_width:
        torch.manual_seed(0)
        x = torch.rand(1, net.config["in_channels"], f, width, dtype=torch.float64)
        x = x.expand(f, -1, -1, -1).contiguous().requires_grad_()
        columns = width // 2 + torch.arange(f)                  # image i is asked about column width/2 + i
        net(x, 0)[torch.arange(f), 0, 0, columns].sum().backward()
        touched = x.grad.abs().amax(dim=(1, 2)) > 0                                     # (f, width)
        if not touched[:, [0, -1]].any():
            return touched.sum(dim=1).max().item()
        width *= 2
    return math.inf


@pytest.mark.parametrize("num_res_blocks, fields", [(1, (17, 45, 101, 213)), (2, (25, 69, 157, 337))])
def test_the_receptive_field_is_the_one_measured(num_res_blocks, fields):
    for depth, field in enumerate(fields):
        net = UNet(1, 2, (1,) * (depth + 1), num_res_blocks, attention_levels=(), middle=False)
        assert receptive_field(net) == measured_field(without_norms(net)) == field
        assert unet.field_in_words(net) == f"{field} px"


def test_also_with_a_middle_and_attention_sees_the_whole_image_if_its_level_exists():
    net = UNet(3, 4, (1, 3), 1, attention_levels=(), middle=True)
    assert receptive_field(net) == measured_field(without_norms(net)) > 45
    net = UNet(1, 4, (1, 1), 1, attention_levels=(1,), middle=False)
    assert receptive_field(net) == measured_field(without_norms(net), max_width=512) == math.inf
    assert receptive_field(UNet(1, 4, (1, 1), 1, attention_levels=(2,), middle=False)) == 45


@pytest.mark.parametrize("multipliers, middle", [((1,), False), ((1, 2), False), ((1, 1), True),
                                                 ((1, 1, 1), False)])
def test_with_local_norm_it_is_exact_and_group_norm_couples_all_pixels(multipliers, middle):
    settings = dict(channels=8, multipliers=multipliers, attention_levels=(), middle=middle, std=0.3)
    net = filled(norm="local", **settings)
    assert measured_field(net) == receptive_field(net)
    assert measured_field(filled(norm="group", **settings), max_width=256) == math.inf
