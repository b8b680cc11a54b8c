"""sft check FOLDER: what the files of a model folder are and what they may do, without loading any of them."""

from pathlib import Path
from typing import Any

import msgspec

from sftcli import console, reading
from sftcli.errors import CheckpointError, SftError
from sftcli.tensorheader import read_header
from sftcli.text.folder import folder_template, load_codec
from sftcli.text.template import Template

PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
CODE = (".dll", ".dylib", ".py", ".pyc", ".sh", ".so")
READ_WITH = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # others' files
MARKS = {True: ("ok", "green"), False: ("UNSAFE", "bold red"), None: ("note", "yellow")}

Verdict = tuple[bool | None, str]  # safe, unsafe or unused; what there is to say


def check_folder(path: str) -> bool:
    """Print a line a file on stdout; True if none is unsafe or damaged."""
    folder = Path(path)
    verdicts = [(file, _verdict(file)) for file in sorted(folder.rglob("*")) if not file.is_dir()]
    screen = console.console(stderr=False)
    for file, (safe, text) in verdicts:
        mark, style = MARKS[safe]
        size = f"{file.stat().st_size:,}" if file.exists() else "-"
        name = f"{file.relative_to(folder)}"
        screen.print(console.styled([(f"{mark:>7}  ", style), (f"{name:<32} ", "bold"), (f"{size:>14}  {text}", "")]))
    return all(safe is not False for _, (safe, _) in verdicts)


def _verdict(file: Path) -> Verdict:
    try:
        if not file.is_file():
            return False, "a link to nothing" if file.is_symlink() else "not a file"
        if file.suffix in PICKLES:
            return False, "may be a pickle, which can run code; it is never loaded"
        if file.suffix in CODE:
            return None, "code; it is never run"
        if file.suffix == ".safetensors":
            return _safetensors(file)
        if file.name == "tokenizer.json":
            codec = load_codec(file.parent)
            return True, f"tokenizer {codec.hash}, {codec.size:,} tokens, {len(codec.added):,} of them added"
        if file.suffix == ".json":
            return _json(file)
        if file.suffix == ".jinja":
            return _template(folder_template(file.parent) if file.name == "chat_template.jinja" else None, file)
    except (SftError, OSError) as error:
        of_another = any(str(file.parent / name) in str(error) for name in READ_WITH if name != file.name)
        return None if of_another else False, str(error)
    return None, "not read"


def _json(file: Path) -> Verdict:
    value = _decoded(file)
    if not isinstance(value, dict):
        return True, "JSON"
    if "auto_map" in value:
        return None, "names code of its own (auto_map); it is never run"
    if isinstance(names := value.get("weight_map"), dict):
        strays = [n for n in names.values() if not isinstance(n, str) or Path(n).name != n or "\0" in n]
        if strays:
            return False, f"names a file outside of the folder: {str(strays[0])!r}"
        return True, f"{len(names):,} tensors in {len(set(names.values())):,} files"
    if file.name == "tokenizer_config.json" and isinstance(source := value.get("chat_template"), str):
        return _template(source, file)
    return True, str(value.get("model_type") or "JSON")


def _decoded(file: Path) -> Any:
    try:
        return msgspec.json.decode(reading.read_bytes(file))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None


def _template(source: str | None, file: Path) -> Verdict:
    text = source if source is not None else reading.read_bytes(file).decode(errors="replace")
    specials = load_codec(file.parent).specials if (file.parent / "tokenizer.json").is_file() else {}
    return True, f"template {Template(text, file.name, specials).hash}; it runs in a sandbox"


def _safetensors(file: Path) -> Verdict:
    with open(file, "rb") as opened:
        tensors, _, _ = read_header(opened, file)
    return True, f"{len(tensors):,} tensors of {', '.join(sorted({said['dtype'] for said in tensors.values()})) or '-'}"
