"""The cache of scores: hits, misses, what is not kept, damaged files, a folder that can't be written, other processes."""

import json
import multiprocessing
import resource
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import triscale as ts
from triscale.files import cache_folder
from triscale.search import score_cache
from triscale.search.score_cache import Cached, ScoreCache
from triscale.search.space import plain

NET = ts.arch("mobilenet_v2")
ABOUT = {"recipe": {"epochs": 3, "lr": 0.1}, "data": {"files": "0badcafe"}, "seed": 0}


@dataclass(frozen=True)
class Epochs:
    """A score of three epochs that notes each call in a file."""

    log: Path
    values: tuple[float, ...] = (0.1, 1 / 3, 0.30000000000000004)

    def __call__(self, arch):
        with open(self.log, "a") as file:
            file.write("called\n")
        yield from self.values

    @property
    def calls(self):
        return self.log.read_text().count("called") if self.log.exists() else 0


def one_number(arch):
    return 1


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


@pytest.fixture
def score(tmp_path):
    return Epochs(tmp_path / "calls")


@pytest.fixture
def cached(score, tmp_path):
    return Cached(score, ABOUT, tmp_path / "scores")


def test_a_hit_gives_the_same_values_without_a_call(score, cached):
    assert cached.peek(NET) is None
    assert tuple(cached(NET)) == score.values
    assert cached.peek(NET) == score.values
    assert tuple(cached(NET)) == score.values
    assert score.calls == 1


def test_a_single_number_stays_one(cached):
    plain = replace(cached, score=one_number)
    assert plain(NET) == plain(NET) == 1.0
    assert isinstance(plain(NET), float)
    assert plain.peek(NET) == (1.0,)


def test_the_file_is_at_its_key_and_tells_what_it_is_of(score, cached):
    list(cached(NET))
    (path,) = files(cached.folder)
    assert len(path.stem) == 64
    assert path.relative_to(cached.folder).parts == (path.stem[:2], f"{path.stem}.json")
    data = json.loads(path.read_text())
    assert data["values"] == list(score.values)
    assert data["of"]["fingerprint"] == ABOUT
    assert ts.Arch.from_json(json.dumps({"format": 1, **data["of"]["arch"]})) == plain(NET)


def test_the_usual_folder(score, monkeypatch, tmp_path):
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path / "home"))
    list(Cached(score, ABOUT)(NET))
    assert len(files(cache_folder("scores"))) == 1


OTHERS = {
    "topology": replace(NET, resolution=160),
    "a stage": replace(NET, stages=(*NET.stages[:-1], replace(NET.stages[-1], kernel=5))),
    "numerics": NET.with_numerics(norm_eps=1e-4),
    "dropout": replace(NET, dropout=0.11),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_network_is_a_miss(score, cached, what):
    list(cached(NET))
    assert cached.peek(OTHERS[what]) is None
    list(cached(OTHERS[what]))
    assert score.calls == len(files(cached.folder)) == 2


@pytest.mark.parametrize("change", [{"recipe": {"epochs": 3, "lr": 0.2}}, {"data": {"files": "1"}}, {"seed": 1}, {"device": "cuda"}])
def test_another_fingerprint_is_a_miss(score, cached, change):
    list(cached(NET))
    assert replace(cached, fingerprint={**ABOUT, **change}).peek(NET) is None


def test_another_version_is_a_miss(cached, monkeypatch):
    list(cached(NET))
    monkeypatch.setattr(score_cache, "__version__", "0.0.0")
    assert cached.peek(NET) is None


def test_the_name_and_the_order_of_keys_are_no_part_of_it(score, cached):
    list(cached(NET))
    same = replace(cached, fingerprint=dict(reversed(ABOUT.items())))
    assert same.peek(replace(NET, name="another")) == score.values


def test_what_is_not_whole_is_not_kept(score, cached):
    pruned = cached(NET)
    assert next(pruned) == score.values[0]
    pruned.close()

    def fails(arch):
        yield 0.5
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        list(replace(cached, score=fails)(NET))
    for values in ((0.1, float("nan")), (float("inf"),), ()):
        assert len(list(replace(cached, score=replace(score, values=values))(NET))) == len(values)
    assert replace(cached, score=lambda arch: float("-inf"))(NET) == float("-inf")
    assert files(cached.folder) == []
    assert cached.peek(NET) is None


def test_a_pruned_score_is_let_go_of(cached):
    ended = []

    def holds(arch):
        try:
            yield 0.5
            yield 0.6
        finally:
            ended.append(True)

    inner = holds(NET)  # held here too, so that it doesn't end for want of a reference
    pruned = replace(cached, score=lambda arch: inner)(NET)
    next(pruned)
    assert not ended
    pruned.close()
    assert ended


def spoiled(text):
    data = json.loads(text)
    yield "torn", text[: len(text) // 2].encode()
    yield "empty", b""
    yield "zeros", bytes(len(text))
    yield "no UTF-8", b"\xff\xfe\x00"
    yield "nested", b"[" * 100_000
    yield "a list", b"[]"
    for field, value in (("format", 2), ("values", []), ("values", ["0.5"]), ("values", 0.5), ("values", [True]), ("one", 0), ("of", {})):
        yield f"{field} {value}", json.dumps({**data, field: value}).encode()
    yield "NaN", text.replace("0.1", "NaN", 1).encode()


def test_a_damaged_or_foreign_file_is_a_miss_and_is_overwritten(score, cached):
    list(cached(NET))
    (path,) = files(cached.folder)
    whole = path.read_text()
    for calls, (what, content) in enumerate(spoiled(whole), 1):
        path.write_bytes(content)
        assert cached.peek(NET) is None, what
        assert score.calls == calls
        assert tuple(cached(NET)) == score.values, what
        assert path.read_text() == whole, what


def test_a_file_of_another_score_under_this_key_is_a_miss(cached):
    other = OTHERS["dropout"]
    list(cached(NET))
    (path,) = files(cached.folder)
    cache = ScoreCache(cached.folder)
    target = cache.path(cache.subject(other, ABOUT))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(path.read_text())
    assert cached.peek(other) is None


def test_a_folder_that_cannot_be_written_is_told_once(score, tmp_path):
    (tmp_path / "file").write_text("no folder")
    cached = Cached(score, ABOUT, tmp_path / "file")
    with pytest.warns(UserWarning, match=r"scores can't be kept .*; the search goes on without") as told:
        values = [tuple(cached(arch)) for arch in (NET, OTHERS["dropout"])]
    assert values == [score.values] * 2
    assert len(told) == 1
    assert score.calls == 2


def full_disk(cached, arch):
    """The values and the warnings of a process none of whose files may grow, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return list(cached(arch)), [str(w.message) for w in told]


def peek(cached, arch):
    return cached.peek(arch)


def test_other_processes_share_the_folder(score, cached, tmp_path):
    list(cached(NET))
    other = OTHERS["topology"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(peek, (cached, NET)) == score.values
        # A score without a log: that could not grow either.
        values, told = pool.apply(full_disk, (replace(cached, score=silent), other))
    assert values == [0.25, 0.5]
    assert len(told) == 1
    assert "File too large" in told[0]
    assert cached.peek(other) is None
    assert len(files(cached.folder)) == 1, "nothing half-written is left"


def silent(arch):
    yield 0.25
    yield 0.5


def test_a_fingerprint_that_json_cannot_hold_is_refused(cached):
    for wrong in ({"path": Path("x")}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match="score cache: expected a fingerprint of texts"):
            replace(cached, fingerprint=wrong).peek(NET)
