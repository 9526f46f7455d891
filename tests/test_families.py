"""The named networks against the official code's own tables, and its numerics in training."""

import json

import numpy as np
import pytest
import timm
import torch
from networks import meta_build

import triscale as ts
from triscale.blocks import BatchNorm, DropPath

PARAMETERS = {
    **dict(zip((f"efficientnet_b{i}" for i in range(5)), (5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616), strict=True)),
    **dict(zip((f"efficientnet_b{i}" for i in range(5, 9)), (30_389_784, 43_040_704, 66_347_960, 87_413_142), strict=True)),
    "efficientnet_l2": 480_309_308,
    "efficientnet_l2_475": 480_309_308,
    **dict(zip((f"efficientnetv2_b{i}" for i in range(4)), (7_139_704, 8_141_052, 10_096_086, 14_358_406), strict=True)),
    **dict(zip((f"efficientnetv2_{size}" for size in "sml"), (21_458_488, 54_139_356, 118_515_272), strict=True)),
    **dict(zip((f"efficientnet_lite{i}" for i in range(5)), (4_652_008, 5_416_680, 6_092_072, 8_197_096, 13_006_568), strict=True)),
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "mnasnet_a1": 3_887_038,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
}
RESOLUTIONS = {f"efficientnet_b{i}": r for i, r in enumerate((224, 240, 260, 300, 380, 456, 528, 600, 672))} | {
    **{f"efficientnetv2_b{i}": r for i, r in enumerate((224, 240, 260, 300))},
    **{f"efficientnet_lite{i}": r for i, r in enumerate((224, 240, 260, 280, 300))},
    "efficientnet_l2": 800,
    "efficientnet_l2_475": 475,
}
LITE_DROPOUT = {f"efficientnet_lite{i}": d for i, d in enumerate((0.2, 0.2, 0.3, 0.3, 0.3))}
GOLDEN = [f"efficientnet_b{i}" for i in range(9)] + ["efficientnet_l2"]


def count(module, *kinds):
    """Parameters of the module; with kinds: of those submodules alone."""
    inside = [m for m in module.modules() if isinstance(m, kinds)] if kinds else [module]
    return sum(p.numel() for m in inside for p in m.parameters())


def moving(module):
    return sum(b.numel() for b in module.buffers())


@pytest.fixture(scope="module")
def official(shared):
    return json.loads((shared / "golden/family.json").read_text())["models"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    arch = ts.arch(name)
    assert ts.cost(arch).params == PARAMETERS[name]
    assert count(meta_build(arch)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101"])
def test_parameter_counts_equal_timm(name):
    with torch.device("meta"):
        expected = count(timm.create_model(name))
    assert ts.cost(ts.arch(name)).params == expected
    assert count(meta_build(ts.arch(name))) == expected


def test_every_network_is_counted_here():
    assert set(ts.names()) == {*PARAMETERS, "resnet18", "resnet34", "resnet101"}


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_resolution(name):
    assert ts.arch(name).resolution == RESOLUTIONS[name]


@pytest.mark.parametrize("name", LITE_DROPOUT)
def test_lite_dropout(name):
    assert ts.arch(name).dropout == LITE_DROPOUT[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_totals_equal_the_official_graph(name, official):
    arch, row = ts.arch(name), official[name.replace("_", "-")]
    net = meta_build(arch, row["num_classes"])
    assert arch.resolution == row["resolution"]
    assert arch.dropout == row["dropout_rate"]
    assert arch.stem.channels == row["stem_filters"]
    assert arch.head.channels == row["head_filters"]
    n = arch.numerics
    assert (n.norm_eps, 1 - n.norm_momentum, 1 - n.drop_path) == pytest.approx(
        (row["batch_norm_epsilon"], row["batch_norm_momentum"], row["survival_prob"])
    )
    assert n.divisor == row["depth_divisor"]
    assert count(net) == row["trainable_params"]
    assert moving(net) == row["bn_moving_stats"]
    assert len(list(net.parameters())) == row["num_trainable_tensors"]
    assert sum(isinstance(m, BatchNorm) for m in net.modules()) == row["num_bn_layers"]
    assert count(net) - count(net, BatchNorm) == row["l2_regularised_params"]
    assert (count(net.stem), moving(net.stem)) == (row["stem_params"], row["stem_moving_stats"])
    assert (count(net.head), moving(net.head)) == (row["head_conv_bn_params"], row["head_moving_stats"])
    assert count(net.classifier) == row["classifier_params"]
    assert count(net.head) + count(net.classifier) == row["head_params"]
    per_stage = ts.cost(arch).per_stage
    assert [r.params for r in per_stage] == [row["stem_params"], *(s["trainable_params"] for s in row["stages"]), row["head_params"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_block_equals_the_official_graph(name, official):
    arch, row = ts.arch(name), official[name.replace("_", "-")]
    net = meta_build(arch)
    ours = list(arch.blocks())
    assert len(ours) == row["num_blocks"] == len(row["blocks"])
    for block, want in zip(ours, row["blocks"], strict=True):
        module = net.body[block.stage_index][block.layer]
        got = {
            "index": block.index,
            "stage": block.stage_index + 1,
            "kernel_size": block.stage.kernel,
            "strides": [block.stride] * 2,
            "input_filters": block.in_channels,
            "expand_ratio": block.stage.expand,
            "has_expand_conv": hasattr(module.expand, "conv"),
            "expanded_filters": block.inner,
            "output_filters": block.stage.channels,
            "se_reduced_filters": block.squeezed,
            "has_skip": block.shortcut == "identity",
            "trainable_params": count(module),
            "moving_stats": moving(module),
        }
        assert got == {key: want[key] for key in got}
        assert block.drop_path == pytest.approx(1 - want["survival_prob"], abs=1e-12)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b7"])
def test_drop_connect_rates(name, shared):
    rows = json.loads((shared / "golden/drop_connect_rates.json").read_text())[name.replace("_", "-")]
    arch = ts.arch(name)
    net = meta_build(arch)
    for block, row in zip(arch.blocks(), rows, strict=True):
        assert block.drop_path == pytest.approx(row["drop_connect_rate"], abs=1e-12)
        rate = net.body[block.stage_index][block.layer].drop.rate
        assert rate == (pytest.approx(row["drop_connect_rate"], abs=1e-12) if row["applied"] else 0)


def test_training_batch_norm_equals_the_official_one(shared):
    """Output and moving statistics over three updates, the biased variance in the moving one."""
    golden = np.load(shared / "golden/bn_train.npz")
    norm = BatchNorm(3, ts.Numerics()).train()
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(golden["gamma"]))
        norm.bias.copy_(torch.from_numpy(golden["beta"]))
    assert np.array_equal(norm.running_mean, golden["moving_mean"][0])
    assert np.array_equal(norm.running_var, golden["moving_variance"][0])
    for step in range(3):
        y = norm(torch.from_numpy(golden["x"][step]).permute(0, 3, 1, 2))
        np.testing.assert_allclose(y.detach().permute(0, 2, 3, 1), golden["y"][step], rtol=0, atol=2e-6)
        np.testing.assert_allclose(norm.running_mean, golden["moving_mean"][step + 1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(norm.running_var, golden["moving_variance"][step + 1], rtol=1e-6)


def test_torch_batch_norm_would_store_another_variance(shared):
    """The unbiased rule differs by more than the tolerance above, so that test can tell them apart."""
    golden = np.load(shared / "golden/bn_train.npz")
    norm = BatchNorm(3, ts.Numerics(running_variance="unbiased")).train()
    norm(torch.from_numpy(golden["x"][0]).permute(0, 3, 1, 2))
    assert np.abs(norm.running_var.numpy() / golden["moving_variance"][1] - 1).max() > 1e-5


def test_drop_path_has_the_official_arithmetic(shared):
    """Where both draws keep a sample the values agree; dropped samples are 0 throughout."""
    golden = np.load(shared / "golden/optimizer.npz")
    x, want, survival = torch.from_numpy(golden["drop_connect_in"]), golden["drop_connect_out"], float(golden["drop_connect_survival_prob"])
    torch.manual_seed(0)
    y = DropPath(1 - survival).train()(x.clone()).numpy()
    kept = np.array([sample.any() for sample in y])
    official = golden["drop_connect_kept"].astype(bool).reshape(-1)
    both = kept & official
    assert 20 < both.sum() < len(kept)
    np.testing.assert_allclose(y[both], want[both], rtol=1e-6)
    np.testing.assert_allclose(y[kept], x.numpy()[kept] / survival, rtol=1e-6)
    assert not y[~kept].any()
    assert not want[~official].any()
