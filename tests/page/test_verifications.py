"""Uploaded training runs, the folder of runs on the server, and the verifying process."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import GOLDEN_JOBS

from fidelora.errors import SettingsError, TrainingRunError
from fidelora.server.context import ServerContext
from fidelora.server.page import verifications
from fidelora.server.page.pictures import KEEP_S, PageFiles
from fidelora.server.page.verifications import (
    find_run,
    list_runs,
    read_contained_run,
    unpack_run,
)
from fidelora.server.verifier import Outcome, Verifier, hub_environment
from fidelora.settings import Settings

CONTEXT = cast(
    "ServerContext", SimpleNamespace(server_defaults={"sd15": {"base_model": "/bases/a"}})
)
RUN = GOLDEN_JOBS / "lokr_full"
MIB = 2**20


def zipped(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def assert_refused(archive, tmp_path, match, most=MIB):
    target = tmp_path / "target"
    with pytest.raises(TrainingRunError, match=match):
        unpack_run(archive, target, most)
    assert not target.exists()


def test_only_files_that_verify_needs_are_unpacked(tmp_path):
    archive = zipped(
        tmp_path / "a.zip",
        {
            "x/config.yaml": "a: 1",
            "x/optimizer.pt": b"12",
            "x/samples/1.PNG": b"3",
            "x/run.py": "4",
        },
    )
    folder, left_out = unpack_run(archive, tmp_path / "target", MIB)
    assert folder == tmp_path / "target" / "x"
    assert left_out == 2
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "1.PNG",
        "config.yaml",
    ]


@pytest.mark.parametrize(
    "name",
    ["../config.yaml", "a/../../config.yaml", "/config.yaml", "..\\config.yaml", "C:/config.yaml"],
)
def test_a_path_outside_is_refused(tmp_path, name):
    assert_refused(zipped(tmp_path / "a.zip", {name: "a: 1"}), tmp_path, "leads outside of it")
    assert not (tmp_path / "config.yaml").exists()


@given(name=st.text(st.sampled_from("ab./\\: "), min_size=1, max_size=12))
def test_no_file_name_leads_outside(tmp_path_factory, name):
    tmp_path = tmp_path_factory.mktemp("zip")
    archive = zipped(tmp_path / "a.zip", {"run/config.yaml": "a: 1", name + ".json": "{}"})
    try:
        unpack_run(archive, tmp_path / "target", MIB)
    except TrainingRunError:
        assert not (tmp_path / "target").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"a.zip", "target"}


def test_unpacked_size_is_limited_whatever_the_header_claims(tmp_path):
    archive = zipped(
        tmp_path / "a.zip",
        {"config.yaml": "a: 1", "big.safetensors": bytes(5 * MIB)},
        zipfile.ZIP_DEFLATED,
    )
    assert archive.stat().st_size < MIB
    assert_refused(archive, tmp_path, "more than 4,194,304 bytes")
    content = bytearray(archive.read_bytes())
    size = (5 * MIB).to_bytes(4, "little")
    while (at := content.find(size)) >= 0:
        content[at : at + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(content)
    assert_refused(archive, tmp_path, "cannot be unpacked|more than")


def test_a_central_directory_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    """`zipfile` would create an object per entry before the entries can be counted."""
    monkeypatch.setattr(verifications, "_MAX_READ_BYTES", 100_000)
    archive = zipped(
        tmp_path / "a.zip",
        {"config.yaml": "a: 1", **{f"{number}.png": b"" for number in range(3000)}},
    )
    made: list[Any] = []
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *given: made.append(given))
    assert_refused(archive, tmp_path, "list of files has more than 100,000 bytes")
    assert not made


def test_a_configuration_that_is_too_large_is_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"x/config.yaml": "#" * (MIB + 1)}, zipfile.ZIP_DEFLATED)
    assert_refused(archive, tmp_path, r"config\.yaml' in the zip has more than 1,048,576 bytes")


def test_other_compression_methods_are_refused(tmp_path):
    """LZMA takes as much memory as the file asks for."""
    content = zipped(
        tmp_path / "a.zip", {"config.yaml": "a: 1" * 99}, zipfile.ZIP_LZMA
    ).read_bytes()
    assert_refused(tmp_path / "a.zip", tmp_path, "compression method")
    (tmp_path / "b.zip").write_bytes(content.replace(content[45:60], bytes(15)))
    assert_refused(tmp_path / "b.zip", tmp_path, "compression method|cannot be unpacked")
    assert (
        unpack_run(
            zipped(tmp_path / "c.zip", {"config.yaml": "a: 1"}, zipfile.ZIP_BZIP2),
            tmp_path / "target",
            MIB,
        )[1]
        == 0
    )


def test_symbolic_links_become_plain_files(tmp_path):
    info = zipfile.ZipInfo("run/link.safetensors")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = zipped(tmp_path / "a.zip", {"run/config.yaml": "a: 1"})
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(info, "/etc/passwd")
    folder, _ = unpack_run(archive, tmp_path / "target", MIB)
    assert not (folder / "link.safetensors").is_symlink()
    assert (folder / "link.safetensors").read_text() == "/etc/passwd"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/" * 1_900 + "x.json", "a path of 1,901 parts"),
        ("a/" * 12 + "x.json", "a path of 13 parts"),
        ("a" * 201 + "/x.json", "a name of more than 200 bytes"),
        ("é" * 101 + ".json", "a name of more than 200 bytes"),
        ("a/" * 1_900, "a path of 1,900 parts"),  # an empty folder
    ],
)
def test_paths_are_checked_before_anything_is_written(tmp_path, name, message, monkeypatch):
    archive = zipped(tmp_path / "a.zip", {"run/config.yaml": "a: 1", name: b""})
    monkeypatch.setattr(Path, "open", lambda *_args: pytest.fail("a file was written"))
    assert_refused(archive, tmp_path, message)


def test_the_sizes_that_a_zip_claims_are_checked_first(tmp_path, monkeypatch):
    archive = zipped(
        tmp_path / "a.zip", {"x.png": bytes(5 * MIB), "y.png": b""}, zipfile.ZIP_DEFLATED
    )
    monkeypatch.setattr(Path, "open", lambda *_args: pytest.fail("a file was written"))
    assert_refused(archive, tmp_path, "The zip contains more than 4,194,304 bytes")


def test_folders_that_are_too_deep_never_stop_a_start(tmp_path):
    folder = tmp_path / "page"
    files = PageFiles(folder)
    files.empty()
    deep = os.open(files.verifications, os.O_RDONLY)
    for _ in range(2_000):
        os.mkdir("a", dir_fd=deep)
        below = os.open("a", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    try:
        files.clean(time.time() + KEEP_S + 1)
        files.empty()
        assert files.files.is_dir()
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True, timeout=60)


def test_a_file_that_is_not_a_zip_of_one_run_is_refused(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"nothing")
    assert_refused(tmp_path / "no.zip", tmp_path, "cannot be unpacked")
    assert_refused(zipped(tmp_path / "a.zip", {"x.png": b""}), tmp_path, "no training run")
    assert_refused(
        zipped(tmp_path / "b.zip", {"x/config.yaml": "", "y/config.yaml": ""}),
        tmp_path,
        "2 training runs",
    )
    assert_refused(
        zipped(tmp_path / "c.zip", {f"{number}.png": b"" for number in range(20_001)}),
        tmp_path,
        "20,001 files",
    )
    whole = zipped(
        tmp_path / "d.zip", {"config.yaml": "a: 1", "x.safetensors": bytes(range(256)) * 40}
    ).read_bytes()
    (tmp_path / "e.zip").write_bytes(whole.replace(bytes(range(256)), bytes(256)))
    assert_refused(tmp_path / "e.zip", tmp_path, "cannot be unpacked")


def test_two_entries_with_one_name_are_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("config.yaml", "a: 1")
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr("config.yaml", "a: 2")
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    assert_refused(tmp_path / "a.zip", tmp_path, "cannot be unpacked")


def test_runs_are_found_only_below_their_folder(tmp_path):
    shutil.copytree(RUN, tmp_path / "runs" / "team" / "one")
    shutil.copytree(RUN, tmp_path / "two")
    (tmp_path / "runs" / "away").symlink_to(tmp_path / "two")
    root = tmp_path / "runs"
    assert list_runs(root) == ["team/one"]
    assert list_runs(None) == list_runs(tmp_path / "none") == []
    assert find_run(root, "team/one") == root / "team" / "one"
    for name in (
        "",
        "../two",
        "away",
        "none",
        "/etc",
        "team/one/config.yaml",
        "a\0b",
        str(tmp_path / "two"),
    ):
        with pytest.raises(TrainingRunError, match="is not on this server"):
            find_run(root, name)
    with pytest.raises(SettingsError, match="FIDELORA_JOBS_PATH"):
        find_run(None, "team/one")


def test_a_run_cannot_name_files_outside_its_folder(tmp_path):
    """A run's name is part of the file name of its weights."""
    run = shutil.copytree(RUN, tmp_path / "run")
    assert read_contained_run(run, CONTEXT).name == "lokr_full"
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(RUN / "lokr_full.safetensors", secret)
    config = (run / "config.yaml").read_text()
    assert "name: lokr_full" in config
    (run / "config.yaml").write_text(config.replace("name: lokr_full", "name: ../secret"))
    assert read_contained_run(run, CONTEXT).checkpoints == {}
    (run / "config.yaml").write_text(config)
    weights = run / "lokr_full.safetensors"
    weights.unlink()
    weights.symlink_to(secret)
    with pytest.raises(TrainingRunError, match="outside of its folder"):
        read_contained_run(run, CONTEXT)


def test_first_samples_cannot_be_outside_of_the_folder(tmp_path):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    block = "    first_sample:\n      samples: [{prompt: a}]\n    model:\n"
    (run / "config.yaml").write_text(config.replace("    model:\n", block))
    read_contained_run(run, CONTEXT)
    image = run / "samples" / "1__000000000_0.png"
    (tmp_path / "secret.png").write_bytes(b"secret")
    image.symlink_to(tmp_path / "secret.png")
    with pytest.raises(TrainingRunError, match="outside of its folder"):
        read_contained_run(run, CONTEXT)


def test_a_full_fine_tune_is_refused(tmp_path):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    assert "    network:\n" in config
    (run / "config.yaml").write_text(config.replace("    network:\n", "    unused:\n"))
    with pytest.raises(TrainingRunError, match="are base models"):
        read_contained_run(run, CONTEXT)


def test_a_run_with_its_own_vae_is_refused(tmp_path):
    run = shutil.copytree(RUN, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert "    model:\n" in config
    for vae in ("/etc/vae", "stranger/vae"):
        (run / "config.yaml").write_text(
            config.replace("    model:\n", f"    model:\n      vae_path: {vae}\n")
        )
        with pytest.raises(TrainingRunError, match="has its own VAE"):
            read_contained_run(run, CONTEXT)
    (run / "config.yaml").write_text(
        config.replace("    model:\n", "    model:\n      vae_path: /bases/a\n")
    )
    assert read_contained_run(run, CONTEXT).vae == "/bases/a"


def test_the_process_gets_the_hub_settings_of_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"data_dir": tmp_path, "hf_token": None}
    assert hub_environment(Settings(**given)) == {}
    given |= {"model_cache_dir": Path("cache"), "hf_token": "hf_x"}
    variables = hub_environment(Settings(**given))
    assert variables == {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": "hf_x"}
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$HF_HUB_CACHE $HF_TOKEN"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    async def run():
        return [
            one
            async for one in Verifier("cpu", 60, variables).run(
                "one", RUN, "x", tmp_path, step="last", doctor=False
            )
        ]

    assert asyncio.run(run()) == [f"{tmp_path / 'cache'} hf_x", Outcome(0, None)]


def test_a_verification_canceled_before_its_start_does_not_start(tmp_path):
    async def run():
        verifier = Verifier("cpu", 60, {})
        verifier.cancel("one")
        async for _ in verifier.run("one", tmp_path, "base", tmp_path, step="last", doctor=False):
            raise AssertionError("the process started")

    with pytest.raises(TrainingRunError, match="Canceled"):
        asyncio.run(run())


def test_a_verification_that_takes_too_long_is_stopped(tmp_path):
    async def run():
        verifier = Verifier("cpu", 0.05, {})
        async for _ in verifier.run("one", RUN, "none", tmp_path, step="last", doctor=False):
            pass

    with pytest.raises(TrainingRunError, match=r"exceeded 0\.05 seconds"):
        asyncio.run(run())
