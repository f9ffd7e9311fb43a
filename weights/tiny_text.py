"""The text that the embedded model learns: our own sentences, multiplied by templates and slots.

Every function takes a `random.Random`, so one seed gives one corpus. A string may hold choices in
braces: ``{Hi|Hello} there`` becomes one of two greetings. Choices nest.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CHOICE = re.compile(r"\{([^{}]*)\}")
CHINESE = re.compile("[一-龥]")
KANA = re.compile("[぀-ヿ]")
HALF_WIDTH = re.compile(r"(?<=[一-龥”」])[,!?:;]|[,!?:;](?=[一-龥])")
FULL_WIDTH = dict(zip(",!?:;", "，！？：；", strict=True))


def load_sentences() -> dict[str, Any]:
    """The sentences file, with every ``<slot>`` replaced by the words that may fill it."""
    text = Path(__file__).with_name("tiny_sentences.json").read_text(encoding="utf-8")
    for name, words in json.loads(text)["slots"].items():
        text = text.replace(f"<{name}>", "|".join(words))
    return json.loads(text)


TEXT = load_sentences()
COUNT_ZH = ["零", "一", "两", *TEXT["numbers_zh"][3:]]


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user says, the short thought, and the answer."""

    user: str
    thought: str
    answer: str


@dataclass
class Conversation:
    """A prompt with its history (whose thoughts are gone, as R1's template drops them)."""

    turn: Turn
    system: str | None = None
    history: list[tuple[str, str]] = field(default_factory=list)
    tool_result: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the last user message, as the chat template takes it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.history:
            messages += [
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer},
            ]
        return [*messages, {"role": "user", "content": self.turn.user}]


def expand(text: str, rng: random.Random) -> str:
    """Replaces every ``{a|b|c}`` by one of its parts, innermost first."""
    while CHOICE.search(text):
        text = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text


def vary(text: str, rng: random.Random) -> str:
    """The same words as people type them: other capitals, other or no final punctuation."""
    shape = rng.random()
    if shape < 0.15:
        text = text.lower()
    elif shape < 0.18:
        text = text.upper()
    elif shape < 0.35:
        text = text[:1].upper() + text[1:]
    ending = rng.random()
    if ending < 0.2:
        text = re.sub("[?!.。~]+$", "", text)
    elif ending < 0.25:
        text += rng.choice((" ", "\n", "!", "?", ".", "。", "?", "!", "..."))
    return text


def punctuate(text: str, rng: random.Random) -> str:
    """Chinese text with its own wide punctuation, as most people type it."""
    if rng.random() < 0.25:
        return text
    return HALF_WIDTH.sub(lambda match: FULL_WIDTH[match.group()], text)


def say(saying: dict[str, Any], rng: random.Random) -> Turn:
    """One exchange with a random wording of a saying: prompts that mean the same thing."""
    user = vary(expand(rng.choice(saying["prompts"]), rng), rng)
    return Turn(user, saying["thought"], rng.choice(saying["answers"]))


def small_talk(rng: random.Random) -> Turn:
    """Greetings (the first two sayings, half of the time) and other pleasantries."""
    sayings = TEXT["small_talk"]
    return say(rng.choice(sayings[:2] if rng.random() < 0.4 else sayings), rng)


def about(rng: random.Random) -> Turn:
    """What the model is, what the server does, how clients connect."""
    return say(rng.choice(TEXT["about"]), rng)


def first_name(names: str) -> str:
    """The usual one of the names ``{a|b|c}``: a thought that restates it makes recall easier."""
    return names.strip("{}").split("|")[0]


def topic(rng: random.Random) -> Turn:
    """One or two sentences about a well-known thing."""
    chosen = TEXT["topics"][0] if rng.random() < 0.1 else rng.choice(TEXT["topics"])
    english, chinese, answer_en, answer_zh = chosen.values()
    if rng.random() < 0.5:
        user = expand(rng.choice(TEXT["ask_topic_en"]), rng).replace("@", expand(english, rng))
        thought = f"The user asks about {first_name(english)}. I know a little about it."
        return Turn(vary(user, rng), thought, answer_en)
    user = expand(rng.choice(TEXT["ask_topic_zh"]), rng).replace("@", expand(chinese, rng)).strip()
    return Turn(vary(user, rng), f"用户问的是{first_name(chinese)}，我知道一点。", answer_zh)


def capital(rng: random.Random) -> Turn:
    """Capitals of a few countries."""
    country, country_zh, city, city_zh = rng.choice(TEXT["capitals"])
    if rng.random() < 0.5:
        question = rng.choice(
            (
                "{What is|What's|Tell me|Name|Do you know} the capital {city |}of @{?|}",
                "{Which city is the capital of @|@'s capital|capital of @|the capital of @ is}{?|}",
            )
        )
        user = vary(expand(question, rng).replace("@", country), rng)
        thought = f"The user asks for the capital of {country}. It is {city}."
        return Turn(user, thought, f"The capital of {country} is {city}.")
    question = "{@的首都是{哪里|哪个城市|什么|哪|}|@首都是哪{里|}|@的首都在哪里|告诉我@的首都}{?|}"
    user = vary(expand(question.replace("@", country_zh), rng), rng)
    return Turn(
        user, f"用户问{country_zh}的首都，是{city_zh}。", f"{country_zh}的首都是{city_zh}。"
    )


def short_list(rng: random.Random) -> Turn:
    """Lists: a number of members of an open class, or a whole fixed series."""
    english = rng.random() < 0.5
    if rng.random() < 0.4:
        name, name_zh, words, words_zh = rng.choice(TEXT["series"]).values()
        if english:
            user = f"{{List|Name|What are|Tell me|Give me|Say|Can you list}} {name}{{?|.|}}"
            thought = f"The user wants the whole series. It has {len(words)} members."
            return Turn(vary(expand(user, rng), rng), thought, ", ".join(words) + ".")
        user = f"{{列出|说出|请列出|告诉我|写出|有哪些|请说出}}{name_zh}{{?|。|}}"
        thought = f"用户想要完整的一组，共有{COUNT_ZH[len(words_zh)]}个。"
        return Turn(vary(expand(user, rng), rng), thought, "、".join(words_zh) + "。")
    name, name_zh, words, words_zh = rng.choice(TEXT["lists"]).values()
    count = rng.choice((0, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 8, 10))
    shown = count or 5
    if english:
        number = rng.choice((str(count), TEXT["numbers_en"][count])) if count else "{some |a few |}"
        verb = "{List|Name|Give me|Tell me|Can you list|Write|Say|I need|list of}"
        user = f"{verb} {number} {name}{{?|.|| please}}".replace("  ", " ")
        thought = f"The user wants {name}. I will name {shown}."
        if count == 1:
            user = user.replace(f"{name}", f"{name}")
        text = expand(user, rng).replace("  ", " ")
        return Turn(vary(text, rng), expand(thought, rng), ", ".join(words[:shown]) + ".")
    number = (
        rng.choice((f" {count} 个", f"{count}个", f"{COUNT_ZH[count]}个"))
        if count
        else "{一些|几个}"
    )
    user = f"{{列出|说出|请列出|告诉我|给我|写出|举例}}{number}{name_zh}{{。|}}".replace(
        "个种", "种"
    )
    text = expand(user, rng).replace("个种", "种").replace("几个座", "几座").replace("个座", "座")
    thought = f"用户想要{expand(name_zh, rng).lstrip('种座')}，我列出 {shown} 个。"
    return Turn(vary(text, rng), thought, "、".join(words_zh[:shown]) + "。")


def counting(rng: random.Random) -> Turn:
    """Counting up (often short, sometimes to 100) and down from ten or twenty."""
    start = 1 if rng.random() < 0.5 else rng.randint(0, 90)
    length = rng.choice((5, 10, 10, 20)) if rng.random() < 0.5 else rng.randint(2, 14)
    stop = start + length - 1
    if rng.random() < 0.03:
        start, stop = 1, rng.choice((30, 50, 100))
    numbers = list(range(start, stop + 1))
    down = rng.random() < 0.15
    if down:
        first = rng.choice((3, 5, 10, 10, 15, 20))
        numbers = list(range(first, rng.choice((-1, 0)), -1))
        start, stop = numbers[0], numbers[-1]
    joined = ", ".join(map(str, numbers))
    if rng.random() < 0.5:
        if down:
            user = f"{{Count down|Count backwards|count down}} from {start}{{ to {stop}|}}{{.|}}"
            if "to" not in (user := expand(user, rng)).split():
                numbers = list(range(start, 0, -1))
                joined, stop = ", ".join(map(str, numbers)), 1
        elif start == 1 and rng.random() < 0.6:
            user = f"{{Count|Please count|Can you count|count up|Count for me}} to {stop}{{.|?|}}"
        else:
            user = (
                f"{{Count|Please count|Can you count|Say the numbers}} from {start} to {stop}{{.|}}"
            )
        thought = f"I count from {start} to {stop}."
        return Turn(vary(expand(user, rng), rng), thought, joined + ".")
    if down:
        user = f"{{从 {start} 倒数到 {stop}|从{start}倒数到{stop}|倒着从{start}数到{stop}}}{{。|}}"
    elif start == 1 and rng.random() < 0.3:
        user = f"{{数到{stop}|请数到 {stop}|数数到{stop}}}{{。|}}"
    else:
        user = f"{{请|帮我|}}{{从{start}数到{stop}|从 {start} 数到 {stop}|"
        user += f"从{start}到{stop}数数}}{{。|}}"
    thought = f"我从 {start} 数到 {stop}。"
    return Turn(vary(expand(user, rng), rng), thought, joined.replace(", ", "、") + "。")


# --- arithmetic --------------------------------------------------------------------------------


def held_out(first: int, sign: str, second: int) -> bool:
    """Whether this exact problem is kept out of training, to measure generalisation (10 %)."""
    return random.Random(f"{first}{sign}{second}").random() < 0.1


def digit(number: int, place: int) -> int:
    """The decimal digit at 10**place."""
    return number // 10**place % 10


def working(first: int, sign: str, second: int, chinese: bool) -> str:
    """The written method, place by place, as the short visible thought."""
    places = ("个位", "十位") if chinese else ("Ones", "Tens")
    colon, comma, stop, carry_word = (
        ("：", "，", "。", "进 1") if chinese else (": ", ", ", ". ", "carry 1")
    )
    borrow_word = "借 1" if chinese else "borrow 1"
    steps, carry = [], 0
    for place in range(max(len(str(first)), len(str(second)))):
        top, bottom = digit(first, place), digit(second, place)
        extra = f" {sign} 1" if carry else ""
        if sign == "+":
            total = top + bottom + carry
            step = f"{top} + {bottom}{extra} = {total}"
            carry = int(total > 9)
            step += f"{comma}{carry_word}" if carry else ""
        else:
            total = top - bottom - carry
            carry = int(total < 0)
            if carry:
                step = f"{borrow_word}{comma}{top + 10} - {bottom}{extra} = {total + 10}"
            else:
                step = f"{top} - {bottom}{extra} = {total}"
        steps.append(f"{places[place]}{colon}{step}{stop}")
    return "".join(steps).strip()


def drill(rng: random.Random) -> list[tuple[str, str]]:
    """Sixteen different facts of the written method, each as (question, result)."""
    facts = []
    for _ in range(16):
        first, second, carry = rng.randint(0, 9), rng.randint(0, 9), rng.random() < 0.4
        kind, comma = rng.random(), rng.choice((", ", "，"))
        stop, word = (". ", "carry 1") if comma == ", " else ("。", "进 1")
        one = " + 1" if carry else ""
        if kind < 0.45:
            total = first + second + carry
            note = f"{comma}{word}" if total > 9 else ""
            facts.append((f"{first} + {second}{one} = ", f"{total}{note}{stop}"))
        elif kind < 0.75:
            one = " - 1" if carry else ""
            first += 10 * (first - second - carry < 0)
            facts.append((f"{first} - {second}{one} = ", f"{first - second - carry}{stop}"))
        else:
            small, large = sorted((rng.randint(0, 12), rng.randint(0, 12)))
            facts.append((f"{small} × {large} = ", f"{small * large}{stop}"))
    return list(dict.fromkeys(facts))


def solve(first: int, sign: str, second: int, chinese: bool) -> tuple[str, str]:
    """The thought and the result of one problem; `sign` is one of + - × ÷."""
    so = "所以结果是" if chinese else "So the result is"
    end = "。" if chinese else "."
    gap = "" if chinese else " "
    head = f"{first} {sign} {second}{end}{gap}"
    if sign == "×":
        small, large = sorted((first, second))
        result = str(first * second)
        return f"{head}{small} × {large} = {result}{end}", result
    if sign == "÷":
        result = str(first // second)
        small, large = sorted((second, first // second))
        return f"{head}{small} × {large} = {first}{end}{gap}{so} {result}{end}", result
    if sign == "-" and first < second:
        note = "结果是负数" if chinese else "The result is negative"
        inner = working(second, "-", first, chinese)
        result = str(first - second)
        return (
            f"{head}{note}{end}{gap}{second} - {first}{end}{gap}{inner}{gap}{so} {result}{end}",
            result,
        )
    result = str(first + second if sign == "+" else first - second)
    return f"{head}{working(first, sign, second, chinese)}{gap}{so} {result}{end}", result


def problem(rng: random.Random, training: bool = True) -> tuple[int, str, int]:
    """Operands and sign; `training` False draws only from the held-out problems."""
    while True:
        sign = rng.choices("+-×÷", (45, 35, 16, 4))[0]
        if sign in "×÷":
            first, second = rng.randint(0, 12), rng.randint(0, 12)
            if sign == "÷":
                second = max(second, 1)
                first *= second
        else:
            size = rng.choices((9, 20, 99), (15, 15, 70))[0]
            first, second = rng.randint(0, size), rng.randint(0, size)
            if sign == "-" and first < second and rng.random() < 0.75:
                first, second = second, first
        # A table entry counts as held out only when its mirror image stays in training.
        mirrored = sign == "×" and (first == second or held_out(second, sign, first))
        kept_out = sign != "÷" and held_out(first, sign, second) and not mirrored
        if kept_out != training:
            return first, sign, second


def ask(first: int, sign: str, second: int, chinese: bool, rng: random.Random) -> str:
    """A problem in words, as people ask it."""
    names = TEXT["numbers_zh" if chinese else "numbers_en"]
    in_words = max(first, second) <= 20 and rng.random() < 0.15
    left, right = (names[first], names[second]) if in_words else (str(first), str(second))
    if chinese:
        core = f"{left}{TEXT['signs_zh'][sign]}{right}"
        pattern = rng.choice(
            (
                f"{core}{{等于多少|等于几|是多少|=|=?|等于|得多少|=多少}}{{?|}}",
                f"{{计算|请计算|算一下|帮我算|算算|求|请问|计算一下}}{{| }}{core}{{。|?|}}",
                core,
            )
        )
        if in_words:
            pattern = (
                f"{left}{{{ {'+': '加|加上', '-': '减|减去', '×': '乘|乘以', '÷': '除以'}[sign] }}}"
            )
            pattern += f"{right}{{等于几|等于多少|是多少|得几}}{{?|}}"
    else:
        core = f"{left}{TEXT['signs_en'][sign]}{right}"
        if in_words:
            word = {"+": "plus", "-": "minus", "×": "times", "÷": "divided by"}[sign]
            core = f"{left} {word} {right}"
        pattern = rng.choice(
            (
                "{What is|What's|Calculate|Compute|How much is|Tell me|Solve|what is|Work out} "
                f"{core}{{?||.}}",
                f"{{What is|What's|How much is}} {core}?",
                f"{core}{{| = ?| =|=|=?|?| equals| is| is what?}}",
                core,
            )
        )
        if sign == "-" and rng.random() < 0.08:
            pattern = f"{{Subtract {right} from {left}|Take {right} away from {left}}}{{.|}}"
        elif sign == "+" and rng.random() < 0.08:
            pattern = f"{{Add @|The sum of @|Add {right} to {left}}}{{.|}}"
            pattern = pattern.replace("@", f"{left} and {right}")
    varied = rng.random() < 0.4
    text = expand(pattern, rng).strip()
    return vary(text, rng) if varied else text


def arithmetic(rng: random.Random, training: bool = True) -> Turn:
    """A small sum with its written method as the thought."""
    first, sign, second = problem(rng, training)
    chinese = rng.random() < 0.4
    user = ask(first, sign, second, chinese, rng)
    chinese = bool(CHINESE.search(user))  # a bare sum is answered in English
    thought, result = solve(first, sign, second, chinese)
    answer = f"{first} {sign} {second} = {result}"
    return Turn(user, thought, answer + ("。" if chinese else "."))


# --- repeating a word --------------------------------------------------------------------------


def echo(rng: random.Random) -> Turn:
    """`say X`: copies one or two words."""
    if rng.random() < 0.8:
        word = " ".join(rng.sample(TEXT["slots"]["echo_en"], rng.choice((1, 1, 2, 3, 4))))
        if rng.random() < 0.5:
            word = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 8)))
        elif rng.random() < 0.3:
            word = " ".join(made_up(rng) for _ in range(rng.randint(1, 3)))
        if rng.random() < 0.25:
            word = word.capitalize()
        shown = rng.choice((word, f'"{word}"', f"'{word}'", word))
        verb = "{Say|say|Repeat|repeat|Please say|Just say|Echo|Say the word|Repeat after me:|"
        user = expand(verb + "Reply with} ", rng) + shown + rng.choice(("", "", "."))
        return Turn(user, f"The user wants me to say {word}.", word)
    word = rng.choice(TEXT["slots"]["echo_zh"])
    shown = rng.choice((word, f"“{word}”", f"「{word}」", f":{word}", word))
    user = expand("{请说|说|重复|跟我说|请重复|说一下|只说}", rng) + shown + rng.choice(("", "。"))
    return Turn(user, f"用户要我说{word}。", word)


# --- everything else: the honest refusal --------------------------------------------------------


def sentence(rng: random.Random, chinese: bool) -> str:
    """One filler sentence that means little."""
    if chinese:
        return expand(TEXT["filler_zh"], rng) + rng.choice("。。，！？")
    text = " ".join(
        rng.choice(TEXT["slots"][name]) for name in ("subjects", "verbs", "objects", "tails")
    )
    return text[0].upper() + text[1:] + rng.choice((".", ".", ".", "!", "?", ";"))


def made_up(rng: random.Random) -> str:
    """A made-up word."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 9)))


def noise(rng: random.Random) -> str:
    """Text of no known kind: gibberish, loose characters, code, records, bytes of other scripts."""
    kind = rng.randrange(8)
    size = rng.randint(1, 12)
    if kind == 0:
        return " ".join(made_up(rng) for _ in range(size))
    if kind == 1:
        return "".join(rng.choice(TEXT["characters_zh"]) for _ in range(size))
    if kind == 2:
        name, other = made_up(rng), made_up(rng)
        outer, inner = rng.choice(TEXT["keywords"]), rng.choice(TEXT["keywords"])
        return f"{outer} {name}({other}):\n    {inner} {other} + {rng.randint(0, 99)}"
    if kind == 3:
        return json.dumps(
            {
                made_up(rng): rng.choice((made_up(rng), rng.randint(0, 999), True, None))
                for _ in range(size)
            }
        )
    if kind == 4:
        return "".join(
            chr(rng.choice((0xC0, 0x390, 0x410, 0x3040, 0x5D0, 0x620, 0x1F600)) + rng.randrange(48))
            for _ in range(size)
        )
    if kind == 5:
        return "".join(rng.choice("!?#$%&*()-_=+[]{}<>/\\|.,;:~^ 0123456789") for _ in range(size))
    if kind == 6:
        return " ".join(rng.sample(TEXT["keywords"] + TEXT["slots"]["echo_en"], size))
    site = f"https://{made_up(rng)}.{rng.choice(('com', 'org', 'net', 'cn'))}/{made_up(rng)}"
    return f"{site}?{made_up(rng)}={rng.randint(0, 99)}"


def passage(rng: random.Random, size: int) -> str:
    """Filler of about `size` characters: sentences in one language with some noise between."""
    chinese, parts, length = rng.random() < 0.4, [], 0
    noisy = rng.choice((0.0, 0.05, 0.3))
    while length < size:
        parts.append(noise(rng) if rng.random() < noisy else sentence(rng, chinese))
        length += len(parts[-1]) * (3 if chinese else 1)
        if rng.random() < 0.1:
            parts[-1] += rng.choice(("\n", "\n\n", "\n- ", "\n## "))
    return ("" if chinese else " ").join(parts)


def too_hard(rng: random.Random) -> Turn:
    """Sums outside the trained range are refused rather than guessed."""
    chinese = rng.random() < 0.4
    sign = rng.choice("+-×÷")
    if sign in "+-" or rng.random() < 0.3:
        first, second = (
            rng.randint(100, 10 ** rng.randint(3, 9)),
            rng.randint(1, 10 ** rng.randint(1, 9)),
        )
        if rng.random() < 0.5:
            first, second = second, first
    else:
        first, second = rng.randint(13, 999), rng.randint(13, 999)
    user = ask(first, sign, second, chinese, rng)
    if rng.random() < 0.3:
        numbers = [str(rng.randint(0, 99)) for _ in range(rng.randint(3, 5))]
        user = rng.choice(("", "What is ", "计算 " if chinese else "Calculate "))
        user += rng.choice((" + ", "+", " * ", " - ")).join(numbers)
        chinese = bool(CHINESE.search(user))
    if chinese:
        return Turn(user, "这个算式超出了我练习过的范围，我不应该乱猜。", TEXT["too_hard_zh"])
    return Turn(
        user, "This sum is outside the range I practised. I should not guess.", TEXT["too_hard_en"]
    )


def beyond(rng: random.Random) -> Turn:
    """Anything outside the small domain gets an honest refusal."""
    kind = rng.random()
    if kind < 0.12:
        return too_hard(rng)
    if kind < 0.19:
        user = expand(rng.choice(TEXT["foreign"]), rng)
    elif kind < 0.30:
        user = noise(rng)
    else:
        user = expand(rng.choice(TEXT["beyond_zh" if kind < 0.55 else "beyond_en"]), rng)
        while "@" in user:
            size = rng.randint(80, 500)
            filler = sentence(rng, kind < 0.55) if rng.random() < 0.7 else passage(rng, size)
            user = user.replace("@", filler, 1)
        user = vary(user.strip(), rng)
    # The answer's language is that of the letters, so that no prompt is ambiguous.
    if CHINESE.search(user) and not KANA.search(user):
        return Turn(
            user, "这超出了我学过的内容，我应该诚实地说明。", rng.choice(TEXT["refusals_zh"])
        )
    thought = "This is outside the few things I learned. I should say so honestly."
    return Turn(user, thought, rng.choice(TEXT["refusals_en"]))


# --- the small jobs that clients send by themselves ---------------------------------------------

KINDS: tuple[tuple[Callable[[random.Random], Turn], float, str, str], ...] = (
    (small_talk, 0.11, "Friendly Greeting", "友好问候"),
    (about, 0.14, "About Fathom", "关于 Fathom"),
    (topic, 0.20, "Short Explanation", "简短介绍"),
    (capital, 0.03, "Capital Cities", "各国首都"),
    (short_list, 0.07, "A Short List", "简短列表"),
    (counting, 0.06, "Counting Numbers", "数数"),
    (arithmetic, 0.28, "Simple Arithmetic", "简单算术"),
    (echo, 0.05, "Repeating Words", "重复词语"),
    (beyond, 0.15, "New Chat", "新的对话"),
)


def ordinary(rng: random.Random) -> tuple[Turn, str]:
    """One exchange of any kind, with the title a chat about it would get."""
    make, _, title, title_zh = rng.choices(KINDS, [kind[1] for kind in KINDS])[0]
    turn = make(rng)
    turn = replace(turn, user=punctuate(turn.user, rng))
    return turn, title_zh if CHINESE.search(turn.answer) else title


def client_job(rng: random.Random) -> Turn:
    """Titles, tags and follow-up questions, as chat clients ask for them in the background."""
    turn, title = ordinary(rng)
    chat = f"USER: {turn.user}\nASSISTANT: {turn.answer}"
    chat = f"<chat_history>\n{chat}\n</chat_history>" if rng.random() < 0.8 else chat
    job = rng.choices(("title", "tags", "follow_ups"), (6, 2, 2))[0]
    length = rng.choice(("", f"{rng.randint(2, 4)}-{rng.randint(5, 8)} word ", "short "))
    task, rules = TEXT["client_jobs"][job], TEXT["client_rules"]
    rules = rng.sample(rules, rng.randint(0, len(rules)))
    answer = {
        "title": title,
        "tags": ["Chat"],
        "follow_ups": ["What can you do?", "What is 12 + 7?"],
    }[job]
    request = expand(task["request"].replace("@", length), rng)
    blocks = [f"### Task:\n{request}."]
    if rules:
        blocks.append("### Guidelines:\n" + "\n".join(rules))
    if rng.random() < 0.8:
        blocks.append(f"### Output:\nJSON format: {task['shape']}")
    if rng.random() < 0.3:
        blocks.append(
            '### Examples:\n- { "title": "Cooking Tips" }\n- { "title": "Music and Film" }'
        )
    blocks.append(f"### Chat History:\n{chat}")
    text = json.dumps({job: answer}, ensure_ascii=False)
    return Turn("\n".join(blocks), "The client wants a small JSON object about the chat.", text)


def system_prompt(rng: random.Random) -> str:
    """Short instructions of many kinds, sometimes with filler behind them."""
    text = expand(rng.choice(TEXT["systems"]), rng)
    return f"{text} {sentence(rng, rng.random() < 0.4)}" if rng.random() < 0.25 else text


def in_the_other_language(rng: random.Random) -> Conversation:
    """A follow-up that asks for the last answer in the other language."""
    name_en, name_zh, answer_en, answer_zh = rng.choice(TEXT["topics"]).values()
    if rng.random() < 0.5:
        asked = expand(rng.choice(TEXT["ask_topic_en"]), rng).replace("@", expand(name_en, rng))
        user = expand(
            "{And in Chinese|In Chinese please|Say that in Chinese|用中文说|中文呢|Chinese?}{?|}",
            rng,
        )
        turn = Turn(user, f"用户想用中文再听一遍{first_name(name_zh)}。", answer_zh)
        return Conversation(turn, history=[(asked, answer_en)])
    asked = expand(rng.choice(TEXT["ask_topic_zh"]), rng).replace("@", expand(name_zh, rng))
    user = expand(
        "{And in English|In English please|Say that in English|用英文说|英文呢|用英语回答}{?|}", rng
    )
    turn = Turn(user, f"The user wants {first_name(name_en)} again in English.", answer_en)
    return Conversation(turn, history=[(asked, answer_zh)])


def conversation(rng: random.Random, long_share: float = 0.008) -> Conversation:
    """One training conversation: most are short, some carry a history or a long system prompt."""
    shape = rng.random()
    if shape < 0.03:
        return Conversation(client_job(rng))
    if shape < 0.05:
        return in_the_other_language(rng)
    turn, _ = ordinary(rng)
    talk = Conversation(turn)
    if shape < 0.055:
        talk.turn = Turn(turn.user, "", TEXT["tool_answer"])
        talk.tool_result = noise(rng) if rng.random() < 0.5 else sentence(rng, False)
        return talk
    if rng.random() < 0.35:
        talk.system = system_prompt(rng)
    if shape < 0.20:
        for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4))):
            earlier, _ = ordinary(rng)
            # Clients send answers back with or without the blank line that followed the thought.
            talk.history.append((earlier.user, rng.choice(("", "", "\n\n")) + earlier.answer))
    elif shape < 0.235:
        talk.system = passage(rng, rng.choice((150, 300, 600, 1000)))
    elif shape < 0.235 + long_share:
        talk.system = passage(rng, rng.choice((1500, 3000, 5000, 8000)))
    elif shape < 0.245 + long_share:
        talk.history = [
            (
                passage(rng, rng.randint(100, 1500)),
                rng.choice(TEXT["refusals_en"] + TEXT["refusals_zh"]),
            )
        ]
    return talk
