"""The design space as data: which choices contradict each other, how names are registered and missed."""

from __future__ import annotations

import pytest

from corelora import list_methods, register_method
from corelora.errors import CoreLoraError, nearest, raise_all
from corelora.registry import METHODS, Registry
from corelora.spec import AdapterSpec, Choices, choice_problems, parse_train

GOOD = Choices(outer="nystrom", core="dense", train=("A", "core", "B"), start="subtract", core_start="nystrom")

# choices that could do nothing, or that contradict each other -> what is said
CONTRADICTIONS = {
    "frozen zero core": (GOOD.changed(core_start="zeros", train=("A", "B")), "core starts at zero and is not trained"),
    "frozen zero inner B": (
        GOOD.changed(core="nested", core_start="zero_b", train=("A",)),
        "core starts at zero and is not trained",
    ),
    "two frozen zeros beside each other": (
        GOOD.changed(outer="kaiming", core="parallel_b", core_start="zero_b", train=("A",)),
        "B and the branch beside it start at zero and are not trained",
    ),
    "frozen zero B": (
        GOOD.changed(outer="kaiming", core_start="kaiming", train=("A",)),
        "B starts at zero under outer",
    ),
    "singular values of a slice": (GOOD.changed(core_start="singular"), "needs `outer: svd` or `awsvd`"),
    "pinv of an svd": (GOOD.changed(outer="svd", core_start="pinv"), "core_start 'pinv' needs `outer: nystrom`"),
    "both diagonals": (GOOD.changed(core="diagonal", core_start="identity", position="both"), "position 'both' is for"),
    "a zero start that is none": (GOOD.changed(start="zero"), "start 'zero' needs a starting product of zero"),
    "parallel branch that is not zero": (
        GOOD.changed(outer="kaiming", core="parallel_b", core_start="gaussian", start="zero"),
        "start 'zero' needs a starting product of zero",
    ),
    "a word for a deviation": (GOOD.changed(core_std="r/2"), "core_std must be a number of at least 0, or '1/r'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name):
    choices, message = CONTRADICTIONS[name]
    assert any(message in p for p in choice_problems(choices)), choice_problems(choices)
    with pytest.raises(CoreLoraError, match="adapter settings"):
        AdapterSpec(choices=choices, r=4, inner_r=2, scale=1.0)


def test_a_sound_choice_has_no_problem():
    assert choice_problems(GOOD) == []
    AdapterSpec(choices=GOOD, r=4, inner_r=2, scale=1.0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"inner_r": 5}, r"inner_r \(k\) must be between 1 and r = 4, got 5"),
        ({"inner_r": 0}, r"inner_r \(k\) must be between 1 and r = 4, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_numbers(numbers, message):
    choices = GOOD.changed(core="nested", core_start="kaiming")
    with pytest.raises(CoreLoraError, match=message):
        AdapterSpec(**({"choices": choices, "r": 4, "inner_r": 2, "scale": 1.0} | numbers))


def test_inner_r_matters_only_where_there_is_an_inner_rank():
    AdapterSpec(choices=GOOD, r=4, inner_r=99, scale=1.0)


@pytest.mark.parametrize("given", ["A core", "core,A", ["core", "A"], ("A", "core"), "core  A core"])
def test_train_can_be_words_or_a_list(given):
    assert parse_train(given) == ("A", "core")


def test_train_keeps_unknown_words_for_the_check():
    assert parse_train("A dog") == ("A", "dog")
    assert "unknown factor in `train` 'dog'" in " ".join(choice_problems(GOOD.changed(train=("A", "dog"))))


def test_a_method_checks_both_variants_before_it_is_listed():
    """A wrong published variant is found at registration, with all of its mistakes, and nothing is registered."""
    with pytest.raises(CoreLoraError, match=r"(?s)method 'broken': 2 problems.*'substract'.*Did you mean 'subtract'"):
        register_method(
            "broken",
            title="Broken",
            paper="none",
            default=GOOD,
            published=GOOD.changed(start="substract", sampling="frist"),
        )
    assert "broken" not in list_methods()


def test_a_name_that_is_taken_is_not_replaced():
    before = METHODS["lora"]
    with pytest.raises(CoreLoraError, match="there is already a method called 'lora'"):
        register_method("lora", title="Another", paper="none", default=GOOD)
    assert METHODS["lora"] is before


def test_a_registry_names_the_nearest_entry_and_all():
    table: Registry[int] = Registry("fruit")
    table.add("apple", 1)
    table.add("pear", 2)
    with pytest.raises(CoreLoraError, match=r"unknown fruit 'aple'\. Did you mean 'apple'\? Known: apple, pear\."):
        table["aple"]
    with pytest.raises(CoreLoraError, match=r"unknown fruit 'zzzzz'\. Known: apple, pear\."):
        table["zzzzz"]
    assert list(table) == ["apple", "pear"]
    assert len(table) == 2
    assert table.get("plum") is None


def test_nearest_and_lists_of_problems():
    assert nearest("lora_alfa", ["alpha", "lora_alpha"]) == "lora_alpha"
    assert nearest("xyz", ["alpha"]) is None
    raise_all([], "nothing")
    with pytest.raises(CoreLoraError, match=r"^here: one$"):
        raise_all(["one"], "here")
    with pytest.raises(CoreLoraError, match=r"^here: 2 problems\n  - one\n  - two$"):
        raise_all(["one", "two"], "here")


def test_every_method_of_the_papers_is_there():
    """The table of methods, and that each says where it comes from and where it departs."""
    wanted = {"flora", "inttune", "lora", "lora_fa", "lora_mini", "lora_xs", "moslora"}
    wanted |= {"nlora", "nora", "pissa", "slora", "lora_sb", "lora_ga"}
    assert wanted <= set(list_methods())
    for name in sorted(wanted):
        method = METHODS[name]
        assert method.paper
        assert method.title
        if method.default != method.published:
            assert method.departures != "none", name
