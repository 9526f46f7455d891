"""Published files over real connections that break, stall, lie and point elsewhere; the cache; archives that reach outside."""

import gzip
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from local_server import HANG_UP, Served, serving

from triscale import download
from triscale.download import FetchError
from triscale.weights.fetch import cache_folder, fetch, unpack
from triscale.weights.zoo import entries

DATA = random.Random(0).randbytes(400_000)
SHA = hashlib.sha256(DATA).hexdigest()
# What a process of its own runs: fetch the URL or repository of its first argument, say where it is or what went wrong.
PROCESS = """
import dataclasses, sys
from triscale.weights.fetch import fetch
from triscale.weights.zoo import entries
entry = dataclasses.replace(entries("mobilenet_v2")[0], where=sys.argv[1], hash="")
try:
    print(fetch(entry, offline="offline" in sys.argv))
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0.01,) * 4)
    return tmp_path / "home"


def at(url, digest=""):
    return replace(entries("mobilenet_v2")[0], where=url, hash=digest)


def start(*arguments, before="", **env):
    command = [sys.executable, "-c", before + PROCESS, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def leftovers(path):
    """Names in the folder of `path` but for its own and the lock's."""
    return {p.name for p in path.parent.iterdir()} - {path.name, f"{path.name}.lock"}


def test_a_file_lies_under_its_url_and_the_network_is_asked_once(server, home):
    server.files["/a/b.pth"] = Served(DATA)
    told = []
    path = fetch(at(server.url("/a/b.pth"), f"sha256:{SHA[:8]}"), progress=lambda done, total: told.append((done, total)))
    assert path == home / "weights" / f"127.0.0.1%3A{server.server_port}" / "a" / "b.pth"
    assert path.read_bytes() == DATA
    assert leftovers(path) == set()
    assert told == sorted(told)
    assert told[-1] == (len(DATA), len(DATA))
    assert fetch(at(server.url("/a/b.pth")), offline=True) == path
    assert len(server.requests) == 1


def test_the_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "home" / "weights"
    monkeypatch.delenv("TRISCALE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "triscale" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder() == tmp_path / "me" / ".cache" / "triscale" / "weights"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_cut_connection_is_resumed_where_it_broke(server, chunked):
    served = server.files["/x.pth"] = Served(DATA, chunked=chunked, cuts=[100_000, 50_000])
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    first, second, third = server.gets("/x.pth")
    assert "Range" not in first
    assert (second["Range"], second["If-Range"]) == ("bytes=100000-", served.etag)
    assert third["Range"] == "bytes=150000-"


def test_a_server_without_ranges_is_asked_anew(server):
    server.files["/x.pth"] = Served(DATA, ranges=False, cuts=[100_000])
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    assert len(server.requests) == 2


def test_a_file_that_changed_meanwhile_is_not_glued_together(server):
    served = server.files["/x.pth"] = Served(DATA, cuts=[100_000], statuses=[None, 500, 500, 500, 500])
    with pytest.raises(FetchError, match=r"HTTP 500 .*, 5 attempts; 100000 bytes stay in .*x\.pth\.part, call again to go on"):
        fetch(at(server.url("/x.pth")))
    served.data, served.etag = DATA[::-1], '"two"'
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA[::-1]
    assert server.gets("/x.pth")[-1]["If-Range"] == '"one"'


@pytest.mark.parametrize("etag", ["", 'W/"one"'])
def test_without_a_validator_only_a_known_hash_allows_to_go_on(server, etag):
    server.files["/x.pth"] = Served(DATA, etag=etag, cuts=[100_000])
    server.files["/y.pth"] = Served(DATA, etag=etag, cuts=[100_000])
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    assert "Range" not in server.gets("/x.pth")[1]
    assert fetch(at(server.url("/y.pth"), f"sha256:{SHA}")).read_bytes() == DATA
    assert server.gets("/y.pth")[1]["Range"] == "bytes=100000-"
    assert "If-Range" not in server.gets("/y.pth")[1]


def test_a_date_stands_in_for_a_tag(server):
    date = "Tue, 01 Oct 2019 10:00:00 GMT"
    server.files["/x.pth"] = Served(DATA, etag="", headers={"Last-Modified": date}, cuts=[100_000])
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    assert server.gets("/x.pth")[1]["If-Range"] == date


def test_a_part_that_is_whole_or_too_long(server):
    server.files["/x.pth"] = Served(DATA)
    for extra in (b"", b"more"):
        path = fetch(at(server.url("/x.pth")))
        path.rename(path.with_name("x.pth.part"))
        path.with_name("x.pth.part").open("ab").write(extra)
        path.with_name("x.pth.part.tag").write_text('"one"')
        assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
        path.unlink()


@pytest.mark.parametrize(
    ("digest", "found"), [("sha256:00c0ffee", SHA[:8]), ("md5:" + "0" * 32, hashlib.md5(DATA).hexdigest()), (f"sha256:{SHA[:-1]}x", SHA)]
)
def test_a_wrong_hash_deletes_the_part_and_tells_both(server, digest, found):
    server.files["/x.pth"] = Served(DATA)
    with pytest.raises(FetchError) as error:
        fetch(at(server.url("/x.pth"), digest))
    assert found in str(error.value)
    assert digest.split(":")[1] in str(error.value)
    folder = cache_folder() / f"127.0.0.1%3A{server.server_port}"
    assert [p.name for p in folder.iterdir()] == ["x.pth.lock"]


@pytest.mark.parametrize("digest", [f"sha256:{SHA}", f"sha256:{SHA[:8].upper()}", "md5:" + hashlib.md5(DATA).hexdigest()])
def test_a_right_hash(server, digest):
    server.files["/x.pth"] = Served(DATA)
    assert fetch(at(server.url("/x.pth"), digest)).read_bytes() == DATA


def test_redirects(server):
    server.files["/1"] = Served(location="/2")
    server.files["/2"] = Served(location=server.url("/x.pth"))
    server.files["/x.pth"] = Served(DATA, cuts=[100_000])
    assert fetch(at(server.url("/1"))).read_bytes() == DATA
    assert server.gets("/x.pth")[1]["Range"] == "bytes=100000-"
    server.files["/loop"] = Served(location="/loop")
    with pytest.raises(FetchError, match=r"/loop: HTTP 302 .*infinite loop.*; fetch it elsewhere and put it at .*loop, or give a file as weights"):
        fetch(at(server.url("/loop")))
    for target, told in (
        ("file:///etc/passwd", "Redirection to url .* is not allowed"),
        ("ftp://127.0.0.1/x", "refused a redirect from http to ftp"),
    ):
        server.files["/away"] = Served(location=target)
        with pytest.raises(FetchError, match=f"/away: .*{told}"):
            fetch(at(server.url("/away")))


def test_a_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://example.org/a")
    for target in ("http://example.org/a", "HTTP://example.org/a", "file:///a"):
        with pytest.raises(FetchError, match="refused a redirect from https"):
            download._Redirects().redirect_request(request, None, 302, "Found", {}, target)
    assert download._Redirects().redirect_request(request, None, 302, "Found", {}, "https://example.net/b").full_url == "https://example.net/b"


def test_statuses(server):
    with pytest.raises(FetchError, match=r"/none.pth: HTTP 404 Not Found; fetch it elsewhere and put it at .*none\.pth") as error:
        fetch(at(server.url("/none.pth")))
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1
    server.files["/x.pth"] = Served(DATA, statuses=[500, HANG_UP, 503, 429])
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    assert len(server.gets("/x.pth")) == 5


def test_a_server_that_stalls(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.files["/x.pth"] = Served(DATA, stalls=[100_000])
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    assert server.gets("/x.pth")[1]["Range"] == "bytes=100000-"
    server.files["/y.pth"] = Served(DATA, stalls=[0] * 5)
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    with pytest.raises(FetchError, match=r"nothing came for 0.05 s\), 5 attempts"):
        fetch(at(server.url("/y.pth")))


def test_a_killed_process_is_gone_on_from(server):
    served = server.files["/x.pth"] = Served(DATA, stalls=[150_000])
    process = start(server.url("/x.pth"))
    part = cache_folder() / f"127.0.0.1%3A{server.server_port}" / "x.pth.part"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    served.go.set()
    have = part.stat().st_size
    path = fetch(at(server.url("/x.pth")))
    assert path.read_bytes() == DATA
    assert server.gets("/x.pth")[1]["Range"] == f"bytes={have}-"
    assert leftovers(path) == set()


def test_two_processes_at_once_fetch_it_once(server):
    served = server.files["/x.pth"] = Served(DATA, stalls=[150_000], cuts=[])
    first = start(server.url("/x.pth"))
    while not server.requests:
        time.sleep(0.02)
    second = start(server.url("/x.pth"))
    time.sleep(0.4)
    assert second.poll() is None  # it waits for the lock
    served.go.set()
    outputs = [process.communicate(timeout=20) for process in (first, second)]
    assert outputs[0] == outputs[1]
    assert Path(outputs[0][0].strip()).read_bytes() == DATA
    assert [headers.get("Range") for headers in server.gets("/x.pth")] == [None, "bytes=150000-"]


def test_a_disk_that_takes_no_more(server):
    server.files["/x.pth"] = Served(DATA)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
    process = start(server.url("/x.pth"), before=limit)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 1
    assert told.count("\n") == 1
    assert "could not be written (File too large); 150000 bytes stay in" in told
    assert fetch(at(server.url("/x.pth"))).read_bytes() == DATA
    assert server.gets("/x.pth")[1]["Range"] == "bytes=150000-"


def test_a_cache_that_cannot_be_made(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="set TRISCALE_HOME to a folder that can be written"):
        fetch(at(server.url("/x.pth")))


def test_offline_and_no_network(home):
    with serving() as server:
        server.files["/x.pth"] = Served(DATA)
        url, other = server.url("/x.pth"), server.url("/y.pth")
        with pytest.raises(FetchError, match=rf"{url}: not in the cache, and offline; .*put it at .*x\.pth"):
            fetch(at(url), offline=True)
        assert server.requests == []
        path = fetch(at(url))
    assert fetch(at(url)) == path  # nothing listens any more
    assert fetch(at(url), offline=True) == path
    with pytest.raises(
        FetchError, match=r"y.pth: no connection \(.*refused.*\); fetch it elsewhere and put it at .*y\.pth, or give a file as weights"
    ):
        fetch(at(other))
    by_hand = path.with_name("y.pth")
    by_hand.write_bytes(DATA)
    assert fetch(at(other)) == by_hand


def archive(*members):
    """A .tar.gz of (name, bytes) pairs and TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = (("b0/model.ckpt.index", b"index"), ("b0/model.ckpt.data-00000-of-00001", DATA[:5000]), ("./b0/checkpoint", b"text"))
OTHERS = (special("b0", tarfile.DIRTYPE), ("b0/model.ckpt.meta", b"graph"), ("b0/._model.ckpt.index", b"mac"), ("b0/a.tflite", b"lite"))


def test_an_archive_becomes_a_folder_of_the_checkpoint(server):
    server.files["/ckpts/b0.tar.gz"] = Served(archive(*OTHERS, *GOOD), cuts=[1000])
    folder = fetch(at(server.url("/ckpts/b0.tar.gz")))
    assert folder.name == "b0"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name.split("/")[-1]: data for name, data in GOOD}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["b0", "b0.tar.gz.lock"]
    assert fetch(at(server.url("/ckpts/b0.tar.gz")), offline=True) == folder
    assert len(server.requests) == 2


BAD = {
    "a name above": archive(*GOOD, ("../evil.index", b"x")),
    "a name above in the middle": archive(*GOOD, ("b0/../../evil.index", b"x")),
    "an absolute name": archive(*GOOD, ("/tmp/evil.index", b"x")),
    "a symbolic link": archive(*GOOD, special("b0/link.index", tarfile.SYMTYPE, "/etc/passwd")),
    "a hard link": archive(*GOOD, special("b0/link.index", tarfile.LNKTYPE, "../../evil")),
    "a pipe": archive(*GOOD, special("b0/pipe.index", tarfile.FIFOTYPE)),
    "a name twice": archive(*GOOD, ("other/model.ckpt.index", b"x")),
    "no checkpoint": archive(*OTHERS),
    "far more than it weighs": archive(*GOOD, ("b0/zeros.index", bytes(8_000_000))),
    "a header of zeros": gzip.compress(archive(*GOOD)[:0] + bytes(8_000_000)),
    "cut short": archive(*GOOD)[:2000],
    "no archive": DATA[:3000],
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_archive_is_refused_and_nothing_is_left(tmp_path, what):
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / "b0.tar.gz"
    path.write_bytes(BAD[what])
    before = set(Path("/tmp").glob("evil*"))
    with pytest.raises(FetchError, match=r"b0\.tar\.gz: not a checkpoint's archive \(.+\); deleted") as error:
        unpack(path, path.with_name("b0"))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["cache"]
    assert set(Path("/tmp").glob("evil*")) == before


def test_the_hub_is_asked_once(tmp_path):
    repo, path = "timm/some_net.in1k", "/timm/some_net.in1k/resolve/main/model.safetensors"
    with serving() as server:
        server.files[path] = Served(DATA, etag=f'"{SHA}"', headers={"X-Repo-Commit": "a" * 40})
        server.files["/timm/none/resolve/main/model.safetensors"] = Served(statuses=[404] * 3, headers={"X-Error-Code": "RepoNotFound"})
        hub = {"HF_ENDPOINT": server.url(""), "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        server.files["/timm/gone/resolve/main/model.safetensors"] = Served(statuses=[HANG_UP] * 9)
        first, none, gone = (start(name, **hub) for name in (repo, "timm/none", "timm/gone"))
        found, told = first.communicate(timeout=30)
        assert first.returncode == 0, told
        for process, name, what in ((none, "none", "404"), (gone, "gone", "disconnected")):
            told = process.communicate(timeout=30)[1].splitlines()[-1]  # the client may tell of its own attempts before
            assert told.startswith(f"FetchError: timm/{name}: the Hugging Face hub: ")
            assert what in told
        assert all("Authorization" not in headers for _, _, headers in server.requests)
    assert Path(found.strip()).read_bytes() == DATA
    assert Path(found.strip()).is_relative_to(cache_folder() / "hub")
    again, missing = start(repo, **hub), start("timm/other_net.in1k", "offline", **hub)  # nothing listens any more
    assert again.communicate(timeout=30)[0] == found
    assert (
        "FetchError: timm/other_net.in1k: not in the cache, and offline; fetch https://huggingface.co/timm/other_net"
        in missing.communicate(timeout=30)[1]
    )


def test_without_the_hubs_client_it_says_what_to_install():
    process = start("timm/some_net.in1k", before="import sys; sys.modules['huggingface_hub'] = None\n")
    assert (
        "pip install 'triscale[weights]', or fetch https://huggingface.co/timm/some_net.in1k/resolve/main/model.safetensors"
        in process.communicate()[1]
    )


def test_no_torch_is_loaded_to_look_up_and_fetch():
    script = (
        "import sys, triscale.weights.fetch, triscale.weights.zoo as z; z.entries(); print({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_no_way_to_the_hub_is_told_at_once(tmp_path):
    """Its own client would try for 25 s."""
    began = time.perf_counter()
    told = start("timm/some_net.in1k", HF_ENDPOINT="http://hub.invalid", HF_HOME=str(tmp_path)).communicate(timeout=30)[1]
    assert "FetchError: timm/some_net.in1k: the Hugging Face hub: no connection to hub.invalid" in told
    assert "give the file as weights" in told.splitlines()[-1]
    assert time.perf_counter() - began < 15
