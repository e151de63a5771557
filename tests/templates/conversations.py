"""Conversations of every kind that a template may meet."""

from __future__ import annotations

from typing import Any

from mcore.data.rows import Message, Row

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name, such as 北京"},
                "days": {"type": "integer", "enum": [1, 3, 7]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "What time it is.",
        "parameters": {"type": "object", "properties": {}},
    },
}
CODE = "```python\ndef f(x):\n\treturn {'a': [x, {{x}}], \"b\": x % 2}  # {% if x %}\n```\n\n"
UNICODE = "naïve café – 漢字 ひらがな 한국어 עברית 🤖👩‍👩‍👧 e\u0301 \u2028 \u00a0end\ufeff"


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


def calls(name: str, text: str = "", thought: str | None = None, **arguments: Any) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return Message("assistant", text, tool_calls=(call,), reasoning_content=thought)


def returns(text: str) -> Message:
    return Message("tool", text)


SYSTEM = Message("system", "You are terse.\nAnswer in English.")
THREE = (user("Hi"), says("Hello."), user("What is 2 + 2?"), says("4"), user("Thanks"), says("You are welcome."))
TWO_CALLS = Message(
    "assistant",
    "",
    tool_calls=(
        {"type": "function", "function": {"name": "clock", "arguments": {}}},
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}},
    ),
)
ASKED = (user("How is the weather in 北京?"), calls("get_weather", city="北京"), returns('{"sky": "clear", "°C": 21}'))
THOUGHT = "The user greets.\n\nI greet back."

PLAIN: dict[str, tuple[Message, ...]] = {
    "one turn": (user("Who are you?"), says("I am a robot.")),
    "three turns": THREE,
    "ten turns": tuple(turn for n in range(10) for turn in (user(f"number {n}?"), says(f"It is {n * n}."))),
    "system": (SYSTEM, user("Who are you?"), says("A robot.")),
    "system and three turns": (SYSTEM, *THREE),
    "an empty system message": (Message("system", ""), user("Hi"), says("Hello.")),
    "unicode": (user(UNICODE), says(UNICODE + " " + UNICODE)),
    "unicode in the system message": (Message("system", UNICODE), user("Hi"), says("¿Qué?")),
    "letters with marks apart": (user("cafe\u0301"), says("re\u0301sume\u0301 \u1e9b\u0323")),
    "code": (user("Write f.\n" + CODE), says(CODE + "It returns a dict.")),
    "Jinja in the text": (user("{{ messages }} {% endfor %} {# no #}"), says("{{ bos_token }}{% raw %}")),
    "the same answer twice": (user("a"), says("the same"), user("b"), says("the same")),
    "an answer that is in the question": (user("Say: it is 4. it is 4."), says("it is 4.")),
    "an answer like a role": (user("assistant"), says("assistant"), user("model"), says("user")),
    "one letter": (user("a"), says("b")),
    "digits": (user("1234567890 " * 3), says("0123 456,789.00")),
    "white space behind": (user("Hi  \n\n"), says("Hello. ")),
    "lines apart": (user("a\n\n\n\nb"), says("a\n\n\n b\n\tc")),
    "very long": (user("tell me more. " * 4000), says("once upon a time " * 6000)),
    "long and many": tuple(turn for n in range(4) for turn in (user("why? " * 500), says(f"because {n}. " * 500))),
    "an empty question": (user(""), says("Yes?")),
    "an empty answer": (user("Say nothing."), says("")),
    "an empty answer in between": (user("Say nothing."), says(""), user("And now?"), says("Something.")),
    "HTML": (user("<b>&amp;</b> <br/>"), says("<p class='x'>\"&lt;\"</p>")),
    "marks of other models": (user("[INST] <<SYS>> ### User:"), says("Human: \n\nAssistant: [/INST]")),
    "marks almost": (user("<|im_start |> < |eot_id|> <start_of_turn"), says("<|im_end| > <|end |> |>")),
    "a thought as text": (user("Hi"), says(f"<think>\n{THOUGHT}\n</think>\n\nHello.")),
    "an empty thought as text": (user("Hi"), says("<think>\n\n</think>\n\nHello.")),
    "a thought": (user("Hi"), says("Hello.", reasoning_content=THOUGHT)),
    "thoughts in both turns": (
        user("Hi"),
        says("Hello.", reasoning_content=THOUGHT),
        user("2 + 2?"),
        says("4", reasoning_content="Two and two."),
    ),
    "a thought in the last turn": (user("Hi"), says("Hello."), user("2 + 2?"), says("4", reasoning_content="Easy.")),
    "a thought with a system message": (SYSTEM, user("Hi"), says("Hello.", reasoning_content=THOUGHT)),
}
WITH_TOOLS: dict[str, tuple[Message, ...]] = {
    "tools that are not called": (user("Hi"), says("Hello.")),
    "a call": ASKED[:2],
    "a call and its answer": (*ASKED, says("It is clear.")),
    "a call with words": (user("Time?"), calls("clock", "Let me look."), returns("12:00"), says("Noon.")),
    "a call with a thought": (
        user("Time?"),
        calls("clock", thought="I need a clock."),
        returns("12:00"),
        says("Noon."),
    ),
    "two calls one by one": (*ASKED, calls("clock"), returns("12:00"), says("Clear, at noon.")),
    "two calls at once": (
        user("Time and weather?"),
        TWO_CALLS,
        returns("12:00"),
        returns("rain"),
        says("Rain at noon."),
    ),
    "calls in two rounds": (
        *ASKED,
        says("Clear."),
        user("And the time?"),
        calls("clock"),
        returns("12:00"),
        says("Noon."),
    ),
    "a system message and tools": (SYSTEM, *ASKED, says("It is clear.")),
    "a call with odd arguments": (
        user("Go"),
        calls("get_weather", city='"<b>\\ \n漢', days=1),
        returns(""),
        says("Done."),
    ),
}


def rows() -> dict[str, Row]:
    """By what they are; those that are about thoughts come with `enable_thinking` as well."""
    found = {name: Row(messages, place=name) for name, messages in PLAIN.items()}
    for name, messages in WITH_TOOLS.items():
        found[name] = Row(messages, place=name, tools=(WEATHER, CLOCK))
    switched = [name for name in found if "thought" in name] + ["one turn", "three turns", "a call and its answer"]
    for name in switched:
        for value in (True, False):
            place = f"{name}, enable_thinking {str(value).lower()}"
            row = found[name]
            kwargs = {"enable_thinking": value}
            found[place] = Row(row.messages, place=place, tools=row.tools, chat_template_kwargs=kwargs)
    return found
