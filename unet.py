"""The U-Net of diffusion models with its depth as an argument: fewer down-samplings see less of the image.

A network that sees the whole of a few training images learns them by heart; one that sees only patches of
them recombines the patches (Defect-Gen, arXiv:2310.17316). `len(multipliers) - 1` down-samplings set the size
of the patch.

The layout is that of guided-diffusion (Dhariwal & Nichol 2021): the time embedding scales and shifts
GroupNorm, attention heads are 16 channels wide, `num_res_blocks` blocks per level go down and one more per
level comes up, each taking one skip. With 7 channels in and out (RGB + 4 mask classes), as `python unet.py`
counts them, 2 FLOPs per multiply-add:

              parameters (released)    forward at 64x64 (released)    at 256x256 (released)
    LARGE    125,380,871 (125.38 M)     31.4 GFLOP (31.4)              507 GFLOP (507)
    SMALL     98,216,839  (98.22 M)    132.0 GFLOP (132)              2112 GFLOP (2112)

What bites: GroupNorm's statistics couple all pixels, so "receptive field" here is that of the convolutions
and attention; with norm="local" it is the whole truth.

    python unet.py                        # table: parameters, FLOPs, receptive field per depth
    python unet.py --size 512 384 --channels 9
"""
import argparse
import math

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# The two networks of the paper, as released: UNet(channels_of_the_joint_image, **LARGE).
LARGE = dict(channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_levels=(3, 4, 5),
             middle=True, scale_shift=True)
SMALL = dict(channels=192, multipliers=(1, 2, 4), num_res_blocks=2, attention_levels=(),
             middle=False, scale_shift=False)


def check_size(height, width, depth):
    """Raise ValueError, naming sizes that work, unless height and width can be halved `depth` times."""
    f = 2 ** depth
    below = max(f, height // f * f), max(f, width // f * f)
    above = max(f, math.ceil(height / f) * f), max(f, math.ceil(width / f) * f)
    if below != (height, width):
        sizes = " or ".join(f"--size {h} {w}" for h, w in dict.fromkeys((below, above)))
        raise ValueError(f"image is {height}x{width}, but this net halves it {depth} times: pass {sizes}")


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


def norm_layer(norm, channels):
    """local: LocalNorm; group: GroupNorm with 32 groups, fewer where a group would have under 4 channels."""
    if norm == "local":
        return LocalNorm(channels)
    return nn.GroupNorm(math.gcd(min(32, max(1, channels // 4)), channels), channels)


def timestep_embedding(t, dim):
    """(B,) -> (B, dim) float32: cosines, then sines, of t at dim/2 frequencies from 1 to 1/10000 (DDPM)."""
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(10000) / half))
    angles = t.float()[:, None] * frequencies                                           # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Self-attention over all pixels with heads of 16 channels, residual."""

    def __init__(self, channels, norm):
        super().__init__()
        self.heads = channels // math.gcd(channels, 16)
        self.norm = norm_layer(norm, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                               # each (B, heads, HW, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Block(nn.Module):
    """Two 3x3 convolutions with the time embedding in between, then attention where asked; residual."""

    def __init__(self, in_channels, out_channels, embedding, scale_shift, dropout, norm, attention=False):
        super().__init__()
        self.norm1 = norm_layer(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = norm_layer(norm, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels, norm) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        modulation = self.modulation(emb)[:, :, None, None]                          # (B or 1, C or 2C, 1, 1)
        if modulation.shape[1] == h.shape[1]:
            h = self.norm2(h + modulation)
        else:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


# --- the network ---

class UNet(nn.Module):
    """f(x_t, t) -> same shape as x_t. UNet(**net.config) builds it again; net.depth counts down-samplings.

    Args:
        in_channels:      channels of the joint image, in and out; any number.
        channels:         width of the first level; even.
        multipliers:      width of each level over `channels`; one level more than there are down-samplings.
        num_res_blocks:   residual blocks per level on the way down; one more per level on the way up.
        attention_levels: levels whose blocks attend (level l works at 1/2^l of the size); those beyond the
                          depth are ignored.
        middle:           two more blocks at the deepest level, the first attending if that level does.
                          Without them the deepest feature goes straight up, not concatenated with itself
                          (as diffusers does, which makes 104.7 M parameters of SMALL).
        scale_shift:      the time embedding scales and shifts after the second norm. False: it is added
                          before it, as in the released SMALL.
        dropout:          probability in [0, 1), before the second convolution of each block.
        norm:             group: GroupNorm, whose statistics couple all pixels; local: over the channels of
                          each pixel, so that the receptive field is what receptive_field says.
    """

    def __init__(self, in_channels, channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2,
                 attention_levels=(3, 4, 5), middle=True, scale_shift=True, dropout=0.0, norm="group"):
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels is {channels}, but half are sines, half cosines: use an even number")
        self.config = dict(in_channels=in_channels, channels=channels, multipliers=list(multipliers),
                           num_res_blocks=num_res_blocks, attention_levels=list(attention_levels),
                           middle=middle, scale_shift=scale_shift, dropout=dropout, norm=norm)
        self.depth = len(multipliers) - 1
        widths, hidden = [channels * m for m in multipliers], 4 * channels

        def block(c_in, level):
            return Block(c_in, widths[level], hidden, scale_shift, dropout, norm, level in attention_levels)

        self.embed = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(),
                                   nn.Linear(hidden, hidden), nn.SiLU())
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
        self.middle = nn.ModuleList([block(c, self.depth)])     # without `middle`: goes up, takes no skip
        if middle:
            skips.append(c)
            self.middle.append(Block(c, c, hidden, scale_shift, dropout, norm))
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            while len(skips) > level * (num_res_blocks + 1):    # one block for each skip of this level
                self.up.append(block(c + skips.pop(), level))
                c = widths[level]
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"),
                                             nn.Conv2d(c, c, 3, padding=1)))
        self.output = nn.Sequential(norm_layer(norm, c), nn.SiLU(),
                                    zero(nn.Conv2d(c, in_channels, 3, padding=1)))

    def forward(self, x, t):
        """
        Args:
            x: (B, in_channels, H, W) float; H and W multiples of 2^depth.
            t: (B,) int64 on x's device, or one Python int for the whole batch, which waits for no device.
        Returns: (B, in_channels, H, W) in the dtype of x, whatever the weights have; 0 at initialisation.
        """
        check_size(*x.shape[2:], self.depth)
        if isinstance(t, int):
            t = torch.full((1,), t, device=x.device)            # one row, broadcast over the batch
        dtype = self.input.weight.dtype
        emb = self.embed(timestep_embedding(t, self.config["channels"]).to(dtype))    # (B or 1, 4 * channels)
        h, skips = self.input(x.to(dtype)), []
        for layer in self.down:
            skips.append(h)                                     # a layer's input is its skip
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
    """Side in pixels of the square of input that one output pixel sees, norms aside; inf with attention.

    Follows one output pixel back to the input: a 3x3 convolution adds 2, nearest up-sampling maps w pixels to
    w // 2 + 1 (at the worst alignment), a strided 3x3 convolution maps w to 2w + 1. Every skip is narrower
    than the path below it.
    """
    if any(level <= net.depth for level in net.config["attention_levels"]):
        return math.inf
    blocks_down, blocks_up = net.config["num_res_blocks"], net.config["num_res_blocks"] + 1
    w = 1 + 2                                                                           # output convolution
    for _ in range(net.depth):
        w = (w + 4 * blocks_up + 2) // 2 + 1                                        # the way up, from its end
    w += 4 * blocks_up + 4 * blocks_down + (8 if net.config["middle"] else 0)           # deepest level
    for _ in range(net.depth):
        w = 2 * w + 1 + 4 * blocks_down
    return w + 2                                                                        # input convolution


def field_in_words(net):
    """The receptive field for a table or a sentence."""
    field = receptive_field(net)
    return "the whole image" if field == math.inf else f"{field} px"


def count_parameters(net):
    """Trainable numbers in net."""
    return sum(p.numel() for p in net.parameters())


def count_flops(net, height, width):
    """FLOPs of a forward pass of one image, 2 per multiply-add; instant for a net on torch.device("meta")."""
    device = net.input.weight.device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, net.config["in_channels"], height, width, device=device), 0)
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description="Parameters, FLOPs and receptive field of the U-Nets.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="of images")
    parser.add_argument("--channels", type=int, default=7, help="image channels plus classes with background")
    args = parser.parse_args()
    height, width = args.size

    print(f"the released networks    parameters   GFLOP at {height}x{width}   receptive field")
    for name, settings in ("LARGE", LARGE), ("SMALL", SMALL):
        with torch.device("meta"):
            net = UNet(args.channels, **settings)
        try:
            gflops = count_flops(net, height, width) / 1e9
        except ValueError as error:
            parser.error(str(error))
        print(f"{name:22} {count_parameters(net):12,} {gflops:18.1f}   {field_in_words(net)}")

    print("\ndown-samplings   blocks per level   receptive field without attention and middle")
    for num_res_blocks in 1, 2:
        for depth in range(4):
            net = UNet(1, 2, (1,) * (depth + 1), num_res_blocks, attention_levels=(), middle=False)
            print(f"{depth:14} {num_res_blocks:18}   {field_in_words(net)}")


if __name__ == "__main__":
    main()
