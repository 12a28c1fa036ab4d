"""What a deployer copies: valid by its schema, agreeing with the settings and with itself, and started."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from dotenv import dotenv_values

from helpers.model.model import GPU_DEFAULT
from helpers.serve import command, launch, settings
from helpers.serve.command import TEARDOWN_S
from helpers.serve.server import open_server
from helpers.serve.settings import LEAST_KEY, Settings
from tests.nginx import FOLDER, names, tool

ROOT = FOLDER.parent.parent
SCHEMAS = Path(__file__).parent / "schemas"
SECRETS = {"VLLM_API_KEY", "HF_TOKEN"}
KEY = "k" * LEAST_KEY
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?")


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def compose() -> dict:
    return yaml.safe_load(text("compose.yaml"))


def kustomized() -> dict:
    """What kustomization.yaml makes: map by name, with its literals and the paths of its files."""
    made = {}
    for generator in yaml.safe_load(text("kustomization.yaml"))["configMapGenerator"]:
        literals = dict(line.split("=", 1) for line in generator.get("literals", ()))
        made[generator["name"]] = literals | {Path(file).name: file for file in generator.get("files", ())}
    return made


def manifest(kind: str) -> dict:
    found = yaml.safe_load_all(text("kubernetes.yaml"))
    (found,) = [m for m in found if (m["kind"], m["metadata"]["name"]) == (kind, "llm")]
    return found


def pod() -> dict:
    return manifest("Deployment")["spec"]["template"]["spec"]


def containers() -> dict:
    return {c["name"]: c for c in (*pod()["containers"], *pod()["initContainers"])}


def example() -> dict[str, str]:
    return dotenv_values(FOLDER / ".env.example")


def seconds(duration: str) -> int:
    """A duration in seconds, with the variables of .env.example filled in as compose does."""
    filled = re.sub(r"\$\{(\w+):-\w+\}", lambda found: example()[found[1]], duration)
    return int(filled.removesuffix("s"))


def commented(after: str, text: str) -> list:
    """The YAML documents in the comments from the line that starts with ``after`` to the file's end."""
    lines = text[text.index(f"# {after}") :].splitlines()
    return list(yaml.safe_load_all("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)))


# ---- by the platforms' own schemas


@pytest.mark.parametrize("name", ["compose.yaml", "compose.scale.yaml"])
def test_each_compose_file_is_valid(name):
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(text(name)))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_kubernetes_object_is_valid(version):
    schema = json.loads((SCHEMAS / f"kubernetes-{version}.json").read_text())
    for found in yaml.safe_load_all(f"{text('kubernetes.yaml')}\n---\n{text('kubernetes.scale.yaml')}"):
        kind = schema["kinds"][f"{found['apiVersion']}/{found['kind']}"]
        jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{kind}"}).validate(found)


@pytest.mark.parametrize(
    "check", ["check rules alerts.yml", "check config prometheus.yml", "test rules alerts_test.yml"]
)
def test_prometheus_takes_its_files_and_each_alert_fires_when_it_should(check):
    done = subprocess.run([tool("promtool"), *check.split()], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_that_it_fires_and_one_that_it_does_not():
    tests = yaml.safe_load(text("alerts_test.yml"))["tests"]
    tested = [case for test in tests for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {case["alertname"] for case in tested if bool(case["exp_alerts"]) == fires} == set(alerts())


# ---- settings


def test_the_examples_names_and_values_are_the_settings_defaults():
    fields = {name.upper(): field for name, field in Settings.model_fields.items()}
    assert set(example()) == set(fields) - {"SERVER_HOST"}, "in a container the address is not the deployer's"
    for name, value in example().items():
        if name not in SECRETS | {"MODEL_NAME"}:
            default = None if fields[name].default_factory else fields[name].default
            assert value == ("" if default is None else str(default)), name
    found = settings.load(FOLDER / ".env.example")
    assert found.model_name.startswith(GPU_DEFAULT + "@")
    assert not any(example()[name] for name in SECRETS)
    given = kustomized()["llm-settings"]
    assert given.items() <= example().items()
    assert not SECRETS & set(given)


# ---- the start


def shown(*words: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """What the start script would run, in an environment of these variables alone."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | variables
    line = ["sh", str(folder / "notebooks/deploy/serve.sh"), "--show", *words]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "MODEL_NAME: give a hub name"),
        ({"MODEL_NAME": "embedded"}, "MODEL_NAME: give a hub name"),
        ({"QUANTIZATION": "int3"}, "QUANTIZATION='int3'"),
        ({"QUANTIZATION": "awq"}, "set none; its config.json says the rest"),
        ({"VLLM_API_KEY": ""}, "VLLM_API_KEY is empty"),
        ({"VLLM_API_KEY": " " * 20}, "has a blank"),
        ({"VLLM_API_KEY": KEY + "\n"}, "a line's end"),
        ({"SHUTDOWN_TIMEOUT": "5"}, "an answer may take 300 s"),
    ],
)
def test_the_start_refuses_what_would_not_serve(variables, said):
    done = shown(**{"VLLM_API_KEY": KEY, "MODEL_NAME": "a/b"} | variables if variables else {})
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


def test_it_runs_with_the_files_that_kubernetes_gives_it_and_no_others(tmp_path):
    """What they import beyond these and vLLM's own packages, the image would not have."""
    made, (volume,) = kustomized()["llm-serve"], [v for v in pod()["volumes"] if v["name"] == "serve"]
    for item in volume["configMap"]["items"]:
        path = tmp_path / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((FOLDER / made[item["key"]]).read_text() if made[item["key"]] else "")
        assert (ROOT / item["path"]).exists()
    assert set(made) == {item["key"] for item in volume["configMap"]["items"]}
    (tmp_path / "notebooks/deploy").mkdir(parents=True)
    shutil.copy(FOLDER / "serve.sh", tmp_path / "notebooks/deploy")
    variables = {name: value for name, value in example().items() if value} | {"VLLM_API_KEY": KEY}
    done = shown("--max-num-seqs", "4", folder=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    name, _, revision = example()["MODEL_NAME"].partition("@")
    for words in (f"--model {name}", f"--revision {revision}", "--shutdown-timeout 300", "--host 127.0.0.1"):
        assert f" {words} " in done.stdout
    assert done.stdout.endswith(" --max-num-seqs 4\n"), "what no variable sets comes last and wins"
    assert KEY not in done.stdout
    probe = [sys.executable, "-m", "helpers.serve.probe", "--url", "http://127.0.0.1:9", "--deadline", "1"]
    done = subprocess.run(probe, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, "refused" in done.stderr) == (1, True), done.stderr


def test_it_chooses_what_open_server_chooses(monkeypatch, tmp_path):
    """The same arguments for the same folder; and the folder's name may have an @ in it."""
    server = open_server(settings.load(None, served_model_name="m", server_port=1, vllm_api_key=KEY))
    folder = tmp_path / "my@model"
    folder.symlink_to(server.checkpoint.folder)
    for name, value in {"MODEL_NAME": folder, "SERVED_MODEL_NAME": "m", "SERVER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    args = command.flags(server.args | {"model": folder})
    assert launch.command_line(launch.checked()) == [sys.executable, "-c", command.START, *args]


def test_a_gpu_is_found_where_only_vllm_is_installed(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if name == "vllm" else None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    launch.find_nvml()
    assert sys.modules["pynvml"].__file__.endswith("vllm/third_party/pynvml.py")
    assert callable(sys.modules["pynvml"].nvmlDeviceGetCudaComputeCapability)


@pytest.mark.slow
def test_vllm_itself_understands_every_flag():
    given = settings.load(
        FOLDER / ".env.example", max_num_queued_tokens=9, tool_call_parser="hermes", tensor_parallel_size=2
    )
    machine = launch.machine.Machine("cuda", "H200", 2**37, sm=9.0)
    way = launch.schemes.scheme("fp8").way(machine)
    args = command.arguments(given, machine, way, "a/b", "b")
    code = (
        "import sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "args = make_arg_parser(FlexibleArgumentParser()).parse_args()\n"
        "validate_parsed_serve_args(args)\n"
        "assert args.shutdown_timeout == 300 and args.max_num_seqs == 64 and not args.trust_remote_code\n"
        "assert args.override_generation_config == {'max_new_tokens': 500} and args.disable_fastapi_docs\n"
    )
    subprocess.run([sys.executable, "-c", code, *command.flags(args)], check=True)


# ---- from the longest answer to everything that waits for it


def test_whatever_ends_or_cuts_an_answer_waits_for_the_longest():
    """Tokens x seconds a token x batches = the drain; proxies wait as long, grace periods longer."""
    found = settings.load(FOLDER / ".env.example")
    longest = found.longest_s
    assert longest == found.shutdown_timeout == 2 * 500 * 0.3
    assert names(text("nginx.conf"), r"proxy_read_timeout (\w+);") == {f"{longest}s"}
    proxy = compose()["services"]["proxy"]
    for service in (compose()["services"]["vllm"], proxy):
        assert seconds(service["stop_grace_period"]) >= longest + TEARDOWN_S
    assert proxy["stop_signal"] == "SIGQUIT", "nginx drops every connection on SIGTERM"
    assert "vllm" in proxy["depends_on"], "stopped first, it holds every answer that runs"
    before = containers()["vllm"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= 5, "time for every proxy to learn that the pod is going"
    assert pod()["terminationGracePeriodSeconds"] >= before + longest + TEARDOWN_S
    ingress = manifest("Ingress")["metadata"]["annotations"]
    assert ingress["nginx.ingress.kubernetes.io/proxy-read-timeout"] == str(longest)
    route, _ = commented("apiVersion: gateway.networking.k8s.io", text("kubernetes.yaml"))
    assert seconds(route["spec"]["rules"][0]["timeouts"]["request"]) == longest
    assert f'le="{found.seconds_per_token}"' in rules()["vllm:slow_tokens:ratio5m"]["expr"]


def test_ready_and_alive_mean_that_a_token_came_through():
    vllm, health = containers()["vllm"], compose()["services"]["vllm"]["healthcheck"]
    asked = [vllm[probe]["exec"]["command"] for probe in ("startupProbe", "livenessProbe")]
    for line in (*asked, health["test"][1:]):
        assert line[:3] == ["python3", "-m", "helpers.serve.probe"]
        assert float(line[line.index("--deadline") + 1]) < vllm["livenessProbe"]["timeoutSeconds"]
    patience = vllm["startupProbe"]["periodSeconds"] * vllm["startupProbe"]["failureThreshold"]
    assert patience == seconds(health["start_period"]) == int(example()["START_TIMEOUT"])
    assert manifest("Deployment")["spec"]["progressDeadlineSeconds"] > patience
    silent = re.search(r"total\[(\d+)m\]", alerts()["VllmStuck"]["expr"])[1]
    assert 60 * int(silent) > 3 * vllm["livenessProbe"]["periodSeconds"], "two may be lost"


# ---- security


def test_images_are_pinned_and_a_pod_goes_where_gpus_are():
    assert {container["imagePullPolicy"] for container in containers().values()} == {"IfNotPresent"}
    assert [(one["key"], one["effect"]) for one in pod()["tolerations"]] == [("nvidia.com/gpu", "NoSchedule")]
    assert yaml.safe_load(text("kustomization.yaml"))["namespace"]
    images = [found["image"] for found in (*compose()["services"].values(), *containers().values())]
    assert all(PINNED.fullmatch(image) for image in images), images
    assert {image for image in images if "vllm" in image} == {"vllm/vllm-openai:v0.32.0"}


def test_no_process_runs_as_root_or_may_become_it_or_writes_beside_its_volumes():
    for name in ("vllm", "proxy", "prometheus"):
        service = compose()["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
    assert not compose()["services"]["vllm"]["user"].startswith("0")
    assert pod()["securityContext"]["runAsNonRoot"] is True
    for container in containers().values():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"])


def test_the_server_itself_is_out_of_reach():
    """No port on a host; in a pod it listens on loopback, and what others reach is the proxy's."""
    assert "ports" not in compose()["services"]["vllm"]
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    variables = {variable["name"] for variable in containers()["vllm"]["env"]}
    assert not {"SERVER_HOST", *SECRETS} & (variables | set(kustomized()["llm-settings"]))
    assert "ports" not in containers()["vllm"]
    ports = {port["name"]: port["containerPort"] for port in containers()["proxy"]["ports"]}
    (served,) = manifest("Service")["spec"]["ports"]
    assert served["targetPort"] == "http"
    assert f"listen {ports['http']};" in text("nginx.conf")
    assert f"listen {ports['metrics']};" in kustomized()["llm-proxy"]["metrics.conf"]
    policy = manifest("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["http", "metrics"]
    assert all(rule["from"] for rule in policy["ingress"])


def test_nothing_trusts_remote_code_or_carries_a_secret():
    for path in FOLDER.iterdir():
        if path.suffix != ".md":
            assert "trust" not in path.read_text().lower(), path.name
        assert not re.search(r"hf_\w{8,}|(KEY|TOKEN)=\w{8,}", path.read_text()), path.name


# ---- Kubernetes agrees with itself


def test_its_parts_find_each_other():
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Service")["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest(kind)["spec"]["selector"]["matchLabels"] == labels
    assert manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    (spread,) = pod()["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    (path,) = manifest("Ingress")["spec"]["rules"][0]["http"]["paths"]
    route, monitor = commented("apiVersion: gateway.networking.k8s.io", text("kubernetes.yaml"))
    (rule,) = route["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": path["path"]}}]
    name = manifest("Service")["metadata"]["name"]
    assert rule["backendRefs"] == [{"name": name, "port": manifest("Service")["spec"]["ports"][0]["port"]}]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    maps = {v["configMap"]["name"] for v in pod()["volumes"] if "configMap" in v}
    maps |= {source["configMapRef"]["name"] for source in containers()["vllm"]["envFrom"]}
    assert maps == set(kustomized()), "each is made, and a change of it makes new pods"


def test_an_update_without_a_gap_needs_no_volume_of_the_old_pods_node():
    assert manifest("Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    cache = next(volume["emptyDir"]["sizeLimit"] for volume in pod()["volumes"] if volume["name"] == "cache")
    assert containers()["vllm"]["resources"]["requests"]["ephemeral-storage"] == cache


# ---- watching


def rules() -> dict[str, dict]:
    groups = yaml.safe_load(text("alerts.yml"))["groups"]
    return {rule.get("alert", rule.get("record")): rule for group in groups for rule in group["rules"]}


def alerts() -> dict[str, dict]:
    return {name: rule for name, rule in rules().items() if "alert" in rule}


def test_a_pod_says_where_its_metrics_are_and_the_alerts_know_the_job():
    metadata = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    (port,) = [p["containerPort"] for p in containers()["proxy"]["ports"] if p["name"] == "metrics"]
    (job,) = yaml.safe_load(text("prometheus.yml"))["scrape_configs"]
    assert metadata["prometheus.io/port"] == str(port)
    assert metadata["prometheus.io/path"] == job["metrics_path"]
    assert names(text("alerts.yml"), r'job="(\w+)"') == {job["job_name"]} == {"vllm"}


def test_the_dashboard_asks_what_prometheus_can_answer(tmp_path):
    asked = [t["expr"] for panel in json.loads(text("grafana.json"))["panels"] for t in panel["targets"]]
    assert {name for expr in asked for name in re.findall(r"vllm:\w+:\w+", expr)} <= set(rules())
    panels = [{"record": f"panel{i}", "expr": expr} for i, expr in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    subprocess.run([tool("promtool"), "check", "rules", tmp_path / "rules.yml"], check=True)
