import subprocess
import sys
from dataclasses import dataclass
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit import catalog
from tightfit.errors import UsageError

SEAM = "catalog-test"


@catalog.technique(seam=SEAM, name="keep", paper="none", exact=False, summary="keeps tokens")
@dataclass(frozen=True)
class Keep:
    tokens: int = 1024
    share: float = 0.5
    sinks: bool = True
    budget: str = "uniform"


@catalog.technique(seam=SEAM, name="window", paper="", exact=True, summary="keeps the last tokens")
@dataclass(frozen=True)
class Window:
    size: int


# Text values are names or nested spec strings: parentheses match, and commas stand inside of them.
texts = st.sampled_from(["uniform", "adakv", "snapkv(keep=8,window=4)+int4(group=64)", ""])
keeps = st.builds(Keep, st.integers(), st.floats(allow_nan=False), st.booleans(), texts)
techniques = st.lists(st.one_of(keeps, st.builds(Window, st.integers())), min_size=1, max_size=4)


@given(techniques)
def test_spec_strings_parse_to_what_they_were_written_from(items):
    assert catalog.parse(SEAM, catalog.spec_string(*items)) == items


def test_defaults_are_left_out():
    assert catalog.spec_string(Keep()) == "keep"
    assert catalog.spec_string(Keep(sinks=False), Window(3)) == "keep(sinks=false)+window(size=3)"


def test_blanks_do_not_matter():
    assert catalog.parse(SEAM, " keep( tokens = 7 , sinks=False ) + window(size=2)") == [
        Keep(tokens=7, sinks=False),
        Window(2),
    ]


def test_nested_spec_strings_keep_their_commas_and_pluses():
    [keep] = catalog.parse(SEAM, "keep(budget=adakv(a=1,b=f(2))+x,tokens=3)")
    assert keep == Keep(tokens=3, budget="adakv(a=1,b=f(2))+x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kep", ["'kep'", "keep, window"]),
        ("", ["''", "keep, window"]),
        ("keep(token=3)", ["'token'", "tokens=1024"]),
        ("keep(tokens=many)", ["tokens of keep", "whole number"]),
        ("keep(sinks=1)", ["sinks of keep", "true or false"]),
        ("keep(tokens=1,tokens=2)", ["'tokens' twice"]),
        ("keep(tokens)", ["key=value"]),
        ("keep(tokens=1", ["parentheses"]),
        ("keep)", ["parentheses"]),
        ("keep(tokens=1)x", ["after the closing parenthesis"]),
        ("window", ["window needs size", "window(size=...)"]),
        ("keep+", ["''", "keep, window"]),
    ],
)
def test_mistakes_are_named_with_what_is_possible(text, said):
    with pytest.raises(UsageError) as error:
        catalog.parse(SEAM, text)
    assert error.value.hint
    for part in said:
        assert part in str(error.value)


def test_one_technique_is_not_a_composition():
    assert catalog.parse_one(SEAM, "window(size=1)") == Window(1)
    with pytest.raises(UsageError, match="2 techniques"):
        catalog.parse_one(SEAM, "keep+window(size=1)")


def test_what_a_spec_string_cannot_hold_is_refused():
    for text in ("a,b", "(", ")(", " padded"):
        with pytest.raises(ValueError, match="budget"):
            catalog.spec_string(Keep(budget=text))
    with pytest.raises(ValueError, match="not a registered technique"):
        catalog.spec_string(object())


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="named 'keep'"):

        @catalog.technique(seam=SEAM, name="keep", paper="", exact=True, summary="another")
        @dataclass(frozen=True)
        class Other:
            pass


def test_every_technique_can_be_listed_and_written():
    entries = catalog.all_techniques()
    assert {("weights", "bf16"), ("weights", "int4"), ("weights", "int8")} <= {(e.seam, e.name) for e in entries}
    assert entries == sorted(entries, key=lambda entry: (entry.seam, entry.name))
    for entry in entries:
        assert entry.summary
        assert entry.cls.__doc__
        hints = get_type_hints(entry.cls)
        assert all(hints[field] in catalog.VALUE_TYPES for field in entry.settings)


def test_companions_are_those_that_compose():
    """For methods of the cache it is the roles that decide, and what compose refuses beside them."""
    from tightfit.kv.compose import compose

    entries = [entry for entry in catalog.all_techniques() if entry.seam == "kv"]
    for one in entries:
        for other in entries:
            try:
                goes = len(compose(f"{one.name}+{other.name}").methods) == 2
            except UsageError:
                goes = False
            assert (other.name in catalog.companions(one)) == goes
    of = {(entry.seam, entry.name): catalog.companions(entry) for entry in catalog.all_techniques()}
    assert {"int4", "quest", "host"} <= set(of["kv", "snapkv"])
    assert not {"h2o", "window"} & set(of["kv", "snapkv"])
    assert of["experts", "gate"] == ["lfu", "lru", "score", "static"]
    assert of["experts", "lru"] == ["gate"]
    assert "pruned" in of["weights", "mixed"]
    assert "mixed" not in of["weights", "mixed"]
    assert of["weights", "int4"] == ["mixed"]


def test_what_needs_calibration_says_by_which_command():
    from tightfit.kv.fitted import Fitted

    needing = {entry.name: entry.calibration for entry in catalog.all_techniques() if entry.calibration}
    fitted = {entry.name for entry in catalog.all_techniques() if issubclass(entry.cls, Fitted)}
    assert {"kvsharer", "cq", "matryoshka"} <= fitted
    assert needing.keys() == {"static", *fitted}
    assert "`tightfit census`" in needing["static"]
    assert all("`tightfit fit`" in needing[name] for name in fitted)


def test_the_catalog_is_listed_without_importing_torch():
    # torch costs some 200 MiB of a budget, and a plan is made before it is loaded.
    program = (
        "import sys; from tightfit import catalog; from tightfit.weights.formats import Int4;"
        "catalog.all_techniques(); Int4().nbytes(100, 100); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
