"""Training resumes bit for bit, logs what it did, and refuses bad flags before the first step."""
import csv
import json
import shutil
from collections import Counter

import pytest
import torch

import train
from conftest import TINY, make_data, picture, run
from defect_gen import checkpoints, load_stage


def go(*flags):
    train.train(train.parse_args([*map(str, flags)]))


@pytest.mark.parametrize("augment", ["", "flip,turn,crop"])
def test_9_steps_and_11_more_are_20_bit_for_bit(data, tmp_path, augment):
    flags = ["--stage", "small", "--data", data, *TINY, "--augment", augment]
    go(*flags, "--out", tmp_path / "whole", "--steps", 20)
    go(*flags, "--out", tmp_path / "parts", "--steps", 9)
    go(*flags, "--out", tmp_path / "parts", "--steps", 20, "--resume")
    whole, parts = (load_stage(tmp_path / name / "small", "small") for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, parts[part][key]) for key, value in whole[part].items())
    for key, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][key][name]) for name, value in state.items())
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "parts/small/log.csv").open())]
    assert steps == sorted({9, *range(2, 21, 2)})                   # no gap, no double


def test_augmentation_and_fit_are_stored_and_change_what_is_learned(data, tmp_path, capsys):
    flags = ["--stage", "small", "--data", data, *TINY]
    weights = {}
    for name, extra in {"plain": [], "augmented": ["--augment", "flip"], "padded": ["--fit", "pad"]}.items():
        go(*flags, "--out", tmp_path / name, *extra)
        checkpoint = load_stage(tmp_path / name / "small", "small")
        weights[name] = torch.cat([value.flatten() for value in checkpoint["model"].values()])
    assert not any(torch.equal(weights["plain"], weights[name]) for name in ("augmented", "padded"))
    assert checkpoint["config"]["fit"] == "pad" and checkpoint["config"]["augment"] == [] and "limit 4 GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fit was pad and is squash"):
        go(*flags, "--out", tmp_path / "padded", "--resume", "--steps", 6)
    with pytest.raises(SystemExit):
        train.parse_args(["--stage", "small", "--augment", "flip,spin"])
    assert "there are flip, turn, crop" in capsys.readouterr().err


def test_every_image_comes_up_equally_often_whatever_the_batch():
    stream = train.order(7, 0, 70, seed=3)
    assert set(Counter(stream).values()) == {10} and stream[:7] != stream[7:14]
    assert stream == sum((train.order(7, start, 5, seed=3) for start in range(0, 70, 5)), [])
    assert stream != train.order(7, 0, 70, seed=4)


def test_what_a_run_leaves_behind(trained):
    folder = trained / "large"
    assert [p.name for p in checkpoints(folder)] == ["step_000002.pt", "step_000004.pt"]
    assert picture(folder / "samples_000004.png").std() > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["classes"] == ["background", "crack", "dirt"] and config["size"] == [16, 16] and len(config["images"]) == 10  # no good ones
    row = next(csv.DictReader((folder / "log.csv").open()))
    assert float(row["loss"]) > 0 and set(train.QUARTERS) < set(row)


def test_grey_and_single_images_train(tmp_path):
    from test_datasets import save
    import numpy as np
    save(tmp_path / "grey/image/crack/0.png", np.zeros((16, 16)))
    save(tmp_path / "grey/mask/crack/0_mask.png", np.ones((16, 16)))
    go("--stage", "large", "--data", tmp_path / "grey", "--out", tmp_path / "run", *TINY)
    assert load_stage(tmp_path / "run/large", "large")["config"]["channels"] == 1


def test_large_data_come_through_workers_in_the_same_order(data, tmp_path, monkeypatch):
    from datasets import open_dataset
    dataset = open_dataset(data, (16, 16))
    arguments = (dataset, 3, 5, 4, 0, torch.device("cpu"))
    in_memory = list(train.batches(*arguments))
    monkeypatch.setattr(train, "MEMORY_LIMIT", 0)
    for (images, masks), (loaded, loaded_masks) in zip(in_memory, train.batches(*arguments), strict=True):
        assert torch.equal(images, loaded) and torch.equal(masks.long(), loaded_masks)


@pytest.mark.parametrize("flags, message", [
    (["--size", "18", "16"], "18x16"),
    (["--size", "16", "20"], r"--size 16 (16|24)"),
    (["--data", "nowhere"], "no such folder"),
    (["--data", "drawn:tablet"], "unknown drawn object"),
    (["--split", "val"], "no split 'val'; there are train, test"),
    (["--steps", "0"], "--steps is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--device", "nothing"], "--device nothing"),
    (["--resume"], "no checkpoint of the large stage"),
])
def test_bad_flags_are_one_sentence(data, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("--stage", "large", "--data", data, "--out", tmp_path / "run", *TINY, *flags)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten_and_other_settings_are_named(trained, data, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    before = checkpoints(copy / "large")[-1].read_bytes()
    flags = ["--stage", "large", "--data", data, "--out", copy, *TINY]
    with pytest.raises(ValueError, match="already holds step_000004.pt: --resume continues it"):
        go(*flags)
    with pytest.raises(ValueError, match="cannot resume with other settings: lr was 0.001 and is 0.5"):
        go(*flags, "--resume", "--lr", 0.5)
    go(*flags, "--resume")                                          # nothing left to do
    assert checkpoints(copy / "large")[-1].read_bytes() == before


def test_the_average_keeps_no_graph(data, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(train, "save_stage", lambda path, stage, net, ema, *rest, save=train.save_stage: kept.extend(ema.parameters())
                        or save(path, stage, net, ema, *rest))
    go("--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY)
    assert kept and not any(p.requires_grad or p.grad_fn for p in kept)         # else memory grows with every step


def test_other_images_in_the_folder_are_noticed_on_resume(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "bolt")
    flags = ["--stage", "small", "--data", copy, "--out", tmp_path / "run", *TINY]
    go(*flags)
    for folder, end in (("image", ""), ("mask", "_mask")):
        shutil.move(copy / folder / "crack" / f"000{end}.png", copy / folder / "crack" / f"900{end}.png")
    with pytest.raises(ValueError, match="was trained on 10 images .* not the same ones"):
        go(*flags, "--resume", "--steps", 6)


def test_several_processes_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes .* not supported yet"):
        go("--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY)


def test_the_next_command_keeps_the_flags(data, tmp_path, capsys):
    go("--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY)
    following = capsys.readouterr().out.split("next: python train.py ")[1].split()
    args = train.parse_args(following)
    assert (args.stage, args.size, args.data, args.out) == ("large", [16, 16], str(data), str(tmp_path / "run"))


def test_only_good_products_cannot_be_trained_on(tmp_path):
    make_data(tmp_path / "good", kinds=("good",))
    with pytest.raises(ValueError, match="only products without defects"):
        go("--stage", "large", "--data", tmp_path / "good", "--out", tmp_path / "run", *TINY)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    loss = train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: loss(*a) * (float("nan") if seen.append(0) or len(seen) > 2 else 1))
    seen = []
    with pytest.raises(ValueError, match="loss is nan at step 4"):
        go("--stage", "large", "--data", data, "--out", tmp_path / "run", *TINY)
    assert [p.name for p in checkpoints(tmp_path / "run/large")] == ["step_000002.pt"]


def test_errors_reach_the_user_without_a_traceback(tmp_path):
    result = run("train.py", "--stage", "large", "--data", tmp_path / "nowhere")
    assert result.returncode == 2 and "Traceback" not in result.stderr and "no such folder" in result.stderr
