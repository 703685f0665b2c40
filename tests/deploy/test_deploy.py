"""What deploy/ says is understood: by the linters of its formats, and by Corolla, every flag, variable and setting."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from corolla.cli import app
from corolla.cli.settings import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "corolla.yaml").read_text(encoding="utf-8")))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CONTAINERS = [
    container
    for one in MANIFESTS
    if one["kind"] in ("Deployment", "StatefulSet")
    for container in one["spec"]["template"]["spec"]["containers"]
]
BINARY = "/opt/corolla/bin/corolla"


def start_lines():
    for unit in UNITS:
        (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(encoding="utf-8"), flags=re.MULTILINE)
        yield line.removeprefix(BINARY).split()


COMMANDS = [
    *(service["command"] for service in COMPOSE["services"].values()),
    *(container["args"] for container in CONTAINERS),
    *start_lines(),
]


def program(name):
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return found or pytest.skip(f"needs {name}")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one_with_flags_that_there_are(command):
    done = CliRunner().invoke(app, [*command, "--help"], prog_name="corolla")
    assert done.exit_code == 0, done.output


def test_a_flag_that_there_is_not_would_be_noticed():
    assert CliRunner().invoke(app, ["serve", "x", "--nonsense", "--help"]).exit_code == 2


def test_every_variable_is_a_setting():
    for service in COMPOSE["services"].values():
        load_settings(environment={name: str(value) for name, value in service["environment"].items()})


@pytest.mark.parametrize("source", ["systemd", "kubernetes"])
def test_every_setting_in_a_file_is_one(source, tmp_path):
    if source == "systemd":
        file = DEPLOY / "systemd" / "corolla.toml"
    else:
        (text,) = [one["data"]["corolla.toml"] for one in MANIFESTS if one["kind"] == "ConfigMap"]
        file = tmp_path / "corolla.toml"
        file.write_text(text, encoding="utf-8")
    assert tomllib.loads(file.read_text(encoding="utf-8"))
    load_settings(file=file, environment={})


def test_the_dockerfile_is_without_fault():
    done = subprocess.run(
        [program("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_there_is():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for sources in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE):
        assert [name for name in sources.split() if not (DEPLOY.parent / name).exists()] == []
    extras = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for group in re.findall(r"'\.\[(.*)\]'", text) for extra in group.split(",")}
    assert named <= extras["optional-dependencies"].keys()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_units(unit, tmp_path):
    verify = program("systemd-analyze")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text(encoding="utf-8").replace(BINARY, "/bin/true"), encoding="utf-8")
    done = subprocess.run([verify, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr


@pytest.mark.filterwarnings("ignore")  # of the validator's own dependencies
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_kubernetes_takes_the_manifests(manifest):
    kubernetes = pytest.importorskip("kubernetes_validate")
    kubernetes.validate(manifest, desired_version="1.33", strict=True)


def test_services_find_the_pods_and_ports_that_there_are():
    pods = {}
    for one in MANIFESTS:
        if "template" in one.get("spec", {}):
            pod = one["spec"]["template"]
            ports = {port["containerPort"] for each in pod["spec"]["containers"] for port in each["ports"]}
            pods[pod["metadata"]["labels"]["app"]] = ports
            assert pod["spec"]["enableServiceLinks"] is False  # or Kubernetes sets COROLLA_... variables
    services = [one["spec"] for one in MANIFESTS if one["kind"] == "Service"]
    assert {spec["selector"]["app"] for spec in services} == pods.keys()
    for spec in services:
        assert {port.get("targetPort", port["port"]) for port in spec["ports"]} <= pods[spec["selector"]["app"]]


def test_compose_names_services_images_and_secrets_that_there_are():
    services, volumes, secrets = COMPOSE["services"], COMPOSE["volumes"], COMPOSE["secrets"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= services.keys()
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= volumes.keys()
        assert set(service["secrets"]) <= secrets.keys()
        dockerfile = DEPLOY.parent / service["build"]["dockerfile"]
        stage = service["build"].get("target", "full")
        assert f" AS {stage}\n" in dockerfile.read_text(encoding="utf-8")
        hosts = [peer for peer in service["command"] if peer.startswith("tls://")]
        assert {host.split("/")[2].partition(":")[0] for host in hosts} <= services.keys()
