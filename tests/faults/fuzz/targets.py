"""Functions that read untrusted bytes as the program does, for `make fuzz` and the test suite.

Each returns for input that is read or refused with a `FideloraError`, and raises for a fault. None
of them imports torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping

from fidelora.adapters.peft_metadata import PeftMetadata
from fidelora.adapters.tensor_names import modules_of, noise_of_trainer, trainer_version
from fidelora.errors import FideloraError
from fidelora.families import get_family
from fidelora.images.other_programs import read_other_program
from fidelora.images.parameters import Parameters, parameters_text, read_parameters
from fidelora.images.read import recipe_of
from fidelora.loras.describe import describe_header
from fidelora.recipe import AdapterRef, Recipe
from fidelora.safetensors_header import read_header
from fidelora.training.flags import split_flags

MAX_MESSAGE_BYTES = 2000
_FAMILY = get_family("sd15")
_TEXT_KEYS = ("parameters", "invokeai_metadata")
_NAME = "lora.safetensors"


def check_message(error: BaseException) -> None:
    """Raise if an error is not of Fidelora, or its message is long or not printable."""
    if not isinstance(error, FideloraError):
        raise error
    message = str(error)
    assert message, f"{type(error).__name__} has no message"
    assert message.isprintable(), f"{type(error).__name__} has a message with control characters"
    size_bytes = len(message.encode())
    assert size_bytes <= MAX_MESSAGE_BYTES, f"{type(error).__name__} has {size_bytes:,} bytes"


def read_safetensors_header(data: bytes) -> None:
    """Read a file's header, its module names, its summary and the scales in its metadata."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            header = read_header(file, _NAME)
            describe_header(header, _NAME)
            trainer_version(header.metadata)
            noise_of_trainer(header.metadata)
            modules = modules_of(header, _NAME)
            metadata = PeftMetadata(header.metadata, _NAME)
            for module in modules:
                metadata.alpha_of(module)
                metadata.divisor(module, 4)
        except FideloraError as error:
            check_message(error)


def read_parameters_text(data: bytes) -> None:
    """Read the parameters of AUTOMATIC1111, SwarmUI and InvokeAI, and make a recipe of them."""
    text = _text(data)
    found = [read_parameters(text, _FAMILY, with_emphasis=weighs) for weighs in (False, True)]
    others = (read_other_program({key: text}, _FAMILY) for key in _TEXT_KEYS)
    for parameters in (*found, *filter(None, others)):
        _make_recipe(parameters)


def read_flags(data: bytes) -> None:
    """Split a prompt of a training run into the prompt and its flags."""
    try:
        prompt, settings = split_flags(_text(data))
        assert "--" not in prompt
        assert all(isinstance(value, str | int | float) for value in settings.values())
    except FideloraError as error:
        check_message(error)


def read_recipe(data: bytes) -> None:
    """Read a recipe and the record of an image; write the recipe and read it again."""
    text = _text(data)
    try:
        _check_recipe(Recipe.from_json(text))
    except FideloraError as error:
        check_message(error)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict) and "recipe" in record:
        try:
            _check_recipe(recipe_of(record)[0])
        except FideloraError as error:
            check_message(error)


def _make_recipe(parameters: Parameters) -> None:
    adapters = [AdapterRef("0" * 64) for _ in parameters.loras]
    for ignored in parameters.ignored:
        f"{ignored.name} {ignored.value} {ignored.reason}".encode()
    try:
        recipe = parameters.recipe(adapters)
    except FideloraError as error:
        check_message(error)
        return
    _check_recipe(recipe)


def _check_recipe(recipe: Recipe) -> None:
    written = recipe.to_json()
    written.encode()
    again = Recipe.from_json(written)
    # The JSON form shortens paths, so only the fields that every recipe keeps are equal.
    assert again.to_json() == written
    parameters_text(recipe, {"fidelora": "1"}).encode()


def _text(data: bytes) -> str:
    """Return any text that a file or a request can contain, including lone surrogates."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "safetensors_header": read_safetensors_header,
    "parameters": read_parameters_text,
    "flags": read_flags,
    "recipe": read_recipe,
}
"""Functions by the names of their corpora."""
