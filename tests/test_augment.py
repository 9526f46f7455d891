"""AutoAugment and RandAugment: the official tables and pixels, and the batched paths against the reference, image by image."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triscale.data import augment, batched
from triscale.data.policies import AUTOAUGMENT, FILL, MAX_LEVEL, OPERATIONS, RANDAUGMENT, SIGNED, V0, Choices, argument, draw
from triscale.recipe import Recipe

CPU = torch.device("cpu")
PATHS = {
    "image by image": batched.apply,
    "passes over the rows that need them": lambda images, choices: batched.run(images, batched.prepare(choices, CPU)),
    "passes over everything": lambda images, choices: batched.run(images, batched.prepare(choices, CPU, whole=True)),
}
POLICIES = (Recipe(augment="autoaugment"), Recipe(augment="randaugment"), Recipe(augment="randaugment", rand_ops=3, rand_magnitude=28))


@pytest.fixture(scope="module")
def official(shared):
    """A function from a golden file's name to its JSON or its pixels."""
    folder = shared / "golden/autoaugment"

    def read(name):
        return json.loads((folder / name).read_text()) if name.endswith("json") else np.array(Image.open(folder / name))

    return read


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chosen(rows, size, centres=None):
    """Choices from [(operation, argument), ...] for each image."""
    operations = np.array([[OPERATIONS.index(name) for name, _ in row] for row in rows], np.int8)
    arguments = np.array([[float(value) for _, value in row] for row in rows])
    centres = np.zeros((*operations.shape, 2), np.int32) if centres is None else np.asarray(centres, np.int32)
    return Choices(size, operations, arguments, centres)


def batch_of(image, count):
    return torch.from_numpy(image).permute(2, 0, 1).expand(count, -1, -1, -1).clone()


def assert_same(got, want, rows):
    """Bit for bit; names the operations of the images that differ."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert not [rows[i] for i in range(len(got)) if (got[i] != want[i]).any()]


def test_the_tables_are_the_official_ones(official):
    policy, arguments = official("policy_v0.json"), official("level_to_arg.json")
    assert [[(step["op"], step["prob"], step["magnitude"]) for step in pair] for pair in policy["sub_policies"]] == [list(pair) for pair in V0]
    assert list(OPERATIONS) == policy["randaugment_ops"]
    assert (policy["max_level"], policy["replace_value"]) == (MAX_LEVEL, [FILL] * 3)
    assert set(arguments) == set(OPERATIONS)
    for name, by_policy in arguments.items():
        for maps, levels in ((AUTOAUGMENT, by_policy["autoaugment"]), (RANDAUGMENT, by_policy["randaugment"])):
            assert len(levels) == 11
            for level, want in levels.items():
                value = argument(name, int(level), maps)
                if name in SIGNED:  # tensors there, float32
                    assert want == {"args_positive": [np.float32(value)], "args_negative": [-np.float32(value)]}
                else:
                    assert want == {"args": [value] if name in maps else []}


def test_every_operations_official_pixels(official):
    """Each golden image, the reference and every batched path; 70 images of one batch, each with its own operation."""
    image, index = official("input.png"), official("ops_index.json")
    rows = [[(entry["op"], (*entry["args"], 0.0)[0])] for entry in index]
    want = np.stack([image if entry["equals_input"] else official(entry["file"]) for entry in index]).transpose(0, 3, 1, 2)
    choices = chosen(rows, (224, 224), np.full((len(rows), 1, 2), (100, 60)))
    assert {name for ((name, _),) in rows} == set(OPERATIONS)
    images = batch_of(image, len(rows))
    assert_same(augment.apply_reference(images.numpy(), choices), want, rows)
    for path in PATHS.values():
        assert_same(path(images, choices), want, rows)


def test_every_sub_policys_official_pixels(official):
    image = official("input.png")
    rows = [[(name, argument(name, level, AUTOAUGMENT)) for name, _, level in pair] for pair in V0]
    want = np.stack([official(f"sub{i:02d}.png") for i in range(25)]).transpose(0, 3, 1, 2)
    images, choices = batch_of(image, 25), chosen(rows, (224, 224))
    assert_same(augment.apply_reference(images.numpy(), choices), want, rows)
    for path in PATHS.values():
        assert_same(path(images, choices), want, rows)


@pytest.mark.parametrize("shape", [(3, 37, 53), (1, 34, 21)])
def test_the_paths_agree_on_every_operation_at_every_level(shape):
    every = [
        [(name, argument(name, level, maps) * sign)]
        for maps in (AUTOAUGMENT, RANDAUGMENT)
        for name in OPERATIONS
        for level in range(31)
        for sign in ((1, -1) if name in SIGNED else (1,))
    ]
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (len(every), *shape), dtype=np.uint8))
    choices = chosen(every, shape[1:], generator.integers(0, min(shape[1:]), (len(every), 1, 2)))
    want = augment.apply_reference(images.numpy(), choices)
    for path in PATHS.values():
        assert_same(path(images, choices), want, every)


@st.composite
def batches(draw_from):
    """Images of few or many values, flat ones too, any shape and memory format, and choices of a policy."""
    count, channels = draw_from(st.integers(1, 6)), draw_from(st.sampled_from((1, 3)))
    size = draw_from(st.integers(1, 40)), draw_from(st.integers(1, 40))
    low = draw_from(st.integers(0, 255))
    generator = seeded(draw_from(st.integers(0, 1 << 30)))
    images = torch.randint(low, draw_from(st.integers(low, 255)) + 1, (count, channels, *size), generator=generator, dtype=torch.uint8)
    if draw_from(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    return images, draw(draw_from(st.sampled_from(POLICIES)), count, size, generator)


@settings(max_examples=100, deadline=None)
@given(batches(), st.data())
def test_the_paths_agree_on_any_batch_and_any_part_of_it(batch, data):
    images, choices = batch
    before = images.clone()
    want = augment.apply_reference(images.numpy(), choices)
    start = data.draw(st.integers(0, len(images)))
    part = slice(start, data.draw(st.integers(start, len(images))))
    for path in PATHS.values():
        got = path(images, choices)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_same(got, want, choices.operations)
        assert_same(path(images[part], choices[part]), want[part], choices.operations[part])
    assert torch.equal(images, before)


@pytest.mark.parametrize("recipe", POLICIES)
def test_draws_depend_on_the_seed_and_the_count_alone(recipe):
    first, again, other = (draw(recipe, 50, (20, 30), seeded(seed)) for seed in (1, 1, 2))
    for name in ("operations", "arguments", "centres"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert np.array_equal(getattr(first[7:31], name), getattr(again, name)[7:31])
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    generators = [seeded(3), seeded(3)]  # what is drawn next stands where it stood, whatever was drawn for
    draw(recipe, 50, (20, 30), generators[0])
    draw(recipe, 50, (7, 1000), generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_autoaugment_draws_by_the_policys_probabilities():
    count = 100_000
    choices = draw(Recipe(augment="autoaugment"), count, (224, 224), seeded())
    assert choices.slots == 2
    for slot in range(2):
        expected = dict.fromkeys(OPERATIONS, 0.0)
        for pair in V0:
            expected[pair[slot][0]] += pair[slot][1] / 25
        for place, name in enumerate(OPERATIONS):
            p = expected[name]
            assert abs((choices.operations[:, slot] == place).mean() - p) <= 5 * (p * (1 - p) / count) ** 0.5, name
    # The two operations of an image are a sub-policy's, with their arguments; "" where one was left out.
    allowed = {(name, argument(name, level, AUTOAUGMENT)) for pair in V0 for name, _, level in pair}
    pairs = {tuple(step[0] for step in pair) for pair in V0}
    for operations, arguments in zip(choices.operations[:2000].tolist(), choices.arguments[:2000].tolist(), strict=True):
        names = [OPERATIONS[place] if place >= 0 else "" for place in operations]
        assert any(all(got in ("", want) for got, want in zip(names, pair, strict=True)) for pair in pairs)
        for name, value in zip(names, arguments, strict=True):
            assert (name, abs(value)) in allowed if name else value == 0
            assert value >= 0 or name in SIGNED


def test_randaugment_draws_every_operation_alike_and_always_applies_it():
    count, size = 40_000, (5, 9)
    choices = draw(Recipe(augment="randaugment", rand_ops=3, rand_magnitude=17), count, size, seeded())
    assert choices.operations.shape == (count, 3)
    shares = np.bincount(choices.operations.ravel(), minlength=16) / choices.operations.size
    assert len(shares) == 16
    assert np.abs(shares - 1 / 16).max() < 0.004
    for place, name in enumerate(OPERATIONS):
        values = choices.arguments[choices.operations == place]
        want = argument(name, 17, RANDAUGMENT)
        assert set(values.tolist()) == ({want, -want} if name in SIGNED else {want})
        if name in SIGNED:
            assert abs((values < 0).mean() - 0.5) < 0.03
    for axis, side in enumerate(size):
        assert np.abs(np.bincount(choices.centres[..., axis].ravel(), minlength=side) / choices.operations.size - 1 / side).max() < 0.01


def test_pillow_and_timm_where_the_official_pixels_are_theirs(official):
    """Identical for these; Color, AutoContrast and Sharpness within a level; Rotate but for 0.1 % of the pixels."""
    timm = pytest.importorskip("timm.data.auto_augment")
    image = official("input.png")
    picture = Image.fromarray(image)
    identical = [("Equalize", 0, timm.equalize), ("Invert", 0, timm.invert)]
    identical += [("Posterize", bits, timm.posterize) for bits in range(1, 9)]
    identical += [("Solarize", threshold, timm.solarize) for threshold in (0, 25, 128, 230, 255)]
    identical += [("SolarizeAdd", addition, timm.solarize_add) for addition in (0, 33, 110)]
    identical += [("Brightness", factor, timm.brightness) for factor in (0.1, 0.64, 1.0, 1.9)]
    near = [("AutoContrast", 0, timm.auto_contrast)]
    near += [(name, factor, f) for name, f in (("Color", timm.color), ("Sharpness", timm.sharpness)) for factor in (0.1, 0.64, 1.9)]
    rows = [[(name, value)] for name, value, _ in identical + near] + [[("Rotate", 24.0)]]
    got = batched.apply(batch_of(image, len(rows)), chosen(rows, (224, 224))).permute(0, 2, 3, 1).numpy()
    for (name, value, f), pixels in zip(identical + near, got, strict=False):
        want = np.asarray(f(picture) if name in ("Equalize", "Invert", "AutoContrast") else f(picture, value)).astype(int)
        assert np.abs(pixels - want).max() <= ((name, value, f) in near), (name, value)
    turned = np.asarray(picture.rotate(24, resample=Image.Resampling.NEAREST, fillcolor=(128,) * 3))
    assert (got[-1] != turned).any(2).mean() < 0.001


def test_a_grey_image_gets_what_a_grey_rgb_image_gets():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for name in OPERATIONS:
        rows = [[(name, argument(name, level, RANDAUGMENT))] for level in range(31)]
        choices = chosen(rows, (16, 16), np.full((31, 1, 2), 8))
        for path in PATHS.values():
            grey = path(ramp.expand(31, 1, 16, 16), choices)
            assert torch.equal(grey.expand(-1, 3, -1, -1), path(ramp.expand(31, 3, 16, 16), choices)), name
            assert name != "Color" or torch.equal(grey, ramp.expand(31, 1, 16, 16))


def test_the_passes_compile_to_one_graph_whatever_is_chosen():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(batched.run, backend=count, fullgraph=True)
    for seed, recipe in enumerate(POLICIES[:2]):  # both have two slots
        images = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8, generator=seeded(seed))
        choices = draw(recipe, 8, (20, 24), seeded(seed))
        got = compiled(images, batched.prepare(choices, CPU, whole=True))
        assert_same(got, augment.apply_reference(images.numpy(), choices), choices.operations)
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("recipe", POLICIES)
def test_on_a_gpu_without_waiting_for_it(recipe):
    images = torch.randint(0, 256, (64, 3, 97, 128), dtype=torch.uint8, generator=seeded())
    choices = draw(recipe, 64, (97, 128), seeded(1))
    there = images.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = batched.apply(there, choices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = np.abs(got.cpu().numpy().astype(int) - augment.apply_reference(images.numpy(), choices))
    assert ((difference <= 1).all(1).mean((1, 2)) >= 0.99).all()


def test_what_is_refused():
    images, choices = torch.zeros((4, 3, 8, 9), dtype=torch.uint8), draw(POLICIES[0], 4, (8, 9), seeded())
    with pytest.raises(ValueError, match=r"expected uint8 images, found torch\.float32"):
        batched.apply(images.float(), choices)
    with pytest.raises(ValueError, match=r"drawn for 4 images of 8x9 .* found images \(4, 3, 9, 8\)"):
        batched.apply(images.transpose(2, 3), choices)
    with pytest.raises(ValueError, match=r"drawn for 3 images"):
        augment.apply_reference(images.numpy(), choices[:3])
    with pytest.raises(ValueError, match=r"expected images \(B, 1 or 3, H, W\), found \(4, 2, 8, 9\)"):
        batched.apply(images[:, :2], choices)
    with pytest.raises(ValueError, match=r"found \(8, 9, 3\) float32"):
        augment.apply_operation(np.zeros((8, 9, 3), np.float32), "Invert")
    with pytest.raises(ValueError, match="found 'Blur'"):
        augment.apply_operation(np.zeros((8, 9, 3), np.uint8), "Blur")
    with pytest.raises(ValueError, match="autoaugment or randaugment, found 'none'"):
        draw(Recipe(), 4, (8, 9), seeded())
