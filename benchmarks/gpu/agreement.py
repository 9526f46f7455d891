"""The classes that optimising changes, on packed pictures."""

import torch

from benchmarks.gpu.decode import listing, pictures
from benchmarks.gpu.ours import TUNE_S, used_by
from benchmarks.gpu.peers import LAST

TRIALS = 256  # pictures that classes are compared on


def run(run):
    """Each carried weight file on a pack of its classes, else the first: the optimised network's classes against the fp32 network's and
    the pack's labels, same device, same inputs."""
    from triscale.weights.open import open_model

    for file in run.found.weights:
        run.attempt(file.name, lambda file=file: _agreement(run, *open_model(file)), guess=TUNE_S)


def _agreement(run, net, card):
    from triscale.data.normalising import normalise
    from triscale.inference import optimize

    pack, index = fitting(run.found.packs, card.classes)
    datas, labels = pictures(pack, labels=True)
    count = min(len(datas), 4 if run.rehearsal else TRIALS)
    images = squares(datas[:count], card.preprocess)
    inputs = normalise(images.to(run.device), card.preprocess).contiguous(memory_format=LAST)
    net = net.eval().to(run.device)
    # The reference is fp32 proper: a GPU's tensor cores would round its products to TF32.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = torch.cat([net(part) for part in inputs.split(64)])
    fast = optimize(net)
    ours = torch.cat([fast(part) for part in inputs.split(64)])
    different, change = int((plain.argmax(1) != ours.argmax(1)).sum()), float((plain.softmax(1) - ours.softmax(1)).abs().max())
    right = dict.fromkeys(("right", "right_plain"))
    if index is None:
        run.record.note(f"{card.arch.name}: no carried pack is of its classes, so none is right or wrong on {pack.name}")
    else:
        truth = torch.tensor([index[label] for label in labels[:count]], device=run.device)
        right = {key: int((logits.argmax(1) == truth).sum()) for key, logits in (("right", ours), ("right_plain", plain))}
    about = {"network": card.arch.name, "pack": pack.name, "used": used_by(fast), "images": count}
    run.record.add("agreement", **about, different=different, **right, largest_change=change)


def fitting(packs, classes):
    """(pack, class of the model by class of the pack) of the first pack whose classes are all the model's, by name or as ImageNet's
    WordNet ids; (the first pack, None) where there is none."""
    from triscale.imagenet import imagenet_classes

    names = {name: i for i, name in enumerate(classes)}
    wnids = {c.wnid: i for i, c in enumerate(imagenet_classes())} if len(classes) == len(imagenet_classes()) else {}
    for pack in packs:
        own = listing(pack).classes
        for index in (names, wnids):
            if own and all(name in index for name in own):
                return pack, [index[name] for name in own]
    return packs[0], None


def squares(datas, preprocess):
    """(N, C, S, S) uint8 of image files, on the CPU."""
    import numpy as np

    from triscale.data.jpeg import read_square

    out = np.empty((len(datas), preprocess.size, preprocess.size, preprocess.channels), np.uint8)
    for data, place in zip(datas, out, strict=True):
        read_square(data, place, preprocess)
    return torch.from_numpy(out).permute(0, 3, 1, 2)
