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

from fidelora.training.compare import size_text
from fidelora.training.judge import Pixels
from fidelora.training.verify import CheckedSample

AMPLIFY = 16  # makes a difference of one level visible
_DIFFERENCE = f"difference, amplified {AMPLIFY} times"
_MIN_SIDE = 384  # pixels; smaller images are enlarged


_SHOW_FRAME = (
    "this.nextElementSibling.value = +this.value + 1; "
    "for (const film of this.closest('.row').querySelectorAll('.film div')) "
    "[...film.children].forEach((frame, index) => { "
    "frame.hidden = index != Math.min(this.value, film.children.length - 1); })"
)
"""Handler of the slider of a video: shows the same frame in all figures of the sample."""


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
    settings = (
        f"{size_text(sample.replayed)}, seed {recipe.seed}, {recipe.steps} steps, "
        f"guidance {recipe.guidance_scale:g}"
    )
    is_video = sample.replayed.ndim == 4 or sample.trainer.ndim == 4
    figures = _films(sample) if is_video else _stills(sample)
    reason = f"<p class=reason>{_escape(sample.reason)}</p>" if sample.reason else ""
    return (
        f'<section id="s{sample.plan.step}_{sample.plan.index}" class={sample.verdict.value}>'
        f"<h3>Sample {sample.plan.index}: {_escape(sample.summary)}</h3>"
        f"<p>{_escape(settings)}</p><p class=prompt>{_escape(recipe.prompt)}</p>"
        f"<div class=row>{''.join(figures)}</div>{reason}</section>"
    )


def _stills(sample: CheckedSample) -> list[str]:
    trainer, replayed = _data_url(sample.trainer), _data_url(sample.replayed)
    figures = [_figure("trainer", trainer), _figure("replayed", replayed)]
    if sample.comparison is not None:
        amplified = _data_url(_amplified_difference(sample))
        figures.append(_figure(_DIFFERENCE, amplified))
        figures.append(
            '<figure class=wipe style="--at:50%"><div>'
            f'<img alt="" src="{trainer}"><img alt="" class=top src="{replayed}"></div>'
            "<input type=range min=0 max=100 value=50 "
            'aria-label="wipe between trainer and replayed" '
            "oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\">"
            "<figcaption>replayed | trainer</figcaption></figure>"
        )
    return figures


def _films(sample: CheckedSample) -> list[str]:
    """Return the frames of a video, of which a slider selects one, and their differences."""
    films = {"trainer": sample.trainer, "replayed": sample.replayed}
    if sample.comparison is not None:
        films[_DIFFERENCE] = _amplified_difference(sample)
    films = {label: one if one.ndim == 4 else one[None] for label, one in films.items()}
    count = max(map(len, films.values()))
    slider = (
        f"<p class=scrub><label>frame <input type=range min=0 max={count - 1} value=0 "
        f'oninput="{_SHOW_FRAME}"> <output>1</output> of {count}</label></p>'
    )
    return [slider, *(_film(label, frames) for label, frames in films.items())]


def _film(label: str, frames: Pixels) -> str:
    """Return a figure with all frames, of which the first is visible.

    The frames of the videos are lossy, as in the trainer's file; a difference is lossless.
    """
    urls = (_data_url(frame, lossy=label != _DIFFERENCE) for frame in frames)
    images = "".join(
        f'<img alt="{label}, frame {number}" src="{url}"{" hidden" if number > 1 else ""}>'
        for number, url in enumerate(urls, start=1)
    )
    return f"<figure class=film><div>{images}</div><figcaption>{label}</figcaption></figure>"


def _amplified_difference(sample: CheckedSample) -> Pixels:
    difference = np.abs(sample.replayed.astype(np.int16) - sample.trainer.astype(np.int16))
    amplified: Pixels = (difference * AMPLIFY).clip(0, 255).astype(np.uint8)
    return amplified


def _figure(label: str, data_url: str) -> str:
    caption = f"<figcaption>{label}</figcaption>"
    return f'<figure><img alt="{label}" src="{data_url}">{caption}</figure>'


def _data_url(pixels: Pixels, *, lossy: bool = False) -> str:
    """Return the image as a data URL: PNG, or WebP if `lossy`.

    Small images are enlarged by a whole factor.
    """
    factor = max(1, _MIN_SIDE // max(pixels.shape[:2]))
    image = Image.fromarray(pixels)
    if factor > 1:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "WEBP", quality=90)
    else:
        image.save(buffer, "PNG")
    kind = "webp" if lossy else "png"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


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
.scrub {{ flex-basis: 100%; margin: 0; }} .scrub input {{ width: min(30rem, 60%); }}
.film img[hidden] {{ display: none; }}
figcaption, .reason {{ font-size: .85rem; opacity: .8; }} pre {{ overflow: auto; }}
</style></head><body>
<h1>{run}: {verdict}</h1>
{doctor}
{sections}
<h2>Settings and versions</h2>
<pre>{facts}</pre>
</body></html>
"""
