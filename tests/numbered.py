"""Images that tell their own number, as folder, shards, Parquet and from memory; and samples with faults. Workers import this."""

import io
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 3


def picture(number):
    """(20, 24, 3): the number in the first two channels, everywhere; a texture in the third."""
    out = np.empty((20, 24, 3), np.uint8)
    out[:, :, 0], out[:, :, 1] = number % 251, number // 251
    out[:, :, 2] = (np.arange(20)[:, None] * 11 + np.arange(24) * 7 + number * 29) % 256
    return out


def numbers_in(images):
    """What images (N, 3, S, S) uint8 tell; each has to be the same everywhere."""
    assert all(len(np.unique(image)) == 1 for image in images[:, :2].reshape(-1, *images.shape[2:]).numpy())
    return images[:, 0, 0, 0].long() + 251 * images[:, 1, 0, 0].long()


def encoded(number, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, kind)
    return file.getvalue()


def folder(root: Path, first, count):
    for n in range(first, first + count):
        path = root / "train" / f"c{n % CLASSES}" / f"{n:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(n))
    for n in range(CLASSES):
        path = root / "val" / f"c{n}" / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(n))
    return str(root)


def shards(root: Path, first, count, each=10):
    root.mkdir()
    for start in range(first, first + count, each):
        with tarfile.open(root / f"train-{start:06}.tar", "w") as tar:
            for n in range(start, min(start + each, first + count)):
                _add(tar, n)
    with tarfile.open(root / "val-000000.tar", "w") as tar:
        for n in range(CLASSES):
            _add(tar, n)
    return str(root)


def _add(tar, n):
    for suffix, data in (("png", encoded(n)), ("cls", str(n % CLASSES).encode())):
        member = tarfile.TarInfo(f"{n:04}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def parquet(root: Path, first, count):
    import pyarrow as pa
    from pyarrow import parquet as pq

    root.mkdir()
    for name, numbers in (("train-00000-of-00001", range(first, first + count)), ("validation-00000-of-00001", range(CLASSES))):
        images = [{"bytes": encoded(n), "path": f"{n:04}.png"} for n in numbers]
        table = pa.table({"image": images, "label": [n % CLASSES for n in numbers]})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=7)
    return str(root)


class Pixels:
    """Numbered pictures, without files."""

    def __init__(self, count):
        self.labels = np.arange(count) % CLASSES

    def __len__(self):
        return len(self.labels)

    def name(self, number):
        return f"picture {number}"

    def read(self, number):
        return picture(number)


class Whose(Pixels):
    """Each picture tells the process that made it, in place of its number."""

    def read(self, number):
        out = picture(0)
        out[:, :, 0], out[:, :, 1] = os.getpid() % 251, os.getpid() // 251 % 251
        return out


class WithoutTorch:
    """Other samples, in a process that has no torch: it would take 400 MB and 2 s in each worker."""

    def __init__(self, samples):
        self.samples, self.labels = samples, samples.labels

    def __len__(self):
        return len(self.labels)

    def name(self, number):
        return self.samples.name(number)

    def read(self, number):
        data = self.samples.read(number)
        if "torch" in sys.modules:
            raise TypeError("torch was imported")
        return data


class Flawed(Pixels):
    """flaws: by number, what goes wrong there. folder: for marks that last longer than a process."""

    def __init__(self, count, flaws, folder="."):
        super().__init__(count)
        self.flaws, self.folder = flaws, str(folder)

    def read(self, number):
        flaw = self.flaws.get(number)
        mark = Path(self.folder) / f"{flaw}-{number}"
        if flaw == "vanished":
            raise FileNotFoundError(2, "No such file or directory")
        if flaw == "forbidden":
            raise PermissionError(13, "Permission denied")
        if flaw == "truncated":
            return encoded(number, "JPEG")[:-200]
        if flaw == "empty":
            return b""
        if flaw == "a bug":
            raise TypeError("no such thing")
        if flaw == "killed once" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if flaw == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if flaw == "kills":
            os.kill(os.getpid(), signal.SIGSEGV)
        if flaw == "stalls":
            mark.touch()
            while not (Path(self.folder) / "go on").exists():
                time.sleep(0.02)
        return super().read(number)
