"""What the README promises when things break: real signals and kills, full disks, damaged, strange and hostile files."""
import csv
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import evaluate
import train
from conftest import ROOT, TINY, make_data, picture
from datasets import (claimed, find_objects, natural, open_dataset, pair_paths, read_captions, read_image, read_json, read_mask, write_atomically,
                      write_classes, write_json)
from defect_gen import DefectGen, checkpoints, load_stage, save_stage

# One process that has everything imported and forks a command for each line it reads: real processes, without seconds of imports each.
SERVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, sample, train
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = job["command"]
        exec(job["fault"])
        train.run_main(train.main if sys.argv[0] == "train.py" else lambda: sample.draw_pairs(sample.parse_args()))
    print(child, flush=True)
"""


class Commands:
    """Runs train.py and sample.py in processes of their own: start() -> pid, wait(pid) -> exit status; output() of the last one."""

    def __init__(self, log):
        self.log = log
        self.server = subprocess.Popen([sys.executable, "-c", SERVER.format(root=str(ROOT))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *command, fault=""):
        return self.ask(command=[str(word) for word in command], fault=fault, log=str(self.log))

    def wait(self, pid):
        return self.ask(wait=pid)

    def run(self, *command, fault=""):
        return self.wait(self.start(*command, fault=fault))

    def output(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("commands") / "log")
    yield made
    made.server.stdin.close()
    made.server.wait()


# what a command does to itself at the n-th call of its loss: a signal at a known step
AT_CALL = """
import signal, time
loss, calls = train.training_loss, []
def faulty(*arguments):
    calls.append(0)
    if len(calls) == {call}:
        {what}
    return loss(*arguments)
train.training_loss = faulty
"""
MOMENTS = 20 if os.environ.get("ALL_FAULTS") else 4      # of a kill; make test-faults takes all
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
LONG = ["--steps", "26", "--save-every", "12"]


def flags(data, out):
    return ["train.py", "--stage", "small", "--data", data, "--out", out, *TINY, *LONG]


@pytest.fixture(scope="module")
def undisturbed(data, commands, tmp_path_factory):
    """A run of 26 steps that nothing happened to, and how long it took."""
    out, start = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    assert commands.run(*flags(data, out)) == 0, commands.output()
    return out, min(5, time.perf_counter() - start)                 # on a busy machine the first one may wait for minutes


def assert_equal_runs(out, wanted):
    """The same weights, averages and optimiser bit for bit, and the same log but for its speed."""
    ours, theirs = (load_stage(folder / "small", "small") for folder in (out, wanted))
    assert ours["step"] == theirs["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(value, theirs[part][key]) for key, value in ours[part].items())
    for key, state in ours["optimizer"]["state"].items():
        assert all(torch.equal(value, theirs["optimizer"]["state"][key][name]) for name, value in state.items())
    logs = [[{**row, "images_per_s": ""} for row in csv.DictReader((folder / "small/log.csv").open())] for folder in (out, wanted)]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == ["10", "12", "20", "24", "26"]


# --- interruption ---

@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_training_with_a_checkpoint_and_the_command_that_resumes(data, commands, undisturbed, tmp_path, name, status):
    for stop in (5, 16):                                            # the second time it is the resumed run; neither is a step of the log
        call = stop if stop == 5 else stop - 5
        command = flags(data, tmp_path / "a run") if stop == 5 else again
        assert commands.run(*command, fault=AT_CALL.format(call=call, what=f"os.kill(os.getpid(), signal.{name})")) == status, commands.output()
        assert f"stopped by {name} at step {stop}" in commands.output() and "Traceback" not in commands.output()
        assert load_stage(tmp_path / "a run/small", "small")["step"] == stop
        python, *again = shlex.split(re.search("continue: (.*)", commands.output())[1])
        assert python == "python" and again == [*map(str, flags(data, tmp_path / "a run")), "--resume"]
    assert commands.run(*again) == 0, commands.output()
    assert_equal_runs(tmp_path / "a run", undisturbed[0])


def test_an_interrupted_run_goes_on_to_more_steps_than_it_was_to_take(data, commands, undisturbed, tmp_path):
    short = [*flags(data, tmp_path), "--steps", 24]
    assert commands.run(*short, fault=AT_CALL.format(call=7, what="os.kill(os.getpid(), signal.SIGTERM)")) == 143
    assert commands.run(*flags(data, tmp_path), "--resume") == 0, commands.output()
    assert_equal_runs(tmp_path, undisturbed[0])


def test_a_second_signal_stops_at_once(data, commands, tmp_path):
    twice = "os.kill(os.getpid(), signal.SIGINT); time.sleep(1.2); os.kill(os.getpid(), signal.SIGINT)"
    assert commands.run(*flags(data, tmp_path), fault=AT_CALL.format(call=14, what=twice)) == 130
    assert [path.name for path in checkpoints(tmp_path / "small")] == ["step_000012.pt"] and "interrupted" in commands.output()


def test_processes_of_torchrun_stop_at_the_same_step_when_one_is_told_to(data, undisturbed, tmp_path):
    """Only the second process gets the signal; the checkpoint goes on in one process, up to rounding as the run that was left alone."""
    fault = AT_CALL.format(call=3, what="train.world()[0] == 1 and os.kill(os.getpid(), signal.SIGTERM)")
    (tmp_path / "train.py").write_text(f"import os, sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n{fault}\ntrain.run_main(train.main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "train.py", *flags(data, tmp_path / "run")[1:]]
    result = subprocess.run([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "stopped by SIGTERM at step 10" in result.stdout, result.stdout + result.stderr
    assert f"continue: torchrun --nproc_per_node=2 -- {tmp_path / 'train.py'} --stage small" in result.stdout
    assert load_stage(tmp_path / "run/small", "small")["step"] == 10
    train.train(train.parse_args([*map(str, flags(data, tmp_path / "run")[1:]), "--resume"]))
    ours, theirs = (load_stage(folder / "small", "small") for folder in (tmp_path / "run", undisturbed[0]))
    torch.testing.assert_close(ours["ema"], theirs["ema"], rtol=0, atol=1e-4)
    assert [row["step"] for row in train.read_log(tmp_path / "run/small/log.csv")] == ["10", "12", "20", "24", "26"]


def test_training_killed_at_random_moments_ends_with_the_same_bits(data, commands, undisturbed, tmp_path):
    wanted, duration = undisturbed
    moments, finished = random.Random(0), 0
    for _ in range(MOMENTS):
        command = [*flags(data, tmp_path), *["--resume"] * bool(checkpoints(tmp_path / "small"))]
        pid = commands.start(*command)
        time.sleep(moments.uniform(0.1, 1) * duration)
        os.kill(pid, signal.SIGKILL)
        status = commands.wait(pid)
        assert status in (0, -signal.SIGKILL), commands.output()
        if checkpoints(tmp_path / "small"):
            assert load_stage(tmp_path / "small", "small")["step"] in (12, 24, 26)
        if status == 0:
            assert_equal_runs(tmp_path, wanted)
            shutil.rmtree(tmp_path / "small")
            finished += 1
    assert commands.run(*flags(data, tmp_path), *["--resume"] * bool(checkpoints(tmp_path / "small"))) == 0, commands.output()
    assert_equal_runs(tmp_path, wanted)
    assert finished < 20 and not list((tmp_path / "small").glob(".*.tmp"))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one_and_the_rest_is_cleaned_up(data, commands, undisturbed, tmp_path):
    half = """
import signal
def save(checkpoint, path, whole=torch.save):
    whole(checkpoint, path)
    if checkpoint["step"] == 24:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
    assert commands.run(*flags(data, tmp_path), fault=half) == -signal.SIGKILL
    folder = tmp_path / "small"
    assert list(folder.glob(".*.tmp")) and load_stage(folder, "small")["step"] == 12
    (folder / "log.csv").open("a").write("14")                      # half a row
    assert commands.run(*flags(data, tmp_path), "--resume") == 0, commands.output()
    assert not list(folder.glob(".*.tmp"))
    assert_equal_runs(tmp_path, undisturbed[0])


def sampling(run, out):
    return ["sample.py", "--run", run, "--count", 12, "--num-steps", 6, "--batch-size", 2, "--out", out, "--device", "cpu"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole_pairs(folder):
    """Every image has its mask and colour mask, and all can be read."""
    for path in (folder / "image").rglob("[!.]*.png"):
        assert [picture(part).shape[:2] for part in pair_paths(folder, path.stem, "generated")] == [(16, 16)] * 3


def test_sampling_killed_at_random_moments_writes_the_same_files(trained, commands, tmp_path):
    start = time.perf_counter()
    assert commands.run(*sampling(trained, tmp_path / "wanted")) == 0, commands.output()
    duration, moments = min(5, time.perf_counter() - start), random.Random(1)
    for _ in range(MOMENTS):
        pid = commands.start(*sampling(trained, tmp_path / "killed"))
        time.sleep(moments.uniform(0.1, 1) * duration)
        os.kill(pid, signal.SIGKILL)
        commands.wait(pid)
        assert_whole_pairs(tmp_path / "killed")
    assert commands.run(*sampling(trained, tmp_path / "killed")) == 0, commands.output()
    assert {n: b for n, b in files(tmp_path / "killed").items() if not n.endswith(".tmp")} == files(tmp_path / "wanted")


def test_a_signal_ends_sampling_within_a_batch_and_the_command_goes_on(trained, commands, tmp_path):
    fault = """
import signal, defect_gen
convert, calls = defect_gen.to_x_start, []
def faulty(*arguments):
    calls.append(0)
    if len(calls) == 15:                                            # the third of six steps of the third batch
        os.kill(os.getpid(), signal.SIGTERM)
    return convert(*arguments)
defect_gen.to_x_start = faulty
"""
    assert commands.run(*sampling(trained, tmp_path / "out"), fault=fault) == 143, commands.output()
    assert len(list((tmp_path / "out/image/generated").iterdir())) == 4
    assert_whole_pairs(tmp_path / "out")
    python, *again = shlex.split(re.search("continue: (.*)", commands.output())[1])
    assert commands.run(*again) == 0 and commands.run(*sampling(trained, tmp_path / "wanted")) == 0, commands.output()
    assert files(tmp_path / "out") == files(tmp_path / "wanted")


def test_old_leftovers_of_sampling_are_removed_and_young_ones_kept(trained, commands, tmp_path):
    old, young = (tmp_path / "image/generated" / f".{name}.png.1.tmp" for name in ("old", "young"))
    old.parent.mkdir(parents=True)
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    assert commands.run(*sampling(trained, tmp_path), "--count", 1) == 0, commands.output()
    assert young.exists() and not old.exists() and len(open_dataset(tmp_path)) == 1


@pytest.mark.parametrize("write", [lambda path: write_json(path, {"new": 1}), lambda path: evaluate.write_report(path.parent, {}),
                                   lambda path: write_atomically(path, lambda p: torch.save({"masks": torch.ones(3)}, p))], ids=["metrics", "report", "cell"])
def test_a_kill_before_the_new_file_is_whole_leaves_the_old_one(tmp_path, write):
    path = tmp_path / "report.html"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        try:
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            write(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and path.read_text() == "old"
    write(path)
    assert path.read_bytes() != b"old"


# --- keep and check ---

def flip(path):
    """Damage one byte in the middle, which torch.load reads without a word."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(trained, data, commands, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    wanted = shutil.copytree(trained, tmp_path / "wanted")
    for stage in ("large", "small"):
        flip(run / stage / "step_000004.pt")
        (wanted / stage / "step_000004.pt").unlink()
    torch.load(run / "small/step_000004.pt", weights_only=True)
    assert DefectGen.load(run).fingerprint == DefectGen.load(wanted).fingerprint
    assert "step_000004.pt: damaged (the checksum of" in capsys.readouterr().err
    pairs = SimpleNamespace(samples=[SimpleNamespace(name="generated/000000"), SimpleNamespace(name="generated/000001")])
    setting, said = SimpleNamespace(run=run, device="cpu", drawn=(torch.zeros(2), torch.zeros(2)), generated=pairs, size=(16, 16)), []
    assert evaluate.draw_sets(setting, dict(switch_t=400, num_steps=3, sampler="ddim", spacing="even", size=[16, 16], weights=DefectGen.load(wanted).fingerprint), 2, said.append)[1] == 2
    again = ["--stage", "small", "--data", data, *TINY, "--resume", "--steps", 6]
    for out in (run, wanted):
        assert commands.run("train.py", *again, "--out", out) == 0, commands.output()
        assert ("going on with the one before, step_000002.pt" in commands.output()) == (out == run)
    assert [p.name for p in checkpoints(run / "small")] == ["step_000004.pt", "step_000006.pt"]
    ours, theirs = (load_stage(out / "small", "small")["model"] for out in (run, wanted))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert commands.run(*sampling(run, tmp_path / "out"), "--count", 1) == 0 and "going on with the one before" in commands.output()     # large


def test_a_checkpoint_that_the_disk_did_not_keep_is_never_given_its_name(trained, tmp_path, monkeypatch):
    generator, save = DefectGen.load(trained), torch.save

    def lossy(checkpoint, path):
        save(checkpoint, path)
        flip(path)
    monkeypatch.setattr(torch, "save", lossy)
    optimizer = torch.optim.AdamW(generator.small.parameters())
    with pytest.raises(OSError, match="step_000009.pt: cannot be written .the disk does not hold what was written: the checksum of"):
        save_stage(tmp_path / "step_000009.pt", "small", generator.small, generator.small, optimizer, 9, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_checkpoint_and_a_sentence(data, commands, undisturbed, tmp_path):
    assert commands.run(*flags(data, tmp_path), "--steps", 12) == 0
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    assert commands.run(*flags(data, tmp_path), "--resume", fault=full) == 2
    assert re.search(r"error: .*step_000024.pt: cannot be written \(the disk is full.*make room", commands.output()) and "Traceback" not in commands.output()
    assert not list((tmp_path / "small").glob(".*.tmp")) and load_stage(tmp_path / "small", "small")["step"] == 12
    assert commands.run(*flags(data, tmp_path), "--resume") == 0, commands.output()
    assert_equal_runs(tmp_path, undisturbed[0])


def test_a_folder_in_use_is_refused_and_a_dead_process_s_is_taken_over(data, commands, tmp_path):
    hang = AT_CALL.format(call=3, what="open('begun', 'w').close() or time.sleep(60)")
    first = commands.start(*flags(data, tmp_path), fault=f"os.chdir({str(tmp_path)!r})\n{hang}")
    while not (tmp_path / "begun").exists():
        assert "error" not in commands.output()
        time.sleep(0.05)
    assert commands.run(*flags(data, tmp_path)) == 2
    assert f"small is in use by process {first} on {socket.gethostname()}; wait for it" in commands.output()
    os.kill(first, signal.SIGKILL)
    commands.wait(first)
    assert commands.run(*flags(data, tmp_path), "--steps", 2) == 0, commands.output()


def test_a_drive_without_locks_warns_and_goes_on(tmp_path, monkeypatch, capsys):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(datasets.fcntl, "flock", unsupported)
    with claimed(tmp_path):
        assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


# --- numbers ---

def go(*words):
    return train.train(train.parse_args([*map(str, words)]))


def test_a_broken_loss_or_gradient_names_step_learning_rate_and_last_good_checkpoint(data, tmp_path, monkeypatch):
    loss, clip, calls = train.training_loss, torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(train, "training_loss", lambda *a: calls.append(0) or loss(*a) * (float("nan") if len(calls) > 2 else 1))
    words = ["--stage", "small", "--data", data, *TINY]
    with pytest.raises(ValueError, match=r"the loss is nan at step 4, learning rate 8e-05, .* last good checkpoint: .*a/small/step_000002.pt"):
        go(*words, "--out", tmp_path / "a")
    monkeypatch.setattr(train, "training_loss", loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) * float("inf"))
    with pytest.raises(ValueError, match="at step 2, .* gradient norm inf; the last good checkpoint: none yet"):
        go(*words, "--out", tmp_path / "b")
    assert not checkpoints(tmp_path / "b/small")


def test_the_log_has_the_gradient_norm_before_clipping(data, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: norms.append(clip(parameters, most)) or norms[-1])
    go("--stage", "small", "--data", data, "--out", tmp_path, *TINY)
    assert [row["grad_norm"] for row in train.read_log(tmp_path / "small/log.csv")] == [f"{norms[i]:.4g}" for i in (1, 3)]


@pytest.mark.parametrize("lr, warned", [("1e-3", False), ("1e-9", True)])
def test_a_loss_that_does_not_move_is_warned_of(data, tmp_path, monkeypatch, capsys, lr, warned):
    monkeypatch.setattr(train, "STUCK_AFTER", 60)
    go("--stage", "small", "--data", data, "--out", tmp_path, *TINY, "--steps", 60, "--save-every", 60, "--lr", lr, "--batch-size", 4)
    assert ("the loss has not moved in 60 steps" in capsys.readouterr().err) == warned


def test_deterministic_is_asked_for_and_may_be_switched_on_when_resuming(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    words = ["--stage", "small", "--data", data, "--out", tmp_path, *TINY]
    try:
        go(*words, "--steps", 2)
        assert not torch.are_deterministic_algorithms_enabled()
        go(*words, "--deterministic", "--resume")
        assert torch.are_deterministic_algorithms_enabled() and load_stage(tmp_path / "small", "small")["step"] == 4
    finally:
        torch.use_deterministic_algorithms(False)


# --- files ---

def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb_png(height, width, rows, depth=8, interlaced=0):
    """What Pillow does not write: an RGB PNG of 16 bits or interlaced, or of a size that its rows do not fill."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]       # y, x, step of y, of x


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
PIXELS = np.array(PHOTO)
WIDE = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85)
PICTURES = {                        # name -> (bytes, shape that is read or None, the error otherwise)
    "truncated.png": (encoded(PHOTO, "PNG")[:900], None, "cannot be read as an image"),
    "zero.png": (b"", None, "cannot be read as an image"),
    "huge.png": (rgb_png(30_000, 30_000, [b""]), None, "exceeds limit"),                # Pillow's own
    "large.png": (rgb_png(12_000, 12_000, [b""]), None, "12000x12000 pixels, but at most 134217728"),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), (3, 24, 32), ""),
    "sixteen.png": (encoded(WIDE, "PNG"), (3, 24, 32), ""),
    "sixteen rgb.png": (rgb_png(24, 32, (row.astype(">u2").tobytes() for row in PIXELS.astype(int) * 257), 16), (3, 24, 32), ""),
    "sixteen.tif": (encoded(WIDE, "TIFF"), (3, 24, 32), ""),
    "float.tif": (encoded(Image.fromarray(np.full((24, 32), np.nan, np.float32)), "TIFF"), (3, 24, 32), ""),
    "animated.png": (encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]), (3, 24, 32), ""),
    "animated.webp": (encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]), (3, 24, 32), ""),
    "pages.tif": (encoded(PHOTO, "TIFF", save_all=True, append_images=[PHOTO.resize((5, 5))]), (3, 24, 32), ""),
    "jpeg called.png": (encoded(PHOTO, "JPEG"), (3, 24, 32), ""),
    "gif called.png": (encoded(PHOTO, "GIF"), (3, 24, 32), ""),
    "postscript called.png": (encoded(PHOTO, "EPS"), None, "cannot identify image file"),          # Pillow would start an interpreter
    "turned.jpg": (encoded(PHOTO, "JPEG", exif=rotated()), (3, 32, 24), ""),
    "interlaced.png": (rgb_png(24, 32, (row.tobytes() for y, x, dy, dx in ADAM7 for row in PIXELS[y::dy, x::dx]), interlaced=1), (3, 24, 32), ""),
    "progressive.jpg": (encoded(PHOTO, "JPEG", progressive=True), (3, 24, 32), ""),
    "one.png": (encoded(PHOTO.resize((1, 1)), "PNG"), (3, 1, 1), ""),
    "long.png": (encoded(PHOTO.resize((30_000, 2)), "PNG"), (3, 2, 30_000), ""),
    "high.png": (encoded(PHOTO.resize((2, 30_000)), "PNG"), (3, 30_000, 2), "")}


@pytest.mark.parametrize("name", PICTURES)
def test_strange_pictures_are_read_or_named(tmp_path, name):
    content, shape, message = PICTURES[name]
    path = tmp_path / name
    path.write_bytes(content)
    if shape:
        assert read_image(path).shape == shape
        if name in ("interlaced.png", "sixteen rgb.png", "animated.png"):
            assert np.array_equal(read_image(path), PIXELS.transpose(2, 0, 1))
    else:
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
            read_image(path)
    try:
        assert read_mask(path, ("background", "crack"), 1).shape == shape[1:]
    except ValueError as error:
        assert name in str(error)


@pytest.mark.parametrize("fit", datasets.FITS)
@pytest.mark.parametrize("size", [(1, 1), (2, 30_000), (30_000, 2)])
def test_tiny_and_very_long_images_become_any_size(tmp_path, size, fit):
    make_data(tmp_path, kinds=("crack",), count=1, size=size)
    image, mask = open_dataset(tmp_path, (16, 16), fit=fit)[0]
    assert image.shape == (3, 16, 16) and mask.shape == (16, 16)


def test_a_crop_that_would_need_gigabytes_is_refused(tmp_path):
    make_data(tmp_path, kinds=("crack",), count=1, size=(1, 70_000))
    with pytest.raises(ValueError, match="000.png: 1x70000 is too long to be cropped to 64x64; use --fit pad or squash"):
        open_dataset(tmp_path, (64, 64), fit="crop")[0]


def bad_folder(root):
    """Files that are no images among 8 good ones of each kind: a pipe, a folder, a loop and a link to nothing, an empty and a huge file."""
    make_data(root)
    images = root / "image/crack"
    for name in ("pipe", "folder", "loop", "nowhere", "empty", "huge"):
        shutil.copy(root / "mask/crack/000_mask.png", root / f"mask/crack/{name}_mask.png")
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "nowhere.png").symlink_to("missing.png")
    (images / "empty.png").touch()
    (images / "huge.png").write_bytes(rgb_png(30_000, 30_000, [b""]))
    return root


def test_every_bad_file_is_named_and_skip_bad_lists_what_it_leaves_out(tmp_path):
    root = bad_folder(tmp_path / "bolt")
    with pytest.raises(ValueError, match="6 of 30 samples of bolt cannot be used") as error:
        open_dataset(root, (16, 16)).tensors()
    rest = open_dataset(root, (16, 16), skip_bad=True)
    notes = "\n".join(rest.notes)
    assert len(rest) == 24 and len(rest.tensors()[0]) == 24 and notes.count("unreadable") == 6
    assert all(f"{name}.png" in str(error.value) and f"{name}.png" in notes for name in ("pipe", "folder", "loop", "nowhere", "empty", "huge"))
    assert datasets.audit(open_dataset(root))["problems"]


@pytest.mark.parametrize("name", ["with space", "Ünïcödé 缺陷 🙂", "line\nbreak", "-rf", "--out", "1²3", "a,b;c", "=1+1", "%s{}", "x" * 200])
def test_any_name_of_a_file_or_folder_trains(tmp_path, name):
    root = make_data(tmp_path / name, count=2)
    for folder, end in (("image", ""), ("mask", "_mask"), ("rgb_mask", "_rgb_mask")):
        (root / folder / "crack" / f"000{end}.png").rename(root / folder / "crack" / f"{name}{end}.png")
        (root / folder / "dirt").rename(root / folder / name)
    (root / "split.json").write_text(json.dumps({"train": [f"crack/{name}", f"{name}/000"], "test": ["crack/001"]}))
    go("--stage", "small", f"--data={root}", f"--out={tmp_path / 'run'}", *TINY, "--steps", 1)
    assert load_stage(tmp_path / "run/small", "small")["config"]["images"] == [f"crack/{name}", f"{name}/000"]
    assert datasets.contact_sheet(open_dataset(root)) is not None


def test_a_name_that_is_no_text_is_a_problem_that_can_be_skipped(tmp_path):
    root = make_data(tmp_path / "bolt", count=2)
    for folder, end in ((b"image", b""), (b"mask", b"_mask")):
        shutil.copy(os.fsencode(root) + b"/%s/crack/000%s.png" % (folder, end), os.fsencode(root) + b"/%s/crack/\xff%s.png" % (folder, end))
    with pytest.raises(ValueError, match=r"names are not valid UTF-8 \(1\): 'crack/\\udcff'") as error:
        open_dataset(root)
    str(error.value).encode()
    assert len(open_dataset(root, skip_bad=True)) == 6


def test_names_that_differ_in_case_only_have_one_order(tmp_path, monkeypatch):
    assert sorted(["b", "A", "a", "a1", "a10", "a2"], key=natural) == ["A", "a", "a1", "a2", "a10", "b"]
    root, names, listdir = make_data(tmp_path, kinds=("crack",), count=2), [], os.listdir
    for end, folder in (("", "image"), ("_mask", "mask")):
        for twin in ("A", "a"):
            shutil.copy(root / folder / "crack" / f"000{end}.png", root / folder / "crack" / f"{twin}{end}.png")
    for order in (sorted, lambda names: sorted(names, reverse=True)):
        monkeypatch.setattr(os, "listdir", lambda folder, order=order: order(listdir(folder)))
        names.append([s.name for s in open_dataset(root).samples])
    assert names[0] == names[1] == ["crack/000", "crack/001", "crack/A", "crack/a"]


def test_links_that_lead_in_circles_are_followed_once(tmp_path):
    make_data(tmp_path / "bolt", count=1)
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert list(find_objects(tmp_path)) == ["bolt"] and len(open_dataset(tmp_path)) == 3


def test_a_read_only_folder_is_a_sentence(data, commands, tmp_path):
    refuse = "def refuse(*a, **k): raise PermissionError(13, 'Permission denied')\nimport os, pathlib\n{} = refuse"        # root is refused nothing
    for name, message in (("pathlib.Path.mkdir", "error: "), ("os.replace", "config.json: cannot be written .Permission denied")):
        assert commands.run(*flags(data, tmp_path / "run"), fault=refuse.format(name)) == 2
        assert re.search(message, commands.output()) and "Permission denied" in commands.output() and "Traceback" not in commands.output()


def test_a_long_listing_opens_next_to_nothing(tmp_path, monkeypatch):
    """Paired by name: of 2000 colour photos with a class table only one is opened to see that they are in colour."""
    images, masks = tmp_path / "image/crack", tmp_path / "mask/crack"
    images.mkdir(parents=True), masks.mkdir(parents=True)
    PHOTO.save(tmp_path / "photo.png")
    for i in range(2000):
        (images / f"{i}.png").symlink_to(tmp_path / "photo.png")
        (masks / f"{i}_mask.png").touch()
    write_classes(tmp_path, ("background", "crack"))
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    assert len(open_dataset(tmp_path, (16, 16))) == 2000 and len(opened) == 1


# --- hostile files ---

def test_paths_in_split_and_coco_tables_do_not_leave_the_folder(tmp_path):
    root = make_data(tmp_path / "bolt", count=2)
    shutil.copytree(root, tmp_path / "secret")
    for name in ("../../secret/image/crack/000", "/etc/passwd", "crack/../crack/000"):
        (root / "split.json").write_text(json.dumps({"train": [name]}))
        with pytest.raises(ValueError, match="no such images in bolt .1.: "):
            open_dataset(root, split="train")
    part = tmp_path / "vision/train"
    part.mkdir(parents=True)
    PHOTO.save(part / "a.png")
    table = {"categories": [{"id": 0, "name": "crack"}], "annotations": [], "images": [{"id": i, "file_name": name} for i, name in enumerate(
        ["a.png", "../../secret/image/crack/000.png", "/etc/passwd", "..", "", "a\0b"])]}
    (part / "_annotations.coco.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"images of the table that are missing \(5\)"):
        open_dataset(tmp_path / "vision")
    found = open_dataset(tmp_path / "vision", skip_bad=True)
    assert [s.image for s in found.samples] == [part / "a.png"]


@pytest.mark.parametrize("text, message", [
    ("[" * 100_000, "cannot be read as JSON"), ("1" * 10_000, "cannot be read as JSON"), ('{"train": ["' + "x" * 2000, "cannot be read as JSON")])
def test_json_that_would_hurt_its_reader_is_refused(tmp_path, text, message):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "split.json")


def test_files_that_never_end_or_are_too_large_are_not_read(tmp_path, monkeypatch):
    root = make_data(tmp_path, count=1)
    monkeypatch.setattr(datasets, "MAX_JSON", 10)
    with pytest.raises(ValueError, match="classes.json: has .* bytes, but at most 10 are read"):
        open_dataset(root)
    (root / "split.json").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.json")
    for name in ("split.json", "pipe.json"):
        with pytest.raises(ValueError, match=f"{name}: is a folder, a pipe"):
            read_json(root / name)


def test_class_names_that_would_break_a_page_are_refused(tmp_path):
    root = make_data(tmp_path / "bolt", count=1)
    for name in ("line\nbreak", "\ud800", "bell\x07"):
        (root / "classes.json").write_text(json.dumps({"0": "background", "1": name, "2": "dirt"}))
        with pytest.raises(ValueError, match="class names with characters that cannot be printed"):
            open_dataset(root)


def xlsx(path, strings, encoding="utf-8"):
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("xl/sharedStrings.xml", strings.replace("SST", f'<sst xmlns="{space}">').encode(encoding))
        book.writestr("xl/worksheets/sheet1.xml", f'<worksheet xmlns="{space}"><row><c r="A1" t="s"><v>0</v></c></row></worksheet>')
    return path


LAUGHS = '<!DOCTYPE l [<!ENTITY a "ha">' + "".join(f'<!ENTITY {b} "{f"&{a};" * 50}">' for a, b in zip("abcdefg", "bcdefgh")) + "]>SST<si><t>&h;</t></si></sst>"


@pytest.mark.parametrize("strings, encoding", [(LAUGHS, "utf-8"), ('<?xml version="1.0" encoding="UTF-16"?>' + LAUGHS, "utf-16"),
                                               ("SST<si><t>" + "x" * (17 << 20) + "</t></si></sst>", "utf-8")], ids=["entities", "utf-16", "bomb"])
def test_a_spreadsheet_that_unpacks_to_gigabytes_is_refused(tmp_path, strings, encoding):
    with pytest.raises(ValueError, match="captions.xlsx: cannot be read as the table of captions .*(declares entities|above 16 MiB)"):
        read_captions(xlsx(tmp_path / "captions.xlsx", strings, encoding))


def test_a_checkpoint_that_runs_code_unpacks_to_more_or_lacks_parts_is_refused(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))
    folder = tmp_path / "small"
    folder.mkdir()
    path, whole = folder / "step_000002.pt", load_stage(trained / "small", "small")
    torch.save({**whole, "config": Evil()}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        load_stage(folder, "small")
    assert not (tmp_path / "was_here").exists()
    torch.save({**whole, "model": {"zeros": torch.zeros(1 << 20)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="unpacks to more than its own size"):
        load_stage(folder, "small")
    torch.save({key: whole[key] for key in ("kind", "step", "config")}, path)
    with pytest.raises(ValueError, match="lacks ema, model, network, optimizer"):
        load_stage(folder, "small")


def mutations(content, count, seed):
    """Copies of `content` with bytes changed, cut out, doubled or the end missing."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(draw.choice((1, 3, 30))):
            if len(data) < 16:
                break
            at = draw.randrange(len(data))
            change = draw.randrange(4)
            if change == 0:
                data[at] = draw.randrange(256)
            elif change == 1:
                del data[at:at + draw.randrange(1, 9)]
            elif change == 2:
                data[at:at] = data[at:at + draw.randrange(1, 9)]
            else:
                del data[draw.randrange(len(data) // 2, len(data)):]
        yield bytes(data)


def opens(name):
    """A reader of a data folder in which one file was changed."""
    def read(path, root):
        shutil.copy(path, root / name)
        open_dataset(root, (16, 16), split="train", skip_bad=True).tensors()
    return read


def test_260_damaged_files_give_sentences_or_data_and_nothing_else(trained, tmp_path):
    root = make_data(tmp_path / "bolt", count=6, size=(16, 16))
    (root / "split.json").write_text(json.dumps({"train": [f"crack/00{i}" for i in range(4)], "test": ["dirt/000"]}))
    vision = tmp_path / "vision"
    (vision / "train").mkdir(parents=True)
    PHOTO.save(vision / "train/a.png")
    (vision / "train/_annotations.coco.json").write_text(json.dumps({"categories": [{"id": 0, "name": "crack"}], "images": [{"id": 1, "file_name": "a.png"}],
                                                                     "annotations": [{"image_id": 1, "category_id": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}]}))
    book = xlsx(tmp_path / "captions.xlsx", "SST<si><t>Path</t></si></sst>")
    (tmp_path / "small").mkdir()
    checkpoint = tmp_path / "small/step_000004.pt"
    subjects = {                    # content, number of mutations, reader of the changed file
        "image.png": (encoded(PHOTO, "PNG"), 30, lambda path, _: read_image(path)), "image.jpg": (encoded(PHOTO, "JPEG"), 30, lambda path, _: read_image(path)),
        "image.tif": (encoded(WIDE, "TIFF"), 30, lambda path, _: read_image(path)), "image.webp": (encoded(PHOTO, "WEBP"), 20, lambda path, _: read_image(path)),
        "mask.png": ((root / "mask/crack/000_mask.png").read_bytes(), 30, lambda path, _: read_mask(path, ("background", "crack"))),
        "classes.json": ((root / "classes.json").read_bytes(), 30, opens("classes.json")), "split.json": ((root / "split.json").read_bytes(), 20, opens("split.json")),
        "coco.json": ((vision / "train/_annotations.coco.json").read_bytes(), 30, lambda path, _: shutil.copy(path, vision / "train/_annotations.coco.json")
                      and open_dataset(vision, (16, 16), skip_bad=True).tensors()),
        "captions.xlsx": (book.read_bytes(), 30, lambda path, _: read_captions(path)),
        "step.pt": ((trained / "small/step_000002.pt").read_bytes(), 10, lambda path, _: shutil.copy(path, checkpoint) and load_stage(tmp_path / "small", "small"))}
    before = {path for path in tmp_path.rglob("*")}
    refused = read = 0
    for name, (content, count, reader) in subjects.items():
        copy = shutil.copytree(root, tmp_path / "copy", dirs_exist_ok=True)
        for data in mutations(content, count, name):
            path = Path(tempfile.mkdtemp(dir=tmp_path)) / name
            path.write_bytes(data)
            start = time.process_time()
            try:
                reader(path, copy)
                read += 1
            except (ValueError, FileNotFoundError) as error:
                assert len(str(error)) > 20, error
                refused += 1
            assert time.process_time() - start < 10
            shutil.rmtree(path.parent)
    shutil.rmtree(tmp_path / "copy")
    assert refused + read == 260 and refused > 100
    assert {path for path in tmp_path.rglob("*")} - before <= {checkpoint}
