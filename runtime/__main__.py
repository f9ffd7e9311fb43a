"""``python -m runtime --fd N``: the engine process; `EngineClient` starts it."""

from runtime.process import main

main()
