"""Damaged tokenizers and chat templates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.runtime.corpus.case import (
    NUM_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Case,
    Damage,
    edit_json,
    link_to,
    link_to_itself,
    remove,
    replaced_by,
    write,
)

TEMPLATE = "chat_template.jinja"
UNCOMPILABLE = {
    "of 25 loops": "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
    "of 120 conditions": "{% if messages %}" * 120 + "{% endif %}" * 120,
    "with a number of 5,000 digits": "{{ " + "9" * 5000 + " }}",
    "with an argument given twice": "{{ raise_exception(a=1, a=2) }}",
    "with a parameter of one name twice": "{% macro m(a, a) %}{% endmacro %}",
    "that breaks out of no loop": "{% break %}",
}
"""Templates that jinja parses, but that Python does not compile."""


def cut(folder: Path) -> None:
    path = folder / TOKENIZER
    path.write_bytes(path.read_bytes()[:3000])


def set_vocabulary(entry: dict[str, int]) -> Damage:
    return edit_json(TOKENIZER, lambda tokenizer: tokenizer["model"]["vocab"].update(entry))


def split_by(pattern: str) -> Damage:
    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return edit_json(TOKENIZER, edit)


def set_template(source: object) -> Damage:
    return edit_json(TOKENIZER_CONFIG, lambda config: config.update(chat_template=source))


PROMPTS: dict[str, Case] = {
    "tokenizer missing": Case(remove(TOKENIZER), TOKENIZER, ("No such file",)),
    "tokenizer empty": Case(write(TOKENIZER, ""), TOKENIZER, ("EOF",)),
    "tokenizer cut": Case(cut, TOKENIZER, ("EOF",)),
    "tokenizer an empty object": Case(write(TOKENIZER, "{}"), TOKENIZER, ("Model missing",)),
    "tokenizer that panics": Case(
        write(TOKENIZER, '{"decoder":[}}}'), TOKENIZER, ("expected value",)
    ),
    "tokenizer of bad UTF-8": Case(write(TOKENIZER, b'{"a": "\xff"}'), TOKENIZER, ("utf-8",)),
    "tokenizer nested deeply": Case(
        write(TOKENIZER, '{"model":' + "[" * 100_000), TOKENIZER, ("recursion",)
    ),
    "tokenizer is a folder": Case(replaced_by(TOKENIZER, Path.mkdir), TOKENIZER, ("irectory",)),
    "tokenizer links to itself": Case(
        replaced_by(TOKENIZER, link_to_itself), TOKENIZER, ("symbolic links",)
    ),
    "tokenizer of a strange kind": Case(
        edit_json(
            TOKENIZER,
            lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        ),
        TOKENIZER,
        ("WordLevel", "only byte-level BPE"),
    ),
    "tokenizer with a broken regular expression": Case(
        split_by("("), TOKENIZER, ("Oniguruma error",)
    ),
    "tokenizer larger than the embeddings": Case(
        set_vocabulary({"zzz": NUM_TOKENS}),
        TOKENIZER,
        (f"{NUM_TOKENS + 1} tokens", f"{NUM_TOKENS} embeddings"),
    ),
    "tokenizer with an id of 2^32-1": Case(
        set_vocabulary({"zzz": 2**32 - 1}), TOKENIZER, (f"{NUM_TOKENS} embeddings",)
    ),
    "tokenizer that merges what is not there": Case(
        edit_json(TOKENIZER, lambda t: t["model"]["merges"].append(["\x1b[2J", "b"])),
        TOKENIZER,
        (r"\x1b[2J", "out of vocabulary"),
    ),
    "tokenizer links to nothing": Case(
        replaced_by(TOKENIZER, link_to("../blobs/gone")), TOKENIZER, ("No such file",)
    ),
    "tokenizer is a pipe": Case(
        replaced_by(TOKENIZER, os.mkfifo), TOKENIZER, ("not a regular file",)
    ),
    "tokenizer is a device": Case(
        replaced_by(TOKENIZER, link_to("/dev/zero")), TOKENIZER, ("not a regular file",)
    ),
    "tokenizer of 65 MB": Case(
        lambda folder: os.truncate(folder / TOKENIZER, 65 << 20), TOKENIZER, ("larger than",)
    ),
    "tokenizer_config links to nothing": Case(
        replaced_by(TOKENIZER_CONFIG, link_to("../blobs/gone")),
        TOKENIZER_CONFIG,
        ("No such file",),
    ),
    "tokenizer_config not JSON": Case(
        write(TOKENIZER_CONFIG, "{"), TOKENIZER_CONFIG, ("not valid JSON",)
    ),
    "tokenizer_config a list": Case(
        write(TOKENIZER_CONFIG, "[]"), TOKENIZER_CONFIG, ("not an object",)
    ),
    "eos_token not a text": Case(
        edit_json(TOKENIZER_CONFIG, lambda c: c.update(eos_token=[1])),
        TOKENIZER_CONFIG,
        ("eos_token: not a text",),
    ),
    "template does not parse": Case(
        set_template("{% for m in messages %}"), TOKENIZER_CONFIG, ("chat template: line 1",)
    ),
    "template with an unknown tag": Case(
        set_template("\n{% import_module os %}"), TOKENIZER_CONFIG, ("line 2", "import_module")
    ),
    "template with an unknown filter": Case(
        set_template("{{ messages | pickle }}"), TOKENIZER_CONFIG, ("line 1", "pickle")
    ),
    "template nested deeply": Case(
        set_template("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"),
        TOKENIZER_CONFIG,
        ("nested too deeply",),
    ),
    **{
        f"template {name}": Case(set_template(source), TOKENIZER_CONFIG, ("chat template: ",))
        for name, source in UNCOMPILABLE.items()
    },
    "template a number": Case(set_template(3), TOKENIZER_CONFIG, ("chat_template: neither",)),
    "templates without a default": Case(
        set_template([{"name": "tool_use", "template": ""}]),
        TOKENIZER_CONFIG,
        ("chat_template: neither", "'default'"),
    ),
    "template file does not parse": Case(
        write(TEMPLATE, "{{ bos_token }"), TEMPLATE, ("chat template: line 1",)
    ),
    "template file of bad UTF-8": Case(write(TEMPLATE, b"\xff"), TEMPLATE, ("utf-8",)),
    "template file is a folder": Case(
        lambda folder: (folder / TEMPLATE).mkdir(), TEMPLATE, ("irectory",)
    ),
    "template file is a pipe": Case(
        lambda folder: os.mkfifo(folder / TEMPLATE), TEMPLATE, ("not a regular file",)
    ),
    "template file links to nothing": Case(
        lambda folder: (folder / TEMPLATE).symlink_to("../blobs/gone"), TEMPLATE, ("No such file",)
    ),
    "template that steers the terminal": Case(
        set_template("{% \x1b[2J %}"), TOKENIZER_CONFIG, (r"\x1b",)
    ),
}
