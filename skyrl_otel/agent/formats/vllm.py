"""vLLM: `vllm/logging_utils/formatter.py` and `vllm/logger.py` (0.32.0), `vllm/logger.py` (0.8).

``INFO 11-21 14:36:10 [core.py:402] init engine took 4.87 s``, in older versions ``INFO 11-21 14:36:10 core.py:402] init``. The
formatter repeats the header on each line of a message; the child's prefix stands before it.
"""

from skyrl_otel.agent.formats.format import Format

VLLM = Format(
    name="vllm",
    first=b"DIWEC",
    pattern=rb"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<when>\d\d-\d\d \d\d:\d\d:\d\d) "
    rb"\[?(?P<file>[^\s\]:]{1,80}):(?P<line>\d{1,6})\] ",
    date="%m-%d %H:%M:%S",
    stop=b"] ",
    scope="vllm",
    repeats=True,
)
FORMATS = (VLLM,)
