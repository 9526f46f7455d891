"""OpenMMLab's own modules beside ours: equal outputs one way, its strict loader the other way; and the names of its tensors.

Needs mmpretrain 1.2, mmengine, mmcv-lite 2.1 and opencv-python-headless, which don't install everywhere: the tests hold our
tables to the names written here (tests/data/openmmlab.json.gz). python -m studies.openmmlab.peer
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

CLASSIFIERS = {
    **{f"efficientnet_b{i}": ("EfficientNet", {"arch": f"b{i}"}) for i in range(5)},
    "efficientnet_b8": ("EfficientNet", {"arch": "b8"}),
    "efficientnetv2_b0": ("EfficientNetV2", {"arch": "b0"}),
    "efficientnetv2_s": ("EfficientNetV2", {"arch": "s"}),
    "mobilenet_v2": ("MobileNetV2", {}),
    "resnet18": ("ResNet", {"depth": 18}),
    "resnet50": ("ResNet", {"depth": 50}),
}
CHECKED = ("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
           "efficientnetv2_b0", "mobilenet_v2", "resnet50")  # fmt: skip


def classifier(kind, options, channels):
    from mmpretrain.models import ImageClassifier

    return ImageClassifier(
        backbone={"type": kind, **options},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 1000, "in_channels": channels, "loss": {"type": "CrossEntropyLoss"}},
    )


def main():
    from networks import assert_alive, error, images, randomise

    import triscale as ts
    from triscale.weights.convert import write_as
    from triscale.weights.open import open_model

    names, rows = {}, []
    for name, (kind, options) in CLASSIFIERS.items():
        arch = ts.arch(name)
        net = classifier(kind, options, arch.out_channels)
        names[name] = {key: list(t.shape) for key, t in net.state_dict().items() if not key.endswith("num_batches_tracked")}
        if name not in CHECKED:
            continue
        randomise(net.backbone, images(2, (128, 128), seed=0))
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"meta": {}, "state_dict": net.state_dict()}, f"{folder}/a.pth")
            ours, card = open_model(f"{folder}/a.pth")
            assert card.arch.name == name
            x = images(2, (75, 75), seed=1)
            with torch.no_grad():
                net.eval()
                want = net(x, mode="tensor")
                assert_alive(want)
                apart = error(ours(x), want)
                write_as(f"{folder}/b.pth", ours, card, "openmmlab")
                fresh = classifier(kind, options, arch.out_channels)
                state = torch.load(f"{folder}/b.pth", weights_only=True)["state_dict"]
                counters = {k: v for k, v in fresh.state_dict().items() if k.endswith("num_batches_tracked")}
                fresh.load_state_dict({**state, **counters}, strict=True)
                fresh.eval()
                back = error(fresh(x, mode="tensor"), want)
        rows.append({"network": name, "theirs_to_ours": apart, "ours_to_theirs": back})
        print(rows[-1], flush=True)
    import mmpretrain

    about = {"mmpretrain": mmpretrain.__version__, "torch": torch.__version__}
    (HERE / "results.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    target = ROOT / "tests" / "data" / "openmmlab.json.gz"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(names, separators=(",", ":")).encode(), mtime=0))
    print(target, target.stat().st_size)


if __name__ == "__main__":
    main()
