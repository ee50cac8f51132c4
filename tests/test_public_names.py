"""The public interface: names, errors, and model families from other packages."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
from tests.support import TINY_BASE

import fidelora
from fidelora import Recipe, errors
from fidelora.families import all_families, get_family, registry


def test_the_public_names_are_complete():
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


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = fidelora.Pipeline


def test_every_error_is_in_one_tree_and_has_a_default_message():
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 20
    for error in classes:
        assert issubclass(error, errors.FideloraError)
        assert str(error()).endswith(".")


class FakeEntryPoint:
    name = "another"

    def __init__(self, found: object) -> None:
        self._found = found

    def load(self) -> object:
        return self._found


@pytest.fixture
def install_family(monkeypatch):
    """Return a function that installs a package that adds a family."""

    def install(found: object) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [FakeEntryPoint(found)])
        registry.all_families.cache_clear()

    yield install
    registry.all_families.cache_clear()


def test_another_package_adds_a_family_by_an_entry_point(install_family):
    install_family(replace(get_family("sd15"), id="sd15-of-others"))
    assert list(all_families())[-1] == "sd15-of-others"
    recipe = Recipe(prompt="a ball", model="sd15-of-others", base_model=str(TINY_BASE), width=64)
    assert recipe.model == "sd15-of-others"


def test_a_model_id_cannot_be_registered_twice(install_family):
    install_family(get_family("sd15"))
    with pytest.raises(ValueError, match="have the id 'sd15'"):
        all_families()


def test_an_entry_point_that_is_not_a_family_is_refused(install_family):
    install_family("sd15")
    with pytest.raises(TypeError, match="another is a str, not a Family"):
        all_families()


def test_every_sampler_of_the_trainer_exists():
    samplers = get_family("sd15").samplers.values()
    assert " ".join(one.name for one in samplers if one.in_trainer) == (
        "ddpm ddim pndm lms k_lms euler k_euler euler_a dpmsolver dpmsolver++ k_dpmsolver "
        "k_dpmsolver++ dpmsingle heun dpm_2 dpm_2_a lcm"
    )
