"""The report of a verification: one HTML page with everything in it, that opens without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fidelora.training.verify import CheckedSample, Pixels, Verdict

AMPLIFY = 16
_SIDE = 384


def html_report(document: Mapping[str, Any], samples: Sequence[CheckedSample]) -> str:
    """The page.

    Args:
        document: what `fidelora verify --json` prints; settings and versions are taken from it.
        samples: in the order in which they are shown.
    """
    parts = []
    for step in dict.fromkeys(sample.plan.step for sample in samples):
        parts.append(f"<h2>Step {step}</h2>")
        parts += [_section(sample) for sample in samples if sample.plan.step == step]
    doctor = document["doctor"]
    said = (
        f"<p class=doctor><b>Doctor: {_text(doctor['cause'])}</b> {_text(doctor['fix'])}</p>"
        if doctor
        else ""
    )
    facts = {key: document[key] for key in ("base_model", "versions", "settings")}
    return _PAGE.format(
        title=_text(f"{document['job']}: {document['verdict']}"),
        job=_text(document["job"]),
        verdict=_text(document["verdict"]),
        doctor=said,
        sections="\n".join(parts),
        facts=_text(json.dumps(facts, indent=2, ensure_ascii=False)),
    )


def _section(sample: CheckedSample) -> str:
    recipe = sample.plan.recipe
    theirs = _data(sample.theirs)
    about = f"{recipe.width}x{recipe.height}, seed {recipe.seed}, {recipe.steps} steps, guidance {recipe.guidance_scale:g}"
    name = f"{sample.plan.step}_{sample.plan.index}"
    figures = [
        f'<figure><img alt="preview" src="{theirs}"><figcaption>preview in training</figcaption></figure>'
    ]
    if sample.comparison is None:
        figures.append(
            f'<figure><img alt="ours" src="{_data(sample.ours)}"><figcaption>ours</figcaption></figure>'
        )
    else:
        ours = _data(sample.ours)
        difference = np.abs(sample.ours.astype(np.int16) - sample.theirs.astype(np.int16)) * AMPLIFY
        shown = _data(difference.clip(0, 255).astype(np.uint8))
        figures += [
            f'<figure><img alt="ours" src="{ours}"><figcaption>ours</figcaption></figure>',
            f'<figure><img alt="difference" src="{shown}"><figcaption>difference, {AMPLIFY} times</figcaption></figure>',
            f'<figure class=wipe style="--at:50%"><div><img alt="" src="{theirs}"><img alt="" class=top src="{ours}"></div>'
            f'<input type=range min=0 max=100 value=50 aria-label="wipe between preview and ours" '
            f"oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\">"
            "<figcaption>ours | preview</figcaption></figure>",
        ]
    bound = ""
    if sample.bound:
        start = (
            "Explained by" if sample.verdict is Verdict.ROUNDING else "More than is explained by"
        )
        bound = f"<p class=bound>{start} this: {_text(sample.bound.reason)}.</p>"
    return (
        f'<section id="s{name}" class={sample.verdict.value}><h3>Sample {sample.plan.index}: {_text(sample.in_words)}</h3>'
        f"<p>{_text(about)}</p><p class=prompt>{_text(recipe.prompt)}</p><div class=row>{''.join(figures)}</div>{bound}</section>"
    )


def _data(pixels: Pixels) -> str:
    """The image inside the page: PNG, so that every pixel is as it was compared; small ones enlarged whole-fold."""
    factor = max(1, _SIDE // max(pixels.shape[:2]))
    image = Image.fromarray(pixels)
    if factor > 1:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 110rem; margin: 0 auto; padding: 1rem; }}
section {{ border-left: .4rem solid; padding: .2rem 1rem; margin: 1rem 0; }}
section.identical {{ border-color: #2e9e5b; }}
section.rounding {{ border-color: #c99700; }}
section.mismatch {{ border-color: #d33; }}
h3, .prompt {{ overflow-wrap: anywhere; }} .prompt {{ font-style: italic; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
figure {{ margin: 0; max-width: 100%; }} img {{ display: block; max-width: 100%; height: auto; image-rendering: pixelated; }}
.wipe div {{ position: relative; }} .wipe .top {{ position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0); }}
.wipe input {{ width: 100%; margin: .3rem 0 0; }} figcaption, .bound {{ font-size: .85rem; opacity: .8; }} pre {{ overflow: auto; }}
</style></head><body>
<h1>{job}: {verdict}</h1>
{doctor}
{sections}
<h2>Settings and versions</h2>
<pre>{facts}</pre>
</body></html>
"""
