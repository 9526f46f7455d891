"""What tuning finds on a device (triscale.inference.tuning), kept with the records: it comes back with them, and the next machine begins
with it.

tuned.json: by the name of each tuning file its text. A part has them in the folder `home` beside its record, as its $TRISCALE_HOME.
"""

import json
import os
from pathlib import Path

from benchmarks.gpu.record import RESULTS
from triscale.files import write_text

FILE = "tuned.json"


def use(out):
    """Makes OUT/home this process's $TRISCALE_HOME, with what `out` and the tree's results hold for these versions of torch and triscale."""
    from triscale.inference.tuning import versions

    folder = home(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    for name, text in (_read(RESULTS) | _read(out)).items():
        if not (folder / name).exists() and json.loads(text).get("versions") == versions():
            write_text(folder / name, text)
    os.environ["TRISCALE_HOME"] = str(folder.parent.resolve())


def gather(out):
    """Puts what the parts have found so far into tuned.json, where there is anything; whether there is."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(home(out).glob("*.json"))}
    if found:
        write_text(Path(out) / FILE, json.dumps(_read(out) | found, indent=1, sort_keys=True) + "\n")
    return (Path(out) / FILE).is_file()


def home(out):
    """Where triscale.inference keeps what it measured."""
    return Path(out) / "home" / "tuning"


def _read(folder):
    path = Path(folder) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
