r"""Conversations -> text, and which of it is to be learnt: the tokenizer's chat template, run in a sandbox.

    messages    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    text        <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n
    learnt                                                            4<|im_end|>

What assistants say is learnt, with what ends their turn. {% generation %} ... {% endgeneration %} in the template says
where that is. In a template without, a turn is what rendering the messages up to it adds to the generation prompt
before it, less white space at its end. Some templates (Qwen3's) show a turn otherwise once it has passed, for example
without its thinking: such a turn is learnt in a document of its own, which ends with it, as it is when it is generated.

A template is a program of somebody else's: it gets no attributes of Python's, no file, no clock, LIMIT_SECONDS and
LIMIT_CHARACTERS. jinja2's grammar, the marks and the variables are those of transformers' apply_chat_template.
"""

import functools
import json
import time
import traceback
from collections.abc import Mapping

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from tokenizers import Tokenizer

from minitrain.config import UserError

ROLES = ("system", "user", "assistant", "tool")
LIMIT_SECONDS = 10.0  # for one rendering: a conversation takes milliseconds
LIMIT_CHARACTERS = 100_000_000  # of any text that a template makes
BEGIN, END = "\ufdd0", "\ufdd1"  # what {% generation %} leaves in the text: code points that are no characters

Spans = list[tuple[int, int]]  # of characters that are to be learnt


class ConversationError(ValueError):
    """A conversation is no good; the text says why, in words that do not depend on what is in it."""


def check_messages(messages) -> list[dict]:
    """The messages, without keys that are null. ConversationError says what is wrong with them."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ConversationError("messages is no list of objects")
    messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
    for m in messages:
        if m.get("role") not in ROLES:
            raise ConversationError(f"a role that is none of {', '.join(ROLES)}")
        if not isinstance(m.get("content", ""), str) or not isinstance(m.get("reasoning_content", ""), str):
            raise ConversationError("content that is no text")
        if m["role"] == "assistant" and not any(map(m.get, ("content", "reasoning_content", "tool_calls"))):
            raise ConversationError("an assistant turn without content")
        if m["role"] != "assistant" and "content" not in m:
            raise ConversationError("a message without content")
    if not messages:
        raise ConversationError("an empty conversation")
    if not any(m["role"] == "assistant" for m in messages):
        raise ConversationError("no assistant turn")
    return messages


def encode(tokenizer: Tokenizer, text: str, learnt: Spans) -> tuple[list[int], list[bool]]:
    """-> token ids, and for each whether it is to be learnt: if any of its characters is. No token is added."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    trained, spans = [], iter([*learnt, (len(text), len(text) + 1)])
    begin, end = next(spans)
    for first, last in encoding.offsets:
        while first >= end:
            begin, end = next(spans)
        trained.append(last > begin)
    return encoding.ids, trained


class ChatTemplate:
    """source: jinja2, as in chat_template.jinja. special_tokens: bos_token, eos_token and others that it may name.

    UserError, with the line, for a template that cannot be compiled, or that raises, takes too long, makes too much
    text or reaches for what it must not.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] = {}):
        self.special_tokens = dict(special_tokens)
        self.sandbox = _Sandbox()
        try:
            tree = _Checked().visit(self.sandbox.parse(source))
            code = self.sandbox.compile(tree, filename=_NAME)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{_NAME}, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise UserError(f"{_NAME}: is nested too deeply") from None
        self.template = jinja2.Template.from_code(self.sandbox, code, self.sandbox.globals)
        self.has_marks = any(data.data == BEGIN for data in tree.find_all(nodes.TemplateData))

    def documents(self, messages: list[dict], tools: list | None = None) -> list[tuple[str, Spans]]:
        """Texts with what is to be learnt: one, and one more for each turn that the whole shows otherwise.

        ConversationError where the template itself refuses the conversation, or nothing is to be learnt.
        """
        if any(mark in json.dumps([messages, tools], ensure_ascii=False) for mark in (BEGIN, END)):
            raise ConversationError("content with a code point that is no character")
        whole = self.render(messages, tools)
        if self.has_marks:
            documents = [_take_marks(whole)]
        else:
            spans, others = [], []
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    turn, span = self._turn(messages[: i + 1], tools)
                    if whole.startswith(turn[: span[1]]):
                        spans.append(span)
                    else:
                        others.append((turn, [span]))
            documents = [*others, (whole, spans)]
        documents = [(text, spans) for text, spans in documents if spans]
        if not documents or any(begin == end for _, spans in documents for begin, end in spans):
            raise ConversationError("an assistant turn without tokens")
        return documents

    def _turn(self, messages, tools) -> tuple[str, tuple[int, int]]:
        """The messages as text, and what of it is the last one, an assistant's."""
        if len(messages) == 1:
            raise ConversationError("it begins with an assistant turn, which takes a template with {% generation %}")
        text, prompt = self.render(messages, tools), self.render(messages[:-1], tools, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise UserError(
                f"{_NAME}: an assistant turn does not begin with the generation prompt; "
                "put {% generation %} and {% endgeneration %} around what is to be learnt"
            )
        return text, (len(prompt), max(len(prompt), len(text.rstrip())))

    def render(self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        """The text, with marks where the template has them."""
        variables = {"messages": messages, "tools": tools, "documents": None}
        variables |= {"add_generation_prompt": add_generation_prompt, **self.special_tokens}
        self.sandbox.deadline = time.monotonic() + LIMIT_SECONDS
        pieces, size = [], 0
        try:
            stream = self.template.generate(variables)
            for piece in stream:
                pieces.append(piece)
                if (size := size + len(piece)) > LIMIT_CHARACTERS:
                    stream.throw(self.sandbox.too_much())  # raised where the template is
        except _Refused as error:
            raise ConversationError(f"refused by the {_NAME}, line {_line(error)}") from None
        except Exception as error:  # any: it is a program
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{_NAME}, line {_line(error)}: {text}") from None
        return "".join(pieces)


_NAME = "chat template"


def _take_marks(text: str) -> tuple[str, Spans]:
    first, *marked = text.split(BEGIN)
    pieces, spans, at = [first], [], len(first)
    for piece in marked:
        inside, _, behind = piece.partition(END)
        spans.append((at, at + len(inside)))
        pieces += [inside, behind]
        at += len(inside) + len(behind)
    return "".join(pieces), spans


def _line(error: Exception) -> int:
    """Of the template, where the error came from: jinja2 has put its lines into the traceback."""
    return [0, *(frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _NAME)][-1]


# ---- the sandbox


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
        return [begin, nodes.Scope(body, lineno=line), end]


class _Sandbox(ImmutableSandboxedEnvironment):
    """What it adds to jinja2's: a limit of time and size, and an error where jinja2 gives an undefined value."""

    intercepted_binops = frozenset({"*", "**", "%"})  # one of which can take for ever

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters |= {"tojson": _to_json, "check": lambda value: value}
        del self.filters["format"]  # "%9999999999d"
        self.filters = {name: self._checked(function) for name, function in self.filters.items()}
        self.globals = {"raise_exception": _raise, "check": self.check, "range": safe_range, "namespace": Namespace}
        self.deadline = 0.0

    def check(self, size: int = 0) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"takes longer than {LIMIT_SECONDS:g} seconds; is there a loop without end?")
        if size > LIMIT_CHARACTERS:
            raise self.too_much()

    def too_much(self) -> SecurityError:
        return SecurityError(f"makes more than {LIMIT_CHARACTERS:,} characters")

    def _checked(self, function):
        """The function, with a check of what it is given, such as a width, and of what it makes."""

        @functools.wraps(function)  # it keeps what jinja2 has noted on it
        def checked(*args, **kwargs):
            self.check(max((v for v in (*args, *kwargs.values()) if isinstance(v, int)), default=0))
            value = function(*args, **kwargs)
            self.check(len(value) if isinstance(value, str | list | tuple) else 0)
            return value

        return checked

    def call(self, context, function, *args, **kwargs):
        return self._checked(super().call)(context, function, *args, **kwargs)

    def wrap_str_format(self, value):
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not allowed here")

    def call_binop(self, context, operator, left, right):
        sizes = [len(v) if isinstance(v, str | list | tuple) else abs(v) for v in (left, right)]
        if operator == "*" and not isinstance(left, float) and not isinstance(right, float):
            self.check(sizes[0] * sizes[1])
        elif operator == "**" or isinstance(left, str):
            raise SecurityError(f"operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed")


class _Checked(NodeTransformer):
    """Puts a check into every loop, and around all that makes text from text."""

    def visit_For(self, node):
        self.generic_visit(node)
        check = nodes.Call(nodes.Name("check", "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(check).set_lineno(node.lineno))
        return node

    def visit_AssignBlock(self, node):
        self.generic_visit(node)
        node.filter = _check(node.filter, node)
        return node

    def _visit_text(self, node):
        return _check(self.generic_visit(node), node)

    visit_Concat = visit_Add = _visit_text


def _check(value, node):
    return nodes.Filter(value, "check", [], [], None, None).set_lineno(node.lineno)


def _raise(message):
    raise _Refused(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- the template of a tokenizer


def special_tokens(config: Mapping) -> dict[str, str]:
    """{"eos_token": "</s>", ...} of tokenizer_config.json."""
    tokens = {key: v["content"] if isinstance(v, dict) else v for key, v in config.items() if key.endswith("_token")}
    return {key: token for key, token in tokens.items() if isinstance(token, str)}


def find_template(config: Mapping, jinja: str | None) -> str | None:
    """The default chat template: chat_template.jinja, or what tokenizer_config.json holds."""
    if jinja is not None:
        return jinja
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": "..."}, ...]
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template
