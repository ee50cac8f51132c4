"""Training jobs that strangers send to the page, and the folder that they may choose from."""

from __future__ import annotations

import asyncio
import io
import shutil
import stat
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import GOLDEN_JOBS

from fidelora.errors import JobFolderError, SettingsError
from fidelora.server.context import ServerContext
from fidelora.server.page import verifications as jobs
from fidelora.server.page.verifications import (
    Outcome,
    Verifier,
    hub_variables,
    read_inside,
    run_names,
    run_path,
    unpack,
)
from fidelora.settings import Settings

PARTS = cast("ServerContext", SimpleNamespace(server_defaults={"sd15": {"base_model": "/bases/a"}}))
JOB = GOLDEN_JOBS / "lokr_full"
MIB = 2**20


def zipped(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def refused(archive, tmp_path, match, most=MIB):
    target = tmp_path / "target"
    with pytest.raises(JobFolderError, match=match):
        unpack(archive, target, most)
    assert not target.exists()


def test_only_what_verifying_needs_is_unpacked(tmp_path):
    archive = zipped(
        tmp_path / "a.zip",
        {
            "x/config.yaml": "a: 1",
            "x/optimizer.pt": b"12",
            "x/samples/1.PNG": b"3",
            "x/run.py": "4",
        },
    )
    folder, left_out = unpack(archive, tmp_path / "target", MIB)
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
def test_a_place_outside_is_refused(tmp_path, name):
    refused(zipped(tmp_path / "a.zip", {name: "a: 1"}), tmp_path, "outside of it")
    assert not (tmp_path / "config.yaml").exists()


@given(name=st.text(st.sampled_from("ab./\\: "), min_size=1, max_size=12))
def test_no_name_leads_out(tmp_path_factory, name):
    tmp_path = tmp_path_factory.mktemp("zip")
    archive = zipped(tmp_path / "a.zip", {"job/config.yaml": "a: 1", name + ".json": "{}"})
    try:
        unpack(archive, tmp_path / "target", MIB)
    except JobFolderError:
        assert not (tmp_path / "target").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"a.zip", "target"}


def test_what_grows_too_large_is_refused_whatever_its_header_says(tmp_path):
    archive = zipped(
        tmp_path / "a.zip",
        {"config.yaml": "a: 1", "big.safetensors": bytes(5 * MIB)},
        zipfile.ZIP_DEFLATED,
    )
    assert archive.stat().st_size < MIB
    refused(archive, tmp_path, "more than 4,194,304 bytes")
    content = bytearray(archive.read_bytes())
    size = (5 * MIB).to_bytes(4, "little")
    while (at := content.find(size)) >= 0:
        content[at : at + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(content)
    refused(archive, tmp_path, "cannot be unpacked|more than")


def test_a_list_of_files_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    """It would become objects before anybody can count them."""
    monkeypatch.setattr(jobs, "_MOST_AT_ONCE", 100_000)
    archive = zipped(
        tmp_path / "a.zip",
        {"config.yaml": "a: 1", **{f"{number}.png": b"" for number in range(3000)}},
    )
    made: list[Any] = []
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *given: made.append(given))
    refused(archive, tmp_path, "list of files has more than 100,000 bytes")
    assert not made


def test_a_configuration_that_is_too_large_is_not_unpacked(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"x/config.yaml": "#" * (MIB + 1)}, zipfile.ZIP_DEFLATED)
    refused(archive, tmp_path, r"config\.yaml' has more than 1,048,576 bytes")


def test_what_is_packed_by_other_methods_is_refused(tmp_path):
    """LZMA: its memory is what the file says."""
    content = zipped(
        tmp_path / "a.zip", {"config.yaml": "a: 1" * 99}, zipfile.ZIP_LZMA
    ).read_bytes()
    refused(tmp_path / "a.zip", tmp_path, "by a method that is not read here")
    (tmp_path / "b.zip").write_bytes(content.replace(content[45:60], bytes(15)))
    refused(tmp_path / "b.zip", tmp_path, "by a method|cannot be unpacked")
    assert (
        unpack(
            zipped(tmp_path / "c.zip", {"config.yaml": "a: 1"}, zipfile.ZIP_BZIP2),
            tmp_path / "target",
            MIB,
        )[1]
        == 0
    )


def test_links_become_files(tmp_path):
    info = zipfile.ZipInfo("job/link.safetensors")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = zipped(tmp_path / "a.zip", {"job/config.yaml": "a: 1"})
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(info, "/etc/passwd")
    folder, _ = unpack(archive, tmp_path / "target", MIB)
    assert not (folder / "link.safetensors").is_symlink()
    assert (folder / "link.safetensors").read_text() == "/etc/passwd"


def test_what_is_no_zip_of_one_job_is_refused(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"nothing")
    refused(tmp_path / "no.zip", tmp_path, "cannot be unpacked")
    refused(zipped(tmp_path / "a.zip", {"x.png": b""}), tmp_path, "no training job")
    refused(
        zipped(tmp_path / "b.zip", {"x/config.yaml": "", "y/config.yaml": ""}),
        tmp_path,
        "2 training jobs",
    )
    refused(
        zipped(tmp_path / "c.zip", {f"{number}.png": b"" for number in range(20_001)}),
        tmp_path,
        "20,001 files",
    )
    whole = zipped(
        tmp_path / "d.zip", {"config.yaml": "a: 1", "x.safetensors": bytes(range(256)) * 40}
    ).read_bytes()
    (tmp_path / "e.zip").write_bytes(whole.replace(bytes(range(256)), bytes(256)))
    refused(tmp_path / "e.zip", tmp_path, "cannot be unpacked")


def test_two_entries_of_one_name_are_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("config.yaml", "a: 1")
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr("config.yaml", "a: 2")
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    refused(tmp_path / "a.zip", tmp_path, "cannot be unpacked")


def test_jobs_are_named_below_their_folder(tmp_path):
    shutil.copytree(JOB, tmp_path / "jobs" / "team" / "one")
    shutil.copytree(JOB, tmp_path / "two")
    (tmp_path / "jobs" / "away").symlink_to(tmp_path / "two")
    root = tmp_path / "jobs"
    assert run_names(root) == ["team/one"]
    assert run_names(None) == run_names(tmp_path / "none") == []
    assert run_path(root, "team/one") == root / "team" / "one"
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
        with pytest.raises(JobFolderError, match="no training job"):
            run_path(root, name)
    with pytest.raises(SettingsError, match="FIDELORA_JOBS_PATH"):
        run_path(None, "team/one")


def test_a_job_cannot_name_files_elsewhere(tmp_path):
    """The name of a job is part of the name of its weights' file."""
    job = shutil.copytree(JOB, tmp_path / "job")
    assert read_inside(job, PARTS).name == "lokr_full"
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(JOB / "lokr_full.safetensors", secret)
    config = (job / "config.yaml").read_text()
    assert "name: lokr_full" in config
    (job / "config.yaml").write_text(config.replace("name: lokr_full", "name: ../secret"))
    with pytest.raises(JobFolderError, match="outside of its folder"):
        read_inside(job, PARTS)
    (job / "config.yaml").write_text(config)
    weights = job / "lokr_full.safetensors"
    weights.unlink()
    weights.symlink_to(secret)
    with pytest.raises(JobFolderError, match="outside of its folder"):
        read_inside(job, PARTS)


def test_a_job_cannot_choose_what_else_the_server_loads(tmp_path):
    job = shutil.copytree(JOB, tmp_path / "job")
    config = (job / "config.yaml").read_text()
    assert "    model:\n" in config
    for place in ("/etc/vae", "somebody/vae"):
        (job / "config.yaml").write_text(
            config.replace("    model:\n", f"    model:\n      vae_path: {place}\n")
        )
        with pytest.raises(JobFolderError, match="names a VAE of its own"):
            read_inside(job, PARTS)
    (job / "config.yaml").write_text(
        config.replace("    model:\n", "    model:\n      vae_path: /bases/a\n")
    )
    assert read_inside(job, PARTS).vae == "/bases/a"


def test_a_run_knows_where_the_server_keeps_its_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"data_dir": tmp_path, "hf_token": None}
    assert hub_variables(Settings(**given)) == {}
    given |= {"model_cache_dir": Path("cache"), "hf_token": "hf_x"}
    variables = hub_variables(Settings(**given))
    assert variables == {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": "hf_x"}
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$HF_HUB_CACHE $HF_TOKEN"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    async def run():
        return [
            one
            async for one in Verifier("cpu", 60, variables).run(
                "one", JOB, "x", tmp_path, step="last", doctor=False
            )
        ]

    assert asyncio.run(run()) == [f"{tmp_path / 'cache'} hf_x", Outcome(0, None)]


def test_a_run_that_is_canceled_before_it_begins_does_not_begin(tmp_path):
    async def run():
        verifier = Verifier("cpu", 60, {})
        verifier.cancel("one")
        async for _ in verifier.run("one", tmp_path, "base", tmp_path, step="last", doctor=False):
            raise AssertionError("it began")

    with pytest.raises(JobFolderError, match="Canceled"):
        asyncio.run(run())


def test_a_run_that_takes_too_long_is_ended(tmp_path):
    async def run():
        verifier = Verifier("cpu", 0.05, {})
        async for _ in verifier.run("one", JOB, "none", tmp_path, step="last", doctor=False):
            pass

    with pytest.raises(JobFolderError, match=r"longer than 0\.05 seconds"):
        asyncio.run(run())
