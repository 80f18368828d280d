"""The U-Net of diffusion models with its depth as an argument: fewer down-samplings see less of the image.

A network that sees the whole of a few training images learns them by heart; one that sees only patches of them recombines
the patches (Defect-Gen, arXiv:2310.17316). `len(multipliers) - 1` down-samplings set the size of the patch.

The layout is that of guided-diffusion (Dhariwal & Nichol 2021): the time embedding scales and shifts GroupNorm, attention
heads are 16 channels wide, `num_res_blocks` blocks per level go down and one more per level comes up, each taking one skip.
With 7 channels in and out (RGB + 4 mask classes), as `python unet.py` counts them, 2 FLOPs per multiply-add:

              parameters (released)    forward at 64x64 (released)    at 256x256 (released)
    LARGE    125,380,871 (125.38 M)     31.4 GFLOP (31.4)              507 GFLOP (507)
    SMALL     98,216,839  (98.22 M)    132.0 GFLOP (132)              2112 GFLOP (2112)

What bites: GroupNorm's statistics couple all pixels, so "receptive field" here is that of the convolutions and attention; with
norm="local" it is the whole truth.

    python unet.py                        # table: parameters, FLOPs, receptive field per depth
    python unet.py --size 512 384 --channels 9
"""
import argparse
import copy
import math

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# The two networks of the paper, as released: UNet(channels_of_the_joint_image, **LARGE).
LARGE = dict(channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_levels=(3, 4, 5), middle=True,
             scale_shift=True)
SMALL = dict(channels=192, multipliers=(1, 2, 4), num_res_blocks=2, attention_levels=(), middle=False,
             scale_shift=False)


def check_size(height, width, depth):
    """Raise ValueError, naming sizes that work, unless height and width can be halved `depth` times."""
    f = 2 ** depth
    if height >= f and width >= f and height % f == 0 and width % f == 0:
        return
    below = max(f, height // f * f), max(f, width // f * f)
    above = max(f, math.ceil(height / f) * f), max(f, math.ceil(width / f) * f)
    sizes = " or ".join(f"--size {h} {w}" for h, w in dict.fromkeys((below, above)))
    raise ValueError(f"image is {height}x{width}, but this net halves it {depth} times and needs multiples of {f}: "
                     f"pass {sizes}")


# --- parts ---

def zero(module):
    """Start the last layer of a residual branch at 0, so that every branch begins as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class LocalNorm(nn.LayerNorm):
    """Normalises each pixel over its channels, so that no pixel knows of another."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_layer(kind, channels):
    """group: GroupNorm with 32 groups, fewer where a group would have under 4 channels or the division would leave a rest; local: LocalNorm."""
    if kind == "local":
        return LocalNorm(channels)
    return nn.GroupNorm(math.gcd(min(32, max(1, channels // 4)), channels), channels)


def timestep_embedding(t, dim):
    """(B,) -> (B, dim) float32: cosines, then sines, of t at dim/2 frequencies from 1 to 1/10000 (as in DDPM)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = t.float()[:, None] * frequencies                                           # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Self-attention over all pixels, residual."""

    def __init__(self, channels, head_width, norm):
        super().__init__()
        self.heads = channels // math.gcd(channels, head_width)
        self.norm = norm_layer(norm, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                                       # each (B, heads, HW, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Block(nn.Module):
    """Two 3x3 convolutions with the time embedding in between, then attention if head_width is not None; residual."""

    def __init__(self, in_channels, out_channels, embedding, scale_shift, dropout, norm, head_width=None):
        super().__init__()
        self.norm1 = norm_layer(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = norm_layer(norm, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels, head_width, norm) if head_width else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        modulation = self.modulation(emb)[:, :, None, None]                             # (B or 1, C or 2C, 1, 1)
        if modulation.shape[1] == h.shape[1]:
            h = self.norm2(h + modulation)
        else:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


# --- the network ---

class UNet(nn.Module):
    """f(x_t, t) -> same shape as x_t. `UNet(**net.config)` builds the network again; net.depth counts its down-samplings.

    Args:
        in_channels:      channels of the joint image, in and out; any number.
        channels:         width of the first level; even.
        multipliers:      width of each level over `channels`; one level more than there are down-samplings.
        num_res_blocks:   residual blocks per level on the way down; one more per level on the way up.
        attention_levels: levels whose blocks attend (level l works at 1/2^l of the size); those beyond the depth are ignored.
        middle:           two more blocks at the deepest level, the first attending if that level does. Without them the deepest
                          feature goes straight up and is not concatenated with itself (in diffusers it is: 104.7 M parameters).
        scale_shift:      the time embedding scales and shifts after the second norm. False: it is added before it, which saves
                          SMALL 5.2 M parameters; only so does it have the 98.22 M of the released one.
        head_width:       channels per attention head.
        dropout:          probability in [0, 1), before the second convolution of each block.
        norm:             group: GroupNorm, whose statistics couple all pixels; local: over the channels of each pixel, so that the
                          receptive field is what receptive_field says.
    """

    def __init__(self, in_channels, channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2,
                 attention_levels=(3, 4, 5), middle=True, scale_shift=True, head_width=16, dropout=0.0, norm="group"):
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels is {channels}, but the time embedding is half sines, half cosines: use {channels + 1}")
        self.config = dict(in_channels=in_channels, channels=channels, multipliers=list(multipliers),
                           num_res_blocks=num_res_blocks, attention_levels=list(attention_levels), middle=middle,
                           scale_shift=scale_shift, head_width=head_width, dropout=dropout, norm=norm)
        self.depth = len(multipliers) - 1
        widths = [channels * m for m in multipliers]

        def block(c_in, level):
            attention = head_width if level in attention_levels else None
            return Block(c_in, widths[level], 4 * channels, scale_shift, dropout, norm, attention)

        self.embed = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(),
                                   nn.Linear(4 * channels, 4 * channels), nn.SiLU())
        self.input = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        c, skips = widths[0], []                                # c: channels of the current feature
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                skips.append(c)
                self.down.append(block(c, level))
                c = width
            if level < self.depth:
                skips.append(c)
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
        if middle:
            skips.append(c)
            self.middle = nn.ModuleList([block(c, self.depth), Block(c, c, 4 * channels, scale_shift, dropout, norm)])
        else:
            self.middle = nn.ModuleList([block(c, self.depth)])  # the first block of the way up, which has no skip to take
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            while len(skips) > level * (num_res_blocks + 1):
                self.up.append(block(c + skips.pop(), level))
                c = widths[level]
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c, c, 3, padding=1)))
        self.output = nn.Sequential(norm_layer(norm, c), nn.SiLU(), zero(nn.Conv2d(c, in_channels, 3, padding=1)))

    def forward(self, x, t):
        """
        Args:
            x: (B, in_channels, H, W) float; H and W multiples of 2^depth.
            t: (B,) int64 on x's device, or one Python int for the whole batch (no transfer, no synchronisation).
        Returns: (B, in_channels, H, W), dtype of x also under autocast or with the weights in bfloat16; 0 at initialisation.
        """
        check_size(*x.shape[2:], self.depth)
        if isinstance(t, int):
            t = torch.full((1,), t, device=x.device)            # one row, broadcast over the batch
        dtype = self.input.weight.dtype
        emb = self.embed(timestep_embedding(t, self.config["channels"]).to(dtype))      # (B or 1, 4 * channels)
        h, skips = self.input(x.to(dtype)), []
        for layer in self.down:
            skips.append(h)
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
        if self.config["middle"]:
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, Block) else layer(h)
        return self.output(h).to(x.dtype)


# --- receptive field and cost ---

def receptive_field(net):
    """Side, in pixels, of the square of input that one output pixel can depend on (norms aside); math.inf with attention.

    Follows one output pixel back to the input: a 3x3 convolution adds 2, nearest up-sampling maps w pixels to w // 2 + 1 (at
    the worst alignment), a strided 3x3 convolution maps w to 2w + 1. Every skip is narrower than the path below it.
    """
    if any(level <= net.depth for level in net.config["attention_levels"]):
        return math.inf
    blocks_down, blocks_up = net.config["num_res_blocks"], net.config["num_res_blocks"] + 1
    w = 1 + 2                                                                           # output convolution
    for _ in range(net.depth):
        w = (w + 4 * blocks_up + 2) // 2 + 1                                            # the way up, from its end
    w += 4 * blocks_up + 4 * blocks_down + (8 if net.config["middle"] else 0)           # deepest level
    for _ in range(net.depth):
        w = 2 * w + 1 + 4 * blocks_down
    return w + 2                                                                        # input convolution


def measure_receptive_field(net, max_width=4096):
    """The same by gradient: which input columns move one output pixel, the widest over all alignments to the grid.

    On a copy in double precision with the norms removed and constant positive weights, so that no two paths cancel. The input
    is a strip as low as the network allows: rows and columns are treated alike, and a square would cost hundreds of times more.
    Returns math.inf if the gradient reaches an end of a strip of max_width pixels. Ask a narrow network: the width of its
    layers changes nothing but the time.
    """
    net = copy.deepcopy(net).double().eval()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.GroupNorm, LocalNorm)):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for p in net.parameters():                              # convolutions average, all else is 0
            p.fill_(1 / p[0].numel() if p.dim() == 4 else 0)
    f, width = 2 ** net.depth, 256
    while width <= max_width:
        x = torch.ones(f, net.config["in_channels"], f, width, dtype=torch.float64, requires_grad=True)
        columns = width // 2 + torch.arange(f)                  # image i of the batch asks about output column width/2 + i
        net(x, 0)[torch.arange(f), 0, 0, columns].sum().backward()
        touched = x.grad.abs().amax(dim=(1, 2)) > 0                                     # (f, width)
        if not touched[:, [0, -1]].any():
            return touched.sum(dim=1).max().item()
        width *= 2
    return math.inf


def count_parameters(net):
    """Trainable numbers in net."""
    return sum(p.numel() for p in net.parameters())


def count_flops(net, height, width):
    """FLOPs of one forward pass of one image, 2 per multiply-add; no time if net was built under torch.device("meta")."""
    device = net.input.weight.device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, net.config["in_channels"], height, width, device=device), 0)
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description="Parameters, FLOPs and receptive field of the U-Nets.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="image size to report on")
    parser.add_argument("--channels", type=int, default=7, help="image channels plus mask classes, background included")
    args = parser.parse_args()

    sizes = list(dict.fromkeys([(64, 64), (256, 256), tuple(args.size)]))
    print(f"{'':12} {'parameters':>12}" + "".join(f"{f'GFLOP {h}x{w}':>16}" for h, w in sizes) + "   receptive field")
    for name, settings in ("LARGE", LARGE), ("SMALL", SMALL):
        with torch.device("meta"):
            net = UNet(args.channels, **settings)
        try:
            flops = "".join(f"{count_flops(net, h, w) / 1e9:16.1f}" for h, w in sizes)
        except ValueError as error:
            parser.error(str(error))
        field = receptive_field(net)
        print(f"{name:12} {count_parameters(net):12,}{flops}   {'whole image' if field == math.inf else f'{field} px'}")

    print(f"\nreceptive field without attention and middle\n{'depth':>5} {'blocks per level':>17} {'declared px':>12} "
          f"{'measured px':>12} {'share of %dx%d' % tuple(args.size):>18}")
    for num_res_blocks in 1, 2:
        for depth in range(4):
            net = UNet(1, 2, (1,) * (depth + 1), num_res_blocks, attention_levels=(), middle=False)
            declared = receptive_field(net)
            share = min(declared, args.size[0]) * min(declared, args.size[1]) / (args.size[0] * args.size[1])
            print(f"{depth:5} {num_res_blocks:17} {declared:12} {measure_receptive_field(net):12} {share:18.1%}")


if __name__ == "__main__":
    main()
