"""The drawn data set: pictures of pills, zippers and boards with exact masks, made from random numbers alone.

Every shape is a formula in native px, so a picture has the same geometry at any size, and the mask is the
very region that was painted. x runs right and y down from the product's centre; the depth of a region is > 0
inside, in px. Random numbers are drawn in a fixed order: a change of that order changes every picture.

    python data/drawn.py --out drawn.png                a sheet: a row per product, a picture per kind
"""
import argparse
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image


class Drawn(NamedTuple):
    """A product. Defects lie around x = +-room[0] +-room[1], y = +-room[2] px; room[3] = 1: in an ellipse."""
    native: tuple                     # (H, W) in px
    classes: tuple
    noun: str
    room: tuple

    @property
    def kinds(self):
        return self.classes[1:] + ("combined", "good")


class Look(NamedTuple):
    """How one defect class is drawn, wherever it falls on the product."""
    size: tuple                       # line: (least, most, half width) px; else (least, middle, most) area
    angle: tuple                      # middle and spread of a line's direction, rad from the x axis
    opacity: float
    relief: float                     # px that it stands out of the surface
    variants: tuple                   # of (words, shape, RGB in [0, 1])


DRAWN = {
    "pill": Drawn((800, 800), ("background", "color", "contamination", "crack", "faulty_imprint", "scratch"),
                  "white oval pill", (0, 310, 215, 1)),
    "zipper": Drawn((1024, 1024), ("background", "broken_teeth", "fabric_border", "fabric_interior",
                                   "split_teeth", "squeezed_teeth"), "dark grey zipper", (212, 85, 450, 0)),
    "wood": Drawn((1024, 1024), ("background", "color", "crack", "scratch", "hole", "liquid"),
                  "brown wooden board", (0, 435, 435, 0)),
}
LOOKS = {                             # the middle area, which half of the pictures exceed: the paper's limit
    ("pill", "color"): Look((75, 300, 4000), (0, 0), 0.85, 0, (
        ("red color stain", "blob", (0.75, 0.1, 0.1)), ("yellow color stain", "blob", (0.85, 0.6, 0.05)),
        ("orange color stain", "blob", (0.85, 0.35, 0.05)))),
    ("pill", "contamination"): Look((1000, 4000, 20000), (0, 1.6), 0.92, 6, (
        ("black speck of contamination", "blob", (0.1, 0.1, 0.1)),
        ("brown speck of contamination", "blob", (0.3, 0.19, 0.1)),
        ("green speck of contamination", "blob", (0.2, 0.3, 0.17)),
        ("dark fibre of contamination", "fibre", (0.12, 0.16, 0.3)))),
    ("pill", "crack"): Look((220, 380, 11), (0, 1.6), 1, -14, (("dark crack", "crack", (0.13, 0.11, 0.1)),)),
    ("pill", "scratch"): Look((180, 340, 8.5), (0, 1.6), 0.9, -12, (
        ("scratch", "scratch", (0.58, 0.55, 0.51)),)),
    ("zipper", "fabric_interior"): Look((1200, 4800, 24000), (1.57, 0.3), 0.9, -4, (
        ("hole in the fabric interior", "blob", (0.66, 0.67, 0.68)),
        ("stain on the fabric interior", "blob", (0.5, 0.37, 0.24)),
        ("pulled thread in the fabric interior", "fibre", (0.55, 0.55, 0.6)))),
    ("wood", "color"): Look((62, 250, 4000), (0, 0), 0.95, 3, (
        ("red spot of color", "blob", (0.75, 0.1, 0.1)), ("blue spot of color", "blob", (0.15, 0.25, 0.7)),
        ("white spot of color", "blob", (0.95, 0.95, 0.93)),
        ("green spot of color", "blob", (0.1, 0.5, 0.3)))),
    ("wood", "crack"): Look((320, 620, 16), (1.57, 0.1), 1, -14, (
        ("dark crack along the grain", "crack", (0.07, 0.045, 0.03)),)),
    ("wood", "scratch"): Look((280, 520, 10), (0, 1.1), 0.85, -10, (
        ("light scratch", "scratch", (0.95, 0.85, 0.7)),)),
    ("wood", "hole"): Look((4000, 7000, 12000), (0, 0), 0.85, -40, (
        ("round hole", "pit", (0.14, 0.09, 0.06)),)),
    ("wood", "liquid"): Look((250, 1000, 16000), (0, 0), 0.62, 0, (
        ("liquid stain", "blob", (0.2, 0.1, 0.05)),)),
}


class Region(NamedTuple):
    """A shape: the window (row slice, column slice) that holds it, its depth there, points (N, 2) around."""
    window: tuple
    depth: np.ndarray
    outline: np.ndarray = None        # None: never marked as a defect
    area_px: float = 0


class Picture:
    """A picture being drawn: albedo (H, W, 3) in [0, 1], height (H, W) in px, mask (H, W), its defects."""

    def __init__(self, rng, native, shape, tilt, shift):
        """Place the product, turned by up to `tilt` rad and moved by up to `shift` px."""
        self.native, self.shape, self.step = native, shape, [n / s for n, s in zip(native, shape)]
        angle, self.offset = rng.uniform(-tilt, tilt), rng.uniform(-shift, shift, 2).tolist()
        self.cos, self.sin = float(np.cos(angle)), float(np.sin(angle))
        v, u = ((np.arange(n, dtype=np.float32) + 0.5) * s - 0.5 * size - o
                for n, s, size, o in zip(shape, self.step, native, self.offset))
        self.x = self.cos * u + self.sin * v[:, None]                                           # (H, W)
        self.y = self.cos * v[:, None] - self.sin * u
        self.albedo, self.height = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
        self.inside = np.full(shape, 1e3, np.float32)            # depth of the part that can have defects
        self.mask, self.defects = np.zeros(shape, np.uint8), []

    def window(self, x, y, reach):
        """Slices of the rows and columns within `reach` px of (x, y)."""
        turned = self.cos * y + self.sin * x, self.cos * x - self.sin * y
        middle = [p + o + n / 2 for p, o, n in zip(turned, self.offset, self.native)]
        return tuple(slice(max(0, int((m - reach) / s) - 1), max(1, int((m + reach) / s) + 2))
                     for m, s in zip(middle, self.step))

    def noise(self, rng, rows, columns, octaves=2):
        """Value noise (H, W), mean 0, std about 0.6: random grids, enlarged; the same at every size."""
        grids = [rng.standard_normal((rows << o, columns << o)).astype(np.float32) * 0.7 ** o
                 for o in range(octaves)]
        size = self.shape[::-1]
        return sum(np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grids)

    def lines(self, polylines):
        """Region of strokes, each polyline (N, 3) of x, y, half width."""
        outline = np.concatenate([line[:, :2] + line[:, 2:] * side for line in polylines
                                  for side in ((1, 0), (-1, 0), (0, 1), (0, -1))])
        low, high = outline.min(0), outline.max(0)
        window, area_px = self.window(*(low + high) / 2, np.hypot(*(high - low)) / 2), 0
        x, y, depth = self.x[window], self.y[window], np.full(self.x[window].shape, -1e3, np.float32)
        for line in (p.tolist() for p in polylines):
            for (ax, ay, a), (bx, by, b) in zip(line, line[1:]):
                dx, dy = bx - ax, by - ay
                t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
                np.maximum(depth, a + (b - a) * t - np.hypot(x - ax - t * dx, y - ay - t * dy), out=depth)
                area_px += np.hypot(dx, dy) * (a + b)
        return Region(window, np.minimum(depth, self.inside[window]), outline, area_px)

    def blob(self, rng, x, y, area_px, rough):
        """Region with a wavy outline r(angle) whose mean square is that of a circle: its area is area_px."""
        k = np.arange(2, 9)
        wave, phase = rough * rng.uniform(0.3, 1, 7) / k ** 0.8, rng.uniform(0, 2 * np.pi, 7)
        radius, slim = (area_px / np.pi / (1 + (wave ** 2).sum() / 2)) ** 0.5, rng.uniform(0.85, 1.25)

        def edge(angle):
            waves = (w * np.cos(n * angle + p) for n, w, p in np.c_[k, wave, phase].tolist())
            return float(radius) * (1 + sum(waves))
        turn = np.linspace(0, 2 * np.pi, 24)
        outline = edge(turn)[:, None] * np.stack([np.cos(turn) / slim, np.sin(turn) * slim], 1) + (x, y)
        window = self.window(x, y, 2 * radius)
        dx, dy = (self.x[window] - x) * slim, (self.y[window] - y) / slim
        depth = edge(np.arctan2(dy, dx)) - np.hypot(dx, dy)
        return Region(window, np.minimum(depth, self.inside[window]), outline, area_px)

    def paint(self, region, colour, opacity=1.0, relief=0.0, slope=8.0):
        """Blend a colour into a region; raise it by `relief` px (< 0: sink it) over the first `slope` px."""
        alpha = opacity * np.clip(region.depth / max(self.step) + 0.5, 0, 1)     # share of a pixel covered
        self.albedo[region.window] += alpha[..., None] * (np.float32(colour) - self.albedo[region.window])
        self.height[region.window] += relief * np.clip(region.depth / slope, 0, 1)

    def mark(self, region, index, words):
        """Give a region its class and remember it for the caption."""
        self.mask[region.window][region.depth > 0] = index
        self.defects.append((region, words))

    def develop(self, rng, k):
        """Light the scene, average k x k samples to a pixel, add sensor noise: (H / k, W / k, 3) uint8."""
        toward, slant, warmth = rng.uniform(-2.4, -0.8), rng.uniform(0, 0.3), rng.uniform(-0.05, 0.05)
        lx, ly = 0.6 * float(np.cos(toward)), 0.6 * float(np.sin(toward))      # the lamp stands above
        gy, gx = np.gradient(self.height, *self.step)
        light = 0.23 + np.clip((0.8 - gx * lx - gy * ly) / np.sqrt(1 + gx * gx + gy * gy), 0, None)
        light *= 1 + slant * (self.x * lx + self.y * ly) / max(self.native)
        lamp = rng.uniform(0.88, 1.08) * np.float32([1 + warmth, 1, 1 - warmth])
        image = self.albedo * light[..., None] * lamp
        if k > 1:
            image = image.reshape(self.shape[0] // k, k, self.shape[1] // k, k, 3).mean((1, 3))
        image += rng.standard_normal(image.shape, dtype=np.float32) * 0.008
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)

    def original(self):
        """(H, W) 0/1, as older data sets annotate: 12 coarse sides, 10 px around the largest defect alone."""
        coarse = np.zeros(self.shape, np.uint8)
        if self.defects:
            outline = max((region for region, _ in self.defects), key=lambda region: region.area_px).outline
            middle = outline.mean(0)
            window = self.window(*middle, np.hypot(*(outline - middle).T).max() + 30)
            x, y, coarse[window] = self.x[window], self.y[window], 1
            for angle in np.arange(12) * np.pi / 6:
                c, s = float(np.cos(angle)), float(np.sin(angle))
                coarse[window] &= x * c + y * s < float((outline @ (c, s)).max()) + 10
        return coarse

    def caption(self, noun):
        """One sentence: the product, then each defect with its class, rough size and place."""
        said = []
        for region, words in self.defects:
            x, y = (region.outline.mean(0) / self.native[0]).tolist()
            place = [names[p > 0] for p, names in ((y, ("upper", "lower")), (x, ("left", "right")))
                     if abs(p) > 0.08]
            where = ("near the centre", f"in the {' '.join(place)} half", f"in the {' '.join(place)}")
            share = region.area_px / (self.native[0] * self.native[1])
            size = ("tiny", "small", "medium-sized", "large")[np.searchsorted((0.0008, 0.004, 0.015), share)]
            said.append(f"a {size} {words} {where[len(place)]}")
        said[:-1] = [", ".join(said[:-1])] if said[1:] else []
        return f"A {noun} with {' and '.join(said)}." if said else f"A flawless {noun}."


def drawn_kind(name, index):
    """The kind (folder) of picture `index`: the kinds take turns."""
    return DRAWN[name].kinds[index % len(DRAWN[name].kinds)]


def draw(name, seed, index, size=None, lit=True):
    """Draw picture `index` of a product; a pure function of its arguments.

    Args:
        name: "pill" | "zipper" | "wood".   seed: of the data set, >= 0.   index: >= 0; it decides the kind.
        size: (H, W) in px, None = native. Not square = squashed, as a photo is when resized.
        lit:  False leaves the light away, half of the work: image is None.
    Returns: image (H, W, 3) uint8, mask (H, W) uint8 class index, original (H, W) uint8 0/1, kind, caption.
    """
    if name not in DRAWN:
        raise ValueError(f"there is no drawn product {name!r}; choose from {', '.join(DRAWN)}")
    product, kind = DRAWN[name], drawn_kind(name, index)
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed, index])
    todo = [] if kind == "good" else [kind]
    if kind == "combined":
        todo = rng.permutation(product.classes[1:])[:rng.integers(2, 4)].tolist()
    h, w = size or product.native
    k = 3 if max(h, w) <= 100 else 1            # odd: the middle one of k x k samples is the pixel's centre
    setups = {"pill": (_pill, 0.15, 20), "zipper": (_zipper, 0.04, 20), "wood": (_wood, 0.03, 60)}
    setup, tilt, shift = setups[name]
    picture = Picture(rng, product.native, (h * k, w * k), tilt, shift)
    setup(rng, picture, {c: product.classes.index(c) for c in todo})
    for c in todo:
        if (name, c) in LOOKS:
            _defect(rng, picture, product.room, LOOKS[name, c], product.classes.index(c))
    middle = np.s_[k // 2::k, k // 2::k]
    image = picture.develop(rng, k) if lit else None
    masks = picture.mask[middle].copy(), picture.original()[middle].copy()
    return image, *masks, kind, picture.caption(product.noun)


def _defect(rng, picture, room, look, index):
    """Draw one class of defect on a product: one line, or one to three blobs or fibres."""
    words, shape, colour = look.variants[rng.integers(len(look.variants))]
    if shape in ("crack", "scratch"):
        sizes = [rng.uniform(*look.size[:2])]                      # a length
    else:
        pieces = 1 if shape == "pit" else rng.integers(1, 4)
        sizes = (_area(rng, *look.size) * rng.dirichlet([4.0] * pieces)).tolist()
    for size in sizes:
        length = size
        if shape not in ("crack", "scratch"):
            length = {"blob": 1.4, "pit": 1.2, "fibre": 4.5}[shape] * size ** 0.5
        x, y = _free_place(rng, picture, room, length)
        angle = look.angle[0] + rng.uniform(-1, 1) * look.angle[1]
        if shape == "crack":
            lines = _crack(rng, x, y, length, angle, look.size[2])
        elif shape == "scratch":
            across = 30 * np.float64([-np.sin(angle), np.cos(angle), 0])
            lines = [_walk(rng, x, y, length * rng.uniform(0.6, 1), angle, 0.07, look.size[2]) + i * across
                     for i in range(rng.integers(1, 4))]
        else:                                  # a blob does not use it, but its numbers come after these
            lines = [_walk(rng, x, y, length, angle, 0.5, size / length / 1.5, 12)]
        if shape in ("blob", "pit"):
            region = picture.blob(rng, x, y, size, 0.06 if shape == "pit" else 0.35)
        else:
            region = picture.lines(lines)
        picture.paint(region, colour, look.opacity, look.relief, 40 if shape == "pit" else 8)
        picture.mark(region, index, words)


def _area(rng, least, middle, most):
    """A random area: as often below the middle as above, never within 3 % of it; log-uniform in each."""
    ends = (least, 0.97 * middle) if rng.random() < 0.5 else (1.03 * middle, most)
    return np.exp(rng.uniform(*np.log(ends)))


def _free_place(rng, picture, room, length):
    """(x, y) in the product's room for a defect of that length: of 12 places the farthest from the others."""
    p = rng.uniform(-1, 1, (12, 2))
    p = p * np.sqrt(1 - room[3] * p[:, ::-1] ** 2 / 2) * np.maximum(np.subtract(room[1:3], 0.5 * length), 10)
    p[:, 0] += rng.choice([-1, 1], 12) * room[0]
    if not picture.defects:
        return p[0].tolist()
    others = [region.outline.mean(0) for region, _ in picture.defects]
    return p[np.hypot(*(p[:, None] - others).T).min(0).argmax()].tolist()


def _walk(rng, x, y, length, angle, wiggle, half, n=9):
    """A wandering line of n points around (x, y), widest in the middle: (n, 3) of x, y, half width in px."""
    turn = angle + wiggle * rng.standard_normal(n - 1)
    p = np.cumsum(np.r_[[(0, 0)], np.stack([np.cos(turn), np.sin(turn)], 1) * length / (n - 1)], 0)
    width = half * (0.4 + 0.6 * np.sin(np.linspace(0.15, 3, n))) * rng.uniform(0.7, 1.2, n)
    return np.c_[p - p.mean(0) + (x, y), width]


def _crack(rng, x, y, length, angle, half):
    """A trunk and two twigs that leave it, one to each side: a list of (n, 3)."""
    trunk = _walk(rng, x, y, length, angle, 0.35, half)
    twigs = [_walk(rng, 0, 0, 0.3 * length, angle + turn * rng.uniform(0.3, 0.7), 0.3, 0.5 * half, 4)
             for turn in (-1, 1)]
    return [trunk] + [t + (trunk[i] - t[0]) * (1, 1, 0) for t, i in zip(twigs, rng.integers(2, 7, 2))]


def _pill(rng, picture, todo):
    """A white oval tablet with the letters FF pressed into it, on a dark table; draws the faulty imprint."""
    far = ((np.abs(picture.x) / 320) ** 2.4 + (np.abs(picture.y) / 225) ** 2.4) ** (1 / 2.4)     # 1 = the rim
    shadow = np.clip(1.6 - np.hypot((picture.x - 25) / 320, (picture.y - 40) / 225), 0, 0.6)
    table = (1 + 0.12 * picture.noise(rng, 40, 40)) * (1 - 1.4 * shadow)
    picture.albedo[:] = np.float32([0.17, 0.18, 0.21]) * table[..., None]
    speckle = np.clip(picture.noise(rng, 110, 110, 1) - 2.1, 0, 1)[..., None] * np.float32([0.04, 0.3, 0.32])
    body = Region(np.s_[:, :], (1 - far) * 225)
    white = np.float32([0.83, 0.81, 0.76]) * (1 + 0.02 * picture.noise(rng, 90, 90))[..., None]
    picture.paint(body, white - speckle)
    picture.height += 105 * np.sqrt(np.clip(1 - far ** 4, 0, 1))
    picture.inside = body.depth - 6                       # no defect hangs over the rim
    bars = [np.float64([(x, y, 14), (x + dx, y + dy, 14)]) for x in (-105, 30)
            for y, dx, dy in ((-75, 0, 150), (-75, 80, 0), (0, 60, 0))]
    fault = rng.permutation(["missing", "doubled"])[0] if "faulty_imprint" in todo else None
    letter, lost = 3 * int(rng.integers(2)) + np.arange(3), rng.permutation(3)[:rng.integers(1, 4)]
    hit = letter[lost] if fault == "missing" else letter
    ink = dict(colour=(0.6, 0.58, 0.55), opacity=0.8, relief=-9, slope=10)
    picture.paint(picture.lines([b for i, b in enumerate(bars) if fault != "missing" or i not in hit]), **ink)
    if fault == "missing":
        gap = picture.lines([bars[i] for i in hit])
        picture.mark(gap, todo["faulty_imprint"], "gap in the letters, a faulty imprint,")
    if fault == "doubled":
        shift = (*rng.choice([-1, 1], 2) * rng.uniform(24, 40, 2), 0)
        double = picture.lines([bars[i] + shift for i in hit])
        picture.paint(double, **ink)
        picture.mark(double, todo["faulty_imprint"], "doubled letter, a faulty imprint,")


def _wood(rng, picture, todo):
    """Three boards side by side, grain upright, now and then a knot (which is no defect)."""
    x = picture.x
    seams = (np.sort(rng.uniform(-60, 60, 2)) + (-190, 190)).tolist()
    board = (x > seams[0]).astype(np.int8) + (x > seams[1])
    tone, start = (rng.uniform(*ends, 3).astype(np.float32)[board] for ends in ((-0.12, 0.12), (0, 3000)))
    ring, knot = x + 80 * picture.noise(rng, 2, 4) + start, 0          # where across the grain
    for _ in range(rng.integers(0, 3)):
        kx, ky, radius = *rng.uniform(-430, 430, 2).tolist(), rng.uniform(60, 95)
        far = np.hypot(x - kx, (picture.y - ky) / 1.5)
        near = np.exp(-(far / radius) ** 2)
        ring += near * (1.2 * far - x + kx)                # the rings close around a knot
        knot = np.maximum(knot, np.clip(1.9 * near - 0.8, 0, 0.6))
    profile, fibre = rng.uniform(0, 1, 257), picture.noise(rng, 10, 260)
    grain = np.interp(ring % 5120, np.arange(257) * 20, profile).astype(np.float32)
    dark = np.clip(0.15 + 0.5 * grain + 0.1 * fibre + tone + 0.15 * picture.noise(rng, 3, 8), 0, 1) + knot
    picture.albedo[:] = np.float32([0.74, 0.54, 0.35]) - dark[..., None] * np.float32([0.33, 0.29, 0.22])
    picture.height += 0.7 * fibre
    for seam in seams:
        picture.paint(Region(np.s_[:, :], 4 - np.abs(x - seam)), (0.1, 0.07, 0.05), 0.75)


BORDER, ROOT, TIP = 310, 92, -26      # px from a zipper's middle line: the tape's edge, a tooth's two ends
PITCH = 80                            # px from tooth to tooth


def _zipper(rng, picture, todo):
    """Two woven tapes on a light table, joined by rows of teeth; draws what befalls teeth and border."""
    slots = (rng.permutation([-290, 0, 290]) + rng.uniform(-30, 30, 3)).tolist()   # a section for each defect
    reach = (rng.uniform(110, 150, 3) * (1.5, 1, 1)).tolist()                      # half lengths of these
    gape, cut = rng.uniform(55, 85) * ("split_teeth" in todo), rng.uniform(50, 92)
    first, count = round(slots[2] / PITCH) - 1, int(rng.integers(2, 5))
    phase, bent_side, broken_side = rng.uniform(0, PITCH), *rng.choice([-1, 1], 2).tolist()
    # px that each row, and its tape, moved out of the middle line
    apart = gape * np.clip(1 - ((picture.y - slots[0]) / reach[0]) ** 2, 0, 1) ** 1.5
    _tapes(rng, picture, todo, apart)

    band = np.s_[:], picture.window(0, 0, 230)[1]                      # the columns that hold teeth
    x, y, apart = picture.x[band], picture.y[band], apart[band]
    along = np.clip((y - slots[1]) / reach[1], -1, 1)
    bent = (1 - along ** 2) * ("squeezed_teeth" in todo)
    shade = rng.uniform(0.8, 1.1, (3, 64)).astype(np.float32)
    for side in (-1, 1):
        bend = bent * (side == bent_side)
        out = side * x - apart + 28 * bend                             # px outward from the row's line
        number = (y - phase) / PITCH + 0.5 * (side > 0)
        number += bend * (0.3 * reach[1] / PITCH * np.sin(np.pi * along) + 0.004 * out)    # close and aslant
        which = np.floor(number + 0.5).astype(np.int8)
        tooth = 16 + 4 * np.clip((12 - out) / 14, 0, 1) - np.abs(number - which) * PITCH   # thick at the tip
        tooth = np.minimum(tooth, np.minimum(out - TIP, ROOT - out))
        if "broken_teeth" in todo and side == broken_side:
            gone = (which >= first) & (which < first + count) & (out < cut)
            middle = (first + (count - 1) / 2 - 0.5 * (side > 0)) * PITCH + phase
            outline = _corners(side * (cut + TIP) / 2, middle, (cut - TIP) / 2, (count - 1) * PITCH / 2 + 20)
            missing = Region(band, np.where(gone, tooth + 4, -1e3), outline, count * 36 * (cut - TIP))
            picture.mark(missing, todo["broken_teeth"], "stretch of broken teeth")
            tooth = np.where(gone, -1e3, tooth)
        metal = np.float32([0.68, 0.68, 0.66]) * shade[side, which][..., None]
        picture.paint(Region(band, tooth), metal, relief=14, slope=10)
    if "split_teeth" in todo:
        split = Region(band, np.where(apart > 8, apart + ROOT + 4 - np.abs(x), -1e3),
                       _corners(0, slots[0], gape + ROOT + 4, 0.85 * reach[0]), 3 * (gape + ROOT) * reach[0])
        picture.mark(split, todo["split_teeth"], "stretch of split teeth")
    if "squeezed_teeth" in todo:
        depth = np.minimum(ROOT + 8 - np.abs(x), 0.85 * reach[1] - np.abs(y - slots[1]))
        squeezed = Region(band, depth, _corners(0, slots[1], ROOT + 8, 0.85 * reach[1]), 340 * reach[1])
        picture.mark(squeezed, todo["squeezed_teeth"], "stretch of squeezed teeth")
    picture.inside = np.minimum(BORDER - 6 - np.abs(picture.x), np.abs(picture.x) - ROOT - 8)


def _corners(x, y, half_x, half_y):
    """(4, 2) corners of a rectangle around (x, y)."""
    return np.float64([(x + i * half_x, y + j * half_y) for i in (-1, 1) for j in (-1, 1)])


def _tapes(rng, picture, todo, apart):
    """The table, the two tapes with their shadows, and the torn border of one."""
    x, y = picture.x, picture.y
    table = np.float32([0.66, 0.67, 0.68]) * (1 + 0.03 * picture.noise(rng, 30, 30))[..., None]
    picture.albedo[:] = table
    rib = 0.12 * np.cos(x * (2 * np.pi / 43)) + 0.3 * np.clip(1 - np.abs(np.abs(x) - 125) / 12, 0, 1)
    weave = np.sin(x * 0.45) * np.sin(y * 0.45) * min(0.2, 0.6 / max(picture.step))  # too fine when small
    threads = 1 + rib + weave + 0.1 * picture.noise(rng, 60, 60)
    cloth = np.float32([0.23, 0.235, 0.26]) * threads[..., None]
    for side in (-1, 1):
        tape = np.minimum(side * x - apart - 4, BORDER - side * x)
        picture.albedo *= 1 - 0.35 * np.clip(1 + tape / 25, 0, 1)[..., None]           # its shadow
        picture.paint(Region(np.s_[:, :], tape), cloth, relief=6)
    if "fabric_border" in todo:
        side, place = int(rng.choice([-1, 1])), rng.uniform(-380, 380)
        knots, area_px = np.r_[0, rng.uniform(0.5, 1, 7), 0], _area(rng, 1200, 4800, 24000)
        length = (area_px * rng.uniform(2, 3.5)) ** 0.5
        depth = knots * area_px / (knots.sum() * length / 8)           # trapezoids of area_px in all
        notch = np.interp(y, place + np.linspace(-0.5, 0.5, 9) * length, depth).astype(np.float32)
        inward = BORDER - side * x
        outline = _corners(side * (BORDER - depth.max() / 2), place, depth.max() / 2, length / 2)
        torn = Region(np.s_[:, :], np.minimum(inward, notch - inward), outline, area_px)
        strand = rng.uniform(-0.3, 1, 256).astype(np.float32)[(y // 11).astype(np.int16)] * notch
        loose = np.minimum(2.2 - np.abs(y % 11 - 5.5), strand - notch + inward)
        picture.paint(torn, 0.85 * table)
        picture.paint(torn._replace(depth=np.minimum(torn.depth, loose)), (0.3, 0.3, 0.33))    # loose threads
        picture.mark(torn, todo["fabric_border"], "tear in the fabric border")


def main():
    parser = argparse.ArgumentParser(description="Draw a sheet: one row per product, one picture per kind.")
    parser.add_argument("--size", type=int, default=192, help="side of a picture, px (default: %(default)s)")
    parser.add_argument("--out", default="drawn.png", help="the picture to write (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    for name, product in DRAWN.items():
        pictures = [draw(name, 0, index, (args.size, args.size)) for index in range(len(product.kinds))]
        rows.append(np.hstack([image for image, *_ in pictures]))
        print(f"{name}:", *(f"  {kind}: {caption}" for *_, kind, caption in pictures), sep="\n")
    Image.fromarray(np.vstack(rows)).save(args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
