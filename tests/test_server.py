"""The real server: what it answers, what it refuses, how it ends, and what is left of it then."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest

from helpers.base import records
from helpers.base.machine import detect
from helpers.faults import explain
from helpers.model.model import TITLE
from helpers.serve import clients, doors, load, probe, settings
from helpers.serve.clients import HOWS, Watch
from helpers.serve.command import TEARDOWN_S
from helpers.serve.errors import ServerDiedError, ServerError, ServerStartError
from helpers.serve.load import FIELDS, SHORTEST_S, Generator, Level, LoadError, Objective
from helpers.serve.owned import start_together
from helpers.serve.router import places
from helpers.serve.server import open_server
from helpers.serve.settings import Settings
from tests.conftest import named
from tests.nginx import Upstream, nginx, said, writings

DEPLOY = Path(__file__).resolve().parent.parent / "notebooks/deploy"
SMALL = {"max_model_len": 512, "max_num_seqs": 16, "server_port": 0}


def small(**more) -> Settings:
    return settings.load(None, **(SMALL | more))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for the tests of this file; the last of them stop it under load."""
    folder = tmp_path_factory.mktemp("logs")
    few = small(max_answer_tokens=128, max_num_seqs=8)  # which few clients fill
    with open_server(few, log_dir=folder, disable_fastapi_docs=False) as server:
        yield server


# ---- before anything starts


def test_a_taken_port_is_refused_at_once_and_names_who_has_it(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(ServerStartError) as caught:
            open_server(small(server_port=port), log_dir=tmp_path).start()
    assert time.monotonic() - begun < 2
    named(caught.value, "port-taken")
    assert f"port {port}: Address already in use" in str(caught.value)
    assert f"({os.getpid()}) listens there" in str(caught.value)


def test_a_start_that_takes_too_long_says_so_and_leaves_nothing(tmp_path, nothing_left):
    with pytest.raises(ServerStartError, match="not ready within START_TIMEOUT=1 s"):
        open_server(small(start_timeout=1), log_dir=tmp_path).start()


def test_no_request_goes_through_a_proxy(tmp_path, monkeypatch):
    """The server is on this machine; the proxy would be told the key, and could not reach it."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    server = open_server(small(), log_dir=tmp_path)
    with Upstream() as listener:
        choice = {"message": {"content": "Paris"}, "finish_reason": "stop"}
        listener.says = json.dumps({"paths": {}, "data": [{"id": "m"}], "choices": [choice]})
        server.args["port"] = listener.server_port
        assert server._healthy()
        server.client().completions.create(model=server.name, prompt="Hello", max_tokens=1)
        with clients.crowd(server, [clients.Request({}, lambda reply: True)], 1) as crowd:
            assert [outcome.how for outcome in crowd.outcomes()] == ["answered"]
        with Watch(server, every_s=0.05) as watch:
            time.sleep(0.5)
        assert watch.said("health") == watch.said("tokens") == "200"
        assert {refusal.status for refusal in doors.refusals(server)} == {200}
        assert all(door.with_key == door.without_key == 200 for door in doors.open_doors(server))
        assert doors.generates_without_key(server) == "Paris"
        assert probe.alive(server.url, 5) == "a token came through"


# ---- the running server


def test_the_access_log_leaves_health_checks_out(server):
    for path in ("/health", "/metrics", "/v1/models"):
        assert server.get(path).status_code == 200
    logged = re.findall(r'"GET (\S+) HTTP', server.log_text)
    assert "/v1/models" in logged
    assert not {"/health", "/metrics"} & set(logged)


def test_the_key_is_in_no_command_line_and_in_no_log(server):
    key = server.settings.api_key
    lines = [" ".join(process.cmdline()) for process in server.processes()]
    assert len(lines) >= 3
    assert not any(key in line for line in lines)
    assert key not in server.log_text
    assert key not in server.command
    assert "--enable-prefix-caching" not in server.command
    start = f"VLLM_CPU_KVCACHE_SPACE=1 vllm serve /path/to/{TITLE} "
    assert start in server.command, "its folder differs by machine"
    assert str(server.checkpoint.folder) not in server.command


def test_it_listens_on_this_machine_only(server):
    addresses = {
        found.laddr.ip
        for process in server.processes()
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == server.args["port"]
    }
    assert addresses == {"127.0.0.1"}


def test_every_request_of_many_clients_is_answered_and_right(server):
    with clients.crowd(server, clients.numbered(64), concurrency=16) as crowd:
        outcomes = crowd.outcomes()
    assert clients.count(outcomes) == dict.fromkeys(HOWS, 0) | {"answered": 64}
    numbers = [int(outcome.text.split()[0]) for outcome in outcomes]
    assert numbers == list(range(64)), "each client got the answer to its own question"


def test_anothers_answer_and_half_an_answer_are_none():
    """The status of either is 200: only ``finish_reason`` says that the server gave one up."""
    asked = clients.numbered(2)[1]
    assert not asked.holds({"choices": [{"message": {"content": "0 is even"}}]})
    assert asked.holds({"choices": [{"message": {"content": "1 is odd"}}]})
    [request] = clients.long(1, 30)

    def reply(tokens, reason):
        choice = {"message": {"content": "The story of"}, "finish_reason": reason}
        return {"choices": [choice], "usage": {"completion_tokens": tokens}}

    assert clients.judged(request, reply(30, "length")) == "answered"
    assert clients.judged(request, reply(12, "length")) == "wrong"
    assert clients.judged(request, reply(12, "abort")) == "aborted"
    assert clients.judged(request, reply(30, "abort")) == "aborted"


def test_bad_requests_are_refused_with_a_reason_and_the_next_good_one_is_answered(server):
    found = {bad.what: bad for bad in doors.refusals(server)}
    assert {what: bad.status for what, bad in found.items()} == {
        "no key": 401,
        "wrong key": 401,
        "unknown model": 404,
        "prompt longer than the context": 400,
        "malformed JSON": 400,
        "max_tokens of -1": 400,
        "a body of 10 MB": 400,
    }
    assert "gpt-none" in found["unknown model"].text
    assert "512" in found["prompt longer than the context"].text
    assert "max_tokens" in found["max_tokens of -1"].text
    function = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    asked = {"model": server.name, "messages": [{"role": "user", "content": "Rain?"}], "tools": [function]}
    reply = httpx.post(
        f"{server.url}/v1/chat/completions", json=asked, headers=server.headers, trust_env=False
    )
    assert (reply.status_code, explain.explain(log=reply.text).name) == (400, "tools-without-parser")
    with clients.crowd(server, clients.numbered(1), concurrency=1) as crowd:
        assert crowd.outcomes()[0].how == "answered"


def test_the_security_page_names_exactly_the_routes_that_are_open(server):
    found = doors.open_doors(server)
    page = (DEPLOY / "SECURITY.md").read_text().partition("<!-- open -->")[2].partition("<!-- end -->")[0]
    listed = set(re.findall(r"`(GET|POST) (/\S*)`", page))
    assert listed == {(door.method, door.path) for door in found if door.open}
    assert all(door.with_key != 401 for door in found)
    assert not any(door.open for door in found if door.path.startswith("/v1/"))
    assert "Paris" in doors.generates_without_key(server)


def test_behind_the_proxy_nothing_but_v1_answers_and_that_not_without_the_key(server, tmp_path):
    """Every route that the server lists, in every way of writing it."""
    routes = {re.sub("[{}]", "", path) for _, path in doors.routes(server)} - {"/health"}
    with nginx(tmp_path, server.args["port"], **{"rate=20r/s": "rate=10000r/s"}) as port:
        for route, path in [(each, path) for each in routes for path in writings(each)]:
            inside = route.startswith("/v1/") or "/v1/" in path or "/v1%" in path.lower()
            for method, body in (("GET", None), ("POST", "{}")):
                status, _, text = said(port, method, path, body)
                assert status in (400, 401, 403, 404), (method, path, text)
                if not inside:  # with the key it may be a route of the API
                    status, _, text = said(port, method, path, body, **server.headers)
                    assert status in (400, 403, 404), (method, path, text)
        key = {"x_api_key": server.settings.api_key, "Content_Type": "application/json"}
        body = {"model": server.name, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        assert said(port, "POST", "/v1/messages", json.dumps(body), **key)[0] == 200
        assert said(port, "GET", "/health")[0] == 200
    bypassed = said(server.args["port"], "GET", "/metrics/../v1/x")
    assert "vllm:num_requests_running" in bypassed[2], "this is why the proxy passes on what it matched"


def test_models_are_listed_through_the_proxy(server, tmp_path):
    with nginx(tmp_path, server.args["port"]) as port:
        client = server.client().with_options(base_url=f"http://127.0.0.1:{port}/v1")
        assert [model.id for model in client.models.list()] == [TITLE]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_no_answer_is_longer_than_the_cap_whatever_is_asked_for(server):
    story, more = [{"role": "user", "content": "Tell a story."}], {"ignore_eos": True}
    reply = server.client().chat.completions.create(
        model=server.name, messages=story, extra_body=more, max_tokens=200
    )
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (128, "length")


def test_a_full_server_refuses_at_once_and_one_request_cannot_fill_it(server):
    # Answers so long that none ends before the last request comes, on a busy machine, too.
    with clients.crowd(server, clients.long(20, 64), concurrency=20) as crowd:
        outcomes = crowd.outcomes()
    found = clients.count(outcomes)
    assert (found["answered"], found["refused"]) == (16, 4), found
    refused = [outcome for outcome in outcomes if outcome.how == "refused"]
    assert {outcome.status for outcome in refused} == {503}
    answered = [outcome.seconds for outcome in outcomes if outcome.how == "answered"]
    assert max(outcome.seconds for outcome in refused) < min(answered)
    with clients.crowd(server, clients.streamed(clients.long(20, 64)), concurrency=20) as crowd:
        outcomes = crowd.outcomes()
    found = {(outcome.how, outcome.status) for outcome in outcomes if outcome.how != "answered"}
    assert clients.count(outcomes)["answered"] == 16
    assert found <= {("refused", 503), ("cut off", 200)}, "a stream may have begun before it is refused"
    greedy = {"model": server.name, "prompt": "Hi", "n": 5, "max_tokens": 1}
    reply = httpx.post(server.url + "/v1/completions", json=greedy, headers=server.headers, trust_env=False)
    assert (reply.status_code, "at most 4" in clients.message(reply)) == (400, True), reply.text


def test_every_metric_that_is_watched_exists(server):
    clients.crowd(server, clients.numbered(1), concurrency=1).outcomes()
    text = server.get("/metrics").text
    files = "".join((DEPLOY / name).read_text() for name in ("alerts.yml", "grafana.json"))
    named = set(re.findall(r"\b(?:vllm:\w+|http_\w+_total)\b(?![:\w])", files))
    assert len(named) > 10
    assert {name for name in named if f"\n{name}{{" not in text} == set()
    for metric, bound in re.findall(r'(vllm:\w+_bucket)\{le="([\d.]+)"', files):
        assert re.search(rf'^{metric}\{{.*le="{bound}"', text, re.M), (metric, bound)


def test_vllms_own_benchmark_measures_closed_and_open_loops_in_one_process(server, tmp_path):
    objective = Objective(ttft_ms=60_000, tpot_ms=60_000)
    sizes = {"input_tokens": 16, "output_tokens": 4, "seconds": 2.0}
    with Generator(tmp_path) as generator:
        levels = generator.bench(server, concurrencies=[1, 4], shares=[0.5], objective=objective, **sizes)
        with pytest.raises(LoadError, match=r"vllm bench serve failed(.|\n)*Full log: "):
            generator.bench(server, concurrencies=[1], shares=[], objective=Objective(-1, -1))
    assert [(level.concurrency, level.share) for level in levels] == [(1, None), (4, None), (None, 0.5)]
    assert all(level.failed == 0 and level.completed >= 4 for level in levels)
    assert all(level.kept == pytest.approx(1.0) for level in levels)
    best = max(level.requests_per_s for level in load.closed(levels))
    assert levels[2].rate == pytest.approx(0.5 * best)
    assert load.highest_kept(levels) == levels[2]
    path = records.append(tmp_path / "serving.jsonl", load.rows(server, levels, "here"), fields=FIELDS)
    assert [row["concurrency"] for row in records.read(path, FIELDS)[0]] == [1, 4, None]
    assert server.settings.api_key not in path.read_text()
    assert server.settings.api_key not in next(tmp_path.glob("*.log")).read_text()


@pytest.mark.parametrize(
    ("closed", "opened", "sustained", "kept"),
    [  # as measured on an H200: requests/s answered; and offered, answered, share in time
        (
            [29.86, 71.57, 221.05],
            [(110.52, 109.89, 1.0), (176.84, 139.85, 0.94), (331.57, 143.43, 0.21)],
            143.43,
            110.52,
        ),
        ([10.0, 12.0], [(6.0, 5.9, 1.0), (11.0, 10.8, 1.0)], 12.0, 11.0),  # nobody asked for too much
        ([10.0, 12.0], [(13.0, 9.0, 1.0), (24.0, 8.0, 0.2)], 8.0, None),  # too much at every rate
    ],
)
def test_a_rate_that_is_only_sustained_until_the_test_ends_is_not_one_to_plan_with(
    closed, opened, sustained, kept
):
    nothing = dict.fromkeys(Level.__annotations__, 0.0) | {"completed": 10}
    levels = [Level(**nothing | {"share": None, "requests_per_s": rate}) for rate in closed]
    for rate, answered, in_time in opened:
        figures = {"share": 1.0, "rate": rate, "requests_per_s": answered, "goodput": in_time * answered}
        levels.append(Level(**nothing | figures))
    assert load.sustained(levels) == sustained
    best = load.highest_kept(levels)
    assert (best and best.rate) == kept


def test_a_level_that_is_over_at_once_is_repeated_for_longer():
    asked = []

    def run(max_concurrency, num_prompts):
        asked.append(num_prompts)
        return {"duration": num_prompts / 100, "request_throughput": 100.0}

    assert load._long_enough(run, 4, 8)["duration"] == 2 * SHORTEST_S
    assert asked == [8, 200]
    failed = {"duration": 0.1, "request_throughput": 0.0}
    assert load._long_enough(lambda **_: failed, 4, 8) == failed, "and not for ever"


def test_a_crowd_that_was_too_quick_is_told_so_at_once(server):
    with clients.crowd(server, clients.long(2, 1), concurrency=2) as crowd:
        crowd.outcomes()
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match=r"2 of 2 requests had ended .* longer answers"):
            crowd.wait_until_running(2)
        with pytest.raises(TimeoutError, match="before a token of theirs was seen"):
            crowd.wait_until_writing()
    assert time.monotonic() - begun < 10


# ---- its end: these come last, they stop the shared server


def test_a_stop_under_load_loses_nothing(server):
    # Answers long enough that all are still being written when it is stopped, on a fast machine, too.
    with clients.crowd(server, clients.long(8, 128), concurrency=8) as crowd:
        crowd.wait_until_running(8)
        crowd.wait_until_writing()
        processes = server.processes()
        with Watch(server) as watch:
            end = server.stop()
        outcomes = crowd.outcomes()
    assert clients.count(outcomes)["answered"] == 8, outcomes
    assert (end.how, end.exit_code) == ("stopped", 0)
    # Once its engine has ended, a server may say 503 for as long as its port is still open.
    assert watch.health[0] == 200
    assert watch.said("health") in ("200", "200, 503")
    assert "500" in watch.said("tokens")
    assert not psutil.wait_procs(processes, timeout=15)[1]


def test_a_stopped_server_says_so_its_port_is_free_and_a_refused_start_changes_nothing(server):
    server.stop()  # once more is nothing more, and the test above may not have come so far
    with pytest.raises(ServerError, match="is stopped"):
        server.check()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", server.args["port"]))
        taken.listen()
        with pytest.raises(ServerStartError, match="cannot listen"):
            server.start()
    assert server.end.how == "stopped"


# ---- ends that need a server of their own


@pytest.mark.slow
def test_a_killed_server_cuts_its_clients_off_and_starts_again_on_its_port(tmp_path, nothing_left):
    server = open_server(small(), log_dir=tmp_path).start()
    first = server.start_s
    with clients.crowd(server, clients.long(16, 200), concurrency=16, timeout_s=60) as crowd:
        crowd.wait_until_running(16)
        server.crash()
        outcomes = crowd.outcomes()
    found = clients.count(outcomes)
    assert found["cut off"] == 16, found
    assert max(outcome.seconds for outcome in outcomes) < 30
    with pytest.raises(ServerDiedError, match="killed by SIGKILL") as caught:
        server.check()
    named(caught.value, "killed")
    assert not nothing_left()
    with open_server(small(server_port=server.args["port"]), log_dir=tmp_path) as again:
        assert clients.crowd(again, clients.numbered(1), 1).outcomes()[0].how == "answered"
    assert again.start_s < 3 * first


@pytest.mark.slow
def test_an_engine_that_gets_a_last_word_in_sends_what_was_written_so_far(tmp_path, nothing_left):
    """What a GPU's engine does when its server stops without a drain; here it alone is told to end."""
    server = open_server(small(shutdown_timeout=0), log_dir=tmp_path).start()
    with clients.crowd(server, clients.long(8, 300), concurrency=8, timeout_s=30) as crowd:
        crowd.wait_until_running(8)
        crowd.wait_until_writing()
        [core] = [process for process in server.processes() if process.name() == "VLLM::EngineCore"]
        core.terminate()
        outcomes = crowd.outcomes()
    assert clients.count(outcomes)["aborted"] == 8, outcomes
    assert all(outcome.status == 200 for outcome in outcomes)
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [0, 1])
def test_the_drain_is_a_deadline_and_cuts_what_takes_longer(tmp_path, timeout, nothing_left):
    """Answers of many seconds, no drain or one second: what clients hear is a race inside the server."""
    server = open_server(small(shutdown_timeout=timeout), log_dir=tmp_path).start()
    tokens = 480  # the context is 512
    with clients.crowd(server, clients.long(4, tokens), concurrency=4, timeout_s=10) as crowd:
        crowd.wait_until_running(4)
        end = server.stop()
        found = clients.count(crowd.outcomes())
    assert found["answered"] == found["wrong"] == 0, found
    assert found["hung"] + found["refused"] + found["aborted"] + found["cut off"] == 4, found
    assert timeout <= end.seconds < timeout + 2 * TEARDOWN_S


def behind(server, port: int) -> SimpleNamespace:
    """A server as clients see it that come through a proxy."""
    url = f"http://127.0.0.1:{port}"
    return SimpleNamespace(name=server.name, headers=server.headers, metrics=server.metrics, url=url)


@pytest.mark.slow
def test_behind_the_proxy_faults_cost_only_what_they_must(tmp_path, monkeypatch):
    """A hang-up, a reader who does not read, a reload, an engine that is stopped and one that is killed."""
    server = open_server(small(max_num_seqs=8), log_dir=tmp_path).start()
    monkeypatch.setenv("VLLM_API_KEY", server.settings.api_key)
    story = {"model": server.name, "prompt": "Once", "max_tokens": 400, "stream": True}
    story["ignore_eos"] = True
    with nginx(tmp_path / "nginx", server.args["port"]) as port:
        proxied = behind(server, port)
        asked = {"json": story, "headers": server.headers, "timeout": 60}
        with httpx.Client(base_url=proxied.url, trust_env=False) as http:
            with http.stream("POST", "/v1/completions", **asked) as hung_up:
                next(hung_up.iter_lines())
            begun = time.monotonic()
            while clients.in_flight(server):
                assert time.monotonic() - begun < 2, "nobody reads it: the engine stops writing"
            with http.stream("POST", "/v1/completions", **asked) as unread:
                next(unread.iter_raw())
                with clients.crowd(proxied, clients.numbered(24), concurrency=6) as crowd:
                    time.sleep(0.5)
                    os.kill(int((tmp_path / "nginx/nginx.pid").read_text()), signal.SIGHUP)
                    assert clients.count(crowd.outcomes())["answered"] == 24
        [core] = [process for process in server.processes() if process.name() == "VLLM::EngineCore"]
        core.suspend()
        assert server.get("/health").status_code == 200, "this is why the probe asks for a token"
        with pytest.raises(OSError, match="no token was written within 3 s"):
            probe.alive(server.url, 3)
        core.resume()
        assert "token came through" in probe.alive(server.url, 20)
        with clients.crowd(proxied, clients.long(4, 400), concurrency=4, timeout_s=30) as crowd:
            crowd.wait_until_writing()
            with httpx.stream("POST", f"{proxied.url}/v1/completions", **asked, trust_env=False) as cut:
                lines = cut.iter_lines()
                next(lines)
                core.kill()
                last = [line for line in lines if line]
            outcomes = crowd.outcomes()
    assert {(outcome.how, outcome.status) for outcome in outcomes} <= {("refused", 500), ("refused", 502)}
    assert cut.status_code == 200
    assert "error" in last[-2], "this is how a client tells a cut stream from a finished one"
    assert last[-1] == "data: [DONE]"
    server.kill()


@pytest.mark.slow
def test_two_servers_restarted_in_turn_behind_the_proxy_refuse_nobody(tmp_path):
    """A rolling SIGTERM while requests come, with the shipped nginx.conf: the other server answers."""
    key = "k" * settings.LEAST_KEY
    own = places(detect(), 2)
    servers = [open_server(small(vllm_api_key=key), log_dir=tmp_path, environment=place) for place in own]
    try:
        start_together(*servers)
        with nginx(tmp_path / "nginx", *(server.args["port"] for server in servers)) as port:
            proxied = behind(servers[0], port)
            with clients.crowd(proxied, clients.numbered(10_000), 4, timeout_s=120, every_s=0.5) as crowd:
                time.sleep(5)
                for server in servers:
                    assert server.stop().how == "stopped"
                    server.start()
                crowd.stop_asking()
                found = clients.count(crowd.outcomes())
    finally:
        for server in servers:
            server.kill()
    print(found)
    assert found["answered"] == sum(found.values()) >= 40, found


@pytest.mark.slow
def test_started_by_the_script_alone_nothing_outlives_what_answers(tmp_path, monkeypatch, nothing_left):
    """Its API process is killed: the engine and its memory go with it, without an owner that is Python."""
    server = open_server(small())  # its arguments; it is not started
    variables = {"MODEL_NAME": str(server.checkpoint.folder), "VLLM_API_KEY": server.settings.api_key}
    variables |= {"SERVER_PORT": str(server.args["port"]), "MAX_MODEL_LEN": "512", "MAX_NUM_SEQS": "16"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHON", sys.executable)
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen(["sh", str(DEPLOY / "serve.sh")], stdout=log, stderr=log)
    try:
        stop = time.monotonic() + 300
        while "token" not in _alive(server.url):
            left = (tmp_path / "log").read_text()[-2000:]
            assert launched.poll() is None, left
            assert time.monotonic() < stop, left
            time.sleep(0.5)
        [api] = psutil.Process(launched.pid).children()
        assert len(nothing_left()) >= 3
        api.kill()
        assert launched.wait(15) == 128 + signal.SIGKILL
    finally:
        launched.kill()


def _alive(url: str) -> str:
    with contextlib.suppress(OSError):
        return probe.alive(url, 5)
    return ""


@pytest.mark.slow
def test_a_start_that_fails_is_diagnosed_from_the_log(tmp_path):
    said = r"Cause: .*greater than the derived(.|\n)*Full log: "
    with pytest.raises(ServerStartError, match=said) as caught:
        open_server(small(max_model_len=10**6), log_dir=tmp_path).start()
    named(caught.value, "context-too-long")
    assert "max_model_len=8192 or less" in str(caught.value)


@pytest.mark.slow
def test_an_interrupted_cell_ends_the_server(tmp_path, nothing_left):
    from tests.test_interrupt import Kernel

    kernel = Kernel()
    try:
        said, error = kernel.run(
            "import time\nfrom helpers.serve import settings\n"
            "from helpers.serve.server import open_server\n"
            f"server = open_server(settings.load(None, **{SMALL!r}), log_dir={str(tmp_path)!r}).start()"
        )
        assert not error, said
        assert len(nothing_left()) >= 3
        _, error = kernel.run("print('GO', flush=True)\ntime.sleep(60)", interrupt_when="GO", after_s=0.5)
        assert error == "KeyboardInterrupt"
        psutil.wait_procs(nothing_left(), timeout=15)
        assert not nothing_left(), "and not only when the kernel ends"
    finally:
        kernel.close()
