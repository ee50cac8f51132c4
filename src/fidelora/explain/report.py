"""HTML report of explanations: one self-contained page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from fidelora.explain.differences import Difference
from fidelora.explain.document import always_sentence, document_of
from fidelora.explain.explain import Explanation
from fidelora.training.judge import Pixels
from fidelora.training.report import AMPLIFY

_COLUMNS = ("cause", "in the program", "in training", "effect, levels", "advice")
_MIN_SIDE = 384  # pixels; smaller images are enlarged


def html_report(run_name: str, explanations: Sequence[Explanation]) -> str:
    """Return the page, with all images embedded."""
    sections = "\n".join(part for one in explanations for part in _section(one))
    return _PAGE.format(title=html.escape(f"{run_name}: why pictures differ"), sections=sections)


def _section(explanation: Explanation) -> Iterator[str]:
    name = html.escape(explanation.picture.name)
    plan = explanation.alignment.plan
    state = "same" if explanation.is_same else "explained" if explanation.is_explained else "open"
    yield f"<section class={state}><h2>{name}</h2>"
    program = f"{explanation.program} {explanation.reading.version}".strip()
    yield (
        f"<p>{html.escape(program)}; "
        f"compared with sample {plan.index} of step {plan.round}. Mean difference: "
        f"{explanation.before:.2f} levels before, {explanation.after:.2f} with the simulated "
        "settings.</p><div class=row>"
    )
    for label, pixels in (
        ("the picture", explanation.picture.pixels),
        ("trainer's sample", explanation.trainer),
        ("nearest simulated picture", explanation.simulated),
    ):
        yield _figure(label, pixels)
    is_same_size = explanation.simulated.shape == explanation.picture.pixels.shape
    rest = np.zeros(0, np.uint8)
    if is_same_size:
        wide = explanation.simulated.astype(np.int16) - explanation.picture.pixels
        rest = (np.abs(wide) * AMPLIFY).clip(0, 255).astype(np.uint8)
    if rest.any():
        yield _figure(f"remaining difference, amplified {AMPLIFY} times", rest)
    yield "</div>"
    if is_same_size and not rest.any():
        yield "<p>No difference remains: the simulated picture has the same pixels.</p>"
    yield from _table(explanation.chosen)
    if explanation.always:
        yield f"<p>{html.escape(always_sentence(explanation))}</p>"
        yield from _table(explanation.always)
    for note in explanation.notes:
        yield f"<p class=note>{html.escape(note)}</p>"
    facts = json.dumps(document_of(explanation), indent=2, ensure_ascii=False)
    yield f"<details><summary>All figures</summary><pre>{html.escape(facts)}</pre></details>"
    yield "</section>"


def _table(differences: Sequence[Difference]) -> Iterator[str]:
    if not differences:
        return
    yield "<table><tr>" + "".join(f"<th>{name}" for name in _COLUMNS)
    for one in differences:
        effect = "not measured" if one.effect is None else f"{one.effect:.2f}"
        cells = (one.cause, one.theirs, one.ours, effect, one.advice)
        yield "<tr>" + "".join(
            f'<td data-column="{name}">{html.escape(cell)}'
            for name, cell in zip(_COLUMNS, cells, strict=True)
        )
    yield "</table>"


def _figure(label: str, pixels: Pixels) -> str:
    factor = max(1, _MIN_SIDE // max(pixels.shape[:2]))
    image = Image.fromarray(pixels)
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        image = image.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(label)
    picture = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 110rem; margin: 0 auto; padding: 1rem; }}
section {{ border-left: .4rem solid; padding: .2rem 1rem; margin: 1rem 0; }}
section.same {{ border-color: #2e9e5b; }}
section.explained {{ border-color: #c99700; }}
section.open {{ border-color: #d33; }}
h2, td {{ overflow-wrap: anywhere; }} td, th {{ text-align: left; padding: .2rem .8rem .2rem 0; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
figure {{ margin: 0; max-width: 100%; }}
img {{ display: block; max-width: 100%; height: auto; image-rendering: pixelated; }}
figcaption, .note {{ font-size: .85rem; opacity: .8; }} pre {{ overflow: auto; }}
@media (max-width: 40rem) {{
  h1, h2 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
  th {{ display: none; }}
  table, tbody, tr, td {{ display: block; }}
  tr {{ padding: .4rem 0; }}
  td::before {{ content: attr(data-column) ": "; opacity: .8; }}
}}
</style></head><body>
<h1>{title}</h1>
{sections}
</body></html>
"""
