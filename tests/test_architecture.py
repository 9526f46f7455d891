"""Arch as data: JSON, equality, what it refuses, how it prints."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import archs

import triscale as ts
from triscale import Arch, ArchError, Head, Numerics, Stage, Stem
from triscale.naming import UnknownNameError

B0 = ts.arch("efficientnet_b0")
STAGE = B0.stages[1]


def changed(part, **fields):
    """B0's JSON with fields of one part (None: of the whole) replaced or added."""
    data = json.loads(B0.to_json())
    target = {None: data, "stage": data["stages"][2]}.get(part) or data[part]
    target.update(fields)
    return json.dumps(data)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(archs())
def test_json_round_trip(arch):
    again = Arch.from_json(arch.to_json())
    assert again == arch
    assert hash(again) == hash(arch)
    assert again.name == arch.name
    assert again.to_json() == arch.to_json()
    assert json.loads(arch.to_json())["format"] == 1


@pytest.mark.parametrize("name", ts.names())
def test_named_networks_round_trip(name):
    arch = ts.arch(name)
    assert Arch.from_json(arch.to_json()) == arch
    assert arch.name == name


def test_equality_is_by_value_and_leaves_the_name_out():
    copy = Arch(Stem(32), tuple(Stage(**vars(s)) for s in B0.stages), Head(1280), 224, 0.2, Numerics(), name="mine")
    assert copy == B0
    assert hash(copy) == hash(B0)
    assert len({copy, B0, Arch.from_json(B0.to_json())}) == 1
    assert ts.arch("efficientnet_b1") != B0
    six, sixth = (Stage("mbconv", 3, 1, expand, 0.25, "identity", 24, 2) for expand in (6, 6.0))
    assert six == sixth
    assert hash(six) == hash(sixth)
    assert type(six.expand) is float  # so that both are written alike


def test_topology_leaves_the_numeric_dialect_out():
    other = B0.with_numerics(padding="symmetric", norm_eps=1e-5)
    assert other != B0
    assert other.topology == B0.topology
    assert ts.arch("efficientnet_b1").topology != B0.topology


def test_frozen():
    with pytest.raises(AttributeError):
        B0.resolution = 300


@pytest.mark.parametrize(
    ("part", "fields", "names"),
    [
        ("stage", {"layers": 0}, "layers"),
        ("stage", {"layers": -1}, "layers"),
        ("stage", {"stride": 3}, "stride"),
        ("stage", {"stride": 0}, "stride"),
        ("stage", {"block": "mbconf"}, "block"),
        ("stage", {"block": ["mbconv"]}, "block"),
        ("stage", {"kernel": 4}, "kernel"),
        ("stage", {"kernel": 0}, "kernel"),
        ("stage", {"kernel": 3.0}, "kernel"),
        ("stage", {"channels": -8}, "channels"),
        ("stage", {"channels": 10**30}, "channels"),
        ("stage", {"layers": 10**9}, "layers"),
        ("stage", {"layers": True}, "layers"),
        ("stage", {"expand": math.nan}, "expand"),
        ("stage", {"expand": math.inf}, "expand"),
        ("stage", {"expand": 0}, "expand"),
        ("stage", {"expand": 1e300}, "expand"),
        ("stage", {"expand": True}, "expand"),
        ("stage", {"expand": "6"}, "expand"),
        ("stage", {"squeeze": -0.25}, "squeeze"),
        ("stage", {"squeeze": 1.5}, "squeeze"),
        ("stage", {"squeeze": 0.25, "block": "bottleneck"}, "squeeze"),
        ("stage", {"skip": "residual"}, "skip"),
        ("stage", {"fixed_depth": 1}, "fixed_depth"),
        ("stem", {"channels": 0}, "channels"),
        ("stem", {"channels": None}, "channels"),
        ("stem", {"kernel": 2}, "kernel"),
        ("stem", {"stride": 3}, "stride"),
        ("stem", {"pool": "yes"}, "pool"),
        ("head", {"channels": -1}, "channels"),
        ("head", {"scale": "height"}, "scale"),
        ("numerics", {"padding": "valid"}, "padding"),
        ("numerics", {"activation": "gelu"}, "activation"),
        ("numerics", {"norm_eps": 0}, "norm_eps"),
        ("numerics", {"norm_momentum": math.nan}, "norm_momentum"),
        ("numerics", {"drop_path": 1}, "drop_path"),
        ("numerics", {"divisor": 0}, "divisor"),
        (None, {"resolution": 0}, "resolution"),
        (None, {"resolution": 10**18}, "resolution"),
        (None, {"resolution": 224.0}, "resolution"),
        (None, {"dropout": -0.1}, "dropout"),
        (None, {"dropout": 1.0}, "dropout"),
        (None, {"stages": []}, "stages"),
        (None, {"stages": {"0": {}}}, "stages"),
        (None, {"stages": [3]}, "stages[0]"),
        (None, {"stem": [32]}, "stem"),
        (None, {"name": 3}, "name"),
    ],
)
def test_refuses_a_value_and_names_the_field(part, fields, names):
    with pytest.raises(ArchError) as error:
        Arch.from_json(changed(part, **fields))
    message = str(error.value)
    assert names in message
    if part == "stage":
        assert "stages[2]" in message
    if "stages" not in names:
        assert any(repr(value) in message for value in fields.values()) or "object" in message


@pytest.mark.parametrize(
    ("part", "typo", "meant"),
    [("stage", "sqeeze", "squeeze"), ("numerics", "norm_epsilon", "norm_eps"), (None, "dropuot", "dropout"), ("stem", "chanels", "channels")],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(part, typo, meant):
    with pytest.raises(ArchError, match=f"'{typo}'.*nearest is '{meant}'"):
        Arch.from_json(changed(part, **{typo: 0.25}))


def test_an_unknown_choice_names_the_nearest():
    with pytest.raises(ArchError, match=r"nearest is 'mbconv'"):
        Arch.from_json(changed("stage", block="mbcnv"))


@pytest.mark.parametrize("key", ["kernel", "channels", "layers", "block"])
def test_a_missing_field_is_named(key):
    data = json.loads(B0.to_json())
    del data["stages"][4][key]
    with pytest.raises(ArchError, match=rf"stages\[4\].*'{key}'"):
        Arch.from_json(json.dumps(data))


NO_FILE = {
    "empty": "",
    "words": "not json",
    "list": "[]",
    "number": "3",
    "null": "null",
    "no format": "{}",
    "format 2": '{"format": 2}',
    "format text": '{"format": "1"}',
    "no stages": '{"format": 1}',
    "deep list": "[" * 100_000,
    "deep object": '{"format": 1' + ', "stages": {' * 50_000,
    "long number": changed(None).replace(": 224", ": " + "9" * 5000),
    "beyond floats": changed(None, dropout=0).replace('"dropout": 0', '"dropout": 1e999'),
    "cut off": B0.to_json()[:200],
    "true as format": B0.to_json().replace('"format": 1', '"format": true'),
    "1.0 as format": B0.to_json().replace('"format": 1', '"format": 1.0'),
}


@pytest.mark.parametrize("text", NO_FILE.values(), ids=NO_FILE)
def test_what_is_no_architecture_file_is_refused(text):
    with pytest.raises(ArchError):
        Arch.from_json(text)


def test_another_format_is_refused_by_number():
    with pytest.raises(ArchError, match='"format": 1'):
        Arch.from_json(changed(None, format=2))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(("stem", "head", "numerics", "stage", None)),
    st.sampled_from(("channels", "kernel", "stride", "layers", "expand", "resolution", "padding", "stages", "stem", "name", "pool")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=5,
    ),
)
def test_any_json_gives_a_valid_arch_or_an_archerror(part, key, value):
    try:
        arch = Arch.from_json(changed(part, **{key: value}))
    except ArchError:
        return
    assert Arch.from_json(arch.to_json()) == arch
    assert ts.cost(arch).macs > 0


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Stage("mbconv", 3, 1, 6, 0.25, "identity", 24, True), "layers"),
        (lambda: Stage("mbconv", 3, 1, math.nan, 0.25, "identity", 24, 1), "expand"),
        (lambda: Stem(32.0), "channels"),
        (lambda: Arch(Stem(), (), Head(), 224), "stages"),
        (lambda: Arch(Stem(), (STAGE,) * 65, Head(), 224), "stages"),
        (lambda: Arch(Head(), (STAGE,), Head(), 224), "stem"),
        (lambda: Arch(Stem(), (STAGE, "stage"), Head(), 224), "stages"),
        (lambda: B0.with_numerics(padding="SAME"), "padding"),
    ],
)
def test_python_values_are_validated_too(build, field):
    with pytest.raises(ArchError, match=field):
        build()


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown network 'efficientnet_b9'; nearest is 'efficientnet_b[0-8]'"):
        ts.arch("efficientnet_b9")
    with pytest.raises(ValueError, match=r"nearest is 'mobilenet_v2'"):
        ts.arch("mobilenetv2")


def test_prints_as_table_1_of_the_paper():
    rows = [line.split("  ") for line in str(B0).splitlines()]
    cells = [[c.strip() for c in row if c.strip()] for row in rows]
    table = [row[:5] for row in cells if row and row[0].isdigit()]
    assert table == [
        ["1", "Conv, k3x3", "224 x 224", "32", "1"],
        ["2", "MBConv1, k3x3, SE", "112 x 112", "16", "1"],
        ["3", "MBConv6, k3x3, SE", "112 x 112", "24", "2"],
        ["4", "MBConv6, k5x5, SE", "56 x 56", "40", "2"],
        ["5", "MBConv6, k3x3, SE", "28 x 28", "80", "3"],
        ["6", "MBConv6, k5x5, SE", "14 x 14", "112", "3"],
        ["7", "MBConv6, k5x5, SE", "14 x 14", "192", "4"],
        ["8", "MBConv6, k3x3, SE", "7 x 7", "320", "1"],
        ["9", "Conv 1x1 & Pooling & FC", "7 x 7", "1280", "1"],
    ]
    assert cells[-1][0] == "total"
    assert cells[-1][-2:] == ["5,288,548", f"{ts.cost(B0).macs:,}"]


def test_blocks_fill_in_channels_strides_and_drop_path():
    blocks = list(B0.blocks())
    assert [b.in_channels for b in blocks] == [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192]
    assert [b.stride for b in blocks] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert [b.index for b in blocks] == list(range(16))
    assert [b.drop_path for b in blocks] == pytest.approx([0.2 * i / 16 for i in range(16)], abs=1e-12)
    last = list(B0.with_numerics(drop_path_rule="i/(n-1)").blocks())[-1]
    assert last.drop_path == pytest.approx(0.2, abs=1e-12)
