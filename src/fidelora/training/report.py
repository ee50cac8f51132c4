"""HTML report of a verification: one self-contained page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fidelora.training.judge import Pixels
from fidelora.training.verify import CheckedSample

AMPLIFY = 16  # makes a difference of one level visible
_MIN_SIDE = 384  # pixels; smaller images are enlarged


def html_report(document: Mapping[str, Any], samples: Sequence[CheckedSample]) -> str:
    """Return the page, with all images embedded.

    Args:
        document: the object that `fidelora verify --json` prints; the page shows its settings and
            versions.
        samples: samples in the order in which the page shows them.
    """
    parts = []
    for name in dict.fromkeys(sample.plan.round for sample in samples):
        parts.append("<h2>First samples</h2>" if name == "first" else f"<h2>Step {name}</h2>")
        parts += [_section(sample) for sample in samples if sample.plan.round == name]
    doctor = document["doctor"]
    diagnosis = (
        f"<p class=doctor><b>Doctor: {_escape(doctor['cause'])}</b> {_escape(doctor['fix'])}</p>"
        if doctor
        else ""
    )
    facts = {key: document[key] for key in ("base_model", "base_sha256", "versions", "settings")}
    return _PAGE.format(
        title=_escape(f"{document['job']}: {document['verdict']}"),
        run=_escape(document["job"]),
        verdict=_escape(document["verdict"]),
        doctor=diagnosis,
        sections="\n".join(parts),
        facts=_escape(json.dumps(facts, indent=2, ensure_ascii=False)),
    )


def _section(sample: CheckedSample) -> str:
    recipe = sample.plan.recipe
    trainer, replayed = _data_url(sample.trainer), _data_url(sample.replayed)
    settings = (
        f"{recipe.width}x{recipe.height}, seed {recipe.seed}, {recipe.steps} steps, "
        f"guidance {recipe.guidance_scale:g}"
    )
    figures = [_figure("trainer", trainer), _figure("replayed", replayed)]
    if sample.comparison is not None:
        difference = (
            np.abs(sample.replayed.astype(np.int16) - sample.trainer.astype(np.int16)) * AMPLIFY
        )
        amplified = _data_url(difference.clip(0, 255).astype(np.uint8))
        figures.append(_figure(f"difference, amplified {AMPLIFY} times", amplified))
        figures.append(
            '<figure class=wipe style="--at:50%"><div>'
            f'<img alt="" src="{trainer}"><img alt="" class=top src="{replayed}"></div>'
            "<input type=range min=0 max=100 value=50 "
            'aria-label="wipe between trainer and replayed" '
            "oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\">"
            "<figcaption>replayed | trainer</figcaption></figure>"
        )
    reason = f"<p class=reason>{_escape(sample.reason)}</p>" if sample.reason else ""
    return (
        f'<section id="s{sample.plan.step}_{sample.plan.index}" class={sample.verdict.value}>'
        f"<h3>Sample {sample.plan.index}: {_escape(sample.summary)}</h3>"
        f"<p>{_escape(settings)}</p><p class=prompt>{_escape(recipe.prompt)}</p>"
        f"<div class=row>{''.join(figures)}</div>{reason}</section>"
    )


def _figure(label: str, data_url: str) -> str:
    caption = f"<figcaption>{label}</figcaption>"
    return f'<figure><img alt="{label}" src="{data_url}">{caption}</figure>'


def _data_url(pixels: Pixels) -> str:
    """Return the image as a lossless data URL; small images are enlarged by a whole factor."""
    factor = max(1, _MIN_SIDE // max(pixels.shape[:2]))
    image = Image.fromarray(pixels)
    if factor > 1:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _escape(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 110rem; margin: 0 auto; padding: 1rem; }}
section {{ border-left: .4rem solid; padding: .2rem 1rem; margin: 1rem 0; }}
section.identical {{ border-color: #2e9e5b; }}
section.rounding {{ border-color: #c99700; }}
section.undecided {{ border-color: #6b7bd6; border-left-style: dashed; }}
section.mismatch {{ border-color: #d33; }}
h3, .prompt {{ overflow-wrap: anywhere; }} .prompt {{ font-style: italic; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
figure {{ margin: 0; max-width: 100%; }}
img {{ display: block; max-width: 100%; height: auto; image-rendering: pixelated; }}
.wipe div {{ position: relative; }}
.wipe .top {{ position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0); }}
.wipe input {{ width: 100%; margin: .3rem 0 0; }}
figcaption, .reason {{ font-size: .85rem; opacity: .8; }} pre {{ overflow: auto; }}
</style></head><body>
<h1>{run}: {verdict}</h1>
{doctor}
{sections}
<h2>Settings and versions</h2>
<pre>{facts}</pre>
</body></html>
"""
