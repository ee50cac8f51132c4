"""The compose files, checked against the schema of the compose specification."""

import re

import pytest
import yaml
from tests.deploy.deploy_support import (
    DEPLOY,
    assert_settings,
    check,
    program,
    stop_grace_s,
)

from fidelora.server.login import COOKIE
from fidelora.server.page.paths import is_page_path

FOLDER = DEPLOY / "compose"
FILES = sorted(FOLDER.glob("compose*.yaml"))
SERVICES = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
FIDELORA_SERVICES = {name for name, one in SERVICES.items() if "fidelora" in one["image"].lower()}


def test_compose_files_satisfy_the_specification():
    assert len(FILES) == 3
    check(
        program("check-jsonschema"),
        *("--builtin-schema", "vendor.compose-spec"),
        *map(str, FILES),
    )


def test_all_yaml_files_pass_yamllint():
    rules = "{extends: default, rules: {document-start: disable, line-length: {max: 120}, "
    rules += "braces: disable, brackets: disable, comments: {min-spaces-from-content: 1}}}"
    check(program("yamllint"), "--strict", "-d", rules, ".")


def test_compose_starts_two_servers_and_two_workers():
    commands = [SERVICES[name].get("command", ["fidelora", "serve"]) for name in FIDELORA_SERVICES]
    assert commands.count(["fidelora", "serve"]) == 2
    assert [SERVICES["worker"]["command"], SERVICES["worker"]["scale"]] == [
        ["fidelora", "worker"],
        2,
    ]


@pytest.mark.parametrize("name", sorted(FIDELORA_SERVICES | {"proxy"}))
def test_service_has_no_rights_and_a_read_only_root(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", sorted(FIDELORA_SERVICES))
def test_service_uses_existing_settings_and_may_finish(name):
    variables = SERVICES[name].get("environment", {})
    assert_settings(variables)
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= 60 + stop_grace_s(
        variables
    )


def test_overlay_changes_existing_services_only():
    overlay = yaml.safe_load((FOLDER / "compose.cuda.yaml").read_text())["services"]
    assert overlay.keys() <= SERVICES.keys()
    for one in overlay.values():
        assert_settings(one["environment"])


def test_all_machines_use_the_same_bucket():
    services = yaml.safe_load((FOLDER / "compose.s3.yaml").read_text())["services"]
    variables = [one["environment"] for name, one in services.items() if name != "object-store"]
    for one in variables:
        assert_settings(one)
    assert services.keys() - {"object-store"} == {"api-1", "api-2", "worker"}
    shared = ("FIDELORA_OBJECT_STORE", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID")
    assert all(one[name] == variables[0][name] for one in variables for name in shared)


def test_each_variable_of_the_example_is_used():
    text = "".join(file.read_text() for file in FILES)
    used = set(re.findall(r"\$\{(\w+)", text))
    example = re.findall(r"^(\w+)=", (FOLDER / "example.env").read_text(), flags=re.M)
    assert set(example) <= used
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required <= set(example)


def test_the_proxy_sends_calls_to_both_servers():
    config = (FOLDER / "nginx.conf").read_text()
    servers = {name for name in FIDELORA_SERVICES if "command" not in SERVICES[name]}
    assert set(re.findall(r"^\s+server (\S+):8000 ", config, flags=re.M)) == servers
    assert servers <= SERVICES["proxy"]["depends_on"].keys()


def test_the_proxy_keeps_browsers_at_one_server():
    config = (FOLDER / "nginx.conf").read_text()
    assert f"hash $cookie_{COOKIE} consistent;" in config
    routes = re.findall(r"location (\S+(?: \S+)?) \{\s+proxy_pass http://(\w+);", config)
    assert routes == [("/", "page"), ("~ ^/(v1|sdapi)/", "api")]
    assert not any(is_page_path(path) for path in ("/v1/inference", "/sdapi/v1/txt2img"))
