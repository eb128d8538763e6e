"""A chat to the text and the ids that its model was made for, by the model's own chat template.

    [{"role": "user", "content": "Hi"}, ...]  ->  "<|im_start|>user\\nHi<|im_end|>\\n..."  ->  ids

What.  A template is a small program in Jinja that a model's directory carries: chat_template.jinja
and additional_chat_templates/NAME.jinja, or else `chat_template` in tokenizer_config.json, a text
or a list of named ones. Of several, `tool_use` writes the chats that come with tools and `default`
all others. It is given the messages, the tools and the special tokens by name, and nothing else.

How it is computed.  In Jinja's immutable sandbox with what templates expect of transformers: blocks
trimmed, `break` and `continue`, `raise_exception`, `strftime_now`, a `tojson` that leaves HTML
alone, and `generation` blocks, which here mark nothing. Then the text is tokenised with special
tokens read as such and nothing added: BOS, turns and ends are the template's. ShareGPT's rows
({"from": "human", "value": ...}) are renamed to roles first. A key that is null is left out, and
reasoning stands under each of its names.

Limits.  A special token written inside a message is read as one, as transformers does. A template
that asks for the date is told today's. Refusing a chat is a template's right (ChatRefused).

Source.  `apply_chat_template` of transformers 4.57 and 5.23: the same text and ids, tested.
"""

import datetime
import hashlib
import json
from pathlib import Path

import numpy as np

from hub import files
from hub.checkpoint import TEMPLATES
from hub.tokenizer import Tokenizer

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what others call the same


class ChatRefused(ValueError):
    """The chat template does not take this chat."""


class Chats:
    """chats(messages, tools) -> ids [tokens]. digest: of all that decides them.

    Nothing but the files is read before the first chat: a model need not have a template.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.path = tokenizer, tokenizer.path
        self.names = _special_tokens(self.path)
        self.sources = _sources(self.path)
        fast = files.file_of(self.path, "tokenizer.json")
        held = [self.sources, self.names, files.digest(fast) if fast.is_file() else ""]
        self.digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        self.compiled: dict = {}

    def __call__(self, messages: list, tools=None) -> np.ndarray:
        """Raises ChatRefused where the template does, ValueError for what is no chat."""
        return np.asarray(self.tokenizer.encode_chat(self.text(messages, tools)))

    def text(self, messages: list, tools=None) -> str:
        """What the template writes."""
        tools = _tools(tools)
        chat = [_message(m) for m in messages]
        if not chat:
            raise ChatRefused("it has no message")
        template = self._template("tool_use" if tools and "tool_use" in self.sources else "default")
        try:
            given = {"messages": chat, "tools": tools, "documents": None}
            return template.render(**self.names, **given, add_generation_prompt=False)
        except MemoryError:
            raise
        except Exception as e:  # a program of someone else's, which may fail in any way
            reason = " ".join(str(e).split()) or type(e).__name__
            raise ChatRefused(reason[:200]) from None

    def _template(self, name: str):
        if name not in self.sources:
            others = f", only {', '.join(sorted(self.sources))}" if self.sources else ""
            raise ValueError(
                f"it is a chat, and {self.path} has no chat template{others}; put the "
                "chat_template.jinja of the model there, or give plain text"
            )
        if name not in self.compiled:
            self.compiled[name] = _compile(self.sources[name], self.path)
        return self.compiled[name]


def _message(message) -> dict:
    """A message with a role, ShareGPT's names replaced, without what is null."""
    if not isinstance(message, dict):
        raise ValueError(f"a chat is a list of messages, not of {type(message).__name__}")
    out = {k: v for k, v in message.items() if v is not None}
    if "role" not in out and "from" in out:
        role = out.pop("from")
        if role not in _ROLES:
            raise ValueError(f"a message is from {str(role)[:40]!r}; use {', '.join(_ROLES)}")
        out = {"role": _ROLES[role], "content": out.pop("value", ""), **out}
    if not isinstance(out.get("role"), str):
        raise ValueError("a message has no `role` (or ShareGPT's `from`)")
    reasoning = next((out[k] for k in _REASONING if k in out), None)
    if reasoning is not None:
        out = {"thinking": reasoning, **out, "reasoning_content": reasoning}
    return out


def _tools(tools) -> list | None:
    """A row's tools: a list of JSON schemas, or the same as a text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError("its `tools` are not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise ValueError("its `tools` are not a list of JSON schemas")
    return tools


# ---- the files of a model


def _special_tokens(path: Path) -> dict[str, str]:
    """bos_token and the like, as a template knows them."""
    given = files.json_of(path, "tokenizer_config.json")
    if "added_tokens_decoder" not in given:
        given |= files.json_of(path, "special_tokens_map.json")
    out = {}
    for name, token in given.items():
        token = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(token, str):
            out[name] = token
    return out


def _sources(path: Path) -> dict[str, str]:
    """The templates by name."""
    found, out = {"default": files.file_of(path, "chat_template.jinja")}, {}
    for name in sorted(f.name for f in (path / TEMPLATES).glob("*.jinja")):
        found[name.removesuffix(".jinja")] = files.file_of(path, name, inside=TEMPLATES)
    for name, file in found.items():
        if file.is_file():
            files.refuse_pointer(file)
            with files.reading(file):
                out[name] = file.read_bytes().decode(errors="replace")
    if out:
        return out
    given = files.json_of(path, "tokenizer_config.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    try:
        return {str(t["name"]): str(t["template"]) for t in given or []}
    except (TypeError, KeyError):
        raise ValueError(
            f"{path / 'tokenizer_config.json'} has a chat_template that is neither a text nor a "
            "list of named ones"
        ) from None


# ---- the sandbox


def _compile(source: str, path: Path):
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox, utils
    except ImportError:
        raise ValueError(
            "chats need the package jinja2: pip install jinja2, or give plain text"
        ) from None
    version = tuple(int(n) for n in jinja2.__version__.split(".")[:3] if n.isdigit())
    if version < (3, 1, 6):
        raise ValueError(
            f"jinja2 {jinja2.__version__} has a sandbox that can be left; pip install -U jinja2"
        )

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}: what stands in it, in a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(utils.Namespace):
        """Without names that begin with an underscore, which lead into Python itself."""

        def __init__(*args, **given):
            self, *rest = args
            for name in dict(*rest, **given):
                _plain_name(name)
            utils.Namespace.__init__(self, *rest, **given)

        def __setitem__(self, name, value):
            _plain_name(name)
            super().__setitem__(name, value)

    def _plain_name(name) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace has no place for {name}")

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        given = {"ensure_ascii": ensure_ascii, "indent": indent}
        return json.dumps(x, **given, separators=separators, sort_keys=sort_keys)

    box = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    box.filters["tojson"] = to_json
    box.globals["raise_exception"] = refuse
    box.globals["strftime_now"] = lambda how: datetime.datetime.now().strftime(how)
    box.globals["dict"] = lambda *args, **given: dict(*args, **given)
    box.globals["namespace"] = Namespace
    try:
        return box.from_string(source)
    except (jinja2.TemplateError, RecursionError) as e:
        raise ValueError(
            f"the chat template of {path} is not Jinja: {' '.join(str(e).split())[:200]}"
        ) from None
