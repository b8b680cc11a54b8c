"""Ollama's Modelfile of an exported model: where it is, how a conversation is written, what ends a turn."""

from collections.abc import Iterable

from sftcli.errors import DataError
from sftcli.text.template import Template

CHATML = ("<|im_start|>{role}\n{text}<|im_end|>\n", "<|im_start|>assistant\n")
LLAMA3 = (
    "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
PROBE = [("system", "One."), ("user", "Two?"), ("assistant", "Three."), ("user", "Four?")]
QUOTES = '"' * 3
DEFAULT = "\x00"  # stands for a default system prompt, which is found by what surrounds it


def modelfile(name: str, template: Template | None, adds_bos: bool, stops: Iterable[str]) -> str:
    """The Modelfile's text; without a TEMPLATE line Ollama takes what it makes of the chat template in the file."""
    lines = [f"FROM ./{name}"]
    if template is not None:
        lines += _template_lines(template, adds_bos)
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if QUOTES not in stop]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As Ollama reads it: three quotes where the text has one, or a line's end."""
    return f"{QUOTES}{text}{QUOTES}" if '"' in text or "\n" in text else f'"{text}"'


def _template_lines(template: Template, adds_bos: bool) -> list[str]:
    """TEMPLATE in Go's language where the chat template writes as chatml or llama3 does; SYSTEM where it has one."""
    for turn, opening in (CHATML, LLAMA3):
        whole = "".join(turn.format(role=role, text=text) for role, text in PROBE) + opening
        found = _rendered(template, PROBE)
        if found is not None and found.endswith(whole):
            bos = found.removesuffix(whole)  # written by the template; the tokenizer must not write it twice
            if bos and bos != template.specials.get("bos_token"):
                continue
            go = turn.format(role="{{ .Role }}", text="{{ .Content }}")
            body = ("" if adds_bos else bos) + "{{ range .Messages }}" + go + "{{ end }}" + opening
            return [f'TEMPLATE """{body}"""', *_system_line(template, turn, opening, bos)]
    return ["# the chat template in the file is none that is known here as a Go template"]


def _system_line(template: Template, turn: str, opening: str, bos: str) -> list[str]:
    """The system prompt that the template writes where a conversation has none."""
    found = _rendered(template, [("user", "Two?")])
    before, after = turn.format(role="system", text=DEFAULT).split(DEFAULT)
    end = after + turn.format(role="user", text="Two?") + opening
    if found is None or not found.startswith(bos + before) or not found.endswith(end):
        return []
    text = found.removeprefix(bos + before).removesuffix(end)
    if QUOTES in text or text.endswith('"'):
        return ["# the system prompt of the chat template cannot be written here"]
    return [f"SYSTEM {QUOTES}{text}{QUOTES}"]


def _rendered(template: Template, turns: list[tuple[str, str]]) -> str | None:
    try:
        return template.render([{"role": role, "content": text} for role, text in turns], None, True)
    except DataError:
        return None
