"""Bodies of the HTTP API and their conversion: requests to recipes, jobs to responses.

Shared by server and client; does not import torch. The API follows that of
https://github.com/runcomfy-com/ai-toolkit-inference, with optional additions. Unknown fields and
fields that the model does not support are errors, which name the field.
"""

from __future__ import annotations

from fidelora.api.recipes import (
    DEFAULT_SIZE,
    check_request,
    notes_on,
    output_format_of,
    recipes_of,
    request_for,
    sampler_options,
    video_options,
)
from fidelora.api.requests import (
    MAX_PROMPTS,
    ImageFormat,
    InferenceRequest,
    LoraItem,
    Multiplier,
    OutputFormat,
    PromptItem,
)
from fidelora.api.responses import (
    Accepted,
    ErrorBody,
    ErrorDetail,
    ErrorEnvelope,
    ImageBody,
    LoraBody,
    LoraList,
    MetadataBody,
    ModelBody,
    ModelList,
    OpenAIModel,
    OutputsBody,
    ProgressBody,
    RequestList,
    ResultBody,
    StatusBody,
    VideoBody,
    accepted,
    model_list,
    result_of,
    status_of,
)

__all__ = [
    "DEFAULT_SIZE",
    "MAX_PROMPTS",
    "Accepted",
    "ErrorBody",
    "ErrorDetail",
    "ErrorEnvelope",
    "ImageBody",
    "ImageFormat",
    "InferenceRequest",
    "LoraBody",
    "LoraItem",
    "LoraList",
    "MetadataBody",
    "ModelBody",
    "ModelList",
    "Multiplier",
    "OpenAIModel",
    "OutputFormat",
    "OutputsBody",
    "ProgressBody",
    "PromptItem",
    "RequestList",
    "ResultBody",
    "StatusBody",
    "VideoBody",
    "accepted",
    "check_request",
    "model_list",
    "notes_on",
    "output_format_of",
    "recipes_of",
    "request_for",
    "result_of",
    "sampler_options",
    "status_of",
    "video_options",
]
