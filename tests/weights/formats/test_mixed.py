"""Mixed formats: which matrix is stored in which."""

import pytest

from tightfit.catalog import parse_one, spec_string
from tightfit.errors import UsageError
from tightfit.weights.formats import BF16, Int2, Int4, Int6, Int8, Mixed

KINDS = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "q_proj": "attention",
    "o_proj": "attention",
    "kv_a_proj_with_mqa": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "down",
    "shared.up_proj": "mlp",
    "shared.down_proj": "down",
    "experts.gate_proj": "experts",
    "experts.down_proj": "down",
}


@pytest.mark.parametrize(("param", "kind"), KINDS.items())
def test_each_kind_of_matrix_has_its_format(param, kind):
    layer = None if param in ("embed_tokens", "lm_head") else 3
    everything = {"embed", "head", "attention", "mlp", "down", "experts"}
    only = Mixed(**{kind: "int6"}, rest="bf16")
    assert only.of(param, layer, 8) == Int6()
    others = Mixed(**dict.fromkeys(everything - {kind}, "bf16"), **{kind: "int6"}, rest="int2")
    assert others.of(param, layer, 8) == Int6()
    assert Mixed(rest="int2").of(param, layer, 8) == Int2()


def test_what_is_not_given_falls_back_to_the_wider_kind():
    mixed = Mixed(mlp="int2", rest="bf16")
    for param in ("gate_proj", "down_proj", "experts.up_proj", "experts.down_proj", "shared.down_proj"):
        assert mixed.of(param, 3, 8) == Int2()
    assert mixed.of("v_proj", 3, 8) == BF16()
    assert Mixed(experts="int2", mlp="int8").of("experts.down_proj", 3, 8) == Int2()
    assert Mixed().of("v_proj", 3, 8) == Int4()


def test_the_first_and_the_last_layer_can_have_a_format_of_their_own():
    mixed = Mixed(ends="bf16", attention="int8", down="int6")
    for layer in (0, 7):
        assert {mixed.of(param, layer, 8) for param in ("q_proj", "down_proj", "up_proj")} == {BF16()}
    assert mixed.of("q_proj", 1, 8) == Int8()
    assert mixed.of("down_proj", 6, 8) == Int6()
    assert mixed.of("embed_tokens", None, 8) == Int4()


def test_spec_strings_nest():
    text = "mixed(ends=int8(group=0),down=int6,rest=int4(group=64,symmetric=false))"
    mixed = parse_one("weights", text)
    assert mixed.of("up_proj", 2, 8) == Int4(64, symmetric=False)
    assert mixed.of("up_proj", 0, 8) == Int8(0)
    assert spec_string(mixed) == text


def test_a_format_is_the_scheme_that_stores_all_in_it():
    assert Int4().of("q_proj", 0, 8) == Int4().of("lm_head", None, 8) == Int4()


@pytest.mark.parametrize(
    "text",
    ["mixed(rest=int7)", "mixed(mlp=int4(group=3))", "mixed(rest=)", "mixed(down=mixed)", "mixed(mlp=int4+int8)"],
)
def test_what_is_no_format_is_refused_when_it_is_read(text):
    with pytest.raises(UsageError):
        parse_one("weights", text)
