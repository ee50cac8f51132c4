"""The tab *Make*: the form, the progress of what it asked for, and the images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from fidelora.errors import FideloraError, ImageRecordError, JobNotFoundError, WrongUseError
from fidelora.families import all_families, get_family
from fidelora.images.read import read_origin
from fidelora.jobs.job import Job, Status
from fidelora.recipe import MAX_STEPS, Recipe
from fidelora.server.context import ServerContext
from fidelora.server.middleware import MAX_IMAGE_BYTES
from fidelora.server.page.form import (
    MAX_LORAS,
    Form,
    defaults,
    differences,
    form_of,
    read_seed,
    recipe_again,
    request_of,
)
from fidelora.server.page.html import notice, progress_of
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.pictures import Pictures, Shown
from fidelora.server.submit import defaults_for, submit

_LOOK_EVERY_S = 0.2
_MAX_IMAGES = 16
_GUIDANCE = (0, 20)  # the HTTP API's range

Values = tuple[Any, ...]


class Make:
    """The tab's components; built inside a `gr.Blocks`, and wired by `listen`."""

    def __init__(self, context: ServerContext, pictures: Pictures, library: LoraList) -> None:
        self._context = context
        self._pictures = pictures
        self._library = library
        self._first = next(iter(all_families()))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._build_form()
            with gr.Column(scale=6, min_width=320):
                self._build_results()

    def _build_form(self) -> None:
        self.loras = gr.Dropdown(
            [], multiselect=True, max_choices=MAX_LORAS, filterable=True, label="LoRAs", elem_id="loras",
            info="Type to search by name, trigger word, rank or step. They are applied in this order.",
        )  # fmt: skip
        self.multipliers = [
            gr.Slider(
                -2,
                2,
                1,
                step=0.05,
                visible=False,
                label=f"Multiplier {index + 1}",
                elem_id=f"multiplier-{index}",
            )
            for index in range(MAX_LORAS)
        ]
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=10, elem_id="prompt", placeholder="a photo of [trigger]",
            info="[trigger] becomes the trigger word.",
        )  # fmt: skip
        with gr.Row():
            self.trigger = gr.Textbox(
                label="Trigger word", elem_id="trigger", min_width=140, scale=1
            )
            self.negative = gr.Textbox(
                label="Negative prompt", elem_id="negative", min_width=140, scale=2
            )
        with gr.Row():
            self.go = gr.Button(
                "Generate", variant="primary", elem_id="generate", scale=3, min_width=140
            )
            self.cancel = gr.Button(
                "Cancel",
                variant="stop",
                interactive=False,
                elem_id="cancel",
                scale=1,
                min_width=100,
            )
        with gr.Accordion("Settings", open=True):
            self._build_settings()
        self.image = gr.File(
            label="Drop an image to load its recipe", file_types=[".png", ".jpg", ".jpeg", ".webp"], height=150,
            elem_id="recipe-image",
        )  # fmt: skip
        self.loaded = gr.Markdown(latex_delimiters=[], elem_id="loaded")

    def _build_settings(self) -> None:
        spec, start = get_family(self._first), defaults(self._first)
        models = [(one.title, one.id) for one in all_families().values()]
        with gr.Row():
            self.model = gr.Dropdown(
                models, value=spec.id, label="Model", elem_id="model", min_width=140, scale=3
            )
            self.sampler = gr.Dropdown(
                list(spec.samplers),
                value=start["sampler"],
                label="Sampler",
                elem_id="sampler",
                min_width=140,
                scale=2,
            )
        with gr.Row(elem_classes="four"):
            self.steps = gr.Number(
                start["steps"],
                label="Steps",
                precision=0,
                minimum=1,
                maximum=MAX_STEPS,
                elem_id="steps",
                min_width=60,
            )
            self.guidance = gr.Number(
                start["guidance"], label="Guidance", minimum=_GUIDANCE[0], maximum=_GUIDANCE[1], step=0.5,
                elem_id="guidance", min_width=60,
            )  # fmt: skip
            self.width = gr.Number(
                start["width"],
                label="Width",
                precision=0,
                step=spec.resolution_divisor,
                elem_id="width",
                min_width=60,
            )
            self.height = gr.Number(
                start["height"],
                label="Height",
                precision=0,
                step=spec.resolution_divisor,
                elem_id="height",
                min_width=60,
            )
        with gr.Row(elem_classes="four"):
            self.seed = gr.Textbox(
                str(spec.default_seed),
                label="Seed",
                placeholder="random",
                elem_id="seed",
                min_width=60,
            )
            self.number = gr.Number(
                1,
                label="Images",
                precision=0,
                minimum=1,
                maximum=_MAX_IMAGES,
                elem_id="number",
                min_width=60,
            )
            self.fidelity = gr.Dropdown(
                ["exact", "fast"],
                value=self._context.settings.fidelity,
                label="Fidelity",
                elem_id="fidelity",
                min_width=60,
            )
            self.image_format = gr.Dropdown(
                ["png", "jpeg", "webp"], value="png", label="Format", elem_id="format", min_width=60
            )
        gr.Markdown(
            "An empty seed is a random one, and several images count it up. "
            "*exact* is the trainer's picture to the bit, *fast* nearly so.",
            elem_classes="help",
        )

    def _build_results(self) -> None:
        self.progress = gr.Markdown(
            notice("Choose a LoRA, write a prompt, and generate."),
            latex_delimiters=[],
            elem_id="progress",
        )
        self.gallery = gr.Gallery(
            label="Images", columns=2, fit_columns=False, object_fit="contain", height="auto", interactive=False, elem_id="gallery",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        self.use = gr.Button("Use this image's settings", visible=False, elem_id="use", size="sm")
        with (
            gr.Accordion("Recipe of the image", open=True, visible=False) as self.details,
            gr.Tabs(),
        ):
            with gr.Tab("Recipe"):
                self.recipe_text = gr.Code(
                    language="json", label="Recipe", elem_id="recipe", max_lines=20
                )
            with gr.Tab("Request"):
                self.request_text = gr.Code(
                    language="json", label="POST /v1/inference", elem_id="request", max_lines=20
                )
            with gr.Tab("CLI"):
                self.command_text = gr.Code(
                    language="shell",
                    label="Command line",
                    elem_id="command",
                    max_lines=20,
                    wrap_lines=True,
                )
            with gr.Tab("Python"):
                self.python_text = gr.Code(
                    language="python", label="Python", elem_id="python", max_lines=20
                )
        self.job = gr.State("")
        # Lists report an input also when somebody only passes over them with the keyboard; what is known tells whether it is one.
        self.known = gr.State((self._first, []))
        self.shown = gr.State([])
        self.chosen = gr.State(0)
        self.remembered = gr.BrowserState([], storage_key="fidelora-images", secret="images")

    @property
    def values(self) -> list[Any]:
        """The components whose values are the form."""
        return [
            self.loras, *self.multipliers, self.trigger, self.prompt, self.negative, self.model, self.sampler, self.steps,
            self.guidance, self.width, self.height, self.seed, self.number, self.fidelity, self.image_format,
        ]  # fmt: skip

    @property
    def _results(self) -> list[Any]:
        copies = [self.recipe_text, self.request_text, self.command_text, self.python_text]
        return [
            self.progress, self.gallery, self.shown, self.remembered, self.job, self.go, self.cancel, self.use, self.details,
            self.chosen, *copies,
        ]  # fmt: skip

    def listen(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Connect what happens to what is done."""
        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "queue": False,
            "api_visibility": "private",
        }
        long: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        # Not on focus: new entries would arrive while somebody chooses, and undo it.
        gr.on([page.load, tab.select], self._list_loras, None, self.loras, **quick)
        page.load(self._restore, self.remembered, self._results, **long)
        changes = [self.known, self.loras, self.trigger, *self.multipliers]
        self.loras.input(
            self._loras_changed, changes, [self.known, *self.multipliers, self.trigger], **quick
        )
        self.model.input(
            self._model_changed,
            [self.known, self.model],
            [self.known, self.sampler, self.steps, self.guidance, self.width, self.height],
            **quick,
        )
        gr.on(
            [self.go.click, self.trigger.submit, self.negative.submit, self.seed.submit],
            self._generate, [self.job, self.shown, *self.values], self._results, **long,
        )  # fmt: skip
        self.cancel.click(self._cancel, self.job, self.cancel, **quick)
        self.gallery.select(self._selected, self.shown, self._results[-5:], **quick)
        self.use.click(
            self._use, [self.shown, self.chosen], [self.loaded, self.known, *self.values], **quick
        )
        self.image.upload(
            self._load_image, self.image, [self.loaded, self.known, *self.values], **quick
        )

    def form(self, values: Values) -> Form:
        """What the components hold.

        Raises:
            WrongUseError: the seed is no number, or a number is missing.
        """
        loras, multipliers = values[0] or [], values[1 : 1 + MAX_LORAS]
        (
            trigger,
            prompt,
            negative,
            model,
            sampler,
            steps,
            guidance,
            width,
            height,
            seed,
            number,
            fidelity,
            image_format,
        ) = values[1 + MAX_LORAS :]
        numbers = {
            "Steps": steps,
            "Guidance": guidance,
            "Width": width,
            "Height": height,
            "Images": number,
        }
        numbers |= {
            f"Multiplier of {lora}": multiplier
            for lora, multiplier in zip(loras, multipliers, strict=False)
        }
        if empty := [name for name, value in numbers.items() if not isinstance(value, int | float)]:
            raise WrongUseError(f"{empty[0]} is empty; give a number.")
        return Form(
            loras=tuple(zip(loras, multipliers, strict=False)),
            trigger=trigger,
            prompt=prompt,
            negative=negative,
            model=model,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            seed=read_seed(seed),
            number=number,
            fidelity=fidelity,
            image_format=image_format,
        )

    # --- what is done ------------------------------------------------------------------------------------------------------

    def _list_loras(self) -> Any:
        return gr.update(choices=self._library.choices())

    def _loras_changed(
        self, known: tuple[str, list[str]], names: list[str], trigger: str, *multipliers: Any
    ) -> list[Any]:
        names = names or []
        if names == known[1]:
            return [gr.skip()] * (MAX_LORAS + 2)
        before = dict(
            zip(known[1], multipliers, strict=False)
        )  # a multiplier belongs to its LoRA, wherever that is now
        sliders = [
            gr.update(value=before.get(name, 1.0), visible=True, label=f"Multiplier of {name}")
            for name in names
        ]
        sliders += [gr.update(value=1.0, visible=False)] * (MAX_LORAS - len(names))
        if trigger in ("", self._library.trigger(known[1])):  # nobody wrote it
            trigger = self._library.trigger(names)
        return [(known[0], names), *sliders, trigger]

    def _model_changed(self, known: tuple[str, list[str]], model: str) -> list[Any]:
        if model == known[0]:
            return [gr.skip()] * 6
        spec, start = get_family(model), defaults(model)
        step = spec.resolution_divisor
        return [
            (model, known[1]),
            gr.update(choices=list(spec.samplers), value=start["sampler"]),
            start["steps"],
            start["guidance"],
            gr.update(value=start["width"], step=step),
            gr.update(value=start["height"], step=step),
        ]

    async def _generate(
        self, followed: str, shown: list[Shown], *values: Any
    ) -> AsyncIterator[list[Any]]:
        try:
            if await run_in_threadpool(
                self._is_running, followed
            ):  # two would undo each other's images
                raise WrongUseError(
                    "The request before this one has not ended; wait for it, or cancel it."
                )
            form = self.form(values)
            if form.number > _MAX_IMAGES:
                yield self._updates(
                    progress=notice(
                        f"Images: {form.number} is not from 1 to {_MAX_IMAGES}.", "error"
                    )
                )
                return
            job = await submit(self._context, request_of(form))
        except FideloraError as error:
            yield self._updates(progress=notice(error, "error"))
            return
        async for update in self._follow(job, shown):
            yield update

    async def _restore(self, remembered: list[Any]) -> AsyncIterator[list[Any]]:
        """After a reload of the page: the images it showed, and the request that it waited for."""
        known = [
            (str(entry[0]), int(entry[1]))
            for entry in remembered or []
            if isinstance(entry, list) and len(entry) == 2
        ]
        running = [job_id for job_id, index in known if index < 0]
        if not running:
            yield self._updates()  # without any, the outputs would be emptied
        else:  # another request meanwhile would be followed beside it, and each would undo the other's images
            yield self._updates(job=running[0], go=gr.update(interactive=False))
        shown, files = await run_in_threadpool(
            self._pictures.gallery, [one for one in known if one[1] >= 0]
        )
        if shown:
            yield self._updates(
                gallery=gr.update(value=files),
                shown=shown,
                remembered=shown,
                **self._chosen(shown, 0),
            )
        for job_id in running:
            try:
                job = await run_in_threadpool(self._context.store.get, job_id)
                async for update in self._follow(job, shown):
                    yield update
                shown = [
                    *self._pictures.of(await run_in_threadpool(self._context.store.get, job_id)),
                    *shown,
                ]
            except JobNotFoundError:  # removed meanwhile
                yield self._updates(remembered=shown)
        if running:
            yield self._updates(
                job="", go=gr.update(interactive=True), cancel=gr.update(interactive=False)
            )

    def _is_running(self, job_id: str) -> bool:
        try:
            return bool(job_id) and not self._context.store.get(job_id).status.final
        except JobNotFoundError:  # removed meanwhile
            return False

    async def _follow(self, job: Job, shown: list[Shown]) -> AsyncIterator[list[Any]]:
        """Every change of a job, until it has ended."""
        yield self._updates(
            job=job.id, cancel=gr.update(interactive=True), remembered=[(job.id, -1), *shown]
        )
        seen: tuple[int, int | None] | None = None
        while True:
            waits = job.status is Status.IN_QUEUE
            position = (
                await run_in_threadpool(self._context.store.queue_position, job.id)
                if waits
                else None
            )
            if seen != (job.version, position):
                seen = (job.version, position)
                if job.status.final:
                    break
                yield self._updates(progress=progress_of(job, position))
            await asyncio.sleep(_LOOK_EVERY_S)
            job = await run_in_threadpool(self._context.store.get, job.id)
        end: dict[str, Any] = {
            "progress": progress_of(job, None),
            "job": "",
            "cancel": gr.update(interactive=False),
        }
        if job.status is Status.SUCCEEDED:
            shown, files = await run_in_threadpool(
                self._pictures.gallery, [*self._pictures.of(job), *shown]
            )
            end |= {
                "gallery": gr.update(value=files, selected_index=None),
                "shown": shown,
            } | self._chosen(shown, 0)
        yield self._updates(remembered=shown, **end)

    def _cancel(self, job_id: str) -> Any:
        if job_id:
            self._context.store.cancel(job_id, datetime.now(UTC))
        return gr.update(interactive=False)

    def _selected(self, event: gr.SelectData, shown: list[Shown]) -> list[Any]:
        index = event.index if isinstance(event.index, int) and event.index < len(shown) else 0
        return [index, *self._texts(shown, index)]

    def _use(self, shown: list[Shown], chosen: int) -> list[Any]:
        if chosen >= len(shown):
            return self._not_filled_in("Choose an image.")
        try:
            return self._filled_in(*self._pictures.recipe(shown[chosen]))
        except FideloraError as error:
            return self._not_filled_in(error)

    def _load_image(self, path: str | None) -> list[Any]:
        if path is None:
            return self._not_filled_in("")
        try:
            if (
                Path(path).stat().st_size > MAX_IMAGE_BYTES
            ):  # an upload may have the size of a job's zip
                raise ImageRecordError(
                    f"{Path(path).name} has more than {MAX_IMAGE_BYTES:,} bytes, which no image here has."
                )
            origin = read_origin(Path(path).read_bytes(), Path(path).name)
            if origin.recipe is None:
                raise ImageRecordError(
                    f"{Path(path).name} carries no recipe of Fidelora's: another program made it."
                )
            return self._filled_in(origin.recipe, origin.format)
        except FideloraError as error:
            return self._not_filled_in(error)

    # --- how it is shown ---------------------------------------------------------------------------------------------------

    def _filled_in(self, recipe: Recipe, image_format: str) -> list[Any]:
        """The form with a recipe's values, and whether it makes that very image again."""
        names = [self._library.name_of(adapter) for adapter in recipe.adapters]
        missing = [
            adapter for adapter, name in zip(recipe.adapters, names, strict=True) if name is None
        ]
        if missing:
            which = ", ".join(
                f"{adapter.name or 'without a name'} (sha256 {adapter.sha256})"
                for adapter in missing
            )
            return self._not_filled_in(
                f"The image needs LoRAs that are not on this server: {which}."
            )
        if not names or len(names) > MAX_LORAS:
            return self._not_filled_in(
                f"The image has {len(names)} LoRAs; this form makes images with 1 to {MAX_LORAS}."
            )
        present = [name for name in names if name is not None]
        form = form_of(recipe, present, image_format)
        adapters = [self._library.keep(name) for name in present]
        again = recipe_again(form, adapters, defaults_for(self._context, recipe.model, adapters))
        others = differences(recipe, again)
        if others:
            said = notice(
                f"Loaded, but this server makes another image: {'; '.join(others)}.", "error"
            )
        else:
            said = notice("Loaded: the same recipe, and so the same image.", "good")
        multipliers = [
            gr.update(value=one, visible=True, label=f"Multiplier of {name}")
            for name, one in form.loras
        ]
        multipliers += [gr.update(visible=False)] * (MAX_LORAS - len(multipliers))
        spec = get_family(form.model)
        return [
            said,
            (form.model, present),
            gr.update(choices=self._library.choices(), value=present),
            *multipliers,
            form.trigger,
            form.prompt,
            form.negative,
            form.model,
            gr.update(choices=list(spec.samplers), value=form.sampler),
            form.steps,
            form.guidance,
            form.width,
            form.height,
            str(form.seed),
            form.number,
            form.fidelity,
            form.image_format,
        ]

    def _not_filled_in(self, reason: object) -> list[Any]:
        return [
            notice(reason, "error") if str(reason) else "",
            *[gr.skip()] * (1 + len(self.values)),
        ]

    def _chosen(self, shown: Sequence[Shown], index: int) -> dict[str, Any]:
        texts = self._texts(shown, index)
        visible = gr.update(visible=True)
        return {"use": visible, "details": visible, "chosen": index, "texts": texts}

    def _texts(self, shown: Sequence[Shown], index: int) -> list[Any]:
        try:
            return list(self._pictures.copies(*self._pictures.recipe(shown[index])))
        except (FideloraError, IndexError):  # removed meanwhile
            return [gr.skip()] * 4

    def _updates(
        self,
        progress: Any = None,
        gallery: Any = None,
        shown: Any = None,
        remembered: Any = None,
        job: Any = None,
        go: Any = None,
        cancel: Any = None,
        use: Any = None,
        details: Any = None,
        chosen: Any = None,
        texts: Sequence[Any] | None = None,
    ) -> list[Any]:
        """New values for `_results`; None leaves one as it is."""
        given = [
            progress,
            gallery,
            shown,
            remembered,
            job,
            go,
            cancel,
            use,
            details,
            chosen,
            *(texts or [None] * 4),
        ]
        return [gr.skip() if one is None else one for one in given]
