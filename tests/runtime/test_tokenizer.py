"""Token ids equal to transformers', and control tokens that no client can write."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import token_bound
from runtime.chat_template import MAX_RENDERED_CHARS
from runtime.errors import BadRequest, CheckpointError, ContextLengthExceeded
from runtime.token_bound import TokenBound
from runtime.tokenizer import LONG_TEXT, Tokenizer
from tests.runtime.checkpoints import FATHOM_TINY

thorough = settings(deadline=None, max_examples=200)
NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

R1_TEMPLATE = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = ns.system + m['content'] %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
V31_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}{% endfor %}"
    "{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}"
)
# Its line breaks and indents vanish only with trim_blocks and lstrip_blocks.
LAID_OUT_TEMPLATE = """{% for m in messages %}
    {% if m['role'] == 'user' %}
User: {{ m['content'] | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
Assistant:{% endif %}"""


@cache
def tiny() -> Tokenizer:
    return Tokenizer.load(FATHOM_TINY)


@cache
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FATHOM_TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model's text files, to damage."""
    for name in NAMES:
        shutil.copy(FATHOM_TINY / name, tmp_path)
    return tmp_path


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_template(folder: Path, template: Any) -> Tokenizer:
    edit(folder / "tokenizer_config.json", chat_template=template)
    return Tokenizer.load(folder)


EOS = "<｜end▁of▁sentence｜>"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def controls() -> list[str]:
    """Spellings of all added tokens of the embedded tokenizer."""
    added = json.loads((FATHOM_TINY / "tokenizer.json").read_text())["added_tokens"]
    return [token["content"] for token in added]


texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["the sea", " <b>", "你好", "\n\n", "🙂", "é", "12345", "<", "|"])
    ).map("".join),
)
conversations = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=5
).map(lambda turns: [{"role": role, "content": content} for role, content in turns])


# -- equal to transformers -----------------------------------------------------------------------


@thorough
@given(conversations, st.booleans())
def test_chat_ids_equal_transformers(messages: list[dict[str, Any]], generate: bool) -> None:
    ours = tiny().encode_chat(messages, add_generation_prompt=generate)
    expected = theirs().apply_chat_template(
        messages, add_generation_prompt=generate, tokenize=True, return_dict=False
    )
    assert ours.token_ids == expected
    assert ours.text == theirs().apply_chat_template(
        messages, add_generation_prompt=generate, tokenize=False
    )


@thorough
@given(texts)
def test_raw_ids_equal_transformers_and_bytes_come_back(text: str) -> None:
    token_ids = tiny().encode(text)
    assert token_ids == theirs().encode(text)
    assert b"".join(tiny().token_bytes[i] for i in token_ids) == text.encode()


@pytest.mark.parametrize("template", [R1_TEMPLATE, V31_TEMPLATE, LAID_OUT_TEMPLATE])
@pytest.mark.parametrize("thinking", [True, False])
def test_released_templates_render_as_in_transformers(
    folder: Path, template: str, thinking: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = with_template(folder, template)
    messages = [user("hello"), {"role": "assistant", "content": "hi"}, user("你好")]
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, thinking=thinking
    )
    assert tokenizer.encode_chat(messages, thinking=thinking).text == expected


def test_one_beginning_of_sequence_token() -> None:
    token_ids = tiny().encode_chat([user("hello")]).token_ids
    assert token_ids.count(tiny().encode("<｜begin▁of▁sentence｜>")[0]) == 1


@pytest.mark.parametrize("add_bos", [True, False])
def test_raw_prompt_gets_the_beginning_token_once(folder: Path, add_bos: bool) -> None:
    edit(folder / "tokenizer_config.json", add_bos_token=add_bos)
    tokenizer = Tokenizer.load(folder)
    bos = "<｜begin▁of▁sentence｜>"
    assert (tokenizer.encode("hello")[0] == 0) is add_bos
    assert tokenizer.encode(f"{bos}hello") == [0, *tiny().encode("hello")]


# -- control tokens ------------------------------------------------------------------------------

hostile_texts = st.lists(
    st.one_of(st.sampled_from(controls()), texts, st.sampled_from(["<", "<｜", "think>", ">"])),
    max_size=8,
).map("".join)


@thorough
@given(hostile_texts, st.sampled_from(["system", "user", "assistant", "tool"]))
def test_no_text_becomes_a_control_token(text: str, role: str) -> None:
    """Same ids as with the text's control tokens made harmless, and the same characters."""
    tokenizer = tiny()
    harmless = [{"role": role, "content": "hello"}, user("x")]
    hostile = [{"role": role, "content": text}, user(f"x{text}")]
    control_ids = set(
        tokenizers.Tokenizer.from_file(
            str(FATHOM_TINY / "tokenizer.json")
        ).get_added_tokens_decoder()
    )
    expected = [i for i in tokenizer.encode_chat(harmless).token_ids if i in control_ids]
    prompt = tokenizer.encode_chat(hostile)
    assert [i for i in prompt.token_ids if i in control_ids] == expected
    assert b"".join(tokenizer.token_bytes[i] for i in prompt.token_ids).decode() == prompt.text
    assert f"x{text}" in prompt.text


def test_control_tokens_in_tools_and_variables_are_text(folder: Path) -> None:
    tokenizer = with_template(
        folder, "{{ messages[0].extra.deep | tojson }}{{ note }}{{ eos_token }}"
    )
    prompt = tokenizer.encode_chat(
        [user("", extra={"deep": ["<｜User｜>"]})], variables={"note": "<think>"}
    )
    assert prompt.text == '["<｜User｜>"]<think><｜end▁of▁sentence｜>'
    assert [i for i in prompt.token_ids if i in (1, *tiny().encode("<｜User｜><think>"))] == [1]


def test_raw_prompts_may_write_control_tokens() -> None:
    assert len(tiny().encode("<｜User｜>")) == 1


def test_what_is_shown() -> None:
    tokenizer = tiny()
    (user_id,) = tokenizer.encode("<｜User｜>")
    assert tokenizer.is_special(user_id)
    assert tokenizer.is_special(0)
    assert not tokenizer.is_special(tokenizer.encode("the")[0])
    assert tokenizer.encode("<think></think>") == [tokenizer.think_start_id, tokenizer.think_end_id]


# -- thoughts ------------------------------------------------------------------------------------


def test_thinking_is_read_from_the_prompt(folder: Path) -> None:
    tokenizer = with_template(folder, V31_TEMPLATE)
    assert tokenizer.encode_chat([user("hi")], thinking=True).thinking
    assert not tokenizer.encode_chat([user("hi")], thinking=False).thinking
    assert not tokenizer.encode_chat([user("<think>\n")], thinking=False).thinking
    assert tokenizer.opens_thought(tokenizer.encode("</think><think>hm"))
    assert not tokenizer.opens_thought(tokenizer.encode("<think>hm</think> so"))
    assert not tokenizer.opens_thought([])


def test_earlier_thoughts_are_dropped(folder: Path) -> None:
    tokenizer = with_template(folder, R1_TEMPLATE)
    plain = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    thought = [
        user("a"),
        {"role": "assistant", "content": "<think>\nhm</think>b", "reasoning_content": "hm"},
        user("c"),
    ]
    assert tokenizer.encode_chat(thought) == tokenizer.encode_chat(plain)


def test_developer_means_system_and_no_content_is_empty() -> None:
    assert tiny().encode_chat([{"role": "developer", "content": "x"}]) == tiny().encode_chat(
        [{"role": "system", "content": "x"}]
    )
    assert tiny().encode_chat([user(None)]) == tiny().encode_chat([user("")])


# -- requests that fail --------------------------------------------------------------------------


def test_a_tag_of_training_is_no_part_of_the_prompt(folder: Path) -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ eos_token }}"
    )
    assert with_template(folder, template).encode_chat([user("x")]).text == f"x{EOS}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 99999 }}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(99) %}"
        "{% set n.s = n.s + n.s %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10**9) }}",
        # much work for little text
        "{% set l = range(1000) | list %}{% for a in l %}{% for b in l %}{% for c in l %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% set l = range(900000) | list %}{% for i in range(99999) %}{{ -1 in l }}{% endfor %}",
        "{% set l = range(900000) | list %}{% for i in range(99999) %}{{ l | sum }}{% endfor %}",
        "{% set n = namespace(n=9) %}{% for i in range(60) %}{% set n.n = n.n * n.n %}{% endfor %}",
        # much of little
        "{{ [1] | slice(900000000) | list }}",
        "{{ lipsum(n=99999999) }}",
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}"
        "{% endfor %}{{ n.l }}",
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = n.l + n.l %}"
        "{% endfor %}",
        "{{ ('a' * 1000000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 1000000) | replace('', 'b' * 1000) }}",
        "{{ ('b' * 1000000).join(['a'] * 1000) }}",
        "{{ (['a'] * 1000) | join('b' * 1000000) }}",
        "{{ ('a' * 1000000).translate({97: 'b' * 100000}) }}",
        "{{ '{:{w}}'.format('x', w=99999999) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x' | center(1000000000) }}",
    ],
)
def test_a_template_that_fails_fails_the_request(folder: Path, template: str) -> None:
    tokenizer = with_template(folder, template)
    with pytest.raises(BadRequest) as caught:
        tokenizer.encode_chat([user("hi")])
    assert caught.value.code == "template_error"
    assert caught.value.param == "messages"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ 1 < 2 < 3 }}{{ 3 > 2 > 2 }}{{ 'a' in 'ab' }}{{ 1 not in [2] }}", "TrueFalseTrueTrue"),
        ("{{ 'a' ~ 1 ~ [2] }}{{ missing ~ 'x' }}", "a1[2]x"),
        ("{% if 0 > 1 < messages[0]['nope'].x %}a{% else %}b{% endif %}{{ 2 ** 3 }}", "b8"),
        ("{% block b %}x{{ messages[0].role }}{% endblock %}{{ self.b() }}", "xuserxuser"),
        (
            "{{ '{{\"name\": \"{}\"}}'.format('x') }}{{ '12345678 %s' % 'a' }}",
            '{"name": "x"}12345678 a',
        ),
        ("{{ messages[::-1][0].role }}{{ (1, 2)[1] }}{{ {'a': [1]}.a[0] }}", "user21"),
        (
            "{% for a, b in [(1, 2)] %}{{ a + b }}{% endfor %}{{ 'call %s' | format('x') }}",
            "3call x",
        ),
        ("{{ missing == none }}{{ missing in [1] }}{{ none is none }}", "FalseFalseTrue"),
        ("{{ 'é' | tojson(ensure_ascii=true) }}{{ [3, 1] | sort | join('-') }}", '"\\u00e9"1-3'),
    ],
)
def test_the_sandbox_changes_no_result(folder: Path, template: str, prompt: str) -> None:
    from transformers import AutoTokenizer

    assert with_template(folder, template).encode_chat([user("x")]).text == prompt
    reference = AutoTokenizer.from_pretrained(folder)
    assert reference.apply_chat_template([user("x")], tokenize=False) == prompt


def test_a_long_conversation_is_not_too_much_work(folder: Path) -> None:
    tokenizer = with_template(
        folder,
        "{% set ns = namespace(s='', l=[]) %}{% for m in messages %}"
        "{% set ns.s = ns.s + '\\n' ~ m.content %}{% set ns.l = ns.l + [m] %}"
        "{% if messages | length > 1 and m in messages[-3:] %}{{ loop.index }}{% endif %}"
        "{% endfor %}{{ ns.s }}",
    )
    prompt = tokenizer.encode_chat([user(f"{i} " + "x" * 600) for i in range(2048)])
    assert prompt.text.startswith("204620472048")


def test_settings_of_training_are_not_applied(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["truncation"] = {
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    raw["padding"] = {
        "strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("the sea is wide") == tiny().encode("the sea is wide")
    assert tokenizer.encode_chat([user("hello")]) == tiny().encode_chat([user("hello")])


def test_a_normalizer_that_spells_control_tokens_is_no_loop(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["normalizer"] = {"type": "Replace", "pattern": {"String": "X"}, "content": "<think>"}
    for token in raw["added_tokens"]:
        token["normalized"] = True
    path.write_text(json.dumps(raw))
    with pytest.raises(BadRequest, match="however it is split"):
        Tokenizer.load(folder).encode_chat([user("X")])


def test_a_million_spellings_are_refused_at_once() -> None:
    with pytest.raises(BadRequest, match="more than 4096 control tokens"):
        tiny().encode_chat([user("<think>" * 1_000_000)])
    prompt = tiny().encode_chat([user("<think>" * 4096)])
    assert tiny().think_start_id not in prompt.token_ids[:-2]  # the template's own is near the end


def test_a_huge_template_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="chat template: 300000 characters; at most 262144"):
        with_template(folder, "{# x #}" + "a" * 299_993)


def test_the_template_s_complaint_reaches_the_client(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequest, match="roles must alternate"):
        tokenizer.encode_chat([user("hi")])


def test_a_long_message_is_no_bomb(folder: Path) -> None:
    text = "x" * (MAX_RENDERED_CHARS // 4)
    assert text in with_template(folder, R1_TEMPLATE).encode_chat([user(text)]).text


def test_no_template_is_said(folder: Path) -> None:
    with pytest.raises(BadRequest, match="ships no chat template") as caught:
        with_template(folder, None).encode_chat([user("hi")])
    assert caught.value.code == "template_error"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "<｜User｜>\ud800"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match=r"U\+D") as caught:
        tiny().encode_chat([user(text)])
    assert caught.value.param == "messages"
    with pytest.raises(BadRequest) as caught:
        tiny().encode(text)
    assert caught.value.param == "prompt"


# -- files ---------------------------------------------------------------------------------------


def test_named_templates_and_the_jinja_file(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert with_template(folder, named).encode_chat([user("x")]).text == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(folder).encode_chat([user("x")]).text == "F"


def test_end_of_sequence_ids(folder: Path) -> None:
    assert Tokenizer.load(folder).eos_token_ids == {1}
    edit(folder / "generation_config.json", eos_token_id=[1, 7])
    assert Tokenizer.load(folder).eos_token_ids == {1, 7}
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=5)
    assert Tokenizer.load(folder).eos_token_ids == {5}
    edit(folder / "config.json", eos_token_id=None)
    assert Tokenizer.load(folder).eos_token_ids == {1}
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert Tokenizer.load(folder).eos_token_ids == frozenset()


def test_added_plain_characters_are_text(folder: Path) -> None:
    """deepseek-coder adds single letters as tokens: they are text on the way in and out."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    token_id = max(token["id"] for token in raw["added_tokens"]) + 1
    letter = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    del raw["model"]["vocab"]["ø"]  # the byte F8, which no text has
    raw["added_tokens"].append({"id": token_id, "content": "ø", "special": False, **letter})
    path.write_text(json.dumps(raw))
    edit(folder / "config.json", vocab_size=token_id + 1)
    tokenizer = Tokenizer.load(folder)
    (letter_id,) = tokenizer.encode("ø")
    assert letter_id in tokenizer.encode_chat([user("øre")]).token_ids
    assert tokenizer.token_bytes[letter_id] == "ø".encode()
    assert not tokenizer.is_special(letter_id)


def test_a_normalizer_opens_no_way_in(folder: Path) -> None:
    """With NFKC a full-width bracket spells the same control token."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["normalizer"] = {"type": "NFKC"}
    raw["added_tokens"].append(raw["added_tokens"].pop() | {"content": "<go>", "normalized": True})
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(folder)
    (go,) = tokenizer.encode("＜go＞")
    assert go == tokenizer.encode("<go>")[0]
    assert go not in tokenizer.encode_chat([user("＜go＞")]).token_ids


def test_a_control_token_inside_another_opens_no_way_in(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    last, before = raw["added_tokens"].pop(), raw["added_tokens"].pop()
    raw["added_tokens"] += [before | {"content": "<go<on>"}, last | {"content": "<on>"}]
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(folder)
    (on,) = tokenizer.encode("<on>")
    assert on not in tokenizer.encode_chat([user("<go<on>")]).token_ids


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer.json", None, "No such file"),
        ("tokenizer.json", "", "EOF"),
        ("tokenizer.json", '{"decoder":[}}}', "expected value"),
        ("tokenizer.json", "[]", ""),
        ("tokenizer.json", b"\xff\xfe", "utf-8"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": []}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag"}]}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template: line 1"),
        ("chat_template.jinja", "{{", "chat template: line 1"),
        ("chat_template.jinja", b"\xff", "utf-8"),
        ("config.json", None, "No such file"),
        ("generation_config.json", '{"eos_token_id": 1e9}', "eos_token_id"),
    ],
)
def test_damaged_file_is_one_line(
    folder: Path, name: str, content: str | bytes | None, why: str
) -> None:
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(folder)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert why in message
    assert "\n" not in message


def test_truncated_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:-2000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(folder)


def test_a_panic_of_the_library_is_a_checkpoint_error(folder: Path, monkeypatch: Any) -> None:
    class PanicException(BaseException):  # as pyo3 makes it
        pass

    def panic(text: str) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("runtime.tokenizer.tokenizers.Tokenizer.from_str", panic, raising=False)
    with pytest.raises(CheckpointError, match="index out of bounds"):
        Tokenizer.load(folder)


def test_more_tokens_than_embeddings(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=100)
    with pytest.raises(CheckpointError, match="the model has 100 embeddings"):
        Tokenizer.load(folder)


def test_only_byte_level_bpe(folder: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(folder / "tokenizer.json")
    )
    with pytest.raises(CheckpointError, match="only byte-level BPE is supported"):
        Tokenizer.load(folder)


# -- prompts that are too long -------------------------------------------------------------------

HARMFUL = "\U0001f468\u200d"  # one piece for the pre-tokenizer, however often it is repeated
repetitive_texts = st.lists(
    st.tuples(st.one_of(texts, st.sampled_from([*controls(), HARMFUL, " ", "ab"])), st.just(9)),
    max_size=12,
).map(lambda parts: "".join(text * times for text, times in parts))


def raw_backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FATHOM_TINY / "tokenizer.json"))


def fewest_by_hand(text: str) -> int:
    """The fewest tokens whose bytes are those of ``text``."""
    data, tokens = text.encode(), {token for token in tiny().token_bytes if token}
    longest = max(map(len, tokens))
    fewest = [0]
    for end in range(1, len(data) + 1):
        starts = range(max(0, end - longest), end)
        fewest.append(1 + min(fewest[start] for start in starts if data[start:end] in tokens))
    return fewest[-1]


@thorough
@given(repetitive_texts)
def test_the_bound_is_the_fewest_tokens_that_cover_a_text(text: str) -> None:
    bound = TokenBound(raw_backend(), tiny().token_bytes)
    lost = 2 * (max(map(len, tiny().token_bytes)) - 1)
    assert bound.fewest(text, 10**9) == max(fewest_by_hand(text) - lost, 0)


@pytest.mark.parametrize("slice_chars", [70, 1 << 14])
def test_no_text_has_fewer_tokens_than_its_bound(
    slice_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_bound, "SLICE_CHARS", slice_chars)
    backend = raw_backend()
    bound = TokenBound(backend, tiny().token_bytes)

    @thorough
    @given(repetitive_texts)
    def check(text: str) -> None:
        num_tokens = len(backend.encode(text, add_special_tokens=False))
        assert bound.fewest(text, 10**9) <= num_tokens
        assert bound.fewest(text, 10) <= num_tokens

    check()
    text = HARMFUL * 2000
    assert bound.fewest(text, 10**9) > len(backend.encode(text)) // 3


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip"} | dict.fromkeys(
            ("strip_left", "strip_right"), True
        )]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False,
             "trim_offsets": True},
        ]}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
    ],
)  # fmt: skip
def test_nothing_is_known_of_tokenizers_that_may_drop_text(change: dict[str, Any]) -> None:
    raw = json.loads((FATHOM_TINY / "tokenizer.json").read_text()) | change
    backend = tokenizers.Tokenizer.from_str(json.dumps(raw))
    assert TokenBound(backend, tiny().token_bytes).fewest("ab " * 9999, 10**9) == 0
    empty = {"normalizer": {"type": "Sequence", "normalizers": []}}  # as DeepSeek-V3 has
    backend = tokenizers.Tokenizer.from_str(json.dumps(raw | empty))
    known = change.keys() == {"normalizer"}
    assert (TokenBound(backend, tiny().token_bytes).fewest("ab " * 9999, 10**9) > 0) is known


def test_nothing_is_known_where_a_token_takes_the_spaces_beside_it() -> None:
    backend = raw_backend()
    backend.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    assert TokenBound(backend, tiny().token_bytes).fewest("ab " * 9999, 10**9) == 0


@thorough
@given(conversations)
def test_a_limit_changes_no_token(messages: list[dict[str, Any]]) -> None:
    assert tiny().encode_chat(messages, max_model_len=10**6) == tiny().encode_chat(messages)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_long_text_is_refused_by_a_true_number_before_it_is_encoded(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": role, "content": HARMFUL * (LONG_TEXT // 2)}, user("hi")]
    whole = tiny().encode_chat(messages)
    num_tokens = len(whole.token_ids)
    assert tiny().encode_chat(messages, max_model_len=num_tokens + 1) == whole

    def encode(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the text was encoded")

    monkeypatch.setattr(Tokenizer, "_encode", encode)
    for limit in (1, 8192, num_tokens // 2):
        with pytest.raises(ContextLengthExceeded, match="at least") as caught:
            tiny().encode_chat(messages, max_model_len=limit)
        assert limit <= caught.value.num_tokens <= num_tokens
        assert f"at least {caught.value.num_tokens} tokens" in str(caught.value)
        assert f"length is {limit} tokens" in str(caught.value)


def test_what_the_template_drops_does_not_make_a_prompt_too_long(folder: Path) -> None:
    tokenizer = with_template(folder, R1_TEMPLATE)
    thought = {"role": "assistant", "content": f"<think>{HARMFUL * LONG_TEXT}</think>b"}
    plain = tokenizer.encode_chat([user("a"), {"role": "assistant", "content": "b"}, user("c")])
    assert tokenizer.encode_chat([user("a"), thought, user("c")], max_model_len=100) == plain
