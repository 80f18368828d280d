"""The experiments run on a trained run, keep what was run before, and score nothing that was trained on."""
import json
import shutil

import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from conftest import ROOT, TINY, picture
from layouts import ds_mvtec, magnetic_tile, save


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    run = shutil.copytree(trained, tmp_path_factory.mktemp("evaluate") / "bolt")
    sample.draw_pairs(sample.parse_args(["--run", str(run), "--count", "12", "--num-steps", "2"]))
    return run


def go(*flags):
    evaluate.evaluate(evaluate.parse_args([*map(str, flags)]))
    return json.loads((flags[flags.index("--run") + 1] / "quick/metrics.json").read_text())


def test_all_three_with_a_standard_of_ones_own(sampled, tmp_path, capsys):
    standard = tmp_path / "bolt.json"
    standard.write_text(json.dumps({"object": "bolt", "native_size": [24, 32], "rules": [{"classes": ["crack"], "max_area_px": 0},
                                                                                     {"classes": ["dirt"], "max_area_px": 500}]}))
    metrics = go("--run", sampled, "--quick", "--standard", standard)
    assert list(metrics) == ["generation", "segmentation", "inspection"]
    report = (sampled / "quick/report.html").read_text()
    assert all(word in report for word in ("Generation", "Segmentation", "Inspection", "data:image/png;base64", "the numbers mean nothing"))
    assert "http" not in report                                     # self-contained
    for figure in ("nearest.png", "real.png", "segmentation_bolt_evenly.png", "segmentation_bolt_with.png"):
        assert picture(sampled / "quick/figures" / figure).std() > 0
    table = metrics["inspection"]["numbers"]["products"]["bolt"]["spectrum: standard"][0]
    assert sum(table[key] for key in ("tp", "fn", "fp", "tn")) == 9 and table["tp"] + table["fn"] == 3      # cracks are not allowed, dirt is small
    held_out = metrics["generation"]["numbers"]["masks"]["held out"]
    assert held_out["empty"] == 0 and held_out["classes"][1]["images"] == 0.5       # good products are left out of this table
    sets = {step: list(found) for step, found in metrics["generation"]["numbers"]["measures"].items()}
    assert sets["2"] == ["switch_t 400"] and not {"large only", "small only"} & set(sets["4"])         # trained on its own timesteps
    assert str(sampled / "quick/report.html") in capsys.readouterr().out


def test_a_run_trained_at_all_timesteps_is_drawn_with_every_switch_from_the_same_noise(data, tmp_path):
    out = tmp_path / "run"
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(data), "--out", str(out), *TINY, "--t-range", "full"]))
    sample.draw_pairs(sample.parse_args(["--run", str(out), "--count", "8", "--switch-t", "600"]))
    (out / "samples/dropped.json").write_text('{"3": "empty", "5": "empty", "6": "copies"}')
    result = go("generation", "--run", out, "--quick")["generation"]
    assert [row[0] for row in result["tables"][0]["rows"]] == ["other real images", "large only", "switch_t 100", "switch_t 200", "switch_t 400", "switch_t 600",
                                                               "switch_t 800", "small only"]
    assert [row[:2] for row in result["tables"][1]["rows"]] == [[step, name] for step in (2, 4) for name in ("large only", "switch_t 600", "small only")]
    assert result["text"][3].startswith("sample.py dropped 3 pairs: 2 empty, 1 copies. The row of switch_t 600 shows what was kept")
    for name in ("switches", "switch", "training", "trajectories"):
        assert picture(out / f"quick/figures/{name}.png").std() > 0
    measured = result["numbers"]["measures"]
    assert measured["2"]["large only"] != measured["4"]["large only"]


def test_curves_need_two_points_and_show_measures_as_shares(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "plot", lambda x, lines: drawn.append((x, lines)))
    values = {name: (20.0, 30.0) for name in evaluate.MEASURES}
    assert evaluate.curves({(4, None): values, (4, 400): values}, 4) == []
    assert [file for file, *_ in evaluate.curves({(4, None): values, (2, 400): values, (4, 400): values, (4, 0): values}, 4)] == ["switch.png", "training.png"]
    assert drawn[0][0] == [400, 0] and drawn[0][1]["copies"] == [0.25, 0.25] and drawn[0][1]["novelty"] == [25, 25]
    assert drawn[1] == ([2, 4], {"switch_t 400": [25, 25]})         # the large network alone was not drawn at step 2


def test_one_experiment_keeps_the_results_of_the_others(sampled):
    before = go("generation", "--run", sampled, "--quick")
    after = go("segmentation", "--run", sampled, "--quick")
    assert after["generation"] == before["generation"] and "segmentation" in after


def test_without_a_standard_the_inspection_says_so(sampled):
    assert "Not run: there is no standard for bolt" in go("inspection", "--run", sampled, "--quick")["inspection"]["text"][0]


def test_inspection_of_padded_images_with_original_masks(tmp_path):
    spectrum, standard = ds_mvtec(tmp_path / "data", "metal_nut"), tmp_path / "standard.json"
    for name, (image, mask) in spectrum.pairs.items():
        if mask.any():
            kind, stem = name.split("/")
            save(tmp_path / f"mvtec/metal_nut/ground_truth/{kind}/{stem}_mask.png", (mask > 0) * 255)
    standard.write_text(json.dumps({"object": "metal_nut", "native_size": [32, 32], "rules": [{"classes": ["bent"], "max_area_px": 0}]}))
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(spectrum.path), "--object", "metal_nut", "--out", str(tmp_path / "run"),
                                      *TINY, "--size", "16", "24", "--fit", "pad"]))
    sample.draw_pairs(sample.parse_args(["--run", str(tmp_path / "run"), "--count", "2", "--num-steps", "2"]))
    metrics = go("inspection", "--run", tmp_path / "run", "--quick", "--standard", standard, "--original", tmp_path / "mvtec")
    text = " ".join(metrics["inspection"]["text"])
    assert f"those of {tmp_path / 'mvtec'}" in text and "predictions are 16x16: one of their pixels counts 4 native ones" in text
    assert "padding was cut off" in text and "split train: the first 5 images of each kind train" in text


def test_magnetic_tiles_as_downloaded_by_their_standard_in_each_photos_own_pixels(tmp_path):
    folder = magnetic_tile(tmp_path / "magnetic_tile").path
    for kind in ("Crack", "Fray", "Uneven"):
        shutil.copytree(folder / "MT_Break", folder / f"MT_{kind}")
    for photo in sorted((folder / "MT_Crack/Imgs").iterdir()):     # the cracks' photos are twice as high
        with Image.open(photo) as image:
            image.resize((image.width, 2 * image.height), Image.NEAREST).save(photo)
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(folder), "--out", str(tmp_path / "run"), *TINY]))
    sample.draw_pairs(sample.parse_args(["--run", str(tmp_path / "run"), "--count", "2", "--num-steps", "2"]))
    found = go("inspection", "--run", tmp_path / "run", "--quick", "--standard", ROOT / "docs/magnetic_tile.json")["inspection"]
    assert "magnetic tile (example): no cracks; each blowhole below 120 px" in found["text"][0]
    assert found["tables"][1]["rows"][-1][1] == "native, 32x32 and 64x32" and found["tables"][1]["rows"][-1][3] == 0
    assert "older binary masks (--original); all classes merged stand in" in found["not_run"][0]


def test_several_products_are_inspected_together_and_hostile_names_do_no_harm(data, tmp_path):
    names, runs = ["bolt \"><b>ü'", "plain"], []
    standard = {"object": "<i>", "native_size": [24, 32], "rules": [{"name": "<script>alert(1)</script>", "classes": ["crack"], "max_area_px": 0},
                                                                    {"classes": ["dirt"], "max_area_px": 500}]}
    (tmp_path / "a \"b\".json").write_text(json.dumps(standard))
    for name in names:
        copy = shutil.copytree(data, tmp_path / name)
        for part in ("image", "mask"):
            (copy / part / "crack").rename(copy / part / "<u>'\"\n猫")
        runs += ["--run", str(tmp_path / f"run {name}")]
        for stage in ("large", "small"):
            train.train(train.parse_args(["--stage", stage, "--data", str(copy), "--out", runs[-1], *TINY]))
        sample.draw_pairs(sample.parse_args(["--run", runs[-1], "--count", "12", "--num-steps", "2"]))
    evaluate.evaluate(evaluate.parse_args([*runs, "--quick", "--arch", "segformer", "--standard", str(tmp_path / "a \"b\".json"), "--out", str(tmp_path / "out")]))
    metrics = json.loads((tmp_path / "out/quick/metrics.json").read_text())
    found = metrics["inspection"]["numbers"]
    assert list(found["products"]) == names and list(metrics) == ["segmentation", "inspection"]
    for way, together in found["pooled"].items():
        parts = [found["products"][name][way][0] for name in names]
        assert all(together[key] == sum(part[key] for part in parts) for key in ("tp", "fn", "fp", "tn"))
        assert together["tp"] + together["fn"] == 6
    page = (tmp_path / "out/quick/report.html").read_text()
    assert not any(tag in page for tag in ("<script", "<b>", "<i>", "<u>")) and "&lt;script&gt;alert(1)" in page
    for figure in metrics["inspection"]["figures"]:
        assert picture(tmp_path / "out/quick/figures" / figure["file"]).std() > 0
    curve = found["curves"]["spectrum: standard"]
    middle = [point for point in curve if point[0] == 50][0]
    assert middle[1:] == [found["pooled"]["spectrum: standard"][rate] for rate in ("recall", "fpr")]


def test_training_images_are_never_scored(sampled):
    with pytest.raises(ValueError, match="shares 15 images with the training split"):
        go("--run", sampled, "--split", "train")


@pytest.mark.parametrize("flags, message", [(["generations"], "unknown experiment generations"), (["--split", "val"], "no split 'val'"),
                                            (["--seeds", "0"], "at least 1"), (["speed", "segmentation"], "speed, which stands alone"), (["--arch", "unet"], "no architecture .unet."),
                                            (["--ratios", "half"], "--ratios half"), (["segmentation", "--ratios", "9000"], "generate more"),
                                            (["--data", "a", "--data", "b"], "--data was given 2 times and --run 1"),
                                            (["generation", "--run", "other"], "the generation takes one --run"), (["inspection", "--standard", "a", "--standard", "b"], "--standard was given 2 times"), (["--data", "drawn:pill"], "was trained with background, crack"),
                                            (["inspection", "--standard", "nowhere.json"], "no standard .*nowhere.json")])
def test_bad_flags_are_one_sentence(sampled, flags, message):
    with pytest.raises(ValueError, match=message):
        go(*flags, "--run", sampled, "--quick")


def test_a_training_split_that_changed_since_is_refused(data, tmp_path):
    copy, out = shutil.copytree(data, tmp_path / "bolt"), tmp_path / "run"
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(copy), "--out", str(out), *TINY]))
    sample.draw_pairs(sample.parse_args(["--run", str(out), "--count", "2", "--num-steps", "2"]))
    for folder, end in (("image", ""), ("mask", "_mask")):          # crack/004 is pushed out of the first five
        shutil.copy(copy / folder / "crack" / f"000{end}.png", copy / folder / "crack" / f"000-b{end}.png")
    with pytest.raises(ValueError, match="no longer the 10 images"):
        go("--run", out, "--quick")


def test_nothing_left_to_score_is_a_sentence(data, tmp_path):
    copy, out = tmp_path / "bolt", tmp_path / "run"
    shutil.copytree(data, copy, ignore=lambda folder, names: [n for n in names if n[:3].isdigit() and n[:3] > "004" and not folder.endswith("good")])
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, "--data", str(copy), "--out", str(out), *TINY]))
    sample.draw_pairs(sample.parse_args(["--run", str(out), "--count", "2", "--num-steps", "2"]))
    with pytest.raises(ValueError, match="no image with a defect in --split test; nothing to score on"):
        go("--run", out, "--quick")


def test_missing_parts_name_the_command_that_makes_them(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="train first: python train.py"):
        go("--run", tmp_path)
    with pytest.raises(FileNotFoundError, match="draw them first: python sample.py"):
        go("--run", trained)


def test_a_finished_cell_is_not_computed_again(sampled, monkeypatch):
    flags = ("segmentation", "--run", sampled, "--quick", "--arch", "segformer", "--ratios", "20,80")
    first = go(*flags)["segmentation"]
    assert [row[0] for row in first["tables"][0]["rows"]] == ["segformer"] and first["tables"][-1]["head"] == ["network", "0 %", "20 %", "80 %"]
    assert picture(sampled / "quick/figures/ratios_bolt.png").std() > 0
    fitted = []
    monkeypatch.setattr(evaluate, "fit", lambda *a, fit=evaluate.fit, **k: fitted.append(0) or fit(*a, **k))
    again = go(*flags)["segmentation"]
    assert again["numbers"] == first["numbers"] and not fitted
    next((sampled / "cells").glob("segformer_*.pt")).write_bytes(b"half a file")
    assert go(*flags)["segmentation"]["numbers"] == first["numbers"] and len(fitted) == 1
    go(*flags, "--split", "test", "--steps", "3")                   # --quick wins: the same cells
    assert len(fitted) == 1


def test_what_makes_a_cell_is_in_its_name(sampled):
    a = torch.zeros(2, 3, dtype=torch.uint8)
    names = {evaluate.digest(1, a), evaluate.digest(2, a), evaluate.digest(1, a + 1), evaluate.digest({"x": 1}, a)}
    assert len(names) == 4 and evaluate.digest(1, a) in names


def test_several_runs_are_columns_with_their_mean(sampled, tmp_path):
    other = shutil.copytree(sampled, tmp_path / "other")
    metrics = json.loads((evaluate.evaluate(evaluate.parse_args(
        ["--run", str(sampled), "--run", str(other), "--out", str(tmp_path / "both"), "--quick", "--arch", "segformer"])),
        tmp_path / "both/quick/metrics.json")[1].read_text())
    table = metrics["segmentation"]["tables"][0]
    assert table["head"][1::3] == ["bolt: real", "other: real", "mean of objects: real"]
    assert table["rows"][0][1] == table["rows"][0][4] == table["rows"][0][7]            # the same data twice
    assert list(metrics) == ["segmentation", "inspection"] and (tmp_path / "both/quick/report.html").exists()


def test_comparison_is_paired_by_seed_and_averaged_over_objects():
    scores = {"a": {("n", "real"): [{"m": 0.2}, {"m": 0.4}], ("n", "real + generated"): [{"m": 0.3}, {"m": 0.5}]},
              "b": {("n", "real"): [{"m": 0.6}, {"m": 0.8}], ("n", "real + generated"): [{"m": 0.5}, {"m": 0.9}]}}
    row = evaluate.comparison(scores, ["n"], "m")["rows"][0]
    assert row == ["n", "30.0 ± 14.1", "40.0 ± 14.1", "10.0 ± 0.0", "70.0 ± 14.1", "70.0 ± 28.3", "0.0 ± 14.1",
                   "50.0 ± 14.1", "55.0 ± 21.2", "5.0 ± 7.1"]                # of the means per seed: 40, 60; 40, 70; 0, 10


def test_class_table_counts_pixels_and_images():
    masks = torch.zeros(4, 2, 5, dtype=torch.uint8)
    masks[0, 0, :3] = 1
    table, numbers = evaluate.class_table(("background", "crack"), {"real": masks})
    assert numbers["real"]["classes"][1]["pixels"] == pytest.approx(0.075) and numbers["real"]["empty"] == 0.75
    assert table["rows"] == [["real", "crack", "7.50", "25", "1.0", "3", "0.25, 0.30"]]


def test_words_for_file_names_are_short_and_differ():
    words = evaluate.file_words(["drawn:pill", "drawn_pill", 200 * "x", 200 * "x" + "y", '"><b> ü猫'])
    assert words[:2] == ["drawn_pill", "drawn_pill_2"] and len(set(words)) == 5 and max(map(len, words)) < 50 and words[4] == "_b_ü猫"


def test_pairs_of_other_weights_and_too_few_held_out_images_are_said(sampled, tmp_path, monkeypatch):
    run = shutil.copytree(sampled, tmp_path / "run")
    config = json.loads((run / "samples/config.json").read_text())
    (run / "samples/config.json").write_text(json.dumps({**config, "weights": "others"}))
    with pytest.raises(ValueError, match="drawn from other weights than the checkpoint at step 4"):
        go("generation", "--run", run, "--quick")
    monkeypatch.setattr(evaluate.Setting, "test", property(lambda self: self.few, lambda self, value: setattr(self, "few", value.subset(value.defective()[:3]))), raising=False)
    assert "Not run: 3 held-out images" in go("generation", "--run", sampled, "--quick")["generation"]["text"][0]
