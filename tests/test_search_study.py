"""Studies that are killed, shared, refused; scores that fail. Real processes, a real journal and a real PostgreSQL."""

import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from search_scores import Logged, deadly, faulty, hanging, key, killed_once, learning, lines

import triscale as ts
from benchmarks.postgres import binaries, server
from triscale.cost_model import cost
from triscale.search.events import Began, Ended, Reported, Running, SearchError, Told
from triscale.search.find import Place, coefficient_search, network_search, result
from triscale.search.grid import grid
from triscale.search.liveness import began, machine
from triscale.search.reward import Objective
from triscale.search.scoring import Finished, Processes, Scored
from triscale.search.space import mnasnet_space
from triscale.search.storage import Journal, StorageError, hide_password, open_storage
from triscale.search.study import Search

TESTS = Path(__file__).parent
SPACE = mnasnet_space(ts.arch("efficientnet_b0"))


def search(score, running, storage=None, sampler="random", seed=0, **more):
    return network_search(score, SPACE, sampler=sampler, seed=seed, running=running, place=Place(storage, "test"), **more)


def carry_out(search):
    events = list(search.events())
    return search.record(), events


def worker(storage, log, trials, seconds=0.0, start=0.0, alive_after=120.0):
    arguments = [str(v) for v in (storage, log, trials, seconds, start, alive_after)]
    return subprocess.Popen([sys.executable, TESTS / "search_worker.py", *arguments], stdout=subprocess.PIPE, text=True, cwd=TESTS)


def check_whole(record, log, wanted):
    """All trials that were wanted, each scored exactly once to its end, and all that was scored is in the study."""
    assert len(record.complete) == wanted
    ended = Counter(line["key"] for line in lines(log) if line["what"] == "ended")
    assert Counter(key(t.arch) for t in record.complete) == ended
    assert all(t.score == cost(t.arch).macs / 1e9 for t in record.complete)
    assert all(t.state in ("complete", "lost") for t in record.trials)


# -- killed, and gone on with


def test_killed_in_the_middle_of_trials_nothing_is_lost_or_counted_twice(tmp_path):
    storage, log = tmp_path / "study.journal", tmp_path / "log"
    for kill_at in (2, 5, 6):
        process = worker(storage, log, 10, 0.15)
        deadline = time.time() + 60
        while sum(line["what"] == "began" for line in lines(log)) < kill_at and time.time() < deadline:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    out, _ = worker(storage, log, 10, 0.0).communicate(timeout=60)
    assert "its worker has ended; it is begun again" in out
    assert out.endswith("done\n")
    record = search(Logged(str(log)), Running(10), storage).record()
    check_whole(record, log, 10)
    lost = [t for t in record.trials if t.state == "lost"]
    done = {key(t.arch) for t in record.complete}
    assert 1 <= len(lost) <= 3
    assert all(key(t.arch) in done for t in lost)  # what was lost was done later
    assert carry_out(search(Logged(str(log)), Running(10), storage))[1] == []  # nothing is left to do


def killed_at(write, storage, log):
    """A search in a process of its own that is killed before its journal's line of this number."""

    def run():
        append, count = Journal.append_logs, [0]

        def dying(self, logs):
            count[0] += 1
            if count[0] == write:
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, logs)

        Journal.append_logs = dying
        carry_out(search(Logged(str(log)), Running(1), storage))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_before_every_line_of_the_journal_the_reference_stays_what_it_is(tmp_path):
    """From the study's first line to its last."""
    write = 1
    while True:
        storage, log = tmp_path / f"{write}.journal", tmp_path / f"{write}.log"
        died = killed_at(write, storage, log)
        finished = search(Logged(str(log)), Running(1, alive_after=1), storage)
        carry_out(finished)
        record = finished.record()
        assert len(record.complete) == 1, write
        assert record.reference_score == cost(ts.arch("efficientnet_b0")).macs / 1e9, write
        ended = Counter(line["key"] for line in lines(log) if line["what"] == "ended")
        assert set(ended) == {key(t.arch) for t in record.complete}, write  # killed between its end and its line, a score is made again
        if not died:
            break
        write += 1
    assert write > 14


def test_three_processes_on_a_grid_do_each_triple_once(tmp_path):
    def run():
        list(
            coefficient_search(lambda arch: 1.0, ts.arch("efficientnet_b0"), grid(), running=Running(100), place=Place(tmp_path / "j", "t")).events()
        )

    processes = [multiprocessing.get_context("fork").Process(target=run) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    record = coefficient_search(lambda arch: 1.0, ts.arch("efficientnet_b0"), grid(), place=Place(tmp_path / "j", "t")).record()
    assert len(record.complete) == len({tuple(t.choices.values()) for t in record.complete}) == 61


def test_a_torn_line_in_the_journal_is_cut_off(tmp_path):
    storage, log = tmp_path / "study.journal", tmp_path / "log"
    carry_out(search(Logged(str(log)), Running(3), storage))
    whole = storage.read_bytes()
    storage.write_bytes(whole + b'{"op_code":4,"worker_id":"x","study')
    record, _ = carry_out(search(Logged(str(log)), Running(6), storage))
    check_whole(record, log, 6)
    assert storage.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in storage.read_bytes().splitlines())


def test_stopped_by_the_caller_trials_are_given_back(tmp_path):
    storage, log = tmp_path / "study.journal", tmp_path / "log"
    first = search(Logged(str(log)), Running(6), storage)
    events = first.events()
    begun = (event for event in events if isinstance(event, Began))
    assert [next(begun).trial.number for _ in range(3)] == [0, 1, 2]
    events.close()
    assert [t.state for t in first.record().trials] == ["complete", "complete", "lost"]
    assert first.record().trials[2].why == "given back: its worker was stopped"
    record, _ = carry_out(search(Logged(str(log)), Running(6), storage, seed=1))
    check_whole(record, log, 6)
    assert key(record.trials[3].arch) == key(record.trials[2].arch)  # taken up before anything new


def test_the_worker_process_dies_but_not_the_search(tmp_path, monkeypatch):
    monkeypatch.setenv("TRISCALE_TEST_MARK", str(tmp_path / "mark"))
    record, events = carry_out(search(killed_once, Running(3, workers=1)))
    assert [t.state for t in record.trials] == ["lost", "complete", "complete", "complete"]
    assert record.trials[0].arch == record.trials[1].arch
    assert [e.text for e in events if isinstance(e, Told)] == ["trial 0: the process that scored it ended by signal SIGKILL"]


def test_a_network_that_kills_every_process_fails_in_the_end():
    record, _ = carry_out(search(deadly, Running(8, workers=1, attempts=2)))
    guilty = {t.number for t in record.trials if t.arch and cost(t.arch).params // 8 % 3 == 0}
    failed = [t for t in record.trials if t.state == "failed"]
    assert guilty
    assert {t.state for t in record.trials if t.number in guilty} <= {"lost", "failed"}
    assert all(t.why == "begun 2 times; the last time the process that scored it ended by signal SIGKILL" and t.arch for t in failed)
    assert len(failed) + len(record.complete) == 8
    assert len([t for t in record.trials if t.state == "lost"]) == 2 * len(failed)


# -- shared


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL server of our own."""
    if binaries() is None:
        reason = "no PostgreSQL here (Debian's package postgresql)"
        print(reason)
        pytest.skip(reason)
    with server() as running:
        yield running


@pytest.mark.parametrize("kind", ["journal", "postgres"])
def test_two_workers_do_each_trial_once(kind, tmp_path, request):
    where = tmp_path / "study.journal" if kind == "journal" else request.getfixturevalue("postgres").database("shared")
    log, start = tmp_path / "log", time.time() + 4
    workers = [worker(where, log, 14, 0.1, start) for _ in range(2)]
    for process in workers:
        assert process.communicate(timeout=90)[0].endswith("done\n")
        assert process.returncode == 0
    record = search(Logged(str(log)), Running(14), where).record()
    ended = [line for line in lines(log) if line["what"] == "ended"]
    share = Counter(line["pid"] for line in ended)
    assert len(record.complete) == len(ended) == 14
    assert Counter(key(t.arch) for t in record.complete) == Counter(line["key"] for line in ended)
    assert set(share) == {p.pid for p in workers}
    assert min(share.values()) >= 4  # both worked
    assert all(t.state == "complete" or t.why in ("more trials than are wanted", "the same as trial 0") for t in record.trials)


def test_a_worker_killed_beside_another_loses_only_its_trial(postgres, tmp_path):
    """The one that is left takes the trial up, also where it can't see the other's process and only its sign stops."""
    log, url = tmp_path / "log", postgres.database("killed")
    dying = worker(url, log, 4, 1.5, alive_after=4)
    deadline = time.time() + 60
    while not lines(log) and time.time() < deadline:
        time.sleep(0.02)
    dying.kill()
    dying.wait()
    left = search(Logged(str(log)), Running(4, alive_after=4), url)
    left._alive.card["machine"] = "another"  # as if the dead one ran elsewhere
    record, events = carry_out(left)
    assert any("its worker has ended" in e.text for e in events if isinstance(e, Told))
    check_whole(record, log, 4)


def test_a_storage_that_stays_away_ends_the_search_soon(postgres):
    url = postgres.database("away")
    storage = open_storage(url, patience=1.0)
    problem = network_search(learning, SPACE, running=Running(3)).problem
    lasting = Search(problem, learning, optuna.samplers.RandomSampler(), Running(50), storage=storage)
    events = lasting.events()
    assert isinstance(next(events), Began)
    postgres.stop()
    began_at = time.monotonic()
    try:
        with pytest.raises(StorageError, match="the study's storage stayed away for 1 s: "):
            list(events)
        assert time.monotonic() - began_at < 30  # giving the trial back isn't waited for
    finally:
        postgres.start()


def test_a_worker_that_is_stopped_and_comes_back(tmp_path):
    """Others take its trial; what it then gives for that isn't used, and it goes on."""
    storage, log = tmp_path / "study.journal", tmp_path / "log"
    slow = worker(storage, log, 3, 0.5, alive_after=1)
    deadline = time.time() + 60
    while not lines(log) and time.time() < deadline:
        time.sleep(0.01)
    slow.send_signal(signal.SIGSTOP)
    record, events = carry_out(search(Logged(str(log)), Running(3, alive_after=1), storage))
    assert any("its worker has ended" in e.text for e in events if isinstance(e, Told))
    slow.send_signal(signal.SIGCONT)
    out, _ = slow.communicate(timeout=30)
    assert "taken from this worker, which had given no sign; its score isn't used" in out
    assert out.endswith("done\n")
    assert len(record.complete) == len(search(Logged(str(log)), Running(3), storage).record().complete) == 3


def test_a_database_that_goes_away_and_comes_back(postgres, tmp_path):
    url, log, told = postgres.database("outage"), tmp_path / "log", []
    with_name = network_search(Logged(str(log), 0.05), SPACE, sampler="random", running=Running(8), place=Place(url, "outage", tell=told.append))
    away = None
    for event in with_name.events():
        if isinstance(event, Ended) and event.trial.number == 2:
            postgres.stop()
            away = threading.Timer(1.5, postgres.start)
            away.start()
    away.join()
    assert told[0].startswith("the study's storage doesn't answer (")
    assert told[-1] == "the study's storage answers again"
    record = with_name.record()
    assert len(record.complete) == 8
    assert Counter(key(t.arch) for t in record.complete) == Counter(line["key"] for line in lines(log) if line["what"] == "ended")


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch):
    """The journal's own writes fail for a while, as on a full disk; what was half written is taken back."""
    storage, log, told = tmp_path / "study.journal", tmp_path / "log", []
    fsync, failing = os.fsync, [3]

    def full(fd):
        if failing[0] and os.readlink(f"/proc/self/fd/{fd}") == str(storage):
            failing[0] -= 1
            raise OSError(28, "No space left on device")
        fsync(fd)

    first = network_search(Logged(str(log)), SPACE, sampler="random", running=Running(5), place=Place(storage, "test", tell=told.append))
    monkeypatch.setattr(os, "fsync", full)
    record, _ = carry_out(first)
    assert told == [
        "the study's storage doesn't answer ([Errno 28] No space left on device); trying again for 600 s",
        "the study's storage answers again",
    ]
    check_whole(record, log, 5)


def test_what_tells_whether_a_worker_lives():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    since = began(child.pid)
    assert since not in ("", "?")
    child.kill()
    deadline = time.time() + 10
    while began(child.pid) and time.time() < deadline:
        time.sleep(0.01)
    assert began(child.pid) == ""  # dead, and not yet waited for
    child.wait()
    assert began(child.pid) == ""
    assert machine() == machine() != ""


# -- scores that fail, and pruning


def test_a_score_that_raises_or_gives_no_number_fails_its_trial_alone():
    record, _ = carry_out(search(faulty, Running(40), seed=4))
    expected = ["RuntimeError: no luck with this one", "the score is nan", "the score is no number: 'much'", "the score gave no value", ""]
    assert len(record.trials) == 40
    for t in record.trials:
        case = cost(t.arch).params // 8 % 5  # the network is kept
        assert (t.state, t.why) == ("complete" if case == 4 else "failed", expected[case])
    assert {cost(t.arch).params // 8 % 5 for t in record.trials} == set(range(5))


def test_a_score_that_hangs_fails_its_trial_alone():
    record, _ = carry_out(search(hanging, Running(8, workers=2, timeout=1.0), seed=1))
    stuck = [t for t in record.trials if cost(t.arch).params // 8 % 3 == 0]
    assert stuck
    assert all((t.state, t.why) == ("failed", "gave no score within 1 s") for t in stuck)
    assert len(record.complete) == 8 - len(stuck)


def test_a_cost_that_cannot_be_told_fails_its_trial_alone():
    def measure(arch):
        if cost(arch).params // 8 % 3 == 0:
            raise OSError("no timer")
        return 0.01

    objective = Objective("latency", 0.02, measure=measure)
    record, _ = carry_out(network_search(lambda arch: 0.5, SPACE, objective, sampler="random", seed=1, running=Running(8)))
    bad = [t for t in record.trials if cost(t.arch).params // 8 % 3 == 0]
    assert bad
    assert all((t.state, t.why) == ("failed", "its cost can't be told: OSError: no timer") for t in bad)
    assert len(record.complete) == 8 - len(bad)


def test_time_that_the_search_takes_is_not_the_scores():
    """Between a value and its answer the clock stands still."""
    processes = Processes(learning, 1, 0.6)
    processes.begin(0, ts.arch("efficientnet_b0"))
    values, last = [], None
    while not isinstance(last, Finished):
        for last in processes.messages(5.0):
            if isinstance(last, Scored):
                values.append(last.value)
                time.sleep(0.4)
                processes.go_on(0)
    processes.close()
    assert values == list(learning(ts.arch("efficientnet_b0")))


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path):
    script = """
import triscale as ts
from search_scores import hanging
from triscale.search import Running, find_network, mnasnet_space
find_network(hanging, mnasnet_space(ts.arch("efficientnet_b0")), running=Running(trials=5, workers=1))
"""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)})
    assert done.returncode == 1
    assert "3 processes ended before they had the score; a script that searches needs: if __name__ == '__main__'" in done.stderr


def test_pruning_goes_by_the_reward_not_by_the_score():
    """All learn alike; what costs more is worth less."""
    flat = lambda arch: iter([0.4, 0.5, 0.6])  # noqa: E731
    objective = Objective("macs", 300e6, (-1.0, -1.0))
    record, _ = carry_out(network_search(flat, SPACE, objective, sampler="random", seed=2, running=Running(30, pruner="median")))
    pruned = [t for t in record.trials if t.state == "pruned"]
    assert pruned  # by the scores, which are all equal, none would be
    assert min(t.cost["macs"] for t in pruned) > min(t.cost["macs"] for t in record.complete)
    assert statistics.mean(t.cost["macs"] for t in pruned) > 1.2 * statistics.mean(t.cost["macs"] for t in record.complete)


def test_a_search_whose_every_trial_fails_is_given_up():
    def broken(arch):
        raise ValueError("no images")

    with pytest.raises(SearchError, match="the first 5 trials all failed; the last: no images"):
        carry_out(search(broken, Running(50)))


@pytest.mark.parametrize(("pruner", "workers"), [("median", 0), ("asha", 0), ("median", 2)])
def test_pruning_stops_what_is_behind(pruner, workers):
    record, events = carry_out(search(learning, Running(24, workers=workers, pruner=pruner), seed=2))
    pruned = [t for t in record.trials if t.state == "pruned"]
    assert pruned
    assert len(pruned) + len(record.complete) == 24
    assert all(1 <= len(t.reported) < 5 and t.why == "below the others at this epoch" for t in pruned)
    assert {e.trial.why for e in events if isinstance(e, Ended)} == {"below the others at this epoch", ""}
    assert all(t.reported == tuple(learning(t.arch)) for t in record.complete)
    assert record.best.score == max(t.score for t in record.complete)
    assert max(p.reported[-1] / len(p.reported) for p in pruned) < record.best.score / 5 + 1e-9  # none that was pruned was ahead
    reported = Counter(e.number for e in events if isinstance(e, Reported))
    assert all(reported[t.number] == len(t.reported) for t in record.trials)


# -- what can't be joined or opened


def test_another_search_is_not_joined(tmp_path):
    storage = tmp_path / "study.journal"
    carry_out(search(Logged(str(tmp_path / "log")), Running(2), storage))
    other = mnasnet_space(ts.arch("mobilenet_v2"))
    with pytest.raises(SearchError, match=r"the study 'test' there is of another search \(differs in: space\)"):
        network_search(learning, other, running=Running(2), place=Place(storage, "test"))
    with pytest.raises(SearchError, match=r"differs in: recipe"):
        network_search(learning, SPACE, running=Running(2), place=Place(storage, "test", (("recipe", {"epochs": 3}),)))
    with pytest.raises(SearchError, match=r"differs in: .*kind"):
        coefficient_search(learning, ts.arch("efficientnet_b0"), grid(), place=Place(storage, "test"))
    network_search(learning, other, running=Running(2), place=Place(storage, "another"))  # beside it in the same place


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("ftp://somewhere/x", "--storage ftp://somewhere/x: expected postgresql://"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"--storage postgresql://me:\*\*\*@127\.0\.0\.1:1/x: .*[Cc]onnection refused"),
        ("redis://127.0.0.1:1", "--storage redis://127.0.0.1:1: "),
        ("/proc/nothing/study.journal", "/proc/nothing/study.journal: "),
    ],
)
def test_storages_that_cannot_be_opened(where, why):
    with pytest.raises(StorageError, match=why) as error:
        open_storage(where)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_journal(tmp_path):
    path = tmp_path / "x.journal"
    path.write_text("no journal\nat all\n")
    with pytest.raises(StorageError, match="no journal of a study"):
        open_storage(path)
    assert path.read_text() == "no journal\nat all\n"


def test_passwords_are_hidden():
    assert hide_password("mysql://a:b@c/d") == "mysql://a:***@c/d"
    assert hide_password("redis://:pw@c") == "redis://:***@c"
    assert hide_password("--storage 'mysql://a:b@b@c/d?e=f@g'") == "--storage 'mysql://a:***@c/d?e=f@g'"
    assert hide_password("postgresql://a@c/d") == "postgresql://a@c/d"


def test_a_score_that_cannot_be_sent():
    with pytest.raises(SearchError, match=r"can't be sent to worker processes.*workers 0"):
        carry_out(search(lambda arch: 1.0, Running(2, workers=1)))


def test_optuna_says_nothing_of_its_own_and_keeps_its_level(capfd):
    before = optuna.logging.get_verbosity()
    carry_out(search(learning, Running(3)))
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_what_has_come_of_a_search_without_scores():
    def broken(arch):
        raise ValueError("no images")

    failing = search(broken, Running(2))
    list(failing.events())
    with pytest.raises(SearchError, match="no trial came to a score; the last failed: no images"):
        result(failing)
