"""The *Make* tab: sends the form as a request, follows requests and shows their images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from fidelora.errors import FideloraError, UsageError
from fidelora.server.context import ServerContext
from fidelora.server.page.bases import base_side, served_families
from fidelora.server.page.downloads import download_link
from fidelora.server.page.events import IMMEDIATE, STREAMING
from fidelora.server.page.form import build_request, notes_on_form
from fidelora.server.page.handlers import for_visitor
from fidelora.server.page.html import notice
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_form import MakeForm
from fidelora.server.page.make_prompts import PromptInputs
from fidelora.server.page.make_results import SNIPPETS, MakeResults
from fidelora.server.page.make_settings import MAX_IMAGES, SettingsInputs
from fidelora.server.page.pictures import Pictures
from fidelora.server.page.prompt_history import add_prompt, history_choices, read_history
from fidelora.server.page.recipe_loader import RecipeLoader
from fidelora.server.page.request_queue import RequestQueue, Session
from fidelora.server.page.snippets import request_route
from fidelora.server.page.visitor import visitor
from fidelora.server.submit import submit


class MakeTab:
    """Components and event handlers of the tab; created inside a `gr.Blocks`."""

    def __init__(self, context: ServerContext, pictures: Pictures, lora_list: LoraList) -> None:
        self._context = context
        self._pictures = pictures
        self._lora_list = lora_list
        self._queue = RequestQueue(context.store, context.watcher)
        families = served_families(context)
        sides = {family.id: base_side(context, family) for family in families}
        # On a narrow screen, the results come between the buttons and the settings (style.css).
        with gr.Row(equal_height=False, elem_id="make"):
            with gr.Column(min_width=0, elem_id="make-prompts"):
                self.prompts = prompts = PromptInputs(lora_list)
            with gr.Column(min_width=0, elem_id="make-results"):
                self.results = results = MakeResults()
            with gr.Column(min_width=0, elem_id="make-settings"):
                self.settings = settings = SettingsInputs(
                    families, sides[families[0].id], context.settings.fidelity
                )
        self.form = MakeForm(prompts, settings, lora_list, sides)
        self.loader = RecipeLoader(context, lora_list, self.form)
        self._outputs: dict[str, Any] = {
            "error": prompts.error,
            "progress": prompts.progress,
            "waiting": prompts.waiting,
            "cancel": prompts.cancel,
            "cancel_all": prompts.cancel_all,
            "history": prompts.history,
            "stored_history": prompts.stored_history,
            "preview": results.preview,
            "empty": results.empty,
            "gallery": results.gallery,
            "remembered": results.remembered,
            "actions": results.actions,
            "download": results.download,
            "reuse_seed": settings.reuse_seed,
            "details": results.details,
            **results.snippets,
        }

    def listen(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Connect the event handlers."""
        form, prompts, results = self.form, self.prompts, self.results
        session, outputs = results.session, list(self._outputs.values())
        form.listen()
        self.loader.listen(prompts, self.settings)
        # Not on focus: an update of the list while the user chooses would undo the choice.
        gr.on(
            [page.load, tab.select],
            for_visitor(self._refresh_loras),
            None,
            prompts.loras,
            **IMMEDIATE,
        )
        # A request may be sent while others are followed, so the events do not wait for each other.
        repeated: dict[str, Any] = {"trigger_mode": "multiple"}
        page.load(
            for_visitor(self._restore),
            [session, results.remembered, prompts.stored_history],
            outputs,
            **IMMEDIATE,
        ).then(for_visitor(self._follow), session, outputs, **STREAMING, **repeated)
        page.load(for_visitor(self._restore_form), form.stored, form.outputs, **IMMEDIATE)
        gr.on(
            [
                prompts.generate.click,
                form.fields["trigger_word"].submit,
                form.fields["neg"].submit,
                self.settings.seed.submit,
            ],
            for_visitor(self._generate),
            [session, prompts.stored_history, *form.inputs],
            outputs,
            **IMMEDIATE | repeated,
        ).then(for_visitor(self._follow), session, outputs, **STREAMING, **repeated)
        for button, cancel in (
            (prompts.cancel, self._queue.cancel),
            (prompts.cancel_all, self._queue.cancel_all),
        ):
            button.click(for_visitor(cancel), session, None, **IMMEDIATE)
        prompts.cancel_one.input(
            for_visitor(self._queue.cancel_one),
            [session, prompts.cancel_one],
            None,
            **IMMEDIATE | repeated,
        )
        prompts.history.input(
            self._use_prompt,
            [prompts.history, prompts.stored_history],
            [prompts.history, form.fields["prompt"], form.fields["neg"]],
            **IMMEDIATE,
        )
        results.gallery.select(
            for_visitor(self._select), session, list(results.snippets.values()), **IMMEDIATE
        )
        results.use.click(for_visitor(self._use_settings), session, form.outputs, **IMMEDIATE)
        self.settings.reuse_seed.click(
            for_visitor(self._selected_seed), session, self.settings.seed, **IMMEDIATE
        )

    def _refresh_loras(self) -> Any:
        return gr.update(choices=self._lora_list.choices())

    # --- requests --------------------------------------------------------------------------

    async def _generate(self, session: Session, history: object, *values: Any) -> list[Any]:
        """Send the form as a request, after those that are pending."""
        try:
            form = self.form.read(values)
            if form.images > MAX_IMAGES:
                raise UsageError(
                    f"Images: choose a number from 1 to {MAX_IMAGES}, not {form.images}."
                )
            job = await submit(self._context, visitor(), build_request(form))
        except FideloraError as error:
            # The progress of an earlier request, or the first hint, is not about this one.
            old = {} if session.pending else {"progress": ""}
            return self._updates(error=notice(error, "error"), **old)
        if not session.pending:
            session.ended.clear()
        session.pending.append(job.id)
        session.ended += map(notice, [*job.notes, *notes_on_form(form)])
        entries = add_prompt(read_history(history), form.fields["prompt"], form.fields["neg"])
        return self._updates(
            error="",
            stored_history=entries,
            history=gr.update(choices=history_choices(entries), value=None, visible=bool(entries)),
            **self._pending(session),
        )

    async def _follow(self, session: Session) -> AsyncIterator[list[Any]]:
        """Show the progress of the pending requests, and their images."""
        yield self._updates()  # a handler that yields nothing would clear its outputs
        waiting: str | None = None
        try:
            async for update in self._queue.follow(session):
                preview = gr.update(value=update.previews, visible=bool(update.previews))
                values = {
                    "progress": update.progress,
                    "preview": preview,
                    **self._pending(session),
                }
                if update.waiting != waiting:  # an unneeded update would take the focus away
                    values["waiting"] = waiting = update.waiting
                if update.succeeded:
                    new = [image for job in update.succeeded for image in self._pictures.of(job)]
                    session.shown = [*new, *session.shown]
                    values |= await run_in_threadpool(self._gallery, session)
                    values |= self._pending(session)
                yield self._updates(**values)
        except FideloraError as error:
            yield self._updates(error=notice(error, "error"))

    async def _restore(self, session: Session, remembered: object, history: object) -> list[Any]:
        """Restore prompts, images and pending requests from before a reload."""
        session.restore(remembered)
        values = self._pending(session)
        if session.shown:
            values |= await run_in_threadpool(self._gallery, session)
        entries = read_history(history)
        choices = gr.update(choices=history_choices(entries), visible=bool(entries))
        return self._updates(history=choices, **values)

    def _restore_form(self, stored: object) -> list[Any]:
        models = [family.id for family in served_families(self._context)]
        return self.form.restore(stored, models)

    def _pending(self, session: Session) -> dict[str, Any]:
        return {
            "remembered": session.remembered(),
            "cancel": gr.update(interactive=bool(session.pending)),
            "cancel_all": gr.update(visible=len(session.pending) > 1),
        }

    def _use_prompt(self, index: int | None, history: object) -> list[Any]:
        entries = read_history(history)
        if index is None or index >= len(entries):
            return [gr.skip(), gr.skip(), gr.skip()]
        return [gr.update(value=None), *entries[index]]

    # --- finished images -------------------------------------------------------------------

    def _gallery(self, session: Session) -> dict[str, Any]:
        """Return the updates that show the images, with the newest one selected."""
        shown, files = self._pictures.gallery(session.shown)
        session.shown, session.selected = shown, 0
        return {
            "gallery": gr.update(value=files, selected_index=None, visible=bool(files)),
            "empty": gr.update(visible=not files),
            "actions": gr.update(visible=bool(files)),
            "download": download_link(shown),
            "details": gr.update(visible=bool(files)),
            "reuse_seed": gr.update(interactive=bool(files)),
            **self._snippets(session),
        }

    def _select(self, event: gr.SelectData, session: Session) -> list[Any]:
        is_valid = isinstance(event.index, int) and event.index < len(session.shown)
        session.selected = event.index if is_valid else 0
        snippets = self._snippets(session)
        return [snippets.get(name, gr.skip()) for name in SNIPPETS]

    def _use_settings(self, session: Session) -> list[Any]:
        if session.selected >= len(session.shown):
            return self.form.message(notice("Choose an image.", "error"))
        try:
            recipe = self._pictures.recipe(session.shown[session.selected])
            return self.loader.show_recipe(*recipe)
        except FideloraError as error:
            return self.form.message(notice(error, "error"))

    def _selected_seed(self, session: Session) -> Any:
        try:
            recipe, _ = self._pictures.recipe(session.shown[session.selected])
        except (FideloraError, IndexError):  # removed in the meantime
            return gr.skip()
        return str(recipe.seed)

    def _snippets(self, session: Session) -> dict[str, Any]:
        try:
            recipe, image_format = self._pictures.recipe(session.shown[session.selected])
        except (FideloraError, IndexError):  # removed in the meantime
            return {}
        values: dict[str, Any] = dict(self._pictures.snippets(recipe, image_format))
        values["request"] = gr.update(value=values["request"], label=request_route(recipe))
        return values

    def _updates(self, **values: Any) -> list[Any]:
        """Return an update of every output; those not named keep their value."""
        assert values.keys() <= self._outputs.keys()
        return [values.get(name, gr.skip()) for name in self._outputs]
