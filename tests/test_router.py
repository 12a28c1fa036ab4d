"""Several servers behind the real router: who is asked, what is lost, and what is left when something dies.

Where only processes and addresses matter the servers are stand-ins (``standin``), which start in a second;
the slow tests at the end have vLLM's.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from helpers.base.files import ROOT
from helpers.base.machine import detect
from helpers.serve import clients, router, settings
from helpers.serve.batches import BatchError, answers, read_rows, run_batch
from helpers.serve.errors import ServerDiedError, ServerError, ServerStartError
from helpers.serve.owned import start_together
from helpers.serve.router import open_router, places
from helpers.serve.server import Server, open_server
from helpers.tools import extras
from tests import standin

SMALL = {"max_model_len": 512, "max_num_seqs": 16, "server_port": 0, "shutdown_timeout": 10}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    extras.ensure("scale")


@pytest.fixture
def quick(monkeypatch, nothing_left):
    """Stand-ins in vLLM's place, none of which may be left; yields what finds those that run."""
    monkeypatch.setattr(Server, "_command_line", Server._command_line)  # is set back afterwards
    standin.in_vllms_place()
    return nothing_left


def opened(tmp_path, **more):
    return open_router(settings.load(None, **SMALL), log_dir=tmp_path, **more)


def workers(router) -> dict[str, bool]:
    """The addresses that a router knows, and whether it holds each for healthy."""
    return {each["url"]: each["is_healthy"] for each in router.get("/workers").json()["workers"]}


# ---- before anything starts


def test_an_unknown_policy_and_too_many_servers_are_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(ServerError, match=r"policy='fair': must be one of round_robin, random"):
        opened(tmp_path, policy="fair")
    with pytest.raises(ServerError, match=r"servers=64 needs 64 .* this machine shows \d+"):
        opened(tmp_path, servers=64)


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(router.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="make scale"):
        opened(tmp_path)


def test_servers_are_dealt_a_share_of_the_cores_or_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6, 7, 9})
    here = replace(detect(), kind="cpu")
    assert places(here, 2) == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setattr(router, "visible_gpus", lambda: [0, 1, 2, 3])
    there = replace(detect(), kind="cuda", count=4)
    assert places(there, 2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert places(there, 2, each=2)[1] == {"CUDA_VISIBLE_DEVICES": "2,3"}
    with pytest.raises(ServerError, match=r"servers=3 needs 6 GPU\(s\); this machine shows 4"):
        places(there, 3, each=2)


# ---- ways of dying: nothing is left of any


def test_a_stop_under_load_drains_router_and_servers_and_loses_nothing(tmp_path, quick):
    with opened(tmp_path) as found:
        assert len(quick()) == 8, "two processes of the router's, three of each server's"
        assert workers(found) == {server.url: True for server in found.servers}
        with clients.crowd(found, clients.long(8, 400), concurrency=8) as crowd:
            crowd.wait_until_running(8)
            found.stop()
            assert clients.count(crowd.outcomes())["answered"] == 8
    assert [one.end.how for one in (found, *found.servers)] == ["stopped"] * 3
    for port in (*(one.args["port"] for one in (found, *found.servers)), found.args["prometheus_port"]):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def test_an_error_in_the_block_ends_all(tmp_path, quick):
    with pytest.raises(ZeroDivisionError), opened(tmp_path) as found:
        _ = 1 / 0
    assert found.end.how == "was killed"


def test_a_killed_router_ends_its_clients_at_once_and_starts_again_before_its_servers(tmp_path, quick):
    with pytest.raises(ServerDiedError, match="router was killed by SIGKILL"), opened(tmp_path) as found:
        before = [server.pid for server in found.servers]
        with clients.crowd(found, clients.numbered(64), concurrency=8, timeout_s=20) as crowd:
            crowd.wait_until_running(8)
            found.crash()
            counted = clients.count(crowd.outcomes())
        assert counted["cut off"] > 0
        assert counted["hung"] == counted["wrong"] == 0
        found.start()
        assert [server.pid for server in found.servers] == before, "they lived on"
        assert clients.crowd(found, clients.numbered(1), 1).outcomes()[0].how == "answered"
        found.crash()


def test_a_killed_server_loses_no_request_and_comes_back(tmp_path, quick):
    with opened(tmp_path) as found:
        found.use("power_of_two")  # the router is another now, and its servers are the same
        segment = Path(f"/dev/shm/psm_{found.servers[0].pid:08x}")
        assert segment.exists()
        with clients.crowd(found, clients.numbered(300), concurrency=16, timeout_s=30) as crowd:
            crowd.wait_until_running(16)
            found.servers[0].crash()
            assert clients.count(crowd.outcomes())["answered"] == 300
        with pytest.raises(ServerDiedError, match="server was killed by SIGKILL"):
            found.servers[0].check()
        found.replace(found.servers[0], drain=False)
        assert not segment.exists()
        assert workers(found) == {server.url: True for server in found.servers}


def test_servers_that_start_together_end_apart_and_fail_together(tmp_path, quick, monkeypatch):
    one, two = (open_server(settings.load(None, **SMALL), log_dir=tmp_path) for _ in range(2))
    start_together(one, two)
    assert one.log_file != two.log_file
    assert one.stop().how == "stopped"
    assert clients.crowd(two, clients.numbered(1), 1).outcomes()[0].how == "answered"
    assert two.stop().how == "stopped"
    line = Server._command_line
    ends = lambda self: [sys.executable, "-c", "raise SystemExit(1)"] if self is two else line(self)  # noqa: E731
    monkeypatch.setattr(Server, "_command_line", ends)
    with pytest.raises(ServerStartError):
        start_together(one, two)
    assert not quick()


class Interrupted(subprocess.Popen):
    """Ctrl+C after the second child was made and before anybody has its number."""

    made = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Interrupted.made += 1
        if Interrupted.made == 2:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_the_second_server_is_made_leaves_neither(tmp_path, quick, monkeypatch):
    found = opened(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.start()
    assert not quick()


@pytest.mark.parametrize(
    ("until", "signum"),
    [("import", 9), ("READY", 9), ("READY", signal.SIGTERM), ("READY", signal.SIGINT)],
)
def test_an_owner_that_ends_takes_all_with_it(tmp_path, nothing_left, until, signum):
    code = (
        "import time\nfrom helpers.serve import settings\nfrom helpers.serve.router import open_router\n"
        "from tests import standin\nstandin.in_vllms_place()\n"
        f"found = open_router(settings.load(None, **{SMALL!r}), log_dir={str(tmp_path)!r})\n"
        "print('import', flush=True)\nfound.start()\nprint('READY', flush=True)\ntime.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while until not in owner.stdout.readline():
        assert owner.poll() is None
    time.sleep(0.4 if until == "import" else 0)
    assert len(nothing_left()) == 8 or until == "import"
    assert nothing_left()
    owner.send_signal(signum)
    owner.wait(30)
    owner.stdout.close()


# ---- changing it


def test_a_server_replaced_under_load_loses_nothing_and_the_new_one_is_asked(tmp_path, quick):
    with opened(tmp_path) as found:
        old, kept = found.servers
        with clients.crowd(found, clients.numbered(2000), concurrency=8) as crowd:
            crowd.wait_until_running(8)
            new = found.replace(old, max_num_seqs=8)
            crowd.stop_asking()
            outcomes = crowd.outcomes()
        outcomes += clients.crowd(found, clients.numbered(16), concurrency=8).outcomes()
        assert len(outcomes) > 32, "there was hardly a load"
        assert {outcome.how for outcome in outcomes} == {"answered"}
        assert found.servers == [kept, new]
        assert new.environment == old.environment, "its cores or its GPU are the old one's"
        assert new.args["max_num_seqs"] == 8
        assert set(workers(found)) == {kept.url, new.url}
        assert old.end.how == "stopped"


def test_whoever_reaches_the_routers_port_may_change_it(tmp_path, quick):
    """Why it listens on this machine only, and why a proxy passes on /v1 alone: each row of the page."""
    page = (ROOT / "notebooks/deploy/SECURITY.md").read_text().partition("<!-- router -->")[2]
    listed = re.findall(r"`(GET|POST|DELETE) (/\S*)`", page.partition("<!-- end -->")[0])
    assert len(listed) > 8
    with opened(tmp_path) as found, httpx.Client(base_url=found.url, trust_env=False, timeout=30) as anybody:
        last = found.servers[1].url
        for method, path in listed:
            given = {"params": {"url": last}} if path.endswith("_worker") else {}
            given |= {"json": {"url": last}} if method == "POST" else {}
            path = path.replace("{url}", urllib.parse.quote(last, safe=""))
            reply = anybody.request(method, path, **given)
            assert reply.status_code not in (401, 403, 404, 405), (method, path, reply.text)
        assert anybody.post("/remove_worker", params={"url": last}).status_code == 200
        assert list(workers(found)) == [found.servers[0].url]
        listens = {
            c.laddr.ip for p in found.processes() for c in p.net_connections("tcp") if c.status == "LISTEN"
        }
        assert listens == {"127.0.0.1"}


def test_no_key_is_in_a_command_line_or_a_log(tmp_path, quick):
    with opened(tmp_path) as found:
        key = found.settings.api_key
        clients.crowd(found, clients.numbered(2), 1).outcomes()
        lines = [" ".join(process.cmdline()) for process in quick()]
        assert not any(key in line for line in lines)
        assert not any(key in path.read_text() for path in tmp_path.iterdir())


def test_every_metric_of_the_routers_alerts_exists(tmp_path, quick):
    """Those of retries come with the first request that no server answered: both are gone."""
    rules = yaml.safe_load((ROOT / "notebooks/deploy/alerts.scale.yml").read_text())["groups"][0]["rules"]
    named = {name for rule in rules for name in re.findall(r"vllm_router_\w+", rule["expr"])}
    found = opened(tmp_path)
    found.args["retry_max_retries"] = 2
    with found:
        clients.crowd(found, clients.numbered(4), 1).outcomes()
        for server in found.servers:
            server.crash()
        (outcome,) = clients.crowd(found, clients.numbered(1), 1).outcomes()
        assert outcome.how == "refused"
        page = httpx.get(f"http://127.0.0.1:{found.args['prometheus_port']}/metrics", trust_env=False).text
    assert named
    assert named <= set(re.findall(r"^(vllm_router_\w+)[ {]", page, re.M))


# ---- a batch


def row(number: int, **body) -> dict:
    choice = [f"{number} is even", f"{number} is odd"]
    body = {"messages": [], "structured_outputs": {"choice": choice}} | body
    return {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (row(1) | {"custom_id": 7}, "line 2: custom_id: Input should be a valid string"),
        (row(1) | {"url": "/v1/images"}, "line 2: url: Input should be '/v1/chat/completions' or"),
        (row(1, stream=True), "line 2: body: a stream"),
        (row(0), "line 2: custom_id: 'row-0' is that of line 1, too"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_asked(tmp_path, line, said):
    with pytest.raises(BatchError, match=said):
        read_rows(written(tmp_path / "in.jsonl", [row(0), line]))


@pytest.mark.slow
def test_every_row_is_answered_once_though_a_server_is_killed_and_the_batch_too(tmp_path, quick):
    source, out = written(tmp_path / "in.jsonl", map(row, range(400))), tmp_path / "out.jsonl"
    with opened(tmp_path / "logs") as found:
        command = [sys.executable, "-m", "helpers.serve.batches", source, str(out), "--url", found.url]
        environment = os.environ | {"VLLM_API_KEY": found.settings.api_key}
        begun = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while not out.exists() or len(out.read_text().splitlines()) < 64:
            assert begun.poll() is None
            time.sleep(0.05)
        rays = psutil.Process(begun.pid).children(recursive=True)
        begun.kill()
        begun.wait()
        with out.open("a") as file:
            file.write('{"custom_id": "row-1", "resp')  # as a kill may leave it
        before = len(answers(out))
        assert 64 <= before < 400
        assert not psutil.wait_procs(rays, timeout=20)[1], "Ray ends with its owner"
        found.servers[0].crash()
        summary = run_batch(source, out, found.url, found.settings.api_key)
    assert (summary.rows, summary.answered, summary.before, summary.failed) == (400, 400, before, 0)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"row-{number}" for number in range(400))
    for line in lines:
        content = line["response"]["body"]["choices"][0]["message"]["content"]
        assert line["custom_id"] == f"row-{content.split()[0]}", "each row has its own answer"


# ---- with vLLM


@pytest.mark.slow
def test_a_killed_servers_streams_are_told_from_whole_ones_and_a_quantized_version_takes_over(tmp_path):
    with opened(tmp_path) as real:
        stories = clients.streamed(clients.long(8, 200))
        with clients.crowd(real, stories, concurrency=8, timeout_s=60) as crowd:
            crowd.wait_until_running(8)
            crowd.wait_until_writing()
            real.servers[0].crash()
            found = clients.count(crowd.outcomes())
        assert found["cut off"] == found["answered"] == 4, found
        dead, other = real.servers
        real.replace(dead, drain=False, kv_cache_dtype="fp8")
        with clients.crowd(real, clients.numbered(2000), concurrency=8, timeout_s=120) as crowd:
            crowd.wait_until_running(8)
            real.replace(other, kv_cache_dtype="fp8")
            crowd.stop_asking()
            outcomes = crowd.outcomes()
        assert len(outcomes) > 50, "there was hardly a load"
        assert {outcome.how for outcome in outcomes} == {"answered"}
        assert all(server.args["kv_cache_dtype"] == "fp8" for server in real.servers)
