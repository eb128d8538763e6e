"""Chats: the text and ids that transformers' apply_chat_template gives, and what is no chat.

The templates here are written for these tests, each with the constructs of a family's own: LLaMA 3's
headers and date, Qwen's tools, Mistral's checks, SmolLM2's default system turn, plain ChatML.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT, TEACHER

from engine import data
from hub.chats import ChatRefused, Chats
from hub.tokenizer import load_tokenizer

V4 = ROOT / ".venv" / "transformers4"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<s>", "</s>", "[INST]",
           "[/INST]"]  # fmt: skip
TEMPLATES = {
    "chatml": """
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}""",
    "smollm2": """
{%- for m in messages %}
  {%- if loop.first and m['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
  {%- endif %}
  {%- if m.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}

  {% else %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
  {%- endif %}
{%- endfor %}""",
    "llama3": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if not date is defined %}
    {%- if strftime_now is defined %}{% set date = strftime_now('%Y') %}{% else %}{% set date = 'never' %}{% endif %}
{%- endif %}
<|head|>system<|/head|>

Year {{ date }}{{ ' with tools' if tools is not none }}

{{ system }}<|eot|>
{%- for m in turns %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|eot|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|head|>ipython<|/head|>\\n\\n' }}
        {{- m.content | tojson if m.content is mapping or m.content is iterable else m.content }}<|eot|>
    {%- else %}
        {{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}""",
    "qwen": """
{%- macro turn(role, words) %}<|im_start|>{{ role }}
{{ words }}<|im_end|>
{% endmacro %}
{%- set ns = namespace(last=-1, thought=false) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.content is string %}{% set words = m.content %}{% else %}{% set words = '' %}{% endif %}
    {%- if m.reasoning_content is string and loop.index0 > ns.last %}
        {%- set words = '<think>' + m.reasoning_content.strip('\\n') + '</think>' + words.lstrip('\\n') %}
    {%- elif '</think>' in words %}
        {%- set words = words.split('</think>')[-1] %}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {%- if call.function %}{% set call = call.function %}{% endif %}
        {%- set words = words ~ '<call>' ~ (call.arguments if call.arguments is string else call.arguments | tojson(indent=1)) %}
        {%- if loop.index > 2 %}{% break %}{% endif %}
    {%- endfor %}
    {{- turn(m.role, words) }}
{%- endfor %}""",
    "mistral": """
{%- if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}
{%- else %}{% set system, turns = '', messages %}{% endif %}
{{- bos_token }}
{%- for m in turns %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {%- if loop.last or loop.first %}{{ '[INST] ' + system + m.content + ' [/INST]' }}{% continue %}{% endif %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
    {%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}""",
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": ["<", "é", None, 1.5]}}}
CALL = {
    "type": "function",
    "function": {"name": "f", "arguments": {"x": "<b> & 'c' \"d\"", "n": 1}},
}
SAY = {
    "one turn": [{"role": "user", "content": " Hi <|im_end|> & <s>there\n"}],
    "three turns": [
        {"role": "user", "content": "naïve ☃ 東京"},
        {"role": "assistant", "content": "  <think>hm</think>\n12345 "},
        {"role": "user", "content": "again"},
    ],
    "a system turn": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    "a tool call": [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "content": "result"},
        {"role": "assistant", "content": "done", "reasoning_content": "\nbecause\n"},
    ],
    "two calls": [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "x", "tool_calls": [CALL, CALL, CALL, CALL]},
    ],
}


def model_with(folder: Path, template, **settings) -> Path:
    """The demo's tokenizer with the special tokens of all five."""
    folder.mkdir()
    whole = json.loads((TEACHER / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, content in enumerate(SPECIAL, 4096):
        whole["added_tokens"].append({"id": i, "content": content, "special": True, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = {"model_type": "llama", "vocab_size": 4096 + len(SPECIAL), "eos_token_id": 4095}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {"bos_token": "<|begin|>", "eos_token": {"content": "</s>", "special": True}}
    tokens |= {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(template, str) and settings.pop("apart", False):
        (folder / "chat_template.jinja").write_text(template)
        tokens["chat_template"] = "never read"
    elif template is not None:
        tokens["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | settings))
    return folder


THEIRS = """
import json, sys, transformers
asked, out = json.load(sys.stdin), {}
for path in sys.argv[1:]:
    tokenizer, out[path] = transformers.AutoTokenizer.from_pretrained(path), []
    for messages, tools in asked:
        try:
            ask = lambda **how: tokenizer.apply_chat_template(messages, tools=tools, **how)
            ids = ask(tokenize=True)
            ids = list(ids if isinstance(ids, list) else ids["input_ids"])
            out[path].append([ask(tokenize=False), ids])
        except Exception as e:
            out[path].append(str(e))
print(json.dumps(out))
"""
ASKED = [(messages, tools) for messages in SAY.values() for tools in (None, [TOOL])]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model with each template."""
    place = tmp_path_factory.mktemp("models")
    apart = ("llama3", "qwen")
    return {n: model_with(place / n, t, apart=n in apart) for n, t in TEMPLATES.items()}


@pytest.fixture(scope="module", params=["4.57", "5"])
def theirs(request, models) -> dict[str, list]:
    """What transformers of a version makes of ASKED, by the path of the model: one process for all."""
    if request.param == "4.57" and not V4.is_dir():
        pytest.skip("transformers 4.57 is not there; `make test` installs it")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if request.param == "4.57":
        environment["PYTHONPATH"] = str(V4)
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, *models.values()],
        input=json.dumps(ASKED),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(models, theirs, name):
    chats, taken = Chats(load_tokenizer(models[name])), 0
    for (messages, tools), said in zip(ASKED, theirs[str(models[name])], strict=True):
        if isinstance(said, str):
            with pytest.raises(ChatRefused) as e:
                chats(messages, tools)
            assert str(e.value)[:20] == said[:20]
        else:
            assert chats.text(messages, tools) == said[0]
            assert chats(messages, tools).tolist() == said[1]
            taken += 1
    assert taken >= 6


def test_null_keys_and_older_names_are_read_as_transformers_5_does(tmp_path):
    path = model_with(tmp_path / "model", TEMPLATES["qwen"])
    messages = [
        {"role": "user", "content": "a", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "b", "reasoning": "why"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert Chats(load_tokenizer(path)).text(messages) == text and "why" in text


def test_of_several_templates_the_one_for_tools_is_taken(tmp_path):
    named = [
        {"name": n, "template": f"{n} {{{{ messages | length }}}}"} for n in ("default", "tool_use")
    ]
    listed = model_with(tmp_path / "listed", named)
    in_files = model_with(tmp_path / "files", named[0]["template"], apart=True)
    (in_files / "additional_chat_templates").mkdir()
    (in_files / "additional_chat_templates" / "tool_use.jinja").write_text(named[1]["template"])
    for path in (listed, in_files):
        chats, theirs = (
            Chats(load_tokenizer(path)),
            transformers.AutoTokenizer.from_pretrained(path),
        )
        for tools in (None, [TOOL]):
            given = {"tools": tools, "tokenize": False}
            said = theirs.apply_chat_template(SAY["one turn"], **given)
            assert chats.text(SAY["one turn"], tools) == said
        assert chats.text(SAY["one turn"], json.dumps([TOOL])) == "tool_use 1", "tools as a text"


def test_the_special_tokens_of_older_files(tmp_path):
    path = model_with(tmp_path / "model", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}")
    (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<s>"}}))
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    said = theirs.apply_chat_template(SAY["one turn"], tokenize=False)
    assert Chats(load_tokenizer(path)).text(SAY["one turn"]) == said == "<|begin|>|</s>|<s>"


SHAREGPT = [{"from": "human", "value": "naïve ☃ 東京"}, {"from": "gpt", "value": "yes"}]


def test_rows_of_chats_become_their_ids(tmp_path):
    """Without BOS or end token of ours; `messages`, `conversations`, or the field that is named."""
    tokenizer = load_tokenizer(model_with(tmp_path / "model", TEMPLATES["chatml"]))
    chats, text = Chats(tokenizer), tmp_path / "text"
    text.mkdir()
    plain = [{"role": "user", "content": "naïve ☃ 東京"}, {"role": "assistant", "content": "yes"}]
    for name, row in (
        ("a.jsonl", {"messages": plain}),
        ("b.jsonl", {"id": 7, "conversations": SHAREGPT}),
        ("c.jsonl", {"messages": plain, "tools": [TOOL]}),
    ):
        (text / name).write_text(json.dumps(row) + "\n")
    expected = chats(plain).tolist()
    found = dict(data.documents(data.find_files([text]), None, chats))
    assert all(ids.tolist() == expected for ids in found.values()) and len(found) == 3
    corpus = data.load_corpus([text], tokenizer, tmp_path / "cache", quiet=True)
    assert set(corpus.train) | set(corpus.held_out) == set(expected)
    (text / "a.jsonl").write_text(json.dumps({"text": "words", "chosen": plain}) + "\n")
    ((_, ids),) = data.documents([("a", text / "a.jsonl")], "chosen", chats)
    assert ids.tolist() == expected


def test_chats_of_a_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chats = Chats(load_tokenizer(model_with(tmp_path / "model", TEMPLATES["qwen"])))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "n"}]
    table = pyarrow.table({"n": range(30), "messages": [turns] * 29 + [None], "tools": ["[]"] * 30})
    parquet.write_table(table, tmp_path / "x.parquet")
    notes = data.Notes()
    found = list(data.documents([("x", tmp_path / "x.parquet")], None, chats, notes))
    assert len(found) == 29 and all(np.array_equal(ids, chats(turns)) for _, ids in found)
    assert "left out 1 rows without text" in notes.lines()[0]


def test_chats_that_the_template_refuses_are_left_out_and_counted(tmp_path):
    tokenizer = load_tokenizer(model_with(tmp_path / "model", TEMPLATES["mistral"]))
    user = {"role": "user", "content": "words " * 40}
    file = tmp_path / "x.jsonl"
    for chats, said in (([[user], [user, user], [], [user]], "left out 2 "), ([[user, user]], "")):
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        if said:
            corpus = data.load_corpus([file], tokenizer, tmp_path / "cache", quiet=True)
            (note,) = corpus.notes
            assert said in note and "line 2: roles must alternate" in note
        else:
            with pytest.raises(ValueError, match=r"the text is empty .*roles must alternate"):
                data.load_corpus([file], tokenizer, tmp_path / "cache", quiet=True)


def test_another_template_is_another_cache(tmp_path):
    file, digests = tmp_path / "x.jsonl", set()
    file.write_text(json.dumps({"messages": SAY["one turn"] * 20}) + "\n")
    for name in ("chatml", "smollm2"):
        tokenizer = load_tokenizer(model_with(tmp_path / name, TEMPLATES[name]))
        digests.add(data.load_corpus([file], tokenizer, tmp_path / "cache", quiet=True).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": ["hi"]}, "line 1: a chat is a list of messages, not of str"),
        ({"messages": [{"content": "x"}]}, "line 1: a message has no `role`"),
        ({"messages": [{"role": 7, "content": "x"}]}, "line 1: a message has no `role`"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator'; use human"),
        ({"messages": SAY["one turn"], "tools": "{"}, "line 1: its `tools` are not JSON"),
        ({"messages": SAY["one turn"], "tools": [7]}, "not a list of JSON schemas"),
        ({"messages": "hi there " * 30, "text": 7}, "line 1: no string field `text`"),
    ],
)
def test_what_is_no_chat_is_refused(tmp_path, row, said):
    tokenizer = load_tokenizer(model_with(tmp_path / "model", TEMPLATES["chatml"]))
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=said):
        data.load_corpus([tmp_path / "x.jsonl"], tokenizer, tmp_path / "cache", quiet=True)


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "has no chat template; put the chat_template.jinja"),
        ("{% for", "is not Jinja"),
        ("{% nonsense %}", "is not Jinja"),
        (7, "neither a text nor a list"),
        ([{"name": "x"}], "neither a text nor a list"),
        ([{"name": "x", "template": "y"}], "has no chat template, only x"),
    ],
)
def test_templates_that_are_none_are_refused_where_a_chat_asks_for_one(tmp_path, template, said):
    tokenizer = load_tokenizer(model_with(tmp_path / "model", template))
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": SAY["one turn"]}) + "\n")
    with pytest.raises(ValueError, match=said) as e:
        data.load_corpus([tmp_path / "x.jsonl"], tokenizer, tmp_path / "cache", quiet=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% include 'config.json' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(tmp_path, template):
    chats = Chats(load_tokenizer(model_with(tmp_path / "model", template)))
    before = json.dumps(SAY["one turn"])
    try:
        assert chats.text(SAY["one turn"]).strip() == ""
    except ChatRefused as e:
        assert "\n" not in str(e)
    assert json.dumps(SAY["one turn"]) == before


def test_jinja_that_is_missing_or_old_is_named(tmp_path, monkeypatch):
    import jinja2

    tokenizer = load_tokenizer(model_with(tmp_path / "model", TEMPLATES["chatml"]))
    monkeypatch.setattr(jinja2, "__version__", "3.1.4")
    with pytest.raises(ValueError, match=r"jinja2 3\.1\.4 has a sandbox that can be left"):
        Chats(tokenizer)(SAY["one turn"])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="pip install jinja2"):
        Chats(tokenizer)(SAY["one turn"])


def test_links_out_of_the_model_are_refused(tmp_path):
    path = model_with(tmp_path / "model", TEMPLATES["chatml"])
    (tmp_path / "x.jinja").write_text("x")
    (path / "chat_template.jinja").symlink_to(tmp_path / "x.jinja")
    with pytest.raises(ValueError, match="outside the model's directory"):
        Chats(load_tokenizer(path))
    (path / "chat_template.jinja").unlink()
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").symlink_to(tmp_path / "x.jinja")
    with pytest.raises(ValueError, match="outside the model's directory"):
        Chats(load_tokenizer(path))


def test_a_rank_file_alone_reads_special_tokens_of_chats(tmp_path):
    path = model_with(tmp_path / "model", TEMPLATES["chatml"])
    by_json = Chats(load_tokenizer(path))(SAY["one turn"]).tolist()
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.tiktoken").write_bytes((TEACHER / "tokenizer.tiktoken").read_bytes())
    given = json.loads((path / "tokenizer_config.json").read_text())
    listed = {"4095": {"content": "<|end|>"}}
    listed |= {str(i): {"content": token} for i, token in enumerate(SPECIAL, 4096)}
    (path / "tokenizer_config.json").write_text(
        json.dumps(given | {"added_tokens_decoder": listed})
    )
    assert Chats(load_tokenizer(path))(SAY["one turn"]).tolist() == by_json


def test_chats_are_no_plain_documents(tmp_path):
    """--documents reads text."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": SAY["one turn"]}) + "\n")
    with pytest.raises(ValueError, match="holds chats"):
        list(data.documents([("x", tmp_path / "x.jsonl")]))
