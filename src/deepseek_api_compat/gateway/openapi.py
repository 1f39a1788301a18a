"""`/openapi.json`, made from the types that decode requests, so that it can't say anything else."""

from __future__ import annotations

from typing import Any

import msgspec

from deepseek_api_compat import __version__
from deepseek_api_compat.gateway.public import PUBLIC
from deepseek_api_compat.protocol import openai as wire

ERRORS = {
    "400": "The request is malformed; the message names the field.",
    "401": "No key, or a wrong one.",
    "404": "Unknown model.",
    "413": "The body is too large.",
    "429": "Over a limit; Retry-After says for how long.",
    "502": "The engine broke.",
    "503": "No engine can answer now.",
}

# path, method, summary, request type, content types of the answer
OPERATIONS: list[tuple[str, str, str, Any, tuple[str, ...]]] = [
    (
        "/chat/completions",
        "post",
        "Answer a conversation",
        wire.ChatRequest,
        ("application/json", "text/event-stream"),
    ),
    (
        "/completions",
        "post",
        "Continue a text",
        wire.CompletionRequest,
        ("application/json", "text/event-stream"),
    ),
    ("/embeddings", "post", "Embed texts", wire.EmbeddingRequest, ("application/json",)),
    (
        "/tokenize",
        "post",
        "Token ids of a text or a conversation",
        wire.TokenizeRequest,
        ("application/json",),
    ),
    ("/detokenize", "post", "Text of token ids", wire.DetokenizeRequest, ("application/json",)),
    ("/models", "get", "The models served", None, ("application/json",)),
    ("/models/{id}", "get", "One model", None, ("application/json",)),
    ("/usage", "get", "What this key has used", None, ("application/json",)),
    ("/user/balance", "get", "What is left of this key's budget", None, ("application/json",)),
    ("/openapi.json", "get", "This document", None, ("application/json",)),
    ("/metrics", "get", "Counters for Prometheus (admin and metrics keys)", None, ("text/plain",)),
    ("/health", "get", "200 while the process lives", None, ("application/json",)),
    ("/ready", "get", "200 when an engine can answer", None, ("application/json",)),
    ("/version", "get", "The version of the service", None, ("application/json",)),
]


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document; paths are given under /v1 and hold under every other prefix too."""
    types = [operation[3] for operation in OPERATIONS if operation[3] is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, summary, request, answers in OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": "Success", "content": {kind: {} for kind in answers}}},
        }
        if path in PUBLIC:
            operation["security"] = []
            if path == "/ready":
                operation["responses"]["503"] = _error(ERRORS["503"])
        else:
            for status in ERRORS if request is not None else ("401", "404", "429"):
                operation["responses"][status] = _error(ERRORS[status])
        if request is not None:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": by_type[request]}},
            }
        if "{id}" in path:
            operation["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths["/v1" + path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "DeepSeek API", "version": __version__},
        "servers": [{"url": "/"}],
        "security": [{"key": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _error(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}
