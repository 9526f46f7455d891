"""Both searches from the command line, on small pictures: what they write, how they stop and go on, what they refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_cli import here, refused, triscale  # noqa: F401 - here is a fixture

import triscale as ts
from triscale.cost_model import cost
from triscale.scaling import Coefficients, compound
from triscale.search.reward import reward
from triscale.search.space import mnasnet_space

BASE = ts.Arch(
    ts.Stem(8, 3, 2),
    (ts.Stage("mbconv", 3, 2, 3, 0.25, "identity", 8, 1), ts.Stage("mbconv", 3, 1, 3, 0.0, "identity", 16, 2)),
    ts.Head(16),
    32,
    0.0,
    ts.Numerics(norm_momentum=0.1, divisor=2),
    name="base",
)
QUICK = ("--arch", "base.json", "--epochs", 1, "--batch-size", 8, "--share", 0.25, "--threads", 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working directory with base.json and a folder of two classes of 16 images each, which a network can tell apart."""
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "base.json").write_text(BASE.to_json())
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (cwd / "colours" / "train" / name).mkdir(parents=True)
        (cwd / "colours" / "val" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[:, :, channel] += 100
            Image.fromarray(pixels).save(cwd / "colours" / ("train" if i < 16 else "val") / name / f"{i:02d}.png")
    return cwd


def test_coefficients_from_pictures_to_a_scaled_network(work, here):  # noqa: F811
    result = here(work, "search", "coefficients", "colours", *QUICK, "--trials", 4, "--workers", 0, "--out", "coefficients")
    assert result.returncode == 0, result.stderr
    out = work / "coefficients"
    assert {p.name for p in out.iterdir()} >= {"study.journal", "coefficients.json", "best.json", "reference.json", "report.html", "command.txt"}
    chosen = Coefficients.from_json((out / "coefficients.json").read_text())
    found = json.loads((out / "coefficients.json").read_text())["found"]
    assert abs(chosen.growth - 2) <= 0.1
    assert found["trials"] == 4
    assert found["score"] == max(row["score"] for row in found["best ten"])
    best = ts.Arch.from_json((out / "best.json").read_text())
    assert best == ts.scale(BASE, compound(1, chosen.alpha, chosen.beta, chosen.gamma))
    assert result.stdout.count("\n0 ") <= 1
    for phi in range(8):  # step 2's networks with their costs
        assert re.search(rf"^{phi} +{chosen.alpha**phi:.2f} +{chosen.beta**phi:.2f} +{chosen.gamma**phi:.2f} ", result.stdout, re.MULTILINE)
    step2 = result.stdout.split("step 2: triscale ")[1].splitlines()[0].split()
    scaled = here(work, *step2, "--save", "b1.json")
    assert scaled.returncode == 0
    assert ts.Arch.from_json((work / "b1.json").read_text()).topology == best.topology
    assert refused(here(work, "scale", "base.json", "--phi", 1, "--coefficients", out / "coefficients.json", "--alpha", 1.3), "--coefficients")
    assert refused(here(work, "scale", "base.json", "--phi", 1, "--coefficients", "base.json"), "base.json", "coefficients file")


@pytest.fixture(scope="module")
def network(work):
    """A finished network search by two worker processes."""
    args = ("colours", *QUICK, "--trials", 6, "--workers", 2, "--out", "network", "--seed", 1)
    return triscale("search", "network", *args, cwd=work), work / "network", args


def test_a_network_from_pictures(network, work, here):  # noqa: F811
    result, out, _ = network
    assert result.returncode == 0, result.stderr
    best, reference = (ts.Arch.from_json((out / f"{name}.json").read_text()) for name in ("best", "reference"))
    assert reference == BASE
    assert mnasnet_space(BASE).encode(best)
    lines = [line for line in result.stderr.splitlines() if line.startswith("trial ")]
    assert len(lines) == 6
    assert re.search(r"trial \d \(\d of 6\): complete, score [01]\.\d{4}", lines[0])
    assert "scored on 8 others of the training images" in result.stdout
    assert f"triscale train colours --arch {out.name}/best.json" in result.stdout
    page = (out / "report.html").read_text()
    assert "Network search around base" in page
    trained = here(work, "train", "colours", "--arch", "network/best.json", "--epochs", 1, "--batch-size", 8, "--threads", 1, "--out", "trained")
    assert trained.returncode == 0, trained.stderr
    assert here(work, "show", "network/best.json").returncode == 0


def test_the_same_command_again_has_nothing_to_do_and_more_trials_go_on(network, work, here):  # noqa: F811
    result, out, args = network
    before = (out / "study.journal").read_bytes()
    again = here(work, "search", "network", *args)
    assert again.returncode == 0
    assert "6 trials, 6 of them done" in again.stdout
    assert [line for line in again.stdout.splitlines() if line.startswith("best: ")] == [
        line for line in result.stdout.splitlines() if line.startswith("best: ")
    ]
    assert (out / "study.journal").read_bytes().startswith(before)
    more = here(work, "search", "network", *[8 if a == 6 else a for a in args], "--workers", 0)
    assert more.returncode == 0, more.stderr
    assert sum(line.startswith("trial ") for line in more.stderr.splitlines()) == 2


def test_the_report_alone_and_another_search_in_its_place(network, work, here):  # noqa: F811
    _, out, args = network
    (out / "report.html").unlink()
    shown = here(work, "search", "network", *args, "--report")
    assert shown.returncode == 0
    assert (out / "report.html").is_file()
    assert "trial" not in shown.stderr
    words = ("another search (differs in: score)", "It was begun with: triscale search network colours --arch base.json", "--trials 6")
    assert refused(here(work, "search", "network", *args, "--epochs", 2), *words)
    assert refused(here(work, "search", "coefficients", "colours", *QUICK, "--out", "network"), "another search", "kind")
    assert refused(here(work, "search", "network", *args, "--out", "colours"), "--out colours", "no search in it")


def test_a_folder_goes_on_under_another_name_and_the_newest_is_found(network, work, here, monkeypatch):  # noqa: F811
    _, _, args = network
    assert refused(here(work, "search", "network", *args[:-4], "--resume"), "--resume", "no search in runs/search-network-colours-base")
    assert refused(here(work, "search", "network", *args[:-4], "--report"), "--report", "no search in runs/search-network-colours-base")
    assert refused(here(work, "search", "network", *args[:-4], "--out", "nowhere", "--report"), "--report: no search in nowhere")
    assert not (work / "runs").exists()
    assert not (work / "nowhere").exists()
    zero = ("--score", "proxy:synflow", "--workers", 0, "--sampler", "random")
    for trials, more in ((3, ()), (5, ("--resume",))):
        result = here(work, "search", "network", "colours", *QUICK, *zero, "--trials", trials, *more)
        assert result.returncode == 0, result.stderr
        assert "runs/search-network-colours-base/" in result.stdout
    assert "5 trials, 3 of them done" in result.stdout
    (work / "runs" / "search-network-colours-base").rename(work / "runs" / "moved")
    moved = here(work, "search", "network", "colours", *QUICK, *zero, "--trials", 5, "--out", "runs/moved")
    assert "5 trials, 5 of them done" in moved.stdout
    shutil.rmtree(work / "runs")


def test_a_password_is_not_kept(work, here):  # noqa: F811
    url = "sqlite:///kept.db"
    result = here(
        work, "search", "network", "colours", *QUICK, "--score", "proxy:synflow", "--workers", 0, "--trials", 1, "--out", "db", "--storage", url
    )
    assert result.returncode == 0, result.stderr
    assert url in (work / "db" / "command.txt").read_text()
    assert refused(here(work, "search", "network", "colours", *QUICK, "--out", "pw", "--storage", "postgresql://me:secret@127.0.0.1:1/x"), "me:***@")
    assert not (work / "pw").exists()
    (work / "db" / "command.txt").write_text("")


def test_when_nothing_can_be_scored(work, here):  # noqa: F811
    """Two images a class are too few: one to score on leaves one, and naswot has no kernel of equal pictures."""
    for name in ("blue", "red"):
        for part in ("train", "val"):
            (work / "few" / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), name).save(work / "few" / part / name / f"{i}.png")
    result = here(work, "search", "network", "few", *QUICK, "--score", "proxy:naswot", "--workers", 0, "--trials", 9, "--out", "bad", "--macs", "1k")
    assert result.returncode == 2
    result = here(
        work, "search", "network", "colours", *QUICK, "--lr", 1e30, "--clip", 0, "--workers", 0, "--trials", 9, "--out", "bad", "--no-cache"
    )
    assert refused_last(result, "first 5 trials all failed")
    assert len(list((work / "bad" / "failed").glob("*.json"))) == 5
    assert (work / "bad" / "report.html").exists()


def refused_last(result, *words):
    return result.returncode == 2 and all(word in result.stderr.strip().splitlines()[-1] for word in words)


def test_a_known_score_costs_nothing(network, work, here):  # noqa: F811
    """The same search in another folder finds its scores in the cache."""
    _, _, args = network
    again = here(work, "search", "network", *[a if a != "network" else "again" for a in args], "--workers", 0)
    assert again.returncode == 0, again.stderr
    known = [line for line in again.stderr.splitlines() if line.startswith("trial ") and line.split("  ")[0].endswith(", known")]
    assert len(known) >= 1  # the reference at least: which others are drawn depends on the order in which trials ended
    assert "trial 0 " in known[0]


@pytest.mark.parametrize("options", [("--score", "proxy:naswot", "--sampler", "ppo"), ("--score", "proxy:synflow", "--sampler", "nsga2")])
def test_scores_without_training(work, here, options):  # noqa: F811
    out = "zero-" + options[1].split(":")[1]
    result = here(work, "search", "network", "colours", *QUICK, "--trials", 12, "--workers", 0, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    assert "scored on" not in result.stdout
    if "nsga2" in options:
        front = [ts.Arch.from_json(p.read_text()) for p in sorted((work / out / "front").iterdir())]
        macs = [cost(arch, 2).macs for arch in front]
        assert macs == sorted(macs)


def test_hard_constraint_memory_and_a_prefilter(work, here):  # noqa: F811
    options = ("--cost", "memory", "--target", "400k", "--hard", "--prefilter", "synflow", "--of", 3)
    result = here(work, "search", "network", "colours", *QUICK, "--trials", 3, "--workers", 0, "--out", "memory", *options)
    assert result.returncode == 0, result.stderr
    for line in result.stderr.splitlines():
        if "value" in line:
            score, value = (float(re.search(rf"{name} ([\d.]+)", line)[1]) for name in ("score", "value"))
            memory = re.search(r"MACs, ([\d.]+)kB", line)
            assert value == pytest.approx(reward(score, float(memory[1]) * 1000, 400e3, (0.0, -1.0)), rel=0.02)


def test_latency_is_measured_here(work, here):  # noqa: F811
    result = here(
        work, "search", "network", "colours", *QUICK, "--trials", 2, "--workers", 0, "--out", "latency", "--cost", "latency", "--target", "20ms"
    )
    assert result.returncode == 0, result.stderr
    assert all(re.search(r" MACs, \d+\.\d\d ms", line) for line in result.stderr.splitlines() if line.startswith("trial "))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_goes_on(work, here, stop):  # noqa: F811
    """Each trial is scored to its end once, whatever stopped the search; no process is left behind."""
    out = f"stopped-{stop.name}"
    args = ["search", "network", "colours", *map(str, QUICK), "--trials", "5", "--workers", "1", "--out", out, "--epochs", "6", "--no-cache"]
    process = subprocess.Popen([sys.executable, "-m", "triscale", *args], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("trial "):
            break
    workers = children(process.pid)
    assert workers
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    if stop != signal.SIGKILL:
        assert process.returncode == 3
        assert re.search(rf"stopped: \d of 5 trials are done; the same command with --out {out} goes on", errors)
        assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    result = here(work, *args, "--workers", 0)
    assert result.returncode == 0, result.stderr
    lines = [line for line in (work / out / "study.journal").read_text().splitlines() if '"state":1' in line]
    assert len({json.loads(line)["trial_id"] for line in lines}) == len(lines) == 5  # complete, each once


def children(pid):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    if file.read().rsplit(")", 1)[1].split()[1] == str(pid):
                        found.append(int(entry))
            except OSError:
                pass
    return found


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("coefficients", "colours", "--tolerance", "0.0001", "--alpha", "1.3", "--beta", "1.1", "--gamma", "1.1"),
            ("no triple within", "tolerance of"),
        ),
        (("coefficients", "colours", "--alpha", "0.5"), ("alpha", ">= 1")),
        (("network", "colours", "--storage", "ftp://x"), ("--storage ftp://x", "postgresql://")),
        (("network", "colours", "--score", "proxy:naswto"), ("naswto", "naswot")),
        (("network", "colours", "--score", "accuracy"), ("--score accuracy", "train")),
        (("network", "colours", "--sampler", "evolve"), ("evolve", "evolution")),
        (("network", "colours", "--target", "-5"), ("-5",)),
        (("network", "colours", "--timeout", "5s", "--workers", "0"), ("timeout", "workers")),
        (("network", "nowhere"), ("nowhere",)),
        (("network", "colours", "--share", "1.5"), ("share",)),
        (("network", "colours", "--hard", "--w", "-0.3"), ("--hard and --w",)),
        (("network", "colours", "--of", "4"), ("--of", "--prefilter")),
        (("network", "colours", "--sampler", "nsga2", "--pruner", "median"), ("--pruner", "nsga2")),
        (("network", "colours", "--device", "cuda:9"), ("--device cuda:9",)),
        (("netwrok",), ("search netwrok", "search network")),
    ],
)
def test_what_is_refused_in_one_line(work, here, args, words):  # noqa: F811
    assert refused(here(work, "search", *args, *(QUICK[:2] if len(args) > 1 else ())), *words)
    assert not (work / "runs").exists()


def test_what_search_is(work, here):  # noqa: F811
    result = here(work, "search", "--help")
    assert result.returncode == 0
    assert "search coefficients" in result.stdout
    assert "search network" in result.stdout
