"""Settings: the documented names, their precedence and their validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from fidelora.environment import names_of
from fidelora.errors import SettingsError
from fidelora.settings import Settings, read_settings, setting_warnings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for field in Settings.model_fields.values():
        for name in names_of(field):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def test_settings_have_their_documented_defaults(tmp_path):
    settings = read_settings()
    data = tmp_path / ".local" / "share" / "fidelora"
    assert (settings.host, settings.port, settings.device, settings.offload) == (
        "127.0.0.1",
        8000,
        "auto",
        "none",
    )
    assert (settings.loras, settings.outputs, settings.adapters) == (
        data / "loras",
        data / "outputs",
        data / "adapters",
    )
    assert settings.database == f"sqlite:///{data}/jobs.sqlite"
    assert settings.inference_timeout_s == 3600
    assert settings.lora_hosts == frozenset()


def test_every_documented_name_sets_its_setting(monkeypatch):
    given = {
        "HOST": "::1",
        "PORT": "9000",
        "BASE_URL": "https://x.example",
        "DEBUG": "true",
        "DEVICE": "cuda:0, cuda:1",
        "OFFLOAD_MODE": "sequential",
        "WORKFLOWS_BASE_PATH": "/w",
        "OUTPUT_BASE_PATH": "/o",
        "MODEL_CACHE_DIR": "/m",
        "HF_TOKEN": "hf_x",
        "INFERENCE_TIMEOUT": "12",
        "LORA_DOWNLOAD_CACHE_DIR": "/l",
        "FIDELORA_LORA_HOSTS": " HuggingFace.co, *.hf.co,",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert (settings.host, settings.port, settings.base_url, settings.debug) == (
        "::1",
        9000,
        "https://x.example",
        True,
    )
    assert (settings.devices, settings.offload, settings.inference_timeout_s) == (
        ["cuda:0", "cuda:1"],
        "sequential",
        12,
    )
    assert (settings.loras, settings.outputs, settings.adapters) == (
        Path("/w"),
        Path("/o"),
        Path("/l"),
    )
    assert settings.model_cache_dir == Path("/m")
    assert settings.lora_hosts == {"huggingface.co", "*.hf.co"}
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_x"
    assert "hf_x" not in repr(settings)


def test_offload_mode_precedes_its_older_name(monkeypatch):
    monkeypatch.setenv("ENABLE_CPU_OFFLOAD", "true")
    assert read_settings().offload == "model"
    monkeypatch.setenv("OFFLOAD_MODE", "none")
    assert read_settings().offload == "none"


def test_the_command_line_precedes_the_environment_and_the_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("PORT=1\nHOST=10.0.0.1\nDEVICE=cpu\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("HOST", "10.0.0.2")
    settings = read_settings(port=3, host=None)
    assert (settings.port, settings.host, settings.device) == (3, "10.0.0.2", "cpu")


def test_each_plain_name_has_a_form_with_the_prefix(monkeypatch):
    for field in Settings.model_fields.values():
        assert names_of(field)[0].startswith("FIDELORA_")
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("FIDELORA_PORT", "2")
    monkeypatch.setenv("FIDELORA_HOST", "build-7")
    monkeypatch.setenv("FIDELORA_HF_TOKEN", "hf_y")
    settings = read_settings()
    assert (settings.port, settings.host) == (2, "build-7")
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_y"
    assert read_settings(port=3).port == 3
    assert setting_warnings() == []


def test_the_prefix_takes_precedence_even_in_the_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("FIDELORA_HOST=10.0.0.1\n")
    monkeypatch.setenv("HOST", "10.0.0.2")
    assert read_settings().host == "10.0.0.1"


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("HOST", "x86_64-conda-linux-gnu", "an IP address or localhost"),
        ("HOST", "laptop.local", "an IP address or localhost"),
        ("PORT", "/dev/ttyUSB0", "a number"),
        ("PORT", "tcp://10.0.0.1:80", "a number"),
        ("DEBUG", "app:*", "true or false"),
        ("DEBUG", "*", "true or false"),
        ("DEBUG", "release", "true or false"),
        ("BASE_URL", "/app/", "an http or https URL"),
        ("DEVICE", "eth0", "auto, cpu, cuda, cuda:N, mps or none"),
    ],
)
def test_values_of_other_programs_are_ignored_and_named(monkeypatch, tmp_path, name, value, form):
    default = read_settings()
    monkeypatch.setenv(name, value)
    assert read_settings() == default
    assert setting_warnings() == [
        f"{name} is ignored, because its value is not {form}. If it is meant for Fidelora, set "
        f"FIDELORA_{name}."
    ]
    monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(f"{name}={value}\n")
    assert read_settings() == default
    assert len(setting_warnings()) == 1
    monkeypatch.setenv(f"FIDELORA_{name}", str(getattr(default, name.lower()) or "http://x"))
    assert setting_warnings() == []


def test_the_port_of_a_service_is_not_the_servers(monkeypatch):
    monkeypatch.setenv("FIDELORA_PORT", "tcp://10.0.0.1:8000")  # set by Kubernetes
    monkeypatch.setenv("PORT", "9000")
    assert read_settings().port == 9000
    assert setting_warnings() == [
        "FIDELORA_PORT is ignored, because its value is not a number; Kubernetes and Docker set it "
        "for a service."
    ]


@pytest.mark.parametrize(
    "name", ["PORT", "FIDELORA_PAGE", "FIDELORA_BASES_GB", "HF_TOKEN", "FIDELORA_HOST"]
)
def test_an_empty_value_is_none(monkeypatch, name):
    default = read_settings()
    monkeypatch.setenv(name, "")
    assert read_settings() == default
    assert setting_warnings() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("FIDELORA_PORT", "eighty"),
        ("FIDELORA_DEBUG", "app:*"),
        ("FIDELORA_BASE_URL", "/app"),
        ("INFERENCE_TIMEOUT", "-1"),
        ("OFFLOAD_MODE", "some"),
        ("FIDELORA_QUEUE_SIZE", "0"),
        ("FIDELORA_DTYPE", "fp8"),
        ("FIDELORA_LORA_HOSTS", "https://huggingface.co"),
    ],
)
def test_an_invalid_value_is_rejected_by_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        read_settings()


def test_an_error_says_where_the_value_was_set(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = "Expected a number of at most 65535."

    def message(**overrides: object) -> str:
        with pytest.raises(SettingsError) as caught:
            read_settings({"port": "--port"}, **overrides)
        return str(caught.value)

    (tmp_path / ".env").write_text("PORT=70000")
    assert message() == f"Invalid value for PORT in .env: {expected}"
    monkeypatch.setenv("PORT", "70000")
    assert message() == f"Invalid value for PORT: {expected}"
    assert message(port=70000) == f"Invalid value for '--port': {expected}"
    assert message(port=1, page="on and off") == "Invalid value for page: Expected true or false."


def test_unknown_names_with_the_prefix_are_named(monkeypatch):
    assert setting_warnings() == []
    monkeypatch.setenv("FIDELORA_LORA_HOST", "x")
    monkeypatch.setenv("FIDELORA_PORT_8000_TCP_PROTO", "tcp")  # set by Kubernetes
    monkeypatch.setenv("FIDELORA_SERVICE_HOST", "10.0.0.1")
    read_settings()
    assert setting_warnings() == [
        "FIDELORA_LORA_HOST is not a setting of Fidelora and has no effect; "
        "did you mean FIDELORA_LORA_HOSTS?",
        "FIDELORA_PORT_8000_TCP_PROTO is ignored; Kubernetes and Docker set it for a service.",
        "FIDELORA_SERVICE_HOST is ignored; Kubernetes and Docker set it for a service.",
    ]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("", {}),
        ("/bases/a", {"sd15": "/bases/a"}),
        ("owner/name@v1", {"sd15": "owner/name@v1"}),
        ("sdxl=/bases/b", {"sdxl": "/bases/b"}),
        ("sdxl=/bases/b,sd15=a/b", {"sdxl": "/bases/b", "sd15": "a/b"}),
        ("/bases/a,sdxl=/bases/b", {"sd15": "/bases/a", "sdxl": "/bases/b"}),
        ("/bases/a, b=c,sdxl=/x,y=z,sd15", {"sd15": "/bases/a, b=c", "sdxl": "/x,y=z,sd15"}),
    ],
)
def test_each_model_has_a_base_of_its_own(monkeypatch, text, meant):
    monkeypatch.setenv("FIDELORA_BASE_MODEL", text)
    assert list(read_settings().base_models.items()) == list(meant.items())


def test_training_adapters_are_named_by_model(monkeypatch):
    monkeypatch.setenv("FIDELORA_TRAINING_ADAPTER", "zimage_turbo=/a,b.safetensors")
    assert read_settings().training_adapters == {"zimage_turbo": Path("/a,b.safetensors")}


@pytest.mark.parametrize("text", ["/a.safetensors", "sd15=/a.safetensors", "zimage_turbo="])
def test_a_training_adapter_needs_a_model_that_uses_it(monkeypatch, text):
    monkeypatch.setenv("FIDELORA_TRAINING_ADAPTER", text)
    with pytest.raises(SettingsError, match="models with a training adapter: zimage"):
        read_settings()


@pytest.mark.parametrize("text", ["dall-e-3", "dall-e-3=gpt", "=sd15"])
def test_a_model_alias_names_a_model(monkeypatch, text):
    monkeypatch.setenv("FIDELORA_MODEL_ALIASES", "a = sd15,b=sdxl,")
    assert read_settings().aliases_of_models == {"a": "sd15", "b": "sdxl"}
    monkeypatch.setenv("FIDELORA_MODEL_ALIASES", text)
    with pytest.raises(SettingsError, match=r"FIDELORA_MODEL_ALIASES.*is not NAME=MODEL"):
        read_settings()


@pytest.mark.parametrize("text", ["sdxl=", "sd15=,sdxl=/x", "sdxl=/x,sdxl=/y", "/x,sd15=/y"])
def test_a_model_has_one_base(monkeypatch, text):
    monkeypatch.setenv("FIDELORA_BASE_MODEL", text)
    with pytest.raises(
        SettingsError, match=r"FIDELORA_BASE_MODEL: .*a model has (no base|two bases)"
    ):
        read_settings()


def test_every_setting_is_explained():
    assert [
        name
        for name, field in Settings.model_fields.items()
        if not (field.description or "").endswith(".")
    ] == []
