"""Tools in the ways of four kinds of models: through templates like theirs, enforced, and read from what they write.

The templates are written here, after the public descriptions of each way; each does with tools, calls and results what
models of its kind are trained on, refusals included.
"""

import json

import openai
import pytest

from corolla.gateway.requests import Tool
from corolla.gateway.toolcalls import calls_form, find_format, read_calls

HERMES = """{%- if tools %}<|im_start|>system
You may call functions. They are in <tools></tools>:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Write each call as JSON within <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls %}<|im_start|>assistant
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MISTRAL = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == "user" %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("ids of calls have nine letters") }}{% endif %}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}
{%- endfor %}]</s>
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ {"content": message.content} | tojson }}[/TOOL_RESULTS]
{%- else %}{{ message.content }}</s>
{%- endif %}
{%- endfor %}"""

MISTRAL_2025 = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == "user" %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}</s>
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}{{ message.content }}</s>
{%- endif %}
{%- endfor %}"""

LLAMA_3 = """{%- if tools %}<|start_header_id|>system<|end_header_id|>

Answer with a call, in the format {"name": function name, "parameters": dictionary of argument name and its value}.
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}<|eot_id|>{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- elif message.role == "tool" %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "mistral since 2025": MISTRAL_2025, "llama 3": LLAMA_3}
NO_TOOLS = "{% for message in messages %}{{ message.content }}{% endfor %}"
TOKYO, OSLO = ("weather", {"city": "Tokyo"}), ("weather", {"city": "Oslo"})

# What models of each kind write, and what it means: what they say besides, and the calls.
WRITTEN = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Tokyo"}}\n</tool_call>', "", [TOKYO]),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Tokyo"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "I look.",
        [TOKYO, OSLO],
    ),
    ("hermes", "<tool_call>\nweather in Tokyo\n</tool_call>", None, []),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Tokyo"}}]', "", [TOKYO]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Tokyo"}, "id": "a1b2c3d4e"}, '
        '{"name": "weather", "arguments": {"city": "Oslo"}, "id": "f1b2c3d4e"}]',
        "",
        [TOKYO, OSLO],
    ),
    ("mistral", "[TOOL_CALLS]weather", None, []),
    ("mistral since 2025", '[TOOL_CALLS]weather[ARGS]{"city": "Tokyo"}', "", [TOKYO]),
    (
        "mistral since 2025",
        'Both.[TOOL_CALLS]weather[ARGS]{"city": "Tokyo"}[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Oslo"}',
        "Both.",
        [TOKYO, OSLO],
    ),
    ("mistral since 2025", "[TOOL_CALLS]weather[ARGS]{", None, []),
    ("llama 3", '{"name": "weather", "parameters": {"city": "Tokyo"}}', "", [TOKYO]),
    ("llama 3", '<|python_tag|>{"name": "weather", "parameters": {"city": "Tokyo"}}', "", [TOKYO]),
    ("llama 3", "It is sunny in Tokyo.", None, []),
    ("llama 3", '{"city": "Tokyo"}', None, []),
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Tokyo", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
QUESTION = {"role": "user", "content": "How is the weather?"}


@pytest.fixture
def speaking(running, monkeypatch):
    """Lets the tiny model have another template, and gives what is offered."""
    (offer,) = running.gateway.catalog.all()

    def speak(kind):
        monkeypatch.setattr(offer.tokenizer, "chat_template", TEMPLATES.get(kind, NO_TOOLS))
        return offer

    return speak


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_is_enforced_read_and_goes_back_through_the_template(client, running, speaking, kind, is_streamed):
    speaking(kind)
    asked = {
        "model": running.model,
        "tools": [CLOCK, WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "seed": 3,
    }
    if is_streamed:
        pieces = list(client.chat.completions.create(messages=[QUESTION], stream=True, **asked))
        (found,) = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or []]
        assert not any(piece.choices[0].delta.content for piece in pieces)
        call = found.model_dump(exclude={"index"})
    else:
        (choice,) = client.chat.completions.create(messages=[QUESTION], **asked).choices
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0].model_dump()
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) in ({"city": "Tokyo"}, {"city": "Oslo"})
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    messages = [QUESTION, {"role": "assistant", "tool_calls": [call]}, result]
    answer = client.chat.completions.create(messages=messages, **asked | {"tool_choice": "none"})
    assert answer.usage.prompt_tokens > 20


@pytest.mark.parametrize("kind", TEMPLATES)
def test_several_tools_may_be_called(client, running, speaking, kind):
    speaking(kind)
    choice = client.chat.completions.create(
        model=running.model, messages=[QUESTION], tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=60, seed=1,
        parallel_tool_calls=False,
    ).choices[0]  # fmt: skip
    if choice.finish_reason == "tool_calls":
        assert choice.message.tool_calls[0].function.name in {"weather", "clock"}
    else:  # of a tiny model, arguments without a bound may go on for ever
        assert choice.finish_reason == "length"


@pytest.mark.parametrize(("kind", "text", "said", "calls"), WRITTEN)
def test_what_models_write_is_read(speaking, kind, text, said, calls):
    found = read_calls(find_format(speaking(kind)), text)
    assert found[0] == (text if said is None else said)
    assert [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in found[1]] == calls
    assert len({one["id"] for one in found[1]}) == len(calls)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_enforced_is_what_models_of_the_kind_write(speaking, kind):
    offer = speaking(kind)
    form = calls_form(find_format(offer), offer, [Tool.model_validate(WEATHER)], is_single=False)
    text = next(text for one, text, said, calls in WRITTEN if one == kind and said == "" and len(calls) == 1)
    matcher = offer.grammars.start(form)
    tokens = offer.tokenizer.encode(compact(text), add_special_tokens=False)
    for token in tokens:
        assert matcher.allowed()[token], offer.decode([token])
        matcher.take(token)


def compact(text):
    """Leave out the spaces that JSON need not have."""
    return text.replace('": ', '":').replace(', "', ',"')


def test_a_template_that_knows_no_tools_refuses_them(client, running, speaking):
    speaking("none")
    with pytest.raises(openai.BadRequestError, match="no chat template that knows tools"):
        client.chat.completions.create(model=running.model, messages=[QUESTION], tools=[WEATHER])
