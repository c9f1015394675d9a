"""Which runs a sitting makes: a shard's part, and what every group wants of a finalist; nothing is trained here."""

from __future__ import annotations

from compare.helpers import opened, pretend
from corelora.compare.session import Options, Session
from corelora.compare.study import Finalists
from corelora.compare.work import Work
from corelora.evaluate.suites import FOLDER, load_suite
from train.helpers import make_recipe

GROUP = {"name": "rates", "axes": {"method": ["lora", "nlora"], "lr": [1e-4, 1e-3, 1e-2]}, "set": {"rank": 4}}


def todo(study, shard):
    """Names of the runs that a shard would make now."""
    session = Session(study, Options(shard=shard), print)
    works = session._works([(run, None) for run in study.first["rates"]])
    return [work.folder.name for work in session._todo(works)]


def test_shards_that_begin_at_different_times_share_alike(folder, tmp_path):
    """What another shard has finished meanwhile moves no run from one shard to the other."""
    study = opened(tmp_path, folder, [GROUP])
    parts = [todo(study, (n, 2)) for n in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(run.name for run in study.first["rates"])
    for done in parts[0]:
        place = study.root / "runs" / done
        place.mkdir(parents=True)
        (place / "results.json").write_text("{}")
        assert todo(study, (1, 2)) == parts[1]
    assert todo(study, (0, 2)) == []


def test_a_finalist_of_two_groups_does_what_both_want(folder, tmp_path):
    """One run, whichever group is written last: suites of each, updates of either, its model kept until then."""
    first = {**GROUP, "finalists": {"seeds": [1], "suites": ["gsm8k"], "protocol": "paper"}}
    second = {**GROUP, "name": "plain", "axes": {"method": ["lora"], "lr": [1e-4]}, "finalists": {"seeds": [1]}}
    third = {**second, "name": "more", "finalists": {"seeds": [1], "updates": True}}
    study = opened(tmp_path, folder, [first, second, third])
    session = Session(study, Options(), print)
    shared = study.first["plain"][0].name
    assert next(w for w in works(session) if w.folder.name == shared).keep_models
    pretend(study, lambda run: run.recipe.optim.lr)
    for group in study.study.groups:
        pretend(study, lambda run: run.recipe.optim.lr, study.finalists(group))
    final = next(w for w in session._works(session._final_runs()) if w.folder.name == shared)
    assert [f.suites for f in final.finals] == [["gsm8k"], [], []]
    assert final.left_updates
    (final.folder / "updates.json").write_text("{}")
    assert not final.is_done
    (final.folder / "eval").mkdir()
    (final.folder / "eval" / "gsm8k-paper.json").write_text("{}")
    assert final.is_done


def test_models_stay_only_while_something_is_wanted_of_them(folder, tmp_path):
    """Those of runs that became no finalists go, and what a killed process left; a finalist's waits for its suite."""
    asks = {**GROUP, "tune": ["lr"], "finalists": {"seeds": [1], "suites": ["gsm8k"], "protocol": "paper"}}
    study = opened(tmp_path, folder, [asks])
    pretend(study, lambda run: run.recipe.optim.lr)
    pretend(study, lambda run: run.recipe.optim.lr, study.finalists(study.study.groups[0]))
    finals = {run.folder(study.root) for run in study.finalists(study.study.groups[0])}
    places = [place for place in (study.root / "runs").iterdir() if (place / "results.json").is_file()]
    for place in places:
        (place / "model").mkdir()

    def kept():
        return {place for place in places if (place / "model").is_dir()}

    Session(study, Options(keep_models=True), print)._drop_models()
    assert kept() == set(places) > finals
    Session(study, Options(), print)._drop_models()
    assert kept() == finals
    (evaluated := min(finals)).joinpath("eval").mkdir()
    (evaluated / "eval" / "gsm8k-paper.json").write_text("{}")
    Session(study, Options(), print)._drop_models()
    assert kept() == finals - {evaluated}


def test_a_suite_counts_as_done_by_its_own_name_and_protocol(folder, tmp_path):
    """Whether the study gives its name or the path of its file; another protocol's result is not what is wanted."""
    own = tmp_path / "mine.yaml"
    own.write_text((FOLDER / "gsm8k.yaml").read_text().replace("name: gsm8k", "name: our-sums"))
    assert load_suite(str(own)).name == "our-sums"
    final = Finalists(suites=["gsm8k", str(own)], protocol="paper")
    work = Work(recipe=make_recipe(folder), folder=tmp_path / "run", finals=(final,))
    (work.folder / "eval").mkdir(parents=True)
    assert work.left_suites(final) == ["gsm8k", str(own)]
    for name, left in (("gsm8k-chat", 2), ("gsm8k-paper", 1), ("our-sums-paper", 0)):
        (work.folder / "eval" / f"{name}.json").write_text("{}")
        assert len(work.left_suites(final)) == left, name


def works(session):
    """Works of the first seeds."""
    return session._works([(run, None) for runs in session.folder.first.values() for run in runs])
