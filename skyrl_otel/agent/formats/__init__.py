"""The table of formats. A new one is a file here and a line below; docs/formats.md shows one."""

from skyrl_otel.agent.formats import native, python, structured, vllm
from skyrl_otel.agent.formats.format import Format

FORMATS: tuple[Format, ...] = (*vllm.FORMATS, *python.FORMATS, *native.FORMATS, *structured.FORMATS)
