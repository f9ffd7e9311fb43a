"""Pictures of the page for the README: ``python -m tests.page.pictures`` takes them anew."""

from __future__ import annotations

from pathlib import Path

from runtime import Tokenizer
from tests.api.scripted import TINY, engine_of, scripted_state, serve
from tests.page.browser import run_scenario

FOLDER = Path(__file__).with_name("screenshots")
KEPT = ("chat-light", "engine-dark")
THOUGHT = "They ask about prefixes. Say what is kept, and when it helps."
FIRST = """\
It keeps the **work of a prompt**: pages of `K` and `V` that a later prompt with the same \
beginning finds again.

- A long system prompt is computed once.
- The next turn begins where the last one ended."""
SECOND = """\
Through the OpenAI API:

```python
client = OpenAI(base_url="http://127.0.0.1:8000/v1")
```"""


def take_pictures(folder: Path) -> None:
    """Write PNG files of the chat, the engine and the settings, with answers made up for them."""
    state = scripted_state(Tokenizer.load(TINY))
    engine = engine_of(state)
    engine.say(FIRST, thought=THOUGHT)
    engine.seconds_per_token = 0.015

    def following() -> None:
        engine.say(SECOND, thought="They want to connect a client. Show the address.")
        engine.num_cached = 96

    with serve(state) as base:
        page = base.removesuffix("v1")
        size = {"width": "1100", "height": "740"}
        run_scenario("pictures", page, {"next": following}, folder=str(folder), **size)


if __name__ == "__main__":
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        take_pictures(Path(temporary))
        for name in KEPT:
            shutil.copy(Path(temporary) / f"{name}.png", FOLDER)
