"""The report: one page for whoever decides, with the tables and pictures of every experiment that was run, and what was not.

    python report.py runs/demo          writes RUN/report.html again from RUN/metrics.json and RUN/figures; evaluate.py does so by itself

The page holds its pictures and runs no scripts. All text comes from data sets, flags and files of users, so all of it is escaped: no name can
become markup, and characters that show nothing or turn the reading direction are written out.
"""
import argparse
import base64
import html
import math
import platform
import statistics
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets import PALETTE, read_json, run_main, write_atomically
from inspect_rules import printable

# what the page says of an experiment that was not run
EXPERIMENTS = {"generation": "how far generated pictures are from photos, and whether they are copies", "segmentation": "whether generated pairs help a segmenter",
               "inspection": "whether better masks give better verdicts", "speed": "what the networks cost on this machine"}


# --- numbers and curves ---

def spread(values, digits):
    """'0.97 ± 0.02': mean and sample standard deviation, the mean alone of a single value."""
    return " ± ".join(f"{f(values):.{digits}f}" for f in (statistics.mean, statistics.stdev)[:len(values)])


def mean_spread(values):
    """'51.2 ± 0.8': mean of fractions in percent, and their sample standard deviation over seeds."""
    return spread([100 * v for v in values], 1)


INKS = PALETTE[[1, 2, 3, 5, 6, 11, 8]]               # the colours of classes that can be read on white


def plot(x, lines, size=(640, 360), labels=None):
    """Lines {name: values at x, or points (x, value)} as a PIL picture, axes from the least to the most value, names below; labels: of x."""
    picture, font = Image.new("RGB", (size[0], size[1] + 22 * len(lines)), "white"), ImageFont.load_default(16)
    pen, (left, top, right, bottom) = ImageDraw.Draw(picture), (70, 20, size[0] - 30, size[1] - 40)
    lines = {name: values if isinstance(values[0], tuple) else list(zip(x, values)) for name, values in lines.items()}
    lines = {name: [(a, v) for a, v in points if math.isfinite(v)] for name, points in lines.items()}
    low, high = (f([v for points in lines.values() for _, v in points] or [0]) for f in (min, max))
    at = lambda a, v: (left + (right - left) * (a - x[0]) / ((x[-1] - x[0]) or 1), bottom - (bottom - top) * (v - low) / ((high - low) or 1))
    pen.rectangle((left, top, right, bottom), outline="gray")
    for value in (low, (low + high) / 2, high):
        pen.text((left - 8, at(x[0], value)[1]), f"{value:.1f}", "dimgray", font, anchor="rm")
    for a, label in zip(x, labels or [f"{a:g}" for a in x]):
        pen.text((at(a, low)[0], bottom + 8), label, "dimgray", font, anchor="ma")
    for i, (name, points) in enumerate(lines.items()):
        colour, y = tuple(INKS[i % len(INKS)].tolist()), size[1] + 22 * i
        pen.line([at(*point) for point in points], colour, 3)
        for point in points:
            pen.circle(at(*point), 4, colour)
        pen.line((left, y, left + 24, y), colour, 4)
        pen.text((left + 32, y), name, "black", font, anchor="lm")
    return picture


# --- the page ---

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #667; --line: #8885; --box: #f2f4f7 }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #181818; --soft: #a0a4ac; --box: #24272c } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { margin-top: 2.5rem; border-bottom: 2px solid var(--line) }
.summary { background: var(--box); padding: .8rem 1rem; border-radius: .4rem }
.summary p { margin: .3rem 0 }
nav a { margin-right: 1rem; display: inline-block; padding: .2rem 0; color: inherit }
.wide { overflow-x: auto; margin-bottom: 1.2rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top }
td { white-space: nowrap }
th { vertical-align: bottom; max-width: 10rem }
th.text { text-align: left }
td.text { text-align: left; white-space: normal; min-width: 6rem; max-width: 24rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
img { max-width: 100%; height: auto; background: #fff }
figure { margin: 1.2rem 0 }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem }
.gallery figure { margin: 0 }
figcaption .small { display: block }
figcaption, .small { color: var(--soft); font-size: .9rem }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #444; --box: #fff }
  body { max-width: none; padding: 0; font-size: 10pt }
  nav { display: none }
  .wide { overflow: visible }
  .summary { border: 1px solid #888 }
  table { font-size: 7.5pt }
  th, td, td.text { white-space: normal; min-width: 0; padding: .1rem .3rem }
  tr, figure { break-inside: avoid }
  h2, h3 { break-after: avoid }
  img { max-height: 20cm }
  .gallery { grid-template-columns: 1fr 1fr }
}
"""


def text(value):
    """Anything as text of the page, in which nothing is markup."""
    return html.escape(printable(str(value)))


def html_table(table):
    """{"caption", "head": cells, "rows": lists of cells}; columns of words stand left, of numbers right."""
    words = [any(str(row[c])[:1] not in "0123456789-–" for row in table["rows"]) for c in range(len(table["head"]))]
    line = lambda tag, row: "".join(f"<{tag}{' class=text' * word}>{text(cell)}</{tag.split()[0]}>" for cell, word in zip(row, words))
    return (f"<h3>{text(table['caption'])}</h3><div class=wide tabindex=0><table><thead><tr>{line('th scope=col', table['head'])}</tr></thead><tbody>"
            + "".join(f"<tr>{line('td', row)}</tr>" for row in table["rows"]) + "</tbody></table></div>")


def html_figure(folder, figure):
    """A picture of folder/figures with its caption; the file's name says where the PNG lies."""
    path = folder / "figures" / figure["file"]
    with Image.open(path) as picture:
        width, height = picture.size
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img alt="{text(figure["caption"])}" width={width} height={height} src="data:image/png;base64,{data}">'
            f"<figcaption>{text(figure['caption'])} <span class=small>[figures/{text(figure['file'])}]</span></figcaption></figure>")


def html_figures(folder, figures):
    """Pictures one below the other; those of the verdict gallery side by side where there is room."""
    parts = ["".join(html_figure(folder, f) for f in figures if not f.get("gallery"))]
    gallery = [html_figure(folder, f) for f in figures if f.get("gallery")]
    return "".join(parts + [f"<div class=gallery>{''.join(gallery)}</div>"] * bool(gallery))


def versions():
    """What the numbers were computed with."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, pillow {PIL.__version__}"


def settings_table(metrics):
    """One column per experiment, a row for everything that was set."""
    keys = dict.fromkeys(key for result in metrics.values() for key in result["settings"])
    return {"caption": "Settings", "head": ["", *(result["title"] for result in metrics.values())],
            "rows": [[key, *(result["settings"].get(key, "–") for result in metrics.values())] for key in keys]}


def split_table(metrics):
    """The data split of every experiment's runs, each once; None where no experiment recorded it."""
    rows = list(dict.fromkeys(tuple(row) for result in metrics.values() for row in result.get("split", [])))
    return {"caption": "Data split: images of each kind", "head": ["data", "kind", "training", "scoring"], "rows": rows} if rows else None


def write_report(folder, metrics):
    """folder/report.html: a summary, then tables, text and pictures of every experiment in metrics, what was not run, and the settings.

    metrics: {name: {"title", "text": sentences, "tables", "figures", "settings", and optional "summary": sentence, "not_run": sentences,
    "split": rows (data, kind, training images, scoring images)}}. The tables of folder/speed.json come along where there are any.
    """
    folder, order = Path(folder), list(EXPERIMENTS)
    metrics = dict(sorted(metrics.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    speed = read_json(folder / "speed.json") if (folder / "speed.json").exists() else {}
    tables = [part["table"] for part in speed.values() if "table" in part]
    sections = {name: (result["title"], "".join(map(html_table, result["tables"])) + "".join(f"<p>{text(t)}</p>" for t in result["text"])
                       + html_figures(folder, result["figures"])) for name, result in metrics.items()}
    if tables:
        machines = ", ".join(dict.fromkeys(part["machine"] for part in speed.values()))
        sections["speed"] = "Speed", f"<p>{text(machines)}</p>" + "".join(map(html_table, tables))
    missing = [f"{name.capitalize()}: {what}." for name, what in EXPERIMENTS.items() if name not in sections]
    missing += [sentence for result in metrics.values() for sentence in result.get("not_run", [])]
    sections["not-run"] = "Not run", f"<ul>{''.join(f'<li>{text(m)}</li>' for m in missing)}</ul>" if missing else "<p>Nothing was left out.</p>"
    split = split_table(metrics)
    sections["settings"] = "Settings and data", (html_table(split) if split else "") + html_table(settings_table(metrics))

    run = folder.resolve()
    title = text(f"Defect-Gen: {f'{run.parent.name}, run-through' if run.name == 'quick' else run.name}")
    quick = ["A run-through of --quick: the numbers mean nothing."] if any("quick" in result["settings"] for result in metrics.values()) else []
    summary = quick + [result["summary"] for result in metrics.values() if result.get("summary")]
    page = ("<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
            f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
            + (f"<div class=summary>{''.join(f'<p>{text(s)}</p>' for s in summary)}</div>" if summary else "")
            + f"<nav>{''.join(f'<a href=#{name}>{text(heading)}</a>' for name, (heading, _) in sections.items())}</nav><main>"
            + "".join(f"<section id={name}><h2>{text(heading)}</h2>{body}</section>" for name, (heading, body) in sections.items())
            + "</main></body></html>\n")
    write_atomically(folder / "report.html", lambda p: p.write_text(page, encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description="Write the report of a run again from its metrics.json and figures.")
    parser.add_argument("run", nargs="?", default="runs/demo", help="folder with metrics.json (default: %(default)s)")
    folder = Path(parser.parse_args().run)
    if not (folder / "metrics.json").exists():
        raise FileNotFoundError(f"{folder}: no metrics.json there; run the experiments first: python evaluate.py --run {folder}")
    write_report(folder, read_json(folder / "metrics.json"))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
