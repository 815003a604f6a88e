"""All that a machine with an NVIDIA GPU can show, in one command: facts, build, tests, sanitizers, measurements.

Every step runs in a process of its own with its own limit, and is reported also when another fails. The whole ends
within ``--seconds``: measurements share what the steps before them have left, and a step that no longer fits is left
out and says so. Logs, CSVs and ``summary.txt``, which is also printed last, are written to one folder.

    python -m bench.gpu [--output build/gpu] [--seconds 500] [--only WORD ...] [--list] [--device cpu --quick]

Exit status: 0 all passed, 1 a step failed or timed out, 4 there is no NVIDIA GPU or torch is built without CUDA.
``--device cpu --quick`` runs what can run without a GPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 4  # the exit status
LEFT_OUT = 77  # the exit status of a step that cannot run here; the last line of its output says why
KEY = "key: "  # lines of a step's output that begin so go into the summary
RESERVE = 5.0  # seconds before its limit at which a measurement ends by itself
WARMERS = 6  # processes that compile kernels side by side, beside the tests
PROBE = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda,
    "name": torch.cuda.get_device_name() if found else None,
    "capability": torch.cuda.get_device_capability() if found else None,
}))
"""


class Step(NamedTuple):
    """A command; ``{seconds}`` in it stands for the time it may take. Neighbours of one ``stage`` run side by side."""

    name: str
    command: list[str]
    limit: float  # seconds
    stage: str = ""  # none: alone
    share: float = 0.0  # of the time left, among the steps from here on that have a share; 0: up to its limit
    least: float = 5.0  # seconds without which it is not started


class Outcome(NamedTuple):
    """How a step went: "ok", "failed", "timed out" or "left out"; and what to say of it."""

    name: str
    status: str
    seconds: float
    text: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.status:<9} {self.seconds:6.1f} s  {self.name:<24} {self.text}"


# --- running --------------------------------------------------------------------------------------------------------


def first_error(log: str) -> str:
    """The line of a log that says best what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Refusal|Failed|Exit)\b", line)]
    for candidates in (
        [line for line in lines if re.match(r"E\s+\S", line)],  # pytest's
        raised[-1:],  # a traceback's last
        [line for line in lines if re.search(r"\berror\b|not timed: ", line, re.IGNORECASE)],
        lines[-1:],
    ):
        if candidates:
            return re.sub(r"^E\s+", "", candidates[0]).removeprefix(KEY)[:200]
    return "it said nothing"


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started; one that even the kernel cannot end is left behind."""
    for which, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, which)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_step(step: Step, seconds: float, folder: Path) -> Outcome:
    """Run one step for at most ``seconds``; its output goes to a log in ``folder``."""
    if seconds < step.least:
        told = f"{max(0.0, seconds):.0f} s are left for it, it needs {step.least:.0f}"
        return Outcome(step.name, "left out", 0.0, told)
    command = [word.replace("{seconds}", f"{max(1.0, seconds - RESERVE):.0f}") for word in step.command]
    path = folder / (re.sub(r"\W+", "-", step.name) + ".log")
    start, timed_out = time.perf_counter(), False
    with path.open("w") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        cache = os.environ.get("TRITON_CACHE_DIR") or str(ROOT / "build" / "triton-cache")
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": cache}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            stop(process)
    log_text = path.read_text(errors="replace")
    keys = tuple(line.removeprefix(KEY) for line in log_text.splitlines() if line.startswith(KEY))
    took, last = time.perf_counter() - start, (log_text.strip().splitlines() or [""])[-1].strip("= ")[:200]
    if timed_out:
        return Outcome(step.name, "timed out", took, f"after {seconds:.0f} s; its last line: {last}", keys)
    if process.returncode == LEFT_OUT:
        return Outcome(step.name, "left out", took, last, keys)
    if process.returncode:
        return Outcome(step.name, "failed", took, f"status {process.returncode}: {first_error(log_text)}", keys)
    return Outcome(step.name, "ok", took, last.removeprefix(KEY), keys)


def run_steps(steps: list[Step], seconds: float, folder: Path) -> list[Outcome]:
    """Run the steps stage by stage within ``seconds``; each outcome is printed as it comes."""
    deadline, outcomes = time.perf_counter() + seconds, []
    alone = itertools.count()
    stages = [list(group) for _, group in itertools.groupby(steps, lambda step: step.stage or next(alone))]
    for number, stage in enumerate(stages):
        left = deadline - time.perf_counter()
        shares = sum(step.share for later in stages[number:] for step in later)
        limits = [min(step.limit, left * step.share / shares if step.share else left) for step in stage]
        print(f"-- {', '.join(step.name for step in stage)} ({left:.0f} s are left)", flush=True)
        with concurrent.futures.ThreadPoolExecutor(len(stage)) as pool:
            done = list(pool.map(run_step, stage, limits, itertools.repeat(folder)))
        for outcome in done:
            print(outcome, flush=True)
        outcomes += done
    return outcomes


def summary(outcomes: Iterable[Outcome], title: str) -> str:
    """A line a step, then the key figures of the steps that have some."""
    outcomes = list(outcomes)
    tally = collections.Counter(outcome.status for outcome in outcomes)
    counts = [f"{number} {status}" for status, number in tally.items()]
    lines = [title, ", ".join(counts), "", *map(str, outcomes)]
    for outcome in outcomes:
        lines += ["", f"{outcome.name}:", *(f"  {key}" for key in outcome.keys)] if outcome.keys else []
    return "\n".join(lines)


# --- the steps ------------------------------------------------------------------------------------------------------


def gpu_tests() -> dict[Path, list[str]]:
    """The test files with something for a GPU, and the words that select it: of those of Triton everything."""
    found: dict[Path, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path.stem.startswith("test_triton_"):
            found[path] = []
        elif "mark.gpu" in path.read_text():
            found[path] = ["-m", "gpu"]
    found.pop(ROOT / "tests" / "test_triton_aot.py", None)  # for GPUs that are not there; it needs none
    return found


def pytest_step(path: Path, selection: list[str], folder: Path) -> Step:
    name = path.stem.removeprefix("test_")
    command = [sys.executable, "-m", "pytest", f"tests/{path.name}", *selection, "-q", "-ra", "--tb=short"]
    command += ["--color=no", "-p", "no:cacheprovider", "--timeout=100", f"--junitxml={folder / f'tests-{name}.xml'}"]
    return Step(f"tests {name}", command, 170, "tests")


def plan(folder: Path, device: str, arch: str, quick: bool) -> list[Step]:
    """Every step, in order."""

    def module(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"bench.{name}", *words]

    def native(*words: str) -> list[str]:
        return module("gpu_native", "--arch", arch, "--output", str(folder), *words)

    def measurement(name: str, csv: str) -> list[str]:
        given = ["--device", device, "--seconds", "{seconds}", "--output", str(folder / csv)]
        return module(name, *given, *(["--quick"] if quick else []))

    warm = [*measurement("gpu_layers", "none.csv"), "--compile-only"]
    return [
        Step("facts", native("facts"), 60),
        Step("build", native("build"), 150),
        Step("exchange", native("exchange"), 45),
        *(pytest_step(path, words, folder) for path, words in gpu_tests().items()),
        # What the sanitizers run, first without them: the kernels are then compiled.
        Step("small shapes", [sys.executable, "tests/device/small_shapes.py"], 140, "tests"),
        *(Step(f"compile {k}", [*warm, f"{k}/{WARMERS}"], 140, "tests") for k in range(WARMERS)),
        Step("device code", native("device"), 60, "native"),
        Step("sanitizer memcheck", native("sanitizer", "memcheck"), 75, "native"),
        Step("sanitizer racecheck", native("sanitizer", "racecheck"), 75, "native"),
        Step("layers", measurement("gpu_layers", "layers.csv"), 240, share=4, least=20),
        Step("sample", measurement("sample", "sample.csv"), 90, share=2, least=20),
        Step("generate", measurement("generate", "generate.csv"), 240, share=4, least=20),
    ]


def architecture(capability: list[int] | None) -> str:
    """The number of nvcc and TORCH_CUDA_ARCH_LIST; from Hopper on with the features of that architecture alone."""
    major, minor = capability or (9, 0)
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def probe() -> dict:
    """What torch sees here; with the key "refusal" where there is no GPU for it."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refusal": f"torch cannot be asked for a GPU: {first_error(done.stderr)}"}
    found = json.loads(done.stdout)
    if found["cuda"] is None:
        return {"refusal": f"torch {found['torch']} is built without CUDA: this needs a CUDA build of torch"}
    if found["name"] is None:
        return {"refusal": f"torch {found['torch']} for CUDA {found['cuda']} sees no NVIDIA GPU: this needs one"}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything together")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="the steps whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the steps and their limits, run nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    folder, start = options.output.resolve(), time.perf_counter()
    found = probe() if options.device == "cuda" and not options.list else {}
    if "refusal" in found:
        print(f"no GPU, nothing was run: {found['refusal']}", file=sys.stderr)
        return NO_GPU
    steps = plan(folder, options.device, architecture(found.get("capability")), options.quick)
    if options.only is not None:
        steps = [step for step in steps if step.name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(f"{step.name:<24} {step.limit:4.0f} s" for step in steps))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run_steps(steps, options.seconds, folder)
    took = f"{time.perf_counter() - start:.0f} s of {options.seconds:.0f} s"
    title = f"{found.get('name', 'no GPU')}, torch {found.get('torch', '')}, CUDA {found.get('cuda', '')}: {took}"
    text = summary(outcomes, title)
    (folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\nin {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", flush=True)
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
