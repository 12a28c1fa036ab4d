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

from helpers import models, server, settings
from helpers.settings import LEAST_KEY, Settings

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
    return int(text.removesuffix("s"))


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
    assert found.model_name.startswith(models.GPU_DEFAULT + "@")
    assert not any(example()[name] for name in SECRETS)


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


def serve(tmp_path, **variables: str) -> subprocess.CompletedProcess:
    """Run serve.sh with a program in Python's place that prints how it was called."""
    printer = tmp_path / "printer"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(printer.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(printer), "VLLM_API_KEY": KEY} | variables
    command = ["/bin/sh", str(FOLDER / "serve.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def flags_of(arguments: list[str]) -> dict[str, str]:
    values = [word for word in arguments if word.startswith("--")]
    return {flag: arguments[arguments.index(flag) + 1] for flag in values}


def test_the_script_passes_every_setting_on(tmp_path):
    given = {name: value for name, value in example().items() if value and name not in SECRETS}
    lines = serve(tmp_path, **given).stdout.splitlines()
    assert lines[:2] == ["-c", server.START]
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


@pytest.mark.parametrize(("quantization", "flag"), [("none", None), ("awq", None), ("fp8", "fp8_per_tensor")])
def test_the_script_knows_every_quantization(tmp_path, quantization, flag):
    lines = serve(tmp_path, MODEL_NAME="a/b", QUANTIZATION=quantization).stdout.splitlines()
    assert flags_of(lines).get("--quantization") == flag
    assert quantization in settings.SCHEMES


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "MODEL_NAME is empty"),
        ({"MODEL_NAME": "embedded"}, "MODEL_NAME=embedded"),
        ({"MODEL_NAME": "a/b", "QUANTIZATION": "int3"}, "must be none, fp8 or awq"),
        ({"MODEL_NAME": "a/b", "VLLM_API_KEY": ""}, "VLLM_API_KEY must have 16"),
        ({"MODEL_NAME": "a/b", "VLLM_API_KEY": "short"}, "VLLM_API_KEY must have 16"),
    ],
)
def test_the_script_refuses_what_the_settings_refuse(tmp_path, variables, said):
    done = serve(tmp_path, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


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
    assert seconds(service["stop_grace_period"]) >= drain + server.TEARDOWN_S
    assert seconds(service["healthcheck"]["start_period"]) == int(example()["START_TIMEOUT"])


def test_kubernetes_waits_longer_than_prestop_and_drain():
    (container,) = pod()["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(manifest("ConfigMap", "llm-settings")["data"]["SHUTDOWN_TIMEOUT"])
    assert before >= 5, "time for every proxy to learn that the pod is going"
    assert pod()["terminationGracePeriodSeconds"] >= before + drain + server.TEARDOWN_S


def test_kubernetes_asks_the_endpoint_that_needs_no_key():
    (container,) = pod()["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    patience = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert patience == int(example()["START_TIMEOUT"])


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
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in pod()["volumes"] if "persistentVolumeClaim" in v
    ]
    assert claims == [manifest("PersistentVolumeClaim", "llm-cache")["metadata"]["name"]]


def test_the_ingress_passes_on_the_guarded_api_alone():
    rules = manifest("Ingress", "llm")["spec"]["rules"]
    assert [path["path"] for rule in rules for path in rule["http"]["paths"]] == ["/v1"]
    proxied = re.findall(r"location (\S+ ?\S*) \{[^}]*proxy_pass", (FOLDER / "nginx.conf").read_text())
    assert proxied == ["/v1/", "= /health"]
