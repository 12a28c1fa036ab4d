"""What a deployer of several servers copies: valid, in agreement with the files for one and with itself."""

import json
import os
import re
import stat
import subprocess

import jsonschema
import yaml

from helpers.serve.owned import TEARDOWN_S
from helpers.serve.router import SOONER
from helpers.tools import scale
from tests.test_deploy import FOLDER, PINNED, SCHEMAS, commented, compose, example, manifest, seconds

SERVERS = ("vllm-0", "vllm-1")


def scaled() -> dict:
    return yaml.safe_load((FOLDER / "compose.scale.yaml").read_text())


def kubernetes() -> list[dict]:
    return [found for found in yaml.safe_load_all((FOLDER / "kubernetes.scale.yaml").read_text()) if found]


def valid(found: dict) -> None:
    schema = json.loads((SCHEMAS / "kubernetes.json").read_text())
    kind = schema["kinds"][f"{found['apiVersion']}/{found['kind']}"]
    jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{kind}"}).validate(found)


def merged(base, patch):
    """A strategic merge of maps, as `kubectl patch` does where no list is merged."""
    if not isinstance(patch, dict) or not isinstance(base, dict):
        return patch
    return base | {name: merged(base.get(name), value) for name, value in patch.items()}


def test_the_files_are_valid():
    jsonschema.Draft7Validator(json.loads((SCHEMAS / "compose.json").read_text())).validate(scaled())
    for found in kubernetes():
        valid(found)
    patch = yaml.safe_load((FOLDER / "kubernetes.scale.patch.yaml").read_text())
    valid(merged(manifest("Deployment", "llm"), patch))


def test_each_server_is_the_single_one_with_a_gpu_of_its_own():
    single, services = compose()["services"]["vllm"], scaled()["services"]
    gpus = []
    for name in SERVERS:
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        gpus.append(device["device_ids"])
        assert "ports" not in services[name]
        for key in ("image", "entrypoint", "environment", "user", "cap_drop", "security_opt", "restart"):
            assert services[name][key] == single[key], key
        assert services[name]["healthcheck"] == single["healthcheck"]
        drain = int(example()["SHUTDOWN_TIMEOUT"])
        assert seconds(services[name]["stop_grace_period"]) >= drain + TEARDOWN_S
    assert gpus == [["0"], ["1"]]


def test_only_the_proxy_reaches_the_router_and_stops_before_it():
    services = scaled()["services"]
    assert "ports" not in services["router"]
    assert services["proxy"] | {"depends_on": 0} == compose()["services"]["proxy"] | {"depends_on": 0}
    assert set(services["proxy"]["depends_on"]) == {"router"}
    assert set(services["router"]["depends_on"]) == set(SERVERS)
    assert services["router"]["networks"]["default"]["aliases"] == ["vllm"]
    assert "server vllm:8000 resolve;" in (FOLDER / "nginx.conf").read_text()
    for name in ("router", "proxy", "prometheus", *SERVERS):
        assert services[name]["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in services[name].get("ports", ()))


def test_images_and_packages_are_pinned():
    for service in scaled()["services"].values():
        assert PINNED.fullmatch(service["image"]), service["image"]
    lines = scaled()["services"]["router"]["build"]["dockerfile_inline"].splitlines()
    assert PINNED.fullmatch(lines[0].removeprefix("FROM "))
    (version,) = re.findall(r"vllm-router==(\S+)", "\n".join(lines))
    assert f"\nvllm-router=={version} " in scale.LOCK.read_text(), "the version that the tests run"


def test_the_router_understands_its_arguments_and_knows_every_server():
    scale.ensure()
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
    budget, scaler = kubernetes()
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["selector"] == manifest("Deployment", "llm")["spec"]["selector"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == "llm"
    assert scaler["spec"]["minReplicas"] >= 2
    (keda,) = commented("apiVersion: keda.sh", (FOLDER / "kubernetes.scale.yaml").read_text())
    assert "vllm:num_requests_waiting" in keda["spec"]["triggers"][0]["metadata"]["query"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    patience = scaler["spec"]["behavior"]["scaleUp"]["policies"][0]["periodSeconds"]
    assert patience >= 120, "a server takes minutes to come: the queue must not ask for another meanwhile"
