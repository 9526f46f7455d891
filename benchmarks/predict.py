"""Images a second from JPEG files to classes on two cores: ours beside timm's documented recipe and timm at its best, in turn.

256 ImageNet pictures (TRISCALE_TEST_DATA/data/imagenet-samples, 105 KB and 500 x 375 pixels in the middle), B0 with the same
random weights and the same preprocessing in both. Each round times each way once over all pictures.
"""

import os
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform

from triscale.data.decode import decode
from triscale.families import arch
from triscale.model import build
from triscale.predict import logits_of_files
from triscale.recipe import Preprocess
from triscale.weights.load import load_weights

ROUNDS = 5
DATA = Path(os.environ.get("TRISCALE_TEST_DATA", Path(__file__).parent.parent.parent / "shared")) / "data" / "imagenet-samples"


class Files(torch.utils.data.Dataset):
    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(Image.open(self.files[i]).convert("RGB"))


def documented(net, files, transform):
    """timm's README and model cards: one image at a time through create_transform, NCHW, torch's own threads."""
    net = net.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return [int(net(transform(Image.open(f).convert("RGB")).unsqueeze(0)).softmax(1).topk(5).indices[0, 0]) for f in files]


def best(net, files, transform):
    """Channels-last batches from a DataLoader of two worker processes."""
    net = net.to(memory_format=torch.channels_last)
    loader = torch.utils.data.DataLoader(Files(files, transform), batch_size=16, num_workers=2)
    out = []
    with torch.no_grad():
        for x in loader:
            out += net(x.contiguous(memory_format=torch.channels_last)).softmax(1).topk(5).indices[:, 0].tolist()
    return out


def ours(net, files, preprocess, **options):
    return [int(row.softmax(0).topk(5).indices[0]) for _, row in logits_of_files(files, net, preprocess, **options)]


def main():
    files = sorted(str(p) for p in DATA.rglob("*.JPEG"))
    torch.manual_seed(0)
    peer = timm.create_model("tf_efficientnet_b0").eval()
    net = load_weights(build(arch("efficientnet_b0")), peer.state_dict()).eval().to(memory_format=torch.channels_last)
    transform = create_transform(224, is_training=False, interpolation="bicubic", crop_pct=0.875)
    preprocess = Preprocess(224, 32, "after")
    ways = {
        "triscale predict": lambda: ours(net, files, preprocess),
        "triscale predict, reference transform": lambda: ours(net, files, preprocess, reference=True),
        "timm, documented recipe": lambda: documented(peer, files, transform),
        "timm, channels-last batches of 16, two workers": lambda: best(peer, files, transform),
    }
    taken = {name: [] for name in ways}
    answers = {name: way() for name, way in ways.items()}  # warm: files in the page cache, kernels chosen
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    for file in files:
        decode(file)
    alone = time.perf_counter() - start
    rows = []
    for name, seconds in taken.items():
        rates = sorted(len(files) / s for s in seconds)
        same = sum(a == b for a, b in zip(answers[name], answers["timm, documented recipe"], strict=True))
        rows.append({"what": name, "images_per_s": rates[len(rates) // 2], "min": rates[0], "max": rates[-1], "rounds": ROUNDS, "same_class": same})
    return [
        *rows,
        {"what": "decoding alone, one thread", "images_per_s": len(files) / alone, "min": None, "max": None, "rounds": 1, "same_class": None},
    ]
