"""What the tests share: a small data set, a run trained on it in seconds, commands run as users run them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from datasets import write_classes, write_pair

ROOT = Path(__file__).parent.parent
TINY = ["--size", "16", "16", "--steps", "4", "--batch-size", "2", "--save-every", "2", "--device", "cpu",
        "--no-bf16", "--t-range", "own", "--no-soft-masks"]         # one size for both: the paper's hand-over
torch.set_num_threads(1)            # small tensors: more threads only wait for each other


def run(script, *flags):
    """Run a command in a process of its own; returns it with .returncode, .stdout and .stderr."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, flags)], cwd=ROOT, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, timeout=300)


def picture(path):
    return np.array(Image.open(path))


def make_data(folder, kinds=("crack", "dirt", "good"), count=8, size=(24, 32)):
    """A Defect Spectrum folder: noise with a square of class 1 (crack) or 2 (dirt), none on good ones."""
    random = np.random.default_rng(0)
    for k, kind in enumerate(kinds):
        for i in range(count):
            image, mask = random.integers(100, 156, (3, *size), np.uint8), np.zeros(size, np.uint8)
            if kind != "good":
                mask[4 + i:12 + i, 4 + 8 * k:14 + 8 * k] = k + 1
                image[k, mask > 0] = 250
            write_pair(folder, f"{i:03d}", image, mask, kind)
    write_classes(folder, ("background", "crack", "dirt"))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "bolt")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run folder with both stages, four steps each.

    Their averages, which would draw one grey for every seed, are shaken.
    """
    out = tmp_path_factory.mktemp("runs") / "bolt"
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(data), "--out", str(out), *TINY]))
        path, random = out / stage / "step_000004.pt", torch.Generator().manual_seed(0)
        checkpoint = torch.load(path, weights_only=True)
        for value in checkpoint["ema"].values():
            value.add_(0.05 * torch.randn(value.shape, generator=random))
        torch.save(checkpoint, path)
    return out
