"""unet.py: the counts of the released networks, what each network sees, and the messages for sizes it cannot take."""
import math

import pytest
import torch

import unet
from unet import UNet


def filled(seed=0, **settings):
    """A narrow network with every weight random, also those that start at 0."""
    torch.manual_seed(seed)
    net = UNet(**{"in_channels": 4, "channels": 16, "multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": (1,), **settings})
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


@pytest.mark.parametrize("in_channels, multipliers, middle, size", [
    (1, (1,), True, (5, 7)),                                    # depth 0 takes any size
    (1, (1, 2), False, (6, 2)),
    (5, (1, 1, 2), True, (12, 20)),
    (9, (1, 2, 2, 3), False, (8, 24)),
])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_answers_in_the_shape_of_its_input(in_channels, multipliers, middle, size, scale_shift):
    net = filled(in_channels=in_channels, multipliers=multipliers, middle=middle, scale_shift=scale_shift, attention_levels=(1, 3))
    x = torch.randn(2, in_channels, *size)
    assert net.depth == len(multipliers) - 1
    assert net(x, torch.tensor([3, 900])).shape == x.shape


@pytest.mark.parametrize("channels", [2, 6, 20, 24, 40, 100])
def test_takes_any_even_width(channels):
    net = filled(channels=channels)
    assert net(torch.randn(1, 4, 4, 4), 5).isfinite().all()


def test_odd_width_is_refused_with_the_next_even_one():
    with pytest.raises(ValueError, match="use 34"):
        UNet(3, channels=33)


def test_output_is_exactly_zero_at_initialisation():
    net = UNet(3, 16, (1, 2, 2), attention_levels=(2,))
    assert (net(torch.randn(2, 3, 8, 8), 10) == 0).all()


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


def test_defaults_are_the_large_network():
    with torch.device("meta"):
        assert UNet(7).config == UNet(7, **unet.LARGE).config


@pytest.mark.parametrize("num_res_blocks, fields", [(1, (17, 45, 101, 213)), (2, (25, 69, 157, 337))])
def test_receptive_field_declared_is_the_one_measured(num_res_blocks, fields):
    for depth, field in enumerate(fields):
        net = UNet(1, 2, (1,) * (depth + 1), num_res_blocks, attention_levels=(), middle=False)
        assert unet.receptive_field(net) == unet.measure_receptive_field(net) == field


def test_receptive_field_with_middle_and_unequal_widths():
    net = UNet(3, 4, (1, 3), 1, attention_levels=(), middle=True)
    assert unet.receptive_field(net) == unet.measure_receptive_field(net) > 45


def test_attention_sees_the_whole_image():
    net = UNet(1, 4, (1, 1), 1, attention_levels=(1,), middle=False)
    assert unet.receptive_field(net) == unet.measure_receptive_field(net, max_width=512) == math.inf
    assert unet.receptive_field(UNet(1, 4, (1, 1), 1, attention_levels=(2,), middle=False)) == 45       # beyond the depth: ignored


def test_small_network_sees_157_pixels():
    with torch.device("meta"):
        assert unet.receptive_field(UNet(7, **unet.SMALL)) == 157


def test_measuring_leaves_the_network_as_it_was():
    net = filled(attention_levels=())
    x = torch.randn(1, 4, 8, 8)
    before = net(x, 3)
    unet.measure_receptive_field(net)
    assert torch.equal(net(x, 3), before)


@pytest.mark.parametrize("height, width, advice", [
    (100, 90, "--size 96 64 or --size 128 96"), (64, 65, "--size 64 64 or --size 64 96"), (5, 32, "pass --size 32 32$"),
    (0, 32, "pass --size 32 32$"),
])
def test_wrong_size_names_sizes_that_work(height, width, advice):
    with pytest.raises(ValueError, match=advice) as error:
        unet.check_size(height, width, depth=5)
    assert f"image is {height}x{width}" in str(error.value) and "halves it 5 times" in str(error.value)


def test_sizes_that_work_pass_and_the_network_checks_too():
    unet.check_size(96, 128, depth=5)
    unet.check_size(7, 1, depth=0)
    with pytest.raises(ValueError, match="--size 6 4 or --size 8 4"):
        filled()(torch.randn(1, 4, 7, 4), 0)


def test_python_int_t_equals_tensor_t():
    net, x = filled(), torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(net(x, 417), net(x, torch.tensor([417, 417, 417])))
    assert not torch.allclose(net(x, 417), net(x, 17))          # and t matters


def test_config_rebuilds_the_network_and_holds_plain_values():
    net = filled(scale_shift=False, head_width=8, dropout=0.1)
    again = UNet(**net.config)
    again.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(again.eval()(x, 7), net(x, 7))
    assert all(isinstance(value, (int, float, bool, list, str)) for value in net.config.values())


def test_an_image_gets_the_same_answer_alone_and_in_a_batch():
    net, x, t = filled(), torch.randn(5, 4, 8, 12), torch.tensor([0, 9, 250, 700, 999])
    batch = net(x, t)
    for i in range(5):
        torch.testing.assert_close(net(x[i:i + 1], t[i:i + 1])[0], batch[i], rtol=0, atol=1e-5)


def test_bfloat16_by_autocast_or_by_weights_stays_close_and_returns_the_dtype_of_its_input():
    net, x = filled(), torch.randn(2, 4, 16, 16)
    exact = net(x, 321)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = net(x, 321)
    cast = net.bfloat16()(x, 321)
    for answer in autocast, cast:
        assert answer.dtype == torch.float32
        assert 0 < (answer - exact).norm() < 0.02 * exact.norm()


def test_every_parameter_learns_once_the_zeros_are_gone():
    net = filled()
    net(torch.randn(2, 4, 8, 8), torch.tensor([1, 2])).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


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


@pytest.mark.parametrize("norm, alike", [("local", True), ("group", False)])
def test_with_local_norm_what_lies_outside_the_receptive_field_changes_no_bit(norm, alike):
    torch.manual_seed(0)
    net = UNet(3, channels=8, multipliers=(1, 2), num_res_blocks=1, attention_levels=(), middle=False, norm=norm)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    half, x = unet.receptive_field(net) // 2, torch.randn(1, 3, 16, 128)
    far, near = x.clone(), x.clone()
    far[..., 64 + half + 2:] += 5                           # + 2: the alignment to the grid of the level below
    near[..., 64 + half // 2:] += 5
    with torch.no_grad():
        before, after, moved = (net(image, 300)[..., 64] for image in (x, far, near))
    assert torch.equal(before, after) == alike and not torch.equal(before, moved)


def test_receptive_field_is_measured_with_either_norm():
    nets = [UNet(3, channels=4, multipliers=(1, 1), num_res_blocks=1, attention_levels=(), middle=False, norm=norm) for norm in ("group", "local")]
    assert [unet.measure_receptive_field(net) for net in nets] == [unet.receptive_field(net) for net in nets]
