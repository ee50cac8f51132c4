"""What other people's code may rely on."""

from __future__ import annotations

import inspect

import pytest

import fidelora
from fidelora import errors
from fidelora.families import all_families, get_family, register


def test_the_public_names_are_these():
    assert sorted(fidelora.__all__) == [
        "AdapterRef",
        "AsyncClient",
        "Client",
        "Engine",
        "FideloraError",
        "GeneratedImage",
        "Origin",
        "Progress",
        "Recipe",
        "__version__",
        "read_origin",
        "read_record",
    ]
    assert dir(fidelora) == sorted(fidelora.__all__)
    assert all(getattr(fidelora, name) is not None for name in fidelora.__all__)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = fidelora.Pipeline


def test_every_error_is_in_one_tree_and_says_something_by_itself():
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 20
    for error in classes:
        assert issubclass(error, errors.FideloraError)
        assert str(error()).endswith(".")


def test_a_model_id_is_registered_once():
    with pytest.raises(ValueError, match="'sd15' is registered already"):
        register(get_family("sd15"))
    assert list(all_families()) == ["sd15", "sdxl"]


def test_every_sampler_of_the_trainer_is_there():
    assert " ".join(get_family("sd15").samplers) == (
        "ddpm ddim pndm lms k_lms euler k_euler euler_a dpmsolver dpmsolver++ k_dpmsolver k_dpmsolver++ "
        "dpmsingle heun dpm_2 dpm_2_a lcm"
    )
