"""A study from beginning to end: what is missing is run, the best go on to more seeds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from corelora.compare.devices import Memory, find_devices, without_rates
from corelora.compare.expand import Planned
from corelora.compare.folder import StudyFolder, distinct, open_study
from corelora.compare.known import keep_runs
from corelora.compare.pool import Pool, Task
from corelora.compare.standing import FAILED, Standing, stand
from corelora.compare.study import Finalists, Group, load_study
from corelora.compare.work import Work, drop_model, tidy_trained
from corelora.errors import CoreLoraError, raise_all
from corelora.train.dry_run import check
from corelora.train.lock import locked

KEEP_EVERY = 20.0  # seconds between two writings of runs.jsonl while a study goes on


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is run.

    Attributes:
        jobs: runs at a time on a device; None: as many as fit on a GPU, one on a CPU.
        retry: make failed runs again.
        shard: (n, of): only every `of`-th run, beginning with the n-th, for arrays of jobs on a cluster.
        keep_models: keep the weights of fully fine-tuned models.
        minutes: begin no run after so many; None: go on to the end.
    """

    jobs: int | None = None
    retry: bool = False
    shard: tuple[int, int] | None = None
    keep_models: bool = False
    minutes: float | None = None


class Session:
    """One sitting of a study.

    Args:
        folder: the study's.
        options: how it is run.
        say: takes lines for the user.
    """

    def __init__(self, folder: StudyFolder, options: Options, say: Callable[[str], None]) -> None:
        self.folder, self.options, self.say = folder, options, say
        self.study, self.root = folder.study, folder.root
        self.known: dict[Path, Planned] = {}  # by folder, for what is said when a run ends
        self.retried: set[Path] = set()
        self.kept = time.monotonic()
        self.until = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        # By their places among all that may be asked for, shards that begin at different times share runs alike.
        self.places = {name: n for n, name in enumerate(run.name for run in planned_runs(folder))}

    def run(self) -> bool:
        """Make what is missing: all first seeds, then the finalists.

        Returns:
            Whether the study is whole; one that is cut into shards may wait for the others.
        """
        self.folder.save()
        tidy_trained(self.root)
        self._make(self._first_runs)
        if any(s.state == "missing" for group in self.study.groups for s in self.folder.asked(group)):
            return False
        self._make(self._final_runs)
        self._drop_models()
        return all(s.state != "missing" for runs in self.folder.standings().values() for s in runs)

    def _first_runs(self) -> list[tuple[Planned, Group | None]]:
        """The runs of the first seeds that are asked for so far: more, when some of these have ended."""
        return [(s.run, None) for group in self.study.groups for s in self.folder.asked(group)]

    def _final_runs(self) -> list[tuple[Planned, Group | None]]:
        """The finalists' runs, those of the first seeds too: they are evaluated likewise."""
        return [(run, group) for group in self.study.groups for run in self.folder.finalists(group)]

    def _drop_models(self) -> None:
        """Remove fully fine-tuned models of which nothing more is wanted: of runs that are no finalists, too."""
        if self.options.keep_models:
            return
        for work in self._works([*self._first_runs(), *self._final_runs()]):
            if work.is_done:
                drop_model(work.folder)

    def _make(self, wanted: Callable[[], list[tuple[Planned, Group | None]]]) -> None:
        """Make runs, and those that are wanted once some of them have ended."""
        begun: set[Path] = set()

        def more() -> list[Work]:
            runs = wanted()
            self.known |= {run.folder(self.root): run for run, _ in runs}
            new = [work for work in self._todo(self._works(runs)) if work.folder not in begun]
            begun.update(work.folder for work in new)
            return new

        todo = more()
        if not todo:
            return
        self.say(f"{len(todo)} of {len(self._works(wanted()))} runs to make, in {self.root}")
        devices = find_devices(self.options.jobs)
        memory = Memory(devices, self.options.jobs)
        Pool(devices, self._tell, self.until).run(self._tasks(todo, memory), lambda: self._tasks(more(), memory))

    def _tasks(self, works: Sequence[Work], memory: Memory) -> list[Task]:
        """Works with what they take, group by group, so that a study that is cut off has whole ones.

        The largest of a group are first, so that none waits alone.
        """
        groups = [group.name for group in self.study.groups]
        tasks = [Task(work=work, memory=taken) for work, taken in zip(works, memory.of(works), strict=True)]
        return sorted(
            tasks,
            key=lambda t: (
                groups.index(self.known[t.work.folder].group),
                -(t.memory if t.memory is not None else float("inf")),
            ),
        )

    def _todo(self, works: Sequence[Work]) -> list[Work]:
        """What is missing of this shard's part, without what has failed before."""
        n, of = self.options.shard or (0, 1)
        places = [self.places.setdefault(work.folder.name, len(self.places)) for work in works]
        mine = [work for place, work in zip(places, works, strict=True) if place % of == n and not work.is_done]
        if self.options.retry:
            for work in (w for w in mine if w.folder not in self.retried):
                (work.folder / FAILED).unlink(missing_ok=True)
        self.retried.update(work.folder for work in mine)
        return [work for work in mine if not (work.folder / FAILED).is_file()]

    def _works(self, runs: Sequence[tuple[Planned, Group | None]]) -> list[Work]:
        """One for each run, with what every group that asks for it wants of a finalist."""
        asked: dict[str, list[tuple[Planned, Group | None]]] = {}
        for run, group in runs:
            asked.setdefault(run.name, []).append((run, group))
        return [
            Work(
                recipe=of_it[0][0].recipe,
                folder=of_it[0][0].folder(self.root),
                finals=tuple(_of_seed(g, r) for r, g in of_it if g is not None and g.finalists is not None),
                keep_models=self.options.keep_models or any(g is None and self._may_be_final(r) for r, g in of_it),
            )
            for of_it in asked.values()
        ]

    def _may_be_final(self, run: Planned) -> bool:
        """Whether a finalist's weights would be looked at again."""
        finals = [g.finalists for g in self.study.groups if g.name == run.group]
        return any(f is not None and (f.suites or f.updates) for f in finals)

    def _tell(self, task: Task) -> None:
        """One line for a run that ended."""
        standing = stand(self.known[task.work.folder], self.root)
        name = standing.run.name
        if standing.failed is not None:
            line = f"failed  {name}: {str(standing.failed['error']).splitlines()[0]}"
        else:
            line = f"done    {name}: {self._scored(standing)}, {(standing.results or {}).get('seconds', 0):.0f} s"
        tqdm.write(line, file=sys.stderr)  # where the bar is; standard output has results only
        if time.monotonic() - self.kept >= KEEP_EVERY:  # a machine that is taken away takes less with it
            keep_runs(self.folder)
            self.kept = time.monotonic()

    def _scored(self, standing: Standing) -> str:
        group = next(g for g in self.study.groups if g.name == standing.run.group)
        score, _ = self.study.score_of(group)
        value = standing.figure(score)
        return f"{score} {value:.4f}" if value is not None else f"no figure {score!r} came out"


def _of_seed(group: Group, run: Planned) -> Finalists:
    """What a group wants of a finalist: updates are measured of the first seed alone, which the charts show."""
    assert group.finalists is not None
    final = group.finalists
    return final if run.seed == group.seeds[0] else replace(final, updates=False)


def start_study(path: Path, root: Path, overrides: Sequence[str] = (), data: Sequence[str] = ()) -> StudyFolder:
    """Read a study's file for a folder.

    Args:
        path: the study's file.
        root: the study's folder.
        overrides, data: as in `load_study`.

    Raises:
        CoreLoraError: anything wrong with the study; recipes that can't be built; a folder with something else in it.
    """
    words = [*(f"--set={text}" for text in overrides), *(f"--data={text}" for text in data)]
    return open_study(load_study(path, overrides, data), path.parent, root, path, words)


def check_study(folder: StudyFolder) -> int:
    """Look at every recipe as `corelora train --dry-run` does; rates and seeds change nothing that is checked.

    Returns:
        How many different recipes there are.

    Raises:
        CoreLoraError: everything that is wrong, by run.
    """
    once = {without_rates(run.recipe): run for runs in folder.first.values() for run in runs}
    problems = []
    for run in tqdm(once.values(), desc="checking", unit="recipe", delay=2, leave=False):
        try:
            check(run.recipe, run.folder(folder.root))
        except CoreLoraError as error:
            problems.append(f"{run.group}, {run.name}: {error}")
    raise_all(problems, "study")
    return len(once)


def run_study(folder: StudyFolder, options: Options, say: Callable[[str], None]) -> bool:
    """Run a study; its folder is held meanwhile, except by shards, which share it.

    Returns:
        Whether it is whole.

    Raises:
        CoreLoraError: another process runs this study.
    """
    session = Session(folder, options, say)
    if options.shard is not None:
        return session.run()
    with locked(folder.root):
        return session.run()


def planned_runs(folder: StudyFolder) -> list[Planned]:
    """All runs of the first seeds, each once."""
    return distinct([run for runs in folder.first.values() for run in runs])
