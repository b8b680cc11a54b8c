"""Types of the fields of recipe.py: what may be written shorter, and bounds."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def listed(value: Any) -> Any:
    """`data: a.jsonl` means `data: [a.jsonl]`."""
    return [value] if isinstance(value, str) else value


def _columns(value: Any) -> Any:
    """`prompt=question,completion=answer` means {prompt: question, completion: answer}."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    if any(not name or not column for name, _, column in pairs):
        raise ValueError("expected prompt=question,completion=answer")
    return {name.strip(): column.strip() for name, _, column in pairs}


def kind(value: Any) -> Any:
    """`schedule: cosine` means `schedule: {kind: cosine}`."""
    return {"kind": value} if isinstance(value, str) else value


def _controls(value: Any) -> Any:
    """`glm` means the control tokens of blank infilling, `bert` those of masked LM."""
    return list(OBJECTIVE_CONTROLS[value]) if value in ("glm", "bert") else listed(value)


def _above_zero(size: str) -> str:
    if not set(size) & set("123456789"):
        raise ValueError("expected more than 0")
    return size


GLM_CONTROLS = ("[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>")
MASKED_LM_CONTROLS = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
OBJECTIVE_CONTROLS = {"glm": GLM_CONTROLS, "bert": tuple(MASKED_LM_CONTROLS.values())}
Controls = Annotated[list[str], BeforeValidator(_controls)]
Files = Annotated[list[str], BeforeValidator(listed)]
Columns = Annotated[dict[str, str], BeforeValidator(_columns)]
Positive = Annotated[int, Field(gt=0, le=1 << 40)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?(KB|MB|GB)$"), AfterValidator(_above_zero)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]


def _spans(value: Any) -> Any:
    """`2:3,4:6` means [(2, 3), (4, 6)]."""
    if isinstance(value, int):
        raise ValueError("expected spans such as 2:3,4:6; YAML reads a single 2:3 as a number: put it in quotes")
    return [part.split(":") for part in value.split(",")] if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    """`1,0` means [1, 0]; `1` means [1]."""
    return str(value).split(",") if isinstance(value, str | int) else value


Count = Annotated[int, Field(ge=0, le=1 << 40)]
Spans = Annotated[list[tuple[Count, Count]], BeforeValidator(_spans)]
Numbers = Annotated[list[Count], BeforeValidator(_numbers)]
