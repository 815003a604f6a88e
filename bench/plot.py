"""The CSV of generation as pictures: tokens a second of each network, ours, the baseline and the best peer.

The pictures are a function of the CSV alone. They need matplotlib.

    python -m bench.plot [--csv bench/results/generate.csv] [--folder bench/results]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PREFIX, SETUP = "generate ", "generate set-up "
OURS = "fastrnn"
BASELINES = ("eager", "eager without oneDNN")

Speeds = dict[str, dict[str, float]]  # of one B: network -> backend -> tokens a second


def read(path: Path) -> dict[int, Speeds]:
    """The medians of the generation rows, for each B."""
    speeds: dict[int, Speeds] = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["op"].startswith(PREFIX) and not line["op"].startswith(SETUP):
                speeds[int(line["B"])][line["op"].removeprefix(PREFIX)][line["backend"]] = float(line["median"])
    return dict(sorted(speeds.items()))


def series(speeds: Speeds) -> dict[str, list[tuple[int, float, str]]]:
    """Bars as label -> (place of the network, tokens a second, text over the bar).

    Each of ours is a label; the baseline is the faster eager loop, the best peer the fastest of all that are not ours,
    and the bar says which it is.
    """
    bars: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    for place, found in enumerate(speeds.values()):
        theirs = {name: speed for name, speed in found.items() if not name.startswith(OURS)}
        base = max((theirs[name] for name in BASELINES if name in theirs), default=None)
        if base is not None:
            bars["baseline: eager PyTorch"].append((place, base, ""))
        if theirs:
            best = max(theirs, key=theirs.__getitem__)
            bars["best peer"].append((place, theirs[best], best))
        for name, speed in found.items():
            if name.startswith(OURS):
                bars[name].append((place, speed, "" if base is None else f"{speed / base:.1f}x"))
    return bars


def draw(batch: int, speeds: Speeds, unit: str, path: Path) -> None:
    """One picture: a group of bars for each network, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastrnn"  # the same CSV gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(13, 5), layout="constrained")
    bars = series(speeds)
    width = 0.8 / max(len(bars), 1)
    for number, (label, values) in enumerate(bars.items()):
        left = [place + (number - (len(bars) - 1) / 2) * width for place, _, _ in values]
        drawn = axes.bar(left, [speed for _, speed, _ in values], width, label=label)
        axes.bar_label(drawn, [text for _, _, text in values], rotation=90, padding=2, fontsize=7)
    axes.set_yscale("log")
    axes.margins(y=0.25)
    axes.set_xticks(range(len(speeds)), list(speeds), rotation=20, ha="right")
    axes.set_ylabel(unit)
    axes.set_title(f"Generation, {batch} sequence{'s' * (batch > 1)} at once")
    axes.legend(loc="upper right", ncols=len(bars), fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Write one SVG for each B of the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "generate.csv")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("bench.plot needs matplotlib: pip install matplotlib")
    if not options.csv.exists():
        raise SystemExit(f"there is no {options.csv}: run python -m bench.generate first")
    units = {line["unit"] for line in csv.DictReader(options.csv.open(newline="")) if "tokens/s" in line["unit"]}
    options.folder.mkdir(parents=True, exist_ok=True)
    for batch, speeds in read(options.csv).items():
        path = options.folder / f"generate-{batch}.svg"
        draw(batch, speeds, " and ".join(sorted(units)), path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
