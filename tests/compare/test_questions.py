"""What a study asks of two settings, and what its runs answer: on run folders written by hand."""

import json

import pytest

from compare.helpers import opened, pretend
from corelora.compare.page import page_html
from corelora.compare.questions import NO, NOISE, OPEN, YES
from corelora.compare.session import Options, Session
from corelora.compare.tables import answers, leaders_text, led_groups, markdown, study_data
from corelora.errors import CoreLoraError

GROUP = {
    "name": "methods",
    "axes": {"method": ["lora", "nlora"], "lr": [1e-4, 1e-3, 1e-2]},
    "tune": ["lr"],
    "set": {"rank": 4},
    "finalists": {"seeds": [1, 2]},
}
NLORA, LORA = {"method": "nlora"}, {"method": "lora"}


def asked(claim, subject=NLORA, other=LORA, **more):
    return {"ask": "Is it?", "subject": subject, "other": other, "claim": claim, **more}


def study_of(folder, tmp_path, questions, losses, spread=0.001, groups=(GROUP,), finals=True):
    """Losses by method and rate; each further seed is `spread` above."""
    study = opened(tmp_path, folder, list(groups), questions=questions)

    def loss(run):
        return losses[run.labels["method"]][run.labels["lr"]] + spread * run.seed

    pretend(study, loss)
    if finals:
        pretend(study, loss, study.finalists(study.study.groups[0]))
    return study


def answers_of(study):
    return answers(study, led_groups(study))


def rates(*values):
    return dict(zip(("0.0001", "0.001", "0.01"), values, strict=True))


@pytest.mark.parametrize(
    ("claim", "gap", "verdict"),
    [
        ({"claim": "better"}, -0.02, YES),
        ({"claim": "better"}, -0.001, NOISE),
        ({"claim": "better"}, 0.001, NOISE),
        ({"claim": "better"}, 0.02, NO),
        ({"claim": "as_good"}, -0.02, YES),
        ({"claim": "as_good"}, 0.0, YES),
        ({"claim": "as_good"}, 0.001, NOISE),
        ({"claim": "as_good"}, 0.02, NO),
        ({"claim": "near", "by": 0.01}, 0.009, YES),
        ({"claim": "near", "by": 0.01}, -0.009, YES),
        ({"claim": "near", "by": 0.01}, 0.011, NOISE),
        ({"claim": "near", "by": 0.01}, -0.02, NO),
    ],
)
def test_each_claim(folder, tmp_path, claim, gap, verdict):
    """By the means at each one's own best rate, and what three seeds alone make of them."""
    losses = {"lora": rates(0.9, 0.5, 0.8), "nlora": rates(0.5 + gap, 0.7, 0.7)}
    study = study_of(folder, tmp_path, [asked(**claim)], losses)
    (found,) = answers_of(study)
    assert found.verdict == verdict
    assert f"nlora {0.501 + gap:.4f} ± 0.0010 (3 seeds, lr 0.0001)" in found.figures
    assert f"difference {gap:+.4f}" in found.figures


def test_highest_is_best_turns_better_around(folder, tmp_path):
    losses = {"lora": rates(0.5, 0.5, 0.5), "nlora": rates(0.6, 0.5, 0.5)}
    study = study_of(folder, tmp_path, [asked("better")], losses, groups=[{**GROUP, "best": "highest"}])
    assert answers_of(study)[0].verdict == YES


def test_wider_rates(folder, tmp_path):
    """Within 1 % of its own best: all three rates against two; the other way round it is no."""
    losses = {"lora": rates(0.9, 0.5, 0.501), "nlora": rates(0.6, 0.601, 0.602)}
    both = [asked("wider_rates"), asked("wider_rates", LORA, NLORA), asked("wider_rates", NLORA, {"method": "lora"})]
    found = answers_of(study_of(folder, tmp_path, both, losses))
    assert [a.verdict for a in found] == [YES, NO, YES]
    shown = "lora 0.00097 to 0.01 (x10.3), by seeds x10.2 to x10.4"
    assert found[0].figures == f"nlora 0.0001 to 0.01 (x100), by seeds x100 to x100; {shown}"


def test_ranges_that_seeds_make_as_wide_are_within_noise(folder, tmp_path):
    """The limit moves by the deviation over seeds, and the ends of both ranges with it; one seed says nothing."""
    losses = {"lora": rates(0.52, 0.5, 0.52), "nlora": rates(0.522, 0.5, 0.522)}
    (clear,) = answers_of(study_of(folder, tmp_path / "a", [asked("wider_rates", LORA, NLORA)], losses, spread=1e-4))
    assert clear.verdict == YES
    (blurred,) = answers_of(study_of(folder, tmp_path / "b", [asked("wider_rates", LORA, NLORA)], losses, spread=2e-3))
    assert blurred.verdict == NOISE
    (single,) = answers_of(study_of(folder, tmp_path / "c", [asked("wider_rates")], losses, finals=False))
    assert (single.verdict, "too few seeds" in single.figures) == (OPEN, True)


def test_seeds_that_are_missing_leave_it_open(folder, tmp_path):
    losses = {"lora": rates(0.9, 0.5, 0.8), "nlora": rates(0.4, 0.7, 0.7)}
    (found,) = answers_of(study_of(folder, tmp_path, [asked("better")], losses, finals=False))
    assert found.verdict == OPEN
    assert "too few seeds" in found.figures
    study = opened(tmp_path / "empty", folder, [GROUP], questions=[asked("better"), asked("wider_rates")])
    assert [a.verdict for a in answers_of(study)] == [OPEN, OPEN]


def test_everywhere_that_a_reader_looks(folder, tmp_path):
    losses = {"lora": rates(0.9, 0.5, 0.8), "nlora": rates(0.4, 0.7, 0.7)}
    study = study_of(folder, tmp_path, [asked("better")], losses)
    assert "Is it? yes" in leaders_text(study)
    assert "| Is it? | yes | nlora 0.4010" in markdown(study)
    assert "<h2>Questions</h2>" in page_html(study)
    assert json.loads(json.dumps(study_data(study)))["questions"][0]["verdict"] == YES
    plain = opened(tmp_path / "plain", folder, [GROUP])
    assert "Questions" not in markdown(plain) + page_html(plain)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (asked("better", {"method": "nlroa"}), "questions[0].subject: unknown value of method 'nlroa'. Did you mean"),
        (asked("better", NLORA, {"lr": 1e-3}), "questions[0].other: 'lr' is not compared here. Compared: method."),
        (asked("better", group="metods"), "questions[0].group: unknown group 'metods'. Did you mean 'methods'?"),
        (asked("beter"), "questions[0].claim: unknown value 'beter'. Did you mean 'better'?"),
        (asked("better", LORA, LORA), "questions[0].other: it is the subject itself"),
        (asked("near", by=-1.0), "questions[0].by: at least 0"),
    ],
)
def test_what_cannot_be_answered_is_said_first(folder, tmp_path, question, words):
    with pytest.raises(CoreLoraError) as caught:
        opened(tmp_path, folder, [GROUP], questions=[question])
    assert words in str(caught.value)


def test_groups_are_made_one_after_the_other(folder, tmp_path, monkeypatch):
    """A study that is cut off has whole groups, whatever its runs' sizes."""
    groups = [{**GROUP, "name": "small", "set": {"rank": 2}}, {**GROUP, "name": "large", "set": {"rank": 8}}]
    study = opened(tmp_path, folder, groups)
    made = []
    monkeypatch.setattr("corelora.compare.session.Pool.run", lambda self, tasks, more: made.extend(tasks))
    memory = {2: 1.0, 8: 5.0}
    monkeypatch.setattr(
        "corelora.compare.session.Memory.of",
        lambda self, works: [memory[w.recipe.method["r"]] for w in works],
    )
    Session(study, Options(), print).run()
    assert [task.memory for task in made] == [1.0] * 6 + [5.0] * 6
