"""Templates render as in the reference implementation, inside a sandbox."""

import json

import pytest

from shared.errors import RequestFailed, UnsupportedModel
from shared.runtime.settings import DEMO_MODEL
from shared.text.chat_template import ChatTemplate

PICTURE = {"type": "image"}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "How many?"}],
    "a system message": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße  \n"},
    ],
    "two pictures": [
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "and"}, PICTURE]},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": [{"type": "text", "text": "<b>?</b>"}]},
    ],
}
TEMPLATES = {
    "blocks are trimmed": "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n"
    "{% endfor %}",
    "tojson keeps HTML and umlauts": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "generation marks": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}"
    "{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "tools and documents": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}"
    "{% endfor %}{{ n.i }}",
}


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_transformers_for_the_demo_model(reference, name):
    messages = CONVERSATIONS[name]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.load(DEMO_MODEL).render(messages) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers_for_template_features(reference, name):
    source, messages = TEMPLATES[name], CONVERSATIONS["a system message"]
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    special = {"bos_token": reference.bos_token, "eos_token": "<|im_end|>"}
    special["pad_token"] = "<|endoftext|>"
    tokens = {name: token for name, token in special.items() if token is not None}
    assert ChatTemplate(source, tokens).render(messages) == expected


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[7].role.x.y }}"],
)
def test_an_objection_is_a_bad_request(source):
    with pytest.raises(RequestFailed, match="refused the messages") as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert caught.value.kind == "bad_request"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'].popen('id') }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(RequestFailed, match="unsafe|not safely"):
        ChatTemplate(source).render([])


def test_sources_are_tried_in_order(tmp_path):
    with pytest.raises(UnsupportedModel, match="no chat template"):
        ChatTemplate.load(tmp_path)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "config"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render([]) == "config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json{{ eos_token }}"}')
    assert ChatTemplate.load(tmp_path).render([]) == "json</s>"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.load(tmp_path).render([]) == "jinja"


def test_a_template_that_does_not_compile_is_refused_at_the_start():
    with pytest.raises(UnsupportedModel, match="does not compile"):
        ChatTemplate("{% if %}")
