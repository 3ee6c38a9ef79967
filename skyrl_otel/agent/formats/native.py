"""What C++ and Go libraries print: glog, absl, c10 and torch, Ray's core, zap, NCCL; SGLang, DeepSpeed; and last words.

glog and absl: `LmmddHH:MM:SS.uuuuuu thread file:line] `; torch's Python loggers write the same (`torch/_logging/_internal.py`).
c10: `c10/util/Logging.cpp`, the same in brackets. Ray: `src/ray/util/logging.cc`. zap: its console encoder.
"""

from skyrl_otel.agent.formats.format import Format

_SHORT = rb"(?P<when>\d{4} \d\d:\d\d:\d\d)\."
_PLACE = rb"(?P<file>[^\s:\]]{1,200}):(?P<line>\d{1,7})\] "

GLOG = Format(
    name="glog",
    first=b"DIWEFVC",
    pattern=rb"(?P<level>[DIWEFVC])" + _SHORT + rb"(?P<fraction>\d{3,9}) +(?P<thread>\d{1,20}) " + _PLACE,
    date="%m%d %H:%M:%S",
    scope="glog",
    levels={b"v": 5},
)
GLOG_YEAR = Format(
    name="glog-year",
    first=b"IWEF",
    pattern=rb"(?P<level>[IWEF])(?P<when>\d{8} \d\d:\d\d:\d\d)\.(?P<fraction>\d{6}) +(?P<thread>\d{1,20}) " + _PLACE,
    date="%Y%m%d %H:%M:%S",
    scope="glog",
)
C10 = Format(
    name="c10",
    first=b"[",
    pattern=rb"\[(?P<level>[DIWEFVC])" + _SHORT + rb"(?P<fraction>\d{6,9}) " + _PLACE,
    date="%m%d %H:%M:%S",
    scope="c10",
)
RAY_CORE = Format(
    name="ray-core",
    first=b"[",
    pattern=rb"\[(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<fraction>\d{3}) (?P<level>[DIWECF]) (?P<pid>\d{1,10}) "
    rb"(?P<thread>\d{1,20})\] (?:\((?P<logger>[^)\s]{1,80})\) )?(?P<file>[\w./\-]{1,200}):(?P<line>\d{1,7}): ?",
    date="%Y-%m-%d %H:%M:%S",
    scope="ray",
    repeats=True,
)
ZAP = Format(
    name="zap",
    first=b"12",
    pattern=rb"(?P<when>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(?P<fraction>\d{3,9})(?P<zone>Z|[+-]\d\d:?\d\d)\t"
    rb"(?P<level>[A-Za-z]{1,10})\t(?:(?P<logger>[\w.\-]{1,120})\t)?(?:(?P<file>[\w./@\-]{1,200}\.go):(?P<line>\d{1,7})\t)?",
    date="%Y-%m-%dT%H:%M:%S",
    scope="zap",
)
# Not run here, from NCCL's src/debug.cc (0456df2), ncclDebugLogV: "%s:%d:%d [%d] NCCL INFO ", "[%F %T] %s:%d:%d [%d] %s:%d (%s)
# NCCL WARN " behind an empty line.
NCCL = Format(
    name="nccl",
    first=b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[",
    pattern=rb"(?:\[(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] )?(?![12]\d{3}-\d\d-\d\d )[\w.\-]{1,253}:(?P<pid>\d{1,10}):"
    rb"(?P<thread>\d{1,10}) \[-?\d{1,4}\] (?:(?P<file>[\w./\-]{1,200}):(?P<line>\d{1,7}) (?:\((?P<function>[^)\s]{1,120})\) )?)?"
    rb"NCCL (?P<level>INFO|WARN|TRACE|ERROR) ",
    date="%Y-%m-%d %H:%M:%S",
    scope="nccl",
)
# Not run here, from SGLang's python/sglang/srt/utils, configure_logger: "[%(asctime)s{prefix}] %(message)s" with prefixes
# such as " TP0", and no level. Where its prefix is empty nothing tells that a line is SGLang's: see BRACKETS.
SGLANG = Format(
    name="sglang",
    first=b"[",
    pattern=rb"\[(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{3}))?"
    rb"(?P<thread>(?: (?:DP|TP|PP|EP|MoEDP)\d{1,4}){1,6})\] ",
    date="%Y-%m-%d %H:%M:%S",
    scope="sglang",
)
# Not run here, from DeepSpeed's deepspeed/utils/logging.py, create_logger: "[%(asctime)s] [%(levelname)s]
# [%(filename)s:%(lineno)d:%(funcName)s] %(message)s".
DEEPSPEED = Format(
    name="deepspeed",
    first=b"[",
    pattern=rb"\[(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<fraction>\d{3})\] "
    rb"\[(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\] "
    rb"\[(?P<file>[^\s:\]]{1,200}):(?P<line>\d{1,7}):(?P<function>[^\s\]]{1,120})\] ",
    date="%Y-%m-%d %H:%M:%S",
    scope="deepspeed",
)
_SIGNALS = rb"(?:Segmentation fault|Aborted|Bus error|Killed|Illegal instruction|Floating point exception)"
_DUMPED = rb"(?: \(core dumped\))?"
# Python/pylifecycle.c fatal_error, Modules/faulthandler.c; libstdc++'s verbose terminate handler; glibc's words; a shell without
# job control, as dash.
LAST_WORDS = Format(
    name="last-words",
    first=b"FSABKItdmcf*",
    pattern=rb"(?:Fatal Python error: |terminate called |\*\*\* (?:Aborted at |SIG[A-Z]{2,6} )"
    rb"|free\(\): |double free or corruption|munmap_chunk\(\): |malloc\(\): |corrupted size vs|"
    + _SIGNALS
    + _DUMPED
    + rb"$)",
    level="FATAL",
    kind="native",
    keep=True,
)
# bash, jobs.c, notify_of_job_status: "script: line 3:  4711 Segmentation fault      (core dumped) command". The pid is that of
# the dead child.
SHELL = Format(
    name="shell",
    first=b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-./",
    pattern=rb"(?!(?:TRACE|DEBUG|INFO|NOTICE|SUCCESS|WARN(?:ING)?|ERROR|CRITICAL|FATAL):)[^\s:]{1,300}:(?: line \d{1,7}:)? {1,5}"
    rb"(?P<pid>\d{1,10}) " + _SIGNALS + rb"(?:$| {2,80}(?:\(core dumped\) )?(?=\S))",
    level="FATAL",
    kind="native",
    keep=True,
)
STALLED = Format(
    name="faulthandler-timeout",
    first=b"TC",
    pattern=rb"(?:Timeout \(\d{1,4}:\d\d:\d\d(?:\.\d{1,6})?\)!$|"
    rb"(?:Current thread|Thread) 0x[0-9a-f]{4,16} .{0,100}\(most recent call first\):)",
    level="ERROR",
    kind="native",
    keep=True,
)
FORMATS = (GLOG, GLOG_YEAR, C10, RAY_CORE, ZAP, NCCL, SGLANG, DEEPSPEED, LAST_WORDS, SHELL, STALLED)
