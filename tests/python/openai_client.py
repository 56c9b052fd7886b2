"""The official OpenAI client against a running server: openai_client.py URL API_KEY.

The server has the super-adapters tiny-tied and tiny-other of tests/tiny.rs and at most 16 sequences.
"""

import sys

import openai

URL, KEY = sys.argv[1:]
NAMES = ["maximal", "heuristic", "minimal"]


def client(**options):
    return openai.OpenAI(base_url=URL + "/v1", **{"api_key": KEY, "max_retries": 0, "timeout": 60, **options})


def raises(kind, call, **arguments):
    """The error that the call must raise."""
    try:
        answer = call(**arguments)
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} expected, got {answer}")


def models():
    listed = [card.id for card in client().models.list()]
    expected = [name for model in ["tiny-tied", "tiny-other"]
                for name in [model] + [f"{model}:{sub}" for sub in NAMES]]
    assert listed == expected, listed
    assert client().models.retrieve("tiny-other:minimal").id == "tiny-other:minimal"
    error = raises(openai.NotFoundError, client().models.retrieve, model="huge")
    assert error.code == "model_not_found", error


def completions():
    ask = dict(model="tiny-tied:minimal", prompt="the list", max_tokens=20, seed=7, logprobs=2,
               extra_body={"ignore_eos": True})
    plain = client().completions.create(**ask)
    choice = plain.choices[0]
    assert plain.usage.completion_tokens == 20 and choice.finish_reason == "length", plain
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 20
    assert plain.elastic["served"] == "minimal" and plain.elastic["reason"] == "model", plain
    streamed = list(client().completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    assert "".join(c.choices[0].text for c in streamed if c.choices) == choice.text
    assert streamed[-1].usage == plain.usage and not streamed[-1].choices
    several = client().completions.create(model="tiny-tied", prompt=["one", "two"], n=2, max_tokens=3)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]


def chat():
    ask = dict(model="tiny-other", messages=[{"role": "system", "content": "be short"},
                                             {"role": "user", "content": "the list"}],
               max_completion_tokens=20, seed=7, logprobs=True, top_logprobs=2,
               extra_body={"elastic": {"subnetwork": "heuristic"}, "ignore_eos": True})
    plain = client().chat.completions.create(**ask)
    choice = plain.choices[0]
    assert plain.model == "tiny-other:heuristic" and plain.elastic["reason"] == "elastic", plain
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 20 and len(choice.logprobs.content[0].top_logprobs) == 2
    streamed = list(client().chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in streamed if c.choices][-1] == "length"
    assert streamed[-1].usage.total_tokens == plain.usage.total_tokens
    # The first of the two has computed the prompt, which the client knows by its own name for it.
    cached = [usage.prompt_tokens_details.cached_tokens for usage in (plain.usage, streamed[-1].usage)]
    assert cached[0] == 0 and 0 < cached[1] < plain.usage.prompt_tokens, cached
    # The client's own accumulation of a stream; it takes no answer that ended for its length.
    with client().chat.completions.stream(model="tiny-tied", messages=ask["messages"], logit_bias={"2": 100},
                                          extra_body={"min_tokens": 4}) as stream:
        assert stream.get_final_completion().choices[0].finish_reason == "stop"
    raw = client().chat.completions.with_raw_response.create(**ask)
    assert raw.headers["x-subnetwork"] == "heuristic" and raw.headers["x-request-id"]


def errors():
    create = client().completions.create
    unknown = raises(openai.NotFoundError, create, model="tiny-tied:huge", prompt="one")
    assert (unknown.code, unknown.param) == ("model_not_found", "model"), unknown.body
    hot = raises(openai.BadRequestError, create, model="tiny-tied", prompt="one", temperature=3)
    assert (hot.type, hot.param) == ("invalid_request_error", "temperature"), hot.body
    long = raises(openai.BadRequestError, create, model="tiny-tied", prompt="one", max_tokens=128)
    assert (long.code, long.param) == ("context_length_exceeded", "max_tokens"), long.body
    empty = raises(openai.BadRequestError, client().chat.completions.create, model="tiny-tied", messages=[])
    assert empty.param == "messages", empty.body
    wrong = raises(openai.AuthenticationError, client(api_key="wrong").models.list)
    assert wrong.code == "invalid_api_key", wrong.body


for check in [models, completions, chat, errors]:
    check()
print("all checks passed")
