"""`corelora compare` and `corelora report STUDY`, with real runs of a tiny model in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from compare.helpers import opened, pretend, write_study
from corelora.cli import main
from corelora.compare.page import report_study
from corelora.compare.pool import MORE, Device, Pool, Running, Task
from corelora.compare.standing import write_failed
from corelora.compare.work import Work
from processes import CORELORA, wait_for

GROUPS = [
    {
        "name": "methods",
        "axes": {"method": ["lora", "nlora", "inttune"], "lr": [1e-3, 1e-2]},
        "tune": ["lr"],
        "set": {"rank": 4},
        "finalists": {"seeds": [1], "top": 1, "updates": True},
    },
    {"name": "one fails", "axes": {"method": ["nlora"], "rank": [4, 999]}},
]


def times(root: Path) -> dict[str, int]:
    """When each run's results were written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in root.glob("runs/*/results.json")}


@pytest.mark.slow
def test_a_study_killed_and_gone_on_with(folder, tmp_path, capsys, driver):
    """SIGKILL midway: its runs' processes end, too; the same command repeats nothing; a failed run stops no others."""
    path, root = write_study(tmp_path / "file", folder, GROUPS), tmp_path / "study"
    words = ["compare", str(path), "--output", str(root), "--jobs", "2"]
    child, log = driver.start(*CORELORA, *words, log=tmp_path / "log"), tmp_path / "log"
    wait_for(lambda: len(times(root)) >= 2, seconds=120)
    os.kill(child, signal.SIGKILL)
    assert driver.wait(child) == -signal.SIGKILL, log.read_text()[-2000:]
    before = times(root)
    assert 2 <= len(before) < 8
    (root / "runs" / min(before) / "checkpoints").mkdir(exist_ok=True)  # as if killed before it was tidied up
    assert main(words) == 0
    after = times(root)
    assert {k: after[k] for k in before} == before
    # Six, a finalist's second seed, and the other group's rank 4, which is the first group's; rank 999 fails.
    assert len(after) == 6 + 1
    failed = [json.loads(p.read_text()) for p in root.glob("runs/*/failed.json")]
    assert len(failed) == 1
    assert "999" in failed[0]["error"]
    assert "failed  gsm8k-nlora-r999" in capsys.readouterr().err
    assert main(words) == 0  # nothing is left to do
    assert times(root) == after
    assert main(["report", str(root)]) == 0
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "Failed runs" in page
    assert "spectra of what was learned" in page
    assert not list(root.glob("runs/*/checkpoints"))


@pytest.mark.slow
def test_retry_and_shards(folder, tmp_path):
    """A failed run is made again only where it is asked for; two shards make a study together."""
    path, root = write_study(tmp_path / "file", folder, [GROUPS[1]]), tmp_path / "study"
    words = ["compare", str(path), "--output", str(root)]
    assert main([*words, "--shard", "1/2"]) == 0
    [failed] = root.glob("runs/*/failed.json")
    assert times(root) == {}
    first = failed.stat().st_mtime_ns
    assert main([*words, "--shard", "0/2"]) == 0
    assert len(times(root)) == 1
    assert main(words) == 0
    assert failed.stat().st_mtime_ns == first
    assert main([*words, "--retry"]) == 0
    assert failed.stat().st_mtime_ns > first


def test_list_dry_run_and_bad_words(folder, tmp_path, capsys):
    """Nothing is run or written; mistakes are one message and exit code 2."""
    path = write_study(tmp_path / "file", folder, GROUPS)
    words = ["compare", str(path), "--output", str(tmp_path / "study")]
    right = write_study(tmp_path / "right", folder, GROUPS[:1])
    assert main(["compare", str(right), "--set", "loop.steps=3", "--output", "x y", "--dry-run"]) == 0
    assert f"Next: corelora compare {right} --set=loop.steps=3 --output 'x y'" in capsys.readouterr().out
    assert main([*words, "--list"]) == 0
    assert "7 runs, 0 done" in capsys.readouterr().out
    assert main([*words, "--dry-run"]) == 2
    assert "999" in capsys.readouterr().err
    for shard in ("2", "2/2", "a/b"):
        assert main([*words, "--shard", shard]) == 2
        assert "write it as I/N" in capsys.readouterr().err
    assert main([*words, "--jobs", "0"]) == 2
    assert "--jobs 0: at least 1 is expected" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert not (tmp_path / "study").exists()


def test_a_device_takes_what_fits(folder, tmp_path):
    """By memory, by number, and nothing beside what is not known."""
    run = opened(tmp_path, folder, [GROUPS[0]]).first["methods"][0]
    work = Work(recipe=run.recipe, folder=tmp_path)
    task = lambda memory: Task(work=work, memory=memory)  # noqa: E731
    running = lambda memory: Running(task=task(memory), process=None, alive=None, neighbours=False)  # noqa: E731
    device = Device(number=0, free=10.0, most=3)
    assert device.has_room(task(100.0))  # alone it is tried, whatever the estimate says
    device.running = [running(6.0)]
    assert device.has_room(task(4.0))
    assert not device.has_room(task(4.1))
    assert not device.has_room(task(None))
    device.running = [running(None)]
    assert not device.has_room(task(1.0))
    device.running = [running(1.0)] * 3
    assert not device.has_room(task(1.0))


def test_out_of_memory_beside_others_is_tried_again(folder, tmp_path):
    """With fewer beside it, at last alone, where it fails for good."""
    run = opened(tmp_path, folder, [GROUPS[0]]).first["methods"][0]
    task = Task(work=Work(recipe=run.recipe, folder=tmp_path), memory=1.0)
    device = Device(number=0, free=4.0, most=4)
    pool = Pool([device], lambda task: None)

    def ends(kind, **keys):
        write_failed(tmp_path, "out of memory: ...", kind, "now")
        again = pool._again(Running(task=task, process=None, alive=None, **keys))
        assert (tmp_path / "failed.json").is_file() != again
        return again

    device.running = [Running(task=task, process=None, alive=None)] * 3
    assert device.has_room(task, pool.margin)
    assert not ends("other", neighbours=True)
    assert not ends("memory", neighbours=False)
    assert pool.margin == 1
    assert ends("memory", neighbours=True, margin=1.0)
    assert ends("memory", neighbours=True, margin=1.0)  # began before that: nothing new
    assert pool.margin == MORE
    assert not device.has_room(task, pool.margin)
    del device.running[1:]
    assert device.has_room(task, pool.margin)
    assert ends("memory", neighbours=True, margin=MORE)
    assert ends("memory", neighbours=True, margin=MORE**2)
    assert not device.has_room(task, pool.margin)
    device.running = []
    assert device.has_room(task, pool.margin)


@pytest.fixture
def page(folder, tmp_path):
    """A report of runs written by hand, one of them failed."""
    group = {"name": "<b>ranks</b>", "axes": {"method": ["lora", "nlora"], "rank": [2, 4, 8], "lr": [1e-3, 1e-2]}}
    study = opened(tmp_path, folder, [{**group, "tune": ["lr"]}])
    pretend(study, lambda r: None if r.labels["rank"] == "8" else 1 / int(r.labels["rank"]) + r.recipe.optim.lr)
    return report_study(study)[0]


def test_the_page_needs_nothing_else(page):
    """No address is loaded from; names are text; every chart has its data."""
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;ranks&lt;/b&gt;" in text
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", text.partition('<script type="module">')[0])
    charts = json.loads(re.search(r'<script id="charts" type="application/json">(.*?)</script>', text, re.S)[1])
    assert len(charts) == text.count('class="chart"') >= 4
    words = (page.parent / "report.md").read_text()
    assert "- <b>ranks</b>, method lora, rank 8, lr 0.001, seed 0: step 3: the loss is nan (`gsm8k-lora-r8" in words
    assert "12 runs: 8 done, 4 failed" in words
    assert "    corelora compare " in words
    assert "method lora, rank 8, lr 0.001, seed 0: step 3: the loss is nan</summary>" in text
    assert len((page.parent / "runs.csv").read_text().splitlines()) == 13


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_in_a_browser(page):
    """Every chart near the top is drawn, nothing is written to the console, wide and narrow, light and dark."""
    for width, dark in ((1100, False), (390, True)):
        options = [f"--window-size={width},4000", "--enable-logging=stderr"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = looked_at(page, options, lambda text: len(re.findall(r"<canvas|<svg[^>]+marks", text)) >= 4)
        assert "CONSOLE" not in done.stderr


def looked_at(page, options, is_drawn):
    """The browser's output once the page is drawn: on busy cores its own time runs out before, so it is given more."""
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    for milliseconds in (10_000, 40_000, 160_000):
        command = [BROWSER, *fixed, *options, f"--virtual-time-budget={milliseconds}", f"file://{page}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        if is_drawn(done.stdout):
            return done
    pytest.fail(f"nothing was drawn: {done.stdout[-500:]}")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_charts_and_tables_on_a_phone(folder, tmp_path):
    """A legend of many settings presses no chart flat; a click sorts by number, millions too; nothing is too wide."""
    axes = {"method": {f"a setting with a long name, number {n:02}": {"method.alpha": n + 1} for n in range(16)}}
    study = opened(tmp_path, folder, [{"name": "g", "axes": axes, "set": {"rank": 4, "method.name": "lora"}}])
    pretend(study, lambda run: int(run.labels["method"][-2:]) + 0.5)
    for n, run in enumerate(study.first["g"]):
        path = run.folder(study.root) / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "trained_parameters": 10 ** (3 + n % 7) * (n + 2)}))
    text = report_study(study)[0].read_text(encoding="utf-8")
    script = """<script type="module">
      const count = (what) => document.querySelectorAll(what).length;
      while (count(".chart canvas, .chart svg.marks") < count(".chart"))
        await new Promise((done) => setTimeout(done, 100));
      [...document.querySelectorAll("th")].find((h) => h.textContent === "trained").click();
      const column = [...document.querySelectorAll("th")].findIndex((h) => h.textContent === "trained");
      const cells = [...document.querySelectorAll("tbody tr")].map((row) => row.cells[column].textContent);
      const plots = [...document.querySelectorAll(".chart canvas, .chart svg.marks")].map((c) => c.clientHeight);
      const wide = document.documentElement.scrollWidth - window.innerWidth;
      document.title = JSON.stringify({ cells, plots, wide });
    </script></body></html>"""
    place = tmp_path / "with-a-click.html"
    place.write_text(text.removesuffix("</body></html>\n") + script, encoding="utf-8")
    done = looked_at(place, ["--window-size=500,4000"], lambda text: '"plots":[' in text.partition("</title>")[0])
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1])
    sizes = [float(c.rstrip("M").replace(",", "")) * (10**6 if c.endswith("M") else 1) for c in found["cells"]]
    assert sizes == sorted(sizes)
    assert min(sizes) < 1e5 < 1e6 < max(sizes)
    assert found["wide"] <= 0
    assert min(found["plots"][1:]) > 300, found["plots"]  # 260 of the plot, and its legend below


def test_a_chart_for_the_documents(tmp_path):
    """The pictures of docs/ are the report's charts, drawn from the result files."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("make_plots", docs / "make_plots.py")
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    plots.draw_study(docs / "results" / "study-tiny.json", tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000
