"""Other programs that speak OpenAI's API: LangChain, and whatever schemathesis makes of the OpenAPI document."""

from contextlib import suppress
from typing import Literal

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

EXAMPLES = 25


class Colour(BaseModel):
    """A colour."""

    name: Literal["red", "blue"]
    is_warm: bool


@pytest.fixture
def options(running):
    with httpx.Client(verify=False) as http:
        yield {"model": running.model, "base_url": f"{running.url}/v1", "api_key": running.key, "http_client": http}


def test_langchain_chats_streams_and_calls_tools(options):
    chat = ChatOpenAI(**options, temperature=0, max_tokens=12)
    whole = chat.invoke("Hi")
    assert whole.usage_metadata["output_tokens"] == 12
    assert "".join(piece.content for piece in chat.stream("Hi")) == whole.content
    bound = ChatOpenAI(**options, temperature=0, max_tokens=400).bind_tools(
        [Colour], tool_choice="Colour", parallel_tool_calls=False
    )
    (call,) = bound.invoke("Which colour?").tool_calls
    assert call["name"] == "Colour"
    assert Colour(**call["args"])


def test_langchain_gets_a_structured_answer(options):
    chat = ChatOpenAI(**options, temperature=0, max_tokens=400)
    assert isinstance(chat.with_structured_output(Colour, method="json_schema").invoke("Which colour?"), Colour)


def test_langchain_completes_and_embeds(options):
    assert OpenAI(**options, temperature=0, max_tokens=8).invoke("abc")
    embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    assert len(embeddings.embed_documents(["abc", "xyz"])) == 2


@pytest.mark.parametrize("mode", GenerationMode)
def test_whatever_is_sent_is_answered_as_the_document_says(running, mode):
    for found in schemathesis.openapi.from_url(f"{running.url}/openapi.json").get_all_operations():
        phases = [Phase.explicit, Phase.generate]

        @given(case=found.ok().as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, phases=phases, suppress_health_check=list(HealthCheck))
        def answer(case):
            if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
                case.body["model"] = running.model  # a random name is hardly ever the model's
                if "input" not in case.body:
                    case.body["max_tokens"] = 2
            headers = {"Authorization": f"Bearer {running.key}"}
            # What a document cannot say, as that a token is one of the model's, may be refused.
            case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

        with suppress(Unsatisfiable):  # nothing can be wrong with a request that has no fields
            answer()
