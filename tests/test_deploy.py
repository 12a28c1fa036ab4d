"""What a deployer copies: valid by its schema, agreeing with ``settings`` and with itself."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from dotenv import dotenv_values

from helpers.model.model import GPU_DEFAULT
from helpers.serve import settings
from helpers.serve.command import START
from helpers.serve.server import TEARDOWN_S
from helpers.serve.settings import LEAST_KEY, SCHEMES, Settings

FOLDER = Path(__file__).resolve().parent.parent / "notebooks/deploy"
SCHEMAS = Path(__file__).parent / "schemas"
SECRETS = {"VLLM_API_KEY", "HF_TOKEN"}
KEY = "k" * LEAST_KEY
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?")


def compose() -> dict:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def manifests() -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


def manifest(kind: str, name: str) -> dict:
    (found,) = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def example() -> dict[str, str]:
    return dotenv_values(FOLDER / ".env.example")


def pod() -> dict:
    return manifest("Deployment", "llm")["spec"]["template"]["spec"]


def seconds(text: str) -> int:
    """A compose duration in seconds, with the variables of .env.example filled in as compose does."""
    filled = re.sub(r"\$\{(\w+):-\w+\}", lambda found: example()[found[1]], text)
    return int(filled.removesuffix("s"))


def commented(after: str, text: str) -> list:
    """The YAML documents in the comments from the line that starts with ``after`` to the file's end."""
    lines = text[text.index(f"# {after}") :].splitlines()
    return list(yaml.safe_load_all("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)))


# ---- schemas


def test_the_compose_file_is_valid():
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    jsonschema.Draft7Validator(schema).validate(compose())


def test_every_kubernetes_object_is_valid():
    schema = json.loads((SCHEMAS / "kubernetes.json").read_text())
    for found in manifests():
        kind = schema["kinds"][f"{found['apiVersion']}/{found['kind']}"]
        jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{kind}"}).validate(found)


# ---- settings: names, defaults, allowed values


def test_the_example_has_every_setting_but_the_address():
    names = {name.upper() for name in Settings.model_fields}
    assert set(example()) == names - {"SERVER_HOST"}, "in a container the address is not the deployer's"


def test_the_examples_values_are_the_defaults_and_load():
    found = settings.load(FOLDER / ".env.example")
    for name, value in example().items():
        default = Settings.model_fields[name.lower()].default
        if name not in SECRETS | {"MODEL_NAME"}:
            assert value == ("" if default is None else str(default)), name
    assert found.model_name.startswith(GPU_DEFAULT + "@")
    assert not any(example()[name] for name in SECRETS)


def test_every_setting_of_the_example_is_read_by_something():
    """A variable that nothing reads is a promise that nothing keeps."""
    ours = (FOLDER / "serve.sh").read_text() + (FOLDER / "compose.yaml").read_text()
    read = set(re.findall(r"\$\{?(\w+)", ours))
    read |= {"HF_TOKEN"}  # the hub's client reads it, in the container
    read |= {"VLLM_CPU_KVCACHE_SPACE"}  # vLLM itself
    assert set(example()) <= read


def test_the_examples_comments_name_every_allowed_value():
    lines = (FOLDER / ".env.example").read_text().splitlines()
    for name, field in Settings.model_fields.items():
        for word in getattr(field.annotation, "__args__", ()):
            if isinstance(word, str):
                at = next(i for i, line in enumerate(lines) if line.startswith(f"{name.upper()}="))
                assert word in lines[at - 1], f"{name}: {word}"


def test_kubernetes_settings_are_the_examples():
    given = manifest("ConfigMap", "llm-settings")["data"]
    assert given.pop("SERVER_HOST") == "0.0.0.0"
    assert given.items() <= example().items()
    assert not SECRETS & set(given)


def test_settings_in_the_files_are_allowed_values(monkeypatch):
    for name, value in manifest("ConfigMap", "llm-settings")["data"].items():
        monkeypatch.setenv(name, value)
    for name, value in compose()["services"]["vllm"]["environment"].items():
        monkeypatch.setenv(name, value)
    assert settings.load(None).exposed


# ---- the start script


def serve(tmp_path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run serve.sh with a program in Python's place that prints how it was called."""
    printer = tmp_path / "printer"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(printer.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(printer), "VLLM_API_KEY": KEY} | variables
    command = ["/bin/sh", str(FOLDER / "serve.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def flags_of(arguments: list[str]) -> dict[str, str]:
    values = [word for word in arguments if word.startswith("--")]
    return {flag: arguments[arguments.index(flag) + 1] for flag in values}


def test_the_script_passes_every_setting_on(tmp_path):
    given = {name: value for name, value in example().items() if value and name not in SECRETS}
    lines = serve(tmp_path, **given).stdout.splitlines()
    assert lines[:2] == ["-c", START]
    name, _, revision = given["MODEL_NAME"].partition("@")
    assert flags_of(lines) == {
        "--model": name,
        "--revision": revision,
        "--host": "127.0.0.1",
        "--port": given["SERVER_PORT"],
        "--dtype": given["DTYPE"],
        "--max-model-len": given["MAX_MODEL_LEN"],
        "--max-num-seqs": given["MAX_NUM_SEQS"],
        "--gpu-memory-utilization": given["GPU_MEMORY_UTILIZATION"],
        "--shutdown-timeout": given["SHUTDOWN_TIMEOUT"],
    }


def test_the_scripts_defaults_are_those_of_the_settings(tmp_path):
    bare = flags_of(serve(tmp_path, MODEL_NAME="a/b").stdout.splitlines())
    full = flags_of(
        serve(tmp_path, **{**example(), "MODEL_NAME": "a/b", "VLLM_API_KEY": KEY}).stdout.splitlines()
    )
    assert bare == full


@pytest.mark.parametrize(("quantization", "flag"), [("none", None), ("fp8", "fp8_per_tensor")])
def test_the_script_knows_every_quantization(tmp_path, quantization, flag):
    lines = serve(tmp_path, MODEL_NAME="a/b", QUANTIZATION=quantization).stdout.splitlines()
    assert flags_of(lines).get("--quantization") == flag
    assert quantization in SCHEMES


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "MODEL_NAME is empty"),
        ({"MODEL_NAME": "embedded"}, "MODEL_NAME=embedded"),
        ({"MODEL_NAME": "a/b", "QUANTIZATION": "int3"}, "must be none or fp8"),
        # would serve a 16-bit model in 16 bits: the server makes no checkpoint
        ({"MODEL_NAME": "a/b", "QUANTIZATION": "awq"}, "name an AWQ checkpoint in MODEL_NAME"),
        ({"MODEL_NAME": "a/b", "VLLM_API_KEY": ""}, "VLLM_API_KEY must have 16"),
        ({"MODEL_NAME": "a/b", "VLLM_API_KEY": "short"}, "VLLM_API_KEY must have 16"),
    ],
)
def test_the_script_refuses_what_the_settings_refuse(tmp_path, variables, said):
    done = serve(tmp_path, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


def test_what_no_variable_sets_is_passed_on_and_wins(tmp_path):
    more = ["--max-num-batched-tokens", "2048", "--quantization", "fp8_per_channel", "--max-num-seqs", "4"]
    lines = serve(tmp_path, *more, **example() | {"VLLM_API_KEY": KEY, "QUANTIZATION": "fp8"})
    assert lines.stdout.splitlines()[-len(more) :] == more, "after ours: argparse takes the last"


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_the_files_show_how_to_pass_more(name):
    (found,) = re.findall(
        r"# (?:command|args): (\[.*--max-num-batched-tokens.*\])", (FOLDER / name).read_text()
    )
    assert "--kv-cache-dtype" in yaml.safe_load(found)


def test_a_checkpoint_of_your_own_has_its_place():
    (found,) = re.findall(r"# - (\S+:/models/\S+:ro)", (FOLDER / "compose.yaml").read_text())
    assert "MODEL_NAME=" + found.split(":")[1] in (FOLDER / "compose.yaml").read_text()
    assert found.split(":")[1] in (FOLDER / "kubernetes.yaml").read_text()


def test_both_ways_of_deploying_run_the_same_script():
    assert manifest("ConfigMap", "llm-serve")["data"]["serve.sh"] == (FOLDER / "serve.sh").read_text()


@pytest.mark.slow
def test_vllm_itself_understands_every_flag(tmp_path):
    variables = {**example(), "VLLM_API_KEY": KEY, "QUANTIZATION": "fp8", "SERVED_MODEL_NAME": "m"}
    arguments = serve(tmp_path, **variables).stdout.splitlines()[2:]
    code = (
        "import sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "args = make_arg_parser(FlexibleArgumentParser()).parse_args()\n"
        "validate_parsed_serve_args(args)\n"
        "assert args.shutdown_timeout == 30 and args.max_num_seqs == 64 and not args.trust_remote_code\n"
        "assert args.revision and args.quantization == 'fp8_per_tensor'\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


# ---- draining


def test_compose_waits_longer_than_the_drain():
    service = compose()["services"]["vllm"]
    drain = int(example()["SHUTDOWN_TIMEOUT"])
    assert seconds(service["stop_grace_period"]) >= drain + TEARDOWN_S
    assert seconds(service["healthcheck"]["start_period"]) == int(example()["START_TIMEOUT"])


def test_compose_stops_the_proxy_first_and_lets_it_finish():
    """Compose stops what depends on a service before that service: the proxy holds every answer that runs."""
    proxy = compose()["services"]["proxy"]
    assert "vllm" in proxy["depends_on"]
    assert proxy["stop_signal"] == "SIGQUIT", "nginx drops every connection on SIGTERM"
    assert seconds(proxy["stop_grace_period"]) > int(example()["SHUTDOWN_TIMEOUT"])
    assert seconds(proxy["stop_grace_period"]) >= seconds(compose()["services"]["vllm"]["stop_grace_period"])


def test_the_proxy_finds_a_server_that_was_made_anew():
    conf = re.sub(r"#.*", "", (FOLDER / "nginx.conf").read_text())
    assert re.search(r"^resolver 127\.0\.0\.11 valid=\d+s;", conf, re.M)
    upstream = re.search(r"upstream vllm \{(.*?)\}", conf, re.S)[1]
    assert "server vllm:8000 resolve;" in upstream
    assert re.search(r"zone \w+ \d+k;", upstream), "`resolve` needs a shared zone"
    version = re.search(r":(\d+)\.(\d+)\.(\d+)", compose()["services"]["proxy"]["image"])
    assert tuple(map(int, version.groups())) >= (1, 27, 3), "`resolve` was not free before"


def test_kubernetes_waits_longer_than_prestop_and_drain():
    (container,) = pod()["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(manifest("ConfigMap", "llm-settings")["data"]["SHUTDOWN_TIMEOUT"])
    assert before >= 5, "time for every proxy to learn that the pod is going"
    assert pod()["terminationGracePeriodSeconds"] >= before + drain + TEARDOWN_S


def test_kubernetes_asks_the_endpoint_that_needs_no_key():
    (container,) = pod()["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    patience = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert patience == int(example()["START_TIMEOUT"])
    assert manifest("Deployment", "llm")["spec"]["progressDeadlineSeconds"] > patience


def test_an_update_without_a_gap_needs_no_volume_of_the_old_pods_node():
    spec = manifest("Deployment", "llm")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    modes = {
        m["metadata"]["name"]: m["spec"]["accessModes"]
        for m in manifests()
        if m["kind"] == "PersistentVolumeClaim"
    }
    for volume in pod()["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert modes[claim["claimName"]] == ["ReadWriteMany"], volume
    cache = next(volume["emptyDir"]["sizeLimit"] for volume in pod()["volumes"] if volume["name"] == "cache")
    assert pod()["containers"][0]["resources"]["requests"]["ephemeral-storage"] == cache


# ---- security


def test_images_are_pinned():
    images = [service["image"] for service in compose()["services"].values()]
    images += [container["image"] for container in pod()["containers"]]
    for image in images:
        assert PINNED.fullmatch(image), image
    assert {image for image in images if "vllm" in image} == {"vllm/vllm-openai:v0.32.0"}


def test_no_process_runs_as_root_or_may_become_it():
    services = compose()["services"]
    assert not services["vllm"]["user"].startswith("0")
    for name in ("vllm", "proxy", "prometheus"):
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_ports_are_this_hosts_only_and_the_server_has_none():
    services = compose()["services"]
    assert "ports" not in services["vllm"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_nothing_trusts_remote_code_or_carries_a_secret():
    for path in FOLDER.iterdir():
        text = path.read_text()
        if path.suffix != ".md":
            assert "trust" not in text.lower(), path.name
        assert not re.search(r"hf_\w{8,}|(KEY|TOKEN)=\w{8,}", text), path.name


def test_caches_are_named_volumes():
    assert set(compose()["volumes"]) == {"model-cache", "metrics"}
    assert "model-cache:/cache" in compose()["services"]["vllm"]["volumes"]
    assert compose()["services"]["vllm"]["environment"]["HF_HOME"].startswith("/cache")
    mounts = {mount["name"]: mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"]}
    assert mounts["cache"] == compose()["services"]["vllm"]["environment"]["HOME"]


def test_the_ingress_passes_on_the_guarded_api_alone():
    rules = manifest("Ingress", "llm")["spec"]["rules"]
    assert [path["path"] for rule in rules for path in rule["http"]["paths"]] == ["/v1"]
    proxied = re.findall(r"location (\S+ ?\S*) \{[^}]*proxy_pass", (FOLDER / "nginx.conf").read_text())
    assert proxied == ["/v1/", "= /health"]


def test_a_gateways_route_leads_to_the_same_service_and_path():
    route, monitor = commented(
        "apiVersion: gateway.networking.k8s.io", (FOLDER / "kubernetes.yaml").read_text()
    )
    (rule,) = route["spec"]["rules"]
    (path,) = manifest("Ingress", "llm")["spec"]["rules"][0]["http"]["paths"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": path["path"]}}]
    service = manifest("Service", "llm")
    port = service["spec"]["ports"][0]["port"]
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": port}]
    labels = manifest("Deployment", "llm")["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels


# ---- watching


def rules() -> dict[str, dict]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def test_a_pod_says_where_its_metrics_are_and_the_alerts_know_the_job():
    metadata = manifest("Deployment", "llm")["spec"]["template"]["metadata"]["annotations"]
    (port,) = [port["containerPort"] for port in pod()["containers"][0]["ports"]]
    assert metadata["prometheus.io/port"] == str(port)
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert metadata["prometheus.io/path"] == job["metrics_path"]
    named = {name for rule in rules().values() for name in re.findall(r'job="(\w+)"', rule["expr"])}
    assert named == {job["job_name"]} == {"vllm"}


def test_alerts_on_times_have_the_lessons_objective():
    notebook = json.loads((FOLDER.parent / "06_production.ipynb").read_text())
    source = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    for alert, metric, name in (
        ("VllmSlowFirstToken", "time_to_first_token_seconds", "ttft_ms"),
        ("VllmSlowTokens", "request_time_per_output_token_seconds", "tpot_ms"),
    ):
        expression = rules()[alert]["expr"]
        assert f"vllm:{metric}_bucket" in expression, "the objective's own metric"
        threshold = float(re.search(r"> ([\d.]+)\s*$", expression)[1])
        assert threshold * 1e3 == float(re.search(rf"^{name} = ([\d.]+)$", source, re.M)[1])


def test_a_target_that_is_gone_from_the_list_is_down_too():
    assert 'absent(up{job="vllm"})' in rules()["VllmDown"]["expr"]
