"""Results of verifications and explanations as messages of the page. Does not import Gradio."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fidelora.server.page.html import escape, notice
from fidelora.server.page.paths import REPORTS
from fidelora.server.verifier import Outcome

_VERDICTS = {
    "identical": (
        "good",
        "Every pixel of every sample is the same: this server makes what the trainer made.",
    ),
    "rounding": (
        "good",
        "The samples are consistent with these settings; the remaining differences are rounding.",
    ),
    "undecided": (
        "",
        "Too much information was lost to tell whether these settings are right. Save future runs "
        "in float32, or verify a step that has all earlier checkpoints.",
    ),
    "mismatch": (
        "error",
        "At least one sample is different. Check the base model first; the option above finds the "
        "setting that explains the difference.",
    ),
}
_EXPLANATIONS = {
    0: ("good", "the sample", "The picture is the trainer's sample, apart from rounding."),
    1: ("good", "explained", "The report lists what differs, the largest effect first."),
    4: (
        "error",
        "not explained",
        "The settings in the report explain only a part of the difference. Another base model or a "
        "LoRA of another step may be the reason.",
    ),
}
"""Kind of message, title and sentence by exit code of `fidelora explain`."""
_LIST = re.compile(r"(?:: [^:]*?| \([^()]*?) and \d+ more\)?")
"""List of modules in an error message: `... do not fit: a, b, c and 12 more`."""


def verdict(outcome: Outcome, lines: Sequence[str]) -> str:
    """Return the verdict from the output's last line of the form `VERDICT: sentence`."""
    lines = [line for line in lines if line]
    words = (line.partition(":")[0] for line in reversed(lines))
    found = next((word for word in words if word in _VERDICTS), "")
    if not found or outcome.code not in (0, 1, 4):
        return _failure(lines, "fidelora verify ended without output.")
    kind, sentence = _VERDICTS[found]
    doctor = next((line for line in lines if line.startswith("Doctor:")), "")
    details = f"<br>{escape(doctor)}" if doctor else ""
    return (
        f'<div role="status" class="message {kind}"><strong>{escape(found)}</strong>'
        f"<span>{escape(sentence)}{details}</span></div>"
    )


def explanation(outcome: Outcome, lines: Sequence[str]) -> str:
    """Return the message for the exit code of `fidelora explain`."""
    if outcome.code not in _EXPLANATIONS or outcome.report is None:
        lines = [line for line in lines if line]
        return _failure(lines, "fidelora explain ended without output.")
    kind, title, sentence = _EXPLANATIONS[outcome.code]
    return (
        f'<div role="status" class="message {kind}"><strong>{escape(title)}</strong>'
        f"<span>{escape(sentence)}</span></div>"
    )


def _failure(lines: Sequence[str], without_output: str) -> str:
    """Return the last line of a command that failed, without long lists of modules."""
    text = (lines[-1] if lines else without_output).removeprefix("error: ")
    short = _LIST.sub("", text)
    return notice(short if short == text else f"{short} The output has the details.", "error")


def report_link(verification_id: str, outcome: Outcome) -> str:
    """Return the link to the report, which the page shows in a frame; empty without a report."""
    if outcome.report is None:
        return ""
    return (
        f'<a class="report" href=".{REPORTS}{verification_id}" target="_blank" rel="noopener">'
        "Open the report in a new tab</a>"
    )
