"""Conversations as text, by the Jinja template that comes with a checkpoint."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from growjax.errors import DataError
from growjax.extras import load


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    reply: bool = True,
    continued: bool = False,
    tokens: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """The text of a conversation, as `transformers` renders it.

    **Arguments**

    - `messages`: each with a `role` ("system", "user", "assistant") and its `content`.
    - `reply`: whether the text ends where the assistant's reply begins (`add_generation_prompt`).
    - `continued`: whether the text ends with the last message, which a reply then continues.
    - `tokens`: the spellings that the template may use, such as `{"bos_token": "<s>"}`.
    - `options`: further variables of the template, such as `tools` or `enable_thinking`.

    A template is untrusted code: it runs in Jinja's sandbox, where it can neither change its inputs nor
    reach attributes of Python. What a user writes is not escaped: a message that spells a special token
    is read as one.

    Raises `DataError` if the template is broken, or refuses the messages.
    """
    jinja2 = load("jinja2", "a chat template")
    sandbox = load("jinja2.sandbox", "a chat template")

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    variables = {"tools": None, "documents": None, **(tokens or {}), **options}
    try:
        text = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=reply, **variables
        )
    except jinja2.exceptions.TemplateError as error:
        raise DataError(f"chat template: {error}") from error
    except Exception as error:  # a template may do anything to its inputs
        raise DataError(f"chat template: {type(error).__name__}: {error}") from error
    if not continued:
        return text
    last = str(messages[-1]["content"])
    if last.strip() not in text:
        raise DataError(f"chat template: the last message, {last!r}, is not in its text as it is")
    start = text.rindex(last.strip())
    # Templates may strip a message; otherwise its spaces at the end stay
    whole = last.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else last.strip())]


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
