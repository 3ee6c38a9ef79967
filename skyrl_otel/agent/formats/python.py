"""What Python's own logging and its common companions print.

loguru's default layout (`loguru/_defaults.py` 0.7, which SkyRL uses too), `logging.BASIC_FORMAT`, layouts around `%(asctime)s`,
uvicorn's `DefaultFormatter` and `AccessFormatter`, structlog's `ConsoleRenderer`, the `warnings` module, Ray's Python loggers
(`ray/_private/ray_constants.py`, LOGGER_FORMAT).
"""

from skyrl_otel.agent.formats.format import Format

_LEVEL = rb"(?P<level>TRACE|DEBUG|INFO|NOTICE|SUCCESS|WARN(?:ING)?|ERROR|CRITICAL|FATAL)"
_DAY = rb"(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)"
_DATE = "%Y-%m-%d %H:%M:%S"
_WORDS = b"TDINSWECF"
_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"

LOGURU = Format(
    name="loguru",
    first=b"12",
    pattern=_DAY + rb"\.(?P<fraction>\d{3,6}) \| (?P<level>[A-Z]{1,20}) *\| "
    rb"(?P<logger>[^\s:|]{1,120}):(?P<function>[^\s:]{1,120}):(?P<line>\d{1,7}) - ",
    date=_DATE,
)
ASCTIME = Format(
    name="asctime",
    first=b"12",
    pattern=_DAY + rb"(?:,(?P<fraction>\d{3}))?(?: - (?P<name>(?P<logger>[\w.\-]{1,120}) - ))? ?" + _LEVEL + rb" - ",
    date=_DATE,
)
ASCTIME_LEVEL = Format(
    name="asctime-level",
    first=b"12",
    pattern=_DAY
    + rb"(?:,(?P<fraction>\d{3}))? (?:\[(?=[A-Z]+\]))?"
    + _LEVEL
    + rb"\]? +(?!- )(?:\[?(?P<logger>[A-Za-z_][\w.]{0,120})(?:\]:?|:| [-:]) )?(?:: )?",
    date=_DATE,
)
BASIC = Format(name="basic", first=_WORDS, pattern=_LEVEL + rb":(?P<logger>[\w.\-]{1,120}):")
UVICORN = Format(name="uvicorn", first=_WORDS, pattern=_LEVEL + rb": {1,8}")
STRUCTLOG = Format(
    name="structlog",
    first=b"12",
    pattern=rb"(?P<when>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{3,6}))?(?P<zone>Z)? \[(?P<level>[a-z]{1,10}) *\] ",
    date="%Y-%m-%d[T ]%H:%M:%S",
)
WARNINGS = Format(
    name="warnings",
    first=_LETTERS + b"/<.",
    pattern=rb"(?P<file><[^>\s]{1,60}>|[^\s:<]{1,300}):(?P<line>\d{1,7}): (?=[A-Za-z_.]{0,60}Warning: )",
    scope="py.warnings",
    level="WARNING",
    kind="warning",
)
RAY = Format(
    name="ray",
    first=b"12",
    pattern=_DAY + rb",(?P<fraction>\d{3})\t(?P<level>[A-Z]{1,10}) (?P<file>[^\s:]{1,120}):(?P<line>\d{1,7}) -- ",
    date=_DATE,
    scope="ray",
)
# "[%(asctime)s] message", "[%(asctime)s] LEVEL message", "[%(asctime)s] [LEVEL] message", and Hydra's default,
# "[%(asctime)s][%(name)s][%(levelname)s] - message" (hydra/conf/hydra/job_logging/default.yaml). Not NCCL's and DeepSpeed's.
BRACKETS = Format(
    name="brackets",
    first=b"[",
    pattern=rb"\[(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:[.,](?P<fraction>\d{3}))?\]"
    rb"(?! [\w.\-]{1,253}:\d{1,10}:\d{1,10} \[)(?! \[[A-Z]{1,20}\] \[[^\s:\]]{1,200}:\d{1,7}:[^\s\]]{1,120}\] )"
    rb"(?:\[(?P<logger>[\w.\-]{1,120})\](?=\[[A-Z]{1,20}\] - ))?(?: ?\[?" + _LEVEL + rb"(?:\]:?|:|(?= ))(?: - ?)?)? ?",
    date=_DATE,
)
FORMATS = (LOGURU, ASCTIME, ASCTIME_LEVEL, BRACKETS, BASIC, UVICORN, STRUCTLOG, WARNINGS, RAY)
