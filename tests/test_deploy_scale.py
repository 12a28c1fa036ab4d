"""What a deployer of several servers copies: valid, in agreement with the files for one and with itself."""

import os
import re
import stat
import subprocess

import yaml

from helpers.serve.router import SOONER
from helpers.tools import environment, extras
from tests.test_deploy import FOLDER, PINNED, commented, compose, manifest, seconds

SERVERS = ("vllm-0", "vllm-1")


def scaled() -> dict:
    return yaml.safe_load((FOLDER / "compose.scale.yaml").read_text())


def scaler() -> dict:
    return yaml.safe_load((FOLDER / "kubernetes.scale.yaml").read_text())


def test_each_server_is_the_single_one_with_a_gpu_of_its_own():
    single, services = compose()["services"]["vllm"], scaled()["services"]
    gpus = []
    for name in SERVERS:
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        gpus.append(device["device_ids"])
        assert services[name] | {"deploy": 0} == single | {"deploy": 0}
    assert gpus == [["0"], ["1"]]


def test_only_the_proxy_reaches_the_router_and_stops_before_it():
    services = scaled()["services"]
    assert "ports" not in services["router"]
    assert services["proxy"] | {"depends_on": 0} == compose()["services"]["proxy"] | {"depends_on": 0}
    assert set(services["proxy"]["depends_on"]) == {"router"}
    assert set(services["router"]["depends_on"]) == set(SERVERS)
    assert services["router"]["networks"]["default"]["aliases"] == ["vllm"]
    assert "server vllm:8000 resolve" in (FOLDER / "upstream.conf").read_text()
    router, server = (seconds(services[name]["stop_grace_period"]) for name in ("router", "vllm-0"))
    assert router >= server
    for name in ("router", "proxy", "prometheus", *SERVERS):
        assert services[name]["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in services[name].get("ports", ()))


def test_images_and_packages_are_pinned():
    for service in scaled()["services"].values():
        assert PINNED.fullmatch(service["image"]), service["image"]
    lines = scaled()["services"]["router"]["build"]["dockerfile_inline"].splitlines()
    assert PINNED.fullmatch(lines[0].removeprefix("FROM "))
    (version,) = re.findall(r"vllm-router==(\S+)", "\n".join(lines))
    lock = environment.lock_of("scale").read_text()
    assert f"\nvllm-router=={version} " in lock, "the version that the tests run"


def test_the_router_understands_its_arguments_and_knows_every_server():
    extras.ensure("scale")
    from vllm_router.launch_router import parse_router_args

    program, *words = scaled()["services"]["router"]["command"]
    found = parse_router_args(words)
    assert program == "vllm-router"
    assert found.worker_urls == [f"http://{name}:8000" for name in SERVERS]
    for name in ("health_check_interval_secs", "cb_timeout_duration_secs"):
        assert getattr(found, name) == SOONER[name]
    jobs = yaml.safe_load((FOLDER / "prometheus.scale.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets["vllm"] == [f"{name}:8000" for name in SERVERS]
    assert targets["router"] == [f"router:{found.prometheus_port}"]


def test_a_roll_out_takes_one_server_after_the_other_out_first(tmp_path):
    said = tmp_path / "said"
    fake = tmp_path / "compose"
    fake.write_text(f'#!/bin/sh\necho "$@" | tr "\\n" " " >> {said}\necho >> {said}\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": os.environ["PATH"], "COMPOSE": str(fake)}
    subprocess.run(["/bin/sh", FOLDER / "roll.sh"], env=environment, check=True, capture_output=True)
    steps = []
    for line in said.read_text().splitlines():
        asked = re.search(r"8000/(\w+)\?url=http://(\S+):8000", line)
        steps.append(asked.groups() if asked else ("replaced", line.split()[-1]))
    wanted = [(what, name) for name in SERVERS for what in ("remove_worker", "replaced", "add_worker")]
    assert steps == wanted


def test_autoscaling_asks_for_what_vllm_offers_and_takes_its_time():
    spec = scaler()["spec"]
    assert spec["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    assert spec["minReplicas"] >= 2
    (keda,) = commented("apiVersion: keda.sh", (FOLDER / "kubernetes.scale.yaml").read_text())
    assert "vllm:num_requests_waiting" in keda["spec"]["triggers"][0]["metadata"]["query"]
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    patience = spec["behavior"]["scaleUp"]["policies"][0]["periodSeconds"]
    assert patience >= 120, "a server takes minutes to come: the queue must not ask for another meanwhile"
