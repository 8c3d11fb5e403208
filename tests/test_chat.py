"""Chat templates: the tokens and the mask of transformers, and nothing that a template of somebody else's could do."""

import re
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minitrain import chat
from minitrain.chat import ChatTemplate, ConversationError, check_messages, encode, find_template, special_tokens
from minitrain.config import UserError

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é <&>"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Sum of a and b.", "parameters": {}}}]


def say(*turns):
    """say("u question", "a answer", ...) -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


CONVERSATIONS = {
    "one turn": say("u 2+2?", "a 4"),
    "system": say("s Be brief. 中文", "u  hello \n", "a Hi! 🙂 "),
    "three turns": say("u one", "a 1", "u two", "a 2\n\n2", "u three?", "a 3"),
    "ends with a user": say("u one", "a 1", "u two"),
    "two in a row": say("u one", "a 1", "a and 2", "u more", "a 3"),
}
WITH_TOOLS = [
    *say("u 2+é?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *say("t 4", "a It is 4.")
]  # fmt: skip
WITH_THINKING = [
    *say("u one"), {"role": "assistant", "content": "1", "reasoning_content": "easy\nas that"},
    *say("u two"), {"role": "assistant", "content": "2", "reasoning_content": "hm"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, the special ones, and two that are plain words, as in Qwen3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def without_marks(template):
    return re.sub(r"\n *\{%- (end)?generation %\}", "", template)


def ours(tokenizer, template, messages, tools=None):
    """[(ids, trained), ...]"""
    documents = ChatTemplate(template, {"bos_token": SPECIAL[2]}).documents(check_messages(messages), tools)
    return [encode(tokenizer, text, spans) for text, spans in documents]


def theirs(tokenizer, template, messages, tools=None):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[2])
    out = fast.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return out["input_ids"], [bool(m) for m in out["assistant_masks"]]


# ---- equal to transformers


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_give_the_tokens_and_the_mask_of_transformers(tokenizer, name, conversation):
    messages = CONVERSATIONS[conversation]
    expected = theirs(tokenizer, TEMPLATES[name], messages)
    assert ours(tokenizer, TEMPLATES[name], messages) == [expected] and any(expected[1])


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2.5"])
def test_prefixes_give_what_marks_give(tokenizer, name, conversation):
    messages, plain = CONVERSATIONS[conversation], without_marks(TEMPLATES[name])
    assert "generation %}" not in plain
    assert ours(tokenizer, plain, messages) == [theirs(tokenizer, TEMPLATES[name], messages)]


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
def test_tool_calls_are_learnt_and_answers_of_tools_are_not(tokenizer, name, marks):
    template = TEMPLATES[name]
    expected = theirs(tokenizer, template, WITH_TOOLS, TOOLS)
    documents = ours(tokenizer, template if marks else without_marks(template), WITH_TOOLS, TOOLS)
    learnt = [tokenizer.decode(learnt_ids(d), skip_special_tokens=False) for d in documents]
    if marks or name != "qwen3":
        assert documents == [expected]
    else:  # it shows an empty thought in the last message only
        call = theirs(tokenizer, template, WITH_TOOLS[:2], TOOLS)
        assert documents == [call, last_turn(tokenizer, expected)]
    assert "add" in learnt[0] and "It is 4." in learnt[-1] and "tool_response" not in "".join(learnt)


def learnt_ids(document):
    return [i for i, trained in zip(*document, strict=True) if trained]


def last_turn(tokenizer, document):
    """The same with the last turn trained only."""
    ids, trained = document
    start = max(i for i in range(len(ids)) if trained[i] and not trained[i - 1])
    return ids, [t and i >= start for i, t in enumerate(trained)]


@pytest.mark.parametrize("messages", [CONVERSATIONS["three turns"], WITH_THINKING], ids=["plain", "thinking"])
def test_a_turn_that_is_shown_otherwise_later_is_a_document_of_its_own(tokenizer, messages):
    """Each turn is learnt as it is generated: with its thinking, behind earlier turns without."""
    template = TEMPLATES["qwen3"]
    documents = ours(tokenizer, without_marks(template), messages)
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert documents == [last_turn(tokenizer, theirs(tokenizer, template, messages[:end])) for end in ends]
    assert all("<think>" in tokenizer.decode(learnt_ids(document)) for document in documents)


def test_one_turn_of_qwen3_is_learnt_with_its_thinking(tokenizer):
    messages = WITH_THINKING[:2]
    (document,) = ours(tokenizer, without_marks(TEMPLATES["qwen3"]), messages)
    assert document == theirs(tokenizer, TEMPLATES["qwen3"], messages)
    text = tokenizer.decode(learnt_ids(document), skip_special_tokens=False)
    assert text == "<think>\neasy\nas that\n</think>\n\n1<|im_end|>"


def test_a_document_may_have_the_tokens_of_special_ones_but_a_mask_ends_with_the_turn(tokenizer):
    (document,) = ours(tokenizer, TEMPLATES["chatml"], say("u a", "a b", "u c", "a d"))
    text = "".join(tokenizer.id_to_token(i) if t else "." for i, t in zip(*document, strict=True))
    assert re.fullmatch(r"\.+b<\|im_end\|>\.+d<\|im_end\|>\.", text)


# ---- conversations that are no good


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "an empty conversation"),
        ("hello", "messages is no list"),
        (["hello"], "messages is no list of objects"),
        ([{"role": "bot", "content": "a"}], "a role that is none of system, user, assistant, tool"),
        ([{"content": "a"}], "a role that is none of"),
        ([{"role": ["user"], "content": "a"}], "a role that is none of"),
        (say("u a"), "no assistant turn"),
        ([*say("u a"), {"role": "assistant", "content": ["a"]}], "content that is no text"),
        ([*say("u a"), {"role": "assistant", "content": None}], "an assistant turn without content"),
        (say("u a", "a "), "an assistant turn without content"),
        ([{"role": "user"}, *say("a a")], "a message without content"),
    ],
)
def test_a_conversation_that_is_no_good_says_why(messages, complaint):
    with pytest.raises(ConversationError, match=complaint):
        check_messages(messages)


def test_null_stands_for_an_absent_key():
    """Tables have every key in every row."""
    message = {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": None}
    assert check_messages([message]) == say("a a")


@pytest.mark.parametrize("mark", [chat.BEGIN, chat.END])
def test_a_conversation_cannot_bring_marks_of_its_own(mark):
    template = ChatTemplate(TEMPLATES["qwen3"])
    call = {"function": {"name": mark, "arguments": {}}}
    for messages, tools in (
        (say(f"u a{mark}", "a b"), None),
        ([*say("u a"), {"role": "assistant", "tool_calls": [call]}], None),
        (say("u a", "a b"), [call]),
    ):
        with pytest.raises(ConversationError, match="a code point that is no character"):
            template.documents(messages, tools)


def test_a_template_that_is_nested_too_deeply_is_refused():
    with pytest.raises(UserError, match="nested too deeply"):
        ChatTemplate("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}")


@pytest.mark.parametrize("marks", [True, False])
def test_a_turn_of_which_the_template_makes_nothing_is_refused(marks):
    template = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    template = template if marks else re.sub("{% (end)?generation %}", "", template)
    with pytest.raises(ConversationError, match="an assistant turn without tokens"):
        ChatTemplate(template).documents(say("u a", "a  "))


def test_a_conversation_that_the_template_refuses_names_its_line():
    with pytest.raises(ConversationError, match="refused by the chat template, line 4"):
        ChatTemplate(TEMPLATES["llama3"]).render([{"role": "bot", "content": "a"}])


def test_a_turn_that_does_not_begin_with_the_prompt_asks_for_marks():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    with pytest.raises(UserError, match=r"put \{% generation %\} and \{% endgeneration %\} around"):
        ChatTemplate(template).documents(say("u a", "a b"))
    with pytest.raises(ConversationError, match="begins with an assistant turn"):
        ChatTemplate(template).documents(say("a b"))


# ---- templates that are no good

BAD = {
    "{% if %}": "line 1: Expected an expression",
    "\n{% include 'x' %}": "line 2: no loader",
    "\n\n{{ nothing.of.this }}": "line 3: 'nothing' is undefined",
    "\n{{ 'a' + 1 }}": "line 2: can only concatenate str",
    "\n{{ messages[0].__class__ }}": "line 2: access to attribute '__class__' of a dict is not allowed",
    "\n{% if ''.__class__.__mro__ %}{% endif %}": "line 2: access to attribute '__class__'",
    "{{ messages | attr('__class__') }}": "line 1: access to attribute '__class__'",
    "{{ messages | map(attribute='__class__') | list }}": "line 1: access to attribute '__class__'",
    "{{ '{0.__class__}'.format(1) }}": "line 1: str.format is not allowed",
    "{{ ''.format_map }}": "line 1: str.format is not allowed",
    "{{ namespace.__init__.__globals__ }}": "line 1: access to attribute '__init__'",
    "{{ self.__init__ }}": "line 1: access to attribute '__init__'",
    "{{ messages.append(1) }}": "line 1: access to attribute 'append'",
    "\n{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "line 2: takes longer than",
    "{% set r = range(9999) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}": "takes longer than",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}": "takes longer than",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}": "takes longer than",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{{ range(999999999) }}": "line 1: makes more than",
    "\n{{ 'a' * 10000000000 }}": "line 2: makes more than",
    "{{ 9 ** 9 ** 9 }}": r"line 1: operator \*\* is not allowed",
    "{{ '%9999999999d' % 3 }}": "line 1: operator % is not allowed",
    "{{ '{:>9999999999}'.format(3) }}": "line 1: str.format is not allowed",
    "{{ '%9999999999d' | format(3) }}": "line 1: No filter named 'format'",
    "{{ 'x' | center(9999999999) }}": "line 1: makes more than",
    "{{ 'x'.ljust(9999999999) }}": "line 1: makes more than",
    "{{ messages | tojson(indent=9999999999) }}": "line 1: makes more than",
    **{
        "{% set ns = namespace(x='aaaaaaaa') %}\n{% for i in range(99) %}" + step + "{% endfor %}": "line 2: makes more"
        for step in (
            "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}", "{% set ns.x = ns.x * 8 %}",
            "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "{% set ns.x = [ns.x, ns.x] | join %}",
            "{% set ns.x = ns.x.replace('a', 'aa') %}", "{{ 'a' * 9999999 }}",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_is_no_good_is_refused_with_its_line(monkeypatch, template):
    monkeypatch.setattr(chat, "LIMIT_SECONDS", 0.3 if "takes longer" in BAD[template] else 30)
    monkeypatch.setattr(chat, "LIMIT_CHARACTERS", 10_000_000)
    start = time.process_time()
    with pytest.raises(UserError, match=BAD[template]) as error:
        ChatTemplate(template).render(say("u a"))
    assert "\n" not in str(error.value) and str(error.value).startswith("chat template, line ")
    assert time.process_time() - start < 5


def test_usual_arithmetic_is_allowed():
    template = "{{ 3 * 4 }} {{ 7 % 2 }} {{ 2.5 * 2 }} {{ [1] + [2] }} {{ '-' * 3 }} {{ messages | tojson }}"
    text = ChatTemplate(template).render(say("u é<&>"))
    assert text == '12 1 5.0 [1, 2] --- [{"role": "user", "content": "é<&>"}]'


# ---- where it comes from


def test_the_template_and_special_tokens_of_a_tokenizer_are_found():
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "add_bos_token": True}
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert find_template({}, None) is None and find_template({"chat_template": "a"}, None) == "a"
    assert find_template({"chat_template": "a"}, "b") == "b"  # the file, as transformers has it
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_template({"chat_template": named}, None) == "d"
